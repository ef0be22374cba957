//! What the nodes are and hold: roles, databases, replication. Time is an argument.
//!
//! Replication is lazy and exact: whoever looks at the state first brings it up to `now`, so that
//! a transaction is on a replica from the instant at which its delay has passed, never earlier.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{Bug, Naming, Options, Position, Written};

/// Lines of `/events` that a reader may be behind before it is cut off.
const EVENTS: usize = 1024;
/// Transactions that a node keeps for others. Who is further behind gets a snapshot.
const RETENTION: usize = 10_000;
/// Bytes of a value that are kept; a longer one is counted but shown empty.
const VALUE: usize = 1024;
/// LiteFS's heartbeat: how old the primary's last word gets on a healthy replica.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How far back a node with [`Bug::Stale`] or [`Bug::Backwards`] shows its data.
const PAST: Duration = Duration::from_millis(300);

/// What a node knows of the lease.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Standing {
    Primary,
    Following(usize),
    /// It knows no primary.
    Alone,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) options: Options,
    /// Who holds the lease.
    pub(super) primary: Option<usize>,
    pub(super) nodes: Vec<Node>,
    /// Who ran what.
    pub(super) ledger: BTreeMap<String, Written>,
    pub(super) killed_at: Option<Instant>,
    pub(super) bug: Option<Bug>,
    /// Rung at every change of roles or lives.
    pub(super) changed: watch::Sender<u64>,
    /// Rung whenever a node's position moves.
    pub(super) moved: watch::Sender<u64>,
    /// Reads and writes of keys so far: bugs strike every so many.
    turn: u64,
    to_resurrect: Option<(usize, Arc<str>, Value)>,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) alive: bool,
    pub(super) frozen: bool,
    /// Whether nothing reaches it from the primary.
    pub(super) stalled: bool,
    pub(super) incarnation: u64,
    pub(super) naming: Naming,
    pub(super) standing: Standing,
    /// How far behind it says it is, instead of how far it is.
    pub(super) says_lag: Option<Duration>,
    /// Instead of [`Options::replication`].
    pub(super) delay: Option<Duration>,
    databases: Vec<Database>,
    /// When it looks at the lease again.
    attach_at: Instant,
    /// When the primary was last heard; `None` on a primary, and on one that was it.
    heard: Option<Instant>,
    readers: Vec<mpsc::Sender<Arc<str>>>,
}

/// One database on one node.
#[derive(Clone, Debug, Default)]
struct Database {
    position: Position,
    /// The youngest transactions, oldest first.
    log: VecDeque<Arc<Transaction>>,
    items: BTreeMap<Arc<str>, Item>,
}

#[derive(Debug)]
struct Transaction {
    position: Position,
    at: Instant,
    timestamp: SystemTime,
    key: Arc<str>,
    value: Value,
    replaces: bool,
}

#[derive(Clone, Debug)]
struct Value {
    text: Arc<str>,
    at: Instant,
    /// Written on a replica, which nobody will ever hear of ([`Bug::Local`]).
    local: bool,
}

#[derive(Clone, Debug, Default)]
struct Item {
    values: Vec<Value>,
    /// What the last replacement replaced.
    before: Option<Value>,
}

impl Database {
    /// The position after this write: a chain, so that two histories never meet again.
    fn next(&self, key: &str, text: &str) -> Position {
        let mut hasher = DefaultHasher::new();
        (self.position.checksum, self.position.txid, key, text).hash(&mut hasher);
        // LiteFS marks every checksum by its highest bit.
        let checksum = hasher.finish() | 1 << 63;
        Position { txid: self.position.txid + 1, checksum }
    }

    fn apply(&mut self, transaction: &Arc<Transaction>) {
        let item = self.items.entry(Arc::clone(&transaction.key)).or_default();
        item.values.retain(|value| !value.local);
        if transaction.replaces {
            item.before = item.values.pop();
            item.values.clear();
        }
        item.values.push(transaction.value.clone());
        self.position = transaction.position;
        self.log.push_back(Arc::clone(transaction));
        if self.log.len() > RETENTION {
            self.log.pop_front();
        }
    }

    /// The transaction that follows `position`, if it is still there; `Err` if only a snapshot
    /// can help.
    fn after(&self, position: Position) -> Result<Option<&Arc<Transaction>>, ()> {
        if position == self.position {
            return Ok(None);
        }
        let first = self.log.front().map_or(u64::MAX, |first| first.position.txid);
        let at = |txid: u64| {
            txid.checked_sub(first).and_then(|i| self.log.get(usize::try_from(i).ok()?))
        };
        let is_ours =
            position.txid == 0 || at(position.txid).is_some_and(|t| t.position == position);
        if is_ours { at(position.txid + 1).map(Some).ok_or(()) } else { Err(()) }
    }
}

impl State {
    pub(super) fn new(options: Options, now: Instant) -> Self {
        let node = |n: usize| Node {
            alive: true,
            frozen: false,
            stalled: false,
            incarnation: n as u64 + 1,
            naming: Naming::Primary,
            standing: if n == 0 { Standing::Primary } else { Standing::Following(0) },
            says_lag: None,
            delay: None,
            databases: vec![Database::default(); options.databases.len()],
            attach_at: now,
            heard: (n > 0).then_some(now),
            readers: Vec::new(),
        };
        Self {
            options,
            primary: (options.nodes > 0).then_some(0),
            nodes: (0..options.nodes).map(node).collect(),
            ledger: BTreeMap::new(),
            killed_at: None,
            bug: None,
            changed: watch::channel(0).0,
            moved: watch::channel(0).0,
            turn: 0,
            to_resurrect: None,
        }
    }

    pub(super) fn name(node: usize) -> String {
        format!("app-{node}")
    }

    pub(super) fn ring(&self) {
        self.changed.send_modify(|n| *n += 1);
        self.moved.send_modify(|n| *n += 1);
    }

    pub(super) fn is_primary(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|node| node.alive && node.standing == Standing::Primary)
    }

    // --- replication ------------------------------------------------------------------------

    /// Brings everything up to `now`.
    pub(super) fn advance(&mut self, now: Instant) {
        for n in 0..self.nodes.len() {
            let Some(node) = self.nodes.get(n) else { continue };
            if !node.alive || node.frozen {
                continue;
            }
            match node.standing {
                Standing::Primary => {}
                Standing::Alone => {
                    let there = self.primary.filter(|p| *p != n && self.is_primary(*p));
                    if let Some(primary) = there
                        && node.attach_at <= now
                    {
                        self.stand(n, Standing::Following(primary), now);
                        self.replicate(n, primary, now);
                    }
                }
                Standing::Following(primary) if !self.is_primary(primary) => {
                    self.stand(n, Standing::Alone, now);
                }
                Standing::Following(primary) => self.replicate(n, primary, now),
            }
        }
    }

    /// When `advance` has something to do again.
    pub(super) fn due(&self) -> Option<Instant> {
        let due = self.nodes.iter().filter_map(|node| match node.standing {
            _ if !node.alive || node.frozen => None,
            Standing::Primary => None,
            Standing::Alone => self.primary.map(|_| node.attach_at),
            Standing::Following(primary) => {
                let primary = self.nodes.get(primary).filter(|p| !p.frozen && !node.stalled)?;
                let delay = node.delay.unwrap_or(self.options.replication);
                let pairs = primary.databases.iter().zip(&node.databases);
                pairs.filter_map(|(p, r)| Some(p.after(r.position).ok()??.at + delay)).min()
            }
        });
        due.min()
    }

    /// Takes from the primary what has had time to arrive.
    fn replicate(&mut self, n: usize, primary: usize, now: Instant) {
        let reaches = self.nodes.get(primary).is_some_and(|primary| !primary.frozen);
        if let Some(node) = self.nodes.get_mut(n).filter(|node| reaches && !node.stalled) {
            if node.heard.is_none_or(|heard| now.duration_since(heard) >= HEARTBEAT) {
                node.heard = Some(now);
            }
            let delay = node.delay.unwrap_or(self.options.replication);
            self.take(n, primary, now, delay);
        }
    }

    /// Takes, in order, what the primary had `delay` ago.
    fn take(&mut self, n: usize, primary: usize, now: Instant, delay: Duration) {
        let Ok([node, primary]) = self.nodes.get_disjoint_mut([n, primary]) else { return };
        let mut lines = Vec::new();
        let names = self.options.databases.iter();
        for ((ours, theirs), name) in node.databases.iter_mut().zip(&primary.databases).zip(names) {
            loop {
                match theirs.after(ours.position) {
                    Ok(Some(next)) if next.at + delay <= now => {
                        ours.apply(next);
                        node.heard = Some(now);
                        lines.push(line(name, next));
                    }
                    Ok(_) => break,
                    Err(()) => {
                        // Another history, or one too far behind.
                        *ours = theirs.clone();
                        lines.extend(ours.log.back().map(|last| line(name, last)));
                        break;
                    }
                }
            }
        }
        if !lines.is_empty() {
            for line in &lines {
                node.tell(line);
            }
            self.moved.send_modify(|n| *n += 1);
        }
    }

    /// Changes what a node knows, and tells its readers.
    fn stand(&mut self, n: usize, standing: Standing, now: Instant) {
        let attach = self.options.attach;
        let Some(node) = self.nodes.get_mut(n).filter(|node| node.standing != standing) else {
            return;
        };
        match standing {
            Standing::Primary => node.heard = None,
            Standing::Following(_) => {}
            Standing::Alone => node.attach_at = now + attach,
        }
        node.standing = standing;
        let line = self.role_line(n, "primaryChange");
        if let Some(node) = self.nodes.get_mut(n) {
            node.tell(&line);
        }
        self.ring();
    }

    // --- roles ------------------------------------------------------------------------------

    /// Hands over: the old primary sends all it has, then the new one begins.
    pub(super) fn promote(&mut self, n: usize, now: Instant) {
        let old = self.primary.filter(|old| *old != n && self.is_primary(*old));
        if let Some(old) = old.filter(|old| self.nodes.get(*old).is_some_and(|old| !old.frozen)) {
            self.take(n, old, now, Duration::ZERO);
        }
        self.seize(n, now);
    }

    /// Takes the lease without asking: what the old primary had not sent is lost.
    pub(super) fn seize(&mut self, n: usize, now: Instant) {
        if let Some(old) = self.primary.filter(|old| *old != n && self.is_primary(*old)) {
            self.stand(old, Standing::Alone, now);
        }
        self.usurp(n, now);
        self.advance(now);
    }

    /// Takes the lease while the old primary goes on believing that it has it.
    pub(super) fn usurp(&mut self, n: usize, now: Instant) {
        self.primary = Some(n);
        self.killed_at = None;
        self.stand(n, Standing::Primary, now);
        self.ring();
    }

    /// A node that believes itself primary learns better.
    pub(super) fn withdraw(&mut self, n: usize, now: Instant) {
        if self.is_primary(n) {
            if self.primary == Some(n) {
                self.primary = None;
            }
            self.stand(n, Standing::Alone, now);
            self.advance(now);
        }
    }

    pub(super) fn kill(&mut self, n: usize, now: Instant) {
        if let Some(dead) = self.nodes.get_mut(n) {
            dead.alive = false;
            dead.standing = Standing::Alone;
            dead.readers.clear();
        }
        if self.primary == Some(n) {
            self.primary = None;
            self.killed_at = Some(now);
        }
        self.advance(now);
        self.ring();
    }

    pub(super) fn restart(&mut self, n: usize, now: Instant) {
        if let Some(dead) = self.nodes.get_mut(n) {
            dead.alive = true;
            dead.frozen = false;
            dead.incarnation += 100;
            dead.standing = Standing::Alone;
            dead.heard = None;
            dead.attach_at = now;
        }
        self.advance(now);
        self.ring();
    }

    pub(super) fn restart_empty(&mut self, n: usize, now: Instant) {
        if let Some(dead) = self.nodes.get_mut(n) {
            dead.databases.iter_mut().for_each(|database| *database = Database::default());
        }
        self.restart(n, now);
    }

    /// The lease has run out: the first candidate that lives takes it.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.primary.is_none() && self.killed_at.take().is_some() {
            let living = self.nodes.iter().position(|node| node.alive && !node.frozen);
            if let Some(next) = living {
                self.seize(next, now);
            }
        }
    }

    // --- what a node says of itself ----------------------------------------------------------

    /// Whom it names as the primary; empty where it knows none.
    pub(super) fn hostname(&self, n: usize) -> String {
        match self.nodes.get(n).map(|node| node.standing) {
            Some(Standing::Primary) => Self::name(n),
            Some(Standing::Following(primary)) => Self::name(primary),
            _ => String::new(),
        }
    }

    pub(super) fn lag(&self, n: usize, now: Instant) -> Duration {
        let Some(node) = self.nodes.get(n) else { return Duration::ZERO };
        let since = node.heard.map_or(Duration::ZERO, |heard| now.duration_since(heard));
        node.says_lag.unwrap_or(since)
    }

    pub(super) fn position(&self, n: usize, database: usize) -> Position {
        let node = self.nodes.get(n);
        node.and_then(|node| node.databases.get(database)).map(|db| db.position).unwrap_or_default()
    }

    /// A line of `/events` about the node's role.
    pub(super) fn role_line(&self, n: usize, kind: &str) -> Arc<str> {
        let is_primary = self.is_primary(n);
        let hostname = self.hostname(n);
        let mut data = json!({ "isPrimary": is_primary });
        if !is_primary && !hostname.is_empty() {
            data["hostname"] = hostname.into();
        }
        format!("{}\n", json!({ "type": kind, "data": data })).into()
    }

    /// A new reader of `/events`. It ends when it is [`EVENTS`] lines behind.
    pub(super) fn subscribe(&mut self, n: usize) -> mpsc::Receiver<Arc<str>> {
        let (sender, receiver) = mpsc::channel(EVENTS);
        let _ = sender.try_send(self.role_line(n, "init"));
        if let Some(node) = self.nodes.get_mut(n) {
            node.readers.push(sender);
        }
        receiver
    }

    // --- data --------------------------------------------------------------------------------

    /// Writes on a node. `None`: it is not primary, so its database is read-only.
    pub(super) fn write(&mut self, n: usize, write: &Write, now: Instant) -> Option<Position> {
        if !self.is_primary(n) && self.bug != Some(Bug::Local) {
            return None;
        }
        self.turn += 1;
        let written = self.ledger.entry(write.key.to_owned()).or_default();
        write.method.clone_into(&mut written.method);
        written.bytes = write.body.len();
        let strikes = self.turn.is_multiple_of(7);
        let times = match self.bug {
            Some(Bug::Twice) if strikes => 2,
            Some(Bug::Dropped) if strikes => 0,
            _ => 1,
        };
        written.on.extend(std::iter::repeat_n(n, times));
        let text: Arc<str> = match std::str::from_utf8(write.body) {
            Ok(text) if text.len() <= VALUE => text.into(),
            _ => "".into(),
        };
        let (key, is_primary) = (Arc::<str>::from(write.key), self.is_primary(n));
        let node = self.nodes.get_mut(n)?;
        let database = node.databases.get_mut(write.database)?;
        let value = Value { text, at: now, local: !is_primary };
        if !is_primary {
            let item = database.items.entry(key).or_default();
            if write.replaces() {
                item.values.clear();
            }
            item.values.push(value);
            return Some(database.position);
        }
        let name = self.options.databases.get(write.database).copied().unwrap_or_default();
        let mut lines = Vec::new();
        for _ in 0..times {
            let transaction = Arc::new(Transaction {
                position: database.next(&key, &value.text),
                at: now,
                timestamp: SystemTime::now(),
                key: Arc::clone(&key),
                value: value.clone(),
                replaces: write.replaces(),
            });
            database.apply(&transaction);
            lines.push(line(name, &transaction));
        }
        let (position, database) = (database.position, write.database);
        for line in &lines {
            node.tell(line);
        }
        if self.bug == Some(Bug::Resurrected) && strikes {
            let node = self.nodes.get(n)?;
            let before = node.databases.get(database)?.items.get(&key)?.before.clone();
            self.to_resurrect = before.map(|before| (database, key, before));
        }
        self.moved.send_modify(|n| *n += 1);
        Some(position)
    }

    /// What a node has under a key, oldest first.
    pub(super) fn read(
        &mut self,
        n: usize,
        database: usize,
        key: &str,
        now: Instant,
    ) -> Vec<Arc<str>> {
        self.turn += 1;
        if let Some((database, key, before)) = self.to_resurrect.take()
            && let Some(primary) = self.primary
        {
            let bug = self.bug.take();
            let body = before.text.as_bytes();
            let write = Write { database, key: &key, method: "PUT", body };
            self.write(primary, &write, now);
            self.bug = bug;
        }
        let is_replica = !self.is_primary(n);
        let until = match self.bug {
            Some(Bug::Stale) if is_replica => now.checked_sub(PAST),
            Some(Bug::Backwards) if self.turn.is_multiple_of(3) => now.checked_sub(PAST),
            _ => None,
        };
        let node = self.nodes.get(n);
        let item = node.and_then(|n| n.databases.get(database)).and_then(|db| db.items.get(key));
        let Some(item) = item else { return Vec::new() };
        let shown = |value: &&Value| until.is_none_or(|until| value.at <= until);
        let mut values: Vec<_> =
            item.values.iter().filter(shown).map(|value| Arc::clone(&value.text)).collect();
        if values.is_empty() {
            values.extend(item.before.iter().filter(shown).map(|value| Arc::clone(&value.text)));
        }
        if self.bug == Some(Bug::Invented)
            && self.turn.is_multiple_of(7)
            && let Some(last) = values.last_mut()
        {
            // A digit more: a number that nobody has drawn yet.
            *last = format!("{last}9").into();
        }
        values
    }

    /// Keys that begin so, with how many values each has.
    pub(super) fn keys(&self, n: usize, database: usize, prefix: &str) -> BTreeMap<&str, usize> {
        let items = self.nodes.get(n).and_then(|node| node.databases.get(database));
        let items = items.into_iter().flat_map(|database| &database.items);
        let found = items.filter(|(key, _)| key.starts_with(prefix));
        found.map(|(key, item)| (&**key, item.values.len())).collect()
    }
}

/// A write as the app understood it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write<'a> {
    pub(super) database: usize,
    pub(super) key: &'a str,
    pub(super) method: &'a str,
    pub(super) body: &'a [u8],
}

impl Write<'_> {
    /// PUT sets; everything else appends.
    fn replaces(&self) -> bool {
        self.method == "PUT"
    }
}

impl Node {
    /// Tells the readers of `/events`; those too far behind are cut off.
    fn tell(&mut self, line: &Arc<str>) {
        self.readers.retain(|reader| reader.try_send(Arc::clone(line)).is_ok());
    }
}

/// A line of `/events` about a transaction.
fn line(database: &str, transaction: &Transaction) -> Arc<str> {
    let data = json!({
        "txID": format!("{:016x}", transaction.position.txid),
        "postApplyChecksum": format!("{:016x}", transaction.position.checksum),
        "pageSize": 4096,
        "commit": 2,
        "timestamp": rfc3339(transaction.timestamp),
    });
    format!("{}\n", json!({ "type": "tx", "db": database, "data": data })).into()
}

/// A point in time as people write it, in UTC.
struct Date {
    year: u64,
    /// From 1.
    month: u64,
    day: u64,
    /// From 0, a Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
    millis: u32,
}

impl Date {
    fn of(at: SystemTime) -> Self {
        let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        // 1970 began with a Thursday.
        let weekday = (days + 4) % 7;
        // Days since 1970 to a date, by eras of 400 years that begin on a 1 March.
        let days = days + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + u64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        Self { year, month, day, weekday, hour, minute, second, millis: since.subsec_millis() }
    }
}

/// With milliseconds, as in `/events`.
fn rfc3339(at: SystemTime) -> String {
    let Date { year, month, day, hour, minute, second, millis, .. } = Date::of(at);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// As in a cookie's `Expires`.
pub(super) fn http_date(at: SystemTime) -> String {
    let Date { year, month, day, weekday, hour, minute, second, .. } = Date::of(at);
    let part = |names: &'static str, n: u64| {
        let start = usize::try_from(n).unwrap_or(0) * 3;
        names.get(start..start + 3).unwrap_or_default()
    };
    let weekday = part("SunMonTueWedThuFriSat", weekday);
    let month = part("JanFebMarAprMayJunJulAugSepOctNovDec", month.saturating_sub(1));
    format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(10);

    fn cluster(now: Instant) -> State {
        State::new(Options { replication: DELAY, ..Options::default() }, now)
    }

    fn put(state: &mut State, node: usize, key: &str, now: Instant) -> Option<Position> {
        state.advance(now);
        state.write(node, &Write { database: 0, key, method: "POST", body: b"x" }, now)
    }

    #[test]
    fn a_transaction_is_on_a_replica_when_its_delay_has_passed() {
        let now = Instant::now();
        let mut state = cluster(now);
        let position = put(&mut state, 0, "a", now).expect("0 is primary");
        assert_eq!(put(&mut state, 1, "b", now), None, "a replica is read-only");
        state.advance(now + DELAY - Duration::from_nanos(1));
        assert_eq!(state.position(1, 0), Position::default());
        assert_eq!(state.due(), Some(now + DELAY));
        state.advance(now + DELAY);
        assert_eq!((state.position(1, 0), state.position(2, 0)), (position, position));
        assert_eq!(state.read(1, 0, "a", now), ["x".into()]);
        assert_eq!(state.due(), None);
    }

    #[test]
    fn what_was_not_replicated_is_lost_with_the_primary_and_its_numbers_are_used_again() {
        let now = Instant::now();
        let mut state = cluster(now);
        put(&mut state, 0, "kept", now);
        let later = now + DELAY;
        let lost = put(&mut state, 0, "lost", later).expect("0 is primary");
        state.kill(0, later);
        state.seize(1, later);
        assert_eq!(state.position(1, 0).txid, 1);
        let other = put(&mut state, 1, "other", later).expect("1 is primary");
        assert_eq!(lost.txid, other.txid);
        assert_ne!(lost.checksum, other.checksum);
        // The old primary comes back, and is re-snapshotted.
        state.restart(0, later + DELAY);
        assert_eq!(state.position(0, 0), other);
        assert_eq!(state.read(0, 0, "lost", later), Vec::<Arc<str>>::new());
        assert_eq!(state.read(0, 0, "other", later).len(), 1);
    }

    #[test]
    fn a_hand_over_loses_nothing() {
        let now = Instant::now();
        let mut state = cluster(now);
        let position = put(&mut state, 0, "a", now).expect("0 is primary");
        state.promote(2, now);
        assert_eq!(state.position(2, 0), position);
        assert!(put(&mut state, 2, "b", now).is_some());
        assert_eq!(put(&mut state, 0, "c", now), None);
        state.advance(now + DELAY);
        assert_eq!(state.position(0, 0), state.position(2, 0));
        assert_eq!(state.position(1, 0), state.position(2, 0));
    }

    #[test]
    fn replicas_stay_with_an_old_primary_that_does_not_know_better() {
        let now = Instant::now();
        let mut state = cluster(now);
        state.usurp(2, now);
        assert!(state.is_primary(0) && state.is_primary(2));
        put(&mut state, 0, "old", now);
        put(&mut state, 2, "new", now);
        state.advance(now + DELAY);
        assert_eq!(state.position(1, 0), state.position(0, 0));
        state.withdraw(0, now + DELAY);
        state.advance(now + DELAY * 2);
        assert_eq!(state.position(0, 0), state.position(2, 0));
        assert_eq!(state.position(1, 0), state.position(2, 0));
        assert!(state.read(1, 0, "old", now + DELAY * 2).is_empty());
    }

    #[test]
    fn lag_grows_while_there_is_no_primary_but_not_on_one_that_was_it() {
        let now = Instant::now();
        let mut state = cluster(now);
        state.withdraw(0, now);
        let later = now + Duration::from_secs(7);
        state.advance(later);
        assert_eq!(state.lag(0, later), Duration::ZERO);
        assert_eq!(state.lag(1, later), Duration::from_secs(7));
    }

    #[test]
    fn a_reader_of_events_that_is_too_far_behind_is_cut_off() {
        let now = Instant::now();
        let mut state = cluster(now);
        let mut reader = state.subscribe(0);
        for n in 0..2000 {
            put(&mut state, 0, &n.to_string(), now);
        }
        let mut lines = 0;
        while reader.try_recv().is_ok() {
            lines += 1;
        }
        assert_eq!(lines, EVENTS);
        assert!(reader.is_closed());
    }

    #[test]
    fn a_replica_that_was_away_too_long_gets_a_snapshot() {
        let now = Instant::now();
        let mut state = cluster(now);
        state.nodes[1].stalled = true;
        for n in 0..=RETENTION {
            put(&mut state, 0, &format!("{}", n % 10), now);
        }
        state.advance(now + DELAY);
        assert_eq!(state.position(1, 0).txid, 0);
        state.nodes[1].stalled = false;
        state.advance(now + DELAY);
        assert_eq!(state.position(1, 0), state.position(0, 0));
    }

    #[test]
    fn points_in_time_are_written_as_litefs_does() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_millis(seconds);
        assert_eq!(rfc3339(at(0)), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(at(951_826_154_007)), "2000-02-29T12:09:14.007Z");
        assert_eq!(rfc3339(at(1_798_675_199_999)), "2026-12-30T23:59:59.999Z");
        // The example of RFC 9110, section 5.6.7.
        assert_eq!(http_date(at(784_111_777_000)), "Sun, 06 Nov 1994 08:49:37 GMT");
    }
}
