//! A block device that is written where it is.
//!
//! It has no second name to write under, so that nothing can make a new content appear whole: its first sector is written last (see
//! [`super::head`]).

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag};
use nix::sys::stat::{major, minor};

use super::head::Head;
use super::lock::{LockMode, lock};
use super::{BLOCK, FileStorage, Room, Storage, drop_cache, no_such_call};
use crate::error::{Context, Doing, Error, ErrorKind, IoContext, Result};
use crate::units::to_usize;

/// Zeros that are written in one go where a device cannot zero.
const ZEROS: usize = 1 << 20;

/// A block device, locked like an image that QEMU has open for writing, and held by nobody else.
#[derive(Debug)]
pub(crate) struct Device {
    file: FileStorage,
    path: PathBuf,
    /// Bytes of the device.
    size: u64,
    /// It is asked to zero ranges of whole blocks of so many bytes: of [`BLOCK`] or, where they are larger, of its own.
    block: u64,
    /// Bytes of its content.
    length: AtomicU64,
    head: Head,
}

impl Device {
    /// Opens the block device at `path`. Nothing is written before [`Device::begin`].
    ///
    /// # Errors
    /// What the operating system says; [`ErrorKind::Locked`] where it is mounted or used otherwise.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let open = || {
            // Linux takes O_EXCL for a claim, which it refuses where a file system or another device has one.
            let flags = OFlag::O_EXCL | OFlag::O_NONBLOCK;
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path);
            let file = file.map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EBUSY) => Error::new(ErrorKind::Locked, "the device is mounted or in use otherwise"),
                _ => Error::os(e),
            })?;
            let metadata = file.metadata().at("fstat")?;
            if !metadata.file_type().is_block_device() {
                return Err(Error::unsupported("it is no block device any more; try again"));
            }
            refuse_read_only(&metadata)?;
            lock(&file, path, LockMode::Write)?;
            let file = FileStorage::new(file);
            let size = file.len().at("Could not get its size")?;
            Ok((file, size))
        };
        let (file, size) = open().opening(path)?;
        let block = logical_block(file.file()).max(BLOCK);
        Ok(Self { file, path: path.to_owned(), size, block, length: AtomicU64::new(0), head: Head::new() })
    }

    /// Fails where a content of `length` bytes has no room.
    ///
    /// # Errors
    /// As said, with both sizes.
    pub(crate) fn ensure_room(&self, length: u64) -> Result<()> {
        ensure_room(self.size, length).on(&self.path)
    }

    /// Clears the first sector: from here until [`Device::commit`] the device holds nothing that anybody takes for a disk.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn begin(&self) -> Result<()> {
        // What an earlier writer has lost on its way to the device the kernel tells the next one who asks: before anything is changed.
        let told = self
            .file
            .sync()
            .and_then(|()| self.file.write_at(&[0; to_usize(Head::LENGTH)], 0))
            .and_then(|()| self.file.sync());
        told.map_err(|e| self.writing(e))
    }

    /// Writes the first sector, and returns the bytes of the content. With `durable` all of it is on the device before and after.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn commit(self, durable: bool) -> Result<u64> {
        let length = self.length.load(Ordering::Relaxed);
        let wrote = self.head.put(&self.file, length, durable);
        wrote.map(|()| length).map_err(|e| self.writing(e))
    }

    /// Writes the content to the device and takes it out of the host's page cache.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn uncache(&self) -> Result<()> {
        self.file.sync().map_err(|e| self.writing(e))?;
        drop_cache(self.file());
        Ok(())
    }

    fn file(&self) -> &File {
        self.file.file()
    }

    fn writing(&self, source: io::Error) -> Error {
        Error::os(source).doing(Doing::WritingFile(self.path.clone()))
    }

    /// Zeros whole blocks, giving their space back where the device can.
    fn zero_blocks(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(Errno::EOVERFLOW));
        let (start, length) = (number(range.start)?, number(range.end - range.start)?);
        for mode in [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE] {
            let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            loop {
                match nix::fcntl::fallocate(self.file(), mode, start, length) {
                    Ok(()) => return Ok(()),
                    Err(Errno::EINTR) => {}
                    Err(e) if no_such_call(e) => break,
                    Err(e) => return Err(e.into()),
                }
            }
        }
        self.write_zeros(range)
    }

    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let zeros = vec![0; to_usize(range.end - range.start).min(ZEROS)];
        let mut at = range.start;
        while at < range.end {
            let len = to_usize(range.end - at).min(ZEROS);
            self.file.write_at(zeros.get(..len).unwrap_or_default(), at)?;
            at += len as u64;
        }
        Ok(())
    }
}

/// The size of a device's logical blocks: what it zeroes or discards begins and ends at a multiple. 512 where it does not say.
pub(crate) fn logical_block(device: &File) -> u64 {
    rustix::fs::ioctl_blksszget(device).ok().filter(|block| block.is_power_of_two()).map_or(512, u64::from)
}

/// Fails where the device behind `metadata` cannot be written. Linux may open it for writing all the same, and refuses the first write.
pub(crate) fn refuse_read_only(metadata: &Metadata) -> Result<()> {
    let is_device = metadata.file_type().is_block_device();
    let read_only = format!("/sys/dev/block/{}:{}/ro", major(metadata.rdev()), minor(metadata.rdev()));
    if is_device && std::fs::read_to_string(read_only).is_ok_and(|text| text.trim_end() == "1") {
        return Err(Error::unsupported("the device is read-only"));
    }
    Ok(())
}

/// Fails where what is to be `length` bytes long does not fit into a device of `size` bytes.
fn ensure_room(size: u64, length: u64) -> Result<()> {
    if length <= size {
        return Ok(());
    }
    let message = format!(
        "no room on the device, which is too small: it has {size} bytes, and {length} are needed; nothing was written"
    );
    Err(Error::new(ErrorKind::Limit, message))
}

/// The length that `storage` can never exceed: that of a device. `None` for what grows as it is written.
///
/// # Errors
/// The operating system's.
pub(crate) fn capacity(storage: &dyn Storage) -> Result<Option<u64>> {
    let size = || match storage.room()? {
        Room::Fixed => storage.len().map(Some),
        _ => Ok(None),
    };
    size().at("Could not get its size")
}

/// Fails where `storage` can never become `length` bytes long; to be asked before anything is written.
pub(crate) fn ensure_capacity(storage: &dyn Storage, length: u64) -> Result<()> {
    match capacity(storage)? {
        Some(size) => ensure_room(size, length),
        None => Ok(()),
    }
}

impl Storage for Device {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.head.read_at(&self.file, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.head.write_at(&self.file, buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    /// Says how long the content is. A device keeps its size, and what it has behind the content.
    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.size {
            return Err(Errno::ENOSPC.into());
        }
        self.length.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// Makes `range` read as zeros, whatever was there, at any cost.
    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        self.head.clear(range.start, range.end);
        let start = range.start.max(Head::LENGTH.min(range.end));
        let blocks = start.next_multiple_of(self.block)..range.end - range.end % self.block;
        if blocks.is_empty() {
            return self.write_zeros(start..range.end).map(|()| true);
        }
        self.write_zeros(start..blocks.start)?;
        self.write_zeros(blocks.end..range.end)?;
        self.zero_blocks(blocks).map(|()| true)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.length.load(Ordering::Relaxed))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size).then_some(offset..self.size))
    }

    fn room(&self) -> io::Result<Room> {
        Ok(Room::Fixed)
    }
}
