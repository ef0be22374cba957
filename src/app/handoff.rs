//! The planned hand-over: another node becomes primary, and no write notices.
//!
//! Writes are held, those under way finish, the target gets all that the primary has, LiteFS moves
//! the lease (`POST /promote` on the target, which answers when the primary has accepted: the
//! claim itself is waited for), and the held writes go on. Every step has a deadline, all together
//! less than a held write waits. However it ends, the writes go on: to whoever is primary then.
//!
//! Where several instances write, all of them have to hold before: see [`super::together`]. Then
//! this one's pause is one that was agreed on ([`super::pause`]), and so is its end: the lease is
//! not moved unless the pause lasts until it has.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use super::pause::{Agreement, Workers, in_words, named};
use crate::{
    admin::{self, Answer},
    config::cluster::Cluster,
    discovery,
    proxy::{Hold, Pause},
    topology::{Freshness, Node, Presence, Role, Topology, position::Positions, watch},
};

/// How long writes under way may take to finish, unless somebody says otherwise.
pub(super) const FINISH: Duration = Duration::from_secs(10);
/// How long the target may take to get what it lacks.
const CATCH_UP: Duration = Duration::from_secs(5);
/// How long LiteFS may take to accept: it gives itself 5 s.
const PROMOTE: Duration = Duration::from_secs(6);
/// How long the target's claim may take: LiteFS gives itself 10 s.
const CLAIM: Duration = Duration::from_secs(10);
/// All of it together but the wait for writes to finish, unless held writes wait for less.
const REST: Duration = Duration::from_secs(10);
/// What of it has to be left when those have finished.
const LEAST: Duration = Duration::from_secs(2);
/// Between two looks at what tells nobody when it changes.
pub(super) const LOOK: Duration = Duration::from_millis(5);

/// How long all of a cluster's writes may be held: less than a held write waits.
pub(super) fn at_most(cluster: &Cluster) -> Duration {
    cluster.hold.timeout.mul_f64(0.75)
}

/// How long writes under way get to finish: as long as was asked for, or as is usual and fits.
///
/// # Errors
/// What was asked for does not fit.
pub(super) fn finish_within(
    asked: Option<Duration>,
    at_most: Duration,
) -> Result<Duration, String> {
    let most = at_most.saturating_sub(LEAST);
    match asked {
        None => Ok(FINISH),
        Some(asked) if asked <= most => Ok(asked),
        Some(asked) => Err(format!(
            "writes under way can't be given {asked:?} to finish: all writes are held meanwhile, for \
             three quarters of hold.timeout at most. Give them {most:?} or less, or raise hold.timeout"
        )),
    }
}

/// What is asked for, and of whom.
pub(super) struct HandOver {
    pub(super) cluster: Cluster,
    pub(super) topology: watch::Reader,
    pub(super) hold: Arc<Hold>,
    pub(super) agreement: Agreement,
    pub(super) workers: Workers,
    pub(super) wish: admin::HandOver,
}

/// Who hands over to whom.
#[derive(Clone, Debug)]
struct Plan {
    from: Node,
    to: Node,
}

/// Why there is nothing to hand over.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Not {
    /// It is so already.
    Needed(String),
    /// There is no node of that name.
    Found(String),
    /// It can't be done now.
    Possible(String),
}

/// Picks the target.
fn plan(
    topology: &Topology,
    from: Option<&str>,
    to: Option<&str>,
    now: std::time::Instant,
) -> Result<Plan, Not> {
    let named = |name: &str| {
        let node = topology.named(name);
        node.ok_or_else(|| Not::Found(format!("no member is called `{name}`")))
    };
    let to = to.map(named).transpose()?;
    let from = from.map(named).transpose()?;
    let Some(primary) = topology.primary() else {
        return Err(Not::Possible("nobody is primary".into()));
    };
    if let Some(from) = from.filter(|from| from.id != primary.id) {
        return Err(Not::Needed(format!("{} is not primary, {} is", from.name, primary.name)));
    }
    if let Some(to) = to.filter(|to| to.id == primary.id) {
        return Err(Not::Needed(format!("{} is primary already", to.name)));
    }
    let has = primary.progress.get();
    let can = |node: &&Node| {
        node.role == Role::Replica
            && node.presence == Presence::Member
            && !node.fenced
            && node.is_healthy(now)
            && node.freshness != Freshness::TooFar
    };
    let chosen = match to {
        Some(to) => Some(to).filter(can),
        None => topology.nodes.iter().filter(can).min_by_key(|node| {
            let behind = node.progress.get().behind(&has, now);
            (behind.transactions, node.lag.unwrap_or_default())
        }),
    };
    match (chosen, to) {
        (Some(chosen), _) => Ok(Plan { from: primary.clone(), to: chosen.clone() }),
        (None, Some(to)) => Err(Not::Possible(format!("{} is no healthy replica", to.name))),
        (None, None) => Err(Not::Possible("there is no healthy replica".into())),
    }
}

/// Whether `has` is where `wanted` is, or further, in every database.
fn has_caught_up(has: &Positions, wanted: &Positions) -> bool {
    wanted.iter().all(|(database, _, wanted)| {
        has.get(database).is_some_and(|has| has == wanted || has.txid > wanted.txid)
    })
}

/// Steps, with how long each took.
#[derive(Debug)]
struct Steps {
    done: Vec<(&'static str, Duration)>,
    began: Instant,
    /// Of all of them.
    deadline: Instant,
    /// The most writes that were seen to wait.
    held: usize,
}

/// What keeps the writes waiting.
enum Paused {
    /// This hand-over, which is the only one to hold.
    Here(Pause),
    /// What was agreed on under that name, with whoever else holds.
    Agreed(String),
}

impl Steps {
    /// Runs one: at most so long, and not beyond the deadline of all. `why` tells what it waits for.
    async fn take(
        &mut self,
        step: &'static str,
        most: Duration,
        doing: impl Future<Output = Result<(), String>>,
        why: impl FnOnce() -> String,
    ) -> Result<(), (&'static str, String)> {
        let until = (Instant::now() + most).min(self.deadline);
        let result = timeout_at(until, doing).await;
        let ended = Instant::now();
        self.done.push((step, ended - self.began));
        self.began = ended;
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err((step, why)),
            Err(_elapsed) => Err((step, why())),
        }
    }
}

impl HandOver {
    /// Does it. Says what happened.
    pub(super) async fn run(mut self) -> Answer {
        let name = Arc::clone(&self.cluster.name);
        let topology = Arc::clone(self.topology.latest());
        let now = Instant::now();
        let (from, to) = (self.wish.from.as_deref(), self.wish.to.as_deref());
        let plan = match plan(&topology, from, to, now.into_std()) {
            Ok(plan) => plan,
            Err(not) => return refused(&name, not),
        };
        if discovery::api(&self.cluster, plan.to.address).is_none() {
            return refused(&name, Not::Possible("the cluster has no LiteFS API".into()));
        }
        let most = at_most(&self.cluster);
        if most.is_zero() {
            return refused(&name, Not::Possible("hold.timeout is 0: no write could wait".into()));
        }
        let finish = match finish_within(self.wish.finish, most) {
            Ok(finish) => finish,
            Err(why) => return refused(&name, Not::Possible(why)),
        };
        if self.wish.check {
            let (from, to) = (&*plan.from.name, &*plan.to.name);
            let body = json!({ "cluster": &*name, "outcome": "possible", "from": from, "to": to });
            return Answer { status: StatusCode::OK, body };
        }
        let paused = match self.pause() {
            Ok(paused) => paused,
            Err(not) => return refused(&name, not),
        };
        let deadline = now + (finish + REST).min(most);
        let mut steps = Steps { done: Vec::new(), began: now, deadline, held: 0 };
        let result = self.steps(&plan, finish, &paused, &mut steps).await;
        steps.held = steps.held.max(self.hold.waiting());
        let unsure = matches!(result, Err(("promote", ref why)) if why == NO_ANSWER);
        match paused {
            Paused::Here(pause) => drop(pause),
            // LiteFS may yet move the lease: it ends by itself, as that of the others.
            Paused::Agreed(_) if unsure => {}
            Paused::Agreed(by) => drop(self.agreement.release(&by)),
        }
        self.report(&plan, &steps, result, now.elapsed())
    }

    /// Keeps the writes waiting, or makes sure that they are.
    fn pause(&self) -> Result<Paused, Not> {
        match &self.wish.under {
            None => {
                let pause = self.hold.pause().map(Paused::Here);
                pause.ok_or_else(|| Not::Possible("a hand-over is under way already".into()))
            }
            Some((by, lasts)) => match self.agreement.renew(by, *lasts) {
                Some(_) => Ok(Paused::Agreed(by.clone())),
                None => Err(Not::Possible("writes are not held under that name".into())),
            },
        }
    }

    fn report(
        &mut self,
        plan: &Plan,
        steps: &Steps,
        result: Result<(), (&'static str, String)>,
        took: Duration,
    ) -> Answer {
        let (name, held) = (&self.cluster.name, steps.held);
        let (from, to) = (&plan.from.name, &plan.to.name);
        match &result {
            Ok(()) => {
                tracing::info!(cluster = %name, %from, %to, held, ?took, "handed over");
            }
            Err((step, why)) => {
                tracing::error!(cluster = %name, %from, %to, held, step, why, "hand-over failed: writes go on");
            }
        }
        let taken = steps
            .done
            .iter()
            .map(|(step, took)| json!({ "step": step, "seconds": took.as_secs_f64() }));
        let mut body = json!({
            "cluster": &**name,
            "from": &**from,
            "to": &**to,
            "steps": taken.collect::<Vec<_>>(),
            "seconds": took.as_secs_f64(),
            "held": held,
        });
        match result {
            Ok(()) => {
                body["outcome"] = "done".into();
                Answer { status: StatusCode::OK, body }
            }
            Err((step, why)) => {
                body["outcome"] = "failed".into();
                body["failed"] = step.into();
                body["why"] = why.into();
                let primary = self.topology.latest().primary().map(|node| node.name.to_string());
                body["primary"] = primary.map_or(Value::Null, Value::from);
                Answer { status: StatusCode::BAD_GATEWAY, body }
            }
        }
    }

    async fn steps(
        &mut self,
        plan: &Plan,
        finish: Duration,
        paused: &Paused,
        steps: &mut Steps,
    ) -> Result<(), (&'static str, String)> {
        let Plan { from, to } = plan;
        let hold = Arc::clone(&self.hold);
        let agreement = self.agreement.clone();
        // Whatever comes before the lease moves, ends with the pause.
        let ended = || {
            let agreement = agreement.clone();
            async move {
                match paused {
                    Paused::Here(_) => std::future::pending().await,
                    Paused::Agreed(by) => agreement.ended(by).await,
                }
            }
        };
        let finished = async {
            let finished = async {
                while hold.in_flight() > 0 {
                    sleep(LOOK).await;
                }
            };
            tokio::select! {
                () = finished => Ok(()),
                () = ended() => Err(NOT_HELD.to_owned()),
            }
        };
        let in_time = steps
            .take("finish writes", finish, finished, || in_words(hold.in_flight() as u64, &[]));
        if let Err((step, why)) = in_time.await {
            let running = self.workers.under_way(&self.cluster.name).await;
            if running.is_empty() {
                return Err((step, why));
            }
            let running = named(running, Instant::now());
            return Err((step, in_words(hold.in_flight() as u64, &running)));
        }
        let caught_up = async {
            tokio::select! {
                () = catch_up(plan) => Ok(()),
                () = ended() => Err(NOT_HELD.to_owned()),
            }
        };
        let lacks = || format!("{} does not have what {} has", to.name, from.name);
        steps.take("catch up", CATCH_UP, caught_up, lacks).await?;
        steps.held = hold.waiting();
        let within = match paused {
            Paused::Here(_) => PROMOTE,
            // The others hold a little longer than this one, and no longer.
            Paused::Agreed(by) => {
                agreement.lasts(by).ok_or(("promote", NOT_HELD.to_owned()))?.min(PROMOTE)
            }
        };
        // Its own limit is the longer one: running out of time is told from a refusal.
        let promote = discovery::promote(&self.cluster, to.address, PROMOTE * 2);
        steps.take("promote", within, promote, || NO_ANSWER.into()).await?;
        let mut topology = self.topology.clone();
        let claim = async {
            loop {
                let believed = Arc::clone(topology.latest());
                match believed.primary() {
                    Some(primary) if primary.id == to.id => return Ok(()),
                    Some(primary) if primary.id != from.id => {
                        return Err(format!("{} became primary instead", primary.name));
                    }
                    _ => {}
                }
                let newer = topology.newer_than(believed.generation).await;
                newer.map_err(|_gone| "the configuration changed".to_owned())?;
            }
        };
        steps.take("claim", CLAIM, claim, || format!("{} did not become primary", to.name)).await
    }
}

/// LiteFS was asked, and may or may not do it.
pub(super) const NO_ANSWER: &str = "LiteFS does not answer";
/// A pause that was agreed on is over before its hand-over.
const NOT_HELD: &str = "writes are no longer held: whoever coordinates was silent, or gave up";

/// Waits until the target has what the primary has. Nothing of ours is under way any more.
async fn catch_up(plan: &Plan) {
    let wanted = loop {
        match plan.from.progress.exact().await {
            Some(wanted) => break wanted,
            None => sleep(LOOK).await,
        }
    };
    loop {
        let has = plan.to.progress.exact().await;
        if has.is_some_and(|has| has_caught_up(&has, &wanted)) {
            return;
        }
        sleep(LOOK).await;
    }
}

fn refused(cluster: &str, not: Not) -> Answer {
    let (status, outcome, why) = match not {
        Not::Needed(why) => (StatusCode::OK, "nothing-to-do", why),
        Not::Found(why) => (StatusCode::NOT_FOUND, "refused", why),
        Not::Possible(why) => (StatusCode::CONFLICT, "refused", why),
    };
    Answer { status, body: json!({ "cluster": cluster, "outcome": outcome, "why": why }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{NodeId, position::Position, progress::Progress};

    fn node(id: u64, role: Role, txid: u64) -> Node {
        let progress = Progress::new(Arc::default());
        let mut positions = Positions::of(Some(id));
        let position = Position { txid, checksum: 1 << 63 | txid };
        positions.set("app.db", position, std::time::Instant::now());
        progress.set(positions);
        Node {
            role,
            progress,
            ..Node::new(NodeId(id), format!("n{id}").into(), ([127, 0, 0, 1], 1).into())
        }
    }

    fn cluster() -> Topology {
        let nodes = vec![
            node(0, Role::Primary, 9),
            node(1, Role::Replica, 5),
            node(2, Role::Replica, 8),
            node(3, Role::Replica, 7),
        ];
        Topology { primary: Some(NodeId(0)), nodes, ..Topology::default() }
    }

    fn planned(topology: &Topology, from: Option<&str>, to: Option<&str>) -> Result<String, Not> {
        plan(topology, from, to, std::time::Instant::now()).map(|plan| plan.to.name.to_string())
    }

    #[test]
    fn the_replica_that_has_most_takes_over_unless_one_is_named() {
        let mut all = cluster();
        assert_eq!(planned(&all, None, None), Ok("n2".into()));
        assert_eq!(planned(&all, Some("n0"), Some("n1")), Ok("n1".into()));
        all.nodes[2].freshness = Freshness::TooFar;
        assert_eq!(planned(&all, None, None), Ok("n3".into()));
        all.nodes[3].probed_healthy = false;
        assert_eq!(planned(&all, None, None), Ok("n1".into()));
        all.nodes[1].presence = Presence::Draining;
        assert!(matches!(planned(&all, None, None), Err(Not::Possible(_))));
        assert!(matches!(planned(&all, None, Some("n3")), Err(Not::Possible(_))));
    }

    #[test]
    fn what_is_so_already_is_no_failure() {
        let mut all = cluster();
        assert!(matches!(planned(&all, None, Some("n0")), Err(Not::Needed(_))));
        assert!(matches!(planned(&all, Some("n1"), None), Err(Not::Needed(_))));
        assert!(matches!(planned(&all, Some("n9"), None), Err(Not::Found(_))));
        assert!(matches!(planned(&all, None, Some("n9")), Err(Not::Found(_))));
        all.primary = None;
        assert!(matches!(planned(&all, None, None), Err(Not::Possible(_))));
    }

    #[test]
    fn what_writes_get_to_finish_fits_into_what_others_are_held() {
        let second = Duration::from_secs;
        assert_eq!(finish_within(None, second(3)), Ok(FINISH), "the deadline of all cuts it short");
        assert_eq!(finish_within(Some(second(20)), second(22)), Ok(second(20)));
        let refused = finish_within(Some(second(21)), second(22)).unwrap_err();
        assert!(refused.contains("Give them 20s or less, or raise hold.timeout"), "{refused}");
    }

    #[test]
    fn the_same_number_of_another_branch_is_not_caught_up() {
        let at = |txid, checksum| {
            let mut positions = Positions::of(Some(1));
            positions.set("app.db", Position { txid, checksum }, std::time::Instant::now());
            positions
        };
        let wanted = at(5, 7);
        assert!(has_caught_up(&at(5, 7), &wanted) && has_caught_up(&at(6, 1), &wanted));
        assert!(!has_caught_up(&at(4, 7), &wanted) && !has_caught_up(&at(5, 8), &wanted));
        assert!(!has_caught_up(&Positions::default(), &wanted));
    }
}
