//! After a 101: joins two byte streams until either ends, both are silent for too long, or the
//! client had better go elsewhere.
//!
//! A WebSocket is told so by a close frame between two of the node's frames (1012: its node is no
//! longer primary; 1001: litegate leaves), and both sides then get a moment for their closing
//! handshake. Only the direction to the client is looked into. Any other protocol is closed.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    task::{Poll, ready},
    time::{Duration, Instant as Time},
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream as _};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf, split},
    time::{Instant, sleep, sleep_until},
};

use super::websocket::{self, Frames};
use crate::{
    net::Stream,
    telemetry::metrics::Leave,
    topology::{NodeId, Topology, watch},
};

/// What is read at once in each direction.
const BUFFER: usize = 8 << 10;
/// How long a frame may take to end and the client to answer the close frame: then it is closed
/// anyhow.
const FAREWELL: Duration = Duration::from_secs(3);

/// The code of the close frame: 1012 is "service restart", 1001 "going away"; clients connect again
/// after either.
const fn code(leave: Leave) -> u16 {
    match leave {
        Leave::Demoted => 1012,
        Leave::Draining => 1001,
    }
}

/// Two sides, and what was read of each before: that goes first.
#[derive(Debug)]
pub(super) struct Sides {
    pub(super) client: Stream,
    pub(super) from_client: Bytes,
    pub(super) node: Stream,
    pub(super) from_node: Bytes,
    /// Whether the protocol is WebSocket.
    pub(super) websocket: bool,
}

/// Carries bytes both ways. A side that ends its half lets the other finish. Ends after `idle`
/// without a byte either way, or when `leave` says so; returns what it said.
pub(super) async fn join(
    sides: Sides,
    idle: Duration,
    leave: impl Future<Output = Leave>,
) -> Option<Leave> {
    let Sides { client, from_client, node, from_node, websocket } = sides;
    let active = Cell::new(Instant::now());
    let left = Cell::new(None);
    let (client_read, client_write) = split(client);
    let (node_read, node_write) = split(node);
    let upward = pin!(carry(client_read, node_write, from_client, &active));
    let downward = async {
        if websocket {
            carry_frames(node_read, client_write, from_node, &active, &left).await
        } else {
            carry(node_read, client_write, from_node, &active).await
        }
    };
    let downward = pin!(downward);
    let mut both = pin!(async { tokio::try_join!(upward, downward) });
    let silent = async {
        loop {
            let until = active.get() + idle;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    };
    let told = async {
        left.set(Some(leave.await));
        if websocket {
            sleep(FAREWELL).await;
        }
    };
    // A set of its own, so that it is polled when it is woken and not with every message.
    let mut over = FuturesUnordered::from_iter([async {
        tokio::select! {
            () = silent => {}
            () = told => {}
        }
    }]);
    poll_fn(|cx| {
        // First, since the frames are to know of it.
        if let Poll::Ready(Some(())) = Pin::new(&mut over).poll_next(cx) {
            return Poll::Ready(());
        }
        both.as_mut().poll(cx).map(|_| ())
    })
    .await;
    left.get()
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    first: Bytes,
    active: &Cell<Instant>,
) -> io::Result<()> {
    to.write_all(&first).await?;
    to.flush().await?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        active.set(Instant::now());
        to.write_all(buffer.get(..n).unwrap_or_default()).await?;
        to.flush().await?;
        active.set(Instant::now());
    }
}

/// [`carry`] for the frames of a WebSocket server: once it has `left`, a close frame follows the
/// frame that is under way, and whatever the node still sends is dropped. Whoever says so polls this
/// next.
async fn carry_frames(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    first: Bytes,
    active: &Cell<Instant>,
    left: &Cell<Option<Leave>>,
) -> io::Result<()> {
    let mut frames = Frames::default();
    frames.see(&first);
    to.write_all(&first).await?;
    to.flush().await?;
    let mut buffer = vec![0; BUFFER];
    let (mut told, mut said) = (false, false);
    loop {
        let leave = left.get().filter(|_| !said && !frames.is_closed());
        if let Some(leave) = leave.filter(|_| frames.is_between()) {
            to.write_all(&websocket::close(code(leave))).await?;
            to.flush().await?;
            said = true;
        }
        let read = poll_fn(|cx| {
            if !told && left.get().is_some() {
                // Once: what it says is looked up above.
                told = true;
                return Poll::Ready(Ok(None));
            }
            let mut buffer = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut from).poll_read(cx, &mut buffer))?;
            Poll::Ready(io::Result::Ok(Some(buffer.filled().len())))
        });
        let Some(n) = read.await? else { continue };
        if n == 0 {
            return to.shutdown().await;
        }
        active.set(Instant::now());
        let bytes = buffer.get(..n).unwrap_or_default();
        let bytes = match left.get() {
            _ if said => &[],
            Some(_) if !frames.is_closed() => {
                let end = frames.frame(bytes);
                bytes.get(..end).unwrap_or_default()
            }
            _ => {
                frames.see(bytes);
                bytes
            }
        };
        to.write_all(bytes).await?;
        to.flush().await?;
        active.set(Instant::now());
    }
}

/// When a socket that may write has to leave its node: a pure function of what is believed.
///
/// While nobody else is primary there is nowhere to go, and the node may well be it again: that
/// costs another `window`. `share` of the window, 0 to 1, is this socket's own: not all clients
/// connect again at once.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Demotion {
    /// Since when its node is not the primary.
    since: Option<Time>,
    /// Since when another one is.
    followed: Option<Time>,
}

impl Demotion {
    fn see(self, topology: &Topology, node: NodeId, now: Time) -> Self {
        match topology.primary {
            Some(primary) if primary == node => Self::default(),
            other => Self {
                since: self.since.or(Some(now)),
                followed: other.and(self.followed.or(Some(now))),
            },
        }
    }

    fn leaves_at(self, window: Duration, share: f64) -> Option<Time> {
        let own = window.mul_f64(share.clamp(0.0, 1.0));
        match (self.since, self.followed) {
            (None, _) => None,
            (Some(since), None) => Some(since + window + own),
            (Some(since), Some(followed)) => Some((followed + own).min(since + window + own)),
        }
    }
}

/// Waits until a socket to `node` has to leave it. For ever where nothing newer will be known.
pub(super) async fn demoted(
    mut topology: watch::Reader,
    node: NodeId,
    window: Duration,
    share: f64,
) {
    let mut demotion = Demotion::default();
    loop {
        let seen = topology.latest().generation;
        let now = Instant::now().into_std();
        demotion = demotion.see(topology.latest(), node, now);
        let leaves_at = demotion.leaves_at(window, share);
        if leaves_at.is_some_and(|at| at <= now) {
            return;
        }
        let due = async {
            match leaves_at {
                Some(at) => sleep_until(Instant::from_std(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            newer = topology.newer_than(seen) => if newer.is_err() {
                // Another configuration's discovery took over: this one knows no more of the node.
                return std::future::pending().await;
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const WINDOW: Duration = Duration::from_secs(4);

    fn primary(n: Option<u64>) -> Topology {
        Topology { primary: n.map(NodeId), ..Topology::default() }
    }

    #[test]
    fn sockets_leave_one_by_one_once_there_is_somewhere_to_go() {
        let now = Time::now();
        let second = |n| now + Duration::from_secs(n);
        let (us, gone) = (NodeId(1), Demotion::default().see(&primary(None), NodeId(1), now));
        assert_eq!(
            Demotion::default().see(&primary(Some(1)), us, now).leaves_at(WINDOW, 0.5),
            None
        );
        assert_eq!(gone.leaves_at(WINDOW, 0.5), Some(second(6)), "it may come back");
        let back = gone.see(&primary(Some(1)), us, second(1));
        assert_eq!(back.leaves_at(WINDOW, 0.5), None);
        let followed = gone.see(&primary(Some(2)), us, second(1));
        assert_eq!(followed.leaves_at(WINDOW, 0.5), Some(second(3)));
        let again = followed.see(&primary(Some(3)), us, second(2));
        assert_eq!(again.leaves_at(WINDOW, 0.5), Some(second(3)), "the time does not begin anew");
        let late = gone.see(&primary(Some(2)), us, second(5));
        assert_eq!(late.leaves_at(WINDOW, 0.5), Some(second(6)), "never later than without");
    }

    #[tokio::test(start_paused = true)]
    async fn a_flap_moves_nobody() {
        let (publisher, reader) = watch::channel(primary(Some(1)));
        let mut leaves = pin!(demoted(reader, NodeId(1), WINDOW, 0.5));
        let publish = |generation, n| publisher.publish(Topology { generation, ..primary(n) });
        assert!(futures_util::poll!(leaves.as_mut()).is_pending());
        publish(1, None);
        assert!(tokio::time::timeout(WINDOW, leaves.as_mut()).await.is_err());
        publish(2, Some(1));
        assert!(tokio::time::timeout(WINDOW * 10, leaves.as_mut()).await.is_err());
        publish(3, Some(2));
        let began = Instant::now();
        leaves.await;
        assert_eq!(began.elapsed(), WINDOW / 2);
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap());
        let (there, here) = tokio::join!(there, listener.accept());
        (there.unwrap(), here.unwrap().0)
    }

    /// A client, a node, and the tunnel between them, which leaves when told.
    async fn tunnel(
        websocket: bool,
        from_node: &'static [u8],
    ) -> (
        TcpStream,
        TcpStream,
        impl Future<Output = Option<Leave>>,
        tokio::sync::oneshot::Sender<Leave>,
    ) {
        let ((client, a), (node, b)) = (pair().await, pair().await);
        let (leave, told) = tokio::sync::oneshot::channel();
        let from_node = Bytes::from_static(from_node);
        let sides = Sides {
            client: a.into(),
            from_client: Bytes::new(),
            node: b.into(),
            from_node,
            websocket,
        };
        let told = async { told.await.unwrap_or(Leave::Draining) };
        (client, node, join(sides, Duration::from_hours(1), told), leave)
    }

    #[tokio::test]
    async fn the_close_frame_waits_for_the_end_of_the_frame() {
        let (mut client, mut node, tunnel, leave) = tunnel(true, &[0x82, 5, b'h']).await;
        let tasks = tokio::task::LocalSet::new();
        let tunnel = tasks.run_until(async move {
            let ends = tokio::task::spawn_local(tunnel);
            let mut start = [0; 3];
            client.read_exact(&mut start).await.unwrap();
            leave.send(Leave::Demoted).unwrap();
            // The rest of it, and a frame that comes too late.
            node.write_all(b"ello\x81\x01x").await.unwrap();
            let mut rest = [0; 8];
            client.read_exact(&mut rest).await.unwrap();
            assert_eq!(&rest, b"ello\x88\x02\x03\xf4");
            // The client's answer reaches the node, which closes.
            client.write_all(&[0x88, 0x80, 0, 0, 0, 0]).await.unwrap();
            let mut answer = [0; 6];
            node.read_exact(&mut answer).await.unwrap();
            drop(node);
            assert_eq!(client.read(&mut rest).await.unwrap(), 0);
            drop(client);
            ends.await.unwrap()
        });
        assert_eq!(tunnel.await, Some(Leave::Demoted));
    }

    #[tokio::test]
    async fn a_frame_that_does_not_end_is_cut_off_in_time() {
        let (mut client, _node, tunnel, leave) = tunnel(true, &[0x82, 5, b'h']).await;
        leave.send(Leave::Draining).unwrap();
        let began = Instant::now();
        assert_eq!(tunnel.await, Some(Leave::Draining));
        assert!(began.elapsed() >= FAREWELL);
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, [0x82, 5, b'h']);
    }

    #[tokio::test]
    async fn after_the_nodes_own_close_frame_there_is_no_other() {
        let (mut client, node, tunnel, leave) = tunnel(true, &[0x88, 2, 3, 0xe8]).await;
        leave.send(Leave::Demoted).unwrap();
        let client = async move {
            let mut all = Vec::new();
            client.read_to_end(&mut all).await.unwrap();
            all
        };
        drop(node);
        let (_, all) = tokio::join!(tunnel, client);
        assert_eq!(all, websocket::close(1000));
    }

    #[tokio::test]
    async fn another_protocol_is_closed_at_once() {
        let (mut client, _node, tunnel, leave) = tunnel(false, b"abc").await;
        let client = async move {
            let mut all = Vec::new();
            let mut start = [0; 3];
            client.read_exact(&mut start).await.unwrap();
            leave.send(Leave::Demoted).unwrap();
            client.read_to_end(&mut all).await.unwrap();
            all.len()
        };
        let (_, more) = tokio::join!(tunnel, client);
        assert_eq!(more, 0);
    }
}
