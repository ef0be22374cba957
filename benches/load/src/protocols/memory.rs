//! What idle and slow clients cost in memory. All proxies have theirs at the same time: nothing
//! here depends on how fast anybody is.

use std::{thread::sleep, time::Duration};

use super::{
    KEPT, Plan, Proxy,
    crowd::{Crowd, Kind},
    page,
    talk::{Want, Way},
    upstream,
};
use crate::{Failure, protocols::tls::Certificate};

const IDLE: usize = 5_000;
const SLOW: usize = 1_000;
/// The first ones make a process allocate what it needs once.
const FIRST: usize = 8;
/// litegate takes a connection's machinery down after a second of quiet, checked once a second.
const QUIET: Duration = Duration::from_secs(3);
/// A slow client moves this much, and then waits.
const STEP: usize = 1024;
const PAUSE: Duration = Duration::from_millis(250);
/// Steps until memory is first looked at, and until it is looked at again.
const EARLIER: usize = 12;
const LATER: usize = 32;

/// What clients do, and what each proxy had resident.
pub(super) struct State {
    what: &'static str,
    kind: Kind,
    pub(super) connections: usize,
    pub(super) times: [&'static str; 2],
    pub(super) rows: Vec<Row>,
}

/// One proxy.
pub(super) struct Row {
    pub(super) name: &'static str,
    /// KiB.
    before: u64,
    then: [u64; 2],
}

impl Row {
    /// KiB of each connection.
    pub(super) fn each(&self, time: usize, connections: usize) -> f64 {
        let now = self.then.get(time).copied().unwrap_or_default();
        now.saturating_sub(self.before) as f64 / connections as f64
    }
}

impl State {
    fn idle(what: &'static str, way: Way, tls: bool) -> Self {
        let kind = Kind { way, tls, ..KEPT };
        let times = ["at once", "after 3 s"];
        Self { what, kind, connections: IDLE, times, rows: Vec::new() }
    }

    fn slow(what: &'static str, way: Way, want: Want, tls: bool) -> Self {
        let kind = Kind { way, want, tls, ..KEPT };
        let times = ["after 3 s", "after 8 s"];
        Self { what, kind, connections: SLOW, times, rows: Vec::new() }
    }

    pub(super) fn title(&self) -> String {
        format!("{} {}", self.connections, self.what)
    }
}

fn states() -> Vec<State> {
    vec![
        State::idle("idle connections, HTTP/1.1 in clear text", Way::Http1, false),
        State::idle("idle connections, HTTP/1.1 over TLS", Way::Http1, true),
        State::idle("idle connections, HTTP/2 in clear text", Way::H2, false),
        State::idle("idle connections, HTTP/2 over TLS", Way::H2, true),
        State::slow(
            "slow readers of 1 GiB, HTTP/1.1 in clear text: 4 KiB a second each",
            Way::Http1,
            Want::Endless,
            false,
        ),
        State::slow(
            "slow readers of 1 GiB, HTTP/1.1 over TLS: 4 KiB a second each",
            Way::Http1,
            Want::Endless,
            true,
        ),
        State::slow(
            "slow readers of 1 GiB, HTTP/2 over TLS: windows of 64 KiB, wider by 4 KiB a second",
            Way::H2,
            Want::Endless,
            true,
        ),
        State::slow(
            "slow uploads, HTTP/1.1 in clear text: 4 KiB a second each",
            Way::Http1,
            Want::Upload,
            false,
        ),
        State::slow(
            "slow uploads, HTTP/2 over TLS: 4 KiB a second each",
            Way::H2,
            Want::Upload,
            true,
        ),
    ]
}

/// Measures memory. Returns the page and the number of connections that broke.
pub(crate) fn run(plan: Plan<'_>) -> Result<(String, u64), Failure> {
    let certificate = Certificate::make()?;
    let mut states = states();
    let mut broken = 0;
    for state in &mut states {
        let upstream = upstream(plan.cores)?;
        let start = |program| Proxy::start(program, &upstream, &certificate, plan.cores);
        let proxies = plan.programs.iter().map(start).collect::<Result<Vec<_>, _>>()?;
        let mut crowds = Vec::new();
        for proxy in &proxies {
            let address = proxy.address(state.kind);
            Crowd::new(address, Kind { want: Want::Small, ..state.kind })?.settle(FIRST)?;
            let before = proxy.running.tree()?.resident()?;
            state.rows.push(Row { name: proxy.running.name, before, then: [0; 2] });
            crowds.push(Crowd::new(address, state.kind)?);
        }
        let look = |state: &mut State, time: usize| {
            for (proxy, row) in proxies.iter().zip(&mut state.rows) {
                if let Some(then) = row.then.get_mut(time) {
                    *then = proxy.running.tree()?.resident()?;
                }
            }
            Ok::<_, Failure>(())
        };
        if state.kind.want == Want::Small {
            for (row, (crowd, proxy)) in state.rows.iter_mut().zip(crowds.iter_mut().zip(&proxies))
            {
                crowd.settle(state.connections)?;
                row.then[0] = proxy.running.tree()?.resident()?;
            }
            // Quiet is what is measured here.
            sleep(QUIET);
            look(state, 1)?;
        } else {
            for crowd in &mut crowds {
                // Those that the first ones left serve some of these, or are closed meanwhile.
                let before = upstream.open().saturating_sub(FIRST * proxies.len());
                crowd.begin(state.connections, || upstream.open().saturating_sub(before))?;
            }
            for step in 1..=LATER {
                // So is slowness.
                sleep(PAUSE);
                let errors = crowds.iter_mut().map(|crowd| crowd.step(STEP));
                let errors = errors.sum::<Result<u64, Failure>>()?;
                match step {
                    EARLIER => look(state, 0)?,
                    LATER => {
                        look(state, 1)?;
                        broken += errors;
                        eprintln!("{}: {errors} broke", state.title());
                    }
                    _ => {}
                }
            }
        }
        for row in &state.rows {
            eprintln!(
                "{}: {} {:.2} KiB, then {:.2} KiB",
                state.title(),
                row.name,
                row.each(0, state.connections),
                row.each(1, state.connections)
            );
        }
    }
    Ok((page::memory(&plan.header, &states), broken))
}
