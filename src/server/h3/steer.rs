//! Which worker a packet is for.
//!
//! The kernel gives a client's packets to one socket of several for as long as its address stays.
//! When that changes, by a NAT that forgot or another network, they come to any. So each
//! connection id that a worker gives out says whose it is, and a worker that finds another's packet
//! hands it over: a queue for each, bounded as a socket's is.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use quinn::{
    AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, UdpPoller,
    udp::{RecvMeta, Transmit},
};

use crate::net::pem;

/// The length of our connection ids.
const LENGTH: usize = 8;
/// Packets that wait for a worker. Over it they are lost, as in a network.
const WAITING: usize = 256;

/// Where the workers of one listener leave packets for one another.
#[derive(Debug)]
pub struct Post(Box<[Letterbox]>);

#[derive(Debug, Default)]
struct Letterbox {
    letters: Mutex<VecDeque<(RecvMeta, Box<[u8]>)>>,
    waker: AtomicWaker,
}

impl Post {
    /// For so many workers.
    pub fn new(workers: usize) -> Arc<Self> {
        Arc::new(Self((0..workers).map(|_| Letterbox::default()).collect()))
    }

    /// Whose packet this is. `None`: it belongs where it came to, because it begins a connection,
    /// or is of no use to anybody.
    fn owner(&self, packet: &[u8]) -> Option<usize> {
        // RFC 9000 section 17.3: a short header, and behind it the id that we gave out.
        match *packet {
            [first, a, b, ..] if first & 0x80 == 0 => whose([a, b], self.0.len()),
            _ => None,
        }
    }

    fn leave(&self, worker: usize, meta: &RecvMeta, packet: &[u8]) {
        let Some(to) = self.0.get(worker) else { return };
        let mut letters = to.letters.lock().unwrap_or_else(PoisonError::into_inner);
        if letters.len() < WAITING {
            letters.push_back((
                RecvMeta { len: packet.len(), stride: packet.len(), ..*meta },
                packet.into(),
            ));
            drop(letters);
            to.waker.wake();
        }
    }

    /// The next packet that was left for a worker.
    fn collect(&self, worker: usize, cx: &Context<'_>) -> Option<(RecvMeta, Box<[u8]>)> {
        let own = self.0.get(worker)?;
        own.waker.register(cx.waker());
        own.letters.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

fn whose(first: [u8; 2], workers: usize) -> Option<usize> {
    usize::from(u16::from_be_bytes(first)).checked_rem(workers)
}

/// A worker's socket.
#[derive(Debug)]
pub(super) struct Steered {
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    pub(super) post: Arc<Post>,
    pub(super) worker: usize,
}

impl Steered {
    /// Leaves the packets that are others' with them, and the rest in `buffer`. Returns how much
    /// that is.
    fn sort(&self, buffer: &mut [u8], meta: &RecvMeta) -> usize {
        let (mut from, mut to) = (0, 0);
        while from < meta.len {
            let end = (from + meta.stride.max(1)).min(meta.len);
            let packet = buffer.get(from..end).unwrap_or_default();
            match self.post.owner(packet) {
                Some(owner) if owner != self.worker => self.post.leave(owner, meta, packet),
                _ => {
                    // Where some are missing, the others move up: all but the last are of one length.
                    if from != to {
                        buffer.copy_within(from..end, to);
                    }
                    to += end - from;
                }
            }
            from = end;
        }
        to
    }
}

impl AsyncUdpSocket for Steered {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if let (Some((letter, packet)), Some(buffer), Some(first)) =
            (self.post.collect(self.worker, cx), bufs.first_mut(), meta.first_mut())
        {
            *first = letter;
            match buffer.get_mut(..packet.len()) {
                Some(room) => room.copy_from_slice(&packet),
                None => first.len = 0,
            }
            return Poll::Ready(Ok(1));
        }
        let received = std::task::ready!(self.socket.poll_recv(cx, bufs, meta))?;
        for (buffer, meta) in bufs.iter_mut().zip(meta).take(received) {
            meta.len = self.sort(buffer, meta);
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

/// Makes a worker's connection ids: random, but for whose they are.
pub(super) struct Ids {
    pub(super) worker: usize,
    pub(super) workers: usize,
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; LENGTH];
        // Where there is no randomness there is no TLS either.
        let _ = pem::provider().secure_random.fill(&mut id);
        let [a, b, ..] = &mut id;
        [*a, *b] = marked([*a, *b], self.worker, self.workers);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        LENGTH
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// The nearest number to a random one that is this worker's.
fn marked(random: [u8; 2], worker: usize, workers: usize) -> [u8; 2] {
    let random = usize::from(u16::from_be_bytes(random));
    let mut own = random - random % workers.max(1) + worker;
    if own > usize::from(u16::MAX) {
        own -= workers;
    }
    u16::try_from(own).unwrap_or_default().to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_says_whose_it_is(random: [u8; 2], workers in 1usize..=1024, worker: prop::sample::Index) {
            let worker = worker.index(workers);
            prop_assert_eq!(whose(marked(random, worker, workers), workers), Some(worker));
        }
    }

    #[derive(Debug)]
    struct Nothing;

    impl AsyncUdpSocket for Nothing {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unimplemented!()
        }

        fn try_send(&self, _: &Transmit<'_>) -> io::Result<()> {
            unimplemented!()
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            unimplemented!()
        }
    }

    #[test]
    fn others_packets_are_handed_over_and_the_rest_stays() {
        let post = Post::new(2);
        let of = |worker| Steered { socket: Arc::new(Nothing), post: Arc::clone(&post), worker };
        let (zero, one) = (of(0), of(1));
        // Three bytes each, the last one shorter: a short header of 0, one of 1, a long one, 1's.
        let mut buffer = [0x40, 0, 2, 0x40, 0, 3, 0xc0, 0, 1, 0x40, 0, 5, 0x40, 0];
        let meta = RecvMeta { len: 14, stride: 3, ..RecvMeta::default() };
        assert_eq!(zero.sort(&mut buffer, &meta), 8);
        assert_eq!(buffer[..8], [0x40, 0, 2, 0xc0, 0, 1, 0x40, 0]);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for want in [[0x40, 0, 3], [0x40, 0, 5]] {
            let mut room = [0; 100];
            let (mut bufs, mut meta) = ([IoSliceMut::new(&mut room)], [RecvMeta::default()]);
            let received = one.poll_recv(&mut cx, &mut bufs, &mut meta);
            assert!(matches!(received, Poll::Ready(Ok(1))));
            assert_eq!((meta[0].len, &bufs[0][..3]), (3, &want[..]));
        }
        assert!(one.poll_recv(&mut cx, &mut [], &mut []).is_pending());
        for _ in 0..2 * WAITING {
            post.leave(1, &meta, &[0]);
        }
        assert_eq!(post.0[1].letters.lock().unwrap().len(), WAITING);
    }
}
