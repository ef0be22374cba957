//! LiteFS's `.primary`, in a sidecar that shares the mount.
//!
//! The file names the primary on a replica that is connected, or is connecting, to it. Where it is
//! absent, this node is primary or nobody is known: then `.lag` beside it tells, which is zero on
//! the primary and grows with every millisecond elsewhere (`reference/litefs.md` section 3). FUSE
//! announces no changes, so both are read again and again; on a thread of their own, since reading
//! from a frozen LiteFS blocks for as long as it is frozen.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use tokio::{sync::mpsc, time::timeout};

use crate::{
    discovery::Observer,
    topology::{PrimaryName, Saw, Source, Trouble},
};

/// The longest name: that of a DNS host, a colon and a port.
const LONGEST: u64 = 260;
/// How long a reading may take.
const LIMIT: Duration = Duration::from_secs(1);
/// Between two looks at `.lag` that must both see zero.
const AGAIN: Duration = Duration::from_millis(10);
/// `.lag` on the primary.
const NO_LAG: &str = "+000000000";

/// What the mount says.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Reading {
    /// The primary's name.
    Names(Arc<str>),
    /// The node whose mount this is.
    ThisNode,
    /// Nobody is known.
    Nobody,
}

/// Reads for ever. `local`: the instance name of the node whose mount it is.
pub(in crate::discovery) async fn follow(
    path: PathBuf,
    local: Option<Arc<str>>,
    every: Duration,
    observer: Observer,
) {
    let shown = path.display().to_string();
    // Room for one: a reading that nobody has taken keeps the next one waiting.
    let (sender, mut readings) = mpsc::channel(1);
    let reader = move || {
        while sender.blocking_send(read(&path)).is_ok() {
            thread::sleep(every);
        }
    };
    if let Err(error) = thread::Builder::new().name("primary-file".into()).spawn(reader) {
        tracing::error!(path = shown, %error, "the file can't be watched");
        return;
    }
    let mut told = None;
    loop {
        let (saw, state) = match timeout(every + LIMIT, readings.recv()).await {
            Ok(None) => return,
            Err(_) => {
                (Saw::NoNews(Trouble::Unreachable), Some("reading takes too long".to_owned()))
            }
            Ok(Some(Err(error))) => {
                let why = match error.kind() {
                    io::ErrorKind::InvalidData => Trouble::Malformed,
                    _ => Trouble::Unreachable,
                };
                (Saw::NoNews(why), Some(error.to_string()))
            }
            Ok(Some(Ok(reading))) => match (reading, &local) {
                (Reading::Names(name), _) => named(name),
                (Reading::ThisNode, Some(local)) => named(Arc::clone(local)),
                (Reading::ThisNode, None) => {
                    let help = "this node is primary, but its name is not known: set `instance`";
                    (Saw::NoNews(Trouble::Malformed), Some(help.to_owned()))
                }
                (Reading::Nobody, _) => (Saw::PrimaryIs(None), None),
            },
        };
        if state != told {
            if let Some(error) = &state {
                tracing::warn!(path = shown, %error, "the file does not tell who is primary");
            }
            told = state;
        }
        observer.observe(saw, Source::File);
    }
}

fn named(name: Arc<str>) -> (Saw, Option<String>) {
    (Saw::PrimaryIs(Some(PrimaryName::Instance(name))), None)
}

/// Reads once.
fn read(path: &Path) -> io::Result<Reading> {
    match line(path) {
        Ok(name) if name.is_empty() => {
            let help = "it is empty: set lease.hostname in litefs.yml";
            Err(io::Error::new(io::ErrorKind::InvalidData, help))
        }
        Ok(name) => Ok(Reading::Names(name.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let lag = path.with_file_name(".lag");
            // A replica that has just lost its primary may be seen in the one millisecond in which
            // its lag is zero; not twice.
            for again in [true, false] {
                if line(&lag)? != NO_LAG {
                    return Ok(Reading::Nobody);
                }
                if again {
                    thread::sleep(AGAIN);
                }
            }
            match line(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Reading::ThisNode),
                _ => Ok(Reading::Nobody),
            }
        }
        Err(error) => Err(error),
    }
}

/// A file of one short line.
fn line(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LONGEST + 1).read_to_string(&mut text)?;
    let line = text.trim_end_matches(['\r', '\n']);
    if text.len() as u64 > LONGEST || line.chars().any(char::is_control) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is more than a name"));
    }
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_mount_says_who_is_primary() {
        let mount = tempfile::tempdir().unwrap();
        let path = mount.path().join(".primary");
        let write = |name: &str, text: &str| fs::write(mount.path().join(name), text).unwrap();
        let kind = |path: &Path| read(path).unwrap_err().kind();
        assert_eq!(kind(&path), io::ErrorKind::NotFound, "nothing is mounted yet");
        write(".lag", "+2147483647\n");
        assert_eq!(read(&path).unwrap(), Reading::Nobody);
        write(".lag", "+000000000\n");
        assert_eq!(read(&path).unwrap(), Reading::ThisNode);
        write(".primary", "abaci-app-1\n");
        assert_eq!(read(&path).unwrap(), Reading::Names("abaci-app-1".into()));
        for strange in ["\n".to_owned(), "a\nb\n".to_owned(), "x".repeat(1000)] {
            write(".primary", &strange);
            assert_eq!(kind(&path), io::ErrorKind::InvalidData, "{strange:?}");
        }
    }
}
