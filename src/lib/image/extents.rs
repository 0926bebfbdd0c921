//! From guest offsets to what is stored for them.

use std::ops::Range;

use crate::error::{Advice, Context, Error, OrInternal, Result, Table};
use crate::format::compressed::CompressedExtent;
use crate::format::table::{L2Entry, Subcluster, Subclusters, l1_target};
use crate::format::u64_at;
use crate::storage::{read_exact, read_padded};
use crate::units::{HostOffset, to_usize};

use crate::image::Qcow2;

/// A run of guest bytes that is stored in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// What is stored for it.
    pub place: Place,
}

/// Where a run of guest bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Not in this image: the backing file shows through.
    Unallocated,
    /// Zeros.
    Zero,
    /// At this offset of the file, one after the other.
    Data(HostOffset),
    /// In a compressed cluster.
    Compressed {
        /// Where the compressed bytes are.
        extent: CompressedExtent,
        /// How many bytes of the decompressed cluster come before this run.
        skip: u64,
    },
}

impl Qcow2 {
    /// Emits the extents of the guest bytes `start..start + len` in order. `slice` is scratch memory for entries.
    ///
    /// The range must lie inside the disk and, to bound the memory used, span at most a few MiB.
    ///
    /// # Errors
    /// Fails where a table cannot be read or an offset is impossible, naming the guest offset.
    #[doc(hidden)]
    pub fn extents(&self, start: u64, len: u64, slice: &mut Vec<u8>, mut emit: impl FnMut(Extent)) -> Result<()> {
        let bits = self.header.cluster_bits;
        let l2_entries = self.header.l2_entries();
        let entry_size = if self.header.extended_l2() { 16 } else { 8 };
        let end = start + len;
        let mut at = start;
        while at < end {
            let cluster = at >> bits.bits();
            let (l1_index, l2_index) = (cluster / l2_entries, cluster % l2_entries);
            let table_end = (l1_index + 1).saturating_mul(l2_entries << bits.bits());
            let stop = end.min(table_end);
            // A snapshot's L1 table may be cut short where the image is damaged, and only then.
            let l1 = match self.l1.get(to_usize(l1_index)) {
                Some(&l1) => l1,
                None if self.salvages => 0,
                None => return Err(Error::internal("a guest offset lies behind the L1 table")),
            };
            let Some(table) = l1_target(l1) else {
                emit(Extent { len: stop - at, place: Place::Unallocated });
                at = stop;
                continue;
            };
            // QEMU reads the file's end as zeros, which lead to nothing, and a table between clusters not at all.
            if self.salvages && self.table(l1).is_none() {
                let place = if self.is_unaligned(table) { Place::Zero } else { Place::Unallocated };
                emit(Extent { len: stop - at, place });
                at = stop;
                continue;
            }
            if self.is_unaligned(table) {
                return Err(Error::corrupt(format!("L2 table offset {table:#x} unaligned (L1 index: {l1_index:#x})"))
                    .at(table.0)
                    .advise(Advice::Check));
            }
            let count = bits.clusters(stop) - cluster;
            slice.resize(to_usize(count * entry_size), 0);
            let place = table.0 + l2_index * entry_size;
            if self.salvages {
                read_padded(&*self.storage, slice, place).reading(Table::L2, table)?;
            } else {
                read_exact(&*self.storage, slice, place, "L2 table")?;
            }
            for entry in slice.chunks_exact(to_usize(entry_size)) {
                let cluster_start = at & !(bits.bytes() - 1);
                let piece_end = stop.min(cluster_start + bits.bytes());
                self.cluster(entry, cluster_start, at..piece_end, &mut emit)?;
                at = piece_end;
            }
        }
        Ok(())
    }

    /// Emits the extents of `range`, which lies in the cluster at `cluster_start` described by `entry`.
    fn cluster(
        &self,
        entry: &[u8],
        cluster_start: u64,
        range: Range<u64>,
        emit: &mut impl FnMut(Extent),
    ) -> Result<()> {
        let bits = self.header.cluster_bits;
        let extended = self.header.extended_l2();
        let word = u64_at(entry, 0).or_internal("half an L2 entry")?;
        let (len, skip) = (range.end - range.start, range.start - cluster_start);
        let place = match L2Entry::decode(word, bits, !extended) {
            L2Entry::Compressed(extent) => {
                if extent.host.0 >= self.file_len {
                    return Err(self.past_end("compressed cluster", extent.host, range.start));
                }
                Place::Compressed { extent, skip }
            }
            L2Entry::Zero { .. } if self.header.version < 3 => {
                return Err(Error::corrupt(format!(
                    "Zero cluster entry found in pre-v3 image (guest offset: {:#x})",
                    range.start
                ))
                .advise(Advice::Check));
            }
            L2Entry::Zero { .. } => Place::Zero,
            L2Entry::Unallocated if !extended => Place::Unallocated,
            L2Entry::Unallocated => {
                return self.subclusters(entry, None, cluster_start, range, emit);
            }
            L2Entry::Data { host, .. } => {
                if host.0 & (bits.bytes() - 1) != 0 {
                    return Err(Error::corrupt(format!(
                        "Cluster allocation offset {host:#x} unaligned (guest offset: {:#x})",
                        range.start
                    ))
                    .at(host.0)
                    .advise(Advice::Check));
                }
                if host.0 >= self.file_len {
                    return Err(self.past_end("cluster", host, range.start));
                }
                if extended {
                    return self.subclusters(entry, Some(host), cluster_start, range, emit);
                }
                Place::Data(HostOffset(host.0 + skip))
            }
        };
        emit(Extent { len, place });
        Ok(())
    }

    /// Emits the pieces of a cluster with an extended L2 entry.
    fn subclusters(
        &self,
        entry: &[u8],
        host: Option<HostOffset>,
        cluster_start: u64,
        range: Range<u64>,
        emit: &mut impl FnMut(Extent),
    ) -> Result<()> {
        let bitmap = Subclusters(u64_at(entry, 8).or_internal("half an extended L2 entry")?);
        if bitmap.is_invalid(host.is_some()) {
            return Err(Error::corrupt(format!("Invalid cluster entry found (guest offset: {cluster_start:#x})"))
                .advise(Advice::Check));
        }
        let size = self.header.cluster_bits.bytes() / u64::from(Subclusters::COUNT);
        let mut start = cluster_start;
        for index in 0..Subclusters::COUNT {
            let (from, to) = (start.max(range.start), (start + size).min(range.end));
            start += size;
            if from >= to {
                continue;
            }
            let place = match (bitmap.get(index), host) {
                (Subcluster::Zero, _) => Place::Zero,
                (Subcluster::Allocated, Some(host)) => Place::Data(HostOffset(host.0 + (from - cluster_start))),
                _ => Place::Unallocated,
            };
            emit(Extent { len: to - from, place });
        }
        Ok(())
    }

    fn past_end(&self, what: &str, host: HostOffset, guest: u64) -> Error {
        Error::corrupt(format!(
            "{what} at {host:#x} (guest offset {guest:#x}) lies past the end of the file ({:#x}); is the file cut short?",
            self.file_len
        ))
    }

    /// The first part of `range` for which there is an L2 table.
    #[must_use]
    pub(crate) fn next_table(&self, range: Range<u64>) -> Option<Range<u64>> {
        let span = self.header.cluster_bits.bytes() * self.header.l2_entries();
        let range = range.start..range.end.min(self.size);
        let first = usize::try_from(range.start / span).ok()?;
        let end = usize::try_from(range.end.div_ceil(span)).ok()?.min(self.l1.len());
        let index = (first..end).find(|&i| self.l1.get(i).is_some_and(|&e| self.table(e).is_some()))?;
        let start = (index as u64).checked_mul(span)?;
        let table = start.max(range.start)..start.saturating_add(span).min(range.end);
        (!table.is_empty()).then_some(table)
    }

    /// Whether `other`, a snapshot of the same file, has the same L2 tables for all of `range`.
    pub(crate) fn has_tables_of(&self, other: &Self, range: &Range<u64>) -> bool {
        let span = self.header.cluster_bits.bytes() * self.header.l2_entries();
        let table = |image: &Self, index: u64| image.l1.get(to_usize(index)).copied().and_then(l1_target);
        (range.start / span..range.end.div_ceil(span)).all(|index| table(self, index) == table(other, index))
    }
}
