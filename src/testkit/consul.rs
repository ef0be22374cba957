//! One key of a fake Consul, with blocking queries, that can misbehave.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::wire::{Head, Wire};

/// How it answers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Behaviour {
    /// As Consul does.
    #[default]
    Right,
    /// Accepts and says nothing.
    Mute,
    /// Closes connections at once.
    Gone,
    /// 500, as without a leader.
    Leaderless,
    /// 403, as to a token that may not.
    Forbidden,
    /// 200 with this body and an index.
    Body(String),
    /// The right answer, without `X-Consul-Index`.
    NoIndex,
    /// A body that never ends.
    Endless,
}

/// A running agent.
#[derive(Debug)]
pub struct Consul {
    address: SocketAddr,
    world: Arc<World>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct World {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    asked: AtomicU64,
    sent: AtomicU64,
}

#[derive(Clone, Debug)]
struct State {
    behaviour: Behaviour,
    /// The raft index.
    index: u64,
    /// The key's value and `ModifyIndex`.
    key: Option<(String, u64)>,
    /// The last question's target and token.
    question: (String, Option<String>),
}

impl Consul {
    /// Starts it on 127.0.0.1, without the key. Call within a runtime.
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await?;
        let state = State {
            behaviour: Behaviour::Right,
            index: 10,
            key: None,
            question: (String::new(), None),
        };
        let world = Arc::new(World {
            state: Mutex::new(state),
            changed: watch::channel(0).0,
            asked: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        });
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(Arc::clone(&world), listener));
        Ok(Self { address, world, _tasks: tasks })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A node takes the lease.
    pub fn hold(&self, name: &str) {
        let value = format!(r#"{{"hostname":"{name}","advertise-url":"http://{name}:20202"}}"#);
        self.change(|state| {
            state.index += 1;
            state.key = Some((value, state.index));
        });
    }

    /// The holder stops cleanly: the value is empty.
    pub fn release(&self) {
        self.change(|state| {
            state.index += 1;
            state.key = Some((String::new(), state.index));
        });
    }

    /// The holder's session expires: the key is deleted.
    pub fn expire(&self) {
        self.change(|state| {
            state.index += 1;
            state.key = None;
        });
    }

    /// An old snapshot is restored, in which a node held the lease.
    pub fn restore(&self, name: &str) {
        self.change(|state| state.index = 1);
        self.hold(name);
    }

    /// How it answers from now on, to questions that wait too.
    pub fn behave(&self, behaviour: Behaviour) {
        self.change(|state| state.behaviour = behaviour);
    }

    /// How many questions it got.
    pub fn asked(&self) -> u64 {
        self.world.asked.load(Ordering::Relaxed)
    }

    /// How many bytes of endless answers it got rid of.
    pub fn sent(&self) -> u64 {
        self.world.sent.load(Ordering::Relaxed)
    }

    /// The last question: target and token.
    pub fn question(&self) -> (String, Option<String>) {
        self.world.state().question.clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.world.state());
        self.world.changed.send_modify(|n| *n += 1);
    }
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(world: Arc<World>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { return };
        while connections.try_join_next().is_some() {}
        let world = Arc::clone(&world);
        connections.spawn(async move {
            let mut wire = Wire::new(stream);
            while let Some(head) = wire.head().await {
                world.asked.fetch_add(1, Ordering::Relaxed);
                let token = head.field("x-consul-token").map(str::to_owned);
                world.state().question = (head.target.clone(), token);
                if answer(&world, &mut wire, &head).await.is_none() {
                    return;
                }
            }
        });
    }
}

async fn answer(world: &World, wire: &mut Wire, head: &Head) -> Option<()> {
    let asked: u64 = parameter(head, "index").and_then(|n| n.parse().ok()).unwrap_or(0);
    let wait = parameter(head, "wait").and_then(|wait| wait.trim_end_matches('s').parse().ok());
    let mut changed = world.changed.subscribe();
    let blocks = |state: &State| {
        let index = state.key.as_ref().map_or(state.index, |(_, modified)| *modified);
        asked > 0 && index <= asked && index + 100 > asked && state.behaviour == Behaviour::Right
    };
    let waiting = async {
        while blocks(&world.state()) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = timeout(Duration::from_secs(wait.unwrap_or(300)), waiting).await;
    let state = world.state().clone();
    let index = state.key.as_ref().map_or(state.index, |(_, modified)| *modified);
    let field = format!("X-Consul-Index: {index}\r\ncontent-type: application/json\r\n");
    let body = match &state.key {
        None => None,
        Some((value, modified)) => {
            let value = base64(value.as_bytes());
            Some(format!(
                r#"[{{"LockIndex":1,"Key":"k","Flags":0,"Value":"{value}","Session":"s","CreateIndex":1,"ModifyIndex":{modified}}}]"#
            ))
        }
    };
    match state.behaviour {
        Behaviour::Right => match body {
            Some(body) => wire.answer("200 OK", &field, body.as_bytes()).await,
            None => wire.answer("404 Not Found", &field, b"").await,
        },
        Behaviour::Mute => {
            sleep(Duration::from_mins(10)).await;
            None
        }
        Behaviour::Gone => None,
        Behaviour::Leaderless => {
            wire.answer("500 Internal Server Error", "", b"No cluster leader").await
        }
        Behaviour::Forbidden => wire.answer("403 Forbidden", "", b"Permission denied").await,
        Behaviour::Body(body) => wire.answer("200 OK", &field, body.as_bytes()).await,
        Behaviour::NoIndex => wire.answer("200 OK", "", body.unwrap_or_default().as_bytes()).await,
        Behaviour::Endless => {
            let head = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n{field}\r\n");
            wire.write(head.as_bytes()).await?;
            loop {
                let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
                wire.write(chunk.as_bytes()).await?;
                world.sent.fetch_add(0x1000, Ordering::Relaxed);
            }
        }
    }
}

fn parameter<'h>(head: &'h Head, name: &str) -> Option<&'h str> {
    let query = head.target.split_once('?')?.1;
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - three.len()));
        for digit in 0..4 {
            let six = usize::try_from(bits >> (18 - 6 * digit) & 63).unwrap_or(0);
            let digit = if digit > three.len() {
                '='
            } else {
                DIGITS.get(six).map_or('=', |d| char::from(*d))
            };
            text.push(digit);
        }
    }
    text
}
