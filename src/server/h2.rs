//! One client connection that speaks HTTP/2.
//!
//! h2 does the framing. Each stream has a [`Conn`] of its own; another `Conn`, the *link*, notes what
//! happens on the socket they share. [`super::tasks`] runs what answers them, and [`Frames`] watches
//! what the client sends for floods.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use h2::{RecvStream, server::SendResponse};
use http::Method;
use http_body::Body as _;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep_until},
};

use super::{
    ClientFault, Incoming, Limits, Origin, Reached, Refusal, Service,
    conn::{Conn, TICK, linger},
    drain,
    frames::{Calm, Flood, Frames},
    io::ClientIo,
    pinned,
    streams::{Streams, answered, pipe, send_head},
    tasks::{Clock, GOING, Shared, StreamBody, Unanswered},
};
use crate::net::{Stream, Tunnel};

/// What a client may send on one stream ahead of what is asked for. The connection's window has
/// room for all streams at once: with less, bodies of requests that wait their turn would keep out
/// those of the requests that they wait for.
pub(super) const STREAM_WINDOW: u32 = 128 << 10;
/// The most of one response that waits in memory for a client's window or socket.
const SEND_BUFFER: usize = 64 << 10;

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
        let task = pinned(|| async move {
            let (parts, body) = request.into_parts();
            // What a CONNECT brings after its head is the tunnel's.
            let (body, tunnel) = if parts.method == Method::CONNECT {
                (Incoming::empty(), Some(body))
            } else if has_body {
                let expects = super::expects_continue(&parts.headers);
                let expects = expects.then(|| Rc::clone(&conn));
                (Incoming::h2(body, &parts.headers, expects), None)
            } else {
                (Incoming::empty(), None)
            };
            let request = http::Request::from_parts(parts, body);
            let response = {
                // Boxed: thousands of bytes that are not needed any more while the answer is sent.
                let mut answer = pinned(|| service.call(&client, &conn, request));
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
    let timer = pin!(sleep_until(began + TICK));
    let mut clock = Clock::new(timer);
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
        let was_full = shared.was_full();
        let missing = frames.begun().saturating_sub(called.get());
        let more = missing.saturating_sub(unseen.get());
        if more > 0 && was_full {
            service.reached(Reached::Streams(more));
        } else if more > 0 {
            refused(ClientFault::Malformed, "a head that HTTP/2 does not allow");
        }
        unseen.set(unseen.get() + more);
    };
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
            let Some(now) = ready!(clock.poll(cx, &shared, &tasks)) else { continue };
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
