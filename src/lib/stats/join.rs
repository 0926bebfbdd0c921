//! What the disk's clusters hold, brought together with where the file has them.

use std::iter::Peekable;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::map::Cells;
use super::metadata::{Mapped, Metadata, mapped};
use crate::check::tables::L2Reference;
use crate::error::{Error, Result};
use crate::format::l2;
use crate::sort::bits::Bits;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sorter, Spill};
use crate::storage::{Storage, read_padded};
use crate::survey::Ground;
use crate::units::to_usize;
use crate::work::Work;

/// L2 tables that are read at once, as bytes: bounds the memory of a batch.
const BATCH: u64 = 16 << 20;

/// Where no unit is.
const NONE: u64 = u64::MAX;

/// What the scan of the disk tells of the file.
pub(super) struct Joined {
    /// For each unit that is not zero, what it holds and its number.
    pub(super) records: Sorter<ContentAt>,
    /// The units of which the content is known.
    pub(super) known: Bits,
    /// Those that hold nothing but zeros.
    pub(super) zeros: Bits,
    /// Clusters of the disk that are allocated and hold nothing but zeros.
    pub(super) stored_zeros: u64,
}

/// Walks the disk's L2 tables beside `records`, those of its clusters in guest order.
pub(super) fn join(
    metadata: &Metadata,
    storage: &dyn Storage,
    records: impl Iterator<Item = Result<ContentAt>>,
    mut cells: Option<&mut Cells>,
    spill: &Spill,
    work: &Work,
) -> Result<Joined> {
    let Ground { inspection, units, .. } = &metadata.ground;
    let header = &inspection.header;
    let total = header.cluster_bits.clusters(header.size);
    // Of a cluster that reaches past the end of the disk the scan has seen a part only. With subclusters no more counts.
    let whole = if header.extended_l2() { total } else { header.size >> header.cluster_bits.bits() };
    let mut references: Vec<L2Reference> =
        inspection.tables.references.iter().filter(|reference| reference.layer == 0).copied().collect();
    references.sort_unstable_by_key(|reference| reference.index);
    let mut joined = Joined {
        records: Sorter::new(spill),
        known: Bits::new(units.limit()),
        zeros: Bits::new(units.limit()),
        stored_zeros: 0,
    };
    let end = if whole < total { unit_at(&metadata.ground, storage, &references, whole)? } else { NONE };
    let mut records = records.peekable();
    let per_batch = to_usize(BATCH / header.cluster_bits.bytes()).max(8);
    for batch in references.chunks(per_batch) {
        work.cancel.check()?;
        let tables: Vec<Result<Vec<u64>>> =
            batch.par_iter().map(|reference| units_of(&metadata.ground, storage, *reference)).collect();
        for (reference, table) in batch.iter().zip(tables) {
            let first = u64::from(reference.index) * header.l2_entries();
            for (guest, unit) in (first..total).zip(table?).filter(|(_, unit)| *unit != NONE) {
                let record = record_of(&mut records, guest)?;
                if record.is_some() && metadata.users.get(unit) > 1 {
                    cells.iter_mut().for_each(|cells| cells.add_shared(guest, unit == end));
                }
                joined.stored_zeros += u64::from(record.is_none());
                if guest < whole && !joined.known.contains(unit) {
                    joined.known.insert(unit);
                    match record {
                        Some(record) => joined.records.push(record.at(unit))?,
                        None => joined.zeros.insert(unit),
                    }
                }
            }
        }
    }
    Ok(joined)
}

/// The record of cluster `guest`, if it is not zero. What comes before it is skipped: a backing file has it.
fn record_of<I: Iterator<Item = Result<ContentAt>>>(
    records: &mut Peekable<I>,
    guest: u64,
) -> Result<Option<ContentAt>> {
    let before = |record: &Result<ContentAt>| record.as_ref().is_ok_and(|record| record.cluster() < guest);
    while records.next_if(before).is_some() {}
    records
        .next_if(|record| record.as_ref().is_ok_and(|record| record.cluster() == guest) || record.is_err())
        .transpose()
}

/// The unit that guest cluster `guest` is stored in.
fn unit_at(ground: &Ground, storage: &dyn Storage, references: &[L2Reference], guest: u64) -> Result<u64> {
    let entries = ground.inspection.header.l2_entries();
    let Some(reference) = references.iter().find(|reference| u64::from(reference.index) == guest / entries) else {
        return Ok(NONE);
    };
    let at = to_usize(guest % entries);
    Ok(units_of(ground, storage, *reference)?.get(at).copied().unwrap_or(NONE))
}

/// The units that the entries of an L2 table lead to.
fn units_of(ground: &Ground, storage: &dyn Storage, reference: L2Reference) -> Result<Vec<u64>> {
    let header = &ground.inspection.header;
    let mut content = vec![0; header.cluster_bits.len()];
    let host = reference.table;
    read_padded(storage, &mut content, host.0)
        .map_err(|e| Error::io(format_args!("Could not read the L2 table at {host:#x}"), e))?;
    let unit = |slot| match mapped(slot, header) {
        Mapped::Stored(entry) => ground.units.of(entry).unwrap_or(NONE),
        Mapped::Zero | Mapped::Unallocated => NONE,
    };
    Ok(l2::slots(header, &content).map(unit).collect())
}
