//! A whole fake LiteFS cluster in one process, over real sockets. `demo` runs it and the tests
//! use it. It imports nothing of litegate, so that it can't share its mistakes; what it claims of
//! LiteFS is proved against the real one in `tests/e2e`.
//!
//! Each node has LiteFS's proxy in front of a small app, and LiteFS's API. Everything ends when
//! the [`Cluster`] is dropped.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::Instant,
};

mod app;
pub mod client;
mod wire;

/// How a fake cluster behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: usize,
    /// How long a transaction takes to a replica.
    pub replication: Duration,
    /// How long after a kill another node takes over. Zero: never by itself.
    pub lease: Duration,
    /// How long a replica keeps a write waiting when it knows no primary.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            replication: Duration::from_millis(5),
            lease: Duration::ZERO,
            patience: Duration::from_millis(500),
        }
    }
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
    /// Rung at every change of roles and every transaction.
    changed: watch::Sender<u64>,
    served: Vec<AtomicU64>,
}

#[derive(Debug)]
struct State {
    primary: Option<usize>,
    nodes: Vec<NodeState>,
    /// Who ran what.
    ledger: BTreeMap<String, Written>,
    /// Transactions, oldest first: the id, and when it was committed.
    log: Vec<(String, Instant)>,
    killed_at: Option<Instant>,
}

#[derive(Clone, Debug)]
struct NodeState {
    alive: bool,
    frozen: bool,
    incarnation: u64,
    naming: Naming,
    /// How far behind it says it is.
    lag: Duration,
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        self.changed.send_modify(|n| *n += 1);
    }

    fn name(node: usize) -> String {
        format!("app-{node}")
    }
}

impl Cluster {
    /// Starts it on 127.0.0.1; node 0 is primary. Call within a runtime.
    pub async fn start(options: Options) -> std::io::Result<Self> {
        let node = NodeState {
            alive: true,
            frozen: false,
            incarnation: 0,
            naming: Naming::Primary,
            lag: Duration::ZERO,
        };
        let nodes =
            (0..options.nodes).map(|n| NodeState { incarnation: n as u64 + 1, ..node.clone() });
        let world = Arc::new(World {
            options,
            state: Mutex::new(State {
                primary: Some(0),
                nodes: nodes.collect(),
                ledger: BTreeMap::new(),
                log: Vec::new(),
                killed_at: None,
            }),
            changed: watch::channel(0).0,
            served: (0..options.nodes).map(|_| AtomicU64::new(0)).collect(),
        });
        let mut tasks = JoinSet::new();
        let mut places = Vec::new();
        for node in 0..options.nodes {
            let (proxy, api) =
                (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
            let (name, proxy_at, api_at) =
                (World::name(node), proxy.local_addr()?, api.local_addr()?);
            places.push(Place { name, proxy: proxy_at, api: api_at });
            tasks.spawn(serve(Arc::clone(&world), node, proxy, Door::Proxy));
            tasks.spawn(serve(Arc::clone(&world), node, api, Door::Api));
        }
        tasks.spawn(lease(Arc::clone(&world)));
        Ok(Self { world, places, _tasks: tasks })
    }

    /// A cluster of nobody, to put in the place of one that is taken out of something.
    pub fn empty() -> Self {
        let world = World {
            options: Options::default(),
            state: Mutex::new(State {
                primary: None,
                nodes: Vec::new(),
                ledger: BTreeMap::new(),
                log: Vec::new(),
                killed_at: None,
            }),
            changed: watch::channel(0).0,
            served: Vec::new(),
        };
        Self { world: Arc::new(world), places: Vec::new(), _tasks: JoinSet::new() }
    }

    /// Where the nodes are.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Who is primary.
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

    /// Everything that was written.
    pub fn ledger(&self) -> BTreeMap<String, Written> {
        self.world.state().ledger.clone()
    }

    /// What happened to one id.
    pub fn written(&self, id: &str) -> Written {
        self.world.state().ledger.get(id).cloned().unwrap_or_default()
    }

    /// Hands the role over, or gives it to a node where nobody has it.
    pub fn promote(&self, node: usize) {
        let mut state = self.world.state();
        state.primary = Some(node);
        state.killed_at = None;
        drop(state);
        self.world.ring();
    }

    /// Nobody is primary now.
    pub fn step_down(&self) {
        self.world.state().primary = None;
        self.world.ring();
    }

    /// The node's process is gone: connections break, new ones are refused as far as one process
    /// can (they are closed at once).
    pub fn kill(&self, node: usize) {
        let mut state = self.world.state();
        if let Some(dead) = state.nodes.get_mut(node) {
            dead.alive = false;
        }
        if state.primary == Some(node) {
            state.primary = None;
            state.killed_at = Some(Instant::now());
        }
        drop(state);
        self.world.ring();
    }

    /// The node's process is there again, another one.
    pub fn restart(&self, node: usize) {
        if let Some(dead) = self.world.state().nodes.get_mut(node) {
            dead.alive = true;
            dead.incarnation += 100;
        }
        self.world.ring();
    }

    /// The node accepts and answers nothing, or goes on.
    pub fn freeze(&self, node: usize, frozen: bool) {
        if let Some(node) = self.world.state().nodes.get_mut(node) {
            node.frozen = frozen;
        }
        self.world.ring();
    }

    /// Whom a node names.
    pub fn naming(&self, node: usize, naming: Naming) {
        if let Some(node) = self.world.state().nodes.get_mut(node) {
            node.naming = naming;
        }
    }

    /// How far behind a node says it is.
    pub fn lag(&self, node: usize, lag: Duration) {
        if let Some(node) = self.world.state().nodes.get_mut(node) {
            node.lag = lag;
        }
    }
}

/// Which of a node's sockets.
#[derive(Clone, Copy, Debug)]
enum Door {
    Proxy,
    Api,
}

async fn serve(world: Arc<World>, node: usize, listener: TcpListener, door: Door) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { return };
        while connections.try_join_next().is_some() {}
        let world = Arc::clone(&world);
        connections.spawn(async move {
            let dies = died(Arc::clone(&world), node);
            tokio::select! {
                // Whatever else is ready: a dead process answers nothing.
                biased;
                () = dies => {
                    // A reset, as from a killed process.
                }
                () = connection(world, node, stream, door) => {}
            }
        });
    }
}

/// Resolves when the node is dead.
async fn died(world: Arc<World>, node: usize) {
    let mut changed = world.changed.subscribe();
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
    let mut changed = world.changed.subscribe();
    while world.state().nodes.get(node).is_some_and(|node| node.frozen) {
        if changed.changed().await.is_err() {
            return;
        }
    }
}

async fn connection(world: Arc<World>, node: usize, stream: TcpStream, door: Door) {
    let _ = stream.set_nodelay(true);
    let mut wire = wire::Wire::new(stream);
    while let Some(head) = wire.head().await {
        thawed(&world, node).await;
        let goes_on = match door {
            Door::Proxy => app::proxy(&world, node, &mut wire, &head).await,
            Door::Api => app::api(&world, node, &mut wire, &head).await,
        };
        if !goes_on {
            return;
        }
    }
}

/// After a kill, the lease moves.
async fn lease(world: Arc<World>) {
    let mut changed = world.changed.subscribe();
    loop {
        let due = world.state().killed_at.map(|at| at + world.options.lease);
        match due {
            Some(due) if !world.options.lease.is_zero() => {
                tokio::time::sleep_until(due).await;
                let mut state = world.state();
                if state.primary.is_none() && state.killed_at.take().is_some() {
                    state.primary = state.nodes.iter().position(|node| node.alive);
                }
                drop(state);
                world.ring();
            }
            _ => {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}
