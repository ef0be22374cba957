//! From a file and the environment to a [`Config`], or to everything that is wrong with them.

use std::{
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::Path,
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, Method, StatusCode};
use rustls::pki_types::{DnsName, ServerName};
use toml::de::DeTable;

use super::{
    Config,
    admin::{AccessLog, AccessLogFormat, AccessLogOutput, Admin},
    cluster::{
        Balance, Cluster, Consistency, Consul, DATABASES, Durability, Health, Hold, Lookup,
        Members, Mode, OnRequest, OnTimeout, Prefer, Reads, Replay, Retry, RoleSource, Secret,
        SendProxy, StaticNode, Timeouts, Upstream, UpstreamProtocol, UpstreamTls,
    },
    diagnostic::{Diagnostic, Diagnostics, Place},
    limits::{AmbiguousPaths, Limits, PerClient, Rate, Underscores},
    listener::{Acme, Certificate, ClientAuth, Http3, Listener, Protocols, ProxyProtocol, Tls},
    reader::{self, Entry, Faults, Kind, Section, Value},
    route::{Class, HeaderMatch, Host, Path as RoutePath, Route, Scope},
    server::{Drain, Server},
};

/// Variables that begin so override what the file says.
pub const PREFIX: &str = "LITEGATE__";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file can't be read.
    #[error("{path}: {error}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// It is wrong.
    #[error("{0}")]
    Wrong(#[from] Diagnostics),
}

/// Reads a file, with overrides from `environment`.
///
/// # Errors
/// That it can't be read, or all that is wrong with it.
pub fn load(
    path: &Path,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, LoadError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|error| LoadError::Unreadable { path: name.clone(), error })?;
    Ok(parse(&name, &text, environment)?)
}

/// Reads a text.
///
/// # Errors
/// All that is wrong with it.
pub fn parse(
    file: &str,
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, Diagnostics> {
    let faults = Faults::default();
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        faults.borrow_mut().push(Diagnostic {
            message: error.message().to_owned(),
            place: Place::File(error.span().unwrap_or(0..0)),
            label: "here".to_owned(),
            help: None,
        });
    }
    let config = if errors.is_empty() {
        let mut entries = reader::tree(table.get_ref());
        for (variable, value) in environment {
            if let Some(path) = variable.strip_prefix(PREFIX) {
                let path: Vec<_> = path.split("__").map(str::to_ascii_lowercase).collect();
                reader::set(&mut entries, &path, &variable, &value);
            }
        }
        root(entries, text.len(), &faults)
    } else {
        None
    };
    let mut all = faults.take();
    all.sort_by_key(|diagnostic| match &diagnostic.place {
        Place::File(span) => span.start,
        Place::Environment(_) => usize::MAX,
    });
    match config {
        Some(config) if all.is_empty() => Ok(config),
        _ => Err(Diagnostics { file: file.to_owned(), text: text.to_owned(), all }),
    }
}

fn root(entries: Vec<Entry>, end: usize, faults: &Faults) -> Option<Config> {
    let mut root = Section::new("", Place::File(end..end), entries, faults);
    let server = server(root.section("server"));
    let admin = admin(root.section("admin"));
    let access_log = access_log(root.section("access_log"));
    let limits = limits(root.section("limits"));
    let mut listeners: Vec<Listener> = Vec::new();
    for value in root.list("listener") {
        let section = root.table("listener", "listener", value);
        let place = section.place.clone();
        if let Some(listener) = listener(section) {
            if listeners.iter().any(|other| other.address == listener.address) {
                let message = format!("two listeners at {}", listener.address);
                root.fault(&place, message, "the second one".into(), Some("remove one".into()));
            }
            let acme = |listener: &Listener| listener.tls.as_ref().and_then(|tls| tls.acme.clone());
            if let Some(acme_here) = acme(&listener)
                && let Some(other) = listeners.iter().filter_map(acme).find(|other| {
                    *other != acme_here && other.certificate() == acme_here.certificate()
                })
            {
                let first = other.domains.first().map_or("", String::as_str);
                let message = format!("two certificates by ACME for `{first}`, and both unlike");
                let help = "write the same `acme` in both, or another first domain".to_owned();
                root.fault(&place, message, "the second one".into(), Some(help));
            }
            listeners.push(listener);
        }
    }
    if listeners.is_empty() && faults.borrow().is_empty() {
        root.missing("[[listener]]", "add one: [[listener]] with address = \"0.0.0.0:8080\"");
    }
    let mut clusters: Vec<Cluster> = Vec::new();
    if let Some(value) = root.take("cluster") {
        let mut all = root.table("cluster", "cluster", value);
        for Entry { key, place, value } in all.take_all() {
            let table = all.table(&format!("cluster.{key}"), &key, value);
            let _ = place;
            clusters.extend(cluster(&key, table));
        }
    } else {
        root.missing("[cluster.NAME]", "add one: [cluster.app] with port, members and primary");
    }
    let here = server.as_ref().and_then(|server| server.zone.clone());
    for cluster in &mut clusters {
        if let Members::Static(nodes) = &mut cluster.members {
            for node in nodes {
                node.near = here.is_some() && node.zone == here;
            }
        }
    }
    clusters.sort_by(|a, b| a.name.cmp(&b.name));
    let mut routes = Vec::new();
    for (index, value) in root.list("route").into_iter().enumerate() {
        let section = root.table("route", "route", value);
        routes.extend(route(section, index, &clusters));
    }
    if routes.is_empty() {
        if clusters.len() > 1 && faults.borrow().is_empty() {
            root.missing("[[route]]", "with several clusters, routes say what goes where");
        }
        routes.push(catch_all());
    }
    drop(root);
    Some(Config { server: server?, listeners, admin: admin?, access_log, limits, clusters, routes })
}

/// Everything, by method, to the only cluster.
fn catch_all() -> Route {
    Route {
        host: Vec::new(),
        path: RoutePath::Any,
        method: Vec::new(),
        header: Vec::new(),
        class: Class::Auto,
        cluster: 0,
        idempotent: false,
        retry_uncommitted: false,
        allow_trace: false,
        causal: None,
        index: None,
    }
}

fn server(mut section: Section) -> Option<Server> {
    let auto = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let workers = match section.take("workers") {
        None => auto,
        Some(Value { kind: Kind::Text(word), .. }) if word == "auto" => auto,
        Some(Value { kind: Kind::Integer(n @ 1..=1024), .. }) => {
            usize::try_from(n).ok().and_then(NonZeroUsize::new).unwrap_or(auto)
        }
        Some(value) => {
            section.wrong("workers", &value, "\"auto\" or a number from 1 to 1024", None);
            auto
        }
    };
    let mut drain = section.section("drain");
    let drain = Drain {
        delay: drain.duration("delay", Duration::ZERO),
        timeout: drain.duration("timeout", secs(30)),
    };
    let zone = section.text("zone").filter(|zone| !zone.is_empty()).map(Arc::from);
    Some(Server { workers, zone, drain })
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "an IP address and a port, like \"0.0.0.0:8080\"".to_owned())
}

fn listener(mut section: Section) -> Option<Listener> {
    let written = section.take("address");
    let place = written.as_ref().map(|value| value.place.clone());
    let found = match written {
        None => {
            section.missing("address", "like address = \"0.0.0.0:8080\"");
            None
        }
        Some(Value { kind: Kind::Text(text), .. }) => match address(&text) {
            Ok(address) => Some(address),
            Err(help) => {
                let place = place.unwrap_or_else(|| section.place.clone());
                let message = "`address` needs an IP address and a port".to_owned();
                section.fault(&place, message, "not like this".into(), Some(help));
                None
            }
        },
        Some(value) => {
            section.wrong("address", &value, "an IP address and a port", None);
            None
        }
    };
    const NEITHER: Protocols = Protocols { http1: false, h2: false };
    let mut protocols = NEITHER;
    for value in section.list("protocols") {
        match &value.kind {
            Kind::Text(protocol) if protocol == "http/1.1" => protocols.http1 = true,
            Kind::Text(protocol) if protocol == "h2" => protocols.h2 = true,
            _ => section.wrong("protocols", &value, "\"http/1.1\" and \"h2\"", None),
        }
    }
    if protocols == NEITHER {
        protocols = Protocols { http1: true, h2: true };
    }
    let introduced = [
        ("off", ProxyProtocol::Off),
        ("accept", ProxyProtocol::Accept),
        ("require", ProxyProtocol::Require),
    ];
    let proxy_protocol = section.word("proxy_protocol", &introduced, ProxyProtocol::Off);
    let proxy_protocol_from = section.texts("proxy_protocol_from", NETWORKS, network);
    let tls = section.take("tls").map(|value| tls(section.table("listener.tls", "tls", value)));
    let http3 = section.take("http3").and_then(|value| match value.kind {
        Kind::Boolean(false) => None,
        Kind::Boolean(true) => {
            let table = Value { kind: Kind::Table(Vec::new()), place: value.place };
            Some(http3(section.table("listener.http3", "http3", table)))
        }
        _ => Some(http3(section.table("listener.http3", "http3", value))),
    });
    if http3.is_some() && tls.is_none() {
        section.missing("tls", "QUIC has no clear text: HTTP/3 needs `tls`");
    }
    if http3.is_some() && proxy_protocol != ProxyProtocol::Off {
        let message = "`http3` and `proxy_protocol` don't go together".to_owned();
        let help =
            "the PROXY protocol introduces TCP connections alone: give HTTP/3 a listener of \
                    its own, or leave one of them out"
                .to_owned();
        section.fault(&section.place, message, "has both".into(), Some(help));
    }
    let trusted_proxies = section.texts("trusted_proxies", NETWORKS, network);
    let connections = section.count("connections", 0, 0);
    Some(Listener {
        address: found?,
        connections,
        trusted_proxies,
        protocols,
        tls,
        http3,
        proxy_protocol,
        proxy_protocol_from,
    })
}

fn http3(mut section: Section) -> Http3 {
    if !cfg!(feature = "http3") {
        let message = "this litegate was built without HTTP/3".to_owned();
        let help = "build it with `cargo build --release --features http3`, or leave `http3` out";
        section.fault(&section.place, message, "needs it".into(), Some(help.to_owned()));
    }
    let alt_svc = section.duration("alt_svc", Duration::from_hours(24));
    let port = section.integer("port", 1..=i64::from(u16::MAX));
    Http3 {
        alt_svc: Some(alt_svc).filter(|age| !age.is_zero()),
        port: port.and_then(|port| u16::try_from(port).ok()),
    }
}

fn tls(mut section: Section) -> Tls {
    let mut certificates = Vec::new();
    for value in section.list("certificates") {
        let mut table = section.table("listener.tls.certificates", "certificates", value);
        match (table.text("certificate"), table.text("key")) {
            (Some(certificate), Some(key)) => {
                certificates.push(Certificate { certificate: certificate.into(), key: key.into() });
            }
            (None, _) => table.missing("certificate", "the PEM file of the chain"),
            (_, None) => table.missing("key", "the PEM file of the private key"),
        }
    }
    let acme = section.take("acme");
    if certificates.is_empty() && acme.is_none() {
        section.missing(
            "certificates",
            "like certificates = [{ certificate = \"tls.crt\", key = \"tls.key\" }]",
        );
    }
    let client_ca = section.text("client_ca").map(Into::into);
    let words = [
        ("off", ClientAuth::Off),
        ("optional", ClientAuth::Optional),
        ("required", ClientAuth::Required),
    ];
    let client_auth = section.word("client_auth", &words, ClientAuth::Off);
    if client_auth != ClientAuth::Off && client_ca.is_none() {
        section.missing("client_ca", "the PEM file of who signs clients' certificates");
    }
    let acme = acme.and_then(|value| self::acme(section.table("listener.tls.acme", "acme", value)));
    Tls { certificates, client_ca, client_auth, acme }
}

fn acme(mut section: Section) -> Option<Acme> {
    if !cfg!(feature = "acme") {
        let message = "this litegate was built without ACME".to_owned();
        let help = "build it with `cargo build --release --features acme`, or name files in \
                    `certificates` that something else renews"
            .to_owned();
        section.fault(&section.place, message, "needs it".into(), Some(help));
    }
    let directory = section.parsed("directory", "the https URL of an ACME directory", |url| {
        let parsed = url.parse::<http::Uri>().ok();
        let is_one = parsed.is_some_and(|url| {
            url.scheme() == Some(&http::uri::Scheme::HTTPS) && url.host().is_some()
        });
        is_one.then(|| url.to_owned()).ok_or_else(|| format!("like {LETS_ENCRYPT:?}"))
    });
    let ca = section.text("ca").map(Into::into);
    let contacts = section.texts("contacts", "URLs like \"mailto:ops@example.org\"", |url| {
        let is_one = url.starts_with("mailto:") || url.starts_with("https:");
        is_one.then(|| url.to_owned()).ok_or_else(|| "it begins with `mailto:`".to_owned())
    });
    let domains = section.texts("domains", "names of hosts", |name| {
        let lower = name.to_ascii_lowercase();
        if lower.contains('*') {
            return Err("TLS-ALPN-01 proves no wildcards: name each host".to_owned());
        }
        let is_one = DnsName::try_from(&*lower).is_ok() && lower.parse::<IpAddr>().is_err();
        is_one.then_some(lower).ok_or_else(|| "like \"abaci.example.org\"".to_owned())
    });
    if domains.is_empty() {
        section.missing("domains", "like domains = [\"abaci.example.org\"]");
    }
    let cache: Option<String> = section.text("cache").filter(|cache| !cache.is_empty());
    if cache.is_none() {
        section.missing("cache", "a directory that is kept, like \"/var/lib/litegate\"");
    }
    if !section.boolean("terms_agreed", false) {
        let message = "the directory's terms of service have to be agreed to".to_owned();
        let help = Some("read them, then write `terms_agreed = true`".to_owned());
        section.fault(&section.place, message, "in this table".into(), help);
    }
    let directory = directory.unwrap_or_else(|| LETS_ENCRYPT.to_owned());
    Some(Acme { directory, ca, contacts, domains, cache: cache?.into() })
}

/// Let's Encrypt's, for certificates that browsers trust.
const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";

const NETWORKS: &str = "networks like 10.42.0.0/16";

fn network(text: &str) -> Result<ipnet::IpNet, String> {
    let single = text.parse::<IpAddr>().map(ipnet::IpNet::from);
    text.parse().or(single).map_err(|_| "like \"10.42.0.0/16\"".to_owned())
}

fn admin(mut section: Section) -> Option<Admin> {
    let default = SocketAddr::from(([127, 0, 0, 1], 9090));
    let parse = |text: &str| match text {
        "off" => Ok(None),
        text => address(text).map(Some),
    };
    let address = section.parsed("address", "an IP address and a port, or \"off\"", parse);
    let peers = section.texts("peers", "names with a port", peer);
    Some(Admin { address: address.unwrap_or(Some(default)), peers })
}

/// `litegate-admin:9090`
fn peer(text: &str) -> Result<Arc<str>, String> {
    let (name, port) = text.rsplit_once(':').unwrap_or(("", ""));
    let plain = |c: char| c.is_ascii_alphanumeric() || ".:-_[]".contains(c);
    let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
    if name.is_empty() || !name.chars().all(plain) || !is_port {
        return Err("like \"litegate-admin:9090\"".to_owned());
    }
    Ok(text.into())
}

fn access_log(mut section: Section) -> AccessLog {
    let formats = [
        ("text", AccessLogFormat::Text),
        ("json", AccessLogFormat::Json),
        ("off", AccessLogFormat::Off),
    ];
    let format = section.word("format", &formats, AccessLogFormat::Text);
    let output = match section.text("output").as_deref() {
        None | Some("stdout") => AccessLogOutput::Stdout,
        Some("stderr") => AccessLogOutput::Stderr,
        Some(path) => AccessLogOutput::File(path.into()),
    };
    AccessLog { format, output }
}

fn limits(mut section: Section) -> Limits {
    let underscores = [
        ("drop", Underscores::Drop),
        ("refuse", Underscores::Refuse),
        ("allow", Underscores::Allow),
    ];
    let ambiguous_paths = [
        ("same-route", AmbiguousPaths::SameRoute),
        ("refuse", AmbiguousPaths::Refuse),
        ("allow", AmbiguousPaths::Allow),
    ];
    Limits {
        header_bytes: section.size("header_bytes", 64 << 10).max(1024),
        headers: section.count("headers", 1, 100),
        uri_bytes: section.size("uri_bytes", 16 << 10),
        header_read: section.duration("header_read", secs(10)),
        idle: section.duration("idle", secs(60)),
        requests_per_connection: section.count("requests_per_connection", 0, 0),
        body_idle: section.duration("body_idle", secs(30)),
        body_rate: section.size("body_rate", 240),
        connections: section.count("connections", 1, 20_000),
        replay_bytes: section.size("replay_bytes", 64 << 20),
        tls_handshake: section.duration("tls_handshake", secs(10)),
        streams: section.count("streams", 1, 100),
        resets: section.count("resets", 1, 200),
        frames: section.count("frames", 1, 1000),
        tls_handshakes: section.count("tls_handshakes", 1, 512),
        underscores: section.word("underscores", &underscores, Underscores::default()),
        ambiguous_paths: section.word(
            "ambiguous_paths",
            &ambiguous_paths,
            AmbiguousPaths::default(),
        ),
        client: per_client(section.section("client")),
    }
}

fn per_client(mut section: Section) -> PerClient {
    let mut rate = |key, burst_key| {
        let number = |n| u32::try_from(n).ok().and_then(NonZeroU32::new);
        let per_second = number(section.count(key, 0, 0));
        let burst = number(section.count(burst_key, 1, 0)).or(per_second);
        Some(Rate { per_second: per_second?, burst: burst? })
    };
    let requests = rate("requests", "requests_burst");
    let connects = rate("connects", "connects_burst");
    let prefix = section.integer("ipv6_prefix", 1..=128).and_then(|n| u8::try_from(n).ok());
    PerClient {
        requests,
        connects,
        connections: section.count("connections", 0, 0),
        ipv6_prefix: prefix.unwrap_or(64),
        clients: section.count("clients", 1, 65_536),
        exempt: section.texts("exempt", NETWORKS, network),
    }
}

fn cluster(name: &str, mut section: Section) -> Option<Cluster> {
    let port = section.integer("port", 1..=65535).and_then(|port| u16::try_from(port).ok());
    if port.is_none() {
        section.missing("port", "the port of the app, or of LiteFS's proxy, on every member");
    }
    let members = members(&mut section, port.unwrap_or(0));
    let primary = primary(&mut section);
    let max_lag = section.duration("max_lag", secs(10));
    let reads = [
        ("prefer-replicas", Reads::PreferReplicas),
        ("replicas", Reads::Replicas),
        ("all", Reads::All),
        ("primary", Reads::Primary),
    ];
    let balance = [
        ("peak-ewma", Balance::PeakEwma),
        ("least-request", Balance::LeastRequest),
        ("round-robin", Balance::RoundRobin),
        ("random", Balance::Random),
    ];
    let prefer = [("any", Prefer::Any), ("local", Prefer::Local)];
    let consistency = consistency(section.section("consistency"), &primary);
    let durability = durability(section.section("durability"), &primary);
    let cluster = Cluster {
        name: Arc::from(name),
        port: port.unwrap_or(0),
        members: members.unwrap_or(Members::Static(Vec::new())),
        primary,
        reads: section.word("reads", &reads, Reads::default()),
        balance: section.word("balance", &balance, Balance::default()),
        soft_lag: section.duration("soft_lag", secs(1)).min(max_lag),
        tripwire: tripwire(section.section("tripwire")),
        max_lag,
        prefer: section.word("prefer", &prefer, Prefer::default()),
        slow_start: section.duration("slow_start", secs(10)),
        max_writes: section.count("max_writes", 1, 64),
        max_writes_wait: section.duration("max_writes_wait", secs(10)),
        max_requests: section.count("max_requests", 1, 1024),
        max_pending: section.count("max_pending", 0, 1024),
        max_idle: section.count("max_idle", 0, 64),
        send_proxy: section.word(
            "send_proxy",
            &[("off", SendProxy::Off), ("v1", SendProxy::V1), ("v2", SendProxy::V2)],
            SendProxy::Off,
        ),
        upstream: upstream(section.section("upstream")),
        timeouts: timeouts(section.section("timeouts")),
        health: health(section.section("health")),
        retry: retry(section.section("retry")),
        replay: replay(section.section("replay")),
        hold: hold(section.section("hold")),
        consistency,
        durability,
    };
    the_api_is_not_the_app(&cluster, &section);
    probes_are_understood(&cluster, &section);
    nodes_have_a_name(&cluster, &section);
    Some(cluster)
}

/// LiteFS's API has no authentication: whoever reaches it can promote, halt and export. It must
/// never be where requests are sent.
fn the_api_is_not_the_app(cluster: &Cluster, section: &Section) {
    let api = cluster.primary.iter().find_map(|source| match source {
        RoleSource::Litefs { port, .. } => Some(*port),
        _ => None,
    });
    let is_api = |port: u16| Some(port) == api || port == 20202;
    let help = Some("write the port of the app or of LiteFS's proxy".to_owned());
    if is_api(cluster.port) {
        let message = format!("port {} of [{}] is LiteFS's API", cluster.port, section.name);
        section.fault(&section.place, message, "it must not be reachable".into(), help.clone());
    }
    if let Members::Static(nodes) = &cluster.members {
        let apis: Vec<_> = nodes.iter().filter_map(|node| node.api).collect();
        for node in nodes.iter().filter(|node| {
            apis.contains(&node.address)
                || (api.is_some() && node.api.is_none() && is_api(node.address.port()))
        }) {
            let message = format!("the address of node `{}` is LiteFS's API", node.name);
            section.fault(&section.place, message, "in this cluster".into(), help.clone());
        }
    }
}

fn members(section: &mut Section, port: u16) -> Option<Members> {
    let Some(value) = section.take("members") else {
        section.missing("members", "like members = { type = \"dns\", name = \"app-headless\" }");
        return None;
    };
    let name = format!("{}.members", section.name);
    let mut table = section.table(&name, "members", value);
    let types = ["dns", "srv", "static"].map(|kind| (kind, kind));
    match table.choice("type", &types) {
        Some("dns") => Some(Members::Dns(lookup(&mut table)?)),
        Some("srv") => Some(Members::Srv(lookup(&mut table)?)),
        Some("static") => {
            let mut nodes: Vec<StaticNode> = Vec::new();
            for value in table.list("nodes") {
                let place = value.place.clone();
                let node = static_node(table.table(&format!("{name}.nodes"), "nodes", value), port);
                let Some(node) = node else { continue };
                if nodes
                    .iter()
                    .any(|other| other.name == node.name || other.address == node.address)
                {
                    let message = format!("two nodes are `{}` or share its address", node.name);
                    table.fault(&place, message, "the second one".into(), None);
                }
                nodes.push(node);
            }
            if nodes.is_empty() {
                table.missing(
                    "nodes",
                    "like nodes = [{ name = \"app-0\", address = \"10.42.0.7\" }]",
                );
            }
            Some(Members::Static(nodes))
        }
        Some(_) | None => {
            table.missing("type", "one of \"dns\", \"srv\", \"static\"");
            table.forget_but("type");
            None
        }
    }
}

fn lookup(table: &mut Section) -> Option<Lookup> {
    let resolvers = table.texts("resolvers", "addresses like 10.43.0.10:53", |text| {
        let with_port = text.parse::<SocketAddr>();
        let bare = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
        with_port.or(bare).map_err(|_| "like \"10.43.0.10:53\"".to_owned())
    });
    match table.text("name") {
        Some(name) if !name.is_empty() => Some(Lookup { name: name.into(), resolvers }),
        _ => {
            table.missing("name", "the DNS name to look up");
            None
        }
    }
}

fn static_node(mut table: Section, port: u16) -> Option<StaticNode> {
    let parse = |text: &str| {
        let with_port = text.parse::<SocketAddr>();
        let bare = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port));
        with_port.or(bare).map_err(|_| "like \"10.42.0.7\" or \"10.42.0.8:3001\"".to_owned())
    };
    let name = table.text("name");
    let address = table.parsed("address", "an IP address", parse);
    let api = table.parsed("api", "an IP address and a port", self::address);
    if name.is_none() {
        table.missing("name", "the instance name, as LiteFS's lease.hostname has it");
    }
    if address.is_none() {
        table.missing("address", "the node's IP address");
    }
    let zone = table.text("zone").map(Arc::from);
    // Compared once this process's own is known.
    Some(StaticNode { name: name?.into(), address: address?, api, zone, near: false })
}

fn primary(section: &mut Section) -> Vec<RoleSource> {
    let list = section.list("primary");
    if list.is_empty() {
        section.missing("primary", "like primary = { type = \"litefs\" }");
    }
    let name = format!("{}.primary", section.name);
    let mut sources = Vec::new();
    for value in list {
        let mut table = section.table(&name, "primary", value.clone());
        let types =
            ["litefs", "consul", "instance", "dns", "http", "file"].map(|kind| (kind, kind));
        let source = match table.choice("type", &types) {
            Some("litefs") => Some(RoleSource::Litefs {
                port: table
                    .integer("port", 1..=65535)
                    .map_or(20202, |n| u16::try_from(n).unwrap_or(20202)),
                poll: table.duration("poll", secs(1)).max(Duration::from_millis(50)),
            }),
            Some("instance") => {
                let name = table.text("name");
                if name.is_none() {
                    table.missing("name", "the primary's instance name");
                }
                name.map(|name| RoleSource::Instance { name: name.into() })
            }
            Some("dns") => lookup(&mut table).map(RoleSource::Dns),
            Some("consul") => consul(&mut table).map(RoleSource::Consul),
            Some("http") => http(&mut table),
            Some("file") => file(&mut table),
            _ => {
                table.missing("type", ROLE_SOURCES);
                table.forget_but("type");
                None
            }
        };
        let Some(source) = source else { continue };
        // Two of a kind could only contradict each other.
        let kind = std::mem::discriminant(&source);
        if sources.iter().any(|other| std::mem::discriminant(other) == kind) {
            let help = Some("keep one of each type".to_owned());
            let message = "two role sources of the same type".to_owned();
            section.fault(&value.place, message, "the second one".into(), help);
        }
        sources.push(source);
    }
    sources
}

const ROLE_SOURCES: &str =
    "one of \"litefs\", \"consul\", \"instance\", \"dns\", \"http\", \"file\"";

fn tripwire(mut section: Section) -> u64 {
    u64::try_from(section.count("transactions", 0, 1000)).unwrap_or(1000)
}

fn consul(table: &mut Section) -> Option<Consul> {
    if !table.has("address") {
        table.missing("address", "like \"http://127.0.0.1:8500\"");
    }
    if !table.has("key") {
        table.missing("key", "lease.consul.key of litefs.yml, like \"litefs/abaci\"");
    }
    let address = table.parsed("address", "Consul's HTTP address", |text| {
        let help = || "like \"http://127.0.0.1:8500\"".to_owned();
        let uri: http::Uri = text.parse().map_err(|_| help())?;
        if uri.scheme_str() == Some("https") {
            let help = "https is not supported by this version: ask the agent beside litegate, \
                        like \"http://127.0.0.1:8500\"";
            return Err(help.to_owned());
        }
        let plain = uri.scheme_str() == Some("http") && uri.path() == "/" && uri.query().is_none();
        let authority = uri.authority().filter(|a| plain && !a.as_str().contains('@'));
        let authority = authority.ok_or_else(help)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        Ok((Arc::from(host), authority.port_u16().unwrap_or(8500)))
    });
    let key = table.parsed("key", "the lease's key", |key| {
        let fits = !key.is_empty() && !key.starts_with('/') && !key.ends_with('/');
        let help = "lease.consul.key of litefs.yml, behind the path of its url if it has one";
        if fits { Ok(Arc::from(key)) } else { Err(help.to_owned()) }
    });
    let token = table.parsed("token", "a token", |token| {
        let fits = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        if fits { Ok(Secret::new(token)) } else { Err("visible ASCII".to_owned()) }
    });
    let datacenter = table.text("datacenter").filter(|name| !name.is_empty()).map(Into::into);
    let (host, port) = address?;
    Some(Consul { host, port, key: key?, token, datacenter })
}

fn http(table: &mut Section) -> Option<RoleSource> {
    if !table.has("path") {
        table.missing("path", "what answers 200 on the primary only, like \"/primary\"");
    }
    let path = table.parsed("path", "a path", absolute);
    let port = table.integer("port", 1..=65535).and_then(|port| u16::try_from(port).ok());
    let interval = table.duration("interval", secs(1)).max(Duration::from_millis(50));
    let timeout = table.duration("timeout", Duration::from_millis(500));
    Some(RoleSource::Http { path: path?, port, interval, timeout })
}

fn file(table: &mut Section) -> Option<RoleSource> {
    let path = table.text("path").filter(|path| !path.is_empty());
    if path.is_none() {
        table.missing("path", "LiteFS's .primary, like \"/litefs/.primary\"");
    }
    let instance = table.text("instance").filter(|name| !name.is_empty()).map(Into::into);
    let interval = table.duration("interval", Duration::from_millis(250));
    let interval = interval.max(Duration::from_millis(10));
    Some(RoleSource::File { path: path?.into(), instance, interval })
}

/// A path that is sent as it is written.
fn absolute(path: &str) -> Result<Box<str>, String> {
    if path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(path.into())
    } else {
        Err("like \"/healthz\"".to_owned())
    }
}

fn upstream(mut section: Section) -> Upstream {
    let words = [
        ("http/1.1", UpstreamProtocol::Http1),
        ("h2", UpstreamProtocol::H2),
        ("auto", UpstreamProtocol::Auto),
    ];
    let protocol = section.word("protocol", &words, UpstreamProtocol::Http1);
    let name = format!("{}.tls", section.name);
    let tls = match section.take("tls") {
        None | Some(Value { kind: Kind::Boolean(false), .. }) => None,
        Some(Value { kind: Kind::Boolean(true), place }) => {
            let value = Value { kind: Kind::Table(Vec::new()), place };
            Some(upstream_tls(section.table(&name, "tls", value)))
        }
        Some(value) => Some(upstream_tls(section.table(&name, "tls", value))),
    };
    if protocol == UpstreamProtocol::Auto && tls.is_none() {
        let message = "`protocol = \"auto\"` needs TLS: that is where nodes choose".to_owned();
        let help = Some("write `tls = true`, or the protocol that nodes speak".to_owned());
        section.fault(&section.place, message, "in clear text here".into(), help);
    }
    Upstream { protocol, tls }
}

fn upstream_tls(mut section: Section) -> UpstreamTls {
    let wanted = "the PEM file of who signs nodes' certificates";
    let ca = section.texts("ca", wanted, |path| Ok(path.into()));
    let server_name = section.parsed("server_name", "a host's name or IP address", |name| {
        let valid = ServerName::try_from(name).is_ok();
        valid.then(|| name.into()).ok_or_else(|| "like \"abaci-app\"".to_owned())
    });
    let own = match (section.text("certificate"), section.text("key")) {
        (Some(certificate), Some(key)) => {
            Some(Certificate { certificate: certificate.into(), key: key.into() })
        }
        (Some(_), None) => {
            section.missing("key", "the PEM file of the certificate's private key");
            None
        }
        (None, Some(_)) => {
            section.missing("certificate", "the PEM file of the key's certificate chain");
            None
        }
        (None, None) => None,
    };
    let insecure_skip_verify = section.boolean("insecure_skip_verify", false);
    if insecure_skip_verify && (!ca.is_empty() || server_name.is_some()) {
        let message = "`insecure_skip_verify` believes everybody: the other keys mean nothing";
        let help = "remove it, or `ca` and `server_name`".to_owned();
        section.fault(&section.place, message.into(), "in this table".into(), Some(help));
    }
    UpstreamTls { ca, server_name, own, insecure_skip_verify }
}

/// What nodes' certificates must have is a name that certificates can have.
fn nodes_have_a_name(cluster: &Cluster, section: &Section) {
    let verified = cluster.upstream.tls.as_ref().is_some_and(|tls| !tls.insecure_skip_verify);
    if let Some(name) = cluster.server_name().filter(|_| verified)
        && ServerName::try_from(name).is_err()
    {
        let message = format!("no certificate can be made out to `{name}`");
        let help = Some("write `server_name` of [cluster.NAME.upstream.tls]".to_owned());
        section.fault(&section.place, message, "in this cluster".into(), help);
    }
}

/// Probes speak HTTP/1.1: one that can't succeed would take every node out.
fn probes_are_understood(cluster: &Cluster, section: &Section) {
    if cluster.upstream.protocol == UpstreamProtocol::H2 && cluster.health.path.is_some() {
        let message = "the active probe speaks HTTP/1.1, and the nodes HTTP/2".to_owned();
        let help = Some("remove `path` of [cluster.NAME.health]: ejection still works".to_owned());
        section.fault(&section.place, message, "in this cluster".into(), help);
    }
}

fn timeouts(mut section: Section) -> Timeouts {
    Timeouts {
        connect: section.duration("connect", secs(1)),
        response_header: section.duration("response_header", secs(60)),
        idle: section.duration("idle", secs(60)),
        stream_idle: section.duration("stream_idle", secs(3600)),
        tunnel_idle: section.duration("tunnel_idle", secs(3600)),
        tunnel_close: section.duration("tunnel_close", secs(5)),
        pool_idle: section.duration("pool_idle", secs(4)),
    }
}

fn health(mut section: Section) -> Health {
    Health {
        path: section.parsed("path", "a path", absolute),
        interval: section.duration("interval", secs(2)).max(Duration::from_millis(50)),
        timeout: section.duration("timeout", secs(1)),
        eject_after: u32::try_from(section.count("eject_after", 0, 5)).unwrap_or(5),
        eject_base: section.duration("eject_base", secs(5)),
        eject_longest: section.duration("eject_longest", secs(60)),
        eject_max: section.share("eject_max", 0.5),
    }
}

fn retry(mut section: Section) -> Retry {
    let is_written = section.take("on");
    let mut retry = Retry {
        on_connect: true,
        on_status: vec![
            StatusCode::BAD_GATEWAY,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::GATEWAY_TIMEOUT,
        ],
        attempts: u32::try_from(section.count("attempts", 1, 3).min(10)).unwrap_or(3),
        budget: section.share("budget", 0.2),
        budget_min: u32::try_from(section.count("budget_min", 0, 10)).unwrap_or(10),
    };
    let Some(value) = is_written else { return retry };
    retry.on_connect = false;
    retry.on_status.clear();
    let list = match value.kind {
        Kind::List(list) => list,
        kind => vec![Value { kind, place: value.place }],
    };
    for value in list {
        match &value.kind {
            Kind::Text(word) if word == "connect" => retry.on_connect = true,
            Kind::Text(code) if code.starts_with('5') && code.len() == 3 => {
                match code.parse::<u16>().ok().and_then(|code| StatusCode::from_u16(code).ok()) {
                    Some(status) => retry.on_status.push(status),
                    None => section.wrong("on", &value, "\"connect\" and 5xx statuses", None),
                }
            }
            _ => section.wrong("on", &value, "\"connect\" and 5xx statuses like \"503\"", None),
        }
    }
    retry
}

fn replay(mut section: Section) -> Replay {
    let max_hops = section.integer("max_hops", 0..=10).unwrap_or(3);
    Replay {
        max_hops: u32::try_from(max_hops).unwrap_or(3),
        buffer: section.size("buffer", 1 << 20),
        json: section.boolean("json", false),
        pass: section.boolean("pass", false),
        primary_region: section.text("primary_region").map(|r| r.to_ascii_lowercase().into()),
    }
}

fn hold(mut section: Section) -> Hold {
    Hold {
        timeout: section.duration("timeout", secs(30)),
        max_requests: section.count("max_requests", 0, 1000),
        max_bytes: section.size("max_bytes", 64 << 20),
        release: section.count("release", 1, 32),
    }
}

fn consistency(mut section: Section, primary: &[RoleSource]) -> Consistency {
    let has_positions = primary.iter().any(|source| matches!(source, RoleSource::Litefs { .. }));
    let written = section.take("mode");
    let mode = match written.as_ref().map(|value| &value.kind) {
        None if has_positions => Mode::Token,
        None => Mode::Affinity,
        Some(Kind::Text(mode)) if mode == "token" => {
            if !has_positions && let Some(value) = &written {
                let message = "mode \"token\" needs to know the nodes' positions".to_owned();
                let help = "add { type = \"litefs\" } to `primary`, or write \"affinity\"";
                let label = "no source tells them".to_owned();
                section.fault(&value.place, message, label, Some(help.into()));
            }
            Mode::Token
        }
        Some(Kind::Text(mode)) if mode == "affinity" => Mode::Affinity,
        Some(Kind::Text(mode)) if mode == "off" => Mode::Off,
        Some(_) => {
            if let Some(value) = &written {
                section.wrong("mode", value, "\"token\", \"affinity\" or \"off\"", None);
            }
            Mode::Off
        }
    };
    let databases: Vec<Box<str>> = section.texts("databases", "file names", |name| {
        let is_name = !name.is_empty() && !name.contains('/');
        is_name.then(|| name.into()).ok_or_else(|| "like \"app.db\"".to_owned())
    });
    if databases.len() > DATABASES {
        let place = section.place.clone();
        let message = format!("more than {DATABASES} databases");
        section.fault(&place, message, "in this section".into(), None);
    }
    let heeded =
        [("any", OnRequest::Any), ("trusted", OnRequest::Trusted), ("off", OnRequest::Off)];
    Consistency {
        mode,
        databases: databases.into(),
        wait: section.duration("wait", secs(1)),
        affinity: section.duration("affinity", secs(2)),
        token_age: section.duration("token_age", secs(3600)),
        key: section.text("key").map(|key| Secret::new(&key)),
        cookie: section.boolean("cookie", true),
        txid_cookie: section.boolean("txid_cookie", true),
        on_request: section.word("on_request", &heeded, OnRequest::Any),
    }
}

fn durability(mut section: Section, primary: &[RoleSource]) -> Durability {
    let has_positions = primary.iter().any(|source| matches!(source, RoleSource::Litefs { .. }));
    let replicas = section.count("replicas", 0, 0);
    if replicas > 0 && !has_positions {
        let place = section.place.clone();
        let message = "waiting for replicas needs to know the nodes' positions".to_owned();
        let help = Some("add { type = \"litefs\" } to `primary`".to_owned());
        section.fault(&place, message, "no source tells them".into(), help);
    }
    let words = [("warn", OnTimeout::Warn), ("fail", OnTimeout::Fail)];
    Durability {
        replicas,
        timeout: section.duration("timeout", secs(1)),
        on_timeout: section.word("on_timeout", &words, OnTimeout::Warn),
    }
}

fn route(mut section: Section, index: usize, clusters: &[Cluster]) -> Option<Route> {
    let host = section.texts("host", "host names", |host| {
        let lower = host.to_ascii_lowercase();
        let (below, name) = match lower.strip_prefix('*') {
            Some(rest) => (true, rest),
            None => (false, &*lower),
        };
        let is_name = !name.is_empty() && !name.contains(['*', '/', ' ', ':']);
        match (is_name, below) {
            (true, true) if name.starts_with('.') => Ok(Host::Below(name.into())),
            (true, false) => Ok(Host::Exact(name.into())),
            _ => Err("like \"abaci.one\" or \"*.abaci.one\", without a port".to_owned()),
        }
    });
    let path = path(&mut section);
    let method = section.texts("method", "methods", |method| {
        Method::from_bytes(method.as_bytes()).map_err(|_| "like \"POST\"".to_owned())
    });
    let mut header = Vec::new();
    for value in section.list("header") {
        let mut table = section.table("route.header", "header", value);
        let name = table.parsed("name", "a field name", |name| {
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| "like \"x-kind\"".to_owned())
        });
        let value = table.text("value").map(Into::into);
        match name {
            Some(name) => header.push(HeaderMatch { name, value }),
            None => table.missing("name", "the field to look at"),
        }
    }
    let classes = [("auto", Class::Auto), ("read", Class::Read), ("write", Class::Write)];
    let class = section.word("class", &classes, Class::Auto);
    let idempotent = section.boolean("idempotent", false);
    let retry_uncommitted = section.boolean("retry_uncommitted", false);
    let allow_trace = section.boolean("allow_trace", false);
    let causal = section.take("causal").and_then(|value| match &value.kind {
        Kind::Text(word) if word == "path" => Some(Scope::Path),
        Kind::Integer(n @ 0..=32) => usize::try_from(*n).ok().map(Scope::Segments),
        _ => {
            section.wrong("causal", &value, "\"path\" or a number of segments up to 32", None);
            None
        }
    });
    let names: Vec<_> = clusters.iter().map(|cluster| &*cluster.name).collect();
    let wanted = format!("one of {}", names.join(", "));
    let cluster = match section.take("cluster") {
        None if clusters.len() == 1 => Some(0),
        None => {
            section.missing("cluster", &wanted);
            None
        }
        Some(value) => {
            if let Kind::Text(name) = &value.kind {
                let found = names.iter().position(|known| known == name);
                if found.is_none() {
                    let message = format!("no cluster is called `{name}`");
                    section.fault(&value.place, message, "here".into(), Some(wanted));
                }
                found
            } else {
                section.wrong("cluster", &value, "a cluster's name", None);
                None
            }
        }
    };
    let cluster = cluster?;
    let index = Some(index);
    let is_blind = clusters.get(cluster).is_some_and(|c| c.consistency.mode != Mode::Token);
    if causal.is_some() && is_blind {
        let place = section.place.clone();
        let message = "`causal` needs to know the nodes' positions".to_owned();
        let help = Some("the cluster needs consistency mode \"token\"".to_owned());
        section.fault(&place, message, "in this route".into(), help);
    }
    Some(Route {
        host,
        path,
        method,
        header,
        class,
        cluster,
        idempotent,
        retry_uncommitted,
        allow_trace,
        causal,
        index,
    })
}

fn path(section: &mut Section) -> RoutePath {
    let absolute = |path: &str| {
        if path.starts_with('/') { Ok(path.to_owned()) } else { Err("begin with /".to_owned()) }
    };
    let prefix = section.parsed("path", "a path", absolute);
    let exact = section.parsed("path_exact", "a path", absolute);
    let glob = section.text("path_glob");
    match (prefix, exact, glob) {
        (None, None, None) => RoutePath::Any,
        (Some(prefix), None, None) => {
            let bare = prefix.trim_end_matches('/');
            RoutePath::Prefix(if bare.is_empty() { "/" } else { bare }.into())
        }
        (None, Some(exact), None) => RoutePath::Exact(exact.into()),
        (None, None, Some(glob)) => RoutePath::Glob(glob.into()),
        _ => {
            let message = "a route has one of `path`, `path_exact` and `path_glob`".to_owned();
            section.fault(&section.place, message, "this has more".into(), None);
            RoutePath::Any
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
[[listener]]
address = "0.0.0.0:8080"

[cluster.abaci]
port    = 3000
members = { type = "dns", name = "abaci-app-headless" }
primary = { type = "litefs" }
"#;

    fn parsed(text: &str) -> Result<Config, String> {
        parse("litegate.toml", text, []).map_err(|faults| faults.to_string())
    }

    #[test]
    fn the_least_that_works_works() {
        let config = parsed(LEAST).unwrap();
        assert_eq!(config.clusters[0].hold.timeout, secs(30));
        assert_eq!(config.routes.len(), 1);
        assert_eq!(config.admin.address, Some("127.0.0.1:9090".parse().unwrap()));
        assert!(config.admin.peers.is_empty());
    }

    #[test]
    fn peers_are_names_with_a_port() {
        let with = |peers: &str| parsed(&format!("{LEAST}\n[admin]\npeers = {peers}"));
        let peers = with(r#"["litegate-admin:9090", "[::1]:1"]"#).unwrap().admin.peers;
        assert_eq!(peers, [Arc::from("litegate-admin:9090"), Arc::from("[::1]:1")]);
        assert_eq!(with(r#""one:9090""#).unwrap().admin.peers.len(), 1);
        for wrong in ["litegate-admin", ":9090", "a:0", "a:x", "http://a:1", "a b:1"] {
            let said = with(&format!("[\"{wrong}\"]")).unwrap_err();
            assert!(said.contains("like \"litegate-admin:9090\""), "{wrong}: {said}");
        }
    }

    #[test]
    fn everything_wrong_is_said_at_once() {
        let faults = parsed(
            r#"[[listener]]
address = "0.0.0.0"

[cluster.abaci]
port = 20202
members = { type = "dns", name = "x" }
primary = { type = "litefs" }
max_lag  = 10

[cluster.abaci.hold]
tiemout = "30s"
"#,
        )
        .unwrap_err();
        insta::assert_snapshot!(faults, @r#"
        error: `address` needs an IP address and a port
         --> litegate.toml:2:11
          |
        2 | address = "0.0.0.0"
          |           ^^^^^^^^^ not like this
          = help: an IP address and a port, like "0.0.0.0:8080"

        error: port 20202 of [cluster.abaci] is LiteFS's API
         --> litegate.toml:4:1
          |
        4 | [cluster.abaci]
          | ^^^^^^^^^^^^^^^ it must not be reachable
          = help: write the port of the app or of LiteFS's proxy

        error: `max_lag` needs a number and a unit
         --> litegate.toml:8:12
          |
        8 | max_lag  = 10
          |            ^^ this is a bare number
          = help: "10s"; units are ms, s, m, h

        error: unknown key `tiemout`
          --> litegate.toml:11:1
           |
        11 | tiemout = "30s"
           | ^^^^^^^ in [cluster.abaci.hold]
           = help: did you mean `timeout`?

        4 errors
        "#);
    }

    #[test]
    fn what_is_wrong_or_misspelt_is_not_called_missing_too() {
        let faults = parsed(
            r#"[[listener]]
adress = "0.0.0.0:8080"
[cluster.abaci]
port = "3000"
members = { type = "dnss", name = "x" }
primary = [{ typ = "litefs" }, { kind = "litefs" }]
"#,
        )
        .unwrap_err();
        assert!(faults.contains("did you mean `address`?"), "{faults}");
        assert!(faults.contains("`port` needs a whole number"), "{faults}");
        assert!(faults.contains("did you mean \"dns\"?"), "{faults}");
        assert!(faults.contains("did you mean `type`?"), "{faults}");
        assert_eq!(faults.matches(" is missing").count(), 1, "{faults}");
        assert!(faults.contains("5 errors"), "{faults}");
        // Written, and nothing in it: that is missing.
        let empty = "[[listener]]\naddress = \"0.0.0.0:80\"\n[cluster.a]\nport = 1\n\
                     members = { type = \"static\", nodes = [] }\nprimary = []\n";
        assert_eq!(parsed(empty).unwrap_err().matches(" is missing").count(), 2);
    }

    #[test]
    fn what_is_missing_is_said_with_the_cure() {
        insta::assert_snapshot!(parsed("").unwrap_err(), @r#"
        error: `[[listener]]` is missing
         --> litegate.toml:1:1
          |
        1 | 
          | ^ here
          = help: add one: [[listener]] with address = "0.0.0.0:8080"

        error: `[cluster.NAME]` is missing
         --> litegate.toml:1:1
          |
        1 | 
          | ^ here
          = help: add one: [cluster.app] with port, members and primary

        2 errors
        "#);
    }

    #[test]
    fn both_protocols_are_spoken_where_nothing_is_said() {
        for (key, http1, h2) in [
            ("", true, true),
            ("protocols = [\"http/1.1\"]", true, false),
            ("protocols = \"h2\"", false, true),
            ("protocols = [\"http/1.1\", \"h2\"]", true, true),
        ] {
            let text = LEAST.replace("8080\"", &format!("8080\"\n{key}"));
            let listener = &parsed(&text).unwrap().listeners[0];
            assert_eq!(listener.protocols, Protocols { http1, h2 }, "{key}");
        }
        let text = LEAST.replace("8080\"", "8080\"\nprotocols = [\"h3\"]");
        assert!(parsed(&text).unwrap_err().contains("`protocols` needs"));
    }

    #[test]
    fn tls_needs_its_files_named() {
        for (tls, missing) in [
            ("{}", "certificates"),
            ("{ certificates = [{ certificate = \"a\" }] }", "`key` is missing"),
            (
                "{ certificates = [{ certificate = \"a\", key = \"b\" }], client_auth = \"required\" }",
                "client_ca",
            ),
        ] {
            let text = LEAST.replace("8080\"", &format!("8080\"\ntls = {tls}"));
            assert!(parsed(&text).unwrap_err().contains(missing), "{tls}");
        }
    }

    const ACME: &str = "{ domains = [\"A.test\"], cache = \"c\", terms_agreed = true }";

    fn with_acme(acme: &str) -> String {
        LEAST.replace("8080\"", &format!("8080\"\ntls = {{ acme = {acme} }}"))
    }

    fn with_http3(listener: &str) -> String {
        LEAST.replace("8080\"", &format!("8080\"\n{listener}"))
    }

    const PAIR: &str = "tls = { certificates = [{ certificate = \"a\", key = \"b\" }] }";

    #[cfg(not(feature = "http3"))]
    #[test]
    fn http3_needs_its_feature() {
        let faults = parsed(&with_http3(&format!("http3 = true\n{PAIR}"))).unwrap_err();
        assert!(faults.contains("--features http3"), "{faults}");
        assert_eq!(parsed(&with_http3("http3 = false")).unwrap().listeners[0].http3, None);
    }

    #[cfg(feature = "http3")]
    #[test]
    fn http3_has_an_age_and_a_port() {
        let day = Some(Duration::from_hours(24));
        for (written, want) in [
            ("false", None),
            ("true", Some(Http3 { alt_svc: day, port: None })),
            ("{}", Some(Http3 { alt_svc: day, port: None })),
            ("{ alt_svc = \"0s\" }", Some(Http3 { alt_svc: None, port: None })),
            (
                "{ alt_svc = \"1s\", port = 443 }",
                Some(Http3 { alt_svc: Some(secs(1)), port: Some(443) }),
            ),
        ] {
            let config = parsed(&with_http3(&format!("http3 = {written}\n{PAIR}"))).unwrap();
            assert_eq!(config.listeners[0].http3, want, "{written}");
        }
    }

    #[test]
    fn http3_needs_tls_and_knows_no_proxy_protocol() {
        for (listener, want) in [
            ("http3 = true".to_owned(), "HTTP/3 needs `tls`"),
            (format!("http3 = true\n{PAIR}\nproxy_protocol = \"accept\""), "don't go together"),
            (format!("http3 = 3\n{PAIR}"), "http3"),
            (format!("http3 = {{ ports = 1 }}\n{PAIR}"), "ports"),
            (format!("http3 = {{ port = 0 }}\n{PAIR}"), "port"),
        ] {
            let faults = parsed(&with_http3(&listener)).unwrap_err();
            assert!(faults.contains(want), "{listener}: {faults}");
        }
    }

    #[cfg(not(feature = "acme"))]
    #[test]
    fn acme_needs_its_feature() {
        let faults = parsed(&with_acme(ACME)).unwrap_err();
        assert!(faults.contains("--features acme"), "{faults}");
    }

    #[cfg(feature = "acme")]
    #[test]
    fn acme_stands_for_certificates() {
        let config = parsed(&with_acme(ACME)).unwrap();
        let tls = config.listeners[0].tls.as_ref().unwrap();
        let acme = tls.acme.as_ref().unwrap();
        assert_eq!(acme.domains, ["a.test"]);
        assert_eq!(acme.directory, LETS_ENCRYPT);
        let staging = Acme { directory: "https://staging.test/".into(), ..acme.clone() };
        assert_ne!(acme.certificate(), staging.certificate());
        assert_ne!(acme.account(), staging.account());
        let twice = |acme: &str| {
            let second =
                format!("[[listener]]\naddress = \"[::1]:8443\"\ntls = {{ acme = {acme} }}\n");
            parsed(&format!("{second}{}", with_acme(ACME)))
        };
        twice(ACME).unwrap();
        let more = ACME.replace("\"A.test\"", "\"a.test\", \"b.test\"");
        assert!(twice(&more).unwrap_err().contains("two certificates by ACME"));
    }

    #[test]
    fn acme_needs_domains_a_cache_and_the_terms() {
        for (written, instead, want) in [
            ("terms_agreed = true", "terms_agreed = false", "terms of service"),
            (", terms_agreed = true", "", "terms of service"),
            ("cache = \"c\", ", "", "`cache` is missing"),
            ("domains = [\"A.test\"], ", "", "`domains` is missing"),
            ("A.test", "*.a.test", "wildcards"),
            ("A.test", "../a", "names of hosts"),
            ("A.test", "10.0.0.1", "names of hosts"),
            ("cache", "directory = \"http://a.test/\", cache", "https URL"),
            ("cache", "contacts = [\"ops\"], cache", "mailto:"),
            ("cache", "email = \"ops\", cache", "email"),
        ] {
            let faults = parsed(&with_acme(&ACME.replace(written, instead))).unwrap_err();
            assert!(faults.contains(want), "{instead}: {faults}");
        }
    }

    #[test]
    fn what_needs_positions_needs_a_source_of_them() {
        let config = parsed(LEAST).unwrap();
        assert_eq!(config.clusters[0].consistency.mode, Mode::Token);
        let blind = LEAST.replace("type = \"litefs\"", "type = \"instance\", name = \"a\"");
        assert_eq!(parsed(&blind).unwrap().clusters[0].consistency.mode, Mode::Affinity);
        for more in ["consistency]\nmode = \"token\"", "durability]\nreplicas = 1"] {
            let text = format!("{blind}[cluster.abaci.{more}\n");
            assert!(parsed(&text).unwrap_err().contains("positions"), "{text}");
        }
    }

    fn with_primary(primary: &str) -> Result<Vec<RoleSource>, String> {
        let text = LEAST.replace(r#"{ type = "litefs" }"#, primary);
        parsed(&text).map(|config| config.clusters[0].primary.clone())
    }

    #[test]
    fn every_role_source_is_read() {
        let sources = with_primary(
            r#"[
  { type = "litefs" },
  { type = "consul", address = "http://[::1]", key = "litefs/abaci", token = "x-1", datacenter = "dc1" },
  { type = "http", path = "/primary", port = 8008, interval = "2s" },
  { type = "file", path = "/litefs/.primary", instance = "abaci-app-0" },
]"#,
        );
        let sources = sources.unwrap();
        let consul = Consul {
            host: "::1".into(),
            port: 8500,
            key: "litefs/abaci".into(),
            token: Some(Secret::new("x-1")),
            datacenter: Some("dc1".into()),
        };
        assert_eq!(sources[1], RoleSource::Consul(consul));
        assert!(!format!("{sources:?}").contains("x-1"), "a token is shown to nobody");
        let (interval, timeout) = (secs(2), Duration::from_millis(500));
        let http =
            RoleSource::Http { path: "/primary".into(), port: Some(8008), interval, timeout };
        assert_eq!(sources[2], http);
        assert_eq!(sources.len(), 4);
    }

    #[test]
    fn a_role_source_that_can_not_work_is_refused() {
        for (source, what) in [
            (r#"{ type = "consul", address = "https://consul:8501", key = "a" }"#, "https is not"),
            (r#"{ type = "consul", address = "consul:8500", key = "a" }"#, "like \"http://"),
            (r#"{ type = "consul", address = "http://a:b@c", key = "a" }"#, "like \"http://"),
            (
                r#"{ type = "consul", address = "http://consul/litefs", key = "a" }"#,
                "like \"http://",
            ),
            (r#"{ type = "consul", address = "http://consul", key = "/a" }"#, "lease.consul.key"),
            (r#"{ type = "consul", address = "http://consul" }"#, "`key` is missing"),
            (r#"{ type = "consul", key = "a" }"#, "`address` is missing"),
            (r#"{ type = "consul", address = "http://c", key = "a", token = "a\nb" }"#, "`token`"),
            (r#"{ type = "http" }"#, "`path` is missing"),
            (r#"{ type = "http", path = "primary" }"#, "`path` needs"),
            (r#"{ type = "file" }"#, "`path` is missing"),
            (r#"{ type = "etcd" }"#, "\"consul\""),
            (r#"[{ type = "litefs" }, { type = "litefs" }]"#, "of the same type"),
        ] {
            let faults = with_primary(source).unwrap_err();
            assert!(faults.contains(what), "{source}:\n{faults}");
        }
    }

    #[test]
    fn the_environment_outranks_the_file_and_is_named_in_faults() {
        let set = |name: &str, value: &str| {
            parse("litegate.toml", LEAST, [(name.to_owned(), value.to_owned())])
        };
        let config = set("LITEGATE__CLUSTER__ABACI__HOLD__TIMEOUT", "25s").unwrap();
        assert_eq!(config.clusters[0].hold.timeout, secs(25));
        let config = set("LITEGATE__LISTENER__0__ADDRESS", "127.0.0.1:1").unwrap();
        assert_eq!(config.listeners[0].address.port(), 1);
        let faults = set("LITEGATE__SERVER__WORKERS", "0").unwrap_err().to_string();
        assert!(faults.contains("environment variable LITEGATE__SERVER__WORKERS"), "{faults}");
    }

    #[test]
    fn a_route_needs_a_cluster_that_exists() {
        let text = format!("{LEAST}[[route]]\npath = \"/a/\"\ncluster = \"other\"\n");
        assert!(parsed(&text).unwrap_err().contains("no cluster is called `other`"));
        let text = format!("{LEAST}[[route]]\npath = \"/a/\"\nclass = \"write\"\n");
        let config = parsed(&text).unwrap();
        assert_eq!(config.routes[0].path, RoutePath::Prefix("/a".into()));
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,200}") {
            let _ = parsed(&text);
        }

        #[test]
        fn a_damaged_file_is_refused_with_a_reason(at in 0usize..150, with in "[ -~]{1,3}") {
            let mut text = LEAST.to_owned();
            text.insert_str(at.min(text.len()), &with);
            if let Err(faults) = parse("x", &text, []) {
                proptest::prop_assert!(!faults.all.is_empty());
            }
        }
    }
}
