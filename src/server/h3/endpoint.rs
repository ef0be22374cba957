//! Accepts QUIC connections for one worker.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use quinn::{
    Endpoint, EndpointConfig, IdleTimeout, Incoming, Runtime as _, ServerConfig, TokioRuntime,
    TransportConfig, VarInt, crypto::rustls::QuicServerConfig,
};
use rustls::pki_types::CertificateDer;
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};

use super::{
    serve_connection,
    steer::{Ids, Post, Steered},
};
use crate::server::{
    Accepting, ClientCertificate, Handshake, Limits, Origin, Reached, Service,
    accept::Place,
    drain,
    h2::{STREAM_WINDOW, connection_window},
};

/// TLS as QUIC has it.
pub type Crypto = Arc<QuicServerConfig>;

/// Makes it of what a listener speaks on TCP. Without early data: nobody could tell whether a
/// request in it came twice (RFC 8470).
///
/// # Errors
/// There is no TLS 1.3.
pub fn crypto(tls: &rustls::ServerConfig) -> Result<Crypto, rustls::Error> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(Arc::new(tls));
    crypto.map(Arc::new).map_err(|error| rustls::Error::General(error.to_string()))
}

/// A client that says nothing for so long is gone. It is asked three times before.
const GONE: Duration = Duration::from_secs(30);
const ASK: Duration = Duration::from_secs(10);
/// The most that waits for one client's acknowledgements, for all of its streams. It is in this
/// process's memory, not in the kernel's; and with a round trip of 50 ms it is 10 MB a second.
const SEND_WINDOW: u64 = 512 << 10;
/// Streams of one direction that a client may have: three with a meaning, and some without.
const OTHERS: u32 = 8;
/// Connections that wait to be looked at, and what may come of each meanwhile.
const INCOMING: usize = 256;
const INCOMING_BYTES: u64 = 16 << 10;
/// How long the last words may take.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// What a client's connection may hold.
pub(crate) fn transport(limits: &Limits) -> TransportConfig {
    let streams = u32::try_from(limits.streams).unwrap_or(u32::MAX);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(OTHERS.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(connection_window(limits.streams).into())
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(ASK))
        .max_idle_timeout(IdleTimeout::try_from(GONE).ok());
    transport
}

/// A worker's UDP socket, and how those of the other workers are reached.
#[derive(Debug)]
pub struct Socket {
    /// Its own.
    pub socket: std::net::UdpSocket,
    /// Which one it is.
    pub worker: usize,
    /// Of how many.
    pub workers: usize,
    /// Theirs together.
    pub post: Arc<Post>,
}

impl Socket {
    fn open(self) -> io::Result<(SocketAddr, Endpoint)> {
        let Self { socket, worker, workers, post } = self;
        let local = socket.local_addr()?;
        let runtime = Arc::new(TokioRuntime);
        let socket = runtime.wrap_udp_socket(socket)?;
        let socket = Arc::new(Steered { socket, post, worker });
        let mut config = EndpointConfig::default();
        config.cid_generator(move || Box::new(Ids { worker, workers }));
        let endpoint = Endpoint::new_with_abstract_socket(config, None, socket, runtime)?;
        Ok((local, endpoint))
    }
}

/// Accepts until the drain starts, and then turns newcomers away until the last of its connections
/// has finished: their packets come to this socket.
pub async fn serve<S: Service + 'static>(
    socket: Socket,
    index: usize,
    service: Rc<S>,
    accepting: Accepting,
    drain: drain::Watch,
) {
    let (local, endpoint) = match socket.open() {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(%error, "a UDP socket can't be used");
            return;
        }
    };
    // What newcomers are met with, and tokens are signed with. Who is let in gets another one.
    let origin = Origin { listener: index, peer: local, local, secure: true };
    let Some(tls) = service.door(&origin).tls else { return };
    let mut config = ServerConfig::with_crypto(tls.quic());
    config.max_incoming(INCOMING).incoming_buffer_size(INCOMING_BYTES);
    config.incoming_buffer_size_total(INCOMING as u64 * INCOMING_BYTES);
    endpoint.set_server_config(Some(config.clone()));

    let mut closing = std::pin::pin!(drain.started());
    let mut draining = false;
    let mut tasks = JoinSet::new();
    while !draining || !tasks.is_empty() {
        let incoming = tokio::select! {
            biased;
            () = &mut closing, if !draining => {
                draining = true;
                continue;
            }
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        if draining {
            incoming.refuse();
            continue;
        }
        let limits = accepting.limits();
        let handshakes = accepting.handshakes();
        let place = accepting.try_place(index, &*service);
        let Some(place) = place else {
            // There is no backlog to wait in. The client has TCP, where there is one.
            incoming.refuse();
            continue;
        };
        if !incoming.remote_address_validated()
            && handshakes.available_permits() * 2 < limits.handshakes
        {
            // RFC 9000 section 8.1.2: whoever hides behind another's address gets no further.
            let _ = incoming.retry();
            continue;
        }
        let peer = incoming.remote_address();
        let local = SocketAddr::new(incoming.local_ip().unwrap_or(local.ip()), local.port());
        let origin = Origin { listener: index, peer, local, secure: true };
        let newcomer = Newcomer { incoming, origin, limits, handshakes, place };
        let (service, drain) = (Rc::clone(&service), drain.clone());
        tasks.spawn_local(newcomer.meet(config.clone(), service, drain));
    }
    endpoint.close(VarInt::from_u32(0x100), b"");
    let _ = timeout(LAST_WORDS, endpoint.wait_idle()).await;
}

/// Somebody who wants to connect.
struct Newcomer {
    incoming: Incoming,
    origin: Origin,
    limits: Limits,
    handshakes: Arc<Semaphore>,
    place: Place,
}

impl Newcomer {
    async fn meet<S: Service + 'static>(
        self,
        mut config: ServerConfig,
        service: Rc<S>,
        drain: drain::Watch,
    ) {
        let Self { incoming, origin, limits, handshakes, place } = self;
        let Some(tls) = service.door(&origin).tls else { return incoming.refuse() };
        config.crypto = tls.quic();
        config.transport_config(Arc::new(transport(&limits)));
        // By an address that may be another's nobody takes that one's place. With the handshake it
        // is its own.
        let mut admitted = None;
        if incoming.remote_address_validated() {
            admitted = service.admit(&origin);
            if admitted.is_none() {
                return incoming.refuse();
            }
        }
        let shake = async {
            let _turn = if let Ok(turn) = handshakes.try_acquire() {
                turn
            } else {
                service.reached(Reached::Handshakes);
                handshakes.acquire().await.ok()?
            };
            let connecting = incoming.accept_with(Arc::new(config)).ok()?;
            match connecting.await {
                Ok(connection) => Some(connection),
                Err(error) => {
                    tracing::debug!(%error, "a QUIC handshake failed");
                    None
                }
            }
        };
        let (how, connection) = match timeout(limits.handshake, shake).await {
            Ok(Some(connection)) => (Handshake::Done, Some(connection)),
            Ok(None) => (Handshake::Failed, None),
            Err(_elapsed) => (Handshake::TimedOut, None),
        };
        service.shook_hands(origin.listener, how);
        let Some(connection) = connection else { return };
        let Some(admitted) = admitted.or_else(|| service.admit(&origin)) else {
            connection.close(super::Code::ExcessiveLoad.into(), b"too many connections");
            return;
        };
        let identity = connection.peer_identity();
        let chain = identity.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let certificate = chain.and_then(|chain| chain.first().map(ClientCertificate::of));
        let client = Rc::new(service.opened(origin, certificate, admitted));
        serve_connection(connection, origin, &client, &service, limits, &drain).await;
        drop(place);
    }
}
