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
#[cfg(feature = "http3")]
mod h3;
mod http;
mod node;
#[cfg(feature = "http3")]
mod quic;
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
#[cfg(feature = "http3")]
pub use self::{
    h3::{h3_frames, qpack},
    quic::request_h3,
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

    /// Those of HTTP/3, which can be run with its feature alone.
    const OF_HTTP3: [&str; 3] = ["h3_frames", "qpack", "request_h3"];

    fn targets() -> Vec<(&'static str, Target)> {
        #[cfg(feature = "http3")]
        let of_http3: [Target; 3] = [super::h3_frames, super::qpack, super::request_h3];
        #[cfg(not(feature = "http3"))]
        let of_http3: [Target; 0] = [];
        TARGETS.into_iter().chain(OF_HTTP3.into_iter().zip(of_http3)).collect()
    }

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
        for (target, run) in targets() {
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

    /// Words from `fuzz/dictionaries`.
    fn words(target: &str) -> Vec<Vec<u8>> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/dictionaries").join(target);
        let text = fs::read_to_string(file.with_extension("dict")).unwrap_or_default();
        let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
        let word = |quoted: &str| {
            let (mut word, mut bytes) = (Vec::new(), quoted.bytes());
            while let Some(byte) = bytes.next() {
                word.push(match (byte, byte == b'\\') {
                    (_, true) => match bytes.next().expect("something is escaped") {
                        b'x' => {
                            let digits: Vec<u8> = bytes.by_ref().take(2).collect();
                            let digits = String::from_utf8(digits).expect("digits");
                            u8::from_str_radix(&digits, 16).expect("digits")
                        }
                        other => other,
                    },
                    (byte, false) => byte,
                });
            }
            word
        };
        quoted.map(word).collect()
    }

    /// Something like one of these, and perhaps like two.
    fn like(seeds: &[Vec<u8>], words: &[Vec<u8>], rng: &mut fastrand::Rng) -> Vec<u8> {
        let seed = |rng: &mut fastrand::Rng| seeds[rng.usize(..seeds.len())].clone();
        let mut data = seed(rng);
        for _ in 0..rng.usize(1..5) {
            let at = rng.usize(..=data.len());
            let end = rng.usize(at..=data.len().min(at + 16));
            match rng.u8(..8) {
                0 | 1 if !words.is_empty() => {
                    let word = &words[rng.usize(..words.len())];
                    data.splice(at..if rng.bool() { at } else { end }, word.iter().copied());
                }
                2 => drop(data.drain(at..end)),
                3 => {
                    let piece = data[at..end].to_vec();
                    let to = rng.usize(..=data.len());
                    data.splice(to..to, piece);
                }
                4 => {
                    let other = seed(rng);
                    data.truncate(at);
                    data.extend_from_slice(&other[rng.usize(..=other.len())..]);
                }
                5 => data.insert(at, *rng.choice(b"\r\n\0\t :;,=\"\\\x7f\x80\xff0").expect("some")),
                6 if at < data.len() => data[at] ^= 1 << rng.u8(..8),
                _ if at < data.len() => data[at] = rng.u8(..),
                _ => data.push(rng.u8(..)),
            }
        }
        data.truncate(4096);
        data
    }

    /// `LITEGATE_FUZZ_INPUTS` of them: the same ones every time and everywhere, as nothing but the
    /// corpus, the dictionary and the number of an input decides what it is.
    fn what_is_like_the_corpus_holds(target: &str) {
        let inputs = std::env::var("LITEGATE_FUZZ_INPUTS");
        let inputs = inputs.map_or(100, |inputs| inputs.parse().expect("a number of inputs"));
        let (_, run) =
            targets().into_iter().find(|(name, _)| *name == target).expect("there is one");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let corpus = root.join("fuzz/corpus").join(target);
        let read = |name: String| fs::read(corpus.join(name)).expect("it can be read");
        let seeds: Vec<Vec<u8>> = names(&corpus).into_iter().map(read).collect();
        let words = words(target);
        for number in 0..inputs {
            let data = like(&seeds, &words, &mut fastrand::Rng::with_seed(number));
            if catch_unwind(AssertUnwindSafe(|| run(&data))).is_err() {
                let artifacts = root.join("target/fuzz/artifacts");
                fs::create_dir_all(&artifacts).expect("it can be made");
                let file = artifacts.join(format!("{target}-{number}"));
                fs::write(&file, &data).expect("it can be written");
                panic!("input {number} breaks {target}: {}", file.display());
            }
        }
    }

    #[test]
    fn answers_like_the_corpus_hold() {
        what_is_like_the_corpus_holds("answer");
    }

    #[test]
    fn answers_over_h2_like_the_corpus_hold() {
        what_is_like_the_corpus_holds("answer_h2");
    }

    #[test]
    fn requests_like_the_corpus_hold() {
        what_is_like_the_corpus_holds("request");
    }

    #[test]
    fn requests_over_h2_like_the_corpus_hold() {
        what_is_like_the_corpus_holds("downgrade");
    }

    #[cfg(feature = "http3")]
    #[test]
    fn requests_over_h3_like_the_corpus_hold() {
        what_is_like_the_corpus_holds("request_h3");
    }

    #[test]
    fn tunnels_like_the_corpus_hold() {
        what_is_like_the_corpus_holds("tunnel");
    }

    #[test]
    fn every_target_is_a_file_and_has_a_corpus() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let targets = TARGETS.iter().map(|(name, _)| *name).chain(OF_HTTP3);
        let mut targets: Vec<String> = targets.map(str::to_owned).collect();
        targets.sort();
        assert_eq!(names(&fuzz.join("corpus")), targets);
        for name in &mut targets {
            name.push_str(".rs");
        }
        assert_eq!(names(&fuzz.join("fuzz_targets")), targets);
    }
}
