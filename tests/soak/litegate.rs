//! The litegate under test: its process, its files, and what it says of itself.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;

use crate::{
    http::{self, Request},
    judge::HOLD,
    process::{Process, eventually, free_port},
    wire::Doors,
};

/// How long it may take to see that a file has changed, on a machine that has other things to do.
const NOTICE: Duration = Duration::from_secs(30);

/// What its configuration says of the world around it.
#[derive(Clone, Debug)]
pub(crate) struct World {
    /// `members` of the cluster under test, as TOML.
    pub(crate) members: String,
    /// Where Consul is.
    pub(crate) consul: SocketAddr,
    pub(crate) key: &'static str,
    /// `members` of the gRPC cluster.
    pub(crate) rpc: String,
}

/// A directory whose files change all at once, as Kubernetes' volumes do.
#[derive(Debug)]
struct Volume {
    path: PathBuf,
    version: u32,
}

impl Volume {
    fn new(path: PathBuf, files: &[(&str, String)]) -> Self {
        fs::create_dir_all(&path).expect("there is room");
        for (name, _) in files {
            symlink(format!("..data/{name}"), path.join(name)).expect("there is room");
        }
        let mut volume = Self { path, version: 0 };
        volume.swap(files);
        volume
    }

    /// Writes another version beside the one in force, and moves the one symlink over.
    fn swap(&mut self, files: &[(&str, String)]) {
        let old = format!("..{}", self.version);
        self.version += 1;
        let new = format!("..{}", self.version);
        fs::create_dir(self.path.join(&new)).expect("there is room");
        for (name, text) in files {
            fs::write(self.path.join(&new).join(name), text).expect("there is room");
        }
        let ahead = self.path.join("..data_tmp");
        symlink(&new, &ahead).expect("there is room");
        fs::rename(&ahead, self.path.join("..data")).expect("it moves");
        let _ = fs::remove_dir_all(self.path.join(old));
    }
}

/// Who signs litegate's certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("it signs itself"))
    }

    /// Certificate and key.
    fn files(&self) -> [(&'static str, String); 2] {
        let params = CertificateParams::new(vec!["app.test".to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("it signs");
        [("tls.crt", certificate.pem()), ("tls.key", key.serialize_pem())]
    }

    fn client(&self, protocol: &str) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).expect("it is one");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("there are some")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        Arc::new(config)
    }
}

/// The process.
pub(crate) struct Litegate {
    process: Process,
    pub(crate) doors: Doors,
    pub(crate) admin: Admin,
    log: PathBuf,
}

/// Its files, for whoever changes them while it runs.
pub(crate) struct Files {
    authority: Authority,
    certificates: Volume,
    configuration: Volume,
    world: World,
    directory: PathBuf,
    doors: Doors,
    admin: Admin,
}

/// Starts it, and waits until it is ready.
pub(crate) fn start(directory: &Path, world: World) -> (Litegate, Files) {
    let address = || {
        let loopback = Ipv4Addr::LOCALHOST;
        SocketAddr::from((loopback, free_port(&[loopback.into()])))
    };
    let authority = Authority::new();
    let certificates = Volume::new(directory.join("tls"), &authority.files());
    let (h1, h2) = (authority.client("http/1.1"), authority.client("h2"));
    let doors = Doors { clear: address(), tls: address(), h1, h2 };
    let admin = Admin(address());
    let text = configuration(directory, &doors, admin, &world, 0);
    let configuration = Volume::new(directory.join("conf"), &[("litegate.toml", text)]);
    let file = directory.join("conf/litegate.toml");
    let args = ["run", "--config", file.to_str().expect("temporary paths are UTF-8")];
    let log = directory.join("litegate.log");
    let program = Path::new(env!("CARGO_BIN_EXE_litegate"));
    let mut process = Process::start("litegate", program, &args, &log);
    eventually("litegate is ready", Duration::from_secs(30), || {
        assert!(process.is_running(), "litegate has ended:\n{}", process.log());
        match http::get(admin.0, "/readyz") {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(answer.text()),
            Err(error) => Err(error.to_string()),
        }
    });
    let directory = directory.to_owned();
    let files = Files {
        authority,
        certificates,
        configuration,
        world,
        directory,
        doors: doors.clone(),
        admin,
    };
    (Litegate { process, doors, admin, log }, files)
}

impl Files {
    /// Other values of the same configuration, in force when this returns.
    pub(crate) fn reload(&mut self, variant: u32) -> Result<(), String> {
        let text = configuration(&self.directory, &self.doors, self.admin, &self.world, variant);
        let before = self.admin.metric("litegate_config_reloads_total", "applied");
        self.configuration.swap(&[("litegate.toml", text)]);
        self.admin.grows("litegate_config_reloads_total", "applied", before)?;
        let lag = &self.admin.ask("/api/config")?["clusters"]["abaci"]["max_lag"];
        let wanted = max_lag(variant);
        if *lag == wanted { Ok(()) } else { Err(format!("max_lag is {lag} and not {wanted}")) }
    }

    /// A file that is wrong, which changes nothing; then the right one again.
    pub(crate) fn reload_badly(&mut self, variant: u32) -> Result<(), String> {
        let text = configuration(&self.directory, &self.doors, self.admin, &self.world, variant);
        let wrong = match variant % 3 {
            0 => text.replace("max_lag", "max_leg"),
            1 => text[..text.len() / 2].to_owned() + "\n[",
            _ => text.replace("port = 1\n", "port = 0\n"),
        };
        let inner = self.admin.ask("/api/config")?;
        let before = self.admin.metric("litegate_config_reloads_total", "refused");
        self.configuration.swap(&[("litegate.toml", wrong)]);
        self.admin.grows("litegate_config_reloads_total", "refused", before)?;
        if self.admin.ask("/api/config")? != inner {
            return Err("a refused configuration changed something".to_owned());
        }
        self.reload(variant)
    }

    /// Another certificate, in force when this returns.
    pub(crate) fn renew(&mut self) -> Result<(), String> {
        let before = self.admin.metric("litegate_certificate_reloads_total", "applied");
        self.certificates.swap(&self.authority.files());
        self.admin.grows("litegate_certificate_reloads_total", "applied", before)
    }

    /// A key that is not the certificate's, which changes nothing; then a right one.
    pub(crate) fn renew_badly(&mut self) -> Result<(), String> {
        let before = self.admin.metric("litegate_certificate_reloads_total", "refused");
        let ([certificate, _], [_, key]) = (self.authority.files(), self.authority.files());
        self.certificates.swap(&[certificate, key]);
        self.admin.grows("litegate_certificate_reloads_total", "refused", before)?;
        self.renew()
    }
}

/// Where it answers operators.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Admin(SocketAddr);

impl Admin {
    fn grows(&self, metric: &str, label: &str, before: f64) -> Result<(), String> {
        let deadline = std::time::Instant::now() + NOTICE;
        while self.metric(metric, label) <= before {
            if std::time::Instant::now() > deadline {
                return Err(format!("{metric} {label} does not grow in {NOTICE:?}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    pub(crate) fn ask(&self, path: &str) -> Result<Value, String> {
        http::get(self.0, path).map_err(|error| error.to_string())?.json()
    }

    /// The node is to be primary.
    pub(crate) fn hand_over(&self, to: &str) -> Result<Value, String> {
        let path = format!("/api/handoff?cluster=abaci&to={to}");
        let request = Request { method: "POST", path: &path, ..Request::GET };
        request.send(self.0).map_err(|error| error.to_string())?.json()
    }

    /// The sum of a metric over all its labels that `labels` occurs in.
    pub(crate) fn metric(&self, name: &str, labels: &str) -> f64 {
        let Ok(page) = http::get(self.0, "/metrics") else { return f64::NAN };
        let page = page.text();
        let samples = page.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (family, of) = series.split_once('{').unwrap_or((series, ""));
            (family == name && of.contains(labels)).then(|| value.parse::<f64>().ok())?
        });
        samples.sum()
    }

    /// Whether it sees a primary, and three nodes that are well; else what it sees.
    pub(crate) fn is_whole(&self) -> Result<(), String> {
        let topology = self.ask("/api/topology")?;
        for (name, nodes) in [("abaci", 3), ("rpc", 2)] {
            let cluster = &topology["clusters"][name];
            let cluster = if cluster.is_null() { &topology[name] } else { cluster };
            let well = |node: &Value| {
                node["presence"] == "member"
                    && node["healthy"] == true
                    && node["ejected"] == false
                    && node["fenced"] == false
                    && (name == "rpc" || node["freshness"] == "fresh" && node["role"] != "unknown")
            };
            let all =
                cluster["nodes"].as_array().map_or(0, |all| all.iter().filter(|n| well(n)).count());
            if cluster["primary"].is_null() || all != nodes || cluster["held"] != 0 {
                return Err(cluster.to_string());
            }
        }
        Ok(())
    }
}

impl Litegate {
    /// Resident memory in KiB.
    pub(crate) fn memory(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
    }

    /// Open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).map_or(0, Iterator::count)
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Lines of its log that nothing of what was done to it explains.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let expected = ["configuration refused", "certificate", "claims to be primary"];
        let is_bad = |line: &&str| {
            line.contains("panicked")
                || line.contains("ERROR") && !expected.iter().any(|known| line.contains(known))
        };
        log.lines().filter(is_bad).map(str::to_owned).collect()
    }

    /// Leaves as it is told to, with nothing to do.
    pub(crate) fn leave(&mut self) {
        self.process.terminate(Duration::from_mins(1));
    }
}

/// In seconds.
fn max_lag(variant: u32) -> f64 {
    [10.0, 9.0, 8.0][variant as usize % 3]
}

/// The values that differ are those that change nothing of what clients are promised.
fn configuration(
    directory: &Path,
    doors: &Doors,
    admin: Admin,
    world: &World,
    variant: u32,
) -> String {
    let pick = |choices: &[&'static str]| choices[variant as usize % choices.len()];
    let directory = directory.display();
    let World { members, consul, key, rpc } = world;
    format!(
        r#"[[listener]]
address = "{clear}"

[[listener]]
address = "{tls}"
tls = {{ certificates = [{{ certificate = "{directory}/tls/tls.crt", key = "{directory}/tls/tls.key" }}] }}

[admin]
address = "{admin}"

[access_log]
format = "{format}"
output = "{directory}/access.log"

[limits]
header_read = "5s"
body_idle = "10s"
resets = 2000
headers = {headers}

[cluster.abaci]
port = 1
members = {members}
primary = [
  {{ type = "litefs", poll = "{poll}" }},
  {{ type = "consul", address = "http://{consul}", key = "{key}" }},
]
max_lag = "{max_lag}s"
balance = "{balance}"
timeouts = {{ response_header = "{patience}", idle = "20s" }}
retry = {{ attempts = {attempts}, budget = 1.0, budget_min = 200 }}
hold = {{ timeout = "{hold}s", release = {release} }}
replay = {{ buffer = "{buffer}" }}
durability = {{ replicas = {replicas} }}

[cluster.rpc]
port = 1
members = {rpc}
primary = {{ type = "instance", name = "rpc-0" }}
reads = "all"
upstream = {{ protocol = "h2" }}
retry = {{ attempts = 4, budget = 1.0, budget_min = 200 }}
timeouts = {{ response_header = "20s" }}

[[route]]
host = ["grpc.test"]
path = "/grpc.testing.TestService/UnaryCall"
class = "read"
cluster = "rpc"

[[route]]
host = ["grpc.test"]
cluster = "rpc"

[[route]]
host = ["reads.test"]
class = "read"
cluster = "abaci"

[[route]]
path = "/nothing-{variant}"
class = "write"
cluster = "abaci"

[[route]]
cluster = "abaci"
"#,
        clear = doors.clear,
        tls = doors.tls,
        admin = admin.0,
        format = pick(&["text", "json"]),
        headers = pick(&["100", "90"]),
        poll = pick(&["1s", "500ms", "700ms"]),
        max_lag = max_lag(variant),
        balance = pick(&["peak-ewma", "least-request", "round-robin", "random"]),
        patience = pick(&["20s", "21s"]),
        attempts = pick(&["4", "3"]),
        hold = HOLD.as_secs(),
        release = pick(&["32", "8"]),
        buffer = pick(&["1MiB", "256KiB", "2MiB"]),
        replicas = pick(&["1", "0", "1"]),
    )
}
