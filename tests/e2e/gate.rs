//! litegate itself, as the binary that users run.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use crate::{
    cluster::Cluster,
    coredns::{CoreDns, HEADLESS, SRV},
    http::{self, Answer, Body},
    process::{Process, eventually, free_port},
};

/// A running `litegate run`.
#[derive(Debug)]
pub(crate) struct Gate {
    process: Process,
    address: SocketAddr,
    admin: SocketAddr,
}

/// `members`, as TOML.
pub(crate) fn listed(cluster: &Cluster) -> String {
    let nodes: Vec<String> = (0..3)
        .map(|i| format!(r#"{{ name = "{}", address = "{}" }}"#, cluster.name(i), cluster.ip(i)))
        .collect();
    format!(r#"{{ type = "static", nodes = [{}] }}"#, nodes.join(", "))
}

/// `members`, as TOML.
pub(crate) fn by_dns(dns: &CoreDns) -> String {
    format!(r#"{{ type = "dns", name = "{HEADLESS}.", resolvers = ["{}"] }}"#, dns.address())
}

/// `members`, as TOML.
pub(crate) fn by_srv(dns: &CoreDns) -> String {
    format!(r#"{{ type = "srv", name = "{SRV}.", resolvers = ["{}"] }}"#, dns.address())
}

/// `primary`, as TOML: LiteFS's own word.
pub(crate) fn by_litefs(cluster: &Cluster) -> String {
    format!(r#"{{ type = "litefs", port = {} }}"#, cluster.api_port())
}

/// `primary`, as TOML: the operator's word, which may be wrong.
pub(crate) fn instance(cluster: &Cluster, node: usize) -> String {
    format!(r#"{{ type = "instance", name = "{}" }}"#, cluster.name(node))
}

impl Gate {
    /// Starts litegate before LiteFS's proxies, and waits until it is ready.
    pub(crate) fn start(cluster: &Cluster, members: &str, primary: &str) -> Self {
        Self::with(cluster, cluster.proxy_port(), members, primary, "")
    }

    /// The same with another `port` for members that bring none of their own, and with `more` TOML.
    pub(crate) fn with(
        cluster: &Cluster,
        port: u16,
        members: &str,
        primary: &str,
        more: &str,
    ) -> Self {
        let loopback = [std::net::Ipv4Addr::LOCALHOST.into()];
        let address = SocketAddr::from((loopback[0], free_port(&loopback)));
        let admin = SocketAddr::from((loopback[0], free_port(&loopback)));
        let config = cluster.directory().join(format!("litegate-{}.toml", address.port()));
        let text = format!(
            r#"[[listener]]
address = "{address}"

[admin]
address = "{admin}"

[cluster.abaci]
port    = {port}
members = {members}
primary = {primary}

{more}
"#
        );
        fs::write(&config, text).expect("write litegate.toml");

        let program = Path::new(env!("CARGO_BIN_EXE_litegate"));
        let args = ["run", "--config", config.to_str().expect("temporary paths are UTF-8")];
        let log = config.with_extension("log");
        let mut gate =
            Self { process: Process::start("litegate", program, &args, &log), address, admin };
        eventually("litegate is ready", Duration::from_secs(20), || {
            assert!(gate.process.is_running(), "litegate has ended:\n{}", gate.process.log());
            match http::get(admin, "/readyz") {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(format!("/readyz: {} {}", answer.status, answer.text())),
                Err(error) => Err(error.to_string()),
            }
        });
        gate
    }

    /// Where clients come in.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A request through litegate that must get an answer of some kind.
    pub(crate) fn send(&self, method: &str, path: &str, body: Body) -> Answer {
        let answer = http::send(self.address, method, path, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        assert!(!answer.shows_a_replay(), "{method} {path}: {answer:?}");
        answer
    }

    /// The node that serves a read just now.
    pub(crate) fn read(&self) -> String {
        let answer = self.send("GET", "/whoami", Body::EMPTY);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.node().expect("the app names its node").to_owned()
    }

    /// Whom it believes to be primary, by `/api/topology`.
    pub(crate) fn primary(&self) -> Option<String> {
        primary_by(self.admin)
    }

    /// Its admin listener.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The sum of a metric over all its labels that `labels` occurs in.
    pub(crate) fn metric(&self, name: &str, labels: &str) -> f64 {
        let page = http::get(self.admin, "/metrics").expect("ask litegate's admin listener");
        let page = page.text();
        let samples = page.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (family, of) = series.split_once('{').unwrap_or((series, ""));
            (family == name && of.contains(labels)).then(|| value.parse::<f64>().ok())?
        });
        samples.sum()
    }

    /// Whether `/api/topology` calls its list of members stale.
    pub(crate) fn is_stale(&self) -> Result<bool, String> {
        let answer = http::get(self.admin, "/api/topology").map_err(|error| error.to_string())?;
        let topology = answer.json()?;
        find(&topology, "stale")
            .and_then(serde_json::Value::as_bool)
            .ok_or_else(|| format!("no `stale` in {topology}"))
    }

    /// The most memory that it has ever held, in bytes.
    pub(crate) fn peak_memory(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))
            .expect("litegate is running");
        let kib: usize = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
            .expect("Linux says VmHWM of every process");
        kib * 1024
    }
}

/// Whom the litegate with this admin listener believes to be primary.
pub(crate) fn primary_by(admin: SocketAddr) -> Option<String> {
    let topology = http::get(admin, "/api/topology").ok()?.json().ok()?;
    find(&topology, "primary")?.as_str().map(str::to_owned)
}

/// The first value of this key, however deep.
fn find<'a>(value: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    match value {
        serde_json::Value::Object(object) => {
            object.get(key).or_else(|| object.values().find_map(|inner| find(inner, key)))
        }
        serde_json::Value::Array(array) => array.iter().find_map(|inner| find(inner, key)),
        _ => None,
    }
}
