//! What a node answers: LiteFS's proxy, the app behind it, and LiteFS's API.

use std::{sync::atomic::Ordering, time::Duration};

use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Naming, World,
    wire::{Head, Wire},
};

/// How long an unread upload may still flow before the connection is cut (Go drains 256 KiB).
const UNREAD: usize = 256 << 10;

/// LiteFS's proxy: reads go to the app, writes too on the primary; elsewhere they are replayed.
/// Returns whether the connection goes on.
pub(super) async fn proxy(world: &World, node: usize, wire: &mut Wire, head: &Head) -> bool {
    let is_read = matches!(&*head.method, "GET" | "HEAD");
    if is_read {
        return app(world, node, wire, head).await.is_some();
    }
    let mut changed = world.changed.subscribe();
    let deadline = Instant::now() + world.options.patience;
    let primary = loop {
        if let Some(primary) = world.state().primary {
            break Some(primary);
        }
        if timeout(deadline - Instant::now(), changed.changed()).await.is_err() {
            break None;
        }
    };
    let naming = world.state().nodes.get(node).map(|node| node.naming.clone()).unwrap_or_default();
    let instance = match (primary, naming) {
        (Some(primary), _) if primary == node => {
            return app(world, node, wire, head).await.is_some();
        }
        (_, Naming::Value(value)) => value,
        (_, Naming::Itself) => format!("instance={}", World::name(node)),
        (_, Naming::Empty) => "instance=".to_owned(),
        (Some(primary), Naming::Primary) => format!("instance={}", World::name(primary)),
        (None, Naming::Primary) => {
            let body = b"Proxy error: no primary available\n";
            let _ = wire.answer("503 Service Unavailable", "connection: close\r\n", body).await;
            return false;
        }
    };
    // The body is not read. Go drains a little of it to keep the connection, and cuts it else.
    let length = head.field("content-length").and_then(|length| length.parse::<usize>().ok());
    let fields = format!("Fly-Replay: {instance}\r\n");
    if length.is_some_and(|length| length <= UNREAD) && head.field("expect").is_none() {
        return wire.answer("200 OK", &fields, b"").await.is_some()
            && wire.body(head).await.is_some();
    }
    let close = format!("{fields}connection: close\r\n");
    let _ = wire.answer("200 OK", &close, b"").await;
    false
}

/// The app.
async fn app(world: &World, node: usize, wire: &mut Wire, head: &Head) -> Option<()> {
    if let Some(counter) = world.served.get(node) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
    // An app replays what asks for it, once: `fly-replay-src` says that it did.
    if head.field("fly-replay-src").is_none() {
        if let Some(json) = head.field("x-replay-json") {
            let kind = "content-type: application/vnd.fly.replay+json\r\n";
            wire.body(head).await?;
            return wire.answer("307 Temporary Redirect", kind, json.as_bytes()).await;
        }
        if let Some(value) = head.field("x-replay") {
            wire.body(head).await?;
            let fields = format!("fly-replay: {value}\r\nfly-replay-cache: /*\r\n");
            return wire.answer("409 Conflict", &fields, b"elsewhere").await;
        }
    }
    let path = head.path().to_owned();
    let mut parts = path.split('/').skip(1);
    let (verb, argument) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    let number = argument.parse::<usize>().unwrap_or(0).min(64 << 20);
    match (verb, &*head.method) {
        ("kv", "GET" | "HEAD") => {
            let count = present(world, node, argument);
            let body = json!({ "node": World::name(node), "count": count }).to_string();
            let body = if head.method == "HEAD" { String::new() } else { body };
            wire.answer("200 OK", "content-type: application/json\r\n", body.as_bytes()).await
        }
        ("kv", method) => {
            let body = wire.body(head).await?;
            let txid = commit(world, node, argument, method, body.len());
            let body = json!({ "node": World::name(node), "txid": txid }).to_string();
            let cookie = format!("Set-Cookie: __txid={txid:016x}; Path=/; HttpOnly\r\n");
            wire.answer("200 OK", &cookie, body.as_bytes()).await
        }
        ("echo", _) => {
            let body = wire.body(head).await?;
            let sum: u64 = body.iter().map(|byte| u64::from(*byte)).sum();
            let body = json!({
                "node": World::name(node),
                "method": head.method,
                "target": head.target,
                "fields": head.fields,
                "length": body.len(),
                "sum": sum,
            });
            wire.answer("200 OK", "", body.to_string().as_bytes()).await
        }
        ("whoami", _) => wire.answer("200 OK", "", World::name(node).as_bytes()).await,
        ("bytes", _) => wire.answer("200 OK", "", &vec![b'x'; number]).await,
        ("sleep", _) => {
            sleep(Duration::from_millis(number as u64)).await;
            wire.answer("200 OK", "", b"slept").await
        }
        ("status", _) => {
            wire.body(head).await?;
            wire.answer(&format!("{argument} Whatever"), "", b"so it is").await
        }
        ("trailers", _) => {
            wire.write(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                  5\r\nhello\r\n0\r\nx-sum: 5\r\n\r\n",
            )
            .await
        }
        ("hints", _) => {
            wire.write(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n").await?;
            wire.answer("200 OK", "", b"hinted").await
        }
        ("upgrade", _) => {
            wire.write(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
            )
            .await?;
            let (mut read, mut write) = wire.stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
            None
        }
        ("fault", _) => fault(wire, head, argument).await,
        _ => {
            wire.body(head).await?;
            wire.answer("404 Not Found", "", b"nothing here").await
        }
    }
}

/// What goes wrong on purpose. Always ends the connection.
async fn fault(wire: &mut Wire, head: &Head, which: &str) -> Option<()> {
    match which {
        "reset" => {
            wire.body(head).await?;
        }
        "half" => {
            wire.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await?;
        }
        "chunk" => {
            wire.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nx")
                .await?;
        }
        "garbage" => {
            wire.body(head).await?;
            wire.write(b"what is this\r\n\r\n").await?;
        }
        "early" => {
            wire.answer("413 Content Too Large", "connection: close\r\n", b"too large").await?;
        }
        _ => {}
    }
    None
}

/// How often a node has the id: replicas a little later than the primary.
fn present(world: &World, node: usize, id: &str) -> usize {
    let state = world.state();
    let delay =
        if state.primary == Some(node) { Duration::ZERO } else { world.options.replication };
    let now = Instant::now();
    state.log.iter().filter(|(other, at)| other == id && *at + delay <= now).count()
}

fn commit(world: &World, node: usize, id: &str, method: &str, bytes: usize) -> usize {
    let mut state = world.state();
    let written = state.ledger.entry(id.to_owned()).or_default();
    written.on.push(node);
    method.clone_into(&mut written.method);
    written.bytes = bytes;
    state.log.push((id.to_owned(), Instant::now()));
    state.log.len()
}

/// LiteFS's API.
pub(super) async fn api(world: &World, node: usize, wire: &mut Wire, head: &Head) -> bool {
    let (is_primary, hostname, incarnation, lag, txid) = standing(world, node);
    let identity =
        format!("Litefs-Id: {incarnation:016X}\r\nLitefs-Cluster-Id: LFSC0000000000000001\r\n");
    match head.path() {
        "/info" => {
            let body = json!({
                "clusterID": "LFSC0000000000000001",
                "isPrimary": is_primary,
                "candidate": true,
                "path": "/litefs",
                "primary": { "hostname": hostname },
            });
            wire.answer("200 OK", &identity, body.to_string().as_bytes()).await.is_some()
        }
        "/events" => {
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{identity}\r\n");
            events(world, node, wire, &head).await;
            false
        }
        "/debug/vars" => {
            let db = json!({ "name": "app.db", "txid": format!("{txid:016x}"), "checksum": format!("{txid:016x}") });
            let body = json!({ "store": { "isPrimary": is_primary, "candidate": true, "dbs": { "app.db": db } } });
            wire.answer("200 OK", "", body.to_string().as_bytes()).await.is_some()
        }
        "/metrics" => {
            let body = format!(
                "litefs_is_primary {}\nlitefs_lag_seconds {}\n",
                u8::from(is_primary),
                lag.as_secs_f64()
            );
            wire.answer("200 OK", "", body.as_bytes()).await.is_some()
        }
        _ => wire.answer("404 Not Found", "", b"404 page not found\n").await.is_some(),
    }
}

fn standing(world: &World, node: usize) -> (bool, String, u64, Duration, usize) {
    let state = world.state();
    let is_primary = state.primary == Some(node);
    let hostname = state.primary.map(World::name).unwrap_or_default();
    let (incarnation, lag) =
        state.nodes.get(node).map_or((0, Duration::ZERO), |node| (node.incarnation, node.lag));
    (is_primary, hostname, incarnation, lag, state.log.len())
}

/// The push stream: one line at the begin, then one for each change of role.
async fn events(world: &World, node: usize, wire: &mut Wire, head: &str) -> Option<()> {
    wire.write(head.as_bytes()).await?;
    let mut changed = world.changed.subscribe();
    let mut kind = "init";
    let mut told = None;
    loop {
        let (is_primary, hostname, ..) = standing(world, node);
        if told.as_ref() != Some(&(is_primary, hostname.clone())) {
            let mut data = json!({ "isPrimary": is_primary });
            if !is_primary && !hostname.is_empty() {
                data["hostname"] = hostname.clone().into();
            }
            let line = format!("{}\n", json!({ "type": kind, "data": data }));
            wire.write(line.as_bytes()).await?;
            kind = "primaryChange";
            told = Some((is_primary, hostname));
        }
        changed.changed().await.ok()?;
    }
}
