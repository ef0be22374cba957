//! Follows the heads of what a node answers, line by line, before hyper reads them.
//!
//! hyper takes a bare LF for the end of a line (RFC 9112 section 2.2 lets it). An app that puts
//! what a client sent into a field, line breaks and all, would so have its client write fields of
//! the answer: response splitting. A node that ends all of its lines so means nothing by it; one
//! that ends some so did not write them itself.
//!
//! hyper's client also reads past interim answers (1xx); its callback for them would cost three
//! allocations for each request, and nearly no answer has any. Here only the bytes of a head whose
//! status begins with a `1` are kept until its end, and passed on.
//!
//! There is one follower for both, and it stops at a status line that is none: whatever it lets
//! pass begins where hyper thinks that it does.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
};

use bytes::Bytes;

/// The largest interim head that is passed on; none is behind a larger one.
const HEAD: usize = 16 << 10;
/// Interim responses that may wait to be passed on; more are dropped.
const WAITING: usize = 8;
/// Fields in an interim head; none is passed on behind one with more.
const FIELDS: usize = 64;
/// `HTTP/1.1 200` and what ends the code.
const BEGIN: usize = 13;
/// Where the status code begins in it.
const STATUS: usize = 9;

/// Looks at the bytes of one answer at a time.
#[derive(Debug, Default)]
pub(super) struct Heads {
    state: Cell<State>,
    /// What came of a head that may be an interim one.
    kept: RefCell<Vec<u8>>,
    found: RefCell<VecDeque<Bytes>>,
    any: Cell<bool>,
    continued: Cell<bool>,
}

#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is true or not whatever the others are")]
struct State {
    /// The final head has not ended yet.
    looking: bool,
    /// Behind the status line.
    begun: bool,
    /// How the status line ended.
    crlf: bool,
    /// How the status line begins; zeros where it has not come to yet.
    begin: [u8; BEGIN],
    /// Of the line so far, up to its LF.
    length: usize,
    last: u8,
    /// An interim head was too large to be looked into: neither it nor another is passed on.
    gives_up: bool,
}

impl State {
    fn grow(&mut self, bytes: &[u8]) {
        if !self.begun
            && let Some(places) = self.begin.get_mut(self.length..)
        {
            places.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
        }
        self.length = self.length.saturating_add(bytes.len());
        self.last = bytes.last().copied().unwrap_or(self.last);
    }

    /// Whether it is an interim head, as far as can be said yet.
    fn may_be_interim(&self) -> bool {
        matches!(self.begin.get(STATUS), Some(b'1' | 0))
    }

    fn is_status_line(&self) -> bool {
        let [version @ .., minor, b' ', class, b'0'..=b'9', b'0'..=b'9', end] = &self.begin else {
            return false;
        };
        version == b"HTTP/1."
            && matches!(minor, b'0' | b'1')
            && matches!(class, b'1'..=b'9')
            && matches!(end, b' ' | b'\r' | 0)
    }

    /// A line has ended.
    fn ended(&mut self) -> Line {
        let crlf = self.length > 0 && self.last == b'\r';
        let is_empty = self.length == usize::from(crlf);
        (self.length, self.last) = (0, 0);
        if !self.begun {
            (self.begun, self.crlf) = (true, crlf);
            // Nor does any answer have an empty line before its status line (RFC 9112 section 2.1),
            // which hyper passes over.
            return if self.is_status_line() { Line::Right } else { Line::Wrong };
        }
        match (crlf == self.crlf, is_empty) {
            (false, _) => Line::Wrong,
            (true, false) => Line::Right,
            (true, true) => Line::Last,
        }
    }
}

/// What a line of a head is.
enum Line {
    Right,
    /// The empty one behind it.
    Last,
    Wrong,
}

impl Heads {
    /// A new answer is awaited.
    pub(super) fn begin(&self) {
        self.state.set(State { looking: true, ..State::default() });
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
    pub(super) fn next_interim(&self) -> Option<Bytes> {
        if !self.any.get() {
            return None;
        }
        let mut found = self.found.borrow_mut();
        let next = found.pop_front();
        self.any.set(!found.is_empty());
        next
    }

    /// These bytes came. Whether the head is clear so far.
    pub(super) fn see(&self, new: &[u8]) -> bool {
        let mut state = self.state.get();
        if !state.looking {
            return true;
        }
        let is_clear = self.follow(&mut state, new);
        self.state.set(state);
        is_clear
    }

    fn follow(&self, state: &mut State, new: &[u8]) -> bool {
        let mut begin = 0;
        for end in memchr::memchr_iter(b'\n', new) {
            self.grow(state, new.get(begin..end).unwrap_or_default(), true);
            begin = end + 1;
            match state.ended() {
                Line::Right => {}
                Line::Wrong => return false,
                Line::Last => match self.head_ended(*state) {
                    Some(next) => *state = next,
                    None => return false,
                },
            }
            if !state.looking {
                return true;
            }
        }
        self.grow(state, new.get(begin..).unwrap_or_default(), false);
        true
    }

    /// More of a line came. `ends`: and then its LF.
    #[inline]
    fn grow(&self, state: &mut State, line: &[u8], ends: bool) {
        state.grow(line);
        if state.may_be_interim() && !state.gives_up {
            self.keep(state, line, ends);
        }
    }

    fn keep(&self, state: &mut State, line: &[u8], ends: bool) {
        let mut kept = self.kept.borrow_mut();
        if !state.begun && state.length == line.len() {
            kept.clear();
        }
        state.gives_up = kept.len() + line.len() >= HEAD;
        if !state.gives_up {
            kept.extend_from_slice(line);
            kept.extend(ends.then_some(b'\n'));
        }
    }

    /// Another head follows an interim one, unless it was the last one of HTTP. `None`: it is no
    /// head for hyper either, and whatever follows it is nobody's answer.
    fn head_ended(&self, state: State) -> Option<State> {
        let mut next = State { gives_up: state.gives_up, ..State::default() };
        let code = state.begin.get(STATUS..STATUS + 3).unwrap_or_default();
        next.looking = code.starts_with(b"1") && code != b"101";
        if next.looking && !state.gives_up {
            next.gives_up = !self.pass_on()?;
        }
        if code == b"100" {
            self.continued.set(true);
        }
        Some(next)
    }

    /// What is kept is one whole interim head. Whether it is one to pass on, as far as its fields go.
    fn pass_on(&self) -> Option<bool> {
        let kept = self.kept.borrow();
        let mut fields = [httparse::EMPTY_HEADER; FIELDS];
        let mut parsed = httparse::Response::new(&mut fields);
        match parsed.parse(&kept) {
            Ok(httparse::Status::Complete(_)) => {}
            Err(httparse::Error::TooManyHeaders) => return Some(false),
            _ => return None,
        }
        let mut found = self.found.borrow_mut();
        if let Some(code) = parsed.code.filter(|code| *code != 100)
            && found.len() < WAITING
        {
            found.push_back(render(code, parsed.reason.unwrap_or(""), parsed.headers));
            self.any.set(true);
        }
        Some(true)
    }
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
    use proptest::prelude::*;

    use super::*;

    const FINAL: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

    fn follow(pieces: &[&[u8]]) -> (Heads, bool) {
        let heads = Heads::default();
        heads.begin();
        let is_clear = pieces.iter().all(|piece| heads.see(piece));
        (heads, is_clear)
    }

    fn looks(heads: &Heads) -> bool {
        heads.state.get().looking
    }

    #[test]
    fn a_head_ends_its_lines_in_one_way_and_begins_with_a_status_line() {
        for (head, clear) in [
            ("HTTP/1.1 200 OK\r\na: b\r\n\r\n\nbody\r\n", true),
            ("HTTP/1.1 200 OK\na: b\n\nbody\r\n", true),
            ("HTTP/1.1 200\n\n", true),
            ("HTTP/1.0 200\r\n\r\n", true),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n\n", false),
            ("\nHTTP/1.1 200 OK\n\n\n", false),
            ("HTTP/1.1 103 Early Hints\r\n\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\na: b\nc: d\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\na: b\r\n\n", false),
            ("HTTP/1.1 200 OK\na: b\r\n\n", false),
            ("HTTP/1.1 103 Early Hints\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\na: b\n\r\n", false),
            ("HTTP/1.1 103 Early Hints\n\nHTTP/1.1 200 OK\r\na: b\r\n\r\n", true),
            ("HTTP/1.1 101 Switching Protocols\r\na: b\r\n\r\nx\r\ny\nz\r\n", true),
            ("HTTP/1.1  200 OK\r\n", false),
            ("HTTP/1.2 200 OK\r\n", false),
            ("HTTP/2.0 200 OK\r\n", false),
            ("HTTP/1.1 20\r\n", false),
            ("HTTP/1.1 2000 OK\r\n", false),
            ("HTTP/1.1 099 OK\r\n", false),
        ] {
            assert_eq!(follow(&[head.as_bytes()]).1, clear, "{head:?}");
        }
    }

    #[test]
    fn a_final_head_is_not_copied() {
        let (heads, _) = follow(&[FINAL]);
        assert!(!looks(&heads));
        assert_eq!(heads.kept.borrow().capacity(), 0);
    }

    #[test]
    fn hints_are_found_before_the_final_head_in_one_read() {
        let mut bytes =
            b"HTTP/1.1 103 Early Hints\r\nX: 1\r\nLink: </a>\r\nConnection: y, x\r\n\r\n".to_vec();
        bytes.extend_from_slice(FINAL);
        let (heads, _) = follow(&[&bytes]);
        assert_eq!(
            heads.next_interim().as_deref(),
            Some(&b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"[..])
        );
        assert!(heads.next_interim().is_none());
        assert!(!looks(&heads));
    }

    #[test]
    fn hints_may_come_byte_by_byte() {
        let bytes = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\na: b\r\n\r\n";
        let pieces: Vec<&[u8]> = bytes.chunks(1).chain([FINAL]).collect();
        let (heads, is_clear) = follow(&pieces);
        assert!(is_clear && heads.continued());
        let head = heads.next_interim();
        assert_eq!(head.as_deref(), Some(&b"HTTP/1.1 103 Early Hints\r\na: b\r\n\r\n"[..]));
        assert!(!looks(&heads));
    }

    #[test]
    fn a_switch_of_protocols_ends_the_search() {
        let switch = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n";
        let (heads, _) = follow(&[switch, b"HTTP/1.1 1"]);
        assert!(!looks(&heads));
        assert!(heads.next_interim().is_none());
    }

    #[test]
    fn an_endless_interim_head_is_not_kept() {
        let hints = b"HTTP/1.1 103 Early Hints\r\n";
        let (heads, is_clear) =
            follow(&[hints, b"a: ", &vec![b'x'; HEAD], b"\r\n\r\n", hints, b"\r\n", FINAL]);
        assert!(is_clear && !looks(&heads));
        assert!(heads.kept.borrow().capacity() <= HEAD);
        assert!(heads.next_interim().is_none());
    }

    #[test]
    fn nothing_is_passed_on_behind_what_is_no_head() {
        let hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
        let (heads, is_clear) =
            follow(&[hints, b"HTTP/1.1 103 Early Hints\r\nli\\nk: </a>\r\n\r\n", hints]);
        assert!(!is_clear);
        assert!(heads.next_interim().is_some());
        assert!(heads.next_interim().is_none());
    }

    proptest! {
        #[test]
        fn pieces_are_no_matter(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "HTTP/1.1 200 OK", "HTTP/1.1 103 x", "HTTP/1.1 101 x", "HTTP/1.1 100 ", "a: b",
                "\r\n", "\n", "\r", "\r\n\r\n", "\0",
            ]), 0..16),
            cut in 0_usize..60,
        ) {
            let whole = parts.concat();
            let (first, second) = whole.as_bytes().split_at(cut.min(whole.len()));
            let (once, twice) = (follow(&[whole.as_bytes()]), follow(&[first, second]));
            prop_assert_eq!(once.1, twice.1);
            prop_assert_eq!(once.0.continued(), twice.0.continued());
            while let Some(head) = once.0.next_interim() {
                prop_assert_eq!(Some(head), twice.0.next_interim());
            }
            prop_assert!(twice.0.next_interim().is_none());
        }

        /// hyper reads by httparse: what is clear begins and ends for it where it does here.
        #[test]
        fn httparse_sees_the_same_head(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "HTTP/1.1 200 OK", "HTTP/1.1 103 x", "a: b", "\r\n", "\n", "\r\n\r\n", "x", " ",
            ]), 0..12),
        ) {
            let whole = parts.concat();
            let mut fields = [httparse::EMPTY_HEADER; FIELDS];
            let mut response = httparse::Response::new(&mut fields);
            if let Ok(httparse::Status::Complete(end)) = response.parse(whole.as_bytes())
                && follow(&[whole.as_bytes()]).1
            {
                let heads = Heads::default();
                heads.begin();
                let is_final = response.code >= Some(200);
                for (at, byte) in whole.bytes().enumerate().take(end) {
                    prop_assert!(looks(&heads) && heads.see(&[byte]));
                    prop_assert_eq!(heads.next_interim().is_some(), !is_final && at + 1 == end);
                }
                prop_assert_eq!(looks(&heads), !is_final);
            }
        }
    }
}
