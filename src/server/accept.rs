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
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{Limits, Origin, Reached, Service, conn, drain, listener};

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
    let here = accepting.listener(index);
    let no_more_come =
        accept_until_closed(&listener, index, &here, &service, &accepting, &drain).await;
    // Whoever the kernel has shaken hands with is a client that thinks it is connected. Asked
    // directly: the runtime's readiness may lag behind the kernel's queue.
    let Ok(listener) = listener.into_std() else { return };
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                // Over the limit they wait as before; where others keep coming, that has no end.
                let place = if no_more_come {
                    accepting.places.enter(&here).await
                } else {
                    accepting.places.try_enter(&here)
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
    here: &Places,
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
            place = accepting.place(here, &**service) => place,
        };
        let Some(place) = place else { return false };
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

/// So many at once, which may change.
#[derive(Clone, Debug)]
struct Places {
    free: Arc<Semaphore>,
    all: Rc<Cell<usize>>,
}

impl Places {
    fn new(all: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(all)), all: Rc::new(Cell::new(all)) }
    }

    /// More places at once, or fewer as they become free.
    fn resize(&self, now: usize) {
        let before = self.all.replace(now);
        if let Some(more) = now.checked_sub(before) {
            self.free.add_permits(more);
        } else {
            let fewer = u32::try_from(before - now).unwrap_or(u32::MAX);
            let free = Arc::clone(&self.free);
            tokio::task::spawn_local(async move {
                if let Ok(places) = free.acquire_many_owned(fewer).await {
                    places.forget();
                }
            });
        }
    }

    fn try_take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).try_acquire_owned().ok()
    }

    async fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).acquire_owned().await.ok()
    }

    /// A place among all, and one among those `here`.
    async fn enter(&self, here: &Self) -> Option<Place> {
        // The listener's first: who waits for that keeps nobody else waiting.
        Some([here.take().await?, self.take().await?])
    }

    fn try_enter(&self, here: &Self) -> Option<Place> {
        Some([here.try_take()?, self.try_take()?])
    }
}

/// Of a connection: its listener's and the worker's.
pub(super) type Place = [OwnedSemaphorePermit; 2];

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
    places: Places,
    /// By the number of the listener.
    listeners: Rc<RefCell<Vec<Places>>>,
    handshakes: Places,
    tasks: Rc<RefCell<JoinSet<()>>>,
}

impl Accepting {
    /// For one worker, whose listeners may have so many connections each.
    pub fn new(limits: Limits, listeners: &[usize]) -> Self {
        Self {
            places: Places::new(limits.connections),
            listeners: Rc::new(RefCell::new(listeners.iter().copied().map(Places::new).collect())),
            handshakes: Places::new(limits.handshakes),
            limits: Rc::new(Cell::new(limits)),
            tasks: Rc::default(),
        }
    }

    /// New limits, for requests that have not begun. Where fewer connections are allowed than there
    /// are, nobody is cut off: new ones wait until enough have gone.
    pub fn set_limits(&self, limits: Limits, listeners: &[usize]) {
        self.limits.set(limits);
        self.places.resize(limits.connections);
        self.handshakes.resize(limits.handshakes);
        let mut known = self.listeners.borrow_mut();
        for (number, all) in listeners.iter().enumerate() {
            match known.get(number) {
                Some(places) => places.resize(*all),
                None => known.push(Places::new(*all)),
            }
        }
    }

    fn listener(&self, number: usize) -> Places {
        // One that nobody told of has the worker's limit only.
        let known = self.listeners.borrow().get(number).cloned();
        known.unwrap_or_else(|| Places::new(self.places.all.get()))
    }

    /// A place for whoever comes next. Tells that there is none, if so.
    async fn place<S: Service>(&self, here: &Places, service: &S) -> Option<Place> {
        if here.free.available_permits() == 0 {
            service.reached(Reached::ListenerConnections);
        } else if self.places.free.available_permits() == 0 {
            service.reached(Reached::Connections);
        }
        self.places.enter(here).await
    }

    /// A place for whoever comes by QUIC, which has no backlog to wait in. Tells that there is none,
    /// if so.
    #[cfg(feature = "http3")]
    pub(super) fn try_place<S: Service>(&self, listener: usize, service: &S) -> Option<Place> {
        let here = self.listener(listener);
        let place = self.places.try_enter(&here);
        if place.is_none() {
            let is_here = here.free.available_permits() == 0;
            service.reached(if is_here {
                Reached::ListenerConnections
            } else {
                Reached::Connections
            });
        }
        place
    }

    #[cfg(feature = "http3")]
    pub(super) fn limits(&self) -> Limits {
        self.limits.get()
    }

    #[cfg(feature = "http3")]
    pub(super) fn handshakes(&self) -> Arc<Semaphore> {
        Arc::clone(&self.handshakes.free)
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
        place: Place,
    ) {
        // Once for the connection, not for each request: it is a system call.
        let _ = stream.set_nodelay(true);
        let Ok(local) = stream.local_addr() else { return };
        let origin = Origin { listener, peer, local, secure: false };
        let (service, limits, drain) = (Rc::clone(service), Rc::clone(&self.limits), drain.clone());
        let handshakes = Arc::clone(&self.handshakes.free);
        let mut tasks = self.tasks.borrow_mut();
        tasks.spawn_local(async move {
            conn::run(stream.into(), origin, service, limits, handshakes, drain).await;
            drop(place);
        });
        // Those that ended are forgotten here rather than by a task of their own.
        while tasks.try_join_next().is_some() {}
    }
}
