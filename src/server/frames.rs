//! Counts what an HTTP/2 client sends, frame by frame, to tell a flood from a conversation.
//!
//! Frames that cost work and ask for nothing (PING, SETTINGS, PRIORITY, empty DATA, unknown ones)
//! are answered or skipped by h2 at the same price for everybody. A client may send a thousand of
//! them a second (`limits.frames`), and as many more as it sends useful ones; window updates follow
//! what it receives. Requests that it takes back at once (`RST_STREAM`: CVE-2023-44487), or makes
//! us take back by breaking the rules of its own streams (CVE-2025-8671), have a limit of their own.
//! Only frame heads are looked at, as they pass (RFC 9113 section 4.1); whether they are right is
//! h2's business. Without a clock: whoever asks starts a new second with [`Frames::tick`].

use std::cell::Cell;

/// A client that updates its windows for less than this at a time may do so `limits.frames` times
/// a second.
const UPDATE: u64 = 1024;
const PREFACE: usize = 24;

/// What passed in this second, and where in the stream of frames it stands.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Bytes to skip: the preface, or a payload.
    skip: Cell<usize>,
    /// The frame head that is being read, and how much of it is there.
    head: Cell<([u8; 9], usize)>,
    /// Frames since the connection began.
    seen: Cell<u64>,
    useful: Cell<u64>,
    useless: Cell<u64>,
    updates: Cell<u64>,
    resets: Cell<u64>,
    /// Requests that were given up before their answer was whole, whoever reset them.
    given_up: Cell<u64>,
    /// Both of these since the connection began.
    broken: Cell<u64>,
    /// The last frame's.
    kind: Cell<u8>,
    /// Requests begun since the connection began, and the last one's stream.
    begun: Cell<u64>,
    last: Cell<u32>,
    /// The frame that is being read ends the head of another one, or goes on with it.
    begins: Cell<Begins>,
    /// Bytes sent when the second began.
    sent: Cell<u64>,
    /// `limits.resets`
    most_resets: u64,
    /// `limits.frames`
    free: u64,
}

/// How far the head of a new request is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Begins {
    /// There is none.
    No,
    /// `CONTINUATION` follows.
    GoesOn,
    /// It ends with this frame.
    Ends,
}

/// What is too much.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Flood {
    /// Frames that ask for nothing.
    Frames,
    /// Requests taken back.
    Resets,
}

/// What h2 found to be too much.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Calm {
    /// A head: far beyond the limit, or in more `CONTINUATION` frames than that has room for
    /// (CVE-2024-27316).
    Head,
    /// The rest.
    Flood(Flood),
}

impl Frames {
    pub(crate) fn new(resets: usize, frames: usize) -> Self {
        Self {
            skip: Cell::new(PREFACE),
            head: Cell::new(([0; 9], 0)),
            seen: Cell::new(0),
            useful: Cell::new(0),
            useless: Cell::new(0),
            updates: Cell::new(0),
            resets: Cell::new(0),
            given_up: Cell::new(0),
            broken: Cell::new(0),
            kind: Cell::new(0),
            begun: Cell::new(0),
            last: Cell::new(0),
            begins: Cell::new(Begins::No),
            sent: Cell::new(0),
            most_resets: resets as u64,
            free: frames as u64,
        }
    }

    /// How many requests have begun, by their heads.
    pub(super) fn begun(&self) -> u64 {
        self.begun.get()
    }

    /// A request was given up before its answer was whole.
    pub(super) fn gave_up(&self) {
        self.given_up.set(self.given_up.get() + 1);
        self.broken.set(self.broken.get() + 1);
    }

    /// So many came by HTTP/3, whose frames are found where they are read: those that ask for
    /// something, and others.
    #[cfg(feature = "http3")]
    pub(super) fn add(&self, useful: u64, useless: u64) {
        self.useful.set(self.useful.get() + useful);
        self.useless.set(self.useless.get() + useless);
    }

    /// Why h2 ended the connection by a limit of its own, which it does not say: by what passed,
    /// when so many requests did not get as far as the service.
    pub(super) fn why_calm(&self, unseen: u64) -> Calm {
        // Fewer than any of its limits for what is reset, and more than happens to a client that
        // means well.
        const MANY: u64 = 16;
        match self.kind.get() {
            _ if self.broken.get() + unseen > MANY => Calm::Flood(Flood::Resets),
            1 | 9 => Calm::Head,
            _ => Calm::Flood(Flood::Frames),
        }
    }

    /// Whether any frame came yet.
    pub(crate) fn any(&self) -> bool {
        self.seen.get() > 0
    }

    /// These bytes came.
    pub(crate) fn see(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let skip = self.skip.get().min(bytes.len());
            if skip > 0 {
                self.skip.set(self.skip.get() - skip);
                bytes = bytes.get(skip..).unwrap_or_default();
                self.ended();
                continue;
            }
            let (mut head, have) = self.head.get();
            let more = (head.len() - have).min(bytes.len());
            if let (Some(to), Some(from)) = (head.get_mut(have..have + more), bytes.get(..more)) {
                to.copy_from_slice(from);
            }
            bytes = bytes.get(more..).unwrap_or_default();
            let have = have + more;
            if have == head.len() {
                self.frame(head);
                self.ended();
                self.head.set((head, 0));
            } else {
                self.head.set((head, have));
            }
        }
    }

    /// Notes the end of a frame that ends a new request's head.
    fn ended(&self) {
        if self.skip.get() == 0 && self.begins.get() == Begins::Ends {
            self.begins.set(Begins::No);
            self.begun.set(self.begun.get() + 1);
        }
    }

    fn frame(&self, [a, b, c, kind, flags, id @ ..]: [u8; 9]) {
        const END_HEADERS: u8 = 4;
        let stream = u32::from_be_bytes(id) & (u32::MAX >> 1);
        let is_new = kind == 1 && stream > self.last.get();
        if is_new {
            self.last.set(stream);
        }
        if is_new || (kind == 9 && self.begins.get() == Begins::GoesOn) {
            let ends = flags & END_HEADERS != 0;
            self.begins.set(if ends { Begins::Ends } else { Begins::GoesOn });
        }
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        self.skip.set(length);
        self.kind.set(kind);
        if kind == 3 {
            self.broken.set(self.broken.get() + 1);
        }
        self.seen.set(self.seen.get() + 1);
        let counter = match kind {
            // DATA that brings something, an end at least; HEADERS.
            0 if length > 0 || flags & 1 == 1 => &self.useful,
            1 => &self.useful,
            3 => &self.resets,
            8 => &self.updates,
            _ => &self.useless,
        };
        counter.set(counter.get() + 1);
    }

    /// Whether this is too much for one second, in which the connection has sent up to `sent`.
    pub(crate) fn flood(&self, sent: u64) -> Option<Flood> {
        let free = self.free + self.useful.get();
        if self.resets.get().max(self.given_up.get()) > self.most_resets {
            Some(Flood::Resets)
        } else if self.useless.get() > free
            || self.updates.get() > free + (sent - self.sent.get()) / UPDATE
        {
            Some(Flood::Frames)
        } else {
            None
        }
    }

    /// Begins another second.
    pub(crate) fn tick(&self, sent: u64) {
        self.sent.set(sent);
        let all = [&self.useful, &self.useless, &self.updates, &self.resets, &self.given_up];
        for counter in all {
            counter.set(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        frame.resize(9 + payload, b'x');
        frame
    }

    fn floods(frames: &[u8]) -> bool {
        let counted = Frames::new(10, 1000);
        counted.see(&[b'P'; PREFACE]);
        counted.see(frames);
        counted.flood(0).is_some()
    }

    #[test]
    fn what_asks_for_nothing_floods_and_what_asks_does_not() {
        for (what, kind, flags, payload, times, flood) in [
            ("pings", 6, 0, 8, 1001, true),
            ("a few pings", 6, 0, 8, 1000, false),
            ("settings", 4, 0, 0, 1001, true),
            ("priorities", 2, 0, 5, 1001, true),
            ("empty data", 0, 0, 0, 1001, true),
            ("continuations", 9, 0, 0, 1001, true),
            ("unknown", 99, 0, 3, 1001, true),
            ("updates", 8, 0, 4, 1001, true),
            ("requests taken back", 3, 0, 4, 11, true),
            ("some taken back", 3, 0, 4, 10, false),
            ("data", 0, 0, 100, 5000, false),
            ("requests", 1, 4, 20, 5000, false),
            ("ends", 0, 1, 0, 5000, false),
        ] {
            assert_eq!(floods(&frame(kind, flags, payload).repeat(times)), flood, "{what}");
        }
        let mixed = [frame(0, 0, 10), frame(6, 0, 8)].concat().repeat(3000);
        assert!(!floods(&mixed), "a ping for each useful frame, as estimators of bandwidth send");
    }

    #[test]
    fn windows_may_be_updated_for_what_was_received() {
        let counted = Frames::new(10, 1000);
        counted.see(&[b'P'; PREFACE]);
        counted.see(&frame(8, 0, 4).repeat(3000));
        assert_eq!(counted.flood(1 << 20), Some(Flood::Frames));
        assert_eq!(counted.flood(2 << 20), None);
        counted.tick(2 << 20);
        assert_eq!(counted.flood(2 << 20), None);
    }

    #[test]
    fn requests_that_we_have_to_reset_count_as_taken_back() {
        let counted = Frames::new(10, 1000);
        (0..10).for_each(|_| counted.gave_up());
        counted.see(&[b'P'; PREFACE]);
        counted.see(&frame(3, 0, 4).repeat(10));
        assert_eq!(counted.flood(0), None, "who resets a request also gives it up: once is enough");
        counted.gave_up();
        assert_eq!(counted.flood(0), Some(Flood::Resets));
        counted.tick(0);
        assert_eq!(counted.flood(0), None);
    }

    #[test]
    fn requests_are_counted_by_their_heads() {
        let counted = Frames::new(10, 1000);
        let on = |kind, flags, payload, stream: u8| {
            let mut frame = frame(kind, flags, payload);
            frame[8] = stream;
            frame
        };
        counted.see(&[b'P'; PREFACE]);
        for (what, frame, begun) in [
            ("a head", on(1, 4, 3, 1), 1),
            ("an empty one", on(1, 4, 0, 3), 2),
            ("its trailers", on(1, 5, 3, 3), 2),
            ("a head that goes on", on(1, 0, 3, 5), 2),
            ("and on", on(9, 0, 3, 5), 2),
            ("and ends", on(9, 4, 0, 5), 3),
            ("trailers that go on", on(1, 1, 3, 5), 3),
            ("and end", on(9, 4, 3, 5), 3),
        ] {
            let (last, most) = frame.split_last().expect("it has a head");
            counted.see(most);
            assert!(counted.begun() <= begun);
            counted.see(&[*last]);
            assert_eq!(counted.begun(), begun, "{what}");
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(
            frames in prop::collection::vec((0u8..12, 0u8..2, 0usize..40), 0..60),
            cuts in prop::collection::vec(1usize..30, 1..20),
        ) {
            let mut bytes = vec![b'P'; PREFACE];
            bytes.extend(frames.iter().flat_map(|(kind, flags, n)| frame(*kind, *flags, *n)));
            let (whole, cut) = (Frames::new(10, 1000), Frames::new(10, 1000));
            whole.see(&bytes);
            let (mut rest, mut cuts) = (&bytes[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(*cuts.next().unwrap().min(&rest.len()));
                cut.see(now);
                rest = later;
            }
            prop_assert_eq!(whole.seen.get(), frames.len() as u64);
            prop_assert_eq!(whole.seen.get(), cut.seen.get());
            prop_assert_eq!(whole.useful.get(), cut.useful.get());
            prop_assert_eq!(whole.useless.get(), cut.useless.get());
            prop_assert_eq!(whole.begun(), cut.begun());
        }

        #[test]
        fn any_bytes_can_be_counted(bytes: Vec<u8>) {
            Frames::new(0, 0).see(&bytes);
        }
    }
}
