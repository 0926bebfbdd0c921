//! Opening an existing file for an image, locked.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use super::device::refuse_read_only;
use super::lock::{LockMode, lock};
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Opens the regular file or block device at `path` and locks it as `mode` says.
///
/// # Errors
/// What the operating system says; [`crate::ErrorKind::Unsupported`] for a directory, pipe, socket or character device;
/// [`crate::ErrorKind::Locked`] where another program uses the file.
pub(crate) fn open_locked(path: &Path, mode: LockMode) -> Result<File> {
    // Opening some devices does something: look first.
    refuse_special(&std::fs::metadata(path).map_err(Error::os)?)?;
    let file = open(path, mode == LockMode::Write)?;
    let metadata = file.metadata().at("fstat")?;
    refuse_special(&metadata)?;
    if mode == LockMode::Write {
        refuse_read_only(&metadata)?;
    }
    lock(&file, path, mode)?;
    // Between opening and locking the name may have been given to another file (a rename over it).
    let named = std::fs::metadata(path).at("stat")?;
    if (named.dev(), named.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(Error::unsupported("the file was replaced while it was opened; try again"));
    }
    Ok(file)
}

/// How long to sleep before a file with a lease is tried again.
const NAP: Duration = Duration::from_millis(20);
/// How long a lease is waited for: the kernel breaks one after 45 seconds, where nobody has told it otherwise.
const LEASE: Duration = Duration::from_secs(120);

/// Opens the file at `path` without ever waiting for the other end of a pipe, and waits for whoever holds a lease on it, as a file
/// server does for its clients.
fn open(path: &Path, write: bool) -> Result<File> {
    let begun = Instant::now();
    loop {
        // O_NONBLOCK means nothing for files and block devices but this: a lease is asked back, and not waited for.
        let mut options = OpenOptions::new();
        match options.read(true).write(write).custom_flags(OFlag::O_NONBLOCK.bits()).open(path) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && begun.elapsed() < LEASE => std::thread::sleep(NAP),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::new(
                    ErrorKind::Locked,
                    "another program holds a lease on it, and does not give it back",
                ));
            }
            opened => return opened.map_err(Error::os),
        }
    }
}

/// Identifies the file or the device behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
