//! Every write runs once, on the primary, whichever node gets it first.

use crate::{
    cluster::{Cluster, PRIMARY},
    gate::{self, Gate},
    http::Body,
};

/// Registered and not: LiteFS's proxy and litegate both treat what they don't know as a write.
const METHODS: [&str; 6] = ["POST", "PUT", "PATCH", "DELETE", "MKCOL", "ABACUS"];

/// Writes once through a litegate that has just started and believes that `believed` is primary,
/// and checks that the row is there once and whole.
fn write_through(cluster: &Cluster, believed: usize, method: &str, body: Body) -> Gate {
    let gate = Gate::start(cluster, &gate::listed(cluster), &gate::instance(cluster, believed));
    check_write(cluster, &gate, believed, method, body);
    gate
}

fn check_write(cluster: &Cluster, gate: &Gate, first: usize, method: &str, body: Body) {
    let id = format!("{method}-{first}-{}", body.bytes);
    let what = format!("{method} of {} bytes through {}", body.bytes, cluster.name(first));
    let answer = gate.send(method, &format!("/w/{id}"), body);
    assert_eq!(answer.status, 201, "{what}: {}", answer.text());
    let row = answer.json().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(row["node"], cluster.name(PRIMARY), "{what}");
    assert_eq!(row["bytes"], body.bytes, "{what}");
    assert_eq!(row["sum"], body.sum(), "{what}");

    let replay_src = row["replay_src"].as_str().unwrap_or_default();
    if first == PRIMARY {
        assert_eq!(replay_src, "", "{what}: went straight to the primary");
    } else {
        let source = format!("instance={}", cluster.name(first));
        assert!(
            replay_src.contains(&source),
            "{what}: the app is told of the replay: {replay_src}"
        );
    }

    let rows = cluster.rows(&id);
    assert_eq!(rows.len(), 1, "{what}: {rows:?}");
    assert_eq!(rows[0]["method"], method, "{what}");
}

#[test]
fn every_mutating_method_through_every_node_runs_once_on_the_primary() {
    let cluster = Cluster::start();
    for believed in 0..3 {
        for method in METHODS {
            write_through(&cluster, believed, method, Body { bytes: 1024 });
        }
    }
}

#[test]
fn bodies_of_every_size_survive_a_replay() {
    let cluster = Cluster::start();
    for believed in [PRIMARY, 1] {
        for bytes in [0, 1, 1024, 300 << 10, 1 << 20, 8 << 20] {
            write_through(&cluster, believed, "POST", Body { bytes });
        }
    }
}

#[test]
fn a_large_body_is_replayed_without_having_been_buffered() {
    let cluster = Cluster::start();
    let body = Body { bytes: 64 << 20 };
    for believed in [1, 2] {
        let gate =
            Gate::start(&cluster, &gate::listed(&cluster), &gate::instance(&cluster, believed));
        let before = gate.peak_memory();
        check_write(&cluster, &gate, believed, "POST", body);
        let grown = gate.peak_memory().saturating_sub(before);
        assert!(grown < body.bytes / 4, "memory grew by {grown} bytes");
    }
}

#[test]
fn a_wrong_belief_is_corrected_for_every_write_that_follows() {
    let cluster = Cluster::start();
    let gate = Gate::start(&cluster, &gate::listed(&cluster), &gate::instance(&cluster, 2));
    for n in 0..50 {
        let answer = gate.send("POST", &format!("/w/again-{n}"), Body { bytes: 100 });
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    let ids = cluster.ids();
    assert_eq!(ids.len(), 50);
    assert!(ids.values().all(|count| *count == 1), "{ids:?}");
}

#[test]
fn litefs_itself_says_who_is_primary() {
    let cluster = Cluster::start();
    let gate = Gate::start(&cluster, &gate::listed(&cluster), &gate::by_litefs(&cluster));
    for method in METHODS {
        check_write(&cluster, &gate, PRIMARY, method, Body { bytes: 10 });
    }
}
