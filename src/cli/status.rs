//! `litegate status`: what a running litegate believes, as a table.

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use http::{Method, StatusCode};
use serde_json::Value;

use super::remote::{self, NOT_REACHED, Remote, text};

/// How long the question may take.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Exit codes: 0 every cluster has a primary, 1 one has none, 5 litegate not reached.")]
pub(super) struct Status {
    #[command(flatten)]
    remote: Remote,
    /// Print the answer as it is
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(&self) -> ExitCode {
        remote::block_on(async {
            let (status, all) = self.remote.ask(Method::GET, "/api/topology", LIMIT).await?;
            let Some(clusters) = all.as_object().filter(|_| status == StatusCode::OK) else {
                eprintln!("error: {status}: not what litegate says");
                return Ok(ExitCode::from(NOT_REACHED));
            };
            if self.json {
                println!("{all:#}");
            } else {
                let pages = clusters.iter().map(|(name, cluster)| page(name, cluster));
                print!("{}", pages.collect::<Vec<_>>().join("\n"));
            }
            let has_primary =
                |cluster: &Value| cluster.get("primary").is_some_and(Value::is_string);
            let all_have = clusters.values().all(has_primary);
            Ok(if all_have { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        })
    }
}

/// One cluster.
fn page(name: &str, cluster: &Value) -> String {
    let flag = |value: &Value, key| value.get(key).and_then(Value::as_bool) == Some(true);
    let number = |key| cluster.get(key).and_then(Value::as_u64).unwrap_or(0);
    let mut page = format!("cluster {name}: ");
    let _ = match cluster.get("primary").and_then(Value::as_str) {
        Some(primary) => write!(page, "primary {primary}"),
        None => write!(page, "no primary ({})", text(cluster, "no_primary_because")),
    };
    let _ = write!(page, ", term {}, {} held", number("term"), number("held"));
    for (key, word) in [("handing_over", "handing over"), ("stale", "members stale")] {
        if flag(cluster, key) {
            let _ = write!(page, ", {word}");
        }
    }
    page.push('\n');
    let mut rows =
        vec![["NODE", "ADDRESS", "ROLE", "STATE", "LAG", "POSITIONS"].map(str::to_owned)];
    for node in cluster.get("nodes").and_then(Value::as_array).into_iter().flatten() {
        let lag = node.get("lag_seconds").and_then(Value::as_f64);
        let state = match node {
            node if text(node, "presence") == "draining" => "draining",
            node if flag(node, "fenced") => "fenced",
            node if flag(node, "ejected") => "ejected",
            node if !flag(node, "healthy") => "unhealthy",
            node => text(node, "freshness"),
        };
        let positions = node.get("positions").and_then(Value::as_object);
        let positions = positions.into_iter().flatten().map(|(database, at)| {
            let at = at.as_str().unwrap_or("-");
            // The number in full, of the checksum enough to compare.
            let (txid, checksum) = at.split_once('/').unwrap_or((at, ""));
            let txid = txid.trim_start_matches('0');
            format!("{database} {txid}/{}", checksum.get(..6).unwrap_or_default())
        });
        let positions = positions.collect::<Vec<_>>().join(", ");
        rows.push([
            text(node, "name").to_owned(),
            text(node, "address").to_owned(),
            text(node, "role").to_owned(),
            state.to_owned(),
            lag.map_or_else(|| "-".to_owned(), |lag| format!("{lag:.1}s")),
            if positions.is_empty() { "-".to_owned() } else { positions },
        ]);
    }
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        page += format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end();
        page.push('\n');
    }
    page
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cluster_is_a_table() {
        let node = |name: &str, role: &str, lag: Option<f64>| {
            json!({
                "name": name, "address": "10.0.0.1:80", "role": role, "presence": "member",
                "lag_seconds": lag, "freshness": "fresh", "healthy": name != "app-2",
                "positions": { "app.db": "00000000000000ff/8000000000000001" },
            })
        };
        let nodes = [node("app-0", "primary", None), node("app-2", "replica", Some(1.25))];
        let cluster = json!({
            "primary": "app-0", "term": 3, "held": 7, "handing_over": true, "nodes": nodes,
        });
        let expected = "\
cluster app: primary app-0, term 3, 7 held, handing over
  NODE   ADDRESS      ROLE     STATE      LAG   POSITIONS
  app-0  10.0.0.1:80  primary  fresh      -     app.db ff/800000
  app-2  10.0.0.1:80  replica  unhealthy  1.2s  app.db ff/800000
";
        assert_eq!(page("app", &cluster), expected);
        let none = json!({ "primary": null, "no_primary_because": "split-brain" });
        assert!(page("app", &none).starts_with("cluster app: no primary (split-brain), term 0"));
    }
}
