//! What is ambiguous is refused or made unambiguous, from clients and from nodes.
//!
//! Each row of [`rows`] goes over raw sockets through litegate to a node that writes down every
//! byte, and has to fail against a naive forwarder in litegate's place: a row that can't fail shows
//! nothing. The tables are in `docs/security.md` too.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use litegate::testkit::{Cluster, Options, client::Conn};
use tokio::{io::AsyncReadExt as _, time::timeout};

use self::{
    node::Node,
    rows::{Ask, Gets, H2Row, NodeRow, Reach, Row},
};
use crate::gate::Gate;

mod early;
mod naive;
mod node;
mod rows;

/// For litegate, which answers.
const PATIENCE: Duration = Duration::from_secs(10);
/// For the naive forwarder, whose rows fail either way.
const IMPATIENCE: Duration = Duration::from_secs(3);

/// litegate before that node, and only it.
async fn gate(node: &Node, more: &str) -> Gate {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let text = format!(
        "[server]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \
         \"127.0.0.1:0\"\n[access_log]\nformat = \"off\"\n[limits]\nbody_idle = \"1s\"\n{more}\n\
         [cluster.app]\nport = 1\nmembers = {{ type = \"static\", nodes = [{{ name = \"a\", \
         address = \"{}\" }}] }}\nprimary = {{ type = \"instance\", name = \"a\" }}\n\
         health = {{ eject_after = 100000 }}\n",
        node.address
    );
    let gate = Gate::before(cluster, &text);
    gate.until(|topology| topology.primary.is_some()).await;
    gate
}

/// A request that nobody can misunderstand gets its own answer.
async fn is_clean(through: SocketAddr, patience: Duration) -> Result<(), String> {
    let clean = timeout(patience, async {
        let mut conn = Conn::open(through).await?;
        conn.send("GET /after HTTP/1.1\r\nhost: a\r\n\r\n").await?;
        conn.response(false).await
    });
    match clean.await {
        Ok(Ok(answer)) if answer.status == 200 && answer.body == b"clean" => Ok(()),
        other => Err(format!("the request after it got {other:?}")),
    }
}

/// Takes what came to the node, without the request that shows that it is all.
async fn came(node: &Node, through: SocketAddr, patience: Duration) -> Result<node::Came, String> {
    is_clean(through, patience).await?;
    let mut came = node.take();
    let fence = came.requests.pop().unwrap_or_default();
    if fence != "GET /after HTTP/1.1 | host: a" {
        return Err(format!("the request after it came as {fence:?}"));
    }
    let at = came.raw.windows(10).rposition(|window| window == b"GET /after");
    let at = at.unwrap_or(0);
    came.parsed = came.parsed.saturating_sub(came.raw.len() - at);
    came.raw.truncate(at);
    Ok(came)
}

fn reached(came: &node::Came, reach: &Reach) -> Result<(), String> {
    let raw = String::from_utf8_lossy(&came.raw);
    match reach {
        Reach::Nothing if came.raw.is_empty() => Ok(()),
        // What there is of it is a request's beginning, and nothing else.
        Reach::Part
            if came.requests.is_empty()
                && !came.malformed
                && !raw.contains("smuggled")
                && !raw.contains("\r\n0\r\n") =>
        {
            Ok(())
        }
        Reach::These(these) if came.requests == *these && came.raw.len() == came.parsed => Ok(()),
        _ => Err(format!("{:?} came to the node: {raw:?}", came.requests)),
    }
}

/// What was wrong with a row, of what its client got and of what came to the node.
struct Verdict {
    answers: Result<(), String>,
    reach: Result<(), String>,
}

impl Verdict {
    fn both(self) -> Result<(), String> {
        self.answers.and(self.reach)
    }
}

/// Whether a row is so through whatever listens there.
async fn check(row: &Row, node: &Node, through: SocketAddr, patience: Duration) -> Verdict {
    node.take();
    let answers = answers(row, through, patience).await;
    let came = came(node, through, patience).await;
    let reach = came.and_then(|mut came| {
        if !row.closed && answers.is_ok() {
            // The one that shows that the connection is kept.
            came.requests.pop();
        }
        reached(&came, &row.reach)
    });
    Verdict { answers, reach }
}

/// Whether the client of a row gets what it should.
async fn answers(row: &Row, through: SocketAddr, patience: Duration) -> Result<(), String> {
    let mut conn = Conn::open(through).await.map_err(|error| error.to_string())?;
    // Whoever is refused early may find the socket closed.
    let _ = conn.send(&row.bytes).await;
    for status in &row.answers {
        let answer = timeout(patience, conn.response(false)).await;
        let answer = answer.map_err(|_elapsed| "no answer in time".to_owned())?;
        let answer = answer.map_err(|error| format!("no answer: {error}"))?;
        if answer.status != *status {
            return Err(format!("{} instead of {status}: {}", answer.status, answer.text()));
        }
        let own = answer.field("content-type") == Some("application/problem+json");
        match row.word.filter(|_| *status >= 400) {
            Some(word) if !own || !answer.text().contains(&format!("\"error\":\"{word}\"")) => {
                return Err(format!("not `{word}` but: {}", answer.text()));
            }
            Some(_) if row.closed && answer.field("connection") != Some("close") => {
                return Err("it does not say that it closes".to_owned());
            }
            _ => {}
        }
    }
    if row.closed {
        let mut rest = Vec::new();
        let end = timeout(patience, conn.stream.read_to_end(&mut rest)).await;
        let end = end.map_err(|_elapsed| "the connection stays open".to_owned())?;
        if end.is_err() || !rest.is_empty() {
            return Err(format!("after the answer: {end:?} {:?}", String::from_utf8_lossy(&rest)));
        }
    } else {
        conn.send("GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await
            .map_err(|error| format!("the connection is closed: {error}"))?;
        let next = timeout(patience, conn.response(false)).await;
        match next {
            Ok(Ok(next)) if next.body == b"clean" => {}
            next => return Err(format!("the next request on the connection got {next:?}")),
        }
    }
    Ok(())
}

#[tokio::test]
async fn clients_that_attack_get_nowhere() {
    let node = Node::start().await;
    let gate = gate(&node, "").await;
    let mut faults = String::new();
    for row in rows::requests() {
        let before = gate.metric("litegate_problems_total", row.word.unwrap_or("nothing")).await;
        if let Err(fault) = check(&row, &node, gate.address(), PATIENCE).await.both() {
            let _ = writeln!(faults, "{}: {fault}", row.name);
        } else if let Some(word) = row.word {
            let counted = gate.metric("litegate_problems_total", &format!("\"{word}\"")).await;
            if counted != before + 1 {
                let _ = writeln!(faults, "{}: counted {counted} after {before}", row.name);
            }
        }
    }
    assert!(faults.is_empty(), "{faults}");
    assert_eq!(gate.metric("litegate_underscore_fields_dropped_total", "").await, 2);
}

#[tokio::test]
async fn every_attack_of_a_client_succeeds_against_a_naive_forwarder() {
    let tries = rows::requests().into_iter().map(|row| async move {
        let node = Node::start().await;
        let through = naive::start(node.address).await;
        let fault = check(&row, &node, through, IMPATIENCE).await.reach.err();
        (row.name, row.harmless, fault)
    });
    judge(join_all(tries).await);
}

/// Each row fails, by what comes to the node of a client or to a client of a node, but for those that are said to be harmless.
fn judge(tries: Vec<(&'static str, Option<&'static str>, Option<String>)>) {
    let mut faults = String::new();
    for (name, harmless, fault) in &tries {
        if fault.is_none() != harmless.is_some() {
            let _ = writeln!(faults, "{name}: {harmless:?}, {fault:?}");
        }
    }
    assert!(faults.is_empty(), "{faults}");
    let harmless = tries.iter().filter(|(_, harmless, _)| harmless.is_some()).count();
    assert!(harmless * 20 <= tries.len(), "{harmless} of {} show nothing", tries.len());
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("it is small").to_be_bytes();
    [&[0, length[0], length[1], kind, flags, 0, 0, 0, stream], payload].concat()
}

/// A request over HTTP/2, each field spelled out.
fn h2_request(fields: &[(&str, &str)], data: Option<&str>) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("it is short"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    let mut bytes = [PREFACE, &frame(4, 0, 0, &[])].concat();
    bytes.extend(frame(1, if data.is_some() { 4 } else { 5 }, 1, &block));
    bytes.extend(data.map(|data| frame(0, 1, 1, data.as_bytes())).unwrap_or_default());
    bytes
}

/// What became of stream 1.
#[derive(Debug, Default)]
struct H2Answer {
    /// Its status is 200. Any other is litegate's own here.
    ok: bool,
    body: Vec<u8>,
    /// It ended as it should.
    whole: bool,
}

async fn h2_answer(conn: &mut Conn) -> std::io::Result<H2Answer> {
    let mut answer = H2Answer::default();
    loop {
        let mut head = [0; 9];
        if conn.stream.read_exact(&mut head).await.is_err() {
            return Ok(answer);
        }
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        conn.stream.read_exact(&mut payload).await?;
        match head[3] {
            0 if head[8] == 1 => answer.body.extend(payload),
            1 if head[8] == 1 => answer.ok |= payload.contains(&0x88),
            4 if head[4] & 1 == 0 => conn.send(frame(4, 1, 0, &[])).await?,
            3 | 7 => return Ok(answer),
            _ => {}
        }
        if head[8] == 1 && matches!(head[3], 0 | 1) && head[4] & 1 == 1 {
            answer.whole = true;
            return Ok(answer);
        }
    }
}

async fn check_h2(row: &H2Row, node: &Node, through: SocketAddr, patience: Duration) -> Verdict {
    node.take();
    let answers = h2_answers(row, through, patience).await;
    let reach = match row.passed {
        Some(request) => Reach::These(vec![request.to_owned()]),
        // Of a body that breaks a promise the beginning may be there.
        None if row.in_body => Reach::Part,
        None => Reach::Nothing,
    };
    let reach = came(node, through, patience).await.and_then(|came| reached(&came, &reach));
    Verdict { answers, reach }
}

async fn h2_answers(row: &H2Row, through: SocketAddr, patience: Duration) -> Result<(), String> {
    let mut conn = Conn::open(through).await.map_err(|error| error.to_string())?;
    let _ = conn.send(h2_request(&row.fields, row.data)).await;
    let answer = timeout(patience, h2_answer(&mut conn)).await;
    let answer = answer.map_err(|_elapsed| "no answer in time".to_owned())?;
    let answer = answer.map_err(|error| format!("no answer: {error}"))?;
    let is_good = answer.ok && answer.whole && answer.body == b"clean";
    if is_good == row.passed.is_some() { Ok(()) } else { Err(format!("{answer:?}")) }
}

#[tokio::test]
async fn clients_that_attack_by_http2_get_nowhere() {
    let node = Node::start().await;
    let gate = gate(&node, "").await;
    let mut faults = String::new();
    for row in rows::h2_requests() {
        if let Err(fault) = check_h2(&row, &node, gate.address(), PATIENCE).await.both() {
            let _ = writeln!(faults, "{}: {fault}", row.name);
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

#[tokio::test]
async fn every_attack_by_http2_succeeds_against_a_naive_forwarder() {
    let tries = rows::h2_requests().into_iter().map(|row| async move {
        let node = Node::start().await;
        let through = naive::start(node.address).await;
        let fault = check_h2(&row, &node, through, IMPATIENCE).await.reach.err();
        (row.name, row.harmless, fault)
    });
    judge(join_all(tries).await);
}

async fn check_node(
    row: &NodeRow,
    node: &Node,
    through: SocketAddr,
    patience: Duration,
) -> Result<(), String> {
    node.says(row.script);
    let mut conn = Conn::open(through).await.map_err(|error| error.to_string())?;
    let request = match row.ask {
        Ask::Get => b"GET /evil HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
        Ask::Head => b"HEAD /evil HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
        Ask::Post => b"POST /evil HTTP/1.1\r\nhost: a\r\ncontent-length: 40\r\n\r\n\
            GET /smuggled HTTP/1.1\r\nhost: aaaaaa\r\n\r\n"
            .to_vec(),
        Ask::Http10 => b"GET /evil HTTP/1.0\r\nhost: a\r\n\r\n".to_vec(),
        Ask::Upgrade => {
            b"GET /evil HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
                .to_vec()
        }
        Ask::H2 => h2_request(
            &[(":method", "GET"), (":scheme", "http"), (":path", "/evil"), (":authority", "a")],
            None,
        ),
    };
    conn.send(request).await.map_err(|error| error.to_string())?;
    if row.ask == Ask::H2 {
        let answer = timeout(patience, h2_answer(&mut conn)).await;
        let answer = answer.map_err(|_elapsed| "no answer in time".to_owned())?;
        let answer = answer.map_err(|error| error.to_string())?;
        if answer.whole {
            return Err(format!("{answer:?}"));
        }
        return is_clean(through, patience).await;
    }
    let answer = timeout(patience, conn.response(row.ask == Ask::Head)).await;
    let answer = answer.map_err(|_elapsed| "no answer in time".to_owned())?;
    if answer.is_err() && row.gets == Gets::Broken {
        // It broke off before its head was with the client.
        return is_clean(through, patience).await;
    }
    let answer = answer.map_err(|error| format!("no answer: {error}"))?;
    let own = answer.field("content-type") == Some("application/problem+json");
    let status = answer.status;
    let is_right = match row.gets {
        Gets::Refusal => own && matches!(status, 502..=504) && answer.complete,
        Gets::Bare(code) => !own && status == code && answer.complete && answer.body.is_empty(),
        Gets::Whole(body) => status == 200 && answer.complete && answer.body == body.as_bytes(),
        Gets::Broken => !own && status == 200 && !answer.complete,
    };
    let whole = format!("{answer:?}");
    if !is_right || whole.contains(row.never) {
        return Err(whole);
    }
    if !row.script.later.is_empty() {
        node.says_the_rest().await;
    }
    // What the node said too much is in nobody's answer: not the next of this client, nor of
    // another.
    if matches!(row.gets, Gets::Bare(_) | Gets::Whole(_)) {
        let next = timeout(patience, conn.request("GET", "/after", "", b"")).await;
        match next {
            Ok(Ok(next)) if next.body == b"clean" => {}
            next => return Err(format!("the next request on the connection got {next:?}")),
        }
    }
    is_clean(through, patience).await
}

#[tokio::test]
async fn nodes_that_attack_get_nowhere() {
    let node = Node::start().await;
    let gate = gate(&node, "").await;
    let mut faults = String::new();
    for row in rows::answers() {
        if let Err(fault) = check_node(&row, &node, gate.address(), PATIENCE).await {
            let _ = writeln!(faults, "{}: {fault}", row.name);
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

/// Paths go to the node byte for byte, or not at all.
#[tokio::test]
async fn paths_that_could_be_others_lead_to_one_route_or_nowhere() {
    const ROUTES: &str =
        "[[route]]\npath = \"/search\"\nclass = \"read\"\n[[route]]\npath = \"/\"\n";
    // What the policies `same-route`, `refuse` and `allow` answer.
    let rows = [
        ("/search/a", [200, 200, 200]),
        ("/search/%20%C3%A9?q=/../%2f", [200, 200, 200]),
        ("/search/../orders", [400, 400, 200]),
        ("/search/./a", [200, 400, 200]),
        ("/search/%2e%2e/orders", [400, 400, 200]),
        ("/search/..%2forders", [400, 400, 200]),
        ("/search%2fa", [400, 400, 200]),
        ("/search/..%5Corders", [400, 400, 200]),
        ("/search/..\\orders", [400, 400, 200]),
        ("/search/..;x/orders", [400, 400, 200]),
        ("//search", [400, 400, 200]),
        ("/%73earch", [400, 400, 200]),
        ("/a%2f..%2fb", [200, 400, 200]),
        ("/a//b/../c\\d%00", [200, 400, 200]),
    ];
    for (place, policy) in ["same-route", "refuse", "allow"].into_iter().enumerate() {
        let node = Node::start().await;
        let gate = gate(&node, &format!("ambiguous_paths = \"{policy}\"\n{ROUTES}")).await;
        let mut refused = 0;
        for (path, answers) in rows {
            let row = format!("{policy} {path}");
            let answer = gate.send("POST", path, b"").await;
            assert_eq!(answer.status, answers[place], "{row}");
            let came = node.take();
            if answer.status == 200 {
                let line = format!("POST {path} HTTP/1.1\r\n");
                assert!(came.raw.starts_with(line.as_bytes()), "{row}");
            } else {
                refused += 1;
                assert!(answer.text().contains("\"ambiguous_path\""), "{row}");
                assert!(came.raw.is_empty(), "{row}");
            }
        }
        let counted = gate.metric("litegate_problems_total", "\"ambiguous_path\"").await;
        assert_eq!(counted, refused, "{policy}");
    }
}

#[tokio::test]
async fn underscores_are_dropped_refused_or_allowed() {
    let request = "GET /x HTTP/1.1\r\nhost: a\r\nx_a: 1\r\nx-b: 2\r\nconnection: close\r\n\r\n";
    for (policy, status, came, dropped) in [
        ("drop", 200, Some("GET /x HTTP/1.1 | host: a | x-b: 2"), 1),
        ("refuse", 400, None, 0),
        ("allow", 200, Some("GET /x HTTP/1.1 | host: a | x_a: 1 | x-b: 2"), 0),
    ] {
        let node = Node::start().await;
        let gate = gate(&node, &format!("underscores = \"{policy}\"")).await;
        let mut conn = gate.conn().await;
        conn.send(request).await.expect("it reads");
        let answer = conn.response(false).await.expect("an answer");
        assert_eq!(answer.status, status, "{policy}");
        assert_eq!(node.take().requests.first().map(|request| &**request), came, "{policy}");
        let refused = gate.metric("litegate_problems_total", "\"underscore_field\"").await;
        assert_eq!(refused, u64::from(came.is_none()), "{policy}");
        let counted = gate.metric("litegate_underscore_fields_dropped_total", "").await;
        assert_eq!(counted, dropped, "{policy}");
    }
}

/// `docs/security.md` has the tables. `LITEGATE_BLESS=1` rewrites them.
#[test]
fn the_page_about_security_has_these_tables() {
    const MARK: &str = "<!-- Made from tests/integration/attack. -->\n";
    let head = "\n| what comes | by | what becomes of it |\n|---|---|---|\n";
    let mut tables = format!("\n### Clients, HTTP/1.1\n{head}");
    for row in rows::requests() {
        let becomes = match (row.word, &row.reach) {
            (Some(word), _) => {
                let status = row.answers.last().copied().unwrap_or_default();
                format!("{status} `{word}`, closed")
            }
            (None, Reach::These(these)) => passed_as(&these.join("` and `")),
            (None, _) => "nothing comes to the node".to_owned(),
        };
        let _ = writeln!(tables, "| {} | {} | {becomes} |", row.name, row.why);
    }
    let _ = write!(tables, "\n### Clients, HTTP/2\n{head}");
    for row in rows::h2_requests() {
        let becomes = row.passed.map_or("refused".to_owned(), passed_as);
        let _ = writeln!(tables, "| {} | {} | {becomes} |", row.name, row.why);
    }
    let _ = write!(tables, "\n### Nodes\n{head}");
    for row in rows::answers() {
        let becomes = match row.gets {
            Gets::Refusal => "502",
            Gets::Bare(_) | Gets::Whole(_) => "the answer alone; the next request gets its own",
            Gets::Broken if row.ask == Ask::H2 => "the stream is reset",
            Gets::Broken if row.ask == Ask::Http10 => "the connection is reset",
            Gets::Broken => "the client sees that it broke off",
        };
        let _ = writeln!(tables, "| {} | {} | {becomes} |", row.name, row.why);
    }
    let _ = write!(
        tables,
        "\n### Answers before the body\n\nA node answers as soon as it has the head, and reads the body, \
         takes it for its next request, closes or resets; the client sends the rest, or another request in its \
         place. Each over HTTP/1.1 and HTTP/2, to nodes of either.\n{head}"
    );
    for row in early::talks() {
        let _ = writeln!(tables, "| {} | {} | {} |", row.name, row.why, row.becomes());
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security.md");
    let page = std::fs::read_to_string(path).expect("the page is there");
    let (text, _) = page.split_once(MARK).expect("the page has its mark");
    let whole = format!("{text}{MARK}{tables}");
    if std::env::var_os("LITEGATE_BLESS").is_some() {
        std::fs::write(path, &whole).expect("it can be written");
    }
    assert_eq!(std::fs::read_to_string(path).expect("the page is there"), whole);
}

fn passed_as(request: &str) -> String {
    let shown = request.replace("\r\n", "␍␊").replace(" || ", " ⏎ ").replace(" | ", " · ");
    format!("passed on as `{shown}`")
}

#[tokio::test]
async fn every_attack_of_a_node_succeeds_against_a_naive_forwarder() {
    let tries = rows::answers().into_iter().map(|row| async move {
        let node = Node::start().await;
        let through = naive::start(node.address).await;
        let fault = check_node(&row, &node, through, IMPATIENCE).await.err();
        (row.name, row.harmless, fault)
    });
    judge(join_all(tries).await);
}

/// RFC 9110 section 7.6.1: a client that names them in `Connection` takes its own away, not ours.
#[tokio::test]
async fn what_litegate_says_of_a_client_can_t_be_named_away() {
    let node = Node::start().await;
    let gate = gate(&node, "").await;
    let mut conn = gate.conn().await;
    let says = "x-forwarded-for, x-forwarded-host, x-forwarded-proto, x-real-ip, forwarded, via";
    let lies = "x-real-ip: 9.9.9.9\r\nvia: 1.1 evil\r\n";
    conn.send(format!("GET /x HTTP/1.1\r\nhost: a\r\nconnection: close, {says}\r\n{lies}\r\n"))
        .await
        .expect("litegate reads");
    assert_eq!(conn.response(false).await.expect("an answer").status, 200);
    let raw = String::from_utf8_lossy(&node.take().raw).into_owned();
    for name in says.split(", ") {
        assert!(raw.contains(&format!("\r\n{name}: ")), "{name} in {raw}");
    }
    assert!(raw.contains("\r\nx-real-ip: 127.0.0.1\r\n") && !raw.contains("9.9.9.9"), "{raw}");
}
