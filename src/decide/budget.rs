//! How many retries are allowed, so that they can't turn an overload into a storm.
//!
//! Each request deposits a share of a retry, each retry withdraws one; besides, `minimum` retries
//! a second come for nothing. Deposits are worth something for [`WINDOW`] only.

use std::time::{Duration, Instant};

/// How long a request's deposit counts.
const WINDOW: Duration = Duration::from_secs(10);

/// One worker's budget of one cluster.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Retries per request.
    share: f64,
    /// Retries a second in any case.
    minimum: f64,
    /// Retries saved up by requests.
    saved: f64,
    /// Retries that come for nothing, saved up for at most a second.
    free: f64,
    at: Instant,
}

impl Budget {
    /// A fresh budget: the free second is there at once.
    pub fn new(share: f64, minimum: usize, now: Instant) -> Self {
        let minimum = minimum as f64;
        Self { share, minimum, saved: 0.0, free: minimum, at: now }
    }

    /// A request came.
    pub fn request(&mut self, now: Instant) {
        self.pass(now);
        self.saved += self.share;
    }

    /// Whether one more retry is allowed; if so, it is spent.
    pub fn retry(&mut self, now: Instant) -> bool {
        self.pass(now);
        let purse = if self.free >= 1.0 { &mut self.free } else { &mut self.saved };
        let allowed = *purse >= 1.0;
        if allowed {
            *purse -= 1.0;
        }
        allowed
    }

    /// Retries that are left.
    pub fn left(&self) -> f64 {
        self.saved + self.free
    }

    fn pass(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.free = self.minimum.min(self.free + self.minimum * passed);
        self.saved *= (1.0 - passed / WINDOW.as_secs_f64()).max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_requests_may_be_retried() {
        let now = Instant::now();
        let mut budget = Budget::new(0.2, 0, now);
        (0..100).for_each(|_| budget.request(now));
        let allowed = (0..100).filter(|_| budget.retry(now)).count();
        assert!((19..=20).contains(&allowed), "{allowed}");
    }

    #[test]
    fn so_many_a_second_are_allowed_in_any_case() {
        let now = Instant::now();
        let mut budget = Budget::new(0.0, 10, now);
        assert_eq!((0..100).filter(|_| budget.retry(now)).count(), 10);
        let later = now + Duration::from_secs(5);
        assert_eq!((0..100).filter(|_| budget.retry(later)).count(), 10);
    }

    #[test]
    fn what_old_requests_saved_is_gone_after_the_window() {
        let now = Instant::now();
        let mut budget = Budget::new(1.0, 0, now);
        (0..100).for_each(|_| budget.request(now));
        assert!(!budget.retry(now + WINDOW));
    }
}
