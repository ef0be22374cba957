//! Protocols judged by others: h2spec, gRPC's interoperability suite, and what Autobahn asks of a
//! WebSocket server.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use litegate::{app::Running, config::load};

use crate::process::{Process, component, eventually, free_port};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Every case that a server can be asked for by name.
const CASES: [&str; 14] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
];

/// A litegate in this process, stopped when dropped.
pub(crate) struct Gate(Option<Running>);

impl Gate {
    pub(crate) fn before(node: SocketAddr, listener: &str, upstream: &str) -> Self {
        let text = format!(
            "[[listener]]\naddress = \"127.0.0.1:0\"\n{listener}\n[admin]\naddress = \"off\"\n\
             [access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\nupstream = {{ protocol = \
             \"{upstream}\" }}\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", address = \
             \"{node}\" }}] }}\nprimary = {{ type = \"instance\", name = \"a\" }}\n"
        );
        let config =
            load::parse("test.toml", &text, []).unwrap_or_else(|faults| panic!("{faults}"));
        Self(Some(litegate::app::start(config).expect("litegate starts")))
    }

    pub(crate) fn port(&self) -> String {
        self.0.as_ref().expect("it runs").listeners[0].port().to_string()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(running) = self.0.take() {
            running.stop();
            running.join();
        }
    }
}

/// Starts what listens on the port that it is told, and waits until it does.
fn serve(
    name: &str,
    program: &Path,
    args: &[&str],
    port: u16,
    log: &Path,
) -> (Process, SocketAddr) {
    let address = SocketAddr::new(LOOPBACK, port);
    let server = Process::start(name, program, args, log);
    eventually(&format!("{name} listens"), Duration::from_secs(10), || {
        TcpStream::connect(address).map_err(|error| error.to_string())
    });
    (server, address)
}

fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("300").arg(component(program)).args(args).stdin(Stdio::null());
    command.output().expect("timeout is there")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn certificate(directory: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("it signs");
    let (crt, key) = (directory.join("tls.crt"), directory.join("tls.key"));
    std::fs::write(&crt, made.cert.pem()).expect("there is room");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("there is room");
    format!("tls = {{ certificates = [{{ certificate = {crt:?}, key = {key:?} }}] }}")
}

/// On a port that speaks HTTP/2 alone: beside HTTP/1.1, what is no preface is answered as HTTP/1.1.
#[test]
fn h2spec_finds_nothing() {
    let runtime = tokio::runtime::Runtime::new().expect("it starts");
    let cluster = litegate::testkit::Cluster::start(litegate::testkit::Options::default());
    let cluster = runtime.block_on(cluster).expect("loopback has ports");
    let directory = tempfile::tempdir().expect("there is room");
    let tls = certificate(directory.path());
    for (listener, more) in [("", &[][..]), (&*tls, &["-t", "-k"])] {
        let listener = format!("protocols = [\"h2\"]\n{listener}");
        let gate = Gate::before(cluster.places()[0].app, &listener, "http/1.1");
        let port = gate.port();
        let output = run("h2spec", &[&["-h", "127.0.0.1", "-p", &port, "-o", "5"], more].concat());
        let text = text(&output);
        let summary = text.lines().last().unwrap_or_default();
        assert!(output.status.success(), "{text}");
        assert!(summary.contains(" tests, ") && summary.contains(" 0 failed"), "{summary}");
    }
}

#[test]
fn grpc_interoperates_in_every_case() {
    let directory = tempfile::tempdir().expect("there is room");
    let (port, log) = (free_port(&[LOOPBACK]), directory.path().join("server.log"));
    let args = ["-port", &port.to_string()];
    let (_server, address) = serve("the gRPC server", &component("grpc-server"), &args, port, &log);
    let gate = Gate::before(address, "", "h2");
    for case in CASES {
        let args = ["-server_host", "127.0.0.1", "-server_port", &gate.port(), "-test_case", case];
        let output = run("grpc-client", &args);
        assert!(output.status.success(), "{case}: {}", text(&output));
    }
}

/// The Autobahn test suite needs Python 2; components/websocket/client.py has its groups of cases.
#[test]
fn websockets_are_carried_byte_for_byte_in_every_case() {
    let directory = tempfile::tempdir().expect("there is room");
    let (port, log) = (free_port(&[LOOPBACK]), directory.path().join("server.log"));
    let (python, suite) = ("websocket/bin/python", "tests/e2e/components/websocket");
    let script = |name| format!("{}/{suite}/{name}", env!("CARGO_MANIFEST_DIR"));
    let (server, client, port_text) = (script("server.py"), script("client.py"), port.to_string());
    let args = [&*server, &*port_text];
    let (_server, node) = serve("the WebSocket server", &component(python), &args, port, &log);
    let tls = certificate(directory.path());
    let gates = ["http/1.1", "h2"].map(|to| ["", &*tls].map(|keys| Gate::before(node, keys, to)));
    let ports = gates.each_ref().map(|gates| gates.each_ref().map(Gate::port)).concat();
    let args = [&client, &port_text].into_iter().chain(&ports).map(String::as_str);
    let output = run(python, &args.collect::<Vec<_>>());
    let text = text(&output);
    let summary = text.lines().last().unwrap_or_default();
    assert!(output.status.success() && summary.ends_with(" 0 faults"), "{text}");
}
