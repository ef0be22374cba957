//! What is believed, from what was seen: `(state, observation, now) → changes`.
//!
//! Who is primary, in this order:
//! 1. a node's own claim. Of two, the one whose beginning was seen while the other already stood;
//!    where no order was seen, nobody gets writes (never a vote: see `reference/litefs.md`
//!    section 6). A claimant that is silent for [`SILENT_GRACE`] is none for the time being; when
//!    the same process answers again, it resumes its old claim rather than starting a newer one.
//! 2. a name learned from a `fly-replay` answer in the last [`HINT_LIFE`], if nobody speaks for
//!    itself: a configured name may be wrong, and the node that refused the write knows better.
//! 3. what the configuration or a DNS name says.
//!
//! An empty or failed listing of members changes nothing but [`Topology::stale`]. A member that
//! is no longer listed drains for [`DRAIN_GRACE`] and is then forgotten.
//!
//! Pure: the caller brings the time; nothing here waits, logs or counts.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Change, Claim, Epoch, Freshness, Member, Node, NodeId, Observation, Presence, PrimaryGap,
    PrimaryName, Role, Saw, Topology, eject,
    position::Positions,
    progress::{Bell, Progress},
};

/// How long a claimant may be silent.
const SILENT_GRACE: Duration = Duration::from_secs(1);
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
}

/// Everything known of one cluster.
#[derive(Clone, Debug)]
pub struct State {
    rules: Rules,
    nodes: BTreeMap<SocketAddr, Known>,
    next_id: u64,
    /// Orders the beginnings of claims.
    next_claim: u64,
    /// The first cluster id that a node told.
    cluster: Option<Arc<str>>,
    /// What the configuration or DNS says.
    named: Option<PrimaryName>,
    hint: Option<(Arc<str>, Instant)>,
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
    /// It said what it is.
    spoke: bool,
    claims: Option<Standing>,
    /// Where it was when it became primary, as far as that was seen.
    positions: Option<Arc<Positions>>,
    silent_since: Option<Instant>,
    left_at: Option<Instant>,
    refused: bool,
}

/// A standing claim to be primary.
#[derive(Clone, Copy, Debug)]
struct Standing {
    /// The order of its beginning, if that was seen.
    began: Option<u64>,
}

impl State {
    /// Nothing is known. `seed`: what an earlier configuration believed, so that a reload does
    /// not begin in the dark.
    pub fn new(rules: Rules, seed: Option<&Topology>) -> Self {
        let mut state = Self {
            rules,
            nodes: BTreeMap::new(),
            next_id: 0,
            next_claim: 0,
            cluster: None,
            named: None,
            hint: None,
            believed: Topology::default(),
            gap_since: None,
            gap_from: None,
            resolved: false,
            stale: false,
            bell: seed.map_or_else(Arc::default, |seed| Arc::clone(&seed.bell)),
        };
        state.believed.bell = Arc::clone(&state.bell);
        if let Some(seed) = seed {
            state.next_id = seed.nodes.iter().map(|node| node.id.0 + 1).max().unwrap_or(0);
            for node in &seed.nodes {
                let mut known = Known::new(node.clone(), true);
                known.claims = (seed.primary == Some(node.id)).then_some(Standing { began: None });
                state.nodes.insert(node.address, known);
            }
            state.resolved = seed.resolved;
            state.cluster.clone_from(&seed.cluster_id);
            state.believed = seed.clone();
        }
        state
    }

    /// What is believed now.
    pub fn topology(&self) -> &Topology {
        &self.believed
    }

    /// When something changes by time alone.
    pub fn deadline(&self) -> Option<Instant> {
        let silent = self.nodes.values().filter(|n| n.claims.is_some());
        let silent = silent.filter_map(|n| n.silent_since).map(|since| since + SILENT_GRACE);
        let left = self.nodes.values().filter_map(|n| n.left_at).map(|at| at + DRAIN_GRACE);
        let hint = self.hint.iter().map(|(_, at)| *at + HINT_LIFE);
        silent.chain(left).chain(hint).min()
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
            Saw::Claim { address, claim } => self.claim(*address, claim, at, changes),
            Saw::Silent { address } => {
                if let Some(known) = self.nodes.get_mut(address) {
                    known.silent_since.get_or_insert(at);
                }
            }
            Saw::Lag { address, lag } => self.lag(*address, *lag, changes),
            Saw::PrimaryIs(name) => self.named.clone_from(name),
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
                id,
                local: self.rules.local.as_ref() == Some(&name),
                near: member.near,
                name: Arc::clone(&name),
                address: member.address,
                role: Role::Unknown,
                presence: Presence::Member,
                lag: None,
                freshness: Freshness::Fresh,
                record: eject::Record::default(),
                probed_healthy: true,
                admitted: (!first).then_some(at),
                progress: Progress::new(Arc::clone(&self.bell)),
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

    fn claim(
        &mut self,
        address: SocketAddr,
        claim: &Claim,
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
        known.silent_since = None;
        if !ours {
            known.claims = None;
            known.spoke = false;
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
            // Another process: what was known of the old one is worth nothing.
            known.claims = None;
            known.positions = None;
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
        let seen_before = std::mem::replace(&mut known.spoke, true);
        match (claim.is_primary, known.claims) {
            (true, None) => {
                // Its beginning was seen if the node was heard before it claimed.
                let began = seen_before.then_some(self.next_claim);
                self.next_claim += 1;
                known.claims = Some(Standing { began });
            }
            (false, _) => known.claims = None,
            (true, Some(_)) => {}
        }
    }

    fn lag(&mut self, address: SocketAddr, lag: Duration, changes: &mut Vec<Change>) {
        let rules = &self.rules;
        let Some(known) = self.nodes.get_mut(&address) else { return };
        let freshness = match lag {
            lag if lag > rules.max_lag => Freshness::TooFar,
            lag if lag > rules.soft_lag => Freshness::Behind,
            _ => Freshness::Fresh,
        };
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
        let (primary, gap) = self.primary(now);
        let anything = primary.is_some() || self.nodes.values().any(|known| known.spoke);
        let mut nodes: Vec<Node> = Vec::with_capacity(self.nodes.len());
        for known in self.nodes.values_mut() {
            known.node.role = match primary {
                Some(id) if id == known.node.id => Role::Primary,
                _ if known.refused => Role::Unknown,
                _ if known.spoke || anything => Role::Replica,
                _ => Role::Unknown,
            };
            let mut node = known.node.clone();
            if node.role == Role::Primary {
                // It is what the others are behind of.
                node.freshness = Freshness::Fresh;
            }
            nodes.push(node);
        }
        nodes.sort_by(|a, b| a.name.cmp(&b.name).then(a.address.cmp(&b.address)));
        let lineage = self.lineage(primary);
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

    /// The primaries so far, `primary` being the last.
    fn lineage(&self, primary: Option<NodeId>) -> Arc<[Epoch]> {
        let before = &self.believed.lineage;
        let known = self.nodes.values().find(|known| Some(known.node.id) == primary);
        let Some((known, incarnation)) = known.and_then(|k| Some((k, k.incarnation?))) else {
            return Arc::clone(before);
        };
        let epoch = Epoch { incarnation, start: known.positions.clone() };
        let kept = match before.split_last() {
            // The poll may have been faster than the stream, which knows where it began.
            Some((last, earlier)) if last.incarnation == incarnation => {
                if last.start.is_some() || epoch.start.is_none() {
                    return Arc::clone(before);
                }
                earlier
            }
            _ => before,
        };
        let skipped = kept.len().saturating_sub(EPOCHS - 1);
        kept.iter().skip(skipped).cloned().chain([epoch]).collect()
    }

    /// Listed nodes that claim to be primary and can be heard.
    fn claimants(&self, now: Instant) -> impl Iterator<Item = &Known> {
        self.nodes.values().filter(move |known| {
            known.claims.is_some()
                && !known.refused
                && known.silent_since.is_none_or(|since| now < since + SILENT_GRACE)
        })
    }

    fn primary(&self, now: Instant) -> (Option<NodeId>, PrimaryGap) {
        let mut claimants = self.claimants(now);
        if let Some(first) = claimants.next() {
            let Some(second) = claimants.next() else {
                return (Some(first.node.id), PrimaryGap::Unknown);
            };
            let order = |known: &Known| known.claims.and_then(|standing| standing.began);
            let all = [first, second].into_iter().chain(claimants);
            // A claim whose beginning was seen is newer than one that stood already.
            let newest = all.max_by_key(|known| order(known));
            return match newest.filter(|known| order(known).is_some()) {
                Some(newest) => (Some(newest.node.id), PrimaryGap::Unknown),
                None => (None, PrimaryGap::SplitBrain),
            };
        }
        if self.nodes.values().any(|known| known.claims.is_some()) {
            return (None, PrimaryGap::Unreachable);
        }
        // Nodes that speak for themselves, and none of them claims: names given by others are
        // old news.
        if self.nodes.values().any(|known| known.spoke && known.silent_since.is_none()) {
            return (None, PrimaryGap::Unknown);
        }
        if let Some((name, _)) = &self.hint
            && let Some(node) = self.listed(name)
        {
            return (Some(node.id), PrimaryGap::Unknown);
        }
        let named = match &self.named {
            None => return (None, PrimaryGap::Unknown),
            Some(PrimaryName::Instance(name)) => self.listed(name),
            Some(PrimaryName::Addresses(addresses)) => {
                let here = |known: &&Known| addresses.contains(&known.node.address.ip());
                let mut listed = self.nodes.values().filter(here).map(|known| &known.node);
                listed.next().filter(|_| listed.next().is_none())
            }
        };
        match named {
            Some(node) => (Some(node.id), PrimaryGap::Unknown),
            None => (None, PrimaryGap::NotAMember),
        }
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
            spoke: false,
            claims: None,
            positions: None,
            silent_since: None,
            left_at: None,
            refused: false,
        }
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
        && a.lag.map(|lag| lag.as_secs()) == b.lag.map(|lag| lag.as_secs())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topology::Source;

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
        }
    }

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 80))
    }

    fn member(n: u8) -> Member {
        Member { address: address(n), name: Some(format!("n{n}").into()), near: false }
    }

    impl Cluster {
        fn of(n: u8) -> Self {
            let state = State::new(rules(), None);
            let mut cluster = Self { state, now: Instant::now(), changes: Vec::new() };
            cluster.see(Saw::Members((1..=n).map(member).collect()));
            cluster
        }

        fn see(&mut self, saw: Saw) -> &mut Self {
            let observation = Observation { saw, source: Source::Litefs, at: self.now };
            self.changes.extend(self.state.observe(Some(&observation), self.now));
            self
        }

        fn says(&mut self, n: u8, is_primary: bool, incarnation: u64) -> &mut Self {
            let claim = Claim { incarnation: Some(incarnation), is_primary, ..Claim::default() };
            self.see(Saw::Claim { address: address(n), claim })
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
            }
        }
    }
}
