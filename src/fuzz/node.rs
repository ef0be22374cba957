//! A node that speaks HTTP/2, and says anything in it.

use std::cell::{Cell, RefCell};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    exchange::{Seen, Speaks, between, client_and_node},
    frames::{
        self, ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING,
        PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE,
    },
    http::{answers, is_of_the_node, is_own},
    strict::{Framing, Message},
};
use crate::net::{Stream, simulated::Socket};

/// Any frames from a node, in answer to the first of three requests: its method, and whether the
/// connection ends behind them or begins with them, are in the first two bytes. Frames are parted
/// by empty lines, each a letter for its type, a hexadecimal digit for its flags, one for its
/// stream, and its payload; fields are spelled in lines.
///
/// The client, which speaks HTTP/1.1, gets well-formed answers, each to its own request, and none
/// looks complete that is not. No write is sent twice that a node may have acted on.
pub fn answer_h2(data: &[u8]) {
    let [method, how, data @ ..] = data else { return };
    let method = match method {
        b'h' => "HEAD",
        b'p' => "POST",
        b'o' => "OPTIONS",
        _ => "GET",
    };
    let first =
        format!("{method} /0 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nte: trailers\r\n\r\nr0");
    let rest = "POST /1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
                2\r\nr1\r\n0\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nr2";
    let node = Node {
        is_head: method == "HEAD",
        closes: *how == b'c',
        first: *how == b'f',
        hostile: data,
        asked: RefCell::default(),
        on: Cell::new(None),
        wrote: RefCell::default(),
    };
    let (client, ended) = between(Speaks::H2, async |stream, arriving| {
        let pieces = [first.as_bytes(), rest.as_bytes()];
        client_and_node(stream, &pieces, arriving, async |socket, number| {
            node.serve(socket, number).await;
        })
        .await
    });
    let methods = [method, "POST", "GET"].map(|method| method.as_bytes().to_vec());
    let answers = answers(&Seen { node: Vec::new(), client, ended }, &methods);
    let said = node.said();
    for (number, answer) in answers.iter().filter(|answer| answer.status() >= 200).enumerate() {
        assert!(number < 3, "more answers than questions: {answers:#?}");
        let is_echo = is_of_the_node(answer) && answer.body == format!("r{number}").as_bytes();
        if number > 0 {
            assert!(is_echo || is_own(answer), "{answer:#?} to request {number}");
        } else if answer.complete && !is_own(answer) && !is_of_the_node(answer) {
            assert!(said.is(answer), "{answer:#?}\nof {said:#?}");
        }
    }
    for (name, _) in answers.iter().flat_map(|answer| &answer.fields) {
        assert!(!name.starts_with("fly-replay") && !name.starts_with(':'), "{answers:#?}");
    }
    let asked = node.asked.borrow();
    for body in asked.iter() {
        assert!([&b"r0"[..], b"r1", b"r2"].contains(&&**body), "{}", body.escape_ascii());
    }
    if !said.refuses {
        let writes = asked.iter().filter(|body| *body == b"r1").count();
        assert!(writes <= 1, "a write came {writes} times");
    }
}

/// What the node did and does.
struct Node<'d> {
    is_head: bool,
    /// It ends the connection behind what is hostile.
    closes: bool,
    /// It begins the first connection with it, before its settings.
    first: bool,
    hostile: &'d [u8],
    /// The bodies of whole requests, in their order.
    asked: RefCell<Vec<Vec<u8>>>,
    /// The connection and stream that the hostile answer is on.
    on: Cell<Option<(usize, u32)>>,
    /// All that it wrote, connection by connection.
    wrote: RefCell<Vec<Vec<u8>>>,
}

impl Node<'_> {
    async fn serve(&self, socket: Socket, number: usize) {
        let connections = self.wrote.borrow().len().max(number + 1);
        self.wrote.borrow_mut().resize(connections, Vec::new());
        let mut stream = Stream::Simulated(socket);
        let mut wire = Vec::new();
        if self.first && number == 0 {
            self.on.set(Some((0, 1)));
            wire = hostile(self.hostile, 1);
        } else {
            frames::frame(&mut wire, SETTINGS, 0, 0, &[]);
        }
        if !self.write(&mut stream, number, &wire).await {
            return;
        }
        let (mut bytes, mut at) = (Vec::new(), frames::PREFACE.len());
        let mut bodies: Vec<(u32, Vec<u8>)> = Vec::new();
        while let Ok(1..) = stream.read_buf(&mut bytes).await {
            let (new, length) = frames::read(bytes.get(at..).unwrap_or_default());
            at += length;
            for frame in new {
                let mut wire = Vec::new();
                let mut closes = false;
                match frame.kind {
                    SETTINGS if !frame.is(SETTINGS, ACK) => {
                        frames::frame(&mut wire, SETTINGS, ACK, 0, &[]);
                    }
                    PING if !frame.is(PING, ACK) => {
                        frames::frame(&mut wire, PING, ACK, 0, &frame.payload);
                    }
                    DATA => {
                        let place = bodies.iter().position(|(stream, _)| *stream == frame.stream);
                        let place = place.unwrap_or_else(|| {
                            bodies.push((frame.stream, Vec::new()));
                            bodies.len() - 1
                        });
                        bodies[place].1.extend_from_slice(&frame.payload);
                        if frame.is(DATA, END_STREAM) {
                            let (stream, body) = bodies.remove(place);
                            let is_hostile = body == b"r0" && self.on.get().is_none();
                            closes = is_hostile && self.closes;
                            wire = if is_hostile {
                                self.on.set(Some((number, stream)));
                                hostile(self.hostile, stream)
                            } else {
                                self.echo(stream, &body)
                            };
                            self.asked.borrow_mut().push(body);
                        }
                    }
                    _ => {}
                }
                if !self.write(&mut stream, number, &wire).await || closes {
                    return;
                }
            }
        }
    }

    async fn write(&self, stream: &mut Stream, number: usize, wire: &[u8]) -> bool {
        self.wrote.borrow_mut()[number].extend_from_slice(wire);
        stream.write_all(wire).await.is_ok()
    }

    /// An answer that says what was asked.
    fn echo(&self, stream: u32, body: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let length = body.len();
        let head = format!(":status: 200\nx-node: n0\ncontent-length: {length}\n");
        let head = frames::block(&frames::pairs(head.as_bytes()));
        let bodiless = self.is_head && body == b"r0";
        let ends = if bodiless { END_STREAM } else { 0 };
        frames::frame(&mut wire, HEADERS, END_HEADERS | ends, stream, &head);
        if !bodiless {
            frames::frame(&mut wire, DATA, END_STREAM, stream, body);
        }
        wire
    }

    /// What its hostile answer says to whoever reads frames.
    fn said(&self) -> Said {
        let mut said = Said::default();
        let Some((connection, stream)) = self.on.get() else { return said };
        let wrote = self.wrote.borrow();
        for frame in frames::read(&wrote[connection]).0 {
            said.refuses |= matches!(frame.kind, RST_STREAM | GOAWAY);
            if frame.stream == stream && !said.ends {
                said.see(&frame);
            }
        }
        said
    }
}

/// An answer, in frames.
#[derive(Debug, Default)]
struct Said {
    /// Of the final head. `None`: what it is takes more than literals to read.
    status: Option<Vec<u8>>,
    /// A head was there, of whatever kind.
    begun: bool,
    body: Vec<u8>,
    ends: bool,
    /// Something says that the node did not act.
    refuses: bool,
}

impl Said {
    fn see(&mut self, frame: &Frame) {
        match frame.kind {
            DATA => {
                let padded = frame.is(DATA, 8);
                let pad = frame.payload.first().filter(|_| padded).map_or(0, |n| usize::from(*n));
                let payload = frame.payload.get(usize::from(padded)..).unwrap_or_default();
                let length = payload.len().saturating_sub(pad);
                self.body.extend_from_slice(&payload[..length]);
            }
            HEADERS => {
                let status = frames::literal(&frame.payload, b":status");
                // An interim head is followed by another.
                if !self.begun && status.as_ref().is_none_or(|status| !status.starts_with(b"1")) {
                    self.begun = true;
                    self.status = status.filter(|_| frame.flags & !(END_STREAM) == END_HEADERS);
                }
            }
            _ => return,
        }
        self.ends = frame.flags & END_STREAM != 0;
    }

    /// Whether that is what the client got, where it looks complete to it.
    fn is(&self, answer: &Message) -> bool {
        // Whoever has as many bytes as the head says needs no other end.
        let is_whole = self.ends || matches!(answer.framing, Framing::Length | Framing::None);
        let has_body = match answer.framing {
            Framing::None => answer.body.is_empty(),
            Framing::Length => self.body.starts_with(&answer.body),
            _ => self.body == answer.body,
        };
        let is_status = self.status.as_ref().is_none_or(|status| *status == answer.line[1]);
        self.begun && is_whole && has_body && is_status
    }
}

/// The frames that these bytes spell, to a request on this stream.
fn hostile(data: &[u8], own: u32) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut rest = Some(data);
    while let Some(spelled) = rest {
        let end = spelled.windows(2).position(|two| two == b"\n\n");
        let (one, after) = spelled.split_at(end.unwrap_or(spelled.len()));
        rest = end.and(after.get(2..));
        let [kind, flags, stream, payload @ ..] = one else {
            wire.extend_from_slice(one);
            continue;
        };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let flags = digit(*flags).map_or(*flags, |flags| u8::try_from(flags).expect("four bits"));
        let stream = match stream {
            b's' => own,
            b'n' => own + 2,
            other => digit(*other).unwrap_or(own),
        };
        let fields =
            || frames::block(&frames::pairs(payload.strip_prefix(b"\n").unwrap_or(payload)));
        let (kind, payload) = match kind {
            b'D' => (DATA, payload.to_vec()),
            b'H' => (HEADERS, fields()),
            b'h' => (HEADERS, payload.to_vec()),
            b'C' => (CONTINUATION, fields()),
            b'c' => (CONTINUATION, payload.to_vec()),
            b'P' => (PUSH_PROMISE, [&(own + 1).to_be_bytes()[..], &fields()].concat()),
            b'R' => (RST_STREAM, payload.to_vec()),
            b'S' => (SETTINGS, payload.to_vec()),
            b'p' => (PING, payload.to_vec()),
            b'G' => (GOAWAY, payload.to_vec()),
            b'W' => (WINDOW_UPDATE, payload.to_vec()),
            b'?' => (0x20, payload.to_vec()),
            _ => {
                wire.extend_from_slice(one);
                continue;
            }
        };
        frames::frame(&mut wire, kind, flags, stream, &payload);
    }
    wire
}
