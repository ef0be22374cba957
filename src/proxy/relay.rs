//! The answer on its way to the client: a node's, frame by frame, or one of litegate's own.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{account::Account, attempt::Connected, turn::Turn};
use crate::{
    config::listener::Http3,
    decide::{Problem, outcome::WriteOutcome, strict},
    server::Abort,
};

/// A response body as the client's connection sends it. Boxed: it is moved many times on its way
/// to the socket.
#[derive(Debug)]
pub struct ResponseBody(Box<Inner>);

#[derive(Debug)]
struct Inner {
    source: Source,
    account: Account,
}

#[derive(Debug)]
enum Source {
    /// An answer of litegate's own.
    Own(Option<Bytes>),
    /// A node's.
    Node(NodeBody),
}

/// A node's response body, with the connection that it comes over.
#[derive(Debug)]
struct NodeBody {
    incoming: Incoming,
    connected: Connected,
    /// `timeouts.idle`
    idle: Duration,
    progress: Instant,
    /// The client learns the end of the body from the end of the connection.
    ends_with_connection: bool,
    turn: Turn,
    /// It has broken off, and is to be aborted with the next poll.
    broken: bool,
}

impl ResponseBody {
    /// An answer of litegate's own.
    pub fn own(body: Bytes, account: Account) -> Self {
        let source = Source::Own(Some(body).filter(|body| !body.is_empty()));
        Self(Box::new(Inner { source, account })).begun()
    }

    /// What the node sends, over the connection on which its head came at `arrived`.
    pub(super) fn node(
        incoming: Incoming,
        connected: Connected,
        idle: Duration,
        ends_with_connection: bool,
        arrived: Instant,
        account: Account,
    ) -> Self {
        let progress = arrived;
        if !incoming.is_end_stream() {
            // The first byte too may never come.
            account.conn().set_deadline(Some(arrived + idle));
        }
        let turn = Turn::default();
        let broken = false;
        let body =
            NodeBody { incoming, connected, idle, progress, ends_with_connection, turn, broken };
        Self(Box::new(Inner { source: Source::Node(body), account })).begun()
    }

    fn begun(self) -> Self {
        if self.is_end_stream() {
            self.0.account.completed();
        }
        self
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Abort;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Abort>>> {
        let inner = &mut *self.get_mut().0;
        let polled = match &mut inner.source {
            Source::Own(body) => Poll::Ready(body.take().map(|body| Ok(Frame::data(body)))),
            Source::Node(node) => node.poll_frame(cx, &inner.account),
        };
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                inner.account.sent(frame.data_ref().map_or(0, Bytes::len));
            }
            Poll::Ready(Some(Err(Abort))) => inner.account.broke_off(),
            Poll::Ready(None) | Poll::Pending => {}
        }
        if inner.source.is_end() {
            inner.account.completed();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.source.is_end()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0.source {
            Source::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, |b| b.len() as u64)),
            Source::Node(node) => node.incoming.size_hint(),
        }
    }
}

impl Source {
    fn is_end(&self) -> bool {
        match self {
            Self::Own(body) => body.is_none(),
            Self::Node(node) => node.incoming.is_end_stream(),
        }
    }
}

impl NodeBody {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        account: &Account,
    ) -> Poll<Option<Result<Frame<Bytes>, Abort>>> {
        ready!(self.turn.poll_mine(cx));
        if self.broken {
            return Poll::Ready(Some(Err(self.abort(account))));
        }
        let mut polled = self.connected.poll_frame(&mut self.incoming, cx);
        if polled.is_pending() {
            // Asking for a frame made hyper want one; now it may read.
            self.connected.poll(cx);
            polled = self.connected.poll_frame(&mut self.incoming, cx);
        }
        let mut frame = match polled {
            Poll::Ready(frame) => frame,
            Poll::Pending => return self.poll_idle(account),
        };
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            strict::trailers(trailers);
        }
        let over = match &frame {
            Some(Ok(frame)) => {
                self.turn.moved(frame.data_ref().map_or(0, Bytes::len));
                self.incoming.is_end_stream()
            }
            // One turn later: what waits to be written is thrown away with the connection or stream,
            // and a client that got nothing on a connection that it has used before may take it for
            // closed while idle, and send the request again, a write too.
            Some(Err(_)) => {
                self.broken = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            None => true,
        };
        if over {
            self.connected.finish(self.progress);
        } else {
            self.progress = Instant::now();
            account.conn().set_deadline(Some(self.progress + self.idle));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|_broken| Abort)))
    }

    /// Gives up when the node has sent nothing for too long.
    fn poll_idle(&mut self, account: &Account) -> Poll<Option<Result<Frame<Bytes>, Abort>>> {
        let conn = account.conn();
        if conn.deadline_passed() {
            let now = Instant::now();
            if now >= self.progress + self.idle {
                return Poll::Ready(Some(Err(self.abort(account))));
            }
            conn.set_deadline(Some(self.progress + self.idle));
        }
        Poll::Pending
    }

    fn abort(&self, account: &Account) -> Abort {
        if self.ends_with_connection {
            account.conn().must_reset();
        }
        Abort
    }
}

/// How an answer of litegate's own is made for this client.
#[derive(Debug)]
pub struct Own<'a> {
    /// What is wrong.
    pub problem: Problem,
    /// What happened, for whoever reads the answer; nothing that only operators should know.
    pub detail: Option<&'a str>,
    /// Whether the client is a browser.
    pub html: bool,
    /// What became of a write that was sent.
    pub outcome: Option<WriteOutcome>,
    /// This instance, for `Proxy-Status`.
    pub instance: &'a str,
    /// Whether the connection ends with this answer.
    pub close: bool,
}

/// What a client is told of HTTP/3 (RFC 7838). `None`: nothing. `here`: the port that it came to.
pub fn alternative(http3: &Http3, here: u16) -> Option<HeaderValue> {
    let port = http3.port.unwrap_or(here);
    let age = http3.alt_svc?.as_secs();
    HeaderValue::try_from(format!("h3=\":{port}\"; ma={age}")).ok()
}

/// Whether the client would rather read HTML: it accepts it by name.
pub fn prefers_html(head: &HeaderMap) -> bool {
    head.get_all(header::ACCEPT)
        .iter()
        .any(|accept| accept.as_bytes().windows(9).any(|w| w.eq_ignore_ascii_case(b"text/html")))
}

impl Own<'_> {
    /// Head and body.
    pub fn render(&self) -> (Response<()>, Bytes) {
        let problem = self.problem;
        let body = if self.html { self.page() } else { self.json() };
        let mut response = Response::new(());
        *response.status_mut() = problem.status();
        let head = response.headers_mut();
        let kind = if self.html { "text/html; charset=utf-8" } else { "application/problem+json" };
        head.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        head.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let status = match self.detail {
            Some(detail) => format!(
                "{}; error={}; details=\"{}\"",
                self.instance,
                problem.proxy_status(),
                quotable(detail)
            ),
            None => format!("{}; error={}", self.instance, problem.proxy_status()),
        };
        if let Ok(status) = HeaderValue::from_str(&status) {
            head.insert("proxy-status", status);
        }
        if let Some(seconds) = problem.retry_after() {
            head.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.close || problem.closes() {
            head.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        head.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        (response, body)
    }

    /// What it means for the client: where more is known of a write than its problem says, that.
    fn meaning(&self) -> &'static str {
        match self.outcome {
            Some(WriteOutcome::NotCommitted) => {
                "The app failed after it got this request, which has changed nothing and never \
                 will: it can be sent again."
            }
            Some(WriteOutcome::Unknown) | None => self.problem.detail(),
        }
    }

    fn json(&self) -> Bytes {
        let problem = self.problem;
        let mut body = serde_json::json!({
            "type": format!("urn:litegate:problem:{}", problem.as_str()),
            "title": problem.title(),
            "status": problem.status().as_u16(),
            "detail": self.meaning(),
            "error": problem.as_str(),
            "fault": problem.fault().as_str(),
        });
        if let Some(seconds) = problem.retry_after() {
            body["retry_after"] = seconds.into();
        }
        if let Some(outcome) = self.outcome {
            body["write_outcome"] = outcome.as_str().into();
        }
        let mut body = body.to_string().into_bytes();
        body.push(b'\n');
        body.into()
    }

    fn page(&self) -> Bytes {
        let problem = self.problem;
        // Every text here is a constant, of the table in `decide/problem.rs`: nothing to escape.
        format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
             content=\"width=device-width\"><title>{status} {title}</title><style>body{{font:\
             1.1rem/1.5 system-ui,sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem;\
             color-scheme:light dark}}small{{opacity:.7}}</style><h1>{title}</h1><p>{detail}</p>\
             <p><small>{status} · {fault} · {word} · litegate</small></p></html>\n",
            status = problem.status().as_u16(),
            title = problem.title(),
            detail = self.meaning(),
            fault = problem.fault().sentence(),
            word = problem.as_str(),
        )
        .into()
    }
}

/// What can stand in a quoted string of a structured field (RFC 8941 section 3.3.3).
fn quotable(text: &str) -> String {
    text.chars().filter(|c| (' '..='~').contains(c) && *c != '"' && *c != '\\').collect()
}
