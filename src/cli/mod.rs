//! The command line: one file per command.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "commands speak to a terminal")]

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode, time::Duration};

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::{Config, load, units};

mod check;
mod drain;
mod explain;
mod handoff;
mod remote;
mod status;
mod verify;

/// The configuration is wrong.
const BAD_CONFIG: u8 = 3;

/// A write-aware HTTP reverse proxy for clusters with one writer and many readers.
#[derive(Debug, Parser)]
#[command(
    name = "litegate",
    version,
    after_help = "\
Examples:
  litegate demo                              a whole cluster in this process, to look at
  litegate check -c litegate.toml            is the configuration right?
  litegate explain POST /api/items           where would this go, and why?
  litegate run -c litegate.toml              serve
  litegate status                            what does the running one believe?
  litegate handoff --from abaci-app-0        move the primary, and lose no write
  litegate verify http://abaci.one           does it keep its word, while pods restart?

Exit codes: 0 done, 1 failed while running, 2 wrong usage, 3 wrong configuration, 4 refused,
5 no running litegate reached.
Every key can be set by the environment: LITEGATE__CLUSTER__APP__HOLD__TIMEOUT=25s"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM; SIGHUP or a changed file reloads
    Run {
        #[command(flatten)]
        file: File,
    },
    /// Say everything that is wrong with a configuration
    ///
    /// With --online it looks at the world as `run` would, and says who is a member, who is primary,
    /// how far each replica is behind, which ports do not answer and which source has no news.
    #[command(
        after_help = "Exit codes: 0 all is right, 1 the world is not as it says, 3 the file is wrong."
    )]
    Check {
        #[command(flatten)]
        file: File,
        /// Also: ask DNS, LiteFS, Consul and whatever else is configured, for some seconds
        #[arg(long)]
        online: bool,
    },
    /// Say where a request would go, and why, without sending it
    Explain {
        #[command(flatten)]
        file: File,
        /// Its method
        method: String,
        /// Its URL, or just a path
        url: String,
        /// A field of it, like `-H 'x-kind: query'`
        #[arg(short = 'H', long = "header")]
        headers: Vec<String>,
        /// As if it came from one of `trusted_proxies`
        #[arg(long)]
        trusted: bool,
    },
    /// Print a JSON Schema of the configuration, for editors
    Schema,
    /// Run a three-node cluster and two litegates in this process, to look at
    ///
    /// Clients write and read through both litegates in turn, while the primary is killed, frozen, cut
    /// off, and handed over. A judge hears what they are told. The same writes go to the same nodes
    /// without litegate, for comparison.
    #[command(after_help = "\
Keys: k kill the primary; h hand over to another node; f freeze the primary; s cut a replica off from
it, or join it again; l let a node take the lease without what it lacks; m mend everything; a things
happen by themselves, or not; q or Ctrl-C close the books, and once more: at once.

Without a terminal it prints a line each second. NO_COLOR is respected.

Exit codes: 0 nothing was lost that was not announced, nothing ran twice, and no client read the past
of its own write; 1 otherwise.

  litegate demo
  litegate demo --duration 30s")]
    Demo {
        /// End after this long, with a summary
        #[arg(long, value_parser = units::duration)]
        duration: Option<Duration>,
    },
    /// Show what a running litegate believes of its clusters
    Status(status::Status),
    /// Make another node primary, and lose no write
    Handoff(handoff::Handoff),
    /// Have a running litegate leave, finishing what runs
    Drain(drain::Drain),
    /// Judge a live deployment: write, read back, and say what was lost, repeated or stale
    Verify(Box<verify::Verify>),
    /// Print completions for a shell
    Completions {
        /// Which
        shell: clap_complete::Shell,
    },
}

/// Where the configuration is.
#[derive(Debug, clap::Args)]
struct File {
    /// The configuration file
    #[arg(short, long, env = "LITEGATE_CONFIG", default_value = "/etc/litegate/litegate.toml")]
    config: PathBuf,
}

impl File {
    /// Loads it; says what is wrong otherwise.
    fn load(&self) -> Result<Config, ExitCode> {
        load::load(&self.config, std::env::vars()).map_err(|error| {
            match &error {
                load::LoadError::Wrong(faults) if is_coloured() => {
                    eprintln!("{}", faults.coloured());
                }
                _ => eprintln!("{error}"),
            }
            ExitCode::from(BAD_CONFIG)
        })
    }
}

fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// The whole program.
pub fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run { file } => file.load().map(|config| {
            crate::telemetry::init_logging("info");
            crate::app::run(file.config.clone(), config).unwrap_or_else(|error| {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            })
        }),
        Command::Check { file, online } => {
            file.load().map(|config| check::check(&file.config, &config, online))
        }
        Command::Explain { file, method, url, headers, trusted } => {
            file.load().map(|config| explain::explain(&config, &method, &url, &headers, trusted))
        }
        Command::Schema => {
            println!("{:#}", crate::config::schema::schema());
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo { duration } => Ok(crate::demo::run(duration)),
        Command::Status(status) => Ok(status.run()),
        Command::Handoff(handoff) => Ok(handoff.run()),
        Command::Drain(drain) => Ok(drain.run()),
        Command::Verify(arguments) => Ok(verify::verify(&arguments)),
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "litegate", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|code| code)
}
