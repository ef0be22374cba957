//! What clients were told, and whether they may be told that.
//!
//! A failure is permitted only if a fault was in force at some moment of its request that the table
//! of outcomes ([`permits`]; design section 4.4) has that end for. A fault is in force until litegate
//! itself shows the cluster whole again. Judged is at the end of a cycle, when every fault is known.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::cluster::Ids;

/// Longer than a lease takes to move on a busy machine; in the configuration as `hold.timeout`.
pub(crate) const HOLD: Duration = Duration::from_secs(50);

/// How long before a primary was lost what it had acknowledged may not have left it yet.
const TAIL: Duration = Duration::from_secs(20);

/// How long after a primary's end its WebSockets may be told: `timeouts.tunnel_close`, and a machine
/// with other things to do.
const CLOSING: Duration = Duration::from_secs(10);

/// So many failures are described; all are counted.
const DESCRIBED: usize = 40;

/// What is wrong.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    /// Killed by SIGKILL, until it serves again.
    Killed,
    /// SIGTERM, until it serves again.
    Ended,
    /// SIGSTOP.
    Frozen,
    /// Connections to its app are closed, those that are there and those that come.
    Cut,
    /// Nothing passes to and from its app, and nobody is told.
    Silent,
    /// Its app answers late and in small pieces.
    Slow,
    /// Its app's answers are not what the app said.
    Lying,
    /// A replica's LiteFS says that it is primary.
    Claiming,
    /// Nothing passes to and from its LiteFS's API.
    Mute,
    /// The primary moves because litegate is asked to.
    HandedOver,
    /// litegate can't ask Consul.
    Unlisted,
    /// LiteFS lost its lease, or ended, and nobody had asked for it.
    Deposed,
    /// The gRPC node can't be reached, or says nothing.
    Rpc,
}

/// A fault on one node.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) node: String,
    /// It is primary.
    pub(crate) primary: bool,
    pub(crate) from: Instant,
    pub(crate) until: Option<Instant>,
}

/// What was asked for, as far as it decides what may fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Class {
    /// May be repeated as often as it takes, on any node.
    Read,
    /// The same, of a client that has written.
    OwnRead,
    /// May not be repeated.
    Write,
    /// The same, with more of a body than is kept.
    Upload,
    /// A WebSocket that may write.
    Socket,
    /// A WebSocket that only reads.
    Watch,
    /// A call over gRPC that may be repeated.
    Call,
    /// One that may not.
    Stream,
}

/// How a request ended for its client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum End {
    /// All that was promised.
    Fine,
    /// An answer that says that it failed: the status and why.
    Refused(u16, String),
    /// The head was there, and then the body visibly broke off.
    Cut(String),
    /// A WebSocket was closed with this code.
    Closed(u16),
    /// The relay's own lie that nobody can see through, and that it has marked.
    Deceived,
    /// Anything else: nothing permits it.
    Wrong(String),
}

/// One request, or one exchange on a socket.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) protocol: &'static str,
    pub(crate) class: Class,
    pub(crate) what: String,
    /// Who answered, where the answer says so.
    pub(crate) node: Option<String>,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

/// Whether this fault, in force at the time, explains the end.
fn permits(fault: &Fault, asked: &Asked, end: &End) -> bool {
    use Kind::{Cut, Deposed, Ended, Frozen, HandedOver, Killed, Lying, Mute, Rpc, Silent};
    let lost = matches!(fault.kind, Killed | Frozen | Deposed);
    let broken = lost || matches!(fault.kind, Cut | Silent | Lying);
    let writes = matches!(asked.class, Class::Write | Class::Upload | Class::Socket);
    let of_its_node = asked.node.as_deref() == Some(&*fault.node);
    match end {
        End::Refused(502 | 504, word) => match &**word {
            // Sent, and never sent again.
            "maybe_executed" | "response_timeout" | "bad_response" if writes => {
                fault.primary && broken
            }
            "replay_body" => {
                asked.class == Class::Upload && (fault.kind == Lying || fault.primary && broken)
            }
            "replay_target" | "bad_replay" | "too_many_hops" => fault.kind == Lying,
            "connect_failed" | "node_closed" | "maybe_executed" | "response_timeout" => {
                asked.class == Class::Stream && fault.kind == Rpc
            }
            _ => false,
        },
        End::Refused(503, word) => match &**word {
            "no_primary" if writes => {
                asked.ended - asked.began >= HOLD && (fault.primary && broken || fault.kind == Mute)
            }
            // Nobody else has what it has written.
            "not_caught_up" => {
                asked.class == Class::OwnRead && (fault.primary && broken || fault.kind == Mute)
            }
            _ => false,
        },
        // The app's own: its database went away under it, or a forged replay led to a replica.
        End::Refused(500, _) => writes && (fault.primary && lost || fault.kind == Lying),
        End::Refused(..) | End::Fine | End::Wrong(_) => false,
        End::Cut(_) => match asked.class {
            Class::Call => false,
            Class::Stream => fault.kind == Rpc,
            Class::Socket | Class::Watch if fault.kind == Ended => of_its_node,
            _ => broken && of_its_node,
        },
        End::Closed(1012) => {
            asked.class == Class::Socket
                && fault.primary
                && (broken || matches!(fault.kind, HandedOver | Ended | Mute))
        }
        End::Closed(_) => false,
        End::Deceived => fault.kind == Lying,
    }
}

/// One line of the closing table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Row {
    pub(crate) requests: usize,
    pub(crate) fine: usize,
    /// By kind of end and of fault.
    pub(crate) permitted: BTreeMap<String, usize>,
    pub(crate) forbidden: usize,
}

/// A write that a client was told to be done.
#[derive(Clone, Debug)]
struct Acknowledged {
    at: Instant,
    node: String,
}

#[derive(Debug, Default)]
struct Book {
    rows: BTreeMap<&'static str, Row>,
    faults: Vec<Fault>,
    /// Ends that have to be explained.
    open: Vec<(Asked, End)>,
    acknowledged: HashMap<String, Acknowledged>,
    /// Writes that failed, and whether they were said to be `not-committed`.
    refused: HashMap<String, bool>,
    lost: usize,
    told_lost: usize,
    verdicts: Vec<String>,
    /// Of them and of those that are not described.
    breaches: usize,
}

/// All clients tell it; one per run.
#[derive(Debug, Default)]
pub(crate) struct Judge(Mutex<Book>);

impl Judge {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on.
    pub(crate) fn fault(&self, kind: Kind, node: &str, primary: bool) -> usize {
        self.fault_since(kind, node, primary, Instant::now())
    }

    /// Since `from`: for what is only noticed afterwards.
    pub(crate) fn fault_since(
        &self,
        kind: Kind,
        node: &str,
        primary: bool,
        from: Instant,
    ) -> usize {
        let mut book = self.book();
        book.faults.push(Fault { kind, node: node.to_owned(), primary, from, until: None });
        book.faults.len() - 1
    }

    /// All is well again.
    pub(crate) fn healed(&self) {
        let now = Instant::now();
        for fault in &mut self.book().faults {
            fault.until.get_or_insert(now);
        }
    }

    /// A client says how a request ended.
    pub(crate) fn say(&self, asked: Asked, end: End) {
        let mut book = self.book();
        let row = book.rows.entry(asked.protocol).or_default();
        row.requests += 1;
        if end == End::Fine {
            row.fine += 1;
        } else {
            book.open.push((asked, end));
        }
    }

    /// A write was answered with success, after `node` had done it.
    pub(crate) fn acknowledged(&self, id: String, node: &str) {
        let write = Acknowledged { at: Instant::now(), node: node.to_owned() };
        self.book().acknowledged.insert(id, write);
    }

    /// A write was not answered with success.
    pub(crate) fn refused(&self, id: String, not_committed: bool) {
        self.book().refused.insert(id, not_committed);
    }

    /// A client was told that a write of its is lost.
    pub(crate) fn told_lost(&self) {
        self.book().told_lost += 1;
    }

    /// Something is wrong that no client has seen.
    pub(crate) fn breach(&self, what: String) {
        self.book().breach(what);
    }

    /// Requests so far, and how many of them did not end well.
    pub(crate) fn progress(&self) -> (usize, usize) {
        let book = self.book();
        let all = |of: fn(&Row) -> usize| book.rows.values().map(of).sum::<usize>();
        let requests = all(|row| row.requests);
        (requests, requests - all(|row| row.fine))
    }

    /// Judges what is open: every request that has ended, when all faults are known.
    pub(crate) fn close(&self) {
        let mut book = self.book();
        for (asked, end) in std::mem::take(&mut book.open) {
            let later = if end == End::Closed(1012) { CLOSING } else { Duration::ZERO };
            let explains = |fault: &&Fault| {
                let overlaps = fault.from <= asked.ended
                    && fault.until.is_none_or(|until| until + later >= asked.began);
                overlaps && permits(fault, &asked, &end)
            };
            let fault = book.faults.iter().find(explains).map(|fault| fault.kind);
            let row = book.rows.entry(asked.protocol).or_default();
            if let Some(kind) = fault {
                *row.permitted.entry(format!("{kind:?}: {}", end.word())).or_default() += 1;
            } else {
                row.forbidden += 1;
                let around: Vec<String> = book
                    .faults
                    .iter()
                    .filter(|f| f.from <= asked.ended && f.until.is_none_or(|u| u >= asked.began))
                    .map(|f| {
                        format!(
                            "{:?} {}{}",
                            f.kind,
                            f.node,
                            if f.primary { " (primary)" } else { "" }
                        )
                    })
                    .collect();
                let took = asked.ended - asked.began;
                let Asked { protocol, class, what, node, .. } = &asked;
                book.breach(format!(
                    "{protocol} {class:?} {what} on {node:?} after {took:?}: {end:?}; in force: {around:?}"
                ));
            }
        }
    }

    /// Compares what clients were told with what all nodes have, when nobody writes.
    pub(crate) fn compare(&self, ids: &Ids, counted_lost: f64) {
        let mut book = self.book();
        for (id, count) in ids {
            if id == crate::abuse::NEVER {
                book.breach(format!(
                    "{count} writes that were broken off ran as if they were whole"
                ));
            } else if count != 1 {
                book.breach(format!("write {id} was executed {count} times"));
            }
        }
        let missing: Vec<(String, Acknowledged)> = book
            .acknowledged
            .iter()
            .filter(|(id, _)| !ids.contains_key(*id))
            .map(|(id, write)| (id.clone(), write.clone()))
            .collect();
        for (id, write) in missing {
            book.acknowledged.remove(&id);
            // Replication is asynchronous: a primary takes along what had not left it yet.
            let explains = |fault: &&Fault| {
                matches!(fault.kind, Kind::Killed | Kind::Frozen | Kind::Deposed)
                    && fault.node == write.node
                    && fault.from <= write.at + TAIL
                    && fault.until.is_none_or(|until| until >= write.at)
            };
            if book.faults.iter().any(|fault| explains(&fault)) {
                book.lost += 1;
            } else {
                book.breach(format!("acknowledged write {id} of {} is lost", write.node));
            }
        }
        let lies: Vec<String> = book
            .refused
            .iter()
            .filter(|(id, not_committed)| **not_committed && ids.contains_key(*id))
            .map(|(id, _)| id.clone())
            .collect();
        for id in lies {
            book.breach(format!("write {id} was said not to be committed, and is there"));
        }
        if book.lost as f64 > counted_lost {
            let lost = book.lost;
            book.breach(format!(
                "{lost} acknowledged writes are lost, and litegate counts {counted_lost}"
            ));
        }
    }

    /// The closing table, and whether all is as promised.
    pub(crate) fn verdict(&self) -> (String, bool) {
        use std::fmt::Write as _;
        let book = self.book();
        let mut text = format!(
            "{:<22} {:>9} {:>9} {:>10} {:>10}\n",
            "protocol", "requests", "fine", "permitted", "forbidden"
        );
        let mut all = Row::default();
        let mut kinds: BTreeMap<&String, usize> = BTreeMap::new();
        let mut line = |name: &str, row: &Row| {
            let permitted: usize = row.permitted.values().sum();
            let _ = writeln!(
                text,
                "{name:<22} {:>9} {:>9} {permitted:>10} {:>10}",
                row.requests, row.fine, row.forbidden
            );
        };
        for (name, row) in &book.rows {
            line(name, row);
            all.requests += row.requests;
            all.fine += row.fine;
            all.forbidden += row.forbidden;
            for (kind, count) in &row.permitted {
                *kinds.entry(kind).or_default() += count;
                *all.permitted.entry(kind.clone()).or_default() += count;
            }
        }
        line("all", &all);
        text.push_str("\npermitted, by fault and end:\n");
        for (kind, count) in &kinds {
            let _ = writeln!(text, "{count:>9}  {kind}");
        }
        let mut faults: BTreeMap<String, usize> = BTreeMap::new();
        for fault in &book.faults {
            let of = if fault.primary { " (primary)" } else { "" };
            *faults.entry(format!("{:?}{of}", fault.kind)).or_default() += 1;
        }
        let _ = writeln!(text, "\nfaults: {faults:?}");
        let _ = writeln!(
            text,
            "writes: {} acknowledged and there, {} refused, {} lost with their primary, clients were told of {}",
            book.acknowledged.len(),
            book.refused.len(),
            book.lost,
            book.told_lost,
        );
        if book.breaches > 0 {
            let _ = writeln!(text, "\n{} breaches, the first:", book.breaches);
            for verdict in &book.verdicts {
                let _ = writeln!(text, "  {verdict}");
            }
        }
        (text, book.breaches == 0)
    }
}

impl Book {
    fn breach(&mut self, what: String) {
        self.breaches += 1;
        if self.verdicts.len() < DESCRIBED {
            eprintln!("BREACH {what}");
            self.verdicts.push(what);
        }
    }
}

impl End {
    /// In a word or two.
    fn word(&self) -> String {
        match self {
            Self::Fine => "fine".to_owned(),
            Self::Refused(500, _) => "500 of the app".to_owned(),
            Self::Refused(status, word) => format!("{status} {word}"),
            Self::Cut(_) => "visibly broken off".to_owned(),
            Self::Closed(code) => format!("socket closed with {code}"),
            Self::Deceived => "marked lie".to_owned(),
            Self::Wrong(what) => what.clone(),
        }
    }
}
