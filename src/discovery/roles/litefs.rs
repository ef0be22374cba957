//! LiteFS's API, on each member.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use crate::{
    call::CallError,
    discovery::Observer,
    litefs::client::{self, Events, Told},
    topology::{Claim, Saw, Source, position::Positions, progress::Progress},
};

/// How long `/info` may take: longer means that the node is in trouble.
const INFO: Duration = Duration::from_millis(500);
/// How long an exact position may take: a client waits for it.
const EXACT: Duration = Duration::from_millis(500);
/// How long after the stream was opened it may still tell of what `/debug/vars` had already.
const OVERLAP: Duration = Duration::from_secs(1);
/// Between two looks at a node's lag.
const LAG: Duration = Duration::from_secs(2);
/// The first pause before the stream of events is opened again; doubles up to [`LONGEST`], and ends
/// when a poll hears the node: a new primary's first write may wait for its positions.
const BACKOFF: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(2);

/// What a member's LiteFS sources have in common.
#[derive(Clone, Debug)]
pub(in crate::discovery) struct Litefs {
    /// The member.
    pub(in crate::discovery) member: SocketAddr,
    /// Its LiteFS API.
    pub(in crate::discovery) api: SocketAddr,
    /// Where its positions go.
    pub(in crate::discovery) progress: Arc<Progress>,
    /// The databases that count; all where there is none.
    pub(in crate::discovery) databases: Arc<[Box<str>]>,
    pub(in crate::discovery) observer: Observer,
    /// Tells whoever waits to open the stream again that the node answers.
    pub(in crate::discovery) heard: Arc<Notify>,
}

impl Litefs {
    fn follows(&self, database: &str) -> bool {
        self.databases.is_empty() || self.databases.iter().any(|name| **name == *database)
    }

    /// Reports what the node says it is. Where it was when it became primary, only the stream
    /// knows: there the news come in their order.
    fn claims(&self, claim: Claim) {
        self.observer.observe(Saw::Claim { address: self.member, claim }, Source::Litefs);
    }

    /// Polls `/info`: LiteFS sends no keep-alive on `/events`, so a dead peer there looks idle.
    pub(in crate::discovery) async fn poll(self, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_silent = false;
        let mut answered = Instant::now();
        loop {
            ticks.tick().await;
            match client::info(self.api, INFO).await {
                Ok(claim) => {
                    was_silent = false;
                    answered = Instant::now();
                    self.progress.heard(answered.into_std());
                    self.claims(claim);
                    self.heard.notify_waiters();
                }
                Err(error) => {
                    if !std::mem::replace(&mut was_silent, true) {
                        let (member, api) = (self.member, self.api);
                        tracing::warn!(%member, %api, %error, "LiteFS's API does not answer");
                    }
                    self.silent();
                    // How far it was behind then, nobody knows now: at least so old is its word.
                    let lag = answered.elapsed();
                    self.observer.observe(Saw::Lag { address: self.member, lag }, Source::Litefs);
                }
            }
        }
    }

    fn silent(&self) {
        self.observer.observe(Saw::Silent { address: self.member }, Source::Litefs);
    }

    /// Follows `/events`, which tells of a new role or transaction within milliseconds.
    pub(in crate::discovery) async fn follow(self) {
        let mut pause = BACKOFF;
        loop {
            let opened = Instant::now();
            let ended = self.stream().await;
            // Where the node is now, nobody can say.
            self.progress.set(Positions::default());
            if let Err(error) = ended {
                tracing::debug!(member = %self.member, %error, "stream of events broke");
            }
            // The stream ends with the process: ask at once rather than at the next poll.
            if client::info(self.api, INFO).await.is_err() {
                self.silent();
            }
            if opened.elapsed() > LONGEST {
                pause = BACKOFF;
            }
            tokio::select! {
                biased;
                () = self.heard.notified() => {}
                () = sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST);
        }
    }

    async fn stream(&self) -> Result<(), CallError> {
        let mut events = Events::open(self.api, INFO).await?;
        // Opened first: whatever happens from here on is told, and what was before is read.
        let mut positions = Positions::of(events.incarnation());
        let read = client::Positions::of(self.api).read(INFO).await?;
        let at = Instant::now();
        for (name, position) in read.iter().filter(|(name, _)| self.follows(name)) {
            positions.set(name, *position, at.into_std());
        }
        self.progress.set(positions.clone());
        while let Some(told) = events.next().await? {
            match told {
                Told::Claim(mut claim) => {
                    let was = positions.is_primary.replace(claim.is_primary);
                    if was == Some(false) && claim.is_primary {
                        claim.positions = Some(Arc::new(positions.clone()));
                    }
                    if was != positions.is_primary {
                        self.progress.set(positions.clone());
                    }
                    self.claims(claim);
                }
                Told::Tx(name, position) => {
                    let is_old = at.elapsed() < OVERLAP
                        && read.iter().any(|(n, p)| *n == name && position.txid <= p.txid);
                    if !is_old && self.follows(&name) {
                        positions.set(&name, position, Instant::now().into_std());
                        self.progress.set(positions.clone());
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads the exact position whenever somebody asks.
    pub(in crate::discovery) async fn exact(self) {
        let mut positions = client::Positions::of(self.api);
        loop {
            let ticket = self.progress.asked().await;
            let known = self.progress.get().incarnation;
            let answer = match positions.read(EXACT).await {
                // The same process before and after: `/debug/vars` does not say whose it is.
                Ok(read) if known.is_some() && self.progress.get().incarnation == known => {
                    let now = Instant::now().into_std();
                    let mut exact = Positions::of(known);
                    exact.is_primary = self.progress.get().is_primary;
                    for (name, position) in read.iter().filter(|(name, _)| self.follows(name)) {
                        exact.set(name, *position, now);
                    }
                    Some(Arc::new(exact))
                }
                Ok(_) => None,
                Err(error) => {
                    tracing::debug!(member = %self.member, %error, "no exact position");
                    None
                }
            };
            self.progress.answer(ticket, answer);
        }
    }
    /// Reads the lag.
    pub(in crate::discovery) async fn lag(self) {
        let mut ticks = interval(LAG);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Ok(Some(lag)) = client::lag(self.api, INFO).await {
                self.observer.observe(Saw::Lag { address: self.member, lag }, Source::Litefs);
            }
        }
    }
}
