//! Nodes that answer before they have the whole request, and clients that make something of it:
//! what is left of the body is nobody's request, and no answer is anybody else's.

use std::{
    convert::Infallible,
    fmt::Write as _,
    future::poll_fn,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all, stream};
use http::{Request, Response, StatusCode};
use http_body_util::{StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use litegate::testkit::{Cluster, Options, client::Conn};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::timeout,
};

use super::{IMPATIENCE, PATIENCE, is_clean, judge, naive};
use crate::{
    gate::Gate,
    h2::{over, whole},
};

/// A body that looks like a request: 40 bytes.
const INNER: &str = "GET /smuggled HTTP/1.1\r\nhost: aaaaaa\r\n\r\n";
const NEXT: &str = "GET /next HTTP/1.1\r\nhost: a\r\n\r\n";

/// What a node does behind its answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Then {
    /// Takes what comes next for requests, as if there were no body.
    Ignores,
    /// Reads the body, and goes on.
    Drains,
    /// Sends no more, and reads to the end.
    Closes,
    /// Resets the connection.
    Resets,
}

/// A request whose answer comes as soon as its head is there.
#[derive(Clone, Debug)]
pub(super) struct Talk {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    /// The head, without the last empty line.
    head: &'static str,
    /// What comes with the head.
    first: &'static str,
    /// What the client sends when it has the answer.
    rest: &'static str,
    /// What the node sends.
    says: &'static str,
    then: Then,
    /// What the client gets.
    status: u16,
    body: &'static str,
    /// What came is the whole body: the connection may carry another request.
    whole: bool,
    harmless: super::rows::Harmless,
}

impl Talk {
    /// What becomes of it, for a person.
    pub(super) fn becomes(&self) -> &'static str {
        if self.whole {
            "the answer alone; whoever asks next gets their own, or a closed connection"
        } else {
            "the answer alone, closed"
        }
    }
}

/// The node's word on the upload in each row.
macro_rules! early {
    ($status:literal, $fields:literal) => {
        concat!("HTTP/1.1 ", $status, "\r\n", $fields, "content-length: 5\r\n\r\nearly")
    };
}

pub(super) fn talks() -> Vec<Talk> {
    const POST: &str = "POST /evil HTTP/1.1\r\nhost: a\r\ncontent-length: 40\r\n";
    const CHUNKED: &str = "POST /evil HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n";
    const EXPECTS: &str =
        "POST /evil HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 40\r\n";
    const INNER_CHUNK: &str = "28\r\nGET /smuggled HTTP/1.1\r\nhost: aaaaaa\r\n\r\n\r\n";
    const CL0: &str = "RFC 9112 9.3, Browser-Powered Desync Attacks (2022)";
    const REST: &str = "RFC 9112 9.3, 9.6";
    const EXPECT: &str = "RFC 9110 10.1.1, HTTP/1.1 Must Die (2025)";
    let row = |name, why, says, then| Talk {
        name,
        why,
        head: POST,
        first: INNER,
        rest: "",
        says,
        then,
        status: 413,
        body: "early",
        whole: true,
        harmless: None,
    };
    let too_large = early!("413 Content Too Large", "");
    let drained = "it sends no more than the node reads";
    vec![
        // The whole body came with the head.
        row("413, and the body is taken for a request", CL0, too_large, Then::Ignores),
        Talk {
            status: 302,
            ..row(
                "a redirect, and the body is taken for a request",
                CL0,
                early!("302 Found", "location: /\r\n"),
                Then::Ignores,
            )
        },
        Talk {
            status: 200,
            ..row("200, and the body is taken for a request", CL0, early!("200 OK", ""), Then::Ignores)
        },
        Talk {
            head: CHUNKED,
            first: "28\r\nGET /smuggled HTTP/1.1\r\nhost: aaaaaa\r\n\r\n\r\n0\r\n\r\n",
            ..row("413, and chunks are taken for requests", CL0, too_large, Then::Ignores)
        },
        row("413, and the body is read", REST, too_large, Then::Drains).harmless(drained),
        // The rest comes when the answer is there.
        Talk {
            first: "",
            rest: INNER,
            ..row("413, then the body comes and is taken for a request", CL0, too_large, Then::Ignores)
        },
        Talk {
            first: "GET /smuggled",
            rest: " HTTP/1.1\r\nhost: aaaaaa\r\n\r\n",
            ..row("413, then the rest of the body comes", REST, too_large, Then::Drains)
        },
        Talk {
            head: CHUNKED,
            first: INNER_CHUNK,
            rest: "0\r\n\r\n",
            ..row("413, then the last chunk comes", REST, too_large, Then::Drains)
        },
        Talk {
            first: "",
            rest: INNER,
            ..row("413 and a close, then the body comes", REST, early!("413 Content Too Large", "connection: close\r\n"), Then::Closes)
        },
        Talk {
            first: "",
            rest: INNER,
            ..row("413 and a reset, then the body comes", REST, too_large, Then::Resets)
        },
        // It never comes: the client's next request stands where the body should.
        Talk {
            first: "",
            whole: false,
            ..row("413, and a request in place of the body", REST, too_large, Then::Ignores)
        },
        Talk {
            first: "GET",
            whole: false,
            ..row("413, and a request in place of the rest of the body", REST, too_large, Then::Drains)
        },
        Talk {
            head: CHUNKED,
            first: INNER_CHUNK,
            whole: false,
            ..row("413, and a request in place of the next chunk", REST, too_large, Then::Drains)
        },
        Talk {
            first: "",
            whole: false,
            ..row("413 and a close, and a request in place of the body", REST, early!("413 Content Too Large", "connection: close\r\n"), Then::Closes)
        },
        // Expectations.
        Talk {
            head: EXPECTS,
            first: "",
            whole: false,
            ..row("0.CL: an expectation refused, and a request in place of the body", EXPECT, early!("417 Expectation Failed", ""), Then::Ignores)
        }
        .gets(417, "early"),
        Talk {
            head: EXPECTS,
            first: "",
            whole: false,
            ..row("0.CL: an expectation overlooked, and a request in place of the body", EXPECT, early!("200 OK", ""), Then::Ignores)
        }
        .gets(200, "early"),
        Talk {
            head: EXPECTS,
            first: "",
            rest: INNER,
            ..row("an expectation refused, and the body comes all the same", EXPECT, early!("417 Expectation Failed", ""), Then::Ignores)
        }
        .gets(417, "early"),
        Talk {
            head: EXPECTS,
            ..row("the body does not wait for the expectation", EXPECT, early!("417 Expectation Failed", ""), Then::Ignores)
        }
        .gets(417, "early"),
        Talk {
            head: EXPECTS,
            first: "",
            rest: INNER,
            ..row("100 Continue, and at once an answer", EXPECT, concat!("HTTP/1.1 100 Continue\r\n\r\n", early!("413 Content Too Large", "")), Then::Ignores)
        },
        Talk {
            head: EXPECTS,
            first: "",
            whole: false,
            ..row("100 Continue and an answer, and a request in place of the body", EXPECT, concat!("HTTP/1.1 100 Continue\r\n\r\n", early!("413 Content Too Large", "")), Then::Ignores)
        },
        Talk {
            head: "HEAD /evil HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 40\r\n",
            first: "",
            rest: INNER,
            ..row("HEAD with a body that is expected", EXPECT, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", Then::Ignores)
        }
        .gets(200, ""),
        Talk {
            head: "GET /evil HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 40\r\n",
            first: "",
            whole: false,
            ..row("GET with a body that never comes", EXPECT, early!("200 OK", ""), Then::Ignores)
        }
        .gets(200, "early"),
        // Other answers that end early.
        row("204 before the body", "RFC 9110 15.3.5, RFC 9112 9.3", "HTTP/1.1 204 No Content\r\n\r\n", Then::Ignores)
            .gets(204, ""),
        row("304 before the body, with a length", "RFC 9110 15.4.5, RFC 9112 9.3", "HTTP/1.1 304 Not Modified\r\ncontent-length: 40\r\n\r\n", Then::Ignores)
            .gets(304, ""),
        row("interim answers before the body", "RFC 9110 15.2", concat!("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n", early!("413 Content Too Large", "")), Then::Ignores),
    ]
}

impl Talk {
    fn gets(self, status: u16, body: &'static str) -> Self {
        Self { status, body, ..self }
    }

    fn harmless(self, why: &'static str) -> Self {
        Self { harmless: Some(why), ..self }
    }
}

/// Answers `/evil` as its row says, and all others `clean`, but for what is smuggled.
#[derive(Clone)]
struct Node {
    address: SocketAddr,
    says: Arc<Mutex<(&'static str, Then)>>,
    /// The targets of each connection.
    came: Arc<Mutex<Vec<Vec<String>>>>,
}

impl Node {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("bound");
        let says = Arc::new(Mutex::new(("", Then::Closes)));
        let node = Self { address, says, came: Arc::default() };
        let this = node.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let place = {
                    let mut came = this.came.lock().expect("nobody panics");
                    came.push(Vec::new());
                    came.len() - 1
                };
                let this = this.clone();
                tokio::spawn(async move { this.serve(stream, place).await });
            }
        });
        node
    }

    async fn serve(&self, mut stream: TcpStream, place: usize) -> Option<()> {
        let mut ahead = Vec::new();
        loop {
            let head = until(&mut stream, &mut ahead, b"\r\n\r\n").await?;
            let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
            let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
            self.came.lock().expect("nobody panics")[place].push(target.clone());
            let (says, then) = *self.says.lock().expect("nobody panics");
            let is_evil = target == "/evil";
            let says = match &*target {
                "/evil" => says,
                "/after" | "/next" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nclean",
                _ => "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison",
            };
            stream.write_all(says.as_bytes()).await.ok()?;
            match then {
                _ if !is_evil => {}
                Then::Ignores => {}
                Then::Drains if head.contains("chunked") => {
                    until(&mut stream, &mut ahead, b"\r\n0\r\n\r\n").await?;
                }
                Then::Drains => {
                    while ahead.len() < INNER.len() {
                        more(&mut stream, &mut ahead).await?;
                    }
                    ahead.drain(..INNER.len());
                }
                Then::Closes => {
                    stream.shutdown().await.ok()?;
                    while more(&mut stream, &mut ahead).await.is_some() {}
                }
                Then::Resets => {
                    let _ = stream.set_zero_linger();
                    return None;
                }
            }
        }
    }

    /// Whether a connection carried another's request behind what was smuggled.
    fn mixes(&self) -> Option<String> {
        let came = std::mem::take(&mut *self.came.lock().expect("nobody panics"));
        let behind = |targets: &Vec<String>| {
            let bad = |target: &String| !["/evil", "/after", "/next"].contains(&&**target);
            let at = targets.iter().position(bad);
            at.is_some_and(|at| targets.iter().skip(at).any(|target| !bad(target)))
        };
        // Connections of earlier rows may go on: their places stay.
        *self.came.lock().expect("nobody panics") = vec![Vec::new(); came.len()];
        came.iter().any(behind).then(|| format!("one connection carried {came:?}"))
    }
}

async fn more(stream: &mut TcpStream, ahead: &mut Vec<u8>) -> Option<()> {
    let mut buffer = [0; 4096];
    let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
    ahead.extend_from_slice(&buffer[..n]);
    Some(())
}

async fn until(stream: &mut TcpStream, ahead: &mut Vec<u8>, end: &[u8]) -> Option<Vec<u8>> {
    loop {
        if let Some(at) = ahead.windows(end.len()).position(|window| window == end) {
            return Some(ahead.drain(..at + end.len()).collect());
        }
        more(stream, ahead).await?;
    }
}

async fn check(
    row: &Talk,
    node: &Node,
    through: SocketAddr,
    patience: Duration,
) -> Result<(), String> {
    *node.says.lock().expect("nobody panics") = (row.says, row.then);
    let talked = timeout(patience, talk(row, through)).await;
    talked.unwrap_or_else(|_elapsed| Err("it hangs".to_owned()))?;
    for _ in 0..3 {
        is_clean(through, patience).await?;
    }
    node.mixes().map_or(Ok(()), Err)
}

/// What the client of a row sees.
async fn talk(row: &Talk, through: SocketAddr) -> Result<(), String> {
    let broken = |error: std::io::Error| format!("no answer: {error}");
    let mut conn = Conn::open(through).await.map_err(broken)?;
    conn.send(format!("{}\r\n{}", row.head, row.first)).await.map_err(broken)?;
    let answer = conn.response(row.head.starts_with("HEAD")).await.map_err(broken)?;
    let is_right = answer.status == row.status && answer.complete;
    if !is_right || answer.body != row.body.as_bytes() {
        return Err(format!("it got {answer:?}"));
    }
    // The connection may be closed at any time now.
    let _ = conn.send(row.rest).await;
    let _ = conn.send(NEXT).await;
    match conn.response(false).await {
        Err(_closed) => Ok(()),
        Ok(next) if row.whole && next.body == b"clean" => Ok(()),
        // A node of HTTP/2 may go on to wait for the body, but nobody waits for long.
        Ok(next) if !row.whole && next.status == 408 => Ok(()),
        Ok(next) => Err(format!("what follows got {next:?}")),
    }
}

async fn gate(nodes: &[SocketAddr], more: &str) -> Gate {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let nodes = nodes.iter().zip(["a", "b"]);
    let nodes = nodes.map(|(node, name)| format!("{{ name = \"{name}\", address = \"{node}\" }}"));
    let text = format!(
        "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
         \"127.0.0.1:0\"\n[limits]\nheader_read = \"500ms\"\n[access_log]\nformat = \
         \"off\"\n[cluster.app]\nport = 1\nmembers = {{ type = \"static\", nodes = [{}] }}\nprimary = \
         {{ type = \"instance\", name = \"a\" }}\nhealth = {{ eject_after = 100000 }}\nreads = \
         \"primary\"\n{more}",
        nodes.collect::<Vec<_>>().join(", "),
    );
    let gate = Gate::before(cluster, &text);
    gate.until(|topology| topology.primary.is_some()).await;
    gate
}

#[tokio::test]
async fn early_answers_are_nobody_elses() {
    let node = Node::start().await;
    let gate = gate(&[node.address], "").await;
    let mut faults = String::new();
    for row in talks() {
        if let Err(fault) = check(&row, &node, gate.address(), PATIENCE).await {
            let _ = writeln!(faults, "{}: {fault}", row.name);
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

#[tokio::test]
async fn early_answers_are_others_with_a_naive_forwarder() {
    let tries = talks().into_iter().map(|row| async move {
        let node = Node::start().await;
        let through = naive::start(node.address).await;
        let fault = check(&row, &node, through, IMPATIENCE).await.err();
        (row.name, row.harmless, fault)
    });
    judge(join_all(tries).await);
}

/// A request over HTTP/2 whose body goes on when `rest` is told to.
fn by_h2(row: &Talk, rest: oneshot::Receiver<()>) -> Request<crate::h2::Sent> {
    let is_chunked = row.head.contains("chunked");
    let data = |bytes: &'static str| {
        Ok::<_, Infallible>(Frame::data(Bytes::from_static(bytes.as_bytes())))
    };
    let first = if is_chunked { INNER } else { row.first };
    let (later, whole) = (if is_chunked { "" } else { row.rest }, row.whole);
    let body = stream::iter([data(first)]).chain(stream::once(async move {
        let _ = rest.await;
        if !whole {
            std::future::pending::<()>().await;
        }
        data(later)
    }));
    let method = row.head.split(' ').next().unwrap_or_default();
    let mut request = Request::builder().method(method).uri("http://a/evil");
    if !is_chunked {
        request = request.header("content-length", INNER.len());
    }
    if row.head.contains("expect") {
        request = request.header("expect", "100-continue");
    }
    request.body(BoxBody::new(StreamBody::new(body))).expect("a request")
}

async fn talk_h2(row: &Talk, through: SocketAddr) -> Result<(), String> {
    let mut sender = over(TcpStream::connect(through).await.expect("it listens")).await;
    let (go_on, rest) = oneshot::channel();
    let answer = sender.send_request(by_h2(row, rest)).await;
    let (status, body) = whole(answer.map_err(|error| error.to_string())?).await;
    if status.as_u16() != row.status || body != row.body {
        return Err(format!("it got {status} {body:?}"));
    }
    let _ = go_on.send(());
    // The streams beside it are not concerned.
    let next = whole(crate::h2::send(&mut sender, crate::h2::get("/next")).await).await;
    if next == (StatusCode::OK, Bytes::from_static(b"clean")) {
        Ok(())
    } else {
        Err(format!("what follows got {next:?}"))
    }
}

#[tokio::test]
async fn early_answers_to_clients_of_http2_are_nobody_elses() {
    let node = Node::start().await;
    let gate = gate(&[node.address], "").await;
    let mut faults = String::new();
    for row in talks() {
        *node.says.lock().expect("nobody panics") = (row.says, row.then);
        let talked = timeout(PATIENCE, talk_h2(&row, gate.address())).await;
        let mut fault = talked.unwrap_or_else(|_elapsed| Err("it hangs".to_owned()));
        for _ in 0..3 {
            fault = fault.and(is_clean(gate.address(), PATIENCE).await);
        }
        if let Err(fault) = fault.and(node.mixes().map_or(Ok(()), Err)) {
            let _ = writeln!(faults, "{}: {fault}", row.name);
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

/// A node that speaks HTTP/2 and answers `/evil` so, with as much of a body as that has.
async fn node_h2(status: Arc<Mutex<(u16, &'static str, Then)>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let status = Arc::clone(&status);
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(socket).await else { return };
                while let Some(Ok((request, mut reply))) = connection.accept().await {
                    let is_evil = request.uri().path() == "/evil";
                    let is_known = matches!(request.uri().path(), "/after" | "/next");
                    let (status, body, then) = *status.lock().expect("nobody panics");
                    let (status, body) = match is_evil {
                        true => (status, body),
                        false if is_known => (200, "clean"),
                        false => (200, "poison"),
                    };
                    let head = Response::builder().status(status).body(()).expect("a head");
                    let Ok(mut send) = reply.send_response(head, body.is_empty()) else { continue };
                    if !body.is_empty() {
                        let _ = send.send_data(Bytes::from_static(body.as_bytes()), true);
                    }
                    let mut body = request.into_body();
                    tokio::spawn(async move {
                        if is_evil && then == Then::Drains {
                            while let Some(Ok(data)) = body.data().await {
                                let _ = body.flow_control().release_capacity(data.len());
                            }
                        }
                        // Else the stream is reset, for nobody will read it.
                        drop(body);
                    });
                }
                let _ = poll_fn(|cx| connection.poll_closed(cx)).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn early_answers_of_nodes_of_http2_are_nobody_elses() {
    let says = Arc::new(Mutex::new((200, "", Then::Drains)));
    let node = node_h2(Arc::clone(&says)).await;
    let gate = gate(&[node], "upstream = { protocol = \"h2\" }").await;
    let mut faults = String::new();
    for row in talks() {
        *says.lock().expect("nobody panics") = (row.status, row.body, row.then);
        for h2 in [false, true] {
            let talked = async {
                if h2 {
                    talk_h2(&row, gate.address()).await
                } else {
                    talk(&row, gate.address()).await
                }
            };
            let talked = timeout(PATIENCE, talked).await;
            let mut fault = talked.unwrap_or_else(|_elapsed| Err("it hangs".to_owned()));
            for _ in 0..3 {
                fault = fault.and(is_clean(gate.address(), PATIENCE).await);
            }
            if let Err(fault) = fault {
                let _ = writeln!(faults, "{} (HTTP/2: {h2}): {fault}", row.name);
            }
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

/// A replica that replays without having read the body: it goes whole to where it should, and nothing
/// more goes to the replica on that connection.
#[tokio::test]
async fn a_body_that_is_replayed_early_leaves_nothing_behind() {
    let (first, second) = (Node::start().await, super::node::Node::start().await);
    let mut faults = String::new();
    for then in [Then::Ignores, Then::Drains, Then::Closes] {
        for (head, body) in [
            ("content-length: 40\r\n", INNER.to_owned()),
            ("transfer-encoding: chunked\r\n", format!("28\r\n{INNER}\r\n0\r\n\r\n")),
        ] {
            // A replay is evidence of who is primary: the next one would need none.
            let gate = gate(&[first.address, second.address], "").await;
            let replay = "HTTP/1.1 200 OK\r\nfly-replay: instance=b\r\ncontent-length: 0\r\n\r\n";
            *first.says.lock().expect("nobody panics") = (replay, then);
            let mut conn = gate.conn().await;
            let request = format!("POST /evil HTTP/1.1\r\nhost: a\r\n{head}\r\n{body}{NEXT}");
            conn.send(request).await.expect("litegate reads");
            second.take();
            second.says(super::node::Script {
                bytes: b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
                ..super::node::Script::default()
            });
            let answer = timeout(PATIENCE, conn.response(false)).await;
            let is_right =
                answer.is_ok_and(|answer| answer.is_ok_and(|answer| answer.body == b"ok"));
            let next = timeout(PATIENCE, conn.response(false)).await;
            let is_next = next.is_ok_and(|next| next.is_ok_and(|next| next.body == b"clean"));
            let came = second.take().requests;
            let evil = came.iter().find(|request| request.starts_with("POST /evil"));
            let is_whole = evil.is_some_and(|evil| {
                evil.contains("fly-replay-src") && evil.ends_with(&format!("|| {INNER}"))
            });
            let mixed = first.mixes();
            if !(is_right && is_next && is_whole && mixed.is_none()) {
                let _ =
                    writeln!(faults, "{then:?} {head:?}: {is_right} {is_next} {came:?} {mixed:?}");
            }
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

/// What is read ahead while a write waits for a primary is its body, and what follows is not.
#[tokio::test]
async fn a_body_that_is_held_is_no_request() {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\nhold = { timeout = \"20s\" }";
    let gate = Gate::with(Options::default(), keys).await;
    gate.cluster.kill(0);
    gate.until(|topology| topology.primary.is_none()).await;
    let chunks = format!("28\r\n{INNER}\r\n0\r\n\r\n");
    let mut held = Vec::new();
    for (n, (framing, body)) in
        [("content-length: 40", INNER), ("transfer-encoding: chunked", &*chunks)]
            .into_iter()
            .enumerate()
    {
        let mut conn = gate.conn().await;
        let head = format!("POST /kv/{n} HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n");
        let next = "GET /whoami HTTP/1.1\r\nhost: a\r\n\r\n";
        conn.send([&head, body, next].concat()).await.expect("litegate reads");
        held.push(conn);
    }
    crate::h2::until(&gate, "litegate_held_requests", "", |n| n == 2).await;
    gate.cluster.promote(1);
    for (n, mut conn) in held.into_iter().enumerate() {
        let written = timeout(PATIENCE, conn.response(false)).await.expect("in time");
        assert_eq!(written.expect("an answer").status, 200);
        let next = timeout(PATIENCE, conn.response(false)).await.expect("in time");
        assert!(next.expect("an answer").text().starts_with("app-"), "the one behind it");
        assert_eq!(gate.cluster.written(&n.to_string()).on.len(), 1);
        let of_primary = "litegate-consistency: primary\r\n";
        let read = conn.request("GET", &format!("/kv/{n}"), of_primary, b"").await;
        let read = read.expect("an answer").text();
        assert!(read.contains("GET /smuggled"), "{read}");
    }
}
