//! The only place that wires: from a configuration to a process that serves.
//!
//! The control plane (discovery, admin, signals, reload) has a thread and a runtime of its own;
//! each data-plane worker has one too, with its own listening sockets. They meet in snapshots,
//! observations and commands.

use std::{
    cell::RefCell, io, net::SocketAddr, path::PathBuf, process::ExitCode, rc::Rc, sync::Arc,
    thread::JoinHandle, time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::LocalSet,
};

use crate::{
    admin::{self, Admin},
    config::{Config, listener::Listener},
    discovery::{self, Discovery},
    proxy::{Client, Hold, Parts, Proxy, Shared},
    server::{self, Accepting, Conn, Limits, Origin, Refusal, drain, listener},
    telemetry::{
        access_log::{AccessLog, Sink},
        metrics::Metrics,
    },
    topology,
};

mod reload;

/// How often a worker tidies up.
const TIDY: Duration = Duration::from_secs(1);
/// Commands that wait for a worker.
const COMMANDS: usize = 16;

/// A running litegate.
#[derive(Debug)]
pub struct Running {
    /// Where it listens, in the order of the configuration.
    pub listeners: Vec<SocketAddr>,
    /// Where its admin listener is.
    pub admin: Option<SocketAddr>,
    /// What it believes of each cluster.
    pub topologies: Vec<topology::watch::Reader>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    orders: mpsc::Sender<Order>,
    control: JoinHandle<Ended>,
}

/// What the control plane is told.
#[derive(Debug)]
enum Order {
    /// Use this configuration from now on.
    Reload(Box<Config>, tokio::sync::oneshot::Sender<Result<(), String>>),
    /// Open log files anew.
    Reopen,
    /// Leave, finishing what runs.
    Drain,
    /// Leave at once.
    Stop,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// Everything that ran was finished.
    Drained,
    /// Some of it was cut off.
    Cut,
}

impl Running {
    /// Uses another configuration, all or nothing.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn reload(&self, config: Config) -> Result<(), String> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        let order = Order::Reload(Box::new(config), answer);
        self.orders.send(order).await.map_err(|_| "litegate is stopping".to_owned())?;
        answered.await.unwrap_or_else(|_| Err("litegate is stopping".to_owned()))
    }

    /// Begins to leave: nothing new is taken, what runs is finished.
    pub fn drain(&self) {
        let _ = self.orders.try_send(Order::Drain);
    }

    /// Leaves at once.
    pub fn stop(&self) {
        let _ = self.orders.try_send(Order::Stop);
    }

    /// Waits for the end. Blocks the thread.
    pub fn join(self) -> Ended {
        let Self { orders, control, .. } = self;
        // Without anybody to give orders it would wait for ever.
        let ended = control.join().unwrap_or(Ended::Cut);
        drop(orders);
        ended
    }
}

/// Starts everything. Returns when every socket listens.
///
/// # Errors
/// A socket that can't be bound, a log that can't be opened, a thread that can't be started.
pub fn start(config: Config) -> io::Result<Running> {
    let metrics = Metrics::new();
    let mut sockets = Vec::new();
    let mut listeners = Vec::new();
    let workers = config.server.workers.get();
    for listener in &config.listeners {
        let bound = bind(listener.address, workers)?;
        listeners.push(address_of(&bound)?);
        sockets.push(bound);
    }
    let admin_socket = match config.admin.address {
        None => None,
        Some(address) => {
            let socket = std::net::TcpListener::bind(address)
                .map_err(|error| named(error, "admin.address", address))?;
            socket.set_nonblocking(true)?;
            Some(socket)
        }
    };
    let admin = admin_socket.as_ref().map(std::net::TcpListener::local_addr).transpose()?;
    let log = AccessLog::start(&config.access_log, Arc::clone(&metrics))?;
    let (orders, ordered) = mpsc::channel(COMMANDS);
    let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
    let counted = Arc::clone(&metrics);
    let control = std::thread::Builder::new().name("control".into()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = ready.send(Err(error));
                return Ended::Cut;
            }
        };
        runtime.block_on(async move {
            match Control::start(config, sockets, admin_socket, log, counted) {
                Err(error) => {
                    let _ = ready.send(Err(error));
                    Ended::Cut
                }
                Ok(mut control) => {
                    let readers = control.clusters.iter().map(|c| c.discovery.reader.clone());
                    let _ = ready.send(Ok(readers.collect()));
                    control.run(ordered).await
                }
            }
        })
    })?;
    let topologies =
        is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("the control plane died")))?;
    Ok(Running { listeners, admin, topologies, metrics, orders, control })
}

fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<std::net::TcpListener>> {
    listener::bind(address, workers).map_err(|error| named(error, "listener", address))
}

fn named(error: io::Error, what: &str, address: SocketAddr) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {address}: {error}"))
}

fn address_of(sockets: &[std::net::TcpListener]) -> io::Result<SocketAddr> {
    sockets
        .first()
        .map_or_else(|| Err(io::Error::other("no socket")), std::net::TcpListener::local_addr)
}

/// `litegate run`: starts, then serves until a signal says otherwise, reloading on SIGHUP and
/// when the file changes.
///
/// # Errors
/// Whatever kept it from starting.
pub fn run(path: PathBuf, config: Config) -> io::Result<ExitCode> {
    let running = start(config)?;
    for address in &running.listeners {
        tracing::info!(%address, "listening");
    }
    if let Some(address) = running.admin {
        tracing::info!(%address, "admin listening");
    }
    let orders = running.orders.clone();
    let metrics = Arc::clone(&running.metrics);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(reload::follow(path, orders, metrics, &running.control))?;
    Ok(match running.join() {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Cut => ExitCode::FAILURE,
    })
}

/// One cluster as the control plane keeps it.
struct Watched {
    config: crate::config::cluster::Cluster,
    discovery: Discovery,
    hold: Arc<Hold>,
}

/// The control plane.
struct Control {
    config: Arc<Config>,
    clusters: Vec<Watched>,
    workers: Vec<Worker>,
    /// Where each configured listener really is: port 0 is resolved once.
    metrics: Arc<Metrics>,
    log: Option<AccessLog>,
    admin: Arc<Admin>,
    instance: Arc<str>,
}

/// A data-plane thread, as the control plane sees it.
struct Worker {
    commands: mpsc::Sender<Command>,
    thread: Option<JoinHandle<()>>,
    done: watch::Receiver<bool>,
}

/// What a worker is told.
enum Command {
    /// Answer with this from now on.
    Use(Box<Outfit>),
    /// Listen here as well.
    Listen(usize, std::net::TcpListener),
    /// Take nothing new.
    Drain,
    /// End at once.
    Stop,
}

/// What a worker's proxy is made of, on its way to the worker's thread.
struct Outfit {
    config: Arc<Config>,
    clusters: Vec<Shared>,
    metrics: Arc<Metrics>,
    sink: Option<Sink>,
    instance: Arc<str>,
    worker: usize,
}

impl Outfit {
    fn wear(self) -> Proxy {
        let listeners: Vec<Arc<str>> =
            self.config.listeners.iter().map(|l| l.address.to_string().into()).collect();
        let clusters: Vec<_> =
            self.config.clusters.iter().map(|cluster| Arc::clone(&cluster.name)).collect();
        Proxy::new(Parts {
            shard: self.metrics.shard(self.worker, &listeners, &clusters),
            log: self.sink.map(Rc::new),
            config: self.config,
            clusters: self.clusters,
            instance: self.instance,
        })
    }
}

impl Control {
    fn start(
        config: Config,
        sockets: Vec<Vec<std::net::TcpListener>>,
        admin_socket: Option<std::net::TcpListener>,
        log: Option<AccessLog>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let config = Arc::new(config);
        let clusters: Vec<Watched> = config
            .clusters
            .iter()
            .map(|cluster| observe(cluster, None, Arc::clone(&metrics)))
            .collect();
        let admin = Arc::new(Admin::new(Arc::clone(&metrics), seen(&clusters), &config));
        if let Some(socket) = admin_socket {
            let listener = TcpListener::from_std(socket)?;
            tokio::spawn(admin::serve(listener, Arc::clone(&admin)));
        }
        // Random, so that two instances behind each other are told apart.
        let instance: Arc<str> = format!("litegate-{:08x}", fastrand::u32(..)).into();
        let mut control =
            Self { config, clusters, workers: Vec::new(), metrics, log, admin, instance };
        for index in 0..control.config.server.workers.get() {
            let outfit = control.outfit(index);
            let (commands, commanded) = mpsc::channel(COMMANDS);
            let (over, done) = watch::channel(false);
            let limits = limits(&control.config);
            let thread =
                std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                    work(outfit, limits, commanded);
                    over.send_replace(true);
                })?;
            control.workers.push(Worker { commands, thread: Some(thread), done });
        }
        for (index, sockets) in sockets.into_iter().enumerate() {
            control.listen(index, sockets);
        }
        Ok(control)
    }

    fn listen(&self, index: usize, sockets: Vec<std::net::TcpListener>) {
        for (worker, socket) in self.workers.iter().zip(sockets) {
            let _ = worker.commands.try_send(Command::Listen(index, socket));
        }
    }

    fn outfit(&self, worker: usize) -> Outfit {
        let shared = self.clusters.iter().map(|watched| Shared {
            topology: watched.discovery.reader.clone(),
            observer: watched.discovery.observer.clone(),
            hold: Arc::clone(&watched.hold),
        });
        Outfit {
            config: Arc::clone(&self.config),
            clusters: shared.collect(),
            metrics: Arc::clone(&self.metrics),
            sink: self.log.as_ref().and_then(AccessLog::sink),
            instance: Arc::clone(&self.instance),
            worker,
        }
    }

    async fn run(&mut self, mut orders: mpsc::Receiver<Order>) -> Ended {
        loop {
            match orders.recv().await {
                Some(Order::Reload(config, answer)) => {
                    let result = self.reload(*config);
                    self.metrics.reloaded(result.is_ok());
                    let _ = answer.send(result);
                }
                Some(Order::Reopen) => {
                    if let Some(log) = &self.log {
                        log.reopen();
                    }
                }
                Some(Order::Drain) => return self.drain(orders).await,
                Some(Order::Stop) | None => return self.stop(),
            }
        }
    }

    /// Applies another configuration, all or nothing.
    fn reload(&mut self, config: Config) -> Result<(), String> {
        if config.server.workers != self.config.server.workers {
            return Err("server.workers can't be changed without a restart".into());
        }
        if config.admin != self.config.admin {
            return Err("admin.address can't be changed without a restart".into());
        }
        if config.access_log != self.config.access_log {
            return Err("access_log can't be changed without a restart".into());
        }
        let addresses = |config: &Config| -> Vec<SocketAddr> {
            config.listeners.iter().map(|listener: &Listener| listener.address).collect()
        };
        let (old, new) = (addresses(&self.config), addresses(&config));
        if new.get(..old.len()) != Some(&old[..]) {
            return Err(
                "listeners can be added, but neither moved nor removed, without a restart".into()
            );
        }
        // Whatever can fail comes first.
        let mut sockets = Vec::new();
        for (index, address) in new.iter().enumerate().skip(old.len()) {
            let bound = bind(*address, self.workers.len()).map_err(|error| error.to_string())?;
            sockets.push((index, bound));
        }
        let mut before: Vec<Watched> = std::mem::take(&mut self.clusters);
        for cluster in &config.clusters {
            let same = before.iter().position(|watched| watched.config.name == cluster.name);
            let watched = match same.map(|index| before.swap_remove(index)) {
                Some(mut watched) if is_observed_alike(&watched.config, cluster) => {
                    watched.hold.reconfigure(&cluster.hold);
                    watched.config = cluster.clone();
                    watched
                }
                Some(mut watched) => {
                    let seed = Arc::clone(watched.discovery.reader.latest());
                    let next = observe(cluster, Some(&seed), Arc::clone(&self.metrics));
                    watched.hold.reconfigure(&cluster.hold);
                    Watched { hold: watched.hold, ..next }
                }
                None => observe(cluster, None, Arc::clone(&self.metrics)),
            };
            self.clusters.push(watched);
        }
        self.config = Arc::new(config);
        self.admin.update(seen(&self.clusters), &self.config);
        for (index, worker) in self.workers.iter().enumerate() {
            let _ = worker.commands.try_send(Command::Use(Box::new(self.outfit(index))));
        }
        for (index, sockets) in sockets {
            self.listen(index, sockets);
        }
        Ok(())
    }

    /// Readiness fails; after `drain.delay` nothing new is taken; what runs is finished within
    /// `drain.timeout`. A second order to leave ends it at once.
    async fn drain(&mut self, mut orders: mpsc::Receiver<Order>) -> Ended {
        self.admin.set_draining();
        let drain = self.config.server.drain;
        tracing::info!(delay = ?drain.delay, timeout = ?drain.timeout, "draining");
        let leave = async {
            tokio::time::sleep(drain.delay).await;
            for worker in &self.workers {
                let _ = worker.commands.send(Command::Drain).await;
            }
            let all = async {
                for worker in &self.workers {
                    let _ = worker.done.clone().wait_for(|done| *done).await;
                }
            };
            tokio::time::timeout(drain.timeout, all).await.is_ok()
        };
        let impatient = async {
            loop {
                match orders.recv().await {
                    Some(Order::Drain | Order::Stop) | None => return,
                    Some(_) => {}
                }
            }
        };
        let finished = tokio::select! {
            finished = leave => finished,
            () = impatient => false,
        };
        if finished {
            self.join();
            tracing::info!("drained");
            Ended::Drained
        } else {
            tracing::warn!("left before everything was finished");
            self.stop();
            Ended::Cut
        }
    }

    fn stop(&mut self) -> Ended {
        for worker in &self.workers {
            let _ = worker.commands.try_send(Command::Stop);
        }
        self.join();
        Ended::Cut
    }

    fn join(&mut self) {
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

/// Whether discovery sees the same by either configuration.
fn is_observed_alike(
    a: &crate::config::cluster::Cluster,
    b: &crate::config::cluster::Cluster,
) -> bool {
    a.port == b.port
        && a.members == b.members
        && a.primary == b.primary
        && a.health == b.health
        && a.max_lag == b.max_lag
        && a.soft_lag == b.soft_lag
        && a.prefer == b.prefer
}

fn observe(
    cluster: &crate::config::cluster::Cluster,
    seed: Option<&topology::Topology>,
    metrics: Arc<Metrics>,
) -> Watched {
    let hostname = std::env::var("HOSTNAME").ok().map(Arc::from);
    let name = Arc::clone(&cluster.name);
    let counted = move |change: &topology::Change| metrics.changed(&name, change);
    Watched {
        config: cluster.clone(),
        discovery: discovery::start(cluster, seed, hostname, counted),
        hold: Hold::new(&cluster.hold),
    }
}

fn seen(clusters: &[Watched]) -> Vec<(Arc<str>, topology::watch::Reader)> {
    let each =
        |watched: &Watched| (Arc::clone(&watched.config.name), watched.discovery.reader.clone());
    clusters.iter().map(each).collect()
}

/// A worker's share of the limits.
fn limits(config: &Config) -> Limits {
    let limits = config.limits;
    Limits {
        header_bytes: limits.header_bytes,
        headers: limits.headers,
        header_read: limits.header_read,
        idle: limits.idle,
        body_idle: limits.body_idle,
        connections: (limits.connections / config.server.workers.get()).max(1),
    }
}

/// A data-plane worker: one thread, one runtime, until told to end.
fn work(outfit: Outfit, limits: Limits, mut commands: mpsc::Receiver<Command>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "a worker can't start");
            return;
        }
    };
    let local = LocalSet::new();
    local.block_on(&runtime, async move {
        let gate = Rc::new(Gate { proxy: RefCell::new(Rc::new(outfit.wear())) });
        let (trigger, watch) = drain::signal();
        let accepting = Accepting::new(limits, watch);
        let mut accepts = tokio::task::JoinSet::new();
        let mut tidy = tokio::time::interval(TIDY);
        loop {
            let command = tokio::select! {
                command = commands.recv() => command,
                _ = tidy.tick() => {
                    gate.current().tidy();
                    continue;
                }
            };
            match command {
                Some(Command::Use(outfit)) => {
                    accepting.set_limits(self::limits(&outfit.config));
                    *gate.proxy.borrow_mut() = Rc::new(outfit.wear());
                }
                Some(Command::Listen(index, socket)) => match TcpListener::from_std(socket) {
                    Ok(socket) => {
                        let (gate, accepting) = (Rc::clone(&gate), accepting.clone());
                        accepts.spawn_local(server::serve(
                            socket,
                            index,
                            gate,
                            accepting,
                            std::future::pending(),
                        ));
                    }
                    Err(error) => tracing::error!(%error, "a socket can't be used"),
                },
                Some(Command::Drain) => {
                    trigger.start();
                    while accepts.join_next().await.is_some() {}
                    let mut finished = std::pin::pin!(accepting.finished());
                    loop {
                        tokio::select! {
                            () = &mut finished => break,
                            _ = tidy.tick() => gate.current().tidy(),
                            command = commands.recv() => {
                                if matches!(command, Some(Command::Stop) | None) {
                                    break;
                                }
                            }
                        }
                    }
                    gate.current().tidy();
                    return;
                }
                Some(Command::Stop) | None => return,
            }
        }
    });
}

/// What connections are served with: the proxy of the configuration that holds now.
struct Gate {
    proxy: RefCell<Rc<Proxy>>,
}

impl Gate {
    fn current(&self) -> Rc<Proxy> {
        Rc::clone(&self.proxy.borrow())
    }
}

impl server::Service for Gate {
    type Body = crate::proxy::ResponseBody;
    type Client = Client;

    fn opened(&self, origin: Origin) -> Client {
        self.current().client(origin)
    }

    async fn call(
        &self,
        client: &Rc<Client>,
        conn: &Rc<Conn>,
        request: Request<Incoming>,
    ) -> Response<Self::Body> {
        // A reload does not change the rules in the middle of a request.
        let proxy = self.current();
        proxy.call(client, conn, request).await
    }

    fn refused(&self, client: &Client, refusal: &Refusal<'_>) -> Bytes {
        self.current().refused(client, refusal)
    }
}
