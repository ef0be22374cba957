//! `litegate check --online` says whether the world is as the configuration says.

use std::{fs, process::Stdio, time::Duration};

use litegate::testkit::{Cluster, Options, consul::Consul};
use tokio::{process::Command, time::timeout};

use crate::gate;

const PATIENCE: Duration = Duration::from_secs(30);

/// What it says, and its exit code.
pub(crate) async fn check(config: &str) -> (String, Option<i32>) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("litegate.toml");
    fs::write(&file, config).expect("it can be written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.args(["check", "--online", "-c"]).arg(&file).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await.expect("it ends").expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.code())
}

#[tokio::test]
async fn it_finds_the_members_their_roles_and_their_ports() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let config = gate::config(&cluster, r#"primary = { type = "litefs", poll = "100ms" }"#);
    let (text, code) = check(&config).await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("3 members by the configuration"), "{text}");
    assert!(text.contains("primary: app-0"), "{text}");
    assert_eq!(text.matches("  replica").count(), 2, "{text}");
    assert_eq!(text.matches("  answers").count(), 3, "{text}");
    cluster.kill(0);
    let (text, code) = check(&config).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("NO PRIMARY: no source has named one"), "{text}");
    assert_eq!(text.matches("DOES NOT ANSWER: Connection refused").count(), 1, "{text}");
    assert!(text.contains("LiteFS's API does not answer"), "the reason, from the log: {text}");
}

#[tokio::test]
async fn it_asks_consul_too() {
    let cluster = Cluster::start(Options::default()).await.expect("loopback has ports");
    let consul = Consul::start().await.expect("loopback has ports");
    let config = |address: &str, key: &str| {
        let source =
            format!("{{ type = \"consul\", address = \"http://{address}\", key = \"{key}\" }}");
        gate::config(&cluster, &format!("primary = [{{ type = \"litefs\" }}, {source}]"))
    };
    let (text, code) = check(&config(&consul.address().to_string(), "litefs/app")).await;
    assert_eq!(code, Some(0), "a key that nobody holds is news: {text}");
    let (text, code) = check(&config("127.0.0.1:1", "litefs/app")).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("consul HAS NO NEWS: unreachable"), "{text}");
    assert!(text.contains("primary: app-0"), "the others still tell: {text}");
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_told() {
    let config = "[[listener]]\naddress = \"127.0.0.1:0\"\n[cluster.app]\nport = 3000\n\
        members = { type = \"srv\", name = \"_http._tcp.app\", resolvers = [\"127.0.0.1:1\"] }\n\
        primary = { type = \"litefs\" }\n";
    let (text, code) = check(config).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("NO MEMBERS: SRV `_http._tcp.app` does not resolve"), "{text}");
}
