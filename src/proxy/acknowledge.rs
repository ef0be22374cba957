//! After a write: where the primary was when it answered, for the client to carry along.
//!
//! The position must be read after the answer began, or it might be the one before the write.
//! LiteFS's own proxy says it for nothing, in its `__txid` cookie; else the node's exact reading
//! is asked for, which all writes that end meanwhile share.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use smallvec::SmallVec;
use tokio::time::{Instant, timeout_at};

use super::{
    cluster::Cluster,
    session::{EXACT, unix_millis},
};
use crate::{
    config::cluster::{Mode, OnTimeout},
    decide::{
        Problem,
        answer::Said,
        outcome::Before,
        token::{Need, TOKEN, Token, Void},
    },
    litefs::TXID_COOKIE,
    telemetry::metrics::Consistency,
    topology::{
        Presence,
        position::{Position, Positions, Reach},
        progress::Progress,
    },
};

/// The app's last word on whether it wrote.
pub(super) const WRITE: HeaderName = HeaderName::from_static("litegate-write");
/// The client's earlier write was lost in a failover.
const LOST: HeaderName = HeaderName::from_static("litegate-write-lost");
/// On how many replicas the write is, where that is not as many as was asked for.
const DURABILITY: HeaderName = HeaderName::from_static("litegate-durability");

/// How long the feed may be behind an answer before the node is asked instead.
const FEED: Duration = Duration::from_millis(20);

/// Whoever writes within so many milliseconds is sent to the primary until the same moment, and so
/// gets the same token.
const ALIKE: u64 = 100;

/// What a write's answer brings along.
pub(super) type Fields = SmallVec<[(HeaderName, HeaderValue); 4]>;

/// A token as a write's client was given it. Writes that end together often get one and the same.
#[derive(Debug)]
pub(super) struct Given {
    token: Token,
    /// Whether the client came by https.
    secure: bool,
    cookie: Option<HeaderValue>,
    text: Option<HeaderValue>,
}

/// Who is told, and how.
pub(super) struct To<'a> {
    pub(super) cluster: &'a Cluster,
    /// The node that answered.
    pub(super) progress: &'a Progress,
    /// Its answer.
    pub(super) head: &'a HeaderMap,
    /// The name of the cookie.
    pub(super) cookie: &'a str,
    /// Whether the client came by https.
    pub(super) secure: bool,
    /// Where others see it, on a route that says so.
    pub(super) scope: Option<u64>,
    /// Where the node was when the request was sent there.
    pub(super) before: &'a Before,
    /// What the client had seen before.
    pub(super) carried: Option<&'a Need>,
}

impl To<'_> {
    /// After a write: the fields for the client, and a problem where it is not as safe as it
    /// has to be.
    pub(super) async fn acknowledge(&self, fields: &mut Fields) -> Result<(), Problem> {
        let rules = &self.cluster.config.consistency;
        let wanted = self.cluster.config.durability.replicas;
        let need =
            if rules.mode == Mode::Token || wanted > 0 { self.position().await } else { None };
        if let Some(scope) = self.scope {
            self.cluster.last_writes.note(scope, need.clone(), Instant::now().into_std());
        }
        match (&need, rules.mode) {
            (_, Mode::Off) => {}
            (Some(need), Mode::Token) => {
                // The new token replaces the old one: this is the last moment to tell.
                let is_lost = |old: &&Need| old.is_lost_at(need, &self.progress.get());
                if self.carried.is_some_and(|old| is_lost(&old)) {
                    self.cluster.void(Void::Lost);
                    self.lost(fields, true);
                }
                // Of another's history, this node will not lose anything when it is deposed, and
                // has not if it was: a replay may have had it answer.
                if need.lineage == self.progress.get().incarnation {
                    for (database, position) in &need.databases {
                        self.progress.acknowledge(*database, position.txid);
                    }
                }
                self.give(need, fields);
            }
            // Where nobody can say how far the primary was, its next reads go there for a while.
            (None, Mode::Token) | (_, Mode::Affinity) => {
                let until = unix_millis()
                    .saturating_add(u64::try_from(rules.affinity.as_millis()).unwrap_or(u64::MAX));
                let until = until.checked_next_multiple_of(ALIKE).unwrap_or(u64::MAX);
                // What the client has seen before still counts, above all if it gets lost.
                let seen = self.seen_before().filter(|_| rules.mode == Mode::Token);
                if let Some((need, beyond)) = seen {
                    let age = rules.token_age.as_secs().max(1);
                    self.carry(Token::Blind { need, beyond, until }, age, fields);
                } else {
                    let age = rules.affinity.as_secs().max(1);
                    self.carry(Token::Affinity(until), age, fields);
                }
            }
        }
        if wanted == 0 {
            return Ok(());
        }
        self.replicas(need.as_ref(), wanted, fields).await
    }

    /// To a client whose write was lost: says so, and what is there now.
    /// `wrote`: it gets another token anyway.
    pub(super) fn lost(&self, fields: &mut Fields, wrote: bool) {
        fields.push((LOST, HeaderValue::from_static("1")));
        if wrote {
            return;
        }
        if let Some(known) = self.cluster.primary_positions().filter(|known| !known.is_empty()) {
            let databases = known.iter().map(|(database, _, position)| (database, position));
            let need = Need { lineage: known.incarnation, databases: databases.collect() };
            self.give(&need, fields);
        }
    }

    /// Where the node was after this answer began.
    async fn position(&self) -> Option<Need> {
        if let Some(need) = self.told().await {
            return Some(need);
        }
        self.cluster.counted(|cells| cells.exact.add(1));
        let exact = timeout_at(Instant::now() + EXACT, self.progress.exact()).await.ok().flatten();
        let Some(exact) = exact else {
            self.cluster.counted(|cells| cells.blind.add(1));
            return None;
        };
        let databases = exact.iter().map(|(database, _, position)| (database, position));
        Some(Need { lineage: self.lineage(&exact), databases: databases.collect() })
    }

    /// How far the client's own token or the node's feed had come, and whether this write
    /// certainly came after that.
    fn seen_before(&self) -> Option<(Need, bool)> {
        let known = self.progress.get();
        let (seen, beyond) = if known.is_empty() {
            // What it said before the write was sent.
            (self.before.need(), true)
        } else {
            let databases = known.iter().map(|(database, _, position)| (database, position));
            let feed = Need { lineage: self.lineage(&known), databases: databases.collect() };
            (Some(feed), false)
        };
        match (self.carried, seen) {
            // Of another primary: whether that is lost is for a later judgement.
            (Some(old), Some(seen)) if old.lineage != seen.lineage => Some((old.clone(), false)),
            (Some(old), Some(seen)) if old.is_after(&seen) => Some((old.clone(), beyond)),
            (_, Some(seen)) => Some((seen, beyond)),
            (old, None) => old.map(|old| (old.clone(), false)),
        }
    }

    /// Whose history the node's position is of: its own if it is primary, or was when the write was
    /// sent to it, else its primary's (a replica may write through LiteFS's halt lock).
    fn lineage(&self, here: &Positions) -> Option<u64> {
        match here.is_primary {
            _ if self.before.was_primary(here.incarnation) => here.incarnation,
            Some(true) => here.incarnation,
            _ => self.cluster.primary_positions().map_or(here.incarnation, |p| p.incarnation),
        }
    }

    /// What LiteFS's proxy said of it. It names no database: that counts where there is only one.
    /// It has no checksum either: the feed has it already, or will in a moment.
    async fn told(&self) -> Option<Need> {
        let cookies = self.head.get_all(header::SET_COOKIE).iter();
        let mut txids = cookies.filter_map(|cookie| {
            let value =
                cookie.as_bytes().strip_prefix(TXID_COOKIE.as_bytes())?.strip_prefix(b"=")?;
            Position::parse_hex(value.split(|byte| *byte == b';').next()?)
        });
        let txid = txids.next_back()?;
        let find = || {
            let known = self.progress.get();
            let (database, _) = known.only()?;
            let checksum = known.checksum(database, txid)?;
            let databases = [(database, Position { txid, checksum })].into_iter().collect();
            Some(Need { lineage: self.lineage(&known), databases })
        };
        if let Some(need) = find() {
            return Some(need);
        }
        let mut listening = self.progress.bell().listen(self.cluster.config.hold.max_requests)?;
        let deadline = Instant::now() + FEED;
        loop {
            if let Some(need) = find() {
                return Some(need);
            }
            timeout_at(deadline, listening.rung()).await.ok()?;
        }
    }

    fn give(&self, need: &Need, fields: &mut Fields) {
        let rules = &self.cluster.config.consistency;
        self.carry(Token::Need(need.clone()), rules.token_age.as_secs().max(1), fields);
        let is_set = self
            .head
            .get_all(header::SET_COOKIE)
            .iter()
            .any(|cookie| cookie.as_bytes().starts_with(TXID_COOKIE.as_bytes()));
        if rules.txid_cookie
            && !is_set
            && self.takes_cookies()
            && let [(_, position)] = &need.databases[..]
        {
            // As LiteFS sets it (`reference/litefs.md` section 1.6).
            let text =
                format!("{TXID_COOKIE}={:016x}; Path=/; Max-Age=300; HttpOnly", position.txid);
            fields.extend(HeaderValue::try_from(text).ok().map(|text| (header::SET_COOKIE, text)));
        }
    }

    fn carry(&self, token: Token, seconds: u64, fields: &mut Fields) {
        // With another key, what was given before is forgotten.
        let key = self.cluster.key();
        self.cluster.counted(|cells| cells.issued.add(1));
        let mut given = self.cluster.given.borrow_mut();
        if !given.as_ref().is_some_and(|given| given.token == token && given.secure == self.secure)
        {
            let text = token.encode(&key);
            let (name, secure) = (self.cookie, if self.secure { "; Secure" } else { "" });
            let cookie =
                format!("{name}={text}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}");
            *given = Some(Given {
                token,
                secure: self.secure,
                cookie: HeaderValue::try_from(cookie).ok(),
                text: HeaderValue::try_from(text).ok(),
            });
        }
        let Some(given) = &*given else { return };
        if self.cluster.config.consistency.cookie && self.takes_cookies() {
            fields.extend(given.cookie.clone().map(|cookie| (header::SET_COOKIE, cookie)));
        }
        fields.extend(given.text.clone().map(|text| (TOKEN, text)));
    }

    /// A cookie on an answer that shared caches keep would be everybody's.
    fn takes_cookies(&self) -> bool {
        let lines = self.head.get_all(header::CACHE_CONTROL).iter();
        !lines.into_iter().any(|line| {
            let directives = line.as_bytes().split(|byte| *byte == b',');
            directives.into_iter().any(|one| one.trim_ascii().eq_ignore_ascii_case(b"public"))
        })
    }

    /// Waits until enough replicas have the write.
    async fn replicas(
        &self,
        need: Option<&Need>,
        wanted: usize,
        fields: &mut Fields,
    ) -> Result<(), Problem> {
        let rules = &self.cluster.config.durability;
        let deadline = Instant::now() + rules.timeout;
        let mut there = 0;
        if let Some(need) = need {
            let mut reader = self.cluster.topology.borrow().clone();
            let bell = std::sync::Arc::clone(&reader.latest().bell);
            // Without a place to wait, the time is up at once.
            let mut listening = bell.listen(self.cluster.config.hold.max_requests);
            loop {
                let primary = self.progress.get();
                let nodes = reader.latest().nodes.iter().filter(|node| {
                    node.presence == Presence::Member
                        && !std::ptr::eq(&raw const *node.progress, self.progress)
                        && need.is_reached(&node.progress.get(), Some(&**primary)) == Reach::Reached
                });
                there = nodes.count();
                if there >= wanted {
                    self.cluster
                        .counted(|Consistency { durable: [reached, _], .. }| reached.add(1));
                    return Ok(());
                }
                let Some(listening) = &mut listening else { break };
                if timeout_at(deadline, listening.rung()).await.is_err() {
                    break;
                }
            }
        }
        self.cluster.counted(|Consistency { durable: [_, timeout], .. }| timeout.add(1));
        if rules.on_timeout == OnTimeout::Fail {
            return Err(Problem::NotDurable);
        }
        let text = format!("replicas={there}; wanted={wanted}");
        fields.extend(HeaderValue::try_from(text).ok().map(|text| (DURABILITY, text)));
        Ok(())
    }
}

/// Whether an answer is a write's: the app knows best.
pub(super) fn wrote(head: &HeaderMap, said: Said, is_write: bool) -> bool {
    let told = said.addressed.then(|| head.get(&WRITE)).flatten();
    match told.map(HeaderValue::as_bytes) {
        Some(b"1") => true,
        Some(b"0") => false,
        _ => is_write,
    }
}
