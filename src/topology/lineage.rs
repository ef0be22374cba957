//! Which processes were primary one after the other, and what each kept of the history before it.
//!
//! A failover can lose transactions, and the next primary uses their numbers again. So what a
//! token stands for is judged by what each later primary *kept*: the number of the last
//! transaction that its history has in common with its predecessor's. That is where it was when it
//! took over, if it had followed its predecessor. But it need not have: a process that restarts
//! has whatever is on its disk, perhaps a tail of transactions that an earlier failover left
//! behind and that nobody follows any more, and may take the lease before it follows anybody. Its
//! numbers then say nothing. Its checksums do, as far as those of the primaries before are
//! remembered ([`Epoch::end`]): they tell whose history it goes on from, and where that one was
//! left.
//!
//! Pure.

use std::sync::Arc;

use super::position::{Database, Positions};

/// For each database, the number of the last transaction that is kept.
pub type Kept = Arc<[(Database, u64)]>;

/// The time of one primary.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Epoch {
    /// The process that is, or was, primary (`Litefs-Id`).
    pub incarnation: u64,
    /// Where its databases were when it became primary, as far as that was seen.
    pub start: Option<Arc<Positions>>,
    /// Where they were when it was first heard as primary: at its start, or further on. `None`: it
    /// has not said where it is.
    pub began: Option<Arc<Positions>>,
    /// What it has of the history before it: whatever else its predecessors had done is taken for
    /// lost. Where the branch that it is on is not remembered, that is more than is proven.
    pub kept: Option<Kept>,
    /// How far it was seen until the next one took over. `None`: nobody did yet, or it was not
    /// seen at all.
    pub end: Option<Arc<Positions>>,
}

impl Epoch {
    fn kept(&self, database: Database) -> Option<u64> {
        let kept = self.kept.as_ref()?;
        // A database that it did not have then began with it.
        Some(kept.iter().find(|(known, _)| *known == database).map_or(0, |(_, txid)| *txid))
    }

    fn reached(&self, database: Database) -> u64 {
        self.end.as_ref().and_then(|end| end.get(database)).map_or(0, |at| at.txid)
    }
}

/// What a new primary kept, that was here when it took over or when it was first heard after that.
/// `heard`: where the same node was when it was last heard before.
pub fn kept(before: &[Epoch], began: &Positions, heard: Option<&Positions>) -> Kept {
    let all = began.iter().map(|(database, _, position)| {
        (database, kept_of(database, before, began, position.txid, heard))
    });
    all.collect()
}

fn kept_of(
    database: Database,
    before: &[Epoch],
    began: &Positions,
    txid: u64,
    heard: Option<&Positions>,
) -> u64 {
    // Whoever came after the one that it goes on from began where that one was left.
    let mut kept = txid;
    // What it lacks for certain, whoever it goes on from: it is on nobody's branch of these.
    let (mut at_most, mut is_certain) = (txid, true);
    for (age, epoch) in before.iter().rev().enumerate() {
        match epoch.end.as_deref().and_then(|end| began.is_one_with(end, database)) {
            Some(true) if age == 0 => return txid,
            Some(true) => return kept.min(epoch.reached(database)),
            Some(false) => {}
            None => is_certain = false,
        }
        let Some(begin) = epoch.kept(database) else { break };
        kept = kept.min(begin);
        if is_certain {
            at_most = kept;
        }
    }
    // Nobody remembers its branch. It has what it was seen to follow the last one to.
    let end = before.last().and_then(|last| last.end.as_deref());
    let followed =
        heard.filter(|heard| end.and_then(|end| heard.is_one_with(end, database)) == Some(true));
    let followed = followed.and_then(|heard| heard.get(database)).map_or(0, |at| at.txid);
    at_most.max(followed).min(txid)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::topology::position::Position;

    const APP: &str = "app.db";

    fn app() -> Database {
        Database::named(APP)
    }

    /// A history, as the branch of each transaction, and what is remembered of it from `from` on.
    fn seen(process: u64, from: usize, branches: &[u64]) -> Positions {
        let mut positions = Positions::of(Some(process));
        for (place, branch) in branches.iter().enumerate().skip(from.saturating_sub(1)) {
            let txid = place as u64 + 1;
            let checksum = 1 << 63 | branch << 32 | txid;
            positions.set(APP, Position { txid, checksum }, Instant::now());
        }
        positions
    }

    fn branches(parts: &[(usize, u64)]) -> Vec<u64> {
        parts.iter().flat_map(|(count, branch)| std::iter::repeat_n(*branch, *count)).collect()
    }

    fn epoch(process: u64, kept: u64, end: &[u64]) -> Epoch {
        Epoch {
            incarnation: process,
            kept: Some([(app(), kept)].into()),
            end: Some(Arc::new(seen(process, 1, end))),
            ..Epoch::default()
        }
    }

    fn kept_by(before: &[Epoch], began: &Positions, heard: Option<&Positions>) -> u64 {
        kept(before, began, heard)[0].1
    }

    #[test]
    fn who_followed_the_last_primary_keeps_what_it_has() {
        let before = [epoch(1, 0, &branches(&[(9, 1)]))];
        for txid in [5, 9] {
            let began = seen(2, txid, &branches(&[(txid, 1)]));
            assert_eq!(kept_by(&before, &began, None), txid as u64);
        }
        // Its feed was ahead of the last primary's.
        let began = seen(2, 1, &branches(&[(11, 1)]));
        assert_eq!(kept_by(&before, &began, None), 11);
        assert_eq!(kept_by(&[], &began, None), 11, "the first that was seen");
    }

    #[test]
    fn a_tail_that_was_left_behind_keeps_nothing_of_who_came_in_between() {
        // The first had 9 transactions, the second went on from 5 to 8 or to 20, and the first
        // restarts with its 9.
        let tail = branches(&[(9, 1)]);
        let began = seen(3, 9, &tail);
        for count in [3, 15] {
            let second = branches(&[(5, 1), (count, 2)]);
            let before = [epoch(1, 0, &tail), epoch(2, 5, &second)];
            assert_eq!(kept_by(&before, &began, None), 5);
            // It is known that it strayed, even where its own past is not.
            let forgotten = Epoch { end: None, ..before[0].clone() };
            let want = if count == 3 { 9 } else { 5 };
            assert_eq!(kept_by(&[forgotten, before[1].clone()], &began, None), want);
        }
    }

    #[test]
    fn what_a_node_was_seen_to_follow_it_keeps() {
        // It followed the last primary up to 7, took over, and was first heard at 8.
        let before = [epoch(1, 2, &branches(&[(9, 1)]))];
        let began = seen(2, 8, &branches(&[(7, 1), (1, 2)]));
        assert_eq!(kept_by(&before, &began, None), 2, "nobody knows better");
        assert_eq!(kept_by(&before, &began, Some(&seen(2, 3, &branches(&[(6, 1)])))), 6);
        assert_eq!(kept_by(&before, &began, Some(&seen(2, 3, &branches(&[(6, 3)])))), 2);
    }

    #[test]
    fn databases_are_judged_one_by_one() {
        let mut end = seen(1, 1, &branches(&[(9, 1)]));
        end.set("b", Position { txid: 4, checksum: 4 }, Instant::now());
        let before = [Epoch {
            kept: Some([(app(), 3)].into()),
            end: Some(Arc::new(end)),
            ..Epoch::default()
        }];
        let mut began = seen(2, 8, &branches(&[(8, 2)]));
        began.set("b", Position { txid: 4, checksum: 4 }, Instant::now());
        let kept = kept(&before, &began, None);
        assert_eq!(*kept, [(app(), 3), (Database::named("b"), 4)]);
    }

    proptest! {
        /// Primaries that go on from any history that a node may have on its disk: nothing that the
        /// last one lacks is called kept, as long as all is heard and remembered.
        #[test]
        fn what_is_not_there_is_never_kept(
            story in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1_usize..12), 1..8),
        ) {
            let mut disks: Vec<Vec<u64>> = vec![vec![0; 3]];
            let mut lineage: Vec<Epoch> = Vec::new();
            for (n, (disk, cut, more)) in story.into_iter().enumerate() {
                let process = n as u64 + 1;
                // Who takes over has some of what somebody once had.
                let mut history = disk.get(&disks).clone();
                history.truncate(cut.index(history.len()) + 1);
                let began = seen(process, 1, &history);
                let kept = kept(&lineage, &began, None);
                if let Some(last) = disks.last().filter(|_| !lineage.is_empty()) {
                    let common = last.iter().zip(&history).take_while(|(a, b)| a == b).count();
                    let common = common as u64;
                    let kept = kept[0].1.min(last.len() as u64);
                    prop_assert!(kept <= common);
                    let follows = common == history.len() as u64 || common == last.len() as u64;
                    prop_assert!(!follows || kept == common);
                }
                history.extend(std::iter::repeat_n(process, more));
                let end = Some(Arc::new(seen(process, 1, &history)));
                let kept = Some(kept);
                lineage.push(Epoch { incarnation: process, kept, end, ..Epoch::default() });
                disks.push(history);
            }
        }
    }
}
