//! The lease key in Consul: who holds it, and in what order its holders came.
//!
//! Asked by blocking queries as Consul documents them: with the `X-Consul-Index` of the last
//! answer, which is forgotten when it goes back, and never below 1. A missing key and an empty
//! value both mean that nobody holds the lease (`reference/litefs.md` section 4.2). Answers are
//! bounded; what can't be understood is no news, counted each time and logged once.

use std::{fmt::Write as _, net::IpAddr, sync::Arc, time::Duration};

use http::{HeaderValue, Request, StatusCode, header};
use serde::Deserialize;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::{
    call::{self, CallError},
    config::cluster::Consul,
    discovery::{Observer, dns},
    topology::{Holder, Saw, Source, Trouble},
};

/// How long Consul may keep a question for which there is no news; it adds up to a sixteenth.
const WAIT: Duration = Duration::from_secs(5);
/// How much longer than that an answer may take.
const SLACK: Duration = Duration::from_secs(2);
/// How long resolving the name and connecting may take, and a question that is not kept.
const PROMPT: Duration = Duration::from_secs(2);
/// Between two questions, whatever Consul answers.
const SPACING: Duration = Duration::from_millis(50);
/// The first pause after a failure; doubles up to [`LONGEST`].
const BACKOFF: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);
/// The largest answer: a lease's value is a name and a URL.
const LARGEST: usize = 64 << 10;
/// The longest name of a holder.
const NAME: usize = 260;

/// Asks for ever.
pub(in crate::discovery) async fn follow(consul: Consul, observer: Observer) {
    let mut follower = Follower::default();
    let mut pause = BACKOFF;
    let mut told = None;
    loop {
        let asked = Instant::now();
        let trouble = match ask(&consul, follower.index).await {
            Ok(answer) => match follower.take(&answer) {
                Some(saw) => {
                    observer.observe(saw, Source::Consul);
                    None
                }
                None => Some((Trouble::Malformed, "its key's ModifyIndex went back".to_owned())),
            },
            Err(error) => Some((trouble(&error), error.to_string())),
        };
        let Some((why, error)) = trouble else {
            if told.take().is_some() {
                tracing::info!(key = %consul.key, "Consul answers again");
            }
            pause = BACKOFF;
            sleep_until(asked + SPACING).await;
            continue;
        };
        if told.as_ref() != Some(&error) {
            tracing::warn!(host = %consul.host, key = %consul.key, %error, "no news from Consul");
            told = Some(error);
        }
        observer.observe(Saw::NoNews(why), Source::Consul);
        // The next answer is to come at once.
        follower.index = 0;
        sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
        pause = (pause * 2).min(LONGEST);
    }
}

fn trouble(error: &CallError) -> Trouble {
    match error {
        CallError::Io(_) | CallError::Tls(_) | CallError::Timeout | CallError::Early => {
            Trouble::Unreachable
        }
        // Without a leader Consul answers 500; before it, a proxy may answer for it.
        CallError::Status(status) if status.is_server_error() => Trouble::Unreachable,
        CallError::Http(error) if !error.is_parse() => Trouble::Unreachable,
        CallError::Http(_) | CallError::Status(_) | CallError::Strange(_) => Trouble::Malformed,
    }
}

/// One answer.
#[derive(Debug)]
struct Answer {
    /// `X-Consul-Index`
    index: u64,
    /// `ModifyIndex`. `None`: the key is missing.
    modified: Option<u64>,
    holder: Option<Holder>,
}

/// What is remembered from one answer to the next.
#[derive(Debug, Default)]
struct Follower {
    /// What to ask with. Zero: answer at once.
    index: u64,
    /// The last `X-Consul-Index`.
    last: u64,
    /// The last `ModifyIndex` that was believed.
    modified: u64,
    /// A lower one that was not.
    doubted: Option<u64>,
}

impl Follower {
    /// What an answer says. `None`: its key is older than what is known already, as a server that
    /// is cut off from the others might say. Said twice in a row, or with an index that went back
    /// too, it is Consul's history that went back.
    fn take(&mut self, answer: &Answer) -> Option<Saw> {
        let went_back = answer.index < self.last;
        self.last = answer.index;
        self.index = if went_back { 0 } else { answer.index.max(1) };
        let index = answer.modified.unwrap_or(answer.index);
        let reset = index < self.modified;
        if reset && !went_back && self.doubted != Some(index) {
            self.doubted = Some(index);
            return None;
        }
        self.doubted = None;
        self.modified = index;
        Some(Saw::Lease { holder: answer.holder.clone(), index, reset })
    }
}

async fn ask(consul: &Consul, index: u64) -> Result<Answer, CallError> {
    let limit = if index == 0 { PROMPT } else { WAIT + WAIT / 16 + SLACK };
    let call = async {
        let (response, _connection) = connect(consul, index).await?;
        let field = response.headers().get("x-consul-index");
        let index = field.and_then(|value| value.to_str().ok()?.parse().ok());
        let strange = || CallError::Strange("no X-Consul-Index: is this Consul?".into());
        let index = index.ok_or_else(strange)?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(Answer { index, modified: None, holder: None }),
            StatusCode::OK => {
                let body = call::read(response, LARGEST).await?;
                let (modified, holder) = parse(&body).map_err(CallError::Strange)?;
                Ok(Answer { index, modified: Some(modified), holder })
            }
            other => Err(CallError::Status(other)),
        }
    };
    timeout(limit, call).await.unwrap_or(Err(CallError::Timeout))
}

type Opened = (http::Response<hyper::body::Incoming>, call::Connection);

async fn connect(consul: &Consul, index: u64) -> Result<Opened, CallError> {
    let (host, port) = (&*consul.host, consul.port);
    let found: Vec<IpAddr> = if let Ok(ip) = host.parse() {
        vec![ip]
    } else {
        let found = timeout(PROMPT, dns::addresses(host)).await;
        found.map_err(|_| CallError::Timeout)??
    };
    let mut failure = CallError::Strange(format!("{host} has no address"));
    for ip in found {
        let host =
            if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let mut request = Request::get(target(consul, index)).header(header::HOST, host);
        if let Some(token) = &consul.token {
            // Checked when the configuration was read.
            let token = HeaderValue::from_str(token.expose());
            let mut token = token.map_err(|error| CallError::Strange(error.to_string()))?;
            token.set_sensitive(true);
            request = request.header("x-consul-token", token);
        }
        match call::send((ip, port).into(), request).await {
            Ok((response, connection)) if response.status() == StatusCode::FORBIDDEN => {
                drop(connection);
                let help = "403 Forbidden: the token needs `key_prefix … { policy = \"read\" }`";
                return Err(CallError::Strange(help.into()));
            }
            // Errors of Consul's own carry no index.
            Ok((response, _)) if response.status().is_server_error() => {
                return Err(CallError::Status(response.status()));
            }
            Ok(opened) => return Ok(opened),
            // Another address may do where this one can't be connected to.
            Err(error @ CallError::Io(_)) => failure = error,
            Err(error) => return Err(error),
        }
    }
    Err(failure)
}

fn target(consul: &Consul, index: u64) -> String {
    let mut target = String::from("/v1/kv/");
    escape(&mut target, &consul.key, true);
    if let Some(datacenter) = &consul.datacenter {
        target.push_str("?dc=");
        escape(&mut target, datacenter, false);
    }
    if index > 0 {
        let first = if consul.datacenter.is_some() { '&' } else { '?' };
        let _ = write!(target, "{first}index={index}&wait={}s", WAIT.as_secs());
    }
    target
}

/// Percent-encodes what is neither unreserved (RFC 3986 section 2.3) nor, in a path, a slash.
fn escape(target: &mut String, text: &str, is_path: bool) {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                target.push(byte.into());
            }
            b'/' if is_path => target.push('/'),
            other => {
                let _ = write!(target, "%{other:02X}");
            }
        }
    }
}

/// `ModifyIndex` and holder.
pub(crate) fn parse(body: &[u8]) -> Result<(u64, Option<Holder>), String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Pair {
        value: Option<String>,
        modify_index: u64,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Value {
        hostname: String,
        #[serde(default)]
        advertise_url: String,
    }
    let pairs: Vec<Pair> = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let [pair] = &pairs[..] else { return Err(format!("{} keys instead of one", pairs.len())) };
    let Some(value) = pair.value.as_ref().filter(|value| !value.is_empty()) else {
        return Ok((pair.modify_index, None));
    };
    let value = data_encoding::BASE64.decode(value.as_bytes());
    let value = value.map_err(|error| format!("a value that is not base64: {error}"))?;
    let value: Value =
        serde_json::from_slice(&value).map_err(|error| format!("not a lease's value: {error}"))?;
    let advertised = value.advertise_url.parse::<http::Uri>().ok();
    let advertised = advertised.and_then(|uri| Some(Arc::from(uri.authority()?.as_str())));
    if value.hostname.is_empty() && advertised.is_none() {
        return Err("a lease without hostname and advertise-url".into());
    }
    if value.hostname.len() > NAME || value.hostname.chars().any(char::is_control) {
        return Err("a hostname that is none".into());
    }
    Ok((pair.modify_index, Some(Holder { name: value.hostname.into(), advertised })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(value: &str, modified: u64) -> String {
        let value = data_encoding::BASE64.encode(value.as_bytes());
        format!(
            r#"[{{"LockIndex":1,"Key":"litefs/abaci","Flags":0,"Value":"{value}","Session":"x","CreateIndex":1,"ModifyIndex":{modified}}}]"#
        )
    }

    #[test]
    fn a_lease_names_its_holder() {
        let value = r#"{"hostname":"abaci-app-0","advertise-url":"http://10.0.0.1:20202"}"#;
        let (index, holder) = parse(pair(value, 7).as_bytes()).unwrap();
        let want = Holder { name: "abaci-app-0".into(), advertised: Some("10.0.0.1:20202".into()) };
        assert_eq!((index, holder), (7, Some(want)));
        for empty in [r#""""#, "null"] {
            let body = format!(r#"[{{"Value":{empty},"ModifyIndex":8}}]"#);
            assert_eq!(parse(body.as_bytes()).unwrap(), (8, None));
        }
    }

    #[test]
    fn what_is_no_lease_is_refused() {
        let long = format!(r#"{{"hostname":"{}"}}"#, "x".repeat(1000));
        for body in [
            String::new(),
            "null".into(),
            "[]".into(),
            "{}".into(),
            "[{}]".into(),
            r#"[{"Value":"bjE=","ModifyIndex":"7"}]"#.into(),
            r#"[{"Value":"bjE=","ModifyIndex":-7}]"#.into(),
            r#"[{"Value":"!","ModifyIndex":7}]"#.into(),
            pair("n1", 7),
            pair("[]", 7),
            pair(r#"{"hostname":""}"#, 7),
            pair(r#"{"hostname":"a\nb"}"#, 7),
            pair(&long, 7),
        ] {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn indices_go_back_only_with_consul() {
        let mut follower = Follower::default();
        let mut take = |index, modified| {
            let saw = follower.take(&Answer { index, modified, holder: None });
            let saw = saw.map(|saw| match saw {
                Saw::Lease { index, reset, .. } => (index, reset),
                other => panic!("{other:?}"),
            });
            (saw, follower.index)
        };
        assert_eq!(take(50, Some(40)), (Some((40, false)), 50));
        // The same again after a wait that nothing happened in.
        assert_eq!(take(50, Some(40)), (Some((40, false)), 50));
        // A missing key is as new as the answer.
        assert_eq!(take(60, None), (Some((60, false)), 60));
        // A server that lags: doubted, then believed.
        assert_eq!(take(61, Some(55)).0, None);
        assert_eq!(take(62, Some(63)), (Some((63, false)), 62));
        assert_eq!(take(63, Some(50)).0, None);
        assert_eq!(take(63, Some(50)).0, Some((50, true)));
        // A snapshot was restored: ask without an index.
        assert_eq!(take(9, Some(8)), (Some((8, true)), 0));
        // Zero would make every question an immediate one.
        assert_eq!(take(0, Some(8)).1, 0);
        assert_eq!(take(0, Some(8)).1, 1);
    }

    #[test]
    fn keys_are_written_as_a_path() {
        let mut consul = Consul {
            host: "127.0.0.1".into(),
            port: 8500,
            key: "litefs/a b?".into(),
            token: None,
            datacenter: None,
        };
        assert_eq!(target(&consul, 0), "/v1/kv/litefs/a%20b%3F");
        assert_eq!(target(&consul, 5), "/v1/kv/litefs/a%20b%3F?index=5&wait=5s");
        consul.datacenter = Some("dc/1".into());
        assert_eq!(target(&consul, 5), "/v1/kv/litefs/a%20b%3F?dc=dc%2F1&index=5&wait=5s");
    }

    proptest::proptest! {
        #[test]
        fn no_answer_is_too_strange(body in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = parse(&body);
        }
    }
}
