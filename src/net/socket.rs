//! A socket that is asked for bytes more often than any come.
//!
//! HTTP's machinery looks for bytes whenever anything happens: between the parts of one exchange it
//! finds none for several times as often as it finds some. Each time, the runtime takes a lock and
//! notes whom to wake, who is the same task as before.

use std::{
    io,
    pin::Pin,
    ptr,
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{AsyncRead as _, Interest, ReadBuf},
    net::TcpStream,
    task::coop,
};

/// A socket, and who is known to be woken when it has something to read.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    awaited: Option<Awaited>,
}

/// A waker that the runtime holds, by its identity: as long as it is held, no other has the same.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Awaited {
    data: usize,
    vtable: usize,
}

impl Awaited {
    fn by(waker: &Waker) -> Self {
        Self { data: waker.data().addr(), vtable: ptr::from_ref(waker.vtable()).addr() }
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self { stream, awaited: None }
    }
}

impl Socket {
    /// The runtime's socket, for all but reading.
    pub(super) fn get(&self) -> &TcpStream {
        &self.stream
    }

    /// The runtime's socket, for all but reading.
    pub(super) fn get_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// The runtime's socket.
    pub fn into_inner(self) -> TcpStream {
        self.stream
    }

    /// Whether nothing has come since it was found empty, as far as the runtime knows.
    fn is_quiet(&self) -> bool {
        self.stream.try_io(Interest::READABLE, || Ok(())).is_err()
    }

    /// As [`tokio::io::AsyncRead::poll_read`].
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let waker = cx.waker();
        let by = Awaited::by(waker);
        if self.is_quiet() {
            // Whoever waits still waits: it is woken by what ends the quiet.
            if self.awaited == Some(by) || waker.will_wake(Waker::noop()) {
                return Poll::Pending;
            }
        }
        // Without a budget the runtime has the task come again, and notes nothing.
        let is_asked = coop::has_budget_remaining();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.awaited = (is_asked && polled.is_pending()).then_some(by);
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
        time::Duration,
    };

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Count {
        fn new() -> (Arc<Self>, Waker) {
            let count = Arc::<Self>::default();
            (Arc::clone(&count), Waker::from(count))
        }

        async fn reaches(&self, n: usize) {
            let woken = async {
                while self.0.load(Ordering::SeqCst) < n {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), woken).await.unwrap();
            assert_eq!(self.0.load(Ordering::SeqCst), n);
        }
    }

    async fn pair() -> (Socket, std::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().await.unwrap().0.into(), peer)
    }

    /// How many bytes it had for whoever this waker wakes, if it was ready.
    fn read(socket: &mut Socket, waker: &Waker) -> Option<usize> {
        let mut scratch = [0; 16];
        let mut buf = ReadBuf::new(&mut scratch);
        match socket.poll_read(&mut Context::from_waker(waker), &mut buf) {
            Poll::Ready(result) => {
                result.unwrap();
                Some(buf.filled().len())
            }
            Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn who_asked_last_is_woken_however_often_it_asked() {
        let (mut socket, mut peer) = pair().await;
        let ((first, one), (second, two)) = (Count::new(), Count::new());
        for round in 1..=3 {
            for waker in [&one, &one, &two, &two, &one, &one] {
                assert_eq!(read(&mut socket, waker), None);
            }
            peer.write_all(b"abc").unwrap();
            first.reaches(round).await;
            assert_eq!(read(&mut socket, &one), Some(3));
        }
        assert_eq!(read(&mut socket, &one), None);
        assert_eq!(read(&mut socket, &two), None);
        drop(peer);
        second.reaches(1).await;
        first.reaches(3).await;
        assert_eq!(read(&mut socket, &two), Some(0), "the end");
    }

    #[tokio::test]
    async fn a_look_that_wakes_nobody_changes_nobody() {
        let (mut socket, mut peer) = pair().await;
        let (count, waker) = Count::new();
        assert_eq!(read(&mut socket, &waker), None);
        assert_eq!(read(&mut socket, Waker::noop()), None);
        peer.write_all(b"abc").unwrap();
        count.reaches(1).await;
        assert_eq!(read(&mut socket, Waker::noop()), Some(3), "and sees what there is");
    }

    #[tokio::test]
    async fn a_task_without_a_budget_is_woken_all_the_same() {
        let (mut socket, mut peer) = pair().await;
        let (count, waker) = Count::new();
        while coop::has_budget_remaining() {
            coop::consume_budget().await;
        }
        assert_eq!(read(&mut socket, &waker), None);
        count.reaches(1).await;
        assert_eq!(read(&mut socket, &waker), None);
        peer.write_all(b"abc").unwrap();
        count.reaches(2).await;
        assert_eq!(read(&mut socket, &waker), Some(3));
    }

    #[tokio::test]
    async fn a_read_that_filled_its_buffer_is_followed_by_another() {
        let (mut socket, mut peer) = pair().await;
        let (count, waker) = Count::new();
        assert_eq!(read(&mut socket, &waker), None);
        peer.write_all(&[0; 20]).unwrap();
        count.reaches(1).await;
        assert_eq!(read(&mut socket, &waker), Some(16));
        assert_eq!(read(&mut socket, &waker), Some(4));
        assert_eq!(read(&mut socket, &waker), None);
        peer.write_all(&[0; 16]).unwrap();
        count.reaches(2).await;
        assert_eq!(read(&mut socket, &waker), Some(16));
        assert_eq!(read(&mut socket, &waker), None);
    }
}
