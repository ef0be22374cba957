//! Bytes from a client through litegate to a node, and back: all of the data plane but the
//! kernel's sockets, in virtual time.

use std::{
    cell::{Cell, RefCell},
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Semaphore, mpsc},
    task::{JoinSet, LocalSet, yield_now},
    time::timeout,
};

use super::strict::{self, Message, Side};
use crate::{
    config::{self, Config},
    discovery,
    net::{
        Stream,
        simulated::{Network, Socket},
    },
    proxy::{self, Clients, Hold, Parts, Proxy, Shared},
    server::{self, Origin},
    telemetry::metrics::Metrics,
};

const CONFIG: &str = r#"
[server]
workers = 1
[[listener]]
address = "10.100.0.1:80"
[access_log]
format = "off"
[limits]
header_read = "2s"
idle = "2s"
body_idle = "2s"
[cluster.app]
port = 3000
members = { type = "static", nodes = [{ name = "n0", address = "10.0.0.1" }] }
primary = { type = "instance", name = "n0" }
timeouts = { connect = "1s", response_header = "2s", idle = "2s", tunnel_idle = "20s" }
hold = { timeout = "1s" }
"#;

/// Beyond every limit above, many times over.
const PATIENCE: Duration = Duration::from_mins(10);

/// What the node does about one request.
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    /// And then the connection ends.
    pub(super) close: bool,
}

/// What everybody saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// What the node got, connection by connection.
    pub(super) node: Vec<Vec<u8>>,
    /// What the client got.
    pub(super) client: Vec<u8>,
    /// The client saw the connection end, and not break.
    pub(super) ended: bool,
}

/// What the node speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Speaks {
    Http1,
    H2,
}

/// Litegate between a client's connection and a node. Everything ends when `sides` has, and
/// litegate with the client.
pub(super) fn between<T>(
    node: Speaks,
    sides: impl AsyncFnOnce(Stream, mpsc::Receiver<Socket>) -> T,
) -> T {
    fastrand::seed(0);
    let network = Network::default();
    let entered = network.enter();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without IO needs nothing");
    let local = LocalSet::new();
    let seen = local.block_on(&runtime, async {
        let arriving = network.listen([SocketAddr::from(([10, 0, 0, 1], 3000))]);
        let connecting = network.listen([FRONT]);
        let sides = async {
            let client = Stream::connect(FRONT).await.expect("it is accepted");
            sides(client, arriving).await
        };
        tokio::join!(litegate(node, connecting), sides).1
    });
    drop(local);
    drop(runtime);
    drop(entered);
    seen
}

async fn litegate(node: Speaks, mut connecting: mpsc::Receiver<Socket>) {
    let speaks = if node == Speaks::H2 { "upstream = { protocol = \"h2\" }" } else { "" };
    let config = config::load::parse("fuzz", &format!("{CONFIG}{speaks}"), []);
    let config = Arc::new(config.expect("it is right"));
    let metrics = Metrics::new();
    let cluster = &config.clusters[0];
    let discovery =
        discovery::start(cluster, None, None, None, metrics.discovery(&cluster.name), |_| {});
    let gate = Rc::new(wear(&config, &metrics, &discovery));
    let socket = connecting.recv().await.expect("the client connects");
    let (_trigger, drain) = server::drain::signal();
    let origin = Origin { listener: 0, peer: PEER, local: FRONT, secure: false };
    let (limits, handshakes) = (Rc::new(Cell::new(proxy::limits(&config))), Semaphore::new(1));
    let stream = Stream::Simulated(socket);
    let mut task = JoinSet::new();
    task.spawn_local(server::run(stream, origin, gate, limits, Arc::new(handshakes), drain));
    let over = timeout(PATIENCE, task.join_next()).await;
    over.expect("every connection ends").expect("there is one").expect("nothing panics");
}

/// A client sends these pieces, one after the other, and reads until litegate ends the connection.
/// The node answers each whole request as `answer` says, which gets the number of the request.
pub(super) fn exchange(pieces: &[&[u8]], answer: impl Fn(usize, &Message) -> Answer) -> Seen {
    let received = RefCell::new(Vec::new());
    let requests = Cell::new(0);
    let serve = |socket, number| serve(socket, number, &received, &requests, &answer);
    let (client, ended) = between(Speaks::Http1, async |stream, arriving| {
        client_and_node(stream, pieces, arriving, async |socket, number| {
            let connections = received.borrow().len().max(number + 1);
            received.borrow_mut().resize(connections, Vec::new());
            serve(socket, number).await;
        })
        .await
    });
    Seen { node: received.take(), client, ended }
}

/// A client that sends these pieces, and what it got until the connection ended, and whether that
/// did not break; beside a node that serves each connection.
pub(super) async fn client_and_node(
    mut stream: Stream,
    pieces: &[&[u8]],
    mut arriving: mpsc::Receiver<Socket>,
    serve: impl AsyncFn(Socket, usize),
) -> (Vec<u8>, bool) {
    let node = async {
        let mut connections = futures_util::stream::FuturesUnordered::new();
        let mut number = 0;
        loop {
            tokio::select! {
                socket = arriving.recv() => {
                    let Some(socket) = socket else { return };
                    connections.push(serve(socket, number));
                    number += 1;
                }
                Some(()) = futures_util::StreamExt::next(&mut connections) => {}
            }
        }
    };
    let client = async {
        let (mut reads, mut writes) = tokio::io::split(&mut stream);
        let send = async {
            for piece in pieces {
                // What litegate does not take any more is its business.
                let _ = writes.write_all(piece).await;
                yield_now().await;
            }
        };
        let mut got = Vec::new();
        let (ended, ()) = tokio::join!(timeout(PATIENCE, reads.read_to_end(&mut got)), send);
        (got, ended.expect("litegate ends it in time").is_ok())
    };
    let mut node = std::pin::pin!(node);
    let seen = tokio::select! {
        () = &mut node => unreachable!("it is there until the end"),
        seen = client => seen,
    };
    // What is under way.
    let _ = timeout(Duration::from_secs(1), node).await;
    seen
}

/// One connection of the node's.
async fn serve(
    socket: Socket,
    number: usize,
    received: &RefCell<Vec<Vec<u8>>>,
    requests: &Cell<usize>,
    answer: &impl Fn(usize, &Message) -> Answer,
) {
    let mut stream = Stream::Simulated(socket);
    let mut answered = 0;
    loop {
        let mut buffer = Vec::with_capacity(8 << 10);
        if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
            return;
        }
        let reading = {
            let mut all = received.borrow_mut();
            all[number].extend_from_slice(&buffer);
            strict::read(&all[number], Side::Requests)
        };
        for message in reading.messages.iter().skip(answered).filter(|message| message.complete) {
            answered += 1;
            requests.set(requests.get() + 1);
            let Answer { bytes, close } = answer(requests.get(), message);
            if stream.write_all(&bytes).await.is_err() || close {
                return;
            }
        }
    }
}

const FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 100, 0, 1)), 80);
const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), 4711);

fn wear(config: &Arc<Config>, metrics: &Metrics, discovery: &discovery::Discovery) -> Proxy {
    let cluster = &config.clusters[0];
    let shared = Shared {
        topology: discovery.reader.clone(),
        observer: discovery.observer.clone(),
        hold: Hold::new(&cluster.hold),
        last_writes: Arc::default(),
        tls: None,
    };
    let names: Vec<Arc<str>> =
        config.listeners.iter().map(|l| l.address.to_string().into()).collect();
    Proxy::new(Parts {
        shard: metrics.shard(0, &names, &[Arc::clone(&cluster.name)]),
        log: None,
        listeners: config.listeners.iter().map(|one| (one.clone(), None)).collect(),
        clusters: vec![shared],
        clients: Arc::new(Clients::new(&config.limits.client, None)),
        instance: "litegate-fuzz".into(),
        config: Arc::clone(config),
    })
}
