//! The disk as a guest sees it: a raw file or a QCOW2 image with its chain of backing files, or several, one after the other.
//!
//! Backing files are opened as far as a [`BackingRule`] lets the names in an image lead.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::{Disk, DiskOptions, Reader};
//!
//! let disk = Disk::open(Path::new("overlay.qcow2"), &DiskOptions::default())?;
//! let mut sector = [0; 512];
//! Reader::random(&disk).read(0, &mut sector)?;
//! println!("{} bytes, signature {:?}", disk.size(), &sector[510..]);
//! # Ok::<(), dedup_img::Error>(())
//! ```

mod backing;
mod chain;
pub(crate) mod chunks;
mod format;
pub(crate) mod history;
mod open;
mod probe;
mod read;
mod reader;
mod salvage;
mod stamp;

use std::fmt;
use std::iter;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use backing::BackingRule;
pub(crate) use backing::refuse_protocol;
use chain::Chain;
pub use format::Format;
use history::History;
pub use open::{DiskOptions, open_image};
pub use reader::Reader;
use salvage::Damage;
pub use salvage::Unreadable;

use crate::error::{Error, ErrorKind, OrInternal, Result};
use crate::format::coding::CompressionType;
use crate::image::Qcow2;
use crate::storage::Storage;
use crate::storage::stack::Bytes;
use crate::units::{ClusterBits, to_usize};

/// A disk open for reading, with all the files that its content comes from, locked.
pub struct Disk {
    /// There is at least one part; the others follow it without a gap.
    first: Part,
    others: Vec<Part>,
    /// Where the parts are a disk, its snapshots and their VM states, woven. The layers come first, and begin nowhere.
    history: Option<History>,
}

/// An image that is a part of a disk, or all of it.
struct Part {
    /// Where it begins, in bytes of the disk.
    start: u64,
    chain: Chain,
}

/// A run of a disk's bytes that a part has in one piece.
struct Span<'a> {
    part: &'a Part,
    /// Bytes of the disk.
    row: Range<u64>,
    /// Where the part has them.
    at: u64,
    /// Where a backing file of the disk has them; a VM state has none.
    backing: Option<u64>,
    /// The layer above, which has the same place of the disk.
    above: Option<&'a Chain>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<&Path> = self.parts().filter_map(|part| part.chain.path()).collect();
        f.debug_struct("Disk").field("paths", &paths).field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Part {
    fn end(&self) -> u64 {
        self.start + self.chain.size()
    }
}

impl Disk {
    /// A disk of one image.
    fn of(chain: Chain) -> Self {
        Self { first: Part { start: 0, chain }, others: Vec::new(), history: None }
    }

    /// The disk on which `other` follows this one.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] where it would be larger than a file can be.
    pub fn followed_by(mut self, other: Self) -> Result<Self> {
        for part in iter::once(other.first).chain(other.others) {
            let start = self.size();
            let end = start.checked_add(part.chain.size()).filter(|&end| i64::try_from(end).is_ok());
            if end.is_none() {
                return Err(Error::new(ErrorKind::Limit, "the sources together are 8 EiB or more"));
            }
            self.others.push(Part { start, ..part });
        }
        Ok(self)
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        iter::once(&self.first).chain(&self.others)
    }

    /// The run that `offset` lies in; the last one, which ends nowhere, for what lies behind all.
    fn span_at(&self, offset: u64) -> Result<Span<'_>> {
        let Some(history) = &self.history else {
            let (part, row) = self.part_at(&self.others, offset);
            return Ok(Span { part, at: 0, backing: Some(row.start), above: None, row });
        };
        let weave = history.row();
        match weave.locate(offset) {
            Some((layer, place)) => {
                let layer = to_usize(layer);
                let part = |layer: usize| layer.checked_sub(1).map_or(Some(&self.first), |at| self.others.get(at));
                let into = place % weave.unit;
                Ok(Span {
                    part: part(layer).or_internal("a place of the row is in no layer")?,
                    row: offset - into..offset - into + weave.unit,
                    at: place - into,
                    backing: Some(place - into),
                    above: layer.checked_sub(1).and_then(part).map(|part| &part.chain),
                })
            }
            None => {
                let vm = self.others.get(history.snapshots().len()..).or_internal("fewer layers than snapshots")?;
                let (part, row) = self.part_at(vm, offset);
                Ok(Span { part, at: 0, backing: None, above: None, row })
            }
        }
    }

    /// The one of `others` that `offset` lies in and where it lies.
    fn part_at<'a>(&'a self, others: &'a [Part], offset: u64) -> (&'a Part, Range<u64>) {
        let (before, behind) = others.split_at(others.partition_point(|part| part.start <= offset));
        let part = before.last().unwrap_or(&self.first);
        (part, part.start..behind.first().map_or(u64::MAX, |next| next.start))
    }

    /// Virtual size in bytes, a multiple of 512; with snapshots the length of the row that they make.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.history.as_ref().map_or_else(|| self.others.last().unwrap_or(&self.first).end(), History::end)
    }

    /// The snapshots, where the disk was opened with all of them.
    #[must_use]
    pub(crate) fn history(&self) -> Option<&History> {
        self.history.as_ref()
    }

    /// The format of the image itself, of the first where there are several.
    #[must_use]
    pub fn format(&self) -> Format {
        self.first.chain.format()
    }

    /// The file that has some of `bytes`, if any.
    #[must_use]
    pub(crate) fn find(&self, bytes: &Bytes) -> Option<&Path> {
        self.parts().find_map(|part| part.chain.find(bytes))
    }

    /// The block devices among the files that carry a file system which is mounted and can be written meanwhile, and where it is
    /// mounted.
    #[must_use]
    pub fn mounted(&self) -> Vec<(&Path, PathBuf)> {
        self.parts().flat_map(|part| part.chain.mounted()).collect()
    }

    /// The image itself, where it is a single QCOW2.
    #[must_use]
    pub fn qcow2(&self) -> Option<&Qcow2> {
        self.only().and_then(Chain::qcow2)
    }

    /// The file of the image itself, where it is a single one.
    pub(crate) fn file(&self) -> Option<&dyn Storage> {
        self.only().and_then(Chain::file)
    }

    /// Whether an image of a chain may have compressed clusters of this kind and size.
    pub(crate) fn may_have_packed(&self, bits: ClusterBits, kind: CompressionType) -> bool {
        self.parts().any(|part| part.chain.may_have_packed(bits, kind))
    }

    fn only(&self) -> Option<&Chain> {
        self.others.is_empty().then_some(&self.first.chain)
    }

    /// The largest cluster of the compressed clusters: reads in such pieces decompress nothing twice.
    #[must_use]
    pub(crate) fn preferred_read(&self) -> u64 {
        self.parts().map(|part| part.chain.preferred_read()).max().unwrap_or(0)
    }

    /// The first range at or after `offset` that may hold something else than zeros, or `None`. It may be larger than what does.
    ///
    /// # Errors
    /// The operating system's.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.next_data_over(None, offset)
    }

    /// The first range at or after `offset` for which this disk or the `backing` file behind it may have data.
    fn next_data_over(&self, backing: Option<&Self>, offset: u64) -> Result<Option<Range<u64>>> {
        let mut at = offset;
        while at < self.size() {
            let Span { part, row, at: from, backing: behind, .. } = self.span_at(at)?;
            let into = at - row.start;
            let end = row.end.min(self.size());
            let ours = part.chain.next_data(from + into..from + (end - row.start))?;
            let ours = ours.map(|data| data.start - from..data.end - from);
            let theirs = match backing.zip(behind) {
                None => None,
                Some((backing, start)) => {
                    // What it has behind the end of the disk nobody reads.
                    let shown = (end - row.start).min(part.chain.size().saturating_sub(from));
                    let data = backing.next_data(start + into)?.map(|data| data.start - start..data.end - start);
                    data.map(|data| data.start..data.end.min(shown)).filter(|data| !data.is_empty())
                }
            };
            let first = match (ours, theirs) {
                // The other one comes with the next call.
                (Some(ours), Some(theirs)) if theirs.start < ours.start => Some(theirs),
                (ours, theirs) => ours.or(theirs),
            };
            if let Some(data) = first {
                return Ok(Some(row.start + data.start..row.start + data.end));
            }
            at = end;
        }
        Ok(None)
    }

    /// Where a backing file of this disk has `range`, which lies in one piece, as far as the disk goes; `None` in a VM state.
    pub(crate) fn behind(&self, range: &Range<u64>) -> Result<Option<Range<u64>>> {
        let Span { part, row, at, backing, .. } = self.span_at(range.start)?;
        let into = range.start - row.start;
        let left = part.chain.size().saturating_sub(at + into);
        Ok(backing.map(|start| start + into..start + into + left.min(range.end - range.start)))
    }

    /// Fails with [`ErrorKind::Changed`] where one of the files was written since it was opened.
    ///
    /// The locks keep QEMU away, not `dd`: deduplication reads a disk in more than one pass, and a disk that changes under it
    /// must not become an image that it never was.
    ///
    /// # Errors
    /// As said, and the operating system's.
    pub fn ensure_unchanged(&self) -> Result<()> {
        self.parts().try_for_each(|part| part.chain.ensure_unchanged())
    }

    /// The files whose times move although nobody writes them: they do not tell whether a file was written. What one pass has read of
    /// such a disk is read twice, and compared.
    pub fn restless(&self) -> impl Iterator<Item = &Path> {
        self.parts().flat_map(|part| part.chain.restless())
    }

    /// The error where what lies at `offset` was something else when it was read first.
    pub(crate) fn changed_at(&self, offset: u64) -> Error {
        match self.span_at(offset) {
            Ok(Span { part, row, at, .. }) => part.chain.changed_at(at + (offset - row.start)),
            Err(error) => error,
        }
    }

    /// What could not be read so far, in order; nothing where [`DiskOptions::salvage`] was not set.
    #[must_use]
    pub fn unreadable(&self) -> Vec<Unreadable> {
        self.parts().flat_map(|part| part.chain.unreadable()).collect()
    }

    /// Ends the first pass over the disk: what could be read in it and cannot be read again is an error, also with
    /// [`DiskOptions::salvage`], and what could not be read stays zeros.
    pub(crate) fn settle(&self) {
        self.parts().filter_map(|part| part.chain.salvage.as_ref()).for_each(Damage::settle);
    }

    /// Whether zeros are taken for what cannot be read.
    pub(crate) fn salvages(&self) -> bool {
        self.parts().any(|part| part.chain.salvage.is_some())
    }

    /// Takes the files out of the host's page cache, as far as it lets them go.
    pub fn drop_cache(&self) {
        self.parts().for_each(|part| part.chain.drop_cache());
    }
}
