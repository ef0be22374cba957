//! A verdict for people and for programs. docs/verify.md describes the JSON.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use serde_json::{Value as Json, json};

use super::{
    drive::Run,
    history::{Operation, Outcome},
    judge::{Breach, Step, Verdict, Violation},
};

/// The report's format; grows when a field changes its meaning or goes.
const VERSION: u32 = 1;

/// What a run came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Conclusion {
    /// Every promise was kept, or only those were broken that may be.
    Kept,
    /// A promise was broken.
    Violated,
    /// Nothing was broken as far as can be seen, but not everything could be looked at.
    Unknown,
}

impl Conclusion {
    /// Draws it.
    pub fn of(verdict: &Verdict, allowed: &[Breach]) -> Self {
        match verdict {
            _ if !verdict.is_kept(allowed) => Self::Violated,
            _ if verdict.unread > 0 => Self::Unknown,
            _ => Self::Kept,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Violated => "violated",
            Self::Unknown => "unknown",
        }
    }
}

/// One line for a run under way.
pub fn progress(elapsed: Duration, verdict: &Verdict) -> String {
    let counts = &verdict.counts;
    let breaches: u64 = verdict.breaches.values().sum();
    format!(
        "{:>4} s  writes {} ({} of unknown end)  reads {} ({} failed)  violations {breaches}",
        elapsed.as_secs(),
        counts.acknowledged,
        counts.ambiguous,
        counts.reads,
        counts.failed_reads,
    )
}

/// The whole verdict.
pub fn text(run: &Run, allowed: &[Breach]) -> String {
    let (verdict, counts) = (&run.verdict, &run.verdict.counts);
    let mut page = String::new();
    // The first of those that count; else of those that may be.
    let counts_for = |violation: &&Violation| !allowed.contains(&violation.breach);
    let first = verdict.violations.iter().find(counts_for).or(verdict.violations.first());
    if let Some(first) = first {
        let _ = writeln!(page, "The first violation ({}):\n{}", first.breach.as_str(), told(first));
    }
    let _ = writeln!(
        page,
        "run {}, {:.1} s, {} writes: {} acknowledged, {} of unknown end ({} of them there), \
         {} certainly not run",
        run.name,
        run.took.as_secs_f64(),
        counts.writes,
        counts.acknowledged,
        counts.ambiguous,
        counts.ambiguous_there,
        counts.denied,
    );
    let _ = writeln!(
        page,
        "{} reads answered, {} failed; the longest write took {:.1} s, the longest read {:.1} s",
        counts.reads,
        counts.failed_reads,
        counts.longest_write.as_secs_f64(),
        counts.longest_read.as_secs_f64(),
    );
    for (error, n) in &counts.errors {
        let _ = writeln!(page, "  {n:>6}  {error}");
    }
    if !counts.nodes.is_empty() {
        let nodes = counts.nodes.iter().map(|(node, n)| format!("{node} {n}"));
        let _ = writeln!(page, "answers by node: {}", nodes.collect::<Vec<_>>().join(", "));
    }
    if run.is_full {
        let _ = writeln!(page, "ended early: a run has at most {} writes", super::WRITES);
    }
    if counts.lost_announced > 0 {
        let _ = writeln!(
            page,
            "{} acknowledged writes were lost, and their clients told so; {} reads of others had \
             shown them",
            counts.lost_announced, counts.lost_announced_seen,
        );
    }
    if verdict.unread > 0 {
        let n = verdict.unread;
        let _ = writeln!(page, "{n} keys could not be read at the end: not judged whole");
    }
    for breach in Breach::ALL {
        let n = verdict.count(breach);
        if n > 0 {
            let may = if allowed.contains(&breach) { " (allowed)" } else { "" };
            let _ = writeln!(page, "{n} {}: {}{may}", breach.as_str(), breach.meaning());
        }
    }
    let conclusion = match Conclusion::of(verdict, allowed) {
        Conclusion::Kept => "kept: nothing lost, repeated, stale or out of order",
        Conclusion::Violated => "VIOLATED",
        Conclusion::Unknown => "unknown: nothing was found, but not everything could be read",
    };
    page.push_str(conclusion);
    page
}

/// A violation with its trace.
fn told(violation: &Violation) -> String {
    let at = violation.at.as_secs_f64();
    let mut page = format!("  at {at:.3} s: {}\n", violation.text);
    if !violation.trace.is_empty() {
        let _ = writeln!(page, "  before it, on this key and by this client:");
    }
    for step in &violation.trace {
        let about = violation.value.is_some_and(
            |value| matches!(step.operation, Operation::Write(_, written) if written == value),
        );
        let mark = if about { '>' } else { ' ' };
        let _ = writeln!(page, "  {mark} {}", line(step, violation));
    }
    page
}

fn line(step: &Step, violation: &Violation) -> String {
    let what = match step.operation {
        Operation::Write(key, value) => format!("{value} to {key}"),
        Operation::Read(key) => format!("read {key}"),
    };
    let how = match &step.end.outcome {
        Outcome::Acknowledged => "acknowledged".to_owned(),
        Outcome::Empty => "success with an empty body".to_owned(),
        Outcome::Ambiguous(why) => format!("unknown end ({why})"),
        Outcome::Denied(why) => format!("not committed ({why})"),
        Outcome::Failed(why) => format!("failed ({why})"),
        Outcome::Values(values) => match (&**values, violation.value) {
            ([], _) => "nothing".to_owned(),
            ([value], _) => value.to_string(),
            (values, Some(value)) if step.operation.key() == violation.key => {
                let n = values.iter().filter(|other| **other == value).count();
                match n {
                    0 => format!("{} values, without {value}", values.len()),
                    1 => format!("{} values, with {value}", values.len()),
                    n => format!("{} values, with {value} {n} times", values.len()),
                }
            }
            (values, _) => format!("{} values", values.len()),
        },
    };
    let mut line = format!(
        "{:>9.3} s +{:<6} client {:<3} {what:<32} {how}",
        step.began.as_secs_f64(),
        format!("{} ms", step.ended.saturating_sub(step.began).as_millis()),
        step.client,
    );
    if let Some(node) = &step.end.node {
        let _ = write!(line, ", by {node}");
    }
    let _ = write!(line, ", URL {}", step.end.instance + 1);
    if let Some(via) = &step.end.via {
        let _ = write!(line, " via {via}");
    }
    if step.end.told_lost {
        line.push_str(", told of lost writes");
    }
    if step.end.leaked {
        line.push_str(", with fly-replay");
    }
    line
}

/// The whole verdict for programs.
pub fn json(run: &Run, allowed: &[Breach]) -> Json {
    let (verdict, counts) = (&run.verdict, &run.verdict.counts);
    let by_name = |counts: &BTreeMap<Arc<str>, u64>| -> Json {
        counts.iter().map(|(name, n)| (name.to_string(), Json::from(*n))).collect()
    };
    let breaches = Breach::ALL.map(|breach| (breach.as_str().to_owned(), verdict.count(breach)));
    json!({
        "version": VERSION,
        "run": run.name,
        "conclusion": Conclusion::of(verdict, allowed).as_str(),
        "allowed": allowed.iter().map(|breach| breach.as_str()).collect::<Vec<_>>(),
        "seconds": run.took.as_secs_f64(),
        "ended_early": run.is_full,
        "writes": {
            "sent": counts.writes,
            "acknowledged": counts.acknowledged,
            "ambiguous": counts.ambiguous,
            "ambiguous_there": counts.ambiguous_there,
            "denied": counts.denied,
            "announcements": counts.announcements,
            "lost_announced": counts.lost_announced,
            "lost_announced_seen": counts.lost_announced_seen,
            "longest_seconds": counts.longest_write.as_secs_f64(),
        },
        "reads": {
            "answered": counts.reads,
            "failed": counts.failed_reads,
            "longest_seconds": counts.longest_read.as_secs_f64(),
        },
        "errors": by_name(&counts.errors),
        "nodes": by_name(&counts.nodes),
        "unread_keys": verdict.unread,
        "breaches": breaches.into_iter().collect::<BTreeMap<_, _>>(),
        "violations": verdict.violations.iter().map(violation).collect::<Vec<_>>(),
    })
}

fn violation(violation: &Violation) -> Json {
    json!({
        "breach": violation.breach.as_str(),
        "at_seconds": violation.at.as_secs_f64(),
        "client": violation.client,
        "key": violation.key.to_string(),
        "value": violation.value.map(|value| value.to_string()),
        "text": violation.text,
        "trace": violation.trace.iter().map(step).collect::<Vec<_>>(),
    })
}

fn step(step: &Step) -> Json {
    let (operation, written) = match step.operation {
        Operation::Write(_, value) => ("write", Some(value.to_string())),
        Operation::Read(_) => ("read", None),
    };
    let (outcome, why, values) = match &step.end.outcome {
        Outcome::Acknowledged => ("acknowledged", None, None),
        Outcome::Empty => ("empty", None, None),
        Outcome::Ambiguous(why) => ("ambiguous", Some(why), None),
        Outcome::Denied(why) => ("denied", Some(why), None),
        Outcome::Failed(why) => ("failed", Some(why), None),
        Outcome::Values(values) => ("values", None, Some(values)),
    };
    json!({
        "began_seconds": step.began.as_secs_f64(),
        "ended_seconds": step.ended.as_secs_f64(),
        "client": step.client,
        "operation": operation,
        "key": step.operation.key().to_string(),
        "value": written,
        "outcome": outcome,
        "why": why.map(|why| &**why),
        "values": values.map(|v| v.iter().map(ToString::to_string).collect::<Vec<_>>()),
        "status": step.end.status,
        "node": step.end.node.as_deref(),
        "via": step.end.via.as_deref(),
        "url": step.end.instance + 1,
        "told_lost": step.end.told_lost,
        "leaked": step.end.leaked,
    })
}
