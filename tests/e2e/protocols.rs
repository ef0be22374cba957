//! Protocols judged by others: h2spec, and gRPC's interoperability suite.

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
struct Gate(Option<Running>);

impl Gate {
    fn before(node: SocketAddr, listener: &str, upstream: &str) -> Self {
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

    fn port(&self) -> String {
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

fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("120").arg(component(program)).args(args).stdin(Stdio::null());
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
    let port = free_port(&[LOOPBACK]);
    let address = SocketAddr::new(LOOPBACK, port);
    let log = directory.path().join("server.log");
    let args = ["-port", &port.to_string()];
    let _server = Process::start("the gRPC server", &component("grpc-server"), &args, &log);
    eventually("the gRPC server listens", Duration::from_secs(10), || {
        TcpStream::connect(address).map_err(|error| error.to_string())
    });
    let gate = Gate::before(address, "", "h2");
    for case in CASES {
        let args = ["-server_host", "127.0.0.1", "-server_port", &gate.port(), "-test_case", case];
        let output = run("grpc-client", &args);
        assert!(output.status.success(), "{case}: {}", text(&output));
    }
}
