//! `litegate drain`: have a running litegate leave, finishing what runs.

use std::{process::ExitCode, time::Duration};

use http::{Method, StatusCode};
use tokio::time::{Instant, sleep};

use super::remote::{self, REFUSED, Remote, text};
use crate::config::units;

/// How long one question may take.
const LIMIT: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Readiness fails, after drain.delay nothing new is taken, what runs is finished up to drain.timeout,
and the process ends, as after SIGTERM.

Exit codes: 0 it drains, with --wait: it is gone; 1 it is still there after --timeout; 4 refused;
5 litegate not reached.")]
pub(super) struct Drain {
    #[command(flatten)]
    remote: Remote,
    /// Wait until it is gone: for pre-stop hooks
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, default_value = "60s", value_parser = units::duration, requires = "wait")]
    timeout: Duration,
}

impl Drain {
    pub(super) fn run(&self) -> ExitCode {
        remote::block_on(async {
            let (status, answer) = self.remote.ask(Method::POST, "/api/drain", LIMIT).await?;
            if status != StatusCode::ACCEPTED {
                eprintln!("error: {status}: {}", text(&answer, "detail"));
                return Ok(ExitCode::from(REFUSED));
            }
            if !self.wait {
                println!("draining");
                return Ok(ExitCode::SUCCESS);
            }
            let deadline = Instant::now() + self.timeout;
            while self.remote.ask(Method::GET, "/livez", LIMIT).await.is_ok() {
                if Instant::now() >= deadline {
                    eprintln!("error: still there after {:?}", self.timeout);
                    return Ok(ExitCode::FAILURE);
                }
                sleep(PAUSE).await;
            }
            println!("drained");
            Ok(ExitCode::SUCCESS)
        })
    }
}
