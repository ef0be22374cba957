//! Server-sent events: each is delivered at once, they may be silent, and they end.
//!
//! The node sends what a test hands it, and a test hands it the next event once it has received the
//! one before: an event that waits anywhere for more bytes is never received.

use std::{any::Any, net::SocketAddr, time::Duration};

use bytes::Bytes;
use futures_util::{future::join_all, stream};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    client, server,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use litegate::{app::Ended, testkit::Cluster};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::{
    gate::Gate,
    tls::{Authority, BOTH, connect},
};

const SOON: Duration = Duration::from_secs(10);
const EVENTS: &str = "text/event-stream";

/// The other end of one response of the node's. Dropping it ends the body.
type Feed = mpsc::Sender<Bytes>;

/// A node that answers every request with a body that is fed, of the type that the query names.
struct Node {
    address: SocketAddr,
    feeds: mpsc::Receiver<Feed>,
}

impl Node {
    async fn start(h2: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        let (opened, feeds) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                socket.set_nodelay(true).expect("connected");
                let (io, opened) = (TokioIo::new(socket), opened.clone());
                let service = service_fn(move |request| {
                    let response = answer(&request, &opened);
                    async { Ok::<_, std::convert::Infallible>(response) }
                });
                if h2 {
                    let serve = server::conn::http2::Builder::new(TokioExecutor::new());
                    tokio::spawn(serve.serve_connection(io, service));
                } else {
                    let serve = server::conn::http1::Builder::new();
                    tokio::spawn(serve.serve_connection(io, service));
                }
            }
        });
        Self { address, feeds }
    }

    async fn feed(&mut self) -> Feed {
        timeout(SOON, self.feeds.recv()).await.expect("in time").expect("the node runs")
    }
}

type Fed = std::pin::Pin<
    Box<dyn futures_util::Stream<Item = Result<Frame<Bytes>, std::convert::Infallible>> + Send>,
>;

fn answer(request: &Request<Incoming>, opened: &mpsc::Sender<Feed>) -> Response<StreamBody<Fed>> {
    let (feed, fed) = mpsc::channel(4);
    // The test may be over.
    let _ = opened.try_send(feed);
    let frames = stream::unfold(fed, |mut fed| async {
        let event = fed.recv().await?;
        Some((Ok(Frame::data(event)), fed))
    });
    let kind = request.uri().query().unwrap_or(EVENTS).to_owned();
    let frames: Fed = Box::pin(frames);
    let response = Response::builder().header("content-type", kind);
    response.header("cache-control", "no-store").body(StreamBody::new(frames)).expect("a head")
}

/// How a client comes, and how the node is spoken to.
#[derive(Clone, Copy, Debug)]
struct Way {
    tls: bool,
    h2: bool,
    node_h2: bool,
}

fn ways() -> impl Iterator<Item = Way> {
    (0..8).map(|n| Way { tls: n & 1 > 0, h2: n & 2 > 0, node_h2: n & 4 > 0 })
}

/// Nearly all of it is waiting.
async fn at_once<T>(cases: impl Iterator<Item = T>, test: impl AsyncFn(T)) {
    join_all(cases.map(|case| test(case))).await;
}

/// A gate before a node, and what its clients need.
struct Stand {
    node: Node,
    gate: Gate,
    authority: Authority,
    way: Way,
}

impl Stand {
    async fn start(way: Way, drain: &str, timeouts: &str) -> Self {
        let (node, authority) = (Node::start(way.node_h2).await, Authority::new());
        let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
        let tls = format!("tls = {{ certificates = [{pair}] }}");
        let text = format!(
            r#"[server]
workers = 1
drain = {{ timeout = "{drain}" }}
[[listener]]
address = "127.0.0.1:0"
{tls}
[admin]
address = "off"
[access_log]
format = "off"
[limits]
body_idle = "400ms"
[cluster.app]
port = 1
upstream = {{ protocol = "{protocol}" }}
timeouts = {{ {timeouts} }}
members = {{ type = "static", nodes = [{{ name = "a", address = "{address}" }}] }}
primary = {{ type = "instance", name = "a" }}
"#,
            tls = if way.tls { &tls } else { "" },
            protocol = if way.node_h2 { "h2" } else { "http/1.1" },
            address = node.address,
        );
        Self { node, gate: Gate::before(Cluster::empty(), &text), authority, way }
    }

    /// Asks, and returns both ends of the answer.
    async fn open(&mut self, kind: &str) -> (Feed, Events) {
        let opened = if self.way.tls {
            let alpn = if self.way.h2 { "h2" } else { "http/1.1" };
            let config = self.authority.client(BOTH, None, &[alpn]);
            let stream = connect(&self.gate, &config, "a.test").await.expect("a session");
            tokio::spawn(ask(stream, self.way.h2, kind.to_owned()))
        } else {
            let stream = TcpStream::connect(self.gate.address()).await.expect("it listens");
            tokio::spawn(ask(stream, self.way.h2, kind.to_owned()))
        };
        // The head comes before there is any event.
        let events = timeout(SOON, opened).await.expect("in time").expect("a head");
        (self.node.feed().await, events)
    }
}

async fn ask(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    h2: bool,
    kind: String,
) -> Events {
    let request = Request::builder().uri(format!("http://a.test/events?{kind}"));
    let request = request.header("host", "a.test").body(Empty::<Bytes>::new()).expect("a request");
    let io = TokioIo::new(io);
    let (response, sender): (_, Box<dyn Any + Send>) = if h2 {
        let shaken = client::conn::http2::handshake(TokioExecutor::new(), io).await;
        let (mut sender, driver) = shaken.expect("no I/O yet");
        tokio::spawn(driver);
        (sender.send_request(request).await, Box::new(sender))
    } else {
        let (mut sender, driver) = client::conn::http1::handshake(io).await.expect("no I/O yet");
        tokio::spawn(driver);
        (sender.send_request(request).await, Box::new(sender))
    };
    let response = response.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], *kind);
    Events { body: response.into_body(), _sender: sender }
}

/// What a client receives.
struct Events {
    body: Incoming,
    _sender: Box<dyn Any + Send>,
}

impl Events {
    /// What comes next: data, `None` at the proper end, or an error where it was cut off.
    async fn next(&mut self) -> Result<Option<Bytes>, hyper::Error> {
        loop {
            let frame = timeout(SOON, self.body.frame()).await.expect("in time");
            let data = frame.transpose()?.map(|frame| frame.into_data().expect("no trailers"));
            // HTTP/2 may say the end in a frame of its own.
            if data.as_ref().is_none_or(|data| !data.is_empty()) {
                return Ok(data);
            }
        }
    }

    /// Receives exactly this.
    async fn receive(&mut self, want: &[u8]) {
        let mut came = Vec::new();
        while came.len() < want.len() {
            came.extend(self.next().await.expect("it goes on").expect("it goes on"));
        }
        assert_eq!(came, want);
    }
}

async fn deliver(feed: &Feed, events: &mut Events, event: impl Into<Bytes>) {
    let event = event.into();
    feed.send(event.clone()).await.expect("somebody listens");
    events.receive(&event).await;
}

#[tokio::test]
async fn each_event_is_delivered_before_the_next_is_sent() {
    at_once(ways(), async |way| {
        let mut stand = Stand::start(way, "1s", "").await;
        let (feed, mut events) = stand.open(EVENTS).await;
        for n in 0..20 {
            deliver(&feed, &mut events, format!("id: {n}\ndata: {n}\n\n")).await;
            deliver(&feed, &mut events, ":\n\n").await;
            deliver(&feed, &mut events, format!("data: {}\n\n", "x".repeat(n * 997))).await;
        }
        // Not even a line is waited for.
        for byte in b"event: a\r\ndata: b\r\n\r\n" {
            deliver(&feed, &mut events, vec![*byte]).await;
        }
        drop(feed);
        assert_eq!(events.next().await.expect("a proper end"), None, "{way:?}");
    })
    .await;
}

#[tokio::test]
async fn a_stream_of_events_may_be_silent_for_longer_than_other_bodies() {
    const SILENCE: Duration = Duration::from_millis(900);
    at_once(ways(), async |way| {
        let timeouts = r#"idle = "300ms", stream_idle = "4s""#;
        let mut stand = Stand::start(way, "1s", timeouts).await;
        let (feed, mut events) = stand.open("Text/Event-Stream;charset=utf-8").await;
        let (other, mut cut) = stand.open("text/plain").await;
        tokio::time::sleep(SILENCE).await;
        assert!(cut.next().await.is_err(), "{way:?}: what is no stream of events is cut off");
        timeout(SOON, other.closed()).await.expect("and the node hears of it");

        let began = Instant::now();
        deliver(&feed, &mut events, "data: late\n\n").await;
        assert!(events.next().await.is_err(), "{way:?}: the end must not look proper");
        assert!(began.elapsed() >= Duration::from_secs(4), "{way:?}");
        timeout(SOON, feed.closed()).await.expect("and the node hears of it");
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_a_silent_stream_is_noticed() {
    at_once(ways(), async |way| {
        let mut stand = Stand::start(way, "1s", "").await;
        let (feed, mut events) = stand.open(EVENTS).await;
        deliver(&feed, &mut events, "data: 1\n\n").await;
        drop(events);
        timeout(SOON, feed.closed()).await.unwrap_or_else(|_| panic!("{way:?}: never"));
    })
    .await;
}

#[tokio::test]
async fn a_drain_lets_streams_go_on_and_then_cuts_them_off() {
    let cases = ways().flat_map(|way| [(way, true), (way, false)]);
    at_once(cases, async |(way, ends)| {
        // The one that does not end is cut off, the other has time.
        let drain = if ends { "20s" } else { "3s" };
        let mut stand = Stand::start(way, drain, "").await;
        let (feed, mut events) = stand.open(EVENTS).await;
        deliver(&feed, &mut events, "data: before\n\n").await;
        let Stand { gate, .. } = stand;
        let (_cluster, running) = gate.into_running();
        let began = Instant::now();
        running.drain();
        for n in 0..5 {
            deliver(&feed, &mut events, format!("data: {n}\n\n")).await;
        }
        let want = if ends {
            drop(feed);
            assert_eq!(events.next().await.expect("a proper end"), None, "{way:?}");
            Ended::Drained
        } else {
            assert!(events.next().await.is_err(), "{way:?}: the end must not look proper");
            assert!(began.elapsed() >= Duration::from_secs(3), "{way:?}: it has its time");
            timeout(SOON, feed.closed()).await.expect("and the node hears of it");
            Ended::Cut
        };
        drop(events);
        let join = tokio::task::spawn_blocking(move || running.join());
        let ended = timeout(SOON, join).await.expect("in time").expect("it ends");
        assert_eq!(ended, want, "{way:?}");
    })
    .await;
}
