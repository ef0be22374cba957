//! `litegate verify`: does a deployment keep its word to its clients?
//!
//! Several clients write and read back over HTTP, each value once; a judge hears what each sent and
//! was told, and says what does not fit. It knows nothing of litegate: whatever is behind the URLs
//! is measured by its answers alone, so that it judges any proxy, or none. It imports nothing of
//! litegate either.
//!
//! * [`history`] has the words: operations, ends, events;
//! * [`judge`] is pure: a history in, a verdict out, with a table of what is judged;
//! * `plan` says what clients do next, `words` how values look and are found, `memory` what a
//!   client carries from answer to request: all pure;
//! * `client` and `drive` have the sockets and the clock;
//! * [`report`] makes text and JSON of a verdict.

mod client;
mod drive;
pub mod history;
pub mod judge;
mod memory;
mod plan;
pub mod report;
#[cfg(test)]
mod tests;
mod words;

pub use client::Target;
pub use drive::{Run, Settings, run};
pub use memory::Carry;
pub use plan::Workload;
pub use words::Template;

/// A run ends at this many writes, whatever its duration: what is remembered of them fits into
/// some 100 MB.
pub const WRITES: u64 = 1_000_000;
