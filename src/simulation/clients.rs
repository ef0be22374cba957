//! Clients: they write and read lists through one instance after the other, carry what they are
//! given, give up now and then, and tell the judge what they sent and what they were told.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt as _,
    time::{Instant, sleep, timeout},
};

use super::{
    litegate::{DURABLE, RESPONSE, front},
    node::value_of,
    wire::Message,
    world::{INSTANCES, World},
};
use crate::{
    net::Stream,
    verify::history::{End, Event, Key, Kind, Operation, Outcome, Value},
};

/// Answers of litegate that say that a write did not run.
const DENIALS: [&str; 6] =
    ["no_primary", "split_brain", "hold_full", "writes_full", "connect_failed", "too_many_hops"];

pub(super) struct Client {
    world: Rc<World>,
    history: Rc<RefCell<Vec<Event>>>,
    number: u32,
    written: u32,
    connections: [Option<(Stream, BytesMut)>; INSTANCES],
    cookies: BTreeMap<String, String>,
    /// It is an API client: it carries the header and no cookies.
    token: Option<String>,
    by_header: bool,
}

impl Client {
    pub(super) fn new(world: &Rc<World>, history: &Rc<RefCell<Vec<Event>>>, number: u32) -> Self {
        Self {
            by_header: world.chance(40),
            world: Rc::clone(world),
            history: Rc::clone(history),
            number,
            written: 0,
            connections: [None, None],
            cookies: BTreeMap::new(),
            token: None,
        }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    fn own(&self) -> Key {
        Key { kind: Kind::List, slot: self.number, generation: 0 }
    }

    /// Writes the next value to its own list.
    pub(super) async fn write(&mut self, instance: usize) -> End {
        self.written += 1;
        let value = Value { client: self.number, number: self.written };
        self.act(instance, Operation::Write(self.own(), value)).await
    }

    /// Reads its own list.
    pub(super) async fn read(&mut self, instance: usize) -> End {
        self.act(instance, Operation::Read(self.own())).await
    }

    fn shared() -> Key {
        Key { kind: Kind::List, slot: 99, generation: 0 }
    }

    /// Until the world says that it is enough.
    pub(super) async fn live(&mut self) {
        while !self.world.ended.get() {
            sleep(self.world.millis(30..700)).await;
            let instance = usize::from(self.world.chance(50));
            let key = if self.world.chance(70) { self.own() } else { Self::shared() };
            if self.world.chance(50) {
                self.written += 1;
                let value = Value { client: self.number, number: self.written };
                self.act(instance, Operation::Write(key, value)).await;
                if self.world.chance(60) {
                    // At once, through the other one.
                    self.act(1 - instance, Operation::Read(key)).await;
                }
            } else {
                self.act(instance, Operation::Read(key)).await;
            }
        }
    }

    /// A last look through both, so that whatever it has to be told is told.
    pub(super) async fn finish(&mut self) {
        for instance in 0..INSTANCES {
            for key in [self.own(), Self::shared()] {
                self.act(instance, Operation::Read(key)).await;
            }
        }
    }

    pub(super) async fn act(&mut self, instance: usize, operation: Operation) -> End {
        let number = self.number;
        let began = Instant::now();
        let began_at = self.world.stamp();
        self.record(Event::Began { at: began_at, client: number, operation });
        let is_write = matches!(operation, Operation::Write(..));
        let longest = self.longest(is_write);
        let patience =
            if is_write && self.world.chance(4) { self.world.millis(1..1200) } else { longest };
        let mut end = match timeout(patience, self.exchange(instance, operation)).await {
            Ok(Some(end)) => end,
            Ok(None) => {
                self.connections[instance] = None;
                End::of(failed(operation, "connection broke"))
            }
            Err(_) => {
                self.connections[instance] = None;
                if patience == longest {
                    self.world.breaks(format_args!(
                        "litegate {instance} left c{number} without an answer to {} for {longest:?}",
                        text(operation)
                    ));
                }
                End::of(failed(operation, "gave up"))
            }
        };
        end.instance = instance as u32;
        let took = began.elapsed().as_millis();
        let lost = if end.told_lost { ", told of lost writes" } else { "" };
        let node = end.node.as_deref().unwrap_or("-").to_owned();
        self.world.say(format_args!(
            "c{number} via litegate {instance}: {operation} → {outcome}{lost} ({node}, {took} ms)",
            operation = text(operation),
            outcome = brief(&end.outcome),
        ));
        self.record(Event::Ended { at: self.world.stamp(), client: number, end: end.clone() });
        end
    }

    /// The longest that anything may take: held until the deadline, and then an attempt on a node
    /// that does not answer; a read tries three. What takes longer has been forgotten.
    fn longest(&self, is_write: bool) -> Duration {
        let attempts = if is_write { 1 } else { 3 };
        self.world.hold + RESPONSE * attempts + DURABLE + Duration::from_secs(4)
    }

    fn record(&self, event: Event) {
        self.history.borrow_mut().push(event);
    }

    async fn exchange(&mut self, instance: usize, operation: Operation) -> Option<End> {
        if self.connections[instance].is_none() {
            let stream = Stream::connect(front(instance)).await.ok()?;
            self.connections[instance] = Some((stream, BytesMut::new()));
        }
        let mut fields = String::from("host: abaci.test\r\n");
        if let Some(token) = &self.token {
            fields += &format!("litegate-token: {token}\r\n");
        }
        if !self.cookies.is_empty() {
            let pairs: Vec<_> = self.cookies.iter().map(|(n, v)| format!("{n}={v}")).collect();
            fields += &format!("cookie: {}\r\n", pairs.join("; "));
        }
        let (method, path, mut body) = match operation {
            Operation::Read(key) => ("GET", path(key), String::new()),
            Operation::Write(key, value) => ("POST", path(key), format!("{value} ")),
        };
        if !body.is_empty() && self.world.chance(10) {
            let more = self.world.rng.borrow_mut().usize(1..200_000);
            body.push_str(&"x".repeat(more));
        }
        if !body.is_empty() {
            fields += &format!("content-length: {}\r\n", body.len());
        }
        let (stream, ahead) = self.connections[instance].as_mut()?;
        let head = format!("{method} {path} HTTP/1.1\r\n{fields}\r\n");
        stream.write_all(head.as_bytes()).await.ok()?;
        // A reset after the answer came is no news.
        let _ = stream.write_all(body.as_bytes()).await;
        let answer = Message::read(stream, ahead).await?;
        if answer.head.text("connection") == Some("close") {
            self.connections[instance] = None;
        }
        self.learn(&answer);
        let status = answer.head.status()?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let mut end = End::of(outcome(operation, status, &text, &answer));
        if let (Outcome::Acknowledged, Operation::Write(_, value)) = (&end.outcome, operation) {
            self.world.acknowledged(value);
            if is_blind(answer.head.text("litegate-token")) {
                self.world.blind.borrow_mut().insert(value);
            }
        }
        end.status = Some(status);
        end.node = answer.head.text("x-node").map(Into::into);
        end.leaked = answer.head.fields.contains_key("fly-replay");
        end.told_lost = answer.head.fields.contains_key("litegate-write-lost");
        Some(end)
    }

    fn learn(&mut self, answer: &Message) {
        if self.by_header {
            if let Some(token) = answer.head.text("litegate-token") {
                self.token = Some(token.to_owned());
            }
            return;
        }
        for line in answer.head.fields.get_all("set-cookie") {
            let pair = line.to_str().ok().and_then(|line| line.split(';').next());
            if let Some((name, value)) = pair.and_then(|pair| pair.split_once('=')) {
                self.cookies.insert(name.to_owned(), value.to_owned());
            }
        }
    }
}

/// Whether a token says how long, rather than where that very write is: its second byte tells.
fn is_blind(token: Option<&str>) -> bool {
    let bytes = token.and_then(|token| URL_SAFE_NO_PAD.decode(token).ok());
    bytes.is_some_and(|bytes| bytes.get(1).is_some_and(|kind| *kind > 0))
}

fn path(key: Key) -> String {
    format!("/list/{}", key.slot)
}

fn failed(operation: Operation, why: &str) -> Outcome {
    match operation {
        Operation::Write(..) => Outcome::Ambiguous(why.into()),
        Operation::Read(_) => Outcome::Failed(why.into()),
    }
}

fn outcome(operation: Operation, status: u16, text: &str, answer: &Message) -> Outcome {
    let says = format!("{status}: {}", error_of(text));
    match (operation, status) {
        (Operation::Write(..), 200) if text == "ok" => Outcome::Acknowledged,
        (Operation::Write(..), 200) => Outcome::Empty,
        (Operation::Read(_), 200) => {
            let values = text.trim_start_matches('[').trim_end_matches(']').split(' ');
            Outcome::Values(values.filter_map(value_of).collect())
        }
        (Operation::Read(_), _) => Outcome::Failed(says.into()),
        (Operation::Write(..), _) => {
            let told = answer.head.text("litegate-write-outcome") == Some("not-committed");
            let denied = told || DENIALS.contains(&error_of(text));
            if denied { Outcome::Denied(says.into()) } else { Outcome::Ambiguous(says.into()) }
        }
    }
}

/// The word of a problem.
fn error_of(text: &str) -> &str {
    let rest = text.split_once("\"error\":\"").map(|(_, rest)| rest);
    rest.and_then(|rest| rest.split('"').next()).unwrap_or_else(|| text.trim_end())
}

fn text(operation: Operation) -> String {
    match operation {
        Operation::Read(key) => format!("read {key}"),
        Operation::Write(key, value) => format!("write {value} to {key}"),
    }
}

fn brief(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Values(values) => {
            let last = values.last().map_or_else(|| "nothing".to_owned(), Value::to_string);
            format!("{} values, the last {last}", values.len())
        }
        other => format!("{other:?}"),
    }
}
