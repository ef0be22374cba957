//! `fly-replay` in every documented form.
//!
//! A node's answer may say "elsewhere": in a header, or in a JSON body of a type of its own. The
//! grammar is `reference/fly-replay.md` section 12, whose 169 vectors are this file's test. A
//! known key with a bad value is refused, never guessed: a wrong guess would send a request to
//! the wrong node. What is parsed here is still a wish: `next` resolves it to a member of the
//! cluster, or to nothing.

use std::{fmt::Write as _, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, uri::PathAndQuery};
use serde::Deserialize;

/// The response header.
pub const FLY_REPLAY: HeaderName = HeaderName::from_static("fly-replay");
/// Asks for the replay to be remembered: an optimisation, never a promise, and without use to a
/// proxy that knows the primary.
const FLY_REPLAY_CACHE: HeaderName = HeaderName::from_static("fly-replay-cache");
/// The media type of the JSON form.
pub const MEDIA_TYPE: &str = "application/vnd.fly.replay+json";
/// The longest header value.
pub const HEADER_BYTES: usize = 8192;
/// The longest JSON body.
pub const JSON_BYTES: usize = 65536;

/// What a node asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Replay {
    /// Regions, first preferred. Empty: not said.
    pub region: Vec<String>,
    /// That node and no other. Empty: the primary, unnamed (LiteFS under a static lease).
    pub instance: Option<String>,
    /// That node if it can be had.
    pub prefer_instance: Option<String>,
    /// Another app.
    pub app: Option<String>,
    /// Copied into `fly-replay-src`. May be a secret between apps: never logged.
    pub state: Option<String>,
    /// Not the node that answered.
    pub elsewhere: Option<bool>,
    /// How long to try to reach the target.
    pub timeout: Option<Duration>,
    /// What to do when it can't be reached.
    pub fallback: Option<Fallback>,
    /// Changes to the request (JSON form only). Applied to the replayed request alone.
    pub transform: Option<Transform>,
    /// Whether a replay cache was asked for: ignored, litegate knows the primary itself.
    pub cached: bool,
    /// Keys that nobody knows.
    pub ignored: Vec<String>,
}

/// `fallback`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fallback {
    /// Back to the sender, or nowhere.
    ForceSelf,
    /// The sender first, then any.
    PreferSelf,
}

/// `transform`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transform {
    /// Replaces path and query.
    pub path: Option<PathAndQuery>,
    /// Removed.
    pub delete_headers: Vec<HeaderName>,
    /// Set, in place of any of that name.
    pub set_headers: Vec<(HeaderName, HeaderValue)>,
}

/// Why an answer that says replay can't be followed. The words are those of the vectors.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ReplayError {
    /// Nothing but blanks.
    #[error("empty")]
    Empty,
    /// Over [`HEADER_BYTES`] or [`JSON_BYTES`].
    #[error("too_long")]
    TooLong,
    /// A control character other than TAB.
    #[error("control_char")]
    ControlChar,
    /// A byte above 0x7f in a header.
    #[error("non_ascii")]
    NonAscii,
    /// Header lines that differ.
    #[error("multiple_headers")]
    MultipleHeaders,
    /// A quote that does not end.
    #[error("unterminated_quote")]
    UnterminatedQuote,
    /// Something behind the closing quote.
    #[error("garbage_after_quote")]
    GarbageAfterQuote,
    /// `=value`
    #[error("empty_key")]
    EmptyKey,
    /// `key=` where that means nothing.
    #[error("empty_value")]
    EmptyValue,
    /// `key` where a value is needed.
    #[error("missing_value")]
    MissingValue,
    /// A known key with a value it can't have.
    #[error("bad_value")]
    BadValue,
    /// One key with two values.
    #[error("duplicate_key")]
    DuplicateKey,
    /// Keys that exclude each other.
    #[error("conflict")]
    Conflict,
    /// Nothing says where to.
    #[error("no_target")]
    NoTarget,
    /// Not one JSON object.
    #[error("bad_json")]
    BadJson,
    /// A `transform` that could do harm.
    #[error("bad_transform")]
    BadTransform,
    /// The JSON body is compressed.
    #[error("encoded_body")]
    EncodedBody,
    /// The answer to HEAD has no body to read JSON from.
    #[error("no_body")]
    NoBody,
}

/// Where in an answer the replay is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// It is none.
    None,
    /// In the header.
    Header,
    /// In the body.
    Json,
}

/// Whether it is the type of the JSON form.
pub(super) fn is_media_type(content_type: &[u8]) -> bool {
    let kind = content_type.split(|byte| *byte == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(MEDIA_TYPE.as_bytes())
}

/// Reads the header form.
///
/// # Errors
/// Why it can't be followed.
pub fn from_head(head: &HeaderMap) -> Result<Replay, ReplayError> {
    let replay = from_lines(head.get_all(&FLY_REPLAY).iter().map(HeaderValue::as_bytes))?;
    Ok(Replay { cached: head.contains_key(FLY_REPLAY_CACHE), ..replay })
}

/// Reads the JSON form; `encoded` if the body is, by `Content-Encoding`.
///
/// # Errors
/// Why it can't be followed.
pub fn from_json(body: &[u8], encoded: bool) -> Result<Replay, ReplayError> {
    if encoded {
        return Err(ReplayError::EncodedBody);
    }
    if body.len() > JSON_BYTES {
        return Err(ReplayError::TooLong);
    }
    json::parse(body)
}

/// Reads header lines.
fn from_lines<'l>(mut lines: impl Iterator<Item = &'l [u8]>) -> Result<Replay, ReplayError> {
    let first = lines.next().ok_or(ReplayError::Empty)?;
    if lines.any(|other| other != first) {
        return Err(ReplayError::MultipleHeaders);
    }
    if first.len() > HEADER_BYTES {
        return Err(ReplayError::TooLong);
    }
    if first.iter().any(|byte| (*byte < 0x20 && *byte != b'\t') || *byte == 0x7f) {
        return Err(ReplayError::ControlChar);
    }
    let line = std::str::from_utf8(first).map_err(|_| ReplayError::NonAscii)?;
    if !line.is_ascii() {
        return Err(ReplayError::NonAscii);
    }
    if line.trim_matches(BLANKS).is_empty() {
        return Err(ReplayError::Empty);
    }
    let mut reader = Reader::default();
    let mut rest = line;
    while let Some(part) = next_part(&mut rest)? {
        match part {
            Part::Word(word) => reader.word(word)?,
            Part::Pair(key, value) => reader.pair(&key.to_ascii_lowercase(), value)?,
        }
    }
    reader.finish()
}

const BLANKS: [char; 2] = [' ', '\t'];

enum Part<'l> {
    Word(&'l str),
    Pair(&'l str, String),
}

/// Cuts the next part off `rest`: up to a `;` outside of quotes. Empty parts are skipped.
fn next_part<'l>(rest: &mut &'l str) -> Result<Option<Part<'l>>, ReplayError> {
    loop {
        if rest.is_empty() {
            return Ok(None);
        }
        let end = rest.find([';', '=']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        let key = key.trim_matches(BLANKS);
        let Some(value) = after.strip_prefix('=') else {
            *rest = after.strip_prefix(';').unwrap_or(after);
            if key.is_empty() {
                continue;
            }
            return Ok(Some(Part::Word(key)));
        };
        if key.is_empty() {
            return Err(ReplayError::EmptyKey);
        }
        let value = value.trim_start_matches(BLANKS);
        if let Some(quoted) = value.strip_prefix('"') {
            let (value, after) = unquote(quoted)?;
            let after = after.trim_start_matches(BLANKS);
            *rest = match after.strip_prefix(';') {
                Some(next) => next,
                None if after.is_empty() => after,
                None => return Err(ReplayError::GarbageAfterQuote),
            };
            return Ok(Some(Part::Pair(key, value)));
        }
        let end = value.find(';').unwrap_or(value.len());
        let (value, after) = value.split_at(end);
        *rest = after.strip_prefix(';').unwrap_or(after);
        return Ok(Some(Part::Pair(key, value.trim_matches(BLANKS).to_owned())));
    }
}

/// Reads up to the closing quote; `\x` stands for `x`.
fn unquote(quoted: &str) -> Result<(String, &str), ReplayError> {
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Ok((value, quoted.get(at + 1..).unwrap_or_default())),
            '\\' => value.push(chars.next().ok_or(ReplayError::UnterminatedQuote)?.1),
            other => value.push(other),
        }
    }
    Err(ReplayError::UnterminatedQuote)
}

/// Gathers keys, of either form.
#[derive(Default)]
struct Reader {
    replay: Replay,
}

impl Reader {
    fn word(&mut self, word: &str) -> Result<(), ReplayError> {
        match &*word.to_ascii_lowercase() {
            "elsewhere" => set(&mut self.replay.elsewhere, true),
            "region" | "instance" | "prefer_instance" | "app" | "state" | "timeout"
            | "fallback" => Err(ReplayError::MissingValue),
            _ => {
                self.replay.ignored.push(word.to_owned());
                Ok(())
            }
        }
    }

    fn pair(&mut self, key: &str, value: String) -> Result<(), ReplayError> {
        let replay = &mut self.replay;
        match key {
            "region" => {
                let regions = regions(&value)?;
                if !replay.region.is_empty() && replay.region != regions {
                    return Err(ReplayError::DuplicateKey);
                }
                replay.region = regions;
                Ok(())
            }
            "instance" => {
                if !value.is_empty() {
                    check(&value, is_instance, 253)?;
                }
                set(&mut replay.instance, value)
            }
            "prefer_instance" => {
                check(&value, is_instance, 253)?;
                set(&mut replay.prefer_instance, value)
            }
            "app" => {
                check(&value, |b| b.is_ascii_alphanumeric() || b"._-".contains(&b), 63)?;
                set(&mut replay.app, value.to_ascii_lowercase())
            }
            "state" => set(&mut replay.state, value),
            "elsewhere" => {
                let elsewhere = match &*value.to_ascii_lowercase() {
                    "true" | "1" => true,
                    "false" | "0" => false,
                    _ => return Err(ReplayError::BadValue),
                };
                set(&mut replay.elsewhere, elsewhere)
            }
            "timeout" => set(&mut replay.timeout, timeout(&value)?),
            "fallback" => {
                let fallback = match &*value.to_ascii_lowercase() {
                    "force_self" => Fallback::ForceSelf,
                    "prefer_self" => Fallback::PreferSelf,
                    _ => return Err(ReplayError::BadValue),
                };
                set(&mut replay.fallback, fallback)
            }
            unknown => {
                replay.ignored.push(unknown.to_owned());
                Ok(())
            }
        }
    }

    fn finish(self) -> Result<Replay, ReplayError> {
        let replay = self.replay;
        if let (Some(one), Some(other)) = (&replay.instance, &replay.prefer_instance)
            && one != other
        {
            return Err(ReplayError::Conflict);
        }
        let has_target = !replay.region.is_empty()
            || replay.instance.is_some()
            || replay.prefer_instance.is_some()
            || replay.app.is_some()
            || replay.elsewhere == Some(true);
        if has_target { Ok(replay) } else { Err(ReplayError::NoTarget) }
    }
}

fn set<T: PartialEq>(slot: &mut Option<T>, value: T) -> Result<(), ReplayError> {
    match slot {
        Some(old) if *old != value => Err(ReplayError::DuplicateKey),
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

fn regions(list: &str) -> Result<Vec<String>, ReplayError> {
    let mut regions: Vec<String> = Vec::new();
    for region in list.split(',').map(|region| region.trim_matches(BLANKS)) {
        if region.is_empty() {
            continue;
        }
        let region = region.to_ascii_lowercase();
        let starts = region.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        check(&region, |b| b.is_ascii_alphanumeric() || b"_-".contains(&b), 32)?;
        if !starts {
            return Err(ReplayError::BadValue);
        }
        if !regions.contains(&region) {
            regions.push(region);
        }
    }
    if regions.is_empty() { Err(ReplayError::EmptyValue) } else { Ok(regions) }
}

fn is_instance(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._:[]-".contains(&byte)
}

fn check(value: &str, allowed: impl Fn(u8) -> bool, longest: usize) -> Result<(), ReplayError> {
    if value.is_empty() {
        Err(ReplayError::EmptyValue)
    } else if value.len() > longest || !value.bytes().all(allowed) {
        Err(ReplayError::BadValue)
    } else {
        Ok(())
    }
}

/// `10s`, `800ms`, `1.5s`, `1m`
fn timeout(text: &str) -> Result<Duration, ReplayError> {
    let unit_at = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let micros_per_unit = match unit {
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        _ => return Err(ReplayError::BadValue),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if (1..=3).contains(&fraction.len()) => (whole, fraction),
        Some(_) => return Err(ReplayError::BadValue),
        None => (number, ""),
    };
    if !(1..=9).contains(&whole.len()) || fraction.contains('.') {
        return Err(ReplayError::BadValue);
    }
    let digits = |text: &str| text.bytes().fold(0u64, |n, b| n * 10 + u64::from(b - b'0'));
    let thousandths = digits(&format!("{fraction:0<3}"));
    // At most 999,999,999 minutes: far from overflowing 64 bits of microseconds.
    let micros = digits(whole) * micros_per_unit + thousandths * micros_per_unit / 1000;
    if micros == 0 { Err(ReplayError::BadValue) } else { Ok(Duration::from_micros(micros)) }
}

/// The value of `fly-replay-src` for the request that is replayed because `sender` asked for it
/// `micros` after the Unix epoch. Blanks are not allowed and `state` comes last: fly-ruby finds
/// it by a pattern.
pub fn src(sender: &str, micros: u128, state: Option<&str>) -> HeaderValue {
    let mut src = format!("instance={};t={micros}", plain(sender));
    if let Some(state) = state.filter(|state| !state.is_empty()) {
        src.push_str(";state=");
        for byte in state.bytes() {
            match byte {
                b';' | b'"' | b'\\' | 0..=0x1f | 0x7f.. => {
                    let _ = write!(src, "%{byte:02X}");
                }
                byte => src.push(char::from(byte)),
            }
        }
    }
    to_value(&src)
}

/// The value of `fly-replay-failed` for a fallback: `target` could not be reached, as `sender`
/// had asked for.
pub fn failed(target: &str, sender: &str, reason: &str, elapsed: Duration) -> HeaderValue {
    to_value(&format!(
        "instance={};replay_source={};reason={reason};elapsed_ms={}",
        plain(target),
        plain(sender),
        elapsed.as_millis()
    ))
}

/// A name without anything that could end its field.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_graphic() && !matches!(c, ';' | '"' | '\\')).collect()
}

fn to_value(text: &str) -> HeaderValue {
    // Visible ASCII and blanks only, by construction.
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

mod json {
    //! The JSON form: the same fields, and `transform` and `cache`.

    use std::fmt;

    use serde::de::{self, IgnoredAny, MapAccess, Visitor};
    use serde_json::Value;

    use super::{
        Deserialize, HeaderName, HeaderValue, PathAndQuery, Reader, Replay, ReplayError, Transform,
        set,
    };

    /// An object as its pairs: repeated keys must be seen.
    struct Pairs(Vec<(String, Value)>);

    impl<'de> Deserialize<'de> for Pairs {
        fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visit;
            impl<'de> Visitor<'de> for Visit {
                type Value = Pairs;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                    let mut pairs = Vec::new();
                    while let Some(pair) = map.next_entry()? {
                        // No object of 64 KiB has more keys than a bound on its bytes allows.
                        pairs.push(pair);
                    }
                    Ok(Pairs(pairs))
                }
            }
            deserializer.deserialize_map(Visit)
        }
    }

    pub(super) fn parse(body: &[u8]) -> Result<Replay, ReplayError> {
        let Pairs(pairs) = serde_json::from_slice(body).map_err(|_| ReplayError::BadJson)?;
        let mut reader = Reader::default();
        for (key, value) in pairs {
            one(&mut reader, key, value)?;
        }
        reader.finish()
    }

    fn one(reader: &mut Reader, key: String, value: Value) -> Result<(), ReplayError> {
        match (&*key, value) {
            (_, Value::Null) => Ok(()),
            ("transform", value) => {
                let transform = transform(value)?;
                set(&mut reader.replay.transform, transform)
            }
            ("cache", Value::Object(_)) | ("allow_bypass", Value::Bool(_)) => {
                reader.replay.cached = true;
                Ok(())
            }
            ("cache" | "allow_bypass", _) => Err(ReplayError::BadValue),
            ("elsewhere", Value::Bool(elsewhere)) => set(&mut reader.replay.elsewhere, elsewhere),
            (
                "region" | "instance" | "prefer_instance" | "app" | "state" | "elsewhere"
                | "timeout" | "fallback",
                Value::String(text),
            ) => {
                if text.bytes().any(|byte| byte < 0x20 || byte == 0x7f) {
                    return Err(ReplayError::ControlChar);
                }
                reader.pair(&key, text)
            }
            (
                "region" | "instance" | "prefer_instance" | "app" | "state" | "elsewhere"
                | "timeout" | "fallback",
                _,
            ) => Err(ReplayError::BadValue),
            (_, _) => {
                reader.replay.ignored.push(key);
                Ok(())
            }
        }
    }

    #[derive(Deserialize)]
    struct Written {
        path: Option<String>,
        #[serde(default)]
        delete_headers: Vec<String>,
        #[serde(default)]
        set_headers: Vec<Field>,
        #[serde(flatten)]
        _rest: std::collections::BTreeMap<String, IgnoredAny>,
    }

    #[derive(Deserialize)]
    struct Field {
        name: String,
        value: String,
    }

    fn transform(value: Value) -> Result<Transform, ReplayError> {
        let written: Written =
            serde_json::from_value(value).map_err(|_| ReplayError::BadTransform)?;
        let path = match &written.path {
            // `//` would be read as a host by whoever takes it for a reference, and `#` is no
            // part of a target.
            Some(path)
                if !path.starts_with('/')
                    || path.starts_with("//")
                    || !path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') =>
            {
                return Err(ReplayError::BadTransform);
            }
            Some(path) => {
                Some(PathAndQuery::try_from(&**path).map_err(|_| ReplayError::BadTransform)?)
            }
            None => None,
        };
        let delete_headers = written.delete_headers.iter().map(|name| field(name));
        let set_headers = written.set_headers.iter().map(|Field { name, value }| {
            let value = HeaderValue::from_str(value).map_err(|_| ReplayError::BadTransform)?;
            Ok((field(name)?, value))
        });
        Ok(Transform {
            delete_headers: delete_headers.collect::<Result<_, _>>()?,
            set_headers: set_headers.collect::<Result<_, _>>()?,
            path,
        })
    }

    /// A field that an app may change: not one about the hop or the message's framing, and not
    /// one that only litegate sets. Without `Via` a loop would go unnoticed.
    fn field(name: &str) -> Result<HeaderName, ReplayError> {
        let name =
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| ReplayError::BadTransform)?;
        let of_the_message = matches!(
            name.as_str(),
            "connection"
                | "keep-alive"
                | "proxy-connection"
                | "proxy-authorization"
                | "http2-settings"
                | "via"
                | "te"
                | "trailer"
                | "transfer-encoding"
                | "upgrade"
                | "host"
                | "content-length"
                | "expect"
        );
        // No token, though the type takes it for one.
        let is_token = !name.as_str().contains('"');
        if of_the_message || !is_token || name.as_str().starts_with("fly-replay") {
            return Err(ReplayError::BadTransform);
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use http::header;
    use serde_json::{Map, Value, json};

    use super::{super::answer::Said, *};

    /// The text of a vector, generated where it says so.
    fn text(value: &Value) -> String {
        match value {
            Value::String(text) => text.clone(),
            Value::Object(object) => {
                let parts = object["repeat"].as_array().unwrap();
                let count = usize::try_from(parts[2].as_u64().unwrap()).unwrap();
                let part = |n: usize| parts[n].as_str().unwrap();
                format!("{}{}{}", part(0), part(1).repeat(count), part(3))
            }
            other => panic!("{other}"),
        }
    }

    /// What a vector's answer means, in the way that the data plane asks.
    fn parsed(input: &Value) -> Result<Option<Replay>, ReplayError> {
        let lines: Vec<String> = input["fly_replay"]
            .as_array()
            .map(|lines| lines.iter().map(text).collect())
            .unwrap_or_default();
        let lines = || lines.iter().map(String::as_bytes);
        let is_json =
            input["content_type"].as_str().is_some_and(|kind| is_media_type(kind.as_bytes()));
        let is_head = input["method"] == "HEAD";
        if is_json && !(is_head && lines().next().is_some()) {
            if is_head {
                return Err(ReplayError::NoBody);
            }
            let encoded = input["content_encoding"].is_string();
            return from_json(text(&input["body"]).as_bytes(), encoded).map(Some);
        }
        if lines().next().is_none() {
            return Ok(None);
        }
        from_lines(lines()).map(Some)
    }

    fn written(replay: &Replay, expected: &Value) -> Value {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        if !replay.region.is_empty() {
            put("region", json!(replay.region));
        }
        for (key, value) in [
            ("instance", &replay.instance),
            ("prefer_instance", &replay.prefer_instance),
            ("app", &replay.app),
            ("state", &replay.state),
        ] {
            if let Some(value) = value {
                put(key, json!(value));
            }
        }
        if let Some(elsewhere) = replay.elsewhere {
            put("elsewhere", json!(elsewhere));
        }
        if let Some(timeout) = replay.timeout {
            put("timeout_ms", json!(u64::try_from(timeout.as_millis()).unwrap()));
        }
        if let Some(fallback) = replay.fallback {
            let word = match fallback {
                Fallback::ForceSelf => "force_self",
                Fallback::PreferSelf => "prefer_self",
            };
            put("fallback", json!(word));
        }
        if let Some(transform) = &replay.transform {
            let mut t = Map::new();
            if let Some(path) = &transform.path {
                t.insert("path".into(), json!(path.as_str()));
            }
            if !transform.delete_headers.is_empty() {
                let names: Vec<_> =
                    transform.delete_headers.iter().map(HeaderName::as_str).collect();
                t.insert("delete_headers".into(), json!(names));
            }
            if !transform.set_headers.is_empty() {
                let fields: Vec<_> = transform
                    .set_headers
                    .iter()
                    .map(|(n, v)| json!({"name": n.as_str(), "value": v.to_str().unwrap()}))
                    .collect();
                t.insert("set_headers".into(), json!(fields));
            }
            put("transform", Value::Object(t));
        }
        // What is in the cache is not kept: that there was one is.
        if replay.cached {
            put("cache", expected["cache"].clone());
        }
        if !replay.ignored.is_empty() {
            put("ignored", json!(replay.ignored));
        }
        Value::Object(out)
    }

    /// Texts in an expectation may be generated too.
    fn expanded(value: &Value) -> Value {
        match value {
            Value::Object(object) if object.contains_key("repeat") => Value::String(text(value)),
            Value::Object(object) => {
                Value::Object(object.iter().map(|(k, v)| (k.clone(), expanded(v))).collect())
            }
            other => other.clone(),
        }
    }

    #[test]
    fn every_vector_means_what_it_says() {
        let file: Value =
            serde_json::from_str(include_str!("testdata/fly-replay-vectors.json")).unwrap();
        let vectors = file["vectors"].as_array().unwrap();
        assert_eq!(vectors.len(), 169);
        for vector in vectors {
            let (id, name) = (&vector["id"], &vector["name"]);
            let expect = &vector["expect"];
            match (parsed(&vector["input"]), expect.get("error")) {
                (Err(error), Some(want)) => assert_eq!(error.to_string(), *want, "{id} {name}"),
                (Err(error), None) => panic!("{id} {name}: {error}"),
                (Ok(found), Some(want)) => panic!("{id} {name}: {found:?} is not {want}"),
                (Ok(None), None) => assert!(expect["replay"].is_null(), "{id} {name}"),
                (Ok(Some(replay)), None) => {
                    let want = expanded(&expect["replay"]);
                    assert_eq!(written(&replay, &want), want, "{id} {name}");
                    let Some(state) = replay.state.filter(|state| !state.is_empty()) else {
                        continue;
                    };
                    let want = expect.get("src_state").map_or(state.clone(), text);
                    let value = src("a", 1, Some(&state));
                    let value = String::from_utf8(value.as_bytes().to_vec()).unwrap();
                    assert_eq!(value, format!("instance=a;t=1;state={want}"), "{id} {name}");
                }
            }
        }
    }

    #[test]
    fn an_answer_announces_its_form() {
        let mut head = HeaderMap::new();
        let form = |head: &HeaderMap, json| Said::of(head).form(head, json);
        assert_eq!(form(&head, true), Form::None);
        head.insert(header::CONTENT_TYPE, MEDIA_TYPE.parse().unwrap());
        assert_eq!(form(&head, true), Form::Json);
        // Where the JSON form is off, such an answer is refused rather than passed on.
        assert_eq!(form(&head, false), Form::Header);
        assert_eq!(from_head(&head), Err(ReplayError::Empty));
        head.insert(FLY_REPLAY, "instance=a".parse().unwrap());
        assert_eq!(from_head(&head).unwrap().instance.as_deref(), Some("a"));
        head.remove(header::CONTENT_TYPE);
        assert_eq!(form(&head, true), Form::Header);
        head.append("fly-replay-cache", "/a/*".parse().unwrap());
        head.remove(FLY_REPLAY);
        assert_eq!(form(&head, true), Form::None);
    }

    #[test]
    fn an_empty_state_is_left_out() {
        assert_eq!(src("abaci-app-0", 17, Some("")), "instance=abaci-app-0;t=17");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = from_lines([&bytes[..]].into_iter());
            let _ = from_json(&bytes, false);
        }

        #[test]
        fn quoting_and_unquoting_give_the_same(state in "[ -~]{0,40}") {
            let quoted = state.replace('\\', "\\\\").replace('"', "\\\"");
            let line = format!("region=iad;state=\"{quoted}\"");
            let replay = from_lines([line.as_bytes()].into_iter()).unwrap();
            proptest::prop_assert_eq!(replay.state, Some(state));
        }

        #[test]
        fn what_goes_to_the_app_is_one_visible_line(sender in "\\PC{0,40}", state in "\\PC{0,80}") {
            let value = src(&sender, 1, Some(&state));
            proptest::prop_assert!(value.to_str().is_ok());
            let fields = value.to_str().unwrap().split(';').count();
            proptest::prop_assert!(fields <= 3, "{:?}", value);
        }
    }
}
