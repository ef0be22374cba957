//! Judges a history. Pure: no clock, no socket; an event in, and the verdict grows.
//!
//! What must hold, and what each breach is called:
//!
//! | kind | breach |
//! |---|---|
//! | lost | an acknowledged write is not there at the last look at its list; or a register ends with less than the last acknowledged value |
//! | repeated | a list holds one value twice |
//! | stale | a client's read does not show its own acknowledged write, nor anything newer |
//! | non-monotonic | a client's read does not show what an earlier read of the same client showed |
//! | phantom | a read shows a value that nobody had sent yet, or that was sent to another key |
//! | empty | success for a write with an empty body |
//! | leaked | a `fly-replay` header at a client |
//! | contradicted | a write is there, and its client had been told that it did not run |
//!
//! Writes whose end is unknown may be there once, or not at all, or come later. A client that is
//! told of lost writes (`Litegate-Write-Lost`) starts anew: what it saw before does not bind its
//! reads any more, and those writes of its own that turn out lost are counted as announced, which
//! is no breach. Nor is it one that others, whom nobody told, had seen them.
//!
//! Each value that a client misses in a list is one breach, however often it is missed.
//!
//! Memory: about a hundred bytes for each write; what clients must see only for keys that are still
//! read ([`Event::Closed`]); the last [`STEPS`] operations, for traces; [`MORE`] breaches in full.
//! The driver ends a run at [`super::WRITES`] writes.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::history::{End, Event, Key, Kind, Operation, Outcome, Value};

/// Operations that are remembered for traces.
pub const STEPS: usize = 4096;
/// Breaches that are kept in full; the others are counted.
pub const MORE: usize = 32;
/// The longest trace.
const TRACE: usize = 24;
/// Different errors and nodes that are counted by name; the rest together.
const NAMES: usize = 64;

/// What a breach is called.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Breach {
    /// An acknowledged write is nowhere.
    Lost,
    /// A write ran twice.
    Repeated,
    /// A client does not see its own acknowledged write.
    Stale,
    /// A client sees less than it has seen.
    NonMonotonic,
    /// A value that nobody wrote.
    Phantom,
    /// Success with nothing in it.
    Empty,
    /// `fly-replay` at a client.
    Leaked,
    /// It ran though it was said not to have run.
    Contradicted,
}

impl Breach {
    /// All, in the order of reports.
    pub const ALL: [Self; 8] = [
        Self::Lost,
        Self::Repeated,
        Self::Stale,
        Self::NonMonotonic,
        Self::Phantom,
        Self::Empty,
        Self::Leaked,
        Self::Contradicted,
    ];

    /// Its name in reports and options.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Repeated => "repeated",
            Self::Stale => "stale",
            Self::NonMonotonic => "non-monotonic",
            Self::Phantom => "phantom",
            Self::Empty => "empty",
            Self::Leaked => "leaked",
            Self::Contradicted => "contradicted",
        }
    }

    /// What it means, after a number.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Lost => "acknowledged and not there at the end",
            Self::Repeated => "executed twice",
            Self::Stale => "own acknowledged write not seen",
            Self::NonMonotonic => "seen by a client and then not seen any more",
            Self::Phantom => "never written, and there",
            Self::Empty => "success with an empty body for a write",
            Self::Leaked => "`fly-replay` at a client",
            Self::Contradicted => "there, and reported as not committed",
        }
    }
}

/// A whole operation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// When it began, since the start of the run.
    pub began: Duration,
    /// When it ended.
    pub ended: Duration,
    /// Who.
    pub client: u32,
    /// What.
    pub operation: Operation,
    /// How it ended.
    pub end: End,
}

/// One breach.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    /// Which promise.
    pub breach: Breach,
    /// When it was found, since the start of the run.
    pub at: Duration,
    /// Whose write, or whose read.
    pub client: u32,
    /// Of which key.
    pub key: Key,
    /// Which value, if it is about one.
    pub value: Option<Value>,
    /// In words.
    pub text: String,
    /// What happened to this key, and by this client, before.
    pub trace: Vec<Step>,
}

/// Numbers of a run.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Writes sent.
    pub writes: u64,
    /// Writes answered with success.
    pub acknowledged: u64,
    /// Writes whose end is unknown.
    pub ambiguous: u64,
    /// Of those, the ones that turned out to be there.
    pub ambiguous_there: u64,
    /// Writes of which somebody vouched that they did not run.
    pub denied: u64,
    /// Reads answered.
    pub reads: u64,
    /// Reads not answered, or with an error.
    pub failed_reads: u64,
    /// Answers that told a client of lost writes (`Litegate-Write-Lost`).
    pub announcements: u64,
    /// Acknowledged writes that are gone, and whose client was told so.
    pub lost_announced: u64,
    /// Reads of others that had shown such a write, and then did not any more.
    pub lost_announced_seen: u64,
    /// The longest that a write took.
    pub longest_write: Duration,
    /// The longest that a read took.
    pub longest_read: Duration,
    /// Errors by what they said.
    pub errors: BTreeMap<Arc<str>, u64>,
    /// Answers by node.
    pub nodes: BTreeMap<Arc<str>, u64>,
}

/// What came out.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verdict {
    /// How much was done.
    pub counts: Counts,
    /// How often each promise was broken.
    pub breaches: BTreeMap<Breach, u64>,
    /// The first violation, with its trace, and some of the others.
    pub violations: Vec<Violation>,
    /// Keys that were written and could not be read at the end.
    pub unread: u64,
}

impl Verdict {
    /// How often this promise was broken.
    pub fn count(&self, breach: Breach) -> u64 {
        self.breaches.get(&breach).copied().unwrap_or(0)
    }

    /// Whether no promise was broken but those in `allowed`.
    pub fn is_kept(&self, allowed: &[Breach]) -> bool {
        self.breaches.keys().all(|breach| allowed.contains(breach))
    }
}

/// Judges a whole history.
pub fn judge<'a>(history: impl IntoIterator<Item = &'a Event>) -> Verdict {
    let mut judge = Judge::default();
    history.into_iter().for_each(|event| judge.observe(event));
    judge.finish()
}

/// What is known of a write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Known {
    /// Sent, or of unknown end. What was said with success and nothing else is no acknowledgement.
    Maybe,
    Acknowledged {
        at: Duration,
    },
    Denied,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    known: Known,
    /// Found to be there twice, or against what was said: told once.
    told: bool,
}

/// Why a client must see something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Because {
    /// It has written it.
    Own,
    /// It has read it.
    Seen,
}

#[derive(Debug, Default)]
struct Book {
    writes: BTreeMap<Value, Written>,
    /// What each client must see: of a list every entry; of a register nothing below its own
    /// greatest write, nor below the greatest that it has read.
    bound: BTreeMap<u32, BTreeMap<Value, Because>>,
    is_read: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Client {
    doing: Option<(Duration, Operation)>,
    /// When it was last told of lost writes.
    told_lost: Option<Duration>,
}

/// A history that is being judged.
#[derive(Debug, Default)]
pub struct Judge {
    verdict: Verdict,
    books: BTreeMap<Key, Book>,
    clients: BTreeMap<u32, Client>,
    steps: VecDeque<Step>,
    /// How often a value was missed by clients that had seen it.
    missed: BTreeMap<Value, u64>,
}

impl Judge {
    /// Takes the next event.
    pub fn observe(&mut self, event: &Event) {
        match event {
            Event::Began { at, client, operation } => {
                self.clients.entry(*client).or_default().doing = Some((*at, *operation));
                if let Operation::Write(key, value) = *operation {
                    self.verdict.counts.writes += 1;
                    let written = Written { known: Known::Maybe, told: false };
                    self.books.entry(key).or_default().writes.insert(value, written);
                }
            }
            Event::Ended { at, client, end } => self.ended(*at, *client, end),
            Event::Closed { key } => {
                if let Some(book) = self.books.get_mut(key) {
                    book.bound.clear();
                }
            }
            Event::Last { at, key, values } => self.last(*at, *key, values),
        }
    }

    /// The numbers so far.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Whether everything that must be in this key at the end is in `values`.
    pub fn is_complete(&self, key: Key, values: &[Value]) -> bool {
        let Some(book) = self.books.get(&key) else { return true };
        match key.kind {
            Kind::List => {
                let values: BTreeSet<_> = values.iter().collect();
                book.acknowledged().all(|(value, _)| values.contains(&value))
            }
            Kind::Register => {
                let wanted = book.acknowledged().map(|(value, _)| value.number).max();
                wanted <= values.first().map(|value| value.number)
            }
        }
    }

    /// All keys that were written.
    pub fn keys(&self) -> Vec<Key> {
        self.books.keys().copied().collect()
    }

    /// The verdict.
    pub fn finish(mut self) -> Verdict {
        let unread = self.books.values().filter(|book| !book.is_read && !book.writes.is_empty());
        self.verdict.unread = unread.count() as u64;
        self.verdict
    }

    fn ended(&mut self, at: Duration, client: u32, end: &End) {
        let known = self.clients.entry(client).or_default();
        let Some((began, operation)) = known.doing.take() else { return };
        if end.told_lost {
            known.told_lost = Some(at);
            self.verdict.counts.announcements += 1;
            for book in self.books.values_mut() {
                book.bound.remove(&client);
            }
        }
        if self.steps.len() == STEPS {
            self.steps.pop_front();
        }
        self.steps.push_back(Step { began, ended: at, client, operation, end: end.clone() });
        self.count(at.saturating_sub(began), operation, end);

        let key = operation.key();
        if end.leaked {
            let text = "the answer carries `fly-replay`, which is for proxies only".to_owned();
            let value = match operation {
                Operation::Write(_, value) => Some(value),
                Operation::Read(_) => None,
            };
            self.violated(Breach::Leaked, at, client, key, value, text);
        }
        match (operation, &end.outcome) {
            (Operation::Write(key, value), Outcome::Acknowledged) => {
                let book = self.books.entry(key).or_default();
                book.know(value, Known::Acknowledged { at });
                book.bind(key.kind, client, value, Because::Own);
            }
            (Operation::Write(key, value), Outcome::Denied(_)) => {
                self.books.entry(key).or_default().know(value, Known::Denied);
            }
            (Operation::Write(key, value), Outcome::Empty) => {
                let text = format!("the write of {value} was answered with success and no body");
                self.violated(Breach::Empty, at, client, key, Some(value), text);
            }
            (Operation::Read(key), Outcome::Values(values)) => self.read(at, client, key, values),
            _ => {}
        }
    }

    fn count(&mut self, took: Duration, operation: Operation, end: &End) {
        let counts = &mut self.verdict.counts;
        let longest = match operation {
            Operation::Write(..) => &mut counts.longest_write,
            Operation::Read(_) => &mut counts.longest_read,
        };
        *longest = took.max(*longest);
        let error = match &end.outcome {
            Outcome::Acknowledged => {
                counts.acknowledged += 1;
                None
            }
            Outcome::Empty => {
                counts.ambiguous += 1;
                None
            }
            Outcome::Ambiguous(why) => {
                counts.ambiguous += 1;
                Some(("write", why))
            }
            Outcome::Denied(why) => {
                counts.denied += 1;
                Some(("write", why))
            }
            Outcome::Values(_) => {
                counts.reads += 1;
                None
            }
            Outcome::Failed(why) => {
                counts.failed_reads += 1;
                Some(("read", why))
            }
        };
        if let Some((what, why)) = error {
            add(&mut counts.errors, &format!("{what}: {why}"));
        }
        if let Some(node) = &end.node {
            add(&mut counts.nodes, node);
        }
    }

    /// What holds for every look at a key, also the last.
    fn looked(&mut self, at: Duration, client: u32, key: Key, values: &[Value]) {
        let mut seen = BTreeSet::new();
        for value in values {
            let again = !seen.insert(*value);
            let book = self.books.entry(key).or_default();
            let found = book.writes.get_mut(value);
            let (breach, text) = match found {
                None => (Breach::Phantom, format!("{value} is in {key}, where nobody sent it")),
                Some(written) if written.told => continue,
                Some(written) if again && key.kind == Kind::List => {
                    written.told = true;
                    (Breach::Repeated, format!("{value} is in {key} more than once"))
                }
                Some(written) if written.known == Known::Denied => {
                    written.told = true;
                    let text = format!("{value} is in {key}, and was said not to be committed");
                    (Breach::Contradicted, text)
                }
                Some(_) => continue,
            };
            self.violated(breach, at, client, key, Some(*value), text);
        }
    }

    fn read(&mut self, at: Duration, client: u32, key: Key, values: &[Value]) {
        self.looked(at, client, key, values);
        let Some(book) = self.books.get_mut(&key) else { return };
        let missed: Vec<(Value, Because)> = match key.kind {
            Kind::List => {
                let seen: BTreeSet<_> = values.iter().copied().collect();
                let bound = book.bound.entry(client).or_default();
                let missed: Vec<_> =
                    bound.extract_if(.., |value, _| !seen.contains(value)).collect();
                for value in seen.into_iter().filter(|value| book.writes.contains_key(value)) {
                    bound.entry(value).or_insert(Because::Seen);
                }
                missed
            }
            Kind::Register => {
                // A register shows one value. One that nobody sent says nothing about time.
                let seen = values.first().copied();
                if seen.is_some_and(|value| !book.writes.contains_key(&value)) {
                    return;
                }
                let bound = book.bound.entry(client).or_default();
                let number = seen.map(|value| value.number);
                // The client's own write comes before what it has only read, in this order and as a
                // promise: whoever allows the lesser breach must still hear of the greater one.
                let mut bound = bound.iter().map(|(value, why)| (*value, *why));
                let missed = bound.find(|(value, _)| Some(value.number) > number);
                if let (None, Some(value)) = (missed, seen) {
                    book.bind(key.kind, client, value, Because::Seen);
                }
                missed.into_iter().collect()
            }
        };
        for (value, because) in missed {
            let shows = match (key.kind, values.first()) {
                (Kind::Register, Some(now)) => format!(" and shows {now}"),
                (Kind::Register, None) => " and shows nothing".to_owned(),
                (Kind::List, _) => format!(" among its {} values", values.len()),
            };
            let (breach, had) = match because {
                Because::Own => (Breach::Stale, "had written it and it was acknowledged"),
                Because::Seen => (Breach::NonMonotonic, "had read it before"),
            };
            let text =
                format!("client {client} does not see {value} in {key}{shows}, though it {had}");
            if because == Because::Seen {
                *self.missed.entry(value).or_default() += 1;
            }
            self.violated(breach, at, client, key, Some(value), text);
        }
    }

    /// The value was lost, and its writer told so: that others miss it follows from that.
    fn excuse(&mut self, value: Value) {
        let Some(missed) = self.missed.remove(&value) else { return };
        self.verdict.counts.lost_announced_seen += missed;
        let is_excused = |v: &Violation| v.breach == Breach::NonMonotonic && v.value == Some(value);
        self.verdict.violations.retain(|violation| !is_excused(violation));
        if let Some(count) = self.verdict.breaches.get_mut(&Breach::NonMonotonic) {
            *count = count.saturating_sub(missed);
        }
        self.verdict.breaches.retain(|_, count| *count > 0);
    }

    fn last(&mut self, at: Duration, key: Key, values: &[Value]) {
        let reader = values.first().map_or(0, |value| value.client);
        self.looked(at, reader, key, values);
        let Some(book) = self.books.get_mut(&key) else { return };
        book.is_read = true;
        let seen: BTreeSet<_> = values.iter().copied().collect();
        let there = seen.iter().filter_map(|value| book.writes.get(value));
        let ambiguous = there.filter(|written| written.known == Known::Maybe).count();
        self.verdict.counts.ambiguous_there += ambiguous as u64;
        let lost: Vec<(Value, Duration)> = match key.kind {
            Kind::List => book.acknowledged().filter(|(value, _)| !seen.contains(value)).collect(),
            Kind::Register => {
                let number = values.first().map(|value| value.number);
                let greatest = book.acknowledged().max_by_key(|(value, _)| value.number);
                greatest.filter(|(value, _)| Some(value.number) > number).into_iter().collect()
            }
        };
        for (value, acknowledged) in lost {
            let told = self.clients.get(&value.client).and_then(|client| client.told_lost);
            if told.is_some_and(|told| told > acknowledged) {
                self.verdict.counts.lost_announced += 1;
                self.excuse(value);
                continue;
            }
            let when = acknowledged.as_secs_f64();
            let text =
                format!("{value} was acknowledged at {when:.3} s and is not in {key} at the end");
            self.violated(Breach::Lost, at, value.client, key, Some(value), text);
        }
    }

    fn violated(
        &mut self,
        breach: Breach,
        at: Duration,
        client: u32,
        key: Key,
        value: Option<Value>,
        text: String,
    ) {
        *self.verdict.breaches.entry(breach).or_default() += 1;
        if self.verdict.violations.len() >= MORE {
            return;
        }
        let trace = self.trace(client, key, value);
        let violation = Violation { breach, at, client, key, value, text, trace };
        self.verdict.violations.push(violation);
    }

    /// What was done to this key and by this client, the value's own write first if it is still
    /// known.
    fn trace(&self, client: u32, key: Key, value: Option<Value>) -> Vec<Step> {
        let is_write_of =
            |step: &&Step| matches!(step.operation, Operation::Write(_, v) if Some(v) == value);
        let is_near = |step: &&Step| step.operation.key() == key || step.client == client;
        let mut trace: Vec<&Step> = self.steps.iter().rev().filter(is_near).take(TRACE).collect();
        if let Some(write) = self.steps.iter().find(is_write_of)
            && !trace.contains(&write)
        {
            trace.push(write);
        }
        trace.into_iter().rev().cloned().collect()
    }
}

impl Book {
    fn acknowledged(&self) -> impl Iterator<Item = (Value, Duration)> {
        self.writes.iter().filter_map(|(value, written)| match written.known {
            Known::Acknowledged { at } => Some((*value, at)),
            Known::Maybe | Known::Denied => None,
        })
    }

    fn know(&mut self, value: Value, known: Known) {
        if let Some(written) = self.writes.get_mut(&value) {
            written.known = known;
        }
    }

    fn bind(&mut self, kind: Kind, client: u32, value: Value, because: Because) {
        let bound = self.bound.entry(client).or_default();
        bound.entry(value).or_insert(because);
        if kind == Kind::Register {
            let greatest = bound.last_key_value().map(|(value, _)| *value);
            let own = bound.iter().rfind(|(_, why)| **why == Because::Own).map(|(value, _)| *value);
            bound.retain(|value, _| Some(*value) == greatest || Some(*value) == own);
        }
    }
}

/// Counts by name, up to a number of names.
fn add(counts: &mut BTreeMap<Arc<str>, u64>, name: &str) {
    if let Some(count) = counts.get_mut(name) {
        *count += 1;
    } else if counts.len() < NAMES {
        counts.insert(name.into(), 1);
    } else {
        *counts.entry("others".into()).or_default() += 1;
    }
}

#[cfg(test)]
impl Judge {
    /// How many steps, and how many values that clients must see, are remembered.
    pub(super) fn remembers(&self) -> (usize, usize) {
        let bound = self.books.values().flat_map(|book| book.bound.values());
        (self.steps.len(), bound.map(BTreeMap::len).sum())
    }
}
