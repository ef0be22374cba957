//! Consul's key, as far as litegate reads it: blocking queries, `ModifyIndex`, a holder or none.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt as _,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    wire::Message,
    world::{Consul, INSTANCES, World, name},
};
use crate::net::{Stream, simulated::Socket};

/// The lease's key.
pub(super) const KEY: &str = "litefs/abaci";
/// How long a question is kept at most.
const WAIT: Duration = Duration::from_secs(5);
/// Between two looks at the lease, which ends by time as well.
const LOOK: Duration = Duration::from_millis(10);

/// Where an instance finds it.
pub(super) fn address(instance: usize) -> SocketAddr {
    SocketAddr::from(([10, instance as u8, 0, 100], 8500))
}

pub(super) async fn serve(world: Rc<World>) {
    let mut accepted = world.network.listen((0..INSTANCES).map(address));
    let mut connections = JoinSet::new();
    while let Some(socket) = accepted.recv().await {
        while connections.try_join_next().is_some() {}
        let world = Rc::clone(&world);
        connections.spawn_local(async move { answer(&world, socket).await.unwrap_or_default() });
    }
}

/// `None` when the connection is over.
async fn answer(world: &World, socket: Socket) -> Option<()> {
    let mut stream = Stream::Simulated(socket);
    let mut ahead = BytesMut::new();
    loop {
        let request = Message::read(&mut stream, &mut ahead).await?;
        let (_, query) = request.path().split_once('?').unwrap_or_default();
        let mut pairs = query.split('&').filter_map(|pair| pair.strip_prefix("index="));
        let known: u64 = pairs.next().and_then(|index| index.parse().ok()).unwrap_or(0);
        // Down for everybody is down for litegate, too.
        world.until(|s| s.nodes.iter().any(|node| node.consul == Consul::Answers)).await;
        let until = Instant::now() + WAIT;
        let (mut index, mut holder) = world.key();
        while index == known && Instant::now() < until {
            sleep(LOOK).await;
            (index, holder) = world.key();
        }
        let value =
            holder.map(|node| STANDARD.encode(format!(r#"{{"hostname":"{}"}}"#, name(node))));
        let value = value.map_or_else(|| "null".to_owned(), |value| format!(r#""{value}""#));
        let body = format!(r#"[{{"Key":"{KEY}","Value":{value},"ModifyIndex":{index}}}]"#);
        let length = body.len();
        let head = format!(
            "HTTP/1.1 200 OK\r\nx-consul-index: {index}\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(head.as_bytes()).await.ok()?;
    }
}
