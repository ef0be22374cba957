//! What is simulated of LiteFS: three nodes, their disks, Consul's lease, and replication.
//!
//! Contract: `reference/litefs.md` sections 4 to 6. Renewal each 5 s, expiry 20 s after the last
//! one, a second of lock-delay after an expiry and none after a release; replicas that look at the
//! lease only while they follow nobody, and stay attached to a primary that is frozen or cut off;
//! a primary whose renewal hangs and which keeps its role meanwhile; an old primary that resumes
//! its claim; numbers of lost transactions that are used again; snapshots that go back.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use fastrand::Rng;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::node;
use crate::{
    net::simulated::Network,
    verify::history::{Key, Value},
};

pub(super) const NODES: usize = 3;
pub(super) const INSTANCES: usize = 2;
/// The database that every node has.
pub(super) const DATABASE: &str = "app.db";

/// Between two renewals of the lease.
const RENEWAL: Duration = Duration::from_secs(5);
/// How long a holder that can't renew keeps its role.
const TTL: Duration = Duration::from_secs(10);
/// Consul arms its timer at twice the TTL.
const EXPIRY: Duration = Duration::from_secs(20);
/// After an expiry nobody gets the key for so long.
const LOCK_DELAY: Duration = Duration::from_secs(1);
/// What a node sleeps after any ended or failed attempt to follow.
const RECONNECT: Duration = Duration::from_secs(1);
const HEARTBEAT: Duration = Duration::from_secs(1);

/// A committed transaction: one value appended to one list.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Tx {
    pub(super) checksum: u64,
    pub(super) at: Instant,
    pub(super) key: Key,
    pub(super) value: Value,
}

/// How Consul looks from a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Consul {
    Answers,
    Refuses,
    Hangs,
}

pub(super) struct Node {
    /// Of the running process; `None` while there is none.
    pub(super) incarnation: Option<u64>,
    pub(super) frozen: bool,
    pub(super) primary: bool,
    /// Whom it names as primary.
    pub(super) names: Option<usize>,
    /// What is on its disk: the transaction with the TXID n at the place n - 1.
    pub(super) log: Vec<Tx>,
    /// When it last heard of the primary.
    pub(super) heard: Instant,
    /// How long a transaction takes to it.
    pub(super) behind: Duration,
    pub(super) consul: Consul,
    /// How long `/info` takes. Longer than litegate waits: it is silent.
    pub(super) info_takes: Duration,
    pub(super) vars_take: Duration,
    /// How much longer than usual the app takes to commit.
    pub(super) app_takes: Duration,
    /// When it last became primary.
    pub(super) since: Instant,
    tasks: Rc<RefCell<JoinSet<()>>>,
}

impl Node {
    pub(super) fn up(&self) -> bool {
        self.incarnation.is_some()
    }

    /// The TXID and checksum of its database.
    pub(super) fn position(&self) -> (u64, u64) {
        (self.log.len() as u64, self.log.last().map_or(0, |tx| tx.checksum))
    }
}

#[derive(Default)]
pub(super) struct Lease {
    holder: Option<(usize, u64)>,
    sessions: u64,
    expires: Option<Instant>,
    locked_until: Option<Instant>,
    /// How often the key was seen to change, and to what.
    index: u64,
    told: Option<usize>,
}

pub(super) struct State {
    pub(super) nodes: Vec<Node>,
    pub(super) lease: Lease,
    /// Replication between these two gets nowhere.
    pub(super) apart: [[bool; NODES]; NODES],
    /// What litegate is cut off from.
    pub(super) cut: [[bool; NODES]; INSTANCES],
    handing_to: Option<usize>,
}

/// What really happened to a write, whoever was told what.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fate {
    /// How often an app began to do it.
    pub(super) begun: u32,
    /// How often it was committed.
    pub(super) committed: u32,
}

pub(super) struct World {
    pub(super) network: Network,
    pub(super) state: RefCell<State>,
    pub(super) rng: RefCell<Rng>,
    pub(super) fates: RefCell<BTreeMap<Value, Fate>>,
    pub(super) broken: RefCell<Vec<String>>,
    /// Acknowledged without a position: the primary did not say where it is after them.
    pub(super) blind: RefCell<BTreeSet<Value>>,
    /// Since when an instance can see that a node holds the lease and takes writes.
    pub(super) seen: RefCell<[[Option<Instant>; NODES]; INSTANCES]>,
    /// DNS does not tell it the truth.
    lied_to: Cell<[bool; INSTANCES]>,
    /// Whether nodes are asked through LiteFS's proxy, or the app directly.
    pub(super) through_proxy: bool,
    /// `hold.timeout`
    pub(super) hold: Duration,
    /// `durability.replicas`
    pub(super) replicas: usize,
    /// Whether litegate asks Consul, too.
    pub(super) asks_consul: bool,
    /// Whether nothing goes wrong but what a script says.
    pub(super) is_scene: bool,
    trace: RefCell<Vec<String>>,
    stamped: Cell<Duration>,
    changed: Notify,
    pub(super) began: Instant,
    pub(super) ended: Cell<bool>,
}

/// Where an instance of litegate finds a node: the address says who asks.
pub(super) fn address(instance: usize, node: usize, port: u16) -> SocketAddr {
    SocketAddr::from(([10, instance as u8, 0, node as u8 + 1], port))
}

pub(super) fn name(node: usize) -> String {
    format!("n{node}")
}

pub(super) const APP: u16 = 8080;
pub(super) const API: u16 = 20202;

impl World {
    pub(super) fn new(seed: u64, network: Network) -> Rc<Self> {
        let mut rng = Rng::with_seed(seed);
        let now = Instant::now();
        let node = |_| Node {
            incarnation: None,
            frozen: false,
            primary: false,
            names: None,
            log: Vec::new(),
            heard: now,
            behind: Duration::from_millis(rng.u64(1..30)),
            consul: Consul::Answers,
            info_takes: Duration::ZERO,
            vars_take: Duration::ZERO,
            app_takes: Duration::ZERO,
            since: now,
            tasks: Rc::default(),
        };
        let state = State {
            nodes: (0..NODES).map(node).collect(),
            lease: Lease::default(),
            apart: Default::default(),
            cut: Default::default(),
            handing_to: None,
        };
        // Drawn apart, so that what was added later changes no other night.
        let mut more = Rng::with_seed(!seed);
        let replicas = [1, 2].get(more.usize(0..8)).copied().unwrap_or(0);
        let asks_consul = more.u32(0..4) == 0;
        let through_proxy = rng.bool();
        let hold = Duration::from_secs(if rng.bool() { 25 } else { 8 });
        Rc::new(Self {
            network,
            state: RefCell::new(state),
            rng: RefCell::new(rng),
            fates: RefCell::default(),
            broken: RefCell::default(),
            blind: RefCell::default(),
            seen: RefCell::default(),
            lied_to: Cell::default(),
            through_proxy,
            hold,
            replicas,
            asks_consul,
            is_scene: false,
            trace: RefCell::default(),
            stamped: Cell::default(),
            changed: Notify::new(),
            began: now,
            ended: Cell::new(false),
        })
    }

    /// Since the beginning.
    pub(super) fn at(&self) -> Duration {
        self.began.elapsed()
    }

    /// The same for the judge: of two events at the same moment the second comes later.
    pub(super) fn stamp(&self) -> Duration {
        let at = self.at().max(self.stamped.get() + Duration::from_nanos(1));
        self.stamped.set(at);
        at
    }

    /// Writes into the trace.
    pub(super) fn say(&self, text: std::fmt::Arguments<'_>) {
        let mut line = String::new();
        let _ = write!(line, "{:9.3}  {text}", self.at().as_secs_f64());
        self.trace.borrow_mut().push(line);
    }

    pub(super) fn trace(&self) -> Vec<String> {
        self.trace.borrow().clone()
    }

    /// A promise was broken.
    pub(super) fn breaks(&self, text: std::fmt::Arguments<'_>) {
        self.say(format_args!("BROKEN: {text}"));
        self.broken.borrow_mut().push(format!("{text}"));
    }

    pub(super) fn millis(&self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.borrow_mut().u64(range))
    }

    /// Never in a scene: there nothing is left to chance.
    pub(super) fn chance(&self, percent: u32) -> bool {
        !self.is_scene && self.rng.borrow_mut().u32(0..100) < percent
    }

    pub(super) fn number(&self, range: std::ops::Range<u32>) -> u32 {
        self.rng.borrow_mut().u32(range)
    }

    /// Changes something, and tells everybody who waits.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.borrow_mut());
        self.changed.notify_waiters();
        result
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Waits until it is so.
    pub(super) async fn until(&self, mut is_so: impl FnMut(&State) -> bool) {
        loop {
            let changed = self.changed.notified();
            if is_so(&self.state.borrow()) {
                return;
            }
            changed.await;
        }
    }

    /// A frozen process does nothing until it is thawed.
    pub(super) async fn thawed(&self, node: usize) {
        self.until(|state| !state.nodes[node].frozen).await;
    }

    /// Starts a node's process.
    pub(super) fn start(self: &Rc<Self>, node: usize) {
        let incarnation = self.rng.borrow_mut().u64(1..u64::MAX);
        let tasks = Rc::new(RefCell::new(JoinSet::new()));
        self.change(|state| {
            let it = &mut state.nodes[node];
            it.incarnation = Some(incarnation);
            it.heard = Instant::now();
            it.tasks = Rc::clone(&tasks);
        });
        self.say(format_args!("n{node} starts as {incarnation:016x}"));
        tasks.borrow_mut().spawn_local(node::api(Rc::clone(self), node));
        let world = Rc::clone(self);
        tasks.borrow_mut().spawn_local(async move { world.live(node).await });
    }

    /// Spawns what ends with the node's process.
    pub(super) fn spawn(&self, node: usize, task: impl Future<Output = ()> + 'static) {
        let tasks = self.look(|state| Rc::clone(&state.nodes[node].tasks));
        let mut tasks = tasks.borrow_mut();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(task);
    }

    /// The process is gone, from one instruction to the next.
    pub(super) fn kill(&self, node: usize) {
        self.say(format_args!("n{node} is killed"));
        let tasks = self.change(|state| {
            let it = &mut state.nodes[node];
            (it.incarnation, it.primary, it.names, it.frozen) = (None, false, None, false);
            std::mem::take(&mut it.tasks)
        });
        // Aborts them: their sockets close.
        drop(tasks.take());
        for instance in 0..INSTANCES {
            self.network.reset(address(instance, node, APP));
            self.network.reset(address(instance, node, API));
        }
    }

    /// SIGTERM: the lease is given back first.
    pub(super) async fn stop(&self, node: usize) {
        self.say(format_args!("n{node} stops"));
        // The proxy and the API close before the lease goes.
        sleep(self.millis(0..50)).await;
        self.kill(node);
        sleep(self.millis(0..20)).await;
        self.change(|state| {
            if state.lease.holder.is_some_and(|(holder, _)| holder == node) {
                state.lease.holder = None;
                state.lease.locked_until = None;
            }
        });
    }

    /// Asks the primary to hand its lease over.
    pub(super) fn promote(&self, node: usize) {
        self.say(format_args!("n{node} is promoted"));
        self.change(|state| state.handing_to = Some(node));
    }

    /// Who holds the lease now.
    pub(super) fn holder(&self) -> Option<usize> {
        self.change_quietly(|state| state.lease.look().map(|(node, _)| node))
    }

    /// What Consul's key says: its `ModifyIndex`, and who holds the lease.
    pub(super) fn key(&self) -> (u64, Option<usize>) {
        self.change_quietly(|state| {
            let holder = state.lease.look().map(|(node, _)| node);
            if std::mem::replace(&mut state.lease.told, holder) != holder {
                state.lease.index += 1;
            }
            (state.lease.index + 1, holder)
        })
    }

    fn change_quietly<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.borrow_mut())
    }

    /// Asks Consul: `false` where it can't be reached.
    async fn consul(&self, node: usize) -> bool {
        self.until(|state| state.nodes[node].consul != Consul::Hangs).await;
        sleep(Duration::from_millis(1)).await;
        self.thawed(node).await;
        self.look(|state| state.nodes[node].consul == Consul::Answers)
    }

    /// A process, from its start to its end.
    async fn live(self: Rc<Self>, node: usize) {
        let mut ready = false;
        loop {
            self.thawed(node).await;
            if self.consul(node).await {
                match self.change_quietly(|state| state.lease.look()) {
                    None if self.take(node) => {
                        self.get_ready(node, &mut ready);
                        self.reign(node).await;
                    }
                    Some((holder, _)) => {
                        // Its own name from an earlier life too: it tries itself, and fails.
                        self.change(|state| state.nodes[node].names = Some(holder));
                        sleep(Duration::from_millis(1)).await;
                        if self.follow(node, holder, &mut ready).await {
                            self.reign(node).await;
                        }
                        self.change(|state| state.nodes[node].names = None);
                    }
                    None => {}
                }
            }
            sleep(RECONNECT).await;
        }
    }

    /// Its own proxy port opens once it is primary or has everything.
    fn get_ready(self: &Rc<Self>, node: usize, ready: &mut bool) {
        if !std::mem::replace(ready, true) {
            self.spawn(node, node::app(Rc::clone(self), node));
        }
    }

    fn take(&self, node: usize) -> bool {
        self.change(|state| {
            let lease = &mut state.lease;
            let now = Instant::now();
            if lease.locked_until.is_some_and(|until| now < until) {
                return false;
            }
            lease.sessions += 1;
            lease.holder = Some((node, lease.sessions));
            lease.expires = Some(now + EXPIRY);
            true
        })
    }

    /// Primary, until the lease is lost or handed over.
    async fn reign(&self, node: usize) {
        self.change(|state| {
            let it = &mut state.nodes[node];
            (it.primary, it.names, it.since) = (true, None, Instant::now());
        });
        let position = self.look(|state| state.nodes[node].position().0);
        self.say(format_args!("n{node} is primary, from TXID {position} on"));
        let session = self.look(|state| state.lease.holder.map(|(_, session)| session));
        let mut renewed = Instant::now();
        let mut next = renewed + RENEWAL;
        let handed_to = loop {
            let asked = self.until(|state| state.handing_to.is_some());
            tokio::select! { biased; () = sleep_until(next) => {}, () = asked => {} }
            self.thawed(node).await;
            let to = self.change_quietly(|state| state.handing_to.take());
            let follows = |to: usize| {
                self.look(|s| {
                    s.nodes[to].up() && !s.nodes[to].frozen && s.nodes[to].names == Some(node)
                })
            };
            let to = to.filter(|to| *to != node && follows(*to));
            if to.is_some() {
                break to;
            }
            if Instant::now() < next {
                continue;
            }
            if self.consul(node).await {
                let still = self.change_quietly(|state| {
                    let still = state.lease.look() == session.map(|session| (node, session));
                    if still {
                        state.lease.expires = Some(Instant::now() + EXPIRY);
                    }
                    still
                });
                if !still {
                    break None;
                }
                renewed = Instant::now();
                next = renewed + RENEWAL;
            } else {
                next = Instant::now() + Duration::from_secs(1);
                if next > renewed + TTL {
                    break None;
                }
            }
        };
        self.change(|state| state.nodes[node].primary = false);
        self.say(format_args!("n{node} is primary no more"));
        if let Some(to) = handed_to {
            sleep(Duration::from_millis(1)).await;
            // It reads the key at once, and may find its own name.
            self.change(|state| state.nodes[node].names = Some(node));
            sleep(Duration::from_millis(1)).await;
            self.change(|state| {
                if let Some((holder, _)) = &mut state.lease.holder {
                    *holder = to;
                }
                state.nodes[node].names = None;
            });
        }
    }

    /// Attached to `primary` until the stream ends. Whether the lease was handed over here.
    async fn follow(self: &Rc<Self>, node: usize, primary: usize, ready: &mut bool) -> bool {
        let Some(process) = self.look(|state| state.nodes[primary].incarnation) else {
            return false;
        };
        loop {
            self.thawed(node).await;
            let now = Instant::now();
            enum Link {
                Ended,
                Handed,
                Silent,
                Next(Instant),
                Apply,
                Idle,
            }
            let link = self.look(|state| {
                let (it, theirs) = (&state.nodes[node], &state.nodes[primary]);
                if theirs.incarnation != Some(process) || node == primary {
                    Link::Ended
                } else if state.apart[node][primary] || theirs.frozen {
                    Link::Silent
                } else if state.lease.holder.is_some_and(|(holder, _)| holder == node) {
                    Link::Handed
                } else if !theirs.primary {
                    Link::Ended
                } else if it.position() == theirs.position() {
                    Link::Idle
                } else {
                    let next = theirs.log.get(it.log.len()).map_or(now, |tx| tx.at + it.behind);
                    if next > now { Link::Next(next) } else { Link::Apply }
                }
            });
            match link {
                Link::Ended => return false,
                Link::Handed => return true,
                Link::Silent => {
                    self.until(|s| {
                        let theirs = &s.nodes[primary];
                        theirs.incarnation != Some(process)
                            || !(s.apart[node][primary] || theirs.frozen)
                    })
                    .await;
                }
                Link::Next(at) => {
                    let _ = timeout(at - now, self.until(|s| !s.nodes[primary].primary)).await;
                }
                Link::Apply => self.change(|state| {
                    let theirs = std::mem::take(&mut state.nodes[primary].log);
                    let it = &mut state.nodes[node];
                    let have = it.log.len();
                    let is_prefix = have <= theirs.len()
                        && have.checked_sub(1).is_none_or(|last| theirs[last] == it.log[last]);
                    if is_prefix {
                        let behind = it.behind;
                        let due = theirs[have..].iter().take_while(|tx| tx.at + behind <= now);
                        it.log.extend(due.copied());
                    } else {
                        // A snapshot: what it had on a branch of its own is gone.
                        it.log = theirs.iter().take_while(|tx| tx.at <= now).copied().collect();
                    }
                    it.heard = now;
                    state.nodes[primary].log = theirs;
                }),
                Link::Idle => {
                    self.change_quietly(|state| state.nodes[node].heard = now);
                    self.get_ready(node, ready);
                    let news = self.until(|s| {
                        let theirs = &s.nodes[primary];
                        theirs.incarnation != Some(process)
                            || theirs.frozen
                            || !theirs.primary
                            || s.apart[node][primary]
                            || theirs.position() != s.nodes[node].position()
                            || s.lease.holder.is_some_and(|(holder, _)| holder == node)
                    });
                    let _ = timeout(HEARTBEAT, news).await;
                }
            }
        }
    }

    /// Commits. `None`: not the primary (any more): SQLite says that the database is read-only.
    pub(super) fn commit(&self, node: usize, key: Key, value: Value) -> Option<u64> {
        let txid = self.change(|state| {
            let it = &mut state.nodes[node];
            if !it.primary || !it.up() {
                return None;
            }
            let before = it.position().1;
            let own = it.incarnation.unwrap_or_default();
            let mixed = [u64::from(value.client), u64::from(value.number), own]
                .iter()
                .fold(before, |hash, n| {
                    (hash ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
                });
            it.log.push(Tx { checksum: mixed | 1 << 63, at: Instant::now(), key, value });
            Some(it.log.len() as u64)
        });
        if txid.is_some() {
            self.fates.borrow_mut().entry(value).or_default().committed += 1;
        }
        txid
    }

    /// A client was told that its write is done: then it is on as many replicas as was asked for.
    pub(super) fn acknowledged(&self, value: Value) {
        let has = |node: &Node| node.log.iter().rev().any(|tx| tx.value == value);
        let there = self.look(|state| state.nodes.iter().filter(|node| has(node)).count());
        if self.replicas > 0 && there <= self.replicas {
            self.breaks(format_args!("{value} is acknowledged and only on {there} nodes"));
        }
    }

    /// What is in a list on a node.
    pub(super) fn list(&self, node: usize, key: Key) -> Vec<Value> {
        self.look(|state| {
            let log = state.nodes[node].log.iter();
            log.filter(|tx| tx.key == key).map(|tx| tx.value).collect()
        })
    }

    pub(super) fn lied_to(&self, instance: usize, is_lied_to: bool) {
        let mut all = self.lied_to.get();
        all[instance] = is_lied_to;
        self.lied_to.set(all);
    }

    pub(super) fn is_lied_to(&self, instance: usize) -> bool {
        self.lied_to.get()[instance]
    }

    /// Whether several nodes say that they are primary.
    pub(super) fn is_contested(&self) -> bool {
        self.look(|state| state.nodes.iter().filter(|node| node.primary).count() > 1)
    }

    /// Whether an instance can see that a node holds the lease and takes writes.
    pub(super) fn can_see(&self, instance: usize, node: usize) -> bool {
        self.holder() == Some(node)
            && self.look(|state| {
                let it = &state.nodes[node];
                // A new primary that does not tell its position is waited for, for a while.
                let is_quick = it.info_takes.max(it.vars_take) < Duration::from_millis(150);
                it.primary && !it.frozen && is_quick && !state.cut[instance][node]
            })
    }

    /// Every fault is over; whoever is down starts.
    pub(super) fn heal(self: &Rc<Self>) {
        self.say(format_args!("everything is healed"));
        for node in 0..NODES {
            self.change(|state| {
                let it = &mut state.nodes[node];
                (it.frozen, it.consul) = (false, Consul::Answers);
                (it.info_takes, it.vars_take) = (Duration::ZERO, Duration::ZERO);
                it.behind = it.behind.min(Duration::from_millis(30));
                state.apart = Default::default();
            });
            for instance in 0..INSTANCES {
                self.cut(instance, node, false);
            }
            if !self.look(|state| state.nodes[node].up()) {
                self.start(node);
            }
        }
    }

    /// litegate and a node do not reach each other any more, or again.
    pub(super) fn cut(&self, instance: usize, node: usize, is_cut: bool) {
        self.change(|state| state.cut[instance][node] = is_cut);
        for port in [APP, API] {
            self.network.cut(address(instance, node, port), is_cut);
        }
    }

    /// One primary that holds the lease, and everybody has what it has.
    pub(super) fn is_settled(&self) -> bool {
        let Some(holder) = self.holder() else { return false };
        self.look(|state| {
            let theirs = state.nodes[holder].position();
            state.nodes.iter().enumerate().all(|(n, node)| {
                node.up() && node.primary == (n == holder) && node.position() == theirs
            })
        })
    }
}

impl Lease {
    /// Who holds it now.
    fn look(&mut self) -> Option<(usize, u64)> {
        let now = Instant::now();
        if let Some(at) = self.expires.filter(|at| *at <= now)
            && self.holder.take().is_some()
        {
            self.locked_until = Some(at + LOCK_DELAY);
        }
        self.holder
    }
}
