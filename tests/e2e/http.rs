//! A plain HTTP/1.1 client: one connection a request, nothing repeated, nothing hidden.

use std::{
    io::{self, BufRead as _, BufReader, Read, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

/// Longer than any hold, shorter than a test run: a request that takes it has failed.
const TIMEOUT: Duration = Duration::from_mins(1);

/// What a request carries: `bytes` bytes that differ at every place, so that one that is missing,
/// doubled or moved changes the sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Body {
    pub(crate) bytes: usize,
}

impl Body {
    pub(crate) const EMPTY: Self = Self { bytes: 0 };

    /// In pieces of at most 64 KiB.
    fn pieces(self) -> impl Iterator<Item = Vec<u8>> {
        const PIECE: usize = 64 * 1024;
        let mut word = 0x9e37_79b9_7f4a_7c15_u64;
        (0..self.bytes).step_by(PIECE).map(move |start| {
            let length = PIECE.min(self.bytes - start);
            let mut piece = Vec::with_capacity(length + 8);
            while piece.len() < length {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                piece.extend_from_slice(&word.to_le_bytes());
            }
            piece.truncate(length);
            piece
        })
    }

    /// FNV-1a, as the app computes it.
    pub(crate) fn sum(self) -> String {
        let mut sum = 0xcbf2_9ce4_8422_2325_u64;
        for byte in self.pieces().flatten() {
            sum = (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        format!("{sum:016x}")
    }
}

/// A whole response: a truncated one is an error.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The first field of this name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }

    /// All fields of this name.
    pub(crate) fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let fields = self.head.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name));
        fields.map(|(_, value)| &**value)
    }

    /// The node whose app answered, or nothing if none did.
    pub(crate) fn node(&self) -> Option<&str> {
        self.header("abaci-node")
    }

    /// Whether any field that only LiteFS and a proxy should see has come through.
    pub(crate) fn shows_a_replay(&self) -> bool {
        self.head.iter().any(|(name, _)| name.to_ascii_lowercase().starts_with("fly-replay"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Result<serde_json::Value, String> {
        serde_json::from_slice(&self.body).map_err(|error| format!("{error}: {}", self.text()))
    }
}

/// A request that is not quite plain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    /// More fields.
    pub(crate) fields: &'a [(&'a str, &'a str)],
    pub(crate) body: Body,
    /// For connecting, and for each pause of the other side.
    pub(crate) timeout: Duration,
}

impl Request<'static> {
    /// What the others are made from.
    pub(crate) const GET: Self =
        Request { method: "GET", path: "/", fields: &[], body: Body::EMPTY, timeout: TIMEOUT };
}

/// Sends a request without a body.
pub(crate) fn get(to: SocketAddr, path: &str) -> io::Result<Answer> {
    Request { path, ..Request::GET }.send(to)
}

/// Sends a request and reads the whole answer, also one that comes before the body was taken.
pub(crate) fn send(to: SocketAddr, method: &str, path: &str, body: Body) -> io::Result<Answer> {
    Request { method, path, body, ..Request::GET }.send(to)
}

impl Request<'_> {
    /// Sends it and reads the whole answer.
    pub(crate) fn send(&self, to: SocketAddr) -> io::Result<Answer> {
        let Self { method, path, fields, body, timeout } = *self;
        let stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.set_nodelay(true)?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: abaci.test\r\n");
        for (name, value) in fields {
            head.extend([name, ": ", value, "\r\n"]);
        }
        if body.bytes > 0 || !matches!(method, "GET" | "HEAD") {
            head.extend(["Content-Length: ", &body.bytes.to_string(), "\r\n"]);
        }
        head.push_str("\r\n");
        (&stream).write_all(head.as_bytes())?;

        let read = || read_answer(&mut BufReader::new(&stream), method == "HEAD");
        let answer = if body.bytes == 0 {
            read()
        } else {
            thread::scope(|scope| {
                // A server may answer and stop reading: what counts is the answer, not whether
                // the body went.
                scope.spawn(|| body.pieces().try_for_each(|piece| (&stream).write_all(&piece)));
                let answer = read();
                let _ = stream.shutdown(Shutdown::Both);
                answer
            })
        };
        let _ = stream.shutdown(Shutdown::Both);
        answer
    }
}

fn read_answer(from: &mut BufReader<&TcpStream>, is_head: bool) -> io::Result<Answer> {
    loop {
        let status_line = line(from)?;
        let status = status_line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3))
            .and_then(|code| code.parse().ok())
            .ok_or_else(|| malformed(&status_line))?;
        let mut head = Vec::new();
        loop {
            let field = line(from)?;
            if field.is_empty() {
                break;
            }
            let (name, value) = field.split_once(':').ok_or_else(|| malformed(&field))?;
            head.push((name.to_owned(), value.trim().to_owned()));
        }
        if (100..200).contains(&status) {
            continue;
        }
        let mut answer = Answer { status, head, body: Vec::new() };
        if !is_head && status != 204 && status != 304 {
            answer.body = read_body(from, &answer)?;
        }
        return Ok(answer);
    }
}

fn read_body(from: &mut BufReader<&TcpStream>, answer: &Answer) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if answer.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        loop {
            let size = line(from)?;
            let size = size.split(';').next().unwrap_or_default();
            let size = usize::from_str_radix(size, 16).map_err(|_| malformed(size))?;
            exactly(from, size, &mut body)?;
            if size == 0 {
                while !line(from)?.is_empty() {}
                return Ok(body);
            }
            line(from)?;
        }
    }
    match answer.header("content-length") {
        Some(length) => exactly(from, length.parse().map_err(|_| malformed(length))?, &mut body)?,
        None => drop(from.read_to_end(&mut body)?),
    }
    Ok(body)
}

fn exactly(from: &mut BufReader<&TcpStream>, length: usize, into: &mut Vec<u8>) -> io::Result<()> {
    let wanted = u64::try_from(length).map_err(io::Error::other)?;
    match from.take(wanted).read_to_end(into)? {
        read if read == length => Ok(()),
        read => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the body broke off after {read} of {length} bytes"),
        )),
    }
}

fn line(from: &mut BufReader<&TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 || !line.ends_with('\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before an answer"));
    }
    Ok(line.trim_end().to_owned())
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed: `{what}`"))
}
