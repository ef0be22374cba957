//! What happened to a request, told once, when its answer is over: to the counters, and to the
//! access log.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use http::{Method, StatusCode};
use smallvec::SmallVec;

use crate::{
    decide::{Because, Class, Problem},
    server::Conn,
    telemetry::{
        access_log::{Entry, Line, Sink, Tried},
        metrics::{Finished, Shard},
    },
};

/// The account of one request. Dropping it closes it.
#[derive(Debug)]
pub struct Account {
    conn: Rc<Conn>,
    shard: Arc<Shard>,
    /// `None` where nothing is logged.
    log: Option<Rc<Sink>>,
    facts: Facts,
    sent: Cell<u64>,
    /// The last byte of the answer is on its way.
    complete: Cell<bool>,
    broken: Cell<bool>,
    closed: bool,
}

/// What is known of a request when its answer begins.
#[derive(Debug)]
pub struct Facts {
    /// Method, and for the log the target and what the client says of itself.
    pub method: Method,
    /// Only where it is logged.
    pub line: Option<Box<Line>>,
    /// The cluster's place and name, if a route was found.
    pub cluster: Option<(usize, Arc<str>)>,
    /// The route's place in the file.
    pub route: Option<usize>,
    /// Read or write.
    pub class: Option<Class>,
    /// Why.
    pub because: Option<Because>,
    /// Every attempt.
    pub tries: SmallVec<[Tried; 2]>,
    /// How long it was held.
    pub held: Duration,
    /// What the client gets.
    pub status: StatusCode,
    /// If litegate answers itself.
    pub problem: Option<Problem>,
    /// Body bytes from the client.
    pub received: u64,
}

impl Account {
    /// Opens it.
    pub fn new(conn: Rc<Conn>, shard: Arc<Shard>, log: Option<Rc<Sink>>, facts: Facts) -> Self {
        Self {
            conn,
            shard,
            log,
            facts,
            sent: Cell::new(0),
            complete: Cell::new(false),
            broken: Cell::new(false),
            closed: false,
        }
    }

    /// The client's connection.
    pub fn conn(&self) -> &Rc<Conn> {
        &self.conn
    }

    /// More of the body was handed over.
    pub fn sent(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }

    /// The answer is whole.
    pub fn completed(&self) {
        self.complete.set(true);
    }

    /// The node stopped in the middle of the answer.
    pub fn broke_off(&self) {
        self.broken.set(true);
    }

    fn close(&mut self) {
        let began = self.conn.request_began();
        let now = self.conn.response_ended();
        let duration = now.saturating_duration_since(began);
        self.shard.request_ended(self.conn.origin.listener);
        let facts = &mut self.facts;
        self.shard.request_finished(&Finished {
            listener: self.conn.origin.listener,
            cluster: facts.cluster.as_ref().map(|(index, _)| *index),
            class: facts.class,
            method: Some(&facts.method),
            status: facts.status,
            duration,
            received: facts.received,
            sent: self.sent.get(),
            problem: facts.problem,
        });
        if let (Some(log), Some(line)) = (&self.log, facts.line.take()) {
            log.push(Entry {
                time: std::time::SystemTime::now(),
                peer: self.conn.origin.peer,
                method: Some(facts.method.clone()),
                line,
                cluster: facts.cluster.take().map(|(_, name)| name),
                route: facts.route,
                class: facts.class,
                because: facts.because,
                tries: std::mem::take(&mut facts.tries),
                held: facts.held,
                status: facts.status,
                problem: facts.problem,
                received: facts.received,
                sent: self.sent.get(),
                duration,
                complete: self.complete.get() && !self.broken.get(),
            });
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            self.close();
        }
    }
}
