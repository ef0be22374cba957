//! What a client may ask of litegate, and how reaching each limit is answered and counted:
//! docs/limits.md names these tests.

use std::time::Duration;

use litegate::{
    config::load,
    testkit::{Options, client::Conn},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    floods::{PREFACE, frame},
    gate::{Gate, config},
    h2::{clear, get, send, until, whole},
};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const SOON: Duration = Duration::from_secs(10);
const REACHED: &str = "litegate_limits_reached_total";

/// A gate with more keys of `[[listener]]`, and more of `[limits]` or tables behind it.
async fn gate(listener: &str, limits: &str) -> Gate {
    Gate::edited(Options::default(), LITEFS, |text| edited(text, listener, limits)).await
}

fn edited(text: String, listener: &str, limits: &str) -> String {
    let text = text.replacen("[[listener]]", &format!("[[listener]]\n{listener}"), 1);
    text.replacen("\n[cluster.app]", &format!("{limits}\n\n[cluster.app]"), 1)
}

async fn reached(gate: &Gate, limit: &str) -> u64 {
    gate.metric(REACHED, &format!("limit=\"{limit}\"")).await
}

/// Waits until a limit was reached so often.
async fn until_reached(gate: &Gate, limit: &str, times: u64) {
    until(gate, REACHED, &format!("limit=\"{limit}\""), |n| n == times).await;
}

/// Whether a connection is ended by the other side before it has sent anything.
async fn is_closed(conn: &mut Conn) -> bool {
    let mut byte = [0];
    let read = timeout(SOON, conn.stream.read(&mut byte)).await.expect("it is answered or closed");
    !matches!(read, Ok(1))
}

/// How many of so many requests are answered otherwise than by 429, each on a connection of its own.
async fn allowed(gate: &Gate, times: usize, opening: &str, fields: &str) -> usize {
    let mut allowed = 0;
    for _ in 0..times {
        let mut conn = gate.conn().await;
        conn.send(opening).await.expect("litegate reads");
        let answer = conn.request("GET", "/whoami", fields, b"").await.expect("an answer");
        if answer.status == 429 {
            assert_eq!(answer.field("retry-after"), Some("1"));
            let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
            assert_eq!(body["error"], "too_many_requests");
        } else {
            assert_eq!(answer.status, 200);
            allowed += 1;
        }
    }
    allowed
}

#[tokio::test]
async fn a_client_may_ask_so_often_whatever_worker_it_meets() {
    // Two workers: with a rate for each there would be twice as many.
    let gate = gate("", "[limits.client]\nrequests = 1\nrequests_burst = 20").await;
    let began = Instant::now();
    let first = allowed(&gate, 60, "", "").await;
    let since = usize::try_from(began.elapsed().as_secs()).expect("not long");
    assert!((20..=21 + since).contains(&first), "{first} in {since} s");
    assert_eq!(reached(&gate, "client.requests").await, 60 - first as u64);
    let told = gate.metric("litegate_problems_total", "\"too_many_requests\"").await;
    assert_eq!(told, 60 - first as u64);
    // What a stranger says of others counts for nothing.
    let lies = allowed(&gate, 20, "", "x-forwarded-for: 192.0.2.1\r\n").await;
    assert!(lies <= 2 + usize::try_from(began.elapsed().as_secs()).expect("not long"), "{lies}");

    // On one connection of HTTP/2 as well: streams are requests.
    let mut sender = clear(&gate).await;
    let mut refused = 0;
    for _ in 0..30 {
        refused += usize::from(whole(send(&mut sender, get("/whoami")).await).await.0 == 429);
    }
    assert!(refused >= 10, "{refused} of 30");

    // A reload without the limit ends it.
    let text = config(&gate.cluster, LITEFS);
    let without = load::parse("test.toml", &text, []).unwrap_or_else(|faults| panic!("{faults}"));
    gate.running().reload(without).await.expect("applied");
    let served = async {
        while gate.send("GET", "/whoami", b"").await.status == 429 {}
        allowed(&gate, 40, "", "").await
    };
    assert_eq!(timeout(SOON, served).await.expect("in time"), 40);
}

#[tokio::test]
async fn the_client_is_the_one_that_a_trusted_proxy_tells_of() {
    let gate = gate(
        "trusted_proxies = [\"127.0.0.0/8\", \"10.0.0.0/8\"]\nproxy_protocol = \"accept\"",
        "[limits.client]\nrequests = 1\nrequests_burst = 5\nexempt = [\"192.0.2.128/25\"]",
    )
    .await;
    let via = |client: &str| format!("x-forwarded-for: {client}\r\n");
    for (what, opening, fields, counted) in [
        ("a client", "", via("192.0.2.1"), true),
        ("with a lie before, and a proxy behind", "", via("192.0.2.9, 192.0.2.1, 10.0.0.1"), true),
        ("another one", "", via("192.0.2.2"), true),
        ("by RFC 7239", "", "forwarded: for=\"[2001:db8::1]:47\";proto=https\r\n".into(), true),
        ("an exempt one", "", via("192.0.2.200"), false),
        ("the proxy itself", "", String::new(), false),
        ("who is hidden", "", via("unknown"), false),
        ("told by a balancer", "PROXY TCP4 192.0.2.3 198.51.100.1 1 2\r\n", via("1.1.1.1"), true),
    ] {
        let began = Instant::now();
        let seen = allowed(&gate, 12, opening, &fields).await;
        let since = usize::try_from(began.elapsed().as_secs()).expect("not long");
        match what {
            // The same client as in the row before, which had its burst.
            "with a lie before, and a proxy behind" => assert!(seen <= 3 + since, "{what}: {seen}"),
            _ if counted => assert!((5..=6 + since).contains(&seen), "{what}: {seen}"),
            _ => assert_eq!(seen, 12, "{what}"),
        }
    }
}

#[tokio::test]
async fn a_client_may_connect_so_often_and_so_fast() {
    let gate_with = |keys: &str| format!("[limits.client]\n{keys}");
    let at_once = gate("proxy_protocol = \"accept\"", &gate_with("connections = 3")).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut conn = at_once.conn().await;
        assert_eq!(conn.request("GET", "/whoami", "", b"").await.expect("an answer").status, 200);
        open.push(conn);
    }
    for times in 1..=5 {
        let mut fourth = at_once.conn().await;
        let _ = fourth.send("GET /whoami HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert!(is_closed(&mut fourth).await);
        assert_eq!(reached(&at_once, "client.connections").await, times);
    }
    let mut other = at_once.conn().await;
    other.send("PROXY TCP4 192.0.2.3 198.51.100.1 1 2\r\n").await.expect("litegate reads");
    let answer = other.request("GET", "/whoami", "", b"").await;
    assert_eq!(answer.expect("another client is let in").status, 200);
    drop(open.pop());
    let again = async {
        loop {
            let mut conn = at_once.conn().await;
            match conn.request("GET", "/whoami", "", b"").await {
                Ok(answer) => return answer.status,
                Err(_closed) => sleep(Duration::from_millis(20)).await,
            }
        }
    };
    assert_eq!(timeout(SOON, again).await.expect("its place is free again"), 200);

    let fast = gate("", &gate_with("connects = 1\nconnects_burst = 6")).await;
    let began = Instant::now();
    let mut let_in = 0;
    for _ in 0..30 {
        let mut conn = fast.conn().await;
        let_in += usize::from(conn.request("GET", "/whoami", "", b"").await.is_ok());
    }
    let since = usize::try_from(began.elapsed().as_secs()).expect("not long");
    assert!((6..=7 + since).contains(&let_in), "{let_in} in {since} s");
    assert_eq!(reached(&fast, "client.connects").await, 30 - let_in as u64);
}

#[tokio::test]
async fn a_listener_has_its_share_of_connections() {
    let one = |text: String| {
        let second = "[[listener]]\naddress = \"127.0.0.1:0\"\n\n[admin]";
        edited(text, "connections = 1", "")
            .replace("workers = 2", "workers = 1")
            .replacen("[admin]", second, 1)
            .replacen("127.0.0.1:0", "127.0.0.2:0", 1)
    };
    let gate = Gate::edited(Options::default(), LITEFS, one).await;
    let [few, many] = gate.running().listeners[..] else { panic!("two listeners") };
    let mut first = Conn::open(few).await.expect("it listens");
    assert_eq!(first.request("GET", "/whoami", "", b"").await.expect("an answer").status, 200);
    until_reached(&gate, "listener.connections", 1).await;
    let mut second = Conn::open(few).await.expect("the kernel takes it");
    second.send("GET /whoami HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("the kernel takes it");
    for _ in 0..20 {
        let answer = litegate::testkit::client::request(many, "GET", "/whoami", "", b"").await;
        assert_eq!(answer.expect("there is room here").status, 200);
    }
    assert_eq!(reached(&gate, "connections").await, 0);
    drop(first);
    let answer = timeout(SOON, second.response(false)).await.expect("its turn");
    assert_eq!(answer.expect("an answer").status, 200);
    until_reached(&gate, "listener.connections", 2).await;
}

#[tokio::test]
async fn each_limit_of_a_message_is_counted() {
    let gate = Gate::start().await;
    let long = |n: usize| "x".repeat(n);
    let many = "x: 1\r\n".repeat(120);
    for (limit, status, head) in [
        ("header_bytes", 431, format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", long(20_000))),
        ("headers", 431, format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n")),
        ("uri_bytes", 414, format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", long(5000))),
        ("uri_bytes", 414, format!("GET /{}", long(20_000))),
        ("header_read", 408, "GET / HTTP/1.1\r\nhost:".to_owned()),
        (
            "body_idle",
            408,
            "POST /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n".to_owned(),
        ),
    ] {
        let before = gate.metric(REACHED, "").await;
        let these = reached(&gate, limit).await;
        let mut conn = gate.conn().await;
        let _ = conn.send(head).await;
        let answer = timeout(SOON, conn.response(false)).await.expect("in time");
        assert_eq!(answer.expect("an answer").status, status, "{limit}");
        until_reached(&gate, limit, these + 1).await;
        assert_eq!(gate.metric(REACHED, "").await, before + 1, "{limit} and no other");
    }
}

#[tokio::test]
async fn idle_connections_and_those_that_carried_enough_are_closed() {
    let gate = gate("", "idle = \"1s\"\nrequests_per_connection = 3").await;
    let mut conn = gate.conn().await;
    conn.send("GET /whoami HTTP/1.1\r\nhost: a\r\n\r\n".repeat(5)).await.expect("litegate reads");
    for n in 1..=3 {
        let answer = conn.response(false).await.expect("an answer");
        let last = (n == 3).then_some("close");
        assert_eq!((answer.status, answer.field("connection")), (200, last), "{n}");
    }
    assert!(is_closed(&mut conn).await, "nothing follows the last one");
    until_reached(&gate, "requests_per_connection", 1).await;
    // Parked in between, which makes a new machinery for the same connection.
    let mut conn = gate.conn().await;
    for n in 1..=3 {
        let answer = conn.request("GET", "/whoami", "", b"").await.expect("an answer");
        assert_eq!(answer.field("connection"), (n == 3).then_some("close"), "{n}");
        if n == 2 {
            conn.send("GET /sleep/1500 HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it reads");
            break;
        }
    }
    let last = timeout(SOON, conn.response(false)).await.expect("in time").expect("an answer");
    assert_eq!((last.status, last.field("connection")), (200, Some("close")));

    let mut sender = clear(&gate).await;
    let mut slow = sender.clone();
    let slow = tokio::spawn(async move { whole(send(&mut slow, get("/sleep/500")).await).await.0 });
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 1).await;
    for _ in 0..2 {
        assert_eq!(whole(send(&mut sender, get("/whoami")).await).await.0, 200);
    }
    assert_eq!(slow.await.expect("it works"), 200, "what is under way is finished");
    let gone = async {
        while sender.ready().await.is_ok() && !sender.is_closed() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, gone).await.expect("it is told to go");
    until_reached(&gate, "requests_per_connection", 3).await;

    let idle = reached(&gate, "idle").await;
    let mut silent = gate.conn().await;
    let mut quiet = gate.conn().await;
    assert_eq!(quiet.request("GET", "/whoami", "", b"").await.expect("an answer").status, 200);
    assert!(is_closed(&mut silent).await && is_closed(&mut quiet).await);
    until_reached(&gate, "idle", idle + 2).await;
}

#[tokio::test]
async fn what_may_be_kept_of_bodies_is_bounded_together() {
    let gate = gate("", "replay_bytes = \"8KiB\"").await;
    let body = vec![b'x'; 100_000];
    assert_eq!(gate.send("POST", "/kv/a", &body).await.status, 200, "it goes on without");
    until_reached(&gate, "replay_bytes", 1).await;
    assert_eq!(gate.metric("litegate_replay_buffer_bytes", "").await, 0);
}

/// Opens HTTP/2 by hand.
async fn raw(gate: &Gate) -> TcpStream {
    let mut socket = TcpStream::connect(gate.address()).await.expect("it listens");
    socket.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.expect("litegate reads");
    socket
}

/// The kind, the stream and the payload of the next frame.
async fn next(socket: &mut TcpStream) -> (u8, u32, Vec<u8>) {
    let mut head = [0; 9];
    let read = timeout(SOON, socket.read_exact(&mut head)).await;
    read.expect("in time").expect("a frame");
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    let read = timeout(SOON, socket.read_exact(&mut payload)).await;
    read.expect("in time").expect("its payload");
    (head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload)
}

/// `:method: GET`, `:scheme: http`, `:authority: a` and that path.
fn head(path: &str) -> Vec<u8> {
    let length = u8::try_from(path.len()).expect("it is short");
    [&[0x82, 0x86, 0x41, 1, b'a', 0x04, length], path.as_bytes()].concat()
}

#[tokio::test]
async fn more_streams_than_allowed_are_refused() {
    let gate = gate("", "streams = 2").await;
    let mut socket = raw(&gate).await;
    let asked: Vec<_> =
        (0..5).flat_map(|n| frame(1, 5, 1 + 2 * n, &head("/sleep/60000"))).collect();
    socket.write_all(&asked).await.expect("litegate reads");
    let mut refused = Vec::new();
    while refused.len() < 3 {
        if let (3, stream, code) = next(&mut socket).await {
            // RFC 9113 section 7: REFUSED_STREAM.
            assert_eq!(code, [0, 0, 0, 7]);
            refused.push(stream);
        }
    }
    assert_eq!(refused, [5, 7, 9]);
    until_reached(&gate, "streams", 3).await;
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 2).await;
}

#[tokio::test]
async fn a_bomb_of_compressed_fields_is_refused() {
    let gate = gate("", "").await;
    // A field of 4000 bytes that is kept in the table of 4096, and references to it: 70 times as
    // much as it came in. The limit is 16 KiB.
    let bomb = |references: usize| {
        let mut bomb = head("/whoami");
        bomb.extend([0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
        bomb.extend([b'y'; 4000]);
        bomb.resize(bomb.len() + references, 0xbe);
        bomb
    };
    // Over the limit, over twice as much, and over what anybody might have meant.
    for (references, label, goes_on) in [
        (5, "\"head_too_large\"", true),
        (10, "\"malformed\"", true),
        (4000, "\"head_too_large\"", false),
    ] {
        let before = gate.metric("litegate_problems_total", label).await;
        let mut socket = raw(&gate).await;
        socket.write_all(&frame(1, 5, 1, &bomb(references))).await.expect("litegate reads");
        socket.write_all(&frame(1, 5, 3, &head("/whoami"))).await.expect("litegate reads");
        let (mut refused, mut served) = (false, false);
        while !(refused && served == goes_on) {
            let (kind, stream, _) = next(&mut socket).await;
            // HEADERS or RST_STREAM of the one, HEADERS of the other, GOAWAY.
            refused |= kind == 7 || (stream == 1 && matches!(kind, 1 | 3));
            served |= stream == 3 && kind == 1;
        }
        until(&gate, "litegate_problems_total", label, |n| n == before + 1).await;
    }
    assert_eq!(reached(&gate, "header_bytes").await, 2);
    assert_eq!(gate.metric("litegate_http_requests_total", "code=\"200\"").await, 2);
}
