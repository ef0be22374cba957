//! What was measured, as a page of Markdown. Nothing here measures anything.

use std::{fmt::Write as _, time::Duration};

use crate::generator::{Latencies, Saturation};

/// All that a run found.
#[derive(Debug, Default)]
pub(crate) struct Results {
    /// Lines above the tables: command, versions, cores, rounds.
    pub(crate) header: Vec<String>,
    pub(crate) sections: Vec<Section>,
    pub(crate) memory: Vec<Memory>,
}

/// One workload.
#[derive(Debug)]
pub(crate) struct Section {
    pub(crate) title: &'static str,
    /// Requests per second that the upstream serves without a proxy.
    pub(crate) alone: f64,
    /// Requests per second of the open loop.
    pub(crate) rate: Option<u32>,
    pub(crate) rows: Vec<Row>,
}

/// One contender's rounds of one workload.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) saturations: Vec<Saturation>,
    pub(crate) latencies: Vec<Latencies>,
}

/// What idle connections cost a contender.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) name: &'static str,
    pub(crate) connections: usize,
    /// KiB: before them, as soon as all had their answer, and after some quiet.
    pub(crate) before: u64,
    pub(crate) at_once: u64,
    pub(crate) later: u64,
    pub(crate) quiet: Duration,
}

/// The middle of several rounds, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let upper = *values.get(values.len() / 2)?;
        let lower = *values.get((values.len() - 1) / 2)?;
        Some(Self { median: f64::midpoint(lower, upper), min, max })
    }

    /// With this many digits after the point.
    pub(crate) fn show(self, digits: usize) -> String {
        let Self { median, min, max } = self;
        format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
    }
}

impl Saturation {
    /// CPU microseconds of the proxy per request.
    pub(crate) fn cost(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }

    /// Requests per second.
    pub(crate) fn speed(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// How much of its core the proxy used, in percent.
    pub(crate) fn busy(&self) -> f64 {
        self.cpu.as_secs_f64() / self.elapsed.as_secs_f64() * 100.0
    }
}

impl Latencies {
    /// The time in microseconds within which this share of the requests was answered.
    pub(crate) fn percentile(&self, share: f64) -> Option<f64> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to its length"
        )]
        let rank = (self.sorted.len() as f64 * share).ceil() as usize;
        self.sorted.get(rank.saturating_sub(1)).map(|latency| latency.as_secs_f64() * 1e6)
    }
}

impl Row {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, saturations: Vec::new(), latencies: Vec::new() }
    }

    pub(crate) fn cost(&self) -> Option<Spread> {
        Spread::of(self.saturations.iter().map(Saturation::cost))
    }

    pub(crate) fn speed(&self) -> Option<Spread> {
        Spread::of(self.saturations.iter().map(Saturation::speed))
    }

    pub(crate) fn busy(&self) -> f64 {
        Spread::of(self.saturations.iter().map(Saturation::busy)).map_or(0.0, |busy| busy.median)
    }

    fn errors(&self) -> u64 {
        self.saturations.iter().map(|round| round.errors).sum::<u64>()
            + self.latencies.iter().map(|round| round.errors).sum::<u64>()
    }
}

/// What each contender used and did while it was asked as fast as it answers; `speed` is what its
/// answers in a second are called.
pub(crate) fn saturation(page: &mut String, title: &str, speed: &str, rows: &[Row], peer: &str) {
    let _ = writeln!(
        page,
        "\n## {title}\n\n| | CPU µs | × | {speed} | × | busy % |\n|---|---|---|---|---|---|"
    );
    let peer = rows.iter().find(|row| row.name == peer);
    for row in rows {
        let (Some(cost), Some(speed)) = (row.cost(), row.speed()) else { continue };
        let _ = writeln!(
            page,
            "| {} | {} | {} | {} | {} | {:.0} |",
            row.name,
            cost.show(1),
            ratio(cost.median, peer.and_then(Row::cost).map(|cost| cost.median)),
            speed.show(0),
            ratio(speed.median, peer.and_then(Row::speed).map(|speed| speed.median)),
            row.busy(),
        );
    }
}

impl Section {
    /// How many times what the fastest proxy reaches the upstream alone serves.
    fn reserve(&self) -> Option<f64> {
        let fastest = self.rows.iter().filter_map(Row::speed).map(|speed| speed.median);
        fastest.reduce(f64::max).map(|fastest| self.alone / fastest)
    }
}

const PERCENTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// How much of its core a proxy uses when it is what limits the requests, in percent.
pub(crate) const SATURATED: f64 = 90.0;
/// What the upstream alone must serve, as a multiple of the fastest proxy.
const RESERVE: f64 = 2.0;

impl Results {
    /// How many requests were answered wrongly, late or not at all.
    pub(crate) fn errors(&self) -> u64 {
        self.sections.iter().flat_map(|section| &section.rows).map(Row::errors).sum()
    }

    /// The page; ratios are to `peer`, in this same run.
    pub(crate) fn markdown(&self, peer: &str) -> String {
        let mut page = String::from("# Results of the load bench\n\n");
        for line in &self.header {
            let _ = writeln!(page, "- {line}");
        }
        let _ = writeln!(
            page,
            "\nEach figure is the median of all rounds, with the least and the greatest; `×` is the \
             ratio of a median to {peer}'s.\n\n\
             **CPU** is what counts: user and system time of the proxy's processes, in microseconds \
             per request, while all clients ask as fast as they are answered. **Busy** is how much \
             of its core that was: below 90 %, the proxy was not what limited the requests."
        );
        for section in &self.sections {
            section.write(&mut page, peer);
        }
        if !self.memory.is_empty() {
            self.write_memory(&mut page, peer);
        }
        let errors = self.errors();
        let _ = writeln!(page, "\nRequests without the right answer: {errors}.");
        page
    }

    fn write_memory(&self, page: &mut String, peer: &str) {
        let connections = self.memory.first().map_or(0, |memory| memory.connections);
        let quiet = self.memory.first().map_or(0, |memory| memory.quiet.as_secs());
        let _ = writeln!(
            page,
            "\n## Memory of idle connections\n\n\
             {connections} keep-alive connections, each of which made one request: resident memory \
             of a fresh process, in KiB per connection.\n\n\
             | | at once | × | after {quiet} s | × |\n|---|---|---|---|---|"
        );
        let of = |memory: &Memory, now: u64| {
            now.saturating_sub(memory.before) as f64 / memory.connections as f64
        };
        let peer = self.memory.iter().find(|memory| memory.name == peer);
        for memory in &self.memory {
            let _ = write!(page, "| {} ", memory.name);
            for time in [|memory: &Memory| memory.at_once, |memory: &Memory| memory.later] {
                let cost = of(memory, time(memory));
                let ratio = ratio(cost, peer.map(|peer| of(peer, time(peer))));
                let _ = write!(page, "| {cost:.2} | {ratio} ");
            }
            page.push_str("|\n");
        }
    }
}

impl Section {
    fn write(&self, page: &mut String, peer: &str) {
        saturation(page, self.title, "requests/s", &self.rows, peer);
        let peer = self.rows.iter().find(|row| row.name == peer);
        for row in self.rows.iter().filter(|row| row.busy() < SATURATED) {
            let _ = writeln!(
                page,
                "\n**{} was not saturated**: somebody else used one of the cores, and an idle proxy \
                 wakes up for fewer requests at a time. Measure again.",
                row.name
            );
        }
        if let Some(reserve) = self.reserve() {
            let judgement = if reserve >= RESERVE {
                "as it should be"
            } else {
                "**too little**: requests per second say little here, CPU per request still holds"
            };
            let _ = writeln!(
                page,
                "\nThe upstream alone, asked from the proxies' core, serves {:.0} requests/s: \
                 {reserve:.1} times the fastest proxy ({judgement}; at least {RESERVE:.0}).",
                self.alone
            );
        }
        self.write_latencies(page, peer);
    }

    fn write_latencies(&self, page: &mut String, peer: Option<&Row>) {
        let Some(rate) = self.rate else { return };
        if self.rows.iter().all(|row| row.latencies.is_empty()) {
            return;
        }
        let _ = writeln!(page, "\nLatency at {rate} requests/s (open loop), in µs:\n");
        page.push_str("| |");
        for (name, _) in PERCENTILES {
            let _ = write!(page, " {name} | × |");
        }
        page.push_str("\n|---|");
        page.push_str(&"---|---|".repeat(PERCENTILES.len()));
        page.push('\n');
        let spread = |row: &Row, share| {
            Spread::of(row.latencies.iter().filter_map(|round| round.percentile(share)))
        };
        for row in &self.rows {
            let _ = write!(page, "| {} |", row.name);
            for (_, share) in PERCENTILES {
                let Some(latency) = spread(row, share) else { continue };
                let peer = peer.and_then(|peer| spread(peer, share));
                let ratio = ratio(latency.median, peer.map(|peer| peer.median));
                let _ = write!(page, " {} | {ratio} |", latency.show(0));
            }
            page.push('\n');
        }
    }
}

pub(crate) fn ratio(value: f64, to: Option<f64>) -> String {
    match to {
        Some(to) if to > 0.0 => format!("{:.2}", value / to),
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_the_middle() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        let four = spread(&[1.0, 2.0, 4.0, 9.0]);
        assert_eq!(four, Some(Spread { median: 3.0, min: 1.0, max: 9.0 }));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn a_percentile_is_the_slowest_of_its_share() {
        let sorted = (1..=1_000).map(Duration::from_micros).collect();
        let latencies = Latencies { sorted, errors: 0 };
        assert_eq!(latencies.percentile(0.5), Some(500.0));
        assert_eq!(latencies.percentile(0.999).map(f64::round), Some(999.0));
        assert_eq!(latencies.percentile(1.0), Some(1_000.0));
        assert_eq!(Latencies::default().percentile(0.5), None);
    }

    fn row(name: &'static str, requests: u64, errors: u64) -> Row {
        let second = Duration::from_secs(1);
        let round = Saturation { requests, elapsed: second, cpu: second, errors };
        Row { name, saturations: vec![round], latencies: Vec::new() }
    }

    #[test]
    fn ratios_are_to_the_peer_of_the_same_run() {
        let rows = vec![row("litegate", 40_000, 0), row("haproxy", 50_000, 2)];
        let section = Section { title: "GET", alone: 90_000.0, rate: None, rows };
        let results = Results { sections: vec![section], ..Results::default() };
        let page = results.markdown("haproxy");
        let line =
            "| litegate | 25.0 (25.0 to 25.0) | 1.25 | 40000 (40000 to 40000) | 0.80 | 100 |";
        assert!(page.contains(line), "{page}");
        assert!(!page.contains("not saturated"), "{page}");
        assert!(page.contains("1.8 times the fastest proxy (**too little**"), "{page}");
        assert!(page.contains("without the right answer: 2"), "{page}");
    }

    #[test]
    fn a_proxy_with_time_to_spare_is_named() {
        let mut idle = row("litegate", 40_000, 0);
        idle.saturations[0].elapsed *= 2;
        let section = Section { title: "GET", alone: 90_000.0, rate: None, rows: vec![idle] };
        let page = Results { sections: vec![section], ..Results::default() }.markdown("haproxy");
        assert!(page.contains("**litegate was not saturated**"), "{page}");
    }

    #[test]
    fn memory_is_counted_per_connection() {
        let memory = Memory {
            name: "litegate",
            connections: 100,
            before: 1_000,
            at_once: 1_900,
            later: 1_300,
            quiet: Duration::from_secs(3),
        };
        let results = Results { memory: vec![memory], ..Results::default() };
        let page = results.markdown("haproxy");
        assert!(page.contains("| litegate | 9.00 | – | 3.00 | – |"), "{page}");
    }
}
