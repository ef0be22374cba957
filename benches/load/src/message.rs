//! Cuts a byte stream into HTTP/1.1 messages: as little parsing as a load generator can get away
//! with. Every message is a head and a body of `Content-Length` bytes, on both sides of the bench;
//! anything else is an error.

use memchr::{memchr_iter, memmem};

/// Reads messages off a stream whose bytes come in any pieces.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// The head's bytes so far, if it came in pieces.
    partial: Vec<u8>,
    /// How much of the current message's body is still to come.
    left: usize,
}

/// Why a stream can't be read on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The head has no end within [`LONGEST_HEAD`].
    EndlessHead,
    /// Not what was asked for.
    Refused,
}

/// More than any proxy of the bench makes of the requests here.
const LONGEST_HEAD: usize = 16 * 1024;

impl Reader {
    /// Reads what has just arrived, calls `head` with each complete head and its body's length,
    /// and returns how many messages ended.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut head: impl FnMut(&[u8], usize) -> Result<(), Fault>,
    ) -> Result<usize, Fault> {
        let mut ended = 0;
        while !bytes.is_empty() {
            if self.left > 0 {
                let taken = self.left.min(bytes.len());
                self.left -= taken;
                bytes = bytes.get(taken..).unwrap_or_default();
                ended += usize::from(self.left == 0);
                continue;
            }
            let rest = if self.partial.is_empty() {
                // The usual case: the head is in one piece, and nothing is copied.
                let Some(end) = memmem::find(bytes, END) else {
                    self.keep(bytes)?;
                    break;
                };
                let (first, rest) = bytes.split_at(end + END.len());
                self.left = content_length(first);
                head(first, self.left)?;
                rest
            } else {
                let known = self.partial.len();
                self.keep(bytes)?;
                let Some(end) = memmem::find(&self.partial, END) else { break };
                let first = self.partial.get(..end + END.len()).unwrap_or_default();
                self.left = content_length(first);
                head(first, self.left)?;
                // The end was not in what was kept before, so at least a byte of it is new.
                let used = end + END.len() - known;
                self.partial.clear();
                bytes.get(used..).unwrap_or_default()
            };
            ended += usize::from(self.left == 0);
            bytes = rest;
        }
        Ok(ended)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > LONGEST_HEAD && memmem::find(&self.partial, END).is_none() {
            return Err(Fault::EndlessHead);
        }
        Ok(())
    }
}

const END: &[u8] = b"\r\n\r\n";

/// The value of `Content-Length`; 0 without one.
fn content_length(head: &[u8]) -> usize {
    // Most requests have no body, and need no search for its length.
    if head.starts_with(b"GET ") {
        return 0;
    }
    field(head, b"content-length").map_or(0, number)
}

/// The value of the first field of this lower-case name.
pub(crate) fn field<'h>(head: &'h [u8], name: &[u8]) -> Option<&'h [u8]> {
    memchr_iter(b'\n', head).find_map(|at| {
        let line = head.get(at + 1..)?;
        let (found, line) = line.split_at_checked(name.len())?;
        let value = line.strip_prefix(b":")?;
        if !found.eq_ignore_ascii_case(name) {
            return None;
        }
        let end = memchr::memchr(b'\r', value)?;
        Some(value.get(..end)?.trim_ascii())
    })
}

/// The decimal number that the text begins with.
pub(crate) fn number(text: &[u8]) -> usize {
    let digits = text.iter().map_while(|byte| byte.is_ascii_digit().then_some(byte - b'0'));
    digits.fold(0, |sum: usize, digit| sum.saturating_mul(10).saturating_add(digit.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &[u8] = b"POST /1 HTTP/1.1\r\nHost: a\r\ncontent-LENGTH: 5 \r\n\r\nhelloGET /2 HTTP/1.1\r\nHost: a\r\n\r\n";

    #[test]
    fn messages_end_where_they_end_in_whatever_pieces_they_come() {
        for size in 1..=TWO.len() {
            let mut reader = Reader::default();
            let mut heads = Vec::new();
            let mut ended = 0;
            for piece in TWO.chunks(size) {
                let head = |head: &[u8], body| {
                    heads.push((head.starts_with(b"POST"), body));
                    Ok(())
                };
                ended += reader.feed(piece, head).unwrap();
            }
            assert_eq!(heads, [(true, 5), (false, 0)], "pieces of {size}");
            assert_eq!(ended, 2, "pieces of {size}");
        }
    }

    #[test]
    fn a_refused_head_stops_the_stream() {
        let mut reader = Reader::default();
        assert_eq!(reader.feed(TWO, |_, _| Err(Fault::Refused)), Err(Fault::Refused));
    }

    #[test]
    fn a_head_without_an_end_is_an_error() {
        let mut reader = Reader::default();
        let mut fed = Ok(0);
        for _ in 0..=LONGEST_HEAD / 8 {
            fed = fed.and(reader.feed(b"x-a: bc\n", |_, _| Ok(())));
        }
        assert_eq!(fed, Err(Fault::EndlessHead));
    }

    #[test]
    fn fields_are_found_by_whole_name() {
        let head = b"HTTP/1.1 200 OK\r\nX-Via: no\r\nvia-x: no\r\nVia: yes\r\n\r\n";
        assert_eq!(field(head, b"via"), Some(&b"yes"[..]));
        assert_eq!(field(head, b"forwarded"), None);
    }
}
