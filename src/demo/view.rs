//! What the demo shows: pure text from plain values, and the screen that it is written to.

use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
    sync::{PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use crossterm::{
    cursor, event, execute,
    terminal::{self, ClearType},
};

use super::Tally;
use crate::{
    testkit::Cluster,
    topology::{Role, watch},
};

/// A moment of the demo.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    seconds: u64,
    event: &'static str,
    primary: Option<String>,
    term: u64,
    nodes: Vec<Node>,
    reads: u64,
    failed_reads: u64,
    acknowledged: usize,
    refused: u64,
    lost: usize,
    doubled: usize,
    longest: u64,
    plain: u64,
    plain_lost: u64,
}

#[derive(Clone, Debug, Default)]
struct Node {
    name: String,
    role: &'static str,
    alive: bool,
    served: u64,
}

impl State {
    pub(super) fn of(
        cluster: &Cluster,
        tally: &Tally,
        readers: &mut [watch::Reader],
        elapsed: Duration,
        event: &'static str,
    ) -> Self {
        let mut state = Self { seconds: elapsed.as_secs(), event, ..Self::default() };
        if let Some(reader) = readers.first_mut() {
            let topology = reader.latest();
            state.primary = topology.primary().map(|node| node.name.to_string());
            state.term = topology.term;
            for (index, place) in cluster.places().iter().enumerate() {
                let role = topology.named(&place.name).map_or(Role::Unknown, |node| node.role);
                state.nodes.push(Node {
                    name: place.name.clone(),
                    role: role.as_str(),
                    alive: cluster.is_alive(index),
                    served: cluster.served(index),
                });
            }
        }
        let books = Books::of(cluster, tally);
        state.acknowledged = books.acknowledged;
        state.lost = books.lost;
        state.doubled = books.doubled;
        state.reads = tally.reads.load(Relaxed);
        state.failed_reads = tally.failed_reads.load(Relaxed);
        state.refused = tally.refused.load(Relaxed);
        state.longest = tally.longest.load(Relaxed);
        state.plain = tally.plain.load(Relaxed);
        state.plain_lost = tally.plain_lost.load(Relaxed);
        state
    }

    /// For a log.
    pub(super) fn line(&self) -> String {
        format!(
            "{:3} s  {:15} primary {:6} term {:2}  reads {} ({} failed)  writes {} ({} lost, {} doubled, {} refused)  plain {} of {} lost",
            self.seconds,
            self.event,
            self.primary.as_deref().unwrap_or("-"),
            self.term,
            self.reads,
            self.failed_reads,
            self.acknowledged,
            self.lost,
            self.doubled,
            self.refused,
            self.plain_lost,
            self.plain,
        )
    }

    /// For a screen.
    pub(super) fn page(&self) -> String {
        let mut page = String::new();
        let primary = self.primary.as_deref().unwrap_or("nobody: writes wait");
        let _ = writeln!(
            page,
            "{:3} s   {:16} primary: {primary} (term {})\n",
            self.seconds, self.event, self.term
        );
        for node in &self.nodes {
            let role = if node.alive { node.role } else { "dead" };
            let _ = writeln!(
                page,
                "  {:8} {:8} {:6} requests  {}",
                node.name,
                role,
                node.served,
                bar(node.served)
            );
        }
        let _ = write!(
            page,
            "\n  through litegate    reads  {:6}   failed {}\n                      writes {:6}   lost {}   doubled {}   refused {}\n                      longest wait of a write {} ms\n  plain spreading     writes {:6}   lost {}\n\n  f hand over   k kill the primary   r restart   q quit\n",
            self.reads,
            self.failed_reads,
            self.acknowledged,
            self.lost,
            self.doubled,
            self.refused,
            self.longest,
            self.plain,
            self.plain_lost,
        );
        page
    }
}

fn bar(n: u64) -> String {
    "#".repeat(usize::try_from(n / 50).unwrap_or(0).min(40))
}

/// Acknowledged writes against what really ran.
struct Books {
    acknowledged: usize,
    lost: usize,
    doubled: usize,
}

impl Books {
    fn of(cluster: &Cluster, tally: &Tally) -> Self {
        let acknowledged =
            tally.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ledger = cluster.ledger();
        let ran = |id: &String| ledger.get(id).map_or(0, |written| written.on.len());
        Self {
            lost: acknowledged.iter().filter(|id| ran(id) == 0).count(),
            // Refused ones must not have run twice either.
            doubled: ledger.values().filter(|written| written.on.len() > 1).count(),
            acknowledged: acknowledged.len(),
        }
    }
}

/// How it went.
pub(super) struct Summary {
    books: Books,
    reads: u64,
    failed_reads: u64,
    refused: u64,
    plain: u64,
    plain_lost: u64,
    seconds: u64,
    finished: bool,
}

impl Summary {
    pub(super) fn of(cluster: &Cluster, tally: &Tally, elapsed: Duration, finished: bool) -> Self {
        Self {
            books: Books::of(cluster, tally),
            reads: tally.reads.load(Relaxed),
            failed_reads: tally.failed_reads.load(Relaxed),
            refused: tally.refused.load(Relaxed),
            plain: tally.plain.load(Relaxed),
            plain_lost: tally.plain_lost.load(Relaxed),
            seconds: elapsed.as_secs(),
            finished,
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.finished
            && self.books.lost == 0
            && self.books.doubled == 0
            && self.failed_reads == 0
            && self.books.acknowledged > 0
            && self.reads > 0
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { books, .. } = self;
        writeln!(f, "{} s, {} reads ({} failed)", self.seconds, self.reads, self.failed_reads)?;
        writeln!(
            f,
            "{} writes acknowledged: {} lost, {} ran twice; {} answered with an honest error",
            books.acknowledged, books.lost, books.doubled, self.refused
        )?;
        writeln!(
            f,
            "without litegate: {} of {} writes answered 200 were lost",
            self.plain_lost, self.plain
        )?;
        if !self.finished {
            writeln!(f, "some clients never got an answer")?;
        }
        write!(f, "{}", if self.is_good() { "no write was lost" } else { "NOT GOOD" })
    }
}

/// The terminal, put back in order when dropped.
pub(super) struct Screen {
    lines: u16,
}

impl Screen {
    pub(super) fn open() -> Self {
        let _ = terminal::enable_raw_mode();
        Self { lines: 0 }
    }

    pub(super) fn draw(&mut self, state: &State) {
        let page = state.page();
        let mut out = io::stdout();
        if self.lines > 0 {
            let _ = execute!(out, cursor::MoveUp(self.lines));
        }
        let _ = execute!(out, cursor::MoveToColumn(0), terminal::Clear(ClearType::FromCursorDown));
        self.lines = u16::try_from(page.matches('\n').count()).unwrap_or(0);
        // In raw mode a line feed does not go back to the first column.
        let _ = out.write_all(page.replace('\n', "\r\n").as_bytes());
        let _ = out.flush();
    }

    /// A key that was pressed since the last look. Control-C is `q`.
    pub(super) fn key(&self) -> Option<char> {
        if !event::poll(Duration::ZERO).unwrap_or(false) {
            return None;
        }
        match event::read() {
            Ok(event::Event::Key(key)) => match key.code {
                event::KeyCode::Char('c')
                    if key.modifiers.contains(event::KeyModifiers::CONTROL) =>
                {
                    Some('q')
                }
                event::KeyCode::Char(key) => Some(key),
                _ => None,
            },
            _ => None,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = terminal::disable_raw_mode();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_who_is_primary_and_what_was_lost() {
        let node = |name: &str, role| Node { name: name.into(), role, alive: true, served: 120 };
        let state = State {
            seconds: 7,
            event: "handed over",
            primary: Some("app-1".into()),
            term: 2,
            nodes: vec![node("app-0", "replica"), node("app-1", "primary")],
            acknowledged: 40,
            plain: 9,
            plain_lost: 6,
            ..State::default()
        };
        insta::assert_snapshot!(state.page(), @r"
          7 s   handed over      primary: app-1 (term 2)

          app-0    replica     120 requests  ##
          app-1    primary     120 requests  ##

          through litegate    reads       0   failed 0
                              writes     40   lost 0   doubled 0   refused 0
                              longest wait of a write 0 ms
          plain spreading     writes      9   lost 6

          f hand over   k kill the primary   r restart   q quit
        ");
    }
}
