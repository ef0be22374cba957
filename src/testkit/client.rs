//! A small HTTP/1.1 client that knows exactly what it sends and where an answer ends.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A connection.
#[derive(Debug)]
pub struct Conn {
    /// The socket.
    pub stream: TcpStream,
    ahead: Vec<u8>,
}

/// A whole answer.
#[derive(Clone, Debug, Default)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Fields, names lower-cased.
    pub fields: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// Trailer fields.
    pub trailers: Vec<(String, String)>,
    /// Whether the body ended as it should.
    pub complete: bool,
}

impl Response {
    /// The first field of that name.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| &**value)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Conn {
    /// Connects.
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, ahead: Vec::new() })
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref()).await
    }

    /// Sends a request with a body.
    pub async fn request(
        &mut self,
        method: &str,
        target: &str,
        fields: &str,
        body: &[u8],
    ) -> io::Result<Response> {
        let head = format!(
            "{method} {target} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n{fields}\r\n",
            body.len()
        );
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        // Whoever refuses an upload answers first and closes then: the answer may still be there.
        let sent = self.send(bytes).await;
        let response = self.response(method == "HEAD").await;
        sent.or_else(|error| if response.is_ok() { Ok(()) } else { Err(error) })?;
        response
    }

    async fn more(&mut self) -> io::Result<bool> {
        let mut buffer = vec![0; 16 << 10];
        let n = self.stream.read(&mut buffer).await?;
        self.ahead.extend_from_slice(buffer.get(..n).unwrap_or_default());
        Ok(n > 0)
    }

    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(at) = self.ahead.windows(2).position(|window| window == b"\r\n") {
                let line: Vec<u8> = self.ahead.drain(..at + 2).collect();
                return Ok(String::from_utf8_lossy(line.trim_ascii_end()).into_owned());
            }
            if !self.more().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    async fn fields(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(fields);
            }
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// Reads a head, interim or final.
    pub async fn head(&mut self) -> io::Result<Response> {
        let status = self.line().await?;
        if !status.starts_with("HTTP/") {
            return Err(io::Error::new(io::ErrorKind::InvalidData, status));
        }
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        Ok(Response { status, fields: self.fields().await?, ..Response::default() })
    }

    /// Reads an answer; interim ones are passed over. `bodiless`: it was asked for by HEAD.
    pub async fn response(&mut self, bodiless: bool) -> io::Result<Response> {
        let mut response = self.head().await?;
        while (102..200).contains(&response.status) || response.status == 100 {
            response = self.head().await?;
        }
        response.complete = true;
        if bodiless || matches!(response.status, 101 | 204 | 304) {
            return Ok(response);
        }
        if response.field("transfer-encoding").is_some() {
            response.complete = self.chunks(&mut response).await.is_ok();
        } else if let Some(length) = response.field("content-length") {
            let length: usize = length.parse().unwrap_or(0);
            while self.ahead.len() < length {
                if !self.more().await.unwrap_or(false) {
                    response.complete = false;
                    break;
                }
            }
            response.body = self.ahead.drain(..length.min(self.ahead.len())).collect();
        } else {
            loop {
                match self.more().await {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => {
                        response.complete = false;
                        break;
                    }
                }
            }
            response.body = std::mem::take(&mut self.ahead);
        }
        Ok(response)
    }

    async fn chunks(&mut self, response: &mut Response) -> io::Result<()> {
        loop {
            let line = self.line().await?;
            let size = usize::from_str_radix(line.split(';').next().unwrap_or("").trim(), 16)
                .map_err(io::Error::other)?;
            if size == 0 {
                response.trailers = self.fields().await?;
                return Ok(());
            }
            while self.ahead.len() < size + 2 {
                if !self.more().await? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            response.body.extend(self.ahead.drain(..size));
            self.ahead.drain(..2);
        }
    }
}

/// One request on a connection of its own.
pub async fn request(
    address: SocketAddr,
    method: &str,
    target: &str,
    fields: &str,
    body: &[u8],
) -> io::Result<Response> {
    Conn::open(address).await?.request(method, target, fields, body).await
}
