//! What a server serves its connections with: one proxy, for one configuration. A worker, whose
//! configuration changes, has several of them in turn (`app::worker`).

use std::rc::Rc;

use bytes::Bytes;
use http::{Request, Response};

use super::{Client, Place, Proxy, ResponseBody};
use crate::{
    config::Config,
    server::{
        ClientCertificate, Conn, Door, Handshake, Incoming, Limits, Origin, Reached, Refusal,
        Service,
    },
};

/// A worker's share of the limits.
pub fn limits(config: &Config) -> Limits {
    let limits = &config.limits;
    Limits {
        header_bytes: limits.header_bytes,
        headers: limits.headers,
        header_read: limits.header_read,
        idle: limits.idle,
        body_idle: limits.body_idle,
        connections: (limits.connections / config.server.workers.get()).max(1),
        streams: limits.streams,
        resets: limits.resets,
        frames: limits.frames,
        requests: limits.requests_per_connection,
        handshake: limits.tls_handshake,
        handshakes: (limits.tls_handshakes / config.server.workers.get()).max(1),
    }
}

impl Service for Proxy {
    type Body = ResponseBody;
    type Client = Client;
    type Place = Place;

    fn door(&self, origin: &Origin) -> Door {
        self.door(origin)
    }

    fn admit(&self, origin: &Origin) -> Option<Place> {
        self.admit(origin)
    }

    fn opened(
        &self,
        origin: Origin,
        certificate: Option<ClientCertificate>,
        place: Place,
    ) -> Client {
        self.client(origin, certificate.as_ref(), place)
    }

    fn shook_hands(&self, listener: usize, how: Handshake) {
        self.shook_hands(listener, how);
    }

    fn reached(&self, limit: Reached) {
        self.reached(limit);
    }

    fn call<'c>(
        &'c self,
        client: &'c Rc<Client>,
        conn: &'c Rc<Conn>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<ResponseBody>> {
        self.call(client, conn, request)
    }

    fn refused(&self, client: &Client, refusal: &Refusal<'_>) -> Bytes {
        self.refused(client, refusal)
    }
}
