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
}

impl Listener {
    /// Whether this peer's word about other peers is believed.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(&peer))
    }
}
