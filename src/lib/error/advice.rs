//! What can be done about an error, as values: the names of commands and options are for the program to say.

use std::fmt;
use std::path::PathBuf;

/// What can be done about an error. [`fmt::Display`] gives it as a piece of the error's sentence, with what stands before it; nothing
/// where there is not more to say than the sentence has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Advice {
    /// It is a bug of the library: report it.
    ReportBug,
    /// Check the image.
    Check,
    /// Check the image, and repair it.
    CheckAndRepair,
    /// Repair the image.
    Repair,
    /// Repair the image before anything else.
    RepairFirst,
    /// Repair the image before anything else, or read what there is of it.
    RepairOrSalvage,
    /// Repair the image: what failed has left it unclean, without loss.
    RepairAfter,
    /// Take the file from a copy, or read what there is of it.
    RestoreOrSalvage,
    /// Read the source only once.
    ReadOnce,
    /// Decrypt the image first.
    Decrypt,
    /// Merge the external data file into the image first.
    MergeDataFile,
    /// Convert the image into a format that is read here.
    ConvertFormat,
    /// Say that the file is a raw disk, if it is.
    SayRaw,
    /// Look what the file is.
    Identify,
    /// List the snapshots of the image.
    ListSnapshots,
    /// Give a snapshot another name, or leave the snapshots out.
    RenameSnapshot,
    /// Allow backing files.
    AllowBacking,
    /// Say in which directory backing files may lie.
    AllowDirectory,
    /// Say another directory in which backing files may lie.
    OtherDirectory,
    /// Write into `overlay` the format of its backing file.
    SetBackingFormat {
        /// The backing file, by the name in the image.
        name: PathBuf,
        /// The image.
        overlay: PathBuf,
    },
    /// Give the image another backing file.
    ChangeBacking,
    /// Join some of the backing files.
    JoinBacking,
    /// Make the target larger.
    Resize,
    /// Stop the bitmap that records writes.
    DisableBitmap,
    /// Convert the image, which leaves its bitmaps out.
    WithoutBitmaps,
    /// Convert the image, which leaves its snapshots out.
    WithoutSnapshots,
    /// Convert the image into a new one.
    Convert,
    /// Convert the image into a new one, which is not deduplicated.
    ConvertPlain,
    /// Make the refcounts of the image so wide.
    WidenRefcounts {
        /// The width in bits.
        bits: u32,
    },
    /// Ask for refcounts at least so wide.
    AskRefcounts {
        /// The width in bits.
        bits: u32,
        /// Whether more is as good.
        or_more: bool,
    },
    /// Make the refcounts of the image wider: they cannot hold the references that it has.
    WidenOverflowing,
    /// Repair the image, which takes the mark away that it is corrupt, where nothing wrong is left.
    Unmark,
    /// Repair the image, which makes the pool's directory anew.
    RepairDirectory,
    /// Deduplicate the image or collect its garbage, which makes the pool's directory anew.
    RemakeDirectory,
    /// Deduplicate the image or collect its garbage, which makes the pool anew.
    RemakePool,
    /// Deduplicate the image, which pools what is shared.
    PoolShared,
    /// Repair all that is wrong, and not only leaks.
    RepairAll,
    /// Let nothing that does not know such bits repair the image: it deletes the internal snapshots.
    KeepSnapshots,
    /// Let nothing else repair the image: it may be damaged by that.
    WorkOnCopy,
    /// Nothing: the snapshot is left alone.
    LeftAlone,
    /// Make the image a version 3 one.
    Upgrade,
    /// Deduplicate the image, which makes the pool anew.
    MakePool,
    /// Count in larger clusters, and without the curve.
    CountLess,
    /// Say which clusters are wanted: of this size.
    SayClusterSize {
        /// The size in bytes.
        bytes: u64,
    },
    /// Ask for the largest clusters, which are not among those that are tried.
    AskLargestClusters,
    /// Give at least so much memory for tables.
    GiveMemory {
        /// Bytes.
        least: u64,
    },
    /// Give fewer threads.
    GiveFewerThreads,
    /// Go on without locks, where nobody else uses the image.
    LockNothing,
    /// Make room on the file system.
    MakeRoom {
        /// How many bytes are needed.
        needed: u64,
        /// How many are there.
        available: u64,
        /// What would need less.
        less: Less,
    },
}

/// What needs less room than an operation that has not enough of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Less {
    /// Nothing.
    Nothing,
    /// To collect garbage first.
    CollectFirst,
    /// The same without compaction.
    NotCompact,
    /// The same without the pool.
    DropPool,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReportBug => "\nThis is a bug; nothing was written after it. Please report it with this line.",
            Self::Check => "; a check says more",
            Self::CheckAndRepair => "; a check says more, and a repair may mend it",
            Self::Repair => "; a repair may mend it",
            Self::RepairFirst => "; repair it first",
            Self::RepairOrSalvage => "; repair it first, or read what there is of it",
            Self::RepairAfter => "; no data is lost, but the image needs a repair",
            Self::RestoreOrSalvage => "; restore it from a copy, or read what there is of it",
            Self::ReadOnce => "; read the source only once",
            Self::Decrypt => "; decrypt them first",
            Self::MergeDataFile => "; merge them first",
            Self::ConvertFormat => "; convert it first",
            Self::SayRaw => ", or say that it is raw if its bytes are meant",
            Self::RenameSnapshot => "; give it another name, or leave the snapshots out",
            Self::AllowBacking => ", and backing files are refused",
            Self::AllowDirectory => "; say in which directory it must lie",
            Self::JoinBacking => "; join some of them",
            Self::DisableBitmap => "; disable it, or remove it",
            Self::WithoutBitmaps => "; a conversion reads the disk without its bitmaps",
            Self::WithoutSnapshots => "; a conversion reads the disk without them",
            Self::Convert | Self::ConvertPlain => "; convert them",
            Self::WidenRefcounts { bits } => return write!(f, "; widen it to {bits} bits first"),
            Self::AskRefcounts { bits, .. } => return write!(f, "; {bits} bits can"),
            Self::WidenOverflowing => "; widen its refcounts",
            Self::Unmark => "; a repair takes the mark away where nothing wrong is left",
            Self::RepairDirectory => ", a repair makes a new one",
            Self::RemakeDirectory => ", deduplication makes a new one",
            Self::RemakePool => "; deduplication makes a new pool",
            Self::PoolShared => ", but a write may leave wrong COPIED flags; deduplication pools what is shared",
            Self::RepairAll => "; repair all",
            Self::KeepSnapshots => ": other programs that repair such an image may delete all its internal snapshots",
            Self::WorkOnCopy => ": other programs that repair such an image may damage it; work on a copy",
            Self::LeftAlone => "; it is left alone",
            Self::Upgrade => "; upgrade it to version 3 first",
            Self::MakePool => "; deduplication makes one",
            Self::CountLess => "; count in larger clusters, and without the curve",
            Self::SayClusterSize { .. } => "; ask for that size",
            Self::AskLargestClusters => "; ask for clusters of 2 MiB",
            Self::GiveFewerThreads => "; give fewer threads",
            Self::LockNothing => "\nThe file system does not lock files.",
            Self::Identify
            | Self::ListSnapshots
            | Self::OtherDirectory
            | Self::SetBackingFormat { .. }
            | Self::ChangeBacking
            | Self::Resize
            | Self::GiveMemory { .. }
            | Self::MakeRoom { .. } => "",
        })
    }
}
