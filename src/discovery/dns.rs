//! Members, primaries and names by DNS.
//!
//! hickory's cache is off: each refresh is a question, as often as the records' TTL says, between
//! [`SHORTEST`] and [`LONGEST`] and with jitter, and at once when the data plane could not
//! connect somewhere. What is no answer (NXDOMAIN, none, a dead server) is reported as such; the
//! reconciler goes on with the last good one. Half an answer (A without AAAA, SRV without the
//! address of a target) is completed by what the missing half was before.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::ResponseCode,
        rr::{RData, Record, RecordType},
    },
    system_conf::read_system_conf,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{Observer, is_usable};
use crate::{
    config::cluster::Lookup,
    telemetry::metrics::LookupResult,
    topology::{Member, PrimaryName, Saw, Source},
};

/// The shortest time between two refreshes, whatever the TTL says.
const SHORTEST: Duration = Duration::from_millis(250);
/// The longest.
const LONGEST: Duration = Duration::from_secs(5);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two looks at the name that an address has by PTR.
const NAMES: Duration = Duration::from_secs(30);
/// One question to one server.
const TIMEOUT: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 2;
/// One question in all, however many servers and attempts.
const ANSWER: Duration = Duration::from_secs(3);
/// SRV targets: as many as a cluster may have members.
const TARGETS: usize = 256;
/// Targets that are looked up at once.
const AT_ONCE: usize = 16;

/// Lists members for ever: addresses with `port`, or SRV targets where it is `None`.
pub(super) async fn members(lookup: Lookup, port: Option<u16>, observer: Observer) {
    if resolver(&lookup).is_err() {
        observer.observe(Saw::MembersUnavailable, Source::Members);
    }
    let mut asker = Asker::new(&lookup, &observer).await;
    let mut hosts = Hosts::default();
    let mut services = HashMap::new();
    loop {
        asker.refresh.mark_unchanged();
        let found = match port {
            Some(port) => asker.addresses(&lookup.name, &mut hosts).await.ok().map(|(ips, ttl)| {
                let at =
                    |ip| Member { address: SocketAddr::new(ip, port), name: None, near: false };
                (ips.into_iter().map(at).collect(), ttl)
            }),
            None => asker.service(&lookup.name, &mut services).await,
        };
        let ttl = found.as_ref().map(|(_, ttl)| *ttl);
        let saw = found.map_or(Saw::MembersUnavailable, |(members, _)| Saw::Members(members));
        observer.observe(saw, Source::Members);
        asker.rest(ttl).await;
    }
}

/// Watches a name that resolves to the primary only.
pub(super) async fn primary(lookup: Lookup, observer: Observer) {
    let mut asker = Asker::new(&lookup, &observer).await;
    let mut hosts = Hosts::default();
    loop {
        asker.refresh.mark_unchanged();
        let found = asker.addresses(&lookup.name, &mut hosts).await.ok();
        let ttl = found.as_ref().map(|(_, ttl)| *ttl);
        // A failure says nothing about who is primary.
        if let Some((addresses, _)) = found {
            let name = PrimaryName::Addresses(addresses);
            observer.observe(Saw::PrimaryIs(Some(name)), Source::Dns);
        }
        asker.rest(ttl).await;
    }
}

/// Learns a member's instance name by PTR, again and again: CoreDNS answers
/// `<instance>.<service>…` for the pods of a headless service, and a later pod may get an earlier
/// one's address.
pub(super) async fn name_of(lookup: Lookup, member: SocketAddr, observer: Observer) {
    let asker = Asker::new(&lookup, &observer).await;
    let mut pause = AGAIN;
    loop {
        let answer = timeout(ANSWER, asker.resolver.reverse_lookup(member.ip())).await;
        let (records, result) = read(answer);
        observer.cells.looked_up(result);
        let names = records.iter().filter_map(|record| match &record.data {
            RData::PTR(name) => instance_below(&name.0.to_ascii(), &lookup.name),
            _ => None,
        });
        for name in names {
            observer.observe(Saw::Named { address: member, name }, Source::Members);
        }
        pause = if result == LookupResult::Answered { NAMES } else { (pause * 2).min(NAMES) };
        sleep(jittered(pause, fastrand::f64())).await;
    }
}

/// Watches whose name `name` is, by looking up `<name>.<service>`.
pub(super) async fn named(lookup: Lookup, name: Arc<str>, port: u16, observer: Observer) {
    if !is_label(&name) {
        return;
    }
    let mut asker = Asker::new(&lookup, &observer).await;
    loop {
        asker.refresh.mark_unchanged();
        let ttl = asker.name(&lookup, &name, port, &observer).await;
        asker.rest(ttl).await;
    }
}

/// Learns once whose name `name` is.
pub(super) async fn named_once(lookup: Lookup, name: Arc<str>, port: u16, observer: Observer) {
    if is_label(&name) {
        let asker = Asker::new(&lookup, &observer).await;
        asker.name(&lookup, &name, port, &observer).await;
    }
}

/// Who asks, and hears that it is time to ask again.
struct Asker {
    resolver: TokioResolver,
    observer: Observer,
    refresh: watch::Receiver<()>,
}

impl Asker {
    /// Waits for a readable resolv.conf where one is needed.
    async fn new(lookup: &Lookup, observer: &Observer) -> Self {
        let mut said = false;
        loop {
            match resolver(lookup) {
                Ok(resolver) => {
                    let (observer, refresh) = (observer.clone(), observer.refresh.subscribe());
                    return Self { resolver, observer, refresh };
                }
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        let name = &*lookup.name;
                        tracing::error!(name, %error, "no DNS resolver: trying again");
                    }
                    sleep(jittered(AGAIN, fastrand::f64())).await;
                }
            }
        }
    }

    /// Waits for as long as the answer is good, or for somebody who could not connect.
    async fn rest(&mut self, ttl: Option<Duration>) {
        let earliest = Instant::now() + SHORTEST;
        tokio::select! {
            () = sleep(pause(ttl, fastrand::f64())) => {}
            Ok(()) = self.refresh.changed() => sleep_until(earliest).await,
        }
    }

    async fn ask(&self, name: &str, kind: RecordType) -> (Vec<Record>, LookupResult) {
        read(timeout(ANSWER, self.resolver.lookup(name, kind)).await)
    }

    /// A and AAAA, and how long they are good for.
    ///
    /// # Errors
    /// Every kind of failure, and no usable address at all: then `known` is what it was.
    async fn addresses(
        &self,
        name: &str,
        known: &mut Hosts,
    ) -> Result<(Vec<IpAddr>, Duration), LookupResult> {
        let (v4, v6) =
            tokio::join!(self.ask(name, RecordType::A), self.ask(name, RecordType::AAAA));
        let result = together(v4.1, v6.1);
        self.observer.cells.looked_up(result);
        let ttl = is_failure(result).then_some(AGAIN);
        let ttls = v4.0.iter().chain(&v6.0).map(|record| seconds(record.ttl));
        let ttl = ttls.chain(ttl).min().unwrap_or(AGAIN);
        let found = |(records, result): (Vec<Record>, LookupResult)| {
            let mut ips: Vec<_> =
                records.iter().filter_map(ip_of).filter(|ip| is_usable(*ip)).collect();
            ips.sort_unstable();
            ips.dedup();
            if is_failure(result) { None } else { Some(ips) }
        };
        if known.update(found(v4), found(v6)) { Ok((known.all(), ttl)) } else { Err(result) }
    }

    /// SRV, and the addresses of its targets. `known`: those of each target.
    async fn service(
        &self,
        name: &str,
        known: &mut HashMap<String, Hosts>,
    ) -> Option<(Vec<Member>, Duration)> {
        let (records, result) = self.ask(name, RecordType::SRV).await;
        self.observer.cells.looked_up(result);
        let mut ttl = records.iter().map(|record| seconds(record.ttl)).min().unwrap_or(AGAIN);
        let services = records.iter().filter_map(|record| match &record.data {
            // RFC 2782: the root as a target means that there is no such service.
            RData::SRV(srv) if srv.port > 0 && !srv.target.is_root() => {
                Some((srv.target.to_ascii(), srv.port))
            }
            _ => None,
        });
        let services: Vec<_> = services.take(TARGETS).collect();
        let mut before = std::mem::take(known);
        let mut targets: Vec<_> = services.iter().map(|(target, _)| target.clone()).collect();
        targets.sort_unstable();
        targets.dedup();
        let asked = targets.into_iter().map(|target| {
            let mut hosts = before.remove(&target).unwrap_or_default();
            async move {
                let found = self.addresses(&target, &mut hosts).await;
                if found.as_ref().is_err_and(|result| !is_failure(*result)) {
                    // It has none any more, whatever SRV says.
                    hosts = Hosts::default();
                }
                (target, found, hosts)
            }
        });
        let answers: Vec<_> = stream::iter(asked).buffer_unordered(AT_ONCE).collect().await;
        if services.is_empty() {
            // No answer: the next one may list them again.
            *known = before;
            return None;
        }
        for (target, found, hosts) in answers {
            ttl = ttl.min(found.map_or(AGAIN, |(_, ttl)| ttl));
            known.insert(target, hosts);
        }
        let mut members: Vec<Member> = services
            .iter()
            .flat_map(|(target, port)| {
                // A target that could not be looked up now is where it was.
                let ips = known.get(target).map(Hosts::all).unwrap_or_default();
                let instance = first_label(target);
                let name = is_label(instance).then(|| Arc::from(instance));
                let at = move |ip| Member {
                    address: SocketAddr::new(ip, *port),
                    name: name.clone(),
                    near: false,
                };
                ips.into_iter().map(at)
            })
            .collect();
        members.sort_by_key(|member| member.address);
        members.dedup_by_key(|member| member.address);
        (!members.is_empty()).then_some((members, ttl))
    }

    /// Reports whose name `name` is. How long that is good for.
    async fn name(
        &self,
        lookup: &Lookup,
        name: &Arc<str>,
        port: u16,
        observer: &Observer,
    ) -> Option<Duration> {
        let full = format!("{name}.{}", lookup.name);
        let (addresses, ttl) = self.addresses(&full, &mut Hosts::default()).await.ok()?;
        for ip in addresses {
            // Ignored where it is no member's: a name brings nobody in.
            let saw = Saw::Named { address: SocketAddr::new(ip, port), name: Arc::clone(name) };
            observer.observe(saw, Source::Members);
        }
        Some(ttl)
    }
}

/// The last good addresses of one name, by family: one family's failure must not take the other's
/// members along.
#[derive(Debug, Default, Eq, PartialEq)]
struct Hosts {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
}

impl Hosts {
    /// Takes what was found, `None` where asking failed. Whether it was any address at all:
    /// otherwise nothing changes.
    fn update(&mut self, v4: Option<Vec<IpAddr>>, v6: Option<Vec<IpAddr>>) -> bool {
        if [&v4, &v6].into_iter().flatten().all(Vec::is_empty) {
            return false;
        }
        for (known, found) in [(&mut self.v4, v4), (&mut self.v6, v6)] {
            if let Some(found) = found {
                *known = found;
            }
        }
        true
    }

    fn all(&self) -> Vec<IpAddr> {
        self.v4.iter().chain(&self.v6).copied().collect()
    }
}

/// Records of an answer, and what it is counted as.
fn read<E>(
    answer: Result<Result<hickory_resolver::lookup::Lookup, NetError>, E>,
) -> (Vec<Record>, LookupResult) {
    let result = match answer {
        Ok(Ok(lookup)) if lookup.answers().is_empty() => LookupResult::Empty,
        Ok(Ok(lookup)) => return (lookup.answers().to_vec(), LookupResult::Answered),
        Ok(Err(NetError::Dns(DnsError::NoRecordsFound(none)))) => match none.response_code {
            ResponseCode::NXDomain => LookupResult::NxDomain,
            ResponseCode::NoError => LookupResult::Empty,
            _ => LookupResult::Failed,
        },
        Ok(Err(NetError::Timeout)) | Err(_) => LookupResult::Timeout,
        Ok(Err(_)) => LookupResult::Failed,
    };
    (Vec::new(), result)
}

fn is_failure(result: LookupResult) -> bool {
    matches!(result, LookupResult::Timeout | LookupResult::Failed)
}

/// Two families of one name as one look-up: a failure shows, and a family that a cluster does not
/// have does not.
fn together(v4: LookupResult, v6: LookupResult) -> LookupResult {
    use LookupResult::{Answered, Empty};
    match (v4, v6) {
        (failed, _) | (_, failed) if is_failure(failed) => failed,
        (Answered, _) | (_, Answered) => Answered,
        (same, other) if same == other => same,
        _ => Empty,
    }
}

/// The instance in `<instance>.<service>…`.
fn instance_below(name: &str, service: &str) -> Option<Arc<str>> {
    let mut labels = name.split('.');
    let (instance, below) = (labels.next()?, labels.next()?);
    // Only a name below our own service is an instance's.
    let is_ours = below.eq_ignore_ascii_case(first_label(service));
    (is_ours && is_label(instance)).then(|| instance.into())
}

/// Whether it can be an instance's name: DNS may say anything.
fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// The addresses of a name outside of any cluster, as the system knows it.
pub(super) async fn addresses(name: &str) -> std::io::Result<Vec<IpAddr>> {
    let lookup = Lookup { name: name.into(), resolvers: Vec::new() };
    let resolver = resolver(&lookup).map_err(std::io::Error::other)?;
    let found = resolver.lookup_ip(name).await.map_err(std::io::Error::other)?;
    Ok(found.iter().filter(|ip| is_usable(*ip)).collect())
}

fn first_label(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

/// How long an answer is good for, within bounds; `None`: it was none. `chance` from 0 to 1.
fn pause(ttl: Option<Duration>, chance: f64) -> Duration {
    jittered(ttl.map_or(AGAIN, |ttl| ttl.clamp(SHORTEST, LONGEST)), chance)
}

/// A tenth more or less, so that many instances do not ask in step.
fn jittered(pause: Duration, chance: f64) -> Duration {
    pause.mul_f64(0.9 + 0.2 * chance)
}

fn resolver(lookup: &Lookup) -> Result<TokioResolver, NetError> {
    let provider = TokioRuntimeProvider::default();
    let mut builder = if lookup.resolvers.is_empty() {
        TokioResolver::builder(provider)?
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
        // Other servers, but names mean what they mean in this pod.
        let (system, options) = read_system_conf().unwrap_or_default();
        let (domain, search, _) = system.into_parts();
        let config = ResolverConfig::from_parts(domain, search, servers.collect());
        let mut builder = TokioResolver::builder_with_config(config, provider);
        builder.options_mut().ndots = options.ndots;
        builder
    };
    let options = builder.options_mut();
    options.cache_size = 0;
    options.timeout = TIMEOUT;
    options.attempts = ATTEMPTS;
    options.negative_max_ttl = Some(Duration::from_secs(1));
    builder.build()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_is_heeded_within_bounds_and_with_jitter() {
        let table = [(0, 0.25), (1, 1.0), (3, 3.0), (30, 5.0), (u32::MAX, 5.0)];
        for (ttl, expected) in table {
            let pause = |chance| pause(Some(seconds(ttl)), chance).as_secs_f64();
            assert!((pause(0.5) - expected).abs() < 1e-6, "{ttl}");
            assert!((pause(0.0) - expected * 0.9).abs() < 1e-6, "{ttl}");
            assert!((pause(1.0) - expected * 1.1).abs() < 1e-6, "{ttl}");
        }
        assert_eq!(pause(None, 0.5), AGAIN);
    }

    #[test]
    fn one_family_s_failure_keeps_its_members() {
        let ips =
            |list: &[&str]| -> Vec<IpAddr> { list.iter().map(|ip| ip.parse().unwrap()).collect() };
        let mut hosts = Hosts::default();
        assert!(hosts.update(Some(ips(&["10.0.0.1"])), Some(ips(&["fd00::1"]))));
        assert!(hosts.update(Some(ips(&["10.0.0.2"])), None));
        assert_eq!(hosts.all(), ips(&["10.0.0.2", "fd00::1"]));
        for (v4, v6) in [(None, None), (Some(vec![]), None), (Some(vec![]), Some(vec![]))] {
            assert!(!hosts.update(v4, v6));
            assert_eq!(hosts.all(), ips(&["10.0.0.2", "fd00::1"]));
        }
        assert!(hosts.update(Some(ips(&["10.0.0.2"])), Some(vec![])));
        assert_eq!(hosts.all(), ips(&["10.0.0.2"]));
    }

    #[test]
    fn two_families_count_as_one_look_up() {
        use LookupResult::{Answered, Empty, Failed, NxDomain, Timeout};
        let table = [
            (Answered, Empty, Answered),
            (Empty, Answered, Answered),
            (Answered, Timeout, Timeout),
            (Failed, Answered, Failed),
            (NxDomain, NxDomain, NxDomain),
            (Empty, NxDomain, Empty),
            (Empty, Empty, Empty),
        ];
        for (v4, v6, both) in table {
            assert_eq!(together(v4, v6), both, "{v4:?} {v6:?}");
        }
    }

    #[test]
    fn only_names_below_the_service_are_instances() {
        let found = |name| instance_below(name, "app-headless.default.svc.cluster.local");
        assert_eq!(
            found("app-0.app-headless.default.svc.cluster.local.").as_deref(),
            Some("app-0")
        );
        assert_eq!(found("app-0.APP-HEADLESS.x.").as_deref(), Some("app-0"));
        for name in ["app-0.other.default.", "app-0.", "", "a b.app-headless.", ".app-headless."] {
            assert_eq!(found(name), None, "{name}");
        }
    }
}
