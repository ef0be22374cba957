//! One client connection, from its first byte to its last.
//!
//! A connection is *parked* while it waits for a request: a socket, a timer and a small task.
//! When a byte comes it becomes *active*: hyper reads requests and the service answers them.
//! After [`PARK_AFTER`] of quiet at a message boundary it is parked again, which gives back
//! hyper's buffers and the space of the service's future.
//!
//! One timer serves everything that may take too long: it fires at most once per [`TICK`] while
//! the connection is active and compares what it finds with the limits, so that no request has to
//! arm a timer of its own. Only a deadline nearer than the next tick moves it.

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    sync::Semaphore,
    task::coop,
    time::{Instant, sleep_until},
};

use super::{
    ClientFault, Limits, Origin, ProxyProtocol, Reached, Refusal, Service, drain,
    greet::{Met, Protocol, meet},
    guard, h2,
    io::ClientIo,
    paced::Paced,
    pinned,
};
use crate::net::Stream;

/// The longest time between two looks at an active connection's limits.
pub(super) const TICK: Duration = Duration::from_secs(1);
/// How long a connection stays active without a request.
const PARK_AFTER: Duration = Duration::from_secs(1);
/// How long a client that is still sending gets to read our last words before the socket closes.
const LINGER: Duration = Duration::from_secs(2);
/// And how much it may still send.
const LINGER_BYTES: usize = 64 << 20;
/// Interim responses that may wait for a client that does not read.
const INTERIM_WAITING: usize = 8;

/// Ends the client's response so that it can't look complete.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the response broke off")]
pub struct Abort;

/// Runs the connection after a 101: gets the socket and what the client already sent.
pub type Takeover = Box<dyn FnOnce(Stream, Bytes) -> Pin<Box<dyn Future<Output = ()>>>>;

/// What a connection and the service that answers on it tell each other.
pub struct Conn {
    /// Where it came in, and from whom.
    pub origin: Origin,
    drain: drain::Watch,
    phase: Cell<Phase>,
    /// When `phase` began.
    since: Cell<Instant>,
    /// When the service wants to be polled again, at the latest.
    deadline: Cell<Option<Instant>>,
    deadline_passed: Cell<bool>,
    /// The deadline is nearer than the timer.
    rearm: Cell<bool>,
    /// The request body has not been read to its end.
    body_open: Cell<bool>,
    /// When the service wants to be polled if no more of the request body has come by then.
    body_due: Cell<Option<Instant>>,
    /// Bytes were handed to the socket since hyper last found its buffer empty.
    dirty: Cell<bool>,
    /// Some of the response to a request that the service was asked for may not be with the
    /// socket yet. Without it hyper has nothing to write but its own answer to a bad head.
    owed: Cell<bool>,
    /// The status of that answer, which was kept from the client: the service has a better one.
    unsaid: Cell<Option<u16>>,
    /// The client takes nothing.
    blocked: Cell<Blocked>,
    /// Bytes of a response that hyper has and that may not be with the socket yet.
    unsent: Cell<usize>,
    received: Cell<u64>,
    sent: Cell<u64>,
    interim: RefCell<Vec<Bytes>>,
    has_interim: Cell<bool>,
    /// Of whoever answers.
    waker: RefCell<Option<Waker>>,
    takeover: RefCell<Option<Takeover>>,
    reset: Cell<bool>,
    /// The first bytes are those of HTTP/2.
    is_h2: Cell<bool>,
    /// Why the rest of the connection is not read.
    ambiguous: Cell<Option<guard::Fault>>,
    /// The connection carries no request after this one.
    is_last: Cell<bool>,
}

/// Whether a client takes nothing. It nearly always takes what there is within the same poll, for
/// which nobody has to know what time it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Blocked {
    No,
    /// Not when anybody last looked.
    New,
    /// Was found to be so then.
    Since(Instant),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// Waits for a request.
    Idle,
    /// A request's first byte is there.
    Head,
    /// The service answers.
    Busy,
}

impl fmt::Debug for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn")
            .field("origin", &self.origin)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

impl Conn {
    pub(super) fn new(origin: Origin, drain: drain::Watch) -> Self {
        Self {
            origin,
            drain,
            phase: Cell::new(Phase::Idle),
            since: Cell::new(Instant::now()),
            deadline: Cell::new(None),
            deadline_passed: Cell::new(false),
            rearm: Cell::new(false),
            body_open: Cell::new(false),
            body_due: Cell::new(None),
            dirty: Cell::new(false),
            owed: Cell::new(false),
            unsaid: Cell::new(None),
            blocked: Cell::new(Blocked::No),
            unsent: Cell::new(0),
            received: Cell::new(0),
            sent: Cell::new(0),
            interim: RefCell::default(),
            has_interim: Cell::new(false),
            waker: RefCell::default(),
            takeover: RefCell::default(),
            reset: Cell::new(false),
            is_h2: Cell::new(false),
            ambiguous: Cell::new(None),
            is_last: Cell::new(false),
        }
    }

    /// For one stream of HTTP/2, of which a request has just arrived.
    pub(super) fn stream(origin: Origin, drain: drain::Watch, has_body: bool) -> Self {
        let stream = Self::new(origin, drain);
        stream.phase.set(Phase::Head);
        stream.request_arrived(has_body);
        stream
    }

    /// For the socket that the streams of an HTTP/2 connection share: it carries no request itself.
    pub(super) fn link(origin: Origin, drain: drain::Watch) -> Self {
        let link = Self::new(origin, drain);
        link.phase.set(Phase::Busy);
        link.owed.set(true);
        link
    }

    /// Whether the answer must close the connection: this worker is taking nothing new, or it was
    /// the last request that the connection may carry.
    pub fn must_close(&self) -> bool {
        self.is_last.get() || self.drain.is_draining()
    }

    /// Waits until this worker takes nothing new.
    pub async fn drained(&self) {
        self.drain.started().await;
    }

    /// When the current request's first byte came.
    pub fn request_began(&self) -> Instant {
        self.since.get()
    }

    /// Asks to be polled again at `at`, even if nothing else happens; `None` takes it back.
    /// There is one deadline at a time.
    pub fn set_deadline(&self, at: Option<Instant>) {
        self.deadline.set(at);
        self.deadline_passed.set(false);
        self.rearm.set(at.is_some());
    }

    /// Whether the deadline has passed. Exact to a timer tick; no clock is read here.
    pub fn deadline_passed(&self) -> bool {
        self.deadline_passed.get()
    }

    /// The service waits for the request body, until then if nothing comes; or it does not.
    pub fn awaits_body(&self, until: Option<Instant>) {
        self.body_due.set(until);
    }

    /// The request body came to its end.
    pub fn body_ended(&self) {
        self.body_open.set(false);
        self.body_due.set(None);
    }

    /// The response is complete, or given up: the connection is idle again. Returns when.
    pub fn response_ended(&self) -> Instant {
        let now = Instant::now();
        self.phase.set(Phase::Idle);
        self.since.set(now);
        self.set_deadline(None);
        self.rearm.set(false);
        now
    }

    /// Sends an interim response (1xx) ahead of the final one. At most [`INTERIM_WAITING`] wait;
    /// more are dropped: RFC 9110 section 15.2 lets a proxy do so for those that it did not ask for.
    pub fn send_interim(&self, head: Bytes) {
        let mut interim = self.interim.borrow_mut();
        if interim.len() < INTERIM_WAITING {
            interim.push(head);
            self.has_interim.set(true);
            self.wake();
        }
    }

    /// Whom an interim answer wakes, and a deadline that has passed.
    pub(super) fn wakes(&self, waker: &Waker) {
        let mut known = self.waker.borrow_mut();
        if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
    }

    /// Has whoever answers polled.
    pub(super) fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// After the 101 that is about to be returned, the connection belongs to `takeover`.
    pub fn take_over(&self, takeover: Takeover) {
        *self.takeover.borrow_mut() = Some(takeover);
    }

    /// The connection must end with a reset: the body that broke off is delimited by the close
    /// of the connection, and a plain close would make it look complete.
    pub fn must_reset(&self) {
        self.reset.set(true);
    }

    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        self.received.get()
    }

    /// Bytes sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.get()
    }

    pub(super) fn request_arrived(&self, has_body: bool) {
        if self.phase.get() == Phase::Idle {
            // Pipelined: its bytes came with the request before.
            self.since.set(Instant::now());
        }
        self.phase.set(Phase::Busy);
        self.owed.set(true);
        self.body_open.set(has_body);
    }

    pub(super) fn read(&self, n: usize) {
        self.received.set(self.received.get() + n as u64);
        if n > 0 && self.phase.get() == Phase::Idle {
            self.phase.set(Phase::Head);
            self.since.set(Instant::now());
        }
    }

    pub(super) fn wrote(&self, n: usize) {
        self.sent.set(self.sent.get() + n as u64);
        self.dirty.set(true);
        self.blocked.set(Blocked::No);
    }

    pub(super) fn write_blocked(&self) {
        self.dirty.set(true);
        if self.blocked.get() == Blocked::No {
            self.blocked.set(Blocked::New);
        }
    }

    pub(super) fn flushed(&self) {
        self.dirty.set(false);
        self.blocked.set(Blocked::No);
        self.unsent.set(0);
        let phase = self.phase.get();
        if phase != Phase::Busy && self.owed.replace(false) && phase == Phase::Head {
            // Nobody listened before: the next head's time begins now.
            self.since.set(Instant::now());
        }
    }

    /// So many more bytes of a response are with hyper.
    pub(super) fn queue(&self, n: usize) {
        self.unsent.set(self.unsent.get() + n);
    }

    /// Bytes of a response that wait for the socket.
    pub(super) fn unsent(&self) -> usize {
        self.unsent.get()
    }

    /// Whether the socket takes nothing at present, and whoever writes will be woken when it does.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.get() != Blocked::No
    }

    /// Whether what hyper writes answers a request that the service knows.
    pub(super) fn is_owed(&self) -> bool {
        self.owed.get()
    }

    /// Notes what hyper would have said of a bad head.
    pub(super) fn keep_unsaid(&self, answer: &[u8]) {
        let status = answer.get(9..12).and_then(|code| std::str::from_utf8(code).ok());
        self.unsaid.set(Some(status.and_then(|code| code.parse().ok()).unwrap_or(400)));
    }

    pub(super) fn is_unsaid(&self) -> bool {
        self.unsaid.get().is_some()
    }

    /// The service answers a request, or its answer is on its way.
    pub(super) fn is_busy(&self) -> bool {
        self.phase.get() == Phase::Busy
    }

    /// What comes next can be read in more than one way.
    pub(super) fn found_fault(&self, fault: guard::Fault) {
        self.ambiguous.set(Some(fault));
    }

    /// The bytes that came are not HTTP/1.
    pub(super) fn found_h2(&self) {
        self.is_h2.set(true);
    }

    pub(super) fn is_h2(&self) -> bool {
        self.is_h2.get()
    }

    /// So many bytes of a response are with HTTP's machinery.
    pub(super) fn hand_over(&self, n: usize) {
        self.sent.set(self.sent.get() + n as u64);
    }

    pub(super) fn take_takeover(&self) -> Option<Takeover> {
        self.takeover.borrow_mut().take()
    }

    /// The deadline, if it was set since it was last asked for.
    pub(super) fn take_rearm(&self) -> Option<Instant> {
        self.rearm.take().then(|| self.deadline.get()).flatten()
    }

    /// Whether the client takes nothing, for too long. It is asked once per [`TICK`].
    pub(super) fn is_stalled(&self, now: Instant, limits: &Limits) -> bool {
        match self.blocked.get() {
            Blocked::No => false,
            Blocked::New => {
                self.blocked.set(Blocked::Since(now));
                false
            }
            Blocked::Since(then) => now - then >= limits.body_idle,
        }
    }

    /// As [`Conn::look`], for one stream of several.
    pub(super) fn look_at_stream(&self, now: Instant, limits: &Limits) -> Look {
        if self.is_stalled(now, limits) {
            return Look::Stop(Stop::Stalled);
        }
        self.look_at_service(now)
    }

    pub(super) fn has_interim(&self) -> bool {
        self.has_interim.get()
    }

    pub(super) fn take_interim(&self) -> Bytes {
        let mut interim = self.interim.borrow_mut();
        let next = if interim.is_empty() { Bytes::new() } else { interim.remove(0) };
        self.has_interim.set(!interim.is_empty());
        next
    }

    pub(super) fn put_back_interim(&self, rest: Bytes) {
        self.interim.borrow_mut().insert(0, rest);
        self.has_interim.set(true);
    }

    /// Compares how long things have taken with how long they may.
    fn look(&self, now: Instant, limits: &Limits) -> Look {
        if self.is_stalled(now, limits) {
            return Look::Stop(Stop::Stalled);
        }
        let quiet = now - self.since.get();
        match self.phase.get() {
            Phase::Idle => {
                if quiet >= limits.idle && !self.dirty.get() {
                    Look::Stop(Stop::Idle)
                } else if quiet >= PARK_AFTER && !self.dirty.get() && !self.body_open.get() {
                    Look::Stop(if self.drain.is_draining() { Stop::Idle } else { Stop::Quiet })
                } else {
                    Look::At(now + TICK)
                }
            }
            // Until the client has taken what it asked for before, nobody reads on.
            Phase::Head if self.owed.get() => Look::At(now + TICK),
            Phase::Head if quiet >= limits.header_read => Look::Stop(Stop::HeadTimeout),
            Phase::Head => Look::At((self.since.get() + limits.header_read).min(now + TICK)),
            Phase::Busy => self.look_at_service(now),
        }
    }

    /// Whether the service wants to be polled.
    fn look_at_service(&self, now: Instant) -> Look {
        let deadline = match (self.body_due.get(), self.deadline.get()) {
            (Some(body), Some(deadline)) => Some(body.min(deadline)),
            (body, deadline) => body.or(deadline),
        };
        match deadline {
            Some(at) if at <= now && !self.deadline_passed.replace(true) => Look::Poll,
            Some(at) if at > now => Look::At(at.min(now + TICK)),
            _ => Look::At(now + TICK),
        }
    }
}

/// What a look at the clock came to.
pub(super) enum Look {
    /// Nothing; look again then.
    At(Instant),
    /// The service's deadline has passed: poll it.
    Poll,
    /// The connection is over, or can be put away.
    Stop(Stop),
}

/// Why an active connection stopped.
pub(super) enum Stop {
    /// hyper is done with it.
    Ended(hyper::Result<()>),
    /// Quiet for a moment.
    Quiet,
    /// Idle for too long, or idle in a drain.
    Idle,
    /// The head took too long.
    HeadTimeout,
    /// The client does not take its response.
    Stalled,
}

/// What remains of a connection that was active.
enum Rest {
    /// It can be parked. Whether the client said anything.
    Park(Stream, bool),
    /// Bytes had been read ahead: go on at once.
    Again(Stream, Bytes),
    /// It is HTTP/2's, beginning with these bytes.
    H2(Stream, Bytes),
    /// It is over.
    Over,
}

/// Serves one connection to its end.
pub(crate) async fn run<S: Service + 'static>(
    stream: Stream,
    origin: Origin,
    service: Rc<S>,
    limits: Rc<Cell<Limits>>,
    handshakes: Arc<Semaphore>,
    drain: drain::Watch,
) {
    let door = service.door(&origin);
    let met = if door.proxy_protocol == ProxyProtocol::Off && door.tls.is_none() {
        let protocol = door.clear();
        let Some(place) = service.admit(&origin) else { return };
        Met { stream, place, ahead: Bytes::new(), origin, certificate: None, protocol }
    } else {
        // Nobody accepts anything else.
        let Stream::Plain(socket) = stream else { return };
        // Boxed, so that other connections do not pay for the space.
        let socket = socket.into_inner();
        let met =
            Box::pin(meet(socket, origin, &door, &*service, &limits, &handshakes, &drain)).await;
        let Some(met) = met else { return };
        met
    };
    drop((door, handshakes));
    let Met { mut stream, place, mut ahead, origin, certificate, mut protocol } = met;
    let client = Rc::new(service.opened(origin, certificate, place));
    let carried = Cell::new(0);
    let mut idle_since = Instant::now();
    // What came right behind a handshake is with TLS already, and not with the socket.
    let mut at_once = origin.secure;
    loop {
        if !at_once && ahead.is_empty() {
            match parked(&stream, idle_since, &limits, &drain).await {
                Parked::Readable => {}
                Parked::Idle => return service.reached(Reached::Idle),
                Parked::Over => return,
            }
        }
        at_once = false;
        if protocol == Protocol::H2 {
            let limits = limits.get();
            let served = h2::serve(stream, ahead, origin, &client, &service, limits, &drain);
            return Box::pin(served).await;
        }
        // Boxed, so that a parked connection does not pay for the space of an active one.
        let sniff = protocol == Protocol::Either;
        let active =
            active(stream, ahead, sniff, origin, &client, &service, &limits, &drain, &carried);
        match Box::pin(active).await {
            Rest::Park(socket, spoke) => {
                (stream, ahead) = (socket, Bytes::new());
                // Records of TLS without a text in them do not keep a connection.
                if !spoke {
                    continue;
                }
            }
            Rest::Again(socket, bytes) => (stream, ahead) = (socket, bytes),
            Rest::H2(socket, bytes) => {
                (stream, ahead, protocol) = (socket, bytes, Protocol::H2);
                continue;
            }
            Rest::Over => return,
        }
        protocol = Protocol::Http1;
        idle_since = Instant::now() - PARK_AFTER;
    }
}

/// What a parked connection waits on.
pub(super) trait Readable {
    async fn readable(&self) -> io::Result<()>;
}

impl Readable for TcpStream {
    async fn readable(&self) -> io::Result<()> {
        Self::readable(self).await
    }
}

impl Readable for Stream {
    async fn readable(&self) -> io::Result<()> {
        Self::readable(self).await
    }
}

/// How the wait for a request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Parked {
    /// There is something to read.
    Readable,
    /// It took too long.
    Idle,
    /// The connection broke, or this worker is leaving.
    Over,
}

/// Waits for the next request's first byte.
pub(super) async fn parked(
    stream: &impl Readable,
    since: Instant,
    limits: &Cell<Limits>,
    drain: &drain::Watch,
) -> Parked {
    // A client that is about to send gets a last chance: its answer will say `connection: close`.
    let drained = async {
        drain.started().await;
        tokio::time::sleep(PARK_AFTER).await;
    };
    tokio::select! {
        biased;
        readable = stream.readable() => match readable {
            Ok(()) => Parked::Readable,
            Err(_) => Parked::Over,
        },
        () = sleep_until(since + limits.get().idle) => Parked::Idle,
        () = drained => Parked::Over,
    }
}

#[expect(clippy::too_many_arguments, reason = "what a connection is made of, in its one place")]
async fn active<S: Service + 'static>(
    stream: Stream,
    ahead: Bytes,
    sniff: bool,
    origin: Origin,
    client: &Rc<S::Client>,
    service: &Rc<S>,
    limits: &Cell<Limits>,
    drain: &drain::Watch,
    carried: &Cell<usize>,
) -> Rest {
    let limits = limits.get();
    let conn = Rc::new(Conn::new(origin, drain.clone()));
    let io = TokioIo::new(ClientIo::new(stream, ahead, Rc::clone(&conn)).sniffing(sniff));
    let answer = service_fn(|request: http::Request<hyper::body::Incoming>| {
        let (service, conn, client) = (Rc::clone(service), Rc::clone(&conn), Rc::clone(client));
        conn.request_arrived(!http_body::Body::is_end_stream(request.body()));
        let request = request.map(super::Incoming::from);
        carried.set(carried.get() + 1);
        if carried.get() == limits.requests {
            conn.is_last.set(true);
            service.reached(Reached::Requests);
        }
        async move {
            // Boxed: thousands of bytes that are not needed any more while the answer is sent.
            let response = pinned(|| service.call(&client, &conn, request)).await;
            Ok::<_, std::convert::Infallible>(response.map(|body| Paced::new(body, conn)))
        }
    });
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_buf_size(READ_BUFFER)
        .max_header_size(limits.header_bytes);
    if limits.headers != HYPERS_HEADERS {
        builder.max_headers(limits.headers);
    }
    let mut http = builder.serve_connection(io, answer);

    let mut timer = pin!(sleep_until(Instant::now() + TICK));
    // Whom the timer wakes. It is asked when it has gone off, and not whenever anything happens.
    let mut armed: Option<Waker> = None;
    let stop = poll_fn(|cx| {
        loop {
            if let Poll::Ready(result) = Pin::new(&mut http).poll(cx) {
                return Poll::Ready(Stop::Ended(result));
            }
            if conn.rearm.take()
                && let Some(at) = conn.deadline.get()
                && at < timer.deadline()
            {
                timer.as_mut().reset(at);
                armed = None;
            }
            let mut poll_again = false;
            while timer.is_elapsed() || !armed.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                // Without a budget the runtime has the task come again, and notes nothing.
                let is_asked = coop::has_budget_remaining();
                if timer.as_mut().poll(cx).is_pending() {
                    armed = is_asked.then(|| cx.waker().clone());
                    break;
                }
                armed = None;
                let now = Instant::now();
                match conn.look(now, &limits) {
                    Look::At(at) => timer.as_mut().reset(at),
                    Look::Poll => {
                        timer.as_mut().reset(now + TICK);
                        poll_again = true;
                    }
                    Look::Stop(stop) => return Poll::Ready(stop),
                }
            }
            if !poll_again {
                return Poll::Pending;
            }
        }
    })
    .await;

    let parts = http.into_parts();
    let (stream, mut ahead) = parts.io.into_inner().into_parts();
    if ahead.is_empty() {
        ahead = parts.read_buf;
    } else if !parts.read_buf.is_empty() {
        ahead = [parts.read_buf, ahead].concat().into();
    }
    if conn.is_h2.get() {
        return Rest::H2(stream, ahead);
    }
    let refused = |fault, head: &[u8], detail: &str| {
        let took = conn.since.get().elapsed();
        service.refused(client, &Refusal { fault, head, detail, took })
    };
    match stop {
        Stop::Quiet if ahead.is_empty() => Rest::Park(stream, conn.received() > 0),
        Stop::Quiet => Rest::Again(stream, ahead),
        Stop::Idle => {
            if !drain.is_draining() {
                service.reached(Reached::Idle);
            }
            Rest::Over
        }
        Stop::Stalled => {
            refused(ClientFault::Stalled, &[], "");
            Rest::Over
        }
        Stop::HeadTimeout => {
            linger(stream, &refused(ClientFault::HeadTimeout, &ahead, "")).await;
            Rest::Over
        }
        Stop::Ended(result) => {
            let takeover = conn.takeover.borrow_mut().take();
            if let (Ok(()), Some(takeover)) = (&result, takeover) {
                takeover(stream, ahead).await;
                return Rest::Over;
            }
            if let Err(error) = &result
                && let Some(fault) = fault(error, conn.unsaid.get())
            {
                let ambiguous = conn.ambiguous.get().map(guard::Fault::as_str);
                let detail = ambiguous.map_or_else(|| error.to_string(), str::to_owned);
                let consumed = CONSUMED.iter().any(|fault| detail.starts_with(fault));
                let answer = refused(fault, if consumed { &[] } else { &ahead }, &detail);
                // What is left of an earlier response went with hyper's buffers: an answer would
                // be taken for its rest.
                let answer = if conn.owed.get() { Bytes::new() } else { answer };
                linger(stream, &answer).await;
            } else if conn.reset.get() {
                // Without this the close would look like the end of the body.
                stream.reset_on_close();
            } else if conn.body_open.get() && result.is_ok() {
                linger(stream, &[]).await;
            }
            Rest::Over
        }
    }
}

/// hyper's own bound, for which it needs no allocation.
const HYPERS_HEADERS: usize = 100;
/// How hyper begins to tell of what it may find only after it has consumed the head, so that
/// whatever is left came behind it. The tests of refusals hold this against hyper.
const CONSUMED: [&str; 4] = [
    "invalid URI",
    "invalid content-length",
    "invalid transfer-encoding",
    "unexpected transfer-encoding",
];
/// The largest read from a client at once, and the most that waits to be written to it. A body of
/// 64 KiB and its head come in one read: at 64 KiB the last few hundred bytes would cost a read and
/// a write of their own.
pub const READ_BUFFER: usize = 80 << 10;

/// What the client did wrong, by hyper's error and the status that it would have answered with.
fn fault(error: &hyper::Error, unsaid: Option<u16>) -> Option<ClientFault> {
    if unsaid == Some(414) {
        Some(ClientFault::UriTooLong)
    } else if error.is_parse_too_large() {
        Some(ClientFault::HeadTooLarge)
    } else if error.is_parse() {
        Some(ClientFault::Malformed)
    } else {
        None
    }
}

/// Says the last words and lets a client that is still sending read them before the socket goes:
/// closing with unread bytes makes the kernel send a reset, which may overtake the answer (RFC 9112
/// section 9.6).
pub(super) async fn linger(mut stream: Stream, last_words: &[u8]) {
    let _ = tokio::time::timeout(LINGER, async {
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, last_words).await;
        let _ = tokio::io::AsyncWriteExt::flush(&mut stream).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
        let mut scratch = vec![0; 16 << 10];
        let mut left = LINGER_BYTES;
        while left > 0 {
            match stream.read(&mut scratch).await {
                Ok(n) if n > 0 => left = left.saturating_sub(n),
                _ => break,
            }
        }
    })
    .await;
}
