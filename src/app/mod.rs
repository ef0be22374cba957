//! The only place that wires: from a configuration to a process that serves.
//!
//! The control plane (discovery, admin, signals, reload) has a thread and a runtime of its own;
//! each data-plane worker has one too, with its own listening sockets. They meet in snapshots,
//! observations and commands.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    thread::JoinHandle,
};

use rustls::pki_types::ServerName;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
};

#[cfg(feature = "http3")]
use crate::server::h3;
use crate::{
    admin::{self, Admin},
    config::{
        self, Config,
        listener::{ClientAuth, Listener},
    },
    discovery::{self, Discovery},
    net::{
        self,
        pem::{FileError, Look},
    },
    proxy::{self, Clients, Hold, LastWrites, Shared},
    server::{
        listener,
        tls::{Files, Need, Tls},
    },
    telemetry::{
        access_log::AccessLog,
        metrics::{Metrics, Standing},
    },
    topology,
};
pub use look::{Found, knock, look};
use pause::{Agreement, Workers};
pub use together::{Instances, Wish, hand_over};
use worker::{Command, Outfit, work};

mod handoff;
#[cfg(feature = "acme")]
mod keepers;
mod look;
mod pause;
mod reload;
mod together;
mod worker;

/// How often certificate files are looked at. They are asked for by name rather than watched: that
/// works on every file system, and for whatever their directories and symlinks do.
const CERTIFICATES: std::time::Duration = std::time::Duration::from_secs(1);

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

/// Where a configuration's sockets really are: port 0 is resolved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Addresses {
    /// The listeners, in the order of the configuration.
    pub listeners: Vec<SocketAddr>,
    /// The admin listener.
    pub admin: Option<SocketAddr>,
}

/// What the control plane is told.
#[derive(Debug)]
enum Order {
    /// Use this configuration from now on.
    Reload(Box<Config>, oneshot::Sender<Result<Addresses, String>>),
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
    /// Uses another configuration, all or nothing. Returns where it listens now.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn reload(&self, config: Config) -> Result<Addresses, String> {
        let (answer, answered) = oneshot::channel();
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
    let nodes: Vec<_> = config.clusters.iter().map(open_nodes).collect::<Result<_, _>>()?;
    let mut tls = Vec::new();
    for listener in &config.listeners {
        tls.push(open_tls(listener.tls.as_ref().map(|tls| files(listener, tls)))?);
        let bound = bind(listener, workers)?;
        listeners.push(address_of(&bound.tcp)?);
        sockets.push(bound);
    }
    let admin_socket = match config.admin.address {
        None => None,
        Some(address) => Some(bind_admin(address, None)?),
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
            match Control::start(config, sockets, tls, nodes, admin_socket, log, counted).await {
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

/// Reads the files that the configuration names.
///
/// # Errors
/// What is wrong with the first that is wrong.
pub fn read_files(config: &Config) -> io::Result<()> {
    for listener in &config.listeners {
        open_tls(listener.tls.as_ref().map(|tls| files(listener, tls)))?;
    }
    for cluster in &config.clusters {
        open_nodes(cluster)?;
    }
    Ok(())
}

/// The files of TLS to a cluster's nodes, and how they are used.
fn files_of_nodes(cluster: &config::cluster::Cluster) -> Option<net::tls::Files> {
    let tls = cluster.upstream.tls.as_ref()?;
    let name = cluster.server_name();
    Some(net::tls::Files {
        cluster: Arc::clone(&cluster.name),
        authorities: tls.ca.clone(),
        // The loader has seen that it is one.
        name: name.and_then(|name| ServerName::try_from(name.to_owned()).ok()),
        own: tls.own.as_ref().map(|own| (own.certificate.clone(), own.key.clone())),
        unverified: tls.insecure_skip_verify,
    })
}

fn open_nodes(cluster: &config::cluster::Cluster) -> Result<Option<Arc<net::tls::Tls>>, FileError> {
    files_of_nodes(cluster).map(|files| net::tls::Tls::load(files).map(Arc::new)).transpose()
}

/// The files of a listener's TLS, and how they are used.
fn files(listener: &Listener, tls: &config::listener::Tls) -> Files {
    let need = match tls.client_auth {
        ClientAuth::Off => None,
        ClientAuth::Optional => Some(Need::Optional),
        ClientAuth::Required => Some(Need::Required),
    };
    let pairs = tls.certificates.iter().map(|pair| (pair.certificate.clone(), pair.key.clone()));
    let h2 = listener.protocols.h2.then_some(&b"h2"[..]);
    Files {
        certificates: pairs.collect(),
        obtained: tls.acme.as_ref().map(config::listener::Acme::certificate),
        clients: tls.client_ca.clone().zip(need),
        protocols: h2
            .into_iter()
            .chain(listener.protocols.http1.then_some(&b"http/1.1"[..]))
            .collect(),
    }
}

fn open_tls(files: Option<Files>) -> Result<Option<Arc<Tls>>, FileError> {
    files.map(|files| Tls::load(files).map(Arc::new)).transpose()
}

/// A listener's sockets, one of each kind for each worker.
#[derive(Default)]
struct Sockets {
    tcp: Vec<std::net::TcpListener>,
    /// Where HTTP/3 is spoken.
    udp: Vec<std::net::UdpSocket>,
}

fn bind(listener: &Listener, workers: usize) -> io::Result<Sockets> {
    // Any port that is free on TCP may be taken on UDP.
    let tries = if listener.address.port() == 0 { 8 } else { 1 };
    let mut last = None;
    for _ in 0..tries {
        let tcp = listener::bind(listener.address, workers)
            .map_err(|error| named(error, "listener", listener.address))?;
        let address = address_of(&tcp)?;
        match bind_udp(listener, address, workers) {
            Ok(udp) => return Ok(Sockets { tcp, udp }),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::other("no socket")))
}

/// The UDP sockets of a listener that is at this address.
fn bind_udp(
    listener: &Listener,
    address: SocketAddr,
    workers: usize,
) -> io::Result<Vec<std::net::UdpSocket>> {
    if listener.http3.is_none() {
        return Ok(Vec::new());
    }
    listener::bind_udp(address, workers).map_err(|error| named(error, "listener on UDP", address))
}

/// Binds the admin listener: to an address that nobody else has, except for ours (`beside`), which
/// it is about to replace.
fn bind_admin(
    address: SocketAddr,
    beside: Option<SocketAddr>,
) -> io::Result<std::net::TcpListener> {
    let replaces = beside.is_some_and(|ours| ours.port() == address.port());
    listener::bind_alone(address, replaces).map_err(|error| named(error, "admin.address", address))
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
    let running = start(config.clone())?;
    for address in &running.listeners {
        tracing::info!(%address, "listening");
    }
    if let Some(address) = running.admin {
        tracing::info!(%address, "admin listening");
    }
    let orders = running.orders.clone();
    let metrics = Arc::clone(&running.metrics);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(reload::follow(path, config, orders, metrics, &running.control))?;
    Ok(match running.join() {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Cut => ExitCode::FAILURE,
    })
}

/// One cluster as the control plane keeps it.
struct Watched {
    config: config::cluster::Cluster,
    discovery: Discovery,
    hold: Arc<Hold>,
    /// On a pause of it, with whoever else holds.
    agreement: Agreement,
    last_writes: Arc<LastWrites>,
    tls: Option<Arc<net::tls::Tls>>,
}

/// The control plane.
struct Control {
    config: Arc<Config>,
    clusters: Vec<Watched>,
    clients: Arc<Clients>,
    workers: Vec<Worker>,
    /// Every listener there ever was, as last configured. A place here is a listener's number:
    /// connections that outlive their listener keep theirs, and one that comes back gets its own.
    listeners: Vec<Opened>,
    #[cfg(feature = "acme")]
    keepers: Vec<keepers::Keeper>,
    metrics: Arc<Metrics>,
    log: Option<AccessLog>,
    /// Access logs that are no longer written to, but by requests that began before a reload.
    former_logs: Vec<AccessLog>,
    admin: Arc<Admin>,
    confirmed: mpsc::Receiver<admin::Confirmed>,
    asked: mpsc::Receiver<admin::Asked>,
    admin_socket: Option<AdminSocket>,
    instance: Arc<str>,
}

/// A listener that is, or was, open.
struct Opened {
    config: Listener,
    tls: Option<Arc<Tls>>,
    /// Where it really is. `None`: it was closed.
    bound: Option<SocketAddr>,
    /// It is open on UDP too.
    udp: bool,
}

/// The admin listener, until dropped.
struct AdminSocket {
    bound: SocketAddr,
    _open: watch::Sender<()>,
}

/// Whether something is replaced.
enum Swap<T> {
    Keep,
    For(T),
}

/// What a reload would change of the sockets: bound already, used by nobody yet.
struct Prepared {
    /// For each configured listener, its number.
    numbers: Vec<usize>,
    /// The sockets of those that are not open yet.
    sockets: Vec<(usize, SocketAddr, Sockets)>,
    /// For each configured listener, its TLS.
    tls: Vec<Option<Arc<Tls>>>,
    /// For each configured cluster, TLS to its nodes.
    nodes: Vec<Option<Arc<net::tls::Tls>>>,
    /// Where the admin listener moves.
    admin: Swap<Option<std::net::TcpListener>>,
    /// The new access log.
    log: Swap<Option<AccessLog>>,
}

/// A data-plane thread, as the control plane sees it.
struct Worker {
    commands: mpsc::Sender<Command>,
    thread: Option<JoinHandle<()>>,
    done: watch::Receiver<bool>,
}

impl Control {
    async fn start(
        config: Config,
        sockets: Vec<Sockets>,
        tls: Vec<Option<Arc<Tls>>>,
        nodes: Vec<Option<Arc<net::tls::Tls>>>,
        admin_socket: Option<std::net::TcpListener>,
        log: Option<AccessLog>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let config = Arc::new(config);
        let clusters: Vec<Watched> = config
            .clusters
            .iter()
            .zip(nodes)
            .map(|(cluster, tls)| observe(cluster, tls, Arc::clone(&metrics)))
            .collect();
        metrics.ask(standings(&clusters));
        let (confirm, confirmed) = mpsc::channel(COMMANDS);
        let (ask, asked) = mpsc::channel(COMMANDS);
        let admin = Admin::new(Arc::clone(&metrics), seen(&clusters), &config, confirm, ask);
        let admin = Arc::new(admin);
        let opened =
            config.listeners.iter().zip(&sockets).zip(tls).map(|((listener, sockets), tls)| {
                let (bound, udp) = (Some(address_of(&sockets.tcp)?), !sockets.udp.is_empty());
                Ok(Opened { config: listener.clone(), tls, bound, udp })
            });
        let mut control = Self {
            listeners: opened.collect::<io::Result<_>>()?,
            clients: Arc::new(Clients::new(&config.limits.client, None)),
            #[cfg(feature = "acme")]
            keepers: Vec::new(),
            config,
            clusters,
            workers: Vec::new(),
            metrics,
            log,
            former_logs: Vec::new(),
            admin,
            confirmed,
            asked,
            admin_socket: None,
            // Random, so that two instances behind each other are told apart.
            instance: format!("litegate-{:08x}", fastrand::u32(..)).into(),
        };
        control.open_admin(admin_socket)?;
        control.tell_expiries();
        for index in 0..control.config.server.workers.get() {
            let outfit = control.outfit(index);
            let (commands, commanded) = mpsc::channel(COMMANDS);
            let (over, done) = watch::channel(false);
            let limits = proxy::limits(&control.config);
            let thread =
                std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                    work(outfit, limits, commanded);
                    over.send_replace(true);
                })?;
            control.workers.push(Worker { commands, thread: Some(thread), done });
        }
        for (number, sockets) in sockets.into_iter().enumerate() {
            control.listen(number, sockets).await;
        }
        #[cfg(feature = "acme")]
        keepers::tend(&mut control.keepers, &control.listeners, &control.metrics);
        Ok(control)
    }

    /// A worker that has ended hears nothing, and need not.
    async fn listen(&self, number: usize, sockets: Sockets) {
        for (worker, socket) in self.workers.iter().zip(sockets.tcp) {
            let _ = worker.commands.send(Command::Listen(number, socket)).await;
        }
        #[cfg(feature = "http3")]
        let (post, workers) = (h3::Post::new(self.workers.len()), self.workers.len());
        #[cfg(feature = "http3")]
        for ((index, worker), socket) in self.workers.iter().enumerate().zip(sockets.udp) {
            let post = Arc::clone(&post);
            let socket = h3::Socket { socket, worker: index, workers, post };
            let _ = worker.commands.send(Command::ListenQuic(number, socket)).await;
        }
    }

    /// Serves the admin listener there from now on, and no longer where it was.
    fn open_admin(&mut self, socket: Option<std::net::TcpListener>) -> io::Result<()> {
        self.admin_socket = match socket {
            None => None,
            Some(socket) => {
                let bound = socket.local_addr()?;
                let listener = TcpListener::from_std(socket)?;
                let (open, is_open) = watch::channel(());
                tokio::spawn(admin::serve(listener, Arc::clone(&self.admin), is_open));
                Some(AdminSocket { bound, _open: open })
            }
        };
        Ok(())
    }

    /// This process first, by its own admin listener, and those that the configuration says write
    /// as well.
    fn instances(&self) -> Instances {
        let own = self.admin_socket.as_ref().map(|socket| {
            let (ip, port) = (socket.bound.ip(), socket.bound.port());
            let ip = match ip {
                IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                ip => ip,
            };
            SocketAddr::new(ip, port).to_string()
        });
        Instances {
            admins: own.into_iter().collect(),
            services: self.config.admin.peers.iter().map(ToString::to_string).collect(),
        }
    }

    fn outfit(&self, worker: usize) -> Outfit {
        let shared = self.clusters.iter().map(|watched| Shared {
            topology: watched.discovery.reader.clone(),
            observer: watched.discovery.observer.clone(),
            hold: Arc::clone(&watched.hold),
            last_writes: Arc::clone(&watched.last_writes),
            tls: watched.tls.clone(),
        });
        Outfit {
            config: Arc::clone(&self.config),
            listeners: self
                .listeners
                .iter()
                .map(|opened| (opened.config.clone(), opened.tls.clone()))
                .collect(),
            clusters: shared.collect(),
            clients: Arc::clone(&self.clients),
            metrics: Arc::clone(&self.metrics),
            sink: self.log.as_ref().and_then(AccessLog::sink),
            instance: Arc::clone(&self.instance),
            worker,
        }
    }

    async fn run(&mut self, mut orders: mpsc::Receiver<Order>) -> Ended {
        let mut look = tokio::time::interval(CERTIFICATES);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let order = tokio::select! {
                order = orders.recv() => order,
                Some(confirmed) = self.confirmed.recv() => {
                    self.confirm(confirmed);
                    continue;
                }
                Some(asked) = self.asked.recv() => match asked {
                    admin::Asked::Drain => return self.drain(orders, true).await,
                    asked => {
                        let here = (&*self.workers, &self.instance);
                        handed(&self.clusters, here, Some(self.instances()), asked);
                        continue;
                    }
                },
                _ = look.tick() => {
                    self.look_at_certificates();
                    continue;
                }
            };
            match order {
                Some(Order::Reload(config, answer)) => {
                    let result = self.reload(*config).await;
                    self.metrics.reloaded(result.is_ok());
                    let _ = answer.send(result);
                }
                Some(Order::Reopen) => {
                    if let Some(log) = &self.log {
                        log.reopen();
                    }
                }
                Some(Order::Drain) => return self.drain(orders, false).await,
                Some(Order::Stop) | None => return self.stop().await,
            }
        }
    }

    /// Tells discovery what an operator said.
    fn confirm(&self, confirmed: admin::Confirmed) {
        let admin::Confirmed { cluster, node } = confirmed;
        tracing::warn!(%cluster, %node, "an operator confirms the primary, whatever it lacks");
        if let Some(watched) = self.clusters.iter().find(|w| w.config.name == cluster) {
            let saw = topology::Saw::Confirmed(node);
            watched.discovery.observer.observe(saw, topology::Source::Operator);
        }
    }

    /// Takes changed certificates into use. Those that are wrong leave the former in force.
    fn look_at_certificates(&mut self) {
        for opened in self.listeners.iter().filter(|opened| opened.bound.is_some()) {
            let Some(tls) = &opened.tls else { continue };
            let address = opened.config.address;
            match tls.look() {
                Look::Same => continue,
                Look::Renewed => {
                    self.metrics.renewed(&address.to_string(), true);
                    tracing::info!(%address, "certificates reloaded");
                }
                Look::Refused(error) => {
                    self.metrics.renewed(&address.to_string(), false);
                    tracing::error!(%address, %error, "certificates refused, the former stay");
                }
            }
            self.tell_expiries();
        }
        for watched in &self.clusters {
            let Some(tls) = &watched.tls else { continue };
            let cluster = &*watched.config.name;
            match tls.look() {
                Look::Same => continue,
                Look::Renewed => {
                    self.metrics.renewed_to_nodes(cluster, true);
                    tracing::info!(cluster, "certificates for nodes reloaded");
                }
                Look::Refused(error) => {
                    self.metrics.renewed_to_nodes(cluster, false);
                    tracing::error!(
                        cluster, %error,
                        "certificates for nodes refused, the former stay",
                    );
                }
            }
            self.tell_expiries();
        }
    }

    /// Tells the scrape which certificates are in force.
    fn tell_expiries(&self) {
        let open = self.listeners.iter().filter(|opened| opened.bound.is_some());
        let all = open.filter_map(|opened| Some((&opened.config, opened.tls.as_ref()?)));
        let all = all.flat_map(|(config, tls)| {
            let listener: Arc<str> = config.address.to_string().into();
            let each = tls.expiries().into_iter();
            each.map(move |(path, at)| (Arc::clone(&listener), path.display().to_string(), at))
        });
        self.metrics.certificates(all.collect());
        let all = self.clusters.iter().filter_map(|watched| {
            let tls = watched.tls.as_ref()?;
            let expiry = tls.expiry().map(|(path, at)| (path.display().to_string(), at));
            Some((Arc::clone(&watched.config.name), expiry))
        });
        self.metrics.certificates_to_nodes(all.collect());
    }

    /// Whatever of a reload can fail. Nothing has changed when it does.
    fn prepare(&self, config: &Config) -> Result<Prepared, String> {
        if config.server.workers != self.config.server.workers {
            return Err("server.workers can't be changed without a restart".into());
        }
        let (mut numbers, mut sockets, mut tls) = (Vec::new(), Vec::new(), Vec::new());
        let mut fresh = 0;
        for listener in &config.listeners {
            let known = self.listeners.iter().position(|o| o.config.address == listener.address);
            let number = known.unwrap_or_else(|| {
                fresh += 1;
                self.listeners.len() + fresh - 1
            });
            let open = self.listeners.get(number);
            let open = open.and_then(|opened| Some((opened.bound?, opened.udp)));
            let wanted = match open {
                None => bind(listener, self.workers.len())
                    .and_then(|sockets| Ok(Some((address_of(&sockets.tcp)?, sockets)))),
                Some((address, false)) => bind_udp(listener, address, self.workers.len())
                    .map(|udp| Some((address, Sockets { tcp: Vec::new(), udp }))),
                Some((_, true)) => Ok(None),
            };
            if let Some((address, wanted)) = wanted.map_err(|error| error.to_string())? {
                sockets.push((number, address, wanted));
            }
            numbers.push(number);
            // The same files stay as they are: whether they have changed is looked at all the time.
            let files = listener.tls.as_ref().map(|tls| files(listener, tls));
            let known = self.listeners.get(number).and_then(|opened| opened.tls.as_ref());
            tls.push(match (files, known) {
                (Some(files), Some(known)) if *known.files() == files => Some(Arc::clone(known)),
                (files, _) => open_tls(files).map_err(|error| error.to_string())?,
            });
        }
        let mut nodes = Vec::new();
        for cluster in &config.clusters {
            let known = self.clusters.iter().find(|w| w.config.name == cluster.name);
            let known = known.and_then(|watched| watched.tls.as_ref());
            nodes.push(match (files_of_nodes(cluster), known) {
                (Some(files), Some(known)) if *known.files() == files => Some(Arc::clone(known)),
                _ => open_nodes(cluster).map_err(|error| error.to_string())?,
            });
        }
        let admin = if config.admin.address == self.config.admin.address {
            Swap::Keep
        } else {
            let ours = self.admin_socket.as_ref().map(|socket| socket.bound);
            let moved = config.admin.address.map(|address| bind_admin(address, ours)).transpose();
            Swap::For(moved.map_err(|error| error.to_string())?)
        };
        let log = if config.access_log == self.config.access_log {
            Swap::Keep
        } else {
            let log = AccessLog::start(&config.access_log, Arc::clone(&self.metrics));
            Swap::For(log.map_err(|error| format!("access_log: {error}"))?)
        };
        Ok(Prepared { numbers, sockets, tls, nodes, admin, log })
    }

    /// Applies another configuration, all or nothing.
    async fn reload(&mut self, config: Config) -> Result<Addresses, String> {
        let Prepared { numbers, sockets, tls, nodes, admin, log } = self.prepare(&config)?;
        if let Swap::For(socket) = admin {
            self.open_admin(socket).map_err(|error| error.to_string())?;
        }
        let mut before: Vec<Watched> = std::mem::take(&mut self.clusters);
        for (cluster, tls) in config.clusters.iter().zip(nodes) {
            let same = before.iter().position(|watched| watched.config.name == cluster.name);
            let watched = match same.map(|index| before.swap_remove(index)) {
                Some(mut watched) => {
                    if !is_observed_alike(&watched.config, cluster) {
                        watched.discovery.reconfigure(cluster, tls.clone()).await;
                    }
                    watched.hold.reconfigure(&cluster.hold);
                    watched.config = cluster.clone();
                    watched.tls = tls;
                    watched
                }
                None => observe(cluster, tls, Arc::clone(&self.metrics)),
            };
            self.clusters.push(watched);
        }
        if let Swap::For(log) = log
            && let Some(mut former) = std::mem::replace(&mut self.log, log)
        {
            former.retire();
            self.former_logs.push(former);
        }
        self.former_logs.retain(|log| !log.has_ended());
        for ((listener, number), tls) in config.listeners.iter().zip(&numbers).zip(tls) {
            let config = listener.clone();
            match self.listeners.get_mut(*number) {
                Some(opened) => (opened.config, opened.tls) = (config, tls),
                None => self.listeners.push(Opened { config, tls, bound: None, udp: false }),
            }
        }
        self.clients = Arc::new(Clients::new(&config.limits.client, Some(&self.clients)));
        self.config = Arc::new(config);
        self.metrics.ask(standings(&self.clusters));
        self.admin.update(seen(&self.clusters), &self.config);
        self.tell_expiries();
        for (index, worker) in self.workers.iter().enumerate() {
            let _ = worker.commands.send(Command::Use(Box::new(self.outfit(index)))).await;
        }
        // The new ones first: who moves a listener wants to be reached at any time.
        for (number, address, sockets) in sockets {
            if sockets.tcp.is_empty() && sockets.udp.is_empty() {
                continue;
            }
            if let Some(opened) = self.listeners.get_mut(number) {
                opened.bound = Some(address);
                opened.udp |= !sockets.udp.is_empty();
            }
            self.listen(number, sockets).await;
            tracing::info!(%address, "listening");
        }
        for (number, opened) in self.listeners.iter_mut().enumerate() {
            let goes = !numbers.contains(&number) || opened.config.http3.is_none();
            #[cfg(feature = "http3")]
            if goes && opened.udp {
                for worker in &self.workers {
                    let _ = worker.commands.send(Command::CloseQuic(number)).await;
                }
            }
            opened.udp &= !goes;
            if !numbers.contains(&number)
                && let Some(address) = opened.bound.take()
            {
                for worker in &self.workers {
                    let _ = worker.commands.send(Command::Close(number)).await;
                }
                tracing::info!(%address, "no longer listening, connections finish");
            }
        }
        #[cfg(feature = "acme")]
        keepers::tend(&mut self.keepers, &self.listeners, &self.metrics);
        let bound = |number: &usize| self.listeners.get(*number).and_then(|opened| opened.bound);
        Ok(Addresses {
            listeners: numbers.iter().filter_map(bound).collect(),
            admin: self.admin_socket.as_ref().map(|socket| socket.bound),
        })
    }

    /// Readiness fails; after `drain.delay` nothing new is taken; what runs is finished within
    /// `drain.timeout`. A second order to leave ends it at once, unless the first came by the admin
    /// listener, as from a pre-stop hook: then a signal is still to follow.
    async fn drain(&mut self, mut orders: mpsc::Receiver<Order>, mut to_follow: bool) -> Ended {
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
        // Held with the others to the end: a hand-over has to know of what runs here too.
        let (clusters, workers, instance) = (&self.clusters, &self.workers, &self.instance);
        let asked = &mut self.asked;
        let hands = async {
            while let Some(asked) = asked.recv().await {
                if let admin::Asked::Hold { .. } | admin::Asked::Release { .. } = asked {
                    handed(clusters, (workers, instance), None, asked);
                }
            }
            std::future::pending().await
        };
        let impatient = async {
            loop {
                match orders.recv().await {
                    Some(Order::Drain) if std::mem::take(&mut to_follow) => {}
                    Some(Order::Drain | Order::Stop) | None => return,
                    Some(_) => {}
                }
            }
        };
        let finished = tokio::select! {
            finished = leave => finished,
            () = impatient => false,
            never = hands => match never {},
        };
        if finished {
            self.join();
            tracing::info!("drained");
            Ended::Drained
        } else {
            tracing::warn!("left before everything was finished");
            self.stop().await
        }
    }

    async fn stop(&mut self) -> Ended {
        for worker in &self.workers {
            let _ = worker.commands.send(Command::Stop).await;
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

/// Begins whatever of a hand-over was asked for, which goes on by itself: it has deadlines of its
/// own, and the one who asked may have left.
fn handed(
    clusters: &[Watched],
    (workers, instance): (&[Worker], &Arc<str>),
    instances: Option<Instances>,
    asked: admin::Asked,
) {
    let workers = Workers(workers.iter().map(|worker| worker.commands.clone()).collect());
    let named = |cluster: &str| clusters.iter().find(|w| *w.config.name == *cluster);
    let ask = |watched: &Watched, by| pause::Ask {
        cluster: watched.config.clone(),
        topology: watched.discovery.reader.clone(),
        hold: Arc::clone(&watched.hold),
        agreement: watched.agreement.clone(),
        workers: workers.clone(),
        instance: Arc::clone(instance),
        by,
    };
    // Without an answer the one who asked hears that litegate has other things to do.
    match asked {
        admin::Asked::Drain => {}
        admin::Asked::HandOver { cluster, wish, answer } => {
            let Some(watched) = named(&cluster) else { return };
            // Others write too: this one asks all of them, and then itself.
            let others = instances.filter(|all| !all.services.is_empty());
            if let (Some(all), None, false) = (others, &wish.under, wish.check) {
                let admin::HandOver { from, to, finish, .. } = wish;
                let wish = Wish { cluster: Some(cluster.to_string()), from, to, finish };
                tokio::spawn(async move { answer.send(hand_over(&all, wish).await) });
                return;
            }
            let hand_over = handoff::HandOver {
                cluster: watched.config.clone(),
                topology: watched.discovery.reader.clone(),
                hold: Arc::clone(&watched.hold),
                agreement: watched.agreement.clone(),
                workers,
                wish,
            };
            tokio::spawn(async move { answer.send(hand_over.run().await) });
        }
        admin::Asked::Hold { cluster, by, lasts, wait, renew, answer } => {
            let Some(watched) = named(&cluster) else { return };
            let ask = ask(watched, by);
            tokio::spawn(async move { answer.send(ask.hold(lasts, wait, renew).await) });
        }
        admin::Asked::Release { cluster, by, primary, answer } => {
            let Some(watched) = named(&cluster) else { return };
            let ask = ask(watched, by);
            tokio::spawn(async move { answer.send(ask.release(primary.as_deref()).await) });
        }
    }
}

/// Whether discovery sees the same by either configuration.
fn is_observed_alike(a: &config::cluster::Cluster, b: &config::cluster::Cluster) -> bool {
    a.port == b.port
        && a.members == b.members
        && a.primary == b.primary
        && a.health == b.health
        && a.max_lag == b.max_lag
        && a.soft_lag == b.soft_lag
        && a.tripwire == b.tripwire
        && a.prefer == b.prefer
        && a.send_proxy == b.send_proxy
        && a.upstream.tls == b.upstream.tls
}

fn observe(
    cluster: &config::cluster::Cluster,
    tls: Option<Arc<net::tls::Tls>>,
    metrics: Arc<Metrics>,
) -> Watched {
    let hostname = std::env::var("HOSTNAME").ok().map(Arc::from);
    let name = Arc::clone(&cluster.name);
    let cells = metrics.discovery(&name);
    let counted = move |change: &topology::Change| metrics.changed(&name, change);
    Watched {
        config: cluster.clone(),
        discovery: discovery::start(cluster, tls.clone(), hostname, cells, counted),
        hold: Hold::new(&cluster.hold),
        agreement: Agreement::default(),
        last_writes: Arc::default(),
        tls,
    }
}

/// What a scrape asks of each cluster.
fn standings(
    clusters: &[Watched],
) -> impl Iterator<Item = (Arc<str>, impl Fn() -> Standing + Send + Sync + use<>)> {
    clusters.iter().map(|watched| {
        let hold = Arc::clone(&watched.hold);
        let ask = move || Standing {
            held: hold.waiting(),
            held_bytes: hold.bytes(),
            handing_over: hold.is_paused(),
        };
        (Arc::clone(&watched.config.name), ask)
    })
}

fn seen(clusters: &[Watched]) -> Vec<(Arc<str>, topology::watch::Reader)> {
    let each =
        |watched: &Watched| (Arc::clone(&watched.config.name), watched.discovery.reader.clone());
    clusters.iter().map(each).collect()
}
