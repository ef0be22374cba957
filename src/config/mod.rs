//! What the operator wrote, and what the program runs on.
//!
//! A [`Config`] cannot be wrong: [`load`] parses a TOML file and the environment, and either
//! returns one or every [`Diagnostic`](diagnostic::Diagnostic) at once. Each section has a file of
//! its own with its written shape, its checked shape, its defaults and its tests.

pub mod admin;
pub mod cluster;
pub mod diagnostic;
pub mod limits;
pub mod listener;
pub mod load;
mod reader;
pub mod route;
pub mod schema;
pub mod server;
pub mod units;

/// The checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[server]`
    pub server: server::Server,
    /// `[[listener]]`, at least one.
    pub listeners: Vec<listener::Listener>,
    /// `[admin]`
    pub admin: admin::Admin,
    /// `[access_log]`
    pub access_log: admin::AccessLog,
    /// `[limits]`
    pub limits: limits::Limits,
    /// `[cluster.NAME]`, at least one, in the order of their names.
    pub clusters: Vec<cluster::Cluster>,
    /// `[[route]]` in file order: the first match wins. Where the file has none, one that sends
    /// everything to the only cluster.
    pub routes: Vec<route::Route>,
}

impl Config {
    /// The effective configuration, for people and `/api/config`. There is nothing secret in it.
    pub fn to_json(&self) -> serde_json::Value {
        let seconds = |duration: std::time::Duration| duration.as_secs_f64();
        let clusters = self.clusters.iter().map(|cluster| {
            let hold = &cluster.hold;
            let value = serde_json::json!({
                "port": cluster.port,
                "members": format!("{:?}", cluster.members),
                "primary": format!("{:?}", cluster.primary),
                "reads": format!("{:?}", cluster.reads),
                "balance": format!("{:?}", cluster.balance),
                "max_lag": seconds(cluster.max_lag),
                "soft_lag": seconds(cluster.soft_lag),
                "max_writes": cluster.max_writes,
                "max_requests": cluster.max_requests,
                "timeouts": {
                    "connect": seconds(cluster.timeouts.connect),
                    "response_header": seconds(cluster.timeouts.response_header),
                    "idle": seconds(cluster.timeouts.idle),
                    "stream_idle": seconds(cluster.timeouts.stream_idle),
                    "tunnel_idle": seconds(cluster.timeouts.tunnel_idle),
                    "tunnel_close": seconds(cluster.timeouts.tunnel_close),
                    "pool_idle": seconds(cluster.timeouts.pool_idle),
                },
                "replay": { "max_hops": cluster.replay.max_hops, "buffer": cluster.replay.buffer },
                "hold": {
                    "timeout": seconds(hold.timeout),
                    "max_requests": hold.max_requests,
                    "max_bytes": hold.max_bytes,
                    "release": hold.release,
                },
            });
            (cluster.name.to_string(), value)
        });
        serde_json::json!({
            "server": { "workers": self.server.workers.get(), "zone": self.server.zone.as_deref() },
            "listeners": self.listeners.iter().map(|l| l.address.to_string()).collect::<Vec<_>>(),
            "clusters": serde_json::Value::Object(clusters.collect()),
            "routes": self.routes.iter().map(|r| format!("{r:?}")).collect::<Vec<_>>(),
        })
    }
}
