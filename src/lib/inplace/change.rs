//! What is known of an image, and a change of it: the value that is applied.

use std::collections::HashMap;

use super::bits::{Bits, Ranked};
use super::members::NewMember;
use super::tables::L2Tables;
use super::units::{Content, Units};
use crate::check::Inspection;
use crate::check::finding::{Finding, Severity};
use crate::check::{CheckOptions, inspect};
use crate::dedup::sequence::{Sequence, Sorted, Sorter, Spill};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::incompatible;
use crate::format::table::L2Entry;
use crate::pool::directory::Record;
use crate::storage::Storage;
use crate::work::Work;

/// A sound image, its data clusters and its pool.
pub(super) struct Ground {
    pub(super) inspection: Inspection,
    pub(super) units: Units,
    /// The pool's place in the snapshot table.
    pub(super) pool_index: Option<usize>,
    /// The units in the pool.
    pub(super) members: Ranked,
    /// Records of the members, in unit order; none where the directory cannot be used.
    records: Option<Vec<Record>>,
    /// Whether there is no pool, or one whose members ascend.
    is_ascending: bool,
}

impl Ground {
    /// Surveys an image that was inspected.
    pub(super) fn new(storage: &dyn Storage, mut inspection: Inspection) -> Result<Self> {
        let pool = inspection.pool.take();
        let pool_index = pool.as_ref().map(|known| known.index);
        let is_ascending = pool.as_ref().is_none_or(|known| known.ascending);
        let (entries, records) = pool.map_or_else(Default::default, |known| (known.members, known.records));
        let header = &inspection.header;
        let tables = L2Tables::new(storage, header, &inspection.tables);
        let units = Units::survey(header, inspection.file_len, &tables, &entries)?;
        let unit = |&word: &u64| units.of(L2Entry::decode(word, header.cluster_bits, true));
        let numbers: Vec<Option<u64>> = entries.iter().map(unit).collect();
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
    pub(super) fn content<'a>(&'a self, storage: &'a dyn Storage) -> Content<'a> {
        Content { storage, header: &self.inspection.header, units: &self.units }
    }

    /// Whether the pool has a directory in order.
    pub(super) fn has_records(&self) -> bool {
        self.records.is_some()
    }

    /// What the pool's directory says of `unit`.
    pub(super) fn record(&self, unit: u64) -> Option<&Record> {
        let rank = usize::try_from(self.members.rank(unit)?).ok()?;
        self.records.as_ref()?.get(rank)
    }

    /// Members that the disk or a snapshot uses.
    pub(super) fn used_members(&self) -> u64 {
        self.members.bits().iter().filter(|&unit| self.units.users(unit) > 0).count() as u64
    }
}

/// A change of an image.
pub(super) struct Change {
    pub(super) ground: Ground,
    /// Duplicate and keeper, both units; sorted by duplicate.
    pub(super) links: Sorted,
    pub(super) duplicates: Ranked,
    /// Units that hold nothing but zeros.
    pub(super) zeros: Bits,
    /// Whether entries with the zero flag lose the place that they keep.
    pub(super) frees_kept: bool,
    /// What enters the pool: [`NewMember`] words in unit order.
    pub(super) joining: Sequence,
    /// All members that the pool will have.
    pub(super) members_after: Bits,
    /// Whether the pool goes.
    pub(super) drops_pool: bool,
    /// Whether an image of version 2 becomes version 3.
    pub(super) may_upgrade: bool,
    /// How many duplicates are redirected together.
    pub(super) batch: usize,
}

impl Change {
    /// A change of nothing.
    pub(super) fn none(ground: Ground, spill: &Spill) -> Result<Self> {
        Ok(Self {
            links: Sorter::new(spill).finish()?,
            duplicates: Bits::new(0).ranked(),
            zeros: Bits::new(0),
            frees_kept: false,
            joining: Sequence::new(spill),
            members_after: Bits::new(ground.units.limit()),
            drops_pool: false,
            may_upgrade: false,
            batch: spill.words() * 2,
            ground,
        })
    }

    /// Whether nothing will lead to `unit` any more.
    pub(super) fn is_gone(&self, unit: u64) -> bool {
        self.duplicates.bits().contains(unit) || self.zeros.contains(unit)
    }

    /// What enters the pool, in unit order.
    pub(super) fn joining(&self) -> impl Iterator<Item = Result<NewMember>> + '_ {
        self.joining.iter().map(|word| word.map(NewMember::decode))
    }

    /// Whether there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        let inspection = &self.ground.inspection;
        let dirty = inspection.header.incompatible & incompatible::DIRTY != 0;
        !self.changes_content() && !self.changes_pool() && inspection.report.leaks == 0 && !dirty
    }

    /// Whether L2 entries change.
    pub(super) fn changes_content(&self) -> bool {
        !self.links.is_empty() || self.zeros.len() > 0 || self.frees_kept && self.ground.units.kept_by_zeros.len() > 0
    }

    /// Whether the pool is written anew, or goes.
    pub(super) fn changes_pool(&self) -> bool {
        let has_pool = self.ground.pool_index.is_some();
        !self.joining.is_empty()
            || has_pool && (self.drops_pool || !self.ground.has_records() || !self.ground.is_ascending)
            || self.ground.members.bits().len() != self.members_after.len()
    }

    /// Whether the image will get version 3: a snapshot, and the pool is one, blocks the resizing of version 2 images.
    pub(super) fn upgrades(&self) -> bool {
        self.may_upgrade && self.ground.inspection.header.version < 3 && !self.is_empty()
    }

    /// Clusters of the file with data that nothing will use any more.
    pub(super) fn gone_clusters(&self) -> Bits {
        let Ground { units, members, inspection, .. } = &self.ground;
        let dropped = |unit: u64| members.bits().contains(unit) && !self.members_after.contains(unit);
        let goes = |&unit: &u64| self.is_gone(unit) || units.users(unit) == 0 && dropped(unit);
        let mut gone = Bits::new(units.plain().end);
        units.plain().filter(goes).for_each(|unit| gone.insert(unit));
        if self.frees_kept {
            let unused = |&unit: &u64| units.users(unit) == 0 && !members.bits().contains(unit);
            units.kept_by_zeros.iter().filter(unused).for_each(|unit| gone.insert(unit));
        }
        // Compressed neighbours share host clusters: one is free when the last of them goes.
        let mut left = HashMap::new();
        for unit in units.compressed().filter(goes) {
            let references = units.users(unit) + u64::from(members.bits().contains(unit));
            for host in units.hosts(unit) {
                let left = left.entry(host).or_insert_with(|| inspection.counts.get(host));
                *left = left.saturating_sub(references);
                if *left == 0 && references > 0 {
                    gone.insert(host);
                }
            }
        }
        gone
    }
}

/// The inspection of an image that is sound but perhaps for leaks; every leak goes to `leaks`.
pub(super) fn sound(
    storage: &dyn Storage,
    phases: u32,
    work: &Work<'_>,
    mut leaks: impl FnMut(&Finding) + Send,
) -> Result<Inspection> {
    let mut first = None;
    let mut sink = |finding: &Finding| match finding.severity {
        Severity::Leak => leaks(finding),
        Severity::Benign => {}
        _ => {
            first.get_or_insert_with(|| finding.kind.to_string());
        }
    };
    let inspection = inspect(storage, CheckOptions::default(), work, (0, phases), &mut sink)?;
    match first {
        None => Ok(inspection),
        Some(first) => {
            let message = format!("the image is damaged ({first}); see dedup-img check, and check -r all");
            Err(Error::new(ErrorKind::Corrupt, message))
        }
    }
}
