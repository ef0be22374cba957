//! LiteFS's own words, spelled once. `reference/litefs.md` section 2 is the contract.

use std::sync::Arc;

use serde::Deserialize;

use crate::topology::Claim;

pub mod client;

/// Who am I, who is primary.
pub const INFO: &str = "/info";
/// The push stream of changes.
pub const EVENTS: &str = "/events";
/// Prometheus text, for the lag.
pub const METRICS: &str = "/metrics";
/// Drawn at every process start.
pub const ID: &str = "litefs-id";
/// The same on all nodes of a cluster, once known.
pub const CLUSTER_ID: &str = "litefs-cluster-id";
/// Time lag of a replica.
const LAG: &str = "litefs_lag_seconds";

/// The answer of [`INFO`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Info {
    /// Whether this node is primary.
    #[serde(default, rename = "isPrimary")]
    pub is_primary: bool,
    /// Whom it takes for the primary.
    #[serde(default)]
    pub primary: Named,
}

/// A node by name.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Named {
    /// `lease.hostname`; empty where nobody is known, or under a static lease without one.
    #[serde(default)]
    pub hostname: String,
}

/// A line of [`EVENTS`] that tells of roles. Others are [`Event::Other`].
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type")]
pub enum Event {
    /// The first line.
    #[serde(rename = "init")]
    Init {
        /// What it is.
        data: Standing,
    },
    /// The node's view of who is primary changed.
    #[serde(rename = "primaryChange")]
    PrimaryChange {
        /// What it is now.
        data: Standing,
    },
    /// A transaction, or something that a newer LiteFS tells.
    #[serde(other)]
    Other,
}

/// What a node is, by an event.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Standing {
    /// Whether it is primary.
    #[serde(default, rename = "isPrimary")]
    pub is_primary: bool,
    /// Whom it takes for the primary; absent on the primary itself.
    #[serde(default)]
    pub hostname: String,
}

/// A claim as the reconciler takes it.
pub fn claim(
    incarnation: Option<u64>,
    cluster: Option<Arc<str>>,
    is_primary: bool,
    hostname: &str,
) -> Claim {
    let primary = Some(hostname).filter(|name| !name.is_empty()).map(Arc::from);
    Claim { incarnation, cluster, is_primary, primary }
}

/// Finds the lag in Prometheus text, in seconds.
pub fn lag(metrics: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(LAG))?;
    line.trim().parse().ok().filter(|lag: &f64| lag.is_finite() && *lag >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_nobody_knows_are_passed_over() {
        let line = r#"{"type":"tx","db":"app.db","data":{"txID":"0000000000000005"}}"#;
        assert!(matches!(serde_json::from_str(line), Ok(Event::Other)));
        let line = r#"{"type":"primaryChange","data":{"isPrimary":false,"hostname":"n2"}}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        assert!(matches!(event, Event::PrimaryChange { data } if data.hostname == "n2"));
    }

    #[test]
    fn lag_is_read_from_the_metrics() {
        let text = "# TYPE litefs_lag_seconds gauge\nlitefs_lag_seconds 1.25\nx 1\n";
        assert_eq!(lag(text), Some(1.25));
        assert_eq!(lag("litefs_lag_seconds NaN\n"), None);
        assert_eq!(lag(""), None);
    }
}
