//! Members, primaries and names by a DNS that lies, lags and dies.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_proto::{
    op::{Metadata, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SRV},
    },
};
use hickory_server::{
    net::runtime::Time,
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo, Server},
    zone_handler::MessageResponseBuilder,
};
use litegate::{
    testkit::{Cluster, Naming, Options, client},
    topology::{Presence, Topology},
};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::gate::Gate;

/// How a server answers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// What the zone says.
    Honest,
    /// That there is no such name.
    NxDomain,
    /// That the name has no such record.
    Empty,
    /// That it failed.
    ServFail,
    /// Honestly, but late.
    Late(Duration),
    /// Not at all.
    Silent,
    /// Something that is no DNS message.
    Garbage,
    /// Nobody is there.
    Dead,
}

/// A DNS server with a zone that is set at run time.
struct Dns {
    address: SocketAddr,
    zone: Zone,
    server: Option<Server<Zone>>,
    babble: JoinSet<()>,
}

#[derive(Clone, Default)]
struct Zone(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    records: BTreeMap<Name, Vec<Record>>,
    by_type: BTreeMap<u16, Mode>,
    by_name: BTreeMap<Name, Mode>,
    mode: Option<Mode>,
    /// What was asked, and when.
    asked: Vec<(Instant, Name, RecordType)>,
}

/// An absolute name.
fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).expect("a test's names are right");
    name.set_fqdn(true);
    name
}

fn address(ip: impl Into<IpAddr>) -> RData {
    match ip.into() {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

impl Dns {
    async fn start() -> Self {
        let mut dns = Self {
            // Where no client's socket may take the port while the server is dead.
            address: SocketAddr::from(([127, 0, 9, 53], 0)),
            zone: Zone::default(),
            server: None,
            babble: JoinSet::new(),
        };
        dns.serve().await;
        dns
    }

    /// Over UDP and TCP on the same port.
    async fn serve(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind(self.address).await;
            let at = udp.as_ref().ok().and_then(|udp| udp.local_addr().ok());
            if let (Ok(udp), Some(at)) = (udp, at)
                && let Ok(tcp) = TcpListener::bind(at).await
            {
                break (udp, tcp);
            }
            assert!(Instant::now() < deadline, "no port for a DNS server: {}", self.address);
            sleep(Duration::from_millis(10)).await;
        };
        self.address = udp.local_addr().expect("it is bound");
        let mut server = Server::new(self.zone.clone());
        server.register_socket(udp);
        server.register_listener(tcp, Duration::from_secs(5), 32);
        self.server = Some(server);
    }

    /// Behaves like this from now on.
    async fn be(&mut self, mode: Mode) {
        self.babble.shutdown().await;
        self.zone.state().mode = Some(mode);
        if matches!(mode, Mode::Dead | Mode::Garbage) {
            if let Some(mut server) = self.server.take() {
                server.shutdown_gracefully().await.expect("it stops");
            }
        } else if self.server.is_none() {
            self.serve().await;
        }
        if mode == Mode::Garbage {
            let socket = UdpSocket::bind(self.address).await.expect("its port is free");
            self.babble.spawn(async move {
                let mut question = [0; 512];
                while let Ok((n, from)) = socket.recv_from(&mut question).await {
                    // The right id and the bit that makes it a response; then nonsense.
                    let mut answer = vec![0xff; 64.max(n)];
                    answer[..2].copy_from_slice(&question[..2]);
                    let _ = socket.send_to(&answer, from).await;
                }
            });
        }
    }

    /// Only questions for this type are answered like that.
    fn be_for(&self, kind: RecordType, mode: Mode) {
        self.zone.state().by_type.insert(kind.into(), mode);
    }

    /// Only questions for this name are answered like that.
    fn be_about(&self, of: &str, mode: Mode) {
        self.zone.state().by_name.insert(name(of), mode);
    }

    /// A name's records from now on.
    fn set(&self, of: &str, ttl: u32, data: impl IntoIterator<Item = RData>) {
        let of = name(of);
        let record = |data| Record::from_rdata(of.clone(), ttl, data);
        let records = data.into_iter().map(record).collect();
        self.zone.state().records.insert(of, records);
    }

    /// A name's addresses from now on.
    fn addresses<I: Into<IpAddr>>(&self, of: &str, ips: impl IntoIterator<Item = I>) {
        self.set(of, 0, ips.into_iter().map(|ip| address(ip)));
    }

    /// When a name was asked for.
    fn asked(&self, of: &str, kind: RecordType) -> Vec<Instant> {
        let of = name(of);
        let state = self.zone.state();
        let fits = state.asked.iter().filter(|(_, name, asked)| *name == of && *asked == kind);
        fits.map(|(at, ..)| *at).collect()
    }
}

impl Zone {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl RequestHandler for Zone {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response: R,
    ) -> ResponseInfo {
        let query = request.request_info().expect("one question").query;
        let (of, kind) = (Name::from(query.name().clone()), query.query_type());
        let (mode, known) = {
            let mut state = self.state();
            state.asked.push((Instant::now(), of.clone(), kind));
            let by_name = state.by_name.get(&of).copied();
            let mode = by_name.or(state.by_type.get(&kind.into()).copied()).or(state.mode);
            (mode.unwrap_or(Mode::Honest), state.records.get(&of).cloned())
        };
        match mode {
            Mode::Late(by) => sleep(by).await,
            Mode::Silent => std::future::pending().await,
            _ => {}
        }
        let code = match (mode, &known) {
            (Mode::ServFail, _) => ResponseCode::ServFail,
            (Mode::NxDomain, _) | (Mode::Honest | Mode::Late(_), None) => ResponseCode::NXDomain,
            _ => ResponseCode::NoError,
        };
        let is_honest = matches!(mode, Mode::Honest | Mode::Late(_));
        let records = known.filter(|_| is_honest).unwrap_or_default();
        let records: Vec<_> = records.iter().filter(|r| r.record_type() == kind).collect();
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = code;
        metadata.authoritative = true;
        let message = MessageResponseBuilder::from_message_request(request);
        let message = message.build(metadata, records, [], [], []);
        response.send_response(message).await.expect("it is sent")
    }
}

/// Addresses that share an app port and an API port, as the pods of a cluster do.
struct Spots {
    app: u16,
    api: u16,
}

impl Spots {
    /// Two ports that are free on all of `ips`: held together for a moment, so that they differ.
    fn find(ips: &[IpAddr]) -> Self {
        let port = || {
            for _ in 0..100 {
                let first = std::net::TcpListener::bind((ips[0], 0)).expect("loopback has ports");
                let port = first.local_addr().expect("it is bound").port();
                let rest = ips[1..].iter().map(|ip| std::net::TcpListener::bind((*ip, port)));
                if let Ok(rest) = rest.collect::<Result<Vec<_>, _>>() {
                    return (port, first, rest);
                }
            }
            panic!("no port is free on all of {ips:?}");
        };
        let (app, api) = (port(), port());
        Self { app: app.0, api: api.0 }
    }
}

/// A node of the cluster at an address of its own, until dropped: then connections break and are
/// refused.
struct Pod {
    _tasks: JoinSet<()>,
}

impl Pod {
    async fn start(cluster: &Cluster, node: usize, ip: IpAddr, spots: &Spots) -> Self {
        let place = &cluster.places()[node];
        let mut tasks = JoinSet::new();
        for (port, to) in [(spots.app, place.proxy), (spots.api, place.api)] {
            let listener = TcpListener::bind((ip, port)).await.expect("the port is free");
            tasks.spawn(async move {
                let mut connections = JoinSet::new();
                loop {
                    let Ok((mut from, _)) = listener.accept().await else { return };
                    while connections.try_join_next().is_some() {}
                    connections.spawn(async move {
                        if let Ok(mut to) = TcpStream::connect(to).await {
                            let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                        }
                    });
                }
            });
        }
        Self { _tasks: tasks }
    }
}

/// A cluster whose members are in DNS, and a gate before it.
struct Site {
    dns: Dns,
    gate: Gate,
    ips: Vec<IpAddr>,
    spots: Spots,
    /// By address.
    pods: BTreeMap<IpAddr, Pod>,
}

const SERVICE: &str = "app.test.";
const BY_DNS: &str = r#"members = { type = "dns", name = "app.test.", resolvers = ["DNS"] }"#;
const BY_LITEFS: &str = r#"primary = { type = "litefs", port = API, poll = "100ms" }"#;

/// Addresses of this test's own, so that nobody else's ports are in the way.
fn ips(net: u8, count: u8) -> Vec<IpAddr> {
    (1..=count).map(|n| IpAddr::from([127, 0, net, n])).collect()
}

impl Site {
    /// Node n of the cluster is at the nth address; later addresses are free. `listed` are in DNS.
    async fn start(ips: Vec<IpAddr>, listed: &[usize], keys: &[&str]) -> Self {
        Self::with(ips, keys, |dns, ips| {
            dns.addresses(SERVICE, listed.iter().map(|n| ips[*n]));
        })
        .await
    }

    async fn with(ips: Vec<IpAddr>, keys: &[&str], zone: impl FnOnce(&Dns, &[IpAddr])) -> Self {
        let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
        let spots = Spots::find(&ips);
        let mut pods = BTreeMap::new();
        for (node, ip) in ips.iter().enumerate().take(3) {
            pods.insert(*ip, Pod::start(&cluster, node, *ip, &spots).await);
        }
        let dns = Dns::start().await;
        zone(&dns, &ips);
        let text = config(&spots, &dns, keys);
        Self { dns, gate: Gate::before(cluster, &text), ips, spots, pods }
    }

    /// Node `node` is at the `at`th address as well.
    async fn open(&mut self, node: usize, at: usize) {
        let ip = self.ips[at];
        let pod = Pod::start(&self.gate.cluster, node, ip, &self.spots).await;
        self.pods.insert(ip, pod);
    }

    /// Nobody is at the `at`th address any more.
    fn close(&mut self, at: usize) {
        self.pods.remove(&self.ips[at]).expect("somebody is there");
    }

    fn at(&self, n: usize) -> SocketAddr {
        SocketAddr::new(self.ips[n], self.spots.app)
    }

    /// The members are those at these addresses.
    async fn until_members(&self, at: &[usize]) {
        let expected: BTreeSet<_> = at.iter().map(|n| self.at(*n)).collect();
        self.gate.until(|topology| members(topology) == expected).await;
    }

    async fn until_primary(&self, at: usize) {
        let address = self.at(at);
        self.gate.until(|t| t.primary().is_some_and(|node| node.address == address)).await;
    }

    /// Who serves reads.
    async fn readers(&self) -> BTreeSet<String> {
        let mut served = BTreeSet::new();
        for _ in 0..20 {
            served.insert(self.gate.send("GET", "/whoami", b"").await.text());
        }
        served
    }

    async fn write(&self, id: &str) -> u16 {
        self.gate.send("POST", &format!("/kv/{id}"), b"x").await.status
    }

    /// How many look-ups ended like that.
    async fn lookups(&self, result: &str) -> u64 {
        let metrics = self.gate.metrics().await;
        let start = format!("litegate_dns_lookups_total{{cluster=\"app\",result=\"{result}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{start}: {metrics}"))
    }

    async fn until_stale(&self, stale: bool) {
        self.gate.until(|topology| topology.stale == stale).await;
        let line = format!("litegate_members_stale{{cluster=\"app\"}} {}", u8::from(stale));
        let metrics = self.gate.metrics().await;
        assert!(metrics.contains(&line), "{metrics}");
    }
}

fn members(topology: &Topology) -> BTreeSet<SocketAddr> {
    let members = topology.nodes.iter().filter(|node| node.presence == Presence::Member);
    members.map(|node| node.address).collect()
}

fn config(spots: &Spots, dns: &Dns, keys: &[&str]) -> String {
    let keys = keys.join("\n").replace("API", &spots.api.to_string());
    let keys = keys.replace("DNS", &dns.address.to_string());
    format!(
        r#"[server]
workers = 2

[[listener]]
address = "127.0.0.1:0"

[admin]
address = "127.0.0.1:0"

[access_log]
format = "off"

[cluster.app]
port = {}
{keys}
"#,
        spots.app
    )
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test]
async fn a_pod_that_comes_is_used_and_one_that_goes_finishes_what_it_has() {
    let site = Site::start(ips(10, 3), &[0, 1], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 1]).await;
    site.until_primary(0).await;
    assert_eq!(site.readers().await, set(&["app-1"]));
    let began = site.gate.cluster.served(1);
    let address = site.gate.address();
    let slow = tokio::spawn(client::request(address, "GET", "/sleep/1500", "", b""));
    let deadline = Instant::now() + Duration::from_secs(5);
    while site.gate.cluster.served(1) == began {
        assert!(Instant::now() < deadline, "the slow request reaches app-1");
        tokio::task::yield_now().await;
    }
    site.dns.addresses(SERVICE, [site.ips[0], site.ips[2]]);
    site.until_members(&[0, 2]).await;
    assert!(!slow.is_finished(), "the listing changes while it runs");
    assert_eq!(site.readers().await, set(&["app-2"]));
    let slow = slow.await.expect("the task ends").expect("it is answered");
    assert_eq!((slow.status, slow.complete), (200, true));
    assert_eq!(site.write("a").await, 200);
}

#[tokio::test]
async fn a_pod_that_moves_is_found_at_once_after_a_connection_failed() {
    let mut site = Site::with(ips(11, 4), &[BY_DNS, BY_LITEFS], |dns, ips| {
        // The answer is good for as long as any is.
        dns.set(SERVICE, 3600, ips[..3].iter().map(|ip| address(*ip)));
    })
    .await;
    site.until_members(&[0, 1, 2]).await;
    site.until_primary(0).await;
    let asked = site.dns.asked(SERVICE, RecordType::A).len();
    site.open(2, 3).await;
    site.close(2);
    let moved = [0, 1, 3].map(|n| site.ips[n]);
    site.dns.set(SERVICE, 3600, moved.map(address));
    assert_eq!(site.dns.asked(SERVICE, RecordType::A).len(), asked, "nobody has asked since");
    for _ in 0..20 {
        assert_eq!(site.gate.send("GET", "/whoami", b"").await.status, 200, "reads go on");
    }
    // Without the failure nobody would ask for as long as the answer is good.
    site.until_members(&[0, 1, 3]).await;
    assert_eq!(site.readers().await, set(&["app-1", "app-2"]));
}

/// Members and primary outlive a DNS like that, and its recovery is noticed.
async fn outlives(net: u8, mode: Mode, result: &str) {
    let mut site = Site::start(ips(net, 3), &[0, 1, 2], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 1, 2]).await;
    site.until_primary(0).await;
    assert!(site.lookups("answered").await > 0);
    let before = site.lookups(result).await;
    site.dns.be(mode).await;
    site.until_stale(true).await;
    assert!(site.lookups(result).await > before, "{result}");
    site.until_members(&[0, 1, 2]).await;
    assert_eq!(site.readers().await, set(&["app-1", "app-2"]));
    assert_eq!(site.write("a").await, 200);
    site.dns.addresses(SERVICE, [site.ips[0], site.ips[1]]);
    site.dns.be(Mode::Honest).await;
    site.until_members(&[0, 1]).await;
    site.until_stale(false).await;
    assert_eq!(site.readers().await, set(&["app-1"]));
}

#[tokio::test]
async fn members_outlive_a_name_that_is_gone() {
    outlives(12, Mode::NxDomain, "nxdomain").await;
}

#[tokio::test]
async fn members_outlive_an_empty_answer() {
    outlives(13, Mode::Empty, "empty").await;
}

#[tokio::test]
async fn members_outlive_a_server_that_fails() {
    outlives(14, Mode::ServFail, "failed").await;
}

#[tokio::test]
async fn members_outlive_a_server_that_says_nothing() {
    outlives(15, Mode::Silent, "timeout").await;
}

#[tokio::test]
async fn members_outlive_a_server_that_says_nonsense() {
    outlives(16, Mode::Garbage, "failed").await;
}

#[tokio::test]
async fn members_outlive_a_dead_server() {
    outlives(17, Mode::Dead, "timeout").await;
}

#[tokio::test]
async fn a_late_answer_is_an_answer() {
    let mut site = Site::start(ips(18, 3), &[0, 1], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 1]).await;
    site.dns.be(Mode::Late(Duration::from_millis(500))).await;
    site.dns.addresses(SERVICE, site.ips.clone());
    site.until_members(&[0, 1, 2]).await;
    site.until_stale(false).await;
}

#[tokio::test]
async fn a_gate_that_starts_without_dns_waits_for_it() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let ips = ips(19, 3);
    let spots = Spots::find(&ips);
    let mut dns = Dns::start().await;
    dns.be(Mode::Dead).await;
    dns.addresses(SERVICE, ips.clone());
    let mut pods = Vec::new();
    for (node, ip) in ips.iter().enumerate() {
        pods.push(Pod::start(&cluster, node, *ip, &spots).await);
    }
    let text = config(&spots, &dns, &[BY_DNS, BY_LITEFS]);
    let gate = Gate::before(cluster, &text);
    gate.until(|topology| topology.stale).await;
    let ready = || client::request(gate.admin(), "GET", "/readyz", "", b"");
    assert_eq!(ready().await.expect("an answer").status, 503);
    assert_eq!(gate.send("GET", "/whoami", b"").await.status, 503);
    dns.be(Mode::Honest).await;
    gate.until(|topology| topology.primary().is_some()).await;
    assert_eq!(ready().await.expect("an answer").status, 200);
    assert_eq!(gate.send("POST", "/kv/a", b"x").await.status, 200);
}

#[tokio::test]
async fn addresses_that_are_nobody_s_are_refused() {
    let site = Site::start(ips(20, 3), &[0, 1], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 1]).await;
    let nobody = ["0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "ff02::1", "::ffff:0.0.0.0"];
    let nobody = nobody.map(|ip| ip.parse::<IpAddr>().expect("an address"));
    site.dns.addresses(SERVICE, nobody);
    site.until_stale(true).await;
    site.until_members(&[0, 1]).await;
    site.dns.addresses(SERVICE, nobody.into_iter().chain([site.ips[0], site.ips[2]]));
    site.until_members(&[0, 2]).await;
    site.until_stale(false).await;
}

#[tokio::test]
async fn a_ttl_of_nothing_does_not_make_a_flood_and_a_new_one_is_heeded() {
    let site = Site::start(ips(21, 3), &[0, 1, 2], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 1, 2]).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    let asked = async |more_than: usize| {
        loop {
            let asked = site.dns.asked(SERVICE, RecordType::A);
            if asked.len() > more_than {
                return asked;
            }
            assert!(Instant::now() < deadline, "{asked:?}");
            sleep(Duration::from_millis(20)).await;
        }
    };
    let gaps = |asked: &[Instant]| -> Vec<_> { asked.windows(2).map(|w| w[1] - w[0]).collect() };
    let first = gaps(&asked(6).await);
    assert!(first.iter().all(|gap| *gap >= Duration::from_millis(220)), "{first:?}");
    assert!(first.iter().any(|gap| *gap != first[0]), "jitter: {first:?}");
    site.dns.set(SERVICE, 1, site.ips.iter().map(|ip| address(*ip)));
    let from = asked(0).await.len() + 1;
    let then = gaps(&asked(from + 1).await[from..]);
    assert!(then.iter().all(|gap| *gap >= Duration::from_millis(880)), "{then:?}");
}

#[tokio::test]
async fn a_member_by_ipv6_and_a_family_that_lags() {
    let mut all = ips(22, 3);
    all[2] = IpAddr::V6(Ipv6Addr::LOCALHOST);
    if std::net::TcpListener::bind((all[2], 0)).is_err() {
        eprintln!("no IPv6 on this machine's loopback: nothing was tested");
        return;
    }
    let site = Site::start(all, &[0, 2], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 2]).await;
    site.until_primary(0).await;
    assert_eq!(site.readers().await, set(&["app-2"]));
    // The other family's news come in all the same, and nobody is lost.
    for mode in [Mode::Silent, Mode::ServFail] {
        site.dns.be_for(RecordType::AAAA, mode);
        site.dns.addresses(SERVICE, site.ips.clone());
        site.until_members(&[0, 1, 2]).await;
        site.dns.addresses(SERVICE, [site.ips[0], site.ips[2]]);
        site.until_members(&[0, 2]).await;
    }
    site.until_stale(false).await;
    site.dns.be_for(RecordType::AAAA, Mode::Honest);
    site.dns.addresses(SERVICE, [site.ips[0], site.ips[1]]);
    site.until_members(&[0, 1]).await;
}

#[tokio::test]
async fn a_hundred_members_come_over_tcp() {
    let site = Site::start(ips(23, 3), &[0, 1], &[BY_DNS, BY_LITEFS]).await;
    site.until_members(&[0, 1]).await;
    let many = ips(24, 100);
    site.dns.addresses(SERVICE, many.clone());
    let port = site.spots.app;
    let expected = many.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
    site.gate.until(|topology| members(topology) == expected).await;
}

const BY_SRV: &str =
    r#"members = { type = "srv", name = "_http._tcp.app.test.", resolvers = ["DNS"] }"#;

#[tokio::test]
async fn services_tell_names_and_ports() {
    let service = "_http._tcp.app.test.";
    let srv = |port, target: &str| RData::SRV(SRV::new(0, 0, port, name(target)));
    let mut site = Site::with(ips(25, 3), &[BY_SRV, BY_LITEFS], |dns, ips| {
        for (n, ip) in ips.iter().enumerate() {
            dns.addresses(&format!("app-{n}.app.test."), [*ip]);
        }
    })
    .await;
    let port = site.spots.app;
    let targets = ["app-0.app.test.", "app-1.app.test.", "app-2.app.test."];
    // The root and port 0 mean that there is nothing (RFC 2782).
    site.dns.set(
        service,
        0,
        [srv(port, targets[0]), srv(port, targets[1]), srv(port, "."), srv(0, targets[2])],
    );
    site.until_members(&[0, 1]).await;
    site.until_primary(0).await;
    let names = |topology: &Topology| -> BTreeSet<_> {
        topology.nodes.iter().map(|node| node.name.to_string()).collect()
    };
    site.gate.until(|topology| names(topology) == set(&["app-0", "app-1"])).await;

    // The address of one target can't be had: it is where it was, and the others' news come in.
    site.dns.be_about(targets[1], Mode::ServFail);
    site.dns.set(service, 0, targets.map(|target| srv(port, target)));
    site.until_members(&[0, 1, 2]).await;
    // A target that has no address any more is gone.
    site.dns.be_about(targets[1], Mode::Honest);
    site.dns.be_about(targets[2], Mode::NxDomain);
    site.until_members(&[0, 1]).await;

    // Another port is another place.
    let other = Spots::find(&site.ips[1..2]).app;
    site.dns.set(service, 0, [srv(port, targets[0]), srv(other, targets[1])]);
    let expected = BTreeSet::from([site.at(0), SocketAddr::new(site.ips[1], other)]);
    site.gate.until(|topology| members(topology) == expected).await;
    site.dns.be(Mode::NxDomain).await;
    site.until_stale(true).await;
    site.gate.until(|topology| members(topology) == expected).await;
}

#[tokio::test]
async fn a_primary_by_dns_moves() {
    let by_dns = r#"primary = { type = "dns", name = "primary.test.", resolvers = ["DNS"] }"#;
    let mut site = Site::with(ips(26, 3), &[BY_DNS, by_dns], |dns, ips| {
        dns.addresses(SERVICE, ips.to_vec());
        dns.addresses("primary.test.", [ips[0]]);
    })
    .await;
    site.until_members(&[0, 1, 2]).await;
    site.until_primary(0).await;
    assert_eq!(site.write("a").await, 200);
    site.gate.cluster.promote(2);
    site.dns.addresses("primary.test.", [site.ips[2]]);
    site.until_primary(2).await;
    assert_eq!(site.write("b").await, 200);
    assert_eq!(site.gate.cluster.written("b").on, [2]);
    // No answer says nothing about who is primary.
    let nothing = site.lookups("nxdomain").await;
    site.dns.be(Mode::NxDomain).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while site.lookups("nxdomain").await < nothing + 4 {
        assert!(Instant::now() < deadline, "it is asked for");
        sleep(Duration::from_millis(50)).await;
    }
    site.until_primary(2).await;
    assert_eq!(site.write("c").await, 200);
}

#[tokio::test]
async fn a_configured_instance_is_found_by_its_name_and_followed() {
    let by_name = r#"primary = { type = "instance", name = "app-0" }"#;
    // At first its name is not in DNS yet.
    let mut site = Site::start(ips(27, 4), &[0, 1, 2], &[BY_DNS, by_name]).await;
    site.until_members(&[0, 1, 2]).await;
    assert!(site.lookups("nxdomain").await > 0);
    site.dns.addresses("app-0.app.test.", [site.ips[0]]);
    site.until_primary(0).await;
    assert_eq!(site.write("a").await, 200);
    // Its pod gets another address.
    site.open(0, 3).await;
    site.dns.addresses("app-0.app.test.", [site.ips[3]]);
    site.dns.addresses(SERVICE, [1, 2, 3].map(|n| site.ips[n]));
    site.until_primary(3).await;
    site.close(0);
    assert_eq!(site.write("b").await, 200);
    assert_eq!(site.gate.cluster.written("b").on, [0]);
}

#[tokio::test]
async fn a_name_in_a_replay_is_looked_up_below_the_service() {
    let wrong = r#"primary = { type = "dns", name = "primary.test.", resolvers = ["DNS"] }"#;
    let site = Site::with(ips(28, 3), &[BY_DNS, wrong], |dns, ips| {
        dns.addresses(SERVICE, ips.to_vec());
        dns.addresses("primary.test.", [ips[1]]);
        dns.addresses("app-0.app.test.", [ips[0]]);
        // A name brings nobody in that is not listed.
        dns.addresses("evil.app.test.", [IpAddr::from([127, 0, 28, 200])]);
    })
    .await;
    site.until_primary(1).await;
    assert_eq!(site.write("a").await, 200);
    assert_eq!(site.gate.cluster.written("a").on, [0], "the replica named app-0");
    site.gate.until(|topology| topology.named("app-0").is_some()).await;
    site.gate.cluster.naming(0, Naming::Value("instance=evil".into()));
    site.gate.cluster.naming(1, Naming::Value("instance=evil".into()));
    site.gate.cluster.promote(2);
    let target = "/kv/b";
    let request = client::request(site.gate.address(), "POST", target, "", b"x");
    assert!(timeout(Duration::from_secs(1), request).await.is_err(), "it is held");
    site.until_members(&[0, 1, 2]).await;
}

#[tokio::test]
async fn names_come_from_reverse_look_ups() {
    // Resolvers answer for 127.0.0.0/8 themselves; nobody connects to these (RFC 5737).
    let addresses = [1, 2, 3].map(|n| IpAddr::from([192, 0, 2, n]));
    let by_dns = r#"primary = { type = "dns", name = "primary.test.", resolvers = ["DNS"] }"#;
    let site = Site::with(ips(29, 3), &[BY_DNS, by_dns], |dns, _| {
        dns.addresses(SERVICE, addresses);
    })
    .await;
    site.gate.until(|topology| topology.nodes.len() == 3).await;
    let asked = |n: u8| site.dns.asked(&format!("{n}.2.0.192.in-addr.arpa."), RecordType::PTR);
    let deadline = Instant::now() + Duration::from_secs(10);
    while (1..=3).any(|n| asked(n).is_empty()) {
        assert!(Instant::now() < deadline, "names are asked for");
        sleep(Duration::from_millis(10)).await;
    }
    // Another service's name is not ours, and what is not there at first may come.
    let pointer = |of: &str| RData::PTR(PTR(name(of)));
    let set_names = |of: &str, names: &[&str]| {
        site.dns.set(&format!("{of}.2.0.192.in-addr.arpa."), 5, names.iter().map(|n| pointer(n)));
    };
    set_names("1", &["app-0.app.test."]);
    set_names("2", &["web-7.web.test.", "app-1.app.test."]);
    set_names("3", &["web-8.web.test."]);
    let third = format!("192.0.2.3:{}", site.spots.app);
    site.gate
        .until(|topology| {
            let names: BTreeSet<_> = topology.nodes.iter().map(|n| n.name.to_string()).collect();
            names == set(&["app-0", "app-1", &third])
        })
        .await;
}
