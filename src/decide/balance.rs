//! Which of several nodes: power of two choices and the other policies.
//!
//! Two candidates are drawn and the cheaper one is taken: nearly as good as asking all, and it
//! keeps many workers from running to the same node at once. What is cheap is the policy's:
//! latency times requests in flight, or requests in flight alone. A node that has just come up
//! counts as dearer until `slow_start` has passed.

use std::time::{Duration, Instant};

use crate::{
    config::cluster::Balance,
    topology::{Node, position::Reach},
};

/// How a node is doing, as the calling worker sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests in flight.
    pub in_flight: usize,
    /// How long its answers take. What that comes to now is worked out only where it counts.
    pub latency: PeakEwma,
    /// It has no free place.
    pub full: bool,
    /// How many choices were made before, for round robin.
    pub turn: usize,
    /// Whether it has what the client's token stands for. Reached where there is none.
    pub reach: Reach,
    /// It is taken for the primary, and says itself that it is none any more: the next snapshot
    /// will know.
    pub denies: bool,
    /// How old its data may be, where the client asks for a limit.
    pub age: Duration,
}

impl Load {
    /// Of a node of which nothing is known.
    pub(super) const UNKNOWN: Self = Self {
        in_flight: 0,
        latency: PeakEwma { seconds: 0.0, at: None },
        full: false,
        turn: 0,
        reach: Reach::Reached,
        denies: false,
        age: Duration::ZERO,
    };
}

/// Latency that believes bad news at once and forgets it slowly.
///
/// Peak-EWMA: a sample above the average replaces it, one below pulls it down with a time
/// constant of [`PeakEwma::DECAY`]; without samples it decays too, so that a node once slow is
/// tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PeakEwma {
    seconds: f64,
    at: Option<Instant>,
}

impl PeakEwma {
    /// The time after which a sample counts for a third.
    pub const DECAY: Duration = Duration::from_secs(10);

    /// With one more sample.
    #[must_use]
    pub fn observe(self, sample: Duration, now: Instant) -> Self {
        let sample = sample.as_secs_f64();
        let old = self.value(now);
        let seconds = if sample > old || self.at.is_none() {
            sample
        } else {
            let keep = self.kept(now);
            self.seconds * keep + sample * (1.0 - keep)
        };
        Self { seconds, at: Some(now) }
    }

    /// The average at `now`, in seconds.
    pub fn value(self, now: Instant) -> f64 {
        self.seconds * self.kept(now)
    }

    fn kept(self, now: Instant) -> f64 {
        let age = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        // e^-x by its first terms would do, but `exp` is a few nanoseconds.
        (-age.as_secs_f64() / Self::DECAY.as_secs_f64()).exp()
    }
}

/// One node that could serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'t> {
    pub(super) index: usize,
    pub(super) node: &'t Node,
    pub(super) load: &'t Load,
}

/// What to go by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The policy.
    pub balance: Balance,
    /// How long a node that has just come up gets less than its share.
    pub slow_start: Duration,
}

/// Picks one; `None` of none.
pub(super) fn pick(
    candidates: &[Candidate<'_>],
    rules: &Rules,
    chance: u64,
    now: Instant,
) -> Option<usize> {
    let n = candidates.len();
    let picked = match rules.balance {
        _ if n <= 1 => candidates.first(),
        Balance::RoundRobin => candidates.get(candidates.first()?.load.turn % n),
        Balance::Random => candidates.get(below(chance, n)),
        Balance::LeastRequest | Balance::PeakEwma => {
            let first = below(chance, n);
            // Another one: any of the n - 1 that follow it.
            let second = (first + 1 + below(chance.rotate_left(32), n - 1)) % n;
            let (first, second) = (candidates.get(first)?, candidates.get(second)?);
            let dearer = cost(first, rules, now) > cost(second, rules, now);
            Some(if dearer { second } else { first })
        }
    };
    picked.map(|candidate| candidate.index)
}

/// A number below `n` from 32 random bits, without division.
fn below(chance: u64, n: usize) -> usize {
    (((chance & 0xffff_ffff) * n as u64) >> 32) as usize
}

/// What a node that has answered nothing yet counts for: less than any real latency, so that it
/// is tried, but not nothing, so that its requests in flight count.
const UNKNOWN: f64 = 1e-6;

fn cost(candidate: &Candidate<'_>, rules: &Rules, now: Instant) -> f64 {
    let in_flight = candidate.load.in_flight as f64 + 1.0;
    let latency = match rules.balance {
        Balance::PeakEwma => candidate.load.latency.value(now).max(UNKNOWN),
        _ => 1.0,
    };
    in_flight * latency / warmth(candidate.node, rules.slow_start, now)
}

/// From 0.1 for a node that has just come up to 1 after `slow_start`.
fn warmth(node: &Node, slow_start: Duration, now: Instant) -> f64 {
    match node.admitted {
        Some(admitted) if !slow_start.is_zero() => {
            let age = now.saturating_duration_since(admitted).as_secs_f64();
            (age / slow_start.as_secs_f64()).clamp(0.1, 1.0)
        }
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_news_count_at_once_and_good_news_slowly() {
        let now = Instant::now();
        let fast = PeakEwma::default().observe(Duration::from_millis(10), now);
        let slow = fast.observe(Duration::from_secs(1), now);
        assert!((slow.value(now) - 1.0).abs() < 1e-9);
        let later = now + Duration::from_secs(1);
        let better = slow.observe(Duration::from_millis(10), later).value(later);
        assert!(better > 0.5 && better < 1.0, "{better}");
    }

    #[test]
    fn a_slow_node_is_forgiven_in_time() {
        let now = Instant::now();
        let slow = PeakEwma::default().observe(Duration::from_secs(1), now);
        assert!(slow.value(now + Duration::from_secs(60)) < 0.01);
    }

    #[test]
    fn below_stays_below() {
        for n in 1..10 {
            assert!(below(u64::MAX, n) < n);
            assert_eq!(below(0, n), 0);
        }
    }
}
