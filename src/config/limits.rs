//! `[limits]`: what a client may ask of us.

use std::{net::IpAddr, num::NonZeroU32, time::Duration};

use ipnet::IpNet;

/// `[limits]`
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// `header_bytes`: a request head, request line included. Over it: 431.
    pub header_bytes: usize,
    /// `headers`: fields in a head. Over it: 431.
    pub headers: usize,
    /// `uri_bytes`: the request target. Over it: 414.
    pub uri_bytes: usize,
    /// `header_read`: from a request's first byte to the end of its head. Over it: 408, closed.
    pub header_read: Duration,
    /// `idle`: a kept-alive connection without a request. Over it: closed.
    pub idle: Duration,
    /// `requests_per_connection`: the last of them says that the connection closes. Zero: any
    /// number.
    pub requests_per_connection: usize,
    /// `body_idle`: no byte of a request body came, or none of a response was taken.
    pub body_idle: Duration,
    /// `body_rate`: bytes a second of a request body whose length is known. Zero: any. Under it, once
    /// the patience of `body_idle` is used up: 408, closed.
    pub body_rate: usize,
    /// `connections`: clients connected at once, shared out evenly among the workers. Over it:
    /// the connection waits in the kernel's backlog.
    pub connections: usize,
    /// `replay_bytes`: replay buffers of all requests together. Over it: a body is streamed
    /// without being kept, and a replay of it is impossible.
    pub replay_bytes: usize,
    /// `streams`: HTTP/2 requests at once on one connection. A client that knows better is refused
    /// the rest.
    pub streams: usize,
    /// `resets`: HTTP/2 requests that a client takes back, or makes us take back, in a second on
    /// one connection. Over it: closed.
    pub resets: usize,
    /// `frames`: HTTP/2 frames that ask for nothing, in a second on one connection, and as many
    /// more as there are useful ones. Over it: closed.
    pub frames: usize,
    /// `tls_handshake`: from its first byte to its end, the wait for a turn included. Over it:
    /// closed.
    pub tls_handshake: Duration,
    /// `tls_handshakes`: handshakes at once, shared out evenly among the workers. Over it they wait
    /// their turn.
    pub tls_handshakes: usize,
    /// `underscores`: request fields whose names have one.
    pub underscores: Underscores,
    /// `ambiguous_paths`: paths that a node may take for others.
    pub ambiguous_paths: AmbiguousPaths,
    /// `[limits.client]`
    pub client: PerClient,
}

/// `underscores`: apps behind CGI, WSGI and the like can't tell `X_Forwarded_For` from
/// `X-Forwarded-For`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Underscores {
    /// They are dropped, and counted.
    #[default]
    Drop,
    /// 400.
    Refuse,
    /// They pass.
    Allow,
}

/// `ambiguous_paths`: with dot segments, empty segments, backslashes, or such things encoded.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum AmbiguousPaths {
    /// They pass as they are where every way to read them leads to the same route; else 400.
    #[default]
    SameRoute,
    /// 400.
    Refuse,
    /// They pass, and routes are matched on what is written.
    Allow,
}

/// `[limits.client]`: what one client may, by its address, on all listeners and workers together.
#[derive(Clone, Debug, PartialEq)]
pub struct PerClient {
    /// `requests` and `requests_burst`. Over it: 429.
    pub requests: Option<Rate>,
    /// `connects` and `connects_burst`: new connections. Over it: closed before TLS.
    pub connects: Option<Rate>,
    /// `connections`: at once. Over it: closed before TLS. Zero: any number.
    pub connections: usize,
    /// `ipv6_prefix`: so many leading bits of an IPv6 address are one client.
    pub ipv6_prefix: u8,
    /// `clients`: remembered for the rates. Beyond it the one with the least debt is forgotten.
    pub clients: usize,
    /// `exempt`: clients that are not counted.
    pub exempt: Vec<IpNet>,
}

/// So many a second.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    /// On average.
    pub per_second: NonZeroU32,
    /// At once, after a while of nothing.
    pub burst: NonZeroU32,
}

impl PerClient {
    /// Whether there is anything to count.
    pub fn is_on(&self) -> bool {
        self.requests.is_some() || self.connects.is_some() || self.connections > 0
    }

    /// Whether this client is not counted.
    pub fn exempts(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        self.exempt.iter().any(|net| net.contains(&client))
    }
}

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident = $word:literal;)*) => {
        /// A limit that can be reached, as it is counted: by its key.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Limit { $($(#[$doc])* $name,)* }

        impl Limit {
            /// All of them, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its key below `[limits]`; `listener.` is `[[listener]]`'s.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $word,)* } }
        }
    };
}

limits! {
    /// A head was too long.
    HeaderBytes = "header_bytes";
    /// A head had too many fields.
    Headers = "headers";
    /// A request target was too long.
    UriBytes = "uri_bytes";
    /// A head took too long.
    HeaderRead = "header_read";
    /// A connection was without a request for too long.
    Idle = "idle";
    /// A connection carried as many requests as it may.
    RequestsPerConnection = "requests_per_connection";
    /// A body stopped coming, or an answer being taken.
    BodyIdle = "body_idle";
    /// A body came too slowly.
    BodyRate = "body_rate";
    /// A worker stopped accepting until one of its connections ends.
    Connections = "connections";
    /// The same, at one listener.
    ListenerConnections = "listener.connections";
    /// A body was no longer kept.
    ReplayBytes = "replay_bytes";
    /// A stream was refused.
    Streams = "streams";
    /// A connection was closed for what was taken back on it.
    Resets = "resets";
    /// A connection was closed for frames that ask for nothing.
    Frames = "frames";
    /// A handshake took too long.
    TlsHandshake = "tls_handshake";
    /// A handshake had to wait.
    TlsHandshakes = "tls_handshakes";
    /// A request was refused.
    ClientRequests = "client.requests";
    /// A connection was refused: too many in this second.
    ClientConnects = "client.connects";
    /// A connection was refused: too many at once.
    ClientConnections = "client.connections";
    /// A client was forgotten that had asked for something lately.
    ClientClients = "client.clients";
}

impl Limit {
    /// Its place in [`Limit::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::schema::schema;

    /// Every key of `[limits]`, with those of `[limits.client]` behind a dot.
    fn keys() -> BTreeSet<String> {
        let schema = schema();
        let of = |limits: &serde_json::Value, before: &str| {
            let properties = limits["properties"].as_object().expect("a table").keys();
            properties.map(|key| format!("{before}{key}")).collect::<BTreeSet<_>>()
        };
        let limits = &schema["properties"]["limits"];
        let mut keys = of(limits, "");
        assert!(keys.remove("client"));
        keys.extend(of(&limits["properties"]["client"], "client."));
        keys
    }

    #[test]
    fn each_limit_is_counted_by_its_key() {
        let keys = keys();
        for limit in Limit::ALL {
            let word = limit.as_str();
            assert!(keys.contains(word) || word == "listener.connections", "{word}");
        }
    }

    /// `docs/limits.md` has a row for each key, with the metric that counts it if one does.
    #[test]
    fn the_page_of_limits_has_every_key() {
        let page = include_str!("../../docs/limits.md");
        let rows: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).collect();
        let listener = ["listener.connections".to_owned()];
        for key in keys().iter().chain(&listener) {
            let row = rows.iter().find(|row| row.starts_with(&format!("| `{key}`")));
            let row = row.unwrap_or_else(|| panic!("docs/limits.md has no row for `{key}`"));
            let counted = Limit::ALL.iter().any(|limit| limit.as_str() == key);
            let told = row.contains(&format!("`limit=\"{key}\"`"));
            assert_eq!(told, counted, "how `{key}` is counted: {row}");
        }
    }

    /// The tests that the page names exist.
    #[test]
    fn the_page_of_limits_names_tests_that_exist() {
        let page = include_str!("../../docs/limits.md");
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut sources = String::new();
        let mut folders = vec![root.join("src"), root.join("tests/integration")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    sources += &std::fs::read_to_string(path).unwrap();
                }
            }
        }
        let rows = page.lines().filter(|line| line.starts_with("| ") && !line.contains("---"));
        let mut named = 0;
        for row in rows.filter(|row| row.matches('|').count() == 6) {
            let cell = row.rsplit('|').nth(1).unwrap_or_default();
            for name in cell.split('`').skip(1).step_by(2) {
                assert!(sources.contains(&format!("fn {name}(")), "no such test: {name}");
                named += 1;
            }
        }
        assert!(named >= Limit::ALL.len(), "{named} tests are named");
    }
}
