//! What happened, in the judge's words: plain values, so that a history can be made up in a test,
//! and mutated.

use std::{fmt, sync::Arc, time::Duration};

/// What kind of thing a key names.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Holds every value that was appended to it, in any order. Anybody appends.
    List,
    /// Holds the value that was set last. One client sets it, to growing numbers, and leaves it
    /// for another register after the first write whose end it does not know.
    Register,
}

/// A list or a register of the deployment under test.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// Which of the two.
    pub kind: Kind,
    /// Which of those that are in use at a time.
    pub slot: u32,
    /// Grows when a slot begins anew, so that no key grows for ever.
    pub generation: u32,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::List => "list",
            Kind::Register => "register",
        };
        write!(f, "{kind}-{}-{}", self.slot, self.generation)
    }
}

/// A value that is written once in a run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Value {
    /// Who wrote it.
    pub client: u32,
    /// Grows with every write of that client.
    pub number: u32,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}n{}", self.client, self.number)
    }
}

/// What a client does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    /// Appends to a list, or sets a register.
    Write(Key, Value),
    /// Reads a list or a register.
    Read(Key),
}

impl Operation {
    /// The key that it is about.
    pub fn key(self) -> Key {
        match self {
            Self::Write(key, _) | Self::Read(key) => key,
        }
    }
}

/// How an operation ended, as far as its client can know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// A write: success, with what the contract says in it.
    Acknowledged,
    /// A write: success, and nothing in it. The client believes a lie, or an app without a word.
    Empty,
    /// A write: nobody knows. It may have run once or not at all, or may still run.
    Ambiguous(Arc<str>),
    /// A write: somebody vouches that it did not run (`Litegate-Write-Outcome: not-committed`).
    Denied(Arc<str>),
    /// A read: these values were there, as often and in the order as they stood there.
    Values(Vec<Value>),
    /// A read: no answer, or an error.
    Failed(Arc<str>),
}

/// The end of an operation, and what came along with the answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct End {
    /// How it ended.
    pub outcome: Outcome,
    /// The status code, if there was an answer.
    pub status: Option<u16>,
    /// Which node served it, if the answer tells.
    pub node: Option<Arc<str>>,
    /// Which proxies the answer passed, if it tells.
    pub via: Option<Arc<str>>,
    /// Which of the URLs it went to.
    pub instance: u32,
    /// `fly-replay` has come through to the client.
    pub leaked: bool,
    /// `Litegate-Write-Lost`: the client is told that writes of its own are gone.
    pub told_lost: bool,
}

impl End {
    /// An end with nothing known but its outcome.
    pub fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            status: None,
            node: None,
            via: None,
            instance: 0,
            leaked: false,
            told_lost: false,
        }
    }
}

/// One entry of a history. Times are since its beginning, and never go backwards. A client has one
/// operation at a time.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// A client sends something.
    Began {
        /// When.
        at: Duration,
        /// Who.
        client: u32,
        /// What.
        operation: Operation,
    },
    /// The client has its answer, or has given up on it.
    Ended {
        /// When.
        at: Duration,
        /// Who.
        client: u32,
        /// How.
        end: End,
    },
    /// Nobody reads or writes this key any more, up to the last look at it.
    Closed {
        /// Which.
        key: Key,
    },
    /// The last look at a key, after everything.
    Last {
        /// When.
        at: Duration,
        /// Which.
        key: Key,
        /// What is in it.
        values: Vec<Value>,
    },
}
