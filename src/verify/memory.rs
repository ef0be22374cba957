//! What a client carries from answer to request: cookies, as a browser; or the header
//! `Litegate-Token`, as an API client. Pure.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue, header};

const TOKEN: HeaderName = HeaderName::from_static("litegate-token");
/// Cookies that one client keeps; more are not taken.
const COOKIES: usize = 50;
/// The longest cookie or token.
const LENGTH: usize = 4096;

/// What kind of client it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Carry {
    /// Every cookie, and nothing else.
    Cookies,
    /// `Litegate-Token`, and nothing else.
    Token,
    /// Nothing: such a client is promised nothing about its own writes.
    Nothing,
}

/// What one client carries.
#[derive(Clone, Debug)]
pub struct Memory {
    carry: Carry,
    cookies: BTreeMap<String, String>,
    token: Option<HeaderValue>,
}

impl Memory {
    /// Empty.
    pub fn new(carry: Carry) -> Self {
        Self { carry, cookies: BTreeMap::new(), token: None }
    }

    /// Takes from an answer.
    pub fn learn(&mut self, headers: &HeaderMap) {
        match self.carry {
            Carry::Cookies => {
                for cookie in headers.get_all(header::SET_COOKIE) {
                    if let Ok(cookie) = cookie.to_str() {
                        self.cookie(cookie);
                    }
                }
            }
            Carry::Token => {
                if let Some(token) = headers.get(TOKEN).filter(|token| token.len() <= LENGTH) {
                    self.token = Some(token.clone()).filter(|token| !token.is_empty());
                }
            }
            Carry::Nothing => {}
        }
    }

    /// Adds to a request.
    pub fn tell(&self, headers: &mut HeaderMap) {
        if !self.cookies.is_empty() {
            let pairs = self.cookies.iter().map(|(name, value)| format!("{name}={value}"));
            let line = pairs.collect::<Vec<_>>().join("; ");
            if let Ok(line) = HeaderValue::try_from(line) {
                headers.insert(header::COOKIE, line);
            }
        }
        if let Some(token) = &self.token {
            headers.insert(TOKEN, token.clone());
        }
    }

    /// One `Set-Cookie`. Domain and path are not looked at: all requests of a run go to one app.
    fn cookie(&mut self, line: &str) {
        let mut parts = line.split(';').map(str::trim);
        let Some((name, value)) = parts.next().and_then(|pair| pair.split_once('=')) else {
            return;
        };
        let is_over = parts.filter_map(|part| part.split_once('=')).any(|(attribute, value)| {
            let seconds = value.trim().parse::<i64>();
            attribute.eq_ignore_ascii_case("max-age") && seconds.is_ok_and(|seconds| seconds <= 0)
        });
        if value.is_empty() || is_over {
            self.cookies.remove(name);
        } else if line.len() <= LENGTH
            && (self.cookies.len() < COOKIES || self.cookies.contains_key(name))
        {
            self.cookies.insert(name.to_owned(), value.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(fields: &[(&'static str, &str)]) -> HeaderMap {
        let fields = fields.iter().map(|(name, value)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).expect("a value"))
        });
        fields.collect()
    }

    fn told(memory: &Memory) -> (Option<String>, Option<String>) {
        let mut headers = HeaderMap::new();
        memory.tell(&mut headers);
        let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        (text(header::COOKIE), text(TOKEN))
    }

    #[test]
    fn a_browser_carries_cookies_and_an_api_client_the_token() {
        let answer = answer(&[
            ("set-cookie", "__txid=0000000000000001; Path=/; HttpOnly"),
            ("litegate-token", "abc"),
        ]);
        for (carry, want) in [
            (Carry::Cookies, (Some("__txid=0000000000000001".to_owned()), None)),
            (Carry::Token, (None, Some("abc".to_owned()))),
            (Carry::Nothing, (None, None)),
        ] {
            let mut memory = Memory::new(carry);
            memory.learn(&answer);
            assert_eq!(told(&memory), want, "{carry:?}");
        }
    }

    #[test]
    fn cookies_are_replaced_and_taken_back() {
        let mut memory = Memory::new(Carry::Cookies);
        for (cookie, want) in [
            ("a=1", Some("a=1")),
            ("b=x=y; Path=/", Some("a=1; b=x=y")),
            ("a=2", Some("a=2; b=x=y")),
            ("a=; Path=/", Some("b=x=y")),
            ("b=z; Max-Age=0", None),
            ("no cookie", None),
        ] {
            memory.learn(&answer(&[("set-cookie", cookie)]));
            assert_eq!(told(&memory).0.as_deref(), want, "{cookie}");
        }
    }

    #[test]
    fn hostile_cookies_do_not_fill_memory() {
        let mut memory = Memory::new(Carry::Cookies);
        for n in 0..1000 {
            memory.learn(&answer(&[("set-cookie", &format!("c{n}=1"))]));
        }
        memory.learn(&answer(&[("set-cookie", &format!("long={}", "x".repeat(LENGTH)))]));
        assert_eq!(memory.cookies.len(), COOKIES);
    }
}
