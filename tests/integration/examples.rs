//! The configurations in the repository are right.

use std::{fs, path::Path};

use litegate::config::load;

#[test]
fn every_configuration_that_we_ship_is_right() {
    let mut found = 0;
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy"), &mut |path| {
        if path.extension().is_some_and(|extension| extension == "toml") {
            found += 1;
            load::load(path, []).unwrap_or_else(|error| panic!("{error}"));
        }
    });
    assert!(found >= 5, "only {found} were found");
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
