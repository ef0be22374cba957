//! A write whose answer never came: what litegate knows of it, and whether it may run again.

use std::time::Duration;

use http::{HeaderName, HeaderValue};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{attempt::Node, cluster::Cluster, session::EXACT};
use crate::decide::{
    Ended, Failure, History,
    outcome::{self, Before, Verdict, WriteOutcome},
};

/// What became of a write that was answered with 502 or 504.
const OUTCOME: HeaderName = HeaderName::from_static("litegate-write-outcome");
/// How long a primary that hung up is given to be missed: a claimant may be silent for a second.
const MISSED: Duration = Duration::from_secs(3);

/// A write that was sent, and failed after bytes of it had left.
pub(super) struct Failed<'a> {
    pub(super) cluster: &'a Cluster,
    /// Who had it.
    pub(super) node: &'a Node,
    /// Where that was before.
    pub(super) before: &'a Before,
    pub(super) failure: Failure,
}

impl Failed<'_> {
    fn verdict(&self) -> Verdict {
        let mut topology = self.cluster.topology.borrow_mut();
        let topology = topology.latest();
        let is_gone = topology.node(self.node.id).is_none();
        let over = outcome::is_over(self.failure.kind, is_gone);
        let all = self.cluster.config.consistency.databases.is_empty();
        outcome::judge(self.before, &topology.lineage, over, all)
    }

    /// What is known of it now.
    fn outcome(&self, history: &History) -> WriteOutcome {
        match self.verdict() {
            Verdict::Settled(outcome) if is_only(history) => outcome,
            _ => WriteOutcome::Unknown,
        }
    }

    /// Waits for the next primary as long as there is reason to think that there will be one, at
    /// most until `deadline`, or where nothing depends on it [`MISSED`] and not at all for a
    /// primary that lives.
    pub(super) async fn settled(
        &self,
        history: &History,
        deadline: Option<Instant>,
    ) -> WriteOutcome {
        let mut reader = self.cluster.topology.borrow().clone();
        let missed = Instant::now() + MISSED;
        let deadline = deadline.map_or(missed, |deadline| deadline.max(missed));
        let is_open = || is_only(history) && self.verdict() == Verdict::Open;
        if deadline == missed && is_open() && self.lives().await {
            return WriteOutcome::Unknown;
        }
        while is_open() {
            let topology = reader.latest();
            let seen = topology.generation;
            let until = if topology.primary == Some(self.node.id) { missed } else { deadline };
            tokio::select! {
                newer = reader.newer_than(seen) => if newer.is_err() {
                    break;
                },
                () = sleep_until(until) => break,
            }
        }
        self.outcome(history)
    }

    /// Whether the node still speaks, and as the primary.
    async fn lives(&self) -> bool {
        let progress = &self.node.load.progress;
        let exact = timeout_at(Instant::now() + EXACT, progress.exact()).await.ok().flatten();
        exact.is_some() && self.cluster.is_primary(self.node.id)
    }
}

/// Whether a write that `node` has answered with success, and was sent to it at `before`, is on a
/// branch that the cluster has left already. Then the answer is worth nothing.
pub(super) fn is_left_behind(cluster: &Cluster, node: &Node, before: &Before) -> bool {
    let mut topology = cluster.topology.borrow_mut();
    let topology = topology.latest();
    let all = cluster.config.consistency.databases.is_empty();
    topology.primary != Some(node.id) && outcome::is_left_behind(before, &topology.lineage, all)
}

/// Whether no earlier attempt may have run: of that one, nothing is remembered.
fn is_only(history: &History) -> bool {
    let written = |ended| matches!(ended, Ended::Failed(Failure { written: true, .. }));
    history.attempts.iter().filter(|attempt| written(attempt.ended)).count() <= 1
}

/// The field that says so.
pub(super) fn field(outcome: WriteOutcome) -> (HeaderName, HeaderValue) {
    (OUTCOME, HeaderValue::from_static(outcome.as_str()))
}
