//! Systems that refuse calls: leases, file systems without locks, holes or flushes, and too little memory. A run whose data is safe
//! succeeds, and what stays undone is said.

use super::running::Running;
use crate::args;
use crate::support::corpus::{M, plain};
use crate::support::refuse::refusing;
use crate::support::{Random, dedup_img, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

const EPERM: i32 = 1;
const EINVAL: i32 = 22;
const ENOTTY: i32 = 25;
const ENOSPC: i32 = 28;
const ENOLCK: i32 = 37;
const ENOSYS: i32 = 38;
const EOPNOTSUPP: i32 = 95;

/// Holds a lease on a file, and gives it back half a second after somebody has asked for it. Perl is part of every Debian.
const LEASE: &str = r#"
$SIG{IO} = sub { $asked = 1 };
open(F, "<", $ARGV[0]) or die; fcntl(F, 1024, 0 + $ARGV[1]) or die "lease: $!";
$| = 1; print "held\n";
select(undef, undef, undef, 0.05) until $asked;
select(undef, undef, undef, 0.5);
fcntl(F, 1024, 2) or die;
"#;

#[test]
fn a_lease_is_waited_for() {
    use std::io::{BufRead, BufReader};
    let home = scratch();
    let [image, target] = ["image.qcow2", "target.qcow2"].map(|name| home.path().join(name));
    qemu::create("qcow2", &image, M, "");
    let (read, write) = ("0", "1");
    for (lease, words) in [
        (read, args!["dedup", "-q", image].to_vec()),
        (write, args!["check", "-q", image].to_vec()),
        (write, args!["convert", "-q", image, target].to_vec()),
        (read, args!["convert", "-q", "-f", "raw", plain(), image].to_vec()),
        (write, args!["create", "-q", image, "1M"].to_vec()),
    ] {
        let mut holder = Command::new("perl")
            .args(["-e", LEASE])
            .arg(&image)
            .arg(lease)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        let ran = dedup_img(words.clone());
        let _ = holder.kill();
        holder.wait().unwrap();
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{words:?}");
    }
    // What is no file is not waited for.
    let pipe = home.path().join("pipe");
    qemu::run("mkfifo", args![pipe]).ok();
    dedup_img(args!["check", pipe]).refused(&["a pipe is not a regular file"]);
}

/// Every command that opens an image, or makes one.
fn commands(image: &Path, new: &Path) -> [Vec<OsString>; 8] {
    [
        args!["create", "-q", new, "1M"].to_vec(),
        args!["convert", "-q", "-f", "raw", plain(), new].to_vec(),
        args!["convert", "-q", "-n", "-f", "raw", plain(), image].to_vec(),
        args!["dedup", "-q", image].to_vec(),
        args!["gc", "-q", image].to_vec(),
        args!["check", "-q", image].to_vec(),
        args!["stats", "-q", image].to_vec(),
        args!["stats", "-q", "--quick", image].to_vec(),
    ]
}

#[test]
fn a_file_system_without_locks_is_refused_with_the_way_on() {
    let home = scratch();
    let [image, new] = ["image.qcow2", "new.qcow2"].map(|name| home.path().join(name));
    qemu::convert("raw", &plain(), "qcow2", &image, &[]);
    let before = sha256_of(&image);
    for words in commands(&image, &new) {
        for (refused, what) in [("setlk=37", "Failed to lock byte 100"), ("getlk=37", "Failed to check lock byte")] {
            let ran = refusing(refused, words.clone());
            assert_eq!(ran.code, 1, "{}", ran.told());
            let lines: Vec<&str> = ran.stderr.lines().collect();
            assert!(lines[0].contains(what) && lines[0].ends_with(": No locks available"), "{}", ran.told());
            assert!(lines.len() == 2 && lines[1].contains("--locking=off"), "{}", ran.told());
        }
        assert!(!new.exists() && sha256_of(&image) == before, "{words:?}");
        assert_eq!(ENOLCK, 37);
    }
    for words in commands(&image, &new) {
        let words = words.into_iter().chain(args!["--locking=off"]);
        refusing("setlk=37 getlk=37", words).ok();
    }
    qemu::compare_same("raw", &plain(), "qcow2", &image);
    // Without such locks in the kernel QEMU does not lock either, unless it is told to.
    refusing("setlk=22", args!["check", "-q", image]).ok();
    let ran = refusing("setlk=22", args!["check", "-q", "--locking=on", image]);
    assert!(ran.code == 1 && ran.stderr.contains("Failed to lock byte 100: Invalid argument"), "{}", ran.told());
    dedup_img(args!["check", "-q", "--locking", "on", image]).ok();
}

#[test]
fn without_locks_an_image_in_use_is_opened_and_others_may_open_it() {
    let home = scratch();
    let image = home.path().join("image.qcow2");
    qemu::create("qcow2", &image, M, "");
    let held = Running::qemu_io(args!["-f", "qcow2", image]);
    for words in commands(&image, &image) {
        let reads = words.iter().all(|word| word != "create" && word != "convert");
        if reads {
            dedup_img(words.clone().into_iter().chain(args!["--locking=off"])).ok();
            let ran = dedup_img(words.into_iter().chain(args!["--locking=auto"]));
            assert!(ran.code == 1 && ran.stderr.contains("Failed to get"), "{}", ran.told());
        }
    }
    drop(held);
}

/// A file system or a filter that refuses what is only advice, or only saves space, changes no byte of any result.
#[test]
fn what_only_helps_may_be_refused() {
    let home = scratch();
    let [image, copy, out] = ["image.qcow2", "copy.qcow2", "out"].map(|name| home.path().join(name));
    let half = Random::new(8).bytes(2 << 20);
    let [raw, other] = ["raw", "other"].map(|name| home.path().join(name));
    fs::write(&raw, [&half[..], &vec![0; 1 << 20], &half].concat()).unwrap();
    fs::write(&other, [&vec![0; 1 << 20], &half[..], &vec![7; 1 << 20]].concat()).unwrap();
    qemu::convert("raw", &raw, "qcow2", &image, &["-o", "cluster_size=4k"]);
    let run = |refused: &str, words: &[OsString]| {
        fs::copy(&image, &copy).unwrap();
        let _ = fs::remove_file(&out);
        let ran = refusing(refused, words.iter().cloned());
        assert_eq!(ran.code, 0, "{}", ran.told());
        ran.stderr
    };
    // What is free in an image may hold anything: in place it is the disk that counts.
    let result = || match out.exists() {
        true => sha256_of(&out),
        false => {
            qemu::check_clean(&copy);
            qemu::convert("qcow2", &copy, "raw", &out, &[]);
            sha256_of(&out)
        }
    };
    let ways = [
        args!["convert", "-q", "-f", "raw", raw, out].to_vec(),
        args!["convert", "-q", "-f", "raw", "-O", "raw", "-T", "none", "-t", "none", raw, out].to_vec(),
        args!["convert", "-q", "-c", image, out].to_vec(),
        args!["dedup", "--output", "json", copy].to_vec(),
        args!["convert", "-q", "-n", "-f", "raw", other, copy].to_vec(),
    ];
    for words in ways {
        run("", &words);
        let due = result();
        for errno in [EPERM, EINVAL, ENOTTY, ENOSYS, EOPNOTSUPP] {
            let refused = format!("fallocate={errno} lseek={errno} fadvise={errno}");
            let said = run(&refused, &words);
            assert_eq!(result(), due, "{refused} {words:?}");
            // Who deduplicates wants the space.
            assert_eq!(said.contains("does not take freed space back"), words[0] == "dedup", "{said}");
            assert!(said.lines().count() <= 1, "{said}");
        }
    }
    // A hole may need room itself.
    let said = run(&format!("fallocate={ENOSPC}"), &args!["dedup", copy]);
    assert!(said.contains("does not take freed space back (No space left on device)"), "{said}");
}

/// The order of writes is what protects an image in place: where nothing can be flushed nothing is begun.
#[test]
fn an_image_is_not_changed_in_place_where_nothing_can_be_flushed() {
    let home = scratch();
    let image = home.path().join("image.qcow2");
    qemu::convert("raw", &plain(), "qcow2", &image, &["-o", "cluster_size=4k"]);
    let before = sha256_of(&image);
    for errno in [EINVAL, ENOSYS, EOPNOTSUPP] {
        for words in [
            args!["dedup", image].to_vec(),
            args!["gc", image].to_vec(),
            args!["check", "-r", "all", image].to_vec(),
            args!["convert", "-n", "-f", "raw", plain(), image].to_vec(),
        ] {
            refusing(&format!("fsync={errno}"), words).refused(&["cannot flush", "copy it to another file system"]);
        }
    }
    assert_eq!(sha256_of(&image), before);
    refusing("fsync=22", args!["check", "-q", image]).ok();
}

/// However little memory there is, the end is a message and exit code 1.
#[test]
fn too_little_memory_is_an_error_and_no_crash() {
    let home = scratch();
    let [raw, image, out] = ["raw", "image.qcow2", "out"].map(|name| home.path().join(name));
    let half = Random::new(8).bytes(8 << 20);
    fs::write(&raw, [&half[..], &half].concat()).unwrap();
    qemu::convert("raw", &raw, "qcow2", &image, &["-o", "cluster_size=512"]);
    // 8 Mi clusters: the tables of a check alone take more than the limits.
    let large = home.path().join("large.qcow2");
    qemu::create("qcow2", &large, M, "cluster_size=4k");
    fs::File::options().write(true).open(&large).unwrap().set_len(1 << 40).unwrap();
    let before = sha256_of(&image);
    for words in [
        args!["convert", "-q", "-f", "raw", "-o", "cluster_size=512", raw, out].to_vec(),
        args!["convert", "-q", "-f", "raw", "-c", raw, out].to_vec(),
        args!["dedup", "-q", "--dry-run", image].to_vec(),
        args!["stats", "-q", image].to_vec(),
        args!["check", "-q", large].to_vec(),
        args!["gc", "-q", "--dry-run", large].to_vec(),
    ] {
        let mut failed = 0;
        for limit in (10 << 10..80 << 10).step_by(6 << 10) {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("ulimit -v {limit}; exec \"$0\" \"$@\"")]);
            command
                .arg(env!("CARGO_BIN_EXE_dedup-img"))
                .args(&words)
                .args(["--threads", "2"])
                .env_remove("RUST_BACKTRACE");
            let ran = command.output().unwrap();
            let said = String::from_utf8(ran.stderr).unwrap();
            match ran.status.code() {
                Some(0) => assert_eq!(said, ""),
                // Below the smallest limits not even the libraries are loaded.
                Some(127) => assert!(said.contains("cannot"), "{said}"),
                Some(1) => {
                    failed += 1;
                    assert!(said.contains("memory") || said.contains("Could not start the worker threads"), "{said}");
                }
                code => panic!("{limit} {words:?}: {code:?} {said}"),
            }
        }
        assert!(failed > 0, "{words:?}: the limits are too wide");
    }
    assert_eq!(sha256_of(&image), before);
}

/// A file system that says of data that it is a hole, as ZFS did in 2023. Who knows that does not believe it.
#[test]
fn a_hole_that_is_none_is_read_where_it_is_not_believed() {
    const ENXIO: i32 = 6;
    let home = scratch();
    let [raw, base, target] = ["source.raw", "base.raw", "target.qcow2"].map(|name| home.path().join(name));
    let half = Random::new(5).bytes(1 << 20);
    fs::write(&raw, [&half[..], &half].concat()).unwrap();
    fs::write(&base, [vec![7; 1 << 20], half].concat()).unwrap();
    let lying = format!("lseek={ENXIO}");
    let believed = refusing(&lying, args!["convert", "-q", "-f", "raw", raw, target]);
    assert_eq!(believed.code, 0);
    assert_ne!(qemu::img(args!["compare", "-f", "raw", "-F", "qcow2", raw, target]).code, 0, "nobody lies here");
    for more in [&[][..], &["-c"], &["--plain"], &["-B", "base.raw", "-F", "raw"]] {
        let words = args!["convert", "-q", "--ignore-holes", "-f", "raw", "-o", "cluster_size=4k"].to_vec();
        let words = words.into_iter().chain(more.iter().map(Into::into)).chain(args![raw, target]);
        refusing(&lying, words).ok();
        qemu::compare_same("raw", &raw, "qcow2", &target);
    }
    let back = home.path().join("back.raw");
    refusing(&lying, args!["convert", "-q", "--ignore-holes", "-f", "raw", "-O", "raw", raw, back]).ok();
    assert_eq!(sha256_of(&back), sha256_of(&raw));
    qemu::img(args!["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, target]).ok();
    refusing(&lying, args!["dedup", "-q", "--ignore-holes", target]).ok();
    qemu::check_clean(&target);
    qemu::compare_same("raw", &raw, "qcow2", &target);
}
