//! Takes a failing node out of balancing, and back in.
//!
//! A node is ejected after `Rules::after` failures in a row: the first time for `base`,
//! then twice as long each time, up to `max`. Time alone readmits it; the first answer
//! after that forgives the doubling. Failures are counted in a row rather than as a rate
//! on purpose: a cluster has a handful of nodes, and one that fails at all usually fails
//! entirely.
//!
//! Whether an ejection is heeded is not decided here: `choose` overlooks ejections when
//! they would leave too few nodes.
//!
//! Pure: the caller brings the time; nothing here waits, logs or counts.

use std::time::{Duration, Instant};

/// When to eject, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Failures in a row that eject a node. Zero never does.
    pub after: u32,
    /// How long the first ejection lasts.
    pub base: Duration,
    /// The longest that any ejection lasts.
    pub max: Duration,
}

/// How one node has been doing. A value, so that a snapshot can hold it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Record {
    /// Failures since the last answer or ejection.
    failures: u32,
    /// Ejections since the last answer.
    ejections: u32,
    until: Option<Instant>,
}

impl Record {
    /// After an answer: everything is forgiven.
    #[must_use]
    pub fn answered(self) -> Self {
        Self::default()
    }

    /// After a failure at `now`.
    #[must_use]
    pub fn failed(self, now: Instant, rules: &Rules) -> Self {
        if self.is_ejected(now) {
            // Sent before the ejection: what it tells is known already.
            return self;
        }
        let failures = self.failures + 1;
        if rules.after == 0 || failures < rules.after {
            return Self { failures, ..self };
        }
        Self {
            failures: 0,
            ejections: self.ejections.saturating_add(1),
            until: Some(now + rules.length(self.ejections)),
        }
    }

    /// Whether it is out of balancing at `now`.
    pub fn is_ejected(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

impl Rules {
    /// How long the ejection after `earlier` ejections in a row lasts.
    fn length(&self, earlier: u32) -> Duration {
        let factor = 2u32.saturating_pow(earlier);
        self.base.saturating_mul(factor).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules =
        Rules { after: 3, base: Duration::from_secs(10), max: Duration::from_secs(60) };

    /// The record after three failures at `now`.
    fn struck(record: Record, now: Instant) -> Record {
        (0..3).fold(record, |record, _| record.failed(now, &RULES))
    }

    #[test]
    fn ejects_after_enough_failures_in_a_row() {
        let now = Instant::now();
        let twice = Record::default().failed(now, &RULES).failed(now, &RULES);
        assert!(!twice.is_ejected(now));
        assert!(twice.failed(now, &RULES).is_ejected(now));
    }

    #[test]
    fn an_answer_forgives_earlier_failures() {
        let now = Instant::now();
        let twice = Record::default().failed(now, &RULES).failed(now, &RULES);
        assert!(!twice.answered().failed(now, &RULES).is_ejected(now));
    }

    #[test]
    fn time_alone_readmits() {
        let now = Instant::now();
        let record = struck(Record::default(), now);
        assert!(record.is_ejected(now + RULES.base - Duration::from_nanos(1)));
        assert!(!record.is_ejected(now + RULES.base));
    }

    #[test]
    fn each_ejection_in_a_row_lasts_twice_as_long_up_to_the_longest() {
        let (mut record, mut now) = (Record::default(), Instant::now());
        for seconds in [10, 20, 40, 60, 60] {
            record = struck(record, now);
            now += Duration::from_secs(seconds);
            assert!(record.is_ejected(now - Duration::from_nanos(1)), "{seconds} s");
            assert!(!record.is_ejected(now), "{seconds} s");
        }
    }

    #[test]
    fn a_straggler_does_not_lengthen_an_ejection() {
        let now = Instant::now();
        let record = struck(Record::default(), now);
        assert_eq!(record.failed(now + RULES.base / 2, &RULES), record);
    }

    #[test]
    fn zero_never_ejects() {
        let (now, never) = (Instant::now(), Rules { after: 0, ..RULES });
        let record = (0..1_000).fold(Record::default(), |r, _| r.failed(now, &never));
        assert!(!record.is_ejected(now));
    }
}
