//! Reload and drain lose nothing; the admin listener tells.

use std::time::Duration;

use litegate::{
    app::Ended,
    config::load,
    testkit::client::{self, Conn},
};

use crate::gate::{self, Gate};

#[tokio::test]
async fn a_drain_finishes_what_runs_and_closes_after_it() {
    let gate = Gate::start().await;
    let address = gate.address();
    let slow =
        tokio::spawn(async move { client::request(address, "GET", "/sleep/600", "", b"").await });
    let mut kept = gate.conn().await;
    kept.request("GET", "/whoami", "", b"").await.expect("an answer");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (_cluster, running) = gate.into_running();
    running.drain();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let last = kept.request("GET", "/whoami", "", b"").await.expect("a last answer");
    assert_eq!((last.status, last.field("connection")), (200, Some("close")));
    let slow = slow.await.expect("the task ends").expect("it is answered");
    assert_eq!((slow.status, slow.complete), (200, true));
    let ended = tokio::task::spawn_blocking(move || running.join()).await.expect("it ends");
    assert_eq!(ended, Ended::Drained);
    assert!(Conn::open(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_reload_under_load_loses_no_request() {
    let gate = Gate::start().await;
    let address = gate.address();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn(async move {
                let mut conn = Conn::open(address).await.expect("litegate listens");
                for _ in 0..200 {
                    let answer = conn.request("GET", "/whoami", "", b"").await.expect("kept alive");
                    assert_eq!(answer.status, 200);
                }
            })
        })
        .collect();
    let keys = r#"primary = { type = "litefs", poll = "100ms" }"#;
    for n in 1..=5 {
        let text = gate::config(&gate.cluster, &format!("{keys}\nmax_idle = {n}"));
        let config = load::parse("test.toml", &text, []).expect("it is right");
        gate.running().reload(config).await.expect("it is applied");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    for client in clients {
        client.await.expect("no request was lost");
    }
}

#[tokio::test]
async fn a_reload_that_needs_a_restart_changes_nothing() {
    let gate = Gate::start().await;
    let keys = r#"primary = { type = "litefs", poll = "100ms" }"#;
    let text = gate::config(&gate.cluster, keys).replace("workers = 2", "workers = 3");
    let config = load::parse("test.toml", &text, []).expect("it is right");
    let refused = gate.running().reload(config).await.expect_err("it needs a restart");
    assert!(refused.contains("server.workers"), "{refused}");
    assert_eq!(gate.send("GET", "/whoami", b"").await.status, 200);
}

#[tokio::test]
async fn the_admin_listener_tells_what_is_believed() {
    let gate = Gate::start().await;
    gate.send("POST", "/kv/a", b"x").await;
    let get = |path: &'static str| client::request(gate.admin(), "GET", path, "", b"");
    for path in ["/livez", "/readyz", "/healthz"] {
        assert_eq!(get(path).await.expect("an answer").status, 200, "{path}");
    }
    let topology = get("/api/topology").await.expect("an answer");
    let topology: serde_json::Value = serde_json::from_slice(&topology.body).expect("JSON");
    assert_eq!(topology["app"]["primary"], "app-0");
    let metrics = get("/metrics").await.expect("an answer").text();
    assert!(metrics.contains("litegate_is_primary{cluster=\"app\",node=\"app-0\"} 1"), "{metrics}");
    assert!(metrics.contains("class=\"write\",method=\"POST\",code=\"200\"} 1"), "{metrics}");
    assert_eq!(get("/nothing").await.expect("an answer").status, 404);
}
