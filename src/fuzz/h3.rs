//! What HTTP/3 puts on the streams of QUIC, and a reader of it that shares nothing with litegate's: by
//! hand after RFC 9114 and RFC 9204, with all of the bytes before it.

use std::{collections::HashMap, sync::LazyLock};

use ::http::{HeaderMap, StatusCode};
use bytes::Bytes;

use super::frames::Pair;
use crate::server::h3::{
    frames::{self, Control},
    head,
    qpack::{self, Fault, Most},
    reader::{Event, Reader, Wrong},
};

/// Types of frames (RFC 9114 section 7.2).
pub(super) const DATA: u64 = 0;
pub(super) const HEADERS: u64 = 1;
const SETTINGS: u64 = 4;
const GOAWAY: u64 = 7;

/// Errors (RFC 9114 section 8.1).
const EXCESSIVE_LOAD: u32 = 0x107;
const INCOMPLETE: u32 = 0x10d;

/// A request's stream is kept to sections of so many bytes here.
const MOST: usize = 300;

/// What a client says on one stream: a letter for which one and how it ends, a byte that says where
/// it is cut, and its bytes. However they come, litegate reads what another reader does, counts the
/// same frames, finds the same fault, and keeps no more than it may.
pub fn h3_frames(data: &[u8]) {
    let [which, cut, bytes @ ..] = data else { return };
    let cuts = [Cut::Nowhere, Cut::Everywhere, Cut::Somewhere(u64::from(*cut))];
    match which {
        b'c' => {
            let want = control(bytes);
            for cut in cuts {
                let (mut control, mut came) = (Control::default(), 0);
                let heard = cut.pieces(bytes).try_for_each(|piece| {
                    let heard = control.hear(piece, || came += 1);
                    assert!(control.kept() <= 4096, "{} bytes are kept", control.kept());
                    heard
                });
                assert_eq!((heard.err().map(|code| code as u32), came), want, "{cut:?}");
            }
        }
        b'e' => {
            // RFC 9204 section 4.3.1: a capacity of zero is all that may be said.
            let is_fine = bytes.iter().all(|byte| *byte == 0b0010_0000);
            for cut in cuts {
                let heard = cut.pieces(bytes).try_for_each(frames::hear_encoder);
                assert_eq!(heard.err().map(|code| code as u32), (!is_fine).then_some(0x201));
            }
        }
        _ => {
            let (ends, tunnel) = (which.is_ascii_uppercase(), which.eq_ignore_ascii_case(&b't'));
            let want = request(bytes, ends, MOST, tunnel);
            for cut in cuts {
                assert_eq!(by_litegate(cut.pieces(bytes), ends, tunnel), want, "{cut:?}");
            }
        }
    }
}

/// Where bytes are cut into pieces.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Nowhere,
    Everywhere,
    /// Where this number says.
    Somewhere(u64),
}

impl Cut {
    fn pieces(self, bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut rng = match self {
            Self::Somewhere(seed) => Some(fastrand::Rng::with_seed(seed)),
            _ => None,
        };
        let mut rest = bytes;
        std::iter::from_fn(move || {
            let length = match (self, &mut rng) {
                (Self::Nowhere, _) => rest.len(),
                (_, Some(rng)) => rng.usize(1..40),
                _ => 1,
            };
            let (piece, behind) = rest.split_at(length.min(rest.len()));
            rest = behind;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

/// What a request's stream consists of.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Reading {
    pub(super) parts: Vec<Part>,
    /// Frames that ask for something, and others.
    frames: [u64; 2],
    /// The error with which it ends.
    pub(super) wrong: Option<u32>,
}

/// A part of it.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Part {
    /// A field section, whole.
    Section(Vec<u8>),
    /// What the DATA frames up to the next section hold.
    Data(Vec<u8>),
}

impl Reading {
    fn data(&mut self, more: &[u8]) {
        if let Some(Part::Data(data)) = self.parts.last_mut() {
            data.extend_from_slice(more);
        } else if !more.is_empty() {
            self.parts.push(Part::Data(more.to_vec()));
        }
    }
}

fn by_litegate<'b>(pieces: impl Iterator<Item = &'b [u8]>, ends: bool, tunnel: bool) -> Reading {
    let (mut reader, mut reading) = (Reader::new(MOST), Reading::default());
    let mut read = |reading: &mut Reading, piece: &[u8]| {
        let mut chunk = Bytes::copy_from_slice(piece);
        loop {
            let next = reader.next(&mut chunk, |useful| reading.frames[usize::from(!useful)] += 1);
            assert!(reader.kept() <= MOST, "{} bytes are kept", reader.kept());
            match next? {
                Some(Event::Data(data)) => {
                    assert!(!data.is_empty());
                    reading.data(&data);
                }
                Some(Event::Section(section)) => {
                    reading.parts.push(Part::Section(section.to_vec()));
                    if tunnel {
                        reader.tunnel();
                    }
                }
                None => {
                    assert!(chunk.is_empty());
                    return Ok(());
                }
            }
        }
    };
    let mut verdict = Ok(());
    for piece in pieces {
        verdict = verdict.and_then(|()| read(&mut reading, piece));
    }
    // What a section of no bytes is, is known without a piece more.
    let verdict = verdict.and_then(|()| if ends { reader.end() } else { Ok(()) });
    reading.wrong = verdict.err().map(|wrong| match wrong {
        Wrong::Connection(code, _) => code as u32,
        Wrong::TooLarge => EXCESSIVE_LOAD,
        Wrong::NoHead => INCOMPLETE,
    });
    reading
}

/// A variable-length integer (RFC 9000 section 16), and what follows it.
fn integer(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let length = 1 << (bytes.first()? >> 6);
    let (integer, rest) = bytes.split_at_checked(length)?;
    let mut eight = [0; 8];
    eight[8 - length..].copy_from_slice(integer);
    eight[8 - length] &= 0x3f;
    Some((u64::from_be_bytes(eight), rest))
}

/// A frame that may be cut off: its type, its length, what is there of its payload, and what
/// follows it.
pub(super) fn frame(bytes: &[u8]) -> Option<(u64, u64, &[u8], &[u8])> {
    let (kind, rest) = integer(bytes)?;
    let (length, rest) = integer(rest)?;
    let here = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
    let (payload, rest) = rest.split_at(here);
    Some((kind, length, payload, rest))
}

/// Reads a request's stream.
pub(super) fn request(mut bytes: &[u8], ends: bool, most: usize, tunnel: bool) -> Reading {
    let (mut reading, mut sections) = (Reading::default(), 0);
    while let Some((kind, length, payload, rest)) = frame(bytes) {
        bytes = rest;
        let is_whole = payload.len() as u64 == length;
        let may_hold_data = sections == 1 || tunnel && sections > 0;
        let wrong = match kind {
            DATA => (!may_hold_data).then_some(0x105),
            HEADERS if sections == 2 || tunnel && sections > 0 => Some(0x105),
            HEADERS => (length > most as u64).then_some(EXCESSIVE_LOAD),
            2..=9 | 0xd => Some(0x105),
            _ => None,
        };
        if wrong.is_some() {
            reading.wrong = wrong;
            return reading;
        }
        let asks = kind == HEADERS || kind == DATA && length > 0;
        reading.frames[usize::from(!asks)] += 1;
        match kind {
            DATA => reading.data(payload),
            HEADERS if is_whole => {
                reading.parts.push(Part::Section(payload.to_vec()));
                sections += 1;
            }
            _ => {}
        }
        if !is_whole {
            reading.wrong = ends.then_some(0x106);
            return reading;
        }
    }
    if ends {
        let is_cut = !bytes.is_empty();
        reading.wrong = is_cut.then_some(0x106).or((sections == 0).then_some(INCOMPLETE));
    }
    reading
}

/// Reads a control stream behind its type. Returns the error with which it ends, and how many frames
/// began before that.
fn control(mut bytes: &[u8]) -> (Option<u32>, u64) {
    let (mut came, mut is_settled, mut most_pushes, mut last) = (0, false, 0, u64::MAX);
    while let Some((kind, length, payload, rest)) = frame(bytes) {
        bytes = rest;
        let is_known = matches!(kind, 3 | SETTINGS | GOAWAY | 0xd);
        let wrong = match kind {
            SETTINGS if is_settled => Some(0x105),
            _ if !is_settled && kind != SETTINGS => Some(0x10a),
            0..=2 | 5 | 6 | 8 | 9 => Some(0x105),
            _ if is_known && length > 4096 => Some(EXCESSIVE_LOAD),
            _ => None,
        };
        if wrong.is_some() {
            return (wrong, came);
        }
        came += 1;
        if payload.len() as u64 != length {
            break;
        }
        let wrong = match (kind, integer(payload)) {
            (SETTINGS, _) => {
                is_settled = true;
                settings(payload)
            }
            _ if !is_known => None,
            (3, Some((_, []))) => Some(0x108),
            (GOAWAY, Some((id, []))) => {
                let is_more = id > last;
                last = id;
                is_more.then_some(0x108)
            }
            (0xd, Some((id, []))) => {
                let is_less = id < most_pushes;
                most_pushes = id;
                is_less.then_some(0x108)
            }
            _ => Some(0x106),
        };
        if wrong.is_some() {
            return (wrong, came);
        }
    }
    (None, came)
}

fn settings(mut payload: &[u8]) -> Option<u32> {
    let mut names = Vec::new();
    while !payload.is_empty() {
        let Some((name, rest)) = integer(payload) else { return Some(0x106) };
        let Some((_, rest)) = integer(rest) else { return Some(0x106) };
        payload = rest;
        if matches!(name, 0 | 2 | 3 | 4 | 5) || names.iter().take(64).any(|known| *known == name) {
            return Some(0x109);
        }
        names.push(name);
    }
    None
}

/// A field section: `w` before it for the widest limits, or a byte that says how narrow they are.
/// litegate reads the fields that another decoder does, or finds the same fault; makes a request or
/// trailers of them only if RFC 9114 lets it, and always if it is a plain one; and writes fields that
/// the other reads as they were.
pub fn qpack(data: &[u8]) {
    let [limits, section @ ..] = data else { return };
    let most = match usize::from(*limits) {
        // `w`
        0x77 => Most { bytes: 1 << 20, fields: 1000 },
        narrow => Most { bytes: narrow * 8, fields: narrow % 16 },
    };
    let (pairs, is_whole) = fields(section);
    let sizes = pairs.iter().map(|(name, value)| name.len() + value.len() + 32);
    let is_small = sizes.sum::<usize>() <= most.bytes && pairs.len() <= most.fields;
    let decoded = match qpack::decode(section, most) {
        Err(fault) => {
            let want = if is_small { Fault::Broken } else { Fault::TooLarge };
            assert!(fault == want && !(is_small && is_whole), "{fault:?} of {pairs:?}");
            return;
        }
        Ok(decoded) => decoded,
    };
    assert!(is_small && is_whole, "more than there is, or than is taken: {decoded:?}");
    let plain: Vec<Pair> = decoded.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
    assert_eq!(plain, pairs);

    let made = head::request(decoded.clone());
    if let Ok(request) = &made {
        assert!(is_request(&pairs), "{request:?} of {pairs:?}");
        let of = |name: &[u8]| pairs.iter().find(|(n, _)| n == name).map(|(_, value)| &**value);
        assert_eq!(Some(request.method().as_str().as_bytes()), of(b":method"));
        let authority = request.uri().authority().map(|authority| authority.as_str().as_bytes());
        assert_eq!(authority, of(b":authority"));
        let path = request.uri().path_and_query().map(|path| path.as_str().as_bytes());
        // Without a fragment, which `http` drops.
        let said = of(b":path").map(|path| path.split(|byte| *byte == b'#').next().expect("one"));
        assert_eq!(path, said);
        holds(request.headers(), pairs.iter().filter(|(name, _)| !name.starts_with(b":")));
    }
    assert!(made.is_ok() || !is_plain(&pairs), "{made:?} of {pairs:?}");

    let made = head::trailers(decoded);
    assert_eq!(made.is_ok(), pairs.iter().all(is_field), "{made:?} of {pairs:?}");
    let Ok(trailers) = made else { return };
    holds(&trailers, pairs.iter());
    let written = qpack::trailers(&trailers);
    let mut written = fields(&written);
    written.0.sort_by(|one, other| one.0.cmp(&other.0));
    let mut sorted = pairs.clone();
    sorted.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(written, (sorted, true));
    let status = StatusCode::from_u16(100 + u16::try_from(section.len() % 900).expect("it is"));
    let status = status.expect("it has three digits");
    let (written, is_whole) = fields(&qpack::response(status, &trailers));
    assert!(is_whole && written.len() == pairs.len() + 1, "{written:?}");
    assert_eq!(written[0], (b":status".to_vec(), status.as_str().as_bytes().to_vec()));
}

/// Whether these are the fields, with those of one name in their order.
fn holds<'p>(made: &HeaderMap, pairs: impl Iterator<Item = &'p Pair>) {
    let mut said: Vec<&Pair> = pairs.collect();
    said.sort_by(|one, other| one.0.cmp(&other.0));
    let mut made: Vec<(&[u8], &[u8])> =
        made.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())).collect();
    made.sort_by(|one, other| one.0.cmp(other.0));
    let said: Vec<(&[u8], &[u8])> = said.into_iter().map(|(n, v)| (&**n, &**v)).collect();
    assert_eq!(made, said);
}

/// Whether RFC 9114 sections 4.2 and 4.3 let a request consist of these.
pub(super) fn is_request(pairs: &[Pair]) -> bool {
    let begin = pairs.iter().take_while(|(name, _)| name.starts_with(b":")).count();
    let (pseudo, usual) = pairs.split_at(begin);
    let values = |name: &str| {
        let mut all = pseudo.iter().filter(|(known, _)| known == name.as_bytes());
        (all.next().map(|(_, value)| &**value), all.next().is_some())
    };
    let names = [":method", ":scheme", ":authority", ":path", ":protocol"];
    let [method, scheme, authority, path, protocol] = names.map(values);
    let all = [method, scheme, authority, path, protocol];
    let known = all.iter().filter(|(value, _)| value.is_some()).count();
    let is_once = known == pseudo.len() && all.iter().all(|(_, twice)| !twice);
    let clean = |value: &[u8]| !value.is_empty() && value.iter().all(|b| *b > b' ' && *b != 0x7f);
    let are_clean = all.iter().all(|(value, _)| value.is_none_or(clean));
    let is_method = method.0.is_some_and(|method| method.iter().copied().all(is_token));
    let is_protocol = protocol.0.is_none_or(|protocol| {
        // RFC 9110 section 7.8.
        let mut words = protocol.split(|byte| *byte == b'/');
        words.all(|word| !word.is_empty() && word.iter().copied().all(is_token))
    });
    let is_connect = method.0 == Some(b"CONNECT");
    let is_shaped = if is_connect && protocol.0.is_none() {
        authority.0.is_some() && scheme.0.is_none() && path.0.is_none()
    } else {
        let is_asterisk = path.0 == Some(b"*") && method.0 == Some(b"OPTIONS");
        let is_path = path.0.is_some_and(|path| path.starts_with(b"/")) || is_asterisk;
        is_path && scheme.0.is_some() && (protocol.0.is_none() || is_connect)
    };
    is_once && are_clean && is_method && is_protocol && is_shaped && usual.iter().all(is_field)
}

/// RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether a message of HTTP/3 may have it (RFC 9114 section 4.2).
pub(super) fn is_field((name, value): &Pair) -> bool {
    // `http` lets a quotation mark pass, which is looked for behind it.
    let is_char = |byte: &u8| is_token(*byte) && !byte.is_ascii_uppercase() || *byte == b'"';
    let is_name = !name.is_empty() && name.iter().all(is_char);
    let is_value = value.iter().all(|byte| *byte == b'\t' || *byte >= b' ' && *byte != 0x7f);
    let is_of_the_connection = match &**name {
        b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
            true
        }
        b"te" => value != b"trailers",
        _ => false,
    };
    is_name && is_value && !is_of_the_connection
}

/// Whether it is a request that nobody could object to.
pub(super) fn is_plain(pairs: &[Pair]) -> bool {
    let plain = |value: &[u8]| value.iter().all(u8::is_ascii_alphanumeric);
    is_request(pairs)
        && pairs.iter().all(|(name, value)| match &**name {
            b":method" => [&b"GET"[..], b"POST", b"PUT", b"DELETE"].contains(&&**value),
            b":scheme" => value == b"https",
            b":authority" => plain(value),
            b":path" => value.len() < 100 && plain(&value[1..]),
            _ => name.starts_with(b"x-a") && plain(name.get(3..).unwrap_or_default()),
        })
        && pairs.iter().any(|(name, _)| name == b":authority")
        && pairs.len() < 20
}

/// The fields of a section up to the first byte that is wrong, and whether that is its end.
pub(super) fn fields(section: &[u8]) -> (Vec<Pair>, bool) {
    let mut fields = Vec::new();
    let read = read_fields(section, &mut fields);
    (fields, read.is_some())
}

fn read_fields(section: &[u8], fields: &mut Vec<Pair>) -> Option<()> {
    // RFC 9204 section 4.5.1: nothing of a dynamic table, and a base that is not below zero.
    let (0, 0, rest) = prefixed(section, 8)? else { return None };
    let (0, _, mut rest) = prefixed(rest, 7)? else { return None };
    while let Some(first) = rest.first() {
        let field;
        (field, rest) = match first >> 4 {
            0b1100..=0b1111 => {
                let (_, index, rest) = prefixed(rest, 6)?;
                (TABLE.get(usize::try_from(index).ok()?)?.clone(), rest)
            }
            0b0101 | 0b0111 => {
                let (_, index, rest) = prefixed(rest, 4)?;
                let (name, _) = TABLE.get(usize::try_from(index).ok()?)?.clone();
                let (value, rest) = string(rest, 7)?;
                ((name, value), rest)
            }
            0b0010 | 0b0011 => {
                let (name, rest) = string(rest, 3)?;
                let (value, rest) = string(rest, 7)?;
                ((name, value), rest)
            }
            _ => return None,
        };
        fields.push(field);
    }
    Some(())
}

/// An integer below this many bits (RFC 7541 section 5.1), the bits above it, and what follows.
fn prefixed(bytes: &[u8], bits: u32) -> Option<(u8, u64, &[u8])> {
    let (first, mut rest) = bytes.split_first()?;
    let most = u8::try_from((1_u32 << bits) - 1).expect("no more than eight bits");
    let above = u8::try_from(u32::from(*first) >> bits).expect("it was a byte");
    if first & most < most {
        return Some((above, u64::from(first & most), rest));
    }
    let mut value = u128::from(most);
    // Whoever needs more than 62 bits (RFC 9204 section 4.1.1) is not understood.
    for place in 0..9 {
        let (byte, behind) = rest.split_first()?;
        rest = behind;
        value += u128::from(byte % 128) << (7 * place);
        if *byte < 128 {
            return Some((above, u64::try_from(value).ok()?, rest));
        }
    }
    None
}

/// A string, and what follows it.
fn string(bytes: &[u8], bits: u32) -> Option<(Vec<u8>, &[u8])> {
    let (above, length, rest) = prefixed(bytes, bits)?;
    let (text, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    let text = if above % 2 == 1 { decompressed(text)? } else { text.to_vec() };
    Some((text, rest))
}

/// RFC 7541 section 5.2, bit by bit.
fn decompressed(text: &[u8]) -> Option<Vec<u8>> {
    let (mut plain, mut code) = (Vec::new(), String::new());
    for byte in text {
        for bit in format!("{byte:08b}").chars() {
            code.push(bit);
            if let Some(symbol) = CODES.get(code.as_str()) {
                // The 257th is the end, which may not be said.
                plain.push(u8::try_from(*symbol).ok()?);
                code.clear();
            }
        }
    }
    (code.len() < 8 && !code.contains('0')).then_some(plain)
}

/// RFC 7541 appendix B.
static CODES: LazyLock<HashMap<&str, usize>> = LazyLock::new(|| {
    let codes = include_str!("testdata/huffman.txt").lines().enumerate();
    codes.map(|(symbol, code)| (code, symbol)).collect()
});

/// RFC 9204 appendix A.
static TABLE: LazyLock<Vec<Pair>> = LazyLock::new(|| {
    let entry = |line: &str| {
        let (name, value) = line.split_once('=').expect("a name and a value");
        (name.as_bytes().to_vec(), value.as_bytes().to_vec())
    };
    include_str!("testdata/qpack-static.txt").lines().map(entry).collect()
});
