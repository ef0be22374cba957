//! What a decision and the rewriting of heads cost: nanoseconds, without a socket.
#![expect(clippy::disallowed_methods, reason = "a bench needs some point in time")]

use std::{hint::black_box, time::Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Method};
use litegate::{
    config::load,
    decide::{
        Attempt, Because, Cause, Class, Demands, Ended, Failure, FailureKind, History, Request,
        Wanted,
        answer::Said,
        balance::Load,
        choose::{Rules, choose},
        classify::classify,
        next::{self, Outcome, next},
        replay,
        route::{Head, route},
    },
    proxy::headers::{self, Extra, Peer},
    topology::{Freshness, Node, NodeId, Presence, Role, Topology, eject},
};

const CONFIG: &str = r#"
[[listener]]
address = "0.0.0.0:8080"
[cluster.abaci]
port    = 3000
members = { type = "dns", name = "abaci-app-headless" }
primary = { type = "litefs" }
[[route]]
host = ["other.one", "*.other.one"]
path = "/api"
class = "write"
[[route]]
host = ["abaci.one"]
path_glob = "*/search"
method = ["POST"]
class = "read"
[[route]]
"#;

fn topology(nodes: u64) -> Topology {
    let node = |n| Node {
        id: NodeId(n),
        name: format!("abaci-app-{n}").into(),
        address: "127.0.0.1:1".parse().expect("it is an address"),
        role: if n == 0 { Role::Primary } else { Role::Replica },
        presence: Presence::Member,
        lag: None,
        freshness: Freshness::Fresh,
        record: eject::Record::default(),
        probed_healthy: true,
        admitted: None,
        progress: std::sync::Arc::default(),
        local: false,
        near: false,
        fenced: false,
    };
    Topology {
        primary: Some(NodeId(0)),
        nodes: (0..nodes).map(node).collect(),
        ..Topology::default()
    }
}

fn decisions(criterion: &mut Criterion) {
    let config = load::parse("bench", CONFIG, []).expect("it is right");
    let mut headers = HeaderMap::new();
    headers.insert("host", HeaderValue::from_static("abaci.one"));
    let head = Head {
        method: &Method::GET,
        host: Some("abaci.one"),
        path: "/kv/some/key",
        headers: &headers,
        trusted: false,
        upgrade: false,
    };
    let now = Instant::now();
    let paths = config.limits.ambiguous_paths;
    let mut group = criterion.benchmark_group("decide");
    for nodes in [3, 50] {
        let topology = topology(nodes);
        group.bench_function(format!("route and classify, {nodes} nodes"), |bench| {
            bench.iter(|| {
                let route =
                    route(black_box(&head), &config.routes, paths).expect("the last one matches");
                classify(&head, route, &topology, None)
            });
        });
        let rules = Rules::of(&config.clusters[0]);
        let loads = vec![Load::default(); topology.nodes.len()];
        let route = route(&head, &config.routes, paths).expect("the last one matches");
        let read = classify(&head, route, &topology, None).expect("it is a read");
        let write = Request { class: Class::Write, ..read };
        for request in [read, write] {
            let name = format!("choose for a {}, {nodes} nodes", request.class.as_str());
            let history = History::default();
            let mut chance = 0u64;
            group.bench_function(name, |bench| {
                bench.iter(|| {
                    chance = chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    choose(black_box(&request), &topology, &history, &rules, &loads, chance, now)
                });
            });
        }
    }
    let mut answer = HeaderMap::new();
    answer.insert("content-type", HeaderValue::from_static("application/json"));
    group.bench_function("an answer without a replay", |bench| {
        bench.iter(|| Said::of(black_box(&answer)).form(&answer, false));
    });
    for line in ["instance=abaci-app-0", "region=\"iad,ord,any\";app=abaci;state=a b c;timeout=10s"]
    {
        answer.insert(replay::FLY_REPLAY, HeaderValue::from_static(line));
        let answer = answer.clone();
        group.bench_function(format!("parse {line}"), |bench| {
            bench.iter(|| replay::from_head(black_box(&answer)));
        });
    }
    for (name, body) in [
        ("a target", r#"{"instance":"abaci-app-0"}"#),
        (
            "a transform",
            r#"{"app":"abaci","region":"ams,eu","timeout":"30s","fallback":"force_self","transform":{"path":"/v2/items?page=3","delete_headers":["x-internal-trace","cookie"],"set_headers":[{"name":"x-tenant","value":"blue"},{"name":"authorization","value":"Bearer abc.def"}]}}"#,
        ),
    ] {
        group.bench_function(format!("parse {name} as JSON"), |bench| {
            bench.iter(|| replay::from_json(black_box(body.as_bytes()), false));
        });
    }
    group.finish();
}

/// What follows an attempt.
fn nexts(criterion: &mut Criterion) {
    let config = load::parse("bench", CONFIG, []).expect("it is right");
    let (topology, rules) = (topology(3), next::Rules::of(&config.clusters[0]));
    let replay = replay::Replay { instance: Some("abaci-app-0".into()), ..Default::default() };
    let closed = Failure { kind: FailureKind::Closed, written: true };
    let mut group = criterion.benchmark_group("next");
    for (name, class, outcome, ended) in [
        (
            "an answer",
            Class::Read,
            Outcome::Answered(http::StatusCode::OK),
            Ended::Answered(http::StatusCode::OK),
        ),
        ("a replay", Class::Write, Outcome::Replay(Ok(&replay)), Ended::Replayed),
        ("a failed read", Class::Read, Outcome::Failed(closed), Ended::Failed(closed)),
    ] {
        let wanted = Wanted::Any;
        let request = Request {
            class,
            because: Because::Method,
            idempotent: false,
            wanted,
            demands: Demands::default(),
        };
        let (node, role, cause) = (NodeId(1), Role::Replica, Cause::First);
        let attempt = Attempt { node, role, cause, ended };
        let history = History { attempts: [attempt].into_iter().collect(), ..History::default() };
        group.bench_function(name, |bench| {
            bench.iter_batched_ref(
                || history.clone(),
                |history| {
                    next(black_box(&request), history, outcome, &topology, &rules, true, || true)
                },
                criterion::BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// Heads as browsers and apps send them, on their way through.
fn heads(criterion: &mut Criterion) {
    let map = |fields: &[(&'static str, &'static str)]| -> HeaderMap {
        let fields = fields.iter().map(|(name, value)| {
            (http::HeaderName::from_static(name), HeaderValue::from_static(value))
        });
        fields.collect()
    };
    let small = map(&[("host", "abaci.one"), ("user-agent", "curl/8.9"), ("accept", "*/*")]);
    let browser = map(&[
        ("host", "abaci.one"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
        ("accept-language", "en-GB,en;q=0.5"),
        ("accept-encoding", "gzip, deflate, br, zstd"),
        ("connection", "keep-alive"),
        ("cookie", "session=0123456789abcdef0123456789abcdef; __txid=00000000000004d2"),
        ("upgrade-insecure-requests", "1"),
        ("sec-fetch-dest", "document"),
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-site", "same-origin"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-proto", "https"),
    ]);
    let answer = map(&[
        ("content-type", "text/html; charset=utf-8"),
        ("content-length", "1024"),
        ("date", "Tue, 24 Nov 2026 03:04:05 GMT"),
        ("set-cookie", "__txid=00000000000004d2; Path=/; HttpOnly"),
        ("connection", "keep-alive"),
        ("keep-alive", "timeout=5"),
        ("etag", "\"0123456789abcdef\""),
    ]);
    let via = HeaderValue::from_static("1.1 litegate-00c0ffee");
    let (peer, local) = (([203, 0, 113, 7], 4711).into(), ([192, 0, 2, 1], 8080).into());
    let host = HeaderValue::from_static("abaci.one");
    let mut group = criterion.benchmark_group("headers");
    for (name, head) in [("a small", &small), ("a browser's", &browser)] {
        for trusted in [false, true] {
            let peer = Peer::new(peer, local, trusted);
            let from = if trusted { "a trusted proxy" } else { "a client" };
            group.bench_function(format!("{name} head from {from} to a node"), |bench| {
                let extra = Extra::default();
                bench.iter(|| {
                    headers::upstream(black_box(head), Some(&host), &peer, false, &via, &extra)
                });
            });
        }
    }
    group.bench_function("an answer to the client", |bench| {
        bench.iter_batched_ref(
            || answer.clone(),
            |head| {
                let said = Said::of(black_box(head));
                headers::downstream(head, said, false, false, &via);
            },
            criterion::BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, decisions, nexts, heads);
criterion_main!(benches);
