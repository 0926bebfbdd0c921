//! References counted by walking everything, against refcounts and COPIED flags.

use super::bitmaps::bitmaps;
use crate::support::reader::{Entry, Image};
use std::collections::BTreeMap;

/// What a host cluster is used for; a cluster serves one purpose only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Header,
    RefcountTable,
    RefcountBlock,
    L1,
    L2,
    SnapshotTable,
    Data,
    Directory,
    Bitmap,
}

/// References counted by walking everything: cluster number to purpose and count.
struct Counted<'a> {
    image: &'a Image,
    clusters: BTreeMap<u64, (Use, u64)>,
}

impl Counted<'_> {
    /// Counts one reference to each cluster that the bytes touch.
    fn add(&mut self, used: Use, host: u64, length: u64) {
        let size = self.image.cluster_size();
        for cluster in host / size..(host + length).div_ceil(size) {
            let (before, count) = self.clusters.entry(cluster).or_insert((used, 0));
            let clash = *before;
            *count += 1;
            self.image.must(clash == used, || format!("cluster {cluster} serves as {clash:?} and as {used:?}"));
        }
    }

    /// Counts an L1 table and all below it; `directory` says from which L1 index on the data is the pool's directory.
    fn add_layer(&mut self, l1_offset: u64, l1_size: u32, directory: Option<u64>) {
        let size = self.image.cluster_size();
        self.add(Use::L1, l1_offset, u64::from(l1_size) * 8);
        for table in self.image.tables(l1_offset, l1_size) {
            let used = if directory.is_some_and(|from| table.index >= from) { Use::Directory } else { Use::Data };
            self.add(Use::L2, table.host, size);
            for entry in table.entries {
                match entry {
                    Entry::Data { host, .. } | Entry::Zero(Some(host)) => {
                        // QEMU lets the file end within its last cluster.
                        self.image.must(host < self.image.length, || {
                            format!("data cluster at {host:#x} does not lie inside the file")
                        });
                        self.add(used, host, size);
                    }
                    Entry::Compressed { host, length } => self.add(used, host, length),
                    Entry::Unallocated | Entry::Zero(None) => {}
                }
            }
        }
    }
}

/// Walks everything. `member_tables` of the pool's L1 entries hold members; without it no snapshot is taken for a pool.
fn counted(image: &Image, member_tables: Option<u64>) -> Counted<'_> {
    let (header, size) = (&image.header, image.cluster_size());
    let (snapshots, table_length) = image.snapshots();
    let mut counted = Counted { image, clusters: BTreeMap::new() };
    counted.add(Use::Header, 0, size);
    counted.add(Use::RefcountTable, header.refcount_table_offset, u64::from(header.refcount_table_clusters) * size);
    for block in image.refcount_blocks().into_iter().filter(|block| *block != 0) {
        counted.add(Use::RefcountBlock, block, size);
    }
    counted.add(Use::SnapshotTable, header.snapshots_offset, table_length);
    counted.add_layer(header.l1_table_offset, header.l1_size, None);
    for snapshot in &snapshots {
        let directory = if snapshot.name == "dedup-pool" { member_tables } else { None };
        counted.add_layer(snapshot.l1_table_offset, snapshot.l1_size, directory);
    }
    for place in bitmaps(image).1 {
        counted.add(Use::Bitmap, place.start, place.end - place.start);
    }
    counted
}

/// Asserts that no writer can do harm, whatever went before: no refcount is below the references that there are, and COPIED, on
/// both levels, only where there is a single one.
pub(super) fn verify_harmless(image: &Image, member_tables: Option<u64>) {
    let counted = counted(image, member_tables);
    let refcounts = image.refcounts();
    for (cluster, (used, due)) in &counted.clusters {
        let stored = refcounts.get(*cluster as usize).copied().unwrap_or(0);
        image.must(stored >= *due, || format!("{used:?} cluster {cluster}: refcount {stored}, references {due}"));
    }
    let references = |host: u64| counted.clusters[&(host / image.cluster_size())].1;
    for table in image.active() {
        let (index, host) = (table.index, table.host);
        image.must(!table.copied || references(host) == 1, || {
            format!("L1 entry {index} is COPIED and its table shared")
        });
        for (slot, (entry, word)) in table.entries.iter().zip(&table.words).enumerate() {
            if let Entry::Data { host, .. } | Entry::Zero(Some(host)) = entry {
                image.must(word >> 63 == 0 || references(*host) == 1, || {
                    format!("L2 entry {slot} of table {index} is COPIED, references: {}", references(*host))
                });
            }
        }
    }
}

/// Compares each cluster's references with its refcount: nothing too low, nothing leaked.
pub(super) fn verify_refcounts(image: &Image, member_tables: Option<u64>) -> Vec<u64> {
    let counted = counted(image, member_tables);
    let refcounts = image.refcounts();
    let end = refcounts.len().max(*counted.clusters.keys().next_back().unwrap() as usize + 1);
    for cluster in 0..end {
        let stored = refcounts.get(cluster).copied().unwrap_or(0);
        let (used, due) = counted.clusters.get(&(cluster as u64)).copied().unwrap_or((Use::Data, 0));
        image.must(stored == due, || format!("{used:?} cluster {cluster}: refcount {stored}, references {due}"));
        image.must(due <= 1 || matches!(used, Use::Data | Use::L2), || {
            format!("{used:?} cluster {cluster} is used {due} times")
        });
    }
    refcounts
}

/// COPIED says refcount 1, in every entry of the active layer, on both levels.
pub(super) fn verify_copied(image: &Image, refcounts: &[u64]) {
    let count = |host: u64| refcounts[(host / image.cluster_size()) as usize];
    for table in image.active() {
        image.must(table.copied == (count(table.host) == 1), || format!("COPIED is wrong in L1 entry {}", table.index));
        for (slot, entry) in table.entries.iter().enumerate() {
            if let Entry::Data { host, copied, .. } = entry {
                image.must(*copied == (count(*host) == 1), || {
                    format!("COPIED is {copied} in L2 entry {slot} of table {}, refcount {}", table.index, count(*host))
                });
            }
        }
    }
}
