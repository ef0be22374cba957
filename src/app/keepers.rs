//! Who keeps the listeners' certificates by ACME, across reloads.

use std::sync::Arc;

use tokio::task::AbortHandle;

use super::Opened;
use crate::{acme, config::listener::Acme, server::tls::Tls, telemetry::metrics::Metrics};

/// One that keeps a certificate, until dropped.
pub(super) struct Keeper {
    config: Acme,
    listeners: Vec<Arc<Tls>>,
    task: AbortHandle,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Has one keeper for each certificate that open listeners want, and lets those go on whose
/// certificate and listeners are the same: they may be in the middle of an order.
pub(super) fn tend(keepers: &mut Vec<Keeper>, opened: &[Opened], metrics: &Arc<Metrics>) {
    let mut wanted: Vec<(Acme, Vec<Arc<Tls>>)> = Vec::new();
    for opened in opened.iter().filter(|opened| opened.bound.is_some()) {
        let acme = opened.config.tls.as_ref().and_then(|tls| tls.acme.as_ref());
        let (Some(acme), Some(tls)) = (acme, &opened.tls) else { continue };
        match wanted.iter_mut().find(|(config, _)| config == acme) {
            Some((_, listeners)) => listeners.push(Arc::clone(tls)),
            None => wanted.push((acme.clone(), vec![Arc::clone(tls)])),
        }
    }
    let is = |keeper: &Keeper, (config, listeners): &(Acme, Vec<Arc<Tls>>)| {
        keeper.config == *config
            && keeper.listeners.len() == listeners.len()
            && keeper.listeners.iter().zip(listeners).all(|(a, b)| Arc::ptr_eq(a, b))
    };
    keepers.retain(|keeper| wanted.iter().any(|wanted| is(keeper, wanted)));
    wanted.retain(|wanted| !keepers.iter().any(|keeper| is(keeper, wanted)));
    for (config, listeners) in wanted {
        let certificate: Arc<str> = config.certificate().display().to_string().into();
        metrics.ordering(&certificate);
        let metrics = Arc::clone(metrics);
        let counted = move |obtained| metrics.ordered(&certificate, obtained);
        let task = tokio::spawn(acme::keep(config.clone(), listeners.clone(), counted));
        keepers.push(Keeper { config, listeners, task: task.abort_handle() });
    }
}
