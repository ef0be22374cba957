//! Certificates by ACME (RFC 8555), for listeners.
//!
//! A [`keep`] has one certificate: it waits until there is none or it is to be renewed, obtains
//! another, and writes it to the file at which the listeners look every second, as at any other.
//! It never takes anything out of force: what fails is tried again, and what was there stays. The
//! file is read anew before each order, so that one that somebody else put there counts.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::sleep;

use crate::{config::listener::Acme, net::pem, server::tls::Tls};

mod cache;
mod http;
mod order;
mod schedule;

/// The longest sleep: the wall clock may jump meanwhile, and the file may change.
const NAP: Duration = Duration::from_hours(1);

/// Keeps a certificate for these listeners, for ever. `counted` hears of every attempt whether it
/// came to a certificate.
pub async fn keep(config: Acme, listeners: Vec<Arc<Tls>>, counted: impl Fn(bool) + Send) {
    let path = config.certificate();
    let certificate = path.display();
    let mut chance = fastrand::f64();
    let mut failures = (None, 0);
    let mut told: Option<String> = None;
    loop {
        let due = match cache::certificate(&path, &pem::provider()) {
            Ok(kept) if kept.has(&config.domains) => schedule::renewal(kept.validity, chance),
            _ => Duration::ZERO,
        };
        let wait = due.saturating_sub(now());
        if !wait.is_zero() {
            sleep(wait.min(NAP)).await;
            continue;
        }
        let obtained = order::obtain(&config, &listeners, now).await;
        counted(obtained.is_ok());
        match obtained {
            Ok(()) => {
                tracing::info!(%certificate, "a certificate was obtained by ACME");
                (failures, told, chance) = ((None, 0), None, fastrand::f64());
            }
            Err(trouble) => {
                let (before, so_far) = failures;
                let in_a_row = if before == Some(trouble.fault) { so_far + 1 } else { 1 };
                failures = (Some(trouble.fault), in_a_row);
                let wait = schedule::backoff(trouble.fault, in_a_row, fastrand::f64());
                let error = trouble.to_string();
                if told.as_ref() != Some(&error) {
                    tracing::error!(
                        %certificate, %error, retry = ?wait,
                        "no certificate by ACME: one in force stays, and it is tried again",
                    );
                }
                told = Some(error);
                sleep(wait).await;
            }
        }
    }
}

/// Since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
