//! The pool's directory: a header, then one record for each member in member order. Big endian.
//!
//! ```text
//!    0  8  magic "DDUPPOOL"
//!    8  4  version, 1
//!   12  4  length of this header, 128
//!   16  4  fingerprint algorithm, 1: SHA-256
//!   20  4  cluster_bits
//!   24  8  number of members
//!   32  4  number of L1 entries that hold members
//!   36  4  length of a record, 40
//!   40  8  sharer limit
//!   48 16  zero
//!   64 32  SHA-256 of all records
//!   96 32  SHA-256 of bytes 0 to 95
//! ```

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::digest::{Sha, sha256};
use crate::units::{ClusterBits, GuestOffset};

const MAGIC: [u8; 8] = *b"DDUPPOOL";
const VERSION: u32 = 1;
const SHA256: u32 = 1;

/// Bytes of the header.
pub const HEADER_LENGTH: usize = size_of::<RawHeader>();
/// Bytes of a record.
pub(crate) const RECORD_LENGTH: usize = size_of::<RawRecord>();
/// The two as they stand in the file.
const HEADER_LENGTH_WORD: U32 = U32::new(128);
const RECORD_LENGTH_WORD: U32 = U32::new(40);

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    header_length: U32,
    algorithm: U32,
    cluster_bits: U32,
    members: U64,
    member_l1_entries: U32,
    record_length: U32,
    sharer_limit: U64,
    reserved: [u8; 16],
    records_sha256: [u8; 32],
    header_sha256: [u8; 32],
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    sha256: [u8; 32],
    /// Guest offset, with flags in the bits below the smallest cluster size.
    guest: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 128);
const _: () = assert!(std::mem::offset_of!(RawHeader, records_sha256) == 64);
const _: () = assert!(size_of::<RawRecord>() == 40);

/// The member takes no more sharers.
const RETIRED: u64 = 1;
/// Bits that a guest offset never uses.
const FLAGS: u64 = 511;

/// What the directory says of the pool as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryHeader {
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Number of members and of records.
    pub members: u64,
    /// L1 entries of the pool that hold members; those of the directory itself follow.
    pub member_l1_entries: u32,
    /// How many sharers a member may have.
    pub sharer_limit: u64,
    /// SHA-256 of all records.
    pub records_sha256: Sha,
}

impl DirectoryHeader {
    /// The bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LENGTH] {
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            header_length: HEADER_LENGTH_WORD,
            algorithm: SHA256.into(),
            cluster_bits: self.cluster_bits.bits().into(),
            members: self.members.into(),
            member_l1_entries: self.member_l1_entries.into(),
            record_length: RECORD_LENGTH_WORD,
            sharer_limit: self.sharer_limit.into(),
            reserved: [0; 16],
            records_sha256: self.records_sha256,
            header_sha256: [0; 32],
        };
        raw.header_sha256 = raw.own_sha256();
        zerocopy::transmute!(raw)
    }

    /// The header at the start of `bytes`, or `None` where it is damaged or of an unknown version: a pool without a directory.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
        let known = raw.magic == MAGIC
            && raw.version.get() == VERSION
            && raw.header_length == HEADER_LENGTH_WORD
            && raw.algorithm.get() == SHA256
            && raw.record_length == RECORD_LENGTH_WORD
            && raw.header_sha256 == raw.own_sha256();
        let header = Self {
            cluster_bits: ClusterBits::new(raw.cluster_bits.get())?,
            members: raw.members.get(),
            member_l1_entries: raw.member_l1_entries.get(),
            sharer_limit: raw.sharer_limit.get(),
            records_sha256: raw.records_sha256,
        };
        known.then_some(header)
    }

    /// Bytes of a directory with `members` members.
    #[must_use]
    pub fn directory_bytes(members: u64) -> u64 {
        HEADER_LENGTH as u64 + members * RECORD_LENGTH as u64
    }
}

impl RawHeader {
    fn own_sha256(&self) -> Sha {
        sha256(self.as_bytes().split_at(HEADER_LENGTH - 32).0)
    }
}

/// What the directory says of one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// SHA-256 of the cluster's content.
    pub sha256: Sha,
    /// The lowest guest offset that mapped to the cluster when it was pooled.
    pub guest: GuestOffset,
    /// Whether the member takes no more sharers.
    pub retired: bool,
}

impl Record {
    /// The bytes of the record.
    #[doc(hidden)]
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_LENGTH] {
        let flags = if self.retired { RETIRED } else { 0 };
        zerocopy::transmute!(RawRecord { sha256: self.sha256, guest: (self.guest.0 & !FLAGS | flags).into() })
    }

    /// The record in `bytes`.
    #[doc(hidden)]
    #[must_use]
    pub fn decode(bytes: &[u8; RECORD_LENGTH]) -> Self {
        let raw: RawRecord = zerocopy::transmute!(*bytes);
        let guest = raw.guest.get();
        Self { sha256: raw.sha256, guest: GuestOffset(guest & !FLAGS), retired: guest & RETIRED != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_header_is_no_header() {
        let header = DirectoryHeader {
            cluster_bits: ClusterBits::GRAIN,
            members: 3,
            member_l1_entries: 1,
            sharer_limit: 1 << 31,
            records_sha256: [7; 32],
        };
        let bytes = header.encode();
        assert_eq!(DirectoryHeader::decode(&bytes), Some(header));
        for bit in 0..HEADER_LENGTH * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(DirectoryHeader::decode(&damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn a_record_keeps_its_flag_beside_the_offset() {
        let record = Record { sha256: [1; 32], guest: GuestOffset(0x1200), retired: true };
        assert_eq!(Record::decode(&record.encode()), record);
    }
}
