//! CoreDNS with the headless service's zone, which a test rewrites as Kubernetes would.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, RecordType},
};

use crate::{
    cluster::Cluster,
    process::{Process, component, eventually, free_port},
};

const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 1, 53));

const ZONE: &str = "abaci.svc.cluster.local";

/// The headless service, by its whole name.
pub(crate) const HEADLESS: &str = "abaci-app-headless.abaci.svc.cluster.local";

/// The service's SRV records, by their whole name.
pub(crate) const SRV: &str = "_http._tcp.abaci-app-headless.abaci.svc.cluster.local";

#[derive(Debug)]
pub(crate) struct CoreDns {
    process: Option<Process>,
    directory: PathBuf,
    port: u16,
    serial: u32,
}

impl CoreDns {
    /// Serves these nodes of the cluster.
    pub(crate) fn start(cluster: &Cluster, nodes: &[usize]) -> Self {
        let mut dns = Self {
            process: None,
            directory: cluster.directory().to_owned(),
            port: free_port(&[ADDRESS]),
            serial: 0,
        };
        let corefile = format!(
            "{ZONE}:{} {{\n  bind {ADDRESS}\n  errors\n  log\n  file {} {ZONE} {{\n    reload 100ms\n  }}\n}}\n",
            dns.port,
            dns.zone_file().display(),
        );
        fs::write(dns.directory.join("Corefile"), corefile).expect("write the Corefile");
        dns.write_zone(cluster, nodes);
        dns.restart();
        dns.wait_until_served();
        dns
    }

    /// Where it answers.
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(ADDRESS, self.port)
    }

    /// From now on the service has these nodes, at the addresses that they have now. Returns once
    /// CoreDNS answers so.
    pub(crate) fn publish(&mut self, cluster: &Cluster, nodes: &[usize]) {
        self.write_zone(cluster, nodes);
        self.wait_until_served();
    }

    /// SIGKILL: queries are refused from now on.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Starts it again where it was.
    pub(crate) fn restart(&mut self) {
        let corefile = self.directory.join("Corefile");
        let args = ["-conf", corefile.to_str().expect("temporary paths are UTF-8")];
        let log = self.directory.join("coredns.log");
        self.process = Some(Process::start("coredns", &component("coredns"), &args, &log));
    }

    /// Answers of one type, as text.
    pub(crate) fn ask(&self, name: &str, kind: RecordType) -> Result<Vec<String>, String> {
        let name = Name::from_ascii(format!("{name}.")).map_err(|e| e.to_string())?;
        let mut query = Message::new(7, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(name, kind));
        let socket = UdpSocket::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        socket.set_read_timeout(Some(Duration::from_millis(500))).map_err(|e| e.to_string())?;
        let bytes = query.to_vec().map_err(|e| e.to_string())?;
        socket.send_to(&bytes, self.address()).map_err(|e| e.to_string())?;
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).map_err(|e| e.to_string())?;
        let answer = Message::from_vec(&buffer[..length]).map_err(|e| e.to_string())?;
        let mut found: Vec<String> = answer
            .answers
            .iter()
            .filter(|record| record.record_type() == kind)
            .map(|record| match &record.data {
                RData::A(address) => address.to_string(),
                other => other.to_string(),
            })
            .collect();
        found.sort();
        Ok(found)
    }

    fn zone_file(&self) -> PathBuf {
        self.directory.join("db.abaci")
    }

    /// What Kubernetes publishes for a headless service: an address for the service and for each
    /// pod, and an SRV record for each pod and named port.
    fn write_zone(&mut self, cluster: &Cluster, nodes: &[usize]) {
        self.serial += 1;
        let serial = self.serial;
        let mut zone = format!(
            "$TTL 1\n\
             @ IN SOA ns.dns.{ZONE}. hostmaster.{ZONE}. {serial} 1 1 1 1\n\
             @ IN NS ns.dns.{ZONE}.\n\
             ns.dns IN A {ADDRESS}\n\
             serial IN TXT {serial}\n"
        );
        for &node in nodes {
            let (name, ip, port) = (cluster.name(node), cluster.ip(node), cluster.proxy_port());
            write!(
                zone,
                "abaci-app-headless IN A {ip}\n\
                 {name}.abaci-app-headless IN A {ip}\n\
                 _http._tcp.abaci-app-headless IN SRV 0 33 {port} {name}.abaci-app-headless.{ZONE}.\n"
            )
            .expect("writing to a string succeeds");
        }
        replace(&self.zone_file(), &zone);
    }

    fn wait_until_served(&self) {
        let serial = self.serial.to_string();
        eventually("CoreDNS serves the zone", Duration::from_secs(10), || {
            match self.ask(&format!("serial.{ZONE}"), RecordType::TXT)? {
                found if found.iter().any(|text| text.trim_matches('"') == serial) => Ok(()),
                found => Err(format!("serial {found:?}")),
            }
        });
    }
}

/// Whole or not at all: CoreDNS reads it at any time.
fn replace(file: &Path, content: &str) {
    let new = file.with_extension("new");
    fs::write(&new, content).expect("write the zone");
    fs::rename(new, file).expect("rename the zone");
}
