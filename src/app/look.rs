//! What discovery finds out, for somebody who only asks.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{
    config::{self, Config, cluster::UpstreamProtocol},
    discovery,
    net::{
        Stream,
        tls::{Connector, Offer},
    },
    telemetry::metrics::Metrics,
    topology,
};

/// What discovery found out of one cluster.
#[derive(Debug)]
pub struct Found {
    /// What it believes.
    pub topology: Arc<topology::Topology>,
    /// Sources that name the primary and have no news.
    pub silent: Vec<(topology::Source, topology::Trouble)>,
}

/// Observes every cluster as `run` would, and serves nothing: until all is found out, but at least
/// for `least`, since a source may be late, and at most for `most`.
pub async fn look(config: &Config, least: Duration, most: Duration) -> Vec<Found> {
    let began = Instant::now();
    let hostname = std::env::var("HOSTNAME").ok().map(Arc::<str>::from);
    let watched = config.clusters.iter().map(|cluster| {
        let silent = Arc::<Mutex<Vec<_>>>::default();
        let told = Arc::clone(&silent);
        let on_change = move |change: &topology::Change| {
            if let topology::Change::NoNews { source, why } = change {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.retain(|(known, _)| known != source);
                told.push((*source, *why));
            }
        };
        let cells = Metrics::new().discovery(&cluster.name);
        // What is wrong with its files has been said already.
        let tls = super::open_nodes(cluster).ok().flatten();
        (discovery::start(cluster, tls, hostname.clone(), cells, on_change), silent)
    });
    let watched: Vec<_> = watched.collect();
    let mut found = Vec::new();
    for (mut discovery, silent) in watched {
        let all_is_known = async {
            loop {
                let topology = Arc::clone(discovery.reader.latest());
                let roles = topology.nodes.iter().all(|node| node.role != topology::Role::Unknown);
                let is_known = topology.resolved && topology.primary.is_some() && roles;
                if is_known || discovery.reader.newer_than(topology.generation).await.is_err() {
                    return;
                }
            }
        };
        let _ = timeout_at(began + most, all_is_known).await;
        sleep_until(began + least).await;
        let topology = Arc::clone(discovery.reader.latest());
        let silent = silent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        found.push(Found { topology, silent });
    }
    found
}

/// Whether a node of the cluster lets us in: a connection, and TLS where it is spoken.
///
/// # Errors
/// Why it does not.
pub async fn knock(cluster: &config::cluster::Cluster, address: SocketAddr) -> Result<(), String> {
    let stream = Stream::connect(address).await.map_err(|error| error.to_string())?;
    let Some(tls) = super::open_nodes(cluster).map_err(|error| error.to_string())? else {
        return Ok(());
    };
    let offer = match cluster.upstream.protocol {
        UpstreamProtocol::Http1 => Offer::Http1,
        UpstreamProtocol::H2 => Offer::H2,
        UpstreamProtocol::Auto => Offer::Either,
    };
    let session = Connector::new(&tls).connect(stream, address, offer).await;
    session.map(drop).map_err(|error| error.to_string())
}
