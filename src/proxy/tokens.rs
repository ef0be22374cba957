//! The tokens that were read last: a client sends the same one until it writes again.
//!
//! One table for each worker and cluster, whatever connections the tokens come by: an ingress in
//! front mixes the requests of many clients on few of them. A token's set of places follows from
//! its last characters, which are of its signature and so as good as chance; another one of that
//! set takes the place of the one that was not asked for longest. What is remembered counts only
//! for exactly the same text, and only what was signed with the key in use is remembered, so a
//! forged token can neither be taken for another nor drive one out.

use crate::decide::token::Need;

/// Sets of places: together 256. One takes up to half a KiB with its text, usually less than half
/// of that.
const SETS: usize = 64;
/// Places of a set. With a single one, a quarter of 64 clients in turn would drive each other out.
const WAYS: usize = 4;
/// How many characters at the end choose the place.
const CHOOSING: usize = 8;

/// The table of one worker and cluster. Takes nothing before the first token.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// In each set, the one that was asked for last comes first.
    sets: Vec<[Option<Box<Known>>; WAYS]>,
}

#[derive(Debug)]
struct Known {
    text: Box<[u8]>,
    need: Need,
}

impl Tokens {
    /// What is known of a text.
    pub(super) fn get(&mut self, text: &[u8]) -> Option<&Need> {
        let set = self.sets.get_mut(set(text))?;
        let is_it = |known: &Option<Box<Known>>| known.as_ref().is_some_and(|k| *k.text == *text);
        let found = set.iter().position(is_it)?;
        set.get_mut(..=found)?.rotate_right(1);
        set.first()?.as_ref().map(|known| &known.need)
    }

    /// Remembers a token whose signature was right.
    pub(super) fn keep(&mut self, text: &[u8], need: &Need) {
        self.sets.resize_with(SETS, Default::default);
        if let Some(set) = self.sets.get_mut(set(text)) {
            set.rotate_right(1);
            let [first, ..] = set;
            *first = Some(Box::new(Known { text: text.into(), need: need.clone() }));
        }
    }

    /// Forgets them all: they were signed with another key.
    pub(super) fn clear(&mut self) {
        self.sets.clear();
    }
}

fn set(text: &[u8]) -> usize {
    let end = text.last_chunk::<CHOOSING>().map_or(0, |end| u64::from_be_bytes(*end));
    // Fibonacci hashing: the characters differ in their low bits, and the high ones are used.
    let mixed = end.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - SETS.ilog2());
    usize::try_from(mixed).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use smallvec::SmallVec;

    use super::*;

    fn need(lineage: u64) -> Need {
        Need { lineage: Some(lineage), databases: SmallVec::new() }
    }

    #[test]
    fn only_the_very_same_text_is_known() {
        let mut tokens = Tokens::default();
        assert_eq!(tokens.get(b"head-one-signature"), None);
        tokens.keep(b"head-one-signature", &need(1));
        assert_eq!(tokens.get(b"head-one-signature"), Some(&need(1)));
        // The same set.
        assert_eq!(tokens.get(b"head-two-signature"), None);
        tokens.clear();
        assert_eq!(tokens.get(b"head-one-signature"), None);
        assert_eq!(tokens.get(b"short"), None);
    }

    #[test]
    fn who_was_not_asked_for_longest_makes_room() {
        let mut tokens = Tokens::default();
        let text = |n: u64| format!("head-{n}-signature").into_bytes();
        (0..4).for_each(|n| tokens.keep(&text(n), &need(n)));
        assert_eq!(tokens.get(&text(0)), Some(&need(0)));
        tokens.keep(&text(4), &need(4));
        assert_eq!(tokens.get(&text(1)), None, "another took its place");
        for kept in [0, 2, 3, 4] {
            assert_eq!(tokens.get(&text(kept)), Some(&need(kept)));
        }
    }

    #[test]
    fn the_table_is_bounded_and_all_of_it_is_used() {
        let mut tokens = Tokens::default();
        for n in 0..10_000_u64 {
            tokens.keep(format!("{n:08}").as_bytes(), &need(n));
        }
        assert_eq!(tokens.sets.len(), SETS);
        let used = tokens.sets.iter().flatten().flatten().count();
        assert!(used > SETS * WAYS * 9 / 10, "{used}");
    }
}
