//! Requests wait here, mostly writes for a primary.
//!
//! Bounded three times per cluster: `hold.max_requests`, `hold.max_bytes` (the bodies kept
//! meanwhile; the rest stays with the client, by backpressure) and, for each request,
//! `hold.timeout`. Woken by a newer snapshot or by whoever goes before, so a failover that ends
//! after 80 ms costs 80 ms.
//!
//! Those who wait leave in the order in which they came, `hold.release` running at a time, so
//! that a new primary is not met by all of them at once; nobody who comes later overtakes them. A
//! client that goes away frees its place, and a request that has to wait again keeps it.
//!
//! A hand-over pauses it: everybody who comes joins the queue, and nobody leaves it but by its own
//! deadline. Each worker counts its writes under way in a cell of its own ([`Lane`]), so that a
//! pause can wait for their end: whoever counts itself and then finds no pause, the pause will see.
//! What they are stays with their worker, which is asked if somebody has to know.
//!
//! One hold serves all workers of a cluster: this is the slow path, and the order is the
//! process's, not a worker's. On the fast path it costs a look at one number.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use http::{Method, Uri};
use slab::Slab;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{
    config::cluster,
    decide::Problem,
    topology::{Topology, watch},
};

/// The waiting room of one cluster.
#[derive(Debug)]
pub struct Hold {
    queue: Mutex<Queue>,
    /// How many wait, for a look without the lock.
    waiting: AtomicUsize,
    paused: AtomicBool,
    /// One of each worker and configuration that still has requests.
    lanes: Mutex<Vec<Weak<Running>>>,
}

/// Writes under way, of one worker. On a cache line of its own: it is written for each.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Running(AtomicUsize);

/// A worker's way past the hold.
#[derive(Debug)]
pub struct Lane {
    hold: Arc<Hold>,
    running: Arc<Running>,
    /// What the counted are. As many as the nodes have places.
    writes: RefCell<Slab<Write>>,
}

/// A write, as it can be named.
#[derive(Clone, Debug)]
pub struct Write {
    /// Its method.
    pub method: Method,
    /// Its target, of which the path alone is for others.
    pub uri: Uri,
    /// The node that it runs on.
    pub node: Arc<str>,
    /// When it was sent there.
    pub since: Instant,
}

impl Lane {
    /// Begins a write. `None` while the hold is paused: it has to wait.
    pub fn enter(self: &Rc<Self>, write: impl FnOnce() -> Write) -> Option<OnItsWay> {
        // Counted first, in one order with the pause: either this sees it or it sees this.
        self.running.0.fetch_add(1, Ordering::SeqCst);
        let mut on_its_way = OnItsWay { lane: Rc::clone(self), key: None };
        if self.hold.paused.load(Ordering::SeqCst) {
            return None;
        }
        on_its_way.key = Some(self.writes.borrow_mut().insert(write()));
        Some(on_its_way)
    }

    /// What is under way.
    pub fn under_way(&self) -> Vec<Write> {
        self.writes.borrow().iter().map(|(_, write)| write.clone()).collect()
    }
}

/// A write under way, until dropped.
#[derive(Debug)]
pub struct OnItsWay {
    lane: Rc<Lane>,
    key: Option<usize>,
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.key.and_then(|key| self.lane.writes.borrow_mut().try_remove(key));
        self.lane.running.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Keeps everybody waiting, until dropped.
#[derive(Debug)]
pub struct Pause(Arc<Hold>);

impl Drop for Pause {
    fn drop(&mut self) {
        self.0.paused.store(false, Ordering::SeqCst);
        self.0.lock().wake_next();
    }
}

impl Hold {
    /// An empty one.
    pub fn new(rules: &cluster::Hold) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(Queue {
                max_requests: rules.max_requests,
                max_bytes: rules.max_bytes,
                release: rules.release.max(1),
                ..Queue::default()
            }),
            waiting: AtomicUsize::new(0),
            paused: AtomicBool::new(false),
            lanes: Mutex::default(),
        })
    }

    /// Whether anybody waits, or has to: whoever comes now waits behind them.
    pub fn is_busy(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0 || self.is_paused()
    }

    /// Whether nobody leaves.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// From now on nobody leaves. `None` where that is so already.
    pub fn pause(self: &Arc<Self>) -> Option<Pause> {
        let was = self.paused.swap(true, Ordering::SeqCst);
        (!was).then(|| Pause(Arc::clone(self)))
    }

    /// A worker's way past it.
    pub fn lane(self: &Arc<Self>) -> Rc<Lane> {
        let running = Arc::new(Running::default());
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(&running));
        Rc::new(Lane { hold: Arc::clone(self), running, writes: RefCell::default() })
    }

    /// Writes under way, of all workers.
    pub fn in_flight(&self) -> usize {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lanes = lanes.iter().filter_map(Weak::upgrade);
        lanes.map(|lane| lane.0.load(Ordering::SeqCst)).sum()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// What their bodies may take together.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// New rules, for those who come from now on.
    pub fn reconfigure(&self, rules: &cluster::Hold) {
        let mut queue = self.lock();
        queue.max_requests = rules.max_requests;
        queue.max_bytes = rules.max_bytes;
        queue.release = rules.release.max(1);
        queue.wake_next();
    }

    /// Takes a place in the queue for a request whose body may take `bytes` meanwhile.
    ///
    /// # Errors
    /// [`Problem::HoldFull`] over either limit.
    pub fn join(self: &Arc<Self>, bytes: usize) -> Result<Place, Problem> {
        let wake = Arc::new(Notify::new());
        let ticket = self.lock().join(bytes, Arc::clone(&wake)).ok_or(Problem::HoldFull)?;
        self.publish();
        Ok(Place { hold: Arc::clone(self), ticket, bytes, wake, stage: Stage::Waiting })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it holds the lock; if it did, the queue would still be whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self) {
        self.waiting.store(self.lock().waiting.len(), Ordering::Relaxed);
    }
}

/// One request's place, from joining to the end of its run.
#[derive(Debug)]
pub struct Place {
    hold: Arc<Hold>,
    ticket: u64,
    bytes: usize,
    wake: Arc<Notify>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Waiting,
    Running,
}

impl Place {
    /// Waits until `ready` finds in a snapshot what the request needs and it is this request's
    /// turn, at most until `deadline`. `not_before` holds it back until then, unless a newer
    /// snapshot comes. From then on the request counts as running until the place is dropped.
    ///
    /// # Errors
    /// Whatever `expired` says when the deadline passes; [`Problem::Draining`] when discovery ends.
    pub async fn wait(
        &mut self,
        topology: &mut watch::Reader,
        deadline: Instant,
        not_before: Option<Instant>,
        mut ready: impl FnMut(&Topology) -> bool,
        expired: impl Fn(&Topology) -> Problem,
    ) -> Result<(), Problem> {
        if self.stage == Stage::Running {
            // Back to its old place: the ticket decides, not the time.
            self.hold.lock().rejoin(self.ticket, self.bytes, Arc::clone(&self.wake));
            self.stage = Stage::Waiting;
            self.hold.publish();
        }
        let mut not_before = not_before;
        loop {
            let seen = topology.latest().generation;
            if not_before.is_none()
                && !self.hold.is_paused()
                && ready(topology.latest())
                && self.hold.lock().go(self.ticket)
            {
                self.stage = Stage::Running;
                self.hold.publish();
                return Ok(());
            }
            tokio::select! {
                biased;
                newer = topology.newer_than(seen) => {
                    if newer.is_err() {
                        return Err(Problem::Draining);
                    }
                    not_before = None;
                }
                () = self.wake.notified() => {}
                () = sleep_until(not_before.unwrap_or(deadline).min(deadline)) => {
                    if Instant::now() >= deadline {
                        return Err(expired(topology.latest()));
                    }
                    not_before = None;
                }
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queue = self.hold.lock();
        match self.stage {
            Stage::Waiting => queue.leave(self.ticket),
            Stage::Running => queue.done(),
        }
        drop(queue);
        self.hold.publish();
    }
}

/// Who waits, in order. Pure but for the bells that wake the next.
#[derive(Debug, Default)]
struct Queue {
    max_requests: usize,
    max_bytes: usize,
    release: usize,
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    bytes: usize,
    /// Released and not finished.
    running: usize,
}

#[derive(Debug)]
struct Waiting {
    bytes: usize,
    wake: Arc<Notify>,
}

impl Queue {
    fn join(&mut self, bytes: usize, wake: Arc<Notify>) -> Option<u64> {
        if self.waiting.len() >= self.max_requests || self.bytes + bytes > self.max_bytes {
            return None;
        }
        let ticket = self.next;
        self.next += 1;
        self.rejoin_waiting(ticket, bytes, wake);
        Some(ticket)
    }

    fn rejoin(&mut self, ticket: u64, bytes: usize, wake: Arc<Notify>) {
        self.running = self.running.saturating_sub(1);
        self.rejoin_waiting(ticket, bytes, wake);
    }

    fn rejoin_waiting(&mut self, ticket: u64, bytes: usize, wake: Arc<Notify>) {
        self.bytes += bytes;
        self.waiting.insert(ticket, Waiting { bytes, wake });
    }

    /// Lets this ticket run if it is the first and there is room; then it is the next one's turn.
    fn go(&mut self, ticket: u64) -> bool {
        let has_room = self.running < self.release;
        let is_next = has_room && self.waiting.keys().next() == Some(&ticket);
        if is_next {
            self.remove(ticket);
            self.running += 1;
            self.wake_next();
        }
        is_next
    }

    fn leave(&mut self, ticket: u64) {
        self.remove(ticket);
        self.wake_next();
    }

    fn done(&mut self) {
        self.running = self.running.saturating_sub(1);
        self.wake_next();
    }

    fn remove(&mut self, ticket: u64) {
        if let Some(waiting) = self.waiting.remove(&ticket) {
            self.bytes -= waiting.bytes;
        }
    }

    fn wake_next(&self) {
        if self.running < self.release
            && let Some(next) = self.waiting.values().next()
        {
            next.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::topology::NodeId;

    fn rules(max_requests: usize, release: usize) -> cluster::Hold {
        cluster::Hold { timeout: Duration::from_secs(30), max_requests, max_bytes: 1000, release }
    }

    fn with_primary(generation: u64) -> Topology {
        Topology { generation, primary: Some(NodeId(1)), ..Topology::default() }
    }

    fn has_primary(topology: &Topology) -> bool {
        topology.primary.is_some()
    }

    async fn wait(place: &mut Place, topology: &watch::Reader) -> Result<(), Problem> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let expired = |_: &Topology| Problem::NoPrimary;
        place.wait(&mut topology.clone(), deadline, None, has_primary, expired).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_ends_at_its_deadline() {
        let (_publisher, topology) = watch::channel(Topology::default());
        let began = Instant::now();
        let mut place = Hold::new(&rules(10, 1)).join(0).unwrap();
        assert_eq!(wait(&mut place, &topology).await, Err(Problem::NoPrimary));
        assert_eq!(began.elapsed(), Duration::from_secs(30));
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_leave_in_order_and_so_many_at_a_time() {
        let (publisher, topology) = watch::channel(Topology::default());
        let hold = Hold::new(&rules(10, 2));
        let (left, mut order) = tokio::sync::mpsc::channel(10);
        let (finish, finished) = tokio::sync::watch::channel(0);
        let tasks: Vec<_> = (0..5)
            .map(|n| {
                let (mut place, topology) = (hold.join(0).unwrap(), topology.clone());
                let (left, mut finished) = (left.clone(), finished.clone());
                tokio::spawn(async move {
                    wait(&mut place, &topology).await.unwrap();
                    left.send(n).await.unwrap();
                    finished.wait_for(|done| *done > n).await.unwrap();
                })
            })
            .collect();
        tokio::task::yield_now().await;
        publisher.publish(with_primary(1));
        assert_eq!((order.recv().await, order.recv().await), (Some(0), Some(1)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(order.try_recv().is_err(), "two run, the third waits");
        finish.send_replace(1);
        assert_eq!(order.recv().await, Some(2));
        finish.send_replace(5);
        assert_eq!((order.recv().await, order.recv().await), (Some(3), Some(4)));
        for task in tasks {
            task.await.unwrap();
        }
        assert!(!hold.is_busy());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_away_frees_its_place() {
        let hold = Hold::new(&rules(1, 1));
        let place = hold.join(10).unwrap();
        assert_eq!(hold.join(10).err(), Some(Problem::HoldFull));
        drop(place);
        assert!(hold.join(10).is_ok());
    }

    #[tokio::test]
    async fn bytes_are_bounded_too() {
        let hold = Hold::new(&rules(10, 1));
        let _first = hold.join(900).unwrap();
        assert_eq!(hold.join(101).err(), Some(Problem::HoldFull));
        assert!(hold.join(100).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_keeps_everybody_and_sees_who_is_under_way() {
        let (_publisher, topology) = watch::channel(with_primary(1));
        let hold = Hold::new(&rules(10, 2));
        let (lane, other) = (hold.lane(), hold.lane());
        let write = |path| Write {
            method: Method::POST,
            uri: Uri::from_static(path),
            node: "app-0".into(),
            since: Instant::now(),
        };
        let under_way = lane.enter(|| write("/a?secret")).unwrap();
        let _too = other.enter(|| write("/b")).unwrap();
        let pause = hold.pause().unwrap();
        assert!(hold.pause().is_none(), "one at a time");
        assert!(hold.is_busy() && lane.enter(|| write("/c")).is_none());
        assert_eq!(hold.in_flight(), 2);
        let named = |lane: &Lane| lane.under_way().iter().map(|w| w.uri.to_string()).collect();
        let both: [Vec<String>; 2] = [named(&lane), named(&other)];
        assert_eq!(both, [["/a?secret"], ["/b"]]);
        drop(under_way);
        assert_eq!((hold.in_flight(), lane.under_way().len()), (1, 0));
        let (mut first, mut second) = (hold.join(0).unwrap(), hold.join(0).unwrap());
        let mut both = std::pin::pin!(async {
            tokio::try_join!(wait(&mut first, &topology), wait(&mut second, &topology))
        });
        let second = Duration::from_secs(1);
        assert!(tokio::time::timeout(second, both.as_mut()).await.is_err());
        drop(pause);
        both.await.unwrap();
        assert!(lane.enter(|| write("/d")).is_some() && !hold.is_busy());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_to_wait_again_keeps_its_place() {
        let (_publisher, topology) = watch::channel(with_primary(1));
        let hold = Hold::new(&rules(10, 1));
        let (mut first, mut second) = (hold.join(0).unwrap(), hold.join(0).unwrap());
        wait(&mut first, &topology).await.unwrap();
        // The attempt failed. Its pause passes, and it goes before the second.
        let deadline = Instant::now() + Duration::from_secs(30);
        let pause = Some(Instant::now() + Duration::from_millis(50));
        let expired = |_: &Topology| Problem::NoPrimary;
        let mut reader = topology.clone();
        let mut other = std::pin::pin!(wait(&mut second, &topology));
        {
            let again = first.wait(&mut reader, deadline, pause, has_primary, expired);
            let mut again = std::pin::pin!(again);
            assert!(futures_util::poll!(again.as_mut()).is_pending());
            assert!(futures_util::poll!(other.as_mut()).is_pending(), "it must not overtake");
            again.await.unwrap();
        }
        assert!(futures_util::poll!(other.as_mut()).is_pending());
        drop(first);
        other.await.unwrap();
    }
}
