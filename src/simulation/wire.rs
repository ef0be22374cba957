//! Just enough HTTP/1.1, for simulated nodes and clients.

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::AsyncReadExt as _;

use crate::net::Stream;

/// A head, and what follows it.
#[derive(Debug)]
pub(super) struct Head {
    first: String,
    pub(super) fields: HeaderMap,
}

/// A head with its whole body.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) head: Head,
    pub(super) body: Bytes,
}

impl Message {
    /// `None`: the connection ended before it was complete.
    pub(super) async fn read(stream: &mut Stream, ahead: &mut BytesMut) -> Option<Self> {
        let head = head_of(stream, ahead).await?;
        let body = head.rest(stream, ahead).await?;
        Some(Self { head, body })
    }

    pub(super) fn path(&self) -> &str {
        self.head.path()
    }
}

async fn more(stream: &mut Stream, ahead: &mut BytesMut) -> Option<()> {
    (stream.read_buf(ahead).await.ok()? > 0).then_some(())
}

async fn line(stream: &mut Stream, ahead: &mut BytesMut) -> Option<String> {
    loop {
        if let Some(end) = ahead.windows(2).position(|two| two == b"\r\n") {
            let line = ahead.split_to(end);
            ahead.advance(2);
            return String::from_utf8(line.to_vec()).ok();
        }
        more(stream, ahead).await?;
    }
}

pub(super) async fn head_of(stream: &mut Stream, ahead: &mut BytesMut) -> Option<Head> {
    let first = line(stream, ahead).await?;
    let mut fields = HeaderMap::new();
    loop {
        let next = line(stream, ahead).await?;
        if next.is_empty() {
            return Some(Head { first, fields });
        }
        let (name, value) = next.split_once(':')?;
        let name = HeaderName::try_from(name).ok()?;
        fields.append(name, HeaderValue::try_from(value.trim()).ok()?);
    }
}

impl Head {
    pub(super) fn path(&self) -> &str {
        self.first.split(' ').nth(1).unwrap_or_default()
    }

    pub(super) fn is_get(&self) -> bool {
        self.first.starts_with("GET ")
    }

    pub(super) fn status(&self) -> Option<u16> {
        self.first.split(' ').nth(1)?.parse().ok()
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.fields.get(name)?.to_str().ok()
    }

    /// The transaction that LiteFS's cookie asks for.
    pub(super) fn txid(&self) -> u64 {
        let cookies = self.fields.get_all("cookie").iter().filter_map(|line| line.to_str().ok());
        let mut pairs = cookies.flat_map(|line| line.split(';').map(str::trim));
        let cookie = pairs.find_map(|pair| pair.strip_prefix("__txid="));
        cookie.and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0)
    }

    /// The body.
    pub(super) async fn rest(&self, stream: &mut Stream, ahead: &mut BytesMut) -> Option<Bytes> {
        if self.text("transfer-encoding") == Some("chunked") {
            let mut whole = BytesMut::new();
            loop {
                let size = usize::from_str_radix(&line(stream, ahead).await?, 16).ok()?;
                while ahead.len() < size + 2 {
                    more(stream, ahead).await?;
                }
                whole.extend_from_slice(&ahead.split_to(size));
                ahead.advance(2);
                if size == 0 {
                    return Some(whole.freeze());
                }
            }
        }
        let length = self.text("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        while ahead.len() < length {
            more(stream, ahead).await?;
        }
        Some(ahead.split_to(length).freeze())
    }
}
