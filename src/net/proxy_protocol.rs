//! The PROXY protocol's header, versions 1 and 2: who is at the other end of a connection that
//! came through a load balancer.
//!
//! As <https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt> has it: the header is the very
//! first thing on a connection and comes in one piece, but nothing may be built on that, so the
//! parser says how much more it needs. Pure but for [`read`].

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use bytes::Bytes;
use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// What a listener does about the header.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ProxyProtocol {
    /// There is none: one that comes is not HTTP.
    #[default]
    Off,
    /// There may be one.
    Accept,
    /// Without one, nobody is served.
    Require,
}

/// The most that a version 1 header can be (section 2.1).
const LONGEST_V1: usize = 107;
/// The most of a version 2 header that is read: its fixed part and addresses take 52 bytes, and
/// what load balancers add (a name, TLS details, an id) a few hundred.
const LONGEST_V2: usize = 4096;
const SIGNATURE_V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const FIXED_V2: usize = 16;

/// The two ends of the connection that the client made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ends {
    /// The client.
    pub source: SocketAddr,
    /// Where it connected to.
    pub destination: SocketAddr,
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Parsed {
    /// The beginning of a header, perhaps.
    Incomplete,
    /// Something else.
    Absent,
    /// A header of so many bytes. `None`: its sender speaks for itself (a health check) or for
    /// something without an address.
    Header(Option<Ends>, usize),
}

/// A header that is wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HeaderError {
    /// Version 1.
    #[error("the PROXY line is malformed")]
    Line,
    /// Version 2.
    #[error("the PROXY version 2 header is malformed")]
    Binary,
    /// Version 2.
    #[error("the PROXY version 2 header is too long")]
    TooLong,
}

/// Looks at the first bytes of a connection.
///
/// # Errors
/// What is wrong with a header that can't be anything else.
pub fn parse(bytes: &[u8]) -> Result<Parsed, HeaderError> {
    const NAME: &[u8] = b"PROXY ";
    if begins(bytes, SIGNATURE_V2) {
        return binary(bytes);
    }
    if !begins(bytes, NAME) {
        return Ok(Parsed::Absent);
    }
    let known = bytes.get(..LONGEST_V1).unwrap_or(bytes);
    match known.windows(2).position(|pair| pair == b"\r\n") {
        Some(end) => {
            let line = known.get(NAME.len()..end).ok_or(HeaderError::Line)?;
            Ok(Parsed::Header(self::line(line)?, end + 2))
        }
        None if known.len() < LONGEST_V1 => Ok(Parsed::Incomplete),
        None => Err(HeaderError::Line),
    }
}

/// Whether one of the two begins with the other.
fn begins(bytes: &[u8], whole: &[u8]) -> bool {
    bytes.iter().zip(whole).all(|(a, b)| a == b)
}

/// `TCP4 192.0.2.7 192.0.2.1 4711 443`, `TCP6 …` or `UNKNOWN …`.
fn line(line: &[u8]) -> Result<Option<Ends>, HeaderError> {
    let line = std::str::from_utf8(line).map_err(|_| HeaderError::Line)?;
    let mut words = line.split(' ');
    let family = words.next();
    if family == Some("UNKNOWN") {
        // Section 2.1: whatever follows is to be ignored.
        return Ok(None);
    }
    let mut ip = || -> Result<IpAddr, HeaderError> {
        let word = words.next().ok_or(HeaderError::Line)?;
        match family {
            Some("TCP4") => word.parse().map(IpAddr::V4),
            Some("TCP6") => word.parse().map(IpAddr::V6),
            _ => return Err(HeaderError::Line),
        }
        .map_err(|_| HeaderError::Line)
    };
    let (source, destination) = (ip()?, ip()?);
    let mut port = || -> Result<u16, HeaderError> {
        let word = words.next().ok_or(HeaderError::Line)?;
        let is_canonical = word.bytes().all(|byte| byte.is_ascii_digit())
            && (word.len() == 1 || !word.starts_with('0'));
        word.parse().ok().filter(|_| is_canonical).ok_or(HeaderError::Line)
    };
    let (from, to) = (port()?, port()?);
    if words.next().is_some() {
        return Err(HeaderError::Line);
    }
    Ok(Some(Ends {
        source: SocketAddr::new(source, from),
        destination: SocketAddr::new(destination, to),
    }))
}

fn binary(bytes: &[u8]) -> Result<Parsed, HeaderError> {
    let &[_, _, _, _, _, _, _, _, _, _, _, _, command, family, high, low, ref rest @ ..] = bytes
    else {
        return Ok(Parsed::Incomplete);
    };
    if !matches!(command, 0x20 | 0x21) {
        return Err(HeaderError::Binary);
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if FIXED_V2 + length > LONGEST_V2 {
        return Err(HeaderError::TooLong);
    }
    let Some(body) = rest.get(..length) else { return Ok(Parsed::Incomplete) };
    let all = FIXED_V2 + length;
    // LOCAL: the sender's own connection, whatever addresses it brings (section 2.2).
    if command == 0x20 {
        return Ok(Parsed::Header(None, all));
    }
    let ends = match family {
        // TCP over IPv4 and IPv6; behind the addresses there may be more, for whoever wants it.
        0x11 => {
            let part = |at: usize| body.get(at..)?.first_chunk::<4>().copied();
            let (Some(source), Some(destination), Some(ports)) = (part(0), part(4), part(8)) else {
                return Err(HeaderError::Binary);
            };
            let [s0, s1, d0, d1] = ports;
            Some(Ends {
                source: (Ipv4Addr::from(source), u16::from_be_bytes([s0, s1])).into(),
                destination: (Ipv4Addr::from(destination), u16::from_be_bytes([d0, d1])).into(),
            })
        }
        0x21 => {
            let ip = |at: usize| -> Option<Ipv6Addr> {
                let octets: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
                Some(octets.into())
            };
            let port = |at: usize| -> Option<u16> {
                Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?))
            };
            let ends = || {
                let source = SocketAddr::from((ip(0)?, port(32)?));
                Some(Ends { source, destination: (ip(16)?, port(34)?).into() })
            };
            Some(ends().ok_or(HeaderError::Binary)?)
        }
        // UNSPEC, datagrams and Unix sockets: nothing that is an address here.
        0x00 | 0x12 | 0x22 | 0x31 | 0x32 => None,
        _ => return Err(HeaderError::Binary),
    };
    Ok(Parsed::Header(ends, all))
}

/// Whom a connection speaks for, said at its beginning.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Introduction {
    /// In which words.
    pub version: Version,
    /// Of the client's connection. `None`: nobody but us.
    pub ends: Option<Ends>,
}

/// The header's version.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

impl Introduction {
    /// As it goes over the wire.
    pub fn header(&self) -> Vec<u8> {
        match self.version {
            Version::V1 => write_v1(self.ends),
            Version::V2 => write_v2(self.ends),
        }
    }
}

/// A version 1 header (section 2.1). Where the two ends are of different families, both are
/// written as IPv6.
fn write_v1(ends: Option<Ends>) -> Vec<u8> {
    let Some(Ends { source, destination }) = ends else { return b"PROXY UNKNOWN\r\n".to_vec() };
    let (family, from, to) = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (from @ IpAddr::V4(_), to @ IpAddr::V4(_)) => ("TCP4", from, to),
        (from, to) => ("TCP6", v6(from).into(), v6(to).into()),
    };
    let (from_port, to_port) = (source.port(), destination.port());
    format!("PROXY {family} {from} {to} {from_port} {to_port}\r\n").into_bytes()
}

/// A version 2 header (section 2.2).
fn write_v2(ends: Option<Ends>) -> Vec<u8> {
    let mut header = SIGNATURE_V2.to_vec();
    let Some(Ends { source, destination }) = ends else {
        header.extend_from_slice(&[0x20, 0, 0, 0]);
        return header;
    };
    match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            header.extend_from_slice(&[0x21, 0x11, 0, 12]);
            header.extend_from_slice(&from.octets());
            header.extend_from_slice(&to.octets());
        }
        (from, to) => {
            header.extend_from_slice(&[0x21, 0x21, 0, 36]);
            header.extend_from_slice(&v6(from).octets());
            header.extend_from_slice(&v6(to).octets());
        }
    }
    header.extend_from_slice(&source.port().to_be_bytes());
    header.extend_from_slice(&destination.port().to_be_bytes());
    header
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// Takes the header from a fresh connection, and not a byte more. Returns whom it tells of, and
/// what was read that is no header.
///
/// Whoever calls this bounds the time that it takes.
///
/// # Errors
/// The connection's, or [`HeaderError`] as invalid data.
pub async fn read(socket: &mut TcpStream) -> io::Result<(Parsed, Bytes)> {
    let mut taken = Vec::new();
    let mut seen = [0; LONGEST_V2];
    loop {
        // Looked at first, so that what follows the header stays with the socket.
        let n = socket.peek(&mut seen).await?;
        let new = seen.get(..n).unwrap_or_default();
        let parsed = parse(&[&taken, new].concat())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let take = match parsed {
            // The end of the connection.
            Parsed::Incomplete if n == 0 => return Ok((Parsed::Absent, taken.into())),
            Parsed::Incomplete => n,
            Parsed::Absent => return Ok((parsed, taken.into())),
            // Without these it was incomplete: it ends among the new bytes.
            Parsed::Header(_, length) => length.saturating_sub(taken.len()).min(n),
        };
        let mut rest = seen.get_mut(..take).unwrap_or_default();
        while !rest.is_empty() {
            // They are there: this does not wait.
            let n = socket.read(rest).await?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            taken.extend_from_slice(rest.get(..n).unwrap_or_default());
            rest = rest.get_mut(n..).unwrap_or_default();
        }
        if matches!(parsed, Parsed::Header(..)) {
            return Ok((parsed, Bytes::new()));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ends(source: &str, destination: &str) -> Ends {
        Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [SIGNATURE_V2, &[command, family][..], &length, body].concat()
    }

    #[test]
    fn lines_that_are_headers() {
        for (line, want) in [
            (
                "PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n",
                Some(ends("192.0.2.7:4711", "192.0.2.1:443")),
            ),
            (
                "PROXY TCP6 2001:db8::7 ::1 0 65535\r\n",
                Some(ends("[2001:db8::7]:0", "[::1]:65535")),
            ),
            ("PROXY UNKNOWN\r\n", None),
            ("PROXY UNKNOWN ffff:f...f:ffff whatever this is\r\n", None),
        ] {
            let followed = format!("{line}GET / HTTP/1.1\r\n");
            assert_eq!(parse(followed.as_bytes()), Ok(Parsed::Header(want, line.len())), "{line}");
        }
    }

    #[test]
    fn lines_that_are_not() {
        for line in [
            "PROXY TCP4 192.0.2.7 192.0.2.1 4711\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 4711 443 1\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 4711 65536\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 +1 443\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 01 443\r\n",
            "PROXY TCP4 192.0.2.7  192.0.2.1 1 443\r\n",
            "PROXY TCP4 ::1 ::1 1 443\r\n",
            "PROXY TCP6 192.0.2.7 192.0.2.1 1 443\r\n",
            "PROXY TCP4 192.0.2.007 192.0.2.1 1 443\r\n",
            "PROXY TCP9 192.0.2.7 192.0.2.1 1 443\r\n",
            "PROXY \r\n",
            "PROXY TCP4 \u{e9}\r\n",
        ] {
            assert_eq!(parse(line.as_bytes()), Err(HeaderError::Line), "{line}");
        }
        let endless = format!("PROXY TCP4 {}", "1".repeat(LONGEST_V1));
        assert_eq!(parse(endless.as_bytes()), Err(HeaderError::Line));
        for other in ["GET / HTTP/1.1\r\n", "POST", "PRI * HTTP/2.0", "PROXX", "\x16\x03\x01"] {
            assert_eq!(parse(other.as_bytes()), Ok(Parsed::Absent), "{other}");
        }
    }

    #[test]
    fn binary_headers() {
        let four = [192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 1, 0xbb];
        let known = Some(ends("192.0.2.7:4711", "192.0.2.1:443"));
        let more = [&four[..], &[3, 0, 4, 1, 2, 3, 4]].concat();
        for (header, want) in [
            (v2(0x21, 0x11, &four), Ok(known)),
            (v2(0x21, 0x11, &more), Ok(known)),
            (v2(0x20, 0x11, &four), Ok(None)),
            (v2(0x20, 0, &[]), Ok(None)),
            (v2(0x21, 0, &[]), Ok(None)),
            (v2(0x21, 0x31, &[0; 216]), Ok(None)),
            (v2(0x21, 0x11, &four[..11]), Err(HeaderError::Binary)),
            (v2(0x21, 0x21, &[0; 35]), Err(HeaderError::Binary)),
            (v2(0x11, 0x11, &four), Err(HeaderError::Binary)),
            (v2(0x22, 0x11, &four), Err(HeaderError::Binary)),
            (v2(0x21, 0x55, &four), Err(HeaderError::Binary)),
            (v2(0x21, 0x11, &[0; LONGEST_V2]), Err(HeaderError::TooLong)),
        ] {
            let want = want.map(|ends| Parsed::Header(ends, header.len()));
            assert_eq!(parse(&[&header[..], b"GET /"].concat()), want, "{header:?}");
        }
    }

    #[tokio::test]
    async fn what_follows_the_header_stays_with_the_socket() {
        use tokio::io::AsyncWriteExt as _;

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let known = ends("192.0.2.7:4711", "192.0.2.1:443");
        for (header, want) in [
            (write_v1(Some(known)), Parsed::Header(Some(known), write_v1(Some(known)).len())),
            (write_v2(Some(known)), Parsed::Header(Some(known), 28)),
            (Vec::new(), Parsed::Absent),
        ] {
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            client.set_nodelay(true).unwrap();
            let (mut socket, _) = listener.accept().await.unwrap();
            let sent = [&header[..], b"PRI * and more"].concat();
            let send = async {
                // Byte by byte: nothing may be built on its coming in one piece.
                for byte in sent {
                    client.write_all(&[byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
                client
            };
            let (read, client) = tokio::join!(read(&mut socket), send);
            let (parsed, ahead) = read.unwrap();
            assert_eq!(parsed, want);
            drop(client);
            let mut rest = ahead.to_vec();
            socket.read_to_end(&mut rest).await.unwrap();
            assert_eq!(rest, b"PRI * and more");
        }
    }

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        let v6 = any::<[u8; 16]>().prop_map(IpAddr::from);
        // One that is mapped reads back as IPv4 only where both are.
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), v6]
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_looked_at(bytes: Vec<u8>, version in 0..3usize) {
            let begin: [&[u8]; 3] = [b"", b"PROXY ", SIGNATURE_V2];
            let bytes = [begin[version], &bytes].concat();
            if let Ok(Parsed::Header(_, length)) = parse(&bytes) {
                prop_assert!(length <= bytes.len() && length <= LONGEST_V2);
            }
        }

        #[test]
        fn what_is_written_is_read(a in any_ip(), b in any_ip(), ports: (u16, u16), cut in 0usize..90) {
            let told = Ends { source: (a, ports.0).into(), destination: (b, ports.1).into() };
            for header in [write_v1(Some(told)), write_v2(Some(told))] {
                let Ok(Parsed::Header(Some(read), length)) = parse(&header) else {
                    panic!("{header:?}")
                };
                prop_assert_eq!(length, header.len());
                prop_assert_eq!(read.source.ip().to_canonical(), a.to_canonical());
                prop_assert_eq!(read.destination.ip().to_canonical(), b.to_canonical());
                prop_assert_eq!((read.source.port(), read.destination.port()), ports);
                let cut = cut.min(header.len() - 1);
                prop_assert_eq!(parse(&header[..cut]), Ok(Parsed::Incomplete));
            }
        }

        #[test]
        fn a_verdict_does_not_change_with_what_comes_later(bytes: Vec<u8>, version in 0..3usize) {
            let begin: [&[u8]; 3] = [b"", b"PROXY ", SIGNATURE_V2];
            let bytes = [begin[version], &bytes].concat();
            let whole = parse(&bytes);
            for cut in 0..bytes.len() {
                match parse(&bytes[..cut]) {
                    Ok(Parsed::Incomplete) => {}
                    verdict => prop_assert_eq!(verdict, whole),
                }
            }
        }
    }
}
