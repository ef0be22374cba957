//! What an app can ask for with `fly-replay`, and a trusted peer with Fly's routing headers.

use std::{net::TcpStream, time::Duration};

use litegate::testkit::{Options, client};
use serde_json::Value;
use tokio::time::Instant;

use crate::gate::Gate;

const JSON: &str = "primary = { type = \"litefs\", poll = \"100ms\" }\nreplay = { json = true }";

/// The node that answered, what it saw of the request, and the fields by name.
struct Echo(Value);

impl Echo {
    async fn of(gate: &Gate, method: &str, fields: &str, body: &[u8]) -> Self {
        let answer = client::request(gate.address(), method, "/echo/a?b", fields, body).await;
        let answer = answer.unwrap_or_else(|error| panic!("{fields}: {error}"));
        assert_eq!(answer.status, 200, "{fields}: {}", answer.text());
        assert!(answer.fields.iter().all(|(name, _)| !name.starts_with("fly-replay")));
        Self(serde_json::from_slice(&answer.body).expect("the app echoes"))
    }

    fn field(&self, name: &str) -> Option<&str> {
        let mut all = self.0["fields"].as_array().expect("a list").iter();
        let found = all.find(|field| field[0].as_str().is_some_and(|n| n == name))?;
        found[1].as_str()
    }

    fn node(&self) -> &str {
        self.0["node"].as_str().expect("a name")
    }
}

#[tokio::test]
async fn a_transform_changes_the_replayed_request_and_nothing_about_its_way() {
    let gate = Gate::with(Options::default(), JSON).await;
    let json = r#"{"instance":"app-0","transform":{"path":"/echo/c?d=%2F","delete_headers":["x-gone","cookie"],"set_headers":[{"name":"X-Tenant","value":"blue"},{"name":"x-old","value":"new"}]}}"#;
    // A client can't take away what the app sets by calling it a field of its hop.
    let fields = format!(
        "x-replay-json: {json}\r\nx-gone: 1\r\ncookie: a=b\r\nx-old: old\r\nx-kept: 1\r\n\
         connection: x-tenant\r\nx-tenant: red\r\n"
    );
    for (method, body) in [("GET", &b""[..]), ("GET", b"four")] {
        let echo = Echo::of(&gate, method, &fields, body).await;
        assert_eq!(echo.node(), "app-0");
        assert_eq!(echo.0["target"], "/echo/c?d=%2F");
        assert_eq!(echo.0["length"], body.len());
        for (name, want) in [
            ("x-gone", None),
            ("cookie", None),
            ("x-tenant", Some("blue")),
            ("x-old", Some("new")),
            ("x-kept", Some("1")),
            ("host", Some("test")),
        ] {
            assert_eq!(echo.field(name), want, "{name}");
        }
        assert!(echo.field("fly-replay-src").is_some_and(|src| src.starts_with("instance=app-")));
        assert!(echo.field("via").is_some());
    }
}

#[tokio::test]
async fn a_transform_that_could_do_harm_is_refused() {
    let gate = Gate::with(Options::default(), JSON).await;
    for transform in [
        r#"{"path":"//evil.example/"}"#,
        r#"{"path":"http://evil.example/"}"#,
        r#"{"path":"/a#b"}"#,
        r#"{"path":"/a b"}"#,
        r#"{"set_headers":[{"name":"host","value":"evil.example"}]}"#,
        r#"{"set_headers":[{"name":"transfer-encoding","value":"chunked"}]}"#,
        r#"{"set_headers":[{"name":"content-length","value":"9"}]}"#,
        r#"{"set_headers":[{"name":"connection","value":"close"}]}"#,
        r#"{"set_headers":[{"name":"fly-replay-src","value":"state=x"}]}"#,
        r#"{"set_headers":[{"name":"via","value":"1.1 x"}]}"#,
        r#"{"delete_headers":["via"]}"#,
        r#"{"delete_headers":["host"]}"#,
    ] {
        let json = format!("{{\"instance\":\"app-0\",\"transform\":{transform}}}");
        let fields = format!("x-replay-json: {json}\r\n");
        let answer = client::request(gate.address(), "GET", "/echo", &fields, b"").await;
        let answer = answer.expect("an answer");
        assert_eq!(answer.status, 502, "{transform}");
        assert!(answer.text().contains("bad_replay"), "{transform}: {}", answer.text());
    }
}

#[tokio::test]
async fn without_the_json_form_no_transform_is_obeyed() {
    let gate = Gate::start().await;
    let fields = "x-replay-json: {\"instance\":\"app-0\",\"transform\":{\"path\":\"/x\"}}\r\n";
    let answer = client::request(gate.address(), "GET", "/echo", fields, b"").await;
    assert_eq!(answer.expect("an answer").status, 502);
}

#[tokio::test]
async fn who_wants_to_know_hears_that_the_target_could_not_be_had() {
    // Nobody listens on port 1. Reads begin on the primary, so that it is not tried first.
    let keys = format!("{JSON}\nreads = \"primary\"");
    let gate = Gate::edited(Options::default(), &keys, |text| {
        text.replace("nodes = [", "nodes = [{ name = \"gone\", address = \"127.0.0.1:1\" }, ")
    })
    .await;
    for (what, replay, reason) in [
        ("a stranger", "instance=nobody;fallback=force_self", "no_candidate"),
        ("a region that is none", "region=fra;fallback=prefer_self", "no_candidate"),
        ("a dead node", "instance=gone;fallback=force_self;timeout=5s", "retries_exhausted"),
    ] {
        let echo = Echo::of(&gate, "GET", &format!("x-replay: {replay}\r\n"), b"").await;
        let failed = echo.field("fly-replay-failed").unwrap_or_default();
        assert!(failed.contains(&format!("reason={reason};")), "{what}: {failed}");
        assert!(failed.contains(&format!("replay_source={};", echo.node())), "{what}: {failed}");
    }
}

#[tokio::test]
async fn a_timeout_bounds_how_long_the_target_is_tried() {
    // Its backlog is full, so that connecting to it neither works nor fails.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let socket = socket.expect("a socket");
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&any.into()).and_then(|()| socket.listen(0)).expect("it listens");
    let silent = socket.local_addr().expect("bound").as_socket().expect("an address");
    let mut fill = Vec::new();
    while let Ok(conn) = TcpStream::connect_timeout(&silent, Duration::from_millis(200)) {
        fill.push(conn);
    }
    // Reads begin on the primary, so that nobody tries the silent one first.
    let keys = format!("{JSON}\nreads = \"primary\"\ntimeouts = {{ connect = \"20s\" }}");
    let gate = Gate::edited(Options::default(), &keys, |text| {
        let silent = format!("nodes = [{{ name = \"silent\", address = \"{silent}\" }}, ");
        text.replace("nodes = [", &silent)
    })
    .await;
    let began = Instant::now();
    let fields = "x-replay: instance=silent;timeout=300ms;fallback=force_self\r\n";
    let echo = Echo::of(&gate, "GET", fields, b"").await;
    let failed = echo.field("fly-replay-failed").unwrap_or_default();
    assert!(failed.contains("instance=silent;") && failed.contains("reason=timeout;"), "{failed}");
    // Without a fallback it makes failure faster: for a write, too, which else waited 30 s.
    let fields = "x-replay: instance=silent;timeout=300ms\r\n";
    let answer = client::request(gate.address(), "POST", "/echo", fields, b"x").await;
    assert_eq!(answer.expect("an answer").status, 502);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Whose fly-* fields are believed.
async fn trusting() -> Gate {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\n\
                replay = { primary_region = \"iad\" }";
    Gate::edited(Options::default(), keys, |text| {
        let trust = "address = \"127.0.0.1:0\"\ntrusted_proxies = [\"127.0.0.0/8\"]";
        text.replacen("address = \"127.0.0.1:0\"", trust, 1)
    })
    .await
}

#[tokio::test]
async fn a_trusted_peer_may_force_or_prefer_a_member_for_reads() {
    let gate = trusting().await;
    for (fields, nodes) in [
        ("fly-force-instance-id: app-2\r\n", &["app-2"][..]),
        ("fly-force-instance-id: app-0\r\n", &["app-0"]),
        ("fly-force-region: fra,iad\r\n", &["app-0"]),
        ("fly-prefer-instance-id: app-2\r\n", &["app-2"]),
        ("fly-prefer-region: iad\r\n", &["app-0"]),
        ("fly-prefer-region: fra\r\n", &["app-1", "app-2"]),
    ] {
        for _ in 0..6 {
            let echo = Echo::of(&gate, "GET", fields, b"").await;
            assert!(nodes.contains(&echo.node()), "{fields}: {}", echo.node());
            assert_eq!(echo.field("fly-preferred-instance-unavailable"), None);
        }
        // A forced replica gets no writes.
        let echo = Echo::of(&gate, "POST", fields, b"x").await;
        assert_eq!(echo.node(), "app-0", "{fields}");
    }
    for fields in ["fly-force-instance-id: evil.example\r\n", "fly-force-region: fra\r\n"] {
        let answer = client::request(gate.address(), "GET", "/echo", fields, b"").await;
        assert_eq!(answer.expect("an answer").status, 400, "{fields}");
    }
    let echo = Echo::of(&gate, "GET", "fly-prefer-instance-id: nobody\r\n", b"").await;
    assert_eq!(echo.field("fly-preferred-instance-unavailable"), Some("nobody"));
}

#[tokio::test]
async fn whoever_else_asks_is_not_heard() {
    let gate = Gate::start().await;
    for fields in [
        "fly-force-instance-id: app-0\r\n",
        "fly-force-region: nowhere\r\n",
        "fly-prefer-instance-id: app-0\r\n",
        "fly-preferred-instance-unavailable: x\r\n",
    ] {
        let echo = Echo::of(&gate, "GET", fields, b"").await;
        assert_ne!(echo.node(), "app-0", "{fields}");
        let seen = echo.0["fields"].to_string();
        assert!(!seen.contains("fly-"), "{seen}");
    }
}

#[tokio::test]
async fn who_prefers_a_node_that_is_not_there_is_told_so() {
    let gate = Gate::start().await;
    let echo = Echo::of(&gate, "GET", "x-replay: prefer_instance=nobody\r\n", b"").await;
    assert_eq!(echo.field("fly-preferred-instance-unavailable"), Some("nobody"));
    let echo = Echo::of(&gate, "GET", "x-replay: prefer_instance=app-0\r\n", b"").await;
    assert_eq!(echo.node(), "app-0");
    assert_eq!(echo.field("fly-preferred-instance-unavailable"), None);
}
