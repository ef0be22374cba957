//! Signals, and a configuration file that changes under us.
//!
//! Kubernetes swaps a `ConfigMap` by renaming a symlink beside the file (`..data`), so the directory
//! is watched rather than the file, and the text is compared: whatever the event was, only another
//! text is another configuration.

use std::{io, path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use notify::{
    Event, EventKind, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc, oneshot},
    time::sleep,
};

use super::{Ended, Order};
use crate::{
    config::{Config, load},
    telemetry::metrics::Metrics,
};

/// Events come in bursts; the last one counts.
const SETTLE: Duration = Duration::from_millis(100);
/// How often the end of the control plane is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Passes signals and changes on until the control plane ends.
pub(super) async fn follow(
    path: PathBuf,
    running: Config,
    orders: mpsc::Sender<Order>,
    metrics: Arc<Metrics>,
    control: &JoinHandle<Ended>,
) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let changed = Arc::new(Notify::new());
    let notice = Arc::clone(&changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.is_ok_and(|event| is_a_read(event.kind)) {
            return;
        }
        notice.notify_one();
    });
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    let directory = directory.map_or_else(|| PathBuf::from("."), PathBuf::from);
    let _watcher = match watcher {
        Ok(mut watcher) => {
            if let Err(error) = watcher.watch(&directory, RecursiveMode::NonRecursive) {
                tracing::warn!(%error, "the configuration is not watched: reload with SIGHUP");
            }
            Some(watcher)
        }
        Err(error) => {
            tracing::warn!(%error, "the configuration is not watched: reload with SIGHUP");
            None
        }
    };
    let mut text = std::fs::read_to_string(&path).unwrap_or_default();
    // It may have changed between being loaded and being watched, to something wrong too.
    let is_in_force = load::load(&path, std::env::vars()).is_ok_and(|config| config == running);
    if !text.is_empty() && !is_in_force {
        reload(&path, &orders, &metrics).await;
    }
    drop(running);
    loop {
        tokio::select! {
            _ = terminate.recv() => { let _ = orders.send(Order::Drain).await; }
            _ = interrupt.recv() => { let _ = orders.send(Order::Drain).await; }
            _ = hangup.recv() => {
                let _ = orders.send(Order::Reopen).await;
                text = std::fs::read_to_string(&path).unwrap_or_default();
                reload(&path, &orders, &metrics).await;
            }
            () = changed.notified() => {
                sleep(SETTLE).await;
                // In the middle of a swap there may be no file for a moment.
                if let Ok(now) = std::fs::read_to_string(&path) && now != text {
                    text = now;
                    reload(&path, &orders, &metrics).await;
                }
            }
            () = ended(control) => return Ok(()),
        }
    }
}

/// Our own look at the file is no change of it, and would bring the next look about.
fn is_a_read(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

async fn ended(control: &JoinHandle<Ended>) {
    while !control.is_finished() {
        sleep(LOOK).await;
    }
}

/// A bad file leaves the running configuration in force, and says so.
async fn reload(path: &std::path::Path, orders: &mpsc::Sender<Order>, metrics: &Metrics) {
    let config = match load::load(path, std::env::vars()) {
        Ok(config) => config,
        Err(error) => {
            metrics.reloaded(false);
            tracing::error!("configuration refused, the running one stays in force\n{error}");
            return;
        }
    };
    let (answer, answered) = oneshot::channel();
    if orders.send(Order::Reload(Box::new(config), answer)).await.is_err() {
        return;
    }
    match answered.await {
        Ok(Ok(_addresses)) => tracing::info!("configuration reloaded"),
        Ok(Err(error)) => {
            tracing::error!(%error, "configuration refused, the running one stays in force");
        }
        Err(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use notify::event::{CreateKind, ModifyKind};

    use super::*;

    #[test]
    fn looking_at_the_file_is_no_change_of_it() {
        for access in [AccessKind::Open(AccessMode::Any), AccessKind::Close(AccessMode::Read)] {
            assert!(is_a_read(EventKind::Access(access)), "{access:?}");
        }
        for change in [
            EventKind::Access(AccessKind::Close(AccessMode::Write)),
            EventKind::Modify(ModifyKind::Any),
            EventKind::Create(CreateKind::Any),
            EventKind::Any,
        ] {
            assert!(!is_a_read(change), "{change:?}");
        }
    }
}
