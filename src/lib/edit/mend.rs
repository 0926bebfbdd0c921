//! Bringing stored refcounts and COPIED flags in line with what was counted.

use std::ops::Range;

use crate::check::Inspection;
use crate::check::counts::Counts;
use crate::check::finding::Repairable;
use crate::check::states::{State, States};
use crate::edit::marks::clear_marks;
use crate::error::{Error, ErrorKind, OrInternal, Result};
use crate::format::header::{Header, MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_TABLE_AT, SNAPSHOTS_AT, incompatible};
use crate::format::l2;
use crate::format::table::{L2Entry, is_copied, l1_target, with_copied};
use crate::image::refcounts::{Block, Refcounts};
use crate::storage::sparse::rewrite;
use crate::storage::{Storage, flush, read_padded, write};
use crate::units::{HostOffset, append, to_usize};

/// The refcounts that clusters should have.
struct Expected<'a> {
    counts: &'a Counts,
    /// Clusters of a refcount structure that is given up, whose references no longer count.
    given_up: Vec<u64>,
    /// Clusters of a new refcount structure.
    new: Range<u64>,
}

impl Expected<'_> {
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
pub(crate) enum Pass {
    /// Those that are too low.
    Raise,
    /// Those that are too high.
    Lower,
}

/// Writes what an image should say instead of what it says. Each method is one step and ends with a flush; the order of the
/// steps is the caller's.
pub(crate) struct Mender<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    counts: Expected<'a>,
    /// What is stored, where counts that are too high stay so.
    stored: Option<States>,
}

impl<'a> Mender<'a> {
    /// For an image whose clusters have the references `counts`.
    pub(crate) fn new(storage: &'a dyn Storage, header: &'a Header, counts: &'a Counts) -> Self {
        Self { storage, header, counts: Expected { counts, given_up: Vec::new(), new: 0..0 }, stored: None }
    }

    /// Mends everything but the marks, in the order that [`mod@crate::edit::repair`] describes.
    pub(crate) fn mend(mut self, before: &Inspection) -> Result<()> {
        let refcounts = Refcounts::load(self.storage, self.header)?;
        if before.doubt.is_some() {
            self.stored = Some(States::load(&refcounts, self.clusters() + 1)?);
        }
        if before.repair == Repairable::Rebuild || self.lacks_blocks(&refcounts) {
            if before.doubt.is_some() {
                return Err(Error::internal("refcounts are to be made anew by the word of tables that are in doubt"));
            }
            self.rebuild(&refcounts, before.file_len, before.moved_snapshots)?;
        } else {
            self.refcounts(&refcounts, Pass::Raise)?;
            if before.moved_snapshots {
                write(self.storage, &self.header.snapshots_field(), SNAPSHOTS_AT)?;
                flush(self.storage)?;
            }
        }
        self.copied(&before.tables.active, false)?;
        if self.counts.new.is_empty() && before.doubt.is_none() {
            self.refcounts(&refcounts, Pass::Lower)?;
        }
        self.copied(&before.tables.active, true)
    }

    /// Whether counts can be raised and flags be set right without touching what is in doubt: writing no flag into a table that has a
    /// cluster in common with something else, and no refcount block anew.
    pub(crate) fn spares_doubt(mut self, plan: &Inspection) -> Result<bool> {
        let refcounts = Refcounts::load(self.storage, self.header)?;
        self.stored = Some(States::load(&refcounts, self.clusters() + 1)?);
        if self.lacks_blocks(&refcounts) || self.header.incompatible & incompatible::DATA_FILE != 0 {
            return Ok(false);
        }
        let bits = self.header.cluster_bits;
        let claimed = |cluster: u64| plan.claims.iter().filter(|c| (c.first..=c.last).contains(&cluster)).count();
        let in_doubt = |cluster: u64, itself: usize| self.counts.counts.is_data(cluster) || claimed(cluster) > itself;
        let is_table = |cluster: u64| plan.tables.references.iter().any(|r| r.table.0 >> bits.bits() == cluster);
        let l1 = self.header.l1_offset.0 >> bits.bits();
        let l1 = l1..l1 + bits.clusters(u64::from(self.header.l1_entries) * 8);
        let l1_in_doubt = l1.clone().any(|cluster| in_doubt(cluster, 1) || is_table(cluster));
        let mut content = vec![0; bits.len()];
        for &entry in &plan.tables.active {
            let Some(table) = l1_target(entry) else { continue };
            let cluster = table.0 >> bits.bits();
            if l1_in_doubt && self.is_one(table) != is_copied(entry) {
                return Ok(false);
            }
            if in_doubt(cluster, 0) {
                read_padded(self.storage, &mut content, table.0)
                    .map_err(|e| Error::io("Could not read an L2 table", e))?;
                if l2::slots(self.header, &content).any(|slot| self.wrong_flag(slot.word).is_some()) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Whether the refcount of the cluster at `host` is one, once it is mended.
    fn is_one(&self, host: HostOffset) -> bool {
        let cluster = host.0 >> self.header.cluster_bits.bits();
        let counted = self.counts.get(cluster);
        match self.stored.as_ref().map(|stored| stored.get(cluster)) {
            None | Some(State::Free) => counted == 1,
            Some(State::One) => counted <= 1,
            Some(State::Many | State::Unknown) => false,
        }
    }

    /// Whether an L2 entry should have COPIED, where that is not what it has.
    fn wrong_flag(&self, word: u64) -> Option<bool> {
        let (L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. }) = l2::decode(self.header, word)
        else {
            return None;
        };
        let should = self.header.incompatible & incompatible::DATA_FILE != 0 || self.is_one(host);
        (should != is_copied(word)).then_some(should)
    }

    /// Clears the incompatible feature bits `flags`.
    pub(crate) fn clear(&self, flags: u64) -> Result<()> {
        clear_marks(self.storage, self.header, flags)
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

    /// Corrects the refcounts in the blocks that there are, in one direction; returns the clusters whose count came to 0.
    pub(crate) fn refcounts(&self, refcounts: &Refcounts<'_>, pass: Pass) -> Result<Vec<Range<u64>>> {
        let per_block = refcounts.per_block();
        let (mut block, mut encoded, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let mut changed_any = false;
        let mut freed: Vec<Range<u64>> = Vec::new();
        for index in 0..self.clusters().div_ceil(per_block) {
            let Block::At(offset) = refcounts.block(index) else { continue };
            refcounts.read(offset, &mut block)?;
            counts.clear();
            let mut changed = false;
            for cluster in index * per_block..(index + 1) * per_block {
                let stored = refcounts.count(&block, cluster % per_block);
                // Nothing lies behind the file: a count there would become a leak when the file grows.
                let right = self.counts.get(cluster);
                let change = if pass == Pass::Raise { right > stored } else { right < stored };
                counts.push(if change { right } else { stored });
                changed |= change;
                if change && right == 0 {
                    append(&mut freed, cluster..cluster + 1);
                }
            }
            if changed {
                encoded.clear();
                self.header.refcount_bits.encode(&counts, &mut encoded);
                rewrite(self.storage, &block, &encoded, offset.0)?;
                changed_any = true;
            }
        }
        if changed_any {
            flush(self.storage)?;
        }
        Ok(freed)
    }

    /// Writes new refcount blocks and a new table behind the file, and switches to them; to a snapshot table that has moved as well.
    fn rebuild(&mut self, refcounts: &Refcounts<'_>, file_len: u64, moved_snapshots: bool) -> Result<()> {
        let bits = self.header.cluster_bits;
        let per_block = refcounts.per_block();
        let start = bits.clusters(file_len).max(self.clusters());
        let (table, blocks) = self.header.refcount_bits.structure(bits, start);
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
            write(self.storage, &block, offset)?;
            words.extend_from_slice(&offset.to_be_bytes());
        }
        words.resize(to_usize(table * bits.bytes()), 0);
        write(self.storage, &words, start << bits.bits())?;
        flush(self.storage)?;
        let header = Header {
            refcount_table_offset: HostOffset(start << bits.bits()),
            refcount_table_clusters: u32::try_from(table).ok().or_internal("a refcount table has too many clusters")?,
            ..self.header.clone()
        };
        let mut fields = header.refcount_table_field().to_vec();
        if moved_snapshots {
            // They follow, in the same sector.
            fields.extend_from_slice(&header.snapshots_field());
        }
        write(self.storage, &fields, REFCOUNT_TABLE_AT)?;
        flush(self.storage)
    }

    /// Sets, or clears, the COPIED flags of the active disk that should be so.
    pub(crate) fn copied(&self, active: &[u64], set: bool) -> Result<()> {
        let bits = self.header.cluster_bits;
        let mut written = false;
        let mut cluster = vec![0; bits.len()];
        for (&entry, index) in active.iter().zip(0u64..) {
            let Some(table) = l1_target(entry) else { continue };
            if self.is_one(table) == set && is_copied(entry) != set {
                write(self.storage, &with_copied(entry, set).to_be_bytes(), self.header.l1_offset.0 + index * 8)?;
                written = true;
            }
            read_padded(self.storage, &mut cluster, table.0).map_err(|e| Error::io("Could not read an L2 table", e))?;
            let old = cluster.clone();
            let changed = l2::rewrite(self.header, &mut cluster, |word, _| {
                (self.wrong_flag(word) == Some(set)).then(|| with_copied(word, set))
            });
            if changed {
                rewrite(self.storage, &old, &cluster, table.0)?;
                written = true;
            }
        }
        if written { flush(self.storage) } else { Ok(()) }
    }
}
