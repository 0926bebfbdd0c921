//! `check`: qemu-img's options, words, numbers and exit codes, with qemu-img itself as the judge.

use super::running::{Running, unprivileged};
use super::{Arguments, command_contract, wrong_usage};
use crate::args;
use crate::support::corpus::patch;
use crate::support::reader::Image;
use crate::support::subjects::{deduplicated, subject};
use crate::support::{Ran, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

command_contract!("check");

/// The arguments for the tests of a contract.
const CHECK: Arguments = |options, image, _| {
    let mut words = args!["check"].to_vec();
    words.extend(options.iter().map(Into::into));
    words.push(image.into());
    words
};

#[test]
fn the_input_must_exist() {
    super::the_input_must_exist(CHECK);
}

#[test]
fn the_input_cannot_be_a_directory() {
    super::the_input_cannot_be_a_directory(CHECK);
}

#[test]
fn the_input_must_be_readable() {
    super::the_input_must_be_readable(CHECK);
}

#[test]
fn a_file_that_is_no_image_of_the_format_given_is_refused() {
    super::a_file_that_is_no_image_of_the_format_given_is_refused(CHECK);
}

/// A sound image, one with leaks only, one with corruption and leaks, one whose refcounts cannot be read, and an empty one.
fn states(home: &Path) -> Vec<(PathBuf, i32)> {
    let copy = |name: &str, of: &str| {
        let path = home.join(name);
        fs::copy(subject(of), &path).unwrap();
        path
    };
    let clean = copy("clean.qcow2", "zlib");
    let leaky = copy("leaky.qcow2", "plain-4k");
    let image = Image::open(&leaky);
    let (block, table) = (image.refcount_blocks()[0], image.active()[0].host);
    let last = image.length / 4096;
    let leak = |path: &Path| {
        patch(path, (last + 1) * 4096 - 1, &[7]);
        patch(path, block + 2 * last, &[0, 1]);
    };
    leak(&leaky);
    let corrupt = copy("corrupt.qcow2", "plain-4k");
    patch(&corrupt, table + 3, &[0x77]);
    patch(&corrupt, block + 1, &[0]);
    leak(&corrupt);
    let unread = copy("unread.qcow2", "plain-4k");
    patch(&unread, image.header.refcount_table_offset + 6, &[0x22]);
    let empty = home.join("empty.qcow2");
    qemu::create("qcow2", &empty, 0, "");
    vec![(clean, 0), (leaky, 3), (corrupt, 2), (unread, 1), (empty, 0)]
}

/// Runs both programs with the same arguments.
fn both(options: &[&str], image: &Path) -> (Ran, Ran) {
    let words = CHECK(options, image, image);
    (dedup_img(words.clone()), qemu::img(words))
}

#[test]
fn the_summary_and_the_exit_code_are_those_of_qemu_img() {
    let home = scratch();
    for (image, code) in states(home.path()) {
        let before = sha256_of(&image);
        for options in [&[][..], &["-f", "qcow2"], &["--output", "human"], &["--output=human", "-U"]] {
            let (ours, theirs) = both(options, &image);
            assert_eq!(theirs.code, code, "{}", theirs.told());
            assert_eq!(ours.code, code, "{}", ours.told());
            let same = ours.stdout == theirs.stdout;
            qemu::words(&qemu::SEEN, same, || format!("{}; {}", ours.told(), theirs.told()));
        }
        assert_eq!(sha256_of(&image), before, "{} was written to", image.display());
    }
    assert_eq!(names_in(home.path()).len(), 5, "something was left behind");
}

/// Each of QEMU's lines is the beginning of one of ours, which goes on to say where.
#[test]
fn each_finding_begins_with_the_words_of_qemu_img() {
    let home = scratch();
    for (image, _) in states(home.path()) {
        let (ours, theirs) = both(&[], &image);
        let lines: BTreeSet<&str> = ours.stderr.lines().collect();
        for line in theirs.stderr.lines().filter(|line| !line.starts_with("qemu-img: ") && !line.starts_with("qcow2: "))
        {
            // QEMU ends these lines in what the flag was held against; ours says it in words.
            let due = line.split(" refcount=").next().filter(|_| line.contains("OFLAG_COPIED")).unwrap_or(line);
            let due = due.split("l1_index=").next().unwrap();
            let same = lines.iter().any(|line| line.starts_with(due));
            qemu::words(&qemu::SEEN, same, || format!("{line}: {}", ours.told()));
        }
    }
}

#[test]
fn json_has_the_keys_of_qemu_img() {
    let home = scratch();
    for (image, code) in states(home.path()) {
        let (ours, theirs) = both(&["--output", "json"], &image);
        assert_eq!((ours.code, theirs.code), (code, code), "{}\n{}", ours.told(), theirs.told());
        let [mut found, due] = [&ours, &theirs].map(|ran| {
            serde_json::from_str::<Value>(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
        });
        for key in ["schema_version", "findings-beyond", "benign"] {
            found.as_object_mut().unwrap().remove(key);
        }
        assert_eq!(found, due);
        assert!(ours.stdout.starts_with("{\n    \"") && ours.stdout.ends_with("\n}\n"), "{}", ours.told());
    }
}

#[test]
fn quiet_prints_findings_and_no_summary() {
    let home = scratch();
    for (image, code) in states(home.path()) {
        for options in [&["-q"][..], &["-q", "--output", "json"], &["-p", "-q"]] {
            let ran = dedup_img(CHECK(options, &image, &image));
            assert_eq!((ran.code, ran.stdout.as_str()), (code, ""), "{}", ran.told());
            assert_eq!(ran.stderr.is_empty(), code == 0, "{}", ran.told());
        }
        let (_, theirs) = both(&["-q", "--output", "json"], &image);
        assert_eq!((theirs.code, theirs.stdout.as_str()), (code, ""), "{}", theirs.told());
    }
}

#[test]
fn findings_do_not_depend_on_the_number_of_threads() {
    let home = scratch();
    for (image, _) in states(home.path()) {
        let runs = ["1", "2", "7", "64"].map(|n| dedup_img(CHECK(&["--threads", n], &image, &image)));
        for ran in &runs {
            assert_eq!((ran.code, ran.text()), (runs[0].code, runs[0].text()));
        }
    }
}

#[test]
fn bad_values_are_refused() {
    let image = subject("plain-4k");
    for (options, word) in
        [(["--output", "xml"], "xml"), (["--threads", "0"], "0"), (["-f", "no_such_format"], "no_such_format")]
    {
        wrong_usage(dedup_img(CHECK(&options, &image, &image)), "check", &[word]);
    }
}

#[test]
fn other_formats_cannot_be_checked() {
    let home = scratch();
    let image = home.path().join("image");
    fs::write(&image, "some text\n".repeat(10_000)).unwrap();
    for options in [&[][..], &["-f", "raw"], &["-q"], &["-f", "raw", "--output", "json"], &["--data"]] {
        let ran = dedup_img(CHECK(options, &image, &image));
        let name = image.display();
        let due =
            format!("dedup-img: '{name}': This image format does not support checks: a raw image has no metadata\n");
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr), (63, "", due));
    }
    let (ours, theirs) = both(&["-f", "raw"], &image);
    let theirs_say = theirs.stderr.trim_start_matches("qemu-img: ").trim_end();
    assert!(ours.code == theirs.code && ours.stderr.contains(theirs_say), "{}", theirs.told());
    for format in ["vmdk", "vhdx", "vdi", "qed", "parallels", "vpc", "qcow"] {
        let image = home.path().join(format);
        qemu::create(format, &image, 1 << 20, "");
        let ran = dedup_img(CHECK(&[], &image, &image));
        let due = format!(
            "dedup-img: Could not open '{}': Image is in {format} format; convert it with qemu-img first, or check it \
             with qemu-img\n",
            image.display()
        );
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr), (63, "", due));
    }
}

#[test]
fn options_of_qemu_img_check_are_taken_or_refused_by_name() {
    let image = subject("plain-4k");
    let due = dedup_img(CHECK(&[], &image, &image)).ok().stdout;
    for options in [["-T", "none"], ["-T", "writeback"], ["--cache", "unsafe"]] {
        assert_eq!(dedup_img(CHECK(&options, &image, &image)).ok().stdout, due);
    }
    for (options, word) in [
        (&["-T", "x"][..], "Invalid source cache option: x"),
        (&["--image-opts"], "--image-opts: "),
        (&["--object", "secret,id=a,data=b"], "--object: "),
    ] {
        dedup_img(CHECK(options, &image, &image)).refused(&[word]);
    }
    let theirs = qemu::img(args!["check", "-T", "x", image]);
    let same = theirs.stderr.contains("Invalid source cache option: x");
    qemu::words(&qemu::SEEN, same, || theirs.told());
}

/// What QEMU would read as zeros, for the file ends before, counts as such.
#[test]
fn a_header_and_nothing_behind_it_is_judged_as_by_qemu_img() {
    let home = scratch();
    let (whole, cut) = (subject("snapshots-64k"), home.path().join("cut.qcow2"));
    let bytes = fs::read(whole).unwrap();
    // Between what the format demands and what QEMU writes, QEMU reads zeros and this program refuses.
    fs::write(&cut, &bytes[..104]).unwrap();
    dedup_img(CHECK(&[], &cut, &cut)).refused(&["Could not open", "header"]);
    for length in [0, 4, 8, 71, 72, 103, 112, 1000, 4096, 65536, 65537, 4 << 16, bytes.len() - 65536] {
        fs::write(&cut, &bytes[..length]).unwrap();
        let (ours, theirs) = both(&["-f", "qcow2"], &cut);
        assert_eq!(ours.code, theirs.code, "{length} bytes: {}", theirs.told());
        qemu::words(&qemu::SEEN, ours.stdout == theirs.stdout, || format!("{}; {}", ours.told(), theirs.told()));
    }
}

#[test]
fn a_read_only_image_is_checked_and_left_untouched() {
    use std::os::unix::fs::PermissionsExt;
    let home = scratch();
    for (image, code) in states(home.path()) {
        fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
        let (before, modified) = (sha256_of(&image), image.metadata().unwrap().modified().unwrap());
        let ran = qemu::finish("setpriv", unprivileged(CHECK(&["--data"], &image, &image)));
        assert_eq!(ran.code, code, "{}", ran.told());
        assert_eq!((sha256_of(&image), image.metadata().unwrap().modified().unwrap()), (before, modified));
    }
}

/// I6: what changes under the reader cannot be checked, unless the user says so.
#[test]
fn an_image_that_qemu_writes_to_is_refused_in_the_words_of_qemu_img() {
    let home = scratch();
    let image = deduplicated(home.path(), "image.qcow2", &[]);
    let _writer = Running::qemu_io(args!["-f", "qcow2", image]);
    for options in [&[][..], &["-f", "qcow2"], &["--data"]] {
        let (ours, theirs) = (dedup_img(CHECK(options, &image, &image)), qemu::img(CHECK(&[], &image, &image)));
        assert_eq!((ours.code, ours.stdout.as_str(), theirs.code), (1, "", 1), "{}", ours.told());
        let same = ours.stderr.replace("dedup-img: ", "qemu-img: ") == theirs.stderr;
        qemu::words(&qemu::SEEN, same, || format!("{}; {}", ours.told(), theirs.told()));
        assert!(ours.stderr.contains("Failed to get shared \"write\" lock"), "{}", ours.told());
    }
    for option in ["-U", "--force-share"] {
        let (ours, theirs) = both(&[option], &image);
        assert_eq!(
            (ours.ok().stdout, theirs.ok().stdout.is_empty()),
            (dedup_img(CHECK(&["-U"], &image, &image)).stdout, false)
        );
    }
}

#[test]
fn readers_share_an_image() {
    let image = subject("plain-4k");
    let _reader = Running::qemu_io(args!["-r", "-f", "qcow2", image]);
    dedup_img(CHECK(&[], &image, &image)).ok();
}

/// The backing file is none of a check's business, and neither its name nor its absence changes anything but for qemu-img, which
/// opens it.
#[test]
fn an_overlay_is_checked_without_its_base() {
    let home = scratch();
    let overlay = home.path().join("overlay.qcow2");
    fs::copy(subject("overlay"), &overlay).unwrap();
    let ran = dedup_img(CHECK(&[], &overlay, &overlay)).ok();
    let with_base = qemu::img(CHECK(&[], &subject("overlay"), &overlay)).ok();
    assert_eq!((ran.stdout, ran.stderr.as_str()), (with_base.stdout, ""));
    assert_eq!(qemu::check(&overlay).code, 1, "qemu-img needs the base");
}
