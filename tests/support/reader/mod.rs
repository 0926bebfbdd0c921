//! A slow, obvious reader of QCOW2 versions 2 and 3, written from the format's description alone. It shares no code with the
//! program under test and panics with a sentence at the first thing that is not as the format demands.

mod header;
mod snapshot;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

pub(crate) use header::Header;
pub(crate) use snapshot::Snapshot;

pub(crate) use super::verify::{
    Facts, Pin, Survey, content, verify_dedup, verify_deduped, verify_packed, verify_plain,
};

/// Bits 9 to 55 of a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L2 entry says about its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing here: the backing file or zeros.
    Unallocated,
    /// Reads as zeros, with a host cluster kept for later or without.
    Zero(Option<u64>),
    /// A host cluster, the COPIED flag, and the subcluster bitmap (all ones in the low half where there are no subclusters).
    Data { host: u64, copied: bool, bitmap: u64 },
    /// Compressed bytes: where they begin and the most that they can take.
    Compressed { host: u64, length: u64 },
}

/// An entry of an L1 table with the L2 table that it names.
pub(crate) struct Table {
    /// Position in the L1 table.
    pub(crate) index: u64,
    /// Host offset of the L2 table.
    pub(crate) host: u64,
    /// The L1 entry's COPIED flag.
    pub(crate) copied: bool,
    /// The L2 table's 64-bit words as they are (the first of each pair with extended entries).
    pub(crate) words: Vec<u64>,
    /// The same, understood.
    pub(crate) entries: Vec<Entry>,
}

/// An image file, open for reading.
pub(crate) struct Image {
    path: PathBuf,
    file: File,
    /// Length of the file in bytes.
    pub(crate) length: u64,
    /// The header.
    pub(crate) header: Header,
    /// All of the file, where it is held.
    whole: Option<Vec<u8>>,
}

/// The big-endian integer of `length` bytes at `at`.
pub(crate) fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

impl Image {
    /// Fails with the image's name before the sentence.
    #[track_caller]
    pub(crate) fn must(&self, holds: bool, sentence: impl FnOnce() -> String) {
        assert!(holds, "{}: {}", self.path.display(), sentence());
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Whether the L2 entries are 16 bytes long and have subclusters.
    pub(crate) fn extended(&self) -> bool {
        self.header.incompatible & 16 != 0
    }

    /// Guest clusters that one L2 table maps.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster_size() / if self.extended() { 16 } else { 8 }
    }

    /// Bytes of the file.
    #[track_caller]
    pub(crate) fn read(&self, at: u64, length: u64) -> Vec<u8> {
        let end = at.checked_add(length);
        self.must(end.is_some_and(|end| end <= self.length), || {
            format!("{length} bytes at {at:#x} lie outside the file of {:#x} bytes", self.length)
        });
        if let Some(whole) = &self.whole {
            return whole[at as usize..][..length as usize].to_vec();
        }
        let mut bytes = vec![0; length as usize];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Big-endian 64-bit words of the file.
    pub(crate) fn words(&self, at: u64, count: u64) -> Vec<u64> {
        self.read(at, count * 8).chunks(8).map(|word| number(word, 0, 8)).collect()
    }

    /// Asserts that a host offset is the start of a cluster other than the header's.
    #[track_caller]
    pub(crate) fn aligned(&self, what: &str, at: u64) {
        self.must(at.is_multiple_of(self.cluster_size()) && at != 0, || {
            format!("{what} at {at:#x}, which is no cluster's start")
        });
    }

    /// The refcounts of all clusters up to the last refcount block that there is; all behind it are 0.
    pub(crate) fn refcounts(&self) -> Vec<u64> {
        let (order, mut counts) = (self.header.refcount_order, Vec::new());
        self.must(order <= 6, || format!("refcount_order {order}"));
        let bits = 1_u64 << order;
        let per_block = self.cluster_size() * 8 / bits;
        for block in self.refcount_blocks() {
            if block == 0 {
                counts.extend((0..per_block).map(|_| 0));
                continue;
            }
            let bytes = self.read(block, self.cluster_size());
            for entry in 0..per_block {
                let bit = entry * bits;
                counts.push(match bits {
                    8.. => number(&bytes, (bit / 8) as usize, (bits / 8) as usize),
                    _ => u64::from(bytes[(bit / 8) as usize]) >> (bit % 8) & ((1 << bits) - 1),
                });
            }
        }
        counts
    }

    /// Host offsets of the refcount blocks up to the last one; 0 where there is none.
    pub(crate) fn refcount_blocks(&self) -> Vec<u64> {
        let header = &self.header;
        self.aligned("refcount table", header.refcount_table_offset);
        let count = u64::from(header.refcount_table_clusters) * self.cluster_size() / 8;
        let mut blocks = self.words(header.refcount_table_offset, count);
        blocks.truncate(blocks.iter().rposition(|block| *block != 0).map_or(0, |last| last + 1));
        for block in blocks.iter().filter(|block| **block != 0) {
            self.aligned("refcount block", *block);
        }
        blocks
    }

    /// The L2 tables below an L1 table, in guest order, without the absent ones.
    pub(crate) fn tables(&self, l1_offset: u64, l1_size: u32) -> Vec<Table> {
        let mut tables = Vec::new();
        for (index, entry) in self.words(l1_offset, l1_size.into()).into_iter().enumerate() {
            self.must(entry & !(OFFSET | 1 << 63) == 0, || format!("L1 entry {index} has reserved bits: {entry:#x}"));
            let (host, copied) = (entry & OFFSET, entry >> 63 == 1);
            if host == 0 {
                self.must(!copied, || format!("L1 entry {index} is COPIED but has no L2 table"));
                continue;
            }
            self.aligned("L2 table", host);
            let all = self.words(host, self.cluster_size() / 8);
            let step = if self.extended() { 2 } else { 1 };
            let entries = all.chunks(step).map(|pair| self.entry(pair[0], pair.get(1).copied())).collect();
            tables.push(Table {
                index: index as u64,
                host,
                copied,
                words: all.into_iter().step_by(step).collect(),
                entries,
            });
        }
        tables
    }

    /// The L2 tables of the active layer.
    pub(crate) fn active(&self) -> Vec<Table> {
        self.tables(self.header.l1_table_offset, self.header.l1_size)
    }

    /// Understands one L2 entry.
    fn entry(&self, word: u64, bitmap: Option<u64>) -> Entry {
        if word >> 62 & 1 == 1 {
            self.must(word >> 63 == 0, || format!("compressed entry {word:#x} is COPIED"));
            let offset_bits = 62 - (self.header.cluster_bits - 8);
            let host = word & ((1 << offset_bits) - 1);
            let sectors = (word >> offset_bits) & ((1 << (62 - offset_bits)) - 1);
            return Entry::Compressed { host, length: (sectors + 1) * 512 - host % 512 };
        }
        let (host, copied, zero) = (word & OFFSET, word >> 63 == 1, word & 1 == 1);
        self.must(word & !(OFFSET | 1 << 63 | 1) == 0, || format!("L2 entry {word:#x} has reserved bits"));
        if host == 0 {
            self.must(!copied, || format!("L2 entry {word:#x} is COPIED but has no cluster"));
            let all_zero = bitmap.is_some_and(|map| map >> 32 == 0xffff_ffff);
            return if zero || all_zero { Entry::Zero(None) } else { Entry::Unallocated };
        }
        self.aligned("data cluster", host);
        match bitmap {
            Some(map) => {
                self.must(!zero && map as u32 & (map >> 32) as u32 == 0, || format!("subclusters {map:#x} contradict"));
            }
            None if zero => return Entry::Zero(Some(host)),
            None => {}
        }
        Entry::Data { host, copied, bitmap: bitmap.unwrap_or(0xffff_ffff) }
    }
}
