//! One client connection that speaks HTTP/2.
//!
//! h2 does the framing. Each stream has a [`Conn`] of its own; another `Conn`, the *link*, notes what
//! happens on the socket they share. One timer keeps the time of all of them, so that no stream has
//! to arm one. [`Frames`] watches what the client sends for floods.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream as _};
use h2::{RecvStream, server::SendResponse};
use http::Method;
use http_body::{Body, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep_until},
};

use super::{
    Abort, ClientFault, Incoming, Limits, Origin, Reached, Refusal, Service,
    conn::{Conn, Look, TICK, linger},
    drain,
    frames::{Calm, Flood, Frames},
    io::ClientIo,
    streams::{Streams, answered, pipe, send_head},
};
use crate::net::{Stream, Tunnel};

/// How long a client may take to hang up when it has been told to and nothing is under way.
pub(super) const GOING: Duration = Duration::from_secs(2);
/// What a client may send on one stream ahead of what is asked for. The connection's window has
/// room for all streams at once: with less, bodies of requests that wait their turn would keep out
/// those of the requests that they wait for.
pub(super) const STREAM_WINDOW: u32 = 128 << 10;
/// The most of one response that waits in memory for a client's window or socket.
const SEND_BUFFER: usize = 64 << 10;

/// What the streams of one connection share.
pub(super) struct Shared {
    /// Streams under way.
    open: Cell<usize>,
    /// There were as many as may be, in this second.
    full: Cell<bool>,
    /// When the last one ended.
    idle_since: Cell<Instant>,
    /// What the connection has yet to take up.
    new: RefCell<Vec<Task>>,
    /// The earliest deadline that a stream has set since the connection last looked.
    due: Cell<Option<Instant>>,
    limits: Limits,
}

/// Boxed: it is thousands of bytes, which nobody should move.
type Work = Pin<Box<dyn Future<Output = ()>>>;

/// What answers a request, carries a tunnel, or is the connection's own.
pub(super) struct Task {
    work: Work,
    /// Whose time is kept. A tunnel has limits of its own.
    conn: Option<Rc<Conn>>,
    /// The client does not take its response.
    stalled: Cell<bool>,
    shared: Rc<Shared>,
    _open: Option<Open>,
}

impl Task {
    /// Compares how long things have taken with how long they may: when to look again.
    pub(super) fn look(&self, now: Instant) -> Instant {
        let Some(conn) = &self.conn else { return now + TICK };
        match conn.look_at_stream(now, &self.shared.limits) {
            Look::At(at) => return at,
            Look::Poll => {}
            Look::Stop(_) => self.stalled.set(true),
        }
        conn.wake();
        now + TICK
    }
}

impl Future for Task {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if this.stalled.get() {
            // Dropping it resets the stream.
            return Poll::Ready(());
        }
        let Some(conn) = &this.conn else { return this.work.as_mut().poll(cx) };
        conn.wakes(cx.waker());
        let polled = this.work.as_mut().poll(cx);
        if let Some(at) = conn.take_rearm() {
            let due = &this.shared.due;
            due.set(Some(due.get().map_or(at, |due| due.min(at))));
        }
        polled
    }
}

impl Shared {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            open: Cell::new(0),
            full: Cell::new(false),
            idle_since: Cell::new(Instant::now()),
            new: RefCell::default(),
            due: Cell::new(None),
            limits,
        }
    }

    /// What answers a request, or carries a tunnel, of which there is no time to be kept.
    pub(super) fn spawn(self: &Rc<Self>, conn: Option<Rc<Conn>>, work: Work) {
        self.push(conn, work, Some(Open::new(self)));
    }

    /// What is the connection's own.
    #[cfg(feature = "http3")]
    pub(super) fn spawn_aside(self: &Rc<Self>, work: impl Future<Output = ()> + 'static) {
        self.push(None, Box::pin(work), None);
    }

    fn push(self: &Rc<Self>, conn: Option<Rc<Conn>>, work: Work, open: Option<Open>) {
        let (stalled, shared) = (Cell::new(false), Rc::clone(self));
        self.new.borrow_mut().push(Task { work, conn, stalled, shared, _open: open });
    }

    /// Whether the connection has something to take up.
    pub(super) fn has_new(&self) -> bool {
        !self.new.borrow().is_empty()
    }

    /// How long there has been no stream. `None`: there is one.
    pub(super) fn idle(&self, now: Instant) -> Option<Duration> {
        (self.open.get() == 0).then(|| now - self.idle_since.get())
    }

    /// When a stream is to be looked at, if that is before this.
    pub(super) fn due(&self, before: Instant) -> Option<Instant> {
        self.due.take().filter(|due| *due < before)
    }

    pub(super) fn take_new(&self) -> Vec<Task> {
        self.new.take()
    }

    /// Goes on with those that can, new ones among them.
    pub(super) fn run(&self, tasks: &mut FuturesUnordered<Task>, cx: &mut Context<'_>) {
        loop {
            tasks.extend(self.new.borrow_mut().drain(..));
            if !matches!(Pin::new(&mut *tasks).poll_next(cx), Poll::Ready(Some(()))) {
                return;
            }
        }
    }
}

/// A stream under way, until dropped.
struct Open(Rc<Shared>);

impl Open {
    fn new(shared: &Rc<Shared>) -> Self {
        shared.open.set(shared.open.get() + 1);
        if shared.open.get() >= shared.limits.streams {
            shared.full.set(true);
        }
        Self(Rc::clone(shared))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        if self.0.open.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// A response body that notes when the client keeps it waiting: the next frame is asked for once the
/// one before is on its way.
pub(super) struct StreamBody<B> {
    inner: B,
    conn: Rc<Conn>,
    unanswered: Unanswered,
}

/// A request whose answer is not whole. Dropped while that is so, it was given up: its client took
/// it back, or broke the rules of its stream.
pub(super) struct Unanswered(Option<Rc<Frames>>);

impl Unanswered {
    pub(super) fn new(frames: &Rc<Frames>) -> Self {
        Self(Some(Rc::clone(frames)))
    }

    /// There is no more to come, or it is not the client's fault.
    pub(super) fn settle(&mut self) {
        self.0 = None;
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(frames) = &self.0 {
            frames.gave_up();
        }
    }
}

impl<B> StreamBody<B> {
    pub(super) fn new(inner: B, conn: Rc<Conn>, unanswered: Unanswered) -> Self {
        Self { inner, conn, unanswered }
    }
}

impl<B: Body<Data = Bytes, Error = Abort>> Body for StreamBody<B>
where
    B: Unpin,
{
    type Data = Bytes;
    type Error = Abort;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Abort>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(_))) => self.conn.write_blocked(),
            _ => self.conn.wrote(0),
        }
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.conn.hand_over(data.len());
        }
        let is_last = match &polled {
            Poll::Ready(Some(Ok(frame))) => frame.is_trailers() || self.inner.is_end_stream(),
            Poll::Ready(_) => true,
            Poll::Pending => false,
        };
        if is_last {
            self.unanswered.settle();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Why a connection stopped.
enum Stop {
    Ended(Result<(), h2::Error>),
    Flood(Flood),
    Stalled,
    Gone,
}

/// Serves a connection to its end. `ahead` was read from it before.
pub(super) async fn serve<S: Service + 'static>(
    stream: Stream,
    ahead: Bytes,
    origin: Origin,
    client: &Rc<S::Client>,
    service: &Rc<S>,
    limits: Limits,
    drain: &drain::Watch,
) {
    let began = Instant::now();
    let link = Rc::new(Conn::link(origin, drain.clone()));
    let frames = Rc::new(Frames::new(limits.resets, limits.frames));
    let io = ClientIo::new(stream, ahead, Rc::clone(&link)).counting(Rc::clone(&frames));
    let shared = Rc::new(Shared::new(limits));
    let called = Cell::new(0);
    let answer = |request: http::Request<RecvStream>, mut reply: SendResponse<Bytes>| {
        called.set(called.get() + 1);
        let has_body = !request.body().is_end_stream();
        let conn = Rc::new(Conn::stream(origin, drain.clone(), has_body));
        let (service, client) = (Rc::clone(service), Rc::clone(client));
        let (stream, owner) = (Rc::clone(&conn), Rc::clone(&shared));
        let mut unanswered = Unanswered::new(&frames);
        let task = Box::pin(async move {
            let (parts, body) = request.into_parts();
            // What a CONNECT brings after its head is the tunnel's.
            let (body, tunnel) = if parts.method == Method::CONNECT {
                (Incoming::empty(), Some(body))
            } else {
                let expects = has_body && super::expects_continue(&parts.headers);
                let expects = expects.then(|| Rc::clone(&conn));
                (Incoming::h2(body, &parts.headers, expects), None)
            };
            let request = http::Request::from_parts(parts, body);
            let response = {
                // Boxed: thousands of bytes that are not needed any more while the answer is sent.
                let mut answer = Box::pin(service.call(&client, &conn, request));
                answered(&mut reply, &conn, answer.as_mut()).await
            };
            let Some(response) = response else { return };
            let (head, body) = response.into_parts();
            let head = http::Response::from_parts(head, ());
            if let (Some(from_client), Some(takeover)) = (tunnel, conn.take_takeover()) {
                let Some(to_client) = send_head(&mut reply, head, None, false) else { return };
                drop(body);
                unanswered.settle();
                let stream = Stream::Tunnel(Box::new(Tunnel::new(to_client, from_client)));
                owner.spawn(None, takeover(stream, Bytes::new()));
                return;
            }
            let ends = body.is_end_stream();
            let length = body.size_hint().exact().filter(|_| !ends);
            if ends {
                unanswered.settle();
            }
            if let Some(to_client) = send_head(&mut reply, head, length, ends)
                && !ends
            {
                pipe(StreamBody::new(body, conn, unanswered), to_client).await;
            }
        });
        shared.spawn(Some(stream), task);
    };
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let io = Rc::new(RefCell::new(io));
    let mut http = Box::new(Streams::new(
        h2::server::Builder::new()
            .max_concurrent_streams(number(limits.streams))
            // Up to twice the limit the service answers, which counts and logs it; over that, h2.
            .max_header_list_size(number(limits.header_bytes.saturating_mul(2)))
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(connection_window(limits.streams))
            .max_send_buffer_size(SEND_BUFFER)
            .enable_connect_protocol()
            .handshake(Lent(Rc::clone(&io))),
    ));
    let mut timer = pin!(sleep_until(began + TICK));
    // When the connection itself is looked at.
    let mut second = began + TICK;
    let mut drained = pin!(drain.started());
    // Since when the client has been told to go.
    let mut going = None;
    let refused = |fault, detail: &str| {
        let took = began.elapsed();
        // The answer is HTTP/1.1's: here it is only counted and logged.
        let _ = service.refused(client, &Refusal { fault, head: &[], detail, took });
    };
    // Requests that did not get as far as the service, told already: h2 answers by itself what comes
    // while as many streams are open as may be, and a head that is malformed, or far over the limit.
    let unseen = Cell::new(0);
    let tell_unseen = || {
        let was_full = shared.full.replace(shared.open.get() >= limits.streams);
        let missing = frames.begun().saturating_sub(called.get());
        let more = missing.saturating_sub(unseen.get());
        if more > 0 && was_full {
            service.reached(Reached::Streams(more));
        } else if more > 0 {
            refused(ClientFault::Malformed, "a head that HTTP/2 does not allow");
        }
        unseen.set(unseen.get() + more);
    };
    // Polled here rather than by the runtime: answers that are ready at the same time leave
    // together, and they end with the connection.
    let mut tasks = FuturesUnordered::new();
    let stop = poll_fn(|cx| {
        loop {
            shared.run(&mut tasks, cx);
            if let Poll::Ready(result) = http.poll(cx, &answer) {
                return Poll::Ready(Stop::Ended(result));
            }
            if let Some(flood) = frames.flood(link.sent()) {
                return Poll::Ready(Stop::Flood(flood));
            }
            if shared.has_new() {
                continue;
            }
            let is_full = limits.requests > 0 && called.get() >= limits.requests as u64;
            if going.is_none() && is_full {
                service.reached(Reached::Requests);
            }
            if going.is_none() && (is_full || drained.as_mut().poll(cx).is_ready()) {
                going = Some(Instant::now());
                http.graceful_shutdown();
                continue;
            }
            if let Some(due) = shared.due(timer.deadline()) {
                timer.as_mut().reset(due);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            let due = tasks.iter().map(|task| task.look(now)).min();
            let is_early = now < second;
            if !is_early {
                second = now + TICK;
            }
            timer.as_mut().reset(due.map_or(second, |due| due.min(second)));
            if is_early {
                continue;
            }
            frames.tick(link.sent());
            tell_unseen();
            if link.is_stalled(now, &limits) {
                return Poll::Ready(Stop::Stalled);
            }
            let Some(idle) = shared.idle(now) else { continue };
            match going {
                Some(since) if now - since >= GOING => return Poll::Ready(Stop::Gone),
                Some(_) => {}
                // RFC 9113 section 3.4: the preface and SETTINGS come first, at once.
                None if !frames.any() && idle >= limits.header_read => {
                    return Poll::Ready(Stop::Gone);
                }
                None if idle >= limits.idle => {
                    service.reached(Reached::Idle);
                    going = Some(now);
                    http.graceful_shutdown();
                }
                None => {}
            }
        }
    })
    .await;
    if !matches!(stop, Stop::Flood(_) | Stop::Ended(Err(_))) {
        tell_unseen();
    }
    match stop {
        Stop::Flood(Flood::Frames) => refused(ClientFault::Flood, ""),
        Stop::Flood(Flood::Resets) => refused(ClientFault::Resets, ""),
        Stop::Stalled => refused(ClientFault::Stalled, ""),
        Stop::Ended(Err(ref error)) => {
            let unseen = frames.begun().saturating_sub(called.get());
            if let Some(fault) = fault(error, &frames, unseen) {
                refused(fault, &error.to_string());
            }
        }
        Stop::Ended(Ok(())) | Stop::Gone => {}
    }
    let lingers = !matches!(stop, Stop::Stalled);
    // What still runs is for nobody. Taken out first: a task that is dropped may look in here.
    let new = shared.take_new();
    drop((tasks, new, http));
    // Our last words must not be overtaken by a reset for what nobody reads any more.
    if let Some(io) = Rc::into_inner(io).filter(|_| lingers) {
        linger(io.into_inner().into_parts().0, &[]).await;
    }
}

/// The socket, which hyper does not give back.
struct Lent(Rc<RefCell<ClientIo>>);

impl AsyncRead for Lent {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}

pub(super) fn connection_window(streams: usize) -> u32 {
    const MOST: u32 = (1 << 31) - 1; // RFC 9113 section 6.9.1
    let streams = u32::try_from(streams).unwrap_or(u32::MAX);
    STREAM_WINDOW.saturating_mul(streams).min(MOST)
}

/// What the client did wrong, where we ended the connection for it.
fn fault(error: &h2::Error, frames: &Frames, unseen: u64) -> Option<ClientFault> {
    if !error.is_library() {
        return None;
    }
    match error.reason()? {
        h2::Reason::NO_ERROR => None,
        h2::Reason::ENHANCE_YOUR_CALM => Some(match frames.why_calm(unseen) {
            Calm::Head => ClientFault::HeadTooLarge,
            Calm::Flood(Flood::Resets) => ClientFault::Resets,
            Calm::Flood(Flood::Frames) => ClientFault::Flood,
        }),
        _ => Some(ClientFault::Malformed),
    }
}
