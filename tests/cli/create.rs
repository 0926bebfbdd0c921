//! `create`: qemu-img's options, sizes and words, with qemu-img itself as the judge.

use super::{command_contract, dedup_img_in, wrong_usage};
use crate::args;
use crate::support::reader::{Pin, verify_dedup};
use crate::support::{Ran, dedup_img, names_in, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::path::Path;

command_contract!("create");

/// The lines that `qemu-img create` says of the same arguments, without the program's and the file's name before the first; none where
/// it accepts them.
fn words_of_qemu(home: &Path, words: &[OsString]) -> Option<Vec<String>> {
    let mut command = qemu::tool("qemu-img", args!["create", "-f", "qcow2"].into_iter().chain(words.iter().cloned()));
    command.current_dir(home);
    let ran = qemu::finish("qemu-img", command);
    let mut lines: Vec<String> = ran.stderr.lines().map(Into::into).collect();
    if ran.code != 1 {
        return None;
    }
    let first = lines[0].strip_prefix("qemu-img: ").unwrap_or_else(|| panic!("{}", ran.told()));
    lines[0] = first.strip_prefix("image: ").unwrap_or(first).to_owned();
    Some(lines)
}

/// Asserts that both programs refuse the arguments in the same words, and that nothing is left behind.
#[track_caller]
fn refused_as_by_qemu(words: &[OsString]) {
    let (home, other) = (scratch(), scratch());
    let due = words_of_qemu(other.path(), words);
    let mut ran = dedup_img_in(home.path(), args!["create"].into_iter().chain(words.iter().cloned()));
    // QEMU's own further lines are welcome, and no others.
    for line in due.iter().flatten().skip(1) {
        ran.stderr = ran.stderr.replace(&format!("\n{line}"), "");
    }
    let ran = wrong_usage(ran, "create", &[]);
    let same = due.as_ref().is_some_and(|due| ran.stderr.lines().next().unwrap().contains(&due[0]));
    qemu::words(&qemu::SEEN, same, || format!("QEMU says {due:?}; {}", ran.told()));
    assert_eq!(names_in(home.path()), [""; 0]);
}

#[test]
fn bad_option_values_are_refused_in_the_words_of_qemu_img() {
    for options in [
        "cluster_size=1000",
        "cluster_size=256",
        "cluster_size=0",
        "cluster_size=4M",
        "cluster_size=abc",
        "cluster_size=",
        "cluster_size=-1",
        "cluster_size=4kB",
        "refcount_bits=0",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=x",
        "compat=0.9",
        "compression_type=lzo",
        "lazy_refcounts=maybe",
        "preallocation=some",
        "no_such_option=1",
        "cluster_size=64k,no_such_option=1",
        "cluster_size=64k,cluster_size=5k",
    ] {
        refused_as_by_qemu(&args!["-o", options, "image", "1M"]);
    }
}

#[test]
fn bad_sizes_are_refused_in_the_words_of_qemu_img() {
    for size in
        ["abc", "1X", "1KB", "1 M", " ", "1.5", "0x10k", "0x", "1e3", "16E", "8E", "1..5M", "M", "", "1.5b", "+", "++1"]
    {
        refused_as_by_qemu(&args!["image", size]);
    }
    refused_as_by_qemu(&args!["image", "--", "-1"]);
    refused_as_by_qemu(&args!["image", "--", "-1M"]);
}

#[test]
fn sizes_that_do_not_fit_the_format_are_refused_in_the_words_of_qemu_img() {
    refused_as_by_qemu(&args!["-o", "cluster_size=512", "image", "8T"]);
    refused_as_by_qemu(&args!["-o", "cluster_size=4k", "image", "9T"]);
}

#[test]
fn a_missing_size_and_a_bad_backing_file_are_refused_in_the_words_of_qemu_img() {
    refused_as_by_qemu(&args!["image"]);
    refused_as_by_qemu(&args!["-b", env!("CARGO_BIN_EXE_dedup-img"), "image", "1M"]);
    refused_as_by_qemu(&args!["-b", env!("CARGO_BIN_EXE_dedup-img"), "image"]);
    refused_as_by_qemu(&args!["-F", "raw", "image", "1M"]);
    refused_as_by_qemu(&args!["-b", "absent", "-F", "qcow2", "image"]);
    refused_as_by_qemu(&args!["-b", "absent", "-F", "no_such_format", "image", "1M"]);
    refused_as_by_qemu(&args!["-o", "backing_file=absent,backing_fmt=raw", "image", "1M"]);
}

/// Scripts for qemu-img say these.
#[test]
fn options_of_qemu_img_are_taken_or_refused_by_name() {
    let home = scratch();
    let run = |words: &[&str]| {
        let words = words.iter().map(OsString::from);
        dedup_img_in(home.path(), args!["create", "-q"].into_iter().chain(words).chain(args!["image", "1M"]))
    };
    for (words, word) in [
        (&["-f", "raw"][..], "-f raw: "),
        (&["--format", "vmdk"], "-f vmdk: "),
        (&["-u"], "-u: "),
        (&["--backing-unsafe"], "-u: "),
        (&["--object", "secret,id=a,data=b"], "--object: "),
    ] {
        run(words).refused(&[word]);
        assert_eq!(names_in(home.path()), [""; 0], "{words:?}");
    }
    run(&["-f", "qcow2", "--options", "cluster_size=4k"]).ok();
    assert_eq!(qemu::info("qcow2", &home.path().join("image"))["cluster-size"], 4096);
}

/// A name need not be text.
#[test]
fn the_name_of_a_backing_file_is_stored_byte_for_byte() {
    use std::os::unix::ffi::OsStringExt;
    let home = scratch();
    let name = || OsString::from_vec(b"\xff'\xc3.raw".to_vec());
    std::fs::write(home.path().join(name()), [7; 1 << 16]).unwrap();
    let backing = |letter: &str| [args![letter].to_vec(), vec![name()], args!["-F", "raw"].to_vec()].concat();
    dedup_img_in(home.path(), [args!["create", "-q"].to_vec(), backing("-b"), args!["new"].to_vec()].concat()).ok();
    let words = [args!["convert", "-q", "-f", "raw"].to_vec(), backing("-B"), vec![name()], args!["same"].to_vec()];
    dedup_img_in(home.path(), words.concat()).ok();
    for image in ["new", "same"] {
        qemu::compare_same("raw", &home.path().join(name()), "qcow2", &home.path().join(image));
    }
}

/// What qemu-img can and this program does not: said by name, never ignored.
#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (options, word) in [
        ("extended_l2=on", "extended_l2"),
        ("compat=0.10", "compat"),
        ("compat=v2", "compat"),
        ("preallocation=falloc", "preallocation"),
        ("preallocation=full", "preallocation"),
        ("data_file=x", "data_file"),
        ("data_file_raw=on", "data_file_raw"),
        ("encryption=on", "encryption"),
        ("encrypt.format=luks", "encrypt.format"),
        ("refcount_bits=1", "refcount_bits"),
        ("refcount_bits=2", "refcount_bits"),
    ] {
        let home = scratch();
        wrong_usage(dedup_img_in(home.path(), args!["create", "-o", options, "image", "1M"]), "create", &[word]);
        assert_eq!(names_in(home.path()), [""; 0], "{options}");
    }
}

#[test]
fn sizes_mean_what_they_mean_to_qemu_img() {
    let home = scratch();
    let sizes = [
        "1.5M",
        ".5M",
        "1.M",
        "0x10000",
        "0X10000",
        "0xfffff",
        "1G",
        "1g",
        "+1M",
        "513",
        "512",
        "1",
        "0",
        "100b",
        "1.7M",
        "1.23456k",
        "1T",
        "010",
        "1099511627777",
        "0.1k",
        "00.5M",
        "1024.0",
        "1024.0b",
        "1024.",
        " 1k",
        "0.0",
        ".0b",
    ];
    for size in sizes {
        let [ours, theirs] = ["ours", "theirs"].map(|name| home.path().join(name));
        let ran = qemu::img(args!["create", "-q", "-f", "qcow2", theirs, size]);
        dedup_img(args!["create", "-q", ours, size]).ok();
        qemu::words(&qemu::SEEN, ran.code == 0, || ran.told());
        if ran.code != 0 {
            continue;
        }
        assert_eq!(qemu::virtual_size("qcow2", &ours), qemu::virtual_size("qcow2", &theirs), "{size}");
        qemu::check_clean(&ours);
    }
}

#[test]
fn options_arrive_in_the_image_as_qemu_img_tells_them() {
    let home = scratch();
    let image = home.path().join("image");
    for (options, cluster_size, bits, compression, lazy) in [
        ("", 65536, 32, "zlib", false),
        ("cluster_size=4k", 4096, 32, "zlib", false),
        ("cluster_size=4096,refcount_bits=16", 4096, 16, "zlib", false),
        ("cluster_size=2M,refcount_bits=64,lazy_refcounts=on", 2 << 20, 64, "zlib", true),
        ("cluster_size=512,refcount_bits=4,lazy_refcounts=off", 512, 4, "zlib", false),
        ("compat=1.1,refcount_bits=8,preallocation=off", 65536, 8, "zlib", false),
        ("compat=v3,compression_type=zstd", 65536, 32, "zstd", false),
        ("cluster_size=4k,cluster_size=8k", 8192, 32, "zlib", false),
        ("cluster_size=0x4000", 16384, 32, "zlib", false),
    ] {
        let given = if options.is_empty() { vec![] } else { args!["-o", options].to_vec() };
        dedup_img(args!["create", "-q"].into_iter().chain(given).chain(args![image, "10M"])).ok();
        let info = qemu::info("qcow2", &image);
        let data = &info["format-specific"]["data"];
        let found = (&info["cluster-size"], &data["refcount-bits"], &data["compression-type"], &data["lazy-refcounts"]);
        assert_eq!(found, (&cluster_size.into(), &bits.into(), &compression.into(), &lazy.into()), "{options}");
        assert_eq!(data["compat"], "1.1");
        verify_dedup(&image, Pin::Shared);
        qemu::check_clean(&image);
    }
}

/// Every spelling of a number, a size and a boolean that a script may have found to work: taken by both or by neither.
#[test]
fn option_values_are_taken_where_qemu_img_takes_them() {
    let words =
        ["on", "yes", "true", "y", "off", "no", "false", "n", "ON", "Yes", "True", "t", "1", "0", "", " on", "on "];
    let switches = ["lazy_refcounts", "extended_l2"].iter().flat_map(|key| {
        let values = words.iter().map(move |word| format!("{key}={word}"));
        values.chain([key.to_string(), format!("no{key}"), format!("no{key}=on"), format!("no-{key}")])
    });
    let sizes =
        ["4k", "4096", "4096.0", "4096.0b", "4.0k", ".5M", "0x1000", "0X1000", " 4k", "+4k", "04096", "010000", "4K"];
    let sizes = sizes.into_iter().chain(["4k ", "4 k", "4kB", "1e3", "4096.5", "0x1k", "-4k", "", "x"]);
    let numbers = ["16", "0x10", "020", "+16", " 16", "16 ", "16.0", "-16", "1e1", "16b", "", "x", "09"];
    let lists = [
        "",
        ",",
        ",,",
        "lazy_refcounts,",
        ",lazy_refcounts",
        "lazy_refcounts,,",
        "cluster_size=4k,,",
        "=4k",
        "no",
        "cluster_size=4k,lazy_refcounts=yes",
        "lazy_refcounts=on,lazy_refcounts=n",
        "help=1",
        "?=",
        "help,",
        ",?",
        "cluster_size=4k,?",
        "?,cluster_size=5",
        "cluster_size=4k,help",
        "cluster_size=4k,,?",
        "cluster_size=?",
    ];
    let options = switches
        .chain(sizes.map(|size| format!("cluster_size={size}")))
        .chain(numbers.iter().map(|number| format!("refcount_bits={number}")))
        .chain(lists.map(ToOwned::to_owned));
    let home = scratch();
    let of = |image: &Path| {
        let info = qemu::info("qcow2", image);
        (info["cluster-size"].clone(), info["format-specific"]["data"]["lazy-refcounts"].clone())
    };
    for option in options {
        // Not written by us, and said by name.
        if ["on", "yes", "true", "y"].iter().any(|word| option == format!("extended_l2={word}"))
            || option == "extended_l2"
        {
            continue;
        }
        let [ours, theirs] = ["ours", "theirs"].map(|name| home.path().join(name));
        let _ = (std::fs::remove_file(&ours), std::fs::remove_file(&theirs));
        let judge = qemu::img(args!["create", "-q", "-f", "qcow2", "-o", option, theirs, "1M"]);
        let ran = dedup_img(args!["create", "-q", "-o", option, ours, "1M"]);
        let helps = |ran: &Ran| ran.stdout.contains("refcount_bits");
        let same = (ran.code, ours.exists(), helps(&ran)) == (judge.code, theirs.exists(), helps(&judge));
        qemu::words(&qemu::SEEN, same, || format!("{option}: {}{}", ran.told(), judge.told()));
        if same && ours.exists() {
            assert_eq!(of(&ours), of(&theirs), "{option}");
        }
    }
}

#[test]
fn a_size_is_given_once() {
    refused_as_by_qemu(&args!["-o", "size=10M", "image", "20M"]);
    refused_as_by_qemu(&args!["-o", "size=10M", "image", "10M"]);
    let home = scratch();
    dedup_img_in(home.path(), args!["create", "-q", "-o", "size=10.0M", "image"]).ok();
    assert_eq!(qemu::virtual_size("qcow2", &home.path().join("image")), 10 << 20);
}

#[test]
fn options_can_be_given_in_several_places() {
    let home = scratch();
    let image = home.path().join("image");
    dedup_img(args!["create", "-q", "-o", "cluster_size=4k", "-o", "refcount_bits=16", image, "1M"]).ok();
    let info = qemu::info("qcow2", &image);
    assert_eq!((&info["cluster-size"], &info["format-specific"]["data"]["refcount-bits"]), (&4096.into(), &16.into()));
}

/// An overlay has its base's size unless told otherwise, and reads as its base.
#[test]
fn an_overlay_reads_as_its_base() {
    let home = scratch();
    let base = home.path().join("base.raw");
    std::fs::write(&base, crate::support::corpus::content()).unwrap();
    let size = base.metadata().unwrap().len();
    for (words, due) in [
        (args!["-b", "base.raw", "-F", "raw", "image"].to_vec(), size),
        (args!["-o", "backing_file=base.raw,backing_fmt=raw", "image"].to_vec(), size),
        (args!["-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw", "image", "20M"].to_vec(), 20 << 20),
        (args!["-b", "base.raw", "-F", "raw", "image", "1M"].to_vec(), 1 << 20),
    ] {
        let before = sha256_of(&base);
        dedup_img_in(home.path(), args!["create", "-q"].into_iter().chain(words)).ok();
        let image = home.path().join("image");
        let info = qemu::info("qcow2", &image);
        assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&"base.raw".into(), &"raw".into()));
        assert_eq!(info["virtual-size"], due);
        qemu::check_clean(&image);
        verify_dedup(&image, Pin::Shared);
        assert_eq!(sha256_of(&base), before);
        // Zeros behind a shorter base are no difference to qemu-img; of a longer one only the beginning shows.
        let beginning = home.path().join("beginning.raw");
        std::fs::copy(&base, &beginning).unwrap();
        std::fs::File::options().write(true).open(&beginning).unwrap().set_len(due.min(size)).unwrap();
        qemu::img(args!["compare", "-f", "raw", "-F", "qcow2", beginning, image]).ok();
    }
}

#[test]
fn an_existing_file_is_replaced_and_nothing_else_appears() {
    let home = scratch();
    let image = home.path().join("image");
    std::fs::write(&image, vec![7; 5 << 20]).unwrap();
    dedup_img(args!["create", "-q", image, "1M"]).ok();
    verify_dedup(&image, Pin::Shared);
    assert_eq!(names_in(home.path()), ["image"]);
}

#[test]
fn a_refused_create_leaves_an_existing_file_as_it_was() {
    let home = scratch();
    let image = home.path().join("image");
    std::fs::write(&image, b"precious").unwrap();
    for words in
        [args!["-o", "cluster_size=5"], args!["-o", "refcount_bits=2"], args!["-b", "absent"], args!["-F", "raw"]]
    {
        let ran = dedup_img(args!["create"].into_iter().chain(words).chain(args![image, "1M"]));
        wrong_usage(ran, "create", &[]);
        assert_eq!(std::fs::read(&image).unwrap(), b"precious");
    }
    assert_eq!(names_in(home.path()), ["image"]);
}

#[test]
fn the_same_options_give_the_same_bytes() {
    let home = scratch();
    let sums: Vec<String> = ["one", "two"]
        .map(|name| {
            let image = home.path().join(name);
            dedup_img(args!["create", "-q", "-o", "cluster_size=4k", image, "1G"]).ok();
            sha256_of(&image)
        })
        .into();
    assert_eq!(sums[0], sums[1]);
}

/// Asserts that a list of options names each of them.
#[track_caller]
fn lists_options(ran: Ran, more: &[&str]) {
    let ran = ran.ok();
    let common = ["cluster_size", "refcount_bits", "compat", "compression_type", "lazy_refcounts", "preallocation"];
    for key in common.iter().chain(more) {
        assert!(ran.stdout.contains(key), "no {key}: {}", ran.told());
    }
    assert_eq!(ran.stderr, "", "{}", ran.told());
}

#[test]
fn help_of_the_options_lists_every_key() {
    let home = scratch();
    lists_options(dedup_img_in(home.path(), args!["create", "-o", "help"]), &["backing_file", "backing_fmt"]);
    lists_options(
        dedup_img_in(home.path(), args!["create", "-o", "help", "image", "1M"]),
        &["backing_file", "backing_fmt"],
    );
    lists_options(dedup_img_in(home.path(), args!["convert", "-o", "help", "a", "b"]), &[]);
    assert_eq!(names_in(home.path()), [""; 0]);
}

#[test]
fn quiet_prints_nothing_and_otherwise_errors_alone_go_to_stderr() {
    let home = scratch();
    let image = home.path().join("image");
    let ran = dedup_img(args!["create", "-q", image, "1M"]).ok();
    assert_eq!(ran.text(), "");
    let ran = dedup_img(args!["create", image, "1M"]).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    let ran = dedup_img(args!["create", "-q", home.path().join("no/such/directory"), "1M"]);
    ran.refused(&["Could not create", "No such file or directory"]);
}
