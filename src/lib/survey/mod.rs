//! What a sound image holds: its L2 tables, its distinct data clusters, its pool.

pub(crate) mod tables;
pub(crate) mod units;

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::check::finding::{Finding, Severity};
use crate::check::{CheckOptions, Inspection, inspect};
use crate::error::{Advice, Error, OrInternal, Result};
use crate::format::header::incompatible;
use crate::format::l2;
use crate::format::table::L2Entry;
use crate::image::read_header;
use crate::pool::directory::Record;
use crate::progress::Stage;
use crate::sort::sequence::Spill;
use crate::storage::Storage;
use crate::storage::buffer::{collected, zeroed};
use crate::units::{GuestCluster, to_usize};
use crate::work::Work;

use crate::sort::bits::{Bits, Ranked};
use tables::L2Tables;
use units::{Content, Units};

/// A sound image, its data clusters and its pool.
pub(crate) struct Ground {
    pub(crate) inspection: Inspection,
    pub(crate) units: Units,
    /// The pool's place in the snapshot table.
    pub(crate) pool_index: Option<usize>,
    /// The units in the pool.
    pub(crate) members: Ranked,
    /// Records of the members, in unit order; none where the directory cannot be used.
    records: Option<Vec<Record>>,
    /// Whether there is no pool, or one whose members ascend.
    pub(crate) is_ascending: bool,
}

impl Ground {
    /// Surveys an image that was inspected.
    pub(crate) fn new(storage: &dyn Storage, inspection: Inspection) -> Result<Self> {
        Self::with_room(storage, inspection, 0)
    }

    /// Surveys an image that was inspected and whose file may grow by `room` data clusters.
    pub(crate) fn with_room(storage: &dyn Storage, mut inspection: Inspection, room: u64) -> Result<Self> {
        let pool = inspection.pool.take();
        let pool_index = pool.as_ref().map(|known| known.index);
        let is_ascending = pool.as_ref().is_none_or(|known| known.ascending);
        let (entries, records) = pool.map_or_else(Default::default, |known| (known.members, known.records));
        let header = &inspection.header;
        let tables = L2Tables::new(storage, header, &inspection.tables);
        let units = Units::survey(header, inspection.file_len, &tables, &entries, room)?;
        let unit = |&word: &u64| units.of(L2Entry::decode(word, header.cluster_bits, true));
        let numbers: Vec<Option<u64>> = collected(entries.iter().map(unit))?;
        let mut members = Bits::new(units.limit());
        numbers.iter().flatten().for_each(|&unit| members.insert(unit));
        let records = records.map(|records| {
            let known =
                numbers.iter().zip(records).filter_map(|(unit, record)| Some((unit.as_ref().copied()?, record)));
            let mut by_unit: Vec<(u64, Record)> = known.collect();
            by_unit.sort_by_key(|(unit, _)| *unit);
            by_unit.dedup_by_key(|(unit, _)| *unit);
            by_unit.into_iter().map(|(_, record)| record).collect()
        });
        Ok(Self { inspection, units, pool_index, members: members.ranked(), records, is_ascending })
    }

    /// The content of the units.
    pub(crate) fn content<'a>(&'a self, storage: &'a dyn Storage) -> Content<'a> {
        Content { storage, header: &self.inspection.header, units: &self.units }
    }

    /// Whether the pool has a directory in order.
    pub(crate) fn has_records(&self) -> bool {
        self.records.is_some()
    }

    /// What the pool's directory says of `unit`.
    pub(crate) fn record(&self, unit: u64) -> Option<&Record> {
        self.records.as_ref()?.get(to_usize(self.members.rank(unit)?))
    }

    /// Members that the disk or a snapshot uses.
    pub(crate) fn used_members(&self) -> u64 {
        self.members.bits().iter().filter(|&unit| self.units.users(unit) > 0).count() as u64
    }
}

/// Tells the lowest and the highest guest cluster, of the disk and of all snapshots, that map to each of `wanted`, in unit order.
pub(crate) fn guests(
    ground: &Ground,
    storage: &dyn Storage,
    wanted: Bits,
    spill: &Spill,
    work: &Work,
    mut tell: impl FnMut(u64, RangeInclusive<GuestCluster>) -> Result<()>,
) -> Result<()> {
    let header = &ground.inspection.header;
    let wanted = wanted.ranked();
    let tables = L2Tables::new(storage, header, &ground.inspection.tables);
    let mut numbers = wanted.bits().iter();
    for first in (0..wanted.bits().len()).step_by(spill.words()) {
        work.cancel.check()?;
        let batch = spill.words().min(to_usize(wanted.bits().len() - first));
        let lowest: Vec<AtomicU64> = collected((0..batch).map(|_| AtomicU64::new(u64::MAX)))?;
        let highest: Vec<AtomicU64> = zeroed(batch)?;
        tables.visit(
            |table, content| {
                for (index, entry) in l2::entries(header, content) {
                    let rank = ground.units.of(entry).and_then(|unit| wanted.rank(unit)?.checked_sub(first));
                    // Later ones come with a later batch.
                    let Some(at) = rank.map(to_usize).filter(|&at| at < batch) else { continue };
                    let lowest = lowest.get(at).or_internal("a wanted unit has no place in its batch")?;
                    let highest = highest.get(at).or_internal("a wanted unit has no place in its batch")?;
                    for guest in table.guests(index) {
                        lowest.fetch_min(guest.0, Ordering::Relaxed);
                        highest.fetch_max(guest.0, Ordering::Relaxed);
                    }
                }
                Ok(())
            },
            |()| Ok(()),
        )?;
        for ((lowest, highest), unit) in lowest.iter().zip(&highest).zip(numbers.by_ref()) {
            let [lowest, highest] = [lowest, highest].map(|guest| GuestCluster(guest.load(Ordering::Relaxed)));
            tell(unit, lowest..=highest)?;
        }
    }
    Ok(())
}

/// The inspection of an image that is sound but perhaps for leaks; every leak goes to `leaks`. One that was not closed cleanly may have
/// wrong refcounts, which do not matter to who only reads: nothing that is planned for it is done before they are right.
pub(crate) fn sound(
    storage: &dyn Storage,
    phase: Stage,
    work: &Work,
    mut leaks: impl FnMut(&Finding) + Send,
) -> Result<Inspection> {
    let unclean = read_header(storage)?.incompatible & incompatible::DIRTY != 0;
    let mut first = None;
    let mut sink = |finding: &Finding| match finding.severity {
        Severity::Leak => leaks(finding),
        Severity::Benign => {}
        _ if unclean && finding.kind.is_of_counts() => {}
        _ => {
            first.get_or_insert_with(|| finding.kind.to_string());
        }
    };
    let inspection = inspect(storage, CheckOptions::default(), work, phase, &mut sink)?;
    match first {
        None => Ok(inspection),
        Some(first) => Err(Error::corrupt(format!("the image is damaged ({first})")).advise(Advice::CheckAndRepair)),
    }
}
