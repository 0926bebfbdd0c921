//! Our own output as a source, back to raw, over a backing file, with every cluster pinned and with other refcount widths.

use super::content::count;
use crate::args;
use crate::support::corpus::{K, M, content, edit, plain, write_sparse};
use crate::support::families;
use crate::support::reader::{Entry, Image, Pin, verify_dedup};
use crate::support::{dedup_img, qemu, scratch, sha256_of};
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Converts with the words given and demands success.
#[track_caller]
fn convert(words: &[&str], source: &Path, target: &Path) {
    let mut all = args!["convert", "-q"].to_vec();
    all.extend(words.iter().map(Into::into));
    all.extend(args![source, target]);
    dedup_img(all).ok();
}

#[test]
fn a_deduplicated_image_converts_again_to_the_same_bytes() {
    let home = scratch();
    let [one, two, three] = ["one", "two", "three"].map(|name| home.path().join(name));
    convert(&["-f", "raw", "-o", "cluster_size=4k"], &plain(), &one);
    convert(&["-f", "qcow2", "-o", "cluster_size=4k"], &one, &two);
    assert_eq!(sha256_of(&one), sha256_of(&two), "the same content and options give the same file (I5)");
    convert(&["-o", "cluster_size=64k"], &two, &three);
    qemu::check_clean(&three);
    qemu::compare_same("raw", &plain(), "qcow2", &three);
    verify_dedup(&three, Pin::Shared);
}

#[test]
fn raw_output_is_the_content_and_sparse() {
    let home = scratch();
    let [image, back] = ["image.qcow2", "back.raw"].map(|name| home.path().join(name));
    for size in ["4k", "64k", "2M", "auto"] {
        convert(&["-f", "raw", "-o", &format!("cluster_size={size}")], &plain(), &image);
        convert(&["-f", "qcow2", "-O", "raw"], &image, &back);
        assert_eq!(fs::read(&back).unwrap(), content(), "{size}");
        let (source, back) = (fs::metadata(plain()).unwrap(), fs::metadata(&back).unwrap());
        assert!(back.blocks() * 512 <= source.blocks() * 512 + 128 * K, "{size}: {} bytes", back.blocks() * 512);
    }
}

#[test]
fn every_kind_of_source_becomes_raw() {
    let home = scratch();
    let target = home.path().join("out.raw");
    let families = [
        families::raw(),
        families::versions(),
        families::zeros(),
        families::compressed(),
        families::subclusters(),
        families::snapshots(),
        families::odd_states(),
        families::chains(),
    ];
    for sample in families.iter().flatten() {
        let mut words = vec!["-f", sample.format, "-O", "raw"];
        words.extend(sample.snapshot.iter().flat_map(|snapshot| ["-l", snapshot]));
        convert(&words, &sample.path, &target);
        let (found, mut due) = (fs::read(&target).unwrap(), fs::read(&sample.truth).unwrap());
        due.resize(due.len().next_multiple_of(512), 0);
        assert!(found == due, "{}: {} bytes, {} are due", sample.name, found.len(), due.len());
    }
}

#[test]
fn the_format_is_probed_where_none_is_given() {
    let home = scratch();
    let target = home.path().join("out.qcow2");
    for samples in [families::raw(), families::versions()] {
        for sample in samples.iter().filter(|sample| !sample.name.contains("2M")) {
            convert(&[], &sample.path, &target);
            qemu::compare_same(sample.format, &sample.path, "qcow2", &target);
        }
    }
}

#[test]
fn every_data_cluster_can_be_pinned() {
    let home = scratch();
    let target = home.path().join("pinned.qcow2");
    for size in ["512", "4k", "64k", "2M"] {
        convert(&["-f", "raw", "--pin", "all", "-o", &format!("cluster_size={size}")], &plain(), &target);
        qemu::check_clean(&target);
        qemu::compare_same("raw", &plain(), "qcow2", &target);
        let facts = verify_dedup(&target, Pin::All);
        assert_eq!(facts.members.len() as u64, facts.data_clusters(), "{size}");
    }
}

#[test]
fn refcounts_come_in_every_width_that_can_share() {
    let home = scratch();
    let target = home.path().join("wide.qcow2");
    for bits in [4, 8, 16, 32, 64] {
        let options = format!("cluster_size=4k,refcount_bits={bits}");
        convert(&["-f", "raw", "-o", &options], &plain(), &target);
        qemu::check_clean(&target);
        qemu::compare_same("raw", &plain(), "qcow2", &target);
        let facts = verify_dedup(&target, Pin::Shared);
        let limit = (1_u64 << (bits - 2)) - 1;
        assert_eq!((facts.mapped, facts.data_clusters()), count(&content(), facts.cluster_size, limit), "{bits} bits");
        assert_eq!(facts.refcount_bits, bits);
        // The 0xff fill alone has 128 sharers, more than eight bits allow.
        assert_eq!(facts.retired > 0, bits <= 8, "{bits} bits: {} retired", facts.retired);
    }
}

#[test]
fn zeros_hide_the_backing_file_of_the_target() {
    let home = scratch();
    let [base, target] = ["base.raw", "target.qcow2"].map(|name| home.path().join(name));
    fs::write(&base, vec![0xab; 9 * M as usize]).unwrap();
    for size in ["4k", "64k", "auto"] {
        let options = format!("cluster_size={size},backing_file=base.raw,backing_fmt=raw");
        convert(&["-f", "raw", "-o", &options], &plain(), &target);
        qemu::check_clean(&target);
        qemu::compare_same("raw", &plain(), "qcow2", &target);
        let facts = verify_dedup(&target, Pin::Shared);
        assert_eq!(facts.mapped + facts.zero_flagged, facts.virtual_size.div_ceil(facts.cluster_size), "{size}");
        let image = Image::open(&target);
        assert_eq!(image.backing_file().as_deref(), Some("base.raw"));
        let entries: Vec<Entry> = image.active().into_iter().flat_map(|table| table.entries).collect();
        assert!(entries.contains(&Entry::Zero(None)), "{size}: a zero cluster carries the flag");
    }
}

/// L2 tables in which no cluster is stored are written all the same, and in their own place.
#[test]
fn zeros_hide_the_backing_file_where_nothing_is_stored_too() {
    let home = scratch();
    let [base, source, target] = ["base.raw", "source.raw", "target.qcow2"].map(|name| home.path().join(name));
    fs::write(&base, vec![0xab; 13 * M as usize]).unwrap();
    for data in [None, Some(0), Some(11 * M)] {
        let disk = fs::File::create(&source).unwrap();
        disk.set_len(12 * M + 512).unwrap();
        if let Some(offset) = data {
            disk.write_all_at(&[7; 5000], offset).unwrap();
        }
        for size in ["512", "4k", "64k", "auto"] {
            let options = format!("cluster_size={size},backing_file=base.raw,backing_fmt=raw");
            convert(&["-f", "raw", "-o", &options], &source, &target);
            qemu::check_clean(&target);
            qemu::compare_same("raw", &source, "qcow2", &target);
            let facts = verify_dedup(&target, Pin::Shared);
            assert_eq!(facts.mapped + facts.zero_flagged, facts.virtual_size.div_ceil(facts.cluster_size), "{size}");
        }
    }
}

#[test]
fn a_backing_file_is_found_by_its_absolute_name() {
    let home = scratch();
    let [base, overlay, target] = ["base.raw", "overlay.qcow2", "target.qcow2"].map(|name| home.path().join(name));
    write_sparse(&base, &content());
    let options = format!("backing_file={},backing_fmt=raw", base.display());
    qemu::create("qcow2", &overlay, 7 * M, &options);
    edit(&overlay, &["write -P 3 1M 70k"]);
    convert(&["-f", "qcow2"], &overlay, &target);
    qemu::compare_same("qcow2", &overlay, "qcow2", &target);
}
