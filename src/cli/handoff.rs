//! `litegate handoff`: another node becomes primary, and no write notices.

use std::{process::ExitCode, time::Duration};

use http::{Method, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::remote::{self, HERE, NOT_REACHED, REFUSED, Remote, text};
use crate::{app, config::units};

/// Longer than any hand-over takes.
const LIMIT: Duration = Duration::from_secs(40);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Holds the cluster's writes, lets those under way finish, waits until the target has what the primary
has, has LiteFS promote it, and lets the held writes go on, there. Whatever fails, they go on where
they were.

Every litegate that writes has to hold: LiteFS ends its own process when it loses its lease in the
middle of a commit. Name all of them, or a headless service that has an address for each, unless the
one that is asked knows them by its `[admin] peers`. If one is
not reached or does not finish in time, nothing is handed over, and all go on. If this program dies,
they go on by themselves within 8 s.

  litegate handoff --to abaci-app-1              the only litegate, on this machine
  litegate handoff --admin 10.0.0.7:9090 --admin 10.0.0.8:9090
  litegate handoff --admin-service litegate-admin:9090 --from abaci-app-0 --wait
                                                 before pod 0 stops: only if it is primary

Exit codes: 0 done, or nothing to do; 1 failed, the writes go on; 4 refused, nothing was handed over;
5 a litegate was not reached, nothing was handed over.")]
pub(super) struct Handoff {
    /// The admin listener of every litegate that writes; repeat it, or separate them by commas
    ///
    /// [default: 127.0.0.1:9090, unless --admin-service is there]
    #[arg(
        long,
        value_name = "URL",
        env = "LITEGATE_ADMIN",
        value_delimiter = ',',
        value_parser = remote::address
    )]
    admin: Vec<String>,
    /// A name with an address for every litegate that writes, and the port of their admin listeners
    #[arg(long, value_name = "NAME:PORT", value_delimiter = ',', value_parser = remote::address)]
    admin_service: Vec<String>,
    /// Which cluster, where there are several
    #[arg(long, value_parser = remote::name)]
    cluster: Option<String>,
    /// Only if this instance is primary
    #[arg(long, value_name = "INSTANCE", value_parser = remote::name)]
    from: Option<String>,
    /// Only if the instance called $HOSTNAME is primary: in a pod's hook
    #[arg(long, conflicts_with = "from")]
    from_here: bool,
    /// Who takes over; by default the replica that has most
    #[arg(long, value_name = "INSTANCE", value_parser = remote::name)]
    to: Option<String>,
    /// How long writes under way may take to finish, while all others are held
    ///
    /// An upload or a streamed answer that takes longer makes the hand-over fail, and the message
    /// names it. Three quarters of hold.timeout, less 2 s, is the most. [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    finish_writes: Option<Duration>,
    /// Try again while it is refused or a litegate is not reached: another hand-over runs, there is
    /// no primary or replica, a litegate is about to stop
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
            let deadline = Instant::now() + self.timeout;
            loop {
                let (status, report) = self.try_once().await?;
                let unreached = text(&report, "outcome") == "unreached";
                let refused =
                    matches!(status, StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE);
                if self.wait && (refused || unreached) && Instant::now() + PAUSE < deadline {
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
                    _ if unreached => ExitCode::from(NOT_REACHED),
                    StatusCode::BAD_GATEWAY => ExitCode::FAILURE,
                    _ => ExitCode::from(REFUSED),
                });
            }
        })
    }

    fn from(&self) -> Result<Option<String>, String> {
        if !self.from_here {
            return Ok(self.from.clone());
        }
        let here = std::env::var("HOSTNAME").map_err(|_| "--from-here needs HOSTNAME")?;
        remote::name(&here).map(Some).map_err(|cure| format!("HOSTNAME: {cure}"))
    }

    async fn try_once(&self) -> Result<(StatusCode, Value), String> {
        let mut admins = self.admin.clone();
        if admins.is_empty() && self.admin_service.is_empty() {
            admins.extend(remote::address(HERE));
        }
        // One alone does it by itself.
        if let ([admin], []) = (&*admins, &*self.admin_service) {
            let target = self.target()?;
            return Remote::at(admin.clone()).ask(Method::POST, &target, self.limit()).await;
        }
        let instances = app::Instances { admins, services: self.admin_service.clone() };
        let wish = app::Wish {
            cluster: self.cluster.clone(),
            from: self.from()?,
            to: self.to.clone(),
            finish: self.finish_writes,
        };
        let answer = app::hand_over(&instances, wish).await;
        Ok((answer.status, answer.body))
    }

    fn target(&self) -> Result<String, String> {
        let from = self.from()?;
        let finish = self.finish_writes.map(|finish| format!("{}ms", finish.as_millis()));
        let wishes =
            [("cluster", &self.cluster), ("from", &from), ("to", &self.to), ("finish", &finish)];
        let mut target = "/api/handoff?".to_owned();
        for (key, value) in wishes {
            if let Some(value) = value {
                target.extend([key, "=", value, "&"]);
            }
        }
        Ok(target.trim_end_matches(['&', '?']).to_owned())
    }

    /// Longer than the hand-over takes.
    fn limit(&self) -> Duration {
        LIMIT + self.finish_writes.unwrap_or_default()
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
        "unreached" => {
            eprintln!("error: nothing was handed over: {}", text(report, "why"));
        }
        _ => eprintln!("error: {status}: {}", text(report, "detail")),
    }
    for step in report.get("steps").and_then(Value::as_array).into_iter().flatten() {
        println!("  {:15}{:.3} s", text(step, "step"), seconds(step));
    }
}
