//! The bytes of HTTP/3 below its messages: integers, frames and settings (RFC 9114 section 7). Pure.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// An error as it goes over the wire (RFC 9114 section 8.1, RFC 9204 section 6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum Code {
    /// `H3_NO_ERROR`
    NoError = 0x100,
    /// `H3_INTERNAL_ERROR`
    Internal = 0x102,
    /// `H3_STREAM_CREATION_ERROR`
    StreamCreation = 0x103,
    /// `H3_CLOSED_CRITICAL_STREAM`
    ClosedCritical = 0x104,
    /// `H3_FRAME_UNEXPECTED`
    FrameUnexpected = 0x105,
    /// `H3_FRAME_ERROR`
    Frame = 0x106,
    /// `H3_EXCESSIVE_LOAD`
    ExcessiveLoad = 0x107,
    /// `H3_ID_ERROR`
    Id = 0x108,
    /// `H3_SETTINGS_ERROR`
    Settings = 0x109,
    /// `H3_MISSING_SETTINGS`
    MissingSettings = 0x10a,
    /// `H3_REQUEST_REJECTED`
    Rejected = 0x10b,
    /// `H3_REQUEST_INCOMPLETE`
    Incomplete = 0x10d,
    /// `H3_MESSAGE_ERROR`
    Message = 0x10e,
    /// `QPACK_DECOMPRESSION_FAILED`
    Decompression = 0x200,
    /// `QPACK_ENCODER_STREAM_ERROR`
    EncoderStream = 0x201,
}

impl From<Code> for quinn::VarInt {
    fn from(code: Code) -> Self {
        Self::from_u32(code as u32)
    }
}

pub(crate) const DATA: u64 = 0;
pub(crate) const HEADERS: u64 = 1;
pub(crate) const CANCEL_PUSH: u64 = 3;
pub(crate) const SETTINGS: u64 = 4;
pub(crate) const PUSH_PROMISE: u64 = 5;
pub(crate) const GOAWAY: u64 = 7;
pub(crate) const MAX_PUSH_ID: u64 = 0xd;

/// Frame types that HTTP/2 has and HTTP/3 must not (RFC 9114 section 7.2.8).
pub(crate) fn is_of_http2(kind: u64) -> bool {
    matches!(kind, 2 | 6 | 8 | 9)
}

/// A variable-length integer (RFC 9000 section 16), which may come in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Integer {
    value: u64,
    /// Of its bytes, how many are still to come. Zero: it has not begun.
    missing: u8,
}

impl Integer {
    /// Takes the next byte. The integer, once it is whole.
    pub(crate) fn push(&mut self, byte: u8) -> Option<u64> {
        if self.missing == 0 {
            self.value = u64::from(byte & 0x3f);
            self.missing = 1 << (byte >> 6);
        } else {
            self.value = self.value << 8 | u64::from(byte);
        }
        self.missing -= 1;
        (self.missing == 0).then_some(self.value)
    }

    /// Whether some of it came.
    pub(crate) fn has_begun(self) -> bool {
        self.missing > 0
    }

    /// Takes it from the front of `bytes`. `None`: there is not enough.
    pub(crate) fn take(bytes: &mut &[u8]) -> Option<u64> {
        let mut integer = Self::default();
        loop {
            let (byte, rest) = bytes.split_first()?;
            *bytes = rest;
            if let Some(value) = integer.push(*byte) {
                return Some(value);
            }
        }
    }
}

/// Writes one, which has to be below 2^62.
pub(crate) fn put_integer(into: &mut BytesMut, value: u64) {
    let [.., a, b] = value.to_be_bytes();
    match value {
        0..0x40 => into.put_u8(b),
        0x40..0x4000 => into.put_slice(&[a | 0x40, b]),
        0x4000..0x4000_0000 => into.put_u32(u32::try_from(value).unwrap_or_default() | 0x8000_0000),
        _ => into.put_u64(value & (u64::MAX >> 2) | 0xc000_0000_0000_0000),
    }
}

/// Writes what stands before a frame's payload.
pub(crate) fn put_frame_head(into: &mut BytesMut, kind: u64, length: usize) {
    put_integer(into, kind);
    put_integer(into, length as u64);
}

/// A frame's head, which may come in pieces.
#[derive(Debug, Default)]
pub(crate) struct FrameHead {
    kind: Option<u64>,
    integer: Integer,
}

impl FrameHead {
    /// Takes the next byte. The type and length, once they are whole.
    pub(crate) fn push(&mut self, byte: u8) -> Option<(u64, u64)> {
        let whole = self.integer.push(byte)?;
        match self.kind.take() {
            None => {
                self.kind = Some(whole);
                None
            }
            Some(kind) => Some((kind, whole)),
        }
    }

    /// Whether some of it came.
    pub(crate) fn has_begun(&self) -> bool {
        self.kind.is_some() || self.integer.has_begun()
    }
}

/// What a server says first: the head of its control stream.
pub(crate) fn greeting(section_bytes: usize) -> Bytes {
    const CONTROL: u64 = 0;
    const MAX_FIELD_SECTION_SIZE: u64 = 6;
    const ENABLE_CONNECT_PROTOCOL: u64 = 8;
    let mut settings = BytesMut::new();
    // The table's capacity is zero unless another is told.
    for (name, value) in
        [(MAX_FIELD_SECTION_SIZE, section_bytes as u64), (ENABLE_CONNECT_PROTOCOL, 1)]
    {
        put_integer(&mut settings, name);
        put_integer(&mut settings, value);
    }
    let mut greeting = BytesMut::new();
    put_integer(&mut greeting, CONTROL);
    put_frame_head(&mut greeting, SETTINGS, settings.len());
    greeting.extend_from_slice(&settings);
    greeting.freeze()
}

/// From this request on nothing is answered.
pub(crate) fn goaway(id: u64) -> Bytes {
    let mut payload = BytesMut::new();
    put_integer(&mut payload, id);
    let mut frame = BytesMut::new();
    put_frame_head(&mut frame, GOAWAY, payload.len());
    frame.extend_from_slice(&payload);
    frame.freeze()
}

/// The id that says that nothing is refused yet (RFC 9114 section 5.2).
pub(crate) const NOTHING_YET: u64 = (1 << 62) - 4;

/// How long after that the true one follows: what was sent before the first came has arrived then.
pub(crate) fn grace(round_trip: Duration) -> Duration {
    (round_trip * 2).clamp(Duration::from_millis(100), Duration::from_secs(1))
}

/// What a client says of itself on its control stream.
#[derive(Debug, Default)]
pub(crate) struct Control {
    settled: bool,
    most_pushes: u64,
    /// Of the last `GOAWAY`.
    last_push: Option<u64>,
    head: FrameHead,
    /// The frame that is being read, and how much of its payload is to come.
    frame: Option<(u64, Expected, u64)>,
    /// What came of it, if it is wanted.
    payload: BytesMut,
}

/// What is to be done with a frame of the control stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Expected {
    /// Its payload is wanted, all of it.
    Payload,
    /// It is skipped.
    Nothing,
}

/// The longest payload of a frame that is read as a whole.
pub(crate) const PAYLOAD: u64 = 4096;

impl Control {
    /// More came of the stream, in whatever pieces. Tells `came` of each frame that begins.
    pub(crate) fn hear(&mut self, mut said: &[u8], mut came: impl FnMut()) -> Result<(), Code> {
        loop {
            let Some((kind, expected, left)) = self.frame else {
                if said.is_empty() {
                    return Ok(());
                }
                if let Some((kind, length)) = self.head.push(said.get_u8()) {
                    self.frame = Some((kind, self.begins(kind, length)?, length));
                    came();
                }
                continue;
            };
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(said.len());
            let (part, rest) = said.split_at(most);
            said = rest;
            if expected == Expected::Payload {
                self.payload.extend_from_slice(part);
            }
            let left = left - part.len() as u64;
            if left > 0 {
                self.frame = Some((kind, expected, left));
                return Ok(());
            }
            self.frame = None;
            if expected == Expected::Payload {
                let payload = self.payload.split();
                self.payload(kind, &payload)?;
            }
        }
    }

    /// How much is kept of a frame that is not whole.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn kept(&self) -> usize {
        self.payload.len()
    }

    /// A frame begins.
    fn begins(&self, kind: u64, length: u64) -> Result<Expected, Code> {
        if !self.settled && kind != SETTINGS {
            return Err(Code::MissingSettings);
        }
        match kind {
            // RFC 9114 section 7.2.4: once.
            SETTINGS if self.settled => Err(Code::FrameUnexpected),
            DATA | HEADERS | PUSH_PROMISE => Err(Code::FrameUnexpected),
            kind if is_of_http2(kind) => Err(Code::FrameUnexpected),
            SETTINGS | GOAWAY | MAX_PUSH_ID | CANCEL_PUSH if length > PAYLOAD => {
                Err(Code::ExcessiveLoad)
            }
            SETTINGS | GOAWAY | MAX_PUSH_ID | CANCEL_PUSH => Ok(Expected::Payload),
            _ => Ok(Expected::Nothing),
        }
    }

    /// A wanted payload is there.
    fn payload(&mut self, kind: u64, mut payload: &[u8]) -> Result<(), Code> {
        if kind == SETTINGS {
            self.settled = true;
            return settings(payload);
        }
        let id = Integer::take(&mut payload).filter(|_| payload.is_empty()).ok_or(Code::Frame)?;
        match kind {
            // Section 7.2.3: nothing was ever promised.
            CANCEL_PUSH => Err(Code::Id),
            MAX_PUSH_ID if id < self.most_pushes => Err(Code::Id),
            MAX_PUSH_ID => {
                self.most_pushes = id;
                Ok(())
            }
            // Section 5.2: it may only come down. A client's says what we may push, which is nothing.
            _ if self.last_push.is_some_and(|last| id > last) => Err(Code::Id),
            _ => {
                self.last_push = Some(id);
                Ok(())
            }
        }
    }
}

/// What came of the client's QPACK encoder stream (RFC 9204 section 4.3): of a table that holds
/// nothing, the capacity may be set to nothing.
pub(crate) fn hear_encoder(said: &[u8]) -> Result<(), Code> {
    const NO_CAPACITY: u8 = 0x20;
    if said.iter().all(|byte| *byte == NO_CAPACITY) { Ok(()) } else { Err(Code::EncoderStream) }
}

/// RFC 9114 section 7.2.4: what they say may be ignored, but not how.
fn settings(mut payload: &[u8]) -> Result<(), Code> {
    let mut seen = Vec::new();
    while !payload.is_empty() {
        let name = Integer::take(&mut payload).ok_or(Code::Frame)?;
        Integer::take(&mut payload).ok_or(Code::Frame)?;
        // Section 7.2.4.1: HTTP/2's.
        if matches!(name, 0 | 2..=5) || seen.contains(&name) {
            return Err(Code::Settings);
        }
        // Those that mean anything, and a few that don't.
        if seen.len() < 64 {
            seen.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn integers_are_those_of_quic() {
        // RFC 9000 appendix A.1.
        for (bytes, want) in [
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c][..], 151_288_809_941_952_652),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15293),
            (&[0x25], 37),
            (&[0x40, 0x25], 37),
        ] {
            let mut rest = bytes;
            assert_eq!(Integer::take(&mut rest), Some(want));
            assert!(rest.is_empty());
        }
        assert_eq!(Integer::take(&mut &[0x7b][..]), None);
    }

    #[test]
    fn a_client_speaks_of_itself_as_it_may() {
        let ask = |frames: &[(u64, &[u8])]| {
            let mut said = BytesMut::new();
            for (kind, payload) in frames {
                put_frame_head(&mut said, *kind, payload.len());
                said.extend_from_slice(payload);
            }
            let heard = |size| {
                let mut control = Control::default();
                let mut came = 0;
                let mut pieces = said.chunks(size);
                (pieces.try_for_each(|piece| control.hear(piece, || came += 1)), came)
            };
            let whole = heard(said.len().max(1));
            assert_eq!(heard(1), whole, "{frames:?}");
            whole.0
        };
        const NONE: (u64, &[u8]) = (SETTINGS, &[]);
        for (frames, want) in [
            (&[NONE][..], Ok(())),
            (&[(SETTINGS, &[6, 0x40, 0x80, 1, 0, 7, 0, 0x21, 1])], Ok(())),
            (&[NONE, (0x21, b"grease"), (GOAWAY, &[4]), (GOAWAY, &[0])], Ok(())),
            (&[NONE, (MAX_PUSH_ID, &[4]), (MAX_PUSH_ID, &[9])], Ok(())),
            (&[(GOAWAY, &[4])], Err(Code::MissingSettings)),
            (&[(0x21, b"grease"), NONE], Err(Code::MissingSettings)),
            (&[NONE, NONE], Err(Code::FrameUnexpected)),
            (&[NONE, (DATA, b"a")], Err(Code::FrameUnexpected)),
            (&[NONE, (HEADERS, b"a")], Err(Code::FrameUnexpected)),
            (&[NONE, (PUSH_PROMISE, b"a")], Err(Code::FrameUnexpected)),
            (&[NONE, (6, b"ping")], Err(Code::FrameUnexpected)),
            (&[(SETTINGS, &[2, 0])], Err(Code::Settings)),
            (&[(SETTINGS, &[6, 1, 6, 1])], Err(Code::Settings)),
            (&[(SETTINGS, &[6])], Err(Code::Frame)),
            (&[(SETTINGS, &[0; 5000])], Err(Code::ExcessiveLoad)),
            (&[NONE, (GOAWAY, &[])], Err(Code::Frame)),
            (&[NONE, (GOAWAY, &[1, 1])], Err(Code::Frame)),
            (&[NONE, (GOAWAY, &[0]), (GOAWAY, &[4])], Err(Code::Id)),
            (&[NONE, (MAX_PUSH_ID, &[9]), (MAX_PUSH_ID, &[4])], Err(Code::Id)),
            (&[NONE, (CANCEL_PUSH, &[0])], Err(Code::Id)),
        ] {
            assert_eq!(ask(frames), want, "{frames:?}");
        }
    }

    #[test]
    fn the_greeting_is_settings() {
        let greeting = greeting(128 << 10);
        assert_eq!(&*greeting, &[0, 4, 7, 6, 0x80, 2, 0, 0, 8, 1]);
        assert_eq!(&*goaway(NOTHING_YET), &[7, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfc]);
    }

    proptest! {
        #[test]
        fn a_frames_head_can_be_read_however_it_is_cut(
            kind in 0u64..1 << 62,
            length in 0usize..1 << 40,
        ) {
            let mut head = FrameHead::default();
            let mut bytes = BytesMut::new();
            put_frame_head(&mut bytes, kind, length);
            let (last, most) = bytes.split_last().unwrap();
            for byte in most {
                prop_assert_eq!(head.push(*byte), None);
                prop_assert!(head.has_begun());
            }
            prop_assert_eq!(head.push(*last), Some((kind, length as u64)));
            prop_assert!(!head.has_begun());
        }
    }
}
