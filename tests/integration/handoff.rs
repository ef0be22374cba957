//! The planned hand-over: nobody notices, and whatever goes wrong the writes go on.

use std::time::Duration;

use litegate::testkit::{
    Options,
    client::{self, Response},
};
use tokio::time::{Instant, timeout};

use crate::gate::{Gate, Writers};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;
const PATIENCE: Duration = Duration::from_secs(20);

async fn gate(options: Options) -> Gate {
    let gate = Gate::with(options, LITEFS).await;
    gate.send("POST", "/kv/first", b"v").await;
    gate.cluster.settled().await;
    gate.until(|topology| topology.nodes.iter().all(|node| !node.progress.get().is_empty())).await;
    gate
}

async fn hand_over(gate: &Gate, query: &str) -> (u16, serde_json::Value) {
    let target = format!("/api/handoff?{query}");
    let asked = timeout(PATIENCE, client::request(gate.admin(), "POST", &target, "", b"")).await;
    let answer: Response = asked.expect("in time").expect("an answer");
    let body = serde_json::from_slice(&answer.body).expect("JSON");
    (answer.status, body)
}

#[tokio::test]
async fn under_load_it_loses_and_fails_nothing() {
    let gate = gate(Options { replication: Duration::from_millis(30), ..Options::default() }).await;
    let writers = Writers::start(&[gate.address()], "");
    let mut primary = 0;
    for to in [2, 1, 0] {
        let (status, report) = hand_over(&gate, &format!("to=app-{to}&from=app-{primary}")).await;
        assert_eq!((status, report["outcome"].as_str()), (200, Some("done")), "{report}");
        assert_eq!(report["steps"].as_array().expect("steps").len(), 4, "{report}");
        assert_eq!(gate.cluster.primary(), Some(to));
        primary = to;
    }
    writers.finish(&gate.cluster, primary).await;
}

#[tokio::test]
async fn without_a_wish_the_replica_that_has_most_takes_over() {
    let gate = gate(Options::default()).await;
    gate.cluster.stall(1, true);
    gate.send("POST", "/kv/a", b"v").await;
    gate.cluster.settled_on(2).await;
    gate.until(|topology| {
        let at = |name| topology.named(name).map(|n| n.progress.get().only().map(|(_, at)| at));
        at("app-2") == at("app-0")
    })
    .await;
    let (status, report) = hand_over(&gate, "").await;
    assert_eq!((status, report["to"].as_str()), (200, Some("app-2")), "{report}");
}

#[tokio::test]
async fn a_target_that_never_catches_up_is_given_up_and_writes_go_on() {
    let gate = gate(Options::default()).await;
    gate.cluster.stall(1, true);
    gate.send("POST", "/kv/a", b"v").await;
    let (asked, held) = tokio::join!(hand_over(&gate, "to=app-1"), async {
        while gate.metric("litegate_handing_over", "app").await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Reads go on.
        assert_eq!(gate.send("GET", "/kv/first", b"").await.status, 200);
        let (status, second) = hand_over(&gate, "to=app-2").await;
        assert_eq!((status, second["outcome"].as_str()), (409, Some("refused")), "{second}");
        gate.send("POST", "/kv/held", b"v").await
    });
    let (status, report) = asked;
    assert_eq!((status, report["failed"].as_str()), (502, Some("catch up")), "{report}");
    assert_eq!((held.status, gate.cluster.written("held").on), (200, vec![0]));
    assert_eq!(gate.metric("litegate_handing_over", "app").await, 0);
    assert_eq!(gate.send("POST", "/kv/later", b"v").await.status, 200);
}

#[tokio::test]
async fn a_target_that_dies_is_given_up_and_writes_go_on() {
    let gate = gate(Options::default()).await;
    gate.cluster.stall(1, true);
    gate.send("POST", "/kv/a", b"v").await;
    let ((status, report), ()) = tokio::join!(hand_over(&gate, "to=app-1"), async {
        while gate.metric("litegate_handing_over", "app").await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        gate.cluster.kill(1);
    });
    assert_eq!((status, report["outcome"].as_str()), (502, Some("failed")), "{report}");
    assert_eq!(report["primary"], "app-0");
    assert_eq!(gate.send("POST", "/kv/later", b"v").await.status, 200);
}

#[tokio::test]
async fn writes_under_way_are_waited_for() {
    let gate = gate(Options::default()).await;
    let before = gate.cluster.served(0);
    let slow = gate.send("POST", "/kv/slow?wait=700", b"v");
    let ((status, report), slow) = tokio::join!(
        async {
            while gate.cluster.served(0) == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            hand_over(&gate, "to=app-1").await
        },
        slow
    );
    assert_eq!((status, slow.status), (200, 200), "{report}");
    assert_eq!(gate.cluster.written("slow").on, [0]);
    assert!(report["steps"][0]["seconds"].as_f64().expect("a number") > 0.3, "{report}");
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_before_anything_is_held() {
    let gate = gate(Options::default()).await;
    let began = Instant::now();
    for (query, status) in [
        ("to=nobody", 404),
        ("cluster=other", 404),
        ("to=app-0", 200),
        ("from=app-1", 200),
        ("from=app-0&to=app-0", 200),
    ] {
        let (got, report) = hand_over(&gate, query).await;
        assert_eq!(got, status, "{query}: {report}");
    }
    assert_eq!(gate.cluster.primary(), Some(0));
    let page = client::request(gate.admin(), "POST", "/api/handoff", "origin: http://a\r\n", b"");
    assert_eq!(page.await.expect("an answer").status, 403);
    let get = client::request(gate.admin(), "GET", "/api/handoff", "", b"").await;
    assert_eq!(get.expect("an answer").status, 405);
    assert!(began.elapsed() < PATIENCE);
}

#[tokio::test]
async fn where_no_write_may_wait_there_is_no_hand_over() {
    let keys = format!("{LITEFS}\nhold = {{ timeout = \"0s\" }}");
    let gate = Gate::with(Options::default(), &keys).await;
    let (status, report) = hand_over(&gate, "").await;
    assert_eq!((status, report["outcome"].as_str()), (409, Some("refused")), "{report}");
    assert_eq!(gate.cluster.primary(), Some(0));
}

/// Runs the program against the gate. Returns its exit code and what it said.
async fn litegate(gate: &Gate, arguments: &[&str]) -> (i32, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.args(arguments).args(["--admin", &format!("http://{}", gate.admin())]);
    let output = timeout(PATIENCE, command.kill_on_drop(true).output()).await;
    let output = output.expect("in time").expect("the program was built");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().expect("it ends by itself"), String::from_utf8_lossy(&said).into_owned())
}

#[tokio::test]
async fn the_commands_say_what_happened_by_word_and_exit_code() {
    let gate = gate(Options::default()).await;
    let (code, said) = litegate(&gate, &["status"]).await;
    assert!(code == 0 && said.contains("cluster app: primary app-0"), "{said}");
    assert!(said.contains("app.db 1/"), "{said}");
    let (code, said) = litegate(&gate, &["handoff", "--from", "app-0", "--to", "app-2"]).await;
    assert!(code == 0 && said.contains("app-2 is primary, before it app-0"), "{said}");
    let (code, said) = litegate(&gate, &["handoff", "--from", "app-0", "--wait"]).await;
    assert!(code == 0 && said.contains("nothing to do"), "{said}");
    assert_eq!(litegate(&gate, &["handoff", "--to", "nobody"]).await.0, 4);
    for (host, wanted) in [("app-0", "app-0 is not primary"), ("app-2", "before it app-2")] {
        let mut here = tokio::process::Command::new(env!("CARGO_BIN_EXE_litegate"));
        let admin = gate.admin().to_string();
        here.args(["handoff", "--from-here", "--to", "app-1", "--admin", &admin]);
        let output = timeout(PATIENCE, here.env("HOSTNAME", host).output()).await;
        let output = output.expect("in time").expect("the program was built");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains(wanted), "{host}: {output:?}");
    }
    gate.cluster.step_down();
    gate.until(|topology| topology.primary.is_none()).await;
    assert_eq!(litegate(&gate, &["status"]).await.0, 1);
    assert_eq!(litegate(&gate, &["handoff"]).await.0, 4);
    let waits = ["handoff", "--to", "app-1", "--wait", "--timeout", "15s"];
    let (waited, ()) = tokio::join!(litegate(&gate, &waits), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        gate.cluster.promote(0);
    });
    assert!(waited.0 == 0 && waited.1.contains("app-1 is primary"), "{}", waited.1);
}

#[tokio::test]
async fn a_drain_is_waited_for_and_loses_nothing() {
    let gate = gate(Options::default()).await;
    let before = gate.cluster.served(0);
    let slow = gate.send("POST", "/kv/slow?wait=700", b"v");
    let drain = async {
        while gate.cluster.served(0) == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        litegate(&gate, &["drain", "--wait"]).await
    };
    let (slow, (code, said)) = tokio::join!(slow, drain);
    assert_eq!(slow.status, 200);
    assert!(code == 0 && said.contains("drained"), "{said}");
    // Nobody is there any more.
    assert_eq!(litegate(&gate, &["status"]).await.0, 5);
}
