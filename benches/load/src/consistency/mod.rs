//! What litegate's promises cost: tokens, the feed of positions, and writes that are held.
//!
//! Before three nodes that speak LiteFS's contract ([`cluster`]). litegate's own metrics say
//! whether it did what is measured: a round in which it did not counts its requests as wrong.

mod cluster;
mod page;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    Failure, Rounds,
    contender::{self, Running},
    generator::{self, Clients},
    machine::{self, Cores, Tree},
    message::field,
    workload::{self, Workload},
};
use cluster::Cluster;
use page::{Costs, Feed, Held, Row};

/// `consistency.mode`
const TOKEN: &str = "token";
const OFF: &str = "off";
/// Tokens in the hands of clients, each another one.
const TOKENS: usize = 64;
/// Of each of the three nodes.
const TRANSACTIONS: u32 = 1_000;
/// Writes that wait for a primary: all that `hold.max_requests` allows.
const WRITES: usize = 1_000;
const PATIENCE: Duration = Duration::from_secs(10);

/// Measures everything. Returns the page and the number of wrong answers.
pub(crate) fn run(
    litegate: &Path,
    cores: Cores,
    rounds: Rounds,
    header: Vec<String>,
) -> Result<(String, u64), Failure> {
    let bench =
        Bench { litegate, cores, rounds, cluster: Cluster::start(cores.load, &workload::sizes())? };
    let token = bench.start(TOKEN)?;
    let off = bench.start(OFF)?;
    let mut costs = Costs { header, ..Costs::default() };
    costs.reads = bench.reads(&token)?;
    costs.writes = bench.writes(&token, &off)?;
    drop((token, off));
    costs.feed = bench.feed()?;
    costs.held = Some(bench.held()?);
    Ok((costs.markdown(), costs.wrong()))
}

struct Bench<'a> {
    litegate: &'a Path,
    cores: Cores,
    rounds: Rounds,
    cluster: Cluster,
}

impl Bench<'_> {
    fn start(&self, mode: &'static str) -> Result<Running, Failure> {
        let filled = [("@mode@", mode), ("@nodes@", &self.cluster.members())];
        let running =
            contender::consistency(mode).start_with(self.litegate, &filled, self.cores)?;
        follows(&running, &self.cluster)?;
        Ok(running)
    }

    /// Reads with and without a token, all replicas caught up.
    fn reads(&self, proxy: &Running) -> Result<Vec<Row>, Failure> {
        let get = Workload::named("get")?;
        let tokens = self.tokens(proxy)?;
        let longest = tokens.iter().map(String::len).max().unwrap_or_default();
        let each = |field: &dyn Fn(&str) -> String| {
            tokens.iter().map(|token| get.request_with(&field(token))).collect::<Vec<_>>()
        };
        let cookie = |token: &str| format!("Cookie: litegate={token}\r\n");
        let other = format!("Cookie: sessions={}\r\n", "x".repeat(longest));
        let txid = self.cluster.txid();
        let kinds = [
            ("none", vec![get.request()], false, false),
            ("none, but another cookie as long", vec![get.request_with(&other)], false, false),
            ("cookie, each client its own", each(&cookie), false, true),
            ("cookie, another in each request", each(&cookie), true, true),
            (
                "`Litegate-Token`",
                each(&|token| format!("Litegate-Token: {token}\r\n")),
                false,
                true,
            ),
            (
                "LiteFS's `__txid`",
                vec![get.request_with(&format!("Cookie: __txid={txid:016x}\r\n"))],
                false,
                true,
            ),
        ];
        let mut rows: Vec<Row> = kinds.iter().map(|(name, ..)| Row::new(name)).collect();
        for round in 1..=self.rounds.count {
            for (row, (_, requests, in_turn, is_token)) in rows.iter_mut().zip(&kinds) {
                let before = Counts::of(proxy)?;
                let clients = Clients::with(proxy.address, get, requests.clone(), *in_turn)?;
                let found = row.measure(clients, self.rounds.span, proxy, "reads", round)?;
                let now = Counts::of(proxy)?;
                let expected = if *is_token { found } else { 0 };
                row.wrong += expected.saturating_sub(now.fresh - before.fresh);
                row.wrong += now.elsewhere - before.elsewhere + now.void - before.void;
                if !is_token {
                    row.wrong += now.fresh - before.fresh;
                }
            }
        }
        Ok(rows)
    }

    /// As many writes, and what their clients are told to carry along.
    fn tokens(&self, proxy: &Running) -> Result<Vec<String>, Failure> {
        let post = Workload::named("post-1k")?;
        self.cluster.tells(true);
        self.cluster.commits(true);
        let mut stream = TcpStream::connect(proxy.address)?;
        let tokens = (0..TOKENS).map(|_| {
            let answer = generator::ask_once(&mut stream, &post.request())?;
            let token = field(&answer, b"litegate-token").ok_or("a write got no token")?;
            Ok(String::from_utf8_lossy(token).into_owned())
        });
        let tokens = tokens.collect::<Result<Vec<_>, Failure>>()?;
        self.cluster.commits(false);
        follows(proxy, &self.cluster)?;
        Ok(tokens)
    }

    /// Writes whose clients get a token, beside writes whose don't.
    fn writes(&self, token: &Running, off: &Running) -> Result<Vec<Row>, Failure> {
        let post = Workload::named("post-1k")?;
        let kinds = [
            ("no token (`mode = \"off\"`)", off, true, 0),
            ("by LiteFS's `__txid`", token, true, 0),
            ("by `__txid`, 1,000 transactions a second", token, true, TRANSACTIONS),
            ("by exact readings", token, false, 0),
        ];
        let mut rows: Vec<Row> = kinds.iter().map(|(name, ..)| Row::new(name)).collect();
        for round in 1..=self.rounds.count {
            for (row, (_, proxy, tells, rate)) in rows.iter_mut().zip(kinds) {
                self.cluster.tells(tells);
                let (writes, misrouted) = self.cluster.writes();
                let before = Counts::of(proxy)?;
                let committing = (rate > 0).then(|| self.cluster.commit_at(rate)).transpose()?;
                let clients = Clients::with(proxy.address, post, vec![post.request()], false)?;
                let found = row.measure(clients, self.rounds.span, proxy, "writes", round)?;
                drop(committing);
                let now = Counts::of(proxy)?;
                let (writes_now, misrouted_now) = self.cluster.writes();
                row.wrong += found.saturating_sub(writes_now - writes);
                row.wrong += misrouted_now - misrouted + now.blind - before.blind;
                let issued = now.issued - before.issued;
                row.wrong +=
                    if std::ptr::eq(proxy, off) { issued } else { found.saturating_sub(issued) };
                row.exact += now.exact - before.exact;
                row.issued += issued;
                follows(proxy, &self.cluster)?;
            }
        }
        Ok(rows)
    }

    /// What it takes to know where the nodes are, without a request.
    fn feed(&self) -> Result<Vec<Feed>, Failure> {
        let proxy = self.start(TOKEN)?;
        let tree = proxy.tree()?;
        let mut idle = Feed::new("idle");
        let mut busy = Feed::new("1,000 transactions a second from each of three nodes");
        for round in 1..=self.rounds.count {
            for (feed, rate) in [(&mut idle, 0), (&mut busy, TRANSACTIONS)] {
                let committing = (rate > 0).then(|| self.cluster.commit_at(rate)).transpose()?;
                let (txid, since) = (self.cluster.txid(), Instant::now());
                let (all, control) = spent(&tree, 2 * self.rounds.span, Some("control"))?;
                let took = since.elapsed().as_secs_f64();
                feed.all.push(all);
                feed.control.push(control);
                feed.rate.push((self.cluster.txid() - txid) as f64 / took);
                feed.resident.push(tree.resident()? as f64 / 1024.0);
                drop(committing);
                // Whatever was told has to be known.
                feed.wrong += u64::from(follows(&proxy, &self.cluster).is_err());
                eprintln!(
                    "feed {round}: {} {all:.2} % of a core, control {control:.2} %",
                    feed.name
                );
            }
        }
        Ok(vec![idle, busy])
    }

    /// Writes without a primary.
    fn held(&self) -> Result<Held, Failure> {
        let post = Workload::named("post-1k")?;
        self.cluster.tells(true);
        let proxy = self.start(TOKEN)?;
        let tree = proxy.tree()?;
        // The first ones make the process allocate what it needs once.
        drop(generator::idle(proxy.address, 8, &post.request())?);
        let mut held = Held { writes: WRITES, before: tree.resident()?, ..Held::default() };
        let open = generator::idle(proxy.address, WRITES, &Workload::named("get")?.request())?;
        held.connected = tree.resident()?;
        (held.idle, _) = spent(&tree, 3 * self.rounds.span, None)?;
        held.parked = tree.resident()?;

        self.cluster.elect(None);
        metric(&proxy, "litegate_primary_known", 0)?;
        let (arrived, misrouted) = self.cluster.writes();
        let mut clients = open;
        for stream in &mut clients {
            stream.write_all(&post.request())?;
        }
        metric(&proxy, "litegate_held_requests", WRITES as u64)?;
        held.waiting = tree.resident()?;
        (held.cpu, _) = spent(&tree, 3 * self.rounds.span, None)?;
        held.settled = tree.resident()?;
        eprintln!(
            "held: {} KiB, then {} KiB, {:.2} % of a core",
            held.waiting, held.settled, held.cpu
        );
        held.wrong += self.cluster.writes().0 - arrived;

        self.cluster.elect(Some(0));
        let released = Instant::now();
        for stream in &mut clients {
            held.wrong += u64::from(answer(stream).is_err());
        }
        held.release = released.elapsed();
        let (writes, misrouted_now) = self.cluster.writes();
        // Each of them once.
        held.wrong += (writes - arrived).abs_diff(WRITES as u64) + misrouted_now - misrouted;
        held.after = tree.resident()?;
        Ok(held)
    }
}

impl Row {
    /// One round. Returns the number of requests that were answered well.
    fn measure(
        &mut self,
        mut clients: Clients,
        span: Duration,
        proxy: &Running,
        what: &str,
        round: usize,
    ) -> Result<u64, Failure> {
        let tree = proxy.tree()?;
        let found = clients.saturate(span, || tree.cpu())?;
        let (cost, busy, errors) = (found.cost(), found.busy(), found.errors);
        eprintln!("{what} {round}: {} {cost:.2} µs, {busy:.0} % busy, {errors} errors", self.name);
        self.wrong += errors;
        let requests = found.requests;
        self.rounds.push(found);
        Ok(requests)
    }
}

/// How much of a core it uses while `span` passes, in percent: all of it, and that thread.
fn spent(tree: &Tree, span: Duration, thread: Option<&str>) -> Result<(f64, f64), Failure> {
    let read = || Ok::<_, Failure>((tree.cpu()?, tree.cpu_of(thread)?));
    let ((all, one), since) = (read()?, Instant::now());
    // Time that passes is what is measured here.
    std::thread::sleep(span);
    let ((all_now, one_now), took) = (read()?, since.elapsed().as_secs_f64());
    let percent = |spent: Duration| spent.as_secs_f64() / took * 100.0;
    Ok((percent(all_now.saturating_sub(all)), percent(one_now.saturating_sub(one))))
}

/// Waits until litegate knows a primary, and a replica that is where the primary is.
fn follows(proxy: &Running, cluster: &Cluster) -> Result<(), Failure> {
    metric(proxy, "litegate_primary_known", 1)?;
    if proxy.name == OFF {
        return Ok(());
    }
    let txid = cluster.txid();
    let cookie = format!("Cookie: __txid={txid:016x}\r\n");
    let request = Workload::named("get")?.request_with(&cookie);
    machine::until("a replica that is far enough", PATIENCE, || {
        let before = Counts::of(proxy).ok()?;
        let mut stream = TcpStream::connect(proxy.address).ok()?;
        generator::ask_once(&mut stream, &request).ok()?;
        (Counts::of(proxy).ok()?.fresh > before.fresh).then_some(())
    })
}

/// Waits until the sum of a metric is that.
fn metric(proxy: &Running, name: &str, value: u64) -> Result<(), Failure> {
    machine::until(&format!("{name} {value}"), PATIENCE, || {
        let page = get(proxy.admin, "/metrics").ok()?;
        (sum(&page, name, "") == value).then_some(())
    })
}

/// What litegate counted.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Reads with a token that a replica served at once.
    fresh: u64,
    /// Other reads with a token.
    elsewhere: u64,
    void: u64,
    issued: u64,
    exact: u64,
    blind: u64,
}

impl Counts {
    fn of(proxy: &Running) -> Result<Self, Failure> {
        let page = get(proxy.admin, "/metrics")?;
        let fresh = sum(&page, "litegate_token_reads_total", "decision=\"fresh\"");
        Ok(Self {
            fresh,
            elsewhere: sum(&page, "litegate_token_reads_total", "") - fresh,
            void: sum(&page, "litegate_tokens_invalid_total", ""),
            issued: sum(&page, "litegate_tokens_issued_total", ""),
            exact: sum(&page, "litegate_exact_positions_total", ""),
            blind: sum(&page, "litegate_writes_without_position_total", ""),
        })
    }
}

/// The sum of all series of a metric that have `label`.
fn sum(page: &str, name: &str, label: &str) -> u64 {
    let series = page.lines().filter_map(|line| line.strip_prefix(name));
    let series = series.filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(label));
    series.filter_map(|rest| rest.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
}

/// GETs a path of litegate's admin listener.
fn get(admin: SocketAddr, path: &str) -> Result<String, Failure> {
    let mut stream = TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: admin\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if !answer.starts_with("HTTP/1.1 200 ") && !answer.starts_with("HTTP/1.0 200 ") {
        return Err(format!("{path} answered: {answer}").into());
    }
    Ok(answer)
}

/// Reads the answer to a request that was sent before.
fn answer(stream: &mut TcpStream) -> Result<(), Failure> {
    generator::ask_once(stream, b"").map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_by_whole_name_and_label() {
        let page = "# HELP a_total b\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"2\"} 4\na_total_more 5\na 6\n";
        assert_eq!(sum(page, "a_total", ""), 7);
        assert_eq!(sum(page, "a_total", "x=\"1\""), 3);
        assert_eq!(sum(page, "a", ""), 6);
    }
}
