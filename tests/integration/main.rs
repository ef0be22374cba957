//! litegate over real sockets, before the fake cluster of the testkit.

mod gate;
mod http;
mod leaving;
mod reads;
mod refusals;
mod replays;
mod writes;

mod examples;
