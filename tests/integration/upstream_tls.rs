//! TLS to nodes.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use litegate::testkit::Cluster;
use rustls::{
    HandshakeKind, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::Instant,
};
use tokio_rustls::TlsAcceptor;

use crate::{gate::Gate, tls::Authority};

const SOON: Duration = Duration::from_secs(10);
const INSTANCE: &str = "primary = { type = \"instance\", name = \"a\" }";
const BOTH: &[&str] = &["h2", "http/1.1"];

/// A node that speaks TLS, and says by which protocol and to which name.
struct Node {
    address: SocketAddr,
    config: Arc<Mutex<Arc<ServerConfig>>>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    resumed: AtomicUsize,
    writes: AtomicUsize,
    probes: AtomicUsize,
}

/// With the certificate `NAME.crt` of a directory, for clients that one of `clients` vouches for.
fn config(
    directory: &Path,
    name: &str,
    alpn: &[&str],
    clients: Option<&Authority>,
) -> Arc<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(directory.join(format!("{name}.crt")));
    let chain = chain.expect("it is there").map(|one| one.expect("it is one")).collect();
    let key = PrivateKeyDer::from_pem_file(directory.join(format!("{name}.key")));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("they are supported");
    let config = match clients {
        None => config.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            let ca = CertificateDer::from_pem_file(authority.path("ca.crt")).expect("it is one");
            roots.add(ca).expect("it is one");
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            config.with_client_cert_verifier(verifier.expect("it can be built"))
        }
    };
    let mut config = config.with_single_cert(chain, key.expect("it is one")).expect("they fit");
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

impl Node {
    async fn start(config: Arc<ServerConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("bound");
        let node = Self { address, config: Arc::new(Mutex::new(config)), seen: Arc::default() };
        let (config, seen) = (Arc::clone(&node.config), Arc::clone(&node.seen));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let config = Arc::clone(&config.lock().expect("no panic before"));
                let seen = Arc::clone(&seen);
                tokio::spawn(async move {
                    let Ok(stream) = TlsAcceptor::from(config).accept(socket).await else { return };
                    seen.connections.fetch_add(1, Ordering::SeqCst);
                    let (_, session) = stream.get_ref();
                    if session.handshake_kind() == Some(HandshakeKind::Resumed) {
                        seen.resumed.fetch_add(1, Ordering::SeqCst);
                    }
                    let name = session.server_name().unwrap_or("-").to_owned();
                    let h2 = session.alpn_protocol() == Some(b"h2");
                    let service = service_fn(move |request| {
                        let (name, seen) = (name.clone(), Arc::clone(&seen));
                        async move { Ok::<_, hyper::Error>(answer(&request, &name, &seen)) }
                    });
                    let io = TokioIo::new(stream);
                    let _ = if h2 {
                        http2::Builder::new(TokioExecutor::new())
                            .serve_connection(io, service)
                            .await
                    } else {
                        http1::Builder::new().serve_connection(io, service).await
                    };
                });
            }
        });
        node
    }

    fn gate(&self, upstream: &str, more: &str) -> Gate {
        self.gate_with(upstream, INSTANCE, more)
    }

    fn gate_with(&self, upstream: &str, keys: &str, more: &str) -> Gate {
        Gate::before(Cluster::empty(), &self.text(upstream, keys, more))
    }

    fn text(&self, upstream: &str, keys: &str, more: &str) -> String {
        format!(
            "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
             \"127.0.0.1:0\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\nupstream = \
             {{ {upstream} }}\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", address = \
             \"{}\" }}] }}\n{keys}\n[cluster.app.hold]\ntimeout = \"300ms\"\n{more}",
            self.address
        )
    }

    fn count(&self, of: impl Fn(&Seen) -> &AtomicUsize) -> usize {
        of(&self.seen).load(Ordering::SeqCst)
    }
}

fn answer(request: &Request<Incoming>, name: &str, seen: &Seen) -> Response<Full<Bytes>> {
    match request.uri().path() {
        "/healthz" | "/primary" => drop(seen.probes.fetch_add(1, Ordering::SeqCst)),
        _ if request.method() == "POST" => drop(seen.writes.fetch_add(1, Ordering::SeqCst)),
        _ => {}
    }
    let mut response = Response::builder()
        .header("x-version", format!("{:?}", request.version()))
        .header("x-uri", request.uri().to_string())
        .header("x-name", name);
    if request.uri().path() == "/last" {
        response = response.header("connection", "close");
    }
    response.body(Full::default()).expect("a response")
}

/// An authority, and a node's certificate of it for these hosts, in `node.crt`.
fn authority(hosts: &[&str]) -> Authority {
    let authority = Authority::new();
    authority.write(authority.directory.path(), "node", hosts);
    authority
}

fn trusts(authority: &Authority, more: &str) -> String {
    format!("tls = {{ ca = \"{}\"{more} }}", authority.path("ca.crt").display())
}

#[tokio::test]
async fn a_static_node_is_known_by_its_address_and_its_sessions_are_resumed() {
    let authority = authority(&["127.0.0.1"]);
    let node = Node::start(config(authority.directory.path(), "node", &[], None)).await;
    let gate = node.gate(&trusts(&authority, ""), "");
    for method in ["GET", "POST"] {
        let answer = gate.send(method, "/last", b"").await;
        assert_eq!((answer.status, answer.field("x-name")), (200, Some("-")), "{}", answer.text());
        assert_eq!(answer.field("x-version"), Some("HTTP/1.1"));
    }
    assert_eq!(node.count(|seen| &seen.connections), 2);
    assert_eq!(node.count(|seen| &seen.resumed), 1);
    assert_eq!(gate.send("GET", "/", b"").await.status, 200);
    assert_eq!(gate.send("GET", "/", b"").await.status, 200);
    assert_eq!(node.count(|seen| &seen.connections), 3, "they are kept");
}

#[tokio::test]
async fn the_name_can_be_another() {
    let authority = authority(&["app.test"]);
    let node = Node::start(config(authority.directory.path(), "node", &[], None)).await;
    let gate = node.gate(&trusts(&authority, ", server_name = \"app.test\""), "");
    let answer = gate.send("GET", "/", b"").await;
    assert_eq!((answer.status, answer.field("x-name")), (200, Some("app.test")));
}

#[tokio::test]
async fn nodes_choose_the_protocol_where_they_may() {
    let authority = authority(&["127.0.0.1"]);
    let directory = authority.directory.path();
    for (protocol, alpn, version) in [
        ("auto", BOTH, "HTTP/2.0"),
        ("auto", &["http/1.1"], "HTTP/1.1"),
        ("auto", &[], "HTTP/1.1"),
        ("h2", BOTH, "HTTP/2.0"),
        ("http/1.1", BOTH, "HTTP/1.1"),
    ] {
        let node = Node::start(config(directory, "node", alpn, None)).await;
        let gate = node.gate(&format!("protocol = \"{protocol}\", {}", trusts(&authority, "")), "");
        let conns: Vec<_> = (0..10)
            .map(|_| {
                let address = gate.address();
                tokio::spawn(async move {
                    litegate::testkit::client::request(address, "POST", "/x", "", b"x").await
                })
            })
            .collect();
        for conn in conns {
            let answer = conn.await.expect("it ends").expect("an answer");
            assert_eq!((answer.status, answer.field("x-version")), (200, Some(version)));
            if version == "HTTP/2.0" {
                let uri = answer.field("x-uri").expect("the node says it");
                assert!(uri.starts_with("https://"), "{uri}");
            }
        }
        if version == "HTTP/2.0" {
            assert_eq!(node.count(|seen| &seen.connections), 1, "{protocol} {alpn:?}");
        }
        assert_eq!(node.count(|seen| &seen.writes), 10);
    }
}

#[tokio::test]
async fn who_can_not_show_to_be_the_node_gets_nothing() {
    let ours = authority(&["127.0.0.1"]);
    let theirs = authority(&["127.0.0.1"]);
    let elsewhere = authority(&["127.0.0.9"]);
    ours.write_expired("late", &["127.0.0.1"]);
    let own = |authority: &Authority, name| config(authority.directory.path(), name, BOTH, None);
    let trust = trusts(&ours, "");
    for (what, node, upstream, word, reason) in [
        ("another authority", own(&theirs, "node"), &trust, "node_certificate", "certificate"),
        (
            "another name",
            own(&elsewhere, "node"),
            &trusts(&elsewhere, ""),
            "node_certificate",
            "certificate",
        ),
        ("expired", own(&ours, "late"), &trust, "node_certificate", "certificate"),
        (
            "no HTTP/2",
            config(ours.directory.path(), "node", &["http/1.1"], None),
            &format!("protocol = \"h2\", {trust}"),
            "node_tls",
            "tls",
        ),
        (
            "without a certificate of ours",
            config(ours.directory.path(), "node", BOTH, Some(&ours)),
            &trust,
            "node_tls",
            "tls",
        ),
        (
            "without a certificate of ours, by HTTP/2",
            config(ours.directory.path(), "node", BOTH, Some(&ours)),
            &format!("protocol = \"auto\", {trust}"),
            "node_tls",
            "tls",
        ),
    ] {
        let node = Node::start(node).await;
        let gate = node.gate(upstream, "");
        for method in ["GET", "POST"] {
            let answer = gate.send(method, "/", b"x").await;
            assert_eq!(answer.status, 502, "{what}: {}", answer.text());
            assert!(answer.text().contains(word), "{what}: {}", answer.text());
            let status = answer.field("proxy-status").expect("a Proxy-Status");
            assert!(status.contains("error=tls_"), "{what}: {status}");
        }
        let failures = "litegate_upstream_failures_total";
        assert!(gate.metric(failures, &format!("reason=\"{reason}\"")).await >= 2, "{what}");
        assert_eq!(node.count(|seen| &seen.writes), 0, "{what}");
    }
}

#[tokio::test]
async fn a_node_in_clear_text_gets_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let node = Node {
        address: listener.local_addr().expect("bound"),
        config: Arc::new(Mutex::new(config(authority(&["a"]).directory.path(), "node", &[], None))),
        seen: Arc::default(),
    };
    // As every server of HTTP does with what is none.
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.read(&mut [0; 16]).await;
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let authority = authority(&["127.0.0.1"]);
    let answer = node.gate(&trusts(&authority, ""), "").send("GET", "/", b"").await;
    assert_eq!(answer.status, 502);
    assert!(answer.text().contains("node_tls"), "{}", answer.text());
}

#[tokio::test]
async fn check_online_shakes_hands() {
    let (ours, theirs) = (authority(&["127.0.0.1"]), authority(&["127.0.0.1"]));
    let node = Node::start(config(ours.directory.path(), "node", BOTH, None)).await;
    for (authority, said) in [(&ours, "  answers"), (&theirs, "DOES NOT ANSWER: its certificate")] {
        let text = node.text(&trusts(authority, ""), INSTANCE, "");
        let (text, code) = crate::check::check(&text).await;
        assert_eq!(code, Some(i32::from(said.contains("NOT"))), "{text}");
        assert!(text.contains(said), "{text}");
    }
}

#[tokio::test]
async fn nodes_that_ask_are_shown_our_certificate() {
    let authority = authority(&["127.0.0.1"]);
    let own = authority.write(authority.directory.path(), "litegate", &["litegate"]);
    let own = own.trim_matches(['{', '}']);
    for protocol in ["http/1.1", "h2"] {
        let directory = authority.directory.path();
        let node = Node::start(config(directory, "node", BOTH, Some(&authority))).await;
        let tls = trusts(&authority, &format!(",{own}"));
        let gate = node.gate(&format!("protocol = \"{protocol}\", {tls}"), "");
        for method in ["GET", "POST"] {
            let answer = gate.send(method, "/", b"x").await;
            assert_eq!(answer.status, 200, "{protocol}: {}", answer.text());
        }
        let expiry = "litegate_upstream_certificate_expiry_timestamp_seconds";
        assert!(gate.metric(expiry, "litegate.crt").await > 0);
    }
}

#[tokio::test]
async fn with_the_switch_that_says_so_everybody_is_believed() {
    let authority = authority(&["nobody.test"]);
    let node = Node::start(config(authority.directory.path(), "node", BOTH, None)).await;
    let gate = node.gate("tls = { insecure_skip_verify = true }", "");
    assert_eq!(gate.send("POST", "/", b"x").await.status, 200);
}

#[tokio::test]
async fn changed_files_are_taken_without_a_restart() {
    let (before, after) = (authority(&["127.0.0.1"]), authority(&["127.0.0.1"]));
    let node = Node::start(config(before.directory.path(), "node", &[], None)).await;
    let gate = node.gate(&trusts(&before, ""), "");
    assert_eq!(gate.send("POST", "/last", b"x").await.status, 200);
    *node.config.lock().expect("no panic before") =
        config(after.directory.path(), "node", &[], None);
    let answer = gate.send("POST", "/last", b"x").await;
    assert!(answer.text().contains("node_certificate"), "{}", answer.text());
    // As Kubernetes does it: another file in its place.
    std::fs::copy(after.path("ca.crt"), before.path("next")).expect("there is room");
    std::fs::rename(before.path("next"), before.path("ca.crt")).expect("it is there");
    let reloads = "litegate_upstream_certificate_reloads_total";
    until(async || gate.metric(reloads, "applied").await == 1).await;
    until(async || gate.send("POST", "/last", b"x").await.status == 200).await;
    std::fs::write(before.path("ca.crt"), "nobody").expect("it is there");
    until(async || gate.metric(reloads, "refused").await == 1).await;
    assert_eq!(gate.send("POST", "/last", b"x").await.status, 200, "the former stay");
}

async fn until(mut so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !so().await {
        assert!(Instant::now() < deadline, "in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn probes_at_the_apps_port_speak_tls_too() {
    let authority = authority(&["127.0.0.1"]);
    let node = Node::start(config(authority.directory.path(), "node", BOTH, None)).await;
    let primary = "primary = { type = \"http\", path = \"/primary\", interval = \"50ms\" }";
    let upstream = format!("protocol = \"auto\", {}", trusts(&authority, ""));
    let health = "[cluster.app.health]\npath = \"/healthz\"\ninterval = \"50ms\"\n";
    let gate = node.gate_with(&upstream, primary, health);
    gate.until(|topology| topology.primary.is_some()).await;
    until(async || node.count(|seen| &seen.probes) > 6).await;
    assert_eq!(gate.send("POST", "/", b"x").await.status, 200);
    assert!(node.count(|seen| &seen.resumed) > 0, "theirs are resumed as well");
}

#[test]
fn what_is_written_wrong_is_said_with_its_place() {
    for (upstream, said) in [
        ("protocol = \"auto\"", "needs TLS"),
        ("tls = { server_name = \"no name\" }", "`server_name` needs a host's name"),
        ("tls = { certificate = \"a\" }", "`key` is missing"),
        ("tls = { key = \"a\" }", "`certificate` is missing"),
        ("tls = { insecure_skip_verify = true, ca = \"a\" }", "believes everybody"),
        ("tls = { sni = \"a\" }", "unknown key `sni`"),
        ("tls = \"yes\"", "`tls` needs a table"),
    ] {
        let text = format!(
            "[[listener]]\naddress = \"127.0.0.1:0\"\n[cluster.app]\nport = 1\nupstream = {{ \
             {upstream} }}\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", address = \
             \"127.0.0.1\" }}] }}\nprimary = {{ type = \"instance\", name = \"a\" }}\n"
        );
        let faults = litegate::config::load::parse("test.toml", &text, []).expect_err(upstream);
        let faults = faults.to_string();
        assert!(faults.contains(said) && faults.contains('^'), "{upstream}: {faults}");
    }
}

#[test]
fn a_file_that_is_not_there_keeps_litegate_from_starting() {
    let text = "[[listener]]\naddress = \"127.0.0.1:0\"\n[cluster.app]\nport = 1\nupstream = { tls \
                = { ca = \"/nowhere/ca.crt\" } }\nmembers = { type = \"static\", nodes = [{ name = \
                \"a\", address = \"127.0.0.1\" }] }\nprimary = { type = \"instance\", name = \"a\" \
                }\n";
    let config = litegate::config::load::parse("test.toml", text, []).expect("it is well written");
    for error in [
        litegate::app::read_files(&config).expect_err("it is not there"),
        litegate::app::start(config).expect_err("it is not there"),
    ] {
        assert!(error.to_string().contains("/nowhere/ca.crt"), "{error}");
    }
}
