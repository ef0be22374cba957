//! `[limits]`: what a client may ask of us.

use std::time::Duration;

/// `[limits]`
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// `body_idle`: no byte of a request body came, or none of a response was taken.
    pub body_idle: Duration,
    /// `connections`: clients connected at once, shared out evenly among the workers. Over it:
    /// the connection waits in the kernel's backlog.
    pub connections: usize,
    /// `replay_bytes`: replay buffers of all requests together. Over it: a body is streamed
    /// without being kept, and a replay of it is impossible.
    pub replay_bytes: usize,
    /// `streams`: HTTP/2 requests at once on one connection. A client that knows better is refused
    /// the rest.
    pub streams: usize,
    /// `resets`: HTTP/2 requests that a client takes back, in a second on one connection. Over it:
    /// closed.
    pub resets: usize,
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
