//! Opening: header, L1 table, snapshots.

use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Advice, Advised, Error, ErrorKind, IoContext, Result};
use crate::format::header::{Header, MAX_L1_BYTES, V3_LENGTH};
use crate::format::snapshot::{FIXED, MAX_TABLE_BYTES, Snapshot};
use crate::format::table::l1_target;
use crate::pool;
use crate::storage::buffer::{collected, zeroed};
use crate::storage::{Storage, read_exact, read_padded};
use crate::units::{HostOffset, to_usize};

use crate::image::Qcow2;

impl Qcow2 {
    /// Opens the active disk, or the internal snapshot that has `snapshot` as its id or, failing that, as its name.
    ///
    /// # Errors
    /// Fails where the image is not QCOW2, breaks the format, or uses what is refused by name (encryption, external data file,
    /// unknown incompatible features, a set corrupt bit).
    pub fn open(storage: Box<dyn Storage>, snapshot: Option<&SnapshotName>) -> Result<Self> {
        Self::open_as(storage, snapshot, false)
    }

    /// As [`Qcow2::open`], but opens what is marked corrupt as well, and takes of the tables what is there: [`Qcow2::lost`] says what
    /// is not. Refcounts do not matter to a reader.
    ///
    /// # Errors
    /// As [`Qcow2::open`], damage as said excepted.
    pub(crate) fn open_damaged(storage: Box<dyn Storage>, snapshot: Option<&SnapshotName>) -> Result<Self> {
        Self::open_as(storage, snapshot, true)
    }

    fn open_as(storage: Box<dyn Storage>, snapshot: Option<&SnapshotName>, salvages: bool) -> Result<Self> {
        let file_len = storage.len().at("Could not get its length")?;
        let header = read_header(&*storage)?;
        if salvages {
            header.refuse_unsalvageable()?;
        } else {
            header.refuse_unreadable()?;
        }
        let size = header.size;
        let mut image =
            Self { storage: Arc::from(storage), header, l1: Vec::new(), size, file_len, salvages, lost: Vec::new() };
        match snapshot {
            None => {
                // What lies behind the disk is VM state, which no guest reads.
                let needed = size.div_ceil(image.table_span()).min(u64::from(image.header.l1_entries));
                image.l1 = image.l1_entries(image.header.l1_offset, 0..needed)?;
                image.lost = image.find_lost(image.header.l1_offset);
                Ok(image)
            }
            Some(name) => {
                let snapshot = name.find(image.snapshots()?)?;
                image.at_snapshot(&snapshot)
            }
        }
    }

    /// The entries of the snapshot table, the pool included.
    ///
    /// # Errors
    /// Fails where the table cannot be read or is cut short.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        if self.salvages {
            // What the file lacks reads as zeros, as for QEMU: room for that, and for the longest id and name.
            let room = u64::from(self.header.snapshots) * FIXED as u64 + 2 * 65536;
            return read_snapshots(&*self.storage, &self.header, self.file_len.saturating_add(room), read_padded_from);
        }
        read_snapshots(&*self.storage, &self.header, self.file_len, read_exact_from)
    }

    /// The image as it was when `snapshot` was taken; it is the same open file.
    pub(crate) fn at_snapshot(&self, snapshot: &Snapshot) -> Result<Self> {
        let size = self.snapshot_size(snapshot)?;
        self.view(snapshot, 0..size.div_ceil(self.table_span()), size)
    }

    /// The VM state of `snapshot` as a disk, as far as its L1 table goes. QEMU has it behind the disk, from the next L1 entry.
    pub(crate) fn vm_state(&self, snapshot: &Snapshot) -> Result<Self> {
        let span = self.table_span();
        let first = self.snapshot_size(snapshot)?.div_ceil(span);
        let end = (first + snapshot.vm_state_size.div_ceil(span)).min(u64::from(snapshot.l1_entries));
        let size = snapshot.vm_state_size.checked_next_multiple_of(512).unwrap_or(!511);
        self.view(snapshot, first..end.max(first), size.min(end.saturating_sub(first).saturating_mul(span)))
    }

    fn view(&self, snapshot: &Snapshot, entries: Range<u64>, size: u64) -> Result<Self> {
        // A damaged table may have fewer than the size needs.
        let entries = entries.start..entries.end.min(u64::from(snapshot.l1_entries)).max(entries.start);
        let first = snapshot.l1_offset.0.saturating_add(entries.start * 8);
        let mut view = Self {
            storage: Arc::clone(&self.storage),
            header: self.header.clone(),
            l1: self.l1_entries(snapshot.l1_offset, entries)?,
            size,
            file_len: self.file_len,
            salvages: self.salvages,
            lost: Vec::new(),
        };
        if self.salvages {
            view.lost = view.find_lost(HostOffset(first));
        }
        Ok(view)
    }

    /// The virtual size of a snapshot, whose L1 table is large enough for it.
    fn snapshot_size(&self, snapshot: &Snapshot) -> Result<u64> {
        let size = snapshot.disk_size.unwrap_or(self.header.size) & !511;
        if u64::from(snapshot.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(Error::corrupt("Snapshot L1 table too large").advise(Advice::Check));
        }
        if snapshot.l1_offset.0 & (self.header.cluster_bits.bytes() - 1) != 0 {
            return Err(Error::corrupt("Snapshot L1 table offset invalid")
                .at(snapshot.l1_offset.0)
                .advise(Advice::Check));
        }
        let mapped = u64::from(snapshot.l1_entries).saturating_mul(self.table_span());
        if self.salvages && mapped < size {
            // QEMU shows as much as the active disk has.
            return Ok(size.min(mapped.max(self.header.size)));
        }
        if size.div_ceil(self.table_span()) > u64::from(snapshot.l1_entries) {
            return Err(Error::corrupt("Snapshot L1 table is too small").advise(Advice::Check));
        }
        Ok(size)
    }

    /// The bytes that an L2 table maps.
    fn table_span(&self) -> u64 {
        self.header.cluster_bits.bytes() * self.header.l2_entries()
    }

    /// Reads entries of an L1 table; the caller has bounded their number.
    fn l1_entries(&self, table: HostOffset, entries: Range<u64>) -> Result<Vec<u64>> {
        let count = to_usize(entries.end - entries.start);
        let start = HostOffset(table.0.saturating_add(entries.start * 8));
        let l1 = if self.salvages {
            let mut bytes = vec![0; count * size_of::<u64>()];
            read_padded_from(&*self.storage, &mut bytes, start.0, "L1 table")?;
            bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
        } else {
            read_words(&*self.storage, start, count, "L1 table")?
        };
        // Every L2 table takes a cluster. Without this a small file with one table a million times could keep a reader busy for
        // years.
        let tables = l1.iter().filter(|&&entry| self.table(entry).is_some()).count() as u64;
        let clusters = self.header.cluster_bits.clusters(self.file_len);
        if tables > clusters {
            return Err(Error::corrupt(format!(
                "the L1 table leads to {tables} L2 tables, but the file has only {clusters} clusters; is the file cut short?"
            )));
        }
        Ok(l1)
    }
}

/// A part of a disk for which there is no L2 table, or no entry in one, because the image is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Bytes of the disk.
    pub(crate) range: Range<u64>,
    /// Why.
    pub(crate) reason: String,
}

/// Parts that are named one by one. What lies behind the last of them is one part.
const MAX_LOST: usize = 4096;

impl Qcow2 {
    /// What is lost of an image that was opened for salvage, in order.
    #[must_use]
    pub(crate) fn lost(&self) -> &[Lost] {
        &self.lost
    }

    /// The L2 table that an L1 entry leads to; when salvaging, one that lies where a table can lie.
    #[must_use]
    pub(super) fn table(&self, entry: u64) -> Option<HostOffset> {
        l1_target(entry).filter(|&table| !self.salvages || !(self.is_unaligned(table) || self.is_behind(table)))
    }

    /// Whether no cluster begins at `offset`.
    pub(super) fn is_unaligned(&self, offset: HostOffset) -> bool {
        offset.0 & (self.header.cluster_bits.bytes() - 1) != 0
    }

    /// Whether the file ends before `offset`.
    pub(super) fn is_behind(&self, offset: HostOffset) -> bool {
        offset.0 >= self.file_len
    }

    /// The parts of the disk that the L1 table at `table`, which was read, should map and does not.
    fn find_lost(&self, table: HostOffset) -> Vec<Lost> {
        let (span, bits) = (self.table_span(), self.header.cluster_bits);
        let mut all: Vec<Lost> = Vec::new();
        if !self.salvages {
            return all;
        }
        let mut lose = |range: Range<u64>, reason: &dyn Fn() -> String| {
            let range = range.start..range.end.min(self.size);
            if range.is_empty() {
                return;
            }
            let full = all.len() >= MAX_LOST;
            match all.last_mut() {
                Some(last) if last.range.end == range.start || full => last.range.end = range.end,
                _ => all.push(Lost { range, reason: reason() }),
            }
        };
        for (&entry, index) in self.l1.iter().zip(0u64..) {
            let Some(l2) = l1_target(entry) else { continue };
            let (start, end) = (index.saturating_mul(span), (index + 1).saturating_mul(span));
            if self.is_unaligned(l2) {
                lose(start..end, &|| format!("L2 table offset {l2:#x} unaligned (L1 index: {index:#x})"));
            } else if l2.0.saturating_add(bits.bytes()) > self.file_len {
                let entries = self.file_len.saturating_sub(l2.0) / self.header.l2_entry_len() as u64;
                let there = entries.saturating_mul(bits.bytes());
                lose(start.saturating_add(there)..end, &|| {
                    format!("L2 table at {l2:#x} lies past the end of the file; is the file cut short?")
                });
            }
        }
        let there = (self.file_len.saturating_sub(table.0) / 8).min(self.l1.len() as u64);
        lose(there.saturating_mul(span)..self.size, &|| {
            if (self.l1.len() as u64) > there {
                format!("L1 table at {table:#x} lies past the end of the file; is the file cut short?")
            } else {
                "Snapshot L1 table is too small".to_owned()
            }
        });
        all
    }
}

/// Which internal snapshot is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotName {
    /// The one with this id.
    Id(String),
    /// The first one with this name.
    Name(String),
    /// The one with this id and this name.
    IdAndName(String, String),
    /// The one with this id or, where there is none, the first one with this name.
    IdOrName(String),
}

impl SnapshotName {
    fn find(&self, snapshots: Vec<Snapshot>) -> Result<Snapshot> {
        // QEMU's end at the first zero byte.
        let is = |bytes: &[u8], text: &str| bytes.split(|&byte| byte == 0).next() == Some(text.as_bytes());
        let by_id = |id: &str| snapshots.iter().position(|s| is(&s.id, id));
        let by_name = |name: &str| snapshots.iter().position(|s| is(&s.name, name));
        let index = match self {
            Self::Id(id) => by_id(id),
            Self::Name(name) => by_name(name),
            Self::IdAndName(id, name) => snapshots.iter().position(|s| is(&s.id, id) && is(&s.name, name)),
            Self::IdOrName(text) => by_id(text).or_else(|| by_name(text)),
        };
        let snapshot = index.and_then(|index| snapshots.into_iter().nth(index));
        let snapshot = snapshot
            .ok_or_else(|| Error::invalid("Failed to load snapshot: Can't find snapshot"))
            .advise(Advice::ListSnapshots)?;
        if snapshot.is_pool() {
            return Err(Error::invalid(format!(
                "Failed to load snapshot: '{}' is the deduplication pool and holds no disk",
                pool::NAME
            )));
        }
        Ok(snapshot)
    }
}

pub(crate) fn read_header(storage: &dyn Storage) -> Result<Header> {
    let mut start = vec![0; V3_LENGTH];
    let read = storage.read_at(&mut start, 0).at("Could not read its header")?;
    start.truncate(read);
    let mut cluster = vec![0; Header::needed_length(&start).map_err(advised)?];
    let read = storage.read_at(&mut cluster, 0).at("Could not read its header")?;
    cluster.truncate(read);
    Header::decode(&cluster).map_err(advised)
}

/// Says what can be done about a header like this.
fn advised(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Format => error.advise(Advice::Identify),
        ErrorKind::Unsupported => error.ending("; convert it with the program that wrote it"),
        _ => error.ending("; no check mends a header, take a sound copy of the image"),
    }
}

/// Reads `count` big-endian words; the caller has bounded `count`.
fn read_words(storage: &dyn Storage, offset: HostOffset, count: usize, what: &str) -> Result<Vec<u64>> {
    let mut bytes = zeroed(count * size_of::<u64>())?;
    read_exact(storage, &mut bytes, offset.0, what)?;
    collected(bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)))
}

/// How bytes of a table are read.
type ReadTable = fn(&dyn Storage, &mut [u8], u64, &str) -> Result<()>;

fn read_exact_from(storage: &dyn Storage, buf: &mut [u8], offset: u64, what: &str) -> Result<()> {
    read_exact(storage, buf, offset, what)
}

/// What the file lacks reads as zeros.
fn read_padded_from(storage: &dyn Storage, buf: &mut [u8], offset: u64, what: &str) -> Result<()> {
    read_padded(storage, buf, offset)
        .at(format_args!("Could not read the {what} at {offset:#x}"))
        .map_err(|e| e.at(offset))
}

fn read_snapshots(storage: &dyn Storage, header: &Header, file_len: u64, read: ReadTable) -> Result<Vec<Snapshot>> {
    // The table says nowhere how long it is: read a little, and more where its entries need it.
    let available = file_len.saturating_sub(header.snapshots_offset.0).min(MAX_TABLE_BYTES);
    let mut length = 4096.min(available);
    loop {
        let mut bytes = zeroed(to_usize(length))?;
        read(storage, &mut bytes, header.snapshots_offset.0, "snapshot table")?;
        match decode_snapshots(&bytes, header.snapshots) {
            Err(_) if length < available => length = (length * 2).min(available),
            result => return result,
        }
    }
}

fn decode_snapshots(mut bytes: &[u8], count: u32) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    for index in 0..count {
        let (snapshot, length) =
            Snapshot::decode(bytes).map_err(|e| e.ending(format!(" {index}")).advise(Advice::Repair))?;
        bytes = bytes.get(length..).unwrap_or_default();
        snapshots.push(snapshot);
    }
    Ok(snapshots)
}
