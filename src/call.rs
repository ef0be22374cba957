//! One question to an API over HTTP/1.1, for LiteFS, Consul and probes: a connection of its own,
//! an answer read whole under a bound, and time limits by the caller. Everything that comes back
//! is hostile until parsed.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header, request};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, task::JoinHandle, time::timeout};

use crate::net::{
    Stream,
    tls::{Connector, Offer, TlsError},
};

/// The largest head of an answer.
const HEAD: usize = 1 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No connection, or it broke.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// No TLS with whoever answered.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// Not HTTP.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// Not in time.
    #[error("timed out")]
    Timeout,
    /// Not the status that was hoped for.
    #[error("answered {0}")]
    Status(StatusCode),
    /// The process has only just begun.
    #[error("has not opened its databases yet")]
    Early,
    /// Not what the API says, or more of it than it ever does.
    #[error("answered something strange: {0}")]
    Strange(String),
}

/// A connection, which ends with its owner.
#[derive(Debug)]
pub struct Connection {
    sender: http1::SendRequest<Empty<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    async fn open(
        address: SocketAddr,
        opening: &[u8],
        tls: Option<&Connector>,
    ) -> Result<Self, CallError> {
        let mut stream = Stream::connect(address).await?;
        stream.set_nodelay(true)?;
        // A peer that vanished without a word is told from an idle one by the kernel.
        stream.keep_alive(Duration::from_secs(2), Duration::from_secs(1), 3)?;
        stream.write_all(opening).await?;
        if let Some(tls) = tls {
            (stream, _) = tls.connect(stream, address, Offer::Http1).await?;
        }
        let (sender, driver) =
            http1::Builder::new().max_buf_size(HEAD).handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(async move {
            // How it ended is what the call sees.
            let _ = driver.await;
        });
        Ok(Self { sender, driver })
    }

    async fn send(
        mut self,
        request: request::Builder,
    ) -> Result<(Response<Incoming>, Self), CallError> {
        let request = request.body(Empty::new());
        let request = request.map_err(|error| CallError::Strange(error.to_string()))?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        Ok((response, self))
    }

    /// GETs a path over a connection whose last answer was read.
    pub async fn get(
        self,
        address: SocketAddr,
        path: &str,
    ) -> Result<(Response<Incoming>, Self), CallError> {
        self.send(Request::get(path).header(header::HOST, address.to_string())).await
    }
}

/// GETs a path; anything but 200 is an error.
pub async fn get(
    address: SocketAddr,
    path: &str,
) -> Result<(Response<Incoming>, Connection), CallError> {
    let (response, connection) = get_any(address, path).await?;
    match response.status() {
        StatusCode::OK => Ok((response, connection)),
        other => Err(CallError::Status(other)),
    }
}

/// GETs a path for its status alone. `opening` goes before everything, `tls` included.
pub async fn status(
    address: SocketAddr,
    path: &str,
    opening: &[u8],
    tls: Option<&Connector>,
    limit: Duration,
) -> Result<StatusCode, CallError> {
    let call = async {
        let connection = Connection::open(address, opening, tls).await?;
        Ok(connection.get(address, path).await?.0.status())
    };
    timeout(limit, call).await.unwrap_or(Err(CallError::Timeout))
}

/// GETs a path.
pub async fn get_any(
    address: SocketAddr,
    path: &str,
) -> Result<(Response<Incoming>, Connection), CallError> {
    Connection::open(address, &[], None).await?.get(address, path).await
}

/// Sends a request without a body over a connection of its own.
pub async fn send(
    address: SocketAddr,
    request: request::Builder,
) -> Result<(Response<Incoming>, Connection), CallError> {
    Connection::open(address, &[], None).await?.send(request).await
}

/// Reads an answer whole, unless it is larger than `most`.
pub async fn read(response: Response<Incoming>, most: usize) -> Result<Bytes, CallError> {
    match Limited::new(response.into_body(), most).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(CallError::Strange(error.to_string())),
    }
}
