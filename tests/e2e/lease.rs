//! The lease moves, in every way in which it can: nobody who reads or writes through litegate
//! notices more than the design's section 7 admits.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    clients::{Clients, End, Seen, WRITERS, Write},
    cluster::{Cluster, Ids, PRIMARY},
    consul::Way,
    gate::{self, Gate},
    process::eventually,
};

/// Acknowledged writes that the next primary did not have.
const LOST: &str = "litegate_acknowledged_writes_lost_total";

/// How long litegate may take to notice that a node says nothing.
const NOTICE: Duration = Duration::from_secs(10);

/// How long Consul may keep the lease of a node that is gone, and LiteFS may take to see it.
const EXPIRY: Duration = Duration::from_secs(40);

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

/// What is left of a write whose node was lost under it.
fn check_refused(seen: &Seen, gone: Instant, at_most: usize) {
    let refused = seen.refused();
    assert!(refused.len() <= at_most, "{refused:?}");
    for write in refused {
        assert!(matches!(write.end, End::Refused(502, _)), "an honest error: {write:?}");
        assert!(write.began <= gone, "it began after the node was gone: {write:?}");
    }
}

/// Replication is asynchronous: what a dead primary had acknowledged and not sent is gone, and
/// each of these writes is counted by the litegate that it went through.
fn check_losses(seen: &Seen, ids: &Ids, gates: &[Gate; 2]) {
    let missing = seen.missing(ids);
    for (number, gate) in gates.iter().enumerate() {
        let lost = missing.iter().filter(|write| write.gate == number).count();
        eventually(&format!("litegate {number} counts {lost} lost writes"), NOTICE, || {
            let counted = gate.metric(LOST, "");
            if lost as f64 <= counted { Ok(()) } else { Err(format!("{counted}: {missing:?}")) }
        });
    }
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

#[test]
fn a_primary_that_is_killed_fails_only_the_writes_that_it_was_running() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    let (seen, ids) = kill_the_primary(&mut cluster, &gates);
    tell("SIGKILL", &seen, &ids, &gates);
    check_losses(&seen, &ids, &gates);
}

#[test]
fn a_write_that_had_to_reach_a_replica_survives_the_primary() {
    let mut cluster = Cluster::start_with_consul();
    let durable = r#"[cluster.abaci.durability]
replicas = 1
timeout = "5s"
on_timeout = "fail""#;
    let gates = gates(&cluster, cluster.proxy_port(), durable);
    let (seen, ids) = kill_the_primary(&mut cluster, &gates);
    tell("SIGKILL, durable", &seen, &ids, &gates);
    assert!(seen.missing(&ids).is_empty(), "{:?}", seen.missing(&ids));
}

fn kill_the_primary(cluster: &mut Cluster, gates: &[Gate; 2]) -> (Seen, Ids) {
    let clients = Clients::start(cluster, gates);
    clients.wait_for(200, 400);
    let killed = Instant::now();
    cluster.kill(PRIMARY);
    let gone = Instant::now();
    // Reads go on while writes are held.
    clients.wait_for(0, 400);
    let primary = cluster.primary();
    clients.wait_for(200, 400);
    cluster.spawn(PRIMARY);
    cluster.wait_for(PRIMARY);
    clients.wait_for(200, 400);
    let seen = clients.finish();
    let ids = cluster.agreed_ids();
    seen.check_always(&ids);
    check_refused(&seen, gone, WRITERS);
    seen.check_releases(cluster, primary, killed, SLACK);
    (seen, ids)
}

#[test]
fn a_primary_that_hands_over_fails_no_write_and_no_read() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    // All through the instance that is asked.
    let clients = Clients::start_at([gates[0].address(); 2], &cluster, &gates);
    hand_around(&mut cluster, clients, &gates, &gates[..1]);
}

#[test]
fn a_primary_that_hands_over_while_two_litegates_write_fails_no_write_and_no_read() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    let clients = Clients::start(&cluster, &gates);
    hand_around(&mut cluster, clients, &gates, &gates);
}

/// Three hand-overs in a row, for which all of `writing` hold.
fn hand_around(cluster: &mut Cluster, clients: Clients, gates: &[Gate; 2], writing: &[Gate]) {
    for (from, to) in [(PRIMARY, 1), (1, 2), (2, PRIMARY)] {
        clients.wait_for(100, 200);
        hand_over(cluster, writing, from, to);
    }
    clients.wait_for(100, 200);
    let seen = clients.finish();
    assert_eq!(cluster.revive(), 0, "LiteFS goes on");
    let ids = cluster.agreed_ids();
    tell(&format!("handoff, {} writing", writing.len()), &seen, &ids, gates);
    let longest = seen.writes.iter().map(|write| write.ended - write.began).max();
    eprintln!("  the longest write took {longest:?}");

    seen.check_always(&ids);
    assert!(seen.refused().is_empty(), "{:?}", seen.refused());
    assert!(seen.missing(&ids).is_empty(), "{:?}", seen.missing(&ids));
    // Each acknowledged one is there, and by `check_always` once.
    let acknowledged = seen.writes.iter().filter(|write| write.end == End::Acknowledged).count();
    assert_eq!(ids.len(), acknowledged, "and nothing else is");
}

fn hand_over(cluster: &Cluster, writing: &[Gate], from: usize, to: usize) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.args(["handoff", "--from", cluster.name(from), "--to", cluster.name(to)]);
    for gate in writing {
        command.args(["--admin", &format!("http://{}", gate.admin())]);
    }
    let output = command
        .env_remove("LITEGATE_ADMIN")
        .stdin(Stdio::null())
        .output()
        .expect("litegate starts");
    assert!(output.status.success(), "{output:?}");
    eprint!("{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(cluster.claimants(), [to], "{output:?}");
}

#[test]
fn a_primary_that_is_frozen_for_a_while_delays_writes() {
    let cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    let clients = Clients::start(&cluster, &gates);
    clients.wait_for(200, 400);
    cluster.freeze(PRIMARY);
    let frozen = Instant::now();
    for gate in &gates {
        eventually("litegate notices", NOTICE, || match gate.primary() {
            None => Ok(()),
            Some(primary) => Err(format!("{primary} is primary")),
        });
    }
    // In the end both replicas are further behind than they may be, and there is nobody else.
    for node in [1, 2] {
        let label = format!("\"{}\"", cluster.name(node));
        eventually("its lag is noticed", EXPIRY, || {
            match gates[0].metric("litegate_node_too_far_behind", &label) {
                1.0 => Ok(()),
                other => Err(other.to_string()),
            }
        });
    }
    clients.wait_for(0, 400);
    let thawed = Instant::now();
    cluster.thaw(PRIMARY);
    clients.wait_for(200, 400);
    let seen = clients.finish();
    let ids = cluster.agreed_ids();
    tell("SIGSTOP", &seen, &ids, &gates);

    seen.check_always(&ids);
    check_refused(&seen, frozen + NOTICE, WRITERS);
    assert!(seen.missing(&ids).is_empty(), "{:?}", seen.missing(&ids));
    seen.check_releases(&cluster, PRIMARY, thawed, SLACK);
}

/// Nothing but a restart makes LiteFS's replicas leave a frozen primary.
#[test]
fn a_primary_that_thaws_after_another_took_over_harms_nobody() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    let clients = Clients::start(&cluster, &gates);
    clients.wait_for(200, 400);
    cluster.freeze(PRIMARY);
    let frozen = Instant::now();
    let primary = take_over(&mut cluster);
    clients.wait_for(200, 400);
    cluster.thaw(PRIMARY);
    clients.wait_for(200, 400);
    let seen = clients.finish();
    cluster.revive();
    let ids = cluster.agreed_ids();
    tell("SIGSTOP, replaced", &seen, &ids, &gates);

    seen.check_always(&ids);
    check_losses(&seen, &ids, &gates);
    check_refused(&seen, frozen + NOTICE, WRITERS);
    seen.check_releases(&cluster, primary, frozen, SLACK);
}

/// Waits until Consul has freed the lease, and restarts a replica, which takes it.
fn take_over(cluster: &mut Cluster) -> usize {
    eventually("Consul frees the lease", EXPIRY, || match cluster.consul().holder() {
        None => Ok(()),
        Some(holder) => Err(format!("{holder} holds it")),
    });
    cluster.kill(2);
    cluster.spawn(2);
    cluster.wait_for(2);
    eventually("it is primary", EXPIRY, || match cluster.claimants() {
        claimants if claimants.contains(&2) => Ok(2),
        claimants => Err(format!("{claimants:?}")),
    })
}

#[test]
fn a_primary_that_can_not_reach_consul_steps_down() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    let clients = Clients::start(&cluster, &gates);
    clients.wait_for(200, 400);
    let cut = Instant::now();
    cluster.relay(PRIMARY).set(Way::Cut);
    eventually("it steps down", EXPIRY, || match cluster.claimants() {
        claimants if claimants.contains(&PRIMARY) => Err(format!("{claimants:?}")),
        _ => Ok(()),
    });
    let primary = cluster.primary();
    clients.wait_for(200, 400);
    cluster.relay(PRIMARY).set(Way::Open);
    clients.wait_for(200, 400);
    let seen = clients.finish();
    cluster.revive();
    let ids = cluster.agreed_ids();
    tell("cut from Consul", &seen, &ids, &gates);

    seen.check_always(&ids);
    check_losses(&seen, &ids, &gates);
    seen.check_releases(&cluster, primary, cut, SLACK);
    let refused = seen.refused();
    // By the app, whose commit failed, or by litegate, since LiteFS ends itself in a commit that it
    // has no lease for any more; or by LiteFS, which has looked for a primary for 5 s.
    assert!(refused.len() <= WRITERS, "{refused:?}");
    for write in refused {
        assert!(
            matches!(write.end, End::Refused(500 | 502 | 503, _)),
            "an honest error: {write:?}"
        );
    }
}

#[test]
fn a_primary_whose_calls_to_consul_hang_is_left_for_the_next() {
    let mut cluster = Cluster::start_with_consul();
    let gates = gates(&cluster, cluster.proxy_port(), "");
    let clients = Clients::start(&cluster, &gates);
    clients.wait_for(200, 400);
    cluster.relay(PRIMARY).set(Way::Silent);
    let cut = Instant::now();
    let primary = take_over(&mut cluster);
    clients.wait_for(200, 400);
    assert_eq!(cluster.claimants(), [PRIMARY, 2], "both say that they are primary");
    cluster.relay(PRIMARY).set(Way::Open);
    clients.wait_for(200, 400);
    let seen = clients.finish();
    cluster.revive();
    let ids = cluster.agreed_ids();
    tell("calls to Consul hang", &seen, &ids, &gates);

    seen.check_always(&ids);
    check_losses(&seen, &ids, &gates);
    seen.check_releases(&cluster, primary, cut, SLACK);
}
