//! A path that answers 200 on the primary and something else elsewhere, as Patroni's `/primary`.

use std::{net::SocketAddr, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{
    call,
    discovery::Observer,
    topology::{Claim, Saw, Source},
};

/// Asks one member for ever. Any answer is its own word; none is silence.
pub(in crate::discovery) async fn follow(
    member: SocketAddr,
    asked: SocketAddr,
    path: Box<str>,
    opening: Vec<u8>,
    every: Duration,
    limit: Duration,
    observer: Observer,
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_silent = false;
    loop {
        ticks.tick().await;
        let saw = match call::status(asked, &path, &opening, limit).await {
            Ok(status) => {
                let is_primary = status == ::http::StatusCode::OK;
                Saw::Claim { address: member, claim: Claim { is_primary, ..Claim::default() } }
            }
            Err(error) => {
                if !was_silent {
                    tracing::warn!(%member, %asked, path, %error, "the role probe is not answered");
                }
                Saw::Silent { address: member }
            }
        };
        was_silent = matches!(saw, Saw::Silent { .. });
        observer.observe(saw, Source::Http);
    }
}
