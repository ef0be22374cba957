//! HTTP/3 to clients: over QUIC beside TCP, with the client of the `h3` crate where it can say what
//! is to be said, and with bare frames where it can't.

use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, Request, Response, StatusCode};
use litegate::testkit::Cluster;
use quinn::{ClientConfig, Connection, Endpoint, VarInt, crypto::rustls::QuicClientConfig};
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, sleep, timeout},
};

use crate::{
    aborts::{HEARD, Saw, heard, node},
    gate::Gate,
    h2::until,
    tls::{Authority, listening},
};

const REACHED: &str = "litegate_limits_reached_total";
const SOON: Duration = Duration::from_secs(10);

type Stream = h3::client::RequestStream<h3_quinn::BidiStream<Bytes>, Bytes>;

/// A gate with HTTP/3, and who signs its certificate.
struct Quic {
    gate: Gate,
    authority: Authority,
}

impl Quic {
    async fn start() -> Self {
        Self::edited("", |text| text).await
    }

    async fn edited(keys: &str, edit: impl FnOnce(String) -> String) -> Self {
        let authority = Authority::new();
        let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
        let keys = format!("http3 = true\ntls = {{ certificates = [{pair}]{keys} }}");
        Self { gate: listening(&keys, edit).await, authority }
    }

    async fn connect(&self) -> Connection {
        dial(self.gate.address(), &self.authority, None).await.expect("a connection")
    }

    async fn client(&self) -> Client {
        Client::over(self.connect().await).await
    }
}

/// Connects, with a certificate of this name.
async fn dial(
    to: SocketAddr,
    authority: &Authority,
    own: Option<&str>,
) -> Result<Connection, quinn::ConnectionError> {
    let tls = authority.client(&[&rustls::version::TLS13], own, &["h3"]);
    let crypto = QuicClientConfig::try_from(tls).expect("it is TLS 1.3");
    let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
    let connecting =
        endpoint.connect_with(ClientConfig::new(Arc::new(crypto)), to, "a.test").expect("a name");
    timeout(SOON, connecting).await.expect("in time")
}

/// The `h3` crate's.
struct Client {
    sender: h3::client::SendRequest<h3_quinn::OpenStreams, Bytes>,
    _driver: tokio::task::JoinHandle<h3::error::ConnectionError>,
}

impl Client {
    async fn over(connection: Connection) -> Self {
        let connection = h3_quinn::Connection::new(connection);
        let (mut driver, sender) = h3::client::new(connection).await.expect("no I/O yet");
        let driver = tokio::spawn(async move { poll_fn(|cx| driver.poll_close(cx)).await });
        Self { sender, _driver: driver }
    }

    async fn begin(&mut self, request: Request<()>) -> Stream {
        let begun = timeout(SOON, self.sender.send_request(request)).await.expect("in time");
        begun.expect("it goes out")
    }

    async fn send(&mut self, request: Request<()>, body: &[u8]) -> (Response<()>, Bytes) {
        let mut stream = self.begin(request).await;
        for part in body.chunks(50_000) {
            stream.send_data(Bytes::copy_from_slice(part)).await.expect("it goes out");
        }
        stream.finish().await.expect("it goes out");
        answer(&mut stream).await
    }

    async fn get(&mut self, target: &str) -> (StatusCode, Bytes) {
        let (head, body) = self.send(ask("GET", target), b"").await;
        (head.status(), body)
    }
}

fn ask(method: &str, target: &str) -> Request<()> {
    let uri = format!("https://a.test{target}");
    Request::builder().method(method).uri(uri).body(()).expect("a request")
}

async fn answer(stream: &mut Stream) -> (Response<()>, Bytes) {
    let head = timeout(SOON, stream.recv_response()).await.expect("in time").expect("an answer");
    let mut body = Vec::new();
    while let Some(data) = timeout(SOON, stream.recv_data()).await.expect("in time").expect("whole")
    {
        body.extend_from_slice(data.chunk());
    }
    (head, body.into())
}

/// Every value of a field of the request that the app saw.
fn seen(echo: &Bytes, name: &str) -> Vec<String> {
    let echo: Value = serde_json::from_slice(echo).expect("an echo");
    let fields = echo["fields"].as_array().expect("a list").iter();
    fields.filter(|f| f[0] == name).filter_map(|f| f[1].as_str()).map(str::to_owned).collect()
}

#[tokio::test]
async fn requests_pass_with_their_bodies_and_fields() {
    let quic = Quic::start().await;
    let mut client = quic.client().await;
    let mut request = ask("GET", "/echo/a%2Fb?x=%00");
    for crumb in ["a=1", "b=2"] {
        request.headers_mut().append("cookie", crumb.parse().expect("a value"));
    }
    let (head, echo) = client.send(request, b"").await;
    assert_eq!(head.status(), 200);
    assert!(head.headers().contains_key("date"));
    assert_eq!(head.headers().get("alt-svc"), None, "it is there already");
    assert_eq!(seen(&echo, "host"), ["a.test"]);
    assert_eq!(seen(&echo, "cookie"), ["a=1; b=2"]);
    assert_eq!(seen(&echo, "x-forwarded-proto"), ["https"]);
    assert_eq!(
        serde_json::from_slice::<Value>(&echo).expect("an echo")["target"],
        "/echo/a%2Fb?x=%00"
    );

    let body = vec![7; 3_000_000];
    let (head, echo) = client.send(ask("POST", "/echo"), &body).await;
    assert_eq!(head.status(), 200);
    let echo: Value = serde_json::from_slice(&echo).expect("an echo");
    assert_eq!((&echo["length"], &echo["sum"]), (&3_000_000.into(), &21_000_000.into()));

    let (status, body) = client.get("/bytes/3000000").await;
    assert_eq!((status.as_u16(), body.len()), (200, 3_000_000));
    let (head, body) = client.send(ask("HEAD", "/bytes/1000"), b"").await;
    assert_eq!((head.status().as_u16(), body.len()), (200, 0));
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let quic = Quic::start().await;
    let mut client = quic.client().await;
    let mut stream = client.begin(ask("GET", "/trailers")).await;
    stream.finish().await.expect("it goes out");
    let (_, body) = answer(&mut stream).await;
    assert_eq!(body, "hello");
    let trailers = stream.recv_trailers().await.expect("whole").expect("they pass");
    assert_eq!(trailers["x-sum"], "5");

    let mut stream = client.begin(ask("POST", "/echo")).await;
    stream.send_data("abcdefg".into()).await.expect("it goes out");
    let mut trailers = HeaderMap::new();
    trailers.insert("x-more", "1".parse().expect("a value"));
    stream.send_trailers(trailers).await.expect("they go out");
    stream.finish().await.expect("it goes out");
    let (_, echo) = answer(&mut stream).await;
    assert_eq!(serde_json::from_slice::<Value>(&echo).expect("an echo")["length"], 7);
}

#[tokio::test]
async fn writes_run_on_the_primary_and_many_requests_share_a_connection() {
    let quic = Quic::start().await;
    let mut client = quic.client().await;
    let mut streams = Vec::new();
    for n in 0..60 {
        let mut stream = client.begin(ask("POST", &format!("/kv/a{n}"))).await;
        stream.send_data(vec![b'x'; n * 5000].into()).await.expect("it goes out");
        stream.finish().await.expect("it goes out");
        streams.push(stream);
    }
    for mut stream in streams {
        assert_eq!(answer(&mut stream).await.0.status(), 200);
    }
    let ledger = quic.gate.cluster.ledger();
    assert_eq!(ledger.values().filter(|written| written.on.len() == 1).count(), 60);
    let (_, node) = client.get("/kv/a1").await;
    assert_eq!(serde_json::from_slice::<Value>(&node).expect("it reads")["count"], 1, "its own");
}

/// Frames as they go over the wire.
mod wire {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;

    pub(super) fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("it is short") | 0x8000_0000;
        [&[kind][..], &length.to_be_bytes(), payload].concat()
    }

    /// A section of literal fields.
    pub(super) fn section(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut section = vec![0, 0];
        let put = |section: &mut Vec<u8>, flags: u8, mask: usize, text: &str| {
            let flags = flags | u8::try_from(text.len().min(mask)).expect("masked");
            section.push(flags);
            if let Some(mut rest) = text.len().checked_sub(mask) {
                while rest >= 0x80 {
                    section.push(u8::try_from(rest & 0x7f).expect("masked") | 0x80);
                    rest >>= 7;
                }
                section.push(u8::try_from(rest).expect("below 128"));
            }
            section.extend_from_slice(text.as_bytes());
        };
        for (name, value) in fields {
            put(&mut section, 0x20, 7, name);
            put(&mut section, 0, 127, value);
        }
        section
    }

    pub(super) fn head(fields: &[(&str, &str)]) -> Vec<u8> {
        frame(HEADERS, &section(fields))
    }

    /// Types and payloads.
    pub(super) fn frames(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let integer = |bytes: &mut &[u8]| {
            let length = 1 << (bytes[0] >> 6);
            let (integer, rest) = bytes.split_at(length);
            *bytes = rest;
            integer.iter().skip(1).fold(u64::from(integer[0] & 0x3f), |n, b| n << 8 | u64::from(*b))
        };
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let kind = integer(&mut bytes);
            let length = usize::try_from(integer(&mut bytes)).expect("it is short");
            let (payload, rest) = bytes.split_at(length);
            frames.push((kind, payload.to_vec()));
            bytes = rest;
        }
        frames
    }

    /// The status, as litegate encodes it.
    pub(super) fn status(section: &[u8]) -> u16 {
        match section[2..] {
            [0xd8, ..] => 103,
            [0xd9, ..] => 200,
            [0xda, ..] => 304,
            [0xdb, ..] => 404,
            [0xdc, ..] => 503,
            [0xff, 0, ..] => 100,
            [0xff, 1, ..] => 204,
            [0xff, 2, ..] => 206,
            [0xff, 4, ..] => 400,
            [0xff, 5, ..] => 403,
            [0x5f, 9, 3, a, b, c, ..] => {
                std::str::from_utf8(&[a, b, c]).expect("digits").parse().expect("a number")
            }
            ref other => panic!("no status: {other:x?}"),
        }
    }
}

const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "https"), (":authority", "a.test"), (":path", "/echo")];
const POST: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "https"), (":authority", "a.test"), (":path", "/echo")];

/// Sends these bytes and the end of the request. How it was answered: the statuses, or an error.
async fn bare(connection: &Connection, bytes: &[u8]) -> Result<Vec<u16>, quinn::ReadToEndError> {
    let (mut send, mut receive) = connection.open_bi().await.expect("a stream");
    // What is refused early may be stopped.
    let _ = send.write_all(bytes).await;
    let _ = send.finish();
    let read = timeout(SOON, receive.read_to_end(1 << 20)).await.expect("in time")?;
    let frames = wire::frames(&read);
    let sections = frames.iter().filter(|(kind, _)| *kind == 1);
    Ok(sections.map(|(_, section)| wire::status(section)).collect())
}

/// Opens what every client opens, so that the connection is one of HTTP/3.
async fn greet(connection: &Connection) -> quinn::SendStream {
    let mut control = connection.open_uni().await.expect("a stream");
    control.write_all(&[0, 4, 0]).await.expect("it goes out");
    control
}

#[tokio::test]
async fn interim_answers_and_expectations_are_sent() {
    let quic = Quic::start().await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let mut hints = GET;
    hints[3].1 = "/hints";
    let answer = bare(&connection, &wire::head(&hints)).await.expect("an answer");
    assert_eq!(answer, [103, 200]);

    let fields = [&POST[..], &[("expect", "100-continue"), ("content-length", "5")]].concat();
    let (mut send, mut receive) = connection.open_bi().await.expect("a stream");
    send.write_all(&wire::head(&fields)).await.expect("it goes out");
    let first = timeout(SOON, receive.read_chunk(4096, true)).await.expect("in time");
    let first = first.expect("it goes on").expect("an interim answer").bytes;
    assert_eq!(wire::status(&wire::frames(&first)[0].1), 100);
    send.write_all(&wire::frame(wire::DATA, b"hello")).await.expect("it goes out");
    send.finish().expect("it goes out");
    let rest = timeout(SOON, receive.read_to_end(1 << 20)).await.expect("in time").expect("whole");
    assert_eq!(wire::status(&wire::frames(&rest)[0].1), 200);
}

#[tokio::test]
async fn what_http3_forbids_is_refused() {
    use wire::{DATA, HEADERS, frame, head};
    const MESSAGE: u64 = 0x10e;
    let quic = Quic::start().await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let [method, scheme, authority, path] = GET;
    let with = |more: &[(&str, &str)]| head(&[&GET[..], more].concat());
    let posted = |more: &[(&str, &str)], body: &[u8]| {
        [head(&[&POST[..], more].concat()), body.to_vec()].concat()
    };
    let many: Vec<_> = (0..120).map(|_| ("x", "1")).collect();
    let far_too_many: Vec<_> = (0..1200).map(|_| ("x", "1")).collect();
    let (long, large, huge) = ("/".repeat(5000), "x".repeat(17_000), "x".repeat(40_000));
    // What is answered, and what ends the request's stream alone.
    for (what, bytes, want) in [
        ("a request", with(&[]), Ok(200)),
        (
            "frames of no meaning",
            [frame(0x21, b"grease"), with(&[]), frame(0x21, b"")].concat(),
            Ok(200),
        ),
        ("a body", posted(&[("content-length", "5")], &frame(DATA, b"hello")), Ok(200)),
        (
            "an empty frame within",
            posted(&[], &[frame(DATA, b"a"), frame(DATA, b""), frame(DATA, b"b")].concat()),
            Ok(200),
        ),
        ("trailers", posted(&[], &[frame(DATA, b"a"), head(&[("x", "1")])].concat()), Ok(200)),
        ("Host alone", head(&[method, scheme, path, ("host", "a.test")]), Ok(200)),
        ("Host and authority that agree", with(&[("host", "A.test")]), Ok(200)),
        ("Host and authority that differ", with(&[("host", "b.test")]), Ok(400)),
        ("no host at all", head(&[method, scheme, path]), Ok(400)),
        ("another scheme", head(&[method, (":scheme", "ftp"), authority, path]), Ok(400)),
        (
            "a user in the authority",
            head(&[method, scheme, (":authority", "u@a.test"), path]),
            Ok(400),
        ),
        ("a name in quotation marks", with(&[("a\"b", "1")]), Ok(400)),
        (
            "two lengths",
            posted(&[("content-length", "5"), ("content-length", "6")], &frame(DATA, b"hello")),
            Ok(400),
        ),
        ("an odd length", posted(&[("content-length", "+5")], &frame(DATA, b"hello")), Ok(400)),
        ("CONNECT", head(&[(":method", "CONNECT"), (":authority", "a.test:80")]), Ok(405)),
        ("many fields", with(&many), Ok(431)),
        ("far too many", with(&far_too_many), Ok(431)),
        ("a large field", with(&[("x", &large)]), Ok(431)),
        ("a huge field", with(&[("x", &huge)]), Ok(431)),
        ("a long target", head(&[method, scheme, authority, (":path", &long)]), Ok(414)),
        (
            "a body longer than it says",
            posted(&[("content-length", "3")], &frame(DATA, b"hello")),
            Err(MESSAGE),
        ),
        ("a shorter one", posted(&[("content-length", "9")], &frame(DATA, b"hello")), Err(MESSAGE)),
        ("none of a length", posted(&[("content-length", "9")], b""), Err(MESSAGE)),
        (
            "a pseudo field in trailers",
            posted(&[], &[frame(DATA, b"a"), head(&[(":path", "/")])].concat()),
            Err(MESSAGE),
        ),
        ("nothing", Vec::new(), Err(0x10d)),
        ("an empty head", frame(HEADERS, &[0, 0]), Err(MESSAGE)),
        ("upper case", with(&[("A", "b")]), Err(MESSAGE)),
        ("a line end in a value", with(&[("a", "b\r\nc: d")]), Err(MESSAGE)),
        ("a field of the connection", with(&[("connection", "close")]), Err(MESSAGE)),
        ("a transfer coding", with(&[("transfer-encoding", "chunked")]), Err(MESSAGE)),
        ("two methods", head(&[method, method, scheme, authority, path]), Err(MESSAGE)),
        ("two paths", head(&[method, scheme, authority, path, path]), Err(MESSAGE)),
        ("a late pseudo field", head(&[method, scheme, authority, ("a", "b"), path]), Err(MESSAGE)),
        ("a status", with(&[(":status", "200")]), Err(MESSAGE)),
        ("no path", head(&[method, scheme, authority]), Err(MESSAGE)),
        ("no scheme", head(&[method, authority, path]), Err(MESSAGE)),
    ] {
        let answer = bare(&connection, &bytes).await;
        match (answer, want) {
            (Ok(statuses), Ok(status)) => assert_eq!(statuses, [status], "{what}"),
            (Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(code))), Err(want)) => {
                assert_eq!(code.into_inner(), want, "{what}");
            }
            (other, want) => panic!("{what}: {other:?} instead of {want:?}"),
        }
    }
    // What ends the connection.
    let whole = with(&[]);
    for (what, bytes, want) in [
        ("data before the head", frame(DATA, b"a"), 0x105),
        ("a second end", [posted(&[], &head(&[("a", "b")])), head(&[("a", "b")])].concat(), 0x105),
        (
            "data behind trailers",
            [posted(&[], &head(&[("a", "b")])), frame(DATA, b"a")].concat(),
            0x105,
        ),
        ("SETTINGS", [&frame(4, b"")[..], &whole].concat(), 0x105),
        ("a push", [&frame(5, b"\0")[..], &whole].concat(), 0x105),
        ("PING of HTTP/2", [&frame(6, b"12345678")[..], &whole].concat(), 0x105),
        ("half a frame", whole[..whole.len() - 1].to_vec(), 0x106),
        ("half a body", posted(&[], &frame(DATA, b"hello")[..8]), 0x106),
        ("a dynamic table", frame(HEADERS, b"\x02\x00\x80"), 0x200),
        ("an unknown entry", frame(HEADERS, b"\x00\x00\xff\x7f"), 0x200),
        ("a bad string", frame(HEADERS, b"\x00\x00\x50\x85\xff\xff\xff\xff\xff"), 0x200),
    ] {
        let connection = quic.connect().await;
        let _control = greet(&connection).await;
        let _ = bare(&connection, &bytes).await;
        closed(&connection, what, want).await;
    }
    for (what, streams, want) in [
        ("no SETTINGS", &[&[0, 7, 1, 0][..]][..], 0x10a),
        ("SETTINGS twice", &[&[0, 4, 0, 4, 0]], 0x105),
        ("SETTINGS of HTTP/2", &[&[0, 4, 2, 2, 0]], 0x109),
        ("two control streams", &[&[0, 4, 0], &[0, 4, 0]], 0x103),
        ("a push stream", &[&[1, 0]], 0x103),
        ("an entry for the table", &[&[2, 0x41, b'a', 1, b'b']], 0x201),
    ] {
        let connection = quic.connect().await;
        let mut open = Vec::new();
        for bytes in streams {
            let mut stream = connection.open_uni().await.expect("a stream");
            stream.write_all(bytes).await.expect("it goes out");
            open.push(stream);
        }
        closed(&connection, what, want).await;
    }
    let connection = quic.connect().await;
    greet(&connection).await.finish().expect("it goes out");
    closed(&connection, "a control stream that ends", 0x104).await;
    assert!(quic.gate.metric("litegate_problems_total", "malformed").await > 0);
    assert_eq!(bare(&quic.connect().await, &whole).await.expect("an answer"), [200], "it goes on");
}

/// Waits until the connection was ended with this code.
async fn closed(connection: &Connection, what: &str, want: u64) {
    let error = timeout(SOON, connection.closed()).await.unwrap_or_else(|_| panic!("{what}: open"));
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert_eq!(close.error_code, VarInt::from_u64(want).expect("a code"), "{what}");
        }
        other => panic!("{what}: {other}"),
    }
}

/// A gate with HTTP/3 before a node of one's own.
async fn before(node: SocketAddr, limits: &str) -> Quic {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let text = format!(
        "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\nhttp3 = true\n\
         tls = {{ certificates = [{pair}] }}\n[admin]\naddress = \"127.0.0.1:0\"\n[access_log]\n\
         format = \"off\"\n[limits]\n{limits}\n[cluster.app]\nport = 1\nmembers = {{ type = \
         \"static\", nodes = [{{ name = \"a\", address = \"{node}\" }}] }}\nprimary = {{ type = \
         \"instance\", name = \"a\" }}\n"
    );
    let gate = Gate::before(Cluster::empty(), &text);
    gate.until(|topology| topology.primary.is_some()).await;
    Quic { gate, authority }
}

// The node sends without end: on one thread it would keep the client from hearing anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_reaches_the_node_and_frees_everything() {
    let (address, mut node) = node().await;
    let quic = before(address, "").await;
    for gone in [false, true] {
        for (method, path) in [("GET", "/wait"), ("GET", "/stream"), ("POST", "/upload")] {
            let what = format!("{path} {gone}");
            let connection = quic.connect().await;
            let _control = greet(&connection).await;
            let (mut send, mut receive) = connection.open_bi().await.expect("a stream");
            let fields = [(":method", method), GET[1], GET[2], (":path", path)];
            send.write_all(&wire::head(&fields)).await.expect("it goes out");
            if method == "POST" {
                let some = wire::frame(wire::DATA, &[b'x'; 1000]);
                send.write_all(&some).await.expect("it goes out");
            } else {
                send.finish().expect("it goes out");
            }
            assert_eq!(heard(&mut node, SOON, &what).await, Saw::Began, "{what}");
            if path == "/stream" {
                let read = receive.read_chunk(10, true);
                timeout(SOON, read).await.expect("in time").expect("it begins");
            }
            if gone {
                connection.close(0x100u32.into(), b"");
            } else {
                let _ = send.reset(0x10cu32.into());
                receive.stop(0x10cu32.into()).expect("it was open");
            }
            assert_eq!(heard(&mut node, HEARD, &what).await, Saw::Aborted, "{what}");
            until(&quic.gate, "litegate_http_requests_in_flight", "", |n| n == 0).await;
            until(&quic.gate, "litegate_replay_buffer_bytes", "", |n| n == 0).await;
        }
    }
    until(&quic.gate, "litegate_downstream_connections", "", |n| n <= 3).await;
}

#[tokio::test]
async fn a_broken_answer_does_not_look_complete() {
    let quic = Quic::start().await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    for fault in ["/fault/half", "/fault/chunk"] {
        let mut fields = GET;
        fields[3].1 = fault;
        let broken = bare(&connection, &wire::head(&fields)).await;
        let want = quinn::ReadError::Reset(0x102u32.into());
        assert_eq!(broken, Err(quinn::ReadToEndError::Read(want)), "{fault}");
    }
    assert_eq!(bare(&connection, &wire::head(&GET)).await.expect("an answer"), [200], "it goes on");
}

/// A node that sends without end, or takes nothing, and counts what went.
async fn endless() -> (SocketAddr, Arc<AtomicU64>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let (address, sent) = (listener.local_addr().expect("bound"), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&sent);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let counted = Arc::clone(&counted);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(socket.read_u8().await.expect("a head"));
                }
                if head.starts_with(b"POST") {
                    return std::future::pending().await;
                }
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
                socket.write_all(answer).await.expect("it reads");
                let part = vec![b'x'; 1 << 16];
                while socket.write_all(&part).await.is_ok() {
                    counted.fetch_add(1 << 16, Ordering::Relaxed);
                }
            });
        }
    });
    (address, sent)
}

/// Until a count has stood still for a moment.
async fn stands(count: impl Fn() -> u64) -> u64 {
    let (mut last, mut since) = (count(), Instant::now());
    let deadline = Instant::now() + SOON;
    while since.elapsed() < Duration::from_millis(500) {
        assert!(Instant::now() < deadline, "it goes on: {last}");
        sleep(Duration::from_millis(20)).await;
        if count() != last {
            (last, since) = (count(), Instant::now());
        }
    }
    last
}

#[tokio::test]
async fn neither_a_slow_reader_nor_a_slow_node_fills_memory() {
    let (address, sent) = endless().await;
    let quic = before(address, "body_idle = \"30s\"").await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let (mut send, receive) = connection.open_bi().await.expect("a stream");
    send.write_all(&wire::head(&GET)).await.expect("it goes out");
    send.finish().expect("it goes out");
    let in_sockets = 32 << 20;
    let waits = stands(|| sent.load(Ordering::Relaxed)).await;
    assert!(waits > 0 && waits < in_sockets, "{waits}");
    drop(receive);

    let (mut send, _receive) = connection.open_bi().await.expect("a stream");
    send.write_all(&wire::head(&POST)).await.expect("it goes out");
    let taken = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&taken);
    let uploads = tokio::spawn(async move {
        let part = wire::frame(wire::DATA, &[b'x'; 1 << 14]);
        while send.write_all(&part).await.is_ok() {
            counted.fetch_add(1 << 14, Ordering::Relaxed);
        }
    });
    let waits = stands(|| taken.load(Ordering::Relaxed)).await;
    assert!(waits > 0 && waits < in_sockets, "{waits}");
    uploads.abort();
}

#[tokio::test]
async fn heads_have_their_limits_in_time_and_length() {
    let quic = Quic::start().await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    // A section of 2^40 bytes is announced, and then one of which nothing comes.
    for (opening, want) in [(&b"\x01\xc0\0\x01\0\0\0\0\0"[..], 431), (b"\x01\x20", 408)] {
        let (mut send, mut receive) = connection.open_bi().await.expect("a stream");
        send.write_all(opening).await.expect("it goes out");
        let answer = timeout(SOON, receive.read_to_end(4096)).await.expect("in time");
        let answer = answer.expect("an answer");
        assert_eq!(wire::status(&wire::frames(&answer)[0].1), want);
    }
    for limit in ["header_bytes", "header_read"] {
        assert_eq!(quic.gate.metric(REACHED, &format!("\"{limit}\"")).await, 1, "{limit}");
    }
}

#[tokio::test]
async fn floods_end_the_connection() {
    let edit = |text: String| text.replacen("[limits]", "[limits]\nframes = 100", 1);
    let quic = Quic::edited("", edit).await;
    // Frames that ask for nothing.
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let (mut send, _receive) = connection.open_bi().await.expect("a stream");
    let _ = send.write_all(&wire::frame(0x21, b"").repeat(5000)).await;
    closed(&connection, "frames", 0x107).await;
    until(&quic.gate, REACHED, "\"frames\"", |n| n == 1).await;
    // Frames of QUIC, likewise.
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_micros(100)));
    let tls = quic.authority.client(&[&rustls::version::TLS13], None, &["h3"]);
    let crypto = QuicClientConfig::try_from(tls).expect("it is TLS 1.3");
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
    let connecting = endpoint.connect_with(config, quic.gate.address(), "a.test").expect("a name");
    let connection = timeout(SOON, connecting).await.expect("in time").expect("a connection");
    let _control = greet(&connection).await;
    closed(&connection, "pings", 0x107).await;
    until(&quic.gate, REACHED, "\"frames\"", |n| n == 2).await;
    // Requests taken back: CVE-2023-44487.
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let mut slow = GET;
    slow[3].1 = "/sleep/60000";
    let head = wire::head(&slow);
    let flood = async {
        while let Ok((mut send, mut receive)) = connection.open_bi().await {
            let _ = send.write_all(&head).await;
            let _ = send.reset(0x10cu32.into());
            let _ = receive.stop(0x10cu32.into());
        }
    };
    timeout(SOON, flood).await.expect("it is ended");
    closed(&connection, "requests taken back", 0x107).await;
    until(&quic.gate, REACHED, "\"resets\"", |n| n == 1).await;
    // Streams beyond the limit wait for others to end: there is no credit for them.
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let mut open = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(300), connection.open_bi()).await {
        let (mut send, receive) = stream.expect("the connection goes on");
        send.write_all(&head).await.expect("it goes out");
        open.push((send, receive));
    }
    assert_eq!(open.len(), 100);
    // It is given by the dozen.
    for (_, mut receive) in open.drain(..30) {
        receive.stop(0x10cu32.into()).expect("it was open");
    }
    timeout(SOON, connection.open_bi()).await.expect("there is room again").expect("it goes on");
}

#[tokio::test]
async fn connections_have_their_limits() {
    let edit = |text: String| text.replacen("workers = 2", "workers = 1", 1);
    let edit = |text| edit(text).replacen("[[listener]]", "[[listener]]\nconnections = 3", 1);
    let quic = Quic::edited("", edit).await;
    // One is TCP's, whose next client has it already.
    let (mut first, _second) = (quic.client().await, quic.client().await);
    let refused = dial(quic.gate.address(), &quic.authority, None).await.expect_err("it is full");
    assert!(matches!(refused, quinn::ConnectionError::ConnectionClosed(_)), "{refused}");
    assert_eq!(quic.gate.metric(REACHED, "\"listener.connections\"").await, 1);
    assert_eq!(first.get("/whoami").await.0, 200);

    let edit = |text: String| {
        let client = "[limits.client]\nconnections = 1\n\n[cluster.app]";
        text.replacen("[cluster.app]", client, 1).replacen("workers = 2", "workers = 1", 1)
    };
    let quic = Quic::edited("", edit).await;
    let mut first = quic.client().await;
    // Its address is known to be its own with the end of the handshake.
    let second = quic.connect().await;
    closed(&second, "a client's second connection", 0x107).await;
    assert_eq!(first.get("/whoami").await.0, 200);
}

#[tokio::test]
async fn idle_connections_and_those_that_carried_enough_are_closed() {
    let edit = |text: String| {
        text.replacen("[limits]", "[limits]\nidle = \"1s\"\nrequests_per_connection = 2", 1)
    };
    let quic = Quic::edited("", edit).await;
    let idle = quic.connect().await;
    let _control = greet(&idle).await;
    let full = quic.connect().await;
    let _control = greet(&full).await;
    for _ in 0..2 {
        assert_eq!(bare(&full, &wire::head(&GET)).await.expect("an answer"), [200]);
    }
    closed(&full, "full", 0x100).await;
    closed(&idle, "idle", 0x100).await;
    for limit in ["idle", "requests_per_connection"] {
        assert_eq!(quic.gate.metric(REACHED, &format!("\"{limit}\"")).await, 1, "{limit}");
    }
}

#[tokio::test]
async fn a_drain_says_goaway_and_finishes() {
    let Quic { gate, authority } = Quic::start().await;
    let connection = dial(gate.address(), &authority, None).await.expect("a connection");
    let _control = greet(&connection).await;
    let mut control = timeout(SOON, connection.accept_uni()).await.expect("in time").expect("one");
    let mut slow = GET;
    slow[3].1 = "/sleep/1500";
    let head = wire::head(&slow);
    let slow = bare(&connection, &head);
    let leave = async {
        until(&gate, "litegate_http_requests_in_flight", "", |n| n == 1).await;
        gate.running().drain();
        let mut said = Vec::new();
        // The type of the stream, SETTINGS, GOAWAY without a number, and with one.
        while said.len() < 9 + 10 + 3 {
            let more = timeout(SOON, control.read_chunk(100, true)).await.expect("in time");
            said.extend_from_slice(&more.expect("it goes on").expect("it stays open").bytes);
        }
        let frames = wire::frames(&said[1..]);
        assert_eq!(frames.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [4, 7, 7]);
        assert_eq!((frames[1].1.len(), &frames[2].1[..]), (8, &[4][..]));
        let late = bare(&connection, &wire::head(&GET)).await;
        let want = quinn::ReadError::Reset(0x10bu32.into());
        assert_eq!(late, Err(quinn::ReadToEndError::Read(want)), "it may be repeated elsewhere");
    };
    let (slow, ()) = tokio::join!(slow, leave);
    assert_eq!(slow.expect("an answer"), [200], "what runs is finished");
    let newcomer = dial(gate.address(), &authority, None).await;
    assert!(newcomer.is_err(), "nobody is let in any more");
    closed(&connection, "drained", 0x100).await;
    let (_cluster, running) = gate.into_running();
    let ended = tokio::task::spawn_blocking(move || running.join()).await.expect("it ends");
    assert_eq!(ended, litegate::app::Ended::Drained);
}

#[tokio::test]
async fn a_websocket_over_a_stream_is_an_upgrade_to_the_node() {
    let quic = Quic::start().await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    for (protocol, want) in [("websocket", 200), ("gopher", 405)] {
        let (mut send, mut receive) = connection.open_bi().await.expect("a stream");
        let head = wire::head(&[
            (":method", "CONNECT"),
            (":protocol", protocol),
            (":scheme", "https"),
            (":authority", "a.test"),
            (":path", "/upgrade"),
            ("sec-websocket-version", "13"),
        ]);
        send.write_all(&head).await.expect("it goes out");
        if want != 200 {
            let answer = timeout(SOON, receive.read_to_end(4096)).await.expect("in time");
            assert_eq!(wire::status(&wire::frames(&answer.expect("whole"))[0].1), want);
            continue;
        }
        let first = timeout(SOON, receive.read_chunk(4096, true)).await.expect("in time");
        let first = first.expect("it goes on").expect("an answer").bytes;
        assert_eq!(wire::status(&wire::frames(&first)[0].1), 200);
        assert_eq!(quic.gate.metric("litegate_tunnels", "").await, 1);
        let mut piece = Vec::new();
        for n in 0..20usize {
            piece.extend(wire::frame(wire::DATA, &vec![b'x'; 1 + n * 800]));
        }
        send.write_all(&piece).await.expect("it goes out");
        send.finish().expect("it goes out");
        let rest = timeout(SOON, receive.read_to_end(1 << 20)).await.expect("in time");
        let back = wire::frames(&rest.expect("it ends as it should"));
        assert!(back.iter().all(|(kind, _)| *kind == 0));
        let bytes: usize = back.iter().map(|(_, payload)| payload.len()).sum();
        assert_eq!(bytes, (0..20).map(|n| 1 + n * 800).sum::<usize>());
        until(&quic.gate, "litegate_tunnels", "", |n| n == 0).await;
    }
}

#[tokio::test]
async fn clients_of_tcp_are_told() {
    for (http3, want) in [
        ("true", Some("h3=\":PORT\"; ma=86400")),
        ("{ alt_svc = \"1h\", port = 443 }", Some("h3=\":443\"; ma=3600")),
        ("{ alt_svc = \"0s\" }", None),
        ("false", None),
    ] {
        let authority = Authority::new();
        let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
        let keys = format!("http3 = {http3}\ntls = {{ certificates = [{pair}] }}");
        let gate = listening(&keys, |text| text).await;
        let config = authority.client(crate::tls::BOTH, None, &["http/1.1"]);
        for target in ["/whoami", "/fault/reset"] {
            let mut stream =
                crate::tls::connect(&gate, &config, "a.test").await.expect("a session");
            let request =
                format!("GET {target} HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("it reads");
            let mut answer = String::new();
            let read = stream.read_to_string(&mut answer);
            timeout(SOON, read).await.expect("in time").expect("whole");
            let want = want.map(|want| want.replace("PORT", &gate.address().port().to_string()));
            let told = answer.lines().find_map(|line| line.strip_prefix("alt-svc: "));
            assert_eq!(told, want.as_deref(), "{http3} {target}");
        }
        let udp = dial(gate.address(), &authority, None);
        if http3 == "false" {
            assert!(timeout(Duration::from_millis(300), udp).await.is_err(), "nobody is there");
        } else {
            udp.await.expect("somebody is there");
        }
    }
}

/// Who the other end says it is.
fn shown(connection: &Connection) -> CertificateDer<'static> {
    let identity = connection.peer_identity().expect("it has one");
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().expect("rustls'");
    chain[0].clone()
}

#[tokio::test]
async fn certificates_are_swapped_and_clients_are_asked_for_theirs() {
    let quic = Quic::start().await;
    let connection = quic.connect().await;
    let _control = greet(&connection).await;
    let first = shown(&connection);
    quic.authority.write(quic.authority.directory.path(), "a", &["a.test"]);
    let deadline = Instant::now() + Duration::from_secs(15);
    while shown(&quic.connect().await) == first {
        assert!(Instant::now() < deadline, "the certificate stays");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(bare(&connection, &wire::head(&GET)).await.expect("an answer"), [200]);

    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let ca = authority.path("ca.crt");
    let keys = format!(
        "http3 = true\ntls = {{ certificates = [{pair}], client_ca = {ca:?}, client_auth = \
         \"required\" }}"
    );
    let gate = listening(&keys, |text| text).await;
    let connection = dial(gate.address(), &authority, Some("ada")).await.expect("it is let in");
    let mut client = Client::over(connection).await;
    let (_, echo) = client.send(ask("GET", "/echo"), b"").await;
    assert_eq!(seen(&echo, "x-client-cert-subject"), ["CN=ada"]);
    if let Ok(stranger) = dial(gate.address(), &authority, None).await {
        // The client is done with its handshake before we are with ours.
        let error = timeout(SOON, stranger.closed()).await.expect("in time");
        assert!(matches!(error, quinn::ConnectionError::ConnectionClosed(_)), "{error}");
    }
    until(&gate, "litegate_tls_handshakes_total", "failed", |n| n == 1).await;
}

#[tokio::test]
async fn nothing_is_taken_before_the_handshake_ends() {
    let quic = Quic::start().await;
    let mut tls = (*quic.authority.client(&[&rustls::version::TLS13], None, &["h3"])).clone();
    tls.enable_early_data = true;
    let crypto = QuicClientConfig::try_from(tls).expect("it is TLS 1.3");
    let config = ClientConfig::new(Arc::new(crypto));
    let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
    let connect = || {
        let to = quic.gate.address();
        endpoint.connect_with(config.clone(), to, "a.test").expect("a name")
    };
    // A ticket comes with the first, and that it allows early data is never said.
    let first = timeout(SOON, connect()).await.expect("in time").expect("a connection");
    let _control = greet(&first).await;
    assert_eq!(bare(&first, &wire::head(&GET)).await.expect("an answer"), [200]);
    let second = connect().into_0rtt();
    assert!(second.is_err(), "RFC 8470: it could be repeated by anybody");
}

#[tokio::test]
async fn a_reload_opens_and_closes_it() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let keys = format!("tls = {{ certificates = [{pair}] }}");
    let gate = listening(&keys, |text| text).await;
    let with = |http3: &str| {
        let keys = format!("address = \"127.0.0.1:0\"\n{keys}\nhttp3 = {http3}");
        let text =
            crate::gate::config(&gate.cluster, r#"primary = { type = "litefs", poll = "100ms" }"#);
        let text = text.replacen("address = \"127.0.0.1:0\"", &keys, 1);
        litegate::config::load::parse("test.toml", &text, []).unwrap_or_else(|f| panic!("{f}"))
    };
    for _ in 0..2 {
        gate.running().reload(with("true")).await.expect("it is applied");
        // A socket that is about to be closed may be asked as well, and sends newcomers to TCP.
        let deadline = Instant::now() + SOON;
        let connection = loop {
            match dial(gate.address(), &authority, None).await {
                Ok(connection) => break connection,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        let mut client = Client::over(connection.clone()).await;
        assert_eq!(client.get("/whoami").await.0, 200);
        gate.running().reload(with("true")).await.expect("nothing changes");
        assert_eq!(client.get("/whoami").await.0, 200);
        gate.running().reload(with("false")).await.expect("it is applied");
        closed(&connection, "no HTTP/3 any more", 0x100).await;
    }
}

#[tokio::test]
async fn a_connection_survives_another_address() {
    let quic = Quic::start().await;
    let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
    let tls = quic.authority.client(&[&rustls::version::TLS13], None, &["h3"]);
    let crypto = QuicClientConfig::try_from(tls).expect("it is TLS 1.3");
    let config = ClientConfig::new(Arc::new(crypto));
    let connecting = endpoint.connect_with(config, quic.gate.address(), "a.test").expect("a name");
    let connection = timeout(SOON, connecting).await.expect("in time").expect("a connection");
    let _control = greet(&connection).await;
    // With two workers every other address is another one's.
    for _ in 0..12 {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("loopback has ports");
        endpoint.rebind(socket).expect("it is one");
        assert_eq!(bare(&connection, &wire::head(&GET)).await.expect("an answer"), [200]);
    }
}
