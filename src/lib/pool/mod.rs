//! The pool: an internal snapshot that holds one reference to every shared cluster and keeps their fingerprints as its VM state.
//!
//! Losing it loses no data: `qemu-img snapshot -d dedup-pool` makes an image a plain one.

pub(crate) mod directory;

pub use directory::Record;

use crate::format::snapshot::Snapshot;
use crate::units::{ClusterBits, HostOffset};
use directory::DirectoryHeader;

/// The name of the pool's snapshot.
pub const NAME: &str = "dedup-pool";

/// The pool's disk size: 2^63 - 512 bytes.
///
/// Reverting to a snapshot first resizes the disk, and no QEMU resizes to this: it refuses and leaves the active disk alone
/// (`qemu-img snapshot -a` and `loadvm` of 10.0.2).
pub(crate) const GUARD_SIZE: u64 = (1 << 63) - 512;

/// Which clusters are pooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pin {
    /// Those with two or more sharers.
    #[default]
    Shared,
    /// All data clusters: nothing is ever written in place, and every content can be verified.
    All,
}

impl Snapshot {
    /// Whether this is the deduplication pool: by its name and its guard size together.
    #[must_use]
    pub fn is_pool(&self) -> bool {
        self.name == NAME.as_bytes() && self.disk_size == Some(GUARD_SIZE)
    }
}

/// The clusters that a pool of `members` members takes for itself, with an L1 table of at least `l1_entries` entries.
#[must_use]
pub(crate) fn clusters(members: u64, bits: ClusterBits, l1_entries: u32) -> u64 {
    let directory = bits.clusters(DirectoryHeader::directory_bytes(members));
    let tables = members.div_ceil(bits.entries()) + directory.div_ceil(bits.entries());
    bits.clusters(tables.max(u64::from(l1_entries)) * 8) + tables + directory
}

/// The id of a pool beside `snapshots`: the highest of theirs plus 1.
#[must_use]
pub(crate) fn next_id(snapshots: &[Snapshot]) -> u64 {
    let number = |snapshot: &Snapshot| str::from_utf8(&snapshot.id).ok()?.parse::<u64>().ok();
    snapshots.iter().filter_map(number).max().unwrap_or(0).saturating_add(1)
}

/// The snapshot table entry of a pool.
#[must_use]
pub(crate) fn snapshot(id: u64, l1_offset: HostOffset, l1_entries: u32, directory_bytes: u64) -> Snapshot {
    Snapshot {
        l1_offset,
        l1_entries,
        id: id.to_string().into_bytes(),
        name: NAME.as_bytes().to_vec(),
        date_sec: 0,
        date_nsec: 0,
        vm_clock_nsec: 0,
        vm_state_size: directory_bytes,
        disk_size: Some(GUARD_SIZE),
        icount: u64::MAX,
        unknown_extra: Vec::new(),
    }
}
