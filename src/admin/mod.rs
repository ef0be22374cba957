//! The control room: health, metrics and what is believed. It reads; what changes anything is
//! asked for by POST, never by a page in a browser, and done by whoever wires.
//!
//! `GET /livez` · `/healthz` · `/readyz` · `/metrics` · `/api/topology` · `/api/config` · `/`;
//! `POST /api/confirm` · `/api/handoff` · `/api/drain`

use std::{
    convert::Infallible,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
};

use crate::{
    config::{Config, units},
    telemetry::metrics::{Metrics, Standing},
    topology::{Freshness, Node, Presence, PrimaryGap, Role, Topology, watch::Reader},
};

/// Connections at once; more wait in the kernel's backlog.
const CONNECTIONS: usize = 64;
/// How long an answer may wait for writes to finish.
const LONG_POLL: Duration = Duration::from_secs(2);
/// The longest name of a hand-over.
const ID: usize = 64;
/// How long a request head may take.
const HEAD: Duration = Duration::from_secs(5);

const PATHS: &[(&str, &str)] = &[
    ("/livez", "200 while the process runs"),
    ("/healthz", "the same"),
    ("/readyz", "200 when every cluster has been resolved and has a node that serves reads"),
    ("/metrics", "Prometheus text"),
    ("/api/topology", "what is believed of each cluster"),
    ("/api/config", "the configuration in force"),
    ("/api/confirm", "POST ?cluster=…&node=…: the new primary may lack data, writes go on"),
    ("/api/handoff", "POST ?cluster=…&from=…&to=…: another node becomes primary, no write is lost"),
    ("/api/handoff/hold", "POST ?cluster=…&id=…&for=…: hold writes, for a hand-over elsewhere"),
    ("/api/handoff/release", "POST ?cluster=…&id=…: let them go on"),
    ("/api/drain", "POST: leave, finishing what runs"),
];

/// What only the control plane can do.
#[derive(Debug)]
pub enum Asked {
    /// A planned hand-over.
    HandOver {
        /// The cluster.
        cluster: Arc<str>,
        /// How.
        wish: HandOver,
        /// Told when it is over.
        answer: oneshot::Sender<Answer>,
    },
    /// Writes are to wait, for a hand-over that another instance carries out.
    Hold {
        /// The cluster.
        cluster: Arc<str>,
        /// The name of the hand-over.
        by: String,
        /// For how long, unless it is renewed.
        lasts: Lasts,
        /// How long the answer may wait for writes under way.
        wait: Duration,
        /// Only if they wait already.
        renew: bool,
        /// Told when no write is under way any more, or that some are.
        answer: oneshot::Sender<Answer>,
    },
    /// Writes may go on.
    Release {
        /// The cluster.
        cluster: Arc<str>,
        /// The name of the hand-over.
        by: String,
        /// Not before this node is primary, or the time is up.
        primary: Option<String>,
        /// Told when they do.
        answer: oneshot::Sender<Answer>,
    },
    /// Leave, finishing what runs.
    Drain,
}

/// A planned hand-over, as it is asked for.
#[derive(Clone, Debug, Default)]
pub struct HandOver {
    /// Only if this node is primary.
    pub from: Option<String>,
    /// The node that takes over; else whichever is best.
    pub to: Option<String>,
    /// How long writes under way may take to finish.
    pub finish: Option<Duration>,
    /// Only say what would be done.
    pub check: bool,
    /// Writes are held already, under this name, and are to be for so long.
    pub under: Option<(String, Lasts)>,
}

/// How long writes are to be held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lasts {
    /// From now on. It may be later here than whoever asked thinks.
    For(Duration),
    /// From when they were first held: the same moment however late it is heard.
    Until(Duration),
}

/// What is said of something that was asked for.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// What happened.
    pub body: Value,
}

/// An operator says that a primary is right, whatever it lacks.
#[derive(Clone, Debug)]
pub struct Confirmed {
    /// The cluster.
    pub cluster: Arc<str>,
    /// The node.
    pub node: Arc<str>,
}

/// What the control room shows.
#[derive(Debug)]
pub struct Admin {
    metrics: Arc<Metrics>,
    clusters: Mutex<Vec<(Arc<str>, Reader)>>,
    config: Mutex<Arc<str>>,
    draining: AtomicBool,
    confirm: mpsc::Sender<Confirmed>,
    ask: mpsc::Sender<Asked>,
}

impl Admin {
    /// For a process that has just started.
    pub fn new(
        metrics: Arc<Metrics>,
        clusters: Vec<(Arc<str>, Reader)>,
        config: &Config,
        confirm: mpsc::Sender<Confirmed>,
        ask: mpsc::Sender<Asked>,
    ) -> Self {
        Self {
            metrics,
            clusters: Mutex::new(clusters),
            config: Mutex::new(render(config)),
            draining: AtomicBool::new(false),
            confirm,
            ask,
        }
    }

    /// After a reload.
    pub fn update(&self, clusters: Vec<(Arc<str>, Reader)>, config: &Config) {
        *self.clusters.lock().unwrap_or_else(PoisonError::into_inner) = clusters;
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = render(config);
    }

    /// From now on `/readyz` fails.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn clusters(&self) -> Vec<(Arc<str>, Reader)> {
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Only for a claimant that waits for it: a confirmation in advance would confirm whatever
    /// comes.
    fn confirm(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let parameter = |name| parameter(request, name);
        let (Some(cluster), Some(node)) = (parameter("cluster"), parameter("node")) else {
            return problem(StatusCode::BAD_REQUEST, "?cluster=…&node=… say which");
        };
        let mut clusters = self.clusters();
        let found = clusters.iter_mut().find(|(name, _)| **name == *cluster);
        let Some((cluster, reader)) = found else {
            return problem(StatusCode::NOT_FOUND, "no such cluster");
        };
        let topology = reader.latest();
        let waits = topology.primary.is_none() && topology.primary_gap == PrimaryGap::Tripped;
        let Some(node) = topology.nodes.iter().find(|n| waits && n.fenced && *n.name == *node)
        else {
            return problem(StatusCode::CONFLICT, "that node does not wait for a confirmation");
        };
        let confirmed = Confirmed { cluster: Arc::clone(cluster), node: Arc::clone(&node.name) };
        match self.confirm.try_send(confirmed) {
            Ok(()) => text(StatusCode::ACCEPTED, "text/plain", "confirmed\n".into()),
            Err(_) => busy(),
        }
    }

    /// Passes on what concerns a hand-over, and answers when that is done.
    async fn hand_over(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let mut clusters = self.clusters().into_iter().map(|(name, _)| name);
        let cluster = match parameter(request, "cluster") {
            Some(name) => clusters.find(|cluster| **cluster == *name),
            None => clusters.next().filter(|_| clusters.next().is_none()),
        };
        let Some(cluster) = cluster else {
            return problem(StatusCode::NOT_FOUND, "?cluster=… names none, or one of several");
        };
        let (answer, answered) = oneshot::channel();
        let asked = match asked(request, cluster, answer) {
            Ok(asked) => asked,
            Err(detail) => return problem(StatusCode::BAD_REQUEST, &detail),
        };
        // Whoever leaves still holds and lets go with the others: it has writes to finish.
        let leaves = matches!(asked, Asked::HandOver { .. });
        let goes = if leaves { self.ask(asked) } else { self.ask.try_send(asked).is_ok() };
        if !goes {
            return busy();
        }
        match answered.await {
            Ok(Answer { status, body }) => json(status, &body),
            Err(_) => busy(),
        }
    }

    fn drain(&self) -> Response<Full<Bytes>> {
        if self.draining.load(Ordering::Relaxed) || self.ask(Asked::Drain) {
            json(StatusCode::ACCEPTED, &json!({ "outcome": "draining" }))
        } else {
            busy()
        }
    }

    /// Whether somebody will see to it.
    fn ask(&self, asked: Asked) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.ask.try_send(asked).is_ok()
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if let "/api/confirm"
        | "/api/handoff"
        | "/api/handoff/hold"
        | "/api/handoff/release"
        | "/api/drain" = path
        {
            if *request.method() != Method::POST {
                let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "only POST");
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
                return response;
            }
            // No page in an operator's browser may do any of it.
            if request.headers().contains_key(header::ORIGIN) {
                return problem(StatusCode::FORBIDDEN, "not from a browser");
            }
            return match path {
                "/api/confirm" => self.confirm(request),
                "/api/drain" => self.drain(),
                _ => self.hand_over(request).await,
            };
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/livez" | "/healthz" => text(StatusCode::OK, "text/plain", "ok\n".into()),
            "/readyz" => self.ready(),
            "/metrics" => {
                let page = self.metrics.render(&mut self.clusters());
                text(StatusCode::OK, "text/plain; version=0.0.4", page)
            }
            "/api/topology" => {
                let all = self.clusters().into_iter().map(|(name, mut reader)| {
                    let standing = self.metrics.standing(&name);
                    (name.to_string(), topology(reader.latest(), standing))
                });
                json(StatusCode::OK, &Value::Object(all.collect()))
            }
            "/api/config" => {
                let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).to_string();
                text(StatusCode::OK, "application/json", config)
            }
            "/" => {
                let mut page = String::from("litegate\n\n");
                for (path, what) in PATHS {
                    let _ = writeln!(page, "{path:22}{what}");
                }
                text(StatusCode::OK, "text/plain", page)
            }
            _ => problem(StatusCode::NOT_FOUND, "GET / lists what there is"),
        }
    }

    /// Ready means that members are known and somebody can serve reads. The absence of a primary
    /// takes nobody out of rotation: its writes are held, here as in any other instance.
    fn ready(&self) -> Response<Full<Bytes>> {
        let mut reasons = Vec::new();
        if self.draining.load(Ordering::Relaxed) {
            reasons.push("draining".to_owned());
        }
        for (name, mut reader) in self.clusters() {
            let topology = reader.latest();
            if !topology.resolved {
                reasons.push(format!("cluster {name}: its members are not known yet"));
            } else if !topology.nodes.iter().any(|node| node.presence == Presence::Member) {
                reasons.push(format!("cluster {name}: it has no members"));
            }
        }
        if reasons.is_empty() {
            return text(StatusCode::OK, "text/plain", "ready\n".into());
        }
        let page = reasons.join("\n") + "\n";
        text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", page)
    }
}

fn render(config: &Config) -> Arc<str> {
    format!("{:#}\n", config.to_json()).into()
}

/// A snapshot in stable words.
fn topology(topology: &Topology, standing: Standing) -> Value {
    let gap = match topology.primary_gap {
        _ if topology.primary.is_some() => None,
        PrimaryGap::Unknown => Some("unknown"),
        PrimaryGap::NotAMember => Some("not-a-member"),
        PrimaryGap::Unreachable => Some("unreachable"),
        PrimaryGap::SplitBrain => Some("split-brain"),
        PrimaryGap::Tripped => Some("tripwire"),
    };
    let now = tokio::time::Instant::now().into_std();
    let nodes = topology.nodes.iter().map(|node| {
        json!({
            "name": &*node.name,
            "address": node.address.to_string(),
            "role": node.role.as_str(),
            "presence": if node.presence == Presence::Member { "member" } else { "draining" },
            "lag_seconds": node.lag.map(|lag| lag.as_secs_f64()),
            "freshness": match node.freshness {
                Freshness::Fresh => "fresh",
                Freshness::Behind => "behind",
                Freshness::TooFar => "too-far",
            },
            "healthy": node.is_healthy(now),
            "ejected": node.record.is_ejected(now),
            "local": node.local,
            "near": node.near,
            "fenced": node.fenced,
            "positions": positions(node),
        })
    });
    json!({
        "generation": topology.generation,
        "term": topology.term,
        "primary": topology.nodes.iter().find(|n| n.role == Role::Primary).map(|n| &*n.name),
        "no_primary_because": gap,
        "resolved": topology.resolved,
        "stale": topology.stale,
        "held": standing.held,
        "handing_over": standing.handing_over,
        "nodes": nodes.collect::<Vec<_>>(),
    })
}

/// How far each database of a node is, as far as is known.
fn positions(node: &Node) -> Value {
    let known = node.progress.get();
    let all = known.iter().map(|(_, name, at)| (name.to_owned(), at.to_string().into()));
    Value::Object(all.collect())
}

/// What the query of one of the three says.
fn asked(
    request: &Request<Incoming>,
    cluster: Arc<str>,
    answer: oneshot::Sender<Answer>,
) -> Result<Asked, String> {
    let owned = |name| parameter(request, name).map(ToOwned::to_owned);
    let length = |name| match parameter(request, name).map(units::duration) {
        None => Ok(None),
        Some(Ok(length)) => Ok(Some(length)),
        Some(Err(cure)) => Err(format!("{name}: {cure}")),
    };
    let lasts = || match (length("for")?, length("until")?) {
        (Some(length), None) => Ok(Lasts::For(length)),
        (None, Some(length)) => Ok(Lasts::Until(length)),
        _ => Err("either ?for=… or ?until=… says for how long, like 8s".to_owned()),
    };
    let flag = |name| parameter(request, name) == Some("true");
    let by = || match owned("id") {
        Some(id) if id.len() <= ID => Ok(id),
        _ => Err(format!("?id=… names the hand-over, in {ID} bytes at most")),
    };
    Ok(match request.uri().path() {
        "/api/handoff/hold" => Asked::Hold {
            cluster,
            by: by()?,
            lasts: lasts()?,
            wait: length("wait")?.unwrap_or_default().min(LONG_POLL),
            renew: flag("renew"),
            answer,
        },
        "/api/handoff/release" => {
            Asked::Release { cluster, by: by()?, primary: owned("primary"), answer }
        }
        _ => {
            let under = match parameter(request, "id") {
                None => None,
                Some(_) => Some((by()?, lasts()?)),
            };
            let wish = HandOver {
                from: owned("from"),
                to: owned("to"),
                finish: length("finish")?,
                check: flag("check"),
                under,
            };
            Asked::HandOver { cluster, wish, answer }
        }
    })
}

/// The first parameter of that name, as it stands in the query: names have nothing to decode.
fn parameter<'r>(request: &'r Request<Incoming>, name: &str) -> Option<&'r str> {
    let mut pairs = request.uri().query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, value)| *key == name && !value.is_empty()).map(|(_, value)| value)
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn json(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    text(status, "application/json", format!("{value:#}\n"))
}

fn busy() -> Response<Full<Bytes>> {
    problem(StatusCode::SERVICE_UNAVAILABLE, "busy, or about to stop")
}

fn problem(status: StatusCode, detail: &str) -> Response<Full<Bytes>> {
    let title = status.canonical_reason().unwrap_or("error");
    let body = json!({ "title": title, "status": status.as_u16(), "detail": detail });
    text(status, "application/problem+json", format!("{body}\n"))
}

/// Serves until the other end of `open` is dropped: then no more connections are taken, and those
/// that there are end with the answer they are at.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>, open: watch::Receiver<()>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut closed = std::pin::pin!(until_closed(open.clone()));
    loop {
        let accepted = tokio::select! {
            () = &mut closed => return,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, place)) = accepted else { continue };
        let (admin, open) = (Arc::clone(&admin), open.clone());
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let admin = Arc::clone(&admin);
                async move { Ok::<_, Infallible>(admin.answer(&request).await) }
            });
            let mut connection = std::pin::pin!(
                http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD)
                    .serve_connection(TokioIo::new(stream), service)
            );
            // How a scraper's connection ends is its own affair.
            tokio::select! {
                _ = connection.as_mut() => {}
                () = until_closed(open) => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
            drop(place);
        });
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    if let Ok((stream, _)) = listener.accept().await {
        return Some((stream, place));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    None
}

async fn until_closed(mut open: watch::Receiver<()>) {
    while open.changed().await.is_ok() {}
}
