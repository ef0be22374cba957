//! The other paths that a node might understand a path as.
//!
//! litegate matches routes on the path as it came and passes it on byte for byte. A node that
//! decodes it first, or goes up a segment for `..`, serves another path, which another route may be
//! for: a write that went as a read, or past the route that refuses it. So these readings have to
//! lead to the same route as the path itself ([`limits.ambiguous_paths`]).
//!
//! [`limits.ambiguous_paths`]: crate::config::limits::AmbiguousPaths

/// Whether a path could be read as another one in a way that nobody needs: dot segments, empty
/// segments, backslashes, and slashes, backslashes, dots and NULs that are percent-encoded.
pub fn is_ambiguous(path: &str) -> bool {
    let bytes = path.as_bytes();
    bytes.windows(2).any(|two| matches!(two, b"//" | b"/."))
        && (bytes.windows(2).any(|two| two == b"//") || segments(path).any(is_dots))
        || bytes.contains(&b'\\')
        || bytes.windows(3).any(|three| {
            let [b'%', high, low] = three else { return false };
            matches!(decoded(*high, *low), Some(b'/' | b'\\' | b'.' | 0))
        })
}

/// Every other path that `path` may be taken for: what RFC 3986 section 6.2.2 makes of it, and what
/// the most obliging node does. None for nearly every path.
pub fn readings(path: &str) -> impl Iterator<Item = String> + '_ {
    let odd = path.bytes().any(|byte| matches!(byte, b'%' | b'\\'))
        || path.as_bytes().windows(2).any(|two| matches!(two, b"//" | b"/."));
    let readings = odd.then(|| {
        let standard = climb(&decode(path, is_unreserved), false);
        let obliging = climb(&decode(path, |_| true).replace('\\', "/"), true);
        [standard, obliging]
    });
    readings.into_iter().flatten().filter(move |reading| reading != path)
}

/// Decodes the percent-encoded bytes that `which` is true of, if all of it is UTF-8 then.
fn decode(path: &str, which: impl Fn(u8) -> bool) -> String {
    let mut rest = path.as_bytes();
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some((first, after)) = rest.split_first() {
        let byte = match after {
            [high, low, ..] if *first == b'%' => decoded(*high, *low).filter(|byte| which(*byte)),
            _ => None,
        };
        bytes.push(byte.unwrap_or(*first));
        rest = after.get(if byte.is_some() { 2 } else { 0 }..).unwrap_or_default();
    }
    String::from_utf8(bytes).unwrap_or_else(|_| path.to_owned())
}

fn decoded(high: u8, low: u8) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(high)? << 4 | digit(low)?)
}

/// RFC 3986 section 2.3: encoded or not, they are the same.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/')
}

/// `.` and `..`, with parameters or without: some containers take `..;x` for a step up.
fn is_dots(segment: &str) -> bool {
    matches!(segment.split(';').next(), Some("." | ".."))
}

/// Goes up a segment for each `..` (RFC 3986 section 5.2.4), and leaves out empty ones if they are
/// `merged`.
fn climb(path: &str, merged: bool) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_in_slash = false;
    for segment in segments(path).skip(usize::from(path.starts_with('/'))) {
        ends_in_slash = true;
        match segment.split(';').next() {
            Some("..") => {
                kept.pop();
            }
            Some(".") => {}
            Some("") if merged && segment.is_empty() => {}
            _ => {
                kept.push(segment);
                ends_in_slash = false;
            }
        }
    }
    let mut climbed = format!("/{}", kept.join("/"));
    if ends_in_slash && !climbed.ends_with('/') {
        climbed.push('/');
    }
    climbed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_paths_are_read_one_way() {
        for path in ["/", "/a/b", "/a/b.png", "/a/..b", "*", "/a/b/", "/a;b/c", "/.well-known/x"] {
            assert!(!is_ambiguous(path), "{path}");
            assert_eq!(readings(path).count(), 0, "{path}");
        }
        assert!(!is_ambiguous("/a%20b") && !is_ambiguous("/%61"));
        assert!(readings("/a%20b").eq(["/a b"]));
    }

    #[test]
    fn others_are_read_as_what_they_mean_to_somebody() {
        for (path, standard, obliging) in [
            ("/a/../b", "/b", "/b"),
            ("/a/./b", "/a/b", "/a/b"),
            ("/a//b", "/a//b", "/a/b"),
            ("//a", "//a", "/a"),
            ("/a/..", "/", "/"),
            ("/a/b/..", "/a/", "/a/"),
            ("/../../a", "/a", "/a"),
            ("/a%2fb", "/a%2fb", "/a/b"),
            ("/a%2F..%2fb", "/a%2F..%2fb", "/b"),
            ("/a/%2e%2E/b", "/b", "/b"),
            ("/a%5c..\\b", "/a%5c..\\b", "/b"),
            ("/a/..;x/b", "/b", "/b"),
            ("/a\\b", "/a\\b", "/a/b"),
            ("/a%00b", "/a%00b", "/a\0b"),
        ] {
            assert!(is_ambiguous(path), "{path}");
            let all: Vec<_> = readings(path).collect();
            let expected: Vec<_> =
                [standard, obliging].into_iter().filter(|reading| *reading != path).collect();
            assert_eq!(all, expected, "{path}");
        }
    }

    proptest::proptest! {
        /// A reading is a path that nobody reads otherwise.
        #[test]
        fn a_reading_has_no_dots(path in "(/|/\\.\\.|/\\.|a|%2f|%2e|//|\\\\|;){0,12}") {
            let path = format!("/{path}");
            for reading in readings(&path).skip(1) {
                proptest::prop_assert!(!segments(&reading).any(is_dots), "{}", reading);
            }
        }
    }
}
