//! The client's socket as hyper sees it, with what the connection has to know about it.
//!
//! Notes when a request's first byte comes and whether written bytes are stuck, passes on bytes
//! that were read ahead, slips interim responses (1xx) in between final ones, which hyper's
//! server cannot send, and keeps back hyper's bare answer to a bad head. All of it costs a few moves between cells of one thread.

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::conn::Conn;
use crate::net::Stream;

/// A client's socket.
#[derive(Debug)]
pub struct ClientIo {
    stream: Stream,
    /// Read from the socket before, not yet by HTTP.
    ahead: Bytes,
    conn: Rc<Conn>,
}

impl ClientIo {
    pub(super) fn new(stream: Stream, ahead: Bytes, conn: Rc<Conn>) -> Self {
        Self { stream, ahead, conn }
    }

    /// Gives the socket back, with what was read ahead and never taken.
    pub fn into_parts(self) -> (Stream, Bytes) {
        (self.stream, self.ahead)
    }

    /// Writes interim responses that wait, which come before anything hyper writes next.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.conn.has_interim() {
            let mut interim = self.conn.take_interim();
            while interim.has_remaining() {
                match Pin::new(&mut self.stream).poll_write(cx, interim.chunk()) {
                    Poll::Ready(Ok(n)) => interim.advance(n),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {
                        self.conn.put_back_interim(interim);
                        return Poll::Pending;
                    }
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &result {
            Poll::Ready(Ok(n)) => self.conn.wrote(*n),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.conn.write_blocked(),
        }
        result
    }
}

/// Up to this many bytes are copied together: a `send` of one piece costs the kernel less than a
/// `writev` of two by more than the copy does.
const GATHERED: usize = 2 << 10;

/// Writes `bufs`, `len` bytes together, in one system call.
pub fn write_vectored(
    stream: &mut Stream,
    cx: &mut Context<'_>,
    bufs: &[io::IoSlice<'_>],
    len: usize,
) -> Poll<io::Result<usize>> {
    if let [one] = bufs {
        return Pin::new(stream).poll_write(cx, one);
    }
    if len > GATHERED {
        return Pin::new(stream).poll_write_vectored(cx, bufs);
    }
    let mut gathered = SmallVec::<[u8; GATHERED]>::new();
    for buf in bufs {
        gathered.extend_from_slice(buf);
    }
    Pin::new(stream).poll_write(cx, &gathered)
}

impl AsyncRead for ClientIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // An interim response that waits goes out as soon as anything polls the socket.
        if self.conn.has_interim() {
            let _ = self.poll_interim(cx)?;
        }
        if self.ahead.has_remaining() {
            let n = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(n));
            self.conn.read(n);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.conn.read(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.conn.is_owed() {
            self.conn.keep_unsaid(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        ready!(self.poll_interim(cx))?;
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.conn.is_owed() {
            self.conn.keep_unsaid(bufs.first().map_or(&[], |first| first));
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        ready!(self.poll_interim(cx))?;
        let len = bufs.iter().map(|buf| buf.len()).sum();
        let result = write_vectored(&mut self.stream, cx, bufs, len);
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper flushes when its own buffer is empty: from here on everything it had is with the
    /// kernel.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_interim(cx))?;
        // TLS may hold back what the socket did not take.
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.conn.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.conn.is_unsaid() {
            // The service's answer has yet to go out.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
