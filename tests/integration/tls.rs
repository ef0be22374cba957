//! TLS to clients, over real sockets.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use litegate::testkit::Options;
use rcgen::{CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ClientConfig, HandshakeKind, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::gate::Gate;

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const SOON: Duration = Duration::from_secs(5);

/// An authority of our own, and a directory for what it signs.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    pub(crate) directory: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("it signs itself");
        let directory = tempfile::tempdir().expect("there is room");
        std::fs::write(directory.path().join("ca.crt"), issuer.pem()).expect("there is room");
        Self { issuer, directory }
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn sign(&self, name: &str, hosts: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("they are names");
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("it signs");
        (certificate, key)
    }

    /// Writes `NAME.crt` and `NAME.key` into a directory, and returns the configuration's words.
    pub(crate) fn write(&self, directory: &Path, name: &str, hosts: &[&str]) -> String {
        let (certificate, key) = self.sign(name, hosts);
        let (crt, pem) =
            (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
        std::fs::write(&crt, certificate.pem()).expect("there is room");
        std::fs::write(&pem, key.serialize_pem()).expect("there is room");
        format!("{{ certificate = \"{}\", key = \"{}\" }}", crt.display(), pem.display())
    }

    /// Writes `NAME.crt` and `NAME.key` as [`Authority::write`] does, but years too late.
    pub(crate) fn write_expired(&self, name: &str, hosts: &[&str]) {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("they are names");
        params.not_before = rcgen::date_time_ymd(2019, 1, 1);
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("it signs");
        let files = [(".crt", certificate.pem()), (".key", key.serialize_pem())];
        for (end, pem) in files {
            std::fs::write(self.path(&format!("{name}{end}")), pem).expect("there is room");
        }
    }

    pub(crate) fn client(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        own: Option<&str>,
        alpn: &[&str],
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("it is one");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("they are supported")
            .with_root_certificates(roots);
        let mut config = match own {
            None => config.with_no_client_auth(),
            Some(name) => {
                let (certificate, key) = self.sign(name, &[]);
                let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
                config
                    .with_client_auth_cert(vec![certificate.der().clone()], key)
                    .expect("they fit")
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

pub(crate) const BOTH: &[&SupportedProtocolVersion] =
    &[&rustls::version::TLS13, &rustls::version::TLS12];

/// A gate whose listener has these keys.
pub(crate) async fn listening(keys: &str, edit: impl FnOnce(String) -> String) -> Gate {
    let keys = format!("address = \"127.0.0.1:0\"\n{keys}");
    let edit = |text: String| edit(text.replacen("address = \"127.0.0.1:0\"", &keys, 1));
    Gate::edited(Options::default(), LITEFS, edit).await
}

pub(crate) async fn connect(
    gate: &Gate,
    config: &Arc<ClientConfig>,
    host: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(gate.address()).await?;
    socket.set_nodelay(true)?;
    let host = ServerName::try_from(host.to_owned()).expect("a name");
    let connector = TlsConnector::from(Arc::clone(config));
    timeout(SOON, connector.connect(host, socket)).await.expect("in time")
}

struct Answer {
    head: http::response::Parts,
    body: Bytes,
}

impl Answer {
    /// A field of the request that the app saw.
    fn seen(&self, name: &str) -> Option<String> {
        let echo: Value = serde_json::from_slice(&self.body).expect("an echo");
        let fields = echo["fields"].as_array().expect("a list").iter();
        let mut values = fields.filter(|f| f[0] == name).filter_map(|f| f[1].as_str());
        values.next().map(str::to_owned)
    }
}

type Sender = http1::SendRequest<Full<Bytes>>;

async fn http(stream: TlsStream<TcpStream>) -> Sender {
    let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.expect("no I/O yet");
    tokio::spawn(driver);
    sender
}

async fn ask(sender: &mut Sender, method: &str, target: &str, fields: &[(&str, &str)]) -> Answer {
    let mut request = http::Request::builder().method(method).uri(target).header("host", "a.test");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::default()).expect("a request");
    sender.ready().await.expect("kept alive");
    let sent = timeout(SOON, sender.send_request(request)).await.expect("in time");
    let (head, body) = sent.expect("an answer").into_parts();
    let body = body.collect().await.expect("whole").to_bytes();
    Answer { head, body }
}

/// The first DER certificate that the server showed.
fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().expect("it has one")[0].clone().into_owned()
}

#[tokio::test]
async fn both_versions_are_spoken_sessions_resume_and_the_app_hears_of_it() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let gate = listening(&format!("tls = {{ certificates = [{pair}] }}"), |text| text).await;
    for (version, want) in [
        (&rustls::version::TLS13, ProtocolVersion::TLSv1_3),
        (&rustls::version::TLS12, ProtocolVersion::TLSv1_2),
    ] {
        let config = authority.client(&[version], None, &[]);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let stream = connect(&gate, &config, "a.test").await.expect("a session");
            let (_, session) = stream.get_ref();
            assert_eq!(session.protocol_version(), Some(want));
            assert_eq!(session.handshake_kind(), Some(kind), "{want:?}");
            let mut sender = http(stream).await;
            let fields = [("x-forwarded-proto", "gopher"), ("client-cert", ":eA==:")];
            for _ in 0..2 {
                let echo = ask(&mut sender, "GET", "/echo", &fields).await;
                assert_eq!(echo.seen("x-forwarded-proto").as_deref(), Some("https"));
                assert_eq!(echo.seen("client-cert"), None);
                assert!(echo.seen("forwarded").is_some_and(|f| f.ends_with("proto=https")));
            }
            let large = ask(&mut sender, "GET", "/bytes/3000000", &[]).await;
            assert_eq!(large.body.len(), 3_000_000);
            let wrote = ask(&mut sender, "POST", "/kv/a", &[]).await;
            let cookies: Vec<_> = wrote.head.headers.get_all("set-cookie").iter().collect();
            let text = format!("{cookies:?}");
            assert!(text.contains("__Host-litegate=") && text.contains("Secure"), "{text}");
        }
    }
    assert_eq!(gate.metric("litegate_tls_handshakes_total", "done").await, 4);
}

#[tokio::test]
async fn a_quiet_session_is_parked_and_comes_back() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let gate = listening(&format!("tls = {{ certificates = [{pair}] }}"), |text| text).await;
    let stream = connect(&gate, &authority.client(BOTH, None, &[]), "a.test").await;
    let mut sender = http(stream.expect("a session")).await;
    for _ in 0..2 {
        assert_eq!(ask(&mut sender, "GET", "/whoami", &[]).await.head.status, 200);
        // Longer than a connection stays active without a request.
        tokio::time::sleep(Duration::from_millis(2500)).await;
    }
    assert_eq!(ask(&mut sender, "GET", "/whoami", &[]).await.head.status, 200);
}

#[tokio::test]
async fn an_upgrade_below_tls_becomes_a_tunnel_and_ends_properly() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let gate = listening(&format!("tls = {{ certificates = [{pair}] }}"), |text| text).await;
    let stream = connect(&gate, &authority.client(BOTH, None, &[]), "a.test").await;
    let mut stream = stream.expect("a session");
    stream
        .write_all(
            b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
        )
        .await
        .expect("litegate reads");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(SOON, stream.read_u8()).await.expect("in time").expect("a head"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    stream.write_all(&vec![b'x'; 100_000]).await.expect("the tunnel carries");
    stream.flush().await.expect("all of it");
    let mut back = vec![0; 100_000];
    timeout(SOON, stream.read_exact(&mut back)).await.expect("in time").expect("and back");
    stream.shutdown().await.expect("half a close");
    let mut rest = Vec::new();
    timeout(SOON, stream.read_to_end(&mut rest)).await.expect("in time").expect("a proper end");
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn each_host_gets_its_certificate() {
    let authority = Authority::new();
    let at = authority.directory.path();
    let pairs = [
        authority.write(at, "first", &["a.test", "nobody.test"]),
        authority.write(at, "second", &["b.test", "*.b.test"]),
    ]
    .join(", ");
    let gate = listening(&format!("tls = {{ certificates = [{pairs}] }}"), |text| text).await;
    let config = authority.client(BOTH, None, &[]);
    let mut seen = Vec::new();
    for host in ["a.test", "b.test", "www.b.test"] {
        seen.push(shown(&connect(&gate, &config, host).await.expect("its own name")));
    }
    assert_ne!(seen[0], seen[1]);
    assert_eq!(seen[1], seen[2]);
    assert!(connect(&gate, &config, "c.test").await.is_err(), "the first is not for that name");
}

#[tokio::test]
async fn clients_certificates_are_asked_for_verified_and_passed_on() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let ca = authority.path("ca.crt");
    for (auth, without) in [("required", false), ("optional", true)] {
        let tls = format!(
            "tls = {{ certificates = [{pair}], client_ca = {ca:?}, client_auth = \"{auth}\" }}"
        );
        let gate = listening(&tls, |text| text).await;
        let config = authority.client(BOTH, Some("ada"), &[]);
        for _ in 0..2 {
            let mut sender = http(connect(&gate, &config, "a.test").await.expect("known")).await;
            let echo = ask(&mut sender, "GET", "/echo", &[("client-cert", ":eA==:")]).await;
            assert_eq!(echo.seen("x-client-cert-subject").as_deref(), Some("CN=ada"));
            assert!(echo.seen("client-cert").is_some_and(|c| c.len() > 100 && c.starts_with(':')));
        }
        // TLS 1.3 tells of a refusal only after the client believes that it is done.
        let works = async |config: &Arc<ClientConfig>| {
            let Ok(mut stream) = connect(&gate, config, "a.test").await else { return false };
            let ask = b"GET /whoami HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            let mut answer = Vec::new();
            stream.write_all(ask).await.is_ok()
                && timeout(SOON, stream.read_to_end(&mut answer)).await.expect("in time").is_ok()
                && answer.starts_with(b"HTTP/1.1 200 ")
        };
        assert_eq!(works(&authority.client(BOTH, None, &[])).await, without, "{auth}");
        // One that trusts our server, and is trusted by nobody.
        let mut imposter = (*stranger.client(BOTH, Some("ada"), &[])).clone();
        imposter.dangerous().set_certificate_verifier(Arc::new(Anything));
        assert!(!works(&Arc::new(imposter)).await, "{auth}");
    }
}

/// Believes every server: what is tested is whom the server believes.
#[derive(Debug)]
struct Anything;

impl rustls::client::danger::ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        let provider = rustls::crypto::ring::default_provider();
        provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Waits until a new connection is shown another certificate than `before`.
async fn changes(
    gate: &Gate,
    config: &Arc<ClientConfig>,
    before: &CertificateDer<'static>,
) -> CertificateDer<'static> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let now = shown(&connect(gate, config, "a.test").await.expect("it goes on"));
        if now != *before {
            return now;
        }
        assert!(Instant::now() < deadline, "the certificate stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn certificates_are_swapped_as_kubernetes_does_it_and_bad_ones_refused() {
    let authority = Authority::new();
    let at = authority.directory.path();
    // `tls.crt` → `..data/tls.crt`, `..data` → `..1`: the volume of a secret.
    for generation in ["..1", "..2"] {
        std::fs::create_dir(at.join(generation)).expect("there is room");
        authority.write(&at.join(generation), "tls", &["a.test"]);
    }
    let point = |generation: &str| {
        std::os::unix::fs::symlink(generation, at.join("..tmp")).expect("a link");
        std::fs::rename(at.join("..tmp"), at.join("..data")).expect("it is swapped");
    };
    point("..1");
    for file in ["tls.crt", "tls.key"] {
        std::os::unix::fs::symlink(format!("..data/{file}"), at.join(file)).expect("a link");
    }
    let (crt, key) = (at.join("tls.crt"), at.join("tls.key"));
    let tls = format!("tls = {{ certificates = [{{ certificate = {crt:?}, key = {key:?} }}] }}");
    let gate = listening(&tls, |text| text).await;
    let config = authority.client(BOTH, None, &[]);
    let stream = connect(&gate, &config, "a.test").await.expect("a session");
    let first = shown(&stream);
    let mut kept = http(stream).await;
    // So that each look is at a whole handshake.
    let fresh = |authority: &Authority| authority.client(BOTH, None, &[]);
    point("..2");
    let second = changes(&gate, &fresh(&authority), &first).await;
    assert_eq!(ask(&mut kept, "GET", "/whoami", &[]).await.head.status, 200, "undisturbed");

    std::fs::write(at.join("..2/tls.key"), "nonsense").expect("there is room");
    let deadline = Instant::now() + Duration::from_secs(15);
    while gate.metric("litegate_certificate_reloads_total", "refused").await == 0 {
        assert!(Instant::now() < deadline, "nobody looks");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let still = shown(&connect(&gate, &fresh(&authority), "a.test").await.expect("as before"));
    assert_eq!(still, second);
    let expiry = gate.metric("litegate_certificate_expiry_timestamp_seconds", "tls.crt").await;
    assert!(expiry > 1_700_000_000, "{expiry}");
    point("..1");
    assert_eq!(changes(&gate, &fresh(&authority), &second).await, first);
}

#[tokio::test]
async fn what_is_no_tls_or_takes_too_long_is_closed_and_holds_nobody_up_for_ever() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let gate = listening(&format!("tls = {{ certificates = [{pair}] }}"), |text| {
        let limits = "[limits]\ntls_handshake = \"1s\"\ntls_handshakes = 1";
        text.replace("[limits]", limits).replace("workers = 2", "workers = 1")
    })
    .await;
    let config = authority.client(BOTH, None, &[]);
    let mut clear = gate.conn().await;
    clear.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("litegate reads");
    let mut rest = Vec::new();
    let end = timeout(SOON, clear.stream.read_to_end(&mut rest)).await.expect("closed");
    assert!(end.is_err() || rest.first() == Some(&0x15), "an alert, or nothing: {rest:?}");

    // The only place is taken until it has taken too long.
    let mut slow = gate.conn().await;
    slow.send([0x16, 3, 1, 2]).await.expect("litegate reads");
    let began = Instant::now();
    let end = timeout(SOON, slow.stream.read_to_end(&mut rest)).await;
    assert!(end.is_ok() && began.elapsed() < SOON, "it stays open");
    let mut sender = http(connect(&gate, &config, "a.test").await.expect("its turn")).await;
    assert_eq!(ask(&mut sender, "GET", "/whoami", &[]).await.head.status, 200);
    assert_eq!(gate.metric("litegate_tls_handshakes_total", "timed_out").await, 1);
    assert_eq!(gate.metric("litegate_tls_handshakes_total", "failed").await, 1);
}

#[tokio::test]
async fn the_proxy_protocol_comes_before_tls() {
    let authority = Authority::new();
    let pair = authority.write(authority.directory.path(), "a", &["a.test"]);
    let keys = format!("proxy_protocol = \"require\"\ntls = {{ certificates = [{pair}] }}");
    let gate = listening(&keys, |text| text).await;
    let mut socket = TcpStream::connect(gate.address()).await.expect("it listens");
    socket
        .write_all(b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n")
        .await
        .expect("litegate reads");
    let connector = TlsConnector::from(authority.client(BOTH, None, &[]));
    let host = ServerName::try_from("a.test").expect("a name");
    let stream = timeout(SOON, connector.connect(host, socket)).await.expect("in time");
    let mut sender = http(stream.expect("a session")).await;
    let echo = ask(&mut sender, "GET", "/echo", &[]).await;
    assert_eq!(echo.seen("x-forwarded-for").as_deref(), Some("192.0.2.7"));
    assert_eq!(echo.seen("x-forwarded-proto").as_deref(), Some("https"));
}

#[test]
fn a_configuration_whose_files_are_wrong_does_not_start() {
    let text = "[[listener]]\naddress = \"127.0.0.1:0\"\ntls = { certificates = [{ certificate = \
                \"/nowhere.crt\", key = \"/nowhere.key\" }] }\n[cluster.app]\nport = 1\nmembers = { \
                type = \"static\", nodes = [{ name = \"a\", address = \"127.0.0.1\" }] }\nprimary \
                = { type = \"instance\", name = \"a\" }\n";
    let config = litegate::config::load::parse("test.toml", text, []).expect("it is well-formed");
    let error = litegate::app::read_files(&config).expect_err("there are no files").to_string();
    assert!(error.contains("/nowhere.crt"), "{error}");
    let error = litegate::app::start(config).expect_err("there are no files").to_string();
    assert!(error.contains("/nowhere.crt"), "{error}");
}
