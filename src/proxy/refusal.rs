//! The answer to what never became a request, and its line in the access log.
//!
//! hyper would answer a bad head by itself, barely and unseen; [`crate::server`] keeps that back
//! and asks here. What came of the head is hostile and broken by definition: it is only looked at
//! to say more to the operator, and to speak HTML to a browser.

use std::time::SystemTime;

use bytes::Bytes;
use http::{Method, Uri, Version};
use smallvec::SmallVec;

use super::{Client, Proxy, relay::Own};
use crate::{
    config::limits::Limit,
    decide::Problem,
    server::{ClientFault, Refusal},
    telemetry::{
        access_log::{Entry, Line},
        metrics::Finished,
    },
};

/// How much of a target is logged.
const TARGET: usize = 1024;

impl Proxy {
    /// The client sent nothing that could be answered by a node: counts and logs it, and returns
    /// litegate's own answer.
    pub fn refused(&self, client: &Client, refusal: &Refusal<'_>) -> Bytes {
        let seen = Seen::of(refusal.head);
        let problem = match refusal.fault {
            ClientFault::Malformed => Problem::Malformed,
            // A target that is too long by itself is a target that is too long, wherever the head
            // stopped fitting.
            ClientFault::HeadTooLarge if seen.target.len() > self.config.limits.uri_bytes => {
                Problem::UriTooLong
            }
            ClientFault::HeadTooLarge => Problem::HeadTooLarge,
            ClientFault::UriTooLong => Problem::UriTooLong,
            ClientFault::HeadTimeout => Problem::HeadTimeout,
            ClientFault::Flood | ClientFault::Resets => {
                let of_frames = refusal.fault == ClientFault::Flood;
                self.shard.reached(if of_frames { Limit::Frames } else { Limit::Resets }, 1);
                self.shard.problem(Problem::Flood);
                tracing::debug!(peer = %client.origin.peer, "closed a flood of frames");
                return Bytes::new();
            }
            ClientFault::Stalled => {
                // The request whose response it did not take has a line of its own.
                self.shard.reached(Limit::BodyIdle, 1);
                self.shard.problem(Problem::BodyTimeout);
                return Bytes::new();
            }
        };
        let limit = match problem {
            Problem::UriTooLong => Some(Limit::UriBytes),
            Problem::HeadTimeout => Some(Limit::HeaderRead),
            // A line for each field, and one for the request.
            Problem::HeadTooLarge if seen.lines > self.config.limits.headers + 1 => {
                Some(Limit::Headers)
            }
            Problem::HeadTooLarge => Some(Limit::HeaderBytes),
            _ => None,
        };
        if let Some(limit) = limit {
            self.shard.reached(limit, 1);
        }
        let own = Own {
            outcome: None,
            problem,
            detail: Some(refusal.detail).filter(|detail| !detail.is_empty()),
            html: seen.html,
            instance: &self.instance,
            close: true,
        };
        let (response, body) = own.render();
        let (answer, sent) = wire(&response, body, seen.method == Some(Method::HEAD));
        self.shard.request_finished(&Finished {
            listener: client.origin.listener,
            cluster: None,
            class: None,
            method: seen.method.as_ref(),
            status: problem.status(),
            duration: refusal.took,
            received: 0,
            sent,
            problem: Some(problem),
        });
        if let Some(log) = &self.log {
            log.push(Entry {
                time: SystemTime::now(),
                peer: client.origin.peer,
                line: Box::new(Line {
                    target: seen.uri(),
                    version: seen.version,
                    host: None,
                    user_agent: None,
                    request_id: None,
                }),
                method: seen.method,
                cluster: None,
                route: None,
                class: None,
                because: None,
                tries: SmallVec::new(),
                held: std::time::Duration::ZERO,
                status: problem.status(),
                problem: Some(problem),
                received: 0,
                sent,
                duration: refusal.took,
                complete: true,
            });
        }
        answer
    }
}

/// The answer as it goes over the wire, and how long its body is.
fn wire(response: &http::Response<()>, body: Bytes, is_head: bool) -> (Bytes, u64) {
    let status = response.status();
    let reason = status.canonical_reason().unwrap_or_default();
    let mut wire = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16()).into_bytes();
    for (name, value) in response.headers() {
        wire.extend_from_slice(name.as_str().as_bytes());
        wire.extend_from_slice(b": ");
        wire.extend_from_slice(value.as_bytes());
        wire.extend_from_slice(b"\r\n");
    }
    let date = httpdate::fmt_http_date(SystemTime::now());
    wire.extend_from_slice(format!("date: {date}\r\n\r\n").as_bytes());
    let body = if is_head { Bytes::new() } else { body };
    wire.extend_from_slice(&body);
    (wire.into(), body.len() as u64)
}

/// What can be made out of the remains of a head.
#[derive(Debug, Eq, PartialEq)]
struct Seen<'a> {
    method: Option<Method>,
    /// As it came; empty if nothing like one did.
    target: &'a [u8],
    version: Option<Version>,
    /// The client accepts HTML by name.
    html: bool,
    /// How many lines ended.
    lines: usize,
}

impl<'a> Seen<'a> {
    fn of(head: &'a [u8]) -> Self {
        let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
        // RFC 9112 section 2.2: empty lines may come first.
        let line = lines.by_ref().find(|line| !line.is_empty()).unwrap_or_default();
        let mut words = line.split(|byte| *byte == b' ');
        // A method is a token, and who sends a longer one than any registered does not mean HTTP.
        let method = words.next().filter(|word| word.len() <= 32);
        let method = method.and_then(|word| Method::from_bytes(word).ok());
        let target = if method.is_some() { words.next().unwrap_or_default() } else { &[] };
        let version = match words.next() {
            Some(b"HTTP/1.1") => Some(Version::HTTP_11),
            Some(b"HTTP/1.0") => Some(Version::HTTP_10),
            _ => None,
        };
        let html = lines.any(|line| {
            let (name, value) = line.split_at(line.len().min(7));
            name.eq_ignore_ascii_case(b"accept:")
                && value.windows(9).any(|part| part.eq_ignore_ascii_case(b"text/html"))
        });
        let lines = head.split(|byte| *byte == b'\n').skip(1).count();
        Self { method, target, version, html, lines }
    }

    /// The beginning of the target, if that is one.
    fn uri(&self) -> Option<Uri> {
        let (shown, _) = self.target.split_at(self.target.len().min(TARGET));
        Uri::try_from(shown).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_can_be_seen_of_a_broken_head() {
        for (head, method, target, version, html) in [
            (&b"GET /a?b HTTP/1.1\r\nx y: z\r\n"[..], "GET", "/a?b", true, false),
            (b"\r\n\r\nPOST /a HTTP/1.0\r\n", "POST", "/a", true, false),
            (b"GET /a HTTP/9.9\r\naccept: x,Text/HTML;q=1\r\n", "GET", "/a", false, true),
            (b"GET /aaaa", "GET", "/aaaa", false, false),
            (b"GET", "GET", "", false, false),
            (b"\x16\x03\x01\x02 /x HTTP/1.1\r\n", "", "", false, false),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PRI", "*", false, false),
            (b"", "", "", false, false),
        ] {
            let seen = Seen::of(head);
            let what = String::from_utf8_lossy(head);
            assert_eq!(seen.method.as_ref().map_or("", Method::as_str), method, "{what}");
            assert_eq!(seen.target, target.as_bytes(), "{what}");
            assert_eq!((seen.version.is_some(), seen.html), (version, html), "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_looked_at(head: Vec<u8>) {
            let seen = Seen::of(&head);
            let _ = seen.uri();
            prop_assert!(seen.target.len() <= head.len());
        }
    }
}
