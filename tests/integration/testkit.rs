//! The fake cluster keeps LiteFS's contract as far as others rely on it.

use std::time::Duration;

use litegate::testkit::{
    Cluster, Options,
    client::{self, Conn, Response},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    net::TcpStream,
    time::{Instant, timeout},
};

const SLOW: Duration = Duration::from_hours(1);
/// The longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(10);

async fn start(options: Options) -> Cluster {
    Cluster::start(options).await.expect("loopback has ports")
}

async fn send(to: std::net::SocketAddr, method: &str, target: &str, fields: &str) -> Response {
    client::request(to, method, target, fields, b"x").await.expect("an answer")
}

fn json(response: &Response) -> serde_json::Value {
    serde_json::from_slice(&response.body).expect("JSON")
}

async fn events(api: std::net::SocketAddr) -> Lines<BufReader<TcpStream>> {
    let mut conn = Conn::open(api).await.expect("the API listens");
    conn.send("GET /events HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it reads");
    let mut lines = BufReader::new(conn.stream).lines();
    while !lines.next_line().await.expect("a head").expect("a head").is_empty() {}
    lines
}

async fn event(lines: &mut Lines<BufReader<TcpStream>>) -> serde_json::Value {
    let line = timeout(PATIENCE, lines.next_line()).await.expect("in time");
    serde_json::from_str(&line.expect("the stream goes on").expect("a line")).expect("JSON")
}

#[tokio::test]
async fn a_read_waits_for_the_cookie_s_transaction_and_then_gives_up() {
    let options =
        Options { replication: SLOW, txid_wait: Duration::from_millis(200), ..Options::default() };
    let cluster = start(options).await;
    let [primary, replica, _] = cluster.places() else { panic!("three nodes") };
    let written = send(primary.proxy, "POST", "/kv/a", "").await;
    let cookie = written.field("set-cookie").expect("LiteFS's cookie");
    assert!(cookie.starts_with("__txid=0000000000000001; Path=/; Expires="), "{cookie}");
    assert!(cookie.ends_with(" GMT; HttpOnly"), "{cookie}");
    // A database that a replica does not have yet is not waited for.
    let fields = "cookie: a=b; __txid=0000000000000001\r\n";
    assert_eq!(json(&send(replica.proxy, "GET", "/kv/a", fields).await)["count"], 0);

    cluster.delay(1, Some(Duration::ZERO));
    cluster.settled_on(1).await;
    assert_eq!(json(&send(replica.proxy, "GET", "/kv/a", fields).await)["count"], 1);
    cluster.delay(1, Some(SLOW));
    send(primary.proxy, "POST", "/kv/a", "").await;
    let fields = "cookie: __txid=0000000000000002\r\n";
    let began = Instant::now();
    assert_eq!(send(replica.proxy, "GET", "/kv/a", fields).await.status, 504);
    assert!(began.elapsed() >= options.txid_wait);
    let late = async {
        tokio::task::yield_now().await;
        cluster.delay(1, Some(Duration::ZERO));
    };
    let (read, ()) = tokio::join!(send(replica.proxy, "GET", "/kv/a", fields), late);
    assert_eq!(json(&read)["count"], 2);
}

#[tokio::test]
async fn events_and_vars_tell_positions_also_when_they_go_backwards() {
    let cluster = start(Options { replication: SLOW, ..Options::default() }).await;
    let [old, new, _] = cluster.places() else { panic!("three nodes") };
    let mut lines = events(old.api).await;
    assert_eq!(event(&mut lines).await["type"], "init");
    send(old.proxy, "POST", "/kv/lost", "").await;
    let lost = event(&mut lines).await;
    assert_eq!((&lost["type"], &lost["db"]), (&"tx".into(), &"app.db".into()));
    assert_eq!(lost["data"]["txID"], "0000000000000001");

    cluster.seize(1);
    assert_eq!(send(new.proxy, "POST", "/kv/kept", "").await.status, 200);
    let vars = json(&send(new.api, "GET", "/debug/vars", "").await);
    let kept = &vars["store"]["dbs"]["app.db"];
    assert_eq!(kept["txid"], lost["data"]["txID"]);
    assert_ne!(kept["checksum"], lost["data"]["postApplyChecksum"]);

    // The old primary says that it is none, then whom it follows, then what it took over.
    for _ in 0..2 {
        assert_eq!(event(&mut lines).await["type"], "primaryChange");
    }
    cluster.delay(0, Some(Duration::ZERO));
    let again = event(&mut lines).await;
    assert_eq!(again["data"]["txID"], lost["data"]["txID"]);
    assert_eq!(again["data"]["postApplyChecksum"], kept["checksum"]);
    assert_eq!((cluster.count(0, "lost"), cluster.count(0, "kept")), (0, 1));
    assert_eq!(cluster.written("lost").on, [0]);
}

#[tokio::test]
async fn promote_hands_over_without_loss() {
    let cluster = start(Options { replication: SLOW, ..Options::default() }).await;
    let [old, new, _] = cluster.places() else { panic!("three nodes") };
    send(old.proxy, "POST", "/kv/a", "").await;
    assert_eq!(send(new.api, "GET", "/promote", "").await.status, 405);
    assert_eq!(send(new.api, "POST", "/promote", "").await.status, 200);
    assert_eq!(cluster.primary(), Some(1));
    assert_eq!(json(&send(new.proxy, "GET", "/kv/a", "").await)["values"][0], "x");
    let replay = send(old.proxy, "POST", "/kv/a", "").await;
    assert_eq!((replay.field("fly-replay"), replay.body.len()), (Some("instance=app-1"), 0));
    let readonly = send(old.app, "POST", "/kv/a", "").await;
    assert_eq!(readonly.status, 500);
    assert!(readonly.text().contains("readonly"));
    cluster.step_down();
    assert_eq!(send(old.api, "POST", "/promote", "").await.status, 500);
}

#[tokio::test]
async fn each_database_has_a_position_of_its_own() {
    let databases: &[&str] = &["app.db", "other.db"];
    let cluster = start(Options { databases, ..Options::default() }).await;
    let primary = &cluster.places()[0];
    send(primary.proxy, "POST", "/kv/a?db=other.db", "").await;
    send(primary.proxy, "PUT", "/kv/a?db=other.db", "").await;
    assert_eq!((cluster.position_of(0, 0).txid, cluster.position_of(0, 1).txid), (0, 2));
    let read = json(&send(primary.proxy, "GET", "/kv/a?db=other.db", "").await);
    assert_eq!(read["values"], serde_json::json!(["x"]));
    timeout(PATIENCE, cluster.settled()).await.expect("replicas follow");
    assert_eq!(cluster.position_of(2, 1), cluster.position_of(0, 1));
}
