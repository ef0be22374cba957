//! Reads spread over the replicas, and stay off the primary while a replica can serve.

use std::collections::BTreeMap;

use crate::{
    cluster::{Cluster, PRIMARY},
    gate::{self, Gate},
};

#[test]
fn reads_spread_over_the_replicas() {
    let cluster = Cluster::start();
    let gate = Gate::start(&cluster, &gate::listed(&cluster), &gate::by_litefs(&cluster));
    let mut served: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..300 {
        *served.entry(gate.read()).or_default() += 1;
    }
    assert_eq!(served.get(cluster.name(PRIMARY)), None, "{served:?}");
    for replica in [1, 2] {
        assert!(served.get(cluster.name(replica)).is_some_and(|n| *n >= 30), "{served:?}");
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
