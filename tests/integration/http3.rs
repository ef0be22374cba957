//! HTTP/3 to clients: over QUIC beside TCP, with the client of the `h3` crate where it can say what
//! is to be said, and with bare frames where it can't.

use std::{future::poll_fn, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, Request, Response, StatusCode};
use quinn::{ClientConfig, Connection, Endpoint, VarInt, crypto::rustls::QuicClientConfig};
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    gate::Gate,
    tls::{Authority, listening},
};

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
