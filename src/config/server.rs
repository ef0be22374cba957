//! `[server]`: the process.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

/// `[server]`
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// `workers`: data-plane threads, each with its own listener sockets and connections to nodes.
    /// `"auto"`: the cores this process may use, cgroup quota respected.
    pub workers: NonZeroUsize,
    /// `zone`: where this process runs. Reads go to fresh replicas of the same zone first.
    pub zone: Option<Arc<str>>,
    /// `drain`
    pub drain: Drain,
}

/// `drain = { delay, timeout }`: how the process leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drain {
    /// How long `/readyz` fails before accepting stops, so that load balancers can look away.
    pub delay: Duration,
    /// How long what runs may take to finish after that.
    pub timeout: Duration,
}
