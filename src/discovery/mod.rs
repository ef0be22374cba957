//! What is seen of a cluster, and the task that draws conclusions from it.
//!
//! Sources only report; [`State`] believes. One task per cluster folds observations and publishes
//! snapshots. The data plane reports through the same channel.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch as signal},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::{
    config::cluster::{Cluster, Members, Prefer, RoleSource, SendProxy, StaticNode},
    litefs::client,
    net::{
        proxy_protocol::{Introduction, Version},
        tls::{Connector, Tls},
    },
    telemetry::metrics::DiscoveryCells,
    topology::{
        Change, Member, Observation, Presence, PrimaryName, Saw, Source, eject,
        lineage::Kept,
        progress::Progress,
        reconcile::{Rules, State},
        watch,
    },
};

mod dns;
mod probe;
pub(crate) mod roles;

use roles::litefs::Litefs;

const _: () = assert!(crate::config::cluster::DATABASES == crate::topology::position::DATABASES);

/// Observations that wait to be folded. More are dropped and counted: newer ones follow.
const WAITING: usize = 1024;
/// Names that are looked up at once because somebody used them. More are not: whoever keeps using
/// a name gets it looked up later.
const LOOKUPS: usize = 16;

/// Earlier primaries that may still be answering.
const DEPOSED: usize = 4;
/// For how long they may: what a node answers later, it was not running when it was deposed.
const LATE: Duration = Duration::from_mins(1);

/// A cluster under observation, until dropped.
#[derive(Debug)]
pub struct Discovery {
    /// What is believed.
    pub reader: watch::Reader,
    /// Tells discovery something.
    pub observer: Observer,
    reconfigure: mpsc::Sender<Reconfigure>,
    task: JoinHandle<()>,
}

/// Another configuration of the same cluster.
#[derive(Debug)]
struct Reconfigure {
    cluster: Cluster,
    tls: Option<Arc<Tls>>,
    done: oneshot::Sender<()>,
}

impl Discovery {
    /// Goes on by another configuration, with everything that was seen so far. Returns when what
    /// it says itself (`static` members) is published.
    pub async fn reconfigure(&self, cluster: &Cluster, tls: Option<Arc<Tls>>) {
        let (done, is_done) = oneshot::channel();
        let wish = Reconfigure { cluster: cluster.clone(), tls, done };
        // The task ends only with `self`.
        if self.reconfigure.send(wish).await.is_ok() {
            let _ = is_done.await;
        }
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How the data plane tells discovery something.
#[derive(Clone, Debug)]
pub struct Observer {
    sender: mpsc::Sender<Observation>,
    cells: Arc<DiscoveryCells>,
    refresh: Arc<signal::Sender<()>>,
}

impl Observer {
    /// Reports. Never waits: over the bound the observation is dropped and counted.
    pub fn observe(&self, saw: Saw, source: Source) {
        let at = Instant::now().into_std();
        if self.sender.try_send(Observation { saw, source, at }).is_err() {
            self.cells.dropped();
        }
    }

    /// Asks for everything that comes from DNS to be looked up anew, soon.
    pub fn refresh_members(&self) {
        self.refresh.send_replace(());
    }
}

/// Starts to observe a cluster, on the runtime that this is called on. `hostname` is the pod beside
/// us; `cells` is where it is counted; `tls` is how it is spoken at the port where requests go.
pub fn start(
    cluster: &Cluster,
    tls: Option<Arc<Tls>>,
    hostname: Option<Arc<str>>,
    cells: Arc<DiscoveryCells>,
    on_change: impl Fn(&Change) + Send + 'static,
) -> Discovery {
    let state = State::new(rules(cluster, hostname.as_ref()));
    let (publisher, reader) = watch::channel(state.topology().clone());
    let (sender, seen) = mpsc::channel(WAITING);
    let (reconfigure, wishes) = mpsc::channel(1);
    let observer = Observer { sender, cells, refresh: Arc::new(signal::Sender::new(())) };
    let mut folding = Fold {
        cluster: cluster.clone(),
        tls,
        observer: observer.clone(),
        hostname,
        state,
        publisher,
        on_change,
        watched: HashMap::new(),
        sources: JoinSet::new(),
        acknowledging: None,
        deposed: Vec::new(),
        lookups: JoinSet::new(),
    };
    folding.list_static();
    let task = tokio::spawn(folding.run(seen, wishes));
    Discovery { reader, observer, reconfigure, task }
}

fn rules(cluster: &Cluster, hostname: Option<&Arc<str>>) -> Rules {
    Rules {
        max_lag: cluster.max_lag,
        soft_lag: cluster.soft_lag,
        tripwire: cluster.tripwire,
        eject: eject::Rules {
            after: cluster.health.eject_after,
            base: cluster.health.eject_base,
            max: cluster.health.eject_longest,
        },
        eject_max: cluster.health.eject_max,
        local: hostname.cloned().filter(|_| cluster.prefer == Prefer::Local),
    }
}

/// Whether what a source said by one configuration holds by another.
fn stays(source: Source, before: &Cluster, now: &Cluster) -> bool {
    let [before, now] = [before, now].map(|cluster| {
        // Of each type there is one at most.
        cluster.primary.iter().find(|role| spoken_by(role) == source)
    });
    before.zip(now).is_some_and(|(before, now)| before.asks_the_same_as(now))
}

/// In whose name a source of the configuration speaks.
fn spoken_by(source: &RoleSource) -> Source {
    match source {
        RoleSource::Litefs { .. } => Source::Litefs,
        RoleSource::Instance { .. } => Source::Instance,
        RoleSource::Dns(_) => Source::Dns,
        RoleSource::Consul(_) => Source::Consul,
        RoleSource::Http { .. } => Source::Http,
        RoleSource::File { .. } => Source::File,
    }
}

/// Where a member's LiteFS API is. `None` where the cluster has none.
pub fn api(cluster: &Cluster, member: SocketAddr) -> Option<SocketAddr> {
    cluster.primary.iter().find_map(|source| match source {
        RoleSource::Litefs { port, .. } => Some(api_at(cluster, member, *port)),
        _ => None,
    })
}

fn api_at(cluster: &Cluster, member: SocketAddr, port: u16) -> SocketAddr {
    let written = match &cluster.members {
        Members::Static(nodes) => nodes.iter().find(|node| node.address == member),
        _ => None,
    };
    written.and_then(|node| node.api).unwrap_or_else(|| SocketAddr::new(member.ip(), port))
}

/// Has LiteFS make a member the primary. It is not yet when this returns.
///
/// # Errors
/// Why LiteFS did not.
pub async fn promote(cluster: &Cluster, member: SocketAddr, limit: Duration) -> Result<(), String> {
    let api = api(cluster, member).ok_or("the cluster has no LiteFS API")?;
    client::promote(api, limit).await.map_err(|error| error.to_string())
}

/// The one task that believes.
struct Fold<F> {
    cluster: Cluster,
    tls: Option<Arc<Tls>>,
    observer: Observer,
    hostname: Option<Arc<str>>,
    state: State,
    publisher: watch::Publisher,
    on_change: F,
    /// The sources of each member: they end with it.
    watched: HashMap<SocketAddr, JoinSet<()>>,
    sources: JoinSet<()>,
    /// Of single names, at most [`LOOKUPS`].
    lookups: JoinSet<()>,
    /// The primary that acknowledged last.
    acknowledging: Option<Acknowledging>,
    /// Those before it, and what their successors kept; at most [`DEPOSED`].
    deposed: Vec<Deposed>,
}

/// A primary that has a successor.
struct Deposed {
    before: Acknowledging,
    kept: Kept,
    since: Instant,
}

/// A primary, for when it has a successor.
struct Acknowledging {
    incarnation: u64,
    name: Arc<str>,
    progress: Arc<Progress>,
}

impl<F: Fn(&Change)> Fold<F> {
    async fn run(
        mut self,
        mut seen: mpsc::Receiver<Observation>,
        mut wishes: mpsc::Receiver<Reconfigure>,
    ) {
        self.start_sources();
        self.watch_members();
        loop {
            let never = Instant::now() + Duration::from_hours(1);
            let now = Instant::now().into_std();
            let deadline = self.state.deadline(now).map_or(never, Instant::from_std);
            tokio::select! {
                observation = seen.recv() => match observation {
                    Some(observation) => self.fold(Some(&observation)),
                    None => return,
                },
                wish = wishes.recv() => match wish {
                    Some(wish) => self.reconfigure(wish, &mut seen),
                    None => return,
                },
                () = sleep_until(deadline) => self.fold(None),
            }
        }
    }

    /// Takes note of what was seen, or that time has passed.
    fn fold(&mut self, observation: Option<&Observation>) {
        self.believe(observation);
        match observation.map(|observation| &observation.saw) {
            Some(Saw::Failed { connect: true, .. }) => self.observer.refresh_members(),
            Some(Saw::PrimaryHint(name)) => self.look_up(name),
            _ => {}
        }
    }

    /// Draws the conclusions, and says and publishes them.
    fn believe(&mut self, observation: Option<&Observation>) {
        let generation = self.state.topology().generation;
        let mut changes = self.state.observe(observation, Instant::now().into_std());
        self.count_late(&mut changes);
        self.count_lost(&mut changes);
        for change in &changes {
            record(&self.cluster.name, change);
            (self.on_change)(change);
        }
        if self.state.topology().generation != generation {
            self.watch_members();
            self.publisher.publish(self.state.topology().clone());
        }
    }

    /// Members that are written down are known without asking anybody: the first request must not
    /// find an empty cluster.
    fn list_static(&mut self) {
        let Members::Static(nodes) = &self.cluster.members else { return };
        let member = |node: &StaticNode| Member {
            address: node.address,
            name: Some(Arc::clone(&node.name)),
            near: node.near,
        };
        let saw = Saw::Members(nodes.iter().map(member).collect());
        let at = Instant::now().into_std();
        self.believe(Some(&Observation { saw, source: Source::Members, at }));
    }

    /// Ends all sources and starts those of another configuration.
    fn reconfigure(&mut self, wish: Reconfigure, seen: &mut mpsc::Receiver<Observation>) {
        // What they said last is of the configuration by which they asked.
        for _ in 0..WAITING {
            let Ok(observation) = seen.try_recv() else { break };
            self.fold(Some(&observation));
        }
        (self.sources, self.lookups) = (JoinSet::new(), JoinSet::new());
        self.watched.clear();
        let before = std::mem::replace(&mut self.cluster, wish.cluster);
        self.tls = wish.tls;
        let rules = rules(&self.cluster, self.hostname.as_ref());
        self.state.reconfigure(rules, |source| stays(source, &before, &self.cluster));
        self.list_static();
        self.believe(None);
        self.start_sources();
        self.watch_members();
        // Whoever wished it may have gone.
        let _ = wish.done.send(());
    }

    /// What the primary before had acknowledged and the one now does not have.
    fn count_lost(&mut self, changes: &mut Vec<Change>) {
        let topology = self.state.topology();
        let (Some(primary), Some(epoch)) = (topology.primary(), topology.lineage.last()) else {
            return;
        };
        let now = Acknowledging {
            incarnation: epoch.incarnation,
            name: Arc::clone(&primary.name),
            progress: Arc::clone(&primary.progress),
        };
        let Some(before) = &self.acknowledging else {
            self.acknowledging = Some(now);
            return;
        };
        if before.incarnation == now.incarnation {
            return;
        }
        let Some(kept) = epoch.kept.clone() else { return };
        let since = Instant::now();
        let before = self.acknowledging.replace(now);
        self.deposed.extend(before.map(|before| Deposed { before, kept, since }));
        let surplus = self.deposed.len().saturating_sub(DEPOSED);
        self.deposed.drain(..surplus);
        self.count_late(changes);
    }

    /// A primary that was left behind may still be answering what it was running then: these
    /// writes are lost as well.
    fn count_late(&mut self, changes: &mut Vec<Change>) {
        let primary = self.state.topology().primary().map(|node| Arc::clone(&node.progress));
        // What it acknowledges as primary again is of another history.
        self.deposed.retain(|Deposed { before, since, .. }| {
            primary.as_ref().is_none_or(|primary| !Arc::ptr_eq(primary, &before.progress))
                && since.elapsed() < LATE
        });
        for Deposed { before, kept, .. } in &self.deposed {
            let writes = before.progress.lost(kept);
            if writes > 0 {
                changes.push(Change::WritesLost { from: Arc::clone(&before.name), writes });
            }
        }
    }

    fn start_sources(&mut self) {
        let observer = &self.observer;
        match &self.cluster.members {
            Members::Static(_) => {}
            Members::Dns(lookup) => {
                let (lookup, port) = (lookup.clone(), self.cluster.port);
                self.sources.spawn(dns::members(lookup, Some(port), observer.clone()));
            }
            Members::Srv(lookup) => {
                self.sources.spawn(dns::members(lookup.clone(), None, observer.clone()));
            }
        }
        for source in &self.cluster.primary {
            match source {
                // Of each member: see below.
                RoleSource::Litefs { .. } | RoleSource::Http { .. } => {}
                RoleSource::Instance { name: instance } => {
                    let name = PrimaryName::Instance(Arc::clone(instance));
                    observer.observe(Saw::PrimaryIs(Some(name)), Source::Instance);
                    if let Members::Dns(lookup) = &self.cluster.members {
                        // A configured name means nothing until an address has it.
                        self.sources.spawn(dns::named(
                            lookup.clone(),
                            Arc::clone(instance),
                            self.cluster.port,
                            observer.clone(),
                        ));
                    }
                }
                RoleSource::Dns(lookup) => {
                    self.sources.spawn(dns::primary(lookup.clone(), observer.clone()));
                }
                RoleSource::Consul(consul) => {
                    let follow = roles::consul::follow(consul.clone(), observer.clone());
                    self.sources.spawn(follow);
                }
                RoleSource::File { path, instance, interval } => {
                    let local = instance.clone().or_else(|| self.hostname.clone());
                    let (path, observer) = (path.clone(), observer.clone());
                    self.sources.spawn(roles::file::follow(path, local, *interval, observer));
                }
            }
        }
    }

    /// Starts the sources of new members and ends those of departed ones.
    fn watch_members(&mut self) {
        let topology = self.state.topology();
        self.watched.retain(|address, _| topology.nodes.iter().any(|n| n.address == *address));
        for node in topology.nodes.iter().filter(|n| n.presence == Presence::Member) {
            let address = node.address;
            if self.watched.contains_key(&address) {
                continue;
            }
            let mut tasks = JoinSet::new();
            for source in &self.cluster.primary {
                let observer = || self.observer.clone();
                match source {
                    RoleSource::Litefs { port, poll } => {
                        let litefs = Litefs {
                            member: address,
                            api: api_at(&self.cluster, address, *port),
                            progress: Arc::clone(&node.progress),
                            databases: Arc::clone(&self.cluster.consistency.databases),
                            observer: observer(),
                            heard: Arc::default(),
                        };
                        tasks.spawn(litefs.clone().poll(*poll));
                        tasks.spawn(litefs.clone().follow());
                        tasks.spawn(litefs.clone().exact());
                        tasks.spawn(litefs.lag());
                    }
                    RoleSource::Http { path, port, interval, timeout } => {
                        let asked = port.map_or(address, |port| (address.ip(), port).into());
                        // Another port is not where requests go.
                        let is_theirs = asked == address;
                        let send = self.cluster.send_proxy;
                        let question = roles::http::Question {
                            member: address,
                            asked,
                            path: path.clone(),
                            opening: if is_theirs { opening(send) } else { Vec::new() },
                            tls: self.tls.as_ref().filter(|_| is_theirs).map(Connector::new),
                        };
                        let (every, limit, observer) = (*interval, *timeout, observer());
                        tasks.spawn(roles::http::follow(question, every, limit, observer));
                    }
                    _ => {}
                }
            }
            if let Some(path) = &self.cluster.health.path {
                let health = &self.cluster.health;
                tasks.spawn(probe::probe(
                    address,
                    path.clone(),
                    opening(self.cluster.send_proxy),
                    self.tls.as_ref().map(Connector::new),
                    health.interval,
                    health.timeout,
                    self.observer.clone(),
                ));
            }
            if let Members::Dns(lookup) = &self.cluster.members {
                tasks.spawn(dns::name_of(lookup.clone(), address, self.observer.clone()));
            }
            self.watched.insert(address, tasks);
        }
        // New addresses may be those of configured names.
        let instances = self.cluster.primary.iter().filter_map(|source| match source {
            RoleSource::Instance { name } => Some(Arc::clone(name)),
            _ => None,
        });
        for name in instances.collect::<Vec<_>>() {
            self.look_up(&name);
        }
    }

    /// Under `dns` members have no names; one that somebody uses can be looked up.
    fn look_up(&mut self, name: &Arc<str>) {
        if let Members::Dns(lookup) = &self.cluster.members
            && self.state.topology().named(name).is_none()
        {
            while self.lookups.try_join_next().is_some() {}
            if self.lookups.len() < LOOKUPS {
                self.lookups.spawn(dns::named_once(
                    lookup.clone(),
                    Arc::clone(name),
                    self.cluster.port,
                    self.observer.clone(),
                ));
            }
        }
    }
}

/// Says once what changed.
fn record(cluster: &str, change: &Change) {
    use tracing::{error, info, warn};
    match change {
        Change::Primary { from, to, term, gap } => {
            let (from, gap_ms) = (from.as_deref().unwrap_or("-"), gap.as_millis());
            info!(cluster, from, %to, term, gap_ms, "primary changed");
        }
        Change::PrimaryLost { from, why } => warn!(cluster, %from, ?why, "no primary: writes wait"),
        Change::SplitBrain { claimants } => {
            error!(cluster, ?claimants, "two nodes claim to be primary: writes wait");
        }
        Change::Tripped { node, database, seen, has } => {
            let help = "POST /api/confirm?cluster=…&node=… if its data is right";
            error!(cluster, %node, %database, seen, has, help, "new primary lacks data: writes wait");
        }
        Change::Fenced { node } => {
            error!(cluster, %node, "node claims to be primary and gets no writes: fenced");
        }
        Change::LeaseReset => warn!(cluster, "Consul's history went back: its order begins anew"),
        // The source says so itself, once.
        Change::NoNews { .. } => {}
        Change::Joined { node, address } => info!(cluster, %node, %address, "node joined"),
        Change::Left { node } => info!(cluster, %node, "node left, drains"),
        Change::Restarted { node } => info!(cluster, %node, "node restarted"),
        Change::Refused { node, cluster: other } => {
            error!(cluster, %node, %other, "node belongs to another cluster: gets nothing");
        }
        Change::Ejected { node } => warn!(cluster, %node, "node ejected"),
        Change::Lag { node, freshness } => warn!(cluster, %node, ?freshness, "lag crossed a limit"),
        Change::Probed { node, healthy: true } => info!(cluster, %node, "probe passes again"),
        Change::Probed { node, healthy: false } => warn!(cluster, %node, "probe fails"),
        Change::WritesLost { from, writes } => {
            error!(cluster, %from, writes, "acknowledged writes were lost in a failover");
        }
        Change::Stale(true) => {
            warn!(cluster, "members cannot be listed: going on with the last ones");
        }
        Change::Stale(false) => info!(cluster, "members can be listed again"),
        Change::Named { node, address } => info!(cluster, %node, %address, "node has a name"),
    }
}

/// Whether an address may be a member's at all.
fn is_usable(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST)
}
/// How a connection of our own begins, to a node that expects the PROXY protocol.
fn opening(send: SendProxy) -> Vec<u8> {
    let version = match send {
        SendProxy::Off => return Vec::new(),
        SendProxy::V1 => Version::V1,
        SendProxy::V2 => Version::V2,
    };
    Introduction { version, ends: None }.header()
}
