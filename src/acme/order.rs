//! One certificate, by one conversation with the directory (RFC 8555), proving by TLS-ALPN-01
//! (RFC 8737) that the domains lead here.

use std::{path::Path, sync::Arc, time::Duration};

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Error, Identifier, NewAccount, NewOrder, Order,
    OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};

use super::{
    cache,
    http::Client,
    schedule::{self, Fault},
};
use crate::{
    config::listener::Acme,
    net::pem::{self, FileError},
    server::tls::{self, Challenges, Tls},
};

/// How long the directory may take to verify all domains, and again to make the certificate.
const PATIENCE: Duration = Duration::from_mins(2);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Trouble {
    /// What that says about another attempt.
    pub fault: Fault,
    what: String,
}

impl Trouble {
    pub(super) fn refused(what: impl std::fmt::Display) -> Self {
        Self { fault: Fault::Refused, what: what.to_string() }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        let fault = match &error {
            Error::Api(problem) => fault_of(problem.r#type.as_deref().unwrap_or_default()),
            // No connection, no answer, or one that is not the directory's own.
            Error::Other(_) | Error::Json(_) => Fault::Unreachable,
            _ => Fault::Refused,
        };
        let what = match &error {
            // By itself it would tell the detail alone.
            Error::Api(problem) => {
                let kind = problem.r#type.as_deref().unwrap_or("about:blank");
                let kind = kind.strip_prefix("urn:ietf:params:acme:error:").unwrap_or(kind);
                let detail = problem.detail.as_deref().unwrap_or_default();
                format!("the directory refuses: {kind}: {detail}")
            }
            Error::Json(error) => format!("the directory answered something strange: {error}"),
            other => other.to_string(),
        };
        Self { fault, what }
    }
}

impl From<FileError> for Trouble {
    fn from(error: FileError) -> Self {
        Self::refused(error)
    }
}

/// What a problem (RFC 8555 section 6.7) says about another attempt.
fn fault_of(problem: &str) -> Fault {
    match problem.strip_prefix("urn:ietf:params:acme:error:") {
        Some("badNonce" | "serverInternal" | GONE) => Fault::Unreachable,
        _ => Fault::Refused,
    }
}

/// The directory knows nothing of our account: another is made.
const GONE: &str = "accountDoesNotExist";

/// Obtains a certificate and keeps it where the listeners look for it.
///
/// # Errors
/// Why there is none. What was kept before still is.
pub async fn obtain(
    config: &Acme,
    listeners: &[Arc<Tls>],
    now: impl Fn() -> Duration,
) -> Result<(), Trouble> {
    let account = account(config).await?;
    let identifiers: Vec<_> = config.domains.iter().cloned().map(Identifier::Dns).collect();
    let mut order = match account.new_order(&NewOrder::new(&identifiers)).await {
        Err(Error::Api(problem))
            if problem.r#type.as_deref().is_some_and(|t| t.ends_with(GONE)) =>
        {
            let _ = std::fs::remove_file(config.account());
            return Err(Error::Api(problem).into());
        }
        order => order?,
    };
    {
        let _answering = Answering::begin(listeners, challenges(&mut order).await?);
        for_each_pending(&mut order).await?;
        let polled = order.poll_ready(&patience()).await;
        if !matches!(polled, Ok(OrderStatus::Ready)) {
            let why = verdict(&mut order).await;
            return Err(why.map_or_else(
                || match polled {
                    Ok(status) => Trouble::refused(format!("the order became {status:?}")),
                    Err(error) => error.into(),
                },
                Trouble::refused,
            ));
        }
    }
    let key = order.finalize().await?;
    let chain = order.poll_certificate(&patience()).await?;
    keep(config, &format!("{key}{chain}"), now())
}

fn patience() -> RetryPolicy {
    RetryPolicy::new().timeout(PATIENCE)
}

/// Writes what was obtained, if it can be used.
fn keep(config: &Acme, content: &str, now: Duration) -> Result<(), Trouble> {
    let path = config.certificate();
    let obtained = Path::new("the certificate obtained");
    let wanted = cache::parsed(obtained, content.as_bytes(), &pem::provider())?;
    if !wanted.has(&config.domains) {
        let names = wanted.names.join(", ");
        return Err(Trouble::refused(format!("a certificate for others was obtained: {names}")));
    }
    cache::write(&path, content.as_bytes())?;
    if schedule::renewal(wanted.validity, 0.0) <= now {
        let what =
            "the certificate obtained is to be renewed already: is this machine's clock right?";
        return Err(Trouble::refused(what));
    }
    Ok(())
}

/// The account that is kept, or a new one.
async fn account(config: &Acme) -> Result<Account, Trouble> {
    let path = config.account();
    let http = Box::new(Client::new(config)?);
    let builder = Account::builder_with_http(http);
    match std::fs::read(&path) {
        Ok(kept) => {
            let credentials = serde_json::from_slice(&kept);
            let credentials = credentials.map_err(|error| FileError::new(&path, error))?;
            Ok(builder.from_credentials(credentials).await?)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let contacts: Vec<_> = config.contacts.iter().map(String::as_str).collect();
            let account = NewAccount {
                contact: &contacts,
                // Without the operator's word there is no configuration.
                terms_of_service_agreed: true,
                only_return_existing: false,
            };
            let made = builder.create(&account, config.directory.clone(), None).await?;
            let (account, credentials) = made;
            let credentials = serde_json::to_vec(&credentials);
            let credentials = credentials.map_err(|error| FileError::new(&path, error))?;
            cache::write(&path, &credentials)?;
            tracing::info!(directory = %config.directory, "an ACME account was made");
            Ok(account)
        }
        Err(error) => Err(FileError::new(&path, error).into()),
    }
}

/// Listeners that answer challenges, until dropped.
struct Answering<'a>(&'a [Arc<Tls>]);

impl<'a> Answering<'a> {
    fn begin(listeners: &'a [Arc<Tls>], challenges: Challenges) -> Self {
        let challenges = Arc::new(challenges);
        for listener in listeners {
            listener.answer(Arc::clone(&challenges));
        }
        Self(listeners)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        for listener in self.0 {
            listener.answer(Arc::default());
        }
    }
}

/// What to answer for each domain that the directory has yet to verify.
async fn challenges(order: &mut Order) -> Result<Challenges, Trouble> {
    let mut answers = Challenges::new();
    let mut all = order.authorizations();
    while let Some(authorization) = all.next().await {
        let mut authorization = authorization?;
        if authorization.status != AuthorizationStatus::Pending {
            continue;
        }
        let challenge = authorization.challenge(ChallengeType::TlsAlpn01);
        let challenge = challenge.ok_or_else(|| {
            Trouble::refused("the directory has no tls-alpn-01 challenge for a domain")
        })?;
        let domain = challenge.identifier().to_string().to_ascii_lowercase();
        let digest = challenge.key_authorization().digest();
        let answer = answer(&domain, digest.as_ref()).map_err(Trouble::refused)?;
        answers.insert(domain, answer);
    }
    Ok(answers)
}

/// RFC 8737 section 3: a self-signed certificate for the name, with the digest.
fn answer(domain: &str, digest: &[u8]) -> Result<Arc<ServerConfig>, String> {
    let made = || {
        let mut params = CertificateParams::new(vec![domain.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
        let key = KeyPair::generate()?;
        Ok((params.self_signed(&key)?, key))
    };
    let (certificate, key) = made().map_err(|error: rcgen::Error| error.to_string())?;
    let key = PrivateKeyDer::try_from(key.serialize_der())?;
    tls::challenge(certificate.der().clone(), key).map_err(|error| error.to_string())
}

/// Has the directory verify what it has yet to verify.
async fn for_each_pending(order: &mut Order) -> Result<(), Trouble> {
    let mut all = order.authorizations();
    while let Some(authorization) = all.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Pending
            && let Some(mut challenge) = authorization.challenge(ChallengeType::TlsAlpn01)
        {
            challenge.set_ready().await?;
        }
    }
    Ok(())
}

/// What the directory says against a domain.
async fn verdict(order: &mut Order) -> Option<String> {
    let mut all = order.authorizations();
    while let Some(Ok(mut authorization)) = all.next().await {
        let Ok(state) = authorization.refresh().await else { continue };
        let domain = state.identifier().to_string();
        let mut faults = state.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        if let Some(detail) = faults.find_map(|problem| problem.detail.as_deref()) {
            return Some(format!("{domain} was not verified: {detail}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_asked_again_soon() {
        for (problem, want) in [
            ("urn:ietf:params:acme:error:badNonce", Fault::Unreachable),
            ("urn:ietf:params:acme:error:serverInternal", Fault::Unreachable),
            ("urn:ietf:params:acme:error:accountDoesNotExist", Fault::Unreachable),
            ("urn:ietf:params:acme:error:rateLimited", Fault::Refused),
            ("urn:ietf:params:acme:error:unauthorized", Fault::Refused),
            ("badNonce", Fault::Refused),
            ("", Fault::Refused),
        ] {
            assert_eq!(fault_of(problem), want, "{problem}");
        }
        assert_eq!(Trouble::from(Error::Other("gone".into())).fault, Fault::Unreachable);
    }

    #[test]
    fn only_a_certificate_that_can_be_used_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let config = Acme {
            directory: "https://acme.test/".into(),
            ca: None,
            contacts: vec![],
            domains: vec!["a.test".into()],
            cache: directory.path().into(),
        };
        let made = |name: &str| {
            let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
            (made.signing_key.serialize_pem(), made.cert.pem())
        };
        let (key, chain) = made("a.test");
        let others = made("b.test");
        let now = Duration::from_hours(24 * 365 * 50);
        for content in [
            format!("{}{}", others.0, others.1),
            format!("{}{chain}", others.0),
            chain.clone(),
            "<html>".to_owned(),
        ] {
            keep(&config, &content, now).unwrap_err();
            assert!(!config.certificate().exists(), "{content}");
        }
        let usable = format!("{key}{chain}");
        keep(&config, &usable, now).unwrap();
        assert_eq!(std::fs::read_to_string(config.certificate()).unwrap(), usable);
        let late = Duration::from_hours(24 * 365 * 9000);
        let error = keep(&config, &usable, late).unwrap_err();
        assert!(error.to_string().contains("clock"), "{error}");
        assert_eq!(error.fault, Fault::Refused, "or it would be ordered again at once");
    }
}
