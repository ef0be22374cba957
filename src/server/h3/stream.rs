//! One request's stream: what comes of it, frame by frame, and what goes back.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response};
use http_body::Body;
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};

use super::{
    Link,
    frames::{self, Code},
    head,
    qpack::{self, Fault},
    reader::{Event, Reader, Wrong},
};
use crate::server::{
    Conn, are_tokens,
    streams::{complete, pass_interim, strip},
};

/// How far behind its head the end of a request without a body may come.
const END_BEHIND: Duration = Duration::from_millis(20);
/// The most that is taken from a stream at once.
const CHUNK: usize = 64 << 10;
/// A payload that is copied behind what stands before it.
const CRUMB: usize = 1024;
/// The most of a tunnel's bytes in one frame.
const FRAME: usize = 16 << 10;

/// Why no more comes of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Broken {
    /// The client took it back.
    #[error("the request was taken back")]
    Reset,
    /// There is no connection any more, or not for long.
    #[error("the connection ended")]
    Lost,
    /// A field section over the limits.
    #[error("more fields than are taken")]
    TooLarge,
    /// RFC 9114 section 4.1.2.
    #[error("malformed: {0}")]
    Malformed(&'static str),
}

/// What the two directions of a stream tell each other.
#[derive(Debug, Default)]
pub(super) struct Sides {
    /// How the answer is to be broken off: the request is malformed.
    reset: OnceLock<Code>,
}

/// The request's direction. Dropped before its end, the client is told to send no more.
pub(crate) struct Receive {
    stream: RecvStream,
    link: Arc<Link>,
    sides: Arc<Sides>,
    /// Taken from the stream, and not looked at yet.
    chunk: Bytes,
    reader: Reader,
    /// Until the end is there.
    trailers: Option<HeaderMap>,
    ended: bool,
}

impl std::fmt::Debug for Receive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receive").field("reader", &self.reader).finish_non_exhaustive()
    }
}

impl Receive {
    pub(super) fn new(stream: RecvStream, link: Arc<Link>, sides: Arc<Sides>) -> Self {
        let (chunk, reader) = (Bytes::new(), Reader::new(link.most.bytes));
        Self { stream, link, sides, chunk, reader, trailers: None, ended: false }
    }

    /// The head's section.
    pub(super) async fn head(&mut self) -> Result<Bytes, Broken> {
        match poll_fn(|cx| self.poll_event(cx)).await? {
            Some(Event::Section(section)) => Ok(section),
            // Before a head there is no other.
            Some(Event::Data(_)) | None => Err(Broken::Malformed("no head")),
        }
    }

    /// Looks whether anything follows, which nothing says beforehand. Mostly the end came with the
    /// head; where a body is unlikely, it is worth a moment: a node would have to be told of one.
    pub(super) async fn look_ahead(&mut self, body_is_likely: bool) {
        let look = poll_fn(|cx| match self.poll_chunk(cx) {
            Poll::Pending if body_is_likely => Poll::Ready(()),
            polled => polled.map(|_| ()),
        });
        let _ = timeout(END_BEHIND, look).await;
    }

    /// Nobody reads it, and the client is told that nobody will.
    pub(super) fn reject(mut self) {
        let _ = self.sides.reset.set(Code::Rejected);
        let _ = self.stream.stop(Code::Rejected.into());
        self.ended = true;
    }

    /// From now on it carries bytes.
    pub(super) fn tunnel(&mut self) {
        self.reader.tunnel();
    }

    pub(crate) fn has_ended(&self) -> bool {
        let is_read = self.chunk.is_empty() && self.reader.is_between();
        self.ended && is_read && self.trailers.is_none()
    }

    /// Has something of the stream in `chunk`. `false`: it has ended.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Broken>> {
        if self.chunk.is_empty() && !self.ended {
            // Made anew each time: what is to be woken is noted with the stream.
            let read = pin!(self.stream.read_chunk(CHUNK, true));
            match ready!(read.poll(cx)) {
                Ok(Some(chunk)) => self.chunk = chunk.bytes,
                Ok(None) => self.ended = true,
                Err(ReadError::Reset(_)) => return Poll::Ready(Err(Broken::Reset)),
                Err(_) => return Poll::Ready(Err(Broken::Lost)),
            }
        }
        Poll::Ready(Ok(!self.chunk.is_empty()))
    }

    /// The next thing that the request consists of. `None`: that was all.
    pub(super) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Event>, Broken>> {
        loop {
            let link = &self.link;
            let next = self.reader.next(&mut self.chunk, |useful| link.came(useful));
            if let Some(event) = next.map_err(|wrong| self.broken(wrong))? {
                return Poll::Ready(Ok(Some(event)));
            }
            if !ready!(self.poll_chunk(cx))? {
                let ended = self.reader.end().map_err(|wrong| self.broken(wrong));
                return Poll::Ready(ended.map(|()| None));
            }
        }
    }

    fn broken(&self, wrong: Wrong) -> Broken {
        match wrong {
            Wrong::Connection(code, detail) => self.fail(code, detail),
            Wrong::TooLarge => {
                let _ = self.sides.reset.set(Code::ExcessiveLoad);
                Broken::TooLarge
            }
            Wrong::NoHead => {
                let _ = self.sides.reset.set(Code::Incomplete);
                Broken::Malformed("no head")
            }
        }
    }

    /// The connection is over.
    fn fail(&self, code: Code, detail: &'static str) -> Broken {
        self.link.fail(code, detail);
        Broken::Lost
    }

    /// The request is malformed: its answer is broken off.
    pub(crate) fn malformed(&self, detail: &'static str) -> Broken {
        let _ = self.sides.reset.set(Code::Message);
        Broken::Malformed(detail)
    }

    /// Fields of a section.
    pub(super) fn fields(&self, section: &[u8]) -> Result<Vec<qpack::Field>, Broken> {
        qpack::decode(section, self.link.most).map_err(|fault| match fault {
            Fault::Broken => self.fail(Code::Decompression, "a field section that can't be read"),
            Fault::TooLarge => {
                let _ = self.sides.reset.set(Code::ExcessiveLoad);
                Broken::TooLarge
            }
        })
    }

    /// The next frame of a body. `None`: that was all.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Broken>>> {
        loop {
            match ready!(self.poll_event(cx)) {
                Err(broken) => return Poll::Ready(Some(Err(broken))),
                Ok(Some(Event::Data(data))) => {
                    return Poll::Ready(Some(Ok(http_body::Frame::data(data))));
                }
                // They are given with the end: what may not follow them is seen before.
                Ok(Some(Event::Section(section))) => match self.read_trailers(&section) {
                    Ok(trailers) => self.trailers = Some(trailers),
                    Err(broken) => return Poll::Ready(Some(Err(broken))),
                },
                Ok(None) => {
                    let trailers = self.trailers.take();
                    return Poll::Ready(trailers.map(|t| Ok(http_body::Frame::trailers(t))));
                }
            }
        }
    }

    fn read_trailers(&self, section: &[u8]) -> Result<HeaderMap, Broken> {
        let trailers = head::trailers(self.fields(section)?);
        let trailers = trailers.map_err(|what| self.malformed(what))?;
        if are_tokens(&trailers) {
            Ok(trailers)
        } else {
            Err(self.malformed("a field name that is none"))
        }
    }
}

impl Drop for Receive {
    fn drop(&mut self) {
        // RFC 9114 section 4.1: the answer does not depend on what is still to come.
        if !self.ended {
            let _ = self.stream.stop(Code::NoError.into());
        }
    }
}

/// The answer's direction. Dropped before its end, it is reset, so that it can't look complete.
pub(super) struct Reply {
    stream: SendStream,
    sides: Arc<Sides>,
    /// What is not with quinn yet, and may find no room there.
    out: VecDeque<Bytes>,
    /// Behind it: what is small goes in one piece. quinn looks for what to send piece by piece, and
    /// a node that answers in crumbs would keep it busy for ever.
    crumbs: BytesMut,
    /// How much that is together.
    waiting: usize,
    finished: bool,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply").field("finished", &self.finished).finish_non_exhaustive()
    }
}

impl Reply {
    pub(super) fn new(stream: SendStream, sides: Arc<Sides>) -> Self {
        let (out, crumbs) = (VecDeque::new(), BytesMut::new());
        Self { stream, sides, out, crumbs, waiting: 0, finished: false }
    }

    fn push(&mut self, kind: u64, payload: Bytes) {
        frames::put_frame_head(&mut self.crumbs, kind, payload.len());
        self.waiting += payload.len();
        if payload.len() <= CRUMB {
            self.crumbs.extend_from_slice(&payload);
        } else {
            self.out.push_back(self.crumbs.split().freeze());
            self.out.push_back(payload);
        }
    }

    /// Hands over what waits.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        if !self.crumbs.is_empty() {
            self.out.push_back(self.crumbs.split().freeze());
        }
        while !self.out.is_empty() {
            let written = {
                let write = pin!(self.stream.write_chunks(self.out.make_contiguous()));
                ready!(write.poll(cx))?
            };
            self.out.drain(..written.chunks);
        }
        self.waiting = 0;
        Poll::Ready(Ok(()))
    }

    /// Sends the whole of an answer without a body.
    pub(super) async fn only(&mut self, head: Response<()>) {
        self.head(head, None);
        if poll_fn(|cx| self.poll_out(cx)).await.is_ok() {
            self.finish();
        }
    }

    fn finish(&mut self) {
        self.finished = true;
        let _ = self.stream.finish();
    }

    /// Sends an answer's head, as soon as there is room.
    pub(super) fn head(&mut self, mut head: Response<()>, length: Option<u64>) {
        complete(head.headers_mut(), length);
        self.push(frames::HEADERS, qpack::response(head.status(), head.headers()).freeze());
    }

    /// Waits for an answer, and sends the interim ones before it. `None`: the client took its
    /// request back, or it turned out to be none.
    pub(super) async fn answered<F: Future>(
        &mut self,
        conn: &Conn,
        mut answer: Pin<&mut F>,
    ) -> Option<F::Output> {
        let mut stopped = pin!(self.stream.stopped());
        let mut sent = 0;
        poll_fn(|cx| {
            // First: what its client took back in the same breath never gets as far as a node.
            if self.sides.reset.get().is_some() || stopped.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            let polled = answer.as_mut().poll(cx);
            pass_interim(conn, &mut sent, |interim| {
                let section = qpack::response(interim.status(), interim.headers());
                self.push(frames::HEADERS, section.freeze());
            });
            if self.sides.reset.get().is_some() {
                return Poll::Ready(None);
            }
            if let Poll::Ready(answer) = polled {
                return Poll::Ready(Some(answer));
            }
            match self.poll_out(cx) {
                Poll::Ready(Err(_)) => Poll::Ready(None),
                _ => Poll::Pending,
            }
        })
        .await
    }

    /// Sends an answer's body at its client's pace, and watches whether the client still wants it.
    pub(super) async fn pipe<B>(mut self, body: B, conn: &Conn)
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let mut body = Some(body);
        let mut stopped = pin!(self.stream.stopped());
        let whole = poll_fn(|cx| {
            loop {
                if self.sides.reset.get().is_some() {
                    return Poll::Ready(false);
                }
                // As much as there is at once, within bounds.
                let mut waits = false;
                while self.waiting < CHUNK
                    && !waits
                    && let Some(next) = &mut body
                {
                    match Pin::new(&mut *next).poll_frame(cx) {
                        Poll::Pending => waits = true,
                        Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                            Ok(data) => {
                                let is_last = next.is_end_stream();
                                if !data.is_empty() {
                                    self.push(frames::DATA, data);
                                }
                                if is_last {
                                    body = None;
                                }
                            }
                            Err(frame) => {
                                let Ok(mut trailers) = frame.into_trailers() else { continue };
                                strip(&mut trailers);
                                self.push(frames::HEADERS, qpack::trailers(&trailers).freeze());
                                body = None;
                            }
                        },
                        Poll::Ready(Some(Err(_))) => return Poll::Ready(false),
                        Poll::Ready(None) => body = None,
                    }
                }
                match self.poll_out(cx) {
                    Poll::Ready(Ok(())) => conn.wrote(0),
                    Poll::Ready(Err(_)) => return Poll::Ready(false),
                    // Whoever takes it back is heard by the write as well.
                    Poll::Pending => {
                        conn.write_blocked();
                        return Poll::Pending;
                    }
                }
                if body.is_none() {
                    return Poll::Ready(true);
                }
                if waits {
                    return stopped.as_mut().poll(cx).map(|_| false);
                }
            }
        })
        .await;
        if whole {
            self.finish();
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.finished {
            let code = self.sides.reset.get().copied().unwrap_or(Code::Internal);
            let _ = self.stream.reset(code.into());
        }
    }
}

/// A stream that became a tunnel (RFC 9220): bytes both ways. The end of one direction is the end
/// of its half of the stream; whoever drops it before resets that.
#[derive(Debug)]
pub(super) struct Tunnel {
    reply: Reply,
    receive: Receive,
    /// Of the last frame, what was not read yet.
    rest: Bytes,
}

impl Tunnel {
    /// After the head that made it a tunnel, which may still be on its way.
    pub(super) fn new(reply: Reply, mut receive: Receive) -> Self {
        receive.tunnel();
        Self { reply, receive, rest: Bytes::new() }
    }
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.receive.poll_event(cx)) {
                Ok(Some(Event::Data(data))) => self.rest = data,
                Ok(None) => return Poll::Ready(Ok(())),
                // There is none in a tunnel.
                Ok(Some(Event::Section(_))) => {}
                Err(error) => return Poll::Ready(Err(broken(error))),
            }
        }
        let n = self.rest.len().min(buf.remaining());
        let taken = self.rest.split_to(n);
        buf.put_slice(&taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.reply.poll_out(cx)).map_err(broken)?;
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let (taken, _) = buf.split_at(buf.len().min(FRAME));
        self.reply.push(frames::DATA, Bytes::copy_from_slice(taken));
        // What finds no room waits for the next write or flush.
        match self.reply.poll_out(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(broken(error))),
            _ => Poll::Ready(Ok(taken.len())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.reply.poll_out(cx).map_err(broken)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.reply.poll_out(cx)).map_err(broken)?;
        if !self.reply.finished {
            self.reply.finish();
        }
        Poll::Ready(Ok(()))
    }
}
