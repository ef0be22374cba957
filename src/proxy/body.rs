//! Bodies: the request's, of which a prefix is kept for a replay, and the response's.
//!
//! While a request body streams to a node, its frames are kept until the response head is there,
//! up to `replay.buffer` for one request and `limits.replay_bytes` for the process. If the head
//! says replay, the next attempt sends the kept prefix and then goes on with the client's stream,
//! so an upload that was refused early is replayed without ever having been held whole. Over
//! either limit nothing more is kept, what was kept is let go, and a replay is impossible.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future as _, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::{slot::Slot, turn::Turn};
use crate::{
    decide::{
        Problem,
        pace::{self, Late, Pace},
        strict,
    },
    server::{BodyError, Conn, Incoming, READ_BUFFER},
    upstream::Wire,
};

/// The largest frame that hyper hands over: reading ahead stops where one more might not be kept.
const AHEAD: usize = READ_BUFFER + FRAME;
/// How long a node may take to refuse an upload before more of it is sent than is kept: LiteFS
/// answers such a request at once, without reading it, while the sockets take in megabytes.
const PAUSE: Duration = Duration::from_millis(25);
/// What a kept frame costs beyond its bytes: a client may send one byte at a time.
const FRAME: usize = 64;
/// A kept frame of fewer bytes is a copy.
const COPIED: usize = READ_BUFFER / 4;

/// This worker's share of `limits.replay_bytes`.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: Cell<usize>,
    refused: Cell<u64>,
}

impl Budget {
    /// An empty one.
    pub fn new(limit: usize) -> Rc<Self> {
        Rc::new(Self { limit, used: Cell::new(0), refused: Cell::new(0) })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.get()
    }

    /// How often nothing was left, since this was asked last.
    pub fn refused(&self) -> u64 {
        self.refused.take()
    }

    fn take(&self, n: usize) -> bool {
        let used = self.used.get() + n;
        let fits = used <= self.limit;
        if fits {
            self.used.set(used);
        } else {
            self.refused.set(self.refused.get() + 1);
        }
        fits
    }

    fn give(&self, n: usize) {
        self.used.set(self.used.get() - n);
    }
}

/// A request body on its way, for as many attempts as it takes.
#[derive(Debug)]
pub struct Upload(Rc<Shared>);

#[derive(Debug)]
struct Shared {
    conn: Rc<Conn>,
    state: RefCell<State>,
    budget: Rc<Budget>,
    /// `replay.buffer`
    limit: usize,
    /// When a frame last went to a node, or the attempt began.
    progress: Cell<Instant>,
    /// The client's stream came to its end.
    ended: Cell<bool>,
    /// The client's stream failed.
    failed: Cell<bool>,
    /// How long the client is still waited for.
    pace: Cell<Pace>,
    /// Without it, the last of a write's body stays here.
    slot: RefCell<Slot>,
    /// Bytes of body that came from the client.
    received: Cell<u64>,
    /// Where one more frame might not be kept, the node gets a moment to say "elsewhere" first.
    /// Once for each attempt.
    pause: RefCell<Option<Pin<Box<Sleep>>>>,
    paused: Cell<bool>,
    turn: Turn,
}

#[derive(Debug)]
struct State {
    source: Incoming,
    kept: VecDeque<Bytes>,
    /// What `kept` costs.
    cost: usize,
    /// How many of `kept` the current attempt has sent.
    sent: usize,
    /// What came last from the client, as long as it was not sent: it waits behind what is kept.
    next: Option<Polled>,
    trailers: Option<HeaderMap>,
    trailers_sent: bool,
    /// Frames are still kept.
    keeping: bool,
    /// The prefix is not whole any more.
    lost: bool,
}

/// A frame, or the end of them.
type Polled = Option<Result<Frame<Bytes>, BodyError>>;

impl Upload {
    /// For a body that is not empty.
    pub fn new(
        source: Incoming,
        conn: Rc<Conn>,
        budget: Rc<Budget>,
        limit: usize,
        mut pace: pace::Rules,
        now: Instant,
    ) -> Self {
        if source.size_hint().exact().is_none() {
            pace.rate = 0;
        }
        Self(Rc::new(Shared {
            conn,
            state: RefCell::new(State {
                source,
                kept: VecDeque::new(),
                cost: 0,
                sent: 0,
                next: None,
                trailers: None,
                trailers_sent: false,
                keeping: limit > 0,
                lost: false,
            }),
            budget,
            limit,
            progress: Cell::new(now),
            ended: Cell::new(false),
            failed: Cell::new(false),
            pace: Cell::new(Pace::new(pace)),
            slot: RefCell::default(),
            received: Cell::new(0),
            pause: RefCell::default(),
            paused: Cell::new(false),
            turn: Turn::default(),
        }))
    }

    /// The body for one attempt: the kept prefix first. Where the client waits for
    /// `100 Continue`, nothing is taken from it before the node says so.
    pub fn attempt(&self, wire: Rc<Wire>, expects_continue: bool, now: Instant) -> RequestBody {
        let mut state = self.0.state.borrow_mut();
        self.0.paused.set(false);
        *self.0.pause.borrow_mut() = None;
        state.sent = 0;
        state.trailers_sent = false;
        if state.keeping {
            // It is among what is kept, unless it is the failure.
            state.next.take_if(|next| !matches!(next, Some(Err(_))));
        }
        self.0.progress.set(now);
        RequestBody(Some(Reader { shared: Rc::clone(&self.0), wire, expects_continue }))
    }

    /// Reads ahead while the request waits, as much as is kept: once the whole body is here, the
    /// client's connection is watched, and a client that goes away frees its place. Never ready.
    pub fn poll_ahead(&self, cx: &mut Context<'_>) -> Poll<std::convert::Infallible> {
        let shared = &self.0;
        let state = &mut *shared.state.borrow_mut();
        while state.keeping
            && !shared.ended.get()
            && !shared.failed.get()
            && !shared.may_exceed(state)
        {
            // Nothing of it is with a node.
            state.sent = 0;
            let Poll::Ready(next) = shared.poll_source(state, cx) else { return Poll::Pending };
            state.sent = 0;
            if !state.keeping || shared.failed.get() {
                // The attempt meets it in its place.
                state.next = Some(next);
            }
        }
        shared.rests();
        Poll::Pending
    }

    /// Reads ahead until the whole body is here, more of it might not be kept, or `until`, which is
    /// for a body that a client is still making. Returns the time if it had to be waited for.
    pub async fn gather(&self, until: Instant) -> Option<Instant> {
        let (shared, has_length) = (&self.0, self.has_length());
        let mut waited = 0;
        poll_fn(|cx| {
            let _ = self.poll_ahead(cx);
            if !shared.pace.get().is_waiting() || (!has_length && waited > 0) {
                return Poll::Ready(());
            }
            match waited {
                // What came with the head is here as soon as HTTP/1.1's machinery hears of the wish.
                0 => cx.waker().wake_by_ref(),
                1 => shared.conn.set_deadline(Some(until)),
                _ if shared.conn.deadline_passed() => {
                    if Instant::now() >= until {
                        return Poll::Ready(());
                    }
                    shared.conn.set_deadline(Some(until));
                }
                _ => {}
            }
            waited = 2.min(waited + 1);
            Poll::Pending
        })
        .await;
        if waited > 1 {
            shared.conn.set_deadline(None);
        }
        (waited > 0).then(Instant::now)
    }

    /// The slot that the last of the body waits for, from now on.
    pub fn set_slot(&self, slot: Slot) {
        // What was there may hand its place to somebody, and is dropped when this is not borrowed.
        drop(self.0.slot.replace(slot));
    }

    /// Until when the last of it waits for a slot, if it does.
    pub fn waits_until(&self) -> Option<Instant> {
        self.0.slot.borrow().waits_until()
    }

    /// Why there is no more to be waited for, if so.
    pub fn fault(&self, cx: &mut Context<'_>, now: Instant) -> Option<Problem> {
        if self.waits_until().is_some_and(|until| until <= now) {
            return Some(Problem::WritesFull);
        }
        let late = self.0.pace.get().late(now.into_std())?;
        let state = &mut *self.0.state.borrow_mut();
        if state.next.is_some() || self.0.ended.get() {
            self.0.pace.set(self.0.pace.get().forgiven());
            return None;
        }
        // The node takes no more, and perhaps nobody has asked the client since.
        let before = self.0.pace.get();
        if let Poll::Ready(next) = self.0.poll_source(state, cx) {
            state.next = Some(next);
            self.0.pace.set(before.forgiven());
            return None;
        }
        Some(match late {
            Late::Silent => Problem::BodyTimeout,
            Late::Slow => Problem::BodySlow,
        })
    }

    /// Whether another attempt would be sent the whole body.
    pub fn is_replayable(&self) -> bool {
        !self.0.state.borrow().lost && !self.0.failed.get()
    }

    /// The answer is on its way to the client: there will be no other attempt.
    pub fn settle(&self) {
        let mut state = self.0.state.borrow_mut();
        state.keeping = false;
        let sent = state.sent;
        if sent > 0 {
            state.lost = true;
        }
        state.kept.drain(..sent);
        state.sent = 0;
        self.0.release(&mut state);
    }

    /// Whether the client said how long it is.
    pub fn has_length(&self) -> bool {
        let state = self.0.state.borrow();
        state.source.size_hint().exact().is_some()
    }

    /// How much of it may be kept while it waits: all of it, or as much as is kept of any.
    pub fn expected(&self, most: usize) -> usize {
        let state = self.0.state.borrow();
        let rest = state.source.size_hint().exact().map(usize::try_from);
        let kept: usize = state.kept.iter().map(Bytes::len).sum();
        rest.and_then(Result::ok).map_or(most, |rest| rest.saturating_add(kept).min(most))
    }

    /// Whether the client's stream came to its end.
    pub fn is_complete(&self) -> bool {
        self.0.ended.get()
    }

    /// Whether the client's stream failed.
    pub fn is_broken(&self) -> bool {
        self.0.failed.get()
    }

    /// Whether the node got all of it.
    pub fn is_sent(&self) -> bool {
        self.0.ended.get() && self.0.state.borrow().next.is_none()
    }

    /// When it last got on.
    pub fn progress(&self) -> Instant {
        self.0.progress.get()
    }

    /// Bytes that came from the client.
    pub fn received(&self) -> u64 {
        self.0.received.get()
    }
}

impl Shared {
    /// Gives back the budget for what is no longer kept.
    fn release(&self, state: &mut State) {
        let cost = state.kept.iter().map(|bytes| bytes.len() + FRAME).sum();
        self.budget.give(state.cost - cost);
        state.cost = cost;
    }

    /// Whether the next frame might not be kept.
    fn may_exceed(&self, state: &State) -> bool {
        let rest = state.source.size_hint().exact().map(usize::try_from);
        let rest = rest.and_then(Result::ok).map_or(AHEAD, |rest| rest.saturating_add(FRAME));
        state.cost.saturating_add(rest.min(AHEAD)) > self.limit
    }

    fn keep(&self, state: &mut State, data: &Bytes) {
        let cost = data.len() + FRAME;
        if state.cost + cost <= self.limit && self.budget.take(cost) {
            state.cost += cost;
            state.kept.push_back(compact(data));
            state.sent += 1;
        } else {
            state.keeping = false;
            state.lost |= state.sent > 0;
            state.kept.drain(..state.sent);
            state.sent = 0;
            self.release(state);
        }
    }

    /// The next frame for the node.
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Polled> {
        let state = &mut *self.state.borrow_mut();
        if let Some(kept) = state.kept.get(state.sent) {
            if self.ended.get() && state.sent + 1 == state.kept.len() {
                ready!(self.slot.borrow_mut().poll(cx));
            }
            let data = kept.clone();
            if state.keeping {
                state.sent += 1;
            } else {
                state.kept.pop_front();
                state.lost = true;
                self.release(state);
            }
            self.progress.set(Instant::now());
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if state.next.is_none() {
            if self.failed.get() {
                // Asked once more after its error, a source says that it has ended, and half a body
                // would run as a whole one.
                return Poll::Ready(Some(Err(h2::Error::from(h2::Reason::CANCEL).into())));
            }
            if self.ended.get() {
                ready!(self.slot.borrow_mut().poll(cx));
                let trailers = state.trailers.clone().filter(|_| !state.trailers_sent);
                state.trailers_sent = true;
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
            }
            if self.poll_pause(state, cx).is_pending() || self.turn.poll_mine(cx).is_pending() {
                self.rests();
                return Poll::Pending;
            }
            state.next = Some(ready!(self.poll_source(state, cx)));
            if let Some(Some(Ok(frame))) = &state.next {
                self.turn.moved(frame.data_ref().map_or(0, Bytes::len));
            }
        }
        if self.ended.get() {
            ready!(self.slot.borrow_mut().poll(cx));
        }
        let next = state.next.take().flatten();
        if let Some(Ok(frame)) = &next {
            state.trailers_sent |= frame.is_trailers();
            state.lost |= !state.keeping && frame.data_ref().is_some_and(|data| !data.is_empty());
        }
        self.progress.set(Instant::now());
        Poll::Ready(next)
    }

    /// Gives a node a moment to refuse where more than is kept would be sent.
    fn poll_pause(&self, state: &State, cx: &mut Context<'_>) -> Poll<()> {
        if state.keeping && !self.paused.get() && self.may_exceed(state) {
            let mut pause = self.pause.borrow_mut();
            let pause = pause.get_or_insert_with(|| Box::pin(sleep(PAUSE)));
            ready!(pause.as_mut().poll(cx));
            self.paused.set(true);
        }
        Poll::Ready(())
    }

    /// What comes next from the client. What of it is kept counts as sent, and trailers do not.
    fn poll_source(&self, state: &mut State, cx: &mut Context<'_>) -> Poll<Polled> {
        let polled = Pin::new(&mut state.source).poll_frame(cx);
        let Poll::Ready(mut frame) = polled else {
            if !self.pace.get().is_waiting() {
                self.pace.set(self.pace.get().waits(Instant::now().into_std()));
                self.conn.awaits_body(self.pace.get().due().map(Instant::from_std));
            }
            return Poll::Pending;
        };
        self.came(frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()));
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.received.set(self.received.get() + data.len() as u64);
                    if state.keeping {
                        self.keep(state, data);
                    }
                } else if let Some(trailers) = frame.trailers_mut() {
                    strict::trailers(trailers);
                    state.trailers = Some(trailers.clone());
                    self.end();
                }
            }
            Some(Err(_)) => self.failed.set(true),
            None => self.end(),
        }
        if state.source.is_end_stream() {
            self.end();
        }
        Poll::Ready(frame)
    }

    /// Something came, and whatever waited for it does so no more.
    fn came(&self, data: Option<&Bytes>) {
        let pace = self.pace.get();
        // The clock tells nothing where nobody waited.
        let now = if pace.is_waiting() { Instant::now() } else { self.progress.get() };
        self.pace.set(pace.got(now.into_std(), data.map_or(0, Bytes::len)));
        self.conn.awaits_body(None);
    }

    /// It is not the client that is waited for.
    fn rests(&self) {
        if self.pace.get().is_waiting() {
            self.came(None);
        }
    }

    fn end(&self) {
        self.ended.set(true);
        self.conn.body_ended();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.budget.give(self.state.get_mut().cost);
    }
}

/// The body of one attempt, as a node's connection sends it.
#[derive(Debug, Default)]
pub struct RequestBody(Option<Reader>);

#[derive(Debug)]
struct Reader {
    shared: Rc<Shared>,
    /// The socket it goes to.
    wire: Rc<Wire>,
    /// Closed until the node says `100 Continue`.
    expects_continue: bool,
}

impl RequestBody {
    /// None.
    pub fn empty() -> Self {
        Self(None)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(reader) = &self.0 else { return Poll::Ready(None) };
        // The node takes no more, but may be answering: leave the rest with the client.
        let closed = reader.expects_continue && !reader.wire.continued();
        if closed || reader.wire.is_broken() || reader.wire.poll_room(cx).is_pending() {
            reader.shared.rests();
            return Poll::Pending;
        }
        let polled = reader.shared.poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            reader.wire.queue(data.len());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        let Some(Reader { shared, .. }) = &self.0 else { return true };
        let state = shared.state.borrow();
        shared.ended.get()
            && state.next.is_none()
            && state.sent >= state.kept.len()
            && (state.trailers.is_none() || state.trailers_sent)
    }

    fn size_hint(&self) -> SizeHint {
        let Some(Reader { shared, .. }) = &self.0 else { return SizeHint::with_exact(0) };
        let state = shared.state.borrow();
        let unsent = state.kept.iter().skip(state.sent);
        let unsent: u64 = unsent.map(|bytes| bytes.len() as u64).sum();
        let next = state.next.iter().flatten().flatten().filter_map(Frame::data_ref);
        let unsent = unsent + next.map(|bytes| bytes.len() as u64).sum::<u64>();
        match state.source.size_hint().exact() {
            Some(rest) => SizeHint::with_exact(rest + unsent),
            None => SizeHint::default(),
        }
    }
}

/// Bytes that cost about as much memory as they are long. A frame is a part of the buffer that it was
/// read into, which lives as long as the frame: 8 KiB and more for a single byte.
fn compact(data: &Bytes) -> Bytes {
    if data.len() < COPIED { Bytes::copy_from_slice(data) } else { data.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_frame_does_not_keep_the_buffer_that_it_was_read_into() {
        let buffer = Bytes::from(vec![b'x'; READ_BUFFER]);
        for (length, copied) in [(1, true), (COPIED - 1, true), (COPIED, false)] {
            let frame = buffer.slice(..length);
            let kept = compact(&frame);
            assert_eq!(kept, frame);
            assert_eq!(kept.as_ptr() != frame.as_ptr(), copied, "{length} bytes");
        }
    }
}
