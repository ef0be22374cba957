//! A new connection to a node: the socket, whom it speaks for, TLS, and what is spoken then.

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use bytes::Bytes;
use hyper::body::Body;
use tokio::{io::AsyncWriteExt as _, time::timeout};

use super::{Connection, H2};
use crate::{
    decide::FailureKind,
    net::{
        Stream,
        proxy_protocol::Introduction,
        tls::{Connector, Offer, TlsError},
    },
};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Refused, unreachable, or out of our own resources.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// No TLS with whoever answered.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// Nobody answered in time.
    #[error("timed out")]
    Timeout,
}

impl ConnectError {
    /// The word for it in decisions, logs and metrics.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Io(_) => FailureKind::ConnectRefused,
            Self::Tls(TlsError::Certificate(_)) => FailureKind::Certificate,
            Self::Tls(TlsError::Handshake(_)) => FailureKind::Tls,
            Self::Timeout => FailureKind::ConnectTimeout,
        }
    }
}

/// A new connection.
#[derive(Debug)]
pub enum Opened<B: Body + 'static> {
    /// For one exchange at a time.
    Http1(Box<Connection<B>>),
    /// For many.
    H2(Rc<H2<B>>),
}

/// Connects within `limit`, says first whom the connection `speaks_for`, and agrees on one of what
/// is `offered`: in clear text that is HTTP/2 by prior knowledge unless HTTP/1.1 is all there is.
///
/// # Errors
/// Why there is no connection.
pub async fn open<B>(
    address: SocketAddr,
    tls: Option<&Connector>,
    offered: Offer,
    speaks_for: Option<Introduction>,
    limit: Duration,
) -> Result<Opened<B>, ConnectError>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let connect = async {
        let mut stream = Stream::connect(address).await?;
        let _ = stream.set_nodelay(true);
        if let Some(introduction) = speaks_for {
            stream.write_all(&introduction.header()).await?;
        }
        let (stream, h2) = match tls {
            Some(tls) => tls.connect(stream, address, offered).await?,
            None => (stream, offered != Offer::Http1),
        };
        Ok(if h2 {
            Opened::H2(H2::over(stream, address, speaks_for, tls.is_some()).await?)
        } else {
            Opened::Http1(Box::new(Connection::over(stream, speaks_for).await?))
        })
    };
    timeout(limit, connect).await.unwrap_or(Err(ConnectError::Timeout))
}
