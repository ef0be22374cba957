//! Read or write.
//!
//! By the method, as the IANA registry has it: safe methods are reads, all others and every
//! unknown one are writes (RFC 9110 section 9.2.1). A route outranks the method, and a trusted
//! peer outranks both where that can't send a write to a replica.

use http::{HeaderName, Method};

use super::{Because, Class, Problem, Request, Wanted, route::Head};
use crate::{
    config::route::{self, Route},
    topology::Topology,
};

/// A trusted peer's wish: `primary`, `replica` or an instance name.
pub const ROUTE: HeaderName = HeaderName::from_static("litegate-route");

/// Decides once; nobody looks at the raw request for a choice after this.
///
/// # Errors
/// [`Problem::MethodRefused`] for CONNECT, and for TRACE where the route does not allow it: it
/// would show a client what other proxies added. [`Problem::UnknownNode`] where a trusted peer
/// names a node that is none.
pub fn classify(head: &Head<'_>, route: &Route, topology: &Topology) -> Result<Request, Problem> {
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
    if head.trusted
        && let Some(value) = head.headers.get(ROUTE)
    {
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
    Ok(Request { class, because, idempotent: route.idempotent, wanted })
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
    use http::HeaderMap;

    use super::*;
    use crate::config::route::Path;

    fn rule(class: route::Class) -> Route {
        Route {
            host: Vec::new(),
            path: Path::Any,
            method: Vec::new(),
            header: Vec::new(),
            class,
            cluster: 0,
            idempotent: false,
            allow_trace: false,
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
        classify(&head, &rule(class), &Topology::default())
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
