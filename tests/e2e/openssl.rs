//! What an auditor's scanner asks of TLS, asked by OpenSSL's client.
//!
//! The rows say what RFC 9325 and the RFCs of TLS recommend, and hold for every listener: there is
//! no configuration for versions or ciphers.

use std::{
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use litegate::testkit;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair};

use crate::protocols::Gate;

/// A request after whose answer litegate closes.
const GET: &str = "GET /whoami HTTP/1.0\r\nhost: a.test\r\n\r\n";
/// A client may offer all that it was built with.
const ANY: &str = "ALL:COMPLEMENTOFALL:@SECLEVEL=0";

fn openssl(args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["30", "openssl"]).args(args);
    command
}

fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("timeout is there");
    let all = [&output.stdout[..], &output.stderr].concat();
    assert_ne!(
        output.status.code(),
        Some(127),
        "openssl is missing (Debian: apt-get install openssl)"
    );
    String::from_utf8_lossy(&all).into_owned()
}

/// Files in a directory that goes with them.
struct Files(tempfile::TempDir);

impl Files {
    /// A root, an intermediate below it, and below that `first` and `second` for servers and `ada`
    /// for a client; an RSA certificate of the first's name; and a stranger.
    fn make() -> Self {
        let files = Self(tempfile::tempdir().expect("there is room"));
        let root = CertifiedIssuer::self_signed(authority("root"), key()).expect("it signs");
        let middle = CertifiedIssuer::signed_by(authority("middle"), key(), &root);
        let middle = middle.expect("it signs");
        files.write("root.crt", &root.pem());
        for (name, host) in [("first", "a.test"), ("second", "b.test"), ("ada", "ada.test")] {
            files.sign(name, host, &middle, &middle.pem());
        }
        let other = CertifiedIssuer::self_signed(authority("root"), key()).expect("it signs");
        files.sign("stranger", "ada.test", &other, "");
        let (crt, pem) = (files.path("rsa.crt"), files.path("rsa.key"));
        output(
            openssl(&["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=rsa"])
                .args(["-addext", "subjectAltName=DNS:a.test", "-keyout"])
                .arg(&pem)
                .arg("-out")
                .arg(&crt),
        );
        assert!(crt.is_file() && pem.is_file(), "openssl makes a certificate");
        files
    }

    fn sign(&self, name: &str, host: &str, issuer: &Issuer<'_, KeyPair>, chain: &str) {
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("it is a name");
        params.distinguished_name.push(DnType::CommonName, name);
        let own = key();
        let certificate = params.signed_by(&own, issuer).expect("it signs");
        self.write(&format!("{name}.crt"), &format!("{}{chain}", certificate.pem()));
        self.write(&format!("{name}.key"), &own.serialize_pem());
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.path(file), text).expect("there is room");
    }

    /// A listener's keys.
    fn listener(&self, more: &str) -> String {
        let pair = |name: &str| {
            let (crt, key) = (self.path(&format!("{name}.crt")), self.path(&format!("{name}.key")));
            format!("{{ certificate = {crt:?}, key = {key:?} }}")
        };
        let pairs = ["first", "rsa", "second"].map(pair).join(", ");
        format!("tls = {{ certificates = [{pairs}]{more} }}")
    }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// Files, a node, and gates before it by what they want of clients' certificates.
struct Stand {
    files: Files,
    gates: [(&'static str, Gate); 3],
    _cluster: testkit::Cluster,
    _runtime: tokio::runtime::Runtime,
}

impl Stand {
    fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("it starts");
        let cluster = testkit::Cluster::start(testkit::Options::default());
        let cluster = runtime.block_on(cluster).expect("loopback has ports");
        let (files, node) = (Files::make(), cluster.places()[0].app);
        let ca = files.path("root.crt");
        let gates = ["off", "optional", "required"].map(|auth| {
            let more = format!(", client_ca = {ca:?}, client_auth = \"{auth}\"");
            let more = if auth == "off" { "" } else { &*more };
            (auth, Gate::before(node, &files.listener(more), "http/1.1"))
        });
        Self { files, gates, _cluster: cluster, _runtime: runtime }
    }

    /// OpenSSL's client, whose file arguments are in the stand's directory.
    fn client(&self, auth: &str, args: &[&str]) -> Command {
        let (_, gate) = self.gates.iter().find(|(name, _)| *name == auth).expect("it is one");
        let mut command = openssl(&["s_client", "-connect", &format!("127.0.0.1:{}", gate.port())]);
        command.args(["-CAfile", "root.crt"]).args(args).current_dir(self.files.0.path());
        command
    }

    /// What the client prints of a handshake, and of an answer if it asks for one.
    fn ask(&self, auth: &str, args: &[&str], request: &str) -> String {
        let mut command = self.client(auth, args);
        if request.is_empty() {
            return plain(&output(&mut command));
        }
        let (mut child, mut stdin) = start(command.arg("-ign_eof"));
        // A client that was refused has gone.
        let _ = stdin.write_all(request.as_bytes());
        drop(stdin);
        plain(&rest(&mut child))
    }

    /// Which of the `offered` the server chooses, each time without those that it chose before.
    fn chosen(&self, args: &[&str], option: &str, mut offered: Vec<String>) -> Vec<String> {
        let mut chosen = Vec::new();
        loop {
            let mut list = offered.join(":");
            if option == "-cipher" {
                list.push_str(":@SECLEVEL=0");
            }
            let text = self.ask("off", &[args, &[option, &list]].concat(), "");
            let (_, rest) = text.split_once("Cipher is ").unwrap_or_else(|| panic!("{text}"));
            let name = rest.lines().next().unwrap_or_default().to_owned();
            if name == "(NONE)" {
                assert!(text.contains("alert handshake failure"), "{text}");
                chosen.sort();
                return chosen;
            }
            let before = offered.len();
            offered.retain(|other| *other != name);
            assert!(offered.len() < before, "{name} was not offered: {text}");
            chosen.push(name);
        }
    }
}

fn start(command: &mut Command) -> (Child, std::process::ChildStdin) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("timeout is there");
    let stdin = child.stdin.take().expect("it is piped");
    (child, stdin)
}

/// Both of its outputs, until it ends.
fn rest(child: &mut Child) -> String {
    let mut errors = child.stderr.take().expect("it is piped");
    let errors = std::thread::spawn(move || {
        let mut all = Vec::new();
        errors.read_to_end(&mut all).map(|_| all)
    });
    let mut all = Vec::new();
    child.stdout.take().expect("it is piped").read_to_end(&mut all).expect("it prints");
    let errors = errors.join().expect("it reads").expect("it prints");
    child.wait().expect("it ends");
    all.extend(errors);
    String::from_utf8_lossy(&all).into_owned()
}

/// Releases differ in blanks around an equals sign.
fn plain(text: &str) -> String {
    text.replace(" = ", "=")
}

struct Row {
    what: &'static str,
    /// The RFC that wants it so.
    why: &'static str,
    auth: &'static str,
    args: &'static [&'static str],
    request: &'static str,
    says: &'static [&'static str],
    never: &'static [&'static str],
}

const ROW: Row =
    Row { what: "", why: "", auth: "off", args: &[], request: "", says: &[], never: &[] };
/// How OpenSSL says that there is no session.
const REFUSED: &[&str] = &["Cipher is (NONE)", "alert"];
const ANSWER: &str = "HTTP/1.0 200";

const ROWS: &[Row] = &[
    Row {
        what: "TLS 1.0",
        why: "RFC 8996 section 4, RFC 9325 section 3.1.1: MUST NOT",
        args: &["-tls1", "-cipher", ANY],
        says: REFUSED,
        ..ROW
    },
    Row {
        what: "TLS 1.1",
        why: "RFC 8996 section 5, RFC 9325 section 3.1.1: MUST NOT",
        args: &["-tls1_1", "-cipher", ANY],
        says: REFUSED,
        ..ROW
    },
    Row {
        what: "TLS 1.2, nothing compressed, renegotiation and master secret bound",
        why: "RFC 9325 sections 3.1.1, 3.3 (CRIME) and 3.5; RFC 5746 section 3.6; RFC 7627",
        args: &["-tls1_2", "-comp", "-servername", "a.test"],
        request: GET,
        says: &[
            ANSWER,
            "Protocol  : TLSv1.2",
            "Compression: NONE",
            "Secure Renegotiation IS supported",
            "Extended master secret: yes",
            "Verify return code: 0 (ok)",
        ],
        ..ROW
    },
    Row {
        what: "TLS 1.3, without early data",
        why: "RFC 9325 section 3.1.1: SHOULD; RFC 8470 section 3: it could be replayed",
        args: &["-servername", "a.test"],
        request: GET,
        says: &[ANSWER, "New, TLSv1.3", "Max Early Data: 0", "Verify return code: 0 (ok)"],
        never: &["Max Early Data: 1"],
        ..ROW
    },
    Row {
        what: "signatures with SHA-1",
        why: "RFC 9155 section 2: MUST NOT",
        args: &["-tls1_2", "-cipher", ANY, "-sigalgs", "RSA+SHA1:ECDSA+SHA1"],
        says: REFUSED,
        ..ROW
    },
    Row {
        what: "X25519",
        why: "RFC 9325 section 4.2.1, RFC 8446 section 9.1",
        args: &["-tls1_3", "-groups", "X25519"],
        says: &["New, TLSv1.3"],
        ..ROW
    },
    Row {
        what: "P-256",
        why: "RFC 8446 section 9.1: MUST",
        args: &["-tls1_3", "-groups", "P-256"],
        says: &["New, TLSv1.3"],
        ..ROW
    },
    Row {
        what: "P-256 after another guess (HelloRetryRequest)",
        why: "RFC 8446 section 4.1.4",
        args: &["-tls1_3", "-groups", "P-521:P-256"],
        says: &["New, TLSv1.3"],
        ..ROW
    },
    Row {
        what: "finite fields",
        why: "RFC 9325 section 4.1: SHOULD NOT (ffdhe)",
        args: &["-tls1_3", "-groups", "ffdhe2048"],
        says: REFUSED,
        ..ROW
    },
    Row {
        what: "ALPN: HTTP/2 before HTTP/1.1, whatever the client's order",
        why: "RFC 7301 section 3.2, RFC 9113 section 3.2",
        args: &["-alpn", "http/1.1,h2"],
        says: &["ALPN protocol: h2"],
        ..ROW
    },
    Row {
        what: "ALPN: HTTP/1.1 alone",
        why: "RFC 7301 section 3.2",
        args: &["-alpn", "http/1.1"],
        says: &["ALPN protocol: http/1.1"],
        ..ROW
    },
    Row {
        what: "ALPN: none",
        why: "RFC 7301 section 3.1: it is the client's choice",
        request: GET,
        says: &[ANSWER, "No ALPN negotiated"],
        ..ROW
    },
    Row {
        what: "ALPN: nothing in common",
        why: "RFC 7301 section 3.2: SHALL refuse; RFC 9325 section 3.8 (ALPACA)",
        args: &["-alpn", "gopher"],
        says: &["alert no application protocol"],
        ..ROW
    },
    Row {
        what: "a name's own certificate",
        why: "RFC 6066 section 3, RFC 9325 section 3.7",
        args: &["-servername", "b.test", "-verify_hostname", "b.test"],
        says: &["subject=CN=second", "Verify return code: 0 (ok)"],
        ..ROW
    },
    Row {
        what: "the whole chain but its root, in order",
        why: "RFC 8446 section 4.4.2, RFC 5246 section 7.4.2",
        args: &["-servername", "a.test", "-verify_hostname", "a.test", "-verify_return_error"],
        says: &[
            " 0 s:CN=first\n",
            " 1 s:CN=middle\n",
            "depth=2 CN=root\n",
            "Verify return code: 0 (ok)",
        ],
        never: &[" 2 s:"],
        ..ROW
    },
    Row {
        what: "a name that nobody has: the first certificate, which will not do for the client",
        why: "RFC 6066 section 3: the client is the one to decide",
        args: &["-servername", "c.test", "-verify_hostname", "c.test"],
        says: &["subject=CN=first\n", "ostname mismatch"],
        never: &["Verify return code: 0"],
        ..ROW
    },
    Row {
        what: "no name: the first certificate",
        why: "RFC 6066 section 3",
        args: &["-noservername"],
        says: &["subject=CN=first\n", "Verify return code: 0 (ok)"],
        ..ROW
    },
    Row {
        what: "who can't do ECDSA gets the name's RSA certificate",
        why: "RFC 8446 section 4.4.2.2",
        args: &["-servername", "a.test", "-sigalgs", "rsa_pss_rsae_sha256"],
        says: &["subject=CN=rsa\n"],
        ..ROW
    },
    Row {
        what: "a status that was not configured",
        why: "RFC 6066 section 8: MAY; a wrong one would be worse",
        args: &["-status"],
        says: &["OCSP response: no response sent"],
        ..ROW
    },
    Row {
        what: "no certificate where it is optional",
        why: "RFC 8446 section 4.4.2.4",
        auth: "optional",
        request: GET,
        says: &[ANSWER, "Acceptable client certificate CA names\nCN=root\n"],
        ..ROW
    },
    Row {
        what: "a known certificate where it is optional",
        why: "RFC 8446 section 4.4.2.4",
        auth: "optional",
        args: &["-cert", "ada.crt", "-key", "ada.key", "-cert_chain", "ada.crt"],
        request: GET,
        says: &[ANSWER],
        ..ROW
    },
    Row {
        what: "a stranger's certificate where it is optional",
        why: "RFC 8446 section 4.4.2.4: what is shown must be good",
        auth: "optional",
        args: &["-cert", "stranger.crt", "-key", "stranger.key"],
        request: GET,
        says: &["alert"],
        never: &[ANSWER],
    },
    Row {
        what: "no certificate where it is required, TLS 1.3",
        why: "RFC 8446 section 4.4.2.4: certificate_required",
        auth: "required",
        args: &["-tls1_3"],
        request: GET,
        says: &["alert certificate required"],
        never: &[ANSWER],
    },
    Row {
        what: "no certificate where it is required, TLS 1.2",
        why: "RFC 5246 section 7.4.6",
        auth: "required",
        args: &["-tls1_2"],
        request: GET,
        says: &["alert"],
        never: &[ANSWER],
    },
    Row {
        what: "a known certificate where it is required, TLS 1.3",
        why: "RFC 8446 section 4.4.2",
        auth: "required",
        args: &["-tls1_3", "-cert", "ada.crt", "-key", "ada.key", "-cert_chain", "ada.crt"],
        request: GET,
        says: &[ANSWER],
        ..ROW
    },
    Row {
        what: "a known certificate where it is required, TLS 1.2",
        why: "RFC 5246 section 7.4.6",
        auth: "required",
        args: &["-tls1_2", "-cert", "ada.crt", "-key", "ada.key", "-cert_chain", "ada.crt"],
        request: GET,
        says: &[ANSWER],
        ..ROW
    },
    Row {
        what: "a stranger's certificate where it is required",
        why: "RFC 8446 section 4.4.2.4",
        auth: "required",
        args: &["-cert", "stranger.crt", "-key", "stranger.key"],
        request: GET,
        says: &["alert"],
        never: &[ANSWER],
    },
];

#[test]
fn openssl_finds_what_rfc_9325_recommends() {
    let stand = Stand::start();
    let mut faults = Vec::new();
    for row in ROWS {
        let text = stand.ask(row.auth, row.args, row.request);
        let missing: Vec<_> = row.says.iter().filter(|word| !text.contains(**word)).collect();
        let wrong: Vec<_> = row.never.iter().filter(|word| text.contains(**word)).collect();
        if !missing.is_empty() || !wrong.is_empty() {
            let (what, why) = (row.what, row.why);
            faults.push(format!("{what} ({why}): without {missing:?}, with {wrong:?}:\n{text}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// RFC 9325 section 4.2 (AEAD and forward secrecy), RFC 8446 section 9.1; a client that prefers
/// none of them is refused.
#[test]
fn every_cipher_is_an_aead_with_forward_secrecy() {
    let stand = Stand::start();
    let all = output(&mut openssl(&["ciphers", "-s", "-tls1_2", ANY]));
    let all: Vec<String> = all.trim().split(':').map(str::to_owned).collect();
    assert!(all.len() > 30, "the client offers what must be refused: {all:?}");
    let args = ["-tls1_2", "-servername", "a.test"];
    assert_eq!(
        stand.chosen(&args, "-cipher", all),
        [
            "ECDHE-ECDSA-AES128-GCM-SHA256",
            "ECDHE-ECDSA-AES256-GCM-SHA384",
            "ECDHE-ECDSA-CHACHA20-POLY1305",
            "ECDHE-RSA-AES128-GCM-SHA256",
            "ECDHE-RSA-AES256-GCM-SHA384",
            "ECDHE-RSA-CHACHA20-POLY1305",
        ]
    );
    let all = [
        "TLS_AES_128_CCM_8_SHA256",
        "TLS_AES_128_CCM_SHA256",
        "TLS_AES_128_GCM_SHA256",
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
    ];
    let chosen =
        stand.chosen(&["-tls1_3"], "-ciphersuites", all.iter().map(|s| (*s).to_owned()).collect());
    assert_eq!(chosen, all[2..]);
}

/// RFC 8446 section 2.2, RFC 5077; RFC 9325 section 3.4: a ticket is good for the one that made it.
#[test]
fn sessions_are_resumed_by_whom_they_were_begun_with() {
    let stand = Stand::start();
    for version in ["-tls1_2", "-tls1_3"] {
        let ask = |auth, file| stand.ask(auth, &[version, file, "session"], GET);
        let text = ask("off", "-sess_out");
        assert!(text.contains("New, TLSv1") && text.contains(ANSWER), "{text}");
        assert!(Path::is_file(&stand.files.path("session")), "there is a ticket: {text}");
        let text = ask("off", "-sess_in");
        assert!(text.contains("Reused, TLSv1") && text.contains(ANSWER), "{text}");
        assert!(version == "-tls1_2" || text.contains("Early data was not sent"), "{text}");
        // Above all not by one that would have asked for a certificate.
        let text = ask("optional", "-sess_in");
        assert!(text.contains("New, TLSv1") && text.contains(ANSWER), "{text}");
        let text = ask("required", "-sess_in");
        assert!(!text.contains("Reused") && !text.contains(ANSWER), "{text}");
    }
}

/// RFC 9325 section 3.5: in TLS 1.2 a client can ask for it; TLS 1.3 has none.
#[test]
fn renegotiation_is_refused() {
    let stand = Stand::start();
    let (mut child, mut stdin) = start(&mut stand.client("off", &["-tls1_2"]));
    stdin.write_all(b"R\n").expect("it reads");
    let text = rest(&mut child);
    drop(stdin);
    assert!(text.contains("RENEGOTIATING") && text.contains("no renegotiation"), "{text}");
}

/// RFC 8446 section 6.1, RFC 5246 section 7.2.1: an end without it could be anybody's.
#[test]
fn the_end_is_told_by_close_notify() {
    let stand = Stand::start();
    for version in ["-tls1_2", "-tls1_3"] {
        let text = stand.ask("off", &[version, "-msg"], GET);
        let alert = text.contains("Alert [length 0002], warning close_notify");
        let received = text.lines().any(|l| l.starts_with("<<<") && l.contains("close_notify"));
        assert!(text.contains(ANSWER) && alert && received, "{text}");
        assert!(!text.contains("unexpected eof"), "{text}");
    }
}
