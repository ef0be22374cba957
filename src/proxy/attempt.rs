//! One try on one node: a connection, the request, the head of the answer.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use hyper::body::{Body as _, Incoming};
use tokio::time::{Instant, timeout};

use super::{
    body::{RequestBody, Upload},
    hold,
};
use crate::{
    decide::{Failure, FailureKind, Problem},
    net::{
        proxy_protocol::Introduction,
        tls::{Offer, refusal},
    },
    server::Conn,
    upstream::{self, Connection, Opened, Place},
};

/// How long a client that expects `100 Continue` is kept waiting for a node that says nothing:
/// a node may not know the expectation, and RFC 9110 section 10.1.1 has the client send its body
/// then as well.
const CONTINUE: Duration = Duration::from_secs(1);
/// Between two looks at whether the node still is what it was: just over the connection's own
/// tick, so that a short request costs no timer.
const LOOK: Duration = Duration::from_millis(1001);
/// How long a node that is not gets to answer nevertheless: its app may be about to say why.
const GRACE: Duration = Duration::from_secs(2);

/// A node as this worker knows it.
pub(super) type Node = upstream::Upstream<RequestBody, super::cluster::Load>;

/// A connection on which an answer is arriving, and everything that is held until it is complete.
#[derive(Debug)]
pub(super) struct Connected {
    /// `None` once it was put back or given up.
    connection: Option<Box<Connection<RequestBody>>>,
    pub(super) node: Rc<Node>,
    /// Kept until the answer is complete: the node is busy that long.
    #[expect(dead_code, reason = "held until the answer is complete, never read")]
    places: Places,
}

/// What an attempt occupies.
#[derive(Debug)]
#[expect(dead_code, reason = "a place is held, not read")]
pub(super) struct Places {
    /// On the node.
    pub(super) node: Place,
    /// Among the writes that a hand-over waits for.
    pub(super) lane: Option<hold::OnItsWay>,
    /// Among the released.
    pub(super) held: Option<hold::Place>,
}

impl Connected {
    /// An answer arrives on `connection`.
    pub(super) fn new(
        connection: Box<Connection<RequestBody>>,
        node: Rc<Node>,
        places: Places,
    ) -> Self {
        Self { connection: Some(connection), node, places }
    }

    /// Lets the exchange go on.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection {
            connection.poll_driver(cx);
        }
    }

    /// The next frame of the answer, if it is there. Another comes only when the exchange goes on:
    /// whoever lets it, which is nobody else on HTTP/1.1, has no need to be woken for that.
    pub(super) fn poll_frame(
        &self,
        incoming: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let is_driven = self.connection.as_ref().is_some_and(|connection| !connection.is_shared());
        let mut nobody = Context::from_waker(Waker::noop());
        Pin::new(incoming).poll_frame(if is_driven { &mut nobody } else { cx })
    }

    /// The answer is complete, at about `now`: keeps the connection, if it can carry another.
    pub(super) fn finish(&mut self, now: Instant) {
        if let Some(mut connection) = self.connection.take()
            && (connection.is_ready() || connection.is_usable())
        {
            self.node.keep(connection, now);
        }
    }

    /// Takes the connection for a tunnel. The places stay: the node is as busy as before.
    pub(super) fn take_connection(&mut self) -> Option<Box<Connection<RequestBody>>> {
        self.connection.take()
    }
}

/// What every attempt of one request has in common.
pub(super) struct Try<'a> {
    /// The client's connection.
    pub(super) conn: &'a Rc<Conn>,
    /// The request's body, if it has one.
    pub(super) upload: Option<&'a Upload>,
    /// What may be spoken.
    pub(super) offer: Offer,
    /// It asks for a WebSocket: HTTP/2 serves if the node says that it takes those.
    pub(super) websocket: bool,
    /// Whom the connection to the node is to speak for.
    pub(super) speaks_for: Option<Introduction>,
    /// The client waits for `100 Continue`.
    pub(super) expects_continue: bool,
    /// The client understands interim responses.
    pub(super) interim: bool,
    /// Now.
    pub(super) began: Instant,
    /// `timeouts.connect`, or less where a replay says so.
    pub(super) connect: Duration,
    /// `timeouts.response_header`
    pub(super) response_header: Duration,
    /// `timeouts.idle`
    pub(super) idle: Duration,
    /// Whether the node is no longer what it was when it was chosen.
    pub(super) is_lost: &'a dyn Fn(Instant) -> bool,
}

/// Why an attempt brought no answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Trouble {
    /// With the node: `decide::next` knows what then.
    Node(Failure),
    /// None: a hand-over began just then, and nothing was sent. It waits.
    Paused,
    /// With the client's body: there is nothing to try again.
    Client(Problem),
}

/// Sends the request to `node`. `message` makes it anew around its body, since a connection from the
/// pool may turn out to be closed before anything was written.
pub(super) async fn run(
    this: &Try<'_>,
    node: &Rc<Node>,
    mut message: impl FnMut(RequestBody) -> Request<RequestBody>,
) -> Result<(Response<Incoming>, Box<Connection<RequestBody>>), Trouble> {
    let mut began = this.began;
    let mut offer = this.offer;
    loop {
        let pooled = match offer {
            Offer::Http1 => node.take_idle(began, this.speaks_for),
            Offer::H2 => node.shared(this.speaks_for),
            Offer::Either => {
                node.shared(this.speaks_for).or_else(|| node.take_idle(began, this.speaks_for))
            }
        };
        let (mut connection, reused) = if let Some(connection) = pooled {
            (connection, true)
        } else {
            // Boxed: a request that finds a connection is not to make room for what opens one.
            let opened = Box::pin(open(this, node, offer)).await;
            let (connection, fresh) = opened.map_err(Trouble::Node)?;
            began = Instant::now();
            (connection, !fresh)
        };
        if this.websocket && connection.is_shared() {
            let takes = timeout(this.connect, connection.takes_websockets()).await;
            if !takes.unwrap_or(false) {
                offer = Offer::Http1;
                continue;
            }
            began = Instant::now();
        }
        let body = match this.upload {
            Some(upload) => upload.attempt(connection.wire(), this.expects_continue, began),
            None => RequestBody::empty(),
        };
        match exchange(this, &mut connection, message(body), began).await {
            // The node closed a kept-alive connection just then, and nothing of the request has
            // left: not an attempt yet.
            Err(Trouble::Node(Failure { kind: FailureKind::StaleConnection, written: false }))
                if reused && !connection.was_refused() => {}
            Err(trouble) => {
                if let (Some(tls), Some(alert)) = (&node.tls, connection.wire().turned_away()) {
                    tls.tls().tell(node.address, Some(&refusal(alert)));
                }
                return Err(trouble);
            }
            Ok(response) => return Ok((response, connection)),
        }
    }
}

/// A connection, and whether it was made for this exchange: where many may share it, those who come
/// meanwhile wait for the first.
async fn open(
    this: &Try<'_>,
    node: &Node,
    offer: Offer,
) -> Result<(Box<Connection<RequestBody>>, bool), Failure> {
    let limit = this.connect;
    let began = Instant::now();
    let may_share = match offer {
        Offer::Http1 => false,
        Offer::H2 => true,
        Offer::Either => node.agreed_h2.get() != Some(false),
    };
    let opening = if may_share {
        let opening = timeout(limit, node.opening.lock())
            .await
            .map_err(|_elapsed| Failure { kind: FailureKind::ConnectTimeout, written: false })?;
        if let Some(connection) = node.shared(this.speaks_for) {
            return Ok((connection, false));
        }
        // The first may have found that there is nothing to share.
        (offer == Offer::H2 || node.agreed_h2.get() != Some(false)).then_some(opening)
    } else {
        None
    };
    let left = limit.saturating_sub(began.elapsed());
    let opened =
        upstream::open(node.address, node.tls.as_ref(), offer, this.speaks_for, left).await;
    if offer == Offer::Either
        && let Ok(opened) = &opened
    {
        node.agreed_h2.set(Some(matches!(opened, Opened::H2(_))));
    }
    let opened = match opened {
        Ok(Opened::Http1(mut connection)) => {
            connection.counted(node.load.cells.connected(began.elapsed()));
            Ok((connection, true))
        }
        Ok(Opened::H2(h2)) => {
            h2.counted(node.load.cells.connected(began.elapsed()));
            node.share(&h2, Instant::now());
            Ok((Box::new(Connection::sharing(&h2, this.speaks_for, true)), true))
        }
        Err(error) => {
            tracing::debug!(node = %node.name, address = %node.address, %error, "cannot connect");
            Err(Failure { kind: error.kind(), written: false })
        }
    };
    // Who waited finds it shared.
    drop(opening);
    opened
}

async fn exchange(
    this: &Try<'_>,
    connection: &mut Connection<RequestBody>,
    message: Request<RequestBody>,
    began: Instant,
) -> Result<Response<Incoming>, Trouble> {
    let wire = connection.wire();
    let mut client = None;
    let mut continue_at = this.expects_continue.then(|| began + CONTINUE);
    let (mut lost_since, mut gone) = (None, false);
    let first = this.response_header.min(LOOK);
    this.conn.set_deadline(Some(continue_at.unwrap_or(began + first)));
    let result = connection
        .exchange(message, |cx| {
            if this.interim {
                while let Some(head) = wire.next_interim() {
                    this.conn.send_interim(head);
                    // The socket is written by whoever polls the client's connection next.
                    cx.waker().wake_by_ref();
                }
            }
            if !this.conn.deadline_passed() {
                return false;
            }
            let now = Instant::now();
            if continue_at.take_if(|at| *at <= now).is_some() && !wire.continued() {
                wire.continue_anyway();
                cx.waker().wake_by_ref();
            }
            if let Some(problem) = this.upload.and_then(|upload| upload.fault(cx, now)) {
                client = Some(problem);
                return true;
            }
            if (this.is_lost)(now) {
                gone = *lost_since.get_or_insert(now) + GRACE <= now;
            } else {
                lost_since = None;
            }
            let until = this.patience(began);
            this.conn.set_deadline(Some(until.min(now + LOOK)));
            gone || until <= now
        })
        .await;
    let result = result.map_err(|failure| match failure.kind {
        FailureKind::ResponseTimeout if gone => Failure { kind: FailureKind::NodeGone, ..failure },
        _ => failure,
    });
    this.conn.set_deadline(None);
    // Those that came in one read with the final head.
    while let Some(head) = wire.next_interim().filter(|_| this.interim) {
        this.conn.send_interim(head);
    }
    if result.is_err() && this.upload.is_some_and(Upload::is_broken) {
        // Its framing was wrong, or it went away: the node's side of it says nothing.
        client = Some(Problem::Malformed);
    }
    match client {
        Some(problem) => Err(Trouble::Client(problem)),
        None => result.map_err(Trouble::Node),
    }
}

impl Try<'_> {
    /// Until when the node may take: to answer once it has the request, to take more of it before.
    fn patience(&self, began: Instant) -> Instant {
        if let Some(until) = self.upload.and_then(Upload::waits_until) {
            return until;
        }
        match self.upload {
            Some(upload) if !upload.is_sent() => upload.progress() + self.idle,
            Some(upload) => upload.progress() + self.response_header,
            None => began + self.response_header,
        }
    }
}
