//! Three nodes that speak LiteFS's contract as cheaply as can be: an app port with `__txid`, and
//! an API port with `/info`, `/events`, `/debug/vars` and `/metrics`.
//!
//! They share one history, so that every replica has what the primary has: what is measured is
//! litegate, not replication.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    Failure,
    machine::{self, Core},
    upstream::Upstream,
};

pub(super) const NODES: usize = 3;
const DATABASE: &str = "app.db";
/// How long litegate may leave a line of the feed unread.
const PATIENCE: Duration = Duration::from_secs(2);

/// The nodes; they stop with the process.
pub(super) struct Cluster {
    nodes: Vec<Node>,
    shared: Arc<Shared>,
    core: Core,
}

struct Node {
    app: Upstream,
    api: SocketAddr,
}

#[derive(Default)]
struct Shared {
    history: Mutex<History>,
    /// Whether answers to writes carry `__txid`, as LiteFS's own proxy's do.
    tells: AtomicBool,
    /// Whether a write is a transaction of its own.
    commits: AtomicBool,
    writes: AtomicU64,
    /// Writes that a node got that is not primary.
    misrouted: AtomicU64,
}

#[derive(Default)]
struct History {
    txid: u64,
    primary: Option<usize>,
    /// The open streams of events, each with its node.
    streams: Vec<(usize, TcpStream)>,
}

impl Cluster {
    pub(super) fn start(core: Core, sizes: &[usize]) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        {
            let mut history = shared.lock();
            history.txid = 1;
            history.primary = Some(0);
        }
        let nodes = (0..NODES).map(|node| {
            let of = Arc::clone(&shared);
            let app = Upstream::with(core, sizes, Some(Box::new(move || of.write(node))))?;
            let listener = TcpListener::bind(("127.0.0.1", 0))?;
            let api = listener.local_addr()?;
            let of = Arc::clone(&shared);
            std::thread::Builder::new().name("api".into()).spawn(move || {
                if let Err(failure) = machine::pin(core).and_then(|()| of.listen(node, &listener)) {
                    eprintln!("a node's API has stopped: {failure}");
                }
            })?;
            Ok::<_, Failure>(Node { app, api })
        });
        let nodes = nodes.collect::<Result<_, _>>()?;
        Ok(Self { nodes, shared, core })
    }

    /// As litegate's configuration lists them.
    pub(super) fn members(&self) -> String {
        let mut list = String::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let (app, api) = (node.app.address, node.api);
            let _ = write!(list, r#"{{ name = "n{index}", address = "{app}", api = "{api}" }}, "#);
        }
        list
    }

    pub(super) fn tells(&self, tells: bool) {
        self.shared.tells.store(tells, Ordering::Relaxed);
    }

    pub(super) fn commits(&self, commits: bool) {
        self.shared.commits.store(commits, Ordering::Relaxed);
    }

    /// Writes that arrived so far, and how many of them at a node that is not primary.
    pub(super) fn writes(&self) -> (u64, u64) {
        let Shared { writes, misrouted, .. } = &*self.shared;
        (writes.load(Ordering::Relaxed), misrouted.load(Ordering::Relaxed))
    }

    pub(super) fn txid(&self) -> u64 {
        self.shared.lock().txid
    }

    /// Another primary, or none.
    pub(super) fn elect(&self, primary: Option<usize>) {
        let mut history = self.shared.lock();
        history.primary = primary;
        history
            .tell(|node| format!(r#"{{"type":"primaryChange","data":{}}}"#, stand(node, primary)));
    }

    /// Commits so many transactions a second, evenly spaced, until dropped.
    pub(super) fn commit_at(&self, rate: u32) -> Result<Committing, Failure> {
        let (shared, core) = (Arc::clone(&self.shared), self.core);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let period = Duration::from_secs(1) / rate;
        let thread = std::thread::Builder::new().name("commits".into()).spawn(move || {
            if let Err(failure) = machine::pin(core) {
                eprintln!("{failure}");
            }
            let mut next = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                shared.lock().commit();
                next += period;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        })?;
        Ok(Committing { stop, thread: Some(thread) })
    }
}

/// Transactions that come by themselves, until dropped.
pub(super) struct Committing {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Committing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, History> {
        // Whoever panicked left it whole: nothing in here can.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write arrives at `node`. Returns what its answer's head gets.
    fn write(&self, node: usize) -> String {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let mut history = self.lock();
        if history.primary != Some(node) {
            self.misrouted.fetch_add(1, Ordering::Relaxed);
        }
        if self.commits.load(Ordering::Relaxed) {
            history.commit();
        }
        if !self.tells.load(Ordering::Relaxed) {
            return String::new();
        }
        let txid = history.txid;
        // As LiteFS's proxy sets it.
        format!("Set-Cookie: __txid={txid:016x}; Path=/; Max-Age=300; HttpOnly\r\n")
    }

    fn listen(self: &Arc<Self>, node: usize, listener: &TcpListener) -> Result<(), Failure> {
        loop {
            let (stream, _) = listener.accept()?;
            let this = Arc::clone(self);
            std::thread::Builder::new().name("api".into()).spawn(move || {
                // It ends with its client.
                let _ = this.serve(node, stream);
            })?;
        }
    }

    fn serve(&self, node: usize, mut stream: TcpStream) -> Result<(), Failure> {
        stream.set_nodelay(true)?;
        let mut requests = BufReader::new(stream.try_clone()?);
        loop {
            let mut line = String::new();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
            while line.trim_end() != "" {
                line.clear();
                requests.read_line(&mut line)?;
            }
            let ids = format!(
                "Litefs-Id: {:016x}\r\nLitefs-Cluster-Id: LFSC0000000000000001\r\n",
                node + 1
            );
            let mut history = self.lock();
            let History { txid, primary, .. } = *history;
            let body = match &*target {
                "/events" => {
                    let head =
                        format!("HTTP/1.1 200 OK\r\n{ids}Transfer-Encoding: chunked\r\n\r\n");
                    stream.write_all(head.as_bytes())?;
                    let data = stand(node, primary);
                    say(&mut stream, &format!(r#"{{"type":"init","data":{data}}}"#))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    history.streams.push((node, stream));
                    return Ok(());
                }
                "/info" => {
                    let name = primary.map(|node| format!("n{node}")).unwrap_or_default();
                    let is_primary = primary == Some(node);
                    format!(r#"{{"isPrimary":{is_primary},"primary":{{"hostname":"{name}"}}}}"#)
                }
                "/debug/vars" => format!(
                    r#"{{"store":{{"dbs":{{"{DATABASE}":{{"txid":"{txid:016x}","checksum":"{:016x}"}}}}}}}}"#,
                    checksum(txid)
                ),
                "/metrics" => "litefs_lag_seconds 0\n".to_owned(),
                other => return Err(format!("nobody answers {other}").into()),
            };
            drop(history);
            let length = body.len();
            let answer = format!("HTTP/1.1 200 OK\r\n{ids}Content-Length: {length}\r\n\r\n{body}");
            stream.write_all(answer.as_bytes())?;
        }
    }
}

impl History {
    fn commit(&mut self) {
        self.txid += 1;
        let (txid, checksum) = (self.txid, checksum(self.txid));
        let line = format!(
            r#"{{"type":"tx","db":"{DATABASE}","data":{{"txID":"{txid:016x}","postApplyChecksum":"{checksum:016x}","pageSize":4096,"commit":2,"timestamp":"2026-01-01T00:00:00Z"}}}}"#
        );
        self.tell(|_| line.clone());
    }

    /// One line to every stream, each in a chunk of its own, as LiteFS flushes them.
    fn tell(&mut self, line: impl Fn(usize) -> String) {
        // A broken stream is litegate's to open again; a wrong position shows it.
        self.streams.retain_mut(|(node, stream)| say(stream, &line(*node)).is_ok());
    }
}

fn say(stream: &mut TcpStream, line: &str) -> Result<(), Failure> {
    let length = line.len() + 1;
    Ok(stream.write_all(format!("{length:x}\r\n{line}\n\r\n").as_bytes())?)
}

/// What a node says of itself in an event.
fn stand(node: usize, primary: Option<usize>) -> String {
    match primary {
        Some(primary) if primary == node => r#"{"isPrimary":true}"#.to_owned(),
        Some(primary) => format!(r#"{{"isPrimary":false,"hostname":"n{primary}"}}"#),
        None => r#"{"isPrimary":false,"hostname":""}"#.to_owned(),
    }
}

/// Different after each transaction; LiteFS sets the highest bit.
fn checksum(txid: u64) -> u64 {
    1 << 63 | txid.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1
}
