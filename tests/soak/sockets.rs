//! WebSockets over HTTP/1.1 and over streams of HTTP/2 (RFC 8441): every message has to come back.

use std::time::Duration;

use ::http::{Method, Request};
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    clients::{Client, pattern},
    judge::{Class, End},
    wire::{Doors, PATIENCE, Stream, Via, word},
};

/// How long litegate may take to offer extended CONNECT, which it says in its first frame.
const OFFER: Duration = Duration::from_secs(30);

enum Ends {
    H1(Box<dyn Stream>),
    H2(h2::SendStream<Bytes>, h2::RecvStream, tokio::task::JoinHandle<()>),
}

struct Socket {
    ends: Ends,
    came: BytesMut,
    node: Option<String>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Ends::H2(_, _, driver) = &self.ends {
            driver.abort();
        }
    }
}

pub(crate) async fn run(client: Client, via: Via, reads: bool) {
    let protocol = match via {
        Via::H1 => "websocket h1",
        Via::H1Tls => "websocket h1 tls",
        Via::H2 => "websocket h2c",
        Via::H2Tls => "websocket h2 tls",
    };
    let class = if reads { Class::Watch } else { Class::Socket };
    let host = if reads { "reads.test" } else { "app.test" };
    let mut rng = client.rng();
    while client.goes_on() {
        let asked = client.asked(protocol, class, "open".to_owned());
        let mut socket = match Socket::open(&client.doors, via, host).await {
            Ok(socket) => socket,
            Err(end) => {
                client.say(asked, end);
                client.think(&mut rng, 300).await;
                continue;
            }
        };
        client.say(asked, End::Fine);
        let mut left = rng.usize(1..80);
        while client.goes_on() && left > 0 {
            left -= 1;
            let size = if rng.u8(..) < 8 { rng.usize(..200_000) } else { rng.usize(..2_000) };
            let mut asked = client.asked(protocol, class, format!("{size} bytes"));
            asked.node.clone_from(&socket.node);
            let end = socket.echo(&pattern(rng.usize(..1000), size), rng.u32(..)).await;
            let is_over = end != End::Fine;
            client.say(asked, end);
            if is_over {
                left = 0;
            } else if left == 0 || !client.goes_on() {
                let mut asked = client.asked(protocol, class, "close".to_owned());
                asked.node.clone_from(&socket.node);
                let end = socket.close().await;
                client.say(asked, end);
                left = 0;
            } else {
                client.think(&mut rng, 100).await;
            }
        }
    }
}

impl Socket {
    async fn open(doors: &Doors, via: Via, host: &str) -> Result<Self, End> {
        let stream = doors.open(via).await?;
        let opened = async {
            if via.is_h2() { over_h2(stream, host).await } else { over_h1(stream, host).await }
        };
        match timeout(PATIENCE, opened).await {
            Ok(opened) => opened,
            Err(_) => Err(End::Wrong("never opened".to_owned())),
        }
    }

    async fn send(&mut self, opcode: u8, payload: &[u8], mask: u32) -> Result<(), String> {
        let mut frame = vec![0x80 | opcode];
        match payload.len() {
            n @ ..126 => frame.push(0x80 | n as u8),
            n @ ..65_536 => {
                frame.push(0xfe);
                frame.extend_from_slice(&(n as u16).to_be_bytes());
            }
            n => {
                frame.push(0xff);
                frame.extend_from_slice(&(n as u64).to_be_bytes());
            }
        }
        let mask = mask.to_be_bytes();
        frame.extend_from_slice(&mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        match &mut self.ends {
            Ends::H1(stream) => {
                let sent = async {
                    stream.write_all(&frame).await?;
                    // Without it TLS may keep the last of it for the next write, which never comes.
                    stream.flush().await
                };
                sent.await.map_err(|error| error.to_string())
            }
            Ends::H2(up, ..) => {
                up.send_data(frame.into(), false).map_err(|error| error.to_string())
            }
        }
    }

    /// More bytes of the other side; none at its end.
    async fn more(&mut self) -> Result<(), String> {
        match &mut self.ends {
            Ends::H1(stream) => match stream.read_buf(&mut self.came).await {
                Ok(0) => Err("the end".to_owned()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
            Ends::H2(_, down, _) => match down.data().await {
                Some(Ok(data)) => {
                    let _ = down.flow_control().release_capacity(data.len());
                    self.came.extend_from_slice(&data);
                    Ok(())
                }
                Some(Err(error)) => Err(error.to_string()),
                None => Err("the end".to_owned()),
            },
        }
    }

    /// The next frame: opcode and payload.
    async fn frame(&mut self) -> Result<(u8, Vec<u8>), String> {
        loop {
            if let Some((opcode, head, length)) = head(&self.came)
                && self.came.len() >= head + length
            {
                let frame = self.came.split_to(head + length);
                return Ok((opcode, frame[head..].to_vec()));
            }
            self.more().await?;
        }
    }

    /// A message, sent and back.
    async fn echo(&mut self, payload: &[u8], mask: u32) -> End {
        // A frame that litegate closes with may come before or instead of the echo.
        let sent = self.send(2, payload, mask).await;
        match timeout(PATIENCE, self.frame()).await {
            Ok(Ok((2, back))) if back == payload => End::Fine,
            Ok(Ok((2, back))) => End::Wrong(format!("{} other bytes came back", back.len())),
            Ok(Ok((8, code))) => {
                End::Closed(code.first_chunk().map_or(0, |c| u16::from_be_bytes(*c)))
            }
            Ok(Ok((opcode, _))) => End::Wrong(format!("a frame of kind {opcode}")),
            Ok(Err(error)) => End::Cut(format!("{error}, {sent:?}")),
            Err(_) => End::Wrong("a message never came back".to_owned()),
        }
    }

    /// Closed by us: the other side says so too, and ends.
    async fn close(&mut self) -> End {
        let _ = self.send(8, &1000_u16.to_be_bytes(), 0x0102_0304).await;
        match timeout(PATIENCE, self.frame()).await {
            Ok(Ok((8, code))) if code == 1000_u16.to_be_bytes() => End::Fine,
            Ok(Ok((8, code))) => {
                End::Closed(code.first_chunk().map_or(0, |c| u16::from_be_bytes(*c)))
            }
            Ok(Ok(other)) => End::Wrong(format!("instead of a close: {other:?}")),
            Ok(Err(error)) => End::Cut(error),
            Err(_) => End::Wrong("it was never closed".to_owned()),
        }
    }
}

/// Opcode, length of the head, and of the payload.
fn head(bytes: &[u8]) -> Option<(u8, usize, usize)> {
    let [first, second, rest @ ..] = bytes else { return None };
    let opcode = first & 0x0f;
    match second & 0x7f {
        126 => rest.first_chunk().map(|n| (opcode, 4, usize::from(u16::from_be_bytes(*n)))),
        127 => rest.first_chunk().map(|n| (opcode, 10, u64::from_be_bytes(*n) as usize)),
        n => Some((opcode, 2, usize::from(n))),
    }
}

async fn over_h1(mut stream: Box<dyn Stream>, host: &str) -> Result<Socket, End> {
    let ask = format!(
        "GET /socket HTTP/1.1\r\nhost: {host}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    let wrong = |error: std::io::Error| End::Wrong(format!("no answer to an upgrade: {error}"));
    stream.write_all(ask.as_bytes()).await.map_err(wrong)?;
    stream.flush().await.map_err(wrong)?;
    let mut came = BytesMut::new();
    let head = loop {
        let Some(at) = came.windows(4).position(|end| end == b"\r\n\r\n") else {
            if stream.read_buf(&mut came).await.map_err(wrong)? == 0 {
                return Err(End::Wrong("no answer to an upgrade".to_owned()));
            }
            continue;
        };
        let head = String::from_utf8_lossy(&came.split_to(at + 4)).to_ascii_lowercase();
        // RFC 9110 section 15.2: any number of interim answers comes first. 101 is the final one.
        if !head.starts_with("http/1.1 1") || head.starts_with("http/1.1 101") {
            break head;
        }
    };
    let field = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned())
    };
    let status: u16 = head.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0);
    if status == 101 {
        if field("sec-websocket-accept").as_deref() != Some("s3pplmbitxaq9kygzzhzrbk+xoo=") {
            return Err(End::Wrong(format!("not this handshake's answer: {head}")));
        }
        return Ok(Socket { node: field("abaci-node"), ends: Ends::H1(stream), came });
    }
    let length = field("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    while came.len() < length {
        if stream.read_buf(&mut came).await.map_err(wrong)? == 0 {
            return Err(End::Cut("in the answer to an upgrade".to_owned()));
        }
    }
    Err(End::Refused(status, word(&came)))
}

async fn over_h2(stream: Box<dyn Stream>, host: &str) -> Result<Socket, End> {
    let wrong = |error: h2::Error| End::Wrong(format!("no answer to a CONNECT: {error}"));
    let (client, connection) = h2::client::handshake(stream).await.map_err(wrong)?;
    let driver = tokio::spawn(async move { drop(connection.await) });
    let mut client = client.ready().await.map_err(wrong)?;
    let offered = async {
        while !client.is_extended_connect_protocol_enabled() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if timeout(OFFER, offered).await.is_err() {
        return Err(End::Wrong("extended CONNECT is never offered".to_owned()));
    }
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(format!("https://{host}/socket"))
        .header("sec-websocket-version", "13")
        .body(())
        .expect("a request");
    request.extensions_mut().insert(h2::ext::Protocol::from("websocket"));
    let (response, up) = client.send_request(request, false).map_err(wrong)?;
    let response = response.await.map_err(wrong)?;
    let node = crate::wire::node(response.headers());
    let status = response.status().as_u16();
    let down = response.into_body();
    let mut socket = Socket { ends: Ends::H2(up, down, driver), came: BytesMut::new(), node };
    if status == 200 {
        return Ok(socket);
    }
    loop {
        match socket.more().await {
            Ok(()) => {}
            Err(end) if end == "the end" => return Err(End::Refused(status, word(&socket.came))),
            Err(error) => return Err(End::Cut(error)),
        }
    }
}
