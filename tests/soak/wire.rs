//! Well-behaved clients' connections: HTTP/1.1 and HTTP/2, in the clear and in TLS.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ::http::{HeaderMap, Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
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

use crate::judge::{Asked, End};

/// Longer than everything that litegate waits for. Who waits longer has been forgotten.
pub(crate) const PATIENCE: Duration = Duration::from_secs(110);

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// How to speak.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Via {
    H1,
    H1Tls,
    H2,
    H2Tls,
}

impl Via {
    pub(crate) const ALL: [Self; 4] = [Self::H1, Self::H1Tls, Self::H2, Self::H2Tls];

    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::H1Tls | Self::H2Tls)
    }

    pub(crate) fn is_h2(self) -> bool {
        matches!(self, Self::H2 | Self::H2Tls)
    }
}

/// Where litegate listens.
#[derive(Clone, Debug)]
pub(crate) struct Doors {
    pub(crate) clear: SocketAddr,
    pub(crate) tls: SocketAddr,
    pub(crate) h1: Arc<ClientConfig>,
    pub(crate) h2: Arc<ClientConfig>,
}

pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Doors {
    /// A new connection, TLS done. Whatever goes wrong here is litegate's fault.
    pub(crate) async fn open(&self, via: Via) -> Result<Box<dyn Stream>, End> {
        let to = if via.is_tls() { self.tls } else { self.clear };
        let connected = async {
            let socket = TcpStream::connect(to).await?;
            socket.set_nodelay(true)?;
            if !via.is_tls() {
                return Ok(Box::new(socket) as Box<dyn Stream>);
            }
            let config = if via.is_h2() { &self.h2 } else { &self.h1 };
            let name = ServerName::try_from("app.test").expect("a name");
            let secure = TlsConnector::from(Arc::clone(config)).connect(name, socket).await?;
            Ok::<_, std::io::Error>(Box::new(secure) as Box<dyn Stream>)
        };
        match timeout(PATIENCE, connected).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(End::Wrong(format!("connect: {error}"))),
            Err(_) => Err(End::Wrong("connect: never".to_owned())),
        }
    }
}

enum Sender {
    H1(http1::SendRequest<Body>),
    H2(http2::SendRequest<Body>),
}

/// One client's connection, made anew when it is not there.
pub(crate) struct Wire {
    doors: Doors,
    pub(crate) via: Via,
    conn: Option<(Sender, JoinHandle<()>)>,
    /// Requests on this connection.
    used: usize,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.close();
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: HeaderMap,
}

impl Wire {
    pub(crate) fn new(doors: &Doors, via: Via) -> Self {
        Self { doors: doors.clone(), via, conn: None, used: 0 }
    }

    /// Leaves.
    pub(crate) fn close(&mut self) {
        if let Some((_, driver)) = self.conn.take() {
            driver.abort();
        }
    }

    async fn ready(&mut self) -> Result<(), End> {
        // Clients come and go: no connection is used for ever.
        if self.used > 60 {
            self.close();
        }
        if let Some((sender, _)) = &mut self.conn {
            let ready = match sender {
                Sender::H1(sender) => sender.ready().await,
                Sender::H2(sender) => sender.ready().await,
            };
            if ready.is_ok() {
                return Ok(());
            }
            self.close();
        }
        let io = TokioIo::new(self.doors.open(self.via).await?);
        let wrong = |error: hyper::Error| End::Wrong(format!("handshake: {error:?}"));
        let conn = if self.via.is_h2() {
            let (sender, driver) =
                http2::handshake(TokioExecutor::new(), io).await.map_err(wrong)?;
            (Sender::H2(sender), tokio::spawn(async move { drop(driver.await) }))
        } else {
            let (sender, driver) = http1::handshake(io).await.map_err(wrong)?;
            (Sender::H1(sender), tokio::spawn(async move { drop(driver.await) }))
        };
        self.conn = Some(conn);
        self.used = 0;
        Ok(())
    }

    /// Sends it, and waits for the head of the answer.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        host: &str,
        target: &str,
        fields: &[(&str, &str)],
        body: Body,
    ) -> Result<Response<Incoming>, End> {
        self.ready().await?;
        self.used += 1;
        let scheme = if self.via.is_tls() { "https" } else { "http" };
        let uri =
            if self.via.is_h2() { format!("{scheme}://{host}{target}") } else { target.to_owned() };
        let mut request = Request::builder().method(method).uri(uri);
        if !self.via.is_h2() {
            request = request.header("host", host);
        }
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let request = request.body(body).expect("a request");
        let began = Instant::now();
        let sent = async {
            match &mut self.conn.as_mut().expect("it is ready").0 {
                Sender::H1(sender) => sender.send_request(request).await,
                Sender::H2(sender) => sender.send_request(request).await,
            }
        };
        match timeout(PATIENCE, sent).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let used = self.used;
                self.close();
                Err(End::Wrong(format!("no answer to request {used} of its connection: {error:?}")))
            }
            Err(_) => {
                self.close();
                Err(End::Wrong(format!("no answer in {:?}", began.elapsed())))
            }
        }
    }

    /// Sends it, and waits for all of the answer. `asked` learns who that came from.
    pub(crate) async fn ask(
        &mut self,
        asked: &mut Asked,
        method: &str,
        target: &str,
        fields: &[(&str, &str)],
        body: Body,
    ) -> Result<Answer, End> {
        let response = self.send(method, "app.test", target, fields, body).await?;
        asked.node = node(response.headers());
        self.whole(response).await
    }

    /// The rest of an answer.
    pub(crate) async fn whole(&mut self, response: Response<Incoming>) -> Result<Answer, End> {
        let (head, body) = response.into_parts();
        match timeout(PATIENCE, body.collect()).await {
            Ok(Ok(all)) => {
                let trailers = all.trailers().cloned().unwrap_or_default();
                let body = all.to_bytes();
                Ok(Answer { status: head.status.as_u16(), head: head.headers, body, trailers })
            }
            Ok(Err(error)) => {
                self.broke();
                Err(End::Cut(format!("{error:?}")))
            }
            Err(_) => {
                self.close();
                Err(End::Wrong("the answer never ended".to_owned()))
            }
        }
    }

    /// An answer broke off: HTTP/1.1 has nothing more to say on this connection.
    pub(crate) fn broke(&mut self) {
        if !self.via.is_h2() {
            self.close();
        }
    }
}

impl Answer {
    /// What is promised of an answer, whatever it says; then whether it is `status`.
    pub(crate) fn end(&self, status: u16) -> End {
        if self.head.keys().any(|name| name.as_str().starts_with("fly-replay")) {
            return End::Wrong("a fly-replay field came through".to_owned());
        }
        if self.head.contains_key(crate::relay::MARK) {
            return End::Deceived;
        }
        if self.status == status {
            return End::Fine;
        }
        End::Refused(self.status, word(&self.body))
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.head.get(name)?.to_str().ok()
    }
}

pub(crate) fn node(head: &HeaderMap) -> Option<String> {
    head.get("abaci-node")?.to_str().ok().map(str::to_owned)
}

/// Why a request failed: the `error` of a problem, or what the app says.
pub(crate) fn word(body: &[u8]) -> String {
    let value: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let word = value.as_ref().and_then(|value| value["error"].as_str());
    word.map_or_else(|| String::from_utf8_lossy(&body[..body.len().min(200)]).into(), str::to_owned)
}

pub(crate) fn nothing() -> Body {
    Empty::new().boxed_unsync()
}

pub(crate) fn bytes(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}
