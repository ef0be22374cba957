//! What litegate passes on is the message that it was given, to any strict reader.

use super::{
    exchange::{Answer, Seen, exchange},
    frames::{DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, block, frame, pairs},
    strict::{self, Framing, Message, Reading, Side},
};

/// Any bytes from a client.
///
/// A node gets nothing but well-formed requests, about which two strict readers agree, and each is
/// one that the client sent: same method, target, fields and body, in the same order. The client
/// gets well-formed answers, each to its own request.
pub fn request(data: &[u8]) {
    let (first, second) = data.split_at(cut(data));
    let seen = exchange(&[first, second], |_, message| echo(message));
    let forwarded = forwarded(&seen);
    if data.starts_with(b"PRI ") {
        // HTTP/2: another target says what must come of it.
        return;
    }
    let sent = strict::read_tolerantly(data, Side::Requests);
    let mut originals = sent.messages.iter();
    for message in &forwarded {
        let found = originals.by_ref().any(|original| is_same(original, message));
        assert!(found, "nobody sent {message:#?}\nof {:#?}", sent.messages);
    }

    let methods: Vec<Vec<u8>> = sent.messages.iter().map(|m| m.line[0].clone()).collect();
    let answers = answers(&seen, &methods);
    let finals = answers.iter().filter(|answer| answer.status() >= 200);
    for (number, answer) in finals.enumerate() {
        let Some(original) = sent.messages.get(number) else {
            // To what came behind, and is no request.
            assert!(number == sent.messages.len() && !is_of_the_node(answer), "{answer:#?}");
            continue;
        };
        if is_of_the_node(answer) && original.line[0] != b"HEAD" {
            let target = answer.body.strip_prefix(&*original.line[0]).unwrap_or_default();
            let target = target.strip_prefix(b" ").unwrap_or_default();
            assert!(is_target(&original.line[1], target), "{answer:#?} to {original:#?}");
        }
    }
}

/// Any bytes from a node, in answer to the first of three requests on a connection: its method and
/// whether the connection ends behind them are in the first two bytes.
///
/// The client gets well-formed answers, each to its own request, and none looks complete that is
/// not. Nothing of what is between node and litegate reaches it.
pub fn answer(data: &[u8]) {
    let [method, close, data @ ..] = data else { return };
    let method = match method {
        b'h' => "HEAD",
        b'p' => "POST",
        b'o' => "OPTIONS",
        _ => "GET",
    };
    let close = *close == b'c';
    let first = format!("{method} /0 HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc");
    let rest = "POST /1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
                3\r\nxyz\r\n0\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n";
    let seen = exchange(&[first.as_bytes(), rest.as_bytes()], |number, message| {
        if number == 1 { Answer { bytes: data.to_vec(), close } } else { echo(message) }
    });
    let sent = [first.as_bytes(), rest.as_bytes()].concat();
    let sent = strict::read(&sent, Side::Requests).messages;
    for message in &forwarded(&seen) {
        // A replay may say otherwise of the first.
        let same = sent.iter().any(|original| is_same(original, message));
        assert!(same || message.line[1] != b"/1" && message.line[1] != b"/2", "{message:#?}");
    }
    let methods = [method, "POST", "GET"].map(|method| method.as_bytes().to_vec());
    let answers = answers(&seen, &methods);
    let said = strict::read_tolerantly(data, Side::Responses(&methods[..1], close)).messages;
    let mut hints = said.iter().take_while(|message| message.status() < 200);
    for hint in answers.iter().filter(|answer| answer.status() < 200) {
        let is_said = |said: &Message| {
            said.line[1] == hint.line[1]
                && hint.fields.iter().all(|field| said.fields.contains(field))
        };
        assert!(hints.any(is_said), "{hint:#?}\nof {said:#?}");
    }
    let said = said.iter().find(|message| message.status() >= 200);
    let finals = answers.iter().filter(|answer| answer.status() >= 200);
    for (number, answer) in finals.enumerate() {
        assert!(number < 3, "more answers than questions: {answers:#?}");
        let echoed = format!("{} /{number}", ["", "POST", "GET"][number]);
        let is_echo = is_of_the_node(answer) && answer.body == echoed.as_bytes();
        if number > 0 {
            assert!(is_echo || is_own(answer), "{answer:#?} to request {number}");
        } else if answer.complete && !is_own(answer) && !is_of_the_node(answer) {
            let is_said = said.is_some_and(|said| {
                let bodiless = answer.framing == Framing::None;
                (said.complete || bodiless)
                    && said.line[1] == answer.line[1]
                    && said.body == answer.body
            });
            assert!(is_said, "{answer:#?}\nof {said:#?}");
        }
    }
    for (name, _) in answers.iter().flat_map(|answer| &answer.fields) {
        assert!(!name.starts_with("fly-replay"), "{answers:#?}");
    }
}

/// A request by HTTP/2, spelled as lines of `name: value` with `\r`, `\n` and `\0` for what they
/// stand for, an empty line, its body, and perhaps another empty line and trailers; or `!` and a
/// digit, the reason for which the client takes it back.
///
/// A node that speaks HTTP/1.1 gets this one request or none, and not one that looks whole and is
/// not.
pub fn downgrade(data: &[u8]) {
    if data.len() > 8 << 10 {
        return;
    }
    let mut parts = split(data, b"\n\n").into_iter();
    let fields = pairs(parts.next().unwrap_or_default());
    let body = parts.next().unwrap_or_default();
    let last = parts.next();
    let taken_back = last.and_then(|last| match last {
        [b'!', digit] => char::from(*digit).to_digit(16),
        _ => None,
    });
    let trailers = last.filter(|_| taken_back.is_none()).map(pairs);
    let mut wire = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    let ends = body.is_empty() && last.is_none();
    let head = END_HEADERS | if ends { END_STREAM } else { 0 };
    frame(&mut wire, HEADERS, head, 1, &block(&fields));
    if !ends {
        frame(&mut wire, DATA, u8::from(last.is_none()), 1, body);
    }
    if let Some(trailers) = &trailers {
        frame(&mut wire, HEADERS, END_HEADERS | END_STREAM, 1, &block(trailers));
    }
    let mut reset = Vec::new();
    if let Some(reason) = taken_back {
        frame(&mut reset, RST_STREAM, 0, 1, &reason.to_be_bytes());
    }
    let seen = exchange(&[&wire, &reset], |_, message| echo(message));
    let forwarded = forwarded(&seen);
    assert!(forwarded.len() <= 1, "one request became {forwarded:#?}");
    let Some(message) = forwarded.first() else { return };
    let of = |name: &str| {
        let mut known = fields.iter().filter(|(known, _)| known == name.as_bytes());
        known.next().map(|(_, value)| value.clone()).unwrap_or_default()
    };
    let is_websocket = of(":method") == b"CONNECT" && of(":protocol") == b"websocket";
    let method = if is_websocket { b"GET".to_vec() } else { of(":method") };
    // `http` drops a fragment from a path before anybody sees it: litegate, the node and whoever reads
    // either's log know the same request, without one.
    let mut path = of(":path");
    path.truncate(path.iter().position(|byte| *byte == b'#').unwrap_or(path.len()));
    let line = [method, path, b"HTTP/1.1".to_vec()];
    let usual = fields.iter().filter(|(name, _)| !name.starts_with(b":"));
    let usual = usual.map(|(name, value)| {
        // Blanks around a value are no part of it for HTTP/1.1.
        (String::from_utf8_lossy(name).to_ascii_lowercase(), value.trim_ascii().to_vec())
    });
    // Which it also is with all the bytes that it said it has.
    let length = String::from_utf8_lossy(&of("content-length")).parse();
    let is_whole = is_websocket || length == Ok(body.len()) || length == Ok(0);
    let original = Message {
        line,
        fields: usual.collect(),
        // A head that says that nothing follows is a whole request, and passed on before anything can;
        // what follows one that asks for a WebSocket is no body.
        body: if is_websocket || of("content-length") == b"0" { Vec::new() } else { body.to_vec() },
        complete: taken_back.is_none() || is_whole,
        ..Message::default()
    };
    assert!(is_same(&original, message), "{message:#?}\nfrom {original:#?}");
    let sent = trailers.unwrap_or_default();
    for (name, value) in &message.trailers {
        let known = |(n, v): &(Vec<u8>, Vec<u8>)| n == name.as_bytes() && v.trim_ascii() == value;
        assert!(sent.iter().any(known), "{name} is no trailer of {sent:?}");
    }
}

/// Where a client's bytes are cut in two: anywhere, but for the same bytes always there.
fn cut(data: &[u8]) -> usize {
    let sum = data.iter().fold(7_usize, |sum, byte| sum.wrapping_mul(31) + usize::from(*byte));
    // Half of them come in one piece.
    if sum % 2 == 0 { data.len() } else { sum / 2 % (data.len() + 1) }
}

/// A node's answer that says what was asked.
pub(super) fn echo(message: &Message) -> Answer {
    let [method, target, _] = &message.line;
    let body = [&**method, b" ", target].concat();
    let head = format!("HTTP/1.1 200 OK\r\nx-node: n0\r\ncontent-length: {}\r\n\r\n", body.len());
    let body = if method == b"HEAD" { Vec::new() } else { body };
    Answer { bytes: [head.into_bytes(), body].concat(), close: false }
}

pub(super) fn is_of_the_node(answer: &Message) -> bool {
    answer.status() == 200 && answer.has("x-node")
}

/// Whether it is litegate's own.
pub(super) fn is_own(answer: &Message) -> bool {
    answer.has("proxy-status") && answer.status() >= 400
}

/// The requests that the node got, in order of arrival.
pub(super) fn forwarded(seen: &Seen) -> Vec<Message> {
    let mut all = Vec::new();
    for bytes in &seen.node {
        let reading = agreed(bytes, Side::Requests);
        assert!(reading.rest.is_empty(), "half a head: {}", shown(bytes));
        all.extend(reading.messages);
    }
    for message in &all {
        let [_, target, version] = &message.line;
        assert_eq!(version, b"HTTP/1.1", "{message:#?}");
        assert!(target.starts_with(b"/") || target == b"*", "{message:#?}");
        assert_eq!(message.values("host").count(), 1, "{message:#?}");
    }
    all
}

/// What the client got, in answer to requests of these methods.
pub(super) fn answers(seen: &Seen, methods: &[Vec<u8>]) -> Vec<Message> {
    // hyper forgets the head that it refuses for what is in it, and with it that it was a HEAD: that
    // refusal has a body, and the connection ends behind it.
    let mut methods = methods.to_vec();
    let mut forgotten = None;
    let first = strict::read(&seen.client, Side::Responses(&methods, seen.ended));
    if first.wrong.is_some() {
        let refused = first.messages.iter().filter(|answer| answer.status() >= 200).count();
        forgotten = refused.checked_sub(1);
        let method = forgotten.and_then(|refused| methods.get_mut(refused));
        method.filter(|method| *method == b"HEAD").into_iter().for_each(Vec::clear);
    }
    let reading = agreed(&seen.client, Side::Responses(&methods, seen.ended));
    if let Some(refused) = forgotten {
        let finals: Vec<_> = reading.messages.iter().filter(|m| m.status() >= 200).collect();
        let ends = finals.last().is_some_and(|last| {
            last.status() == 400 && is_own(last) && last.values("connection").any(|v| v == b"close")
        });
        assert!(ends && finals.len() == refused + 1, "{finals:#?}");
    }
    assert!(reading.rest.is_empty() || !seen.ended, "half a head: {}", shown(&seen.client));
    for answer in &reading.messages {
        assert!(answer.complete || !seen.ended || answer.framing != Framing::Close, "{answer:#?}");
        assert_ne!(answer.status(), 101, "nobody asked for another protocol");
        let is_framed = answer.has("content-length") || answer.has("transfer-encoding");
        assert!(answer.status() >= 200 || !is_framed, "{answer:#?}");
    }
    reading.messages
}

/// Reads what litegate wrote, by both readers.
fn agreed(bytes: &[u8], side: Side<'_>) -> Reading {
    let one = strict::read(bytes, side);
    assert_eq!(one.wrong, None, "{}", shown(bytes));
    let other = strict::read_by_httparse(bytes, side);
    assert_eq!(other.wrong, None, "{}", shown(bytes));
    assert_eq!(one.messages, other.messages, "{}", shown(bytes));
    one
}

pub(super) fn shown(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Whether a node got what the client sent.
pub(super) fn is_same(original: &Message, message: &Message) -> bool {
    let body = if message.complete {
        original.complete && original.body == message.body
    } else {
        original.body.starts_with(&message.body)
    };
    body && original.line[0] == message.line[0]
        && is_target(&original.line[1], &message.line[1])
        && has_same_fields(original, message)
}

/// Whether that is the target, or the origin form of it (RFC 9112 section 3.2.1: with a slash where
/// an absolute form has no path).
fn is_target(original: &[u8], target: &[u8]) -> bool {
    if original.starts_with(b"?") {
        // h2 takes it for a path, and gives it its slash.
        return target.strip_prefix(b"/") == Some(original);
    }
    let scheme = original.windows(3).position(|three| three == b"://");
    let Some(scheme) = scheme.filter(|_| !original.starts_with(b"/")) else {
        return original == target;
    };
    let rest = &original[scheme + 3..];
    let path = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    match &rest[path..] {
        [] => target == b"/" || target == b"*",
        [b'/'] if target == b"*" => true,
        [b'/', ..] => target == &rest[path..],
        query => target.strip_prefix(b"/") == Some(query),
    }
}

/// Fields that litegate sets, or that are about the hop, or addressed to it.
pub(super) fn is_ours(name: &str) -> bool {
    matches!(
        name,
        "host"
            | "via"
            | "forwarded"
            | "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authorization"
            | "te"
            | "transfer-encoding"
            | "content-length"
            | "upgrade"
            | "http2-settings"
            | "expect"
            | "cookie"
            | "x-real-ip"
            | "sec-websocket-key"
    ) || ["x-forwarded-", "client-cert", "x-client-cert", "fly-", "litegate-"]
        .iter()
        .any(|begin| name.starts_with(begin))
}

pub(super) fn has_same_fields(original: &Message, message: &Message) -> bool {
    let connection = original.values("connection").flat_map(|line| line.split(|b| *b == b','));
    let named: Vec<String> =
        connection.map(|name| String::from_utf8_lossy(name).trim().to_ascii_lowercase()).collect();
    let names = original.fields.iter().chain(&message.fields).map(|(name, _)| name);
    names.filter(|name| !is_ours(name) && !named.contains(name)).all(|name| {
        // A name that gateways turn into another's may be refused passage.
        let is_dropped = name.contains('_') && !message.has(name);
        is_dropped || original.values(name).eq(message.values(name))
    })
}

/// Cuts at the first two places.
pub(super) fn split<'d>(data: &'d [u8], at: &[u8]) -> Vec<&'d [u8]> {
    let mut parts = Vec::new();
    let mut rest = data;
    while parts.len() < 2
        && let Some(found) = rest.windows(at.len()).position(|window| window == at)
    {
        parts.push(&rest[..found]);
        rest = &rest[found + at.len()..];
    }
    parts.push(rest);
    parts
}
