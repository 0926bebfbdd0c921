//! Snapshot table entries (spec, "Snapshots").

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::{u16_at, u32_at, u64_at};
use crate::error::{Error, Result};
use crate::name::shown;
use crate::units::HostOffset;

/// QEMU: the largest snapshot table in bytes.
pub(crate) const MAX_TABLE_BYTES: u64 = 64 << 20;
/// QEMU: the most extra data of one entry.
pub(crate) const MAX_EXTRA: usize = 1024;
/// Bytes before the extra data.
pub(crate) const FIXED: usize = 40;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where its L1 table begins.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Unique id, a decimal string as QEMU writes it.
    pub id: Vec<u8>,
    /// Name.
    pub name: Vec<u8>,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds of the date.
    pub date_nsec: u32,
    /// Guest run time in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state, behind the disk in the L1 table.
    pub vm_state_size: u64,
    /// Virtual disk size at the time of the snapshot; version 2 images may not say it.
    pub disk_size: Option<u64>,
    /// Instruction count; `u64::MAX` for none.
    pub icount: u64,
    /// Extra data that QEMU 10 does not know, kept as it is.
    pub unknown_extra: Vec<u8>,
}

impl Snapshot {
    /// The name, as it is shown to people: see [`shown`].
    #[must_use]
    pub fn shown_name(&self) -> String {
        shown(OsStr::from_bytes(&self.name))
    }

    /// Decodes the entry at the start of `bytes`; also returns its length, which is a multiple of 8.
    ///
    /// # Errors
    /// Fails where the entry is cut short or its extra data is longer than QEMU accepts.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, usize)> {
        let (entry, length) = Self::try_decode(bytes)
            .ok_or_else(|| Error::corrupt("The end of the file cuts short snapshot table entry"))?;
        match entry {
            Some(entry) => Ok((entry, length)),
            None => Err(Error::corrupt("Too much extra metadata in snapshot table entry")),
        }
    }

    fn try_decode(bytes: &[u8]) -> Option<(Option<Self>, usize)> {
        let id_len = usize::from(u16_at(bytes, 12)?);
        let name_len = usize::from(u16_at(bytes, 14)?);
        let extra_len = usize::try_from(u32_at(bytes, 36)?).ok()?;
        if extra_len > MAX_EXTRA {
            return Some((None, 0));
        }
        let id_at = FIXED + extra_len;
        let name_at = id_at + id_len;
        let extra = bytes.get(FIXED..id_at)?;
        let entry = Self {
            l1_offset: HostOffset(u64_at(bytes, 0)?),
            l1_entries: u32_at(bytes, 8)?,
            id: bytes.get(id_at..name_at)?.to_vec(),
            name: bytes.get(name_at..name_at + name_len)?.to_vec(),
            date_sec: u32_at(bytes, 16)?,
            date_nsec: u32_at(bytes, 20)?,
            vm_clock_nsec: u64_at(bytes, 24)?,
            vm_state_size: match u64_at(extra, 0) {
                Some(size) => size,
                None => u64::from(u32_at(bytes, 32)?),
            },
            disk_size: u64_at(extra, 8),
            // None is kept where there is no field for it (spec: -1).
            icount: u64_at(extra, 16).unwrap_or(u64::MAX),
            unknown_extra: extra.get(24..).unwrap_or_default().to_vec(),
        };
        Some((Some(entry), (name_at + name_len).next_multiple_of(8)))
    }

    /// The entry's bytes, padded to a multiple of 8.
    #[must_use]
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Both are as long as an entry has said that they are, or a constant: they fit.
        let len16 = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes();
        let extra_len = u32::try_from(24 + self.unknown_extra.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(96);
        bytes.extend_from_slice(&self.l1_offset.0.to_be_bytes());
        bytes.extend_from_slice(&self.l1_entries.to_be_bytes());
        bytes.extend_from_slice(&len16(&self.id));
        bytes.extend_from_slice(&len16(&self.name));
        bytes.extend_from_slice(&self.date_sec.to_be_bytes());
        bytes.extend_from_slice(&self.date_nsec.to_be_bytes());
        bytes.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        // The 32-bit size is 0 where it does not fit, as QEMU writes it; the 64-bit one in the extra data counts.
        bytes.extend_from_slice(&u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        bytes.extend_from_slice(&extra_len.to_be_bytes());
        bytes.extend_from_slice(&self.vm_state_size.to_be_bytes());
        bytes.extend_from_slice(&self.disk_size.unwrap_or(0).to_be_bytes());
        bytes.extend_from_slice(&self.icount.to_be_bytes());
        bytes.extend_from_slice(&self.unknown_extra);
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_and_decode_are_inverse() {
        let snapshot = Snapshot {
            l1_offset: HostOffset(0x30000),
            l1_entries: 7,
            id: b"12".to_vec(),
            name: b"before".to_vec(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 1 << 33,
            disk_size: Some(1 << 40),
            icount: u64::MAX,
            unknown_extra: vec![9; 8],
        };
        let bytes = snapshot.encode();
        assert_eq!(Snapshot::decode(&bytes).unwrap(), (snapshot, bytes.len()));
        for cut in 0..bytes.len() - 8 {
            assert!(Snapshot::decode(&bytes[..cut]).is_err());
        }
    }
}
