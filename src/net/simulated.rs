//! A network in memory and in virtual time: delays, refusals, links that swallow everything.
//!
//! One network per thread, entered for the length of a run. Who connects is told from where to:
//! every process sees its peers at addresses of its own, so that an address is one direction of
//! one link ([`Network::cut`]).
//!
//! What is written arrives in order, after the link's delay; what is under way on a link that is
//! cut arrives after it is healed, as TCP's retransmissions do. A connection that is dropped looks
//! closed to its peer, after the delay as well. Nothing here draws a random number: delays are
//! the world's business.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{Instant, Sleep, sleep, sleep_until},
};

/// Connections that wait to be accepted.
const BACKLOG: usize = 1024;
/// Bytes under way in one direction; more wait with the writer.
const WINDOW: usize = 64 << 10;
/// How often a link that is cut is tried again by whoever connects (a SYN's retransmission).
const SYN: Duration = Duration::from_secs(1);

thread_local! {
    static CURRENT: RefCell<Option<Network>> = const { RefCell::new(None) };
}

/// All links and listeners. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Network(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    listeners: BTreeMap<SocketAddr, mpsc::Sender<Socket>>,
    links: BTreeMap<SocketAddr, Arc<Link>>,
}

/// One process's way to one port of another.
#[derive(Debug)]
struct Link {
    condition: Mutex<Condition>,
    /// Both directions of every connection on it.
    pipes: Mutex<Vec<Weak<Pipe>>>,
}

#[derive(Clone, Copy, Debug)]
struct Condition {
    delay: Duration,
    cut_since: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Network {
    /// That of this thread, if it is in a simulation.
    pub(crate) fn current() -> Option<Self> {
        CURRENT.with_borrow(Clone::clone)
    }

    /// From here on, connections of this thread go through this network, until the guard is gone.
    pub(crate) fn enter(&self) -> Entered {
        CURRENT.set(Some(self.clone()));
        Entered
    }

    /// Accepts connections at these addresses.
    pub(crate) fn listen(
        &self,
        at: impl IntoIterator<Item = SocketAddr>,
    ) -> mpsc::Receiver<Socket> {
        let (sender, accepted) = mpsc::channel(BACKLOG);
        let mut state = lock(&self.0);
        state.listeners.extend(at.into_iter().map(|address| (address, sender.clone())));
        accepted
    }

    fn link(&self, address: SocketAddr) -> Arc<Link> {
        let mut state = lock(&self.0);
        let link = state.links.entry(address).or_insert_with(|| {
            let condition = Condition { delay: Duration::ZERO, cut_since: None };
            Arc::new(Link { condition: Mutex::new(condition), pipes: Mutex::default() })
        });
        Arc::clone(link)
    }

    /// How long a byte takes, each way.
    pub(crate) fn delay(&self, address: SocketAddr, delay: Duration) {
        lock(&self.link(address).condition).delay = delay;
    }

    /// Swallows whatever is sent on it, both ways, or lets it through again.
    pub(crate) fn cut(&self, address: SocketAddr, is_cut: bool) {
        let link = self.link(address);
        let mut condition = lock(&link.condition);
        match (is_cut, condition.cut_since) {
            (true, None) => condition.cut_since = Some(Instant::now()),
            (false, Some(_)) => condition.cut_since = None,
            _ => return,
        }
        drop(condition);
        link.each(Pipe::wake);
    }

    /// Resets every connection on it.
    pub(crate) fn reset(&self, address: SocketAddr) {
        self.link(address).each(|pipe| {
            lock(&pipe.flow).reset = true;
            pipe.wake();
        });
    }

    /// Connects, whatever that takes.
    pub(crate) async fn connect(&self, address: SocketAddr) -> io::Result<Socket> {
        let link = self.link(address);
        loop {
            let condition = *lock(&link.condition);
            sleep(condition.delay * 2).await;
            if lock(&link.condition).cut_since.is_none() {
                break;
            }
            sleep(SYN).await;
        }
        let listener = lock(&self.0).listeners.get(&address).cloned();
        let (there, back) = (Pipe::on(&link), Pipe::on(&link));
        let ours = Socket::new(Arc::clone(&back), Arc::clone(&there), address);
        let theirs = Socket::new(there, back, address);
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        listener.ok_or_else(refused)?.try_send(theirs).map_err(|_full| refused())?;
        Ok(ours)
    }
}

/// In a simulation, until dropped.
#[derive(Debug)]
pub(crate) struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}

impl Link {
    fn each(&self, act: impl Fn(&Pipe)) {
        let mut pipes = lock(&self.pipes);
        pipes.retain(|pipe| pipe.upgrade().inspect(|pipe| act(pipe)).is_some());
    }
}

/// One direction of one connection.
#[derive(Debug)]
struct Pipe {
    link: Arc<Link>,
    flow: Mutex<Flow>,
}

#[derive(Debug, Default)]
struct Flow {
    /// When it was sent, when it arrives, and what it is.
    under_way: VecDeque<(Instant, Instant, Bytes)>,
    /// When what was read last was sent.
    sent: Option<Instant>,
    bytes: usize,
    /// When the last thing sent arrives: nothing overtakes it.
    last: Option<Instant>,
    /// The end arrives then.
    end: Option<Instant>,
    reset: bool,
    /// Broken by the reader's own kernel after a link was cut for this long.
    patience: Option<Duration>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

enum Arrived {
    Bytes,
    End,
    Reset,
    /// Nothing yet; perhaps then.
    Later(Option<Instant>),
}

impl Pipe {
    fn on(link: &Arc<Link>) -> Arc<Self> {
        let pipe = Arc::new(Self { link: Arc::clone(link), flow: Mutex::default() });
        let mut pipes = lock(&link.pipes);
        if pipes.len() >= 64 {
            pipes.retain(|pipe| pipe.strong_count() > 0);
        }
        pipes.push(Arc::downgrade(&pipe));
        pipe
    }

    fn wake(&self) {
        let mut flow = lock(&self.flow);
        let wakers = [flow.reader.take(), flow.writer.take()];
        drop(flow);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    fn arrival(&self, flow: &mut Flow) -> Instant {
        let at = Instant::now() + lock(&self.link.condition).delay;
        let at = flow.last.map_or(at, |last| last.max(at));
        flow.last = Some(at);
        at
    }

    fn close(&self, reset: bool) {
        let mut flow = lock(&self.flow);
        let at = self.arrival(&mut flow);
        flow.end.get_or_insert(at);
        flow.reset |= reset;
        drop(flow);
        self.wake();
    }

    /// What is there now.
    fn look(&self, flow: &Flow) -> Arrived {
        let now = Instant::now();
        if flow.reset {
            return Arrived::Reset;
        }
        if let Some(since) = lock(&self.link.condition).cut_since {
            let broken = flow.patience.map(|patience| since + patience);
            return match broken {
                Some(at) if at <= now => Arrived::Reset,
                later => Arrived::Later(later),
            };
        }
        match (flow.under_way.front(), flow.end) {
            (Some((_, at, _)), _) if *at <= now => Arrived::Bytes,
            (None, Some(at)) if at <= now => Arrived::End,
            (Some((_, at, _)), _) => Arrived::Later(Some(*at)),
            (None, end) => Arrived::Later(end),
        }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Socket {
    read: Arc<Pipe>,
    write: Arc<Pipe>,
    timer: Option<Pin<Box<Sleep>>>,
    reset_on_close: Mutex<bool>,
    /// Where the one that connected wanted to go: says who it is.
    pub(crate) address: SocketAddr,
}

impl Socket {
    fn new(read: Arc<Pipe>, write: Arc<Pipe>, address: SocketAddr) -> Self {
        Self { read, write, timer: None, reset_on_close: Mutex::new(false), address }
    }

    pub(crate) fn keep_alive(&self, patience: Duration) {
        lock(&self.read.flow).patience = Some(patience);
    }

    pub(crate) fn reset_on_close(&self) {
        *lock(&self.reset_on_close) = true;
    }

    /// When what was read last was sent.
    pub(crate) fn sent(&self) -> Option<Instant> {
        lock(&self.read.flow).sent
    }

    pub(crate) async fn readable(&self) -> io::Result<()> {
        loop {
            let seen = {
                let flow = lock(&self.read.flow);
                self.read.look(&flow)
            };
            let Arrived::Later(at) = seen else { return Ok(()) };
            let changed = poll_fn(|cx| {
                let mut flow = lock(&self.read.flow);
                if !matches!(self.read.look(&flow), Arrived::Later(then) if then == at) {
                    return Poll::Ready(());
                }
                flow.reader = Some(cx.waker().clone());
                Poll::Pending
            });
            match at {
                Some(at) => {
                    tokio::select! { biased; () = changed => {}, () = sleep_until(at) => {} }
                }
                None => changed.await,
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let mut flow = lock(&this.read.flow);
            match this.read.look(&flow) {
                Arrived::Bytes => {
                    let Some((sent, _, bytes)) = flow.under_way.front_mut() else { continue };
                    let sent = *sent;
                    let n = bytes.len().min(buf.remaining());
                    buf.put_slice(&bytes.split_to(n));
                    if !bytes.has_remaining() {
                        flow.under_way.pop_front();
                    }
                    flow.bytes -= n;
                    flow.sent = Some(sent);
                    let writer = flow.writer.take();
                    drop(flow);
                    writer.into_iter().for_each(Waker::wake);
                    return Poll::Ready(Ok(()));
                }
                Arrived::End => return Poll::Ready(Ok(())),
                Arrived::Reset => {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                Arrived::Later(at) => {
                    flow.reader = Some(cx.waker().clone());
                    drop(flow);
                    let Some(at) = at else { return Poll::Pending };
                    let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
                    if timer.deadline() != at {
                        timer.as_mut().reset(at);
                    }
                    if timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // The other end has gone: nobody will read this.
        if lock(&self.read.flow).reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if Arc::strong_count(&self.write) == 1 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let mut flow = lock(&self.write.flow);
        if flow.reset || flow.end.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let n = bytes.len().min(WINDOW.saturating_sub(flow.bytes));
        if n == 0 && !bytes.is_empty() {
            flow.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let at = self.write.arrival(&mut flow);
        let piece = Bytes::copy_from_slice(bytes.get(..n).unwrap_or_default());
        flow.under_way.push_back((Instant::now(), at, piece));
        flow.bytes += n;
        let reader = flow.reader.take();
        drop(flow);
        reader.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write.close(false);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.write.close(*lock(&self.reset_on_close));
        // Whoever still writes to it hears of it.
        self.read.wake();
    }
}
