//! What goes wrong in a night, drawn from its seed.

use std::{cell::RefCell, rc::Rc, time::Duration};

use tokio::{task::JoinSet, time::sleep};

use super::{
    Mutation,
    litegate::Litegate,
    world::{API, APP, Consul, INSTANCES, NODES, World, address},
};

/// The instances of a night: one may be replaced in it.
pub(super) type Instances = [RefCell<Option<Rc<Litegate>>>; INSTANCES];

/// Whom a fault befalls.
#[derive(Clone, Copy, Debug)]
enum Whom {
    Primary,
    Replica,
    Anybody,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// SIGTERM and a new process: a roll-out.
    Stop,
    /// SIGKILL and a new process.
    Kill,
    /// SIGSTOP.
    Freeze,
    ConsulRefuses,
    /// A primary whose renewal hangs, and meanwhile a replica restarts: two primaries.
    SplitBrain,
    /// Consul is down for everybody.
    NoConsul,
    HandOver,
    /// One instance and one node do not reach each other; or all nodes.
    Cut,
    CutFromAll,
    /// A replica and the primary do not reach each other.
    Apart,
    SlowReplica,
    SlowInfo,
    SlowVars,
    SlowLink,
    /// The streams of events break: whatever happens meanwhile is not told.
    Gap,
    /// DNS lists too few, nobody, or somebody else's past.
    DnsLies,
    /// An instance of litegate is another process from now on.
    OtherLitegate,
    /// A primary dies at the moment at which its replicas lag.
    LosesTail,
}

const WEIGHTS: [(Fault, u32); 18] = [
    (Fault::Stop, 10),
    (Fault::Kill, 8),
    (Fault::Freeze, 6),
    (Fault::ConsulRefuses, 3),
    (Fault::SplitBrain, 6),
    (Fault::NoConsul, 2),
    (Fault::HandOver, 8),
    (Fault::Cut, 8),
    (Fault::CutFromAll, 4),
    (Fault::Apart, 5),
    (Fault::SlowReplica, 8),
    (Fault::SlowInfo, 5),
    (Fault::SlowVars, 6),
    (Fault::SlowLink, 4),
    (Fault::Gap, 6),
    (Fault::DnsLies, 8),
    (Fault::OtherLitegate, 5),
    (Fault::LosesTail, 8),
];

/// All that goes wrong, to its end.
pub(super) async fn befall(
    world: &Rc<World>,
    instances: &Rc<Instances>,
    mutation: Option<Mutation>,
) {
    let count = world.number(1..5);
    let mut faults = JoinSet::new();
    for _ in 0..count {
        let fault = draw(world);
        let (world, instances) = (Rc::clone(world), Rc::clone(instances));
        faults.spawn_local({
            let world = Rc::clone(&world);
            async move { happen(&world, &instances, fault, mutation).await }
        });
        sleep(world.millis(300..6000)).await;
    }
    while faults.join_next().await.is_some() {}
}

fn draw(world: &World) -> Fault {
    let all: u32 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    let mut left = world.rng.borrow_mut().u32(0..all);
    for (fault, weight) in WEIGHTS {
        match left.checked_sub(weight) {
            Some(rest) => left = rest,
            None => return fault,
        }
    }
    Fault::Stop
}

fn somebody(world: &World, whom: Whom) -> usize {
    let fits: Vec<_> = world.look(|state| {
        let nodes = state.nodes.iter().enumerate().filter(|(_, node)| match whom {
            Whom::Primary => node.primary,
            Whom::Replica => node.up() && !node.primary,
            Whom::Anybody => true,
        });
        nodes.map(|(n, _)| n).collect()
    });
    let mut rng = world.rng.borrow_mut();
    if fits.is_empty() { rng.usize(0..NODES) } else { fits[rng.usize(0..fits.len())] }
}

/// The primary mostly: that is where it hurts.
fn whom(world: &World) -> usize {
    let whom = if world.chance(75) { Whom::Primary } else { Whom::Anybody };
    somebody(world, whom)
}

async fn happen(
    world: &Rc<World>,
    instances: &Rc<Instances>,
    fault: Fault,
    mutation: Option<Mutation>,
) {
    let node = whom(world);
    let instance = usize::from(world.chance(50));
    world.say(format_args!("{fault:?} begins (n{node}, litegate {instance})"));
    match fault {
        Fault::Stop => {
            if world.look(|state| state.nodes[node].up() && !state.nodes[node].frozen) {
                world.stop(node).await;
                restart(world, node, 200..5000).await;
            }
        }
        Fault::Kill => {
            world.kill(node);
            restart(world, node, 100..25_000).await;
        }
        Fault::Freeze => {
            world.change(|state| state.nodes[node].frozen = state.nodes[node].up());
            sleep(world.millis(200..40_000)).await;
            world.say(format_args!("n{node} is thawed"));
            world.change(|state| state.nodes[node].frozen = false);
        }
        Fault::ConsulRefuses => {
            world.change(|state| state.nodes[node].consul = Consul::Refuses);
            sleep(world.millis(3000..25_000)).await;
            world.change(|state| state.nodes[node].consul = Consul::Answers);
        }
        Fault::SplitBrain => {
            let node = somebody(world, Whom::Primary);
            world.change(|state| state.nodes[node].consul = Consul::Hangs);
            sleep(world.millis(18_000..27_000)).await;
            let replica = somebody(world, Whom::Replica);
            world.kill(replica);
            restart(world, replica, 50..1000).await;
            sleep(world.millis(1000..12_000)).await;
            world.say(format_args!("Consul answers n{node} again"));
            world.change(|state| state.nodes[node].consul = Consul::Answers);
        }
        Fault::NoConsul => {
            let how = if world.chance(50) { Consul::Refuses } else { Consul::Hangs };
            world.change(|state| state.nodes.iter_mut().for_each(|node| node.consul = how));
            sleep(world.millis(3000..25_000)).await;
            world.change(|state| {
                state.nodes.iter_mut().for_each(|node| node.consul = Consul::Answers);
            });
        }
        Fault::HandOver => world.promote(somebody(world, Whom::Replica)),
        Fault::Cut => {
            world.cut(instance, node, true);
            sleep(world.millis(200..15_000)).await;
            world.cut(instance, node, false);
        }
        Fault::CutFromAll => {
            (0..NODES).for_each(|node| world.cut(instance, node, true));
            sleep(world.millis(200..8000)).await;
            (0..NODES).for_each(|node| world.cut(instance, node, false));
        }
        Fault::Apart => {
            let (replica, primary) =
                (somebody(world, Whom::Replica), somebody(world, Whom::Primary));
            apart(world, replica, primary, true);
            sleep(world.millis(500..15_000)).await;
            apart(world, replica, primary, false);
        }
        Fault::SlowReplica => {
            let node = somebody(world, Whom::Anybody);
            let before = world.look(|state| state.nodes[node].behind);
            let behind = world.millis(200..3000);
            world.change(|state| state.nodes[node].behind = behind);
            sleep(world.millis(2000..15_000)).await;
            world.change(|state| state.nodes[node].behind = before);
        }
        Fault::SlowInfo => {
            let takes = world.millis(100..1500);
            world.change(|state| state.nodes[node].info_takes = takes);
            sleep(world.millis(1000..10_000)).await;
            world.change(|state| state.nodes[node].info_takes = Duration::ZERO);
        }
        Fault::SlowVars => {
            let take = world.millis(50..1200);
            world.change(|state| state.nodes[node].vars_take = take);
            sleep(world.millis(2000..15_000)).await;
            world.change(|state| state.nodes[node].vars_take = Duration::ZERO);
        }
        Fault::SlowLink => {
            let delay = world.millis(10..60);
            delayed(world, instance, node, delay);
            sleep(world.millis(2000..15_000)).await;
            delayed(world, instance, node, Duration::from_millis(1));
        }
        Fault::Gap => {
            for _ in 0..world.number(1..4) {
                world.network.reset(address(instance, node, API));
                sleep(world.millis(100..2000)).await;
            }
        }
        Fault::DnsLies => lie(world, instances, instance).await,
        Fault::OtherLitegate => {
            instances[instance].take();
            sleep(world.millis(20..2000)).await;
            world.say(format_args!("litegate {instance} is another process"));
            instances[instance].replace(Some(Litegate::start(world, instance, mutation)));
        }
        Fault::LosesTail => {
            let node = somebody(world, Whom::Primary);
            let behind = world.millis(200..2500);
            let before: Vec<_> = world.change(|state| {
                let nodes = state.nodes.iter_mut();
                nodes.map(|node| std::mem::replace(&mut node.behind, behind)).collect()
            });
            sleep(world.millis(300..4000)).await;
            if world.chance(50) {
                world.kill(node);
            } else if world.look(|state| state.nodes[node].up() && !state.nodes[node].frozen) {
                world.stop(node).await;
            }
            world.change(|state| {
                state
                    .nodes
                    .iter_mut()
                    .zip(&before)
                    .for_each(|(node, before)| node.behind = *before);
            });
            restart(world, node, 1000..25_000).await;
        }
    }
    world.say(format_args!("{fault:?} ends"));
}

async fn restart(world: &Rc<World>, node: usize, after: std::ops::Range<u64>) {
    sleep(world.millis(after)).await;
    if !world.look(|state| state.nodes[node].up()) {
        world.start(node);
    }
}

fn apart(world: &World, a: usize, b: usize, is_apart: bool) {
    world.change(|state| {
        state.apart[a][b] = is_apart;
        state.apart[b][a] = is_apart;
    });
}

pub(super) fn delayed(world: &World, instance: usize, node: usize, delay: Duration) {
    for port in [APP, API] {
        world.network.delay(address(instance, node, port), delay);
    }
}

async fn lie(world: &Rc<World>, instances: &Instances, instance: usize) {
    let mut listed = [true; NODES];
    for listed in &mut listed {
        *listed = world.chance(50);
    }
    world.lied_to(instance, true);
    let tell = |listed| {
        if let Some(litegate) = &*instances[instance].borrow() {
            litegate.list(instance, listed);
        }
    };
    world.say(format_args!("DNS tells litegate {instance} of {listed:?}"));
    tell(listed);
    sleep(world.millis(200..20_000)).await;
    tell([true; NODES]);
    sleep(Duration::from_secs(2)).await;
    world.lied_to(instance, false);
}
