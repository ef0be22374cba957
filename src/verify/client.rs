//! One HTTP/1.1 client of the judge: kept-alive connections, what it carries from answer to
//! request, and nothing repeated that a server may have seen.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use super::memory::Memory;

/// The longest body that is read.
const BODY: usize = 8 << 20;

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Target {
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
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(format!("TLS is not spoken yet; give litegate's http address: {text}"));
            }
            _ => return Err(format!("write it like http://litegate.example:8080, not {text}")),
        }
        let authority = uri.authority().ok_or(format!("no host in {text}"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(80);
        let authority = HeaderValue::try_from(authority.as_str())
            .map_err(|error| format!("not a host: {text}: {error}"))?;
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { host, port, authority, prefix })
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
    limit: Duration,
    memory: Memory,
    connections: Vec<Option<Connection>>,
    turn: usize,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
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
        limit: Duration,
        memory: Memory,
        turn: usize,
    ) -> Self {
        let connections = targets.iter().map(|_| None).collect();
        Self { targets, host, limit, memory, connections, turn }
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
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", target.prefix))
            .header(header::HOST, self.host.as_ref().unwrap_or(&target.authority))
            .header(header::USER_AGENT, "litegate-verify")
            .body(Full::new(Bytes::from(body.clone().unwrap_or_default())))
            .map_err(|error| format!("not a request: {error}"))?;
        if body.is_some()
            && let Ok(content_type) = HeaderValue::from_str(content_type)
        {
            request.headers_mut().insert(header::CONTENT_TYPE, content_type);
        }
        self.memory.tell(request.headers_mut());

        let mut kept = self.connections.get_mut(at).and_then(Option::take);
        let (response, connection) = loop {
            let is_kept = kept.is_some();
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => connect(&target).await?,
            };
            if connection.sender.ready().await.is_err() && is_kept {
                // The server has closed an idle connection.
                continue;
            }
            match connection.sender.try_send_request(request).await {
                Ok(response) => break (response, connection),
                Err(mut error) => match error.take_message() {
                    // Not a byte of it was sent.
                    Some(unsent) if is_kept => request = unsent,
                    _ => return Err("the connection broke".into()),
                },
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

async fn connect(target: &Target) -> Result<Connection, Arc<str>> {
    let failed = |error: std::io::Error| format!("connect: {}", error.kind());
    let stream = TcpStream::connect((&*target.host, target.port)).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let (sender, driver) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("connect: {error}"))?;
    let driver = tokio::spawn(async move {
        // How it ended is what the request sees.
        let _ = driver.await;
    });
    Ok(Connection { sender, driver })
}
