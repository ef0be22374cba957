//! What happens to the cluster, by a key or by itself.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Closing, LEASE, SLOWER};
use crate::testkit::Cluster;

/// How long a killed node stays away.
const AWAY: Duration = Duration::from_secs(2);
/// How long the new primary has been cut off from the old one when the lease moves without a
/// hand-over.
const CUT: Duration = Duration::from_millis(700);
/// How long a frozen primary stays frozen after its lease has run out.
const LATE: Duration = Duration::from_secs(1);
/// How long a replica that was stalled by itself stays so.
const STALLED: Duration = Duration::from_secs(4);
/// What is remembered of what happened.
const REMEMBERED: usize = 16;

/// What happens later because of something that happened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    Restart(usize),
    /// The lease of a frozen primary runs out.
    Expire(usize),
    Thaw(usize),
    Flow(usize),
    /// The lease moves to this node, whatever it lacks.
    Seize(usize),
}

/// What happened so far, and what is to come of it.
#[derive(Debug)]
pub(super) struct Story {
    cluster: Arc<Cluster>,
    began: Instant,
    /// When something was last done to the cluster.
    at: Instant,
    turn: usize,
    later: Vec<(Instant, Then)>,
    stalled: Vec<bool>,
    frozen: Vec<bool>,
    /// What happened, with when, the last at the back.
    pub(super) said: VecDeque<(Duration, String)>,
    /// How much more happened before.
    pub(super) forgotten: usize,
    /// Transactions that LiteFS lost, and in how many failovers.
    pub(super) gone: u64,
    pub(super) lossy: u64,
}

impl Story {
    pub(super) fn new(cluster: Arc<Cluster>, now: Instant) -> Self {
        let nodes = cluster.places().len();
        let mut story = Self {
            cluster,
            began: now,
            at: now,
            turn: 0,
            later: Vec::new(),
            stalled: vec![false; nodes],
            frozen: vec![false; nodes],
            said: VecDeque::new(),
            forgotten: 0,
            gone: 0,
            lossy: 0,
        };
        story.say(now, "all three nodes are well".into());
        story
    }

    fn say(&mut self, now: Instant, text: String) {
        if self.said.len() == REMEMBERED {
            self.said.pop_front();
            self.forgotten += 1;
        }
        self.said.push_back((now - self.began, text));
    }

    fn name(&self, node: usize) -> &str {
        self.cluster.places().get(node).map_or("?", |place| &place.name)
    }

    /// What was done to a node, in a word.
    pub(super) fn state(&self, node: usize) -> Option<&'static str> {
        let is = |list: &[bool]| list.get(node).copied().unwrap_or(false);
        match node {
            node if !self.cluster.is_alive(node) => Some("killed"),
            _ if is(&self.frozen) => Some("frozen"),
            _ if is(&self.stalled) => Some("stalled"),
            _ => None,
        }
    }

    /// What a key does. `false`: nothing.
    pub(super) fn key(&mut self, key: char, now: Instant) -> bool {
        match key {
            'k' => self.kill(now),
            'h' => self.hand_over(now),
            'f' => self.freeze(now),
            's' => self.stall(now, None),
            'l' => self.lose(now),
            'm' => self.mend(now),
            _ => return false,
        }
        true
    }

    /// The next of what happens by itself.
    pub(super) fn next(&mut self, now: Instant) {
        self.turn += 1;
        match self.turn % 5 {
            1 => self.hand_over(now),
            2 => self.lose(now),
            3 => self.kill(now),
            4 => self.stall(now, Some(STALLED)),
            _ => self.freeze(now),
        }
    }

    /// Does what is due. Whether there was anything.
    pub(super) fn pass(&mut self, now: Instant) -> bool {
        let mut is_any = false;
        while let Some(place) = self.later.iter().position(|(due, _)| *due <= now) {
            let (_, then) = self.later.swap_remove(place);
            self.then(then, now);
            is_any = true;
        }
        is_any
    }

    /// Mends everything; by then every client has come by once more since the last event.
    pub(super) fn close(&mut self, quiet: Duration) -> Closing {
        self.mend(Instant::now());
        Closing::At(self.at + quiet)
    }

    /// The living nodes that answer, without `not`.
    fn others(&self, not: usize) -> Option<usize> {
        let nodes = self.cluster.places().len();
        let mut others = (1..nodes).map(|n| (not + n) % nodes);
        others.find(|node| self.cluster.is_alive(*node) && self.frozen.get(*node) == Some(&false))
    }

    /// A primary and somebody who could follow it.
    fn pair(&mut self, now: Instant) -> Option<(usize, usize)> {
        let Some(primary) = self.cluster.primary() else {
            self.say(now, "nobody is primary: wait for the lease to move".into());
            return None;
        };
        let Some(other) = self.others(primary) else {
            self.say(now, format!("only {} is left: m mends the others", self.name(primary)));
            return None;
        };
        if self.frozen.get(primary) == Some(&true) || self.is_seizing() {
            self.say(now, "wait: the lease is about to move".into());
            return None;
        }
        self.at = now;
        Some((primary, other))
    }

    fn is_seizing(&self) -> bool {
        self.later.iter().any(|(_, then)| matches!(then, Then::Seize(_)))
    }

    fn hand_over(&mut self, now: Instant) {
        if let Some((primary, other)) = self.pair(now) {
            self.cluster.promote(other);
            let (from, to) = (self.name(primary), self.name(other));
            self.say(now, format!("{from} handed the lease over to {to}"));
        }
    }

    fn kill(&mut self, now: Instant) {
        let Some((primary, _)) = self.pair(now) else { return };
        // The first one that lives takes the lease when it has run out.
        let heir = (0..self.cluster.places().len()).find(|node| {
            *node != primary
                && self.cluster.is_alive(*node)
                && self.frozen.get(*node) == Some(&false)
        });
        let gone = heir.map_or(0, |heir| self.gone_between(primary, heir));
        self.cluster.kill(primary);
        self.later.push((now + AWAY, Then::Restart(primary)));
        let name = self.name(primary);
        self.say(
            now,
            format!("{name} was killed with {} that nobody else has", transactions(gone)),
        );
        self.count(gone);
    }

    fn freeze(&mut self, now: Instant) {
        let Some((primary, _)) = self.pair(now) else { return };
        self.cluster.freeze(primary, true);
        self.mark_frozen(primary, true);
        self.later.push((now + LEASE, Then::Expire(primary)));
        self.later.push((now + LEASE + LATE, Then::Thaw(primary)));
        self.say(now, format!("{} froze: it accepts and answers nothing", self.name(primary)));
    }

    /// Cuts a replica off from its primary, or joins one that was.
    fn stall(&mut self, now: Instant, until: Option<Duration>) {
        if let Some(node) = self.stalled.iter().position(|stalled| *stalled) {
            self.later.retain(|(_, then)| *then != Then::Flow(node));
            self.then(Then::Flow(node), now);
            return;
        }
        let Some((_, replica)) = self.pair(now) else { return };
        self.cluster.stall(replica, true);
        self.mark_stalled(replica, true);
        if let Some(until) = until {
            self.later.push((now + until, Then::Flow(replica)));
        }
        self.say(now, format!("nothing reaches {} from its primary any more", self.name(replica)));
    }

    fn lose(&mut self, now: Instant) {
        let Some((_, heir)) = self.pair(now) else { return };
        self.cluster.delay(heir, Some(Duration::from_hours(1)));
        self.later.push((now + CUT, Then::Seize(heir)));
        let name = self.name(heir);
        self.say(now, format!("{name} falls behind, and will take the lease all the same"));
    }

    /// Everything is well again, at once.
    fn mend(&mut self, now: Instant) {
        for (_, then) in std::mem::take(&mut self.later) {
            if !matches!(then, Then::Flow(_)) {
                self.then(then, now);
            }
        }
        if let Some(node) = self.stalled.iter().position(|stalled| *stalled) {
            self.then(Then::Flow(node), now);
        }
        if self.cluster.primary().is_none()
            && let Some(first) = (0..self.stalled.len()).find(|node| self.cluster.is_alive(*node))
        {
            self.cluster.promote(first);
        }
        self.say(now, "everything is mended".into());
    }

    fn then(&mut self, then: Then, now: Instant) {
        self.at = now;
        match then {
            Then::Restart(node) => {
                self.cluster.restart(node);
                self.say(now, format!("{} is back, as another process", self.name(node)));
            }
            Then::Expire(node) => {
                if self.cluster.primary() == Some(node)
                    && let Some(heir) = self.others(node)
                {
                    self.seize(node, heir, now);
                }
            }
            Then::Seize(heir) => {
                if let Some(primary) = self.cluster.primary().filter(|primary| *primary != heir) {
                    self.seize(primary, heir, now);
                }
                let is_last = heir + 1 == self.cluster.places().len();
                self.cluster.delay(heir, is_last.then_some(SLOWER));
            }
            Then::Thaw(node) => {
                self.cluster.freeze(node, false);
                self.mark_frozen(node, false);
                self.say(now, format!("{} answers again", self.name(node)));
            }
            Then::Flow(node) => {
                self.cluster.stall(node, false);
                self.mark_stalled(node, false);
                self.say(now, format!("{} hears its primary again", self.name(node)));
            }
        }
    }

    fn seize(&mut self, primary: usize, heir: usize, now: Instant) {
        let gone = self.gone_between(primary, heir);
        self.cluster.seize(heir);
        if self.stalled.get(heir) == Some(&true) {
            self.then(Then::Flow(heir), now);
        }
        let (name, lost) = (self.name(heir), transactions(gone));
        self.say(now, format!("{name} took the lease without {lost}: LiteFS lost them"));
        self.count(gone);
    }

    fn gone_between(&self, primary: usize, heir: usize) -> u64 {
        self.cluster.position(primary).txid.saturating_sub(self.cluster.position(heir).txid)
    }

    fn count(&mut self, gone: u64) {
        self.gone += gone;
        self.lossy += u64::from(gone > 0);
    }

    fn mark_frozen(&mut self, node: usize, is: bool) {
        self.frozen.iter_mut().skip(node).take(1).for_each(|frozen| *frozen = is);
    }

    fn mark_stalled(&mut self, node: usize, is: bool) {
        self.stalled.iter_mut().skip(node).take(1).for_each(|stalled| *stalled = is);
    }
}

fn transactions(n: u64) -> String {
    format!("{n} transaction{}", if n == 1 { "" } else { "s" })
}
