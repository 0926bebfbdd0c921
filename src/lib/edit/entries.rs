//! Giving guest clusters new L2 entries.
//!
//! A table that the disk alone uses is changed where it lies. One that a snapshot uses too, or that is not there yet, is written to
//! a new place, and the L1 entry changes: the snapshot keeps the old one. What the old table leads to has as many references
//! before as after, because QEMU counts each of its entries once for each L1 entry.

use crate::edit::allocate::Allocator;
use crate::edit::change::{Change, NewEntry, Writes};
use crate::error::{Context, OrInternal, Result, Table};
use crate::format::header::Header;
use crate::format::l2;
use crate::format::table::L2Entry;
use crate::format::table::{l1_entry, l1_target, with_copied};
use crate::sort::sequence::Sorted;
use crate::storage::sparse::{rewrite, write_sparse};
use crate::storage::{Storage, flush, read_padded, write};
use crate::survey::Ground;
use crate::units::{HostCluster, to_usize};
use crate::work::Work;

/// The tables in which `entries` lie that need a new place, with one.
pub(crate) fn new_tables(
    ground: &Ground,
    entries: &Sorted<NewEntry>,
    free: &mut Allocator,
) -> Result<Vec<(u64, HostCluster)>> {
    let inspection = &ground.inspection;
    let bits = inspection.header.cluster_bits;
    let mut tables = Vec::new();
    let mut last = None;
    for new in entries.iter() {
        let index = new?.guest.0 / bits.entries();
        if last == Some(index) {
            continue;
        }
        last = Some(index);
        let entry = inspection.tables.active.get(to_usize(index));
        let table = entry.and_then(|&entry| l1_target(entry));
        if table.is_none_or(|table| inspection.counts.get(table.0 >> bits.bits()) > 1) {
            tables.push((index, free.one()));
        }
    }
    Ok(tables)
}

/// The L2 tables that change.
pub(crate) struct Tables<'a> {
    header: &'a Header,
    active: &'a [u64],
    writes: &'a Writes,
    storage: &'a dyn Storage,
}

impl<'a> Tables<'a> {
    pub(crate) fn new(change: &'a Change, writes: &'a Writes, storage: &'a dyn Storage) -> Self {
        let inspection = &change.ground.inspection;
        Self { header: &inspection.header, active: &inspection.tables.active, writes, storage }
    }

    /// Writes the tables that get a new place. Nothing leads to them yet.
    pub(crate) fn write_new(&self) -> Result<()> {
        let bits = self.header.cluster_bits;
        let mut places = self.writes.tables.iter().peekable();
        self.each(|index, entries| {
            let Some((_, place)) = places.next_if(|(other, _)| *other == index) else { return Ok(()) };
            let mut content = self.read(index)?;
            // The old table stays: what both lead to has two references at least.
            l2::rewrite(self.header, &mut content, |word, entry| {
                (!matches!(entry, L2Entry::Compressed(_))).then(|| with_copied(word, false))
            });
            put(&mut content, entries)?;
            write_sparse(self.storage, &content, place.offset(bits).0)
        })
    }

    /// Makes the disk read its new content, cluster by cluster.
    ///
    /// After a crash each cluster reads as before or as it should.
    pub(crate) fn switch(&self, work: &Work) -> Result<()> {
        let bits = self.header.cluster_bits;
        let mut places = self.writes.tables.iter().peekable();
        self.each(|index, entries| {
            work.cancel.check()?;
            if places.next_if(|(other, _)| *other == index).is_some() {
                return Ok(());
            }
            let host = self.table(index).or_internal("an L2 table that changes has no place")?;
            let old = self.read(index)?;
            let mut content = old.clone();
            put(&mut content, entries)?;
            rewrite(self.storage, &old, &content, host)
        })?;
        for run in self.writes.tables.chunk_by(|a, b| a.0 + 1 == b.0) {
            let (first, _) = run.first().or_internal("a run of tables without any")?;
            let words = run.iter().flat_map(|(_, place)| l1_entry(place.offset(bits), true).to_be_bytes());
            write(self.storage, &words.collect::<Vec<u8>>(), self.header.l1_offset.0 + first * 8)?;
        }
        flush(self.storage)
    }

    /// Hands every table that changes, by its L1 index, with its new entries to `change`, in guest order.
    fn each(&self, mut change: impl FnMut(u64, &[(u64, u64)]) -> Result<()>) -> Result<()> {
        let per_table = self.header.cluster_bits.entries();
        let mut entries: Vec<(u64, u64)> = Vec::new();
        let mut table = None;
        for new in self.writes.entries.iter() {
            let NewEntry { guest, entry } = new?;
            let index = guest.0 / per_table;
            if let Some(table) = table.filter(|&table| table != index) {
                change(table, &entries)?;
                entries.clear();
            }
            table = Some(index);
            entries.push((guest.0 % per_table, entry));
        }
        table.map_or(Ok(()), |table| change(table, &entries))
    }

    /// Where the table is now.
    fn table(&self, index: u64) -> Option<u64> {
        let entry = self.active.get(to_usize(index))?;
        l1_target(*entry).map(|host| host.0)
    }

    fn read(&self, index: u64) -> Result<Vec<u8>> {
        let mut content = vec![0; self.header.cluster_bits.len()];
        if let Some(host) = self.table(index) {
            read_padded(self.storage, &mut content, host).reading(Table::L2, host)?;
        }
        Ok(content)
    }
}

/// Puts entries into a table.
fn put(content: &mut [u8], entries: &[(u64, u64)]) -> Result<()> {
    let words = content.as_chunks_mut().0;
    for (at, entry) in entries {
        *words.get_mut(to_usize(*at)).or_internal("an entry lies behind the end of its L2 table")? =
            entry.to_be_bytes();
    }
    Ok(())
}
