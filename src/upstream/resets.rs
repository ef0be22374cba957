//! Follows the frames of a node of HTTP/2, before h2 reads them, for answers that are cut off
//! without an error.
//!
//! A server may reset a stream with `NO_ERROR` once its answer is whole, so that no more of the
//! request is sent (RFC 9113 section 8.1). Of such a reset h2 tells whoever reads the body, and not
//! whether `END_STREAM` came before it; hyper takes it for the end either way, and half an answer
//! would look whole. A `GOAWAY` that leaves out a stream whose answer has begun does the same. Of a
//! tunnel hyper takes `CANCEL` for the end as well, which is how one is aborted (RFC 8441 section 5).
//! All of them get another reason in passing, for which hyper fails the body or the tunnel.

use std::cell::Cell;

/// The head of a frame (RFC 9113 section 4.1).
const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
/// Reasons that look like an end, and the one in their place: the last of four bytes, the others
/// being zero.
const NO_ERROR: u8 = 0;
const CANCEL: u8 = 8;
const INTERNAL_ERROR: u8 = 2;
/// Answers that are remembered as whole: a reset of one comes right behind its end. An older one
/// is h2's no more.
const WHOLE: usize = 32;

/// Looks at one connection.
#[derive(Debug, Default)]
pub(super) struct Resets(Cell<State>);

#[derive(Clone, Copy, Debug)]
struct State {
    head: [u8; HEAD],
    /// Of the head.
    have: usize,
    /// Of the payload, and how much of it is to come.
    at: usize,
    left: usize,
    /// All of the reason so far is zero.
    zero: bool,
    /// The stream that a `GOAWAY` names.
    last: u32,
    /// The last stream that was answered.
    begun: u32,
    whole: [u32; WHOLE],
    next: usize,
}

impl Default for State {
    fn default() -> Self {
        Self {
            head: [0; HEAD],
            have: 0,
            at: 0,
            left: 0,
            zero: true,
            last: 0,
            begun: 0,
            whole: [0; WHOLE],
            next: 0,
        }
    }
}

impl State {
    fn stream(&self) -> u32 {
        let [.., a, b, c, d] = self.head;
        u32::from_be_bytes([a & 0x7f, b, c, d])
    }

    /// A frame's head is there.
    fn begins(&mut self) {
        let [a, b, c, kind, flags, ..] = self.head;
        (self.at, self.have) = (0, 0);
        self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        (self.zero, self.last) = (true, 0);
        let stream = self.stream();
        if kind == HEADERS {
            self.begun = self.begun.max(stream);
        }
        if matches!(kind, DATA | HEADERS)
            && flags & END_STREAM != 0
            && let Some(place) = self.whole.get_mut(self.next)
        {
            *place = stream;
            self.next = (self.next + 1) % WHOLE;
        }
    }

    /// One byte of a reset's reason, or of a `GOAWAY`.
    fn see_reason(&mut self, byte: &mut u8) {
        let is_goaway = self.head.get(3) == Some(&GOAWAY);
        let reason = if is_goaway { 4..8 } else { 0..4 };
        if self.at < reason.start {
            self.last = self.last << 8 | u32::from(*byte);
        } else if reason.contains(&self.at) {
            let cuts = if is_goaway {
                self.last & 0x7fff_ffff < self.begun
            } else {
                !self.whole.contains(&self.stream())
            };
            let is_last = self.at + 1 == reason.end;
            if is_last && self.zero && matches!(*byte, NO_ERROR | CANCEL) && cuts {
                *byte = INTERNAL_ERROR;
            }
            self.zero &= *byte == 0;
        }
    }
}

impl Resets {
    /// These bytes came. They are changed where they would hide that an answer is not whole.
    pub(super) fn see(&self, mut bytes: &mut [u8]) {
        let mut state = self.0.get();
        while let Some(byte) = bytes.first_mut() {
            let mut n = 1;
            if state.left == 0 {
                if let Some(place) = state.head.get_mut(state.have) {
                    *place = *byte;
                }
                state.have += 1;
                if state.have == HEAD {
                    state.begins();
                }
            } else {
                if matches!(state.head.get(3), Some(&(RST_STREAM | GOAWAY))) {
                    state.see_reason(byte);
                } else {
                    n = state.left.min(bytes.len());
                }
                state.at += n;
                state.left -= n;
            }
            bytes = bytes.get_mut(n..).unwrap_or_default();
        }
        self.0.set(state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    }

    fn passed(bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        Resets::default().see(&mut bytes);
        bytes
    }

    #[test]
    fn a_reset_without_an_error_is_one_before_the_end() {
        let reset = |reason| frame(RST_STREAM, 0, 1, &[0, 0, 0, reason]);
        let goaway = |last, reason| frame(GOAWAY, 0, 0, &[0, 0, 0, last, 0, 0, 0, reason, b'x']);
        let (head, data) = (frame(HEADERS, 4, 1, b"h"), frame(DATA, 0, 1, &[0; 20]));
        let end = frame(DATA, END_STREAM, 1, b"");
        let other = frame(DATA, END_STREAM, 3, b"");
        for (frames, last, want) in [
            (vec![&head, &data], reset(0), reset(2)),
            (vec![&head, &data, &other], reset(0), reset(2)),
            (vec![&head, &data, &end], reset(0), reset(0)),
            (vec![&head, &data], reset(8), reset(2)),
            (vec![&head, &data, &end], reset(8), reset(8)),
            (vec![&head, &data], reset(7), reset(7)),
            (
                vec![&head, &data],
                frame(RST_STREAM, 0, 1, &[1, 0, 0, 8]),
                frame(RST_STREAM, 0, 1, &[1, 0, 0, 8]),
            ),
            (vec![&head], goaway(0, 0), goaway(0, 2)),
            (vec![&head], goaway(1, 0), goaway(1, 0)),
            (vec![&head], goaway(0, 1), goaway(0, 1)),
            (vec![], goaway(0, 0), goaway(0, 0)),
        ] {
            let before: Vec<u8> = frames.into_iter().flatten().copied().collect();
            let all = [&before[..], &last].concat();
            assert_eq!(passed(&all), [&before[..], &want].concat(), "{all:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_are_no_matter(
            frames in prop::collection::vec(
                (0_u8..10, 0_u8..8, 0_u8..5, prop::collection::vec(0_u8..3, 0..12)), 0..12),
            cut in 0_usize..200,
        ) {
            let bytes: Vec<u8> =
                frames.iter().flat_map(|(k, f, s, p)| frame(*k, *f, *s, p)).collect();
            let mut pieces = bytes.clone();
            let resets = Resets::default();
            let (first, second) = pieces.split_at_mut(cut.min(bytes.len()));
            resets.see(first);
            resets.see(second);
            prop_assert_eq!(pieces, passed(&bytes));
        }
    }
}
