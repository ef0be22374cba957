//! What is asked of a night while it lasts; the judge asks the rest at its end.

use std::{cell::Cell, rc::Rc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    faults::Instances,
    world::{INSTANCES, NODES, World},
};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(25);
/// A held write is released so long after a primary's readiness, at the latest: a second, the
/// way there, and a look.
const RELEASED: Duration = Duration::from_millis(1300);

#[derive(Default)]
pub(super) struct Watched {
    /// Looks that found somebody waiting.
    pub(super) held: Cell<u64>,
}

/// Looks again and again.
pub(super) async fn watch(world: Rc<World>, instances: Rc<Instances>, watched: Rc<Watched>) {
    let mut waiting: [Option<Instant>; INSTANCES] = [None; INSTANCES];
    let mut told = [false; INSTANCES];
    let mut agreed = [Instant::now(); INSTANCES];
    loop {
        let now = Instant::now();
        for instance in 0..INSTANCES {
            let mut seen = world.seen.borrow_mut();
            for node in 0..NODES {
                let sees = world.can_see(instance, node) && !world.is_lied_to(instance);
                let since = &mut seen[instance][node];
                *since = if sees { Some(since.unwrap_or(now)) } else { None };
            }
            // Two claims whose order nobody saw get no writes.
            if world.is_contested() {
                agreed[instance] = now;
            }
            let ready = seen[instance].iter().flatten().next().copied();
            drop(seen);
            let litegate = instances[instance].borrow();
            let Some(litegate) = &*litegate else {
                // Another process will have to look first.
                world.seen.borrow_mut()[instance] = [None; NODES];
                waiting[instance] = None;
                continue;
            };
            let count = litegate.hold.waiting();
            if count == 0 {
                (waiting[instance], told[instance]) = (None, false);
                continue;
            }
            watched.held.set(watched.held.get() + 1);
            let since = *waiting[instance].get_or_insert(now);
            let late =
                ready.is_some_and(|ready| ready.max(since).max(agreed[instance]) + RELEASED <= now);
            if late && !std::mem::replace(&mut told[instance], true) {
                let believed = litegate.primary();
                world.breaks(format_args!(
                    "litegate {instance} still holds {count}, {RELEASED:?} after a primary is \
                     ready; it believes in {believed:?}"
                ));
            }
        }
        sleep(EVERY).await;
    }
}
