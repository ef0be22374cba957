//! Where WebSocket frames end (RFC 6455 section 5.2), so that a close frame can be put between two
//! of them. Between, not behind a message: control frames may stand in the middle of a fragmented
//! one (section 5.4).
//!
//! Only headers are looked at. Pure.

/// The longest header: two bytes, eight of length, four of mask.
const HEADER: usize = 14;
/// The opcode of a close frame.
const CLOSE: u8 = 0x8;

/// Follows one direction of a WebSocket.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Frames {
    header: [u8; HEADER],
    /// How much of the header is there.
    have: usize,
    /// Bytes of payload that are still to come.
    payload: u64,
    closed: bool,
}

impl Frames {
    /// Whether the last frame is complete.
    pub(crate) fn is_between(&self) -> bool {
        self.have == 0 && self.payload == 0
    }

    /// Whether a close frame has begun: nothing may follow it.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Follows all of it.
    pub(crate) fn see(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = self.frame(rest);
            rest = rest.get(n..).unwrap_or_default();
        }
    }

    /// Follows it to the end of the frame that it begins with or goes on with, or to its own end.
    /// Returns how much that is: at least one byte of any.
    pub(crate) fn frame(&mut self, bytes: &[u8]) -> usize {
        let mut seen = 0;
        while self.payload == 0 {
            let Some(byte) = bytes.get(seen) else { return seen };
            seen += 1;
            if let Some(place) = self.header.get_mut(self.have) {
                *place = *byte;
            }
            self.have += 1;
            if self.have < self.header_len() {
                continue;
            }
            self.have = 0;
            self.closed |= self.header[0] & 0x0f == CLOSE;
            self.payload = self.payload_len();
            if self.payload == 0 {
                return seen;
            }
        }
        let here = usize::try_from(self.payload).unwrap_or(usize::MAX).min(bytes.len() - seen);
        self.payload -= here as u64;
        seen + here
    }

    /// How long this header is, as far as can be said yet.
    fn header_len(&self) -> usize {
        let [_, second, ..] = self.header;
        if self.have < 2 {
            return 2;
        }
        let length = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        2 + length + if second & 0x80 == 0 { 0 } else { 4 }
    }

    fn payload_len(&self) -> u64 {
        let [_, second, rest @ ..] = self.header;
        let number = |bytes: usize| {
            rest.iter().take(bytes).fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        match second & 0x7f {
            126 => number(2),
            127 => number(8),
            short => u64::from(short),
        }
    }
}

/// A close frame as a server sends it, with this code and no reason.
pub(crate) fn close(code: u16) -> [u8; 4] {
    let [high, low] = code.to_be_bytes();
    [0x80 | CLOSE, 2, high, low]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(opcode: u8, masked: bool, payload: usize) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![0x80 | opcode];
        match payload {
            0..126 => frame.push(mask | u8::try_from(payload).unwrap()),
            126..0x1_0000 => {
                frame.push(mask + 126);
                frame.extend(u16::try_from(payload).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(mask + 127);
                frame.extend((payload as u64).to_be_bytes());
            }
        }
        frame.extend(masked.then_some([1, 2, 3, 4]).into_iter().flatten());
        // Payload that looks like headers.
        frame.extend(std::iter::repeat_n(0x88, payload));
        frame
    }

    #[test]
    fn the_close_frame_is_one() {
        let mut frames = Frames::default();
        frames.see(&close(1012));
        assert!(frames.is_between() && frames.is_closed());
        assert_eq!(close(1012), [0x88, 0x02, 0x03, 0xf4]);
    }

    #[test]
    fn an_absurd_length_is_waited_for_and_nothing_more() {
        let mut frames = Frames::default();
        frames.see(&[0x82, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        frames.see(&[0; 1000]);
        assert!(!frames.is_between());
    }

    proptest! {
        #[test]
        fn boundaries_are_where_frames_end_however_the_bytes_come(
            shapes in prop::collection::vec(
                (0_u8..8, any::<bool>(), prop_oneof![0_usize..200, 65_500_usize..65_600]), 1..6),
            cut in 1_usize..5000,
        ) {
            let all: Vec<Vec<u8>> = shapes.iter().map(|(o, m, n)| frame(*o, *m, *n)).collect();
            let mut ends: Vec<usize> = Vec::new();
            for one in &all {
                ends.push(ends.last().copied().unwrap_or(0) + one.len());
            }
            let bytes = all.concat();
            let (mut frames, mut at, mut found) = (Frames::default(), 0, Vec::new());
            for chunk in bytes.chunks(cut) {
                let mut whole = frames.clone();
                let mut rest = chunk;
                while !rest.is_empty() {
                    let n = frames.frame(rest);
                    prop_assert!(n > 0 && n <= rest.len());
                    (at, rest) = (at + n, &rest[n..]);
                    if frames.is_between() {
                        found.push(at);
                    }
                }
                whole.see(chunk);
                prop_assert_eq!(&whole, &frames);
            }
            prop_assert_eq!(found, ends);
            prop_assert!(!frames.is_closed());
        }

        #[test]
        fn nothing_breaks_it(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut frames = Frames::default();
            frames.see(&bytes);
        }
    }
}
