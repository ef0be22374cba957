//! The planned hand-over: another node becomes primary, and no write notices.
//!
//! Writes are held, those under way finish, the target gets all that the primary has, LiteFS moves
//! the lease (`POST /promote` on the target, which answers when the primary has accepted: the
//! claim itself is waited for), and the held writes go on. Every step has a deadline, all together
//! less than a held write waits. However it ends, the writes go on: to whoever is primary then.
//!
//! Other instances of litegate are not told: their writes find the new primary as after any other
//! change, by a replay or by its claim.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    admin::Answer,
    config::cluster::Cluster,
    discovery,
    proxy::Hold,
    topology::{Freshness, Node, Presence, Role, Topology, position::Positions, watch},
};

/// How long writes under way may take to finish.
const IN_FLIGHT: Duration = Duration::from_secs(10);
/// How long the target may take to get what it lacks.
const CATCH_UP: Duration = Duration::from_secs(5);
/// How long LiteFS may take to accept: it gives itself 5 s.
const PROMOTE: Duration = Duration::from_secs(6);
/// How long the target's claim may take: LiteFS gives itself 10 s.
const CLAIM: Duration = Duration::from_secs(10);
/// All of it together, unless held writes wait for less.
const ALTOGETHER: Duration = Duration::from_secs(20);
/// Between two looks at what tells nobody when it changes.
const LOOK: Duration = Duration::from_millis(5);

/// What is asked for, and of whom.
pub(super) struct HandOver {
    pub(super) cluster: Cluster,
    pub(super) topology: watch::Reader,
    pub(super) hold: Arc<Hold>,
    /// Only if this one is primary.
    pub(super) from: Option<String>,
    /// Who takes over. `None`: the replica that has most.
    pub(super) to: Option<String>,
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
        let planned = plan(&topology, self.from.as_deref(), self.to.as_deref(), now.into_std());
        let plan = match planned {
            Ok(plan) => plan,
            Err(not) => return refused(&name, not),
        };
        if discovery::api(&self.cluster, plan.to.address).is_none() {
            return refused(&name, Not::Possible("the cluster has no LiteFS API".into()));
        }
        if self.cluster.hold.timeout.is_zero() {
            return refused(&name, Not::Possible("hold.timeout is 0: no write could wait".into()));
        }
        let Some(pause) = self.hold.pause() else {
            return refused(&name, Not::Possible("a hand-over is under way already".into()));
        };
        let most = ALTOGETHER.min(self.cluster.hold.timeout.mul_f64(0.75));
        let mut steps = Steps { done: Vec::new(), began: now, deadline: now + most };
        let result = self.steps(&plan, &mut steps).await;
        let held = self.hold.waiting();
        drop(pause);
        let (from, to) = (&plan.from.name, &plan.to.name);
        match &result {
            Ok(()) => {
                let took = now.elapsed();
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
            "cluster": &*name,
            "from": &**from,
            "to": &**to,
            "steps": taken.collect::<Vec<_>>(),
            "seconds": now.elapsed().as_secs_f64(),
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
        steps: &mut Steps,
    ) -> Result<(), (&'static str, String)> {
        let Plan { from, to } = plan;
        let hold = Arc::clone(&self.hold);
        let finish = async {
            while hold.in_flight() > 0 {
                sleep(LOOK).await;
            }
            Ok(())
        };
        let under_way = || format!("{} writes are still under way", hold.in_flight());
        steps.take("finish writes", IN_FLIGHT, finish, under_way).await?;
        let lacks = || format!("{} does not have what {} has", to.name, from.name);
        steps.take("catch up", CATCH_UP, catch_up(plan), lacks).await?;
        let promote = discovery::promote(&self.cluster, to.address, PROMOTE);
        steps.take("promote", PROMOTE, promote, || "LiteFS does not answer".into()).await?;
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

/// Waits until the target has what the primary has. Nothing of ours is under way any more.
async fn catch_up(plan: &Plan) -> Result<(), String> {
    let wanted = loop {
        match plan.from.progress.exact().await {
            Some(wanted) => break wanted,
            None => sleep(LOOK).await,
        }
    };
    loop {
        let has = plan.to.progress.exact().await;
        if has.is_some_and(|has| has_caught_up(&has, &wanted)) {
            return Ok(());
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
