//! What hostile clients and nodes send, and what has to become of it. `docs/security.md` shows
//! these tables.

use super::node::Script;

/// What may come to the node of a client's bytes.
#[derive(Clone, Debug)]
pub(super) enum Reach {
    /// Not a byte.
    Nothing,
    /// No whole request.
    Part,
    /// Exactly these requests.
    These(Vec<String>),
}

/// Why a row does not fail against the naive forwarder, if it does not.
pub(super) type Harmless = Option<&'static str>;

/// What a client sends over HTTP/1.1.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    pub(super) bytes: Vec<u8>,
    /// In order.
    pub(super) answers: Vec<u16>,
    /// The word of the last answer, where that is litegate's own.
    pub(super) word: Option<&'static str>,
    /// Nothing more is read after the last answer.
    pub(super) closed: bool,
    pub(super) reach: Reach,
    pub(super) harmless: Harmless,
}

/// A request whose fields are these lines.
fn with(method: &str, fields: &str, body: &str) -> Vec<u8> {
    format!("{method} /x HTTP/1.1\r\nhost: a\r\n{fields}\r\n{body}").into_bytes()
}

/// Refused as a whole.
fn refused(name: &'static str, why: &'static str, bytes: impl AsRef<[u8]>) -> Row {
    Row {
        name,
        why,
        bytes: bytes.as_ref().to_vec(),
        answers: vec![400],
        word: Some("malformed"),
        closed: true,
        reach: Reach::Nothing,
        harmless: None,
    }
}

/// Refused by a field of a POST that smuggles a request.
fn field(name: &'static str, why: &'static str, fields: &str) -> Row {
    refused(name, why, with("POST", &format!("{fields}\r\n"), SMUGGLED))
}

/// Refused in the middle of a chunked body.
fn chunks(name: &'static str, why: &'static str, body: &str) -> Row {
    let bytes = with("POST", "transfer-encoding: chunked\r\n", &format!("{body}{SMUGGLED}"));
    Row { reach: Reach::Part, ..refused(name, why, bytes) }
}

/// Passed on so, whatever came.
fn passed(name: &'static str, why: &'static str, bytes: impl AsRef<[u8]>, as_this: &str) -> Row {
    Row {
        answers: vec![200],
        word: None,
        closed: false,
        reach: Reach::These(vec![as_this.to_owned()]),
        ..refused(name, why, bytes)
    }
}

impl Row {
    fn with(self, status: u16, word: &'static str) -> Self {
        Self { answers: vec![status], word: Some(word), ..self }
    }

    fn harmless(self, why: &'static str) -> Self {
        Self { harmless: Some(why), ..self }
    }
}

/// A whole chunked body and a request that must never be one.
const SMUGGLED: &str = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";

pub(super) fn requests() -> Vec<Row> {
    let length = "RFC 9110 8.6, RFC 9112 6.3 rule 5";
    let coding = "RFC 9112 6.1, 6.3 rule 4";
    let name = "RFC 9112 5.1";
    let value = "RFC 9110 5.5";
    let line = "RFC 9112 2.2";
    let target = "RFC 9112 3.2";
    let version = "RFC 9112 2.3";
    let host = "RFC 9112 3.2, RFC 9110 7.2";
    let size = "RFC 9112 7.1";
    let extension = "RFC 9112 7.1.1";
    let get = |target: &str| format!("GET {target} HTTP/1.1\r\nhost: a\r\n\r\n");
    let mut rows = vec![
        // Lengths.
        field(
            "CL.TE: Content-Length before Transfer-Encoding",
            "RFC 9112 6.1, CVE-2019-20445",
            "content-length: 5\r\ntransfer-encoding: chunked",
        ),
        field(
            "TE.CL: Transfer-Encoding before Content-Length",
            "RFC 9112 6.1",
            "transfer-encoding: chunked\r\ncontent-length: 5",
        ),
        field("two lengths that differ", length, "content-length: 5\r\ncontent-length: 6"),
        field("two lengths that agree", length, "content-length: 5\r\ncontent-length: 5"),
        field("a list of lengths", length, "content-length: 5, 5"),
        field("a list of lengths without blanks", length, "content-length: 5,5"),
        field("a length with a plus", "RFC 9110 8.6, CVE-2021-32715", "content-length: +5"),
        field("a negative length", length, "content-length: -5"),
        field("a hexadecimal length", length, "content-length: 0x5"),
        field("a length with a blank in it", length, "content-length: 5 5"),
        field("a length in scientific notation", length, "content-length: 1e1"),
        field("a length with a fraction", length, "content-length: 5.0"),
        field("an empty length", length, "content-length:"),
        field("a length of words", length, "content-length: five"),
        field("a length with a parameter", length, "content-length: 5;a"),
        field("a length of foreign digits", length, "content-length: \u{0665}"),
        field("a length beyond 64 bits", length, "content-length: 99999999999999999999"),
        field("a length beyond 63 bits", length, "content-length: 9223372036854775808"),
        field("a length behind a vertical tab", value, "content-length: \x0b5"),
        field("an obsolete fold before a length", "RFC 9112 5.2", "content-length:\r\n 5"),
        // Codings.
        field("TE.TE: identity behind chunked", coding, "transfer-encoding: chunked, identity"),
        field("TE.TE: xchunked", coding, "transfer-encoding: xchunked"),
        field("TE.TE: chunked in quotes", coding, "transfer-encoding: \"chunked\""),
        field("TE.TE: chunked with a parameter", coding, "transfer-encoding: chunked;q=1"),
        field("TE.TE: chunked and a vertical tab", value, "transfer-encoding: chunked\x0b"),
        field(
            "TE.TE: a vertical tab and chunked",
            "RFC 9110 5.5, CVE-2019-18277",
            "transfer-encoding: \x0bchunked",
        ),
        field("TE.TE: chunked and a form feed", value, "transfer-encoding: chunked\x0c"),
        field(
            "TE.TE: chunked twice in one line",
            "RFC 9112 7.1",
            "transfer-encoding: chunked, chunked",
        ),
        field(
            "TE.TE: chunked twice in two lines",
            coding,
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        ),
        field(
            "TE.TE: chunked, then identity",
            coding,
            "transfer-encoding: chunked\r\ntransfer-encoding: identity",
        ),
        field(
            "TE.TE: identity, then chunked",
            coding,
            "transfer-encoding: identity\r\ntransfer-encoding: chunked",
        ),
        field("TE.TE: an empty element before chunked", coding, "transfer-encoding: , chunked"),
        field("TE.TE: an empty coding", coding, "transfer-encoding:"),
        field("TE.TE: gzip alone", coding, "transfer-encoding: gzip"),
        field(
            "TE.TE: an obsolete fold",
            "RFC 9112 5.2, CVE-2022-32215",
            "transfer-encoding:\r\n chunked",
        ),
        field(
            "TE.TE: a blank before the colon",
            "RFC 9112 5.1, CVE-2019-16276",
            "transfer-encoding : chunked",
        ),
        field("TE.TE: a bare LF before it", line, "x: y\ntransfer-encoding: chunked"),
        field(
            "TE.TE: a bare CR before it",
            "RFC 9112 2.2, CVE-2023-30589",
            "x: y\rtransfer-encoding: chunked",
        ),
        field(
            "an unknown coding before chunked",
            "RFC 9112 6.1",
            "transfer-encoding: gzip, chunked",
        )
        .with(501, "unknown_coding"),
        field("identity before chunked", "RFC 9112 6.1", "transfer-encoding: identity, chunked")
            .with(501, "unknown_coding"),
        refused(
            "chunked in HTTP/1.0",
            "RFC 9112 6.1",
            format!("POST /x HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{SMUGGLED}"),
        ),
        passed(
            "a tab before chunked is white space like any other",
            "RFC 9112 5.1",
            with("POST", "transfer-encoding:\tchunked \r\n", "1\r\nx\r\n0\r\n\r\n"),
            "POST /x HTTP/1.1 | host: a | transfer-encoding: chunked || x",
        ),
        // Lines and names.
        field("an obsolete fold", "RFC 9112 5.2", "x: a\r\n b"),
        field("an obsolete fold of a tab", "RFC 9112 5.2", "x: a\r\n\tb"),
        refused(
            "a fold of the first field",
            line,
            format!("POST /x HTTP/1.1\r\n content-length: 5\r\nhost: a\r\n\r\n{SMUGGLED}"),
        ),
        refused("a bare LF behind the request line", line, "GET /x HTTP/1.1\nhost: a\r\n\r\n"),
        field("a bare LF behind a field", line, "x: y\nz: w"),
        refused("bare LFs throughout", line, "GET /x HTTP/1.1\nhost: a\n\n"),
        refused("a bare LF at the end of the head", line, "GET /x HTTP/1.1\r\nhost: a\r\n\n"),
        refused("a bare LF before the request line", line, "\nGET /x HTTP/1.1\r\nhost: a\r\n\r\n"),
        field("a bare CR in a value", line, "x: a\rb"),
        field("a bare CR in a name", line, "x\ry: a"),
        field("a CR before the CRLF", line, "x: a\r"),
        field("a blank before the colon", name, "content-length : 5"),
        field("a tab before the colon", name, "content-length\t: 5"),
        field("no name", name, ": 5"),
        field("no colon", "RFC 9112 5, CVE-2019-20444", "content-length"),
        field("a NUL in a name", name, "content-\0length: 5"),
        field("a NUL behind a name", name, "content-length\0: 5"),
        field("a control character in a name", name, "content\x01length: 5"),
        field("a name that is no token", name, "content(length): 5"),
        field("a name beyond ASCII", name, "content-l\u{e9}ngth: 5"),
        field("a NUL in a value", value, "x: a\0b"),
        field("a control character in a value", value, "x: a\x01b"),
        field("a DEL in a value", value, "x: a\x7fb"),
        // Request lines.
        refused("a blank in the target", target, "GET /x /y HTTP/1.1\r\nhost: a\r\n\r\n"),
        refused(
            "two blanks before the target",
            "RFC 9112 3",
            "GET  /x HTTP/1.1\r\nhost: a\r\n\r\n",
        ),
        refused("a tab for a blank", "RFC 9112 3", "GET\t/x HTTP/1.1\r\nhost: a\r\n\r\n"),
        refused("a blank before the method", "RFC 9112 3", " GET /x HTTP/1.1\r\nhost: a\r\n\r\n"),
        refused("a NUL in the target", target, get("/x\0y")),
        refused("a DEL in the target", target, get("/x\x7fy")),
        refused("a bare CR in the target", target, get("/x\ry")),
        refused("a fragment in the target", target, get("/x#y")),
        refused("a fragment in absolute form", target, get("http://a/x#y")),
        refused("a target without a slash", target, get("x")),
        refused("a host for a target", "RFC 9112 3.2.3", get("a:80")),
        refused("an asterisk for a GET", "RFC 9112 3.2.4", get("*")),
        refused("a user in an absolute target", "RFC 9110 4.2.4", get("http://a@b/x")),
        refused("a scheme that is not HTTP's", "RFC 9110 4.2", get("ftp://a/x")),
        refused("an absolute target without a host", "RFC 9110 4.2.1", get("http:///x")),
        refused("CONNECT", "RFC 9110 9.3.6", "CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n")
            .with(405, "method_refused"),
        refused("a method that is no token", "RFC 9110 9.1", "G@T /x HTTP/1.1\r\nhost: a\r\n\r\n"),
        refused("HTTP/1.2", version, "GET /x HTTP/1.2\r\nhost: a\r\n\r\n"),
        refused("HTTP/2.0 in a head", version, "GET /x HTTP/2.0\r\nhost: a\r\n\r\n"),
        refused("HTTP/0.9 with a version", version, "GET /x HTTP/0.9\r\nhost: a\r\n\r\n"),
        refused("HTTP/0.9", version, "GET /x\r\nhost: a\r\n\r\n"),
        refused("HTTP/11", version, "GET /x HTTP/11\r\nhost: a\r\n\r\n"),
        refused("HTTP/1.10", version, "GET /x HTTP/1.10\r\nhost: a\r\n\r\n"),
        refused("http/1.1", version, "GET /x http/1.1\r\nhost: a\r\n\r\n"),
        refused("a blank behind the version", version, "GET /x HTTP/1.1 \r\nhost: a\r\n\r\n"),
        // Hosts.
        refused("no host", host, "GET /x HTTP/1.1\r\n\r\n"),
        refused("two hosts", host, "GET /x HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"),
        refused("the same host twice", host, "GET /x HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n"),
        refused("two hosts in HTTP/1.0", host, "GET /x HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n"),
        refused("an empty host", "RFC 9110 4.2.1", "GET /x HTTP/1.1\r\nhost:\r\n\r\n"),
        refused("a blank in a host", host, "GET /x HTTP/1.1\r\nhost: a b\r\n\r\n"),
        refused("a user in a host", "RFC 9110 4.2.4", "GET /x HTTP/1.1\r\nhost: a@b\r\n\r\n"),
        refused("a path in a host", host, "GET /x HTTP/1.1\r\nhost: a/b\r\n\r\n"),
        refused("a port that is no number", host, "GET /x HTTP/1.1\r\nhost: a:b\r\n\r\n"),
        refused("two ports", host, "GET /x HTTP/1.1\r\nhost: a:80:81\r\n\r\n"),
        refused("a folded second host", host, "GET /x HTTP/1.1\r\nhost: a\r\n host: b\r\n\r\n"),
        refused("an absolute target without Host", host, "GET http://a/x HTTP/1.1\r\n\r\n"),
        refused(
            "an absolute target and a broken Host",
            host,
            "GET http://a/x HTTP/1.1\r\nhost: b c\r\n\r\n",
        ),
        passed(
            "an absolute target outranks Host",
            "RFC 9112 3.2.2",
            "GET http://b/x?y HTTP/1.1\r\nhost: a\r\n\r\n",
            "GET /x?y HTTP/1.1 | host: b",
        ),
        passed(
            "an absolute target of OPTIONS without a path",
            "RFC 9112 3.2.4",
            "OPTIONS http://b HTTP/1.1\r\nhost: b\r\n\r\n",
            "OPTIONS * HTTP/1.1 | host: b",
        ),
        // Chunks.
        chunks("a chunk size with 0x", size, "0x1\r\nx\r\n"),
        chunks("a negative chunk size", size, "-1\r\nx\r\n"),
        chunks("a chunk size with a plus", size, "+1\r\nx\r\n"),
        chunks("a blank before a chunk size", size, " 1\r\nx\r\n"),
        chunks("a blank behind a chunk size", size, "1 \r\nx\r\n"),
        chunks("a chunk size of no digits", size, "\r\n"),
        chunks("a chunk size that is no number", size, "g\r\nx\r\n"),
        chunks(
            "a chunk size beyond 64 bits",
            "RFC 9112 7.1, CVE-2021-32714",
            "10000000000000001\r\nx\r\n",
        ),
        chunks("a chunk size of 17 digits", size, "00000000000000001\r\nx\r\n"),
        chunks("a chunk size and a bare LF", line, "1\nx\r\n"),
        chunks("a chunk size and a bare CR", line, "1\rx\r\n"),
        chunks("a chunk size and a NUL", size, "1\0\r\nx\r\n"),
        chunks("a chunk longer than its size", size, "1\r\nxx\r\n"),
        chunks("a chunk that ends in a bare LF", line, "1\r\nx\n"),
        chunks("a chunk that ends in two other bytes", "RFC 9112 7.1, CVE-2025-43859", "1\r\nxyz"),
        chunks(
            "TERM.EXT: a bare LF in an extension",
            "RFC 9112 7.1.1, CVE-2025-22871",
            "1;\nx\r\n",
        ),
        chunks("EXT.TERM: an extension that ends in LF", extension, "1;a\nx\r\n"),
        chunks("a bare CR in an extension", extension, "1;a\rb\r\nx\r\n"),
        chunks("an extension without a name", extension, "1;\r\nx\r\n"),
        chunks("an extension without a value", extension, "1;a=\r\nx\r\n"),
        chunks("an extension that is no token", extension, "1;a@\r\nx\r\n"),
        chunks("an extension with an open quote", extension, "1;a=\"b\r\nx\r\n"),
        chunks("an extension with a NUL in quotes", extension, "1;a=\"\0\"\r\nx\r\n"),
        chunks(
            "extensions of 20 KiB",
            "RFC 9112 7.1.1, CVE-2023-39326",
            &format!("1;{}\r\nx\r\n", "a".repeat(20_000)),
        ),
        passed(
            "extensions by the grammar stay here",
            extension,
            with(
                "POST",
                "transfer-encoding: chunked\r\n",
                "1 ; a = \"b;\\\"\";c\r\nx\r\n0;d\r\n\r\n",
            ),
            "POST /x HTTP/1.1 | host: a | transfer-encoding: chunked || x",
        ),
        chunks("a last chunk that ends in a bare LF", line, "1\r\nx\r\n0\n\r\n"),
        chunks("a bare LF for the last CRLF", line, "1\r\nx\r\n0\r\n\n"),
        chunks("a trailer that ends in a bare LF", line, "1\r\nx\r\n0\r\ny: z\n\r\n"),
        chunks("a trailer with a bare CR", line, "1\r\nx\r\n0\r\ny: a\rb\r\n\r\n"),
        chunks("a folded trailer", "RFC 9112 5.2", "1\r\nx\r\n0\r\ny: a\r\n b\r\n\r\n"),
        chunks("a trailer without a colon", name, "1\r\nx\r\n0\r\ny\r\n\r\n"),
        chunks("a trailer with a blank before the colon", name, "1\r\nx\r\n0\r\ny : z\r\n\r\n"),
        chunks("a trailer with a NUL", value, "1\r\nx\r\n0\r\ny: \0\r\n\r\n"),
        Row {
            reach: Reach::Part,
            ..refused(
                "no CRLF behind the last chunk",
                "RFC 9112 7.1",
                with("POST", "transfer-encoding: chunked\r\n", "1\r\nx\r\n0\r\n"),
            )
        }
        .with(408, "body_timeout")
        .harmless("it waits as well"),
        passed(
            "trailers that frame, route or tell on the client stay here",
            "RFC 9110 6.5.1",
            with(
                "POST",
                "transfer-encoding: chunked\r\nte: trailers\r\ntrailer: x-sum, host, content-length, x-forwarded-for\r\n",
                "1\r\nx\r\n0\r\nx-sum: 1\r\ncontent-length: 5\r\nhost: b\r\ntransfer-encoding: chunked\r\nx-forwarded-for: 9.9.9.9\r\n\r\n",
            ),
            "POST /x HTTP/1.1 | host: a | trailer: x-sum, host, content-length, x-forwarded-for | te: trailers | connection: te | transfer-encoding: chunked || x | x-sum: 1",
        ),
    ];
    rows.extend(fields());
    rows
}

/// Fields that mean one thing here and another there, and what comes behind a request.
fn fields() -> Vec<Row> {
    let hop = "RFC 9110 7.6.1";
    let good = "GET /x HTTP/1.1\r\nhost: a\r\n\r\n";
    let gets = |n: usize| vec!["GET /x HTTP/1.1 | host: a".to_owned(); n];
    let inner = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    vec![
        passed(
            "Connection names Host and Content-Length",
            hop,
            with(
                "POST",
                "connection: host, content-length, x-hop\r\ncontent-length: 1\r\nx-hop: 1\r\n",
                "x",
            ),
            "POST /x HTTP/1.1 | host: a | content-length: 1 || x",
        ),
        passed(
            "Connection names Transfer-Encoding",
            hop,
            with(
                "POST",
                "connection: transfer-encoding\r\ntransfer-encoding: chunked\r\n",
                "1\r\nx\r\n0\r\n\r\n",
            ),
            "POST /x HTTP/1.1 | host: a | transfer-encoding: chunked || x",
        ),
        passed(
            "fields of this hop",
            hop,
            with(
                "GET",
                "keep-alive: timeout=5\r\nproxy-connection: keep-alive\r\nte: gzip\r\n",
                "",
            ),
            "GET /x HTTP/1.1 | host: a",
        ),
        passed(
            "Upgrade: h2c",
            "RFC 9113 3.1",
            with(
                "GET",
                "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
                "",
            ),
            "GET /x HTTP/1.1 | host: a",
        ),
        passed(
            "Upgrade: H2C, in two lines and other letters",
            "RFC 9113 3.1, h2c Smuggling (2020)",
            with(
                "GET",
                "connection: upgrade\r\nconnection: http2-settings\r\nupgrade: H2C\r\nupgrade: h2\r\nhttp2-settings: AAMAAABk\r\n",
                "",
            ),
            "GET /x HTTP/1.1 | host: a",
        ),
        passed(
            "Upgrade: h2c that Connection does not name",
            "RFC 9110 7.8, h2c Smuggling (2020)",
            with("GET", "upgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n", ""),
            "GET /x HTTP/1.1 | host: a",
        ),
        passed(
            "Upgrade: h2c beside a body",
            "RFC 9113 3.1, h2c Smuggling (2020)",
            with(
                "POST",
                "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\ncontent-length: 1\r\n",
                "x",
            ),
            "POST /x HTTP/1.1 | host: a | content-length: 1 || x",
        ),
        passed(
            "Connection names everything that frames or routes, and close beside keep-alive",
            "RFC 9110 7.6.1, Hop-by-hop headers (2019)",
            with(
                "POST",
                "connection: keep-alive, host, content-length, transfer-encoding, via, forwarded, x-forwarded-for, te\r\ncontent-length: 1\r\n",
                "x",
            ),
            "POST /x HTTP/1.1 | host: a | content-length: 1 || x",
        ),
        passed(
            "h2c beside websocket",
            "RFC 9113 3.1",
            with("GET", "connection: upgrade\r\nupgrade: websocket, h2c\r\n", ""),
            "GET /x HTTP/1.1 | host: a",
        ),
        Row {
            answers: vec![200, 400],
            closed: true,
            word: Some("malformed"),
            reach: Reach::These(vec![
                "GET /x HTTP/1.1 | host: a | upgrade: websocket | connection: upgrade".to_owned(),
            ]),
            ..passed(
                "what follows an upgrade that was not granted is looked at",
                "RFC 9110 7.8",
                with(
                    "GET",
                    "connection: upgrade\r\nupgrade: websocket\r\n",
                    "GET /x HTTP/1.1\nhost: a\n\n",
                ),
                "",
            )
        },
        passed(
            "CL.0: a request in the body of a GET",
            "RFC 9110 9.3.1",
            with("GET", &format!("content-length: {}\r\n", inner.len()), inner),
            &format!("GET /x HTTP/1.1 | host: a | content-length: {} || {inner}", inner.len()),
        )
        .harmless("a length is a length: even it keeps to one that is clear"),
        passed(
            "TE.0: a request in the chunks of an OPTIONS",
            "RFC 9110 9.3.7",
            with(
                "OPTIONS",
                "transfer-encoding: chunked\r\n",
                &format!("{:x}\r\n{inner}\r\n0\r\n\r\n", inner.len()),
            ),
            &format!("OPTIONS /x HTTP/1.1 | host: a | transfer-encoding: chunked || {inner}"),
        )
        .harmless("chunks are chunks: even it keeps to some that are clear"),
        passed(
            "0.CL: an underscore for the dash of Content-Length",
            "limits.underscores, RFC 3875 4.1.18",
            with("POST", "content_length: 5\r\ncontent-length: 1\r\n", "x"),
            "POST /x HTTP/1.1 | host: a | content-length: 1 || x",
        ),
        passed(
            "underscores for the dashes of X-Forwarded-For",
            "limits.underscores, RFC 3875 4.1.18",
            with("GET", "x_forwarded_for: 9.9.9.9\r\n", ""),
            "GET /x HTTP/1.1 | host: a",
        ),
        refused(
            "an expectation that nobody knows",
            "RFC 9110 10.1.1",
            with("POST", "expect: y\r\ncontent-length: 1\r\n", "x"),
        )
        .with(417, "unknown_expectation"),
        refused(
            "an expectation beside 100-continue",
            "RFC 9110 10.1.1",
            with("POST", "expect: 100-continue, y\r\ncontent-length: 1\r\n", "x"),
        )
        .with(417, "unknown_expectation"),
        refused(
            "an obfuscated 100-continue",
            "RFC 9110 10.1.1",
            with("GET", "expect: y 100-continue\r\n", ""),
        )
        .with(417, "unknown_expectation"),
        refused(
            "two expectations",
            "RFC 9110 10.1.1",
            with(
                "POST",
                "expect: 100-continue\r\nexpect: 100-continue\r\ncontent-length: 1\r\n",
                "x",
            ),
        )
        .with(417, "unknown_expectation"),
        passed(
            "100-continue without a body",
            "RFC 9110 10.1.1",
            with("GET", "expect: 100-continue\r\n", ""),
            "GET /x HTTP/1.1 | host: a",
        ),
        Row {
            closed: true,
            ..passed(
                "100-continue in HTTP/1.0",
                "RFC 9110 10.1.1",
                "POST /x HTTP/1.0\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx",
                "POST /x HTTP/1.1 | host: a | content-length: 1 || x",
            )
        },
        // What comes behind.
        Row {
            answers: vec![200, 400],
            reach: Reach::These(gets(1)),
            ..refused(
                "nothing is read behind an error",
                "RFC 9112 9.3",
                format!("{good}GET /x HTTP/1.1\nhost: a\n\n{good}"),
            )
        },
        Row {
            answers: vec![200, 400],
            reach: Reach::These(gets(1)),
            ..refused(
                "nothing is read behind two framings",
                "RFC 9112 6.1",
                format!(
                    "{good}POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{good}"
                ),
            )
        },
        Row {
            answers: vec![200, 417],
            word: Some("unknown_expectation"),
            reach: Reach::These(gets(1)),
            ..refused(
                "nothing is read behind an answer to a body that was not",
                "RFC 9112 9.3",
                format!(
                    "{good}POST /x HTTP/1.1\r\nhost: a\r\nexpect: x\r\ncontent-length: {}\r\n\r\n{good}{good}",
                    good.len()
                ),
            )
        },
        Row {
            answers: vec![200, 200],
            reach: Reach::These(gets(2)),
            ..passed("two requests at once are two", "RFC 9112 9.3.2", good.repeat(2), "")
        }
        .harmless("there is nothing wrong with it"),
    ]
}

/// What a client sends over HTTP/2: the pseudo-fields too are as they stand here.
#[derive(Clone, Debug)]
pub(super) struct H2Row {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    pub(super) fields: Vec<(&'static str, &'static str)>,
    pub(super) data: Option<&'static str>,
    /// What comes before the fault may reach the node.
    pub(super) in_body: bool,
    /// `None`: refused.
    pub(super) passed: Option<&'static str>,
    pub(super) harmless: Harmless,
}

pub(super) fn h2_requests() -> Vec<H2Row> {
    let row = |name, why, fields: &[(&'static str, &'static str)]| H2Row {
        name,
        why,
        fields: [(":method", "GET"), (":scheme", "http"), (":path", "/x"), (":authority", "a")]
            .into_iter()
            .chain(fields.iter().copied())
            .collect(),
        data: None,
        in_body: false,
        passed: None,
        harmless: None,
    };
    let instead = |name, why, pseudo: (&'static str, &'static str)| {
        let mut row = row(name, why, &[]);
        row.fields.retain(|(name, _)| *name != pseudo.0);
        row.fields.insert(0, pseudo);
        row
    };
    let without = |name, why, pseudo: &'static str| {
        let mut row = row(name, why, &[]);
        row.fields.retain(|(name, _)| *name != pseudo);
        row
    };
    let (value, hop) = ("RFC 9113 8.2.1", "RFC 9113 8.2.2");
    vec![
        row(
            "H2.CL: a length that DATA goes beyond",
            "RFC 9113 8.1.1, CVE-2021-21295",
            &[("content-length", "1")],
        )
        .with("xGET /smuggled HTTP/1.1\r\n\r\n")
        .in_body(),
        row(
            "H2.CL: a length that DATA falls short of",
            "RFC 9113 8.1.1",
            &[("content-length", "9")],
        )
        .with("x")
        .in_body()
        .harmless("it waits for the rest"),
        row(
            "H2.CL: two lengths",
            "RFC 9110 8.6",
            &[("content-length", "1"), ("content-length", "2")],
        )
        .with("x"),
        row(
            "H2.CL: the same length twice",
            "RFC 9110 8.6",
            &[("content-length", "1"), ("content-length", "1")],
        )
        .with("x"),
        row("H2.CL: a list of lengths", "RFC 9110 8.6", &[("content-length", "1, 1")]).with("x"),
        row("H2.CL: a length with a plus", "RFC 9110 8.6", &[("content-length", "+1")]).with("x"),
        row("H2.TE: Transfer-Encoding", "RFC 9113 8.2.2", &[("transfer-encoding", "chunked")])
            .with("0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"),
        row("Connection", hop, &[("connection", "close")]),
        row("Upgrade", hop, &[("upgrade", "h2c")]),
        row("Keep-Alive", hop, &[("keep-alive", "1")]),
        row("Proxy-Connection", hop, &[("proxy-connection", "close")]),
        row("TE beyond trailers", hop, &[("te", "gzip")]),
        row("a CRLF in a value", value, &[("x", "y\r\nz: w")]),
        row("an LF in a value", value, &[("x", "y\nz: w")]),
        row("a CR in a value", value, &[("x", "y\rz")]),
        row("a NUL in a value", value, &[("x", "y\0z")]),
        row("a CRLF in a name", value, &[("x: y\r\nz", "w")]),
        row("a colon in a name", value, &[("x:y", "w")]),
        row("a blank in a name", value, &[("x y", "w")]),
        row("an uppercase name", value, &[("X-Y", "w")]),
        row("an empty name", value, &[("", "w")]),
        instead("a blank in :path", "RFC 9113 8.3.1", (":path", "/x HTTP/1.1\r\nz: w")),
        instead("a bare blank in :path", "RFC 9113 8.3.1", (":path", "/x y")),
        instead("an empty :path", "RFC 9113 8.3.1", (":path", "")),
        instead("a :path without a slash", "RFC 9113 8.3.1", (":path", "x")),
        instead("an asterisk for :path of a GET", "RFC 9113 8.3.1", (":path", "*")),
        instead("a fragment in :path stays here", "RFC 9113 8.3.1", (":path", "/x#y"))
            .passed("GET /x HTTP/1.1 | host: a"),
        instead("a CRLF in :method", "RFC 9113 8.3.1", (":method", "GET /y HTTP/1.1\r\n\r\nGET")),
        instead("a blank in :method", "RFC 9113 8.3.1, CVE-2021-33193", (":method", "GET /y")),
        instead("a CRLF in :authority", "RFC 9113 8.3.1", (":authority", "a\r\nz: w")),
        instead("a user in :authority", "RFC 9113 8.3.1", (":authority", "a@b")),
        instead("a path in :authority", "RFC 9113 8.3.1", (":authority", "a/b")),
        instead("a scheme that is not HTTP's", "RFC 9110 4.2", (":scheme", "ftp")),
        without("no :method", "RFC 9113 8.3.1", ":method"),
        without("no :path", "RFC 9113 8.3.1", ":path"),
        without("no :scheme", "RFC 9113 8.3.1", ":scheme"),
        without("neither :authority nor Host", "RFC 9113 8.3.1", ":authority"),
        row(":path twice", "RFC 9113 8.3", &[(":path", "/y")]),
        row(":method twice", "RFC 9113 8.3", &[(":method", "GET")]),
        row(":authority twice", "RFC 9113 8.3", &[(":authority", "b")]),
        row("a pseudo-field that does not exist", "RFC 9113 8.3", &[(":x", "y")]),
        row("a pseudo-field of answers", "RFC 9113 8.3", &[(":status", "200")]),
        row("a pseudo-field behind a field", "RFC 9113 8.3", &[("x", "y"), (":authority", "b")]),
        row("Host beside another :authority", "RFC 9113 8.3.1", &[("host", "b")]),
        row("two Hosts", "RFC 9113 8.3.1", &[("host", "a"), ("host", "a")]),
        instead("CONNECT", "RFC 9113 8.5", (":method", "CONNECT")),
        row("an expectation that nobody knows", "RFC 9110 10.1.1", &[("expect", "y")]),
        row(
            "underscores for dashes",
            "limits.underscores, RFC 3875 4.1.18",
            &[("x_real_ip", "9.9.9.9")],
        )
        .passed("GET /x HTTP/1.1 | host: a"),
        row(
            "crumbs of a cookie are one field",
            "RFC 9113 8.2.3",
            &[("cookie", "a=b"), ("cookie", "c=d")],
        )
        .passed("GET /x HTTP/1.1 | host: a | cookie: a=b; c=d"),
        row("a body with its length", "RFC 9113 8.1.1", &[("content-length", "1")])
            .with("x")
            .passed("GET /x HTTP/1.1 | host: a | content-length: 1 || x")
            .harmless("there is nothing wrong with it"),
    ]
}

impl H2Row {
    fn with(self, data: &'static str) -> Self {
        Self { data: Some(data), ..self }
    }

    fn in_body(self) -> Self {
        Self { in_body: true, ..self }
    }

    fn passed(self, passed: &'static str) -> Self {
        Self { passed: Some(passed), ..self }
    }

    fn harmless(self, why: &'static str) -> Self {
        Self { harmless: Some(why), ..self }
    }
}

/// How a client asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Ask {
    Get,
    Head,
    Post,
    Http10,
    Upgrade,
    H2,
}

/// What the client gets of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Gets {
    /// litegate's own answer.
    Refusal,
    /// This status, and no body.
    Bare(u16),
    /// This body, whole.
    Whole(&'static str),
    /// A body that does not look whole.
    Broken,
}

/// What a node answers. The next request must get the next answer, whatever this one was.
#[derive(Clone, Debug)]
pub(super) struct NodeRow {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    pub(super) ask: Ask,
    pub(super) script: Script,
    pub(super) gets: Gets,
    /// What must not be in the answer's head.
    pub(super) never: &'static str,
    pub(super) harmless: Harmless,
}

pub(super) fn answers() -> Vec<NodeRow> {
    let row = |name, why, bytes: &'static str, gets| NodeRow {
        name,
        why,
        ask: Ask::Get,
        script: Script { bytes: bytes.as_bytes(), ..Script::default() },
        gets,
        never: "never",
        harmless: None,
    };
    let bad = |name, why, bytes| row(name, why, bytes, Gets::Refusal);
    let cut = |name, why, bytes| {
        let mut row = row(name, why, bytes, Gets::Broken);
        row.script.closes = true;
        row
    };
    let framing = "RFC 9112 6.3";
    let (over, size) = ("RFC 9112 9.2", "RFC 9112 7.1");
    let bomb: &'static str = {
        let fields = "x: 1\r\n".repeat(200);
        format!("HTTP/1.1 200 OK\r\n{fields}content-length: 2\r\n\r\nok").leak()
    };
    let large: &'static str =
        format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 2\r\n\r\nok", "x".repeat(1_000_000))
            .leak();
    let hint = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
    vec![
        // Framing.
        bad("Content-Length and Transfer-Encoding", framing, "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        bad("Transfer-Encoding and Content-Length", framing, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        bad("two lengths that differ", framing, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok"),
        bad("two lengths that agree", framing, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok"),
        bad("a list of lengths", framing, "HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok"),
        bad("a length with a plus", framing, "HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok"),
        bad("a negative length", framing, "HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok"),
        bad("an unknown coding before chunked", "RFC 9112 6.1", "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        bad("chunked twice", "RFC 9112 7.1", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        bad("chunked in HTTP/1.0", "RFC 9112 6.1", "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        // Heads.
        bad("response splitting by a bare LF", "RFC 9112 2.2, CVE-2016-8743", "HTTP/1.1 200 OK\r\nlocation: /\nset-cookie: evil=1\r\ncontent-length: 2\r\n\r\nok"),
        bad("an obsolete fold", "RFC 9112 5.2", "HTTP/1.1 200 OK\r\nx: y\r\n z\r\ncontent-length: 2\r\n\r\nok"),
        bad("a blank before the colon", "RFC 9112 5.1", "HTTP/1.1 200 OK\r\nx : y\r\ncontent-length: 2\r\n\r\nok"),
        bad("a bare CR in a value", "RFC 9112 2.2", "HTTP/1.1 200 OK\r\nx: y\rz\r\ncontent-length: 2\r\n\r\nok"),
        bad("a NUL in a value", "RFC 9110 5.5", "HTTP/1.1 200 OK\r\nx: y\0z\r\ncontent-length: 2\r\n\r\nok"),
        bad("a status of two digits", "RFC 9112 4", "HTTP/1.1 20 OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("a status of four digits", "RFC 9112 4", "HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("a status that is no number", "RFC 9112 4", "HTTP/1.1 abc OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("a status below 100", "RFC 9110 15", "HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("another version", "RFC 9112 2.3", "HTTP/3.0 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("another protocol", "RFC 9112 4", "ICY 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("200 fields", "RFC 9110 5.4", bomb),
        bad("a head of 1 MB", "RFC 9110 5.4", large),
        bad("101 that nobody asked for", "RFC 9110 15.2.2", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
        bad("101 to what nobody asked for", "RFC 9110 7.8", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n").ask(Ask::Upgrade),
        bad("101 to nothing", "RFC 9110 7.8", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\r\n").ask(Ask::Upgrade),
        NodeRow { script: Script { bytes: hint.as_bytes(), times: 1000, closes: true, ..Script::default() }, ..bad("a thousand interim answers and no other", "RFC 9110 15.2", "") },
        NodeRow { script: Script { bytes: b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", times: 2, ..Script::default() }, ..bad("101 twice, that nobody asked for", "RFC 9110 15.2.2", "") },
        bad("101 behind a hint, that nobody asked for", "RFC 9110 15.2.2", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
        bad("an interim answer split by a bare LF", "RFC 9112 2.2", "HTTP/1.1 103 Early Hints\r\nlink: </a>\nset-cookie: evil=1\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        bad("an interim answer with an obsolete fold", "RFC 9112 5.2", "HTTP/1.1 103 Early Hints\r\nx: y\r\n z\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        row("an interim answer with a length", "RFC 9110 8.6, 15.2", "HTTP/1.1 103 Early Hints\r\ncontent-length: 42\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", Gets::Whole("ok")),
        row("100 that nobody asked for", "RFC 9110 15.2.1", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", Gets::Whole("ok")),
        row("an interim answer that nobody knows", "RFC 9110 15", "HTTP/1.1 199 What\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", Gets::Whole("ok")),
        // What comes behind an answer.
        row("a second answer behind the first", over, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison", Gets::Whole("ok")),
        row("bytes behind the last chunk", over, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison", Gets::Whole("ok")),
        row("a body of 204", "RFC 9110 15.3.5", "HTTP/1.1 204 No Content\r\ncontent-length: 44\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison", Gets::Bare(204)).never("content-length"),
        row("a body of 304", "RFC 9110 15.4.5", "HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison", Gets::Bare(304)),
        row("a body for HEAD", "RFC 9110 9.3.2", "HTTP/1.1 200 OK\r\ncontent-length: 44\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison", Gets::Bare(200)).ask(Ask::Head),
        row("chunks of 204", "RFC 9112 6.1, RFC 9110 15.3.5", "HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n6\r\npoison\r\n0\r\n\r\n", Gets::Bare(204)).never("transfer-encoding"),
        row("chunks of 304", "RFC 9112 6.1, RFC 9110 15.4.5", "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n6\r\npoison\r\n0\r\n\r\n", Gets::Bare(304)),
        row("chunks for HEAD", "RFC 9112 6.1, RFC 9110 9.3.2", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\npoison\r\n0\r\n\r\n", Gets::Bare(200)).ask(Ask::Head),
        NodeRow {
            script: Script {
                bytes: b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
                later: b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison",
                ..Script::default()
            },
            ..row("an answer before the request", over, "", Gets::Whole("ok"))
        },
        NodeRow {
            script: Script {
                bytes: b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
                later: b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison",
                early: true,
                ..Script::default()
            },
            ..row("CL.0: a node that takes a body for the next request", "RFC 9112 9.3", "", Gets::Whole("ok")).ask(Ask::Post)
        },
        row("trailers that frame or tell on", "RFC 9110 6.5.1", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: content-length, set-cookie\r\n\r\n2\r\nok\r\n0\r\ncontent-length: 9\r\nset-cookie: evil=1\r\n\r\n", Gets::Whole("ok")).never("evil")
            .harmless("it drops all trailers"),
        row("fields that are litegate's to say", "RFC 9110 7.6.1", "HTTP/1.1 200 OK\r\nconnection: x-hop\r\nx-hop: evil\r\nlitegate-token: evil\r\nfly-replay-cache: evil\r\ncontent-length: 2\r\n\r\nok", Gets::Whole("ok")).never("evil"),
        // Bodies that break off.
        cut("fewer bytes than its length", "RFC 9112 8", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok"),
        cut("no last chunk", "RFC 9112 8", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n"),
        cut("half a chunk", "RFC 9112 8", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nok"),
        cut("no CRLF behind the last chunk", "RFC 9112 8", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"),
        cut("a chunk size that is no number", size, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\ng\r\n\r\n0\r\n\r\n"),
        cut("a chunk size with 0x", size, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0x2\r\nok\r\n0\r\n\r\n"),
        cut("a chunk size beyond 64 bits", size, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n10000000000000002\r\nok\r\n0\r\n\r\n"),
        cut("a chunk longer than its size", size, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n1\r\nok\r\n0\r\n\r\n"),
        cut("a bare LF in a chunk extension", "RFC 9112 7.1.1", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n2;\nok\r\n0\r\n\r\n"),
        cut("a broken body for HTTP/1.0", "RFC 9112 8", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n").ask(Ask::Http10),
        cut("a broken body for HTTP/2", "RFC 9113 8.1", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n").ask(Ask::H2),
        cut("fewer bytes than its length for HTTP/2", "RFC 9113 8.1", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok").ask(Ask::H2),
    ]
}

impl NodeRow {
    fn ask(self, ask: Ask) -> Self {
        Self { ask, ..self }
    }

    fn never(self, never: &'static str) -> Self {
        Self { never, ..self }
    }

    fn harmless(self, why: &'static str) -> Self {
        Self { harmless: Some(why), ..self }
    }
}
