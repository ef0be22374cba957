//! What is counted, and how it is shown to Prometheus.
//!
//! Each data-plane worker owns a [`Shard`]: plain cells that only it writes, with relaxed loads
//! and stores, so that counting a request costs no locked instruction and no shared cache line.
//! A scrape adds the shards up. Labels come from closed sets only: methods and statuses outside
//! of the tables are counted as `other`, and nodes come from discovery, at most [`NODES`] of them.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{Method, StatusCode};

use crate::{
    config::limits::Limit,
    decide::{
        Class, FailureKind, Problem,
        token::{TokenRead, Void},
    },
    topology::{
        Change, Freshness, Node, Presence, PrimaryGap, Role, Source, Topology, Trouble, watch,
    },
};

/// Nodes with counters of their own; later ones share the last place, named `other`.
pub const NODES: usize = 1024;

const METHODS: [&str; 11] = [
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "PROPFIND",
    "other",
];
const CODES: [u16; 40] = [
    101, 200, 201, 202, 203, 204, 205, 206, 207, 300, 301, 302, 303, 304, 307, 308, 400, 401, 402,
    403, 404, 405, 406, 408, 409, 410, 411, 412, 413, 414, 415, 416, 421, 422, 425, 429, 431, 500,
    502, 503,
];
/// Behind [`CODES`]: 504, then everything else by its class.
const MORE_CODES: [&str; 6] = ["504", "1xx", "2xx", "3xx", "4xx", "5xx"];
const ALL_CODES: usize = CODES.len() + MORE_CODES.len();
const BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const CLASSES: [&str; 3] = ["read", "write", "none"];
const FAILURE_KINDS: [FailureKind; 10] = [
    FailureKind::ConnectRefused,
    FailureKind::ConnectTimeout,
    FailureKind::Certificate,
    FailureKind::Tls,
    FailureKind::NodeFull,
    FailureKind::StaleConnection,
    FailureKind::Closed,
    FailureKind::ResponseTimeout,
    FailureKind::BadResponse,
    FailureKind::NodeGone,
];

/// One family of series, as it is declared once for the scrape and for the operator's page.
#[derive(Debug)]
pub struct Family {
    name: &'static str,
    kind: &'static str,
    /// Closed sets of words, or names from configuration and discovery; nothing of a client's.
    labels: &'static [&'static str],
    help: &'static str,
}

macro_rules! families {
    ($($id:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(const $id: &Family = &Family {
            name: $name, kind: stringify!($kind), labels: &[$($label),*], help: $help,
        };)*
        /// All of them, in the order of the operator's page.
        pub const FAMILIES: &[&Family] = &[$($id),*];
    };
}

families! {
    REQUESTS = counter "litegate_http_requests_total" ["cluster", "class", "method", "code"]
        "Requests answered. Without a cluster: those that found no route, or never became requests.";
    REQUEST_DURATION = histogram "litegate_http_request_duration_seconds" ["cluster", "class"]
        "From a request's first byte to the end of its answer.";
    IN_FLIGHT = gauge "litegate_http_requests_in_flight" ["listener"]
        "Requests whose answer is not complete yet, held ones included.";
    ABANDONED = counter "litegate_http_requests_abandoned_total" ["listener"]
        "Requests whose client left before there was an answer.";
    REQUEST_BYTES = counter "litegate_http_request_bytes_total" ["listener"]
        "Bytes of request bodies.";
    RESPONSE_BYTES = counter "litegate_http_response_bytes_total" ["listener"]
        "Bytes of response bodies.";
    CONNECTIONS = gauge "litegate_downstream_connections" ["listener"]
        "Clients connected.";
    HANDSHAKES = counter "litegate_tls_handshakes_total" ["listener", "outcome"]
        "TLS handshakes: `done`, `failed`, or `timed_out` within `limits.tls_handshake`.";
    RENEWALS = counter "litegate_certificate_reloads_total" ["listener", "outcome"]
        "Changed certificate files: in force (`applied`), or wrong (`refused`), so that the former stay.";
    CERTIFICATES = gauge "litegate_certificate_expiry_timestamp_seconds" ["listener", "certificate"]
        "When each certificate in force ends.";
    ORDERS = counter "litegate_acme_orders_total" ["certificate", "outcome"]
        "Attempts to have a certificate by ACME: `obtained`, or `failed`, so that the former stays.";
    NODE_RENEWALS = counter "litegate_upstream_certificate_reloads_total" ["cluster", "outcome"]
        "Changed files of TLS to nodes: in force (`applied`), or wrong (`refused`), so that the former stay.";
    NODE_CERTIFICATES = gauge "litegate_upstream_certificate_expiry_timestamp_seconds" ["cluster", "certificate"]
        "When the certificate that nodes are shown ends.";
    TUNNELS = gauge "litegate_tunnels" []
        "Upgraded connections, WebSockets among them.";
    TUNNELS_CLOSED = counter "litegate_tunnels_closed_total" ["reason"]
        "Upgraded connections that litegate closed: their node was `demoted`, or litegate was `draining`.";
    PROBLEMS = counter "litegate_problems_total" ["problem"]
        "Answers that litegate made itself, by the words of problems.md.";
    LIMITS = counter "litegate_limits_reached_total" ["limit"]
        "Times that a limit was reached, by its key in limits.md, which says what happens then.";
    ATTEMPTS = counter "litegate_upstream_requests_total" ["cluster", "node", "code"]
        "Attempts that a node answered, by class of status.";
    FAILURES = counter "litegate_upstream_failures_total" ["cluster", "node", "reason"]
        "Attempts that a node did not answer.";
    ATTEMPT_DURATION = histogram "litegate_upstream_request_duration_seconds" ["cluster", "node"]
        "From an attempt's begin to its response head.";
    ATTEMPTS_IN_FLIGHT = gauge "litegate_upstream_requests_in_flight" ["cluster", "node"]
        "Attempts that hold a place on the node, as of the last second.";
    CONNECT_DURATION = histogram "litegate_upstream_connect_duration_seconds" ["cluster", "node"]
        "How long connecting took, where it worked. Its count is the connections created.";
    UPSTREAM_CONNECTIONS = gauge "litegate_upstream_connections" ["cluster", "node", "state"]
        "Connections to nodes, tunnels not counted; idle ones as of the last second.";
    RETRIES = counter "litegate_retries_total" ["cluster", "class"]
        "Requests sent again after a failure.";
    RETRIES_SKIPPED = counter "litegate_retries_skipped_total" ["cluster", "reason"]
        "Failed attempts after which there was no retry: over the budget, the body was gone, or a write may have run.";
    WRITE_OUTCOMES = counter "litegate_write_outcomes_total" ["cluster", "outcome"]
        "Writes that failed after bytes of them had left: `unknown`, provably `not-committed`, or, that and sent again, `repeated`.";
    REPLAYS = counter "litegate_replays_total" ["cluster", "outcome"]
        "Answers with fly-replay.";
    CACHES_IGNORED = counter "litegate_replay_caches_ignored_total" ["cluster"]
        "Replays that were to be remembered, which litegate has no use for.";
    UNDERSCORES = counter "litegate_underscore_fields_dropped_total" []
        "Request fields dropped for the underscore in their names: `limits.underscores`.";
    REPLAY_BUFFER = gauge "litegate_replay_buffer_bytes" []
        "Request bodies kept for a replay, as of the last second.";
    HELD = gauge "litegate_held_requests" ["cluster"]
        "Requests that wait for a primary now.";
    HELD_BYTES = gauge "litegate_held_bytes" ["cluster"]
        "What their bodies may take together.";
    HANDING_OVER = gauge "litegate_handing_over" ["cluster"]
        "Whether a planned hand-over keeps all writes waiting.";
    HOLD_OUTCOMES = counter "litegate_hold_outcomes_total" ["cluster", "outcome"]
        "Requests that waited for a primary.";
    HOLD_DURATION = histogram "litegate_hold_duration_seconds" ["cluster"]
        "How long requests waited for a primary.";
    TOKENS_ISSUED = counter "litegate_tokens_issued_total" ["cluster"]
        "Tokens given to clients after their writes.";
    TOKENS_INVALID = counter "litegate_tokens_invalid_total" ["cluster", "reason"]
        "Tokens that counted for nothing.";
    TOKEN_READS = counter "litegate_token_reads_total" ["cluster", "decision"]
        "Reads with a token, by how they found a node that is far enough: a replica at once (`fresh`) or after a wait (`waited`), or the `primary`.";
    TOKEN_WAIT = histogram "litegate_token_wait_seconds" ["cluster"]
        "How long requests with a token waited for a replica, or for news of its primary.";
    EXACT_POSITIONS = counter "litegate_exact_positions_total" ["cluster"]
        "Times that a primary's exact position was asked for; those who ask at once share a reading.";
    WITHOUT_POSITION = counter "litegate_writes_without_position_total" ["cluster"]
        "Writes after which nobody could say how far the primary was: their clients' reads go to it for a while.";
    WRITES_LOST = counter "litegate_acknowledged_writes_lost_total" ["cluster"]
        "Acknowledged writes that the next primary did not have, at most, of those that went through this litegate.";
    DURABILITY_WAITS = counter "litegate_durability_waits_total" ["cluster", "outcome"]
        "Writes whose answer waited for replicas.";
    NODES_BY_STATE = gauge "litegate_nodes" ["cluster", "role", "state"]
        "Nodes by role and state.";
    PRIMARY_KNOWN = gauge "litegate_primary_known" ["cluster"]
        "Whether there is a primary.";
    IS_PRIMARY = gauge "litegate_is_primary" ["cluster", "node"]
        "Whether litegate sends writes to it.";
    PRIMARY_CHANGES = counter "litegate_primary_changes_total" ["cluster"]
        "Primaries seen to follow another.";
    TERM = gauge "litegate_term" ["cluster"]
        "Primary changes seen by this process.";
    SPLIT_BRAIN = gauge "litegate_split_brain" ["cluster"]
        "Whether two nodes claim to be primary and nothing settles it.";
    TRIPWIRE = gauge "litegate_tripwire" ["cluster"]
        "Whether a new primary lacks data and waits for an operator.";
    FENCED = counter "litegate_fenced_claims_total" ["cluster"]
        "Claims to be primary that got no writes.";
    NODE_FENCED = gauge "litegate_node_fenced" ["cluster", "node"]
        "Whether it claims to be primary and gets no writes.";
    NO_NEWS = counter "litegate_role_source_failures_total" ["cluster", "source", "reason"]
        "Questions for the primary that got no answer, or none that makes sense.";
    MEMBERS_STALE = gauge "litegate_members_stale" ["cluster"]
        "Whether the members could not be listed last time.";
    DNS_LOOKUPS = counter "litegate_dns_lookups_total" ["cluster", "result"]
        "DNS look-ups, one for both families of addresses: `answered`, `nxdomain`, `empty`, `timeout` or `failed`.";
    OBSERVATIONS_DROPPED = counter "litegate_observations_dropped_total" ["cluster"]
        "News of nodes that came faster than it could be folded; newer news followed.";
    NODE_HEALTHY = gauge "litegate_node_healthy" ["cluster", "node"]
        "Whether its active probe passes.";
    NODE_EJECTED = gauge "litegate_node_ejected" ["cluster", "node"]
        "Whether it is out of balancing after failures.";
    NODE_LAG = gauge "litegate_node_lag_seconds" ["cluster", "node"]
        "How far it is behind, as last seen; NaN where nobody says.";
    NODE_TOO_FAR = gauge "litegate_node_too_far_behind" ["cluster", "node"]
        "Whether its lag keeps it from serving reads.";
    NODE_TXID = gauge "litegate_node_txid" ["cluster", "node", "database"]
        "The number of the last transaction that it has, where its feed tells; exact up to 2^53.";
    NODE_BEHIND = gauge "litegate_node_behind_transactions" ["cluster", "node"]
        "Transactions that it is behind the primary, in the database where it is most; NaN where nobody tells.";
    NODE_EJECTIONS = counter "litegate_node_ejections_total" ["cluster"]
        "Nodes taken out of balancing.";
    NODE_RESTARTS = counter "litegate_node_restarts_total" ["cluster"]
        "Nodes seen to be another process.";
    RELOADS = counter "litegate_config_reloads_total" ["result"]
        "Reloads of the configuration.";
    RELOAD_SUCCESSFUL = gauge "litegate_config_last_reload_successful" []
        "Whether the last reload was applied.";
    RELOAD_TIMESTAMP = gauge "litegate_config_last_reload_success_timestamp_seconds" []
        "When a configuration was last applied, at the start or by a reload.";
    LOG_DROPPED = counter "litegate_access_log_dropped_total" []
        "Access-log lines dropped because they were not written fast enough.";
    WORKERS = gauge "litegate_workers" []
        "Data-plane threads.";
    BUILD_INFO = gauge "litegate_build_info" ["version"]
        "Always 1.";
    START_TIME = gauge "process_start_time_seconds" []
        "When the process started.";
    CPU = counter "process_cpu_seconds_total" []
        "CPU time, user and system.";
    RESIDENT = gauge "process_resident_memory_bytes" []
        "Resident memory.";
    OPEN_FDS = gauge "process_open_fds" []
        "Open file descriptors.";
    MAX_FDS = gauge "process_max_fds" []
        "The most that there may be.";
}

/// A counter or gauge that one thread writes.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds. Not atomic on purpose: there is one writer.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Takes away.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    /// Replaces.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// Reads.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A histogram of seconds with fixed buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Cell; BUCKETS.len() + 1],
    nanos: Cell,
}

impl Histogram {
    /// One more.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let place = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        if let Some(bucket) = self.buckets.get(place) {
            bucket.add(1);
        }
        // 584 years of requests fit.
        self.nanos.add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// A request that is over.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'a> {
    /// The listener's place in the configuration.
    pub listener: usize,
    /// The cluster's, if a route was found.
    pub cluster: Option<usize>,
    /// Its class, if it was classified.
    pub class: Option<Class>,
    /// Its method, as far as it is known.
    pub method: Option<&'a Method>,
    /// What the client got.
    pub status: StatusCode,
    /// From its first byte to the end of the answer.
    pub duration: Duration,
    /// Body bytes from the client.
    pub received: u64,
    /// Body bytes to the client.
    pub sent: u64,
    /// If litegate answered itself.
    pub problem: Option<Problem>,
}

/// How a hold ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HoldOutcome {
    /// There was a primary.
    Resumed,
    /// There was none in time.
    Expired,
    /// There was no room.
    Overflow,
}

const HOLD_OUTCOME_WORDS: [&str; 3] = ["resumed", "timeout", "overflow"];

/// What became of a write that failed after bytes of it had left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unanswered {
    /// Nobody knows.
    Unknown,
    /// It did not commit.
    NotCommitted,
    /// The same, and it was sent again.
    Repeated,
}

const UNANSWERED: [&str; 3] = ["unknown", "not-committed", "repeated"];

/// Why the client of an upgraded connection had better go elsewhere.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leave {
    /// Its node is no longer the primary.
    Demoted,
    /// litegate takes nothing new.
    Draining,
}

const LEAVES: [&str; 2] = ["demoted", "draining"];

/// What happened to a `fly-replay` answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ReplayOutcome {
    /// The request was sent elsewhere.
    Followed,
    /// It waited, since the target was none yet.
    Held,
    /// It was answered with a problem.
    Refused,
}

/// Why there was no retry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RetryRefusal {
    /// The budget is spent.
    Budget,
    /// The body can't be sent again.
    Body,
    /// The write may have run.
    MaybeExecuted,
}

const RETRY_REFUSALS: [&str; 3] = ["budget", "body", "maybe_executed"];

const REPLAY_OUTCOMES: [&str; 3] = ["followed", "held", "refused"];

/// How a DNS look-up ended: of a name's addresses, both families together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LookupResult {
    /// There were records.
    Answered,
    /// There is no such name.
    NxDomain,
    /// The name has no such records.
    Empty,
    /// No answer came in time.
    Timeout,
    /// A refusal, an answer that makes no sense, or no way to the server.
    Failed,
}

const LOOKUP_RESULTS: [&str; 5] = ["answered", "nxdomain", "empty", "timeout", "failed"];

/// What discovery counts for one cluster, across configurations.
#[derive(Debug, Default)]
pub struct DiscoveryCells {
    lookups: [AtomicU64; LOOKUP_RESULTS.len()],
    dropped: AtomicU64,
}

impl DiscoveryCells {
    /// DNS was asked.
    pub fn looked_up(&self, result: LookupResult) {
        if let Some(cell) = self.lookups.get(result as usize) {
            cell.fetch_add(1, Relaxed);
        }
    }

    /// An observation found no room.
    pub fn dropped(&self) {
        self.dropped.fetch_add(1, Relaxed);
    }
}

/// How a TLS handshake ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HandshakeOutcome {
    /// There is a session.
    Done,
    /// There is none.
    Failed,
    /// There was none in time.
    TimedOut,
}

/// In the order of [`HandshakeOutcome`].
const HANDSHAKE_OUTCOMES: [&str; 3] = ["done", "failed", "timed_out"];

/// One worker's cells for one configuration.
#[derive(Debug)]
pub struct Shard {
    worker: usize,
    listeners: Vec<(Arc<str>, ListenerCells)>,
    /// One for each cluster, and one for requests that found none.
    clusters: Vec<(Arc<str>, ClusterCells)>,
    nodes: Mutex<Vec<Arc<NodeCells>>>,
    problems: Box<[Cell]>,
    /// By [`Limit::index`].
    limits: Box<[Cell]>,
    /// Bytes in replay buffers.
    pub replay_buffer: Cell,
    /// Request fields dropped for the underscore in their names.
    pub underscores_dropped: Cell,
    /// Upgraded connections.
    pub tunnels: Cell,
    tunnels_closed: [Cell; LEAVES.len()],
}

#[derive(Debug, Default)]
struct ListenerCells {
    connections: Cell,
    in_flight: Cell,
    abandoned: Cell,
    received: Cell,
    sent: Cell,
    handshakes: [Cell; HANDSHAKE_OUTCOMES.len()],
}

#[derive(Debug)]
struct ClusterCells {
    requests: Box<[Cell]>,
    durations: [Histogram; CLASSES.len()],
    retried: [Cell; 2],
    retry_refused: [Cell; RETRY_REFUSALS.len()],
    replays: [Cell; 3],
    caches_ignored: Cell,
    holds: [Cell; 3],
    hold_duration: Histogram,
    unanswered: [Cell; UNANSWERED.len()],
    consistency: Consistency,
}

/// One worker's cells for what clients read of their own writes in one cluster.
#[derive(Debug, Default)]
pub struct Consistency {
    /// Tokens given to clients.
    pub issued: Cell,
    /// Tokens that counted for nothing, in the order of [`Void::ALL`].
    pub void: [Cell; Void::ALL.len()],
    /// Reads with a token, in the order of [`TokenRead::ALL`].
    pub reads: [Cell; TokenRead::ALL.len()],
    /// How long they waited for a replica.
    pub wait: Histogram,
    /// Exact readings asked for.
    pub exact: Cell,
    /// Writes of which nobody could say how far the primary was.
    pub blind: Cell,
    /// Writes that were on enough replicas in time, and those that were not.
    pub durable: [Cell; 2],
}

impl ClusterCells {
    fn new() -> Self {
        let cells = CLASSES.len() * METHODS.len() * ALL_CODES;
        Self {
            requests: (0..cells).map(|_| Cell::default()).collect(),
            durations: Default::default(),
            retried: Default::default(),
            retry_refused: Default::default(),
            replays: Default::default(),
            caches_ignored: Cell::default(),
            holds: Default::default(),
            hold_duration: Histogram::default(),
            unanswered: Default::default(),
            consistency: Consistency::default(),
        }
    }
}

/// One worker's cells for one node.
#[derive(Debug)]
pub struct NodeCells {
    cluster: Arc<str>,
    name: Arc<str>,
    answers: [Cell; 6],
    failures: [Cell; FAILURE_KINDS.len()],
    duration: Histogram,
    connect: Histogram,
    open: Cell,
    /// Idle connections.
    pub idle: Cell,
    /// Attempts that hold a place.
    pub in_flight: Cell,
}

/// A connection to a node, counted as open until this is dropped.
#[derive(Debug)]
pub struct Opened(Arc<NodeCells>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.open.sub(1);
    }
}

impl NodeCells {
    /// An attempt on it ended.
    pub fn attempt(&self, result: Result<StatusCode, FailureKind>, took: Duration) {
        match result {
            Ok(status) => {
                let class = usize::from(status.as_u16() / 100).min(5);
                if let Some(cell) = self.answers.get(class) {
                    cell.add(1);
                }
                self.duration.observe(took);
            }
            Err(kind) => {
                let place = FAILURE_KINDS.iter().position(|other| *other == kind);
                if let Some(cell) = place.and_then(|place| self.failures.get(place)) {
                    cell.add(1);
                }
            }
        }
    }

    /// A connection to it was made.
    pub fn connected(self: &Arc<Self>, took: Duration) -> Opened {
        self.connect.observe(took);
        self.open.add(1);
        Opened(Arc::clone(self))
    }
}

/// A request that has come and has no answer yet.
#[derive(Debug)]
#[must_use]
pub struct Began<'s> {
    shard: &'s Shard,
    listener: usize,
}

impl Began<'_> {
    /// There is an answer: whoever has it says when it ends.
    pub fn answered(self) {
        std::mem::forget(self);
    }
}

impl Drop for Began<'_> {
    fn drop(&mut self) {
        self.shard.request_ended(self.listener);
        if let Some((_, cells)) = self.shard.listeners.get(self.listener) {
            cells.abandoned.add(1);
        }
    }
}

impl Shard {
    /// A client connected.
    pub fn connection_opened(&self, listener: usize) {
        if let Some((_, cells)) = self.listeners.get(listener) {
            cells.connections.add(1);
        }
    }

    /// A TLS handshake ended.
    pub fn shook_hands(&self, listener: usize, outcome: HandshakeOutcome) {
        let cells = self.listeners.get(listener);
        if let Some(cell) = cells.and_then(|(_, cells)| cells.handshakes.get(outcome as usize)) {
            cell.add(1);
        }
    }

    /// It went.
    pub fn connection_closed(&self, listener: usize) {
        if let Some((_, cells)) = self.listeners.get(listener) {
            cells.connections.sub(1);
        }
    }

    /// A request has come. It counts as in flight until [`Shard::request_ended`], or until what
    /// this returns is dropped: then its client left without an answer.
    pub fn request_began(&self, listener: usize) -> Began<'_> {
        if let Some((_, cells)) = self.listeners.get(listener) {
            cells.in_flight.add(1);
        }
        Began { shard: self, listener }
    }

    /// A request whose answer had begun is in flight no longer.
    pub fn request_ended(&self, listener: usize) {
        if let Some((_, cells)) = self.listeners.get(listener) {
            cells.in_flight.sub(1);
        }
    }

    /// A request is over.
    pub fn request_finished(&self, finished: &Finished<'_>) {
        if let Some((_, cells)) = self.listeners.get(finished.listener) {
            cells.received.add(finished.received);
            cells.sent.add(finished.sent);
        }
        if let Some(problem) = finished.problem {
            self.problem(problem);
        }
        let class = match finished.class {
            Some(Class::Read) => 0,
            Some(Class::Write) => 1,
            None => 2,
        };
        let Some((_, cells)) = self.clusters.get(finished.cluster.unwrap_or(self.none())) else {
            return;
        };
        let place = (class * METHODS.len() + method_place(finished.method)) * ALL_CODES
            + code_place(finished.status);
        if let Some(cell) = cells.requests.get(place) {
            cell.add(1);
        }
        if let Some(durations) = cells.durations.get(class) {
            durations.observe(finished.duration);
        }
    }

    /// litegate answered itself, or closed a connection without a request.
    pub fn problem(&self, problem: Problem) {
        if let Some(cell) = self.problems.get(problem.index()) {
            cell.add(1);
        }
    }

    /// A limit was reached so many times.
    pub fn reached(&self, limit: Limit, times: u64) {
        if let Some(cell) = self.limits.get(limit.index()) {
            cell.add(times);
        }
    }

    /// A request was sent again after a failure.
    pub fn retried(&self, cluster: usize, class: Class) {
        if let Some((_, cells)) = self.clusters.get(cluster) {
            let [reads, writes] = &cells.retried;
            if class == Class::Read { reads } else { writes }.add(1);
        }
    }

    /// There was no retry.
    pub fn retry_refused(&self, cluster: usize, why: RetryRefusal) {
        let cells = self.clusters.get(cluster).map(|(_, cells)| cells);
        if let Some(cell) = cells.and_then(|cells| cells.retry_refused.get(why as usize)) {
            cell.add(1);
        }
    }

    /// A node answered `fly-replay`.
    pub fn replayed(&self, cluster: usize, outcome: ReplayOutcome) {
        let cell = self.clusters.get(cluster).and_then(|(_, c)| c.replays.get(outcome as usize));
        if let Some(cell) = cell {
            cell.add(1);
        }
    }

    /// A node asked for its replay to be remembered, which litegate has no use for.
    pub fn replay_cache_ignored(&self, cluster: usize) {
        if let Some((_, cells)) = self.clusters.get(cluster) {
            cells.caches_ignored.add(1);
        }
    }

    /// What is counted of tokens in a cluster.
    pub fn consistency(&self, cluster: usize) -> Option<&Consistency> {
        self.clusters.get(cluster).map(|(_, cells)| &cells.consistency)
    }

    /// A hold ended.
    pub fn held(&self, cluster: usize, outcome: HoldOutcome, waited: Duration) {
        if let Some((_, cells)) = self.clusters.get(cluster) {
            if let Some(cell) = cells.holds.get(outcome as usize) {
                cell.add(1);
            }
            cells.hold_duration.observe(waited);
        }
    }

    /// A write failed after bytes of it had left.
    pub fn unanswered(&self, cluster: usize, outcome: Unanswered) {
        if let Some((_, cells)) = self.clusters.get(cluster)
            && let Some(cell) = cells.unanswered.get(outcome as usize)
        {
            cell.add(1);
        }
    }

    /// litegate closed an upgraded connection.
    pub fn tunnel_closed(&self, leave: Leave) {
        if let Some(cell) = self.tunnels_closed.get(leave as usize) {
            cell.add(1);
        }
    }

    /// The cells of a node: once for each incarnation, not for each request.
    pub fn node(&self, cluster: usize, name: &Arc<str>) -> Arc<NodeCells> {
        let cluster = self.clusters.get(cluster).map_or_else(|| "".into(), |(n, _)| Arc::clone(n));
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let full = nodes.len() >= NODES;
        let name = if full { &Arc::from("other") } else { name };
        if let Some(known) = nodes.iter().find(|n| n.cluster == cluster && n.name == *name) {
            return Arc::clone(known);
        }
        let cells = Arc::new(NodeCells {
            cluster,
            name: Arc::clone(name),
            answers: Default::default(),
            failures: Default::default(),
            duration: Histogram::default(),
            connect: Histogram::default(),
            open: Cell::default(),
            idle: Cell::default(),
            in_flight: Cell::default(),
        });
        nodes.push(Arc::clone(&cells));
        cells
    }

    fn none(&self) -> usize {
        self.clusters.len().saturating_sub(1)
    }
}

fn method_place(method: Option<&Method>) -> usize {
    let name = method.map(Method::as_str);
    METHODS.iter().position(|known| Some(*known) == name).unwrap_or(METHODS.len() - 1)
}

fn code_place(status: StatusCode) -> usize {
    let code = status.as_u16();
    match CODES.binary_search(&code) {
        Ok(place) => place,
        Err(_) if code == 504 => CODES.len(),
        Err(_) => CODES.len() + usize::from(code / 100).clamp(1, 5),
    }
}

fn code_name(place: usize) -> String {
    match CODES.get(place) {
        Some(code) => code.to_string(),
        None => MORE_CODES.get(place - CODES.len()).copied().unwrap_or("other").to_owned(),
    }
}

/// A cluster with whose nodes TLS is spoken, and which certificate they are shown until when.
pub type Shown = (Arc<str>, Option<(String, Duration)>);

/// Everything counted in this process.
#[derive(Debug)]
pub struct Metrics {
    /// All there ever were: counters must not go back on a reload.
    shards: Mutex<Vec<Arc<Shard>>>,
    changes: Mutex<Vec<(Arc<str>, Changes)>>,
    discovery: Mutex<Vec<(Arc<str>, Arc<DiscoveryCells>)>>,
    standings: Mutex<Vec<(Arc<str>, Ask)>>,
    /// By listener: applied, refused.
    renewals: Mutex<BTreeMap<Arc<str>, [u64; 2]>>,
    certificates: Mutex<Vec<(Arc<str>, String, Duration)>>,
    /// By certificate: obtained, failed.
    orders: Mutex<BTreeMap<Arc<str>, [u64; 2]>>,
    node_renewals: Mutex<BTreeMap<Arc<str>, [u64; 2]>>,
    node_certificates: Mutex<Vec<Shown>>,
    reloads: [AtomicU64; 2],
    last_reload: AtomicU64,
    last_reload_failed: AtomicU64,
    /// Access-log lines thrown away because nobody wrote them fast enough.
    pub log_dropped: AtomicU64,
    started: f64,
}

#[derive(Debug, Default)]
struct Changes {
    primary: u64,
    ejected: u64,
    restarted: u64,
    lost: u64,
    fenced: u64,
    /// In the order of [`NAMERS`], then of [`Trouble::ALL`].
    no_news: [[u64; Trouble::ALL.len()]; NAMERS.len()],
}

/// Sources that name the primary by themselves and may have no news.
const NAMERS: [Source; 2] = [Source::Consul, Source::File];

/// What is asked of a cluster at a scrape, since nobody counts it as it happens.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// Requests that wait.
    pub held: usize,
    /// What their bodies may take together.
    pub held_bytes: usize,
    /// Whether a planned hand-over keeps all writes waiting.
    pub handing_over: bool,
}

struct Ask(Box<dyn Fn() -> Standing + Send + Sync>);

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ask")
    }
}

/// A cluster as a scrape sees it.
pub type Seen = (Arc<str>, watch::Reader);

impl Metrics {
    /// Nothing counted yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: Mutex::default(),
            changes: Mutex::default(),
            discovery: Mutex::default(),
            standings: Mutex::default(),
            renewals: Mutex::default(),
            certificates: Mutex::default(),
            orders: Mutex::default(),
            node_renewals: Mutex::default(),
            node_certificates: Mutex::default(),
            reloads: [AtomicU64::new(0), AtomicU64::new(0)],
            last_reload: AtomicU64::new(unix_now().to_bits()),
            last_reload_failed: AtomicU64::new(0),
            log_dropped: AtomicU64::new(0),
            started: unix_now(),
        })
    }

    /// Cells for one worker. A reload that keeps the names keeps the cells: only other names make
    /// more of them.
    pub fn shard(
        &self,
        worker: usize,
        listeners: &[Arc<str>],
        clusters: &[Arc<str>],
    ) -> Arc<Shard> {
        let none: Arc<str> = Arc::from("");
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        let has_names = |shard: &&Arc<Shard>| {
            let named = shard.listeners.iter().map(|(name, _)| name);
            let in_clusters = shard.clusters.iter().map(|(name, _)| name);
            shard.worker == worker
                && named.eq(listeners.iter())
                && in_clusters.eq(clusters.iter().chain([&none]))
        };
        if let Some(same) = shards.iter().find(has_names) {
            return Arc::clone(same);
        }
        let listeners = listeners.iter().map(|name| (Arc::clone(name), ListenerCells::default()));
        let clusters = clusters.iter().chain([&none]);
        let shard = Arc::new(Shard {
            worker,
            listeners: listeners.collect(),
            clusters: clusters.map(|name| (Arc::clone(name), ClusterCells::new())).collect(),
            nodes: Mutex::default(),
            problems: Problem::ALL.iter().map(|_| Cell::default()).collect(),
            limits: Limit::ALL.iter().map(|_| Cell::default()).collect(),
            replay_buffer: Cell::default(),
            underscores_dropped: Cell::default(),
            tunnels: Cell::default(),
            tunnels_closed: Default::default(),
        });
        shards.push(Arc::clone(&shard));
        shard
    }

    /// The cells of a cluster's discovery.
    pub fn discovery(&self, cluster: &Arc<str>) -> Arc<DiscoveryCells> {
        let mut all = self.discovery.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cells)) = all.iter().find(|(name, _)| name == cluster) {
            return Arc::clone(cells);
        }
        let cells = Arc::<DiscoveryCells>::default();
        all.push((Arc::clone(cluster), Arc::clone(&cells)));
        cells
    }

    /// Whom to ask for each cluster's [`Standing`] from now on.
    pub fn ask<F>(&self, clusters: impl IntoIterator<Item = (Arc<str>, F)>)
    where
        F: Fn() -> Standing + Send + Sync + 'static,
    {
        let all = clusters.into_iter().map(|(name, ask)| (name, Ask(Box::new(ask))));
        *self.standings.lock().unwrap_or_else(PoisonError::into_inner) = all.collect();
    }

    /// What a cluster's requests wait for now.
    pub fn standing(&self, cluster: &str) -> Standing {
        let standings = self.standings.lock().unwrap_or_else(PoisonError::into_inner);
        let found = standings.iter().find(|(name, _)| **name == *cluster);
        found.map(|(_, ask)| ask.0()).unwrap_or_default()
    }

    /// Discovery believes something new.
    pub fn changed(&self, cluster: &Arc<str>, change: &Change) {
        let mut all = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let place = all.iter().position(|(name, _)| name == cluster).unwrap_or_else(|| {
            all.push((Arc::clone(cluster), Changes::default()));
            all.len() - 1
        });
        let Some((_, changes)) = all.get_mut(place) else { return };
        match change {
            Change::Primary { .. } => changes.primary += 1,
            Change::Ejected { .. } => changes.ejected += 1,
            Change::Restarted { .. } => changes.restarted += 1,
            Change::WritesLost { writes, .. } => changes.lost += writes,
            Change::Fenced { .. } => changes.fenced += 1,
            Change::NoNews { source, why } => {
                let counts = NAMERS.iter().zip(&mut changes.no_news);
                let counts = counts.filter(|(named, _)| *named == source).map(|(_, counts)| counts);
                for (trouble, count) in Trouble::ALL.iter().zip(counts.flatten()) {
                    *count += u64::from(trouble == why);
                }
            }
            _ => {}
        }
    }

    /// A reload ended.
    pub fn reloaded(&self, applied: bool) {
        let [ok, failed] = &self.reloads;
        if applied { ok } else { failed }.fetch_add(1, Relaxed);
        self.last_reload_failed.store(u64::from(!applied), Relaxed);
        if applied {
            self.last_reload.store(unix_now().to_bits(), Relaxed);
        }
    }

    /// A listener's certificate files were found changed.
    pub fn renewed(&self, listener: &str, applied: bool) {
        let mut all = self.renewals.lock().unwrap_or_else(PoisonError::into_inner);
        let [ok, refused] = all.entry(listener.into()).or_default();
        *(if applied { ok } else { refused }) += 1;
    }

    /// This certificate is kept by ACME.
    pub fn ordering(&self, certificate: &Arc<str>) {
        let mut all = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(Arc::clone(certificate)).or_default();
    }

    /// An attempt to have this certificate by ACME came to its end.
    pub fn ordered(&self, certificate: &Arc<str>, obtained: bool) {
        let mut all = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let [ok, failed] = all.entry(Arc::clone(certificate)).or_default();
        *(if obtained { ok } else { failed }) += 1;
    }

    /// The certificates that are in force: of which listener, in which file, until when.
    pub fn certificates(&self, all: Vec<(Arc<str>, String, Duration)>) {
        let mut renewals = self.renewals.lock().unwrap_or_else(PoisonError::into_inner);
        for (listener, ..) in &all {
            renewals.entry(Arc::clone(listener)).or_default();
        }
        drop(renewals);
        *self.certificates.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }

    /// The files of TLS to a cluster's nodes were found changed.
    pub fn renewed_to_nodes(&self, cluster: &str, applied: bool) {
        let mut all = self.node_renewals.lock().unwrap_or_else(PoisonError::into_inner);
        let [ok, refused] = all.entry(cluster.into()).or_default();
        *(if applied { ok } else { refused }) += 1;
    }

    /// The clusters with whose nodes TLS is spoken, and which certificate they are shown until when.
    pub fn certificates_to_nodes(&self, all: Vec<Shown>) {
        let mut renewals = self.node_renewals.lock().unwrap_or_else(PoisonError::into_inner);
        for (cluster, _) in &all {
            renewals.entry(Arc::clone(cluster)).or_default();
        }
        drop(renewals);
        *self.node_certificates.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self, clusters: &mut [Seen]) -> String {
        let mut page = Page::default();
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner).clone();
        requests(&mut page, &shards);
        nodes(&mut page, &shards);
        topology(&mut page, clusters);
        self.process(&mut page, &shards);
        page.text
    }

    fn process(&self, page: &mut Page, shards: &[Arc<Shard>]) {
        page.family(PROBLEMS);
        for problem in Problem::ALL {
            let n = sum(shards, |s| s.problems.get(problem.index()).map_or(0, Cell::get));
            page.line(PROBLEMS, &[problem.as_str()], n);
        }
        page.family(LIMITS);
        for limit in Limit::ALL {
            let n = sum(shards, |s| s.limits.get(limit.index()).map_or(0, Cell::get));
            page.line(LIMITS, &[limit.as_str()], n);
        }
        page.one(REPLAY_BUFFER, sum(shards, |s| s.replay_buffer.get()));
        page.one(UNDERSCORES, sum(shards, |s| s.underscores_dropped.get()));
        page.one(TUNNELS, sum(shards, |s| s.tunnels.get()));
        page.family(TUNNELS_CLOSED);
        for (place, reason) in LEAVES.iter().enumerate() {
            let n = sum(shards, |s| s.tunnels_closed.get(place).map_or(0, Cell::get));
            page.line(TUNNELS_CLOSED, &[reason], n);
        }
        let all = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        type Count = fn(&Changes) -> u64;
        let families: [(&Family, Count); 5] = [
            (WRITES_LOST, |c| c.lost),
            (FENCED, |c| c.fenced),
            (PRIMARY_CHANGES, |c| c.primary),
            (NODE_EJECTIONS, |c| c.ejected),
            (NODE_RESTARTS, |c| c.restarted),
        ];
        for (family, count) in families {
            page.family(family);
            for (cluster, changes) in all.iter() {
                page.line(family, &[cluster], count(changes));
            }
        }
        page.family(NO_NEWS);
        for (cluster, changes) in all.iter() {
            for (source, counts) in NAMERS.iter().zip(&changes.no_news) {
                for (why, count) in Trouble::ALL.iter().zip(counts) {
                    page.line(NO_NEWS, &[cluster, source.as_str(), why.as_str()], count);
                }
            }
        }
        drop(all);
        let standings = self.standings.lock().unwrap_or_else(PoisonError::into_inner);
        let standings: Vec<_> =
            standings.iter().map(|(name, ask)| (name.clone(), ask.0())).collect();
        type Of = fn(&Standing) -> u64;
        let families: [(&Family, Of); 3] = [
            (HELD, |s| s.held as u64),
            (HELD_BYTES, |s| s.held_bytes as u64),
            (HANDING_OVER, |s| u64::from(s.handing_over)),
        ];
        for (family, of) in families {
            page.family(family);
            for (cluster, standing) in &standings {
                page.line(family, &[cluster], of(standing));
            }
        }
        let all = self.discovery.lock().unwrap_or_else(PoisonError::into_inner).clone();
        page.family(DNS_LOOKUPS);
        for (cluster, cells) in &all {
            for (cell, result) in cells.lookups.iter().zip(LOOKUP_RESULTS) {
                page.line(DNS_LOOKUPS, &[cluster, result], cell.load(Relaxed));
            }
        }
        page.family(OBSERVATIONS_DROPPED);
        for (cluster, cells) in &all {
            page.line(OBSERVATIONS_DROPPED, &[cluster], cells.dropped.load(Relaxed));
        }
        page.family(RELOADS);
        for (cell, result) in self.reloads.iter().zip(["applied", "refused"]) {
            page.line(RELOADS, &[result], cell.load(Relaxed));
        }
        page.family(RENEWALS);
        let renewals = self.renewals.lock().unwrap_or_else(PoisonError::into_inner);
        for (listener, counts) in renewals.iter() {
            for (n, outcome) in counts.iter().zip(["applied", "refused"]) {
                page.line(RENEWALS, &[listener, outcome], n);
            }
        }
        drop(renewals);
        page.family(CERTIFICATES);
        let all = self.certificates.lock().unwrap_or_else(PoisonError::into_inner);
        for (listener, file, until) in all.iter() {
            page.line(CERTIFICATES, &[listener, file], until.as_secs());
        }
        drop(all);
        page.family(ORDERS);
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        for (certificate, counts) in orders.iter() {
            for (n, outcome) in counts.iter().zip(["obtained", "failed"]) {
                page.line(ORDERS, &[certificate, outcome], n);
            }
        }
        drop(orders);
        page.family(NODE_RENEWALS);
        let renewals = self.node_renewals.lock().unwrap_or_else(PoisonError::into_inner);
        for (cluster, counts) in renewals.iter() {
            for (n, outcome) in counts.iter().zip(["applied", "refused"]) {
                page.line(NODE_RENEWALS, &[cluster, outcome], n);
            }
        }
        drop(renewals);
        page.family(NODE_CERTIFICATES);
        let all = self.node_certificates.lock().unwrap_or_else(PoisonError::into_inner);
        for (cluster, certificate) in all.iter() {
            if let Some((file, until)) = certificate {
                page.line(NODE_CERTIFICATES, &[cluster, file], until.as_secs());
            }
        }
        drop(all);
        page.one(RELOAD_SUCCESSFUL, 1 - self.last_reload_failed.load(Relaxed));
        page.one(RELOAD_TIMESTAMP, f64::from_bits(self.last_reload.load(Relaxed)));
        page.one(LOG_DROPPED, self.log_dropped.load(Relaxed));
        let mut workers: Vec<usize> = shards.iter().map(|shard| shard.worker).collect();
        workers.sort_unstable();
        workers.dedup();
        page.one(WORKERS, workers.len());
        page.family(BUILD_INFO);
        page.line(BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1);
        page.one(START_TIME, self.started);
        if let Some((cpu, resident, descriptors)) = process() {
            page.one(CPU, cpu);
            page.one(RESIDENT, resident);
            page.one(OPEN_FDS, descriptors);
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        page.one(MAX_FDS, limit.map_or(f64::INFINITY, |limit| limit as f64));
    }
}

fn sum(shards: &[Arc<Shard>], of: impl Fn(&Shard) -> u64) -> u64 {
    shards.iter().map(|shard| of(shard)).fold(0, u64::wrapping_add)
}

/// The distinct values of `of`, in the order in which they first come.
fn distinct<'s, T: PartialEq>(
    shards: &'s [Arc<Shard>],
    of: impl Fn(&'s Shard) -> Vec<T>,
) -> Vec<T> {
    let mut all = Vec::new();
    for value in shards.iter().flat_map(|shard| of(shard)) {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

fn requests(page: &mut Page, shards: &[Arc<Shard>]) {
    let listeners = distinct(shards, |s| s.listeners.iter().map(|(name, _)| name).collect());
    type Count = fn(&ListenerCells) -> u64;
    let families: [(&Family, Count); 5] = [
        (CONNECTIONS, |c| c.connections.get()),
        (IN_FLIGHT, |c| c.in_flight.get()),
        (ABANDONED, |c| c.abandoned.get()),
        (REQUEST_BYTES, |c| c.received.get()),
        (RESPONSE_BYTES, |c| c.sent.get()),
    ];
    for (family, count) in families {
        page.family(family);
        for listener in &listeners {
            let n = sum(shards, |s| {
                let own = s.listeners.iter().filter(|(name, _)| name == *listener);
                own.map(|(_, cells)| count(cells)).fold(0, u64::wrapping_add)
            });
            page.line(family, &[listener], n);
        }
    }
    page.family(HANDSHAKES);
    for listener in &listeners {
        for (place, outcome) in HANDSHAKE_OUTCOMES.iter().enumerate() {
            let n = sum(shards, |s| {
                let own = s.listeners.iter().filter(|(name, _)| name == *listener);
                let cells = own.filter_map(|(_, cells)| cells.handshakes.get(place));
                cells.map(Cell::get).fold(0, u64::wrapping_add)
            });
            page.line(HANDSHAKES, &[listener, outcome], n);
        }
    }
    let clusters = distinct(shards, |s| s.clusters.iter().map(|(name, _)| name).collect());
    let of = |cluster: &Arc<str>| -> Vec<&ClusterCells> {
        let all = shards.iter().flat_map(|s| s.clusters.iter());
        all.filter(|(name, _)| name == cluster).map(|(_, cells)| cells).collect()
    };
    page.family(REQUESTS);
    for cluster in &clusters {
        let cells = of(cluster);
        for (c, class) in CLASSES.iter().enumerate() {
            for (m, method) in METHODS.iter().enumerate() {
                for code in 0..ALL_CODES {
                    let place = (c * METHODS.len() + m) * ALL_CODES + code;
                    let n: u64 =
                        cells.iter().map(|x| x.requests.get(place).map_or(0, Cell::get)).sum();
                    if n > 0 {
                        page.line(REQUESTS, &[cluster, class, method, &code_name(code)], n);
                    }
                }
            }
        }
    }
    page.family(REQUEST_DURATION);
    for cluster in &clusters {
        for (c, class) in CLASSES.iter().enumerate() {
            let cells = of(cluster);
            let histograms: Vec<_> = cells.iter().filter_map(|x| x.durations.get(c)).collect();
            page.histogram(REQUEST_DURATION, &[cluster, class], &histograms);
        }
    }
    let named = || clusters.iter().filter(|name| !name.is_empty());
    let voids = Void::ALL.map(Void::as_str);
    let reads = TokenRead::ALL.map(TokenRead::as_str);
    type One = fn(&ClusterCells, usize) -> u64;
    let families: [(&Family, &[&str], One); 8] = [
        (TOKENS_INVALID, &voids, |c, i| c.consistency.void.get(i).map_or(0, Cell::get)),
        (TOKEN_READS, &reads, |c, i| c.consistency.reads.get(i).map_or(0, Cell::get)),
        (DURABILITY_WAITS, &["reached", "timeout"], |c, i| {
            c.consistency.durable.get(i).map_or(0, Cell::get)
        }),
        (RETRIES, &["read", "write"], |c, i| c.retried.get(i).map_or(0, Cell::get)),
        (RETRIES_SKIPPED, &RETRY_REFUSALS, |c, i| c.retry_refused.get(i).map_or(0, Cell::get)),
        (WRITE_OUTCOMES, &UNANSWERED, |c, i| c.unanswered.get(i).map_or(0, Cell::get)),
        (REPLAYS, &REPLAY_OUTCOMES, |c, i| c.replays.get(i).map_or(0, Cell::get)),
        (HOLD_OUTCOMES, &HOLD_OUTCOME_WORDS, |c, i| c.holds.get(i).map_or(0, Cell::get)),
    ];
    for (family, values, one) in families {
        page.family(family);
        for cluster in named() {
            for (i, value) in values.iter().enumerate() {
                let n = of(cluster).iter().map(|cells| one(cells, i)).sum::<u64>();
                page.line(family, &[cluster, value], n);
            }
        }
    }
    type Counter = fn(&ClusterCells) -> &Cell;
    let counters: [(&Family, Counter); 4] = [
        (CACHES_IGNORED, |c| &c.caches_ignored),
        (TOKENS_ISSUED, |c| &c.consistency.issued),
        (EXACT_POSITIONS, |c| &c.consistency.exact),
        (WITHOUT_POSITION, |c| &c.consistency.blind),
    ];
    for (family, pick) in counters {
        page.family(family);
        for cluster in named() {
            let n = of(cluster).iter().map(|cells| pick(cells).get()).sum::<u64>();
            page.line(family, &[cluster], n);
        }
    }
    type Pick = fn(&ClusterCells) -> &Histogram;
    let histograms: [(&Family, Pick); 2] =
        [(HOLD_DURATION, |c| &c.hold_duration), (TOKEN_WAIT, |c| &c.consistency.wait)];
    for (family, pick) in histograms {
        page.family(family);
        for cluster in named() {
            let cells = of(cluster);
            let parts: Vec<_> = cells.iter().map(|cells| pick(cells)).collect();
            page.histogram(family, &[cluster], &parts);
        }
    }
}

fn nodes(page: &mut Page, shards: &[Arc<Shard>]) {
    let mut all: Vec<Arc<NodeCells>> = Vec::new();
    for shard in shards {
        all.extend(shard.nodes.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned());
    }
    let mut names: Vec<(Arc<str>, Arc<str>)> = Vec::new();
    for node in &all {
        let name = (Arc::clone(&node.cluster), Arc::clone(&node.name));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let of = |cluster: &Arc<str>, name: &Arc<str>| -> Vec<&Arc<NodeCells>> {
        all.iter().filter(|n| n.cluster == *cluster && n.name == *name).collect()
    };
    let failures = FAILURE_KINDS.map(FailureKind::as_str);
    type One = fn(&NodeCells, usize) -> u64;
    let families: [(&Family, &[&str], One); 3] = [
        (ATTEMPTS, &["1xx", "2xx", "3xx", "4xx", "5xx"], |c, i| {
            c.answers.get(i + 1).map_or(0, Cell::get)
        }),
        (FAILURES, &failures, |c, i| c.failures.get(i).map_or(0, Cell::get)),
        (UPSTREAM_CONNECTIONS, &["open", "idle"], |c, i| {
            if i == 0 { &c.open } else { &c.idle }.get()
        }),
    ];
    for (family, values, one) in families {
        page.family(family);
        for (cluster, name) in &names {
            for (i, value) in values.iter().enumerate() {
                let n: u64 = of(cluster, name).iter().map(|cells| one(cells, i)).sum();
                page.line(family, &[cluster, name, value], n);
            }
        }
    }
    page.family(ATTEMPTS_IN_FLIGHT);
    for (cluster, name) in &names {
        let n: u64 = of(cluster, name).iter().map(|cells| cells.in_flight.get()).sum();
        page.line(ATTEMPTS_IN_FLIGHT, &[cluster, name], n);
    }
    type Pick = fn(&NodeCells) -> &Histogram;
    let families: [(&Family, Pick); 2] =
        [(ATTEMPT_DURATION, |c| &c.duration), (CONNECT_DURATION, |c| &c.connect)];
    for (family, pick) in families {
        page.family(family);
        for (cluster, name) in &names {
            let cells = of(cluster, name);
            let histograms: Vec<_> = cells.iter().map(|c| pick(c)).collect();
            page.histogram(family, &[cluster, name], &histograms);
        }
    }
}

fn topology(page: &mut Page, clusters: &mut [Seen]) {
    let seen: Vec<_> =
        clusters.iter_mut().map(|(name, reader)| (&*name, Arc::clone(reader.latest()))).collect();
    page.family(NODES_BY_STATE);
    for (cluster, topology) in &seen {
        for role in [Role::Primary, Role::Replica, Role::Unknown] {
            for (state, presence) in
                [("member", Presence::Member), ("draining", Presence::Draining)]
            {
                let fits = |n: &&Node| n.role == role && n.presence == presence;
                let n = topology.nodes.iter().filter(fits).count();
                page.line(NODES_BY_STATE, &[cluster, role.as_str(), state], n);
            }
        }
    }
    type Of = fn(&Topology) -> u64;
    let families: [(&Family, Of); 5] = [
        (PRIMARY_KNOWN, |t| u64::from(t.primary.is_some())),
        (SPLIT_BRAIN, |t| {
            u64::from(t.primary.is_none() && t.primary_gap == PrimaryGap::SplitBrain)
        }),
        (TRIPWIRE, |t| u64::from(t.primary.is_none() && t.primary_gap == PrimaryGap::Tripped)),
        (MEMBERS_STALE, |t| u64::from(t.stale)),
        (TERM, |t| t.term),
    ];
    for (family, of) in families {
        page.family(family);
        for (cluster, topology) in &seen {
            page.line(family, &[cluster], of(topology));
        }
    }
    let now = tokio::time::Instant::now().into_std();
    type OfNode = fn(&Node, Instant) -> f64;
    let families: [(&Family, OfNode); 6] = [
        (IS_PRIMARY, |n, _| f64::from(u8::from(n.role == Role::Primary))),
        (NODE_FENCED, |n, _| f64::from(u8::from(n.fenced))),
        (NODE_HEALTHY, |n, _| f64::from(u8::from(n.probed_healthy))),
        (NODE_EJECTED, |n, now| f64::from(u8::from(n.record.is_ejected(now)))),
        (NODE_LAG, |n, _| n.lag.map_or(f64::NAN, |lag| lag.as_secs_f64())),
        (NODE_TOO_FAR, |n, _| f64::from(u8::from(n.freshness == Freshness::TooFar))),
    ];
    page.family(NODE_TXID);
    for (cluster, topology) in &seen {
        for node in &topology.nodes {
            for (_, database, position) in node.progress.get().iter() {
                page.line(NODE_TXID, &[cluster, &node.name, database], position.txid);
            }
        }
    }
    page.family(NODE_BEHIND);
    for (cluster, topology) in &seen {
        let primary = topology.primary().map(|node| node.progress.get());
        for node in &topology.nodes {
            let known = node.progress.get();
            let behind = match &primary {
                Some(primary) if !primary.is_empty() && !known.is_empty() => {
                    known.behind(primary, now).transactions as f64
                }
                _ => f64::NAN,
            };
            page.line(NODE_BEHIND, &[cluster, &node.name], behind);
        }
    }
    for (family, of) in families {
        page.family(family);
        for (cluster, topology) in &seen {
            for node in &topology.nodes {
                page.line(family, &[cluster, &node.name], of(node, now));
            }
        }
    }
}

/// Prometheus' text format, version 0.0.4.
#[derive(Debug, Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, family: &Family) {
        let Family { name, kind, help, .. } = family;
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A family without labels.
    fn one(&mut self, family: &Family, value: impl fmt::Display) {
        self.family(family);
        self.line(family, &[], value);
    }

    /// One series, its labels' values in the order of the declaration.
    fn line(&mut self, family: &Family, values: &[&str], value: impl fmt::Display) {
        self.series(family, "", values, None, value);
    }

    fn series(
        &mut self,
        family: &Family,
        suffix: &str,
        values: &[&str],
        le: Option<&str>,
        value: impl fmt::Display,
    ) {
        debug_assert_eq!(values.len(), family.labels.len(), "{}", family.name);
        self.text.push_str(family.name);
        self.text.push_str(suffix);
        let labels = family.labels.iter().copied().zip(values.iter().copied());
        let mut before = '{';
        for (label, text) in labels.chain(le.map(|le| ("le", le))) {
            let _ = write!(self.text, "{before}{label}=\"");
            before = ',';
            for char in text.chars() {
                match char {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    other => self.text.push(other),
                }
            }
            self.text.push('"');
        }
        let _ = writeln!(self.text, "{} {value}", if before == ',' { "}" } else { "" });
    }

    fn histogram(&mut self, family: &Family, values: &[&str], parts: &[&Histogram]) {
        let at = |i: usize| -> u64 {
            parts.iter().filter_map(|h| h.buckets.get(i)).map(Cell::get).sum()
        };
        let mut cumulative = 0;
        let bounds = BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (i, bound) in bounds.enumerate() {
            cumulative += at(i);
            self.series(family, "_bucket", values, Some(&bound), cumulative);
        }
        let nanos: u64 = parts.iter().map(|h| h.nanos.get()).sum();
        let seconds = Duration::from_nanos(nanos).as_secs_f64();
        self.series(family, "_sum", values, None, seconds);
        self.series(family, "_count", values, None, cumulative);
    }
}

fn unix_now() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0.0, |since| since.as_secs_f64())
}

/// CPU seconds, resident bytes and descriptors, where the system has `/proc`.
fn process() -> Option<(f64, u64, usize)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may hold blanks.
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok());
    let cpu = (ticks(11)? + ticks(12)?) / rustix::param::clock_ticks_per_second() as f64;
    let pages = fields.get(21)?.parse::<u64>().ok()?;
    let resident = pages * rustix::param::page_size() as u64;
    Some((cpu, resident, std::fs::read_dir("/proc/self/fd").ok()?.count()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_adds_the_shards_up() {
        let metrics = Metrics::new();
        let (listener, cluster) = (Arc::from(":8080"), Arc::from("abaci"));
        let shards: Vec<_> = (0..2)
            .map(|n| metrics.shard(n, &[Arc::clone(&listener)], &[Arc::clone(&cluster)]))
            .collect();
        let finished = Finished {
            listener: 0,
            cluster: Some(0),
            class: Some(Class::Write),
            method: Some(&Method::POST),
            status: StatusCode::CREATED,
            duration: Duration::from_millis(2),
            received: 10,
            sent: 20,
            problem: None,
        };
        for shard in &shards {
            shard.request_finished(&finished);
        }
        let page = metrics.render(&mut []);
        for line in [
            "litegate_http_requests_total{cluster=\"abaci\",class=\"write\",method=\"POST\",code=\"201\"} 2\n",
            "litegate_http_request_bytes_total{listener=\":8080\"} 20\n",
            "litegate_http_request_duration_seconds_bucket{cluster=\"abaci\",class=\"write\",le=\"0.0025\"} 2\n",
            "litegate_http_request_duration_seconds_bucket{cluster=\"abaci\",class=\"write\",le=\"0.001\"} 0\n",
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
    }

    #[test]
    fn every_status_has_a_place_of_its_own_or_its_class() {
        for code in 100..1000 {
            let name = code_name(code_place(StatusCode::from_u16(code).unwrap()));
            let class = format!("{}xx", (code / 100).min(5));
            assert!(name == code.to_string() || name == class, "{code}: {name}");
        }
    }

    /// A page on which every family has a series.
    fn page() -> String {
        let metrics = Metrics::new();
        let (listener, cluster) = (Arc::from(":8080"), Arc::from("abaci"));
        let shard = metrics.shard(0, &[Arc::clone(&listener)], &[Arc::clone(&cluster)]);
        shard.request_finished(&Finished {
            listener: 0,
            cluster: Some(0),
            class: Some(Class::Read),
            method: Some(&Method::GET),
            status: StatusCode::OK,
            duration: Duration::ZERO,
            received: 0,
            sent: 0,
            problem: None,
        });
        let cells = shard.node(0, &Arc::from("abaci-app-0"));
        let _opened = cells.connected(Duration::from_millis(1));
        metrics.changed(
            &cluster,
            &Change::Primary { from: None, to: Arc::from("a"), term: 1, gap: Duration::ZERO },
        );
        metrics.discovery(&cluster);
        metrics.certificates(vec![(Arc::clone(&listener), "tls.crt".into(), Duration::ZERO)]);
        metrics.ordering(&Arc::from("a.pem"));
        let shown = Some(("own.crt".into(), Duration::ZERO));
        metrics.certificates_to_nodes(vec![(Arc::clone(&listener), shown)]);
        metrics.ask([(Arc::clone(&cluster), Standing::default)]);
        let node = Node {
            role: Role::Primary,
            ..Node::new(
                crate::topology::NodeId(1),
                "abaci-app-0".into(),
                ([127, 0, 0, 1], 1).into(),
            )
        };
        let mut positions = crate::topology::position::Positions::of(Some(1));
        let position = crate::topology::position::Position { txid: 1, checksum: 1 };
        positions.set("app.db", position, Instant::now());
        node.progress.set(positions);
        let topology = Topology { nodes: vec![node], ..Topology::default() };
        let (_publisher, reader) = watch::channel(topology);
        metrics.render(&mut [(cluster, reader)])
    }

    #[test]
    fn every_family_is_declared_once_and_every_series_has_the_declared_labels() {
        let page = page();
        let names: Vec<_> = page
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        for family in FAMILIES {
            assert_eq!(names.iter().filter(|n| **n == family.name).count(), 1, "{}", family.name);
            assert!(family.kind != "counter" || family.name.ends_with("_total"), "{}", family.name);
            let start = |line: &&str| {
                line.strip_prefix(family.name).is_some_and(|rest| {
                    rest.starts_with(['{', ' '])
                        || (family.kind == "histogram" && rest.starts_with('_'))
                })
            };
            let mut series = page.lines().filter(start).peekable();
            assert!(series.peek().is_some(), "{} has no series", family.name);
            for line in series {
                let labels = line.split_once('{').map_or("", |(_, rest)| rest);
                let labels: Vec<_> = labels
                    .split(['{', ','])
                    .filter_map(|pair| pair.split_once("=\""))
                    .map(|(label, _)| label)
                    .filter(|label| *label != "le")
                    .collect();
                assert_eq!(labels, family.labels, "{line}");
            }
        }
        assert_eq!(names.len(), FAMILIES.len());
    }

    /// The table in `docs/observing.md` is the declaration. `LITEGATE_BLESS=1` rewrites it.
    #[test]
    fn the_operators_table_is_the_declaration() {
        const BEGIN: &str = "<!-- Made from src/telemetry/metrics.rs. -->\n";
        let mut table = String::from("\n| metric | kind | labels | meaning |\n|---|---|---|---|\n");
        for Family { name, kind, labels, help } in FAMILIES {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            writeln!(table, "| `{name}` | {kind} | {} | {help} |", labels.join(" ")).unwrap();
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/observing.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (before, _) = page.split_once(BEGIN).expect("the table has a mark");
        let want = format!("{before}{BEGIN}{table}");
        if std::env::var_os("LITEGATE_BLESS").is_some() {
            std::fs::write(path, &want).unwrap();
        } else {
            assert_eq!(page, want);
        }
    }

    #[test]
    fn what_has_no_answer_yet_is_in_flight_and_whoever_leaves_is_counted() {
        let metrics = Metrics::new();
        let shard = metrics.shard(0, &[Arc::from(":1")], &[]);
        let (first, second) = (shard.request_began(0), shard.request_began(0));
        let has = |line: &str| assert!(metrics.render(&mut []).contains(line), "{line}");
        has("litegate_http_requests_in_flight{listener=\":1\"} 2\n");
        first.answered();
        drop(second);
        has("litegate_http_requests_in_flight{listener=\":1\"} 1\n");
        has("litegate_http_requests_abandoned_total{listener=\":1\"} 1\n");
        shard.request_ended(0);
        has("litegate_http_requests_in_flight{listener=\":1\"} 0\n");
    }

    #[test]
    fn a_connection_is_open_until_it_is_dropped() {
        let metrics = Metrics::new();
        let shard = metrics.shard(0, &[], &[Arc::from("abaci")]);
        let cells = shard.node(0, &Arc::from("n"));
        let (one, two) = (cells.connected(Duration::ZERO), cells.connected(Duration::ZERO));
        drop(one);
        let page = metrics.render(&mut []);
        let labels = "{cluster=\"abaci\",node=\"n\"";
        for line in [
            format!("litegate_upstream_connections{labels},state=\"open\"}} 1\n"),
            format!("litegate_upstream_connect_duration_seconds_count{labels}}} 2\n"),
        ] {
            assert!(page.contains(&line), "{line}{page}");
        }
        drop(two);
    }

    #[test]
    fn labels_cannot_break_out_of_their_quotes() {
        let mut page = Page::default();
        let family = Family { name: "x", kind: "gauge", labels: &["a"], help: "" };
        page.line(&family, &["b\"c\\d\ne"], 1);
        assert_eq!(page.text, "x{a=\"b\\\"c\\\\d\\ne\"} 1\n");
    }
}
