//! Clients of one proxy: one thread on epoll, so that they cost less than any proxy.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    fd::OwnedFd,
};
use rustls::ClientConfig;

use super::{
    talk::{Talk, Want, Way},
    tls,
    wire::{Broken, Wire},
};
use crate::{Failure, generator::Saturation, machine};

/// Before anything is counted: connections are opened and pools are filled.
const WARM_UP: Duration = Duration::from_millis(200);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Connections that are opened at the same time: a listener's queue is not what is measured.
const AT_ONCE: usize = 64;
/// What a slow reader reads while a session begins.
const HANDSHAKE: usize = 1024;

/// What clients do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) way: Way,
    pub(super) want: Want,
    pub(super) tls: bool,
    pub(super) life: Life,
    /// Requests under way on each connection.
    pub(super) at_once: usize,
}

/// How long a connection lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// For many requests.
    Kept,
    /// For one, after a full handshake or a resumed one.
    One { resumed: bool },
}

/// Connections of one kind to one address.
pub(super) struct Crowd {
    kind: Kind,
    address: SocketAddr,
    config: Option<Arc<ClientConfig>>,
    epoll: OwnedFd,
    clients: Vec<Client>,
    buffer: Vec<u8>,
    errors: u64,
    /// Tells the first handshakes, which have no ticket yet, from all others.
    is_warm: bool,
}

struct Client {
    wire: Wire,
    talk: Talk,
    /// Requests without an answer yet.
    owed: usize,
    /// What epoll waits for beside something to read.
    for_room: bool,
}

impl Crowd {
    /// Without a connection yet.
    pub(super) fn new(address: SocketAddr, kind: Kind) -> Result<Self, Failure> {
        let protocol: &[u8] = if kind.way == Way::H2 { b"h2" } else { b"http/1.1" };
        let resumes = kind.life == Life::One { resumed: true };
        Ok(Self {
            kind,
            address,
            config: kind.tls.then(|| tls::config(protocol, resumes)).transpose()?,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            clients: Vec::new(),
            buffer: vec![0; 256 << 10],
            errors: 0,
            is_warm: false,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    fn open(&self, key: usize) -> Result<Client, Failure> {
        let mut wire = Wire::connect(self.address, self.config.as_ref())?;
        let talk = Talk::new(self.kind.way, self.kind.want, self.kind.tls);
        talk.open(&mut wire.out);
        let data = epoll::EventData::new_u64(key as u64);
        epoll::add(&self.epoll, &wire.stream, data, epoll::EventFlags::IN)?;
        Ok(Client { wire, talk, owed: 0, for_room: false })
    }

    /// One more connection, which asks this often at once.
    fn add(&mut self, times: usize) -> Result<(), Failure> {
        let key = self.clients.len();
        let client = self.open(key)?;
        self.clients.push(client);
        self.ask(key, times)
    }

    fn ask(&mut self, key: usize, times: usize) -> Result<(), Failure> {
        let Some(client) = self.clients.get_mut(key) else { return Ok(()) };
        for _ in 0..times {
            client.talk.ask(&mut client.wire.out);
            client.owed += 1;
        }
        self.flush(key)
    }

    fn flush(&mut self, key: usize) -> Result<(), Failure> {
        let Some(client) = self.clients.get_mut(key) else { return Ok(()) };
        match client.wire.flush() {
            Ok(all) if all == client.for_room => {
                client.for_room = !all;
                let data = epoll::EventData::new_u64(key as u64);
                let room = if all { epoll::EventFlags::empty() } else { epoll::EventFlags::OUT };
                let interest = epoll::EventFlags::IN | room;
                Ok(epoll::modify(&self.epoll, &client.wire.stream, data, interest)?)
            }
            Ok(_) => Ok(()),
            Err(Broken) => self.again(key).map(|_| ()),
        }
    }

    /// Another connection in place of one that broke; whatever it owed is an error. Asks as much
    /// again.
    fn again(&mut self, key: usize) -> Result<usize, Failure> {
        let fresh = self.open(key)?;
        let Some(client) = self.clients.get_mut(key) else { return Ok(0) };
        let owed = std::mem::replace(client, fresh).owed;
        self.errors += owed as u64;
        if self.errors > 1_000 {
            return Err("the proxy breaks off again and again".into());
        }
        self.ask(key, owed)?;
        Ok(0)
    }

    /// Reads what there is, at most `most` bytes of the socket; returns how many requests were
    /// answered.
    fn turn(&mut self, key: usize, most: usize) -> Result<usize, Failure> {
        let Some(client) = self.clients.get_mut(key) else { return Ok(0) };
        let Client { wire, talk, owed, .. } = client;
        let mut answered = 0;
        let read = wire.read(&mut self.buffer, most, |bytes, out| {
            answered += talk.feed(bytes, out)?;
            Ok(())
        });
        if read.is_err() || answered > *owed {
            return self.again(key);
        }
        *owed -= answered;
        Ok(answered)
    }

    /// Asks again for what was answered.
    fn go_on(&mut self, key: usize, answered: usize) -> Result<(), Failure> {
        let Life::One { resumed } = self.kind.life else {
            return self.ask(key, answered);
        };
        if answered == 0 {
            // The handshake goes on.
            return self.flush(key);
        }
        let fresh = self.open(key)?;
        if let Some(client) = self.clients.get_mut(key) {
            let before = std::mem::replace(client, fresh);
            if self.is_warm && before.wire.is_resumed() != Some(resumed) {
                self.errors += 1;
            }
            before.wire.close();
        }
        self.ask(key, self.kind.at_once)
    }

    /// Closed loop: all of them ask again at once, for `span` after the warm-up. `cpu` reads the CPU
    /// time of whoever is measured.
    pub(super) fn saturate(
        mut self,
        connections: usize,
        span: Duration,
        mut cpu: impl FnMut() -> Result<Duration, Failure>,
    ) -> Result<Saturation, Failure> {
        let started = Instant::now();
        for _ in 0..connections {
            self.add(self.kind.at_once)?;
        }
        let mut answered = 0;
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
                None if now - started >= WARM_UP => {
                    self.is_warm = true;
                    counting = Some((now, answered, cpu()?));
                }
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
                let now = self.turn(key, usize::MAX)?;
                answered += now as u64;
                self.go_on(key, now)?;
            }
        }
    }

    /// Opens this many connections, each of which asks once; returns when all of them have their
    /// answer, and they stay.
    pub(super) fn settle(&mut self, connections: usize) -> Result<(), Failure> {
        let mut pending = 0;
        let mut events = Vec::with_capacity(256);
        let mut last = Instant::now();
        while pending > 0 || self.len() < connections {
            while pending < AT_ONCE && self.len() < connections {
                self.add(1)?;
                pending += 1;
            }
            machine::wait(&self.epoll, &mut events, Some(&TICK))?;
            let now = Instant::now();
            if !events.is_empty() {
                last = now;
            } else if now - last > PATIENCE {
                return Err(format!("{pending} requests are not answered").into());
            }
            for event in events.drain(..) {
                let key = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
                pending -= self.turn(key, usize::MAX)?;
                self.flush(key)?;
            }
        }
        if self.errors > 0 {
            return Err(format!("{} requests got no answer", self.errors).into());
        }
        Ok(())
    }

    /// Opens this many connections, each of which asks once for what takes long. A few at a time:
    /// `arrived` says of how many of them the node knows.
    pub(super) fn begin(
        &mut self,
        connections: usize,
        arrived: impl Fn() -> usize,
    ) -> Result<(), Failure> {
        while self.len() < connections {
            for _ in 0..AT_ONCE.min(connections - self.len()) {
                self.add(1)?;
            }
            let since = Instant::now();
            while arrived() < self.len() {
                if since.elapsed() > PATIENCE {
                    return Err(format!("{} of {} arrive", arrived(), self.len()).into());
                }
                self.step(0)?;
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    /// Every connection reads or sends `bytes`, and does what is needed for the connection itself.
    /// Returns how many have broken so far.
    pub(super) fn step(&mut self, bytes: usize) -> Result<u64, Failure> {
        let widen = u32::try_from(bytes).unwrap_or(0);
        for key in 0..self.len() {
            let Kind { way, want, .. } = self.kind;
            let most = if way == Way::Http1 && want == Want::Endless {
                bytes.max(HANDSHAKE)
            } else {
                usize::MAX
            };
            self.turn(key, most)?;
            if let Some(client) = self.clients.get_mut(key) {
                let out = &mut client.wire.out;
                match (way, want) {
                    (Way::H2, Want::Endless) if bytes > 0 => super::h2::H2::widen(out, widen),
                    (Way::H2, Want::Upload) if bytes > 0 => {
                        super::h2::H2::send(out, &vec![b'x'; bytes]);
                    }
                    (Way::Http1, Want::Upload) => out.resize(out.len() + bytes, b'x'),
                    _ => {}
                }
            }
            self.flush(key)?;
        }
        Ok(self.errors)
    }
}
