//! A hand-over while two litegates write: both hold first, or nothing is handed over.

use std::{process::Stdio, time::Duration};

use litegate::{
    config::load,
    testkit::{
        Options,
        client::{self, Response},
    },
};
use tokio::time::{Instant, sleep, timeout};

use crate::gate::{Gate, Writers, config};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(5);

async fn both(options: Options) -> [Gate; 2] {
    let first = Gate::with(options, LITEFS).await;
    first.send("POST", "/kv/first", b"v").await;
    first.cluster.settled().await;
    let second = first.beside(LITEFS).await;
    for gate in [&first, &second] {
        gate.until(|topology| topology.nodes.iter().all(|node| !node.progress.get().is_empty()))
            .await;
    }
    [first, second]
}

/// `litegate handoff` against both, not yet started.
fn handoff(gates: &[Gate; 2], arguments: &[&str]) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.arg("handoff").args(arguments).kill_on_drop(true);
    for gate in gates {
        command.args(["--admin", &format!("http://{}", gate.admin())]);
    }
    command.env_remove("LITEGATE_ADMIN").stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Its exit code, and what it said.
async fn run(mut command: tokio::process::Command) -> (i32, String) {
    let output = timeout(PATIENCE, command.output()).await.expect("in time");
    let output = output.expect("the program was built");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().expect("it ends by itself"), String::from_utf8_lossy(&said).into_owned())
}

/// One question of the protocol.
async fn ask(gate: &Gate, path: &str, query: &str) -> (u16, serde_json::Value) {
    let target = format!("/api/handoff/{path}?{query}");
    let asked = timeout(PATIENCE, client::request(gate.admin(), "POST", &target, "", b"")).await;
    let answer: Response = asked.expect("in time").expect("an answer");
    (answer.status, serde_json::from_slice(&answer.body).expect("JSON"))
}

async fn is_holding(gate: &Gate) -> bool {
    gate.metric("litegate_handing_over", "app").await == 1
}

/// A write that takes so long, under way on the first node by the time this returns.
async fn slow(
    gates: &[Gate; 2],
    by: usize,
    target: &'static str,
) -> tokio::task::JoinHandle<Response> {
    let (cluster, address) = (&gates[0].cluster, gates[by].address());
    let before = cluster.served(0);
    let write = tokio::spawn(async move {
        client::request(address, "POST", target, "", b"").await.expect("an answer")
    });
    while cluster.served(0) == before {
        sleep(LOOK).await;
    }
    write
}

/// Nobody holds, and both litegates write to the first node.
async fn nothing_happened(gates: &[Gate; 2]) {
    for (n, gate) in gates.iter().enumerate() {
        assert!(!is_holding(gate).await, "litegate {n} holds");
        let began = Instant::now();
        assert_eq!(gate.send("POST", &format!("/kv/after-{n}"), b"v").await.status, 200);
        assert!(began.elapsed() < Duration::from_secs(2), "litegate {n}: {:?}", began.elapsed());
        let written = gates[0].cluster.written(&format!("after-{n}"));
        assert!(written.on.iter().all(|node| *node == 0), "{written:?}");
    }
    assert_eq!(gates[0].cluster.primary(), Some(0));
}

#[tokio::test]
async fn under_load_through_both_it_loses_and_fails_nothing() {
    let gates =
        both(Options { replication: Duration::from_millis(30), ..Options::default() }).await;
    let writers = Writers::start(&[gates[0].address(), gates[1].address()], "?wait=3");
    for (from, to) in [("app-0", "app-2"), ("app-2", "app-1"), ("app-1", "app-0")] {
        let (code, said) = run(handoff(&gates, &["--from", from, "--to", to])).await;
        assert!(
            code == 0 && said.contains(&format!("{to} is primary, before it {from}")),
            "{said}"
        );
        for step in ["hold", "finish writes", "catch up", "promote", "claim"] {
            assert!(said.contains(&format!("\n  {step} ")), "{said}");
        }
        for gate in &gates {
            assert!(!is_holding(gate).await, "it goes on when the program has ended");
        }
    }
    writers.finish(&gates[0].cluster, 0).await;
}

#[tokio::test]
async fn what_the_other_one_has_under_way_is_waited_for() {
    let gates = both(Options::default()).await;
    let write = slow(&gates, 1, "/kv/slow?wait=900").await;
    let (code, said) = run(handoff(&gates, &["--to", "app-1", "--json"])).await;
    let report: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((code, report["outcome"].as_str()), (0, Some("done")), "{report}");
    assert_eq!(report["steps"][0]["step"], "hold");
    assert!(report["steps"][0]["seconds"].as_f64().expect("a number") > 0.3, "{report}");
    assert_eq!(report["instances"].as_array().expect("a list").len(), 2, "{report}");
    assert_eq!(write.await.expect("it ran").status, 200);
    assert_eq!(gates[0].cluster.written("slow").on, [0]);
    for gate in &gates {
        gate.send("POST", "/kv/same", b"v").await;
    }
    assert_eq!(gates[0].cluster.written("same").on, [1, 1]);
}

#[tokio::test]
async fn one_that_is_down_is_named_and_nothing_is_handed_over() {
    let gates = both(Options::default()).await;
    // Nobody else's, as a free port would soon be.
    let down = "127.0.0.1:1";
    let (code, said) = run(handoff(&gates, &["--to", "app-1", "--admin", down])).await;
    assert!(code == 5 && said.contains("nothing was handed over"), "{said}");
    assert!(said.contains(down), "{said}");
    nothing_happened(&gates).await;
    let (code, said) =
        run(handoff(&gates, &["--to", "app-1", "--admin-service", down, "--cluster", "app"])).await;
    assert!(code == 5 && said.contains(&format!("of {down} is not reached")), "{said}");
    nothing_happened(&gates).await;
}

#[tokio::test]
async fn one_that_does_not_finish_is_named_with_what_runs_there() {
    let gates = both(Options::default()).await;
    let write = slow(&gates, 1, "/kv/slow?wait=4000&secret=x").await;
    let began = Instant::now();
    let (code, said) = run(handoff(&gates, &["--to", "app-1", "--finish-writes", "300ms"])).await;
    assert!(code == 1 && said.contains("failed at `finish writes`"), "{said}");
    let second = gates[1].admin().to_string();
    let named = format!("on {second} 1 write is still under way: POST /kv/slow on app-0 for ");
    assert!(said.contains(&named) && !said.contains("secret"), "{said}");
    assert!(said.contains("the writes go on, primary is app-0"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    nothing_happened(&gates).await;
    assert_eq!(write.await.expect("it ran").status, 200);
    // Alone, the one that is asked names what runs as well.
    let write = slow(&gates, 0, "/kv/alone?wait=4000").await;
    let mut alone = tokio::process::Command::new(env!("CARGO_BIN_EXE_litegate"));
    alone.args(["handoff", "--finish-writes", "300ms", "--admin", &gates[0].admin().to_string()]);
    let (code, said) = run(alone).await;
    assert!(code == 1 && said.contains("POST /kv/alone on app-0 for "), "{said}");
    assert_eq!(write.await.expect("it ran").status, 200);
}

#[tokio::test]
async fn more_time_than_writes_can_be_held_is_refused() {
    let gates = both(Options::default()).await;
    let (code, said) = run(handoff(&gates, &["--finish-writes", "60s"])).await;
    assert!(code == 4 && said.contains("raise hold.timeout"), "{said}");
    nothing_happened(&gates).await;
}

#[tokio::test]
async fn there_may_be_nothing_to_do_and_then_nobody_holds() {
    let gates = both(Options::default()).await;
    let (code, said) = run(handoff(&gates, &["--from", "app-1"])).await;
    assert!(code == 0 && said.contains("nothing to do"), "{said}");
    let (code, said) = run(handoff(&gates, &["--to", "nobody"])).await;
    assert!(code == 4 && said.contains("no member is called `nobody`"), "{said}");
    let (code, said) = run(handoff(&gates, &["--cluster", "other"])).await;
    assert!(code == 4 && said.contains("404"), "{said}");
    let held = |gate: &Gate| {
        let address = gate.admin();
        async move {
            let page =
                client::request(address, "GET", "/metrics", "", b"").await.expect("it answers");
            page.text().contains("litegate_handing_over{cluster=\"app\"} 1")
        }
    };
    assert!(!held(&gates[0]).await && !held(&gates[1]).await);
}

#[tokio::test]
async fn whoever_coordinates_may_die_while_writes_finish() {
    let gates = both(Options::default()).await;
    let write = slow(&gates, 1, "/kv/slow?wait=3000").await;
    let mut program = handoff(&gates, &["--to", "app-1"]).spawn().expect("it was built");
    while !is_holding(&gates[0]).await || !is_holding(&gates[1]).await {
        sleep(LOOK).await;
    }
    program.start_kill().expect("it runs");
    let began = Instant::now();
    let held = gates.iter().map(|gate| gate.send("POST", "/kv/held", b"v"));
    let held = timeout(PATIENCE, futures_util::future::join_all(held)).await.expect("in time");
    assert!(held.iter().all(|answer| answer.status == 200));
    let waited = began.elapsed();
    assert!(waited < Duration::from_secs(12), "{waited:?}");
    assert_eq!(gates[0].cluster.written("held").on, [0, 0]);
    assert_eq!(write.await.expect("it ran").status, 200);
    nothing_happened(&gates).await;
    // And the next one is not in its way.
    let (code, said) = run(handoff(&gates, &["--to", "app-1", "--wait"])).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(gates[0].cluster.primary(), Some(1));
}

#[tokio::test]
async fn whoever_coordinates_may_die_while_the_target_catches_up() {
    let gates = both(Options::default()).await;
    gates[0].cluster.stall(1, true);
    gates[1].send("POST", "/kv/a", b"v").await;
    let mut program = handoff(&gates, &["--to", "app-1"]).spawn().expect("it was built");
    while !is_holding(&gates[0]).await || !is_holding(&gates[1]).await {
        sleep(LOOK).await;
    }
    program.start_kill().expect("it runs");
    let held = gates.iter().map(|gate| gate.send("POST", "/kv/held", b"v"));
    let held = timeout(PATIENCE, futures_util::future::join_all(held)).await.expect("in time");
    assert!(held.iter().all(|answer| answer.status == 200));
    // Those that waited ran on the first node, whoever let go first.
    assert_eq!(gates[0].cluster.written("held").on, [0, 0]);
    gates[0].cluster.stall(1, false);
    nothing_happened(&gates).await;
}

#[tokio::test]
async fn a_hold_is_one_for_each_name_and_ends_by_itself() {
    let [gate, _other] = both(Options::default()).await;
    let (status, held) = ask(&gate, "hold", "id=a&for=20s").await;
    assert_eq!((status, held["outcome"].as_str()), (200, Some("held")), "{held}");
    assert_eq!((held["primary"].as_str(), held["in_flight"].as_u64()), (Some("app-0"), Some(0)));
    assert!(is_holding(&gate).await);
    let (status, again) = ask(&gate, "hold", "id=a&for=20s&renew=true").await;
    assert_eq!((status, again["instance"].as_str()), (200, held["instance"].as_str()), "{again}");
    let (status, other) = ask(&gate, "hold", "id=b&for=20s").await;
    assert_eq!((status, other["outcome"].as_str()), (409, Some("refused")), "{other}");
    let (status, other) = ask(&gate, "hold", "id=b&for=20s&renew=true").await;
    assert_eq!((status, other["outcome"].as_str()), (409, Some("not-held")), "{other}");
    let (status, other) = ask(&gate, "release", "id=b").await;
    assert_eq!((status, other["outcome"].as_str()), (200, Some("nothing-to-do")), "{other}");
    assert!(is_holding(&gate).await);
    for outcome in ["released", "nothing-to-do"] {
        let (status, released) = ask(&gate, "release", "id=a").await;
        assert_eq!((status, released["outcome"].as_str()), (200, Some(outcome)), "{released}");
        assert!(!is_holding(&gate).await);
    }
    let began = Instant::now();
    let (status, _) = ask(&gate, "hold", "id=c&for=300ms").await;
    assert_eq!(status, 200);
    assert_eq!(gate.send("POST", "/kv/held", b"v").await.status, 200);
    assert!(began.elapsed() >= Duration::from_millis(290), "{:?}", began.elapsed());
    assert!(!is_holding(&gate).await);
    for query in ["id=a", "for=5s", "id=a&for=5", "id=a&for=5s&until=5s", "id=a&for=5s&wait=x"] {
        assert_eq!(ask(&gate, "hold", query).await.0, 400, "{query}");
    }
    assert_eq!(ask(&gate, "hold", &format!("id={}&for=5s", "x".repeat(65))).await.0, 400);
    assert_eq!(ask(&gate, "hold", "id=a&for=5s&cluster=other").await.0, 404);
    for path in ["/api/handoff/hold?id=a&for=5s", "/api/handoff/release?id=a"] {
        let page = client::request(gate.admin(), "POST", path, "origin: http://a\r\n", b"").await;
        assert_eq!(page.expect("an answer").status, 403);
        let get = client::request(gate.admin(), "GET", path, "", b"").await;
        assert_eq!(get.expect("an answer").status, 405);
    }
    assert!(!is_holding(&gate).await);
}

#[tokio::test]
async fn a_hold_ends_when_another_node_is_primary() {
    let [gate, _other] = both(Options::default()).await;
    assert_eq!(ask(&gate, "hold", "id=a&for=20s").await.0, 200);
    let began = Instant::now();
    let (held, (status, released), ()) = tokio::join!(
        gate.send("POST", "/kv/held", b"v"),
        ask(&gate, "release", "id=a&primary=app-1"),
        async {
            while gate.metric("litegate_held_requests", "app").await == 0 {
                sleep(LOOK).await;
            }
            gate.cluster.promote(1);
        }
    );
    assert_eq!((status, released["primary"].as_str()), (200, Some("app-1")), "{released}");
    assert_eq!((held.status, gate.cluster.written("held").on), (200, vec![1]));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test]
async fn one_that_leaves_holds_with_the_others() {
    let gates = both(Options::default()).await;
    let write = slow(&gates, 1, "/kv/slow?wait=1500").await;
    gates[1].running().drain();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ready = client::request(gates[1].admin(), "GET", "/readyz", "", b"").await;
        if ready.expect("an answer").text().contains("draining") {
            break;
        }
        assert!(Instant::now() < deadline, "it drains");
        sleep(LOOK).await;
    }
    let (status, held) = ask(&gates[1], "hold", "id=a&for=8s").await;
    assert_eq!((status, held["in_flight"].as_u64()), (200, Some(1)), "{held}");
    assert_eq!(ask(&gates[1], "release", "id=a").await.0, 200);
    assert_eq!(write.await.expect("it ran").status, 200);
}

#[tokio::test]
async fn one_that_is_asked_has_its_peers_hold_too() {
    let first = Gate::with(Options::default(), LITEFS).await;
    first.send("POST", "/kv/first", b"v").await;
    let second = first.beside(LITEFS).await;
    // Itself as well, as a headless service would name it.
    let peers = format!("peers = [\"{}\", \"{}\"]", second.admin(), first.admin());
    let text = config(&first.cluster, LITEFS).replace("[admin]\n", &format!("[admin]\n{peers}\n"));
    let before = first.admin();
    let config = load::parse("test.toml", &text, []).unwrap_or_else(|faults| panic!("{faults}"));
    first.running().reload(config).await.expect("applied");
    assert_eq!(first.admin(), before, "the admin listener stays where it is");
    let gates = [first, second];
    gates[1]
        .until(|topology| topology.nodes.iter().all(|node| !node.progress.get().is_empty()))
        .await;
    let write = slow(&gates, 1, "/kv/slow?wait=900").await;
    let asked = client::request(gates[0].admin(), "POST", "/api/handoff?to=app-1", "", b"").await;
    let answer = asked.expect("an answer");
    let report: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
    assert_eq!((answer.status, report["outcome"].as_str()), (200, Some("done")), "{report}");
    assert_eq!(report["instances"].as_array().expect("a list").len(), 2, "each once: {report}");
    assert!(report["steps"][0]["seconds"].as_f64().expect("a number") > 0.3, "{report}");
    assert_eq!(write.await.expect("it ran").status, 200);
    // Without the other one nothing is handed over.
    let [first, second] = gates;
    drop(second);
    let asked = client::request(first.admin(), "POST", "/api/handoff?to=app-0", "", b"").await;
    let answer = asked.expect("an answer");
    let report: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
    assert_eq!((answer.status, report["outcome"].as_str()), (502, Some("unreached")), "{report}");
    assert_eq!(first.cluster.primary(), Some(1));
    assert!(!is_holding(&first).await);
}
