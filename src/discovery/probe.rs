//! The active health probe, on each member.

use std::{net::SocketAddr, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use super::Observer;
use crate::{
    call,
    net::tls::Connector,
    topology::{Saw, Source},
};

/// Probes in a row that change a verdict.
const PROBES: u32 = 2;

/// Asks the app whether it is well.
pub(super) async fn probe(
    member: SocketAddr,
    path: Box<str>,
    opening: Vec<u8>,
    tls: Option<Connector>,
    every: Duration,
    limit: Duration,
    observer: Observer,
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut verdict, mut against) = (true, 0);
    loop {
        ticks.tick().await;
        let status = call::status(member, &path, &opening, tls.as_ref(), limit).await;
        let healthy = status.is_ok_and(|status| status.is_success());
        against = if healthy == verdict { 0 } else { against + 1 };
        if against >= PROBES {
            (verdict, against) = (healthy, 0);
            observer.observe(Saw::Probed { address: member, healthy }, Source::Probe);
        }
    }
}
