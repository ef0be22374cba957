//! The words of a run as they stand in requests and answers. A value is written so that it can be
//! found in whatever the app makes of it, JSON, HTML or plain text, and so that two runs never
//! take each other's values for their own.

use std::fmt::Write as _;

use super::history::{Key, Value};

/// The mark of a run. Values look like `lg4f21ab09c3n127`.
#[derive(Clone, Debug)]
pub struct Words {
    run: String,
}

impl Words {
    /// For a run with this number.
    pub fn new(run: u32) -> Self {
        Self { run: format!("{run:08x}") }
    }

    /// The run's number as it stands in values.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The name of a key, made of letters, digits and `-`.
    pub fn key(&self, key: Key) -> String {
        format!("v{}-{key}", self.run)
    }

    /// A value.
    pub fn value(&self, value: Value) -> String {
        format!("lg{}{value}", self.run)
    }

    /// Every value of this run in a text, in the order in which they stand there.
    pub fn find(&self, text: &[u8]) -> Vec<Value> {
        let mark = format!("lg{}c", self.run);
        let mark = mark.as_bytes();
        let (mut found, mut rest) = (Vec::new(), text);
        while let Some(at) = rest.windows(mark.len()).position(|window| window == mark) {
            rest = rest.get(at + mark.len()..).unwrap_or_default();
            let (client, after) = number(rest);
            rest = after;
            if let (Some(client), Some(after)) = (client, rest.strip_prefix(b"n")) {
                let (number, after) = number(after);
                rest = after;
                found.extend(number.map(|number| Value { client, number }));
            }
        }
        found
    }
}

/// The digits at the start, as far as they make a number.
fn number(text: &[u8]) -> (Option<u32>, &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    (std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()), rest)
}

/// A request line of the app's with a place for the key: `PUT /kv/{key}`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Template {
    /// The method.
    pub method: http::Method,
    before: String,
    after: String,
}

impl Template {
    /// The path for a key.
    pub fn path(&self, key: &str) -> String {
        let mut path = self.before.clone();
        let _ = write!(path, "{key}{}", self.after);
        path
    }
}

impl std::str::FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write it like 'PUT /kv/{key}'";
        let (method, path) = text.split_once(' ').ok_or(format!("no path; {example}"))?;
        let method = method.parse().map_err(|_| format!("not a method: {method}; {example}"))?;
        let (before, after) = path.split_once("{key}").ok_or(format!("no {{key}}; {example}"))?;
        let is_path = path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_path {
            return Err(format!("not a path: {path}; {example}"));
        }
        Ok(Self { method, before: before.to_owned(), after: after.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_in_whatever_the_app_makes_of_them() {
        let words = Words::new(0x4f21);
        let (one, two) = (Value { client: 3, number: 127 }, Value { client: 10, number: 0 });
        assert_eq!(words.value(one), "lg00004f21c3n127");
        let found = |text: &str| words.find(text.as_bytes());
        let (a, b) = (words.value(one), words.value(two));
        assert_eq!(found(&format!(r#"{{"values":["{a}","{b}","{a}"]}}"#)), [one, two, one]);
        assert_eq!(found(&format!("<li>{a}</li>{b}")), [one, two]);
        assert_eq!(found(&a), [one]);
        let other = Words::new(1).value(one);
        for foreign in [&*other, "lg00004f21c3n", "lg00004f21c", "lg00004f21c99999999999n1", ""] {
            assert_eq!(found(foreign), [], "{foreign}");
        }
    }

    #[test]
    fn a_template_is_a_method_and_a_path_with_a_place_for_the_key() {
        let template: Template = "PUT /api/{key}?x=1".parse().expect("it is right");
        assert_eq!((template.method.as_str(), &*template.path("k")), ("PUT", "/api/k?x=1"));
        for wrong in
            ["", "PUT", "/kv/{key}", "PUT /kv", "PUT kv/{key}", "P(T /{key}", "GET /{key} x"]
        {
            assert!(wrong.parse::<Template>().is_err(), "{wrong}");
        }
    }
}
