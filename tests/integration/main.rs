//! litegate over real sockets, before the fake cluster of the testkit.
#![expect(
    clippy::disallowed_methods,
    reason = "sockets are real here, and so is the time that they take"
)]

mod gate;
mod http;
mod leaving;
mod reads;
mod writes;

mod examples;
