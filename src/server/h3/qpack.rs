//! Field sections as HTTP/3 compresses them (RFC 9204), without a dynamic table: a capacity of zero
//! is announced, so that no section waits for another stream and nothing is remembered between
//! them. Pure.

use bytes::{BufMut as _, BytesMut};
use http::{HeaderMap, StatusCode};

use super::huffman;

/// What each field costs beyond its bytes (RFC 9114 section 4.2.2).
const OVERHEAD: usize = 32;

/// Why a section can't be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// `QPACK_DECOMPRESSION_FAILED`
    Broken,
    /// Over the limit of bytes or of fields.
    TooLarge,
}

/// A field's name and value.
pub(crate) type Field = (Box<[u8]>, Box<[u8]>);

/// How much a section may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Most {
    /// By RFC 9114 section 4.2.2.
    pub(crate) bytes: usize,
    pub(crate) fields: usize,
}

/// Reads a section.
pub(crate) fn decode(mut section: &[u8], most: Most) -> Result<Vec<Field>, Fault> {
    // RFC 9204 section 4.5.1: the required insert count is zero; whatever the base is, nothing is
    // relative to it, but below zero it may not be.
    let (_, inserts) = integer(&mut section, 8)?;
    let (is_below, _base) = integer(&mut section, 7)?;
    if inserts != 0 || is_below != 0 {
        return Err(Fault::Broken);
    }
    let (mut fields, mut size) = (Vec::new(), 0usize);
    while let Some(first) = section.first().copied() {
        let field: Field = if first & 0x80 != 0 {
            // 4.5.2, indexed; `T` says that the table is the static one.
            let (flags, index) = integer(&mut section, 6)?;
            let (name, value) = entry(flags & 1 != 0, index)?;
            (name.as_bytes().into(), value.as_bytes().into())
        } else if first & 0x40 != 0 {
            // 4.5.4, a name by reference.
            let (flags, index) = integer(&mut section, 4)?;
            let (name, _) = entry(flags & 1 != 0, index)?;
            (name.as_bytes().into(), string(&mut section, 7)?)
        } else if first & 0x20 != 0 {
            // 4.5.6, all of it in words.
            (string(&mut section, 3)?, string(&mut section, 7)?)
        } else {
            // 4.5.3 and 4.5.5 refer to the dynamic table.
            return Err(Fault::Broken);
        };
        size = size.saturating_add(field.0.len() + field.1.len() + OVERHEAD);
        if size > most.bytes || fields.len() >= most.fields {
            return Err(Fault::TooLarge);
        }
        fields.push(field);
    }
    Ok(fields)
}

fn entry(is_static: bool, index: u64) -> Result<(&'static str, &'static str), Fault> {
    let found = usize::try_from(index).ok().and_then(|index| STATIC.get(index));
    found.copied().filter(|_| is_static).ok_or(Fault::Broken)
}

/// A prefixed integer (RFC 7541 section 5.1), and what stands before it in its first byte.
fn integer(from: &mut &[u8], prefix: u32) -> Result<(u8, u64), Fault> {
    let (first, rest) = from.split_first().ok_or(Fault::Broken)?;
    *from = rest;
    let mask = u8::try_from((1u16 << prefix) - 1).unwrap_or(u8::MAX);
    let flags = u8::try_from(u16::from(*first) >> prefix).unwrap_or_default();
    let mut value = u64::from(first & mask);
    if value < u64::from(mask) {
        return Ok((flags, value));
    }
    // RFC 9204 section 4.1.1: up to 62 bits.
    for shift in (0..62).step_by(7) {
        let (byte, rest) = from.split_first().ok_or(Fault::Broken)?;
        *from = rest;
        value += u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok((flags, value));
        }
    }
    Err(Fault::Broken)
}

/// A string whose length has this prefix, below the bit that tells whether it is compressed.
fn string(from: &mut &[u8], prefix: u32) -> Result<Box<[u8]>, Fault> {
    let (flags, length) = integer(from, prefix)?;
    let length = usize::try_from(length).map_err(|_| Fault::Broken)?;
    let (text, rest) = from.split_at_checked(length).ok_or(Fault::Broken)?;
    *from = rest;
    if flags & 1 == 0 {
        Ok(text.into())
    } else {
        huffman::decode(text).map(Vec::into_boxed_slice).ok_or(Fault::Broken)
    }
}

/// Writes the section of an answer.
pub(crate) fn response(status: StatusCode, fields: &HeaderMap) -> BytesMut {
    let mut section = begin(fields);
    let code = status.as_str();
    let place = STATIC.iter().position(|(name, value)| *name == ":status" && *value == code);
    if let Some(index) = place {
        put_integer(&mut section, 6, 0b11, index);
    } else {
        put_integer(&mut section, 4, 0b0101, STATUS);
        put_string(&mut section, 7, 0, code.as_bytes());
    }
    put_fields(&mut section, fields);
    section
}

/// Writes the section of trailers.
pub(crate) fn trailers(fields: &HeaderMap) -> BytesMut {
    let mut section = begin(fields);
    put_fields(&mut section, fields);
    section
}

fn begin(fields: &HeaderMap) -> BytesMut {
    let size: usize =
        fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 8).sum();
    let mut section = BytesMut::with_capacity(size + 16);
    section.put_slice(&[0, 0]);
    section
}

fn put_fields(section: &mut BytesMut, fields: &HeaderMap) {
    for (name, value) in fields {
        match index(name.as_str()) {
            Some(index) => put_integer(section, 4, 0b0101, index),
            None => put_string(section, 3, 0b00100, name.as_str().as_bytes()),
        }
        put_string(section, 7, 0, value.as_bytes());
    }
}

fn put_integer(section: &mut BytesMut, prefix: u32, flags: u8, value: usize) {
    let mask = (1usize << prefix) - 1;
    let flags = u8::try_from(u16::from(flags) << prefix & 0xff).unwrap_or_default();
    let byte = |value: usize| u8::try_from(value & 0xff).unwrap_or_default();
    if value < mask {
        section.put_u8(flags | byte(value));
        return;
    }
    section.put_u8(flags | byte(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        section.put_u8(byte(rest & 0x7f) | 0x80);
        rest >>= 7;
    }
    section.put_u8(byte(rest));
}

/// `flags` end with the bit that says that the string is plain.
fn put_string(section: &mut BytesMut, prefix: u32, flags: u8, text: &[u8]) {
    put_integer(section, prefix, flags, text.len());
    section.put_slice(text);
}

/// `:status`, whose other values have places of their own.
const STATUS: usize = 24;

/// The place of a name that answers often have.
fn index(name: &str) -> Option<usize> {
    Some(match name {
        "content-length" => 4,
        "date" => 6,
        "etag" => 7,
        "last-modified" => 10,
        "location" => 12,
        "set-cookie" => 14,
        "accept-ranges" => 32,
        "cache-control" => 36,
        "content-encoding" => 42,
        "content-type" => 44,
        "vary" => 59,
        "alt-svc" => 83,
        "server" => 92,
        _ => return None,
    })
}

/// RFC 9204 appendix A.
const STATIC: [(&str, &str); 99] = [
    (":authority", ""),
    (":path", "/"),
    ("age", "0"),
    ("content-disposition", ""),
    ("content-length", "0"),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("referer", ""),
    ("set-cookie", ""),
    (":method", "CONNECT"),
    (":method", "DELETE"),
    (":method", "GET"),
    (":method", "HEAD"),
    (":method", "OPTIONS"),
    (":method", "POST"),
    (":method", "PUT"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "103"),
    (":status", "200"),
    (":status", "304"),
    (":status", "404"),
    (":status", "503"),
    ("accept", "*/*"),
    ("accept", "application/dns-message"),
    ("accept-encoding", "gzip, deflate, br"),
    ("accept-ranges", "bytes"),
    ("access-control-allow-headers", "cache-control"),
    ("access-control-allow-headers", "content-type"),
    ("access-control-allow-origin", "*"),
    ("cache-control", "max-age=0"),
    ("cache-control", "max-age=2592000"),
    ("cache-control", "max-age=604800"),
    ("cache-control", "no-cache"),
    ("cache-control", "no-store"),
    ("cache-control", "public, max-age=31536000"),
    ("content-encoding", "br"),
    ("content-encoding", "gzip"),
    ("content-type", "application/dns-message"),
    ("content-type", "application/javascript"),
    ("content-type", "application/json"),
    ("content-type", "application/x-www-form-urlencoded"),
    ("content-type", "image/gif"),
    ("content-type", "image/jpeg"),
    ("content-type", "image/png"),
    ("content-type", "text/css"),
    ("content-type", "text/html; charset=utf-8"),
    ("content-type", "text/plain"),
    ("content-type", "text/plain;charset=utf-8"),
    ("range", "bytes=0-"),
    ("strict-transport-security", "max-age=31536000"),
    ("strict-transport-security", "max-age=31536000; includesubdomains"),
    ("strict-transport-security", "max-age=31536000; includesubdomains; preload"),
    ("vary", "accept-encoding"),
    ("vary", "origin"),
    ("x-content-type-options", "nosniff"),
    ("x-xss-protection", "1; mode=block"),
    (":status", "100"),
    (":status", "204"),
    (":status", "206"),
    (":status", "302"),
    (":status", "400"),
    (":status", "403"),
    (":status", "421"),
    (":status", "425"),
    (":status", "500"),
    ("accept-language", ""),
    ("access-control-allow-credentials", "FALSE"),
    ("access-control-allow-credentials", "TRUE"),
    ("access-control-allow-headers", "*"),
    ("access-control-allow-methods", "get"),
    ("access-control-allow-methods", "get, post, options"),
    ("access-control-allow-methods", "options"),
    ("access-control-expose-headers", "content-length"),
    ("access-control-request-headers", "content-type"),
    ("access-control-request-method", "get"),
    ("access-control-request-method", "post"),
    ("alt-svc", "clear"),
    ("authorization", ""),
    ("content-security-policy", "script-src 'none'; object-src 'none'; base-uri 'none'"),
    ("early-data", "1"),
    ("expect-ct", ""),
    ("forwarded", ""),
    ("if-range", ""),
    ("origin", ""),
    ("purpose", "prefetch"),
    ("server", ""),
    ("timing-allow-origin", "*"),
    ("upgrade-insecure-requests", "1"),
    ("user-agent", ""),
    ("x-forwarded-for", ""),
    ("x-frame-options", "deny"),
    ("x-frame-options", "sameorigin"),
];

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    const MOST: Most = Most { bytes: 1000, fields: 10 };

    fn read(section: &[u8]) -> Result<Vec<(String, String)>, Fault> {
        let text = |text: Box<[u8]>| String::from_utf8_lossy(&text).into_owned();
        let fields = decode(section, MOST)?;
        Ok(fields.into_iter().map(|(name, value)| (text(name), text(value))).collect())
    }

    fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
        of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_form_without_a_dynamic_table_can_be_read() {
        for (section, want) in [
            // RFC 9204 appendix B.1.
            (&b"\x00\x00\x51\x0b/index.html"[..], &[(":path", "/index.html")][..]),
            (b"\x00\x00\xd1\xd7\xc1", &[(":method", "GET"), (":scheme", "https"), (":path", "/")]),
            (b"\x00\x00\x21a\x01b", &[("a", "b")]),
            (b"\x00\x00\x29\x1f\x81\x1f", &[("a", "a")]),
            (b"\x00\x00\x27\x00aaaaaaa\x00", &[("aaaaaaa", "")]),
            (b"\x00\x00\xff\x23", &[("x-frame-options", "sameorigin")]),
            (b"\x00\x00", &[]),
        ] {
            assert_eq!(read(section), Ok(pairs(want)), "{section:x?}");
        }
    }

    #[test]
    fn what_can_not_be_read_is_refused() {
        for (section, fault) in [
            (&b""[..], Fault::Broken),
            (b"\x00", Fault::Broken),
            (b"\x01\x00\xd1", Fault::Broken),
            (b"\x00\x80\xd1", Fault::Broken),
            (b"\x00\x81\xd1", Fault::Broken),
            (b"\x00\x00\x80", Fault::Broken),
            (b"\x00\x00\x10", Fault::Broken),
            (b"\x00\x00\x00\x00", Fault::Broken),
            (b"\x00\x00\x40\x01a", Fault::Broken),
            (b"\x00\x00\xff\x24", Fault::Broken),
            (b"\x00\x00\x22a", Fault::Broken),
            (b"\x00\x00\x21a\x05b", Fault::Broken),
            (b"\x00\x00\x21a\x7f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Fault::Broken),
            (b"\x00\x00\x21a\x81\x18", Fault::Broken),
            (&[b"\x00\x00".as_slice(), &[0xd1; 11]].concat(), Fault::TooLarge),
            (&[b"\x00\x00\x21a\x7f\xca\x07".as_slice(), &[b'b'; 1097]].concat(), Fault::TooLarge),
        ] {
            assert_eq!(read(section), Err(fault), "{section:x?}");
        }
    }

    #[test]
    fn an_answer_can_be_read_as_it_was_meant() {
        for (status, first) in [(StatusCode::OK, 0xd9), (StatusCode::IM_A_TEAPOT, 0x5f)] {
            let mut fields = HeaderMap::new();
            for (name, value) in
                [("content-length", "5"), ("x-own", "a"), ("set-cookie", "b"), ("set-cookie", "c")]
            {
                fields.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            let section = response(status, &fields);
            assert_eq!(section[2], first);
            let mut want = vec![(":status".to_owned(), status.as_str().to_owned())];
            want.extend(pairs(&[
                ("content-length", "5"),
                ("x-own", "a"),
                ("set-cookie", "b"),
                ("set-cookie", "c"),
            ]));
            assert_eq!(read(&section), Ok(want));
        }
    }

    #[test]
    fn names_have_their_places() {
        for (_, (name, _)) in STATIC.iter().enumerate().skip(2) {
            if let Some(index) = index(name) {
                assert_eq!(STATIC[index].0, *name);
            }
        }
        assert_eq!(STATIC[STATUS].0, ":status");
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_tried(section: Vec<u8>) {
            if let Ok(fields) = decode(&section, MOST) {
                prop_assert!(fields.len() <= MOST.fields);
            }
        }

        #[test]
        fn trailers_of_any_size_can_be_read_as_they_were_meant(
            all in prop::collection::vec(("[a-z]{1,300}", "[ -~]{0,300}"), 0..9),
        ) {
            let mut fields = HeaderMap::new();
            let named = |text: &str| HeaderName::from_bytes(text.as_bytes()).unwrap();
            for (name, value) in &all {
                fields.append(named(name), value.parse().unwrap());
            }
            let most = Most { bytes: 1 << 20, fields: 100 };
            let read = decode(&trailers(&fields), most).unwrap();
            let want: Vec<Field> = fields.iter().map(|(name, value)| {
                (name.as_str().as_bytes().into(), value.as_bytes().into())
            }).collect();
            prop_assert_eq!(read, want);
        }
    }
}
