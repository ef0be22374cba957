//! The PROXY protocol, from load balancers and to nodes.

use std::net::SocketAddr;

use litegate::testkit::{
    Cluster, Options,
    client::{Conn, Response},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::gate::Gate;

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const V1: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n";
const V2: &[u8] =
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\xc6\x33\x64\x01\x12\x67\x01\xbb";
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

async fn listening(keys: &str) -> Gate {
    let keys = format!("address = \"127.0.0.1:0\"\n{keys}");
    let edit = |text: String| text.replacen("address = \"127.0.0.1:0\"", &keys, 1);
    Gate::edited(Options::default(), LITEFS, edit).await
}

/// Sends `opening` and asks for an echo twice, over one connection.
async fn echoes(gate: &Gate, opening: &[u8], fields: &str) -> Vec<Response> {
    let mut conn = gate.conn().await;
    let ask = format!("GET /echo HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    conn.send([opening, ask.as_bytes(), ask.as_bytes()].concat()).await.expect("litegate reads");
    let first = conn.response(false).await.expect("an answer");
    let mut all = vec![first];
    all.extend(conn.response(false).await.ok());
    all
}

fn field(response: &Response, name: &str) -> Option<String> {
    let echo: Value = serde_json::from_slice(&response.body).expect("an echo");
    let fields = echo["fields"].as_array().expect("a list").iter();
    let mut values = fields.filter(|f| f[0] == name).filter_map(|f| f[1].as_str());
    values.next().map(str::to_owned)
}

#[tokio::test]
async fn the_client_is_the_one_that_the_header_tells() {
    let gate = listening("proxy_protocol = \"require\"").await;
    for header in [V1, V2] {
        for echo in echoes(&gate, header, "x-forwarded-for: 203.0.113.9\r\n").await {
            assert_eq!(field(&echo, "x-forwarded-for").as_deref(), Some("192.0.2.7"));
            assert_eq!(field(&echo, "x-forwarded-port").as_deref(), Some("443"));
        }
    }
    for header in [LOCAL, b"PROXY UNKNOWN\r\n"] {
        let echo = &echoes(&gate, header, "").await[0];
        assert_eq!(field(echo, "x-forwarded-for").as_deref(), Some("127.0.0.1"));
    }
    let refused = &echoes(&gate, b"", "").await[0];
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("malformed"), "{}", refused.text());
    let status = refused.field("proxy-status").unwrap_or_default();
    assert!(status.contains("needs the PROXY protocol"), "{status}");
}

#[tokio::test]
async fn who_is_trusted_is_a_matter_of_the_told_address() {
    let gate = listening("proxy_protocol = \"accept\"\ntrusted_proxies = [\"192.0.2.0/24\"]").await;
    let said = "x-forwarded-for: 203.0.113.9\r\n";
    let echo = &echoes(&gate, V1, said).await[0];
    assert_eq!(field(echo, "x-forwarded-for").as_deref(), Some("203.0.113.9, 192.0.2.7"));
    // Without a header where there may be none.
    let echo = &echoes(&gate, b"", said).await[0];
    assert_eq!(field(echo, "x-forwarded-for").as_deref(), Some("127.0.0.1"));
}

#[tokio::test]
async fn a_header_from_whoever_may_not_send_one_is_not_http() {
    for keys in [
        "proxy_protocol = \"require\"\nproxy_protocol_from = [\"203.0.113.0/24\"]",
        "proxy_protocol = \"accept\"\nproxy_protocol_from = [\"203.0.113.0/24\"]",
        "proxy_protocol = \"off\"",
    ] {
        let gate = listening(keys).await;
        assert_eq!(echoes(&gate, V1, "").await[0].status, 400, "{keys}");
    }
}

#[tokio::test]
async fn a_broken_or_slow_header_ends_the_connection() {
    let gate = listening("proxy_protocol = \"accept\"").await;
    let broken = &echoes(&gate, b"PROXY TCP4 nobody\r\n", "").await[0];
    assert_eq!(broken.status, 400);
    let mut conn = gate.conn().await;
    conn.send(&V2[..20]).await.expect("litegate reads");
    let mut rest = Vec::new();
    let end =
        tokio::time::timeout(std::time::Duration::from_secs(5), conn.stream.read_to_end(&mut rest));
    assert!(end.await.is_ok(), "the connection stays open");
    assert_eq!(rest, b"");
}

/// A node that answers with what its connection began with, and how many requests that carried.
async fn node() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(introduced(socket));
        }
    });
    address
}

async fn introduced(mut socket: TcpStream) {
    let (mut opening, mut requests) = (None, 0);
    let mut seen = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let Ok(n @ 1..) = socket.read(&mut buffer).await else { return };
        seen.extend_from_slice(&buffer[..n]);
        while let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n" && seen.len() > 30) {
            let mut head: Vec<_> = seen.drain(..end + 4).collect();
            if head == b"\r\n\r\n" {
                // The binary header begins like this.
                head.extend(seen.drain(..24));
                let end = seen.windows(4).position(|w| w == b"\r\n\r\n").expect("in one piece");
                seen.drain(..end + 4);
            }
            let begin = opening.get_or_insert_with(|| head.clone());
            requests += 1;
            let what = if begin.starts_with(b"PROXY ") {
                String::from_utf8_lossy(begin).lines().next().unwrap_or_default().to_owned()
            } else {
                format!("{begin:?}")
            };
            let body = format!("{requests} {what}");
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            if socket.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

#[tokio::test]
async fn nodes_are_told_and_no_connection_speaks_for_two() {
    let node = node().await;
    for (version, is_it) in [("v1", true), ("v2", false)] {
        let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
        let text = format!(
            "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
             \"off\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\nsend_proxy = \
             \"{version}\"\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", address = \
             \"{node}\" }}] }}\nprimary = {{ type = \"instance\", name = \"a\" }}\n"
        );
        let gate = Gate::before(cluster, &text);
        gate.until(|topology| topology.primary.is_some()).await;
        let (mut one, mut other) = (gate.conn().await, gate.conn().await);
        let ask = async |conn: &mut Conn| {
            conn.request("GET", "/", "", b"").await.expect("an answer").text()
        };
        for n in 1..=3 {
            for conn in [&mut one, &mut other] {
                let client = conn.stream.local_addr().expect("connected");
                let answer = ask(conn).await;
                assert!(answer.starts_with(&format!("{n} ")), "{answer}");
                if is_it {
                    let to = gate.address();
                    let want = format!(
                        "{n} PROXY TCP4 127.0.0.1 127.0.0.1 {} {}",
                        client.port(),
                        to.port()
                    );
                    assert_eq!(answer, want);
                } else {
                    let [high, low] = client.port().to_be_bytes();
                    let want = format!("33, 17, 0, 12, 127, 0, 0, 1, 127, 0, 0, 1, {high}, {low},");
                    assert!(answer.contains(&want), "{answer} {want}");
                }
            }
        }
    }
}
