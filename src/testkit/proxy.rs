//! LiteFS's proxy: reads go to the app, once the node has what their cookie wants; writes too on
//! the primary; elsewhere they are answered with a replay.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::{
    Bug, Naming, State, World, app,
    state::Standing,
    wire::{Head, Wire},
};

/// How long an unread upload may still flow before the connection is cut (Go drains 256 KiB).
const UNREAD: usize = 256 << 10;
/// Behind which lag a replica calls itself unhealthy.
const MAX_LAG: Duration = Duration::from_secs(10);

/// Returns whether the connection goes on.
pub(super) async fn proxy(world: &World, node: usize, wire: &mut Wire, head: &Head) -> bool {
    if head.method == "GET" && head.path() == "/litefs/health" {
        let lag = world.state().lag(node, Instant::now());
        let answer = if lag <= MAX_LAG {
            wire.answer("200 OK", "", b"OK\n").await
        } else {
            wire.answer("503 Service Unavailable", "", b"Replication lag exceeded\n").await
        };
        return answer.is_some();
    }
    if matches!(&*head.method, "GET" | "HEAD") {
        if !caught_up(world, node, head).await {
            return wire.answer("504 Gateway Timeout", "", b"Proxy timeout\n").await.is_some();
        }
        return app::forward(world, node, wire, head, false).await.is_some();
    }
    let mut changed = world.changed();
    let deadline = Instant::now() + world.options.patience;
    let standing = loop {
        let standing = world.state().nodes.get(node).map(|node| node.standing);
        if standing != Some(Standing::Alone) {
            break standing;
        }
        if timeout(deadline - Instant::now(), changed.changed()).await.is_err() {
            break None;
        }
    };
    let (naming, bug) = {
        let state = world.state();
        let naming = state.nodes.get(node).map(|node| node.naming.clone()).unwrap_or_default();
        (naming, state.bug)
    };
    if standing == Some(Standing::Primary) || (standing.is_some() && bug == Some(Bug::Local)) {
        return app::forward(world, node, wire, head, true).await.is_some();
    }
    let instance = match (standing, naming) {
        (_, Naming::Value(value)) => value,
        (_, Naming::Itself) => format!("instance={}", State::name(node)),
        (_, Naming::Empty) => "instance=".to_owned(),
        (Some(Standing::Following(primary)), Naming::Primary) => {
            format!("instance={}", State::name(primary))
        }
        (_, Naming::Primary) => {
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

/// Waits until the node has what the request's `__txid` wants; only the number counts.
async fn caught_up(world: &World, node: usize, head: &Head) -> bool {
    let wanted = head.cookie("__txid").filter(|txid| txid.len() == 16);
    let wanted = wanted.and_then(|txid| u64::from_str_radix(txid, 16).ok()).unwrap_or(0);
    let (mut moved, is_deaf) = {
        let state = world.state();
        (state.moved.subscribe(), state.bug == Some(Bug::Stale))
    };
    let wait = async {
        // A database that is not there yet is not waited for.
        while (1..wanted).contains(&world.state().position(node, 0).txid) {
            if moved.changed().await.is_err() {
                return;
            }
        }
    };
    is_deaf || timeout(world.options.txid_wait, wait).await.is_ok()
}
