//! What a check finds, as data.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::error::Advice;
use crate::format::snapshot::MAX_EXTRA;
use crate::pool;
use crate::units::{GuestOffset, HostOffset};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Severity {
    /// Worth knowing; neither data nor space is at risk.
    Benign,
    /// Space is lost, nothing else.
    Leak,
    /// Data is, or further writes may be, damaged.
    Corruption,
    /// Something could not be checked.
    CheckError,
}

/// Whose L1 table leads to a place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Layer {
    /// The active disk.
    Active,
    /// The snapshot of this id and name.
    Snapshot {
        /// Its id.
        id: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
    /// The deduplication pool.
    Pool,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active => f.write_str("active disk"),
            Self::Snapshot { id, name } => write!(f, "snapshot {id} ({name})"),
            Self::Pool => f.write_str("pool"),
        }
    }
}

/// What a part of the file is used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Use {
    /// The first cluster.
    Header,
    /// An L1 table.
    L1(Layer),
    /// An L2 table.
    L2(Layer),
    /// Guest data, or a compressed cluster.
    Data(Layer),
    /// Guest data of some layer.
    SomeData,
    /// The snapshot table.
    SnapshotTable,
    /// The refcount table.
    RefcountTable,
    /// A refcount block, by its index in the refcount table.
    RefcountBlock(u64),
    /// The LUKS header.
    LuksHeader,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of a bitmap, by the bitmap's name.
    BitmapTable(String),
    /// A piece of a bitmap, by the bitmap's name.
    BitmapData(String),
}

impl Use {
    /// Whether it is part of the refcount structure.
    fn is_refcounts(&self) -> bool {
        matches!(self, Self::RefcountTable | Self::RefcountBlock(_))
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::L1(layer) => write!(f, "L1 table of the {layer}"),
            Self::L2(layer) => write!(f, "L2 table of the {layer}"),
            Self::Data(layer) => write!(f, "data of the {layer}"),
            Self::SomeData => f.write_str("guest data"),
            Self::SnapshotTable => f.write_str("snapshot table"),
            Self::RefcountTable => f.write_str("refcount table"),
            Self::RefcountBlock(index) => write!(f, "refcount block {index}"),
            Self::LuksHeader => f.write_str("LUKS header"),
            Self::BitmapDirectory => f.write_str("bitmap directory"),
            Self::BitmapTable(name) => write!(f, "table of bitmap '{name}'"),
            Self::BitmapData(name) => write!(f, "data of bitmap '{name}'"),
        }
    }
}

/// A place on the disk of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct At {
    /// The layer.
    pub layer: Layer,
    /// The guest offset.
    pub guest: GuestOffset,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, guest offset {:#x})", self.layer, self.guest)
    }
}

/// What is wrong. Where `qemu-img check` has words for it, [`fmt::Display`] begins with them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// A reference to something that lies past the end of the file.
    PastEnd {
        /// What is there, or should be.
        to: Use,
        /// Its offset in bytes.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The guest offset that it is for.
        at: Option<GuestOffset>,
    },
    /// More references than a refcount of this width can hold.
    Overflow(HostOffset),
    /// Reserved bits of an L1 entry are set: the entry.
    L1Reserved(At, u64),
    /// An L1 entry points to no cluster boundary.
    L2Unaligned(At, HostOffset),
    /// Reserved bits of an L2 entry are set: the entry.
    L2Reserved(At, u64),
    /// A compressed cluster has the COPIED flag.
    CompressedCopied(At, HostOffset),
    /// A compressed cluster in an image whose data lies elsewhere: the entry.
    CompressedDataFile(At, u64),
    /// A compressed cluster with subclusters: the entry.
    CompressedSubclusters(At, u64),
    /// A subcluster is allocated and zero.
    SubclusterConflict(At, HostOffset),
    /// An unallocated cluster has allocated subclusters.
    SubclusterWithoutCluster(At),
    /// A data cluster at no cluster boundary.
    DataUnaligned(At, HostOffset),
    /// A preallocated cluster at no cluster boundary.
    PreallocationUnaligned(At, HostOffset),
    /// A zero cluster in a version 2 image, which QEMU cannot read.
    ZeroInVersion2(At),
    /// COPIED in an entry that points to nothing: the entry.
    CopiedNothing(At, u64),
    /// A version 3 snapshot table entry, by index, without its 64-bit sizes; whether all else in the table is plausible, so that it
    /// can be written anew.
    SnapshotIncomplete(usize, bool),
    /// A snapshot table entry, by index, with so many bytes of extra data, which is more than QEMU reads; whether all else in the
    /// table is plausible.
    SnapshotExtra(usize, u32, bool),
    /// The image is marked corrupt.
    MarkedCorrupt,
    /// A snapshot's L1 table at no cluster boundary.
    SnapshotL1Unaligned(Layer, HostOffset),
    /// A snapshot's L1 table with more entries than QEMU accepts.
    SnapshotL1TooLarge(Layer, u32),
    /// Snapshots in an image whose data lies elsewhere: how many.
    SnapshotsWithDataFile(usize),
    /// An entry of the table of the named bitmap that means nothing.
    BitmapEntry(String, u64),
    /// The bitmap directory breaks the format.
    BitmapDirectory,
    /// Reserved bits of the refcount table entry of this index are set.
    RefcountTableReserved(u64),
    /// The refcount block of this index is at no cluster boundary.
    RefcountBlockUnaligned(u64),
    /// The refcount block of this index is past the end of the file.
    RefcountBlockOutside(u64),
    /// The refcount block of this index has so many references instead of one.
    RefcountBlockShared(u64, u64),
    /// The refcount of this cluster cannot be read.
    RefcountUnreadable(u64),
    /// A refcount lower than the number of references.
    RefcountTooLow(Count),
    /// A refcount higher than the number of references.
    Leaked(Count),
    /// The COPIED flag of an L1 entry contradicts the refcount of its L2 table.
    CopiedL2(At, Flag),
    /// The COPIED flag of an L2 entry contradicts the refcount of its cluster.
    CopiedData(At, Flag),
    /// Two parts of the image claim the same cluster, and only one can have it.
    Overlap(u64, Use, Use),
    /// A pooled cluster does not have the content that its SHA-256 names.
    DataDamaged(HostOffset, Vec<At>),
    /// The pool's directory is not used, and why; whether a repair makes it anew in its place.
    StaleDirectory(&'static str, bool),
    /// A remark on the image as a whole.
    Remark(Remark),
    /// More findings in L2 tables, which are counted and not described.
    More(More),
}

/// A remark on the image as a whole: nothing in it is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Remark {
    /// These autoclear feature bits are set, which nobody knows, in an image with internal snapshots.
    UnknownAutoclear(u64),
    /// The header says that bitmaps are valid, and there are none.
    NoBitmaps,
    /// There are internal snapshots and persistent bitmaps.
    SnapshotsAndBitmaps,
    /// The virtual size as stored, which is no multiple of 512.
    OddSize(u64),
    /// A snapshot that is no pool has the pool's name.
    NotAPool,
    /// The pool's member of this index lies elsewhere, or has flags.
    MemberOutOfPlace(u64),
    /// The pool's member of this index lies before the one before it.
    MemberOutOfOrder(u64),
    /// Members of the pool have more users than they should.
    TooManySharers {
        /// How many members.
        members: u64,
        /// How many users they should have at the most.
        limit: u64,
    },
    /// So many shared clusters are not in the pool.
    Unpooled(usize),
    /// Leaked clusters were not freed.
    LeaksKept,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownAutoclear(bits) => write!(f, "unknown autoclear bits {bits:#x} are set"),
            Self::NoBitmaps => f.write_str("the header says that bitmaps are valid, but there are none"),
            Self::SnapshotsAndBitmaps => f.write_str("it has both snapshots and persistent bitmaps"),
            Self::OddSize(size) => write!(f, "the virtual size {size} is no multiple of 512; QEMU cuts it down"),
            Self::NotAPool => write!(f, "a snapshot is called '{}' but is not a pool", pool::NAME),
            Self::MemberOutOfPlace(slot) => write!(f, "pool member {slot} is out of place or has flags"),
            Self::MemberOutOfOrder(slot) => write!(f, "pool member {slot} is out of order"),
            Self::TooManySharers { members, limit } => {
                let have = if *members == 1 { "pool member has" } else { "pool members have" };
                write!(f, "{members} {have} more users than the sharer limit of {limit}")
            }
            Self::Unpooled(count) => {
                let are = if *count == 1 { "shared cluster is" } else { "shared clusters are" };
                write!(f, "{count} {are} not pooled: the data is right")
            }
            Self::LeaksKept => f.write_str("leaked clusters were kept: what a wrong entry has lost may be in them"),
        }
    }
}

/// Findings that are counted and not described.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[non_exhaustive]
pub struct More {
    /// Whether `qemu-img check` does not look for them.
    pub beyond_qemu: bool,
    /// What a repair has to do about them.
    pub repair: Repairable,
}

impl Kind {
    /// What a repair has to do about this.
    #[must_use]
    pub fn repair(&self) -> Repairable {
        match self {
            Self::Leaked(_)
            | Self::RefcountTooLow(_)
            | Self::CopiedL2(..)
            | Self::CopiedData(..)
            | Self::StaleDirectory(_, true)
            | Self::SnapshotIncomplete(_, true)
            | Self::SnapshotExtra(_, _, true)
            | Self::PreallocationUnaligned(..) => Repairable::InPlace,
            Self::RefcountTableReserved(_)
            | Self::RefcountBlockUnaligned(_)
            | Self::RefcountBlockOutside(_)
            | Self::RefcountBlockShared(..)
            | Self::RefcountUnreadable(_) => Repairable::Rebuild,
            Self::PastEnd { to: Use::RefcountTable, .. } => Repairable::Rebuild,
            // Refcounts can be made anew from the references; whatever else lies there stays.
            Self::Overlap(_, one, other) if one.is_refcounts() || other.is_refcounts() => Repairable::Rebuild,
            // With counts that say so nobody writes in place what two have.
            Self::Overlap(..) => Repairable::InPlace,
            // References are counted all the same; what was lost cannot be brought back.
            Self::CopiedNothing(..)
            | Self::ZeroInVersion2(_)
            | Self::DataDamaged(..)
            | Self::StaleDirectory(_, false)
            | Self::MarkedCorrupt
            | Self::Remark(_) => Repairable::Nothing,
            Self::More(more) => more.repair,
            _ => Repairable::No,
        }
    }

    /// What can be done about this, where there is more to say than [`Kind::repair`] does.
    #[must_use]
    pub fn advice(&self) -> Option<Advice> {
        match self {
            Self::Overflow(_) => Some(Advice::WidenOverflowing),
            Self::MarkedCorrupt => Some(Advice::Unmark),
            Self::StaleDirectory(_, true) => Some(Advice::RepairDirectory),
            Self::StaleDirectory(_, false) => Some(Advice::RemakeDirectory),
            Self::Remark(Remark::UnknownAutoclear(_)) => Some(Advice::KeepSnapshots),
            Self::Remark(Remark::SnapshotsAndBitmaps) => Some(Advice::WorkOnCopy),
            Self::Remark(Remark::NotAPool) => Some(Advice::LeftAlone),
            Self::Remark(Remark::MemberOutOfPlace(_) | Remark::MemberOutOfOrder(_)) => Some(Advice::RemakePool),
            Self::Remark(Remark::Unpooled(_)) => Some(Advice::PoolShared),
            _ => None,
        }
    }

    /// Whether a count or a flag that follows from it is wrong, and no more: that is what a writer leaves that postpones them.
    pub(crate) fn is_of_counts(&self) -> bool {
        matches!(self, Self::Leaked(_) | Self::RefcountTooLow(_) | Self::CopiedL2(..) | Self::CopiedData(..))
            || matches!(self, Self::More(More { beyond_qemu: false, repair: Repairable::InPlace, .. }))
    }

    /// Whether this says that a table may lead to the wrong place, so that what seems to be lost may be what it should lead to.
    #[must_use]
    pub fn is_doubt(&self) -> bool {
        matches!(self, Self::Overlap(_, one, other) if !one.is_refcounts() && !other.is_refcounts())
    }

    /// Whether `qemu-img check` does not look for this.
    #[must_use]
    pub fn is_beyond_qemu(&self) -> bool {
        matches!(
            self,
            Self::ZeroInVersion2(_)
                | Self::CopiedNothing(..)
                | Self::Overlap(..)
                | Self::DataDamaged(..)
                | Self::StaleDirectory(..)
                | Self::MarkedCorrupt
                | Self::Remark(_)
                | Self::More(More { beyond_qemu: true, .. })
        )
    }
}

/// What a repair has to do about a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Repairable {
    /// Nothing.
    Nothing,
    /// Correct refcounts and flags where they are.
    InPlace,
    /// Write new refcount blocks and a new refcount table.
    Rebuild,
    /// It cannot be mended: what was there is not known.
    No,
}

/// A refcount beside the references that were counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Count {
    /// The cluster's index.
    pub cluster: u64,
    /// What the image says.
    pub refcount: u64,
    /// What was counted.
    pub references: u64,
}

/// An entry whose COPIED flag is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Flag {
    /// The entry.
    pub entry: u64,
    /// Whether the refcount of its target is one, so that COPIED should be set.
    pub one: bool,
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = if self.one { "1: the data is right, and only copied needlessly" } else { "not 1" };
        write!(f, "{:x}, the refcount is {why}", self.entry)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PastEnd { to, offset, size, at } => {
                write!(
                    f,
                    "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                     offset {offset:#x} size {size:#x} ({to}"
                )?;
                match at {
                    Some(guest) => write!(f, ", guest offset {guest:#x})"),
                    None => f.write_str(")"),
                }
            }
            Self::Overflow(offset) => write!(f, "ERROR: overflow cluster offset={offset:#x}"),
            Self::L1Reserved(at, entry) => write!(f, "ERROR found L1 entry with reserved bits set: {entry:x} {at}"),
            Self::L2Unaligned(at, offset) => {
                write!(f, "ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted {at}", offset.0)
            }
            Self::L2Reserved(at, entry) => write!(f, "ERROR found l2 entry with reserved bits set: {entry:x} {at}"),
            Self::CompressedCopied(at, offset) => {
                write!(f, "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters {at}")
            }
            Self::CompressedDataFile(at, entry) => {
                write!(f, "ERROR compressed cluster with data file, entry={entry:#x} {at}")
            }
            Self::CompressedSubclusters(at, entry) => {
                write!(f, "ERROR compressed cluster with non-zero subcluster allocation bitmap, entry={entry:#x} {at}")
            }
            Self::SubclusterConflict(at, offset) => write!(
                f,
                "ERROR offset={:x}: Allocated cluster has corrupted subcluster allocation bitmap {at}",
                offset.0
            ),
            Self::SubclusterWithoutCluster(at) => {
                write!(f, "ERROR: Unallocated cluster has non-zero subcluster allocation map {at}")
            }
            Self::DataUnaligned(at, offset) => {
                write!(f, "ERROR offset={:x}: Data cluster is not properly aligned; L2 entry corrupted. {at}", offset.0)
            }
            Self::PreallocationUnaligned(at, offset) => write!(
                f,
                "ERROR offset={:x}: Preallocated cluster is not properly aligned; L2 entry corrupted. {at}",
                offset.0
            ),
            Self::ZeroInVersion2(at) => {
                write!(f, "ERROR zero cluster in a version 2 image, which QEMU cannot read {at}")
            }
            Self::CopiedNothing(at, entry) => {
                write!(f, "ERROR entry with COPIED that points to nothing: {entry:x} {at}")
            }
            Self::SnapshotIncomplete(index, _) => write!(f, "ERROR snapshot table entry {index} is incomplete"),
            Self::SnapshotExtra(index, bytes, _) => {
                write!(f, "ERROR too much extra metadata in snapshot table entry {index} ({bytes} > {MAX_EXTRA})")
            }
            Self::MarkedCorrupt => {
                f.write_str("Note: the image is marked corrupt: QEMU writes to it only to repair it")
            }
            Self::SnapshotL1Unaligned(layer, offset) => write!(
                f,
                "ERROR {layer} l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted"
            ),
            Self::SnapshotL1TooLarge(layer, entries) => {
                write!(f, "ERROR {layer} l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted")
            }
            Self::SnapshotsWithDataFile(count) => write!(f, "ERROR {count} snapshots in image with data file"),
            Self::BitmapEntry(name, entry) => write!(f, "ERROR table entry {entry:#x} of bitmap '{name}' is corrupted"),
            Self::BitmapDirectory => f.write_str("ERROR the bitmap directory is corrupted"),
            Self::RefcountTableReserved(index) => write!(f, "ERROR refcount table entry {index} has reserved bits set"),
            Self::RefcountBlockUnaligned(index) => {
                write!(f, "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            }
            Self::RefcountBlockOutside(index) => write!(f, "ERROR refcount block {index} is outside image"),
            Self::RefcountBlockShared(index, count) => write!(f, "ERROR refcount block {index} refcount={count}"),
            Self::RefcountUnreadable(cluster) => {
                write!(f, "Can't get refcount for cluster {cluster}: Input/output error")
            }
            Self::RefcountTooLow(count) => write!(f, "ERROR {count}"),
            Self::Leaked(count) => write!(f, "Leaked {count}"),
            Self::CopiedL2(at, flag) => write!(f, "ERROR OFLAG_COPIED L2 cluster: l1_entry={flag} {at}"),
            Self::CopiedData(at, flag) => write!(f, "ERROR OFLAG_COPIED data cluster: l2_entry={flag} {at}"),
            Self::Overlap(cluster, one, other) => {
                write!(f, "ERROR cluster {cluster} is claimed twice: {one}, and {other}")
            }
            Self::DataDamaged(host, users) => {
                write!(f, "ERROR pooled cluster at {host:#x} does not match its SHA-256; used by")?;
                users.iter().try_for_each(|at| write!(f, " {at}"))?;
                if users.is_empty() { f.write_str(" nobody") } else { Ok(()) }
            }
            Self::StaleDirectory(why, _) => {
                write!(f, "Note: the pool's directory is not used: {why}; the data is right")
            }
            Self::Remark(remark) => write!(f, "Note: {remark}"),
            Self::More(_) => f.write_str("ERROR more wrong entries in L2 tables than are listed"),
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cluster {} refcount={} reference={}", self.cluster, self.refcount, self.references)
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub kind: Kind,
    /// How often it counts: once for each L1 entry that leads to it, as for `qemu-img check`.
    pub times: u64,
}

impl Finding {
    /// The cluster that is taken and that nothing refers to, if it is one.
    #[must_use]
    pub fn lost_cluster(&self) -> Option<u64> {
        match &self.kind {
            Kind::Leaked(count) if count.references == 0 => Some(count.cluster),
            _ => None,
        }
    }
}
