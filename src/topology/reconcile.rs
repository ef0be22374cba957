//! What is believed, from what was seen: `(state, observation, now) → changes`.
//!
//! Who is primary, in this order:
//! 1. a node's own claim. Where several sources speak of a node, it claims only if all of them
//!    say so. Of two claims, the one that Consul's lease key names, while the key is fresh; else
//!    the one whose beginning was seen while the other already stood; where no order was seen,
//!    nobody gets writes (never a vote: see `reference/litefs.md` section 6). A claimant that is
//!    silent for [`SILENT_GRACE`] is none for the time being; when the same process answers again,
//!    it resumes its old claim rather than starting a newer one. For [`FENCE`] a silent claim
//!    still keeps an older one from the writes: what that one acknowledges would be thrown away.
//! 2. a name, if nobody speaks for itself: of the holder of a fresh lease; from a `fly-replay`
//!    answer in the last [`HINT_LIFE`] (a configured name may be wrong, and the node that refused
//!    the write knows better); from an old lease, a file, DNS, the configuration.
//!
//! A new primary that lacks a database that was seen, or more than [`Rules::tripwire`] of its
//! transactions, gets no writes until it has them or an operator confirms it: an empty node may
//! win the lease. The same process is asked once.
//!
//! What replicas say of others never counts against silence: they name a frozen or cut-off primary
//! for minutes. A source without news is neither a loss nor a claim.
//!
//! An empty or failed listing of members changes nothing but [`Topology::stale`]. A member that
//! is no longer listed drains for [`DRAIN_GRACE`] and is then forgotten.
//!
//! Pure, but that it looks into the cells with the nodes' positions: the caller brings the time;
//! nothing here waits, logs or counts.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Change, Claim, Epoch, Freshness, Holder, Member, Node, NodeId, Observation, Presence,
    PrimaryGap, PrimaryName, Role, Saw, Source, Topology, eject, lineage,
    position::Positions,
    progress::{Bell, Progress},
};

/// How long a claimant may be silent.
const SILENT_GRACE: Duration = Duration::from_secs(1);
/// How long a silent claim outweighs an older one: what a lease needs to move after a crash.
const FENCE: Duration = Duration::from_secs(30);
/// How long a lease key of which there is no news decides between claims.
const LEASE_GRACE: Duration = Duration::from_secs(1);
/// How long a new claimant's positions may stay unknown before it is believed without them: longer
/// than it takes to open the stream of a restarted node again.
const POSITIONS_GRACE: Duration = Duration::from_secs(3);
/// How long a name learned from a replay counts.
const HINT_LIFE: Duration = Duration::from_secs(30);
/// How long a node that is no longer listed is remembered.
const DRAIN_GRACE: Duration = Duration::from_mins(1);
/// Members of one cluster. More are ignored: a listing of thousands is a mistake.
const MEMBERS: usize = 256;
/// Primaries that are remembered: a token that is older than all of them is judged by its number.
const EPOCHS: usize = 16;

/// What the operator wants believed.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Over it a replica serves no reads.
    pub max_lag: Duration,
    /// Over it a replica is the last choice.
    pub soft_lag: Duration,
    /// Passive health.
    pub eject: eject::Rules,
    /// The share of the members that may be ejected at once.
    pub eject_max: f64,
    /// The instance name of the pod beside us.
    pub local: Option<Arc<str>>,
    /// How many transactions a new primary may lack. Zero: any number, and whole databases.
    pub tripwire: u64,
}

impl Rules {
    fn freshness(&self, lag: Duration) -> Freshness {
        match lag {
            lag if lag > self.max_lag => Freshness::TooFar,
            lag if lag > self.soft_lag => Freshness::Behind,
            _ => Freshness::Fresh,
        }
    }
}

/// Everything known of one cluster.
#[derive(Clone, Debug)]
pub struct State {
    rules: Rules,
    nodes: BTreeMap<SocketAddr, Known>,
    next_id: u64,
    /// Counts what nodes said, so that beginnings of claims have an order.
    tick: u64,
    /// The first cluster id that a node told.
    cluster: Option<Arc<str>>,
    /// Consul's lease key, once it was read.
    lease: Option<Lease>,
    /// What a file, DNS and the configuration say, the strongest first.
    named: [Option<Named>; NAMERS.len()],
    hint: Option<(Arc<str>, Instant)>,
    /// Where the primary was when it last spoke.
    seen: Option<Arc<Positions>>,
    /// The process that an operator confirmed (`Litefs-Id`).
    confirmed: Option<u64>,
    /// Who was primary by an earlier configuration: until it speaks for itself or is named.
    seeded: Option<NodeId>,
    believed: Topology,
    gap_since: Option<Instant>,
    gap_from: Option<Arc<str>>,
    resolved: bool,
    stale: bool,
    bell: Arc<Bell>,
}

#[derive(Clone, Debug)]
struct Known {
    node: Node,
    listed_name: bool,
    incarnation: Option<u64>,
    /// What each source that speaks of it said last.
    words: Vec<Word>,
    claims: Option<Standing>,
    claimed_at: Option<Instant>,
    /// The last tick at which it was known to be no primary.
    denied: Option<u64>,
    /// The last tick at which it was heard.
    heard: Option<u64>,
    /// Where it was when it became primary, as far as that was seen.
    positions: Option<Arc<Positions>>,
    /// Whom it names as primary.
    names: Option<Arc<str>>,
    left_at: Option<Instant>,
    refused: bool,
}

/// What one source said of a node.
#[derive(Clone, Copy, Debug)]
struct Word {
    source: Source,
    is_primary: bool,
    silent_since: Option<Instant>,
}

/// A standing claim to be primary: it began between two ticks.
#[derive(Clone, Copy, Debug)]
struct Standing {
    /// It had not begun then. `None`: nobody was looking.
    after: Option<u64>,
    /// It had begun then.
    by: u64,
}

impl Standing {
    /// Whether it certainly began when `other` already stood.
    fn is_newer_than(self, other: Self) -> bool {
        self.after.is_some_and(|after| after > other.by)
    }
}

/// Consul's lease key.
#[derive(Clone, Debug)]
struct Lease {
    holder: Option<Holder>,
    index: u64,
    silent_since: Option<Instant>,
}

impl Lease {
    fn is_fresh(&self, now: Instant) -> bool {
        self.silent_since.is_none_or(|since| now < since + LEASE_GRACE)
    }
}

/// What a claimant lacks.
#[derive(Debug)]
enum Lacks {
    Nothing,
    /// It has not told yet.
    Unknown,
    /// Of this database, which was seen so far, it has only so much.
    Database(Arc<str>, u64, u64),
}

/// What a source that only names the primary said last.
#[derive(Clone, Debug)]
enum Named {
    Nobody,
    By(PrimaryName),
}

/// The sources that only name the primary, the strongest first.
const NAMERS: [Source; 3] = [Source::File, Source::Dns, Source::Instance];

impl State {
    /// Nothing is known.
    pub fn new(rules: Rules) -> Self {
        let bell = Arc::<Bell>::default();
        Self {
            rules,
            nodes: BTreeMap::new(),
            next_id: 0,
            tick: 0,
            cluster: None,
            lease: None,
            named: [const { None }; NAMERS.len()],
            hint: None,
            seen: None,
            confirmed: None,
            seeded: None,
            believed: Topology { bell: Arc::clone(&bell), ..Topology::default() },
            gap_since: None,
            gap_from: None,
            resolved: false,
            stale: false,
            bell,
        }
    }

    /// Goes on by another configuration, in which the sources for which `stays` holds mean what
    /// they meant before. What the others said counts no more, but who is primary by it stays so
    /// until somebody knows better: a reload must not begin in the dark.
    pub fn reconfigure(&mut self, rules: Rules, stays: impl Fn(Source) -> bool) {
        self.rules = rules;
        let mut forgets = self.lease.take_if(|_| !stays(Source::Consul)).is_some();
        for (named, source) in self.named.iter_mut().zip(NAMERS) {
            forgets |= named.take_if(|_| !stays(source)).is_some();
        }
        for known in self.nodes.values_mut() {
            let before = known.words.len();
            known.words.retain(|word| stays(word.source));
            forgets |= known.words.len() < before;
            if known.words.is_empty() {
                (known.claims, known.claimed_at, known.names) = (None, None, None);
            }
            known.node.local = self.rules.local.as_ref() == Some(&known.node.name);
            if let Some(lag) = known.node.lag {
                known.node.freshness = self.rules.freshness(lag);
            }
        }
        if forgets {
            self.seeded = self.believed.primary;
        }
    }

    /// What is believed now.
    pub fn topology(&self) -> &Topology {
        &self.believed
    }

    /// When something changes by time alone, after `now`.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let silent = self.nodes.values().filter_map(Known::silent_since);
        let silent = silent.flat_map(|since| [since + SILENT_GRACE, since + FENCE]);
        let lease = self.lease.iter().filter_map(|lease| lease.silent_since);
        let silent = silent.chain(lease.map(|since| since + LEASE_GRACE));
        let left = self.nodes.values().filter_map(|n| n.left_at).map(|at| at + DRAIN_GRACE);
        let hint = self.hint.iter().map(|(_, at)| *at + HINT_LIFE);
        let claimed = self.nodes.values().filter_map(|n| n.claimed_at);
        let silent = silent.chain(claimed.map(|at| at + POSITIONS_GRACE));
        silent.chain(left).chain(hint).filter(|at| *at > now).min()
    }

    /// Takes note of what was seen, or, with `None`, that time has passed. Returns what is
    /// believed anew; [`State::topology`] has a higher generation if there is anything.
    pub fn observe(&mut self, seen: Option<&Observation>, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        if let Some(observation) = seen {
            self.note(observation, &mut changes);
        }
        self.nodes.retain(|_, known| known.left_at.is_none_or(|at| now < at + DRAIN_GRACE));
        self.hint.take_if(|(_, at)| now >= *at + HINT_LIFE);
        self.believe(now, &mut changes);
        changes
    }

    fn note(&mut self, observation: &Observation, changes: &mut Vec<Change>) {
        let at = observation.at;
        match &observation.saw {
            Saw::Members(members) if !members.is_empty() => {
                self.members(members, at, changes);
                if std::mem::take(&mut self.stale) {
                    changes.push(Change::Stale(false));
                }
                self.resolved = true;
            }
            Saw::Members(_) | Saw::MembersUnavailable => {
                if !std::mem::replace(&mut self.stale, true) {
                    changes.push(Change::Stale(true));
                }
            }
            Saw::Named { address, name } => {
                if let Some(known) = self.nodes.get_mut(address)
                    && !known.listed_name
                    && known.node.name != *name
                {
                    known.node.name = Arc::clone(name);
                    known.node.local = self.rules.local.as_ref() == Some(name);
                    changes.push(Change::Named { node: Arc::clone(name), address: *address });
                }
            }
            Saw::Claim { address, claim } => {
                self.claim(*address, claim, observation.source, at, changes);
            }
            Saw::Silent { address } => {
                if let Some(known) = self.nodes.get_mut(address) {
                    // A source that never spoke of it has nothing to take back.
                    let word = known.words.iter_mut().find(|w| w.source == observation.source);
                    if let Some(word) = word {
                        word.silent_since.get_or_insert(at);
                    }
                    self.seeded.take_if(|id| *id == known.node.id);
                }
            }
            Saw::Lag { address, lag } => self.lag(*address, *lag, changes),
            Saw::PrimaryIs(name) => {
                if let Some(place) = NAMERS.iter().position(|s| *s == observation.source)
                    && let Some(named) = self.named.get_mut(place)
                {
                    *named = Some(name.clone().map_or(Named::Nobody, Named::By));
                    self.seeded = None;
                }
            }
            Saw::Lease { holder, index, reset } => {
                self.lease(holder.as_ref(), *index, *reset, changes);
            }
            Saw::NoNews(why) => {
                let (source, why) = (observation.source, *why);
                changes.push(Change::NoNews { source, why });
                if source == Source::Consul
                    && let Some(lease) = &mut self.lease
                {
                    lease.silent_since.get_or_insert(at);
                }
                if let Some(place) = NAMERS.iter().position(|s| *s == source)
                    && source == Source::File
                    && let Some(named) = self.named.get_mut(place)
                {
                    *named = None;
                }
            }
            Saw::Confirmed(name) => {
                let node = self.listed(name).map(|node| node.address);
                let known = node.and_then(|address| self.nodes.get(&address));
                self.confirmed = known.and_then(|known| known.incarnation).or(self.confirmed);
            }
            Saw::PrimaryHint(name) => self.hint = Some((Arc::clone(name), at)),
            Saw::Probed { address, healthy } => {
                if let Some(known) = self.nodes.get_mut(address)
                    && !known.refused
                    && known.node.probed_healthy != *healthy
                {
                    known.node.probed_healthy = *healthy;
                    let node = Arc::clone(&known.node.name);
                    changes.push(Change::Probed { node, healthy: *healthy });
                }
            }
            Saw::Failed { node, connect } => self.failed(*node, *connect, at, changes),
            Saw::Answered { node } => {
                if let Some(known) = self.by_id(*node) {
                    known.node.record = known.node.record.answered();
                }
            }
        }
    }

    fn by_id(&mut self, id: NodeId) -> Option<&mut Known> {
        self.nodes.values_mut().find(|known| known.node.id == id)
    }

    fn members(&mut self, members: &[Member], at: Instant, changes: &mut Vec<Change>) {
        let first = !self.resolved;
        for member in members.iter().take(MEMBERS) {
            if let Some(known) = self.nodes.get_mut(&member.address) {
                known.left_at = None;
                known.node.presence = Presence::Member;
                known.node.near = member.near;
                if let Some(name) = &member.name
                    && *name != known.node.name
                {
                    known.node.name = Arc::clone(name);
                    known.node.local = self.rules.local.as_ref() == Some(name);
                }
                continue;
            }
            let name = member.name.clone();
            let listed = name.is_some();
            let name = name.unwrap_or_else(|| member.address.to_string().into());
            let id = NodeId(self.next_id);
            self.next_id += 1;
            let node = Node {
                local: self.rules.local.as_ref() == Some(&name),
                near: member.near,
                admitted: (!first).then_some(at),
                progress: Progress::new(Arc::clone(&self.bell)),
                ..Node::new(id, Arc::clone(&name), member.address)
            };
            self.nodes.insert(member.address, Known::new(node, listed));
            changes.push(Change::Joined { node: name, address: member.address });
        }
        for (address, known) in &mut self.nodes {
            if known.left_at.is_none() && !members.iter().any(|m| m.address == *address) {
                known.left_at = Some(at);
                known.node.presence = Presence::Draining;
                changes.push(Change::Left { node: Arc::clone(&known.node.name) });
            }
        }
    }

    /// Takes note of the lease key. A lower index is old news, unless Consul's history went back.
    fn lease(
        &mut self,
        holder: Option<&Holder>,
        index: u64,
        reset: bool,
        changes: &mut Vec<Change>,
    ) {
        if let Some(lease) = &self.lease
            && index < lease.index
        {
            if !reset {
                return;
            }
            changes.push(Change::LeaseReset);
        }
        self.lease = Some(Lease { holder: holder.cloned(), index, silent_since: None });
        self.seeded = None;
    }

    fn claim(
        &mut self,
        address: SocketAddr,
        claim: &Claim,
        source: Source,
        at: Instant,
        changes: &mut Vec<Change>,
    ) {
        let ours = match (&self.cluster, &claim.cluster) {
            (None, Some(told)) => {
                self.cluster = Some(Arc::clone(told));
                true
            }
            (Some(ours), Some(told)) => ours == told,
            (_, None) => true,
        };
        let Some(known) = self.nodes.get_mut(&address) else { return };
        self.seeded.take_if(|id| *id == known.node.id);
        if !ours {
            known.claims = None;
            known.words.clear();
            if !std::mem::replace(&mut known.refused, true) {
                known.node.probed_healthy = false;
                let cluster = claim.cluster.clone().unwrap_or_else(|| "".into());
                changes.push(Change::Refused { node: Arc::clone(&known.node.name), cluster });
            }
            return;
        }
        if std::mem::take(&mut known.refused) {
            known.node.probed_healthy = true;
        }
        if let (Some(old), Some(new)) = (known.incarnation, claim.incarnation)
            && old != new
        {
            // Another process: what was known of the old one is worth nothing, but that this one
            // can't have claimed anything before the old one was last heard.
            known.claims = None;
            known.positions = None;
            known.names = None;
            known.words.clear();
            known.denied = known.heard;
            known.node.id = NodeId(self.next_id);
            self.next_id += 1;
            known.node.record = eject::Record::default();
            known.node.lag = None;
            known.node.freshness = Freshness::Fresh;
            known.node.admitted = Some(at);
            changes.push(Change::Restarted { node: Arc::clone(&known.node.name) });
        }
        known.incarnation = claim.incarnation.or(known.incarnation);
        if claim.positions.is_some() || !claim.is_primary {
            known.positions.clone_from(&claim.positions);
        }
        if source == Source::Litefs {
            known.names.clone_from(&claim.primary);
        }
        self.tick += 1;
        known.heard = Some(self.tick);
        let word = Word { source, is_primary: claim.is_primary, silent_since: None };
        match known.words.iter_mut().find(|word| word.source == source) {
            Some(old) => *old = word,
            None => known.words.push(word),
        }
        if !known.words.iter().all(|word| word.is_primary) {
            known.claims = None;
            known.denied = Some(self.tick);
        } else if known.claims.is_none() {
            known.claims = Some(Standing { after: known.denied, by: self.tick });
            known.claimed_at = Some(at);
        }
    }

    fn lag(&mut self, address: SocketAddr, lag: Duration, changes: &mut Vec<Change>) {
        let freshness = self.rules.freshness(lag);
        let Some(known) = self.nodes.get_mut(&address) else { return };
        known.node.lag = Some(lag);
        if known.node.freshness != freshness {
            known.node.freshness = freshness;
            changes.push(Change::Lag { node: Arc::clone(&known.node.name), freshness });
        }
    }

    /// A node that can't even be connected to is taken out at once, however many are: asking it
    /// again costs every request a retry. Others have to fail in a row, and no more than
    /// `eject_max` of the members go.
    fn failed(&mut self, id: NodeId, connect: bool, at: Instant, changes: &mut Vec<Change>) {
        let members = self.nodes.values().filter(|n| n.node.presence == Presence::Member);
        let members = members.count();
        let healthy =
            |known: &Known| known.node.presence == Presence::Member && known.node.is_healthy(at);
        let ejected = members - self.nodes.values().filter(|known| healthy(known)).count();
        let others = self.nodes.values().any(|k| k.node.id != id && healthy(k));
        let share_left = ((ejected + 1) as f64) <= (members as f64) * self.rules.eject_max;
        let is_primary = self.believed.primary == Some(id);
        let rules = self.rules.eject;
        let Some(known) = self.by_id(id) else { return };
        let strikes = if connect { rules.after.max(1) } else { 1 };
        let failed = |record: eject::Record, _| record.failed(at, &rules);
        let record = (0..strikes).fold(known.node.record, failed);
        let ejects = record.is_ejected(at) && !known.node.record.is_ejected(at);
        if ejects && (!others || !(share_left || connect) || is_primary) {
            // Taking it out would leave nobody, or nobody who can write.
            return;
        }
        known.node.record = record;
        if ejects {
            changes.push(Change::Ejected { node: Arc::clone(&known.node.name) });
        }
    }

    /// Draws the conclusions.
    fn believe(&mut self, now: Instant, changes: &mut Vec<Change>) {
        self.settle_by_lease(now);
        let (primary, gap) = self.primary(now);
        let lineage = self.lineage(primary);
        let known = self.nodes.values().find(|known| Some(known.node.id) == primary);
        let was = known.filter(|known| known.claims.is_some()).and_then(Known::was);
        self.seen = was.or(self.seen.take());
        let anything = primary.is_some() || self.nodes.values().any(Known::spoke);
        let astray = self.astray(primary, now);
        let mut nodes: Vec<Node> = Vec::with_capacity(self.nodes.len());
        for known in self.nodes.values_mut() {
            known.node.role = match primary {
                Some(id) if id == known.node.id => Role::Primary,
                _ if known.refused || known.is_silent(now) => Role::Unknown,
                _ if known.spoke() || anything => Role::Replica,
                _ => Role::Unknown,
            };
            let fenced = known.is_claimant(now) && primary != Some(known.node.id);
            if fenced && !known.node.fenced {
                changes.push(Change::Fenced { node: Arc::clone(&known.node.name) });
            }
            known.node.fenced = fenced;
            let mut node = known.node.clone();
            if node.role == Role::Primary {
                // It is what the others are behind of.
                node.freshness = Freshness::Fresh;
            } else if fenced || known.is_silent(now) || astray.contains(&node.address) {
                // It follows nobody that counts, whatever it says of its lag, or says nothing: a
                // frozen node takes connections and never answers.
                node.freshness = Freshness::TooFar;
            }
            nodes.push(node);
        }
        nodes.sort_by(|a, b| a.name.cmp(&b.name).then(a.address.cmp(&b.address)));
        let old = &self.believed;
        let same = old.primary == primary
            && (primary.is_some() || old.primary_gap == gap)
            && old.resolved == self.resolved
            && old.stale == self.stale
            && old.cluster_id == self.cluster
            && Arc::ptr_eq(&old.lineage, &lineage)
            && old.nodes.len() == nodes.len()
            && old.nodes.iter().zip(&nodes).all(|(a, b)| is_same(a, b));
        if same {
            return;
        }
        let mut term = old.term;
        if old.primary != primary {
            let name = |nodes: &[Node], id: NodeId| {
                nodes.iter().find(|n| n.id == id).map(|n| Arc::clone(&n.name))
            };
            let from = old.primary.and_then(|id| name(&old.nodes, id));
            if let Some(to) = primary.and_then(|id| name(&nodes, id)) {
                term += 1;
                let gap = self.gap_since.take().map_or(Duration::ZERO, |since| now - since);
                let from = from.or_else(|| self.gap_from.take());
                changes.push(Change::Primary { from, to, term, gap });
            } else {
                self.gap_since = Some(now);
                self.gap_from.clone_from(&from);
                if let Some(from) = from {
                    changes.push(Change::PrimaryLost { from, why: gap });
                }
            }
        }
        if gap == PrimaryGap::SplitBrain && primary.is_none() && old.primary_gap != gap {
            let claimants = self.claimants(now).map(|known| Arc::clone(&known.node.name));
            changes.push(Change::SplitBrain { claimants: claimants.collect() });
        }
        if gap == PrimaryGap::Tripped && (old.primary.is_some() || old.primary_gap != gap) {
            for known in self.claimants(now) {
                if let Lacks::Database(database, seen, has) = self.lacks(known, now) {
                    let node = Arc::clone(&known.node.name);
                    changes.push(Change::Tripped { node, database, seen, has });
                }
            }
        }
        self.believed = Topology {
            generation: old.generation + 1,
            term,
            primary,
            primary_gap: gap,
            nodes,
            resolved: self.resolved,
            stale: self.stale,
            lineage,
            cluster_id: self.cluster.clone(),
            bell: Arc::clone(&self.bell),
        };
    }

    /// Who follows a node that claims to be the primary and is not: what these have may be thrown
    /// away.
    fn astray(&self, primary: Option<NodeId>, now: Instant) -> Vec<SocketAddr> {
        let fenced: Vec<_> =
            self.claimants(now).map(|k| k.node.id).filter(|id| Some(*id) != primary).collect();
        if primary.is_none() || fenced.is_empty() {
            return Vec::new();
        }
        let follows = |known: &&Known| {
            let named = known.names.as_ref().and_then(|name| self.listed(name));
            named.is_some_and(|named| named.id != known.node.id && fenced.contains(&named.id))
        };
        self.nodes.values().filter(follows).map(|known| known.node.address).collect()
    }

    /// The primaries so far, `primary` being the last.
    fn lineage(&self, primary: Option<NodeId>) -> Arc<[Epoch]> {
        let before = &self.believed.lineage;
        let known = self.nodes.values().find(|known| Some(known.node.id) == primary);
        let Some((known, incarnation)) = known.and_then(|k| Some((k, k.incarnation?))) else {
            return Arc::clone(before);
        };
        let (last, earlier) = match before.split_last() {
            Some((last, earlier)) if last.incarnation == incarnation => (Some(last), earlier),
            _ => (None, &**before),
        };
        // The poll may have been faster than the stream, which knows where it began.
        let start = last.and_then(|last| last.start.clone()).or_else(|| known.positions.clone());
        let news = last.is_none_or(|last| last.start.is_none() && start.is_some());
        let wants = last.is_none_or(|last| last.kept.is_none());
        // Where it is when it is first heard is no less than where it began.
        let began = start.clone().or_else(|| known.told().filter(|_| wants || news));
        let began = began.filter(|began| start.is_some() || began.is_primary == Some(true));
        if !news && (!wants || began.is_none()) {
            return Arc::clone(before);
        }
        let skipped = earlier.len().saturating_sub(EPOCHS - 1);
        let mut epochs: Vec<Epoch> = earlier.iter().skip(skipped).cloned().collect();
        if let Some(before) = epochs.last_mut().filter(|_| last.is_none()) {
            before.end = self.end(before.incarnation);
        }
        let heard = known.node.progress.last();
        let kept = began.as_ref().map(|began| lineage::kept(&epochs, began, Some(&heard)));
        epochs.push(Epoch { incarnation, start, began, kept, end: None });
        epochs.into()
    }

    /// How far this process was seen.
    fn end(&self, process: u64) -> Option<Arc<Positions>> {
        let is_its = |known: &Arc<Positions>| known.incarnation == Some(process);
        let cells = self.nodes.values().map(|known| &known.node.progress);
        let mut cells = cells.flat_map(|cell| [cell.snapshot(), cell.last()]);
        cells.find(is_its).or_else(|| self.seen.clone().filter(is_its))
    }

    /// Nodes that claim to be primary and can be heard.
    fn claimants(&self, now: Instant) -> impl Iterator<Item = &Known> {
        self.nodes.values().filter(move |known| known.is_claimant(now))
    }

    /// Of two claims the one that a fresh lease key names is the newer, from now on.
    fn settle_by_lease(&mut self, now: Instant) {
        let lease = self.lease.as_ref().filter(|lease| lease.is_fresh(now));
        let Some(holder) = lease.and_then(|lease| lease.holder.as_ref()) else { return };
        let Some(address) = self.held_by(holder).map(|node| node.address) else { return };
        let standing = |known: &Known| known.claims.filter(|_| !known.refused);
        let Some(its) = self.nodes.get(&address).and_then(standing) else { return };
        let mut others = self.nodes.iter().filter(|(other, _)| **other != address);
        let contested =
            others.any(|(_, k)| standing(k).is_some_and(|other| !its.is_newer_than(other)));
        if contested && let Some(known) = self.nodes.get_mut(&address) {
            self.tick += 2;
            known.claims = Some(Standing { after: Some(self.tick - 1), by: self.tick });
        }
    }

    fn primary(&self, now: Instant) -> (Option<NodeId>, PrimaryGap) {
        let newest = self.claimants(now).find_map(|known| {
            let its = known.claims?;
            let is_other = |other: &&Known| other.node.id != known.node.id;
            let mut others = self.claimants(now).filter(is_other).filter_map(|k| k.claims);
            others.all(|other| its.is_newer_than(other)).then_some((known.node.id, its))
        });
        if let Some((id, its)) = newest {
            let outweighs = |known: &Known| {
                let lasts = known.silent_since().is_some_and(|since| now < since + FENCE);
                !known.refused && lasts && known.claims.is_some_and(|c| c.is_newer_than(its))
            };
            if self.nodes.values().any(outweighs) {
                return (None, PrimaryGap::Unreachable);
            }
            let known = self.nodes.values().find(|known| known.node.id == id);
            return match known.map(|known| self.lacks(known, now)) {
                Some(Lacks::Database(..)) => (None, PrimaryGap::Tripped),
                Some(Lacks::Unknown) => (None, PrimaryGap::Unknown),
                Some(Lacks::Nothing) | None => (Some(id), PrimaryGap::Unknown),
            };
        }
        if self.claimants(now).next().is_some() {
            return (None, PrimaryGap::SplitBrain);
        }
        if self.nodes.values().any(|known| known.claims.is_some()) {
            return (None, PrimaryGap::Unreachable);
        }
        if let Some(id) = self.seeded
            && self.nodes.values().any(|known| known.node.id == id)
        {
            return (Some(id), PrimaryGap::Unknown);
        }
        // Nodes that speak for themselves, and none of them claims: names given by others are
        // old news.
        if self.nodes.values().any(|known| known.spoke() && known.silent_since().is_none()) {
            return (None, PrimaryGap::Unknown);
        }
        self.by_name(now)
    }

    /// What a claimant lacks of what was seen: of the primary before, or, where there was none
    /// yet, of the other nodes.
    fn lacks(&self, known: &Known, now: Instant) -> Lacks {
        let Some(process) = known.incarnation else { return Lacks::Nothing };
        let is_known = self.believed.lineage.last().is_some_and(|last| last.incarnation == process);
        if is_known || self.confirmed == Some(process) || self.rules.tripwire == 0 {
            return Lacks::Nothing;
        }
        let Some(told) = known.told() else {
            let waits = known.claimed_at.is_some_and(|at| now < at + POSITIONS_GRACE);
            return if waits && self.seen.is_some() { Lacks::Unknown } else { Lacks::Nothing };
        };
        let others = self.nodes.values().filter(|k| k.node.id != known.node.id && !k.refused);
        let others = others.filter(|_| self.seen.is_none()).filter_map(Known::told);
        let seen: Vec<_> = self.seen.iter().cloned().chain(others).collect();
        for (database, name, position) in seen.iter().flat_map(|positions| positions.iter()) {
            let has = told.get(database).map_or(0, |position| position.txid);
            let allowed = if has == 0 { 0 } else { self.rules.tripwire };
            if position.txid.saturating_sub(has) > allowed {
                return Lacks::Database(name.into(), position.txid, has);
            }
        }
        Lacks::Nothing
    }

    /// Who is primary where no node speaks for itself.
    fn by_name(&self, now: Instant) -> (Option<NodeId>, PrimaryGap) {
        let verdict = |node: Option<&Node>| match node {
            Some(node) => (Some(node.id), PrimaryGap::Unknown),
            None => (None, PrimaryGap::NotAMember),
        };
        let held = |lease: &Lease| match &lease.holder {
            Some(holder) => verdict(self.held_by(holder)),
            None => (None, PrimaryGap::Unknown),
        };
        if let Some(lease) = self.lease.as_ref().filter(|lease| lease.is_fresh(now)) {
            return held(lease);
        }
        if let Some((name, _)) = &self.hint
            && let Some(node) = self.listed(name)
        {
            return (Some(node.id), PrimaryGap::Unknown);
        }
        if let Some(lease) = &self.lease {
            return held(lease);
        }
        match self.named.iter().flatten().next() {
            None | Some(Named::Nobody) => (None, PrimaryGap::Unknown),
            Some(Named::By(PrimaryName::Instance(name))) => verdict(self.listed(name)),
            Some(Named::By(PrimaryName::Addresses(addresses))) => {
                let here = |known: &&Known| addresses.contains(&known.node.address.ip());
                let mut listed = self.nodes.values().filter(here).map(|known| &known.node);
                verdict(listed.next().filter(|_| listed.next().is_none()))
            }
        }
    }

    fn held_by(&self, holder: &Holder) -> Option<&Node> {
        self.listed(&holder.name).or_else(|| self.listed(holder.advertised.as_ref()?))
    }

    fn listed(&self, name: &str) -> Option<&Node> {
        let nodes: Vec<Node> = self.nodes.values().map(|known| known.node.clone()).collect();
        let address = super::names::find(&nodes, name)?.address;
        self.nodes.get(&address).map(|known| &known.node)
    }
}

impl Known {
    fn new(node: Node, listed_name: bool) -> Self {
        Self {
            node,
            listed_name,
            incarnation: None,
            words: Vec::new(),
            claims: None,
            claimed_at: None,
            denied: None,
            heard: None,
            positions: None,
            names: None,
            left_at: None,
            refused: false,
        }
    }

    /// Where this very process is, as far as it is known now.
    fn told(&self) -> Option<Arc<Positions>> {
        let told = self.node.progress.snapshot();
        (told.incarnation.is_some() && told.incarnation == self.incarnation).then_some(told)
    }

    /// Where this very process is, or was when it was last heard.
    fn was(&self) -> Option<Arc<Positions>> {
        let last = || Some(self.node.progress.last()).filter(|last| last.incarnation.is_some());
        self.told().or_else(|| last().filter(|last| last.incarnation == self.incarnation))
    }

    /// It said what it is.
    fn spoke(&self) -> bool {
        !self.words.is_empty()
    }

    /// Since when one of the sources that spoke of it can't hear it any more.
    fn silent_since(&self) -> Option<Instant> {
        self.words.iter().filter_map(|word| word.silent_since).min()
    }

    fn is_silent(&self, now: Instant) -> bool {
        self.silent_since().is_some_and(|since| now >= since + SILENT_GRACE)
    }

    fn is_claimant(&self, now: Instant) -> bool {
        self.claims.is_some() && !self.refused && !self.is_silent(now)
    }
}

/// Whether nobody could tell the difference. Lag is compared by what it means.
fn is_same(a: &Node, b: &Node) -> bool {
    a.id == b.id
        && a.name == b.name
        && a.address == b.address
        && a.role == b.role
        && a.presence == b.presence
        && a.freshness == b.freshness
        && a.record == b.record
        && a.probed_healthy == b.probed_healthy
        && a.fenced == b.fenced
        && a.lag.map(|lag| lag.as_secs()) == b.lag.map(|lag| lag.as_secs())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topology::{Trouble, position::Position};

    struct Cluster {
        state: State,
        now: Instant,
        changes: Vec<Change>,
    }

    fn rules() -> Rules {
        Rules {
            max_lag: Duration::from_secs(10),
            soft_lag: Duration::from_secs(1),
            eject: eject::Rules {
                after: 2,
                base: Duration::from_secs(5),
                max: Duration::from_secs(60),
            },
            eject_max: 0.5,
            local: None,
            tripwire: 1000,
        }
    }

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 80))
    }

    fn holder(n: u8) -> Option<Holder> {
        (n > 0).then(|| Holder { name: format!("n{n}").into(), advertised: None })
    }

    fn member(n: u8) -> Member {
        Member { address: address(n), name: Some(format!("n{n}").into()), near: false }
    }

    impl Cluster {
        fn of(n: u8) -> Self {
            let state = State::new(rules());
            let mut cluster = Self { state, now: Instant::now(), changes: Vec::new() };
            cluster.see(Saw::Members((1..=n).map(member).collect()));
            cluster
        }

        fn see(&mut self, saw: Saw) -> &mut Self {
            let source = match saw {
                Saw::PrimaryIs(_) => Source::Instance,
                Saw::PrimaryHint(_) => Source::Replay,
                Saw::Lease { .. } | Saw::NoNews(_) => Source::Consul,
                _ => Source::Litefs,
            };
            self.see_by(source, saw)
        }

        fn see_by(&mut self, source: Source, saw: Saw) -> &mut Self {
            let observation = Observation { saw, source, at: self.now };
            self.changes.extend(self.state.observe(Some(&observation), self.now));
            self
        }

        fn says(&mut self, n: u8, is_primary: bool, incarnation: u64) -> &mut Self {
            let claim = Claim { incarnation: Some(incarnation), is_primary, ..Claim::default() };
            self.see(Saw::Claim { address: address(n), claim })
        }

        /// An HTTP probe for the role.
        fn probed(&mut self, n: u8, is_primary: bool) -> &mut Self {
            let claim = Claim { is_primary, ..Claim::default() };
            self.see_by(Source::Http, Saw::Claim { address: address(n), claim })
        }

        fn silent(&mut self, n: u8) -> &mut Self {
            self.see(Saw::Silent { address: address(n) })
        }

        /// The lease key: held by a node, or with 0 by nobody.
        fn key(&mut self, n: u8, index: u64) -> &mut Self {
            self.see(Saw::Lease { holder: holder(n), index, reset: false })
        }

        fn fenced(&self) -> Vec<&str> {
            let nodes = &self.state.topology().nodes;
            nodes.iter().filter(|node| node.fenced).map(|node| &*node.name).collect()
        }

        fn pass(&mut self, seconds: u64) -> &mut Self {
            self.now += Duration::from_secs(seconds);
            self.changes.extend(self.state.observe(None, self.now));
            self
        }

        fn primary(&self) -> Option<&str> {
            self.state.topology().primary().map(|node| &*node.name)
        }

        fn gap(&self) -> PrimaryGap {
            self.state.topology().primary_gap
        }
    }

    #[test]
    fn who_says_so_is_primary() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, false, 1).says(2, true, 2).says(3, false, 3);
        assert_eq!(cluster.primary(), Some("n2"));
        let roles: Vec<_> = cluster.state.topology().nodes.iter().map(|n| n.role).collect();
        assert_eq!(roles, [Role::Replica, Role::Primary, Role::Replica]);
    }

    #[test]
    fn the_newer_of_two_claims_wins() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(3, false, 3).says(3, true, 3);
        assert_eq!(cluster.primary(), Some("n3"));
        assert_eq!(cluster.state.topology().term, 2);
        // The older one repeats itself: that is no newer claim.
        cluster.says(1, true, 1);
        assert_eq!(cluster.primary(), Some("n3"));
        cluster.says(1, false, 1);
        assert_eq!(cluster.primary(), Some("n3"));
    }

    #[test]
    fn two_claims_from_the_start_get_no_writes_until_one_withdraws() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(3, true, 3);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::SplitBrain));
        assert!(cluster.changes.iter().any(|c| matches!(c, Change::SplitBrain { .. })));
        cluster.says(1, false, 1);
        assert_eq!(cluster.primary(), Some("n3"));
    }

    #[test]
    fn a_silent_claimant_is_none_and_resumes_its_old_claim() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).says(2, false, 2).see(Saw::Silent { address: address(1) });
        assert_eq!(cluster.primary(), Some("n1"), "for a moment");
        cluster.pass(1);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Unreachable));
        cluster.says(2, true, 2).says(1, true, 1);
        assert_eq!(cluster.primary(), Some("n2"), "the thawed one's claim is the older");
    }

    #[test]
    fn time_that_passed_is_no_deadline() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).silent(1).key(1, 5).see(Saw::NoNews(Trouble::Unreachable));
        for _ in 0..100 {
            let Some(deadline) = cluster.state.deadline(cluster.now) else { break };
            assert!(deadline > cluster.now);
            cluster.now = deadline;
            cluster.pass(0);
        }
        assert_eq!(cluster.state.deadline(cluster.now), None, "a silent claimant must not spin us");
    }

    #[test]
    fn a_claim_by_first_word_is_newer_than_no_other() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).silent(1).pass(2);
        // The pod that replaces it speaks for the first time as primary.
        cluster.says(2, true, 2);
        assert_eq!(cluster.primary(), Some("n2"), "the old one is silent, and no newer");
        cluster.says(1, true, 1);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::SplitBrain));
        assert_eq!(cluster.fenced(), ["n1", "n2"]);
    }

    #[test]
    fn a_process_that_began_while_a_claim_stood_claims_later() {
        let mut cluster = Cluster::of(3);
        cluster.says(3, false, 3).says(1, true, 1).says(3, false, 3);
        // The replica restarts and comes back as primary: reference/litefs.md section 6.
        cluster.says(3, true, 33);
        assert_eq!(cluster.primary(), Some("n3"));
        assert_eq!(cluster.fenced(), ["n1"]);
        assert!(cluster.changes.contains(&Change::Fenced { node: "n1".into() }));
        let n1 = cluster.state.topology().named("n1").unwrap();
        assert_eq!(n1.freshness, Freshness::TooFar, "it follows nobody");
        cluster.says(1, false, 1);
        assert!(cluster.fenced().is_empty());
    }

    #[test]
    fn a_silent_newer_claim_keeps_an_older_one_from_the_writes_for_a_while() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(3, false, 3).says(3, true, 3).silent(3).pass(2);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Unreachable));
        cluster.pass(FENCE.as_secs());
        assert_eq!(cluster.primary(), Some("n1"), "but not for ever");
        // A claim that began since then is newer than both.
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(3, false, 3).says(3, true, 3).silent(3);
        cluster.says(1, false, 1).says(1, true, 1);
        assert_eq!(cluster.primary(), Some("n1"));
    }

    #[test]
    fn the_lease_decides_between_claims_of_unknown_order() {
        for (key, want) in [(1, Some("n1")), (3, Some("n3")), (2, None), (0, None), (9, None)] {
            for key_first in [true, false] {
                let mut cluster = Cluster::of(3);
                if key_first {
                    cluster.key(key, 5).says(1, true, 1).says(3, true, 3);
                } else {
                    cluster.says(1, true, 1).says(3, true, 3).key(key, 5);
                }
                assert_eq!(cluster.primary(), want, "{key} {key_first}");
            }
        }
    }

    #[test]
    fn the_lease_outweighs_the_order_that_was_seen() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(3, false, 3).key(1, 5).says(3, true, 3);
        assert_eq!(cluster.primary(), Some("n1"), "the key's holder");
        assert_eq!(cluster.fenced(), ["n3"]);
        // A moment later the key tells the same as the nodes.
        cluster.key(3, 6);
        assert_eq!(cluster.primary(), Some("n3"));
        assert_eq!(cluster.fenced(), ["n1"]);
    }

    #[test]
    fn a_lease_without_news_decides_nothing_but_what_it_decided_stands() {
        let no_news = || Saw::NoNews(Trouble::Unreachable);
        let mut cluster = Cluster::of(3);
        cluster.key(1, 5).see(no_news()).pass(2).says(1, true, 1).says(3, true, 3);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::SplitBrain));
        cluster.key(1, 5);
        assert_eq!(cluster.primary(), Some("n1"));
        cluster.see(no_news()).pass(60);
        assert_eq!(cluster.primary(), Some("n1"), "no news is no loss");
        // A newer claim is followed again while the key is out of sight.
        cluster.says(3, false, 3).says(3, true, 3);
        assert_eq!(cluster.primary(), Some("n3"));
    }

    #[test]
    fn a_primary_by_name_enters_the_lineage_when_it_speaks() {
        let mut cluster = Cluster::of(3);
        cluster.key(1, 5);
        assert!(cluster.state.topology().lineage.is_empty(), "its process is not known");
        cluster.says(1, true, 7);
        let lineage = &cluster.state.topology().lineage;
        assert_eq!(lineage.iter().map(|epoch| epoch.incarnation).collect::<Vec<_>>(), [7]);
    }

    fn told(incarnation: u64, databases: &[(&str, u64)]) -> Positions {
        let mut positions = Positions::of(Some(incarnation));
        for (name, txid) in databases {
            let position = Position { txid: *txid, checksum: 1 << 63 | txid };
            positions.set(name, position, Instant::now());
        }
        positions
    }

    impl Cluster {
        /// Says so, and where it is. Process and node have the same number.
        fn tells(&mut self, n: u8, is_primary: bool, databases: &[(&str, u64)]) -> &mut Self {
            let id = u64::from(n);
            let node = self.state.topology().named(&format!("n{n}")).unwrap();
            node.progress.set(told(id, databases));
            self.says(n, is_primary, id)
        }
    }

    /// `from..=to` on a branch, of a process that says that it is primary.
    fn history(incarnation: u64, from: u64, to: u64, branch: u64) -> Positions {
        let mut positions = Positions::of(Some(incarnation));
        positions.is_primary = Some(true);
        for txid in from..=to {
            let checksum = 1 << 63 | branch << 32 | txid;
            positions.set("app.db", Position { txid, checksum }, Instant::now());
        }
        positions
    }

    impl Cluster {
        /// Its stream breaks, or has told this.
        fn feeds(&mut self, n: u8, positions: Positions) -> &mut Self {
            let nodes = &self.state.topology().nodes;
            let node = nodes.iter().find(|node| node.address == address(n));
            node.unwrap().progress.set(positions);
            self
        }

        /// What each primary kept of the one before it.
        fn kept(&self) -> Vec<Option<u64>> {
            let kept = |epoch: &Epoch| epoch.kept.as_ref().map(|kept| kept[0].1);
            self.state.topology().lineage.iter().map(kept).collect()
        }
    }

    #[test]
    fn a_restarted_node_that_is_primary_when_it_is_heard_keeps_what_its_checksums_tell() {
        // Node 1 has 12 transactions when it dies, of which node 2 goes on from 10, to 14.
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).feeds(1, history(1, 1, 12, 1)).says(1, true, 1);
        let start = history(2, 1, 10, 1);
        let claim = Claim {
            incarnation: Some(2),
            is_primary: true,
            positions: Some(Arc::new(start.clone())),
            ..Claim::default()
        };
        cluster.says(2, false, 2).feeds(2, start);
        cluster.see(Saw::Claim { address: address(2), claim });
        assert_eq!(cluster.primary(), Some("n2"));
        let mut second = history(2, 1, 10, 1);
        (11..=14).for_each(|txid| {
            let position = Position { txid, checksum: 1 << 63 | 2 << 32 | txid };
            second.set("app.db", position, Instant::now());
        });
        // Its feed breaks with it; node 1 is another process by then, and has 12 again.
        cluster.feeds(2, second).feeds(2, Positions::default()).silent(2);
        cluster.feeds(1, Positions::default()).says(1, false, 3).pass(40).says(1, true, 3);
        assert_eq!(cluster.kept(), [Some(12), Some(10)], "it has not told where it is");
        cluster.feeds(1, history(3, 12, 12, 1)).says(1, true, 3);
        assert_eq!(cluster.primary(), Some("n1"));
        assert_eq!(cluster.kept(), [Some(12), Some(10), Some(10)]);
        let lineage = &cluster.state.topology().lineage;
        let ends = lineage.iter().map(|e| e.end.as_ref().map(|end| end.only().unwrap().1.txid));
        assert_eq!(ends.collect::<Vec<_>>(), [Some(12), Some(14), None]);
        assert_eq!(lineage[2].start, None, "nobody saw it begin");
    }

    #[test]
    fn who_follows_a_deposed_primary_serves_no_reads() {
        let mut cluster = Cluster::of(3);
        let follows = |n: u8, whom: u8| {
            let claim = Claim {
                incarnation: Some(u64::from(n)),
                primary: Some(format!("n{whom}").into()),
                ..Claim::default()
            };
            Saw::Claim { address: address(n), claim }
        };
        let freshness = |cluster: &Cluster| {
            let nodes = cluster.state.topology().nodes.iter();
            nodes.map(|node| node.freshness).collect::<Vec<_>>()
        };
        cluster.says(1, true, 1).see(follows(2, 1)).see(follows(3, 1)).says(3, true, 3);
        assert_eq!(cluster.primary(), Some("n3"));
        use Freshness::{Fresh, TooFar};
        assert_eq!(freshness(&cluster), [TooFar, TooFar, Fresh]);
        cluster.see(follows(2, 3));
        assert_eq!(freshness(&cluster), [TooFar, Fresh, Fresh]);
        // An old name says nothing once nobody claims to go by it.
        cluster.see(follows(2, 1)).see(follows(1, 3));
        assert_eq!(freshness(&cluster), [Fresh, Fresh, Fresh]);
    }

    #[test]
    fn a_new_primary_that_lacks_too_much_gets_no_writes() {
        type Databases<'d> = &'d [(&'d str, u64)];
        let seen: Databases<'_> = &[("a.db", 5000), ("b.db", 7)];
        let table: [(Databases<'_>, bool); 7] = [
            (&[("a.db", 5000), ("b.db", 7)], false),
            (&[("a.db", 4000), ("b.db", 7)], false),
            (&[("a.db", 9000), ("b.db", 1), ("c.db", 1)], false),
            (&[("a.db", 3999), ("b.db", 7)], true),
            (&[("a.db", 5000)], true),
            (&[], true),
            (&[("a.db", 1), ("b.db", 1)], true),
        ];
        for (has, trips) in table {
            let mut cluster = Cluster::of(3);
            cluster.tells(1, true, seen).tells(2, false, has);
            assert_eq!(cluster.primary(), Some("n1"), "{has:?}");
            cluster.tells(1, false, seen).tells(2, true, has);
            assert_eq!(cluster.primary(), (!trips).then_some("n2"), "{has:?}");
            if !trips {
                continue;
            }
            assert_eq!(cluster.gap(), PrimaryGap::Tripped);
            assert_eq!(cluster.fenced(), ["n2"]);
            let cried = |c: &&Change| matches!(c, Change::Tripped { node, .. } if **node == *"n2");
            assert_eq!(cluster.changes.iter().filter(cried).count(), 1);
            // Time does not heal it; the old primary would do, a confirmation of it does not.
            cluster.pass(600).see(Saw::Confirmed("n1".into()));
            assert_eq!(cluster.primary(), None);
            let mut healed = Cluster { state: cluster.state.clone(), ..Cluster::of(3) };
            healed.now = cluster.now;
            healed.tells(2, true, seen);
            assert_eq!(healed.primary(), Some("n2"), "it has what was seen");
            // The clone shares its cells.
            cluster.tells(2, true, has);
            assert_eq!(cluster.gap(), PrimaryGap::Tripped);
            cluster.see(Saw::Confirmed("n2".into()));
            assert_eq!(cluster.primary(), Some("n2"));
            // From now on its history is the one that counts.
            cluster.tells(2, true, has).tells(2, false, has).tells(3, false, has);
            cluster.tells(3, true, has);
            assert_eq!(cluster.primary(), Some("n3"), "{has:?}");
        }
    }

    #[test]
    fn at_first_the_other_nodes_tell_what_there_was() {
        let mut cluster = Cluster::of(3);
        cluster.tells(2, false, &[("a.db", 5000)]).tells(3, false, &[("a.db", 4990)]);
        cluster.tells(1, true, &[]);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Tripped));
        // They took over the new history: there is nothing left to protect.
        cluster.tells(2, false, &[]).tells(3, false, &[]);
        assert_eq!(cluster.primary(), Some("n1"));
    }

    #[test]
    fn a_claimant_whose_positions_are_not_known_waits_for_them_a_moment() {
        let waiting = || {
            let mut cluster = Cluster::of(2);
            cluster.tells(1, true, &[("a.db", 5000)]).says(2, false, 2).says(1, false, 1);
            cluster.says(2, true, 2);
            assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Unknown));
            cluster
        };
        let mut cluster = waiting();
        cluster.tells(2, true, &[]);
        assert_eq!(cluster.gap(), PrimaryGap::Tripped);
        let mut cluster = waiting();
        cluster.pass(POSITIONS_GRACE.as_secs());
        assert_eq!(cluster.primary(), Some("n2"), "a source that never tells must not block");
        // Nor is the same process asked again.
        cluster.tells(2, true, &[]);
        assert_eq!(cluster.primary(), Some("n2"));
    }

    #[test]
    fn the_tripwire_can_be_taken_away() {
        let mut cluster = Cluster::of(2);
        cluster.state.rules.tripwire = 0;
        cluster.tells(2, false, &[]).tells(1, true, &[("a.db", 5000)]).tells(1, false, &[]);
        cluster.tells(2, true, &[]);
        assert_eq!(cluster.primary(), Some("n2"));
    }

    #[test]
    fn a_lease_alone_names_the_primary() {
        let mut cluster = Cluster::of(3);
        cluster.key(2, 5);
        assert_eq!(cluster.primary(), Some("n2"));
        cluster.see(Saw::NoNews(Trouble::Unreachable)).pass(600);
        assert_eq!(cluster.primary(), Some("n2"), "no news is no loss");
        cluster.key(0, 6);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Unknown));
        cluster.key(9, 7);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::NotAMember));
        cluster.see(Saw::PrimaryHint("n3".into()));
        assert_eq!(cluster.primary(), None, "a fresh key outweighs a name from a replay");
        let advertised = Some(Arc::from("10.0.0.3:20202"));
        let holder = Some(Holder { name: "db.example".into(), advertised });
        cluster.see(Saw::Lease { holder, index: 8, reset: false });
        assert_eq!(cluster.primary(), Some("n3"), "found by what it advertises");
        // A node's own word outweighs old news that it is primary.
        cluster.says(3, false, 3);
        assert_eq!(cluster.primary(), None);
    }

    #[test]
    fn the_index_of_a_lease_only_goes_back_with_consul_itself() {
        let mut cluster = Cluster::of(3);
        cluster.key(2, 50).key(1, 40);
        assert_eq!(cluster.primary(), Some("n2"), "old news");
        cluster.see(Saw::Lease { holder: holder(1), index: 3, reset: true });
        assert_eq!(cluster.primary(), Some("n1"));
        assert!(cluster.changes.contains(&Change::LeaseReset));
        cluster.key(3, 4);
        assert_eq!(cluster.primary(), Some("n3"));
    }

    #[test]
    fn a_frozen_primary_is_noticed_whatever_key_and_replicas_say() {
        let mut cluster = Cluster::of(3);
        cluster.key(1, 5).says(1, true, 1);
        for n in [2, 3] {
            let claim = Claim { primary: Some("n1".into()), ..Claim::default() };
            cluster.see(Saw::Claim { address: address(n), claim });
        }
        cluster.silent(1).pass(1);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Unreachable));
    }

    #[test]
    fn sources_that_speak_of_a_node_must_agree() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).probed(1, false);
        assert_eq!(cluster.primary(), None);
        cluster.probed(1, true);
        assert_eq!(cluster.primary(), Some("n1"));
        // One of them can't hear it any more.
        cluster.see_by(Source::Http, Saw::Silent { address: address(1) }).pass(1);
        assert_eq!((cluster.primary(), cluster.gap()), (None, PrimaryGap::Unreachable));
        // A source that never heard it has nothing to say.
        let mut cluster = Cluster::of(2);
        cluster.silent(1).probed(1, true).pass(5);
        assert_eq!(cluster.primary(), Some("n1"));
    }

    #[test]
    fn names_count_by_their_source() {
        let named = |n: u8| Saw::PrimaryIs(Some(PrimaryName::Instance(format!("n{n}").into())));
        let mut cluster = Cluster::of(4);
        cluster.see_by(Source::File, named(3)).see_by(Source::Instance, named(1));
        cluster.see_by(Source::Dns, named(2));
        assert_eq!(cluster.primary(), Some("n3"));
        cluster.see_by(Source::File, Saw::PrimaryIs(None));
        assert_eq!(cluster.primary(), None, "the file knows that there is none");
        cluster.see_by(Source::File, Saw::NoNews(Trouble::Unreachable));
        assert_eq!(cluster.primary(), Some("n2"));
        cluster.key(4, 1);
        assert_eq!(cluster.primary(), Some("n4"));
    }

    #[test]
    fn a_reload_that_asks_others_goes_on_with_who_was_primary_until_somebody_knows() {
        let again = || {
            let mut cluster = Cluster::of(2);
            cluster.says(1, true, 1);
            cluster.state.reconfigure(rules(), |_| false);
            cluster.pass(0);
            assert_eq!(cluster.primary(), Some("n1"));
            cluster
        };
        let mut cluster = again();
        cluster.says(2, false, 2);
        assert_eq!(cluster.primary(), Some("n1"), "it has not been asked yet");
        cluster.says(1, false, 1);
        assert_eq!(cluster.primary(), None);
        let mut cluster = again();
        cluster.see(Saw::PrimaryIs(Some(PrimaryName::Instance("n2".into()))));
        assert_eq!(cluster.primary(), Some("n2"), "the configuration names another now");
        let mut cluster = again();
        cluster.silent(1);
        assert_eq!(cluster.primary(), None);
    }

    #[test]
    fn a_reload_that_asks_the_same_forgets_no_claim_and_no_silence() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).says(2, false, 2).key(1, 1);
        let generation = cluster.state.topology().generation;
        cluster.state.reconfigure(rules(), |_| true);
        cluster.says(2, false, 2);
        assert_eq!(cluster.primary(), Some("n1"));
        assert_eq!(cluster.state.topology().generation, generation, "nothing is news");
        // A dead primary that the lease key names for some seconds more is none after a reload
        // either: who takes it for one makes reads fail that a replica could serve.
        cluster.see(Saw::Silent { address: address(1) }).pass(2);
        assert_eq!(cluster.primary(), None);
        cluster.state.reconfigure(rules(), |_| true);
        cluster.key(1, 1);
        assert_eq!(cluster.primary(), None);
        // Without the nodes' own words, the key is believed.
        cluster.state.reconfigure(rules(), |source| source == Source::Consul);
        cluster.pass(0);
        assert_eq!(cluster.primary(), Some("n1"));
    }

    #[test]
    fn a_reload_judges_known_lags_by_the_new_limits() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).says(2, false, 2);
        cluster.see(Saw::Lag { address: address(2), lag: Duration::from_secs(5) });
        let freshness = |cluster: &Cluster| cluster.state.topology().named("n2").unwrap().freshness;
        assert_eq!(freshness(&cluster), Freshness::Behind);
        let strict = Rules { max_lag: Duration::from_secs(2), ..rules() };
        cluster.state.reconfigure(strict, |_| true);
        cluster.pass(0);
        assert_eq!(freshness(&cluster), Freshness::TooFar);
    }

    #[test]
    fn a_silent_node_is_no_reader_while_others_are_heard() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).says(2, false, 2).see(Saw::Silent { address: address(2) });
        let node = |cluster: &Cluster| {
            let node = cluster.state.topology().named("n2").unwrap();
            (node.role, node.freshness)
        };
        assert_eq!(node(&cluster), (Role::Replica, Freshness::Fresh), "for a moment");
        cluster.pass(1);
        assert_eq!(node(&cluster), (Role::Unknown, Freshness::TooFar));
        cluster.says(2, false, 2);
        assert_eq!(node(&cluster), (Role::Replica, Freshness::Fresh));
    }

    #[test]
    fn a_restarted_node_is_another_one() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1);
        let before = cluster.state.topology().primary;
        cluster.says(1, false, 9);
        assert_eq!(cluster.primary(), None);
        assert_ne!(before, Some(cluster.state.topology().named("n1").unwrap().id));
        assert!(cluster.changes.contains(&Change::Restarted { node: "n1".into() }));
    }

    #[test]
    fn a_node_of_another_cluster_gets_nothing() {
        let mut cluster = Cluster::of(2);
        let claim = |n: u8, cluster: &str| Saw::Claim {
            address: address(n),
            claim: Claim { cluster: Some(cluster.into()), is_primary: true, ..Claim::default() },
        };
        cluster.see(claim(1, "LFSC1")).see(claim(2, "LFSC2"));
        assert_eq!(cluster.primary(), Some("n1"));
        assert!(!cluster.state.topology().named("n2").unwrap().is_healthy(cluster.now));
    }

    #[test]
    fn a_configured_name_counts_where_nobody_speaks_for_itself() {
        let mut cluster = Cluster::of(2);
        cluster.see(Saw::PrimaryIs(Some(PrimaryName::Instance("n1".into()))));
        assert_eq!(cluster.primary(), Some("n1"));
        cluster.see(Saw::PrimaryHint("n2".into()));
        assert_eq!(cluster.primary(), Some("n2"), "the node that refused a write knows better");
        cluster.pass(31);
        assert_eq!(cluster.primary(), Some("n1"));
        cluster.says(2, true, 2);
        assert_eq!(cluster.primary(), Some("n2"));
        cluster.says(2, false, 2);
        assert_eq!(cluster.primary(), None, "a node that speaks outweighs names");
    }

    #[test]
    fn a_hint_to_a_stranger_changes_nothing() {
        let mut cluster = Cluster::of(2);
        cluster.see(Saw::PrimaryIs(Some(PrimaryName::Instance("n1".into()))));
        cluster.see(Saw::PrimaryHint("evil.example".into()));
        assert_eq!(cluster.primary(), Some("n1"));
    }

    #[test]
    fn an_empty_listing_keeps_the_members() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).see(Saw::Members(Vec::new()));
        assert_eq!(cluster.primary(), Some("n1"));
        assert!(cluster.state.topology().stale);
        cluster.see(Saw::MembersUnavailable).see(Saw::Members(vec![member(1), member(2)]));
        assert!(!cluster.state.topology().stale);
    }

    #[test]
    fn who_is_no_longer_listed_drains_and_may_come_back() {
        let mut cluster = Cluster::of(2);
        let id = cluster.state.topology().named("n2").unwrap().id;
        cluster.see(Saw::Members(vec![member(1)]));
        assert_eq!(cluster.state.topology().node(id).unwrap().presence, Presence::Draining);
        cluster.see(Saw::Members(vec![member(1), member(2)]));
        assert_eq!(cluster.state.topology().node(id).unwrap().presence, Presence::Member);
        cluster.see(Saw::Members(vec![member(1)])).pass(60);
        assert!(cluster.state.topology().node(id).is_none());
    }

    #[test]
    fn lag_decides_who_is_fresh() {
        let mut cluster = Cluster::of(2);
        cluster.says(1, true, 1).says(2, false, 2);
        for (millis, want) in
            [(500, Freshness::Fresh), (2_000, Freshness::Behind), (11_000, Freshness::TooFar)]
        {
            let lag = Duration::from_millis(millis);
            cluster.see(Saw::Lag { address: address(2), lag });
            assert_eq!(cluster.state.topology().named("n2").unwrap().freshness, want, "{millis}");
        }
    }

    #[test]
    fn neither_the_primary_nor_too_many_are_ejected() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(2, false, 2).says(3, false, 3);
        for n in ["n1", "n2", "n3"] {
            for _ in 0..5 {
                let node = cluster.state.topology().named(n).unwrap().id;
                cluster.see(Saw::Failed { node, connect: false });
            }
        }
        let now = cluster.now;
        let out: Vec<_> =
            cluster.state.topology().nodes.iter().filter(|n| !n.is_healthy(now)).collect();
        assert_eq!(out.len(), 1, "half of three is one: {out:?}");
        assert_eq!(&*out[0].name, "n2");
    }

    #[test]
    fn who_cannot_be_connected_to_is_out_at_once() {
        let mut cluster = Cluster::of(3);
        cluster.says(1, true, 1).says(2, false, 2).says(3, false, 3);
        for n in ["n2", "n3"] {
            let node = cluster.state.topology().named(n).unwrap().id;
            cluster.see(Saw::Failed { node, connect: true });
            assert!(!cluster.state.topology().named(n).unwrap().is_healthy(cluster.now), "{n}");
        }
    }

    fn any_saw() -> impl Strategy<Value = (Saw, u64)> {
        let members = proptest::collection::vec(1..5u8, 0..5)
            .prop_map(|ns| Saw::Members(ns.into_iter().map(member).collect()));
        let claim = (1..5u8, 0..3u64, any::<bool>(), proptest::option::of(0..2u8)).prop_map(
            |(n, incarnation, is_primary, cluster)| Saw::Claim {
                address: address(n),
                claim: Claim {
                    incarnation: Some(incarnation),
                    cluster: cluster.map(|c| c.to_string().into()),
                    is_primary,
                    primary: None,
                    positions: None,
                },
            },
        );
        let saw = prop_oneof![
            members,
            claim,
            Just(Saw::MembersUnavailable),
            (1..5u8).prop_map(|n| Saw::Silent { address: address(n) }),
            (1..5u8, 0..20u64)
                .prop_map(|(n, s)| Saw::Lag { address: address(n), lag: Duration::from_secs(s) }),
            (0..6u8).prop_map(|n| Saw::PrimaryHint(format!("n{n}").into())),
            (0..6u8)
                .prop_map(|n| Saw::PrimaryIs(Some(PrimaryName::Instance(format!("n{n}").into())))),
            (1..5u8, any::<bool>())
                .prop_map(|(n, healthy)| Saw::Probed { address: address(n), healthy }),
            (0..8u64, any::<bool>())
                .prop_map(|(n, connect)| Saw::Failed { node: NodeId(n), connect }),
            (0..8u64).prop_map(|n| Saw::Answered { node: NodeId(n) }),
            (0..6u8, 0..20u64, any::<bool>()).prop_map(|(n, index, reset)| Saw::Lease {
                holder: holder(n),
                index,
                reset
            }),
            Just(Saw::NoNews(Trouble::Malformed)),
        ];
        (saw, 0..3u64)
    }

    proptest! {
        #[test]
        fn whatever_is_seen(story in proptest::collection::vec(any_saw(), 0..60)) {
            let mut cluster = Cluster::of(3);
            let mut generation = 0;
            for (saw, seconds) in story {
                cluster.see(saw).pass(seconds);
                let topology = cluster.state.topology();
                prop_assert!(topology.generation >= generation);
                generation = topology.generation;
                cluster.state.reconfigure(rules(), |_| true);
                cluster.pass(0);
                let topology = cluster.state.topology();
                prop_assert_eq!(topology.generation, generation, "who asks the same learns nothing");
                prop_assert!(!topology.nodes.is_empty());
                let primaries = topology.nodes.iter().filter(|n| n.role == Role::Primary).count();
                prop_assert_eq!(primaries, usize::from(topology.primary.is_some()));
                if let Some(id) = topology.primary { prop_assert!(topology.node(id).is_some()); }
                let mut ids: Vec<_> = topology.nodes.iter().map(|n| n.id).collect();
                ids.sort();
                ids.dedup();
                prop_assert_eq!(ids.len(), topology.nodes.len());
                let listed = topology.nodes.iter().any(|n| n.presence == Presence::Member);
                prop_assert!(listed);
                let fenced = |n: &&Node| n.fenced && (n.role == Role::Primary || Some(n.id) == topology.primary);
                prop_assert!(!topology.nodes.iter().any(|n| fenced(&n)));
                prop_assert!(cluster.state.deadline(cluster.now).is_none_or(|at| at > cluster.now));
            }
        }

        /// Claims by two kinds of sources, a key and silence, in any order: nobody is primary
        /// against its own word, against the holder of a fresh key that claims too, or while a
        /// claim stands that certainly began later.
        #[test]
        fn claims_in_any_order(story in proptest::collection::vec((1..4u8, 0..7u8, 0..3u64), 0..60)) {
            let mut cluster = Cluster::of(3);
            let mut index = 0;
            let mut key: Option<(u8, bool)> = None;
            let mut words = std::collections::HashMap::<(u8, Source), bool>::new();
            for (n, what, seconds) in story {
                match what {
                    0 | 1 => {
                        cluster.says(n, what == 1, u64::from(n));
                        words.insert((n, Source::Litefs), what == 1);
                    }
                    2 | 3 => {
                        cluster.probed(n, what == 3);
                        words.insert((n, Source::Http), what == 3);
                    }
                    4 => {
                        cluster.silent(n);
                    }
                    5 => {
                        index += 1;
                        cluster.key(n, index);
                        key = Some((n, true));
                    }
                    _ => {
                        cluster.see(Saw::NoNews(Trouble::Unreachable));
                        cluster.pass(LEASE_GRACE.as_secs());
                        key = key.map(|(n, _)| (n, false));
                    }
                }
                cluster.pass(seconds);
                let claims = |n: u8| {
                    let mut all = words.iter().filter(|((other, _), _)| *other == n).peekable();
                    all.peek().is_some() && all.all(|(_, yes)| *yes)
                };
                let primary = cluster.primary().map(|name| name[1..].parse::<u8>().unwrap());
                if !words.is_empty() && let Some(n) = primary {
                    let silent = words.iter().all(|((m, _), _)| {
                        let known = &cluster.state.nodes[&address(*m)];
                        known.silent_since().is_some()
                    });
                    prop_assert!(claims(n) || silent, "{n} is primary against its own word");
                }
                if let (Some((holder, true)), Some(n)) = (key, primary) && claims(holder) {
                    let known = &cluster.state.nodes[&address(holder)];
                    let long_silent = known.silent_since().is_some_and(|s| cluster.now >= s + FENCE);
                    prop_assert!(n == holder || long_silent, "{n} is primary, and {holder} holds the key");
                }
                let fenced = cluster.fenced();
                prop_assert!(cluster.primary().is_none_or(|name| !fenced.contains(&name)));
            }
        }
    }
}
