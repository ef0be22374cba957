//! How long a client may keep us waiting for the body of its request.
//!
//! It has a stock of patience, `limits.body_idle` at first. Waiting for the client uses it up, and
//! what the client sends fills it again: where the body has a known length, one second for every
//! `limits.body_rate` bytes, never beyond the whole; else all of it with any byte. So a client may
//! pause for as long as `body_idle` after it has sent something worth the pause, but can't stay by
//! a byte now and then. An average since the beginning would let whoever began fast dribble for
//! hours.
//!
//! Only a known length is held to a rate: that is something which exists already and is on its way.
//! A body of unknown length may be a stream (gRPC, a log that is followed), and quiet by its nature;
//! nothing in its head could tell that it is one that not everybody could write there. What such a
//! body could block, it does not hold: see `proxy::slot`.
//!
//! Pure: the caller brings the time, and says when it was not the client that it waited for.

use std::time::{Duration, Instant};

/// What a client has to keep to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// `limits.body_idle`
    pub idle: Duration,
    /// `limits.body_rate`, in bytes a second. Zero: any byte is enough.
    pub rate: u64,
}

/// How one body has been coming.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pace {
    rules: Rules,
    /// Patience at `since`, or now if that is `None`. Never more than `rules.idle`.
    left: Duration,
    /// Since when the client keeps us waiting.
    since: Option<Instant>,
}

/// Why a client is not waited for any longer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Late {
    /// It has sent nothing for `body_idle`.
    Silent,
    /// What it has sent was too little for the time it took: `body_rate`.
    Slow,
}

impl Pace {
    /// For a body that begins.
    pub const fn new(rules: Rules) -> Self {
        Self { rules, left: rules.idle, since: None }
    }

    /// Whether the client keeps us waiting.
    pub const fn is_waiting(&self) -> bool {
        self.since.is_some()
    }

    /// There is nothing of the client's to go on with.
    #[must_use]
    pub fn waits(self, now: Instant) -> Self {
        Self { since: Some(self.since.unwrap_or(now)), ..self }
    }

    /// So many bytes came. `now` is not looked at if nobody waited for them.
    #[must_use]
    pub fn got(self, now: Instant, bytes: usize) -> Self {
        let waited =
            self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let left = self.left.saturating_sub(waited).saturating_add(self.rules.worth(bytes));
        Self { left: left.min(self.rules.idle), since: None, ..self }
    }

    /// It was not the client that held this up since it began to wait.
    #[must_use]
    pub const fn forgiven(self) -> Self {
        Self { since: None, ..self }
    }

    /// When patience ends, if nothing comes.
    pub fn due(&self) -> Option<Instant> {
        Some(self.since? + self.left)
    }

    /// Whether it has ended.
    pub fn late(&self, now: Instant) -> Option<Late> {
        let since = self.since?;
        let waited = now.saturating_duration_since(since);
        if waited < self.left {
            None
        } else if waited >= self.rules.idle {
            Some(Late::Silent)
        } else {
            Some(Late::Slow)
        }
    }
}

impl Rules {
    /// The patience that so many bytes bring.
    fn worth(&self, bytes: usize) -> Duration {
        match (bytes as u64).saturating_mul(1_000_000_000).checked_div(self.rate) {
            Some(nanos) => Duration::from_nanos(nanos),
            None if bytes == 0 => Duration::ZERO,
            None => self.idle,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules { idle: Duration::from_secs(30), rate: 250 };

    fn millis(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// How a client fares that keeps us waiting so long and then sends so much, again and again.
    fn fares(rules: Rules, pieces: &[(u64, usize)]) -> Option<Late> {
        let (mut pace, mut now) = (Pace::new(rules), Instant::now());
        for (wait, bytes) in pieces {
            pace = pace.waits(now);
            now += millis(*wait);
            if let Some(late) = pace.late(now) {
                return Some(late);
            }
            pace = pace.got(now, *bytes);
        }
        None
    }

    #[test]
    fn who_sends_nothing_is_silent_and_who_sends_a_little_is_slow() {
        for (pieces, want) in [
            (&[(29_999, 1)][..], None),
            (&[(30_000, 1)], Some(Late::Silent)),
            // A pause is earned by what was sent before it.
            (&[(29_000, 7500), (29_999, 7500), (29_999, 1)], None),
            (&[(29_000, 100), (1_400, 1)], Some(Late::Slow)),
            // An empty frame brings nothing.
            (&[(29_000, 0), (1_000, 0)], Some(Late::Slow)),
            // A fast start is not credit for ever.
            (&[(0, 1 << 30), (20_000, 1), (10_004, 1)], Some(Late::Slow)),
        ] {
            assert_eq!(fares(RULES, pieces), want, "{pieces:?}");
        }
        let any = Rules { rate: 0, ..RULES };
        assert_eq!(fares(any, &[(29_999, 1); 100]), None);
        assert_eq!(fares(any, &[(29_999, 0), (1, 0)]), Some(Late::Slow));
    }

    #[test]
    fn a_byte_a_second_ends_within_little_more_than_the_patience() {
        let (mut pace, began) = (Pace::new(RULES), Instant::now());
        for second in 0..31 {
            pace = pace.waits(began + millis(1000 * second));
            if pace.late(began + millis(1000 * second + 999)).is_some() {
                return assert!(second >= 29, "{second}");
            }
            pace = pace.got(began + millis(1000 * second + 1000), 1);
        }
        panic!("it is served for ever");
    }

    #[test]
    fn time_that_was_not_the_client_s_does_not_count() {
        let began = Instant::now();
        let pace = Pace::new(RULES).waits(began);
        assert_eq!(pace.late(began + millis(60_000)), Some(Late::Silent));
        assert_eq!(pace.forgiven(), Pace::new(RULES));
        assert_eq!(pace.forgiven().late(began + millis(60_000)), None);
    }

    proptest! {
        /// Nobody is cut off who sends at the rate, in whatever pieces, and never pauses for too long.
        #[test]
        fn who_keeps_the_rate_is_never_late(
            rate in 1_u64..100_000,
            waits in proptest::collection::vec((0_u64..30_000, 0_usize..1000), 0..200),
        ) {
            let bytes = |wait: u64| usize::try_from((wait * rate).div_ceil(1000)).unwrap();
            // One more, for what rounding loses.
            let pieces: Vec<_> =
                waits.iter().map(|(wait, extra)| (*wait, bytes(*wait) + 1 + extra)).collect();
            prop_assert_eq!(fares(Rules { rate, ..RULES }, &pieces), None);
        }

        /// However it is cut up: who has kept us waiting longer than its bytes are worth is late.
        #[test]
        fn nobody_stays_for_less_than_the_rate(
            rate in 1_u64..100_000,
            pieces in proptest::collection::vec((0_u64..30_000, 0_usize..100_000), 0..200),
        ) {
            let rules = Rules { rate, ..RULES };
            let waited: u64 = pieces.iter().map(|(wait, _)| wait).sum();
            // The last ones came after the last wait.
            let bytes: usize = pieces.iter().rev().skip(1).map(|(_, bytes)| bytes).sum();
            let worth = rules.idle + Duration::from_secs_f64(bytes as f64 / rate as f64);
            prop_assume!(millis(waited) > worth);
            prop_assert!(fares(rules, &pieces).is_some());
        }

        /// Patience is never more than the whole of it, and ends when it says.
        #[test]
        fn it_ends_when_it_is_due(
            rate in 0_u64..100_000,
            pieces in proptest::collection::vec((0_u64..30_000, 0_usize..100_000), 0..50),
        ) {
            let (mut pace, mut now) = (Pace::new(Rules { rate, ..RULES }), Instant::now());
            for (wait, bytes) in pieces {
                pace = pace.waits(now);
                let due = pace.due().unwrap();
                prop_assert!(due <= now + RULES.idle);
                prop_assert_eq!(pace.late(due).is_some(), true);
                prop_assert!(due == now || pace.late(due - Duration::from_nanos(1)).is_none());
                now += millis(wait);
                pace = pace.got(now, bytes);
                prop_assert_eq!(pace.due(), None);
            }
        }
    }
}
