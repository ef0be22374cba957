//! The same nodes without litegate, for comparison: writes and reads spread over them as by a
//! Service, and writes by method to the first one as by an ingress rule.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{sleep, timeout};

use crate::testkit::{Cluster, client};

/// Between two writes.
const PAUSE: Duration = Duration::from_millis(200);
/// Nobody waits longer for an answer here.
const PATIENCE: Duration = Duration::from_secs(1);

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) spread: Way,
    pub(super) by_method: Way,
}

/// One way of routing without knowing who is primary.
#[derive(Debug, Default)]
pub(super) struct Way {
    /// Writes sent.
    pub(super) writes: AtomicU64,
    /// Answered with success, and never run.
    pub(super) lost: AtomicU64,
    /// Not answered, or with an error.
    pub(super) failed: AtomicU64,
    /// Run, and the next read did not show it.
    pub(super) stale: AtomicU64,
}

/// Writes and reads back until dropped.
pub(super) async fn write(cluster: Arc<Cluster>, tally: Arc<Tally>) {
    let nodes: Vec<SocketAddr> = cluster.places().iter().map(|place| place.proxy).collect();
    let turns = nodes.iter().zip(nodes.iter().cycle().skip(1)).cycle();
    for (n, (node, next)) in turns.enumerate() {
        once(&cluster, &tally.spread, *node, *next, &format!("/kv/spread-{n}")).await;
        if let Some(first) = nodes.first() {
            once(&cluster, &tally.by_method, *first, *next, &format!("/kv/method-{n}")).await;
        }
        sleep(PAUSE).await;
    }
}

/// A write to one node, and if it ran, a read of it from another.
async fn once(cluster: &Cluster, way: &Way, to: SocketAddr, from: SocketAddr, target: &str) {
    way.writes.fetch_add(1, Relaxed);
    if ask(to, "POST", target).await.is_none() {
        way.failed.fetch_add(1, Relaxed);
        return;
    }
    let key = target.trim_start_matches("/kv/");
    if cluster.written(key).on.is_empty() {
        way.lost.fetch_add(1, Relaxed);
        return;
    }
    if ask(from, "GET", target).await.is_some_and(|answer| answer.contains("\"count\":0")) {
        way.stale.fetch_add(1, Relaxed);
    }
}

/// The body of a success.
async fn ask(node: SocketAddr, method: &str, target: &str) -> Option<String> {
    let answer = client::request(node, method, target, "connection: close\r\n", b"x");
    let answer = timeout(PATIENCE, answer).await.ok()?.ok()?;
    (answer.status == 200).then(|| answer.text())
}
