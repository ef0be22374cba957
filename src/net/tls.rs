//! TLS to nodes: whom litegate takes for a node, what it shows of itself, and files that change
//! under us.
//!
//! A [`Tls`] belongs to one cluster. [`Tls::look`] builds another configuration when the files are
//! others; where that fails the former stays in force. Each node has a [`Connector`] on each
//! worker, which keeps that node's sessions to be resumed: nodes share a name but no ticket keys,
//! and a change of files forgets sessions, since a resumed one is not verified again.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore,
    SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio_rustls::TlsConnector;

use super::{
    Stream,
    pem::{self, FileError, Look, Stamp, Watched},
};

/// Sessions that are kept of one node: TLS 1.3 uses each ticket once.
const SESSIONS: usize = 32;
/// Nodes whose trouble is remembered, so that it is told once: as many as a cluster may have.
const TROUBLED: usize = 256;

/// The files that TLS to a cluster's nodes is made of, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Files {
    /// The cluster, for logs.
    pub cluster: Arc<str>,
    /// Who signs nodes' certificates. Empty: whoever the system trusts.
    pub authorities: Vec<PathBuf>,
    /// The name that nodes' certificates must have. `None`: the node's IP address.
    pub name: Option<ServerName<'static>>,
    /// Our own certificate chain and key, for nodes that ask.
    pub own: Option<(PathBuf, PathBuf)>,
    /// Nodes are believed whatever they show.
    pub unverified: bool,
}

/// What may be agreed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Offer {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    H2,
    /// Either, HTTP/2 first.
    Either,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The node's certificate will not do.
    #[error("{}", verdict(.0))]
    Certificate(CertificateError),
    /// Anything else.
    #[error("{0}")]
    Handshake(String),
}

/// TLS to the nodes of one cluster.
pub struct Tls {
    files: Files,
    current: ArcSwap<ClientConfig>,
    state: Mutex<(Watched, Option<Duration>)>,
    /// Nodes with which it does not work, and why not.
    troubled: Mutex<HashMap<SocketAddr, String>>,
    /// Whether there are any: nothing else is looked at while all is well.
    any_troubled: AtomicBool,
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
        let (config, expiry) = files.build()?;
        if files.unverified {
            tracing::warn!(
                cluster = &*files.cluster,
                "insecure_skip_verify: whoever answers at a node's address is taken for the node",
            );
        }
        Ok(Self {
            files,
            current: ArcSwap::new(config),
            state: Mutex::new((watched, expiry)),
            troubled: Mutex::default(),
            any_troubled: AtomicBool::new(false),
        })
    }

    /// What it is made of.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// When our own certificate ends, since 1970.
    pub fn expiry(&self) -> Option<(PathBuf, Duration)> {
        let (certificate, _) = self.files.own.as_ref()?;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Some((certificate.clone(), state.1?))
    }

    /// Reads the files again if they are others than before and have settled.
    pub fn look(&self) -> Look {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (watched, expiry) = &mut *state;
        if !watched.have_changed(self.files.stamps()) {
            return Look::Same;
        }
        match self.files.build() {
            Ok((config, until)) => {
                *expiry = until;
                self.current.store(config);
                Look::Renewed
            }
            Err(error) => Look::Refused(error),
        }
    }

    /// Says once that it does not work with a node, and once that it does again. Whether anything
    /// was said.
    pub fn tell(&self, address: SocketAddr, trouble: Option<&dyn std::fmt::Display>) -> bool {
        if trouble.is_none() && !self.any_troubled.load(Ordering::Relaxed) {
            return false;
        }
        let cluster = &*self.files.cluster;
        let mut troubled = self.troubled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(trouble) = trouble {
            let trouble = trouble.to_string();
            if troubled.get(&address) == Some(&trouble) {
                return false;
            }
            tracing::error!(cluster, %address, error = trouble, "no TLS with a node");
            if troubled.len() >= TROUBLED {
                troubled.clear();
            }
            troubled.insert(address, trouble);
        } else if troubled.remove(&address).is_some() {
            tracing::info!(cluster, %address, "TLS with a node works again");
        } else {
            return false;
        }
        self.any_troubled.store(!troubled.is_empty(), Ordering::Relaxed);
        true
    }
}

/// A way to speak TLS with one node.
#[derive(Debug)]
pub struct Connector {
    tls: Arc<Tls>,
    made: Mutex<Option<Made>>,
}

/// What a connector has made of the files that were in force.
#[derive(Debug)]
struct Made {
    of: Arc<ClientConfig>,
    /// For each [`Offer`].
    offers: [Arc<ClientConfig>; 3],
}

impl Connector {
    /// Without any sessions yet.
    pub fn new(tls: &Arc<Tls>) -> Self {
        Self { tls: Arc::clone(tls), made: Mutex::default() }
    }

    /// The cluster's.
    pub fn tls(&self) -> &Tls {
        &self.tls
    }

    fn config(&self, offer: Offer) -> Arc<ClientConfig> {
        let current = self.tls.current.load();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let made = match &mut *made {
            Some(made) if Arc::ptr_eq(&made.of, &current) => made,
            stale => {
                let sessions = Resumption::in_memory_sessions(SESSIONS);
                let offers: [&[&[u8]]; 3] = [&[b"http/1.1"], &[b"h2"], &[b"h2", b"http/1.1"]];
                let offers = offers.map(|offer| {
                    let mut config = ClientConfig::clone(&current);
                    config.alpn_protocols = offer.iter().map(|name| name.to_vec()).collect();
                    config.resumption = sessions.clone();
                    Arc::new(config)
                });
                stale.insert(Made { of: Arc::clone(&current), offers })
            }
        };
        let [http1, h2, either] = &made.offers;
        Arc::clone(match offer {
            Offer::Http1 => http1,
            Offer::H2 => h2,
            Offer::Either => either,
        })
    }

    /// Shakes hands. Whether HTTP/2 was agreed on.
    ///
    /// # Errors
    /// Why there is no session.
    pub async fn connect(
        &self,
        stream: Stream,
        address: SocketAddr,
        offer: Offer,
    ) -> Result<(Stream, bool), TlsError> {
        let Stream::Plain(socket) = stream else {
            return Err(TlsError::Handshake("only a socket can carry TLS".into()));
        };
        let name = self.tls.files.name.clone();
        let name = name.unwrap_or_else(|| address.ip().to_canonical().into());
        let connector = TlsConnector::from(self.config(offer));
        let session = connector.connect(name, socket.into_inner()).await.map_err(TlsError::from);
        let session = session.and_then(|session| {
            let (_, connection) = session.get_ref();
            let h2 = match (offer, connection.alpn_protocol()) {
                (_, Some(b"h2")) => true,
                // RFC 9113 section 3.2: HTTP/2 has to be agreed on.
                (Offer::H2, _) => {
                    return Err(TlsError::Handshake("the node does not speak HTTP/2".into()));
                }
                _ => false,
            };
            Ok((Stream::Tls(Box::new(session.into())), h2))
        });
        let _ = match &session {
            Ok(_) => self.tls.tell(address, None),
            Err(error) => self.tls.tell(address, Some(error)),
        };
        session
    }
}

/// What a node may say after we have taken the handshake to be done (RFC 8446 section 4.4.2.4): it
/// did not like our certificate, or that there was none, and has looked at nothing else.
pub fn turned_away(error: &io::Error) -> Option<AlertDescription> {
    use AlertDescription as Alert;
    match rustls_error(error)? {
        rustls::Error::AlertReceived(
            alert @ (Alert::CertificateRequired
            | Alert::NoCertificate
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError
            | Alert::HandshakeFailure),
        ) => Some(*alert),
        _ => None,
    }
}

fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        match rustls_error(&error) {
            Some(rustls::Error::InvalidCertificate(what)) => Self::Certificate(what.clone()),
            Some(rustls::Error::InvalidMessage(_)) => {
                Self::Handshake("the node does not speak TLS at this port".into())
            }
            Some(rustls::Error::AlertReceived(alert)) => Self::Handshake(refusal(*alert)),
            _ => Self::Handshake(error.to_string()),
        }
    }
}

/// What an alert means, for a person.
pub fn refusal(alert: AlertDescription) -> String {
    use AlertDescription as Alert;
    match alert {
        Alert::CertificateRequired => {
            "the node wants a certificate of ours: `certificate` and `key`".into()
        }
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::UnknownCA => format!("the node refuses our certificate: {alert:?}"),
        Alert::NoApplicationProtocol => "the node does not speak `protocol`".into(),
        _ => format!("the node refuses: {alert:?}"),
    }
}

/// What is wrong with a node's certificate, and what may help.
fn verdict(error: &CertificateError) -> String {
    match error {
        CertificateError::UnknownIssuer => {
            "its certificate is signed by nobody that is trusted here: see `ca`".into()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("its certificate is another's ({error}): see `server_name`")
        }
        other => format!("its certificate will not do: {other}"),
    }
}

impl Files {
    fn stamps(&self) -> Vec<Stamp> {
        let own = self.own.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.authorities.iter().chain(own).map(|path| Stamp::of(path)).collect()
    }

    /// The configuration, and when our own certificate ends.
    fn build(&self) -> Result<(Arc<ClientConfig>, Option<Duration>), FileError> {
        let provider = pem::provider();
        let anywhere = Path::new("TLS to nodes");
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| FileError::new(anywhere, error))?;
        let builder = if self.unverified {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider)))
        } else {
            builder.with_root_certificates(self.roots()?)
        };
        let Some((certificate, key)) = &self.own else {
            return Ok((Arc::new(builder.with_no_client_auth()), None));
        };
        let chain = pem::certificates(certificate)?;
        let expiry = chain.first().map(|first| pem::expiry(certificate, first)).transpose()?;
        let config = builder
            .with_client_auth_cert(chain, pem::key(key)?)
            .map_err(|error| FileError::new(key, error))?;
        Ok((Arc::new(config), expiry))
    }

    fn roots(&self) -> Result<RootCertStore, FileError> {
        let mut roots = RootCertStore::empty();
        for path in &self.authorities {
            for certificate in pem::certificates(path)? {
                roots.add(certificate).map_err(|error| FileError::new(path, error))?;
            }
        }
        if self.authorities.is_empty() {
            roots = system_roots()?;
        }
        Ok(roots)
    }
}

/// For a client of anybody's, which knows by name whom it wants: `authorities` as in [`Files`].
///
/// # Errors
/// What is wrong with one of the files.
pub fn client(authorities: Vec<PathBuf>, unverified: bool) -> Result<ClientConfig, FileError> {
    let files = Files { cluster: "".into(), authorities, name: None, own: None, unverified };
    let (config, _) = files.build()?;
    let mut config = ClientConfig::clone(&config);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Whoever the system trusts.
fn system_roots() -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    // Some systems have a few that nobody could use.
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let what = match found.errors.first() {
            Some(error) => error.to_string(),
            None => "it has none: name a file with `ca`".to_owned(),
        };
        return Err(FileError::new(Path::new("the system's certificates"), what));
    }
    Ok(roots)
}

/// Believes everybody.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(directory: &Path) -> Files {
        let made = rcgen::generate_simple_self_signed(vec!["app.test".to_owned()]).unwrap();
        let (certificate, key) = (directory.join("own.crt"), directory.join("own.key"));
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        Files {
            cluster: "app".into(),
            authorities: vec![certificate.clone()],
            name: None,
            own: Some((certificate, key)),
            unverified: false,
        }
    }

    #[test]
    fn a_trouble_is_told_once_and_so_is_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let tls = Tls::load(files(directory.path())).unwrap();
        let (a, b) = (SocketAddr::from(([127, 0, 0, 1], 1)), SocketAddr::from(([127, 0, 0, 2], 1)));
        assert!(!tls.tell(a, None));
        assert!(tls.tell(a, Some(&"expired")));
        assert!(!tls.tell(a, Some(&"expired")));
        assert!(tls.tell(b, Some(&"expired")));
        assert!(tls.tell(a, Some(&"unknown")));
        assert!(tls.tell(a, None));
        assert!(!tls.tell(a, None));
        assert!(tls.tell(b, None));
    }

    #[test]
    fn a_change_of_files_forgets_sessions_and_a_wrong_one_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let tls = Arc::new(Tls::load(files(directory.path())).unwrap());
        let node = Connector::new(&tls);
        let before = node.config(Offer::Http1);
        assert!(Arc::ptr_eq(&before, &node.config(Offer::Http1)));
        assert!(tls.expiry().is_some());
        files(directory.path());
        assert!(matches!(tls.look(), Look::Same), "it may be in the middle of a change");
        assert!(matches!(tls.look(), Look::Renewed));
        let after = node.config(Offer::Http1);
        assert!(!Arc::ptr_eq(&before, &after));
        std::fs::write(directory.path().join("own.key"), "not a key").unwrap();
        assert!(matches!(tls.look(), Look::Same));
        let Look::Refused(error) = tls.look() else { panic!("it is wrong") };
        assert!(error.to_string().contains("own.key"), "{error}");
        assert!(Arc::ptr_eq(&after, &node.config(Offer::Http1)));
    }
}
