//! HTTP/2 (RFC 9113) as a client that asks for one thing again and again: frames are cut, and heads
//! are looked at no further than their status, which every encoder puts first.

use crate::message::Fault;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;

const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The window of a connection before anybody widens it.
const INITIAL: u32 = 65_535;
const WIDEST: u32 = (1 << 31) - 1;
/// Wide enough for every answer here.
const STREAM: u32 = 1 << 20;
/// `:status: 200` in the static table of HPACK (RFC 7541 appendix A).
const OK: u8 = 0x88;

/// One connection.
#[derive(Debug)]
pub(super) struct H2 {
    request: Head,
    /// Of the expected answers.
    download: usize,
    /// Of the request: one that has a body is the only one of its connection.
    upload: usize,
    /// Whether windows are as narrow as they begin, until somebody widens them.
    is_slow: bool,
    next: u32,
    /// Bytes that came on each stream under way.
    open: Vec<(u32, usize)>,
    partial: Vec<u8>,
    /// Bytes that came since the connection's window was last widened.
    consumed: u32,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) path: &'static str,
    pub(super) host: &'static str,
    pub(super) is_tls: bool,
}

impl H2 {
    pub(super) fn new(request: Head, upload: usize, download: usize, is_slow: bool) -> Self {
        Self {
            request,
            download,
            upload,
            is_slow,
            next: 1,
            open: Vec::new(),
            partial: Vec::new(),
            consumed: 0,
        }
    }

    /// What a connection begins with.
    pub(super) fn open(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(PREFACE);
        let mut settings = vec![0, 2, 0, 0, 0, 0]; // ENABLE_PUSH
        if !self.is_slow {
            settings.extend_from_slice(&[0, 4]); // INITIAL_WINDOW_SIZE
            settings.extend_from_slice(&STREAM.to_be_bytes());
        }
        frame(out, SETTINGS, 0, 0, &settings);
        if !self.is_slow {
            frame(out, WINDOW_UPDATE, 0, 0, &(WIDEST - INITIAL).to_be_bytes());
        }
    }

    /// One more request. As clients do, the first on a connection leaves its fields in the table of
    /// HPACK, and all others refer to them.
    pub(super) fn ask(&mut self, out: &mut Vec<u8>) {
        let is_first = self.next == 1;
        let stream = self.next;
        self.next += 2;
        self.open.push((stream, 0));
        let mut head = vec![
            if self.upload > 0 { 0x83 } else { 0x82 },
            if self.request.is_tls { 0x87 } else { 0x86 },
        ];
        if is_first {
            let fields = [
                (4, self.request.path),
                (1, self.request.host),
                (58, "litegate-load"),
                (19, "*/*"),
                (16, "gzip"),
            ];
            for (name, value) in fields {
                // Literal with incremental indexing; all of these values are shorter than 127.
                head.push(0x40 | name);
                head.push(u8::try_from(value.len()).unwrap_or(0));
                head.extend_from_slice(value.as_bytes());
            }
            if self.upload > 0 {
                let length = self.upload.to_string();
                head.push(0x5c); // content-length
                head.push(u8::try_from(length.len()).unwrap_or(0));
                head.extend_from_slice(length.as_bytes());
            }
        } else {
            // The latest has index 62.
            head.extend_from_slice(&[0xc2, 0xc1, 0xc0, 0xbf, 0xbe]);
        }
        let end = if self.upload > 0 { 0 } else { END_STREAM };
        frame(out, HEADERS, END_HEADERS | end, stream, &head);
    }

    /// Some more of the body of the first request.
    pub(super) fn send(out: &mut Vec<u8>, body: &[u8]) {
        frame(out, DATA, 0, 1, body);
    }

    /// Widens the windows of the connection and of its first stream.
    pub(super) fn widen(out: &mut Vec<u8>, by: u32) {
        for stream in [0, 1] {
            frame(out, WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
        }
    }

    /// Reads what has arrived, and returns how many answers ended.
    pub(super) fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<usize, Fault> {
        let mut kept = std::mem::take(&mut self.partial);
        let mut rest = if kept.is_empty() {
            bytes
        } else {
            kept.extend_from_slice(bytes);
            &kept
        };
        let mut ended = 0;
        while let Some((&[a, b, c, kind, flags, s, t, u, v], after)) = rest.split_first_chunk() {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            let Some((payload, next)) = after.split_at_checked(length) else { break };
            let stream = u32::from_be_bytes([s, t, u, v]) & WIDEST;
            ended += usize::from(self.take(kind, flags, stream, payload, out)?);
            rest = next;
        }
        self.partial = rest.to_vec();
        Ok(ended)
    }

    /// Takes one frame; returns whether it ended an answer.
    fn take(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<bool, Fault> {
        match kind {
            DATA => {
                let padding = if flags & PADDED == 0 {
                    0
                } else {
                    payload.first().map_or(0, |padding| usize::from(*padding) + 1)
                };
                let body = payload.len().saturating_sub(padding);
                self.consumed += u32::try_from(payload.len()).unwrap_or(u32::MAX);
                if !self.is_slow && self.consumed > WIDEST / 2 {
                    frame(out, WINDOW_UPDATE, 0, 0, &self.consumed.to_be_bytes());
                    self.consumed = 0;
                }
                let place = self.open.iter_mut().find(|(open, _)| *open == stream);
                place.ok_or(Fault::Refused)?.1 += body;
            }
            HEADERS => {
                let mut skip = usize::from(flags & PADDED != 0);
                skip += if flags & PRIORITY == 0 { 0 } else { 5 };
                let block = payload.get(skip..).unwrap_or_default();
                if status(block) != Some(OK) || flags & END_HEADERS == 0 {
                    return Err(Fault::Refused);
                }
            }
            SETTINGS if flags & ACK == 0 => {
                frame(out, SETTINGS, ACK, 0, &[]);
                return Ok(false);
            }
            PING if flags & ACK == 0 => {
                frame(out, PING, ACK, 0, payload);
                return Ok(false);
            }
            SETTINGS | PING | WINDOW_UPDATE => return Ok(false),
            // RST_STREAM, GOAWAY, and what nobody sends here.
            _ => return Err(Fault::Refused),
        }
        if flags & END_STREAM == 0 {
            return Ok(false);
        }
        let place = self.open.iter().position(|(open, _)| *open == stream);
        let (_, body) = self.open.swap_remove(place.ok_or(Fault::Refused)?);
        if body == self.download { Ok(true) } else { Err(Fault::Refused) }
    }
}

/// The first field of a block of HPACK (RFC 7541 section 6), behind changes of the table's size.
fn status(block: &[u8]) -> Option<u8> {
    let mut bytes = block.iter().copied();
    loop {
        let first = bytes.next()?;
        if first & 0xe0 != 0x20 {
            return Some(first);
        }
        if first & 0x1f == 0x1f {
            // A number of several bytes (section 5.1).
            bytes.find(|byte| byte & 0x80 == 0)?;
        }
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    out.extend_from_slice(&[length[1], length[2], length[3], kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Head = Head { path: "/3", host: "a", is_tls: false };

    fn answer(stream: u32) -> Vec<u8> {
        let mut out = Vec::new();
        frame(&mut out, HEADERS, END_HEADERS, stream, &[0x3f, 0xe1, 0x1f, OK]);
        frame(&mut out, DATA, 0, stream, b"ab");
        frame(&mut out, DATA, END_STREAM, stream, b"c");
        out
    }

    #[test]
    fn answers_end_where_they_end_in_whatever_pieces_they_come() {
        let mut bytes = Vec::new();
        frame(&mut bytes, SETTINGS, 0, 0, &[]);
        bytes.extend(answer(1));
        frame(&mut bytes, PING, 0, 0, &[7; 8]);
        bytes.extend(answer(3));
        for size in 1..=bytes.len() {
            let mut h2 = H2::new(HEAD, 0, 3, false);
            let mut out = Vec::new();
            h2.ask(&mut out);
            h2.ask(&mut out);
            out.clear();
            let mut ended = 0;
            for piece in bytes.chunks(size) {
                ended += h2.feed(piece, &mut out).unwrap();
            }
            assert_eq!(ended, 2, "pieces of {size}");
            let mut replies = Vec::new();
            frame(&mut replies, SETTINGS, ACK, 0, &[]);
            frame(&mut replies, PING, ACK, 0, &[7; 8]);
            assert_eq!(out, replies);
        }
    }

    #[test]
    fn another_status_another_length_and_a_reset_are_refused() {
        let mut wrong = Vec::new();
        frame(&mut wrong, HEADERS, END_HEADERS | END_STREAM, 1, &[0x8d]);
        let mut short = Vec::new();
        frame(&mut short, HEADERS, END_HEADERS | END_STREAM, 1, &[OK]);
        let mut reset = Vec::new();
        frame(&mut reset, 3, 0, 1, &[0; 4]);
        for bytes in [wrong, short, reset] {
            let mut h2 = H2::new(HEAD, 0, 3, false);
            h2.ask(&mut Vec::new());
            assert_eq!(h2.feed(&bytes, &mut Vec::new()), Err(Fault::Refused));
        }
    }
}
