//! What each cluster size leads to, from the records of one scan.

use super::report::CurvePoint;
use crate::build::layout::{Layout, Parts};
use crate::dedup::larger::Larger;
use crate::dedup::level::distinct;
use crate::error::{ErrorKind, Result};
use crate::format::refcount::RefcountBits;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sequence, Sorted, Spill};
use crate::units::{ClusterBits, percent};
use crate::work::Work;

/// The L2 tables that map clusters, counted in guest order.
struct L2Count {
    entries: u64,
    tables: u64,
    last: Option<u64>,
}

impl L2Count {
    fn add(&mut self, cluster: u64) {
        let table = cluster / self.entries;
        self.tables += u64::from(self.last.replace(table) != Some(table));
    }
}

/// Hands the sorted records of each of `sizes`, which ascend, and the number of L2 tables to `visit`. `records` are those of the first
/// size, in guest order. Each size is made from the one before: all together cost little more than the first.
pub(super) fn each_size(
    records: Sequence<ContentAt>,
    sizes: &[ClusterBits],
    spill: &Spill,
    work: &Work,
    mut visit: impl FnMut(ClusterBits, u64, &Sorted<ContentAt>) -> Result<()>,
) -> Result<()> {
    let mut current = records;
    let larger = sizes.iter().skip(1).map(|&bits| Some(bits)).chain([None]);
    for (&bits, larger) in sizes.iter().zip(larger) {
        work.cancel.check()?;
        let mut count = L2Count { entries: bits.entries(), tables: 0, last: None };
        let mut next = Sequence::new(spill);
        let records = current.iter().inspect(|record| {
            if let Ok(record) = record {
                count.add(record.cluster());
            }
        });
        match larger {
            Some(larger) => {
                for record in Larger::new(records, bits, larger) {
                    next.push(record?)?;
                }
            }
            None => records.into_iter().try_for_each(|record| record.map(|_| ()))?,
        }
        visit(bits, count.tables, &std::mem::replace(&mut current, next).into_sorted()?)?;
    }
    Ok(())
}

/// What `convert` would make of a disk of `size` bytes with these records; `None` at a cluster size at which QEMU cannot map it.
pub(super) fn point(
    bits: ClusterBits,
    size: u64,
    l2_tables: u64,
    records: &Sorted<ContentAt>,
) -> Result<Option<CurvePoint>> {
    let width = RefcountBits::DEFAULT;
    let data = records.len();
    let found = distinct(records, width.sharer_limit().unwrap_or(u64::MAX), |cluster| cluster)?;
    let members = Some(found.shared);
    let parts = Parts { l2_tables, members, data: found.stored, ..Parts::empty(bits, width, size) };
    let lengths = Layout::new(parts).and_then(|file| {
        let plain = Layout::new(Parts { data, members: None, ..file.parts })?;
        Ok((file.file_len(), plain.file_len()))
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
