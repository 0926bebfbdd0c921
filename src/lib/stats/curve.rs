//! What each cluster size leads to, from the records of one scan.

use super::report::CurvePoint;
use crate::convert::ConvertOptions;
use crate::convert::size::layout;
use crate::dedup::index;
use crate::dedup::level::{Distinct, Larger, distinct};
use crate::dedup::sequence::{Sequence, Sorted, Spill};
use crate::error::{ErrorKind, Result};
use crate::units::{ClusterBits, percent};
use crate::work::Work;

/// Records in guest order.
pub(super) struct Ordered {
    pub(super) records: Sequence,
    pub(super) bits: ClusterBits,
    /// L2 tables that map one of the clusters.
    l2_tables: u64,
    table: Option<u64>,
}

impl Ordered {
    pub(super) fn new(bits: ClusterBits, spill: &Spill) -> Self {
        Self { records: Sequence::new(spill), bits, l2_tables: 0, table: None }
    }

    pub(super) fn push(&mut self, word: u128) -> Result<()> {
        let table = index(word) / self.bits.entries();
        if self.table.replace(table) != Some(table) {
            self.l2_tables += 1;
        }
        self.records.push(word)
    }

    /// The records of clusters twice the size.
    fn doubled(&self, spill: &Spill) -> Result<Option<Self>> {
        let Some(bits) = ClusterBits::new(self.bits.bits() + 1) else { return Ok(None) };
        let mut larger = Self::new(bits, spill);
        for word in Larger::new(self.records.iter(), 1) {
            larger.push(word?)?;
        }
        Ok(Some(larger))
    }
}

/// Hands the sorted records of every cluster size from that of `ordered` up to `last` to `visit`, in turn. Each size is made from
/// the one before, which halves the work from size to size.
pub(super) fn each_size(
    ordered: Ordered,
    last: ClusterBits,
    spill: &Spill,
    work: &Work<'_>,
    mut visit: impl FnMut(ClusterBits, u64, &Sorted) -> Result<()>,
) -> Result<()> {
    let mut next = Some(ordered);
    while let Some(current) = next {
        work.cancel.check()?;
        next = if current.bits < last { current.doubled(spill)? } else { None };
        let Ordered { records, bits, l2_tables, .. } = current;
        visit(bits, l2_tables, &records.into_sorted()?)?;
    }
    Ok(())
}

/// What `convert` would make of a disk of `size` bytes with these records; `None` at a cluster size at which QEMU cannot map it.
pub(super) fn point(bits: ClusterBits, size: u64, l2_tables: u64, records: &Sorted) -> Result<Option<CurvePoint>> {
    let options = ConvertOptions::default();
    let data = records.len();
    let found = distinct(records, options.refcount_bits.sharer_limit().unwrap_or(u64::MAX))?;
    let lengths = layout(&options, bits, size, found, l2_tables).and_then(|file| {
        let plain = layout(&options, bits, size, Distinct { stored: data, shared: 0 }, l2_tables)?;
        // Without deduplication there is no pool.
        let pool = plain.data.start.0 - plain.pool_l1.start.0;
        Ok((file.file_len(), plain.file_len() - (pool << bits.bits())))
    });
    let (file, plain) = match lengths {
        Ok(lengths) => lengths,
        Err(e) if e.kind() == ErrorKind::Limit => return Ok(None),
        Err(e) => return Err(e),
    };
    let signed = |length: u64| i64::try_from(length).unwrap_or(i64::MAX);
    Ok(Some(CurvePoint {
        cluster_size_bytes: bits.bytes(),
        data_clusters: data,
        data_bytes: data << bits.bits(),
        distinct_clusters: found.stored,
        distinct_bytes: found.stored << bits.bits(),
        duplicate_percent: percent(data - found.stored, data),
        metadata_bytes: file - (found.stored << bits.bits()),
        file_length_bytes: file,
        plain_length_bytes: plain,
        saved_bytes: signed(plain) - signed(file),
    }))
}
