//! The judge finds what is wrong with a deployment, and nothing where nothing is.

use std::{net::SocketAddr, process::Command, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use litegate::{
    app,
    config::load,
    testkit::{Bug, Cluster, Options, client},
    verify::{
        self, Carry, Run, Settings, Workload,
        judge::{Breach, Verdict},
        report::{self, Conclusion},
    },
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinSet,
};

use crate::{
    gate::{self, Gate},
    tls::{Authority, listening},
};

const LITEFS: &str = r#"primary = { type = "litefs", poll = "100ms" }"#;

fn settings(targets: &[SocketAddr]) -> Settings {
    let target = |address: &SocketAddr| format!("http://{address}").parse().expect("a URL");
    Settings {
        targets: targets.iter().map(target).collect(),
        host: None,
        tls: None,
        clients: 6,
        carry: vec![Carry::Cookies, Carry::Token],
        duration: Duration::from_secs(20),
        // Other tests run beside this one.
        rate: 300,
        workload: Workload::Both,
        keys: 2,
        append: "POST /kv/{key}".parse().expect("a template"),
        set: "PUT /kv/{key}".parse().expect("a template"),
        read: "GET /kv/{key}".parse().expect("a template"),
        body: "{value}".into(),
        content_type: "text/plain".into(),
        timeout: Duration::from_secs(10),
        settle: Duration::from_millis(500),
        empty_is_success: false,
        run: fastrand::u32(..),
    }
}

/// A first transaction on every node: LiteFS lets reads of a database that a node does not have
/// yet through at once, whatever their cookie wants.
async fn seed(cluster: &Cluster) {
    let primary = cluster.places()[0].proxy;
    let first = client::request(primary, "POST", "/kv/first", "", b"x").await;
    assert_eq!(first.expect("the primary answers").status, 200);
    cluster.settled().await;
}

/// Runs until the story is told: it hears how far the run is and says when it may end.
async fn run(settings: Settings, mut is_over: impl FnMut(&Verdict) -> bool) -> Run {
    let over = Arc::new(Notify::new());
    let stop = Arc::clone(&over);
    let progress = |_, verdict: &Verdict| {
        if is_over(verdict) {
            over.notify_one();
        }
    };
    let run = verify::run(settings, async move { stop.notified().await }, progress).await;
    run.unwrap_or_else(|error| panic!("it could not judge: {error}"))
}

fn is_kept(run: &Run) -> bool {
    Conclusion::of(&run.verdict, &[]) == Conclusion::Kept
}

/// A method router as it is usually written: writes go to pod 0, reads to all pods in turn.
struct Router {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Router {
    async fn before(cluster: &Cluster) -> Self {
        let pods: Arc<[SocketAddr]> = cluster.places().iter().map(|place| place.proxy).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            for turn in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let pods = Arc::clone(&pods);
                let service = service_fn(move |request: Request<Incoming>| {
                    let is_read = request.method() == "GET";
                    let pod = if is_read { pods[turn % pods.len()] } else { pods[0] };
                    forward(pod, request)
                });
                connections.spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { address, _tasks: tasks }
    }
}

async fn forward(
    pod: SocketAddr,
    request: Request<Incoming>,
) -> hyper::Result<Response<Full<Bytes>>> {
    let exchange = async {
        let stream = TcpStream::connect(pod).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It drops the sender at its end, and with it the connection.
        let answer = async move {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Response::from_parts(head, body))
        };
        let (answer, ()) = tokio::join!(answer, async {
            let _ = connection.await;
        });
        answer
    };
    let answer = exchange.await.unwrap_or_else(|_| {
        let mut answer = Response::new(Bytes::from("Bad Gateway"));
        *answer.status_mut() = http::StatusCode::BAD_GATEWAY;
        answer
    });
    Ok(answer.map(Full::new))
}

/// Two litegates in turn, with nothing shared, while the role moves from node to node.
#[tokio::test]
async fn litegate_keeps_its_word_while_the_role_moves() {
    let gate = Gate::start().await;
    seed(&gate.cluster).await;
    let config = load::parse("second.toml", &gate::config(&gate.cluster, LITEFS), []);
    let second = app::start(config.unwrap_or_else(|faults| panic!("{faults}")));
    let second = second.expect("litegate starts");
    let (mut moves, mut due) = (0, 40);
    let run = run(settings(&[gate.address(), second.listeners[0]]), |verdict| {
        if verdict.counts.acknowledged < due {
            return false;
        }
        due = verdict.counts.acknowledged + 40;
        moves += 1;
        gate.cluster.promote(moves % 3);
        moves == 6
    })
    .await;
    second.stop();
    second.join();
    let verdict = &run.verdict;
    // A token is the position of a client's own last write. What it has only read, on a node that
    // was ahead, the next replica may not have yet: that is not promised.
    let conclusion = Conclusion::of(verdict, &[Breach::NonMonotonic]);
    assert_eq!(conclusion, Conclusion::Kept, "{}", report::text(&run, &[]));
    assert!(verdict.counts.acknowledged >= 240, "{:?}", verdict.counts);
    assert_eq!(verdict.counts.failed_reads, 0, "{:?}", verdict.counts);
    for node in ["app-0", "app-1", "app-2"] {
        assert!(verdict.counts.nodes.contains_key(node), "{:?}", verdict.counts.nodes);
    }
}

/// Writes to pod 0 whoever is primary: what an ingress with a method rule does.
#[tokio::test]
async fn method_routing_breaks_its_word_in_a_failover() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    seed(&cluster).await;
    let router = Router::before(&cluster).await;
    // Cookies alone: LiteFS's proxy heeds its own, and knows no other token.
    let browsers = Settings { carry: vec![Carry::Cookies], ..settings(&[router.address]) };
    let before = run(browsers, |v| v.counts.acknowledged >= 50).await;
    assert!(is_kept(&before), "{}", report::text(&before, &[]));
    let after = run(settings(&[router.address]), |verdict| {
        if verdict.counts.acknowledged >= 50 && cluster.primary() == Some(0) {
            cluster.promote(1);
        }
        verdict.count(Breach::Leaked) >= 20
    })
    .await;
    let verdict = &after.verdict;
    assert!(verdict.count(Breach::Leaked) >= 20 && verdict.count(Breach::Empty) >= 20);
    assert_eq!(Conclusion::of(verdict, &[]), Conclusion::Violated);
    // Which of the breaches comes first is chance.
    let text = report::text(&after, &[]);
    let first = verdict.violations.first().expect("there is one");
    assert!(text.contains(&first.text), "{text}");
}

/// Runs against a cluster that is broken in this way, with litegate before it.
async fn broken(bug: Bug, breach: Breach) -> Run {
    let gate = Gate::start().await;
    seed(&gate.cluster).await;
    gate.cluster.bug(Some(bug));
    run(settings(&[gate.address()]), |verdict| {
        let is_enough = verdict.counts.acknowledged + verdict.counts.ambiguous >= 80;
        // What is lost shows at the end.
        verdict.count(breach) > 0 || (is_enough && breach == Breach::Lost)
    })
    .await
}

#[tokio::test]
async fn every_seeded_bug_is_found() {
    let bugs = [
        (Bug::Twice, Breach::Repeated),
        (Bug::Dropped, Breach::Lost),
        (Bug::Stale, Breach::Stale),
        (Bug::Backwards, Breach::NonMonotonic),
        (Bug::Resurrected, Breach::Stale),
        (Bug::Invented, Breach::Phantom),
        (Bug::Silent, Breach::Empty),
    ];
    for (bug, breach) in bugs {
        let run = broken(bug, breach).await;
        let text = report::text(&run, &[]);
        assert!(run.verdict.count(breach) > 0, "{bug:?} is not found:\n{text}");
        assert_eq!(Conclusion::of(&run.verdict, &[]), Conclusion::Violated);
        let first = run.verdict.violations.first().expect("one is kept");
        assert!(!first.trace.is_empty(), "{bug:?} has no trace:\n{text}");
    }
}

/// A replica that takes a write itself, reached by spreading requests over all nodes.
#[tokio::test]
async fn a_write_that_a_replica_kept_to_itself_is_found() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    cluster.bug(Some(Bug::Local));
    let all: Vec<SocketAddr> = cluster.places().iter().map(|place| place.proxy).collect();
    let run = run(settings(&all), |verdict| verdict.counts.acknowledged >= 80).await;
    assert!(run.verdict.count(Breach::Lost) > 0, "{}", report::text(&run, &[]));
}

/// A lease moves without a hand-over, with litegate before it: no proxy can save what the old
/// primary had not sent.
async fn lossy_failover(consistency: &str) -> Run {
    let slow = Options {
        replication: Duration::from_millis(50),
        txid_wait: Duration::from_millis(200),
        // LiteFS waits a whole second before it takes another history for its own. News of that
        // travel in a millisecond, but not in none.
        attach: Duration::from_millis(200),
        ..Options::default()
    };
    let keys = format!("{LITEFS}\nconsistency = {{ {consistency} }}");
    let gate = Gate::with(slow, &keys).await;
    seed(&gate.cluster).await;
    let settings = Settings { settle: Duration::from_secs(1), ..settings(&[gate.address()]) };
    let mut due = 100;
    run(settings, |verdict| {
        let is_time = verdict.counts.acknowledged >= due;
        if verdict.counts.acknowledged + 30 >= due && gate.cluster.primary() == Some(0) {
            // From here on there is something to lose.
            gate.cluster.delay(1, Some(Duration::from_hours(1)));
        }
        if is_time && gate.cluster.primary() == Some(0) {
            gate.cluster.seize(1);
            gate.cluster.delay(1, None);
            due += 50;
            return false;
        }
        is_time
    })
    .await
}

#[tokio::test]
async fn what_a_lossy_failover_lost_is_found() {
    let run = lossy_failover("mode = \"off\"").await;
    assert!(run.verdict.count(Breach::Lost) > 0, "{}", report::text(&run, &[]));
    assert_eq!(run.verdict.counts.lost_announced, 0, "{}", report::text(&run, &[]));
    assert_eq!(run.verdict.count(Breach::Repeated), 0, "{}", report::text(&run, &[]));
}

#[tokio::test]
async fn with_tokens_a_lossy_failover_repeats_nothing_and_its_losses_are_found() {
    let run = lossy_failover("mode = \"token\"").await;
    let found = run.verdict.count(Breach::Lost) + run.verdict.counts.lost_announced;
    assert!(found > 0, "{}", report::text(&run, &[]));
    assert_eq!(run.verdict.count(Breach::Repeated), 0, "{}", report::text(&run, &[]));
}

#[tokio::test]
async fn with_tokens_every_loss_is_told_before_it_shows() {
    let run = lossy_failover("mode = \"token\"").await;
    assert!(run.verdict.counts.lost_announced > 0, "{}", report::text(&run, &[]));
    let conclusion = Conclusion::of(&run.verdict, &[Breach::NonMonotonic]);
    assert_eq!(conclusion, Conclusion::Kept, "{}", report::text(&run, &[]));
}

#[tokio::test]
async fn the_document_names_every_breach_and_every_field_of_the_report() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    cluster.bug(Some(Bug::Twice));
    let primary = [cluster.places()[0].proxy];
    let run = run(settings(&primary), |v| v.count(Breach::Repeated) > 0).await;
    let document = include_str!("../../docs/verify.md");
    let report = report::json(&run, &[]);
    let violation = &report["violations"][0];
    let levels = [&report, &report["writes"], &report["reads"], violation, &violation["trace"][0]];
    let fields = levels.into_iter().flat_map(|level| level.as_object().expect("an object").keys());
    let breaches = Breach::ALL.map(|breach| breach.as_str().to_owned());
    for name in fields.chain(&breaches) {
        assert!(document.contains(&format!("`{name}`")), "docs/verify.md does not say `{name}`");
    }
}

/// Runs the program.
async fn verify(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.arg("verify").args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.expect("it runs").expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn the_command_tells_by_its_exit_code_and_its_report() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let url = format!("http://{}", cluster.places()[0].proxy);
    let short = ["--duration", "600ms", "--rate", "300", "--settle", "300ms", "--clients", "3"];
    let with = |more: &[&'static str]| [&[&*url], &short[..], more].concat();

    let (code, out, err) = verify(&with(&["--report", "-", "--workload", "append"])).await;
    assert_eq!(code, Some(0), "{out}{err}");
    let json: serde_json::Value = serde_json::from_str(&out).expect("the report is JSON");
    assert_eq!((&json["conclusion"], &json["version"]), (&"kept".into(), &1.into()));
    assert!(json["writes"]["acknowledged"].as_u64() > Some(0));
    assert!(err.contains("kept"), "{err}");

    cluster.bug(Some(Bug::Twice));
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("report.json");
    let file = file.to_str().expect("UTF-8");
    let (code, out, err) = verify(&[&with(&[])[..], &["--report", file]].concat()).await;
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("VIOLATED") && out.contains("more than once"), "{out}");
    let json = std::fs::read(file).expect("a report");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("the report is JSON");
    assert_eq!(json["violations"][0]["breach"], "repeated");
    assert!(!json["violations"][0]["trace"].as_array().expect("a list").is_empty());
    let (code, out, _) = verify(&with(&["--allow", "repeated"])).await;
    assert_eq!(code, Some(0), "{out}");
    cluster.bug(None);

    let (code, _, err) = verify(&with(&["--append", "POST /nowhere/{key}"])).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("404") && err.contains("--append"), "{err}");
    let (code, _, err) = verify(&with(&["--read", "GET /whoami/{key}"])).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("--read"), "{err}");
    cluster.kill(0);
    let (code, _, err) = verify(&["http://127.0.0.1:1", "--duration", "1s"]).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("refused"), "{err}");
    let (code, _, err) = verify(&["https://127.0.0.1:1", "--ca", "/nowhere/ca.crt"]).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("/nowhere/ca.crt"), "{err}");
}

/// `litegate verify` of a TLS listener, by these protocols. Its exit code and what it says.
async fn over_tls(protocols: &str, trust: impl Fn(&Authority) -> Vec<String>) -> (i32, String) {
    let authority = Authority::new();
    let own = authority.write(authority.directory.path(), "gate", &["app.test"]);
    let tls = format!("protocols = {protocols}\ntls = {{ certificates = [{own}] }}\n");
    let gate = listening(&tls, |text| text).await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.args(["verify", &format!("https://{}", gate.address()), "--host", "app.test"]);
    command.args(["--duration", "2s", "--clients", "2"]).args(trust(&authority));
    let output = command.kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_mins(1), output).await;
    let output = output.expect("in time").expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

#[tokio::test]
async fn it_speaks_tls_and_believes_whom_it_is_told_to() {
    let ca = |authority: &Authority| {
        vec!["--ca".to_owned(), authority.path("ca.crt").display().to_string()]
    };
    for protocols in [r#"["h2"]"#, r#"["http/1.1"]"#] {
        let (code, said) = over_tls(protocols, ca).await;
        assert_eq!(code, 0, "{protocols}: {said}");
    }
    let (code, said) = over_tls(r#"["h2", "http/1.1"]"#, |_| vec!["--insecure".to_owned()]).await;
    assert_eq!(code, 0, "{said}");
    let another = Authority::new();
    let (code, said) = over_tls(r#"["h2", "http/1.1"]"#, |_| ca(&another)).await;
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("invalid peer certificate"), "{said}");
}
