//! Opening: header, L1 table, snapshots.

use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::format::header::{Header, MAX_L1_BYTES, V3_LENGTH};
use crate::format::snapshot::{MAX_TABLE_BYTES, Snapshot};
use crate::format::table::l1_target;
use crate::pool;
use crate::storage::{Storage, read_exact};
use crate::units::{HostOffset, to_usize};

use super::Qcow2;

impl Qcow2 {
    /// Opens the active disk, or the internal snapshot that has `snapshot` as its id or, failing that, as its name.
    ///
    /// # Errors
    /// Fails where the image is not QCOW2, breaks the format, or uses what is refused by name (encryption, external data file,
    /// unknown incompatible features, a set corrupt bit).
    pub fn open(storage: Box<dyn Storage>, snapshot: Option<&SnapshotName>) -> Result<Self> {
        let file_len = storage.len().at("Could not get its length")?;
        let header = read_header(&*storage)?;
        header.refuse_unreadable()?;
        let size = header.size;
        let mut image = Self { storage: Arc::from(storage), header, l1: Vec::new(), size, file_len };
        match snapshot {
            None => {
                // What lies behind the disk is VM state, which no guest reads.
                let needed = size.div_ceil(image.table_span()).min(u64::from(image.header.l1_entries));
                image.l1 = image.l1_entries(image.header.l1_offset, 0..needed)?;
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
        read_snapshots(&*self.storage, &self.header, self.file_len)
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
        let l1 = self.l1_entries(snapshot.l1_offset, entries)?;
        Ok(Self { storage: Arc::clone(&self.storage), header: self.header.clone(), l1, size, file_len: self.file_len })
    }

    /// The virtual size of a snapshot, whose L1 table is large enough for it.
    fn snapshot_size(&self, snapshot: &Snapshot) -> Result<u64> {
        let size = snapshot.disk_size.unwrap_or(self.header.size) & !511;
        if u64::from(snapshot.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(Error::corrupt("Snapshot L1 table too large; see dedup-img check"));
        }
        if snapshot.l1_offset.0 & (self.header.cluster_bits.bytes() - 1) != 0 {
            return Err(Error::corrupt("Snapshot L1 table offset invalid; see dedup-img check"));
        }
        if size.div_ceil(self.table_span()) > u64::from(snapshot.l1_entries) {
            return Err(Error::corrupt("Snapshot L1 table is too small; see dedup-img check"));
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
        let l1 = read_words(&*self.storage, start, count, "L1 table")?;
        // Every L2 table takes a cluster. Without this a small file with one table a million times could keep a reader busy for
        // years.
        let tables = l1.iter().filter(|&&entry| l1_target(entry).is_some()).count() as u64;
        let clusters = self.header.cluster_bits.clusters(self.file_len);
        if tables > clusters {
            return Err(Error::corrupt(format!(
                "the L1 table leads to {tables} L2 tables, but the file has only {clusters} clusters; is the file cut short?"
            )));
        }
        Ok(l1)
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
        let by_id = |id: &str| snapshots.iter().position(|s| s.id == id.as_bytes());
        let by_name = |name: &str| snapshots.iter().position(|s| s.name == name.as_bytes());
        let index = match self {
            Self::Id(id) => by_id(id),
            Self::Name(name) => by_name(name),
            Self::IdAndName(id, name) => {
                snapshots.iter().position(|s| s.id == id.as_bytes() && s.name == name.as_bytes())
            }
            Self::IdOrName(text) => by_id(text).or_else(|| by_name(text)),
        };
        let snapshot = index.and_then(|index| snapshots.into_iter().nth(index));
        let snapshot = snapshot
            .ok_or_else(|| Error::invalid("Failed to load snapshot: Can't find snapshot; see qemu-img snapshot -l"))?;
        if pool::is_pool(&snapshot) {
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
    let advice = match error.kind() {
        ErrorKind::Format => "; 'qemu-img info' says what it is",
        ErrorKind::Unsupported => "; convert it with the program that wrote it",
        _ => "; no check mends a header, take a sound copy of the image",
    };
    error.ending(advice)
}

/// Reads `count` big-endian words; the caller has bounded `count`.
fn read_words(storage: &dyn Storage, offset: HostOffset, count: usize, what: &str) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count * size_of::<u64>()];
    read_exact(storage, &mut bytes, offset.0, what)?;
    Ok(bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

pub(super) fn read_snapshots(storage: &dyn Storage, header: &Header, file_len: u64) -> Result<Vec<Snapshot>> {
    // The table says nowhere how long it is: read a little, and more where its entries need it.
    let available = file_len.saturating_sub(header.snapshots_offset.0).min(MAX_TABLE_BYTES);
    let mut length = 4096.min(available);
    loop {
        let mut bytes = vec![0; to_usize(length)];
        read_exact(storage, &mut bytes, header.snapshots_offset.0, "snapshot table")?;
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
            Snapshot::decode(bytes).map_err(|e| e.ending(&format!(" {index}; see qemu-img check -r all")))?;
        bytes = bytes.get(length..).unwrap_or_default();
        snapshots.push(snapshot);
    }
    Ok(snapshots)
}
