//! What is believed of a cluster: its nodes, their roles and their health.
//!
//! A [`Topology`] never changes: a newer belief is a new value with a higher
//! [`generation`](Topology::generation). One writer, the cluster's discovery task, folds
//! [`Observation`]s with [`reconcile`] and publishes whole snapshots through
//! [`watch`]; every reader decides from the one snapshot it took.
//!
//! Pure, but for [`watch`] and [`progress`], the cells that one writes and many read: time is an
//! argument, nothing here opens a socket, logs or counts.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

pub use self::lineage::Epoch;
use position::Positions;
use progress::{Bell, Progress};

/// Everything believed of one cluster at one moment.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Grows by one with every publish, so that a waiter can say "newer than what I saw".
    pub generation: u64,
    /// How many primary changes litegate has seen.
    pub term: u64,
    /// Who gets the writes. `None` while nobody may: see [`Topology::primary_gap`].
    pub primary: Option<NodeId>,
    /// Why there is no primary, for logs and answers. Meaningless while there is one.
    pub primary_gap: PrimaryGap,
    /// All nodes, in the order of their instance names. A cluster has a handful.
    pub nodes: Vec<Node>,
    /// Whether the members were resolved at least once.
    pub resolved: bool,
    /// Whether the last attempt to list the members failed, so that `nodes` is the last good list.
    pub stale: bool,
    /// The primaries seen so far, oldest first, as far as their process is known. Bounded.
    pub lineage: Arc<[Epoch]>,
    /// The id that LiteFS gave the cluster, once a node told it.
    pub cluster_id: Option<Arc<str>>,
    /// Rung when a node of this cluster gets on.
    pub bell: Arc<Bell>,
}

impl Topology {
    /// The node that gets the writes.
    pub fn primary(&self) -> Option<&Node> {
        self.primary.and_then(|id| self.node(id))
    }

    /// The node with this identity, if it is still believed to exist.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// Finds the member that a `fly-replay` or a peer calls `name`.
    ///
    /// Tolerant in the order of `reference/litefs.md` section 11 rule 2: exact name, any case,
    /// without a port, first DNS label, IP address. Never returns a node that is not listed.
    pub fn named(&self, name: &str) -> Option<&Node> {
        names::find(&self.nodes, name)
    }
}

/// Why nobody is primary.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum PrimaryGap {
    /// No source has named one yet, or the last one withdrew.
    #[default]
    Unknown,
    /// A name is known, but no listed member goes by it.
    NotAMember,
    /// The claimant does not answer any more.
    Unreachable,
    /// Two nodes claim the role and nothing tells which claim is newer.
    SplitBrain,
    /// The claimant lacks so much of what was seen that an operator has to confirm it.
    Tripped,
}

impl PrimaryGap {
    /// In words, for operators.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Unknown => "no source has named one",
            Self::NotAMember => "a name is known, but no member goes by it",
            Self::Unreachable => "the one that claimed it does not answer any more",
            Self::SplitBrain => "two nodes claim it, and nothing tells whose claim is newer",
            Self::Tripped => "the claimant lacks data that was seen: an operator has to confirm it",
        }
    }
}

/// One incarnation of a node: a restarted process, or a new pod on an old address, is another.
/// Never used twice within one run of litegate.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodeId(pub u64);

/// One pod or process of a cluster, as believed.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Node {
    /// Identity within this run of litegate.
    pub id: NodeId,
    /// The instance name (`abaci-app-0`), or the address as text while no name is known.
    pub name: Arc<str>,
    /// Where requests go.
    pub address: SocketAddr,
    /// What it is believed to be.
    pub role: Role,
    /// Whether it is a member or on its way out.
    pub presence: Presence,
    /// How far behind it is, as last seen. `None` where no source tells.
    pub lag: Option<Duration>,
    /// Whether its lag lets it serve reads.
    pub freshness: Freshness,
    /// Passive health: failures in a row, ejections.
    pub record: eject::Record,
    /// Active health: `false` while the probe path fails. `true` where nothing probes.
    pub probed_healthy: bool,
    /// When this incarnation was first seen to work: slow start counts from here. `None`: it was
    /// there when litegate started, and gets its full share at once.
    pub admitted: Option<Instant>,
    /// Whether it is the pod that litegate runs beside (`prefer = "local"`).
    pub local: bool,
    /// Whether it is known to be in the same zone as this process.
    pub near: bool,
    /// It claims to be the primary and gets no writes, since another claim outweighs its own or
    /// nothing tells which one does. What it acknowledges now may be thrown away.
    pub fenced: bool,
    /// Where its databases are: not part of the snapshot, but always the latest.
    pub progress: Arc<Progress>,
}

impl Node {
    /// A member of which nothing else is known yet.
    pub fn new(id: NodeId, name: Arc<str>, address: SocketAddr) -> Self {
        Self {
            id,
            name,
            address,
            role: Role::Unknown,
            presence: Presence::Member,
            lag: None,
            freshness: Freshness::Fresh,
            record: eject::Record::default(),
            probed_healthy: true,
            admitted: None,
            local: false,
            near: false,
            fenced: false,
            progress: Arc::default(),
        }
    }

    /// Whether reads may go here as far as health and lag are concerned.
    pub fn is_healthy(&self, now: Instant) -> bool {
        self.probed_healthy && !self.record.is_ejected(now)
    }
}

/// What a node is in its cluster.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Role {
    /// The one writer.
    Primary,
    /// Serves reads.
    Replica,
    /// Not seen yet, or lost its cluster.
    #[default]
    Unknown,
}

impl Role {
    /// The word for logs, metrics and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether a node is listed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Presence {
    /// Discovery lists it.
    #[default]
    Member,
    /// It vanished from discovery: finishes what it has, gets nothing new.
    Draining,
}

/// What a node's lag means for reads.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Freshness {
    /// Within the soft limit, or no source tells.
    #[default]
    Fresh,
    /// Over the soft limit: the last choice.
    Behind,
    /// Over `max_lag`: serves no reads.
    TooFar,
}

/// One thing that one source saw. Says nothing about whether it is true.
#[derive(Clone, Debug)]
pub struct Observation {
    /// What was seen.
    pub saw: Saw,
    /// Who saw it.
    pub source: Source,
    /// When.
    pub at: Instant,
}

/// Who saw it: one word for logs and the `source` label.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Source {
    /// The member list: DNS, SRV or the configuration.
    Members,
    /// LiteFS's own API on a node.
    Litefs,
    /// `primary = { type = "instance" }`.
    Instance,
    /// `primary = { type = "dns" }`.
    Dns,
    /// `primary = { type = "consul" }`: the lease key.
    Consul,
    /// `primary = { type = "http" }`: a path that answers 200 on the primary.
    Http,
    /// `primary = { type = "file" }`: LiteFS's `.primary`.
    File,
    /// A `fly-replay` answer.
    Replay,
    /// The active health probe.
    Probe,
    /// The data plane: how requests ended.
    Traffic,
    /// Somebody by the admin API.
    Operator,
}

impl Source {
    /// The word for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Members => "members",
            Self::Litefs => "litefs",
            Self::Instance => "instance",
            Self::Dns => "dns",
            Self::Consul => "consul",
            Self::Http => "http",
            Self::File => "file",
            Self::Replay => "replay",
            Self::Probe => "probe",
            Self::Traffic => "traffic",
            Self::Operator => "operator",
        }
    }
}

/// Why a source has no news.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trouble {
    /// It does not answer.
    Unreachable,
    /// It answers something that it never should.
    Malformed,
}

impl Trouble {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Unreachable, Self::Malformed];

    /// The word for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Malformed => "malformed",
        }
    }
}

/// What was seen.
#[derive(Clone, Debug)]
pub enum Saw {
    /// The complete list of members now.
    Members(Vec<Member>),
    /// The members could not be listed: dead DNS, NXDOMAIN, an empty answer.
    MembersUnavailable,
    /// An instance name was learned for an address (`<instance>.<service>` looked up).
    Named {
        /// The member's address.
        address: SocketAddr,
        /// Its instance name.
        name: Arc<str>,
    },
    /// A node spoke of itself: LiteFS's `/info`, an event of `/events`, or an HTTP probe for the
    /// role.
    Claim {
        /// The member that spoke.
        address: SocketAddr,
        /// What it said.
        claim: Claim,
    },
    /// A node's role source does not answer.
    Silent {
        /// The member that is silent.
        address: SocketAddr,
    },
    /// A node's lag, by its own clock.
    Lag {
        /// The member.
        address: SocketAddr,
        /// How far behind.
        lag: Duration,
    },
    /// A source that knows the cluster's primary by itself named it: configuration, or a DNS name.
    /// `None`: it knows that there is none.
    PrimaryIs(Option<PrimaryName>),
    /// Who holds the lease key in Consul.
    Lease {
        /// `None`: the key is missing or empty.
        holder: Option<Holder>,
        /// The key's `ModifyIndex`, which orders its holders.
        index: u64,
        /// The index went back because Consul's history did, rather than since this is old news.
        reset: bool,
    },
    /// A source that names the primary by itself has nothing to say now. That is neither a loss
    /// nor a claim: what it said last grows old.
    NoNews(Trouble),
    /// An operator confirms a claimant that lacks much of what was seen.
    Confirmed(Arc<str>),
    /// Somebody else named the primary: evidence, weaker than any node's own word.
    PrimaryHint(Arc<str>),
    /// The active probe's verdict.
    Probed {
        /// The member.
        address: SocketAddr,
        /// Whether the probe passed.
        healthy: bool,
    },
    /// A request failed in a way that tells of the node: no connection, or a gateway error.
    Failed {
        /// The incarnation that failed.
        node: NodeId,
        /// Whether not even a connection came about.
        connect: bool,
    },
    /// A node with failures on record answered.
    Answered {
        /// The incarnation that answered.
        node: NodeId,
    },
}

/// What the reconciler came to believe, one thing at a time: for logs and metrics.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Another primary, or the first.
    Primary {
        /// The one before.
        from: Option<Arc<str>>,
        /// The one now.
        to: Arc<str>,
        /// The new term.
        term: u64,
        /// How long nobody was primary in between.
        gap: Duration,
    },
    /// Nobody is primary now.
    PrimaryLost {
        /// Who was.
        from: Arc<str>,
        /// Why.
        why: PrimaryGap,
    },
    /// Two nodes claim to be primary and nothing tells which claim is newer.
    SplitBrain {
        /// Who.
        claimants: Vec<Arc<str>>,
    },
    /// A node claims to be primary, but lacks too much of what was seen.
    Tripped {
        /// Its name.
        node: Arc<str>,
        /// The database that is short.
        database: Arc<str>,
        /// How far that was seen.
        seen: u64,
        /// How far the node has it. Zero: not at all.
        has: u64,
    },
    /// A node claims to be primary and gets no writes.
    Fenced {
        /// Its name.
        node: Arc<str>,
    },
    /// Consul's history went back, and with it the order of its lease's holders.
    LeaseReset,
    /// A source that names the primary by itself has no news.
    NoNews {
        /// Which.
        source: Source,
        /// Why.
        why: Trouble,
    },
    /// A node is listed that was not.
    Joined {
        /// Its name.
        node: Arc<str>,
        /// Where it is.
        address: SocketAddr,
    },
    /// A node is no longer listed: it drains.
    Left {
        /// Its name.
        node: Arc<str>,
    },
    /// A node is another process than before.
    Restarted {
        /// Its name.
        node: Arc<str>,
    },
    /// A node belongs to another cluster and gets nothing.
    Refused {
        /// Its name.
        node: Arc<str>,
        /// The cluster it belongs to.
        cluster: Arc<str>,
    },
    /// A node was taken out of balancing.
    Ejected {
        /// Its name.
        node: Arc<str>,
    },
    /// A node's lag crossed a limit.
    Lag {
        /// Its name.
        node: Arc<str>,
        /// On which side it is now.
        freshness: Freshness,
    },
    /// A node's active probe fails or passes again.
    Probed {
        /// Its name.
        node: Arc<str>,
        /// Whether it passes.
        healthy: bool,
    },
    /// The members could not be listed (`true`), or can be again.
    Stale(bool),
    /// Writes that were acknowledged by the primary before are not in the history of the one now.
    WritesLost {
        /// The primary before.
        from: Arc<str>,
        /// How many, of those that went through this litegate.
        writes: u64,
    },
    /// A name for an address was learned.
    Named {
        /// The name.
        node: Arc<str>,
        /// The address.
        address: SocketAddr,
    },
}

/// How a source names a primary.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PrimaryName {
    /// By instance name.
    Instance(Arc<str>),
    /// By one of its IP addresses (ports are not compared).
    Addresses(Vec<std::net::IpAddr>),
}

/// Who holds a lease, by its own words in the key.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Holder {
    /// `hostname`: the instance name.
    pub name: Arc<str>,
    /// The host of `advertise-url`, for where the name says nothing to us.
    pub advertised: Option<Arc<str>>,
}

/// One listed member.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Member {
    /// Where requests go.
    pub address: SocketAddr,
    /// Its instance name, where the source tells it (SRV, static).
    pub name: Option<Arc<str>>,
    /// Whether it is known to be in the same zone as this process (static).
    pub near: bool,
}

/// What a node says of itself (LiteFS: `/info`, `/events`; `reference/litefs.md` section 2).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Claim {
    /// `Litefs-Id`: drawn at every process start, so a change means a restart. `None` where the
    /// answer carried none.
    pub incarnation: Option<u64>,
    /// `Litefs-Cluster-Id`, once the node knows it.
    pub cluster: Option<Arc<str>>,
    /// Whether it says that it is the primary.
    pub is_primary: bool,
    /// Whom it names as primary. Empty under a static lease without a hostname: no name there
    /// does not mean no primary.
    pub primary: Option<Arc<str>>,
    /// Where its databases were when it said so, as far as that is known.
    pub positions: Option<Arc<Positions>>,
}

pub mod eject;
pub mod lineage;
mod names;
pub mod position;
pub mod progress;
pub mod reconcile;
pub mod watch;
