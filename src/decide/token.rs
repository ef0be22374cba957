//! What a client carries so that it reads its writes.
//!
//! A token says how far the primary was when it had done the client's last write: the position of
//! each database, and which process was primary then (its lineage). It is signed, bounded, and
//! needs no memory on this side, so that any instance of litegate honours what any other gave.
//!
//! Where positions are not known a token says until when the client's reads go to the primary.
//!
//! Pure: keys, positions and time are arguments.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use sha2::Sha256;
use smallvec::SmallVec;

use crate::{
    litefs::TXID_COOKIE,
    topology::{
        Epoch,
        lineage::Kept,
        position::{DATABASES, Database, Position, Positions, Reach},
    },
};

/// How API clients carry a token, both ways.
pub const TOKEN: HeaderName = HeaderName::from_static("litegate-token");

/// The longest token that is looked at: one with [`DATABASES`] positions is shorter.
const LONGEST: usize = 512;
const VERSION: u8 = 1;
/// What a token holds.
const NEED: u8 = 0;
const AFFINITY: u8 = 1;
const BLIND: u8 = 2;
const BEYOND: u8 = 3;
/// How much of the HMAC is kept: 128 bits are beyond guessing.
const MAC: usize = 16;
/// How far in the future an affinity may end beyond its length: clocks differ.
const SKEW: Duration = Duration::from_mins(1);

/// What a client must not read the past of.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Need {
    /// The process that was primary then (`Litefs-Id`). `None`: not known, as in LiteFS's cookie.
    pub lineage: Option<u64>,
    /// Where its databases were.
    pub databases: SmallVec<[(Database, Position); 2]>,
}

impl Need {
    /// Whether it is further along the same lineage than `other`.
    pub fn is_after(&self, other: &Self) -> bool {
        self.lineage == other.lineage
            && other.databases.iter().all(|(database, theirs)| {
                let ours = self.databases.iter().find(|(known, _)| known == database);
                ours.is_some_and(|(_, ours)| ours.txid >= theirs.txid)
            })
    }

    /// Whether it is lost, seen from a write that was acknowledged later at `newer` by a node whose
    /// history is `node`: another primary's, perhaps, of which no snapshot tells yet, nor `newer`.
    pub fn is_lost_at(&self, newer: &Self, node: &Positions) -> bool {
        self.lineage.is_some()
            && self.lineage != node.incarnation.or(newer.lineage)
            && self.databases.iter().any(|(database, ours)| {
                let theirs = newer.databases.iter().find(|(known, _)| known == database);
                theirs.is_some_and(|(_, theirs)| theirs.txid < ours.txid)
                    || node.reach(*database, *ours) == Reach::Diverged
            })
    }

    /// Whether a node has all of it, if the primary has. Where nobody saw or remembers how the node
    /// got to where it is, it has to be on the primary's branch; or, while it can't be told from
    /// one that is, it has to have been seen to pass.
    pub fn is_reached(&self, node: &Positions, primary: Option<&Positions>) -> Reach {
        match self.reach(node) {
            Reach::Unknown => {
                let primary = primary.filter(|primary| !primary.is_empty());
                let is_on_branch = primary.is_some_and(|primary| node.is_on_branch_of(primary));
                let may_be = || primary.is_none_or(|primary| node.may_follow(primary));
                let is_there = is_on_branch || may_be() && node.has_passed(&self.databases);
                if is_there { Reach::Reached } else { Reach::NotYet }
            }
            seen => seen,
        }
    }

    /// Whether a node's history contains all of it, as far as that was seen.
    pub fn reach(&self, positions: &Positions) -> Reach {
        if let [(database, needed)] = &self.databases[..] {
            return positions.reach(*database, *needed);
        }
        self.databases.iter().fold(Reach::Reached, |reach, (database, needed)| {
            reach.and(positions.reach(*database, *needed))
        })
    }
}

/// A token, read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Token {
    /// By position.
    Need(Need),
    /// The primary until then, in milliseconds since the Unix epoch.
    Affinity(u64),
    /// Both: nobody could say how far the primary was after the last write, but the client had
    /// seen this before.
    Blind {
        /// By position.
        need: Need,
        /// Whether that write certainly came after it.
        beyond: bool,
        /// The primary until then.
        until: u64,
    },
}

/// Why a token counts for nothing. The words are metric labels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Void {
    /// Longer than any token.
    Oversized,
    /// Not a token.
    Malformed,
    /// Signed with another key, or altered.
    Forged,
    /// Another cluster's.
    Foreign,
    /// Of a time or a transaction that has not been yet.
    Future,
    /// Its write was lost in a failover.
    Lost,
}

impl Void {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Oversized, Self::Malformed, Self::Forged, Self::Foreign, Self::Future, Self::Lost];

    /// The word for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::Forged => "forged",
            Self::Foreign => "foreign",
            Self::Future => "future",
            Self::Lost => "lost",
        }
    }
}

/// How a read with a token found its node. The words are metric labels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TokenRead {
    /// A replica was there already.
    Fresh,
    /// A replica was waited for.
    Waited,
    /// The primary served it.
    Primary,
    /// Nobody could.
    Refused,
}

impl TokenRead {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Fresh, Self::Waited, Self::Primary, Self::Refused];

    /// The word for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Waited => "waited",
            Self::Primary => "primary",
            Self::Refused => "refused",
        }
    }
}

/// What the tokens of one cluster are signed with.
#[derive(Clone)]
pub struct Key {
    mac: Hmac<Sha256>,
    cluster: u32,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Key {
    /// For the cluster of this id, from a secret, or from the id alone: then whoever knows the id
    /// can make tokens, and gains nothing but that its own reads wait.
    pub fn derive(secret: Option<&str>, id: &str) -> Self {
        let root = secret.unwrap_or("litegate");
        let mut outer = keyed(root.as_bytes());
        outer.update(b"token 1\0");
        outer.update(id.as_bytes());
        let key = outer.finalize().into_bytes();
        Self { mac: keyed(&key), cluster: Database::named(id).0 }
    }

    pub(crate) fn sign(&self, bytes: &[u8]) -> [u8; MAC] {
        let mut mac = self.mac.clone();
        mac.update(bytes);
        let whole = mac.finalize().into_bytes();
        let mut kept = [0; MAC];
        kept.iter_mut().zip(whole).for_each(|(kept, byte)| *kept = byte);
        kept
    }
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    // HMAC takes a key of any length (RFC 2104 section 2): there is no error to return.
    #[expect(clippy::unwrap_used, reason = "HMAC takes a key of any length")]
    Hmac::<Sha256>::new_from_slice(key).unwrap()
}

impl Token {
    /// As it travels. Databases beyond [`DATABASES`] are left out.
    pub fn encode(&self, key: &Key) -> String {
        let mut bytes = SmallVec::<[u8; 128]>::new();
        let (kind, need, until) = match self {
            Self::Need(need) => (NEED, Some(need), None),
            Self::Affinity(until) => (AFFINITY, None, Some(until)),
            Self::Blind { need, beyond, until } => {
                (if *beyond { BEYOND } else { BLIND }, Some(need), Some(until))
            }
        };
        bytes.extend_from_slice(&[VERSION, kind]);
        bytes.extend_from_slice(&key.cluster.to_be_bytes());
        if let Some(until) = until {
            bytes.extend_from_slice(&until.to_be_bytes());
        }
        if let Some(need) = need {
            bytes.extend_from_slice(&need.lineage.unwrap_or(0).to_be_bytes());
            for (database, position) in need.databases.iter().take(DATABASES) {
                bytes.extend_from_slice(&database.0.to_be_bytes());
                bytes.extend_from_slice(&position.txid.to_be_bytes());
                bytes.extend_from_slice(&position.checksum.to_be_bytes());
            }
        }
        let mac = key.sign(&bytes);
        bytes.extend_from_slice(&mac);
        URL_SAFE_NO_PAD.encode(&bytes)
    }

    /// Reads what a client sent, at `now` in milliseconds since the Unix epoch. `longest` is how
    /// long an affinity may be.
    ///
    /// # Errors
    /// Why it counts for nothing.
    pub fn decode(text: &[u8], key: &Key, now: u64, longest: Duration) -> Result<Self, Void> {
        if text.len() > LONGEST {
            return Err(Void::Oversized);
        }
        let mut decoded = [0; LONGEST];
        let length =
            URL_SAFE_NO_PAD.decode_slice(text, &mut decoded).map_err(|_| Void::Malformed)?;
        let bytes = decoded.get(..length).ok_or(Void::Malformed)?;
        let (signed, mac) =
            bytes.split_at_checked(length.saturating_sub(MAC)).ok_or(Void::Malformed)?;
        let mut rest = signed;
        let head = take::<6>(&mut rest).ok_or(Void::Malformed)?;
        let [VERSION, kind @ NEED..=BEYOND, cluster @ ..] = head else {
            return Err(Void::Malformed);
        };
        if u32::from_be_bytes(cluster) != key.cluster {
            return Err(Void::Foreign);
        }
        // Whoever can measure a comparison of bytes through a network may have the token: it only
        // makes its own reads wait.
        if key.sign(signed) != *mac {
            return Err(Void::Forged);
        }
        let until = if kind == NEED {
            None
        } else {
            let until = u64::from_be_bytes(take::<8>(&mut rest).ok_or(Void::Malformed)?);
            let latest = now.saturating_add(millis(longest)).saturating_add(millis(SKEW));
            if until > latest {
                return Err(Void::Future);
            }
            if kind == AFFINITY {
                return Ok(Self::Affinity(until));
            }
            Some(until)
        };
        let first = u64::from_be_bytes(take::<8>(&mut rest).ok_or(Void::Malformed)?);
        let mut databases = SmallVec::new();
        while !rest.is_empty() {
            let entry = take::<20>(&mut rest).ok_or(Void::Malformed)?;
            let [d0, d1, d2, d3, numbers @ ..] = entry;
            let mut numbers = &numbers[..];
            let mut number = || take::<8>(&mut numbers).map_or(0, u64::from_be_bytes);
            let position = Position { txid: number(), checksum: number() };
            databases.push((Database(u32::from_be_bytes([d0, d1, d2, d3])), position));
        }
        let need = Need { lineage: Some(first).filter(|id| *id != 0), databases };
        Ok(match until {
            None => Self::Need(need),
            Some(until) => Self::Blind { need, beyond: kind == BEYOND, until },
        })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

/// What a request carries, unread.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Carried<'h> {
    /// litegate's own token: the header, or else the cookie.
    pub token: Option<&'h [u8]>,
    /// LiteFS's cookie.
    pub txid: Option<&'h [u8]>,
}

/// Looks for tokens in a request's fields. `cookie` is the name of litegate's own; `speaks` says
/// whether any field is named `Litegate-…`: of most requests none is.
pub fn carried<'h>(head: &'h HeaderMap, cookie: &str, speaks: bool) -> Carried<'h> {
    let mut carried = Carried::default();
    for line in head.get_all(header::COOKIE) {
        for pair in pairs(line.as_bytes()) {
            if let Some(value) = valued(pair, TXID_COOKIE) {
                carried.txid = Some(value);
            } else if let Some(value) = valued(pair, cookie) {
                carried.token = Some(value);
            }
        }
    }
    if let Some(token) = speaks.then(|| head.get(&TOKEN)).flatten() {
        carried.token = Some(token.as_bytes());
    }
    carried
}

/// The pairs of a `Cookie` line: many, and long ones, none of which is litegate's.
fn pairs(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = memchr::memchr_iter(b';', line).chain([line.len()]);
    let mut from = 0;
    ends.map(move |end| {
        let pair = line.get(from..end).unwrap_or_default();
        from = end + 1;
        pair.trim_ascii()
    })
}

fn valued<'p>(pair: &'p [u8], name: &str) -> Option<&'p [u8]> {
    pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")
}

/// The request's cookies without LiteFS's: it asks for what will never be, and LiteFS would wait
/// five seconds for it. `None`: no cookie is left.
pub fn without_txid(head: &HeaderMap) -> Option<HeaderValue> {
    let mut kept = Vec::new();
    for line in head.get_all(header::COOKIE) {
        for pair in pairs(line.as_bytes()) {
            if valued(pair, TXID_COOKIE).is_none() {
                if !kept.is_empty() {
                    kept.extend_from_slice(b"; ");
                }
                kept.extend_from_slice(pair);
            }
        }
    }
    // Made of parts of header values.
    HeaderValue::from_bytes(&kept).ok().filter(|kept| !kept.is_empty())
}

/// Whether what a token stands for still is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It is in the primary's history, or nothing speaks against it.
    Stands,
    /// It is not, and never will be.
    Gone,
    /// It is ahead of what is known of the primary: only an exact reading tells.
    Ahead,
}

/// Judges a token by the primaries that were and the positions of the one that is.
///
/// A later primary has of its predecessors' history what it kept: the transactions since then have
/// the same numbers, and are others.
pub fn judge(need: &Need, lineage: &[Epoch], primary: Option<&Positions>) -> Standing {
    if primary.is_some_and(|primary| primary.contains(&need.databases) == Some(true)) {
        // However it came there.
        return Standing::Stands;
    }
    let goes_beyond = |kept: &Kept| {
        need.databases.iter().any(|(database, needed)| {
            kept.iter().any(|(known, kept)| known == database && needed.txid > *kept)
        })
    };
    let is_after = |start: &Positions| {
        need.databases.iter().any(|(database, needed)| {
            start.get(*database).is_some_and(|began| needed.txid > began.txid)
        })
    };
    // A process may have been primary more than once: the token is of one of the times that began
    // before its position, and, as far as their checksums are remembered, of the one that has it.
    let may_be_of = |epoch: &Epoch| {
        need.lineage == Some(epoch.incarnation) && epoch.start.as_deref().is_none_or(is_after)
    };
    let is_lost_after = |of: usize| {
        let later = lineage.get(of + 1..).unwrap_or_default();
        later.iter().filter_map(|epoch| epoch.kept.as_ref()).any(goes_beyond)
    };
    let times = || lineage.iter().enumerate().filter(|(_, epoch)| may_be_of(epoch));
    let contains =
        |epoch: &Epoch| epoch.end.as_deref().and_then(|end| end.contains(&need.databases));
    let certain = || times().find(|(_, epoch)| contains(epoch) == Some(true));
    let mut possible = times().filter(|(_, epoch)| contains(epoch) != Some(false));
    let (first, last) = if let Some((of, _)) = certain() {
        (Some(of), Some(of))
    } else {
        let first = possible.next().map(|(of, _)| of);
        (first, possible.next_back().map(|(of, _)| of).or(first))
    };
    if last.is_some_and(is_lost_after) {
        return Standing::Gone;
    }
    let Some(primary) = primary.filter(|positions| !positions.is_empty()) else {
        return Standing::Stands;
    };
    if first != last && first.is_some_and(is_lost_after) {
        // Gone if it is of the first time, there if it is of the last: the numbers are the same,
        // only the checksum tells, and that only once the primary is there again. Where it is
        // forgotten already, nothing speaks against the token.
        return need.databases.iter().fold(Standing::Stands, |so_far, (database, needed)| {
            let known = primary.get(*database).map_or(0, |position| position.txid);
            match primary.checksum(*database, needed.txid) {
                _ if so_far == Standing::Gone => Standing::Gone,
                Some(checksum) if checksum != 0 && checksum != needed.checksum => Standing::Gone,
                None if known < needed.txid => Standing::Ahead,
                _ => so_far,
            }
        });
    }
    match need.reach(primary) {
        Reach::Reached | Reach::Unknown => Standing::Stands,
        Reach::Diverged => Standing::Gone,
        // The feed is a moment late, or another instance saw it first.
        Reach::NotYet if need.lineage.is_some() && need.lineage == primary.incarnation => {
            Standing::Stands
        }
        Reach::NotYet => Standing::Ahead,
    }
}

/// Whether a write that came after `need`, nobody knows how far, is certainly lost: somebody took
/// over who had nothing beyond it.
pub fn is_lost_beyond(need: &Need, lineage: &[Epoch]) -> bool {
    let of = lineage.iter().rposition(|epoch| need.lineage == Some(epoch.incarnation));
    let later = of.and_then(|of| lineage.get(of + 1..)).unwrap_or_default();
    let has_nothing_more = |kept: &Kept| {
        kept.iter().all(|(database, kept)| {
            need.databases.iter().any(|(known, needed)| known == database && *kept <= needed.txid)
        })
    };
    later.iter().filter_map(|epoch| epoch.kept.as_ref()).any(has_nothing_more)
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const AFFINITY: Duration = Duration::from_secs(2);

    fn key() -> Key {
        Key::derive(None, "LFSC0000000000000001")
    }

    fn app() -> Database {
        Database::named("app.db")
    }

    fn need(lineage: u64, txid: u64, branch: u64) -> Need {
        let position = Position { txid, checksum: 1 << 63 | branch << 32 | txid };
        Need { lineage: Some(lineage), databases: [(app(), position)].into_iter().collect() }
    }

    fn at(incarnation: u64, from: u64, to: u64, branch: u64) -> Positions {
        let mut positions = Positions::of(Some(incarnation));
        for txid in from..=to {
            let position = Position { txid, checksum: 1 << 63 | branch << 32 | txid };
            positions.set("app.db", position, Instant::now());
        }
        positions
    }

    fn epoch(incarnation: u64, start: Option<Positions>) -> Epoch {
        let kept = start.as_ref().map(|start| start.iter().map(|(d, _, at)| (d, at.txid)));
        let kept = kept.map(Iterator::collect);
        Epoch { incarnation, start: start.map(Arc::new), kept, ..Epoch::default() }
    }

    #[test]
    fn what_other_clusters_or_keys_made_is_void() {
        let token = Token::Need(need(1, 5, 1)).encode(&key());
        let read = |key: &Key| Token::decode(token.as_bytes(), key, NOW, AFFINITY);
        assert_eq!(read(&key()), Ok(Token::Need(need(1, 5, 1))));
        assert_eq!(read(&Key::derive(None, "LFSC0000000000000002")), Err(Void::Foreign));
        assert_eq!(read(&Key::derive(Some("x"), "LFSC0000000000000001")), Err(Void::Forged));
    }

    #[test]
    fn an_affinity_that_ends_too_late_is_void() {
        let token = |until| Token::Affinity(until).encode(&key());
        let read = |text: &str| Token::decode(text.as_bytes(), &key(), NOW, AFFINITY);
        assert_eq!(read(&token(NOW + 2_000)), Ok(Token::Affinity(NOW + 2_000)));
        assert_eq!(read(&token(NOW + 3_600_000)), Err(Void::Future));
    }

    #[test]
    fn too_much_is_not_looked_at() {
        let text = "A".repeat(LONGEST + 1);
        assert_eq!(Token::decode(text.as_bytes(), &key(), NOW, AFFINITY), Err(Void::Oversized));
        let databases = (0..100).map(|n| (Database(n), Position { txid: 1, checksum: 1 }));
        let many = Token::Need(Need { lineage: Some(1), databases: databases.collect() });
        let text = many.encode(&key());
        let Ok(Token::Need(read)) = Token::decode(text.as_bytes(), &key(), NOW, AFFINITY) else {
            panic!("a token")
        };
        assert_eq!(read.databases.len(), DATABASES);
    }

    #[test]
    fn tokens_are_found_among_other_cookies() {
        let mut head = HeaderMap::new();
        head.append(header::COOKIE, HeaderValue::from_static("a=b; litegate=one;__txid=5"));
        head.append(header::COOKIE, HeaderValue::from_static("xlitegate=two; c"));
        let found = carried(&head, "litegate", true);
        assert_eq!(found, Carried { token: Some(b"one"), txid: Some(b"5") });
        assert_eq!(without_txid(&head).unwrap(), "a=b; litegate=one; xlitegate=two; c");
        head.insert(TOKEN, HeaderValue::from_static("three"));
        assert_eq!(carried(&head, "litegate", true).token, Some(&b"three"[..]));
        head.insert(header::COOKIE, HeaderValue::from_static("__txid=5"));
        assert_eq!(without_txid(&head), None);
    }

    #[test]
    fn a_write_that_the_next_primary_does_not_have_is_gone() {
        let lineage = [epoch(1, None), epoch(2, Some(at(2, 1, 5, 1)))];
        // The next primary has gone on for so long that nobody remembers the checksums.
        let mut primary = at(2, 1, 5, 1);
        for txid in 6..1_000 {
            let position = Position { txid, checksum: 1 << 63 | 2 << 32 | txid };
            primary.set("app.db", position, Instant::now());
        }
        assert_eq!(judge(&need(1, 5, 1), &lineage, Some(&primary)), Standing::Stands);
        assert_eq!(judge(&need(1, 6, 1), &lineage, Some(&primary)), Standing::Gone);
        assert_eq!(judge(&need(2, 7, 2), &lineage, Some(&primary)), Standing::Stands);
        assert_eq!(judge(&need(2, 2_000, 2), &lineage, Some(&primary)), Standing::Stands);
        assert_eq!(judge(&need(3, 2_000, 2), &lineage, Some(&primary)), Standing::Ahead);
    }

    #[test]
    fn a_primary_that_comes_back_is_told_from_its_earlier_time() {
        let lineage =
            [epoch(1, None), epoch(2, Some(at(2, 1, 5, 1))), epoch(1, Some(at(1, 1, 8, 2)))];
        let primary = at(1, 9, 20, 3);
        assert_eq!(judge(&need(1, 7, 1), &lineage, Some(&primary)), Standing::Gone);
        assert_eq!(judge(&need(1, 9, 3), &lineage, Some(&primary)), Standing::Stands);
    }

    #[test]
    fn a_write_of_an_earlier_time_is_told_from_its_number_s_next_use() {
        // Process 1 was primary, lost what it had beyond 5, and is primary again from 8 on.
        let lineage =
            [epoch(1, None), epoch(2, Some(at(2, 1, 5, 1))), epoch(1, Some(at(1, 1, 8, 2)))];
        let lost = need(1, 15, 1);
        let kept = need(1, 15, 3);
        let late = at(1, 9, 14, 3);
        assert_eq!(judge(&lost, &lineage, Some(&late)), Standing::Ahead, "nobody can say yet");
        assert_eq!(judge(&kept, &lineage, Some(&late)), Standing::Ahead);
        let there = at(1, 9, 20, 3);
        assert_eq!(judge(&lost, &lineage, Some(&there)), Standing::Gone);
        assert_eq!(judge(&kept, &lineage, Some(&there)), Standing::Stands);
        // No false alarm for whoever comes back after a long time.
        let long_ago = at(1, 9, 1_000, 3);
        assert_eq!(judge(&kept, &lineage, Some(&long_ago)), Standing::Stands);
    }

    #[test]
    fn a_lost_write_is_told_from_its_number_s_next_use_long_after() {
        // As above, and nobody remembers the primary's checksum there, but the first time's end.
        let first = Epoch { end: Some(Arc::new(at(1, 1, 15, 1))), ..epoch(1, None) };
        let lineage = [first, epoch(2, Some(at(2, 1, 5, 1))), epoch(1, Some(at(1, 1, 8, 2)))];
        let long_ago = at(1, 9, 1_000, 3);
        assert_eq!(judge(&need(1, 15, 1), &lineage, Some(&long_ago)), Standing::Gone);
        assert_eq!(judge(&need(1, 15, 3), &lineage, Some(&long_ago)), Standing::Stands);
        assert_eq!(judge(&need(1, 4, 1), &lineage, Some(&long_ago)), Standing::Stands);
        // A number that it did not reach the first time.
        assert_eq!(judge(&need(1, 16, 3), &lineage, Some(&long_ago)), Standing::Stands);
    }

    #[test]
    fn a_primary_that_goes_on_from_a_tail_that_was_left_behind_has_what_it_kept() {
        // Process 3 restarted with 9 transactions of the first primary, of which the second had
        // kept 5, and was primary when it was first heard: where it was says nothing.
        let strayed = Epoch { kept: Some([(app(), 5)].into()), ..epoch(3, None) };
        let lineage = [epoch(1, None), epoch(2, Some(at(2, 1, 5, 1))), strayed];
        let primary = at(3, 9, 20, 3);
        assert_eq!(judge(&need(2, 7, 2), &lineage, Some(&primary)), Standing::Gone);
        assert_eq!(judge(&need(1, 5, 1), &lineage, Some(&primary)), Standing::Stands);
        assert_eq!(judge(&need(3, 10, 3), &lineage, Some(&primary)), Standing::Stands);
    }

    #[test]
    fn a_write_of_unknown_position_is_lost_where_nothing_after_it_was_kept() {
        let with = |kept: &[(&str, u64)]| {
            let kept = kept.iter().map(|(name, txid)| (Database::named(name), *txid)).collect();
            [epoch(1, None), Epoch { kept: Some(kept), ..epoch(2, None) }]
        };
        for (kept, is_lost) in [
            (&[("app.db", 7)][..], true),
            (&[("app.db", 6)], true),
            (&[("app.db", 8)], false),
            (&[("app.db", 7), ("other", 1)], false),
        ] {
            assert_eq!(is_lost_beyond(&need(1, 7, 1), &with(kept)), is_lost, "{kept:?}");
            assert!(!is_lost_beyond(&need(2, 7, 1), &with(kept)), "the primary's own");
            assert!(!is_lost_beyond(&need(3, 7, 1), &with(kept)), "a stranger's");
        }
        assert!(!is_lost_beyond(&need(1, 7, 1), &[epoch(1, None), epoch(2, None)]));
    }

    #[test]
    fn checksums_tell_where_the_lineage_is_not_known() {
        let primary = at(2, 1, 9, 2);
        assert_eq!(judge(&need(7, 8, 1), &[], Some(&primary)), Standing::Gone);
        assert_eq!(judge(&need(7, 8, 2), &[], Some(&primary)), Standing::Stands);
        assert_eq!(judge(&need(7, 8, 2), &[], None), Standing::Stands);
    }

    #[test]
    fn a_later_write_elsewhere_shows_what_is_lost() {
        let new = at(2, 1, 12, 2);
        for (token, is_lost) in [
            (need(1, 13, 1), true),
            (need(1, 9, 1), true),
            (need(1, 9, 2), false),
            // Two writes through the same primary may be answered out of order.
            (need(2, 13, 2), false),
        ] {
            assert_eq!(token.is_lost_at(&need(2, 12, 2), &new), is_lost, "{token:?}");
            // It answers as primary, and nobody has heard of that yet.
            assert_eq!(token.is_lost_at(&need(1, 12, 2), &new), is_lost, "{token:?}");
        }
    }

    #[test]
    fn a_snapshot_past_a_position_is_no_proof_of_it() {
        let old = at(1, 1, 9, 1);
        let mut snapshot = old.clone();
        let other = at(2, 12, 12, 2);
        snapshot.set("app.db", other.get(app()).unwrap(), Instant::now());
        let token = need(1, 9, 1);
        assert_eq!(token.is_reached(&snapshot, Some(&old)), Reach::NotYet);
        assert_eq!(token.is_reached(&snapshot, None), Reach::NotYet);
        // Where the primary has been there too, the node is on its branch.
        assert_eq!(token.is_reached(&snapshot, Some(&at(2, 6, 12, 2))), Reach::Reached);
        assert_eq!(token.is_reached(&old, None), Reach::Reached);
    }

    #[test]
    fn a_node_far_ahead_on_a_branch_of_its_own_has_nothing() {
        // A primary that was left behind went on from 7 to 150: it remembers no 8 any more.
        let left = at(1, 1, 150, 1);
        let token = need(2, 8, 2);
        assert_eq!(token.reach(&left), Reach::Unknown);
        assert_eq!(token.is_reached(&left, Some(&at(2, 7, 8, 2))), Reach::NotYet);
        assert_eq!(token.is_reached(&left, Some(&at(2, 7, 200, 2))), Reach::NotYet);
        // One that lags far behind the primary is no suspect, nor is anyone while there is none.
        let lagging = at(2, 1, 150, 2);
        assert_eq!(token.is_reached(&lagging, Some(&at(2, 7, 500, 2))), Reach::Reached);
        assert_eq!(token.is_reached(&lagging, None), Reach::Reached);
        assert_eq!(token.is_reached(&at(2, 20, 150, 2), None), Reach::NotYet, "not seen to pass");
    }

    proptest! {
        #[test]
        fn whatever_is_written_can_be_read(
            lineage in any::<Option<u64>>(), beyond in any::<bool>(),
            databases in proptest::collection::vec((any::<u32>(), any::<u64>(), any::<u64>()), 0..DATABASES),
        ) {
            let databases = databases.into_iter().map(|(d, txid, checksum)| (Database(d), Position { txid, checksum }));
            let need = Need { lineage: lineage.filter(|id| *id != 0), databases: databases.collect() };
            let blind = Token::Blind { need: need.clone(), beyond, until: NOW };
            prop_assert_eq!(Token::decode(blind.encode(&key()).as_bytes(), &key(), NOW, AFFINITY), Ok(blind));
            let token = Token::Need(need);
            prop_assert_eq!(Token::decode(token.encode(&key()).as_bytes(), &key(), NOW, AFFINITY), Ok(token));
        }

        #[test]
        fn whatever_is_altered_is_void(at in any::<prop::sample::Index>(), with in any::<u8>()) {
            let mut text = Token::Need(need(1, 5, 1)).encode(&key()).into_bytes();
            let at = at.index(text.len());
            prop_assume!(text[at] != with);
            text[at] = with;
            prop_assert!(Token::decode(&text, &key(), NOW, AFFINITY).is_err());
            text.truncate(at);
            prop_assert!(Token::decode(&text, &key(), NOW, AFFINITY).is_err());
        }

        #[test]
        fn nothing_that_is_sent_is_too_strange(text in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Token::decode(&text, &key(), NOW, AFFINITY);
        }
    }
}
