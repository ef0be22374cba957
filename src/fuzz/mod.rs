//! What cargo-fuzz calls with bytes that nobody would send, and what must hold of any: see
//! `docs/fuzzing.md`.
//!
//! A target is a function here and a file in `fuzz/fuzz_targets`. `cargo test` runs each with every
//! file of its corpus, so that what was found once stays found. Not a part of the program: there is
//! none of it without `cfg(test)` or `cfg(fuzzing)`.
#![allow(
    clippy::disallowed_methods,
    clippy::missing_panics_doc,
    clippy::single_match_else,
    clippy::trivially_copy_pass_by_ref,
    reason = "test code: it is there to panic, and makes points in time as test data"
)]

mod edges;
mod exchange;
mod frames;
mod http;
mod node;
mod strict;
mod tunnel;
mod words;

pub use self::{
    edges::{h2_frames, headers, proxy_protocol, websocket},
    http::{answer, downgrade, request},
    node::answer_h2,
    tunnel::tunnel,
    words::{config, consul, litefs, replay, token},
};

#[cfg(test)]
mod tests {
    use std::{
        fs,
        panic::{AssertUnwindSafe, catch_unwind},
        path::Path,
    };

    type Target = fn(&[u8]);

    const TARGETS: [(&str, Target); 14] = [
        ("answer", super::answer),
        ("answer_h2", super::answer_h2),
        ("config", super::config),
        ("consul", super::consul),
        ("downgrade", super::downgrade),
        ("h2_frames", super::h2_frames),
        ("headers", super::headers),
        ("litefs", super::litefs),
        ("proxy_protocol", super::proxy_protocol),
        ("replay", super::replay),
        ("request", super::request),
        ("token", super::token),
        ("tunnel", super::tunnel),
        ("websocket", super::websocket),
    ];

    fn names(below: &Path) -> Vec<String> {
        let entries = fs::read_dir(below).expect("it is there");
        let names = entries.map(|entry| entry.expect("it is listed").file_name());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_corpus_holds() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let mut failed = Vec::new();
        for (target, run) in TARGETS {
            let corpus = fuzz.join("corpus").join(target);
            let names = names(&corpus);
            assert!(!names.is_empty(), "{target} has no seeds");
            for name in names {
                let data = fs::read(corpus.join(&name)).expect("it can be read");
                if catch_unwind(AssertUnwindSafe(|| run(&data))).is_err() {
                    failed.push(format!("{target}/{name}"));
                }
            }
        }
        assert!(failed.is_empty(), "these seeds break what must hold: {failed:?}");
    }

    #[test]
    fn every_target_is_a_file_and_has_a_corpus() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let targets = TARGETS.map(|(name, _)| name.to_owned());
        assert_eq!(names(&fuzz.join("corpus")), targets);
        assert_eq!(names(&fuzz.join("fuzz_targets")), targets.map(|name| format!("{name}.rs")));
    }
}
