//! `litegate demo`: a three-node cluster in this process, litegate before it, and a stream of
//! reads and writes through it while the role moves and nodes die.
//!
//! Every write has an id of its own. At the end each acknowledged id must have run exactly once.
//! Beside it, a trickle of writes is spread over the nodes without litegate, as a plain load
//! balancer would: those answered with an empty 200 and `fly-replay` are lost.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a show")]

use std::{
    collections::BTreeSet,
    io::IsTerminal as _,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    app,
    config::load,
    testkit::{Cluster, Options, client},
};

mod view;

/// Clients that read, and a pause after each read.
const READERS: u64 = 4;
const READ_PAUSE: Duration = Duration::from_millis(20);
/// Clients that write, and a pause after each write.
const WRITERS: u64 = 4;
const WRITE_PAUSE: Duration = Duration::from_millis(50);
/// Between two writes without litegate.
const PLAIN_PAUSE: Duration = Duration::from_millis(200);
/// How often something happens to the cluster by itself.
const EVENT: Duration = Duration::from_secs(4);
/// How long a killed node stays away, and how long the lease takes to move.
const AWAY: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_millis(1200);
/// No client waits longer for an answer.
const PATIENCE: Duration = Duration::from_secs(40);

/// What is counted while it runs.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    reads: AtomicU64,
    failed_reads: AtomicU64,
    acknowledged: Mutex<BTreeSet<String>>,
    refused: AtomicU64,
    longest: AtomicU64,
    plain: AtomicU64,
    plain_lost: AtomicU64,
    over: AtomicBool,
}

/// Runs it; until `q` where `duration` is not given. Success means that nothing was lost.
pub fn run(duration: Option<Duration>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.and_then(|runtime| runtime.block_on(show(duration)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A configuration for litegate before these nodes.
pub fn config_for(cluster: &Cluster) -> String {
    let nodes = cluster.places().iter().map(|place| {
        format!(
            "{{ name = \"{}\", address = \"{}\", api = \"{}\" }}",
            place.name, place.proxy, place.api
        )
    });
    let nodes = nodes.collect::<Vec<_>>().join(", ");
    format!(
        "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\n\
         address = \"127.0.0.1:0\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 8080\n\
         members = {{ type = \"static\", nodes = [{nodes}] }}\n\
         primary = {{ type = \"litefs\", poll = \"200ms\" }}\n"
    )
}

async fn show(duration: Option<Duration>) -> std::io::Result<bool> {
    let cluster = Arc::new(Cluster::start(Options { lease: LEASE, ..Options::default() }).await?);
    let config = load::parse("demo", &config_for(&cluster), []).map_err(std::io::Error::other)?;
    let gate = app::start(config)?;
    let Some(address) = gate.listeners.first().copied() else {
        return Err(std::io::Error::other("no listener"));
    };
    println!("litegate demo: three fake LiteFS nodes in this process, litegate before them\n");
    println!("  litegate   http://{address}        try: curl -i -d hello http://{address}/kv/mine");
    if let Some(admin) = gate.admin {
        println!("  admin      http://{admin}        try: curl http://{admin}/api/topology");
    }
    println!();

    let tally = Arc::new(Tally::default());
    let mut clients = JoinSet::new();
    for n in 0..READERS {
        clients.spawn(reader(address, n, Arc::clone(&tally)));
    }
    for n in 0..WRITERS {
        clients.spawn(writer(address, n, Arc::clone(&tally)));
    }
    clients.spawn(plain(Arc::clone(&cluster), Arc::clone(&tally)));

    let began = Instant::now();
    let live = std::io::stdout().is_terminal();
    let mut screen = live.then(view::Screen::open);
    let mut frames = interval(Duration::from_millis(if live { 250 } else { 1000 }));
    frames.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events = interval(EVENT);
    events.tick().await;
    let mut story = Story { cluster: Arc::clone(&cluster), last: "started", turn: 0, away: None };
    let mut readers = gate.topologies.clone();
    loop {
        tokio::select! {
            _ = frames.tick() => {
                let state = view::State::of(&cluster, &tally, &mut readers, began.elapsed(), story.last);
                match &mut screen {
                    Some(screen) => screen.draw(&state),
                    None => println!("{}", state.line()),
                }
                match screen.as_ref().and_then(view::Screen::key) {
                    Some('q') => break,
                    Some('f') => story.hand_over(),
                    Some('k') => story.kill(),
                    Some('r') => story.restart(),
                    _ => {}
                }
                story.pass();
            }
            _ = events.tick() => story.next(),
        }
        if duration.is_some_and(|duration| began.elapsed() >= duration) {
            break;
        }
    }
    // Everybody alive, and every write answered, before the books are closed.
    story.restart();
    if cluster.primary().is_none() {
        cluster.promote(0);
    }
    tally.over.store(true, Relaxed);
    let finished = timeout(PATIENCE, async { while clients.join_next().await.is_some() {} }).await;
    drop(screen);
    let summary = view::Summary::of(&cluster, &tally, began.elapsed(), finished.is_ok());
    println!("\n{summary}");
    gate.stop();
    gate.join();
    Ok(summary.is_good())
}

/// What happens to the cluster, by itself or by a key.
struct Story {
    cluster: Arc<Cluster>,
    last: &'static str,
    turn: u32,
    /// Who was killed, and when.
    away: Option<(usize, Instant)>,
}

impl Story {
    fn next(&mut self) {
        self.turn += 1;
        if self.turn % 2 == 1 { self.hand_over() } else { self.kill() }
    }

    /// The next living node becomes primary.
    fn hand_over(&mut self) {
        let nodes = self.cluster.places().len();
        let from = self.cluster.primary().unwrap_or(0);
        let mut others = (1..nodes).map(|n| (from + n) % nodes);
        if let Some(to) = others.find(|node| self.cluster.is_alive(*node)) {
            self.cluster.promote(to);
            self.last = "handed over";
        }
    }

    fn kill(&mut self) {
        if self.away.is_none()
            && let Some(primary) = self.cluster.primary()
        {
            self.cluster.kill(primary);
            self.away = Some((primary, Instant::now()));
            self.last = "primary killed";
        }
    }

    fn restart(&mut self) {
        if let Some((node, _)) = self.away.take() {
            self.cluster.restart(node);
            self.last = "node restarted";
        }
    }

    /// A killed node comes back by itself.
    fn pass(&mut self) {
        if self.away.is_some_and(|(_, at)| at.elapsed() >= AWAY) {
            self.restart();
        }
    }
}

async fn reader(gate: SocketAddr, n: u64, tally: Arc<Tally>) {
    while !tally.over.load(Relaxed) {
        let target = format!("/kv/{n}");
        let answer =
            timeout(PATIENCE, client::request(gate, "GET", &target, "connection: close\r\n", b""))
                .await;
        let fine = matches!(answer, Ok(Ok(answer)) if answer.status == 200 && answer.complete);
        if fine { &tally.reads } else { &tally.failed_reads }.fetch_add(1, Relaxed);
        sleep(READ_PAUSE).await;
    }
}

async fn writer(gate: SocketAddr, n: u64, tally: Arc<Tally>) {
    for i in 0u64.. {
        if tally.over.load(Relaxed) {
            return;
        }
        let id = format!("w{n}-{i}");
        let began = Instant::now();
        let target = format!("/kv/{id}");
        let fields = "connection: close\r\n";
        let answer = timeout(PATIENCE, client::request(gate, "POST", &target, fields, b"x")).await;
        let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tally.longest.fetch_max(took, Relaxed);
        match answer {
            Ok(Ok(answer)) if answer.status == 200 => {
                let mut all = tally.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
                all.insert(id);
            }
            _ => {
                tally.refused.fetch_add(1, Relaxed);
            }
        }
        sleep(WRITE_PAUSE).await;
    }
}

/// Writes spread over the nodes as by a plain load balancer.
async fn plain(cluster: Arc<Cluster>, tally: Arc<Tally>) {
    for (i, place) in cluster.places().to_vec().iter().cycle().enumerate() {
        if tally.over.load(Relaxed) {
            return;
        }
        let target = format!("/kv/plain-{i}");
        let fields = "connection: close\r\n";
        let answer = client::request(place.proxy, "POST", &target, fields, b"x");
        if let Ok(Ok(answer)) = timeout(Duration::from_secs(2), answer).await
            && answer.status == 200
        {
            tally.plain.fetch_add(1, Relaxed);
            if answer.field("fly-replay").is_some() {
                tally.plain_lost.fetch_add(1, Relaxed);
            }
        }
        sleep(PLAIN_PAUSE).await;
    }
}
