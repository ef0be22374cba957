//! A request becomes a response: the walk, and all its IO.
//!
//! [`Proxy::call`] is the function to read first. [`Proxy::answer`] is the walk itself, in the
//! words of design section 4: route, classify, then choose, attempt and decide what follows,
//! until there is an answer to relay or a [`Problem`].

use std::{future::Future, rc::Rc, sync::Arc, time::Duration};

use h2::ext::Protocol;
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    uri::{Authority, PathAndQuery},
};
use http_body::Body as _;
use hyper::body::Incoming;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep, timeout};

use self::{
    account::{Account, Facts},
    attempt::{Connected, Node, Places, Trouble, Try},
    body::{Budget, Upload},
    cluster::Cluster,
    headers::{Extra, Peer},
    relay::Own,
    session::Session,
    slot::Slot,
    upgrade::Sides,
};
pub use self::{
    causal::LastWrites,
    clients::Clients,
    cluster::Shared,
    hold::{Hold, Pause, Write},
    relay::ResponseBody,
    service::limits,
};
use crate::{
    config::{
        self, Config,
        cluster::{SendProxy, UpstreamProtocol},
        limits::{Limit, Underscores},
        listener::Listener,
    },
    decide::{
        self, Attempt, Cause, Class, Ended, Failure, FailureKind, History, HoldFor, Problem,
        Wanted,
        answer::Said,
        choose::Choice,
        classify::PREFER_INSTANCE,
        next::{Next, Outcome},
        outcome::{Before, WriteOutcome},
        pace,
        replay::{self, Form, Replay, ReplayError},
        route::Head,
        strict::{self, Peculiar},
        token::TokenRead,
    },
    net::{
        proxy_protocol::{self, Ends, Introduction},
        tls::Offer,
    },
    server::{
        self, ClientCertificate, Conn, Door, Handshake, Origin, ProxyProtocol, Reached, tls::Tls,
    },
    telemetry::{
        access_log::{Line, Sink, Tried},
        metrics::{
            HandshakeOutcome, HoldOutcome, Leave, ReplayOutcome, RetryRefusal, Shard, Unanswered,
        },
    },
    topology::{PrimaryGap, Role, Saw, Source, Topology, position::Reach},
    upstream::is_websocket,
};

mod account;
mod acknowledge;
mod attempt;
mod body;
mod causal;
mod clients;
mod cluster;
pub mod headers;
mod hold;
mod outcome;
mod refusal;
mod relay;
mod service;
mod session;
mod slot;
mod tokens;
mod turn;
mod upgrade;
pub(crate) mod websocket;

/// The data plane of one worker, for one configuration.
#[derive(Debug)]
pub struct Proxy {
    config: Arc<Config>,
    listeners: Vec<(Listener, Option<Arc<Tls>>)>,
    clusters: Vec<Cluster>,
    shard: Arc<Shard>,
    /// What each client may; only where there are such limits.
    clients: Option<Arc<Clients>>,
    log: Option<Rc<Sink>>,
    /// Of `limits.replay_bytes`, this worker's share.
    kept: Rc<Budget>,
    /// `1.1 litegate-…`: this instance among those that a request passes.
    via: HeaderValue,
    /// `litegate-…`
    instance: Arc<str>,
}

/// A client, for as long as it is connected.
#[derive(Debug)]
pub struct Client {
    peer: Peer,
    origin: Origin,
    /// That the same is to be had by HTTP/3, if this client may be told.
    alternative: Option<HeaderValue>,
    shard: Arc<Shard>,
    _place: Place,
}

/// Among the connections of a client, if they are counted.
pub type Place = Option<Box<clients::Place>>;

impl Client {
    /// How a connection to a node says that it is this client's.
    fn introduction(&self, send: SendProxy) -> Option<Introduction> {
        let version = match send {
            SendProxy::Off => return None,
            SendProxy::V1 => proxy_protocol::Version::V1,
            SendProxy::V2 => proxy_protocol::Version::V2,
        };
        let (source, destination) = (self.origin.peer, self.origin.local);
        Some(Introduction { version, ends: Some(Ends { source, destination }) })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shard.connection_closed(self.origin.listener);
    }
}

/// What a worker's proxy is made of.
#[derive(Debug)]
pub struct Parts {
    /// The configuration.
    pub config: Arc<Config>,
    /// Every listener that a client may have come in by, in the order of [`Origin::listener`].
    pub listeners: Vec<(Listener, Option<Arc<Tls>>)>,
    /// For each of its clusters.
    pub clusters: Vec<Shared>,
    /// What each client may, for all workers.
    pub clients: Arc<Clients>,
    /// This worker's cells.
    pub shard: Arc<Shard>,
    /// This worker's end of the access log.
    pub log: Option<Rc<Sink>>,
    /// The process's name among proxies.
    pub instance: Arc<str>,
}

impl Proxy {
    /// For one worker.
    pub fn new(parts: Parts) -> Self {
        let Parts { config, listeners, clusters, clients, shard, log, instance } = parts;
        let workers = config.server.workers.get();
        let now = Instant::now();
        let is_only = config.clusters.len() == 1;
        let clusters = config.clusters.iter().zip(clusters).enumerate();
        let clusters = clusters.map(|(index, (cluster, shared))| {
            let (cluster, shard) = (cluster.clone(), Arc::clone(&shard));
            Cluster::new(index, cluster, shared, shard, workers, is_only, now)
        });
        Self {
            clusters: clusters.collect(),
            clients: Some(clients).filter(|clients| clients.is_on()),
            kept: Budget::new(config.limits.replay_bytes / workers),
            // The instance is a token by construction.
            via: HeaderValue::from_str(&format!("1.1 {instance}"))
                .unwrap_or_else(|_| HeaderValue::from_static("1.1 litegate")),
            config,
            listeners,
            shard,
            log,
            instance,
        }
    }

    /// Closes what has been idle for too long and hands over what waits to be logged. To be
    /// called about once a second.
    pub fn tidy(&self) {
        let now = Instant::now();
        self.clusters.iter().for_each(|cluster| cluster.prune(now));
        self.shard.replay_buffer.set(self.kept.used() as u64);
        self.shard.reached(Limit::ReplayBytes, self.kept.refused());
        if let Some(clients) = &self.clients {
            self.shard.reached(Limit::ClientClients, clients.forgotten());
        }
        if let Some(log) = &self.log {
            log.flush();
        }
    }

    /// The writes of that cluster that are under way here.
    pub fn under_way(&self, cluster: &str) -> Vec<Write> {
        let of = self.clusters.iter().filter(|known| *known.config.name == *cluster);
        of.flat_map(|known| known.lane.under_way()).collect()
    }

    /// What is expected of whoever connects there.
    pub fn door(&self, origin: &Origin) -> Door {
        let Some((listener, tls)) = self.listeners.get(origin.listener) else {
            return Door::default();
        };
        let proxy_protocol = match listener.proxy_protocol(origin.peer.ip()) {
            config::listener::ProxyProtocol::Off => ProxyProtocol::Off,
            config::listener::ProxyProtocol::Accept => ProxyProtocol::Accept,
            config::listener::ProxyProtocol::Require => ProxyProtocol::Require,
        };
        let config::listener::Protocols { http1, h2 } = listener.protocols;
        Door { proxy_protocol, tls: tls.clone(), http1, h2 }
    }

    /// Whether a client may connect. Proxies and balancers may: their connections are many
    /// clients'.
    pub fn admit(&self, origin: &Origin) -> Option<Place> {
        let Some(clients) = &self.clients else { return Some(None) };
        let ip = origin.peer.ip();
        let speaks_for_others =
            |listener: &Listener| listener.trusts(ip) || listener.introduces(ip);
        if self.listener(origin.listener).is_some_and(speaks_for_others) {
            return Some(None);
        }
        match clients.connect(ip) {
            Ok(place) => Some(place.map(Box::new)),
            Err(limit) => {
                self.shard.reached(limit, 1);
                None
            }
        }
    }

    /// Whether whoever asks may ask for more. Behind a trusted proxy that is the client it tells of;
    /// where it tells of none, it asks for itself, and nothing is counted.
    fn ask(&self, walk: &Walk<'_>) -> Result<(), Problem> {
        let Some(clients) = &self.clients else { return Ok(()) };
        let origin = &walk.conn.origin;
        let client = match self.listener(origin.listener).filter(|_| walk.client.peer.trusted) {
            Some(listener) => headers::client(&walk.headers, |ip| listener.trusts(ip)),
            None => Some(origin.peer.ip()),
        };
        let Some(client) = client else { return Ok(()) };
        clients.ask(client).map_err(|limit| {
            self.shard.reached(limit, 1);
            Problem::TooManyRequests
        })
    }

    fn listener(&self, number: usize) -> Option<&Listener> {
        self.listeners.get(number).map(|(listener, _)| listener)
    }

    /// A limit was reached before there was a request.
    pub fn reached(&self, limit: Reached) {
        let (limit, times) = match limit {
            Reached::Connections => (Limit::Connections, 1),
            Reached::ListenerConnections => (Limit::ListenerConnections, 1),
            Reached::Idle => (Limit::Idle, 1),
            Reached::Requests => (Limit::RequestsPerConnection, 1),
            Reached::Streams(times) => (Limit::Streams, times),
            Reached::Handshakes => (Limit::TlsHandshakes, 1),
        };
        self.shard.reached(limit, times);
    }

    /// A client connected.
    pub fn client(
        &self,
        origin: Origin,
        certificate: Option<&ClientCertificate>,
        place: Place,
    ) -> Client {
        self.shard.connection_opened(origin.listener);
        let trusted =
            self.listener(origin.listener).is_some_and(|here| here.trusts(origin.peer.ip()));
        let mut peer = Peer::new(origin.peer, origin.local, trusted);
        if origin.secure {
            peer = peer.below_tls(certificate);
        }
        let http3 = self.listener(origin.listener).and_then(|listener| listener.http3);
        // What a proxy is told, it would tell whoever comes by it, of its own name.
        let http3 = http3.filter(|_| origin.secure && !trusted);
        let alternative = http3.and_then(|http3| relay::alternative(&http3, origin.local.port()));
        Client { peer, origin, alternative, shard: Arc::clone(&self.shard), _place: place }
    }

    /// A TLS handshake ended.
    pub fn shook_hands(&self, listener: usize, how: Handshake) {
        if how == Handshake::TimedOut {
            self.shard.reached(Limit::TlsHandshake, 1);
        }
        self.shard.shook_hands(
            listener,
            match how {
                Handshake::Done => HandshakeOutcome::Done,
                Handshake::Failed => HandshakeOutcome::Failed,
                Handshake::TimedOut => HandshakeOutcome::TimedOut,
            },
        );
    }

    /// Answers one request. Whatever happens inside is accounted for here, once.
    ///
    /// The walk is made before the future is, which would have room for what it is made of as well.
    pub fn call<'p>(
        &'p self,
        client: &'p Client,
        conn: &'p Rc<Conn>,
        request: Request<server::Incoming>,
    ) -> impl Future<Output = Response<ResponseBody>> {
        let (mut parts, body) = request.into_parts();
        let line = self.log.as_ref().map(|_| {
            // Boxed: it is moved from hand to hand until the answer is over.
            Box::new(Line::of(&parts.uri, parts.version, &parts.headers))
        });
        let mut walk = Walk {
            client,
            conn,
            method: parts.method,
            uri: parts.uri,
            version: parts.version,
            peculiar: Peculiar::of(&parts.headers),
            headers: parts.headers,
            upload: None,
            tries: SmallVec::new(),
            cluster: None,
            route: None,
            request: None,
            held: Duration::ZERO,
            host: None,
            upgrade: false,
            protocol: parts.extensions.remove(),
            preferred: None,
            reach_by: None,
            session: None,
            scope: None,
            outcome: None,
            fields: acknowledge::Fields::new(),
        };
        async move {
            let began = self.shard.request_began(conn.origin.listener);
            let answer = self.answer(&mut walk, body).await;
            // Not on its way out, nor to whoever came by it.
            let told = walk.version != Version::HTTP_3 && !conn.must_close();
            let alternative = client.alternative.as_ref().filter(|_| told);
            // The account tells when it ends. Until here, a client that leaves takes this along.
            began.answered();
            let received = walk.upload.as_ref().map_or(0, Upload::received);
            let mut facts = Facts {
                method: walk.method,
                line,
                cluster: walk
                    .cluster
                    .map(|cluster| (cluster.index, Arc::clone(&cluster.config.name))),
                route: walk.route,
                class: walk.request.map(|request| request.class),
                because: walk.request.map(|request| request.because),
                tries: walk.tries,
                held: walk.held,
                status: StatusCode::OK,
                problem: None,
                received,
            };
            let log = self.log.clone();
            match answer {
                Ok(Answer { response, mut connected, idle, arrived }) => {
                    if response.body().is_end_stream() {
                        // Nobody will ask for a frame of it.
                        connected.finish(arrived);
                    }
                    let mut response = response;
                    if let Some(alternative) = alternative {
                        // A node that has another does not know that there is litegate before it.
                        response.headers_mut().insert(header::ALT_SVC, alternative.clone());
                    }
                    facts.status = response.status();
                    let account =
                        Account::new(Rc::clone(conn), Arc::clone(&self.shard), log, facts);
                    let until_close = walk.version == Version::HTTP_10
                        && !response.headers().contains_key(header::CONTENT_LENGTH);
                    response.map(|incoming| {
                        ResponseBody::node(incoming, connected, idle, until_close, arrived, account)
                    })
                }
                Err(problem) => {
                    facts.status = problem.status();
                    facts.problem = Some(problem);
                    match problem {
                        Problem::BodyTimeout => self.shard.reached(Limit::BodyIdle, 1),
                        Problem::BodySlow => self.shard.reached(Limit::BodyRate, 1),
                        _ => {}
                    }
                    let last = facts.tries.last().map(|tried| Arc::clone(&tried.node));
                    let detail = last.map(|node| format!("{} on {node}", problem.as_str()));
                    let account =
                        Account::new(Rc::clone(conn), Arc::clone(&self.shard), log, facts);
                    let own = Own {
                        problem,
                        detail: detail.as_deref(),
                        html: relay::prefers_html(&walk.headers),
                        outcome: walk.outcome,
                        instance: &self.instance,
                        close: conn.must_close(),
                    };
                    let (mut response, body) = own.render();
                    for (name, value) in walk.fields {
                        response.headers_mut().append(name, value);
                    }
                    if let Some(alternative) = alternative {
                        response.headers_mut().insert(header::ALT_SVC, alternative.clone());
                    }
                    response.map(|()| ResponseBody::own(body, account))
                }
            }
        }
    }

    /// The walk of one request, from its head to an answer.
    async fn answer<'p>(
        &'p self,
        walk: &mut Walk<'p>,
        body: server::Incoming,
    ) -> Result<Answer, Problem> {
        self.ask(walk)?;
        self.inspect(walk, !body.is_end_stream())?;
        let host = walk.host.as_ref().and_then(|host| host.to_str().ok());
        let head = Head {
            method: &walk.method,
            host,
            path: walk.uri.path(),
            headers: &walk.headers,
            trusted: walk.client.peer.trusted,
            upgrade: walk.upgrade,
        };
        let paths = self.config.limits.ambiguous_paths;
        let route = decide::route::route(&head, &self.config.routes, paths)?;
        let mut cluster = self.clusters.get(route.cluster).ok_or(Problem::NoRoute)?;
        walk.cluster = Some(cluster);
        walk.route = route.index;
        let now = Instant::now();
        let region = cluster.next.primary_region.as_deref();
        let mut request = decide::classify::classify(
            &head,
            route,
            cluster.topology.borrow_mut().latest(),
            region,
        )?;
        walk.scope =
            route.causal.map(|scope| decide::route::scope(scope, route.index, walk.uri.path()));
        walk.meet(cluster, &mut request).await?;
        walk.request = Some(request);
        if walk.client.peer.trusted && request.class == Class::Read {
            walk.preferred = walk.headers.get(&PREFER_INSTANCE).cloned();
        }
        cluster.budget.borrow_mut().request(now.into_std());
        if !body.is_end_stream() {
            let (conn, kept) = (Rc::clone(walk.conn), Rc::clone(&self.kept));
            let limits = &self.config.limits;
            let pace = pace::Rules { idle: limits.body_idle, rate: limits.body_rate as u64 };
            let buffer = cluster.config.replay.buffer;
            walk.upload = Some(Upload::new(body, conn, kept, buffer, pace, now));
        }

        let mut history = History::default();
        let without_txid = walk.session.as_ref().is_some_and(|session| session.drop_txid);
        let mut extra = Extra { without_txid, ..Extra::default() };
        let mut cause = Cause::First;
        let mut held: Option<hold::Place> = None;
        let deadline = now + cluster.config.hold.timeout;
        // Whoever comes while others wait goes behind them.
        let mut wait =
            (request.class == Class::Write && cluster.hold.is_busy()).then_some(HoldFor::Primary);
        // The clock is read once for each turn of the loop and once for each answer.
        let mut now = now;
        if let Some(upload) = walk.upload.as_ref().filter(|_| request.class == Class::Write)
            // Where a slot is free there is one for the last of it too, as good as always.
            && cluster.writes.is_full()
            // What the client has yet to send after `100 Continue`, the node has to ask for.
            && !server::expects_continue(&walk.headers)
        {
            if let Some(later) = upload.gather(now + GATHER).await {
                now = later;
            }
            if upload.is_broken() {
                return Err(Problem::Malformed);
            }
        }
        loop {
            if let (Class::Read, Some(HoldFor::Pause(length))) = (request.class, wait) {
                // Not among those who wait for a primary: they may have long to wait.
                wait = None;
                let began = now;
                self.pause(cluster, length).await;
                now = Instant::now();
                walk.held += now - began;
                if now >= deadline {
                    return Err(history.expired.unwrap_or(Problem::NoReader));
                }
                if let Some(session) = &mut walk.session {
                    session.judge_again(cluster).await;
                    request.demands.position = session.needs() || session.unread;
                }
            }
            if let Some(hold) = wait.take() {
                let began = Instant::now();
                let until = walk.reach_by.map_or(deadline, |by| by.min(deadline));
                let result = self.hold(walk, cluster, &history, hold, until, &mut held).await;
                let waited = began.elapsed();
                walk.held += waited;
                let outcome = match result {
                    Ok(()) => HoldOutcome::Resumed,
                    Err(Problem::HoldFull) => HoldOutcome::Overflow,
                    Err(_) => HoldOutcome::Expired,
                };
                self.shard.held(cluster.index, outcome, waited);
                result?;
                now = Instant::now();
                match &mut walk.session {
                    Some(session) if session.unread => {
                        walk.meet(cluster, &mut request).await?;
                    }
                    Some(session) => {
                        session.judge_again(cluster).await;
                        request.demands.position &= session.needs();
                    }
                    None => {}
                }
            }
            let session = walk.session.as_deref();
            let choice = cluster.look(now, session, request.demands, |topology, loads| {
                let chance = fastrand::u64(..);
                let (rules, now) = (&cluster.rules, now.into_std());
                let choice = decide::choose::choose(
                    &request, topology, &history, rules, loads, chance, now,
                )?;
                Ok::<_, Problem>(match choice {
                    Choice::Hold(hold) => Err(hold),
                    Choice::Node { index, .. } => {
                        let role = topology.nodes.get(index).map_or(Role::Unknown, |n| n.role);
                        extra.preferred_unavailable =
                            walk.preferred.clone().filter(|name| !is_at(topology, index, name));
                        Ok((index, role))
                    }
                })
            })?;
            let (index, role) = match choice {
                Ok(chosen) => {
                    cluster.take_turn();
                    chosen
                }
                Err(HoldFor::Position) => {
                    self.wait_for_position(walk, cluster, now).await;
                    history.waited = true;
                    now = Instant::now();
                    if let Some(session) = &mut walk.session {
                        session.judge_again(cluster).await;
                        request.demands.position = session.needs();
                    }
                    continue;
                }
                Err(hold) => {
                    if request.class == Class::Read && request.wanted == Wanted::Any {
                        history.expired = Some(Problem::NotCaughtUp);
                    }
                    wait = Some(hold);
                    continue;
                }
            };
            if request.demands.position {
                cluster.token_read(match role {
                    Role::Primary => TokenRead::Primary,
                    _ if history.waited => TokenRead::Waited,
                    _ => TokenRead::Fresh,
                });
            }
            // The snapshot was followed within `look`, and nothing ran in between.
            let node = cluster.node(index).ok_or(Problem::Internal)?;
            let mut tried = Attempt { node: node.id, role, cause, ended: Ended::Replayed };
            let before = match request.class {
                Class::Write => Before::of(&node.load.progress.get(), role == Role::Primary),
                Class::Read => Before::default(),
            };
            let outcome = {
                let turn = Turn { request: &request, extra: &extra, role, now };
                self.attempt(walk, cluster, &node, turn, &mut held).await
            };
            let chosen = std::mem::replace(&mut now, Instant::now());
            let (response, connection, places, took) = match outcome {
                Ok((response, connection, places, began)) => {
                    (response, connection, places, now - began)
                }
                Err(Trouble::Client(problem)) => return Err(problem),
                Err(Trouble::Paused) => {
                    wait = Some(HoldFor::Primary);
                    continue;
                }
                Err(Trouble::Node(failure)) => {
                    tried.ended = Ended::Failed(failure);
                    walk.tried(&mut history, &node, tried);
                    report(cluster, &node, failure);
                    let had_fallen_back = history.fell_back;
                    let outcome = Outcome::Failed(failure);
                    let next = match self.next(walk, cluster, &request, &mut history, outcome) {
                        Err(problem) if request.class == Class::Write && failure.written => {
                            let before = &before;
                            let failed = outcome::Failed { cluster, node: &node, before, failure };
                            let until = route.retry_uncommitted.then_some(deadline);
                            if !self.is_to_repeat(walk, &history, &failed, until).await {
                                return Err(problem);
                            }
                            Next::Hold(HoldFor::Primary)
                        }
                        next => next?,
                    };
                    if history.fell_back && !had_fallen_back {
                        let reason = match failure.kind {
                            FailureKind::ConnectTimeout => "timeout",
                            _ => "retries_exhausted",
                        };
                        let sender = walk.sender();
                        let failed = replay::failed(&node.name, &sender, reason, now - chosen);
                        extra.replay_failed = Some(failed);
                    }
                    // What the replay said was about its target; a write that gets nowhere is
                    // still to fail as early as it said.
                    extra.transform = None;
                    if history.fell_back || request.class == Class::Read {
                        walk.reach_by = None;
                    }
                    match next {
                        Next::Hold(hold) => wait = Some(hold),
                        _ => self.shard.retried(cluster.index, request.class),
                    }
                    cause = Cause::Retry;
                    continue;
                }
            };
            node.load.answered(took, now);
            node.load.cells.attempt(Ok(response.status()), took);
            let connected = Connected::new(connection, Rc::clone(&node), places);

            let said = Said::of(response.headers());
            let is_right = if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                walk.may_switch(response.headers())
            } else {
                said.framed
            };
            if !is_right {
                tried.ended =
                    Ended::Failed(Failure { kind: FailureKind::BadResponse, written: true });
                walk.tried(&mut history, &node, tried);
                return Err(Problem::BadResponse);
            }
            let form = said.form(response.headers(), cluster.config.replay.json);
            if form == Form::None || response.status() == StatusCode::SWITCHING_PROTOCOLS {
                tried.ended = Ended::Answered(response.status());
                walk.tried(&mut history, &node, tried);
                let outcome = Outcome::Answered(response.status());
                if request.demands.position && self.has_gone_back(walk, cluster, &node) {
                    // Its data changed under the request. Bounded like every retry.
                    if history.attempts.len() < GONE_BACK {
                        cause = Cause::Retry;
                        continue;
                    }
                    return Err(Problem::NotCaughtUp);
                }
                if self.next(walk, cluster, &request, &mut history, outcome)? == Next::Relay {
                    let succeeded =
                        response.status().is_success() || response.status().is_redirection();
                    if request.class == Class::Write
                        && succeeded
                        && outcome::is_left_behind(cluster, &node, &before)
                    {
                        // It is on that node's disk, and nowhere else.
                        self.tell(walk, cluster, WriteOutcome::Unknown);
                        return Err(Problem::MaybeExecuted);
                    }
                    let (node, before, head) = (&*node, &before, response.headers());
                    let answered = Answered { node, before, head, said };
                    self.acknowledge(walk, cluster, &request, answered).await?;
                    return Ok(self.relay(walk, cluster, response, said, connected, now));
                }
                self.shard.retried(cluster.index, request.class);
                report_gateway(cluster, &node);
                cause = Cause::Retry;
                continue;
            }
            let replay = read_replay(form, response, connected, &walk.method).await;
            walk.tried(&mut history, &node, tried);
            if let Ok(replay) = &replay {
                hint(cluster, replay);
            }
            let outcome = Outcome::Replay(replay.as_ref().map_err(|error| *error));
            let next = self.next(walk, cluster, &request, &mut history, outcome);
            self.shard.replayed(
                cluster.index,
                match &next {
                    Err(_) => ReplayOutcome::Refused,
                    Ok(Next::Hold(_)) => ReplayOutcome::Held,
                    Ok(_) => ReplayOutcome::Followed,
                },
            );
            let next = next?;
            match next {
                Next::Hold(hold) => wait = Some(hold),
                Next::OtherCluster => {
                    let app = replay.as_ref().ok().and_then(|replay| replay.app.as_deref());
                    cluster = self.named(app)?;
                    walk.cluster = Some(cluster);
                    history.attempts.clear();
                    held = None;
                }
                _ => {}
            }
            if let Ok(replay) = replay {
                extra.replay_src = Some(source(&node, &replay));
                walk.reach_by = replay.timeout.map(|timeout| Instant::now() + timeout);
                if let Some(name) = &replay.prefer_instance {
                    walk.preferred = HeaderValue::from_str(name).ok();
                }
                if replay.cached {
                    self.shard.replay_cache_ignored(cluster.index);
                }
                extra.transform = None;
                if history.fell_back {
                    let target = replay.instance.as_deref().unwrap_or_default();
                    let failed = replay::failed(target, &node.name, "no_candidate", Duration::ZERO);
                    extra.replay_failed = Some(failed);
                    walk.reach_by = None;
                } else if !matches!(next, Next::Hold(_)) {
                    extra.transform = replay.transform.map(Box::new);
                }
            }
            cause = Cause::Replay;
        }
    }

    /// What can be said of a head without routes.
    fn inspect(&self, walk: &mut Walk<'_>, has_body: bool) -> Result<(), Problem> {
        let target = walk.uri.path_and_query().map_or(0, |target| target.as_str().len());
        if target > self.config.limits.uri_bytes {
            self.shard.reached(Limit::UriBytes, 1);
            return Err(Problem::UriTooLong);
        }
        if matches!(walk.version, Version::HTTP_2 | Version::HTTP_3) {
            self.inspect_h2(walk)?;
        }
        if walk.method == Method::CONNECT {
            return Err(Problem::MethodRefused);
        }
        if walk.peculiar.coded {
            strict::coding(&walk.headers)?;
        }
        if walk.peculiar.expects {
            // RFC 9110 section 10.1.1: HTTP/1.0 did not know it yet, and it is about a body.
            if walk.version != Version::HTTP_10 {
                strict::expectation(&walk.headers)?;
            }
            if walk.version == Version::HTTP_10 || !has_body {
                walk.headers.remove(header::EXPECT);
                walk.peculiar.expects = false;
            }
        }
        if walk.peculiar.underscored {
            self.inspect_names(walk)?;
        }
        // RFC 9112 section 3.2.4.
        if walk.uri.path() == "*" && walk.method != Method::OPTIONS {
            return Err(Problem::Malformed);
        }
        let hosts = walk.peculiar.hosts.then(|| walk.headers.get_all(header::HOST));
        let mut hosts = hosts.iter().flatten();
        let host = hosts.next();
        // RFC 9112 section 3.2: exactly one, with HTTP/1.1.
        if hosts.next().is_some() || (host.is_none() && walk.version == Version::HTTP_11) {
            return Err(Problem::Malformed);
        }
        // Of one that was asked for before nothing is wrong.
        let checked = |host: &[u8]| {
            let known = walk.client.peer.asked_for(host);
            known.or_else(|| HeaderValue::from_bytes(host).ok().filter(|_| strict::is_host(host)))
        };
        if let Some(host) = host {
            walk.host = Some(checked(host.as_bytes()).ok_or(Problem::Malformed)?);
        }
        if let Some(authority) = walk.uri.authority() {
            // RFC 9112 section 3.2.3: without a scheme it is for CONNECT alone.
            if !matches!(walk.uri.scheme_str(), Some("http" | "https")) {
                return Err(Problem::Malformed);
            }
            // RFC 9110 section 4.2.4: one with a user in it is meant to deceive.
            let authority = checked(authority.as_str().as_bytes()).ok_or(Problem::Malformed)?;
            // Absolute form: its authority outranks `Host`, and the node gets the origin form.
            walk.host = Some(authority);
            // RFC 9112 section 3.2.4: an absolute form without a path is about the server as a whole.
            // `http` knows no other than a slash for it. HTTP/2 and HTTP/3 say what they mean, and a
            // browser's preflight for the root means the root (RFC 9113 section 8.3.1).
            let asterisk = walk.version <= Version::HTTP_11
                && walk.method == Method::OPTIONS
                && walk.uri.path_and_query().is_none_or(|target| target.as_str() == "/");
            let target = match walk.uri.path_and_query() {
                _ if asterisk => PathAndQuery::from_static("*"),
                Some(target) => target.clone(),
                None => PathAndQuery::from_static("/"),
            };
            walk.uri = Uri::from(target);
            // RFC 9113 section 8.3.1: a path is not empty. `http` drops a fragment, and a path that
            // was nothing else is `/` for as long as there is a scheme.
            if walk.uri.path().is_empty() {
                return Err(Problem::Malformed);
            }
        }
        if walk.peculiar.passed {
            let via = self.via.as_bytes();
            let passed = walk.headers.get_all(header::VIA).iter().any(|line| {
                line.as_bytes().split(|byte| *byte == b',').any(|hop| hop.trim_ascii() == via)
            });
            if passed {
                return Err(Problem::Loop);
            }
        }
        walk.upgrade |= walk.version == Version::HTTP_11
            && walk.peculiar.upgrades
            && headers::wants_upgrade(&walk.headers);
        Ok(())
    }

    /// What `limits.underscores` says.
    fn inspect_names(&self, walk: &mut Walk<'_>) -> Result<(), Problem> {
        match self.config.limits.underscores {
            Underscores::Allow => return Ok(()),
            Underscores::Refuse => return Err(Problem::UnderscoreField),
            Underscores::Drop => {}
        }
        let names = walk.headers.keys().filter(|name| strict::is_underscored(name));
        for name in names.cloned().collect::<SmallVec<[_; 4]>>() {
            walk.headers.remove(name);
            self.shard.underscores_dropped.add(1);
        }
        Ok(())
    }

    /// What HTTP/2 and HTTP/3 say otherwise than HTTP/1.1, in the words of the latter.
    fn inspect_h2(&self, walk: &mut Walk<'_>) -> Result<(), Problem> {
        let limits = &self.config.limits;
        // RFC 9113 section 6.5.2 bounds their size, and nobody their number.
        let over = if walk.headers.len() > limits.headers {
            Some(Limit::Headers)
        } else if headers::h2_size(&walk.headers) > limits.header_bytes {
            Some(Limit::HeaderBytes)
        } else {
            None
        };
        if let Some(limit) = over {
            self.shard.reached(limit, 1);
            return Err(Problem::HeadTooLarge);
        }
        if walk.peculiar.quoted {
            return Err(Problem::Malformed);
        }
        // RFC 9113 section 8.3.1: all but CONNECT have a path. h2 asks it of http and https alone.
        if walk.method != Method::CONNECT && walk.uri.path().is_empty() {
            return Err(Problem::Malformed);
        }
        // h2 holds the body to the first of them, and a node of HTTP/1.1 to any.
        if walk.peculiar.sized && !strict::has_one_length(&walk.headers) {
            return Err(Problem::Malformed);
        }
        let authority = walk.uri.authority().map(Authority::as_str);
        let host = walk.peculiar.hosts.then(|| walk.headers.get(header::HOST)).flatten();
        match (authority, host.map(HeaderValue::as_bytes)) {
            (None, None) => return Err(Problem::Malformed),
            // RFC 9113 section 8.3.1: they must not differ.
            (Some(authority), Some(host)) if !host.eq_ignore_ascii_case(authority.as_bytes()) => {
                return Err(Problem::Malformed);
            }
            _ => {}
        }
        if walk.peculiar.cookies {
            headers::join_cookies(&mut walk.headers);
        }
        if let Some(protocol) = walk.protocol.take() {
            // RFC 8441: a WebSocket over one stream. Nodes know it as an upgrade.
            if walk.method != Method::CONNECT || protocol.as_str() != "websocket" {
                return Err(Problem::MethodRefused);
            }
            walk.method = Method::GET;
            walk.upgrade = true;
            headers::ask_for_websocket(&mut walk.headers, fastrand::u128(..));
        }
        Ok(())
    }

    /// Waits for what `hold` says, in the order of arrival.
    async fn hold(
        &self,
        walk: &Walk<'_>,
        cluster: &Cluster,
        history: &History,
        hold: HoldFor,
        deadline: Instant,
        held: &mut Option<hold::Place>,
    ) -> Result<(), Problem> {
        let mut place = if let Some(place) = held.take() {
            place
        } else {
            // What the body may take while it waits: no more than is kept of any.
            let buffer = cluster.config.replay.buffer;
            cluster.hold.join(walk.upload.as_ref().map_or(0, |upload| upload.expected(buffer)))?
        };
        let mut topology = cluster.topology.borrow().clone();
        let not_before = match hold {
            HoldFor::Primary => None,
            HoldFor::Pause(length) => Some(Instant::now() + length),
            // It has a bell of its own.
            HoldFor::Position => return Ok(()),
        };
        let needs_primary = hold == HoldFor::Primary;
        let ready = |topology: &Topology| !needs_primary || topology.primary.is_some();
        let expired = |topology: &Topology| match (history.expired, topology.primary_gap) {
            (Some(problem), _) => problem,
            (None, PrimaryGap::SplitBrain) => Problem::SplitBrain,
            (None, _) => Problem::NoPrimary,
        };
        let wait = place.wait(&mut topology, deadline, not_before, ready, expired);
        match &walk.upload {
            // What the client has yet to send after `100 Continue`, the node has to ask for.
            Some(upload) if !walk.peculiar.expects => tokio::select! {
                result = wait => result?,
                never = std::future::poll_fn(|cx| upload.poll_ahead(cx)) => match never {},
            },
            _ => wait.await?,
        }
        *held = Some(place);
        Ok(())
    }

    /// Waits for newer beliefs, at most this long.
    async fn pause(&self, cluster: &Cluster, length: Duration) {
        let mut topology = cluster.topology.borrow().clone();
        let seen = topology.latest().generation;
        let _ = timeout(length, topology.newer_than(seen)).await;
    }

    /// Waits a little for a replica to have what the client's token stands for.
    async fn wait_for_position(&self, walk: &mut Walk<'_>, cluster: &Cluster, now: Instant) {
        let Some(session) = &mut walk.session else { return };
        let rules = &cluster.config.consistency;
        let until = *session.wait_until.get_or_insert(now + rules.wait);
        if session.needs() {
            cluster.reached(session, until).await;
        }
        walk.held += now.elapsed();
    }

    /// Whether a node that was chosen for a client's token does not have what the token stands for
    /// any more: a failover may put it on another branch while it answers.
    fn has_gone_back(&self, walk: &Walk<'_>, cluster: &Cluster, node: &Node) -> bool {
        let Some(session) = &walk.session else { return false };
        let here = node.load.progress.get();
        cluster.history(|_, primary| {
            if primary.is_some_and(|primary| Arc::ptr_eq(primary, &node.load.progress)) {
                return here.is_primary == Some(false);
            }
            let primary = primary.map(|primary| primary.get());
            session.reach(&here, primary.as_deref().map(|known| &**known)) != Reach::Reached
        })
    }

    /// After a write that failed when bytes of it had left: whether it provably did not run, and
    /// may run again because its route said so, with `until`. Tells the client otherwise.
    async fn is_to_repeat(
        &self,
        walk: &mut Walk<'_>,
        history: &History,
        failed: &outcome::Failed<'_>,
        until: Option<Instant>,
    ) -> bool {
        let replayable = walk.upload.as_ref().is_none_or(Upload::is_replayable);
        let until = until.filter(|_| replayable);
        let outcome = failed.settled(history, until).await;
        let repeats = until.is_some() && outcome == WriteOutcome::NotCommitted;
        if repeats {
            self.shard.unanswered(failed.cluster.index, Unanswered::Repeated);
        } else {
            self.tell(walk, failed.cluster, outcome);
        }
        repeats
    }

    /// Tells the client what became of its write.
    fn tell(&self, walk: &mut Walk<'_>, cluster: &Cluster, outcome: WriteOutcome) {
        let counted = match outcome {
            WriteOutcome::NotCommitted => Unanswered::NotCommitted,
            WriteOutcome::Unknown => Unanswered::Unknown,
        };
        self.shard.unanswered(cluster.index, counted);
        walk.outcome = Some(outcome);
        walk.fields.push(outcome::field(outcome));
    }

    /// What the answer tells the client of what it wrote.
    ///
    /// # Errors
    /// [`Problem::NotDurable`].
    async fn acknowledge(
        &self,
        walk: &mut Walk<'_>,
        cluster: &Cluster,
        request: &decide::Request,
        answered: Answered<'_>,
    ) -> Result<(), Problem> {
        let Answered { node, before, head, said } = answered;
        if let Some(session) = &mut walk.session {
            session.judge_again(cluster).await;
        }
        let is_write = request.class == Class::Write && !walk.upgrade;
        let wrote = acknowledge::wrote(head, said, is_write);
        let lost = walk.session.as_ref().is_some_and(|session| session.lost);
        if !wrote && !lost {
            return Ok(());
        }
        let secure = walk.is_secure();
        let to = acknowledge::To {
            cluster,
            progress: &node.load.progress,
            head,
            cookie: cluster.cookie(secure),
            secure,
            scope: walk.scope,
            before,
            carried: walk.session.as_ref().and_then(|session| session.need.as_ref()),
        };
        let mut fields = std::mem::take(&mut walk.fields);
        if lost {
            to.lost(&mut fields, wrote);
        }
        let result = if wrote { to.acknowledge(&mut fields).await } else { Ok(()) };
        walk.fields = fields;
        result
    }

    /// Takes the places that an attempt needs and makes it.
    async fn attempt(
        &self,
        walk: &Walk<'_>,
        cluster: &Cluster,
        node: &Rc<Node>,
        turn: Turn<'_>,
        held: &mut Option<hold::Place>,
    ) -> Result<
        (Response<Incoming>, Box<crate::upstream::Connection<body::RequestBody>>, Places, Instant),
        Trouble,
    > {
        let Turn { request, extra, role, now: mut began } = turn;
        let is_write = request.class == Class::Write && !walk.upgrade;
        let wait = cluster.config.max_writes_wait;
        let slot = if !is_write {
            Slot::Free
        } else if walk.upload.as_ref().is_some_and(|upload| !upload.is_complete()) {
            Slot::Later(Rc::clone(&cluster.writes), wait)
        } else {
            let turn = if let Some(place) = cluster.writes.try_enter() {
                Ok(Ok(place))
            } else {
                let turn = timeout(wait, cluster.writes.enter()).await;
                began = Instant::now();
                turn
            };
            Slot::Taken(turn.ok().and_then(Result::ok).ok_or(Trouble::Client(Problem::WritesFull))?)
        };
        let full = Failure { kind: FailureKind::NodeFull, written: false };
        let place = if let Some(place) = node.gate.try_enter() {
            place
        } else {
            let turn = timeout(wait, node.gate.enter()).await;
            began = Instant::now();
            turn.ok().and_then(Result::ok).ok_or(Trouble::Node(full))?
        };
        let lane = if is_write {
            let write = || Write {
                method: walk.method.clone(),
                uri: walk.uri.clone(),
                node: Arc::clone(&node.name),
                since: began,
            };
            Some(cluster.lane.enter(write).ok_or(Trouble::Paused)?)
        } else {
            None
        };
        let timeouts = &cluster.config.timeouts;
        let is_lost = |now: Instant| match (request.class, role) {
            (Class::Write, Role::Primary) => !cluster.is_primary(node.id),
            (Class::Write, _) => false,
            (Class::Read, _) => cluster.is_silent_alone(node.id, now),
        };
        let websocket = walk.upgrade && is_websocket(&walk.method, &walk.headers);
        let this = Try {
            conn: walk.conn,
            upload: walk.upload.as_ref(),
            offer: match cluster.config.upstream.protocol {
                UpstreamProtocol::H2 if !walk.upgrade || websocket => Offer::H2,
                UpstreamProtocol::Auto if !walk.upgrade || websocket => Offer::Either,
                // Any other upgrade is HTTP/1.1's.
                _ => Offer::Http1,
            },
            websocket,
            speaks_for: walk.client.introduction(cluster.config.send_proxy),
            expects_continue: walk.peculiar.expects,
            interim: walk.version != Version::HTTP_10,
            began,
            connect: walk.reach_by.map_or(timeouts.connect, |by| {
                timeouts.connect.min(by.saturating_duration_since(began))
            }),
            response_header: timeouts.response_header,
            idle: timeouts.idle,
            is_lost: &is_lost,
        };
        let message = |body| {
            let mut message = Request::new(body);
            *message.method_mut() = walk.method.clone();
            let path = extra.transform.as_ref().and_then(|transform| transform.path.clone());
            *message.uri_mut() = path.map_or_else(|| walk.uri.clone(), Uri::from);
            let mut head = headers::upstream(
                &walk.headers,
                walk.host.as_ref(),
                &walk.client.peer,
                walk.upgrade,
                &self.via,
                extra,
            );
            if let Some(upload) = &walk.upload
                && !upload.has_length()
            {
                // Without it hyper would take a GET to have no body.
                head.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            *message.headers_mut() = head;
            message
        };
        let slot = match &walk.upload {
            Some(upload) => {
                upload.set_slot(slot);
                Slot::Free
            }
            None => slot,
        };
        let result = attempt::run(&this, node, message).await;
        // Answered is done: the token of a write stands for what there was when it was answered.
        drop(slot);
        if let Some(upload) = &walk.upload {
            upload.set_slot(Slot::Free);
        }
        let (response, connection) = result?;
        let places = Places { node: place, lane, held: held.take() };
        Ok((response, connection, places, began))
    }

    /// Asks what follows, with everything that the decision needs.
    fn next(
        &self,
        walk: &Walk<'_>,
        cluster: &Cluster,
        request: &decide::Request,
        history: &mut History,
        outcome: Outcome<'_>,
    ) -> Result<Next, Problem> {
        let replayable = walk.upload.as_ref().is_none_or(Upload::is_replayable);
        let may_retry = || {
            let allowed = cluster.budget.borrow_mut().retry(Instant::now().into_std());
            if !allowed {
                self.shard.retry_refused(cluster.index, RetryRefusal::Budget);
            }
            allowed
        };
        let failed = match outcome {
            Outcome::Failed(failure) => Some(failure),
            _ => None,
        };
        let mut topology = cluster.topology.borrow_mut();
        let topology = topology.latest();
        let next = decide::next::next(
            request,
            history,
            outcome,
            topology,
            &cluster.next,
            replayable,
            may_retry,
        );
        if let (Err(_), Some(failure)) = (&next, failed) {
            if !replayable {
                self.shard.retry_refused(cluster.index, RetryRefusal::Body);
            } else if request.class == Class::Write && failure.written && !request.idempotent {
                self.shard.retry_refused(cluster.index, RetryRefusal::MaybeExecuted);
            }
        }
        next
    }

    /// Makes a node's answer the client's.
    fn relay(
        &self,
        walk: &mut Walk<'_>,
        cluster: &Cluster,
        mut response: Response<Incoming>,
        said: Said,
        connected: Connected,
        arrived: Instant,
    ) -> Answer {
        let status = response.status();
        let switching = status == StatusCode::SWITCHING_PROTOCOLS && walk.upgrade;
        let head = response.headers_mut();
        headers::downstream(head, said, switching, cluster.config.replay.pass, &self.via);
        if status == StatusCode::NO_CONTENT {
            // RFC 9110 section 8.6: a client that believed it would take the next answer for the
            // body of this one.
            head.remove(header::CONTENT_LENGTH);
        }
        for (name, value) in walk.fields.drain(..) {
            head.append(name, value);
        }
        if let Some(upload) = &walk.upload {
            upload.settle();
        }
        let mut connected = connected;
        if switching {
            let protocol = head.get(header::UPGRADE);
            debug_assert!(protocol.is_some(), "a 101 names its protocol");
            let websocket =
                protocol.is_some_and(|p| p.as_bytes().eq_ignore_ascii_case(b"websocket"));
            connected = self.tunnel(walk, cluster, connected, websocket);
            if matches!(walk.version, Version::HTTP_2 | Version::HTTP_3) {
                // RFC 8441 section 5: as a CONNECT is answered.
                headers::switched_h2(head);
                *response.status_mut() = StatusCode::OK;
            }
        } else if walk.conn.must_close() {
            head.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        *response.version_mut() = Version::HTTP_11;
        let timeouts = &cluster.config.timeouts;
        let idle = if said.events { timeouts.stream_idle } else { timeouts.idle };
        Answer { response, connected, idle, arrived }
    }

    /// After the 101 the two sockets are joined. One that may write follows the primary; the
    /// others stay with their node.
    fn tunnel(
        &self,
        walk: &Walk<'_>,
        cluster: &Cluster,
        mut connected: Connected,
        websocket: bool,
    ) -> Connected {
        let timeouts = &cluster.config.timeouts;
        let (idle, window) = (timeouts.tunnel_idle, timeouts.tunnel_close);
        let drained = self.config.server.drain.timeout / 2;
        let (shard, conn) = (Arc::clone(&self.shard), Rc::clone(walk.conn));
        let writes = walk.request.is_none_or(|request| request.class == Class::Write);
        let (topology, id) = (cluster.topology.borrow().clone(), connected.node.id);
        if let Some(connection) = connected.take_connection() {
            walk.conn.take_over(Box::new(move |client, from_client| {
                Box::pin(async move {
                    shard.tunnels.add(1);
                    let Some((node, from_node, carrier)) = connection.into_stream().await else {
                        shard.tunnels.sub(1);
                        return;
                    };
                    let share = fastrand::f64();
                    let leave = async {
                        let demoted = async {
                            if !writes {
                                std::future::pending::<()>().await;
                            }
                            upgrade::demoted(topology, id, window, share).await;
                        };
                        tokio::select! {
                            () = demoted => Leave::Demoted,
                            () = conn.drained() => {
                                // So that what is left of the drain is enough for the last ones.
                                sleep(window.min(drained).mul_f64(share)).await;
                                Leave::Draining
                            }
                        }
                    };
                    let sides = Sides { client, from_client, node, from_node, websocket };
                    let left = upgrade::join(sides, idle, leave).await;
                    drop(carrier);
                    shard.tunnels.sub(1);
                    if let Some(left) = left {
                        shard.tunnel_closed(left);
                    }
                })
            }));
        }
        connected
    }

    fn named(&self, app: Option<&str>) -> Result<&Cluster, Problem> {
        let app = app.ok_or(Problem::ReplayTarget)?;
        let mut all = self.clusters.iter();
        all.find(|cluster| cluster.config.name.eq_ignore_ascii_case(app))
            .ok_or(Problem::ReplayTarget)
    }
}

/// Everything about one request that outlives a turn of the loop.
struct Walk<'p> {
    client: &'p Client,
    conn: &'p Rc<Conn>,
    method: Method,
    /// In origin form.
    uri: Uri,
    version: Version,
    /// As the client sent them.
    headers: http::HeaderMap,
    host: Option<HeaderValue>,
    /// What there is among them.
    peculiar: Peculiar,
    upgrade: bool,
    /// What an extended CONNECT wants to become.
    protocol: Option<Protocol>,
    upload: Option<Upload>,
    cluster: Option<&'p Cluster>,
    route: Option<usize>,
    request: Option<decide::Request>,
    tries: SmallVec<[Tried; 2]>,
    held: Duration,
    /// The node that a replay or a trusted peer would rather have: others are told of it.
    preferred: Option<HeaderValue>,
    /// Until when the target of a replay is to be reached, by the replay's own words.
    reach_by: Option<Instant>,
    /// What the client has to see. `None`: nothing in particular.
    session: Option<Box<Session>>,
    /// What it has in common with others, on a route whose reads see each other's writes.
    scope: Option<u64>,
    /// What became of it, if it was a write that failed after bytes of it had left.
    outcome: Option<WriteOutcome>,
    /// What the answer gets on top of the node's fields.
    fields: acknowledge::Fields,
}

impl Walk<'_> {
    /// Reads what the client has to see of the cluster, and notes in `request` what a read must find.
    async fn meet(
        &mut self,
        cluster: &Cluster,
        request: &mut decide::Request,
    ) -> Result<(), Problem> {
        let (peculiar, trusted, scope) = (self.peculiar, self.client.peer.trusted, self.scope);
        let is_plain = !peculiar.cookies && !peculiar.addressed && scope.is_none();
        if is_plain && request.demands == decide::Demands::default() {
            // Most requests: for them, nothing is looked up, and no future is made.
            self.session = None;
            return Ok(());
        }
        let cookie = cluster.cookie(self.is_secure());
        let headers = &self.headers;
        self.session =
            session::of(headers, peculiar, trusted, cluster, cookie, scope, request).await?;
        Ok(())
    }

    /// Whether the client came by https: by its own connection, or where a trusted proxy's word is
    /// there, by that.
    fn is_secure(&self) -> bool {
        let trusted = self.client.peer.trusted;
        let told = trusted.then(|| self.headers.get("x-forwarded-proto")).flatten();
        told.map_or(self.client.origin.secure, |proto| proto == "https")
    }

    /// Whether a node's 101 is what the client asked for. Another can't be passed on (RFC 9110
    /// sections 7.8 and 15.2.2).
    fn may_switch(&self, head: &http::HeaderMap) -> bool {
        self.upgrade && headers::is_asked_for(&self.headers, head)
    }

    /// The node whose replay was followed last.
    fn sender(&self) -> Arc<str> {
        let replayed = self.tries.iter().rev().find(|tried| tried.ended == Ended::Replayed);
        replayed.map_or_else(|| Arc::from(""), |tried| Arc::clone(&tried.node))
    }

    fn tried(&mut self, history: &mut History, node: &Rc<Node>, attempt: Attempt) {
        history.attempts.push(attempt);
        let Attempt { role, cause, ended, .. } = attempt;
        self.tries.push(Tried { node: Arc::clone(&node.name), role, cause, ended });
    }
}

/// How long a write that has to wait for a slot waits for the rest of its body before it is sent
/// without: who sends body and head one after the other is waited for, and one that waits for an
/// answer before it sends more gets one.
const GATHER: Duration = Duration::from_millis(100);
/// Attempts after which a read whose nodes keep going back is given up.
const GONE_BACK: usize = 4;

/// What one turn of the loop decided from.
struct Turn<'a> {
    request: &'a decide::Request,
    extra: &'a Extra,
    /// What the node is believed to be.
    role: Role,
    now: Instant,
}

/// What a node said to a request.
struct Answered<'a> {
    node: &'a Node,
    /// Where it was before.
    before: &'a Before,
    head: &'a http::HeaderMap,
    said: Said,
}

/// A node's answer, ready for the client.
struct Answer {
    response: Response<Incoming>,
    connected: Connected,
    idle: Duration,
    /// When its head came.
    arrived: Instant,
}

/// Tells discovery of a failed attempt.
fn report(cluster: &Cluster, node: &Node, failure: Failure) {
    node.load.cells.attempt(Err(failure.kind), Duration::ZERO);
    let connect = matches!(
        failure.kind,
        FailureKind::ConnectRefused
            | FailureKind::ConnectTimeout
            | FailureKind::Certificate
            | FailureKind::Tls
    );
    if failure.kind != FailureKind::NodeFull && failure.kind != FailureKind::StaleConnection {
        cluster.observer.observe(Saw::Failed { node: node.id, connect }, Source::Traffic);
    }
}

/// Tells discovery of a gateway error.
fn report_gateway(cluster: &Cluster, node: &Node) {
    cluster.observer.observe(Saw::Failed { node: node.id, connect: false }, Source::Traffic);
}

/// The name in a replay is evidence of who is primary.
fn hint(cluster: &Cluster, replay: &Replay) {
    if let Some(name) = replay.instance.as_deref().filter(|name| !name.is_empty()) {
        cluster.observer.observe(Saw::PrimaryHint(name.into()), Source::Replay);
    }
}

/// Whether the node at that place goes by that name.
fn is_at(topology: &Topology, index: usize, name: &HeaderValue) -> bool {
    let named = name.to_str().ok().and_then(|name| topology.named(name.trim()));
    named.is_some_and(|named| topology.nodes.get(index).is_some_and(|node| node.id == named.id))
}

/// `fly-replay-src` for the next attempt.
fn source(node: &Node, replay: &Replay) -> HeaderValue {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let micros = now.map_or(0, |since| since.as_micros());
    replay::src(&node.name, micros, replay.state.as_deref())
}

/// Reads what a node asks for, and lets go of its answer: the connection is kept where that is
/// whole already.
async fn read_replay(
    form: Form,
    response: Response<Incoming>,
    mut connected: Connected,
    method: &Method,
) -> Result<Replay, ReplayError> {
    let (parts, mut body) = response.into_parts();
    if form == Form::Header {
        if body.is_end_stream() {
            connected.finish(Instant::now());
        }
        return replay::from_head(&parts.headers);
    }
    if *method == Method::HEAD {
        return if parts.headers.contains_key(&replay::FLY_REPLAY) {
            replay::from_head(&parts.headers)
        } else {
            Err(ReplayError::NoBody)
        };
    }
    let mut json = Vec::new();
    loop {
        let frame = std::future::poll_fn(|cx| {
            let first = std::pin::Pin::new(&mut body).poll_frame(cx);
            if first.is_ready() {
                return first;
            }
            connected.poll(cx);
            std::pin::Pin::new(&mut body).poll_frame(cx)
        });
        match timeout(JSON_WAIT, frame).await {
            Ok(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    json.extend_from_slice(data);
                }
                if json.len() > replay::JSON_BYTES {
                    return Err(ReplayError::TooLong);
                }
            }
            Ok(None) => break,
            Ok(Some(Err(_))) | Err(_) => return Err(ReplayError::BadJson),
        }
    }
    let encoded = parts
        .headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"));
    replay::from_json(&json, encoded)
}

/// How long the JSON of a replay may take.
const JSON_WAIT: Duration = Duration::from_secs(5);
