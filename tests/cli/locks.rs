//! I6: an image that QEMU has open is never touched, and QEMU cannot open one that `convert` or `dedup` works on. qemu-io is the
//! other side, mostly, and its own words are the ones expected.

use super::running::Running;
use crate::args;
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Bytes of a source that takes long enough to convert to be stopped in the middle.
const LARGE: usize = 64 << 20;

/// A directory with `source.raw` of the length given and an older image `target.qcow2`.
fn images(length: usize) -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    std::fs::write(&source, Random::new(6).bytes(length)).unwrap();
    qemu::create("qcow2", &target, 1 << 20, "");
    (home, source, target)
}

/// Asserts that the program was refused a lock, in QEMU's two lines.
#[track_caller]
fn refused_lock(ran: &Ran, image: &Path, what: &str) {
    let image = image.display();
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.told());
    let lines: Vec<&str> = ran.stderr.lines().collect();
    let first = format!("Could not open '{image}': Failed to get {what} lock");
    assert!(lines[0].starts_with("dedup-img: ") && lines[0].ends_with(&first), "{}", ran.told());
    assert_eq!(lines[1..], [format!("Is another process using the image [{image}]?")], "{}", ran.told());
}

/// Asserts that qemu-io cannot open an image; `flags` say how it tries.
#[track_caller]
fn qemu_io_is_refused(flags: &[&str], format: &str, image: &Path, what: &str) {
    let ran = open(flags, format, image);
    assert!(ran.code == 1 && ran.stderr.contains(&format!("Failed to get {what} lock")), "{}", ran.told());
}

/// Opens an image with qemu-io and does nothing else.
fn open(flags: &[&str], format: &str, image: &Path) -> Ran {
    let mut words = args!["-f", format, "-c", "length"].to_vec();
    words.extend(flags.iter().map(Into::into));
    words.push(image.into());
    qemu::run("qemu-io", words)
}

/// I6: what qemu-io writes to is not replaced.
#[test]
fn a_target_that_qemu_writes_to_is_left_alone() {
    let (home, source, target) = images(1 << 20);
    let before = sha256_of(&target);
    let _writer = Running::qemu_io(args!["-f", "qcow2", target]);
    refused_lock(&dedup_img(args!["convert", source, target]), &target, "\"write\"");
    refused_lock(&dedup_img(args!["convert", "-U", source, target]), &target, "\"write\"");
    refused_lock(&dedup_img(args!["convert", "-O", "raw", source, target]), &target, "\"write\"");
    refused_lock(&dedup_img(args!["create", target, "1M"]), &target, "\"write\"");
    assert_eq!(sha256_of(&target), before);
    assert_eq!(names_in(home.path()), ["source.raw", "target.qcow2"]);
}

/// I6: whoever reads an image relies on it as well.
#[test]
fn a_target_that_qemu_reads_is_left_alone() {
    let (_home, source, target) = images(1 << 20);
    let before = sha256_of(&target);
    let _reader = Running::qemu_io(args!["-r", "-f", "qcow2", target]);
    refused_lock(&dedup_img(args!["convert", source, target]), &target, "\"write\"");
    refused_lock(&dedup_img(args!["create", target, "1M"]), &target, "\"write\"");
    assert_eq!(sha256_of(&target), before);
}

/// I6: what changes under the reader cannot be converted, in the words of qemu-img itself.
#[test]
fn a_source_that_qemu_writes_to_is_refused_in_the_words_of_qemu_img() {
    let (home, source, target) = images(1 << 20);
    std::fs::remove_file(&target).unwrap();
    let _writer = Running::qemu_io(args!["-f", "raw", source]);
    let theirs = qemu::img(args!["convert", "-f", "raw", "-O", "qcow2", source, target]);
    assert_eq!(theirs.code, 1, "{}", theirs.told());
    let same = theirs.stderr.contains("Failed to get shared \"write\" lock");
    qemu::words(&qemu::SEEN, same, || theirs.told());
    refused_lock(&dedup_img(args!["convert", "-f", "raw", source, target]), &source, "shared \"write\"");
    refused_lock(&dedup_img(args!["convert", source, target]), &source, "shared \"write\"");
    assert_eq!(names_in(home.path()), ["source.raw"]);
}

/// I6 for every file of the chain.
#[test]
fn a_backing_file_that_qemu_writes_to_is_refused() {
    let (home, source, target) = images(1 << 20);
    let overlay = home.path().join("overlay.qcow2");
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", source, "-F", "raw", overlay]).ok();
    let _writer = Running::qemu_io(args!["-f", "raw", source]);
    let ran = dedup_img(args!["convert", overlay, target]);
    assert!(ran.code == 1 && ran.stderr.contains("Failed to get shared \"write\" lock"), "{}", ran.told());
    assert!(ran.stderr.contains(source.to_str().unwrap()), "{}", ran.told());
    // Nor is it of use as the base of a new image: what an overlay stands on must not move.
    let ran = dedup_img(args!["create", "-b", source, "-F", "raw", home.path().join("new.qcow2")]);
    assert!(ran.code == 1 && ran.stderr.contains("Failed to get shared \"write\" lock"), "{}", ran.told());
    assert_eq!(names_in(home.path()), ["overlay.qcow2", "source.raw", "target.qcow2"]);
}

#[test]
fn readers_share_a_source() {
    let (home, source, target) = images(1 << 20);
    let _reader = Running::qemu_io(args!["-r", "-f", "raw", source]);
    dedup_img(args!["convert", "-q", "-f", "raw", source, target]).ok();
    qemu::compare_same("raw", &source, "qcow2", &target);
    dedup_img(args!["create", "-q", "-b", source, "-F", "raw", home.path().join("new.qcow2")]).ok();
}

#[test]
fn force_share_reads_a_source_that_qemu_writes_to() {
    let (_home, source, target) = images(1 << 20);
    let _writer = Running::qemu_io(args!["-f", "raw", source]);
    dedup_img(args!["convert", "-q", "-U", "-f", "raw", source, target]).ok();
    dedup_img(args!["convert", "-q", "--force-share", "-f", "raw", source, target]).ok();
    assert_eq!(qemu::virtual_size("qcow2", &target), 1 << 20);
}

/// I6 from the other side: `convert` is stopped in the middle of its work, and qemu-io is asked to open what it uses.
#[test]
fn while_convert_works_qemu_can_neither_write_its_source_nor_open_its_target() {
    let (_home, source, target) = images(LARGE);
    let words = args!["convert", "-q", "-f", "raw", "-t", "unsafe", source, target];
    let mut convert = Running::dedup_img(words.clone());
    convert.stop_when(|it| it.has_locked(&source) && it.has_locked(&target));
    let before = sha256_of(&target);
    qemu_io_is_refused(&[], "raw", &source, "\"write\"");
    qemu_io_is_refused(&[], "qcow2", &target, "\"write\"");
    qemu_io_is_refused(&["-r"], "qcow2", &target, "shared \"write\"");
    open(&["-r"], "raw", &source).ok();
    // A second conversion may read the same source, but not write the same target.
    refused_lock(&dedup_img(words), &target, "\"write\"");
    let second = source.with_file_name("second.qcow2");
    dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", source, second]).ok();
    assert_eq!(sha256_of(&target), before, "the old target is there until the new one is whole");
    convert.signal("CONT");
    convert.finish().ok();
    open(&[], "raw", &source).ok();
    open(&[], "qcow2", &target).ok();
    qemu::compare_same("raw", &source, "qcow2", &target);
    assert_eq!(sha256_of(&target), sha256_of(&second));
}

/// I6 for a source in QCOW2 and its backing file.
#[test]
fn while_convert_works_qemu_cannot_write_any_file_of_the_source_chain() {
    let (home, base, target) = images(LARGE);
    let overlay = home.path().join("overlay.qcow2");
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay]).ok();
    qemu::io("qcow2", &overlay, &["write -P 1 0 1M".into()]);
    let mut convert = Running::dedup_img(args!["convert", "-q", "-t", "unsafe", overlay, target]);
    convert.stop_when(|it| [&base, &overlay, &target].iter().all(|path| it.has_locked(path)));
    qemu_io_is_refused(&[], "raw", &base, "\"write\"");
    qemu_io_is_refused(&[], "qcow2", &overlay, "\"write\"");
    open(&["-r"], "qcow2", &overlay).ok();
    convert.signal("CONT");
    convert.finish().ok();
    qemu::compare_same("qcow2", &overlay, "qcow2", &target);
}

/// A directory with an image of 64 MiB that holds duplicates, and the same content as a raw file.
fn duplicates() -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let [raw, image] = ["source.raw", "image.qcow2"].map(|name| home.path().join(name));
    let half = Random::new(8).bytes(LARGE / 2);
    std::fs::write(&raw, [&half[..], &half[..]].concat()).unwrap();
    qemu::convert("raw", &raw, "qcow2", &image, &["-o", "cluster_size=4k"]);
    (home, raw, image)
}

/// I6: whichever of QEMU's programs has the image open, `dedup` leaves it alone, and looks at it only where nobody writes to it.
#[test]
fn dedup_leaves_alone_what_qemu_has_open() {
    let (home, raw, image) = duplicates();
    let before = sha256_of(&image);
    let dry = args!["dedup", "--dry-run", "-q", image];
    let socket = home.path().join("socket");
    let file = format!("driver=file,node-name=file,filename={}", image.display());
    let daemon = args!["--blockdev", file, "--blockdev", "driver=qcow2,file=file,node-name=disk"];
    for (tool, words, writes) in [
        ("qemu-io", args!["-f", "qcow2", image].to_vec(), true),
        ("qemu-io", args!["-r", "-f", "qcow2", image].to_vec(), false),
        ("qemu-nbd", args!["-f", "qcow2", "-k", socket, image].to_vec(), true),
        ("qemu-nbd", args!["-r", "-f", "qcow2", "-k", socket, image].to_vec(), false),
        ("qemu-storage-daemon", daemon.to_vec(), true),
    ] {
        let mut user = match tool {
            "qemu-io" => Running::qemu_io(words),
            _ => Running::start(qemu::tool(tool, words)),
        };
        assert!(user.until(|it| it.has_locked(&image)), "{tool} has ended: {}", user.finish().told());
        refused_lock(&dedup_img(args!["dedup", image]), &image, "\"write\"");
        if writes {
            refused_lock(&dedup_img(dry.clone()), &image, "shared \"write\"");
        } else {
            dedup_img(dry.clone()).ok();
        }
        assert_eq!(sha256_of(&image), before, "{tool}");
    }
    dedup_img(args!["dedup", "-q", image]).ok();
    qemu::compare_same("raw", &raw, "qcow2", &image);
}

/// I6 from the other side: `dedup` is stopped in the middle of its work.
#[test]
fn while_dedup_works_qemu_cannot_open_its_image() {
    let (_home, raw, image) = duplicates();
    let words = args!["dedup", "-q", image];
    let mut dedup = Running::dedup_img(words.clone());
    dedup.stop_when(|it| it.has_locked(&image));
    qemu_io_is_refused(&[], "qcow2", &image, "\"write\"");
    qemu_io_is_refused(&["-r"], "qcow2", &image, "shared \"write\"");
    refused_lock(&dedup_img(words), &image, "\"write\"");
    refused_lock(&dedup_img(args!["check", image]), &image, "shared \"write\"");
    dedup.signal("CONT");
    dedup.finish().ok();
    open(&[], "qcow2", &image).ok();
    qemu::check_clean(&image);
    qemu::compare_same("raw", &raw, "qcow2", &image);
}

/// I6: a dry run reads, so others may read as well, and nobody may write.
#[test]
fn while_a_dry_run_looks_qemu_can_read_and_not_write() {
    let (_home, _, image) = duplicates();
    let mut dedup = Running::dedup_img(args!["dedup", "-q", "--dry-run", image]);
    dedup.stop_when(|it| it.has_locked(&image));
    qemu_io_is_refused(&[], "qcow2", &image, "\"write\"");
    open(&["-r"], "qcow2", &image).ok();
    dedup.signal("CONT");
    dedup.finish().ok();
}
