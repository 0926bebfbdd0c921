//! The L1 tables of an image: which L2 tables they lead to.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::check::Checker;
use crate::check::finding::{At, Kind, Layer, Severity, Use};
use crate::error::{Advice, Context, Error, Result, Table};
use crate::format::header::{MAX_L1_BYTES, incompatible};
use crate::format::snapshot::Snapshot;
use crate::format::table::{l1_reserved, l1_target};
use crate::name::shown;
use crate::storage::buffer::{collected, push, zeroed};
use crate::storage::read_padded;
use crate::units::{GuestOffset, HostOffset, to_usize};

/// Characters that are shown of a snapshot's id or name; QEMU keeps 255 of a name.
const MAX_SHOWN: usize = 255;

/// A reference to an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct L2Reference {
    /// Where the table is.
    pub table: HostOffset,
    /// Index of the layer: 0 is the active disk, n + 1 is snapshot n.
    pub layer: u32,
    /// Index of the L1 entry.
    pub index: u32,
}

/// The layers of an image and all references to L2 tables, the latter sorted by table.
pub(crate) struct Tables {
    pub layers: Vec<Layer>,
    pub references: Vec<L2Reference>,
    /// The active L1 table as stored.
    pub active: Vec<u64>,
}

impl Checker<'_> {
    /// Counts all L1 tables and L2 tables.
    pub(crate) fn tables(&mut self, snapshots: &[Snapshot]) -> Result<Tables> {
        let mut tables = Tables { layers: vec![Layer::Active], references: Vec::new(), active: Vec::new() };
        let (offset, entries) = (self.header.l1_offset, self.header.l1_entries);
        tables.active = self.l1_table(offset, entries, 0, &mut tables)?;
        if self.header.incompatible & incompatible::DATA_FILE != 0 && !snapshots.is_empty() {
            self.say(Severity::Corruption, Kind::SnapshotsWithDataFile(snapshots.len()));
        }
        for (snapshot, layer) in snapshots.iter().zip(1..) {
            let name = layer_name(snapshot);
            tables.layers.push(name.clone());
            let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries);
            if offset.0 & (self.header.cluster_bits.bytes() - 1) != 0 {
                self.say(Severity::Corruption, Kind::SnapshotL1Unaligned(name, offset));
            } else if u64::from(entries) * 8 > MAX_L1_BYTES {
                self.say(Severity::Corruption, Kind::SnapshotL1TooLarge(name, entries));
            } else {
                self.l1_table(offset, entries, layer, &mut tables)?;
            }
        }
        tables.references.sort_unstable();
        Ok(tables)
    }

    /// Counts the L1 table at `offset` and the L2 tables that it leads to; returns its entries.
    fn l1_table(&mut self, offset: HostOffset, entries: u32, layer: u32, tables: &mut Tables) -> Result<Vec<u64>> {
        let bytes = u64::from(entries) * 8;
        let layer_at = |index: usize| tables.layers.get(index).cloned().unwrap_or(Layer::Active);
        let name = layer_at(layer as usize);
        // Tables that do not overlap fit into the file together. What does not could keep this busy for years.
        self.l1_bytes = self.l1_bytes.saturating_add(bytes);
        if self.l1_bytes > self.file_len.saturating_mul(2).max(MAX_L1_BYTES) {
            let message = "the snapshots' L1 tables are together larger than the file and cannot be checked";
            return Err(Error::corrupt(message).at(offset.0).advise(Advice::WithoutSnapshots));
        }
        self.claim(offset.0, bytes, Use::L1(name.clone()), None);
        let mut table = zeroed(to_usize(bytes))?;
        read_padded(self.storage, &mut table, offset.0).reading(Table::L1, offset)?;
        let words = collected(table.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)))?;
        let span = self.header.cluster_bits.bytes() * self.header.l2_entries();
        for (&entry, index) in words.iter().zip(0u32..).filter(|(entry, _)| **entry != 0) {
            let guest = GuestOffset(span.saturating_mul(u64::from(index)));
            let at = || At { layer: name.clone(), guest };
            if l1_reserved(entry) != 0 {
                self.say(Severity::Corruption, Kind::L1Reserved(at(), entry));
            }
            let target = l1_target(entry).unwrap_or(HostOffset(0));
            if target.0 & (self.header.cluster_bits.bytes() - 1) != 0 {
                self.say(Severity::Corruption, Kind::L2Unaligned(at(), target));
            }
            self.claim(target.0, self.header.cluster_bits.bytes(), Use::L2(name.clone()), Some(guest));
            push(&mut tables.references, L2Reference { table: target, layer, index })?;
        }
        Ok(words)
    }
}

fn layer_name(snapshot: &Snapshot) -> Layer {
    if snapshot.is_pool() {
        return Layer::Pool;
    }
    Layer::Snapshot { id: beginning(&snapshot.id).into(), name: beginning(&snapshot.name).into() }
}

/// An id or a name, which are bytes from a stranger: 64 KiB of them in each of many findings would fill a disk.
fn beginning(bytes: &[u8]) -> String {
    let mut text = shown(OsStr::from_bytes(bytes));
    if let Some((end, _)) = text.char_indices().nth(MAX_SHOWN) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
