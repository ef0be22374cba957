//! One client of the judge, by HTTP/1.1 or, where TLS agrees on it, HTTP/2: kept-alive connections,
//! what it carries from answer to request, and nothing repeated that a server may have seen.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::memory::Memory;

/// The longest body that is read.
const BODY: usize = 8 << 20;

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Target {
    /// By TLS.
    secure: bool,
    host: String,
    port: u16,
    authority: HeaderValue,
    /// What every path begins with, without a slash at its end.
    prefix: String,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("not a URL: {text}: {error}"))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(format!("write it like http://litegate.example:8080, not {text}")),
        };
        let authority = uri.authority().ok_or(format!("no host in {text}"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let authority = HeaderValue::try_from(authority.as_str())
            .map_err(|error| format!("not a host: {text}: {error}"))?;
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { secure, host, port, authority, prefix })
    }
}

impl Target {
    /// Whether TLS is spoken there.
    pub fn is_secure(&self) -> bool {
        self.secure
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    targets: Arc<[Target]>,
    /// A `Host` for all targets.
    host: Option<HeaderValue>,
    tls: Option<Arc<ClientConfig>>,
    limit: Duration,
    memory: Memory,
    connections: Vec<Option<Connection>>,
    turn: usize,
}

#[derive(Debug)]
struct Connection {
    sender: Sender,
    driver: JoinHandle<()>,
}

type Message = Request<Full<Bytes>>;

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    H2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn ready(&mut self) -> hyper::Result<()> {
        match self {
            Self::Http1(sender) => sender.ready().await,
            Self::H2(sender) => sender.ready().await,
        }
    }

    async fn send(
        &mut self,
        message: Message,
    ) -> Result<Response<Incoming>, TrySendError<Message>> {
        match self {
            Self::Http1(sender) => sender.try_send_request(message).await,
            Self::H2(sender) => sender.try_send_request(message).await,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    /// `turn`: which target is first; each request goes to the next.
    pub(super) fn new(
        targets: Arc<[Target]>,
        host: Option<HeaderValue>,
        tls: Option<Arc<ClientConfig>>,
        limit: Duration,
        memory: Memory,
        turn: usize,
    ) -> Self {
        let connections = targets.iter().map(|_| None).collect();
        Self { targets, host, tls, limit, memory, connections, turn }
    }

    /// Sends a request to the next target. The number is the target's.
    pub(super) async fn send(
        &mut self,
        method: &Method,
        path: &str,
        content_type: &str,
        body: Option<String>,
    ) -> (u32, Result<Answer, Arc<str>>) {
        let at = self.turn % self.targets.len().max(1);
        self.turn = self.turn.wrapping_add(1);
        let limit = self.limit;
        let exchange = self.exchange(at, method, path, content_type, body);
        let answer = timeout(limit, exchange).await.unwrap_or_else(|_| Err("timeout".into()));
        match &answer {
            Ok(answer) => self.memory.learn(&answer.headers),
            // Whatever is still under way there is not ours any more.
            Err(_) => self.connections.iter_mut().skip(at).take(1).for_each(|c| *c = None),
        }
        (u32::try_from(at).unwrap_or(u32::MAX), answer)
    }

    async fn exchange(
        &mut self,
        at: usize,
        method: &Method,
        path: &str,
        content_type: &str,
        body: Option<String>,
    ) -> Result<Answer, Arc<str>> {
        let Some(target) = self.targets.get(at).cloned() else { return Err("no target".into()) };
        let host = self.host.as_ref().unwrap_or(&target.authority);
        let mut head = HeaderMap::new();
        head.insert(header::USER_AGENT, HeaderValue::from_static("litegate-verify"));
        if body.is_some()
            && let Ok(content_type) = HeaderValue::from_str(content_type)
        {
            head.insert(header::CONTENT_TYPE, content_type);
        }
        self.memory.tell(&mut head);
        let body = Bytes::from(body.unwrap_or_default());
        let message = |sender: &Sender| -> Result<Message, Arc<str>> {
            let mut message = Request::new(Full::new(body.clone()));
            *message.method_mut() = method.clone();
            message.headers_mut().clone_from(&head);
            let uri = match sender {
                Sender::Http1(_) => {
                    message.headers_mut().insert(header::HOST, host.clone());
                    format!("{}{path}", target.prefix)
                }
                // RFC 9113 section 8.3.1: the authority is there instead.
                Sender::H2(_) => {
                    let authority = host.to_str().map_err(|_| "the Host is not text")?;
                    format!("https://{authority}{}{path}", target.prefix)
                }
            };
            *message.uri_mut() = uri.parse().map_err(|error| format!("not a request: {error}"))?;
            Ok(message)
        };

        let mut kept = self.connections.get_mut(at).and_then(Option::take);
        let (response, connection) = loop {
            let is_kept = kept.is_some();
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => connect(&target, host, self.tls.as_ref()).await?,
            };
            if connection.sender.ready().await.is_err() && is_kept {
                // The server has closed an idle connection.
                continue;
            }
            let message = message(&connection.sender)?;
            match connection.sender.send(message).await {
                Ok(response) => break (response, connection),
                // Not a byte of it was sent.
                Err(error) if is_kept && error.message().is_some() => {}
                Err(_) => return Err("the connection broke".into()),
            }
        };
        let (head, body) = response.into_parts();
        let body = Limited::new(body, BODY).collect().await;
        let body = body.map_err(|_| "the answer broke off")?.to_bytes();
        if let Some(place) = self.connections.get_mut(at) {
            *place = Some(connection);
        }
        Ok(Answer { status: head.status, headers: head.headers, body })
    }
}

async fn connect(
    target: &Target,
    host: &HeaderValue,
    tls: Option<&Arc<ClientConfig>>,
) -> Result<Connection, Arc<str>> {
    let failed = |error: std::io::Error| format!("connect: {}", error.kind());
    let stream = TcpStream::connect((&*target.host, target.port)).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    if !target.secure {
        return speak(stream, false).await;
    }
    let tls = tls.ok_or("connect: no TLS to speak")?;
    // Where the URL is an address, the certificate is that of the host that is asked for.
    let host: Option<Uri> = host.to_str().ok().and_then(|host| host.parse().ok());
    let host = host.as_ref().and_then(Uri::host).unwrap_or(&target.host);
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
        .map_err(|error| format!("connect: TLS: {host}: {error}"))?;
    let session = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
    let session = session.map_err(|error| format!("connect: TLS: {error}"))?;
    let h2 = session.get_ref().1.alpn_protocol() == Some(b"h2");
    speak(session, h2).await
}

async fn speak<T>(stream: T, h2: bool) -> Result<Connection, Arc<str>>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (io, failed) = (TokioIo::new(stream), |error| format!("connect: {error}"));
    // How a driver ended is what the request sees.
    if h2 {
        let (sender, driver) = http2::handshake(TokioExecutor::new(), io).await.map_err(failed)?;
        let driver = tokio::spawn(async move { drop(driver.await) });
        return Ok(Connection { sender: Sender::H2(sender), driver });
    }
    let (sender, driver) = http1::handshake(io).await.map_err(failed)?;
    let driver = tokio::spawn(async move { drop(driver.await) });
    Ok(Connection { sender: Sender::Http1(sender), driver })
}
