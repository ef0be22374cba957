//! A client that gives up is heard of by the node, whatever either speaks, and leaves nothing behind.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use litegate::testkit::Cluster;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::gate::Gate;

const SOON: Duration = Duration::from_secs(10);
/// The promise is a second; the rest is for a machine that has other things to do.
pub(crate) const HEARD: Duration = Duration::from_secs(3);

/// What the node sees of a request.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Saw {
    Began,
    Aborted,
}

/// A node that answers `/wait` and `/upload` never, and `/stream` without end.
pub(crate) async fn node() -> (SocketAddr, mpsc::Receiver<Saw>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    let (say, heard) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let say = say.clone();
            tokio::spawn(async move {
                let mut first = [0; 3];
                socket.peek(&mut first).await.expect("somebody speaks");
                if &first == b"PRI" { h2(socket, say).await } else { http1(socket, say).await }
            });
        }
    });
    (address, heard)
}

async fn http1(mut socket: TcpStream, say: mpsc::Sender<Saw>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.expect("a head"));
    }
    let _ = say.try_send(Saw::Began);
    if head.starts_with(b"GET /stream") {
        let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let _ = socket.write_all(answer).await;
        while socket.write_all(b"5\r\nhello\r\n").await.is_ok() {
            tokio::task::yield_now().await;
        }
    } else {
        while socket.read(&mut [0; 1024]).await.is_ok_and(|n| n > 0) {}
    }
    let _ = say.try_send(Saw::Aborted);
}

async fn h2(socket: TcpStream, say: mpsc::Sender<Saw>) {
    let Ok(mut connection) = h2::server::handshake(socket).await else { return };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let say = say.clone();
        tokio::spawn(async move {
            let _ = say.try_send(Saw::Began);
            if request.uri().path() == "/stream" {
                let Ok(mut body) = respond.send_response(Response::new(()), false) else { return };
                loop {
                    body.reserve_capacity(5);
                    let room = std::future::poll_fn(|cx| body.poll_capacity(cx)).await;
                    if !matches!(room, Some(Ok(_)))
                        || body.send_data(Bytes::from_static(b"hello"), false).is_err()
                    {
                        break;
                    }
                }
            } else {
                let mut body = request.into_body();
                let taken = async {
                    while let Some(Ok(data)) = body.data().await {
                        let _ = body.flow_control().release_capacity(data.len());
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = taken => {}
                    _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => {}
                }
            }
            let _ = say.try_send(Saw::Aborted);
        });
    }
}

/// How a client begins what it then gives up.
#[derive(Clone, Copy, Debug)]
enum Client {
    Http1,
    /// It takes its request back.
    Reset,
    /// It goes away with its connection.
    Gone,
}

pub(crate) async fn heard(node: &mut mpsc::Receiver<Saw>, within: Duration, what: &str) -> Saw {
    let heard = timeout(within, node.recv()).await;
    heard.unwrap_or_else(|_| panic!("not in time: {what}")).expect("the node is there")
}

/// Litegate before this node, which speaks so.
async fn before(node: SocketAddr, protocol: &str) -> Gate {
    let text = format!(
        "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
         \"127.0.0.1:0\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\nupstream = {{ \
         protocol = \"{protocol}\" }}\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", \
         address = \"{node}\" }}] }}\nprimary = {{ type = \"instance\", name = \"a\" }}\n"
    );
    let gate = Gate::before(Cluster::empty(), &text);
    gate.until(|topology| topology.primary.is_some()).await;
    gate
}

#[tokio::test]
async fn an_abort_reaches_the_node_and_frees_everything() {
    for protocol in ["http/1.1", "h2"] {
        let (address, mut node) = node().await;
        let gate = before(address, protocol).await;
        for client in [Client::Http1, Client::Reset, Client::Gone] {
            for (method, path) in [("GET", "/wait"), ("GET", "/stream"), ("POST", "/upload")] {
                let what = format!("{client:?} {path} {protocol}");
                abandon(&gate, client, method, path, &mut node, &what).await;
                assert_eq!(heard(&mut node, HEARD, &what).await, Saw::Aborted, "{what}");
                let deadline = Instant::now() + SOON;
                loop {
                    let in_flight = gate.metric("litegate_http_requests_in_flight", "").await;
                    let clients = gate.metric("litegate_downstream_connections", "").await;
                    let held = gate.metric("litegate_replay_buffer_bytes", "").await;
                    if in_flight + clients + held == 0 {
                        break;
                    }
                    assert!(Instant::now() < deadline, "{what}: {}", gate.metrics().await);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }
}

/// h2 counts the small frames that wait, for all streams of a connection together.
#[tokio::test]
async fn events_that_wait_for_slow_clients_end_nobody_s_stream() {
    let (address, mut node) = node().await;
    let gate = before(address, "h2").await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = TcpStream::connect(gate.address()).await.expect("it listens");
        client.write_all(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("litegate reads");
        assert_eq!(heard(&mut node, SOON, "it begins").await, Saw::Began);
        clients.push(client);
    }
    // While one of them takes its time, what the others do not take fills their windows.
    let mut buffer = vec![0; 64 << 10];
    for client in &mut clients {
        for _ in 0..20 {
            let read = timeout(SOON, client.read_exact(&mut buffer)).await;
            read.expect("in time").expect("it goes on");
        }
    }
}

/// Begins a request, waits until the node has it, and gives it up.
async fn abandon(
    gate: &Gate,
    client: Client,
    method: &str,
    path: &str,
    node: &mut mpsc::Receiver<Saw>,
    what: &str,
) {
    let mut socket = TcpStream::connect(gate.address()).await.expect("it listens");
    let uploads = method == "POST";
    if let Client::Http1 = client {
        let length = if uploads { "content-length: 100000\r\n" } else { "" };
        let head = format!("{method} {path} HTTP/1.1\r\nhost: a\r\n{length}\r\n");
        socket.write_all(head.as_bytes()).await.expect("litegate reads");
        if uploads {
            socket.write_all(&[b'x'; 1000]).await.expect("litegate reads");
        }
        assert_eq!(heard(node, SOON, what).await, Saw::Began, "{what}");
        if path == "/stream" {
            socket.read_exact(&mut [0; 100]).await.expect("it begins");
        }
        return;
    }
    let (sender, driver) = h2::client::handshake(socket).await.expect("it speaks HTTP/2");
    let driver = tokio::spawn(driver);
    let mut sender = sender.ready().await.expect("it takes requests");
    let uri = format!("http://app.test{path}");
    let request = Request::builder().method(method).uri(uri).body(()).expect("a request");
    let (response, mut body) = sender.send_request(request, !uploads).expect("it goes out");
    if uploads {
        body.send_data(vec![b'x'; 1000].into(), false).expect("it goes out");
    }
    assert_eq!(heard(node, SOON, what).await, Saw::Began, "{what}");
    let (mut awaited, mut answer) = (Some(response), None);
    if path == "/stream"
        && let Some(response) = awaited.take()
    {
        let response = timeout(SOON, response).await.expect("in time").expect("it begins");
        let mut stream = response.into_body();
        stream.data().await.expect("it begins").expect("it begins");
        answer = Some(stream);
    }
    if let Client::Gone = client {
        driver.abort();
        let _ = driver.await;
        return;
    }
    body.send_reset(h2::Reason::CANCEL);
    drop((awaited, answer, body, sender));
    // Without anything under way the connection ends by itself.
    let _ = timeout(SOON, driver).await.expect("in time");
}

#[tokio::test]
async fn half_a_body_that_broke_off_while_it_was_held_never_runs() {
    let keys = r#"primary = { type = "litefs", poll = "100ms" }"#;
    let gate = Gate::with(litegate::testkit::Options::default(), keys).await;
    gate.until(|topology| topology.primary.is_some()).await;
    gate.cluster.step_down();
    gate.until(|topology| topology.primary.is_none()).await;
    let mut conns = Vec::new();
    for length in ["transfer-encoding: chunked\r\n\r\n40\r\n", "content-length: 64\r\n\r\n"] {
        let mut conn = gate.conn().await;
        let ask = format!("POST /kv/half HTTP/1.1\r\nhost: a\r\n{length}half");
        conn.send(ask).await.expect("litegate reads");
        conns.push(conn);
    }
    let deadline = Instant::now() + SOON;
    while gate.metric("litegate_held_requests", "").await < 2 {
        assert!(Instant::now() < deadline, "they are not held");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // No more will come, and the client still listens.
    for conn in &mut conns {
        conn.stream.shutdown().await.expect("half a close");
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    gate.cluster.promote(1);
    for conn in &mut conns {
        let mut rest = Vec::new();
        let _ = timeout(SOON, conn.stream.read_to_end(&mut rest)).await;
        assert!(!rest.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&rest));
    }
    assert_eq!(gate.cluster.written("half").on.len(), 0);
}
