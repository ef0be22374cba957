//! `[[listener]]`: where clients come in.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;

/// `[[listener]]`
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// `address`, required.
    pub address: SocketAddr,
    /// `connections`: clients connected here at once, shared out evenly among the workers. Over it
    /// they wait in the kernel's backlog. Zero: as many as `limits.connections` leaves.
    pub connections: usize,
    /// `trusted_proxies`: peers whose `Forwarded`, `X-Forwarded-*`, `fly-*` and `Litegate-*`
    /// request headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// `protocols`
    pub protocols: Protocols,
    /// `tls`. `None`: clear text.
    pub tls: Option<Tls>,
    /// `proxy_protocol`
    pub proxy_protocol: ProxyProtocol,
    /// `proxy_protocol_from`: peers that may send the PROXY protocol's header. Empty: all.
    pub proxy_protocol_from: Vec<IpNet>,
}

/// `protocols`: what is spoken, one of them at least.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Protocols {
    /// `http/1.1`, and 1.0 with it.
    pub http1: bool,
    /// `h2`: agreed on in the TLS handshake, or by prior knowledge in clear text.
    pub h2: bool,
}

/// `tls`
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tls {
    /// `certificates`: the first is for clients that name no host, or one that nobody has.
    pub certificates: Vec<Certificate>,
    /// `client_ca`: who signs clients' certificates.
    pub client_ca: Option<PathBuf>,
    /// `client_auth`
    pub client_auth: ClientAuth,
}

/// `{ certificate, key }`, PEM files.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Certificate {
    /// `certificate`: the chain, the server's own first.
    pub certificate: PathBuf,
    /// `key`
    pub key: PathBuf,
}

/// `client_auth`: whether clients are asked for certificates.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ClientAuth {
    /// They are not.
    #[default]
    Off,
    /// They may bring one, which must be right then.
    Optional,
    /// They must.
    Required,
}

/// `proxy_protocol`: whether connections begin with who the client is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ProxyProtocol {
    /// They do not.
    #[default]
    Off,
    /// They may.
    Accept,
    /// They must.
    Require,
}

impl Listener {
    /// What this peer's connections begin with. A header from whoever may not send one is no HTTP.
    pub fn proxy_protocol(&self, peer: IpAddr) -> ProxyProtocol {
        let peer = peer.to_canonical();
        let from = &self.proxy_protocol_from;
        if from.is_empty() || from.iter().any(|net| net.contains(&peer)) {
            self.proxy_protocol
        } else {
            ProxyProtocol::Off
        }
    }

    /// Whether this peer is named as one that may say who others are.
    pub fn introduces(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.proxy_protocol != ProxyProtocol::Off
            && self.proxy_protocol_from.iter().any(|net| net.contains(&peer))
    }

    /// Whether this peer's word about other peers is believed.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(&peer))
    }
}
