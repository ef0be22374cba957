//! What a parsed head must not say, because two readers could understand it differently.
//!
//! What is wrong with its bytes never gets this far: hyper and h2 refuse it, and before hyper the
//! server's own guard. These are the fields whose values count for framing and routing.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::Problem;

/// How the body of a request is coded. RFC 9112 sections 6.1 and 6.3: chunked, once, and last;
/// litegate knows no other coding.
///
/// # Errors
/// 400 where the end of the body can't be told, 501 where its meaning can't.
pub fn coding(head: &HeaderMap) -> Result<(), Problem> {
    let mut lines = head.get_all(header::TRANSFER_ENCODING).iter();
    let Some(first) = lines.next() else { return Ok(()) };
    if lines.next().is_some() {
        return Err(Problem::Malformed);
    }
    if is_chunked(first) {
        return Ok(());
    }
    let codings = first.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    let known = codings.clone().filter(|coding| coding.eq_ignore_ascii_case(b"chunked")).count();
    let last = codings.clone().next_back().unwrap_or_default();
    let clear = known == 1
        && last.eq_ignore_ascii_case(b"chunked")
        && codings.clone().all(|coding| HeaderName::from_bytes(coding).is_ok());
    Err(if clear { Problem::UnknownCoding } else { Problem::Malformed })
}

/// Whether a body is coded as litegate knows it.
pub(super) fn is_chunked(value: &HeaderValue) -> bool {
    value.as_bytes().eq_ignore_ascii_case(b"chunked")
}

/// Whether it is the length of a body.
pub(super) fn is_length(value: &HeaderValue) -> bool {
    let digits = value.as_bytes();
    !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)
}

/// Whether a request's body has one length, if it says any.
pub fn has_one_length(head: &HeaderMap) -> bool {
    let mut lines = head.get_all(header::CONTENT_LENGTH).iter();
    let first = lines.next();
    first.is_none_or(is_length) && lines.next().is_none()
}

/// What the client expects beyond an answer. RFC 9110 section 10.1.1 knows one thing.
///
/// # Errors
/// 417 for anything else.
pub fn expectation(head: &HeaderMap) -> Result<(), Problem> {
    let mut lines = head.get_all(header::EXPECT).iter();
    let known = |line: &HeaderValue| line.as_bytes().eq_ignore_ascii_case(b"100-continue");
    match (lines.next(), lines.next()) {
        (None, _) => Ok(()),
        (Some(line), None) if known(line) => Ok(()),
        _ => Err(Problem::UnknownExpectation),
    }
}

/// Whether it is `uri-host [ ":" port ]` (RFC 9110 section 7.2, RFC 3986 section 3.2.2) and not
/// empty (RFC 9110 section 4.2.1).
pub fn is_host(host: &[u8]) -> bool {
    let (name, port) = match host.iter().rposition(|byte| *byte == b':') {
        Some(colon) if !host.get(colon..).unwrap_or_default().contains(&b']') => {
            (host.get(..colon).unwrap_or_default(), host.get(colon + 1..).unwrap_or_default())
        }
        _ => (host, &[][..]),
    };
    let literal = name.strip_prefix(b"[").and_then(|name| name.strip_suffix(b"]"));
    let is_name = match literal {
        Some(address) => {
            !address.is_empty()
                && address.iter().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(byte))
        }
        None => is_registered_name(name),
    };
    is_name && port.iter().all(u8::is_ascii_digit)
}

/// `reg-name = *( unreserved / pct-encoded / sub-delims )`, one byte at least.
fn is_registered_name(name: &[u8]) -> bool {
    let mut rest = name.iter();
    while let Some(byte) = rest.next() {
        let fits = match byte {
            b'%' => {
                let hex = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_hexdigit);
                hex(rest.next()) && hex(rest.next())
            }
            byte => byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(byte),
        };
        if !fits {
            return false;
        }
    }
    !name.is_empty()
}

/// Whether a name means another field to whoever, as CGI and WSGI do, takes `_` for `-`.
pub fn is_underscored(name: &HeaderName) -> bool {
    memchr::memchr(b'_', name.as_str().as_bytes()).is_some()
}

/// Which fields of a request want a look. Most have few of them, so that one pass over the names
/// saves looking for each.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is there or not, whatever the others are")]
pub struct Peculiar {
    /// `Host`
    pub hosts: bool,
    /// `Transfer-Encoding`: see [`coding`].
    pub coded: bool,
    /// `Content-Length`: see [`has_one_length`].
    pub sized: bool,
    /// `Expect`: see [`expectation`].
    pub expects: bool,
    /// `Upgrade`
    pub upgrades: bool,
    /// `Via`
    pub passed: bool,
    /// `Cookie`
    pub cookies: bool,
    /// See [`is_underscored`].
    pub underscored: bool,
    /// A quotation mark in a name: see `server::are_tokens`.
    pub quoted: bool,
    /// Named `Litegate-…`: a client's wish, or its token.
    pub addressed: bool,
}

impl Peculiar {
    /// What there is of them.
    pub fn of(head: &HeaderMap) -> Self {
        let mut seen = Self::default();
        for name in head.keys() {
            match *name {
                header::HOST => seen.hosts = true,
                header::TRANSFER_ENCODING => seen.coded = true,
                header::CONTENT_LENGTH => seen.sized = true,
                header::EXPECT => seen.expects = true,
                header::UPGRADE => seen.upgrades = true,
                header::VIA => seen.passed = true,
                header::COOKIE => seen.cookies = true,
                // Most have these, and nothing is peculiar about their names.
                header::ACCEPT
                | header::ACCEPT_ENCODING
                | header::ACCEPT_LANGUAGE
                | header::AUTHORIZATION
                | header::CACHE_CONTROL
                | header::CONNECTION
                | header::CONTENT_TYPE
                | header::ORIGIN
                | header::REFERER
                | header::USER_AGENT => {}
                ref other => seen.look_at(other.as_str()),
            }
        }
        seen
    }

    fn look_at(&mut self, name: &str) {
        // A name is short: a search that looks at many bytes at once begins too late.
        for byte in name.bytes() {
            self.underscored |= byte == b'_';
            self.quoted |= byte == b'"';
        }
        self.addressed |= name.starts_with("litegate-");
    }
}

/// Whether a field may come behind a body. RFC 9110 section 6.5.1: not what frames or routes a
/// message, says who its client is or what it may; whoever merges trailers into the head would
/// believe it.
pub fn may_trail(name: &HeaderName) -> bool {
    let name = name.as_str();
    let reserved = matches!(
        name,
        "content-length"
            | "transfer-encoding"
            | "host"
            | "connection"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "upgrade"
            | "expect"
            | "max-forwards"
            | "range"
            | "cache-control"
            | "authorization"
            | "proxy-authorization"
            | "proxy-authenticate"
            | "www-authenticate"
            | "cookie"
            | "set-cookie"
            | "content-encoding"
            | "content-type"
            | "content-range"
            | "location"
            | "forwarded"
            | "via"
            | "x-real-ip"
            | "client-cert"
            | "client-cert-chain"
            | "x-client-cert-subject"
    );
    let ours = ["x-forwarded-", "fly-", "litegate-"];
    // No token, though the type takes it for one: see `server::are_tokens`.
    let is_token = !name.contains('"');
    is_token && !reserved && !ours.iter().any(|prefix| name.starts_with(prefix))
}

/// Takes out of trailers what may not be there.
pub fn trailers(fields: &mut HeaderMap) {
    let barred: Vec<_> = fields.keys().filter(|name| !may_trail(name)).cloned().collect();
    for name in barred {
        fields.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::answer::Said, *};

    fn head(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut head = HeaderMap::new();
        for (name, value) in fields {
            head.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        head
    }

    #[test]
    fn one_coding_is_known() {
        let te = "transfer-encoding";
        for (fields, expected) in [
            (vec![], Ok(())),
            (vec![(te, "chunked")], Ok(())),
            (vec![(te, "Chunked")], Ok(())),
            (vec![(te, "gzip, chunked")], Err(Problem::UnknownCoding)),
            (vec![(te, "identity, chunked")], Err(Problem::UnknownCoding)),
            (vec![(te, "chunked, identity")], Err(Problem::Malformed)),
            (vec![(te, "chunked, chunked")], Err(Problem::Malformed)),
            (vec![(te, ", chunked")], Err(Problem::Malformed)),
            (vec![(te, "x y, chunked")], Err(Problem::Malformed)),
            (vec![(te, "xchunked")], Err(Problem::Malformed)),
            (vec![(te, "")], Err(Problem::Malformed)),
            (vec![(te, "chunked"), (te, "chunked")], Err(Problem::Malformed)),
        ] {
            assert_eq!(coding(&head(&fields)), expected, "{fields:?}");
        }
    }

    #[test]
    fn what_wants_a_look_is_seen() {
        let of = |name| Peculiar::of(&head(&[("accept", "a"), (name, "b")]));
        assert_eq!(of("x-a"), Peculiar::default());
        assert!(of("host").hosts);
        assert!(of("transfer-encoding").coded && of("content-length").sized);
        assert!(of("expect").expects && of("upgrade").upgrades && of("via").passed);
        assert!(of("cookie").cookies && of("x_a").underscored && of("litegate-token").addressed);
        let quoted = HeaderName::from_lowercase(b"x\"a").unwrap();
        let quoted = [(quoted, HeaderValue::from_static("b"))].into_iter().collect();
        assert!(Peculiar::of(&quoted).quoted);
    }

    #[test]
    fn an_answer_is_framed_once() {
        let (te, cl) = ("transfer-encoding", "content-length");
        for (fields, framed) in [
            (vec![], true),
            (vec![(cl, "5")], true),
            (vec![(te, "chunked")], true),
            (vec![(te, "chunked"), (cl, "5")], false),
            (vec![(cl, "5"), (cl, "5")], false),
            (vec![(cl, "5, 5")], false),
            (vec![(cl, "+5")], false),
            (vec![(te, "gzip, chunked")], false),
            (vec![(te, "gzip")], false),
            (vec![(te, "chunked"), (te, "chunked")], false),
        ] {
            assert_eq!(Said::of(&head(&fields)).framed, framed, "{fields:?}");
        }
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for (host, is) in [
            ("abaci.one", true),
            ("a_b-c.one:8080", true),
            ("a:", true),
            ("127.0.0.1:80", true),
            ("[::1]", true),
            ("[2001:db8::7]:443", true),
            ("%61", true),
            ("", false),
            (":80", false),
            ("a b", false),
            ("user@a", false),
            ("a/b", false),
            ("a:b", false),
            ("a:80:80", false),
            ("[::1", false),
            ("[]", false),
            ("a#b", false),
            ("a?b", false),
            ("a\\b", false),
            ("%6", false),
            ("\u{e9}", false),
        ] {
            assert_eq!(is_host(host.as_bytes()), is, "{host}");
        }
    }

    #[test]
    fn what_counts_for_the_head_does_not_trail() {
        let mut fields = head(&[
            ("content-length", "5"),
            ("x-forwarded-for", "9.9.9.9"),
            ("grpc-status", "0"),
            ("x-sum", "1"),
            ("x-sum", "2"),
        ]);
        trailers(&mut fields);
        assert_eq!(fields.len(), 3);
        assert_eq!(fields.get_all("x-sum").iter().count(), 2);
    }
}
