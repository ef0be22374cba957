//! The tokens that were read last: a client sends the same one until it writes again.
//!
//! One table for each worker and cluster, whatever connections the tokens come by: an ingress in
//! front mixes the requests of many clients on few of them. A token's place follows from its last
//! characters, which are of its signature and so as good as chance; another one of that place
//! takes it. What is remembered counts only for exactly the same text, and only what was signed
//! with the key in use is remembered, so a forged token can neither be taken for another nor drive
//! one out.

use crate::decide::token::Need;

/// Places. One takes up to half a KiB with its text, usually less than half of that.
const PLACES: usize = 256;
/// How many characters at the end choose the place.
const CHOOSING: usize = 8;

/// The table of one worker and cluster. Takes nothing before the first token.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    places: Vec<Option<Box<Known>>>,
}

#[derive(Debug)]
struct Known {
    text: Box<[u8]>,
    need: Need,
}

impl Tokens {
    /// What is known of a text.
    pub(super) fn get(&self, text: &[u8]) -> Option<&Need> {
        let known = self.places.get(place(text))?.as_ref()?;
        (*known.text == *text).then_some(&known.need)
    }

    /// Remembers a token whose signature was right.
    pub(super) fn keep(&mut self, text: &[u8], need: &Need) {
        self.places.resize_with(PLACES, || None);
        if let Some(known) = self.places.get_mut(place(text)) {
            *known = Some(Box::new(Known { text: text.into(), need: need.clone() }));
        }
    }

    /// Forgets them all: they were signed with another key.
    pub(super) fn clear(&mut self) {
        self.places.clear();
    }
}

fn place(text: &[u8]) -> usize {
    let end = text.last_chunk::<CHOOSING>().map_or(0, |end| u64::from_be_bytes(*end));
    // Fibonacci hashing: the characters differ in their low bits, and the high ones are used.
    let mixed = end.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLACES.ilog2());
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
        // The same place.
        assert_eq!(tokens.get(b"head-two-signature"), None);
        tokens.keep(b"head-two-signature", &need(2));
        assert_eq!(tokens.get(b"head-one-signature"), None, "another took its place");
        assert_eq!(tokens.get(b"head-two-signature"), Some(&need(2)));
        tokens.clear();
        assert_eq!(tokens.get(b"head-two-signature"), None);
        assert_eq!(tokens.get(b"short"), None);
    }

    #[test]
    fn the_table_is_bounded_and_all_of_it_is_used() {
        let mut tokens = Tokens::default();
        for n in 0..10_000_u64 {
            tokens.keep(format!("{n:08}").as_bytes(), &need(n));
        }
        assert_eq!(tokens.places.len(), PLACES);
        let used = tokens.places.iter().flatten().count();
        assert!(used > PLACES * 9 / 10, "{used}");
    }
}
