//! A litegate in this process, before a fake cluster.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use litegate::{
    app::{self, Running},
    config::load,
    testkit::{
        Cluster, Options,
        client::{self, Conn, Response},
    },
};
use tokio::task::JoinHandle;

/// Cluster and gate, stopped when dropped.
pub(crate) struct Gate {
    pub(crate) cluster: Cluster,
    running: Option<Running>,
}

impl Gate {
    /// With LiteFS's API as the source of roles.
    pub(crate) async fn start() -> Self {
        Self::with(Options::default(), r#"primary = { type = "litefs", poll = "100ms" }"#).await
    }

    /// With these keys of the cluster's section.
    pub(crate) async fn with(options: Options, keys: &str) -> Self {
        Self::edited(options, keys, |text| text).await
    }

    /// With these keys of the cluster's section, and the whole file changed once more.
    pub(crate) async fn edited(
        options: Options,
        keys: &str,
        edit: impl FnOnce(String) -> String,
    ) -> Self {
        let cluster = Cluster::start(options).await.expect("loopback has ports");
        let text = edit(config(&cluster, keys));
        let gate = Self::before(cluster, &text);
        if keys.contains("litefs") {
            gate.until(|topology| topology.primary.is_some()).await;
        }
        gate
    }

    /// With a configuration of one's own; waits for nothing.
    pub(crate) fn before(cluster: Cluster, text: &str) -> Self {
        let config = load::parse("test.toml", text, []).unwrap_or_else(|faults| panic!("{faults}"));
        let running = app::start(config).expect("litegate starts");
        Self { cluster, running: Some(running) }
    }

    /// Another litegate before the same cluster, which stays the first one's.
    pub(crate) async fn beside(&self, keys: &str) -> Self {
        let gate = Self::before(Cluster::empty(), &config(&self.cluster, keys));
        gate.until(|topology| topology.primary.is_some()).await;
        gate
    }

    /// What the admin listener counts.
    pub(crate) async fn metrics(&self) -> String {
        let answer = client::request(self.admin(), "GET", "/metrics", "", b"").await;
        answer.expect("the admin listener answers").text()
    }

    /// The sum of a family's lines that contain `label`.
    pub(crate) async fn metric(&self, family: &str, label: &str) -> u64 {
        let metrics = self.metrics().await;
        let lines = metrics.lines().filter(|line| line.starts_with(family) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    pub(crate) fn running(&self) -> &Running {
        self.running.as_ref().expect("it runs until it is dropped")
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.running().listeners[0]
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.running().admin.expect("the admin listener is on")
    }

    /// Waits until what is believed is so.
    pub(crate) async fn until(&self, so: impl Fn(&litegate::topology::Topology) -> bool) {
        let mut reader = self.running().topologies[0].clone();
        let wait = async {
            loop {
                let seen = reader.latest().generation;
                if so(reader.latest()) {
                    return;
                }
                // A position gets on without a newer snapshot.
                let look = tokio::time::sleep(std::time::Duration::from_millis(20));
                tokio::select! {
                    newer = reader.newer_than(seen) => drop(newer.expect("discovery runs")),
                    () = look => {}
                }
            }
        };
        let mut last = self.running().topologies[0].clone();
        let in_time = tokio::time::timeout(std::time::Duration::from_secs(10), wait).await;
        assert!(in_time.is_ok(), "it is believed in time, but this is: {:#?}", last.latest());
    }

    pub(crate) async fn conn(&self) -> Conn {
        Conn::open(self.address()).await.expect("litegate listens")
    }

    pub(crate) async fn send(&self, method: &str, target: &str, body: &[u8]) -> Response {
        let response = client::request(self.address(), method, target, "", body).await;
        let response = response.unwrap_or_else(|error| panic!("{method} {target}: {error}"));
        assert_eq!(response.field("fly-replay"), None, "{method} {target}");
        response
    }

    /// Stops and takes the pieces apart.
    pub(crate) fn into_running(mut self) -> (Cluster, Running) {
        let running = self.running.take().expect("it runs until it is dropped");
        // The cluster moves out of a type with a destructor by being replaced.
        let cluster = std::mem::replace(&mut self.cluster, Cluster::empty());
        (cluster, running)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop();
            running.join();
        }
    }
}

/// A configuration for litegate before this cluster.
pub(crate) fn config(cluster: &Cluster, keys: &str) -> String {
    let nodes = cluster.places().iter().map(|place| {
        let (name, address, api) = (&place.name, place.proxy, place.api);
        format!(r#"{{ name = "{name}", address = "{address}", api = "{api}" }}"#)
    });
    let nodes = nodes.collect::<Vec<_>>().join(", ");
    format!(
        r#"[server]
workers = 2
drain = {{ delay = "0s", timeout = "10s" }}

[[listener]]
address = "127.0.0.1:0"

[admin]
address = "127.0.0.1:0"

[access_log]
format = "off"

[limits]
uri_bytes = "4KiB"
header_bytes = "16KiB"
header_read = "300ms"
body_idle = "2s"

[cluster.app]
port = 8080
members = {{ type = "static", nodes = [{nodes}] }}
{keys}
"#
    )
}

/// Six clients that write, each key once, and read, and that nothing may fail.
pub(crate) struct Writers {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<usize>>,
}

impl Writers {
    /// Through these litegates in turn; `query` goes behind each write's target.
    pub(crate) fn start(addresses: &[SocketAddr], query: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |client: usize| {
            let (address, stop) = (addresses[client % addresses.len()], Arc::clone(&stop));
            tokio::spawn(async move {
                let mut conn = Conn::open(address).await.expect("litegate listens");
                let mut written = 0;
                while !stop.load(Relaxed) {
                    let target = format!("/kv/{client}-{written}{query}");
                    let answer = conn.request("POST", &target, "", b"x").await.expect("an answer");
                    assert_eq!(answer.status, 200, "{target}: {}", answer.text());
                    written += 1;
                    let read = conn.request("GET", "/kv/first", "", b"").await.expect("an answer");
                    assert_eq!(read.status, 200);
                }
                written
            })
        };
        Self { clients: (0..6).map(client).collect(), stop }
    }

    /// Each of their writes, and the one before them, ran once and is on node `primary`.
    pub(crate) async fn finish(self, cluster: &Cluster, primary: usize) {
        self.stop.store(true, Relaxed);
        let mut all = 0;
        for client in self.clients {
            all += client.await.expect("it failed nothing");
        }
        cluster.settled().await;
        let ledger = cluster.ledger();
        assert_eq!(ledger.len(), all + 1, "each ran");
        for (key, written) in &ledger {
            assert_eq!(written.on.len(), 1, "{key} ran {:?}", written.on);
            assert_eq!(cluster.count(primary, key), 1, "{key} is lost");
        }
    }
}
