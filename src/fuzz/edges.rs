//! What comes before, beside and behind HTTP's messages.

use std::net::{Ipv4Addr, SocketAddr};

use ::http::{HeaderMap, HeaderName, HeaderValue, Method, header};

use crate::{
    config::{self, Config, route::Class as Written},
    decide::{
        Class,
        answer::Said,
        classify,
        route::{self, Head},
        token,
    },
    net::proxy_protocol::{self, Introduction, Parsed, Version},
    proxy::{
        headers::{self as edits, Extra, Peer},
        websocket,
    },
    server::frames,
    topology::Topology,
};

/// The first bytes of a connection: a verdict stands whatever comes later, takes nothing that is
/// not there, and what was read can be told on and reads the same.
pub fn proxy_protocol(data: &[u8]) {
    let whole = proxy_protocol::parse(data);
    for cut in 0..data.len().min(300) {
        match proxy_protocol::parse(&data[..cut]) {
            Ok(Parsed::Incomplete) => {}
            verdict => assert_eq!(verdict, whole, "after {cut} bytes"),
        }
    }
    let Ok(Parsed::Header(ends, length)) = whole else { return };
    assert!(length <= data.len());
    for version in [Version::V1, Version::V2] {
        let header = Introduction { version, ends }.header();
        let Ok(Parsed::Header(again, length)) = proxy_protocol::parse(&header) else {
            panic!("{header:?} of {ends:?}")
        };
        assert_eq!(length, header.len());
        let plain = |ends: proxy_protocol::Ends| {
            [ends.source, ends.destination].map(|end| (end.ip().to_canonical(), end.port()))
        };
        assert_eq!(again.map(plain), ends.map(plain), "by {version:?}");
    }
}

/// The fields of a request and of an answer, as lines of `name: value` behind a byte whose bits say
/// who asks: what a stranger says of the hop, the edge or the client goes nowhere, and what a
/// trusted proxy says is only added to.
pub fn headers(data: &[u8]) {
    let [flags, lines @ ..] = data else { return };
    let [trusted, tls, upgrade] = [1, 2, 4].map(|bit| flags & bit != 0);
    let original = fields(lines);
    let address = |ip: [u8; 4], port| SocketAddr::from((Ipv4Addr::from(ip), port));
    let mut peer = Peer::new(address([192, 0, 2, 7], 4711), address([10, 0, 0, 1], 443), trusted);
    if tls {
        peer = peer.below_tls(None);
    }
    let via = HeaderValue::from_static("1.1 litegate-fuzz");
    let extra = Extra { without_txid: flags & 8 != 0, ..Extra::default() };
    let host = original.get(header::HOST).cloned();
    let head = edits::upstream(&original, host.as_ref(), &peer, upgrade, &via, &extra);

    assert_eq!(head.get_all(header::HOST).iter().count(), 1);
    assert_eq!(head.get_all(header::VIA).iter().next_back(), Some(&via));
    for name in ["keep-alive", "proxy-connection", "transfer-encoding", "litegate-token"] {
        assert!(!head.contains_key(name), "{name} in {head:?}");
    }
    let connection: Vec<_> = head.get_all(header::CONNECTION).iter().collect();
    assert!(connection.len() <= 1);
    assert_eq!(
        head.contains_key(header::UPGRADE),
        connection.first().is_some_and(|value| *value == "upgrade")
    );
    if extra.without_txid {
        assert_eq!(token::carried(&head, "litegate", true).txid, None, "{head:?}");
    }
    // This hop's word comes last, and from a stranger it is the only one.
    let said = |name: &str| joined(&original, name).filter(|_| trusted);
    let proto = if tls { "https" } else { "http" };
    let for_last = |name: &str, ours: &str| {
        let now = joined(&head, name).unwrap_or_default();
        let want = match said(name) {
            Some(before) => format!("{before}, {ours}"),
            None => ours.to_owned(),
        };
        assert_eq!(now, want, "{name}");
        assert_eq!(head.get_all(name).iter().count(), 1, "{name}");
    };
    let is_named = |name: &str| {
        let lines = original.get_all(header::CONNECTION).iter();
        let mut tokens = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
        tokens.any(|token| token.trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
    };
    if !is_named("x-forwarded-for") {
        for_last("x-forwarded-for", "192.0.2.7");
    }
    if !is_named("forwarded") {
        let forwarded = joined(&head, "forwarded").unwrap_or_default();
        let ours = match said("forwarded") {
            Some(before) => forwarded.strip_prefix(&format!("{before}, ")).expect("it is kept"),
            None => &forwarded,
        };
        assert!(is_element(ours, proto), "{ours:?}");
    }
    if !trusted {
        assert_eq!(
            head.get("x-forwarded-proto").map(HeaderValue::as_bytes),
            Some(proto.as_bytes())
        );
        assert_eq!(head.get("x-real-ip").map(HeaderValue::as_bytes), Some(&b"192.0.2.7"[..]));
        for name in ["fly-client-ip", "fly-replay-src", "client-cert", "x-forwarded-ssl"] {
            assert!(!head.contains_key(name), "{name} in {head:?}");
        }
    }
    decided(&original, trusted, upgrade);

    let mut answer = original;
    let said = Said::of(&answer);
    edits::downstream(&mut answer, said, upgrade, false, &via);
    for name in ["keep-alive", "transfer-encoding", "fly-replay", "litegate-token"] {
        assert!(!answer.contains_key(name), "{name} in {answer:?}");
    }
    assert_eq!(answer.contains_key(header::CONNECTION), upgrade);
}

/// What is decided by fields: whatever they say, a stranger's write goes to the primary.
fn decided(fields: &HeaderMap, trusted: bool, upgrade: bool) {
    thread_local! {
        static CONFIG: Config = config::load::parse("fuzz", ROUTES, []).expect("it is right");
    }
    CONFIG.with(|config| {
        for method in [Method::GET, Method::POST] {
            let host = fields.get(header::HOST).and_then(|host| host.to_str().ok());
            let path = "/api/search";
            let head = Head { method: &method, host, path, headers: fields, trusted, upgrade };
            let ambiguous = config.limits.ambiguous_paths;
            let Ok(route) = route::route(&head, &config.routes, ambiguous) else { continue };
            let request = classify::classify(&head, route, &Topology::default(), Some("fra"));
            if let Ok(request) = request
                && method == Method::POST
                && route.class == Written::Auto
            {
                assert_eq!(request.class, Class::Write);
            }
        }
    });
    let _ = classify::demanded(fields);
}

const ROUTES: &str = r#"
[[listener]]
address = "127.0.0.1:80"
[cluster.app]
port = 3000
members = { type = "static", nodes = [{ name = "n0", address = "10.0.0.1" }] }
primary = { type = "instance", name = "n0" }
[[route]]
host = ["a.example", "*.b.example"]
header = [{ name = "x-api", value = "1" }]
path = "/api"
[[route]]
path_glob = "/api/*"
method = ["POST", "GET"]
"#;

/// `for=…;host="…";proto=…` (RFC 7239 section 4), and nothing that could be taken for another.
fn is_element(element: &str, proto: &str) -> bool {
    let Some(rest) = element.strip_prefix("for=192.0.2.7") else { return false };
    let Some(host) = rest.strip_suffix(proto).and_then(|rest| rest.strip_suffix(";proto=")) else {
        return false;
    };
    let quoted = host.strip_prefix(";host=\"").and_then(|host| host.strip_suffix('"'));
    host.is_empty() || quoted.is_some_and(|host| !host.contains(['"', '\\']))
}

/// All lines of a field as one.
fn joined(head: &HeaderMap, name: &str) -> Option<String> {
    let text = |line: &HeaderValue| line.as_bytes().iter().map(|byte| char::from(*byte)).collect();
    let lines: Vec<String> = head.get_all(name).iter().map(text).collect();
    (!lines.is_empty()).then(|| lines.join(", "))
}

fn fields(lines: &[u8]) -> HeaderMap {
    let mut fields = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n').take(100) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            fields.append(name, value);
        }
    }
    fields
}

/// Where a WebSocket's frames end: where another reader of them finds it, however the bytes come.
pub fn websocket(data: &[u8]) {
    let mut ends = Vec::new();
    let mut closes_in = usize::MAX;
    let mut at = 0;
    while let Some((header, payload)) = frame_at(&data[at..]) {
        if data[at] & 0xf == 8 {
            closes_in = closes_in.min(at + header);
        }
        let end = u64::try_from(at + header).expect("it is short").checked_add(payload);
        let Some(end) = end.filter(|end| *end <= data.len() as u64) else { break };
        at = usize::try_from(end).expect("it is within the data");
        ends.push(at);
    }
    let pieces = usize::from(data.first().copied().unwrap_or_default() % 9) + 1;
    for size in [data.len().max(1), pieces] {
        let mut frames = websocket::Frames::default();
        let (mut found, mut at) = (Vec::new(), 0);
        for piece in data.chunks(size) {
            let mut rest = piece;
            while !rest.is_empty() {
                let taken = frames.frame(rest);
                assert!(taken > 0 && taken <= rest.len());
                (at, rest) = (at + taken, &rest[taken..]);
                assert_eq!(frames.is_closed(), at >= closes_in);
                if frames.is_between() {
                    found.push(at);
                }
            }
        }
        assert_eq!(found, ends, "in pieces of {size}");
    }
}

/// The length of the header, and of what follows it (RFC 6455 section 5.2).
fn frame_at(bytes: &[u8]) -> Option<(usize, u64)> {
    let second = *bytes.get(1)?;
    let mask = if second >= 128 { 4 } else { 0 };
    let (header, payload) = match second & 127 {
        126 => (4, u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?))),
        127 => (10, u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?)),
        short => (2, u64::from(short)),
    };
    (bytes.len() >= header + mask).then_some((header + mask, payload))
}

/// An HTTP/2 client's frames: another count of them comes to the same verdict, however they come.
/// The first two bytes say how many requests may be taken back and how the rest is cut.
pub fn h2_frames(data: &[u8]) {
    let [resets, size, data @ ..] = data else { return };
    let preface = [b'P'; 24];
    let (mut useful, mut useless, mut updates, mut reset) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut rest = data;
    while let Some(([a, b, c, kind, flags, ..], behind)) = rest.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        *match (kind, length, flags & 1) {
            (0, 0, 0) => &mut useless,
            (0 | 1, ..) => &mut useful,
            (3, ..) => &mut reset,
            (8, ..) => &mut updates,
            _ => &mut useless,
        } += 1;
        rest = behind.get(length..).unwrap_or_default();
    }
    let free = 1000 + useful;
    let flood = reset > u64::from(*resets) || useless > free || updates > free;
    for size in [usize::MAX, usize::from(*size) + 1] {
        let frames = frames::Frames::new(usize::from(*resets), 1000);
        frames.see(&preface);
        assert!(!frames.any());
        data.chunks(size.min(data.len().max(1))).for_each(|piece| frames.see(piece));
        assert_eq!(frames.any(), data.len() >= 9);
        assert_eq!(frames.flood(0).is_some(), flood);
        frames.tick(0);
        assert!(frames.flood(0).is_none());
    }
}
