//! What is counted, and how it is shown to Prometheus.
//!
//! Each data-plane worker owns a [`Shard`]: plain cells that only it writes, with relaxed loads
//! and stores, so that counting a request costs no locked instruction and no shared cache line.
//! A scrape adds the shards up. Labels come from closed sets only: methods and statuses outside
//! of the tables are counted as `other`, and nodes come from discovery, at most [`NODES`] of them.

use std::{
    fmt::{self, Write as _},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{Method, StatusCode};

use crate::{
    decide::{
        Class, FailureKind, Problem,
        token::{TokenRead, Void},
    },
    topology::{Change, Freshness, Presence, Role, watch},
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
const FAILURES: [FailureKind; 7] = [
    FailureKind::ConnectRefused,
    FailureKind::ConnectTimeout,
    FailureKind::NodeFull,
    FailureKind::StaleConnection,
    FailureKind::Closed,
    FailureKind::ResponseTimeout,
    FailureKind::BadResponse,
];

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

const VOIDS: [&str; Void::ALL.len()] = {
    let mut words = [""; Void::ALL.len()];
    let mut i = 0;
    while i < words.len() {
        words[i] = Void::ALL[i].as_str();
        i += 1;
    }
    words
};
const TOKEN_READS: [&str; TokenRead::ALL.len()] = {
    let mut words = [""; TokenRead::ALL.len()];
    let mut i = 0;
    while i < words.len() {
        words[i] = TokenRead::ALL[i].as_str();
        i += 1;
    }
    words
};
const HOLD_OUTCOMES: [&str; 3] = ["resumed", "timeout", "overflow"];

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

/// One worker's cells for one configuration.
#[derive(Debug)]
pub struct Shard {
    worker: usize,
    listeners: Vec<(Arc<str>, ListenerCells)>,
    /// One for each cluster, and one for requests that found none.
    clusters: Vec<(Arc<str>, ClusterCells)>,
    nodes: Mutex<Vec<Arc<NodeCells>>>,
    problems: Box<[Cell]>,
    /// Bytes in replay buffers.
    pub replay_buffer: Cell,
    /// Upgraded connections.
    pub tunnels: Cell,
}

#[derive(Debug, Default)]
struct ListenerCells {
    connections: Cell,
    received: Cell,
    sent: Cell,
}

#[derive(Debug)]
struct ClusterCells {
    requests: Box<[Cell]>,
    durations: [Histogram; CLASSES.len()],
    retried: [Cell; 2],
    retry_refused: Cell,
    replays: [Cell; 3],
    caches_ignored: Cell,
    holds: [Cell; 3],
    hold_duration: Histogram,
    /// Tokens and positions: see [`Consistency`].
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
            retry_refused: Cell::default(),
            replays: Default::default(),
            caches_ignored: Cell::default(),
            holds: Default::default(),
            hold_duration: Histogram::default(),
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
    failures: [Cell; FAILURES.len()],
    duration: Histogram,
    connect: Histogram,
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
                let place = FAILURES.iter().position(|other| *other == kind);
                if let Some(cell) = place.and_then(|place| self.failures.get(place)) {
                    cell.add(1);
                }
            }
        }
    }

    /// A connection to it was made.
    pub fn connected(&self, took: Duration) {
        self.connect.observe(took);
    }
}

impl Shard {
    /// A client connected.
    pub fn connection_opened(&self, listener: usize) {
        if let Some((_, cells)) = self.listeners.get(listener) {
            cells.connections.add(1);
        }
    }

    /// It went.
    pub fn connection_closed(&self, listener: usize) {
        if let Some((_, cells)) = self.listeners.get(listener) {
            cells.connections.sub(1);
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

    /// A request was sent again after a failure.
    pub fn retried(&self, cluster: usize, class: Class) {
        if let Some((_, cells)) = self.clusters.get(cluster) {
            let [reads, writes] = &cells.retried;
            if class == Class::Read { reads } else { writes }.add(1);
        }
    }

    /// The budget refused a retry.
    pub fn retry_refused(&self, cluster: usize) {
        if let Some((_, cells)) = self.clusters.get(cluster) {
            cells.retry_refused.add(1);
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

/// Everything counted in this process.
#[derive(Debug)]
pub struct Metrics {
    /// All there ever were: counters must not go back on a reload.
    shards: Mutex<Vec<Arc<Shard>>>,
    changes: Mutex<Vec<(Arc<str>, Changes)>>,
    discovery: Mutex<Vec<(Arc<str>, Arc<DiscoveryCells>)>>,
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
            reloads: [AtomicU64::new(0), AtomicU64::new(0)],
            last_reload: AtomicU64::new(0),
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
            replay_buffer: Cell::default(),
            tunnels: Cell::default(),
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
        page.family("litegate_problems_total", "counter", "Answers that litegate made itself.");
        for problem in Problem::ALL {
            let n = sum(shards, |s| s.problems.get(problem.index()).map_or(0, Cell::get));
            page.line("litegate_problems_total", &[("problem", problem.as_str())], n);
        }
        page.family("litegate_replay_buffer_bytes", "gauge", "Request bodies kept for a replay.");
        page.line("litegate_replay_buffer_bytes", &[], sum(shards, |s| s.replay_buffer.get()));
        page.family("litegate_tunnels", "gauge", "Upgraded connections.");
        page.line("litegate_tunnels", &[], sum(shards, |s| s.tunnels.get()));
        let all = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        type Count = fn(&Changes) -> u64;
        let families: [(&str, &str, Count); 4] = [
            (
                "litegate_acknowledged_writes_lost_total",
                "Acknowledged writes that the next primary did not have, at most.",
                |c| c.lost,
            ),
            ("litegate_primary_changes_total", "Primaries seen to follow another.", |c| c.primary),
            ("litegate_node_ejections_total", "Nodes taken out of balancing.", |c| c.ejected),
            ("litegate_node_restarts_total", "Nodes seen to be another process.", |c| c.restarted),
        ];
        for (name, help, count) in families {
            page.family(name, "counter", help);
            for (cluster, changes) in all.iter() {
                page.line(name, &[("cluster", cluster)], count(changes));
            }
        }
        drop(all);
        let all = self.discovery.lock().unwrap_or_else(PoisonError::into_inner).clone();
        page.family("litegate_dns_lookups_total", "counter", "DNS look-ups by how they ended.");
        for (cluster, cells) in &all {
            for (cell, result) in cells.lookups.iter().zip(LOOKUP_RESULTS) {
                let labels = [("cluster", &**cluster), ("result", result)];
                page.line("litegate_dns_lookups_total", &labels, cell.load(Relaxed));
            }
        }
        page.family(
            "litegate_observations_dropped_total",
            "counter",
            "Observations that found no room: discovery was behind.",
        );
        for (cluster, cells) in &all {
            let n = cells.dropped.load(Relaxed);
            page.line("litegate_observations_dropped_total", &[("cluster", cluster)], n);
        }
        page.family("litegate_config_reloads_total", "counter", "Reloads of the configuration.");
        for (cell, result) in self.reloads.iter().zip(["applied", "refused"]) {
            page.line("litegate_config_reloads_total", &[("result", result)], cell.load(Relaxed));
        }
        let ok = 1 - self.last_reload_failed.load(Relaxed);
        page.family(
            "litegate_config_last_reload_successful",
            "gauge",
            "Whether the last reload was applied.",
        );
        page.line("litegate_config_last_reload_successful", &[], ok);
        let last = f64::from_bits(self.last_reload.load(Relaxed));
        page.family(
            "litegate_config_last_reload_success_timestamp_seconds",
            "gauge",
            "When a reload was last applied.",
        );
        page.line("litegate_config_last_reload_success_timestamp_seconds", &[], last);
        page.family(
            "litegate_access_log_dropped_total",
            "counter",
            "Access-log lines dropped because they were not written fast enough.",
        );
        page.line("litegate_access_log_dropped_total", &[], self.log_dropped.load(Relaxed));
        page.family("litegate_build_info", "gauge", "Always 1.");
        page.line("litegate_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        page.family("process_start_time_seconds", "gauge", "When the process started.");
        page.line("process_start_time_seconds", &[], self.started);
        if let Some((cpu, resident, descriptors)) = process() {
            page.family("process_cpu_seconds_total", "counter", "CPU time, user and system.");
            page.line("process_cpu_seconds_total", &[], cpu);
            page.family("process_resident_memory_bytes", "gauge", "Resident memory.");
            page.line("process_resident_memory_bytes", &[], resident);
            page.family("process_open_fds", "gauge", "Open file descriptors.");
            page.line("process_open_fds", &[], descriptors);
        }
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
    let families: [(&str, &str, &str, Count); 3] = [
        ("litegate_downstream_connections", "gauge", "Clients connected.", |c| c.connections.get()),
        ("litegate_http_request_bytes_total", "counter", "Bytes of request bodies.", |c| {
            c.received.get()
        }),
        ("litegate_http_response_bytes_total", "counter", "Bytes of response bodies.", |c| {
            c.sent.get()
        }),
    ];
    for (name, kind, help, count) in families {
        page.family(name, kind, help);
        for listener in &listeners {
            let n = sum(shards, |s| {
                let own = s.listeners.iter().filter(|(name, _)| name == *listener);
                own.map(|(_, cells)| count(cells)).fold(0, u64::wrapping_add)
            });
            page.line(name, &[("listener", listener)], n);
        }
    }
    let clusters = distinct(shards, |s| s.clusters.iter().map(|(name, _)| name).collect());
    let of = |cluster: &Arc<str>| -> Vec<&ClusterCells> {
        let all = shards.iter().flat_map(|s| s.clusters.iter());
        all.filter(|(name, _)| name == cluster).map(|(_, cells)| cells).collect()
    };
    page.family("litegate_http_requests_total", "counter", "Requests answered.");
    for cluster in &clusters {
        let cells = of(cluster);
        for (c, class) in CLASSES.iter().enumerate() {
            for (m, method) in METHODS.iter().enumerate() {
                for code in 0..ALL_CODES {
                    let place = (c * METHODS.len() + m) * ALL_CODES + code;
                    let n: u64 =
                        cells.iter().map(|x| x.requests.get(place).map_or(0, Cell::get)).sum();
                    if n > 0 {
                        page.line(
                            "litegate_http_requests_total",
                            &[
                                ("cluster", cluster),
                                ("class", class),
                                ("method", method),
                                ("code", &code_name(code)),
                            ],
                            n,
                        );
                    }
                }
            }
        }
    }
    page.family(
        "litegate_http_request_duration_seconds",
        "histogram",
        "From a request's first byte to the end of its answer.",
    );
    for cluster in &clusters {
        for (c, class) in CLASSES.iter().enumerate() {
            let cells = of(cluster);
            let histograms: Vec<_> = cells.iter().filter_map(|x| x.durations.get(c)).collect();
            page.histogram(
                "litegate_http_request_duration_seconds",
                &[("cluster", cluster), ("class", class)],
                &histograms,
            );
        }
    }
    type One = fn(&ClusterCells, usize) -> u64;
    let families: [(&str, &str, &str, &[&str], One); 7] = [
        (
            "litegate_retries_total",
            "Requests sent again after a failure.",
            "class",
            &["read", "write"],
            |c, i| c.retried.get(i).map_or(0, Cell::get),
        ),
        (
            "litegate_retries_skipped_total",
            "Retries that were not allowed.",
            "reason",
            &["budget"],
            |c, _| c.retry_refused.get(),
        ),
        (
            "litegate_replays_total",
            "Answers with fly-replay.",
            "outcome",
            &REPLAY_OUTCOMES,
            |c, i| c.replays.get(i).map_or(0, Cell::get),
        ),
        (
            "litegate_hold_outcomes_total",
            "Requests that waited for a primary.",
            "outcome",
            &HOLD_OUTCOMES,
            |c, i| c.holds.get(i).map_or(0, Cell::get),
        ),
        (
            "litegate_token_reads_total",
            "Reads with a token, by how they found a node that is far enough.",
            "decision",
            &TOKEN_READS,
            |c, i| c.consistency.reads.get(i).map_or(0, Cell::get),
        ),
        (
            "litegate_tokens_invalid_total",
            "Tokens that counted for nothing.",
            "reason",
            &VOIDS,
            |c, i| c.consistency.void.get(i).map_or(0, Cell::get),
        ),
        (
            "litegate_durability_waits_total",
            "Writes whose answer waited for replicas.",
            "outcome",
            &["reached", "timeout"],
            |c, i| c.consistency.durable.get(i).map_or(0, Cell::get),
        ),
    ];
    for (name, help, label, values, one) in families {
        page.family(name, "counter", help);
        for cluster in clusters.iter().filter(|name| !name.is_empty()) {
            for (i, value) in values.iter().enumerate() {
                let n = of(cluster).iter().map(|cells| one(cells, i)).sum::<u64>();
                page.line(name, &[("cluster", cluster), (label, value)], n);
            }
        }
    }
    type Counted = fn(&Consistency) -> &Cell;
    let counted: [(&str, &str, Counted); 3] = [
        ("litegate_tokens_issued_total", "Tokens given to clients.", |c| &c.issued),
        (
            "litegate_exact_positions_total",
            "Times that the primary's exact position was asked for; those that ask at once share a reading.",
            |c| &c.exact,
        ),
        (
            "litegate_writes_without_position_total",
            "Writes after which nobody could say how far the primary was: their clients' reads go to it for a while.",
            |c| &c.blind,
        ),
    ];
    for (name, help, one) in counted {
        page.family(name, "counter", help);
        for cluster in clusters.iter().filter(|name| !name.is_empty()) {
            let n = of(cluster).iter().map(|cells| one(&cells.consistency).get()).sum::<u64>();
            page.line(name, &[("cluster", cluster)], n);
        }
    }
    let name = "litegate_token_wait_seconds";
    page.family(name, "histogram", "How long reads with a token waited for a replica.");
    for cluster in clusters.iter().filter(|name| !name.is_empty()) {
        let cells = of(cluster);
        let histograms: Vec<_> = cells.iter().map(|cells| &cells.consistency.wait).collect();
        page.histogram(name, &[("cluster", cluster)], &histograms);
    }
    let name = "litegate_replay_caches_ignored_total";
    page.family(
        name,
        "counter",
        "Replays that were to be remembered, which litegate has no use for.",
    );
    for cluster in clusters.iter().filter(|name| !name.is_empty()) {
        let n = of(cluster).iter().map(|cells| cells.caches_ignored.get()).sum::<u64>();
        page.line(name, &[("cluster", cluster)], n);
    }
    page.family(
        "litegate_hold_duration_seconds",
        "histogram",
        "How long requests waited for a primary.",
    );
    for cluster in clusters.iter().filter(|name| !name.is_empty()) {
        let cells = of(cluster);
        let histograms: Vec<_> = cells.iter().map(|x| &x.hold_duration).collect();
        page.histogram("litegate_hold_duration_seconds", &[("cluster", cluster)], &histograms);
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
    page.family(
        "litegate_upstream_requests_total",
        "counter",
        "Attempts that a node answered, by class of status.",
    );
    for (cluster, name) in &names {
        for (i, code) in ["1xx", "2xx", "3xx", "4xx", "5xx"].iter().enumerate() {
            let cells = of(cluster, name);
            let n: u64 = cells.iter().filter_map(|c| c.answers.get(i + 1)).map(Cell::get).sum();
            let labels = [("cluster", &**cluster), ("node", &**name), ("code", *code)];
            page.line("litegate_upstream_requests_total", &labels, n);
        }
    }
    page.family(
        "litegate_upstream_failures_total",
        "counter",
        "Attempts that a node did not answer.",
    );
    for (cluster, name) in &names {
        for (i, kind) in FAILURES.iter().enumerate() {
            let cells = of(cluster, name);
            let n: u64 = cells.iter().filter_map(|c| c.failures.get(i)).map(Cell::get).sum();
            let labels = [("cluster", &**cluster), ("node", &**name), ("reason", kind.as_str())];
            page.line("litegate_upstream_failures_total", &labels, n);
        }
    }
    type Pick = fn(&NodeCells) -> &Histogram;
    let families: [(&str, &str, Pick); 2] = [
        (
            "litegate_upstream_request_duration_seconds",
            "From an attempt's begin to its response head.",
            |c| &c.duration,
        ),
        ("litegate_upstream_connect_duration_seconds", "How long connecting took.", |c| &c.connect),
    ];
    for (family, help, pick) in families {
        page.family(family, "histogram", help);
        for (cluster, name) in &names {
            let cells = of(cluster, name);
            let histograms: Vec<_> = cells.iter().map(|c| pick(c)).collect();
            page.histogram(family, &[("cluster", cluster), ("node", name)], &histograms);
        }
    }
}

fn topology(page: &mut Page, clusters: &mut [Seen]) {
    let seen: Vec<_> =
        clusters.iter_mut().map(|(name, reader)| (&*name, Arc::clone(reader.latest()))).collect();
    page.family("litegate_nodes", "gauge", "Nodes by role and state.");
    for (cluster, topology) in &seen {
        for role in [Role::Primary, Role::Replica, Role::Unknown] {
            for (state, presence) in
                [("member", Presence::Member), ("draining", Presence::Draining)]
            {
                let fits = |n: &&crate::topology::Node| n.role == role && n.presence == presence;
                let n = topology.nodes.iter().filter(fits).count();
                let labels = [("cluster", &***cluster), ("role", role.as_str()), ("state", state)];
                page.line("litegate_nodes", &labels, n);
            }
        }
    }
    type Of = fn(&crate::topology::Topology) -> u64;
    let split = |t: &crate::topology::Topology| {
        u64::from(t.primary.is_none() && t.primary_gap == crate::topology::PrimaryGap::SplitBrain)
    };
    let families: [(&str, &str, Of); 4] = [
        ("litegate_primary_known", "Whether there is a primary.", |t| {
            u64::from(t.primary.is_some())
        }),
        (
            "litegate_split_brain",
            "Whether two nodes claim to be primary and nothing settles it.",
            split,
        ),
        ("litegate_members_stale", "Whether the members could not be listed last time.", |t| {
            u64::from(t.stale)
        }),
        ("litegate_term", "Primary changes seen by this process.", |t| t.term),
    ];
    for (name, help, of) in families {
        page.family(name, "gauge", help);
        for (cluster, topology) in &seen {
            page.line(name, &[("cluster", cluster)], of(topology));
        }
    }
    type OfNode = fn(&crate::topology::Node) -> f64;
    let flag = |yes: bool| if yes { 1.0 } else { 0.0 };
    let _ = flag;
    let families: [(&str, &str, OfNode); 4] = [
        ("litegate_is_primary", "Whether litegate sends writes to it.", |n| {
            f64::from(u8::from(n.role == Role::Primary))
        }),
        ("litegate_node_healthy", "Whether its active probe passes.", |n| {
            f64::from(u8::from(n.probed_healthy))
        }),
        ("litegate_node_lag_seconds", "How far it is behind, as last seen.", |n| {
            n.lag.map_or(f64::NAN, |lag| lag.as_secs_f64())
        }),
        ("litegate_node_too_far_behind", "Whether its lag keeps it from serving reads.", |n| {
            f64::from(u8::from(n.freshness == Freshness::TooFar))
        }),
    ];
    for (name, help, of) in families {
        page.family(name, "gauge", help);
        for (cluster, topology) in &seen {
            for node in &topology.nodes {
                page.line(name, &[("cluster", cluster), ("node", &node.name)], of(node));
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
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl fmt::Display) {
        self.text.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"", if i == 0 { '{' } else { ',' });
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
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], parts: &[&Histogram]) {
        let at = |i: usize| -> u64 {
            parts.iter().filter_map(|h| h.buckets.get(i)).map(Cell::get).sum()
        };
        let mut cumulative = 0;
        let bucket = format!("{name}_bucket");
        let bounds = BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (i, bound) in bounds.enumerate() {
            cumulative += at(i);
            let labels: Vec<_> = labels.iter().copied().chain([("le", &*bound)]).collect();
            self.line(&bucket, &labels, cumulative);
        }
        let nanos: u64 = parts.iter().map(|h| h.nanos.get()).sum();
        self.line(&format!("{name}_sum"), labels, Duration::from_nanos(nanos).as_secs_f64());
        self.line(&format!("{name}_count"), labels, cumulative);
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

    #[test]
    fn labels_cannot_break_out_of_their_quotes() {
        let mut page = Page::default();
        page.line("x", &[("a", "b\"c\\d\ne")], 1);
        assert_eq!(page.text, "x{a=\"b\\\"c\\\\d\\ne\"} 1\n");
    }
}
