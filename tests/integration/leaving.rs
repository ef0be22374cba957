//! Reload and drain lose nothing; the admin listener tells.

use std::{net::SocketAddr, time::Duration};

use litegate::{
    app::Ended,
    config::load,
    testkit::{
        Options,
        client::{self, Conn},
    },
};
use tokio::time::{Instant, timeout};

use crate::{
    gate::{self, Gate},
    h2::until,
};

#[tokio::test]
async fn a_drain_finishes_what_runs_and_closes_after_it() {
    let gate = Gate::start().await;
    let address = gate.address();
    let slow =
        tokio::spawn(async move { client::request(address, "GET", "/sleep/1500", "", b"").await });
    let mut kept = gate.conn().await;
    kept.request("GET", "/whoami", "", b"").await.expect("an answer");
    until(&gate, "litegate_http_requests_in_flight", "", |n| n == 1).await;
    let (_cluster, running) = gate.into_running();
    running.drain();
    // Each worker hears of it in its own time, and whoever is quiet for a second then is closed.
    let last = async {
        loop {
            let last = kept.request("GET", "/whoami", "", b"").await.expect("a last answer");
            assert_eq!(last.status, 200);
            if last.field("connection") == Some("close") {
                return;
            }
        }
    };
    timeout(Duration::from_secs(10), last).await.expect("the last one says so");
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
async fn a_write_that_waits_survives_a_reload_of_what_is_observed() {
    let keys = r#"primary = { type = "litefs", poll = "100ms" }"#;
    let gate = Gate::with(Options::default(), keys).await;
    gate.cluster.step_down();
    gate.until(|topology| topology.primary.is_none()).await;
    let (held, ()) = tokio::join!(gate.send("POST", "/kv/held", b"v"), async {
        while gate.metric("litegate_held_requests", "app").await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let text = gate::config(&gate.cluster, &format!("{keys}\nmax_lag = \"9s\""));
        let config =
            load::parse("test.toml", &text, []).unwrap_or_else(|faults| panic!("{faults}"));
        gate.running().reload(config).await.expect("applied");
        gate.cluster.promote(1);
    });
    assert_eq!((held.status, gate.cluster.written("held").on), (200, vec![1]));
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

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;

/// The gate's configuration with something else in it.
fn config(gate: &Gate, from: &str, to: &str) -> litegate::config::Config {
    let text = gate::config(&gate.cluster, LITEFS);
    assert!(text.contains(from), "{from}");
    load::parse("test.toml", &text.replace(from, to), []).unwrap_or_else(|e| panic!("{e}"))
}

const LISTENER: &str = "[[listener]]\naddress = \"127.0.0.1:0\"";
const OTHER: &str = "[[listener]]\naddress = \"127.0.0.2:0\"\ntrusted_proxies = [\"127.0.0.0/8\"]";

/// Waits until nobody listens there any more.
async fn until_closed(address: SocketAddr) {
    let deadline = Instant::now() + Duration::from_secs(5);
    // A SYN that falls into the moment of closing is lost and sent again, so each try has a limit.
    let refused = || async {
        let tried = timeout(Duration::from_millis(200), Conn::open(address)).await;
        tried.is_ok_and(|opened| opened.is_err())
    };
    while !refused().await {
        assert!(Instant::now() < deadline, "{address} still listens");
    }
}

#[tokio::test]
async fn a_listener_that_moves_loses_no_request() {
    let gate = Gate::start().await;
    let old = gate.address();
    let slow = tokio::spawn(client::request(old, "GET", "/sleep/700", "", b""));
    let mut kept = gate.conn().await;
    assert_eq!(kept.request("GET", "/whoami", "", b"").await.expect("an answer").status, 200);
    let addresses = gate.running().reload(config(&gate, LISTENER, OTHER)).await.expect("applied");
    let [new] = addresses.listeners[..] else { panic!("one listener: {addresses:?}") };
    assert_eq!(new.ip().to_string(), "127.0.0.2");
    let first = client::request(new, "GET", "/whoami", "", b"").await.expect("an answer");
    assert_eq!(first.status, 200);
    let last = kept.request("GET", "/whoami", "", b"").await.expect("a last answer");
    assert_eq!((last.status, last.field("connection")), (200, Some("close")));
    until_closed(old).await;
    let slow = slow.await.expect("the task ends").expect("it is answered");
    assert_eq!((slow.status, slow.complete), (200, true));

    let both = format!("{OTHER}\n{LISTENER}");
    let addresses = gate.running().reload(config(&gate, LISTENER, &both)).await.expect("applied");
    let [kept, back] = addresses.listeners[..] else { panic!("two listeners: {addresses:?}") };
    assert_eq!(kept, new, "a listener that stays keeps its socket");
    for address in [kept, back] {
        let answer = client::request(address, "GET", "/whoami", "", b"").await.expect("an answer");
        assert_eq!(answer.status, 200, "{address}");
    }
}

#[tokio::test]
async fn a_listener_keeps_its_identity_when_one_before_it_is_removed() {
    let gate = Gate::start().await;
    let both = format!("{LISTENER}\n{OTHER}");
    let addresses = gate.running().reload(config(&gate, LISTENER, &both)).await.expect("applied");
    let [untrusting, trusting] = addresses.listeners[..] else { panic!("{addresses:?}") };
    let believed = async |conn: &mut Conn| {
        let answer = conn.request("GET", "/echo", "x-forwarded-for: 192.0.2.9\r\n", b"").await;
        answer.expect("an answer").text().contains("192.0.2.9")
    };
    let mut stranger = Conn::open(untrusting).await.expect("it listens");
    let mut proxy = Conn::open(trusting).await.expect("it listens");
    assert!(!believed(&mut stranger).await);
    assert!(believed(&mut proxy).await);
    gate.running().reload(config(&gate, LISTENER, OTHER)).await.expect("applied");
    assert!(!believed(&mut stranger).await, "its listener believed nobody");
    assert!(believed(&mut proxy).await);
    let mut next = Conn::open(trusting).await.expect("it still listens");
    assert!(believed(&mut next).await);
    let metrics = client::request(gate.admin(), "GET", "/metrics", "", b"").await.expect("text");
    let line = "litegate_downstream_connections{listener=\"127.0.0.2:0\"} 2";
    assert!(metrics.text().contains(line), "{}", metrics.text());
}

#[tokio::test]
async fn as_many_listeners_as_one_likes() {
    let gate = Gate::start().await;
    let many: Vec<_> =
        (1..=40).map(|n| format!("[[listener]]\naddress = \"127.0.2.{n}:0\"")).collect();
    let many = config(&gate, LISTENER, &many.join("\n"));
    let addresses = gate.running().reload(many).await.expect("applied");
    assert_eq!(addresses.listeners.len(), 40);
    for address in addresses.listeners {
        let answer = client::request(address, "GET", "/whoami", "", b"").await.expect("an answer");
        assert_eq!(answer.status, 200, "{address}");
    }
}

#[tokio::test]
async fn the_access_log_is_swapped_without_losing_a_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let (before, after) = (directory.path().join("before"), directory.path().join("after"));
    let gate = Gate::start().await;
    let log = |format: &str, path: &std::path::Path| {
        let to = format!("format = \"{format}\"\noutput = \"{}\"", path.display());
        config(&gate, "format = \"off\"", &to)
    };
    gate.running().reload(log("text", &before)).await.expect("applied");
    for _ in 0..5 {
        gate.send("GET", "/whoami", b"").await;
    }
    let address = gate.address();
    let began = gate.cluster.served(1) + gate.cluster.served(2);
    let slow = tokio::spawn(client::request(address, "GET", "/sleep/400", "", b""));
    let deadline = Instant::now() + Duration::from_secs(5);
    while gate.cluster.served(1) + gate.cluster.served(2) == began {
        assert!(Instant::now() < deadline, "the slow request reaches a node");
        tokio::task::yield_now().await;
    }
    gate.running().reload(log("json", &after)).await.expect("applied");
    for _ in 0..3 {
        gate.send("GET", "/whoami", b"").await;
    }
    slow.await.expect("the task ends").expect("it is answered");
    let (_cluster, running) = gate.into_running();
    running.drain();
    tokio::task::spawn_blocking(move || running.join()).await.expect("it ends");
    let lines = |path| std::fs::read_to_string(path).expect("it was written");
    let (before, after) = (lines(before), lines(after));
    assert_eq!(before.lines().count(), 6, "what began before the swap: {before}");
    assert!(before.contains("/sleep/400"), "{before}");
    assert_eq!(after.lines().count(), 3, "{after}");
    assert!(after.lines().all(|line| line.starts_with('{')), "{after}");
}

#[tokio::test]
async fn the_admin_listener_moves() {
    let gate = Gate::start().await;
    let old = gate.admin();
    let mut scraper = Conn::open(old).await.expect("it listens");
    scraper.request("GET", "/livez", "", b"").await.expect("an answer");
    let admin = "[admin]\naddress = \"127.0.0.1:0\"";
    // To the same port on every address, which overlaps with where it is.
    let to = format!("[admin]\naddress = \"0.0.0.0:{}\"", old.port());
    let addresses = gate.running().reload(config(&gate, admin, &to)).await.expect("applied");
    assert_eq!(addresses.admin.map(|a| a.port()), Some(old.port()));
    let elsewhere = SocketAddr::from(([127, 0, 0, 3], old.port()));
    for address in [elsewhere, old] {
        let answer = client::request(address, "GET", "/livez", "", b"").await.expect("an answer");
        assert_eq!(answer.status, 200, "{address}");
    }
    let end = timeout(Duration::from_secs(5), scraper.request("GET", "/livez", "", b"")).await;
    assert!(end.expect("it is closed").is_err(), "a kept connection does not keep the old one");
    let off = config(&gate, admin, "[admin]\naddress = \"off\"");
    let addresses = gate.running().reload(off).await.expect("applied");
    assert_eq!(addresses.admin, None);
    until_closed(old).await;
    assert_eq!(gate.send("GET", "/whoami", b"").await.status, 200);
}

#[tokio::test]
async fn a_reload_that_fails_in_any_part_changes_nothing() {
    let gate = Gate::start().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    let taken = taken.local_addr().expect("it is bound");
    let text = gate::config(&gate.cluster, LITEFS);
    let refuse = async |to: &[(&str, &str)], why: &str| {
        let changed = to.iter().fold(text.clone(), |text, (from, to)| text.replace(from, to));
        let config = load::parse("test.toml", &changed, []).unwrap_or_else(|e| panic!("{e}"));
        let refused = gate.running().reload(config).await.expect_err("something in it fails");
        assert!(refused.contains(why), "{refused}");
    };
    let admin = "[admin]\naddress = \"127.0.0.1:0\"";
    let blocked = format!("[admin]\naddress = \"{taken}\"");
    let off = (admin, "[admin]\naddress = \"off\"");
    let log = ("format = \"off\"", "format = \"text\"\noutput = \"/nowhere/at/all\"");
    let listener = (LISTENER, "[[listener]]\naddress = \"192.0.2.1:1\"");
    refuse(&[off, listener], "192.0.2.1:1").await;
    refuse(&[(LISTENER, OTHER), (admin, &blocked)], "admin.address").await;
    refuse(&[(LISTENER, OTHER), off, log], "access_log").await;
    assert_eq!(gate.send("GET", "/whoami", b"").await.status, 200);
    let metrics = client::request(gate.admin(), "GET", "/metrics", "", b"").await.expect("text");
    let metrics = metrics.text();
    assert!(metrics.contains("litegate_config_reloads_total{result=\"refused\"} 3"), "{metrics}");
    assert!(metrics.contains("litegate_config_last_reload_successful 0"), "{metrics}");
}

#[tokio::test]
async fn the_number_of_connections_changes_live() {
    let gate = Gate::start().await;
    let limit = |n: usize| config(&gate, "[limits]", &format!("[limits]\nconnections = {n}"));
    let is_served = async |conn: &mut Conn| {
        let asked = conn.request("GET", "/whoami", "", b"");
        timeout(Duration::from_millis(300), asked).await.is_ok_and(|answer| answer.is_ok())
    };
    // One for each of the two workers.
    gate.running().reload(limit(2)).await.expect("applied");
    let mut served = Vec::new();
    let mut waiting = Vec::new();
    for _ in 0..12 {
        let mut conn = gate.conn().await;
        if is_served(&mut conn).await {
            served.push(conn);
        } else {
            waiting.push(conn);
        }
    }
    // Each worker's loop may have taken a place for the next connection before the change.
    assert!((1..=4).contains(&served.len()), "{} of 12", served.len());
    gate.running().reload(limit(100)).await.expect("applied");
    for conn in &mut waiting {
        let answer = timeout(Duration::from_secs(5), conn.response(false)).await;
        assert_eq!(answer.expect("it has a place").expect("an answer").status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_connections_meets_a_closing_listener() {
    let gate = Gate::start().await;
    let mut address = gate.address();
    for turn in 0..2 {
        let clients: Vec<_> = (0..48)
            .map(|_| {
                tokio::spawn(async move {
                    // Until it is refused: but whoever is connected is answered.
                    while let Ok(mut conn) = Conn::open(address).await {
                        let answer = conn.request("GET", "/nothing", "", b"").await;
                        assert_eq!(answer.expect("an answer").status, 404);
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let to = if turn % 2 == 0 { OTHER } else { LISTENER };
        let moved = gate.running().reload(config(&gate, LISTENER, to)).await.expect("applied");
        for client in clients {
            client.await.expect("nobody is reset");
        }
        address = moved.listeners[0];
    }
}
