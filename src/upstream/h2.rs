//! One HTTP/2 connection to a node, which many exchanges share.
//!
//! Unlike an HTTP/1.1 connection it has tasks of its own on the worker's thread, since no exchange
//! can be the one that drives it. They end with its last user. A dropped exchange resets its stream.

use std::{
    cell::{Cell, RefCell},
    error::Error as _,
    future::Future,
    io,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Uri, Version, header,
    uri::{Authority, Scheme},
};
use hyper::{body::Body, client::conn::http2, rt::Executor};
use hyper_util::rt::TokioIo;
use tokio::{task::JoinSet, time::Instant};

use super::connection::{NodeIo, Wire};
use crate::{
    net::{Stream, proxy_protocol::Introduction},
    telemetry::metrics::Opened,
};

/// Exchanges at once on one connection; for more there is another. What the node allows may be
/// less: then they wait for one another.
const STREAMS: usize = 100;
/// What a node may send on one stream ahead of what its client takes. The connection's window has
/// room for all of them, so that a client that does not read keeps nobody else waiting.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 100 * STREAM_WINDOW;
/// The most of one request that waits in memory for the node's window.
const SEND_BUFFER: usize = 64 << 10;

/// Spawns on the worker's own thread.
#[derive(Clone, Debug, Default)]
struct Spawner(Rc<RefCell<JoinSet<()>>>);

impl<F: Future + 'static> Executor<F> for Spawner {
    fn execute(&self, task: F) {
        let mut tasks = self.0.borrow_mut();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(async move {
            task.await;
        });
    }
}

/// A connection's tasks, aborted when dropped: hyper keeps a spawner within them.
#[derive(Debug, Default)]
struct Tasks(Spawner);

impl Drop for Tasks {
    fn drop(&mut self) {
        let tasks = self.0.0.take();
        drop(tasks);
    }
}

/// A connection.
#[derive(Debug)]
pub struct H2<B: Body + 'static> {
    sender: http2::SendRequest<B>,
    _tasks: Tasks,
    wire: Rc<Wire>,
    scheme: Scheme,
    address: SocketAddr,
    speaks_for: Option<Introduction>,
    users: Cell<usize>,
    idle_since: Cell<Instant>,
    opened: RefCell<Option<Opened>>,
}

impl<B> H2<B>
where
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Speaks HTTP/2 on a stream to a node, which knows whom it `speaks_for`. `secure`: over TLS.
    ///
    /// # Errors
    /// The stream ended at once.
    pub async fn over(
        stream: Stream,
        address: SocketAddr,
        speaks_for: Option<Introduction>,
        secure: bool,
    ) -> io::Result<Rc<Self>>
    where
        B: Unpin,
    {
        let tasks = Tasks::default();
        let wire = Rc::new(Wire::default());
        let io = NodeIo { stream, wire: Rc::clone(&wire) };
        let (sender, driver) = http2::Builder::new(tasks.0.clone())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .handshake(TokioIo::new(io))
            .await
            .map_err(io::Error::other)?;
        tasks.0.execute(driver);
        Ok(Rc::new(Self {
            sender,
            _tasks: tasks,
            wire,
            scheme: if secure { Scheme::HTTPS } else { Scheme::HTTP },
            address,
            speaks_for,
            users: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            opened: RefCell::default(),
        }))
    }

    /// Counts it as open from now on, until it is dropped.
    pub fn counted(&self, opened: Opened) {
        *self.opened.borrow_mut() = Some(opened);
    }

    /// Whether one more exchange may begin on it, for that client.
    pub fn has_room(&self, speaks_for: Option<Introduction>) -> bool {
        self.speaks_for == speaks_for && !self.is_closed() && self.users.get() < STREAMS
    }

    /// Whether nothing can begin on it any more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether nobody uses it.
    pub fn is_idle(&self) -> bool {
        self.users.get() == 0
    }

    /// How long nobody has used it.
    pub fn idle_for(&self, now: Instant) -> Duration {
        match self.users.get() {
            0 => now.saturating_duration_since(self.idle_since.get()),
            _ => Duration::ZERO,
        }
    }
}

/// One exchange's hold on a connection.
#[derive(Debug)]
pub struct Handle<B: Body + 'static>(Rc<H2<B>>);

impl<B: Body + 'static> Drop for Handle<B> {
    fn drop(&mut self) {
        self.0.users.set(self.0.users.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}

impl<B> Handle<B>
where
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Takes hold of it.
    pub fn of(h2: &Rc<H2<B>>) -> Self {
        h2.users.set(h2.users.get() + 1);
        Self(Rc::clone(h2))
    }

    /// Hyper's end of it, for one request.
    pub fn sender(&self) -> http2::SendRequest<B> {
        self.0.sender.clone()
    }

    /// What is known of the socket below.
    pub fn wire(&self) -> &Wire {
        &self.0.wire
    }

    /// Whether nothing can begin on it any more.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Says what HTTP/1.1 says as HTTP/2 does: the authority in place of `Host` (RFC 9113 section
    /// 8.3.1), and nothing of the connection (section 8.2.2).
    pub fn translate(&self, request: &mut Request<B>) {
        *request.version_mut() = Version::HTTP_2;
        let head = request.headers_mut();
        for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE] {
            head.remove(name);
        }
        let host = head.remove(header::HOST);
        let authority = host.as_ref().and_then(|host| Authority::try_from(host.as_bytes()).ok());
        let authority = authority.or_else(|| self.0.address.to_string().parse().ok());
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(self.0.scheme.clone());
        parts.authority = authority;
        parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
        // All three are there, which is all that it asks for.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        if let Some(te) = request.headers_mut().get_mut(header::TE) {
            *te = HeaderValue::from_static("trailers");
        }
    }
}

/// Whether it is certain that the node did not act on the request (RFC 9113 section 8.7): it was
/// refused, or is beyond the last stream that a GOAWAY names.
pub fn is_unprocessed(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        let refused = cause.is_reset() && cause.reason() == Some(h2::Reason::REFUSED_STREAM);
        cause.is_remote() && (refused || cause.is_go_away())
    })
}
