//! Every answer that litegate makes itself: one closed table.
//!
//! A [`Problem`] is the client's status and text, the `Proxy-Status` error (RFC 9209 section 2.3),
//! the log word and the metric label at once, so that the four can't drift apart.

use http::StatusCode;

/// Whose fault it is, as far as litegate can tell.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The request.
    Client,
    /// litegate, or how it is configured.
    Litegate,
    /// The app or its cluster.
    App,
}

impl Fault {
    /// The word in problem+json.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Litegate => "litegate",
            Self::App => "app",
        }
    }

    /// For a person.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::Client => "the request is at fault",
            Self::Litegate => "the proxy in front of the app is at fault",
            Self::App => "the app behind the proxy is at fault",
        }
    }
}

macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident = $status:literal, $flag:literal, $word:literal, $proxy:literal, $fault:ident,
        $title:literal, $detail:literal;)*) => {
        /// Why litegate answers instead of a node.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum Problem { $($(#[$doc])* $name,)* }

        impl Problem {
            /// All of them, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The number of the status it is answered with.
            const fn code(self) -> u16 { match self { $(Self::$name => $status,)* } }

            /// The two letters for access logs, after HAProxy's and Envoy's custom.
            pub const fn flag(self) -> &'static str { match self { $(Self::$name => $flag,)* } }

            /// The word in logs, metrics and problem+json.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $word,)* } }

            /// The `error` of `Proxy-Status`.
            pub const fn proxy_status(self) -> &'static str { match self { $(Self::$name => $proxy,)* } }

            /// Whose fault it is.
            pub const fn fault(self) -> Fault { match self { $(Self::$name => Fault::$fault,)* } }

            /// What is wrong, in a few words.
            pub const fn title(self) -> &'static str { match self { $(Self::$name => $title,)* } }

            /// What it means for the client, and what it can do.
            pub const fn detail(self) -> &'static str { match self { $(Self::$name => $detail,)* } }
        }
    };
}

problems! {
    /// No route matches.
    NoRoute = 404, "NR", "no_route", "destination_not_found", Litegate,
        "No such site", "No route is configured for this host, path and method.";
    /// The request target is longer than `limits.uri_bytes`.
    UriTooLong = 414, "BR", "uri_too_long", "http_request_denied", Client,
        "URI too long", "The request target is longer than this server accepts.";
    /// The head is over `limits.header_bytes` or `limits.headers`.
    HeadTooLarge = 431, "HL", "head_too_large", "http_request_denied", Client,
        "Request head too large", "The request has more or longer header fields than this server accepts.";
    /// The request is not proper HTTP, or its length is ambiguous.
    Malformed = 400, "BR", "malformed", "http_request_error", Client,
        "Malformed request", "The request is not proper HTTP, or its length is ambiguous.";
    /// The body is in a transfer coding that litegate does not know.
    UnknownCoding = 501, "BR", "unknown_coding", "http_request_denied", Client,
        "Unknown transfer coding", "The request's body is in a transfer coding that is not known here: send it chunked, or with its length.";
    /// `Expect` says something other than `100-continue`.
    UnknownExpectation = 417, "BR", "unknown_expectation", "http_request_denied", Client,
        "Unknown expectation", "The request expects what is not known here.";
    /// A field's name has an underscore, and `limits.underscores` is `refuse`.
    UnderscoreField = 400, "BR", "underscore_field", "http_request_denied", Client,
        "Underscore in a field's name", "The request has a header field whose name has an underscore, which this server does not accept.";
    /// The path can be read as another one, and `limits.ambiguous_paths` does not allow that.
    AmbiguousPath = 400, "BR", "ambiguous_path", "http_request_denied", Client,
        "Ambiguous path", "The path could be taken for another one: write it without dot segments, empty segments, and encoded slashes.";
    /// The head took longer than `limits.header_read`.
    HeadTimeout = 408, "SL", "head_timeout", "http_request_error", Client,
        "Request timed out", "The request head did not arrive in time.";
    /// The body stopped coming for `limits.body_idle`.
    BodyTimeout = 408, "SL", "body_timeout", "http_request_error", Client,
        "Request timed out", "The request body stopped arriving.";
    /// The body came more slowly than `limits.body_rate`.
    BodySlow = 408, "SL", "body_slow", "http_request_error", Client,
        "Request too slow", "The request body arrived too slowly.";
    /// An HTTP/2 client sent more than it may of what asks for nothing, or took back too many
    /// requests (`limits.resets`). Its connection is closed without an answer.
    Flood = 429, "FL", "flood", "http_request_denied", Client,
        "Too many frames", "The connection carried a flood of frames that ask for nothing.";
    /// The client is over `limits.client.requests`.
    TooManyRequests = 429, "TM", "too_many_requests", "http_request_denied", Client,
        "Too many requests", "This client has sent more requests than it may. Nothing was done; try again shortly.";
    /// TRACE, and no route allows it; or CONNECT.
    MethodRefused = 405, "BR", "method_refused", "http_request_denied", Client,
        "Method not allowed", "This method is not served here.";
    /// The request passed this very instance before.
    Loop = 502, "RL", "loop", "proxy_loop_detected", Litegate,
        "Loop detected", "This request came back to the proxy that sent it: its nodes lead to itself.";
    /// `Litegate-Route` names no member.
    UnknownNode = 400, "BR", "unknown_node", "http_request_denied", Client,
        "Unknown node", "The request asks for a node that the cluster does not have.";
    /// `Litegate-Consistency` or `Litegate-Max-Staleness` says what nobody understands.
    BadDemand = 400, "BR", "bad_demand", "http_request_denied", Client,
        "Unknown demand", "The request asks for a consistency that does not exist: any, session or primary, and a staleness like 250ms.";
    /// No primary within `hold.timeout`.
    NoPrimary = 503, "NP", "no_primary", "destination_unavailable", App,
        "No primary", "The app has no node that takes writes at the moment. Nothing was written; try again shortly.";
    /// Two nodes claim to be primary.
    SplitBrain = 503, "SB", "split_brain", "destination_unavailable", App,
        "Two primaries", "Two nodes of the app claim to take writes, and neither is trusted until that is settled. Nothing was written.";
    /// `hold.max_requests` or `hold.max_bytes` are waiting already.
    HoldFull = 503, "HO", "hold_full", "connection_limit_reached", App,
        "Too many writes waiting", "The app has no node that takes writes at the moment, and too many writes wait for one already. Nothing was written; try again shortly.";
    /// No node can serve reads.
    NoReader = 503, "NH", "no_reader", "destination_unavailable", App,
        "No node available", "No node of the app can serve this request at the moment. Try again shortly.";
    /// No node has what the client wrote last, or is as fresh as it asks for.
    NotCaughtUp = 503, "TS", "not_caught_up", "destination_unavailable", App,
        "Not caught up", "No node of the app that can be reached has caught up with what this client has seen or asks for. Try again shortly.";
    /// The write is done, but not on as many replicas as `durability.replicas` wants.
    NotDurable = 504, "ND", "not_durable", "http_response_timeout", App,
        "Done, but not yet safe", "The app did this request, but too few of its copies have confirmed it in time. It may be lost if a node fails now; do not simply send it again.";
    /// The node has no place left.
    NodeFull = 503, "UO", "node_full", "connection_limit_reached", App,
        "Overloaded", "The app has more requests than it can take. Try again shortly.";
    /// The write waited for `max_writes_wait`.
    WritesFull = 503, "UO", "writes_full", "connection_limit_reached", App,
        "Too many writes", "More writes are under way than the app can take. Nothing was written; try again shortly.";
    /// No connection to any node that might have answered.
    ConnectFailed = 502, "UC", "connect_failed", "destination_ip_unroutable", App,
        "App unreachable", "No connection could be made to the app. The request did not run.";
    /// Whoever answered in a node's place could not show that it is the node.
    NodeCertificate = 502, "UC", "node_certificate", "tls_certificate_error", App,
        "App not trusted", "Whoever answers in the app's place could not prove to be the app. The request did not run.";
    /// No TLS with any node that might have answered.
    NodeTls = 502, "UC", "node_tls", "tls_protocol_error", App,
        "App unreachable", "No secure connection could be made to the app. The request did not run.";
    /// The node closed the connection after it got this read, and no retry was left.
    NodeClosed = 502, "UR", "node_closed", "connection_terminated", App,
        "App hung up", "The app closed the connection before it answered.";
    /// The node failed after it got this write: it may have run.
    MaybeExecuted = 502, "UR", "maybe_executed", "connection_terminated", App,
        "Outcome unknown", "The app failed after it got this request, which may or may not have run. It was not sent again: check before you repeat it.";
    /// No response head in time; a write may have run.
    ResponseTimeout = 504, "UT", "response_timeout", "http_response_timeout", App,
        "App too slow", "The app did not answer in time. The request may still be running, or have run.";
    /// The node sent something that is not HTTP.
    BadResponse = 502, "UP", "bad_response", "http_protocol_error", App,
        "Bad answer from the app", "The app's answer was not proper HTTP.";
    /// The nodes kept sending this request to each other.
    TooManyHops = 502, "RL", "too_many_hops", "proxy_loop_detected", App,
        "Sent round in circles", "The app's nodes kept sending this request to each other. It did not run.";
    /// A `fly-replay` answer that can't be understood.
    BadReplay = 502, "RF", "bad_replay", "http_protocol_error", App,
        "Bad replay", "The app asked for the request to be replayed elsewhere, in a way that can't be understood.";
    /// A `fly-replay` answer that names no member of the cluster.
    ReplayTarget = 502, "RF", "replay_target", "destination_not_found", App,
        "Replay to nowhere", "The app asked for the request to be replayed on a node that it does not have.";
    /// The body is longer than what was kept of it.
    ReplayBody = 502, "NB", "replay_body", "http_request_error", App,
        "Replay body exceeded", "The app asked for the request to be replayed elsewhere, but had already taken more of its body than is kept. Send it again.";
    /// litegate is going away.
    Draining = 503, "DR", "draining", "proxy_internal_response", Litegate,
        "Shutting down", "The proxy in front of the app is shutting down. Try again.";
    /// A fault of litegate's own.
    Internal = 500, "IE", "internal", "proxy_internal_error", Litegate,
        "Internal error", "The proxy in front of the app has a fault. The request may not have run.";
}

impl Problem {
    /// The status it is answered with.
    pub fn status(self) -> StatusCode {
        // Every number in the table is a valid status: a test looks at each.
        StatusCode::from_u16(self.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Its place in [`Problem::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// `Retry-After` in seconds. Every 503 has one, and who may ask once a second or more often may
    /// do so again within a second.
    pub const fn retry_after(self) -> Option<u32> {
        match self {
            Self::NoPrimary | Self::SplitBrain | Self::HoldFull => Some(5),
            Self::TooManyRequests
            | Self::NoReader
            | Self::NotCaughtUp
            | Self::NodeFull
            | Self::WritesFull
            | Self::Draining => Some(1),
            _ => None,
        }
    }

    /// Whether the client's connection must end with it: what follows on it can't be trusted, or
    /// nobody will read it.
    pub const fn closes(self) -> bool {
        matches!(
            self,
            Self::Malformed
                | Self::MethodRefused
                | Self::UnknownCoding
                | Self::UnknownExpectation
                | Self::HeadTooLarge
                | Self::UriTooLong
                | Self::HeadTimeout
                | Self::BodyTimeout
                | Self::BodySlow
                | Self::Draining
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_the_one_in_the_table() {
        for problem in Problem::ALL {
            assert_eq!(problem.status().as_u16(), problem.code(), "{problem:?}");
        }
    }

    #[test]
    fn every_503_says_when_to_come_back() {
        for problem in Problem::ALL {
            let is_503 = problem.status() == StatusCode::SERVICE_UNAVAILABLE;
            let says = is_503 || *problem == Problem::TooManyRequests;
            assert_eq!(problem.retry_after().is_some(), says, "{problem:?}");
        }
    }

    #[test]
    fn words_are_unique_and_indices_are_places() {
        for (index, problem) in Problem::ALL.iter().enumerate() {
            assert_eq!(problem.index(), index);
            let same = Problem::ALL.iter().filter(|other| other.as_str() == problem.as_str());
            assert_eq!(same.count(), 1, "{problem:?}");
        }
    }

    #[test]
    fn texts_need_no_escaping_in_html() {
        for problem in Problem::ALL {
            let texts = [problem.title(), problem.detail(), problem.as_str()];
            assert!(texts.iter().all(|text| !text.contains(['<', '>', '&', '"'])), "{problem:?}");
        }
    }

    /// `docs/problems.md` is this table. `LITEGATE_BLESS=1` rewrites it.
    #[test]
    fn the_operators_page_is_this_table() {
        let mut page = String::from(
            "# Answers that litegate makes itself\n\nThe word is the `error` of the \
             problem+json body, the access log's `problem` and the metric's label.\n\n\
             | word | flag | status | Proxy-Status | fault | meaning |\n\
             |---|---|---|---|---|---|\n",
        );
        for problem in Problem::ALL {
            use std::fmt::Write as _;
            writeln!(
                page,
                "| `{}` | {} | {} | `{}` | {} | {}: {} |",
                problem.as_str(),
                problem.flag(),
                problem.code(),
                problem.proxy_status(),
                problem.fault().as_str(),
                problem.title(),
                problem.detail(),
            )
            .unwrap();
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/problems.md");
        if std::env::var_os("LITEGATE_BLESS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), page);
    }
}
