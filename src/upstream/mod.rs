//! The way to a node: connections, places, load. One set for each worker; nothing is shared
//! between cores.

mod connection;
mod dial;
mod gate;
mod h2;
mod heads;
mod node;
mod resets;

pub use connection::{Connection, Wire};
pub use dial::{ConnectError, Opened, open};
pub use gate::{Full, Gate, Place};
pub use h2::{H2, Handle, is_websocket};
pub use node::{Limits, Upstream, Upstreams};
