//! The clients: one thread on epoll, so that it costs less than any proxy.
//!
//! A **closed loop** asks again as soon as it has an answer and so finds out how much a proxy can
//! do. An **open loop** asks at fixed points in time, whatever became of earlier requests, and so
//! finds out how long an answer takes: a stall is counted by every request that it delays.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    fd::OwnedFd,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create,
        timerfd_settime,
    },
};

use crate::{
    Failure, machine,
    message::{Fault, Reader},
    workload::Workload,
};

/// Before anything is counted: connections are opened and pools are filled.
const WARM_UP: Duration = Duration::from_millis(200);
/// How long an answer may take before it counts as an error.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a closed loop found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saturation {
    pub(crate) requests: u64,
    pub(crate) elapsed: Duration,
    /// CPU time that the proxy used meanwhile.
    pub(crate) cpu: Duration,
    pub(crate) errors: u64,
}

/// What an open loop found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latencies {
    /// From the moment that each request was due until its answer was complete; ascending.
    pub(crate) sorted: Vec<Duration>,
    pub(crate) errors: u64,
}

/// Clients of one target.
pub(crate) struct Clients {
    epoll: OwnedFd,
    address: SocketAddr,
    connections: Vec<Connection>,
    /// What they ask: each of them its own, or in turn.
    requests: Vec<Vec<u8>>,
    /// Whether a client goes on to the next request each time.
    in_turn: bool,
    asked: usize,
    /// Bytes of the expected answer's body.
    download: usize,
    buffer: Vec<u8>,
    errors: u64,
}

struct Connection {
    stream: TcpStream,
    reader: Reader,
    /// Which of the requests it asks.
    request: usize,
    /// How much of the request the socket has taken; `None` when all of it, or nothing is asked.
    sent: Option<usize>,
    /// Since when the request under way has been due.
    due: Option<Instant>,
    /// What epoll waits for: room to send, or else an answer.
    for_room: bool,
}

/// A request that is over.
#[derive(Clone, Copy)]
struct Over {
    /// Since when it had been due.
    due: Instant,
    /// Whether it was answered as it should be.
    well: bool,
}

/// How a turn of a connection ended.
enum Turn {
    Pending,
    Answered,
    Broken,
}

impl Clients {
    /// Connects them all.
    pub(crate) fn connect(address: SocketAddr, workload: &Workload) -> Result<Self, Failure> {
        Self::with(address, workload, vec![workload.request()], false)
    }

    /// Clients that ask different things of the same workload.
    pub(crate) fn with(
        address: SocketAddr,
        workload: &Workload,
        requests: Vec<Vec<u8>>,
        in_turn: bool,
    ) -> Result<Self, Failure> {
        let mut clients = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            address,
            connections: Vec::with_capacity(workload.clients),
            requests,
            in_turn,
            asked: 0,
            download: workload.download,
            buffer: vec![0; 256 * 1024],
            errors: 0,
        };
        for key in 0..workload.clients {
            let connection = clients.open(key)?;
            clients.connections.push(connection);
        }
        Ok(clients)
    }

    fn open(&self, key: usize) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let data = epoll::EventData::new_u64(key as u64);
        epoll::add(&self.epoll, &stream, data, epoll::EventFlags::IN)?;
        let reader = Reader::default();
        Ok(Connection { stream, reader, request: key, sent: None, due: None, for_room: false })
    }

    /// Sends a request on an idle connection.
    fn ask(&mut self, key: usize, due: Instant) -> Result<(), Failure> {
        if let Some(connection) = self.connections.get_mut(key) {
            let place = if self.in_turn { self.asked } else { key };
            connection.request = place % self.requests.len().max(1);
            self.asked = self.asked.wrapping_add(1);
            connection.sent = Some(0);
            connection.due = Some(due);
        }
        self.turn(key, false).map(|_| ())
    }

    /// Does what an event allows; returns the request that is over with it.
    fn turn(&mut self, key: usize, readable: bool) -> Result<Option<Over>, Failure> {
        let Some(connection) = self.connections.get_mut(key) else { return Ok(None) };
        let request = self.requests.get(connection.request).map(Vec::as_slice).unwrap_or_default();
        let turn = connection.turn(readable, request, self.download, &mut self.buffer);
        let for_room = connection.sent.is_some();
        if for_room != connection.for_room && !matches!(turn, Turn::Broken) {
            connection.for_room = for_room;
            let data = epoll::EventData::new_u64(key as u64);
            // An answer that comes while the request is still being sent is read as well.
            let interest = if for_room {
                epoll::EventFlags::IN | epoll::EventFlags::OUT
            } else {
                epoll::EventFlags::IN
            };
            epoll::modify(&self.epoll, &connection.stream, data, interest)?;
        }
        match turn {
            Turn::Pending => Ok(None),
            Turn::Answered => Ok(connection.due.take().map(|due| Over { due, well: true })),
            Turn::Broken => {
                let due = connection.due.take();
                // One that was idle may be closed by the proxy; one that waited is owed an answer.
                self.errors += u64::from(due.is_some());
                let opened = self.open(key)?;
                if let Some(connection) = self.connections.get_mut(key) {
                    *connection = opened;
                }
                Ok(due.map(|due| Over { due, well: false }))
            }
        }
    }

    /// Closed loop: every client asks again at once, for `span` after the warm-up. `cpu` reads the
    /// CPU time of whoever is measured.
    pub(crate) fn saturate(
        &mut self,
        span: Duration,
        mut cpu: impl FnMut() -> Result<Duration, Failure>,
    ) -> Result<Saturation, Failure> {
        let started = Instant::now();
        for key in 0..self.connections.len() {
            self.ask(key, started)?;
        }
        let mut answered = 0;
        // When counting began, what had been answered by then, and the CPU time.
        let mut counting: Option<(Instant, u64, Duration)> = None;
        let mut last = started;
        let mut events = Vec::with_capacity(256);
        loop {
            machine::wait(&self.epoll, &mut events, Some(&TICK))?;
            let now = Instant::now();
            if !events.is_empty() {
                last = now;
            } else if now - last > PATIENCE {
                return Err("no answer came any more".into());
            }
            match counting {
                None if now - started >= WARM_UP => counting = Some((now, answered, cpu()?)),
                Some((since, before, used)) if now - since >= span => {
                    return Ok(Saturation {
                        requests: answered - before,
                        elapsed: now - since,
                        cpu: cpu()?.saturating_sub(used),
                        errors: self.errors,
                    });
                }
                _ => {}
            }
            for event in events.drain(..) {
                let key = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
                if let Some(over) = self.turn(key, is_readable(event))? {
                    answered += u64::from(over.well);
                    self.ask(key, now)?;
                }
            }
        }
    }

    /// Open loop: `rate` requests a second, evenly spaced, for `span` after the warm-up.
    pub(crate) fn pace(mut self, rate: u32, span: Duration) -> Result<Latencies, Failure> {
        let period = Duration::from_secs(1) / rate;
        let timer = ticking(period)?;
        epoll::add(&self.epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)?;

        let started = Instant::now();
        let counted = started + WARM_UP;
        let end = counted + span;
        let mut next = started;
        // Longest idle first, so that all of them take part.
        let mut idle: VecDeque<usize> = (0..self.connections.len()).collect();
        // Due, but every client waits for an answer. Bounded by what is due until the end.
        let mut delayed = VecDeque::new();
        let mut sorted = Vec::new();
        let mut events = Vec::with_capacity(256);
        loop {
            machine::wait(&self.epoll, &mut events, Some(&TICK))?;
            let now = Instant::now();
            for event in events.drain(..) {
                let key = match event.data.u64() {
                    TIMER => {
                        rustix::io::read(&timer, &mut [0; 8])?;
                        continue;
                    }
                    key => usize::try_from(key).unwrap_or(usize::MAX),
                };
                if let Some(over) = self.turn(key, is_readable(event))? {
                    idle.push_back(key);
                    if over.well && over.due >= counted {
                        sorted.push(over.due.elapsed());
                    }
                }
            }
            while next < end && next <= now {
                delayed.push_back(next);
                next += period;
            }
            while let Some(&due) = delayed.front()
                && let Some(key) = idle.pop_front()
            {
                delayed.pop_front();
                self.ask(key, due)?;
            }
            let unanswered = delayed.len() + self.connections.len() - idle.len();
            if now >= end && (unanswered == 0 || now >= end + PATIENCE) {
                sorted.sort_unstable();
                return Ok(Latencies { sorted, errors: self.errors + unanswered as u64 });
            }
        }
    }
}

const TIMER: u64 = u64::MAX;
/// So that a loop ends though nothing happens.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Whether there is something to read: an answer, its end, or an error.
fn is_readable(event: epoll::Event) -> bool {
    let flags = event.flags;
    flags != epoll::EventFlags::OUT
}

/// A timer that epoll can wait for: its own time-outs may be late by the kernel's timer slack.
fn ticking(period: Duration) -> Result<OwnedFd, Failure> {
    let timer =
        timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let period = Timespec { tv_sec: 0, tv_nsec: period.subsec_nanos().into() };
    let times = Itimerspec { it_interval: period, it_value: period };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
    Ok(timer)
}

impl Connection {
    fn turn(&mut self, readable: bool, request: &[u8], download: usize, buffer: &mut [u8]) -> Turn {
        if let Some(sent) = self.sent {
            match self.stream.write(request.get(sent..).unwrap_or_default()) {
                Ok(more) if sent + more < request.len() => self.sent = Some(sent + more),
                Ok(_) => self.sent = None,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Turn::Broken,
            }
        }
        if !readable {
            return Turn::Pending;
        }
        let read = match self.stream.read(buffer) {
            Ok(0) => return Turn::Broken,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Turn::Pending,
            Err(_) => return Turn::Broken,
        };
        let fed = self.reader.feed(buffer.get(..read).unwrap_or_default(), |head, body| {
            let right = head.starts_with(b"HTTP/1.1 200 ") && body == download;
            if right { Ok(()) } else { Err(Fault::Refused) }
        });
        match fed {
            Ok(0) => Turn::Pending,
            // An answer to a request that nobody has asked, or has not yet sent whole.
            Ok(1) if self.due.is_some() && self.sent.is_none() => Turn::Answered,
            _ => Turn::Broken,
        }
    }
}

/// Asks once on a connection of its own and waits: returns head and body.
pub(crate) fn ask_once(stream: &mut TcpStream, request: &[u8]) -> Result<Vec<u8>, Failure> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request)?;
    let mut reader = Reader::default();
    let mut answer = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        let read = stream.read(&mut buffer)?;
        let bytes = buffer.get(..read).unwrap_or_default();
        answer.extend_from_slice(bytes);
        let ok = |head: &[u8], _| {
            let right = head.starts_with(b"HTTP/1.1 200 ");
            if right { Ok(()) } else { Err(Fault::Refused) }
        };
        match reader.feed(bytes, ok) {
            Ok(1) => return Ok(answer),
            Ok(0) if read > 0 => {}
            _ => return Err(format!("answered: {}", String::from_utf8_lossy(&answer)).into()),
        }
    }
}

/// Opens this many connections, each of which asks once and then stays.
pub(crate) fn idle(
    address: SocketAddr,
    connections: usize,
    request: &[u8],
) -> Result<Vec<TcpStream>, Failure> {
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        ask_once(&mut stream, request)?;
        open.push(stream);
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{machine::Cores, upstream::Upstream, workload};

    const SPAN: Duration = Duration::from_millis(50);
    const PATIENT: usize = 40;

    #[test]
    fn every_workload_is_answered_without_a_proxy() {
        let upstream = Upstream::start(Cores::find().unwrap().load, &workload::sizes()).unwrap();
        for workload in workload::WORKLOADS {
            // On a busy machine a span may pass without a turn of ours.
            let answered = (0..PATIENT).any(|_| {
                let mut clients = Clients::connect(upstream.address, workload).unwrap();
                let saturation = clients.saturate(SPAN, || Ok(Duration::ZERO)).unwrap();
                assert_eq!(saturation.errors, 0, "{}", workload.name);
                saturation.requests > 0
            });
            assert!(answered, "{}", workload.name);
        }
    }

    #[test]
    fn an_open_loop_asks_as_often_as_it_was_told() {
        let upstream = Upstream::start(Cores::find().unwrap().load, &workload::sizes()).unwrap();
        let clients = Clients::connect(upstream.address, &workload::WORKLOADS[0]).unwrap();
        let latencies = clients.pace(1_000, SPAN).unwrap();
        assert_eq!((latencies.sorted.len(), latencies.errors), (50, 0));
        assert!(latencies.sorted.is_sorted());
    }

    #[test]
    fn an_answer_of_another_size_is_an_error() {
        let upstream = Upstream::start(Cores::find().unwrap().load, &[128]).unwrap();
        let mut clients = Clients::connect(upstream.address, &workload::WORKLOADS[0]).unwrap();
        clients.download = 127;
        let saturation = clients.saturate(SPAN, || Ok(Duration::ZERO)).unwrap();
        assert!(saturation.errors > 0);
    }
}
