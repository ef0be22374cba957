//! litegate, nginx and HAProxy side by side under the same load: `docs/benchmarks.md`.
//!
//! Each proxy has one core and one worker; this process, which is the clients and the upstream,
//! has another. The proxies take turns, round by round, so that a noisy minute hits all of them.
#![expect(clippy::disallowed_methods, reason = "a bench measures with the real clock")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is what it is for")]

mod consistency;
mod contender;
mod floods;
mod generator;
mod machine;
mod message;
mod protocols;
mod report;
mod upstream;
mod websocket;
mod workload;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use clap::Parser;

use contender::{CONTENDERS, Contender, PEER, Running};
use generator::{Clients, Saturation};
use machine::Cores;
use report::{Memory, Results, Row, Section, Spread};
use upstream::Upstream;
use workload::{WORKLOADS, Workload};

/// Anything that keeps the bench from measuring; said once, by `main`.
pub(crate) type Failure = Box<dyn std::error::Error>;

/// litegate's own directory: the bench runs from anywhere in it.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const RESULTS: &str = "benches/load/RESULTS.md";
const CONSISTENCY: &str = "benches/load/RESULTS-consistency.md";
const PROTOCOLS: &str = "benches/load/RESULTS-protocols.md";
const MEMORY: &str = "benches/load/RESULTS-memory.md";
const FLOODS: &str = "benches/load/RESULTS-floods.md";
/// The fewest rounds of which a median is worth committing.
const ROUNDS: usize = 5;
const IDLE_CONNECTIONS: usize = 3_000;
/// For three times 5,000 connections and what else there is.
const DESCRIPTORS: u64 = 16_000;
/// litegate takes a connection's machinery down after a second of quiet, checked once a second.
const QUIET: Duration = Duration::from_secs(3);

/// How long, and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounds {
    pub(crate) count: usize,
    pub(crate) span: Duration,
}

/// What a run measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// litegate beside nginx and HAProxy
    Proxies,
    /// What tokens, the feed of positions and held writes cost
    Consistency,
    /// TLS, HTTP/2 and WebSocket beside nginx and HAProxy
    Protocols,
    /// Idle and slow clients beside nginx and HAProxy
    Memory,
    /// What a well-behaved client notices of floods
    Floods,
}

/// Measures litegate beside nginx and HAProxy under the same load.
///
/// A whole run (no option that leaves something out) writes benches/load/RESULTS.md, or with
/// `--part consistency` RESULTS-consistency.md and so on; every run prints its results.
#[derive(Debug, Parser)]
struct Options {
    /// What to measure
    #[arg(long, value_enum, default_value_t = Part::Proxies)]
    part: Part,
    /// Rounds of each proxy
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// Length of a round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only these workloads: get, post-1k, get-64k, post-64k; of protocols: tls, tls-64k, handshake,
    /// resumed, h2, websocket, websocket-tls
    #[arg(long, value_delimiter = ',')]
    workload: Vec<String>,
    /// Only these proxies: litegate, released, nginx, haproxy
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave out the latencies at a fixed rate
    #[arg(long)]
    no_latency: bool,
    /// Leave out the memory of idle connections
    #[arg(long)]
    no_memory: bool,
    /// A litegate that is already built
    #[arg(long)]
    litegate: Option<PathBuf>,
    /// One of `deploy/build`, to measure beside it; of the parts proxies and protocols
    #[arg(long)]
    released: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(errors) => {
            eprintln!("load: {errors} requests got no answer, or a wrong one");
            ExitCode::FAILURE
        }
        Err(failure) => {
            eprintln!("load: {failure}");
            ExitCode::from(2)
        }
    }
}

/// Returns the number of errors.
fn run(options: &Options) -> Result<u64, Failure> {
    if cfg!(debug_assertions) {
        return Err(
            "an unoptimised build measures itself: `cargo run --release -p litegate-load`".into()
        );
    }
    match options.part {
        Part::Proxies => proxies(options),
        Part::Consistency => consistency(options),
        Part::Protocols | Part::Memory => protocols(options),
        Part::Floods => floods(options),
    }
}

/// litegate beside the others. Returns the number of errors.
fn proxies(options: &Options) -> Result<u64, Failure> {
    let workloads = chosen(WORKLOADS, |workload| workload.name, &options.workload)?;
    let programs = programs(CONTENDERS, options)?;
    let mut results = Results { header: header("", &programs)?, ..Results::default() };
    results.header.push(paced(options));
    let cores = Cores::find()?;
    results.header.push(placed(cores));
    machine::pin(cores.load)?;
    // Raised in any case: a proxy may allow as many clients as it has descriptors for.
    machine::raise_descriptors(if options.no_memory { 0 } else { 4 * IDLE_CONNECTIONS as u64 })?;

    let upstream = Upstream::start(cores.load, &workload::sizes())?;
    let start = |(contender, program): &(&Contender, PathBuf)| {
        contender.start(program, upstream.address, cores)
    };
    let running = programs.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    for workload in workloads {
        results.sections.push(measure(workload, &running, &upstream, cores, options)?);
    }
    drop(running);
    if !options.no_memory {
        // Fresh ones: after thousands of requests a second, memory is left that others reuse.
        let fresh = programs.iter().map(start).collect::<Result<Vec<_>, _>>()?;
        results.memory = rest(&fresh)?;
    }

    let page = results.markdown(PEER);
    publish(&page, RESULTS, is_whole(options))?;
    Ok(results.errors())
}

/// Those of the contenders that were asked for.
fn programs(
    all: &'static [Contender],
    options: &Options,
) -> Result<Vec<(&'static Contender, PathBuf)>, Failure> {
    let contenders = chosen(all, |contender| contender.name, &options.only)?;
    let litegate = litegate(options)?;
    let released = options.released.as_deref().map(Path::canonicalize).transpose()?;
    // Measured where somebody has built it.
    let is_there = |contender: &&Contender| {
        contender.name != contender::RELEASED || released.is_some() || !options.only.is_empty()
    };
    let program = |contender: &'static Contender| {
        Ok((contender, contender.program(&litegate, released.as_deref())?))
    };
    contenders.into_iter().filter(is_there).map(program).collect()
}

/// TLS, HTTP/2 and WebSocket, or idle and slow clients. Returns the number of errors.
fn protocols(options: &Options) -> Result<u64, Failure> {
    let is_memory = options.part == Part::Memory;
    if is_memory && !options.workload.is_empty() {
        return Err("`--part memory` has no workloads to choose from".into());
    }
    let workloads = chosen(protocols::WORKLOADS, |workload| workload.name, &options.workload)?;
    let programs = programs(contender::PROTOCOLS, options)?;
    let cores = Cores::find()?;
    let part = if is_memory { " -- --part memory" } else { " -- --part protocols" };
    let mut header = header(part, &programs)?;
    header.push(if is_memory { machine::kernel() } else { paced(options) });
    header.push(placed(cores));
    machine::pin(cores.load)?;
    machine::raise_descriptors(if is_memory { DESCRIPTORS } else { 0 })?;
    let span = Duration::try_from_secs_f64(options.seconds)?;
    let rounds = Rounds { count: options.rounds, span };
    let plan = protocols::Plan { programs: &programs, cores, rounds, header };
    let (page, errors) =
        if is_memory { protocols::memory(plan)? } else { protocols::run(plan, &workloads)? };
    let file = if is_memory { MEMORY } else { PROTOCOLS };
    publish(&page, file, is_whole(options) && errors == 0)?;
    Ok(errors)
}

/// What consistency costs. Returns the number of errors.
fn consistency(options: &Options) -> Result<u64, Failure> {
    if !options.workload.is_empty() || !options.only.is_empty() {
        return Err("`--part consistency` measures litegate alone, and all of it".into());
    }
    let litegate = litegate(options)?;
    let version = contender::consistency("token").version(&litegate)?;
    let cores = Cores::find()?;
    let header = vec![
        "`cargo run --release -p litegate-load -- --part consistency` (see [docs/benchmarks.md](../../docs/benchmarks.md))"
            .to_owned(),
        format!("{version}, with [proxies/consistency.toml](proxies/consistency.toml)"),
        paced(options),
        placed(cores),
    ];
    machine::pin(cores.load)?;
    machine::raise_descriptors((4 * IDLE_CONNECTIONS) as u64)?;
    let span = Duration::try_from_secs_f64(options.seconds)?;
    let rounds = Rounds { count: options.rounds, span };
    let (page, wrong) = consistency::run(&litegate, cores, rounds, header)?;
    let is_whole = options.rounds >= ROUNDS && options.seconds >= 1.0;
    publish(&page, CONSISTENCY, is_whole && wrong == 0)?;
    Ok(wrong)
}

/// What a well-behaved client notices of floods. Returns the number of errors.
fn floods(options: &Options) -> Result<u64, Failure> {
    if !options.workload.is_empty() {
        return Err("`--part floods` has a workload of its own".into());
    }
    let programs = programs(contender::FLOODED, options)?;
    let cores = Cores::find()?;
    let part = " -- --part floods --rounds 3 --seconds 0.5";
    let mut header = header(part, &programs)?;
    header.extend([paced(options), placed(cores)]);
    machine::pin(cores.load)?;
    machine::raise_descriptors((4 * IDLE_CONNECTIONS) as u64)?;
    let span = Duration::try_from_secs_f64(options.seconds)?;
    let page = floods::run(&programs, cores, options.rounds, span, header)?;
    let is_whole = options.only.is_empty() && options.rounds >= 3 && options.seconds >= 0.5;
    publish(&page, FLOODS, is_whole)?;
    Ok(0)
}

/// Prints the results, and keeps them where they are worth it.
fn publish(page: &str, file: &str, is_worth_it: bool) -> Result<(), Failure> {
    println!("{page}");
    if is_worth_it {
        std::fs::write(Path::new(ROOT).join(file), page)?;
        eprintln!("written to {file}");
    } else {
        eprintln!("not written to {file}: this was not a whole run");
    }
    Ok(())
}

fn litegate(options: &Options) -> Result<PathBuf, Failure> {
    match &options.litegate {
        Some(path) => Ok(path.canonicalize()?),
        None => build(),
    }
}

fn placed(cores: Cores) -> String {
    format!(
        "the proxies on core {}, clients and upstream on core {}, of {}",
        cores.proxy.0,
        cores.load.0,
        machine::processor()
    )
}

fn paced(options: &Options) -> String {
    let Options { rounds, seconds, .. } = options;
    format!("{rounds} rounds of {seconds} s, interleaved; {}", machine::kernel())
}

/// Those that were named, or all of them.
fn chosen<T>(
    all: &'static [T],
    name: impl Fn(&T) -> &'static str,
    wanted: &[String],
) -> Result<Vec<&'static T>, Failure> {
    if let Some(unknown) = wanted.iter().find(|wanted| all.iter().all(|one| name(one) != *wanted)) {
        let known: Vec<_> = all.iter().map(name).collect();
        return Err(format!("there is no `{unknown}`, only {}", known.join(", ")).into());
    }
    let is_wanted = |one: &&T| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name(one));
    Ok(all.iter().filter(is_wanted).collect())
}

/// Whether the run is worth committing.
fn is_whole(options: &Options) -> bool {
    let everything = options.workload.is_empty() && options.only.is_empty();
    everything
        && !options.no_latency
        && !options.no_memory
        && options.rounds >= ROUNDS
        && options.seconds >= 1.0
}

/// Builds litegate as it is released, whatever this bench was built with.
fn build() -> Result<PathBuf, Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut building = Command::new(cargo);
    building
        .args(["build", "--release", "--package", "litegate", "--bin", "litegate"])
        .current_dir(ROOT);
    // `cargo run` says them of this package. Build scripts that look at them would run again, and
    // everything above them would be compiled again.
    let ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(ours) {
            building.env_remove(name);
        }
    }
    let status = building.status()?;
    if !status.success() {
        return Err("litegate does not build".into());
    }
    // Beside this program, which cargo has built in release mode too.
    let path = std::env::current_exe()?.with_file_name("litegate");
    Ok(path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?)
}

fn header(part: &str, programs: &[(&Contender, PathBuf)]) -> Result<Vec<String>, Failure> {
    let is_released = programs.iter().any(|(contender, _)| contender.name == contender::RELEASED);
    let released = match part {
        _ if !is_released => "",
        "" => " -- --released target/released/litegate",
        _ => " --released target/released/litegate",
    };
    let mut lines = vec![format!(
        "`cargo run --release -p litegate-load{part}{released}` (see [docs/benchmarks.md](../../docs/benchmarks.md))"
    )];
    for (contender, program) in programs {
        if contender.name == contender::RELEASED {
            lines.push(
                "released: the same by [deploy/build](../../deploy/build), which has watched it do this \
                 work"
                    .to_owned(),
            );
            continue;
        }
        let (version, file) = (contender.version(program)?, contender.file);
        lines.push(format!("{version}, with [proxies/{file}](proxies/{file})"));
    }
    Ok(lines)
}

/// One workload: saturation, then latency, each in interleaved rounds.
fn measure(
    workload: &'static Workload,
    running: &[Running],
    upstream: &Upstream,
    cores: Cores,
    options: &Options,
) -> Result<Section, Failure> {
    let span = Duration::try_from_secs_f64(options.seconds)?;
    let mut rows: Vec<Row> = running.iter().map(|proxy| Row::new(proxy.name)).collect();
    let mut alone = Vec::new();
    for round in 1..=options.rounds {
        alone.push(by_itself(workload, upstream, cores, span / 10)?.speed());
        for (proxy, row) in running.iter().zip(&mut rows) {
            let tree = proxy.tree()?;
            let found = Clients::connect(proxy.address, workload)
                .and_then(|mut clients| clients.saturate(span, || tree.cpu()))
                .map_err(|failure| format!("{}, {}: {failure}", workload.name, proxy.name))?;
            eprintln!(
                "{} {round}: {} {:.2} µs, {:.0}/s, {:.0} % busy, {} errors",
                workload.name,
                proxy.name,
                found.cost(),
                found.speed(),
                found.busy(),
                found.errors
            );
            row.saturations.push(found);
        }
    }
    let rate = workload.rate.filter(|_| !options.no_latency);
    for round in 1..=rate.map_or(0, |_| options.rounds) {
        for (proxy, row) in running.iter().zip(&mut rows) {
            let found =
                Clients::connect(proxy.address, workload)?.pace(rate.unwrap_or_default(), span)?;
            eprintln!(
                "{} {round}: {} p50 {:.0} µs, p99 {:.0} µs, {} errors",
                workload.name,
                proxy.name,
                found.percentile(0.5).unwrap_or_default(),
                found.percentile(0.99).unwrap_or_default(),
                found.errors
            );
            row.latencies.push(found);
        }
    }
    let alone = Spread::of(alone).map_or(0.0, |alone| alone.median);
    eprintln!("{}: the upstream alone {alone:.0}/s", workload.name);
    Ok(Section { title: workload.title, alone, rate, rows })
}

/// What the upstream serves without a proxy: asked from the proxies' core, so that it has its own
/// for itself as a proxy has.
fn by_itself(
    workload: &Workload,
    upstream: &Upstream,
    cores: Cores,
    span: Duration,
) -> Result<Saturation, Failure> {
    machine::pin(cores.proxy)?;
    let found = Clients::connect(upstream.address, workload)
        .and_then(|mut clients| clients.saturate(span, || Ok(Duration::ZERO)));
    machine::pin(cores.load)?;
    found
}

/// What connections at rest cost fresh processes.
fn rest(running: &[Running]) -> Result<Vec<Memory>, Failure> {
    let request = WORKLOADS.first().map(Workload::request).unwrap_or_default();
    let mut open = Vec::new();
    let mut found = Vec::new();
    for proxy in running {
        let before = {
            // The first ones make the process allocate what it needs once.
            let _first = generator::idle(proxy.address, 8, &request)?;
            proxy.tree()?.resident()?
        };
        let connections = generator::idle(proxy.address, IDLE_CONNECTIONS, &request)?;
        let at_once = proxy.tree()?.resident()?;
        let (name, quiet, later) = (proxy.name, QUIET, at_once);
        found.push(Memory { name, connections: connections.len(), before, at_once, later, quiet });
        open.push(connections);
    }
    // Quiet is what is measured here.
    std::thread::sleep(QUIET);
    for (proxy, memory) in running.iter().zip(&mut found) {
        memory.later = proxy.tree()?.resident()?;
        eprintln!(
            "idle: {} {} KiB, {} KiB, {} KiB",
            memory.name, memory.before, memory.at_once, memory.later
        );
    }
    Ok(found)
}
