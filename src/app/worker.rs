//! A data-plane worker: one thread, one runtime, its own sockets and connections.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::LocalSet,
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::{Config, listener::Listener},
    proxy::{self, Client, Clients, Parts, Place, Proxy, Shared, Write},
    server::{
        self, Accepting, ClientCertificate, Conn, Door, Handshake, Incoming, Limits, Origin,
        Reached, Refusal, drain, tls::Tls,
    },
    telemetry::{access_log::Sink, metrics::Metrics},
};

/// How often a worker tidies up.
const TIDY: Duration = Duration::from_secs(1);

/// What a worker is told.
pub(super) enum Command {
    /// Answer with this from now on.
    Use(Box<Outfit>),
    /// Listen here as well. Connections that come in there bear this number for as long as they
    /// live.
    Listen(usize, std::net::TcpListener),
    /// Let clients come there by QUIC as well.
    #[cfg(feature = "http3")]
    ListenQuic(usize, server::h3::Socket),
    /// No longer.
    #[cfg(feature = "http3")]
    CloseQuic(usize),
    /// Close that listener; its connections finish what they have.
    Close(usize),
    /// Tell which writes of that cluster are under way.
    Tell(Arc<str>, mpsc::Sender<Vec<Write>>),
    /// Take nothing new.
    Drain,
    /// End at once.
    Stop,
}

/// What a worker's proxy is made of, on its way to the worker's thread.
pub(super) struct Outfit {
    pub(super) config: Arc<Config>,
    /// Every listener there ever was: see [`Command::Listen`].
    pub(super) listeners: Vec<(Listener, Option<Arc<Tls>>)>,
    pub(super) clusters: Vec<Shared>,
    pub(super) clients: Arc<Clients>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) sink: Option<Sink>,
    pub(super) instance: Arc<str>,
    pub(super) worker: usize,
}

impl Outfit {
    pub(super) fn wear(self) -> Proxy {
        let listeners: Vec<Arc<str>> =
            self.listeners.iter().map(|(l, _)| l.address.to_string().into()).collect();
        let clusters: Vec<_> =
            self.config.clusters.iter().map(|cluster| Arc::clone(&cluster.name)).collect();
        Proxy::new(Parts {
            shard: self.metrics.shard(self.worker, &listeners, &clusters),
            log: self.sink.map(Rc::new),
            config: self.config,
            listeners: self.listeners,
            clusters: self.clusters,
            clients: self.clients,
            instance: self.instance,
        })
    }
}

/// A worker's share of the connections of each listener.
pub(super) fn places(config: &Config, listeners: &[(Listener, Option<Arc<Tls>>)]) -> Vec<usize> {
    let share = |listener: &Listener| match listener.connections {
        0 => config.limits.connections,
        some => some,
    };
    let workers = config.server.workers.get();
    listeners.iter().map(|(listener, _)| (share(listener) / workers).max(1)).collect()
}

/// A data-plane worker: one thread, one runtime, until told to end.
pub(super) fn work(outfit: Outfit, limits: Limits, mut commands: mpsc::Receiver<Command>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "a worker can't start");
            return;
        }
    };
    LocalSet::new().block_on(&runtime, async move {
        let accepting = Accepting::new(limits, &places(&outfit.config, &outfit.listeners));
        let gate = Rc::new(Gate { proxy: RefCell::new(Rc::new(outfit.wear())) });
        let mut doors: HashMap<usize, drain::Trigger> = HashMap::new();
        #[cfg(feature = "http3")]
        let mut quic: HashMap<usize, drain::Trigger> = HashMap::new();
        let mut accepts = tokio::task::JoinSet::new();
        let mut tidy = interval(TIDY);
        tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Those of earlier configurations, for as long as their last requests run.
        let mut former: Vec<Weak<Proxy>> = Vec::new();
        loop {
            let command = tokio::select! {
                command = commands.recv() => command,
                _ = tidy.tick() => {
                    gate.tidy(&mut former);
                    continue;
                }
            };
            match command {
                Some(Command::Use(outfit)) => {
                    let places = places(&outfit.config, &outfit.listeners);
                    accepting.set_limits(proxy::limits(&outfit.config), &places);
                    let before = gate.proxy.replace(Rc::new(outfit.wear()));
                    former.push(Rc::downgrade(&before));
                }
                Some(Command::Listen(door, socket)) => match TcpListener::from_std(socket) {
                    Ok(socket) => {
                        let (gate, accepting) = (Rc::clone(&gate), accepting.clone());
                        let (trigger, drain) = drain::signal();
                        doors.insert(door, trigger);
                        while accepts.try_join_next().is_some() {}
                        accepts.spawn_local(server::serve(socket, door, gate, accepting, drain));
                    }
                    Err(error) => tracing::error!(%error, "a socket can't be used"),
                },
                #[cfg(feature = "http3")]
                Some(Command::ListenQuic(door, socket)) => {
                    let (gate, accepting) = (Rc::clone(&gate), accepting.clone());
                    let (trigger, drain) = drain::signal();
                    quic.insert(door, trigger);
                    while accepts.try_join_next().is_some() {}
                    accepts.spawn_local(server::h3::serve(socket, door, gate, accepting, drain));
                }
                #[cfg(feature = "http3")]
                Some(Command::CloseQuic(door)) => {
                    if let Some(trigger) = quic.remove(&door) {
                        trigger.start();
                    }
                }
                Some(Command::Close(door)) => {
                    if let Some(trigger) = doors.remove(&door) {
                        trigger.start();
                    }
                }
                Some(Command::Tell(cluster, to)) => gate.tell(&cluster, &to, &former),
                Some(Command::Drain) => {
                    doors.values().for_each(drain::Trigger::start);
                    #[cfg(feature = "http3")]
                    quic.values().for_each(drain::Trigger::start);
                    let finished = async {
                        while accepts.join_next().await.is_some() {}
                        accepting.finished().await;
                    };
                    let mut finished = std::pin::pin!(finished);
                    loop {
                        tokio::select! {
                            () = &mut finished => break,
                            _ = tidy.tick() => gate.tidy(&mut former),
                            command = commands.recv() => match command {
                                Some(Command::Tell(cluster, to)) => {
                                    gate.tell(&cluster, &to, &former);
                                }
                                Some(Command::Stop) | None => break,
                                Some(_) => {}
                            }
                        }
                    }
                    gate.tidy(&mut former);
                    return;
                }
                Some(Command::Stop) | None => {
                    gate.tidy(&mut former);
                    return;
                }
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

    /// Tells which writes are under way, under earlier configurations too.
    fn tell(&self, cluster: &str, to: &mpsc::Sender<Vec<Write>>, former: &[Weak<Proxy>]) {
        let all = former.iter().filter_map(Weak::upgrade).chain([self.current()]);
        // Whoever asked has a place for each worker's answer, or has left.
        let _ = to.try_send(all.flat_map(|proxy| proxy.under_way(cluster)).collect());
    }

    fn tidy(&self, former: &mut Vec<Weak<Proxy>>) {
        former.retain(|proxy| proxy.upgrade().inspect(|proxy| proxy.tidy()).is_some());
        self.current().tidy();
    }
}

impl server::Service for Gate {
    type Body = proxy::ResponseBody;
    type Client = Client;
    type Place = Place;

    fn door(&self, origin: &Origin) -> Door {
        self.current().door(origin)
    }

    fn admit(&self, origin: &Origin) -> Option<Place> {
        self.current().admit(origin)
    }

    fn opened(
        &self,
        origin: Origin,
        certificate: Option<ClientCertificate>,
        place: Place,
    ) -> Client {
        self.current().client(origin, certificate.as_ref(), place)
    }

    fn shook_hands(&self, listener: usize, how: Handshake) {
        self.current().shook_hands(listener, how);
    }

    fn reached(&self, limit: Reached) {
        self.current().reached(limit);
    }

    async fn call<'c>(
        &'c self,
        client: &'c Rc<Client>,
        conn: &'c Rc<Conn>,
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
