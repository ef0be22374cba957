//! The two ports of a simulated node: LiteFS's API, and its proxy or the app itself.
//!
//! Spoken as bytes, with a server of its own: the fake must not share litegate's mistakes.

use std::{rc::Rc, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt as _,
    time::{Instant, sleep, timeout},
};

use super::{
    KNOWN,
    wire::{Message, head_of},
    world::{API, APP, DATABASE, INSTANCES, World, address, name},
};
use crate::{
    net::{Stream, simulated::Socket},
    verify::history::{Key, Kind, Value},
};

/// How long LiteFS's proxy waits for a primary's name, and a read for its cookie.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn api(world: Rc<World>, node: usize) {
    let mut accepted = world.network.listen((0..INSTANCES).map(|i| address(i, node, API)));
    while let Some(socket) = accepted.recv().await {
        let its = Rc::clone(&world);
        world.spawn(node, async move { answer_api(its, node, socket).await.unwrap_or_default() });
    }
}

pub(super) async fn app(world: Rc<World>, node: usize) {
    let mut accepted = world.network.listen((0..INSTANCES).map(|i| address(i, node, APP)));
    while let Some(socket) = accepted.recv().await {
        let its = Rc::clone(&world);
        world.spawn(node, async move { answer_app(its, node, socket).await.unwrap_or_default() });
    }
}

fn instance_of(socket: &Socket) -> usize {
    match socket.address.ip() {
        std::net::IpAddr::V4(ip) => usize::from(ip.octets()[1]),
        std::net::IpAddr::V6(_) => 0,
    }
}

/// `None` when the connection is over.
async fn answer_api(world: Rc<World>, node: usize, socket: Socket) -> Option<()> {
    let mut stream = Stream::Simulated(socket);
    let mut ahead = BytesMut::new();
    loop {
        let request = Message::read(&mut stream, &mut ahead).await?;
        world.thawed(node).await;
        let incarnation = world.look(|state| state.nodes[node].incarnation)?;
        let identity =
            format!("litefs-id: {incarnation:016X}\r\nlitefs-cluster-id: LFSC00000000000000AA\r\n");
        let path = request.path().to_owned();
        let body = match path.as_str() {
            "/info" => {
                sleep(world.look(|state| state.nodes[node].info_takes)).await;
                world.thawed(node).await;
                let (primary, names) = standing(&world, node);
                let hostname = if primary { name(node) } else { names.unwrap_or_default() };
                format!(
                    r#"{{"clusterID":"LFSC00000000000000AA","isPrimary":{primary},"candidate":true,"path":"/d","primary":{{"hostname":"{hostname}"}}}}"#
                )
            }
            "/debug/vars" => {
                sleep(world.look(|state| state.nodes[node].vars_take)).await;
                world.thawed(node).await;
                let (txid, checksum) = world.look(|state| state.nodes[node].position());
                let dbs = if txid == 0 {
                    String::new()
                } else {
                    format!(
                        r#""{DATABASE}":{{"name":"{DATABASE}","txid":"{txid:016x}","checksum":"{checksum:016x}","locks":{{}}}}"#
                    )
                };
                format!(r#"{{"cmdline":[],"store":{{"isPrimary":false,"dbs":{{{dbs}}}}}}}"#)
            }
            "/metrics" => {
                let lag = world.look(|state| {
                    let it = &state.nodes[node];
                    if it.primary || it.names.is_none() {
                        0.0
                    } else {
                        it.heard.elapsed().as_secs_f64()
                    }
                });
                format!("litefs_is_primary 0\nlitefs_lag_seconds {lag}\n")
            }
            "/events" => return events(&world, node, &mut stream, &identity).await,
            _ => return None,
        };
        let head = format!("HTTP/1.1 200 OK\r\n{identity}content-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).await.ok()?;
        stream.write_all(body.as_bytes()).await.ok()?;
    }
}

fn standing(world: &World, node: usize) -> (bool, Option<String>) {
    world.look(|state| (state.nodes[node].primary, state.nodes[node].names.map(name)))
}

/// The endless stream of changes: no keep-alive, no past.
async fn events(world: &World, node: usize, stream: &mut Stream, identity: &str) -> Option<()> {
    let head = format!("HTTP/1.1 200 OK\r\n{identity}transfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    let mut told = standing(world, node);
    let mut seen = world.look(|state| state.nodes[node].position());
    let mut kind = "init";
    loop {
        let mut lines = String::new();
        let (primary, names) = &told;
        if !kind.is_empty() {
            let hostname = match names {
                Some(name) if !primary => format!(r#","hostname":"{name}""#),
                _ => String::new(),
            };
            lines += &format!(
                "{{\"type\":\"{kind}\",\"data\":{{\"isPrimary\":{primary}{hostname}}}}}\n"
            );
        }
        world.look(|state| {
            let log = &state.nodes[node].log;
            let have = usize::try_from(seen.0).unwrap_or_default();
            let goes_on = have.checked_sub(1).is_none_or(|last| {
                log.get(last).is_some_and(|tx| tx.checksum == seen.1)
            });
            let from = if goes_on { have } else { log.len().saturating_sub(1) };
            for (place, tx) in log.iter().enumerate().skip(from) {
                lines += &format!(
                    "{{\"type\":\"tx\",\"db\":\"{DATABASE}\",\"data\":{{\"txID\":\"{:016x}\",\"postApplyChecksum\":\"{:016x}\",\"pageSize\":4096,\"commit\":2}}}}\n",
                    place + 1, tx.checksum
                );
            }
            seen = state.nodes[node].position();
        });
        if !lines.is_empty() {
            let chunk = format!("{:x}\r\n{lines}\r\n", lines.len());
            stream.write_all(chunk.as_bytes()).await.ok()?;
        }
        let before = told.clone();
        world
            .until(|state| {
                let it = &state.nodes[node];
                !it.frozen && (it.position() != seen || (it.primary, it.names.map(name)) != before)
            })
            .await;
        told = standing(world, node);
        kind = if told == before { "" } else { "primaryChange" };
    }
}

/// `/list/SLOT/GENERATION`
fn key_of(path: &str) -> Option<Key> {
    let mut parts = path.strip_prefix("/list/")?.split('/');
    let slot = parts.next()?.parse().ok()?;
    Some(Key { kind: Kind::List, slot, generation: 0 })
}

/// `cCLIENTnNUMBER`, and anything after a space.
pub(super) fn value_of(text: &str) -> Option<Value> {
    let (client, number) = text.split(' ').next()?.strip_prefix('c')?.split_once('n')?;
    Some(Value { client: client.parse().ok()?, number: number.parse().ok()? })
}

async fn answer_app(world: Rc<World>, node: usize, socket: Socket) -> Option<()> {
    let instance = instance_of(&socket);
    let mut stream = Stream::Simulated(socket);
    let mut ahead = BytesMut::new();
    loop {
        let request = head_of(&mut stream, &mut ahead).await?;
        let sent = match &stream {
            Stream::Simulated(socket) => socket.sent(),
            _ => None,
        };
        world.thawed(node).await;
        let is_read = request.is_get();
        let mut fields = format!("x-node: n{node}\r\n");
        if world.through_proxy && is_read {
            let wanted = request.txid();
            let caught_up = world.until(|s| s.nodes[node].position().0 >= wanted);
            if timeout(PATIENCE, caught_up).await.is_err() {
                request.rest(&mut stream, &mut ahead).await?;
                respond(&mut stream, 504, &fields, "Proxy timeout\n").await?;
                continue;
            }
        }
        if world.through_proxy && !is_read {
            let known = world.until(|s| s.nodes[node].primary || s.nodes[node].names.is_some());
            let waited = timeout(PATIENCE, known).await;
            world.thawed(node).await;
            match standing(&world, node) {
                (true, _) => {}
                (false, Some(name)) => {
                    fields += &format!("fly-replay: instance={name}\r\n");
                    // Go drains a quarter of a megabyte, and closes over it.
                    request.rest(&mut stream, &mut ahead).await?;
                    respond(&mut stream, 200, &fields, "").await?;
                    continue;
                }
                (false, None) => {
                    let _ = waited;
                    request.rest(&mut stream, &mut ahead).await?;
                    respond(&mut stream, 503, &fields, "Proxy error: no primary available\n")
                        .await?;
                    continue;
                }
            }
        }
        let body = request.rest(&mut stream, &mut ahead).await?;
        world.thawed(node).await;
        let key = key_of(request.path())?;
        if is_read {
            sleep(world.millis(0..4)).await;
            world.thawed(node).await;
            let values: Vec<_> = world.list(node, key).iter().map(Value::to_string).collect();
            sleep(world.millis(0..4)).await;
            world.thawed(node).await;
            respond(&mut stream, 200, &fields, &format!("[{}]", values.join(" "))).await?;
            continue;
        }
        let value = value_of(std::str::from_utf8(&body).ok()?)?;
        runs(&world, instance, node, value, sent?);
        let slow = if world.chance(5) { world.millis(0..1500) } else { Duration::ZERO };
        let slow = slow + world.look(|state| state.nodes[node].app_takes);
        sleep(world.millis(0..8) + slow).await;
        world.thawed(node).await;
        let Some(txid) = world.commit(node, key, value) else {
            respond(&mut stream, 500, &fields, "attempt to write a readonly database").await?;
            continue;
        };
        world.say(format_args!("n{node} commits {value} to {key} as TXID {txid}"));
        let slow = if world.chance(5) { world.millis(0..500) } else { Duration::ZERO };
        sleep(world.millis(0..4) + slow).await;
        world.thawed(node).await;
        if world.through_proxy {
            let now = world.look(|state| state.nodes[node].position().0);
            fields += &format!("set-cookie: __txid={now:016x}; Path=/; HttpOnly\r\n");
        }
        respond(&mut stream, 200, &fields, "ok").await?;
    }
}

/// The app begins to do a write that was sent then: never twice, and not on a node that litegate
/// could know to be superseded.
fn runs(world: &World, instance: usize, node: usize, value: Value, sent: Instant) {
    let begun = {
        let mut fates = world.fates.borrow_mut();
        let fate = fates.entry(value).or_default();
        fate.begun += 1;
        fate.begun
    };
    if begun > 1 {
        world.breaks(format_args!("{value} is executed a second time, on n{node}"));
    }
    let seen = world.seen.borrow();
    let mut others = seen[instance].iter().enumerate().filter(|(other, _)| *other != node);
    let known = others.find(|(_, since)| since.is_some_and(|since| since + KNOWN <= sent));
    if let Some((holder, _)) = known {
        drop(seen);
        world.breaks(format_args!(
            "litegate {instance} has {value} run on n{node}, though n{holder} took over long ago"
        ));
    }
}

async fn respond(stream: &mut Stream, status: u16, fields: &str, body: &str) -> Option<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\n{fields}content-length: {length}\r\n\r\n{body}");
    stream.write_all(head.as_bytes()).await.ok()
}
