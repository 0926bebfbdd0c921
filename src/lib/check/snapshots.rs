//! The snapshot table.

use super::Checker;
use super::finding::{Kind, Severity, Use};
use crate::error::{Error, ErrorKind, Result};
use crate::format::snapshot::{MAX_TABLE_BYTES, Snapshot};
use crate::storage::read_padded;
use crate::units::to_usize;

/// Room for one entry: fixed part, extra data, id and name at their longest.
const ENTRY: u64 = 40 + 1024 + 2 * 65536;

impl Checker<'_> {
    /// Reads and counts the snapshot table. What the file lacks of it reads as zeros, as for QEMU.
    pub(super) fn snapshot_table(&mut self) -> Result<Vec<Snapshot>> {
        let start = self.header.snapshots_offset.0;
        let mut snapshots = Vec::new();
        let mut at = 0;
        let mut bytes = vec![0; to_usize(ENTRY)];
        for index in 0..self.header.snapshots as usize {
            read_padded(self.storage, &mut bytes, start.saturating_add(at))
                .map_err(|e| Error::io("Could not read the snapshot table", e))?;
            let (snapshot, length) = Snapshot::decode(&bytes).map_err(|e| {
                e.prefixed("ERROR failed to read the snapshot table")
                    .ending(&format!(" {index}; see qemu-img check -r all"))
            })?;
            if self.header.version >= 3 && snapshot.disk_size.is_none() {
                self.say(Severity::Corruption, Kind::SnapshotIncomplete(index));
            }
            at += length as u64;
            if at > MAX_TABLE_BYTES {
                return Err(Error::new(ErrorKind::Limit, "the snapshot table is larger than 64 MiB"));
            }
            snapshots.push(snapshot);
        }
        self.table_bytes = at;
        Ok(snapshots)
    }

    /// Counts the snapshot table.
    pub(super) fn claim_snapshot_table(&mut self) {
        self.claim(self.header.snapshots_offset.0, self.table_bytes, Use::SnapshotTable, None);
    }
}
