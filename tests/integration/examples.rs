//! The configurations in the repository are right.

use std::{fs, path::Path};

use litegate::config::load;

#[test]
fn every_configuration_that_we_ship_is_right() {
    let mut found = 0;
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy"), &mut |path| {
        // Without the feature HTTP/3 is refused.
        let is_built = cfg!(feature = "http3") || !path.iter().any(|part| part == "http3");
        if is_built && path.extension().is_some_and(|extension| extension == "toml") {
            found += 1;
            load::load(path, []).unwrap_or_else(|error| panic!("{error}"));
        }
    });
    assert!(found >= 5, "only {found} were found");
}

#[cfg(feature = "http3")]
#[test]
fn the_overlay_with_http3_is_right_and_offers_it() {
    let overlay = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kustomize/overlays/http3");
    let config = load::load(&overlay.join("litegate.toml"), []).expect("it is right");
    let http3 = config.listeners.iter().find_map(|listener| listener.http3.as_ref());
    assert_eq!(http3.and_then(|http3| http3.port), Some(443));
}

#[test]
fn the_full_example_says_nothing_but_the_defaults() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/examples");
    let load = |name: &str| load::load(&deploy.join(name), []).expect("it is right");
    assert_eq!(load("full.toml"), load("minimal.toml"));
}

fn visit(directory: &Path, look: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).expect("the directory is there").flatten() {
        let path = entry.path();
        if path.is_dir() { visit(&path, look) } else { look(&path) }
    }
}

#[test]
fn the_page_about_consistency_has_every_key_and_its_default() {
    let file = include_str!("../../deploy/examples/full.toml");
    let page = include_str!("../../docs/consistency.md");
    for section in ["consistency", "durability"] {
        let begin = format!("[cluster.abaci.{section}]\n");
        let keys = file.split(&begin).nth(1).and_then(|rest| rest.split("\n[").next());
        for line in keys.expect("the section is there").lines().filter(|line| !line.is_empty()) {
            let (key, value) = line.trim_start_matches("# ").split_once('=').expect("a key");
            let (key, default) = (key.trim(), value.split('#').next().unwrap_or("").trim());
            let row = page.lines().find(|row| row.starts_with(&format!("| `{key}` |")));
            let row = row.unwrap_or_else(|| panic!("{section}.{key} has no row"));
            // Where it is commented out, the default is what no value says.
            assert!(line.starts_with('#') || row.contains(&format!("`{default}`")), "{row}");
        }
    }
}
