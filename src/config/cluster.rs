//! `[cluster.NAME]`: one single-writer system, and how it is treated.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use super::listener::Certificate;

/// Databases of one node that can be followed.
pub const DATABASES: usize = 16;

/// `[cluster.NAME]`
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// NAME
    pub name: Arc<str>,
    /// `port`: the app's (or LiteFS proxy's) port on every member, required. Members that bring a
    /// port of their own (SRV, static) keep it.
    pub port: u16,
    /// `members`, required.
    pub members: Members,
    /// `primary`: one source or a list of them, at least one. The `replay` source (learning from
    /// `fly-replay` answers) is always on and not written.
    pub primary: Vec<RoleSource>,
    /// `reads`
    pub reads: Reads,
    /// `balance`
    pub balance: Balance,
    /// `max_lag`: replicas further behind serve no reads.
    pub max_lag: Duration,
    /// `tripwire`: how many transactions a new primary may lack before an operator has to confirm
    /// it. Zero: any number, and whole databases.
    pub tripwire: u64,
    /// `soft_lag`: replicas further behind are the last choice.
    pub soft_lag: Duration,
    /// `prefer`
    pub prefer: Prefer,
    /// `slow_start`: a node that has just come up gets its full share after this long. Zero: at once.
    pub slow_start: Duration,
    /// `max_writes`: writes on the primary at once; more wait in order. Shared out evenly among
    /// the workers.
    pub max_writes: usize,
    /// `max_writes_wait`: how long a write waits for its turn before it gets 503.
    pub max_writes_wait: Duration,
    /// `max_requests`: requests in flight on one node. Shared out evenly among the workers.
    pub max_requests: usize,
    /// `max_pending`: requests that wait for a place on one node. Shared out likewise. Over it: 503.
    pub max_pending: usize,
    /// `max_idle`: kept-alive connections without a request, for each node and worker. Over it the
    /// one that was used longest ago is closed.
    pub max_idle: usize,
    /// `send_proxy`: whether connections to nodes begin with who the client is. They then carry
    /// requests of that client alone.
    pub send_proxy: SendProxy,
    /// `[cluster.NAME.upstream]`
    pub upstream: Upstream,
    /// `[cluster.NAME.timeouts]`
    pub timeouts: Timeouts,
    /// `[cluster.NAME.health]`
    pub health: Health,
    /// `[cluster.NAME.retry]`
    pub retry: Retry,
    /// `[cluster.NAME.replay]`
    pub replay: Replay,
    /// `[cluster.NAME.hold]`
    pub hold: Hold,
    /// `[cluster.NAME.consistency]`
    pub consistency: Consistency,
    /// `[cluster.NAME.durability]`
    pub durability: Durability,
}

impl Cluster {
    /// Whether anybody tells where the nodes' databases are.
    pub fn has_positions(&self) -> bool {
        self.primary.iter().any(|source| matches!(source, RoleSource::Litefs { .. }))
    }
}

/// `members`: who exists.
#[derive(Clone, Debug, PartialEq)]
pub enum Members {
    /// `{ type = "dns", name, resolvers }`: A and AAAA of a headless service.
    Dns(Lookup),
    /// `{ type = "srv", name, resolvers }`: names and ports too.
    Srv(Lookup),
    /// `{ type = "static", nodes = [{ name, address }] }`
    Static(Vec<StaticNode>),
}

/// A name and who is asked for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lookup {
    /// `name`
    pub name: Arc<str>,
    /// `resolvers`: addresses with ports. Empty: those of resolv.conf.
    pub resolvers: Vec<SocketAddr>,
}

/// `{ name, address, api, zone }`
#[derive(Clone, Debug, PartialEq)]
pub struct StaticNode {
    /// `name`: the instance name.
    pub name: Arc<str>,
    /// `address`: with the cluster's `port` where it is written without one.
    pub address: SocketAddr,
    /// `api`: this node's LiteFS API, where it is not on the node's IP with the source's port.
    pub api: Option<SocketAddr>,
    /// `zone`: where it runs, by whatever names the operator gives to zones.
    pub zone: Option<Arc<str>>,
    /// Whether that is `server.zone`.
    pub near: bool,
}

/// `primary`: who is primary.
#[derive(Clone, Debug, PartialEq)]
pub enum RoleSource {
    /// `{ type = "litefs", port = 20202, poll = "1s" }`
    Litefs {
        /// LiteFS's API on every member.
        port: u16,
        /// Between two `/info` requests to a node.
        poll: Duration,
    },
    /// `{ type = "instance", name }`
    Instance {
        /// The primary's instance name.
        name: Arc<str>,
    },
    /// `{ type = "dns", name, resolvers }`: a name that resolves to the primary only.
    Dns(Lookup),
    /// `{ type = "consul", address, key, token, datacenter }`: the lease key.
    Consul(Consul),
    /// `{ type = "http", path, port, interval, timeout }`: a path that answers 200 on the primary.
    Http {
        /// The path.
        path: Box<str>,
        /// On every member. `None`: where requests go.
        port: Option<u16>,
        /// Between two probes of a node.
        interval: Duration,
        /// Of a probe.
        timeout: Duration,
    },
    /// `{ type = "file", path, instance, interval }`: LiteFS's `.primary`, in a sidecar.
    File {
        /// Where it is.
        path: PathBuf,
        /// The instance name of the node whose mount it is. `None`: `HOSTNAME`.
        instance: Option<Arc<str>>,
        /// Between two readings.
        interval: Duration,
    },
}

impl RoleSource {
    /// Whether an answer to this one answers the other as well: how often they ask is no part of
    /// the question.
    pub fn asks_the_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Litefs { port, .. }, Self::Litefs { port: theirs, .. }) => port == theirs,
            (
                Self::Http { path, port, .. },
                Self::Http { path: their_path, port: their_port, .. },
            ) => (path, port) == (their_path, their_port),
            (
                Self::File { path, instance, .. },
                Self::File { path: their_path, instance: theirs, .. },
            ) => (path, instance) == (their_path, theirs),
            _ => self == other,
        }
    }
}

/// Where the lease key is.
#[derive(Clone, Debug, PartialEq)]
pub struct Consul {
    /// The host of `address`: a name or an IP address without brackets.
    pub host: Arc<str>,
    /// The port of `address`.
    pub port: u16,
    /// `key`: without a slash in front.
    pub key: Arc<str>,
    /// `token`: of an ACL that may read the key.
    pub token: Option<Secret>,
    /// `datacenter`: the agent's own where it is not written.
    pub datacenter: Option<Arc<str>>,
}

/// `reads`
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Reads {
    /// The primary serves reads only when no replica can.
    #[default]
    PreferReplicas,
    /// The primary never serves reads.
    Replicas,
    /// Every node serves reads.
    All,
    /// Only the primary serves reads.
    Primary,
}

/// `balance`
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Balance {
    /// Power of two choices over peak-EWMA latency times requests in flight.
    #[default]
    PeakEwma,
    /// Power of two choices over requests in flight.
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// Any.
    Random,
}

/// `prefer`
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Prefer {
    /// All alike.
    #[default]
    Any,
    /// The node whose instance name is this pod's `HOSTNAME`, while it may serve.
    Local,
}

/// `send_proxy`
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum SendProxy {
    /// They do not.
    #[default]
    Off,
    /// The PROXY protocol's version 1, a line of text.
    V1,
    /// Its version 2, binary.
    V2,
}

/// `[cluster.NAME.upstream]`: how nodes are spoken to.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Upstream {
    /// `protocol`
    pub protocol: UpstreamProtocol,
    /// `tls`. `None`: clear text.
    pub tls: Option<UpstreamTls>,
}

/// `[cluster.NAME.upstream.tls]`: TLS at the port where requests go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UpstreamTls {
    /// `ca`: who signs nodes' certificates. Empty: whoever the system trusts.
    pub ca: Vec<PathBuf>,
    /// `server_name`: what nodes' certificates are made out to. `None`: the name by which they are
    /// looked up, or a static node's IP address.
    pub server_name: Option<Arc<str>>,
    /// `certificate` and `key`: our own.
    pub own: Option<Certificate>,
    /// `insecure_skip_verify`: whoever answers is taken for the node.
    pub insecure_skip_verify: bool,
}

impl Cluster {
    /// The name that nodes' certificates must have. `None`: their IP addresses.
    pub fn server_name(&self) -> Option<&str> {
        let written = self.upstream.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
        written.or(match &self.members {
            Members::Dns(lookup) | Members::Srv(lookup) => {
                let mut domain = lookup.name.trim_end_matches('.');
                // `_http._tcp.abaci-app-headless`: certificates have the domain alone.
                while let Some((label, rest)) = domain.split_once('.')
                    && label.starts_with('_')
                {
                    domain = rest;
                }
                Some(domain)
            }
            Members::Static(_) => None,
        })
    }
}

/// `protocol`
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1
    #[default]
    Http1,
    /// HTTP/2, in clear text by prior knowledge. Upgrades that nodes do not take there go by
    /// HTTP/1.1.
    H2,
    /// Over TLS, what the node chooses.
    Auto,
}

/// `[cluster.NAME.timeouts]`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timeouts {
    /// `connect`
    pub connect: Duration,
    /// `response_header`: from the end of the request to the response head.
    pub response_header: Duration,
    /// `idle`: between two bytes of a body, and of an event stream `stream_idle`, on an upgraded
    /// connection `tunnel_idle` instead.
    pub idle: Duration,
    /// `stream_idle`: no byte of a response that is a `text/event-stream`.
    pub stream_idle: Duration,
    /// `tunnel_idle`: no byte either way on an upgraded connection.
    pub tunnel_idle: Duration,
    /// `tunnel_close`: over how long the upgraded connections to a node that is no longer primary
    /// are closed, one by one.
    pub tunnel_close: Duration,
    /// `pool_idle`: an unused connection to a node is closed after this long: before the node does.
    pub pool_idle: Duration,
}

/// `[cluster.NAME.health]`
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// `path`: of the active probe. `None`: no active probe.
    pub path: Option<Box<str>>,
    /// `interval`: between probes.
    pub interval: Duration,
    /// `timeout`: of a probe.
    pub timeout: Duration,
    /// `eject_after`: failures in a row. Zero: never.
    pub eject_after: u32,
    /// `eject_base`: how long the first ejection lasts.
    pub eject_base: Duration,
    /// `eject_longest`: how long any ejection lasts at most.
    pub eject_longest: Duration,
    /// `eject_max`: the share of the nodes that may be ejected at once, 0 to 1.
    pub eject_max: f64,
}

/// `[cluster.NAME.retry]`
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// `"connect"` in `on`: reads go to the next node after failures without an answer.
    pub on_connect: bool,
    /// The statuses in `on`.
    pub on_status: Vec<http::StatusCode>,
    /// `attempts`: tries in all, the first included, replays not.
    pub attempts: u32,
    /// `budget`: retries as a share of recent requests.
    pub budget: f64,
    /// `budget_min`: retries a second that are always allowed.
    pub budget_min: u32,
}

/// `[cluster.NAME.replay]`
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// `max_hops`: 0 to 10.
    pub max_hops: u32,
    /// `buffer`: bytes of a request body that are kept until the response head arrives.
    pub buffer: usize,
    /// `json`: whether the JSON body form is understood, `transform` included. Off by default:
    /// LiteFS never uses it.
    pub json: bool,
    /// `pass = true` hands `fly-replay*` response headers to the client untouched, for a Fly edge
    /// in front of litegate.
    pub pass: bool,
    /// `primary_region`: this region means the primary (fly-ruby and django-flyio send regions).
    pub primary_region: Option<Box<str>>,
}

/// `[cluster.NAME.hold]`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hold {
    /// `timeout`: how long a write waits for a primary. Zero: not at all.
    pub timeout: Duration,
    /// `max_requests`: waiting at once.
    pub max_requests: usize,
    /// `max_bytes`: their kept bodies together.
    pub max_bytes: usize,
    /// `release`: so many run at a time once the primary is back, until the queue is empty.
    pub release: usize,
}

/// `[cluster.NAME.consistency]`: how a client reads its own writes.
#[derive(Clone, Debug, PartialEq)]
pub struct Consistency {
    /// `mode`
    pub mode: Mode,
    /// `databases`: those that count, by name. Empty: every one that a node has, up to 16.
    pub databases: Arc<[Box<str>]>,
    /// `wait`: how long a read waits for a replica to catch up before the primary is asked.
    pub wait: Duration,
    /// `affinity`: how long a client's reads go to the primary after its write, where positions
    /// are not known.
    pub affinity: Duration,
    /// `token_age`: how long a client keeps its token.
    pub token_age: Duration,
    /// `key`: what tokens are signed with. `None`: derived from the cluster's id, so that all
    /// instances agree without talking.
    pub key: Option<Secret>,
    /// `cookie`: whether tokens travel as a cookie too, and not only as `Litegate-Token`.
    pub cookie: bool,
    /// `txid_cookie`: whether writes are answered with LiteFS's `__txid` cookie where the node did
    /// not set it.
    pub txid_cookie: bool,
    /// `on_request`: whose `Litegate-Consistency` and `Litegate-Max-Staleness` are heeded.
    pub on_request: OnRequest,
}

/// `mode`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// By the position of the client's last write.
    Token,
    /// The primary, for a while after a write.
    Affinity,
    /// Not at all.
    Off,
}

/// `on_request`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnRequest {
    /// Every client's.
    Any,
    /// Trusted proxies'.
    Trusted,
    /// Nobody's.
    Off,
}

/// Something that is not shown.
#[derive(Clone, PartialEq)]
pub struct Secret(Box<str>);

impl Secret {
    /// Keeps it.
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// What it is.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// `[cluster.NAME.durability]`: on how many replicas a write is before its client hears of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Durability {
    /// `replicas`. Zero: the primary's word is enough.
    pub replicas: usize,
    /// `timeout`: how long the answer waits for them.
    pub timeout: Duration,
    /// `on_timeout`
    pub on_timeout: OnTimeout,
}

/// `on_timeout`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnTimeout {
    /// The answer says so in `Litegate-Durability`.
    Warn,
    /// 504: the write is done, but not yet safe.
    Fail,
}
