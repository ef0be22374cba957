//! What of a head travels on, and what litegate adds: pure edits of a [`HeaderMap`].
//!
//! The request a client sent is kept as it came, and each attempt's head is built from it anew
//! in one pass, so that a replay carries the original and not what the first hop made of it.
//! A response head is edited in place: it is relayed once.
//!
//! Rules: RFC 9110 sections 7.6.1 (hop-by-hop) and 7.6.3 (Via), RFC 7239 (Forwarded),
//! `reference/fly-replay.md` section 13 rule 8 (what apps believe of an edge).

use std::{
    cell::RefCell,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use bytes::{BufMut as _, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use crate::{
    decide::{answer::Said, replay::Transform, token},
    server::ClientCertificate,
};

/// `X-Forwarded-For`
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
/// RFC 9440 section 2.2.
const CLIENT_CERT: HeaderName = HeaderName::from_static("client-cert");
const CLIENT_CERT_SUBJECT: HeaderName = HeaderName::from_static("x-client-cert-subject");

/// What is the same for every request of one connection.
#[derive(Debug)]
pub struct Peer {
    /// Whether what it says of other peers is believed.
    pub trusted: bool,
    address: HeaderValue,
    port: HeaderValue,
    /// `http` or `https`
    proto: &'static str,
    /// `Client-Cert`, and the subject in words, of a stranger's certificate.
    certificate: Option<HeaderValue>,
    subject: Option<HeaderValue>,
    /// `for=…` of RFC 7239, to which host and protocol are added.
    node: Box<[u8]>,
    /// The host asked for last, and the element made for it: nearly always the same one.
    last: RefCell<Option<(HeaderValue, HeaderValue)>>,
}

impl Peer {
    /// Writes down once what would be formatted for each request.
    pub fn new(peer: SocketAddr, local: SocketAddr, trusted: bool) -> Self {
        let ip = peer.ip().to_canonical();
        let node = match ip {
            IpAddr::V4(ip) => format!("for={ip}"),
            IpAddr::V6(ip) => format!("for=\"[{ip}]\""),
        };
        Self {
            trusted,
            address: text(&ip.to_string()),
            port: text(&local.port().to_string()),
            proto: "http",
            certificate: None,
            subject: None,
            node: node.into_bytes().into(),
            last: RefCell::default(),
        }
    }

    /// It came by TLS, perhaps with a certificate. A trusted proxy's is its own and not its
    /// client's: apps would take the one for the other, so it is not passed on.
    #[must_use]
    pub fn below_tls(mut self, certificate: Option<&ClientCertificate>) -> Self {
        self.proto = "https";
        if let Some(certificate) = certificate.filter(|_| !self.trusted) {
            // RFC 9440 section 2.2: a byte sequence as in RFC 8941 section 3.3.5.
            let der = &certificate.der;
            self.certificate =
                (!der.is_empty()).then(|| text(&format!(":{}:", BASE64.encode(der))));
            let subject = Some(&certificate.subject).filter(|subject| !subject.is_empty());
            self.subject = subject.and_then(|subject| HeaderValue::from_str(subject).ok());
        }
        self
    }

    /// The host, if it is the one that was asked for last: then nothing is wrong with it.
    pub fn asked_for(&self, host: &[u8]) -> Option<HeaderValue> {
        let last = self.last.borrow();
        last.as_ref().map(|(known, _)| known).filter(|known| known.as_bytes() == host).cloned()
    }

    /// This hop's element of `Forwarded`.
    fn element(&self, host: Option<&HeaderValue>) -> HeaderValue {
        let mut last = self.last.borrow_mut();
        match (&*last, host) {
            (Some((known, element)), Some(host)) if known == host => element.clone(),
            (_, Some(host)) => {
                let element = self.render(Some(host));
                // A copy: as it is, it would keep hyper's whole read buffer while the client is idle.
                let host = HeaderValue::from_bytes(host.as_bytes()).ok();
                *last = host.map(|host| (host, element.clone()));
                element
            }
            (_, None) => self.render(None),
        }
    }

    fn render(&self, host: Option<&HeaderValue>) -> HeaderValue {
        const PROTO: &[u8] = b";proto=";
        let host = host.map(HeaderValue::as_bytes).filter(|host| is_quotable(host));
        let length = self.node.len()
            + PROTO.len()
            + self.proto.len()
            + host.map_or(0, |host| host.len() + 8);
        let mut element = BytesMut::with_capacity(length);
        element.put_slice(&self.node);
        if let Some(host) = host {
            element.put_slice(b";host=\"");
            element.put_slice(host);
            element.put_u8(b'"');
        }
        element.put_slice(PROTO);
        element.put_slice(self.proto.as_bytes());
        value(element.freeze())
    }
}

/// Whether it can stand between quotes as it is.
fn is_quotable(host: &[u8]) -> bool {
    host.iter().all(|byte| (0x20..0x7f).contains(byte) && *byte != b'"' && *byte != b'\\')
}

fn text(text: &str) -> HeaderValue {
    // Digits, dots and colons only.
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn value(bytes: bytes::Bytes) -> HeaderValue {
    // Made of parts that were header values, and visible ASCII.
    HeaderValue::from_maybe_shared(bytes).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// What the attempt adds beyond the client's own fields.
#[derive(Debug, Default)]
pub struct Extra {
    /// LiteFS's cookie stays here: it asks for what will never be.
    pub without_txid: bool,
    /// `fly-replay-src`, after a replay.
    pub replay_src: Option<HeaderValue>,
    /// `fly-replay-failed`, on a fallback.
    pub replay_failed: Option<HeaderValue>,
    /// `fly-preferred-instance-unavailable`
    pub preferred_unavailable: Option<HeaderValue>,
    /// What a node wants changed in the request that it replays. Fields about the hop, the
    /// message's framing, its host and its way were refused when it was parsed.
    pub transform: Option<Box<Transform>>,
}

/// The head that a node gets.
///
/// `original` is what the client sent; `host` replaces its `Host` (the authority of an
/// absolute-form target outranks it, RFC 9112 section 3.2.2); `upgrade` keeps the fields that ask
/// for another protocol; `via` is this instance's own.
pub fn upstream(
    original: &HeaderMap,
    host: Option<&HeaderValue>,
    peer: &Peer,
    upgrade: bool,
    via: &HeaderValue,
    extra: &Extra,
) -> HeaderMap {
    // Seven fields of ours come on top of the client's.
    let mut head = HeaderMap::with_capacity(original.len() + 8);
    let host = host.or_else(|| original.get(header::HOST));
    head.insert(header::HOST, host.cloned().unwrap_or_else(|| HeaderValue::from_static("")));

    let mut named = false;
    let mut trailers = false;
    for (name, value) in original {
        match fate(name, peer.trusted) {
            Fate::Keep => {
                head.append(name, value.clone());
            }
            Fate::Drop => {}
            Fate::Connection => named |= names_fields(value),
            Fate::Te => trailers |= is_token_listed(value, b"trailers"),
        }
    }
    if named {
        remove_named(original, &mut head);
    }
    if extra.without_txid {
        head.remove(header::COOKIE);
        if let Some(cookies) = token::without_txid(original) {
            head.insert(header::COOKIE, cookies);
        }
    }
    if trailers {
        // hyper passes trailers on, so this hop can say so for itself.
        head.insert(header::TE, HeaderValue::from_static("trailers"));
        head.insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
    if upgrade && let Some(protocol) = original.get(header::UPGRADE) {
        head.insert(header::UPGRADE, protocol.clone());
        head.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    head.append(header::VIA, via.clone());
    forwarded(&mut head, host, peer);
    for (name, value) in [
        ("fly-replay-src", &extra.replay_src),
        ("fly-replay-failed", &extra.replay_failed),
        ("fly-preferred-instance-unavailable", &extra.preferred_unavailable),
    ] {
        if let Some(value) = value {
            head.insert(HeaderName::from_static(name), value.clone());
        }
    }
    if let Some(transform) = &extra.transform {
        // Last, so that no client can take away by `Connection` what an app has set.
        for name in &transform.delete_headers {
            head.remove(name);
        }
        for (name, value) in &transform.set_headers {
            head.insert(name, value.clone());
        }
    }
    head
}

/// Says who the client is: in place of what it said itself, or behind what a trusted proxy said.
fn forwarded(head: &mut HeaderMap, host: Option<&HeaderValue>, peer: &Peer) {
    if peer.trusted {
        append(head, FORWARDED_FOR, &peer.address);
        append(head, header::FORWARDED, &peer.element(host));
        // The proxy in front knows what the client asked it for.
        if !head.contains_key(&FORWARDED_PROTO) {
            head.insert(FORWARDED_PROTO, HeaderValue::from_static(peer.proto));
        }
        if !head.contains_key(&FORWARDED_PORT) {
            head.insert(FORWARDED_PORT, peer.port.clone());
        }
        if !head.contains_key(&REAL_IP) {
            head.insert(REAL_IP, peer.address.clone());
        }
        if let Some(host) = host
            && !head.contains_key(&FORWARDED_HOST)
        {
            head.insert(FORWARDED_HOST, host.clone());
        }
    } else {
        // What a stranger said has been dropped: these are the only ones.
        head.insert(FORWARDED_FOR, peer.address.clone());
        head.insert(header::FORWARDED, peer.element(host));
        head.insert(FORWARDED_PROTO, HeaderValue::from_static(peer.proto));
        head.insert(FORWARDED_PORT, peer.port.clone());
        head.insert(REAL_IP, peer.address.clone());
        if let Some(host) = host {
            head.insert(FORWARDED_HOST, host.clone());
        }
        if let Some(certificate) = &peer.certificate {
            head.insert(CLIENT_CERT, certificate.clone());
        }
        if let Some(subject) = &peer.subject {
            head.insert(CLIENT_CERT_SUBJECT, subject.clone());
        }
    }
}

/// The client of a request that a trusted proxy passes on: the last of those it tells of that is
/// not a trusted proxy itself. `X-Forwarded-For` outranks `Forwarded`, which fewer proxies know and
/// which those pass on as it came. `None`: nobody is told of.
pub fn client(head: &HeaderMap, trusts: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let last = |name: &HeaderName, node: fn(&str) -> Option<&str>| {
        // What cannot be understood stands for somebody, and nobody knows who is behind it.
        let mut told = head.get_all(name).iter().rev().flat_map(move |line| {
            let line = line.to_str().unwrap_or_default();
            line.rsplit(',').map(move |hop| address(node(hop)?))
        });
        told.find(|told| told.is_none_or(|ip| !trusts(ip))).flatten()
    };
    if head.contains_key(&FORWARDED_FOR) {
        last(&FORWARDED_FOR, |hop| Some(hop))
    } else {
        last(&header::FORWARDED, |hop| {
            hop.split(';').find_map(|pair| {
                let (name, node) = pair.split_once('=')?;
                name.trim().eq_ignore_ascii_case("for").then_some(node)
            })
        })
    }
}

/// An address in the forms of `X-Forwarded-For` and of RFC 7239 section 6, with or without a port.
fn address(node: &str) -> Option<IpAddr> {
    let node = node.trim().trim_matches('"');
    if let Some(rest) = node.strip_prefix('[') {
        return rest.split_once(']')?.0.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    let with_port = |node: &str| node.parse::<SocketAddr>().map(|address| address.ip());
    node.parse().or_else(|_| with_port(node)).ok()
}

/// What an HTTP/2 head counts for (RFC 9113 section 6.5.2), its pseudo fields aside.
pub fn h2_size(head: &HeaderMap) -> usize {
    head.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// Adds to a list field, in one line: many apps read only the first line of `X-Forwarded-For`.
fn append(head: &mut HeaderMap, name: HeaderName, last: &HeaderValue) {
    let mut lines = head.get_all(&name).iter();
    let Some(first) = lines.next() else {
        head.insert(name, last.clone());
        return;
    };
    let mut joined = BytesMut::from(first.as_bytes());
    for line in lines {
        joined.put_slice(b", ");
        joined.put_slice(line.as_bytes());
    }
    joined.put_slice(b", ");
    joined.put_slice(last.as_bytes());
    head.insert(name, value(joined.freeze()));
}

/// What happens to a request field.
enum Fate {
    Keep,
    Drop,
    /// Names other fields of this hop.
    Connection,
    /// Of this hop, but it may say `trailers`.
    Te,
}

fn fate(name: &HeaderName, trusted: bool) -> Fate {
    match name.as_str() {
        "connection" => Fate::Connection,
        "te" => Fate::Te,
        // `host` is written first; the others are about this hop only (RFC 9110 section 7.6.1),
        // or litegate's own (`http2-settings` belongs to an upgrade that hyper does not make).
        "host"
        | "keep-alive"
        | "proxy-connection"
        | "transfer-encoding"
        | "upgrade"
        | "http2-settings"
        | "proxy-authorization" => Fate::Drop,
        "forwarded"
        | "x-forwarded-for"
        | "x-forwarded-proto"
        | "x-forwarded-host"
        | "x-forwarded-port"
        | "x-forwarded-ssl"
        | "x-real-ip"
        | "client-cert"
        | "client-cert-chain"
        | "x-client-cert-subject"
            if !trusted =>
        {
            Fate::Drop
        }
        name if name.starts_with("fly-") && !trusted && is_of_the_edge(name) => Fate::Drop,
        // Addressed to litegate.
        "litegate-route" | "litegate-consistency" | "litegate-max-staleness" | "litegate-token" => {
            Fate::Drop
        }
        _ => Fate::Keep,
    }
}

/// Request fields that apps believe because only Fly's edge can set them.
fn is_of_the_edge(name: &str) -> bool {
    name.starts_with("fly-forwarded-")
        || name.starts_with("fly-replay")
        || name.starts_with("fly-force-")
        || name.starts_with("fly-prefer")
        || matches!(
            name,
            "fly-client-ip"
                | "fly-region"
                | "fly-request-id"
                | "fly-dispatch-start"
                | "fly-traceparent"
                | "fly-tracestate"
        )
}

/// Whether a `Connection` line names anything but the usual words.
fn names_fields(connection: &HeaderValue) -> bool {
    tokens(connection).any(|token| {
        ![&b"keep-alive"[..], b"close", b"upgrade", b"te"]
            .iter()
            .any(|usual| token.eq_ignore_ascii_case(usual))
    })
}

/// Removes the fields that `Connection` names. `Host` and `Content-Length` stay: no message is
/// right without them, whoever names them.
fn remove_named(original: &HeaderMap, head: &mut HeaderMap) {
    for line in original.get_all(header::CONNECTION) {
        for token in tokens(line) {
            if let Ok(name) = HeaderName::from_bytes(token)
                && name != header::HOST
                && name != header::CONTENT_LENGTH
            {
                head.remove(name);
            }
        }
    }
}

fn is_token_listed(line: &HeaderValue, wanted: &[u8]) -> bool {
    tokens(line).any(|token| token.eq_ignore_ascii_case(wanted))
}

fn tokens(line: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|t| !t.is_empty())
}

/// Whether a request asks to become another protocol: `Connection: upgrade` and an `Upgrade`. To
/// another HTTP it never does: a node that agreed would take requests that litegate never saw, and
/// RFC 9113 section 3.1 has done away with it.
pub fn wants_upgrade(head: &HeaderMap) -> bool {
    let mut protocols = head.get_all(header::UPGRADE).iter().flat_map(tokens).peekable();
    protocols.peek().is_some()
        && !protocols.any(is_http)
        && head.get_all(header::CONNECTION).iter().any(|line| is_token_listed(line, b"upgrade"))
}

/// `h2c`, `h2`, `HTTP/2.0`, `TLS/1.0`: what would hide requests.
fn is_http(protocol: &[u8]) -> bool {
    let name = protocol.split(|byte| *byte == b'/').next().unwrap_or_default().trim_ascii();
    [&b"h2c"[..], b"h2", b"h3", b"http", b"https", b"tls"]
        .iter()
        .any(|http| name.eq_ignore_ascii_case(http))
}

/// Whether the protocol of a node's 101 is one of those that the request named.
pub fn is_asked_for(request: &HeaderMap, answer: &HeaderMap) -> bool {
    let mut to = answer.get_all(header::UPGRADE).iter().flat_map(tokens);
    let (Some(to), None) = (to.next(), to.next()) else { return false };
    let mut asked = request.get_all(header::UPGRADE).iter().flat_map(tokens);
    asked.any(|asked| asked.eq_ignore_ascii_case(to))
}

/// Makes one field of the crumbs that HTTP/2 lets a client break its cookies into (RFC 9113
/// section 8.2.3): HTTP/1.1 has but one.
pub fn join_cookies(head: &mut HeaderMap) {
    let mut crumbs = head.get_all(header::COOKIE).iter();
    let (Some(first), Some(second)) = (crumbs.next(), crumbs.next()) else { return };
    let mut joined = BytesMut::from(first.as_bytes());
    for crumb in std::iter::once(second).chain(crumbs) {
        joined.put_slice(b"; ");
        joined.put_slice(crumb.as_bytes());
    }
    head.insert(header::COOKIE, value(joined.freeze()));
}

/// Adds what HTTP/1.1 wants of whoever asks for a WebSocket (RFC 6455 section 4.1), and HTTP/2 does
/// not (RFC 8441 section 5).
pub fn ask_for_websocket(head: &mut HeaderMap, nonce: u128) {
    head.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    head.insert(header::SEC_WEBSOCKET_KEY, text(&BASE64.encode(nonce.to_be_bytes())));
}

/// Removes from a node's 101 what the answer to an extended CONNECT does not have.
pub fn switched_h2(head: &mut HeaderMap) {
    head.remove(header::CONNECTION);
    head.remove(header::UPGRADE);
    head.remove(header::SEC_WEBSOCKET_ACCEPT);
    // Of a 101 it says nothing, and of a 2xx to CONNECT it must not be there.
    head.remove(header::CONTENT_LENGTH);
}

/// Edits a node's response head for the client, among which is what is `said`. `switching` keeps what
/// a 101 needs; `pass` keeps `fly-replay*` for a Fly edge in front of litegate.
pub fn downstream(
    head: &mut HeaderMap,
    said: Said,
    switching: bool,
    pass: bool,
    via: &HeaderValue,
) {
    if said.connection {
        if head.get_all(header::CONNECTION).iter().any(names_fields) {
            let original = head.clone();
            remove_named(&original, head);
        }
        head.remove(header::CONNECTION);
    }
    if said.hop {
        head.remove("keep-alive");
        head.remove("proxy-connection");
        head.remove(header::TRANSFER_ENCODING);
        head.remove(header::TE);
        head.remove(header::PROXY_AUTHENTICATE);
        if !switching {
            head.remove(header::UPGRADE);
        }
    }
    if said.replays || said.addressed {
        strip_ours(head, pass);
    }
    if switching {
        head.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    head.append(header::VIA, via.clone());
}

/// Removes what is between a node and litegate.
fn strip_ours(head: &mut HeaderMap, pass: bool) {
    let names: Vec<HeaderName> = head
        .keys()
        .filter(|name| {
            let name = name.as_str();
            (name.starts_with("fly-replay") && !pass) || name.starts_with("litegate-")
        })
        .cloned()
        .collect();
    for name in names {
        head.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let fields = fields.iter();
        fields.map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    fn stranger() -> Peer {
        Peer::new("192.0.2.7:4711".parse().unwrap(), "10.0.0.1:8080".parse().unwrap(), false)
    }

    fn proxy() -> Peer {
        Peer::new("192.0.2.7:4711".parse().unwrap(), "10.0.0.1:8080".parse().unwrap(), true)
    }

    fn sent(original: &[(&'static str, &'static str)], peer: &Peer) -> HeaderMap {
        let via = HeaderValue::from_static("1.1 litegate");
        upstream(&head(original), None, peer, false, &via, &Extra::default())
    }

    fn lines<'h>(head: &'h HeaderMap, name: &str) -> Vec<&'h str> {
        head.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
    }

    #[test]
    fn fields_of_this_hop_stay_here() {
        let sent = sent(
            &[
                ("host", "a"),
                ("connection", "close, X-Secret"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=5"),
                ("te", "gzip"),
                ("transfer-encoding", "chunked"),
                ("upgrade", "h2c"),
                ("http2-settings", "x"),
                ("x-kept", "1"),
            ],
            &stranger(),
        );
        for gone in [
            "connection",
            "x-secret",
            "keep-alive",
            "te",
            "transfer-encoding",
            "upgrade",
            "http2-settings",
        ] {
            assert!(!sent.contains_key(gone), "{gone}");
        }
        assert_eq!(lines(&sent, "x-kept"), ["1"]);
    }

    #[test]
    fn connection_cannot_take_host_or_length_away() {
        let sent = sent(
            &[("host", "a"), ("content-length", "3"), ("connection", "host, content-length")],
            &stranger(),
        );
        assert_eq!(lines(&sent, "host"), ["a"]);
        assert_eq!(lines(&sent, "content-length"), ["3"]);
    }

    #[test]
    fn connection_cannot_take_ours_away() {
        let ours = [
            ("via", "1.1 litegate"),
            ("forwarded", "for=192.0.2.7;host=\"a\";proto=http"),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-host", "a"),
            ("x-forwarded-port", "8080"),
            ("x-forwarded-proto", "http"),
            ("x-real-ip", "192.0.2.7"),
        ];
        for (name, value) in ours {
            let sent = sent(&[("host", "a"), ("connection", name)], &stranger());
            assert_eq!(lines(&sent, name), [value]);
        }
    }

    #[test]
    fn who_names_no_host_gets_an_empty_one_and_none_is_told_of() {
        let sent = sent(&[("accept", "a")], &stranger());
        assert_eq!(lines(&sent, "host"), [""]);
        assert!(!sent.contains_key("x-forwarded-host"));
        assert_eq!(lines(&sent, "forwarded"), ["for=192.0.2.7;proto=http"]);
    }

    #[test]
    fn a_stranger_cannot_say_who_it_is() {
        let sent = sent(
            &[
                ("host", "abaci.one"),
                ("x-forwarded-for", "6.6.6.6"),
                ("forwarded", "for=6.6.6.6"),
                ("x-real-ip", "6.6.6.6"),
                ("x-forwarded-proto", "https"),
                ("fly-client-ip", "6.6.6.6"),
                ("fly-replay-src", "instance=evil;state=key"),
                ("fly-force-instance-id", "b"),
                ("litegate-route", "primary"),
            ],
            &stranger(),
        );
        assert_eq!(lines(&sent, "x-forwarded-for"), ["192.0.2.7"]);
        assert_eq!(lines(&sent, "forwarded"), ["for=192.0.2.7;host=\"abaci.one\";proto=http"]);
        assert_eq!(lines(&sent, "x-real-ip"), ["192.0.2.7"]);
        assert_eq!(lines(&sent, "x-forwarded-proto"), ["http"]);
        assert_eq!(lines(&sent, "x-forwarded-host"), ["abaci.one"]);
        assert_eq!(lines(&sent, "x-forwarded-port"), ["8080"]);
        for gone in ["fly-client-ip", "fly-replay-src", "fly-force-instance-id", "litegate-route"] {
            assert!(!sent.contains_key(gone), "{gone}");
        }
    }

    #[test]
    fn the_client_is_the_last_one_that_is_no_trusted_proxy() {
        let trusted = |ip: IpAddr| ip.to_string().starts_with("10.");
        for (what, fields, want) in [
            ("nothing", &[][..], None),
            ("one", &[("x-forwarded-for", "192.0.2.1")], Some("192.0.2.1")),
            ("a lie before", &[("x-forwarded-for", "1.1.1.1, 192.0.2.1")], Some("192.0.2.1")),
            (
                "proxies behind",
                &[("x-forwarded-for", "192.0.2.1,10.0.0.1 , 10.9.9.9")],
                Some("192.0.2.1"),
            ),
            (
                "in lines",
                &[("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "192.0.2.1, 10.0.0.1")],
                Some("192.0.2.1"),
            ),
            (
                "the last line is a proxy's",
                &[("x-forwarded-for", "192.0.2.1"), ("x-forwarded-for", "10.0.0.1")],
                Some("192.0.2.1"),
            ),
            ("with a port", &[("x-forwarded-for", "192.0.2.1:4711")], Some("192.0.2.1")),
            ("IPv6", &[("x-forwarded-for", "2001:db8::1")], Some("2001:db8::1")),
            ("IPv6 in brackets", &[("x-forwarded-for", "[2001:db8::1]:4711")], Some("2001:db8::1")),
            ("proxies alone", &[("x-forwarded-for", "10.0.0.2, 10.0.0.1")], None),
            ("nobody knows whom", &[("x-forwarded-for", "192.0.2.1, unknown")], None),
            ("an empty hop", &[("x-forwarded-for", "192.0.2.1,")], None),
            ("what is no text", &[("x-forwarded-for", "192.0.2.1, \u{e9}")], None),
            (
                "both",
                &[("x-forwarded-for", "192.0.2.1"), ("forwarded", "for=1.1.1.1")],
                Some("192.0.2.1"),
            ),
            (
                "RFC 7239",
                &[("forwarded", "for=1.1.1.1, proto=https;For=192.0.2.1;by=x")],
                Some("192.0.2.1"),
            ),
            (
                "RFC 7239 with a port",
                &[("forwarded", "for=\"[2001:db8::1]:47\", for=10.0.0.1")],
                Some("2001:db8::1"),
            ),
            ("RFC 7239, hidden", &[("forwarded", "for=192.0.2.1, for=_hidden")], None),
            ("RFC 7239 without anybody", &[("forwarded", "for=192.0.2.1, proto=https")], None),
        ] {
            let mut head = HeaderMap::new();
            for (name, value) in fields {
                let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
                head.append(HeaderName::from_static(name), value);
            }
            assert_eq!(client(&head, trusted), want.map(|ip| ip.parse().unwrap()), "{what}");
        }
    }

    #[test]
    fn a_trusted_proxy_is_believed_and_added() {
        let sent = sent(
            &[
                ("host", "a"),
                ("x-forwarded-for", "198.51.100.1"),
                ("x-forwarded-for", "198.51.100.2"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "abaci.one"),
                ("fly-client-ip", "198.51.100.1"),
            ],
            &proxy(),
        );
        assert_eq!(lines(&sent, "x-forwarded-for"), ["198.51.100.1, 198.51.100.2, 192.0.2.7"]);
        assert_eq!(lines(&sent, "x-forwarded-proto"), ["https"]);
        assert_eq!(lines(&sent, "x-forwarded-host"), ["abaci.one"]);
        assert_eq!(lines(&sent, "fly-client-ip"), ["198.51.100.1"]);
    }

    #[test]
    fn repeated_fields_keep_their_lines_and_order() {
        let sent =
            sent(&[("host", "a"), ("cookie", "a=1"), ("x", "1"), ("cookie", "b=2")], &stranger());
        assert_eq!(lines(&sent, "cookie"), ["a=1", "b=2"]);
    }

    #[test]
    fn via_is_added_behind_those_of_others() {
        let sent = sent(&[("host", "a"), ("via", "1.0 fred")], &stranger());
        assert_eq!(lines(&sent, "via"), ["1.0 fred", "1.1 litegate"]);
    }

    #[test]
    fn trailers_are_asked_for_where_the_client_asks() {
        let sent = sent(&[("host", "a"), ("te", "trailers, deflate;q=0.5")], &stranger());
        assert_eq!(lines(&sent, "te"), ["trailers"]);
        assert_eq!(lines(&sent, "connection"), ["te"]);
    }

    #[test]
    fn an_upgrade_travels_on_where_it_is_allowed() {
        let original =
            head(&[("host", "a"), ("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(wants_upgrade(&original));
        let via = HeaderValue::from_static("1.1 litegate");
        let sent = upstream(&original, None, &stranger(), true, &via, &Extra::default());
        assert_eq!(lines(&sent, "upgrade"), ["websocket"]);
        assert_eq!(lines(&sent, "connection"), ["upgrade"]);
    }

    #[test]
    fn a_host_that_could_break_out_of_its_quotes_is_left_out() {
        let sent = sent(&[("host", "a\";for=evil")], &stranger());
        assert_eq!(lines(&sent, "forwarded"), ["for=192.0.2.7;proto=http"]);
    }

    #[test]
    fn a_certificate_is_passed_on_and_nobody_can_say_it_himself() {
        let said = [("client-cert", ":eA==:"), ("x-client-cert-subject", "CN=root")];
        let names = ["client-cert", "x-client-cert-subject"];
        let seen = |peer: &Peer| {
            let sent = sent(&said, peer);
            names.map(|name| lines(&sent, name).first().map(|line| (*line).to_owned()))
        };
        let certificate = ClientCertificate { der: (*b"der").into(), subject: "CN=ada".into() };
        let ours = [Some(":ZGVy:".to_owned()), Some("CN=ada".to_owned())];
        let theirs = [Some(":eA==:".to_owned()), Some("CN=root".to_owned())];
        assert_eq!(seen(&stranger()), [None, None]);
        assert_eq!(seen(&stranger().below_tls(None)), [None, None]);
        assert_eq!(seen(&stranger().below_tls(Some(&certificate))), ours);
        assert_eq!(seen(&proxy().below_tls(Some(&certificate))), theirs);
        let sent = sent(&[("host", "a")], &stranger().below_tls(None));
        assert_eq!(lines(&sent, "forwarded"), ["for=192.0.2.7;host=\"a\";proto=https"]);
        assert_eq!(lines(&sent, "x-forwarded-proto"), ["https"]);
    }

    #[test]
    fn crumbs_of_cookies_become_one_field() {
        let mut several = head(&[("a", "1")]);
        for crumb in ["a=1", "b=2", "c"] {
            several.append("cookie", HeaderValue::from_static(crumb));
        }
        join_cookies(&mut several);
        assert_eq!(lines(&several, "cookie"), ["a=1; b=2; c"]);
        let mut none = head(&[("a", "1")]);
        join_cookies(&mut none);
        assert_eq!(none, head(&[("a", "1")]));
    }

    #[test]
    fn an_ipv6_peer_is_quoted_in_forwarded_and_bare_elsewhere() {
        let peer =
            Peer::new("[2001:db8::7]:1".parse().unwrap(), "[::1]:80".parse().unwrap(), false);
        let sent = sent(&[("host", "a")], &peer);
        assert_eq!(lines(&sent, "forwarded"), ["for=\"[2001:db8::7]\";host=\"a\";proto=http"]);
        assert_eq!(lines(&sent, "x-forwarded-for"), ["2001:db8::7"]);
    }

    #[test]
    fn no_replay_field_reaches_a_client() {
        let via = HeaderValue::from_static("1.1 litegate");
        let fields = [
            ("fly-replay", "instance=b"),
            ("fly-replay-cache", "/x/*"),
            ("litegate-write", "1"),
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("upgrade", "h2"),
            ("x-kept", "1"),
        ];
        let mut answer = head(&fields);
        let said = Said::of(&answer);
        downstream(&mut answer, said, false, false, &via);
        let names: Vec<_> = answer.keys().map(HeaderName::as_str).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(answer.contains_key("x-kept") && answer.contains_key("via"));
        let mut passed = head(&fields);
        downstream(&mut passed, said, false, true, &via);
        assert!(passed.contains_key("fly-replay") && !passed.contains_key("litegate-write"));
    }

    proptest::proptest! {
        #[test]
        fn nothing_a_stranger_sends_counts_as_the_edges_word(
            fields in proptest::collection::vec(("[a-z-]{1,20}", "[ -~]{0,30}"), 0..20),
            edge in proptest::sample::select(vec![
                "fly-client-ip", "fly-replay-src", "fly-replay-failed", "fly-forwarded-proto",
                "forwarded", "x-forwarded-for", "x-real-ip", "litegate-route",
            ]),
        ) {
            let mut original = HeaderMap::new();
            for (name, value) in fields {
                if let (Ok(name), Ok(value)) = (
                    HeaderName::from_bytes(name.as_bytes()),
                    HeaderValue::from_str(&value),
                ) {
                    original.append(name, value);
                }
            }
            original.insert(edge, HeaderValue::from_static("forged"));
            let via = HeaderValue::from_static("1.1 litegate");
            let sent = upstream(&original, None, &stranger(), false, &via, &Extra::default());
            proptest::prop_assert!(
                !sent.get_all(edge).iter().any(|value| value == "forged"),
                "{edge}: {sent:?}"
            );
        }
    }
}
