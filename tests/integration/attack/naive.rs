//! A forwarder as one writes it in an afternoon: it reads leniently, passes on the bytes that it
//! got, and keeps its connections to the node. Every row of the suite has to fail against it.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

pub(super) async fn start(node: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let address = listener.local_addr().expect("bound");
    let pool = Arc::new(Mutex::new(Vec::new()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let client = Wire { stream, ahead: Vec::new() };
            tokio::spawn(serve(client, node, Arc::clone(&pool)));
        }
    });
    address
}

type Pool = Arc<Mutex<Vec<Wire>>>;

async fn serve(mut client: Wire, node: SocketAddr, pool: Pool) -> io::Result<()> {
    if client.peek(3).await? == b"PRI" {
        return serve_h2(client, node, pool).await;
    }
    loop {
        let (request, _) = client.message(None).await?;
        let is_head = request.starts_with(b"HEAD");
        let (head, body) = exchange(&request, is_head, node, &pool).await?;
        let first = head.lines().next().unwrap_or_default().to_owned();
        let length = body.len();
        let fields = head.lines().skip(1).filter(|line| {
            let line = line.to_ascii_lowercase();
            !line.is_empty() && !line.starts_with("content-length") && !line.starts_with("transfer")
        });
        let fields: Vec<_> = std::iter::once(&*first).chain(fields).collect();
        let head = format!("{}\r\ncontent-length: {length}\r\n\r\n", fields.join("\r\n"));
        client.stream.write_all(head.as_bytes()).await?;
        client.stream.write_all(&body).await?;
    }
}

/// Sends a request over whichever connection there is, and takes what comes for its answer.
async fn exchange(
    request: &[u8],
    is_head: bool,
    node: SocketAddr,
    pool: &Pool,
) -> io::Result<(String, Vec<u8>)> {
    let pooled = pool.lock().expect("nobody panics").pop();
    let mut wire = match pooled {
        Some(wire) => wire,
        None => Wire { stream: TcpStream::connect(node).await?, ahead: Vec::new() },
    };
    wire.stream.write_all(request).await?;
    let (answer, head) = wire.message(Some(is_head)).await?;
    let body = answer.get(head..).unwrap_or_default().to_vec();
    let head = String::from_utf8_lossy(answer.get(..head).unwrap_or_default()).into_owned();
    pool.lock().expect("nobody panics").push(wire);
    Ok((head, body))
}

/// HTTP/2 with fields that are all spelled out, as the suite sends them, made HTTP/1.1 of.
async fn serve_h2(mut client: Wire, node: SocketAddr, pool: Pool) -> io::Result<()> {
    client.exactly(24).await?;
    client.stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
    let (mut line, mut fields, mut body) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let head = client.exactly(9).await?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let payload = client.exactly(length).await?;
        match head[3] {
            0 => body.extend(payload),
            1 => {
                let mut rest = &payload[..];
                let text = |rest: &mut &[u8]| {
                    let (text, after) = rest[1..].split_at(usize::from(rest[0]));
                    *rest = after;
                    String::from_utf8_lossy(text).into_owned()
                };
                let mut pseudo = [String::new(), String::new()];
                while !rest.is_empty() {
                    rest = &rest[1..];
                    let (name, value) = (text(&mut rest), text(&mut rest));
                    match &*name {
                        ":method" => pseudo[0] = value,
                        ":path" => pseudo[1] = value,
                        ":authority" => fields.push(format!("host: {value}\r\n")),
                        ":scheme" => {}
                        _ => fields.push(format!("{name}: {value}\r\n")),
                    }
                }
                line = format!("{} {} HTTP/1.1\r\n", pseudo[0], pseudo[1]).into_bytes();
            }
            _ => continue,
        }
        if head[4] & 1 == 0 {
            continue;
        }
        let request = [&line[..], fields.concat().as_bytes(), b"\r\n", &body].concat();
        let (_, answer) = exchange(&request, false, node, &pool).await?;
        client.stream.write_all(&[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88]).await?;
        let length = u8::try_from(answer.len()).unwrap_or(u8::MAX);
        client.stream.write_all(&[0, 0, length, 0, 1, 0, 0, 0, 1]).await?;
        client.stream.write_all(&answer).await?;
    }
}

struct Wire {
    stream: TcpStream,
    ahead: Vec<u8>,
}

impl Wire {
    async fn more(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        let n = self.stream.read(&mut buffer).await?;
        self.ahead.extend_from_slice(&buffer[..n]);
        if n > 0 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    async fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        while self.ahead.len() < n {
            self.more().await?;
        }
        Ok(&self.ahead[..n])
    }

    async fn exactly(&mut self, n: usize) -> io::Result<Vec<u8>> {
        self.peek(n).await?;
        Ok(self.ahead.drain(..n).collect())
    }

    async fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = self.ahead.iter().position(|byte| *byte == b'\n') {
                return Ok(self.ahead.drain(..=at).collect());
            }
            self.more().await?;
        }
    }

    /// The next message as it came, and how long its head is. `answers_head` of an answer: whether
    /// it was asked for by HEAD.
    async fn message(&mut self, answers_head: Option<bool>) -> io::Result<(Vec<u8>, usize)> {
        let (mut message, mut length, mut chunked) = (Vec::new(), None, false);
        loop {
            let line = self.line().await?;
            message.extend_from_slice(&line);
            let line = String::from_utf8_lossy(&line).to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(digits(value, 10));
            } else if line.starts_with("transfer-encoding") && line.contains("chunked") {
                chunked = true;
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let head = message.len();
        // Of an answer, what is in the chunks: it gets a length, however much of it came.
        let is_answer = answers_head.is_some();
        if answers_head == Some(true) {
        } else if let Some(length) = length {
            self.body(length, is_answer, &mut message).await?;
        } else if chunked {
            loop {
                let line = match self.line().await {
                    Err(_) if is_answer => break,
                    line => line?,
                };
                let size = digits(&String::from_utf8_lossy(&line), 16);
                message.extend(line.into_iter().filter(|_| !is_answer));
                self.body(size, is_answer, &mut message).await?;
                let end = match self.line().await {
                    Err(_) if is_answer => break,
                    line => line?,
                };
                let is_last = size == 0 && end.len() <= 2;
                message.extend(end.into_iter().filter(|_| !is_answer));
                if is_last {
                    break;
                }
            }
        }
        Ok((message, head))
    }

    /// So many bytes, or of an answer what there is of them.
    async fn body(&mut self, n: usize, is_answer: bool, message: &mut Vec<u8>) -> io::Result<()> {
        while self.ahead.len() < n {
            match self.more().await {
                Err(_) if is_answer => break,
                more => more?,
            }
        }
        message.extend(self.ahead.drain(..n.min(self.ahead.len())));
        Ok(())
    }
}

/// As far as they go, like `strtol`.
fn digits(text: &str, radix: u32) -> usize {
    let text = text.trim().trim_start_matches(['+', '-']);
    let text = text.strip_prefix("0x").unwrap_or(text);
    let end = text.find(|c: char| !c.is_digit(radix)).unwrap_or(text.len());
    let number = i64::from_str_radix(&text[..end], radix).unwrap_or(0);
    usize::try_from(number).unwrap_or(0).min(1 << 20)
}
