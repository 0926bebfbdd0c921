//! What cannot be converted is refused by name, before anything is written (I7).

use crate::args;
use crate::support::corpus::{M, patch, plain};
use crate::support::{dedup_command, dedup_img, names_in, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Asserts that converting `source` is refused with all the words, once with a target that is not there and once over a file
/// that is; neither source nor directory changes.
#[track_caller]
fn refused(source: &Path, options: &[&str], words: &[&str]) {
    let home = scratch();
    let (fresh, old) = (home.path().join("fresh.qcow2"), home.path().join("old.qcow2"));
    fs::write(&old, "somebody's data").unwrap();
    let (before, beside) = (sha256_of(source), names_in(source.parent().unwrap()));
    for target in [&fresh, &old] {
        let mut words_in: Vec<OsString> = args!["convert"].to_vec();
        words_in.extend(options.iter().map(Into::into));
        words_in.extend(args![source, target]);
        dedup_img(words_in).refused(words);
    }
    assert_eq!(names_in(home.path()), ["old.qcow2"], "something was left behind");
    assert_eq!(fs::read(&old).unwrap(), b"somebody's data");
    assert_eq!((sha256_of(source), names_in(source.parent().unwrap())), (before, beside), "the source was touched");
}

/// An image made by `qemu-img create` with further words, in a directory of its own.
fn made(name: &str, words: &[&str]) -> (TempDir, PathBuf) {
    let home = scratch();
    let path = home.path().join(name);
    let mut all = args!["create", "-q"].to_vec();
    all.extend(words.iter().map(Into::into));
    all.extend(args![path, "1M"]);
    let mut create = qemu::tool("qemu-img", all);
    create.current_dir(home.path());
    qemu::finish("qemu-img", create).ok();
    (home, path)
}

#[test]
fn encrypted_images_are_refused_by_the_name_of_the_cipher() {
    for (format, word) in [("luks,encrypt.iter-time=10", "LUKS"), ("aes", "AES")] {
        let home = scratch();
        let path = home.path().join("secret.qcow2");
        qemu::create_encrypted(format, &path);
        refused(&path, &["-f", "qcow2"], &["Could not open", word]);
        refused(&path, &["-O", "raw"], &[word]);
    }
}

#[test]
fn an_external_data_file_is_refused() {
    let (_home, path) = made("outside.qcow2", &["-f", "qcow2", "-o", "data_file=data.raw"]);
    refused(&path, &["-f", "qcow2"], &["Could not open", "external data file"]);
}

#[test]
fn unknown_incompatible_features_are_refused() {
    for (at, bit) in [(79, 0x20), (72, 0x40)] {
        let (_home, path) = made("future.qcow2", &["-f", "qcow2"]);
        patch(&path, at, &[bit]);
        refused(&path, &["-f", "qcow2"], &["Could not open", "incompatible feature"]);
    }
}

#[test]
fn a_set_corrupt_bit_is_refused() {
    let (_home, path) = made("corrupt.qcow2", &["-f", "qcow2"]);
    patch(&path, 79, &[2]);
    refused(&path, &["-f", "qcow2"], &["Could not open", "corrupt"]);
    refused(&path, &[], &["corrupt"]);
}

#[test]
fn version_1_is_refused() {
    let (_home, path) = made("old.qcow", &["-f", "qcow"]);
    refused(&path, &[], &["Could not open", "qcow"]);
    refused(&path, &["-f", "qcow2"], &["version 1"]);
}

#[test]
fn other_formats_are_recognised_and_refused_by_name() {
    for format in ["vmdk", "vhdx", "vdi", "qed", "parallels"] {
        let (_home, path) = made(&format!("disk.{format}"), &["-f", format]);
        refused(&path, &[], &["Could not open", format]);
        refused(&path, &["-f", format], &[format]);
        // Said to be raw, the container itself is what gets converted.
        let home = scratch();
        let target = home.path().join("container.qcow2");
        dedup_img(args!["convert", "-q", "-f", "raw", path, target]).ok();
        qemu::compare_same("raw", &path, "qcow2", &target);
    }
}

/// An overlay whose header names `backing`, in a directory with a raw base.
fn overlay(backing: &str, format: &str) -> (TempDir, PathBuf) {
    let (home, path) = made("overlay.qcow2", &["-f", "qcow2", "-u", "-b", backing, "-F", format]);
    fs::write(home.path().join("base.raw"), vec![7; M as usize]).unwrap();
    (home, path)
}

#[test]
fn a_backing_file_is_opened_by_a_plain_path_only() {
    let (home, path) = overlay("base.raw", "raw");
    dedup_img(args!["convert", "-q", path, home.path().join("out.qcow2")]).ok();
    fs::remove_file(home.path().join("out.qcow2")).unwrap();
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}"#;
    for name in [json, "nbd://localhost/disk", "file:base.raw", "http://localhost/base.raw", "ssh://host/base.raw"] {
        let (_home, path) = overlay(name, "raw");
        refused(&path, &["-f", "qcow2"], &["backing file"]);
    }
}

#[test]
fn a_backing_file_is_opened_only_in_its_declared_format() {
    let (_home, path) = overlay("base.raw", "raw");
    let bytes = fs::read(&path).unwrap();
    let extension = bytes.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    patch(&path, extension as u64, &[0; 8]);
    refused(&path, &["-f", "qcow2"], &["backing", "format"]);
    for format in ["qcow2", "vmdk"] {
        let (_home, path) = overlay("base.raw", format);
        refused(&path, &["-f", "qcow2"], &["base.raw"]);
    }
}

/// The command is for pasting: a shell reads the two names in it as they are, whatever a stranger called the file.
#[test]
fn the_command_that_is_offered_names_the_files_to_a_shell() {
    for (name, read) in [
        ("base.raw", Some("base.raw")),
        ("base.raw'; touch PWNED; #", Some("base.raw'; touch PWNED; #")),
        ("-b $(touch PWNED)`touch PWNED`", Some("./-b $(touch PWNED)`touch PWNED`")),
        ("b\u{e4}cker.qcow2", Some("b\u{e4}cker.qcow2")),
        ("new\nline", None),
    ] {
        let (home, path) = overlay(name, "raw");
        let bytes = fs::read(&path).unwrap();
        let extension = bytes.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
        patch(&path, extension as u64, &[0; 8]);
        let ran =
            dedup_img(args!["convert", "-q", path, home.path().join("out")]).refused(&["does not say the format"]);
        let (_, command) = ran.stderr.trim_end().split_once("; set it with: ").unwrap();
        let Some(read) = read else {
            assert_eq!(command, "qemu-img rebase -u");
            continue;
        };
        let shell = Command::new("sh")
            .args(["-c", &command.replacen("qemu-img", "printf '%s\\n'", 1)])
            .current_dir(home.path())
            .output()
            .unwrap();
        let due = format!("rebase\n-u\n-b\n{read}\n-F\nFORMAT\n{}\n", path.display());
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), due, "{command}");
        assert_eq!(names_in(home.path()), ["base.raw", "overlay.qcow2"]);
    }
}

#[test]
fn a_backing_file_is_not_opened_against_the_users_will() {
    let (_home, path) = overlay("base.raw", "raw");
    refused(&path, &["-f", "qcow2", "--no-backing"], &["backing file"]);
}

#[test]
fn a_backing_file_behind_a_link_or_up_the_tree_is_opened_only_where_it_is_allowed_to_lie() {
    let home = scratch();
    for directory in ["inside", "outside"] {
        fs::create_dir(home.path().join(directory)).unwrap();
        fs::write(home.path().join(directory).join("base.raw"), vec![7; M as usize]).unwrap();
    }
    symlink("base.raw", home.path().join("inside/link.raw")).unwrap();
    symlink("../outside", home.path().join("inside/elsewhere")).unwrap();
    let (inside, outside) = (home.path().join("inside"), home.path().join("outside"));
    let absolute = inside.join("base.raw").display().to_string();
    // The name, whether it is followed as it is, and where its file lies.
    let cases = [
        ("base.raw", true, "inside"),
        ("./base.raw", true, "inside"),
        (absolute.as_str(), true, "inside"),
        ("../inside/base.raw", false, "inside"),
        ("link.raw", false, "inside"),
        ("../outside/base.raw", false, "outside"),
        ("elsewhere/base.raw", false, "outside"),
        ("elsewhere/../inside/base.raw", false, "inside"),
    ];
    for (name, plain, lies) in cases {
        let path = inside.join("overlay.qcow2");
        qemu::img(args!["create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", path]).ok();
        let target = home.path().join("out.qcow2");
        // stats follows the same names.
        let both = |rule: &[&str], words: Option<&[&str]>| {
            let with = |command: &[OsString], files: &[OsString]| {
                let rule = rule.iter().map(OsString::from).collect::<Vec<_>>();
                dedup_img([command, &rule[..], files].concat())
            };
            let runs = [with(&args!["convert", "-q"], &args![path, target]), with(&args!["stats"], &args![path])];
            for run in runs {
                match words {
                    None => run.ok(),
                    Some(words) => run.refused(words),
                };
            }
        };
        both(&[], (!plain).then_some(&[name, "--backing-dir"]));
        for allowed in [&inside, &outside, &home.path().to_owned()] {
            let is_inside = home.path().join(lies).starts_with(allowed);
            let rule = ["--backing-dir", allowed.to_str().unwrap()];
            both(&rule, (!is_inside).then_some(&[name, "does not lie in"]));
        }
    }
}

#[test]
fn what_is_wrong_with_a_backing_file_is_wrong_with_the_chain() {
    let (_home, path) = overlay("missing.raw", "raw");
    refused(&path, &["-f", "qcow2"], &["missing.raw"]);
    let (home, path) = overlay("base.qcow2", "qcow2");
    let base = home.path().join("base.qcow2");
    qemu::create("qcow2", &base, M, "");
    patch(&base, 79, &[2]);
    refused(&path, &["-f", "qcow2"], &["base.qcow2", "corrupt"]);
    let (_home, path) = overlay("overlay.qcow2", "qcow2");
    refused(&path, &["-f", "qcow2"], &["overlay.qcow2"]);
}

#[test]
fn a_snapshot_that_is_not_there_or_is_the_pool_is_refused() {
    let home = scratch();
    let image = home.path().join("image.qcow2");
    dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", plain(), image]).ok();
    refused(&image, &["-f", "qcow2", "-l", "nobody"], &["Can't find snapshot"]);
    refused(&image, &["-f", "qcow2", "-l", "dedup-pool"], &["dedup-pool"]);
    refused(&plain(), &["-f", "raw", "-l", "nobody"], &["snapshot"]);
}

#[test]
fn targets_that_cannot_be_written_as_asked_are_refused() {
    let source = plain();
    for (options, word) in [
        ("cluster_size=4k,refcount_bits=2", "refcount"),
        ("refcount_bits=1", "refcount"),
        ("refcount_bits=24", "power of two"),
        ("cluster_size=3k", "power of two"),
        ("cluster_size=4M", "power of two"),
        ("compat=0.10", "compat"),
        ("extended_l2=on", "extended_l2"),
        ("foo=bar", "foo"),
    ] {
        refused(&source, &["-f", "raw", "-o", options], &[word]);
    }
    refused(&source, &["-f", "raw", "-O", "vmdk"], &["vmdk"]);
    let usage = dedup_command(args!["convert", source]).output().unwrap();
    assert_eq!(usage.status.code(), Some(1), "wrong usage is 1, for scripts read 2 as corruption");
}
