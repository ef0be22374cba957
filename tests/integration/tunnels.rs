//! Upgraded connections, when their node or litegate goes.

use std::time::Duration;

use litegate::testkit::client::Conn;
use litegate::{app::Ended, config::load, testkit::Options};
use tokio::{io::AsyncReadExt as _, time::timeout};

use crate::gate::{Gate, config};

const KEYS: &str = r#"primary = { type = "litefs", poll = "100ms" }
timeouts = { tunnel_close = "200ms" }"#;
const PATIENCE: Duration = Duration::from_secs(8);

async fn gate(route: &str) -> Gate {
    Gate::edited(Options::default(), KEYS, |text| format!("{text}\n{route}")).await
}

async fn open(gate: &Gate, path: &str, protocol: &str) -> Conn {
    let mut conn = gate.conn().await;
    let head = format!(
        "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n"
    );
    conn.send(head).await.expect("litegate reads");
    assert_eq!(conn.head().await.expect("a head").status, 101);
    echoes(&mut conn).await;
    conn
}

/// Sends a frame, which comes back.
async fn echoes(conn: &mut Conn) {
    conn.send(b"\x82\x03abc").await.expect("the tunnel is open");
    let mut echo = [0; 5];
    let read = timeout(PATIENCE, conn.stream.read_exact(&mut echo)).await;
    read.expect("in time").expect("the tunnel is open");
    assert_eq!(&echo, b"\x82\x03abc");
}

/// Everything that comes until the end.
async fn rest(conn: &mut Conn) -> Vec<u8> {
    let mut all = Vec::new();
    let read = timeout(PATIENCE, conn.stream.read_to_end(&mut all)).await;
    // However it ended.
    let _ = read.expect("it ends in time");
    all
}

#[tokio::test]
async fn websockets_to_a_demoted_primary_are_told_to_connect_again() {
    let gate = gate("").await;
    let mut conns = Vec::new();
    for _ in 0..6 {
        conns.push(open(&gate, "/upgrade", "websocket").await);
    }
    let mut plain = open(&gate, "/upgrade", "echo").await;
    gate.cluster.promote(1);
    for conn in &mut conns {
        let mut close = [0; 4];
        let read = timeout(PATIENCE, conn.stream.read_exact(&mut close)).await;
        read.expect("in time").expect("a close frame");
        assert_eq!(close, [0x88, 2, 0x03, 0xf4]);
    }
    assert_eq!(rest(&mut plain).await, b"");
    drop(conns);
    let mut again = open(&gate, "/upgrade", "websocket").await;
    echoes(&mut again).await;
    assert!(gate.metric("litegate_tunnels_closed_total", "demoted").await > 0);
}

#[tokio::test]
async fn a_socket_opened_before_discovery_was_configured_anew_follows_the_primary_too() {
    let gate = gate("").await;
    let mut conn = open(&gate, "/upgrade", "websocket").await;
    for lag in ["9s", "8s"] {
        let text = config(&gate.cluster, &format!("{KEYS}\nmax_lag = \"{lag}\""));
        let config =
            load::parse("test.toml", &text, []).unwrap_or_else(|faults| panic!("{faults}"));
        gate.running().reload(config).await.expect("applied");
    }
    echoes(&mut conn).await;
    gate.cluster.promote(1);
    let mut close = [0; 4];
    let read = timeout(PATIENCE, conn.stream.read_exact(&mut close)).await;
    read.expect("in time").expect("a close frame");
    assert_eq!(close, [0x88, 2, 0x03, 0xf4]);
}

#[tokio::test]
async fn a_socket_that_only_reads_stays_with_its_node() {
    let route = "[[route]]\npath = \"/upgrade/reads\"\nclass = \"read\"\n[[route]]\n";
    let gate = gate(route).await;
    let mut reads = open(&gate, "/upgrade/reads", "websocket").await;
    let mut writes = open(&gate, "/upgrade", "websocket").await;
    gate.cluster.promote(1);
    let mut close = [0; 4];
    let read = timeout(PATIENCE, writes.stream.read_exact(&mut close)).await;
    read.expect("in time").expect("a close frame");
    echoes(&mut reads).await;
}

#[tokio::test]
async fn a_drain_says_goodbye_to_websockets() {
    let gate = gate("").await;
    let mut conn = open(&gate, "/upgrade", "websocket").await;
    let (_cluster, running) = gate.into_running();
    running.drain();
    let mut close = [0; 4];
    let read = timeout(PATIENCE, conn.stream.read_exact(&mut close)).await;
    read.expect("in time").expect("a close frame");
    assert_eq!(close, [0x88, 2, 0x03, 0xe9]);
    drop(conn);
    let ended = tokio::task::spawn_blocking(move || running.join()).await.expect("it ends");
    assert_eq!(ended, Ended::Drained);
}

#[tokio::test]
async fn what_comes_ahead_of_the_switch_is_no_request() {
    let gate = gate("").await;
    let mut conn = gate.conn().await;
    let head = "GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
    // What no head may have.
    let ahead = b"\n\0GET / HTTP/1.1\n#\r\r\n\r\n";
    conn.send([head.as_bytes(), ahead].concat()).await.expect("litegate reads");
    // It may come in one piece with the head.
    let mut came = Vec::new();
    let mut sent = ahead.to_vec();
    while !came.ends_with(&sent) {
        let read = timeout(PATIENCE, conn.stream.read_buf(&mut came)).await;
        assert!(read.expect("in time").expect("the tunnel is open") > 0);
        if came.ends_with(ahead) {
            conn.send(b"\nmore").await.expect("the tunnel is open");
            sent.extend_from_slice(b"\nmore");
        }
    }
    assert!(came.starts_with(b"HTTP/1.1 101 "));
}
