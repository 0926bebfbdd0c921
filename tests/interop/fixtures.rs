//! The images to try hold what they promise: without this, a conversion test could pass on a source that lacks the very thing.

use crate::support::corpus::{M, Sample};
use crate::support::families;
use crate::support::reader::{Entry, Image};
use crate::support::root_disk::root_disk;
use crate::support::{qemu, scratch};
use std::os::unix::fs::MetadataExt;

/// The image of a sample, opened by the independent reader.
fn open(samples: &[Sample], name: &str) -> Image {
    Image::open(&samples.iter().find(|sample| sample.name == name).unwrap_or_else(|| panic!("no {name}")).path)
}

/// All entries of the active layer.
fn entries(image: &Image) -> Vec<Entry> {
    image.active().into_iter().flat_map(|table| table.entries).collect()
}

#[test]
fn zero_clusters_come_plain_and_allocated() {
    let samples = families::zeros();
    let found = entries(&open(&samples, "zeros.qcow2"));
    assert!(found.contains(&Entry::Zero(None)), "{found:x?}");
    assert!(found.iter().any(|entry| matches!(entry, Entry::Zero(Some(_)))), "{found:x?}");
    assert_eq!(open(&samples, "zeros-v2.qcow2").header.version, 2);
}

#[test]
fn compressed_clusters_cross_host_clusters() {
    let samples = families::compressed();
    for name in ["zlib-4k.qcow2", "zlib-64k.qcow2", "zstd-4k.qcow2", "zstd-64k.qcow2", "zlib-v2.qcow2"] {
        let image = open(&samples, name);
        let size = image.cluster_size();
        let crosses = entries(&image).into_iter().any(
            |entry| matches!(entry, Entry::Compressed { host, length } if host / size != (host + length - 1) / size),
        );
        assert!(crosses, "{name}");
        assert_eq!(image.header.incompatible & 8 != 0, name.starts_with("zstd"), "{name}");
    }
}

#[test]
fn subclusters_are_written_and_zeroed_in_part() {
    let samples = families::subclusters();
    for name in ["alone-64k.qcow2", "over-qcow2.qcow2", "over-raw.qcow2"] {
        let image = open(&samples, name);
        assert!(image.extended(), "{name}");
        let partial = |half: fn(u64) -> u32| {
            entries(&image)
                .into_iter()
                .any(|entry| matches!(entry, Entry::Data { bitmap, .. } if !matches!(half(bitmap), 0 | u32::MAX)))
        };
        assert!(partial(|bitmap| bitmap as u32), "{name}: none written in part");
        assert!(partial(|bitmap| (bitmap >> 32) as u32), "{name}: none zeroed in part");
    }
}

#[test]
fn snapshots_differ_from_the_active_layer_and_in_size() {
    let samples = families::snapshots();
    let (list, _) = open(&samples, "snapshots.qcow2").snapshots();
    let told: Vec<_> = list.iter().map(|s| (s.id.as_str(), s.name.as_str(), s.disk_size)).collect();
    let (small, large) = (4 * M + 512, 5 * M + 512);
    assert_eq!(told, [("1", "2", small), ("2", "before the change", small), ("3", "last", large)]);
    let home = scratch();
    for sample in samples.iter().filter(|sample| sample.name.starts_with("snapshots")) {
        let raw = home.path().join("raw");
        let more: Vec<&str> = sample.snapshot.iter().flat_map(|snapshot| ["-l", snapshot]).collect();
        qemu::convert("qcow2", &sample.path, "raw", &raw, &more);
        qemu::compare("raw", &raw, "raw", &sample.truth).ok();
    }
    let truths: Vec<Vec<u8>> = samples[..5].iter().map(|sample| std::fs::read(&sample.truth).unwrap()).collect();
    for (n, truth) in truths.iter().enumerate() {
        let twins = truths.iter().filter(|other| *other == truth).count();
        let label = &samples[n].name;
        // "2" means the snapshot with this id although another has this name; so it equals "before the change".
        let due = if label.ends_with("@2") || label.ends_with("@before the change") { 2 } else { 1 };
        assert_eq!(twins, due, "{label}");
    }
}

#[test]
fn dirty_images_are_dirty_and_bitmaps_are_there() {
    let samples = families::odd_states();
    for (name, dirty) in [("dirty-flushed.qcow2", 1), ("dirty-torn.qcow2", 1), ("killed.qcow2", 0)] {
        assert_eq!(open(&samples, name).header.incompatible & 1, dirty, "{name}");
    }
    let image = open(&samples, "bitmaps.qcow2");
    assert_eq!(image.header.autoclear & 1, 1);
    assert!(image.extensions().iter().any(|(kind, _)| *kind == 0x2385_2875));
}

#[test]
fn refcount_widths_are_the_ones_asked_for() {
    for sample in families::widths() {
        let image = Image::open(&sample.path);
        assert_eq!(sample.name, format!("bits-{}.qcow2", 1 << image.header.refcount_order));
        let counts = image.refcounts();
        assert!(
            counts.iter().all(|count| *count <= 1) && counts.contains(&1),
            "{}: qemu-img shares nothing",
            sample.name
        );
    }
}

#[test]
fn chains_name_their_bases_relatively() {
    let samples = families::chains();
    assert_eq!(open(&samples, "deeper/middle.qcow2").backing_file().as_deref(), Some("base.qcow2"));
    assert_eq!(open(&samples, "top.qcow2").backing_file().as_deref(), Some("deeper/top.qcow2"));
}

#[test]
fn the_root_disk_is_a_sparse_ext4_file_system_with_data() {
    let disk = std::fs::metadata(root_disk()).unwrap();
    assert_eq!(disk.len(), 1 << 30);
    let data = disk.blocks() * 512;
    assert!((150 * M..400 * M).contains(&data), "{data} bytes of data");
}
