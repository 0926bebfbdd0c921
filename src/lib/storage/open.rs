//! Opening an existing file for an image, locked.

use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};

use super::lock::{LockMode, lock};
use crate::error::{Error, IoContext, Result};

/// Opens the regular file or block device at `path` and locks it as `mode` says.
///
/// # Errors
/// What the operating system says; [`crate::ErrorKind::Unsupported`] for a directory, pipe, socket or character device;
/// [`crate::ErrorKind::Locked`] where another program uses the file.
pub(crate) fn open_locked(path: &Path, mode: LockMode) -> Result<File> {
    // Opening some devices does something: look first.
    refuse_special(&std::fs::metadata(path).map_err(Error::os)?)?;
    // O_NONBLOCK: opening a pipe must not wait for its other end. It means nothing for files and block devices.
    let file = OpenOptions::new()
        .read(true)
        .write(mode == LockMode::Write)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(Error::os)?;
    let metadata = file.metadata().at("fstat")?;
    refuse_special(&metadata)?;
    lock(&file, path, mode)?;
    // Between opening and locking the name may have been given to another file (a rename over it).
    let named = std::fs::metadata(path).at("stat")?;
    if (named.dev(), named.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(Error::unsupported("the file was replaced while it was opened; try again"));
    }
    Ok(file)
}

/// Identifies the file or the device behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileId {
    /// A file of a file system.
    File {
        /// The file system.
        dev: u64,
        /// The file in it.
        ino: u64,
    },
    /// A block device, whatever names it has.
    Device(u64),
}

impl FileId {
    /// The identity of an open file.
    #[must_use]
    pub(crate) fn of(metadata: &Metadata) -> Self {
        match metadata.file_type().is_block_device() {
            true => Self::Device(metadata.rdev()),
            false => Self::File { dev: metadata.dev(), ino: metadata.ino() },
        }
    }

    /// The file that a loop device, or a partition of one, stores its content in.
    #[must_use]
    pub(crate) fn behind_loop(self) -> Option<Self> {
        let Self::Device(rdev) = self else { return None };
        let device = format!("/sys/dev/block/{}:{}", major(rdev), minor(rdev));
        let device = std::fs::canonicalize(device).ok()?;
        let name = [Some(device.as_path()), device.parent()].into_iter().flatten();
        let mut name = name.filter_map(|device| std::fs::read_to_string(device.join("loop/backing_file")).ok());
        std::fs::metadata(name.next()?.trim_end_matches('\n')).ok().map(|metadata| Self::of(&metadata))
    }
}

fn refuse_special(metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let name = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "a socket"
    };
    // A disk is read more than once, and not from its beginning to its end.
    Err(Error::unsupported(format!("{name} is not a regular file or block device, which can be read at any place")))
}
