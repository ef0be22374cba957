//! Clients that do nothing wrong, on every protocol at once, until they are told to pause.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ::http::Response;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    judge::{Asked, Class, End, Judge},
    relay::{MARK, POISON},
    wire::{Body, Doors, PATIENCE, Via, Wire, bytes, node, nothing},
};

/// Whether clients go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    Run,
    /// They finish what they are at, and leave.
    Pause,
}

/// What every client has.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) judge: Arc<Judge>,
    pub(crate) doors: Doors,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) active: Arc<AtomicUsize>,
    pub(crate) number: usize,
    pub(crate) seed: u64,
    pub(crate) round: usize,
}

/// Counts as long as it lives.
struct Active(Arc<AtomicUsize>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Client {
    pub(crate) fn goes_on(&self) -> bool {
        *self.phase.borrow() == Phase::Run
    }

    /// A pause of about so many milliseconds, or until there is nothing more to do.
    pub(crate) async fn think(&self, rng: &mut fastrand::Rng, ms: u64) {
        let mut phase = self.phase.clone();
        let pause = Duration::from_millis(rng.u64(ms / 2..=ms * 3 / 2));
        let _ = timeout(pause, phase.wait_for(|phase| *phase != Phase::Run)).await;
    }

    pub(crate) fn rng(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed ^ (self.number as u64) << 32 ^ self.round as u64)
    }

    /// Starts it; it counts as active until it has left.
    pub(crate) fn spawn<F>(&self, number: usize, run: impl FnOnce(Self) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.active.fetch_add(1, Ordering::AcqRel);
        let active = Active(Arc::clone(&self.active));
        let running = run(Self { number, ..self.clone() });
        tokio::spawn(async move {
            let _active = active;
            running.await;
        });
    }

    pub(crate) fn asked(&self, protocol: &'static str, class: Class, what: String) -> Asked {
        let now = Instant::now();
        Asked { protocol, class, what, node: None, began: now, ended: now }
    }

    pub(crate) fn say(&self, mut asked: Asked, end: End) {
        asked.ended = Instant::now();
        self.judge.say(asked, end);
    }
}

/// Starts all of them.
pub(crate) fn start(client: &Client) {
    let mut number = 0;
    let mut next = || {
        number += 1;
        number
    };
    for via in Via::ALL {
        for _ in 0..2 {
            client.spawn(next(), move |client| session(client, via));
        }
        client.spawn(next(), move |client| reader(client, via));
        client.spawn(next(), move |client| downloads(client, via, via.is_h2()));
        client.spawn(next(), move |client| uploads(client, via));
        client.spawn(next(), move |client| events(client, via));
        client.spawn(next(), move |client| crate::sockets::run(client, via, via.is_tls()));
    }
    client.spawn(next(), |client| crate::rpc::calls(client, Via::H2));
    client.spawn(next(), |client| crate::rpc::streams(client, Via::H2Tls));
    client.spawn(next(), |client| crate::rpc::pings(client, Via::H2));
    for _ in 0..3 {
        client.spawn(next(), crate::abuse::run);
    }
}

fn name(via: Via, [h1, h1_tls, h2, h2_tls]: [&'static str; 4]) -> &'static str {
    match via {
        Via::H1 => h1,
        Via::H1Tls => h1_tls,
        Via::H2 => h2,
        Via::H2Tls => h2_tls,
    }
}

/// Carries what it is given, as a browser (`cookie`) or as an API client does.
struct Memory {
    cookies: bool,
    kept: Vec<(String, String)>,
}

impl Memory {
    fn field(&self) -> Option<(&'static str, String)> {
        if self.kept.is_empty() {
            return None;
        }
        if !self.cookies {
            return self.kept.last().map(|(_, value)| ("litegate-token", value.clone()));
        }
        let pairs: Vec<String> =
            self.kept.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Some(("cookie", pairs.join("; ")))
    }

    fn learn(&mut self, head: &::http::HeaderMap) {
        if !self.cookies {
            if let Some(token) = head.get("litegate-token").and_then(|value| value.to_str().ok()) {
                self.kept = vec![(String::new(), token.to_owned())];
            }
            return;
        }
        for cookie in head.get_all("set-cookie").iter().filter_map(|value| value.to_str().ok()) {
            let pair = cookie.split(';').next().unwrap_or_default();
            if let Some((name, value)) = pair.split_once('=') {
                self.kept.retain(|(known, _)| known != name);
                self.kept.push((name.to_owned(), value.to_owned()));
            }
        }
    }
}

/// Writes, and reads what it has written, for ever.
async fn session(client: Client, via: Via) {
    let protocol = name(via, ["h1", "h1 tls", "h2c", "h2 tls"]);
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    let mut memory = Memory { cookies: client.number.is_multiple_of(2), kept: Vec::new() };
    // Its writes that it has to see.
    let mut own: Vec<String> = Vec::new();
    for n in 0.. {
        if !client.goes_on() {
            return;
        }
        let id = format!("s{}-{}-{n}", client.round, client.number);
        let size = rng.usize(0..20_000);
        let body = pattern(0, size);
        let sum = format!("{:016x}", fnv(FNV, &body));
        let target = format!("/w/{id}?linger={}ms", rng.u8(0..8));
        let carried = memory.field();
        let fields: Vec<_> = carried.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut asked = client.asked(protocol, Class::Write, format!("POST {id}"));
        let answer = wire.ask(&mut asked, "POST", &target, &fields, bytes(body)).await;
        let end = match answer {
            Ok(answer) => {
                memory.learn(&answer.head);
                if answer.head.contains_key("litegate-write-lost") {
                    client.judge.told_lost();
                    own.clear();
                }
                let end = answer.end(201);
                if end == End::Fine {
                    client
                        .judge
                        .acknowledged(id.clone(), asked.node.as_deref().unwrap_or_default());
                    own.push(id.clone());
                    let row: serde_json::Value =
                        serde_json::from_slice(&answer.body).unwrap_or_default();
                    if row["id"] != *id || row["bytes"] != size || row["sum"] != *sum {
                        End::Wrong(format!("not this write's answer: {row}"))
                    } else {
                        end
                    }
                } else {
                    let outcome = answer.field("litegate-write-outcome");
                    client.judge.refused(id.clone(), outcome == Some("not-committed"));
                    end
                }
            }
            Err(end) => {
                client.judge.refused(id.clone(), false);
                end
            }
        };
        client.say(asked, end);
        // The last one, and an older one: what was seen once stays.
        let older = if own.is_empty() { 0 } else { rng.usize(0..own.len()) };
        for at in [own.len().wrapping_sub(1), older] {
            let Some(id) = own.get(at).cloned() else { continue };
            let carried = memory.field();
            let fields: Vec<_> =
                carried.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let target = format!("/w/{id}");
            let mut asked = client.asked(protocol, Class::OwnRead, format!("GET {id}"));
            let answer = wire.ask(&mut asked, "GET", &target, &fields, nothing()).await;
            let end = match answer {
                Ok(answer) => {
                    memory.learn(&answer.head);
                    if answer.head.contains_key("litegate-write-lost") {
                        client.judge.told_lost();
                        own.clear();
                    }
                    let end = answer.end(200);
                    let rows: serde_json::Value =
                        serde_json::from_slice(&answer.body).unwrap_or_default();
                    let count = rows.as_array().map_or(0, Vec::len);
                    if end == End::Fine && !own.is_empty() && count != 1 {
                        let carried = &carried;
                        End::Wrong(format!(
                            "its own write is there {count} times: {carried:?} {answer:?}"
                        ))
                    } else {
                        end
                    }
                }
                Err(end) => end,
            };
            client.say(asked, end);
        }
        if own.len() > 200 {
            own.drain(..100);
        }
        client.think(&mut rng, 120).await;
    }
}

/// Reads as one who carries nothing.
async fn reader(client: Client, via: Via) {
    let protocol = name(via, ["h1 reads", "h1 tls reads", "h2c reads", "h2 tls reads"]);
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    while client.goes_on() {
        let target = format!("/whoami?n={}", rng.u32(..));
        let nonce = format!("{:x}", rng.u64(..));
        let mut asked = client.asked(protocol, Class::Read, "GET /whoami".to_owned());
        let answer =
            wire.ask(&mut asked, "GET", &target, &[("soak-nonce", &nonce)], nothing()).await;
        let end = match answer {
            Ok(answer) => {
                let end = answer.end(200);
                let seen: serde_json::Value =
                    serde_json::from_slice(&answer.body).unwrap_or_default();
                if String::from_utf8_lossy(&answer.body).contains(POISON) {
                    End::Wrong("somebody else's answer".to_owned())
                } else if end == End::Fine && seen["header"]["Soak-Nonce"][0] != *nonce {
                    End::Wrong(format!("another request's answer: {seen}"))
                } else {
                    end
                }
            }
            Err(end) => end,
        };
        client.say(asked, end);
        client.think(&mut rng, 40).await;
    }
}

/// Byte for byte, at once or as slowly as somebody on a train.
async fn downloads(client: Client, via: Via, slow: bool) {
    let protocol =
        name(via, ["h1 download", "h1 tls download", "h2c slow reader", "h2 tls slow reader"]);
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    while client.goes_on() {
        let size = rng.usize(0..3 << 20);
        let mut asked = client.asked(protocol, Class::Read, format!("GET {size} bytes"));
        let target = format!("/bytes/{size}");
        let end = match wire.send("GET", "app.test", &target, &[], nothing()).await {
            Ok(response) => {
                asked.node = node(response.headers());
                let end = download(response, size, slow).await;
                if end != End::Fine {
                    wire.broke();
                }
                end
            }
            Err(end) => end,
        };
        client.say(asked, end);
        client.think(&mut rng, 300).await;
    }
}

async fn download(response: Response<Incoming>, size: usize, slow: bool) -> End {
    let status = response.status().as_u16();
    let is_marked = response.headers().contains_key(MARK);
    let mut body = response.into_body();
    let mut at = 0;
    let mut first = Vec::new();
    loop {
        match timeout(PATIENCE, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                let Ok(data) = frame.into_data() else { continue };
                if status != 200 {
                    first.extend_from_slice(&data);
                } else if *data != *pattern(at, data.len()) {
                    return End::Wrong(format!("other bytes after {at}"));
                }
                at += data.len();
                if slow {
                    sleep(Duration::from_micros(data.len() as u64 / 2)).await;
                }
            }
            Ok(Some(Err(error))) => return End::Cut(format!("after {at} bytes: {error:?}")),
            Ok(None) if status != 200 => return End::Refused(status, crate::wire::word(&first)),
            Ok(None) if is_marked => return End::Deceived,
            Ok(None) if at == size => return End::Fine,
            Ok(None) => return End::Wrong(format!("it looks complete after {at} of {size} bytes")),
            Err(_) => return End::Wrong("it never ended".to_owned()),
        }
    }
}

/// More than litegate keeps of a body, in pieces; the app's sum has to be ours.
async fn uploads(client: Client, via: Via) {
    let protocol = name(via, ["h1 upload", "h1 tls upload", "h2c upload", "h2 tls upload"]);
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    for n in 0.. {
        if !client.goes_on() {
            return;
        }
        let size = rng.usize(1..3 << 20);
        let id = format!("u{}-{}-{n}", client.round, client.number);
        let mut sum = FNV;
        for at in (0..size).step_by(PIECE) {
            sum = fnv(sum, &pattern(at, PIECE.min(size - at)));
        }
        let mut asked = client.asked(protocol, Class::Upload, format!("PUT {id} of {size} bytes"));
        let target = format!("/w/{id}");
        let slow = rng.bool();
        let answer = wire.ask(&mut asked, "PUT", &target, &[], upload(size, slow)).await;
        let end = match answer {
            Ok(answer) => {
                let end = answer.end(201);
                if end == End::Fine {
                    client
                        .judge
                        .acknowledged(id.clone(), asked.node.as_deref().unwrap_or_default());
                    let row: serde_json::Value =
                        serde_json::from_slice(&answer.body).unwrap_or_default();
                    if row["bytes"] != size || row["sum"] != format!("{sum:016x}") {
                        End::Wrong(format!("it came otherwise than it went: {row}"))
                    } else {
                        end
                    }
                } else {
                    let outcome = answer.field("litegate-write-outcome");
                    client.judge.refused(id.clone(), outcome == Some("not-committed"));
                    // A body that is not taken any more may go unread.
                    wire.broke();
                    end
                }
            }
            Err(end) => {
                client.judge.refused(id.clone(), false);
                end
            }
        };
        client.say(asked, end);
        client.think(&mut rng, 700).await;
    }
}

fn upload(size: usize, slow: bool) -> Body {
    let pieces = stream::unfold(0, move |at| async move {
        if at >= size {
            return None;
        }
        if slow {
            sleep(Duration::from_millis(15)).await;
        }
        let piece = pattern(at, PIECE.min(size - at));
        let next = at + piece.len();
        Some((Ok(Frame::data(Bytes::from(piece))), next))
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// Every event, in order.
async fn events(client: Client, via: Via) {
    let protocol = name(via, ["h1 sse", "h1 tls sse", "h2c sse", "h2 tls sse"]);
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    while client.goes_on() {
        let n = rng.usize(1..80);
        let mut asked = client.asked(protocol, Class::Read, format!("{n} events"));
        let target = format!("/ticks?n={n}&every=50ms");
        let end = match wire.ask(&mut asked, "GET", &target, &[], nothing()).await {
            Ok(answer) => {
                let tick = |i| format!("id: {i}\ndata: tick {i}\n\n");
                let all = (0..n).map(tick).collect::<Vec<_>>().concat();
                let end = answer.end(200);
                if end == End::Fine && answer.body != all {
                    End::Wrong(format!("not the {n} events: {:?}", answer.body))
                } else {
                    end
                }
            }
            Err(end) => end,
        };
        client.say(asked, end);
        client.think(&mut rng, 100).await;
    }
}

const PIECE: usize = 32 * 1024;

/// What the app's `/bytes/` has at this place.
pub(crate) fn pattern(at: usize, length: usize) -> Vec<u8> {
    (at..at + length).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

const FNV: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, as the app computes it.
fn fnv(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
