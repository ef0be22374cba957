//! What TLS, HTTP/2 and WebSocket cost beside nginx and HAProxy: CPU per request (`--part
//! protocols`), and memory of clients that are idle or slow (`--part memory`).

mod crowd;
mod h2;
mod memory;
mod page;
mod talk;
mod tls;
mod wire;

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use crate::{
    Failure, Rounds,
    contender::{Contender, Running},
    machine::Cores,
    report::Row,
    upstream::Upstream,
};
use crowd::{Crowd, Kind, Life};
use page::Section;
use talk::{SMALL, Want, Way};
use tls::Certificate;

pub(crate) use memory::run as memory;

/// One workload.
#[derive(Debug)]
pub(crate) struct Workload {
    /// On the command line.
    pub(crate) name: &'static str,
    /// In the results.
    title: &'static str,
    kind: Kind,
    connections: usize,
}

const KEPT: Kind =
    Kind { way: Way::Http1, want: Want::Small, tls: true, life: Life::Kept, at_once: 1 };
const USUAL: Workload = Workload { name: "", title: "", kind: KEPT, connections: 64 };

/// In the order of the results.
pub(crate) const WORKLOADS: &[Workload] = &[
    Workload { name: "tls", title: "GET, 128 bytes, TLS 1.3 on kept connections", ..USUAL },
    Workload {
        name: "tls-64k",
        title: "GET 64 KiB, TLS 1.3 on kept connections",
        kind: Kind { want: Want::Large, ..KEPT },
        ..USUAL
    },
    Workload {
        name: "handshake",
        title: "A connection and a full TLS 1.3 handshake for each GET",
        kind: Kind { life: Life::One { resumed: false }, ..KEPT },
        ..USUAL
    },
    Workload {
        name: "resumed",
        title: "A connection and a resumed TLS 1.3 session for each GET",
        kind: Kind { life: Life::One { resumed: true }, ..KEPT },
        ..USUAL
    },
    Workload {
        name: "h2",
        title: "GET, 128 bytes, HTTP/2 over TLS: 4 connections of 16 streams",
        kind: Kind { way: Way::H2, at_once: 16, ..KEPT },
        connections: 4,
    },
    Workload {
        name: "websocket",
        title: "WebSocket: a message of 128 bytes there and back",
        kind: Kind { way: Way::WebSocket, tls: false, ..KEPT },
        ..USUAL
    },
    Workload {
        name: "websocket-tls",
        title: "WebSocket over TLS: a message of 128 bytes there and back",
        kind: Kind { way: Way::WebSocket, ..KEPT },
        ..USUAL
    },
];

/// What is measured, and with which programs.
pub(crate) struct Plan<'a> {
    pub(crate) programs: &'a [(&'static Contender, PathBuf)],
    pub(crate) cores: Cores,
    pub(crate) rounds: Rounds,
    pub(crate) header: Vec<String>,
}

/// A proxy that serves, and where.
struct Proxy {
    running: Running,
    clear: SocketAddr,
    /// HTTP/2 by prior knowledge.
    h2c: SocketAddr,
    tls: SocketAddr,
}

impl Proxy {
    fn start(
        (contender, program): &(&Contender, PathBuf),
        upstream: &Upstream,
        certificate: &Certificate,
        cores: Cores,
    ) -> Result<Self, Failure> {
        // Free a moment ago: whoever takes it in between makes the start fail, and loudly.
        let [h2c, tls] = {
            let bound = [("127.0.0.1", 0), ("127.0.0.1", 0)].map(TcpListener::bind);
            let [h2c, tls] = bound;
            [h2c?.local_addr()?, tls?.local_addr()?]
        };
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        let filled = [
            ("@upstream_port@", upstream.address.port().to_string()),
            ("@h2c_port@", h2c.port().to_string()),
            ("@tls_port@", tls.port().to_string()),
            ("@chain@", path(certificate.chain())),
            ("@key@", path(certificate.key())),
            ("@both@", path(certificate.both())),
        ];
        let filled = filled.each_ref().map(|(place, with)| (*place, with.as_str()));
        let running = contender.start_with(program, &filled, cores)?;
        let clear = running.address;
        // litegate tells HTTP/2 from HTTP/1.1 by how it begins.
        let h2c = if contender.has_h2c_port() { h2c } else { clear };
        Ok(Self { running, clear, h2c, tls })
    }

    fn address(&self, kind: Kind) -> SocketAddr {
        match kind {
            Kind { tls: true, .. } => self.tls,
            Kind { way: Way::H2, .. } => self.h2c,
            _ => self.clear,
        }
    }
}

/// What answers what clients of this module want.
fn upstream(cores: Cores) -> Result<Upstream, Failure> {
    Upstream::start(cores.load, &[SMALL, Want::Large.download()])
}

/// Measures CPU. Returns the page and the number of wrong answers.
pub(crate) fn run(plan: Plan<'_>, workloads: &[&Workload]) -> Result<(String, u64), Failure> {
    let upstream = upstream(plan.cores)?;
    let certificate = Certificate::make()?;
    let start = |program| Proxy::start(program, &upstream, &certificate, plan.cores);
    let proxies = plan.programs.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    let mut sections = Vec::new();
    for workload in workloads {
        let row = |proxy: &Proxy| Row::new(proxy.running.name);
        let mut rows: Vec<Row> = proxies.iter().map(row).collect();
        for round in 1..=plan.rounds.count {
            for (proxy, row) in proxies.iter().zip(&mut rows) {
                let tree = proxy.running.tree()?;
                let found = Crowd::new(proxy.address(workload.kind), workload.kind)
                    .and_then(|crowd| {
                        crowd.saturate(workload.connections, plan.rounds.span, || tree.cpu())
                    })
                    .map_err(|failure| {
                        format!("{}, {}: {failure}", workload.name, proxy.running.name)
                    })?;
                eprintln!(
                    "{} {round}: {} {:.2} µs, {:.0}/s, {:.0} % busy, {} errors",
                    workload.name,
                    row.name,
                    found.cost(),
                    found.speed(),
                    found.busy(),
                    found.errors
                );
                row.saturations.push(found);
            }
        }
        sections.push(Section { title: workload.title, rows });
    }
    Ok((page::markdown(&plan.header, &sections), page::errors(&sections)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_speaks_in_clear_text_is_answered_without_a_proxy() {
        let upstream = upstream(Cores::find().unwrap()).unwrap();
        for (way, want) in
            [(Way::Http1, Want::Small), (Way::Http1, Want::Large), (Way::WebSocket, Want::Small)]
        {
            let kind = Kind { way, want, tls: false, ..KEPT };
            // On a busy machine a span may pass without a turn of ours.
            let answered = (0..40).any(|_| {
                let crowd = Crowd::new(upstream.address, kind).unwrap();
                let span = Duration::from_millis(50);
                let found = crowd.saturate(8, span, || Ok(Duration::ZERO)).unwrap();
                assert_eq!(found.errors, 0, "{kind:?}");
                found.requests > 0
            });
            assert!(answered, "{kind:?}");
        }
    }

    #[test]
    fn the_slow_are_slow() {
        let upstream = upstream(Cores::find().unwrap()).unwrap();
        for want in [Want::Endless, Want::Upload] {
            let kind = Kind { want, tls: false, ..KEPT };
            let mut crowd = Crowd::new(upstream.address, kind).unwrap();
            crowd.begin(8, || upstream.open()).unwrap();
            for _ in 0..8 {
                assert_eq!(crowd.step(1024).unwrap(), 0, "{want:?}");
            }
        }
    }
}
