//! `litegate explain`: the same functions that decide about a request, without sending it.

use std::{fmt::Write as _, process::ExitCode};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};

use crate::{
    config::{
        Config,
        cluster::{Cluster, Mode, OnRequest, Reads},
        route::Route,
    },
    decide::{
        Because, Class, Consistency, Problem, Request, Wanted,
        classify::{Demanded, ROUTE, classify, demanded},
        route::{Head, matches, route},
        token::TOKEN,
    },
    topology::Topology,
};

/// A request as its client would send it.
#[derive(Clone, Debug)]
struct Asked {
    method: Method,
    uri: Uri,
    host: Option<String>,
    headers: HeaderMap,
    trusted: bool,
}

pub(super) fn explain(
    config: &Config,
    method: &str,
    url: &str,
    fields: &[String],
    trusted: bool,
) -> ExitCode {
    match asked(method, url, fields, trusted) {
        Ok(asked) => {
            print!("{}", explanation(config, &asked));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn asked(method: &str, url: &str, fields: &[String], trusted: bool) -> Result<Asked, String> {
    let (Ok(method), Ok(uri)) = (Method::from_bytes(method.as_bytes()), url.parse::<Uri>()) else {
        return Err(format!("not a method and a URL: `{method} {url}`"));
    };
    let mut headers = HeaderMap::new();
    for field in fields {
        let parsed = field.split_once(':').and_then(|(name, value)| {
            let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
            Some((name, HeaderValue::from_str(value.trim()).ok()?))
        });
        let (name, value) =
            parsed.ok_or_else(|| format!("not a field: `{field}`; write -H 'name: value'"))?;
        headers.append(name, value);
    }
    let host = uri.authority().map(|authority| authority.as_str().to_owned());
    let host = host.or_else(|| Some(headers.get(header::HOST)?.to_str().ok()?.to_owned()));
    Ok(Asked { method, uri, host, headers, trusted })
}

/// In words: which rule, as what, where to, and what happens if that fails.
fn explanation(config: &Config, asked: &Asked) -> String {
    let mut page = String::new();
    let head = Head {
        method: &asked.method,
        host: asked.host.as_deref(),
        path: asked.uri.path(),
        headers: &asked.headers,
        trusted: asked.trusted,
        // Nobody writes `Connection: upgrade` by hand.
        upgrade: asked.headers.contains_key(header::UPGRADE),
    };
    if let Err(problem @ Problem::AmbiguousPath) =
        route(&head, &config.routes, config.limits.ambiguous_paths)
    {
        refused(&mut page, problem);
        return page;
    }
    for route in &config.routes {
        let name = route.index.map_or("every request".to_owned(), |n| format!("route {}", n + 1));
        if !matches(&head, route) {
            let _ = writeln!(page, "{name}: does not match");
            continue;
        }
        let Some(cluster) = config.clusters.get(route.cluster) else { continue };
        let _ = writeln!(page, "{name}: matches, to cluster {}", cluster.name);
        let region = cluster.replay.primary_region.as_deref();
        match classify(&head, route, &Topology::default(), region) {
            // Which nodes there are, only a running litegate knows.
            Err(Problem::UnknownNode) => {
                page.push_str("goes to the node that it names, or is refused if there is none\n");
            }
            Err(problem) => refused(&mut page, problem),
            Ok(request) => decided(&mut page, asked, route, cluster, &request),
        }
        return page;
    }
    refused(&mut page, Problem::NoRoute);
    page
}

fn refused(page: &mut String, problem: Problem) {
    let (status, title) = (problem.status().as_u16(), problem.title());
    let _ = writeln!(page, "refused: {status} {}: {title}", problem.as_str());
}

fn decided(page: &mut String, asked: &Asked, route: &Route, cluster: &Cluster, request: &Request) {
    let why = match request.because {
        Because::Method => format!("its method, {}", asked.method),
        Because::Route => "its route's `class`".to_owned(),
        Because::Upgrade => "becoming another protocol: a socket can write at any time".to_owned(),
        Because::Asked => "a trusted peer's Litegate-Route".to_owned(),
    };
    let _ = writeln!(page, "{}, by {why}", request.class.as_str());
    if !asked.trusted && asked.headers.contains_key(&ROUTE) {
        page.push_str("its Litegate-Route counts for nothing: only trusted_proxies may say that\n");
    }
    let hold = &cluster.hold;
    let waits = format!("waits up to {:?} (hold.timeout)", hold.timeout);
    match request.class {
        Class::Write => {
            let _ = writeln!(page, "goes to the primary; while there is none it {waits}");
            page.push_str(
                "is sent again if not a byte of it was written, or the node says elsewhere",
            );
            page.push_str(match (route.idempotent, route.retry_uncommitted) {
                (true, _) => ",\nand after every interruption: the route says `idempotent`\n",
                (false, true) => {
                    ",\nor once it has provably not committed: the route says `retry_uncommitted`\n"
                }
                (false, false) => "\n",
            });
            if cluster.durability.replicas > 0 {
                let durability = &cluster.durability;
                let _ = writeln!(
                    page,
                    "is answered when {} replicas have it, or {:?} have passed (durability)",
                    durability.replicas, durability.timeout
                );
            }
        }
        Class::Read => read(page, asked, cluster, request, &waits),
    }
}

fn read(page: &mut String, asked: &Asked, cluster: &Cluster, request: &Request, waits: &str) {
    let rules = &cluster.consistency;
    let is_heeded = match rules.on_request {
        OnRequest::Any => true,
        OnRequest::Trusted => asked.trusted,
        OnRequest::Off => false,
    };
    let demand = if is_heeded { demanded(&asked.headers) } else { Ok(Demanded::default()) };
    let demand = match demand {
        Ok(demand) => demand,
        Err(problem) => return refused(page, problem),
    };
    let fresh = format!("at most {:?} behind (max_lag)", cluster.max_lag);
    let _ = match (request.wanted, demand.consistency, cluster.reads) {
        (Wanted::Primary, ..) | (_, Consistency::Primary, _) => {
            writeln!(page, "goes to the primary, as it asks; while there is none it {waits}")
        }
        (Wanted::Replica, ..) => writeln!(page, "goes to a replica, as a trusted peer asks"),
        (_, _, Reads::Primary) => writeln!(page, "goes to the primary (reads = \"primary\")"),
        (_, _, Reads::Replicas) => writeln!(page, "goes to a replica {fresh}, never the primary"),
        (_, _, Reads::All) => writeln!(page, "goes to any node {fresh}"),
        (_, _, Reads::PreferReplicas) => {
            writeln!(page, "goes to a replica {fresh}; to the primary if none can serve")
        }
    };
    if let Some(staleness) = demand.staleness {
        let _ = writeln!(page, "the node may be {staleness:?} behind: Litegate-Max-Staleness");
    }
    let is_of_cookie = |line: &HeaderValue| line.to_str().is_ok_and(|l| l.contains("litegate"));
    let carries = asked.headers.contains_key(&TOKEN)
        || asked.headers.get_all(header::COOKIE).iter().any(is_of_cookie);
    if carries && demand.consistency == Consistency::Session {
        match rules.mode {
            Mode::Token => {
                let _ = writeln!(
                    page,
                    "has to see its client's last write: waits {:?} for such a replica, then asks \
                     the primary",
                    rules.wait
                );
            }
            Mode::Affinity => page.push_str("goes to the primary while its token says so\n"),
            Mode::Off => page.push_str("its token counts for nothing: mode = \"off\"\n"),
        }
    }
    let retry = &cluster.retry;
    if retry.attempts > 1 {
        let _ = writeln!(page, "goes to another node after a failure, {} in all", retry.attempts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load;

    fn told(keys: &str, routes: &str, line: &str, fields: &[&str], trusted: bool) -> String {
        let file = format!(
            "[[listener]]\naddress = \"0.0.0.0:80\"\n[cluster.a]\nport = 1\nprimary = {{ type = \
             \"litefs\" }}\nmembers = {{ type = \"dns\", name = \"a\" }}\n{keys}\n{routes}"
        );
        let config = load::parse("test", &file, []).expect("it is right");
        let (method, url) = line.split_once(' ').expect("a method and a URL");
        let fields: Vec<_> = fields.iter().map(|field| (*field).to_owned()).collect();
        explanation(&config, &asked(method, url, &fields, trusted).expect("a request"))
    }

    #[test]
    fn a_read_and_a_write_are_told_with_their_reasons() {
        insta::assert_snapshot!(told("", "", "GET http://a.example/x", &[], false), @r"
        every request: matches, to cluster a
        read, by its method, GET
        goes to a replica at most 10s behind (max_lag); to the primary if none can serve
        goes to another node after a failure, 3 in all
        ");
        insta::assert_snapshot!(told("", "", "POST /x", &[], false), @r"
        every request: matches, to cluster a
        write, by its method, POST
        goes to the primary; while there is none it waits up to 30s (hold.timeout)
        is sent again if not a byte of it was written, or the node says elsewhere
        ");
    }

    #[test]
    fn every_kind_of_request_is_told_apart() {
        let routes = "[[route]]\nhost = [\"b.example\"]\npath = \"/search\"\nclass = \"read\"\n\
                      [[route]]\npath = \"/put\"\nidempotent = true\n[[route]]\n";
        for (line, fields, trusted, words) in [
            ("POST http://b.example/search?q=1", &[][..], false, "read, by its route's `class`"),
            ("POST /search", &["host: b.example:80"], false, "route 1: matches"),
            ("POST http://c.example/search", &[], false, "route 1: does not match"),
            ("PUT /put/1", &[], false, "the route says `idempotent`"),
            ("QUERY /x", &[], false, "read, by its method, QUERY"),
            ("BREW /x", &[], false, "write, by its method, BREW"),
            ("GET /ws", &["upgrade: websocket"], false, "write, by becoming another protocol"),
            ("TRACE /x", &[], false, "refused: 405 method_refused"),
            ("OPTIONS *", &[], false, "read, by its method, OPTIONS"),
            ("GET /x", &["litegate-route: primary"], true, "write, by a trusted peer"),
            ("GET /x", &["litegate-route: primary"], false, "only trusted_proxies may say that"),
            ("GET /x", &["litegate-route: replica"], true, "goes to a replica, as a trusted peer"),
            ("GET /x", &["litegate-route: a-1"], true, "goes to the node that it names"),
            (
                "GET /x",
                &["litegate-consistency: primary"],
                false,
                "goes to the primary, as it asks",
            ),
            ("GET /x", &["litegate-consistency: most"], false, "refused: 400 bad_demand"),
            ("GET /x", &["litegate-max-staleness: 250ms"], false, "may be 250ms behind"),
            ("GET /x", &["litegate-token: t"], false, "its client's last write: waits 1s"),
            ("GET /x", &["cookie: a=1; litegate=t"], false, "its client's last write: waits 1s"),
        ] {
            let page = told("", routes, line, fields, trusted);
            assert!(page.contains(words), "{line} {fields:?}: {words}:\n{page}");
        }
        let only = "[[route]]\npath = \"/a\"\n";
        assert!(told("", only, "GET /b", &[], false).contains("refused: 404 no_route"));
        let keys = "reads = \"replicas\"\ndurability = { replicas = 1 }";
        assert!(told(keys, "", "GET /b", &[], false).contains("never the primary"));
        assert!(told(keys, "", "POST /b", &[], false).contains("when 1 replicas have it"));
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_cure() {
        assert!(asked("G T", "/", &[], false).is_err());
        assert!(asked("GET", "no url", &[], false).is_err());
        let error = asked("GET", "/", &["x".to_owned()], false).unwrap_err();
        assert!(error.contains("write -H 'name: value'"), "{error}");
    }
}
