//! Bulk takes turns with everybody else.
//!
//! A runtime lets a task go on for as long as its sockets are ready, up to 128 operations. That is
//! a few milliseconds of copying where each of them moves a whole buffer, and a hundred such
//! transfers at once keep a small request waiting for a third of a second. So a body that has moved
//! [`TURN`] bytes goes behind the others that are ready.

use std::{
    cell::Cell,
    task::{Context, Poll},
};

/// A few dozen microseconds of copying; a body of 64 KiB has no turn to give up.
const TURN: usize = 128 << 10;

/// What a body has moved since it last gave way.
#[derive(Debug, Default)]
pub(super) struct Turn(Cell<usize>);

impl Turn {
    /// Whether it is still this body's. If not, the next one has begun, and the task will be woken
    /// for it.
    pub(super) fn poll_mine(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.get() < TURN {
            return Poll::Ready(());
        }
        self.0.set(0);
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// So many bytes more.
    pub(super) fn moved(&self, bytes: usize) {
        self.0.set(self.0.get().saturating_add(bytes));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::{Wake, Waker},
    };

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_moves_much_gives_way_once_each_turn_and_is_woken() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        let turn = Turn::default();
        let mut gave_way = 0;
        for _ in 0..100 {
            if turn.poll_mine(&mut cx).is_pending() {
                gave_way += 1;
                assert!(turn.poll_mine(&mut cx).is_ready(), "once");
            }
            turn.moved(64 << 10);
        }
        assert_eq!(gave_way, 49);
        assert_eq!(woken.0.load(Ordering::Relaxed), gave_way);
    }
}
