//! One line for each request, written by a thread of its own.
//!
//! Workers collect entries and hand them over in batches through a bounded queue. When the writer
//! can't keep up, a batch is dropped and counted rather than a request delayed. Client data is
//! escaped: a log line is always one line.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    fs::OpenOptions,
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, header};
use smallvec::SmallVec;

use super::metrics::Metrics;
use crate::{
    config::admin::{AccessLog as Config, AccessLogFormat, AccessLogOutput},
    decide::{Because, Cause, Class, Ended, Problem},
    topology::Role,
};

/// Entries in a batch.
const BATCH: usize = 64;
/// Batches that wait for the writer.
const BATCHES: usize = 256;

/// A request that is over.
#[derive(Debug)]
pub struct Entry {
    /// When it was over.
    pub time: SystemTime,
    /// The client.
    pub peer: SocketAddr,
    /// The method, as far as it is known.
    pub method: Option<Method>,
    /// What the client sent.
    pub line: Box<Line>,
    /// The cluster.
    pub cluster: Option<Arc<str>>,
    /// The route's place in the file.
    pub route: Option<usize>,
    /// Read or write.
    pub class: Option<Class>,
    /// Why.
    pub because: Option<Because>,
    /// Every attempt.
    pub tries: SmallVec<[Tried; 2]>,
    /// How long it was held.
    pub held: Duration,
    /// What the client got.
    pub status: StatusCode,
    /// If litegate answered itself.
    pub problem: Option<Problem>,
    /// Body bytes from the client.
    pub received: u64,
    /// Body bytes to the client.
    pub sent: u64,
    /// In all.
    pub duration: Duration,
    /// Whether the client got the whole answer.
    pub complete: bool,
}

/// The parts of a request that only the log wants.
#[derive(Debug)]
pub struct Line {
    /// The request target, as far as it is known.
    pub target: Option<Uri>,
    /// The protocol, as far as it is known.
    pub version: Option<Version>,
    /// `Host`
    pub host: Option<HeaderValue>,
    /// `User-Agent`
    pub user_agent: Option<HeaderValue>,
    /// `X-Request-Id`
    pub request_id: Option<HeaderValue>,
}

impl Line {
    /// Takes what the log wants: reference counts, not copies.
    pub fn of(target: &Uri, version: Version, head: &HeaderMap) -> Self {
        Self {
            target: Some(target.clone()),
            version: Some(version),
            host: head.get(header::HOST).cloned(),
            user_agent: head.get(header::USER_AGENT).cloned(),
            request_id: head.get("x-request-id").cloned(),
        }
    }
}

/// One attempt.
#[derive(Clone, Debug)]
pub struct Tried {
    /// On which node.
    pub node: Arc<str>,
    /// What it was believed to be.
    pub role: Role,
    /// Why this try was made.
    pub cause: Cause,
    /// How it ended.
    pub ended: Ended,
}

/// The writer. Dropping it writes what is there and ends it.
#[derive(Debug)]
pub struct AccessLog {
    sender: Option<SyncSender<Vec<Entry>>>,
    reopen: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
    writer: Option<JoinHandle<()>>,
}

impl AccessLog {
    /// Starts the writer; `None` where nothing is to be logged.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn start(config: &Config, metrics: Arc<Metrics>) -> io::Result<Option<Self>> {
        let render: fn(&mut String, &Entry) = match config.format {
            AccessLogFormat::Off => return Ok(None),
            AccessLogFormat::Text => text,
            AccessLogFormat::Json => json,
        };
        let output = config.output.clone();
        let first = open(&output)?;
        let (sender, batches) = sync_channel(BATCHES);
        let reopen = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&reopen);
        let writer = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write(&batches, first, &output, &asked, render))?;
        Ok(Some(Self { sender: Some(sender), reopen, metrics, writer: Some(writer) }))
    }

    /// A worker's end.
    pub fn sink(&self) -> Option<Sink> {
        let sender = self.sender.clone()?;
        let metrics = Arc::clone(&self.metrics);
        Some(Sink { entries: RefCell::default(), sender, metrics })
    }

    /// Opens the file anew: log rotation has moved it.
    pub fn reopen(&self) {
        self.reopen.store(true, Relaxed);
    }
}

impl AccessLog {
    /// Another log takes its place: the writer ends with the last sink.
    pub fn retire(&mut self) {
        self.sender = None;
    }

    /// Whether everything is written and nothing more can come.
    pub fn has_ended(&self) -> bool {
        self.writer.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        // The writer ends when the last sink is gone, too.
        self.sender = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Where one worker puts its entries.
#[derive(Debug)]
pub struct Sink {
    entries: RefCell<Vec<Entry>>,
    sender: SyncSender<Vec<Entry>>,
    metrics: Arc<Metrics>,
}

impl Sink {
    /// Takes one.
    pub fn push(&self, entry: Entry) {
        let mut entries = self.entries.borrow_mut();
        entries.push(entry);
        if entries.len() >= BATCH {
            drop(entries);
            self.flush();
        }
    }

    /// Hands over what is there.
    pub fn flush(&self) {
        let batch = std::mem::take(&mut *self.entries.borrow_mut());
        let count = batch.len() as u64;
        if count > 0 && self.sender.try_send(batch).is_err() {
            self.metrics.log_dropped.fetch_add(count, Relaxed);
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.flush();
    }
}

fn open(output: &AccessLogOutput) -> io::Result<Box<dyn Write + Send>> {
    Ok(match output {
        AccessLogOutput::Stdout => Box::new(io::stdout()),
        AccessLogOutput::Stderr => Box::new(io::stderr()),
        AccessLogOutput::File(path) => {
            Box::new(OpenOptions::new().create(true).append(true).open(path)?)
        }
    })
}

fn write(
    batches: &Receiver<Vec<Entry>>,
    mut to: Box<dyn Write + Send>,
    output: &AccessLogOutput,
    reopen: &AtomicBool,
    render: fn(&mut String, &Entry),
) {
    let mut page = String::new();
    loop {
        let batch = match batches.recv_timeout(Duration::from_secs(1)) {
            Ok(batch) => batch,
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if reopen.swap(false, Relaxed)
            && let Ok(opened) = open(output)
        {
            to = opened;
        }
        page.clear();
        for entry in &batch {
            render(&mut page, entry);
        }
        // A full disk or a closed pipe must not stop requests.
        let _ = to.write_all(page.as_bytes()).and_then(|()| to.flush());
    }
}

/// Client text without anything that could end the line or its quotes.
struct Plain<'t>(&'t [u8]);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            match byte {
                b'"' | b'\\' | 0..=0x1f | 0x7f.. => write!(f, "\\x{byte:02x}")?,
                byte => f.write_char(char::from(*byte))?,
            }
        }
        Ok(())
    }
}

fn plain(value: Option<&HeaderValue>) -> Plain<'_> {
    Plain(value.map_or(b"-", HeaderValue::as_bytes))
}

fn ended(ended: Ended) -> String {
    match ended {
        Ended::Answered(status) => status.as_u16().to_string(),
        Ended::Replayed => "replay".to_owned(),
        Ended::Failed(failure) => failure.kind.as_str().to_owned(),
    }
}

fn text(page: &mut String, entry: &Entry) {
    let line = &entry.line;
    let _ = write!(
        page,
        "{} {} \"{} {}\" {} {}B {:.1}ms {}",
        humantime(entry.time),
        entry.peer.ip(),
        Plain(entry.method.as_ref().map_or("-", Method::as_str).as_bytes()),
        Plain(line.target.as_ref().map_or_else(|| "-".to_owned(), Uri::to_string).as_bytes()),
        entry.status.as_u16(),
        entry.sent,
        entry.duration.as_secs_f64() * 1000.0,
        plain(line.host.as_ref()),
    );
    if let (Some(class), Some(because)) = (entry.class, entry.because) {
        let _ = write!(page, " {} by {}", class.as_str(), because.as_str());
        if let Some(index) = entry.route {
            let _ = write!(page, " in route {}", index + 1);
        }
    }
    for tried in &entry.tries {
        let arrow = match tried.cause {
            Cause::First => "->",
            Cause::Replay => "=>",
            Cause::Retry => "~>",
        };
        let _ = write!(page, " {arrow} {}({}) {}", tried.node, tried.role, ended(tried.ended));
    }
    if !entry.held.is_zero() {
        let _ = write!(page, " held {}ms", entry.held.as_millis());
    }
    if let Some(problem) = entry.problem {
        let _ = write!(page, " {} {}", problem.flag(), problem.as_str());
    }
    if !entry.complete {
        page.push_str(" incomplete");
    }
    page.push('\n');
}

fn json(page: &mut String, entry: &Entry) {
    let line = &entry.line;
    let field = |value: Option<&HeaderValue>| {
        value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let tries: Vec<_> = entry
        .tries
        .iter()
        .map(|tried| {
            serde_json::json!({
                "node": &*tried.node,
                "role": tried.role.as_str(),
                "cause": tried.cause.as_str(),
                "ended": ended(tried.ended),
            })
        })
        .collect();
    let object = serde_json::json!({
        "time": humantime(entry.time),
        "peer": entry.peer.to_string(),
        "method": entry.method.as_ref().map(Method::as_str),
        "target": line.target.as_ref().map(Uri::to_string),
        "protocol": line.version.map(|version| format!("{version:?}")),
        "host": field(line.host.as_ref()),
        "user_agent": field(line.user_agent.as_ref()),
        "request_id": field(line.request_id.as_ref()),
        "cluster": entry.cluster.as_deref(),
        "route": entry.route.map(|index| index + 1),
        "class": entry.class.map(Class::as_str),
        "because": entry.because.map(Because::as_str),
        "attempts": tries,
        "held_seconds": entry.held.as_secs_f64(),
        "status": entry.status.as_u16(),
        "problem": entry.problem.map(Problem::as_str),
        "flag": entry.problem.map(Problem::flag),
        "received_bytes": entry.received,
        "sent_bytes": entry.sent,
        "duration_seconds": entry.duration.as_secs_f64(),
        "complete": entry.complete,
    });
    let _ = writeln!(page, "{object}");
}

/// `2026-11-24T03:04:05.678Z`
fn humantime(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days to civil date, after Howard Hinnant: years begin in March, eras are 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let mut head = HeaderMap::new();
        head.insert("host", HeaderValue::from_static("abaci.one"));
        head.insert("user-agent", HeaderValue::from_bytes(b"evil\" \xff").unwrap());
        let target = "/kv/1?x=%0A".parse().unwrap();
        let tried =
            |node: &str, role, cause, ended| Tried { node: node.into(), role, cause, ended };
        Entry {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_489_445_678),
            peer: "192.0.2.7:4711".parse().unwrap(),
            method: Some(Method::POST),
            line: Box::new(Line::of(&target, Version::HTTP_11, &head)),
            cluster: Some("abaci".into()),
            route: Some(1),
            class: Some(Class::Write),
            because: Some(Because::Method),
            tries: SmallVec::from_iter([
                tried("abaci-app-1", Role::Replica, Cause::First, Ended::Replayed),
                tried("abaci-app-0", Role::Primary, Cause::Replay, Ended::Answered(StatusCode::OK)),
            ]),
            held: Duration::from_millis(80),
            status: StatusCode::OK,
            problem: None,
            received: 5,
            sent: 17,
            duration: Duration::from_micros(12_345),
            complete: true,
        }
    }

    #[test]
    fn a_line_says_where_a_request_went_and_why() {
        let mut page = String::new();
        text(&mut page, &entry());
        insta::assert_snapshot!(page, @r#"2026-11-24T03:04:05.678Z 192.0.2.7 "POST /kv/1?x=%0A" 200 17B 12.3ms abaci.one write by method in route 2 -> abaci-app-1(replica) replay => abaci-app-0(primary) 200 held 80ms"#);
    }

    #[test]
    fn a_line_is_one_line_of_json() {
        let mut page = String::new();
        json(&mut page, &entry());
        assert_eq!(page.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&page).unwrap();
        assert_eq!(value["attempts"][1]["node"], "abaci-app-0");
        assert_eq!(value["held_seconds"], 0.08);
        assert_eq!((&value["because"], &value["route"]), (&"method".into(), &2.into()));
        assert_eq!(value["attempts"][0]["role"], "replica");
    }

    #[test]
    fn client_text_cannot_break_out_of_its_line() {
        assert_eq!(Plain(b"a\"b\\c\nd\xff").to_string(), "a\\x22b\\x5cc\\x0ad\\xff");
    }
}
