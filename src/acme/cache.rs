//! What is kept on disk: the account's key, and the certificate with its key in one file.
//!
//! One file, because two could not be replaced at once: whatever the moment at which litegate or
//! the machine dies, the certificate that is there has its key. For the owner alone (0600).

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use rustls::{
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use x509_cert::{
    Certificate,
    der::Decode as _,
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use super::schedule::Validity;
use crate::net::pem::{self, FileError};

/// A certificate that is kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Kept {
    /// When it holds.
    pub validity: Validity,
    /// Whom it is made out to, in lower case.
    pub names: Vec<String>,
}

impl Kept {
    /// Whether it is made out to all of these.
    pub fn has(&self, domains: &[String]) -> bool {
        domains.iter().all(|domain| self.names.contains(domain))
    }
}

/// The certificate that is there, if its key is too.
///
/// # Errors
/// What is wrong with it, or that there is none.
pub fn certificate(path: &Path, provider: &CryptoProvider) -> Result<Kept, FileError> {
    parsed(path, &pem::read(path)?, provider)
}

/// As [`certificate`], of what is, or would be, in that file.
///
/// # Errors
/// What is wrong with it.
pub fn parsed(path: &Path, content: &[u8], provider: &CryptoProvider) -> Result<Kept, FileError> {
    let wrong = |error: rustls::pki_types::pem::Error| FileError::new(path, error);
    let chain = CertificateDer::pem_slice_iter(content).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(wrong)?;
    let key = PrivateKeyDer::from_pem_slice(content).map_err(wrong)?;
    let kept = chain.first().map(|first| described(path, first)).transpose()?;
    let kept = kept.ok_or_else(|| FileError::new(path, "there is no certificate in it"))?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| FileError::new(path, error))?;
    Ok(kept)
}

fn described(path: &Path, certificate: &[u8]) -> Result<Kept, FileError> {
    let wrong = |error: x509_cert::der::Error| FileError::new(path, error);
    let parsed = Certificate::from_der(certificate).map_err(wrong)?;
    let parsed = parsed.tbs_certificate();
    let validity = parsed.validity();
    let validity = Validity {
        from: validity.not_before.to_unix_duration(),
        until: validity.not_after.to_unix_duration(),
    };
    let names = parsed.get_extension::<SubjectAltName>().map_err(wrong)?;
    let names = names.iter().flat_map(|(_, names)| &names.0).filter_map(|name| match name {
        GeneralName::DnsName(name) => Some(name.as_str().to_ascii_lowercase()),
        _ => None,
    });
    Ok(Kept { validity, names: names.collect() })
}

/// Replaces a file whole or not at all, for the owner alone, and makes its directory.
///
/// # Errors
/// It can't be written.
pub fn write(path: &Path, content: &[u8]) -> Result<(), FileError> {
    replace(path, content).map_err(|error| FileError::new(path, error))
}

fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    if !directory.as_os_str().is_empty() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    // Another litegate may write the same file now.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}.tmp", std::process::id()));
    let unfinished = Path::new(&unfinished);
    // One that was left behind may have been anybody's.
    match fs::remove_file(unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = File::options().write(true).create_new(true).mode(0o600).open(unfinished);
    let written = written.and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(unfinished, path));
    if replaced.is_err() {
        let _ = fs::remove_file(unfinished);
    }
    replaced
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn made(names: &[&str]) -> String {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        format!("{}{}", made.signing_key.serialize_pem(), made.cert.pem())
    }

    #[test]
    fn a_certificate_and_its_key_are_kept_in_one_file_of_the_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deeper/a.pem");
        write(&path, b"something longer than what follows").unwrap();
        for names in [&["a.test", "B.test"][..], &["c.test"]] {
            write(&path, made(names).as_bytes()).unwrap();
            let kept = certificate(&path, &pem::provider()).unwrap();
            let lower = names.iter().map(|name| name.to_ascii_lowercase());
            assert_eq!(kept.names, lower.collect::<Vec<_>>());
            assert!(kept.validity.from < kept.validity.until);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let all = fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(all.count(), 1, "nothing unfinished is left");
    }

    #[test]
    fn what_is_no_certificate_with_its_key_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pem");
        let (a, b) = (made(&["a.test"]), made(&["b.test"]));
        let (key, _) = a.split_once("-----BEGIN CERT").unwrap();
        let (_, chain) = b.split_once("-----END PRIVATE KEY-----").unwrap();
        for content in ["", "nonsense", key, chain, &format!("{key}{chain}")] {
            write(&path, content.as_bytes()).unwrap();
            let error = certificate(&path, &pem::provider()).unwrap_err().to_string();
            assert!(error.contains("a.pem"), "{error}");
        }
        fs::remove_file(&path).unwrap();
        assert!(certificate(&path, &pem::provider()).is_err());
    }

    #[test]
    fn a_certificate_has_to_have_all_domains() {
        let validity =
            Validity { from: std::time::Duration::ZERO, until: std::time::Duration::MAX };
        let kept = Kept { validity, names: vec!["a.test".into(), "b.test".into()] };
        for (domains, want) in
            [(&["a.test"][..], true), (&["b.test", "a.test"], true), (&["a.test", "c.test"], false)]
        {
            let domains: Vec<String> = domains.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(kept.has(&domains), want, "{domains:?}");
        }
    }
}
