//! What one worker knows of each node: its idle connections, its places, its load.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use hyper::body::Body;
use tokio::{sync::Mutex, time::Instant};

use super::{Connection, Gate, H2};
use crate::{
    net::{
        proxy_protocol::Introduction,
        tls::{Connector, Tls},
    },
    topology::{NodeId, Topology},
};

/// This worker's share of what a node may be asked for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight.
    pub requests: usize,
    /// Requests that wait for a place.
    pub pending: usize,
    /// Idle connections kept.
    pub idle: usize,
    /// How long an idle connection is kept.
    pub idle_for: Duration,
}

/// A node as one worker uses it. `L` is what the balancer remembers of it.
#[derive(Debug)]
pub struct Upstream<B: Body + 'static, L> {
    /// The incarnation.
    pub id: NodeId,
    /// Its instance name.
    pub name: Arc<str>,
    /// Where it is.
    pub address: SocketAddr,
    /// How TLS is spoken with it. `None`: it is not.
    pub tls: Option<Connector>,
    /// Whether HTTP/2 was agreed on, the last time that either might have been.
    pub agreed_h2: Cell<Option<bool>>,
    /// Its places.
    pub gate: Rc<Gate>,
    /// What the balancer remembers.
    pub load: L,
    idle: RefCell<Vec<Box<Connection<B>>>>,
    /// Those that speak HTTP/2.
    shared: RefCell<Vec<Rc<H2<B>>>>,
    /// Who opens one: the others wait and use it.
    pub opening: Mutex<()>,
    limits: Limits,
    /// It has left the topology: connections that come back are closed.
    gone: Cell<bool>,
}

impl<B, L> Upstream<B, L>
where
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// The idle connection that was used last, if one is still good: the others grow old and are
    /// closed, so that a pool shrinks to what is needed. One that `speaks_for` somebody carries
    /// nobody else's requests.
    pub fn take_idle(
        &self,
        now: Instant,
        speaks_for: Option<Introduction>,
    ) -> Option<Box<Connection<B>>> {
        let mut idle = self.idle.borrow_mut();
        while let Some(last) = idle.iter().rposition(|c| c.speaks_for() == speaks_for) {
            let mut connection = idle.remove(last);
            if connection.idle_for(now) < self.limits.idle_for && connection.is_usable() {
                return Some(connection);
            }
        }
        None
    }

    /// An HTTP/2 connection with room for one more exchange.
    pub fn shared(&self, speaks_for: Option<Introduction>) -> Option<Box<Connection<B>>> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|h2| !h2.is_closed());
        let h2 = shared.iter().find(|h2| h2.has_room(speaks_for))?;
        Some(Box::new(Connection::sharing(h2, speaks_for, false)))
    }

    /// Lets others use it too. Over the limit of idle ones, the one idle longest is closed.
    pub fn share(&self, h2: &Rc<H2<B>>, now: Instant) {
        if self.gone.get() {
            return;
        }
        let mut shared = self.shared.borrow_mut();
        if shared.iter().filter(|h2| h2.is_idle()).count() >= self.limits.idle.max(1)
            && let Some(oldest) = (0..shared.len())
                .filter(|place| shared.get(*place).is_some_and(|h2| h2.is_idle()))
                .max_by_key(|place| shared.get(*place).map(|h2| h2.idle_for(now)))
        {
            shared.remove(oldest);
        }
        shared.push(Rc::clone(h2));
    }

    /// Keeps a connection for the next request. Over the limit, the one idle longest is closed.
    pub fn keep(&self, mut connection: Box<Connection<B>>, now: Instant) {
        if self.gone.get() || self.limits.idle == 0 || !connection.is_pooled() {
            return;
        }
        connection.rest(now);
        let mut idle = self.idle.borrow_mut();
        if idle.len() >= self.limits.idle {
            idle.remove(0);
        }
        idle.push(connection);
    }

    /// Closes connections that have been idle for too long.
    pub fn prune(&self, now: Instant) {
        self.idle.borrow_mut().retain(|c| c.idle_for(now) < self.limits.idle_for);
        let is_kept = |h2: &Rc<H2<B>>| !h2.is_closed() && h2.idle_for(now) < self.limits.idle_for;
        self.shared.borrow_mut().retain(is_kept);
    }

    /// How many connections are idle.
    pub fn idle(&self) -> usize {
        let shared = self.shared.borrow();
        self.idle.borrow().len() + shared.iter().filter(|h2| h2.is_idle()).count()
    }
}

/// All nodes of one cluster as one worker uses them, in the order of the snapshot.
#[derive(Debug)]
pub struct Upstreams<B: Body + 'static, L> {
    generation: Cell<Option<u64>>,
    nodes: RefCell<Vec<Rc<Upstream<B, L>>>>,
    limits: Limits,
    tls: Option<Arc<Tls>>,
}

impl<B, L> Upstreams<B, L>
where
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// For one cluster. `tls`: how it is spoken with its nodes.
    pub fn new(limits: Limits, tls: Option<Arc<Tls>>) -> Self {
        Self { generation: Cell::new(None), nodes: RefCell::default(), limits, tls }
    }

    /// Follows the snapshot: pools of departed incarnations are closed, new ones begin with
    /// `load`. Afterwards [`Upstreams::get`] has the snapshot's indices. Costs a comparison when
    /// nothing has changed.
    pub fn follow(&self, topology: &Topology, mut load: impl FnMut(&crate::topology::Node) -> L) {
        if self.generation.get() == Some(topology.generation) {
            return;
        }
        self.generation.set(Some(topology.generation));
        let mut old = std::mem::take(&mut *self.nodes.borrow_mut());
        let new = topology.nodes.iter().map(|node| {
            let known = old.iter().position(|up| {
                up.id == node.id && up.address == node.address && up.name == node.name
            });
            match known {
                Some(index) => old.swap_remove(index),
                None => Rc::new(Upstream {
                    id: node.id,
                    // A copy: counting references to one string from every core would share a
                    // cache line between them.
                    name: Arc::from(&*node.name),
                    address: node.address,
                    tls: self.tls.as_ref().map(Connector::new),
                    agreed_h2: Cell::new(None),
                    gate: Gate::new(self.limits.requests, self.limits.pending),
                    load: load(node),
                    idle: RefCell::default(),
                    shared: RefCell::default(),
                    opening: Mutex::default(),
                    limits: self.limits,
                    gone: Cell::new(false),
                }),
            }
        });
        *self.nodes.borrow_mut() = new.collect();
        for departed in old {
            departed.gone.set(true);
            departed.idle.borrow_mut().clear();
            departed.shared.borrow_mut().clear();
        }
    }

    /// The node at this place of the snapshot last followed.
    pub fn get(&self, index: usize) -> Option<Rc<Upstream<B, L>>> {
        self.nodes.borrow().get(index).cloned()
    }

    /// Looks at every node.
    pub fn each(&self, look: impl FnMut(&Rc<Upstream<B, L>>)) {
        self.nodes.borrow().iter().for_each(look);
    }
}
