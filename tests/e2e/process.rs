//! Child processes that end when their test does, however it ends.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How long a process may take to leave after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(5);

/// A child in a process group of its own, which goes with it: LiteFS takes its app along, as the
/// end of a pod does.
///
/// The kernel kills it when the thread that started it ends, so that not even a killed test run
/// leaves processes behind. Start processes on the test's own thread.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// The file system that it serves, if it does.
    mount: Option<PathBuf>,
}

impl Process {
    /// Starts `program`, with what it prints in `log`.
    pub(crate) fn start(name: &str, program: &Path, args: &[&str], log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).expect("open the log");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("clone the log"))
            .stderr(output)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("start {name}: setpriv {}: {error}", program.display()));
        Self { name: name.to_owned(), child, log: log.to_owned(), mount: None }
    }

    /// The same, where it serves a file system of its own.
    pub(crate) fn serving(mut self, mount: &Path) -> Self {
        self.mount = Some(mount.to_owned());
        self
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it is still there.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it has printed.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// SIGKILL for the whole group, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
        let deadline = Instant::now() + PATIENCE;
        while self.is_running() {
            if Instant::now() > deadline
                && let Some(mount) = self.mount.take()
            {
                abort(&mount);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGTERM for the process alone, which tells its children as it likes; waits for its end.
    pub(crate) fn terminate(&mut self, patience: Duration) {
        if let Some(process) = self.pid() {
            let _ = kill_process(process, Signal::TERM);
        }
        eventually(&format!("{} leaves", self.name), patience, || {
            if self.is_running() { Err("it is still there".to_owned()) } else { Ok(()) }
        });
        self.kill();
    }

    /// SIGSTOP for the whole group: it holds its connections and says nothing.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT for the whole group.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM, and SIGKILL for what is still there after [`PATIENCE`].
    pub(crate) fn stop(&mut self) {
        if self.is_running() {
            self.signal(Signal::TERM);
            let deadline = Instant::now() + PATIENCE;
            while self.is_running() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
        self.kill();
    }

    /// The group may be gone already, which is as good.
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.pid() {
            let _ = kill_process_group(group, signal);
        }
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(15)..];
            eprintln!("--- the end of {}'s log ---\n{}", self.name, tail.join("\n"));
        }
    }
}

/// A program that `tests/e2e/build` has built.
pub(crate) fn component(name: &str) -> PathBuf {
    let directory = std::env::var_os("LITEGATE_E2E_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2e/bin"),
        PathBuf::from,
    );
    let program = directory.join(name);
    assert!(program.is_file(), "{} is missing: run tests/e2e/build", program.display());
    program
}

/// A port that is free on all of `addresses`.
///
/// It is chosen, not held: another process could take it before it is used. Nothing else on a
/// test machine listens on these addresses.
pub(crate) fn free_port(addresses: &[IpAddr]) -> u16 {
    for _ in 0..100 {
        let first = TcpListener::bind(SocketAddr::new(addresses[0], 0)).expect("bind to loopback");
        let port = first.local_addr().expect("a bound socket has an address").port();
        if addresses[1..].iter().all(|ip| TcpListener::bind((*ip, port)).is_ok()) {
            return port;
        }
    }
    panic!("no port is free on all of {addresses:?}");
}

/// Asks again and again until the answer is `Ok`; panics with the last error at the end of `timeout`.
pub(crate) fn eventually<T>(
    what: &str,
    timeout: Duration,
    mut ask: impl FnMut() -> Result<T, String>,
) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(why) if Instant::now() >= deadline => {
                panic!("{what}: not within {timeout:?}: {why}")
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Ends a mount whose server can't. LiteFS, killed while it takes pages of its mount out of the
/// kernel's cache, waits for the kernel to write them, which waits for LiteFS: once in some hundred
/// kills under load, and for ever.
fn abort(mount: &Path) {
    let force = Command::new("umount").args(["-f", "--"]).arg(mount).stdin(Stdio::null()).output();
    // It may say that the mount is busy: it is aborted all the same.
    drop(force);
}
