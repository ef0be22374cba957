//! The program itself, as an operator runs it: signals, a file that changes, exit codes. Under
//! load, where no request may be lost.

use std::{
    net::SocketAddr,
    os::unix::{fs::symlink, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use litegate::testkit::{
    Cluster, Options,
    client::{self, Conn},
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::gate;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;

/// A litegate process, killed when dropped.
struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    address: SocketAddr,
    admin: SocketAddr,
}

fn litegate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).env_remove("RUST_LOG");
    command
}

impl Process {
    async fn start(config: &Path) -> Self {
        let mut command = litegate();
        command.arg("run").arg("-c").arg(config).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program was built");
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let written = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut log = written.lock().unwrap_or_else(PoisonError::into_inner);
                log.push_str(&line);
                log.push('\n');
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut process = Self { child, log, address: nowhere, admin: nowhere };
        let address = |log: &str, what: &str| {
            let line = log.lines().find(|line| line.contains(what))?;
            line.rsplit_once("address=")?.1.trim().parse().ok()
        };
        process.until("it listens", |log| address(log, "admin listening").is_some()).await;
        let log = process.log();
        process.address = address(&log, " listening").expect("it says where");
        process.admin = address(&log, "admin listening").expect("it says where");
        let ready = async {
            while process.admin("/readyz").await.0 != 200 || !process.has_primary().await {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, ready).await.expect("it gets ready");
        process
    }

    fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the log is so.
    async fn until(&self, what: &str, so: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !so(&self.log()) {
            assert!(Instant::now() < deadline, "{what}: {}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn admin(&self, path: &str) -> (u16, String) {
        let answer = client::request(self.admin, "GET", path, "", b"").await;
        let answer = answer.unwrap_or_else(|error| panic!("{path}: {error}\n{}", self.log()));
        (answer.status, answer.text())
    }

    async fn has_primary(&self) -> bool {
        self.admin("/metrics").await.1.contains("litegate_primary_known{cluster=\"app\"} 1")
    }

    /// Waits until this is in the configuration in force.
    async fn until_in_force(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.admin("/api/config").await.1.contains(text) {
            assert!(Instant::now() < deadline, "{text} is not in force: {}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until `/readyz` fails.
    async fn until_not_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.admin("/readyz").await != (503, "draining\n".to_owned()) {
            assert!(Instant::now() < deadline, "still ready: {}", self.log());
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn signal(&self, signal: Signal) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        kill_process(id.expect("it runs"), signal).expect("it is ours");
    }

    async fn ended(&mut self) -> ExitStatus {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended
            .unwrap_or_else(|_| panic!("still runs: {}", self.log()))
            .expect("it can be waited for")
    }
}

/// Clients that never stop to ask, half of them on connections that they keep.
struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    left: Arc<AtomicU64>,
    clients: JoinSet<Tally>,
}

/// What one client saw.
#[derive(Debug, Default)]
struct Tally {
    /// Ids of acknowledged writes.
    written: Vec<String>,
    /// It could not connect and left, as a client goes elsewhere.
    refused: bool,
    /// Requests on a connection that had come about, and no whole answer.
    lost: Vec<String>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let (served, left) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let mut clients = JoinSet::new();
        for n in 0..8 {
            let (stop, served, left) = (Arc::clone(&stop), Arc::clone(&served), Arc::clone(&left));
            clients.spawn(async move {
                let tally = client(address, n, n % 2 == 0, stop, served).await;
                left.fetch_add(1, Relaxed);
                tally
            });
        }
        Self { stop, served, left, clients }
    }

    /// Waits until every client has left by itself.
    async fn until_refused(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.left.load(Relaxed) < 8 {
            assert!(Instant::now() < deadline, "nobody is served for ever");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits for so many more answers.
    async fn more(&self, n: u64) {
        let enough = self.served.load(Relaxed) + n;
        let deadline = Instant::now() + PATIENCE;
        while self.served.load(Relaxed) < enough {
            assert!(Instant::now() < deadline, "the load goes on");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends it. Nothing was lost, and every acknowledged write ran exactly once. How many clients
    /// were refused.
    async fn end(mut self, cluster: &Cluster) -> usize {
        self.stop.store(true, Relaxed);
        let mut refused = 0;
        while let Some(tally) = self.clients.join_next().await {
            let tally = tally.expect("a client does not panic");
            assert_eq!(tally.lost, [""; 0]);
            refused += usize::from(tally.refused);
            for id in tally.written {
                let written = cluster.written(&id);
                assert_eq!(written.on.len(), 1, "{id} ran once: {written:?}");
            }
        }
        refused
    }
}

async fn client(
    address: SocketAddr,
    n: usize,
    keeps: bool,
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
) -> Tally {
    let mut tally = Tally::default();
    let mut kept: Option<Conn> = None;
    for turn in 0_u64.. {
        if stop.load(Relaxed) {
            break;
        }
        let conn = match kept.take() {
            Some(conn) => Ok(conn),
            None => Conn::open(address).await,
        };
        let Ok(mut conn) = conn else {
            tally.refused = true;
            break;
        };
        let id = format!("load-{}-{n}-{turn}", address.port());
        let (method, target) = match turn % 3 {
            0 => ("POST", format!("/kv/{id}")),
            _ => ("GET", "/whoami".to_owned()),
        };
        match timeout(PATIENCE, conn.request(method, &target, "", b"")).await {
            Ok(Ok(answer)) if answer.status == 200 && answer.complete => {
                served.fetch_add(1, Relaxed);
                if method == "POST" {
                    tally.written.push(id);
                }
                kept = (keeps && answer.field("connection") != Some("close")).then_some(conn);
            }
            other => tally.lost.push(format!("{method} {target} keeps={keeps}: {other:?}")),
        }
    }
    tally
}

/// A cluster, and a directory with a configuration for a litegate before it.
async fn site(drain: &str) -> (Cluster, TempDir, PathBuf, String) {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let text = gate::config(&cluster, LITEFS)
        .replace(r#"drain = { delay = "0s", timeout = "10s" }"#, &format!("drain = {drain}"));
    assert!(text.contains(drain));
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("litegate.toml");
    std::fs::write(&path, &text).expect("it can be written");
    (cluster, directory, path, text)
}

const DRAIN: &str = r#"{ delay = "1500ms", timeout = "15s" }"#;
const DELAY: Duration = Duration::from_millis(1500);

/// The same configuration with another value in it that shows.
fn with_hold(text: &str, seconds: u32) -> String {
    format!("{text}hold = {{ timeout = \"{seconds}s\" }}\n")
}

#[tokio::test]
async fn a_hangup_under_load_loses_no_request() {
    let (cluster, _directory, path, text) = site(DRAIN).await;
    let process = Process::start(&path).await;
    let load = Load::start(process.address);
    for seconds in 31..36 {
        load.more(50).await;
        std::fs::write(&path, with_hold(&text, seconds)).expect("it can be written");
        process.signal(Signal::HUP);
        process.until_in_force(&format!("\"timeout\": {seconds}.0")).await;
    }
    load.more(50).await;
    assert_eq!(load.end(&cluster).await, 0);
}

#[tokio::test]
async fn a_config_map_s_swap_under_load_loses_no_request() {
    let (cluster, directory, _, text) = site(DRAIN).await;
    // As kubelet lays it out: the file is a link through `..data`, which is replaced as a whole.
    let mount = directory.path().join("mount");
    let swap = |n: u32, text: &str| {
        let version = format!("..version_{n}");
        std::fs::create_dir_all(mount.join(&version)).expect("a directory");
        std::fs::write(mount.join(&version).join("litegate.toml"), text).expect("it is written");
        symlink(&version, mount.join("..data_tmp")).expect("a link");
        std::fs::rename(mount.join("..data_tmp"), mount.join("..data")).expect("it is replaced");
        if n > 30 {
            let old = mount.join(format!("..version_{}", n - 1));
            std::fs::remove_dir_all(old).expect("the old one goes");
        }
    };
    swap(30, &text);
    let path = mount.join("litegate.toml");
    symlink("..data/litegate.toml", &path).expect("a link");
    let process = Process::start(&path).await;
    let load = Load::start(process.address);
    for seconds in 31..35 {
        load.more(50).await;
        swap(seconds, &with_hold(&text, seconds));
        process.until_in_force(&format!("\"timeout\": {seconds}.0")).await;
    }
    load.more(50).await;
    assert_eq!(load.end(&cluster).await, 0);
    let reloads = "litegate_config_reloads_total{result=\"applied\"} 4";
    let metrics = process.admin("/metrics").await.1;
    assert!(metrics.contains(reloads), "once for each swap: {metrics}");
}

#[tokio::test]
async fn a_broken_file_leaves_the_running_configuration() {
    let (cluster, _directory, path, text) = site(DRAIN).await;
    let process = Process::start(&path).await;
    let load = Load::start(process.address);
    load.more(20).await;
    std::fs::write(&path, format!("{text}hodl = 1\n")).expect("it can be written");
    process.until("it says so", |log| log.contains("configuration refused")).await;
    process.until("it says where", |log| log.contains("hodl") && log.contains('^')).await;
    // One that can be read but not applied.
    let workers = text.replace("workers = 2", "workers = 3");
    std::fs::write(&path, workers).expect("it can be written");
    process.until("it says why", |log| log.contains("server.workers")).await;
    let metrics = process.admin("/metrics").await.1;
    for line in [
        "litegate_config_last_reload_successful 0",
        "litegate_config_reloads_total{result=\"applied\"} 0",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    load.more(50).await;
    std::fs::write(&path, with_hold(&text, 31)).expect("it can be written");
    process.until_in_force("\"timeout\": 31.0").await;
    let metrics = process.admin("/metrics").await.1;
    assert!(metrics.contains("litegate_config_last_reload_successful 1"), "{metrics}");
    assert_eq!(load.end(&cluster).await, 0);
}

#[tokio::test]
async fn a_listener_that_moves_under_load_loses_no_request() {
    let (cluster, _directory, path, text) = site(DRAIN).await;
    let process = Process::start(&path).await;
    let load = Load::start(process.address);
    load.more(50).await;
    let moved = text.replacen("127.0.0.1:0", "127.0.0.2:0", 1);
    std::fs::write(&path, moved).expect("it can be written");
    process.until("it moves", |log| log.contains("no longer listening")).await;
    let log = process.log();
    let new = log.lines().find_map(|line| line.rsplit_once("address=127.0.0.2:"));
    let new = format!("127.0.0.2:{}", new.expect("it says where").1.trim());
    let new = new.parse().expect("an address");
    let there = Load::start(new);
    there.more(50).await;
    assert_eq!(there.end(&cluster).await, 0);
    // At the old address whoever comes is refused, and nobody was cut off.
    load.until_refused().await;
    assert_eq!(load.end(&cluster).await, 8);
}

#[tokio::test]
async fn a_drain_under_load_has_two_phases_and_loses_no_request() {
    let (cluster, _directory, path, _) = site(DRAIN).await;
    let mut process = Process::start(&path).await;
    let address = process.address;
    let load = Load::start(address);
    load.more(100).await;
    let slow = tokio::spawn(client::request(address, "GET", "/sleep/3000", "", b""));
    load.more(20).await;
    let began = Instant::now();
    process.signal(Signal::TERM);
    process.until_not_ready().await;
    // First the load balancer looks away; until it does, everybody is served as before.
    let still = client::request(address, "GET", "/whoami", "", b"").await.expect("it accepts");
    assert_eq!((still.status, still.field("connection")), (200, None));
    assert!(began.elapsed() < DELAY, "this machine is too slow to tell");
    load.until_refused().await;
    assert!(began.elapsed() >= DELAY, "after `drain.delay`");
    let slow = slow.await.expect("the task ends").expect("it is answered");
    assert_eq!((slow.status, slow.complete), (200, true));
    assert_eq!(process.ended().await.code(), Some(0), "{}", process.log());
    assert!(process.log().contains("drained"), "{}", process.log());
    assert_eq!(load.end(&cluster).await, 8);
}

/// Waits until a request that takes long runs on a node.
async fn one_runs(cluster: &Cluster, address: SocketAddr) {
    let served = || (0..3).map(|n| cluster.served(n)).sum::<u64>();
    let before = served();
    tokio::spawn(client::request(address, "GET", "/sleep/60000", "", b""));
    let deadline = Instant::now() + PATIENCE;
    while served() == before {
        assert!(Instant::now() < deadline, "it reaches a node");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::TERM)] {
        let (cluster, _directory, path, _) = site(r#"{ delay = "0s", timeout = "60s" }"#).await;
        let mut process = Process::start(&path).await;
        one_runs(&cluster, process.address).await;
        process.signal(first);
        process.until_not_ready().await;
        let began = Instant::now();
        process.signal(second);
        let status = process.ended().await;
        assert_eq!((status.code(), status.signal()), (Some(1), None), "{}", process.log());
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn a_second_signal_cuts_the_delay_short() {
    let (_cluster, _directory, path, _) = site(r#"{ delay = "60s", timeout = "60s" }"#).await;
    let mut process = Process::start(&path).await;
    process.signal(Signal::TERM);
    process.until_not_ready().await;
    process.signal(Signal::TERM);
    assert_eq!(process.ended().await.code(), Some(1), "{}", process.log());
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_cut_off_and_shows_in_the_exit_code() {
    let (cluster, _directory, path, _) = site(r#"{ delay = "0s", timeout = "300ms" }"#).await;
    let mut process = Process::start(&path).await;
    one_runs(&cluster, process.address).await;
    process.signal(Signal::TERM);
    assert_eq!(process.ended().await.code(), Some(1), "{}", process.log());
}

#[tokio::test]
async fn exit_codes_tell_usage_configuration_and_start_apart() {
    let code = async |arguments: &[&str]| {
        let ended = timeout(PATIENCE, litegate().args(arguments).output()).await;
        let output = ended.expect("it ends").expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(code(&["run", "--nonsense"]).await.0, Some(2));
    let (_cluster, directory, path, text) = site(DRAIN).await;
    let at = |path: &Path| path.to_str().expect("plain").to_owned();
    assert_eq!(code(&["run", "-c", &at(&directory.path().join("none"))]).await.0, Some(3));
    let broken = directory.path().join("broken.toml");
    std::fs::write(&broken, "[[listener]]\naddres = 1\n").expect("it can be written");
    let (status, says) = code(&["run", "-c", &at(&broken)]).await;
    assert_eq!(status, Some(3));
    assert!(says.contains("addres") && says.contains('^'), "{says}");
    assert_eq!(code(&["check", "-c", &at(&path)]).await.0, Some(0));
    // An address that is nobody's (RFC 5737).
    let taken = text.replacen("127.0.0.1:0", "192.0.2.1:1", 1);
    std::fs::write(&path, taken).expect("it can be written");
    let (status, says) = code(&["run", "-c", &at(&path)]).await;
    assert_eq!(status, Some(1));
    assert!(says.contains("192.0.2.1:1"), "{says}");
}
