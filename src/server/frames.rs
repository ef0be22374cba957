//! Counts what an HTTP/2 client sends, frame by frame, to tell a flood from a conversation.
//!
//! Frames that cost work and ask for nothing (PING, SETTINGS, PRIORITY, empty DATA, unknown ones)
//! are answered or skipped by h2 at the same price for everybody. A client may send a thousand of
//! them a second, and as many more as it sends useful ones; requests that it takes back at once
//! (`RST_STREAM`: CVE-2023-44487) have a limit of their own; window updates follow what it receives.
//! Only frame heads are looked at, as they pass (RFC 9113 section 4.1); whether they are right is
//! h2's business. Without a clock: whoever asks starts a new second with [`Frames::tick`].

use std::cell::Cell;

/// Useless frames a second that nobody minds.
const FREE: u64 = 1000;
/// A client that updates its windows for less than this at a time may do so [`FREE`] times a second.
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
    /// Bytes sent when the second began.
    sent: Cell<u64>,
    /// `limits.resets`
    most_resets: u64,
}

impl Frames {
    pub(crate) fn new(resets: usize) -> Self {
        Self {
            skip: Cell::new(PREFACE),
            head: Cell::new(([0; 9], 0)),
            seen: Cell::new(0),
            useful: Cell::new(0),
            useless: Cell::new(0),
            updates: Cell::new(0),
            resets: Cell::new(0),
            sent: Cell::new(0),
            most_resets: resets as u64,
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
                self.head.set((head, 0));
            } else {
                self.head.set((head, have));
            }
        }
    }

    fn frame(&self, [a, b, c, kind, flags, ..]: [u8; 9]) {
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        self.skip.set(length);
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
    pub(crate) fn is_flood(&self, sent: u64) -> bool {
        let free = FREE + self.useful.get();
        self.resets.get() > self.most_resets
            || self.useless.get() > free
            || self.updates.get() > free + (sent - self.sent.get()) / UPDATE
    }

    /// Begins another second.
    pub(crate) fn tick(&self, sent: u64) {
        self.sent.set(sent);
        for counter in [&self.useful, &self.useless, &self.updates, &self.resets] {
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
        let counted = Frames::new(10);
        counted.see(&[b'P'; PREFACE]);
        counted.see(frames);
        counted.is_flood(0)
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
        let counted = Frames::new(10);
        counted.see(&[b'P'; PREFACE]);
        counted.see(&frame(8, 0, 4).repeat(3000));
        assert!(counted.is_flood(1 << 20) && !counted.is_flood(2 << 20));
        counted.tick(2 << 20);
        assert!(!counted.is_flood(2 << 20));
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(
            frames in prop::collection::vec((0u8..12, 0u8..2, 0usize..40), 0..60),
            cuts in prop::collection::vec(1usize..30, 1..20),
        ) {
            let mut bytes = vec![b'P'; PREFACE];
            bytes.extend(frames.iter().flat_map(|(kind, flags, n)| frame(*kind, *flags, *n)));
            let (whole, cut) = (Frames::new(10), Frames::new(10));
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
        }

        #[test]
        fn any_bytes_can_be_counted(bytes: Vec<u8>) {
            Frames::new(0).see(&bytes);
        }
    }
}
