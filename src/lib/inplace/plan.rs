//! What deduplication in place will do. Nothing is written while a plan is made.

use std::path::Path;

use super::apply::upgraded;
use super::bits::{Bits, Ranked};
use super::choose::Choice;
use super::members::{NewMember, new_members};
use super::scan::{Key, named, scan, to_read};
use super::tables::L2Tables;
use super::units::{Content, Units};
use super::{DedupOptions, PHASES};
use crate::check::finding::{Finding, Severity};
use crate::check::{CheckOptions, Inspection, inspect};
use crate::dedup::group::Link;
use crate::dedup::sequence::{Sequence, Sorted, Spill};
use crate::dedup::verify::verify;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, MAX_SNAPSHOTS, incompatible};
use crate::format::table::L2Entry;
use crate::image::read_header;
use crate::pool;
use crate::pool::directory::Record;
use crate::storage::Storage;
use crate::units::HostOffset;
use crate::work::Work;

/// What deduplication of an image will do: a value that can be looked at, and then applied or dropped.
pub struct Plan {
    pub(super) options: DedupOptions,
    pub(super) inspection: Inspection,
    pub(super) units: Units,
    /// The pool's place in the snapshot table, before.
    pub(super) pool_index: Option<usize>,
    /// The units in the pool, before.
    pub(super) members: Ranked,
    /// Records of the members, in unit order; none where the directory cannot be used.
    pub(super) records: Option<Vec<Record>>,
    /// Duplicate and keeper, both units; sorted by duplicate.
    pub(super) links: Sorted,
    pub(super) duplicates: Ranked,
    pub(super) zeros: Bits,
    /// What enters the pool: [`NewMember`] words in unit order.
    pub(super) joining: Sequence,
    /// All members that the pool will have.
    pub(super) members_after: Bits,
    /// How many duplicates are redirected together.
    pub(super) batch: usize,
    pub(super) figures: Figures,
}

/// The figures of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Distinct data clusters that the disk or a snapshot uses.
    pub scanned: u64,
    /// Those that were read.
    pub read: u64,
    /// Those that hold nothing but zeros.
    pub zero: u64,
    /// Those that another one replaces.
    pub duplicate: u64,
    /// Those that replace others and were not in the pool before.
    pub newly_shared: u64,
    /// Members of the pool that the disk or a snapshot used before.
    pub already_shared: u64,
    /// Clusters of the file that nothing will use any more, the old pool's own left out.
    pub freed: u64,
    /// Members that the pool will have.
    pub pool_members: u64,
}

/// A duplicate as a plan shows it. Offsets are in bytes; that of a compressed cluster is where its compressed bytes begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The cluster that will not be used any more.
    pub duplicate: HostOffset,
    /// The one that replaces it.
    pub keeper: HostOffset,
    /// How many L2 entries change for that, as QEMU counts them.
    pub references: u64,
}

impl Plan {
    /// Checks and reads the image in `storage`. Large tables go to temporary files in `scratch`.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Unsupported`] and [`ErrorKind::Corrupt`] for images that are refused by name.
    pub fn new(storage: &dyn Storage, options: DedupOptions, scratch: &Path, work: &Work<'_>) -> Result<Self> {
        let header = read_header(storage)?;
        let limit = refuse(&header)?;
        if header.version < 3 {
            upgraded(&header)?;
        }
        let inspection = sound(storage, work)?;
        refuse_snapshots(&inspection)?;
        work.run(|| Self::find(storage, options, inspection, limit, &work.spill(scratch), work))
    }

    fn find(
        storage: &dyn Storage,
        options: DedupOptions,
        mut inspection: Inspection,
        limit: u64,
        spill: &Spill,
        work: &Work<'_>,
    ) -> Result<Self> {
        let pool = inspection.pool.take();
        let pool_index = pool.as_ref().map(|known| known.index);
        let header = &inspection.header;
        let bits = header.cluster_bits;
        let tables = L2Tables::new(storage, header, &inspection.tables);
        let (entries, records) = pool.map_or_else(Default::default, |known| (known.members, known.records));
        let units = Units::survey(header, inspection.file_len, &tables, &entries)?;
        let content = Content { storage, header, units: &units };

        let mut members = Bits::new(units.limit());
        let numbers: Vec<Option<u64>> =
            entries.iter().map(|&word| units.of(L2Entry::decode(word, bits, true))).collect();
        numbers.iter().flatten().for_each(|&unit| members.insert(unit));
        let records = records.map(|records| {
            let mut by_unit: Vec<(u64, Record)> = numbers
                .iter()
                .zip(records)
                .filter_map(|(unit, record)| Some((unit.as_ref().copied()?, record)))
                .collect();
            by_unit.sort_unstable_by_key(|(unit, _)| *unit);
            by_unit
        });

        let nothing = Bits::new(0);
        let key = if records.as_ref().is_some_and(|r| !r.is_empty()) { Key::Sha256 } else { Key::Fingerprint };
        let known = if key == Key::Sha256 { &members } else { &nothing };
        work.progress.phase(1, PHASES, "scanning", to_read(&units, known) << bits.bits());
        let mut found = scan(&content, known, key, spill, work)?;
        if key == Key::Sha256 {
            for (unit, record) in records.iter().flatten() {
                found.records.push(named(&record.sha256, *unit))?;
            }
        }
        let found_records = found.records.into_sorted()?;
        let choice = Choice { units: &units, counts: &inspection.counts, members: &members, limit };
        let links = choice.links(&found_records, spill)?;
        drop(found_records);
        work.progress.phase(2, PHASES, "comparing", links.len() << bits.bits());
        let links = verify(&content, links, |records| choice.links(records, spill), spill, work)?;

        let (mut duplicates, mut keepers) = (Bits::new(units.limit()), Bits::new(units.limit()));
        for word in links.iter() {
            let link = Link::from_duplicate(word?);
            duplicates.insert(link.duplicate);
            keepers.insert(link.keeper);
        }
        let mut plan = Self {
            options,
            pool_index,
            members: members.ranked(),
            records: records.map(|records| records.into_iter().map(|(_, record)| record).collect()),
            links,
            duplicates: duplicates.ranked(),
            batch: spill.words() * 2,
            zeros: found.zeros,
            joining: Sequence::new(spill),
            members_after: Bits::new(0),
            figures: Figures { read: found.read, ..Figures::default() },
            units,
            inspection,
        };
        plan.joining = new_members(&plan, storage, &keepers, spill, work)?;
        plan.members_after = plan.all_members()?;
        plan.count(&keepers);
        Ok(plan)
    }

    /// Members that stay, and those that join.
    fn all_members(&self) -> Result<Bits> {
        let mut after = Bits::new(self.units.limit());
        if self.records.is_some() {
            self.members.bits().iter().filter(|&unit| !self.is_gone(unit)).for_each(|unit| after.insert(unit));
        }
        for new in self.joining() {
            after.insert(new?.unit);
        }
        Ok(after)
    }

    /// Whether nothing will lead to `unit` any more.
    pub(super) fn is_gone(&self, unit: u64) -> bool {
        self.duplicates.bits().contains(unit) || self.zeros.contains(unit)
    }

    /// What the pool's directory says of `unit`.
    pub(super) fn record(&self, unit: u64) -> Option<&Record> {
        let rank = usize::try_from(self.members.rank(unit)?).ok()?;
        self.records.as_ref()?.get(rank)
    }

    fn count(&mut self, keepers: &Bits) {
        let used = |&unit: &u64| self.units.users(unit) > 0;
        let before = self.members.bits();
        self.figures = Figures {
            scanned: (0..self.units.limit()).filter(used).count() as u64,
            read: self.figures.read,
            zero: self.zeros.len(),
            duplicate: self.duplicates.bits().iter().filter(used).count() as u64,
            newly_shared: keepers.iter().filter(|&unit| !before.contains(unit)).count() as u64,
            already_shared: before.iter().filter(used).count() as u64,
            freed: self.freed(),
            pool_members: self.members_after.len(),
        };
    }

    /// Clusters that nothing will use any more.
    fn freed(&self) -> u64 {
        let dropped = |&unit: &u64| self.members.bits().contains(unit) && !self.members_after.contains(unit);
        let unused = |&unit: &u64| self.units.users(unit) == 0 && !self.members.bits().contains(unit);
        let goes = |&unit: &u64| self.is_gone(unit) || self.units.users(unit) == 0 && dropped(&unit);
        let mut freed = self.units.plain().filter(goes).count() as u64;
        freed += self.units.kept_by_zeros.iter().filter(unused).count() as u64;
        // Compressed neighbours share host clusters: one is free when the last of them goes.
        let mut left = std::collections::HashMap::new();
        for unit in self.units.compressed().filter(goes) {
            let references = self.units.users(unit) + u64::from(self.members.bits().contains(unit));
            for host in self.units.hosts(unit) {
                let left = left.entry(host).or_insert_with(|| self.inspection.counts.get(host));
                *left = left.saturating_sub(references);
                freed += u64::from(*left == 0 && references > 0);
            }
        }
        freed
    }

    /// The figures.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.figures
    }

    /// Cluster size of the image in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.inspection.header.cluster_bits.bytes()
    }

    /// Whether there is nothing to do: no duplicates, no zeros, no leaks, nothing to pool, and a pool in order.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.changes_content() && !self.changes_pool() && self.inspection.report.leaks == 0 && !self.is_dirty()
    }

    /// Whether L2 entries change.
    pub(super) fn changes_content(&self) -> bool {
        !self.links.is_empty() || self.zeros.len() > 0 || self.units.kept_by_zeros.len() > 0
    }

    /// Whether the pool is written anew.
    pub(super) fn changes_pool(&self) -> bool {
        !self.joining.is_empty()
            || self.pool_index.is_some() && self.records.is_none()
            || self.members.bits().len() != self.members_after.len()
    }

    fn is_dirty(&self) -> bool {
        self.inspection.header.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image will get version 3: a snapshot, and the pool is one, blocks the resizing of version 2 images.
    #[must_use]
    pub fn upgrades(&self) -> bool {
        self.inspection.header.version < 3 && !self.is_empty()
    }

    /// The duplicates, in the order of the file.
    pub fn shares(&self) -> impl Iterator<Item = Result<Share>> + '_ {
        let host = |unit: u64| HostOffset(self.units.bytes(unit).start);
        self.links.iter().map(move |word| {
            let link = Link::from_duplicate(word?);
            let references = self.units.users(link.duplicate);
            Ok(Share { duplicate: host(link.duplicate), keeper: host(link.keeper), references })
        })
    }

    /// The clusters that hold nothing but zeros, in the order of the file.
    pub fn zeros(&self) -> impl Iterator<Item = HostOffset> + '_ {
        self.zeros.iter().map(|unit| HostOffset(self.units.bytes(unit).start))
    }

    /// What enters the pool, in unit order.
    pub(super) fn joining(&self) -> impl Iterator<Item = Result<NewMember>> + '_ {
        self.joining.iter().map(|word| word.map(NewMember::decode))
    }
}

/// Refuses by name what is not deduplicated in place; returns the sharer limit.
fn refuse(header: &Header) -> Result<u64> {
    header.refuse_unreadable()?;
    if header.extended_l2() {
        return Err(Error::unsupported(
            "images with subclusters (extended_l2=on) are not deduplicated in place; use dedup-img convert",
        ));
    }
    header.refcount_bits.sharer_limit().ok_or_else(|| {
        Error::unsupported(format!(
            "refcount_bits={} cannot hold the 4 references that sharing with a pool needs; widen it first: qemu-img amend \
             -o refcount_bits=16 FILE",
            header.refcount_bits.bits()
        ))
    })
}

/// The inspection of an image that is sound but perhaps for leaks.
fn sound(storage: &dyn Storage, work: &Work<'_>) -> Result<Inspection> {
    let mut first = None;
    let mut sink = |finding: &Finding| {
        if first.is_none() && !matches!(finding.severity, Severity::Leak | Severity::Benign) {
            first = Some(finding.kind.to_string());
        }
    };
    let inspection = inspect(storage, CheckOptions::default(), work, (0, PHASES), &mut sink)?;
    match first {
        None => Ok(inspection),
        Some(first) => {
            let message = format!("the image is damaged ({first}); see dedup-img check, and check -r all");
            Err(Error::new(ErrorKind::Corrupt, message))
        }
    }
}

fn refuse_snapshots(inspection: &Inspection) -> Result<()> {
    let snapshots = &inspection.snapshots;
    if snapshots.iter().any(|s| s.name == pool::NAME.as_bytes() && !pool::is_pool(s)) {
        return Err(Error::unsupported(format!(
            "the image has a snapshot called '{}' that is not a deduplication pool; it is left alone, give it another name",
            pool::NAME
        )));
    }
    if inspection.pool.is_none() && snapshots.len() >= MAX_SNAPSHOTS as usize {
        return Err(Error::new(
            ErrorKind::Limit,
            "the image has no room for one more snapshot, which the pool would be",
        ));
    }
    Ok(())
}
