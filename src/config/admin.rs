//! `[admin]` and `[access_log]`: what operators see.

use std::{net::SocketAddr, sync::Arc};

/// `[admin]`
#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// `address`: metrics, health and the API. `None` where it is `"off"`.
    pub address: Option<SocketAddr>,
    /// `peers`: names, each with an address for every instance that writes to the same clusters,
    /// and the port of their admin listeners: a hand-over has all of them hold.
    pub peers: Vec<Arc<str>>,
}

/// `[access_log]`
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// `format`
    pub format: AccessLogFormat,
    /// `output`
    pub output: AccessLogOutput,
}

/// `format = "text" | "json" | "off"`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AccessLogFormat {
    /// A line that a person reads.
    Text,
    /// A JSON object a line.
    Json,
    /// Nothing.
    Off,
}

/// `output = "stdout" | "stderr" | PATH`
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AccessLogOutput {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Appended to this file, which is opened again on SIGHUP.
    File(std::path::PathBuf),
}
