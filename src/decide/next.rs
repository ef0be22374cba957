//! What happens after an attempt: relay its answer, try again, wait, or give up.
//!
//! The table is design section 4.4. Its rule is that a write runs at most once: it is sent again
//! only if not a byte of it was written, if the node itself said "elsewhere", or if its route
//! says that it may run twice.
//!
//! A replay to the node that sent it, to one that this request could not reach, or to a name
//! that nobody goes by is not a target but a hint to wait (LiteFS names the dead primary about
//! once a second during a failover): such a round costs a pause and no hop. A replay to a listed
//! node is followed even where the topology believes another one to be primary: if the node is
//! wrong, it will say so itself, and nothing has run.

use std::time::Duration;

use http::StatusCode;

use super::{
    Class, Ended, Failure, FailureKind, History, HoldFor, Problem, Request, Target,
    replay::{Fallback, Replay, ReplayError},
};
use crate::{
    config::cluster::Cluster,
    topology::{NodeId, Topology},
};

/// The first pause; each further one is twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(50);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What the operator allows.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Retry reads after failures without an answer.
    pub on_connect: bool,
    /// Retry reads after these answers.
    pub on_status: Vec<StatusCode>,
    /// Tries in all, replays not counted.
    pub attempts: u32,
    /// Replays that are followed.
    pub max_hops: u32,
    /// The region that means the primary.
    pub primary_region: Option<Box<str>>,
    /// The app that this cluster is.
    pub name: std::sync::Arc<str>,
}

impl Rules {
    /// Those of one cluster.
    pub fn of(cluster: &Cluster) -> Self {
        Self {
            on_connect: cluster.retry.on_connect,
            on_status: cluster.retry.on_status.clone(),
            attempts: cluster.retry.attempts,
            max_hops: cluster.replay.max_hops,
            primary_region: cluster.replay.primary_region.clone(),
            name: std::sync::Arc::clone(&cluster.name),
        }
    }
}

/// How an attempt ended, with what the node asked for.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// An answer for the client.
    Answered(StatusCode),
    /// "Elsewhere."
    Replay(Result<&'a Replay, ReplayError>),
    /// No answer.
    Failed(Failure),
}

/// What is done then.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// The client gets the answer.
    Relay,
    /// Choose and try again.
    Again,
    /// Wait, then choose.
    Hold(HoldFor),
    /// The other app that a replay names: continue in the cluster of that name.
    OtherCluster,
}

/// Decides. The attempt has been added to `history` already; what the next choice has to know is
/// added here. `replayable`: whether the whole body could be sent again. `may_retry` asks the
/// budget, and spends from it if it says yes.
///
/// # Errors
/// What the client is told when there is nothing more to try.
pub fn next(
    request: &Request,
    history: &mut History,
    outcome: Outcome<'_>,
    topology: &Topology,
    rules: &Rules,
    replayable: bool,
    may_retry: impl FnOnce() -> bool,
) -> Result<Next, Problem> {
    match outcome {
        Outcome::Answered(status) => {
            let again = request.class == Class::Read
                && rules.on_status.contains(&status)
                && replayable
                && tries_left(history, rules)
                && may_retry();
            history.target = None;
            Ok(if again { Next::Again } else { Next::Relay })
        }
        Outcome::Replay(_) if !replayable => Err(Problem::ReplayBody),
        Outcome::Replay(Err(_)) => Err(Problem::BadReplay),
        // A fallback may not replay again (`reference/fly-replay.md` section 6).
        Outcome::Replay(Ok(_)) if history.fell_back => Err(Problem::BadReplay),
        Outcome::Replay(Ok(replay)) => follow(history, replay, topology, rules),
        Outcome::Failed(failure) => failed(request, history, failure, rules, replayable, may_retry),
    }
}

/// After a failure: the rows of the table without an answer.
fn failed(
    request: &Request,
    history: &mut History,
    failure: Failure,
    rules: &Rules,
    replayable: bool,
    may_retry: impl FnOnce() -> bool,
) -> Result<Next, Problem> {
    let problem = problem(request.class, failure);
    history.target = None;
    if !replayable {
        return Err(if failure.written { problem } else { Problem::ReplayBody });
    }
    if !failure.written
        && let Some((sender, fallback)) = history.fallback.take()
    {
        return Ok(back_to(history, sender, fallback));
    }
    match request.class {
        // Nobody saw a byte of it: the primary as it will be known, once it can be reached.
        Class::Write if !failure.written => {
            if failure.kind == FailureKind::StaleConnection {
                return Ok(Next::Again);
            }
            history.expired = Some(match problem {
                Problem::NodeCertificate | Problem::NodeTls => problem,
                _ => Problem::ConnectFailed,
            });
            Ok(pause(history))
        }
        // Nobody else may have what the client must be shown: it waits for news of the node, rather
        // than fail for asking it again and again.
        Class::Read if request.demands.position && !failure.written => {
            history.expired = Some(problem);
            Ok(pause(history))
        }
        Class::Write if !request.idempotent => Err(problem),
        Class::Read | Class::Write => {
            let again = rules.on_connect && tries_left(history, rules) && may_retry();
            if again { Ok(Next::Again) } else { Err(problem) }
        }
    }
}

/// What the client is told of a failure after which there is nothing to try.
fn problem(class: Class, failure: Failure) -> Problem {
    match (failure.kind, failure.written) {
        (FailureKind::NodeFull, _) => Problem::NodeFull,
        (FailureKind::Certificate, _) => Problem::NodeCertificate,
        (FailureKind::Tls, _) => Problem::NodeTls,
        (FailureKind::ConnectRefused | FailureKind::ConnectTimeout, _) | (_, false) => {
            Problem::ConnectFailed
        }
        (FailureKind::ResponseTimeout, true) => Problem::ResponseTimeout,
        (FailureKind::BadResponse, true) => Problem::BadResponse,
        (FailureKind::StaleConnection | FailureKind::Closed | FailureKind::NodeGone, true) => {
            match class {
                Class::Read => Problem::NodeClosed,
                Class::Write => Problem::MaybeExecuted,
            }
        }
    }
}

/// Whether `retry.attempts` leaves another try. Those that ended in a replay do not count.
fn tries_left(history: &History, rules: &Rules) -> bool {
    let tries = history.attempts.iter().filter(|a| !matches!(a.ended, Ended::Replayed)).count();
    tries < rules.attempts as usize
}

/// Follows a replay as far as it leads to a member.
fn follow(
    history: &mut History,
    replay: &Replay,
    topology: &Topology,
    rules: &Rules,
) -> Result<Next, Problem> {
    let Some(sender) = history.attempts.last().map(|attempt| attempt.node) else {
        return Err(Problem::BadReplay);
    };
    if let Some(app) = &replay.app
        && !rules.name.eq_ignore_ascii_case(app)
    {
        hop(history, rules)?;
        history.target = None;
        return Ok(Next::OtherCluster);
    }
    let target = match target(replay, topology, rules) {
        Ok(Some(target)) => target,
        Ok(None) | Err(_) if replay.fallback.is_some() => {
            return Ok(fall_back(history, sender, replay));
        }
        Ok(None) => {
            history.expired = Some(Problem::ReplayTarget);
            history.target = None;
            return Ok(pause(history));
        }
        Err(problem) => return Err(problem),
    };
    let named = match target {
        Target::Node(id) => Some(id),
        Target::Primary => topology.primary,
        Target::Prefer(_) | Target::Any | Target::Elsewhere => None,
    };
    // "The primary" without anybody known to be it, too, is something to wait for.
    let is_target = match named {
        Some(id) => id != sender && !is_unreachable(history, id),
        None => target != Target::Primary,
    };
    if !is_target {
        if replay.fallback.is_some() && named != Some(sender) {
            return Ok(fall_back(history, sender, replay));
        }
        history.expired = None;
        history.target = None;
        return Ok(pause(history));
    }
    hop(history, rules)?;
    history.target = Some(target);
    history.fallback = replay.fallback.map(|fallback| (sender, fallback));
    Ok(Next::Again)
}

/// There is nobody to connect to: back to the sender at once, since it wants to know.
fn fall_back(history: &mut History, sender: NodeId, replay: &Replay) -> Next {
    back_to(history, sender, replay.fallback.unwrap_or(Fallback::ForceSelf))
}

fn back_to(history: &mut History, sender: NodeId, fallback: Fallback) -> Next {
    history.fell_back = true;
    history.target = Some(match fallback {
        Fallback::ForceSelf => Target::Node(sender),
        Fallback::PreferSelf => Target::Prefer(sender),
    });
    Next::Again
}

/// The member that a replay asks for; `None` where it names one that nobody goes by (yet).
fn target(replay: &Replay, topology: &Topology, rules: &Rules) -> Result<Option<Target>, Problem> {
    if let Some(name) = &replay.instance {
        return Ok(match name.as_str() {
            "" => Some(Target::Primary),
            name => topology.named(name).map(|node| Target::Node(node.id)),
        });
    }
    if let Some(name) = &replay.prefer_instance {
        let node = topology.named(name);
        return Ok(Some(node.map_or(Target::Any, |node| Target::Prefer(node.id))));
    }
    let primary_region = rules.primary_region.as_deref();
    for region in &replay.region {
        if Some(region.as_str()) == primary_region {
            return Ok(Some(Target::Primary));
        }
        if region == "any" {
            return Ok(Some(Target::Any));
        }
    }
    if !replay.region.is_empty() {
        return Err(Problem::ReplayTarget);
    }
    let elsewhere = replay.elsewhere == Some(true);
    Ok(Some(if elsewhere { Target::Elsewhere } else { Target::Any }))
}

fn hop(history: &mut History, rules: &Rules) -> Result<(), Problem> {
    if history.hops >= rules.max_hops {
        return Err(Problem::TooManyHops);
    }
    history.hops += 1;
    Ok(())
}

/// Whether the last thing that this request learned of a node is that it can't be reached.
fn is_unreachable(history: &History, id: NodeId) -> bool {
    let last = history.attempts.iter().rev().find(|attempt| attempt.node == id);
    last.is_some_and(|attempt| {
        matches!(attempt.ended, Ended::Failed(Failure { written: false, .. }))
    })
}

fn pause(history: &mut History) -> Next {
    let length = PAUSE.saturating_mul(2u32.saturating_pow(history.pauses)).min(LONGEST_PAUSE);
    history.pauses += 1;
    Next::Hold(HoldFor::Pause(length))
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::*;
    use crate::{
        decide::{Attempt, Because, Cause, Demands, Wanted},
        topology::{Node, Role},
    };

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    fn rules() -> Rules {
        Rules {
            on_connect: true,
            on_status: vec![StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE],
            attempts: 3,
            max_hops: 3,
            primary_region: Some("iad".into()),
            name: "abaci".into(),
        }
    }

    fn request(class: Class, idempotent: bool) -> Request {
        Request {
            class,
            because: Because::Method,
            idempotent,
            wanted: Wanted::Any,
            demands: Demands::default(),
        }
    }

    fn topology() -> Topology {
        let node = |id: NodeId, name: &str, role| Node {
            role,
            ..Node::new(id, name.into(), ([127, 0, 0, 1], 1).into())
        };
        let nodes = vec![node(A, "a", Role::Primary), node(B, "b", Role::Replica)];
        Topology { primary: Some(A), nodes, ..Topology::default() }
    }

    fn after(node: NodeId, ended: Ended) -> History {
        let attempt = Attempt { node, role: Role::Replica, cause: Cause::First, ended };
        History { attempts: [attempt].into_iter().collect(), ..History::default() }
    }

    fn failure(kind: FailureKind, written: bool) -> Failure {
        Failure { kind, written }
    }

    fn after_failure(class: Class, idempotent: bool, failed: Failure) -> Result<Next, Problem> {
        let mut history = after(A, Ended::Failed(failed));
        let outcome = Outcome::Failed(failed);
        next(
            &request(class, idempotent),
            &mut history,
            outcome,
            &topology(),
            &rules(),
            true,
            || true,
        )
    }

    const WAIT: Next = Next::Hold(HoldFor::Pause(PAUSE));

    #[test]
    fn failures() {
        use FailureKind::{
            BadResponse, Certificate, Closed, ConnectRefused, ConnectTimeout, ResponseTimeout,
            StaleConnection, Tls,
        };
        for (case, kind, written, read, write) in [
            ("refused", ConnectRefused, false, Ok(Next::Again), Ok(WAIT)),
            ("connect timed out", ConnectTimeout, false, Ok(Next::Again), Ok(WAIT)),
            ("not the node", Certificate, false, Ok(Next::Again), Ok(WAIT)),
            ("no TLS with it", Tls, false, Ok(Next::Again), Ok(WAIT)),
            ("closed before a byte was written", Closed, false, Ok(Next::Again), Ok(WAIT)),
            ("stale, nothing written", StaleConnection, false, Ok(Next::Again), Ok(Next::Again)),
            (
                "stale, but written",
                StaleConnection,
                true,
                Ok(Next::Again),
                Err(Problem::MaybeExecuted),
            ),
            (
                "closed after it was written",
                Closed,
                true,
                Ok(Next::Again),
                Err(Problem::MaybeExecuted),
            ),
            (
                "no head in time",
                ResponseTimeout,
                true,
                Ok(Next::Again),
                Err(Problem::ResponseTimeout),
            ),
            ("garbage", BadResponse, true, Ok(Next::Again), Err(Problem::BadResponse)),
        ] {
            let failed = failure(kind, written);
            assert_eq!(after_failure(Class::Read, false, failed), read, "read, {case}");
            assert_eq!(after_failure(Class::Write, false, failed), write, "write, {case}");
            let twice = after_failure(Class::Write, true, failed);
            assert!(twice.is_ok(), "a write that may run twice, {case}: {twice:?}");
        }
    }

    #[test]
    fn answers() {
        for (case, class, status, want) in [
            ("a read goes on after 502", Class::Read, 502, Next::Again),
            ("a read that failed otherwise is relayed", Class::Read, 500, Next::Relay),
            ("a write's 502 is passed on", Class::Write, 502, Next::Relay),
            ("success is relayed", Class::Write, 200, Next::Relay),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let mut history = after(A, Ended::Answered(status));
            let outcome = Outcome::Answered(status);
            let next = next(
                &request(class, false),
                &mut history,
                outcome,
                &topology(),
                &rules(),
                true,
                || true,
            );
            assert_eq!(next, Ok(want), "{case}");
        }
    }

    #[test]
    fn a_retry_needs_the_budget_and_a_body_to_send() {
        let failed = failure(FailureKind::Closed, true);
        let ask = |replayable, budget| {
            let mut history = after(A, Ended::Failed(failed));
            let outcome = Outcome::Failed(failed);
            let request = request(Class::Read, false);
            next(&request, &mut history, outcome, &topology(), &rules(), replayable, || budget)
        };
        assert_eq!(ask(true, false), Err(Problem::NodeClosed));
        assert_eq!(ask(false, true), Err(Problem::NodeClosed));
        assert_eq!(ask(true, true), Ok(Next::Again));
    }

    fn replayed(
        sender: NodeId,
        line: &str,
        topology: &Topology,
    ) -> (Result<Next, Problem>, History) {
        let mut head = http::HeaderMap::new();
        head.insert(super::super::replay::FLY_REPLAY, line.parse().unwrap());
        let replay = super::super::replay::from_head(&head);
        let mut history = after(sender, Ended::Replayed);
        let outcome = Outcome::Replay(replay.as_ref().map_err(|error| *error));
        let request = request(Class::Write, false);
        let next = next(&request, &mut history, outcome, topology, &rules(), true, || true);
        (next, history)
    }

    #[test]
    fn replays() {
        let leaderless = Topology { primary: None, ..topology() };
        for (case, line, topology, want, target) in [
            ("to a member", "instance=a", topology(), Ok(Next::Again), Some(Target::Node(A))),
            (
                "to the unnamed primary",
                "instance=",
                topology(),
                Ok(Next::Again),
                Some(Target::Primary),
            ),
            ("to a primary that nobody knows", "instance=", leaderless, Ok(WAIT), None),
            ("to the sender", "instance=b", topology(), Ok(WAIT), None),
            ("to a stranger", "instance=evil.example", topology(), Ok(WAIT), None),
            (
                "to the primary's region",
                "region=iad",
                topology(),
                Ok(Next::Again),
                Some(Target::Primary),
            ),
            ("to any region", "region=\"fra,any\"", topology(), Ok(Next::Again), Some(Target::Any)),
            (
                "to a region that is none",
                "region=fra",
                topology(),
                Err(Problem::ReplayTarget),
                None,
            ),
            ("to this app", "app=abaci", topology(), Ok(Next::Again), Some(Target::Any)),
            ("to another app", "app=other", topology(), Ok(Next::OtherCluster), None),
            ("elsewhere", "elsewhere=true", topology(), Ok(Next::Again), Some(Target::Elsewhere)),
            (
                "preferably to a member",
                "prefer_instance=a",
                topology(),
                Ok(Next::Again),
                Some(Target::Prefer(A)),
            ),
            (
                "preferably to a stranger",
                "prefer_instance=x",
                topology(),
                Ok(Next::Again),
                Some(Target::Any),
            ),
            (
                "to a stranger, or back",
                "instance=x;fallback=force_self",
                topology(),
                Ok(Next::Again),
                Some(Target::Node(B)),
            ),
            (
                "to a region that is none, or preferably back",
                "region=fra;fallback=prefer_self",
                topology(),
                Ok(Next::Again),
                Some(Target::Prefer(B)),
            ),
            (
                "to the sender, or back",
                "instance=b;fallback=force_self",
                topology(),
                Ok(WAIT),
                None,
            ),
            ("in no known language", "leader", topology(), Err(Problem::BadReplay), None),
        ] {
            let (next, history) = replayed(B, line, &topology);
            assert_eq!(next, want, "{case}");
            assert_eq!(history.target, target, "{case}");
            let is_back = case.ends_with("back") && next == Ok(Next::Again);
            assert_eq!(history.fell_back, is_back, "{case}");
        }
    }

    #[test]
    fn a_replay_to_a_node_that_could_not_be_reached_is_a_hint_to_wait() {
        let (_, mut history) = replayed(B, "instance=a", &topology());
        let failed = failure(FailureKind::ConnectRefused, false);
        let attempt =
            |node, ended| Attempt { node, role: Role::Replica, cause: Cause::Replay, ended };
        history.attempts.push(attempt(A, Ended::Failed(failed)));
        history.attempts.push(attempt(B, Ended::Replayed));
        let replay = Replay { instance: Some("a".into()), ..Replay::default() };
        let (request, topology) = (request(Class::Write, false), topology());
        let hops = history.hops;
        let outcome = Outcome::Replay(Ok(&replay));
        let next = next(&request, &mut history, outcome, &topology, &rules(), true, || true);
        assert!(matches!(next, Ok(Next::Hold(_))), "{next:?}");
        assert_eq!(history.hops, hops, "a hint is not a hop");
    }

    #[test]
    fn hops_are_limited() {
        let replay = Replay { instance: Some("a".into()), ..Replay::default() };
        let (request, topology) = (request(Class::Write, false), topology());
        let mut history = after(B, Ended::Replayed);
        let mut go = || {
            let outcome = Outcome::Replay(Ok(&replay));
            next(&request, &mut history, outcome, &topology, &rules(), true, || true)
        };
        assert_eq!([go(), go(), go()], [Ok(Next::Again); 3]);
        assert_eq!(go(), Err(Problem::TooManyHops));
    }

    #[test]
    fn a_fallback_goes_back_to_the_sender_once() {
        let (next_step, mut history) = replayed(B, "instance=a;fallback=force_self", &topology());
        assert_eq!(next_step, Ok(Next::Again));
        let failed = failure(FailureKind::ConnectRefused, false);
        let ended = Ended::Failed(failed);
        history.attempts.push(Attempt {
            node: A,
            role: Role::Primary,
            cause: Cause::Replay,
            ended,
        });
        let (request, topology) = (request(Class::Write, false), topology());
        let mut go =
            |outcome| next(&request, &mut history, outcome, &topology, &rules(), true, || true);
        assert_eq!(go(Outcome::Failed(failed)), Ok(Next::Again));
        let replay = Replay { instance: Some("a".into()), ..Replay::default() };
        assert_eq!(go(Outcome::Replay(Ok(&replay))), Err(Problem::BadReplay));
        assert!(history.fell_back);
    }

    #[test]
    fn a_body_that_is_gone_cannot_be_replayed() {
        let replay = Replay { instance: Some("a".into()), ..Replay::default() };
        let mut history = after(B, Ended::Replayed);
        let outcome = Outcome::Replay(Ok(&replay));
        let request = request(Class::Write, false);
        let next = next(&request, &mut history, outcome, &topology(), &rules(), false, || true);
        assert_eq!(next, Err(Problem::ReplayBody));
    }

    fn any_failure() -> impl Strategy<Value = Failure> {
        use FailureKind::{
            BadResponse, Certificate, Closed, ConnectRefused, ConnectTimeout, NodeFull,
            ResponseTimeout, StaleConnection, Tls,
        };
        let kinds = vec![
            BadResponse,
            Closed,
            ConnectRefused,
            ConnectTimeout,
            Certificate,
            Tls,
            NodeFull,
            ResponseTimeout,
            StaleConnection,
        ];
        (proptest::sample::select(kinds), any::<bool>())
            .prop_map(|(kind, written)| Failure { kind, written })
    }

    proptest! {
        #[test]
        fn a_write_of_which_a_byte_left_is_never_sent_again(failed in any_failure(), replayable: bool, budget: bool) {
            let mut history = after(A, Ended::Failed(failed));
            let outcome = Outcome::Failed(failed);
            let next = next(
                &request(Class::Write, false), &mut history, outcome, &topology(), &rules(),
                replayable, || budget,
            );
            if failed.written { prop_assert!(next.is_err()); }
        }

        #[test]
        fn a_read_ends_after_so_many_tries(failures in proptest::collection::vec(any_failure(), 10)) {
            let mut history = History::default();
            let mut sent = 0;
            for failed in failures {
                sent += 1;
                let ended = Ended::Failed(failed);
                history.attempts.push(Attempt { node: A, role: Role::Replica, cause: Cause::Retry, ended });
                let outcome = Outcome::Failed(failed);
                let request = request(Class::Read, false);
                if next(&request, &mut history, outcome, &topology(), &rules(), true, || true).is_err() {
                    break;
                }
            }
            prop_assert!(sent <= 3, "{}", sent);
        }

        #[test]
        fn pauses_grow_and_stay_below_a_second(n in 0..100u32) {
            let mut history = History { pauses: n, ..History::default() };
            match pause(&mut history) {
                Next::Hold(HoldFor::Pause(length)) => {
                    prop_assert!(length >= PAUSE && length <= LONGEST_PAUSE);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
