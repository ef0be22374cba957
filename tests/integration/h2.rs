//! HTTP/2 to clients: by prior knowledge and by ALPN, beside HTTP/1.1.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Body as _, Frame, Incoming},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use litegate::testkit::Options;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    gate::Gate,
    tls::{Authority, BOTH, connect, listening},
};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const SOON: Duration = Duration::from_secs(10);

pub(crate) type Sent = BoxBody<Bytes, std::convert::Infallible>;
pub(crate) type Sender = http2::SendRequest<Sent>;

fn body(bytes: impl Into<Bytes>) -> Sent {
    BoxBody::new(Full::new(bytes.into()))
}

pub(crate) async fn over(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Sender {
    let (sender, driver) = http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(64 << 10)
        .handshake(TokioIo::new(io))
        .await
        .expect("no I/O yet");
    tokio::spawn(driver);
    sender
}

pub(crate) async fn clear(gate: &Gate) -> Sender {
    over(TcpStream::connect(gate.address()).await.expect("it listens")).await
}

pub(crate) fn get(target: &str) -> Request<Sent> {
    ask("GET", target, "")
}

fn ask(method: &str, target: &str, sent: impl Into<Bytes>) -> Request<Sent> {
    let uri = format!("http://app.test{target}");
    Request::builder().method(method).uri(uri).body(body(sent)).expect("a request")
}

pub(crate) async fn send(sender: &mut Sender, request: Request<Sent>) -> Response<Incoming> {
    timeout(SOON, sender.ready()).await.expect("in time").expect("it goes on");
    let sent = timeout(SOON, sender.send_request(request)).await.expect("in time");
    sent.expect("an answer")
}

pub(crate) async fn whole(response: Response<Incoming>) -> (StatusCode, Bytes) {
    let status = response.status();
    let body = timeout(SOON, response.into_body().collect()).await.expect("in time");
    (status, body.expect("whole").to_bytes())
}

async fn echo(sender: &mut Sender, request: Request<Sent>) -> Value {
    let (status, body) = whole(send(sender, request).await).await;
    assert_eq!(status, 200);
    serde_json::from_slice(&body).expect("an echo")
}

/// Every value of a field of the request that the app saw.
fn seen(echo: &Value, name: &str) -> Vec<String> {
    let fields = echo["fields"].as_array().expect("a list").iter();
    fields.filter(|f| f[0] == name).filter_map(|f| f[1].as_str()).map(str::to_owned).collect()
}

/// Waits until a metric is so.
pub(crate) async fn until(gate: &Gate, family: &str, label: &str, so: impl Fn(u64) -> bool) {
    let deadline = Instant::now() + SOON;
    while !so(gate.metric(family, label).await) {
        assert!(Instant::now() < deadline, "{family} {label}: {}", gate.metrics().await);
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn prior_knowledge_and_http1_share_a_port() {
    let gate = Gate::start().await;
    let mut sender = clear(&gate).await;
    for _ in 0..3 {
        let response = send(&mut sender, get("/echo/a%2Fb?x=%00")).await;
        assert_eq!(response.version(), Version::HTTP_2);
        let (_, body) = whole(response).await;
        let echo: Value = serde_json::from_slice(&body).expect("an echo");
        assert_eq!(echo["target"], "/echo/a%2Fb?x=%00");
        assert_eq!(seen(&echo, "host"), ["app.test"]);
        assert!(seen(&echo, "forwarded")[0].ends_with(";host=\"app.test\";proto=http"));
        assert_eq!(gate.send("GET", "/whoami", b"").await.status, 200);
    }
    // However the first bytes are cut, a request is one.
    let mut conn = gate.conn().await;
    for piece in ["P", "R", "OPFIND /echo HTTP/1.1\r\nhost: a\r\n\r\n"] {
        conn.stream.set_nodelay(true).expect("connected");
        conn.send(piece).await.expect("litegate reads");
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(conn.response(false).await.expect("an answer").status, 200);
    let mut cut = TcpStream::connect(gate.address()).await.expect("it listens");
    cut.set_nodelay(true).expect("connected");
    for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0" {
        cut.write_all(&[*byte]).await.expect("litegate reads");
        tokio::task::yield_now().await;
    }
    let mut head = [0; 9];
    timeout(SOON, cut.read_exact(&mut head)).await.expect("in time").expect("settings");
    assert_eq!(head[3], 4, "SETTINGS: {head:?}");
}

#[tokio::test]
async fn alpn_chooses() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    for (protocols, offered, agreed) in [
        (r#"["http/1.1", "h2"]"#, &["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (r#"["http/1.1", "h2"]"#, &["http/1.1"], Some(b"http/1.1")),
        (r#"["http/1.1", "h2"]"#, &[], None),
        (r#"["h2"]"#, &["h2", "http/1.1"], Some(b"h2")),
        (r#"["http/1.1"]"#, &["h2", "http/1.1"], Some(b"http/1.1")),
    ] {
        let keys = format!("protocols = {protocols}\ntls = {{ certificates = [{pair}] }}");
        let gate = listening(&keys, |text| text).await;
        let config = authority.client(BOTH, None, offered);
        let mut stream = connect(&gate, &config, "a.test").await.expect("a session");
        assert_eq!(stream.get_ref().1.alpn_protocol(), agreed, "{protocols} {offered:?}");
        if agreed == Some(b"h2") {
            let mut sender = over(stream).await;
            let echo = echo(&mut sender, get("/echo")).await;
            assert_eq!(seen(&echo, "x-forwarded-proto"), ["https"]);
            let (_, body) = whole(send(&mut sender, get("/bytes/3000000")).await).await;
            assert_eq!(body.len(), 3_000_000);
        } else {
            stream.write_all(b"GET /whoami HTTP/1.0\r\nhost: a\r\n\r\n").await.expect("it reads");
            let mut answer = Vec::new();
            timeout(SOON, stream.read_to_end(&mut answer)).await.expect("in time").expect("whole");
            assert!(answer.starts_with(b"HTTP/1.1 200 ") || answer.starts_with(b"HTTP/1.0 200 "));
        }
    }
}

#[tokio::test]
async fn what_a_listener_does_not_speak_is_refused() {
    let gate = listening("protocols = [\"http/1.1\"]", |text| text).await;
    let mut conn = gate.conn().await;
    conn.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("litegate reads");
    assert_eq!(conn.response(false).await.expect("an answer").status, 400);
    let gate = listening("protocols = [\"h2\"]", |text| text).await;
    let mut conn = gate.conn().await;
    conn.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("litegate reads");
    let mut rest = Vec::new();
    let _ = timeout(SOON, conn.stream.read_to_end(&mut rest)).await.expect("closed");
    assert!(!rest.starts_with(b"HTTP/1"), "{rest:?}");
    assert_eq!(echo(&mut clear(&gate).await, get("/echo")).await["target"], "/echo");
}

#[tokio::test]
async fn many_requests_at_once_do_not_wait_for_one_another() {
    let gate = Gate::start().await;
    let sender = clear(&gate).await;
    let mut slow = sender.clone();
    let slow = tokio::spawn(async move { whole(send(&mut slow, get("/sleep/1500")).await).await });
    let done = std::sync::Arc::new(AtomicUsize::new(0));
    let each = (0..60).map(|n| {
        let (mut sender, done) = (sender.clone(), std::sync::Arc::clone(&done));
        tokio::spawn(async move {
            let payload = vec![b'x'; n * 5000];
            let (status, _) = whole(send(&mut sender, ask("POST", "/kv/a", payload)).await).await;
            assert_eq!(status, 200);
            let target = format!("/bytes/{}", n * 7000);
            let (status, body) = whole(send(&mut sender, get(&target)).await).await;
            assert_eq!((status.as_u16(), body.len()), (200, n * 7000));
            done.fetch_add(1, Ordering::Relaxed);
        })
    });
    for task in each.collect::<Vec<_>>() {
        timeout(SOON, task).await.expect("in time").expect("it works");
    }
    assert!(!slow.is_finished() || done.load(Ordering::Relaxed) == 60);
    assert_eq!(slow.await.expect("it works").0, 200);
}

#[tokio::test]
async fn fields_are_said_as_http1_says_them() {
    let gate = Gate::start().await;
    let mut sender = clear(&gate).await;
    let mut request = get("/echo");
    for crumb in ["a=1", "b=2"] {
        request.headers_mut().append("cookie", crumb.parse().expect("a value"));
    }
    request.headers_mut().insert("te", "trailers".parse().expect("a value"));
    let echoed = echo(&mut sender, request).await;
    assert_eq!(seen(&echoed, "cookie"), ["a=1; b=2"]);
    assert_eq!(seen(&echoed, "te"), ["trailers"]);
    let trailers = send(&mut sender, get("/trailers")).await.into_body().collect().await;
    let trailers = trailers.expect("whole");
    assert_eq!(trailers.trailers().expect("they pass")["x-sum"], "5");
    assert_eq!(trailers.to_bytes(), "hello");

    // A body of no known length, with trailers.
    let frames = ["abc", "defg"].map(|data| Ok(Frame::data(Bytes::from(data))));
    let mut last = http::HeaderMap::new();
    last.insert("x-more", "1".parse().expect("a value"));
    let frames = frames.into_iter().chain([Ok(Frame::trailers(last))]);
    let streamed = BoxBody::new(StreamBody::new(futures_util::stream::iter(frames)));
    let request = Request::post("http://app.test/echo").body(streamed).expect("a request");
    let echoed = echo(&mut sender, request).await;
    assert_eq!(echoed["length"], 7);
    assert_eq!(seen(&echoed, "content-length"), Vec::<String>::new());
}

#[tokio::test]
async fn what_http2_forbids_is_refused() {
    let gate = Gate::start().await;
    let mut sender = clear(&gate).await;
    let mut two = get("/echo");
    two.headers_mut().insert("host", "other.test".parse().expect("a value"));
    let mut many = get("/echo");
    for n in 0..120 {
        let name: http::HeaderName = format!("x-{n}").parse().expect("a name");
        many.headers_mut().insert(name, "1".parse().expect("a value"));
    }
    let mut large = get("/echo");
    large.headers_mut().insert("x", "x".repeat(20_000).parse().expect("a value"));
    let connect = Request::connect("app.test:80").body(body("")).expect("a request");
    let long = get(&format!("/{}", "x".repeat(5000)));
    for (what, request, want) in [
        ("two hosts", two, 400),
        ("many fields", many, 431),
        ("a large field", large, 431),
        ("a long target", long, 414),
        ("CONNECT", connect, 405),
    ] {
        let (status, _) = whole(send(&mut sender, request).await).await;
        assert_eq!(status, want, "{what}");
    }
    assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200, "it goes on");
}

#[tokio::test]
async fn a_broken_answer_does_not_look_complete() {
    let gate = Gate::start().await;
    let mut sender = clear(&gate).await;
    for fault in ["/fault/half", "/fault/chunk"] {
        sender.ready().await.expect("it goes on");
        let sent = timeout(SOON, sender.send_request(get(fault))).await.expect("in time");
        // The reset may overtake the head.
        if let Ok(response) = sent {
            assert!(timeout(SOON, response.into_body().collect()).await.expect("in time").is_err());
        }
    }
    assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200, "it goes on");
}

#[tokio::test]
async fn a_websocket_over_a_stream_is_an_upgrade_to_the_node() {
    let gate = Gate::start().await;
    let socket = TcpStream::connect(gate.address()).await.expect("it listens");
    let (mut client, connection) = h2::client::handshake(socket).await.expect("a handshake");
    tokio::spawn(connection);
    client = client.ready().await.expect("it goes on");
    let deadline = Instant::now() + SOON;
    while !client.is_extended_connect_protocol_enabled() {
        assert!(Instant::now() < deadline, "it is never offered");
        sleep(Duration::from_millis(10)).await;
    }
    for protocol in ["websocket", "gopher"] {
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri("http://app.test/upgrade")
            .header("sec-websocket-version", "13")
            .body(())
            .expect("a request");
        request.extensions_mut().insert(h2::ext::Protocol::from(protocol));
        let (response, mut up) = client.send_request(request, false).expect("it goes out");
        let response = timeout(SOON, response).await.expect("in time").expect("an answer");
        if protocol == "gopher" {
            assert_eq!(response.status(), 405);
            continue;
        }
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers().get("upgrade"), None);
        assert_eq!(response.headers().get("sec-websocket-accept"), None);
        let mut down = response.into_body();
        for n in 0..20usize {
            let piece = vec![b'x'; 1 + n * 800];
            up.send_data(piece.clone().into(), false).expect("it goes out");
            let mut back = 0;
            while back < piece.len() {
                let data = timeout(SOON, down.data()).await.expect("in time");
                let data = data.expect("it goes on").expect("it is whole");
                down.flow_control().release_capacity(data.len()).expect("it was received");
                back += data.len();
            }
            assert_eq!(back, piece.len());
        }
        assert_eq!(gate.metric("litegate_tunnels", "").await, 1);
        up.send_data(Bytes::new(), true).expect("half a close");
        let end = timeout(SOON, down.data()).await.expect("in time");
        assert!(end.is_none_or(|last| last.is_ok_and(|last| last.is_empty())));
        until(&gate, "litegate_tunnels", "", |n| n == 0).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_requests_along() {
    let gate = Gate::start().await;
    let sender = clear(&gate).await;
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let mut sender = sender.clone();
            tokio::spawn(async move { send(&mut sender, get("/sleep/60000")).await })
        })
        .collect();
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 5).await;
    // One takes back its request, the connection goes on.
    tasks[0].abort();
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 4).await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    drop(sender);
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 0).await;
    assert_eq!(gate.metric("litegate_http_requests_abandoned_total", "").await, 5);
    until(&gate, "litegate_downstream_connections", "", |n| n == 0).await;
}

#[tokio::test]
async fn a_stream_that_is_not_taken_is_reset_and_others_go_on() {
    let gate = Gate::start().await;
    let mut sender = clear(&gate).await;
    // Its window is full, and nobody reads.
    let stuck = send(&mut sender, get("/bytes/1000000")).await;
    let began = Instant::now();
    let mut stuck = stuck.into_body();
    let failed = async {
        loop {
            // What is with the client already has to be taken to see the end.
            sleep(Duration::from_millis(200)).await;
            assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200);
            if began.elapsed() > Duration::from_secs(5) {
                break;
            }
        }
        let mut got = 0;
        loop {
            match poll_fn(|cx| Pin::new(&mut stuck).poll_frame(cx)).await {
                Some(Ok(frame)) => got += frame.data_ref().map_or(0, Bytes::len),
                Some(Err(_)) => return got,
                None => panic!("it looks complete after {got}"),
            }
        }
    };
    let got = timeout(Duration::from_secs(20), failed).await.expect("in time");
    assert!(got < 1_000_000, "{got}");
}

#[tokio::test]
async fn a_body_that_stops_coming_gets_408() {
    let gate = Gate::start().await;
    let mut sender = clear(&gate).await;
    let never = futures_util::stream::once(async { Ok(Frame::data(Bytes::from("begun"))) });
    let never = futures_util::StreamExt::chain(never, futures_util::stream::pending());
    let never = BoxBody::new(StreamBody::new(never));
    let request = Request::post("http://app.test/kv/a").body(never).expect("a request");
    assert_eq!(send(&mut sender, request).await.status(), 408);
    assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200, "it goes on");
}

#[tokio::test]
async fn a_drain_says_goaway_and_finishes() {
    let (cluster, running) = Gate::start().await.into_running();
    let socket = TcpStream::connect(running.listeners[0]).await.expect("it listens");
    let mut sender = over(socket).await;
    let mut another = sender.clone();
    let slow =
        tokio::spawn(async move { whole(send(&mut another, get("/sleep/1000")).await).await });
    assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200);
    running.drain();
    assert_eq!(slow.await.expect("it works").0, 200, "what runs is finished");
    let gone = async {
        while sender.ready().await.is_ok() && !sender.is_closed() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, gone).await.expect("it is told to go");
    let ended = tokio::task::spawn_blocking(move || running.join()).await.expect("it ends");
    assert_eq!(ended, litegate::app::Ended::Drained);
    drop(cluster);
}

#[tokio::test]
async fn an_idle_or_silent_connection_is_closed() {
    let edit = |text: String| text.replace("[limits]", "[limits]\nidle = \"1s\"");
    let gate = Gate::edited(Options::default(), LITEFS, edit).await;
    let mut sender = clear(&gate).await;
    assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200);
    let mut silent = TcpStream::connect(gate.address()).await.expect("it listens");
    silent.write_all(b"PRI * HTTP/2.0\r\n").await.expect("litegate reads");
    let mut rest = Vec::new();
    let _ = timeout(SOON, silent.read_to_end(&mut rest)).await.expect("it is closed");
    until(&gate, "litegate_downstream_connections", "", |n| n == 0).await;
    assert!(sender.is_closed());
}

/// A client of h2's own, which sees interim answers.
async fn bare(gate: &Gate) -> h2::client::SendRequest<Bytes> {
    let socket = TcpStream::connect(gate.address()).await.expect("it listens");
    let (sender, driver) = h2::client::handshake(socket).await.expect("it speaks HTTP/2");
    tokio::spawn(driver);
    sender.ready().await.expect("it takes requests")
}

fn head(method: &str, target: &str, fields: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::builder().method(method).uri(format!("http://app.test{target}"));
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(()).expect("a request")
}

/// The next interim answer, or none if the final one comes first.
async fn interim(response: &mut h2::client::ResponseFuture) -> Option<Response<()>> {
    let next = poll_fn(|cx| response.poll_informational(cx));
    let next = timeout(SOON, next).await.expect("in time");
    next.map(|interim| interim.expect("the connection goes on"))
}

async fn finish(response: h2::client::ResponseFuture) -> (StatusCode, Bytes) {
    let response = timeout(SOON, response).await.expect("in time").expect("an answer");
    let (parts, mut body) = response.into_parts();
    let mut whole = Vec::new();
    while let Some(data) = timeout(SOON, body.data()).await.expect("in time") {
        let data = data.expect("it comes whole");
        let _ = body.flow_control().release_capacity(data.len());
        whole.extend_from_slice(&data);
    }
    (parts.status, whole.into())
}

/// Sends it all, as the window opens.
async fn upload(stream: &mut h2::SendStream<Bytes>, mut data: Bytes) {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = timeout(SOON, poll_fn(|cx| stream.poll_capacity(cx))).await.expect("in time");
        let room = room.expect("it is wanted").expect("it is wanted");
        let next = data.split_to(room.min(data.len()));
        stream.send_data(next, data.is_empty()).expect("it is wanted");
    }
}

#[tokio::test]
async fn hints_come_ahead_of_the_answer() {
    let gate = Gate::start().await;
    let mut sender = bare(&gate).await;
    let (mut response, _) = sender.send_request(head("GET", "/hints", &[]), true).expect("it goes");
    let hints = interim(&mut response).await.expect("an interim answer");
    assert_eq!(
        (hints.status().as_u16(), &hints.headers()["link"]),
        (103, &"</style.css>".parse().expect("a value"))
    );
    assert_eq!(finish(response).await, (StatusCode::OK, "hinted".into()));
}

#[tokio::test]
async fn who_waits_for_100_hears_it_when_the_node_says_so() {
    let gate = Gate::start().await;
    let mut sender = bare(&gate).await;
    let expects = [("expect", "100-continue"), ("content-length", "2")];
    let request = head("POST", "/echo", &expects);
    let (mut response, mut body) = sender.send_request(request, false).expect("it goes");
    assert_eq!(interim(&mut response).await.expect("an interim answer").status(), 100);
    body.send_data("ok".into(), true).expect("it is wanted");
    assert_eq!(finish(response).await.0, 200);

    let request = head("POST", "/fault/early", &expects);
    let (mut response, _body) = sender.send_request(request, false).expect("it goes");
    assert!(interim(&mut response).await.is_none(), "nobody wants it");
    assert_eq!(finish(response).await.0, 413);

    // Who does not wait is not told to go on.
    let request = head("POST", "/echo", &expects);
    let (mut response, mut body) = sender.send_request(request, false).expect("it goes");
    body.send_data("ok".into(), true).expect("it is wanted");
    while let Some(interim) = interim(&mut response).await {
        assert_eq!(interim.status(), 100, "it may have crossed");
    }
    assert_eq!(finish(response).await.0, 200);
}

/// Eight times what is kept of a body.
#[tokio::test]
async fn an_upload_that_a_replica_refuses_is_asked_for_when_the_primary_wants_it() {
    const WRONG: &str = r#"primary = { type = "instance", name = "app-1" }"#;
    let gate = Gate::with(Options::default(), WRONG).await;
    gate.until(|topology| topology.primary.is_some()).await;
    let mut sender = bare(&gate).await;
    let size = 8 << 20;
    let request = head("POST", "/kv/large", &[("expect", "100-continue")]);
    let (mut response, mut body) = sender.send_request(request, false).expect("it goes");
    assert_eq!(interim(&mut response).await.expect("an interim answer").status(), 100);
    upload(&mut body, vec![b'x'; size].into()).await;
    assert_eq!(finish(response).await.0, 200);
    let written = gate.cluster.written("large");
    assert_eq!((written.on, written.bytes), (vec![0], size));
    // Without waiting: as much as is kept.
    let request = head("POST", "/kv/small", &[]);
    let (response, mut body) = sender.send_request(request, false).expect("it goes");
    upload(&mut body, vec![b'x'; 900_000].into()).await;
    assert_eq!(finish(response).await.0, 200);
    assert_eq!(gate.cluster.written("small").bytes, 900_000);
}
