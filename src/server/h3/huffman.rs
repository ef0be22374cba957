//! The Huffman code of field strings (RFC 7541 appendix B, by RFC 9204 section 4.1.2). Decoding only:
//! what litegate sends is a head of a few hundred bytes, and plain strings are always allowed.

/// The longest code.
const LONGEST: usize = 30;
const SYMBOLS: usize = 257;
/// What fills up the last byte begins with this symbol's code, which may not occur whole.
const END: u16 = 256;

/// How many bits each symbol's code has. That is all there is to know: codes of one length count up
/// in the order of the symbols, and longer ones follow shorter ones.
#[rustfmt::skip]
const LENGTHS: [u8; SYMBOLS] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21,
    23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

/// The code, sorted.
struct Code {
    /// By length: the first code that is longer, as if it began at the highest of 32 bits.
    limits: [u32; LONGEST + 1],
    /// By length: the first of its codes, and that symbol's place in `symbols`.
    firsts: [(u32, usize); LONGEST + 1],
    symbols: [u16; SYMBOLS],
}

const CODE: Code = code();

#[expect(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "at compile time")]
const fn code() -> Code {
    let mut all =
        Code { limits: [0; LONGEST + 1], firsts: [(0, 0); LONGEST + 1], symbols: [0; SYMBOLS] };
    let (mut next, mut place, mut length) = (0u64, 0, 1);
    while length <= LONGEST {
        next <<= 1;
        all.firsts[length] = (next as u32, place);
        let mut symbol = 0;
        while symbol < SYMBOLS {
            if LENGTHS[symbol] as usize == length {
                all.symbols[place] = symbol as u16;
                place += 1;
                next += 1;
            }
            symbol += 1;
        }
        let limit = next << (32 - length);
        all.limits[length] = if limit > u32::MAX as u64 { u32::MAX } else { limit as u32 };
        length += 1;
    }
    all
}

/// Decodes a string. `None`: it is none (RFC 7541 section 5.2).
pub(super) fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    // The shortest codes have five bits.
    let mut text = Vec::with_capacity(coded.len() * 8 / 5);
    let (mut bits, mut held) = (0u64, 0u32);
    let mut rest = coded.iter();
    loop {
        while held <= 32
            && let Some(byte) = rest.next()
        {
            bits |= u64::from(*byte) << (56 - held);
            held += 8;
        }
        let window = u32::try_from(bits >> 32).unwrap_or(u32::MAX);
        let found = (5u32..)
            .zip(CODE.limits.iter().skip(5).zip(CODE.firsts.iter().skip(5)))
            .find(|(length, (limit, _))| window < **limit || *length as usize == LONGEST);
        let (length, (_, (first, place))) = found?;
        if length > held {
            break;
        }
        let nth = (window >> (32 - length)).checked_sub(*first)?;
        let symbol = *CODE.symbols.get(place + nth as usize)?;
        if symbol == END {
            return None;
        }
        text.push(u8::try_from(symbol).ok()?);
        bits <<= length;
        held -= length;
    }
    // Fewer than eight bits, and all of them ones.
    let padding = bits.checked_shr(64 - held).unwrap_or_default();
    (held < 8 && padding == (1 << held) - 1).then_some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(text: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        for byte in text {
            let place = CODE.symbols.iter().position(|s| *s == u16::from(*byte)).unwrap();
            let length = usize::from(LENGTHS[usize::from(*byte)]);
            let (first, from) = CODE.firsts[length];
            let code = first + u32::try_from(place - from).unwrap();
            bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
        }
        while bits.len() % 8 != 0 {
            bits.push(true);
        }
        bits.chunks(8).map(|b| b.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect()
    }

    #[test]
    fn the_examples_of_the_rfc_can_be_read() {
        // RFC 7541 appendix C.4.
        for (coded, text) in [
            (
                &[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff][..],
                "www.example.com",
            ),
            (&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf], "no-cache"),
            (&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f], "custom-key"),
            (&[], ""),
        ] {
            assert_eq!(decode(coded).as_deref(), Some(text.as_bytes()));
        }
    }

    #[test]
    fn what_is_padded_wrongly_is_no_string() {
        assert_eq!(decode(&[0x1f]), Some(b"a".to_vec()), "00011, and ones");
        for (coded, what) in [
            (&[0x18][..], "padded with zeros"),
            (&[0x1f, 0xff], "eight bits of padding"),
            (&[0xff, 0xff, 0xff, 0xff], "the end, which may not occur"),
            (&[0xff, 0xff, 0xff, 0xfc], "the end, whole"),
        ] {
            assert_eq!(decode(coded), None, "{what}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_can_be_decoded(text: Vec<u8>) {
            prop_assert_eq!(decode(&encode(&text)), Some(text));
        }

        #[test]
        fn any_bytes_can_be_tried(coded: Vec<u8>) {
            if let Some(text) = decode(&coded) {
                prop_assert_eq!(encode(&text), coded);
            }
        }
    }
}
