//! `litegate verify`: judge a live deployment.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{Args, ValueEnum};
use http::HeaderValue;

use crate::{
    config::units,
    net::tls,
    verify::{
        self, Carry, Settings, Target, Template, Workload,
        judge::Breach,
        report::{self, Conclusion},
    },
};

/// A promise was broken.
const VIOLATED: u8 = 1;
/// Nothing could be judged.
const NOT_RUN: u8 = 2;
/// Without a terminal, progress is told this often.
const EVERY: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
#[command(after_long_help = "\
Each client writes values that exist once, reads them back, and sends what it was given (cookies,
or Litegate-Token) with its next request. Restart, kill and roll pods meanwhile: at the end every
acknowledged write must be there once, and nobody may have read less than it had written or seen.

  litegate verify http://abaci.one --duration 2m
  litegate verify http://10.0.0.7:8080 http://10.0.0.8:8080        two instances, in turn
  litegate verify http://abaci.one --append 'POST /api/notes/{key}' --set 'PUT /api/notes/{key}' \\
      --read 'GET /api/notes/{key}' --body '{\"text\":\"{value}\"}' --content-type application/json
  litegate verify https://10.0.0.7:8443 --host abaci.one --ca ca.crt    TLS, by HTTP/2 or HTTP/1.1
  litegate verify http://abaci.one --workload append --allow lost  asynchronous replication, and a
                                                                   primary that will be killed

The app needs one resource that keeps what it is given: docs/verify.md has the contract, and what
the words of the report mean. A run leaves its keys behind; their names begin with `v` and the
run's number.

Exit codes: 0 all kept, 1 violated, 2 could not run or not judge.")]
pub(super) struct Verify {
    /// Where: several instances are used in turn by every client
    #[arg(required = true, value_name = "URL")]
    urls: Vec<Target>,
    /// Clients at a time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// How long to write and read
    #[arg(long, default_value = "30s", value_parser = units::duration)]
    duration: Duration,
    /// Requests a second by all clients together; 0: as fast as they are answered
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// What is written
    #[arg(long, value_enum, default_value_t = Load::Both)]
    workload: Load,
    /// Lists in use at a time, and registers of each client
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    keys: u32,
    /// What a client carries from answer to request
    #[arg(long = "as", value_enum, default_value_t = As::Mixed)]
    kind: As,
    /// How a value is appended to a list
    #[arg(long, value_name = "TEMPLATE", default_value = "POST /kv/{key}")]
    append: Template,
    /// How a register is set
    #[arg(long, value_name = "TEMPLATE", default_value = "PUT /kv/{key}")]
    set: Template,
    /// How either is read
    #[arg(long, value_name = "TEMPLATE", default_value = "GET /kv/{key}")]
    read: Template,
    /// The body of a write
    #[arg(long, default_value = "{value}", value_parser = body)]
    body: String,
    /// Its Content-Type
    #[arg(long, default_value = "text/plain")]
    content_type: String,
    /// The Host header, where the URLs are addresses
    #[arg(long)]
    host: Option<HeaderValue>,
    /// Who signs the certificates of https URLs, a PEM file; may be given several times. Without it
    /// whoever the system trusts
    #[arg(long, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// Believe whoever answers at an https URL
    #[arg(long, conflicts_with = "ca")]
    insecure: bool,
    /// When a client gives up on a request: longer than litegate holds one
    #[arg(long, default_value = "40s", value_parser = units::duration)]
    timeout: Duration,
    /// How long after the end everything acknowledged may take to show
    #[arg(long, default_value = "10s", value_parser = units::duration)]
    settle: Duration,
    /// A breach that is reported and does not fail the run; may be given several times: lost,
    /// repeated, stale, non-monotonic, phantom, empty, leaked, contradicted
    #[arg(long, value_name = "BREACH", value_parser = breach)]
    allow: Vec<Breach>,
    /// Write the verdict as JSON there; `-` for standard output
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Load {
    /// Append to lists
    Append,
    /// Set registers
    Register,
    /// Both
    Both,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum As {
    /// Browsers: cookies
    Browser,
    /// API clients: the header `Litegate-Token`
    Api,
    /// Half of each
    Mixed,
    /// Clients that carry nothing, and are promised nothing
    Stateless,
}

fn body(text: &str) -> Result<String, String> {
    if text.contains("{value}") { Ok(text.to_owned()) } else { Err("no {value} in it".into()) }
}

fn breach(text: &str) -> Result<Breach, String> {
    let found = Breach::ALL.into_iter().find(|breach| breach.as_str() == text);
    found.ok_or_else(|| {
        let all = Breach::ALL.map(Breach::as_str);
        format!("one of: {}", all.join(", "))
    })
}

impl Verify {
    fn settings(&self) -> Result<Settings, String> {
        let tls = if self.urls.iter().any(Target::is_secure) {
            let config = tls::client(self.ca.clone(), self.insecure);
            Some(Arc::new(config.map_err(|error| error.to_string())?))
        } else {
            None
        };
        Ok(Settings {
            targets: self.urls.clone(),
            host: self.host.clone(),
            tls,
            clients: self.clients,
            carry: match self.kind {
                As::Browser => vec![Carry::Cookies],
                As::Api => vec![Carry::Token],
                As::Mixed => vec![Carry::Cookies, Carry::Token],
                As::Stateless => vec![Carry::Nothing],
            },
            duration: self.duration,
            rate: self.rate,
            workload: match self.workload {
                Load::Append => Workload::Append,
                Load::Register => Workload::Register,
                Load::Both => Workload::Both,
            },
            keys: self.keys,
            append: self.append.clone(),
            set: self.set.clone(),
            read: self.read.clone(),
            body: self.body.clone(),
            content_type: self.content_type.clone(),
            timeout: self.timeout,
            settle: self.settle,
            empty_is_success: self.allow.contains(&Breach::Empty),
            run: fastrand::u32(..),
        })
    }
}

pub(super) fn verify(arguments: &Verify) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let live = std::io::stderr().is_terminal();
    let mut told = Duration::ZERO;
    let progress = |elapsed: Duration, verdict: &verify::judge::Verdict| {
        let line = report::progress(elapsed, verdict);
        if live {
            eprint!("\r\x1b[K{line}");
            let _ = std::io::stderr().flush();
        } else if elapsed >= told + EVERY {
            told = elapsed;
            eprintln!("{line}");
        }
    };
    let stop = async {
        // Without the signal, it runs its time.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let run = runtime
        .map_err(|error| error.to_string())
        .and_then(|runtime| runtime.block_on(verify::run(arguments.settings()?, stop, progress)));
    if live {
        eprint!("\r\x1b[K");
    }
    let run = match run {
        Ok(run) => run,
        Err(error) => {
            eprintln!("error: could not judge: {error}");
            return ExitCode::from(NOT_RUN);
        }
    };
    let json = || format!("{:#}\n", report::json(&run, &arguments.allow));
    match &arguments.report {
        Some(path) if path.as_os_str() == "-" => {
            print!("{}", json());
            eprintln!("{}", report::text(&run, &arguments.allow));
        }
        Some(path) => {
            println!("{}", report::text(&run, &arguments.allow));
            if let Err(error) = std::fs::write(path, json()) {
                eprintln!("error: the report is not written: {}: {error}", path.display());
                return ExitCode::from(NOT_RUN);
            }
        }
        None => println!("{}", report::text(&run, &arguments.allow)),
    }
    match Conclusion::of(&run.verdict, &arguments.allow) {
        Conclusion::Kept => ExitCode::SUCCESS,
        Conclusion::Violated => ExitCode::from(VIOLATED),
        Conclusion::Unknown => ExitCode::from(NOT_RUN),
    }
}
