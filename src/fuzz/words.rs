//! What operators, nodes, Consul and clients say in words.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use ::http::{HeaderMap, HeaderValue, header};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    config::{self, diagnostic::Place},
    decide::{
        answer::Said,
        replay,
        token::{self, Key, Need, Token, Void},
    },
    discovery::roles::consul as lease,
    litefs as api,
    topology::{
        Member, Observation, Role, Saw, Source, eject,
        position::{DATABASES, Database, Position, Positions},
        reconcile::{Rules, State},
    },
};

/// `fly-replay`: a body of JSON if the first byte is `{`, lines of the header else. What is understood
/// is safe to follow and to tell on.
pub fn replay(data: &[u8]) {
    let parsed = if data.starts_with(b"{") {
        replay::from_json(data, false)
    } else {
        let mut head = HeaderMap::new();
        for line in data.split(|byte| *byte == b'\n').take(4) {
            let Ok(value) = HeaderValue::from_bytes(line) else { return };
            head.append(replay::FLY_REPLAY, value);
        }
        Said::of(&head).form(&head, true);
        replay::from_head(&head)
    };
    let Ok(replay) = parsed else { return };
    let names = [&replay.instance, &replay.prefer_instance, &replay.app];
    for name in replay.region.iter().chain(names.into_iter().flatten()) {
        assert!(name.len() <= 253 && !name.contains(|c: char| !c.is_ascii_graphic()), "{name:?}");
    }
    assert!(replay.timeout.is_none_or(|timeout| !timeout.is_zero()));
    let source = replay.instance.as_deref().unwrap_or_default();
    for value in [
        replay::src(source, 1, replay.state.as_deref()),
        replay::failed(source, source, "timeout", Duration::ZERO),
    ] {
        assert!(!value.is_empty() && value.to_str().is_ok(), "{value:?}");
    }
    let src = replay::src(source, 1, replay.state.as_deref());
    let fields = src.to_str().unwrap_or_default().split(';').count();
    let state = replay.state.as_ref().is_some_and(|state| !state.is_empty());
    assert_eq!(fields, 2 + usize::from(state), "{src:?}");
    let Some(transform) = replay.transform else { return };
    if let Some(path) = &transform.path {
        assert!(path.as_str().starts_with('/') && !path.as_str().starts_with("//"), "{path}");
    }
    let set = transform.set_headers.iter().map(|(name, _)| name);
    for name in transform.delete_headers.iter().chain(set) {
        let framing = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::HOST];
        let hop = [header::CONNECTION, header::UPGRADE, header::TE, header::VIA];
        assert!(!name.as_str().contains('"'), "{name}");
        assert!(!framing.contains(name) && !hop.contains(name), "{name}");
    }
}

/// What a client carries: the whole as a token and as cookies, the whole signed as if litegate had
/// made it, and a token that litegate makes of it.
pub fn token(data: &[u8]) {
    const ID: &str = "LFSC00000000000000AA";
    const NOW: u64 = 1_800_000_000_000;
    const LONGEST: Duration = Duration::from_secs(2);
    let key = Key::derive(None, ID);
    let decode = |text: &[u8]| Token::decode(text, &key, NOW, LONGEST);

    // Nobody guesses sixteen bytes.
    let read = decode(data);
    assert!(read.is_err());
    assert_eq!(read == Err(Void::Oversized), data.len() > 512);
    let _ = Position::parse_hex(data);
    let mut head = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(8) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            head.append(header::COOKIE, value.clone());
            head.insert(token::TOKEN, value);
        }
    }
    token::carried(&head, "__Host-litegate", true);
    let rest = token::without_txid(&head);
    head.remove(header::COOKIE);
    if let Some(rest) = rest {
        head.insert(header::COOKIE, rest);
        assert_eq!(token::carried(&head, "litegate", true).txid, None);
    }

    let mut signed = vec![1, data.first().copied().unwrap_or_default() % 5];
    signed.extend_from_slice(&Database::named(ID).0.to_be_bytes());
    signed.extend_from_slice(data.get(1..).unwrap_or_default());
    signed.extend_from_slice(&key.sign(&signed));
    let text = URL_SAFE_NO_PAD.encode(&signed);
    match decode(text.as_bytes()) {
        // Affinity says nothing of databases, and what may follow it is not looked at.
        Ok(Token::Affinity(until)) => assert!(until <= NOW + 62_000),
        Ok(read) => {
            let databases = match &read {
                Token::Need(need) | Token::Blind { need, .. } => need.databases.len(),
                Token::Affinity(_) => 0,
            };
            assert!(databases > DATABASES || read.encode(&key) == text, "{read:?}");
        }
        Err(why) => assert!(!matches!(why, Void::Forged | Void::Foreign | Void::Lost), "{why:?}"),
    }

    let mut numbers =
        data.chunks_exact(8).map(|eight| eight.try_into().map_or(0, u64::from_be_bytes));
    let lineage = numbers.next().filter(|id| *id != 0);
    let until = numbers.next().unwrap_or_default().min(NOW);
    let mut databases = smallvec::SmallVec::new();
    while let (Some(txid), Some(checksum)) = (numbers.next(), numbers.next())
        && databases.len() < DATABASES
    {
        let database = Database(u32::try_from(databases.len()).expect("there are few"));
        databases.push((database, Position { txid, checksum }));
    }
    let need = Need { lineage, databases };
    let blind = |beyond| Token::Blind { need: need.clone(), beyond, until };
    let need_alone = Token::Need(need.clone());
    for token in [need_alone, Token::Affinity(until), blind(false), blind(true)] {
        let text = token.encode(&key);
        assert_eq!(decode(text.as_bytes()), Ok(token));
        let foreign = Token::decode(text.as_bytes(), &Key::derive(None, "another"), NOW, LONGEST);
        assert_eq!(foreign, Err(Void::Foreign));
    }
}

/// A file, with variables in lines that begin with `#LITEGATE__`: a configuration, or errors of
/// which each has its place.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let variables = || {
        let lines = text.lines().filter_map(|line| line.strip_prefix('#')?.split_once('='));
        lines.map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    match config::load::parse("fuzz.toml", text, variables()) {
        Ok(config) => {
            assert!(!config.clusters.is_empty() && !config.listeners.is_empty());
            assert!(config.routes.iter().all(|route| route.cluster < config.clusters.len()));
            config.to_json();
            assert_eq!(config::load::parse("fuzz.toml", text, variables()).ok(), Some(config));
        }
        Err(wrong) => {
            assert!(!wrong.all.is_empty());
            for diagnostic in &wrong.all {
                assert!(!diagnostic.message.is_empty());
                match &diagnostic.place {
                    Place::File(span) => {
                        let is_inside = span.start <= span.end && span.end <= text.len();
                        assert!(is_inside, "{diagnostic:?} is outside of {} bytes", text.len());
                    }
                    Place::Environment(name) => {
                        assert!(variables().any(|(known, _)| known == *name), "{diagnostic:?}");
                    }
                }
            }
            assert!(wrong.to_string().contains("error") && wrong.coloured().contains("error"));
        }
    }
}

/// What two nodes say, line by line: whose it is (`0` or `1`), what was asked (`i` for `/info`, `e`
/// for a line of `/events`, `v` for `/debug/vars`, `m` for `/metrics`), and the answer. Whatever
/// they say, at most one member is primary.
pub fn litefs(data: &[u8]) {
    let (mut cluster, mut at) = (Believing::new(), Instant::now());
    let mut known: BTreeMap<SocketAddr, Positions> = BTreeMap::new();
    for line in data.split(|byte| *byte == b'\n').take(64) {
        let [node, kind, answer @ ..] = line else { continue };
        let address = ADDRESSES[usize::from(node & 1)];
        at += Duration::from_millis(u64::from(node >> 1) * 50);
        let claim = |is_primary, hostname: &str| {
            let id = u64::from(node & 1) + 1;
            let claim = api::claim(Some(id), Some(CLUSTER.into()), is_primary, hostname);
            Saw::Claim { address, claim }
        };
        let positions = known.entry(address).or_default();
        let saw = match kind {
            b'i' => {
                let info = serde_json::from_slice::<api::Info>(answer).ok();
                info.map(|info| claim(info.is_primary, &info.primary.hostname))
            }
            b'e' => match serde_json::from_slice(answer) {
                Ok(api::Event::Init { data } | api::Event::PrimaryChange { data }) => {
                    Some(claim(data.is_primary, &data.hostname))
                }
                Ok(api::Event::Tx { db, data }) => {
                    if let Some(position) = api::position(&data.txid, &data.checksum) {
                        positions.set(&db, position, at);
                    }
                    None
                }
                Ok(api::Event::Other) | Err(_) => None,
            },
            b'v' => {
                let vars = serde_json::from_slice::<api::Vars>(answer).ok();
                for (name, db) in vars.and_then(|vars| vars.store).into_iter().flat_map(|s| s.dbs) {
                    if let Some(position) = api::position(&db.txid, &db.checksum) {
                        positions.set(&name, position, at);
                        let written = format!("{:016x}", position.txid);
                        assert!(written.eq_ignore_ascii_case(&db.txid));
                    }
                }
                None
            }
            _ => {
                let lag = api::lag(&String::from_utf8_lossy(answer));
                let lag = lag.and_then(|lag| Duration::try_from_secs_f64(lag).ok());
                lag.map(|lag| Saw::Lag { address, lag })
            }
        };
        assert!(positions.iter().count() <= DATABASES);
        cluster.reports(address, positions.clone());
        cluster.sees(saw, Source::Litefs, at);
    }
}

const CLUSTER: &str = "LFSC00000000000000AA";

/// Consul's answers to the question for the lease key, one a line, between them a moment.
pub fn consul(data: &[u8]) {
    let (mut cluster, mut at) = (Believing::new(), Instant::now());
    for line in data.split(|byte| *byte == b'\n').take(64) {
        at += Duration::from_secs(1);
        let Ok((index, holder)) = lease::parse(line) else { continue };
        if let Some(holder) = &holder {
            assert!(holder.name.len() <= 260 && !holder.name.contains(char::is_control));
            assert!(!holder.name.is_empty() || holder.advertised.is_some());
        }
        let reset = line.len() % 7 == 0;
        cluster.sees(Some(Saw::Lease { holder, index, reset }), Source::Consul, at);
    }
}

const ADDRESSES: [SocketAddr; 2] = {
    let [a, b] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
    [SocketAddr::new(IpAddr::V4(a), 3000), SocketAddr::new(IpAddr::V4(b), 3000)]
};

/// A cluster of two members, `n0` and `n1`, as it is believed.
struct Believing(State);

impl Believing {
    fn new() -> Self {
        let second = Duration::from_secs(1);
        let mut state = State::new(Rules {
            max_lag: 10 * second,
            soft_lag: second,
            eject: eject::Rules { after: 5, base: second, max: 60 * second },
            eject_max: 0.5,
            local: None,
            tripwire: 100,
        });
        let members = ADDRESSES.iter().zip(["n0", "n1"]);
        let members = members.map(|(address, name)| Member {
            address: *address,
            name: Some(name.into()),
            near: false,
        });
        let at = Instant::now();
        let saw = Saw::Members(members.collect());
        state.observe(Some(&Observation { saw, source: Source::Members, at }), at);
        Self(state)
    }

    fn reports(&self, address: SocketAddr, positions: Positions) {
        let node = self.0.topology().nodes.iter().find(|node| node.address == address);
        node.expect("it is a member").progress.set(positions);
    }

    fn sees(&mut self, saw: Option<Saw>, source: Source, at: Instant) {
        let seen = saw.map(|saw| Observation { saw, source, at });
        self.0.observe(seen.as_ref(), at);
        let now = self.0.topology();
        let primaries = now.nodes.iter().filter(|node| node.role == Role::Primary);
        let named: Vec<_> = primaries.map(|node| node.id).collect();
        assert_eq!(named, now.primary.into_iter().collect::<Vec<_>>(), "{now:#?}");
        assert!(now.nodes.iter().all(|node| ADDRESSES.contains(&node.address)));
    }
}
