//! What was measured, as pages of Markdown. Nothing here measures anything.

use std::fmt::Write as _;

use super::memory::State;
use crate::{
    contender::PEER,
    report::{self, Row, SATURATED, ratio},
};

/// What litegate may cost, as a multiple of HAProxy.
const DEAREST: f64 = 1.0;

/// One workload.
pub(super) struct Section {
    pub(super) title: &'static str,
    pub(super) rows: Vec<Row>,
}

/// Requests without the right answer.
pub(super) fn errors(sections: &[Section]) -> u64 {
    let rows = sections.iter().flat_map(|section| &section.rows);
    rows.flat_map(|row| &row.saturations).map(|round| round.errors).sum()
}

/// CPU per request; ratios are to the peer, in this same run.
pub(super) fn markdown(header: &[String], sections: &[Section]) -> String {
    let mut page = String::from("# TLS, HTTP/2 and WebSocket\n\n");
    for line in header {
        let _ = writeln!(page, "- {line}");
    }
    let _ = writeln!(
        page,
        "\nEach figure is the median of all rounds, with the least and the greatest; `×` is the ratio \
         of a median to {PEER}'s, which is to be {DEAREST:.2} at most.\n\n\
         **CPU** is user and system time of the proxy's processes, in microseconds per request or \
         message, while all clients ask as fast as they are answered. **Busy** is how much of its \
         core that was. TLS is version 1.3 with AES-128-GCM, X25519 and an ECDSA certificate on \
         P-256, because the clients offer nothing else. The node speaks HTTP/1.1 in clear text."
    );
    for section in sections {
        section.write(&mut page);
    }
    let _ = writeln!(page, "\nRequests without the right answer: {}.", errors(sections));
    page
}

impl Section {
    fn write(&self, page: &mut String) {
        report::saturation(page, self.title, "per second", &self.rows, PEER);
        for row in self.rows.iter().filter(|row| row.busy() < SATURATED) {
            let _ = writeln!(
                page,
                "\n{} was not saturated: the clients or somebody else used the other core, and an \
                 idle proxy wakes up for fewer requests at a time.",
                row.name
            );
        }
    }
}

/// Memory per connection; ratios are to the peer, in this same run.
pub(super) fn memory(header: &[String], states: &[State]) -> String {
    let mut page = String::from("# Memory of idle and of slow clients\n\n");
    for line in header {
        let _ = writeln!(page, "- {line}");
    }
    let _ = writeln!(
        page,
        "\nResident memory of a fresh process beyond what it had before these connections, in KiB per \
         connection; `×` is the ratio to {PEER}'s. What waits in the kernel's socket buffers is not \
         part of it. A slow client's memory is flat if the later figure is no greater than the \
         earlier."
    );
    for state in states {
        let [earlier, later] = state.times;
        let _ = writeln!(
            page,
            "\n## {}\n\n| | {earlier} | × | {later} | × |\n|---|---|---|---|---|",
            state.title()
        );
        let peer = state.rows.iter().find(|row| row.name == PEER);
        for row in &state.rows {
            let _ = write!(page, "| {} ", row.name);
            for time in 0..2 {
                let of = |row: &super::memory::Row| row.each(time, state.connections);
                let _ = write!(page, "| {:.2} | {} ", of(row), ratio(of(row), peer.map(of)));
            }
            page.push_str("|\n");
        }
    }
    page
}
