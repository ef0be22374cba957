//! What a client sends over HTTP/1.1, looked at byte for byte before hyper parses it.
//!
//! hyper reads some of what is ambiguous as one thing or the other and does not say so: a line that
//! ends in a bare LF, a `Content-Length` beside `Transfer-Encoding`, a length said twice, a
//! fragment in a target, white space and anything at all in a chunk's extensions. Whoever reads the
//! same bytes another way, before or behind litegate, sees other requests in them: that is request
//! smuggling. The guard follows the framing by the letter of RFC 9112, and where it stops being
//! clear, the rest never comes to hyper: [`Fault::poison`] does in its place, which hyper
//! refuses whatever it is in the middle of, once all that came before has been answered.
//!
//! What hyper refuses by itself is left to it. Each head is looked over once, line by line; of
//! bodies only the chunks' own lines are.

/// Why the rest of a connection is not read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    /// RFC 9112 section 2.2.
    BareLf(Place),
    /// RFC 9112 section 6.1.
    TwoFramings,
    /// RFC 9112 section 6.3, rule 5.
    SeveralLengths,
    /// RFC 9110 section 8.6.
    BadLength,
    /// RFC 9112 section 3.2: no form of a target has one.
    Fragment,
    /// RFC 9112 section 7.1.
    ChunkSize,
    /// RFC 9112 section 7.1.1.
    ChunkExtension,
    /// RFC 9112 section 7.1.
    ChunkEnd,
}

/// What is being read, by hyper as by the guard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    Head,
    Trailers,
}

impl Fault {
    /// In words that hold nothing of the client's.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::BareLf(_) => "a line ends in a bare line feed",
            Self::TwoFramings => "both Content-Length and Transfer-Encoding",
            Self::SeveralLengths => "several Content-Length fields",
            Self::BadLength => "a Content-Length that is no number",
            Self::Fragment => "a fragment in the request target",
            Self::ChunkSize => "a chunk without a proper size",
            Self::ChunkExtension => "a chunk extension out of grammar",
            Self::ChunkEnd => "a chunk that does not end where it should",
        }
    }

    /// What hyper gets in place of the rest: no head, chunk or trailer goes on like this.
    pub(super) fn poison(self) -> &'static [u8] {
        match self {
            // The end of the head too: hyper waits for it before it looks at what came.
            Self::BareLf(Place::Head)
            | Self::TwoFramings
            | Self::SeveralLengths
            | Self::BadLength
            | Self::Fragment => b"\0\r\n\r\n",
            Self::ChunkSize | Self::ChunkEnd => b"\0",
            // All that hyper does not let pass in one.
            Self::ChunkExtension => b"\n",
            Self::BareLf(Place::Trailers) => b"\r\0",
        }
    }
}

/// How far bytes may go to hyper.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Seen {
    /// All of them.
    All,
    /// So many. What follows is a request only if the one before does not become another
    /// protocol: see [`Guard::go_on`].
    UpTo(usize),
    /// So many, and then no more.
    Bad(usize, Fault),
}

/// Follows one connection.
#[derive(Debug)]
pub(super) struct Guard {
    state: State,
    /// What came of a line whose end has yet to come. hyper's limit on heads bounds it.
    line: Vec<u8>,
    head: Head,
}

#[derive(Debug)]
enum State {
    /// In a request's head, or before it.
    Head,
    /// In a body, of which so much is to come.
    Body(u64),
    /// In a chunked body.
    Chunk(Chunk),
    /// Behind the last chunk.
    Trailers {
        /// Nothing of the line but perhaps its CR.
        empty: bool,
        cr: bool,
    },
    /// Behind a request that may become another protocol.
    Switch,
    /// Not clear any more.
    Lost,
}

/// What was seen of a head.
#[derive(Debug, Default)]
struct Head {
    /// The request line was.
    begun: bool,
    length: Option<u64>,
    coded: bool,
    switches: bool,
}

/// Where in a chunk, or in the line before it: `chunk-size *( BWS ";" BWS chunk-ext-name [ BWS "="
/// BWS chunk-ext-val ] ) CRLF`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Chunk {
    Size {
        size: u64,
        digits: u8,
    },
    SizeBlank {
        size: u64,
    },
    NameBlank {
        size: u64,
    },
    Name {
        size: u64,
    },
    NameEnd {
        size: u64,
    },
    ValueBlank {
        size: u64,
    },
    Value {
        size: u64,
    },
    Quoted {
        size: u64,
    },
    Escaped {
        size: u64,
    },
    ValueEnd {
        size: u64,
    },
    /// White space behind a value: another extension follows.
    Gap {
        size: u64,
    },
    Lf {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
}

/// Digits in a chunk's size: as many as a `u64` has.
const DIGITS: u8 = 16;

impl Default for Guard {
    fn default() -> Self {
        Self { state: State::Head, line: Vec::new(), head: Head::default() }
    }
}

impl Guard {
    /// These bytes came, right behind those before.
    pub(super) fn see(&mut self, bytes: &[u8]) -> Seen {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let step = match &mut self.state {
                State::Head => self.see_lines(rest),
                State::Body(left) => {
                    let n = skip(left, rest.len());
                    if *left == 0 {
                        self.message_ended();
                    }
                    Ok(n)
                }
                State::Chunk(Chunk::Data { left }) => {
                    let n = skip(left, rest.len());
                    if *left == 0 {
                        self.state = State::Chunk(Chunk::DataCr);
                    }
                    Ok(n)
                }
                State::Chunk(chunk) => {
                    let chunk = *chunk;
                    rest.first().map_or(Ok(0), |byte| self.see_chunk(chunk, *byte))
                }
                State::Trailers { empty, cr } => {
                    let (empty, cr) = (*empty, *cr);
                    rest.first().map_or(Ok(0), |byte| self.see_trailers(empty, cr, *byte))
                }
                State::Switch | State::Lost => return Seen::UpTo(at),
            };
            match step {
                Ok(n) => at += n,
                Err((n, fault)) => {
                    self.state = State::Lost;
                    return Seen::Bad(at + n, fault);
                }
            }
        }
        Seen::All
    }

    /// Whether what comes next depends on the answer to the request before.
    pub(super) fn awaits_switch(&self) -> bool {
        matches!(self.state, State::Switch)
    }

    /// The request before did not become another protocol: a request follows it.
    pub(super) fn go_on(&mut self) {
        if self.awaits_switch() {
            self.state = State::Head;
        }
    }

    /// Looks at a head's lines, as far as they are whole. How far that was, or how far up to a fault.
    fn see_lines(&mut self, rest: &[u8]) -> Result<usize, (usize, Fault)> {
        let mut begin = 0;
        for end in memchr::memchr_iter(b'\n', rest) {
            let mut line = rest.get(begin..end).unwrap_or_default();
            if !self.line.is_empty() {
                self.line.extend_from_slice(line);
                line = &self.line;
            }
            let seen = self.head.see(line);
            self.line.clear();
            begin = end + 1;
            if seen.map_err(|fault| (end, fault))? {
                self.head_ended();
                return Ok(begin);
            }
        }
        self.line.extend_from_slice(rest.get(begin..).unwrap_or_default());
        Ok(rest.len())
    }

    fn head_ended(&mut self) {
        if self.head.coded {
            // Whether it is coded in a way that is known is hyper's and the service's to say.
            self.state = State::Chunk(Chunk::Size { size: 0, digits: 0 });
            return;
        }
        match self.head.length {
            None | Some(0) => self.message_ended(),
            Some(length) => self.state = State::Body(length),
        }
    }

    fn message_ended(&mut self) {
        let head = std::mem::take(&mut self.head);
        self.state = if head.switches { State::Switch } else { State::Head };
    }

    fn see_chunk(&mut self, chunk: Chunk, byte: u8) -> Result<usize, (usize, Fault)> {
        let next = chunk.next(byte).map_err(|fault| (0, fault))?;
        self.state = match next {
            Chunk::Data { left: 0 } => State::Trailers { empty: true, cr: false },
            next => State::Chunk(next),
        };
        Ok(1)
    }

    fn see_trailers(&mut self, empty: bool, cr: bool, byte: u8) -> Result<usize, (usize, Fault)> {
        match byte {
            b'\n' if !cr => return Err((0, Fault::BareLf(Place::Trailers))),
            b'\n' if empty => self.message_ended(),
            b'\n' => self.state = State::Trailers { empty: true, cr: false },
            b'\r' => self.state = State::Trailers { empty, cr: true },
            _ => self.state = State::Trailers { empty: false, cr: false },
        }
        Ok(1)
    }
}

/// Takes up to `n` off `left`; how much.
fn skip(left: &mut u64, n: usize) -> usize {
    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(n);
    *left -= taken as u64;
    taken
}

impl Head {
    /// Looks at a line, without its LF. Whether it ends the head.
    fn see(&mut self, line: &[u8]) -> Result<bool, Fault> {
        let Some((b'\r', line)) = line.split_last() else {
            return Err(Fault::BareLf(Place::Head));
        };
        let Some(first) = line.first() else {
            return match (self.coded, self.length) {
                (true, Some(_)) => Err(Fault::TwoFramings),
                // RFC 9112 section 2.2: an empty line before the head is passed over.
                _ => Ok(self.begun),
            };
        };
        if !self.begun {
            self.begun = true;
            self.see_request_line(line)?;
            return Ok(false);
        }
        // Three names matter, and few others begin like them.
        match first.to_ascii_lowercase() {
            b'c' => {
                if let Some(value) = value_of(b"content-length:", line) {
                    let length = number(value).ok_or(Fault::BadLength)?;
                    if self.length.replace(length).is_some() {
                        return Err(Fault::SeveralLengths);
                    }
                }
            }
            b't' => self.coded |= value_of(b"transfer-encoding:", line).is_some(),
            b'u' => self.switches |= value_of(b"upgrade:", line).is_some(),
            _ => {}
        }
        Ok(false)
    }

    fn see_request_line(&mut self, line: &[u8]) -> Result<(), Fault> {
        self.switches = line.starts_with(b"CONNECT ");
        // No method has one, and no version.
        if memchr::memchr(b'#', line).is_some_and(|at| line.get(..at).is_some_and(has_blank)) {
            return Err(Fault::Fragment);
        }
        Ok(())
    }
}

fn has_blank(bytes: &[u8]) -> bool {
    bytes.contains(&b' ')
}

/// What is behind the name and its colon, if the line has that name.
fn value_of<'a>(name: &[u8], line: &'a [u8]) -> Option<&'a [u8]> {
    let (begin, value) = line.split_at_checked(name.len())?;
    // Most lines are told apart by where their colon is.
    (begin.last() == name.last() && begin.eq_ignore_ascii_case(name)).then_some(value)
}

/// `Content-Length = 1*DIGIT`, with the white space that any value may have around it, and of a
/// size that anyone could count to.
fn number(value: &[u8]) -> Option<u64> {
    let mut digits = value;
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = digits {
        digits = rest;
    }
    if digits.is_empty() {
        return None;
    }
    let number = digits.iter().try_fold(0_i64, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| i64::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })?;
    u64::try_from(number).ok()
}

impl Chunk {
    /// What follows one byte of a chunk's framing. `Data` of nothing is the last chunk.
    fn next(self, byte: u8) -> Result<Self, Fault> {
        let bad = Err(Fault::ChunkExtension);
        Ok(match (self, byte) {
            (Self::Size { size, digits }, byte) if byte.is_ascii_hexdigit() => {
                if digits == DIGITS || size > u64::MAX >> 4 {
                    return Err(Fault::ChunkSize);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Self::Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Self::Size { digits: 0, .. }, _) => return Err(Fault::ChunkSize),
            (
                Self::Size { size, .. }
                | Self::Name { size }
                | Self::Value { size }
                | Self::ValueEnd { size },
                b'\r',
            ) => Self::Lf { size },
            (
                Self::Size { size, .. }
                | Self::SizeBlank { size }
                | Self::Name { size }
                | Self::NameEnd { size }
                | Self::Value { size }
                | Self::ValueEnd { size }
                | Self::Gap { size },
                b';',
            ) => Self::NameBlank { size },
            // White space is for what an extension may follow.
            (Self::Size { size, .. } | Self::SizeBlank { size }, b' ' | b'\t') => {
                Self::SizeBlank { size }
            }
            (Self::Size { .. } | Self::SizeBlank { .. }, _) => return Err(Fault::ChunkSize),
            (Self::NameBlank { size }, b' ' | b'\t') => Self::NameBlank { size },
            (Self::NameBlank { size } | Self::Name { size }, byte) if is_token(byte) => {
                Self::Name { size }
            }
            (Self::Name { size } | Self::NameEnd { size }, b' ' | b'\t') => Self::NameEnd { size },
            (Self::Name { size } | Self::NameEnd { size }, b'=') => Self::ValueBlank { size },
            (Self::NameBlank { .. } | Self::Name { .. } | Self::NameEnd { .. }, _) => return bad,
            (Self::ValueBlank { size }, b' ' | b'\t') => Self::ValueBlank { size },
            (Self::ValueBlank { size }, b'"') => Self::Quoted { size },
            (Self::ValueBlank { size } | Self::Value { size }, byte) if is_token(byte) => {
                Self::Value { size }
            }
            (Self::Value { size } | Self::ValueEnd { size } | Self::Gap { size }, b' ' | b'\t') => {
                Self::Gap { size }
            }
            (
                Self::ValueBlank { .. }
                | Self::Value { .. }
                | Self::ValueEnd { .. }
                | Self::Gap { .. },
                _,
            ) => return bad,
            (Self::Quoted { size }, b'"') => Self::ValueEnd { size },
            (Self::Quoted { size }, b'\\') => Self::Escaped { size },
            (Self::Quoted { size } | Self::Escaped { size }, byte) if is_text(byte) => {
                Self::Quoted { size }
            }
            (Self::Quoted { .. } | Self::Escaped { .. }, _) => return bad,
            (Self::Lf { size }, b'\n') => Self::Data { left: size },
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { size: 0, digits: 0 },
            (Self::Lf { .. }, _) => return Err(Fault::ChunkSize),
            (Self::DataCr | Self::DataLf, _) => return Err(Fault::ChunkEnd),
            // Of data nobody asks.
            (Self::Data { left }, _) => Self::Data { left },
        })
    }
}

/// `tchar`, RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What may stand between quotes, RFC 9110 section 5.6.4.
fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn see(bytes: &str) -> Seen {
        Guard::default().see(bytes.as_bytes())
    }

    #[test]
    fn what_is_clear_passes() {
        for bytes in [
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "\r\n\r\nGET / HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length:3\r\n\r\n\n\n\nGET / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
             5\r\n\r\n\n\n\n\r\nA;a;b = c ; d=\"e\\\"\t\";f\r\n0123456789\r\n000\r\nx: y\r\n\r\n\
             GET / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0 ;x\r\n\r\n",
            "POST / HTTP/1.1\r\nCONTENT-Length:\t003 \t\r\n\r\n\n\n\nGET / HTTP/1.1\r\n\r\n",
            // Names that only begin like those that matter.
            "A / HTTP/1.1\r\nContent-Lengths: x\r\ncontent-length-: 1\r\ncontent-length: 1\r\n\
             transfer-encodings: x\r\nte: x\r\nt:\r\nupgrade-insecure-requests: 1\r\n\r\n\n\
             GET / HTTP/1.1\r\n\r\n",
            // hyper's to refuse.
            "G#T / HTTP/1.1\r\nno colon\r\ncontent-length\r\n\r\n",
        ] {
            assert_eq!(see(bytes), Seen::All, "{bytes:?}");
        }
    }

    /// `|` marks where it stops.
    #[test]
    fn what_is_not_clear_goes_no_further() {
        let post = "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n";
        for (bytes, fault) in [
            ("GET / HTTP/1.1|\nhost: a\r\n\r\n", Fault::BareLf(Place::Head)),
            ("|\nGET / HTTP/1.1\r\n", Fault::BareLf(Place::Head)),
            ("GET / HTTP/1.1\r\nhost: a|\n\r\n", Fault::BareLf(Place::Head)),
            ("GET /#a HTTP/1.1\r|\n", Fault::Fragment),
            ("A / HTTP/1.1\r\ncontent-length: 1\r\nContent-length: 1\r|\n", Fault::SeveralLengths),
            ("A / HTTP/1.1\r\ncontent-length: +1\r|\n", Fault::BadLength),
            ("A / HTTP/1.1\r\ncontent-length: 1,1\r|\n", Fault::BadLength),
            ("A / HTTP/1.1\r\ncontent-length: 1 1\r|\n", Fault::BadLength),
            ("A / HTTP/1.1\r\ncontent-length: \r|\n", Fault::BadLength),
            ("A / HTTP/1.1\r\ncontent-length: 9223372036854775808\r|\n", Fault::BadLength),
            (
                "A / HTTP/1.1\r\ncontent-length: 0\r\ntransfer-encoding: x\r\n\r|\n",
                Fault::TwoFramings,
            ),
            (&format!("{post}|\r\n"), Fault::ChunkSize),
            (&format!("{post}|+1\r\n"), Fault::ChunkSize),
            (&format!("{post}0|x1\r\n"), Fault::ChunkSize),
            (&format!("{post}1 |\r\n"), Fault::ChunkSize),
            (&format!("{post}1|\nx"), Fault::ChunkSize),
            (&format!("{post}1\r|x"), Fault::ChunkSize),
            (&format!("{post}0000000000000000|0\r\n"), Fault::ChunkSize),
            (&format!("{post}1\r\nx|x\r\n"), Fault::ChunkEnd),
            (&format!("{post}1\r\nx|\n"), Fault::ChunkEnd),
            (&format!("{post}1;|\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;|\n"), Fault::ChunkExtension),
            (&format!("{post}1;a|\n"), Fault::ChunkExtension),
            (&format!("{post}1;a=|\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;a=\"b|\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;a=\"b\"|c\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;a|(b\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;a |\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;a=b |\r\n"), Fault::ChunkExtension),
            (&format!("{post}1;a=\"b\" |\r\n"), Fault::ChunkExtension),
            (&format!("{post}0\r\n|\n"), Fault::BareLf(Place::Trailers)),
            (&format!("{post}0\r\nx: y|\n\r\n"), Fault::BareLf(Place::Trailers)),
        ] {
            let at = bytes.find('|').unwrap();
            let bytes = bytes.replace('|', "");
            assert_eq!(see(&bytes), Seen::Bad(at, fault), "{bytes:?}");
        }
    }

    #[test]
    fn what_may_not_be_http_waits() {
        let mut guard = Guard::default();
        let head = b"GET / HTTP/1.1\r\nupgrade: websocket\r\n\r\n";
        assert_eq!(guard.see(head), Seen::All);
        assert_eq!(guard.see(b"\n"), Seen::UpTo(0));
        assert!(guard.awaits_switch());
        guard.go_on();
        assert_eq!(guard.see(b"\n"), Seen::Bad(0, Fault::BareLf(Place::Head)));
        assert_eq!(guard.see(b"GET"), Seen::UpTo(0), "lost for good");
    }

    proptest! {
        /// However the bytes are cut, the same is seen of them.
        #[test]
        fn pieces_are_no_matter(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "GET / HTTP/1.1\r\n", "content-length: 3\r\n", "transfer-encoding: chunked\r\n",
                "x: y\r\n", "\r\n", "abc", "3\r\nabc\r\n", "0\r\n", "3;a=\"b\"\r\n", "\n", "\r",
                "upgrade: x\r\n", ";", "#",
            ]), 0..24),
            cut in 0_usize..100,
        ) {
            let whole = parts.concat();
            let once = see(&whole);
            let (first, second) = whole.as_bytes().split_at(cut.min(whole.len()));
            let mut guard = Guard::default();
            let twice = match guard.see(first) {
                Seen::All => match guard.see(second) {
                    Seen::All => Seen::All,
                    Seen::UpTo(n) => Seen::UpTo(first.len() + n),
                    Seen::Bad(n, fault) => Seen::Bad(first.len() + n, fault),
                },
                seen => seen,
            };
            prop_assert_eq!(once, twice);
            let mut guard = Guard::default();
            let mut bytes = whole.as_bytes().chunks(1).enumerate();
            let seen = bytes.find_map(|(at, byte)| match guard.see(byte) {
                Seen::All => None,
                Seen::UpTo(n) => Some(Seen::UpTo(at + n)),
                Seen::Bad(n, fault) => Some(Seen::Bad(at + n, fault)),
            });
            prop_assert_eq!(once, seen.unwrap_or(Seen::All));
        }
    }
}
