//! A whole fake LiteFS cluster in one process, over real sockets. `demo` runs it and the tests
//! use it. It imports nothing of litegate, so that it can't share its mistakes; what it claims of
//! LiteFS is proved against the real one in `tests/e2e`.
//!
//! Each node has LiteFS's proxy in front of a small app, LiteFS's API, and data of its own: a
//! transaction is applied to each replica in order, [`Options::replication`] after its commit, and
//! has a TXID and a checksum that chains it to the one before. A failover without a hand-over
//! loses what was not yet replicated; numbers are then used again with other checksums, and who
//! has another history gets a snapshot. Everything ends when the [`Cluster`] is dropped.
//!
//! # The app
//!
//! | request | does |
//! |---|---|
//! | `PUT /kv/KEY` | the key's value is now the body |
//! | any other mutating method on `/kv/KEY` | appends the body to the key's values |
//! | `GET /kv/KEY` | `{"node","count","values"}` as this node has it; a value over 1 KiB shows as `""` |
//! | `GET /kv?prefix=P` | `{"node","keys":{KEY:count}}` |
//! | `GET /touch/KEY` | a GET that writes, and says so by `Litegate-Write: 1` |
//! | `POST /search` | a POST that does not write, and says so by `Litegate-Write: 0` |
//! | `/echo/…` `/whoami` `/bytes/N` `/sleep/MS` `/status/CODE` `/trailers` `/hints` `/upgrade` | as they are called |
//! | `/fault/reset`, `half`, `chunk`, `garbage`, `early` | what goes wrong on purpose |
//!
//! `?db=NAME` names another database than the first, `?wait=MS` waits before a write runs,
//! `?linger=MS` between its commit and the answer, `?public` lets shared caches keep it. A write on a replica that does not come through
//! LiteFS's proxy ([`Place::app`]) is answered with `500` and `attempt to write a readonly database`.
//!
//! # LiteFS's API
//!
//! `/info`; `/events` with `init`, `primaryChange` and `tx`, which ends for a reader that is 1024
//! lines behind; `/debug/vars` with the position of every database; `/metrics` with
//! `litefs_is_primary`, `litefs_lag_seconds` (0 to 1 s on a healthy replica, growing on one that
//! hears nothing, 0 on a primary and on one that was it) and `litefs_db_txid`; `POST /promote` and
//! `POST /handoff?nodeID=`.
//!
//! # Memory
//!
//! Every value is kept by every node, as in a database: a cluster is for minutes, not for days.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
    time::Instant,
};

mod api;
mod app;
pub mod client;
pub mod consul;
mod proxy;
mod state;
mod wire;

use state::State;

/// How a fake cluster behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: usize,
    /// The databases of each; the first is the one whose position LiteFS's proxy puts into its
    /// cookie.
    pub databases: &'static [&'static str],
    /// How long a transaction takes to a replica.
    pub replication: Duration,
    /// How long after a kill another node takes over. Zero: never by itself.
    pub lease: Duration,
    /// How long a node that has lost its primary waits before it looks for another (LiteFS: 1 s).
    pub attach: Duration,
    /// How long a replica keeps a write waiting when it knows no primary (LiteFS: 5 s).
    pub patience: Duration,
    /// How long a read with a `__txid` cookie waits for the position before it gets `504`.
    pub txid_wait: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            databases: &["app.db"],
            replication: Duration::from_millis(5),
            lease: Duration::ZERO,
            attach: Duration::ZERO,
            patience: Duration::from_millis(500),
            txid_wait: Duration::from_secs(5),
        }
    }
}

/// How far a database is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Position {
    /// Grows by one with each transaction of one history; used again after a lossy failover.
    pub txid: u64,
    /// Tells histories apart. Zero only before the first transaction.
    pub checksum: u64,
}

/// What is wrong with a cluster on purpose, for whoever judges it. Bugs strike every few requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bug {
    /// A write runs twice.
    Twice,
    /// A write is acknowledged and does not run.
    Dropped,
    /// A replica shows its data as it was a while ago, whatever cookie the client brings.
    Stale,
    /// Any node shows its data as it was a while ago, now and then.
    Backwards,
    /// A replica takes writes itself, and forgets them with its primary's next transaction.
    Local,
    /// After a replacement, the replaced value comes back.
    Resurrected,
    /// A read shows a value that nobody wrote.
    Invented,
    /// A write is answered with success and nothing else.
    Silent,
}

/// Whom a replica names in `fly-replay`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Naming {
    /// The primary.
    #[default]
    Primary,
    /// Itself, as an old primary does for a moment after a hand-over.
    Itself,
    /// Nobody: `instance=`, as under a static lease without a hostname.
    Empty,
    /// This header value.
    Value(String),
}

/// Where a node is.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its instance name.
    pub name: String,
    /// LiteFS's proxy.
    pub proxy: SocketAddr,
    /// LiteFS's API.
    pub api: SocketAddr,
    /// The app itself, with no proxy before it.
    pub app: SocketAddr,
}

/// What happened to one unique id.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Written {
    /// On which nodes it ran, once for each time.
    pub on: Vec<usize>,
    /// The method.
    pub method: String,
    /// Bytes of body.
    pub bytes: usize,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    world: Arc<World>,
    places: Vec<Place>,
    _tasks: JoinSet<()>,
}

/// What all nodes share.
#[derive(Debug)]
struct World {
    options: Options,
    state: Mutex<State>,
    served: Vec<AtomicU64>,
}

impl World {
    fn new(options: Options) -> Self {
        let state = Mutex::new(State::new(options, Instant::now()));
        let served = (0..options.nodes).map(|_| AtomicU64::new(0)).collect();
        Self { options, state, served }
    }

    /// The state, as of now.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.advance(Instant::now());
        state
    }

    /// Wakes at every change of roles or lives.
    fn changed(&self) -> watch::Receiver<u64> {
        self.state().changed.subscribe()
    }

    /// Wakes whenever a position moves.
    fn moved(&self) -> watch::Receiver<u64> {
        self.state().moved.subscribe()
    }
}

impl Cluster {
    /// Starts it on 127.0.0.1; node 0 is primary. Call within a runtime.
    #[expect(clippy::unused_async, reason = "it spawns: whoever awaits it is within a runtime")]
    pub async fn start(options: Options) -> std::io::Result<Self> {
        let world = Arc::new(World::new(options));
        let mut tasks = JoinSet::new();
        let mut places = Vec::new();
        for node in 0..options.nodes {
            let [proxy, api, app] = [Port::new()?, Port::new()?, Port::new()?];
            places.push(Place {
                name: State::name(node),
                proxy: proxy.address,
                api: api.address,
                app: app.address,
            });
            for (port, door) in [(proxy, Door::Proxy), (api, Door::Api), (app, Door::App)] {
                let listener = port.listen()?;
                tasks.spawn(serve(Arc::clone(&world), node, port, listener, door));
            }
        }
        tasks.spawn(lease(Arc::clone(&world)));
        tasks.spawn(replicate(Arc::clone(&world)));
        Ok(Self { world, places, _tasks: tasks })
    }

    /// A cluster of nobody, to put in the place of one that is taken out of something.
    pub fn empty() -> Self {
        let world = Arc::new(World::new(Options { nodes: 0, ..Options::default() }));
        Self { world, places: Vec::new(), _tasks: JoinSet::new() }
    }

    /// Where the nodes are.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Who holds the lease.
    pub fn primary(&self) -> Option<usize> {
        self.world.state().primary
    }

    /// Whether a node lives.
    pub fn is_alive(&self, node: usize) -> bool {
        self.world.state().nodes.get(node).is_some_and(|node| node.alive)
    }

    /// Requests that a node's app has answered.
    pub fn served(&self, node: usize) -> u64 {
        self.world.served.get(node).map_or(0, |n| n.load(Ordering::Relaxed))
    }

    /// Everything that ran, also what was lost afterwards.
    pub fn ledger(&self) -> BTreeMap<String, Written> {
        self.world.state().ledger.clone()
    }

    /// What happened to one id, also if it was lost afterwards.
    pub fn written(&self, id: &str) -> Written {
        self.world.state().ledger.get(id).cloned().unwrap_or_default()
    }

    /// How many writes ran on keys that begin so, also if they were lost afterwards.
    pub fn ran(&self, prefix: &str) -> usize {
        let state = self.world.state();
        let keys = state.ledger.range(prefix.to_owned()..);
        let keys = keys.take_while(|(key, _)| key.starts_with(prefix));
        keys.map(|(_, written)| written.on.len()).sum()
    }

    /// How far a node is with its first database.
    pub fn position(&self, node: usize) -> Position {
        self.position_of(node, 0)
    }

    /// How far a node is with one of its databases.
    pub fn position_of(&self, node: usize, database: usize) -> Position {
        self.world.state().position(node, database)
    }

    /// How many values a node has under this key now, in its first database.
    pub fn count(&self, node: usize, key: &str) -> usize {
        self.world.state().keys(node, 0, key).get(key).copied().unwrap_or(0)
    }

    /// Waits until all living nodes are where the primary is.
    pub async fn settled(&self) {
        for node in 0..self.places.len() {
            self.settled_on(node).await;
        }
    }

    /// Waits until this node is where the primary is, or dead.
    pub async fn settled_on(&self, node: usize) {
        let mut moved = self.world.moved();
        loop {
            let is_settled = {
                let state = self.world.state();
                let mut databases = 0..self.world.options.databases.len();
                let is_alive = state.nodes.get(node).is_some_and(|node| node.alive);
                let is_there = |primary| {
                    databases.all(|db| state.position(node, db) == state.position(primary, db))
                };
                !is_alive || state.primary.is_some_and(is_there)
            };
            if is_settled || moved.changed().await.is_err() {
                return;
            }
        }
    }

    /// Hands the role over: the old primary, if it can, first sends all it has. Gives the role to
    /// the node where nobody has it, whatever that node has.
    pub fn promote(&self, node: usize) {
        self.world.state().promote(node, Instant::now());
    }

    /// The lease moves without a hand-over: what the old primary acknowledged and had not yet
    /// sent to this node is lost, and its transaction numbers are used again.
    pub fn seize(&self, node: usize) {
        self.world.state().seize(node, Instant::now());
    }

    /// Split brain: the lease moves and the old primary, with its replicas, does not notice.
    /// Ends by [`Cluster::withdraw`].
    pub fn usurp(&self, node: usize) {
        self.world.state().usurp(node, Instant::now());
    }

    /// A node that believes itself primary learns that it is not.
    pub fn withdraw(&self, node: usize) {
        self.world.state().withdraw(node, Instant::now());
    }

    /// Nobody is primary now.
    pub fn step_down(&self) {
        let mut state = self.world.state();
        if let Some(primary) = state.primary {
            state.withdraw(primary, Instant::now());
        }
    }

    /// The node's process is gone: connections break, new ones are refused. A primary takes along
    /// what it had not sent.
    pub fn kill(&self, node: usize) {
        self.world.state().kill(node, Instant::now());
    }

    /// The node's process is there again, another one with the same disk.
    pub fn restart(&self, node: usize) {
        self.world.state().restart(node, Instant::now());
    }

    /// The same on an empty disk. Stall the node first, or it is soon full again.
    pub fn restart_empty(&self, node: usize) {
        self.world.state().restart_empty(node, Instant::now());
    }

    /// The node accepts and answers nothing, or goes on.
    pub fn freeze(&self, node: usize, frozen: bool) {
        let mut state = self.world.state();
        if let Some(node) = state.nodes.get_mut(node) {
            node.frozen = frozen;
        }
        state.ring();
    }

    /// Nothing reaches the node from its primary, or everything does again.
    pub fn stall(&self, node: usize, stalled: bool) {
        let mut state = self.world.state();
        if let Some(node) = state.nodes.get_mut(node) {
            node.stalled = stalled;
        }
        state.ring();
    }

    /// How long a transaction takes to this node. `None`: [`Options::replication`].
    pub fn delay(&self, node: usize, delay: Option<Duration>) {
        let mut state = self.world.state();
        if let Some(node) = state.nodes.get_mut(node) {
            node.delay = delay;
        }
        state.ring();
    }

    /// Whom a node names.
    pub fn naming(&self, node: usize, naming: Naming) {
        if let Some(node) = self.world.state().nodes.get_mut(node) {
            node.naming = naming;
        }
    }

    /// How far behind a node says it is, whatever is true. Zero: the truth.
    pub fn lag(&self, node: usize, lag: Duration) {
        if let Some(node) = self.world.state().nodes.get_mut(node) {
            node.says_lag = Some(lag).filter(|lag| !lag.is_zero());
        }
    }

    /// Breaks the cluster on purpose, or mends it.
    pub fn bug(&self, bug: Option<Bug>) {
        self.world.state().bug = bug;
    }
}

/// Which of a node's sockets.
#[derive(Clone, Copy, Debug)]
enum Door {
    Proxy,
    Api,
    App,
}

/// A port that stays a node's own while its process is gone and nobody listens there.
#[derive(Debug)]
struct Port {
    address: SocketAddr,
    _kept: TcpSocket,
}

impl Port {
    fn new() -> std::io::Result<Self> {
        let kept = Self::bound((Ipv4Addr::LOCALHOST, 0).into())?;
        Ok(Self { address: kept.local_addr()?, _kept: kept })
    }

    fn bound(address: SocketAddr) -> std::io::Result<TcpSocket> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseport(true)?;
        socket.bind(address)?;
        Ok(socket)
    }

    fn listen(&self) -> std::io::Result<TcpListener> {
        Self::bound(self.address)?.listen(1024)
    }
}

async fn serve(world: Arc<World>, node: usize, port: Port, first: TcpListener, door: Door) {
    let mut listener = first;
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = died(&world, node) => None,
            accepted = listener.accept() => Some(accepted),
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Some(Ok((stream, _))) => {
                let world = Arc::clone(&world);
                connections.spawn(async move {
                    tokio::select! {
                        // Whatever else is ready: a dead process answers nothing.
                        biased;
                        () = died(&world, node) => {
                            // A reset, as from a killed process.
                        }
                        () = connection(&world, node, stream, door) => {}
                    }
                });
            }
            Some(Err(_)) => return,
            None => {
                drop(listener);
                lives(&world, node).await;
                let Ok(again) = port.listen() else { return };
                listener = again;
            }
        }
    }
}

/// Resolves when the node is alive.
async fn lives(world: &World, node: usize) {
    let mut changed = world.changed();
    while world.state().nodes.get(node).is_none_or(|node| !node.alive) {
        if changed.changed().await.is_err() {
            return;
        }
    }
}

/// Resolves when the node is dead.
async fn died(world: &World, node: usize) {
    let mut changed = world.changed();
    loop {
        if world.state().nodes.get(node).is_none_or(|node| !node.alive) {
            return;
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

/// Resolves when the node is not frozen.
async fn thawed(world: &World, node: usize) {
    let mut changed = world.changed();
    while world.state().nodes.get(node).is_some_and(|node| node.frozen) {
        if changed.changed().await.is_err() {
            return;
        }
    }
}

async fn connection(world: &World, node: usize, stream: TcpStream, door: Door) {
    let _ = stream.set_nodelay(true);
    let mut wire = wire::Wire::new(stream);
    while let Some(head) = wire.head().await {
        thawed(world, node).await;
        let goes_on = match door {
            Door::Proxy => proxy::proxy(world, node, &mut wire, &head).await,
            Door::Api => api::api(world, node, &mut wire, &head).await,
            Door::App => app::app(world, node, &mut wire, &head).await,
        };
        if !goes_on {
            return;
        }
    }
}

/// After a kill, the lease moves.
async fn lease(world: Arc<World>) {
    let mut changed = world.changed();
    loop {
        let due = world.state().killed_at.map(|at| at + world.options.lease);
        match due {
            Some(due) if !world.options.lease.is_zero() => {
                tokio::time::sleep_until(due).await;
                world.state().expire(Instant::now());
            }
            _ => {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Brings the replicas up to date also when nobody looks, so that those who wait are woken.
async fn replicate(world: Arc<World>) {
    let mut moved = world.moved();
    loop {
        let due = world.state().due();
        let due = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            changed = moved.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}
