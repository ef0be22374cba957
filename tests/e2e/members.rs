//! Pods come, go and move, and DNS lies and dies, while requests go on.

use std::time::Duration;

use hickory_proto::rr::RecordType;

use crate::{
    cluster::{ADDRESSES, Cluster, PRIMARY},
    coredns::{CoreDns, HEADLESS, SRV},
    gate::{self, Gate},
    http::Body,
    load::Load,
    process::eventually,
};

/// Longer than any refresh interval: the zone's records live for a second.
const REFRESH: Duration = Duration::from_secs(30);

/// Waits until reads have reached this node.
fn reads_reach(gate: &Gate, node: &str) {
    eventually(&format!("reads reach {node}"), REFRESH, || match gate.read() {
        served if served == node => Ok(()),
        served => Err(format!("{served} served")),
    });
}

/// Waits until a hundred reads in a row have left this node out.
fn reads_avoid(gate: &Gate, node: &str) {
    eventually(&format!("reads avoid {node}"), REFRESH, || {
        match (0..100).filter(|_| gate.read() == node).count() {
            0 => Ok(()),
            served => Err(format!("it served {served} of 100")),
        }
    });
}

/// Waits until litegate says so of its list of members.
fn stale_is(gate: &Gate, wanted: bool) {
    eventually("the staleness is seen", REFRESH, || match gate.is_stale()? {
        seen if seen == wanted => Ok(()),
        seen => Err(format!("stale: {seen}")),
    });
}

#[test]
fn core_dns_shows_a_change_at_once() {
    let cluster = Cluster::start();
    let mut dns = CoreDns::start(&cluster, &[0, 1]);
    let addresses = |dns: &CoreDns| dns.ask(HEADLESS, RecordType::A).expect("CoreDNS answers");
    assert_eq!(addresses(&dns), ["127.0.1.1", "127.0.1.2"]);
    dns.publish(&cluster, &[0, 2]);
    assert_eq!(addresses(&dns), ["127.0.1.1", "127.0.1.3"]);
    let members = dns.ask(SRV, RecordType::SRV).expect("CoreDNS answers");
    assert_eq!(members.len(), 2);
    assert!(members[1].contains("abaci-app-2"), "{members:?}");
    dns.kill();
    assert!(dns.ask(HEADLESS, RecordType::A).is_err());
}

#[test]
fn a_pod_that_dns_adds_gets_reads_and_one_that_it_drops_gets_none() {
    let cluster = Cluster::start();
    let mut dns = CoreDns::start(&cluster, &[0, 1]);
    let gate = Gate::start(&cluster, &gate::by_dns(&dns), &gate::by_litefs(&cluster));
    let load = Load::start(gate.address(), 1, 2);
    load.wait_for(10, 50);
    reads_avoid(&gate, cluster.name(2));

    dns.publish(&cluster, &[0, 1, 2]);
    reads_reach(&gate, cluster.name(2));
    dns.publish(&cluster, &[0, 2]);
    reads_avoid(&gate, cluster.name(1));

    let ledger = load.finish();
    assert_eq!(ledger.failed_reads, Vec::<String>::new());
    assert_eq!(ledger.refused, Vec::new());
    ledger.check_writes(&cluster.ids());
}

#[test]
fn a_pod_that_moves_is_followed_to_its_new_address() {
    let mut cluster = Cluster::start();
    let mut dns = CoreDns::start(&cluster, &[0, 1, 2]);
    let gate = Gate::start(&cluster, &gate::by_dns(&dns), &gate::by_litefs(&cluster));
    let load = Load::start(gate.address(), 1, 2);
    load.wait_for(10, 50);

    cluster.move_to(2, ADDRESSES[3]);
    dns.publish(&cluster, &[0, 1, 2]);
    reads_reach(&gate, cluster.name(2));

    let ledger = load.finish();
    assert_eq!(ledger.failed_reads, Vec::<String>::new());
    assert_eq!(ledger.refused, Vec::new());
    ledger.check_writes(&cluster.ids());
}

#[test]
fn requests_go_on_while_dns_is_dead() {
    let cluster = Cluster::start();
    let mut dns = CoreDns::start(&cluster, &[0, 1]);
    let gate = Gate::start(&cluster, &gate::by_dns(&dns), &gate::by_litefs(&cluster));
    assert_eq!(gate.is_stale(), Ok(false));

    dns.kill();
    let load = Load::start(gate.address(), 1, 2);
    stale_is(&gate, true);
    load.wait_for(20, 100);

    dns.restart();
    dns.publish(&cluster, &[0, 1, 2]);
    stale_is(&gate, false);
    reads_reach(&gate, cluster.name(2));

    let ledger = load.finish();
    assert_eq!(ledger.failed_reads, Vec::<String>::new());
    assert_eq!(ledger.refused, Vec::new());
    ledger.check_writes(&cluster.ids());
}

#[test]
fn an_empty_answer_does_not_empty_the_cluster() {
    let cluster = Cluster::start();
    let mut dns = CoreDns::start(&cluster, &[0, 1, 2]);
    let gate = Gate::start(&cluster, &gate::by_dns(&dns), &gate::by_litefs(&cluster));
    dns.publish(&cluster, &[]);
    stale_is(&gate, true);
    let load = Load::start(gate.address(), 1, 2);
    load.wait_for(20, 100);
    let ledger = load.finish();
    assert_eq!(ledger.failed_reads, Vec::<String>::new());
    assert_eq!(ledger.refused, Vec::new());
}

#[test]
fn srv_records_bring_names_and_ports() {
    let cluster = Cluster::start();
    let dns = CoreDns::start(&cluster, &[0, 1, 2]);
    // Nothing listens on port 9, and only a name from SRV can match the instance.
    let primary = gate::instance(&cluster, PRIMARY);
    let gate = Gate::with(&cluster, 9, &gate::by_srv(&dns), &primary, "");
    let answer = gate.send("POST", "/w/srv", Body { bytes: 100 });
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(answer.json().expect("the row")["replay_src"], "");
    reads_reach(&gate, cluster.name(1));
    reads_reach(&gate, cluster.name(2));
}

#[test]
fn a_replay_finds_a_member_that_dns_lists_by_address_alone() {
    let cluster = Cluster::start();
    let dns = CoreDns::start(&cluster, &[0, 1, 2]);
    let gate = Gate::start(&cluster, &gate::by_dns(&dns), &gate::instance(&cluster, 1));
    let answer = gate.send("POST", "/w/named", Body { bytes: 100 });
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(cluster.rows("named").len(), 1);
}
