//! The judge against made-up histories: correct ones, of which it must not complain, and each of
//! them with one thing wrong, which it must find.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fastrand::Rng;
use proptest::prelude::*;

use super::{
    history::{End, Event, Key, Kind, Operation, Outcome, Value},
    judge::{Breach, Verdict, judge},
    plan::{Plan, Workload},
};

const CLIENTS: u32 = 3;

/// A system that keeps its word: one order of commits; a read shows any state that is not older
/// than what its client has written or seen. Writes of unknown end commit once, later, or never.
struct System {
    rng: Rng,
    plan: Plan,
    history: Vec<Event>,
    commits: Vec<(Key, Value)>,
    /// By client: what it does, whether that has committed, and what it must see.
    doing: Vec<Option<(Operation, bool)>>,
    floors: Vec<usize>,
    /// Writes of unknown end that may still run.
    late: Vec<(Key, Value)>,
}

impl System {
    fn history(seed: u64, steps: u32) -> Vec<Event> {
        let mut system = Self {
            rng: Rng::with_seed(seed),
            plan: Plan::new(Workload::Both, CLIENTS, 2),
            history: Vec::new(),
            commits: Vec::new(),
            doing: vec![None; CLIENTS as usize],
            floors: vec![0; CLIENTS as usize],
            late: Vec::new(),
        };
        for _ in 0..steps {
            system.step();
        }
        for client in 0..CLIENTS {
            system.end(client);
        }
        let written = system.history.iter().filter_map(|event| match event {
            Event::Began { operation: Operation::Write(key, _), .. } => Some(*key),
            _ => None,
        });
        let keys: BTreeSet<Key> = written.collect();
        for key in keys {
            let values = system.state(key, system.commits.len());
            let at = system.now();
            system.history.push(Event::Last { at, key, values });
        }
        system.history
    }

    fn now(&self) -> Duration {
        Duration::from_millis(self.history.len() as u64)
    }

    fn step(&mut self) {
        let client = self.rng.u32(..CLIENTS);
        match (self.doing[client as usize], self.rng.u32(..3)) {
            (None, _) => {
                let operation = self.plan.next(client, &mut self.rng);
                let at = self.now();
                self.history.push(Event::Began { at, client, operation });
                self.doing[client as usize] = Some((operation, false));
            }
            (Some((Operation::Write(key, value), false)), 0) => {
                self.commits.push((key, value));
                self.doing[client as usize] = Some((Operation::Write(key, value), true));
            }
            (Some(_), 1) => self.end(client),
            _ if self.rng.u32(..4) == 0 && !self.late.is_empty() => {
                let late = self.late.swap_remove(self.rng.usize(..self.late.len()));
                self.commits.push(late);
            }
            _ => {}
        }
    }

    fn end(&mut self, client: u32) {
        let Some((operation, committed)) = self.doing[client as usize].take() else { return };
        let outcome = match operation {
            Operation::Write(key, value) if self.rng.u32(..5) == 0 => {
                self.plan.unsure(key);
                if !committed && self.rng.bool() {
                    Outcome::Denied("503".into())
                } else {
                    if !committed && self.rng.bool() {
                        self.late.push((key, value));
                    }
                    Outcome::Ambiguous("502".into())
                }
            }
            Operation::Write(key, value) => {
                if !committed {
                    self.commits.push((key, value));
                }
                let at = self.commits.iter().position(|commit| *commit == (key, value));
                let at = at.expect("it has committed") + 1;
                self.floors[client as usize] = at.max(self.floors[client as usize]);
                Outcome::Acknowledged
            }
            Operation::Read(_) if self.rng.u32(..20) == 0 => Outcome::Failed("504".into()),
            Operation::Read(key) => {
                let version = self.rng.usize(self.floors[client as usize]..=self.commits.len());
                self.floors[client as usize] = version;
                Outcome::Values(self.state(key, version))
            }
        };
        let at = self.now();
        self.history.push(Event::Ended { at, client, end: End::of(outcome) });
    }

    fn state(&self, key: Key, version: usize) -> Vec<Value> {
        let commits = self.commits[..version].iter().filter(|commit| commit.0 == key);
        let values: Vec<Value> = commits.map(|commit| commit.1).collect();
        match key.kind {
            Kind::List => values,
            Kind::Register => values.last().copied().into_iter().collect(),
        }
    }
}

/// The places where a client's read was answered, with the key.
fn reads(history: &[Event]) -> Vec<(usize, u32, Key)> {
    let mut doing = BTreeMap::new();
    let mut found = Vec::new();
    for (at, event) in history.iter().enumerate() {
        match event {
            Event::Began { client, operation, .. } => {
                doing.insert(*client, operation.key());
            }
            Event::Ended { client, end: End { outcome: Outcome::Values(_), .. }, .. } => {
                found.push((at, *client, doing[client]));
            }
            _ => {}
        }
    }
    found
}

/// What each client was told of its writes, with the place.
fn writes(history: &[Event]) -> Vec<(usize, u32, Key, Value, Outcome)> {
    let mut doing = BTreeMap::new();
    let mut found = Vec::new();
    for (at, event) in history.iter().enumerate() {
        match event {
            Event::Began { client, operation, .. } => {
                doing.insert(*client, *operation);
            }
            Event::Ended { client, end, .. } => {
                if let Operation::Write(key, value) = doing[client] {
                    found.push((at, *client, key, value, end.outcome.clone()));
                }
            }
            _ => {}
        }
    }
    found
}

fn acknowledged(history: &[Event]) -> Vec<(usize, u32, Key, Value)> {
    let all = writes(history).into_iter().filter(|write| write.4 == Outcome::Acknowledged);
    all.map(|(at, client, key, value, _)| (at, client, key, value)).collect()
}

fn values(event: &mut Event) -> &mut Vec<Value> {
    match event {
        Event::Last { values, .. } => values,
        Event::Ended { end: End { outcome: Outcome::Values(values), .. }, .. } => values,
        other => panic!("no values in {other:?}"),
    }
}

fn end(event: &mut Event) -> &mut End {
    match event {
        Event::Ended { end, .. } => end,
        other => panic!("no end in {other:?}"),
    }
}

fn last(history: &[Event], key: Key) -> Option<usize> {
    history.iter().position(|event| matches!(event, Event::Last { key: k, .. } if *k == key))
}

/// One of them, by chance.
fn pick<T>(mut all: Vec<T>, rng: &mut Rng) -> Option<T> {
    if all.is_empty() { None } else { Some(all.swap_remove(rng.usize(..all.len()))) }
}

/// Takes a value out of every look at its list from a place on.
fn forget(history: &mut [Event], from: usize, key: Key, value: Value) {
    let looked: Vec<usize> = reads(history).into_iter().map(|read| read.0).collect();
    for at in looked.into_iter().chain(last(history, key)).filter(|at| *at > from) {
        values(&mut history[at]).retain(|other| *other != value);
    }
}

/// Makes one thing wrong. `None` if this history has no place for it.
fn break_it(history: &mut [Event], breach: Breach, rng: &mut Rng) -> Option<()> {
    match breach {
        Breach::Lost => {
            let lists = acknowledged(history).into_iter().filter(|w| w.2.kind == Kind::List);
            let (at, _, key, value) = pick(lists.collect(), rng)?;
            forget(history, at, key, value);
        }
        Breach::Repeated => {
            let looks: Vec<usize> = (0..history.len())
                .filter(|at| match &history[*at] {
                    Event::Last { key, values, .. } => key.kind == Kind::List && !values.is_empty(),
                    _ => false,
                })
                .collect();
            let values = values(&mut history[pick(looks, rng)?]);
            let again = values[rng.usize(..values.len())];
            values.insert(rng.usize(..=values.len()), again);
        }
        Breach::Stale => {
            let own = acknowledged(history);
            let mut places = Vec::new();
            for (at, client, key) in reads(history) {
                let before = own.iter().filter(|w| w.0 < at && w.1 == client && w.2 == key);
                places.extend(before.map(|w| (at, w.3)));
            }
            let (at, value) = pick(places, rng)?;
            // A list without it; a register that stands before it.
            values(&mut history[at])
                .retain(|other| other.client == value.client && other.number < value.number);
        }
        Breach::NonMonotonic => {
            let all = reads(history);
            let mut places = Vec::new();
            for (at, client, key) in &all {
                let earlier = all.iter().filter(|r| r.0 < *at && r.1 == *client && r.2 == *key);
                for (before, ..) in earlier {
                    let seen = values(&mut history[*before]).clone();
                    places
                        .extend(seen.into_iter().filter(|v| v.client != *client).map(|v| (*at, v)));
                }
            }
            let (at, value) = pick(places, rng)?;
            values(&mut history[at]).retain(|other| {
                *other != value && !(other.client == value.client && other.number > value.number)
            });
        }
        Breach::Phantom => {
            let at = pick(reads(history), rng)?.0;
            values(&mut history[at]).insert(0, Value { client: 77, number: 1 });
        }
        Breach::Empty => {
            let at = pick(acknowledged(history), rng)?.0;
            end(&mut history[at]).outcome = Outcome::Empty;
        }
        Breach::Leaked => {
            let at = pick(acknowledged(history), rng)?.0;
            end(&mut history[at]).leaked = true;
        }
        Breach::Contradicted => {
            let there: BTreeSet<(Key, Value)> = history
                .iter()
                .filter_map(|event| match event {
                    Event::Last { key, values, .. } => Some((*key, values)),
                    _ => None,
                })
                .flat_map(|(key, values)| values.iter().map(move |value| (key, *value)))
                .collect();
            let unsure = writes(history).into_iter().filter(|(_, _, key, value, outcome)| {
                matches!(outcome, Outcome::Ambiguous(_)) && there.contains(&(*key, *value))
            });
            let at = pick(unsure.collect(), rng)?.0;
            end(&mut history[at]).outcome = Outcome::Denied("503".into());
        }
    }
    Some(())
}

fn complaints(verdict: &Verdict) -> Vec<&str> {
    verdict.violations.iter().map(|violation| &*violation.text).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_never_complains_of_a_correct_history(seed: u64, steps in 0u32..2000) {
        let verdict = judge(&System::history(seed, steps));
        prop_assert_eq!(complaints(&verdict), Vec::<&str>::new());
        prop_assert_eq!(verdict.unread, 0);
    }

    #[test]
    fn it_finds_whatever_is_wrong(seed: u64, which in 0..Breach::ALL.len()) {
        let breach = Breach::ALL[which];
        let mut history = System::history(seed, 1500);
        let broken = break_it(&mut history, breach, &mut Rng::with_seed(seed));
        prop_assert!(broken.is_some(), "a history of this length has a place for everything");
        let verdict = judge(&history);
        prop_assert!(verdict.count(breach) > 0, "{breach:?}: {:?}", complaints(&verdict));
        let first = &verdict.violations[0];
        prop_assert!(!first.text.is_empty() && !first.trace.is_empty());
    }

    #[test]
    fn a_loss_that_the_client_is_told_of_is_no_breach(seed: u64) {
        let mut history = System::history(seed, 1500);
        let mut rng = Rng::with_seed(seed);
        let lists = acknowledged(&history).into_iter().filter(|w| w.2.kind == Kind::List);
        let Some((at, writer, key, value)) = pick(lists.collect(), &mut rng) else {
            return Err(TestCaseError::reject("nothing was acknowledged"));
        };
        forget(&mut history, at, key, value);
        // The writer is told with the first answer after it, and the others by chance.
        for client in (0..CLIENTS).filter(|client| *client == writer || rng.bool()) {
            let next = history.iter_mut().skip(at + 1).find_map(|event| match event {
                Event::Ended { client: c, end, .. } if *c == client => Some(end),
                _ => None,
            });
            match next {
                Some(end) => end.told_lost = true,
                None if client == writer => return Err(TestCaseError::reject("nothing after it")),
                None => {}
            }
        }
        let verdict = judge(&history);
        prop_assert_eq!(complaints(&verdict), Vec::<&str>::new());
        prop_assert_eq!(verdict.counts.lost_announced, 1);
    }
}

fn began(client: u32, operation: Operation) -> Event {
    Event::Began { at: Duration::ZERO, client, operation }
}

fn ended(client: u32, outcome: Outcome) -> Event {
    Event::Ended { at: Duration::from_millis(1), client, end: End::of(outcome) }
}

const REGISTER: Key = Key { kind: Kind::Register, slot: 0, generation: 0 };

fn value(number: u32) -> Value {
    Value { client: 0, number }
}

#[test]
fn an_old_value_that_comes_back_is_found_by_whoever_saw_the_new_one() {
    let mut history = Vec::new();
    for number in [1, 2] {
        history.push(began(0, Operation::Write(REGISTER, value(number))));
        history.push(ended(0, Outcome::Acknowledged));
        history.push(began(1, Operation::Read(REGISTER)));
        history.push(ended(1, Outcome::Values(vec![value(number)])));
    }
    for client in [0, 1] {
        history.push(began(client, Operation::Read(REGISTER)));
        history.push(ended(client, Outcome::Values(vec![value(1)])));
    }
    let at = Duration::from_millis(2);
    history.push(Event::Last { at, key: REGISTER, values: vec![value(1)] });
    let verdict = judge(&history);
    for breach in [Breach::Stale, Breach::NonMonotonic, Breach::Lost] {
        assert_eq!(verdict.count(breach), 1, "{breach:?}: {:?}", complaints(&verdict));
    }
    assert!(!verdict.is_kept(&[Breach::Stale, Breach::Lost]));
    assert!(verdict.is_kept(&[Breach::Stale, Breach::Lost, Breach::NonMonotonic]));
}

#[test]
fn an_own_write_is_missed_even_where_a_later_one_of_unknown_end_was_read() {
    let mut history = vec![
        began(0, Operation::Write(REGISTER, value(1))),
        ended(0, Outcome::Acknowledged),
        began(0, Operation::Write(REGISTER, value(2))),
        ended(0, Outcome::Ambiguous("502".into())),
    ];
    for shows in [vec![value(2)], vec![value(1)], vec![]] {
        history.push(began(0, Operation::Read(REGISTER)));
        history.push(ended(0, Outcome::Values(shows)));
    }
    let verdict = judge(&history);
    assert_eq!(verdict.count(Breach::NonMonotonic), 1, "{:?}", complaints(&verdict));
    assert_eq!(verdict.count(Breach::Stale), 1, "{:?}", complaints(&verdict));
}

#[test]
fn memory_of_a_long_run_is_bounded() {
    let mut judge = super::judge::Judge::default();
    for number in 0..20_000 {
        let key = Key { kind: Kind::List, slot: 0, generation: number / 64 };
        judge.observe(&began(0, Operation::Write(key, value(number))));
        judge.observe(&ended(0, Outcome::Empty));
        if let Some(generation) = key.generation.checked_sub(2) {
            judge.observe(&Event::Closed { key: Key { generation, ..key } });
        }
    }
    let (steps, bound) = judge.remembers();
    assert_eq!((steps, bound), (super::judge::STEPS, 0));
    let verdict = judge.finish();
    assert_eq!(verdict.count(Breach::Empty), 20_000);
    assert_eq!(verdict.violations.len(), super::judge::MORE);
    assert!(verdict.unread > 0);
}
