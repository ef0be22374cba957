//! litegate over real sockets, before the fake cluster of the testkit.

mod aborts;
mod attack;
mod check;
mod demo;
mod dns;
mod failover;
mod floods;
mod gate;
mod h2;
mod handoff;
mod house;
mod http;
#[cfg(feature = "http3")]
mod http3;
mod leaving;
mod limits;
mod metrics;
mod process;
mod proxy_protocol;
mod reads;
mod refusals;
mod replays;
mod roles;
mod sessions;
mod slow;
mod sse;
mod testkit;
mod tls;
mod together;
mod tunnels;
mod upstream_h2;
mod upstream_tls;
mod verify;
mod writes;

mod examples;
