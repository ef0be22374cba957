//! `litegate explain`: the same functions that decide about a request, without sending it.

use std::process::ExitCode;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use crate::{
    config::Config,
    decide::{
        Class,
        classify::classify,
        route::{Head, matches},
    },
    topology::Topology,
};

pub(super) fn explain(config: &Config, method: &str, url: &str, fields: &[String]) -> ExitCode {
    let (Ok(method), Ok(uri)) = (Method::from_bytes(method.as_bytes()), url.parse::<Uri>()) else {
        eprintln!("error: not a method and a URL: `{method} {url}`");
        return ExitCode::from(2);
    };
    let mut headers = HeaderMap::new();
    for field in fields {
        let parsed = field.split_once(':').and_then(|(name, value)| {
            let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
            Some((name, HeaderValue::from_str(value.trim()).ok()?))
        });
        let Some((name, value)) = parsed else {
            eprintln!("error: not a field: `{field}`; write -H 'name: value'");
            return ExitCode::from(2);
        };
        headers.append(name, value);
    }
    let host = uri.authority().map(|authority| authority.as_str().to_owned());
    let host = host.or_else(|| {
        headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).map(str::to_owned)
    });
    let head = Head {
        method: &method,
        host: host.as_deref(),
        path: uri.path(),
        headers: &headers,
        trusted: false,
        upgrade: headers.contains_key(http::header::UPGRADE),
    };
    for route in &config.routes {
        let name = route.index.map_or("every request".to_owned(), |n| format!("route {}", n + 1));
        if !matches(&head, route) {
            println!("{name}: does not match");
            continue;
        }
        let cluster = config.clusters.get(route.cluster).map_or("?", |cluster| &*cluster.name);
        println!("{name}: matches, to cluster {cluster}");
        match classify(&head, route, &Topology::default(), None) {
            Err(problem) => println!("refused: {} {}", problem.status(), problem.title()),
            Ok(request) => {
                let because = request.because.as_str();
                println!("{}, by its {because}", request.class.as_str());
                println!(
                    "{}",
                    match request.class {
                        Class::Write => "goes to the primary, or waits until there is one",
                        Class::Read => "goes to a healthy replica that is fresh enough",
                    }
                );
            }
        }
        return ExitCode::SUCCESS;
    }
    println!("refused: 404, no route matches");
    ExitCode::SUCCESS
}
