//! Calls to LiteFS's API: small answers read whole under a bound, and the endless stream of
//! events. Everything that a node sends is hostile until parsed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use super::{CLUSTER_ID, EVENTS, Event, ID, INFO, Info, METRICS, VARS, Vars};
use crate::topology::{Claim, position::Position};

/// The largest `/info` and the longest event.
const SMALL: usize = 64 << 10;
/// The largest `/metrics`.
const LARGE: usize = 1 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No connection, or it broke.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Not HTTP.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// Not in time.
    #[error("timed out")]
    Timeout,
    /// Not 200.
    #[error("answered {0}")]
    Status(StatusCode),
    /// The process has only just begun.
    #[error("has not opened its databases yet")]
    Early,
    /// Not what LiteFS says, or more of it than it ever does.
    #[error("answered something else than LiteFS does: {0}")]
    Strange(String),
}

/// Asks a node what it is.
pub async fn info(api: SocketAddr, limit: Duration) -> Result<Claim, CallError> {
    let call = async {
        let (response, _connection) = get(api, INFO).await?;
        let (incarnation, cluster) = identity(&response);
        let body = read(response, SMALL).await?;
        let info: Info =
            serde_json::from_slice(&body).map_err(|error| CallError::Strange(error.to_string()))?;
        Ok(super::claim(incarnation, cluster, info.is_primary, &info.primary.hostname))
    };
    timeout(limit, call).await.unwrap_or(Err(CallError::Timeout))
}

/// Asks a node for its lag. `None` where it does not say.
pub async fn lag(api: SocketAddr, limit: Duration) -> Result<Option<Duration>, CallError> {
    let call = async {
        let (response, _connection) = get(api, METRICS).await?;
        let body = read(response, LARGE).await?;
        let lag = super::lag(&String::from_utf8_lossy(&body));
        Ok(lag.and_then(|lag| Duration::try_from_secs_f64(lag).ok()))
    };
    timeout(limit, call).await.unwrap_or(Err(CallError::Timeout))
}

/// A plain GET for its status: an active health probe.
pub async fn probe(address: SocketAddr, path: &str, limit: Duration) -> bool {
    let call = async { Ok::<_, CallError>(get_any(address, path).await?.0.status()) };
    matches!(timeout(limit, call).await, Ok(Ok(status)) if status.is_success())
}

/// Reads the exact positions of a node, again and again, over one connection.
#[derive(Debug)]
pub struct Positions {
    api: SocketAddr,
    kept: Option<Kept>,
}

impl Positions {
    /// Of the node whose API is there.
    pub fn of(api: SocketAddr) -> Self {
        Self { api, kept: None }
    }

    /// Every database, by name.
    pub async fn read(&mut self, limit: Duration) -> Result<Vec<(String, Position)>, CallError> {
        let kept = self.kept.take();
        let call = async {
            let (response, kept) = match again(kept, self.api).await {
                Some(answered) => answered,
                // There was none, or it was closed just then: reading twice harms nobody.
                None => open(self.api, VARS).await?,
            };
            if response.status() != StatusCode::OK {
                return Err(CallError::Status(response.status()));
            }
            let body = read(response, LARGE).await?;
            let vars: Vars = serde_json::from_slice(&body)
                .map_err(|error| CallError::Strange(error.to_string()))?;
            let mut all = Vec::new();
            for (name, db) in vars.store.ok_or(CallError::Early)?.dbs {
                // An empty database has no position yet.
                if let Some(position) = super::position(&db.txid, &db.checksum) {
                    all.push((name, position));
                }
            }
            Ok((all, kept))
        };
        let (all, kept) = timeout(limit, call).await.unwrap_or(Err(CallError::Timeout))?;
        self.kept = Some(kept);
        Ok(all)
    }
}

type Kept = (http1::SendRequest<Empty<Bytes>>, Connection);

async fn again(kept: Option<Kept>, api: SocketAddr) -> Option<(Response<Incoming>, Kept)> {
    let (mut sender, connection) = kept?;
    sender.ready().await.ok()?;
    let response = sender.send_request(request(api, VARS).ok()?).await.ok()?;
    Some((response, (sender, connection)))
}

/// What a stream of events tells.
#[derive(Debug)]
pub enum Told {
    /// What the node is.
    Claim(Claim),
    /// A database got on.
    Tx(String, Position),
}

/// A node's stream of events.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    _connection: Connection,
    line: BytesMut,
    incarnation: Option<u64>,
    cluster: Option<Arc<str>>,
}

impl Events {
    /// Opens it.
    pub async fn open(api: SocketAddr, limit: Duration) -> Result<Self, CallError> {
        let opened = timeout(limit, get(api, EVENTS)).await;
        let (response, connection) = opened.unwrap_or(Err(CallError::Timeout))?;
        let (incarnation, cluster) = identity(&response);
        let body = response.into_body();
        Ok(Self { body, _connection: connection, line: BytesMut::new(), incarnation, cluster })
    }

    /// The process that speaks (`Litefs-Id`).
    pub fn incarnation(&self) -> Option<u64> {
        self.incarnation
    }

    /// What is told next. `None` when the stream ended.
    pub async fn next(&mut self) -> Result<Option<Told>, CallError> {
        loop {
            while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line = self.line.split_to(end);
                self.line.advance(1);
                let event = serde_json::from_slice(&line)
                    .map_err(|error| CallError::Strange(error.to_string()))?;
                match event {
                    Event::Init { data } | Event::PrimaryChange { data } => {
                        let (id, cluster) = (self.incarnation, self.cluster.clone());
                        let claim = super::claim(id, cluster, data.is_primary, &data.hostname);
                        return Ok(Some(Told::Claim(claim)));
                    }
                    Event::Tx { db, data } => {
                        let position = super::position(&data.txid, &data.checksum);
                        let position =
                            position.ok_or_else(|| CallError::Strange("no position".into()))?;
                        return Ok(Some(Told::Tx(db, position)));
                    }
                    Event::Other => {}
                }
            }
            if self.line.len() > SMALL {
                return Err(CallError::Strange("a line that does not end".into()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.line.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// Ends the connection's task with the call.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn get(api: SocketAddr, path: &str) -> Result<(Response<Incoming>, Connection), CallError> {
    let (response, connection) = get_any(api, path).await?;
    match response.status() {
        StatusCode::OK => Ok((response, connection)),
        other => Err(CallError::Status(other)),
    }
}

async fn get_any(
    address: SocketAddr,
    path: &str,
) -> Result<(Response<Incoming>, Connection), CallError> {
    let (response, (_sender, connection)) = open(address, path).await?;
    Ok((response, connection))
}

fn request(address: SocketAddr, path: &str) -> Result<Request<Empty<Bytes>>, CallError> {
    Request::get(path)
        .header(header::HOST, address.to_string())
        .body(Empty::new())
        .map_err(|error| CallError::Strange(error.to_string()))
}

async fn open(address: SocketAddr, path: &str) -> Result<(Response<Incoming>, Kept), CallError> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    // A peer that vanished without a word is told from an idle one by the kernel.
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(2))
        .with_interval(Duration::from_secs(1))
        .with_retries(3);
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    let (mut sender, driver) =
        http1::Builder::new().max_buf_size(LARGE).handshake(TokioIo::new(stream)).await?;
    let connection = Connection(tokio::spawn(async move {
        // How it ended is what the call sees.
        let _ = driver.await;
    }));
    let response = sender.send_request(request(address, path)?).await?;
    Ok((response, (sender, connection)))
}

fn identity<B>(response: &Response<B>) -> (Option<u64>, Option<Arc<str>>) {
    let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let incarnation = text(ID).and_then(|id| u64::from_str_radix(id, 16).ok());
    let cluster = text(CLUSTER_ID).filter(|id| !id.is_empty()).map(Arc::from);
    (incarnation, cluster)
}

async fn read(response: Response<Incoming>, most: usize) -> Result<Bytes, CallError> {
    match Limited::new(response.into_body(), most).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(CallError::Strange(error.to_string())),
    }
}
