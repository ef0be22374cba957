//! What a well-behaved client notices of hostile ones beside it.
//!
//! The client asks at a fixed rate over keep-alive connections, in an open loop. The floods come
//! from a thread that shares its core, at the lowest priority and at a fixed pace, so that it
//! offers every proxy the same and takes as little as it can from the client: what it takes
//! nevertheless shows in the row of a flood that goes elsewhere. Where a proxy ends a hostile
//! connection, the next one is opened at the next tick.

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
    generator::{Clients, Latencies},
    machine::{self, Core, Cores},
    report::Spread,
    upstream::Upstream,
    workload::Workload,
};

/// How often a flood goes on.
const TICK: Duration = Duration::from_millis(5);
/// Before anything is counted: connections are opened and limits are met.
const SETTLE: Duration = Duration::from_millis(200);
/// More than the sockets hold.
const LARGE: usize = 16 << 20;
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
    /// What a connection begins with.
    opening: fn() -> Vec<u8>,
    /// What it goes on with at its `n`th tick.
    tick: fn(u32) -> Vec<u8>,
}

/// 4 connections, each 12 or 13 frames in 5 ms: 10,000 a second.
const FRAMES: Flood = Flood {
    name: "",
    connections: 4,
    h2: true,
    reads: true,
    opening: || [PREFACE, &frame(4, 0, 0, &[])].concat(),
    tick: |_| Vec::new(),
};

const SLOW: Flood = Flood {
    name: "",
    connections: 500,
    h2: false,
    opening: Vec::new,
    tick: |_| Vec::new(),
    ..FRAMES
};

/// Frames in one tick of one connection.
fn some(n: u32, frame: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    (0..12).flat_map(|k| frame(n * 12 + k)).collect()
}

const FLOODS: &[Flood] = &[
    Flood { name: "PING", tick: |n| some(n, |_| frame(6, 0, 0, &[0; 8])), ..FRAMES },
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
        tick: |n| if n % 100 == 0 { b"x".to_vec() } else { Vec::new() },
        ..SLOW
    },
    Flood {
        name: "slow bodies",
        connections: 200,
        opening: || b"POST /128 HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n".to_vec(),
        tick: |n| if n % 100 == 0 { b"x".to_vec() } else { Vec::new() },
        ..SLOW
    },
    Flood {
        name: "slow readers",
        connections: 100,
        reads: false,
        opening: || format!("GET /{LARGE} HTTP/1.1\r\nHost: a\r\n\r\n").into_bytes(),
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
    /// Connections that the other side ended.
    ended: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flooding {
    fn start(flood: &'static Flood, address: SocketAddr, core: Core) -> Result<Self, Failure> {
        let (stop, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (its, counted) = (Arc::clone(&stop), Arc::clone(&ended));
        let thread = std::thread::Builder::new().name("flood".into()).spawn(move || {
            // Behind whoever measures; where it may not, it is a little fairer to the flood.
            let _ = machine::pin(core);
            let _ = rustix::process::nice(19);
            let mut hostile: Vec<_> = (0..flood.connections).map(|_| None).collect();
            let mut buffer = vec![0; 64 * 1024];
            while !its.load(Ordering::Relaxed) {
                let began = Instant::now();
                for hostile in &mut hostile {
                    if !Hostile::go_on(hostile, flood, address, &mut buffer) {
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                }
                std::thread::sleep(TICK.saturating_sub(began.elapsed()));
            }
        })?;
        Ok(Self { stop, ended, thread: Some(thread) })
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
        Ok(Self { stream, ticks: 0, unsent: (flood.opening)() })
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

    fn tick(&mut self, flood: &Flood, buffer: &mut [u8]) -> std::io::Result<()> {
        // Who is not read from does not go on.
        if self.unsent.is_empty() {
            self.unsent = (flood.tick)(self.ticks);
            self.ticks += 1;
        }
        if !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
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
enum Beside {
    Nobody,
    /// A flood that goes elsewhere.
    Elsewhere(&'static Flood),
    Flood(&'static Flood),
}

impl Beside {
    fn all() -> Vec<Self> {
        let control = FLOODS.first().map(Self::Elsewhere);
        let floods = FLOODS.iter().map(Self::Flood);
        std::iter::once(Self::Nobody).chain(control).chain(floods).collect()
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Elsewhere(_) => "PING, sent elsewhere",
            Self::Flood(flood) => flood.name,
        }
    }
}

/// One proxy's rounds beside one flood.
#[derive(Default)]
struct Cell {
    rounds: Vec<Latencies>,
    /// Hostile connections that it ended in a second.
    ended: Vec<f64>,
}

impl Cell {
    fn p99(&self) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|round| round.percentile(0.99)))
    }

    fn errors(&self) -> u64 {
        self.rounds.iter().map(|round| round.errors).sum()
    }
}

/// Measures everything; returns the page.
pub(crate) fn run(
    programs: &[(&Contender, PathBuf)],
    cores: Cores,
    rounds: usize,
    span: Duration,
    header: &[String],
) -> Result<String, Failure> {
    let upstream = Upstream::start(cores.load, &[CLIENT.download, LARGE])?;
    let sink = Sink::start(cores.proxy)?;
    let mut running = Vec::new();
    for (contender, program) in programs {
        // Free a moment ago, as those that `start_with` finds.
        let h2 = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let upstream_port = upstream.address.port().to_string();
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
                measure(*beside, proxy, *h2, &sink, cores, span, cell)?;
                let (p99, name) = (cell.rounds.last(), beside.name());
                let p99 = p99.and_then(|round| round.percentile(0.99)).unwrap_or_default();
                eprintln!("{round}: {name}, {}: p99 {p99:.0} µs", proxy.name);
            }
        }
    }
    let names: Vec<_> = running.iter().map(|(proxy, _)| proxy.name).collect();
    Ok(page(header, &beside, &names, &found))
}

fn measure(
    beside: Beside,
    proxy: &Running,
    h2: SocketAddr,
    sink: &Sink,
    cores: Cores,
    span: Duration,
    cell: &mut Cell,
) -> Result<(), Failure> {
    let flooding = match beside {
        Beside::Nobody => None,
        Beside::Elsewhere(flood) => Some(Flooding::start(flood, sink.address, cores.load)?),
        Beside::Flood(flood) => {
            let address = if flood.h2 { h2 } else { proxy.address };
            Some(Flooding::start(flood, address, cores.load)?)
        }
    };
    std::thread::sleep(SETTLE);
    let ended = || flooding.as_ref().map_or(0, |flooding| flooding.ended.load(Ordering::Relaxed));
    let (before, began) = (ended(), Instant::now());
    let clients = Clients::connect(proxy.address, &CLIENT)?;
    let latencies = clients.pace(CLIENT.rate.unwrap_or_default(), span)?;
    cell.ended.push((ended() - before) as f64 / began.elapsed().as_secs_f64());
    cell.rounds.push(latencies);
    drop(flooding);
    std::thread::sleep(SETTLE);
    Ok(())
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
         times are the 99th percentile in µs, the median of the rounds and their range. **×** is \
         that to the same proxy's with nobody beside. A flood of frames is 10,000 frames, or 10,000 \
         requests, a second over 4 connections of HTTP/2, the slow ones are 500 heads, 200 bodies \
         and 100 readers of 16 MiB; a connection that is ended is opened anew at once. **Ended** is \
         how many of them the proxy ended in a second. The flood shares the client's core: what \
         that alone does shows in the row of the one that goes elsewhere.\n",
        CLIENT.clients
    );
    for (name, cells) in names.iter().zip(found) {
        let alone = cells.first().and_then(Cell::p99).map_or(f64::NAN, |alone| alone.median);
        let _ = writeln!(
            page,
            "\n## {name}\n\n| beside | p99 µs | × | ended /s | errors |\n|---|---|---|---|---|"
        );
        for (beside, cell) in beside.iter().zip(cells) {
            let (p99, ended) = (cell.p99(), Spread::of(cell.ended.iter().copied()));
            let _ = writeln!(
                page,
                "| {} | {} | {:.2} | {} | {} |",
                beside.name(),
                p99.map_or_else(|| "none".to_owned(), |p99| p99.show(0)),
                p99.map_or(f64::NAN, |p99| p99.median) / alone,
                ended.map_or_else(String::new, |ended| format!("{:.0}", ended.median)),
                cell.errors(),
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
    fn the_page_compares_with_nobody() {
        let cell = |micros| Cell {
            rounds: vec![Latencies { sorted: vec![Duration::from_micros(micros)], errors: 0 }],
            ended: vec![3.0],
        };
        let beside = [Beside::Nobody, Beside::Flood(&FLOODS[0])];
        let page = page(&[], &beside, &["litegate"], &[vec![cell(100), cell(150)]]);
        assert!(page.contains("| PING | 150 (150 to 150) | 1.50 | 3 | 0 |"), "{page}");
    }
}
