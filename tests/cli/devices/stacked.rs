//! The same bytes under two names: a partition and its disk, loop devices over one file, and these on top of each other. And a device
//! that carries a mounted file system.

use super::convert;
use crate::args;
use crate::support::corpus::{M, content, plain, write_sparse};
use crate::support::loops::Loop;
use crate::support::{qemu, scratch};
use std::fs;
use std::path::Path;

/// Asserts that none of the ways to convert from `source` to `target`, or back, writes a byte of `file`.
#[track_caller]
fn same_bytes(source: &Path, target: &Path, file: &Path) {
    let before = fs::read(file).unwrap();
    for (source, target) in [(source, target), (target, source)] {
        for words in [
            &["-f", "raw"][..],
            &["-f", "raw", "-O", "raw"],
            &["-f", "raw", "-O", "raw", "-n"],
            &["-f", "raw", "-n"],
            &["-U", "-f", "raw", "-c"],
        ] {
            // A file has no place that may be written into as raw.
            if words.contains(&"-n") && words.contains(&"-O") && target == file {
                continue;
            }
            convert(words, source, target).refused(&["is a source of this conversion"]);
        }
    }
    assert!(fs::read(file).unwrap() == before);
}

#[test]
fn a_partition_and_its_disk_are_the_same_bytes() {
    let home = scratch();
    let file = home.path().join("disk");
    let disk = Loop::used(&file, 64 * M);
    let [one, two] = [(1, M), (2, 32 * M)].map(|(number, start)| disk.partition(number, start, 31 * M));
    same_bytes(&one, &disk, &file);
    same_bytes(&two, &file, &file);
    // A device on top of it.
    let on_top = Loop::over(&two);
    same_bytes(&on_top, &two, &file);
    same_bytes(&on_top, &disk, &file);
    same_bytes(&on_top, &file, &file);
    drop(on_top);
    // The neighbour is another disk.
    convert(&["-f", "raw", "-O", "raw"], &plain(), &one).ok();
    convert(&["-f", "raw"], &one, &two).ok();
    qemu::compare_same("raw", &one, "qcow2", &two);
}

/// Also where the device is behind an image: as its backing file, or as the image itself.
#[test]
fn a_backing_file_on_a_partition_is_found_through_its_disk() {
    let home = scratch();
    let [file, overlay] = ["disk", "overlay.qcow2"].map(|name| home.path().join(name));
    let disk = Loop::used(&file, 32 * M);
    let part = disk.partition(1, M, 30 * M);
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", &*part, "-F", "raw", overlay]).ok();
    convert(&[], &overlay, &disk).refused(&["is a source of this conversion", &*part.to_string_lossy()]);
    convert(&["-f", "raw", "-B", &part.to_string_lossy(), "-F", "raw"], &plain(), &disk)
        .refused(&["Trying to create an image with the same filename as the backing file"]);
}

#[test]
fn loop_devices_over_one_file_are_the_same_bytes_where_they_overlap() {
    let home = scratch();
    let file = home.path().join("disk");
    write_sparse(&file, &content());
    let length = fs::metadata(&file).unwrap().len();
    fs::File::options().write(true).open(&file).unwrap().set_len(32 * M + length.next_multiple_of(M)).unwrap();
    let [whole, again] = [(); 2].map(|()| Loop::over(&file));
    let [first, second] = [(0, Some(16 * M)), (16 * M, None)].map(|(start, len)| Loop::of_range(&file, start, len));
    same_bytes(&whole, &again, &file);
    same_bytes(&second, &whole, &file);
    same_bytes(&first, &file, &file);
    convert(&["-f", "raw", "-O", "raw"], &plain(), &first).ok();
    convert(&["-f", "raw"], &first, &second).ok();
    qemu::compare_same("raw", &first, "qcow2", &second);
}

#[test]
fn a_source_that_is_mounted_writable_is_warned_of() {
    let home = scratch();
    let [file, mounted, target] = ["disk", "mounted here", "target"].map(|name| home.path().join(name));
    let disk = Loop::used(&file, 32 * M);
    let part = disk.partition(1, M, 30 * M);
    qemu::run("mkfs.ext4", args!["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &*part]).ok();
    fs::create_dir(&mounted).unwrap();
    // The mount ends with its namespace, whatever happens. What mounting itself writes is not written while the device is read.
    let run = |options: &str, source: &Path, words: &str| {
        let script = format!(
            "mount -o {options} \"$0\" \"$1\" && sync -f \"$1\" && exec \"$2\" convert -t unsafe {words} -f raw \"$3\" \"$4\""
        );
        let words = args!["-m", "sh", "-c", script, &*part, mounted, env!("CARGO_BIN_EXE_dedup-img"), source, target];
        qemu::run("unshare", words).ok().stderr
    };
    for source in [&*part, &*disk] {
        for words in ["", "-O raw"] {
            let due = format!(
                "dedup-img: warning: '{}' is mounted writable at '{}': ",
                source.display(),
                mounted.canonicalize().unwrap().display()
            );
            let said = run("rw", source, words);
            assert!(said.starts_with(&due) && said.lines().count() == 1, "{said}");
        }
        assert_eq!(run("ro,noload", source, ""), "");
        assert_eq!(run("rw", source, "-q"), "");
    }
    assert_eq!(run("rw", &plain(), ""), "", "a file is none");
}
