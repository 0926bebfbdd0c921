//! I7: which names a target may have. Whatever is refused stays as it is, in one clear line; what is replaced is replaced whole.

use super::failure::{images, in_namespace, untouched};
use super::running::{Running, in_time, is_root, unprivileged};
use crate::args;
use crate::support::{Ran, dedup_command, dedup_img, names_in, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

#[test]
fn a_target_that_is_no_file_is_refused() {
    let (home, source, target) = images(1 << 20);
    let place = scratch();
    let [directory, fifo] = ["directory", "fifo"].map(|name| place.path().join(name));
    fs::create_dir(&directory).unwrap();
    make_fifo(&fifo);
    for path in [&directory, &fifo, Path::new("/dev/null"), Path::new("/dev/stdout")] {
        for words in [args!["convert", source, path], args!["create", path, "1M"]] {
            in_time(words).refused(&[path.to_str().unwrap()]);
        }
    }
    in_time(args!["convert", source, directory]).refused(&["Is a directory"]);
    assert!(fifo.symlink_metadata().unwrap().file_type().is_fifo() && names_in(&directory).is_empty());
    assert_eq!(names_in(place.path()), ["directory", "fifo"]);
    drop(target);
    untouched(&home);
}

fn make_fifo(path: &Path) {
    qemu::run("mkfifo", args![path]).ok();
}

#[test]
fn a_target_directory_that_is_not_there_is_refused() {
    let (home, source, _) = images(1 << 20);
    for name in ["absent/target", "absent/absent/target", "source.raw/target", "target.qcow2/"] {
        let target = home.path().join(name);
        dedup_img(args!["convert", source, target]).refused(&[target.to_str().unwrap()]);
        dedup_img(args!["create", target, "1M"]).refused(&[target.to_str().unwrap()]);
        untouched(&home);
    }
    for words in [args!["convert", source, ""], args!["create", "", "1M"], args!["convert", "", "new"]] {
        let ran = dedup_img(words);
        assert!(ran.code == 1 && ran.stderr.starts_with("dedup-img: "), "{}", ran.told());
    }
    untouched(&home);
}

/// A FIFO has no end and no second reading: refused at once, with a writer and without.
#[test]
fn a_source_that_is_a_fifo_or_standard_input_is_refused() {
    let (home, source, target) = images(1 << 20);
    let place = scratch();
    let fifo = place.path().join("fifo");
    make_fifo(&fifo);
    for format in [&[][..], &["-f", "raw"], &["-f", "qcow2"]] {
        let words = |path: &Path| {
            args!["convert"]
                .into_iter()
                .chain(format.iter().map(OsString::from))
                .chain(args![path, target])
                .collect::<Vec<_>>()
        };
        in_time(words(&fifo)).refused(&[fifo.to_str().unwrap()]);
        let writer = File::options().read(true).write(true).open(&fifo).unwrap();
        in_time(words(&fifo)).refused(&[fifo.to_str().unwrap()]);
        drop(writer);
        let mut command = dedup_command(words(Path::new("/dev/stdin")));
        command.stdin(Stdio::piped());
        Running::start(command).finish().refused(&["/dev/stdin"]);
        untouched(&home);
    }
    assert_eq!(fs::read(&source).unwrap().len(), 1 << 20);
}

/// The source is never its own target, by whatever name.
#[test]
fn a_target_that_is_the_source_is_refused() {
    let (home, source, _) = images(1 << 20);
    let before = sha256_of(&source);
    let place = scratch();
    let [soft, hard] = ["soft", "hard"].map(|name| place.path().join(name));
    symlink(&source, &soft).unwrap();
    fs::hard_link(&source, &hard).unwrap();
    let around = home.path().join("../").join(home.path().file_name().unwrap()).join("source.raw");
    for target in [&source, &soft, &hard, &around] {
        for words in [&[][..], &["-U"], &["-O", "raw"], &["-U", "-t", "unsafe"]] {
            let ran = dedup_img(
                args!["convert"].into_iter().chain(words.iter().map(OsString::from)).chain(args![source, target]),
            );
            refused_as_used(&ran);
            assert_eq!(sha256_of(&source), before);
            untouched(&home);
        }
    }
}

/// A refusal in one line or, for a lock, in QEMU's two.
#[track_caller]
fn refused_as_used(ran: &Ran) {
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.told());
    assert!(lines[0].starts_with("dedup-img: "), "{}", ran.told());
    assert!(lines.len() == 1 || lines.len() == 2 && lines[1].starts_with("Is another process using"), "{}", ran.told());
}

#[test]
fn a_target_in_the_chain_of_the_source_is_refused() {
    let (home, base, _) = images(1 << 20);
    let [middle, top] = ["middle.qcow2", "top.qcow2"].map(|name| home.path().join(name));
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle]).ok();
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top]).ok();
    let sums = || [&base, &middle, &top].map(|path| sha256_of(path));
    let before = sums();
    for target in [&base, &middle, &top] {
        for words in [&[][..], &["-U"]] {
            refused_as_used(&dedup_img(
                args!["convert"].into_iter().chain(words.iter().map(OsString::from)).chain(args![top, target]),
            ));
            assert_eq!(sums(), before);
        }
    }
    // The same holds for the backing file that the target is to have.
    refused_as_used(&dedup_img(args!["create", "-b", base, "-F", "raw", base]));
    refused_as_used(&dedup_img(args!["create", "-b", top, "-F", "qcow2", base]));
    assert_eq!(sums(), before);
    assert_eq!(names_in(home.path()), ["middle.qcow2", "source.raw", "target.qcow2", "top.qcow2"]);
}

#[test]
fn a_read_only_file_system_is_refused() {
    let (home, source, _) = images(1 << 20);
    let script =
        "mount --bind \"$3\" \"$3\"; mount -o remount,bind,ro \"$3\"; \"$1\" convert \"$2\" \"$3/target.qcow2\"";
    in_namespace(script, &[&source, home.path()]).refused(&["Read-only file system"]);
    untouched(&home);
}

#[test]
fn a_target_that_may_not_be_written_to_is_not_replaced() {
    let (home, source, target) = images(1 << 20);
    fs::set_permissions(&target, Permissions::from_mode(0o444)).unwrap();
    qemu::finish("setpriv", unprivileged(args!["convert", source, target]))
        .refused(&[target.to_str().unwrap(), "Permission denied"]);
    untouched(&home);
}

#[test]
fn a_link_as_target_stays_a_link_and_its_file_is_replaced() {
    let (home, source, target) = images(1 << 20);
    let place = scratch();
    let [link, second, dangling] = ["link", "second", "dangling"].map(|name| place.path().join(name));
    symlink(&target, &link).unwrap();
    symlink("link", &second).unwrap();
    symlink(home.path().join("fresh.qcow2"), &dangling).unwrap();
    for (name, file) in [(&link, &target), (&second, &target), (&dangling, &home.path().join("fresh.qcow2"))] {
        dedup_img(args!["convert", "-q", source, name]).ok();
        assert!(name.symlink_metadata().unwrap().is_symlink() && file.symlink_metadata().unwrap().is_file());
        qemu::compare_same("raw", &source, "qcow2", file);
    }
    assert_eq!(names_in(place.path()), ["dangling", "link", "second"]);
    let ring = place.path().join("ring");
    symlink("ring", &ring).unwrap();
    dedup_img(args!["convert", source, ring]).refused(&["Too many levels of symbolic links"]);
}

#[test]
fn permissions_and_owner_of_the_old_target_are_kept() {
    let (_home, source, target) = images(1 << 20);
    for mode in [0o600, 0o640, 0o664, 0o777] {
        fs::set_permissions(&target, Permissions::from_mode(mode)).unwrap();
        if is_root() {
            std::os::unix::fs::chown(&target, Some(1234), Some(2345)).unwrap();
        }
        let before = target.metadata().unwrap();
        dedup_img(args!["convert", "-q", source, target]).ok();
        let after = target.metadata().unwrap();
        assert_eq!((after.mode() & 0o7777, after.uid(), after.gid()), (mode, before.uid(), before.gid()));
        assert_ne!(after.ino(), before.ino(), "a new file takes the old one's name");
    }
}
