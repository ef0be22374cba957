//! Nodes are killed under load: no read fails, no acknowledged write is lost, none runs twice.

use std::time::Duration;

use crate::{
    cluster::{Cluster, PRIMARY},
    gate::{self, Gate},
    load::Load,
    process::eventually,
};

const WRITERS: usize = 4;
const READERS: usize = 4;

#[test]
fn a_replica_killed_under_load_costs_nothing() {
    let mut cluster = Cluster::start();
    let gate = Gate::start(&cluster, &gate::listed(&cluster), &gate::by_litefs(&cluster));
    let load = Load::start(gate.address(), WRITERS, READERS);
    load.wait_for(50, 200);
    cluster.kill(2);
    load.wait_for(50, 200);
    cluster.spawn(2);
    cluster.wait_for(2);
    load.wait_for(50, 200);
    let ledger = load.finish();

    assert_eq!(ledger.failed_reads, Vec::<String>::new());
    assert_eq!(ledger.refused, Vec::new());
    ledger.check_writes(&cluster.ids());
    assert!(ledger.reads.contains_key(cluster.name(2)), "it served before: {:?}", ledger.reads);
    eventually("the replica serves again", Duration::from_secs(30), || match gate.read() {
        served if served == cluster.name(2) => Ok(()),
        served => Err(format!("{served} served")),
    });
}

#[test]
fn the_primary_killed_under_load_costs_at_most_the_writes_it_was_running() {
    let mut cluster = Cluster::start();
    let gate = Gate::start(&cluster, &gate::listed(&cluster), &gate::by_litefs(&cluster));
    let load = Load::start(gate.address(), WRITERS, READERS);
    load.wait_for(50, 200);
    cluster.kill(PRIMARY);
    // Reads go on while writes are held.
    load.wait_for(0, 400);
    cluster.spawn(PRIMARY);
    cluster.wait_for(PRIMARY);
    load.wait_for(50, 200);
    let ledger = load.finish();

    assert_eq!(ledger.failed_reads, Vec::<String>::new());
    ledger.check_writes(&cluster.ids());
    // Each writer had at most one write at the node, and may have sent one more into a connection
    // whose end was still on its way.
    assert!(ledger.refused.len() <= 2 * WRITERS, "{:?}", ledger.refused);
    for (id, why) in &ledger.refused {
        assert!(why.starts_with("502 ") || why.starts_with("504 "), "{id}: an honest error: {why}");
    }
}
