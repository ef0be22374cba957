//! What happens to writes.

use std::time::Duration;

use litegate::testkit::{Naming, Options};
use tokio::time::timeout;

use crate::gate::Gate;

/// A configuration that is wrong on purpose: node 1 is a replica.
const WRONG: &str = r#"primary = { type = "instance", name = "app-1" }"#;

#[tokio::test]
async fn every_mutating_method_runs_once_on_the_primary() {
    let gate = Gate::start().await;
    for method in ["POST", "PUT", "PATCH", "DELETE", "MKCOL", "X-UNKNOWN"] {
        let response = gate.send(method, &format!("/kv/{method}"), b"hello").await;
        assert_eq!(response.status, 200, "{method}: {}", response.text());
        let written = gate.cluster.written(method);
        assert_eq!((written.on, written.bytes), (vec![0], 5), "{method}");
    }
}

#[tokio::test]
async fn a_replica_s_replay_is_followed_with_the_whole_body() {
    for bytes in [0, 1, 1000, 300_000, 900_000] {
        let gate = Gate::with(Options::default(), WRONG).await;
        let response = gate.send("POST", "/kv/a", &vec![b'x'; bytes]).await;
        assert_eq!(response.status, 200, "{bytes}: {}", response.text());
        let written = gate.cluster.written("a");
        assert_eq!((written.on, written.bytes), (vec![0], bytes));
    }
}

#[tokio::test]
async fn a_name_learned_from_a_replay_is_used_for_the_next_write() {
    let gate = Gate::with(Options::default(), WRONG).await;
    gate.send("POST", "/kv/a", b"x").await;
    gate.until(|topology| topology.primary().is_some_and(|node| &*node.name == "app-0")).await;
}

#[tokio::test]
async fn an_unnamed_primary_and_a_node_that_names_itself_are_waited_for() {
    for naming in [Naming::Itself, Naming::Empty] {
        let keys = format!("{WRONG}\nhold = {{ timeout = \"400ms\" }}");
        let gate = Gate::with(Options::default(), &keys).await;
        gate.cluster.naming(1, naming.clone());
        let response = gate.send("POST", "/kv/a", b"x").await;
        assert_eq!(response.status, 503, "{naming:?}: {}", response.text());
        assert!(response.field("retry-after").is_some());
        assert!(gate.cluster.written("a").on.is_empty(), "{naming:?}");
    }
}

#[tokio::test]
async fn no_header_makes_litegate_go_anywhere_else() {
    for value in ["instance=evil.example", "instance=169.254.169.254", "app=other", "leader"] {
        let keys = format!("{WRONG}\nhold = {{ timeout = \"200ms\" }}");
        let gate = Gate::with(Options::default(), &keys).await;
        gate.cluster.naming(1, Naming::Value(value.into()));
        let response = gate.send("POST", "/kv/a", b"x").await;
        assert!((500..600).contains(&response.status), "{value}: {}", response.text());
        assert!(gate.cluster.written("a").on.is_empty(), "{value}");
    }
}

#[tokio::test]
async fn writes_wait_for_a_primary_and_then_run_once() {
    let gate = Gate::start().await;
    gate.cluster.step_down();
    gate.until(|topology| topology.primary.is_none()).await;
    let writes = async {
        let all = (0..20).map(|n| {
            let target = format!("/kv/held-{n}");
            let gate = &gate;
            async move { gate.send("POST", &target, b"x").await.status }
        });
        futures_util::future::join_all(all).await
    };
    let promote = async {
        // Reads go on meanwhile.
        assert_eq!(gate.send("GET", "/kv/any", b"").await.status, 200);
        tokio::time::sleep(Duration::from_millis(100)).await;
        gate.cluster.promote(2);
    };
    let (statuses, ()) = tokio::join!(writes, promote);
    assert_eq!(statuses, vec![200; 20]);
    for n in 0..20 {
        assert_eq!(gate.cluster.written(&format!("held-{n}")).on, [2]);
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_takes_its_write_along() {
    let gate = Gate::start().await;
    gate.cluster.step_down();
    gate.until(|topology| topology.primary.is_none()).await;
    let mut conn = gate.conn().await;
    conn.send("POST /kv/left HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx")
        .await
        .expect("litegate reads");
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(conn);
    tokio::time::sleep(Duration::from_millis(200)).await;
    gate.cluster.promote(1);
    assert_eq!(gate.send("POST", "/kv/stayed", b"x").await.status, 200);
    assert_eq!(gate.cluster.written("left").on, [0usize; 0]);
}

#[tokio::test]
async fn a_write_that_finds_no_primary_in_time_is_told_so() {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\nhold = { timeout = \"200ms\" }";
    let gate = Gate::with(Options::default(), keys).await;
    gate.cluster.step_down();
    gate.until(|topology| topology.primary.is_none()).await;
    let response = gate.send("POST", "/kv/a", b"x").await;
    assert_eq!(response.status, 503);
    assert_eq!(response.field("retry-after"), Some("5"));
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    assert!(response.field("proxy-status").is_some_and(|s| s.contains("destination_unavailable")));
}

#[tokio::test]
async fn a_write_whose_node_hangs_up_is_never_repeated() {
    let gate = Gate::start().await;
    let response = gate.send("POST", "/fault/reset", b"x").await;
    assert_eq!(response.status, 502);
    assert!(response.text().contains("maybe_executed"), "{}", response.text());
    assert_eq!((0..3).map(|n| gate.cluster.served(n)).sum::<u64>(), 1);
}

#[tokio::test]
async fn a_node_s_refusal_of_an_upload_reaches_the_client() {
    let gate = Gate::start().await;
    let response = gate.send("POST", "/fault/early", &vec![b'x'; 4 << 20]).await;
    assert_eq!(response.status, 413, "{}", response.text());
}

#[tokio::test]
async fn so_many_writes_run_at_once_and_the_others_wait_in_order_or_are_told() {
    const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
    let one = |text: String| text.replacen("workers = 2", "workers = 1", 1);
    let keys = format!("{LITEFS}\nmax_writes = 1\nmax_writes_wait = \"200ms\"");
    let gate = Gate::edited(Options::default(), &keys, one).await;
    let second = async {
        // The first one has its place.
        timeout(Duration::from_secs(10), async {
            while gate.cluster.served(0) == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("it runs");
        gate.send("POST", "/kv/b", b"x").await
    };
    let (first, second) = tokio::join!(gate.send("POST", "/kv/a?wait=1500", b"x"), second);
    assert_eq!((first.status, second.status), (200, 503), "{}", second.text());
    let status = second.field("proxy-status").unwrap_or_default();
    assert!(status.contains("connection_limit_reached"), "{status}");
    assert!(second.field("retry-after").is_some());
    assert!(gate.cluster.written("b").on.is_empty());

    let keys = format!("{LITEFS}\nmax_writes = 1\nmax_writes_wait = \"10s\"");
    let gate = Gate::edited(Options::default(), &keys, one).await;
    let (first, second) =
        tokio::join!(gate.send("POST", "/kv/a?wait=300", b"x"), gate.send("POST", "/kv/b", b"x"));
    assert_eq!((first.status, second.status), (200, 200));
}

#[tokio::test]
async fn a_chain_of_replays_ends_after_so_many_hops() {
    let keys = format!("{WRONG}\nreplay = {{ max_hops = 2 }}\nhold = {{ timeout = \"5s\" }}");
    let gate = Gate::with(Options::default(), &keys).await;
    gate.cluster.step_down();
    for (node, next) in [(0, "app-1"), (1, "app-2"), (2, "app-0")] {
        gate.cluster.naming(node, Naming::Value(format!("instance={next}")));
    }
    let response = gate.send("POST", "/kv/a", b"x").await;
    assert_eq!(response.status, 502, "{}", response.text());
    let status = response.field("proxy-status").unwrap_or_default();
    assert!(status.contains("proxy_loop_detected"), "{status}");
    assert_eq!(response.field("fly-replay"), None);
    assert!(gate.cluster.written("a").on.is_empty());
}
