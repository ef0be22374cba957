//! "Take nothing new": one says it, every connection of a worker hears it.

use std::{cell::Cell, rc::Rc};

use tokio::sync::Notify;

/// Makes a drain signal for one worker.
pub fn signal() -> (Trigger, Watch) {
    let shared = Rc::new(Shared { started: Cell::new(false), changed: Notify::new() });
    (Trigger(Rc::clone(&shared)), Watch(shared))
}

#[derive(Debug)]
struct Shared {
    started: Cell<bool>,
    changed: Notify,
}

/// Starts the drain.
#[derive(Debug)]
pub struct Trigger(Rc<Shared>);

impl Trigger {
    /// From now on every connection finishes what it has and closes.
    pub fn start(&self) {
        self.0.started.set(true);
        self.0.changed.notify_waiters();
    }
}

/// Hears of the drain. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Watch(Rc<Shared>);

impl Watch {
    /// Whether it has started.
    pub fn is_draining(&self) -> bool {
        self.0.started.get()
    }

    /// Waits until it starts.
    pub async fn started(&self) {
        let changed = self.0.changed.notified();
        if !self.is_draining() {
            changed.await;
        }
    }
}
