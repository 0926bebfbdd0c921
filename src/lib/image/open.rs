//! Opening: header, L1 table, snapshots.

use std::mem::size_of;

use crate::error::{Error, IoContext, Result};
use crate::format::header::{Header, MAX_L1_BYTES, V3_LENGTH};
use crate::format::snapshot::{MAX_TABLE_BYTES, Snapshot};
use crate::pool;
use crate::storage::{Storage, read_exact};
use crate::units::HostOffset;

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
        let (l1_offset, l1_entries, size) = match snapshot {
            None => (header.l1_offset, header.l1_entries, header.size),
            Some(name) => {
                let snapshot = name.find(read_snapshots(&*storage, &header, file_len)?)?;
                let size = snapshot.disk_size.unwrap_or(header.size) & !511;
                let needed = size.div_ceil(header.cluster_bits.bytes() * header.l2_entries());
                if u64::from(snapshot.l1_entries) * 8 > MAX_L1_BYTES {
                    return Err(Error::corrupt("Snapshot L1 table too large"));
                }
                if snapshot.l1_offset.0 & (header.cluster_bits.bytes() - 1) != 0 {
                    return Err(Error::corrupt("Snapshot L1 table offset invalid"));
                }
                if needed > u64::from(snapshot.l1_entries) {
                    return Err(Error::corrupt("Snapshot L1 table is too small"));
                }
                (snapshot.l1_offset, snapshot.l1_entries, size)
            }
        };
        // What lies behind the disk is VM state, which no guest reads.
        let needed = size.div_ceil(header.cluster_bits.bytes() * header.l2_entries()).min(u64::from(l1_entries));
        let l1 = read_words(&*storage, l1_offset, usize::try_from(needed).unwrap_or(0), "L1 table")?;
        Ok(Self { storage, header, l1, size, file_len })
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
        let snapshot = snapshot.ok_or_else(|| Error::invalid("Failed to load snapshot: Can't find snapshot"))?;
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
    let mut cluster = vec![0; Header::needed_length(&start)?];
    let read = storage.read_at(&mut cluster, 0).at("Could not read its header")?;
    cluster.truncate(read);
    Header::decode(&cluster)
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
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
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
            Snapshot::decode(bytes).map_err(|e| e.prefixed(&format!("snapshot {index} of {count}")))?;
        bytes = bytes.get(length..).unwrap_or_default();
        snapshots.push(snapshot);
    }
    Ok(snapshots)
}
