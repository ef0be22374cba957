//! `litegate check`: is the configuration right, and with `--online`, is the world as it says?

use std::{net::SocketAddr, path::Path, process::ExitCode, time::Duration};

use tokio::time::{Instant, timeout};

use crate::{
    app::{self, Found},
    config::{
        Config,
        cluster::{Cluster, Members, RoleSource},
    },
    topology::{Freshness, Node, Presence},
};

/// How long a port may take to answer.
const CONNECT: Duration = Duration::from_secs(2);
/// How long everything may take to be found out.
const LOOK: Duration = Duration::from_secs(6);
/// How long a source that names the primary is given to say that it can't.
const LATE: Duration = Duration::from_secs(3);

pub(super) fn check(path: &Path, config: &Config, online: bool) -> ExitCode {
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    let routes = config.routes.iter().filter(|route| route.index.is_some()).count();
    println!(
        "{}: ok: {}, {}, {}",
        path.display(),
        plural(config.listeners.len(), "listener"),
        plural(config.clusters.len(), "cluster"),
        plural(routes, "route"),
    );
    if !online {
        return ExitCode::SUCCESS;
    }
    // What a source has against an answer is in the log.
    crate::telemetry::init_logging("warn");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) if runtime.block_on(look(config)) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is as the configuration says.
async fn look(config: &Config) -> bool {
    let names = |source: &RoleSource| !matches!(source, RoleSource::Litefs { .. });
    let is_patient = config.clusters.iter().any(|cluster| cluster.primary.iter().any(names));
    let least = if is_patient { LATE } else { Duration::ZERO };
    let found = app::look(config, least, LOOK).await;
    let mut fine = true;
    for (cluster, found) in config.clusters.iter().zip(&found) {
        let mut ports = Vec::new();
        for node in members(found) {
            ports.push(port(cluster, node.address).await);
        }
        let (lines, is_fine) = report(cluster, found, &ports);
        for line in lines {
            println!("{line}");
        }
        fine &= is_fine;
    }
    fine
}

fn members(found: &Found) -> impl Iterator<Item = &Node> {
    found.topology.nodes.iter().filter(|node| node.presence == Presence::Member)
}

/// Why nobody answers there.
async fn port(cluster: &Cluster, address: SocketAddr) -> Option<String> {
    let began = Instant::now();
    match timeout(CONNECT, app::knock(cluster, address)).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(_) => Some(format!("no answer in {:.0} s", began.elapsed().as_secs_f64())),
    }
}

/// What was found of a cluster, and whether it is as it should be. `ports`: for each member, why
/// its port does not answer.
fn report(cluster: &Cluster, found: &Found, ports: &[Option<String>]) -> (Vec<String>, bool) {
    let (topology, name) = (&found.topology, &cluster.name);
    let mut lines = Vec::new();
    let mut fine = true;
    let what = match &cluster.members {
        Members::Dns(lookup) => format!("`{}`", lookup.name),
        Members::Srv(lookup) => format!("SRV `{}`", lookup.name),
        Members::Static(_) => "the configuration".to_owned(),
    };
    let count = members(found).count();
    if topology.resolved && count > 0 {
        lines.push(format!("cluster {name}: {count} members by {what}"));
    } else {
        fine = false;
        lines.push(format!("cluster {name}: NO MEMBERS: {what} does not resolve"));
    }
    for (node, trouble) in members(found).zip(ports) {
        let lag = node.lag.map(|lag| format!(", {:.1} s behind", lag.as_secs_f64()));
        let lag = lag.unwrap_or_default();
        let is_late = if node.freshness == Freshness::TooFar { ": SERVES NO READS" } else { "" };
        let answers = match trouble {
            None => "answers".to_owned(),
            Some(error) => {
                fine = false;
                format!("DOES NOT ANSWER: {error}")
            }
        };
        let (address, role) = (node.address, node.role);
        lines.push(format!("  {}  {address}  {role}{lag}{is_late}  {answers}", node.name));
    }
    lines.push(if let Some(primary) = topology.primary() {
        format!("  primary: {}", primary.name)
    } else {
        fine = false;
        format!("  NO PRIMARY: {}", topology.primary_gap.meaning())
    });
    for (source, why) in &found.silent {
        fine = false;
        lines.push(format!("  {} HAS NO NEWS: {}", source.as_str(), why.as_str()));
    }
    (lines, fine)
}
