//! Certificates by ACME, from Pebble: Let's Encrypt's own server for tests, which refuses good
//! nonces, mixes up orders of things, and forgets everything when it ends.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use litegate::net::{pem, tls::client};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

use crate::process::{Process, component, eventually, free_port};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const DOMAINS: [&str; 2] = ["abaci.example", "www.abaci.example"];

/// How long a certificate holds: it is renewed after 28 to 30 s.
const LIFE: u64 = 45;
/// How long it may take until there is a certificate, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_mins(2);

/// The DNS for Pebble, which asks by TCP. Every name has this machine's address.
struct Dns {
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Dns {
    fn start() -> Self {
        let socket = TcpListener::bind((LOOPBACK, 0)).expect("loopback has ports");
        let address = socket.local_addr().expect("it is bound");
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let thread = thread::spawn(move || {
            while let Ok((mut stream, _)) = socket.accept()
                && !ended.load(Ordering::Relaxed)
            {
                // A Pebble that is killed meanwhile is nobody's fault.
                let _ = exchange(&mut stream);
            }
        });
        Self { address, ends, thread: Some(thread) }
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().expect("it was started").join();
    }
}

/// RFC 1035 section 4.2.2: each message has its length before it.
fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut query = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut query)?;
    let answer = answer(&query);
    let length = u16::try_from(answer.len()).expect("it is short").to_be_bytes();
    stream.write_all(&[&length[..], &answer].concat())
}

/// RFC 1035 section 4: the question again, and 127.0.0.1 if it was for an address of that kind.
fn answer(query: &[u8]) -> Vec<u8> {
    let name = 12 + query[12..].iter().position(|length| *length == 0).expect("a name ends") + 1;
    let is_a = query[name..name + 2] == [0, 1];
    let mut answer = [&query[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]].concat();
    answer.extend(&query[12..name + 4]);
    if is_a {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
    }
    answer
}

/// Where things are.
struct Place {
    directory: tempfile::TempDir,
    listener: u16,
    admin: u16,
    acme: u16,
    management: u16,
    dns: Dns,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("there is room");
        let made = rcgen::generate_simple_self_signed(vec![LOOPBACK.to_string()]);
        let made = made.expect("it signs");
        let put = |name: &str, content: String| {
            fs::write(directory.path().join(name), content).expect("there is room");
        };
        put("pebble.crt", made.cert.pem());
        put("pebble.key", made.signing_key.serialize_pem());
        let [listener, admin, acme, management] = [(); 4].map(|()| free_port(&[LOOPBACK]));
        let at = |name: &str| directory.path().join(name).display().to_string();
        let config = serde_json::json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{acme}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": at("pebble.crt"),
            "privateKey": at("pebble.key"),
            "httpPort": 1,
            "tlsPort": listener,
            "keyAlgorithm": "ecdsa",
            "retryAfter": { "authz": 1, "order": 1 },
            "profiles": { "default": { "description": "short", "validityPeriod": LIFE } },
        }});
        put("pebble.json", config.to_string());
        let text = format!(
            "[[listener]]\naddress = \"127.0.0.1:{listener}\"\n[listener.tls.acme]\ndirectory = \
             \"https://127.0.0.1:{acme}/dir\"\nca = {ca:?}\ncontacts = \"mailto:ops@abaci.example\"\n\
             domains = {DOMAINS:?}\ncache = {cache:?}\nterms_agreed = true\n[admin]\naddress = \
             \"127.0.0.1:{admin}\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\n\
             members = {{ type = \"static\", nodes = [{{ name = \"a\", address = \"127.0.0.1:1\" }}] \
             }}\nprimary = {{ type = \"instance\", name = \"a\" }}\nhold = {{ timeout = \"0s\" }}\n",
            ca = at("pebble.crt"),
            cache = at("cache"),
        );
        put("litegate.toml", text);
        Self { directory, listener, admin, acme, management, dns: Dns::start() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn litegate(&self, log: &str) -> Process {
        let config = self.at("litegate.toml");
        let args = ["run", "--config", config.to_str().expect("UTF-8")];
        let program = Path::new(env!("CARGO_BIN_EXE_litegate"));
        let process = Process::start("litegate", program, &args, &self.at(log));
        eventually("litegate listens", Duration::from_secs(20), || {
            TcpStream::connect((LOOPBACK, self.listener)).map_err(|error| error.to_string())
        });
        process
    }

    /// Starts one that refuses so many good nonces of a hundred. Returns its root, too.
    fn pebble(&self, refused: u8) -> (Process, RootCertStore) {
        let nonces = format!("PEBBLE_WFE_NONCEREJECT={refused}");
        let (program, config) = (component("pebble"), self.at("pebble.json"));
        let dns = self.dns.address.to_string();
        let args = [
            "PEBBLE_VA_NOSLEEP=1",
            &nonces,
            program.to_str().expect("UTF-8"),
            "-config",
            config.to_str().expect("UTF-8"),
            "-dnsserver",
            &dns,
        ];
        let process = Process::start("Pebble", Path::new("env"), &args, &self.at("pebble.log"));
        let own = roots(&fs::read(self.at("pebble.crt")).expect("it was written"));
        for port in [self.acme, self.management] {
            eventually("Pebble listens", Duration::from_secs(20), || {
                TcpStream::connect((LOOPBACK, port)).map_err(|error| error.to_string())
            });
        }
        let answer = get(self.management, &LOOPBACK.to_string(), verified(own), "/roots/0");
        let (_, answer) = answer.expect("Pebble tells its root");
        let (_, pem) = answer.split_once("\r\n\r\n").expect("a whole answer");
        (process, roots(pem.as_bytes()))
    }

    /// The certificate that this domain's clients are shown, whoever made it.
    fn shown(&self, domain: &str) -> Result<CertificateDer<'static>, String> {
        let mut tls = client(Vec::new(), true).expect("it needs no files");
        tls.alpn_protocols.clear();
        get(self.listener, domain, tls, "/").map(|(certificate, _)| certificate)
    }

    /// The certificate that clients who trust this root believe, on all domains, and are answered.
    fn believed(&self, root: &RootCertStore) -> Result<CertificateDer<'static>, String> {
        let [a, b] = DOMAINS.map(|domain| {
            let (shown, answer) = get(self.listener, domain, verified(root.clone()), "/")?;
            assert!(answer.starts_with("HTTP/1.1 5"), "the only node is away: {answer}");
            Ok::<_, String>(shown)
        });
        let (a, b) = (a?, b?);
        assert_eq!(a, b, "one certificate has both");
        Ok(a)
    }

    /// A sample of `/metrics`, whose one certificate is ours.
    fn metric(&self, name: &str, label: &str) -> u64 {
        let address = SocketAddr::new(LOOPBACK, self.admin);
        let mut stream = TcpStream::connect(address).expect("the admin listener is there");
        write!(stream, "GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .expect("it sends");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("it is answered");
        let is_it = |line: &&str| line.starts_with(name) && line.contains(label);
        let line = page.lines().find(is_it).unwrap_or_else(|| panic!("{name} {label}: {page}"));
        line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number")
    }

    /// What is kept, of which there must be a certificate and an account, for the owner alone.
    fn kept(&self) -> (Vec<u8>, Vec<u8>) {
        let mut files: Vec<_> = fs::read_dir(self.at("cache"))
            .expect("it was made")
            .map(|entry| entry.expect("it can be listed").path())
            .collect();
        files.sort();
        for file in &files {
            let mode = fs::metadata(file).expect("it is there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", file.display());
        }
        let [certificate, account] = &files[..] else { panic!("two files: {files:?}") };
        let read = |file: &PathBuf| fs::read(file).expect("it can be read");
        (read(certificate), read(account))
    }
}

fn roots(pem: &[u8]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_slice(pem).expect("a certificate");
    roots.add(certificate).expect("it can be trusted");
    roots
}

fn verified(roots: RootCertStore) -> ClientConfig {
    let tls = ClientConfig::builder_with_provider(pem::provider());
    let tls = tls.with_safe_default_protocol_versions().expect("it has some");
    tls.with_root_certificates(roots).with_no_client_auth()
}

/// GETs a path over a new session. Returns the server's certificate and the answer.
fn get(
    port: u16,
    name: &str,
    tls: ClientConfig,
    path: &str,
) -> Result<(CertificateDer<'static>, String), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let host = ServerName::try_from(name.to_owned()).expect("a name");
    let connection = ClientConnection::new(Arc::new(tls), host).map_err(|error| text(&error))?;
    let socket = TcpStream::connect((LOOPBACK, port)).map_err(|error| text(&error))?;
    socket.set_read_timeout(Some(Duration::from_secs(30))).map_err(|error| text(&error))?;
    let mut session = StreamOwned::new(connection, socket);
    write!(session, "GET {path} HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n")
        .map_err(|error| text(&error))?;
    let mut answer = String::new();
    session.read_to_string(&mut answer).map_err(|error| text(&error))?;
    let certificates = session.conn.peer_certificates().expect("the handshake is done");
    Ok((certificates[0].clone(), answer))
}

#[test]
fn a_certificate_is_obtained_served_kept_and_renewed() {
    let place = Place::new();
    let orders = "litegate_acme_orders_total";

    // The directory is down: litegate runs, says so, and tries again.
    let mut litegate = place.litegate("first.log");
    eventually("litegate says that it can't", Duration::from_secs(20), || {
        let log = litegate.log();
        if log.contains("no certificate by ACME") { Ok(()) } else { Err(log) }
    });
    place.shown(DOMAINS[0]).expect_err("there is no certificate yet");

    // It comes, and refuses every fourth nonce.
    let (mut pebble, root) = place.pebble(25);
    let first = eventually("there is a certificate", PATIENCE, || place.believed(&root));
    let (kept, account) = place.kept();
    assert_eq!(CertificateDer::from_pem_slice(&kept).expect("a certificate"), first);
    assert!(place.metric(orders, "outcome=\"obtained\"") >= 1);
    assert!(place.metric(orders, "outcome=\"failed\"") >= 1);
    assert!(place.metric("litegate_certificate_expiry_timestamp_seconds{", ".pem") > 1_700_000_000);

    // Another directory in its place knows neither account nor certificate.
    pebble.kill();
    let (mut pebble, other_root) = place.pebble(0);
    let second = eventually("it is renewed", PATIENCE, || {
        // At no time is there none.
        let shown = place.shown(DOMAINS[0]).expect("a certificate is in force");
        if shown == first { Err("the first is in force".to_owned()) } else { Ok(shown) }
    });
    let (_, other_account) = place.kept();
    assert_ne!(account, other_account, "an account was made anew");
    assert_eq!(place.believed(&other_root), Ok(second.clone()));

    // A restart needs no directory.
    pebble.kill();
    litegate.kill();
    let litegate = place.litegate("second.log");
    assert_eq!(place.believed(&other_root), Ok(second.clone()));
    // Nor does what is in force go away when it can't be renewed.
    eventually("litegate says that it can't renew", PATIENCE, || {
        let log = litegate.log();
        if log.contains("no certificate by ACME") { Ok(()) } else { Err(log) }
    });
    assert_eq!(place.shown(DOMAINS[1]), Ok(second));
    assert_eq!(place.metric(orders, "outcome=\"obtained\""), 0);
}
