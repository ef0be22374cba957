//! An HTTP/3 client of litegate's: quinn at both ends of a network in memory, and between them all
//! that is litegate's own.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, ReadError,
    RecvStream, ServerConfig, TokioRuntime, UdpPoller, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
    udp::{RecvMeta, Transmit},
};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::AlwaysResolvesServerRawPublicKeys,
    sign::CertifiedKey,
};
use tokio::time::{sleep, timeout};

use super::{
    exchange::{
        Answer, FRONT, Node, PATIENCE, PEER, Seen, Speaks, apart, beside_node, exchange, gate,
    },
    frames::{self, Pair, pairs},
    h3::{self, DATA, HEADERS, Part, fields, is_plain, is_request},
    http::{echo, forwarded, is_of_the_node, is_own, is_same},
    strict::{Framing, Message},
};
use crate::{
    net::pem,
    proxy,
    server::{Origin, Service as _, drain, h3::endpoint::transport, h3::serve_connection},
};

/// What a client sends on a request's stream: how that ends (`r`: it is taken back, `o`: not at all),
/// a digit for the pieces it comes in, and frames, parted by empty lines. Each is a letter for its
/// type, and its payload; fields are spelled in lines. What is no frame is bytes.
///
/// A node gets the request that another reader of HTTP/3 finds there, or none, and none that looks
/// whole and is not; the same that it gets by HTTP/2. The client gets a well-formed answer, and one
/// to the request that it sends after it, unless it ended the connection by what it said.
pub fn request_h3(data: &[u8]) {
    if data.len() > 8 << 10 {
        return;
    }
    let [how, pieces, spelled @ ..] = data else { return };
    let end = match how {
        b'r' => End::Reset,
        b'o' => End::Open,
        _ => End::Fin,
    };
    let bytes = stream(spelled);
    let size = bytes.len() / (usize::from(pieces.wrapping_sub(b'0') % 10) + 1) + 1;
    let node = Node::new(|_: usize, message: &Message| match &*message.line[1] {
        b"/short" => breaks_off(b"content-length: 9\r\n\r\nabc"),
        b"/cut" => breaks_off(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"),
        _ => echo(message),
    });
    let (hostile, after) = apart(Speaks::Http1, async |_, config, arriving| {
        let (to_litegate, to_client) = (Arc::default(), Arc::default());
        let server = endpoint(FRONT, PEER, &to_litegate, &to_client);
        let client = endpoint(PEER, FRONT, &to_client, &to_litegate);
        let (gate, _discovery) = gate(&config);
        let litegate = async {
            let incoming = server.accept().await.expect("the client connects");
            let limits = proxy::limits(&config);
            let mut accepts = SECRETS.with(|secrets| secrets.0.clone());
            accepts.transport_config(Arc::new(transport(&limits)));
            let connecting = incoming.accept_with(Arc::new(accepts)).expect("it may connect");
            let connection = connecting.await.expect("they shake hands");
            // As by HTTP/2 below, so that a node is told the same.
            let origin = Origin { listener: 0, peer: PEER, local: FRONT, secure: false };
            let place = gate.admit(&origin).expect("there is a place");
            let client = Rc::new(gate.opened(origin, None, place));
            let (_trigger, drain) = drain::signal();
            serve_connection(connection, origin, &client, &gate, limits, &drain).await;
        };
        let client = async {
            let connecting = client.connect(FRONT, "a").expect("it is an address");
            let connection = connecting.await.expect("they shake hands");
            speak(&connection, bytes.chunks(size), end).await
        };
        let serve = async |socket, number| node.serve(socket, number).await;
        let sides = beside_node(client, arriving, serve);
        let litegate = timeout(PATIENCE, litegate);
        let (over, seen) = tokio::join!(litegate, sides);
        over.expect("every connection ends");
        seen
    });
    judge(&bytes, end, &hostile, &after, node.received.take());
}

/// An answer that ends too early.
fn breaks_off(behind: &[u8]) -> Answer {
    Answer { bytes: [b"HTTP/1.1 200 OK\r\nx-node: n0\r\n", behind].concat(), close: true }
}

/// How a request's stream ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Fin,
    Reset,
    Open,
}

/// What came in answer to a request.
struct Got {
    bytes: Vec<u8>,
    how: How,
}

impl fmt::Debug for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {:?}", self.bytes.escape_ascii(), self.how)
    }
}

/// How it ended.
#[derive(Debug, Eq, PartialEq)]
enum How {
    Fin,
    Reset,
    /// The connection ended, and why.
    Lost(Option<u64>),
}

/// Where the request behind it goes.
const AFTER: &str = "/and-after-it";

/// Sends a request in pieces, and another one after its answer.
async fn speak(
    connection: &Connection,
    pieces: impl Iterator<Item = &[u8]>,
    end: End,
) -> (Got, Got) {
    let mut control = connection.open_uni().await.expect("it may");
    // Its type, and no settings.
    control.write_all(&[0, 4, 0]).await.expect("there is room");
    let (mut send, mut receive) = connection.open_bi().await.expect("it may");
    let send = async {
        for piece in pieces {
            // What litegate does not take any more is its business.
            if send.write_all(piece).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(1)).await;
        }
        let _ = match end {
            End::Fin => send.finish(),
            End::Reset => send.reset(VarInt::from_u32(0x10c)),
            End::Open => return Some(send),
        };
        None
    };
    let (got, _send) = timeout(PATIENCE, async { tokio::join!(got(&mut receive), send) })
        .await
        .expect("it is answered in time, or not at all");
    let after = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        let head = format!(":method: GET\n:scheme: https\n:authority: a\n:path: {AFTER}\n");
        let _ = send.write_all(&frame(HEADERS, &section(&pairs(head.as_bytes())))).await;
        let _ = send.finish();
        Ok::<_, ConnectionError>(self::got(&mut receive).await)
    };
    let after = timeout(PATIENCE, after).await.expect("it is answered in time");
    let after = after.unwrap_or_else(|error| Got { bytes: Vec::new(), how: lost(&error) });
    connection.close(VarInt::from_u32(0x100), b"");
    (got, after)
}

async fn got(receive: &mut RecvStream) -> Got {
    let mut bytes = Vec::new();
    let how = loop {
        match receive.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
            Ok(None) => break How::Fin,
            Err(ReadError::ConnectionLost(error)) => break lost(&error),
            Err(_) => break How::Reset,
        }
    };
    Got { bytes, how }
}

fn lost(error: &ConnectionError) -> How {
    How::Lost(match error {
        ConnectionError::ApplicationClosed(close) => Some(close.error_code.into_inner()),
        _ => None,
    })
}

fn judge(bytes: &[u8], end: End, hostile: &Got, after: &Got, node: Vec<Vec<u8>>) {
    let seen = Seen { node, ..Seen::default() };
    let mut forwarded = forwarded(&seen);
    let behind = forwarded.iter().position(|message| message.line[1] == AFTER.as_bytes());
    let behind = behind.map(|place| forwarded.remove(place));
    assert!(forwarded.len() <= 1, "one request became {forwarded:#?}");
    let said = Said::of(bytes, end);
    let answer = answer(hostile, said.as_ref().is_some_and(|said| said.method() == b"HEAD"));
    if let Some(message) = forwarded.first() {
        let said = said.as_ref().unwrap_or_else(|| panic!("nobody sent {message:#?}"));
        let original = said.original(message.complete);
        assert!(is_same(&original, message), "{message:#?}\nfrom {original:#?}");
        for (name, value) in &message.trailers {
            let known = |(n, v): &Pair| n == name.as_bytes() && v.trim_ascii() == value;
            assert!(said.trailers.iter().any(known), "{name} is no trailer of {said:?}");
        }
    }
    if let Some(said) = &said
        && said.is_whole
        && is_plain(&said.fields)
        && said.trailers.is_empty()
        && ![b"/short", &b"/cut"[..]].contains(&said.of_name(":path"))
    {
        let answer = answer.as_ref().unwrap_or_else(|| panic!("no answer to {said:?}"));
        let message = forwarded.first().unwrap_or_else(|| panic!("{answer:#?} to {said:?}"));
        assert!(message.complete && answer.complete && is_of_the_node(answer), "{answer:#?}");
        assert_eq!(message.body, said.body);
    }
    if let Some(answer) = answer.filter(|answer| answer.complete) {
        let is_echo = forwarded.first().is_some_and(|message| {
            let [method, target, _] = &message.line;
            let body = [&**method, b" ", target].concat();
            is_of_the_node(&answer) && (answer.body == body || method == b"HEAD")
        });
        assert!(is_echo || is_own(&answer) || answer.status() >= 400, "{answer:#?}");
    }
    // A connection may end only by what was said on it.
    let is_fatal = |code: u32| !matches!(code, 0x107 | 0x10d);
    let may_end =
        h3::request(bytes, end == End::Fin, usize::MAX, false).wrong.is_some_and(is_fatal)
            || h3::request(bytes, end == End::Fin, usize::MAX, true).wrong.is_some_and(is_fatal)
            || said.as_ref().is_none_or(|said| said.is_unreadable);
    let ends = matches!(hostile.how, How::Lost(_)) || matches!(after.how, How::Lost(_));
    assert!(may_end || !ends, "{hostile:?}, {after:?}");
    if !ends {
        let answer = self::answer(after, false).expect("there is an answer");
        let is_its = is_of_the_node(&answer) && answer.body == format!("GET {AFTER}").as_bytes();
        assert!(is_its && answer.complete && behind.is_some(), "{answer:#?}");
    }
    if let (Some(message), Some(said)) = (forwarded.first(), &said)
        && message.complete
        && said.is_whole
    {
        let by_h2 = same_by_h2(said).map(without_framing);
        assert_eq!(by_h2, Some(without_framing(message.clone())), "of {said:?}");
    }
}

/// A request as another reader finds it.
#[derive(Default)]
struct Said {
    fields: Vec<Pair>,
    body: Vec<u8>,
    trailers: Vec<Pair>,
    /// It has all that it should, and its end.
    is_whole: bool,
    /// A section that no decoder reads.
    is_unreadable: bool,
}

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = |f: &mut fmt::Formatter<'_>, fields: &[Pair]| {
            fields.iter().try_for_each(|(name, value)| {
                writeln!(f, "  {}: {}", name.escape_ascii(), value.escape_ascii())
            })
        };
        lines(f, &self.fields)?;
        writeln!(f, "  {}", self.body.escape_ascii())?;
        lines(f, &self.trailers)?;
        writeln!(f, "  whole: {}, unreadable: {}", self.is_whole, self.is_unreadable)
    }
}

impl Said {
    /// `None`: there is no head.
    fn of(bytes: &[u8], end: End) -> Option<Self> {
        let mut reading = h3::request(bytes, end == End::Fin, usize::MAX, false);
        let mut parts = std::mem::take(&mut reading.parts).into_iter();
        let Some(Part::Section(head)) = parts.next() else { return None };
        let (fields, is_readable) = fields(&head);
        let mut said = Self { fields, is_unreadable: !is_readable, ..Self::default() };
        let mut is_fine = is_readable && is_request(&said.fields);
        for part in parts {
            match part {
                Part::Data(data) => said.body.extend_from_slice(&data),
                Part::Section(section) => {
                    let (trailers, is_readable) = self::fields(&section);
                    said.trailers = trailers;
                    said.is_unreadable |= !is_readable;
                    is_fine &= is_readable && said.trailers.iter().all(h3::is_field);
                }
            }
        }
        let is_long_enough = said.lengths().all(|length| length == Some(said.body.len()));
        said.is_whole = is_fine && is_long_enough && end == End::Fin && reading.wrong.is_none();
        Some(said)
    }

    fn of_name(&self, name: &str) -> &[u8] {
        let mut known = self.fields.iter().filter(|(known, _)| known == name.as_bytes());
        known.next().map(|(_, value)| &**value).unwrap_or_default()
    }

    fn method(&self) -> &[u8] {
        self.of_name(":method")
    }

    fn lengths(&self) -> impl Iterator<Item = Option<usize>> {
        let all = self.fields.iter().filter(|(name, _)| name == b"content-length");
        all.map(|(_, value)| std::str::from_utf8(value).ok()?.parse().ok())
    }

    /// The message that a node may get of it, as one that looks complete or does not.
    fn original(&self, complete: bool) -> Message {
        let is_websocket = self.method() == b"CONNECT" && self.of_name(":protocol") == b"websocket";
        let method = if is_websocket { b"GET" } else { self.method() };
        // `http` drops a fragment from a path before anybody sees it.
        let path = self.of_name(":path").split(|byte| *byte == b'#').next().unwrap_or_default();
        let usual = self.fields.iter().filter(|(name, _)| !name.starts_with(b":"));
        let usual = usual.map(|(name, value)| {
            // Blanks around a value are no part of it for HTTP/1.1.
            (String::from_utf8_lossy(name).into_owned(), value.trim_ascii().to_vec())
        });
        let mut body = self.body.clone();
        // With as many bytes as the head says a request is whole to its reader, whatever comes behind
        // them; and what follows one that asks for a WebSocket is no body.
        let length = self.lengths().next().flatten().filter(|length| *length <= body.len());
        let length = if is_websocket { Some(0) } else { length };
        if let Some(length) = length.filter(|_| complete) {
            body.truncate(length);
        }
        Message {
            line: [method.to_vec(), path.to_vec(), b"HTTP/1.1".to_vec()],
            fields: usual.collect(),
            body,
            complete: self.is_whole || length.is_some(),
            ..Message::default()
        }
    }
}

/// How its end is told depends on whether that came with the head, and so does whether it asks for a
/// word before there is a body. Nor does the order of fields of several names mean anything (RFC 9110
/// section 5.3): one that is taken out, as `Expect` is, changes it.
fn without_framing(mut message: Message) -> Message {
    let framing = ["content-length", "transfer-encoding", "expect"];
    message.fields.retain(|(name, _)| !framing.contains(&name.as_str()));
    message.fields.sort_by(|(a, _), (b, _)| a.cmp(b));
    message.framing = Framing::None;
    message
}

/// What a node gets of the same by HTTP/2.
fn same_by_h2(said: &Said) -> Option<Message> {
    use frames::{END_HEADERS, END_STREAM};
    let mut wire = [frames::PREFACE, b"\0\0\0\x04\0\0\0\0\0"].concat();
    let ends = said.body.is_empty() && said.trailers.is_empty();
    let head = END_HEADERS | if ends { END_STREAM } else { 0 };
    frames::frame(&mut wire, frames::HEADERS, head, 1, &frames::block(&said.fields));
    if !ends {
        let flags = if said.trailers.is_empty() { END_STREAM } else { 0 };
        frames::frame(&mut wire, frames::DATA, flags, 1, &said.body);
    }
    if !said.trailers.is_empty() {
        let block = frames::block(&said.trailers);
        frames::frame(&mut wire, frames::HEADERS, END_HEADERS | END_STREAM, 1, &block);
    }
    forwarded(&exchange(&[&wire], |_, message| echo(message))).pop()
}

/// An answer: well-formed, and complete if the stream ended as it should. `None`: there is none.
fn answer(got: &Got, is_head: bool) -> Option<Message> {
    let mut rest = &got.bytes[..];
    let mut message = None;
    while let Some((kind, length, payload, behind)) = h3::frame(rest) {
        rest = behind;
        let is_whole = payload.len() as u64 == length;
        assert!(is_whole || got.how != How::Fin, "a frame without its end: {got:?}");
        match (kind, &mut message) {
            (HEADERS, _) if !is_whole => break,
            (HEADERS, None) => {
                let (mut fields, is_readable) = fields(payload);
                assert!(is_readable, "{got:?}");
                let (name, status) = fields.remove(0);
                assert!(name == b":status" && fields.iter().all(h3::is_field), "{fields:?}");
                let text =
                    |(name, value): Pair| (String::from_utf8_lossy(&name).into_owned(), value);
                let head = Message {
                    line: [b"HTTP/3".to_vec(), status, Vec::new()],
                    fields: fields.into_iter().map(text).collect(),
                    framing: Framing::Length,
                    ..Message::default()
                };
                assert_ne!(head.status(), 101, "nobody asked for another protocol");
                if head.status() >= 200 {
                    message = Some(head);
                } else {
                    assert!(!head.has("content-length"), "{head:#?}");
                }
            }
            (HEADERS, Some(message)) => {
                let (fields, is_readable) = fields(payload);
                assert!(is_readable && fields.iter().all(h3::is_field), "{got:?}");
                assert!(message.trailers.is_empty() && rest.is_empty(), "{got:?}");
                let text =
                    |(name, value): Pair| (String::from_utf8_lossy(&name).into_owned(), value);
                message.trailers = fields.into_iter().map(text).collect();
            }
            (DATA, Some(message)) => message.body.extend_from_slice(payload),
            _ => panic!("a frame of type {kind}: {got:?}"),
        }
    }
    // RFC 9114 section 4.1: an end that is none.
    let is_over = rest.is_empty() && message.is_some();
    assert!(is_over || got.how != How::Fin, "no whole answer: {got:?}");
    let mut message = message?;
    message.complete = got.how == How::Fin;
    if message.complete {
        let lengths = message.values("content-length");
        let is_long = |length: &[u8]| length == message.body.len().to_string().as_bytes();
        let are = lengths.map(|length| is_long(length) || is_head && message.body.is_empty());
        assert!(are.into_iter().all(|is| is), "{message:#?}");
    }
    Some(message)
}

/// The bytes that these frames spell.
fn stream(spelled: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut rest = Some(spelled);
    while let Some(spelled) = rest {
        let end = spelled.windows(2).position(|two| two == b"\n\n");
        let (one, after) = spelled.split_at(end.unwrap_or(spelled.len()));
        rest = end.and(after.get(2..));
        match one {
            [b'H', lines @ ..] => wire.extend(frame(HEADERS, &section(&pairs(lines)))),
            [b'h', payload @ ..] => wire.extend(frame(HEADERS, payload)),
            [b'D', payload @ ..] => wire.extend(frame(DATA, payload)),
            // Of which one byte is missing.
            [b'L', payload @ ..] => {
                let mut longer = frame(DATA, &[payload, b"."].concat());
                longer.pop();
                wire.extend(longer);
            }
            [b'?', payload @ ..] => wire.extend(frame(0x21, payload)),
            [b'T', digit, payload @ ..] if digit.is_ascii_hexdigit() => {
                let kind = char::from(*digit).to_digit(16).unwrap_or_default();
                wire.extend(frame(kind.into(), payload));
            }
            other => wire.extend_from_slice(other),
        }
    }
    wire
}

fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("it is bounded") | 0x4000;
    let kind = u8::try_from(kind).expect("it is small");
    [&[kind], &length.to_be_bytes()[..], payload].concat()
}

/// A section of literals, and of what the static table has a name for.
fn section(fields: &[Pair]) -> Vec<u8> {
    let mut section = vec![0, 0];
    for (name, value) in fields {
        string(&mut section, 0b0010_0000, 3, name);
        string(&mut section, 0, 7, value);
    }
    section
}

fn string(into: &mut Vec<u8>, flags: u8, bits: u32, text: &[u8]) {
    let most = (1 << bits) - 1;
    let mut length = text.len();
    let byte = |value: usize| u8::try_from(value).expect("it is small");
    if length < most {
        into.push(flags | byte(length));
    } else {
        into.push(flags | byte(most));
        length -= most;
        while length >= 128 {
            into.push(byte(length % 128 + 128));
            length /= 128;
        }
        into.push(byte(length));
    }
    into.extend_from_slice(text);
}

/// Packets on their way to somebody.
#[derive(Debug, Default)]
struct Inbox {
    packets: Mutex<VecDeque<Vec<u8>>>,
    waker: AtomicWaker,
}

/// One end of a network of two, which loses nothing.
#[derive(Debug)]
struct Wire {
    own: SocketAddr,
    peer: SocketAddr,
    inbox: Arc<Inbox>,
    outbox: Arc<Inbox>,
}

impl AsyncUdpSocket for Wire {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Always)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut packets = self.outbox.packets.lock().unwrap_or_else(PoisonError::into_inner);
        packets.push_back(transmit.contents.to_vec());
        self.outbox.waker.wake();
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inbox.waker.register(cx.waker());
        let mut packets = self.inbox.packets.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(packet) = packets.pop_front() else { return Poll::Pending };
        bufs[0][..packet.len()].copy_from_slice(&packet);
        let (len, stride) = (packet.len(), packet.len());
        meta[0] = RecvMeta { addr: self.peer, len, stride, ecn: None, dst_ip: Some(self.own.ip()) };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.own)
    }
}

/// There is always room.
#[derive(Debug)]
struct Always;

impl UdpPoller for Always {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One of both ends, which speaks as litegate if that is its address.
fn endpoint(
    own: SocketAddr,
    peer: SocketAddr,
    inbox: &Arc<Inbox>,
    outbox: &Arc<Inbox>,
) -> Endpoint {
    let (inbox, outbox) = (Arc::clone(inbox), Arc::clone(outbox));
    let socket = Arc::new(Wire { own, peer, inbox, outbox });
    let mut config = EndpointConfig::default();
    config.rng_seed(Some([0; 32]));
    let (server, client) = SECRETS.with(|secrets| (secrets.0.clone(), secrets.1.clone()));
    let server = (own == FRONT).then_some(server);
    let runtime = Arc::new(TokioRuntime);
    let endpoint = Endpoint::new_with_abstract_socket(config, server, socket, runtime);
    let mut endpoint = endpoint.expect("it has an address");
    endpoint.set_default_client_config(client);
    endpoint
}

thread_local! {
    static SECRETS: (ServerConfig, ClientConfig) = secrets();
}

/// TLS with a key that nothing depends on, and no certificate (RFC 7250).
fn secrets() -> (ServerConfig, ClientConfig) {
    // RFC 8410 section 7, around a private key of zeros.
    const BEFORE: [u8; 16] =
        [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    let provider = pem::provider();
    let der = PrivatePkcs8KeyDer::from([&BEFORE[..], &[0; 32]].concat());
    let key = provider.key_provider.load_private_key(der.into()).expect("it is a key");
    let public = CertificateDer::from(key.public_key().expect("it has one").to_vec());
    let key = CertifiedKey::new(vec![public], key);
    let versions = [&rustls::version::TLS13];
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions);
    let mut server = server
        .expect("TLS 1.3 is there")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(key))));
    server.alpn_protocols = vec![b"h3".to_vec()];
    server.send_tls13_tickets = 0;
    let client =
        rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&versions);
    let mut client = client
        .expect("TLS 1.3 is there")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    client.alpn_protocols = vec![b"h3".to_vec()];
    let server = QuicServerConfig::try_from(server).expect("it is TLS 1.3");
    let client = QuicClientConfig::try_from(client).expect("it is TLS 1.3");
    (ServerConfig::with_crypto(Arc::new(server)), ClientConfig::new(Arc::new(client)))
}

/// Whoever answers is litegate.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("this is TLS 1.3".into()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
