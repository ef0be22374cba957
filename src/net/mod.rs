//! A connected byte stream, whatever carries it: one type for sockets of clients and of nodes, so
//! that parking, lingering and tunnels are written once.
//!
//! An enum rather than a type parameter or a box: a clear-text connection pays a comparison of a
//! byte for each read and write, and everything above stays one copy of code.

pub mod pem;
pub mod proxy_protocol;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(dead_code, reason = "the simulation breaks links, fuzzing does not"))]
pub(crate) mod simulated;
mod socket;
pub mod tls;
mod tunnel;

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
pub use socket::Socket;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;
pub use tunnel::Tunnel;

/// A connected byte stream.
#[derive(Debug)]
pub enum Stream {
    /// A socket.
    Plain(Socket),
    /// A socket below TLS. Boxed: the session is hundreds of bytes, and streams are moved.
    Tls(Box<TlsStream<TcpStream>>),
    /// A stream of an HTTP/2 connection that became a tunnel.
    Tunnel(Box<Tunnel>),
    /// The same, where hyper has the connection.
    Upgraded(Box<TokioIo<Upgraded>>),
    /// A stream of an HTTP/3 connection that became a tunnel.
    #[cfg(feature = "http3")]
    Boxed(Box<dyn Duplex>),
    /// Through a network in memory and in virtual time.
    #[cfg(any(test, fuzzing))]
    #[allow(private_interfaces, reason = "tests alone have it")]
    Simulated(simulated::Socket),
}

/// Bytes both ways.
#[cfg(feature = "http3")]
pub trait Duplex: AsyncRead + AsyncWrite + std::fmt::Debug + Unpin + Send {}

#[cfg(feature = "http3")]
impl<T: AsyncRead + AsyncWrite + std::fmt::Debug + Unpin + Send> Duplex for T {}

impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        Self::Plain(socket.into())
    }
}

impl Stream {
    /// Connects in clear text.
    ///
    /// # Errors
    /// Whatever the system says.
    pub async fn connect(address: SocketAddr) -> io::Result<Self> {
        #[cfg(any(test, fuzzing))]
        if let Some(network) = simulated::Network::current() {
            return network.connect(address).await.map(Self::Simulated);
        }
        TcpStream::connect(address).await.map(Self::from)
    }

    /// The socket at the bottom, if it is this stream's alone.
    fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(socket) => Some(socket.get()),
            Self::Tls(session) => Some(session.get_ref().0),
            Self::Tunnel(_) | Self::Upgraded(_) => None,
            #[cfg(feature = "http3")]
            Self::Boxed(_) => None,
            #[cfg(any(test, fuzzing))]
            Self::Simulated(_) => None,
        }
    }

    /// Whether small writes go out at once.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn set_nodelay(&self, at_once: bool) -> io::Result<()> {
        self.socket().map_or(Ok(()), |socket| socket.set_nodelay(at_once))
    }

    /// Lets the kernel look after a silent peer: after `idle`, every `interval`, `retries` times.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn keep_alive(&self, idle: Duration, interval: Duration, retries: u32) -> io::Result<()> {
        #[cfg(any(test, fuzzing))]
        if let Self::Simulated(socket) = self {
            socket.keep_alive(idle + interval * retries);
        }
        let Some(socket) = self.socket() else { return Ok(()) };
        let how = socket2::TcpKeepalive::new();
        let how = how.with_time(idle).with_interval(interval).with_retries(retries);
        socket2::SockRef::from(socket).set_tcp_keepalive(&how)
    }

    /// Waits until there may be something to read. Exact for a socket; below TLS it may be a
    /// record without any text in it.
    ///
    /// # Errors
    /// Whatever the system says.
    pub async fn readable(&self) -> io::Result<()> {
        #[cfg(any(test, fuzzing))]
        if let Self::Simulated(socket) = self {
            return socket.readable().await;
        }
        match self.socket() {
            Some(socket) => socket.readable().await,
            None => Ok(()),
        }
    }

    /// Dropping it will reset the connection, so that what was sent can't look complete.
    pub fn reset_on_close(&self) {
        #[cfg(any(test, fuzzing))]
        if let Self::Simulated(socket) = self {
            socket.reset_on_close();
        }
        if let Some(socket) = self.socket() {
            let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => socket.poll_read(cx, buf),
            Self::Tls(session) => Pin::new(session).poll_read(cx, buf),
            Self::Tunnel(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Upgraded(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(feature = "http3")]
            Self::Boxed(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(any(test, fuzzing))]
            Self::Simulated(socket) => Pin::new(socket).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket.get_mut()).poll_write(cx, buf),
            Self::Tls(session) => Pin::new(session).poll_write(cx, buf),
            Self::Tunnel(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Upgraded(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(feature = "http3")]
            Self::Boxed(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(any(test, fuzzing))]
            Self::Simulated(socket) => Pin::new(socket).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket.get_mut()).poll_write_vectored(cx, bufs),
            Self::Tls(session) => Pin::new(session).poll_write_vectored(cx, bufs),
            Self::Tunnel(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Upgraded(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            #[cfg(feature = "http3")]
            Self::Boxed(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            #[cfg(any(test, fuzzing))]
            Self::Simulated(socket) => Pin::new(socket).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(session) => Pin::new(session).poll_flush(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_flush(cx),
            Self::Upgraded(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(feature = "http3")]
            Self::Boxed(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(any(test, fuzzing))]
            Self::Simulated(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket.get_mut()).poll_shutdown(cx),
            Self::Tls(session) => Pin::new(session).poll_shutdown(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Upgraded(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(feature = "http3")]
            Self::Boxed(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(any(test, fuzzing))]
            Self::Simulated(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
