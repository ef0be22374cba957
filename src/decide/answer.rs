//! What a node's answer says that somebody acts on, by one look over its fields.
//!
//! Most answers have few fields and none of these but a length and a type, so that one pass over all
//! of them costs less than looking for each.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::{
    replay::{self, Form},
    strict,
};

/// What there is among the fields of an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is there or not, whatever the others are")]
pub struct Said {
    /// It says in one way only, if at all, where its body ends (RFC 9112 section 6.3: to relay it
    /// with more would pass on an attempt at response splitting).
    pub framed: bool,
    /// A stream of server-sent events (WHATWG HTML section 9.2), which may well be silent for long.
    pub events: bool,
    /// `Connection`
    pub connection: bool,
    /// Another field of the hop.
    pub hop: bool,
    /// Named `Litegate-…`
    pub addressed: bool,
    /// Named `Fly-Replay…`
    pub replays: bool,
    /// Its body is a replay.
    json: bool,
}

impl Said {
    /// By this head.
    pub fn of(head: &HeaderMap) -> Self {
        let mut said = Self {
            framed: true,
            events: false,
            connection: false,
            hop: false,
            addressed: false,
            replays: false,
            json: false,
        };
        let (mut framings, mut typed) = (0, false);
        for (name, value) in head {
            match *name {
                header::CONTENT_LENGTH => {
                    framings += 1;
                    said.framed &= strict::is_length(value);
                }
                header::TRANSFER_ENCODING => {
                    framings += 1;
                    said.framed &= strict::is_chunked(value);
                    said.hop = true;
                }
                // The first of several counts.
                header::CONTENT_TYPE if !typed => {
                    typed = true;
                    said.events = is_event_stream(value);
                    said.json = replay::is_media_type(value.as_bytes());
                }
                header::CONNECTION => said.connection = true,
                header::TE | header::UPGRADE | header::PROXY_AUTHENTICATE => said.hop = true,
                header::DATE | header::SERVER | header::CONTENT_TYPE | header::SET_COOKIE => {}
                ref other => said.see(other),
            }
        }
        said.framed &= framings <= 1;
        said
    }

    fn see(&mut self, name: &HeaderName) {
        match name.as_str() {
            "keep-alive" | "proxy-connection" => self.hop = true,
            name if name.starts_with("fly-replay") => self.replays = true,
            name if name.starts_with("litegate-") => self.addressed = true,
            _ => {}
        }
    }

    /// Which form of a replay it announces in this head. `json`: whether the JSON form is understood
    /// here.
    pub fn form(&self, head: &HeaderMap, json: bool) -> Form {
        if self.json && json {
            Form::Json
        } else if self.json || (self.replays && head.contains_key(&replay::FLY_REPLAY)) {
            // A JSON form that is not understood is still no answer for a client.
            Form::Header
        } else {
            Form::None
        }
    }
}

fn is_event_stream(value: &HeaderValue) -> bool {
    const NAME: &[u8] = b"text/event-stream";
    value.as_bytes().split_at_checked(NAME.len()).is_some_and(|(name, rest)| {
        name.eq_ignore_ascii_case(NAME) && matches!(rest.first(), None | Some(b';' | b' ' | b'\t'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut head = HeaderMap::new();
        for (name, value) in fields {
            head.append(*name, HeaderValue::from_static(value));
        }
        head
    }

    fn said(fields: &[(&'static str, &'static str)]) -> Said {
        Said::of(&head(fields))
    }

    #[test]
    fn event_streams_are_known_by_their_type() {
        for (value, want) in [
            ("text/event-stream", true),
            ("Text/Event-Stream; charset=utf-8", true),
            ("text/event-stream ;charset=utf-8", true),
            ("text/event-streams", false),
            ("text/event", false),
            ("text/html", false),
        ] {
            assert_eq!(said(&[("content-type", value)]).events, want, "{value}");
        }
        assert!(!said(&[]).events);
    }

    #[test]
    fn the_first_of_several_types_counts() {
        let (html, events) = (("content-type", "text/html"), ("content-type", "text/event-stream"));
        assert!(!said(&[html, events]).events);
        assert!(said(&[events, html]).events);
    }

    #[test]
    fn each_field_that_wants_a_look_is_seen_whatever_is_beside_it() {
        for beside in [&[][..], &[("date", "now"), ("x-other", "a"), ("server", "b")][..]] {
            let of = |name| said(&[beside, &[(name, "a")]].concat());
            assert!(of("connection").connection);
            for hop in [
                "keep-alive",
                "proxy-connection",
                "transfer-encoding",
                "te",
                "upgrade",
                "proxy-authenticate",
            ] {
                assert!(of(hop).hop, "{hop}");
            }
            assert!(of("fly-replay").replays && of("fly-replay-cache").replays);
            assert!(of("litegate-write").addressed);
            assert_eq!(of("x-kept"), said(beside));
        }
    }
}
