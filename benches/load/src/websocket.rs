//! WebSocket messages (RFC 6455 section 5.2), each of one frame: as much as both ends of the bench
//! need.

use crate::message::Fault;

/// What makes a request an upgrade, with the key of RFC 6455 section 1.3.
pub(crate) const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\n\
     Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
/// The answer to it.
pub(crate) const ACCEPTED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
     Upgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Longer ones nobody sends here.
const LONGEST: usize = 64 * 1024;

/// Reads messages off a stream whose bytes come in any pieces.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    /// A frame's bytes so far.
    partial: Vec<u8>,
}

impl Messages {
    /// Calls `message` with each payload that is complete.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        mut message: impl FnMut(&[u8]),
    ) -> Result<(), Fault> {
        self.partial.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(rest) = self.partial.get(at..)
            && let Some(Frame { payload, mask, end }) = frame(rest)?
        {
            let payload = rest.get(payload..end).unwrap_or_default();
            match mask {
                Some(mask) => {
                    let clear = payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b);
                    message(&clear.collect::<Vec<u8>>());
                }
                None => message(payload),
            }
            at += end;
        }
        self.partial.drain(..at);
        Ok(())
    }
}

/// A complete frame.
struct Frame {
    /// Where its payload begins.
    payload: usize,
    mask: Option<[u8; 4]>,
    end: usize,
}

/// The frame that the bytes begin with; `None` while some of it is missing.
fn frame(bytes: &[u8]) -> Result<Option<Frame>, Fault> {
    let (Some(&first), Some(&second)) = (bytes.first(), bytes.get(1)) else { return Ok(None) };
    if first != FINAL_BINARY {
        return Err(Fault::Refused);
    }
    let (length, mut at) = match second & 0x7f {
        TWO_BYTES => match bytes.get(2..4) {
            Some(&[a, b]) => (u16::from_be_bytes([a, b]).into(), 4),
            _ => return Ok(None),
        },
        127 => return Err(Fault::Refused),
        length => (usize::from(length), 2),
    };
    if length > LONGEST {
        return Err(Fault::Refused);
    }
    let mut mask = None;
    if second & MASKED != 0 {
        let Some(&[a, b, c, d]) = bytes.get(at..at + 4) else { return Ok(None) };
        mask = Some([a, b, c, d]);
        at += 4;
    }
    let end = at + length;
    Ok((bytes.len() >= end).then_some(Frame { payload: at, mask, end }))
}

const FINAL_BINARY: u8 = 0x82;
const MASKED: u8 = 0x80;
/// Says that a length of two bytes follows.
const TWO_BYTES: u8 = 0x7e;

/// Appends a message: with a mask as clients send it, without as servers do.
pub(crate) fn write(to: &mut Vec<u8>, mask: Option<[u8; 4]>, payload: &[u8]) {
    let masked = if mask.is_some() { MASKED } else { 0 };
    to.push(FINAL_BINARY);
    match u16::try_from(payload.len()) {
        Ok(short @ ..126) => to.push(masked | short.to_be_bytes()[1]),
        length => {
            to.push(masked | TWO_BYTES);
            to.extend_from_slice(&length.unwrap_or(u16::MAX).to_be_bytes());
        }
    }
    let mask = mask.inspect(|mask| to.extend_from_slice(mask)).unwrap_or_default();
    to.extend(payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_the_same_in_whatever_pieces_they_come() {
        for mask in [None, Some([1, 2, 3, 4])] {
            let mut bytes = Vec::new();
            for length in [0, 1, 125, 126, 400] {
                write(&mut bytes, mask, &vec![b'y'; length]);
            }
            for size in 1..bytes.len() {
                let mut messages = Messages::default();
                let mut lengths = Vec::new();
                for piece in bytes.chunks(size) {
                    let message = |message: &[u8]| {
                        assert!(message.iter().all(|byte| *byte == b'y'));
                        lengths.push(message.len());
                    };
                    messages.feed(piece, message).unwrap();
                }
                assert_eq!(lengths, [0, 1, 125, 126, 400], "pieces of {size}");
            }
        }
    }

    #[test]
    fn what_nobody_sends_here_is_refused() {
        for bytes in [&[0x81, 0][..], &[0x82, 127]] {
            assert_eq!(Messages::default().feed(bytes, |_| ()), Err(Fault::Refused));
        }
    }
}
