//! LiteFS's API.

use std::fmt::Write as _;

use serde_json::{Map, json};
use tokio::time::Instant;

use super::{
    World, thawed,
    wire::{Head, Wire},
};

/// Returns whether the connection goes on.
pub(super) async fn api(world: &World, node: usize, wire: &mut Wire, head: &Head) -> bool {
    let (identity, is_primary, hostname) = {
        let state = world.state();
        let incarnation = state.nodes.get(node).map_or(0, |node| node.incarnation);
        let identity =
            format!("Litefs-Id: {incarnation:016X}\r\nLitefs-Cluster-Id: LFSC0000000000000001\r\n");
        (identity, state.is_primary(node), state.hostname(node))
    };
    let plain = format!("{identity}content-type: text/plain; charset=utf-8\r\n");
    match (&*head.method, head.path()) {
        ("GET", "/info") => {
            let body = json!({
                "clusterID": "LFSC0000000000000001",
                "isPrimary": is_primary,
                "candidate": true,
                "path": "/litefs",
                "primary": { "hostname": hostname },
            });
            wire.answer("200 OK", &plain, body.to_string().as_bytes()).await.is_some()
        }
        ("GET", "/events") => {
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{identity}\r\n");
            events(world, node, wire, &head).await;
            false
        }
        ("GET", "/debug/vars") => {
            let body = json!({ "store": {
                "isPrimary": is_primary,
                "candidate": true,
                "dbs": databases(world, node),
            } });
            wire.answer("200 OK", "", body.to_string().as_bytes()).await.is_some()
        }
        ("GET", "/metrics") => {
            wire.answer("200 OK", "", metrics(world, node).as_bytes()).await.is_some()
        }
        ("POST", "/promote") => {
            let answer = promote(world, node);
            wire.answer(answer.0, &plain, answer.1.as_bytes()).await.is_some()
        }
        ("POST", "/handoff") => {
            let answer = handoff(world, node, head.query("nodeID").unwrap_or(""));
            wire.answer(answer.0, &plain, answer.1.as_bytes()).await.is_some()
        }
        (_, "/info" | "/events" | "/debug/vars" | "/metrics" | "/promote" | "/handoff") => {
            let answer = b"method not allowed\n";
            wire.answer("405 Method Not Allowed", &plain, answer).await.is_some()
        }
        _ => wire.answer("404 Not Found", &plain, b"404 page not found\n").await.is_some(),
    }
}

fn databases(world: &World, node: usize) -> Map<String, serde_json::Value> {
    let state = world.state();
    let all = world.options.databases.iter().enumerate();
    let all = all.map(|(n, name)| {
        let position = state.position(node, n);
        let database = json!({
            "name": name,
            "txid": format!("{:016x}", position.txid),
            "checksum": format!("{:016x}", position.checksum),
        });
        ((*name).to_owned(), database)
    });
    all.collect()
}

fn metrics(world: &World, node: usize) -> String {
    let state = world.state();
    let is_primary = u8::from(state.is_primary(node));
    let lag = state.lag(node, Instant::now()).as_secs_f64();
    let mut page = format!("litefs_is_primary {is_primary}\nlitefs_lag_seconds {lag}\n");
    for (n, name) in world.options.databases.iter().enumerate() {
        let txid = state.position(node, n).txid;
        let _ = writeln!(page, "litefs_db_txid{{db=\"{name}\"}} {txid}");
    }
    page
}

fn promote(world: &World, node: usize) -> (&'static str, &'static str) {
    let mut state = world.state();
    if state.is_primary(node) {
        return ("200 OK", "");
    }
    match state.primary.and_then(|primary| state.nodes.get(primary)) {
        None => (
            "500 Internal Server Error",
            "no primary is currently available for handoff, cannot promote\n",
        ),
        Some(primary) if primary.frozen || !primary.alive => {
            ("500 Internal Server Error", "handoff failed: cannot reach the primary\n")
        }
        Some(_) => {
            state.promote(node, Instant::now());
            ("200 OK", "")
        }
    }
}

fn handoff(world: &World, node: usize, to: &str) -> (&'static str, &'static str) {
    let Ok(to) = u64::from_str_radix(to, 16) else {
        return ("400 Bad Request", "invalid node id\n");
    };
    let mut state = world.state();
    if !state.is_primary(node) {
        return ("500 Internal Server Error", "cannot handoff: node is not currently primary\n");
    }
    match state.nodes.iter().position(|node| node.alive && node.incarnation == to) {
        Some(to) => {
            state.promote(to, Instant::now());
            ("200 OK", "")
        }
        None => (
            "500 Internal Server Error",
            "cannot handoff: target node is not currently connected\n",
        ),
    }
}

/// The push stream, until its reader is too slow.
async fn events(world: &World, node: usize, wire: &mut Wire, head: &str) -> Option<()> {
    let mut lines = world.state().subscribe(node);
    wire.write(head.as_bytes()).await?;
    loop {
        let line = lines.recv().await?;
        thawed(world, node).await;
        wire.write(line.as_bytes()).await?;
    }
}
