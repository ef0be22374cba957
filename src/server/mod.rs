//! Sockets become requests, for any [`Service`]. Knows nothing of clusters.
//!
//! Each data-plane worker runs [`serve`] on its own single-threaded runtime with its own
//! `SO_REUSEPORT` socket, so that nothing on a request's path is shared between cores. A
//! connection that waits for a request costs its socket and a small task: the HTTP machinery is
//! built when the first byte comes and put away when the connection has been quiet for a moment.

use std::{future::Future, net::SocketAddr, pin::Pin, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};

mod accept;
mod body;
mod conn;
pub mod drain;
pub(crate) mod frames;
mod greet;
mod guard;
mod h2;
#[cfg(feature = "http3")]
pub mod h3;
mod io;
pub mod listener;
mod paced;
mod streams;
mod tasks;
pub mod tls;

pub use crate::net::proxy_protocol::ProxyProtocol;
pub use accept::{Accepting, serve};
pub use body::{BodyError, Incoming};
#[cfg(any(test, fuzzing))]
pub(crate) use conn::run;
pub use conn::{Abort, Conn, READ_BUFFER, Takeover};
pub use io::{ClientIo, write_vectored};
pub use tls::{ClientCertificate, Handshake};

/// A future on the heap, made there: [`Box::pin`] has it made on the stack, and copies the thousands
/// of bytes that it may need later.
#[inline]
fn pinned<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    let place = Box::new_uninit();
    Box::into_pin(Box::write(place, make()))
}

/// Whoever answers the requests of a connection.
pub trait Service {
    /// The response body.
    type Body: http_body::Body<Data = Bytes, Error = Abort> + Unpin + 'static;
    /// What the service knows of a client for as long as it is connected.
    type Client: 'static;
    /// A client's place among those connected.
    type Place: 'static;

    /// What is expected of whoever connects there.
    fn door(&self, origin: &Origin) -> Door;

    /// Whether this client may connect: asked as soon as its address is known, before TLS. Without
    /// a place the connection is closed.
    fn admit(&self, origin: &Origin) -> Option<Self::Place>;

    /// A client connected, perhaps with a certificate. What this returns is dropped when the client
    /// is gone.
    fn opened(
        &self,
        origin: Origin,
        certificate: Option<ClientCertificate>,
        place: Self::Place,
    ) -> Self::Client;

    /// A handshake at that listener ended.
    fn shook_hands(&self, listener: usize, how: Handshake);

    /// A limit was reached. For counters.
    fn reached(&self, limit: Reached);

    /// Answers one request. Dropped when the client goes away.
    fn call<'c>(
        &'c self,
        client: &'c Rc<Self::Client>,
        conn: &'c Rc<Conn>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Self::Body>>;

    /// The connection ends because of what the client sent or failed to send before there was a
    /// request to answer. For logs and counters; returns the whole answer as it goes over the
    /// wire, or nothing.
    fn refused(&self, client: &Self::Client, refusal: &Refusal<'_>) -> Bytes;
}

/// RFC 9110 section 10.1.1: whether the client waits to hear that its body is wanted.
pub fn expects_continue(head: &HeaderMap) -> bool {
    head.get(header::EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// RFC 9110 section 5.1: whether all names are tokens. The types that hold them let a quotation mark
/// pass, and so does h2.
pub fn are_tokens(fields: &HeaderMap) -> bool {
    fields.keys().all(|name| !name.as_str().contains('"'))
}

/// What is expected of whoever connects.
#[derive(Clone, Debug, Default)]
pub struct Door {
    /// Whether a load balancer says first who the client is.
    pub proxy_protocol: ProxyProtocol,
    /// `None`: clear text.
    pub tls: Option<Arc<tls::Tls>>,
    /// HTTP/1.1 is spoken.
    pub http1: bool,
    /// HTTP/2 is spoken.
    pub h2: bool,
}

/// A connection that ends without a request.
#[derive(Clone, Copy, Debug)]
pub struct Refusal<'a> {
    /// What was wrong.
    pub fault: ClientFault,
    /// What came of the head. Hostile, and empty where HTTP's machinery has consumed it.
    pub head: &'a [u8],
    /// What exactly, in words that hold nothing of the client's; or empty.
    pub detail: &'a str,
    /// Since its first byte.
    pub took: Duration,
}

/// What was wrong with a client that never got as far as a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientFault {
    /// Not HTTP, or an ambiguous length: 400.
    Malformed,
    /// The head is over the limits: 431.
    HeadTooLarge,
    /// The request target is over what any parser takes: 414.
    UriTooLong,
    /// The head took too long: 408.
    HeadTimeout,
    /// A response was not taken for too long: closed.
    Stalled,
    /// Frames that ask for nothing, beyond all measure: closed.
    Flood,
    /// Requests taken back, beyond all measure: closed.
    Resets,
}

/// A limit that is nobody's fault, or answered without a service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reached {
    /// A worker has as many connections as it may.
    Connections,
    /// One of its listeners has.
    ListenerConnections,
    /// A connection was without a request for too long.
    Idle,
    /// A connection carried as many requests as it may.
    Requests,
    /// So many streams were refused.
    Streams(u64),
    /// A handshake has to wait.
    Handshakes,
}

/// What a client may take its time for, and how much it may send.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The request head in bytes.
    pub header_bytes: usize,
    /// Fields in a head.
    pub headers: usize,
    /// From a request's first byte to the end of its head.
    pub header_read: Duration,
    /// A kept-alive connection without a request.
    pub idle: Duration,
    /// No byte of a request body came, or none of a response was taken.
    pub body_idle: Duration,
    /// Connections at once on this worker.
    pub connections: usize,
    /// A TLS handshake, the wait for its turn included.
    pub handshake: Duration,
    /// TLS handshakes at once on this worker.
    pub handshakes: usize,
    /// HTTP/2 requests at once on one connection.
    pub streams: usize,
    /// HTTP/2 requests that a client may take back on one connection, in a second.
    pub resets: usize,
    /// HTTP/2 frames that ask for nothing, likewise.
    pub frames: usize,
    /// Requests on one connection. Zero: any number.
    pub requests: usize,
}

/// Where a connection came in, and from whom.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Which listener, by the number that [`serve`] was given.
    pub listener: usize,
    /// The client's end. What the PROXY protocol tells takes the place of the socket's.
    pub peer: SocketAddr,
    /// Our end, likewise.
    pub local: SocketAddr,
    /// Whether it is below TLS.
    pub secure: bool,
}
