//! `[[route]]`: which requests go to which cluster, and as what.

use http::{HeaderName, Method};

/// `[[route]]`: all conditions that it has must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// `host`: any of these, in any case, ports ignored. Empty: every host.
    pub host: Vec<Host>,
    /// `path`, `path_exact` or `path_glob`
    pub path: Path,
    /// `method`: any of these. Empty: every method.
    pub method: Vec<Method>,
    /// `header`: all of these.
    pub header: Vec<HeaderMatch>,
    /// `class`
    pub class: Class,
    /// `cluster`: its index in [`Config::clusters`](super::Config::clusters).
    pub cluster: usize,
    /// `idempotent`: an interrupted write may be sent again.
    pub idempotent: bool,
    /// `retry_uncommitted`: a write that was interrupted and provably did not commit is sent again.
    pub retry_uncommitted: bool,
    /// `allow_trace`: TRACE requests are passed on instead of refused.
    pub allow_trace: bool,
    /// `causal`: whose reads see the last write that went through this litegate.
    pub causal: Option<Scope>,
    /// The place in the file, counted from 0, for logs. `None`: the built-in catch-all.
    pub index: Option<usize>,
}

/// `causal`: what a write and a read have to have in common.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scope {
    /// `"path"`: the whole path.
    Path,
    /// A number: so many segments at the path's beginning.
    Segments(usize),
}

/// One entry of `host`, lower-cased.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Host {
    /// `abaci.one`
    Exact(Box<str>),
    /// `*.abaci.one`: any name below it, however deep, but not itself. Holds `.abaci.one`.
    Below(Box<str>),
}

/// Which paths.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Path {
    /// Every path.
    Any,
    /// `path`: itself and everything below it, by whole segments. No slash at its end, unless it
    /// is `/`.
    Prefix(Box<str>),
    /// `path_exact`
    Exact(Box<str>),
    /// `path_glob`: `*` stands for any run of characters, slashes included (LiteFS's
    /// `passthrough` and `always-forward` patterns mean the same); the whole path must match.
    Glob(Box<str>),
}

/// One entry of `header = [{ name = "x", value = "y" }]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HeaderMatch {
    /// The field's name.
    pub name: HeaderName,
    /// What one of its lines must be, to the letter. `None`: the field is there.
    pub value: Option<Box<str>>,
}

/// `class`
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Class {
    /// By its method.
    #[default]
    Auto,
    /// A POST that only reads, say.
    Read,
    /// A GET that writes, say.
    Write,
}
