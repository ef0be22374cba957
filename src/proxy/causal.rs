//! What was written last where, for routes on which everybody's reads see it (`causal`).
//!
//! One table per cluster and process, of a fixed number of slots. Paths that fall into the same
//! slot share it: a read then sees the last write to any of them, which is more than it asked
//! for and never less. So nothing has to be evicted, and what is not known is not promised: writes
//! through another instance of litegate are seen by their own clients, by token.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use crate::decide::token::Need;

/// Slots of a table: 8 bytes each while nothing is written.
const SLOTS: usize = 4096;

/// The last write to some paths.
#[derive(Debug)]
pub(super) struct Last {
    /// Where the primary was after it. `None`: nobody could say.
    pub(super) need: Option<Need>,
    at: Instant,
}

impl Last {
    /// Whether it is so recent that only the primary is sure to have it, where nobody could say
    /// how far that was.
    pub(super) fn is_blind(&self, affinity: Duration, now: Instant) -> bool {
        self.need.is_none() && now.saturating_duration_since(self.at) < affinity
    }
}

/// The last writes of one cluster.
#[derive(Debug)]
pub struct LastWrites(Box<[ArcSwapOption<Last>]>);

impl Default for LastWrites {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| ArcSwapOption::empty()).collect())
    }
}

impl LastWrites {
    fn slot(&self, scope: u64) -> Option<&ArcSwapOption<Last>> {
        // The remainder is below 4096.
        self.0.get(usize::try_from(scope % SLOTS as u64).unwrap_or(0))
    }

    /// A write to `scope` is acknowledged.
    pub(super) fn note(&self, scope: u64, need: Option<Need>, at: Instant) {
        if let Some(slot) = self.slot(scope) {
            slot.rcu(|old| match (old, &need) {
                // Answers may overtake each other on their way here.
                (Some(old), Some(need)) if old.need.as_ref().is_some_and(|n| n.is_after(need)) => {
                    Some(Arc::clone(old))
                }
                _ => Some(Arc::new(Last { need: need.clone(), at })),
            });
        }
    }

    /// The last write to `scope`, or to something that shares its slot.
    pub(super) fn last(&self, scope: u64) -> Option<Arc<Last>> {
        self.slot(scope)?.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::position::{Database, Position};

    fn need(lineage: u64, txid: u64) -> Need {
        let position = Position { txid, checksum: 0 };
        let databases = [(Database::named("app.db"), position)].into_iter().collect();
        Need { lineage: Some(lineage), databases }
    }

    #[test]
    fn the_newest_write_counts_whoever_tells_it_last() {
        let (writes, now) = (LastWrites::default(), Instant::now());
        for (told, stands) in [(need(1, 5), 5), (need(1, 7), 7), (need(1, 6), 7), (need(2, 3), 3)] {
            writes.note(9, Some(told), now);
            let last = writes.last(9).unwrap();
            assert_eq!(last.need.as_ref().unwrap().databases[0].1.txid, stands);
        }
        assert!(writes.last(10).is_none());
        assert!(writes.last(9 + SLOTS as u64).is_some(), "a shared slot is more than asked for");
    }

    #[test]
    fn a_blind_write_keeps_reads_on_the_primary_for_a_while() {
        let (writes, now) = (LastWrites::default(), Instant::now());
        writes.note(1, None, now);
        let last = writes.last(1).unwrap();
        let affinity = Duration::from_secs(2);
        assert!(last.is_blind(affinity, now) && !last.is_blind(affinity, now + affinity));
    }
}
