//! What a scrape says is what happened.

use std::time::Duration;

use litegate::testkit::{Options, client};
use tokio::time::{Instant, sleep};

use crate::gate::Gate;

async fn value(gate: &Gate, series: &str) -> Option<f64> {
    let page = client::request(gate.admin(), "GET", "/metrics", "", b"").await.expect("a page");
    let page = page.text();
    let mut lines = page.lines().filter_map(|line| line.rsplit_once(' '));
    lines.find(|(name, _)| *name == series).and_then(|(_, value)| value.parse().ok())
}

/// Waits until the series has that value.
async fn until(gate: &Gate, series: &str, want: f64) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let is = value(gate, series).await;
        if is.is_some_and(|is| (is - want).abs() < 1e-9) {
            return;
        }
        assert!(Instant::now() < deadline, "{series} is {is:?}, not {want}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The listener is named as it is configured: with port 0.
fn listener(family: &str) -> String {
    format!("{family}{{listener=\"127.0.0.1:0\"}}")
}

#[tokio::test]
async fn requests_are_in_flight_held_abandoned_and_over() {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\nhold = { timeout = \"20s\" }";
    let gate = Gate::with(Options::default(), keys).await;
    let (in_flight, abandoned) = (
        listener("litegate_http_requests_in_flight"),
        listener("litegate_http_requests_abandoned_total"),
    );
    let held = "litegate_held_requests{cluster=\"app\"}";
    assert_eq!(value(&gate, held).await, Some(0.0));

    gate.cluster.kill(0);
    gate.until(|topology| topology.primary.is_none()).await;
    let mut stays = gate.conn().await;
    let mut leaves = gate.conn().await;
    for conn in [&mut stays, &mut leaves] {
        let head = "POST /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello";
        conn.send(head).await.expect("litegate reads");
    }
    until(&gate, held, 2.0).await;
    until(&gate, "litegate_held_bytes{cluster=\"app\"}", 10.0).await;
    until(&gate, &in_flight, 2.0).await;
    drop(leaves);
    until(&gate, held, 1.0).await;
    until(&gate, &in_flight, 1.0).await;
    until(&gate, &abandoned, 1.0).await;
    gate.cluster.promote(1);
    assert_eq!(stays.response(false).await.expect("the new primary answers").status, 200);
    until(&gate, held, 0.0).await;
    until(&gate, &in_flight, 0.0).await;
    until(&gate, "litegate_hold_outcomes_total{cluster=\"app\",outcome=\"resumed\"}", 1.0).await;
    until(&gate, &abandoned, 1.0).await;
}

#[tokio::test]
async fn connections_to_nodes_are_counted_from_first_to_last() {
    let keys = "primary = { type = \"litefs\", poll = \"100ms\" }\nreads = \"primary\"\n\
                timeouts = { pool_idle = \"500ms\" }";
    let gate = Gate::with(Options::default(), keys).await;
    let node = "{cluster=\"app\",node=\"app-0\"";
    let created = format!("litegate_upstream_connect_duration_seconds_count{node}}}");
    let open = format!("litegate_upstream_connections{node},state=\"open\"}}");
    let idle = format!("litegate_upstream_connections{node},state=\"idle\"}}");
    let answered = format!("litegate_upstream_requests_total{node},code=\"2xx\"}}");
    let mut conn = gate.conn().await;
    for _ in 0..3 {
        conn.request("GET", "/whoami", "", b"").await.expect("an answer");
    }
    until(&gate, &answered, 3.0).await;
    until(&gate, &created, 1.0).await;
    until(&gate, &open, 0.0).await;
    until(&gate, &idle, 0.0).await;

    conn.send("GET /sleep/3000 HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("litegate reads");
    until(&gate, &open, 1.0).await;
    until(&gate, &format!("litegate_upstream_requests_in_flight{node}}}"), 1.0).await;
    conn.response(false).await.expect("it wakes up");
    until(&gate, &created, 2.0).await;
}

#[tokio::test]
async fn a_write_that_may_have_run_is_a_retry_that_was_skipped() {
    let gate = Gate::start().await;
    assert_eq!(gate.send("POST", "/fault/reset", b"x").await.status, 502);
    let skipped = "litegate_retries_skipped_total{cluster=\"app\",reason=\"maybe_executed\"}";
    until(&gate, skipped, 1.0).await;
}

#[tokio::test]
async fn the_process_and_its_configuration_are_told_of() {
    let gate = Gate::start().await;
    until(&gate, "litegate_workers", 2.0).await;
    let build = format!("litegate_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(value(&gate, &build).await, Some(1.0));
    let started = value(&gate, "process_start_time_seconds").await.expect("a time");
    let applied = "litegate_config_last_reload_success_timestamp_seconds";
    assert!(started > 1.7e9 && value(&gate, applied).await.expect("a time") >= started - 1.0);
    for series in ["process_resident_memory_bytes", "process_open_fds", "process_max_fds"] {
        assert!(value(&gate, series).await.is_some_and(|value| value > 1.0), "{series}");
    }
    until(&gate, "litegate_observations_dropped_total{cluster=\"app\"}", 0.0).await;
}
