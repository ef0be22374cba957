//! gRPC over HTTP/2, spoken to grpc-go's interoperability server: three of its methods, whose few
//! messages are written by hand. A call without `grpc-status` never looks complete.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::time::{sleep, timeout};

use crate::{
    clients::Client,
    judge::{Class, End},
    wire::{Answer, Body, PATIENCE, Via, Wire, bytes},
};

const FIELDS: &[(&str, &str)] = &[("content-type", "application/grpc"), ("te", "trailers")];

/// Unary calls, on a route that may repeat them.
pub(crate) async fn calls(client: Client, via: Via) {
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    while client.goes_on() {
        let size = rng.usize(..10_000);
        let body = bytes(message(&request(size)));
        exchange(&client, &mut wire, ("grpc unary", Class::Call, "UnaryCall"), body, &[size]).await;
        client.think(&mut rng, 60).await;
    }
}

/// One question, many answers.
pub(crate) async fn streams(client: Client, via: Via) {
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    while client.goes_on() {
        let sizes: Vec<usize> = (0..rng.usize(1..20)).map(|_| rng.usize(..40_000)).collect();
        let body = bytes(message(&parameters(&sizes, 20_000)));
        let method = ("grpc server stream", Class::Stream, "StreamingOutputCall");
        exchange(&client, &mut wire, method, body, &sizes).await;
        client.think(&mut rng, 100).await;
    }
}

/// Both ways at once.
pub(crate) async fn pings(client: Client, via: Via) {
    let (mut wire, mut rng) = (Wire::new(&client.doors, via), client.rng());
    while client.goes_on() {
        let sizes: Vec<usize> = (0..rng.usize(1..20)).map(|_| rng.usize(..20_000)).collect();
        let sent: Vec<Bytes> = sizes.iter().map(|size| message(&parameters(&[*size], 0))).collect();
        let pieces = stream::unfold(sent.into_iter(), |mut rest| async move {
            let next = rest.next()?;
            sleep(Duration::from_millis(30)).await;
            Some((Ok(Frame::data(next)), rest))
        });
        let body = StreamBody::new(pieces).boxed_unsync();
        let method = ("grpc both ways", Class::Stream, "FullDuplexCall");
        exchange(&client, &mut wire, method, body, &sizes).await;
        client.think(&mut rng, 100).await;
    }
}

/// One call, which has to be answered with messages of these sizes and status 0.
async fn exchange(
    client: &Client,
    wire: &mut Wire,
    (protocol, class, method): (&'static str, Class, &str),
    body: Body,
    sizes: &[usize],
) {
    let asked = client.asked(protocol, class, method.to_owned());
    let target = format!("/grpc.testing.TestService/{method}");
    let answer = match wire.send("POST", "grpc.test", &target, FIELDS, body).await {
        Ok(response) => match timeout(PATIENCE, wire.whole(response)).await {
            Ok(answer) => answer,
            Err(_) => Err(End::Wrong("it never ended".to_owned())),
        },
        Err(end) => Err(end),
    };
    client.say(asked, answer.map_or_else(|end| end, |answer| judge(&answer, sizes)));
}

fn judge(answer: &Answer, sizes: &[usize]) -> End {
    if answer.status != 200 {
        return answer.end(200);
    }
    let status = answer.trailers.get("grpc-status").or_else(|| answer.head.get("grpc-status"));
    let Some(status) = status.and_then(|status| status.to_str().ok()) else {
        return End::Wrong("it looks complete without a status".to_owned());
    };
    if status != "0" {
        let why = answer.trailers.get("grpc-message").or_else(|| answer.head.get("grpc-message"));
        return End::Cut(format!("grpc-status {status}: {why:?}"));
    }
    let mut rest = &answer.body[..];
    let mut came = Vec::new();
    while let [0, a, b, c, d, after @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if after.len() < length {
            return End::Wrong("a message is cut off, and the status 0".to_owned());
        }
        came.push(length);
        rest = &after[length..];
    }
    // A message is its payload, and a few bytes around it.
    let fits = came.len() == sizes.len()
        && came.iter().zip(sizes).all(|(came, size)| (*size..size + 16).contains(came));
    if fits && rest.is_empty() {
        End::Fine
    } else {
        End::Wrong(format!("messages of {came:?} bytes instead of {sizes:?}"))
    }
}

/// With the five bytes before it.
fn message(payload: &[u8]) -> Bytes {
    let mut all = BytesMut::new();
    all.put_u8(0);
    all.put_u32(payload.len() as u32);
    all.put_slice(payload);
    all.freeze()
}

fn varint(into: &mut Vec<u8>, mut n: usize) {
    while n >= 0x80 {
        into.push(n as u8 | 0x80);
        n >>= 7;
    }
    into.push(n as u8);
}

/// A field of bytes.
fn field(into: &mut Vec<u8>, number: u8, payload: &[u8]) {
    into.push(number << 3 | 2);
    varint(into, payload.len());
    into.extend_from_slice(payload);
}

/// A field with a number.
fn number(into: &mut Vec<u8>, field: u8, n: usize) {
    into.push(field << 3);
    varint(into, n);
}

/// `SimpleRequest { response_size, payload }`.
fn request(size: usize) -> Vec<u8> {
    let mut all = Vec::new();
    number(&mut all, 2, size);
    let mut payload = Vec::new();
    field(&mut payload, 2, &vec![0; size / 2]);
    field(&mut all, 3, &payload);
    all
}

/// `StreamingOutputCallRequest { response_parameters { size, interval_us } }`.
fn parameters(sizes: &[usize], interval: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for size in sizes {
        let mut parameter = Vec::new();
        number(&mut parameter, 1, *size);
        number(&mut parameter, 2, interval);
        field(&mut all, 2, &parameter);
    }
    all
}
