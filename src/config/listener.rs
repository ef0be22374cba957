//! `[[listener]]`: where clients come in.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

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
    /// `http3`. `None`: nobody listens on UDP.
    pub http3: Option<Http3>,
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

/// `http3`: HTTP/3 at the same address, on UDP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Http3 {
    /// `alt_svc`: for how long clients that come by TCP are told to remember it. `None`: they are
    /// not told.
    pub alt_svc: Option<Duration>,
    /// `port`: where they are sent to. `None`: where we listen.
    pub port: Option<u16>,
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
    /// `acme`: a certificate beside those, which litegate obtains.
    pub acme: Option<Acme>,
}

/// `acme`: a certificate that litegate obtains and renews. The terms are agreed to, or there is no
/// configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Acme {
    /// `directory`: an `https` URL.
    pub directory: String,
    /// `ca`: who signs the directory's own certificate. `None`: whoever the system trusts.
    pub ca: Option<PathBuf>,
    /// `contacts`: URLs, as `mailto:ops@example.org`.
    pub contacts: Vec<String>,
    /// `domains`: whom the certificate is for, in lower case, one at least.
    pub domains: Vec<String>,
    /// `cache`: the directory in which the account's key and the certificate are kept.
    pub cache: PathBuf,
}

impl Acme {
    /// Where the certificate is kept, with its key. Another directory's is another file, or one
    /// made by a staging directory would be taken for good.
    pub fn certificate(&self) -> PathBuf {
        let first = self.domains.first().map_or("", String::as_str);
        self.cache.join(format!("{first}-{}.pem", self.mark()))
    }

    /// Where the account at this directory is kept.
    pub fn account(&self) -> PathBuf {
        self.cache.join(format!("account-{}.json", self.mark()))
    }

    /// Tells directories apart.
    fn mark(&self) -> String {
        let digest = Sha256::digest(self.directory.as_bytes());
        data_encoding::HEXLOWER.encode(digest.get(..4).unwrap_or_default())
    }
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
