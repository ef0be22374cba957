//! Every answer that litegate makes itself: one closed table.
//!
//! A [`Problem`] is the client's status and text, the `Proxy-Status` error (RFC 9209 section 2.3),
//! the log word and the metric label at once, so that the four can't drift apart.

use http::StatusCode;

/// Why litegate answers instead of a node.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Problem {
    /// No route matches.
    NoRoute,
    /// The request target is longer than `limits.uri_bytes`.
    UriTooLong,
    /// The head is over `limits.header_bytes` or `limits.headers`.
    HeadTooLarge,
    /// The request is not proper HTTP, or its length is ambiguous.
    Malformed,
    /// The head took longer than `limits.header_read`.
    HeadTimeout,
    /// The body stopped coming for `limits.body_idle`.
    BodyTimeout,
    /// TRACE, and no route allows it; or CONNECT.
    MethodRefused,
    /// The request passed this very instance before.
    Loop,
    /// `Litegate-Route` or `fly-force-instance-id` names no member.
    UnknownNode,
    /// No primary within `hold.timeout`.
    NoPrimary,
    /// Two nodes claim to be primary.
    SplitBrain,
    /// `hold.max_requests` or `hold.max_bytes` are waiting already.
    HoldFull,
    /// No node can serve reads.
    NoReader,
    /// The node has no place left.
    NodeFull,
    /// The write waited for `max_writes_wait`.
    WritesFull,
    /// No connection to any node that might have answered.
    ConnectFailed,
    /// The node closed the connection after it got this read, and no retry was left.
    NodeClosed,
    /// The node failed after it got this write: it may have run.
    MaybeExecuted,
    /// No response head in time; a write may have run.
    ResponseTimeout,
    /// The node sent something that is not HTTP.
    BadResponse,
    /// The nodes kept sending this request to each other.
    TooManyHops,
    /// A `fly-replay` answer that can't be understood.
    BadReplay,
    /// A `fly-replay` answer that names no member of the cluster.
    ReplayTarget,
    /// The body is longer than what was kept of it.
    ReplayBody,
    /// litegate is going away.
    Draining,
    /// A fault of litegate's own.
    Internal,
}

impl Problem {
    /// The status it is answered with.
    pub const fn status(self) -> StatusCode {
        StatusCode::BAD_GATEWAY
    }
}
