//! Finds interim responses (1xx) in what a node sends.
//!
//! hyper's client reads past them; its callback for them would cost three allocations for each
//! request, and nearly no answer has any. Looking at the tenth byte of an answer costs nothing:
//! only where it is a `1` are the bytes copied until the end of that head.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
};

use bytes::Bytes;

/// The largest interim head that is passed on; a longer one ends the search.
const HEAD: usize = 16 << 10;
/// Interim responses that may wait to be passed on; more are dropped.
const WAITING: usize = 8;
/// Fields in an interim head; one with more is not passed on.
const FIELDS: usize = 64;
/// Where the status code begins in `HTTP/1.1 103`.
const STATUS: usize = 9;

/// Looks at the bytes of one answer at a time.
#[derive(Debug, Default)]
pub(super) struct Sniffer {
    /// The final head has not begun yet, as far as was seen.
    looking: Cell<bool>,
    partial: RefCell<Vec<u8>>,
    found: RefCell<VecDeque<Bytes>>,
    any: Cell<bool>,
    continued: Cell<bool>,
}

impl Sniffer {
    /// A new answer is awaited.
    pub(super) fn begin(&self) {
        self.looking.set(true);
        self.continued.set(false);
        if self.any.take() {
            self.found.borrow_mut().clear();
        }
    }

    pub(super) fn continued(&self) -> bool {
        self.continued.get()
    }

    pub(super) fn continue_anyway(&self) {
        self.continued.set(true);
    }

    /// The next interim head, as the client gets it.
    pub(super) fn next(&self) -> Option<Bytes> {
        if !self.any.get() {
            return None;
        }
        let mut found = self.found.borrow_mut();
        let next = found.pop_front();
        self.any.set(!found.is_empty());
        next
    }

    /// These bytes came.
    pub(super) fn see(&self, new: &[u8]) {
        if !self.looking.get() {
            return;
        }
        let mut partial = self.partial.borrow_mut();
        if partial.is_empty() && new.get(STATUS).is_some_and(|digit| *digit != b'1') {
            self.looking.set(false);
            return;
        }
        partial.extend_from_slice(new);
        while let Some(digit) = partial.get(STATUS) {
            let end = if *digit == b'1' { memchr_end(&partial) } else { None };
            match end {
                Some(end) if self.take(partial.get(..end).unwrap_or_default()) => {
                    partial.drain(..end);
                }
                None if *digit == b'1' && partial.len() < HEAD => return,
                _ => {
                    self.looking.set(false);
                    partial.clear();
                }
            }
        }
    }

    /// One whole interim head. Whether another head follows it.
    fn take(&self, head: &[u8]) -> bool {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS];
        let mut parsed = httparse::Response::new(&mut fields);
        if !matches!(parsed.parse(head), Ok(httparse::Status::Complete(_))) {
            return false;
        }
        match parsed.code {
            Some(100) => self.continued.set(true),
            // The last head of the exchange: the connection becomes another protocol.
            Some(101) => return false,
            Some(code) if (100..200).contains(&code) => {
                let mut found = self.found.borrow_mut();
                if found.len() < WAITING {
                    found.push_back(render(code, parsed.reason.unwrap_or(""), parsed.headers));
                    self.any.set(true);
                }
            }
            // A final head, whatever stands where its code is looked for.
            Some(_) | None => return false,
        }
        true
    }
}

/// The end of the first head.
fn memchr_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// The head as the client gets it: fields of the hop between node and litegate stay here.
fn render(code: u16, reason: &str, fields: &[httparse::Header<'_>]) -> Bytes {
    let mut head = format!("HTTP/1.1 {code} {reason}\r\n").into_bytes();
    let named = |name: &str| {
        let connection =
            fields.iter().filter(|field| field.name.eq_ignore_ascii_case("connection"));
        let mut options = connection.flat_map(|field| field.value.split(|byte| *byte == b','));
        options.any(|option| option.trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
    };
    for field in fields {
        let name = field.name.to_ascii_lowercase();
        let of_this_hop = matches!(
            &*name,
            "connection"
                | "keep-alive"
                | "proxy-connection"
                | "te"
                | "transfer-encoding"
                | "upgrade"
                | "content-length"
        );
        if of_this_hop
            || named(&name)
            || name.starts_with("fly-replay")
            || name.starts_with("litegate-")
        {
            continue;
        }
        head.extend_from_slice(name.as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(field.value);
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINAL: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

    fn sniff(pieces: &[&[u8]]) -> Sniffer {
        let sniffer = Sniffer::default();
        sniffer.begin();
        for piece in pieces {
            sniffer.see(piece);
        }
        sniffer
    }

    #[test]
    fn a_final_head_is_not_copied() {
        let sniffer = sniff(&[FINAL]);
        assert!(!sniffer.looking.get());
        assert_eq!(sniffer.partial.borrow().capacity(), 0);
    }

    #[test]
    fn hints_are_found_before_the_final_head_in_one_read() {
        let mut bytes =
            b"HTTP/1.1 103 Early Hints\r\nX: 1\r\nLink: </a>\r\nConnection: y, x\r\n\r\n".to_vec();
        bytes.extend_from_slice(FINAL);
        let sniffer = sniff(&[&bytes]);
        assert_eq!(
            sniffer.next().as_deref(),
            Some(&b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"[..])
        );
        assert!(sniffer.next().is_none());
        assert!(!sniffer.looking.get());
    }

    #[test]
    fn hints_may_come_byte_by_byte() {
        let bytes = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\na: b\r\n\r\n";
        let pieces: Vec<&[u8]> = bytes.chunks(1).chain([FINAL]).collect();
        let sniffer = sniff(&pieces);
        assert!(sniffer.continued());
        assert!(sniffer.next().is_some_and(|head| head.ends_with(b"a: b\r\n\r\n")));
        assert!(!sniffer.looking.get());
    }

    #[test]
    fn a_switch_of_protocols_ends_the_search() {
        let sniffer =
            sniff(&[b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", b"HTTP/1.1 1"]);
        assert!(!sniffer.looking.get());
        assert!(sniffer.partial.borrow().is_empty());
    }

    #[test]
    fn an_endless_interim_head_is_not_kept() {
        let sniffer = sniff(&[b"HTTP/1.1 103 Early Hints\r\na: ", &vec![b'x'; HEAD]]);
        assert!(!sniffer.looking.get());
        assert!(sniffer.partial.borrow().is_empty());
    }
}
