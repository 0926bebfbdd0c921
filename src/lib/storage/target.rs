//! What a conversion writes to: a file that appears whole, or a device that is written in place.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::Storage;
use super::atomic_file::AtomicFile;
use super::device::Device;
use crate::error::Result;

/// Where temporary files lie that have no place beside a target: next to a device is memory.
const TEMPORARY: &str = "/var/tmp";

/// A new content on its way to its place.
#[derive(Debug)]
pub(crate) enum Target {
    /// A file that gets its name when it is complete.
    File(AtomicFile),
    /// A block device.
    Device(Device),
}

impl Target {
    /// Opens the block device at `path`, or starts a file that will be called so. Nothing of what is there changes yet.
    ///
    /// # Errors
    /// Those of [`AtomicFile::create`] and [`Device::open`].
    pub(crate) fn open(path: &Path) -> Result<Self> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_block_device() => Device::open(path).map(Self::Device),
            _ => AtomicFile::create(path).map(Self::File),
        }
    }

    /// What to write to.
    #[must_use]
    pub(crate) fn storage(&self) -> &dyn Storage {
        match self {
            Self::File(file) => file.storage(),
            Self::Device(device) => device,
        }
    }

    /// Where temporary files may lie.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        match self {
            Self::File(file) => file.directory(),
            Self::Device(_) => Path::new(TEMPORARY),
        }
    }

    /// Whether all is known to be zeros that nothing is written to.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Fails where a content of `length` bytes has no room. A file has room for all; its file system tells when it is full.
    ///
    /// # Errors
    /// As said.
    pub(crate) fn ensure_room(&self, length: u64) -> Result<()> {
        match self {
            Self::File(_) => Ok(()),
            Self::Device(device) => device.ensure_room(length),
        }
    }

    /// To be called before the first write: a device loses what it held.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn begin(&self) -> Result<()> {
        match self {
            Self::File(_) => Ok(()),
            Self::Device(device) => device.begin(),
        }
    }

    /// Writes the content to the disk and takes it out of the host's page cache.
    ///
    /// # Errors
    /// Fails where the content could not be made durable.
    pub(crate) fn uncache(&self) -> Result<()> {
        match self {
            Self::File(file) => file.uncache(),
            Self::Device(device) => device.uncache(),
        }
    }

    /// Makes the content visible, and returns the bytes that it occupies. With `durable` it is on the disk when this returns.
    ///
    /// # Errors
    /// Those of [`AtomicFile::commit`] and [`Device::commit`].
    pub(crate) fn commit(self, durable: bool) -> Result<u64> {
        match self {
            Self::File(file) => file.commit(durable),
            Self::Device(device) => device.commit(durable),
        }
    }
}

/// Takes everything and keeps nothing: for finding out how long something will be.
pub(crate) struct Nowhere;

impl Storage for Nowhere {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _: Range<u64>) -> io::Result<bool> {
        Ok(true)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }
}
