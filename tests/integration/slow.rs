//! Clients that take their time over a body or an answer: too little of it ends, a stream does not,
//! and none of them keeps a write of somebody else's waiting.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use litegate::testkit::{Options, client::Conn};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    gate::Gate,
    h2::{clear, get, send, until, whole},
};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const SOON: Duration = Duration::from_secs(20);
/// Between two bytes of who dribbles.
const PIECE: Duration = Duration::from_millis(50);
const REACHED: &str = "litegate_limits_reached_total";

/// A gate with these limits of bodies, and more keys of its cluster.
async fn gate(idle: &str, rate: &str, keys: &str) -> Gate {
    let limits = format!("body_idle = \"{idle}\"\nbody_rate = \"{rate}\"");
    let edit = |text: String| text.replacen("body_idle = \"2s\"", &limits, 1);
    Gate::edited(Options::default(), &format!("{LITEFS}\n{keys}"), edit).await
}

fn length(bytes: usize) -> String {
    format!("content-length: {bytes}\r\n")
}

const CHUNKED: &str = "transfer-encoding: chunked\r\n";

/// Opens a POST and sends the head of it and what of its body is there already.
async fn post(gate: &Gate, target: &str, fields: &str, body: &[u8]) -> Conn {
    let mut conn = gate.conn().await;
    let head = format!("POST {target} HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    conn.send([head.as_bytes(), body].concat()).await.expect("litegate reads");
    conn
}

/// Sends a byte every 50 ms until there is an answer. Returns it, and when it came.
async fn dribbled(mut conn: Conn) -> (u16, String, Duration) {
    let began = Instant::now();
    let answer = async {
        while timeout(PIECE, conn.stream.peek(&mut [0])).await.is_err() {
            conn.send("x").await.expect("litegate reads, or has answered");
        }
        conn.response(false).await.expect("an answer")
    };
    let answer = timeout(SOON, answer).await.expect("it is ended");
    (answer.status, answer.text(), began.elapsed())
}

#[tokio::test]
async fn a_body_that_dribbles_ends_and_a_stream_does_not() {
    let gate = gate("1s", "1KiB", "").await;
    // 20 bytes a second, of a body that is there as a whole.
    let slow = post(&gate, "/kv/a", &length(100_000), b"").await;
    // The same of one that may be a stream.
    let mut stream = post(&gate, "/kv/b", CHUNKED, b"").await;
    // 2000 bytes a second, in pieces that are half as far apart as they may be.
    let mut steady = post(&gate, "/kv/c", &length(5000), b"").await;
    let began = Instant::now();
    let others = async {
        for _ in 0..5 {
            sleep(Duration::from_millis(500)).await;
            stream.send("1\r\nx\r\n").await.expect("litegate reads");
            steady.send([b'x'; 1000]).await.expect("litegate reads");
        }
        stream.send("0\r\n\r\n").await.expect("litegate reads");
        (stream.response(false).await, steady.response(false).await)
    };
    let ((status, text, took), (streamed, sent)) = tokio::join!(dribbled(slow), others);
    assert_eq!(status, 408, "{text}");
    assert!(text.contains("body_slow"), "{text}");
    // The patience, and a tick or two of the clock.
    assert!(took >= Duration::from_millis(900), "{took:?}");
    assert!(began.elapsed() >= Duration::from_millis(2500), "longer than the patience");
    assert_eq!(streamed.expect("an answer").status, 200);
    assert_eq!(sent.expect("an answer").status, 200);
    assert_eq!(gate.metric(REACHED, "limit=\"body_rate\"").await, 1);
    assert_eq!(gate.metric("litegate_problems_total", "\"body_slow\"").await, 1);
    assert!(gate.cluster.written("a").on.is_empty(), "half a body is no write");
    assert_eq!(gate.cluster.written("b").on.len(), 1);
}

#[tokio::test]
async fn a_body_that_dribbles_over_http2_ends_and_its_connection_goes_on() {
    let gate = gate("1s", "1KiB", "").await;
    let mut sender = clear(&gate).await;
    let bytes = futures_util::stream::unfold((), |()| async {
        sleep(PIECE).await;
        Some((Ok(Frame::data(Bytes::from_static(b"x"))), ()))
    });
    let request = Request::post("http://a/kv/a").header("content-length", "100000");
    let request = request.body(BoxBody::new(StreamBody::new(bytes))).expect("a request");
    let (status, body) = whole(send(&mut sender, request).await).await;
    assert_eq!(status, StatusCode::REQUEST_TIMEOUT);
    assert!(String::from_utf8_lossy(&body).contains("body_slow"), "{body:?}");
    let another = whole(send(&mut sender, get("/whoami")).await).await;
    assert_eq!(another.0, StatusCode::OK);
}

#[tokio::test]
async fn dribblers_keep_no_write_of_somebody_else_s_waiting() {
    // The rate is such that all of them stay: it is not by ending them that the others get on.
    let gate = gate("60s", "1B", "max_writes = 64\nmax_writes_wait = \"5s\"").await;
    let large = vec![b'x'; (1 << 20) + (256 << 10)];
    let mut dribbling = Vec::new();
    for n in 0..80 {
        let target = format!("/kv/slow-{n}");
        dribbling.push(match n % 4 {
            0 => post(&gate, &target, &length(10), b"12345").await,
            1 => post(&gate, &target, CHUNKED, b"5\r\n12345\r\n").await,
            2 => {
                let fields = length(10) + "expect: 100-continue\r\n";
                let mut conn = post(&gate, &target, &fields, b"").await;
                let head = timeout(SOON, conn.head()).await.expect("in time").expect("a head");
                assert_eq!(head.status, 100);
                conn.send("12345").await.expect("litegate reads");
                conn
            }
            // More than is kept, so that it is with the node already.
            _ => post(&gate, &target, &length(large.len() + 5), &large).await,
        });
    }
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 80).await;
    let began = Instant::now();
    for n in 0..100 {
        let answer = gate.send("POST", &format!("/kv/quick-{n}"), b"x").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert!(began.elapsed() < Duration::from_secs(5), "none of them waited for a slot");
    // And nothing is wrong with the slow ones but their pace.
    for (n, conn) in dribbling.iter_mut().enumerate() {
        let rest: &[u8] = if n % 4 == 1 { b"0\r\n\r\n" } else { b"67890" };
        conn.send(rest).await.expect("litegate reads");
    }
    for (n, mut conn) in dribbling.into_iter().enumerate() {
        let answer = timeout(SOON, conn.response(false)).await.expect("in time").expect("one");
        assert_eq!(answer.status, 200, "slow-{n}: {}", answer.text());
        assert_eq!(gate.cluster.written(&format!("slow-{n}")).on.len(), 1);
    }
}

#[tokio::test]
async fn the_last_of_a_body_waits_for_a_slot_and_is_told_if_there_is_none() {
    let one = |text: String| text.replacen("workers = 2", "workers = 1", 1);
    let last = async |wait: &str, status| {
        let keys = format!("{LITEFS}\nmax_writes = 1\nmax_writes_wait = \"{wait}\"");
        let gate = Gate::edited(Options::default(), &keys, one).await;
        let mut late = post(&gate, "/kv/late", CHUNKED, b"4\r\nhalf\r\n").await;
        until(&gate, "litegate_http_requests_in_flight", "", |n| n == 1).await;
        let mut first = post(&gate, "/kv/first?wait=2500", &length(1), b"x").await;
        // Both are with the node, and the second runs.
        timeout(SOON, async {
            while gate.cluster.served(0) < 2 {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("it runs");
        late.send("0\r\n\r\n").await.expect("litegate reads");
        let answer = timeout(SOON, late.response(false)).await.expect("in time").expect("one");
        assert_eq!(answer.status, status, "{}", answer.text());
        let on = gate.cluster.written("late").on.len();
        assert_eq!(on, usize::from(status == 200));
        let ran = gate.cluster.written("first").on.len();
        // The first one's time is not over when the other is told.
        assert_eq!(ran, usize::from(status == 200), "in order");
        let answer = timeout(SOON, first.response(false)).await.expect("in time").expect("one");
        assert_eq!(answer.status, 200);
    };
    tokio::join!(last("10s", 200), last("200ms", 503));
}

#[tokio::test]
async fn an_answer_that_nobody_reads_keeps_no_slot() {
    let one = |text: String| text.replacen("workers = 2", "workers = 1", 1);
    let keys = format!("{LITEFS}\nmax_writes = 1\nmax_writes_wait = \"200ms\"");
    let gate = Gate::edited(Options::default(), &keys, one).await;
    let mut unread = post(&gate, "/bytes/16000000", &length(1), b"x").await;
    let head = timeout(SOON, unread.head()).await.expect("in time").expect("a head");
    assert_eq!(head.status, 200);
    let answer = gate.send("POST", "/kv/a", b"x").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 1).await;
}

#[tokio::test]
async fn what_can_t_be_kept_while_it_waits_is_sent_whole_all_the_same() {
    // Nothing may be kept: reading ahead must not lose what it read.
    let edit = |text: String| text.replacen("body_idle", "replay_bytes = \"20KiB\"\nbody_idle", 1);
    let gate = Gate::edited(Options::default(), LITEFS, edit).await;
    for fields in ["", CHUNKED] {
        let mut conn = gate.conn().await;
        let body = vec![b'x'; 100_000];
        let head = "POST /echo HTTP/1.1\r\nhost: a\r\n";
        let sent = if fields.is_empty() {
            [format!("{head}{}\r\n", length(body.len())).as_bytes(), &body].concat()
        } else {
            let size = format!("{head}{CHUNKED}\r\n{:x}\r\n", body.len());
            [size.as_bytes(), &body, b"\r\n0\r\n\r\n"].concat()
        };
        conn.send(sent).await.expect("litegate reads");
        let answer = timeout(SOON, conn.response(false)).await.expect("in time").expect("one");
        assert!(answer.text().contains("\"length\":100000"), "{}", answer.text());
    }
}
