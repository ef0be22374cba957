//! A client reads its own writes, through any instance of litegate, or is told that they are lost.

use std::time::Duration;

use litegate::{
    app,
    config::load,
    testkit::{
        Cluster, Options,
        client::{self, Response},
    },
    topology::Node,
};
use tokio::time::{Instant, timeout};

use crate::gate::{Gate, config};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const NEVER: Duration = Duration::from_hours(1);
/// The longest that anything here may take; far less than what LiteFS itself would wait.
const PATIENCE: Duration = Duration::from_secs(4);

/// A client with a jar for the cookies that litegate and LiteFS set.
#[derive(Default)]
struct Client {
    cookies: Vec<(String, String)>,
}

impl Client {
    fn cookie(&self, name: &str) -> Option<&str> {
        self.cookies.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    async fn ask(
        &mut self,
        to: std::net::SocketAddr,
        method: &str,
        target: &str,
        fields: &str,
    ) -> Response {
        let pairs: Vec<_> = self.cookies.iter().map(|(n, v)| format!("{n}={v}")).collect();
        let cookie = if pairs.is_empty() {
            String::new()
        } else {
            format!("cookie: {}\r\n", pairs.join("; "))
        };
        let fields = format!("{cookie}{fields}");
        let body: &[u8] = if method == "POST" { b"v" } else { b"" };
        let call = client::request(to, method, target, &fields, body);
        let response = timeout(PATIENCE, call).await.expect("in time").expect("an answer");
        for (name, value) in &response.fields {
            if name.eq_ignore_ascii_case("set-cookie")
                && let Some((name, rest)) = value.split_once('=')
            {
                let value = rest.split(';').next().unwrap_or_default().to_owned();
                self.cookies.retain(|(known, _)| known != name);
                self.cookies.push((name.to_owned(), value));
            }
        }
        response
    }
}

fn seen(response: &Response) -> (String, u64) {
    assert_eq!(response.status, 200, "{}", response.text());
    let json: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
    (json["node"].as_str().expect("a node").to_owned(), json["count"].as_u64().expect("a count"))
}

/// A gate before a cluster whose replicas get nothing until they are told to.
async fn slow(keys: &str) -> Gate {
    let options = Options { replication: NEVER, ..Options::default() };
    Gate::with(options, &format!("{LITEFS}\n{keys}")).await
}

/// Waits until litegate knows of a first transaction on every node.
async fn warm(gate: &Gate) {
    gate.send("POST", "/kv/first", b"v").await;
    gate.cluster.settled().await;
    gate.until(|topology| topology.nodes.iter().all(|node| !node.progress.get().is_empty())).await;
}

#[tokio::test]
async fn a_read_waits_for_a_replica_that_is_about_to_have_the_write() {
    let gate = slow("consistency = { wait = \"3s\" }").await;
    let mut client = Client::default();
    let written = client.ask(gate.address(), "POST", "/kv/a", "").await;
    assert!(written.field("litegate-token").is_some());
    assert_eq!(seen(&gate.send("GET", "/kv/a", b"").await).1, 0, "without a token it is stale");
    let read = client.ask(gate.address(), "GET", "/kv/a", "");
    let (read, ()) = tokio::join!(read, async {
        gate.metrics().await;
        gate.cluster.delay(1, Some(Duration::ZERO));
    });
    assert_eq!(seen(&read), ("app-1".to_owned(), 1));
}

#[tokio::test]
async fn a_read_goes_to_the_primary_where_no_replica_gets_there() {
    let gate = slow("consistency = { wait = \"50ms\" }").await;
    let mut client = Client::default();
    client.ask(gate.address(), "POST", "/kv/a", "").await;
    let read = client.ask(gate.address(), "GET", "/kv/a", "").await;
    assert_eq!(seen(&read), ("app-0".to_owned(), 1));
    let metrics = gate.metrics().await;
    for line in [
        r#"litegate_token_reads_total{cluster="app",decision="primary"} 1"#,
        r#"litegate_node_txid{cluster="app",node="app-0",database="app.db"} 1"#,
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[tokio::test]
async fn another_instance_honours_the_token_and_a_header_does_as_well_as_a_cookie() {
    let gate = slow("consistency = { wait = \"50ms\" }").await;
    let keys = format!("{LITEFS}\nconsistency = {{ wait = \"50ms\" }}");
    let text = config(&gate.cluster, &keys);
    let other = app::start(load::parse("other.toml", &text, []).expect("it is right"));
    let other = other.expect("it starts");
    let written = gate.send("POST", "/kv/a", b"v").await;
    let token = written.field("litegate-token").expect("a token").to_owned();
    let mut client = Client::default();
    let fields = format!("litegate-token: {token}\r\n");
    // The other one may not have met the cluster yet: then it waits for that, not for the write.
    for _ in 0..10 {
        let read = client.ask(other.listeners[0], "GET", "/kv/a", &fields).await;
        assert_eq!(seen(&read), ("app-0".to_owned(), 1));
    }
    other.stop();
    other.join();
}

#[tokio::test]
async fn a_write_that_a_failover_lost_is_told_once_and_blocks_nobody() {
    let gate = slow("consistency = { wait = \"50ms\" }").await;
    gate.cluster.delay(1, Some(Duration::ZERO));
    gate.cluster.delay(2, Some(Duration::ZERO));
    warm(&gate).await;
    gate.cluster.delay(1, Some(NEVER));
    gate.cluster.delay(2, Some(NEVER));
    let mut client = Client::default();
    for _ in 0..3 {
        client.ask(gate.address(), "POST", "/kv/a", "").await;
    }
    gate.cluster.seize(1);
    gate.until(|t| t.primary().is_some_and(|node| &*node.name == "app-1")).await;
    // The numbers are used again, and more of them.
    for _ in 0..5 {
        gate.send("POST", "/kv/b", b"v").await;
    }
    let began = Instant::now();
    let read = client.ask(gate.address(), "GET", "/kv/a", "").await;
    assert_eq!(read.field("litegate-write-lost"), Some("1"));
    assert_eq!(seen(&read).1, 0);
    assert!(began.elapsed() < PATIENCE, "nobody waits for what will never be");
    let read = client.ask(gate.address(), "GET", "/kv/b", "").await;
    assert_eq!(read.field("litegate-write-lost"), None, "told once");
    assert_eq!(seen(&read).1, 5, "and from then on it sees what is there");
    let metrics = gate.metrics().await;
    let line = r#"litegate_acknowledged_writes_lost_total{cluster="app"} 3"#;
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn what_a_replay_has_an_earlier_primary_answer_is_no_lost_write() {
    let options = Options { replication: Duration::ZERO, ..Options::default() };
    let cluster = Cluster::start(options).await.expect("loopback has ports");
    // The apps themselves: LiteFS's proxy would let none of a replica's answer.
    let places = cluster.places().to_vec();
    let text = places.iter().fold(config(&cluster, LITEFS), |text, place| {
        text.replace(&place.proxy.to_string(), &place.app.to_string())
    });
    let gate = Gate::before(cluster, &text);
    let leads = |name: &'static str| {
        gate.until(move |t| t.primary().is_some_and(|primary| &*primary.name == name))
    };
    leads("app-0").await;
    warm(&gate).await;
    gate.cluster.promote(1);
    leads("app-1").await;
    for _ in 0..3 {
        assert_eq!(gate.send("POST", "/kv/a", b"v").await.status, 200);
    }
    gate.cluster.settled().await;
    let replay = "x-replay: instance=app-0\r\n";
    let answer = Client::default().ask(gate.address(), "POST", "/echo", replay).await;
    assert!(answer.text().contains(r#""node":"app-0""#), "{}", answer.text());
    // What the one before the last acknowledged late would be counted by now.
    gate.cluster.promote(2);
    leads("app-2").await;
    assert_eq!(gate.metric("litegate_acknowledged_writes_lost_total", "").await, 0);
}

#[tokio::test]
async fn a_write_that_survived_a_failover_is_read_on() {
    let gate = Gate::with(Options::default(), LITEFS).await;
    warm(&gate).await;
    let mut client = Client::default();
    client.ask(gate.address(), "POST", "/kv/a", "").await;
    gate.cluster.settled().await;
    gate.cluster.kill(0);
    gate.cluster.promote(1);
    gate.until(|t| t.primary().is_some_and(|node| &*node.name == "app-1")).await;
    for _ in 0..5 {
        let read = client.ask(gate.address(), "GET", "/kv/a", "").await;
        assert_eq!(read.field("litegate-write-lost"), None);
        assert_eq!(seen(&read).1, 1);
    }
}

#[tokio::test]
async fn litefs_s_cookie_counts_and_one_from_the_future_does_not() {
    let gate = slow("consistency = { wait = \"50ms\" }").await;
    let mut client = Client::default();
    let written = client.ask(gate.address(), "POST", "/kv/a", "").await;
    assert!(client.cookie("__txid").is_some(), "{:?}", written.fields);
    client.cookies.retain(|(name, _)| name == "__txid");
    assert_eq!(seen(&client.ask(gate.address(), "GET", "/kv/a", "").await).1, 1);
    // LiteFS would wait five seconds for it, on every node.
    client.cookies = vec![("__txid".to_owned(), "0000000000000fff".to_owned())];
    client.ask(gate.address(), "GET", "/kv/a", "").await;
    let metrics = gate.metrics().await;
    let line = r#"litegate_tokens_invalid_total{cluster="app",reason="future"} 1"#;
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn nonsense_for_a_token_is_counted_and_harms_nobody() {
    let gate = Gate::start().await;
    warm(&gate).await;
    let mut client = Client::default();
    let written = client.ask(gate.address(), "POST", "/kv/a", "").await;
    let token = written.field("litegate-token").expect("a token").to_owned();
    let mut forged = token.clone().into_bytes();
    let last = forged.len() - 2;
    forged[last] = if forged[last] == b'A' { b'B' } else { b'A' };
    let forged = String::from_utf8(forged).expect("ASCII");
    for (text, reason) in [
        (forged, "forged"),
        (token[..token.len() - 8].to_owned(), "reason"),
        ("x!".to_owned(), "malformed"),
        (String::new(), "malformed"),
        ("A".repeat(2000), "oversized"),
    ] {
        let before = gate.metric("litegate_tokens_invalid_total", reason).await;
        let fields = format!("litegate-token: {text}\r\n");
        let read = Client::default().ask(gate.address(), "GET", "/kv/a", &fields).await;
        assert_eq!(read.status, 200, "{text}");
        let after = gate.metric("litegate_tokens_invalid_total", reason).await;
        assert_eq!(after, before + 1, "{text:?} is {reason}");
    }
}

#[tokio::test]
async fn a_client_may_ask_for_more_or_less() {
    let gate = slow("consistency = { wait = \"50ms\" }").await;
    let mut client = Client::default();
    client.ask(gate.address(), "POST", "/kv/a", "").await;
    for (field, node) in [
        ("litegate-consistency: primary", Some("app-0")),
        ("litegate-max-staleness: 1ms", Some("app-0")),
        ("litegate-consistency: session", Some("app-0")),
        ("litegate-consistency: any", None),
    ] {
        let read = client.ask(gate.address(), "GET", "/kv/a", &format!("{field}\r\n")).await;
        let (from, count) = seen(&read);
        match node {
            Some(node) => assert_eq!((&*from, count), (node, 1), "{field}"),
            None => assert_eq!((from == "app-0", count), (false, 0), "{field}"),
        }
    }
    for field in ["litegate-consistency: maybe", "litegate-max-staleness: soon"] {
        let read = client.ask(gate.address(), "GET", "/kv/a", &format!("{field}\r\n")).await;
        assert_eq!(read.status, 400, "{field}");
        assert!(read.text().contains("bad_demand"));
    }
}

#[tokio::test]
async fn the_app_has_the_last_word_on_what_was_a_write() {
    let gate = Gate::start().await;
    warm(&gate).await;
    let read = gate.send("POST", "/search", b"").await;
    assert_eq!((read.field("litegate-token"), read.field("litegate-write")), (None, None));
    let mut client = Client::default();
    let on_primary = "litegate-consistency: primary\r\n";
    let wrote = client.ask(gate.address(), "GET", "/touch/a", on_primary).await;
    assert_eq!(wrote.field("litegate-write"), None, "it stays between the app and litegate");
    assert!(wrote.field("litegate-token").is_some());
    assert_eq!(seen(&client.ask(gate.address(), "GET", "/kv/a", "").await).1, 1);
}

#[tokio::test]
async fn without_litefs_s_proxy_the_position_is_read_from_the_primary() {
    let options = Options { replication: NEVER, ..Options::default() };
    let cluster = Cluster::start(options).await.expect("loopback has ports");
    let mut text = config(&cluster, &format!("{LITEFS}\nconsistency = {{ wait = \"50ms\" }}"));
    for place in cluster.places() {
        let (proxy, app) = (place.proxy.to_string(), place.app.to_string());
        text = text.replace(&format!("address = \"{proxy}\""), &format!("address = \"{app}\""));
    }
    let gate = Gate::before(cluster, &text);
    // Before its feed is there, nobody can say whose an exact position is.
    let is_followed = |node: &Node| node.progress.get().incarnation.is_some();
    gate.until(|topology| topology.primary().is_some_and(is_followed)).await;
    let mut client = Client::default();
    let written = client.ask(gate.address(), "POST", "/kv/a", "").await;
    assert!(client.cookie("__txid").is_some(), "as LiteFS would have: {:?}", written.fields);
    assert_eq!(seen(&client.ask(gate.address(), "GET", "/kv/a", "").await).1, 1);
    let mut all = Vec::new();
    for n in 0..20 {
        let address = gate.address();
        all.push(tokio::spawn(async move {
            let mut client = Client::default();
            client.ask(address, "POST", &format!("/kv/b{n}"), "").await;
            let read = client.ask(address, "GET", &format!("/kv/b{n}"), "").await;
            assert_eq!(seen(&read).1, 1);
        }));
    }
    for one in all {
        one.await.expect("it reads its write");
    }
}

#[tokio::test]
async fn where_positions_are_not_known_reads_follow_the_write_to_the_primary() {
    let options = Options { replication: NEVER, ..Options::default() };
    let keys = r#"primary = { type = "instance", name = "app-0" }"#;
    let gate = Gate::with(options, keys).await;
    let mut client = Client::default();
    client.ask(gate.address(), "POST", "/kv/a", "").await;
    client.cookies.retain(|(name, _)| name != "__txid");
    assert_eq!(seen(&client.ask(gate.address(), "GET", "/kv/a", "").await).1, 1);
    assert_ne!(seen(&gate.send("GET", "/kv/a", b"").await).0, "app-0");
}

#[tokio::test]
async fn on_a_causal_route_everybody_sees_the_last_write_to_a_path() {
    let options = Options { replication: NEVER, ..Options::default() };
    let keys = format!("{LITEFS}\nconsistency = {{ wait = \"50ms\" }}");
    let routes = "\n[[route]]\npath = \"/kv\"\ncausal = 2\n\n[[route]]\npath = \"/\"\n";
    let gate = Gate::edited(options, &keys, |text| text + routes).await;
    gate.send("POST", "/kv/a", b"v").await;
    assert_eq!(seen(&gate.send("GET", "/kv/a", b"").await), ("app-0".to_owned(), 1));
    assert_ne!(seen(&gate.send("GET", "/kv/b", b"").await).0, "app-0", "nobody wrote there");
    let any = "litegate-consistency: any\r\n";
    let read = Client::default().ask(gate.address(), "GET", "/kv/a", any).await;
    assert_eq!(seen(&read).1, 0, "whoever does not mind need not wait");
}

#[tokio::test]
async fn an_answer_that_caches_share_gets_no_cookie() {
    let gate = Gate::start().await;
    warm(&gate).await;
    let written = gate.send("POST", "/kv/a?public=1", b"v").await;
    let is_public =
        written.field("cache-control").is_some_and(|directives| directives.contains("public"));
    let cookies = written.fields.iter().filter(|(name, value)| {
        name.eq_ignore_ascii_case("set-cookie") && value.starts_with("litegate=")
    });
    assert_eq!((is_public, cookies.count()), (true, 0));
    assert!(written.field("litegate-token").is_some(), "a header is nobody else's");
}

#[tokio::test]
async fn behind_a_trusted_proxy_that_speaks_https_the_cookie_is_for_the_host_alone() {
    let gate = Gate::edited(Options::default(), LITEFS, |text| {
        text.replacen("address = ", "trusted_proxies = [\"127.0.0.0/8\"]\naddress = ", 1)
    })
    .await;
    warm(&gate).await;
    let mut client = Client::default();
    let https = "x-forwarded-proto: https\r\n";
    client.ask(gate.address(), "POST", "/kv/a", https).await;
    assert!(client.cookie("__Host-litegate").is_some());
    let mut client = Client::default();
    client.ask(gate.address(), "POST", "/kv/a", "").await;
    assert!(client.cookie("litegate").is_some());
}

#[tokio::test]
async fn a_durable_write_is_answered_once_a_replica_has_it() {
    let gate = slow("durability = { replicas = 1, timeout = \"3s\" }").await;
    let write = gate.send("POST", "/kv/a", b"v");
    let (written, ()) = tokio::join!(write, async {
        gate.metrics().await;
        gate.cluster.delay(2, Some(Duration::ZERO));
    });
    assert_eq!((written.status, written.field("litegate-durability")), (200, None));
    assert_eq!(gate.cluster.count(2, "a"), 1, "it is there before the client hears of it");
}

#[tokio::test]
async fn a_write_that_is_not_safe_in_time_says_so() {
    let gate = slow("durability = { replicas = 1, timeout = \"50ms\" }").await;
    let written = gate.send("POST", "/kv/a", b"v").await;
    let said = written.field("litegate-durability");
    assert_eq!((written.status, said), (200, Some("replicas=0; wanted=1")));

    let keys = "durability = { replicas = 1, timeout = \"50ms\", on_timeout = \"fail\" }";
    let gate = slow(keys).await;
    let written = gate.send("POST", "/kv/a", b"v").await;
    assert_eq!(written.status, 504);
    assert!(written.text().contains("not_durable"), "{}", written.text());
    assert!(written.field("litegate-token").is_some(), "the write is done all the same");
}
