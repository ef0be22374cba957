//! Two readers of HTTP/1.1 that share nothing with litegate's way to read it: one by hand, after
//! the grammar of RFC 9112 and nothing beyond it, and one by httparse with its strict settings.
//!
//! Each reads a byte stream as a sequence of messages, whole or cut off, up to the first byte that
//! is wrong.

use std::fmt;

/// A message as it was read.
#[derive(Clone, Default, Eq, PartialEq)]
pub(super) struct Message {
    /// Method, target and version; or version, status and reason.
    pub(super) line: [Vec<u8>; 3],
    /// Names in lower case, values without blanks around them, in their order.
    pub(super) fields: Vec<(String, Vec<u8>)>,
    pub(super) framing: Framing,
    /// Without its chunks.
    pub(super) body: Vec<u8>,
    pub(super) trailers: Vec<(String, Vec<u8>)>,
    /// It ends where its framing says.
    pub(super) complete: bool,
    /// What of it a tolerant reader passed over.
    pub(super) tolerated: Option<&'static str>,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.line.each_ref().map(|word| word.escape_ascii());
        writeln!(f, "{a} {b} {c}")?;
        for (name, value) in &self.fields {
            writeln!(f, "  {name}: {}", value.escape_ascii())?;
        }
        writeln!(f, "  {:?}: {}", self.framing, self.body.escape_ascii())?;
        for (name, value) in &self.trailers {
            writeln!(f, "  {name}: {}", value.escape_ascii())?;
        }
        if let Some(what) = self.tolerated {
            writeln!(f, "  with {what}")?;
        }
        f.write_str(if self.complete { "  and no more\n" } else { "  …\n" })
    }
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Framing {
    /// There is none.
    #[default]
    None,
    Length,
    Chunked,
    /// By the end of the connection.
    Close,
}

/// A byte stream, read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// The last one may be incomplete.
    pub(super) messages: Vec<Message>,
    /// Why it ends before the bytes do.
    pub(super) wrong: Option<&'static str>,
    /// Bytes of a head that has no end.
    pub(super) rest: Vec<u8>,
}

impl Message {
    pub(super) fn values<'m>(&'m self, name: &'m str) -> impl Iterator<Item = &'m [u8]> {
        self.fields.iter().filter(move |(known, _)| known == name).map(|(_, value)| &**value)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.values(name).next().is_some()
    }

    /// The status, of a response.
    pub(super) fn status(&self) -> u16 {
        std::str::from_utf8(&self.line[1]).ok().and_then(|code| code.parse().ok()).unwrap_or(0)
    }
}

/// What stops a reader.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stop {
    /// The bytes end.
    Short,
    Wrong(&'static str),
}

/// What is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side<'m> {
    /// Requests.
    Requests,
    /// Final responses to requests of these methods, and interim ones before them. Whether the
    /// connection ended after the bytes.
    Responses(&'m [Vec<u8>], bool),
}

/// Reads by hand.
pub(super) fn read(bytes: &[u8], side: Side<'_>) -> Reading {
    read_as(bytes, side, &[])
}

/// Reads by hand, and passes over what litegate understands though nobody may send it, and does not
/// pass on.
pub(super) fn read_tolerantly(bytes: &[u8], side: Side<'_>) -> Reading {
    match side {
        Side::Requests => read_as(bytes, side, &OF_CLIENTS),
        Side::Responses(..) => read_as(bytes, side, &OF_NODES),
    }
}

const LF: &str = "a line that ends with LF";
const EMPTY_LINE: &str = "an empty line before a message";
const EXTENSION: &str = "a chunk extension that is none";

/// RFC 9112 section 2.2.
const OF_CLIENTS: [&str; 1] = [EMPTY_LINE];
/// Nobody stands between a node and litegate who could read it otherwise.
const OF_NODES: [&str; 2] = [LF, EXTENSION];

fn read_as(bytes: &[u8], side: Side<'_>, tolerates: &'static [&'static str]) -> Reading {
    let mut reading = Reading::default();
    let mut reader = Reader { bytes, at: 0, tolerates, tolerated: None };
    let mut finals = 0;
    while reader.at < bytes.len() {
        let begin = reader.at;
        let mut message = match reader.head(side) {
            Ok(message) => message,
            Err(stop) => {
                reading.rest = bytes[begin..].to_vec();
                if let Stop::Wrong(why) = stop {
                    reading.wrong = Some(why);
                }
                break;
            }
        };
        let method = match side {
            Side::Requests => None,
            Side::Responses(methods, _) => Some(methods.get(finals).map_or(&b""[..], |m| m)),
        };
        finals += usize::from(message.status() >= 200);
        let result = framing(&message, method).and_then(|(framing, length)| {
            message.framing = framing;
            reader.body(&mut message, length)
        });
        message.tolerated = reader.tolerated.take();
        if let (Framing::Close, Side::Responses(_, ended)) = (message.framing, side) {
            message.complete = ended;
        }
        let whole = message.complete;
        reading.messages.push(message);
        match result {
            Err(Stop::Wrong(why)) => reading.wrong = Some(why),
            Ok(()) if whole => continue,
            _ => {}
        }
        break;
    }
    reading
}

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
    tolerates: &'static [&'static str],
    tolerated: Option<&'static str>,
}

impl<'b> Reader<'b> {
    /// Passes over what is wrong, or does not.
    fn passes(&mut self, what: &'static str) -> Result<(), Stop> {
        if self.tolerates.contains(&what) {
            self.tolerated.get_or_insert(what);
            Ok(())
        } else {
            Err(Stop::Wrong(what))
        }
    }

    /// Up to CRLF, without it. No other control character but TAB is in it.
    fn line(&mut self) -> Result<&'b [u8], Stop> {
        self.line_of(false)
    }

    /// A chunk's line. Where any extension is tolerated it may hold anything but line breaks.
    fn chunk_line(&mut self) -> Result<&'b [u8], Stop> {
        self.line_of(self.tolerates.contains(&EXTENSION))
    }

    fn line_of(&mut self, any: bool) -> Result<&'b [u8], Stop> {
        let rest = &self.bytes[self.at..];
        for (at, byte) in rest.iter().enumerate() {
            match (byte, rest.get(at + 1)) {
                (b'\r', Some(b'\n')) => {
                    self.at += at + 2;
                    return Ok(&rest[..at]);
                }
                (b'\r', None) => return Err(Stop::Short),
                (b'\t', _) => {}
                // RFC 9112 section 2.2.
                (b'\n', _) => {
                    self.passes(LF)?;
                    self.at += at + 1;
                    return Ok(&rest[..at]);
                }
                (b'\r', _) => return Err(Stop::Wrong("a control character")),
                (0..=0x1f | 0x7f, _) if !any => return Err(Stop::Wrong("a control character")),
                _ => {}
            }
        }
        Err(Stop::Short)
    }

    fn head(&mut self, side: Side<'_>) -> Result<Message, Stop> {
        let mut line = self.line()?;
        while line.is_empty() {
            // RFC 9112 section 2.2 has it of requests.
            self.passes(EMPTY_LINE)?;
            line = self.line()?;
        }
        let mut words = line.splitn(3, |byte| *byte == b' ');
        let line = [(); 3].map(|()| words.next().unwrap_or_default());
        match (side, line) {
            (Side::Requests, [method, target, version]) => {
                if method.is_empty() || !method.iter().all(is_token) {
                    return Err(Stop::Wrong("a method that is no token"));
                }
                // No URI has bytes beyond ASCII, and many clients send them: nobody takes them for
                // anything else.
                let fits = |b: &u8| (b.is_ascii_graphic() && *b != b'#') || *b >= 0x80;
                if target.is_empty() || !target.iter().all(fits) {
                    return Err(Stop::Wrong("a target that is none"));
                }
                if !matches!(version, b"HTTP/1.1" | b"HTTP/1.0") {
                    return Err(Stop::Wrong("a version that is none"));
                }
            }
            (Side::Responses(..), [version, status, reason]) => {
                if version != b"HTTP/1.1" && version != b"HTTP/1.0" {
                    return Err(Stop::Wrong("a version that is none"));
                }
                let in_range = matches!(status, [b'1'..=b'9', _, _]);
                if !in_range || !status.iter().all(u8::is_ascii_digit) {
                    return Err(Stop::Wrong("a status that is none"));
                }
                if !reason.iter().all(is_text) {
                    return Err(Stop::Wrong("a reason that is none"));
                }
            }
        }
        let line = line.map(<[u8]>::to_vec);
        Ok(Message { line, fields: self.fields()?, ..Message::default() })
    }

    /// Fields, with the empty line behind them.
    fn fields(&mut self) -> Result<Vec<(String, Vec<u8>)>, Stop> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(fields);
            }
            let colon = line.iter().position(|byte| *byte == b':');
            let colon = colon.ok_or(Stop::Wrong("a field without a colon"))?;
            let (name, value) = (&line[..colon], &line[colon + 1..]);
            if name.is_empty() || !name.iter().all(is_token) {
                return Err(Stop::Wrong("a field's name that is no token"));
            }
            if !value.iter().all(is_text) {
                return Err(Stop::Wrong("a field's value that is none"));
            }
            let name = String::from_utf8_lossy(name).to_ascii_lowercase();
            fields.push((name, trim(value).to_vec()));
        }
    }

    fn body(&mut self, message: &mut Message, length: usize) -> Result<(), Stop> {
        match message.framing {
            Framing::None => {}
            Framing::Length => {
                let rest = &self.bytes[self.at..];
                let here = length.min(rest.len());
                message.body = rest[..here].to_vec();
                self.at += here;
                if here < length {
                    return Err(Stop::Short);
                }
            }
            Framing::Chunked => loop {
                let line = self.chunk_line()?;
                let size = match chunk_size(line) {
                    Err(Stop::Wrong(why)) => {
                        self.passes(why)?;
                        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit());
                        chunk_size(&line[..digits.count()])?
                    }
                    size => size?,
                };
                if size == 0 {
                    message.trailers = self.fields()?;
                    break;
                }
                let rest = &self.bytes[self.at..];
                let here = size.min(rest.len());
                message.body.extend_from_slice(&rest[..here]);
                self.at += here;
                if here < size {
                    return Err(Stop::Short);
                }
                if !self.line()?.is_empty() {
                    return Err(Stop::Wrong("a chunk that does not end"));
                }
            },
            Framing::Close => {
                message.body = self.bytes[self.at..].to_vec();
                self.at = self.bytes.len();
            }
        }
        message.complete = true;
        Ok(())
    }
}

/// RFC 9112 section 6.3. `answered`: the method that a response is for.
fn framing(message: &Message, answered: Option<&[u8]>) -> Result<(Framing, usize), Stop> {
    if answered.is_some() && matches!(message.status(), 100..200) {
        // RFC 9110 section 15.2: it ends with its head.
        return Ok((Framing::None, 0));
    }
    let codings = message.values("transfer-encoding").flat_map(|line| line.split(|b| *b == b','));
    let codings: Vec<&[u8]> = codings.map(trim).collect();
    let lengths: Vec<&[u8]> = message.values("content-length").collect();
    let length = match lengths[..] {
        [] => None,
        [one] if !one.is_empty() && one.iter().all(u8::is_ascii_digit) => {
            let length = std::str::from_utf8(one).ok().and_then(|text| text.parse().ok());
            Some(length.ok_or(Stop::Wrong("a length beyond all measure"))?)
        }
        [_] => return Err(Stop::Wrong("a length that is none")),
        _ => return Err(Stop::Wrong("several lengths")),
    };
    if !codings.is_empty() {
        if codings.len() != 1 || !codings[0].eq_ignore_ascii_case(b"chunked") {
            return Err(Stop::Wrong("a coding that is not chunked"));
        }
        if length.is_some() {
            return Err(Stop::Wrong("a length beside a coding"));
        }
        if [&message.line[0], &message.line[2]].iter().any(|line| *line == b"HTTP/1.0") {
            return Err(Stop::Wrong("a coding in HTTP/1.0"));
        }
    }
    if let Some(answered) = answered
        && (answered == b"HEAD" || matches!(message.status(), 204 | 304))
    {
        return Ok((Framing::None, 0));
    }
    Ok(match (codings.is_empty(), length) {
        (false, _) => (Framing::Chunked, 0),
        (true, Some(length)) => (Framing::Length, length),
        (true, None) if answered.is_some() => (Framing::Close, 0),
        (true, None) => (Framing::None, 0),
    })
}

/// `chunk-size [ chunk-ext ]` (RFC 9112 section 7.1).
fn chunk_size(line: &[u8]) -> Result<usize, Stop> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (number, mut rest) = line.split_at(digits);
    let number = std::str::from_utf8(number).unwrap_or_default();
    let wrong = Stop::Wrong("a chunk size that is none");
    let size = usize::from_str_radix(number, 16).map_err(|_| wrong)?;
    let wrong = Stop::Wrong(EXTENSION);
    while !rest.is_empty() {
        rest = trim_start(rest).strip_prefix(b";").ok_or(wrong)?;
        rest = trim_start(rest);
        let name = rest.iter().take_while(|byte| is_token(byte)).count();
        if name == 0 {
            return Err(wrong);
        }
        rest = &rest[name..];
        let Some(value) = trim_start(rest).strip_prefix(b"=") else { continue };
        let value = trim_start(value);
        rest = match value.strip_prefix(b"\"") {
            Some(quoted) => {
                let (mut escaped, mut end) = (false, None);
                for (at, byte) in quoted.iter().enumerate() {
                    match (escaped, byte) {
                        (false, b'"') => {
                            end = Some(at + 1);
                            break;
                        }
                        (false, b'\\') => escaped = true,
                        _ => escaped = false,
                    }
                }
                &quoted[end.ok_or(wrong)?..]
            }
            None => {
                let token = value.iter().take_while(|byte| is_token(byte)).count();
                if token == 0 {
                    return Err(wrong);
                }
                &value[token..]
            }
        };
    }
    Ok(size)
}

fn is_token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

fn is_text(byte: &u8) -> bool {
    matches!(byte, b'\t' | b' '..=0x7e | 0x80..)
}

fn trim(value: &[u8]) -> &[u8] {
    let end = value.iter().rposition(|b| !is_blank(b)).map_or(0, |at| at + 1);
    trim_start(&value[..end])
}

fn trim_start(value: &[u8]) -> &[u8] {
    let begin = value.iter().position(|b| !is_blank(b)).unwrap_or(value.len());
    &value[begin..]
}

fn is_blank(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// Reads by httparse, heads and chunk sizes; the framing in between is thought of anew.
pub(super) fn read_by_httparse(bytes: &[u8], side: Side<'_>) -> Reading {
    let mut reading = Reading::default();
    let mut rest = bytes;
    let mut finals = 0;
    while !rest.is_empty() {
        let mut message = Message::default();
        let parsed = match side {
            Side::Requests => request(rest, &mut message),
            Side::Responses(..) => response(rest, &mut message),
        };
        match parsed {
            Ok(httparse::Status::Complete(length)) => rest = &rest[length..],
            Ok(httparse::Status::Partial) => {
                reading.rest = rest.to_vec();
                return reading;
            }
            Err(_) => {
                reading.wrong = Some("httparse finds it wrong");
                return reading;
            }
        }
        let field = |name: &str| message.values(name).last().map(<[u8]>::to_vec);
        let (coding, length) = (field("transfer-encoding"), field("content-length"));
        let (bodiless, until_close) = match side {
            Side::Requests => (false, false),
            Side::Responses(methods, _) => {
                let is_final = message.status() >= 200;
                let head = is_final && methods.get(finals).is_some_and(|m| m == b"HEAD");
                finals += usize::from(is_final);
                (head || !is_final || [204, 304].contains(&message.status()), true)
            }
        };
        if bodiless {
            message.complete = true;
        } else if coding.is_some() {
            message.framing = Framing::Chunked;
            rest = by_chunks(rest, &mut message);
        } else if let Some(length) = length {
            message.framing = Framing::Length;
            let length = String::from_utf8_lossy(&length).parse().unwrap_or(usize::MAX);
            let here = length.min(rest.len());
            message.body = rest[..here].to_vec();
            message.complete = here == length;
            rest = &rest[here..];
        } else if until_close {
            message.framing = Framing::Close;
            message.body = std::mem::take(&mut rest).to_vec();
            message.complete = matches!(side, Side::Responses(_, true));
        } else {
            message.complete = true;
        }
        let whole = message.complete;
        reading.messages.push(message);
        if !whole {
            break;
        }
    }
    reading
}

type Parsed = Result<httparse::Status<usize>, httparse::Error>;

fn request(bytes: &[u8], message: &mut Message) -> Parsed {
    let mut fields = [httparse::EMPTY_HEADER; 256];
    let mut head = httparse::Request::new(&mut fields);
    let parsed = head.parse(bytes);
    let text = |text: Option<&str>| text.unwrap_or_default().as_bytes().to_vec();
    let version = format!("HTTP/1.{}", head.version.unwrap_or_default()).into_bytes();
    message.line = [text(head.method), text(head.path), version];
    message.fields = owned(head.headers);
    parsed
}

fn response(bytes: &[u8], message: &mut Message) -> Parsed {
    let mut fields = [httparse::EMPTY_HEADER; 256];
    let mut head = httparse::Response::new(&mut fields);
    let parsed = head.parse(bytes);
    let version = format!("HTTP/1.{}", head.version.unwrap_or_default()).into_bytes();
    let status = head.code.unwrap_or_default().to_string().into_bytes();
    message.line = [version, status, head.reason.unwrap_or_default().as_bytes().to_vec()];
    message.fields = owned(head.headers);
    parsed
}

fn owned(fields: &[httparse::Header<'_>]) -> Vec<(String, Vec<u8>)> {
    fields.iter().map(|f| (f.name.to_ascii_lowercase(), trim(f.value).to_vec())).collect()
}

/// Reads chunks and trailers. Returns what follows.
fn by_chunks<'b>(mut rest: &'b [u8], message: &mut Message) -> &'b [u8] {
    loop {
        let Ok(httparse::Status::Complete((head, size))) = httparse::parse_chunk_size(rest) else {
            return &[];
        };
        rest = &rest[head..];
        if size == 0 {
            let mut fields = [httparse::EMPTY_HEADER; 256];
            let parsed = httparse::parse_headers(rest, &mut fields);
            let Ok(httparse::Status::Complete((length, fields))) = parsed else { return &[] };
            message.trailers = owned(fields);
            message.complete = true;
            return &rest[length..];
        }
        let here = usize::try_from(size).unwrap_or(usize::MAX).min(rest.len());
        message.body.extend_from_slice(&rest[..here]);
        rest = &rest[here..];
        match rest.strip_prefix(b"\r\n") {
            Some(after) => rest = after,
            None => return &[],
        }
    }
}
