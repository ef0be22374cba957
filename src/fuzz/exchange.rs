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
pub(super) const PATIENCE: Duration = Duration::from_mins(10);

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

impl Speaks {
    /// What is to be configured for it, in its cluster.
    const fn speaks(self) -> &'static str {
        match self {
            Self::Http1 => "",
            Self::H2 => "upstream = { protocol = \"h2\" }",
        }
    }
}

/// Litegate between a client's connection and a node. Everything ends when `sides` has, and
/// litegate with the client.
pub(super) fn between<T>(
    node: Speaks,
    sides: impl AsyncFnOnce(Stream, mpsc::Receiver<Socket>) -> T,
) -> T {
    apart(node, async |network, config, arriving| {
        let connecting = network.listen([FRONT]);
        let sides = async {
            let client = Stream::connect(FRONT).await.expect("it is accepted");
            sides(client, arriving).await
        };
        tokio::join!(litegate(&config, connecting), sides).1
    })
}

/// A network apart from all others, with a node on it, and a clock that does not wait.
pub(super) fn apart<T>(
    node: Speaks,
    run: impl AsyncFnOnce(&Network, Arc<Config>, mpsc::Receiver<Socket>) -> T,
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
        let config = config::load::parse("fuzz", &format!("{CONFIG}{}", node.speaks()), []);
        let config = Arc::new(config.expect("it is right"));
        run(&network, config, arriving).await
    });
    drop(local);
    drop(runtime);
    drop(entered);
    seen
}

/// A client sends these pieces, one after the other, and reads until litegate ends the connection.
/// The node answers each whole request as `answer` says, which gets the number of the request.
pub(super) fn exchange(pieces: &[&[u8]], answer: impl Fn(usize, &Message) -> Answer) -> Seen {
    let node = Node::new(answer);
    let (client, ended) = between(Speaks::Http1, async |stream, arriving| {
        let serve = async |socket, number| node.serve(socket, number).await;
        client_and_node(stream, pieces, arriving, serve).await
    });
    Seen { node: node.received.take(), client, ended }
}

/// A node of HTTP/1.1.
pub(super) struct Node<A> {
    /// What it got, connection by connection.
    pub(super) received: RefCell<Vec<Vec<u8>>>,
    requests: Cell<usize>,
    answer: A,
}

impl<A: Fn(usize, &Message) -> Answer> Node<A> {
    pub(super) fn new(answer: A) -> Self {
        Self { received: RefCell::default(), requests: Cell::new(0), answer }
    }

    /// Serves one connection.
    pub(super) async fn serve(&self, socket: Socket, number: usize) {
        let connections = self.received.borrow().len().max(number + 1);
        self.received.borrow_mut().resize(connections, Vec::new());
        let mut stream = Stream::Simulated(socket);
        let mut answered = 0;
        loop {
            let mut buffer = Vec::with_capacity(8 << 10);
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
            let reading = {
                let mut all = self.received.borrow_mut();
                all[number].extend_from_slice(&buffer);
                strict::read(&all[number], Side::Requests)
            };
            for message in reading.messages.iter().skip(answered).filter(|m| m.complete) {
                answered += 1;
                self.requests.set(self.requests.get() + 1);
                let Answer { bytes, close } = (self.answer)(self.requests.get(), message);
                if stream.write_all(&bytes).await.is_err() || close {
                    return;
                }
            }
        }
    }
}

/// A client that sends these pieces, and what it got until the connection ended, and whether that
/// did not break; beside a node that serves each connection.
pub(super) async fn client_and_node(
    mut stream: Stream,
    pieces: &[&[u8]],
    arriving: mpsc::Receiver<Socket>,
    serve: impl AsyncFn(Socket, usize),
) -> (Vec<u8>, bool) {
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
    beside_node(client, arriving, serve).await
}

/// What a client saw beside a node that serves each connection.
pub(super) async fn beside_node<T>(
    client: impl Future<Output = T>,
    mut arriving: mpsc::Receiver<Socket>,
    serve: impl AsyncFn(Socket, usize),
) -> T {
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
    let mut node = std::pin::pin!(node);
    let seen = tokio::select! {
        () = &mut node => unreachable!("it is there until the end"),
        seen = client => seen,
    };
    // What is under way.
    let _ = timeout(Duration::from_secs(1), node).await;
    seen
}

/// All of litegate that one connection needs, until that is over.
async fn litegate(config: &Arc<Config>, mut connecting: mpsc::Receiver<Socket>) {
    let (gate, _discovery) = gate(config);
    let socket = connecting.recv().await.expect("the client connects");
    let (_trigger, drain) = server::drain::signal();
    let origin = Origin { listener: 0, peer: PEER, local: FRONT, secure: false };
    let (limits, handshakes) = (Rc::new(Cell::new(proxy::limits(config))), Semaphore::new(1));
    let stream = Stream::Simulated(socket);
    let mut task = JoinSet::new();
    task.spawn_local(server::run(stream, origin, gate, limits, Arc::new(handshakes), drain));
    let over = timeout(PATIENCE, task.join_next()).await;
    over.expect("every connection ends").expect("there is one").expect("nothing panics");
}

/// What answers a client's requests, and what it knows the node from.
pub(super) fn gate(config: &Arc<Config>) -> (Rc<Proxy>, discovery::Discovery) {
    let metrics = Metrics::new();
    let cluster = &config.clusters[0];
    let discovery = discovery::start(cluster, None, None, metrics.discovery(&cluster.name), |_| {});
    (Rc::new(wear(config, &metrics, &discovery)), discovery)
}

pub(super) const FRONT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 100, 0, 1)), 80);
pub(super) const PEER: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), 4711);

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

#[cfg(test)]
mod tests {
    use super::*;

    /// What the network holds in one direction.
    const PIPE: usize = 64 << 10;
    /// What is written at once, and so read at once.
    const PIECE: usize = 10_000;
    /// Frames that wait together.
    const SMALL: usize = 8 << 10;

    /// How much more the `sender` of a body could write than the `receiver` took of it: litegate and
    /// the network hold that.
    fn held(
        sender: impl AsyncFn(Stream, &Cell<usize>),
        receiver: impl AsyncFn(Stream) -> usize,
        is_upload: bool,
    ) -> usize {
        let network = Network::default();
        let entered = network.enter();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let held = LocalSet::new().block_on(&runtime, async {
            // What is kept for a replay has a bound of its own.
            let config = format!("{CONFIG}replay = {{ buffer = \"1KiB\" }}\n");
            let config = Arc::new(config::load::parse("held", &config, []).unwrap());
            let mut arriving = network.listen([SocketAddr::from(([10, 0, 0, 1], 3000))]);
            let connecting = network.listen([FRONT]);
            let written = Cell::new(0);
            let client = Stream::connect(FRONT);
            let run = async {
                let client = client.await.unwrap();
                if is_upload {
                    let receive = async {
                        let node = arriving.recv().await.unwrap();
                        receiver(Stream::Simulated(node)).await
                    };
                    tokio::join!(sender(client, &written), receive).1
                } else {
                    let send = async {
                        let node = arriving.recv().await.unwrap();
                        sender(Stream::Simulated(node), &written).await;
                    };
                    tokio::join!(receiver(client), send).0
                }
            };
            let taken = tokio::select! {
                taken = run => taken,
                () = litegate(&config, connecting) => panic!("the connection ended"),
            };
            written.get() - taken
        });
        drop(entered);
        held
    }

    /// Writes for as long as anybody takes it.
    async fn flood(stream: &mut Stream, written: &Cell<usize>) {
        let piece = [b'x'; PIECE];
        while let Ok(n) = timeout(Duration::from_millis(500), stream.write(&piece)).await {
            written.set(written.get() + n.expect("it goes on"));
        }
    }

    async fn head(stream: &mut Stream) {
        let mut got = Vec::new();
        while !got.ends_with(b"\r\n\r\n") {
            got.push(stream.read_u8().await.expect("a head comes"));
        }
    }

    /// Reads so many bytes behind a head, and no more.
    async fn begin(stream: &mut Stream) -> usize {
        head(stream).await;
        let mut some = vec![0; 300_000];
        stream.read_exact(&mut some).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        some.len()
    }

    async fn node(mut stream: Stream, written: &Cell<usize>) {
        head(&mut stream).await;
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        flood(&mut stream, written).await;
    }

    #[test]
    fn a_client_that_does_not_read_holds_one_read_of_the_node() {
        let client = async |mut stream: Stream| {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
            begin(&mut stream).await
        };
        let held = held(node, client, false) - 2 * PIPE;
        assert!((1..=PIECE + SMALL).contains(&held), "{held} bytes");
    }

    #[test]
    fn an_http2_client_without_a_window_holds_one_read_of_the_node() {
        let client = async |mut stream: Stream| {
            let open = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
            let request = b"\0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01a";
            stream.write_all(&[&open[..], request].concat()).await.unwrap();
            let mut got = Vec::new();
            let all = async { while !matches!(stream.read_buf(&mut got).await, Ok(0) | Err(_)) {} };
            let _ = timeout(Duration::from_secs(1), all).await;
            got.len()
        };
        // Nothing waits in the network to the client: it has read all that its window let come.
        let held = held(node, client, false) - PIPE;
        assert!((1..=PIECE + SMALL).contains(&held), "{held} bytes");
    }

    #[test]
    fn a_node_that_does_not_read_holds_one_read_of_the_client() {
        let client = async |mut stream: Stream, written: &Cell<usize>| {
            let begin = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n";
            stream.write_all(begin).await.unwrap();
            flood(&mut stream, written).await;
        };
        let node = async |mut stream: Stream| begin(&mut stream).await;
        let held = held(client, node, true) - 2 * PIPE;
        assert!((1..=PIECE + SMALL).contains(&held), "{held} bytes");
    }
}
