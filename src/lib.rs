//! litegate, a write-aware HTTP reverse proxy.
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        clippy::duration_suboptimal_units,
        clippy::unchecked_time_subtraction,
        reason = "tests make points in time as test data"
    )
)]

#[cfg(feature = "acme")]
pub mod acme;
pub mod admin;
pub mod app;
pub mod call;
pub mod cli;
pub mod config;
pub mod decide;
pub mod demo;
pub mod discovery;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod litefs;
pub mod net;
pub mod proxy;
pub mod server;
#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::format_push_string,
    reason = "a handful of nodes, and text that nobody waits for"
)]
mod simulation;
pub mod telemetry;
pub mod testkit;
pub mod topology;
pub mod upstream;
pub mod verify;
