//! A hand-over while several instances of litegate write.
//!
//! LiteFS ends its own process when it loses its lease in the middle of a commit. So all instances
//! hold first ([`super::pause`]) and say when nothing of theirs is under way any more; then one of
//! them hands over ([`super::handoff`]); then each lets its writes go on, as soon as it sees the
//! new primary itself. If any of them can't be reached, or does not finish in time, nothing is
//! handed over and all let go.
//!
//! Whoever runs this may die, or be slow, at any point. Each instance holds for [`HOLD`] from when
//! it last heard of it and no longer; and the one that hands over may have LiteFS do it only while
//! all others hold for certain: see [`permitted`].

use std::{fmt::Display, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::join_all;
use http::{Method, Request, StatusCode, header};
use serde_json::{Value, json};
use tokio::{
    net::lookup_host,
    time::{Instant, sleep, timeout},
};

use super::{
    handoff::{NO_ANSWER, finish_within},
    pause::in_words,
};
use crate::{
    admin::{Answer, Lasts},
    call,
};

/// How long an instance holds without hearing more.
const HOLD: Duration = Duration::from_secs(8);
/// How often it hears more at least.
const RENEW: Duration = Duration::from_secs(1);
/// How long an instance may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long the hand-over itself may take: longer than it gives itself.
const HAND_OVER: Duration = Duration::from_secs(40);
/// How long a name may take to be resolved.
const RESOLVE: Duration = Duration::from_secs(5);
/// The largest answer.
const LARGE: usize = 1 << 20;
/// Instances, at most.
const INSTANCES: usize = 256;

/// Which instances write: all of them, or what they hold is worth nothing.
#[derive(Clone, Debug, Default)]
pub struct Instances {
    /// The admin listener of each, `host:port`.
    pub admins: Vec<String>,
    /// Names with an address for each, `name:port`: a headless service.
    pub services: Vec<String>,
}

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// The cluster, where there are several.
    pub cluster: Option<String>,
    /// Only if this node is primary.
    pub from: Option<String>,
    /// The node that takes over; else whichever is best.
    pub to: Option<String>,
    /// How long writes under way may take to finish.
    pub finish: Option<Duration>,
}

/// One of them.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Instance {
    /// As the operator knows it.
    name: Arc<str>,
    address: SocketAddr,
}

/// What an instance that holds says.
#[derive(Clone, Debug, PartialEq)]
struct Holding {
    /// The process that answered: it may have several addresses.
    instance: String,
    /// Whom it believes to be primary.
    primary: String,
    in_flight: u64,
    /// Some of those, as [`in_words`] reads them.
    running: Vec<Value>,
    /// Writes that wait there.
    held: u64,
    /// How long it had held when it answered, by its own clock.
    since: Duration,
    /// And for how long it still would.
    left: Duration,
    /// All pauses of one hand-over together.
    at_most: Duration,
}

/// What became of asking an instance to hold.
#[derive(Clone, Debug, PartialEq)]
enum Said {
    Holds(Holding),
    /// It did, and does not any more.
    LetGo {
        /// Whom it believes to be primary.
        primary: Option<String>,
    },
    Refuses(String),
    Unreached(String),
}

/// Why nothing is handed over.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Verdict {
    outcome: &'static str,
    /// The step, where it failed at one.
    failed: Option<&'static str>,
    why: String,
}

impl Verdict {
    fn refused(why: String) -> Self {
        Self { outcome: "refused", failed: None, why }
    }

    fn unreached(why: String) -> Self {
        Self { outcome: "unreached", failed: None, why }
    }

    fn failed(step: &'static str, why: String) -> Self {
        Self { outcome: "failed", failed: Some(step), why }
    }
}

/// What follows when all were asked to hold.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Next {
    /// All hold and nothing is under way.
    Go,
    /// Something is, and has time.
    Wait,
    GiveUp(Verdict),
}

/// Judges one round of asking. Pure. `finish`: how long writes may take, if somebody said so;
/// `elapsed`: since the first was asked.
fn next(said: &[(Arc<str>, Said)], finish: Option<Duration>, elapsed: Duration) -> Next {
    let give_up = |verdict| Next::GiveUp(verdict);
    let mut holding: Vec<(&Arc<str>, &Holding)> = Vec::new();
    for (name, said) in said {
        match said {
            Said::Holds(one) => holding.push((name, one)),
            Said::Unreached(why) => {
                return give_up(Verdict::unreached(format!(
                    "{name} is not reached ({why}): its writes can't be held. Is it gone, leave it out"
                )));
            }
            Said::Refuses(why) => {
                return give_up(Verdict::refused(format!("{name} does not hold: {why}")));
            }
            Said::LetGo { primary } => {
                let primary = primary.as_deref().unwrap_or("nobody");
                return give_up(Verdict::failed(
                    "hold",
                    format!(
                        "{name} let its writes go on: it was restarted, or took too long; to it {primary} is primary"
                    ),
                ));
            }
        }
    }
    let Some(((first, one), others)) = holding.split_first() else {
        return give_up(Verdict::unreached("there is no instance to ask".into()));
    };
    if let Some((name, other)) = others.iter().find(|(_, other)| other.primary != one.primary) {
        return give_up(Verdict::refused(format!(
            "to {first} {} is primary, and to {name} {}: are they of one cluster?",
            one.primary, other.primary
        )));
    }
    for (name, one) in &holding {
        if let Err(why) = finish_within(finish, one.at_most) {
            return give_up(Verdict::refused(format!("{name}: {why}")));
        }
    }
    let busy: Vec<_> = holding.iter().filter(|(_, one)| one.in_flight > 0).collect();
    if busy.is_empty() {
        return Next::Go;
    }
    let within = holding.iter().filter_map(|(_, one)| finish_within(finish, one.at_most).ok());
    let least = holding.iter().map(|(_, one)| one.at_most).min().unwrap_or_default();
    let within = within.min().unwrap_or_default().min(least.mul_f64(0.75));
    if elapsed < within {
        return Next::Wait;
    }
    let each = busy.iter().map(|(name, one)| {
        let words = in_words(one.in_flight, &one.running);
        format!("on {name} {words}")
    });
    let all = each.collect::<Vec<_>>().join("; ");
    give_up(Verdict::failed("finish writes", format!("after {:.1} s {all}", elapsed.as_secs_f64())))
}

/// Until when the instance that hands over may act on the word of the others, counted from when it
/// began to hold itself. Pure.
///
/// `since` is what it said of that *before* the others were asked, and `left` what the least of
/// them answered: so they all hold for `left` from then on at least, however late any of the
/// messages arrives. LiteFS needs some of it, from being asked to having moved the lease.
fn permitted(since: Duration, left: Duration) -> Duration {
    since + left.mul_f64(0.7)
}

/// A hand-over under way.
struct Together<'a> {
    instances: &'a Instances,
    wish: Wish,
    id: String,
    /// Those that were asked to hold, in the order of the operator's list; the first hands over.
    all: Vec<Instance>,
    /// Other addresses of theirs.
    again: Vec<SocketAddr>,
}

/// Has all instances hold, one of them hand over, and all let go. Says what happened, in the words
/// of `POST /api/handoff`, and `unreached` where that is the reason.
pub async fn hand_over(instances: &Instances, wish: Wish) -> Answer {
    let id = format!("{:016x}", fastrand::u64(..));
    let mut this = Together { instances, wish, id, all: Vec::new(), again: Vec::new() };
    let all = match this.resolve().await {
        Ok(all) => all,
        Err(why) => return this.answer(Verdict::unreached(why), &Value::Null),
    };
    let Some(first) = all.first().cloned() else {
        let why = "there is no instance to ask".to_owned();
        return this.answer(Verdict::unreached(why), &Value::Null);
    };
    // Before anything is held: whether there is anything to do.
    let target = this.target("/api/handoff", &[("check", "true")]);
    match this.ask(&first, &target, ANSWER).await {
        Ok((StatusCode::OK, body)) if text(&body, "outcome") == "possible" => {
            this.wish.from = Some(text(&body, "from").to_owned());
            this.wish.to = Some(text(&body, "to").to_owned());
        }
        Ok((status, body)) => return this.passed_on(&first, status, body),
        Err(why) => {
            let why = format!("{} is not reached ({why})", first.name);
            return this.answer(Verdict::unreached(why), &Value::Null);
        }
    }
    let began = Instant::now();
    match this.hold_all(all).await {
        Ok(holding) => this.carry_out(&holding, began).await,
        Err(verdict) => {
            let primary = this.release_all(None).await;
            this.answer(verdict, &primary)
        }
    }
}

impl Together<'_> {
    /// Has all of them hold until none has a write under way. All that were asked are in `self.all`
    /// afterwards, whatever they said.
    async fn hold_all(&mut self, found: Vec<Instance>) -> Result<Vec<Holding>, Verdict> {
        let began = Instant::now();
        let mut new = found;
        loop {
            // The new ones begin, the others go on.
            let known = self.all.len();
            self.all.append(&mut new);
            let asked = self.all.iter().enumerate().map(|(n, one)| {
                let this = &*self;
                async move {
                    (
                        Arc::clone(&one.name),
                        this.hold(one, Lasts::For(HOLD), n < known, RENEW).await,
                    )
                }
            });
            let said = join_all(asked).await;
            match next(&said, self.wish.finish, began.elapsed()) {
                Next::Wait => {}
                Next::GiveUp(verdict) => return Err(verdict),
                Next::Go => {
                    // Somebody may have come meanwhile, and not know that writes are held.
                    let now = self.resolve().await.map_err(Verdict::unreached)?;
                    new = now.into_iter().filter(|one| !self.has(one)).collect();
                    let holds = |(_, said)| match said {
                        Said::Holds(holding) => Some(holding),
                        _ => None,
                    };
                    let holding = self.without_doubles(said.into_iter().filter_map(holds));
                    if new.is_empty() {
                        return Ok(holding);
                    }
                }
            }
        }
    }

    fn has(&self, instance: &Instance) -> bool {
        self.again.contains(&instance.address)
            || self.all.iter().any(|one| one.address == instance.address)
    }

    /// Keeps each process once, by the first of its addresses: what the first may do has to hang on
    /// the others, not on itself. All of `self.all` hold, in that order.
    fn without_doubles(&mut self, holding: impl Iterator<Item = Holding>) -> Vec<Holding> {
        let (mut once, mut kept): (Vec<Instance>, Vec<Holding>) = (Vec::new(), Vec::new());
        for (one, holds) in std::mem::take(&mut self.all).into_iter().zip(holding) {
            if kept.iter().any(|known| known.instance == holds.instance) {
                self.again.push(one.address);
            } else {
                once.push(one);
                kept.push(holds);
            }
        }
        self.all = once;
        kept
    }

    /// All hold: the first hands over.
    async fn carry_out(&self, holding: &[Holding], began: Instant) -> Answer {
        let held_for = began.elapsed();
        let Some((first, others)) = self.all.split_first() else {
            return self.answer(Verdict::unreached("there is no instance".into()), &Value::Null);
        };
        let since = holding.first().map(|one| one.since).unwrap_or_default();
        // Once more, so that they hold for as long as it may take.
        let until = match self.renew(others).await {
            Ok(left) => millis(permitted(since, left.unwrap_or_default())),
            Err(verdict) => {
                let primary = self.release_all(None).await;
                return self.answer(verdict, &primary);
            }
        };
        let under = [("id", &*self.id), ("until", &*until)];
        let target = self.target("/api/handoff", &under);
        let asked = self.ask(first, &target, HAND_OVER);
        let renewing = async {
            let mut since = since;
            loop {
                sleep(RENEW).await;
                let left = match self.renew(others).await {
                    Ok(Some(left)) => left,
                    Ok(None) => break,
                    Err(_) => {
                        // It may still be time to keep LiteFS from it.
                        self.release(first, None).await;
                        break;
                    }
                };
                let lasts = Lasts::Until(permitted(since, left));
                if let Said::Holds(one) = self.hold(first, lasts, true, Duration::ZERO).await {
                    since = one.since;
                }
            }
            std::future::pending().await
        };
        let answer = tokio::select! {
            answer = asked => answer,
            never = renewing => match never {},
        };
        let (status, mut body) = match answer {
            Ok((status, body)) => (status, body),
            Err(why) => {
                // The others hold until they see another primary or have heard nothing for too
                // long: whether LiteFS was asked is not known.
                let why = format!(
                    "{} did not say how it ended ({why}). The others go on by themselves within {HOLD:?}",
                    first.name
                );
                return self.answer(Verdict::failed("promote", why), &Value::Null);
            }
        };
        let done = status == StatusCode::OK && text(&body, "outcome") == "done";
        let to = done.then(|| text(&body, "to").to_owned());
        // Where LiteFS may yet move the lease, they wait for that, or for their time.
        if text(&body, "why") != NO_ANSWER {
            self.release_all(to.as_deref()).await;
        }
        if let Some(steps) = body.get_mut("steps").and_then(Value::as_array_mut) {
            steps.insert(0, json!({ "step": "hold", "seconds": held_for.as_secs_f64() }));
        }
        let elsewhere: u64 = holding.iter().skip(1).map(|one| one.held).sum();
        let here = body.get("held").and_then(Value::as_u64).unwrap_or(0);
        if body.is_object() {
            body["held"] = (here + elsewhere).into();
            body["seconds"] = began.elapsed().as_secs_f64().into();
        }
        self.passed_on(first, status, body)
    }

    /// Has the others hold on, and says for how long all of them do. `None`: one of them has seen
    /// the new primary, and the lease has moved.
    async fn renew(&self, others: &[Instance]) -> Result<Option<Duration>, Verdict> {
        let asked = others.iter().map(|one| async move {
            (Arc::clone(&one.name), self.hold(one, Lasts::For(HOLD), true, Duration::ZERO).await)
        });
        let said = join_all(asked).await;
        if said.is_empty() {
            return Ok(Some(HOLD));
        }
        let moved = |(_, said): &(_, Said)| match said {
            Said::LetGo { primary } => primary.is_some() && *primary == self.wish.to,
            _ => false,
        };
        if said.iter().any(moved) {
            return Ok(None);
        }
        if let Next::GiveUp(verdict) = next(&said, None, Duration::ZERO) {
            return Err(verdict);
        }
        let left = said.iter().filter_map(|(_, said)| match said {
            Said::Holds(holding) => Some(holding.left),
            _ => None,
        });
        Ok(Some(left.min().unwrap_or_default()))
    }

    async fn hold(&self, instance: &Instance, lasts: Lasts, renew: bool, wait: Duration) -> Said {
        let (key, length) = match lasts {
            Lasts::For(length) => ("for", millis(length)),
            Lasts::Until(length) => ("until", millis(length)),
        };
        let (wait_for, renew) = (millis(wait), if renew { "true" } else { "false" });
        let more = [("id", &*self.id), (key, &*length), ("wait", &*wait_for), ("renew", renew)];
        let target = self.target("/api/handoff/hold", &more);
        match self.ask(instance, &target, ANSWER + wait).await {
            Ok((status, body)) => read(status, &body),
            Err(why) => Said::Unreached(why),
        }
    }

    /// Has all let go: once `primary` is primary to them, or at once. Says who is primary to one.
    async fn release_all(&self, primary: Option<&str>) -> Value {
        let told = self.all.iter().map(|one| self.release(one, primary));
        join_all(told).await.into_iter().flatten().next().unwrap_or_default()
    }

    async fn release(&self, instance: &Instance, primary: Option<&str>) -> Option<Value> {
        let mut more = vec![("id", &*self.id)];
        more.extend(primary.map(|primary| ("primary", primary)));
        let target = self.target("/api/handoff/release", &more);
        // One that does not hear it lets go by itself.
        let (_, body) = self.ask(instance, &target, HOLD).await.ok()?;
        body.get("primary").filter(|primary| primary.is_string()).cloned()
    }

    fn target(&self, path: &str, more: &[(&str, &str)]) -> String {
        let finish = self.wish.finish.map(millis);
        let is_hand_over = path == "/api/handoff";
        let wishes = [
            ("cluster", self.wish.cluster.as_deref()),
            ("from", self.wish.from.as_deref().filter(|_| is_hand_over)),
            ("to", self.wish.to.as_deref().filter(|_| is_hand_over)),
            ("finish", finish.as_deref().filter(|_| is_hand_over)),
        ];
        let wishes = wishes.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let all = wishes.chain(more.iter().copied()).map(|(key, value)| format!("{key}={value}"));
        format!("{path}?{}", all.collect::<Vec<_>>().join("&"))
    }

    async fn ask(
        &self,
        instance: &Instance,
        target: &str,
        limit: Duration,
    ) -> Result<(StatusCode, Value), String> {
        ask(instance.address, &Method::POST, target, limit).await
    }

    /// All instances there are now.
    async fn resolve(&self) -> Result<Vec<Instance>, String> {
        let mut all: Vec<Instance> = Vec::new();
        let mut add = |one: Instance| {
            if !all.iter().any(|known| known.address == one.address) {
                all.push(one);
            }
        };
        for name in &self.instances.admins {
            let addresses = addresses(name).await?;
            // One instance, by whichever of its addresses it answers.
            let mut at = addresses.first().copied();
            if addresses.len() > 1 {
                for address in &addresses {
                    if ask(*address, &Method::GET, "/livez", ANSWER).await.is_ok() {
                        at = Some(*address);
                        break;
                    }
                }
            }
            let address = at.ok_or_else(|| format!("{name} has no address"))?;
            add(Instance { name: name.as_str().into(), address });
        }
        for name in &self.instances.services {
            let mut addresses = addresses(name).await?;
            addresses.sort_unstable();
            for address in addresses {
                add(Instance { name: format!("{address} of {name}").into(), address });
            }
        }
        if all.len() > INSTANCES {
            return Err(format!("{} instances are more than {INSTANCES}", all.len()));
        }
        Ok(all)
    }

    /// An instance's own answer, with what is known of the others.
    fn passed_on(&self, instance: &Instance, status: StatusCode, mut body: Value) -> Answer {
        if body.get("outcome").is_none() {
            let detail = text(&body, "detail").to_owned();
            let why = format!("{}: {status}: {detail}", instance.name);
            return self.answer(Verdict::refused(why), &Value::Null);
        }
        body["instances"] = self.names();
        Answer { status, body }
    }

    fn answer(&self, verdict: Verdict, primary: &Value) -> Answer {
        let Verdict { outcome, failed, why } = verdict;
        let status = match outcome {
            "refused" => StatusCode::CONFLICT,
            _ => StatusCode::BAD_GATEWAY,
        };
        let mut body = json!({ "outcome": outcome, "why": why, "instances": self.names() });
        if let Some(step) = failed {
            body["failed"] = step.into();
            body["primary"] = primary.clone();
            body["from"] = self.wish.from.as_deref().into();
            body["to"] = self.wish.to.as_deref().into();
        }
        Answer { status, body }
    }

    fn names(&self) -> Value {
        self.all.iter().map(|one| Value::from(&*one.name)).collect()
    }
}

/// What an instance that was asked to hold answered.
fn read(status: StatusCode, body: &Value) -> Said {
    let seconds = |key| {
        let seconds = body.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    };
    let number = |key| body.get(key).and_then(Value::as_u64);
    let primary = body.get("primary").and_then(Value::as_str).map(str::to_owned);
    match (text(body, "outcome"), primary, number("in_flight")) {
        ("held", Some(primary), Some(in_flight)) => Said::Holds(Holding {
            instance: text(body, "instance").to_owned(),
            primary,
            in_flight,
            running: body.get("running").and_then(Value::as_array).cloned().unwrap_or_default(),
            held: number("held").unwrap_or(0),
            since: seconds("since_seconds"),
            left: seconds("ends_in_seconds").min(HOLD),
            at_most: seconds("at_most_seconds"),
        }),
        ("not-held", primary, _) => Said::LetGo { primary },
        ("refused", ..) => Said::Refuses(text(body, "why").to_owned()),
        _ => {
            let detail = body.get("detail").and_then(Value::as_str);
            Said::Refuses(format!("{status}: {}", detail.unwrap_or("is it another version?")))
        }
    }
}

async fn addresses(name: &str) -> Result<Vec<SocketAddr>, String> {
    let no = |why: &dyn Display| format!("{name} has no address: {why}");
    match timeout(RESOLVE, lookup_host(name)).await {
        Ok(Ok(found)) => {
            let found: Vec<_> = found.collect();
            if found.is_empty() { Err(no(&"the answer is empty")) } else { Ok(found) }
        }
        Ok(Err(error)) => Err(no(&error)),
        Err(_elapsed) => Err(no(&"no answer in time")),
    }
}

async fn ask(
    address: SocketAddr,
    method: &Method,
    target: &str,
    limit: Duration,
) -> Result<(StatusCode, Value), String> {
    let exchange = async {
        let host = address.to_string();
        let request = Request::builder().method(method).uri(target).header(header::HOST, host);
        let (response, _connection) = call::send(address, request).await?;
        let status = response.status();
        let body = call::read(response, LARGE).await?;
        Ok::<_, call::CallError>((status, serde_json::from_slice(&body).unwrap_or_default()))
    };
    match timeout(limit, exchange).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err("no answer in time".into()),
    }
}

fn millis(length: Duration) -> String {
    format!("{}ms", length.as_millis())
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn holds(primary: &str, in_flight: u64) -> Said {
        let running = json!([{
            "method": "POST", "path": "/upload", "node": "app-0", "seconds": 12.0,
        }]);
        let running = if in_flight == 0 { json!([]) } else { running };
        let body = json!({
            "outcome": "held", "instance": "litegate-1", "primary": primary,
            "in_flight": in_flight, "held": 3,
            "running": running, "ends_in_seconds": 8.0, "at_most_seconds": 22.5,
        });
        read(StatusCode::OK, &body)
    }

    fn judged(said: &[Said], finish: Option<Duration>, elapsed: Duration) -> Next {
        let names = ["a", "b", "c"].map(Arc::<str>::from);
        let said: Vec<_> = names.into_iter().zip(said.iter().cloned()).collect();
        next(&said, finish, elapsed)
    }

    fn given_up(next: Next) -> Verdict {
        match next {
            Next::GiveUp(verdict) => verdict,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_have_to_hold_and_have_finished() {
        let (idle, busy) = (holds("app-0", 0), holds("app-0", 1));
        let now = Duration::ZERO;
        assert_eq!(judged(&[idle.clone(), idle.clone()], None, now), Next::Go);
        assert_eq!(judged(&[idle.clone(), idle.clone()], None, 60 * SECOND), Next::Go);
        assert_eq!(judged(&[idle.clone(), busy.clone()], None, 9 * SECOND), Next::Wait);
        let late = given_up(judged(&[idle.clone(), busy.clone()], None, 10 * SECOND));
        assert_eq!((late.outcome, late.failed), ("failed", Some("finish writes")));
        assert_eq!(
            late.why,
            "after 10.0 s on b 1 write is still under way: POST /upload on app-0 for 12.0 s"
        );
        let longer = Some(15 * SECOND);
        assert_eq!(judged(&[idle.clone(), busy.clone()], longer, 14 * SECOND), Next::Wait);
        let shorter = Some(SECOND);
        assert_eq!(given_up(judged(&[idle, busy], shorter, SECOND)).outcome, "failed");
    }

    #[test]
    fn one_that_does_not_hold_is_named_with_what_to_do() {
        let idle = holds("app-0", 0);
        let one = |said: Said| given_up(judged(&[idle.clone(), said], None, SECOND));
        let unreached = one(Said::Unreached("connection refused".into()));
        assert_eq!(unreached.outcome, "unreached");
        assert!(
            unreached.why.starts_with("b is not reached (connection refused)"),
            "{unreached:?}"
        );
        let refused = one(Said::Refuses("a hand-over is under way already".into()));
        assert_eq!(refused.why, "b does not hold: a hand-over is under way already");
        assert_eq!(one(Said::LetGo { primary: None }).failed, Some("hold"));
        let torn = one(holds("app-1", 0));
        assert_eq!(torn.outcome, "refused");
        assert!(torn.why.contains("to a app-0 is primary, and to b app-1"), "{torn:?}");
        assert_eq!(given_up(judged(&[], None, SECOND)).outcome, "unreached");
        let too_long = given_up(judged(&[idle.clone(), idle], Some(60 * SECOND), SECOND));
        assert!(too_long.outcome == "refused" && too_long.why.contains("raise hold.timeout"));
    }

    #[test]
    fn what_is_not_understood_is_no_hold() {
        for body in [
            Value::Null,
            json!({ "detail": "GET / lists what there is" }),
            json!({ "outcome": "held", "in_flight": 0 }),
            json!({ "outcome": "held", "primary": "app-0" }),
            json!({ "outcome": "held", "primary": "app-0", "in_flight": -1 }),
        ] {
            assert!(matches!(read(StatusCode::OK, &body), Said::Refuses(_)), "{body}");
        }
        let body = json!({
            "outcome": "held", "primary": "a", "in_flight": 0, "ends_in_seconds": 1e300,
            "since_seconds": -1,
        });
        let Said::Holds(holding) = read(StatusCode::OK, &body) else { panic!("{body}") };
        assert_eq!((holding.left, holding.since), (Duration::ZERO, Duration::ZERO));
        assert_eq!(holding.at_most, Duration::ZERO);
    }

    proptest::proptest! {
        /// However late any message arrives: while the first may have LiteFS move the lease, all
        /// others hold.
        #[test]
        fn the_others_outlast_the_one_that_hands_over(
            // The first answers so long after it began, and the others are asked later.
            since in 0u64..20_000,
            // When each is asked after that, what is left of its hold's own bound then, and how
            // long it takes to answer.
            others in proptest::collection::vec((0u64..100_000, 0u64..22_500, 0u64..3000), 1..6),
        ) {
            let ms = Duration::from_millis;
            // All by a clock that begins when the first began to hold.
            let ends = |(asked, bound, _): &(u64, u64, u64)| ms(since + asked) + HOLD.min(ms(*bound));
            let left = others.iter().map(|other| {
                let answers = ms(since + other.0 + other.2);
                ends(other).saturating_sub(answers).min(HOLD)
            });
            let until = permitted(ms(since), left.min().unwrap());
            let first = others.iter().map(ends).min().unwrap();
            proptest::prop_assert!(until <= first, "{until:?} is after {first:?}");
        }
    }
}
