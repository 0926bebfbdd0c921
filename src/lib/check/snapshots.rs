//! The snapshot table.

use std::str;

use crate::check::Checker;
use crate::check::finding::{Kind, Severity, Use};
use crate::error::{Advice, Context, Doing, Error, ErrorKind, OrInternal, Result, Table};
use crate::format::header::{Header, MAX_L1_BYTES};
use crate::format::snapshot::{FIXED, MAX_EXTRA, MAX_TABLE_BYTES, Snapshot};
use crate::format::{u16_at, u32_at};
use crate::storage::read_padded;
use crate::units::to_usize;

const CUT: &str = "an entry of the snapshot table is shorter than its fixed part and what is kept of its extra data";

/// Room for one entry: fixed part, extra data, id and name at their longest.
const ENTRY: u64 = 40 + 1024 + 2 * 65536;
/// The last offset of any file.
const LAST: u64 = i64::MAX.cast_unsigned();

impl Checker<'_> {
    /// Reads and counts the snapshot table. What the file lacks of it reads as zeros, as for QEMU.
    pub(crate) fn snapshot_table(&mut self) -> Result<Vec<Snapshot>> {
        let start = self.header.snapshots_offset.0;
        let mut snapshots = Vec::new();
        let (mut incomplete, mut long) = (Vec::new(), Vec::new());
        let mut at = 0;
        let mut bytes = vec![0; to_usize(ENTRY)];
        for index in 0..self.header.snapshots as usize {
            let place = start.saturating_add(at);
            self.read_table(&mut bytes, place)?;
            let extra = u32_at(&bytes, 36).unwrap_or(0);
            let (snapshot, length) = match extra as usize > MAX_EXTRA && self.how.any_extra {
                true => {
                    long.push((index, extra));
                    self.long_entry(&mut bytes, place, extra)?
                }
                false => Snapshot::decode(&bytes).map_err(|e| {
                    e.doing(Doing::Other("ERROR failed to read the snapshot table".into()))
                        .ending(format!(" {index}"))
                        .advise(Advice::Repair)
                })?,
            };
            if self.header.version >= 3 && snapshot.disk_size.is_none() {
                incomplete.push(index);
            }
            at += length as u64;
            if at > MAX_TABLE_BYTES {
                return Err(Error::new(ErrorKind::Limit, "the snapshot table is larger than 64 MiB"));
            }
            snapshots.push(snapshot);
        }
        self.long_entries = !long.is_empty();
        let plausible = snapshots.iter().all(|snapshot| self.is_plausible(snapshot));
        for index in incomplete {
            self.say(Severity::Corruption, Kind::SnapshotIncomplete(index, plausible));
        }
        for (index, extra) in long {
            // Without a repair QEMU goes no further here.
            self.say(Severity::CheckError, Kind::SnapshotExtra(index, extra, plausible));
        }
        self.table_bytes = at;
        Ok(snapshots)
    }

    fn read_table(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let there = to_usize(LAST.saturating_sub(at)).min(buffer.len());
        let (there, behind) = buffer.split_at_mut(there);
        behind.fill(0);
        read_padded(self.storage, there, at).doing(|| Doing::Reading(Table::Snapshots, None))
    }

    /// The entry at `place`, whose beginning is in `bytes`, with as much of its extra data as QEMU keeps; and its length.
    fn long_entry(&self, bytes: &mut [u8], place: u64, extra: u32) -> Result<(Snapshot, usize)> {
        let names = usize::from(u16_at(bytes, 12).unwrap_or(0)) + usize::from(u16_at(bytes, 14).unwrap_or(0));
        let kept = u32::try_from(MAX_EXTRA).ok().or_internal(CUT)?.to_be_bytes();
        let mut entry = bytes.get(..FIXED + MAX_EXTRA).or_internal(CUT)?.to_vec();
        entry.get_mut(36..40).or_internal(CUT)?.copy_from_slice(&kept);
        entry.resize(FIXED + MAX_EXTRA + names, 0);
        let behind = place.saturating_add(FIXED as u64).saturating_add(u64::from(extra));
        self.read_table(entry.get_mut(FIXED + MAX_EXTRA..).or_internal(CUT)?, behind)?;
        let (snapshot, _) = Snapshot::decode(&entry)?;
        Ok((snapshot, (FIXED + extra as usize + names).next_multiple_of(8)))
    }

    /// Whether all of an entry makes sense, so that its lengths are right: a wrong one would make an id of other bytes.
    fn is_plausible(&self, snapshot: &Snapshot) -> bool {
        let bits = self.header.cluster_bits;
        let bytes = u64::from(snapshot.l1_entries) * 8;
        let end = snapshot.l1_offset.0.saturating_add(bytes);
        let has_id = !snapshot.id.is_empty() && snapshot.id.iter().all(u8::is_ascii_digit);
        let has_name = str::from_utf8(&snapshot.name).is_ok_and(|name| !name.contains(char::is_control));
        let has_table = snapshot.l1_offset.0 & (bits.bytes() - 1) == 0
            && bytes <= MAX_L1_BYTES
            && (bytes == 0 || snapshot.l1_offset.0 != 0)
            && end <= self.file_len.saturating_add(bits.bytes());
        has_id && has_name && has_table
    }

    /// Counts the snapshot table.
    pub(crate) fn claim_snapshot_table(&mut self) {
        self.claim(self.header.snapshots_offset.0, self.table_bytes, Use::SnapshotTable, None);
    }
}

/// The table of `snapshots` with what their entries in a version 3 image lack; QEMU takes the same values for it.
pub(crate) fn mended(snapshots: &[Snapshot], header: &Header) -> Result<Vec<u8>> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        let disk_size = Some(snapshot.disk_size.unwrap_or(header.size));
        table.extend_from_slice(&Snapshot { disk_size, ..snapshot.clone() }.encode());
    }
    match table.len() as u64 {
        ..=MAX_TABLE_BYTES => Ok(table),
        _ => Err(Error::new(ErrorKind::Limit, "the mended snapshot table would be larger than 64 MiB")),
    }
}
