//! HTTP/2's frames and header blocks, as they are written and as whoever is beside h2 reads them.

/// Types of frames (RFC 9113 section 6).
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

/// Flags.
pub(super) const END_STREAM: u8 = 1;
pub(super) const ACK: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

/// What a client says first (section 3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame as it was read.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    pub(super) fn is(&self, kind: u8, flag: u8) -> bool {
        self.kind == kind && self.flags & flag != 0
    }
}

/// The whole frames that these bytes begin with, and how long they are.
pub(super) fn read(bytes: &[u8]) -> (Vec<Frame>, usize) {
    let (mut frames, mut at) = (Vec::new(), 0);
    while let [a, b, c, kind, flags, stream @ ..] = &bytes[at..]
        && let Some((stream, rest)) = stream.split_first_chunk()
        && let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).expect("it fits")
        && rest.len() >= length
    {
        let payload = rest[..length].to_vec();
        let stream = u32::from_be_bytes(*stream) & 0x7fff_ffff;
        frames.push(Frame { kind: *kind, flags: *flags, stream, payload });
        at += 9 + length;
    }
    (frames, at)
}

/// Writes a frame (RFC 9113 section 4.1).
pub(super) fn frame(wire: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let [_, a, b, c] = u32::try_from(payload.len()).expect("it is bounded").to_be_bytes();
    wire.extend_from_slice(&[a, b, c, kind, flags]);
    wire.extend_from_slice(&stream.to_be_bytes());
    wire.extend_from_slice(payload);
}

/// Literal fields without indexing or compression (RFC 7541 section 6.2.2).
pub(super) fn block(fields: &[Pair]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            let mut length = text.len();
            if length < 127 {
                block.push(u8::try_from(length).expect("it is less than 127"));
            } else {
                block.push(127);
                length -= 127;
                while length >= 128 {
                    block.push(u8::try_from(length % 128 + 128).expect("it is less than 256"));
                    length /= 128;
                }
                block.push(u8::try_from(length).expect("it is less than 128"));
            }
            block.extend_from_slice(text);
        }
    }
    block
}

/// A field's name and value.
pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// Fields in lines of `name: value`, with `\r`, `\n` and `\0` for what they stand for.
pub(super) fn pairs(lines: &[u8]) -> Vec<Pair> {
    let lines = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let pair = |line: &[u8]| {
        let colon = line.windows(2).position(|two| two == b": ");
        let (name, value) = line.split_at(colon.unwrap_or(line.len()));
        (unescaped(name), unescaped(value.get(2..).unwrap_or_default()))
    };
    lines.map(pair).collect()
}

fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'r') => b'\r',
                Some(b'n') => b'\n',
                Some(b'0') => 0,
                Some(other) => *other,
                None => b'\\',
            },
            other => *other,
        });
    }
    plain
}

/// The value of a field in a block, if all of it up to there is literals as [`block`] writes them.
pub(super) fn literal(mut block: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    loop {
        block = block.strip_prefix(&[0])?;
        let mut texts = [&block[..0]; 2];
        for text in &mut texts {
            let (length, rest) = block.split_first()?;
            // Not compressed, and short.
            let length = usize::from(*length);
            if length >= 127 || rest.len() < length {
                return None;
            }
            (*text, block) = rest.split_at(length);
        }
        if texts[0] == name {
            return Some(texts[1].to_vec());
        }
    }
}
