//! Rehearses the bad night with a seed: clients, two instances of litegate, three nodes, a lease,
//! and whatever goes wrong between them, in virtual time.
//!
//! **Real** is litegate: its configuration, discovery with the reconciler, the sources and
//! LiteFS's client, the published snapshots, the connection to a client, the walk of a request
//! with all its decisions, tokens, holds, budgets, and HTTP (hyper) on both sides; and the judge
//! of `litegate verify`. **Simulated** are the network below it (`net::simulated`), the clock
//! (tokio's, paused), LiteFS with Consul's lease and the app ([`world`], [`node`], after
//! `reference/litefs.md`), what DNS says ([`faults`]), and the clients. **Left out** are threads
//! (one worker each, all on one thread), the kernel's sockets and the resolver: the integration
//! tests have those.
//!
//! What must hold on every seed ([`promises`]):
//! * a write is executed at most once, by anybody;
//! * an acknowledged write is there at the end, unless LiteFS lost it and its client was told;
//! * a client never reads the past of its own acknowledged write, through either instance;
//! * nothing takes longer than its deadlines allow, and a held write is released within a second
//!   of a primary's readiness;
//! * no write is sent to a node that litegate could know to be superseded;
//! * what is said not to have run has not; no `fly-replay` and no empty success at a client;
//! * with `durability.replicas`, an acknowledged write is on so many replicas; with all of them, none
//!   is missing at all;
//! * nothing panics.
//!
//! `docs/simulation.md` says how to run more of it, and how to replay a number.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::{JoinSet, LocalSet},
    time::{sleep, timeout},
};

use self::{
    clients::Client,
    faults::Instances,
    litegate::Litegate,
    world::{INSTANCES, NODES, World},
};
use crate::{
    net::simulated::Network,
    verify::{
        history::{Event, Key},
        judge::{Breach, Counts, judge},
    },
};

mod clients;
mod consul;
mod faults;
mod litegate;
mod node;
mod promises;
mod scenes;
mod wire;
mod world;

/// How long after a node took over litegate may still not know it: `/info` is asked each second,
/// and answers within half a second.
const KNOWN: Duration = Duration::from_millis(1600);

/// A rule that is switched off, to see that the simulation notices.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mutation {
    /// A write that broke off is sent again.
    RepeatsWrites,
    /// Reads go to any replica.
    IgnoresTokens,
    /// Held requests are forgotten.
    HoldsForEver,
    /// A new primary is believed in three seconds late.
    TellsLate,
    /// Of two claims the older one counts.
    FollowsTheOlderClaim,
    /// Whom most replicas name is the primary.
    VotesByReplicas,
    /// `durability.replicas` is overlooked.
    IgnoresReplicas,
}

impl Mutation {
    const ALL: [Self; 7] = [
        Self::RepeatsWrites,
        Self::IgnoresTokens,
        Self::HoldsForEver,
        Self::TellsLate,
        Self::FollowsTheOlderClaim,
        Self::VotesByReplicas,
        Self::IgnoresReplicas,
    ];

    /// A number to begin with, so that the test is quick, and what must be said of it.
    fn breaks(self) -> (u64, &'static str) {
        match self {
            Self::RepeatsWrites => (4, "is executed a second time"),
            Self::IgnoresTokens => (1, "stale"),
            Self::HoldsForEver => (11, "without an answer"),
            Self::TellsLate => (1, "still holds"),
            Self::FollowsTheOlderClaim | Self::VotesByReplicas => (19, "took over long ago"),
            Self::IgnoresReplicas => (1, "only on"),
        }
    }

    /// Whether it changes what the data plane believes.
    fn is_of_topology(self) -> bool {
        matches!(self, Self::TellsLate | Self::FollowsTheOlderClaim | Self::VotesByReplicas)
    }
}

/// What came of a night.
#[derive(Debug, Default)]
struct Night {
    broken: Vec<String>,
    trace: Vec<String>,
    counts: Counts,
    /// Acknowledged writes that are not there at the end.
    lost: u64,
    /// Acknowledged writes that litegate counted as lost.
    counted: u64,
    /// Of those, the ones whose position nobody could tell: their clients are not told.
    blind: u64,
    /// Acknowledged writes of nights with `durability.replicas`, and how many of them are lost.
    durable: u64,
    lost_durable: u64,
    /// Looks that found somebody waiting.
    held: u64,
    took: Duration,
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// Counts panics of this thread, of tasks too.
fn watch_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}

/// One night, by its number.
fn night(seed: u64, mutation: Option<Mutation>) -> Night {
    watch_panics();
    let panics = PANICS.get();
    let mut night = run(seed, |network| rehearse(seed, mutation, network)).unwrap_or_default();
    if PANICS.get() != panics {
        night.broken.push("something panicked".to_owned());
    }
    night
}

/// Runs something on a network of its own, in virtual time. `None`: it panicked.
fn run<T, F: Future<Output = T>>(seed: u64, what: impl FnOnce(Network) -> F) -> Option<T> {
    let network = Network::default();
    let entered = network.enter();
    fastrand::seed(seed);
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    // Without it the order in which those who wait for one thing are woken differs from run to
    // run, and so may, rarely, what becomes of a seed.
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_be_bytes()));
    let runtime = builder.build().ok()?;
    let local = LocalSet::new();
    let result =
        std::panic::catch_unwind(AssertUnwindSafe(|| local.block_on(&runtime, what(network))));
    drop(local);
    drop(runtime);
    drop(entered);
    result.ok()
}

async fn rehearse(seed: u64, mutation: Option<Mutation>, network: Network) -> Night {
    let world = World::new(seed, network);
    let kind = if world.through_proxy { "LiteFS's proxy" } else { "the app's port" };
    world.say(format_args!(
        "seed {seed}, through {kind}, {} replicas have to have a write{}",
        world.replicas,
        if world.asks_consul { ", with Consul" } else { "" },
    ));
    let mut consul = JoinSet::new();
    if world.asks_consul {
        consul.spawn_local(consul::serve(Rc::clone(&world)));
    }
    for instance in 0..INSTANCES {
        for node in 0..NODES {
            faults::delayed(&world, instance, node, world.millis(0..4));
        }
    }
    for node in 0..NODES {
        world.start(node);
        sleep(world.millis(0..300)).await;
    }
    let instances: Rc<Instances> = Rc::default();
    for (instance, place) in instances.iter().enumerate() {
        sleep(world.millis(0..1500)).await;
        place.replace(Some(Litegate::start(&world, instance, mutation)));
    }
    let history = Rc::new(RefCell::new(Vec::new()));
    let mut clients = JoinSet::new();
    for number in 0..world.number(3..6) {
        let mut client = Client::new(&world, &history, number);
        clients.spawn_local(async move {
            client.live().await;
            client
        });
    }
    let mut watching = JoinSet::new();
    let watched = Rc::new(promises::Watched::default());
    watching.spawn_local(promises::watch(
        Rc::clone(&world),
        Rc::clone(&instances),
        Rc::clone(&watched),
    ));

    sleep(world.millis(500..3000)).await;
    faults::befall(&world, &instances, mutation).await;
    sleep(world.millis(1000..5000)).await;
    world.heal();
    sleep(world.millis(500..3000)).await;
    world.ended.set(true);
    let mut all = Vec::new();
    while let Some(client) = clients.join_next().await {
        all.extend(client.ok());
    }
    let settled = async {
        while !world.is_settled() {
            sleep(Duration::from_millis(50)).await;
        }
        sleep(Duration::from_secs(3)).await;
    };
    if timeout(Duration::from_secs(120), settled).await.is_err() {
        world.breaks(format_args!("the simulated cluster does not recover"));
    }
    drop(watching);
    all.sort_by_key(Client::number);
    for client in &mut all {
        client.finish().await;
    }
    conclude(&world, &instances, &history.borrow(), &watched)
}

fn conclude(
    world: &World,
    instances: &Instances,
    history: &[Event],
    watched: &promises::Watched,
) -> Night {
    let mut events = history.to_vec();
    let primary = world.holder().unwrap_or(0);
    let keys: std::collections::BTreeSet<Key> = history
        .iter()
        .filter_map(|event| match event {
            Event::Began { operation, .. } => Some(operation.key()),
            _ => None,
        })
        .collect();
    for key in keys {
        let values = world.list(primary, key);
        events.push(Event::Last { at: world.stamp(), key, values });
    }
    let verdict = judge(&events);
    let blind = world.blind.borrow();
    let mut lost_blindly = 0;
    for violation in &verdict.violations {
        // A token is of a client's writes: that what others wrote may be seen and then, on another
        // replica, not yet, is not promised.
        if violation.breach == Breach::NonMonotonic {
            continue;
        }
        // The primary died between its answer and the question where it is.
        if matches!(violation.breach, Breach::Lost | Breach::Stale)
            && violation.value.is_some_and(|value| blind.contains(&value))
        {
            lost_blindly += u64::from(violation.breach == Breach::Lost);
            continue;
        }
        let (at, breach) = (violation.at.as_secs_f64(), violation.breach.as_str());
        world.breaks(format_args!("{breach} at {at:.3}: {}", violation.text));
    }
    let lost = verdict.counts.lost_announced + verdict.count(Breach::Lost);
    if world.replicas == NODES - 1 && lost > 0 {
        world.breaks(format_args!("{lost} writes were acknowledged on every node, and are lost"));
    }
    let counted = instances
        .iter()
        .filter_map(|instance| instance.borrow().as_ref().map(|litegate| litegate.lost()));
    Night {
        counted: counted.sum(),
        lost,
        durable: if world.replicas > 0 { verdict.counts.acknowledged } else { 0 },
        lost_durable: if world.replicas > 0 { lost } else { 0 },
        held: watched.held.get(),
        blind: lost_blindly,
        broken: world.broken.borrow().clone(),
        trace: world.trace(),
        counts: verdict.counts,
        took: world.at(),
    }
}

impl fmt::Display for Night {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        for broken in &self.broken {
            writeln!(f, "broken: {broken}")?;
        }
        Ok(())
    }
}

/// The numbers to run: `LITEGATE_SEEDS=7`, `LITEGATE_SEEDS=1..5000`, or `usual` of them.
fn seeds(usual: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let Ok(wanted) = std::env::var("LITEGATE_SEEDS") else { return usual };
    let number =
        |text: &str| text.parse().expect("LITEGATE_SEEDS is a number or a range like 1..500");
    match wanted.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => number(&wanted)..number(&wanted) + 1,
    }
}

const REPLAY: &str = "the command in docs/simulation.md";

#[test]
fn nights() {
    let began = tokio::time::Instant::now();
    let seeds = seeds(1..41);
    let is_one = seeds.end - seeds.start == 1;
    let next = AtomicU64::new(seeds.start);
    let seen = Mutex::new((BTreeMap::new(), Night::default()));
    let rehearse = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds.end {
            return;
        }
        let night = night(seed, None);
        let mut seen = seen.lock().unwrap();
        if is_one {
            println!("{night}");
        } else if !night.broken.is_empty() {
            println!("{night}seed {seed} breaks; again: LITEGATE_SEEDS={seed} {REPLAY}\n");
        }
        if !night.broken.is_empty() {
            seen.0.insert(seed, night.broken.first().cloned().unwrap_or_default());
        }
        seen.1.add(&night);
    };
    // Each night is one thread's own.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(rehearse))));
    let (failed, all) = seen.into_inner().unwrap();
    println!("{} nights in {:.1?}: {}", seeds.clone().count(), began.elapsed(), all.summary());
    for (seed, broken) in &failed {
        println!("seed {seed}: {broken}");
    }
    assert!(failed.is_empty(), "{} of {} nights break a promise", failed.len(), seeds.count());
    if !is_one {
        assert!(all.counts.acknowledged > 0 && all.held > 0, "nothing happened");
    }
}

impl Night {
    fn add(&mut self, other: &Self) {
        let (sum, counts) = (&mut self.counts, &other.counts);
        sum.writes += counts.writes;
        sum.acknowledged += counts.acknowledged;
        sum.ambiguous += counts.ambiguous;
        sum.denied += counts.denied;
        sum.reads += counts.reads;
        sum.failed_reads += counts.failed_reads;
        sum.longest_write = sum.longest_write.max(counts.longest_write);
        for (error, count) in &counts.errors {
            *sum.errors.entry(error.clone()).or_default() += count;
        }
        self.lost += other.lost;
        self.counted += other.counted;
        self.held += other.held;
        self.blind += other.blind;
        self.durable += other.durable;
        self.lost_durable += other.lost_durable;
        self.took += other.took;
    }

    fn summary(&self) -> String {
        let counts = &self.counts;
        format!(
            "{} s of them, {} writes ({} acknowledged, {} unknown, {} refused), {} reads \
             ({} failed), held at {} looks, {} acknowledged writes lost by failovers ({} counted, \
             {} blindly), {} acknowledged on replicas ({} lost), \
             the longest write {:?}, errors {:?}",
            self.took.as_secs(),
            counts.writes,
            counts.acknowledged,
            counts.ambiguous,
            counts.denied,
            counts.reads,
            counts.failed_reads,
            self.held,
            self.lost,
            self.counted,
            self.blind,
            self.durable,
            self.lost_durable,
            counts.longest_write,
            counts.errors,
        )
    }
}

/// Each rule that is switched off is found out within so many nights, and for what it is.
#[test]
fn mutations_are_found() {
    for mutation in Mutation::ALL {
        let (first, word) = mutation.breaks();
        let breaks =
            |seed: &u64| night(*seed, Some(mutation)).broken.iter().any(|b| b.contains(word));
        let found = (first..first + 60).find(breaks);
        println!("{mutation:?}: found by seed {found:?}");
        assert!(found.is_some(), "{mutation:?} breaks nothing that anybody notices");
    }
}

/// The same number is the same night.
#[cfg(tokio_unstable)]
#[test]
fn a_number_replays() {
    for seed in 1..4 {
        assert_eq!(night(seed, None).trace, night(seed, None).trace, "seed {seed}");
    }
}
