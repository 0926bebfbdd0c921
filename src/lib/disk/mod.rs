//! The disk as a guest sees it: a raw file or a QCOW2 image with its chain of backing files.

pub mod chunks;
mod open;
mod probe;
mod read;

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub(crate) use open::refuse_protocol;
pub use open::{DiskOptions, Format, open_image};
pub(crate) use read::Inflater;
pub use read::Reader;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::CompressionType;
use crate::image::Qcow2;
use crate::storage::open::FileId;
use crate::storage::{FileStorage, Storage};
use crate::units::ClusterBits;

/// A disk open for reading, with all the files that its content comes from, locked.
pub struct Disk {
    /// The image itself, then its backing file, then that one's.
    layers: Vec<Layer>,
}

struct Layer {
    path: PathBuf,
    id: FileId,
    stamp: Stamp,
    /// A second descriptor of the same open file, to look at it again.
    file: std::fs::File,
    content: Content,
}

/// What changes when a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len: u64,
    /// When the content was last written, and when anything about the file was last changed: a writer may set the first back.
    times: Option<[i64; 4]>,
}

enum Content {
    Raw {
        storage: FileStorage,
        /// Length in bytes, rounded up to 512 as QEMU does.
        size: u64,
    },
    Qcow2(Qcow2),
}

impl Layer {
    fn size(&self) -> u64 {
        match &self.content {
            Content::Raw { size, .. } => *size,
            Content::Qcow2(image) => image.size(),
        }
    }

    fn storage(&self) -> &dyn Storage {
        match &self.content {
            Content::Raw { storage, .. } => storage,
            Content::Qcow2(image) => image.storage(),
        }
    }

    /// The first range at or after `offset` that this layer may hold something for.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let range = match &self.content {
            Content::Raw { storage, .. } => storage.next_data(offset)?,
            Content::Qcow2(image) => image.next_table(offset),
        };
        // An empty range must not hide what other layers have.
        Ok(range.map(|range| range.start..range.end.min(self.size())).filter(|range| !range.is_empty()))
    }
}

impl Disk {
    /// Virtual size in bytes, a multiple of 512.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::size)
    }

    /// The format of the image itself.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.layers.first().map(|layer| &layer.content) {
            Some(Content::Qcow2(_)) => Format::Qcow2,
            _ => Format::Raw,
        }
    }

    /// The file of the chain that is the file `id`, if any.
    #[must_use]
    pub fn find(&self, id: FileId) -> Option<&Path> {
        self.layers.iter().find(|layer| layer.id == id).map(|layer| layer.path.as_path())
    }

    /// The image itself, where it is a QCOW2.
    #[must_use]
    pub fn qcow2(&self) -> Option<&Qcow2> {
        match &self.layers.first()?.content {
            Content::Qcow2(image) => Some(image),
            Content::Raw { .. } => None,
        }
    }

    /// The file of the image itself.
    pub(crate) fn file(&self) -> Option<&dyn Storage> {
        self.layers.first().map(Layer::storage)
    }

    /// Whether an image of the chain may have compressed clusters of this kind and size.
    pub(crate) fn may_have_packed(&self, bits: ClusterBits, kind: CompressionType) -> bool {
        self.layers.iter().any(|layer| match &layer.content {
            Content::Raw { .. } => false,
            Content::Qcow2(image) => (image.header().cluster_bits, image.header().compression) == (bits, kind),
        })
    }

    /// The largest cluster of the chain's compressed clusters: reads in such pieces decompress nothing twice.
    #[must_use]
    pub fn preferred_read(&self) -> u64 {
        let cluster = |layer: &Layer| match &layer.content {
            Content::Raw { .. } => 0,
            Content::Qcow2(image) => image.header().cluster_bits.bytes(),
        };
        self.layers.iter().map(cluster).max().unwrap_or(0)
    }

    /// The first range at or after `offset` that may hold something else than zeros, or `None`. It may be larger than what does.
    ///
    /// # Errors
    /// The operating system's.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.size();
        let mut first: Option<Range<u64>> = None;
        for layer in &self.layers {
            let range = layer.next_data(offset).map_err(|e| self.reading(layer, offset, e))?;
            let Some(range) = range.filter(|range| range.start < size) else { continue };
            // The earliest one is enough: the next call finds what lies behind it.
            if first.as_ref().is_none_or(|first| range.start < first.start) {
                first = Some(range.start..range.end.min(size));
            }
        }
        Ok(first)
    }

    /// Fails with [`ErrorKind::Changed`] where a file of the chain was written since it was opened.
    ///
    /// The locks keep QEMU away, not `dd`: deduplication reads a disk in more than one pass, and a disk that changes under it
    /// must not become an image that it never was.
    ///
    /// # Errors
    /// As said, and the operating system's.
    pub fn ensure_unchanged(&self) -> Result<()> {
        for layer in &self.layers {
            let now = Stamp::of(&layer.file).map_err(|e| self.reading(layer, 0, e))?;
            if now != layer.stamp {
                return Err(Error::new(
                    ErrorKind::Changed,
                    format!(
                        "'{}' changed while it was read; stop what writes to it, or read a snapshot of it",
                        layer.path.display()
                    ),
                ));
            }
        }
        Ok(())
    }

    fn reading(&self, layer: &Layer, offset: u64, source: io::Error) -> Error {
        Error::io(format_args!("Could not read '{}' at {offset:#x}", layer.path.display()), source)
    }
}

impl Stamp {
    fn of(file: &std::fs::File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        // A block device's times do not tell whether it was written.
        let times = metadata
            .is_file()
            .then(|| [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()]);
        Ok(Self { len: metadata.len(), times })
    }
}
