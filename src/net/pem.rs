//! Certificates and keys in files.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use x509_cert::{Certificate, der::Decode as _};

/// The largest file that is read: a bundle of all public authorities has a quarter of it.
const LARGEST: u64 = 1 << 20;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct FileError {
    path: String,
    what: String,
}

impl FileError {
    /// That with this file.
    pub fn new(path: &Path, what: impl std::fmt::Display) -> Self {
        Self { path: path.display().to_string(), what: what.to_string() }
    }
}

/// All certificates of a file, at least one.
///
/// # Errors
/// That it can't be read, or what it holds instead.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let pem = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all {
        Ok(all) if all.is_empty() => Err(FileError::new(path, "there is no certificate in it")),
        Ok(all) => Ok(all),
        Err(error) => Err(FileError::new(path, error)),
    }
}

/// The private key of a file: PKCS #8, PKCS #1 or SEC 1.
///
/// # Errors
/// That it can't be read, or what it holds instead.
pub fn key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| FileError::new(path, error))
}

/// A whole file of at most 1 MiB.
///
/// # Errors
/// It can't be read, or is larger.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let mut pem = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut pem));
    match read {
        Ok(n) if n as u64 > LARGEST => Err(FileError::new(path, "it is over 1 MiB")),
        Ok(_) => Ok(pem),
        Err(error) => Err(FileError::new(path, error)),
    }
}

/// What tells one state of a file from another, without reading it: it follows symlinks, so that
/// Kubernetes' swap of `..data` shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Stamp(Option<(u64, u64, u64, i64, i64)>);

impl Stamp {
    /// Of the file that is there now.
    pub fn of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let stamp = |file: std::fs::Metadata| {
            (file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec())
        };
        Self(std::fs::metadata(path).ok().map(stamp))
    }
}

/// Files that change under us, of which several belong together: a certificate and its key.
#[derive(Debug)]
pub struct Watched {
    /// Of the files that were read last, rightly or wrongly.
    read: Vec<Stamp>,
    /// Of files that may still be in the middle of a change.
    unsettled: Option<Vec<Stamp>>,
}

impl Watched {
    /// They were read like this.
    pub fn new(read: Vec<Stamp>) -> Self {
        Self { read, unsettled: None }
    }

    /// Whether they are to be read again: they are others than before, and were the same at the
    /// look before this one.
    pub fn have_changed(&mut self, now: Vec<Stamp>) -> bool {
        if now == self.read {
            self.unsettled = None;
        } else if self.unsettled.as_ref() == Some(&now) {
            self.unsettled = None;
            self.read = now;
            return true;
        } else {
            self.unsettled = Some(now);
        }
        false
    }
}

/// What a look at files came to.
#[derive(Debug)]
pub enum Look {
    /// They are as they were, or still changing.
    Same,
    /// They are others, and in force.
    Renewed,
    /// They are others, and wrong: the former stay in force.
    Refused(FileError),
}

/// When a certificate ends, since 1970.
///
/// # Errors
/// What is wrong with it.
pub fn expiry(path: &Path, certificate: &CertificateDer<'_>) -> Result<Duration, FileError> {
    let parsed = Certificate::from_der(certificate).map_err(|error| FileError::new(path, error))?;
    Ok(parsed.tbs_certificate().validity().not_after.to_unix_duration())
}

/// The cryptography that TLS is made with.
pub fn provider() -> std::sync::Arc<rustls::crypto::CryptoProvider> {
    std::sync::Arc::new(rustls::crypto::ring::default_provider())
}

/// As what it is in an `io::Error`.
impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}
