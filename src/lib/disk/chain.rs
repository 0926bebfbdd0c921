//! One image and the files behind it.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::Format;
use super::salvage::{Damage, Unreadable};
use super::stamp::Stamp;
use crate::error::{Doing, Error, ErrorKind, OrInternal, Result};
use crate::format::coding::CompressionType;
use crate::image::{Lost, Qcow2};
use crate::name::shown;
use crate::storage::mounts::writable_mount;
use crate::storage::open::FileId;
use crate::storage::stack::Bytes;
use crate::storage::{Storage, drop_cache};
use crate::units::{ClusterBits, SECTOR};

/// An image open for reading, with its backing files, locked.
pub(super) struct Chain {
    /// The image itself, then its backing file, then that one's.
    pub(super) layers: Vec<Arc<Layer>>,
    /// What could not be read, where that is no reason to fail.
    pub(super) salvage: Option<Damage>,
}

pub(super) struct Layer {
    pub(super) path: PathBuf,
    /// The file, unless the layer lies in a storage of the caller's.
    pub(super) file: Option<OpenFile>,
    pub(super) content: Content,
}

/// What is known of a layer's file.
#[derive(Clone)]
pub(super) struct OpenFile {
    pub(super) id: FileId,
    pub(super) stamp: Stamp,
    /// A second descriptor of the same open file, to look at it again.
    pub(super) file: Arc<std::fs::File>,
}

pub(super) enum Content {
    Raw {
        storage: Box<dyn Storage>,
        /// Length in bytes, rounded up to 512 as QEMU does.
        size: u64,
    },
    Qcow2(Qcow2),
}

impl Layer {
    pub(super) fn size(&self) -> u64 {
        match &self.content {
            Content::Raw { size, .. } => *size,
            Content::Qcow2(image) => image.size(),
        }
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        match &self.content {
            Content::Raw { storage, .. } => &**storage,
            Content::Qcow2(image) => image.storage(),
        }
    }

    /// What of it was found to be lost when it was opened.
    pub(super) fn lost(&self) -> &[Lost] {
        match &self.content {
            Content::Raw { .. } => &[],
            Content::Qcow2(image) => image.lost(),
        }
    }

    /// The first part of `wanted` that this layer may hold something for.
    fn next_data(&self, wanted: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let end = wanted.end.min(self.size());
        let range = match &self.content {
            Content::Raw { storage, .. } => storage.next_data(wanted.start)?,
            Content::Qcow2(image) => image.next_table(wanted),
        };
        // An empty range must not hide what other layers have.
        Ok(range.map(|range| range.start..range.end.min(end)).filter(|range| !range.is_empty()))
    }

    /// The same file as it was when a snapshot was taken.
    pub(super) fn with(&self, image: Qcow2) -> Self {
        Self { path: self.path.clone(), file: self.file.clone(), content: Content::Qcow2(image) }
    }
}

impl Chain {
    /// Virtual size in bytes, a multiple of 512.
    pub(super) fn size(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.size())
    }

    /// The layers that are files.
    fn files(&self) -> impl Iterator<Item = (&Layer, &OpenFile)> {
        self.layers.iter().filter_map(|layer| Some((&**layer, layer.file.as_ref()?)))
    }

    /// The name of the image itself.
    pub(super) fn path(&self) -> Option<&Path> {
        self.layers.first().map(|layer| layer.path.as_path())
    }

    /// The format of the image itself.
    pub(super) fn format(&self) -> Format {
        match self.layers.first().map(|layer| &layer.content) {
            Some(Content::Qcow2(_)) => Format::Qcow2,
            _ => Format::Raw,
        }
    }

    /// The file of the chain that has some of `bytes`, if any.
    pub(super) fn find(&self, bytes: &Bytes) -> Option<&Path> {
        let has = |file: &OpenFile| Bytes::of(file.id).meet(bytes);
        self.layers.iter().find(|layer| layer.file.as_ref().is_some_and(has)).map(|layer| layer.path.as_path())
    }

    /// The block devices of the chain with a file system that is mounted writable, and where.
    pub(super) fn mounted(&self) -> impl Iterator<Item = (&Path, PathBuf)> {
        let devices = self.files().filter(|(_, file)| matches!(file.id, FileId::Device(_)));
        devices.filter_map(|(layer, file)| Some((layer.path.as_path(), writable_mount(&Bytes::of(file.id))?)))
    }

    /// The layer of this number, which a segment names.
    pub(super) fn layer(&self, number: usize) -> Result<&Layer> {
        self.layers.get(number).map(Arc::as_ref).or_internal("a segment names no layer of the chain")
    }

    /// The image of this number, which a segment of compressed data names.
    pub(super) fn image(&self, number: usize) -> Result<&Qcow2> {
        match &self.layer(number)?.content {
            Content::Qcow2(image) => Ok(image),
            Content::Raw { .. } => Err(Error::internal("a segment names a compressed cluster of a raw file")),
        }
    }

    /// Whether `other`, a snapshot of the same image with the same files behind it, surely maps all of `range` as this one does:
    /// they have their L2 tables in common.
    pub(super) fn has_tables_of(&self, other: &Self, range: &Range<u64>) -> bool {
        match (self.qcow2(), other.qcow2()) {
            (Some(ours), Some(theirs)) => ours.has_tables_of(theirs, range),
            _ => false,
        }
    }

    /// The image itself, where it is a QCOW2.
    pub(super) fn qcow2(&self) -> Option<&Qcow2> {
        match &self.layers.first()?.content {
            Content::Qcow2(image) => Some(image),
            Content::Raw { .. } => None,
        }
    }

    /// The file of the image itself.
    pub(super) fn file(&self) -> Option<&dyn Storage> {
        self.layers.first().map(|layer| layer.storage())
    }

    /// Whether an image of the chain may have compressed clusters of this kind and size.
    pub(super) fn may_have_packed(&self, bits: ClusterBits, kind: CompressionType) -> bool {
        self.layers.iter().any(|layer| match &layer.content {
            Content::Raw { .. } => false,
            Content::Qcow2(image) => (image.header().cluster_bits, image.header().compression) == (bits, kind),
        })
    }

    /// The largest cluster of the chain's compressed clusters: reads in such pieces decompress nothing twice.
    pub(super) fn preferred_read(&self) -> u64 {
        let cluster = |layer: &Arc<Layer>| match &layer.content {
            Content::Raw { .. } => 0,
            Content::Qcow2(image) => image.header().cluster_bits.bytes(),
        };
        self.layers.iter().map(cluster).max().unwrap_or(0)
    }

    /// The first part of `wanted` that may hold something else than zeros, or `None`. It may be larger than what does.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn next_data(&self, wanted: Range<u64>) -> Result<Option<Range<u64>>> {
        let wanted = wanted.start..wanted.end.min(self.size());
        let mut first: Option<Range<u64>> = None;
        for layer in &self.layers {
            let range = match layer.next_data(wanted.clone()) {
                // Reading will tell.
                Err(_) if self.salvage.is_some() => Some(wanted.start..wanted.end.min(layer.size())),
                range => range.map_err(|e| Self::reading(layer, wanted.start, e))?,
            };
            let Some(range) = range.filter(|range| range.start < range.end.min(wanted.end)) else { continue };
            // The earliest one is enough: the next call finds what lies behind it.
            if first.as_ref().is_none_or(|first| range.start < first.start) {
                first = Some(range.start..range.end.min(wanted.end));
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
    pub(super) fn ensure_unchanged(&self) -> Result<()> {
        for (layer, file) in self.files() {
            if file.stamp.has_changed(&file.file).map_err(|e| Self::reading(layer, 0, e))? {
                return Err(changed(&layer.path, ""));
            }
        }
        Ok(())
    }

    /// The files whose times move although nobody writes them.
    pub(super) fn restless(&self) -> impl Iterator<Item = &Path> {
        self.files().filter(|(_, file)| file.stamp.is_restless()).map(|(layer, _)| layer.path.as_path())
    }

    /// The error where what lies at guest offset `offset` was something else when it was read first.
    pub(super) fn changed_at(&self, offset: u64) -> Error {
        let path = self.layers.first().map_or(Path::new(""), |layer| layer.path.as_path());
        changed(path, &format!(" (at {offset:#x})"))
    }

    /// What could not be read so far.
    pub(super) fn unreadable(&self) -> Vec<Unreadable> {
        let path = self.layers.first().map(|layer| layer.path.clone()).unwrap_or_default();
        let list = self.salvage.as_ref().map(|damage| damage.list(self.size())).unwrap_or_default();
        list.into_iter().map(|(range, error)| Unreadable { path: path.clone(), range, error }).collect()
    }

    /// The smallest cluster of the images, in bytes: what is wrong with a table is wrong for whole clusters.
    pub(super) fn finest(&self) -> u64 {
        let cluster = |layer: &Arc<Layer>| match &layer.content {
            Content::Raw { .. } => None,
            Content::Qcow2(image) => Some(image.header().cluster_bits.bytes()),
        };
        self.layers.iter().filter_map(cluster).min().unwrap_or(SECTOR)
    }

    /// Takes the files out of the host's page cache.
    pub(super) fn drop_cache(&self) {
        for (_, file) in self.files() {
            drop_cache(&file.file);
        }
    }

    pub(super) fn reading(layer: &Layer, offset: u64, source: io::Error) -> Error {
        Error::os(source).doing(Doing::ReadingFile(layer.path.clone(), offset))
    }
}

fn changed(path: &Path, place: &str) -> Error {
    let advice = "stop what writes to it, or read a snapshot of it";
    Error::new(ErrorKind::Changed, format!("'{}' changed while it was read{place}; {advice}", shown(path)))
}
