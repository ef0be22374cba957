//! The way to a node: connections, places, load. One set for each worker; nothing is shared
//! between cores.

mod connection;
mod gate;
mod interim;
mod node;

pub use connection::{ConnectError, Connection, Wire};
pub use gate::{Full, Gate, Place};
pub use node::{Limits, Upstream, Upstreams};
