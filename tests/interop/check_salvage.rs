//! `convert --salvage` beside `qemu-img convert --salvage`: what QEMU gets out of a damaged image, we do too. The undamaged disk says
//! which bytes are right.

use crate::args;
use crate::support::corpus::patch;
use crate::support::mutator::Mutator;
use crate::support::reader::Image;
use crate::support::subjects::{subject, subjects};
use crate::support::{Random, dedup_img, qemu, scratch};
use serde_json::Value;
use std::path::Path;
use std::{env, fs};

/// Damaged images made of each subject, where nobody says how many.
const DAMAGED: usize = 4;
/// A disk that damage has made larger is not read.
const LARGEST: u64 = 64 << 20;

/// The disk of `image` as each program saves it; nothing where it cannot.
fn saved(image: &Path, home: &Path) -> [Option<Vec<u8>>; 2] {
    let [theirs, ours] = ["theirs.raw", "ours.raw"].map(|name| home.join(name));
    let ran = qemu::img(args!["convert", "--salvage", "-f", "qcow2", "-O", "raw", image, theirs]);
    let theirs = (ran.code == 0).then(|| fs::read(theirs).unwrap());
    let ran = dedup_img(args!["convert", "-q", "-t", "unsafe", "--salvage", "-f", "qcow2", "-O", "raw", image, ours]);
    assert!(matches!(ran.code, 0 | 1) && !ran.stderr.contains("internal error"), "{}", ran.told());
    [theirs, (ran.code == 0).then(|| fs::read(ours).unwrap())]
}

#[test]
fn what_qemu_img_salvages_is_salvaged() {
    let each = env::var("DEDUP_IMG_SALVAGE").map_or(DAMAGED, |count| count.parse().unwrap());
    let home = scratch();
    let [image, right] = ["image", "right.raw"].map(|name| home.path().join(name));
    let (mut compared, mut better) = (0, 0);
    // The overlay names its base by a path from where it is.
    for (seed, (name, path)) in (501..).zip(subjects()).filter(|(_, (name, _))| *name != "overlay") {
        if qemu::virtual_size("qcow2", &path) > LARGEST {
            continue;
        }
        qemu::convert("qcow2", &path, "raw", &right, &[]);
        let right = fs::read(&right).unwrap();
        let (mutator, mut random) = (Mutator::new(&path), Random::new(seed));
        for _ in 0..each {
            let mut damaged = mutator.damage(&mut random);
            if damaged.bytes[7] == 3 && random.below(2) == 0 {
                damaged.bytes[79] |= 2;
            }
            let size = damaged.bytes.get(24..32).map_or(0, |size| u64::from_be_bytes(size.try_into().unwrap()));
            if size > LARGEST {
                continue;
            }
            fs::write(&image, &damaged.bytes).unwrap();
            let [Some(theirs), ours] = saved(&image, home.path()) else { continue };
            let told = format!("{name}: {}", damaged.story);
            let ours = ours.unwrap_or_else(|| panic!("only qemu-img reads it: {told}"));
            assert_eq!(ours.len(), theirs.len(), "{told}");
            compared += 1;
            for ((at, right), (theirs, ours)) in
                (0..).zip(right.chunks(512)).zip(theirs.chunks(512).zip(ours.chunks(512)))
            {
                // Where QEMU has given up it takes zeros, which are right by chance.
                let wrong = theirs == right && ours != right && right.iter().any(|byte| *byte != 0);
                assert!(!wrong, "sector {at} is only right in qemu-img's: {told}");
                better += u64::from(theirs != right && ours == right);
            }
        }
    }
    println!("{compared} compared, {better} sectors are only right in ours");
    assert!(compared > 20, "only {compared} images could be compared");
}

/// Runs `convert --salvage` to an image, which must be clean, and returns its summary.
fn salvage(image: &Path, target: &Path) -> Value {
    let ran = dedup_img(args!["convert", "--salvage", "--output", "json", image, target]).ok();
    qemu::check_clean(target);
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn an_image_that_is_marked_corrupt_is_read() {
    let home = scratch();
    let [image, target] = ["image", "target"].map(|name| home.path().join(name));
    fs::copy(subject("plain-4k"), &image).unwrap();
    patch(&image, 79, &[2]);
    let ran = dedup_img(args!["convert", "-q", image, target]);
    assert!(ran.code == 1 && ran.stderr.contains("marked corrupt"), "{}", ran.told());
    assert_eq!(salvage(&image, &target)["unreadable_bytes"], 0);
    qemu::compare_same("qcow2", &subject("plain-4k"), "qcow2", &target);
}

/// An L2 table that the file does not have reads as zeros, so that the backing file shows through; what is lost is named.
#[test]
fn a_lost_table_leads_to_the_backing_file() {
    let home = scratch();
    let [base, image, target, theirs] =
        ["base.raw", "image", "target", "theirs.raw"].map(|name| home.path().join(name));
    fs::write(&base, Random::new(3).bytes(6 << 20)).unwrap();
    let options = "cluster_size=4k,backing_fmt=raw,backing_file=base.raw";
    qemu::create("qcow2", &image, 6 << 20, options);
    qemu::io("qcow2", &image, &["write -P 7 1M 64k".to_owned(), "write -P 8 2M 64k".to_owned()]);
    let l1 = Image::open(&image).header.l1_table_offset;
    patch(&image, l1, &(1u64 << 63 | 1 << 40).to_be_bytes());
    let summary = salvage(&image, &target);
    assert_eq!(summary["unreadable_bytes"], 2 << 20, "{summary:#}");
    qemu::img(args!["convert", "--salvage", "-O", "raw", image, theirs]).ok();
    qemu::compare_same("raw", &theirs, "qcow2", &target);
    let bytes = fs::read(&theirs).unwrap();
    assert!(bytes[..2 << 20] == fs::read(&base).unwrap()[..2 << 20], "the backing file");
    assert!(bytes[2 << 20..(2 << 20) + (64 << 10)].iter().all(|byte| *byte == 8));
}

/// A few bytes of an L1 table can be as many petabytes. They take no time, and no memory.
#[test]
fn what_is_lost_of_a_huge_disk_is_named_in_no_time() {
    let home = scratch();
    let image = home.path().join("image");
    qemu::create("qcow2", &image, 1 << 50, "cluster_size=2M");
    let l1 = Image::open(&image).header;
    for index in 0..u64::from(l1.l1_size) {
        let entry = if index % 3 == 0 { 1u64 << 63 | 1 << 50 } else { 1 << 63 | 0x20_0200 | index << 30 };
        patch(&image, l1.l1_table_offset + 8 * index, &entry.to_be_bytes());
    }
    let target = home.path().join("target");
    let summary = salvage(&image, &target);
    assert_eq!(summary["unreadable_bytes"], 1u64 << 50, "{summary:#}");
}
