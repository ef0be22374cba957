//! Which node, or that the request has to wait.
//!
//! A read whose client has a token goes to a node that has what the token stands for: one that has
//! it now, else one that is waited for a little, else the primary.
//!
//! A write goes to the primary of the snapshot, a read to the cheapest node of the best tier that
//! has one: fresh replicas (those of this zone first, where zones are known), then the primary (where `reads` lets it), then replicas over the soft
//! lag limit, then nodes of which nothing is known. Ejections are overlooked where they would
//! leave nobody: a proxy that refuses everything helps nobody. A replica over `max_lag` serves
//! only while nobody is primary, or this read could not even connect to whoever is: then nothing
//! newer is being acknowledged anywhere, as far as can be seen, and the alternative is no reads at
//! all.

use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::{
    Class, Demands, Ended, Failure, FailureKind, History, HoldFor, Problem, Request, Target,
    Wanted,
    balance::{self, Candidate, Load},
};
use crate::{
    config::cluster::{Cluster, Prefer, Reads},
    topology::{Freshness, Node, NodeId, Presence, Role, Topology, position::Reach},
};

/// What the operator wants of choices.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Who serves reads.
    pub reads: Reads,
    /// Whether the node beside us goes first.
    pub prefer: Prefer,
    /// Among equals.
    pub balance: balance::Rules,
}

impl Rules {
    /// Those of one cluster.
    pub fn of(cluster: &Cluster) -> Self {
        Self {
            reads: cluster.reads,
            prefer: cluster.prefer,
            balance: balance::Rules { balance: cluster.balance, slow_start: cluster.slow_start },
        }
    }
}

/// What is done next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Choice {
    /// Ask the node at this place of the snapshot.
    Node {
        /// Its place.
        index: usize,
        /// Why it.
        why: Why,
    },
    /// Wait.
    Hold(HoldFor),
}

/// Why a node was chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// It is the primary, and this is a write.
    Primary,
    /// The cheapest fresh replica.
    Replica,
    /// The one beside us.
    Local,
    /// The cheapest fresh replica of this zone.
    SameZone,
    /// The primary, since no replica can serve, or every node may.
    PrimaryReads,
    /// Behind, but nobody better is there.
    Behind,
    /// Nothing is known of its role.
    Unknown,
    /// Ejected or too far behind, but nobody else is there.
    LastResort,
    /// A `fly-replay` answer names it.
    Replay,
    /// A trusted peer names it.
    Asked,
    /// Only it has what the client's token stands for.
    Token,
}

impl Why {
    /// The word for logs and `explain`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
            Self::Local => "local",
            Self::SameZone => "same-zone",
            Self::PrimaryReads => "primary-reads",
            Self::Behind => "behind",
            Self::Unknown => "unknown-role",
            Self::LastResort => "last-resort",
            Self::Replay => "replay",
            Self::Asked => "asked",
            Self::Token => "token",
        }
    }
}

/// How long a request waits for news of a node that is named but can't be asked.
const PAUSE: Duration = Duration::from_millis(50);

/// Chooses. `loads` are in the order of the snapshot's nodes; `chance` is a random number.
///
/// # Errors
/// [`Problem::NoReader`], [`Problem::UnknownNode`].
pub fn choose(
    request: &Request,
    topology: &Topology,
    history: &History,
    rules: &Rules,
    loads: &[Load],
    chance: u64,
    now: Instant,
) -> Result<Choice, Problem> {
    let demands = request.demands;
    let view = View { topology, history, rules, loads, chance, now, demands };
    if let Some(target) = history.target {
        return view.target(request, target);
    }
    match (request.class, request.wanted) {
        (Class::Write, _) => Ok(view.primary(Why::Primary)),
        (Class::Read, Wanted::Primary) => Ok(view.primary(Why::Asked)),
        (Class::Read, Wanted::Node(id)) => {
            let index = view.place(id).ok_or(Problem::UnknownNode)?;
            Ok(Choice::Node { index, why: Why::Asked })
        }
        (Class::Read, Wanted::Prefer(id)) => match view.place(id).filter(|i| view.may_serve(*i)) {
            Some(index) => Ok(Choice::Node { index, why: Why::Asked }),
            None => view.reader(rules.reads),
        },
        (Class::Read, Wanted::Replica) => view.reader(Reads::Replicas),
        (Class::Read, Wanted::Any) => view.reader(rules.reads),
    }
}

struct View<'a> {
    topology: &'a Topology,
    history: &'a History,
    rules: &'a Rules,
    loads: &'a [Load],
    chance: u64,
    now: Instant,
    demands: Demands,
}

impl View<'_> {
    fn place(&self, id: NodeId) -> Option<usize> {
        self.topology.nodes.iter().position(|node| node.id == id)
    }

    fn primary(&self, why: Why) -> Choice {
        match self.topology.primary.and_then(|id| self.place(id)) {
            Some(index) if self.load(index).denies => Choice::Hold(HoldFor::Pause(PAUSE)),
            Some(index) => Choice::Node { index, why },
            None => Choice::Hold(HoldFor::Primary),
        }
    }

    /// Where a `fly-replay` answer sends it.
    fn target(&self, request: &Request, target: Target) -> Result<Choice, Problem> {
        let node = |index| Choice::Node { index, why: Why::Replay };
        match target {
            Target::Primary => Ok(self.primary(Why::Replay)),
            // It was listed a moment ago: what became of it is news to wait for.
            Target::Node(id) => {
                Ok(self.place(id).map_or(Choice::Hold(HoldFor::Pause(PAUSE)), node))
            }
            Target::Prefer(id) => match self.place(id).filter(|i| self.is_well(*i)) {
                Some(index) => Ok(node(index)),
                None => self.anyone(request, false),
            },
            Target::Any => self.anyone(request, false),
            Target::Elsewhere => self.anyone(request, true),
        }
    }

    fn is_well(&self, index: usize) -> bool {
        self.topology.nodes.get(index).is_some_and(|node| node.is_healthy(self.now))
    }

    /// Whether a read may go to a node that is preferred without being forced.
    fn may_serve(&self, index: usize) -> bool {
        self.topology.nodes.get(index).is_some_and(|node| {
            node.presence == Presence::Member
                && node.is_healthy(self.now)
                && node.freshness != Freshness::TooFar
                && self.satisfies(index)
                && (!self.demands.primary || node.role == Role::Primary)
                && !self.tried(node)
        })
    }

    /// Any healthy node, by a node's own wish.
    fn anyone(&self, request: &Request, elsewhere: bool) -> Result<Choice, Problem> {
        let picked =
            self.pick(|node| node.is_healthy(self.now) && (!elsewhere || !self.tried(node)));
        match picked {
            Some(index) => Ok(Choice::Node { index, why: Why::Replay }),
            None if request.class == Class::Write => Ok(Choice::Hold(HoldFor::Pause(PAUSE))),
            None => Err(Problem::NoReader),
        }
    }

    fn load(&self, index: usize) -> &Load {
        self.loads.get(index).unwrap_or(&Load::UNKNOWN)
    }

    /// Whether a node has what the client must be shown.
    fn satisfies(&self, index: usize) -> bool {
        let load = self.load(index);
        let is_there = !self.demands.position || load.reach == Reach::Reached;
        is_there && self.demands.staleness.is_none_or(|most| load.age <= most)
    }

    /// Whether a replica that can serve may be there in a moment, and none is there yet.
    fn is_worth_waiting(&self) -> bool {
        let serves = |node: &Node| {
            node.presence == Presence::Member
                && node.role == Role::Replica
                && node.is_healthy(self.now)
                && node.freshness == Freshness::Fresh
        };
        let mut catching_up = false;
        for (index, _) in self.topology.nodes.iter().enumerate().filter(|(_, n)| serves(n)) {
            match self.load(index).reach {
                Reach::Reached => return false,
                Reach::NotYet | Reach::Unknown => catching_up = true,
                Reach::Diverged => {}
            }
        }
        catching_up
    }

    fn reader(&self, reads: Reads) -> Result<Choice, Problem> {
        let all = reads == Reads::All;
        let primary_may = matches!(reads, Reads::PreferReplicas | Reads::All);
        let leaderless = self.topology.primary.is_none();
        let is = |role: Role| move |node: &Node| node.role == role;
        let (replica, primary, unknown) = (is(Role::Replica), is(Role::Primary), is(Role::Unknown));
        if reads == Reads::Primary {
            return Ok(self.primary(Why::PrimaryReads));
        }
        if self.demands.primary && !leaderless {
            return Ok(self.primary(Why::Token));
        }
        if self.demands.position && !self.history.waited && !all && self.is_worth_waiting() {
            return Ok(Choice::Hold(HoldFor::Position));
        }
        let well = |node: &Node| node.is_healthy(self.now);
        let fresh = |node: &Node| node.freshness == Freshness::Fresh;
        let near = |node: &Node| node.freshness != Freshness::TooFar;
        let cut_off = self.found_nobody_at_the_primary();
        type Tier<'t> = (Why, &'t dyn Fn(&Node) -> bool);
        let tiers: [Tier<'_>; 10] = [
            (Why::Local, &|n| {
                self.rules.prefer == Prefer::Local
                    && n.local
                    && (replica(n) || (all && primary(n)))
                    && well(n)
                    && fresh(n)
            }),
            (Why::SameZone, &|n| {
                n.near && (replica(n) || (all && primary(n))) && well(n) && fresh(n)
            }),
            (Why::Replica, &|n| (replica(n) || (all && primary(n))) && well(n) && fresh(n)),
            (Why::PrimaryReads, &|n| primary_may && primary(n) && well(n)),
            (Why::Behind, &|n| replica(n) && well(n) && near(n)),
            (Why::Unknown, &|n| unknown(n) && well(n) && near(n)),
            // Before those that are ejected or of which nothing is heard: they may be dead.
            (Why::LastResort, &|n| leaderless && replica(n) && well(n)),
            (Why::LastResort, &|n| (replica(n) || unknown(n) || primary_may) && near(n)),
            (Why::LastResort, &|_| leaderless),
            (Why::LastResort, &|n| cut_off && replica(n) && well(n)),
        ];
        // Nodes that this request has not tried, then, if there is no other, one that it has.
        for again in [false, true] {
            for (why, tier) in &tiers {
                let fits = |node: &Node| tier(node) && (again || !self.tried(node));
                // A zone without a free place is no reason to wait while others have some.
                let picked = self.pick(fits).filter(|index| {
                    *why != Why::SameZone || !self.loads.get(*index).is_some_and(|load| load.full)
                });
                if let Some(index) = picked {
                    return Ok(Choice::Node { index, why: *why });
                }
            }
        }
        if self.demands.position || self.demands.staleness.is_some() {
            // The primary has it, whoever serves reads otherwise, or will have it once there is one.
            return Ok(self.primary(Why::Token));
        }
        Err(Problem::NoReader)
    }

    /// Whether this request could not connect to the primary.
    fn found_nobody_at_the_primary(&self) -> bool {
        let is_nobody = |ended: Ended| match ended {
            Ended::Failed(Failure { kind, .. }) => {
                matches!(kind, FailureKind::ConnectRefused | FailureKind::ConnectTimeout)
            }
            _ => false,
        };
        let mut attempts = self.history.attempts.iter();
        attempts.any(|a| Some(a.node) == self.topology.primary && is_nobody(a.ended))
    }

    fn tried(&self, node: &Node) -> bool {
        self.history.attempts.iter().any(|attempt| attempt.node == node.id)
    }

    /// The cheapest member for whom `fits` holds; one with a free place, if there is one.
    fn pick(&self, fits: impl Fn(&Node) -> bool) -> Option<usize> {
        let mut candidates = SmallVec::<[Candidate<'_>; 8]>::new();
        let mut full = SmallVec::<[Candidate<'_>; 8]>::new();
        for (index, node) in self.topology.nodes.iter().enumerate() {
            if node.presence != Presence::Member || !fits(node) || !self.satisfies(index) {
                continue;
            }
            let load = self.load(index);
            let candidate = Candidate { index, node, load };
            if load.full { &mut full } else { &mut candidates }.push(candidate);
        }
        let candidates = if candidates.is_empty() { &full } else { &candidates };
        balance::pick(candidates, &self.rules.balance, self.chance, self.now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::cluster::Balance,
        decide::{Attempt, Because, Cause, balance::PeakEwma},
    };

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    fn rules(reads: Reads) -> Rules {
        let balance = balance::Rules { balance: Balance::PeakEwma, slow_start: Duration::ZERO };
        Rules { reads, prefer: Prefer::Any, balance }
    }

    fn node(id: NodeId, role: Role) -> Node {
        Node { role, ..Node::new(id, format!("n{}", id.0).into(), ([127, 0, 0, 1], 1).into()) }
    }

    /// A is primary, B and C are replicas.
    fn healthy() -> Topology {
        Topology {
            primary: Some(A),
            nodes: vec![node(A, Role::Primary), node(B, Role::Replica), node(C, Role::Replica)],
            ..Topology::default()
        }
    }

    fn with(change: impl FnOnce(&mut Topology)) -> Topology {
        let mut topology = healthy();
        change(&mut topology);
        topology
    }

    fn leaderless() -> Topology {
        with(|t| {
            t.primary = None;
            t.nodes.remove(0);
        })
    }

    fn request(class: Class) -> Request {
        Request {
            class,
            because: Because::Method,
            idempotent: false,
            wanted: Wanted::Any,
            demands: Demands::default(),
        }
    }

    fn tried(nodes: &[NodeId]) -> History {
        failed(nodes, Failure { kind: FailureKind::Closed, written: true })
    }

    fn failed(nodes: &[NodeId], failure: Failure) -> History {
        let ended = Ended::Failed(failure);
        let attempt = |node| Attempt { node, role: Role::Replica, cause: Cause::First, ended };
        History { attempts: nodes.iter().copied().map(attempt).collect(), ..History::default() }
    }

    fn chosen(
        class: Class,
        topology: &Topology,
        history: &History,
        reads: Reads,
        chance: u64,
    ) -> Result<Result<(NodeId, Why), HoldFor>, Problem> {
        let choice =
            choose(&request(class), topology, history, &rules(reads), &[], chance, Instant::now());
        choice.map(|choice| match choice {
            Choice::Node { index, why } => Ok((topology.nodes[index].id, why)),
            Choice::Hold(hold) => Err(hold),
        })
    }

    #[test]
    fn chooses() {
        let stale = |t: &mut Topology, i: usize, f| t.nodes[i].freshness = f;
        let none = History::default();
        let far_behind = || {
            with(|t| {
                stale(t, 1, Freshness::TooFar);
                stale(t, 2, Freshness::TooFar);
            })
        };
        for (case, class, topology, history, reads, want) in [
            (
                "a write goes to the primary",
                Class::Write,
                healthy(),
                none.clone(),
                Reads::PreferReplicas,
                Ok(Ok((A, Why::Primary))),
            ),
            (
                "a write waits while nobody is primary",
                Class::Write,
                leaderless(),
                none.clone(),
                Reads::PreferReplicas,
                Ok(Err(HoldFor::Primary)),
            ),
            (
                "a read goes on without a primary",
                Class::Read,
                with(|t| {
                    t.primary = None;
                    t.nodes.truncate(2);
                    t.nodes.remove(0);
                }),
                none.clone(),
                Reads::PreferReplicas,
                Ok(Ok((B, Why::Replica))),
            ),
            (
                "a read never tries a node twice while there is another",
                Class::Read,
                healthy(),
                tried(&[B]),
                Reads::PreferReplicas,
                Ok(Ok((C, Why::Replica))),
            ),
            (
                "the primary reads when no replica can",
                Class::Read,
                healthy(),
                tried(&[B, C]),
                Reads::PreferReplicas,
                Ok(Ok((A, Why::PrimaryReads))),
            ),
            (
                "a replica over the soft limit comes after the primary",
                Class::Read,
                with(|t| {
                    stale(t, 1, Freshness::Behind);
                    stale(t, 2, Freshness::Behind);
                }),
                none.clone(),
                Reads::PreferReplicas,
                Ok(Ok((A, Why::PrimaryReads))),
            ),
            (
                "a replica over max_lag serves nothing",
                Class::Read,
                far_behind(),
                none.clone(),
                Reads::Replicas,
                Err(Problem::NoReader),
            ),
            (
                "unless nobody is primary",
                Class::Read,
                with(|t| {
                    t.primary = None;
                    t.nodes = vec![node(B, Role::Replica)];
                    stale(t, 0, Freshness::TooFar);
                }),
                none.clone(),
                Reads::Replicas,
                Ok(Ok((B, Why::LastResort))),
            ),
            (
                "and then one that is heard, before one that may be dead",
                Class::Read,
                with(|t| {
                    t.primary = None;
                    t.nodes = vec![node(A, Role::Unknown), node(B, Role::Replica)];
                    stale(t, 0, Freshness::TooFar);
                    stale(t, 1, Freshness::TooFar);
                }),
                none.clone(),
                Reads::PreferReplicas,
                Ok(Ok((B, Why::LastResort))),
            ),
            (
                "or whoever is said to be can't be connected to",
                Class::Read,
                far_behind(),
                failed(&[A], Failure { kind: FailureKind::ConnectRefused, written: false }),
                Reads::PreferReplicas,
                Ok(Ok((B, Why::LastResort))),
            ),
            (
                "but not because its answer broke off",
                Class::Read,
                far_behind(),
                tried(&[A]),
                Reads::PreferReplicas,
                Ok(Ok((A, Why::PrimaryReads))),
            ),
            (
                "the only reader is tried again",
                Class::Read,
                with(|t| t.nodes.truncate(2)),
                tried(&[B]),
                Reads::Replicas,
                Ok(Ok((B, Why::Replica))),
            ),
            (
                "ejection is overlooked when it would leave nobody",
                Class::Read,
                with(|t| {
                    t.nodes[1].probed_healthy = false;
                    t.nodes.truncate(2);
                }),
                none.clone(),
                Reads::Replicas,
                Ok(Ok((B, Why::LastResort))),
            ),
            (
                "a draining node gets nothing new",
                Class::Read,
                with(|t| {
                    t.nodes[1].presence = Presence::Draining;
                }),
                none,
                Reads::Replicas,
                Ok(Ok((C, Why::Replica))),
            ),
        ] {
            assert_eq!(chosen(class, &topology, &history, reads, 7), want, "{case}");
        }
    }

    #[test]
    fn the_node_beside_us_goes_first_where_it_may() {
        let topology = with(|t| t.nodes[2].local = true);
        let local = Rules { prefer: Prefer::Local, ..rules(Reads::PreferReplicas) };
        for chance in [0, u64::MAX, 1 << 31] {
            let choice = choose(
                &request(Class::Read),
                &topology,
                &History::default(),
                &local,
                &[],
                chance,
                Instant::now(),
            );
            assert_eq!(choice, Ok(Choice::Node { index: 2, why: Why::Local }));
        }
    }

    #[test]
    fn a_zone_without_a_free_place_or_a_fresh_replica_is_left() {
        let near = |change: fn(&mut Node)| {
            with(|t| {
                t.nodes[2].near = true;
                change(&mut t.nodes[2]);
            })
        };
        let reads = rules(Reads::PreferReplicas);
        let full = [Load::default(), Load::default(), Load { full: true, ..Load::default() }];
        for (case, topology, loads, index, why) in [
            ("of this zone", near(|_| {}), &[][..], 2, Why::SameZone),
            ("full", near(|_| {}), &full, 1, Why::Replica),
            ("behind", near(|n| n.freshness = Freshness::Behind), &[], 1, Why::Replica),
            ("unwell", near(|n| n.probed_healthy = false), &[], 1, Why::Replica),
        ] {
            for chance in [0, u64::MAX, 1 << 31] {
                let (request, history) = (request(Class::Read), History::default());
                let now = Instant::now();
                let choice = choose(&request, &topology, &history, &reads, loads, chance, now);
                assert_eq!(choice, Ok(Choice::Node { index, why }), "{case}");
            }
        }
    }

    #[test]
    fn a_preferred_node_that_lacks_what_was_promised_is_passed_over() {
        let prefers = Request { wanted: Wanted::Prefer(C), ..request(Class::Read) };
        let (token, primary) = (
            Demands { position: true, ..Demands::default() },
            Demands { primary: true, ..Demands::default() },
        );
        let reach = |reach| Load { reach, ..Load::default() };
        let (there, not_yet) = (reach(Reach::Reached), reach(Reach::NotYet));
        let waited = History { waited: true, ..History::default() };
        for (case, demands, loads, want) in [
            ("nothing promised", Demands::default(), [not_yet; 3], (2, Why::Asked)),
            ("a position, and it is there", token, [there; 3], (2, Why::Asked)),
            ("a position", token, [there, there, not_yet], (1, Why::Replica)),
            ("the primary", primary, [there; 3], (0, Why::Token)),
        ] {
            let request = Request { demands, ..prefers };
            let rules = rules(Reads::PreferReplicas);
            let choice = choose(&request, &healthy(), &waited, &rules, &loads, 7, Instant::now());
            let (index, why) = want;
            assert_eq!(choice, Ok(Choice::Node { index, why }), "{case}");
        }
    }

    #[test]
    fn the_less_loaded_of_two_is_taken() {
        let load = |in_flight| Load { in_flight, ..Load::default() };
        let loads = [load(0), load(9), load(1)];
        for chance in 0..64u64 {
            let choice = choose(
                &request(Class::Read),
                &healthy(),
                &History::default(),
                &rules(Reads::PreferReplicas),
                &loads,
                chance << 26,
                Instant::now(),
            );
            assert_eq!(choice, Ok(Choice::Node { index: 2, why: Why::Replica }), "{chance}");
        }
    }

    /// How often each of the three nodes is chosen by `balance`, of a thousand reads in turn.
    fn spread(
        balance: Balance,
        slow_start: Duration,
        topology: &Topology,
        now: Instant,
    ) -> [u32; 3] {
        let balance = balance::Rules { balance, slow_start };
        let rules = Rules { reads: Reads::All, prefer: Prefer::Any, balance };
        let mut random = fastrand::Rng::with_seed(7);
        let mut chosen = [0; 3];
        for turn in 0..1000 {
            let load = |in_flight, millis| {
                let latency = PeakEwma::default().observe(Duration::from_millis(millis), now);
                Load { in_flight, latency, turn, ..Load::default() }
            };
            // The first is slow, the last is busy.
            let loads = [load(1, 100), load(1, 1), load(3, 1)];
            let history = History::default();
            let read = request(Class::Read);
            let choice = choose(&read, topology, &history, &rules, &loads, random.u64(..), now);
            let Ok(Choice::Node { index, .. }) = choice else { panic!("{choice:?}") };
            chosen[index] += 1;
        }
        chosen
    }

    #[test]
    fn each_policy_spreads_as_it_says() {
        let spread = |balance| spread(balance, Duration::ZERO, &healthy(), Instant::now());
        let [slow, idle, busy] = spread(Balance::PeakEwma);
        assert!(idle > busy && busy > slow && slow == 0, "{slow} {idle} {busy}");
        let [slow, idle, busy] = spread(Balance::LeastRequest);
        assert!(slow > 300 && idle > 300 && busy == 0, "{slow} {idle} {busy}");
        let [slow, idle, busy] = spread(Balance::RoundRobin);
        assert!(slow.max(idle).max(busy) - slow.min(idle).min(busy) <= 1, "{slow} {idle} {busy}");
        let random = spread(Balance::Random);
        assert!(random.iter().all(|n| (250..420).contains(n)), "{random:?}");
    }

    #[test]
    fn a_node_that_has_just_come_up_gets_its_share_by_and_by() {
        let (up, ten) = (Instant::now(), Duration::from_secs(10));
        let topology = with(|t| t.nodes[1].admitted = Some(up));
        let share = |age| spread(Balance::LeastRequest, ten, &topology, up + age)[1];
        assert_eq!(share(Duration::ZERO), 0, "the others are a tenth as dear");
        // Twice as dear as the first, dearer than the last only before it has its share.
        assert!(share(ten / 2) < share(ten) && share(ten / 2) > 0);
        assert_eq!(share(ten), spread(Balance::LeastRequest, ten, &healthy(), up)[1]);
    }

    fn any_node() -> impl Strategy<Value = (u8, u8, bool, bool)> {
        (0..3u8, 0..3u8, any::<bool>(), any::<bool>())
    }

    proptest! {
        /// A zone decides among equals only: it changes neither whether there is an answer nor
        /// how good the node is.
        #[test]
        fn a_zone_decides_among_fresh_replicas_only(
            shape in proptest::collection::vec((any_node(), any::<bool>(), any::<bool>()), 0..7),
            chance: u64, reads in 0..4u8, was_tried in 0..7u64, write: bool,
        ) {
            let mut topology = Topology::default();
            let mut loads = Vec::new();
            for (n, ((role, fresh, member, well), near, full)) in shape.into_iter().enumerate() {
                let role = [Role::Replica, Role::Unknown, Role::Replica][usize::from(role)];
                let mut node = node(NodeId(n as u64), if n == 0 { Role::Primary } else { role });
                node.presence = if member { Presence::Member } else { Presence::Draining };
                node.freshness =
                    [Freshness::Fresh, Freshness::Behind, Freshness::TooFar][usize::from(fresh)];
                (node.probed_healthy, node.near) = (well, near);
                topology.nodes.push(node);
                loads.push(Load { full, ..Load::default() });
            }
            topology.primary = topology.nodes.first().map(|node| node.id);
            let mut zoneless = topology.clone();
            zoneless.nodes.iter_mut().for_each(|node| node.near = false);
            let reads = [Reads::PreferReplicas, Reads::Replicas, Reads::All, Reads::Primary][usize::from(reads)];
            let (rules, history) = (rules(reads), tried(&[NodeId(was_tried)]));
            let request = request(if write { Class::Write } else { Class::Read });
            let now = Instant::now();
            let ask = |topology| choose(&request, topology, &history, &rules, &loads, chance, now);
            match (ask(&topology), ask(&zoneless)) {
                (Ok(Choice::Node { index, why: Why::SameZone }), without) => {
                    let node = &topology.nodes[index];
                    prop_assert!(node.near && !loads[index].full && node.is_healthy(now));
                    prop_assert_eq!(node.freshness, Freshness::Fresh);
                    let why = without.map(|choice| match choice {
                        Choice::Node { why, .. } => Some(why),
                        Choice::Hold(_) => None,
                    });
                    prop_assert_eq!(why, Ok(Some(Why::Replica)));
                }
                (with, without) => {
                    prop_assert_eq!(with, without);
                    let best = topology.nodes.iter().zip(&loads).filter(|(node, load)| {
                        node.near && !load.full && node.role == Role::Replica
                            && node.presence == Presence::Member && node.is_healthy(now)
                            && node.freshness == Freshness::Fresh && node.id != NodeId(was_tried)
                    });
                    prop_assert!(write || reads == Reads::Primary || best.count() == 0);
                }
            }
        }

        #[test]
        fn whatever_the_cluster_looks_like(
            shape in proptest::collection::vec(any_node(), 0..6),
            has_primary: bool, write: bool, chance: u64, reads in 0..4u8, was_tried in 0..6u64,
        ) {
            let mut topology = Topology::default();
            for (n, (role, fresh, member, well)) in shape.into_iter().enumerate() {
                let role = [Role::Replica, Role::Unknown, Role::Primary][usize::from(role)];
                let role = if role == Role::Primary && (!has_primary || topology.primary.is_some())
                    { Role::Replica } else { role };
                let mut node = node(NodeId(n as u64), role);
                node.presence = if member || role == Role::Primary { Presence::Member } else { Presence::Draining };
                node.freshness = [Freshness::Fresh, Freshness::Behind, Freshness::TooFar][usize::from(fresh)];
                node.probed_healthy = well;
                if role == Role::Primary { topology.primary = Some(node.id); }
                topology.nodes.push(node);
            }
            let reads = [Reads::PreferReplicas, Reads::Replicas, Reads::All, Reads::Primary][usize::from(reads)];
            let class = if write { Class::Write } else { Class::Read };
            let result = chosen(class, &topology, &tried(&[NodeId(was_tried)]), reads, chance);
            match result {
                Ok(Ok((id, why))) => {
                    let node = topology.node(id).unwrap();
                    prop_assert!(node.presence == Presence::Member);
                    if write { prop_assert_eq!(topology.primary, Some(id)); }
                    if !write && node.freshness == Freshness::TooFar && why != Why::PrimaryReads {
                        prop_assert!(topology.primary.is_none() || reads == Reads::All);
                    }
                }
                Ok(Err(hold)) => {
                    prop_assert!(write || reads == Reads::Primary);
                    prop_assert_eq!(hold, HoldFor::Primary);
                    prop_assert!(topology.primary.is_none());
                }
                Err(problem) => prop_assert!(!write && problem == Problem::NoReader),
            }
        }
    }
}
