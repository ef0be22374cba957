//! Read or write.
//!
//! By the method, as the IANA registry has it: safe methods are reads, all others and every
//! unknown one are writes (RFC 9110 section 9.2.1). A route outranks the method, and a trusted
//! peer outranks both where that can't send a write to a replica.

use std::time::Duration;

use http::{HeaderMap, HeaderName, Method};

use super::{Because, Class, Consistency, Demands, Problem, Request, Wanted, route::Head};
use crate::{
    config::{
        route::{self, Route},
        units,
    },
    topology::Topology,
};

/// A trusted peer's wish: `primary`, `replica` or an instance name.
pub const ROUTE: HeaderName = HeaderName::from_static("litegate-route");
/// A trusted peer's wish in Fly's words (`reference/fly-replay.md` section 9.1): that node only.
pub const FORCE_INSTANCE: HeaderName = HeaderName::from_static("fly-force-instance-id");
/// The first region of the list that there is, or nowhere.
pub const FORCE_REGION: HeaderName = HeaderName::from_static("fly-force-region");
/// That node, else any.
pub const PREFER_INSTANCE: HeaderName = HeaderName::from_static("fly-prefer-instance-id");
/// The first region of the list that there is, else any.
pub const PREFER_REGION: HeaderName = HeaderName::from_static("fly-prefer-region");

/// Decides once; nobody looks at the raw request for a choice after this.
///
/// # Errors
/// [`Problem::MethodRefused`] for CONNECT, and for TRACE where the route does not allow it: it
/// would show a client what other proxies added. [`Problem::UnknownNode`] where a trusted peer
/// names a node that is none. `primary_region`: the region that means the primary.
pub fn classify(
    head: &Head<'_>,
    route: &Route,
    topology: &Topology,
    primary_region: Option<&str>,
) -> Result<Request, Problem> {
    if *head.method == Method::CONNECT || (*head.method == Method::TRACE && !route.allow_trace) {
        return Err(Problem::MethodRefused);
    }
    let (mut class, mut because) = match route.class {
        route::Class::Read => (Class::Read, Because::Route),
        route::Class::Write => (Class::Write, Because::Route),
        route::Class::Auto if head.upgrade => (Class::Write, Because::Upgrade),
        route::Class::Auto if is_safe(head.method) => (Class::Read, Because::Method),
        route::Class::Auto => (Class::Write, Because::Method),
    };
    let mut wanted = Wanted::Any;
    let asked = if head.trusted { head.headers.get(ROUTE) } else { None };
    if head.trusted && asked.is_none() {
        // Where a read may go: a write stays on the primary, whoever asks.
        wanted = in_flys_words(head.headers, topology, primary_region)?;
    }
    if let Some(value) = asked {
        match value.to_str().unwrap_or_default().trim() {
            "primary" => {
                wanted = Wanted::Primary;
                (class, because) = (Class::Write, Because::Asked);
            }
            // Says where a read may go. A write stays a write: the replica could not run it.
            "replica" => wanted = Wanted::Replica,
            name => {
                let node = topology.named(name).ok_or(Problem::UnknownNode)?;
                wanted = Wanted::Node(node.id);
            }
        }
    }
    Ok(Request {
        class,
        because,
        idempotent: route.idempotent,
        wanted,
        demands: Demands::default(),
    })
}

/// What Fly's routing headers ask for. What is forced and can't be had is refused, what is
/// preferred and can't be had is forgotten.
fn in_flys_words(
    headers: &HeaderMap,
    topology: &Topology,
    primary_region: Option<&str>,
) -> Result<Wanted, Problem> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
    let region = |list: &str| {
        list.split(',').map(str::trim).find_map(|region| match region {
            "any" => Some(Wanted::Any),
            region if primary_region.is_some_and(|p| p.eq_ignore_ascii_case(region)) => {
                Some(Wanted::Primary)
            }
            _ => None,
        })
    };
    if let Some(name) = text(FORCE_INSTANCE) {
        let node = topology.named(name).ok_or(Problem::UnknownNode)?;
        return Ok(Wanted::Node(node.id));
    }
    if let Some(list) = text(FORCE_REGION) {
        return region(list).ok_or(Problem::UnknownNode);
    }
    if let Some(node) = text(PREFER_INSTANCE).and_then(|name| topology.named(name)) {
        return Ok(Wanted::Prefer(node.id));
    }
    Ok(text(PREFER_REGION).and_then(region).unwrap_or_default())
}

/// A client's wish for one read: `any`, `session` or `primary`.
pub const CONSISTENCY: HeaderName = HeaderName::from_static("litegate-consistency");
/// A client's wish for one read: how old its data may be, like `250ms`.
pub const MAX_STALENESS: HeaderName = HeaderName::from_static("litegate-max-staleness");

/// What a client asks of a read itself.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Demanded {
    /// [`CONSISTENCY`]
    pub consistency: Consistency,
    /// [`MAX_STALENESS`]
    pub staleness: Option<Duration>,
}

/// Reads what a client asks for.
///
/// # Errors
/// [`Problem::BadDemand`]: to overlook what can't be read would promise what is not kept.
pub fn demanded(head: &HeaderMap) -> Result<Demanded, Problem> {
    let (mut consistency, mut staleness) = (None, None);
    // A look-up would hash both names, and this runs for whoever sends a token.
    for (name, value) in head {
        if *name == CONSISTENCY {
            consistency.get_or_insert(value);
        } else if *name == MAX_STALENESS {
            staleness.get_or_insert(value);
        }
    }
    let mut demanded = Demanded::default();
    if let Some(value) = consistency {
        demanded.consistency = match value.as_bytes() {
            b"any" => Consistency::Any,
            b"session" => Consistency::Session,
            b"primary" => Consistency::Primary,
            _ => return Err(Problem::BadDemand),
        };
    }
    if let Some(value) = staleness {
        let length = value.to_str().ok().and_then(|text| units::duration(text).ok());
        demanded.staleness = Some(length.ok_or(Problem::BadDemand)?);
    }
    Ok(demanded)
}

/// Whether the registry calls a method safe. `PRI` is not a method that anybody may send.
pub fn is_safe(method: &Method) -> bool {
    matches!(
        method.as_str(),
        "GET" | "HEAD" | "OPTIONS" | "TRACE" | "QUERY" | "PROPFIND" | "REPORT" | "SEARCH"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::route::Path,
        topology::{Node, NodeId, Role},
    };

    fn rule(class: route::Class) -> Route {
        Route {
            host: Vec::new(),
            path: Path::Any,
            method: Vec::new(),
            header: Vec::new(),
            class,
            cluster: 0,
            idempotent: false,
            retry_uncommitted: false,
            allow_trace: false,
            causal: None,
            index: None,
        }
    }

    fn classified(
        method: &str,
        class: route::Class,
        upgrade: bool,
        asked: Option<(&str, bool)>,
    ) -> Result<Request, Problem> {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let mut headers = HeaderMap::new();
        if let Some((value, _)) = asked {
            headers.insert(ROUTE, value.parse().unwrap());
        }
        let trusted = asked.is_some_and(|(_, trusted)| trusted);
        let head =
            Head { method: &method, host: None, path: "/", headers: &headers, trusted, upgrade };
        classify(&head, &rule(class), &Topology::default(), None)
    }

    /// The IANA registry of HTTP methods, as of RFC 10008 (QUERY), with its column "safe".
    const REGISTRY: &[(&str, bool)] = &[
        ("ACL", false),
        ("BASELINE-CONTROL", false),
        ("BIND", false),
        ("CHECKIN", false),
        ("CHECKOUT", false),
        ("COPY", false),
        ("DELETE", false),
        ("GET", true),
        ("HEAD", true),
        ("LABEL", false),
        ("LINK", false),
        ("LOCK", false),
        ("MERGE", false),
        ("MKACTIVITY", false),
        ("MKCALENDAR", false),
        ("MKCOL", false),
        ("MKREDIRECTREF", false),
        ("MKWORKSPACE", false),
        ("MOVE", false),
        ("OPTIONS", true),
        ("ORDERPATCH", false),
        ("PATCH", false),
        ("POST", false),
        ("PROPFIND", true),
        ("PROPPATCH", false),
        ("PUT", false),
        ("QUERY", true),
        ("REBIND", false),
        ("REPORT", true),
        ("SEARCH", true),
        ("UNBIND", false),
        ("UNCHECKOUT", false),
        ("UNLINK", false),
        ("UNLOCK", false),
        ("UPDATE", false),
        ("UPDATEREDIRECTREF", false),
        ("VERSION-CONTROL", false),
        // None of the registry's: unknown, in the wrong case, or not for clients to send.
        ("get", false),
        ("PURGE", false),
        ("PRI", false),
        ("X", false),
    ];

    #[test]
    fn methods_are_of_the_class_that_the_registry_gives_them() {
        for (method, safe) in REGISTRY {
            let class = classified(method, route::Class::Auto, false, None).unwrap().class;
            assert_eq!(class, if *safe { Class::Read } else { Class::Write }, "{method}");
        }
    }

    #[test]
    fn connect_is_refused_and_trace_unless_allowed() {
        for method in ["CONNECT", "TRACE"] {
            let refused = classified(method, route::Class::Auto, false, None);
            assert_eq!(refused.err(), Some(Problem::MethodRefused), "{method}");
        }
    }

    #[test]
    fn a_route_outranks_method_and_upgrade() {
        for (case, method, class, upgrade, want) in [
            ("a GET that writes", "GET", route::Class::Write, false, Class::Write),
            ("a POST that reads", "POST", route::Class::Read, false, Class::Read),
            ("a socket can write", "GET", route::Class::Auto, true, Class::Write),
            ("unless its route says no", "GET", route::Class::Read, true, Class::Read),
        ] {
            assert_eq!(classified(method, class, upgrade, None).unwrap().class, want, "{case}");
        }
    }

    #[test]
    fn only_a_trusted_peer_may_ask_for_the_primary() {
        let asked =
            |trusted| classified("GET", route::Class::Auto, false, Some(("primary", trusted)));
        assert_eq!(asked(true).unwrap().class, Class::Write);
        assert_eq!(asked(false).unwrap().class, Class::Read);
    }

    #[test]
    fn asking_for_a_replica_does_not_make_a_write_a_read() {
        let asked = classified("POST", route::Class::Auto, false, Some(("replica", true))).unwrap();
        assert_eq!((asked.class, asked.wanted), (Class::Write, Wanted::Replica));
    }

    #[test]
    fn asking_for_a_stranger_is_refused() {
        let asked = classified("GET", route::Class::Auto, false, Some(("evil.example", true)));
        assert_eq!(asked.err(), Some(Problem::UnknownNode));
    }

    #[test]
    fn flys_headers_are_obeyed_from_trusted_peers_only() {
        let node = Node {
            role: Role::Replica,
            ..Node::new(NodeId(7), "a".into(), ([127, 0, 0, 1], 1).into())
        };
        let topology = Topology { nodes: vec![node], ..Topology::default() };
        let (a, prefer) = (Wanted::Node(NodeId(7)), Wanted::Prefer(NodeId(7)));
        for (fields, want) in [
            (&[("fly-force-instance-id", "a")][..], Ok(a)),
            (&[("fly-force-instance-id", "x")], Err(Problem::UnknownNode)),
            (&[("fly-force-instance-id", "192.0.2.9:80")], Err(Problem::UnknownNode)),
            (&[("fly-force-region", "fra, IAD")], Ok(Wanted::Primary)),
            (&[("fly-force-region", "fra,any")], Ok(Wanted::Any)),
            (&[("fly-force-region", "fra")], Err(Problem::UnknownNode)),
            (&[("fly-prefer-instance-id", "a")], Ok(prefer)),
            (&[("fly-prefer-instance-id", "x")], Ok(Wanted::Any)),
            (&[("fly-prefer-region", "iad")], Ok(Wanted::Primary)),
            (&[("fly-prefer-region", "fra")], Ok(Wanted::Any)),
            (&[("fly-prefer-region", "iad"), ("fly-force-instance-id", "a")], Ok(a)),
            (&[("litegate-route", "replica"), ("fly-force-instance-id", "a")], Ok(Wanted::Replica)),
        ] {
            for (trusted, method) in [(true, "GET"), (true, "POST"), (false, "GET")] {
                let headers: HeaderMap = fields
                    .iter()
                    .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                    .collect::<Vec<(HeaderName, http::HeaderValue)>>()
                    .into_iter()
                    .collect();
                let method = Method::from_bytes(method.as_bytes()).unwrap();
                let (path, headers) = ("/", &headers);
                let head =
                    Head { method: &method, host: None, path, headers, trusted, upgrade: false };
                let request = classify(&head, &rule(route::Class::Auto), &topology, Some("iad"));
                let class = if method == Method::POST { Class::Write } else { Class::Read };
                let want = if trusted { want } else { Ok(Wanted::Any) };
                let got = request.map(|request| (request.wanted, request.class));
                assert_eq!(got, want.map(|wanted| (wanted, class)), "{fields:?} {trusted}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_not_known_to_be_safe_is_a_write(method in "[A-Za-z!#$%&'*+.^_`|~-]{1,24}") {
            let known = REGISTRY.iter().any(|(name, safe)| *safe && *name == method);
            if let Ok(request) = classified(&method, route::Class::Auto, false, None) {
                proptest::prop_assert_eq!(request.class == Class::Read, known);
            }
        }
    }
}
