//! What a well-behaved client notices of hostile ones beside it.
//!
//! The client asks at a fixed rate over keep-alive connections, in an open loop. The floods come
//! from a thread that shares its core, at the lowest priority and at a fixed pace, so that it
//! offers every proxy the same and takes as little as it can from the client: what it takes
//! nevertheless shows in the rows of floods that go elsewhere. Where a proxy ends a hostile
//! connection, the next one is opened at the next tick.
//!
//! Noise comes in bursts, and one of a few milliseconds is all that a 99th percentile shows. So all
//! that is measured comes before whatever else the machine does, where it may; and the client is
//! measured with nobody beside before each flood rather than once in a round, and a flood is
//! compared with the median of them all.

use std::{
    fmt::Write as _,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    Failure,
    contender::{Contender, Running},
    generator::Clients,
    machine::{self, Core, Cores},
    report::Spread,
    upstream::{self, Upstream},
    workload::Workload,
};

/// The clients', the upstream's and the proxies', and behind them that of floods. Other work on the
/// machine has none: a few milliseconds of it would be all that a 99th percentile shows.
const PRIORITY: u8 = 10;
const FLOODS_PRIORITY: u8 = 1;
/// How often a flood goes on.
const TICK: Duration = Duration::from_millis(5);
/// Before anything is counted: limits are met, or what a flood has left is cleared away.
const SETTLE: Duration = Duration::from_millis(200);
/// How long a flood may take until all of it has begun, and the sockets before slow readers are full.
const PATIENCE: Duration = Duration::from_secs(10);
const CLIENT: Workload = Workload {
    name: "client",
    title: "GET, 128 bytes",
    upload: 0,
    download: 128,
    fields: "",
    clients: 16,
    rate: Some(2_000),
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// `:method: GET`, `:scheme: http`, `:path: /128`, `:authority: a`.
const HEAD: &[u8] = b"\x82\x86\x04\x04/128\x41\x01a";

/// A kind of hostile client.
struct Flood {
    name: &'static str,
    /// Connections at once.
    connections: usize,
    /// Where HTTP/2 is spoken alone, or where everybody else comes in.
    h2: bool,
    /// It takes what it gets.
    reads: bool,
    /// Every so many ticks a connection has its turn; they take turns, so that this is no burst.
    every: usize,
    /// Whether it is also sent elsewhere, for those that follow it as well.
    control: bool,
    /// What a connection begins with.
    opening: fn() -> Vec<u8>,
    /// What it goes on with at its `n`th turn.
    tick: fn(u32) -> Vec<u8>,
}

/// 4 connections, each 12 frames in 5 ms: 10,000 a second.
const FRAMES: Flood = Flood {
    name: "",
    connections: 4,
    h2: true,
    reads: true,
    every: 1,
    control: false,
    opening: || [PREFACE, &frame(4, 0, 0, &[])].concat(),
    tick: |_| Vec::new(),
};

const SLOW: Flood = Flood {
    name: "",
    connections: 500,
    h2: false,
    every: 100,
    control: true,
    opening: Vec::new,
    tick: |_| Vec::new(),
    ..FRAMES
};

/// Frames in one tick of one connection.
fn some(n: u32, frame: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    (0..12).flat_map(|k| frame(n * 12 + k)).collect()
}

const FLOODS: &[Flood] = &[
    Flood { name: "PING", control: true, tick: |n| some(n, |_| frame(6, 0, 0, &[0; 8])), ..FRAMES },
    Flood { name: "SETTINGS", tick: |n| some(n, |_| frame(4, 0, 0, &[])), ..FRAMES },
    Flood { name: "PRIORITY", tick: |n| some(n, |_| frame(2, 0, 1, &[0, 0, 0, 3, 1])), ..FRAMES },
    Flood {
        name: "empty DATA",
        opening: || [(FRAMES.opening)(), frame(1, 4, 1, HEAD)].concat(),
        tick: |n| some(n, |_| frame(0, 0, 1, &[])),
        ..FRAMES
    },
    Flood {
        name: "requests taken back (CVE-2023-44487)",
        tick: |n| {
            some(n, |n| {
                let id = 1 + 2 * n;
                [frame(1, 5, id, HEAD), frame(3, 0, id, &[0, 0, 0, 8])].concat()
            })
        },
        ..FRAMES
    },
    Flood {
        name: "requests broken (CVE-2025-8671)",
        tick: |n| {
            some(n, |n| {
                let id = 1 + 2 * n;
                [frame(1, 5, id, HEAD), frame(8, 0, id, &[0x7f, 0xff, 0xff, 0xff])].concat()
            })
        },
        ..FRAMES
    },
    Flood {
        name: "CONTINUATION (CVE-2024-27316)",
        opening: || [(FRAMES.opening)(), frame(1, 1, 1, HEAD)].concat(),
        tick: |n| some(n, |_| frame(9, 0, 1, b"\x40\x01x\x01y")),
        ..FRAMES
    },
    Flood {
        name: "slow heads",
        opening: || b"GET /128 HTTP/1.1\r\nHost: a\r\nX: ".to_vec(),
        tick: |_| b"x".to_vec(),
        ..SLOW
    },
    Flood {
        name: "slow bodies",
        connections: 200,
        opening: || b"POST /128 HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n".to_vec(),
        tick: |_| b"x".to_vec(),
        ..SLOW
    },
    Flood {
        name: "slow readers",
        connections: 100,
        reads: false,
        opening: || format!("GET {} HTTP/1.1\r\nHost: a\r\n\r\n", upstream::ENDLESS).into_bytes(),
        ..SLOW
    },
];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    [&[a, b, c, kind, flags], &stream.to_be_bytes()[..], payload].concat()
}

/// A flood that runs, until dropped.
struct Flooding {
    stop: Arc<AtomicBool>,
    /// All of its connections have been opened.
    begun: Arc<AtomicBool>,
    /// Connections that the other side ended.
    ended: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flooding {
    fn start(flood: &'static Flood, address: SocketAddr, core: Core) -> Result<Self, Failure> {
        let (stop, begun, ended) = (Arc::default(), Arc::default(), Arc::default());
        let mut this = Self { stop, begun, ended, thread: None };
        let (stop, begun) = (Arc::clone(&this.stop), Arc::clone(&this.begun));
        let ended = Arc::clone(&this.ended);
        let thread = std::thread::Builder::new().name("flood".into()).spawn(move || {
            let _ = machine::pin(core);
            if !machine::precede(FLOODS_PRIORITY) {
                // Where it may not, it is a little fairer to the flood.
                let _ = rustix::process::nice(19);
            }
            let mut hostile: Vec<_> = (0..flood.connections).map(|_| None).collect();
            let mut buffer = vec![0; 64 * 1024];
            for turn in 0_usize.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let began = Instant::now();
                for (key, hostile) in hostile.iter_mut().enumerate() {
                    if hostile.is_some() && !(turn + key).is_multiple_of(flood.every) {
                        continue;
                    }
                    if !Hostile::go_on(hostile, flood, address, &mut buffer) {
                        ended.fetch_add(1, Ordering::Relaxed);
                    }
                }
                begun.store(true, Ordering::Relaxed);
                std::thread::sleep(TICK.saturating_sub(began.elapsed()));
            }
        })?;
        this.thread = Some(thread);
        Ok(this)
    }

    /// Waits until the flood is what it will be.
    fn settle(&self, flood: &Flood, upstream: &Upstream) -> Result<(), Failure> {
        let begun = || self.begun.load(Ordering::Relaxed).then_some(());
        machine::until("a flood's beginning", PATIENCE, begun)?;
        std::thread::sleep(SETTLE);
        if flood.reads {
            return Ok(());
        }
        // Until nobody takes any more, a slow reader is a fast one.
        let (mut sent, mut since) = (upstream.sent(), Instant::now());
        machine::until("full sockets", PATIENCE, || {
            if upstream.sent() != sent {
                (sent, since) = (upstream.sent(), Instant::now());
            }
            (since.elapsed() > SETTLE).then_some(())
        })
    }
}

impl Drop for Flooding {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One hostile connection.
struct Hostile {
    stream: TcpStream,
    ticks: u32,
    /// What the socket has not taken yet.
    unsent: Vec<u8>,
}

impl Hostile {
    fn open(flood: &Flood, address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut this = Self { stream, ticks: 0, unsent: (flood.opening)() };
        this.send()?;
        Ok(this)
    }

    /// Opens it, or goes on with it. Whether it goes on.
    fn go_on(
        this: &mut Option<Self>,
        flood: &Flood,
        address: SocketAddr,
        buffer: &mut [u8],
    ) -> bool {
        let Some(hostile) = this else {
            *this = Self::open(flood, address).ok();
            return this.is_some();
        };
        let goes_on = hostile.tick(flood, buffer).is_ok();
        if !goes_on {
            *this = None;
        }
        goes_on
    }

    fn send(&mut self) -> std::io::Result<()> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        match self.stream.write(&self.unsent) {
            Ok(sent) => drop(self.unsent.drain(..sent)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn tick(&mut self, flood: &Flood, buffer: &mut [u8]) -> std::io::Result<()> {
        // Who is not read from does not go on.
        if self.unsent.is_empty() {
            self.unsent = (flood.tick)(self.ticks);
            self.ticks += 1;
        }
        self.send()?;
        if !flood.reads {
            return Ok(());
        }
        loop {
            match self.stream.read(buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Where a flood goes that is nobody's: takes everything and says nothing.
struct Sink {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    fn start(core: Core) -> Result<Self, Failure> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let (address, stop) = (listener.local_addr()?, Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("sink".into()).spawn(move || {
            let _ = machine::pin(core);
            let mut open: Vec<TcpStream> = Vec::new();
            let mut buffer = vec![0; 64 * 1024];
            while !stopped.load(Ordering::Relaxed) {
                open.extend(listener.accept().ok().map(|(stream, _)| stream));
                open.retain_mut(|stream| {
                    let _ = stream.set_nonblocking(true);
                    let read = stream.read(&mut buffer);
                    read.map_or_else(|e| e.kind() == ErrorKind::WouldBlock, |read| read > 0)
                });
                std::thread::sleep(TICK);
            }
        })?;
        Ok(Self { address, stop, thread: Some(thread) })
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is beside the client.
#[derive(Clone, Copy)]
struct Beside {
    flood: &'static Flood,
    /// The flood is sent to somebody who is no proxy.
    elsewhere: bool,
}

impl Beside {
    /// Each control before the flood that it belongs to.
    fn all() -> Vec<Self> {
        let both = |flood: &'static Flood| {
            let control = flood.control.then_some(Self { flood, elsewhere: true });
            control.into_iter().chain([Self { flood, elsewhere: false }])
        };
        FLOODS.iter().flat_map(both).collect()
    }

    fn name(self) -> String {
        let elsewhere = if self.elsewhere { ", sent elsewhere" } else { "" };
        format!("{}{elsewhere}", self.flood.name)
    }
}

/// One proxy's rounds beside one flood.
#[derive(Default)]
struct Cell {
    /// 99th percentiles in µs, of each round: with nobody beside, and right after that beside the
    /// flood.
    unloaded: Vec<f64>,
    flooded: Vec<f64>,
    /// Hostile connections that it ended in a second.
    ended: Vec<f64>,
    /// Requests of the client without the right answer.
    errors: u64,
}

/// Who stands before and beside the proxies.
struct Others {
    upstream: Upstream,
    /// On the proxies' core: where frames go that are sent elsewhere, and where HTTP/1.1.
    sink: Sink,
    answering: Upstream,
}

/// Measures everything; returns the page.
pub(crate) fn run(
    programs: &[(&Contender, PathBuf)],
    cores: Cores,
    rounds: usize,
    span: Duration,
    mut header: Vec<String>,
) -> Result<String, Failure> {
    // Whoever is started from here on inherits it.
    header.push(if machine::precede(PRIORITY) {
        "all of them before whatever else runs on the machine (`chrt --rr`)".to_owned()
    } else {
        "beside whatever else runs on the machine: as root they would come before that".to_owned()
    });
    let others = Others {
        upstream: Upstream::start(cores.load, &[CLIENT.download])?,
        sink: Sink::start(cores.proxy)?,
        answering: Upstream::start(cores.proxy, &[CLIENT.download])?,
    };
    let mut running = Vec::new();
    for (contender, program) in programs {
        // Free a moment ago, as those that `start_with` finds.
        let h2 = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let upstream_port = others.upstream.address.port().to_string();
        let filled = [("@upstream_port@", &*upstream_port), ("@h2_port@", &h2.port().to_string())];
        running.push((contender.start_with(program, &filled, cores)?, h2));
    }
    let beside = Beside::all();
    let empty = || beside.iter().map(|_| Cell::default()).collect::<Vec<_>>();
    let mut found: Vec<Vec<Cell>> = running.iter().map(|_| empty()).collect();
    for round in 1..=rounds {
        for (at, beside) in beside.iter().enumerate() {
            for ((proxy, h2), cells) in running.iter().zip(&mut found) {
                let Some(cell) = cells.get_mut(at) else { continue };
                cell.measure(*beside, proxy, *h2, &others, cores, span)?;
                let [unloaded, flooded] = [&cell.unloaded, &cell.flooded]
                    .map(|rounds| rounds.last().copied().unwrap_or_default());
                let (name, proxy) = (beside.name(), proxy.name);
                eprintln!("{round}: {name}, {proxy}: p99 {flooded:.0} µs after {unloaded:.0} µs");
            }
        }
    }
    let names: Vec<_> = running.iter().map(|(proxy, _)| proxy.name).collect();
    Ok(page(&header, &beside, &names, &found))
}

impl Cell {
    /// One round: with nobody beside, and beside the flood.
    fn measure(
        &mut self,
        beside: Beside,
        proxy: &Running,
        h2: SocketAddr,
        others: &Others,
        cores: Cores,
        span: Duration,
    ) -> Result<(), Failure> {
        let unloaded = self.ask(proxy, span)?;
        let flood = beside.flood;
        let (address, upstream) = match (beside.elsewhere, flood.h2) {
            (true, true) => (others.sink.address, &others.upstream),
            (true, false) => (others.answering.address, &others.answering),
            (false, true) => (h2, &others.upstream),
            (false, false) => (proxy.address, &others.upstream),
        };
        let flooding = Flooding::start(flood, address, cores.load)?;
        flooding.settle(flood, upstream)?;
        let (before, began) = (flooding.ended.load(Ordering::Relaxed), Instant::now());
        let flooded = self.ask(proxy, span)?;
        let ended = flooding.ended.load(Ordering::Relaxed) - before;
        self.ended.push(ended as f64 / began.elapsed().as_secs_f64());
        self.unloaded.push(unloaded);
        self.flooded.push(flooded);
        drop(flooding);
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// The 99th percentile of what the client waits, in µs.
    fn ask(&mut self, proxy: &Running, span: Duration) -> Result<f64, Failure> {
        let clients = Clients::connect(proxy.address, &CLIENT)?;
        let latencies = clients.pace(CLIENT.rate.unwrap_or_default(), span)?;
        self.errors += latencies.errors;
        latencies.percentile(0.99).ok_or_else(|| format!("{} answers nothing", proxy.name).into())
    }
}

fn page(header: &[String], beside: &[Beside], names: &[&str], found: &[Vec<Cell>]) -> String {
    let mut page = String::from("# A well-behaved client beside floods\n\n");
    for line in header {
        let _ = writeln!(page, "- {line}");
    }
    let rate = CLIENT.rate.unwrap_or_default();
    let _ = write!(
        page,
        "\nThe client asks {rate} times a second over {} keep-alive connections of HTTP/1.1; the \
         times are the 99th percentile in µs, the median of the rounds and their range. Right \
         before each of them the same is measured with nobody beside: **nobody** is the median of \
         all of these, and **×** a row to that of the same proxy. A noisy moment is in a few of \
         many there, and in one round of a row.\n\n\
         A flood of frames is 10,000 frames, or 10,000 requests, a second over 4 connections of \
         HTTP/2, the slow ones are 500 heads, 200 bodies and 100 readers that take nothing of an \
         answer of 1 GiB, once the sockets on its way are full; a connection that is ended is \
         opened anew at once. **Ended** is how many of them the proxy ended in a second. The flood \
         shares the client's core, and whoever takes it the proxy's: what that alone does shows in \
         the row of the same flood sent elsewhere, to somebody on the proxy's core who is none. \
         **× elsewhere** is a row to that, PING's for all frames: what is the proxy's own doing.\n",
        CLIENT.clients
    );
    for (name, cells) in names.iter().zip(found) {
        let unloaded = Spread::of(cells.iter().flat_map(|cell| cell.unloaded.iter().copied()));
        let alone = unloaded.map_or(f64::NAN, |unloaded| unloaded.median);
        let _ = writeln!(
            page,
            "\n## {name}\n\n\
             | beside | p99 µs | × | × elsewhere | ended /s | errors |\n|---|---|---|---|---|---|\n\
             | nobody | {} | 1.00 | | | |",
            unloaded.map_or_else(String::new, |unloaded| unloaded.show(0)),
        );
        let mut elsewhere = f64::NAN;
        for (beside, cell) in beside.iter().zip(cells) {
            let show = |by: f64, digits| {
                let spread = Spread::of(cell.flooded.iter().map(|p99| p99 / by));
                spread.map_or_else(String::new, |spread| spread.show(digits))
            };
            let median = Spread::of(cell.flooded.iter().copied());
            let median = median.map_or(f64::NAN, |spread| spread.median);
            let own = if beside.elsewhere {
                elsewhere = median;
                String::new()
            } else {
                format!("{:.2}", median / elsewhere)
            };
            let _ = writeln!(
                page,
                "| {} | {} | {} | {own} | {:.0} | {} |",
                beside.name(),
                show(1.0, 0),
                show(alone, 2),
                Spread::of(cell.ended.iter().copied()).map_or(0.0, |ended| ended.median),
                cell.errors,
            );
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floods_are_whole_frames() {
        for flood in FLOODS.iter().filter(|flood| flood.h2) {
            let opening = (flood.opening)();
            let mut rest = opening.strip_prefix(PREFACE).expect("it begins so");
            let ticks: Vec<u8> = (0..3).flat_map(flood.tick).collect();
            for _ in 0..2 {
                while let Some((head, more)) = rest.split_at_checked(9) {
                    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                    rest = more.get(length as usize..).expect("its payload");
                }
                assert_eq!(rest, b"", "{}", flood.name);
                rest = &ticks;
            }
        }
    }

    #[test]
    fn the_page_compares_with_nobody_and_elsewhere() {
        let cell = |unloaded: [f64; 3], flooded: f64| Cell {
            unloaded: unloaded.to_vec(),
            flooded: vec![flooded],
            ended: vec![3.0],
            errors: 0,
        };
        let quiet = [100.0; 3];
        let beside = Beside::all();
        assert!(beside.first().is_some_and(|beside| beside.elsewhere), "of all frames");
        let cells = vec![cell(quiet, 120.0), cell([90.0, 100.0, 900.0], 180.0), cell(quiet, 90.0)];
        let page = page(&[], &beside, &["litegate"], &[cells]);
        for row in [
            "| nobody | 100 (90 to 900) | 1.00 | | | |",
            "| PING, sent elsewhere | 120 (120 to 120) | 1.20 (1.20 to 1.20) |  | 3 | 0 |",
            "| PING | 180 (180 to 180) | 1.80 (1.80 to 1.80) | 1.50 | 3 | 0 |",
            "| SETTINGS | 90 (90 to 90) | 0.90 (0.90 to 0.90) | 0.75 | 3 | 0 |",
        ] {
            assert!(page.contains(row), "{row}\n{page}");
        }
    }
}
