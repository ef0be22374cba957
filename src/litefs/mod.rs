//! LiteFS's own words, spelled once. `reference/litefs.md` section 2 is the contract.

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;

use crate::topology::{Claim, position::Position};

pub mod client;

/// Who am I, who is primary.
pub const INFO: &str = "/info";
/// The push stream of changes.
pub const EVENTS: &str = "/events";
/// Go's expvar, the only place with the exact positions of all databases.
pub const VARS: &str = "/debug/vars";
/// Prometheus text, for the lag.
pub const METRICS: &str = "/metrics";
/// Where a node is asked to become primary.
pub const PROMOTE: &str = "/promote";
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

/// The cookie by which a client of LiteFS's proxy reads its writes: a TXID.
pub const TXID_COOKIE: &str = "__txid";

/// A line of [`EVENTS`]. What is not known is [`Event::Other`].
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
    /// A transaction, committed or applied.
    #[serde(rename = "tx")]
    Tx {
        /// The database's name.
        db: String,
        /// Where it is now.
        data: Tx,
    },
    /// Something that a newer LiteFS tells.
    #[serde(other)]
    Other,
}

/// A transaction, by an event.
#[derive(Clone, Debug, Deserialize)]
pub struct Tx {
    /// 16 hexadecimal digits.
    #[serde(rename = "txID")]
    pub txid: String,
    /// Likewise.
    #[serde(rename = "postApplyChecksum")]
    pub checksum: String,
}

/// What [`VARS`] tells of the databases.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Vars {
    /// Absent for the first instants of a process.
    #[serde(default)]
    pub store: Option<Store>,
}

/// All databases of a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Store {
    /// By name.
    #[serde(default)]
    pub dbs: BTreeMap<String, Db>,
}

/// One of them.
#[derive(Clone, Debug, Deserialize)]
pub struct Db {
    /// 16 hexadecimal digits.
    pub txid: String,
    /// Likewise.
    pub checksum: String,
}

/// A position as LiteFS writes it. `None`: not as LiteFS writes it.
pub fn position(txid: &str, checksum: &str) -> Option<Position> {
    Some(Position {
        txid: Position::parse_hex(txid.as_bytes())?,
        checksum: Position::parse_hex(checksum.as_bytes())?,
    })
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
    Claim { incarnation, cluster, is_primary, primary, positions: None }
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
        let line = r#"{"type":"halt","db":"app.db","data":{"by":"somebody"}}"#;
        assert!(matches!(serde_json::from_str(line), Ok(Event::Other)));
        let line = r#"{"type":"tx","db":"app.db","data":{"txID":"0000000000000005","postApplyChecksum":"8000000000000005","pageSize":4096}}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        let Event::Tx { db, data } = event else { panic!("a transaction") };
        assert_eq!(db, "app.db");
        assert_eq!(position(&data.txid, &data.checksum).map(|position| position.txid), Some(5));
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
