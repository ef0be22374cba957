//! Field sections become the heads of requests and their trailers, or are malformed (RFC 9114
//! sections 4.1.2, 4.2, 4.3 and 4.4). Pure.

use h2::ext::Protocol;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    uri::{Authority, Parts, PathAndQuery, Scheme},
};

use super::qpack::Field;

/// Why a section is no request: words that hold nothing of the client's.
pub(crate) type Malformed = &'static str;

/// The pseudo fields, each once at most.
#[derive(Default)]
struct Pseudo {
    method: Option<Method>,
    scheme: Option<Scheme>,
    authority: Option<Authority>,
    path: Option<Box<[u8]>>,
    protocol: Option<String>,
}

/// Makes a request of a section.
pub(crate) fn request(section: Vec<Field>) -> Result<Request<()>, Malformed> {
    const INVALID: Malformed = "a pseudo-header field with a value that it can't have";
    let mut pseudo = Pseudo::default();
    let mut fields = HeaderMap::with_capacity(section.len());
    for (name, value) in section {
        let Some(name) = name.strip_prefix(b":") else {
            put(&mut fields, &name, &value)?;
            continue;
        };
        if !fields.is_empty() {
            return Err("a pseudo-header field after the others");
        }
        if value.is_empty() {
            return Err("a pseudo-header field without a value");
        }
        let once = match name {
            b"method" => {
                let method = Method::from_bytes(&value).map_err(|_| INVALID)?;
                pseudo.method.replace(method).is_none()
            }
            b"scheme" => {
                let scheme = Scheme::try_from(&*value).map_err(|_| INVALID)?;
                pseudo.scheme.replace(scheme).is_none()
            }
            b"authority" => {
                let authority = Authority::try_from(&*value).map_err(|_| INVALID)?;
                pseudo.authority.replace(authority).is_none()
            }
            b"path" => {
                // The type drops a fragment without a look at it. h2 lets no other pass.
                let text = str::from_utf8(&value).map_err(|_| INVALID)?;
                if text.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
                    return Err(INVALID);
                }
                pseudo.path.replace(value).is_none()
            }
            b"protocol" => {
                // RFC 8441 section 4: an upgrade token, by RFC 9110 section 7.8.
                let is_protocol = value.split(|byte| *byte == b'/').all(is_token);
                let protocol = String::from_utf8(value.into()).ok().filter(|_| is_protocol);
                let protocol = protocol.ok_or(INVALID)?;
                pseudo.protocol.replace(protocol).is_none()
            }
            _ => return Err("a pseudo-header field that no request has"),
        };
        if !once {
            return Err("a pseudo-header field twice");
        }
    }
    let Pseudo { method, scheme, authority, path, protocol } = pseudo;
    let method = method.ok_or("no :method")?;
    let mut uri = Parts::default();
    if method == Method::CONNECT && protocol.is_none() {
        // Section 4.4.
        if scheme.is_some() || path.is_some() || authority.is_none() {
            return Err("a CONNECT with more or less than an :authority");
        }
    } else {
        if protocol.is_some() && method != Method::CONNECT {
            return Err(":protocol without CONNECT");
        }
        let path = path.ok_or("no :path")?;
        let is_asterisk = *path == *b"*" && method == Method::OPTIONS;
        if !path.starts_with(b"/") && !is_asterisk {
            return Err("a :path that does not begin with a slash");
        }
        uri.path_and_query = Some(PathAndQuery::try_from(&*path).map_err(|_| INVALID)?);
        let scheme = scheme.ok_or("no :scheme")?;
        // The type has no place for one without the other. Who names no host says it in `Host`.
        uri.scheme = authority.is_some().then_some(scheme);
    }
    uri.authority = authority;
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = Uri::from_parts(uri).map_err(|_| INVALID)?;
    *request.version_mut() = Version::HTTP_3;
    *request.headers_mut() = fields;
    if let Some(protocol) = protocol {
        request.extensions_mut().insert(Protocol::from(&*protocol));
    }
    Ok(request)
}

/// RFC 9110 section 5.6.2. A method is one, too.
fn is_token(text: &[u8]) -> bool {
    Method::from_bytes(text).is_ok()
}

/// Makes trailers of a section.
pub(crate) fn trailers(section: Vec<Field>) -> Result<HeaderMap, Malformed> {
    let mut fields = HeaderMap::with_capacity(section.len());
    for (name, value) in section {
        put(&mut fields, &name, &value)?;
    }
    Ok(fields)
}

fn put(fields: &mut HeaderMap, name: &[u8], value: &[u8]) -> Result<(), Malformed> {
    // Section 4.2: in lower case, and nothing of the connection. That includes pseudo fields.
    let name = HeaderName::from_lowercase(name).map_err(|_| "a field name that is none")?;
    let is_of_the_connection = matches!(
        name.as_str(),
        "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade"
    );
    if is_of_the_connection || (name == http::header::TE && value != b"trailers") {
        return Err("a field of the connection");
    }
    let value = HeaderValue::from_bytes(value).map_err(|_| "a field value that is none")?;
    fields.try_append(name, value).map(|_| ()).map_err(|_| "more fields than can be held")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(lines: &[(&str, &str)]) -> Vec<Field> {
        let bytes = |text: &str| text.as_bytes().into();
        lines.iter().map(|(name, value)| (bytes(name), bytes(value))).collect()
    }

    const GET: [(&str, &str); 4] =
        [(":method", "GET"), (":scheme", "https"), (":authority", "a.test"), (":path", "/b?c")];

    #[test]
    fn a_head_is_what_it_says() {
        let with = |more: &[(&str, &str)]| request(section(&[&GET[..], more].concat()));
        let made = with(&[("a", "1"), ("a", "2"), ("te", "trailers")]).unwrap();
        assert_eq!((made.method(), made.version()), (&Method::GET, Version::HTTP_3));
        assert_eq!(made.uri(), "https://a.test/b?c");
        assert_eq!(made.headers().get_all("a").iter().count(), 2);

        let [method, scheme, _, path] = GET;
        let made = request(section(&[method, scheme, path, ("host", "a.test")])).unwrap();
        assert_eq!(made.uri(), "/b?c");

        let mut asterisk = GET;
        (asterisk[0].1, asterisk[3].1) = ("OPTIONS", "*");
        assert_eq!(request(section(&asterisk)).unwrap().uri().path(), "*");

        let mut connect = GET.to_vec();
        connect[0].1 = "CONNECT";
        connect.push((":protocol", "websocket"));
        let made = request(section(&connect)).unwrap();
        assert_eq!(made.extensions().get::<Protocol>().unwrap().as_str(), "websocket");

        let made = request(section(&[(":method", "CONNECT"), (":authority", "a.test:1")])).unwrap();
        assert_eq!(made.uri(), "a.test:1");
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let [method, scheme, authority, path] = GET;
        let with_protocol = |protocol: &'static str| {
            [(":method", "CONNECT"), scheme, authority, path, (":protocol", protocol)]
        };
        for (what, lines) in [
            ("nothing", &[][..]),
            ("no method", &[scheme, authority, path]),
            ("no scheme", &[method, authority, path]),
            ("no path", &[method, scheme, authority]),
            ("an empty path", &[method, scheme, authority, (":path", "")]),
            ("a path without a slash", &[method, scheme, authority, (":path", "b")]),
            ("an asterisk for GET", &[method, scheme, authority, (":path", "*")]),
            ("a path with a space", &[method, scheme, authority, (":path", "/a b")]),
            ("a fragment with NUL", &[method, scheme, authority, (":path", "/a#b\0")]),
            ("a fragment with a line end", &[method, scheme, authority, (":path", "/a#\r\nb")]),
            ("two methods", &[method, method, scheme, authority, path]),
            ("two schemes", &[method, scheme, scheme, authority, path]),
            ("two authorities", &[method, scheme, authority, authority, path]),
            ("two paths", &[method, scheme, authority, path, path]),
            ("a late pseudo field", &[method, scheme, authority, ("a", "b"), path]),
            ("a status", &[method, scheme, authority, path, (":status", "200")]),
            ("an unknown one", &[method, scheme, authority, path, (":a", "b")]),
            ("an empty method", &[(":method", ""), scheme, authority, path]),
            ("a method with a space", &[(":method", "G T"), scheme, authority, path]),
            ("an empty authority", &[method, scheme, (":authority", ""), path]),
            ("an empty scheme", &[method, (":scheme", ""), authority, path]),
            ("upper case", &[method, scheme, authority, path, ("A", "b")]),
            ("no name", &[method, scheme, authority, path, ("", "b")]),
            ("a name with a space", &[method, scheme, authority, path, ("a b", "b")]),
            ("a name with a line end", &[method, scheme, authority, path, ("a\r\nb", "b")]),
            ("a value with a line end", &[method, scheme, authority, path, ("a", "b\r\nc: d")]),
            ("a value with a bare LF", &[method, scheme, authority, path, ("a", "b\nc")]),
            ("a value with NUL", &[method, scheme, authority, path, ("a", "b\0")]),
            ("connection", &[method, scheme, authority, path, ("connection", "close")]),
            ("keep-alive", &[method, scheme, authority, path, ("keep-alive", "1")]),
            ("proxy-connection", &[method, scheme, authority, path, ("proxy-connection", "a")]),
            (
                "transfer-encoding",
                &[method, scheme, authority, path, ("transfer-encoding", "chunked")],
            ),
            ("upgrade", &[method, scheme, authority, path, ("upgrade", "websocket")]),
            ("te", &[method, scheme, authority, path, ("te", "gzip")]),
            ("a CONNECT with a path", &[(":method", "CONNECT"), authority, path]),
            ("a CONNECT with a scheme", &[(":method", "CONNECT"), authority, scheme]),
            ("a CONNECT to nowhere", &[(":method", "CONNECT")]),
            ("a protocol with a line end", &with_protocol("websocket\r\na: b")),
            ("a protocol with NUL", &with_protocol("websocket\0")),
            ("a protocol with more than ASCII", &with_protocol("w\u{e9}bsocket")),
            ("a protocol with an empty version", &with_protocol("websocket/")),
            ("a protocol for GET", &[method, scheme, authority, path, (":protocol", "websocket")]),
            (
                "two protocols",
                &[
                    (":method", "CONNECT"),
                    scheme,
                    authority,
                    path,
                    (":protocol", "websocket"),
                    (":protocol", "websocket"),
                ],
            ),
        ] {
            assert!(request(section(lines)).is_err(), "{what}");
        }
    }

    #[test]
    fn trailers_hold_fields_alone() {
        assert_eq!(trailers(section(&[("grpc-status", "0")])).unwrap().len(), 1);
        for (name, value) in [(":path", "/"), ("A", "b"), ("connection", "a"), ("a", "\n")] {
            assert!(trailers(section(&[(name, value)])).is_err(), "{name}");
        }
    }
}
