//! Sources that belong to one member: LiteFS's API and the active probe.

use std::{net::SocketAddr, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::Observer;
use crate::{
    litefs::client::{self, Events},
    topology::{Saw, Source},
};

/// How long `/info` may take: longer means that the node is in trouble.
const INFO: Duration = Duration::from_millis(500);
/// Between two looks at a node's lag.
const LAG: Duration = Duration::from_secs(2);
/// The first pause before the stream of events is opened again; doubles up to [`LONGEST`].
const BACKOFF: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(2);
/// Probes in a row that change a verdict.
const PROBES: u32 = 2;

/// Polls `/info`: LiteFS sends no keep-alive on `/events`, so a dead peer there looks idle.
pub(super) async fn litefs(
    member: SocketAddr,
    api: SocketAddr,
    poll: Duration,
    observer: Observer,
) {
    let mut ticks = interval(poll);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_silent = false;
    loop {
        ticks.tick().await;
        let saw = match client::info(api, INFO).await {
            Ok(claim) => Saw::Claim { address: member, claim },
            Err(error) => {
                if !was_silent {
                    tracing::warn!(%member, %api, %error, "LiteFS's API does not answer");
                }
                Saw::Silent { address: member }
            }
        };
        was_silent = matches!(saw, Saw::Silent { .. });
        observer.observe(saw, Source::Litefs);
    }
}

/// Follows `/events`, which tells of a new role within milliseconds.
pub(super) async fn litefs_events(member: SocketAddr, api: SocketAddr, observer: Observer) {
    let mut pause = BACKOFF;
    loop {
        let opened = Instant::now();
        if let Ok(mut events) = Events::open(api, INFO).await {
            while let Ok(Some(claim)) = events.next().await {
                observer.observe(Saw::Claim { address: member, claim }, Source::Litefs);
            }
            // The stream ends with the process: ask at once rather than at the next poll.
            if client::info(api, INFO).await.is_err() {
                observer.observe(Saw::Silent { address: member }, Source::Litefs);
            }
        }
        if opened.elapsed() > LONGEST {
            pause = BACKOFF;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST);
    }
}

/// Reads the lag.
pub(super) async fn litefs_lag(member: SocketAddr, api: SocketAddr, observer: Observer) {
    let mut ticks = interval(LAG);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Ok(Some(lag)) = client::lag(api, INFO).await {
            observer.observe(Saw::Lag { address: member, lag }, Source::Litefs);
        }
    }
}

/// Asks the app whether it is well.
pub(super) async fn probe(
    member: SocketAddr,
    path: Box<str>,
    every: Duration,
    limit: Duration,
    observer: Observer,
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut verdict, mut against) = (true, 0);
    loop {
        ticks.tick().await;
        let healthy = client::probe(member, &path, limit).await;
        against = if healthy == verdict { 0 } else { against + 1 };
        if against >= PROBES {
            (verdict, against) = (healthy, 0);
            observer.observe(Saw::Probed { address: member, healthy }, Source::Probe);
        }
    }
}
