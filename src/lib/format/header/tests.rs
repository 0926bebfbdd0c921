use super::*;

pub(crate) fn sample() -> Header {
    Header {
        version: 3,
        cluster_bits: ClusterBits::GRAIN,
        size: 10 << 20,
        encryption: None,
        l1_entries: 5,
        l1_offset: HostOffset(0x3000),
        refcount_table_offset: HostOffset(0x1000),
        refcount_table_clusters: 1,
        snapshots: 1,
        snapshots_offset: HostOffset(0x9000),
        incompatible: incompatible::COMPRESSION,
        compatible: compatible::LAZY_REFCOUNTS,
        autoclear: 0,
        refcount_bits: RefcountBits::new(32).unwrap(),
        compression: CompressionType::Zstd,
        backing_name: Some(b"base.raw".to_vec()),
        extensions: vec![Extension { magic: extension::BACKING_FORMAT, data: b"raw".to_vec() }],
    }
}

#[test]
fn encode_and_decode_are_inverse() {
    let mut bytes = sample().encode().unwrap();
    bytes.resize(4096, 0);
    assert_eq!(Header::decode(&bytes).unwrap(), sample());
}

#[test]
fn every_broken_field_is_named() {
    type Break = fn(&mut RawHeader);
    let cases: [(Break, &str); 15] = [
        (|h| h.magic = *b"QFI\0", "Image is not in qcow2 format"),
        (|h| h.version = 4.into(), "Unsupported qcow2 version 4"),
        (|h| h.cluster_bits = 22.into(), "Unsupported cluster size: 2^22"),
        (|h| h.header_length = 96.into(), "qcow2 header too short"),
        (|h| h.header_length = 8192.into(), "qcow2 header exceeds cluster size"),
        (|h| h.header_length = 108.into(), "not a multiple of 8"),
        (|h| h.backing_file_offset = 4097.into(), "Invalid backing file offset"),
        (|h| h.backing_file_size = 1024.into(), "Backing file name too long"),
        (|h| h.incompatible_features = (8 + 32).into(), "Unknown incompatible feature: 20"),
        (|h| h.refcount_order = 7.into(), "Reference count entry width too large"),
        (|h| h.crypt_method = 3.into(), "Unsupported encryption method 3"),
        (|h| h.compression_type = 2, "unknown compression type: 2"),
        (|h| h.compression_type = 0, "must not be set"),
        (|h| h.l1_table_offset = 0x3001.into(), "Active L1 table offset invalid"),
        (|h| h.l1_size = 4.into(), "L1 table is too small"),
    ];
    for (damage, message) in cases {
        let mut bytes = sample().encode().unwrap();
        bytes.resize(4096, 0);
        let (mut raw, _) = RawHeader::read_from_prefix(&bytes).unwrap();
        damage(&mut raw);
        bytes[..V3_LENGTH].copy_from_slice(raw.as_bytes());
        let error = Header::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(message), "{error} should contain {message}");
    }
}

#[test]
fn an_extended_l2_entry_has_two_words() {
    use crate::format::l2::{self, Slot};
    use crate::format::table::L2Entry;

    let plain = sample();
    let extended = Header { incompatible: plain.incompatible | incompatible::EXTENDED_L2, ..plain.clone() };
    let entry = L2Entry::Data { host: HostOffset(0x20000), copied: true };
    let word = entry.encode(plain.cluster_bits);
    let mut table = [word, 0xff].map(u64::to_be_bytes).concat();
    assert_eq!(l2::slots(&extended, &table).collect::<Vec<_>>(), [Slot { index: 0, word, subclusters: 0xff }]);
    assert_eq!(l2::entries(&extended, &table).collect::<Vec<_>>(), [(0, entry)]);
    let found: Vec<_> = l2::slots(&plain, &table).map(|slot| (slot.index, slot.word, slot.subclusters)).collect();
    assert_eq!(found, [(0, word, 0), (1, 0xff, 0)]);
    assert!(!l2::rewrite(&extended, &mut table, |word, _| (word == 0xff).then_some(0)));
    assert!(l2::rewrite(&plain, &mut table, |word, _| (word == 0xff).then_some(0)));
    assert_eq!(l2::slots(&plain, &table).last(), Some(Slot { index: 1, word: 0, subclusters: 0 }));
}
