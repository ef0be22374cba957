//! What a client sees of a primary that dies, or that goes silent.

use std::time::Duration;

use litegate::testkit::{Options, client::Response};
use tokio::time::{Instant, timeout};

use crate::gate::Gate;

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const AGAIN: &str = "[[route]]\nretry_uncommitted = true\n";
const PATIENCE: Duration = Duration::from_secs(15);

/// A gate that knows where every node is.
async fn gate(route: &str) -> Gate {
    let gate = Gate::edited(Options::default(), LITEFS, |text| format!("{text}\n{route}")).await;
    gate.send("POST", "/kv/first", b"v").await;
    gate.cluster.settled().await;
    gate.until(|topology| {
        let mut nodes = topology.nodes.iter();
        nodes
            .all(|node| !node.progress.get().is_empty() && node.progress.get().is_primary.is_some())
    })
    .await;
    gate
}

/// Waits until a node's app has answered so many requests more than `before`.
async fn until_served(gate: &Gate, node: usize, before: u64) {
    let there = async {
        while gate.cluster.served(node) <= before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, there).await.expect("it arrives");
}

/// A write whose primary dies when it has it, and who follows.
async fn killed(gate: &Gate, target: &str, key: &str) -> (Response, Vec<usize>) {
    let before = gate.cluster.served(0);
    let write = timeout(PATIENCE, gate.send("POST", target, b"x"));
    let (answer, ()) = tokio::join!(write, async {
        until_served(gate, 0, before).await;
        if target.contains("linger") {
            gate.cluster.settled().await;
        }
        gate.cluster.kill(0);
        gate.cluster.seize(1);
    });
    (answer.expect("in time"), gate.cluster.written(key).on)
}

#[tokio::test]
async fn a_write_that_never_ran_runs_again_where_its_route_says_so() {
    let gate = gate(AGAIN).await;
    let (answer, on) = killed(&gate, "/kv/a?wait=700", "a").await;
    assert_eq!((answer.status, on), (200, vec![1]), "{}", answer.text());
    assert_eq!(gate.metric("litegate_write_outcomes_total", "repeated").await, 1);
}

#[tokio::test]
async fn elsewhere_its_client_is_told_that_it_did_not() {
    let gate = gate("").await;
    let (answer, on) = killed(&gate, "/kv/a?wait=700", "a").await;
    assert_eq!((answer.status, on), (502, vec![]), "{}", answer.text());
    assert_eq!(answer.field("litegate-write-outcome"), Some("not-committed"));
    assert!(answer.text().contains(r#""write_outcome":"not-committed""#), "{}", answer.text());
    assert!(answer.text().contains("it can be sent again"), "{}", answer.text());
    assert_eq!(gate.metric("litegate_write_outcomes_total", "not-committed").await, 1);
}

#[tokio::test]
async fn a_write_whose_primary_lives_is_unknown_at_once() {
    for route in ["", AGAIN] {
        let gate = gate(route).await;
        let answer = timeout(PATIENCE, gate.send("POST", "/fault/reset", b"x")).await;
        let answer = answer.expect("in time");
        assert_eq!(answer.status, 502);
        assert_eq!(answer.field("litegate-write-outcome"), Some("unknown"));
    }
}

#[tokio::test]
async fn a_write_that_was_committed_and_replicated_is_unknown_and_never_repeated() {
    for route in ["", AGAIN] {
        let gate = gate(route).await;
        let (answer, on) = killed(&gate, "/kv/a?linger=60000", "a").await;
        assert_eq!((answer.status, on), (502, vec![0]), "{}", answer.text());
        assert_eq!(answer.field("litegate-write-outcome"), Some("unknown"));
        assert_eq!(gate.cluster.count(1, "a"), 1);
    }
}

#[tokio::test]
async fn a_frozen_primary_is_noticed_and_its_writes_are_answered_in_time() {
    let gate = gate("").await;
    gate.cluster.freeze(0, true);
    let began = Instant::now();
    let first = gate.send("POST", "/kv/first-in", b"x");
    let noticed = async {
        gate.until(|topology| topology.primary.is_none()).await;
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        let held = gate.send("POST", "/kv/held", b"x");
        let next = async {
            while gate.metric("litegate_held_requests", "app").await == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            // Whatever replicas think of it: reads go on.
            assert_eq!(gate.send("GET", "/kv/first", b"").await.status, 200);
            gate.cluster.seize(1);
        };
        tokio::join!(held, next).0
    };
    let both = async { tokio::join!(first, noticed) };
    let (first, held) = timeout(PATIENCE, both).await.expect("in time");
    assert_eq!((first.status, first.field("litegate-write-outcome")), (502, Some("unknown")));
    assert!(first.text().contains("maybe_executed"), "{}", first.text());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!((held.status, gate.cluster.written("held").on), (200, vec![1]));
}

#[tokio::test]
async fn reads_do_not_hang_on_a_frozen_replica() {
    let gate = gate("").await;
    gate.cluster.freeze(1, true);
    let began = Instant::now();
    let mut reads = Vec::new();
    for _ in 0..8 {
        reads.push(gate.send("GET", "/kv/first", b""));
    }
    let all = timeout(PATIENCE, futures_util::future::join_all(reads)).await.expect("in time");
    assert!(all.iter().all(|read| read.status == 200));
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    // By now it is the last choice.
    let began = Instant::now();
    for _ in 0..8 {
        assert_eq!(gate.send("GET", "/kv/first", b"").await.status, 200);
    }
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}
