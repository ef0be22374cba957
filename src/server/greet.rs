//! What comes before HTTP on a new connection: the PROXY protocol's header, and the TLS handshake.

use std::{cell::Cell, io, time::Duration};

use bytes::Bytes;
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, timeout},
};

use super::{
    ClientCertificate, ClientFault, Door, Handshake, Limits, Origin, ProxyProtocol, Reached,
    Refusal, Service,
    conn::{Parked, linger, parked},
    drain,
    tls::{Greeting, Tls},
};
use crate::net::{
    Stream,
    proxy_protocol::{self, Parsed},
};

/// A connection that HTTP can begin on.
pub(super) struct Met<P> {
    pub(super) stream: Stream,
    pub(super) place: P,
    /// Read already.
    pub(super) ahead: Bytes,
    pub(super) origin: Origin,
    pub(super) certificate: Option<ClientCertificate>,
    /// What was agreed on in the handshake.
    pub(super) protocol: Protocol,
}

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Protocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    H2,
    /// Its first bytes will tell.
    Either,
}

/// Waits for what the door wants to see first. `None`: it did not come, and the connection is over.
pub(super) async fn meet<S: Service>(
    mut socket: TcpStream,
    mut origin: Origin,
    door: &Door,
    service: &S,
    limits: &Cell<Limits>,
    handshakes: &Semaphore,
    drain: &drain::Watch,
) -> Option<Met<S::Place>> {
    let mut ahead = Bytes::new();
    if door.proxy_protocol != ProxyProtocol::Off {
        match introduced(&mut socket, &mut origin, door, service, limits, drain).await {
            Introduced::As(bytes) => ahead = bytes,
            Introduced::Gone => return None,
            Introduced::Wrong(detail) => {
                let client = service.opened(origin, None, service.admit(&origin)?);
                let fault = ClientFault::Malformed;
                let refusal = Refusal { fault, head: &[], detail: &detail, took: Duration::ZERO };
                let answer = service.refused(&client, &refusal);
                // Below TLS nobody would understand it.
                if door.tls.is_none() {
                    linger(socket.into(), &answer).await;
                }
                return None;
            }
        }
    }
    let place = service.admit(&origin)?;
    let Some(tls) = &door.tls else {
        let (stream, protocol) = (Stream::from(socket), door.clear());
        return Some(Met { stream, place, ahead, origin, certificate: None, protocol });
    };
    // What is neither the PROXY protocol nor left with the socket is no TLS either.
    if !ahead.is_empty() || !begins(&socket, service, limits, drain).await {
        return None;
    }
    if handshakes.available_permits() == 0 {
        service.reached(Reached::Handshakes);
    }
    let (how, greeting) = shaken(tls, socket, limits.get().handshake, handshakes).await;
    service.shook_hands(origin.listener, how);
    let Greeting { stream, certificate, h2 } = greeting?;
    origin.secure = true;
    let protocol = match h2 {
        true => Protocol::H2,
        false if door.http1 => Protocol::Http1,
        // RFC 9113 section 3.2: HTTP/2 below TLS is agreed on.
        false => return None,
    };
    Some(Met { stream, place, ahead, origin, certificate, protocol })
}

/// Waits for the first byte. Whether it came.
async fn begins<S: Service>(
    socket: &TcpStream,
    service: &S,
    limits: &Cell<Limits>,
    drain: &drain::Watch,
) -> bool {
    let parked = parked(socket, Instant::now(), limits, drain).await;
    if parked == Parked::Idle {
        service.reached(Reached::Idle);
    }
    parked == Parked::Readable
}

impl Door {
    /// What is spoken in clear text.
    pub(super) fn clear(&self) -> Protocol {
        match (self.http1, self.h2) {
            (true, true) => Protocol::Either,
            (false, true) => Protocol::H2,
            (_, false) => Protocol::Http1,
        }
    }
}

/// Shakes hands, in turn.
async fn shaken(
    tls: &Tls,
    socket: TcpStream,
    limit: Duration,
    handshakes: &Semaphore,
) -> (Handshake, Option<Greeting>) {
    let shake = async {
        let _turn = handshakes.acquire().await.map_err(io::Error::other)?;
        tls.accept(socket).await
    };
    match timeout(limit, shake).await {
        Ok(Ok(greeting)) => (Handshake::Done, greeting),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a TLS handshake failed");
            (Handshake::Failed, None)
        }
        Err(_elapsed) => (Handshake::TimedOut, None),
    }
}

/// How a load balancer introduced a client.
enum Introduced {
    /// Properly, or not at all where that is allowed; this was read beyond.
    As(Bytes),
    /// The connection ended, or was silent for too long.
    Gone,
    /// Not as it should.
    Wrong(String),
}

/// Waits for the PROXY protocol's header, and believes it.
async fn introduced<S: Service>(
    socket: &mut TcpStream,
    origin: &mut Origin,
    door: &Door,
    service: &S,
    limits: &Cell<Limits>,
    drain: &drain::Watch,
) -> Introduced {
    if !begins(&*socket, service, limits, drain).await {
        return Introduced::Gone;
    }
    match timeout(limits.get().header_read, proxy_protocol::read(socket)).await {
        Err(_elapsed) => Introduced::Gone,
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            Introduced::Wrong(error.to_string())
        }
        Ok(Err(_)) => Introduced::Gone,
        Ok(Ok((Parsed::Header(ends, _), ahead))) => {
            if let Some(ends) = ends {
                origin.peer = ends.source;
                origin.local = ends.destination;
            }
            Introduced::As(ahead)
        }
        Ok(Ok((_, ahead))) if door.proxy_protocol == ProxyProtocol::Accept => Introduced::As(ahead),
        Ok(Ok(_)) => Introduced::Wrong("this listener needs the PROXY protocol".to_owned()),
    }
}
