//! After a 101: joins two byte streams until either ends or both are silent for too long.

use std::{cell::Cell, io, pin::pin, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    time::{Instant, sleep_until},
};

use crate::net::Stream;

/// What is read at once in each direction.
const BUFFER: usize = 8 << 10;

/// How a tunnel went.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Carried {
    /// Bytes from the client to the node.
    pub up: u64,
    /// Bytes from the node to the client.
    pub down: u64,
}

/// Carries bytes both ways. `from_client` and `from_node` were read before and go first. A side
/// that ends its half lets the other finish. Ends after `idle` without a byte either way.
pub async fn join(
    client: Stream,
    from_client: Bytes,
    node: Stream,
    from_node: Bytes,
    idle: Duration,
) -> Carried {
    let (up, down) = (Cell::new(0), Cell::new(0));
    let active = Cell::new(Instant::now());
    let (client_read, client_write) = split(client);
    let (node_read, node_write) = split(node);
    {
        let upward = pin!(carry(client_read, node_write, from_client, &up, &active));
        let downward = pin!(carry(node_read, client_write, from_node, &down, &active));
        let both = pin!(async { tokio::try_join!(upward, downward) });
        let silent = pin!(async {
            loop {
                let until = active.get() + idle;
                if until <= Instant::now() {
                    return;
                }
                sleep_until(until).await;
            }
        });
        tokio::select! {
            _ = both => {}
            () = silent => {}
        }
    }
    Carried { up: up.get(), down: down.get() }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    first: Bytes,
    carried: &Cell<u64>,
    active: &Cell<Instant>,
) -> io::Result<()> {
    to.write_all(&first).await?;
    to.flush().await?;
    carried.set(first.len() as u64);
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        active.set(Instant::now());
        to.write_all(buffer.get(..n).unwrap_or_default()).await?;
        to.flush().await?;
        carried.set(carried.get() + n as u64);
        active.set(Instant::now());
    }
}
