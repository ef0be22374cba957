//! HTTP/3 (feature `http3`): QUIC by quinn, and on it what RFC 9114 adds.
//!
//! That part is litegate's own, and only a server's: no pushes, no dynamic table for fields. The
//! library that there is does not hold what is promised here: see docs/limits.md. Below the service
//! all is as with HTTP/2, [`super::h2`]: each request has a [`Conn`], a task that the connection's
//! own polls, and a timer.

use std::{
    cell::Cell,
    future::{Future as _, pending, poll_fn},
    pin::pin,
    rc::Rc,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Poll, ready},
};

use bytes::{Buf as _, Bytes};
use futures_util::stream::FuturesUnordered;
use http::{Method, Response, StatusCode, header};
use http_body::Body as _;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};

use self::{
    frames::{Code, Control, Integer},
    qpack::Most,
    stream::{Receive, Reply, Sides, Tunnel},
};
use super::{
    ClientFault, Conn, Incoming, Limits, Origin, Reached, Refusal, Service,
    conn::TICK,
    drain,
    frames::{Flood, Frames},
    pinned,
    tasks::{Clock, GOING, Shared, StreamBody, Unanswered},
};
use crate::net::Stream;

pub(crate) mod endpoint;
pub(crate) mod frames;
pub(crate) mod head;
mod huffman;
pub(crate) mod qpack;
pub(crate) mod reader;
mod steer;
mod stream;

pub use endpoint::{Crypto, Socket, crypto, serve};
pub use steer::Post;
pub use stream::Broken;
pub(super) use stream::Receive as RequestStream;

/// What all streams of a connection share. Like a tunnel it may be sent elsewhere, but is not.
pub(super) struct Link {
    connection: Connection,
    /// What a field section may hold: twice the limits, up to which the service answers, which
    /// counts and logs it.
    most: Most,
    /// Frames that ask for something, since they were last asked about, and others.
    useful: AtomicU64,
    useless: AtomicU64,
    /// Why we ended the connection.
    fault: OnceLock<(Code, &'static str)>,
}

/// How a connection ends in peace.
struct Leave {
    connection: Connection,
    /// The client is to be told that this connection takes no more.
    leaving: Notify,
    /// The first request that is not answered. `None`: there is none yet.
    refused_from: Cell<Option<u64>>,
    /// The next request that has not come yet.
    next: Cell<u64>,
}

impl Link {
    /// Ends the connection.
    fn fail(&self, code: Code, detail: &'static str) {
        let _ = self.fault.set((code, detail));
        self.connection.close(code.into(), detail.as_bytes());
    }

    /// A frame came.
    fn came(&self, useful: bool) {
        let counter = if useful { &self.useful } else { &self.useless };
        counter.fetch_add(1, Relaxed);
    }
}

impl Leave {
    /// From the next request on nothing is answered. Returns its id.
    fn refuse(&self) -> u64 {
        let next = self.next.get();
        self.refused_from.set(Some(next));
        next
    }
}

/// Why a connection stopped.
enum Stop {
    Ended(ConnectionError),
    Flood(Flood),
    Gone,
}

/// Serves a connection to its end.
pub(crate) async fn serve_connection<S: Service + 'static>(
    connection: Connection,
    origin: Origin,
    client: &Rc<S::Client>,
    service: &Rc<S>,
    limits: Limits,
    drain: &drain::Watch,
) {
    let began = Instant::now();
    let frames = Rc::new(Frames::new(limits.resets, limits.frames));
    let link = Arc::new(Link {
        connection: connection.clone(),
        most: Most {
            bytes: limits.header_bytes.saturating_mul(2),
            // Four pseudo fields more than any request has.
            fields: limits.headers.saturating_mul(2).saturating_add(8),
        },
        useful: AtomicU64::new(0),
        useless: AtomicU64::new(0),
        fault: OnceLock::new(),
    });
    let leave = Rc::new(Leave {
        connection: connection.clone(),
        leaving: Notify::new(),
        refused_from: Cell::new(None),
        next: Cell::new(0),
    });
    let shared = Rc::new(Shared::new(limits));
    shared.spawn_aside(speak(Rc::clone(&leave), link.most.bytes));
    let called = Cell::new(0u64);
    let take = |(send, receive): (SendStream, RecvStream)| {
        let id = u64::from(send.id());
        let sides = Arc::new(Sides::default());
        let mut reply = Reply::new(send, Arc::clone(&sides));
        let receive = Receive::new(receive, Arc::clone(&link), sides);
        leave.next.set(id + 4);
        if leave.refused_from.get().is_some_and(|first| id >= first) {
            // RFC 9114 section 5.2: the client may ask elsewhere, as if it had not asked here.
            receive.reject();
            return;
        }
        called.set(called.get() + 1);
        let conn = Rc::new(Conn::new(origin, drain.clone()));
        let stream = Rc::clone(&conn);
        let owner = Rc::clone(&shared);
        let (service, client) = (Rc::clone(service), Rc::clone(client));
        let mut unanswered = Unanswered::new(&frames);
        let task = pinned(|| async move {
            let Some((request, mut receive)) =
                read_head::<S>(&mut reply, receive, &client, &service, &limits).await
            else {
                return;
            };
            let ended = receive.has_ended();
            conn.request_arrived(!ended);
            let (parts, ()) = request.into_parts();
            // What a CONNECT brings after its head is the tunnel's.
            let (body, tunnel) = if parts.method == Method::CONNECT {
                receive.tunnel();
                (Incoming::empty(), Some(receive))
            } else {
                let expects = super::expects_continue(&parts.headers).then(|| Rc::clone(&conn));
                (Incoming::h3(receive, &parts.headers, expects), None)
            };
            let request = http::Request::from_parts(parts, body);
            let response = {
                let answer = pin!(service.call(&client, &conn, request));
                reply.answered(&conn, answer).await
            };
            let Some(response) = response else { return };
            let (head, body) = response.into_parts();
            let head = Response::from_parts(head, ());
            if let (Some(receive), Some(takeover)) = (tunnel, conn.take_takeover()) {
                reply.head(head, None);
                drop(body);
                unanswered.settle();
                let stream = Stream::Boxed(Box::new(Tunnel::new(reply, receive)));
                owner.spawn(None, takeover(stream, Bytes::new()));
                return;
            }
            let ends = body.is_end_stream();
            let length = body.size_hint().exact().filter(|_| !ends);
            if ends {
                unanswered.settle();
            }
            reply.head(head, length);
            let body = StreamBody::new(body, Rc::clone(&conn), unanswered);
            reply.pipe(body, &conn).await;
        });
        shared.spawn(Some(stream), task);
    };

    let mut requests = pin!(connection.accept_bi());
    let mut others = pin!(connection.accept_uni());
    let timer = pin!(sleep_until(began + TICK));
    let mut clock = Clock::new(timer);
    let mut drained = pin!(drain.started());
    let mut has_heard = false;
    // Since when the client has been told to go.
    let mut going: Option<Instant> = None;
    let mut below = 0;
    let critical = Rc::new(Critical::default());
    let mut tasks = FuturesUnordered::new();
    let stop = poll_fn(|cx| {
        loop {
            shared.run(&mut tasks, cx);
            let mut is_new = false;
            if let Poll::Ready(accepted) = requests.as_mut().poll(cx) {
                match accepted {
                    Ok(streams) => take(streams),
                    Err(error) => return Poll::Ready(Stop::Ended(error)),
                }
                requests.set(connection.accept_bi());
                (is_new, has_heard) = (true, true);
            }
            if let Poll::Ready(accepted) = others.as_mut().poll(cx) {
                match accepted {
                    Ok(stream) => {
                        shared.spawn_aside(listen(stream, Arc::clone(&link), Rc::clone(&critical)));
                    }
                    Err(error) => return Poll::Ready(Stop::Ended(error)),
                }
                others.set(connection.accept_uni());
                (is_new, has_heard) = (true, true);
            }
            frames.add(link.useful.swap(0, Relaxed), link.useless.swap(0, Relaxed));
            if let Some(flood) = frames.flood(0) {
                return Poll::Ready(Stop::Flood(flood));
            }
            if is_new || shared.has_new() {
                continue;
            }
            let is_full = limits.requests > 0 && called.get() >= limits.requests as u64;
            if going.is_none() && is_full {
                service.reached(Reached::Requests);
            }
            if going.is_none() && (is_full || drained.as_mut().poll(cx).is_ready()) {
                going = Some(Instant::now());
                leave.leaving.notify_one();
                continue;
            }
            let Some(now) = ready!(clock.poll(cx, &shared, &tasks)) else { continue };
            // Those of QUIC itself, which quinn answers and counts.
            let all = asked_for_nothing(&connection);
            frames.add(0, all - std::mem::replace(&mut below, all));
            if let Some(flood) = frames.flood(0) {
                return Poll::Ready(Stop::Flood(flood));
            }
            frames.tick(0);
            if going.is_some_and(|since| now - since >= GOING) && leave.refused_from.get().is_none()
            {
                // The client has no stream for us to tell it on.
                leave.refuse();
            }
            let Some(idle) = shared.idle(now) else { continue };
            match going {
                Some(since) if (now - since).min(idle) >= GOING => return Poll::Ready(Stop::Gone),
                Some(_) => {}
                None if !has_heard && idle >= limits.header_read => return Poll::Ready(Stop::Gone),
                None if idle >= limits.idle => {
                    service.reached(Reached::Idle);
                    going = Some(now);
                    leave.leaving.notify_one();
                }
                None => {}
            }
        }
    })
    .await;
    let refused = |fault, detail: &str| {
        let took = began.elapsed();
        let _ = service.refused(client, &Refusal { fault, head: &[], detail, took });
    };
    match stop {
        Stop::Flood(flood) => {
            connection.close(Code::ExcessiveLoad.into(), b"");
            let of_frames = flood == Flood::Frames;
            refused(if of_frames { ClientFault::Flood } else { ClientFault::Resets }, "");
        }
        Stop::Ended(error) => match link.fault.get() {
            Some((Code::ExcessiveLoad, _)) => refused(ClientFault::Flood, ""),
            Some((_, detail)) => refused(ClientFault::Malformed, detail),
            None => tracing::debug!(%error, "an HTTP/3 connection ended"),
        },
        Stop::Gone => connection.close(Code::NoError.into(), b""),
    }
    // What still runs is for nobody. Taken out first: a task that is dropped may look in here.
    let new = shared.take_new();
    drop((tasks, new));
}

/// How many frames of QUIC came that cost work and ask for nothing, by RFC 9000 section 21.9. Those
/// that say what is blocked are many in a fast upload.
fn asked_for_nothing(connection: &Connection) -> u64 {
    let came = connection.stats().frame_rx;
    came.ping + came.path_challenge + came.new_connection_id + came.retire_connection_id
}

/// Reads a request's head. `None`: there is none, and the client was told.
async fn read_head<S: Service>(
    reply: &mut Reply,
    mut receive: Receive,
    client: &S::Client,
    service: &S,
    limits: &Limits,
) -> Option<(http::Request<()>, Receive)> {
    let began = Instant::now();
    let read = async {
        let section = receive.head().await?;
        let fields = receive.fields(&section)?;
        head::request(fields).map_err(|what| receive.malformed(what))
    };
    let refused = |fault, detail: &str| {
        let took = began.elapsed();
        let _ = service.refused(client, &Refusal { fault, head: &[], detail, took });
    };
    let (fault, status, detail) = match timeout(limits.header_read, read).await {
        Ok(Ok(request)) => {
            let length = request.headers().contains_key(header::CONTENT_LENGTH);
            let likely = length || !matches!(*request.method(), Method::GET | Method::HEAD);
            receive.look_ahead(likely).await;
            return Some((request, receive));
        }
        Ok(Err(Broken::Malformed(what))) => {
            refused(ClientFault::Malformed, what);
            return None;
        }
        // Of the connection more is said when it ends.
        Ok(Err(Broken::Reset | Broken::Lost)) => return None,
        Ok(Err(Broken::TooLarge)) => {
            (ClientFault::HeadTooLarge, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "")
        }
        Err(_elapsed) => (ClientFault::HeadTimeout, StatusCode::REQUEST_TIMEOUT, ""),
    };
    refused(fault, detail);
    let mut head = Response::new(());
    *head.status_mut() = status;
    reply.only(head).await;
    None
}

/// Says what there is to say on our control stream.
async fn speak(leave: Rc<Leave>, section_bytes: usize) {
    let said = async {
        let mut control = leave.connection.open_uni().await.ok()?;
        control.write_all(&frames::greeting(section_bytes)).await.ok()?;
        leave.leaving.notified().await;
        // RFC 9114 section 5.2: first without a number, for the requests that are on their way.
        control.write_all(&frames::goaway(frames::NOTHING_YET)).await.ok()?;
        sleep(frames::grace(leave.connection.rtt())).await;
        control.write_all(&frames::goaway(leave.refuse())).await.ok()?;
        Some(control)
    };
    // RFC 9114 section 6.2.1: it ends with the connection.
    let _control = said.await;
    pending::<()>().await;
}

/// Which of the streams came that a client has once.
#[derive(Debug, Default)]
struct Critical {
    control: Cell<bool>,
    encoder: Cell<bool>,
    decoder: Cell<bool>,
}

/// Hears what a client says on a stream of one direction.
async fn listen(mut stream: RecvStream, link: Arc<Link>, critical: Rc<Critical>) {
    const CONTROL: u64 = 0;
    const PUSH: u64 = 1;
    const ENCODER: u64 = 2;
    const DECODER: u64 = 3;
    let mut said = Bytes::new();
    let mut kind = Integer::default();
    let kind = loop {
        while said.is_empty() {
            match more(&mut stream).await {
                Some(bytes) => said = bytes,
                // Section 6.2: it may end before it says what it is.
                None => return,
            }
        }
        if let Some(kind) = kind.push(said.get_u8()) {
            break kind;
        }
    };
    let seen = match kind {
        CONTROL => &critical.control,
        ENCODER => &critical.encoder,
        DECODER => &critical.decoder,
        PUSH => return link.fail(Code::StreamCreation, "a push stream from a client"),
        _ => {
            link.came(false);
            let _ = stream.stop(Code::StreamCreation.into());
            return;
        }
    };
    if seen.replace(true) {
        return link.fail(Code::StreamCreation, "a second stream of a kind that is unique");
    }
    let mut control = Control::default();
    loop {
        let heard = match kind {
            CONTROL => control.hear(&said, || link.came(false)),
            ENCODER => frames::hear_encoder(&said),
            // What it acknowledges we never refer to.
            _ => Ok(()),
        };
        if let Err(code) = heard {
            return link.fail(code, "not what belongs on that stream");
        }
        match more(&mut stream).await {
            Some(bytes) => said = bytes,
            None => return link.fail(Code::ClosedCritical, "a stream ended that may not"),
        }
    }
}

/// What comes next of a stream. `None`: it has ended.
async fn more(stream: &mut RecvStream) -> Option<Bytes> {
    Some(stream.read_chunk(4096, true).await.ok()??.bytes)
}
