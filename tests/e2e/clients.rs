//! Six writers and three readers that never pause, through two litegates in turn; what they were
//! told, and what of it was not as promised.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    cluster::{Cluster, Ids, claims},
    gate::{self, Gate},
    http::{Answer, Body, Request},
};

pub(crate) const WRITERS: usize = 6;
const READERS: usize = 3;

/// Clients end by themselves after this long, whatever happens to their test.
const LONGEST: Duration = Duration::from_mins(3);

/// Longer than `hold.timeout` and every time-out of a node together.
const PATIENCE: Duration = Duration::from_secs(90);

/// Between two looks at who is primary.
const LOOK: Duration = Duration::from_millis(20);

/// How a write ended for its client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum End {
    Acknowledged,
    /// An answer that says that it failed, or may have: the status, and what of it.
    Refused(u16, String),
    /// No whole answer.
    Broken(String),
}

#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) id: String,
    /// The litegate that it went through.
    pub(crate) gate: usize,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) end: End,
}

/// Who was seen to be primary, and when: by asking one node or one litegate again and again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sightings(Vec<(Instant, Option<String>)>);

impl Sightings {
    fn see(&mut self, primary: Option<String>) {
        if self.0.last().is_none_or(|(_, last)| *last != primary) {
            self.0.push((Instant::now(), primary));
        }
    }

    /// When this node was first seen to be primary after `after`.
    pub(crate) fn first(&self, node: &str, after: Instant) -> Option<Instant> {
        let mut seen = self.0.iter().filter(|(at, _)| *at >= after);
        seen.find(|(_, primary)| primary.as_deref() == Some(node)).map(|(at, _)| *at)
    }
}

/// What all clients and lookers have seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) writes: Vec<Write>,
    /// Reads of a client's own last write that did not show it.
    pub(crate) stale: Vec<String>,
    /// Reads that were not answered with 200.
    pub(crate) failed_reads: Vec<String>,
    /// Reads answered, by node.
    pub(crate) reads: BTreeMap<String, usize>,
    /// Answers that only LiteFS and a proxy should have seen.
    pub(crate) leaks: Vec<String>,
    /// Clients were told so often that a write of theirs was lost.
    pub(crate) told_lost: usize,
    /// By litegate.
    pub(crate) gates: Vec<Sightings>,
    /// By node.
    pub(crate) nodes: Vec<Sightings>,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.writes.extend(other.writes);
        self.stale.extend(other.stale);
        self.failed_reads.extend(other.failed_reads);
        self.leaks.extend(other.leaks);
        self.told_lost += other.told_lost;
        for (node, count) in other.reads {
            *self.reads.entry(node).or_default() += count;
        }
    }

    pub(crate) fn refused(&self) -> Vec<&Write> {
        self.writes.iter().filter(|write| write.end != End::Acknowledged).collect()
    }

    /// Acknowledged writes that are nowhere.
    pub(crate) fn missing(&self, ids: &Ids) -> Vec<&Write> {
        let acknowledged = self.writes.iter().filter(|write| write.end == End::Acknowledged);
        acknowledged.filter(|write| !ids.contains_key(&write.id)).collect()
    }

    /// What is promised whatever happens to a node: no read fails or goes back behind its client's
    /// writes, no write runs twice, and nobody sees what only LiteFS and a proxy should.
    pub(crate) fn check_always(&self, ids: &Ids) {
        assert_eq!(self.failed_reads, Vec::<String>::new());
        assert_eq!(self.stale, Vec::<String>::new());
        assert_eq!(self.leaks, Vec::<String>::new());
        for (id, count) in ids {
            assert_eq!(count, 1, "write {id} was executed {count} times");
        }
    }

    /// Every write that waited through the failover to `primary` ran within a second of the
    /// moment at which its litegate knew, and litegate knew within a second of the node itself.
    /// `slack` is what two busy cores may add to either, and what we see late ourselves.
    pub(crate) fn check_releases(
        &self,
        cluster: &Cluster,
        primary: usize,
        since: Instant,
        slack: Duration,
    ) {
        let name = cluster.name(primary);
        let ready = self.nodes[primary].first(name, since).expect("it was seen to be primary");
        let limit = Duration::from_secs(1) + slack;
        for (number, gate) in self.gates.iter().enumerate() {
            let known = gate.first(name, since).expect("litegate learned of it");
            let late = known.saturating_duration_since(ready);
            assert!(late <= limit, "litegate {number} knew of {name} {late:?} after itself");
            let waited = self
                .writes
                .iter()
                .filter(|write| write.gate == number && write.began < known && write.ended > known);
            for write in waited {
                let late = write.ended.duration_since(known);
                assert!(late <= limit, "{late:?} after {name} was known: {write:?}");
            }
        }
    }

    /// The longest time between two acknowledged writes, whoever wrote.
    pub(crate) fn gap(&self) -> Duration {
        let acknowledged = self.writes.iter().filter(|write| write.end == End::Acknowledged);
        let mut times: Vec<Instant> = acknowledged.map(|write| write.ended).collect();
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }
}

/// Running clients.
#[derive(Debug)]
pub(crate) struct Clients {
    shared: Arc<Shared>,
    running: Vec<JoinHandle<Seen>>,
    gates: Vec<JoinHandle<Sightings>>,
    nodes: Vec<JoinHandle<Sightings>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    started: Instant,
    writes: AtomicUsize,
    reads: AtomicUsize,
}

impl Shared {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && self.started.elapsed() < LONGEST
    }
}

impl Clients {
    /// Through two litegates.
    pub(crate) fn start(cluster: &Cluster, gates: &[Gate; 2]) -> Self {
        let to = [gates[0].address(), gates[1].address()];
        Self::start_at(to, cluster, gates)
    }

    /// At two addresses, whatever is there.
    pub(crate) fn start_at(to: [SocketAddr; 2], cluster: &Cluster, gates: &[Gate]) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            started: Instant::now(),
            writes: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
        });
        let writers = (0..WRITERS).map(|n| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || Writer::new(n, to).run(&shared))
        });
        let readers = (0..READERS).map(|n| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || read(n, to, &shared))
        });
        let running = writers.chain(readers).collect();
        let look = |mut who: Box<dyn FnMut() -> Option<String> + Send>| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let mut sightings = Sightings::default();
                while shared.goes_on() {
                    sightings.see(who());
                    thread::sleep(LOOK);
                }
                sightings
            })
        };
        let by_gate = gates.iter().map(|gate| {
            let admin = gate.admin();
            look(Box::new(move || gate::primary_by(admin)))
        });
        let by_node = (0..3).map(|node| {
            let (api, name) = (cluster.api(node), cluster.name(node).to_owned());
            look(Box::new(move || claims(api).then(|| name.clone())))
        });
        let (gates, nodes) = (by_gate.collect(), by_node.collect());
        Self { shared, running, gates, nodes }
    }

    /// Waits for so many more acknowledged writes and answered reads.
    pub(crate) fn wait_for(&self, writes: usize, reads: usize) {
        let done = || {
            let writes = self.shared.writes.load(Ordering::Relaxed);
            (writes, self.shared.reads.load(Ordering::Relaxed))
        };
        let start = done();
        let deadline = Instant::now() + PATIENCE;
        while done().0 < start.0 + writes || done().1 < start.1 + reads {
            assert!(
                Instant::now() < deadline,
                "the clients are stuck: {start:?}, now {:?}",
                done()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets every client finish its last request.
    pub(crate) fn finish(mut self) -> Seen {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut seen = Seen::default();
        for client in self.running.drain(..) {
            seen.add(client.join().expect("a client doesn't panic"));
        }
        let done = |looker: JoinHandle<Sightings>| looker.join().expect("a looker doesn't panic");
        seen.gates = self.gates.drain(..).map(done).collect();
        seen.nodes = self.nodes.drain(..).map(done).collect();
        seen
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// How a client carries what it was given.
#[derive(Debug)]
enum Memory {
    /// As a browser does.
    Cookies(BTreeMap<String, String>),
    /// As an API client does.
    Token(Option<String>),
}

impl Memory {
    fn field(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Cookies(jar) if jar.is_empty() => None,
            Self::Cookies(jar) => {
                let pairs: Vec<_> =
                    jar.iter().map(|(name, value)| format!("{name}={value}")).collect();
                Some(("Cookie", pairs.join("; ")))
            }
            Self::Token(token) => token.clone().map(|token| ("Litegate-Token", token)),
        }
    }

    fn learn(&mut self, answer: &Answer) {
        match self {
            Self::Cookies(jar) => {
                for cookie in answer.headers("set-cookie") {
                    let pair = cookie.split(';').next().unwrap_or_default();
                    if let Some((name, value)) = pair.split_once('=') {
                        jar.insert(name.to_owned(), value.to_owned());
                    }
                }
            }
            Self::Token(token) => {
                if let Some(given) = answer.header("litegate-token") {
                    *token = Some(given.to_owned());
                }
            }
        }
    }
}

struct Writer {
    number: usize,
    to: [SocketAddr; 2],
    memory: Memory,
    /// Its last acknowledged write that it was not told to be lost.
    last: Option<String>,
    seen: Seen,
}

impl Writer {
    fn new(number: usize, to: [SocketAddr; 2]) -> Self {
        let memory = match number % 2 {
            0 => Memory::Cookies(BTreeMap::new()),
            _ => Memory::Token(None),
        };
        Self { number, to, memory, last: None, seen: Seen::default() }
    }

    /// Each write goes through one litegate, and the read after it through the other.
    fn run(mut self, shared: &Shared) -> Seen {
        for n in 0.. {
            if !shared.goes_on() {
                break;
            }
            let gate = (self.number + n) % 2;
            self.write(gate, format!("c{}-{n}", self.number), shared);
            self.read_own(1 - gate, shared);
        }
        self.seen
    }

    fn ask(&mut self, gate: usize, request: Request<'_>) -> Result<Answer, String> {
        let carried = self.memory.field();
        let fields: Vec<_> = carried.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let answer = Request { fields: &fields, timeout: PATIENCE, ..request }
            .send(self.to[gate])
            .map_err(|error| error.to_string())?;
        self.memory.learn(&answer);
        if answer.shows_a_replay() {
            self.seen.leaks.push(format!("{answer:?}"));
        }
        if answer.header("litegate-write-lost").is_some() {
            self.seen.told_lost += 1;
            self.last = None;
        }
        Ok(answer)
    }

    fn write(&mut self, gate: usize, id: String, shared: &Shared) {
        let path = format!("/w/{id}?linger=10ms");
        let began = Instant::now();
        let request =
            Request { method: "POST", path: &path, body: Body { bytes: 256 }, ..Request::GET };
        let end = match self.ask(gate, request) {
            Ok(answer) if answer.status == 201 && answer.node().is_some() => End::Acknowledged,
            Ok(answer) => {
                let outcome = answer.header("litegate-write-outcome").unwrap_or("unsaid");
                End::Refused(answer.status, format!("{outcome}: {}", answer.text()))
            }
            Err(error) => End::Broken(error),
        };
        if end == End::Acknowledged {
            self.last = Some(id.clone());
            shared.writes.fetch_add(1, Ordering::Relaxed);
        }
        self.seen.writes.push(Write { id, gate, began, ended: Instant::now(), end });
    }

    fn read_own(&mut self, gate: usize, shared: &Shared) {
        let Some(id) = self.last.clone() else { return };
        let path = format!("/w/{id}");
        match self.ask(gate, Request { path: &path, ..Request::GET }) {
            Ok(answer) if answer.status == 200 && answer.node().is_some() => {
                let node = answer.node().unwrap_or_default().to_owned();
                // Told just now that it is lost, it is not expected any more.
                let is_there =
                    answer.json().is_ok_and(|rows| rows.as_array().is_some_and(|r| !r.is_empty()));
                if self.last.is_some() && !is_there {
                    let carried = self.memory.field();
                    self.seen.stale.push(format!("{id} is not on {node}: {carried:?}, {answer:?}"));
                }
                *self.seen.reads.entry(node).or_default() += 1;
                shared.reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answer) => {
                let text = format!("{id}: {} {}", answer.status, answer.text());
                self.seen.failed_reads.push(text);
            }
            Err(error) => self.seen.failed_reads.push(format!("{id}: {error}")),
        }
    }
}

/// A reader carries nothing.
fn read(number: usize, to: [SocketAddr; 2], shared: &Shared) -> Seen {
    let mut seen = Seen::default();
    for n in number.. {
        if !shared.goes_on() {
            break;
        }
        let request = Request { path: "/w/c0-0", timeout: PATIENCE, ..Request::GET };
        match request.send(to[n % 2]) {
            Ok(answer) if answer.shows_a_replay() => seen.leaks.push(format!("{answer:?}")),
            Ok(answer) if answer.status == 200 && answer.node().is_some() => {
                let node = answer.node().unwrap_or_default().to_owned();
                *seen.reads.entry(node).or_default() += 1;
                shared.reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answer) => seen.failed_reads.push(format!("{} {}", answer.status, answer.text())),
            Err(error) => seen.failed_reads.push(error.to_string()),
        }
    }
    seen
}
