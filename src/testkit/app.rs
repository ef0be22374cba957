//! The app behind each node's proxy.

use std::{
    fmt::Write as _,
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    Bug, World,
    state::{State, Write, http_date},
    wire::{Head, Wire},
};

/// How long LiteFS's cookie lives.
const COOKIE: Duration = Duration::from_mins(5);
/// What is said to a write where there is no primary.
const READONLY: &str = "attempt to write a readonly database";

/// An answer of the app, before anybody adds to it.
enum Said {
    Whole {
        status: String,
        fields: String,
        body: Vec<u8>,
    },
    /// It has written by itself. `None`: the connection is at its end.
    Itself(Option<()>),
}

impl Said {
    fn ok(fields: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::Whole { status: "200 OK".into(), fields: fields.into(), body: body.into() }
    }

    fn error(status: &str, body: &str) -> Self {
        Self::Whole { status: status.into(), fields: String::new(), body: body.into() }
    }
}

/// The app with nothing before it.
pub(super) async fn app(world: &World, node: usize, wire: &mut Wire, head: &Head) -> bool {
    forward(world, node, wire, head, false).await.is_some()
}

/// The app, and LiteFS's cookie after a write.
pub(super) async fn forward(
    world: &World,
    node: usize,
    wire: &mut Wire,
    head: &Head,
    cookie: bool,
) -> Option<()> {
    if let Some(counter) = world.served.get(node) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
    // An app replays what asks for it, once: `fly-replay-src` says that it did.
    if head.field("fly-replay-src").is_none() {
        if let Some(json) = head.field("x-replay-json") {
            let kind = "content-type: application/vnd.fly.replay+json\r\n";
            wire.body(head).await?;
            return wire.answer("307 Temporary Redirect", kind, json.as_bytes()).await;
        }
        if let Some(value) = head.field("x-replay") {
            wire.body(head).await?;
            let fields = format!("fly-replay: {value}\r\nfly-replay-cache: /*\r\n");
            return wire.answer("409 Conflict", &fields, b"elsewhere").await;
        }
    }
    match said(world, node, wire, head).await? {
        Said::Itself(goes_on) => goes_on,
        Said::Whole { status, mut fields, body } => {
            let txid = world.state().position(node, 0).txid;
            if cookie && txid > 0 {
                let expires = http_date(SystemTime::now() + COOKIE);
                let _ = write!(
                    fields,
                    "Set-Cookie: __txid={txid:016x}; Path=/; Expires={expires}; HttpOnly\r\n"
                );
            }
            let body = if head.method == "HEAD" { Vec::new() } else { body };
            wire.answer(&status, &fields, &body).await
        }
    }
}

async fn said(world: &World, node: usize, wire: &mut Wire, head: &Head) -> Option<Said> {
    let path = head.path().to_owned();
    let mut parts = path.split('/').skip(1);
    let (verb, argument) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    let number = argument.parse::<usize>().unwrap_or(0).min(64 << 20);
    let name = State::name(node);
    Some(match (verb, &*head.method) {
        ("kv", "GET" | "HEAD") => read(world, node, head, argument),
        ("kv", _) => write(world, node, wire, head, argument).await?,
        ("touch", "GET") => {
            let said = write(world, node, wire, head, argument).await?;
            with(said, "Litegate-Write: 1\r\n")
        }
        ("search", _) => {
            wire.body(head).await?;
            Said::ok("Litegate-Write: 0\r\n", json!({ "node": name, "found": 0 }).to_string())
        }
        ("echo", _) => {
            let body = wire.body(head).await?;
            let sum: u64 = body.iter().map(|byte| u64::from(*byte)).sum();
            let echo = json!({
                "node": name,
                "method": head.method,
                "target": head.target,
                "fields": head.fields,
                "length": body.len(),
                "sum": sum,
            });
            Said::ok("", echo.to_string())
        }
        // A role check, as Patroni's.
        ("primary", _) if world.state().is_primary(node) => Said::ok("", "primary"),
        ("primary", _) => Said::error("503 Service Unavailable", "replica"),
        ("whoami", _) => Said::ok("", name),
        ("bytes", _) => Said::ok("", vec![b'x'; number]),
        ("sleep", _) => {
            sleep(Duration::from_millis(number as u64)).await;
            Said::ok("", "slept")
        }
        ("status", _) => {
            wire.body(head).await?;
            Said::error(&format!("{argument} Whatever"), "so it is")
        }
        ("trailers", _) => Said::Itself(
            wire.write(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                  5\r\nhello\r\n0\r\nx-sum: 5\r\n\r\n",
            )
            .await,
        ),
        ("hints", _) => {
            wire.write(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n").await?;
            Said::ok("", "hinted")
        }
        ("upgrade", _) => {
            let protocol = head.field("upgrade").unwrap_or("echo");
            let switch = format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n"
            );
            wire.write(switch.as_bytes()).await?;
            let (mut read, mut write) = wire.stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
            Said::Itself(None)
        }
        ("fault", _) => Said::Itself(fault(wire, head, argument).await),
        _ => {
            wire.body(head).await?;
            Said::error("404 Not Found", "nothing here")
        }
    })
}

fn with(said: Said, more: &str) -> Said {
    match said {
        Said::Whole { status, fields, body } => Said::Whole { status, fields: fields + more, body },
        itself @ Said::Itself(_) => itself,
    }
}

/// Which database the request is about.
fn database(world: &World, head: &Head) -> usize {
    let named = head.query("db").unwrap_or("");
    world.options.databases.iter().position(|name| *name == named).unwrap_or(0)
}

fn read(world: &World, node: usize, head: &Head, key: &str) -> Said {
    let (database, name) = (database(world, head), State::name(node));
    let mut state = world.state();
    let body = if key.is_empty() {
        let keys = state.keys(node, database, head.query("prefix").unwrap_or(""));
        json!({ "node": name, "keys": keys })
    } else {
        let values = state.read(node, database, key, Instant::now());
        let values: Vec<&str> = values.iter().map(|value| &**value).collect();
        json!({ "node": name, "count": values.len(), "values": values })
    };
    Said::ok("content-type: application/json\r\n", body.to_string())
}

async fn write(
    world: &World,
    node: usize,
    wire: &mut Wire,
    head: &Head,
    key: &str,
) -> Option<Said> {
    let body = wire.body(head).await?;
    let pause = |name| {
        let millis = head.query(name).and_then(|millis| millis.parse().ok());
        sleep(Duration::from_millis(millis.unwrap_or(0)))
    };
    if head.query("wait").is_some() {
        pause("wait").await;
    }
    let write = Write { database: database(world, head), key, method: &head.method, body: &body };
    let (position, bug) = {
        let mut state = world.state();
        (state.write(node, &write, Instant::now()), state.bug)
    };
    if head.query("linger").is_some() {
        pause("linger").await;
    }
    let Some(position) = position else {
        return Some(Said::error("500 Internal Server Error", READONLY));
    };
    if bug == Some(Bug::Silent) {
        return Some(Said::ok("", ""));
    }
    let body = json!({ "node": State::name(node), "txid": position.txid }).to_string();
    let public = if head.query("public").is_some() { "cache-control: public\r\n" } else { "" };
    Some(Said::ok(&format!("content-type: application/json\r\n{public}"), body))
}

/// What goes wrong on purpose. Always ends the connection.
async fn fault(wire: &mut Wire, head: &Head, which: &str) -> Option<()> {
    match which {
        "reset" => {
            wire.body(head).await?;
        }
        "half" => {
            wire.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await?;
        }
        "chunk" => {
            wire.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nx")
                .await?;
        }
        "garbage" => {
            wire.body(head).await?;
            wire.write(b"what is this\r\n\r\n").await?;
        }
        "early" => {
            wire.answer("413 Content Too Large", "connection: close\r\n", b"too large").await?;
        }
        _ => {}
    }
    None
}
