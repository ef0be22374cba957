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
    http,
    process::{Process, component, eventually, free_port},
};

/// Three nodes, and a fourth address that one can move to.
pub(crate) const ADDRESSES: [IpAddr; 4] =
    [node_address(1), node_address(2), node_address(3), node_address(4)];

const fn node_address(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 1, last))
}

/// The node that holds the static lease.
pub(crate) const PRIMARY: usize = 0;

/// What the temporary directories' names begin with; the test run's process id follows.
const PREFIX: &str = "litegate-e2e-";

/// How long LiteFS may take to mount, sync and start the app.
const START: Duration = Duration::from_secs(30);

/// A cluster whose nodes share three ports, as pods do.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    ports: Ports,
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
        let mut cluster = Self { nodes, ports, directory };
        for node in 0..3 {
            cluster.spawn(node);
        }
        for node in 0..3 {
            cluster.wait_for(node);
        }
        cluster
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
    pub(crate) fn ids(&self) -> serde_json::Map<String, serde_json::Value> {
        let answer = http::get(self.app(PRIMARY), "/ids").expect("ask the primary's app");
        match answer.json() {
            Ok(serde_json::Value::Object(ids)) => ids,
            other => panic!("ids: {other:?}"),
        }
    }

    /// SIGKILL for LiteFS and its app together.
    pub(crate) fn kill(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        if let Some(mut process) = node.process.take() {
            process.kill();
        }
        unmount(&node.mount);
    }

    /// Starts a killed node again with the data it had, without waiting for it.
    pub(crate) fn spawn(&mut self, node: usize) {
        let config = self.write_config(node);
        let log = self.directory.path().join(format!("{}.log", self.name(node)));
        let args = ["mount", "-config", config.to_str().expect("temporary paths are UTF-8")];
        self.nodes[node].process =
            Some(Process::start(self.name(node), &component("litefs"), &args, &log));
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

        let is_primary = index == PRIMARY;
        let (ip, mount) = (node.ip, node.mount.display());
        let Ports { proxy, api, app } = self.ports;
        let mut config = String::new();
        // Under a static lease hostname and advertise-url are the primary's, on every node.
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
  type: "static"
  candidate: {is_primary}
  hostname: "{primary}"
  advertise-url: "http://{primary_ip}:{api}"
  reconnect-delay: "200ms"
exec: "{program} -addr {ip}:{app} -db {mount}/abaci.db -node {name} -create={is_primary}"
"#,
            data = data.display(),
            primary = self.nodes[PRIMARY].name,
            primary_ip = self.nodes[PRIMARY].ip,
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
