//! One cluster as one worker serves it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use smallvec::SmallVec;
use tokio::time::Instant;

use super::{attempt::Node, body::RequestBody, hold::Hold};
use crate::{
    config,
    decide::{self, balance::PeakEwma},
    discovery::Observer,
    telemetry::metrics::{NodeCells, Shard},
    topology::{Topology, watch},
    upstream::{Gate, Limits, Upstreams},
};

/// What this worker remembers of a node to balance by.
#[derive(Debug)]
pub struct Load {
    latency: Cell<PeakEwma>,
    /// Its counters.
    pub(super) cells: Arc<NodeCells>,
}

impl Load {
    /// An attempt's head came after `took`.
    pub(super) fn answered(&self, took: Duration, now: Instant) {
        self.latency.set(self.latency.get().observe(took, now.into_std()));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // The node has left, and its pool with it. Another incarnation of that name tells anew.
        self.cells.idle.set(0);
        self.cells.in_flight.set(0);
    }
}

/// Whatever outlives a change of configuration, shared by all workers.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What discovery believes.
    pub topology: watch::Reader,
    /// What the data plane tells discovery.
    pub observer: Observer,
    /// Who waits.
    pub hold: Arc<Hold>,
}

/// One cluster as one worker serves it.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) index: usize,
    pub(super) config: config::cluster::Cluster,
    pub(super) rules: decide::choose::Rules,
    pub(super) next: decide::next::Rules,
    pub(super) topology: RefCell<watch::Reader>,
    pub(super) observer: Observer,
    pub(super) hold: Arc<Hold>,
    /// The primary's lane: so many writes at once, the others in order.
    pub(super) writes: Rc<Gate>,
    pub(super) budget: RefCell<decide::budget::Budget>,
    upstreams: Upstreams<RequestBody, Load>,
    turn: Cell<usize>,
    shard: Arc<Shard>,
}

impl Cluster {
    pub(super) fn new(
        index: usize,
        mut config: config::cluster::Cluster,
        shared: Shared,
        shard: Arc<Shard>,
        workers: usize,
        now: Instant,
    ) -> Self {
        // A copy: see `upstream::Upstreams::follow`.
        config.name = Arc::from(&*config.name);
        let limits = Limits {
            requests: share(config.max_requests, workers),
            pending: share(config.max_pending, workers),
            idle: config.max_idle,
            idle_for: config.timeouts.pool_idle,
        };
        Self {
            index,
            rules: decide::choose::Rules::of(&config),
            next: decide::next::Rules::of(&config),
            writes: Gate::new(share(config.max_writes, workers), usize::MAX),
            budget: RefCell::new(decide::budget::Budget::new(
                config.retry.budget,
                share(config.retry.budget_min as usize, workers),
                now.into_std(),
            )),
            config,
            topology: RefCell::new(shared.topology),
            observer: shared.observer,
            hold: shared.hold,
            upstreams: Upstreams::new(limits),
            turn: Cell::new(0),
            shard,
        }
    }

    /// Runs `look` on the latest snapshot and what this worker knows of its nodes.
    pub(super) fn look<T>(
        &self,
        now: Instant,
        look: impl FnOnce(&Topology, &[decide::balance::Load]) -> T,
    ) -> T {
        let mut reader = self.topology.borrow_mut();
        let topology = reader.latest();
        self.upstreams.follow(topology, |node| Load {
            latency: Cell::new(PeakEwma::default()),
            cells: self.shard.node(self.index, &node.name),
        });
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let mut loads = SmallVec::<[decide::balance::Load; 8]>::new();
        self.upstreams.each(|node| {
            loads.push(decide::balance::Load {
                in_flight: node.gate.inside(),
                latency: node.load.latency.get().value(now.into_std()),
                full: node.gate.is_full(),
                turn,
            });
        });
        look(topology, &loads)
    }

    /// The node at this place of the snapshot last looked at.
    pub(super) fn node(&self, index: usize) -> Option<Rc<Node>> {
        self.upstreams.get(index)
    }

    /// Closes connections to nodes that have been idle for too long.
    pub(super) fn prune(&self, now: Instant) {
        self.upstreams.each(|node| {
            node.prune(now);
            node.load.cells.idle.set(node.idle() as u64);
            node.load.cells.in_flight.set(node.gate.inside() as u64);
        });
    }
}

/// A worker's share of a limit for the process: rounded down so that the limit holds, but never
/// nothing.
pub(super) fn share(limit: usize, workers: usize) -> usize {
    (limit / workers.max(1)).max(1)
}
