//! What runs for the streams of one connection, of HTTP/2 or HTTP/3.
//!
//! Their tasks are polled by the connection's own rather than by the runtime: answers that are ready
//! at the same time leave together, and they end with the connection. One timer keeps the time of all
//! of them, so that no stream has to arm one.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream as _};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::{
    Abort, Limits,
    conn::{Conn, Look, TICK},
    frames::Frames,
};

/// How long a client may take to hang up when it has been told to and nothing is under way.
pub(super) const GOING: Duration = Duration::from_secs(2);
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
    fn look(&self, now: Instant) -> Instant {
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

    /// Whether there were as many streams as may be, since this was asked last.
    pub(super) fn was_full(&self) -> bool {
        self.full.replace(self.open.get() >= self.limits.streams)
    }

    /// How long there has been no stream. `None`: there is one.
    pub(super) fn idle(&self, now: Instant) -> Option<Duration> {
        (self.open.get() == 0).then(|| now - self.idle_since.get())
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

/// When streams are looked at, and their connection.
pub(super) struct Clock<'a> {
    timer: Pin<&'a mut Sleep>,
    /// When the connection itself is.
    second: Instant,
}

impl<'a> Clock<'a> {
    /// The timer ends when the connection is to be looked at first.
    pub(super) fn new(timer: Pin<&'a mut Sleep>) -> Self {
        let second = timer.deadline();
        Self { timer, second }
    }

    /// Ready when some streams have been looked at: those that are to be polled have been woken.
    /// With the time where the connection is to be looked at too.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        shared: &Shared,
        tasks: &FuturesUnordered<Task>,
    ) -> Poll<Option<Instant>> {
        if let Some(due) = shared.due.take().filter(|due| *due < self.timer.deadline()) {
            self.timer.as_mut().reset(due);
        }
        ready!(self.timer.as_mut().poll(cx));
        let now = Instant::now();
        let due = tasks.iter().map(|task| task.look(now)).min();
        let is_second = now >= self.second;
        if is_second {
            self.second = now + TICK;
        }
        self.timer.as_mut().reset(due.map_or(self.second, |due| due.min(self.second)));
        Poll::Ready(is_second.then_some(now))
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
