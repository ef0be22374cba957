//! ARCHITECTURE.md says who may know whom; this holds the source to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

type Arrows = BTreeMap<String, BTreeSet<String>>;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every source file below, with what of it is not a test.
fn sources(below: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![below.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the source is here") {
            let path = entry.expect("it can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                let text = fs::read_to_string(&path).expect("it can be read");
                let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
                let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
                found.push((path, lines.collect::<Vec<_>>().join("\n")));
            }
        }
    }
    found
}

/// The first words of every path that begins with `krate::`, trees in braces included.
fn heads(text: &str, krate: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    let mut heads = BTreeSet::new();
    for (at, _) in text.match_indices(krate) {
        let before = text[..at].chars().next_back();
        let Some(rest) = text[at + krate.len()..].strip_prefix("::") else { continue };
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let Some(tree) = rest.strip_prefix('{') else {
            heads.insert(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut begins = true;
        for (at, c) in tree.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => begins = true,
                c if begins && depth == 0 && !c.is_whitespace() => {
                    heads.insert(word(&tree[at..]));
                    begins = false;
                }
                _ => {}
            }
        }
    }
    heads
}

/// Who imports whom in the source.
fn found() -> Arrows {
    let src = root().join("src");
    let mut arrows = Arrows::new();
    for (path, text) in sources(&src) {
        let part = path.strip_prefix(&src).expect("it is below").iter().next();
        let part = part.and_then(|part| part.to_str()).expect("a name").trim_end_matches(".rs");
        let known = arrows.entry(part.to_owned()).or_default();
        known.extend(heads(&text, "crate").into_iter().filter(|head| head != part));
        if part == "main" {
            known.extend(heads(&text, "litegate"));
        }
    }
    arrows.remove("lib");
    arrows
}

/// The list in ARCHITECTURE.md, in its order.
fn listed() -> Vec<(String, BTreeSet<String>)> {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("it is here");
    let (_, after) = page.split_once("imports only from lines below").expect("the list has a head");
    let block = after.split("```").nth(1).expect("the list is a block");
    let lines = block.lines().skip(1).map(|line| line.split_once('→').unwrap_or((line, "")));
    lines
        .map(|(part, known)| {
            (part.trim().to_owned(), known.split_whitespace().map(str::to_owned).collect())
        })
        .collect()
}

#[test]
fn who_knows_whom_is_what_the_architecture_says() {
    let listed: Arrows = listed().into_iter().collect();
    let found = found();
    for part in found.keys().chain(listed.keys()).collect::<BTreeSet<_>>() {
        let (is, may) = (found.get(part), listed.get(part));
        assert_eq!(is, may, "left: what src/{part} imports; right: what ARCHITECTURE.md lists");
    }
}

#[test]
fn every_arrow_leads_down() {
    let listed = listed();
    let floor = |name: &str| listed.iter().position(|(part, _)| part == name);
    for (part, known) in &listed {
        for other in known {
            assert!(floor(part) < floor(other), "{part} → {other} leads up, or nowhere");
        }
    }
}

#[test]
fn pure_code_has_no_socket_no_task_and_no_log() {
    let src = root().join("src");
    let pure = |path: &Path| {
        let path = path.strip_prefix(&src).expect("it is below");
        let but =
            ["config/load.rs", "topology/watch.rs", "topology/progress.rs", "litefs/client.rs"];
        ["decide", "config", "topology", "litefs"].iter().any(|part| path.starts_with(part))
            && !but.iter().any(|file| path.ends_with(file))
    };
    for (path, text) in sources(&src).into_iter().filter(|(path, _)| pure(path)) {
        for krate in ["tokio", "hyper", "hyper_util", "tracing", "fastrand"] {
            assert!(heads(&text, krate).is_empty(), "{}: {krate}", path.display());
        }
        for call in ["std::fs", "std::net::Tcp", "Instant::now", "SystemTime::now", "async fn"] {
            assert!(!text.contains(call), "{}: {call}", path.display());
        }
    }
}

#[test]
fn of_discovery_the_data_plane_knows_the_letterbox() {
    for (path, text) in sources(&root().join("src/proxy")) {
        let uses = text.matches("discovery::").count();
        assert_eq!(uses, text.matches("discovery::Observer").count(), "{}", path.display());
    }
}

#[test]
fn paths_are_found_in_every_form() {
    let text =
        "use crate::{\n a::{b, c},\n d,\n e::f as g,\n};\nlet x = crate::h::i(); mycrate::j;";
    let want = ["a", "d", "e", "h"].map(str::to_owned);
    assert_eq!(heads(text, "crate"), BTreeSet::from(want));
}
