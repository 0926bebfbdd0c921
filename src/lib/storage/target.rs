//! What a conversion writes to: a file that appears whole, or what is written where it lies because its name cannot be replaced (I7): a
//! device, or a file where the system does not allow it. Which it is, is decided and said before the work.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx, unlinkat};
use rustix::io::Errno;

use super::Storage;
use super::atomic_file::{AtomicFile, Replacing};
use super::device::Device;
use super::in_place_file::InPlaceFile;
use super::lock::{LockMode, lock};
use super::lookup::{Existing, Found, Place, look_up};
use crate::error::{Context, Error, Result, io_reason};
use crate::notice::{InPlace, Notice, Told};

/// Where temporary files lie that have no place beside a target: next to a device is memory, and where a name cannot be replaced there
/// may be no others either.
pub(crate) const TEMPORARY: &str = "/var/tmp";

/// A new content on its way to its place.
#[derive(Debug)]
pub(crate) enum Target {
    /// A file that gets its name when it is complete.
    File(AtomicFile),
    /// A block device.
    Device(Device),
    /// A file whose name cannot be replaced.
    InPlace(InPlaceFile),
}

impl Target {
    /// Opens the block device at `path`, or what [`Target::file`] says. Nothing of what is there changes yet.
    ///
    /// # Errors
    /// Those of [`Target::file`] and [`Device::open`].
    pub(crate) fn open(path: &Path, told: Told<'_>) -> Result<Self> {
        match look_up(path).creating(path)? {
            Found::Other(metadata) if metadata.file_type().is_block_device() => Device::open(path).map(Self::Device),
            found => Self::at(path, found, told),
        }
    }

    /// Starts a file that will be called `path`, or opens the one that must be written where it lies. Where `path` is a symbolic link,
    /// the file that it names is meant. Nothing of what is there changes yet.
    ///
    /// # Errors
    /// Fails where the file could not be created, is in use, or is not a regular file.
    pub(crate) fn file(path: &Path, told: Told<'_>) -> Result<Self> {
        Self::at(path, look_up(path).creating(path)?, told)
    }

    fn at(path: &Path, found: Found, told: Told<'_>) -> Result<Self> {
        match found {
            Found::Nothing(place) => AtomicFile::new(path, place).map(Self::File),
            Found::File(existing) => Self::over(path, existing, told),
            Found::Other(metadata) => {
                let kind = if metadata.file_type().is_block_device() { "a block device" } else { "not a regular file" };
                Err(Error::unsupported(format!("it is {kind}; write to a regular file and copy it there")))
                    .creating(path)
            }
        }
    }

    /// A file that replaces the one that is there or, where it must, is it.
    fn over(path: &Path, existing: Existing, told: Told<'_>) -> Result<Self> {
        let old = existing.open(path).map_err(Error::os).and_then(|file| {
            lock(&file, path, LockMode::Write)?;
            Ok(file)
        });
        let old = old.opening(path)?;
        let (old, reason) = match existing.place {
            None => (old, InPlace::Descriptor),
            Some(place) => match not_replaceable(&place) {
                Some(reason) => (old, reason),
                None => match AtomicFile::replacing(path, old, place)? {
                    Replacing::Begun(file, notices) => {
                        notices.iter().for_each(told);
                        return Ok(Self::File(file));
                    }
                    Replacing::NotAllowed(old, e) => (old, InPlace::Directory(io_reason(&e))),
                },
            },
        };
        told(&Notice::InPlace { path: path.to_owned(), reason });
        Ok(Self::InPlace(InPlaceFile::new(old, path)))
    }

    /// What to write to.
    #[must_use]
    pub(crate) fn storage(&self) -> &dyn Storage {
        match self {
            Self::File(file) => file.storage(),
            Self::Device(device) => device,
            Self::InPlace(file) => file,
        }
    }

    /// Where temporary files may lie.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        match self {
            Self::File(file) => file.directory(),
            Self::Device(_) | Self::InPlace(_) => Path::new(TEMPORARY),
        }
    }

    /// Whether nothing is there yet that the first write destroys.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Whether, once begun, all is known to be zeros that nothing is written to.
    #[must_use]
    pub(crate) fn reads_zeros(&self) -> bool {
        matches!(self, Self::File(_) | Self::InPlace(_))
    }

    /// Fails where a content of `length` bytes has no room. A file has room for all; its file system tells when it is full.
    ///
    /// # Errors
    /// As said.
    pub(crate) fn ensure_room(&self, length: u64) -> Result<()> {
        match self {
            Self::File(_) | Self::InPlace(_) => Ok(()),
            Self::Device(device) => device.ensure_room(length),
        }
    }

    /// To be called before the first write: what is written where it lies loses what it held.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn begin(&self) -> Result<()> {
        match self {
            Self::File(_) => Ok(()),
            Self::Device(device) => device.begin(),
            Self::InPlace(file) => file.begin(),
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
            Self::InPlace(file) => file.uncache(),
        }
    }

    /// Makes the content visible, and returns the bytes that it occupies. With `durable` it is on the disk when this returns.
    ///
    /// # Errors
    /// Those of [`AtomicFile::commit`], [`Device::commit`] and [`InPlaceFile::commit`].
    pub(crate) fn commit(self, durable: bool, told: Told<'_>) -> Result<u64> {
        match self {
            Self::File(file) => file.commit(durable, told),
            Self::Device(device) => device.commit(durable),
            Self::InPlace(file) => file.commit(durable),
        }
    }
}

/// Why the name of a file cannot be given to another one, where that can be known.
fn not_replaceable(place: &Place) -> Option<InPlace> {
    let status = statx(&place.directory, &place.name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
    if status.is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)) {
        return Some(InPlace::MountPoint);
    }
    // To replace a name is to remove it. Removing it as the directory that it is not fails in any case, and how it fails says whether it
    // may be removed: a directory like /tmp keeps the names of others.
    match unlinkat(&place.directory, &place.name, AtFlags::REMOVEDIR) {
        Err(e @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
            Some(InPlace::Directory(io_reason(&io::Error::from(e))))
        }
        _ => None,
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
