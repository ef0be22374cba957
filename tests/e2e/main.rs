//! litegate on the real thing: LiteFS with FUSE, SQLite, and CoreDNS.
//!
//! Run it by `tests/e2e/build && cargo test --test e2e`; docs/end-to-end-tests.md says what it
//! needs. Plain `cargo test` leaves it out. Whatever is missing is a failure, never a skip.
//!
//! Everything runs on loopback: a cluster's nodes have the addresses 127.0.1.1 to 127.0.1.4 and
//! share their ports, as pods do. Each test has a cluster of its own, so tests run in parallel.
#![expect(
    clippy::disallowed_methods,
    reason = "the processes under test are real, and so is the time they take"
)]
#![expect(clippy::print_stderr, reason = "a failed test shows what its processes printed")]

#[cfg(feature = "acme")]
mod acme;
mod clients;
mod cluster;
mod consul;
mod coredns;
mod gate;
mod http;
mod load;
mod process;

mod failover;
mod fixture;
mod lease;
mod members;
mod openssl;
mod protocols;
mod reads;
mod verify;
mod writes;
