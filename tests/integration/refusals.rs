//! What never becomes a request gets litegate's own answer, once, and one line in the log.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use litegate::testkit::{Options, client::Conn};
use serde_json::Value;
use tokio::{
    io::AsyncReadExt as _,
    time::{Instant, timeout},
};

use crate::gate::Gate;

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;

/// A gate that logs as JSON into a directory of its own.
async fn logging() -> (Gate, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("there is room");
    let path = directory.path().join("access.log");
    let log = format!("format = \"json\"\noutput = {:?}", path.display().to_string());
    let gate =
        Gate::edited(Options::default(), LITEFS, |text| text.replace("format = \"off\"", &log));
    (gate.await, directory)
}

/// Waits for so many lines.
async fn lines(directory: &tempfile::TempDir, count: usize) -> Vec<Value> {
    let path = directory.path().join("access.log");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let all: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        if all.len() >= count {
            return all;
        }
        assert!(Instant::now() < deadline, "{count} lines, not:\n{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What is left until the other side closes.
async fn rest(conn: &mut Conn) -> Vec<u8> {
    let mut rest = Vec::new();
    let end = timeout(Duration::from_secs(5), conn.stream.read_to_end(&mut rest)).await;
    end.expect("the connection is closed").expect("in good order");
    rest
}

struct Case {
    what: &'static str,
    bytes: String,
    status: u16,
    word: &'static str,
    /// As logged, where a head that was consumed leaves nothing to see.
    method: Option<&'static str>,
    target: Option<&'static str>,
}

fn cases() -> Vec<Case> {
    let case = |what, bytes: &str, status, word, method, target| Case {
        what,
        bytes: bytes.to_owned(),
        status,
        word,
        method,
        target,
    };
    let (get, post, here) = (Some("GET"), Some("POST"), Some("/here"));
    let long = |n: usize| "x".repeat(n);
    let many = "x: 1\r\n".repeat(120);
    vec![
        case("one word", "nonsense\r\n\r\n", 400, "malformed", Some("nonsense"), None),
        case("not a method", "G@T /here HTTP/1.1\r\nhost: a\r\n\r\n", 400, "malformed", None, None),
        case("TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400, "malformed", None, None),
        case("a blank target", "GET  HTTP/1.1\r\nhost: a\r\n\r\n", 400, "malformed", None, None),
        case("a future version", "GET /here HTTP/1.7\r\n\r\n", 400, "malformed", get, here),
        case("no version", "GET /here\r\nhost: a\r\n\r\n", 400, "malformed", None, None),
        case(
            "a name with a blank",
            "GET /here HTTP/1.1\r\nho st: a\r\n\r\n",
            400,
            "malformed",
            get,
            here,
        ),
        case("a NUL", "GET /here HTTP/1.1\r\nhost: a\0b\r\n\r\n", 400, "malformed", get, here),
        case(
            "a folded line",
            "GET /here HTTP/1.1\r\nx: a\r\n b\r\n\r\n",
            400,
            "malformed",
            get,
            here,
        ),
        case("no colon", "GET /here HTTP/1.1\r\nhost\r\n\r\n", 400, "malformed", get, here),
        case(
            "two lengths",
            "POST /here HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
            400,
            "malformed",
            post,
            here,
        ),
        case(
            "a negative length",
            "POST /here HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
            400,
            "malformed",
            post,
            here,
        ),
        case(
            "an unknown coding",
            "POST /here HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
            400,
            "malformed",
            None,
            None,
        ),
        case(
            "chunked in HTTP/1.0",
            "POST /here HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "malformed",
            None,
            None,
        ),
        case(
            "not a target",
            "GET /a[`] HTTP/1.1\r\nhost: a\r\n\r\nxy",
            400,
            "malformed",
            None,
            None,
        ),
        case(
            "a host as target",
            "GET here HTTP/1.1\r\nhost: a\r\n\r\n",
            400,
            "malformed",
            get,
            Some("here"),
        ),
        // Seen by the service: a request, if a bad one.
        case("no host", "GET /here HTTP/1.1\r\n\r\n", 400, "malformed", get, here),
        case(
            "a target over the limit",
            &format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", long(5000)),
            414,
            "uri_too_long",
            get,
            None,
        ),
        case(
            "a target over the head's limit",
            &format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", long(20_000)),
            414,
            "uri_too_long",
            get,
            None,
        ),
        case(
            "a target over the limit that goes on",
            &format!("GET /{}", long(20_000)),
            414,
            "uri_too_long",
            get,
            None,
        ),
        case(
            "a large field",
            &format!("POST /here HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", long(20_000)),
            431,
            "head_too_large",
            post,
            here,
        ),
        case(
            "a field without an end",
            &format!("GET /here HTTP/1.1\r\nhost: a\r\nx: {}", long(90_000)),
            431,
            "head_too_large",
            get,
            here,
        ),
        case(
            "many fields",
            &format!("GET /here HTTP/1.1\r\nhost: a\r\n{many}\r\n"),
            431,
            "head_too_large",
            get,
            here,
        ),
        case("a slow head", "GET /here HTTP/1.1\r\nhost: a\r\n", 408, "head_timeout", get, here),
        case("a slow line", "GE", 408, "head_timeout", Some("GE"), None),
    ]
}

#[tokio::test]
async fn each_gets_one_answer_of_litegates_own_and_one_line() {
    let (gate, directory) = logging().await;
    // Alone, and behind a request that is answered first: kept alive, and pipelined.
    let ways = [(0, false), (1, false), (2, true)];
    let all = ways.into_iter().flat_map(|way| cases().into_iter().map(move |case| (way, case)));
    // A few at a time: slow heads are waited for.
    stream::iter(all)
        .map(async |((before, pipelined), case)| {
            let Case { what, status, word, .. } = case;
            let mut conn = gate.conn().await;
            let good = "GET /bytes/70000 HTTP/1.1\r\nhost: a\r\n\r\n".repeat(before);
            if pipelined {
                conn.send(good + &case.bytes).await.expect("litegate reads");
            } else {
                conn.send(good).await.expect("litegate reads");
            }
            for _ in 0..before {
                let whole = conn.response(false).await.expect("the request before is answered");
                assert_eq!((whole.status, whole.body.len()), (200, 70_000), "{what}");
            }
            if !pipelined {
                // Whoever is refused early may find the socket closed.
                let _ = conn.send(&case.bytes).await;
            }
            let answer = conn.response(false).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(answer.status, status, "{what}");
            assert_eq!(answer.field("connection"), Some("close"), "{what}");
            assert_eq!(answer.field("content-type"), Some("application/problem+json"), "{what}");
            assert_eq!(answer.field("content-length"), Some(&*answer.body.len().to_string()));
            let proxy = answer.field("proxy-status").unwrap_or_default();
            assert!(
                proxy.starts_with("litegate-") && proxy.contains("; error="),
                "{what}: {proxy}"
            );
            assert!(answer.field("date").is_some(), "{what}");
            let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
            assert_eq!((&body["error"], &body["status"]), (&word.into(), &status.into()), "{what}");
            assert_eq!(rest(&mut conn).await, b"", "{what}: nothing follows");
        })
        .buffer_unordered(6)
        .collect::<Vec<_>>()
        .await;
    let all = lines(&directory, cases().len() * 3 + cases().len() * 3).await;
    assert!(all.iter().all(|l| l["peer"].as_str().is_some_and(|p| p.starts_with("127.0.0.1:"))));
    // Two workers write, so that the order is nobody's.
    let seen = |status: u16, word: &str, method: Option<&str>, target: Option<&str>| {
        let target = target.filter(|_| status != 414);
        format!("{status} {word} {} {}", method.unwrap_or("-"), target.unwrap_or("-"))
    };
    let refused = all.iter().filter(|line| line["status"] != 200);
    let mut refused: Vec<_> = refused
        .map(|line| {
            let status = line["status"].as_u64().and_then(|n| u16::try_from(n).ok());
            let word = line["problem"].as_str().unwrap_or_default();
            let (method, target) = (line["method"].as_str(), line["target"].as_str());
            seen(status.unwrap_or(0), word, method, target)
        })
        .collect();
    let cases = (0..3).flat_map(|_| cases());
    let mut expected: Vec<_> = cases.map(|c| seen(c.status, c.word, c.method, c.target)).collect();
    refused.sort();
    expected.sort();
    assert_eq!(refused, expected);
    let admin = litegate::testkit::client::request(gate.admin(), "GET", "/metrics", "", b"");
    let page = admin.await.expect("an answer").text();
    for (word, status) in [("malformed", "400"), ("head_timeout", "408"), ("uri_too_long", "414")] {
        let n = 3 * self::cases().iter().filter(|case| case.word == word).count();
        let line = format!("litegate_problems_total{{problem=\"{word}\"}} {n}\n");
        assert!(page.contains(&line), "{status} {line}{page}");
    }
}

#[tokio::test]
async fn two_framings_at_once_are_no_request() {
    let gate = Gate::start().await;
    for (what, fields) in [
        ("length first", "content-length: 3\r\ntransfer-encoding: chunked\r\n"),
        ("chunked first", "transfer-encoding: chunked\r\ncontent-length: 3\r\n"),
    ] {
        let mut conn = gate.conn().await;
        let request = format!(
            "POST /echo HTTP/1.1\r\nhost: a\r\n{fields}\r\n1\r\nx\r\n0\r\n\r\n\
             GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
        );
        conn.send(request).await.expect("litegate reads");
        let answer = conn.response(false).await.expect("an answer");
        assert_eq!((answer.status, answer.field("connection")), (400, Some("close")), "{what}");
        assert_eq!(rest(&mut conn).await, b"", "{what}: nothing follows");
    }
}

#[tokio::test]
async fn a_browser_whose_cookies_grew_too_large_reads_html() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    let cookies = "c".repeat(20_000);
    let head =
        format!("GET / HTTP/1.1\r\nhost: a\r\naccept: text/html\r\ncookie: {cookies}\r\n\r\n");
    conn.send(head).await.expect("litegate reads");
    let answer = conn.response(false).await.expect("an answer");
    assert_eq!(
        (answer.status, answer.field("content-type")),
        (431, Some("text/html; charset=utf-8"))
    );
}

#[tokio::test]
async fn a_head_without_a_body_is_answered_without_one() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    conn.send("HEAD / HTTP/1.1\r\nho st: a\r\n\r\n").await.expect("litegate reads");
    let answer = conn.head().await.expect("an answer");
    assert_eq!(answer.status, 400);
    assert_eq!(rest(&mut conn).await, b"");
}

#[tokio::test]
async fn who_has_yet_to_take_an_answer_is_not_hurried_over_the_next_head() {
    let gate = Gate::start().await;
    let mut conn = gate.conn().await;
    // More than the sockets hold, so that it can't be with the kernel.
    conn.send("GET /bytes/16000000 HTTP/1.1\r\nhost: a\r\n\r\nGET /slow").await.expect("it reads");
    // Longer than the head may take.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(conn.response(false).await.expect("whole").body.len(), 16_000_000);
    assert_eq!(conn.response(false).await.expect("and then").status, 408);
}
