//! A node that writes down every byte that reaches it, and understands it by the letter.

use std::{
    fmt::Write as _,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// What came.
#[derive(Clone, Debug, Default)]
pub(super) struct Came {
    /// Every byte, of all connections in the order of arrival.
    pub(super) raw: Vec<u8>,
    /// Each whole request, as `POST /x HTTP/1.1 | host: a | content-length: 3 || abc`.
    pub(super) requests: Vec<String>,
    /// How many of the bytes those are.
    pub(super) parsed: usize,
    /// Something is not by the letter.
    pub(super) malformed: bool,
}

/// What the node says to a request whose target begins with `/evil`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Script {
    pub(super) bytes: &'static [u8],
    /// So often.
    pub(super) times: usize,
    /// As soon as the head is there.
    pub(super) early: bool,
    /// Sent when the client has the answer.
    pub(super) later: &'static [u8],
    /// Closes then.
    pub(super) closes: bool,
}

#[derive(Clone)]
pub(super) struct Node {
    pub(super) address: SocketAddr,
    came: Arc<Mutex<Came>>,
    script: Arc<Mutex<Script>>,
    later: Arc<tokio::sync::Semaphore>,
    done: Arc<tokio::sync::Semaphore>,
}

impl Node {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let node = Self {
            address: listener.local_addr().expect("bound"),
            came: Arc::default(),
            script: Arc::default(),
            later: Arc::new(tokio::sync::Semaphore::new(0)),
            done: Arc::new(tokio::sync::Semaphore::new(0)),
        };
        let this = node.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let this = this.clone();
                tokio::spawn(async move { this.serve(stream).await });
            }
        });
        node
    }

    pub(super) fn says(&self, script: Script) {
        *self.script.lock().expect("nobody panics") = script;
    }

    /// Sends what the script has for later, and waits until it is sent.
    pub(super) async fn says_the_rest(&self) {
        self.later.add_permits(1);
        self.done.acquire().await.expect("it stays open").forget();
    }

    /// Takes what came so far.
    pub(super) fn take(&self) -> Came {
        std::mem::take(&mut *self.came.lock().expect("nobody panics"))
    }

    async fn serve(&self, stream: TcpStream) -> Option<()> {
        let came = Arc::clone(&self.came);
        let mut wire = Wire { stream, ahead: Vec::new(), came, taken: 0 };
        loop {
            let head = wire.until(b"\r\n\r\n").await.ok()?;
            let head = String::from_utf8_lossy(&head).into_owned();
            let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
            let script = *self.script.lock().expect("nobody panics");
            let is_evil = target.starts_with("/evil");
            if !(is_evil && script.early) {
                let request = wire.rest_of(&head).await;
                let mut came = self.came.lock().expect("nobody panics");
                match request {
                    Ok(request) => {
                        came.requests.push(request);
                        came.parsed += std::mem::take(&mut wire.taken);
                    }
                    Err(ended) => {
                        came.malformed |= ended == Ended::Malformed;
                        return None;
                    }
                }
            }
            if !is_evil {
                let clean = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nclean";
                wire.stream.write_all(clean).await.ok()?;
                continue;
            }
            for _ in 0..script.times.max(1) {
                wire.stream.write_all(script.bytes).await.ok()?;
            }
            if !script.later.is_empty() {
                self.later.acquire().await.ok()?.forget();
                wire.stream.write_all(script.later).await.ok()?;
                self.done.add_permits(1);
            }
            if script.closes {
                wire.stream.shutdown().await.ok()?;
                // So that nothing is reset before it was read.
                while wire.more().await.is_ok() {}
                return None;
            }
            if script.early {
                while wire.more().await.is_ok() {}
                return None;
            }
        }
    }
}

/// Why there is no request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ended {
    Early,
    Malformed,
}

struct Wire {
    stream: TcpStream,
    ahead: Vec<u8>,
    came: Arc<Mutex<Came>>,
    /// Of the request so far.
    taken: usize,
}

impl Wire {
    async fn more(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        let n = self.stream.read(&mut buffer).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.came.lock().expect("nobody panics").raw.extend_from_slice(&buffer[..n]);
        self.ahead.extend_from_slice(&buffer[..n]);
        Ok(())
    }

    async fn until(&mut self, end: &[u8]) -> Result<Vec<u8>, Ended> {
        loop {
            if let Some(at) = self.ahead.windows(end.len()).position(|window| window == end) {
                self.taken += at + end.len();
                return Ok(self.ahead.drain(..at + end.len()).collect());
            }
            self.more().await.map_err(|_error| Ended::Early)?;
        }
    }

    async fn exactly(&mut self, n: usize) -> Result<Vec<u8>, Ended> {
        while self.ahead.len() < n {
            self.more().await.map_err(|_error| Ended::Early)?;
        }
        self.taken += n;
        Ok(self.ahead.drain(..n).collect())
    }

    /// A line without its CRLF, if there is nothing in it that may not be.
    async fn line(&mut self) -> Result<String, Ended> {
        let line = self.until(b"\r\n").await?;
        let line = String::from_utf8_lossy(&line[..line.len() - 2]).into_owned();
        if line.contains(|c: char| c.is_control() && c != '\t') {
            return Err(Ended::Malformed);
        }
        Ok(line)
    }

    /// The request with its body, in one line.
    async fn rest_of(&mut self, head: &str) -> Result<String, Ended> {
        let mut lines = head.trim_end().split("\r\n");
        let mut shown = lines.next().ok_or(Ended::Malformed)?.to_owned();
        let (mut length, mut chunked) = (0, false);
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(Ended::Malformed)?;
            let (name, value) =
                (name.to_ascii_lowercase(), value.strip_prefix(' ').unwrap_or(value));
            match &*name {
                "content-length" => length = value.parse().map_err(|_error| Ended::Malformed)?,
                "transfer-encoding" => chunked = value == "chunked",
                _ => {}
            }
            if !IS_LITEGATES.contains(&&*name) {
                let _ = write!(shown, " | {name}: {value}");
            }
        }
        let mut body = Vec::new();
        let (mut extensions, mut trailers) = (String::new(), String::new());
        if chunked {
            loop {
                let line = self.line().await?;
                let (size, extension) = line.split_once(';').unwrap_or((&line, ""));
                extensions.push_str(extension);
                let is_number = size.chars().all(|digit| digit.is_ascii_hexdigit());
                let size = usize::from_str_radix(size, 16).ok().filter(|_| is_number);
                let size = size.ok_or(Ended::Malformed)?;
                if size == 0 {
                    break;
                }
                body.extend(self.exactly(size).await?);
                if self.exactly(2).await? != b"\r\n" {
                    return Err(Ended::Malformed);
                }
            }
            loop {
                let line = self.line().await?;
                if line.is_empty() {
                    break;
                }
                let _ = write!(trailers, " | {line}");
            }
        } else {
            body = self.exactly(length).await?;
        }
        if chunked || length > 0 {
            let _ = write!(shown, " || {}", String::from_utf8_lossy(&body));
        }
        if !extensions.is_empty() {
            let _ = write!(shown, " ; {extensions}");
        }
        shown.push_str(&trailers);
        Ok(shown)
    }
}

/// What a proxy adds by right.
const IS_LITEGATES: &[&str] = &[
    "via",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-real-ip",
];
