//! TLS as the clients speak it: everything that a server could choose differently is fixed, so that
//! all proxies do the same work.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, DigitallySignedStruct, NamedGroup, SignatureScheme,
    client::{
        ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use crate::Failure;

/// The name that clients ask for.
pub(super) const HOST: &str = "abaci.one";

/// A certificate of an ECDSA key on P-256 in files as the proxies want them, until dropped.
pub(super) struct Certificate {
    directory: PathBuf,
}

impl Certificate {
    pub(super) fn make() -> Result<Self, Failure> {
        let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()])?;
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let directory =
            std::env::temp_dir().join(format!("litegate-load-{}-tls", std::process::id()));
        fs::create_dir_all(&directory)?;
        let own = Self { directory };
        fs::write(own.chain(), &certificate)?;
        fs::write(own.key(), &key)?;
        fs::write(own.both(), certificate + &key)?;
        Ok(own)
    }

    pub(super) fn chain(&self) -> PathBuf {
        self.directory.join("chain.pem")
    }

    pub(super) fn key(&self) -> PathBuf {
        self.directory.join("key.pem")
    }

    /// In one file, for HAProxy.
    pub(super) fn both(&self) -> PathBuf {
        self.directory.join("both.pem")
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(Path::new(&self.directory));
    }
}

/// What clients offer: one version, one suite, one share of a key. `resumes` is whether they come back with
/// the tickets that they got.
pub(super) fn config(protocol: &[u8], resumes: bool) -> Result<Arc<ClientConfig>, Failure> {
    let provider = CryptoProvider {
        cipher_suites: vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256],
        // The first is what is used. OpenSSL takes the second for what certificates may have.
        kx_groups: vec![ring::kx_group::X25519, ring::kx_group::SECP256R1],
        ..ring::default_provider()
    };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting))
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::store(Arc::new(Tickets { resumes, kept: Mutex::default() }));
    Ok(Arc::new(config))
}

/// What clients keep of earlier sessions. They say that they would resume either way: a server that
/// gives tickets has to make them for new clients too.
#[derive(Debug)]
struct Tickets {
    resumes: bool,
    kept: Mutex<Vec<Tls13ClientSessionValue>>,
}

/// More than there are clients.
const MOST: usize = 1024;

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if self.resumes && kept.len() < MOST {
            kept.push(ticket);
        }
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

/// Believes every certificate: whatever the clients compute, they take from the core that they
/// share with the upstream.
#[derive(Debug)]
struct Trusting;

impl ServerCertVerifier for Trusting {
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
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
