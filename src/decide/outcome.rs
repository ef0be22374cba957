//! What became of a write whose answer never came.
//!
//! Its connection broke after bytes of it had left, so it may have run. The primary's positions
//! tell in one case: another process is primary now, and its history goes on from where the old
//! primary was before the write was sent, or has less of it. Then whatever the write did is on a branch that
//! the cluster has left, and it never will be there: the app that had it hung up, or is gone, and
//! is not the primary's. Everything else is unknown, above all a primary that lives: its app may
//! commit after the connection broke.
//!
//! Where the new primary began is told by its own stream of events, in the order of its
//! transactions ([`Epoch::start`]). One that is primary when it is first heard has at most what it
//! has then ([`Epoch::began`]). What the old one's feed said may be older than the truth, which
//! makes an equal beginning less likely, never wrong. A primary that was seen to commit something
//! meanwhile has it on its disk, and may come back with it: that is unknown, too.

use smallvec::SmallVec;

use super::{FailureKind, token::Need};
use crate::topology::{
    Epoch,
    position::{DATABASES, Database, Position, Positions},
};

/// Where the primary was before a write was sent to it. Allocates nothing for a node with up to
/// two databases.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Before {
    /// The process, if what it writes is in its own history.
    incarnation: Option<u64>,
    /// Whether it said that it was the primary.
    is_primary: bool,
    databases: SmallVec<[(Database, Position); 2]>,
}

impl Before {
    /// As its feed has it. `chosen`: the write goes there because it is believed to be the primary.
    ///
    /// Where neither is so, a replay named the node: what it writes, by LiteFS's halt lock or
    /// somewhere else, is in another's history, and says nothing of whether it is in its own. It may
    /// have been primary itself, and have followed its successor far beyond where that began.
    pub fn of(positions: &Positions, chosen: bool) -> Self {
        let databases = positions.iter().map(|(database, _, position)| (database, position));
        let is_primary = positions.is_primary == Some(true);
        let incarnation = positions.incarnation.filter(|_| chosen || is_primary);
        Self { incarnation, is_primary, databases: databases.collect() }
    }

    /// Whether this process was the primary, by its own word.
    pub fn was_primary(&self, process: Option<u64>) -> bool {
        self.is_primary && self.incarnation == process
    }

    /// What a write that was sent to the primary then comes after.
    pub fn need(&self) -> Option<Need> {
        let is_known = self.is_primary && !self.databases.is_empty();
        is_known.then(|| Need { lineage: self.incarnation, databases: self.databases.clone() })
    }

    /// Whether whoever was there has nothing that came after it, in any database.
    fn is_beyond(&self, there: &Positions) -> bool {
        there.iter().all(|(database, _, there)| {
            self.databases.iter().any(|(known, at)| *known == database && there.txid <= at.txid)
        })
    }

    fn is_left_behind_by(&self, next: &Epoch) -> bool {
        next.start.as_ref().is_some_and(|start| self.is_at(start))
            || next.began.as_ref().is_some_and(|began| self.is_beyond(began))
    }

    /// Whether `start` is the very same place: in every database of either.
    fn is_at(&self, start: &Positions) -> bool {
        let ours = self.databases.iter();
        let mut theirs = start.iter();
        ours.into_iter().all(|(db, at)| at.checksum != 0 && start.get(*db) == Some(*at))
            && theirs.all(|(theirs, ..)| self.databases.iter().any(|(ours, _)| *ours == theirs))
    }
}

/// What is known of it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum WriteOutcome {
    /// It did not commit, and never will.
    NotCommitted,
    /// It may have.
    Unknown,
}

impl WriteOutcome {
    /// The word in `Litegate-Write-Outcome`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotCommitted => "not-committed",
            Self::Unknown => "unknown",
        }
    }
}

/// How far the question is settled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// For good.
    Settled(WriteOutcome),
    /// The next primary's beginning would tell; until then it is unknown.
    Open,
}

/// Whether whoever had the write is done with it: its side broke the connection off, or its
/// process is gone. After a timeout it may be running still.
pub fn is_over(kind: FailureKind, process_is_gone: bool) -> bool {
    process_is_gone || matches!(kind, FailureKind::Closed | FailureKind::StaleConnection)
}

/// Judges the last attempt of a write: `before` it was sent, and who has been primary so far.
/// `over`: see [`is_over`]. `all`: whether every database of a node is followed.
pub fn judge(before: &Before, lineage: &[Epoch], over: bool, all: bool) -> Verdict {
    const UNKNOWN: Verdict = Verdict::Settled(WriteOutcome::Unknown);
    let Some(process) = before.incarnation.filter(|_| over && all) else { return UNKNOWN };
    if before.databases.is_empty() || before.databases.len() >= DATABASES {
        return UNKNOWN;
    }
    let mut terms = lineage.iter().enumerate().filter(|(_, epoch)| epoch.incarnation == process);
    let (Some((term, _)), None) = (terms.next(), terms.next()) else {
        // It was never seen as primary, or more than once: then its app may still get to commit.
        return UNKNOWN;
    };
    let Some(next) = lineage.get(term + 1) else { return Verdict::Open };
    let end = lineage.get(term).and_then(|epoch| epoch.end.as_ref());
    if end.is_some_and(|end| !before.is_beyond(end)) {
        // It was seen to commit something since then. That is on its disk, and may be what the
        // cluster goes on from one day: a process that restarts can take the lease with it.
        return UNKNOWN;
    }
    match &next.start {
        _ if before.is_left_behind_by(next) => Verdict::Settled(WriteOutcome::NotCommitted),
        None if term + 2 == lineage.len() => Verdict::Open,
        _ => UNKNOWN,
    }
}

/// Whether somebody took over who does not have what came after `before`. A write that was sent
/// then is not in the history that goes on, whatever its node says of it.
pub fn is_left_behind(before: &Before, lineage: &[Epoch], all: bool) -> bool {
    let of = lineage.iter().rposition(|epoch| before.incarnation == Some(epoch.incarnation));
    let next =
        of.and_then(|of| lineage.get(of + 1)).filter(|_| all && !before.databases.is_empty());
    next.is_some_and(|next| before.is_left_behind_by(next))
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use proptest::prelude::*;

    use super::*;

    const NOT_COMMITTED: Verdict = Verdict::Settled(WriteOutcome::NotCommitted);
    const UNKNOWN: Verdict = Verdict::Settled(WriteOutcome::Unknown);

    fn at(txid: u64, branch: u64) -> Position {
        Position { txid, checksum: 1 << 63 | branch << 32 | txid }
    }

    fn positions(process: u64, databases: &[(&str, Position)]) -> Positions {
        let mut all = Positions::of(Some(process));
        for (name, position) in databases {
            all.set(name, *position, Instant::now());
        }
        all
    }

    fn epoch(process: u64, start: Option<&[(&str, Position)]>) -> Epoch {
        let start = start.map(|databases| Arc::new(positions(process, databases)));
        Epoch { incarnation: process, start, ..Epoch::default() }
    }

    fn before(databases: &[(&str, Position)]) -> Before {
        Before::of(&positions(1, databases), true)
    }

    #[test]
    fn only_a_beginning_at_the_very_same_place_proves_anything() {
        let (a, b) = (("a", at(5, 1)), ("b", at(9, 1)));
        let table: &[(&[_], &[Epoch], Verdict)] = &[
            (&[a], &[epoch(1, None)], Verdict::Open),
            (&[a], &[epoch(1, None), epoch(2, None)], Verdict::Open),
            (&[a], &[epoch(1, None), epoch(2, Some(&[a]))], NOT_COMMITTED),
            (&[a, b], &[epoch(1, None), epoch(2, Some(&[b, a]))], NOT_COMMITTED),
            (&[a], &[epoch(1, None), epoch(2, Some(&[("a", at(6, 1))]))], UNKNOWN),
            (&[a], &[epoch(1, None), epoch(2, Some(&[("a", at(4, 1))]))], UNKNOWN),
            (&[a], &[epoch(1, None), epoch(2, Some(&[("a", at(5, 2))]))], UNKNOWN),
            (&[a, b], &[epoch(1, None), epoch(2, Some(&[a]))], UNKNOWN),
            (&[a], &[epoch(1, None), epoch(2, Some(&[a, b]))], UNKNOWN),
            (&[], &[epoch(1, None), epoch(2, Some(&[]))], UNKNOWN),
            // Later primaries add nothing, unless the old one is among them.
            (&[a], &[epoch(1, None), epoch(2, Some(&[a])), epoch(3, None)], NOT_COMMITTED),
            (&[a], &[epoch(1, None), epoch(2, None), epoch(3, Some(&[a]))], UNKNOWN),
            (&[a], &[epoch(1, None), epoch(2, Some(&[a])), epoch(1, None)], UNKNOWN),
            // Never seen as primary.
            (&[a], &[epoch(2, Some(&[a]))], UNKNOWN),
            (&[a], &[], UNKNOWN),
        ];
        for (n, (databases, lineage, verdict)) in table.iter().enumerate() {
            assert_eq!(judge(&before(databases), lineage, true, true), *verdict, "{n}");
            assert_eq!(judge(&before(databases), lineage, false, true), UNKNOWN, "{n}");
            assert_eq!(judge(&before(databases), lineage, true, false), UNKNOWN, "{n}");
        }
    }

    #[test]
    fn less_than_there_was_before_proves_it_too() {
        for (began, verdict) in [
            (&[("a", at(5, 1))][..], NOT_COMMITTED),
            (&[("a", at(4, 1))], NOT_COMMITTED),
            (&[("a", at(5, 2))], NOT_COMMITTED),
            // Its own transactions, perhaps.
            (&[("a", at(6, 1))], Verdict::Open),
            (&[("a", at(5, 1)), ("b", at(1, 1))], Verdict::Open),
        ] {
            let began = Some(Arc::new(positions(2, began)));
            // What checksums make likely is no proof.
            let kept = Some([(Database::named("a"), 3)].into());
            let lineage = [epoch(1, None), Epoch { began, kept, ..epoch(2, None) }];
            assert_eq!(judge(&before(&[("a", at(5, 1))]), &lineage, true, true), verdict);
        }
    }

    #[test]
    fn what_is_on_a_disk_may_come_back() {
        let before = before(&[("a", at(5, 1))]);
        for (end, verdict) in [(5, NOT_COMMITTED), (6, UNKNOWN)] {
            let end = Some(Arc::new(positions(1, &[("a", at(end, 1))])));
            let first = Epoch { end, ..epoch(1, None) };
            let lineage = [first, epoch(2, Some(&[("a", at(5, 1))]))];
            assert_eq!(judge(&before, &lineage, true, true), verdict);
            assert!(is_left_behind(&before, &lineage, true));
            assert!(!is_left_behind(&before, &lineage, false), "a database that nobody follows");
        }
        assert!(!is_left_behind(&before, &[epoch(1, None)], true));
        assert!(!is_left_behind(&before, &[epoch(1, None), epoch(2, None)], true));
    }

    #[test]
    fn nothing_is_proved_of_a_write_that_a_follower_had() {
        // It was primary up to 3, and has followed its successor since.
        let end = Some(Arc::new(positions(1, &[("a", at(3, 1))])));
        let began = Some(Arc::new(positions(2, &[("a", at(3, 1))])));
        let next = Epoch { began, ..epoch(2, Some(&[("a", at(3, 1))])) };
        let lineage = [Epoch { end, ..epoch(1, None) }, next];
        let mut here = positions(1, &[("a", at(9, 2))]);
        for (claims, chosen, proved) in [
            (Some(true), true, true),
            (Some(false), true, true),
            (Some(true), false, true),
            (Some(false), false, false),
            (None, false, false),
        ] {
            here.is_primary = claims;
            let before = Before::of(&here, chosen);
            assert_eq!(is_left_behind(&before, &lineage, true), proved);
            let verdict = if proved { NOT_COMMITTED } else { UNKNOWN };
            assert_eq!(judge(&before, &lineage, true, true), verdict);
        }
    }

    #[test]
    fn a_checksum_that_nobody_knows_proves_nothing() {
        let blind = ("a", Position { txid: 5, checksum: 0 });
        let lineage = [epoch(1, None), epoch(2, Some(&[blind]))];
        assert_eq!(judge(&before(&[blind]), &lineage, true, true), UNKNOWN);
    }

    #[test]
    fn after_a_timeout_it_may_still_run_unless_the_process_is_gone() {
        for (kind, over) in [
            (FailureKind::Closed, true),
            (FailureKind::StaleConnection, true),
            (FailureKind::ResponseTimeout, false),
            (FailureKind::NodeGone, false),
            (FailureKind::BadResponse, false),
        ] {
            assert_eq!(is_over(kind, false), over, "{kind:?}");
            assert!(is_over(kind, true));
        }
    }

    proptest! {
        /// A history of transactions on one database, with failovers that lose some of them: a
        /// write that is in the last primary's history is never called uncommitted.
        #[test]
        fn what_survived_is_never_called_uncommitted(
            sent in 1_u64..20, stale in 0_u64..3, ran in any::<bool>(), late in 0_u64..4,
            kept in 0_u64..30, known in any::<bool>(), further in 0_u64..3,
            heard in proptest::option::of(0_u64..3),
        ) {
            // The primary was at `sent`, of which its feed knew all but `stale`; the write, if it
            // ran, became a transaction after `late` others, and the next primary kept some.
            let knew = sent.saturating_sub(stale).max(1).min(sent);
            let write = sent + late + 1;
            let end = if ran { write + further } else { sent + late };
            let start = kept.min(end).max(1);
            let survived = ran && start >= write;
            let database = |txid| [("a", at(txid, 1))];
            let second = database(start);
            // It may have gone on when it was first heard.
            let began = heard.map(|heard| Arc::new(positions(2, &database(start + heard))));
            let next = Epoch { began, ..epoch(2, known.then_some(&second[..])) };
            let verdict = judge(&before(&database(knew)), &[epoch(1, None), next], true, true);
            prop_assert!(!survived || verdict != NOT_COMMITTED);
            if known && start == knew {
                prop_assert_eq!(verdict, NOT_COMMITTED);
            }
        }
    }
}
