//! What `stats` prints and where: tables for a terminal of 80 columns, JSON for programs, and nothing that a terminal obeys.

use super::dedup_img_in;
use super::stats::{disk, figures, stats};
use crate::args;
use crate::support::corpus::{content, patch, write_sparse};
use crate::support::subjects::{deduplicated, subject};
use crate::support::{Ran, dedup_command, dedup_img, qemu, scratch};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tempfile::TempDir;

/// Asserts what holds of all tables: lines of at most 80 columns, plain ASCII, no escape sequences.
#[track_caller]
fn plain(ran: Ran) -> String {
    let ran = ran.ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    for line in ran.stdout.lines() {
        assert!(line.len() <= 80, "{} columns: {line}\n{}", line.len(), ran.told());
        assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line:?}\n{}", ran.told());
        assert_eq!(line.trim_end(), line, "blanks at the end of {line:?}");
    }
    assert!(ran.stdout.ends_with('\n') && !ran.stdout.contains("\n\n\n"), "{}", ran.told());
    ran.stdout
}

/// Counts in a directory of short names, and looks at the lines.
#[track_caller]
fn lines_in(home: &Path, options: &[&str], images: &[&str]) -> String {
    let words = [&["stats"], options, images].concat();
    plain(dedup_img_in(home, words.iter().map(OsString::from)))
}

/// A directory with images of many kinds, and their names.
fn images() -> (TempDir, Vec<String>) {
    let home = scratch();
    let at = |name: &str| home.path().join(name);
    write_sparse(&at("a.raw"), &content());
    qemu::convert("raw", &at("a.raw"), "qcow2", &at("b.qcow2"), &["-o", "cluster_size=4k"]);
    let pooled = deduplicated(home.path(), "c.qcow2", &[]);
    for (n, name) in ["one", "a snapshot with a name"].into_iter().enumerate() {
        qemu::snapshot("-c", name, &pooled).ok();
        qemu::io("qcow2", &pooled, &[format!("write -P {} {}k 300k", n + 1, 100 * n)]);
    }
    let of = ["plain-64k", "plain-512", "version-2", "bits-1", "bits-2", "bits-4", "bits-64", "snapshots-64k", "zlib"];
    let more = ["subclusters", "subclusters-snapshots", "bitmaps", "preallocated"];
    for name in of.iter().chain(&more) {
        fs::copy(subject(name), at(name)).unwrap();
    }
    // The longest figures.
    qemu::create("qcow2", &at("8T.qcow2"), 8 << 40, "");
    qemu::create("qcow2", &at("60T.qcow2"), 60 << 40, "cluster_size=2M");
    let far = ["write -P 1 7000000000k 1M", "write -P 1 40000000000k 1M"].map(String::from);
    qemu::io("qcow2", &at("60T.qcow2"), &far);
    File::create(at("holes.raw")).unwrap().set_len(1 << 43).unwrap();
    let mut names = crate::support::names_in(home.path());
    names.sort();
    (home, names)
}

#[test]
fn every_line_fits_into_80_columns() {
    let (home, names) = images();
    for name in &names {
        lines_in(home.path(), &[], &[name]);
        lines_in(
            home.path(),
            &["--cluster-size", "512", "--top", "100"],
            &[if name.contains('T') { "a.raw" } else { name }],
        );
        lines_in(home.path(), &["--cluster-size", "2M", "--no-curve"], &[name]);
        if !name.ends_with("raw") {
            lines_in(home.path(), &["--quick"], &[name]);
        }
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for many in [&names[..2], &names[4..7], &names, &[["a.raw"; 12], ["8T.qcow2"; 12]].concat()] {
        lines_in(home.path(), &[], many);
    }
    let qcow2: Vec<&str> = names.iter().copied().filter(|name| !name.ends_with("raw")).collect();
    lines_in(home.path(), &["--quick"], &qcow2);
}

#[test]
fn the_tables_name_what_they_show() {
    let (home, _) = images();
    let of = |options: &[&str], images: &[&str]| lines_in(home.path(), options, images).to_lowercase();
    let raw = of(&[], &["a.raw"]);
    for word in ["a.raw", "virtual size", "data", "duplicates", "where", "times", "sha256", "saved", "time", "memory"] {
        assert!(raw.contains(word), "no {word}: {raw}");
    }
    let pooled = of(&[], &["c.qcow2"]);
    for word in ["metadata", "stored", "pool", "refcount", "dedup", "snapshots", "a snapshot with a name", "one"] {
        assert!(pooled.contains(word), "no {word}: {pooled}");
    }
    assert!(!pooled.contains("dedup-pool"), "the pool is no snapshot of the user's: {pooled}");
    let quick = of(&["--quick"], &["c.qcow2"]);
    for word in ["times", "sha256", "saved: against", "where"] {
        assert!(!quick.contains(word), "{word} needs data: {quick}");
    }
    assert!(!of(&["--top", "0"], &["a.raw"]).contains("sha256"));
    // The curve, and the recommendation that rests on it.
    let short = of(&["--no-curve"], &["a.raw"]);
    for word in ["\n    2 mib ", "what convert takes", "recommended", "dedup-img convert"] {
        assert_eq!((raw.contains(word), short.contains(word)), (true, false), "{word}: {raw} {short}");
    }
}

/// Twelve images: the matrix comes in blocks that fit, and no pair is missing.
#[test]
fn the_matrix_of_twelve_images_is_whole() {
    let home = scratch();
    let names: Vec<String> = (0..12).map(|n| format!("{n}.raw")).collect();
    for (n, name) in (0..).zip(&names) {
        // Image n has n + 1 contents of its own and 10 that all have.
        disk(&home.path().join(name), (0..10).chain((0..=n).map(|k| 100 + 20 * n + k)).map(|block| block + 1));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let paths: Vec<PathBuf> = names.iter().map(|name| home.path().join(name)).collect();
    let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let told = figures(&["--no-curve"], &paths);
    let text = lines_in(home.path(), &["--no-curve"], &names);
    let lines: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("Overlap")).skip(1).collect();
    let mut table: Vec<Vec<Option<String>>> = vec![vec![None; 12]; 12];
    let mut columns: Vec<usize> = Vec::new();
    for line in lines {
        let cells: Vec<&str> = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        match cells.iter().map(|cell| cell.parse::<usize>()).collect::<Result<Vec<_>, _>>() {
            Ok(numbers) if numbers.is_empty() => {}
            Ok(numbers) => columns = numbers,
            Err(_) if cells.len() == columns.len() + 1 => {
                let row: usize = cells[0].parse().unwrap();
                for (column, cell) in columns.iter().zip(&cells[1..]) {
                    assert_eq!(table[row - 1][column - 1].replace((*cell).to_owned()), None, "twice: {line}");
                }
            }
            Err(_) => break,
        }
    }
    for (a, row) in table.iter().enumerate() {
        for (b, cell) in row.iter().enumerate() {
            let (own, both) = (10 + a + 1, if a == b { 10 + a + 1 } else { 10 });
            assert_eq!(told["overlap"][a][b], both, "{a} {b}");
            let due = if a == b { "=".to_owned() } else { format!("{:.1} %", both as f64 * 100.0 / own as f64) };
            assert_eq!(cell.as_deref(), Some(due.as_str()), "{a} {b}: {text}");
        }
    }
}

#[test]
fn an_image_is_all_that_its_copy_is() {
    let home = scratch();
    let path = home.path().join("a.raw");
    disk(&path, [1, 2, 2, 0, 3]);
    let told = figures(&[], &[&path, &path, &path]);
    assert_eq!(told["overlap"], serde_json::json!([[4, 4, 4], [4, 4, 4], [4, 4, 4]]));
    let numbers =
        |list: &str, key: &str| told[list].as_array().unwrap().iter().map(|v| v[key].as_u64()).collect::<Vec<_>>();
    assert_eq!(numbers("growth", "new_clusters"), [Some(3), Some(0), Some(0)]);
    assert_eq!(numbers("growth", "total_clusters"), [Some(3); 3]);
    assert_eq!(numbers("exclusive", "clusters"), [Some(0); 3]);
    assert_eq!((&told["content"]["data_clusters"], &told["content"]["distinct_clusters"]), (&12.into(), &3.into()));
    assert!(told.get("recommendation").is_none());
    lines_in(home.path(), &[], &["a.raw", "a.raw"]);
}

/// Nothing is divided by zero, and nothing is counted that is not there.
#[test]
fn the_smallest_disks_have_figures() {
    let home = scratch();
    let at = |name: &str| home.path().join(name);
    fs::write(at("empty.raw"), "").unwrap();
    fs::write(at("byte.raw"), "x").unwrap();
    fs::write(at("sector.raw"), [7; 512]).unwrap();
    disk(&at("cluster.raw"), [1]);
    disk(&at("zeros.raw"), [0]);
    fs::write(at("more.raw"), [[7; 4096].as_slice(), &[7; 512]].concat()).unwrap();
    // Clusters of the disk at 4 KiB, and of its data.
    let disks = [
        ("empty.raw", 0, 0, 0),
        ("byte.raw", 1, 1, 1),
        ("sector.raw", 1, 1, 1),
        ("cluster.raw", 1, 1, 1),
        ("zeros.raw", 1, 0, 0),
        ("more.raw", 2, 2, 2),
    ];
    for (raw, total, data, distinct) in disks {
        let image = raw.replace("raw", "qcow2");
        qemu::convert("raw", &at(raw), "qcow2", &at(&image), &["-o", "cluster_size=4k"]);
        for name in [raw, &image] {
            let told = figures(&["-f", if name == raw { "raw" } else { "qcow2" }], &[&at(name)]);
            let one = &told["images"][0];
            assert_eq!(one["disk"]["total_clusters"], total, "{name}: {told:#}");
            assert_eq!(one["map"]["cells"].as_array().map(Vec::len), Some(total), "{name}: {told:#}");
            let found = ["data_clusters", "distinct_clusters"].map(|key| &told["content"][key]);
            assert_eq!(found, [&Value::from(data), &Value::from(distinct)], "{name}: {told:#}");
            assert!(
                told["content"]["duplicate_percent"] == 0.0 && one["still_duplicate"]["percent"] == 0.0,
                "{told:#}"
            );
            lines_in(home.path(), &["-f", if name == raw { "raw" } else { "qcow2" }], &[name]);
            let gates = ["--max-duplicate", "0", "--min-saved", "0"];
            stats(&gates, &[&at(name)]).ok();
        }
        lines_in(home.path(), &["--quick"], &[&image]);
    }
    let all: Vec<&str> = disks.iter().map(|(name, ..)| *name).collect();
    lines_in(home.path(), &["-f", "raw"], &all);
}

/// A name is shown without what a terminal obeys, and a snapshot's too; for programs it is the name.
#[test]
fn names_cannot_play_with_the_terminal() {
    let home = scratch();
    let names = [
        "a b",
        "-dash",
        "json:{}",
        "nbd:x",
        "new\nline",
        "esc\u{1b}[31m\u{1b}]0;x\u{7}",
        "tab\tcr\rdel\u{7f}",
        "c1\u{9b}31m",
        "qu'ote\"$(id)",
    ];
    let image = deduplicated(home.path(), "image", &[]);
    qemu::snapshot("-c", "red\u{1b}[31m\n\u{9b}m", &image).ok();
    for name in names {
        for (from, format) in [("image", "qcow2"), ("raw", "raw")] {
            if format == "raw" {
                disk(&home.path().join("raw"), [1, 2, 2, 2, 0]);
            }
            fs::copy(home.path().join(from), home.path().join(name)).unwrap();
            let run = |options: &[&str], more: &[&str]| {
                dedup_img_in(
                    home.path(),
                    [&["stats"], options, &["--", name], more].concat().iter().map(OsString::from),
                )
            };
            for (options, more) in [(&["-f", format][..], &[][..]), (&["-f", format, "--no-curve"], &["image"])] {
                let more = if format == "raw" { &[] } else { more };
                let ran = run(options, more).ok();
                let obeyed = |c: char| c.is_control() && c != '\n';
                assert!(!ran.stdout.contains(obeyed), "{:?}", ran.stdout);
                assert!(!ran.stdout.contains("\nline"), "{:?}", ran.stdout);
            }
            let ran = run(&["-f", format, "-q", "--min-saved", "100"], &[]);
            assert_eq!((ran.code, ran.stderr.lines().count()), (4, 1), "{ran:?}");
            let ran = run(&["-f", format, "--output", "json"], &[]).ok();
            let told: Value = serde_json::from_str(&ran.stdout).unwrap();
            assert_eq!(told["images"][0]["filename"], *name, "{told:#}");
            if format == "qcow2" {
                assert_eq!(told["images"][0]["snapshots"][0]["name"], "red\u{1b}[31m\n\u{9b}m");
            }
        }
        fs::remove_file(home.path().join(name)).unwrap();
    }
    // A name that is no text at all.
    let odd = home.path().join(OsString::from_vec(b"\xff\xfe.raw".to_vec()));
    disk(&odd, [1, 1]);
    stats(&["-f", "raw"], &[&odd]).ok();
    figures(&["-f", "raw"], &[&odd]);
}

/// The command that is recommended does what is said of it, whatever the names, and takes raw for raw.
#[test]
fn the_command_that_is_recommended_works() {
    let home = scratch();
    let at = |name: &str| home.path().join(name);
    let raw = at("it's a disk.raw");
    disk(&raw, (0..200).map(|n| n % 20));
    // What a guest wrote looks like a format.
    let inner = at("inner");
    qemu::convert("raw", &raw, "qcow2", &inner, &["-o", "cluster_size=4k"]);
    let path = OsString::from_vec(
        [b"PATH=", Path::new(env!("CARGO_BIN_EXE_dedup-img")).parent().unwrap().as_os_str().as_encoded_bytes()]
            .concat(),
    );
    for (image, format, action) in [(&raw, "raw", "convert"), (&inner, "raw", "convert"), (&inner, "qcow2", "dedup")] {
        let told = figures(&["-f", format], &[image])["recommendation"].clone();
        assert_eq!(told["action"], action, "{told:#}");
        let before = crate::support::names_in(home.path());
        let original = fs::read(image).unwrap();
        let script = format!("export {}:$PATH; {}", path.to_str().unwrap(), told["command"].as_str().unwrap());
        qemu::run("sh", args!["-euc", script]).ok();
        let after = crate::support::names_in(home.path());
        let new: Vec<&String> = after.iter().filter(|name| !before.contains(name)).collect();
        assert_eq!(new.len(), usize::from(action == "convert"), "{new:?}");
        if let [name] = new[..] {
            assert!(fs::read(image).unwrap() == original, "the source has changed");
            assert_eq!(told["predicted_bytes"], at(name).metadata().unwrap().len(), "{told:#}");
            qemu::compare_same(format, image, "qcow2", &at(name));
        }
    }
    // What occupies nothing cannot become less.
    let holes = at("holes.raw");
    File::create(&holes).unwrap().set_len(1 << 40).unwrap();
    let told = figures(&[], &[&holes])["recommendation"].clone();
    assert_eq!((&told["action"], told.get("command")), (&"none".into(), None), "{told:#}");
}

/// Runs on a terminal, as `script` of util-linux gives it, and returns what the terminal gets.
fn on_a_terminal(image: &Path, environment: &[(&str, &str)]) -> String {
    let line = format!("exec '{}' stats --no-curve '{}'", env!("CARGO_BIN_EXE_dedup-img"), image.display());
    let mut command = qemu::tool("script", args!["-q", "-e", "-c", line, "/dev/null"]);
    command.env_remove("NO_COLOR").env("TERM", "xterm").envs(environment.iter().copied());
    qemu::finish("script", command).ok().stdout.replace("\r\n", "\n")
}

#[test]
fn colours_are_for_terminals() {
    let home = scratch();
    let image = deduplicated(home.path(), "image.qcow2", &[]);
    let piped = stats(&["--no-curve"], &[&image]).ok().stdout;
    let map = |text: &str| text.lines().skip_while(|line| !line.starts_with("Where")).nth(2).unwrap().to_owned();
    let coloured = on_a_terminal(&image, &[]);
    assert!(map(&coloured).contains("\u{1b}["), "{coloured:?}");
    // Without them it is the same line, and at its end the terminal is as it was.
    let mut bare = String::new();
    for piece in map(&coloured).split('\u{1b}') {
        bare += piece.strip_prefix('[').map_or(piece, |rest| rest.split_once('m').unwrap().1);
    }
    assert_eq!(bare, map(&piped));
    assert!(map(&coloured).ends_with("\u{1b}[0m"), "{coloured:?}");
    for environment in [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")] {
        let text = on_a_terminal(&image, &[environment]);
        assert!(!text.contains('\u{1b}'), "{environment:?}: {text:?}");
        assert_eq!(map(&text), map(&piped));
    }
    assert!(map(&on_a_terminal(&image, &[("NO_COLOR", "")])).contains('\u{1b}'), "an empty NO_COLOR is none");
}

/// Replaces what differs from run to run.
fn steady(mut told: Value) -> Value {
    for key in ["seconds", "peak_memory_bytes"] {
        told.as_object_mut().unwrap().remove(key).unwrap();
    }
    told
}

#[test]
fn figures_do_not_depend_on_threads_or_memory() {
    let (home, names) = images();
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| !name.contains("T.")).collect();
    for images in names.iter().map(|name| vec![*name]).chain([names.clone()]) {
        let paths: Vec<PathBuf> = images.iter().map(|name| home.path().join(name)).collect();
        let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
        let of = |options: &[&str]| {
            let text = lines_in(home.path(), options, &images);
            let lines: Vec<String> =
                text.lines().filter(|line| !line.starts_with("time ")).map(str::to_owned).collect();
            (steady(figures(options, &paths)), lines)
        };
        let due = of(&["--threads", "1"]);
        for options in [&["--threads", "4", "--memory", "1M"][..], &[]] {
            assert!(of(options) == due, "{images:?} {options:?}");
        }
    }
}

/// The keys of an object, in alphabetical order.
fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn json_has_the_keys_that_scripts_rely_on() {
    let (home, _) = images();
    let [raw, image] = ["a.raw", "c.qcow2"].map(|name| home.path().join(name));
    let always = ["cluster_size_bytes", "images", "peak_memory_bytes", "quick", "schema_version", "seconds"];
    let file = ["disk", "file_allocated_bytes", "file_length_bytes", "filename", "format", "virtual_size_bytes"];
    let read = ["content", "map", "still_duplicate"];
    let qcow2 = ["file", "pool", "refcounts", "sharing", "snapshots"];
    let with = |lists: &[&[&'static str]]| {
        let mut keys = lists.concat();
        keys.sort_unstable();
        keys
    };
    let all = ["content", "histogram", "top"];
    for (options, images, top, first) in [
        (&[][..], &[&*raw][..], with(&[&always, &all, &["curve", "recommendation"]]), with(&[&file, &read])),
        (
            &[],
            &[&image],
            with(&[&always, &all, &["curve", "recommendation"]]),
            with(&[&file, &read, &qcow2, &["dedup"]]),
        ),
        (&["--no-curve"], &[&image], with(&[&always, &all]), with(&[&file, &read, &qcow2, &["dedup"]])),
        (&["--quick"], &[&image], with(&[&always]), with(&[&file, &qcow2])),
        (
            &[],
            &[&raw, &image],
            with(&[&always, &all, &["curve", "overlap", "growth", "exclusive"]]),
            with(&[&file, &read]),
        ),
        (
            &["--min-saved=0"],
            &[&raw],
            with(&[&always, &all, &["curve", "recommendation", "gates"]]),
            with(&[&file, &read]),
        ),
    ] {
        let told = figures(options, images);
        assert_eq!((keys(&told), keys(&told["images"][0])), (top, first), "{options:?} {images:?}");
        assert_eq!((&told["schema_version"], &told["quick"]), (&1.into(), &options.contains(&"--quick").into()));
        assert_eq!(told["images"][0]["filename"], images[0].to_str().unwrap());
        assert_eq!(told["images"][0]["file_length_bytes"], images[0].metadata().unwrap().len());
        assert!(told["seconds"].as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)), "{told:#}");
        assert!((1 << 20..512 << 20).contains(&told["peak_memory_bytes"].as_u64().unwrap()), "{told:#}");
    }
    let ran = stats(&["--output", "json"], &[&raw]).ok();
    assert!(
        ran.stdout.starts_with("{\n    \"schema_version\": 1,\n") && ran.stdout.ends_with("\n}\n"),
        "{}",
        ran.told()
    );
    let refused = figures(&[], &[&home.path().join("subclusters")]);
    assert_eq!(keys(&refused["images"][0]["dedup"]), ["refused"]);
}

/// Data that lies in another file or is encrypted has no figures, nor has the metadata that leads there.
#[test]
fn foreign_data_is_refused_by_name() {
    let home = scratch();
    let [outside, secret] = ["outside.qcow2", "secret.qcow2"].map(|name| home.path().join(name));
    let data = home.path().join("data.raw");
    qemu::create("qcow2", &outside, 1 << 20, &format!("data_file={}", data.display()));
    qemu::io("qcow2", &outside, &["write -P 1 64k 300k".into()]);
    qemu::create("qcow2", &secret, 1 << 20, "");
    // The method of encryption: AES.
    patch(&secret, 32, &[0, 0, 0, 1]);
    for (image, word) in [(outside, "external data file"), (secret, "encrypt")] {
        for options in [&[][..], &["--quick"], &["--min-saved", "0"]] {
            stats(options, &[&image]).refused(&[word, image.to_str().unwrap()]);
        }
    }
}

#[test]
fn quiet_and_progress_are_as_with_the_other_commands() {
    let (home, _) = images();
    let image = home.path().join("c.qcow2");
    for options in [&["-q"][..], &["-q", "-p"], &["-q", "--output", "json"], &["-q", "--quick"]] {
        assert_eq!(stats(options, &[&image]).ok().text(), "");
    }
    for options in [&["-p"][..], &["-p", "--quick"]] {
        let ran = stats(options, &[&image, &image]).ok();
        assert!(ran.stdout.contains("    (100.00/100%)\r") && ran.stderr.is_empty(), "{ran:?}");
        assert!(!ran.stdout.contains('\u{1b}'), "{ran:?}");
        let ran = stats(&[options, &["--output", "json"]].concat(), &[&image]).ok();
        assert!(serde_json::from_str::<Value>(&ran.stdout).is_ok() && ran.stderr.contains("(100.00/100%)"), "{ran:?}");
    }
}

/// A reader that goes away is no failure; a full disk is, and the gates' lines are told all the same.
#[test]
fn an_output_that_cannot_be_written_is_told() {
    let home = scratch();
    let image = deduplicated(home.path(), "image.qcow2", &[]);
    let run = |options: &[&str], stdout: Stdio| {
        let words = args!["stats"].into_iter().chain(options.iter().map(Into::into)).chain(args![image]);
        let mut command = dedup_command(words);
        command.stdout(stdout).stderr(Stdio::piped());
        let line = format!("{command:?}");
        Ran::new(line, &command.spawn().unwrap().wait_with_output().unwrap())
    };
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for options in [&[][..], &["--quick"], &["--output", "json"], &["--min-saved", "0"]] {
        run(options, full().into()).refused(&["standard output", "No space left on device"]);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = run(options, writer.into());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{}", ran.told());
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ran = run(&["--min-saved", "100"], writer.into());
    assert_eq!((ran.code, ran.stderr.lines().count()), (4, 1), "{}", ran.told());
    assert_eq!(run(&["-q"], full().into()).ok().text(), "");
    let help = dedup_img(args!["stats", "--help"]).ok().stdout;
    assert!(help.contains("Exit status") && help.contains("  4  "), "exit code 4 is told: {help}");
}
