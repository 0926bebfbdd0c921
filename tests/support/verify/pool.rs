//! The pool: its entry in the snapshot table, its members, its directory.

use super::{Facts, Pin};
use crate::support::reader::{Entry, Image, Snapshot, Table, number};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// The snapshot table's entry is the one that the design fixes.
pub(super) fn verify_snapshot(image: &Image, pool: &Snapshot, id: &str) {
    image.must(pool.name == "dedup-pool" && pool.id == id, || {
        format!("the pool is called {:?}, id {:?}", pool.name, pool.id)
    });
    image.must(pool.disk_size == (1 << 63) - 512, || format!("the pool's guard size is {:#x}", pool.disk_size));
    image.must(pool.date == (0, 0) && pool.vm_clock == 0, || format!("the pool has a date: {pool:?}"));
    image.must(pool.icount == u64::MAX && pool.extra_length >= 24, || format!("the pool's extra data: {pool:?}"));
    image.aligned("the pool's L1 table", pool.l1_table_offset);
}

/// The pool's members and its directory, read and checked against its own checksums.
pub(super) struct Directory {
    /// L1 entries that hold members.
    pub(super) member_tables: u64,
    /// The members' L2 entries.
    pub(super) members: Vec<u64>,
    pub(super) sharer_limit: u64,
    pub(super) records: Vec<u8>,
}

/// Where the bytes of an L2 entry's cluster begin.
pub(super) fn host_of(cluster_bits: u32, word: u64) -> u64 {
    let offset_bits = 70 - cluster_bits;
    word & if word >> 62 & 1 == 1 { (1 << offset_bits) - 1 } else { 0x00ff_ffff_ffff_fe00 }
}

/// Reads members and directory through the pool's L1 table and checks all that does not need the members' content.
pub(super) fn read_directory(image: &Image, pool: &Snapshot) -> Directory {
    let (size, per_table) = (image.cluster_size(), image.l2_entries());
    let tables = image.tables(pool.l1_table_offset, pool.l1_size);
    image.must(tables.len() == pool.l1_size as usize, || "the pool's L1 table has gaps".into());
    image.must(pool.vm_state_size >= 128, || format!("a directory of {} bytes", pool.vm_state_size));
    let directory_clusters = pool.vm_state_size.div_ceil(size);
    let directory_tables = directory_clusters.div_ceil(per_table);
    image.must(tables.len() as u64 >= directory_tables, || "the pool's L1 table is too small for its directory".into());
    let (member_part, directory_part) = tables.split_at(tables.len() - directory_tables as usize);
    let words = |part: &[Table]| part.iter().flat_map(|table| table.words.clone()).collect::<Vec<u64>>();
    let flags = 1 << 63;
    let mut bytes = Vec::new();
    for (k, word) in words(directory_part).into_iter().enumerate() {
        if (k as u64) < directory_clusters {
            image.must(word & !flags != 0, || format!("directory cluster {k} is missing"));
            bytes.extend(image.read(word & !flags, size));
        } else {
            image.must(word == 0, || format!("entry {k} behind the directory is {word:#x}"));
        }
    }
    image.must(bytes[pool.vm_state_size as usize..].iter().all(|byte| *byte == 0), || {
        "bytes behind the directory".into()
    });
    bytes.truncate(pool.vm_state_size as usize);
    let members = number(&bytes, 24, 8);
    // QEMU goes back to a snapshot by first adding its references: disk, snapshot, both once more, and the pool must fit.
    let limit = (1_u64 << ((1 << image.header.refcount_order) - 2)) - 1;
    image.must(&bytes[..8] == b"DDUPPOOL", || format!("directory magic {:x?}", &bytes[..8]));
    let expected = [
        ("version", 8, 4, 1),
        ("header length", 12, 4, 128),
        ("fingerprint algorithm", 16, 4, 1),
        ("cluster_bits", 20, 4, image.header.cluster_bits.into()),
        ("L1 entries that hold members", 32, 4, members.div_ceil(per_table)),
        ("record size", 36, 4, 40),
        ("sharer limit", 40, 8, limit),
        ("reserved", 48, 8, 0),
        ("reserved", 56, 8, 0),
    ];
    for (what, at, length, due) in expected {
        let found = number(&bytes, at, length);
        image.must(found == due, || format!("the directory's {what} is {found}, {due} is due"));
    }
    image.must(pool.vm_state_size == 128 + 40 * members, || format!("{} bytes, {members} members", pool.vm_state_size));
    image.must(member_part.len() as u64 == number(&bytes, 32, 4), || {
        "the directory starts at the wrong L1 entry".into()
    });
    image.must(Sha256::digest(&bytes[128..])[..] == bytes[64..96], || "the records fail their checksum".into());
    image.must(Sha256::digest(&bytes[..96])[..] == bytes[96..128], || {
        "the directory's header fails its checksum".into()
    });
    let mut members = words(member_part);
    let rest = members.split_off(number(&bytes, 24, 8) as usize);
    image.must(rest.iter().all(|word| *word == 0), || format!("members behind the last: {rest:x?}"));
    // A compressed member is its descriptor, a plain one nothing but its offset.
    let plain = |word: u64| word.is_multiple_of(size) && word >> 56 == 0 && word != 0;
    let flagged = members.iter().find(|word| **word >> 62 != 1 && !plain(**word));
    image.must(flagged.is_none(), || format!("a member with flags: {flagged:x?}"));
    for (k, pair) in members.windows(2).enumerate() {
        let [first, second] = [pair[0], pair[1]].map(|word| host_of(image.header.cluster_bits, word));
        image.must(first < second, || format!("members {k} and {} do not ascend: {pair:x?}", k + 1));
    }
    Directory { member_tables: member_part.len() as u64, members, sharer_limit: limit, records: bytes.split_off(128) }
}

/// The members are exactly the clusters that the rule names, each with one reference more than sharers.
pub(super) fn verify_members(image: &Image, facts: &Facts, refcounts: &[u64], pin: Pin) {
    let least = if pin == Pin::All { 1 } else { 2 };
    let due: Vec<u64> = facts.sharers.iter().filter(|(_, count)| **count >= least).map(|(host, _)| *host).collect();
    image.must(due == facts.members, || {
        let missing = due.iter().find(|host| !facts.members.contains(host));
        let excess = facts.members.iter().find(|host| !due.contains(host));
        format!(
            "{} members, {} are due; first missing {missing:x?}, first in excess {excess:x?}",
            facts.members.len(),
            due.len()
        )
    });
    for host in &facts.members {
        let (count, sharers) = (refcounts[(host / facts.cluster_size) as usize], facts.sharers[host]);
        image.must(count == sharers + 1, || format!("member {host:#x}: refcount {count}, sharers {sharers}"));
    }
}

/// Each record holds the SHA-256 of its member's bytes, the lowest guest offset and the right flags.
pub(super) fn verify_records(image: &Image, directory: &Directory, facts: &mut Facts) {
    let mut lowest = BTreeMap::new();
    for table in image.active() {
        for (slot, entry) in table.entries.iter().enumerate() {
            if let Entry::Data { host, .. } = entry {
                lowest.entry(*host).or_insert((table.index * image.l2_entries() + slot as u64) * facts.cluster_size);
            }
        }
    }
    for (host, record) in facts.members.iter().zip(directory.records.chunks(40)) {
        let content = image.read(*host, facts.cluster_size);
        image.must(content.iter().any(|byte| *byte != 0), || format!("member {host:#x} is all zeros"));
        image.must(Sha256::digest(&content)[..] == record[..32], || {
            format!("member {host:#x} does not match its SHA-256")
        });
        let word = number(record, 32, 8);
        let (offset, flags) = (word & !0x1ff, word & 0x1ff);
        image.must(offset == lowest[host], || {
            format!("member {host:#x}: lowest guest offset {offset:#x}, not {:#x}", lowest[host])
        });
        image.must(flags <= 1, || format!("member {host:#x} has flags {flags:#x}"));
        let (limit, sharers) = (directory.sharer_limit, facts.sharers[host]);
        image.must(sharers <= limit, || format!("member {host:#x} has {sharers} sharers, {limit} are allowed"));
        image.must(flags == 0 || sharers == limit, || {
            format!("member {host:#x} is retired with {sharers} of {limit} sharers")
        });
        facts.retired += flags;
    }
}
