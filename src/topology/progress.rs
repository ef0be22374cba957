//! A node's positions, shared between the feed that writes them and everybody who decides by them.
//!
//! A growing position is no change of topology: it goes into its node's cell, read without a
//! lock, and wakes only those who wait for one. A snapshot holds the cells of its nodes.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, watch};

use super::position::{Database, Positions};

/// Acknowledged writes of a node that are remembered, so that a failover can say how many of them
/// it lost. Older ones are forgotten: what replicas lag behind is far less.
const ACKNOWLEDGED: usize = 4096;
/// How many bits of a remembered acknowledgement are the number; the rest tells the database.
const TXID_BITS: u32 = 60;

/// Rung when any node of a cluster gets on, if anybody waits.
#[derive(Debug)]
pub struct Bell {
    waiting: AtomicUsize,
    rung: watch::Sender<u64>,
}

impl Default for Bell {
    fn default() -> Self {
        Self { waiting: AtomicUsize::new(0), rung: watch::Sender::new(0) }
    }
}

impl Bell {
    /// Begins to wait. From here on nothing is missed. `None` where `most` wait already.
    pub fn listen(self: &Arc<Self>, most: usize) -> Option<Listening> {
        if self.waiting.fetch_add(1, Ordering::SeqCst) >= most {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        Some(Listening { bell: Arc::clone(self), rung: self.rung.subscribe() })
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn ring(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.rung.send_modify(|n| *n = n.wrapping_add(1));
        }
    }
}

/// Somebody who waits, until dropped.
#[derive(Debug)]
pub struct Listening {
    bell: Arc<Bell>,
    rung: watch::Receiver<u64>,
}

impl Listening {
    /// Resolves when a node got on since the last call.
    pub async fn rung(&mut self) {
        // The sender lives in the bell that this holds.
        let _ = self.rung.changed().await;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.bell.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One node's cell.
#[derive(Debug)]
pub struct Progress {
    positions: ArcSwap<Positions>,
    /// Where it was before the feed last broke.
    last: ArcSwap<Positions>,
    bell: Arc<Bell>,
    /// Exact readings asked for so far.
    asked: AtomicU64,
    ask: Notify,
    /// The readings that are answered, and the last answer.
    answered: watch::Sender<(u64, Option<Arc<Positions>>)>,
    /// When the node first spoke, and for how many milliseconds it has gone on since.
    first_heard: OnceLock<Instant>,
    heard: AtomicU64,
    /// What was acknowledged to clients last, in a ring.
    acknowledged: Box<[AtomicU64]>,
    next: AtomicUsize,
    /// Whether anything was since that was last counted.
    has_acknowledged: AtomicBool,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            positions: ArcSwap::default(),
            last: ArcSwap::default(),
            bell: Arc::default(),
            asked: AtomicU64::new(0),
            ask: Notify::new(),
            answered: watch::Sender::new((0, None)),
            first_heard: OnceLock::new(),
            heard: AtomicU64::new(0),
            acknowledged: (0..ACKNOWLEDGED).map(|_| AtomicU64::new(0)).collect(),
            next: AtomicUsize::new(0),
            has_acknowledged: AtomicBool::new(false),
        }
    }
}

impl Progress {
    /// Of a node of which nothing is known, in the cluster of this bell.
    pub fn new(bell: Arc<Bell>) -> Arc<Self> {
        Arc::new(Self { bell, ..Self::default() })
    }

    /// Where the node is, as far as is known. Empty while its feed is broken.
    pub fn get(&self) -> Guard<Arc<Positions>> {
        self.positions.load()
    }

    /// The same, to keep.
    pub fn snapshot(&self) -> Arc<Positions> {
        self.positions.load_full()
    }

    /// Where the node was when it was last heard, before the feed broke last: perhaps another
    /// process. Empty: it never broke.
    pub fn last(&self) -> Arc<Positions> {
        self.last.load_full()
    }

    /// The feed has news.
    pub fn set(&self, positions: Positions) {
        let goes_on = positions.incarnation;
        let before = self.positions.swap(Arc::new(positions));
        if before.incarnation != goes_on && !before.is_empty() {
            self.last.store(before);
        }
        self.bell.ring();
    }

    /// The node spoke.
    pub fn heard(&self, now: Instant) {
        let first = *self.first_heard.get_or_init(|| now);
        let since = now.saturating_duration_since(first).as_millis();
        // Half a billion years fit.
        self.heard.store(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long it has not spoken. `None`: it never did.
    pub fn silent(&self, now: Instant) -> Option<Duration> {
        let first = *self.first_heard.get()?;
        let last = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        Some(now.saturating_duration_since(first).saturating_sub(last))
    }

    /// Asks for a reading that begins after this call. At most one runs at a time, and everybody
    /// who asks while it runs shares the next (group commit). `None` where the node does not tell.
    pub async fn exact(&self) -> Option<Arc<Positions>> {
        let mut answered = self.answered.subscribe();
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        self.ask.notify_one();
        // The sender lives as long as `self`.
        let answer = answered.wait_for(|(covered, _)| *covered >= ticket).await.ok()?;
        answer.1.clone()
    }

    /// For the one who answers: waits until somebody asks. Returns the ticket up to which the
    /// reading that begins now will count.
    pub async fn asked(&self) -> u64 {
        loop {
            let asked = self.asked.load(Ordering::SeqCst);
            if asked > self.answered.borrow().0 {
                return asked;
            }
            self.ask.notified().await;
        }
    }

    /// Answers everybody who asked up to `ticket`.
    pub fn answer(&self, ticket: u64, positions: Option<Arc<Positions>>) {
        self.answered.send_replace((ticket, positions));
    }

    /// A client was told that its write is done, and that this is where the node was after it.
    pub fn acknowledge(&self, database: Database, txid: u64) {
        let slot = self.next.fetch_add(1, Ordering::Relaxed) % ACKNOWLEDGED;
        if let Some(slot) = self.acknowledged.get(slot) {
            let tag = u64::from(database.0) & ((1 << (u64::BITS - TXID_BITS)) - 1);
            slot.store(tag << TXID_BITS | txid, Ordering::Relaxed);
            self.has_acknowledged.store(true, Ordering::Release);
        }
    }

    /// How many of the writes acknowledged here a history lacks that has kept so many, at most.
    /// Forgets them all.
    pub fn lost(&self, kept: &[(Database, u64)]) -> u64 {
        if !self.has_acknowledged.swap(false, Ordering::Acquire) {
            // Asked for with each observation after a failover.
            return 0;
        }
        let is_lost = |entry: u64| {
            let (tag, txid) = (entry >> TXID_BITS, entry & ((1 << TXID_BITS) - 1));
            kept.iter().any(|(database, kept)| {
                u64::from(database.0) & ((1 << (u64::BITS - TXID_BITS)) - 1) == tag && txid > *kept
            })
        };
        let entries = self.acknowledged.iter().map(|slot| slot.swap(0, Ordering::Relaxed));
        entries.filter(|entry| is_lost(*entry)).count() as u64
    }

    /// The cluster's bell.
    pub fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::position::Position;

    fn cell() -> Arc<Progress> {
        Progress::new(Arc::default())
    }

    #[tokio::test]
    async fn those_who_ask_while_a_reading_runs_share_the_next() {
        let cell = cell();
        let ask = |cell: &Arc<Progress>| {
            let cell = Arc::clone(cell);
            tokio::spawn(async move { cell.exact().await.map(|p| p.incarnation) })
        };
        let first = ask(&cell);
        tokio::task::yield_now().await;
        let ticket = cell.asked().await;
        let (second, third) = (ask(&cell), ask(&cell));
        tokio::task::yield_now().await;
        cell.answer(ticket, Some(Arc::new(Positions::of(Some(1)))));
        assert_eq!(first.await.unwrap(), Some(Some(1)));
        assert!(!second.is_finished(), "its reading has to begin after it asked");
        let ticket = cell.asked().await;
        cell.answer(ticket, Some(Arc::new(Positions::of(Some(2)))));
        assert_eq!(second.await.unwrap(), Some(Some(2)));
        assert_eq!(third.await.unwrap(), Some(Some(2)));
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_and_others_cost_nothing() {
        let cell = cell();
        cell.set(Positions::of(Some(1)));
        let mut listening = cell.bell().listen(1).unwrap();
        assert!(cell.bell().listen(1).is_none(), "bounded");
        let mut positions = Positions::of(Some(1));
        positions.set("a", Position { txid: 1, checksum: 0 }, Instant::now());
        cell.set(positions);
        listening.rung().await;
        drop(listening);
        assert_eq!(cell.bell().waiting(), 0);
    }

    #[test]
    fn silence_is_counted_from_the_last_word() {
        let (cell, start) = (cell(), Instant::now());
        let second = |n| start + Duration::from_secs(n);
        assert_eq!(cell.silent(start), None, "it never spoke");
        cell.heard(start);
        cell.heard(second(3));
        assert_eq!(cell.silent(second(3)), Some(Duration::ZERO));
        assert_eq!(cell.silent(second(5)), Some(Duration::from_secs(2)));
        assert_eq!(cell.silent(second(1)), Some(Duration::ZERO), "a clock read earlier");
    }

    #[test]
    fn lost_acknowledgements_are_counted_once() {
        let cell = cell();
        let app = Database::named("app.db");
        let kept = [(app, 5)];
        (1..=9).for_each(|txid| cell.acknowledge(app, txid));
        assert_eq!(cell.lost(&kept), 4);
        assert_eq!(cell.lost(&kept), 0);
        (0..2 * ACKNOWLEDGED as u64).for_each(|txid| cell.acknowledge(app, 10 + txid));
        assert_eq!(cell.lost(&kept), ACKNOWLEDGED as u64, "bounded");
    }

    #[test]
    fn where_a_node_was_outlives_its_feed() {
        let cell = cell();
        let at = |process, txid| {
            let mut positions = Positions::of(Some(process));
            positions.set("a", Position { txid, checksum: 1 }, Instant::now());
            positions
        };
        cell.set(at(1, 5));
        cell.set(at(1, 6));
        assert!(cell.last().is_empty(), "it goes on");
        cell.set(Positions::default());
        assert_eq!(cell.last().incarnation, Some(1));
        cell.set(Positions::default());
        cell.set(at(2, 4));
        assert_eq!(cell.last().only().unwrap().1.txid, 6);
        cell.set(Positions::default());
        assert_eq!(cell.last().incarnation, Some(2));
    }
}
