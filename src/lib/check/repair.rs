//! Mending what a check found, in an order of writes that is safe at every point (I3).
//!
//! ```text
//!  step                                              after a crash here
//!  - clear autoclear bits that are not known; flush  as after any writer that does not know them
//!  - zero clusters lose a preallocated place that is  they read as before
//!    no cluster; flush
//!  1 raise refcounts that are too low; flush         some are right, none is lower than before
//!    (or write new refcount blocks and a new table   the old ones still count
//!    behind the file; flush; switch the header to
//!    them in one sector; flush)                      one of the two counts, whole
//!  2 clear COPIED that should not be set; flush      QEMU copies before it writes: never wrong
//!  3 lower refcounts that are too high, set COPIED   leaks, needless copies
//!    where it should be; flush
//!  4 clear the dirty and the corrupt bit; flush      the next check clears them
//!  5 write a stale directory of the pool anew; flush it stays stale, and nobody uses it
//! ```
//!
//! No guest data is written, moved or dropped, and no table of a snapshot or a bitmap is touched but for COPIED flags of L2
//! tables that a snapshot shares with the active disk, which mean nothing to it. Where one finding cannot be mended nothing is
//! written: freeing clusters by the word of a damaged mapping could free what a repair by hand would still find.

use super::counts::Counts;
use super::finding::{Finding, Repairable};
use super::pool::write_directory;
use super::{CheckOptions, Inspection, Report, inspect};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, MAX_REFCOUNT_TABLE_BYTES, autoclear, incompatible};
use crate::format::table::{L2Entry, is_copied, l1_target, with_copied};
use crate::format::u64_at;
use crate::image::refcounts::{Block, Refcounts};
use crate::storage::{Storage, read_padded};
use crate::units::HostOffset;
use crate::work::Work;

/// What to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters only.
    Leaks,
    /// Everything that can be mended.
    All,
}

/// What a repair did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repaired {
    /// What the check after the repair found; of the one check, where nothing was to be mended.
    pub report: Report,
    /// Leaked clusters that were freed.
    pub leaks_fixed: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
}

/// Checks the image in `storage` and mends it, then checks it again; the findings of the first check go to `sink`, those of the
/// second one only if there was a repair.
///
/// # Errors
/// Those of [`super::check`], and of writing. [`ErrorKind::Corrupt`] where something cannot be mended; then nothing was written.
pub fn repair(
    storage: &dyn Storage,
    what: Repair,
    options: CheckOptions,
    work: &Work<'_>,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Repaired> {
    let before = inspect(storage, options, work, sink)?;
    let nothing = Repaired { report: before.report, leaks_fixed: 0, corruptions_fixed: 0 };
    let flags = incompatible::DIRTY | incompatible::CORRUPT;
    let marked = what == Repair::All && before.header.incompatible & flags != 0;
    let wanted = match what {
        Repair::Leaks => before.report.leaks > 0,
        Repair::All => before.repair > Repairable::Nothing,
    };
    if let Some(hopeless) = &before.hopeless
        && wanted
    {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("nothing was repaired, because this cannot be: {hopeless}"),
        ));
    }
    if !wanted && !marked {
        return Ok(nothing);
    }
    if what == Repair::Leaks && before.report.corruptions + before.report.check_errors > 0 {
        let message = "nothing was repaired: leaked clusters are not freed while there is corruption; use -r all";
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    work.cancel.check()?;
    let first = before.report;
    clear_unknown_autoclear(storage, &before.header)?;
    // What a misplaced preallocation seemed to refer to is not referred to any more: count again.
    let before = match before.misplaced.is_empty() {
        true => before,
        false => {
            drop_preallocations(storage, &before)?;
            inspect(storage, options, work, &mut |_| {})?
        }
    };
    let mender = Mender { storage, header: &before.header, counts: Expected::new(&before) };
    mender.mend(&before, flags)?;
    if let (Repair::All, Some(directory)) = (what, &before.stale) {
        write_directory(directory, &before, storage)?;
    }
    let after = inspect(storage, options, work, sink)?.report;
    Ok(Repaired {
        report: after,
        leaks_fixed: first.leaks.saturating_sub(after.leaks),
        corruptions_fixed: (first.corruptions + first.check_errors)
            .saturating_sub(after.corruptions + after.check_errors),
    })
}

/// Spec: a writer first clears the autoclear bits that it does not know. Bitmaps stay valid, as no guest data changes.
fn clear_unknown_autoclear(storage: &dyn Storage, header: &Header) -> Result<()> {
    if header.version < 3 || header.autoclear & !autoclear::KNOWN == 0 {
        return Ok(());
    }
    let known = (header.autoclear & autoclear::KNOWN).to_be_bytes();
    storage.write_at(&known, 88).map_err(|e| Error::io("Could not write the header", e))?;
    storage.sync().map_err(|e| Error::io("Could not flush", e))
}

/// Makes plain zero clusters of those whose preallocated place is no cluster. They read as before: no data was there.
fn drop_preallocations(storage: &dyn Storage, before: &Inspection) -> Result<()> {
    // With subclusters the bitmap says what is zero, and stays.
    let entry = match before.header.extended_l2() {
        true => L2Entry::Unallocated,
        false => L2Entry::Zero { host: None, copied: false },
    };
    let word = entry.encode(before.header.cluster_bits).to_be_bytes();
    for &at in &before.misplaced {
        storage.write_at(&word, at).map_err(|e| Error::io(format_args!("Could not write at {at:#x}"), e))?;
    }
    storage.sync().map_err(|e| Error::io("Could not flush", e))
}

/// The refcounts that clusters should have.
struct Expected<'a> {
    counts: &'a Counts,
    /// Clusters of a refcount structure that is given up, whose references no longer count.
    given_up: Vec<u64>,
    /// Clusters of a new refcount structure.
    new: std::ops::Range<u64>,
}

impl<'a> Expected<'a> {
    fn new(inspection: &'a Inspection) -> Self {
        Self { counts: &inspection.counts, given_up: Vec::new(), new: 0..0 }
    }

    fn get(&self, cluster: u64) -> u64 {
        if self.new.contains(&cluster) {
            return 1;
        }
        let lost = self.given_up.partition_point(|&c| c <= cluster) - self.given_up.partition_point(|&c| c < cluster);
        self.counts.get(cluster).saturating_sub(lost as u64)
    }
}

/// Which refcounts a pass may change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Raise,
    Lower,
}

struct Mender<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    counts: Expected<'a>,
}

impl Mender<'_> {
    fn mend(mut self, before: &Inspection, flags: u64) -> Result<()> {
        let refcounts = Refcounts::load(self.storage, self.header)?;
        if before.repair == Repairable::Rebuild || self.lacks_blocks(&refcounts) {
            self.rebuild(&refcounts, before.file_len)?;
        } else {
            self.refcounts(&refcounts, Pass::Raise)?;
        }
        self.copied(before, false)?;
        if self.counts.new.is_empty() {
            self.refcounts(&refcounts, Pass::Lower)?;
        }
        self.copied(before, true)?;
        if self.header.version >= 3 && self.header.incompatible & flags != 0 {
            self.write(&(self.header.incompatible & !flags).to_be_bytes(), 72)?;
            self.flush()?;
        }
        Ok(())
    }

    fn clusters(&self) -> u64 {
        self.counts.counts.clusters()
    }

    /// Whether a cluster in use has no refcount block.
    fn lacks_blocks(&self, refcounts: &Refcounts<'_>) -> bool {
        let per_block = refcounts.per_block();
        (0..self.clusters().div_ceil(per_block)).any(|index| {
            let mut clusters = index * per_block..self.clusters().min((index + 1) * per_block);
            !matches!(refcounts.block(index), Block::At(_)) && clusters.any(|cluster| self.counts.get(cluster) > 0)
        })
    }

    /// Corrects the refcounts in the blocks that there are, in one direction.
    fn refcounts(&self, refcounts: &Refcounts<'_>, pass: Pass) -> Result<()> {
        let per_block = refcounts.per_block();
        let (mut block, mut encoded, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let mut changed_any = false;
        for index in 0..self.clusters().div_ceil(per_block) {
            let Block::At(offset) = refcounts.block(index) else { continue };
            refcounts.read(offset, &mut block)?;
            counts.clear();
            let mut changed = false;
            for cluster in index * per_block..(index + 1) * per_block {
                let stored = refcounts.count(&block, cluster % per_block);
                // What lies behind the file is nobody's to count.
                let right = if cluster < self.clusters() { self.counts.get(cluster) } else { stored };
                let change = if pass == Pass::Raise { right > stored } else { right < stored };
                counts.push(if change { right } else { stored });
                changed |= change;
            }
            if changed {
                encoded.clear();
                self.header.refcount_bits.encode(&counts, &mut encoded);
                self.write(&encoded, offset.0)?;
                changed_any = true;
            }
        }
        if changed_any { self.flush() } else { Ok(()) }
    }

    /// Writes new refcount blocks and a new table behind the file, and switches to them.
    fn rebuild(&mut self, refcounts: &Refcounts<'_>, file_len: u64) -> Result<()> {
        let bits = self.header.cluster_bits;
        let per_block = refcounts.per_block();
        let start = bits.clusters(file_len).max(self.clusters());
        let (mut table, mut blocks) = (1, 0);
        loop {
            let needed = (start + table + blocks).div_ceil(per_block);
            let next = (needed.div_ceil(bits.entries()).max(table), needed.max(blocks));
            if next == (table, blocks) {
                break;
            }
            (table, blocks) = next;
        }
        if table * bits.bytes() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the file needs a larger refcount table than QEMU accepts"));
        }
        let old_table = self.header.refcount_table_offset.0 >> bits.bits();
        let old_blocks = (0..refcounts.entries().len() as u64).filter_map(|index| match refcounts.block(index) {
            Block::At(offset) if Refcounts::reserved(*refcounts.entries().get(usize::try_from(index).ok()?)?) == 0 => {
                Some(offset.0 >> bits.bits()).filter(|&cluster| cluster < start)
            }
            _ => None,
        });
        self.counts.given_up = old_blocks.collect();
        // A table that ends behind the file was not counted, so it has nothing to give up.
        let table_bytes = u64::from(self.header.refcount_table_clusters) * bits.bytes();
        let table_end = self.header.refcount_table_offset.0.saturating_add(table_bytes);
        if table_end < file_len.saturating_add(bits.bytes()) {
            self.counts.given_up.extend(old_table..old_table + u64::from(self.header.refcount_table_clusters));
        }
        self.counts.given_up.sort_unstable();
        self.counts.new = start..start + table + blocks;

        let mut words = Vec::new();
        for index in 0..blocks {
            let offset = (start + table + index) << bits.bits();
            let counts: Vec<u64> =
                (index * per_block..(index + 1) * per_block).map(|cluster| self.counts.get(cluster)).collect();
            let mut block = Vec::with_capacity(bits.len());
            self.header.refcount_bits.encode(&counts, &mut block);
            self.write(&block, offset)?;
            words.extend_from_slice(&offset.to_be_bytes());
        }
        words.resize(usize::try_from(table * bits.bytes()).unwrap_or(0), 0);
        self.write(&words, start << bits.bits())?;
        self.flush()?;
        let mut fields = [0; 12];
        let (offset, clusters) = fields.split_at_mut(8);
        offset.copy_from_slice(&(start << bits.bits()).to_be_bytes());
        clusters.copy_from_slice(&u32::try_from(table).unwrap_or(u32::MAX).to_be_bytes());
        self.write(&fields, 48)?;
        self.flush()
    }

    /// Sets, or clears, the COPIED flags of the active disk that should be so.
    fn copied(&self, before: &Inspection, set: bool) -> Result<()> {
        let bits = self.header.cluster_bits;
        let mut written = false;
        let data_file = self.header.incompatible & incompatible::DATA_FILE != 0;
        let one = |host: HostOffset| self.counts.get(host.0 >> bits.bits()) == 1;
        for (&entry, index) in before.tables.active.iter().zip(0u64..) {
            let Some(table) = l1_target(entry) else { continue };
            if one(table) == set && is_copied(entry) != set {
                self.write(&with_copied(entry, set).to_be_bytes(), self.header.l1_offset.0 + index * 8)?;
                written = true;
            }
            let size = if self.header.extended_l2() { 16 } else { 8 };
            let mut cluster = vec![0; bits.len()];
            read_padded(self.storage, &mut cluster, table.0).map_err(|e| Error::io("Could not read an L2 table", e))?;
            let mut changed = false;
            for slot in cluster.chunks_exact_mut(size) {
                let word = u64_at(slot, 0).unwrap_or(0);
                let (L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. }) =
                    L2Entry::decode(word, bits, !self.header.extended_l2())
                else {
                    continue;
                };
                let should = data_file || one(host);
                if should == set && is_copied(word) != set {
                    slot.split_at_mut(8).0.copy_from_slice(&with_copied(word, set).to_be_bytes());
                    changed = true;
                }
            }
            if changed {
                self.write(&cluster, table.0)?;
                written = true;
            }
        }
        if written { self.flush() } else { Ok(()) }
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.storage.write_at(bytes, offset).map_err(|e| Error::io(format_args!("Could not write at {offset:#x}"), e))
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync().map_err(|e| Error::io("Could not flush", e))
    }
}
