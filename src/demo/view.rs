//! What the demo shows: pure text from plain values.

use std::{
    fmt::Write as _,
    io::IsTerminal as _,
    net::SocketAddr,
    sync::{Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{plain, story::Story};
use crate::{
    testkit::Cluster,
    topology::{Freshness, Role, watch},
    verify::judge::{Breach, Counts, Verdict},
};

/// The keys. They stay on screen however small that is.
const KEYS: &str = "[k]ill [h]and over [f]reeze [s]tall [l]ossy failover [m]end [a]uto [q]uit";
/// Lines of a page without the older events.
const LINES: usize = 23;

/// What may be written to a terminal.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Paint {
    /// Whether it can be drawn over. Lines are for all else.
    pub(super) is_live: bool,
    /// Whether it takes colour.
    pub(super) is_coloured: bool,
}

impl Paint {
    pub(super) fn of_this_terminal() -> Self {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            is_live: std::io::stdout().is_terminal() && std::io::stdin().is_terminal() && !is_dumb,
            // https://no-color.org: present and not empty.
            is_coloured: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }
}

/// The pages of `/metrics` of each litegate as last read.
#[derive(Debug, Default)]
pub(super) struct Pages([Mutex<String>; 2]);

impl Pages {
    pub(super) fn put(&self, index: usize, page: String) {
        if let Some(place) = self.0.get(index) {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = page;
        }
    }

    /// What both counted under this name with all of these labels.
    fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let pages = self.0.iter().map(|page| page.lock().unwrap_or_else(PoisonError::into_inner));
        pages.map(|page| sum(&page, name, labels)).sum()
    }
}

/// The samples of one family, by name and labels, as in `code="200"`.
fn sum(page: &str, name: &str, labels: &[&str]) -> u64 {
    let samples = page.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (found, found_labels) = series.split_once('{').unwrap_or((series, ""));
        let is_it = found == name && labels.iter().all(|label| found_labels.contains(label));
        is_it.then(|| value.parse::<u64>().ok()).flatten()
    });
    samples.sum()
}

/// What the judge says so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    counts: Counts,
    repeated: u64,
    stale: u64,
    other: u64,
}

impl Told {
    pub(super) fn of(verdict: &Verdict) -> Self {
        let other = Breach::ALL.into_iter().filter(|breach| {
            !matches!(breach, Breach::Repeated | Breach::Stale | Breach::NonMonotonic)
        });
        Self {
            counts: verdict.counts.clone(),
            repeated: verdict.count(Breach::Repeated),
            stale: verdict.count(Breach::Stale),
            other: other.map(|breach| verdict.count(breach)).sum(),
        }
    }
}

/// A moment of the demo.
#[derive(Clone, Debug, Default)]
pub(super) struct Moment {
    pub(super) doors: Vec<SocketAddr>,
    pub(super) admins: Vec<SocketAddr>,
    pub(super) is_automatic: bool,
    pub(super) is_closing: bool,
    pub(super) told: Told,
    /// Writes of the judged clients that ran, lost ones included.
    pub(super) ran: u64,
    elapsed: Duration,
    /// What happened, oldest first, and how much of it is not shown any more.
    forgotten: usize,
    events: Vec<(Duration, String)>,
    /// Whom both litegates believe to be primary; `None` where they do not agree or nobody is.
    primary: Option<String>,
    term: u64,
    nodes: Vec<Node>,
    held: u64,
    released: u64,
    gave_up: u64,
    fresh: u64,
    waited: u64,
    on_primary: u64,
    voided: u64,
    counted_lost: u64,
    gone: u64,
    lossy: u64,
    spread: Way,
    by_method: Way,
}

#[derive(Clone, Debug, Default)]
struct Node {
    name: String,
    role: &'static str,
    /// What was done to it, or what litegate holds against it.
    state: &'static str,
    txid: u64,
    /// Transactions that a replica lacks, and since when. `None`: nobody knows.
    behind: Option<(u64, Duration)>,
    /// Requests that the litegates sent there, at the last look and now.
    sent: u64,
    rate: u64,
    rated_at: Duration,
    rated: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Way {
    writes: u64,
    lost: u64,
    failed: u64,
    stale: u64,
}

impl Way {
    fn of(way: &plain::Way) -> Self {
        Self {
            writes: way.writes.load(Relaxed),
            lost: way.lost.load(Relaxed),
            failed: way.failed.load(Relaxed),
            stale: way.stale.load(Relaxed),
        }
    }
}

impl Moment {
    /// Before anything was seen.
    pub(super) fn of(doors: Vec<SocketAddr>, admins: Vec<SocketAddr>) -> Self {
        Self { doors, admins, ..Self::default() }
    }

    /// Brings it up to now.
    #[expect(clippy::too_many_arguments, reason = "it is one picture of everything")]
    pub(super) fn look(
        &mut self,
        now: Instant,
        elapsed: Duration,
        cluster: &Cluster,
        readers: &mut [watch::Reader],
        story: &Story,
        pages: &Pages,
        plain: &plain::Tally,
    ) {
        self.elapsed = elapsed;
        self.tell(story);
        (self.gone, self.lossy) = (story.gone, story.lossy);
        (self.spread, self.by_method) = (Way::of(&plain.spread), Way::of(&plain.by_method));
        let mut names = readers
            .iter_mut()
            .map(|reader| reader.latest().primary().map(|node| node.name.to_string()));
        let first = names.next().flatten();
        self.primary = first.filter(|first| names.all(|name| name.as_ref() == Some(first)));
        if let Some(reader) = readers.first_mut() {
            let topology = reader.latest();
            self.term = topology.term;
            let leading = topology.primary().map(|node| node.progress.snapshot());
            self.nodes.resize_with(cluster.places().len(), Node::default);
            for (index, (node, place)) in self.nodes.iter_mut().zip(cluster.places()).enumerate() {
                node.name.clone_from(&place.name);
                let known = topology.named(&place.name);
                node.role = known.map_or(Role::Unknown, |node| node.role).as_str();
                node.state = story.state(index).unwrap_or(match known {
                    Some(node) if node.fenced => "fenced",
                    Some(node) if node.record.is_ejected(now) => "ejected",
                    Some(node) if node.freshness == Freshness::TooFar => "too far behind",
                    _ => "",
                });
                node.txid = cluster.position(index).txid;
                let ours = known.map(|node| node.progress.snapshot());
                node.behind = ours.filter(|ours| !ours.is_empty()).zip(leading.as_ref()).map(
                    |(ours, leading)| {
                        let behind = ours.behind(leading, now);
                        (behind.transactions, behind.time)
                    },
                );
                let label = format!("node=\"{}\"", place.name);
                node.sent = pages.sum("litegate_upstream_requests_total", &[&label]);
                let since = elapsed.saturating_sub(node.rated_at);
                if since >= Duration::from_secs(1) {
                    let sent = node.sent.saturating_sub(node.rated) as f64;
                    node.rate = whole(sent / since.as_secs_f64());
                    (node.rated_at, node.rated) = (elapsed, node.sent);
                }
            }
        }
        self.held = pages.sum("litegate_held_requests", &[]);
        let outcomes = |outcome| pages.sum("litegate_hold_outcomes_total", &[outcome]);
        self.released = outcomes("outcome=\"resumed\"");
        self.gave_up = outcomes("outcome=\"timeout\"") + outcomes("outcome=\"overflow\"");
        let reads = |decision| pages.sum("litegate_token_reads_total", &[decision]);
        self.fresh = reads("decision=\"fresh\"");
        self.waited = reads("decision=\"waited\"");
        self.on_primary = reads("decision=\"primary\"");
        self.voided = pages.sum("litegate_tokens_invalid_total", &["reason=\"lost\""]);
        self.counted_lost = pages.sum("litegate_acknowledged_writes_lost_total", &[]);
    }

    /// Hears what happened.
    pub(super) fn tell(&mut self, story: &Story) {
        self.events = story.said.iter().cloned().collect();
        self.forgotten = story.forgotten;
    }

    /// Acknowledged writes that ran nowhere: what litegate itself would have lost.
    fn lost(&self) -> u64 {
        self.told.counts.acknowledged.saturating_sub(self.ran)
    }

    /// For a log.
    pub(super) fn line(&self) -> String {
        let counts = &self.told.counts;
        let nodes = self.nodes.iter().map(|node| {
            let mark = if node.role == "primary" { "*" } else { "" };
            let behind = match node.behind {
                Some((n, _)) if n > 0 => format!(" (-{n})"),
                _ => String::new(),
            };
            let state = if node.state.is_empty() { "" } else { " " };
            format!("{}{mark} {}{behind}{state}{}", node.name, node.txid, node.state)
        });
        format!(
            "{:5.1} s  {} | held {} | writes {}, lost {}, twice {} | reads {}, stale {}: {} fresh, \
             {} waited, {} primary | lost by LiteFS {}, {} told | without: lost {} of {} spread, \
             {} of {} by method",
            self.elapsed.as_secs_f64(),
            nodes.collect::<Vec<_>>().join("  "),
            self.held,
            counts.acknowledged,
            self.lost(),
            self.told.repeated,
            counts.reads,
            self.told.stale,
            self.fresh,
            self.waited,
            self.on_primary,
            self.gone,
            counts.announcements,
            self.spread.lost,
            self.spread.writes,
            self.by_method.lost,
            self.by_method.writes,
        )
    }

    /// For a log: what happened since `known` events were told.
    pub(super) fn news(&self, known: usize) -> impl Iterator<Item = String> {
        let news = self.events.iter().skip(known.saturating_sub(self.forgotten));
        news.map(|(at, text)| format!("{:5.1} s  -- {text}", at.as_secs_f64()))
    }

    /// For a screen of this size: lines that fit.
    pub(super) fn page(&self, width: usize, height: usize, paint: Paint) -> Vec<String> {
        let mut page = Page::default();
        self.head(&mut page);
        self.table(&mut page);
        self.through(&mut page);
        self.without(&mut page);
        let older = height.saturating_sub(LINES + 2);
        if older > 0 && self.events.len() > 1 {
            page.line().say(Style::Dim, "BEFORE");
            for (at, text) in self.events.iter().rev().skip(1).take(older - 1) {
                page.line().text(format!("  {:5.1} s  {text}", at.as_secs_f64()));
            }
            page.line();
        }
        self.places(&mut page);
        page.fit(width, height, paint.is_coloured)
    }

    fn head(&self, page: &mut Page) {
        let (minutes, seconds) = (self.elapsed.as_secs() / 60, self.elapsed.as_secs() % 60);
        let line = page.line();
        line.say(Style::Strong, "litegate demo");
        line.text(format!("   {minutes}:{seconds:02}   primary "));
        match &self.primary {
            Some(primary) => line.say(Style::Good, primary),
            None => line.say(Style::Warn, "nobody: writes wait"),
        }
        line.text(format!("   term {}", self.term));
        let what = match (self.is_closing, self.is_automatic) {
            (true, _) => "   closing the books",
            (false, true) => "   auto is on",
            (false, false) => "",
        };
        line.say(Style::Dim, what);
        let (at, text) = self.events.last().cloned().unwrap_or_default();
        page.line().say(Style::Warn, format!("{:.1} s: {text}", at.as_secs_f64()));
        page.line();
    }

    fn table(&self, page: &mut Page) {
        page.line().say(Style::Dim, "NODE    ROLE      TXID     BEHIND         REQUESTS  A SECOND");
        for node in &self.nodes {
            let line = page.line();
            line.text(format!("{:7} ", node.name));
            let style = if node.role == "primary" { Style::Good } else { Style::Plain };
            line.say(style, format!("{:8} ", node.role));
            let behind = match (node.role, node.behind) {
                ("primary", _) => "-".to_owned(),
                (_, None) => "unknown".to_owned(),
                (_, Some((0, _))) => "0".to_owned(),
                (_, Some((n, since))) => format!("{n}, {} ms", since.as_millis()),
            };
            line.text(format!("{:7}  {behind:13}  {:8}  ", node.txid, node.sent));
            let bar = usize::try_from(node.rate / 4).unwrap_or(0).min(8);
            line.text(format!("{:3} {:8} ", node.rate, "#".repeat(bar)));
            line.say(Style::Bad, node.state);
        }
        page.line();
    }

    fn through(&self, page: &mut Page) {
        let (told, counts) = (&self.told, &self.told.counts);
        page.line().say(Style::Dim, "THROUGH TWO LITEGATES IN TURN, WHICH SHARE NOTHING");
        let failed = counts.ambiguous + counts.denied;
        page.row("writes", |line| {
            line.text(format!("{} acknowledged   ", counts.acknowledged));
            line.alarm(failed, Style::Warn, "answered with an error");
            line.text(format!("   longest {:.1} s", counts.longest_write.as_secs_f64()));
        });
        page.row("held", |line| {
            line.alarm(self.held, Style::Warn, "wait for a primary now");
            line.text(format!("   {} released   {} gave up", self.released, self.gave_up));
        });
        page.row("reads", |line| {
            line.text(format!("{} answered   ", counts.reads));
            line.alarm(counts.failed_reads, Style::Bad, "failed");
        });
        page.row("own writes", |line| {
            line.text(format!(
                "{} on a fresh replica   {} after a wait   {} on the primary",
                self.fresh, self.waited, self.on_primary
            ));
        });
        page.row("failovers", |line| {
            line.alarm(self.gone, Style::Warn, "transactions lost by LiteFS");
            line.text(format!("   {} of them through here at most", self.counted_lost));
        });
        page.row("announced", |line| {
            line.text(format!(
                "{} tokens voided   {} answers with Litegate-Write-Lost",
                self.voided, counts.announcements
            ));
        });
        page.row("broken", |line| {
            line.verdict(self.lost(), "lost by litegate");
            line.verdict(told.repeated, "ran twice");
            line.verdict(told.stale, "past of an own write");
            if told.other > 0 {
                line.verdict(told.other, "other");
            }
        });
        page.line();
    }

    fn without(&self, page: &mut Page) {
        page.line().say(Style::Dim, "THE SAME NODES WITHOUT IT");
        for (name, way) in [("spread", self.spread), ("by method", self.by_method)] {
            page.row(name, |line| {
                let of = format!("of {} writes lost behind a 200", way.writes);
                line.alarm(way.lost, Style::Bad, &of);
                line.text("   ");
                line.alarm(way.failed, Style::Warn, "failed");
                line.text("   ");
                line.alarm(way.stale, Style::Warn, "stale reads");
            });
        }
        page.line();
    }

    fn places(&self, page: &mut Page) {
        let list = |addresses: &[SocketAddr]| {
            let ports = addresses.iter().skip(1).map(|address| format!(" :{}", address.port()));
            let first = addresses.first().map(ToString::to_string).unwrap_or_default();
            format!("http://{first}{}", ports.collect::<String>())
        };
        let line = page.line();
        line.text(format!("{}  admin {}", list(&self.doors), list(&self.admins)));
        page.line().say(Style::Strong, KEYS);
    }

    /// For the end.
    pub(super) fn summary(&self, verdict: &Verdict, is_kept: bool) -> String {
        let counts = &verdict.counts;
        let (lost, repeated) = (verdict.count(Breach::Lost), verdict.count(Breach::Repeated));
        let mut page = String::new();
        let mut row = |name: &str, text: String| {
            let _ = writeln!(page, "{name:9} {text}");
        };
        row(
            "took",
            format!(
                "{:.0} s with {} changes of the primary",
                self.elapsed.as_secs_f64(),
                self.term.saturating_sub(1)
            ),
        );
        row(
            "writes",
            format!(
                "{} acknowledged, {} of unknown end, {} certainly not run; {} waited",
                counts.acknowledged, counts.ambiguous, counts.denied, self.released
            ),
        );
        row("reads", format!("{} answered, {} failed", counts.reads, counts.failed_reads));
        for (error, n) in &counts.errors {
            row("", format!("{n} x {error}"));
        }
        row(
            "",
            format!(
                "with a token: {} on a fresh replica, {} after a wait, {} on the primary",
                self.fresh, self.waited, self.on_primary
            ),
        );
        row(
            "lost",
            format!(
                "{lost} by litegate; by LiteFS {} transactions in {} lossy failovers",
                self.gone, self.lossy
            ),
        );
        row(
            "",
            format!(
                "of those {} acknowledged here, their clients told in {} answers",
                counts.lost_announced, counts.announcements
            ),
        );
        row("", format!("(litegate_acknowledged_writes_lost_total: {})", self.counted_lost));
        row(
            "broken",
            format!(
                "{repeated} ran twice, {} reads of the past of an own write",
                verdict.count(Breach::Stale)
            ),
        );
        for (name, way) in [("spread", self.spread), ("by method", self.by_method)] {
            row(
                "without",
                format!("{name}: {} of {} writes lost behind a 200", way.lost, way.writes),
            );
        }
        page.push_str(if is_kept {
            "kept: nothing lost unannounced, nothing twice, no past of an own write"
        } else {
            "NOT KEPT"
        });
        page
    }
}

fn whole(n: f64) -> u64 {
    Duration::try_from_secs_f64(n).map_or(0, |n| n.as_secs() + u64::from(n.subsec_millis() >= 500))
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Style {
    #[default]
    Plain,
    Dim,
    Strong,
    Good,
    Warn,
    Bad,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Dim => "\x1b[2m",
            Self::Strong => "\x1b[1m",
            Self::Good => "\x1b[1;32m",
            Self::Warn => "\x1b[33m",
            Self::Bad => "\x1b[1;31m",
        }
    }
}

#[derive(Debug, Default)]
struct Page(Vec<Line>);

#[derive(Debug, Default)]
struct Line(Vec<(Style, String)>);

impl Page {
    /// The next line.
    fn line(&mut self) -> &mut Line {
        self.0.push_mut(Line::default())
    }

    fn row(&mut self, name: &str, fill: impl FnOnce(&mut Line)) {
        let line = self.line();
        line.text(format!("  {name:11} "));
        fill(line);
    }

    /// So many lines of so many columns; the last ones, with the keys, always.
    fn fit(mut self, width: usize, height: usize, is_coloured: bool) -> Vec<String> {
        let over = self.0.len().saturating_sub(height.max(1));
        let keep = self.0.len().saturating_sub(over + 1);
        self.0.drain(keep..keep + over);
        self.0.into_iter().map(|line| line.render(width.saturating_sub(1), is_coloured)).collect()
    }
}

impl Line {
    fn say(&mut self, style: Style, text: impl Into<String>) {
        self.0.push((style, text.into()));
    }

    fn text(&mut self, text: impl Into<String>) {
        self.say(Style::Plain, text);
    }

    /// A number that should be zero.
    fn alarm(&mut self, n: u64, style: Style, what: &str) {
        self.say(if n > 0 { style } else { Style::Plain }, format!("{n} {what}"));
    }

    fn verdict(&mut self, n: u64, what: &str) {
        self.say(if n > 0 { Style::Bad } else { Style::Good }, format!("{n} {what}"));
        self.text("   ");
    }

    fn render(self, width: usize, is_coloured: bool) -> String {
        let (mut line, mut left) = (String::new(), width);
        for (style, text) in self.0 {
            let text: String = text.chars().take(left).collect();
            left -= text.chars().count();
            let code = if is_coloured && !text.is_empty() { style.code() } else { "" };
            line.push_str(code);
            line.push_str(&text);
            if !code.is_empty() {
                line.push_str("\x1b[0m");
            }
        }
        line.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment() -> Moment {
        let node = |name: &str, role, behind| Node {
            name: name.into(),
            role,
            txid: 217 - behind,
            behind: Some((behind, Duration::from_millis(behind * 40))),
            sent: 1234,
            rate: 40,
            ..Node::default()
        };
        let dead = Node { state: "killed", behind: None, ..node("app-2", "unknown", 9) };
        let counts = Counts {
            acknowledged: 412,
            ambiguous: 3,
            reads: 1203,
            announcements: 4,
            longest_write: Duration::from_millis(1400),
            ..Counts::default()
        };
        let at = Duration::from_millis;
        Moment {
            doors: vec![([127, 0, 0, 1], 8080).into(), ([127, 0, 0, 1], 8081).into()],
            admins: vec![([127, 0, 0, 1], 9090).into(), ([127, 0, 0, 1], 9091).into()],
            is_automatic: true,
            told: Told { counts, ..Told::default() },
            ran: 414,
            elapsed: Duration::from_secs(67),
            events: vec![
                (at(2500), "app-0 handed the lease over to app-1".into()),
                (at(5000), "app-2 was killed with 3 transactions that nobody else has".into()),
            ],
            primary: Some("app-1".into()),
            term: 3,
            nodes: vec![node("app-0", "replica", 3), node("app-1", "primary", 0), dead],
            held: 5,
            released: 31,
            fresh: 812,
            waited: 77,
            on_primary: 13,
            voided: 16,
            counted_lost: 3,
            gone: 3,
            lossy: 1,
            spread: Way { writes: 61, lost: 40, failed: 2, stale: 3 },
            by_method: Way { writes: 61, lost: 30, failed: 4, stale: 1 },
            ..Moment::default()
        }
    }

    #[test]
    fn a_page_says_who_is_primary_what_is_behind_and_what_was_lost() {
        let page = moment().page(80, 24, Paint::default());
        insta::assert_snapshot!(page.join("\n"), @"
        litegate demo   1:07   primary app-1   term 3   auto is on
        5.0 s: app-2 was killed with 3 transactions that nobody else has

        NODE    ROLE      TXID     BEHIND         REQUESTS  A SECOND
        app-0   replica      214  3, 120 ms          1234   40 ########
        app-1   primary      217  -                  1234   40 ########
        app-2   unknown      208  unknown            1234   40 ######## killed

        THROUGH TWO LITEGATES IN TURN, WHICH SHARE NOTHING
          writes      412 acknowledged   3 answered with an error   longest 1.4 s
          held        5 wait for a primary now   31 released   0 gave up
          reads       1203 answered   0 failed
          own writes  812 on a fresh replica   77 after a wait   13 on the primary
          failovers   3 transactions lost by LiteFS   3 of them through here at most
          announced   16 tokens voided   4 answers with Litegate-Write-Lost
          broken      0 lost by litegate   0 ran twice   0 past of an own write

        THE SAME NODES WITHOUT IT
          spread      40 of 61 writes lost behind a 200   2 failed   3 stale reads
          by method   30 of 61 writes lost behind a 200   4 failed   1 stale reads

        http://127.0.0.1:8080 :8081  admin http://127.0.0.1:9090 :9091
        [k]ill [h]and over [f]reeze [s]tall [l]ossy failover [m]end [a]uto [q]uit
        ");
    }

    #[test]
    fn a_page_fits_every_screen_and_keeps_the_keys() {
        for (width, height) in [(80, 24), (120, 40), (40, 10), (20, 1), (1, 1), (200, 100)] {
            for is_coloured in [false, true] {
                let paint = Paint { is_live: true, is_coloured };
                let page = moment().page(width, height, paint);
                assert!(page.len() <= height, "{width}x{height}");
                let last = page.last().expect("a line");
                let keys: String = KEYS.chars().take(width - 1).collect();
                assert!(last.contains(keys.trim_end()), "{width}x{height}: {last}");
                if !is_coloured {
                    assert!(page.iter().all(|line| line.chars().count() < width.max(1)));
                    assert!(page.iter().all(|line| !line.contains('\x1b')));
                }
            }
        }
        let tall = moment().page(120, 40, Paint::default()).join("\n");
        assert!(tall.contains("2.5 s  app-0 handed the lease over"), "{tall}");
    }

    #[test]
    fn a_write_that_ran_nowhere_is_lost_by_litegate() {
        let moment = Moment { ran: 410, ..moment() };
        assert!(moment.page(80, 24, Paint::default()).join("\n").contains("2 lost by litegate"));
        assert!(moment.line().contains("writes 412, lost 2"));
    }

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let page =
            "# TYPE a counter\na{x=\"1\",y=\"2\"} 3\na{x=\"1\",y=\"3\"} 4\nab{x=\"1\"} 5\nb 6\n";
        assert_eq!(sum(page, "a", &["x=\"1\""]), 7);
        assert_eq!(sum(page, "a", &["x=\"1\"", "y=\"3\""]), 4);
        assert_eq!(sum(page, "b", &[]), 6);
        assert_eq!(sum(page, "c", &[]), 0);
    }
}
