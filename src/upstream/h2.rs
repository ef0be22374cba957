//! One HTTP/2 connection to a node, which many exchanges share.
//!
//! Unlike an HTTP/1.1 connection it has tasks of its own on the worker's thread, since no exchange
//! can be the one that drives it. They end with its last user. A dropped exchange resets its stream.

use std::{
    cell::{Cell, RefCell},
    error::Error as _,
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    uri::{Authority, Scheme},
};
use hyper::{body::Body, client::conn::http2, ext::Protocol, rt::Executor};
use hyper_util::rt::TokioIo;
use sha1::{Digest as _, Sha1};
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
/// The windows of all streams come to 13 MiB. But h2 also ends a connection, and every exchange on it,
/// when frames under 256 bytes that wait lack more than half of this to that size: with 13 MiB two
/// clients that do not read streams of short events would be enough. With this 20 streams of events of
/// five bytes may wait, or any number of events of a hundred.
const CONNECTION_WINDOW: u32 = 256 << 20;
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

/// A question to hyper's end of a connection, which alone knows what the node allows.
struct Asked(Box<dyn Fn() -> bool>);

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Asked")
    }
}

/// A connection.
#[derive(Debug)]
pub struct H2<B: Body + 'static> {
    sender: http2::SendRequest<B>,
    _tasks: Tasks,
    wire: Rc<Wire>,
    /// Whether the node has said that it takes WebSockets.
    websockets: Asked,
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
        let wire = Rc::new(Wire::of_h2());
        let io = NodeIo { stream, wire: Rc::clone(&wire) };
        let (sender, driver) = http2::Builder::new(tasks.0.clone())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .handshake(TokioIo::new(io))
            .await
            .map_err(io::Error::other)?;
        let driver = Rc::new(RefCell::new(Some(driver)));
        let known = Rc::clone(&driver);
        tasks.0.execute(poll_fn(move |cx| {
            let mut driver = driver.borrow_mut();
            let polled = driver.as_mut().map(|driver| Pin::new(driver).poll(cx));
            if polled.as_ref().is_none_or(Poll::is_ready) {
                // Whoever waits for an answer hears of the end when hyper's end is gone.
                *driver = None;
                return Poll::Ready(());
            }
            Poll::Pending
        }));
        let websockets = Asked(Box::new(move || {
            let known = known.borrow();
            known.as_ref().is_some_and(http2::Connection::is_extended_connect_protocol_enabled)
        }));
        Ok(Rc::new(Self {
            sender,
            _tasks: tasks,
            wire,
            websockets,
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

    /// Whether the node has said that it takes WebSockets.
    pub fn takes_websockets(&self) -> bool {
        (self.0.websockets.0)()
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
    /// 8.3.1), and nothing of the connection (section 8.2.2). What asks for a WebSocket becomes an
    /// extended CONNECT (RFC 8441 section 5); returns the key that it came with.
    pub fn translate(&self, request: &mut Request<B>) -> Option<HeaderValue> {
        *request.version_mut() = Version::HTTP_2;
        let websocket = is_websocket(request.method(), request.headers());
        let key = websocket.then(|| request.headers_mut().remove(header::SEC_WEBSOCKET_KEY));
        if websocket {
            *request.method_mut() = Method::CONNECT;
            request.extensions_mut().insert(Protocol::from_static("websocket"));
        }
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
        key.map(|key| key.unwrap_or(HeaderValue::from_static("")))
    }
}

/// Whether a request asks for a WebSocket, in HTTP/1.1's words (RFC 6455 section 4.1).
pub fn is_websocket(method: &Method, head: &HeaderMap) -> bool {
    let to = head.get(header::UPGRADE);
    method == Method::GET && to.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Makes the answer to an extended CONNECT the one that HTTP/1.1 has for a WebSocket (RFC 6455
/// section 4.2.2).
pub fn switch<T>(response: &mut Response<T>, key: &HeaderValue) {
    const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let digest = Sha1::new().chain_update(key.as_bytes()).chain_update(GUID).finalize();
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let head = response.headers_mut();
    head.remove(header::CONTENT_LENGTH);
    head.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    head.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Ok(accept) = HeaderValue::from_str(&BASE64.encode(digest)) {
        head.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_accepted_as_the_standard_shows() {
        // RFC 6455 section 1.3.
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        let mut response = Response::new(());
        switch(&mut response, &key);
        let accept = response.headers().get(header::SEC_WEBSOCKET_ACCEPT).unwrap();
        assert_eq!(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(response.status(), 101);
    }
}
