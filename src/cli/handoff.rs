//! `litegate handoff`: another node becomes primary, and no write notices.

use std::{process::ExitCode, time::Duration};

use http::{Method, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::remote::{self, REFUSED, Remote, text};
use crate::config::units;

/// Longer than any hand-over takes.
const LIMIT: Duration = Duration::from_secs(40);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Holds the cluster's writes, lets those under way finish, waits until the target has what the primary
has, has LiteFS promote it, and lets the held writes go on, there. Whatever fails, they go on where
they were.

  litegate handoff --to abaci-app-1
  litegate handoff --from abaci-app-0 --wait     before pod 0 stops: only if it is primary

Exit codes: 0 done, or nothing to do; 1 failed, the writes go on; 4 refused, nothing was tried;
5 litegate not reached.")]
pub(super) struct Handoff {
    #[command(flatten)]
    remote: Remote,
    /// Which cluster, where there are several
    #[arg(long, value_parser = remote::name)]
    cluster: Option<String>,
    /// Only if this instance is primary
    #[arg(long, value_name = "INSTANCE", value_parser = remote::name)]
    from: Option<String>,
    /// Who takes over; by default the replica that has most
    #[arg(long, value_name = "INSTANCE", value_parser = remote::name)]
    to: Option<String>,
    /// Try again while it is refused: another hand-over runs, or there is no primary or replica
    #[arg(long)]
    wait: bool,
    /// How long to try
    #[arg(long, default_value = "60s", value_parser = units::duration, requires = "wait")]
    timeout: Duration,
    /// Print the answer as it is
    #[arg(long)]
    json: bool,
}

impl Handoff {
    pub(super) fn run(&self) -> ExitCode {
        remote::block_on(async {
            let mut target = "/api/handoff?".to_owned();
            let wishes = [("cluster", &self.cluster), ("from", &self.from), ("to", &self.to)];
            for (key, value) in wishes {
                if let Some(value) = value {
                    target.extend([key, "=", value, "&"]);
                }
            }
            let target = target.trim_end_matches(['&', '?']);
            let deadline = Instant::now() + self.timeout;
            loop {
                let (status, report) = self.remote.ask(Method::POST, target, LIMIT).await?;
                let refused =
                    matches!(status, StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE);
                if self.wait && refused && Instant::now() + PAUSE < deadline {
                    sleep(PAUSE).await;
                    continue;
                }
                if self.json {
                    println!("{report:#}");
                } else {
                    say(status, &report);
                }
                return Ok(match status {
                    StatusCode::OK => ExitCode::SUCCESS,
                    StatusCode::BAD_GATEWAY => ExitCode::FAILURE,
                    _ => ExitCode::from(REFUSED),
                });
            }
        })
    }
}

fn say(status: StatusCode, report: &Value) {
    let seconds = |value: &Value| value.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
    let (from, to) = (text(report, "from"), text(report, "to"));
    match text(report, "outcome") {
        "done" => {
            let held = report.get("held").and_then(Value::as_u64).unwrap_or(0);
            println!("{to} is primary, before it {from}: {:.3} s, {held} held", seconds(report));
        }
        "nothing-to-do" => println!("nothing to do: {}", text(report, "why")),
        "failed" => {
            let (step, why) = (text(report, "failed"), text(report, "why"));
            eprintln!("error: hand-over from {from} to {to} failed at `{step}`: {why}");
            eprintln!("the writes go on, primary is {}", text(report, "primary"));
        }
        "refused" => eprintln!("error: refused: {}", text(report, "why")),
        _ => eprintln!("error: {status}: {}", text(report, "detail")),
    }
    for step in report.get("steps").and_then(Value::as_array).into_iter().flatten() {
        println!("  {:15}{:.3} s", text(step, "step"), seconds(step));
    }
}
