//! The programs that are measured: how each is started, asked for its version, and stopped.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    Failure, generator,
    machine::{self, Cores, Tree},
    message::field,
    upstream::ECHO,
};

/// A program, and the configuration that makes it do the same work as the others.
#[derive(Debug)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// The configuration's name under `benches/load/proxies`.
    pub(crate) file: &'static str,
    /// With `@port@`, `@directory@` and, where it has one, `@admin_port@`, beside what the caller
    /// fills in.
    template: &'static str,
    /// What prints its version, on whichever stream.
    version: &'static [&'static str],
    /// What runs it in the foreground; the configuration's path comes last.
    run: &'static [&'static str],
}

const fn litegate(name: &'static str, file: &'static str, template: &'static str) -> Contender {
    Contender { name, file, template, version: &["--version"], run: &["run", "--config"] }
}

const fn nginx(file: &'static str, template: &'static str) -> Contender {
    Contender { name: "nginx", file, template, version: &["-v"], run: &["-c"] }
}

const fn haproxy(file: &'static str, template: &'static str) -> Contender {
    Contender { name: "haproxy", file, template, version: &["-v"], run: &["-db", "-f"] }
}

/// litegate as `deploy/build` makes it, beside what cargo does.
pub(crate) const RELEASED: &str = "released";

/// In the order of the rounds. Ratios are to HAProxy.
pub(crate) const CONTENDERS: &[Contender] = &[
    litegate("litegate", "litegate.toml", include_str!("../proxies/litegate.toml")),
    litegate(RELEASED, "litegate.toml", include_str!("../proxies/litegate.toml")),
    nginx("nginx.conf", include_str!("../proxies/nginx.conf")),
    haproxy("haproxy.cfg", include_str!("../proxies/haproxy.cfg")),
];

/// The same with TLS, HTTP/2 and WebSocket.
pub(crate) const PROTOCOLS: &[Contender] = &[
    litegate(
        "litegate",
        "protocols/litegate.toml",
        include_str!("../proxies/protocols/litegate.toml"),
    ),
    litegate(
        RELEASED,
        "protocols/litegate.toml",
        include_str!("../proxies/protocols/litegate.toml"),
    ),
    nginx("protocols/nginx.conf", include_str!("../proxies/protocols/nginx.conf")),
    haproxy("protocols/haproxy.cfg", include_str!("../proxies/protocols/haproxy.cfg")),
];

/// Those with a port for HTTP/2 by prior knowledge, `@h2_port@`, which is flooded.
pub(crate) const FLOODED: &[Contender] = &[
    litegate("litegate", "floods/litegate.toml", include_str!("../proxies/floods/litegate.toml")),
    nginx("floods/nginx.conf", include_str!("../proxies/floods/nginx.conf")),
    haproxy("floods/haproxy.cfg", include_str!("../proxies/floods/haproxy.cfg")),
];

/// litegate with the given `consistency.mode`, before three nodes.
pub(crate) const fn consistency(mode: &'static str) -> Contender {
    litegate(mode, "consistency.toml", include_str!("../proxies/consistency.toml"))
}

/// To whom the others are compared.
pub(crate) const PEER: &str = "haproxy";

/// What every contender adds for the app.
const ADDED: &[&str] = &[
    "via",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-real-ip",
];

impl Contender {
    /// The program itself: litegate as it was built, the others from `PATH` and `/usr/sbin`, where
    /// Debian has them.
    pub(crate) fn program(
        &self,
        litegate: &Path,
        released: Option<&Path>,
    ) -> Result<PathBuf, Failure> {
        match self.name {
            "litegate" => return Ok(litegate.to_owned()),
            RELEASED => return Ok(released.ok_or("where is it? `--released PATH`")?.to_owned()),
            _ => {}
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
        places
            .find_map(|place| Some(place.join(self.name)).filter(|path| path.is_file()))
            .ok_or_else(|| {
                let name = self.name;
                format!("{name} is missing: `apt-get install {name}` (or `--only litegate`)").into()
            })
    }

    /// Whether HTTP/2 in clear text has a port of its own in its configuration.
    pub(crate) fn has_h2c_port(&self) -> bool {
        self.template.contains("@h2c_port@")
    }

    /// The first line that it prints of its version.
    pub(crate) fn version(&self, program: &Path) -> Result<String, Failure> {
        let output = Command::new(program).args(self.version).output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        Ok(text.lines().next().unwrap_or("unknown").trim().to_owned())
    }

    /// Starts it on the proxy's core before this upstream, and waits until it serves.
    pub(crate) fn start(
        &self,
        program: &Path,
        upstream: SocketAddr,
        cores: Cores,
    ) -> Result<Running, Failure> {
        self.start_with(program, &[("@upstream_port@", &upstream.port().to_string())], cores)
    }

    /// The same, with what goes where in its configuration.
    pub(crate) fn start_with(
        &self,
        program: &Path,
        filled: &[(&str, &str)],
        cores: Cores,
    ) -> Result<Running, Failure> {
        let directory = std::env::temp_dir().join(format!(
            "litegate-load-{}-{}",
            std::process::id(),
            self.name
        ));
        fs::create_dir_all(&directory)?;
        // Free a moment ago: whoever takes it in between makes the start fail, and loudly.
        let [port, admin] = {
            let bound =
                [TcpListener::bind(("127.0.0.1", 0))?, TcpListener::bind(("127.0.0.1", 0))?];
            let [port, admin] = &bound;
            [port.local_addr()?, admin.local_addr()?]
        };
        let config = directory.join(Path::new(self.file).file_name().unwrap_or_default());
        let mut text = self
            .template
            .replace("@port@", &port.port().to_string())
            .replace("@admin_port@", &admin.port().to_string())
            .replace("@directory@", &directory.to_string_lossy());
        for (place, with) in filled {
            text = text.replace(place, with);
        }
        fs::write(&config, text)?;
        let log = directory.join("log");

        // A child inherits the core.
        machine::pin(cores.proxy)?;
        let child = Command::new(program)
            .args(self.run)
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .spawn();
        machine::pin(cores.load)?;

        let running = Running { name: self.name, address: port, admin, child: child?, directory };
        running.check().map_err(|failure| {
            let log = fs::read_to_string(&log).unwrap_or_default();
            format!("{} does not serve: {failure}\n{log}", self.name)
        })?;
        Ok(running)
    }
}

/// A contender that serves; stopped when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    /// Where litegate's metrics are.
    pub(crate) admin: SocketAddr,
    child: Child,
    directory: PathBuf,
}

impl Running {
    pub(crate) fn tree(&self) -> Result<Tree, Failure> {
        Tree::of(self.child.id())
    }

    /// Waits until it answers, and then looks whether it does what all of them have to do.
    fn check(&self) -> Result<(), Failure> {
        let request = format!("GET {ECHO} HTTP/1.1\r\nHost: abaci.one\r\n\r\n");
        let answer = machine::until("no answer", Duration::from_secs(10), || {
            let mut stream = TcpStream::connect(self.address).ok()?;
            generator::ask_once(&mut stream, request.as_bytes()).ok()
        })?;
        let end = memchr::memmem::find(&answer, b"\r\n\r\n").unwrap_or(0);
        let (head, echoed) = answer.split_at(end + 4);
        if field(head, b"via").is_none() {
            return Err("the answer has no Via".into());
        }
        let missing: Vec<_> =
            ADDED.iter().filter(|name| field(echoed, name.as_bytes()).is_none()).collect();
        if !missing.is_empty() {
            return Err(format!("the app does not get {missing:?}").into());
        }
        if field(echoed, b"connection").is_some_and(|value| value.eq_ignore_ascii_case(b"close")) {
            return Err("connections to the upstream are not kept".into());
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let gone = machine::until("the end", Duration::from_secs(5), || {
            self.child.try_wait().ok().flatten()
        });
        if gone.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}
