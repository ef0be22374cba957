//! A path that answers 200 on the primary and something else elsewhere, as Patroni's `/primary`.

use std::{net::SocketAddr, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{
    call,
    discovery::Observer,
    net::tls::Connector,
    topology::{Claim, Saw, Source},
};

/// Where and how one member is asked.
#[derive(Debug)]
pub(in crate::discovery) struct Question {
    /// The member.
    pub(in crate::discovery) member: SocketAddr,
    /// Where it is asked.
    pub(in crate::discovery) asked: SocketAddr,
    /// The path.
    pub(in crate::discovery) path: Box<str>,
    /// What goes before everything.
    pub(in crate::discovery) opening: Vec<u8>,
    /// How TLS is spoken there.
    pub(in crate::discovery) tls: Option<Connector>,
}

/// Asks one member for ever. Any answer is its own word; none is silence.
pub(in crate::discovery) async fn follow(
    question: Question,
    every: Duration,
    limit: Duration,
    observer: Observer,
) {
    let Question { member, asked, path, opening, tls } = question;
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_silent = false;
    loop {
        ticks.tick().await;
        let saw = match call::status(asked, &path, &opening, tls.as_ref(), limit).await {
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
