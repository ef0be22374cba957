//! One cluster as one worker serves it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use smallvec::SmallVec;
use tokio::time::{Instant, sleep_until};

use super::{
    acknowledge::Given,
    attempt::Node,
    body::RequestBody,
    causal::LastWrites,
    hold::{Hold, Lane},
    session::{Session, cookie_name, unix_millis},
    tokens::Tokens,
};
use crate::{
    config::{self, cluster::Secret},
    decide::{
        self, Demands,
        balance::PeakEwma,
        token::{Key, Need, Token, TokenRead, Void},
    },
    discovery::Observer,
    net::tls::Tls,
    telemetry::metrics::{Consistency, NodeCells, Shard},
    topology::{
        self, Epoch, NodeId, Presence, Role, Topology,
        position::{Positions, Reach},
        progress::Progress,
        watch,
    },
    upstream::{Gate, Limits, Upstreams},
};

/// LiteFS sends a heartbeat each second, so that an idle replica's lag saw-tooths below this.
const HEARTBEATS: Duration = Duration::from_secs(2);

/// How long a node's API may be silent before a read that waits for its answer tries another: it
/// is asked each second.
const SILENT: Duration = Duration::from_secs(3);

/// How long a token's primary may be one that this instance has not heard of yet: it asks every
/// node each second, and takes up to half a second to hear.
const UNHEARD: Duration = Duration::from_secs(2);
/// Primaries that only tokens tell of, remembered.
const STRANGERS: usize = 16;

/// What this worker remembers of a node to balance by.
#[derive(Debug)]
pub struct Load {
    latency: Cell<PeakEwma>,
    /// Its counters.
    pub(super) cells: Arc<NodeCells>,
    /// Where its databases are.
    pub(super) progress: Arc<Progress>,
}

impl Load {
    /// An attempt's head came after `took`.
    pub(super) fn answered(&self, took: Duration, now: Instant) {
        self.latency.set(self.latency.get().observe(took, now.into_std()));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // The node has left, and its pool with it. Another incarnation of that name tells anew.
        self.cells.idle.set(0);
        self.cells.in_flight.set(0);
    }
}

/// Whatever outlives a change of configuration, shared by all workers.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What discovery believes.
    pub topology: watch::Reader,
    /// What the data plane tells discovery.
    pub observer: Observer,
    /// Who waits.
    pub hold: Arc<Hold>,
    /// What was written last where.
    pub last_writes: Arc<LastWrites>,
    /// How TLS is spoken with its nodes. `None`: it is not.
    pub tls: Option<Arc<Tls>>,
}

/// One cluster as one worker serves it.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) index: usize,
    pub(super) config: config::cluster::Cluster,
    pub(super) rules: decide::choose::Rules,
    pub(super) next: decide::next::Rules,
    pub(super) topology: RefCell<watch::Reader>,
    pub(super) observer: Observer,
    pub(super) hold: Arc<Hold>,
    /// Every write passes it, so that a hand-over can wait for those under way.
    pub(super) lane: Rc<Lane>,
    pub(super) last_writes: Arc<LastWrites>,
    /// The primary's lane: so many writes at once, the others in order.
    pub(super) writes: Rc<Gate>,
    pub(super) budget: RefCell<decide::budget::Budget>,
    upstreams: Upstreams<RequestBody, Load>,
    turn: Cell<usize>,
    shard: Arc<Shard>,
    /// What tokens are signed with, and the cluster's id that it was made for.
    key: RefCell<Option<KeyOf>>,
    /// Tokens that were signed with it.
    tokens: RefCell<Tokens>,
    /// The last one that a write's client was given.
    pub(super) given: RefCell<Option<Given>>,
    /// The primaries so far, as this worker last saw them: a session notes by which it was judged,
    /// and does so without a counter that all workers share.
    lineage: RefCell<Lineage>,
    /// Primaries that only tokens tell of, and since when.
    strangers: RefCell<SmallVec<[(u64, Instant); 2]>>,
    cookies: [Box<str>; 2],
}

impl Cluster {
    pub(super) fn new(
        index: usize,
        mut config: config::cluster::Cluster,
        shared: Shared,
        shard: Arc<Shard>,
        workers: usize,
        is_only: bool,
        now: Instant,
    ) -> Self {
        let cookies = [false, true].map(|secure| cookie_name(&config.name, is_only, secure).into());
        // A copy: see `upstream::Upstreams::follow`.
        config.name = Arc::from(&*config.name);
        let limits = Limits {
            requests: share(config.max_requests, workers),
            pending: share(config.max_pending, workers),
            idle: config.max_idle,
            idle_for: config.timeouts.pool_idle,
        };
        Self {
            index,
            rules: decide::choose::Rules::of(&config),
            next: decide::next::Rules::of(&config),
            writes: Gate::new(share(config.max_writes, workers), usize::MAX),
            budget: RefCell::new(decide::budget::Budget::new(
                config.retry.budget,
                share(config.retry.budget_min as usize, workers),
                now.into_std(),
            )),
            config,
            topology: RefCell::new(shared.topology),
            observer: shared.observer,
            lane: shared.hold.lane(),
            hold: shared.hold,
            last_writes: shared.last_writes,
            upstreams: Upstreams::new(limits, shared.tls),
            turn: Cell::new(0),
            shard,
            key: RefCell::default(),
            tokens: RefCell::default(),
            given: RefCell::default(),
            lineage: RefCell::default(),
            strangers: RefCell::default(),
            cookies,
        }
    }

    /// Whether writes go to this node.
    pub(super) fn is_primary(&self, node: NodeId) -> bool {
        self.topology.borrow_mut().latest().primary == Some(node)
    }

    /// Whether nobody has heard this node for [`SILENT`], and of another one they have.
    pub(super) fn is_silent_alone(&self, node: NodeId, now: Instant) -> bool {
        let mut topology = self.topology.borrow_mut();
        let topology = topology.latest();
        let is_heard = |node: &topology::Node| {
            let silent = node.progress.silent(now.into_std());
            node.presence == Presence::Member && silent.is_some_and(|silent| silent < SILENT)
        };
        let is_silent = topology.node(node).is_some_and(|node| {
            node.progress.silent(now.into_std()).is_some_and(|silent| silent >= SILENT)
        });
        is_silent && topology.nodes.iter().any(|other| other.id != node && is_heard(other))
    }

    /// The name of the cookie that tokens travel in.
    pub(super) fn cookie(&self, secure: bool) -> &str {
        let [plain, host] = &self.cookies;
        if secure { host } else { plain }
    }

    /// Whether what tokens are signed with is known.
    pub(super) fn has_key(&self) -> bool {
        self.config.consistency.key.is_some()
            || self.topology.borrow_mut().latest().cluster_id.is_some()
    }

    /// What tokens are signed with. Until the cluster has told its id, its name stands for it.
    pub(super) fn key(&self) -> Rc<Key> {
        let mut topology = self.topology.borrow_mut();
        let id = &topology.latest().cluster_id;
        let mut known = self.key.borrow_mut();
        match &*known {
            Some((of, key)) if of == id => Rc::clone(key),
            _ => {
                let secret = self.config.consistency.key.as_ref().map(Secret::expose);
                let key = Rc::new(Key::derive(secret, id.as_deref().unwrap_or(&self.config.name)));
                *known = Some((id.clone(), Rc::clone(&key)));
                self.tokens.borrow_mut().clear();
                *self.given.borrow_mut() = None;
                key
            }
        }
    }

    /// Reads a token.
    pub(super) fn read_token(&self, text: &[u8]) -> Result<Token, Void> {
        let key = self.key();
        if let Some(need) = self.tokens.borrow_mut().get(text) {
            return Ok(Token::Need(need.clone()));
        }
        let longest = self.config.consistency.affinity;
        let token = Token::decode(text, &key, unix_millis(), longest)?;
        if let Token::Need(need) = &token {
            self.tokens.borrow_mut().keep(text, need);
        }
        Ok(token)
    }

    /// Runs `look` on the primaries so far and the cell of the one that is.
    pub(super) fn history<T>(&self, look: impl FnOnce(&Lineage, Option<&Arc<Progress>>) -> T) -> T {
        let mut topology = self.topology.borrow_mut();
        let topology = topology.latest();
        let mut lineage = self.lineage.borrow_mut();
        if !Arc::ptr_eq(&lineage, &topology.lineage) {
            *lineage = Rc::new(Arc::clone(&topology.lineage));
        }
        look(&lineage, topology.primary().map(|node| &node.progress))
    }

    /// Returns when the token's primary is among those that this instance has seen, or is none that
    /// it may still hear of. Another instance may know a newer one: by the old one's history its
    /// writes look lost, or like others with the same numbers.
    pub(super) async fn hear_of(&self, need: &Need) {
        let Some(process) = need.lineage else { return };
        let is_heard = |topology: &Topology| {
            let has =
                |node: &topology::Node| node.progress.get().contains(&need.databases) == Some(true);
            topology.lineage.iter().any(|epoch| epoch.incarnation == process)
                || topology.primary().is_some_and(has)
        };
        if is_heard(self.topology.borrow_mut().latest()) {
            return;
        }
        let began = Instant::now();
        let until = self.stranger_since(process, began) + UNHEARD;
        if until <= began {
            return;
        }
        let mut reader = self.topology.borrow().clone();
        let bell = Arc::clone(&reader.latest().bell);
        // Without a place to wait it is judged by what is known.
        let Some(_place) = bell.listen(self.config.hold.max_requests) else { return };
        while Instant::now() < until && !is_heard(reader.latest()) {
            let seen = reader.latest().generation;
            tokio::select! {
                newer = reader.newer_than(seen) => if newer.is_err() {
                    return;
                },
                () = sleep_until(until) => {}
            }
        }
        self.counted(|cells| cells.wait.observe(began.elapsed()));
    }

    /// Since when this one is told of.
    fn stranger_since(&self, process: u64, now: Instant) -> Instant {
        let mut strangers = self.strangers.borrow_mut();
        if let Some((_, since)) = strangers.iter().find(|(known, _)| *known == process) {
            return *since;
        }
        if strangers.len() == STRANGERS {
            strangers.remove(0);
        }
        strangers.push((process, now));
        now
    }

    /// Where the primary is.
    pub(super) fn primary_positions(&self) -> Option<Arc<Positions>> {
        self.history(|_, primary| primary.map(|progress| progress.snapshot()))
    }

    /// What is counted of tokens here.
    pub(super) fn counted(&self, count: impl FnOnce(&Consistency)) {
        if let Some(cells) = self.shard.consistency(self.index) {
            count(cells);
        }
    }

    /// A token counted for nothing.
    pub(super) fn void(&self, void: Void) {
        self.counted(|cells| {
            let place = Void::ALL.iter().position(|one| *one == void);
            if let Some(cell) = place.and_then(|place| cells.void.get(place)) {
                cell.add(1);
            }
        });
    }

    /// How a read with a token found its node.
    pub(super) fn token_read(&self, how: TokenRead) {
        self.counted(|cells| {
            let place = TokenRead::ALL.iter().position(|one| *one == how);
            if let Some(cell) = place.and_then(|place| cells.reads.get(place)) {
                cell.add(1);
            }
        });
    }

    /// Waits until a replica that may serve has what `session` needs, or the time is up.
    pub(super) async fn reached(&self, session: &Session, until: Instant) {
        let mut reader = self.topology.borrow().clone();
        let bell = Arc::clone(&reader.latest().bell);
        // Without a place to wait the primary is asked at once.
        let Some(mut listening) = bell.listen(self.config.hold.max_requests) else { return };
        let began = Instant::now();
        loop {
            let topology = Arc::clone(reader.latest());
            let primary = topology.primary().map(|node| node.progress.get());
            let primary = primary.as_deref().map(|positions| &**positions);
            let is_there = topology.nodes.iter().any(|node| {
                node.role == Role::Replica
                    && node.presence == Presence::Member
                    && node.is_healthy(began.into_std())
                    && session.reach(&node.progress.get(), primary) == Reach::Reached
            });
            if is_there {
                break;
            }
            tokio::select! {
                () = listening.rung() => {}
                newer = reader.newer_than(topology.generation) => {
                    // Another primary: what is waited for may be lost.
                    let goes_on =
                        newer.is_ok_and(|newer| Arc::ptr_eq(&newer.lineage, &topology.lineage));
                    if !goes_on {
                        break;
                    }
                }
                () = sleep_until(until) => break,
            }
        }
        self.counted(|cells| cells.wait.observe(began.elapsed()));
    }

    /// A node was chosen: the next choice is the next one's turn. Not with each look: a request
    /// looks more than once, and two replicas would never take turns.
    pub(super) fn take_turn(&self) {
        self.turn.set(self.turn.get().wrapping_add(1));
    }

    /// Runs `look` on the latest snapshot and what this worker knows of its nodes, and how far
    /// they are where `session` or `demands` want to know.
    pub(super) fn look<T>(
        &self,
        now: Instant,
        session: Option<&Session>,
        demands: Demands,
        look: impl FnOnce(&Topology, &[decide::balance::Load]) -> T,
    ) -> T {
        let mut reader = self.topology.borrow_mut();
        let topology = reader.latest();
        self.upstreams.follow(topology, |node| Load {
            latency: Cell::new(PeakEwma::default()),
            cells: self.shard.node(self.index, &node.name),
            progress: Arc::clone(&node.progress),
        });
        let turn = self.turn.get();
        let mut loads = SmallVec::<[decide::balance::Load; 8]>::new();
        self.upstreams.each(|node| {
            loads.push(decide::balance::Load {
                in_flight: node.gate.inside(),
                latency: node.load.latency.get(),
                full: node.gate.is_full(),
                turn,
                ..decide::balance::Load::default()
            });
        });
        let primary = topology.primary().map(|node| node.progress.get());
        let is_denied = primary.as_ref().is_some_and(|known| known.is_primary == Some(false));
        if session.is_some_and(|session| session.unread) {
            loads.iter_mut().for_each(|load| load.reach = Reach::NotYet);
        } else if session.is_some_and(Session::needs) || demands.staleness.is_some() {
            for (load, node) in loads.iter_mut().zip(&topology.nodes) {
                if topology.primary == Some(node.id) {
                    continue; // See below.
                }
                let positions = node.progress.get();
                let leading = primary.as_deref().map(|positions| &**positions);
                load.reach = session.map_or(Reach::Reached, |s| s.reach(&positions, leading));
                if demands.staleness.is_none() {
                    continue;
                }
                load.age = match &primary {
                    Some(primary) if !primary.is_empty() && !positions.is_empty() => {
                        let behind = positions.behind(primary, now.into_std()).time;
                        // Over a second without a heartbeat, the link is gone.
                        let cut = node.lag.filter(|lag| *lag > HEARTBEATS).unwrap_or_default();
                        behind.max(cut)
                    }
                    _ => Duration::MAX,
                };
            }
        }
        if let Some(id) = topology.primary {
            // The primary has whatever there is, unless it says itself that it is none any more.
            for (load, _) in loads.iter_mut().zip(&topology.nodes).filter(|(_, n)| n.id == id) {
                load.denies = is_denied;
                load.reach = if is_denied { Reach::NotYet } else { Reach::Reached };
                load.age = Duration::ZERO;
            }
        }
        look(topology, &loads)
    }

    /// The node at this place of the snapshot last looked at.
    pub(super) fn node(&self, index: usize) -> Option<Rc<Node>> {
        self.upstreams.get(index)
    }

    /// Closes connections to nodes that have been idle for too long.
    pub(super) fn prune(&self, now: Instant) {
        self.upstreams.each(|node| {
            node.prune(now);
            node.load.cells.idle.set(node.idle() as u64);
            node.load.cells.in_flight.set(node.gate.inside() as u64);
        });
    }
}

/// The primaries so far, by identity: the same one as before means that no other has begun.
pub(super) type Lineage = Rc<Arc<[Epoch]>>;

type KeyOf = (Option<Arc<str>>, Rc<Key>);

/// A worker's share of a limit for the process: rounded down so that the limit holds, but never
/// nothing.
pub(super) fn share(limit: usize, workers: usize) -> usize {
    (limit / workers.max(1)).max(1)
}
