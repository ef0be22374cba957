//! Bulk takes turns with everybody else.
//!
//! A runtime lets a task go on for as long as its sockets are ready, and looks at sockets again only
//! after dozens of tasks. A hundred transfers that are always ready would keep a small request
//! waiting while each of them moves its part, several times over. So a body that has moved [`TURN`]
//! bytes waits in a queue of its worker's, of which one goes on between two looks at the sockets:
//! beside any number of transfers a request waits for a few turns.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// A few dozen microseconds of copying.
const TURN: usize = 128 << 10;
/// The first turn is as long as a body of 64 KiB, which has none to give up: many may begin at the
/// same time.
const FIRST: usize = 68 << 10;

thread_local! {
    /// A worker is a thread.
    static BULK: Bulk = Bulk::default();
}

/// The bodies of one worker that wait for their next turn: at most one of each request.
#[derive(Default)]
struct Bulk {
    waiting: RefCell<VecDeque<(Ticket, Waker)>>,
    /// There is somebody who calls them.
    is_called: Cell<bool>,
}

/// Whether its body is still waiting.
type Ticket = Rc<Cell<bool>>;

impl Bulk {
    fn wait(&self, ticket: Ticket, waker: Waker) {
        self.waiting.borrow_mut().push_back((ticket, waker));
        if !self.is_called.replace(true) {
            tokio::task::spawn_local(call(Caller));
        }
    }

    /// Begins the next one's turn. Whether there was one.
    fn next(&self) -> bool {
        loop {
            let next = self.waiting.borrow_mut().pop_front();
            let Some((ticket, waker)) = next else { return false };
            // A body that is gone has no turn.
            if Rc::strong_count(&ticket) > 1 {
                ticket.set(false);
                waker.wake();
                return true;
            }
        }
    }
}

/// Calls one after the other until nobody waits.
async fn call(_caller: Caller) {
    while BULK.with(Bulk::next) {
        // The runtime looks at its sockets before it goes on here.
        tokio::task::yield_now().await;
    }
}

/// Whoever calls. Should it end early, nobody waits for ever.
struct Caller;

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = BULK.try_with(|bulk| {
            bulk.is_called.set(false);
            while bulk.next() {}
        });
    }
}

/// What a body has moved since its turn began.
#[derive(Debug)]
pub(super) struct Turn {
    moved: Cell<usize>,
    /// From its second turn on.
    ticket: RefCell<Option<Ticket>>,
}

impl Default for Turn {
    fn default() -> Self {
        Self { moved: Cell::new(TURN - FIRST), ticket: RefCell::default() }
    }
}

impl Turn {
    /// Whether it is this body's. If not, the task will be woken for it.
    pub(super) fn poll_mine(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.moved.get() < TURN {
            return Poll::Ready(());
        }
        self.poll_next(cx)
    }

    #[cold]
    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut ticket = self.ticket.borrow_mut();
        match &*ticket {
            Some(ticket) if ticket.get() => return Poll::Pending,
            // It was called.
            Some(_) => {
                *ticket = None;
                self.moved.set(0);
                return Poll::Ready(());
            }
            None => {}
        }
        let mine = Rc::new(Cell::new(true));
        *ticket = Some(Rc::clone(&mine));
        BULK.with(|bulk| bulk.wait(mine, cx.waker().clone()));
        Poll::Pending
    }

    /// So many bytes more.
    pub(super) fn moved(&self, bytes: usize) {
        self.moved.set(self.moved.get().saturating_add(bytes));
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::task::{LocalSet, spawn_local, yield_now};

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    /// Moves so many pieces of 64 KiB.
    async fn transfer(pieces: usize, moved: Rc<Cell<usize>>) {
        let turn = Turn::default();
        for _ in 0..pieces {
            poll_fn(|cx| turn.poll_mine(cx)).await;
            turn.moved(64 << 10);
            moved.set(moved.get() + 1);
        }
    }

    #[test]
    fn between_two_looks_at_the_sockets_one_transfer_goes_on() {
        run(async {
            let moved = Rc::new(Cell::new(0));
            let transfers: Vec<_> =
                (0..100).map(|_| spawn_local(transfer(9, Rc::clone(&moved)))).collect();
            while moved.get() < 200 {
                // Their first turns.
                yield_now().await;
            }
            let mut most = 0;
            while moved.get() < 900 {
                let before = moved.get();
                yield_now().await;
                most = most.max(moved.get() - before);
            }
            assert!(most <= 4, "{most} pieces moved while a request waited");
            for transfer in transfers {
                transfer.await.unwrap();
            }
        });
    }

    #[test]
    fn a_body_of_64_kib_has_no_turn_to_give_up() {
        let (turn, mut cx) = (Turn::default(), Context::from_waker(Waker::noop()));
        assert!(turn.poll_mine(&mut cx).is_ready());
        turn.moved(64 << 10);
        assert!(turn.poll_mine(&mut cx).is_ready());
    }

    #[test]
    fn whoever_is_gone_has_no_turn_and_nobody_waits_for_a_caller_that_ended() {
        run(async {
            let turns = [Turn::default(), Turn::default(), Turn::default()];
            let mut cx = Context::from_waker(Waker::noop());
            for turn in &turns {
                turn.moved(TURN);
                assert!(turn.poll_mine(&mut cx).is_pending());
            }
            let [gone, second, third] = turns;
            drop(gone);
            while second.poll_mine(&mut cx).is_pending() {
                yield_now().await;
            }
            while third.poll_mine(&mut cx).is_pending() {
                yield_now().await;
            }
        });
        let turn = Turn::default();
        run(async {
            turn.moved(TURN);
            assert!(turn.poll_mine(&mut Context::from_waker(Waker::noop())).is_pending());
        });
        assert!(turn.poll_mine(&mut Context::from_waker(Waker::noop())).is_ready());
    }
}
