//! Block devices as source and as target, by loop devices: written where they are, and refused before anything is lost.

mod blocks;
mod stacked;

use super::running::Running;
use crate::args;
use crate::support::corpus::{K, M, content, plain, write_sparse};
use crate::support::loops::Loop;
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::fs;
use std::path::Path;

/// The ways to an image.
const WAYS: [&[&str]; 4] = [&[], &["-c"], &["--plain"], &["--plain", "-c"]];

/// Converts with further words before the names.
fn convert(words: &[&str], source: &Path, target: &Path) -> Ran {
    let words = args!["convert", "-q"].into_iter().chain(words.iter().map(OsString::from));
    dedup_img(words.chain(args![source, target]))
}

#[test]
fn a_device_as_target_gets_the_disk_and_keeps_what_lies_behind_it() {
    let home = scratch();
    let [source, file] = ["source.raw", "device"].map(|name| home.path().join(name));
    let mut bytes = content();
    bytes.truncate(bytes.len() - 700);
    write_sparse(&source, &bytes);
    // As qemu-img does it, a last sector is filled up.
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let end = bytes.len();
    bytes.resize(10 * M as usize, 0xff);
    for words in [&[][..], &["-S", "0"], &["-S", "512"], &["-S", "64k"], &["-t", "none"], &["-t", "unsafe", "-m", "1"]]
    {
        let device = Loop::used(&file, 10 * M);
        convert(&[&["-f", "raw", "-O", "raw"], words].concat(), &source, &device).ok();
        assert!(fs::read(&*device).unwrap() == bytes, "{words:?}");
        qemu::img(args!["convert", "-f", "raw", "-O", "raw", source, &*device]).ok();
        assert!(fs::read(&*device).unwrap() == bytes, "qemu-img leaves the same");
    }
    // From an image, and where all is zeros.
    let [image, empty] = ["image.qcow2", "empty.raw"].map(|name| home.path().join(name));
    convert(&["-f", "raw"], &source, &image).ok();
    let device = Loop::used(&file, 10 * M);
    convert(&["-O", "raw"], &image, &device).ok();
    assert!(fs::read(&*device).unwrap() == bytes);
    fs::File::create(&empty).unwrap().set_len(end as u64).unwrap();
    convert(&["-f", "raw", "-O", "raw"], &empty, &device).ok();
    bytes[..end].fill(0);
    assert!(fs::read(&*device).unwrap() == bytes);
    fs::File::create(&empty).unwrap();
    convert(&["-f", "raw", "-O", "raw"], &empty, &device).ok();
    assert!(fs::read(&*device).unwrap() == bytes, "a disk of no length changes nothing");
}

#[test]
fn a_device_as_target_gets_the_image_that_a_file_gets() {
    let home = scratch();
    let [file, image, back] = ["device", "image.qcow2", "back.raw"].map(|name| home.path().join(name));
    for (way, size) in WAYS.into_iter().zip(["512", "4k", "2M", "64k"]).chain([(WAYS[0], "2M"), (WAYS[0], "auto")]) {
        let options = format!("cluster_size={size}");
        let words = [&["-f", "raw", "-o", &options], way].concat();
        let device = Loop::used(&file, 30 * M);
        convert(&words, &plain(), &device).ok();
        qemu::check_clean(&device);
        qemu::compare_same("raw", &plain(), "qcow2", &device);
        dedup_img(args!["check", "--data", &*device]).ok();
        convert(&words, &plain(), &image).ok();
        let (due, found) = (fs::read(&image).unwrap(), fs::read(&*device).unwrap());
        assert!(found[..due.len()] == due, "{way:?} {size}");
        assert!(found[due.len()..].iter().all(|byte| *byte == 0xff), "{way:?} {size}: something behind the image");
        // And it is read as any image.
        convert(&["-O", "raw"], &device, &back).ok();
        qemu::compare_same("raw", &plain(), "raw", &back);
    }
}

#[test]
fn a_device_as_source_is_read_as_a_file() {
    let home = scratch();
    let [file, from_file, from_device] = ["source.raw", "a", "b"].map(|name| home.path().join(name));
    write_sparse(&file, &content());
    let device = Loop::over(&file);
    for words in [&["-f", "raw"][..], &[], &["-f", "raw", "--plain"], &["-O", "raw"]] {
        convert(words, &file, &from_file).ok();
        convert(words, &device, &from_device).ok();
        assert_eq!(sha256_of(&from_file), sha256_of(&from_device), "{words:?}");
    }
    assert!(fs::read(&file).unwrap() == content());
}

#[test]
fn a_device_that_is_too_small_is_refused_and_keeps_what_it_holds() {
    let home = scratch();
    let [file, image] = ["device", "image.qcow2"].map(|name| home.path().join(name));
    for way in [&["-O", "raw"][..]].into_iter().chain(WAYS) {
        let words = [&["-f", "raw"], way].concat();
        convert(&words, &plain(), &image).ok();
        let due = fs::metadata(&image).unwrap().len();
        // One sector makes the difference, also where the length is known only when all is compressed.
        let device = Loop::used(&file, due - 512);
        convert(&words, &plain(), &device).refused(&[
            &*device.to_string_lossy(),
            "too small",
            &format!("{} bytes", due - 512),
            &format!("{due} are needed"),
        ]);
        assert!(fs::read(&*device).unwrap().iter().all(|byte| *byte == 0xff), "{way:?}");
        drop(device);
        let device = Loop::used(&file, due);
        convert(&words, &plain(), &device).ok();
        assert!(fs::read(&*device).unwrap() == fs::read(&image).unwrap(), "{way:?}");
    }
}

#[test]
fn a_device_in_use_is_refused_and_keeps_what_it_holds() {
    let home = scratch();
    let [file, mounted] = ["device", "mounted"].map(|name| home.path().join(name));
    let device = Loop::used(&file, 16 * M);
    qemu::run("mkfs.ext4", args!["-q", &*device]).ok();
    fs::create_dir(&mounted).unwrap();
    // The mount ends with its namespace, whatever happens.
    let script =
        "mount \"$0\" \"$1\" && ! \"$2\" convert -f raw -O raw \"$3\" \"$0\" && ! \"$2\" convert \"$3\" \"$0\"";
    let words = args!["-m", "sh", "-c", script, &*device, mounted, env!("CARGO_BIN_EXE_dedup-img"), plain()];
    let ran = qemu::run("unshare", words).ok();
    let lines: Vec<&str> = ran.stderr.lines().collect();
    let due = format!("dedup-img: Could not open '{}': the device is mounted or in use otherwise", device.display());
    assert_eq!(lines, [&due, &due]);
    let held = Running::qemu_io(args!["-f", "raw", &*device]);
    let ran = convert(&["-f", "raw"], &plain(), &device);
    assert!(ran.code == 1 && ran.stderr.contains("Is another process using the image"), "{}", ran.told());
    drop(held);
    qemu::run("e2fsck", args!["-fn", &*device]).ok();
}

#[test]
fn a_device_that_cannot_be_written_is_refused() {
    let home = scratch();
    let file = home.path().join("device");
    fs::File::create(&file).unwrap().set_len(16 * M).unwrap();
    let device = Loop::read_only(&file);
    for words in [&["-f", "raw"][..], &["-f", "raw", "-O", "raw"]] {
        convert(words, &plain(), &device).refused(&[&*device.to_string_lossy(), "read-only"]);
    }
}

#[test]
fn a_device_that_holds_the_source_is_refused() {
    let home = scratch();
    let [file, node] = ["source.raw", "node"].map(|name| home.path().join(name));
    write_sparse(&file, &content());
    let device = Loop::over(&file);
    let number = fs::metadata(&*device).map(|metadata| std::os::unix::fs::MetadataExt::rdev(&metadata)).unwrap();
    let (major, minor) = (nix::sys::stat::major(number).to_string(), nix::sys::stat::minor(number).to_string());
    qemu::run("mknod", args![node, "b", major, minor]).ok();
    for (source, target) in [(&*device, &*device), (&file, &*device), (&*device, &node), (&node, &*device)] {
        for words in [&["-f", "raw"][..], &["-f", "raw", "-O", "raw"], &["-U", "-f", "raw"]] {
            convert(words, source, target).refused(&["is a source of this conversion"]);
        }
    }
    assert!(fs::read(&file).unwrap() == content());
    assert_eq!(names_in(home.path()), ["node", "source.raw"]);
}

/// What a run that did not end has left is nothing that anybody takes for a disk or an image.
#[test]
fn an_interrupted_run_leaves_no_image_on_the_device() {
    let home = scratch();
    let file = home.path().join("device");
    let old = home.path().join("old.qcow2");
    convert(&["-f", "raw"], &plain(), &old).ok();
    for way in [&["-O", "raw"][..]].into_iter().chain(WAYS) {
        for signal in ["KILL", "INT"] {
            fs::write(&file, fs::read(&old).unwrap()).unwrap();
            fs::File::options().write(true).open(&file).unwrap().set_len(30 * M).unwrap();
            let device = Loop::over(&file);
            let words = args!["convert", "-q", "-f", "raw", "-r", "1M", "-o", "cluster_size=4k"];
            let words = words.into_iter().take(if way == ["-O", "raw"] { 6 } else { 8 });
            let words = words.chain(way.iter().map(OsString::from)).chain(args![plain(), &*device]);
            let mut convert = Running::heeding(words);
            convert.until(|it| it.written() >= 256 * K);
            convert.signal(signal);
            assert_eq!(convert.finish().code, -1, "{way:?} {signal}");
            let left = fs::read(&*device).unwrap();
            assert!(left[..512].iter().all(|byte| *byte == 0), "{way:?} {signal}: {:?}", &left[..16]);
            let ran = qemu::check(&device);
            assert!(ran.code == 1 && ran.stderr.contains("not in qcow2 format"), "{}", ran.told());
        }
    }
}

#[test]
fn an_image_on_a_device_is_written_into() {
    let home = scratch();
    let [file, source, raw] = ["device", "source.raw", "raw"].map(|name| home.path().join(name));
    let mut bytes = content();
    write_sparse(&source, &bytes);
    let device = Loop::used(&file, 30 * M);
    convert(&["-f", "raw", "-o", "cluster_size=4k"], &source, &device).ok();
    qemu::snapshot("-c", "before", &device).ok();

    bytes.rotate_left(64 << 10);
    bytes[..4096].fill(0x77);
    write_sparse(&source, &bytes);
    convert(&["-n", "-f", "raw"], &source, &device).ok();
    qemu::check_clean(&device);
    qemu::compare_same("raw", &source, "qcow2", &device);
    convert(&["-l", "before", "-O", "raw"], &device, &raw).ok();
    assert!(fs::read(&raw).unwrap() == content(), "the snapshot has changed");
    let before = fs::read(&*device).unwrap();
    convert(&["-n", "-f", "raw"], &source, &device).ok();
    assert!(fs::read(&*device).unwrap() == before, "nothing was to be written");

    // What has no room is refused by the device itself, and the image is settled.
    let noise: Vec<u8> = Random::new(5).bytes(bytes.len());
    let small = home.path().join("small");
    let said = qemu::check(&device).stdout;
    let end = said.lines().find_map(|line| line.strip_prefix("Image end offset: ")).unwrap();
    fs::write(&small, &before[..end.trim().parse::<usize>().unwrap()]).unwrap();
    let small = Loop::over(&small);
    write_sparse(&source, &noise);
    let ran = convert(&["-n", "-f", "raw"], &source, &small);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    qemu::check_clean(&small);

    // A raw one is there in any case.
    convert(&["-n", "-f", "raw", "-O", "raw"], &source, &device).ok();
    assert!(fs::read(&*device).unwrap()[..noise.len()] == noise);
}

/// How much of a device an image occupies nobody can tell, so that gc has no figure for it.
#[test]
fn gc_of_an_image_on_a_device_does_not_say_what_it_occupies() {
    let home = scratch();
    let device = Loop::used(&home.path().join("device"), 16 * M);
    qemu::create("qcow2", &device, M, "");
    let dry_run = dedup_img(args!["gc", "--dry-run", &*device]).ok().stdout;
    assert!(dry_run.contains("Nothing was written.") && !dry_run.contains("on disk"), "{dry_run}");
    let done = dedup_img(args!["gc", &*device]).ok().stdout;
    assert!(done.contains("file length") && !done.contains("on disk"), "{done}");
}
