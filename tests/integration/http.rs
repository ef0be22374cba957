//! HTTP itself: what a proxy passes on, adds, and refuses.

use litegate::testkit::client::Conn;

use litegate::testkit::{Cluster, Options};

use crate::gate::Gate;

/// Sends raw bytes and reads one answer.
async fn raw(gate: &Gate, bytes: &[u8]) -> (u16, Conn) {
    let mut conn = gate.conn().await;
    conn.send(bytes).await.expect("litegate reads");
    let response = conn.response(false).await.expect("litegate answers");
    (response.status, conn)
}

#[tokio::test]
async fn the_target_arrives_byte_for_byte() {
    let gate = Gate::start().await;
    for target in ["/echo/a%2Fb//c/../d?x=%00&y=a+b&&=", "/echo?", "/echo/%E2%82%AC;p=1"] {
        let echo = gate.send("GET", target, b"").await;
        let echo: serde_json::Value = serde_json::from_slice(&echo.body).expect("the app echoes");
        assert_eq!(echo["target"], target);
    }
}

#[tokio::test]
async fn a_connection_carries_many_requests_and_pipelined_ones_in_order() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    for n in [1, 20_000, 300_000, 0, 5] {
        let response =
            conn.request("GET", &format!("/bytes/{n}"), "", b"").await.expect("kept alive");
        assert_eq!(response.body.len(), n);
    }
    let one = |n| format!("GET /bytes/{n} HTTP/1.1\r\nhost: a\r\n\r\n");
    conn.send([one(1), one(2), one(3)].concat()).await.expect("litegate reads");
    for n in 1..=3 {
        assert_eq!(conn.response(false).await.expect("in order").body.len(), n);
    }
}

#[tokio::test]
async fn an_idle_connection_is_parked_and_comes_back() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    for _ in 0..2 {
        let response = conn.request("GET", "/whoami", "", b"").await.expect("kept alive");
        assert_eq!(response.status, 200);
        // Longer than a connection stays active without a request.
        tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    }
    assert_eq!(conn.request("GET", "/whoami", "", b"").await.expect("kept alive").status, 200);
}

#[tokio::test]
async fn chunked_bodies_trailers_and_hints_pass() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    conn.send(
        "POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    )
    .await
    .expect("litegate reads");
    let echo = conn.response(false).await.expect("the app echoes").text();
    assert!(echo.contains("\"length\":3"), "{echo}");

    conn.send("GET /trailers HTTP/1.1\r\nhost: a\r\nte: trailers\r\n\r\n").await.expect("reads");
    let response = conn.response(false).await.expect("the app answers");
    assert_eq!(response.trailers, [("x-sum".to_owned(), "5".to_owned())]);

    conn.send("GET /hints HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("litegate reads");
    let hints = conn.head().await.expect("an interim response");
    assert_eq!((hints.status, hints.field("link")), (103, Some("</style.css>")));
    assert_eq!(conn.response(false).await.expect("and the final one").text(), "hinted");
}

#[tokio::test]
async fn a_client_that_expects_100_hears_it_when_the_node_says_so() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    conn.send(
        "POST /echo HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n",
    )
    .await
    .expect("litegate reads");
    assert_eq!(conn.head().await.expect("an interim response").status, 100);
    conn.send("ok").await.expect("litegate reads");
    assert_eq!(conn.response(false).await.expect("an answer").status, 200);

    let (status, _) = raw(
        &gate,
        b"POST /fault/early HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n",
    )
    .await;
    assert_eq!(status, 413, "a refusal without 100 comes first");
}

#[tokio::test]
async fn an_upgrade_becomes_a_tunnel() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    conn.send("GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await
        .expect("litegate reads");
    let head = conn.head().await.expect("an answer");
    assert_eq!((head.status, head.field("upgrade")), (101, Some("echo")));
    conn.send("over the wire").await.expect("the tunnel carries");
    let mut buffer = [0; 13];
    tokio::io::AsyncReadExt::read_exact(&mut conn.stream, &mut buffer).await.expect("and back");
    assert_eq!(&buffer, b"over the wire");
}

#[tokio::test]
async fn what_is_not_http_is_refused_and_the_connection_closed() {
    let gate = Gate::start().await;
    let long = |n: usize| "x".repeat(n);
    for (case, bytes, want) in [
        ("not HTTP", "what is this\r\n\r\n".to_owned(), 400),
        ("a bad length", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n".to_owned(), 400),
        (
            "two lengths",
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"
                .to_owned(),
            400,
        ),
        (
            "a coding that does not end in chunked",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n".to_owned(),
            400,
        ),
        ("a blank before the colon", "GET / HTTP/1.1\r\nhost : a\r\n\r\n".to_owned(), 400),
        ("no host", "GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("two hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(), 400),
        ("a long target", format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", long(5000)), 414),
        ("a large head", format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", long(20_000)), 431),
        ("a slow head", "GET / HTTP/1.1\r\nhost: a\r\n".to_owned(), 408),
    ] {
        let (status, mut conn) = raw(&gate, bytes.as_bytes()).await;
        assert_eq!(status, want, "{case}");
        let mut rest = Vec::new();
        let end = tokio::io::AsyncReadExt::read_to_end(&mut conn.stream, &mut rest);
        let end = tokio::time::timeout(std::time::Duration::from_secs(5), end).await;
        assert!(end.is_ok(), "{case}: the connection stays open");
    }
}

#[tokio::test]
async fn an_ambiguous_length_is_made_unambiguous() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    conn.send(
        "POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n\
         1\r\nx\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
    )
    .await
    .expect("litegate reads");
    let response = conn.response(false).await.expect("an answer");
    if response.status == 200 {
        let echo: serde_json::Value = serde_json::from_slice(&response.body).expect("an echo");
        let fields = echo["fields"].to_string().to_ascii_lowercase();
        assert!(!fields.contains("content-length"), "{fields}");
        assert_eq!(echo["length"], 1);
        assert!(conn.response(false).await.is_err(), "what follows is not a request");
    } else {
        assert_eq!(response.status, 400);
    }
}

#[tokio::test]
async fn own_errors_are_json_or_html_as_the_client_likes() {
    let gate = Gate::start().await;
    let json = gate.send("TRACE", "/", b"").await;
    assert_eq!((json.status, json.field("content-type")), (405, Some("application/problem+json")));
    let mut conn = gate.conn().await;
    let html = conn.request("TRACE", "/", "accept: text/html\r\n", b"").await.expect("an answer");
    assert_eq!(html.field("content-type"), Some("text/html; charset=utf-8"));
    assert!(html.text().contains("the request is at fault"));
}

#[tokio::test]
async fn a_request_that_comes_back_is_refused() {
    let gate = Gate::start().await;
    let echo = gate.send("GET", "/echo", b"").await.text();
    let echo: serde_json::Value = serde_json::from_str(&echo).expect("an echo");
    let fields = echo["fields"].as_array().expect("a list").iter();
    let via = fields.filter(|field| field[0] == "via").map(|field| field[1].as_str()).next();
    let via = format!("via: {}\r\n", via.flatten().expect("litegate names itself"));
    let mut conn = gate.conn().await;
    let response = conn.request("GET", "/echo", &via, b"").await.expect("an answer");
    assert_eq!(response.status, 502);
    assert!(response.text().contains("loop"));
}

/// A node that speaks as it is told: it answers every request with this, closes, and hands over
/// what it has read.
async fn node(answer: &'static str) -> (std::net::SocketAddr, tokio::sync::mpsc::Receiver<String>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    let (sender, read) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut text = String::new();
            let mut buffer = [0; 4096];
            // A head, and behind it a body in chunks where there is one.
            while !text.contains("\r\n\r\n")
                || (text.contains("chunked") && text.matches("\r\n\r\n").count() < 2)
            {
                match socket.read(&mut buffer).await {
                    Ok(n) if n > 0 => text.push_str(&String::from_utf8_lossy(&buffer[..n])),
                    _ => break,
                }
            }
            let _ = sender.send(text).await;
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    });
    (address, read)
}

async fn before(node: std::net::SocketAddr) -> Gate {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let text = format!(
        "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
         \"off\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\nmembers = {{ type = \
         \"static\", nodes = [{{ name = \"a\", address = \"{node}\" }}] }}\nprimary = {{ type = \
         \"instance\", name = \"a\" }}\n"
    );
    let gate = Gate::before(cluster, &text);
    gate.until(|topology| topology.primary.is_some()).await;
    gate
}

#[tokio::test]
async fn trailers_of_a_request_reach_the_node() {
    let (node, mut read) = node("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let gate = before(node).await;
    let mut conn = gate.conn().await;
    conn.send(
        "POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
         3\r\nabc\r\n0\r\nx-sum: 3\r\n\r\n",
    )
    .await
    .expect("litegate reads");
    assert_eq!(conn.response(false).await.expect("an answer").status, 200);
    let request = read.recv().await.expect("it was asked").to_ascii_lowercase();
    assert!(request.ends_with("0\r\nx-sum: 3\r\n\r\n"), "{request}");
}

#[tokio::test]
async fn a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection() {
    use tokio::io::AsyncReadExt as _;
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    conn.send("GET /trailers HTTP/1.0\r\nhost: a\r\n\r\n").await.expect("litegate reads");
    let mut answer = String::new();
    conn.stream.read_to_string(&mut answer).await.expect("it is closed at its end");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{answer}");
    assert_eq!(body, "hello", "no chunks");
    // Where the length is known, the connection can be kept.
    let mut conn = gate.conn().await;
    for _ in 0..2 {
        conn.send("GET /bytes/5 HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n")
            .await
            .expect("it is kept");
        let answer = conn.response(false).await.expect("an answer");
        assert_eq!((answer.status, answer.text()), (200, "xxxxx".to_owned()));
    }
}

#[tokio::test]
async fn a_node_of_http_1_0_is_understood() {
    let (node, mut read) = node("HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nold").await;
    let gate = before(node).await;
    let mut conn = gate.conn().await;
    for _ in 0..2 {
        let answer = conn.request("GET", "/a", "", b"").await.expect("an answer");
        assert_eq!((answer.status, answer.text(), answer.complete), (200, "old".to_owned(), true));
        assert!(read.recv().await.expect("it was asked").starts_with("GET /a HTTP/1.1\r\n"));
    }
}
