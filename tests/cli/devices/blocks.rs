//! Devices with logical blocks of any size, read-only ones, and full ones: what cannot be is said before the first write.

use super::{WAYS, convert};
use crate::args;
use crate::support::corpus::{M, content, plain, write_sparse};
use crate::support::loops::Loop;
use crate::support::{Random, dedup_img, qemu, scratch};
use std::fs;
use std::path::{Path, PathBuf};

const BLOCKS: [u32; 4] = [512, 4096, 16384, 65536];

/// A device of `length` bytes of 0xff over `file`, with blocks of `block` bytes where there can be such.
fn used(file: &Path, length: u64, block: u32) -> Option<Loop> {
    fs::write(file, vec![0xff; usize::try_from(length).unwrap()]).unwrap();
    match Loop::with_blocks(file, block) {
        Ok(device) => Some(device),
        Err(why) => {
            assert!(block > 4096, "{why}");
            eprintln!("NOTICE: no loop devices with blocks of {block} bytes here, which is LEFT OUT: {why}");
            None
        }
    }
}

#[test]
fn a_device_with_blocks_of_any_size_gets_the_image_that_a_file_gets() {
    let home = scratch();
    let [file, image] = ["device", "image.qcow2"].map(|name| home.path().join(name));
    for block in BLOCKS {
        let ways =
            WAYS.into_iter().chain([&["-o", "cluster_size=512"][..], &["-O", "raw"], &["-O", "raw", "-S", "512"]]);
        for way in ways {
            let words = [&["-f", "raw"], way].concat();
            convert(&words, &plain(), &image).ok();
            let Some(device) = used(&file, 32 * M, block) else { continue };
            convert(&words, &plain(), &device).ok();
            let (due, found) = (fs::read(&image).unwrap(), fs::read(&*device).unwrap());
            assert!(found[..due.len()] == due, "{block} {way:?}");
            assert!(found[due.len()..].iter().all(|byte| *byte == 0xff), "{block} {way:?}: something behind it");
        }
    }
}

#[test]
fn an_image_on_a_device_with_blocks_of_any_size_is_worked_on_in_place() {
    let home = scratch();
    let [file, source, copy] = ["device", "source.raw", "copy"].map(|name| home.path().join(name));
    let mut bytes = content();
    bytes.rotate_left(64 << 10);
    for block in BLOCKS {
        let Some(device) = used(&file, 32 * M, block) else { continue };
        convert(&["-f", "raw", "--plain", "-o", "cluster_size=4k"], &plain(), &device).ok();
        dedup_img(args!["dedup", "-q", &*device]).ok();
        write_sparse(&source, &bytes);
        convert(&["-n", "-f", "raw"], &source, &device).ok();
        dedup_img(args!["gc", "-q", "--compact", &*device]).ok();
        dedup_img(args!["check", "--data", &*device]).ok();
        // QEMU has its own limits for blocks: it looks at a copy.
        fs::write(&copy, fs::read(&*device).unwrap()).unwrap();
        qemu::check_clean(&copy);
        qemu::compare_same("raw", &source, "qcow2", &copy);
    }
}

/// An image with room for more on a device, and what it holds.
fn image_on(file: &Path) -> Vec<u8> {
    qemu::convert("raw", &plain(), "qcow2", file, &["-o", "cluster_size=4k"]);
    let length = fs::metadata(file).unwrap().len();
    fs::File::options().write(true).open(file).unwrap().set_len(length + M).unwrap();
    fs::read(file).unwrap()
}

/// The commands that change an image in place.
fn in_place(source: &Path, device: &Path) -> [Vec<std::ffi::OsString>; 5] {
    [
        args!["dedup", device].to_vec(),
        args!["gc", "--compact", device].to_vec(),
        args!["check", "-r", "all", device].to_vec(),
        args!["check", "-r", "leaks", device].to_vec(),
        args!["convert", "-n", "-f", "raw", source, device].to_vec(),
    ]
}

#[test]
fn a_read_only_device_is_noticed_before_anything_is_done() {
    let home = scratch();
    let file = home.path().join("device");
    let before = image_on(&file);
    let device = Loop::read_only(&file);
    let due = format!("Could not open '{}': the device is read-only", device.display());
    for words in in_place(&plain(), &device) {
        dedup_img(words).refused(&[&due]);
    }
    for words in [&["-f", "raw"][..], &["-f", "raw", "-O", "raw"], &["-f", "raw", "-O", "raw", "-n"]] {
        convert(words, &plain(), &device).refused(&[&due]);
    }
    // Looking is allowed.
    dedup_img(args!["dedup", "-q", "--dry-run", &*device]).ok();
    dedup_img(args!["check", &*device]).ok();
    assert!(fs::read(&file).unwrap() == before);
}

/// A partition of a disk that cannot be written is none either.
#[test]
fn a_partition_of_a_read_only_device_is_read_only() {
    let home = scratch();
    let file = home.path().join("device");
    fs::File::create(&file).unwrap().set_len(16 * M).unwrap();
    let disk = Loop::read_only(&file);
    let part = disk.partition(1, M, 8 * M);
    convert(&["-f", "raw"], &plain(), &part).refused(&["the device is read-only"]);
}

#[test]
fn what_has_no_room_on_a_device_is_refused_before_anything_is_written() {
    let home = scratch();
    let [file, source] = ["device", "source.raw"].map(|name| home.path().join(name));
    fs::write(&source, Random::new(5).bytes(content().len())).unwrap();
    image_on(&file);
    let said = qemu::check(&file).stdout;
    let end = said.lines().find_map(|line| line.strip_prefix("Image end offset: ")).unwrap();
    let size: u64 = end.trim().parse().unwrap();
    // No cluster is free but what the end of the device has.
    for more in [0, 16384] {
        fs::File::options().write(true).open(&file).unwrap().set_len(size + more).unwrap();
        let before = fs::read(&file).unwrap();
        let device = Loop::over(&file);
        convert(&["-n", "-f", "raw"], &source, &device).refused(&[
            &*device.to_string_lossy(),
            "no room on the device",
            &format!("it has {} bytes, and ", size + more),
            "are needed",
            "nothing was written",
        ]);
        assert!(fs::read(&*device).unwrap() == before);
    }
    let device = Loop::over(&file);
    dedup_img(args!["dedup", "-q", "--pin", "all", &*device])
        .refused(&["no room on the device", "nothing was written"]);
    dedup_img(args!["check", &*device]).ok();
    drop(device);
    let target: PathBuf = home.path().join("small");
    let device = Loop::used(&target, M);
    convert(&["-f", "raw"], &source, &device).refused(&["no room on the device", "nothing was written"]);
}
