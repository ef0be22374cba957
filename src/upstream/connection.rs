//! One connection to a node, as an exchange uses it.
//!
//! On HTTP/1.1, hyper's connection future is not spawned as a task of its own: whoever has an exchange with
//! the node polls it, and an idle connection is polled by nobody. That saves two task switches
//! per request, and dropping a request closes its connection at once. What it asks for is a look
//! at an idle connection before it is used again: [`Connection::is_usable`].

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use hyper::{
    body::{Body, Incoming},
    client::conn::http1,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    sync::Notify,
    time::Instant,
};

use super::{
    h2::{self, H2, Handle},
    heads::Heads,
    resets::Resets,
};
use crate::{
    decide::{Failure, FailureKind},
    net::{Stream, proxy_protocol::Introduction, tls::turned_away},
    server::{self, write_vectored},
    telemetry::metrics::Opened,
};

/// A connection to a node that carries request bodies of type `B`.
#[derive(Debug)]
pub struct Connection<B: Body + 'static> {
    speaks: Speaks<B>,
    wire: Rc<Wire>,
    /// The node refused the exchange.
    refused: bool,
    /// The node answered in HTTP/1.0. hyper would send the next request in it as well, and without
    /// its body where that is chunked.
    old: bool,
    /// Exchanges begun on it.
    uses: u64,
    /// The client whose requests alone it carries, if the node was told.
    speaks_for: Option<Introduction>,
    /// When it was last put into a pool.
    idle_since: Instant,
    /// Counts it as open for as long as it is there.
    opened: Option<Opened>,
    /// The stream of HTTP/2 that became a tunnel.
    tunnel: Option<OnUpgrade>,
}

/// What is spoken on it.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every connection is the large one")]
enum Speaks<B: Body + 'static> {
    Http1 {
        sender: http1::SendRequest<B>,
        driver: http1::Connection<TokioIo<NodeIo>, B>,
        /// HTTP on it is over: `driver` must not be polled again.
        ended: bool,
    },
    /// Others use it too.
    H2(Handle<B>),
}

/// What is known of the socket below hyper.
#[derive(Debug, Default)]
pub struct Wire {
    /// A byte of the current request reached the socket.
    written: Cell<bool>,
    /// The node takes no more: what is left of the request goes nowhere.
    broken: Cell<bool>,
    /// The socket takes nothing at present.
    blocked: Cell<bool>,
    /// Bytes of a request body that HTTP/1.1's machinery has and the socket may not have yet. Of
    /// HTTP/2 nothing is counted: windows do that.
    unsent: Option<Cell<usize>>,
    /// Any byte of the current answer came.
    answered: Cell<bool>,
    /// Any byte of any answer came.
    heard: Cell<bool>,
    /// What the node said instead of answering, when it looked at our certificate.
    turned_away: Cell<Option<AlertDescription>>,
    /// It is not clear where the head of the answer begins or ends.
    unclear: Cell<bool>,
    heads: Heads,
    /// Of HTTP/2.
    frames: Option<(Greeting, Resets)>,
}

/// The node's first frame: its SETTINGS (RFC 9113 section 3.4).
#[derive(Debug, Default)]
struct Greeting {
    /// Bytes that came.
    seen: Cell<usize>,
    /// The first three: its length.
    length: Cell<usize>,
    complete: Cell<bool>,
    completed: Notify,
}

impl Greeting {
    fn see(&self, new: &[u8]) {
        const HEAD: usize = 9; // RFC 9113 section 4.1
        if self.complete.get() {
            return;
        }
        for byte in new.iter().take(3_usize.saturating_sub(self.seen.get())) {
            self.length.set(self.length.get() << 8 | usize::from(*byte));
        }
        self.seen.set(self.seen.get() + new.len());
        if self.seen.get() >= HEAD + self.length.get() {
            self.complete.set(true);
            self.completed.notify_waiters();
        }
    }
}

impl Wire {
    /// For a connection that many exchanges share.
    pub(super) fn of_h2() -> Self {
        Self { frames: Some((Greeting::default(), Resets::default())), ..Self::default() }
    }

    /// Waits until the node has said what it allows. Whoever waits is woken after its frame was
    /// looked into.
    pub(super) async fn greeted(&self) {
        let Some((greeting, _)) = &self.frames else { return };
        while !greeting.complete.get() {
            greeting.completed.notified().await;
        }
    }

    /// Whether the node would not have our certificate, or none, and so has seen no request.
    pub fn turned_away(&self) -> Option<AlertDescription> {
        self.turned_away.get()
    }

    /// Whether the node has stopped taking the request. Its answer may still come.
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Ready when a further frame of the request can go out. Until then whoever sends it is woken
    /// when the socket takes more: what a node does not read has to wait with the client.
    pub fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.blocked.get() {
            return Poll::Pending;
        }
        if self.unsent.as_ref().is_some_and(|unsent| unsent.get() >= AHEAD) {
            // It is written now, and nobody might ask again.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// A frame of so many bytes goes out.
    pub fn queue(&self, n: usize) {
        if let Some(unsent) = &self.unsent {
            unsent.set(unsent.get() + n);
        }
    }

    /// Whether the node said `100 Continue` to the current request.
    pub fn continued(&self) -> bool {
        self.heads.continued()
    }

    /// Goes on as if the node had said `100 Continue`.
    pub fn continue_anyway(&self) {
        self.heads.continue_anyway();
    }

    /// The next interim response (not 100) that the node sent, ready for the client.
    pub fn next_interim(&self) -> Option<Bytes> {
        self.heads.next_interim()
    }

    fn flushed(&self) {
        self.blocked.set(false);
        if let Some(unsent) = &self.unsent {
            unsent.set(0);
        }
    }

    fn begin(&self) {
        self.written.set(false);
        self.answered.set(false);
        self.flushed();
        self.heads.begin();
    }
}

/// The most that is read from a node at once, and the largest response head: so much waits for a
/// client that does not read. A body of 64 KiB and its head come in one read. Larger reads save
/// nothing that can be measured; half as much makes bulk cost half as much again.
const READ: usize = 68 << 10;
/// While so much of a request waits for the node's socket, there is no further frame of it.
const AHEAD: usize = 8 << 10;

impl<B> Connection<B>
where
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Speaks HTTP/1.1 on a stream to a node, which knows whom it `speaks_for`.
    ///
    /// # Errors
    /// None that is known: nothing is sent yet.
    pub async fn over(stream: Stream, speaks_for: Option<Introduction>) -> io::Result<Self> {
        let wire = Rc::new(Wire { unsent: Some(Cell::new(0)), ..Wire::default() });
        let io = NodeIo { stream, wire: Rc::clone(&wire) };
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(READ)
            .handshake(TokioIo::new(io))
            .await
            .map_err(io::Error::other)?;
        Ok(Self {
            speaks: Speaks::Http1 { sender, driver, ended: false },
            wire,
            refused: false,
            old: false,
            uses: 0,
            speaks_for,
            idle_since: Instant::now(),
            opened: None,
            tunnel: None,
        })
    }

    /// For one exchange over a connection that others use too. `fresh`: it was just made.
    pub fn sharing(h2: &Rc<H2<B>>, speaks_for: Option<Introduction>, fresh: bool) -> Self {
        Self {
            speaks: Speaks::H2(Handle::of(h2)),
            wire: Rc::default(),
            refused: false,
            old: false,
            uses: u64::from(!fresh),
            speaks_for,
            idle_since: Instant::now(),
            opened: None,
            tunnel: None,
        }
    }

    /// Whether the node said that it did not act on the request: it is there, but has no room.
    pub fn was_refused(&self) -> bool {
        self.refused
    }

    /// Whether it is given back to a pool. One that others use too is in none, and one to a node
    /// of HTTP/1.0 carries one request.
    pub fn is_pooled(&self) -> bool {
        matches!(self.speaks, Speaks::Http1 { .. }) && !self.old
    }

    /// Counts it as open from now on, until it is dropped or becomes a tunnel.
    pub fn counted(&mut self, opened: Opened) {
        self.opened = Some(opened);
    }

    /// The socket's side of it, for the request body that is about to be sent.
    pub fn wire(&self) -> Rc<Wire> {
        Rc::clone(&self.wire)
    }

    /// Whether this connection has carried a request before the current one.
    pub fn is_reused(&self) -> bool {
        self.uses > 1
    }

    /// The client whose requests alone it carries.
    pub fn speaks_for(&self) -> Option<Introduction> {
        self.speaks_for
    }

    /// Marks it idle from `now` on.
    pub fn rest(&mut self, now: Instant) {
        self.idle_since = now;
    }

    /// How long it has been idle.
    pub fn idle_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.idle_since)
    }

    /// Looks whether the node has closed an idle connection, or sent what nobody asked for. The
    /// runtime has seen either already: this is no system call unless there is something to read.
    ///
    /// Nobody is to be woken by what is seen here. With a real waker the request that is sent next
    /// would wake the very task that sends it, and whoever used the connection last as well.
    pub fn is_usable(&mut self) -> bool {
        self.poll_driver(&mut Context::from_waker(Waker::noop()));
        self.is_ready()
    }

    /// Whether it can carry another request, as far as is known without a look at the socket.
    pub fn is_ready(&self) -> bool {
        match &self.speaks {
            Speaks::Http1 { sender, ended, .. } => !ended && sender.is_ready(),
            Speaks::H2(handle) => !handle.is_closed(),
        }
    }

    /// Sends a request and waits for the final response head. `gives_up` is asked on every poll
    /// whether it has taken too long.
    ///
    /// # Errors
    /// How it failed, and whether any byte of the request reached the socket. After an error the
    /// connection must be dropped.
    pub async fn exchange(
        &mut self,
        request: Request<B>,
        mut gives_up: impl FnMut(&mut Context<'_>) -> bool,
    ) -> Result<Response<Incoming>, Failure> {
        self.uses += 1;
        self.wire.begin();
        let (sender, driver, ended) = match &mut self.speaks {
            Speaks::Http1 { sender, driver, ended } => (sender, driver, ended),
            // Boxed: HTTP/1.1, which nodes nearly always speak, is not to make room for it.
            Speaks::H2(_) => return Box::pin(self.exchange_h2(request, gives_up)).await,
        };
        // Of one that comes in parts, the driver asks for more: the client has to be able to wake it.
        let is_whole = request.body().is_end_stream();
        let mut response = pin!(sender.send_request(request));
        let mut drive = |cx: &mut Context<'_>| {
            if !*ended {
                *ended = Pin::new(&mut *driver).poll(cx).is_ready();
            }
            // Only the driver answers, which nobody else polls: it wakes nobody.
            response.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        };
        let mut is_sent = false;
        let result = poll_fn(|cx| {
            // What has come is nearly always the whole answer, and nobody is to be woken after that:
            // to note whom, in each of the places where hyper does, and then to wake the very task
            // that runs, takes dozens of locked instructions.
            let mut polled = Poll::Pending;
            if is_sent && is_whole {
                polled = drive(&mut Context::from_waker(Waker::noop()));
            }
            if polled.is_pending() {
                polled = drive(cx);
            }
            is_sent = true;
            match polled {
                Poll::Ready(result) => Poll::Ready(Ok(result)),
                Poll::Pending if gives_up(cx) => Poll::Ready(Err(())),
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
        let written = self.wire.written.get();
        let kind = match result {
            Ok(Ok(response)) => {
                self.old = response.version() == Version::HTTP_10;
                return Ok(response);
            }
            Err(()) => FailureKind::ResponseTimeout,
            Ok(Err(_)) if self.wire.turned_away().is_some() => {
                return Err(Failure { kind: FailureKind::Tls, written: false });
            }
            Ok(Err(_)) if self.wire.unclear.get() => FailureKind::BadResponse,
            Ok(Err(error)) if error.is_parse() || error.is_parse_too_large() => {
                FailureKind::BadResponse
            }
            Ok(Err(_)) if self.is_reused() && !self.wire.answered.get() => {
                FailureKind::StaleConnection
            }
            Ok(Err(_)) => FailureKind::Closed,
        };
        Err(Failure { kind, written })
    }

    async fn exchange_h2(
        &mut self,
        mut request: Request<B>,
        mut gives_up: impl FnMut(&mut Context<'_>) -> bool,
    ) -> Result<Response<Incoming>, Failure> {
        let Speaks::H2(handle) = &self.speaks else {
            return Err(Failure { kind: FailureKind::Closed, written: true });
        };
        let websocket = handle.translate(&mut request);
        // hyper does not show a node's interim answers here.
        self.wire.continue_anyway();
        let mut sender = handle.sender();
        let mut response = pin!(sender.try_send_request(request));
        let result = poll_fn(|cx| match response.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if gives_up(cx) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        })
        .await;
        let (kind, written) = match result {
            Some(Ok(response)) if !server::are_tokens(response.headers()) => {
                (FailureKind::BadResponse, true)
            }
            Some(Ok(mut response)) => {
                if let Some(key) = websocket.filter(|_| response.status() == StatusCode::OK) {
                    self.tunnel = Some(hyper::upgrade::on(&mut response));
                    h2::switch(&mut response, &key);
                }
                return Ok(response);
            }
            None => (FailureKind::ResponseTimeout, true),
            Some(Err(_)) if handle.wire().turned_away().is_some() => {
                self.wire.turned_away.set(handle.wire().turned_away());
                (FailureKind::Tls, false)
            }
            // It comes back where nothing of it was sent: the connection had ended.
            Some(Err(error)) if error.message().is_some() => (FailureKind::StaleConnection, false),
            Some(Err(error)) if h2::is_unprocessed(error.error()) => {
                self.refused = true;
                (FailureKind::StaleConnection, false)
            }
            Some(Err(_)) => (FailureKind::Closed, true),
        };
        Err(Failure { kind, written })
    }

    /// Lets the exchange go on: reads the response body into hyper's channel and sends what is
    /// left of the request.
    pub fn poll_driver(&mut self, cx: &mut Context<'_>) {
        if let Speaks::Http1 { driver, ended, .. } = &mut self.speaks
            && !*ended
        {
            *ended = Pin::new(driver).poll(cx).is_ready();
        }
    }

    /// Whether a WebSocket can go over it as a stream among others (RFC 8441 section 3): the node
    /// says so when it greets.
    pub async fn takes_websockets(&self) -> bool {
        match &self.speaks {
            Speaks::Http1 { .. } => false,
            Speaks::H2(handle) => {
                handle.wire().greeted().await;
                handle.takes_websockets()
            }
        }
    }

    /// Whether others use it too.
    pub fn is_shared(&self) -> bool {
        matches!(self.speaks, Speaks::H2(_))
    }

    /// After a 101: takes the socket out of HTTP, with what the node already sent on it, or a
    /// stream, with the hold on the connection that carries it. `None`: it broke.
    pub async fn into_stream(mut self: Box<Self>) -> Option<(Stream, Bytes, Option<Handle<B>>)> {
        if let Some(tunnel) = self.tunnel.take()
            && let Speaks::H2(handle) = self.speaks
        {
            let stream = Stream::Upgraded(Box::new(TokioIo::new(tunnel.await.ok()?)));
            return Some((stream, Bytes::new(), Some(handle)));
        }
        poll_fn(|cx| {
            self.poll_driver(cx);
            match self.speaks {
                Speaks::Http1 { ended: false, .. } => Poll::Pending,
                _ => Poll::Ready(()),
            }
        })
        .await;
        let Speaks::Http1 { driver, .. } = self.speaks else { return None };
        let parts = driver.into_parts();
        Some((parts.io.into_inner().stream, parts.read_buf, None))
    }
}

/// A node's socket.
#[derive(Debug)]
pub struct NodeIo {
    pub(super) stream: Stream,
    pub(super) wire: Rc<Wire>,
}

impl NodeIo {
    fn wrote(&self, len: usize, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(Ok(n)) => {
                if n > 0 {
                    self.wire.written.set(true);
                    self.wire.blocked.set(false);
                }
                Poll::Ready(Ok(n))
            }
            // A node that refuses an upload answers first and closes then. hyper would give up
            // at the failed write and never read that answer (`reference/litefs.md` section 1.3:
            // the replay was still readable after EPIPE), so the rest of the request is thrown
            // away here and reading goes on: to the answer, or to the end of the connection.
            Poll::Ready(Err(_)) => {
                self.wire.broken.set(true);
                Poll::Ready(Ok(len))
            }
            Poll::Pending => {
                self.wire.blocked.set(true);
                Poll::Pending
            }
        }
    }
}

impl AsyncRead for NodeIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut (&mut self.stream).take(READ as u64)).poll_read(cx, buf);
        let new = buf.filled_mut().get_mut(before..).unwrap_or_default();
        if !new.is_empty() {
            self.wire.answered.set(true);
            self.wire.heard.set(true);
            if let Some((greeting, resets)) = &self.wire.frames {
                greeting.see(new);
                resets.see(new);
            }
            if !self.wire.heads.see(new) {
                self.wire.unclear.set(true);
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
        }
        if let Poll::Ready(Err(error)) = &result
            && !self.wire.heard.get()
        {
            self.wire.turned_away.set(turned_away(error));
        }
        result
    }
}

impl AsyncWrite for NodeIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.wire.broken.get() {
            return Poll::Ready(Ok(buf.len()));
        }
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(buf.len(), result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        if self.wire.broken.get() {
            return Poll::Ready(Ok(len));
        }
        let result = write_vectored(&mut self.stream, cx, bufs, len);
        self.wrote(len, result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.wire.broken.get() {
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        // hyper flushes when its own buffer is empty.
        if matches!(result, Poll::Ready(Ok(()))) {
            self.wire.flushed();
        }
        self.wrote(0, result.map_ok(|()| 0)).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Empty};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        sync::oneshot,
        time::{sleep, timeout},
    };

    use super::*;

    const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

    /// A connection after one exchange, and what makes its node go on: with what it says then, or
    /// with the end of the connection where that is nothing.
    async fn used(
        answer: &'static str,
        then: &'static str,
    ) -> (Connection<Empty<Bytes>>, oneshot::Sender<()>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let stream = Stream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (go, goes) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let (mut node, _) = listener.accept().await.unwrap();
            let _ = node.read(&mut [0; 1024]).await.unwrap();
            node.write_all(answer.as_bytes()).await.unwrap();
            let _ = goes.await;
            node.write_all(then.as_bytes()).await.unwrap();
            if !then.is_empty() {
                std::future::pending::<()>().await;
            }
        });
        let mut connection = Connection::over(stream, None).await.unwrap();
        let request = Request::get("/").header("host", "a").body(Empty::new()).unwrap();
        let response = connection.exchange(request, |_| false).await.unwrap();
        let mut body = pin!(response.into_body().collect());
        let body = poll_fn(|cx| {
            connection.poll_driver(cx);
            body.as_mut().poll(cx)
        });
        assert_eq!(body.await.unwrap().to_bytes(), "ok");
        (connection, go)
    }

    #[tokio::test]
    async fn an_idle_connection_is_used_until_its_node_says_or_does_something() {
        for then in ["HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", ""] {
            let (mut connection, go) = used(ANSWER, then).await;
            assert!(connection.is_usable() && connection.is_usable());
            go.send(()).unwrap();
            let unusable = async {
                while connection.is_usable() {
                    sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(Duration::from_secs(10), unusable).await.expect("it is seen");
        }
    }

    #[tokio::test]
    async fn a_connection_with_more_than_the_answer_is_not_used_again() {
        const MORE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n";
        let (connection, _go) = used(MORE, "").await;
        assert!(!connection.is_ready());
    }
}
