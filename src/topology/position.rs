//! How far a node's databases are.
//!
//! LiteFS numbers the transactions of each database (TXID) and keeps a checksum of the whole
//! database after each one. A number alone is ambiguous after a failover that lost transactions:
//! the next primary uses it again for something else (`reference/litefs.md` section 5). So the
//! checksums of the last [`RECENT`] transactions are kept, and a position counts as reached only
//! where the history contains that very transaction, or where the node is seen to be on the
//! primary's branch.
//!
//! Pure: the caller brings the time.

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use smallvec::SmallVec;

/// Databases of one node that are followed, in the order of their names. More are ignored.
pub const DATABASES: usize = 16;
/// Transactions of a database whose checksums are remembered.
pub const RECENT: usize = 128;

/// A database by the hash of its name (FNV-1a): what a token has room for.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Database(pub u32);

impl Database {
    /// The database of this name.
    pub fn named(name: &str) -> Self {
        Self(
            name.bytes()
                .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)),
        )
    }
}

/// A point in a database's history: an LTX position.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Position {
    /// The number of the last transaction.
    pub txid: u64,
    /// Of the database after it. Zero: not known (LiteFS sets the highest bit in every real one).
    pub checksum: u64,
}

impl Position {
    /// Reads a number as LiteFS writes it: exactly 16 hexadecimal digits.
    pub fn parse_hex(text: &[u8]) -> Option<u64> {
        let digits: &[u8; 16] = text.try_into().ok()?;
        digits.iter().try_fold(0, |number, digit| {
            Some(number << 4 | u64::from(char::from(*digit).to_digit(16)?))
        })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}/{:016x}", self.txid, self.checksum)
    }
}

/// Whether a node's history contains a position.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Reach {
    /// It does.
    #[default]
    Reached,
    /// The node is not there yet.
    NotYet,
    /// The node is past it, and how it got there was not seen or is forgotten: it may be another
    /// branch.
    Unknown,
    /// The node is past it on another branch: it never will be there.
    Diverged,
}

impl Reach {
    /// What holds of a node if both hold of its databases.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Diverged, _) | (_, Self::Diverged) => Self::Diverged,
            (Self::NotYet, _) | (_, Self::NotYet) => Self::NotYet,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            (Self::Reached, Self::Reached) => Self::Reached,
        }
    }
}

/// One database of one node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Track {
    name: Arc<str>,
    position: Position,
    /// From here on every transaction was seen: the first reading, or a snapshot.
    origin: u64,
    /// Checksum and time of arrival of consecutive transactions, the last one at the back.
    recent: VecDeque<(u64, Instant)>,
}

impl Track {
    fn new(name: Arc<str>, position: Position, at: Instant) -> Self {
        let recent = VecDeque::from([(position.checksum, at)]);
        Self { name, position, origin: position.txid, recent }
    }

    /// The next transaction, or, after a snapshot, another history.
    fn advance(&mut self, position: Position, at: Instant) {
        if position == self.position {
            return;
        }
        if position.txid != self.position.txid.wrapping_add(1) {
            self.recent.clear();
            self.origin = position.txid;
        } else if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((position.checksum, at));
        self.position = position;
    }

    /// What is remembered of a transaction, if it is one of the last ones.
    fn remembered(&self, txid: u64) -> Option<(u64, Instant)> {
        let back = usize::try_from(self.position.txid.checked_sub(txid)?).ok()?;
        let place = self.recent.len().checked_sub(back + 1)?;
        self.recent.get(place).copied()
    }

    fn reach(&self, needed: Position) -> Reach {
        if self.position.txid < needed.txid {
            return Reach::NotYet;
        }
        if needed.checksum == 0 {
            // A number that may be any branch's.
            return Reach::Unknown;
        }
        match self.remembered(needed.txid) {
            Some((known, _)) if known != 0 && known != needed.checksum => Reach::Diverged,
            Some(_) => Reach::Reached,
            None => Reach::Unknown,
        }
    }
}

/// How far a node is behind another.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Behind {
    /// Transactions that it has not applied.
    pub transactions: u64,
    /// Since when the first of them is known.
    pub time: Duration,
}

/// Where all databases of one node are.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Positions {
    /// The process that this is known of (`Litefs-Id`).
    pub incarnation: Option<u64>,
    /// Whether it says that it is primary, in the order of its own news: a snapshot of the
    /// topology may be a moment behind. `None`: it has not said.
    pub is_primary: Option<bool>,
    tracks: SmallVec<[(Database, Track); 1]>,
}

impl Positions {
    /// Nothing is known of this process yet.
    pub fn of(incarnation: Option<u64>) -> Self {
        Self { incarnation, is_primary: None, tracks: SmallVec::new() }
    }

    /// The database `name` is at `position` since `at`. Over [`DATABASES`] a new one is ignored.
    pub fn set(&mut self, name: &str, position: Position, at: Instant) {
        let database = Database::named(name);
        let is_full = self.tracks.len() >= DATABASES;
        match self.tracks.iter_mut().find(|(known, _)| *known == database) {
            Some((_, track)) => track.advance(position, at),
            None if !is_full => {
                self.tracks.push((database, Track::new(name.into(), position, at)));
            }
            None => {}
        }
    }

    /// Where a database is.
    pub fn get(&self, database: Database) -> Option<Position> {
        self.track(database).map(|track| track.position)
    }

    fn track(&self, database: Database) -> Option<&Track> {
        self.tracks.iter().find(|(known, _)| *known == database).map(|(_, track)| track)
    }

    /// All databases.
    pub fn iter(&self) -> impl Iterator<Item = (Database, &str, Position)> {
        self.tracks.iter().map(|(database, track)| (*database, &*track.name, track.position))
    }

    /// The only database, if there is exactly one.
    pub fn only(&self) -> Option<(Database, Position)> {
        match &self.tracks[..] {
            [(database, track)] => Some((*database, track.position)),
            _ => None,
        }
    }

    /// Whether no database is known.
    pub fn is_empty(&self) -> bool {
        self.tracks.is_empty()
    }

    /// The checksum after a transaction, where it is remembered.
    pub fn checksum(&self, database: Database, txid: u64) -> Option<u64> {
        self.track(database)?.remembered(txid).map(|(checksum, _)| checksum)
    }

    /// Whether the history of `database` contains `needed`.
    pub fn reach(&self, database: Database, needed: Position) -> Reach {
        self.track(database).map_or(Reach::NotYet, |track| track.reach(needed))
    }

    /// Whether this node was seen to pass all of `needed`, though it may be another branch.
    pub fn has_passed(&self, needed: &[(Database, Position)]) -> bool {
        needed.iter().all(|(database, needed)| {
            let track = self.track(*database).filter(|_| needed.checksum != 0);
            track.is_some_and(|track| (track.origin..=track.position.txid).contains(&needed.txid))
        })
    }

    /// Whether this node may be on its way to where the primary is: nothing speaks against it, and
    /// it is not ahead.
    pub fn may_follow(&self, primary: &Self) -> bool {
        self.iter().all(|(database, _, ours)| {
            let theirs = primary.get(database).unwrap_or_default();
            ours.txid <= theirs.txid && self.is_one_with(primary, database) != Some(false)
        })
    }

    /// Whether all of `needed` is in this history, by the checksums. `None`: not remembered.
    pub fn contains(&self, needed: &[(Database, Position)]) -> Option<bool> {
        let mut all = Some(true);
        for (database, needed) in needed {
            match self.checksum(*database, needed.txid) {
                Some(known) if known == needed.checksum && known != 0 => {}
                Some(known) if known != 0 && needed.checksum != 0 => return Some(false),
                _ => all = None,
            }
        }
        all
    }

    /// Whether one history of `database` is the beginning of the other, by the checksum at the
    /// shorter one's end. `None`: not remembered.
    pub fn is_one_with(&self, other: &Self, database: Database) -> Option<bool> {
        let txid = self.get(database)?.txid.min(other.get(database)?.txid);
        let (ours, theirs) = (self.checksum(database, txid)?, other.checksum(database, txid)?);
        (ours != 0 && theirs != 0).then_some(ours == theirs)
    }

    /// Whether this node's history is the beginning of the primary's, as far as both are
    /// remembered.
    pub fn is_on_branch_of(&self, primary: &Self) -> bool {
        self.tracks.iter().all(|(database, track)| {
            let ours = track.position;
            let theirs = primary.get(*database).unwrap_or_default();
            match primary.checksum(*database, ours.txid) {
                Some(checksum) => checksum == ours.checksum,
                // Its feed may be a moment ahead of the primary's.
                None => self.checksum(*database, theirs.txid) == Some(theirs.checksum),
            }
        })
    }

    /// How far this node is behind `primary`. A database that it does not have counts from its
    /// first transaction that is remembered.
    pub fn behind(&self, primary: &Self, now: Instant) -> Behind {
        let mut behind = Behind::default();
        for (database, theirs) in &primary.tracks {
            let ours = self.get(*database).map_or(0, |position| position.txid);
            let Some(missing @ 1..) = theirs.position.txid.checked_sub(ours) else { continue };
            let first = theirs.remembered(ours + 1).or_else(|| theirs.recent.front().copied());
            let since = first.map_or(now, |(_, at)| at);
            behind.transactions = behind.transactions.max(missing);
            behind.time = behind.time.max(now.saturating_duration_since(since));
        }
        behind
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const APP: &str = "app.db";

    fn at(txid: u64, branch: u64) -> Position {
        Position { txid, checksum: 1 << 63 | branch << 32 | txid }
    }

    fn app() -> Database {
        Database::named(APP)
    }

    /// `from..=to` on a branch.
    fn history(from: u64, to: u64, branch: u64) -> Positions {
        let mut positions = Positions::of(Some(1));
        (from..=to).for_each(|txid| positions.set(APP, at(txid, branch), Instant::now()));
        positions
    }

    #[test]
    fn numbers_are_sixteen_digits() {
        assert_eq!(Position::parse_hex(b"00000000000000ff"), Some(255));
        assert_eq!(Position::parse_hex(b"00000000000000FF"), Some(255));
        for wrong in
            [&b""[..], b"ff", b"000000000000000ff", b"+0000000000000ff", b"0000000000000 f"]
        {
            assert_eq!(Position::parse_hex(wrong), None);
        }
    }

    #[test]
    fn a_number_used_again_by_another_branch_is_not_reached() {
        let new = history(5, 9, 2);
        assert_eq!(new.reach(app(), at(9, 1)), Reach::Diverged);
        assert_eq!(new.reach(app(), at(7, 1)), Reach::Diverged);
        assert_eq!(new.reach(app(), at(7, 2)), Reach::Reached);
        assert_eq!(new.reach(app(), at(10, 1)), Reach::NotYet);
        assert_eq!(new.reach(app(), Position { txid: 7, checksum: 0 }), Reach::Unknown);
    }

    #[test]
    fn a_snapshot_may_go_back() {
        let mut positions = history(1, 9, 1);
        positions.set(APP, at(5, 2), Instant::now());
        assert_eq!(positions.get(app()), Some(at(5, 2)));
        assert_eq!(positions.reach(app(), at(9, 1)), Reach::NotYet);
        assert_eq!(positions.reach(app(), at(5, 1)), Reach::Diverged);
        assert_eq!(positions.reach(app(), at(4, 1)), Reach::Unknown, "nobody saw how it got there");
    }

    #[test]
    fn who_follows_the_primary_is_told_from_who_does_not() {
        let (primary, other) = (history(1, 200, 1), history(150, 170, 2));
        assert!(history(190, 198, 1).is_on_branch_of(&primary));
        assert!(history(195, 205, 1).is_on_branch_of(&primary), "a feed may be ahead");
        assert!(!other.is_on_branch_of(&primary));
        assert!(!history(20, 30, 1).is_on_branch_of(&primary), "too far behind to tell");
        assert!(!history(300, 310, 1).is_on_branch_of(&primary), "too far ahead to tell");
    }

    #[test]
    fn checksums_tell_what_a_history_contains() {
        let positions = history(5, 9, 1);
        let contains = |needed: &[Position]| {
            let needed: Vec<_> = needed.iter().map(|needed| (app(), *needed)).collect();
            positions.contains(&needed)
        };
        assert_eq!(contains(&[at(9, 1)]), Some(true));
        assert_eq!(contains(&[at(9, 2)]), Some(false));
        assert_eq!(contains(&[at(10, 1)]), None);
        assert_eq!(contains(&[at(10, 1), at(9, 2)]), Some(false));
        assert_eq!(contains(&[at(9, 1), at(4, 1)]), None);
        assert_eq!(contains(&[Position { txid: 9, checksum: 0 }]), None);
        assert_eq!(contains(&[]), Some(true));
    }

    #[test]
    fn histories_are_one_as_far_as_the_shorter_goes() {
        let old = history(1, 9, 1);
        assert_eq!(history(7, 7, 1).is_one_with(&old, app()), Some(true));
        assert_eq!(history(7, 12, 1).is_one_with(&old, app()), Some(true));
        assert_eq!(history(7, 7, 2).is_one_with(&old, app()), Some(false));
        assert_eq!(history(12, 12, 1).is_one_with(&old, app()), None, "too far ahead to tell");
        assert_eq!(history(1, 3, 1).is_one_with(&history(1, 200, 1), app()), None, "forgotten");
        assert_eq!(old.is_one_with(&Positions::default(), app()), None);
    }

    #[test]
    fn behind_is_counted_from_the_first_transaction_that_is_missing() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let mut primary = Positions::default();
        (1..=5).for_each(|n| primary.set(APP, at(n, 1), second(n)));
        let mut replica = Positions::default();
        replica.set(APP, at(3, 1), second(3));
        let behind = replica.behind(&primary, second(10));
        assert_eq!(behind, Behind { transactions: 2, time: Duration::from_secs(6) });
        assert_eq!(primary.behind(&primary, second(10)), Behind::default());
        assert_eq!(Positions::default().behind(&primary, second(10)).transactions, 5);
    }

    #[test]
    fn databases_are_bounded() {
        let mut positions = Positions::default();
        (0..100).for_each(|n| positions.set(&format!("{n}.db"), at(1, 1), Instant::now()));
        assert_eq!(positions.iter().count(), DATABASES);
    }

    proptest! {
        #[test]
        fn whatever_happened_is_reached_and_whatever_did_not_is_not(
            from in 1_u64..1000, length in 0_u64..300, asked in 0_u64..1500,
        ) {
            let positions = history(from, from + length, 7);
            let reach = positions.reach(app(), at(asked, 7));
            let is_remembered = asked <= from + length && asked >= from.max((from + length + 1).saturating_sub(RECENT as u64));
            let want = match asked {
                asked if asked > from + length => Reach::NotYet,
                _ if is_remembered => Reach::Reached,
                _ => Reach::Unknown,
            };
            prop_assert_eq!(reach, want);
            let other = positions.reach(app(), at(asked, 8));
            prop_assert_eq!(other == Reach::Diverged, is_remembered);
            let has_passed = positions.has_passed(&[(app(), at(asked, 7))]);
            prop_assert_eq!(has_passed, (from..=from + length).contains(&asked));
        }
    }
}
