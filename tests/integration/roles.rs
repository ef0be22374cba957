//! Who is primary, by every kind of source.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use litegate::{
    config::load,
    testkit::{
        Cluster, Options, client,
        consul::{Behaviour, Consul},
    },
    topology::{PrimaryGap, Role, Topology},
};
use tokio::time::{Instant, sleep};

use crate::gate::{self, Gate};

fn source(consul: &Consul) -> String {
    format!(r#"{{ type = "consul", address = "http://{}", key = "litefs/app" }}"#, consul.address())
}

fn is_primary(name: &str) -> impl Fn(&Topology) -> bool {
    move |topology| topology.primary().is_some_and(|node| &*node.name == name)
}

/// A gate whose only source is Consul.
async fn by_consul(consul: &Consul) -> Gate {
    Gate::with(Options::default(), &format!("primary = {}", source(consul))).await
}

async fn page(gate: &Gate, path: &str) -> String {
    let response = client::request(gate.admin(), "GET", path, "", b"").await;
    String::from_utf8(response.expect("the admin listener answers").body).expect("it is text")
}

/// What a metric stands at, over all its labels.
async fn metric(gate: &Gate, labelled: &str) -> u64 {
    let page = page(gate, "/metrics").await;
    let lines = page.lines().filter_map(|line| line.strip_prefix(labelled)?.split(' ').next_back());
    lines.map(|value| value.parse::<u64>().expect("a number")).sum()
}

/// Waits for a condition that nothing announces.
async fn eventually<F: Future<Output = bool>>(what: &str, so: impl Fn() -> F) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !so().await {
        assert!(Instant::now() < deadline, "in time: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// The key names its holder for some seconds after that has died.
#[tokio::test]
async fn a_reload_does_not_bring_a_dead_primary_back() {
    let consul = Consul::start().await.unwrap();
    consul.hold("app-0");
    let sources = |poll: u32| {
        let litefs = format!(r#"{{ type = "litefs", poll = "{poll}ms" }}"#);
        format!("primary = [{litefs}, {}]", source(&consul))
    };
    let gate = Gate::with(Options::default(), &sources(100)).await;
    // The key alone may name it: only a node that has spoken has a history.
    gate.until(|topology| is_primary("app-0")(topology) && !topology.lineage.is_empty()).await;
    gate.cluster.freeze(0, true);
    let roles = |topology: &Topology| [0, 1, 2].map(|n| topology.nodes[n].role);
    let alone = [Role::Unknown, Role::Replica, Role::Replica];
    gate.until(|topology| topology.primary.is_none() && roles(topology) == alone).await;
    let before = metric(&gate, "litegate_primary_changes_total").await;
    for n in 1..=20 {
        let asked = consul.asked();
        let text = gate::config(&gate.cluster, &sources(100 + n));
        let config = load::parse("test.toml", &text, []).expect("it is right");
        gate.running().reload(config).await.expect("it is applied");
        eventually("the key is read", async || consul.asked() > asked).await;
        // It comes from a replica, and nobody waits for the dead one to say so.
        assert_eq!(gate.send("GET", "/whoami", b"").await.status, 200);
    }
    assert_eq!(metric(&gate, "litegate_primary_changes_total").await, before);
}

#[tokio::test]
async fn the_lease_in_consul_is_followed() {
    let consul = Consul::start().await.unwrap();
    consul.hold("app-0");
    let gate = by_consul(&consul).await;
    gate.until(is_primary("app-0")).await;
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 200);
    gate.cluster.promote(2);
    consul.hold("app-2");
    gate.until(is_primary("app-2")).await;
    assert_eq!(gate.send("POST", "/kv/b", b"x").await.status, 200);
    assert_eq!(gate.cluster.written("b").on, [2]);
    for lost in [Consul::release, Consul::expire] {
        lost(&consul);
        gate.until(|topology| topology.primary.is_none()).await;
        consul.hold("app-1");
        gate.until(is_primary("app-1")).await;
    }
    let (target, token) = consul.question();
    assert!(target.starts_with("/v1/kv/litefs/app"), "{target}");
    assert_eq!(token, None);
    assert!(consul.asked() < 40, "{} questions: it waits for news", consul.asked());
}

#[tokio::test]
async fn consul_without_news_is_neither_a_loss_nor_a_claim() {
    let failures = "litegate_role_source_failures_total{cluster=\"app\",source=\"consul\"";
    let wrong = |body: &str| Behaviour::Body(body.to_owned());
    let rows = [
        (Behaviour::Gone, "unreachable"),
        (Behaviour::Leaderless, "unreachable"),
        (Behaviour::Mute, "unreachable"),
        (Behaviour::Forbidden, "malformed"),
        (Behaviour::NoIndex, "malformed"),
        (Behaviour::Endless, "malformed"),
        (wrong("[]"), "malformed"),
        (wrong("what is this"), "malformed"),
        (wrong(r#"[{"Value":"bjE=","ModifyIndex":99}]"#), "malformed"),
    ];
    // Each waits for a second before it asks again: side by side, a few at a time.
    let rows = rows.into_iter().map(async |(behaviour, reason)| {
        let consul = Consul::start().await.unwrap();
        consul.hold("app-0");
        let gate = by_consul(&consul).await;
        gate.until(is_primary("app-0")).await;
        let failures = format!("{failures},reason=\"{reason}\"}}");
        let before = metric(&gate, &failures).await;
        consul.behave(behaviour.clone());
        eventually(&format!("{behaviour:?} is counted"), || async {
            metric(&gate, &failures).await > before
        })
        .await;
        let topology = gate.running().topologies[0].clone().latest().clone();
        assert!(is_primary("app-0")(&topology), "{behaviour:?}");
        // It is heard again at once.
        consul.behave(Behaviour::Right);
        consul.hold("app-1");
        gate.until(is_primary("app-1")).await;
        consul.hold("app-0");
        gate.until(is_primary("app-0")).await;
        assert!(consul.sent() < 64 << 20, "an endless answer is left: {}", consul.sent());
    });
    stream::iter(rows).buffer_unordered(3).collect::<Vec<_>>().await;
}

#[tokio::test]
async fn a_restored_consul_begins_anew() {
    let consul = Consul::start().await.unwrap();
    for _ in 0..300 {
        consul.hold("app-0");
    }
    let gate = by_consul(&consul).await;
    gate.until(is_primary("app-0")).await;
    consul.restore("app-1");
    gate.until(is_primary("app-1")).await;
    consul.hold("app-2");
    gate.until(is_primary("app-2")).await;
}

#[tokio::test]
async fn two_claims_from_the_start_are_a_split_brain_until_consul_settles_it() {
    let consul = Consul::start().await.unwrap();
    let keys = format!(
        "primary = [{{ type = \"litefs\", poll = \"100ms\" }}, {}]\n\
         [cluster.app.hold]\ntimeout = \"300ms\"\n",
        source(&consul)
    );
    let cluster = Cluster::start(Options::default()).await.unwrap();
    cluster.usurp(2);
    let text = gate::config(&cluster, &keys);
    let gate = Gate::before(cluster, &text);
    let split = |t: &Topology| t.nodes.iter().filter(|n| n.fenced).count() == 2;
    gate.until(|t| t.primary_gap == PrimaryGap::SplitBrain && split(t)).await;
    assert_eq!(metric(&gate, "litegate_split_brain{cluster=\"app\"}").await, 1);
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 503);
    assert!(gate.cluster.written("a").on.is_empty());
    assert!(page(&gate, "/api/topology").await.contains("\"fenced\": true"));
    assert_eq!(gate.send("GET", "/whoami", b"").await.body, b"app-1", "reads go to the replica");
    consul.hold("app-2");
    gate.until(is_primary("app-2")).await;
    assert_eq!(metric(&gate, "litegate_split_brain{cluster=\"app\"}").await, 0);
    let fenced = "litegate_node_fenced{cluster=\"app\",node=\"app-0\"}";
    assert_eq!(metric(&gate, fenced).await, 1);
    assert_eq!(gate.send("POST", "/kv/b", b"x").await.status, 200);
    assert_eq!(gate.cluster.written("b").on, [2]);
    gate.cluster.withdraw(0);
    gate.until(|t| t.nodes.iter().all(|n| !n.fenced)).await;
}

#[tokio::test]
async fn a_frozen_primary_is_noticed_within_seconds_whoever_names_it() {
    let consul = Consul::start().await.unwrap();
    consul.hold("app-0");
    let keys =
        format!("primary = [{{ type = \"litefs\", poll = \"100ms\" }}, {}]", source(&consul));
    let gate = Gate::with(Options::default(), &keys).await;
    // By its own word, and not only by the key's.
    gate.until(|t| is_primary("app-0")(t) && t.lineage.len() == 1).await;
    let frozen = Instant::now();
    gate.cluster.freeze(0, true);
    gate.until(|t| t.primary.is_none() && t.primary_gap == PrimaryGap::Unreachable).await;
    assert!(frozen.elapsed() < Duration::from_secs(4), "{:?}", frozen.elapsed());
    gate.cluster.usurp(1);
    consul.hold("app-1");
    gate.until(is_primary("app-1")).await;
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 200);
    // It says that it is primary still: an old claim.
    gate.cluster.freeze(0, false);
    gate.until(|t| is_primary("app-1")(t) && t.nodes.iter().any(|n| n.fenced)).await;
}

#[tokio::test]
async fn a_role_check_is_believed() {
    let keys = r#"primary = { type = "http", path = "/primary", interval = "50ms" }"#;
    let gate = Gate::with(Options::default(), keys).await;
    gate.until(is_primary("app-0")).await;
    gate.cluster.promote(1);
    gate.until(is_primary("app-1")).await;
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 200);
    assert_eq!(gate.cluster.written("a").on, [1]);
    gate.cluster.step_down();
    gate.until(|t| t.primary.is_none() && t.primary_gap == PrimaryGap::Unknown).await;
    gate.cluster.promote(2);
    gate.until(is_primary("app-2")).await;
    gate.cluster.freeze(2, true);
    gate.until(|t| t.primary.is_none() && t.primary_gap == PrimaryGap::Unreachable).await;
}

#[tokio::test]
async fn the_file_of_the_mount_beside_us_is_believed() {
    let mount = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        // Whole at once, as FUSE shows it.
        let new = mount.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, mount.path().join(name)).unwrap();
    };
    write(".lag", "+000000123\n");
    write(".primary", "app-1\n");
    let path = mount.path().join(".primary");
    let keys = format!(
        "primary = {{ type = \"file\", path = \"{}\", instance = \"app-2\", interval = \"10ms\" }}",
        path.display()
    );
    let gate = Gate::with(Options::default(), &keys).await;
    gate.until(is_primary("app-1")).await;
    // This node became primary.
    write(".lag", "+000000000\n");
    std::fs::remove_file(&path).unwrap();
    gate.until(is_primary("app-2")).await;
    // It lost the lease, and nobody is known.
    write(".lag", "+2147483647\n");
    gate.until(|t| t.primary.is_none()).await;
    write(".primary", "app-0:20202\n");
    gate.until(is_primary("app-0")).await;
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 200);
    let failures = "litegate_role_source_failures_total{cluster=\"app\",source=\"file\"";
    write(".primary", &"x".repeat(4096));
    eventually("it is counted", || async { metric(&gate, failures).await > 0 }).await;
}

#[tokio::test]
async fn an_empty_new_primary_gets_no_writes_until_an_operator_confirms_it() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let written = client::request(cluster.places()[0].proxy, "POST", "/kv/a", "", b"x").await;
    assert_eq!(written.unwrap().status, 200);
    let keys = "primary = { type = \"litefs\", poll = \"50ms\" }\n\
                [cluster.app.hold]\ntimeout = \"300ms\"\n";
    let text = gate::config(&cluster, keys);
    let gate = Gate::before(cluster, &text);
    let confirm = async |method: &str, query: &str, fields: &str| {
        let target = format!("/api/confirm{query}");
        let answer = client::request(gate.admin(), method, &target, fields, b"").await;
        answer.expect("the admin listener answers").status
    };
    let (it, other) = ("?cluster=app&node=app-2", "?cluster=app&node=app-1");
    eventually("positions are known", || async {
        let mut reader = gate.running().topologies[0].clone();
        reader.latest().nodes.iter().all(|node| node.progress.get().incarnation.is_some())
    })
    .await;
    // This one's are known with its claim.
    gate.cluster.promote(1);
    gate.until(|t| t.lineage.last().is_some_and(|epoch| epoch.start.is_some())).await;
    gate.cluster.stall(2, true);
    gate.cluster.kill(2);
    eventually("its stream broke", || async {
        let mut reader = gate.running().topologies[0].clone();
        reader.latest().named("app-2").is_some_and(|n| n.progress.get().incarnation.is_none())
    })
    .await;
    gate.cluster.restart_empty(2);
    let is_new = |t: &Topology| t.named("app-2").is_some_and(|node| node.id.0 > 2);
    gate.until(is_new).await;
    assert_eq!(confirm("POST", it, "").await, 409, "nothing to confirm yet");
    gate.cluster.seize(2);
    gate.until(|t| t.primary.is_none() && t.primary_gap == PrimaryGap::Tripped).await;
    assert_eq!(gate.send("POST", "/kv/b", b"x").await.status, 503);
    assert!(gate.cluster.written("b").on.is_empty());
    assert_eq!(metric(&gate, "litegate_tripwire{cluster=\"app\"}").await, 1);
    assert!(page(&gate, "/api/topology").await.contains("\"tripwire\""));
    for (method, query, fields, status) in [
        ("GET", it, "", 405),
        ("POST", "", "", 400),
        ("POST", "?cluster=none&node=app-2", "", 404),
        ("POST", other, "", 409),
        ("POST", it, "origin: http://evil.example\r\n", 403),
    ] {
        assert_eq!(confirm(method, query, fields).await, status, "{method} {query}");
    }
    assert_eq!(confirm("POST", it, "").await, 202);
    gate.until(is_primary("app-2")).await;
    assert_eq!(gate.send("POST", "/kv/c", b"x").await.status, 200);
    assert_eq!(gate.cluster.written("c").on, [2]);
}
