//! Calls to LiteFS's API: small answers read whole under a bound, and the endless stream of
//! events. Everything that a node sends is hostile until parsed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf as _, BytesMut};
use http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::timeout;

use super::{CLUSTER_ID, EVENTS, Event, ID, INFO, Info, METRICS, PROMOTE, VARS, Vars};
use crate::{
    call::{self, CallError, Connection, get, read},
    topology::{Claim, position::Position},
};

/// The largest `/info` and the longest event.
const SMALL: usize = 64 << 10;
/// The largest `/metrics`.
const LARGE: usize = 1 << 20;

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

/// Asks a node to become primary. The role has not moved yet when the old primary accepted.
pub async fn promote(api: SocketAddr, limit: Duration) -> Result<(), CallError> {
    let call = async {
        let request = Request::post(PROMOTE).header(header::HOST, api.to_string());
        let (response, _connection) = call::send(api, request).await?;
        let status = response.status();
        let body = read(response, SMALL).await?;
        if status == StatusCode::OK {
            return Ok(());
        }
        // LiteFS says why, in a line.
        let text = String::from_utf8_lossy(&body);
        let why: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        Err(CallError::Strange(format!("{status}, {why}")))
    };
    timeout(limit, call).await.unwrap_or(Err(CallError::Timeout))
}

/// Reads the exact positions of a node, again and again, over one connection.
#[derive(Debug)]
pub struct Positions {
    api: SocketAddr,
    kept: Option<Connection>,
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
            let again = match kept {
                Some(kept) => kept.get(self.api, VARS).await.ok(),
                None => None,
            };
            let (response, kept) = match again {
                Some(answered) => answered,
                // There was none, or it was closed just then: reading twice harms nobody.
                None => call::get_any(self.api, VARS).await?,
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

fn identity<B>(response: &Response<B>) -> (Option<u64>, Option<Arc<str>>) {
    let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let incarnation = text(ID).and_then(|id| u64::from_str_radix(id, 16).ok());
    let cluster = text(CLUSTER_ID).filter(|id| !id.is_empty()).map(Arc::from);
    (incarnation, cluster)
}
