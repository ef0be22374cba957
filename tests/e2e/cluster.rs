//! Three nodes of LiteFS, each with its proxy, its API and the app on its FUSE mount.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    consul::{Consul, Relay},
    http::{self, Request},
    process::{Process, component, eventually, free_port},
};

/// Three nodes, and a fourth address that one can move to.
pub(crate) const ADDRESSES: [IpAddr; 4] =
    [node_address(1), node_address(2), node_address(3), node_address(4)];

const fn node_address(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 1, last))
}

/// The node that holds the static lease, or takes the first one from Consul.
pub(crate) const PRIMARY: usize = 0;

/// What the temporary directories' names begin with; the test run's process id follows.
const PREFIX: &str = "litegate-e2e-";

/// How long LiteFS may take to mount, sync and start the app. A node that was primary has to wait
/// for the end of its own lease (22 s).
const START: Duration = Duration::from_mins(1);

/// How long LiteFS may take to leave after SIGTERM, its app's last requests included.
const STOP: Duration = Duration::from_secs(20);

/// How long a healthy node may take to say who it is.
const INFO: Duration = Duration::from_secs(1);

/// A cluster whose nodes share three ports, as pods do.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    ports: Ports,
    /// Consul, and each node's way to it; without it the first node is primary for ever.
    leases: Option<(Consul, Vec<Relay>)>,
    /// The app's tables are there.
    created: bool,
    directory: TempDir,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    proxy: u16,
    api: u16,
    app: u16,
}

#[derive(Debug)]
struct Node {
    name: String,
    ip: IpAddr,
    mount: PathBuf,
    process: Option<Process>,
}

impl Cluster {
    /// Starts three nodes, of which the first is primary, and waits until all of them serve.
    pub(crate) fn start() -> Self {
        let mut cluster = Self::prepare();
        for node in 0..3 {
            cluster.spawn(node);
        }
        for node in 0..3 {
            cluster.wait_for(node);
        }
        cluster
    }

    /// The same with a lease from Consul, which the first node gets first.
    pub(crate) fn start_with_consul() -> Self {
        let mut cluster = Self::prepare();
        let consul = Consul::start(cluster.directory());
        let relays = (0..3).map(|_| Relay::start(consul.address())).collect();
        cluster.leases = Some((consul, relays));
        cluster.spawn(PRIMARY);
        cluster.wait_for(PRIMARY);
        cluster.created = true;
        for node in [1, 2] {
            cluster.spawn(node);
        }
        for node in [1, 2] {
            cluster.wait_for(node);
        }
        cluster
    }

    fn prepare() -> Self {
        remove_what_dead_runs_left();
        let directory = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir()
            .expect("create a temporary directory");
        let ports = Ports {
            proxy: free_port(&ADDRESSES),
            api: free_port(&ADDRESSES),
            app: free_port(&ADDRESSES),
        };
        let nodes = ADDRESSES[..3]
            .iter()
            .enumerate()
            .map(|(i, &ip)| {
                let name = format!("abaci-app-{i}");
                let mount = directory.path().join(&name).join("mnt");
                Node { name, ip, mount, process: None }
            })
            .collect();
        Self { nodes, ports, leases: None, created: false, directory }
    }

    /// The Consul agent that grants the lease.
    pub(crate) fn consul(&self) -> &Consul {
        &self.leases.as_ref().expect("this cluster has a lease from Consul").0
    }

    /// A node's way to Consul.
    pub(crate) fn relay(&self, node: usize) -> &Relay {
        &self.leases.as_ref().expect("this cluster has a lease from Consul").1[node]
    }

    /// The nodes that say of themselves that they are primary, just now.
    pub(crate) fn claimants(&self) -> Vec<usize> {
        (0..3).filter(|node| claims(self.api(*node))).collect()
    }

    /// The only node that claims to be primary, once there is one.
    pub(crate) fn primary(&self) -> usize {
        eventually("one node is primary", START, || match self.claimants()[..] {
            [primary] => Ok(primary),
            ref claimants => Err(format!("{claimants:?}")),
        })
    }

    /// Where logs and configurations of this test go.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn name(&self, node: usize) -> &str {
        &self.nodes[node].name
    }

    pub(crate) fn ip(&self, node: usize) -> IpAddr {
        self.nodes[node].ip
    }

    /// LiteFS's own proxy on this node.
    pub(crate) fn proxy(&self, node: usize) -> SocketAddr {
        SocketAddr::new(self.nodes[node].ip, self.ports.proxy)
    }

    /// The port of LiteFS's own proxy, on every node.
    pub(crate) fn proxy_port(&self) -> u16 {
        self.ports.proxy
    }

    /// The port of LiteFS's API, on every node.
    pub(crate) fn api_port(&self) -> u16 {
        self.ports.api
    }

    /// LiteFS's API on this node.
    pub(crate) fn api(&self, node: usize) -> SocketAddr {
        SocketAddr::new(self.nodes[node].ip, self.ports.api)
    }

    /// The app's port, on every node.
    pub(crate) fn app_port(&self) -> u16 {
        self.ports.app
    }

    /// The app on this node, with nothing in between.
    pub(crate) fn app(&self, node: usize) -> SocketAddr {
        SocketAddr::new(self.nodes[node].ip, self.ports.app)
    }

    /// The rows with this id, as the primary's app has them.
    pub(crate) fn rows(&self, id: &str) -> Vec<serde_json::Value> {
        let answer =
            http::get(self.app(PRIMARY), &format!("/w/{id}")).expect("ask the primary's app");
        match answer.json() {
            Ok(serde_json::Value::Array(rows)) => rows,
            other => panic!("rows of {id}: {other:?}"),
        }
    }

    /// Every id with its number of rows, as the primary's app has them.
    pub(crate) fn ids(&self) -> Ids {
        self.ids_of(PRIMARY).expect("ask the primary's app")
    }

    fn ids_of(&self, node: usize) -> Result<Ids, String> {
        let answer = http::get(self.app(node), "/ids").map_err(|error| error.to_string())?;
        match answer.json()? {
            serde_json::Value::Object(ids) => Ok(ids),
            other => Err(format!("ids: {other}")),
        }
    }

    /// Every id with its number of rows, once all nodes have the same.
    pub(crate) fn agreed_ids(&self) -> Ids {
        eventually("all nodes have the same rows", START, || {
            let first = self.ids_of(0)?;
            for node in [1, 2] {
                let ids = self.ids_of(node)?;
                if ids != first {
                    return Err(format!("{} of {node} and {} of 0", ids.len(), first.len()));
                }
            }
            Ok(first)
        })
    }

    /// SIGKILL for LiteFS and its app together.
    pub(crate) fn kill(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        if let Some(mut process) = node.process.take() {
            process.kill();
        }
        unmount(&node.mount);
    }

    /// SIGTERM for LiteFS, which passes it to its app: the end of a pod.
    pub(crate) fn terminate(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        if let Some(mut process) = node.process.take() {
            process.terminate(STOP);
        }
        unmount(&node.mount);
    }

    /// SIGSTOP for LiteFS and its app together.
    pub(crate) fn freeze(&self, node: usize) {
        self.nodes[node].process.as_ref().expect("it runs").freeze();
    }

    /// SIGCONT for both.
    pub(crate) fn thaw(&self, node: usize) {
        self.nodes[node].process.as_ref().expect("it runs").thaw();
    }

    /// Starts the nodes again that have ended by themselves, as Kubernetes would: LiteFS leaves when
    /// it is deposed in the middle of a commit. Says how many.
    pub(crate) fn revive(&mut self) -> usize {
        let ended = self.ended();
        for node in &ended {
            self.kill(*node);
            self.spawn(*node);
            self.wait_for(*node);
        }
        ended.len()
    }

    /// The nodes that have ended by themselves.
    pub(crate) fn ended(&mut self) -> Vec<usize> {
        let ended = |node: &mut Node| node.process.as_mut().is_some_and(|p| !p.is_running());
        (0..3).filter(|i| ended(&mut self.nodes[*i])).collect()
    }

    /// Starts a killed node again with the data it had, without waiting for it.
    pub(crate) fn spawn(&mut self, node: usize) {
        let config = self.write_config(node);
        let log = self.directory.path().join(format!("{}.log", self.name(node)));
        let args = ["mount", "-config", config.to_str().expect("temporary paths are UTF-8")];
        let process = Process::start(self.name(node), &component("litefs"), &args, &log);
        self.nodes[node].process = Some(process.serving(&self.nodes[node].mount));
    }

    /// Waits until this node's app answers through LiteFS's proxy and has the database.
    pub(crate) fn wait_for(&mut self, node: usize) {
        let (proxy, name) = (self.proxy(node), self.name(node).to_owned());
        let process = &mut self.nodes[node].process;
        eventually(&format!("{name} serves"), START, || {
            let process = process.as_mut().ok_or("it was not started")?;
            assert!(process.is_running(), "{name} has ended:\n{}", process.log());
            match http::get(proxy, "/ids") {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(format!("{} {}", answer.status, answer.text())),
                Err(error) => Err(error.to_string()),
            }
        });
    }

    /// Kills a node and starts it with another address, as Kubernetes does with a pod whose
    /// machine is gone.
    pub(crate) fn move_to(&mut self, node: usize, ip: IpAddr) {
        self.kill(node);
        self.nodes[node].ip = ip;
        self.spawn(node);
        self.wait_for(node);
    }

    fn write_config(&self, index: usize) -> PathBuf {
        let node = &self.nodes[index];
        let home = self.directory.path().join(&node.name);
        let data = home.join("data");
        fs::create_dir_all(&node.mount).expect("create the mount point");
        fs::create_dir_all(&data).expect("create the data directory");

        let (ip, mount) = (node.ip, node.mount.display());
        let Ports { proxy, api, app } = self.ports;
        let create = index == PRIMARY && !self.created;
        let lease = match &self.leases {
            // Under a static lease hostname and advertise-url are the primary's, on every node.
            None => format!(
                r#"type: "static"
  candidate: {is_primary}
  hostname: "{primary}"
  advertise-url: "http://{primary_ip}:{api}""#,
                is_primary = index == PRIMARY,
                primary = self.nodes[PRIMARY].name,
                primary_ip = self.nodes[PRIMARY].ip,
            ),
            Some((consul, relays)) => format!(
                r#"type: "consul"
  candidate: true
  hostname: "{name}"
  advertise-url: "http://{ip}:{api}"
  consul: {{ url: "http://{relay}", key: "{key}", ttl: "10s", lock-delay: "1s" }}"#,
                name = node.name,
                relay = relays[index].address(),
                key = consul.key(),
            ),
        };
        // The default, which the times of a failover follow from; a static primary is met sooner.
        let reconnect = if self.leases.is_some() { "1s" } else { "200ms" };
        let mut config = String::new();
        write!(
            config,
            r#"fuse: {{ dir: "{mount}" }}
data: {{ dir: "{data}" }}
http: {{ addr: "{ip}:{api}" }}
proxy:
  addr: "{ip}:{proxy}"
  target: "{ip}:{app}"
  db: "abaci.db"
lease:
  {lease}
  reconnect-delay: "{reconnect}"
exec: "{program} -addr {ip}:{app} -db {mount}/abaci.db -node {name} -create={create}"
"#,
            data = data.display(),
            program = component("abaci").display(),
            name = node.name,
        )
        .expect("writing to a string succeeds");
        let path = home.join("litefs.yml");
        fs::write(&path, config).expect("write litefs.yml");
        path
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Replicas first: one that has lost its primary takes longer to leave.
        for node in self.nodes.iter_mut().rev() {
            drop(node.process.take());
            unmount(&node.mount);
        }
    }
}

/// Every id with its number of rows.
pub(crate) type Ids = serde_json::Map<String, serde_json::Value>;

/// Whether the node with this API says that it is primary.
pub(crate) fn claims(api: SocketAddr) -> bool {
    let answer = Request { path: "/info", timeout: INFO, ..Request::GET }.send(api);
    let info = answer.ok().and_then(|answer| answer.json().ok());
    info.is_some_and(|info| info["isPrimary"] == true)
}

/// Takes the mount away if LiteFS left it behind. Lazily: a dead FUSE mount can be busy for ever.
fn unmount(mount: &Path) {
    if mounts().any(|mounted| mounted == mount) {
        let _ = Command::new("fusermount3")
            .args(["-u", "-z", "-q", "--"])
            .arg(mount)
            .stdin(Stdio::null())
            .status();
    }
}

/// A run that was itself killed can leave `litegate-e2e-PID-*` in the temporary directory, with
/// dead mounts in it.
fn remove_what_dead_runs_left() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.split('-').next());
        if owner.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            mounts().filter(|mount| mount.starts_with(entry.path())).for_each(|m| unmount(&m));
            // Another test of this run may be at it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Where LiteFS is mounted on this machine.
fn mounts() -> impl Iterator<Item = PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.strip_prefix("litefs ")?.split(' ').next().map(PathBuf::from))
        .collect();
    mounts.into_iter()
}
