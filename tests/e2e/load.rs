//! Clients that read and write until they are told to stop, and a ledger of what they were told.

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

use serde_json::{Map, Value};

use crate::http::{self, Body};

/// A load ends by itself after this long, whatever happens to its test.
const LONGEST: Duration = Duration::from_mins(2);

/// How long to wait for progress before a load counts as stuck.
const STUCK: Duration = Duration::from_secs(45);

/// What all clients together have been told.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Writes answered with 201.
    pub(crate) acknowledged: Vec<String>,
    /// Writes answered with an error, or with nothing, and which.
    pub(crate) refused: Vec<(String, String)>,
    /// Reads answered with 200, by node.
    pub(crate) reads: BTreeMap<String, usize>,
    /// Reads with any other end.
    pub(crate) failed_reads: Vec<String>,
}

impl Ledger {
    /// Every acknowledged write is there once, and none is there twice.
    pub(crate) fn check_writes(&self, ids: &Map<String, Value>) {
        for id in &self.acknowledged {
            assert_eq!(ids.get(id), Some(&Value::from(1)), "acknowledged write {id}");
        }
        for (id, why) in &self.refused {
            let count = ids.get(id).and_then(Value::as_u64).unwrap_or(0);
            assert!(count <= 1, "refused write {id} ({why}) was executed {count} times");
        }
    }

    fn add(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.refused.extend(other.refused);
        self.failed_reads.extend(other.failed_reads);
        for (node, count) in other.reads {
            *self.reads.entry(node).or_default() += count;
        }
    }
}

/// Running clients.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Ledger>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    reads: AtomicUsize,
    writes: AtomicUsize,
}

impl Load {
    /// Each client sends one request after the other. Writes linger between the commit and the
    /// answer, so that a node that is killed usually takes committed, unanswered writes along.
    pub(crate) fn start(to: SocketAddr, writers: usize, readers: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let writer = |client| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || write(to, client, &shared))
        };
        let reader = |_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || read(to, &shared))
        };
        let clients = (0..writers).map(writer).chain((0..readers).map(reader)).collect();
        Self { shared, clients }
    }

    /// Waits for so many more answered writes and reads.
    pub(crate) fn wait_for(&self, writes: usize, reads: usize) {
        let done = || {
            let writes = self.shared.writes.load(Ordering::Relaxed);
            (writes, self.shared.reads.load(Ordering::Relaxed))
        };
        let (start, deadline) = (done(), Instant::now() + STUCK);
        while done().0 < start.0 + writes || done().1 < start.1 + reads {
            assert!(Instant::now() < deadline, "the load is stuck: {start:?} and now {:?}", done());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets every client finish its last request.
    pub(crate) fn finish(mut self) -> Ledger {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut ledger = Ledger::default();
        for client in self.clients.drain(..) {
            ledger.add(client.join().expect("a client doesn't panic"));
        }
        ledger
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn goes_on(shared: &Shared, started: Instant) -> bool {
    !shared.stop.load(Ordering::Relaxed) && started.elapsed() < LONGEST
}

fn write(to: SocketAddr, client: usize, shared: &Shared) -> Ledger {
    let (mut ledger, started) = (Ledger::default(), Instant::now());
    for n in 0.. {
        if !goes_on(shared, started) {
            break;
        }
        let id = format!("load-{client}-{n}");
        let path = format!("/w/{id}?linger=10ms");
        match http::send(to, "POST", &path, Body { bytes: 1024 }) {
            Ok(answer) if answer.status == 201 && !answer.shows_a_replay() => {
                ledger.acknowledged.push(id);
                shared.writes.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answer) => ledger.refused.push((id, format!("{} {}", answer.status, answer.text()))),
            Err(error) => ledger.refused.push((id, error.to_string())),
        }
    }
    ledger
}

fn read(to: SocketAddr, shared: &Shared) -> Ledger {
    let (mut ledger, started) = (Ledger::default(), Instant::now());
    while goes_on(shared, started) {
        match http::get(to, "/w/load-0-0") {
            Ok(answer) if answer.status == 200 && answer.node().is_some() => {
                let node = answer.node().unwrap_or_default().to_owned();
                *ledger.reads.entry(node).or_default() += 1;
                shared.reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answer) => ledger.failed_reads.push(format!("{} {}", answer.status, answer.text())),
            Err(error) => ledger.failed_reads.push(error.to_string()),
        }
    }
    ledger
}
