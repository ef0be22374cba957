//! `litegate verify` on the real thing.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::{
    cluster::{Cluster, PRIMARY},
    gate::{self, Gate},
};

/// A judge at work.
struct Judge(Child);

impl Judge {
    fn start(urls: &[SocketAddr], more: &[&str]) -> Self {
        let child = Command::new(Path::new(env!("CARGO_BIN_EXE_litegate")))
            .arg("verify")
            .args(urls.iter().map(|url| format!("http://{url}")))
            .args(["--as", "browser", "--report", "-"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("litegate starts");
        Self(child)
    }

    /// Its exit code and report, and what it said.
    fn verdict(self) -> (Option<i32>, Value, String) {
        let output = self.0.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let report = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("no report: {error}\n{said}"));
        (output.status.code(), report, said)
    }
}

#[test]
fn the_judge_finds_nothing_through_two_litegates_while_nodes_die_and_return() {
    let mut cluster = Cluster::start();
    let start = || Gate::start(&cluster, &gate::listed(&cluster), &gate::by_litefs(&cluster));
    let gates = [start(), start()];
    let urls = [gates[0].address(), gates[1].address()];
    // What a client has only read, the next replica may not have yet: that is not promised.
    let judge =
        Judge::start(&urls, &["--duration", "10s", "--rate", "0", "--allow", "non-monotonic"]);
    for node in [2, PRIMARY] {
        cluster.kill(node);
        cluster.spawn(node);
        cluster.wait_for(node);
    }
    let (code, report, said) = judge.verdict();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(report["conclusion"], "kept", "{said}");
    assert!(report["writes"]["acknowledged"].as_u64() > Some(100), "{said}");
    for node in 0..3 {
        assert!(report["nodes"][cluster.name(node)].as_u64() > Some(0), "{said}");
    }
}

#[test]
fn the_judge_finds_what_a_balancer_over_all_nodes_does_to_writes() {
    let cluster = Cluster::start();
    let all = [0, 1, 2].map(|node| cluster.proxy(node));
    let (code, report, said) =
        Judge::start(&all, &["--duration", "2s", "--settle", "1s"]).verdict();
    assert_eq!(code, Some(1), "{said}");
    for breach in ["empty", "leaked"] {
        assert!(report["breaches"][breach].as_u64() > Some(0), "{breach}: {said}");
    }
}
