//! The client's socket as hyper sees it, with what the connection has to know about it.
//!
//! Notes when a request's first byte comes and whether written bytes are stuck, passes on bytes
//! that were read ahead, slips interim responses (1xx) in between final ones, which hyper's
//! server cannot send, keeps back hyper's bare answer to a bad head, and lets nothing through to it
//! that is ambiguous ([`Guard`]). Most of it costs a few moves between cells of one thread.

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    conn::Conn,
    frames::Frames,
    guard::{Guard, Seen},
};
use crate::net::Stream;

/// A client's socket.
#[derive(Debug)]
pub struct ClientIo {
    stream: Stream,
    /// Read from the socket before, not yet by HTTP.
    ahead: Bytes,
    conn: Rc<Conn>,
    /// What comes first may be HTTP/2's preface.
    sniff: bool,
    /// Where HTTP/2's frames are counted.
    frames: Option<Rc<Frames>>,
    /// What of HTTP/1 is clear.
    guard: Guard,
    /// The rest of the connection is not read.
    shut: bool,
}

impl ClientIo {
    pub(super) fn new(stream: Stream, ahead: Bytes, conn: Rc<Conn>) -> Self {
        let guard = Guard::default();
        Self { stream, ahead, conn, sniff: false, frames: None, guard, shut: false }
    }

    /// Tells HTTP/2 from HTTP/1 by the first bytes, and fails at the former. Nothing is read for it
    /// that would not be read anyway.
    pub(super) fn sniffing(self, sniff: bool) -> Self {
        Self { sniff, ..self }
    }

    /// Counts the frames that come.
    pub(super) fn counting(self, frames: Rc<Frames>) -> Self {
        Self { frames: Some(frames), ..self }
    }

    /// Makes nothing of the bytes in `buf` behind `before` until it is clear what they are.
    /// Returns whether they, or those kept, are for HTTP/1.
    fn sniff(&mut self, buf: &mut ReadBuf<'_>, before: usize) -> io::Result<bool> {
        let new = buf.filled().get(before..).unwrap_or_default();
        let is_end = new.is_empty();
        if self.ahead.is_empty()
            && !(is_end || PREFACE.starts_with(new) || new.starts_with(PREFACE))
        {
            self.sniff = false;
            return Ok(true);
        }
        self.conn.read(new.len());
        self.ahead = [&self.ahead, new].concat().into();
        buf.set_filled(before);
        if self.ahead.starts_with(PREFACE) {
            self.conn.found_h2();
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.sniff = !is_end && PREFACE.starts_with(&self.ahead);
        Ok(!self.sniff)
    }

    /// Lets through what is clear of the bytes in `buf` behind `before`, and keeps the rest back.
    fn filter(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let new = buf.filled().get(before..).unwrap_or_default();
        match self.guard.see(new) {
            Seen::All => {}
            Seen::UpTo(n) => {
                let back = new.get(n..).unwrap_or_default();
                self.ahead = [back, &self.ahead].concat().into();
                buf.set_filled(before + n);
            }
            Seen::Bad(n, fault) => {
                self.conn.found_fault(fault);
                self.shut = true;
                self.ahead = Bytes::from_static(fault.poison());
                buf.set_filled(before + n);
                self.take_ahead(buf);
            }
        }
    }

    /// Moves what was read ahead into `buf`.
    fn take_ahead(&mut self, buf: &mut ReadBuf<'_>) {
        let n = self.ahead.len().min(buf.remaining());
        buf.put_slice(&self.ahead.split_to(n));
    }

    /// Keeps what comes behind a request that may become another protocol, until that is clear.
    /// Ready when the client is gone.
    fn poll_hold(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.ahead.len() < HELD {
            let mut scratch = [0; 4 << 10];
            let mut buf = ReadBuf::new(&mut scratch);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                return if self.ahead.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            self.ahead = [&self.ahead, buf.filled()].concat().into();
        }
        // hyper asks again when it has answered.
        Poll::Pending
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

/// What a client may send ahead of the answer to a request that may become another protocol.
const HELD: usize = 64 << 10;
/// How HTTP/2 begins (RFC 9113 section 3.4): as much of it as no method of HTTP/1 has.
const PREFACE: &[u8] = b"PRI ";

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
        let before = buf.filled().len();
        let mut filled = false;
        while self.sniff {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
            filled = self.sniff(buf, before)? && self.ahead.is_empty();
        }
        if self.guard.awaits_switch() {
            if self.conn.is_busy() {
                return self.poll_hold(cx);
            }
            self.guard.go_on();
        }
        if self.ahead.has_remaining() {
            self.take_ahead(buf);
        } else if self.shut {
            // hyper has all that it needs to refuse the rest.
            return Poll::Pending;
        } else if !filled {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        }
        if self.frames.is_none() && !self.shut {
            self.filter(buf, before);
        }
        let new = buf.filled().get(before..).unwrap_or_default();
        if let Some(frames) = &self.frames {
            frames.see(new);
        }
        self.conn.read(new.len());
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
        let flushed = Pin::new(&mut self.stream).poll_flush(cx)?;
        match flushed {
            Poll::Ready(()) => self.conn.flushed(),
            Poll::Pending => self.conn.write_blocked(),
        }
        flushed.map(Ok)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.conn.is_unsaid() || self.conn.is_h2() {
            // The service's answer has yet to go out, or all of HTTP/2.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
