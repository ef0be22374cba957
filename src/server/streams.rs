//! HTTP/2 below the service: h2's connection, and what carries one answer.
//!
//! hyper's server would do the same but for interim answers (1xx), which it has no words for: a
//! client that waits for `100 Continue` would wait for ever.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::SystemTime,
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    server::{Connection, Handshake, SendResponse},
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite};

use super::conn::Conn;

/// Interim answers to one request. More are dropped: no window bounds what waits of them.
const INTERIM: usize = 8;
/// Fields in an interim answer; one with more is dropped.
const FIELDS: usize = 64;

/// A connection, from its preface to its last frame.
pub(super) struct Streams<T> {
    state: State<T>,
    going: bool,
}

enum State<T> {
    Greeting(Handshake<T, Bytes>),
    Serving(Connection<T, Bytes>),
}

impl<T: AsyncRead + AsyncWrite + Unpin> Streams<T> {
    pub(super) fn new(handshake: Handshake<T, Bytes>) -> Self {
        Self { state: State::Greeting(handshake), going: false }
    }

    /// Takes no more requests, and says so (`GOAWAY`).
    pub(super) fn graceful_shutdown(&mut self) {
        self.going = true;
        if let State::Serving(connection) = &mut self.state {
            connection.graceful_shutdown();
        }
    }

    /// Drives all of its streams. Whoever `answers` a request does so elsewhere.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut answers: impl FnMut(Request<RecvStream>, SendResponse<Bytes>),
    ) -> Poll<Result<(), h2::Error>> {
        loop {
            match &mut self.state {
                State::Greeting(handshake) => {
                    let mut connection = ready!(Pin::new(handshake).poll(cx))?;
                    if self.going {
                        connection.graceful_shutdown();
                    }
                    self.state = State::Serving(connection);
                }
                State::Serving(connection) => match ready!(connection.poll_accept(cx)) {
                    Some(Ok((request, reply))) => answers(request, reply),
                    Some(Err(error)) => return Poll::Ready(Err(error)),
                    None => return Poll::Ready(Ok(())),
                },
            }
        }
    }
}

/// Waits for an answer, and sends the interim ones before it, which wake whoever polls this. `None`:
/// the client took its request back.
///
/// The future is where its caller has it: moved into this one, it would take its thousands of bytes
/// twice.
pub(super) async fn answered<F: Future>(
    reply: &mut SendResponse<Bytes>,
    conn: &Conn,
    mut answer: Pin<&mut F>,
) -> Option<F::Output> {
    let mut sent = 0;
    poll_fn(|cx| {
        // First: a request that its client took back in the same breath, or broke the rules of, never
        // gets as far as a node (CVE-2023-44487, CVE-2025-8671).
        if reply.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        let polled = answer.as_mut().poll(cx);
        // Where the stream is gone, the answer will find that out too.
        pass_interim(conn, &mut sent, |interim| drop(reply.send_informational(interim)));
        polled.map(Some)
    })
    .await
}

/// Passes on the interim answers that wait, if so many were not `sent` before.
pub(super) fn pass_interim(conn: &Conn, sent: &mut usize, mut send: impl FnMut(Response<()>)) {
    while conn.has_interim() {
        let interim = interim(&conn.take_interim());
        if let Some(interim) = interim.filter(|_| *sent < INTERIM) {
            *sent += 1;
            send(interim);
        }
    }
}

/// An interim answer as a node sent it, and as HTTP/2 has it.
fn interim(head: &[u8]) -> Option<Response<()>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut parsed = httparse::Response::new(&mut fields);
    parsed.parse(head).ok().filter(httparse::Status::is_complete)?;
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(parsed.code?).ok()?;
    for field in parsed.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        response.headers_mut().append(name, HeaderValue::from_bytes(field.value).ok()?);
    }
    strip(response.headers_mut());
    Some(response)
}

/// RFC 9113 section 8.2.2: nothing of the connection is said here.
fn is_of_the_connection(name: &HeaderName) -> bool {
    matches!(*name, header::CONNECTION | header::TE | header::TRANSFER_ENCODING | header::UPGRADE)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

/// Removes what is of the connection.
pub(super) fn strip(head: &mut HeaderMap) {
    while let Some(name) = head.keys().find(|name| is_of_the_connection(name)).cloned() {
        head.remove(name);
    }
}

/// Makes an answer's head one of HTTP/2 or HTTP/3, with its date, and its length if that is known.
pub(super) fn complete(fields: &mut HeaderMap, length: Option<u64>) {
    let (mut dated, mut sized, mut foreign) = (false, false, false);
    for name in fields.keys() {
        match *name {
            header::DATE => dated = true,
            header::CONTENT_LENGTH => sized = true,
            ref name => foreign |= is_of_the_connection(name),
        }
    }
    // Nearly never: a node's were left out before.
    if foreign {
        strip(fields);
    }
    // RFC 9110 section 6.6.1: whoever gets a message without one notes when it came.
    if !dated && let Ok(now) = HeaderValue::from_str(&httpdate::fmt_http_date(SystemTime::now())) {
        fields.insert(header::DATE, now);
    }
    if let Some(length) = length.filter(|_| !sized) {
        fields.insert(header::CONTENT_LENGTH, length.into());
    }
}

/// Sends an answer's head. `None`: the stream is gone.
pub(super) fn send_head(
    reply: &mut SendResponse<Bytes>,
    mut head: Response<()>,
    length: Option<u64>,
    ends: bool,
) -> Option<SendStream<Bytes>> {
    complete(head.headers_mut(), length);
    let sent = reply.send_response(head, ends);
    if sent.is_err() {
        reply.send_reset(Reason::INTERNAL_ERROR);
    }
    sent.ok()
}

/// Sends an answer's body at its client's pace, and watches whether the client still wants it. One
/// that breaks off resets the stream.
pub(super) async fn pipe<B>(mut body: B, mut stream: SendStream<Bytes>)
where
    B: Body<Data = Bytes> + Unpin,
{
    // What waits for the client's window, and whether it is the last.
    let mut waiting: Option<(Bytes, bool)> = None;
    let mut nobody = Context::from_waker(Waker::noop());
    // An error means that the stream is over, and there is nobody to tell.
    let sent = poll_fn(|cx| {
        // Nothing is read from the client before this is polled again. Room that is there at once
        // wakes whoever is noted, which would be the task that asks for it.
        if stream.poll_reset(&mut nobody)?.is_ready() {
            return Poll::Ready(Ok::<_, h2::Error>(()));
        }
        loop {
            if let Some((mut data, is_last)) = waiting.take() {
                let room = loop {
                    match stream.capacity() {
                        0 => match stream.poll_capacity(cx)? {
                            Poll::Ready(Some(_)) => {}
                            Poll::Ready(None) => return Poll::Ready(Ok(())),
                            Poll::Pending => {
                                waiting = Some((data, is_last));
                                return Poll::Pending;
                            }
                        },
                        room => break room,
                    }
                };
                if room < data.len() {
                    // No more than there is room for: with the rest in h2's hands the next frame
                    // would be read from the node.
                    stream.send_data(data.split_to(room), false)?;
                    stream.reserve_capacity(data.len());
                    waiting = Some((data, is_last));
                    continue;
                }
                stream.send_data(data, is_last)?;
                if is_last {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            // The frame first, then room for it: what is reserved is taken from other streams.
            let Poll::Ready(frame) = Pin::new(&mut body).poll_frame(cx) else {
                return stream.poll_reset(cx).map_ok(drop);
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let is_last = body.is_end_stream();
                        if data.is_empty() {
                            stream.send_data(data, is_last)?;
                            if is_last {
                                return Poll::Ready(Ok(()));
                            }
                        } else {
                            stream.reserve_capacity(data.len());
                            waiting = Some((data, is_last));
                        }
                    }
                    Err(frame) => {
                        let Ok(trailers) = frame.into_trailers() else { continue };
                        stream.reserve_capacity(0);
                        stream.send_trailers(trailers)?;
                        return Poll::Ready(Ok(()));
                    }
                },
                Some(Err(_)) => {
                    stream.send_reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(Ok(()));
                }
                None => {
                    stream.send_data(Bytes::new(), true)?;
                    return Poll::Ready(Ok(()));
                }
            }
        }
    })
    .await;
    if let Err(error) = sent {
        tracing::debug!(%error, "an HTTP/2 answer ends early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interim_answer_says_nothing_of_the_connection() {
        let head = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nlink: </b>\r\nkeep-alive: 1\r\n\r\n";
        let interim = interim(head).unwrap();
        assert_eq!(interim.status(), 103);
        assert_eq!(interim.headers().len(), 2);
        assert!(super::interim(b"HTTP/1.1 103 Early").is_none());
    }
}
