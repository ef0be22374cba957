//! Reads spread over the replicas, and stay off the primary while a replica can serve.

use std::collections::BTreeMap;

use crate::{
    cluster::{Cluster, PRIMARY},
    gate::{self, Gate},
};

#[test]
fn reads_spread_over_the_replicas() {
    let cluster = Cluster::start();
    // One after the other: by latency alone the quicker replica would get nearly all of them.
    let (members, primary) = (gate::listed(&cluster), gate::by_litefs(&cluster));
    let balance = "balance = \"round-robin\"\n";
    let gate = Gate::with(&cluster, cluster.proxy_port(), &members, &primary, balance);
    let mut served: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..300 {
        *served.entry(gate.read()).or_default() += 1;
    }
    // A busy machine may make both replicas late for a moment: then the primary helps out.
    let on = |node| served.get(cluster.name(node)).copied().unwrap_or_default();
    assert!(on(PRIMARY) <= 15, "{served:?}");
    for replica in [1, 2] {
        assert!(on(replica) >= 100, "{served:?}");
    }
}

#[test]
fn the_primary_serves_reads_when_no_replica_can() {
    let mut cluster = Cluster::start();
    let gate = Gate::start(&cluster, &gate::listed(&cluster), &gate::by_litefs(&cluster));
    cluster.kill(1);
    cluster.kill(2);
    for _ in 0..50 {
        assert_eq!(gate.read(), cluster.name(PRIMARY));
    }
}
