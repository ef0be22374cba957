//! A write's slot among `max_writes`: for when it runs, not for how long its client takes.
//!
//! A node begins a write when it has all of it, and has done it when it answers. So a write whose body
//! is here takes its slot before anything is sent; one whose body is still coming is sent without,
//! and only the last of it takes one. Where none is free, the rest of a body that is on its way is
//! waited for first, so that few have to wait half sent. And the slot ends with the head of the
//! answer. A client that sends or reads slowly, or a stream that is open for hours, keeps no
//! slot from anybody.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

use crate::upstream::{Full, Gate, Place};

/// A write's place among `max_writes`.
#[derive(Default)]
pub enum Slot {
    /// It needs none: a read, or answered already.
    #[default]
    Free,
    /// It has one.
    Taken(#[expect(dead_code, reason = "held, not read")] Place),
    /// It takes one with the last of its body, for which it waits at most so long.
    Later(Rc<Gate>, Duration),
    /// The last of its body is here and waits for one, until then.
    Waiting(Turn, Instant),
}

type Turn = Pin<Box<dyn Future<Output = Result<Place, Full>>>>;

impl Slot {
    /// Ready when the last of the body may go.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Later(gate, wait) = self {
            if let Some(place) = gate.try_enter() {
                *self = Self::Taken(place);
                return Poll::Ready(());
            }
            let gate = Rc::clone(gate);
            *self =
                Self::Waiting(Box::pin(async move { gate.enter().await }), Instant::now() + *wait);
        }
        if let Self::Waiting(turn, _) = self {
            match turn.as_mut().poll(cx) {
                Poll::Ready(Ok(place)) => *self = Self::Taken(place),
                Poll::Ready(Err(Full)) => {
                    // Any number may wait at this gate; if it were otherwise, until they give up.
                    *turn = Box::pin(std::future::pending());
                    return Poll::Pending;
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }

    /// Until when the last of the body waits, if it does.
    pub fn waits_until(&self) -> Option<Instant> {
        match self {
            Self::Waiting(_, until) => Some(*until),
            Self::Free | Self::Taken(_) | Self::Later(..) => None,
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "Free",
            Self::Taken(_) => "Taken",
            Self::Later(..) => "Later",
            Self::Waiting(..) => "Waiting",
        })
    }
}
