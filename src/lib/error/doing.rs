//! What was being done when something failed: the layers of an error, each of which is a piece of its sentence.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::name::shown;
use crate::units::GuestOffset;

/// What was being done, and to what.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Doing {
    /// Opening a file.
    Opening(PathBuf),
    /// Making a file.
    Creating(PathBuf),
    /// Working on a file.
    On(PathBuf),
    /// Working on the target of an operation.
    Target(PathBuf),
    /// Opening the file behind an overlay.
    Behind(PathBuf),
    /// Reading a part of an image, at this offset in its file.
    Reading(Table, Option<u64>),
    /// Reading a file at this offset.
    ReadingFile(PathBuf, u64),
    /// Writing at this offset.
    Writing(u64),
    /// Writing a file.
    WritingFile(PathBuf),
    /// Unpacking the compressed cluster at this offset of the disk.
    Unpacking(GuestOffset),
    /// Opening the snapshot of this name.
    Snapshot(String),
    /// Anything else, in words.
    Other(Cow<'static, str>),
}

/// A part of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Table {
    /// What a guest reads, or anything else.
    Data,
    /// An L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The snapshot table.
    Snapshots,
    /// The refcount table.
    Refcounts,
    /// A refcount block.
    RefcountBlock,
    /// The directory of the bitmaps.
    Bitmaps,
    /// The table of the bitmap of this name.
    Bitmap(String),
    /// The tables of the pool.
    Pool,
    /// The directory of the pool.
    PoolDirectory,
}

impl Doing {
    /// The file that it was done to.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::Opening(path)
            | Self::Creating(path)
            | Self::On(path)
            | Self::Target(path)
            | Self::Behind(path)
            | Self::ReadingFile(path, _)
            | Self::WritingFile(path) => Some(path),
            _ => None,
        }
    }

    /// The offset in the file.
    pub(super) fn offset(&self) -> Option<u64> {
        match self {
            Self::Reading(_, offset) => *offset,
            Self::ReadingFile(_, offset) | Self::Writing(offset) => Some(*offset),
            _ => None,
        }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opening(path) => write!(f, "Could not open '{}'", shown(path)),
            Self::Creating(path) => write!(f, "Could not create '{}'", shown(path)),
            Self::On(path) => write!(f, "'{}'", shown(path)),
            Self::Target(path) => f.write_str(&shown(path)),
            Self::Behind(overlay) => write!(f, "'{}' needs its backing file", shown(overlay)),
            Self::Reading(Table::Data, Some(offset)) => write!(f, "Could not read at {offset:#x}"),
            Self::Reading(table, Some(offset)) => write!(f, "Could not read the {table} at {offset:#x}"),
            Self::Reading(table, None) => write!(f, "Could not read the {table}"),
            Self::ReadingFile(path, offset) => write!(f, "Could not read '{}' at {offset:#x}", shown(path)),
            Self::Writing(offset) => write!(f, "Could not write at {offset:#x}"),
            Self::WritingFile(path) => write!(f, "Could not write '{}'", shown(path)),
            Self::Unpacking(guest) => write!(f, "compressed cluster of guest offset {guest:#x}"),
            Self::Snapshot(name) => write!(f, "snapshot '{}'", shown(name)),
            Self::Other(what) => f.write_str(what),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::L1 => "L1 table",
            Self::L2 => "L2 table",
            Self::Snapshots => "snapshot table",
            Self::Refcounts => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::Bitmaps => "bitmap directory",
            Self::Bitmap(name) => return write!(f, "table of bitmap '{name}'"),
            Self::Pool => "pool's tables",
            Self::PoolDirectory => "pool's directory",
        })
    }
}
