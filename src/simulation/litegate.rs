//! An instance of litegate: all of it but the sockets, the threads and the resolver.
//!
//! Real are the configuration, discovery with its sources and its reconciler, the published
//! snapshots, the connection to a client, the whole walk of a request, and HTTP on both sides.

use std::{
    cell::RefCell,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Semaphore, task::JoinSet, time::interval};

use super::{
    Mutation, consul,
    world::{APP, NODES, World, address, name},
};
use crate::{
    config::{self, Config},
    discovery::{self, Discovery, Observer},
    net::Stream,
    proxy::{self, Clients, Hold, Parts, Proxy, Shared},
    server::{self, Limits, Origin},
    telemetry::metrics::Metrics,
    topology::{Change, Member, Saw, Source, Topology, watch},
};

/// Where clients find an instance.
pub(super) fn front(instance: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 100, 0, instance as u8), 80))
}

pub(super) struct Litegate {
    pub(super) reader: RefCell<watch::Reader>,
    pub(super) observer: Observer,
    pub(super) hold: Arc<Hold>,
    /// Acknowledged writes that it counted as lost.
    lost: Arc<Mutex<u64>>,
    /// Ends with it.
    _discovery: Discovery,
    _tasks: JoinSet<()>,
}

/// The configuration of an instance.
pub(super) fn config(world: &World, instance: usize, mutation: Option<Mutation>) -> Config {
    let nodes = (0..NODES).map(|n| {
        format!("{{ name = \"{}\", address = \"{}\" }}", name(n), address(instance, n, APP))
    });
    let nodes = nodes.collect::<Vec<_>>().join(", ");
    let (mode, hold) = match mutation {
        Some(Mutation::IgnoresTokens) => ("off", world.hold),
        Some(Mutation::HoldsForEver) => ("token", Duration::from_secs(600)),
        _ => ("token", world.hold),
    };
    let idempotent = match mutation {
        Some(Mutation::RepeatsWrites) => "[[route]]\npath = \"/\"\nidempotent = true\n",
        _ => "",
    };
    let replicas = match mutation {
        Some(Mutation::IgnoresReplicas) => 0,
        _ => world.replicas,
    };
    let consul = if world.asks_consul {
        let url = format!("http://{}", consul::address(instance));
        format!(r#", {{ type = "consul", address = "{url}", key = "{}" }}"#, consul::KEY)
    } else {
        String::new()
    };
    let text = format!(
        r#"
[server]
workers = 1
[[listener]]
address = "{}"
[access_log]
format = "off"
[cluster.abaci]
port = {APP}
members = {{ type = "static", nodes = [{nodes}] }}
primary = [{{ type = "litefs" }}{consul}]
timeouts = {{ connect = "1s", response_header = "{}s" }}
hold = {{ timeout = "{}s" }}
consistency = {{ mode = "{mode}" }}
durability = {{ replicas = {replicas}, timeout = "{}s", on_timeout = "fail" }}
{idempotent}"#,
        front(instance),
        RESPONSE.as_secs(),
        hold.as_secs(),
        DURABLE.as_secs(),
    );
    match config::load::parse("simulation", &text, []) {
        Ok(config) => config,
        Err(wrong) => panic!("{wrong}"),
    }
}

pub(super) const RESPONSE: Duration = Duration::from_secs(8);
/// How long a write waits for replicas.
pub(super) const DURABLE: Duration = Duration::from_secs(1);

impl Litegate {
    /// Starts one; it runs until it is dropped.
    pub(super) fn start(
        world: &Rc<World>,
        instance: usize,
        mutation: Option<Mutation>,
    ) -> Rc<Self> {
        let config = Arc::new(config(world, instance, mutation));
        let metrics = Metrics::new();
        let Some(cluster) = config.clusters.first() else { unreachable!("it has a cluster") };
        let lost = Arc::new(Mutex::new(0));
        let changes: Arc<Mutex<Vec<Change>>> = Arc::default();
        let on_change = {
            let (lost, changes) = (Arc::clone(&lost), Arc::clone(&changes));
            move |change: &Change| {
                if let Change::WritesLost { writes, .. } = change {
                    *lost.lock().unwrap_or_else(PoisonError::into_inner) += writes;
                }
                changes.lock().unwrap_or_else(PoisonError::into_inner).push(change.clone());
            }
        };
        let discovery =
            discovery::start(cluster, None, None, metrics.discovery(&cluster.name), on_change);
        let mut tasks = JoinSet::new();
        let reader = match mutation {
            Some(mutation) if mutation.is_of_topology() => {
                let (publisher, reader) = watch::channel(Topology::default());
                let (world, real) = (Rc::clone(world), discovery.reader.clone());
                tasks.spawn_local(mutate(world, mutation, real, publisher));
                reader
            }
            _ => discovery.reader.clone(),
        };
        let hold = Hold::new(&cluster.hold);
        let shared = Shared {
            topology: reader.clone(),
            observer: discovery.observer.clone(),
            hold: Arc::clone(&hold),
            last_writes: Arc::default(),
            tls: None,
        };
        let listeners: Vec<Arc<str>> =
            config.listeners.iter().map(|l| l.address.to_string().into()).collect();
        let clusters = [Arc::clone(&cluster.name)];
        let parts = Parts {
            shard: metrics.shard(0, &listeners, &clusters),
            log: None,
            listeners: config.listeners.iter().map(|one| (one.clone(), None)).collect(),
            clusters: vec![shared],
            clients: Arc::new(Clients::new(&config.limits.client, None)),
            instance: format!("litegate-{instance}").into(),
            config: Arc::clone(&config),
        };
        let gate = Rc::new(Proxy::new(parts));
        tasks.spawn_local(accept(
            Rc::clone(world),
            instance,
            Rc::clone(&gate),
            proxy::limits(&config),
        ));
        tasks.spawn_local(async move {
            let mut second = interval(Duration::from_secs(1));
            loop {
                second.tick().await;
                gate.tidy();
            }
        });
        let its = Rc::clone(world);
        let mut news = discovery.reader.clone();
        tasks.spawn_local(async move {
            let mut seen = 0;
            while let Ok(newer) = news.newer_than(seen).await {
                seen = newer.generation;
                for change in changes.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                    its.say(format_args!("litegate {instance}: {change:?}"));
                }
            }
        });
        Rc::new(Self {
            reader: RefCell::new(reader),
            observer: discovery.observer.clone(),
            hold,
            lost,
            _discovery: discovery,
            _tasks: tasks,
        })
    }

    /// What DNS would make it believe of who exists.
    pub(super) fn list(&self, instance: usize, listed: [bool; NODES]) {
        let members = (0..NODES).filter(|n| listed[*n]).map(|n| Member {
            address: address(instance, n, APP),
            name: Some(name(n).into()),
            near: false,
        });
        self.observer.observe(Saw::Members(members.collect()), Source::Members);
    }

    /// How many acknowledged writes it counted as lost.
    pub(super) fn lost(&self) -> u64 {
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whom it sends writes to.
    pub(super) fn primary(&self) -> Option<String> {
        let mut reader = self.reader.borrow_mut();
        reader.latest().primary().map(|node| node.name.to_string())
    }
}

async fn accept(world: Rc<World>, instance: usize, gate: Rc<Proxy>, limits: Limits) {
    let mut accepted = world.network.listen([front(instance)]);
    let handshakes = Arc::new(Semaphore::new(1));
    let limits = Rc::new(std::cell::Cell::new(limits));
    let (_trigger, drain) = server::drain::signal();
    let mut connections = JoinSet::new();
    while let Some(socket) = accepted.recv().await {
        while connections.try_join_next().is_some() {}
        let peer = SocketAddr::from((Ipv4Addr::new(10, 200, 0, 1), 1000));
        let origin = Origin { listener: 0, peer, local: front(instance), secure: false };
        let (gate, limits, drain) = (Rc::clone(&gate), Rc::clone(&limits), drain.clone());
        connections.spawn_local(server::run(
            Stream::Simulated(socket),
            origin,
            gate,
            limits,
            Arc::clone(&handshakes),
            drain,
        ));
    }
}

/// Breaks a rule of what is believed, between the reconciler and the data plane.
async fn mutate(
    world: Rc<World>,
    mutation: Mutation,
    mut real: watch::Reader,
    publisher: watch::Publisher,
) {
    let mut seen = None;
    loop {
        let newer = match seen {
            None => Arc::clone(real.latest()),
            Some(seen) => match real.newer_than(seen).await {
                Ok(newer) => newer,
                Err(_gone) => return,
            },
        };
        seen = Some(newer.generation);
        let mut topology = Topology::clone(&newer);
        match mutation {
            Mutation::TellsLate => tokio::time::sleep(Duration::from_secs(3)).await,
            Mutation::FollowsTheOlderClaim => {
                let claims = world.look(|state| {
                    let all = state.nodes.iter().enumerate().filter(|(_, node)| node.primary);
                    all.min_by_key(|(_, node)| node.since).map(|(n, _)| name(n))
                });
                elect(&mut topology, claims);
            }
            Mutation::VotesByReplicas => {
                let votes = world.look(|state| {
                    let named = |n| state.nodes.iter().filter(|node| node.names == Some(n)).count();
                    (0..NODES).filter(|n| named(*n) > 0).max_by_key(|n| named(*n)).map(name)
                });
                elect(&mut topology, votes);
            }
            _ => {}
        }
        publisher.publish(topology);
    }
}

fn elect(topology: &mut Topology, name: Option<String>) {
    let Some(id) = name.and_then(|name| topology.named(&name).map(|node| node.id)) else { return };
    topology.primary = Some(id);
    for node in &mut topology.nodes {
        node.role = if node.id == id {
            crate::topology::Role::Primary
        } else {
            crate::topology::Role::Replica
        };
    }
}
