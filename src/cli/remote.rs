//! A running litegate, by its admin listener.

use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    process::ExitCode,
    time::Duration,
};

use http::{Method, Request, StatusCode, header};
use serde_json::Value;
use tokio::time::timeout;

use crate::call;

/// It can't be done now, and nothing was tried.
pub(super) const REFUSED: u8 = 4;
/// There is no litegate there.
pub(super) const NOT_REACHED: u8 = 5;
/// The largest answer.
const LARGE: usize = 16 << 20;

/// Where it is.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Remote {
    /// The admin listener of the litegate to ask
    #[arg(
        long,
        value_name = "URL",
        env = "LITEGATE_ADMIN",
        default_value = HERE,
        value_parser = address
    )]
    admin: String,
}

/// Where it is if nobody says.
pub(super) const HERE: &str = "http://127.0.0.1:9090";

/// `http://127.0.0.1:9090`, or the same without the scheme.
pub(super) fn address(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let (host, port) = address.rsplit_once(':').unwrap_or(("", ""));
    if host.is_empty() || port.parse::<u16>().is_err() || address.contains('/') {
        return Err("like http://127.0.0.1:9090".into());
    }
    Ok(address.into())
}

/// An instance or cluster name, as it can stand in a query.
pub(super) fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".:-_[]".contains(c);
    if text.is_empty() || !text.chars().all(plain) {
        return Err("letters, digits, and any of .:-_".into());
    }
    Ok(text.into())
}

impl Remote {
    /// The one with this admin listener, as [`address`] reads it.
    pub(super) fn at(admin: String) -> Self {
        Self { admin }
    }

    /// Asks, and reads the answer as JSON; `Null` where it is none.
    pub(super) async fn ask(
        &self,
        method: Method,
        target: &str,
        limit: Duration,
    ) -> Result<(StatusCode, Value), String> {
        let at = self.admin.to_socket_addrs().map_err(|error| self.unreachable(&error))?;
        let mut last = "the name has no address".to_owned();
        for address in at {
            match timeout(limit, Self::ask_at(address, &self.admin, &method, target)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = error.to_string(),
                Err(_elapsed) => return Err(self.unreachable(&"no answer in time")),
            }
        }
        Err(self.unreachable(&last))
    }

    async fn ask_at(
        address: SocketAddr,
        host: &str,
        method: &Method,
        target: &str,
    ) -> Result<(StatusCode, Value), call::CallError> {
        let request = Request::builder().method(method).uri(target).header(header::HOST, host);
        let (response, _connection) = call::send(address, request).await?;
        let status = response.status();
        let body = call::read(response, LARGE).await?;
        Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
    }

    fn unreachable(&self, why: &dyn std::fmt::Display) -> String {
        format!("no litegate's admin listener at {}: {why}", self.admin)
    }
}

/// Runs a command that asks.
pub(super) fn block_on(command: impl Future<Output = Result<ExitCode, String>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(command),
        Err(error) => Err(error.to_string()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(NOT_REACHED)
    })
}

/// A text of an answer.
pub(super) fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_are_plain() {
        assert_eq!(address("http://a:1/"), Ok("a:1".into()));
        assert_eq!(address("[::1]:9090"), Ok("[::1]:9090".into()));
        for wrong in ["", "a", "http://a", "https://a:1", "a:1/b", ":1", "a:x"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
        assert!(name("abaci-app-0").is_ok() && name("10.0.0.7:80").is_ok());
        assert!(name("a&to=b").is_err() && name("a b").is_err() && name("").is_err());
    }
}
