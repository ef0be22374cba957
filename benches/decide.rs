//! What a decision costs: nanoseconds, without a socket.
#![expect(clippy::disallowed_methods, reason = "a bench needs some point in time")]

use std::{hint::black_box, time::Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Method};
use litegate::{
    config::load,
    decide::{
        Class, History,
        balance::Load,
        choose::{Rules, choose},
        classify::classify,
        replay,
        route::{Head, route},
    },
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
    let mut group = criterion.benchmark_group("decide");
    for nodes in [3, 50] {
        let topology = topology(nodes);
        group.bench_function(format!("route and classify, {nodes} nodes"), |bench| {
            bench.iter(|| {
                let route = route(black_box(&head), &config.routes).expect("the last one matches");
                classify(&head, route, &topology, None)
            });
        });
        let rules = Rules::of(&config.clusters[0]);
        let loads = vec![Load::default(); topology.nodes.len()];
        let route = route(&head, &config.routes).expect("the last one matches");
        let read = classify(&head, route, &topology, None).expect("it is a read");
        let write = litegate::decide::Request { class: Class::Write, ..read };
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
        bench.iter(|| replay::form(black_box(&answer), false));
    });
    for line in ["instance=abaci-app-0", "region=\"iad,ord,any\";app=abaci;state=a b c;timeout=10s"]
    {
        answer.insert(replay::FLY_REPLAY, HeaderValue::from_static(line));
        let answer = answer.clone();
        group.bench_function(format!("parse {line}"), |bench| {
            bench.iter(|| replay::from_head(black_box(&answer)));
        });
    }
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
