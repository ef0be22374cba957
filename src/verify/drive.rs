//! The thin part: clients that follow the plan, and a judge that hears of everything in order.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{HeaderMap, HeaderValue};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

use super::{
    WRITES,
    client::{Answer, Client, Target},
    history::{End, Event, Key, Kind, Operation, Outcome, Value},
    judge::{Judge, Verdict},
    memory::{Carry, Memory},
    plan::{Plan, Workload},
    words::{Template, Words},
};

/// Between two looks at a key that is not complete yet.
const AGAIN: Duration = Duration::from_millis(100);
/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(250);
/// Headers in which nodes and proxies tell who served.
const NODE: [&str; 4] = ["litegate-node", "litegate-served-by", "abaci-node", "x-served-by"];
/// The longest name that is taken from an answer.
const NAME: usize = 100;

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where: each client takes them in turn.
    pub targets: Vec<Target>,
    /// `Host` for all of them, instead of what each URL says.
    pub host: Option<HeaderValue>,
    /// How TLS is spoken with those whose URL wants it, with what ALPN offers.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// How many clients.
    pub clients: u32,
    /// Kinds of client, one after the other.
    pub carry: Vec<Carry>,
    /// How long.
    pub duration: Duration,
    /// Operations a second by all clients together. Zero: as fast as they are answered.
    pub rate: u32,
    /// What is written.
    pub workload: Workload,
    /// Lists in use at a time, and registers of each client.
    pub keys: u32,
    /// How a value is appended to a list.
    pub append: Template,
    /// How a register is set.
    pub set: Template,
    /// How either is read.
    pub read: Template,
    /// The body of a write, with `{value}` in it.
    pub body: String,
    /// Its `Content-Type`.
    pub content_type: String,
    /// How long a request may take before its client gives up.
    pub timeout: Duration,
    /// How long after the end everything acknowledged may take to show.
    pub settle: Duration,
    /// Whether a success without a body is one.
    pub empty_is_success: bool,
    /// The run's number: makes its keys and values its own.
    pub run: u32,
}

/// A finished run.
#[derive(Debug)]
pub struct Run {
    /// Its number as it stands in keys and values.
    pub name: String,
    /// What came out.
    pub verdict: Verdict,
    /// How long it took, the last look included.
    pub took: Duration,
    /// Whether it ended at [`WRITES`] writes.
    pub is_full: bool,
}

/// Judge and plan: whoever changes one tells the other, in one order for all.
#[derive(Debug)]
struct Book {
    judge: Judge,
    plan: Plan,
    over: bool,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    words: Words,
    began: Instant,
    book: Mutex<Book>,
}

/// Runs until the time is up or `stop` resolves. The error says why nothing can be judged.
pub async fn run(
    settings: Settings,
    stop: impl Future<Output = ()>,
    mut progress: impl FnMut(Duration, &Verdict),
) -> Result<Run, String> {
    let words = Words::new(settings.run);
    let plan = Plan::new(settings.workload, settings.clients, settings.keys);
    let book = Mutex::new(Book { judge: Judge::default(), plan, over: false });
    probe(&settings, &words).await?;
    let duration = settings.duration;
    let shared = Arc::new(Shared { settings, words, began: Instant::now(), book });
    let mut clients = JoinSet::new();
    for client in 0..shared.settings.clients {
        clients.spawn(work(Arc::clone(&shared), client));
    }
    let end = sleep_until(shared.began + duration);
    let (mut end, mut stop) = (std::pin::pin!(end), std::pin::pin!(stop));
    let mut ticks = interval(PROGRESS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_over = false;
    loop {
        tokio::select! {
            ended = clients.join_next() => if ended.is_none() { break },
            () = &mut end, if !is_over => is_over = true,
            () = &mut stop, if !is_over => is_over = true,
            _ = ticks.tick() => progress(shared.began.elapsed(), shared.book().judge.verdict()),
        }
        shared.book().over |= is_over;
    }
    last_look(&shared).await;
    let took = shared.began.elapsed();
    let mut book = shared.book();
    let is_full = book.plan.writes() >= WRITES;
    let verdict = std::mem::take(&mut book.judge).finish();
    drop(book);
    if verdict.counts.acknowledged == 0 && verdict.breaches.is_empty() {
        return Err("no write was acknowledged, so there is nothing to judge".into());
    }
    Ok(Run { name: shared.words.run().to_owned(), verdict, took, is_full })
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a client does next; `None` at the end.
    fn begin(&self, client: u32, rng: &mut fastrand::Rng) -> Option<Operation> {
        let mut book = self.book();
        let book = &mut *book;
        if book.over || book.plan.writes() >= WRITES {
            return None;
        }
        let operation = book.plan.next(client, rng);
        for key in book.plan.closed() {
            book.judge.observe(&Event::Closed { key });
        }
        book.judge.observe(&Event::Began { at: self.began.elapsed(), client, operation });
        Some(operation)
    }

    fn end(&self, client: u32, operation: Operation, end: End) {
        let mut book = self.book();
        if let Operation::Write(key, _) = operation
            && end.outcome != Outcome::Acknowledged
        {
            book.plan.unsure(key);
        }
        book.judge.observe(&Event::Ended { at: self.began.elapsed(), client, end });
    }

    /// The last look at a key, if everything is there or it is time.
    fn took(&self, key: Key, values: Option<Vec<Value>>, is_time: bool) -> bool {
        let mut book = self.book();
        let is_complete = values.as_ref().is_some_and(|v| book.judge.is_complete(key, v));
        if let Some(values) = values.filter(|_| is_complete || is_time) {
            book.judge.observe(&Event::Last { at: self.began.elapsed(), key, values });
        }
        is_complete || is_time
    }
}

impl Settings {
    fn client(&self, n: u32) -> Client {
        let carry = self.carry.get(n as usize % self.carry.len().max(1));
        let memory = Memory::new(carry.copied().unwrap_or(Carry::Cookies));
        let targets = self.targets.clone().into();
        let (host, tls) = (self.host.clone(), self.tls.clone());
        Client::new(targets, host, tls, self.timeout, memory, n as usize)
    }

    async fn write(
        &self,
        client: &mut Client,
        words: &Words,
        key: Key,
        value: Value,
    ) -> (u32, Result<Answer, Arc<str>>) {
        let template = match key.kind {
            Kind::List => &self.append,
            Kind::Register => &self.set,
        };
        let body = self.body.replace("{value}", &words.value(value));
        let path = template.path(&words.key(key));
        client.send(&template.method, &path, &self.content_type, Some(body)).await
    }

    async fn read(
        &self,
        client: &mut Client,
        words: &Words,
        key: Key,
    ) -> (u32, Result<Answer, Arc<str>>) {
        client.send(&self.read.method, &self.read.path(&words.key(key)), "", None).await
    }
}

/// Is the app what it is taken for? Asked once, before anything counts.
async fn probe(settings: &Settings, words: &Words) -> Result<(), String> {
    let mut client = settings.client(0);
    for kind in [Kind::List, Kind::Register] {
        match (kind, settings.workload) {
            (Kind::List, Workload::Register) | (Kind::Register, Workload::Append) => continue,
            _ => {}
        }
        // A slot that the plan never uses.
        let key = Key { kind, slot: u32::MAX, generation: 0 };
        let value = Value { client: u32::MAX, number: 1 };
        let (template, option) = match kind {
            Kind::List => (&settings.append, "--append"),
            Kind::Register => (&settings.set, "--set"),
        };
        let what = format!("{} {}", template.method, template.path(&words.key(key)));
        let written = match settings.write(&mut client, words, key, value).await.1 {
            Ok(answer) if answer.status.is_client_error() => {
                let status = answer.status;
                return Err(format!(
                    "{what} was answered {status}; {option}, --body and --content-type say how \
                     your app is written to"
                ));
            }
            Ok(answer) => answer.status.is_success() && !answer.body.trim_ascii().is_empty(),
            Err(why) if why.starts_with("connect") => return Err(format!("{what}: {why}")),
            // A cluster may be in trouble: that is what is to be judged.
            Err(_) => false,
        };
        if written && !shows(settings, words, &mut client, key, value).await {
            let read = format!("{} {}", settings.read.method, settings.read.path(&words.key(key)));
            return Err(format!(
                "{what} succeeded, and {read} does not show the value {}; --read says how your \
                 app is read",
                words.value(value)
            ));
        }
    }
    Ok(())
}

/// Whether a value comes to be seen in time.
async fn shows(
    settings: &Settings,
    words: &Words,
    client: &mut Client,
    key: Key,
    value: Value,
) -> bool {
    let deadline = Instant::now() + settings.settle;
    loop {
        let read = settings.read(client, words, key).await.1;
        let is_there = read.is_ok_and(|answer| words.find(&answer.body).contains(&value));
        if is_there || Instant::now() >= deadline {
            return is_there;
        }
        sleep(AGAIN).await;
    }
}

/// One client.
async fn work(shared: Arc<Shared>, n: u32) {
    let settings = &shared.settings;
    let mut rng = fastrand::Rng::with_seed(u64::from(settings.run) << 32 | u64::from(n));
    let mut client = settings.client(n);
    let pause = f64::from(settings.clients) / f64::from(settings.rate.max(1));
    let mut due = shared.began;
    loop {
        if settings.rate > 0 {
            let pause = Duration::from_secs_f64(pause * (0.5 + rng.f64()));
            due = (due + pause).max(Instant::now());
            sleep_until(due).await;
        }
        let Some(operation) = shared.begin(n, &mut rng) else { return };
        let end = match operation {
            Operation::Write(key, value) => {
                let (instance, answer) =
                    settings.write(&mut client, &shared.words, key, value).await;
                write_end(instance, answer, settings.empty_is_success)
            }
            Operation::Read(key) => {
                let (instance, answer) = settings.read(&mut client, &shared.words, key).await;
                read_end(instance, answer, &shared.words)
            }
        };
        shared.end(n, operation, end);
    }
}

/// Everything is read once more, by somebody who carries nothing; a key that is not complete gets
/// some time.
async fn last_look(shared: &Shared) {
    let settings = &shared.settings;
    let targets = settings.targets.clone().into();
    let memory = Memory::new(Carry::Nothing);
    let (host, tls) = (settings.host.clone(), settings.tls.clone());
    let mut client = Client::new(targets, host, tls, settings.timeout, memory, 0);
    let keys = shared.book().judge.keys();
    let deadline = Instant::now() + settings.settle;
    for key in keys {
        loop {
            let (instance, answer) = settings.read(&mut client, &shared.words, key).await;
            let values = match read_end(instance, answer, &shared.words).outcome {
                Outcome::Values(values) => Some(values),
                _ => None,
            };
            if shared.took(key, values, Instant::now() >= deadline) {
                break;
            }
            sleep(AGAIN).await;
        }
    }
}

fn write_end(instance: u32, answer: Result<Answer, Arc<str>>, empty_is_success: bool) -> End {
    let answer = match answer {
        Ok(answer) => answer,
        Err(why) => return End { instance, ..End::of(Outcome::Ambiguous(why)) },
    };
    let is_empty = answer.body.trim_ascii().is_empty();
    let outcome = if answer.status.is_success() {
        if is_empty && !empty_is_success { Outcome::Empty } else { Outcome::Acknowledged }
    } else {
        let told = answer.headers.get("litegate-write-outcome");
        let why = why(&answer);
        match told.and_then(|told| told.to_str().ok()).map(str::trim) {
            Some("not-committed") => Outcome::Denied(why),
            _ => Outcome::Ambiguous(why),
        }
    };
    told(instance, &answer, outcome)
}

fn read_end(instance: u32, answer: Result<Answer, Arc<str>>, words: &Words) -> End {
    let answer = match answer {
        Ok(answer) => answer,
        Err(why) => return End { instance, ..End::of(Outcome::Failed(why)) },
    };
    // Nothing there yet is an answer.
    let outcome = match answer.status {
        status if status.is_success() => Outcome::Values(words.find(&answer.body)),
        http::StatusCode::NOT_FOUND => Outcome::Values(Vec::new()),
        _ => Outcome::Failed(why(&answer)),
    };
    told(instance, &answer, outcome)
}

/// The status code, and `Proxy-Status`'s error if there is one.
fn why(answer: &Answer) -> Arc<str> {
    let status = answer.status.as_u16();
    let error = text(&answer.headers, "proxy-status").and_then(|line| line.split_once("error="));
    match error.and_then(|(_, rest)| rest.split([';', ',']).next()) {
        Some(error) if error.len() <= NAME => format!("{status} {}", error.trim()).into(),
        _ => status.to_string().into(),
    }
}

fn told(instance: u32, answer: &Answer, outcome: Outcome) -> End {
    let headers = &answer.headers;
    let named = NODE.iter().find_map(|name| text(headers, name));
    let node = named.or_else(|| node_in(&answer.body)).filter(|node| node.len() <= NAME);
    End {
        outcome,
        status: Some(answer.status.as_u16()),
        node: node.map(Arc::from),
        via: text(headers, "via").filter(|via| via.len() <= NAME).map(Arc::from),
        instance,
        leaked: headers.keys().any(|name| name.as_str().starts_with("fly-replay")),
        told_lost: headers.contains_key("litegate-write-lost"),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `"node":"app-0"` in a JSON body.
fn node_in(body: &[u8]) -> Option<&str> {
    let mark = b"\"node\":\"";
    let at = body.windows(mark.len()).position(|window| window == mark)?;
    let rest = body.get(at + mark.len()..)?;
    let end = rest.iter().position(|byte| *byte == b'"')?;
    std::str::from_utf8(rest.get(..end)?).ok()
}
