//! What a shell offers. The scripts are made by the program; that the stored ones are the same is tested beside the code.

use std::process::Command;

use super::{Ran, accepts_help, args, dedup_img, rejects_a_bad_option, wrong_usage};

#[test]
fn the_command_keeps_the_contract() {
    accepts_help("completions");
    rejects_a_bad_option("completions");
    wrong_usage(dedup_img(args!["completions"]), "completions", &["Not enough arguments"]);
    wrong_usage(dedup_img(args!["completions", "tcsh"]), "completions", &["tcsh", "zsh"]);
    wrong_usage(dedup_img(args!["completions", "bash", "surplus"]), "completions", &["surplus"]);
}

/// What bash offers for the last of `words`.
fn offered(words: &[&str]) -> Vec<String> {
    let script = dedup_img(args!["completions", "bash"]).ok().stdout;
    let typed = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let (last, before) = (words[words.len() - 1], words[words.len() - 2]);
    let ask = format!(
        "{script}\ncompopt() {{ :; }}; COMP_WORDS=({typed}); COMP_CWORD={}; _dedup__img dedup-img '{last}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words.len() - 1
    );
    let ran = Ran::new("bash".to_owned(), &Command::new("bash").arg("-c").arg(ask).output().unwrap()).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    ran.stdout.lines().filter(|line| !line.is_empty()).map(ToOwned::to_owned).collect()
}

#[test]
fn bash_offers_commands_options_and_values() {
    assert_eq!(offered(&["dedup-img", "con"]), ["convert"]);
    assert_eq!(offered(&["dedup-img", "completions", "z"]), ["zsh"]);
    assert_eq!(offered(&["dedup-img", "check", "--rep"]), ["--repair"]);
    assert_eq!(offered(&["dedup-img", "check", "-r", ""]), ["leaks", "all"]);
    assert_eq!(offered(&["dedup-img", "convert", "-O", "r"]), ["raw"]);
    assert_eq!(offered(&["dedup-img", "stats", "--output", "j"]), ["json"]);
    assert_eq!(offered(&["dedup-img", "convert", "-t", "un"]), ["unsafe"]);
    assert!(
        offered(&["dedup-img", "convert", "--backing-dir", "/us"]).is_empty(),
        "left to the shell's own directories"
    );
}

#[test]
fn what_is_only_there_to_be_refused_is_not_offered() {
    let options = offered(&["dedup-img", "convert", "--"]);
    assert!(options.iter().any(|option| option == "--all-snapshots"), "{options:?}");
    for refused in ["--bitmaps", "--object", "--image-opts", "--copy-range-offloading"] {
        assert!(!options.iter().any(|option| option == refused), "{refused}");
    }
}

#[test]
fn every_script_names_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = dedup_img(args!["completions", shell]).ok().stdout;
        for command in ["create", "convert", "dedup", "gc", "check", "stats", "completions"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}
