//! Watches how the lines of a node's response head end.
//!
//! hyper takes a bare LF for the end of a line (RFC 9112 section 2.2 lets it). An app that puts
//! what a client sent into a field, line breaks and all, would so have its client write fields of
//! the answer: response splitting. A node that ends all of its lines so means nothing by it; one
//! that ends some so did not write them itself.

use std::cell::Cell;

/// Where the status code begins in `HTTP/1.1 200`.
const STATUS: usize = 9;

/// Looks at the bytes of one answer at a time.
#[derive(Debug, Default)]
pub(super) struct Lines(Cell<State>);

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// In a head.
    looking: bool,
    /// Behind the status line.
    begun: bool,
    /// How the status line ended.
    crlf: bool,
    code: [u8; 3],
    /// Of the line so far.
    length: usize,
    last: u8,
}

impl State {
    fn grow(&mut self, bytes: &[u8]) {
        if !self.begun && self.length < STATUS + self.code.len() {
            for (place, digit) in self.code.iter_mut().enumerate() {
                let at = (STATUS + place).checked_sub(self.length);
                if let Some(byte) = at.and_then(|at| bytes.get(at)) {
                    *digit = *byte;
                }
            }
        }
        self.length = self.length.saturating_add(bytes.len());
        self.last = bytes.last().copied().unwrap_or(self.last);
    }

    /// A line has ended. Whether it did like the first.
    fn ended(&mut self) -> bool {
        let crlf = self.length > 0 && self.last == b'\r';
        let is_empty = self.length == usize::from(crlf);
        (self.length, self.last) = (0, 0);
        if !self.begun {
            // hyper passes over an empty line before a status line, which no answer has (RFC 9112
            // section 2.1). Whoever follows the bytes beside it loses its place there.
            self.begun = true;
            self.crlf = crlf;
            return !is_empty;
        }
        if is_empty {
            self.begun = false;
            // Another head follows an interim one, unless it was the last one of HTTP.
            self.looking = matches!(self.code, [b'1', _, _]) && self.code != *b"101";
        }
        crlf == self.crlf
    }
}

impl Lines {
    /// A new answer is awaited.
    pub(super) fn begin(&self) {
        self.0.set(State { looking: true, ..State::default() });
    }

    /// These bytes came. Whether all lines of the head ended in one way.
    pub(super) fn see(&self, new: &[u8]) -> bool {
        let mut state = self.0.get();
        let mut rest = new;
        let mut is_right = true;
        while state.looking && is_right {
            let Some(end) = memchr::memchr(b'\n', rest) else {
                state.grow(rest);
                break;
            };
            let (line, after) = rest.split_at(end);
            state.grow(line);
            is_right = state.ended();
            rest = after.get(1..).unwrap_or_default();
        }
        self.0.set(state);
        is_right
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn see(pieces: &[&[u8]]) -> bool {
        let lines = Lines::default();
        lines.begin();
        pieces.iter().all(|piece| lines.see(piece))
    }

    #[test]
    fn a_head_ends_its_lines_in_one_way() {
        for (head, right) in [
            ("HTTP/1.1 200 OK\r\na: b\r\n\r\n\nbody\r\n", true),
            ("HTTP/1.1 200 OK\na: b\n\nbody\r\n", true),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n\n", false),
            ("HTTP/1.1 103 Early Hints\r\n\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\na: b\nc: d\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\na: b\r\n\n", false),
            ("HTTP/1.1 200 OK\na: b\r\n\n", false),
            ("HTTP/1.1 103 Early Hints\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\na: b\n\r\n", false),
            ("HTTP/1.1 101 Switching Protocols\r\na: b\r\n\r\nx\r\ny\nz\r\n", true),
        ] {
            assert_eq!(see(&[head.as_bytes()]), right, "{head:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_are_no_matter(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "HTTP/1.1 200 OK", "HTTP/1.1 103 x", "HTTP/1.1 101 x", "a: b", "\r\n", "\n", "\r",
            ]), 0..16),
            cut in 0_usize..60,
        ) {
            let whole = parts.concat();
            let (first, second) = whole.as_bytes().split_at(cut.min(whole.len()));
            prop_assert_eq!(see(&[whole.as_bytes()]), see(&[first, second]));
        }
    }
}
