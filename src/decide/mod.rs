//! Every decision about a request, as pure functions over plain data.
//!
//! [`route`](route::route) → [`classify`](classify::classify) → [`choose`](choose::choose) → an
//! attempt → [`next`](next::next), and again from `choose` while `next` says so. Nothing here
//! opens a socket, reads a clock, draws a random number, logs or counts: time and chance are
//! arguments. `litegate explain` runs the same functions.

use std::time::Duration;

use crate::topology::{NodeId, Role};

pub mod answer;
pub mod balance;
pub mod budget;
pub mod choose;
pub mod classify;
pub mod next;
pub mod outcome;
pub mod pace;
pub mod path;
pub mod problem;
pub mod replay;
pub mod route;
pub mod strict;
pub mod token;

pub use problem::Problem;

/// Whether a request may change something.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Class {
    /// Any node that is fresh enough may answer.
    Read,
    /// Runs on the primary.
    Write,
}

impl Class {
    /// The word for logs, metrics and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What `classify` found: from here on nobody looks at the raw request to make a choice.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Read or write.
    pub class: Class,
    /// Why it is of that class.
    pub because: Because,
    /// Whether a write may run twice: only where a route says so.
    pub idempotent: bool,
    /// A trusted peer's wish.
    pub wanted: Wanted,
    /// What a read's node has to be.
    pub demands: Demands,
}

/// What a read's client must be shown.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Demands {
    /// The position of its token.
    pub position: bool,
    /// The primary's word, where there is a primary: it wrote a moment ago.
    pub primary: bool,
    /// Nothing older than this (`Litegate-Max-Staleness`).
    pub staleness: Option<Duration>,
}

/// What a client asks of a read itself (`Litegate-Consistency`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Consistency {
    /// Whatever is there.
    Any,
    /// Its own writes.
    #[default]
    Session,
    /// Everybody's writes.
    Primary,
}

/// Why a request is a read or a write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Because {
    /// Its method says so (RFC 9110 section 9.2.1).
    Method,
    /// Its route says so.
    Route,
    /// It asks to become another protocol, and a socket can write at any time.
    Upgrade,
    /// A trusted peer said so.
    Asked,
}

/// Where a trusted peer wants a request to go (`Litegate-Route`, `fly-force-*`, `fly-prefer-*`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Wanted {
    /// It did not say.
    #[default]
    Any,
    /// To the primary.
    Primary,
    /// To a replica.
    Replica,
    /// To this node.
    Node(NodeId),
    /// To this node if it may serve, else wherever it would have gone.
    Prefer(NodeId),
}

/// The attempts of one request so far, oldest first.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Every try, with what it came to.
    pub attempts: smallvec::SmallVec<[Attempt; 4]>,
    /// Replays among them that were really sent.
    pub hops: u32,
    /// Where the next attempt has to go, by a `fly-replay` answer.
    pub target: Option<Target>,
    /// To whom the request goes back if the replay's target can't be reached.
    pub fallback: Option<(NodeId, replay::Fallback)>,
    /// The current attempt is that way back: it may not replay again.
    pub fell_back: bool,
    /// Pauses so far: each is longer than the one before.
    pub pauses: u32,
    /// A replica was waited for, and did not get there.
    pub waited: bool,
    /// What a hold that expires now is answered with, if it is not for want of a primary.
    pub expired: Option<Problem>,
}

/// One try on one node.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// The node.
    pub node: NodeId,
    /// What it was believed to be then.
    pub role: Role,
    /// Why this try was made.
    pub cause: Cause,
    /// How it ended.
    pub ended: Ended,
}

/// Why a try is made.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Cause {
    /// The first.
    First,
    /// A node answered with `fly-replay`.
    Replay,
    /// The try before it failed.
    Retry,
}

/// How a try ended, in the words of design.md section 4.4.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// A final response head came, with this status.
    Answered(http::StatusCode),
    /// The head says: elsewhere.
    Replayed,
    /// It failed.
    Failed(Failure),
}

/// How a try failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Failure {
    /// What happened.
    pub kind: FailureKind,
    /// Whether any byte of the request reached the socket: if none did, it can't have run.
    pub written: bool,
}

/// What went wrong between litegate and a node. The words are log words and metric labels.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum FailureKind {
    /// Connection refused, or no route.
    ConnectRefused,
    /// No connection within `timeouts.connect`.
    ConnectTimeout,
    /// Whoever answered could not show that it is the node.
    Certificate,
    /// No TLS with the node, for another reason.
    Tls,
    /// No free place on the node within its limits.
    NodeFull,
    /// A kept-alive connection turned out to be closed before any byte of the answer.
    StaleConnection,
    /// Closed or reset before a response head.
    Closed,
    /// No response head within `timeouts.response_header`.
    ResponseTimeout,
    /// The node sent something that is not HTTP.
    BadResponse,
    /// No response head, and the node is no longer what it was when the request was sent: the
    /// primary, or, for a read, a node that can be heard.
    NodeGone,
}

/// A `fly-replay` answer, resolved as far as data allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// Whoever is primary.
    Primary,
    /// This node and no other.
    Node(NodeId),
    /// This node if it can be had, else any that fits.
    Prefer(NodeId),
    /// Any healthy node.
    Any,
    /// Any node but those that already answered.
    Elsewhere,
}

/// How long a hold of any kind may still last is the shell's business; this is what it waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HoldFor {
    /// A primary, or another primary than the ones that failed or named themselves.
    Primary,
    /// Nobody can be asked right now; at most this long, then choose again.
    Pause(Duration),
    /// A replica that reaches the position of the client's token.
    Position,
}

impl FailureKind {
    /// The word for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Certificate => "certificate",
            Self::Tls => "tls",
            Self::NodeFull => "node_full",
            Self::StaleConnection => "stale_connection",
            Self::Closed => "closed",
            Self::ResponseTimeout => "response_timeout",
            Self::BadResponse => "bad_response",
            Self::NodeGone => "node_gone",
        }
    }
}

impl Because {
    /// The word for logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::Route => "route",
            Self::Upgrade => "upgrade",
            Self::Asked => "asked",
        }
    }
}

impl Cause {
    /// The word for logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Replay => "replay",
            Self::Retry => "retry",
        }
    }
}
