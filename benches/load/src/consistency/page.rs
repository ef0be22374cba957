//! What consistency costs, as a page of Markdown. Nothing here measures anything.

use std::{fmt::Write as _, time::Duration};

use crate::{generator::Saturation, report::Spread};

/// What a read with a token may cost, as a multiple of one without.
const DEAREST: f64 = 1.05;
/// How much of its core litegate uses when it is what limits the requests, in percent.
const SATURATED: f64 = 90.0;

/// All that a run found.
#[derive(Debug, Default)]
pub(super) struct Costs {
    pub(super) header: Vec<String>,
    /// The first row is the one without a token.
    pub(super) reads: Vec<Row>,
    /// Likewise.
    pub(super) writes: Vec<Row>,
    pub(super) feed: Vec<Feed>,
    pub(super) held: Option<Held>,
}

/// One kind of request.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) rounds: Vec<Saturation>,
    pub(super) wrong: u64,
    /// Tokens given out, and exact positions asked for.
    pub(super) issued: u64,
    pub(super) exact: u64,
}

/// One state of the feed, a figure for each round.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) name: &'static str,
    /// Transactions per second of each node.
    pub(super) rate: Vec<f64>,
    /// Percent of a core: the process, and its control thread.
    pub(super) all: Vec<f64>,
    pub(super) control: Vec<f64>,
    /// MiB.
    pub(super) resident: Vec<f64>,
    pub(super) wrong: u64,
}

/// Writes that waited for a primary.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) writes: usize,
    /// KiB: before their connections, with each having asked once, and after some quiet.
    pub(super) before: u64,
    pub(super) connected: u64,
    pub(super) parked: u64,
    /// KiB: when all wait, after some time, and when all are answered.
    pub(super) waiting: u64,
    pub(super) settled: u64,
    pub(super) after: u64,
    /// Percent of a core before they wait, and while they do.
    pub(super) idle: f64,
    pub(super) cpu: f64,
    /// From the new primary until the last answer.
    pub(super) release: Duration,
    pub(super) wrong: u64,
}

impl Row {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, rounds: Vec::new(), wrong: 0, issued: 0, exact: 0 }
    }

    fn cost(&self) -> Option<Spread> {
        Spread::of(self.rounds.iter().map(Saturation::cost))
    }

    fn busy(&self) -> f64 {
        Spread::of(self.rounds.iter().map(Saturation::busy)).map_or(0.0, |busy| busy.median)
    }
}

impl Feed {
    pub(super) fn new(name: &'static str) -> Self {
        let none = Vec::new;
        Self { name, rate: none(), all: none(), control: none(), resident: none(), wrong: 0 }
    }
}

impl Costs {
    /// Requests without the right answer, and whatever else was not as it should be.
    pub(super) fn wrong(&self) -> u64 {
        let rows = self.reads.iter().chain(&self.writes).map(|row| row.wrong);
        let feed = self.feed.iter().map(|feed| feed.wrong);
        rows.chain(feed).chain(self.held.as_ref().map(|held| held.wrong)).sum()
    }

    pub(super) fn markdown(&self) -> String {
        let mut page = String::from("# What consistency costs\n\n");
        for line in &self.header {
            let _ = writeln!(page, "- {line}");
        }
        page.push_str(
            "\nThree nodes that speak LiteFS's API and have always the same; litegate follows them \
             all. Each figure is the median of all rounds, with the least and the greatest. **CPU** \
             is user and system time of all of litegate's threads in microseconds per request, while \
             64 clients ask as fast as they are answered; `×` is the ratio to the first row.\n",
        );
        page.push_str(
            "\n## A read with a token\n\nGET, 128 bytes, from replicas that are far enough.\n\n",
        );
        rows(&mut page, "token", &self.reads);
        let dearest = ratios(&self.reads).skip(2).map(|(_, ratio)| ratio).reduce(f64::max);
        if let Some(dearest) = dearest {
            let judgement = if dearest <= DEAREST { "as it should be" } else { "**too much**" };
            let _ = writeln!(
                page,
                "\nThe dearest token costs {dearest:.3} times a read without ({judgement}; at most {DEAREST})."
            );
        }
        page.push_str("\n## A write whose client gets a token\n\nPOST, 1 KiB.\n\n");
        rows(&mut page, "where the position comes from", &self.writes);
        for row in self.writes.iter().filter(|row| row.exact > 0) {
            let _ = writeln!(
                page,
                "\n{}: {} of {} writes asked the node for its exact position; those that ask at once share a reading.",
                row.name, row.exact, row.issued
            );
        }
        self.write_feed(&mut page);
        if let Some(held) = &self.held {
            held.write(&mut page);
        }
        let _ = writeln!(page, "\nWrong: {}.", self.wrong());
        page
    }

    fn write_feed(&self, page: &mut String) {
        page.push_str(
            "\n## The feed of positions\n\nNo request; litegate follows `/events` of three nodes, and polls `/info` once a second.\n\n\
             | | transactions/s of each node | CPU, % of a core | of it the control thread | resident MiB |\n|---|---|---|---|---|\n",
        );
        for feed in &self.feed {
            let show = |values: &[f64], digits| {
                Spread::of(values.iter().copied()).map_or_else(String::new, |s| s.show(digits))
            };
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} |",
                feed.name,
                show(&feed.rate, 0),
                show(&feed.all, 2),
                show(&feed.control, 2),
                show(&feed.resident, 2)
            );
        }
    }
}

impl Held {
    fn write(&self, page: &mut String) {
        let each = |now: u64| now.saturating_sub(self.before) as f64 / self.writes.max(1) as f64;
        let _ = writeln!(
            page,
            "\n## Writes that are held\n\n{} connections, each of which made one read, then send a POST of 1 KiB \
             while there is no primary: resident memory beyond that of a fresh process, in KiB per connection.\n\n\
             | | KiB |\n|---|---|\n| idle, at once | {:.2} |\n| idle, after some seconds | {:.2} |\n\
             | held, at once | {:.2} |\n| held, after some seconds | {:.2} |\n| answered | {:.2} |\n\n\
             While they wait, litegate uses {:.2} % of a core (before: {:.2} %). All of them were answered \
             {:.0} ms after there was a primary again.",
            self.writes,
            each(self.connected),
            each(self.parked),
            each(self.waiting),
            each(self.settled),
            each(self.after),
            self.cpu,
            self.idle,
            self.release.as_secs_f64() * 1e3
        );
    }
}

/// Each row with its cost as a multiple of the first one's.
fn ratios(rows: &[Row]) -> impl Iterator<Item = (&Row, f64)> {
    let first = rows.first().and_then(Row::cost).map_or(f64::NAN, |cost| cost.median);
    rows.iter().filter_map(move |row| Some((row, row.cost()?.median / first)))
}

fn rows(page: &mut String, what: &str, rows: &[Row]) {
    let _ = writeln!(page, "| {what} | CPU µs | × | busy % |\n|---|---|---|---|");
    for (row, ratio) in ratios(rows) {
        let Some(cost) = row.cost() else { continue };
        let (name, cost, busy) = (row.name, cost.show(2), row.busy());
        let _ = writeln!(page, "| {name} | {cost} | {ratio:.3} | {busy:.0} |");
    }
    if rows.iter().any(|row| row.busy() < SATURATED) {
        page.push_str(
            "\n**litegate was not saturated** in every row: it waited, or somebody else used one of the \
             cores. An idle proxy wakes up for fewer requests at a time.\n",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, micros: u64) -> Row {
        let second = Duration::from_secs(1);
        let cpu = Duration::from_micros(micros * 50_000);
        let found = Saturation { requests: 50_000, elapsed: second, cpu, errors: 0 };
        Row { rounds: vec![found], ..Row::new(name) }
    }

    #[test]
    fn a_token_that_costs_too_much_is_named() {
        let page = |micros| {
            let reads = vec![row("none", 20), row("other", 20), row("token", micros)];
            Costs { reads, ..Costs::default() }.markdown()
        };
        assert!(page(21).contains("| token | 21.00 (21.00 to 21.00) | 1.050 | 105 |"));
        assert!(page(21).contains("as it should be"));
        assert!(page(22).contains("costs 1.100 times a read without (**too much**"));
    }

    #[test]
    fn memory_is_counted_per_held_write() {
        let held = Held { writes: 100, before: 1_000, waiting: 3_000, wrong: 2, ..Held::default() };
        let costs = Costs { held: Some(held), ..Costs::default() };
        assert!(costs.markdown().contains("| held, at once | 20.00 |"));
        assert_eq!(costs.wrong(), 2);
    }
}
