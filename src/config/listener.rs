//! `[[listener]]`: where clients come in.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// `[[listener]]`
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// `address`, required.
    pub address: SocketAddr,
    /// `trusted_proxies`: peers whose `Forwarded`, `X-Forwarded-*`, `fly-*` and `Litegate-*`
    /// request headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// `proxy_protocol`
    pub proxy_protocol: ProxyProtocol,
    /// `proxy_protocol_from`: peers that may send the PROXY protocol's header. Empty: all.
    pub proxy_protocol_from: Vec<IpNet>,
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

    /// Whether this peer's word about other peers is believed.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(&peer))
    }
}
