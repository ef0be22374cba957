//! The node behind the proxies: cheaper than any of them, so that it is never what is measured.
//!
//! One thread on epoll. It looks for the end of a head, skips the body by `Content-Length`, and
//! answers with bytes made before the first request: two system calls per request. An upgrade
//! makes it a WebSocket that sends every message back.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use rustix::{
    event::{Timespec, epoll},
    fd::OwnedFd,
};

use crate::{
    Failure,
    machine::{self, Core},
    message::{Fault, Reader, field, number},
    websocket::{self, Messages},
};

/// Where the head of the request comes back as the body: shows what a proxy makes of it.
pub(crate) const ECHO: &str = "/head";
/// Where the body is [`GIBIBYTE`] long, made while it is sent.
pub(crate) const ENDLESS: &str = "/endless";
pub(crate) const GIBIBYTE: usize = 1 << 30;

/// A running upstream; dropping it stops it.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    /// Connections that it has.
    open: Arc<AtomicUsize>,
    /// Bytes of endless answers that sockets took.
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Upstream {
    /// Answers `/<n>` with a body of `n` bytes, for each of `sizes`.
    pub(crate) fn start(core: Core, sizes: &[usize]) -> Result<Self, Failure> {
        Self::with(core, sizes, None)
    }

    /// The same, where answers to POST get fields of their own.
    pub(crate) fn with(
        core: Core,
        sizes: &[usize],
        on_write: Option<OnWrite>,
    ) -> Result<Self, Failure> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut serving = Serving {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: Vec::new(),
            answers: sizes.iter().map(|&size| (size, response("", &vec![b'x'; size]))).collect(),
            on_write,
            buffer: vec![0; 256 * 1024],
            open: Arc::default(),
            sent: Arc::default(),
        };
        let (open, sent) = (Arc::clone(&serving.open), Arc::clone(&serving.sent));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("upstream".into()).spawn(move || {
            if let Err(failure) = machine::pin(core).and_then(|()| serving.run(&listener, &stopped))
            {
                eprintln!("the upstream has stopped: {failure}");
            }
        })?;
        Ok(Self { address, open, sent, stop, thread: Some(thread) })
    }

    /// Connections that it has.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Bytes of [`ENDLESS`] answers that it has sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Called for each write; returns lines for the head of its answer.
pub(crate) type OnWrite = Box<dyn Fn() -> String + Send>;

/// What an app behind a proxy would send, `Date` and all.
fn response(fields: &str, body: &[u8]) -> Vec<u8> {
    let mut response = format!(
        "HTTP/1.1 200 OK\r\nServer: upstream\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\
         Content-Type: text/plain\r\n{fields}Content-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    response.extend_from_slice(body);
    response
}

struct Serving {
    epoll: OwnedFd,
    /// By the key that epoll hands back.
    connections: Vec<Option<Connection>>,
    answers: Vec<(usize, Vec<u8>)>,
    on_write: Option<OnWrite>,
    buffer: Vec<u8>,
    open: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
}

struct Connection {
    stream: TcpStream,
    reader: Reader,
    /// What the client of a WebSocket sends, once it is one.
    messages: Option<Messages>,
    /// To the request being read or answered.
    answer: Answer,
    /// How much of the answer the socket has taken; `None` while the request is being read.
    sent: Option<usize>,
}

enum Answer {
    /// One of those made beforehand.
    Made(usize),
    Own(Vec<u8>),
    /// So much is left of one that is longer than anybody waits for.
    Endless(usize),
}

const LISTENER: u64 = u64::MAX;
const AWAKE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

impl Serving {
    fn run(&mut self, listener: &TcpListener, stop: &AtomicBool) -> Result<(), Failure> {
        let interest = epoll::EventFlags::IN;
        epoll::add(&self.epoll, listener, epoll::EventData::new_u64(LISTENER), interest)?;
        let mut events = Vec::with_capacity(256);
        while !stop.load(Ordering::Relaxed) {
            machine::wait(&self.epoll, &mut events, Some(&AWAKE))?;
            for event in events.drain(..) {
                match event.data.u64() {
                    LISTENER => self.accept(listener)?,
                    key => self.serve(usize::try_from(key).unwrap_or(usize::MAX))?,
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: &TcpListener) -> Result<(), Failure> {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let free = self.connections.iter().position(Option::is_none);
            let key = free.unwrap_or(self.connections.len());
            let data = epoll::EventData::new_u64(key as u64);
            epoll::add(&self.epoll, &stream, data, epoll::EventFlags::IN)?;
            let connection = Some(Connection {
                stream,
                reader: Reader::default(),
                messages: None,
                answer: Answer::Own(Vec::new()),
                sent: None,
            });
            self.open.fetch_add(1, Ordering::Relaxed);
            match self.connections.get_mut(key) {
                Some(place) => *place = connection,
                None => self.connections.push(connection),
            }
        }
    }

    fn serve(&mut self, key: usize) -> Result<(), Failure> {
        let Some(place) = self.connections.get_mut(key) else { return Ok(()) };
        let Some(connection) = place.as_mut() else { return Ok(()) };
        let was_sending = connection.sent.is_some();
        let left = connection.left();
        let goes_on = connection.turn(&mut self.buffer, &self.answers, self.on_write.as_ref());
        let sent = left.saturating_sub(connection.left());
        if sent > 0 {
            self.sent.fetch_add(sent as u64, Ordering::Relaxed);
        }
        if !goes_on {
            // Closing the socket takes it out of epoll.
            *place = None;
            self.open.fetch_sub(1, Ordering::Relaxed);
            return Ok(());
        }
        let is_sending = connection.sent.is_some();
        if was_sending != is_sending {
            let interest = if is_sending { epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
            let data = epoll::EventData::new_u64(key as u64);
            epoll::modify(&self.epoll, &connection.stream, data, interest)?;
        }
        Ok(())
    }
}

impl Connection {
    /// Of an endless answer.
    fn left(&self) -> usize {
        if let Answer::Endless(left) = self.answer { left } else { 0 }
    }

    /// Does what can be done now; `false` when the connection is over.
    fn turn(
        &mut self,
        buffer: &mut [u8],
        answers: &[(usize, Vec<u8>)],
        on_write: Option<&OnWrite>,
    ) -> bool {
        if self.sent.is_some() {
            return self.send(answers);
        }
        let read = match self.stream.read(buffer) {
            Ok(0) => return false,
            Ok(read) => read,
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        if let Some(messages) = &mut self.messages {
            let mut back = Vec::new();
            if messages.feed(bytes, |message| websocket::write(&mut back, None, message)).is_err() {
                return false;
            }
            if !back.is_empty() {
                (self.answer, self.sent) = (Answer::Own(back), Some(0));
                return self.send(answers);
            }
            return true;
        }
        let Self { reader, answer, messages, stream, .. } = self;
        let fed = reader.feed(bytes, |head, _| {
            let target = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
            *answer = if target == ECHO.as_bytes() {
                Answer::Own(response("", head))
            } else if field(head, b"upgrade").is_some() {
                *messages = Some(Messages::default());
                Answer::Own(websocket::ACCEPTED.to_vec())
            } else if target == ENDLESS.as_bytes() {
                // What waits in the kernel is nobody's memory here, but the machine's.
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(&*stream, buffer.len());
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {GIBIBYTE}\r\n\r\n"
                );
                let _ = stream.write_all(head.as_bytes());
                Answer::Endless(GIBIBYTE)
            } else {
                let size = number(target.get(1..).unwrap_or_default());
                let made = answers.iter().position(|(of, _)| *of == size);
                let made = made.ok_or(Fault::Refused)?;
                match on_write.filter(|_| head.starts_with(b"POST ")) {
                    Some(on_write) => Answer::Own(response(&on_write(), &vec![b'x'; size])),
                    None => Answer::Made(made),
                }
            };
            Ok(())
        });
        match fed {
            Ok(0) => true,
            Ok(1) => {
                self.sent = Some(0);
                self.send(answers)
            }
            // Garbage, or a second request before the first has its answer: nobody here pipelines.
            _ => false,
        }
    }

    fn send(&mut self, answers: &[(usize, Vec<u8>)]) -> bool {
        let bytes = match &self.answer {
            Answer::Made(made) => answers.get(*made).map(|(_, bytes)| bytes),
            Answer::Own(bytes) => Some(bytes),
            Answer::Endless(left) => return self.send_on(*left),
        };
        let bytes = bytes.map(Vec::as_slice).unwrap_or_default();
        let sent = self.sent.unwrap_or_default();
        match self.stream.write(bytes.get(sent..).unwrap_or_default()) {
            Ok(more) if sent + more < bytes.len() => self.sent = Some(sent + more),
            Ok(_) => self.sent = None,
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
        true
    }

    fn send_on(&mut self, left: usize) -> bool {
        match self.stream.write(CHUNK.get(..left).unwrap_or(&CHUNK)) {
            Ok(sent) => {
                self.answer = Answer::Endless(left - sent);
                self.sent = (sent < left).then_some(0);
            }
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
        true
    }
}

/// Of an endless answer.
static CHUNK: [u8; 64 << 10] = [b'x'; 64 << 10];
