//! A pause of one cluster's writes that somebody outside asks for: one of several instances that
//! all hold before a hand-over.
//!
//! Whoever asked gives it a name and a time, and renews it. It ends when it is released, when its
//! time is up, and when another node is primary than was at its beginning: so whoever asked may
//! die at any point, and the writes go on by themselves, to whoever is primary then. However often
//! it is renewed, it ends before the writes that it keeps waiting would fail.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    handoff::{LOOK, at_most},
    worker::Command,
};
use crate::{
    admin::{Answer, Lasts},
    config::cluster::Cluster,
    proxy::{self, Hold, Write},
    topology::{self, NodeId, Topology},
};

/// The longest that one can be asked for at once.
const LONGEST: Duration = Duration::from_secs(30);
/// How long the workers may take to say what runs.
const TELL: Duration = Duration::from_secs(1);
/// Writes under way that are named; the others are counted.
const NAMED: usize = 5;
/// Of a path.
const PATH: usize = 80;

/// What was agreed on. Pure.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Agreed {
    /// The name that whoever asked gave it.
    by: Box<str>,
    /// Who was primary.
    from: NodeId,
    since: Instant,
    until: Instant,
    /// However often it is renewed.
    last: Instant,
}

/// Why a pause ended by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Over {
    /// Nobody renewed it.
    Expired,
    /// Another node is primary.
    Followed,
}

impl Agreed {
    fn new(by: &str, from: NodeId, lasts: Lasts, altogether: Duration, now: Instant) -> Self {
        let last = now + altogether;
        let mut this = Self { by: by.into(), from, since: now, until: now, last };
        this.renew(lasts, now);
        this
    }

    fn renew(&mut self, lasts: Lasts, now: Instant) {
        let until = match lasts {
            Lasts::For(length) => now + length.min(LONGEST),
            Lasts::Until(length) => (self.since + length).min(now + LONGEST),
        };
        self.until = until.min(self.last);
    }

    fn over(&self, topology: &Topology, now: Instant) -> Option<Over> {
        if topology.primary.is_some_and(|primary| primary != self.from) {
            Some(Over::Followed)
        } else {
            (self.until <= now).then_some(Over::Expired)
        }
    }
}

/// One in force.
#[derive(Debug)]
struct Current {
    agreed: Agreed,
    /// Ends with it.
    _pause: proxy::Pause,
}

/// The pause of one cluster, if there is one. Outlives a change of configuration.
#[derive(Clone, Debug)]
pub(super) struct Agreement(Arc<watch::Sender<Option<Current>>>);

impl Default for Agreement {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Agreement {
    /// Gives the pause of that name more time. Says until when it has, if there is one.
    pub(super) fn renew(&self, by: &str, lasts: Lasts) -> Option<Agreed> {
        let mut renewed = None;
        self.0.send_if_modified(|current| {
            let current = current.as_mut().filter(|current| *current.agreed.by == *by);
            if let Some(Current { agreed, .. }) = current {
                agreed.renew(lasts, Instant::now());
                renewed = Some(agreed.clone());
            }
            renewed.is_some()
        });
        renewed
    }

    /// Ends the pause of that name, if there is one.
    pub(super) fn release(&self, by: &str) -> bool {
        self.0.send_if_modified(|current| {
            current.take_if(|current| *current.agreed.by == *by).is_some()
        })
    }

    /// How much longer the pause of that name lasts as things are. `None`: it is over.
    pub(super) fn lasts(&self, by: &str) -> Option<Duration> {
        let current = self.0.borrow();
        let agreed = &current.as_ref()?.agreed;
        (*agreed.by == *by).then(|| agreed.until.saturating_duration_since(Instant::now()))
    }

    /// Waits until the pause of that name is over.
    pub(super) async fn ended(&self, by: &str) {
        let mut changes = self.0.subscribe();
        let is_over = |current: &Option<Current>| {
            current.as_ref().is_none_or(|current| *current.agreed.by != *by)
        };
        // The sender is our own.
        let _ = changes.wait_for(is_over).await;
    }

    fn begin(&self, agreed: &Agreed, pause: proxy::Pause) {
        self.0.send_replace(Some(Current { agreed: agreed.clone(), _pause: pause }));
    }

    /// Sees to it that the pause of that name ends in time.
    async fn watch(self, by: Box<str>, mut topology: topology::watch::Reader, cluster: Arc<str>) {
        let mut changes = self.0.subscribe();
        loop {
            let agreed = changes.borrow_and_update().as_ref().map(|c| c.agreed.clone());
            let Some(agreed) = agreed.filter(|agreed| agreed.by == by) else { return };
            let seen = topology.latest().generation;
            if let Some(over) = agreed.over(topology.latest(), Instant::now()) {
                self.release(&by);
                match over {
                    Over::Followed => {
                        tracing::info!(%cluster, "another node is primary: writes go on");
                    }
                    Over::Expired => {
                        tracing::warn!(%cluster, "whoever wanted writes held is silent: they go on");
                    }
                }
                return;
            }
            let newer = async {
                if topology.newer_than(seen).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                _ = changes.changed() => {}
                () = newer => {}
                () = sleep_until(agreed.until) => {}
            }
        }
    }
}

/// What is asked for.
pub(super) struct Ask {
    pub(super) cluster: Cluster,
    pub(super) topology: topology::watch::Reader,
    pub(super) hold: Arc<Hold>,
    pub(super) agreement: Agreement,
    pub(super) workers: Workers,
    /// This process's name among proxies.
    pub(super) instance: Arc<str>,
    pub(super) by: String,
}

impl Ask {
    /// Holds, or goes on holding. Answers when no write is under way any
    /// more, or after `wait`.
    pub(super) async fn hold(mut self, lasts: Lasts, wait: Duration, renew: bool) -> Answer {
        let topology = Arc::clone(self.topology.latest());
        let agreed = match (self.agreement.renew(&self.by, lasts), renew) {
            (Some(agreed), _) => Ok(agreed),
            (None, true) => {
                Err(self.answer("not-held", "that hold is over, or was never begun here"))
            }
            (None, false) => self.begin(&topology, lasts),
        };
        let agreed = match agreed {
            Ok(agreed) => agreed,
            Err(refused) => return refused,
        };
        let finish = async {
            while self.hold.in_flight() > 0 {
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            _ = timeout(wait, finish) => {}
            () = self.agreement.ended(&self.by) => {}
        }
        let Some(left) = self.agreement.lasts(&self.by) else {
            return self.answer("not-held", "it ended just now");
        };
        let since = agreed.since.elapsed();
        let in_flight = self.hold.in_flight();
        let running = if in_flight > 0 && !wait.is_zero() {
            self.workers.under_way(&self.cluster.name).await
        } else {
            Vec::new()
        };
        let primary = topology.node(agreed.from).map(|node| node.name.to_string());
        let body = json!({
            "cluster": &*self.cluster.name,
            "instance": &*self.instance,
            "outcome": "held",
            "primary": primary,
            "in_flight": in_flight,
            "running": named(running, Instant::now()),
            "held": self.hold.waiting(),
            "since_seconds": since.as_secs_f64(),
            "ends_in_seconds": left.as_secs_f64(),
            "at_most_seconds": at_most(&self.cluster).as_secs_f64(),
        });
        Answer { status: StatusCode::OK, body }
    }

    fn begin(&self, topology: &Topology, lasts: Lasts) -> Result<Agreed, Answer> {
        let altogether = at_most(&self.cluster);
        if altogether.is_zero() {
            return Err(self.answer("refused", "hold.timeout is 0: no write could wait"));
        }
        let Some(primary) = topology.primary() else {
            return Err(self.answer("refused", "nobody is primary"));
        };
        let Some(pause) = self.hold.pause() else {
            return Err(self.answer("refused", "a hand-over is under way already"));
        };
        let agreed = Agreed::new(&self.by, primary.id, lasts, altogether, Instant::now());
        self.agreement.begin(&agreed, pause);
        let (by, name) = (agreed.by.clone(), Arc::clone(&self.cluster.name));
        tracing::info!(cluster = %name, %by, "writes are held for a hand-over");
        // It ends with the pause, which ends in time.
        tokio::spawn(self.agreement.clone().watch(by, self.topology.clone(), name));
        Ok(agreed)
    }

    /// Lets writes go on: at once, or as soon as `primary` is primary here too, or the time is up.
    pub(super) async fn release(mut self, primary: Option<&str>) -> Answer {
        if let Some(primary) = primary {
            let mut topology = self.topology.clone();
            let seen = async {
                loop {
                    let believed = Arc::clone(topology.latest());
                    if believed.primary().is_some_and(|node| *node.name == *primary) {
                        return;
                    }
                    if topology.newer_than(believed.generation).await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            };
            tokio::select! {
                () = seen => {}
                () = self.agreement.ended(&self.by) => {}
            }
        }
        let outcome = if self.agreement.release(&self.by) { "released" } else { "nothing-to-do" };
        let primary = self.topology.latest().primary().map(|node| node.name.to_string());
        let body = json!({
            "cluster": &*self.cluster.name,
            "instance": &*self.instance,
            "outcome": outcome,
            "primary": primary,
        });
        Answer { status: StatusCode::OK, body }
    }

    fn answer(&self, outcome: &str, why: &str) -> Answer {
        let primary = self.topology.clone().latest().primary().map(|node| node.name.to_string());
        let body = json!({
            "cluster": &*self.cluster.name,
            "instance": &*self.instance,
            "outcome": outcome,
            "why": why,
            "primary": primary,
        });
        Answer { status: StatusCode::CONFLICT, body }
    }
}

/// The data plane, for questions.
#[derive(Clone, Debug)]
pub(super) struct Workers(pub(super) Vec<mpsc::Sender<Command>>);

impl Workers {
    /// Which writes of that cluster are under way: what the workers say in time.
    pub(super) async fn under_way(&self, cluster: &Arc<str>) -> Vec<Write> {
        let (to, mut told) = mpsc::channel(self.0.len().max(1));
        let mut all = Vec::new();
        let ask = async {
            for worker in &self.0 {
                let _ = worker.send(Command::Tell(Arc::clone(cluster), to.clone())).await;
            }
            drop(to);
            while let Some(some) = told.recv().await {
                all.extend(some);
            }
        };
        let _ = timeout(TELL, ask).await;
        all
    }
}

/// Those that have run for longest, as an operator can find them. Without the query, which may
/// hold what is nobody's business.
pub(super) fn named(mut writes: Vec<Write>, now: Instant) -> Vec<Value> {
    writes.sort_by_key(|write| write.since);
    let each = writes.iter().take(NAMED).map(|write| {
        let path: String = write.uri.path().chars().take(PATH).collect();
        json!({
            "method": write.method.as_str(),
            "path": path,
            "node": &*write.node,
            "seconds": now.saturating_duration_since(write.since).as_secs_f64(),
        })
    });
    each.collect()
}

/// The same in words.
pub(super) fn in_words(in_flight: u64, running: &[Value]) -> String {
    let text = |value: &Value, key| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let each = running.iter().map(|write| {
        let part = |key| text(write, key).unwrap_or_default();
        let seconds = write.get("seconds").and_then(Value::as_f64).unwrap_or_default();
        format!("{} {} on {} for {seconds:.1} s", part("method"), part("path"), part("node"))
    });
    let each = each.collect::<Vec<_>>().join(", ");
    let (verb, writes) = if in_flight == 1 { ("is", "write") } else { ("are", "writes") };
    let colon = if each.is_empty() { "" } else { ": " };
    format!("{in_flight} {writes} {verb} still under way{colon}{each}")
}

#[cfg(test)]
mod tests {
    use http::{Method, Uri};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn primary(n: Option<u64>) -> Topology {
        Topology { primary: n.map(NodeId), ..Topology::default() }
    }

    #[tokio::test]
    async fn it_ends_by_itself_and_before_a_held_write_would_fail() {
        let now = Instant::now();
        let us = primary(Some(1));
        let mut agreed = Agreed::new("a", NodeId(1), Lasts::For(5 * SECOND), 22 * SECOND, now);
        assert_eq!(agreed.over(&us, now + 4 * SECOND), None);
        assert_eq!(agreed.over(&us, now + 5 * SECOND), Some(Over::Expired));
        for second in 0..60 {
            agreed.renew(Lasts::For(5 * SECOND), now + second * SECOND);
        }
        assert_eq!(agreed.over(&us, now + 21 * SECOND), None);
        assert_eq!(agreed.over(&us, now + 22 * SECOND), Some(Over::Expired));
        let ever = 9000 * SECOND;
        for lasts in [Lasts::For(ever), Lasts::Until(ever)] {
            let greedy = Agreed::new("a", NodeId(1), lasts, ever, now);
            assert_eq!(greedy.over(&us, now + LONGEST), Some(Over::Expired));
        }
    }

    #[tokio::test]
    async fn a_time_from_its_beginning_is_the_same_however_late_it_is_heard() {
        let now = Instant::now();
        let us = primary(Some(1));
        for heard in [0, 1, 3, 100] {
            let mut agreed = Agreed::new("a", NodeId(1), Lasts::For(SECOND), 22 * SECOND, now);
            agreed.renew(Lasts::Until(4 * SECOND), now + heard * SECOND);
            assert_eq!(agreed.over(&us, now + 3 * SECOND), None);
            assert_eq!(agreed.over(&us, now + 4 * SECOND), Some(Over::Expired));
        }
    }

    #[tokio::test]
    async fn another_primary_ends_it_and_nobody_does_not() {
        let now = Instant::now();
        let agreed = Agreed::new("a", NodeId(1), Lasts::For(5 * SECOND), 22 * SECOND, now);
        assert_eq!(agreed.over(&primary(None), now), None);
        assert_eq!(agreed.over(&primary(Some(1)), now), None);
        assert_eq!(agreed.over(&primary(Some(2)), now), Some(Over::Followed));
    }

    #[tokio::test]
    async fn what_runs_is_named_longest_first_and_without_its_query() {
        let now = Instant::now();
        let write = |path, ago: u32| Write {
            method: Method::POST,
            uri: Uri::from_static(path),
            node: "app-0".into(),
            since: now.checked_sub(ago * SECOND).unwrap(),
        };
        let running = named(vec![write("/b", 3), write("/upload?key=secret", 12)], now);
        assert_eq!(
            in_words(2, &running),
            "2 writes are still under way: POST /upload on app-0 for 12.0 s, POST /b on app-0 for 3.0 s"
        );
        assert_eq!(named(vec![write("/b", 3); 99], now).len(), NAMED);
        assert_eq!(in_words(1, &[]), "1 write is still under way");
    }
}
