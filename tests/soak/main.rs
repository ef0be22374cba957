//! Soak and chaos: mixed load over all protocols while nodes die, freeze, answer slowly and lie,
//! configuration and certificates change, and clients abort. docs/soak.md says how to run it and
//! what it promises.
#![expect(
    clippy::disallowed_methods,
    reason = "the processes under test are real, and so is the time they take"
)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "what it prints is what it is for, and there is no test harness"
)]
#![expect(clippy::cast_possible_truncation, reason = "wire formats")]

#[allow(dead_code, reason = "the end-to-end tests use all of it")]
#[path = "../e2e/cluster.rs"]
mod cluster;
#[allow(dead_code, reason = "the end-to-end tests use all of it")]
#[path = "../e2e/consul.rs"]
mod consul;
#[allow(dead_code, reason = "the end-to-end tests use all of it")]
#[path = "../e2e/http.rs"]
mod http;
#[allow(dead_code, reason = "the end-to-end tests use all of it")]
#[path = "../e2e/process.rs"]
mod process;

mod abuse;
mod chaos;
mod clients;
mod judge;
mod litegate;
mod relay;
mod rpc;
mod sockets;
mod wire;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::{
    chaos::{ALL, Action, Chaos, SHORT},
    clients::{Client, Phase},
    judge::Judge,
    litegate::{Files, Litegate},
    wire::PATIENCE,
};

/// A cycle of load and chaos, at the end of which nobody asks for anything.
const CYCLE: Duration = Duration::from_mins(1);
/// A run shorter than this has its faults in a fixed order, once.
const WHOLE: Duration = Duration::from_mins(3);
/// Connections to nodes stay for `pool_idle`, 4 s; an ill-behaved client's for `header_read`, 5 s.
const SETTLE: Duration = Duration::from_mins(1);
/// Descriptors that come with use and stay: one feed of a node more, a log that is written.
const SPARE_DESCRIPTORS: usize = 12;
/// What may be added to resident memory over all cycles but the first.
const SPARE_MEMORY: usize = 32 * 1024;

struct Wanted {
    length: Duration,
    seed: u64,
}

fn wanted() -> Result<Wanted, String> {
    let mut wanted = Wanted { length: Duration::from_mins(10), seed: fastrand::u64(..1_000_000) };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            let value = args.next().and_then(|value| value.parse::<u64>().ok());
            value.ok_or_else(|| format!("{arg} wants a number"))
        };
        match &*arg {
            "--seconds" => wanted.length = Duration::from_secs(number()?),
            "--seed" => wanted.seed = number()?,
            _ => return Err(format!("unknown: {arg}; there are --seconds N and --seed N")),
        }
    }
    Ok(wanted)
}

fn main() -> ExitCode {
    let Wanted { length, seed } = match wanted() {
        Ok(wanted) => wanted,
        Err(why) => {
            eprintln!("soak: {why}");
            return ExitCode::from(2);
        }
    };
    println!(
        "soak: {} s with seed {seed}; again by: cargo test --test soak -- --seconds {} --seed {seed}",
        length.as_secs(),
        length.as_secs()
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("it starts");
    let judge = Arc::new(Judge::default());
    let mut chaos = Chaos::start(runtime.handle(), &judge, seed);
    let (mut litegate, files) = litegate::start(chaos.directory(), chaos.world());
    println!("soak: the cluster is in {}", chaos.directory().display());
    let is_fine = {
        let _entered = runtime.enter();
        soak(&mut chaos, &mut litegate, files, &judge, length, seed)
    };
    if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What is left of a cycle when nobody asks for anything.
struct Rest {
    memory: usize,
    descriptors: usize,
}

fn soak(
    chaos: &mut Chaos,
    litegate: &mut Litegate,
    files: Files,
    judge: &Arc<Judge>,
    length: Duration,
    seed: u64,
) -> bool {
    let started = Instant::now();
    let mut rng = fastrand::Rng::with_seed(seed ^ 1);
    let admin = litegate.admin;
    let base = litegate.descriptors();
    let over = Arc::new(AtomicBool::new(false));
    let operator = {
        let (judge, over) = (Arc::clone(judge), Arc::clone(&over));
        let rng = fastrand::Rng::with_seed(seed ^ 2);
        thread::spawn(move || operate(files, &judge, &over, rng))
    };
    let (phase, receiver) = watch::channel(Phase::Run);
    let active = Arc::new(AtomicUsize::new(0));
    let mut deck: Vec<Action> = Vec::new();
    let mut rests: Vec<Rest> = Vec::new();
    let is_short = length < WHOLE;
    let mut short = SHORT.into_iter();
    for round in 0.. {
        let client = Client {
            judge: Arc::clone(judge),
            doors: litegate.doors.clone(),
            phase: receiver.clone(),
            active: Arc::clone(&active),
            number: 0,
            seed,
            round,
        };
        phase.send_replace(Phase::Run);
        clients::start(&client);
        let began = Instant::now();
        chaos.stay(Duration::from_secs(2));
        let cycle = if is_short { length } else { CYCLE };
        while began.elapsed() < cycle && started.elapsed() < length {
            let action = if is_short {
                let Some(action) = short.next() else { break };
                action
            } else {
                if deck.is_empty() {
                    deck = ALL.to_vec();
                    rng.shuffle(&mut deck);
                }
                deck.pop().unwrap()
            };
            let at = started.elapsed();
            let before = judge.progress();
            let done = chaos.act(action, admin);
            let now = judge.progress();
            println!(
                "{:>5} s  {action:?} for {:.1} s: {} requests, {} of them not fine; {} MiB, {} descriptors",
                at.as_secs(),
                started.elapsed().saturating_sub(at).as_secs_f64(),
                now.0 - before.0,
                now.1 - before.1,
                litegate.memory() / 1024,
                litegate.descriptors(),
            );
            if let Err(why) = done {
                judge.breach(format!("{action:?}: {why}"));
            }
            if !litegate.is_running() {
                judge.breach("litegate has ended".to_owned());
                break;
            }
            chaos.stay(Duration::from_millis(rng.u64(500..1500)));
        }
        // Nothing is wrong: everything has to work.
        chaos.stay(Duration::from_secs(3));
        phase.send_replace(Phase::Pause);
        if !until(PATIENCE * 2, || active.load(Ordering::Acquire) == 0) {
            judge.breach(format!("{} clients hang", active.load(Ordering::Acquire)));
        }
        judge.close();
        let lost = admin.metric("litegate_acknowledged_writes_lost_total", "");
        judge.compare(&chaos.cluster().agreed_ids(), lost);
        if !until(SETTLE, || litegate.descriptors() <= base + SPARE_DESCRIPTORS) {
            let now = litegate.descriptors();
            judge.breach(format!("{now} descriptors are open at rest, and {base} were before"));
        }
        let rest = Rest { memory: litegate.memory(), descriptors: litegate.descriptors() };
        println!(
            "{:>5} s  cycle {round} is over: {} requests, {} lies told; at rest {} MiB, {} descriptors",
            started.elapsed().as_secs(),
            judge.progress().0,
            chaos.lies(),
            rest.memory / 1024,
            rest.descriptors,
        );
        rests.push(rest);
        if is_short || started.elapsed() >= length || !litegate.is_running() {
            break;
        }
    }
    over.store(true, Ordering::Relaxed);
    let (reloads, renewals) = operator.join().unwrap_or_default();
    judge_memory(&rests, judge);
    litegate.leave();
    for line in litegate.complaints() {
        judge.breach(format!("in litegate's log: {line}"));
    }
    let (table, is_fine) = judge.verdict();
    println!("\n{table}");
    if !is_fine {
        println!("rows of broken writes: {:?}", chaos.cluster().rows(abuse::NEVER));
        for name in ["access.log", "litegate.log"] {
            let kept =
                std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("soak-{name}"));
            if std::fs::copy(chaos.directory().join(name), &kept).is_ok() {
                println!("kept: {}", kept.display());
            }
        }
    }
    let at_rest: Vec<String> = rests
        .iter()
        .map(|rest| format!("{} MiB/{}", rest.memory / 1024, rest.descriptors))
        .collect();
    println!(
        "reloads: {reloads}, certificates: {renewals}; at rest (base {base}): {}",
        at_rest.join(", ")
    );
    println!("seed {seed}: {}", if is_fine { "all as promised" } else { "NOT AS PROMISED" });
    is_fine
}

/// Memory at rest, over the run: the last third of the cycles against the first, of which the very
/// first is a warm-up.
fn judge_memory(rests: &[Rest], judge: &Judge) {
    let warm = &rests[1.min(rests.len())..];
    let third = warm.len() / 3;
    if third == 0 {
        return;
    }
    let mean = |rests: &[Rest]| rests.iter().map(|rest| rest.memory).sum::<usize>() / rests.len();
    let (first, last) = (mean(&warm[..third]), mean(&warm[warm.len() - third..]));
    if last > first + first / 10 + SPARE_MEMORY {
        judge.breach(format!("memory at rest has grown from {first} KiB to {last} KiB"));
    }
}

fn until(patience: Duration, is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(100));
    }
    true
}

/// An operator who can't leave it alone: another configuration or certificate every few seconds, some
/// of them wrong. Says how many.
fn operate(
    mut files: Files,
    judge: &Judge,
    over: &AtomicBool,
    mut rng: fastrand::Rng,
) -> (usize, usize) {
    let (mut reloads, mut renewals) = (0, 0);
    for n in 1_u32.. {
        until(Duration::from_millis(rng.u64(1500..3500)), || over.load(Ordering::Relaxed));
        if over.load(Ordering::Relaxed) {
            break;
        }
        let (what, done) = match n % 12 {
            5 => ("a wrong configuration", files.reload_badly(n)),
            11 => ("a wrong key", files.renew_badly()),
            3 | 8 => ("a certificate", files.renew()),
            _ => ("a configuration", files.reload(n)),
        };
        if n % 12 == 11 || matches!(n % 12, 3 | 8) {
            renewals += 1;
        } else {
            reloads += 1;
        }
        if let Err(why) = done {
            judge.breach(format!("{what}: {why}"));
        }
    }
    (reloads, renewals)
}
