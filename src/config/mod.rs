//! What the operator wrote, and what the program runs on.
//!
//! A [`Config`] cannot be wrong: [`load`] parses a TOML file and the environment, and either
//! returns one or every [`Diagnostic`](diagnostic::Diagnostic) at once. Each section has a file of
//! its own with its written shape, its checked shape, its defaults and its tests.

pub mod admin;
pub mod cluster;
pub mod diagnostic;
pub mod limits;
pub mod listener;
pub mod load;
mod reader;
pub mod route;
pub mod server;
pub mod units;

/// The checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[server]`
    pub server: server::Server,
    /// `[[listener]]`, at least one.
    pub listeners: Vec<listener::Listener>,
    /// `[admin]`
    pub admin: admin::Admin,
    /// `[access_log]`
    pub access_log: admin::AccessLog,
    /// `[limits]`
    pub limits: limits::Limits,
    /// `[cluster.NAME]`, at least one, in the order of their names.
    pub clusters: Vec<cluster::Cluster>,
    /// `[[route]]` in file order: the first match wins. Where the file has none, one that sends
    /// everything to the only cluster.
    pub routes: Vec<route::Route>,
}
