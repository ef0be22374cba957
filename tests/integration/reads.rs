//! What happens to reads.

use std::{collections::BTreeSet, time::Duration};

use litegate::{
    testkit::{Options, client},
    topology::Role,
};

use crate::gate::Gate;

#[tokio::test]
async fn reads_go_to_replicas_only() {
    let gate = Gate::start().await;
    let mut served = BTreeSet::new();
    for _ in 0..60 {
        served.insert(gate.send("GET", "/whoami", b"").await.text());
    }
    assert_eq!(served, BTreeSet::from(["app-1".to_owned(), "app-2".to_owned()]));
}

#[tokio::test]
async fn replicas_take_turns_where_they_should() {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\nbalance = \"round-robin\"";
    let gate = Gate::with(Options::default(), keys).await;
    let mut served = std::collections::BTreeMap::new();
    for _ in 0..60 {
        let node = gate.send("GET", "/whoami", b"").await.text();
        *served.entry(node).or_insert(0) += 1;
    }
    // Each worker takes turns of its own.
    assert_eq!(served.len(), 2, "{served:?}");
    assert!(served.values().all(|count| *count >= 20), "{served:?}");
}

#[tokio::test]
async fn a_dead_replica_costs_no_read() {
    let gate = Gate::start().await;
    gate.cluster.kill(1);
    for _ in 0..50 {
        let response = gate.send("GET", "/whoami", b"").await;
        assert_eq!((response.status, response.text()), (200, "app-2".to_owned()));
    }
}

#[tokio::test]
async fn a_replica_too_far_behind_serves_nothing() {
    let gate = Gate::start().await;
    gate.cluster.lag(1, Duration::from_secs(50));
    gate.until(|topology| {
        let node = topology.named("app-1").expect("it is a member");
        node.freshness == litegate::topology::Freshness::TooFar
    })
    .await;
    for _ in 0..30 {
        assert_eq!(gate.send("GET", "/whoami", b"").await.text(), "app-2");
    }
}

#[tokio::test]
async fn garbage_from_a_node_is_a_502_that_names_it() {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\nretry = { on = [] }";
    let gate = Gate::with(Options::default(), keys).await;
    let response = gate.send("GET", "/fault/garbage", b"").await;
    assert_eq!(response.status, 502);
    assert!(response.field("proxy-status").is_some_and(|s| s.contains(" on app-")), "{response:?}");
}

#[tokio::test]
async fn a_body_that_breaks_off_never_looks_complete() {
    let gate = Gate::start().await;
    for target in ["/fault/half", "/fault/chunk"] {
        for _ in 0..20 {
            // Nothing at all on a used connection would have browsers send the request again.
            let response = client::request(gate.address(), "GET", target, "", b"").await;
            let response = response.expect("a head");
            assert!(!response.complete && response.status == 200, "{target}: {response:?}");
        }
    }
}

#[tokio::test]
async fn reads_stay_in_the_zone_while_it_has_a_replica() {
    let keys = r#"primary = { type = "litefs", poll = "100ms" }"#;
    let gate = Gate::edited(Options::default(), keys, |text| {
        text.replace("workers = 2", "workers = 2\nzone = \"a\"")
            .replace("{ name = \"app-0\"", "{ zone = \"a\", name = \"app-0\"")
            .replace("{ name = \"app-1\"", "{ zone = \"b\", name = \"app-1\"")
            .replace("{ name = \"app-2\"", "{ zone = \"a\", name = \"app-2\"")
    })
    .await;
    gate.until(|topology| topology.nodes.iter().all(|node| node.role != Role::Unknown)).await;
    for _ in 0..30 {
        assert_eq!(gate.send("GET", "/whoami", b"").await.text(), "app-2");
    }
    gate.cluster.kill(2);
    for _ in 0..30 {
        assert_eq!(gate.send("GET", "/whoami", b"").await.text(), "app-1");
    }
}
