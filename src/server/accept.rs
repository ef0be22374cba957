//! Accepts connections for one worker.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use super::{Limits, Origin, Service, conn, drain, listener};

/// How long accepting rests when the process is out of descriptors or memory: trying again at
/// once would spin.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// How long the listener stays open after it has stopped to take new handshakes: those that were
/// under way end within a round trip.
const HANDSHAKES: Duration = Duration::from_millis(100);

/// Accepts until the drain starts, then takes whoever the kernel has shaken hands with and closes
/// the socket. The connections finish what they have; [`Accepting::finished`] waits for them.
pub async fn serve<S: Service + 'static>(
    listener: TcpListener,
    index: usize,
    service: Rc<S>,
    accepting: Accepting,
    drain: drain::Watch,
) {
    let no_more_come = accept_until_closed(&listener, index, &service, &accepting, &drain).await;
    // Whoever the kernel has shaken hands with is a client that thinks it is connected. Asked
    // directly: the runtime's readiness may lag behind the kernel's queue.
    let Ok(listener) = listener.into_std() else { return };
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                let places = Arc::clone(&accepting.places);
                // Over the limit they wait as before; where others keep coming, that has no end.
                let place = if no_more_come {
                    places.acquire_owned().await.ok()
                } else {
                    places.try_acquire_owned().ok()
                };
                let Some(place) = place else { return };
                if stream.set_nonblocking(true).is_ok()
                    && let Ok(stream) = TcpStream::from_std(stream)
                {
                    accepting.start(stream, peer, index, &service, &drain, place);
                }
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(_) => return,
        }
    }
}

/// Returns whether nobody can join the kernel's queue any more.
async fn accept_until_closed<S: Service + 'static>(
    listener: &TcpListener,
    index: usize,
    service: &Rc<S>,
    accepting: &Accepting,
    drain: &drain::Watch,
) -> bool {
    let mut closing = std::pin::pin!(async {
        drain.started().await;
        // Closing a listener resets the connections that nobody has accepted yet, so first no
        // new ones may come about. Where the filter can't be set, some may be reset.
        let refuses = listener::refuse_handshakes(listener).is_ok();
        if refuses {
            tokio::time::sleep(HANDSHAKES).await;
        }
        refuses
    });
    loop {
        // Over the limit, new connections wait in the kernel's backlog.
        let place = tokio::select! {
            biased;
            refuses = &mut closing => return refuses,
            place = Arc::clone(&accepting.places).acquire_owned() => place,
        };
        let Ok(place) = place else { return false };
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            refuses = &mut closing => return refuses,
        };
        match accepted {
            Ok((stream, peer)) => accepting.start(stream, peer, index, service, drain, place),
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(EXHAUSTED).await;
            }
        }
    }
}

/// More places at once, or fewer as they become free.
fn resize(places: &Arc<Semaphore>, before: usize, now: usize) {
    if let Some(more) = now.checked_sub(before) {
        places.add_permits(more);
    } else {
        let fewer = u32::try_from(before - now).unwrap_or(u32::MAX);
        let places = Arc::clone(places);
        tokio::task::spawn_local(async move {
            if let Ok(places) = places.acquire_many_owned(fewer).await {
                places.forget();
            }
        });
    }
}

/// Whether the error belongs to the connection that was being accepted (accept(2): it was gone
/// before we got to it), so that the next one may fare better.
fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// What all listeners of one worker share.
#[derive(Clone, Debug)]
pub struct Accepting {
    limits: Rc<Cell<Limits>>,
    places: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    tasks: Rc<RefCell<JoinSet<()>>>,
}

impl Accepting {
    /// For one worker.
    pub fn new(limits: Limits) -> Self {
        Self {
            places: Arc::new(Semaphore::new(limits.connections)),
            handshakes: Arc::new(Semaphore::new(limits.handshakes)),
            limits: Rc::new(Cell::new(limits)),
            tasks: Rc::default(),
        }
    }

    /// New limits, for requests that have not begun. Where fewer connections are allowed than there
    /// are, nobody is cut off: new ones wait until enough have gone.
    pub fn set_limits(&self, limits: Limits) {
        let before = self.limits.replace(limits);
        resize(&self.places, before.connections, limits.connections);
        resize(&self.handshakes, before.handshakes, limits.handshakes);
    }

    /// Waits until every connection has ended.
    pub async fn finished(&self) {
        loop {
            let next = std::future::poll_fn(|cx| self.tasks.borrow_mut().poll_join_next(cx)).await;
            if next.is_none() {
                return;
            }
        }
    }

    fn start<S: Service + 'static>(
        &self,
        stream: TcpStream,
        peer: std::net::SocketAddr,
        listener: usize,
        service: &Rc<S>,
        drain: &drain::Watch,
        place: tokio::sync::OwnedSemaphorePermit,
    ) {
        // Once for the connection, not for each request: it is a system call.
        let _ = stream.set_nodelay(true);
        let Ok(local) = stream.local_addr() else { return };
        let origin = Origin { listener, peer, local, secure: false };
        let (service, limits, drain) = (Rc::clone(service), Rc::clone(&self.limits), drain.clone());
        let handshakes = Arc::clone(&self.handshakes);
        let mut tasks = self.tasks.borrow_mut();
        tasks.spawn_local(async move {
            conn::run(stream.into(), origin, service, limits, handshakes, drain).await;
            drop(place);
        });
        // Those that ended are forgotten here rather than by a task of their own.
        while tasks.try_join_next().is_some() {}
    }
}
