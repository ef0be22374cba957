//! Which rule a request falls under: the first one all of whose conditions hold.

use http::{HeaderMap, Method};

use super::{Problem, path};
use crate::config::{
    limits::AmbiguousPaths,
    route::{HeaderMatch, Host, Path, Route, Scope},
};

/// What is known of a request before anything is decided.
#[derive(Clone, Copy, Debug)]
pub struct Head<'r> {
    /// The method.
    pub method: &'r Method,
    /// The authority of an absolute-form target, else `Host`; with a port if it has one.
    pub host: Option<&'r str>,
    /// The path, undecoded, without the query.
    pub path: &'r str,
    /// The fields, as the client sent them.
    pub headers: &'r HeaderMap,
    /// Whether the peer's `Litegate-*` fields are believed.
    pub trusted: bool,
    /// Whether it asks to become another protocol.
    pub upgrade: bool,
}

/// The first of `routes` that matches, however the path is read.
///
/// # Errors
/// 404 if none does, 400 if the path could be read as one of another route.
pub fn route<'c>(
    head: &Head<'_>,
    routes: &'c [Route],
    ambiguous: AmbiguousPaths,
) -> Result<&'c Route, Problem> {
    if ambiguous == AmbiguousPaths::Refuse && path::is_ambiguous(head.path) {
        return Err(Problem::AmbiguousPath);
    }
    let first = |head: &Head<'_>| routes.iter().position(|route| matches(head, route));
    let found = first(head);
    if ambiguous != AmbiguousPaths::Allow && routes.iter().any(|route| route.path != Path::Any) {
        let others = path::readings(head.path);
        for reading in others {
            if first(&Head { path: &reading, ..*head }) != found {
                return Err(Problem::AmbiguousPath);
            }
        }
    }
    found.and_then(|found| routes.get(found)).ok_or(Problem::NoRoute)
}

/// Whether all conditions of `route` hold.
pub fn matches(head: &Head<'_>, route: &Route) -> bool {
    (route.host.is_empty() || head.host.is_some_and(|host| is_host(host, &route.host)))
        && is_path(head.path, &route.path)
        && (route.method.is_empty() || route.method.contains(head.method))
        && route.header.iter().all(|wanted| has_header(head.headers, wanted))
}

fn is_host(host: &str, wanted: &[Host]) -> bool {
    let name = without_port(host);
    let name = name.strip_suffix('.').unwrap_or(name);
    wanted.iter().any(|wanted| match wanted {
        Host::Exact(exact) => name.eq_ignore_ascii_case(exact),
        Host::Below(suffix) => {
            let (name, suffix) = (name.as_bytes(), suffix.as_bytes());
            name.len() > suffix.len()
                && name
                    .get(name.len() - suffix.len()..)
                    .is_some_and(|end| end.eq_ignore_ascii_case(suffix))
        }
    })
}

/// `abaci.one` of `abaci.one:8080`, `[::1]` of `[::1]:80`.
fn without_port(host: &str) -> &str {
    match host.rfind(':') {
        Some(colon) if !host.get(colon..).unwrap_or_default().contains(']') => {
            host.get(..colon).unwrap_or(host)
        }
        _ => host,
    }
}

fn is_path(path: &str, wanted: &Path) -> bool {
    match wanted {
        Path::Any => true,
        Path::Exact(exact) => path == &**exact,
        Path::Prefix(prefix) => {
            &**prefix == "/"
                || path
                    .strip_prefix(&**prefix)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
        Path::Glob(glob) => is_glob(path.as_bytes(), glob.as_bytes()),
    }
}

/// `*` stands for any run of bytes. Goes back to the last star only, so the time is at most the
/// product of the lengths, and linear for all but contrived patterns.
fn is_glob(text: &[u8], glob: &[u8]) -> bool {
    let (mut at, mut wanted) = (0, 0);
    let mut star = None;
    while at < text.len() {
        match glob.get(wanted) {
            Some(b'*') => {
                star = Some((at, wanted));
                wanted += 1;
            }
            Some(byte) if text.get(at) == Some(byte) => {
                at += 1;
                wanted += 1;
            }
            _ => match &mut star {
                // The star takes one byte more.
                Some((from, back)) => {
                    *from += 1;
                    at = *from;
                    wanted = *back + 1;
                }
                None => return false,
            },
        }
    }
    glob.get(wanted..).unwrap_or_default().iter().all(|byte| *byte == b'*')
}

fn has_header(headers: &HeaderMap, wanted: &HeaderMatch) -> bool {
    match &wanted.value {
        None => headers.contains_key(&wanted.name),
        Some(value) => {
            headers.get_all(&wanted.name).iter().any(|line| line.as_bytes() == value.as_bytes())
        }
    }
}

/// What `path` has in common with others on a route whose reads see each other's writes, as a hash
/// (FNV-1a): the route, and as much of the path as `scope` says.
pub fn scope(scope: Scope, route: Option<usize>, path: &str) -> u64 {
    let kept = match scope {
        Scope::Path => path,
        Scope::Segments(most) => {
            let ends = path.match_indices('/').map(|(at, _)| at).filter(|at| *at > 0);
            let end = ends.chain([path.len()]).take(most).last().unwrap_or(0);
            path.get(..end).unwrap_or(path)
        }
    };
    let route = (route.unwrap_or(usize::MAX) as u64).to_le_bytes();
    route
        .into_iter()
        .chain(kept.trim_end_matches('/').bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::route::Class;

    fn rule() -> Route {
        Route {
            host: Vec::new(),
            path: Path::Any,
            method: Vec::new(),
            header: Vec::new(),
            class: Class::Auto,
            cluster: 0,
            idempotent: false,
            allow_trace: false,
            retry_uncommitted: false,
            causal: None,
            index: Some(0),
        }
    }

    fn hits(method: &Method, host: Option<&str>, path: &str, route: &Route) -> bool {
        let headers = HeaderMap::new();
        matches(
            &Head { method, host, path, headers: &headers, trusted: false, upgrade: false },
            route,
        )
    }

    #[test]
    fn hosts_match_in_any_case_and_without_port() {
        let exact = Route { host: vec![Host::Exact("abaci.one".into())], ..rule() };
        for (host, hit) in [
            (Some("abaci.one"), true),
            (Some("ABACI.one:8080"), true),
            (Some("abaci.one."), true),
            (Some("www.abaci.one"), false),
            (Some("xabaci.one"), false),
            (None, false),
        ] {
            assert_eq!(hits(&Method::GET, host, "/", &exact), hit, "{host:?}");
        }
    }

    #[test]
    fn a_wildcard_covers_what_is_below_a_name_and_not_the_name() {
        let below = Route { host: vec![Host::Below(".abaci.one".into())], ..rule() };
        for (host, hit) in [
            ("www.abaci.one", true),
            ("a.b.Abaci.One:443", true),
            ("abaci.one", false),
            (".abaci.one", false),
            ("evilabaci.one", false),
        ] {
            assert_eq!(hits(&Method::GET, Some(host), "/", &below), hit, "{host}");
        }
    }

    #[test]
    fn prefixes_match_by_whole_segments() {
        let search = Route { path: Path::Prefix("/api/search".into()), ..rule() };
        for (path, hit) in [
            ("/api/search", true),
            ("/api/search/", true),
            ("/api/search/x", true),
            ("/api/searches", false),
            ("/api", false),
        ] {
            assert_eq!(hits(&Method::GET, None, path, &search), hit, "{path}");
        }
        let root = Route { path: Path::Prefix("/".into()), ..rule() };
        assert!(
            hits(&Method::GET, None, "/any", &root) && hits(&Method::OPTIONS, None, "*", &root)
        );
    }

    #[test]
    fn every_reading_of_a_path_leads_to_the_same_route() {
        let routes = [
            Route { path: Path::Prefix("/search".into()), class: Class::Read, ..rule() },
            Route { path: Path::Any, index: Some(1), ..rule() },
        ];
        let headers = HeaderMap::new();
        let to = |path, policy| {
            let method = &Method::POST;
            let head = Head {
                method,
                host: None,
                path,
                headers: &headers,
                trusted: false,
                upgrade: false,
            };
            route(&head, &routes, policy).map(|route| route.index)
        };
        let (same, refuse, allow) =
            (AmbiguousPaths::SameRoute, AmbiguousPaths::Refuse, AmbiguousPaths::Allow);
        for (path, at) in [("/search/a", 0), ("/b", 1), ("/search/%20", 0)] {
            for policy in [same, refuse, allow] {
                assert_eq!(to(path, policy), Ok(Some(at)), "{path} {policy:?}");
            }
        }
        for (path, written) in [
            ("/search/../orders", 0),
            ("/search%2fa", 1),
            ("/search/%2e%2e%2forders", 0),
            ("/search/..%5corders", 0),
            ("/search/..;/orders", 0),
            ("//search", 1),
            ("/%73earch", 1),
        ] {
            assert_eq!(to(path, same), Err(Problem::AmbiguousPath), "{path}");
            assert_eq!(to(path, allow), Ok(Some(written)), "{path}");
        }
        // As odd, and on the same route whoever reads them.
        for path in ["/search/a/../b", "/a//b", "/a%2fb", "/search%2f..%2forders"] {
            assert!(to(path, same).is_ok(), "{path}");
            assert_eq!(to(path, refuse), Err(Problem::AmbiguousPath), "{path}");
        }
    }

    #[test]
    fn globs_match_whole_paths() {
        for (glob, path, hit) in [
            ("*.png", "/a/b.png", true),
            ("*.png", "/a/b.png/c", false),
            ("/a/*/c", "/a/b/b/c", true),
            ("/a/*/c", "/a/c", false),
            ("*", "", true),
            ("", "", true),
            ("", "/", false),
            ("/a*b*c", "/aXbYbZc", true),
            ("/a*b*c", "/aXbYbZ", false),
            ("/a", "/a", true),
        ] {
            assert_eq!(is_glob(path.as_bytes(), glob.as_bytes()), hit, "{glob} {path}");
        }
    }

    #[test]
    fn methods_and_fields_are_conditions_too() {
        let route = Route {
            method: vec![Method::POST],
            header: vec![HeaderMatch {
                name: http::HeaderName::from_static("x-kind"),
                value: Some("query".into()),
            }],
            ..rule()
        };
        let mut headers = HeaderMap::new();
        let head = |method: &Method, headers: &HeaderMap| {
            matches(
                &Head { method, host: None, path: "/", headers, trusted: false, upgrade: false },
                &route,
            )
        };
        assert!(!head(&Method::POST, &headers));
        headers.append("x-kind", "other".parse().unwrap());
        headers.append("x-kind", "query".parse().unwrap());
        assert!(head(&Method::POST, &headers));
        assert!(!head(&Method::GET, &headers));
    }

    proptest::proptest! {
        #[test]
        fn a_glob_made_from_a_path_matches_it(path in "/[a-c/]{0,12}", cut in 0usize..12) {
            let cut = cut.min(path.len());
            let glob = format!("{}*", &path[..cut]);
            proptest::prop_assert!(is_glob(path.as_bytes(), glob.as_bytes()));
            proptest::prop_assert!(is_glob(path.as_bytes(), b"*"));
            let longer = format!("{path}x");
            proptest::prop_assert!(!is_glob(longer.as_bytes(), path.as_bytes()));
        }
    }

    #[test]
    fn a_scope_is_a_path_or_its_first_segments() {
        let hash = |of, path| scope(of, Some(1), path);
        let same = |of, a, b| hash(of, a) == hash(of, b);
        assert!(same(Scope::Path, "/a/b", "/a/b/"));
        assert!(!same(Scope::Path, "/a/b", "/a/c"));
        assert!(same(Scope::Segments(1), "/a/b", "/a/c/d"));
        assert!(same(Scope::Segments(1), "/a", "/a/c"));
        assert!(!same(Scope::Segments(1), "/a/b", "/b/b"));
        assert!(same(Scope::Segments(2), "/a/b/c", "/a/b"));
        assert!(!same(Scope::Segments(2), "/a/b/c", "/a/c/c"));
        assert!(same(Scope::Segments(0), "/a", "/b"), "everything on the route");
        assert!(scope(Scope::Path, Some(1), "/a") != scope(Scope::Path, Some(2), "/a"));
    }
}
