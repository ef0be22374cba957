//! HTTP/2 to nodes.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use litegate::testkit::{Cluster, Options, client};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::gate::Gate;

const SOON: Duration = Duration::from_secs(10);

/// What a node does with a stream.
#[derive(Clone, Copy)]
enum Fault {
    None,
    /// Refuses the first of each connection.
    Refuse,
    /// Closes without an answer.
    Close,
    /// Resets with an error that proves nothing.
    Reset,
}

struct Node {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

impl Node {
    async fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("bound");
        let (connections, requests) = (Arc::default(), Arc::default());
        let node = Self { address, connections, requests };
        let (connections, requests) = (Arc::clone(&node.connections), Arc::clone(&node.requests));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let first = connections.fetch_add(1, Ordering::SeqCst) == 0;
                tokio::spawn(serve(
                    socket,
                    if first { fault } else { Fault::None },
                    Arc::clone(&requests),
                ));
            }
        });
        node
    }

    async fn gate(&self, more: &str) -> Gate {
        let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
        let text = format!(
            "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
             \"127.0.0.1:0\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\nupstream = {{ \
             protocol = \"h2\" }}\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", \
             address = \"{}\" }}] }}\nprimary = {{ type = \"instance\", name = \"a\" }}\n{more}",
            self.address
        );
        let gate = Gate::before(cluster, &text);
        gate.until(|topology| topology.primary.is_some()).await;
        gate
    }
}

/// Answers with what the request said.
async fn serve(socket: TcpStream, fault: Fault, requests: Arc<AtomicUsize>) {
    let Ok(mut connection) = h2::server::handshake(socket).await else { return };
    let mut refuse = matches!(fault, Fault::Refuse);
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        match fault {
            Fault::Refuse if refuse => {
                refuse = false;
                respond.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            Fault::Reset => {
                requests.fetch_add(1, Ordering::SeqCst);
                respond.send_reset(h2::Reason::INTERNAL_ERROR);
                continue;
            }
            Fault::Close => {
                requests.fetch_add(1, Ordering::SeqCst);
                return;
            }
            _ => {}
        }
        requests.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(answer(request, respond));
    }
}

async fn answer(request: Request<h2::RecvStream>, mut respond: h2::server::SendResponse<Bytes>) {
    let (parts, mut body) = request.into_parts();
    let mut length = 0;
    while let Some(Ok(data)) = body.data().await {
        length += data.len();
        let _ = body.flow_control().release_capacity(data.len());
    }
    let trailers = body.trailers().await.ok().flatten().map_or(0, |trailers| trailers.len());
    let mut response = Response::builder()
        .header("trailer", "grpc-status")
        .header("x-length", length)
        .header("x-trailers", trailers);
    if parts.uri.path() == "/trailers-only" {
        let response = response.header("grpc-status", "12").body(()).expect("a response");
        let _ = respond.send_response(response, true);
        return;
    }
    if parts.uri.path() == "/slow" {
        tokio::time::sleep(Duration::from_mins(1)).await;
    }
    for name in ["host", "connection", "transfer-encoding", "te", "via"] {
        if let Some(value) = parts.headers.get(name) {
            response = response.header(format!("seen-{name}"), value);
        }
    }
    let uri = parts.uri.to_string();
    let Ok(mut stream) = respond.send_response(response.body(()).expect("a response"), false)
    else {
        return;
    };
    let _ = stream.send_data(uri.into(), false);
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().expect("a value"));
    let _ = stream.send_trailers(trailers);
}

#[tokio::test]
async fn requests_share_one_connection_and_say_what_http2_says() {
    let node = Node::start(Fault::None).await;
    let gate = node.gate("").await;
    let mut conns = Vec::new();
    for _ in 0..20 {
        let address = gate.address();
        conns.push(tokio::spawn(async move {
            client::request(address, "POST", "/a%2Fb?x=1", "te: trailers\r\n", &vec![b'x'; 70_000])
                .await
        }));
    }
    for conn in conns {
        let answer = timeout(SOON, conn).await.expect("in time").expect("it works");
        let answer = answer.expect("an answer");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.field("x-length"), Some("70000"));
        assert!(answer.text().starts_with("http://") && answer.text().ends_with("/a%2Fb?x=1"));
        assert_eq!(answer.field("seen-te"), Some("trailers"));
        for name in ["seen-host", "seen-connection", "seen-transfer-encoding"] {
            assert_eq!(answer.field(name), None, "{name}");
        }
        assert_eq!(answer.trailers, [("grpc-status".to_owned(), "0".to_owned())]);
    }
    assert_eq!(node.connections.load(Ordering::SeqCst), 1);
    let bare = gate.send("GET", "/trailers-only", b"").await;
    assert_eq!((bare.status, bare.field("grpc-status")), (200, Some("12")));
}

#[tokio::test]
async fn what_was_refused_is_sent_again_writes_too() {
    for fault in [Fault::Refuse, Fault::None] {
        let node = Node::start(fault).await;
        let gate = node.gate("").await;
        for method in ["POST", "GET"] {
            assert_eq!(gate.send(method, "/", b"x").await.status, 200);
        }
        assert_eq!(node.requests.load(Ordering::SeqCst), 2);
    }
}

#[tokio::test]
async fn what_may_have_run_is_not_sent_again() {
    for fault in [Fault::Close, Fault::Reset] {
        let node = Node::start(fault).await;
        let gate = node.gate("").await;
        let answer = gate.send("POST", "/", b"x").await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY.as_u16());
        assert!(answer.text().contains("maybe_executed"), "{}", answer.text());
        assert_eq!(node.requests.load(Ordering::SeqCst), 1);
        let again = gate.send("POST", "/", b"x").await;
        if matches!(fault, Fault::Close) {
            assert_eq!(again.status, 200, "over another connection");
        }
    }
}

/// A GOAWAY that names no stream proves that nothing ran; one that names ours proves nothing.
#[tokio::test]
async fn a_goaway_is_taken_at_its_word() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    for (last, sent_again) in [(0u8, true), (1, false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("bound");
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&requests);
        tokio::spawn(async move {
            let (mut first, _) = listener.accept().await.expect("a connection");
            first.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.expect("settings go out");
            // The preface, and frames until there are HEADERS.
            let mut preface = [0; 24];
            first.read_exact(&mut preface).await.expect("a preface");
            loop {
                let mut head = [0; 9];
                first.read_exact(&mut head).await.expect("a frame");
                let length = usize::from(head[1]) * 256 + usize::from(head[2]);
                let mut payload = vec![0; length];
                first.read_exact(&mut payload).await.expect("its payload");
                if head[3] == 1 {
                    break;
                }
            }
            let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last, 0, 0, 0, 0];
            first.write_all(&goaway).await.expect("it goes out");
            first.shutdown().await.expect("the end");
            let mut rest = Vec::new();
            let _ = first.read_to_end(&mut rest).await;
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, Fault::None, Arc::clone(&counted)));
            }
        });
        let node = Node { address, connections: Arc::default(), requests };
        let gate = node.gate("").await;
        let answer = gate.send("POST", "/", b"x").await;
        let (status, runs) = if sent_again { (200, 1) } else { (502, 0) };
        assert_eq!(answer.status, status, "last stream {last}");
        assert_eq!(node.requests.load(Ordering::SeqCst), runs, "last stream {last}");
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_another_opened() {
    let node = Node::start(Fault::None).await;
    let gate = node.gate("[cluster.app.timeouts]\npool_idle = \"200ms\"\n").await;
    assert_eq!(gate.send("GET", "/", b"").await.status, 200);
    let deadline = tokio::time::Instant::now() + SOON;
    while gate.metric("litegate_upstream_connections", "").await > 0 {
        assert!(tokio::time::Instant::now() < deadline, "{}", gate.metrics().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(gate.send("GET", "/", b"").await.status, 200);
    assert_eq!(node.connections.load(Ordering::SeqCst), 2);
}

#[test]
fn a_probe_that_can_not_succeed_is_refused() {
    let text = "[[listener]]\naddress = \"127.0.0.1:0\"\n[cluster.app]\nport = 1\nupstream = { \
                protocol = \"h2\" }\nhealth = { path = \"/\" }\nmembers = { type = \"static\", nodes \
                = [{ name = \"a\", address = \"127.0.0.1\" }] }\nprimary = { type = \"instance\", \
                name = \"a\" }\n";
    let faults = litegate::config::load::parse("test.toml", text, []).expect_err("it can't work");
    assert!(faults.to_string().contains("the active probe speaks HTTP/1.1"), "{faults}");
}

/// A node for WebSockets: by HTTP/2 it takes them if it `says` so, and it speaks HTTP/1.1 as well.
/// By either it echoes; counts those that came by HTTP/2 as requests.
async fn sockets(says: bool) -> Node {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    let node = Node { address, connections: Arc::default(), requests: Arc::default() };
    let requests = Arc::clone(&node.requests);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let requests = Arc::clone(&requests);
            tokio::spawn(async move {
                let mut first = [0; 3];
                socket.peek(&mut first).await.expect("somebody speaks");
                if &first != b"PRI" {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(socket.read_u8().await.expect("a head"));
                    }
                    let answer = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\
                                  connection: upgrade\r\nx-by: http1\r\n\r\n";
                    socket.write_all(answer.as_bytes()).await.expect("litegate reads");
                    let (mut read, mut write) = socket.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    return;
                }
                let mut builder = h2::server::Builder::new();
                if says {
                    builder.enable_connect_protocol();
                }
                let Ok(mut connection) = builder.handshake::<_, Bytes>(socket).await else {
                    return;
                };
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    requests.fetch_add(1, Ordering::SeqCst);
                    let protocol = request.extensions().get::<h2::ext::Protocol>();
                    assert_eq!(protocol.map(h2::ext::Protocol::as_str), Some("websocket"));
                    assert_eq!(request.headers().get("sec-websocket-key"), None);
                    assert_eq!(request.headers()["sec-websocket-version"], "13");
                    if request.uri().path() == "/refused" {
                        let no = Response::builder().status(401).body(()).expect("a response");
                        let mut no = respond.send_response(no, false).expect("litegate reads");
                        no.send_data("who are you?".into(), true).expect("litegate reads");
                        continue;
                    }
                    let yes = Response::builder().header("x-by", "h2").body(()).expect("it is one");
                    let mut down = respond.send_response(yes, false).expect("litegate reads");
                    tokio::spawn(async move {
                        let mut up = request.into_body();
                        while let Some(Ok(data)) = up.data().await {
                            let _ = up.flow_control().release_capacity(data.len());
                            let _ = down.send_data(data, false);
                        }
                        let _ = down.send_data(Bytes::new(), true);
                    });
                }
            });
        }
    });
    node
}

#[tokio::test]
async fn a_websocket_is_a_stream_where_the_node_says_so_and_http1_elsewhere() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    for says in [true, false] {
        let by = if says { "h2" } else { "http1" };
        let node = sockets(says).await;
        let gate = node.gate("").await;
        // From a client that speaks HTTP/1.1: RFC 6455 section 1.3 has the key and its answer.
        for _ in 0..2 {
            let mut conn = gate.conn().await;
            conn.send(
                "GET /chat HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                 sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            )
            .await
            .expect("litegate reads");
            let head = timeout(SOON, conn.head()).await.expect("in time").expect("an answer");
            assert_eq!((head.status, head.field("upgrade")), (101, Some("websocket")));
            assert_eq!(head.field("x-by"), Some(by));
            if says {
                let accept = head.field("sec-websocket-accept");
                assert_eq!(accept, Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
            }
            // A text frame comes back as it is.
            let frame = [&[0x81, 126, 1, 0][..], &[b'x'; 256]].concat();
            conn.stream.write_all(&frame).await.expect("litegate reads");
            let mut back = vec![0; frame.len()];
            let read = timeout(SOON, conn.stream.read_exact(&mut back)).await;
            read.expect("in time").expect("it comes back");
            assert_eq!(back, frame);
            conn.stream.shutdown().await.expect("half a close");
            let mut rest = Vec::new();
            let end = timeout(SOON, conn.stream.read_to_end(&mut rest)).await;
            assert_eq!(end.expect("in time").expect("an end"), 0);
        }
        // From one that speaks HTTP/2.
        let socket = TcpStream::connect(gate.address()).await.expect("it listens");
        let (client, connection) = h2::client::handshake(socket).await.expect("a handshake");
        tokio::spawn(connection);
        let mut client = client.ready().await.expect("it goes on");
        let ask = |path: &str| {
            let mut request = Request::builder()
                .method("CONNECT")
                .uri(format!("http://app.test{path}"))
                .header("sec-websocket-version", "13")
                .body(())
                .expect("a request");
            request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
            request
        };
        let (response, mut up) = client.send_request(ask("/chat"), false).expect("it goes out");
        let response = timeout(SOON, response).await.expect("in time").expect("an answer");
        assert_eq!(
            (response.status(), &response.headers()["x-by"]),
            (StatusCode::OK, &by.parse().expect("a value"))
        );
        up.send_data(Bytes::from_static(&[0x81, 1, b'x']), false).expect("it goes out");
        let mut down = response.into_body();
        let data = timeout(SOON, down.data()).await.expect("in time").expect("it goes on");
        assert_eq!(&data.expect("whole")[..], &[0x81, 1, b'x']);
        up.send_reset(h2::Reason::CANCEL);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(1);
        while gate.metric("litegate_tunnels", "").await > 0 {
            assert!(tokio::time::Instant::now() < deadline, "an abort ends it");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let wanted = if says { 3 } else { 0 };
        assert_eq!(node.requests.load(Ordering::SeqCst), wanted);
        if says {
            let (response, _up) = client.send_request(ask("/refused"), false).expect("it goes out");
            let response = timeout(SOON, response).await.expect("in time").expect("an answer");
            assert_eq!(response.status(), 401);
            let data = response.into_body().data().await.expect("a body").expect("it is whole");
            assert_eq!(data, "who are you?");
        }
    }
}

/// How a side's direction of a tunnel ended, as its peer sees it.
#[derive(Debug, Eq, PartialEq)]
enum End {
    Clean,
    Aborted,
}

/// Reads a direction to its end.
async fn end(mut stream: h2::RecvStream) -> End {
    loop {
        match timeout(SOON, stream.data()).await.expect("in time") {
            None => return End::Clean,
            Some(Ok(data)) => drop(stream.flow_control().release_capacity(data.len())),
            Some(Err(_)) => return End::Aborted,
        }
    }
}

/// A node that makes tunnels and sends back what comes first. With what comes next it resets the one
/// whose path is a reason, and ends that of `/end`. Says how the client's direction ended.
async fn resetting(said: tokio::sync::mpsc::Sender<End>) -> Node {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.expect("a connection");
        let mut builder = h2::server::Builder::new();
        builder.enable_connect_protocol();
        let mut connection = builder.handshake::<_, Bytes>(socket).await.expect("HTTP/2");
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let said = said.clone();
            let mut down = respond.send_response(Response::new(()), false).expect("it goes out");
            tokio::spawn(async move {
                let path = request.uri().path().to_owned();
                let mut up = request.into_body();
                let first = up.data().await.expect("it goes on").expect("it goes on");
                down.send_data(first, false).expect("it goes out");
                if path != "/stay" {
                    up.data().await.expect("it goes on").expect("it goes on");
                }
                match path.trim_start_matches('/').parse::<u32>() {
                    Ok(reason) => down.send_reset(reason.into()),
                    Err(_) if path == "/end" => {
                        down.send_data(Bytes::new(), true).expect("it goes out");
                    }
                    Err(_) => {}
                }
                let _ = said.try_send(end(up).await);
            });
        }
    });
    Node { address, connections: Arc::default(), requests: Arc::default() }
}

/// RFC 8441 section 5: what ends orderly says `END_STREAM`, and a reset is an abort, whatever its
/// reason. `NO_ERROR` is only for who has answered in full (RFC 9113 section 8.1).
#[tokio::test]
async fn an_aborted_tunnel_does_not_look_closed() {
    let (said, mut heard) = tokio::sync::mpsc::channel(16);
    let node = resetting(said).await;
    let gate = node.gate("").await;
    let socket = TcpStream::connect(gate.address()).await.expect("it listens");
    let (client, connection) = h2::client::handshake(socket).await.expect("a handshake");
    tokio::spawn(connection);
    let mut client = client.ready().await.expect("it goes on");
    let no_error: u32 = h2::Reason::NO_ERROR.into();
    let (cancel, internal) = (h2::Reason::CANCEL.into(), h2::Reason::INTERNAL_ERROR.into());
    for by_node in [true, false] {
        for reason in [Some(no_error), Some(cancel), Some(internal), None] {
            let what = format!("by the node: {by_node}, {reason:?}");
            let path = match reason {
                _ if !by_node => "stay".to_owned(),
                Some(reason) => reason.to_string(),
                None => "end".to_owned(),
            };
            let mut request = Request::builder()
                .method("CONNECT")
                .uri(format!("http://app.test/{path}"))
                .header("sec-websocket-version", "13")
                .body(())
                .expect("a request");
            request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
            let (response, mut up) = client.send_request(request, false).expect("it goes out");
            up.send_data(Bytes::from_static(b"x"), false).expect("it goes out");
            let response = timeout(SOON, response).await.expect("in time").expect("an answer");
            let mut down = response.into_body();
            let first = timeout(SOON, down.data()).await.expect("in time").expect("it goes on");
            assert_eq!(first.expect("it goes on"), "x", "{what}");
            let want = if reason.is_some() { End::Aborted } else { End::Clean };
            if by_node {
                up.send_data(Bytes::from_static(b"y"), false).expect("it goes out");
                assert_eq!(end(down).await, want, "{what}");
                // Who sees it closed closes as well.
                let _ = up.send_data(Bytes::new(), true);
                timeout(SOON, heard.recv()).await.expect("in time").expect("it says so");
            } else {
                match reason {
                    Some(reason) => up.send_reset(reason.into()),
                    None => up.send_data(Bytes::new(), true).expect("it goes out"),
                }
                let seen = timeout(SOON, heard.recv()).await.expect("in time");
                assert_eq!(seen, Some(want), "{what}");
            }
        }
    }
}

/// Two requests are under way when the node says that it looks at the first alone: the second is
/// sent again, though it writes, and the first is answered.
#[tokio::test]
async fn streams_above_the_last_are_sent_again_and_those_below_finish() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    tokio::spawn(async move {
        let (mut first, _) = listener.accept().await.expect("a connection");
        first.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.expect("settings go out");
        first.read_exact(&mut [0; 24]).await.expect("a preface");
        let mut heads = 0;
        while heads < 2 {
            let mut head = [0; 9];
            first.read_exact(&mut head).await.expect("a frame");
            let length = usize::from(head[1]) * 256 + usize::from(head[2]);
            first.read_exact(&mut vec![0; length]).await.expect("its payload");
            heads += usize::from(head[3] == 1);
        }
        // GOAWAY with stream 1, and then its answer: `:status: 200` (RFC 7541 appendix A).
        first.write_all(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]).await.expect("out");
        let (socket, _) = listener.accept().await.expect("another connection");
        tokio::spawn(serve(socket, Fault::None, counted));
        first.write_all(&[0, 0, 1, 1, 5, 0, 0, 0, 1, 0x88]).await.expect("it goes out");
        let _ = first.read_to_end(&mut Vec::new()).await;
    });
    let node = Node { address, connections: Arc::default(), requests };
    let gate = node.gate("").await;
    let (one, two) = tokio::join!(gate.send("POST", "/one", b"x"), gate.send("POST", "/two", b"x"));
    assert_eq!((one.status, two.status), (200, 200), "{} {}", one.text(), two.text());
    assert_eq!(node.requests.load(Ordering::SeqCst), 1, "one ran on either connection");
}

/// A node that keeps going away, as for a roll-out: nothing is lost and nothing runs twice.
#[tokio::test]
async fn a_node_that_goes_away_gracefully_loses_no_write() {
    use std::{collections::HashMap, sync::Mutex};

    const EACH: usize = 5;
    const WRITES: usize = 100;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    let node = Node { address, connections: Arc::default(), requests: Arc::default() };
    let ran: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let (counted, connections) = (Arc::clone(&ran), Arc::clone(&node.connections));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            connections.fetch_add(1, Ordering::SeqCst);
            let counted = Arc::clone(&counted);
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(socket).await else { return };
                let mut taken = 0;
                while let Some(Ok((request, respond))) = connection.accept().await {
                    let path = request.uri().path().to_owned();
                    *counted.lock().expect("no panic before").entry(path).or_default() += 1;
                    tokio::spawn(answer(request, respond));
                    taken += 1;
                    if taken == EACH {
                        connection.graceful_shutdown();
                    }
                }
            });
        }
    });
    let gate = node.gate("").await;
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..10 {
        let address = gate.address();
        tasks.spawn(async move {
            for n in 0..WRITES / 10 {
                let path = format!("/{client}/{n}");
                let answer = client::request(address, "POST", &path, "", b"x").await;
                let answer = answer.expect("an answer");
                assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            }
        });
    }
    while let Some(ended) = timeout(SOON, tasks.join_next()).await.expect("in time") {
        ended.expect("every write is answered");
    }
    let ran = ran.lock().expect("no panic before");
    assert_eq!(ran.len(), WRITES);
    assert!(ran.values().all(|times| *times == 1), "{ran:?}");
    assert!(node.connections.load(Ordering::SeqCst) > 1);
}
