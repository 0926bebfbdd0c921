//! tests/run installs what the tests start, so that they run on a machine that has nothing of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What stands before the name of a program in the tests.
const STARTS: [&str; 6] = ["Command::new(", "::tool(", "::run(", "::spawn(", " system(", ".command("];

/// The programs that the sources below a directory name.
fn named(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            named(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let pieces = STARTS.iter().flat_map(|start| text.split(start).skip(1));
            let quoted = pieces.filter_map(|piece| piece.trim_start().strip_prefix('"')?.split('"').next());
            // The marks above are followed by quotes, too.
            let is_name = |word: &&str| word.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
            names.extend(quoted.filter(is_name).map(str::to_owned));
        }
    }
}

#[test]
fn every_program_that_a_test_starts_is_installed_by_tests_run() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut names = BTreeSet::new();
    named(&tests, &mut names);
    assert!(names.len() > 10 && names.contains("qemu-io") && names.contains("losetup"), "{names:?}");
    let run = fs::read_to_string(tests.join("run")).unwrap();
    let needs = run.split("\nneeds=(").nth(1).unwrap().split(')').next().unwrap();
    let needs: BTreeSet<&str> = needs.split_whitespace().filter_map(|need| need.split(':').next()).collect();
    let missing: Vec<_> = names.iter().filter(|name| !needs.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "tests/run does not install {missing:?}: name the program and its package there");
}
