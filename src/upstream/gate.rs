//! So many at once, so many waiting, in order of arrival.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    rc::{Rc, Weak},
    task::{Poll, Waker},
};

/// A counted door for one thread.
#[derive(Debug)]
pub struct Gate {
    /// How many may be inside.
    places: usize,
    /// How many may wait.
    waiting: usize,
    inside: Cell<usize>,
    queue: RefCell<VecDeque<Weak<Waiter>>>,
}

#[derive(Debug)]
struct Waiter {
    waker: RefCell<Option<Waker>>,
    admitted: Cell<bool>,
}

/// Both the places and the queue are full.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("full")]
pub struct Full;

impl Gate {
    /// A gate with this many places and this long a queue.
    pub fn new(places: usize, waiting: usize) -> Rc<Self> {
        Rc::new(Self {
            places: places.max(1),
            waiting,
            inside: Cell::new(0),
            queue: RefCell::default(),
        })
    }

    /// How many are inside.
    pub fn inside(&self) -> usize {
        self.inside.get()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.queue.borrow().len()
    }

    /// Whether somebody new would have to wait.
    pub fn is_full(&self) -> bool {
        self.inside.get() >= self.places
    }

    /// Takes a place if one is free and nobody waits for it.
    pub fn try_enter(self: &Rc<Self>) -> Option<Place> {
        if self.is_full() || !self.queue.borrow().is_empty() {
            return None;
        }
        self.inside.set(self.inside.get() + 1);
        Some(Place(Rc::clone(self)))
    }

    /// Waits for a place, behind everybody who waits already. Whoever drops this gives up its
    /// turn.
    pub async fn enter(self: &Rc<Self>) -> Result<Place, Full> {
        if let Some(place) = self.try_enter() {
            return Ok(place);
        }
        if self.waiting() >= self.waiting {
            return Err(Full);
        }
        let waiter = Rc::new(Waiter { waker: RefCell::default(), admitted: Cell::new(false) });
        self.queue.borrow_mut().push_back(Rc::downgrade(&waiter));
        let turn = Turn { gate: Rc::clone(self), waiter };
        poll_fn(|cx| {
            if turn.waiter.admitted.get() {
                return Poll::Ready(());
            }
            *turn.waiter.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        // The place was counted when it was handed over.
        turn.waiter.admitted.set(false);
        Ok(Place(Rc::clone(self)))
    }

    /// Hands a free place to the first who still waits, or frees it.
    fn pass_on(&self) {
        let mut queue = self.queue.borrow_mut();
        while let Some(first) = queue.pop_front() {
            if let Some(waiter) = first.upgrade() {
                waiter.admitted.set(true);
                if let Some(waker) = waiter.waker.borrow_mut().take() {
                    waker.wake();
                }
                return;
            }
        }
        self.inside.set(self.inside.get() - 1);
    }
}

/// A wait that may be given up.
struct Turn {
    gate: Rc<Gate>,
    waiter: Rc<Waiter>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.waiter.admitted.get() {
            // Admitted, but gone before it noticed: the next one's place.
            self.gate.pass_on();
        } else {
            let waiter = Rc::as_ptr(&self.waiter);
            self.gate.queue.borrow_mut().retain(|other| !std::ptr::eq(other.as_ptr(), waiter));
        }
    }
}

/// A place inside, until dropped.
#[derive(Debug)]
pub struct Place(Rc<Gate>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::pin, task::Context};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn places_are_handed_over_in_order_of_arrival() {
        let gate = Gate::new(1, 2);
        let inside = gate.try_enter().unwrap();
        let (mut first, mut second) = (pin!(gate.enter()), pin!(gate.enter()));
        assert!(poll(first.as_mut()).is_pending());
        assert!(poll(second.as_mut()).is_pending());
        drop(inside);
        assert!(poll(second.as_mut()).is_pending(), "the second must not overtake");
        let Poll::Ready(Ok(place)) = poll(first.as_mut()) else { panic!("the first has its turn") };
        assert_eq!(gate.inside(), 1);
        drop(place);
        assert!(poll(second.as_mut()).is_ready());
    }

    #[test]
    fn nobody_new_overtakes_those_who_wait() {
        let gate = Gate::new(1, 2);
        let inside = gate.try_enter().unwrap();
        let mut first = pin!(gate.enter());
        assert!(poll(first.as_mut()).is_pending());
        drop(inside);
        assert!(gate.try_enter().is_none());
    }

    #[test]
    fn the_queue_is_bounded() {
        let gate = Gate::new(1, 1);
        let _inside = gate.try_enter().unwrap();
        let mut first = pin!(gate.enter());
        assert!(poll(first.as_mut()).is_pending());
        assert_eq!(poll(pin!(gate.enter())).map(Result::err), Poll::Ready(Some(Full)));
    }

    #[test]
    fn who_gives_up_frees_its_turn() {
        let gate = Gate::new(1, 8);
        let inside = gate.try_enter().unwrap();
        let mut second = pin!(gate.enter());
        {
            let mut first = pin!(gate.enter());
            assert!(poll(first.as_mut()).is_pending());
            assert!(poll(second.as_mut()).is_pending());
        }
        assert_eq!(gate.waiting(), 1);
        drop(inside);
        assert!(poll(second.as_mut()).is_ready());
    }

    #[test]
    fn who_gives_up_after_being_admitted_passes_the_place_on() {
        let gate = Gate::new(1, 8);
        let inside = gate.try_enter().unwrap();
        let mut second = pin!(gate.enter());
        {
            let mut first = pin!(gate.enter());
            assert!(poll(first.as_mut()).is_pending());
            assert!(poll(second.as_mut()).is_pending());
            drop(inside);
        }
        let Poll::Ready(Ok(place)) = poll(second.as_mut()) else { panic!("it is its turn") };
        drop(place);
        assert_eq!(gate.inside(), 0);
    }
}
