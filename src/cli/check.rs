//! `litegate check`: is the configuration right, and with `--online`, is the world as it says?

use std::{
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use crate::{
    app,
    config::{Config, cluster::Members},
};

/// How long a port may take to answer.
const CONNECT: Duration = Duration::from_secs(2);

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
    if let Err(error) = app::read_files(config) {
        println!("{error}");
        return ExitCode::FAILURE;
    }
    if !online {
        return ExitCode::SUCCESS;
    }
    let mut fine = true;
    for cluster in &config.clusters {
        let addresses: Vec<SocketAddr> = match &cluster.members {
            Members::Static(nodes) => nodes.iter().map(|node| node.address).collect(),
            Members::Dns(lookup) => match (&*lookup.name, cluster.port).to_socket_addrs() {
                Ok(found) => found.collect(),
                Err(error) => {
                    println!("cluster {}: {} does not resolve: {error}", cluster.name, lookup.name);
                    fine = false;
                    continue;
                }
            },
            Members::Srv(lookup) => {
                println!(
                    "cluster {}: SRV {} is looked up by `run` only",
                    cluster.name, lookup.name
                );
                continue;
            }
        };
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(_) => println!("cluster {}: {address} answers", cluster.name),
                Err(error) => {
                    println!("cluster {}: {address} does not answer: {error}", cluster.name);
                    fine = false;
                }
            }
        }
    }
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
