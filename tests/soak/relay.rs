//! Ways to a node that can be cut, silent, slow, and lie.
//!
//! litegate reaches every node through relays of ours: real data, and faults whenever we like. What
//! a lie does, it does to one request of a connection, and mostly to the connection as well: litegate
//! sends one request after the other on it, so that bytes from it after an answer are a new head.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Handle,
    sync::watch,
    task::JoinSet,
    time::sleep,
};

/// A head longer than this is passed on as it is.
const HEAD: usize = 64 * 1024;

/// What becomes of the bytes on their way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    /// They pass.
    Open,
    /// Nobody listens, and connections are closed: the process is gone.
    Down,
    /// Connections are taken, and closed.
    Cut,
    /// Nothing passes, nothing is closed.
    Silent,
    /// Late, and in pieces.
    Slow,
    /// A part of the requests gets something else than the app's answer.
    Lying,
    /// LiteFS's API says `isPrimary` of itself, whatever it is.
    Claiming,
}

/// Written into each head whose lie a proxy can't see through.
pub(crate) const MARK: &str = "soak-lie";

/// What one request gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Lie {
    /// No HTTP, or none that may be passed on.
    Garbage(u8),
    /// `fly-replay` to somewhere, from whoever has no reason to say so.
    Replay(u8),
    /// The request is done, and its connection closed without a word.
    Hush,
    /// Closed in the middle of the body.
    Break,
    /// More `Content-Length` than there is.
    Long,
    /// Less than there is: what follows is nobody's answer.
    Short,
    /// A second answer behind the first, for nobody.
    Poison,
    /// Late.
    Late,
    /// One byte after the other.
    Trickle,
    /// Interim answers before the answer.
    Interim,
}

const LIES: [Lie; 16] = [
    Lie::Garbage(0),
    Lie::Garbage(1),
    Lie::Garbage(2),
    Lie::Garbage(3),
    Lie::Garbage(4),
    Lie::Replay(0),
    Lie::Replay(1),
    Lie::Replay(2),
    Lie::Hush,
    Lie::Break,
    Lie::Long,
    Lie::Short,
    Lie::Poison,
    Lie::Late,
    Lie::Trickle,
    Lie::Interim,
];

/// None of it may come through to a client.
pub(crate) const POISON: &str = "poison for somebody else";

#[derive(Debug)]
pub(crate) struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    way: watch::Sender<Way>,
}

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    way: watch::Receiver<Way>,
    rng: Mutex<fastrand::Rng>,
    lies: AtomicUsize,
}

impl Relay {
    /// Listens on a port of its own; ends with the runtime.
    pub(crate) fn start(runtime: &Handle, to: SocketAddr, seed: u64) -> Self {
        let (way, receiver) = watch::channel(Way::Open);
        let rng = Mutex::new(fastrand::Rng::with_seed(seed));
        let shared = Arc::new(Shared { to, way: receiver, rng, lies: AtomicUsize::new(0) });
        let _guard = runtime.enter();
        let listener =
            listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("loopback has ports");
        let address = listener.local_addr().expect("a bound socket has an address");
        runtime.spawn(Arc::clone(&shared).serve(address, listener));
        Self { address, shared, way }
    }

    /// Where litegate finds the node.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on.
    pub(crate) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Requests that got something else than the app's answer.
    pub(crate) fn lies(&self) -> usize {
        self.shared.lies.load(Ordering::Relaxed)
    }
}

fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(1024)
}

impl Shared {
    fn rng(&self) -> MutexGuard<'_, fastrand::Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn below(&self, n: usize) -> usize {
        self.rng().usize(..n)
    }

    fn is(&self, way: Way) -> bool {
        *self.way.borrow() == way
    }

    async fn serve(self: Arc<Self>, address: SocketAddr, listener: TcpListener) {
        let mut listener = Some(listener);
        let mut connections = JoinSet::new();
        let mut way = self.way.clone();
        loop {
            let now = *way.borrow_and_update();
            if matches!(now, Way::Down | Way::Cut) {
                connections.shutdown().await;
            }
            if now == Way::Down {
                listener = None;
            } else if listener.is_none() {
                listener = listen(address).ok();
            }
            let accept = async {
                if let Some(listener) = &listener {
                    return listener.accept().await.ok();
                }
                sleep(Duration::from_millis(100)).await;
                None
            };
            tokio::select! {
                changed = way.changed() => if changed.is_err() { return },
                Some(_) = connections.join_next() => {}
                accepted = accept => if let Some((client, _)) = accepted && now != Way::Cut {
                    connections.spawn(Arc::clone(&self).carry(client));
                },
            }
        }
    }

    async fn carry(self: Arc<Self>, client: TcpStream) {
        let Ok(node) = TcpStream::connect(self.to).await else { return };
        let _ = (client.set_nodelay(true), node.set_nodelay(true));
        let ((from_client, to_client), (from_node, to_node)) =
            (client.into_split(), node.into_split());
        // What the answer that comes next is to be.
        let (next, lie) = watch::channel(None);
        let to_client = Arc::new(tokio::sync::Mutex::new(to_client));
        tokio::select! {
            () = self.up(from_client, to_node, &to_client, &next) => {}
            () = self.down(from_node, &to_client, lie, &next) => {}
        }
    }

    /// Waits out a silence.
    async fn pass(&self) {
        let mut way = self.way.clone();
        let _ = way.wait_for(|way| *way != Way::Silent).await;
        if self.is(Way::Slow) {
            let pause = 20 + self.below(200) as u64;
            sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn up(
        &self,
        mut from: OwnedReadHalf,
        mut into: OwnedWriteHalf,
        back: &tokio::sync::Mutex<OwnedWriteHalf>,
        next: &watch::Sender<Option<Lie>>,
    ) {
        let mut buffer = vec![0; HEAD];
        loop {
            let Ok(read) = from.read(&mut buffer).await else { return };
            self.pass().await;
            if read == 0 {
                // Half a close passes, as TCP's does.
                let _ = into.shutdown().await;
                std::future::pending::<()>().await;
            }
            let bytes = &buffer[..read];
            if self.is(Way::Lying) && is_head(bytes) && self.below(3) == 0 {
                let mut lie = LIES[self.below(LIES.len())];
                if lie == Lie::Short && !bytes.starts_with(b"GET /bytes/") {
                    lie = Lie::Late;
                }
                self.lies.fetch_add(1, Ordering::Relaxed);
                match lie {
                    Lie::Garbage(n) => {
                        let _ = back.lock().await.write_all(garbage(n)).await;
                        return;
                    }
                    Lie::Replay(n) => {
                        let named = match n {
                            0 => "instance=abaci-app-1",
                            1 => "instance=",
                            _ => "instance=nobody",
                        };
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\nfly-replay: {named}\r\ncontent-length: 0\r\n\r\n"
                        );
                        let _ = back.lock().await.write_all(answer.as_bytes()).await;
                        let _ = back.lock().await.shutdown().await;
                        return;
                    }
                    Lie::Late => sleep(Duration::from_millis(700)).await,
                    lie => {
                        next.send_replace(Some(lie));
                    }
                }
            }
            if into.write_all(bytes).await.is_err() {
                return;
            }
        }
    }

    async fn down(
        &self,
        mut from: OwnedReadHalf,
        into: &tokio::sync::Mutex<OwnedWriteHalf>,
        lie: watch::Receiver<Option<Lie>>,
        next: &watch::Sender<Option<Lie>>,
    ) {
        let mut buffer = vec![0; HEAD];
        loop {
            let Ok(read) = from.read(&mut buffer).await else { return };
            self.pass().await;
            if read == 0 {
                return;
            }
            let mut bytes = buffer[..read].to_vec();
            if self.is(Way::Claiming) {
                replace(&mut bytes, b"\"isPrimary\":false", b"\"isPrimary\": true");
            }
            let now = *lie.borrow();
            let mut into = into.lock().await;
            let written = match now {
                None if self.is(Way::Slow) => trickle(&mut into, &bytes, 700).await,
                None => into.write_all(&bytes).await,
                Some(Lie::Trickle) => {
                    next.send_replace(None);
                    let few = bytes.len().min(1500);
                    let first = trickle(&mut into, &bytes[..few], 1).await;
                    match first {
                        Ok(()) => into.write_all(&bytes[few..]).await,
                        Err(error) => Err(error),
                    }
                }
                Some(Lie::Interim) => {
                    next.send_replace(None);
                    let hints =
                        "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n".repeat(5);
                    let all = [hints.as_bytes(), &bytes].concat();
                    into.write_all(&all).await
                }
                Some(Lie::Hush) => return,
                Some(Lie::Break) => {
                    let end = head_end(&bytes).unwrap_or(0);
                    let most = bytes.len() - end;
                    let keep = end + if most > 1 { self.below(most) } else { 0 };
                    let _ = into.write_all(&bytes[..keep]).await;
                    return;
                }
                Some(Lie::Long) => {
                    let (longer, _) = with_length(&bytes, |n| n + 7);
                    let _ = into.write_all(&longer).await;
                    if longer == bytes {
                        // Chunked, or too long to see: broken off is all that is left.
                        return;
                    }
                    // The rest of it passes, and then the node seems to hang up.
                    while let Ok(more @ 1..) =
                        tokio::time::timeout(Duration::from_millis(200), from.read(&mut buffer))
                            .await
                            .unwrap_or(Ok(0))
                    {
                        if into.write_all(&buffer[..more]).await.is_err() {
                            return;
                        }
                    }
                    return;
                }
                Some(Lie::Short) => {
                    next.send_replace(None);
                    let (shorter, _) = with_length(&bytes, |n| n / 2);
                    into.write_all(&marked(shorter)).await
                }
                Some(Lie::Poison) => {
                    next.send_replace(None);
                    // Only where it can't be taken for the answer itself: behind a whole one.
                    let (_, whole) = with_length(&bytes, |n| n);
                    if whole {
                        let more = format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{POISON}",
                            POISON.len()
                        );
                        bytes.extend_from_slice(more.as_bytes());
                    }
                    into.write_all(&bytes).await
                }
                Some(Lie::Garbage(_) | Lie::Replay(_) | Lie::Late) => into.write_all(&bytes).await,
            };
            if written.is_err() {
                return;
            }
        }
    }
}

async fn trickle(into: &mut OwnedWriteHalf, bytes: &[u8], piece: usize) -> std::io::Result<()> {
    for piece in bytes.chunks(piece) {
        into.write_all(piece).await?;
        if piece.len() > 1 || piece == b"\n" {
            sleep(Duration::from_millis(3)).await;
        }
    }
    Ok(())
}

/// The head of a request, whole.
fn is_head(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
    line.ends_with(b" HTTP/1.1") && head_end(bytes).is_some()
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|end| end == b"\r\n\r\n").map(|at| at + 4)
}

/// What no node says, or no proxy passes on.
fn garbage(n: u8) -> &'static [u8] {
    match n {
        0 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP at all\r\n\r\n",
        1 => b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nhello",
        2 => b"HTTP/1.1 200 OK\r\nx: a\0b\r\ncontent-length: 2\r\n\r\nhi",
        3 => b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\nhi",
        _ => b"HTTP/1.1 OK\r\n\r\n",
    }
}

fn replace(bytes: &mut [u8], from: &[u8], into: &[u8]) {
    for at in 0..bytes.len().saturating_sub(from.len() - 1) {
        if &bytes[at..at + from.len()] == from {
            bytes[at..at + into.len()].copy_from_slice(into);
        }
    }
}

/// The answer with another `Content-Length`, and whether it is whole as it is.
fn with_length(bytes: &[u8], change: impl Fn(usize) -> usize) -> (Vec<u8>, bool) {
    let Some(end) = head_end(bytes) else { return (bytes.to_vec(), false) };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let lower = head.to_ascii_lowercase();
    let Some(at) = lower.find("\r\ncontent-length: ").map(|at| at + 18) else {
        return (bytes.to_vec(), false);
    };
    let digits: String = head[at..].chars().take_while(char::is_ascii_digit).collect();
    let length: usize = digits.parse().unwrap_or(0);
    let changed = format!("{}{}{}", &head[..at], change(length), &head[at + digits.len()..]);
    ([changed.as_bytes(), &bytes[end..]].concat(), bytes.len() - end == length)
}

/// The answer with a field more.
fn marked(bytes: Vec<u8>) -> Vec<u8> {
    let Some(line) = bytes.windows(2).position(|end| end == b"\r\n") else { return bytes };
    let (first, rest) = bytes.split_at(line + 2);
    [first, format!("{MARK}: short\r\n").as_bytes(), rest].concat()
}
