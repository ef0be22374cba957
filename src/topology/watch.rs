//! One publishes, many read: the latest [`Topology`], without a lock on the reader's path.

use std::sync::Arc;

use arc_swap::{ArcSwap, cache::Cache};
use tokio::sync::watch;

use super::Topology;

/// Starts a cluster's topology at `first`.
pub fn channel(first: Topology) -> (Publisher, Reader) {
    let (wake, woken) = watch::channel(first.generation);
    let latest = Arc::new(ArcSwap::from_pointee(first));
    (Publisher { latest: Arc::clone(&latest), wake }, Reader { cache: Cache::new(latest), woken })
}

/// The writer.
#[derive(Debug)]
pub struct Publisher {
    latest: Arc<ArcSwap<Topology>>,
    wake: watch::Sender<u64>,
}

impl Publisher {
    /// Makes `topology` the latest and wakes whoever waits for something newer.
    pub fn publish(&self, topology: Topology) {
        let generation = topology.generation;
        self.latest.store(Arc::new(topology));
        self.wake.send_replace(generation);
    }
}

/// A reader's own view. Clone one for each thread: reading is a pointer comparison in the usual case.
#[derive(Clone, Debug)]
pub struct Reader {
    cache: Cache<Arc<ArcSwap<Topology>>, Arc<Topology>>,
    woken: watch::Receiver<u64>,
}

impl Reader {
    /// The latest snapshot.
    pub fn latest(&mut self) -> &Arc<Topology> {
        self.cache.load()
    }

    /// Waits until something newer than `seen` is published.
    ///
    /// # Errors
    /// [`Gone`] when the publisher went away: nothing newer will ever come.
    pub async fn newer_than(&mut self, seen: u64) -> Result<Arc<Topology>, Gone> {
        self.woken.wait_for(|generation| *generation > seen).await.map_err(|_closed| Gone)?;
        Ok(Arc::clone(self.latest()))
    }
}

/// The publisher went away.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("discovery has ended")]
pub struct Gone;
