//! What is said on a connection, and what has to come back.

use super::{
    h2::{H2, Head},
    tls::HOST,
};
use crate::{
    message::{Fault, Reader},
    upstream::{ENDLESS, GIBIBYTE},
    websocket::{self, Messages},
};

/// Bytes of a small answer, and of a WebSocket's message.
pub(super) const SMALL: usize = 128;
/// Bytes of an upload that does not end while it is looked at.
const UPLOAD: usize = GIBIBYTE;

/// What clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Http1,
    H2,
    WebSocket,
}

/// What they want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// An answer with a body of 128 bytes, or a message of as many back.
    Small,
    /// 64 KiB.
    Large,
    /// An answer of 1 GiB, as slowly as one reads.
    Endless,
    /// To send 1 GiB, as slowly as one does.
    Upload,
}

impl Want {
    /// Of the body of the answer.
    pub(super) fn download(self) -> usize {
        match self {
            Self::Small | Self::Upload => SMALL,
            Self::Large => 64 << 10,
            Self::Endless => GIBIBYTE,
        }
    }

    fn upload(self) -> usize {
        if self == Self::Upload { UPLOAD } else { 0 }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Small | Self::Upload => "/128",
            Self::Large => "/65536",
            Self::Endless => ENDLESS,
        }
    }
}

/// One connection's conversation.
pub(super) enum Talk {
    Http1 {
        reader: Reader,
        request: Vec<u8>,
        download: usize,
    },
    H2(H2),
    WebSocket {
        /// Until the upgrade is done.
        reader: Option<Reader>,
        messages: Messages,
        message: Vec<u8>,
        /// Asked before the upgrade was done.
        waiting: usize,
    },
}

impl Talk {
    pub(super) fn new(way: Way, want: Want, is_tls: bool) -> Self {
        match way {
            Way::Http1 => Self::Http1 {
                reader: Reader::default(),
                request: request(want),
                download: want.download(),
            },
            Way::H2 => {
                let head = Head { path: want.path(), host: HOST, is_tls };
                let is_slow = want == Want::Endless;
                Self::H2(H2::new(head, want.upload(), want.download(), is_slow))
            }
            Way::WebSocket => {
                let mut message = Vec::new();
                websocket::write(&mut message, Some(*b"mask"), &[b'x'; SMALL]);
                let (reader, messages) = (Some(Reader::default()), Messages::default());
                Self::WebSocket { reader, messages, message, waiting: 0 }
            }
        }
    }

    /// What the connection begins with.
    pub(super) fn open(&self, out: &mut Vec<u8>) {
        match self {
            Self::Http1 { .. } => {}
            Self::H2(h2) => h2.open(out),
            Self::WebSocket { .. } => {
                let head =
                    format!("GET /socket HTTP/1.1\r\nHost: {HOST}\r\n{}\r\n", websocket::UPGRADE);
                out.extend_from_slice(head.as_bytes());
            }
        }
    }

    /// One more request.
    pub(super) fn ask(&mut self, out: &mut Vec<u8>) {
        match self {
            Self::Http1 { request, .. } => out.extend_from_slice(request),
            Self::H2(h2) => h2.ask(out),
            Self::WebSocket { reader: Some(_), waiting, .. } => *waiting += 1,
            Self::WebSocket { message, .. } => out.extend_from_slice(message),
        }
    }

    /// Reads what has arrived, and returns how many requests were answered as they should be.
    pub(super) fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<usize, Fault> {
        match self {
            Self::Http1 { reader, download, .. } => reader.feed(bytes, |head, body| {
                let right = head.starts_with(b"HTTP/1.1 200 ") && body == *download;
                if right { Ok(()) } else { Err(Fault::Refused) }
            }),
            Self::H2(h2) => h2.feed(bytes, out),
            Self::WebSocket { reader: place @ Some(_), message, waiting, .. } => {
                let upgraded = |head: &[u8], _| {
                    let right = head.starts_with(b"HTTP/1.1 101 ");
                    if right { Ok(()) } else { Err(Fault::Refused) }
                };
                // Nothing comes behind the 101 before anything was asked.
                if place.as_mut().map_or(Ok(0), |reader| reader.feed(bytes, upgraded))? == 1 {
                    *place = None;
                    for _ in 0..std::mem::take(waiting) {
                        out.extend_from_slice(message);
                    }
                }
                Ok(0)
            }
            Self::WebSocket { messages, .. } => {
                let (mut answered, mut wrong) = (0, false);
                messages.feed(bytes, |payload| {
                    answered += 1;
                    wrong |= payload != [b'x'; SMALL];
                })?;
                if wrong { Err(Fault::Refused) } else { Ok(answered) }
            }
        }
    }
}

/// Of HTTP/1.1, without its body.
fn request(want: Want) -> Vec<u8> {
    let (method, length) = match want.upload() {
        0 => ("GET", String::new()),
        upload => ("POST", format!("Content-Length: {upload}\r\n")),
    };
    format!(
        "{method} {} HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: litegate-load\r\nAccept: */*\r\n\
         Accept-Encoding: gzip\r\n{length}\r\n",
        want.path()
    )
    .into_bytes()
}
