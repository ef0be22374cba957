//! `litegate demo` where there is no terminal, as in a pipeline.

use std::{process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

const PATIENCE: Duration = Duration::from_mins(1);

fn demo(arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litegate"));
    command.arg("demo").args(arguments).stdin(Stdio::null());
    command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("it starts")
}

/// Its standard output, and its exit code.
async fn told(mut demo: Child) -> (String, Option<i32>) {
    let mut text = String::new();
    let mut out = demo.stdout.take().expect("a pipe");
    timeout(PATIENCE, out.read_to_string(&mut text)).await.expect("it ends").expect("UTF-8");
    (text, demo.wait().await.expect("it ended").code())
}

/// Long enough for a hand-over and for a failover that loses what was acknowledged.
#[tokio::test]
async fn a_demo_of_some_seconds_shows_everything_and_keeps_its_word() {
    let (text, code) = told(demo(&["--duration", "9s"])).await;
    assert_eq!(code, Some(0), "{text}");
    for words in [
        "admin     http://127.0.0.1:",
        "handed the lease over to app-1",
        "LiteFS lost them",
        "0 by litegate; by LiteFS",
        "0 ran twice, 0 reads of the past of an own write",
        "kept: nothing lost unannounced",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(!text.contains('\x1b'), "no terminal, no control sequences: {text}");
    // Without litegate, the same nodes lose writes all the time.
    let lost = text.lines().find(|line| line.starts_with("without   spread: "));
    assert!(lost.is_some_and(|line| !line.contains(": 0 of")), "{text}");
}

#[tokio::test]
async fn a_signal_ends_a_demo_with_its_summary() {
    let mut demo = demo(&[]);
    let pid = demo.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let mut lines = BufReader::new(demo.stdout.take().expect("a pipe")).lines();
    let mut next = async || timeout(PATIENCE, lines.next_line()).await.expect("it goes on");
    while !next().await.expect("UTF-8").expect("a line").contains(" s  app-0* ") {}
    kill_process(pid.expect("it runs"), Signal::INT).expect("it runs");
    let mut rest = Vec::new();
    while let Some(line) = next().await.expect("UTF-8") {
        rest.push(line);
    }
    assert!(rest.last().is_some_and(|last| last.starts_with("kept: ")), "{rest:#?}");
    assert_eq!(demo.wait().await.expect("it ended").code(), Some(0));
}
