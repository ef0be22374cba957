//! TLS to clients: which certificate for which name, whose certificates are asked for, and files
//! that change under us.
//!
//! A [`Tls`] belongs to one listener and is shared by all workers: they take its current
//! configuration once for each connection. [`Tls::look`] builds another when the files are others;
//! where that fails the former stays in force. Sessions are resumed by tickets, whose keys outlive
//! a change of certificates but not one of whose clients are let in: a resumed session is not
//! verified again.
//!
//! A certificate may also be *obtained* while litegate runs: its file may be missing at first, and
//! until it is there handshakes that it would be for fail. While it is being obtained
//! [`Tls::answer`] has a listener prove that a name leads to it.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::{
        Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
    },
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};
use x509_cert::{
    Certificate,
    der::Decode as _,
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use crate::net::{
    Stream,
    pem::{self, FileError, Look, Stamp, Watched},
};

/// The largest client certificate that is passed on whole.
const PASSED_ON: usize = 8 << 10;
/// The longest subject that is passed on.
const SUBJECT: usize = 1024;

/// The files that a listener's TLS is made of, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Files {
    /// Certificate chains with their keys. The first is for clients that name no host, or one that
    /// nobody has.
    pub certificates: Vec<(PathBuf, PathBuf)>,
    /// One that litegate obtains by itself, a chain and its key in one file, after those.
    pub obtained: Option<PathBuf>,
    /// Who signs clients' certificates. `None`: clients are not asked for any.
    pub clients: Option<(PathBuf, Need)>,
    /// ALPN, best first.
    pub protocols: Vec<&'static [u8]>,
}

/// Whether a client may come without a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Need {
    /// It may.
    Optional,
    /// It may not.
    Required,
}

/// What answers those who verify that a name leads here, by the name.
pub type Challenges = HashMap<String, Arc<ServerConfig>>;

/// What they speak (RFC 8737 section 6.2).
const ACME: &[u8] = b"acme-tls/1";

/// An answer to them: RFC 8737 section 3.
///
/// # Errors
/// The key is of no use.
pub fn challenge(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = pem::provider();
    let key = provider.key_provider.load_private_key(key)?;
    // Not compared with the certificate, whose critical extension nothing else understands.
    let key = CertifiedKey::new(vec![certificate], key);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ACME.to_vec()];
    Ok(Arc::new(config))
}

/// A listener's TLS.
pub struct Tls {
    files: Files,
    /// Almost always none.
    challenges: ArcSwap<Challenges>,
    current: ArcSwap<ServerConfig>,
    /// The same for QUIC.
    #[cfg(feature = "http3")]
    quic: ArcSwap<super::h3::Crypto>,
    state: Mutex<(Watched, State)>,
}

struct State {
    clients: Vec<CertificateDer<'static>>,
    expiries: Vec<(PathBuf, Duration)>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn load(files: Files) -> Result<Self, FileError> {
        let watched = Watched::new(files.stamps());
        let (config, state) = files.build(None)?;
        let state = Mutex::new((watched, state));
        let challenges = ArcSwap::default();
        #[cfg(feature = "http3")]
        let quic = ArcSwap::new(Arc::new(files.quic(&config)?));
        Ok(Self {
            files,
            challenges,
            #[cfg(feature = "http3")]
            quic,
            current: ArcSwap::new(config),
            state,
        })
    }

    /// What QUIC is begun with.
    #[cfg(feature = "http3")]
    pub(super) fn quic(&self) -> super::h3::Crypto {
        Arc::clone(&self.quic.load())
    }

    /// What it is made of.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// When each certificate ends, since 1970.
    pub fn expiries(&self) -> Vec<(PathBuf, Duration)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.expiries.clone()
    }

    /// Reads the files again if they are others than before, and were the same at the look before
    /// this one: a certificate and its key are two files.
    pub fn look(&self) -> Look {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (watched, state) = &mut *state;
        if !watched.have_changed(self.files.stamps()) {
            return Look::Same;
        }
        let before = (Arc::clone(&self.current.load().ticketer), &*state);
        let built = self.files.build(Some(before));
        #[cfg(feature = "http3")]
        let built = built.and_then(|(config, next)| {
            self.quic.store(Arc::new(self.files.quic(&config)?));
            Ok((config, next))
        });
        match built {
            Ok((config, next)) => {
                *state = next;
                self.current.store(config);
                Look::Renewed
            }
            Err(error) => Look::Refused(error),
        }
    }

    /// Answers these challenges from now on, and no others.
    pub fn answer(&self, challenges: Arc<Challenges>) {
        self.challenges.store(challenges);
    }

    /// Shakes hands. `None`: with someone who has seen thereby what they wanted to see.
    pub(super) async fn accept(&self, socket: TcpStream) -> io::Result<Option<Greeting>> {
        let challenges = self.challenges.load_full();
        let session = if challenges.is_empty() {
            TlsAcceptor::from(self.current.load_full()).accept(socket).await?
        } else {
            let hello = LazyConfigAcceptor::new(Acceptor::default(), socket).await?;
            if let Some(challenge) = asked(&challenges, &hello.client_hello()) {
                let mut session = hello.into_stream(challenge).await?;
                // RFC 8737 section 3: nothing is said over it.
                let _ = session.shutdown().await;
                return Ok(None);
            }
            hello.into_stream(self.current.load_full()).await?
        };
        let (_, connection) = session.get_ref();
        let certificate = connection.peer_certificates().and_then(<[_]>::first);
        Ok(Some(Greeting {
            certificate: certificate.map(ClientCertificate::of),
            h2: connection.alpn_protocol() == Some(b"h2"),
            stream: Stream::Tls(Box::new(session.into())),
        }))
    }
}

/// Which challenge is asked for: RFC 8737 section 3 has it offer that protocol alone.
fn asked(challenges: &Challenges, hello: &ClientHello<'_>) -> Option<Arc<ServerConfig>> {
    if !hello.alpn()?.eq([ACME]) {
        return None;
    }
    challenges.get(&hello.server_name()?.to_ascii_lowercase()).map(Arc::clone)
}

/// What came of a handshake.
pub(super) struct Greeting {
    pub(super) stream: Stream,
    pub(super) certificate: Option<ClientCertificate>,
    /// The client wants HTTP/2.
    pub(super) h2: bool,
}

/// How a handshake ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Handshake {
    /// There is a session.
    Done,
    /// The client, its certificate or its idea of TLS would not do.
    Failed,
    /// It took too long, the wait for a place included.
    TimedOut,
}

/// A client's certificate, whose signature was verified.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClientCertificate {
    /// DER. Empty if it is too large to be passed on.
    pub der: Box<[u8]>,
    /// RFC 4514: `CN=ada,O=abaci`. Empty where it has none, or one that is too long.
    pub subject: Box<str>,
}

impl ClientCertificate {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Self {
        let parsed = Certificate::from_der(certificate).ok();
        let subject = parsed.map(|parsed| parsed.tbs_certificate().subject().to_string());
        let subject = subject.filter(|subject| subject.len() <= SUBJECT).unwrap_or_default();
        let der: &[u8] = if certificate.len() <= PASSED_ON { certificate } else { &[] };
        Self { der: der.into(), subject: subject.into() }
    }
}

type Before<'a> = (Arc<dyn rustls::server::ProducesTickets>, &'a State);

impl Files {
    fn stamps(&self) -> Vec<Stamp> {
        let pairs = self.certificates.iter().flat_map(|(certificate, key)| [certificate, key]);
        pairs
            .chain(&self.obtained)
            .chain(self.clients.iter().map(|(ca, _)| ca))
            .map(|path| Stamp::of(path))
            .collect()
    }

    #[cfg(feature = "http3")]
    fn quic(&self, config: &ServerConfig) -> Result<super::h3::Crypto, FileError> {
        let first = self.certificates.first().map_or(Path::new(""), |(first, _)| first);
        super::h3::crypto(config).map_err(|error| FileError::new(first, error))
    }

    fn build(&self, before: Option<Before<'_>>) -> Result<(Arc<ServerConfig>, State), FileError> {
        let provider = pem::provider();
        let first = self.certificates.first().map(|(certificate, _)| certificate.as_path());
        let first = first.unwrap_or(Path::new(""));
        let mut names = Names::default();
        let mut expiries = Vec::new();
        for (certificate, key) in &self.certificates {
            let expires = names.add(certificate, key, &provider)?;
            expiries.push((certificate.clone(), expires));
        }
        if let Some(path) = &self.obtained {
            let had = before.as_ref().is_some_and(|(_, state)| {
                state.expiries.iter().any(|(certificate, _)| certificate == path)
            });
            match names.add(path, path, &provider) {
                Ok(expires) => expiries.push((path.clone(), expires)),
                // What is in force is better than none.
                Err(error) if had => return Err(error),
                Err(error) if path.exists() => {
                    tracing::warn!(%error, "this certificate is of no use, another is obtained");
                }
                Err(_) => {}
            }
        }
        let wrong = |error: rustls::Error| FileError::new(first, error);
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(wrong)?;
        let mut clients = Vec::new();
        let config = match &self.clients {
            None => config.with_no_client_auth(),
            Some((path, need)) => {
                clients = pem::certificates(path)?;
                let mut roots = RootCertStore::empty();
                for certificate in &clients {
                    roots.add(certificate.clone()).map_err(|error| FileError::new(path, error))?;
                }
                let builder =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match need {
                    Need::Optional => builder.allow_unauthenticated(),
                    Need::Required => builder,
                };
                let verifier = verifier.build().map_err(|error| FileError::new(path, error))?;
                config.with_client_cert_verifier(verifier)
            }
        };
        let mut config = config.with_cert_resolver(Arc::new(names));
        config.alpn_protocols = self.protocols.iter().map(|name| name.to_vec()).collect();
        // Tickets hold all that a resumption needs.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = match before {
            Some((ticketer, before)) if before.clients == clients => ticketer,
            _ => rustls::crypto::ring::Ticketer::new().map_err(wrong)?,
        };
        Ok((Arc::new(config), State { clients, expiries }))
    }
}

/// Which certificate for which host.
#[derive(Debug, Default)]
struct Names {
    all: Vec<Arc<CertifiedKey>>,
    /// Their places, by whole names and by what follows a `*.`, in lower case.
    exact: HashMap<Box<str>, Vec<usize>>,
    below: HashMap<Box<str>, Vec<usize>>,
}

impl Names {
    /// Returns when it ends.
    fn add(
        &mut self,
        certificate: &Path,
        key: &Path,
        provider: &CryptoProvider,
    ) -> Result<Duration, FileError> {
        let chain = pem::certificates(certificate)?;
        let wrong = |error: x509_cert::der::Error| FileError::new(certificate, error);
        let first = chain.first().map(AsRef::as_ref).unwrap_or_default();
        let parsed = Certificate::from_der(first).map_err(wrong)?;
        let parsed = parsed.tbs_certificate();
        let names = parsed.get_extension::<SubjectAltName>().map_err(wrong)?;
        let key = CertifiedKey::from_der(chain, pem::key(key)?, provider)
            .map_err(|error| FileError::new(key, error))?;
        for name in names.iter().flat_map(|(_, names)| &names.0) {
            let GeneralName::DnsName(name) = name else { continue };
            let name = name.as_str().to_ascii_lowercase();
            let (map, name) = match name.strip_prefix("*.") {
                Some(rest) => (&mut self.below, rest),
                None => (&mut self.exact, &*name),
            };
            map.entry(name.into()).or_default().push(self.all.len());
        }
        self.all.push(Arc::new(key));
        Ok(parsed.validity().not_after.to_unix_duration())
    }

    /// The places of those for `host`, best first: by name, by wildcard, and the first of all.
    fn candidates(&self, host: Option<&str>) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let host = host.map(str::to_ascii_lowercase);
        let exact = host.as_ref().and_then(|host| self.exact.get(&**host));
        // RFC 6125 section 6.4.3: a wildcard stands for one label.
        let rest = host.as_ref().and_then(|host| host.split_once('.'));
        let below = rest.and_then(|(_, rest)| self.below.get(rest));
        let named = exact.into_iter().chain(below).flatten();
        named.filter_map(|place| self.all.get(*place)).chain(self.all.first())
    }
}

impl ResolvesServerCert for Names {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut candidates = self.candidates(hello.server_name()).peekable();
        let best = candidates.peek().map(|key| Arc::clone(key));
        let schemes = hello.signature_schemes();
        // One name may have an ECDSA and an RSA certificate.
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        candidates.find(fits).map(Arc::clone).or(best)
    }
}

#[cfg(test)]
mod tests {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};

    use super::*;

    /// Writes a self-signed certificate and its key.
    fn made(directory: &Path, file: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let certificate = directory.join(format!("{file}.crt"));
        let key = directory.join(format!("{file}.key"));
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (certificate, key)
    }

    fn files(certificates: Vec<(PathBuf, PathBuf)>) -> Files {
        Files { certificates, obtained: None, clients: None, protocols: vec![b"http/1.1"] }
    }

    #[test]
    fn each_host_gets_its_certificate_and_others_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let mut names = Names::default();
        for (file, hosts) in
            [("a", &["a.test"][..]), ("b", &["b.test", "*.b.test"]), ("c", &["x.b.test"])]
        {
            let (certificate, key) = made(directory.path(), file, hosts);
            names.add(&certificate, &key, &pem::provider()).unwrap();
        }
        for (host, want) in [
            (Some("a.test"), 0),
            (Some("B.Test"), 1),
            (Some("www.b.test"), 1),
            (Some("a.www.b.test"), 0),
            (Some("x.b.test"), 2),
            (Some("nobody.test"), 0),
            (None, 0),
        ] {
            let chosen = names.candidates(host).next().unwrap();
            assert!(Arc::ptr_eq(chosen, &names.all[want]), "{host:?}");
        }
    }

    #[test]
    fn changed_files_are_taken_once_they_have_settled() {
        let directory = tempfile::tempdir().unwrap();
        let pair = made(directory.path(), "a", &["a.test"]);
        let tls = Tls::load(files(vec![pair.clone()])).unwrap();
        assert!(matches!(tls.look(), Look::Same));
        let before = tls.current.load_full();
        made(directory.path(), "a", &["a.test", "b.test"]);
        assert!(matches!(tls.look(), Look::Same), "it may be in the middle of a change");
        assert!(matches!(tls.look(), Look::Renewed));
        let after = tls.current.load_full();
        assert!(!Arc::ptr_eq(&before, &after));
        assert!(Arc::ptr_eq(&before.ticketer, &after.ticketer), "sessions can be resumed");
        assert!(matches!(tls.look(), Look::Same));
        // A certificate without its key.
        std::fs::write(&pair.1, "not a key").unwrap();
        assert!(matches!(tls.look(), Look::Same));
        let Look::Refused(error) = tls.look() else { panic!("it is wrong") };
        assert!(error.to_string().contains("a.key"), "{error}");
        assert!(Arc::ptr_eq(&tls.current.load_full(), &after));
        assert!(matches!(tls.look(), Look::Same), "it is said once");
    }

    #[test]
    fn an_obtained_certificate_may_come_later_and_then_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pem");
        let files = Files { obtained: Some(path.clone()), ..files(vec![]) };
        let put = || {
            let made = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).unwrap();
            let content = format!("{}{}", made.signing_key.serialize_pem(), made.cert.pem());
            std::fs::write(&path, content).unwrap();
        };
        std::fs::write(&path, "half of").unwrap();
        let tls = Tls::load(files).unwrap();
        assert_eq!(tls.expiries(), []);
        put();
        assert!(matches!(tls.look(), Look::Same));
        assert!(matches!(tls.look(), Look::Renewed));
        assert_eq!(tls.expiries().len(), 1);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(tls.look(), Look::Same));
        assert!(matches!(tls.look(), Look::Refused(_)));
        assert_eq!(tls.expiries().len(), 1, "the former is in force");
    }

    /// Verifies nothing: to webpki the extension of a challenge's certificate is unknown.
    #[derive(Debug)]
    struct Looks;

    impl ServerCertVerifier for Looks {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &rustls::pki_types::ServerName<'_>,
            _: &[u8],
            _: rustls::pki_types::UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            pem::provider().signature_verification_algorithms.supported_schemes()
        }
    }

    #[tokio::test]
    async fn challenges_are_answered_without_a_client_certificate_and_others_as_ever() {
        let directory = tempfile::tempdir().unwrap();
        let pair = made(directory.path(), "a", &["a.test"]);
        let clients = Some((pair.0.clone(), Need::Required));
        let own = pem::certificates(&pair.0).unwrap().remove(0);
        let tls = Tls::load(Files { clients, ..files(vec![pair]) }).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut proof = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).unwrap();
        proof.custom_extensions = vec![rcgen::CustomExtension::new_acme_identifier(&[7; 32])];
        let proof = proof.self_signed(&key).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let answer = challenge(proof.der().clone(), key).unwrap();
        let challenges = Arc::new(Challenges::from([("a.test".to_owned(), answer)]));
        let proof = Some(proof.der().clone());
        let own = Some(own);
        for (challenges, host, protocols, shown, greeted) in [
            (&challenges, "A.test", &["acme-tls/1"][..], &proof, Some(false)),
            (&challenges, "b.test", &["acme-tls/1"], &None, None),
            (&challenges, "a.test", &["http/1.1", "acme-tls/1"], &own, None),
            (&challenges, "a.test", &[], &own, None),
            (&Arc::default(), "a.test", &["acme-tls/1"], &None, None),
        ] {
            tls.answer(Arc::clone(challenges));
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let mut client = rustls::ClientConfig::builder_with_provider(pem::provider())
                .with_safe_default_protocol_versions()
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Looks))
                .with_no_client_auth();
            client.alpn_protocols = protocols.iter().map(|name| (*name).into()).collect();
            let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
            let host = rustls::pki_types::ServerName::try_from(host).unwrap();
            let connecting = connector.connect(host, socket);
            let accepting = async { tls.accept(listener.accept().await.unwrap().0).await };
            let (met, accepted) = tokio::join!(connecting, accepting);
            let met = met.ok().and_then(|s| Some(s.get_ref().1.peer_certificates()?[0].clone()));
            assert_eq!(
                (&met, accepted.ok().map(|g| g.is_some())),
                (shown, greeted),
                "{protocols:?}"
            );
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let a = made(directory.path(), "a", &["a.test"]);
        let b = made(directory.path(), "b", &["b.test"]);
        let nothing = directory.path().join("nothing");
        let empty = directory.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        for (certificates, clients, want) in [
            (vec![(nothing.clone(), a.1.clone())], None, "nothing"),
            (vec![(a.0.clone(), nothing.clone())], None, "nothing"),
            (vec![(empty.clone(), a.1.clone())], None, "no certificate"),
            (vec![(a.0.clone(), empty.clone())], None, "empty"),
            (vec![(a.0.clone(), b.1.clone())], None, "b.key"),
            (vec![a.clone()], Some((empty.clone(), Need::Required)), "empty"),
        ] {
            let files = Files { clients, ..files(certificates) };
            let error = Tls::load(files).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn a_change_of_the_clients_authority_ends_their_sessions() {
        let directory = tempfile::tempdir().unwrap();
        let pair = made(directory.path(), "a", &["a.test"]);
        let (ca, _) = made(directory.path(), "ca", &["ca"]);
        let clients = Some((ca, Need::Optional));
        let tls = Tls::load(Files { clients, ..files(vec![pair]) }).unwrap();
        let before = tls.current.load_full();
        made(directory.path(), "ca", &["ca"]);
        tls.look();
        assert!(matches!(tls.look(), Look::Renewed));
        assert!(!Arc::ptr_eq(&before.ticketer, &tls.current.load_full().ticketer));
    }
}
