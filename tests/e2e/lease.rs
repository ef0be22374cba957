//! The lease moves, in every way in which it can: nobody who reads or writes through litegate
//! notices more than the design's section 7 admits.

use std::time::{Duration, Instant};

use crate::{
    clients::{Clients, End, Seen, Write},
    cluster::{Cluster, Ids, PRIMARY},
    gate::{self, Gate},
};

/// Acknowledged writes that the next primary did not have.
const LOST: &str = "litegate_acknowledged_writes_lost_total";

/// What two busy cores may add to a second.
const SLACK: Duration = Duration::from_secs(1);

fn gates(cluster: &Cluster, port: u16, more: &str) -> [Gate; 2] {
    let primary = gate::by_litefs(cluster);
    let start = || Gate::with(cluster, port, &gate::listed(cluster), &primary, more);
    [start(), start()]
}

fn tell(what: &str, seen: &Seen, ids: &Ids, gates: &[Gate; 2]) {
    eprintln!(
        "{what}: {} writes, {} refused, {} missing, {} told, {} counted; gap {:?}; reads {:?}, {} failed, {} stale",
        seen.writes.len(),
        seen.refused().len(),
        seen.missing(ids).len(),
        seen.told_lost,
        counted(gates),
        seen.gap(),
        seen.reads,
        seen.failed_reads.len(),
        seen.stale.len(),
    );
    for write in seen.refused() {
        eprintln!("  {write:?}");
    }
}

/// Acknowledged writes that both litegates together call lost.
fn counted(gates: &[Gate; 2]) -> f64 {
    gates.iter().map(|gate| gate.metric(LOST, "")).sum()
}

#[test]
fn a_primary_that_is_stopped_fails_no_write_and_no_read() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.app_port(), "");
    let clients = Clients::start(&cluster, &gates);
    clients.wait_for(200, 400);
    let stopped = Instant::now();
    cluster.terminate(PRIMARY);
    let primary = cluster.primary();
    clients.wait_for(200, 400);
    cluster.spawn(PRIMARY);
    cluster.wait_for(PRIMARY);
    clients.wait_for(200, 400);
    let seen = clients.finish();
    let ids = cluster.agreed_ids();
    tell("SIGTERM", &seen, &ids, &gates);

    seen.check_always(&ids);
    assert!(seen.refused().is_empty(), "{:?}", seen.refused());
    assert!(seen.missing(&ids).is_empty(), "{:?}", seen.missing(&ids));
    seen.check_releases(&cluster, primary, stopped, SLACK);
}

/// What litegate is compared with: writes always go to the pod that was primary when somebody
/// wrote the rule.
#[test]
fn routing_by_method_to_one_pod_fails_most_writes_once_it_was_stopped() {
    let mut cluster = Cluster::start_with_consul();
    let to = [cluster.proxy(PRIMARY); 2];
    let clients = Clients::start_at(to, &cluster, &[]);
    clients.wait_for(200, 0);
    let stopped = Instant::now();
    cluster.terminate(PRIMARY);
    cluster.primary();
    cluster.spawn(PRIMARY);
    cluster.wait_for(PRIMARY);
    let seen = clients.finish();
    let after = seen.writes.iter().filter(|write| write.ended > stopped);
    let (kept, lost): (Vec<_>, Vec<_>) = after.partition(|write| write.end == End::Acknowledged);
    eprintln!("by method, SIGTERM: {} of {} writes failed", lost.len(), lost.len() + kept.len());
    assert!(lost.len() > 9 * kept.len(), "{} failed, {} did not", lost.len(), kept.len());
    let is_empty = |write: &Write| matches!(write.end, End::Refused(200, _));
    assert!(lost.into_iter().any(is_empty), "an empty success");
}
