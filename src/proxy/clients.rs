//! What one client may: connections at once, new connections and requests a second.
//!
//! A client is an IPv4 address, or a network of `limits.client.ipv6_prefix` bits: whoever has an
//! IPv6 address has many. All workers share what is counted here, because the kernel spreads a
//! client's connections over them: ten a second means ten, whatever the number of cores. Where
//! nothing of `[limits.client]` is written none of this exists, and a request pays for a look at an
//! `Option`.
//!
//! Rates are governor's (GCRA: a client's state is one time). They are kept in a [`Table`] of fixed
//! size, in sets of [`WAYS`] places with a lock each, so that two cores meet only where their
//! clients do. In a full set the client with the least debt is forgotten, which is nearly always
//! one that owes nothing and for whom nothing changes by it. So whoever is being limited stays
//! limited while an attacker comes from ever new addresses: each of these owes as much as one
//! request, and pushes out the one before. And nobody is locked out: who is new, or forgotten, has
//! a whole burst. Which clients share a set nobody can know, since a random key decides.
//!
//! Connections at once are counted exactly; a client is in that table only while it has one, so
//! that `limits.connections` bounds it.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use governor::{
    Quota, RateLimiter, clock, middleware::NoOpMiddleware, nanos::Nanos, state::StateStore,
};
use tokio::time::Instant;

use crate::config::limits::{Limit, PerClient, Rate};

/// Places in a set: one is forgotten while others owe less only if as many indebted clients fall
/// into one set.
const WAYS: usize = 8;
/// Locks of the table of connections.
const SHARDS: usize = 64;

/// Whose debt it is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Key([u64; 2]);

impl Key {
    fn of(client: IpAddr, ipv6_prefix: u8) -> Self {
        let bits = match client.to_canonical() {
            IpAddr::V4(ip) => u128::from(ip.to_ipv6_mapped()),
            IpAddr::V6(ip) => {
                let host = 128 - u32::from(ipv6_prefix.clamp(1, 128));
                u128::from(ip) & u128::MAX.checked_shl(host).unwrap_or(0)
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of it")]
        Self([(bits >> 64) as u64, bits as u64])
    }
}

/// What is counted of clients, for all workers of a process.
#[derive(Debug)]
pub struct Clients {
    rules: PerClient,
    requests: Option<Arc<Limiter>>,
    connects: Option<Arc<Limiter>>,
    connected: Arc<Connected>,
}

impl Clients {
    /// By these rules. What was counted for a configuration before this one counts on: rates where
    /// they are the same, connections in any case.
    pub fn new(rules: &PerClient, former: Option<&Self>) -> Self {
        let rules = rules.clone();
        let limiter = |rate: Option<Rate>, former: Option<&Arc<Limiter>>| {
            let rate = rate?;
            let same =
                former.filter(|former| (former.rate, former.clients) == (rate, rules.clients));
            Some(same.map_or_else(|| Arc::new(Limiter::new(rate, rules.clients)), Arc::clone))
        };
        Self {
            requests: limiter(rules.requests, former.and_then(|former| former.requests.as_ref())),
            connects: limiter(rules.connects, former.and_then(|former| former.connects.as_ref())),
            connected: former.map_or_else(Arc::default, |former| Arc::clone(&former.connected)),
            rules,
        }
    }

    /// Whether there is anything to count.
    pub fn is_on(&self) -> bool {
        self.rules.is_on()
    }

    /// A client asks for something.
    ///
    /// # Errors
    /// It has asked for too much.
    pub fn ask(&self, client: IpAddr) -> Result<(), Limit> {
        let Some(limiter) = &self.requests else { return Ok(()) };
        if self.rules.exempts(client) || limiter.allows(Key::of(client, self.rules.ipv6_prefix)) {
            Ok(())
        } else {
            Err(Limit::ClientRequests)
        }
    }

    /// A client connects. It counts as connected until what this returns is dropped.
    ///
    /// # Errors
    /// It has too many connections, or makes them too fast.
    pub fn connect(&self, client: IpAddr) -> Result<Option<Place>, Limit> {
        if self.rules.exempts(client) {
            return Ok(None);
        }
        let key = Key::of(client, self.rules.ipv6_prefix);
        let place = match self.rules.connections {
            0 => None,
            most => Some(self.connected.enter(key, most).ok_or(Limit::ClientConnections)?),
        };
        match &self.connects {
            Some(limiter) if !limiter.allows(key) => Err(Limit::ClientConnects),
            _ => Ok(place),
        }
    }

    /// How many were forgotten that owed something, since this was asked last.
    pub fn forgotten(&self) -> u64 {
        let limiters = [&self.requests, &self.connects].into_iter().flatten();
        limiters.map(|limiter| limiter.forgotten.swap(0, Relaxed)).sum()
    }
}

/// One rate, for each client.
#[derive(Debug)]
struct Limiter {
    rate: Rate,
    clients: usize,
    gcra: RateLimiter<Key, Table, Clock, NoOpMiddleware<Nanos>>,
    forgotten: Arc<AtomicU64>,
}

impl Limiter {
    fn new(rate: Rate, clients: usize) -> Self {
        let clock = Clock(Instant::now());
        let forgotten = Arc::default();
        let table = Table::new(clients, clock, Arc::clone(&forgotten));
        let quota = Quota::per_second(rate.per_second).allow_burst(rate.burst);
        Self { rate, clients, gcra: RateLimiter::new(quota, table, clock), forgotten }
    }

    fn allows(&self, key: Key) -> bool {
        self.gcra.check_key(&key).is_ok()
    }
}

/// Time since it was made.
#[derive(Clone, Copy, Debug)]
struct Clock(Instant);

impl clock::Clock for Clock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Instant::now().saturating_duration_since(self.0).into()
    }
}

/// One client's debt: the time at which it will owe nothing. Zero: nobody's place.
#[derive(Clone, Copy, Debug)]
struct Debt {
    key: Key,
    until: u64,
}

const NOBODY: Debt = Debt { key: Key([0; 2]), until: 0 };

/// Debts of so many clients.
#[derive(Debug)]
struct Table {
    sets: Box<[Mutex<[Debt; WAYS]>]>,
    hasher: RandomState,
    clock: Clock,
    /// Those that still owed something.
    forgotten: Arc<AtomicU64>,
}

impl Table {
    fn new(clients: usize, clock: Clock, forgotten: Arc<AtomicU64>) -> Self {
        let sets = (0..clients.div_ceil(WAYS)).map(|_| Mutex::new([NOBODY; WAYS]));
        Self { sets: sets.collect(), hasher: RandomState::new(), clock, forgotten }
    }
}

impl StateStore for Table {
    type Key = Key;

    fn measure_and_replace<T, F, E>(&self, key: &Key, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let Some(set) = self.sets.get(place(&self.hasher, key, self.sets.len())) else {
            // There is one at least.
            return decide(None).map(|(allowed, _)| allowed);
        };
        let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(debt) = set.iter_mut().find(|debt| debt.until > 0 && debt.key == *key) {
            let (allowed, until) = decide(Some(debt.until.into()))?;
            debt.until = until.into();
            return Ok(allowed);
        }
        let (allowed, until) = decide(None)?;
        if let Some(least) = set.iter_mut().min_by_key(|debt| debt.until) {
            if least.until > 0 && least.until > clock::Clock::now(&self.clock).as_u64() {
                self.forgotten.fetch_add(1, Relaxed);
            }
            *least = Debt { key: *key, until: until.into() };
        }
        Ok(allowed)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "any bits of a hash will do")]
fn place(hasher: &RandomState, key: &Key, places: usize) -> usize {
    (hasher.hash_one(key) as usize).checked_rem(places).unwrap_or(0)
}

/// How often each client is connected.
#[derive(Debug)]
struct Connected {
    shards: [Mutex<HashMap<Key, usize>>; SHARDS],
    hasher: RandomState,
}

impl Default for Connected {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()), hasher: RandomState::new() }
    }
}

impl Connected {
    fn shard(&self, key: &Key) -> MutexGuard<'_, HashMap<Key, usize>> {
        let shard = &self.shards[place(&self.hasher, key, SHARDS)];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: it is connected as often as it may.
    fn enter(self: &Arc<Self>, key: Key, most: usize) -> Option<Place> {
        let mut shard = self.shard(&key);
        let count = shard.entry(key).or_default();
        // A count of zero was made just now, and some connections are allowed.
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place { connected: Arc::clone(self), key })
    }
}

/// One connection of a client's, until dropped.
#[derive(Debug)]
pub struct Place {
    connected: Arc<Connected>,
    key: Key,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.connected.shard(&self.key).entry(self.key) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, num::NonZeroU32, time::Duration};

    use tokio::time::advance;

    use super::*;

    fn rate(per_second: u32, burst: u32) -> Option<Rate> {
        let number = |n| NonZeroU32::new(n).expect("a rate");
        Some(Rate { per_second: number(per_second), burst: number(burst) })
    }

    fn rules() -> PerClient {
        PerClient {
            requests: rate(10, 20),
            connects: None,
            connections: 0,
            ipv6_prefix: 64,
            clients: 1024,
            exempt: Vec::new(),
        }
    }

    fn clients(edit: impl FnOnce(&mut PerClient)) -> Clients {
        let mut rules = rules();
        edit(&mut rules);
        Clients::new(&rules, None)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// The `n`th of many.
    fn nth(n: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + n).into()
    }

    /// How many of so many requests are allowed.
    fn allowed(clients: &Clients, client: IpAddr, times: usize) -> usize {
        (0..times).filter(|_| clients.ask(client).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_as_many_as_are_allowed_a_second() {
        let clients = clients(|_| {});
        let one = ip("192.0.2.1");
        assert_eq!(allowed(&clients, one, 100), 20);
        assert_eq!(allowed(&clients, ip("192.0.2.2"), 100), 20, "another one has its own");
        for _ in 0..50 {
            advance(Duration::from_millis(100)).await;
            assert_eq!(allowed(&clients, one, 100), 1);
        }
        advance(Duration::from_secs(60)).await;
        assert_eq!(allowed(&clients, one, 100), 20, "no more is saved up than a burst");
    }

    #[test]
    fn cores_share_one_rate() {
        let clients = clients(|rules| rules.requests = rate(1, 500));
        let began = Instant::now();
        let all: usize = std::thread::scope(|scope| {
            let one = || allowed(&clients, ip("192.0.2.1"), 2000);
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|thread| thread.join().expect("it counts")).sum()
        });
        let since = usize::try_from(began.elapsed().as_secs()).expect("not long");
        assert!((500..=501 + since).contains(&all), "{all}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_ipv6_is_one_client() {
        let clients = clients(|_| {});
        assert_eq!(allowed(&clients, ip("2001:db8::1"), 15), 15);
        assert_eq!(allowed(&clients, ip("2001:db8::ffff:1"), 15), 5, "the same /64");
        assert_eq!(allowed(&clients, ip("2001:db8:0:1::1"), 15), 15, "another one");
        // As a socket of both families tells of an IPv4 client.
        assert_eq!(allowed(&clients, ip("::ffff:192.0.2.1"), 15), 15);
        assert_eq!(allowed(&clients, ip("192.0.2.1"), 15), 5);
        for (prefix, same) in [(128, false), (112, true), (1, true)] {
            let key = |text| Key::of(ip(text), prefix);
            assert_eq!(key("2001:db8::1") == key("2001:db8::2"), same, "/{prefix}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_limited_stays_so_while_ever_new_addresses_come() {
        // One set only: the worst that can happen to anybody.
        let clients = clients(|rules| rules.clients = WAYS);
        let limited = ip("192.0.2.1");
        assert_eq!(allowed(&clients, limited, 100), 20);
        for n in 0..10_000 {
            assert_eq!(clients.ask(nth(n)), Ok(()), "nobody is locked out");
            assert_eq!(clients.ask(limited), Err(Limit::ClientRequests));
        }
        assert_eq!(clients.forgotten(), 10_000 - 7, "the table was full of those who owed one");
        assert_eq!(clients.forgotten(), 0);
        advance(Duration::from_secs(2)).await;
        clients.ask(nth(0)).expect("a fresh one");
        assert_eq!(clients.forgotten(), 0, "who owes nothing loses nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn memory_does_not_grow_with_the_number_of_clients() {
        let clients = clients(|rules| rules.clients = 64);
        (0..10_000).for_each(|n| clients.ask(nth(n)).expect("a new one"));
        let limiter = clients.requests.as_ref().expect("it is on");
        assert_eq!(limiter.clients, 64);
        assert_eq!(Table::new(64, Clock(Instant::now()), Arc::default()).sets.len(), 64 / WAYS);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_at_once_and_a_second() {
        let clients = clients(|rules| (rules.connections, rules.connects) = (2, rate(1, 3)));
        let (one, other) = (ip("192.0.2.1"), ip("192.0.2.2"));
        let first = clients.connect(one).expect("there is room");
        let second = clients.connect(one).expect("there is room");
        assert!(first.is_some() && second.is_some());
        assert_eq!(clients.connect(one).err(), Some(Limit::ClientConnections));
        assert!(clients.connect(other).is_ok());
        drop(first);
        let third = clients.connect(one).expect("there is room again");
        drop(third);
        assert_eq!(clients.connect(one).err(), Some(Limit::ClientConnects));
        advance(Duration::from_secs(1)).await;
        assert!(clients.connect(one).is_ok(), "a refused one takes no place");
        drop(second);
        let left: usize = clients.connected.shards.iter().map(|s| s.lock().unwrap().len()).sum();
        assert_eq!(left, 0, "who is gone takes no memory");
    }

    #[tokio::test(start_paused = true)]
    async fn some_are_exempt() {
        let clients = clients(|rules| {
            rules.exempt = vec!["192.0.2.0/28".parse().expect("a network")];
            (rules.connections, rules.connects) = (1, rate(1, 1));
        });
        assert_eq!(allowed(&clients, ip("192.0.2.1"), 100), 100);
        assert_eq!(allowed(&clients, ip("::ffff:192.0.2.1"), 100), 100);
        assert_eq!(allowed(&clients, ip("192.0.2.16"), 100), 20);
        let places: Vec<_> = (0..9).map(|_| clients.connect(ip("192.0.2.1"))).collect();
        assert!(places.iter().all(|place| matches!(place, Ok(None))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reload_goes_on_counting() {
        let mut rules = rules();
        (rules.connections, rules.connects) = (1, rate(1, 5));
        let before = Clients::new(&rules, None);
        let one = ip("192.0.2.1");
        let place = before.connect(one);
        assert_eq!(allowed(&before, one, 100), 20);
        rules.exempt = vec!["10.0.0.0/8".parse().expect("a network")];
        let same = Clients::new(&rules, Some(&before));
        assert_eq!(allowed(&same, one, 100), 0);
        rules.requests = rate(10, 30);
        let other = Clients::new(&rules, Some(&same));
        assert_eq!(allowed(&other, one, 100), 30, "another rate begins anew");
        assert_eq!(other.connect(one).err(), Some(Limit::ClientConnections));
        drop(place);
        assert!(other.connect(one).is_ok(), "who came under the former rules");
    }
}
