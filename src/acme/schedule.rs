//! When to ask for a certificate. PURE: time and chance are arguments.

use std::time::Duration;

/// The first wait after the directory could not be asked, and the longest.
const UNREACHABLE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_hours(1));
/// The first wait after the directory said no, and the longest. Let's Encrypt takes five failed
/// validations of a name in an hour, and this asks four times in the first.
const REFUSED: (Duration, Duration) = (Duration::from_mins(5), Duration::from_hours(12));

/// From when until when a certificate holds, since 1970.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Validity {
    /// From then.
    pub from: Duration,
    /// Until then.
    pub until: Duration,
}

/// When a certificate is renewed: at two thirds of its life, or up to a twentieth of its life
/// before that, by `chance` from 0 to 1, so that certificates of one age are not renewed at once.
pub fn renewal(validity: Validity, chance: f64) -> Duration {
    let life = validity.until.saturating_sub(validity.from);
    let early = (life / 20).mul_f64(chance.clamp(0.0, 1.0));
    validity.from + (life * 2 / 3).saturating_sub(early)
}

/// Why there is no certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The directory could not be asked, or wants to be asked again.
    Unreachable,
    /// It was asked and said no: each further time costs some of what it allows.
    Refused,
}

/// How long to wait after the `failures`th failure in a row, the first being 1: twice as long each
/// time up to a bound, less up to a quarter by `chance` from 0 to 1.
pub fn backoff(fault: Fault, failures: u32, chance: f64) -> Duration {
    let (first, longest) = match fault {
        Fault::Unreachable => UNREACHABLE,
        Fault::Refused => REFUSED,
    };
    let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(20));
    doubled.min(longest).mul_f64(1.0 - chance.clamp(0.0, 1.0) / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_life_or_a_little_before() {
        let from = DAY * 20_000;
        for (life, chance, want) in [
            (DAY * 90, 0.0, DAY * 60),
            (DAY * 90, 1.0, DAY * 60 - DAY * 90 / 20),
            (DAY * 6, 0.0, DAY * 4),
            (DAY * 6, 7.0, DAY * 4 - DAY * 6 / 20),
            (Duration::ZERO, 0.5, Duration::ZERO),
        ] {
            let validity = Validity { from, until: from + life };
            assert_eq!(renewal(validity, chance), from + want, "{life:?} {chance}");
        }
        let backwards = Validity { from, until: from - DAY };
        assert_eq!(renewal(backwards, 0.5), from, "it never holds: at once");
    }

    #[test]
    fn failures_are_waited_out_twice_as_long_each_time_up_to_a_bound() {
        use Fault::{Refused, Unreachable};
        let minutes = Duration::from_mins;
        for (fault, failures, chance, want) in [
            (Unreachable, 1, 0.0, Duration::from_secs(2)),
            (Unreachable, 2, 0.0, Duration::from_secs(4)),
            (Unreachable, 4, 1.0, Duration::from_secs(12)),
            (Unreachable, 30, 0.0, minutes(60)),
            (Refused, 1, 0.0, minutes(5)),
            (Refused, 3, 0.0, minutes(20)),
            (Refused, u32::MAX, 0.0, minutes(720)),
            (Refused, 0, 0.0, minutes(5)),
        ] {
            assert_eq!(backoff(fault, failures, chance), want, "{fault:?} {failures} {chance}");
        }
    }

    #[test]
    fn at_most_five_refusals_fit_in_an_hour() {
        let mut at = Duration::ZERO;
        let within = (1..).take_while(|n| {
            at += backoff(Fault::Refused, *n, 1.0);
            at < Duration::from_hours(1)
        });
        assert!(within.count() < 5, "and the first attempt makes them five");
    }
}
