//! Two byte streams that litegate joined.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    task::JoinHandle,
    time::sleep,
};

use super::{
    exchange::{Speaks, between},
    frames::{self, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, RST_STREAM, SETTINGS},
};
use crate::net::Stream;

/// `tunnel_idle` of the configuration.
const IDLE: Duration = Duration::from_secs(20);
/// Whatever is under way has arrived.
const SOON: Duration = Duration::from_millis(1);

const ASK: &str = "GET /t HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: PROTOCOL\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
const ACCEPT: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                      upgrade: PROTOCOL\r\n\r\n";

/// What happens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step<'d> {
    Sends(Side, &'d [u8]),
    /// It sends no more, and still listens.
    Ends(Side),
    Goes(Side),
    /// Nobody says anything for half of what is allowed.
    Rest,
    /// And for longer than is allowed.
    Silence,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Client,
    Node,
}
use Side::{Client, Node};

/// What a client and a node say once they have agreed on another protocol. The first byte says who
/// of them speaks HTTP/2 and what comes with the heads; then steps, each a letter, and where
/// something is sent its length and the bytes.
///
/// What goes in comes out, at once and on either side, and nothing of it is ever a request or an
/// answer; the end of one direction leaves the other; a silent tunnel ends, and no sooner.
pub fn tunnel(data: &[u8]) {
    let [how, script @ ..] = data else { return };
    let [client_h2, node_h2, other, client_first, node_first] =
        [0, 1, 2, 3, 4].map(|bit| how & 1 << bit != 0);
    let speaks = |h2| if h2 { Speaks::H2 } else { Speaks::Http1 };
    let protocol = if other && !client_h2 && !node_h2 { "odd/1" } else { "websocket" };
    let mut steps = steps(script).into_iter().peekable();
    let mut first = |side: Side, wanted: bool| {
        let is_its = |step: &Step<'_>| matches!(step, Step::Sends(of, _) if *of == side);
        match steps.next_if(|step| wanted && is_its(step)) {
            Some(Step::Sends(_, bytes)) => bytes.to_vec(),
            _ => Vec::new(),
        }
    };
    let mut sent = [first(Client, client_first), first(Node, node_first)];

    between(speaks(node_h2), async |stream, mut arriving| {
        let mut client = End::new(stream, speaks(client_h2));
        client.ask(protocol, &sent[0]).await;
        let socket = arriving.recv().await.expect("litegate connects");
        let mut node = End::new(Stream::Simulated(socket), speaks(node_h2));
        node.accept(protocol, &sent[1]).await;
        sleep(SOON).await;
        let head = client.seen.bytes.borrow().escape_ascii().to_string();
        let switched = match client.speaks {
            Speaks::Http1 => head.starts_with("HTTP/1.1 101 "),
            Speaks::H2 => client.frames().iter().any(|frame| frame.kind == HEADERS),
        };
        assert!(switched, "no tunnel: {head}");

        let mut ends = [client, node];
        let (mut rested, mut gone) = (false, false);
        check(&ends, &sent);
        for step in steps {
            if ends.iter().all(|end| end.ended) {
                break;
            }
            match step {
                Step::Sends(side, _) | Step::Ends(side) if ends[side as usize].ended => continue,
                Step::Sends(side, bytes) => {
                    ends[side as usize].send(bytes).await;
                    sent[side as usize].extend_from_slice(bytes);
                    rested = false;
                }
                Step::Ends(side) => ends[side as usize].end().await,
                Step::Goes(side) => {
                    ends[side as usize].go().await;
                    gone = true;
                    break;
                }
                Step::Rest if rested => continue,
                Step::Rest => {
                    sleep(IDLE / 2).await;
                    rested = true;
                }
                Step::Silence => {
                    let patience = if rested { IDLE / 2 } else { IDLE };
                    sleep(patience - 1000 * SOON).await;
                    check(&ends, &sent);
                    break;
                }
            }
            sleep(SOON).await;
            check(&ends, &sent);
        }
        let is_ended = |ends: &[End; 2]| ends.iter().all(|end| end.ended);
        if !is_ended(&ends) || gone {
            sleep(IDLE).await;
        }
        for (place, end) in ends.iter().enumerate().filter(|(_, end)| !end.gone) {
            assert!(end.is_over(), "{:?} still has it", [Client, Node][place]);
            assert_eq!(shown(&end.got()), shown(&sent[1 - place]));
        }
        assert!(arriving.try_recv().is_err(), "litegate connects again");
    });
}

/// What went in has come out, and whoever goes on can.
fn check(ends: &[End; 2], sent: &[Vec<u8>; 2]) {
    for (place, end) in ends.iter().enumerate() {
        let from = &ends[1 - place];
        assert_eq!(shown(&end.got()), shown(&sent[1 - place]), "{:?} got", [Client, Node][place]);
        assert_eq!(end.is_over(), from.ended, "as the {:?} wants", [Node, Client][place]);
    }
}

fn steps(mut script: &[u8]) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    while let Some((letter, rest)) = script.split_first() {
        script = rest;
        let side = if letter.eq_ignore_ascii_case(&b'c') { Client } else { Node };
        steps.push(match letter {
            b'c' | b'n' => {
                let [length, rest @ ..] = rest else { break };
                let (bytes, rest) = rest.split_at(usize::from(*length).min(rest.len()));
                script = rest;
                if bytes.is_empty() {
                    continue;
                }
                Step::Sends(side, bytes)
            }
            b'C' | b'N' => Step::Ends(side),
            b'x' => Step::Goes(Client),
            b'X' => Step::Goes(Node),
            b'r' => Step::Rest,
            b's' => Step::Silence,
            _ => continue,
        });
    }
    steps
}

fn shown(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// One end of the tunnel.
struct End {
    speaks: Speaks,
    writes: Option<WriteHalf<Stream>>,
    reads: JoinHandle<()>,
    seen: Rc<Seen>,
    /// It sends no more.
    ended: bool,
    gone: bool,
}

#[derive(Default)]
struct Seen {
    bytes: RefCell<Vec<u8>>,
    over: Cell<bool>,
}

/// What is the tunnel's on a connection of HTTP/2.
const STREAM: u32 = 1;

impl End {
    fn new(stream: Stream, speaks: Speaks) -> Self {
        let (reads, writes) = split(stream);
        let seen = Rc::new(Seen::default());
        let reads = tokio::task::spawn_local(read(reads, Rc::clone(&seen)));
        Self { speaks, writes: Some(writes), reads, seen, ended: false, gone: false }
    }

    async fn write(&mut self, bytes: &[u8]) {
        let Some(writes) = &mut self.writes else { return };
        // Whoever does not take it is found by what it did not get.
        let _ = writes.write_all(bytes).await;
    }

    async fn ask(&mut self, protocol: &str, first: &[u8]) {
        let bytes = match self.speaks {
            Speaks::Http1 => [ASK.replace("PROTOCOL", protocol).as_bytes(), first].concat(),
            Speaks::H2 => {
                let head = frames::pairs(
                    b":method: CONNECT\n:protocol: websocket\n:scheme: http\n:path: /t\n\
                      :authority: a\nsec-websocket-version: 13\n",
                );
                let mut wire = frames::PREFACE.to_vec();
                frames::frame(&mut wire, SETTINGS, 0, 0, &[]);
                frames::frame(&mut wire, HEADERS, END_HEADERS, STREAM, &frames::block(&head));
                data(&mut wire, first);
                wire
            }
        };
        self.write(&bytes).await;
    }

    async fn accept(&mut self, protocol: &str, first: &[u8]) {
        match self.speaks {
            Speaks::Http1 => {
                while !self.seen.bytes.borrow().windows(4).any(|end| end == b"\r\n\r\n") {
                    sleep(SOON).await;
                }
                let head = ACCEPT.replace("PROTOCOL", protocol);
                self.write(&[head.as_bytes(), first].concat()).await;
            }
            Speaks::H2 => {
                // RFC 8441 section 3.
                let mut wire = Vec::new();
                frames::frame(&mut wire, SETTINGS, 0, 0, &[0, 8, 0, 0, 0, 1]);
                self.write(&wire).await;
                while !self.frames().iter().any(|frame| frame.kind == HEADERS) {
                    sleep(SOON).await;
                }
                let mut wire = Vec::new();
                let head = frames::block(&frames::pairs(b":status: 200\n"));
                frames::frame(&mut wire, HEADERS, END_HEADERS, STREAM, &head);
                data(&mut wire, first);
                self.write(&wire).await;
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) {
        match self.speaks {
            Speaks::Http1 => self.write(bytes).await,
            Speaks::H2 => {
                let mut wire = Vec::new();
                data(&mut wire, bytes);
                self.write(&wire).await;
            }
        }
    }

    async fn end(&mut self) {
        self.ended = true;
        match (self.speaks, &mut self.writes) {
            (Speaks::Http1, Some(writes)) => {
                let _ = writes.shutdown().await;
            }
            _ => {
                let mut wire = Vec::new();
                frames::frame(&mut wire, DATA, END_STREAM, STREAM, &[]);
                self.write(&wire).await;
            }
        }
    }

    /// Without a word.
    async fn go(&mut self) {
        (self.ended, self.gone) = (true, true);
        if self.speaks == Speaks::H2 {
            let mut wire = Vec::new();
            frames::frame(&mut wire, RST_STREAM, 0, STREAM, &8_u32.to_be_bytes());
            self.write(&wire).await;
            return;
        }
        self.reads.abort();
        self.writes = None;
    }

    fn frames(&self) -> Vec<Frame> {
        let bytes = self.seen.bytes.borrow();
        let preface = if bytes.starts_with(b"PRI") { frames::PREFACE.len() } else { 0 };
        frames::read(bytes.get(preface..).unwrap_or_default()).0
    }

    /// What came through the tunnel.
    fn got(&self) -> Vec<u8> {
        if self.speaks == Speaks::Http1 {
            let bytes = self.seen.bytes.borrow();
            let end = bytes.windows(4).position(|end| end == b"\r\n\r\n").expect("it has a head");
            return bytes[end + 4..].to_vec();
        }
        let mut got = Vec::new();
        let frames = self.frames();
        for frame in frames.iter().filter(|frame| frame.stream != 0) {
            assert_eq!(frame.stream, STREAM, "another stream: {frame:?}");
            assert!(!frame.is(DATA, 8), "nobody pads");
            if frame.kind == DATA {
                got.extend_from_slice(&frame.payload);
            }
        }
        let heads = frames.iter().filter(|frame| frame.kind == HEADERS);
        assert_eq!(heads.count(), 1, "another head");
        got
    }

    /// Nothing more will come.
    fn is_over(&self) -> bool {
        self.seen.over.get()
            || self.speaks == Speaks::H2
                && self.frames().iter().any(|frame| {
                    frame.stream == STREAM
                        && (frame.kind == RST_STREAM || frame.is(DATA, END_STREAM))
                })
    }
}

fn data(wire: &mut Vec<u8>, bytes: &[u8]) {
    if !bytes.is_empty() {
        frames::frame(wire, DATA, 0, STREAM, bytes);
    }
}

async fn read(mut from: ReadHalf<Stream>, seen: Rc<Seen>) {
    let mut buffer = vec![0; 4 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        seen.bytes.borrow_mut().extend_from_slice(&buffer[..n]);
    }
    seen.over.set(true);
}
