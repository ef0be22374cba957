//! Hostile clients beside well-behaved ones: the former's connections end, the latter notice nothing.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use litegate::testkit::client::Conn;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    gate::Gate,
    h2::{clear, get, send, until, whole},
};

const SOON: Duration = Duration::from_secs(20);
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// `:method: GET`, `:scheme: http`, `:path: /`, `:authority: a`.
const HEAD: &[u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'a'];

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("it is short").to_be_bytes();
    let head = [length[1], length[2], length[3], kind, flags];
    [&head[..], &stream.to_be_bytes(), payload].concat()
}

/// Clients that behave, on HTTP/1.1 and HTTP/2, one request after the other.
struct Beside {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Beside {
    async fn start(gate: &Gate) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut conn = gate.conn().await;
        let mut sender = clear(gate).await;
        let (its, counted) = (Arc::clone(&stop), Arc::clone(&served));
        let h1 = async move {
            while !its.load(Ordering::Relaxed) {
                let answer = timeout(SOON, conn.request("GET", "/whoami", "", b"")).await;
                assert_eq!(answer.expect("in time").expect("an answer").status, 200);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        };
        let (its, counted) = (Arc::clone(&stop), Arc::clone(&served));
        let h2 = async move {
            while !its.load(Ordering::Relaxed) {
                assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        };
        Self { stop, served, tasks: vec![tokio::spawn(h1), tokio::spawn(h2)] }
    }

    /// Waits until the hostile ones are done, and a while longer for the others.
    async fn during<T>(&self, hostile: impl Future<Output = T>) -> T {
        let done = hostile.await;
        let seen = self.served.load(Ordering::Relaxed);
        let deadline = Instant::now() + SOON;
        while self.served.load(Ordering::Relaxed) < seen + 10 {
            assert!(Instant::now() < deadline, "those beside are not served any more");
            sleep(Duration::from_millis(5)).await;
        }
        done
    }

    /// None of them was ever refused, reset or left waiting.
    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            timeout(SOON, task).await.expect("in time").expect("it was served all the time");
        }
    }
}

/// Sends a flood, and waits until its connection is ended.
async fn flooded(gate: &Gate, what: &str, flood: &[u8]) {
    let socket = TcpStream::connect(gate.address()).await.expect("it listens");
    let (mut read, mut write) = socket.into_split();
    let answers = tokio::spawn(async move {
        let mut rest = Vec::new();
        let _ = read.read_to_end(&mut rest).await;
    });
    let opening = [PREFACE, &frame(4, 0, 0, &[])].concat();
    write.write_all(&opening).await.expect("litegate reads");
    let _ = write.write_all(flood).await;
    timeout(SOON, answers).await.unwrap_or_else(|_| panic!("{what}: goes on")).expect("read");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_end_the_connection_and_nobody_elses() {
    let gate = Gate::start().await;
    let beside = Beside::start(&gate).await;
    let id = |n: u32| 1 + 2 * n;
    let begun = || frame(1, 4, 1, HEAD);
    let taken_back = |n| [frame(1, 5, id(n), HEAD), frame(3, 0, id(n), &[0, 0, 0, 8])].concat();
    // RFC 9113 section 6.9.1: a window over 2^31 is an error of the stream, which we have to reset.
    let too_much = [0x7f, 0xff, 0xff, 0xff];
    let broken = |n| [frame(1, 5, id(n), HEAD), frame(8, 0, id(n), &too_much)].concat();
    let mut endless = frame(1, 1, 1, HEAD);
    for _ in 0..20_000 {
        endless.extend(frame(9, 0, 1, &[0x40, 1, b'x', 1, b'y']));
    }
    for (what, limit, flood) in [
        ("pings", "frames", frame(6, 0, 0, &[0; 8]).repeat(5000)),
        ("settings", "frames", frame(4, 0, 0, &[]).repeat(5000)),
        ("priorities", "frames", frame(2, 0, 1, &[0, 0, 0, 3, 1]).repeat(5000)),
        ("window updates", "frames", frame(8, 0, 0, &[0, 0, 0, 1]).repeat(5000)),
        ("empty data", "frames", [begun(), frame(0, 0, 1, &[]).repeat(5000)].concat()),
        ("unknown frames", "frames", frame(99, 0, 0, b"?").repeat(5000)),
        // CVE-2024-27316 and its like
        ("continuations", "header_bytes", endless),
        (
            "empty continuations",
            "header_bytes",
            [frame(1, 1, 1, HEAD), frame(9, 0, 1, &[]).repeat(5000)].concat(),
        ),
        // CVE-2023-44487
        ("requests taken back", "resets", (0..1000).flat_map(taken_back).collect()),
        // CVE-2025-8671
        ("requests broken", "resets", (0..3000).flat_map(broken).collect()),
        (
            "heads without anything",
            "resets",
            (0..3000).flat_map(|n| frame(1, 5, id(n), &[])).collect(),
        ),
    ] {
        let label = format!("limit=\"{limit}\"");
        let before = gate.metric("litegate_limits_reached_total", &label).await;
        beside.during(flooded(&gate, what, &flood)).await;
        let after = gate.metric("litegate_limits_reached_total", &label).await;
        assert_eq!(after, before + 1, "{what} is counted as {limit}");
    }
    assert_eq!(gate.metric("litegate_problems_total", "\"flood\"").await, 9);
    beside.end().await;
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 0).await;
    until(&gate, "litegate_downstream_connections", "", |n| n == 0).await;
}

/// Opens so many connections, sends this on each, and waits until litegate has ended all of them.
async fn hostile(gate: &Gate, connections: usize, bytes: &str, reads: bool) {
    let mut open = Vec::new();
    for _ in 0..connections {
        let mut conn = gate.conn().await;
        conn.send(bytes).await.expect("litegate reads");
        open.push(conn);
    }
    for conn in open {
        if reads {
            ended(conn).await;
        }
    }
}

async fn ended(mut conn: Conn) {
    let mut rest = Vec::new();
    let _ = timeout(SOON, conn.stream.read_to_end(&mut rest)).await.expect("it is ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_end_and_nobody_else_waits() {
    let gate = Gate::start().await;
    let beside = Beside::start(&gate).await;
    let heads = ["GET / HTTP/1.1\r\nhost: a\r\nx: ", "G", "PRI * HTTP/2.0\r\n"];
    beside.during(join_all(heads.map(|head| hostile(&gate, 100, head, true)))).await;
    // A byte from time to time does not help: the whole head has its time.
    let dripping = async {
        let mut conn = gate.conn().await;
        conn.send("GET / HTTP/1.1\r\nhost: a\r\n").await.expect("litegate reads");
        while conn.send("x").await.is_ok() {
            let mut byte = [0];
            let read = timeout(Duration::from_millis(20), conn.stream.read(&mut byte)).await;
            if read.is_ok() {
                break;
            }
        }
        ended(conn).await;
    };
    timeout(SOON, beside.during(dripping)).await.expect("it is ended");
    let counted = gate.metric("litegate_limits_reached_total", "\"header_read\"").await;
    assert!(counted >= 201, "{counted}");
    beside.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_bodies_end_and_nobody_else_waits() {
    let gate = Gate::start().await;
    let beside = Beside::start(&gate).await;
    let heads = ["content-length: 100000", "transfer-encoding: chunked"]
        .map(|framing| format!("POST /kv/a HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n5\r\nhe"));
    beside.during(join_all(heads.iter().map(|head| hostile(&gate, 40, head, true)))).await;
    let counted = gate.metric("litegate_limits_reached_total", "\"body_idle\"").await;
    assert_eq!(counted, 80);
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 200, "no place is left taken");
    beside.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_end_and_nobody_else_waits() {
    let gate = Gate::start().await;
    let beside = Beside::start(&gate).await;
    let mut open = Vec::new();
    for _ in 0..20 {
        let mut conn = gate.conn().await;
        // More than the sockets hold.
        conn.send("GET /bytes/16000000 HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it reads");
        open.push(conn);
    }
    let label = "\"body_idle\"";
    beside.during(until(&gate, "litegate_limits_reached_total", label, |n| n == 20)).await;
    for mut conn in open {
        let answer = timeout(SOON, conn.response(false)).await.expect("in time");
        assert!(!answer.is_ok_and(|answer| answer.complete), "it does not look whole");
    }
    beside.end().await;
}
