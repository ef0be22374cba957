//! Accepts connections for one worker.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use super::{Limits, Origin, Service, conn, drain};

/// How long accepting rests when the process is out of descriptors or memory: trying again at
/// once would spin.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// Accepts until the drain starts or `stop` resolves, then takes what is already in the kernel's
/// queue and closes the socket. The connections go on; [`Accepting::finished`] waits for them.
pub async fn serve<S: Service + 'static>(
    listener: TcpListener,
    index: usize,
    service: Rc<S>,
    accepting: Accepting,
    stop: impl Future<Output = ()>,
) {
    let mut stop = std::pin::pin!(stop);
    loop {
        // Over the limit, new connections wait in the kernel's backlog.
        let place = tokio::select! {
            biased;
            () = accepting.drain.started() => break,
            () = &mut stop => break,
            place = std::sync::Arc::clone(&accepting.places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            () = accepting.drain.started() => break,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, peer)) => accepting.start(stream, peer, index, &service, place),
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(EXHAUSTED).await;
            }
        }
    }
    // Whoever the kernel has shaken hands with is a client that thinks it is connected.
    while let Ok(place) = std::sync::Arc::clone(&accepting.places).try_acquire_owned() {
        let next = std::future::poll_fn(|cx| {
            std::task::Poll::Ready(match listener.poll_accept(cx) {
                std::task::Poll::Ready(Ok(accepted)) => Some(accepted),
                _ => None,
            })
        });
        let Some((stream, peer)) = next.await else { break };
        accepting.start(stream, peer, index, &service, place);
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
    drain: drain::Watch,
    places: std::sync::Arc<Semaphore>,
    tasks: Rc<RefCell<JoinSet<()>>>,
}

impl Accepting {
    /// For one worker.
    pub fn new(limits: Limits, drain: drain::Watch) -> Self {
        Self {
            places: std::sync::Arc::new(Semaphore::new(limits.connections)),
            limits: Rc::new(Cell::new(limits)),
            drain,
            tasks: Rc::default(),
        }
    }

    /// New limits, for requests that have not begun. The number of connections stays.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.set(limits);
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
        place: tokio::sync::OwnedSemaphorePermit,
    ) {
        // Once for the connection, not for each request: it is a system call.
        let _ = stream.set_nodelay(true);
        let Ok(local) = stream.local_addr() else { return };
        let origin = Origin { listener, peer, local };
        let (service, limits, drain) =
            (Rc::clone(service), Rc::clone(&self.limits), self.drain.clone());
        let mut tasks = self.tasks.borrow_mut();
        tasks.spawn_local(async move {
            conn::run(stream, origin, service, limits, drain).await;
            drop(place);
        });
        // Those that ended are forgotten here rather than by a task of their own.
        while tasks.try_join_next().is_some() {}
    }
}
