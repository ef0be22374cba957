//! What a request's client has to see: the position of its last write, or what it asks for itself.
//!
//! Nothing here is paid for by a client that carries neither a token nor a wish.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use super::{
    causal::Last,
    cluster::{Cluster, Lineage},
};
use crate::{
    config::cluster::{Mode, OnRequest},
    decide::{
        self, Class, Consistency, Demands, Problem, Wanted, classify,
        strict::Peculiar,
        token::{self, Need, Standing, Token, Void},
    },
    topology::position::{Position, Positions, Reach},
};

/// The longest that an exact reading is waited for, where nothing else says how long.
pub(super) const EXACT: Duration = Duration::from_secs(1);

/// How long the feed may be behind an exact reading.
const FEED: Duration = Duration::from_millis(100);

/// What became of a client's token.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Session {
    /// What it must not read the past of.
    pub(super) need: Option<Need>,
    /// The client's last write came after `need`, and nobody knows how far.
    beyond: bool,
    /// The primaries by which `need` was judged.
    judged_by: Option<Lineage>,
    /// What the last write to the same place needs, on a route whose reads see it.
    pub(super) last: Option<Arc<Last>>,
    /// Its write was lost in a failover, and it is told so with this answer.
    pub(super) lost: bool,
    /// The cluster has not told its id yet, so that nobody can say what a token is worth: until
    /// then only the primary is sure to be far enough.
    pub(super) unread: bool,
    /// LiteFS's cookie asks for what will never be: it must not reach a node.
    pub(super) drop_txid: bool,
    /// Until when a replica is waited for. Set when that begins.
    pub(super) wait_until: Option<Instant>,
}

/// Milliseconds since the Unix epoch.
pub(super) fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Reads what `headers`, among which is what is `peculiar`, carry for this cluster. What a read has to
/// find is noted in `request`.
///
/// # Errors
/// [`Problem::BadDemand`].
pub(super) async fn of(
    headers: &HeaderMap,
    peculiar: Peculiar,
    trusted: bool,
    cluster: &Cluster,
    cookie: &str,
    scope: Option<u64>,
    request: &mut decide::Request,
) -> Result<Option<Box<Session>>, Problem> {
    let rules = &cluster.config.consistency;
    let is_heeded = match rules.on_request {
        OnRequest::Any => peculiar.addressed,
        OnRequest::Trusted => peculiar.addressed && trusted,
        OnRequest::Off => false,
    };
    let mut asked = Consistency::Session;
    if is_heeded {
        let demand = classify::demanded(headers)?;
        asked = demand.consistency;
        request.demands.staleness = demand.staleness;
    }
    let mut session = Session::default();
    if rules.mode != Mode::Off && asked != Consistency::Any {
        let carries = peculiar.cookies || peculiar.addressed;
        let carried = carries.then(|| token::carried(headers, cookie, peculiar.addressed));
        let carried = carried.unwrap_or_default();
        if carried.token.is_some() && rules.mode == Mode::Token && !cluster.has_key() {
            session.unread = true;
        } else if let Some(text) = carried.token {
            match cluster.read_token(text) {
                Ok(Token::Need(need)) => session.judge(cluster, need).await,
                Ok(Token::Affinity(until)) => request.demands.primary = unix_millis() < until,
                Ok(Token::Blind { need, beyond, until }) => {
                    session.beyond = beyond && rules.databases.is_empty();
                    session.judge(cluster, need).await;
                    request.demands.primary = unix_millis() < until;
                }
                Err(void) => cluster.void(void),
            }
        }
        if session.need.is_none()
            && !session.unread
            && let Some(text) = carried.txid
        {
            session.judge_txid(cluster, text).await;
        }
    }
    if request.class == Class::Read {
        if let Some(scope) = scope.filter(|_| asked != Consistency::Any) {
            session.see(cluster, scope, request);
        }
        request.demands.position = session.needs() || session.unread;
        if asked == Consistency::Primary && request.wanted == Wanted::Any {
            request.wanted = Wanted::Primary;
        }
    }
    let is_empty = !session.needs() && !session.lost && !session.unread && !session.drop_txid;
    let is_idle = is_empty && request.demands == Demands::default();
    Ok((!is_idle).then(|| Box::new(session)))
}

impl Session {
    /// Whether the node has to be at some position.
    pub(super) fn needs(&self) -> bool {
        self.need.is_some() || self.last.is_some()
    }

    /// Whether a node's history contains all that is needed.
    pub(super) fn reach(&self, node: &Positions, primary: Option<&Positions>) -> Reach {
        let last = self.last.as_ref().and_then(|last| last.need.as_ref());
        if let (Some(need), None) = (&self.need, last) {
            return need.is_reached(node, primary);
        }
        let needs = self.need.iter().chain(last);
        needs.fold(Reach::Reached, |reach, need| reach.and(need.is_reached(node, primary)))
    }

    /// The last write to the same place, by whomever.
    fn see(&mut self, cluster: &Cluster, scope: u64, request: &mut decide::Request) {
        let Some(last) = cluster.last_writes.last(scope) else { return };
        let Some(need) = &last.need else {
            let affinity = cluster.config.consistency.affinity;
            request.demands.primary |= last.is_blind(affinity, Instant::now().into_std());
            return;
        };
        let standing = cluster.history(|lineage, primary| {
            let known = primary.map(|progress| progress.get());
            token::judge(need, lineage, known.as_deref().map(|known| &**known))
        });
        // What a failover lost is nobody's last write any more.
        if standing != Standing::Gone {
            self.last = Some(last);
        }
    }

    /// Whether what a token stands for still is, asking the primary where only it can tell.
    async fn judge(&mut self, cluster: &Cluster, need: Need) {
        cluster.hear_of(&need).await;
        let (mut standing, by) = standing(cluster, &need).await;
        if self.beyond && token::is_lost_beyond(&need, &by) {
            standing = Standing::Gone;
        }
        self.judged_by = Some(by);
        match standing {
            Standing::Stands => self.need = Some(need),
            Standing::Gone | Standing::Ahead => {
                cluster.void(Void::Lost);
                self.lost = true;
            }
        }
    }

    /// LiteFS's cookie: a number that anybody can make up, and that says nothing of its history.
    async fn judge_txid(&mut self, cluster: &Cluster, text: &[u8]) {
        let Some(txid) = Position::parse_hex(text) else {
            return cluster.void(Void::Malformed);
        };
        let database = cluster.primary_positions().and_then(|known| known.only());
        let Some((database, _)) = database.filter(|_| txid > 0) else { return };
        let position = Position { txid, checksum: 0 };
        let need = Need { lineage: None, databases: [(database, position)].into_iter().collect() };
        match standing(cluster, &need).await.0 {
            Standing::Stands => self.need = Some(need),
            Standing::Gone | Standing::Ahead => {
                cluster.void(Void::Future);
                self.drop_txid = true;
            }
        }
    }

    /// Looks again after a wait, or when there is an answer: there may be another primary now,
    /// whose history lacks it.
    pub(super) async fn judge_again(&mut self, cluster: &Cluster) {
        let is_judged = |by| cluster.history(|lineage, _| Rc::ptr_eq(by, lineage));
        let is_judged = self.judged_by.as_ref().is_some_and(is_judged);
        if let Some(need) = self.need.take_if(|need| !is_judged && need.lineage.is_some()) {
            self.judge(cluster, need).await;
        }
    }
}

/// Whether it stands, and the primaries by which that was judged.
async fn standing(cluster: &Cluster, need: &Need) -> (Standing, Lineage) {
    let (first, by, primary) = cluster.history(|lineage, primary| {
        let known = primary.map(|progress| progress.get());
        let first = token::judge(need, lineage, known.as_deref().map(|known| &**known));
        // Asked only where what is known does not tell.
        let primary = primary.filter(|_| first == Standing::Ahead).cloned();
        (first, Rc::clone(lineage), primary)
    });
    if first != Standing::Ahead {
        return (first, by);
    }
    // Perhaps only the feed is late.
    let Some(progress) = primary else { return (Standing::Stands, by) };
    cluster.counted(|cells| cells.exact.add(1));
    let standing = match timeout_at(Instant::now() + EXACT, progress.exact()).await {
        Ok(Some(exact)) => match need.reach(&exact) {
            Reach::Reached => Standing::Stands,
            Reach::NotYet => Standing::Ahead,
            Reach::Diverged => Standing::Gone,
            // The reading is past it. What was on the way there the feed tells in a moment.
            Reach::Unknown => fed(cluster, need).await,
        },
        // Nobody can say: then nothing speaks against it.
        Ok(None) | Err(_) => Standing::Stands,
    };
    (standing, by)
}

/// What the feed tells, which is behind an exact reading for a moment at most.
async fn fed(cluster: &Cluster, need: &Need) -> Standing {
    let look = || {
        cluster.history(|lineage, primary| {
            let known = primary.map(|progress| progress.get());
            token::judge(need, lineage, known.as_deref().map(|known| &**known))
        })
    };
    let bell = cluster.history(|_, primary| primary.map(|progress| Arc::clone(progress.bell())));
    let listening = bell.and_then(|bell| bell.listen(cluster.config.hold.max_requests));
    let deadline = Instant::now() + FEED;
    let mut standing = look();
    if let Some(mut listening) = listening {
        while standing == Standing::Ahead {
            if timeout_at(deadline, listening.rung()).await.is_err() {
                break;
            }
            standing = look();
        }
    }
    match standing {
        Standing::Gone => Standing::Gone,
        Standing::Stands | Standing::Ahead => Standing::Stands,
    }
}

/// The name of the cookie, for the only cluster or for one of several.
pub(super) fn cookie_name(cluster: &str, is_only: bool, secure: bool) -> String {
    let prefix = if secure { "__Host-" } else { "" };
    // A cluster's name is a TOML key: what a cookie's name can't have is left out.
    let name: String = cluster.chars().filter(char::is_ascii_alphanumeric).collect();
    if is_only { format!("{prefix}litegate") } else { format!("{prefix}litegate-{name}") }
}
