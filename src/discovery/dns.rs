//! Members, primaries and names by DNS.
//!
//! hickory's cache is off: each refresh is a question, as often as the records' TTL says, between
//! [`SHORTEST`] and [`LONGEST`] and with jitter, and at once when the data plane could not
//! connect somewhere. What is no answer (NXDOMAIN, none, a dead server) is reported as such; the
//! reconciler goes on with the last good one.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
    proto::rr::{RData, Record, RecordType},
};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Observer, is_usable};
use crate::{
    config::cluster::Lookup,
    topology::{Member, PrimaryName, Saw, Source},
};

/// The shortest time between two refreshes, whatever the TTL says.
const SHORTEST: Duration = Duration::from_millis(250);
/// The longest.
const LONGEST: Duration = Duration::from_secs(5);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);
/// One question to one server.
const TIMEOUT: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 2;

/// Lists members for ever: addresses with `port`, or SRV targets where it is `None`.
pub(super) async fn members(lookup: Lookup, port: Option<u16>, observer: Observer) {
    let Some(resolver) = resolver(&lookup) else {
        observer.observe(Saw::MembersUnavailable, Source::Members);
        return;
    };
    loop {
        let found = match port {
            Some(port) => by_address(&resolver, &lookup.name, port).await,
            None => by_service(&resolver, &lookup.name).await,
        };
        let pause = if let Some((members, ttl)) = found {
            observer.observe(Saw::Members(members), Source::Members);
            jittered(ttl.clamp(SHORTEST, LONGEST))
        } else {
            observer.observe(Saw::MembersUnavailable, Source::Members);
            jittered(AGAIN)
        };
        let now = Instant::now();
        tokio::select! {
            () = sleep(pause) => {}
            () = observer.refresh.notified() => sleep_until(now + SHORTEST).await,
        }
    }
}

/// Watches a name that resolves to the primary only.
pub(super) async fn primary(lookup: Lookup, observer: Observer) {
    let Some(resolver) = resolver(&lookup) else { return };
    loop {
        let found = by_address(&resolver, &lookup.name, 0).await;
        let ttl = found.as_ref().map_or(AGAIN, |(_, ttl)| *ttl);
        // A failure says nothing about who is primary.
        if let Some((members, _)) = found {
            let addresses = members.iter().map(|member| member.address.ip()).collect();
            let name = PrimaryName::Addresses(addresses);
            observer.observe(Saw::PrimaryIs(Some(name)), Source::Dns);
        }
        sleep(jittered(ttl.clamp(SHORTEST, LONGEST))).await;
    }
}

/// Learns a member's instance name by PTR: CoreDNS answers `<instance>.<service>…` for the pods
/// of a headless service.
pub(super) async fn name_of(lookup: Lookup, member: SocketAddr, observer: Observer) {
    let Some(resolver) = resolver(&lookup) else { return };
    let Ok(answer) = resolver.reverse_lookup(member.ip()).await else { return };
    let service = first_label(&lookup.name);
    for record in answer.answers() {
        if let RData::PTR(name) = &record.data {
            let name = name.0.to_ascii();
            let mut labels = name.split('.');
            // Only a name below our own service is an instance's.
            if let (Some(instance), Some(below)) = (labels.next(), labels.next())
                && below.eq_ignore_ascii_case(service)
            {
                let saw = Saw::Named { address: member, name: instance.into() };
                observer.observe(saw, Source::Members);
            }
        }
    }
}

/// Learns whose name `name` is, by looking up `<name>.<service>`. Only members are named.
pub(super) async fn address_of(
    lookup: Lookup,
    name: Arc<str>,
    members: Vec<SocketAddr>,
    observer: Observer,
) {
    let is_label =
        name.len() <= 63 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let (true, Some(resolver)) = (is_label, resolver(&lookup)) else { return };
    let found = by_address(&resolver, &format!("{name}.{}", lookup.name), 0).await;
    for (found, _) in found.iter().flat_map(|(found, ttl)| found.iter().map(move |m| (m, ttl))) {
        let ip = found.address.ip();
        if let Some(address) = members.iter().find(|member| member.ip() == ip) {
            let saw = Saw::Named { address: *address, name: Arc::clone(&name) };
            observer.observe(saw, Source::Members);
        }
    }
}

fn first_label(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.9 + 0.2 * fastrand::f64())
}

fn resolver(lookup: &Lookup) -> Option<TokioResolver> {
    let provider = TokioRuntimeProvider::default();
    let mut builder = if lookup.resolvers.is_empty() {
        match TokioResolver::builder(provider) {
            Ok(builder) => builder,
            Err(error) => {
                tracing::error!(%error, "the system's DNS configuration cannot be read");
                return None;
            }
        }
    } else {
        let servers = lookup.resolvers.iter().map(|address| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
            let connections = connections.map(|mut connection| {
                connection.port = address.port();
                connection
            });
            let mut server = NameServerConfig::udp_and_tcp(address.ip());
            server.connections = connections.into();
            server
        });
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
        TokioResolver::builder_with_config(config, provider)
    };
    let options = builder.options_mut();
    options.cache_size = 0;
    options.timeout = TIMEOUT;
    options.attempts = ATTEMPTS;
    options.negative_max_ttl = Some(Duration::from_secs(1));
    match builder.build() {
        Ok(resolver) => Some(resolver),
        Err(error) => {
            tracing::error!(%error, "no DNS resolver can be made");
            None
        }
    }
}

/// A and AAAA. `None` for every kind of failure and for no addresses at all.
async fn by_address(
    resolver: &TokioResolver,
    name: &str,
    port: u16,
) -> Option<(Vec<Member>, Duration)> {
    let (v4, v6) =
        tokio::join!(resolver.lookup(name, RecordType::A), resolver.lookup(name, RecordType::AAAA));
    let both = [v4, v6];
    let records = || both.iter().flatten().flat_map(hickory_resolver::lookup::Lookup::answers);
    let mut members: Vec<Member> = records()
        .filter_map(ip_of)
        .filter(|ip| is_usable(*ip))
        .map(|ip| Member { address: SocketAddr::new(ip, port), name: None })
        .collect();
    members.sort_by_key(|member| member.address);
    members.dedup();
    let ttl = records().map(|record| record.ttl).min().map_or(AGAIN, seconds);
    (!members.is_empty()).then_some((members, ttl))
}

/// SRV, and the addresses of its targets. A target that does not resolve is left out.
async fn by_service(resolver: &TokioResolver, name: &str) -> Option<(Vec<Member>, Duration)> {
    let answer = resolver.lookup(name, RecordType::SRV).await.ok()?;
    let mut members = Vec::new();
    let mut ttl = LONGEST;
    for record in answer.answers() {
        let RData::SRV(srv) = &record.data else { continue };
        ttl = ttl.min(seconds(record.ttl));
        let target = srv.target.to_ascii();
        let Some((found, target_ttl)) = by_address(resolver, &target, srv.port).await else {
            continue;
        };
        ttl = ttl.min(target_ttl);
        let instance: Arc<str> = first_label(&target).into();
        members
            .extend(found.into_iter().map(|m| Member { name: Some(Arc::clone(&instance)), ..m }));
    }
    (!members.is_empty()).then_some((members, ttl))
}

fn ip_of(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    }
}

fn seconds(ttl: u32) -> Duration {
    Duration::from_secs(u64::from(ttl))
}
