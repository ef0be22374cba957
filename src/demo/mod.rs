//! `litegate demo`: a three-node cluster in this process, two litegates before it, and a stream of
//! reads and writes through them in turn while the role moves and nodes die.
//!
//! The judge of `litegate verify` watches the clients and has the last word: success means that
//! nothing was lost that was not announced, nothing ran twice, and no client read the past of its
//! own write. Beside it, a trickle of writes goes to the same nodes without litegate, once spread
//! as by a plain load balancer and once by method to the first node as by an ingress rule.
//!
//! * `story` does to the cluster what happens to clusters;
//! * `plain` does without litegate;
//! * `view` makes text of a moment, and is pure; `screen` has the terminal.

#![expect(clippy::print_stderr, reason = "it is a show")]

use std::{
    cell::RefCell,
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    app::{self, Running},
    config::load,
    testkit::{Cluster, Options, client},
    verify::{
        self, Carry, Run, Settings, Workload,
        judge::{Breach, Verdict},
        report::{self, Conclusion},
    },
};

mod plain;
mod screen;
mod story;
mod view;

use screen::Screen;
use story::Story;
use view::{Moment, Paint};

/// Replicas lag a little, one of them more, so that a read after a write has something to miss.
const REPLICATION: Duration = Duration::from_millis(60);
const SLOWER: Duration = Duration::from_millis(250);
/// How long the lease takes to move after a crash. A Consul lease takes 16 to 22 s.
const LEASE: Duration = Duration::from_millis(1200);
/// Clients, and operations of all of them together in a second; half are writes.
const CLIENTS: u32 = 8;
const RATE: u32 = 80;
/// How often something happens to the cluster by itself: in a run that ends, and in one for people.
const HURRIED: Duration = Duration::from_millis(2500);
const AT_LEISURE: Duration = Duration::from_secs(6);
/// Before the books are closed, every client has come by once more since the last event.
const QUIET: Duration = Duration::from_secs(3);
/// How often keys are looked at, and the screen is drawn.
const TICK: Duration = Duration::from_millis(50);
const FRAME: Duration = Duration::from_millis(250);
/// Between two lines where there is no screen.
const LINE: Duration = Duration::from_secs(1);
/// What a client has only read, of others and on a node that was ahead, is promised to nobody.
const ALLOWED: [Breach; 1] = [Breach::NonMonotonic];

/// Runs it; until `q` or a signal where `duration` is not given. Success means that the promises
/// were kept.
pub fn run(duration: Option<Duration>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.and_then(|runtime| runtime.block_on(show(duration)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whoever read has gone: `litegate demo | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
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
         primary = {{ type = \"litefs\", poll = \"200ms\" }}\nmax_lag = \"2s\"\n"
    )
}

fn litegate(cluster: &Cluster) -> io::Result<Running> {
    app::start(load::parse("demo", &config_for(cluster), []).map_err(io::Error::other)?)
}

fn settings(targets: &[SocketAddr]) -> Result<Settings, String> {
    let targets = targets.iter().map(|address| format!("http://{address}").parse());
    Ok(Settings {
        targets: targets.collect::<Result<_, _>>()?,
        host: None,
        tls: None,
        clients: CLIENTS,
        carry: vec![Carry::Cookies, Carry::Token],
        // It is stopped from outside.
        duration: Duration::from_hours(24 * 365),
        rate: RATE,
        workload: Workload::Both,
        keys: 3,
        append: "POST /kv/{key}".parse()?,
        set: "PUT /kv/{key}".parse()?,
        read: "GET /kv/{key}".parse()?,
        body: "{value}".into(),
        content_type: "text/plain".into(),
        timeout: Duration::from_secs(40),
        settle: Duration::from_secs(3),
        empty_is_success: false,
        run: fastrand::u32(..),
    })
}

/// A line for whoever reads a log.
fn say(line: impl std::fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush())
}

/// Why it goes to its end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Closing {
    No,
    /// At this time no client is asked to go on.
    At(Instant),
    /// The last look is taken.
    Now,
}

async fn show(duration: Option<Duration>) -> io::Result<bool> {
    let options = Options {
        replication: REPLICATION,
        lease: LEASE,
        attach: Duration::from_millis(200),
        ..Options::default()
    };
    let cluster = Arc::new(Cluster::start(options).await?);
    let places = cluster.places().to_vec();
    // A first transaction on every node: LiteFS lets reads of a database that a node does not have
    // yet through at once.
    if let Some(first) = places.first() {
        client::request(first.proxy, "POST", "/kv/first", "", b"x").await?;
    }
    cluster.settled().await;
    cluster.delay(places.len().saturating_sub(1), Some(SLOWER));

    let gates = [litegate(&cluster)?, litegate(&cluster)?];
    let doors: Vec<SocketAddr> =
        gates.iter().filter_map(|gate| gate.listeners.first().copied()).collect();
    let admins: Vec<SocketAddr> = gates.iter().filter_map(|gate| gate.admin).collect();
    let [door, ..] = doors[..] else { return Err(io::Error::other("no listener")) };
    let settings = settings(&doors).map_err(io::Error::other)?;
    let prefix = format!("v{:08x}-", settings.run);

    let mut tasks = JoinSet::new();
    let plain = Arc::new(plain::Tally::default());
    tasks.spawn(plain::write(Arc::clone(&cluster), Arc::clone(&plain)));
    let pages = Arc::<view::Pages>::default();
    for (index, admin) in admins.iter().copied().enumerate() {
        tasks.spawn(scrape(admin, index, Arc::clone(&pages)));
    }

    let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
        .map(signal)
        .into_iter()
        .collect::<io::Result<Vec<_>>>()?;
    let began = Instant::now();
    let mut story = Story::new(Arc::clone(&cluster), began);
    let told = RefCell::new(view::Told::default());
    let stop = Notify::new();
    let judged = verify::run(settings, stop.notified(), |_, verdict: &Verdict| {
        told.replace(view::Told::of(verdict));
    });
    let mut judged = std::pin::pin!(judged);

    let paint = Paint::of_this_terminal();
    let mut screen = paint.is_live.then(Screen::open).transpose()?;
    if screen.is_none() {
        say("litegate demo: three fake LiteFS nodes in this process, two litegates before them")?;
        say(format_args!(
            "  litegate  http://{door}  try: curl -i -d hello http://{door}/kv/mine"
        ))?;
        for admin in &admins {
            say(format_args!("  admin     http://{admin}  try: curl http://{admin}/api/topology"))?;
        }
    }
    let mut topologies: Vec<_> =
        gates.iter().filter_map(|gate| gate.topologies.first().cloned()).collect();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let pace = if duration.is_some() { HURRIED } else { AT_LEISURE };
    let mut next_event = began + pace.min(AT_LEISURE / 2);
    let mut is_automatic = true;
    let mut drawn = None::<Instant>;
    let mut heard = 0;
    let mut closing = Closing::No;
    let mut moment = Moment::of(doors, admins.clone());
    let run = loop {
        tokio::select! {
            ended = &mut judged => break ended,
            () = any(&mut signals) => {
                if closing != Closing::No {
                    return Ok(false);
                }
                closing = story.close(QUIET);
            }
            _ = ticks.tick() => {}
        }
        let now = Instant::now();
        let mut is_news = story.pass(now);
        while let Some(key) = screen.as_ref().and_then(Screen::key) {
            is_news = true;
            match key {
                'q' if closing != Closing::No => return Ok(false),
                'q' => closing = story.close(QUIET),
                'a' => is_automatic = !is_automatic,
                _ if closing == Closing::No && story.key(key, now) => next_event = now + pace,
                _ => {}
            }
        }
        let ends = duration.map(|duration| began + duration);
        match closing {
            Closing::No if ends.is_some_and(|ends| now >= ends) => {
                closing = story.close(QUIET);
            }
            Closing::No if is_automatic && now >= next_event => {
                next_event = now + pace;
                // Nothing more happens so late that it could not show.
                if ends.is_none_or(|ends| now + QUIET <= ends) {
                    story.next(now);
                    is_news = true;
                }
            }
            Closing::At(time) if now >= time => {
                stop.notify_one();
                closing = Closing::Now;
            }
            _ => {}
        }
        let pause = if screen.is_some() { FRAME } else { LINE };
        if screen.is_none() {
            moment.tell(&story);
            for line in moment.news(heard) {
                say(line)?;
            }
            heard = story.forgotten + story.said.len();
        }
        let is_news = is_news && screen.is_some();
        if is_news || drawn.is_none_or(|drawn| now >= drawn + pause) {
            drawn = Some(now);
            moment.is_automatic = is_automatic;
            moment.is_closing = closing != Closing::No;
            moment.look(
                now.into_std(),
                now - began,
                &cluster,
                &mut topologies,
                &story,
                &pages,
                &plain,
            );
            moment.told = told.borrow().clone();
            moment.ran = cluster.ran(&prefix) as u64;
            match &mut screen {
                Some(screen) => screen.draw(&moment, paint)?,
                None => say(moment.line())?,
            }
        }
    };
    drop(screen);
    tasks.shutdown().await;
    let run = run.map_err(io::Error::other)?;
    moment.told = view::Told::of(&run.verdict);
    let is_kept = Conclusion::of(&run.verdict, &ALLOWED) == Conclusion::Kept;
    finish(&moment, &run, is_kept)?;
    for gate in &gates {
        gate.stop();
    }
    for gate in gates {
        gate.join();
    }
    Ok(is_kept)
}

fn finish(moment: &Moment, run: &Run, is_kept: bool) -> io::Result<()> {
    if !is_kept {
        say(format_args!("\n{}", report::text(run, &ALLOWED)))?;
    }
    say(format_args!("\n{}", moment.summary(&run.verdict, is_kept)))
}

/// Resolves at any of the signals.
async fn any(signals: &mut [tokio::signal::unix::Signal]) {
    std::future::poll_fn(|context| {
        let is_one = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
        if is_one { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// What a litegate counts is read where operators read it.
async fn scrape(admin: SocketAddr, index: usize, pages: Arc<view::Pages>) {
    let mut ticks = interval(FRAME);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let page = client::request(admin, "GET", "/metrics", "connection: close\r\n", b"");
        if let Ok(Ok(page)) = timeout(LINE, page).await {
            pages.put(index, page.text());
        }
    }
}
