//! The disk as a guest sees it: a raw file or a QCOW2 image with its chain of backing files, or several, one after the other.

mod chain;
pub mod chunks;
mod open;
mod probe;
mod read;
mod reader;
mod salvage;

use std::iter;
use std::ops::Range;
use std::path::Path;

use chain::Chain;
pub(crate) use open::refuse_protocol;
pub use open::{DiskOptions, Format, open_image};
pub(crate) use read::Inflater;
pub use reader::Reader;
use salvage::Damage;
pub use salvage::Unreadable;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::CompressionType;
use crate::image::Qcow2;
use crate::storage::Storage;
use crate::storage::open::FileId;
use crate::units::ClusterBits;

/// A disk open for reading, with all the files that its content comes from, locked.
pub struct Disk {
    /// There is at least one part; the others follow it without a gap.
    first: Part,
    others: Vec<Part>,
}

/// An image that is a part of a disk, or all of it.
struct Part {
    /// Where it begins, in bytes of the disk.
    start: u64,
    chain: Chain,
}

impl Part {
    fn end(&self) -> u64 {
        self.start + self.chain.size()
    }
}

impl Disk {
    /// A disk of one image.
    fn of(chain: Chain) -> Self {
        Self { first: Part { start: 0, chain }, others: Vec::new() }
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

    /// The part that `offset` lies in; the last one for what lies behind all.
    fn part_at(&self, offset: u64) -> &Part {
        let before = self.others.partition_point(|part| part.start <= offset);
        self.others.get(..before).and_then(<[Part]>::last).unwrap_or(&self.first)
    }

    /// Virtual size in bytes, a multiple of 512.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.others.last().unwrap_or(&self.first).end()
    }

    /// The format of the image itself, of the first where there are several.
    #[must_use]
    pub fn format(&self) -> Format {
        self.first.chain.format()
    }

    /// The file that is the file `id`, if any.
    #[must_use]
    pub fn find(&self, id: FileId) -> Option<&Path> {
        self.parts().find_map(|part| part.chain.find(id))
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
    pub fn preferred_read(&self) -> u64 {
        self.parts().map(|part| part.chain.preferred_read()).max().unwrap_or(0)
    }

    /// The first range at or after `offset` that may hold something else than zeros, or `None`. It may be larger than what does.
    ///
    /// # Errors
    /// The operating system's.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        for part in self.parts().filter(|part| offset < part.end()) {
            if let Some(data) = part.chain.next_data(offset.saturating_sub(part.start))? {
                return Ok(Some(part.start + data.start..part.start + data.end));
            }
        }
        Ok(None)
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

    /// What could not be read so far, in order; nothing where [`DiskOptions::salvage`] was not set.
    #[must_use]
    pub fn unreadable(&self) -> Vec<Unreadable> {
        self.parts().flat_map(|part| part.chain.unreadable()).collect()
    }

    /// Ends the first pass over the disk: what could be read in it and cannot be read again is an error, also with
    /// [`DiskOptions::salvage`], and what could not be read stays zeros.
    pub fn settle(&self) {
        self.parts().filter_map(|part| part.chain.salvage.as_ref()).for_each(Damage::settle);
    }

    /// Takes the files out of the host's page cache, as far as it lets them go.
    pub fn drop_cache(&self) {
        self.parts().for_each(|part| part.chain.drop_cache());
    }
}
