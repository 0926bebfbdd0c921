//! Who says what: the library has no words for options and commands, the program has them in one place.

use std::fs;
use std::path::{Path, PathBuf};

/// The sources below `directory`.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(sources(&path)),
            false if path.extension().is_some_and(|extension| extension == "rs") => found.push(path),
            false => {}
        }
    }
    found.sort();
    found
}

/// The string literals of a source outside of its tests, each with its line. Comments are none, and so are documentation and characters.
fn literals(source: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut rest = source.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let line_of =
        |rest: &str| source[..source.len().min(rest.as_ptr() as usize - source.as_ptr() as usize)].lines().count();
    while let Some(at) = rest.find(['"', '/', '\'', 'r']) {
        let (before, here) = rest.split_at(at);
        let line = line_of(here);
        let is_word = before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let hashes = here[1..].len() - here[1..].trim_start_matches('#').len();
        let mut next = &here[1..];
        if here.starts_with("//") {
            next = here.split_once('\n').map_or("", |(_, next)| next);
        } else if here.starts_with('\'') {
            // A character, or a lifetime.
            let mut characters = next.char_indices();
            if let Some((_, first)) = characters.next() {
                let end = if first == '\\' {
                    here[3..].find('\'').map(|end| end + 3)
                } else {
                    characters.next().map(|(at, _)| at + 1)
                };
                if let Some(end) = end.filter(|&end| here[end..].starts_with('\'')) {
                    next = &here[end + 1..];
                }
            }
        } else if here.starts_with('r') && !is_word && here[1 + hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let (text, after) = here[2 + hashes..].split_once(&end).unwrap();
            found.push((line, text.to_owned()));
            next = after;
        } else if here.starts_with('"') {
            let mut escaped = false;
            let end = next.find(|c| {
                let is_end = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                is_end
            });
            let end = end.unwrap() + 1;
            found.push((line, here[1..end].to_owned()));
            next = &here[end + 1..];
        }
        rest = next;
    }
    found
}

/// Whether `text` has an option, or the name of a program to run.
fn commands(text: &str) -> bool {
    let is_option = |word: &str| {
        let word = word.trim_start_matches(['(', '\'', '`', '"']);
        let letters = word.strip_prefix("--").or(word.strip_prefix('-')).unwrap_or_default();
        letters.starts_with(|c: char| c.is_ascii_alphabetic())
    };
    text.contains("dedup-img") || text.contains("qemu-img") || text.split_whitespace().any(is_option)
}

#[test]
fn literals_are_found_among_all_else() {
    let source = "// \"a\"\nlet x: &'a str = \"b\\\"c\"; let c = '\"'; let d = '\\''; r#\"e\"f\"#;\nvar(\"--g\")\n#[cfg(test)]\nmod tests { \"h\" }";
    let texts: Vec<(usize, String)> = literals(source);
    assert_eq!(texts, [(2, "b\\\"c".to_owned()), (2, "e\"f".to_owned()), (3, "--g".to_owned())]);
    assert!(commands("see --help") && commands("use -r all") && commands("(-U)") && commands("run qemu-img"));
    assert!(!commands("is not - yet - done") && !commands("8-byte"));
}

#[test]
fn the_library_names_no_option_and_no_command() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib");
    // What temporary files are called.
    let names = [".dedup-img-"];
    let mut said = Vec::new();
    for path in sources(&root) {
        let source = fs::read_to_string(&path).unwrap();
        let found = literals(&source).into_iter().filter(|(_, text)| commands(text) && !names.contains(&text.as_str()));
        said.extend(found.map(|(line, text)| format!("{}:{line}: {text}", path.display())));
    }
    assert!(said.is_empty(), "to be said by src/bin/dedup-img/advice.rs: {said:#?}");
}

#[test]
fn the_reason_of_an_error_decides_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let decides = [
        "reason.starts_with",
        "reason().starts_with",
        "reason.contains",
        "reason().contains",
        "to_string().starts_with",
        "to_string().contains",
        "reason() ==",
    ];
    for path in sources(&root) {
        let source = fs::read_to_string(&path).unwrap();
        let code = source.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
        let found = decides.iter().find(|decides| code.contains(**decides));
        assert_eq!(found, None, "{}", path.display());
    }
}

#[test]
fn words_of_128_bits_are_packed_in_one_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib");
    let rooms = ["sort", "digest"].map(|room| root.join(room));
    for path in sources(&root).iter().filter(|path| !rooms.iter().any(|room| path.starts_with(room))) {
        let source = fs::read_to_string(path).unwrap();
        let line = source.lines().position(|line| line.contains("u128")).map(|line| line + 1);
        assert_eq!(line, None, "{}: its records are for `sort::record`", path.display());
    }
}
