//! Positioned I/O: the only way in which the library touches files, and the locks that it shares with QEMU.
//!
//! [`crate::disk::open_image`] opens a file as a [`FileStorage`]. Operations on an image where it lies take any [`Storage`], so that
//! a program can put something between (a log, a limit, a failure on purpose) or keep the image in memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice};
use nix::unistd::Whence;

use crate::error::{Context, Error, ErrorKind, IoContext, Result};

pub(crate) mod atomic_file;
mod attributes;
pub(crate) mod buffer;
pub(crate) mod device;
mod fresh;
mod head;
mod in_place_file;
pub(crate) mod latch;
pub(crate) mod lock;
mod lookup;
mod memory;
pub(crate) mod mounts;
pub(crate) mod open;
pub(crate) mod rate;
pub(crate) mod region;
mod room;
pub(crate) mod sparse;
pub(crate) mod stack;
pub(crate) mod target;

pub use lock::{LockMode, Locking};
pub use memory::Memory;
pub use room::Room;

/// A file, or something that behaves like one.
pub trait Storage: Send + Sync {
    /// Reads at `offset` until `buf` is full or the file ends; returns the number of bytes read.
    ///
    /// # Errors
    /// The operating system's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf` at `offset`, growing the file where needed.
    ///
    /// # Errors
    /// The operating system's.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// The length in bytes, now.
    ///
    /// # Errors
    /// The operating system's.
    fn len(&self) -> io::Result<u64>;

    /// Cuts the file, or grows it with zeros, to `len` bytes.
    ///
    /// # Errors
    /// The operating system's.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Gives the space of `range` back, as far as whole blocks of the file system or device lie in it, which then read as zeros.
    /// Returns `false` where that cannot be done; then nothing has changed.
    ///
    /// # Errors
    /// The operating system's.
    fn punch(&self, range: Range<u64>) -> io::Result<bool>;

    /// The bytes that the file occupies, which are fewer than its length where it has holes.
    ///
    /// # Errors
    /// The operating system's.
    fn allocated(&self) -> io::Result<u64>;

    /// Returns once everything written before is durable.
    ///
    /// # Errors
    /// The operating system's.
    fn sync(&self) -> io::Result<()>;

    /// The first range at or after `offset` that may hold something else than zeros; `None` where only zeros follow.
    ///
    /// # Errors
    /// The operating system's.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// What there is to grow into, now. What is [`Room::Fixed`] can never be longer than it is.
    ///
    /// # Errors
    /// The operating system's.
    fn room(&self) -> io::Result<Room> {
        Ok(Room::Unknown)
    }
}

/// Whether a file system or device that answers so cannot do what it was asked for, or may not, and has changed nothing. They do not
/// agree on one answer: what is not built in, what a filter of system calls takes away, what an append-only file forbids, and
/// what a device has other blocks for.
pub(crate) fn no_such_call(error: Errno) -> bool {
    use Errno::{EINVAL, ENODEV, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM, ETXTBSY};
    matches!(error, EOPNOTSUPP | ENOSYS | ENODEV | EINVAL | EPERM | ENOTTY | ETXTBSY)
}

/// Whether a hole cannot be made because that itself needs room, on file systems that never write in place.
fn no_room(error: Errno) -> bool {
    matches!(error, Errno::ENOSPC | Errno::EDQUOT)
}

/// Has the system begin to read `range` of `file`, all of it at once. Threads that read side by side in one file look to it like
/// readers at random, and it would read ahead too little for them, or twice.
pub(crate) fn will_read(file: &File, range: Range<u64>) {
    if let (Ok(start), Ok(length)) = (i64::try_from(range.start), i64::try_from(range.end.saturating_sub(range.start)))
    {
        // Advice only.
        let _ = nix::fcntl::posix_fadvise(file, start, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }
}

/// Takes the clean pages of `file` out of the page cache. Advice only: where it is not followed nothing is lost.
pub(crate) fn drop_cache(file: &File) {
    let _ = nix::fcntl::posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

/// Fills `buf` from `offset`; what lies past the end of the file reads as zeros, as QEMU reads a short last cluster.
pub(crate) fn read_padded(storage: &dyn Storage, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let read = storage.read_at(buf, offset)?;
    if let Some(rest) = buf.get_mut(read..) {
        rest.fill(0);
    }
    Ok(())
}

/// Fills `buf` from `offset`, or fails with "`what` lies past the end of the file".
pub(crate) fn read_exact(storage: &dyn Storage, buf: &mut [u8], offset: u64, what: &str) -> Result<()> {
    let read = storage.read_at(buf, offset).at(format_args!("Could not read {what} at {offset:#x}"));
    let read = read.map_err(|e| e.at(offset))?;
    if read < buf.len() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("{what} at {offset:#x} lies past the end of the file; is the file cut short?"),
        )
        .at(offset));
    }
    Ok(())
}

/// Writes `bytes` at `offset`, or fails naming the offset.
pub(crate) fn write(storage: &dyn Storage, bytes: &[u8], offset: u64) -> Result<()> {
    storage.write_at(bytes, offset).writing(offset)
}

/// Flushes.
pub(crate) fn flush(storage: &dyn Storage) -> Result<()> {
    storage.sync().at("Could not flush")
}

/// The block of most file systems, in bytes.
pub(crate) const BLOCK: u64 = 4096;

/// A file or block device of the operating system.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// The first reason why space could not be given back.
    kept: OnceLock<Errno>,
    ignores_holes: bool,
    /// A range of data that was found last. File systems look for the next hole extent by extent, which may be at the end of
    /// the file.
    data: Mutex<Range<u64>>,
}

impl FileStorage {
    pub(crate) fn new(file: File) -> Self {
        Self { file, kept: OnceLock::new(), ignores_holes: false, data: Mutex::default() }
    }

    /// The same, and what its file system says of holes is not believed: all of it may be data, and reading tells.
    #[must_use]
    pub fn ignoring_holes(self, ignores: bool) -> Self {
        Self { ignores_holes: ignores, ..self }
    }

    /// Why space that is free in the file was not given back to its file system, in the words of the operating system; `None` where
    /// all was, or nothing was to be, and for a block device, whose space nobody else can use.
    #[must_use]
    pub fn kept_space(&self) -> Option<&'static str> {
        let is_file = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        self.kept.get().filter(|_| is_file).map(|reason| reason.desc())
    }

    /// Fails where what is written cannot be made durable: the order of writes is what protects an image in place, and there is none
    /// without flushes. Nothing is written.
    ///
    /// # Errors
    /// As said.
    pub(crate) fn ensure_flushes(&self) -> Result<()> {
        self.sync().map_err(|e| match e.raw_os_error().map(Errno::from_raw).is_some_and(no_such_call) {
            true => Error::io("its file system cannot flush, and an image is changed in place only with flushes", e)
                .ending("; copy it to another file system"),
            false => Error::io("Could not flush", e),
        })
    }

    /// The blocks in which space can be given back: those of a device are its own, and a file system clears the rest by itself.
    fn grain(&self) -> u64 {
        match self.file.metadata() {
            Ok(metadata) if metadata.file_type().is_block_device() => device::logical_block(&self.file),
            _ => 1,
        }
    }

    /// What may be data where nobody can tell: all from `offset` on.
    fn all_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((offset < len).then_some(offset..len))
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Takes what was read of the file out of the host's page cache, as far as the system follows the advice.
    pub fn drop_cache(&self) {
        drop_cache(&self.file);
    }

    fn data(&self) -> MutexGuard<'_, Range<u64>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.is_file() {
            return Ok(metadata.len());
        }
        // A block device says its size only by where its end is.
        Ok(nix::unistd::lseek64(&self.file, 0, Whence::SeekEnd)?.cast_unsigned())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut known = self.data();
        *known = 0..0;
        self.file.set_len(len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        let mut known = self.data();
        *known = 0..0;
        let grain = self.grain();
        let range = range.start.next_multiple_of(grain)..range.end - range.end % grain;
        if range.is_empty() {
            return Ok(true);
        }
        let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(Errno::EOVERFLOW));
        let (start, length) = (number(range.start)?, number(range.end - range.start)?);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match nix::fcntl::fallocate(&self.file, mode, start, length) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(e) if no_such_call(e) || no_room(e) => {
                    let _ = self.kept.set(e);
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        match nix::sys::stat::fstat(self.file.as_fd()) {
            Ok(found) => Ok(found.st_blocks.cast_unsigned() * 512),
            // Where nobody can tell, as for a block device. It is a figure, no more.
            Err(e) if no_such_call(e) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all().inspect_err(|_| {
            // Linux takes pages that it could not write for clean. Nobody must read them again and believe them.
            let _ = nix::fcntl::posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if self.ignores_holes {
            return self.all_from(offset);
        }
        let mut known = self.data();
        if known.contains(&offset) {
            return Ok(Some(offset..known.end));
        }
        let at = i64::try_from(offset).map_err(|_| io::Error::from(Errno::EOVERFLOW))?;
        let start = match nix::unistd::lseek64(&self.file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            // Whatever keeps a file system or device from saying it: everything may be data, and reading will tell.
            Err(_) => return self.all_from(offset),
        };
        let end = match nix::unistd::lseek64(&self.file, start, Whence::SeekHole) {
            Ok(end) => end.cast_unsigned(),
            Err(Errno::ENXIO) => return Ok(None),
            Err(_) => return self.all_from(start.cast_unsigned()),
        };
        // Between the two calls data may have become a hole. Nobody must come here again and again for a range of no length.
        let start = start.cast_unsigned();
        *known = start..if end > start { end } else { (start + 1).next_multiple_of(BLOCK) };
        Ok(Some(known.clone()))
    }

    fn room(&self) -> io::Result<Room> {
        Room::of(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_skipped_and_a_short_file_reads_as_zeros() {
        let storage = FileStorage::new(tempfile::tempfile().unwrap());
        storage.set_len(1 << 20).unwrap();
        assert_eq!(storage.next_data(0).unwrap(), None);
        storage.write_at(&[7; 4096], 512 << 10).unwrap();
        let range = storage.next_data(0).unwrap().unwrap();
        assert!(range.start <= 512 << 10 && range.end >= (512 << 10) + 4096);
        let mut buf = [1; 8];
        read_padded(&storage, &mut buf, (1 << 20) - 4).unwrap();
        assert_eq!(buf, [0; 8]);
        assert!(read_exact(&storage, &mut buf, (1 << 20) - 4, "table").is_err());
    }

    #[test]
    fn holes_that_are_not_believed_are_data() {
        let storage = FileStorage::new(tempfile::tempfile().unwrap()).ignoring_holes(true);
        storage.set_len(1 << 20).unwrap();
        assert_eq!(storage.next_data(4096).unwrap(), Some(4096..1 << 20));
        assert_eq!(storage.next_data(1 << 20).unwrap(), None);
    }

    #[test]
    fn what_was_data_is_looked_for_again_after_a_hole_was_punched_and_the_length_changed() {
        let storage = FileStorage::new(tempfile::tempfile().unwrap());
        storage.write_at(&[7; 1 << 20], 0).unwrap();
        assert_eq!(storage.next_data(0).unwrap(), Some(0..1 << 20));
        assert_eq!(storage.next_data(4096).unwrap(), Some(4096..1 << 20));
        if storage.punch(64 << 10..128 << 10).unwrap() {
            assert_eq!(storage.next_data(4096).unwrap(), Some(4096..64 << 10));
            assert_eq!(storage.next_data(64 << 10).unwrap(), Some(128 << 10..1 << 20));
        }
        storage.set_len(512 << 10).unwrap();
        assert_eq!(storage.next_data(256 << 10).unwrap(), Some(256 << 10..512 << 10));
        storage.write_at(&[7; 4096], 1 << 20).unwrap();
        assert_eq!(storage.next_data(768 << 10).unwrap(), Some(1 << 20..(1 << 20) + 4096));
    }

    #[test]
    fn a_punched_range_reads_as_zeros_and_takes_no_space() {
        let storage = FileStorage::new(tempfile::tempfile().unwrap());
        storage.write_at(&[7; 1 << 20], 0).unwrap();
        let before = storage.allocated().unwrap();
        if storage.punch(64 << 10..128 << 10).unwrap() {
            assert_eq!(storage.allocated().unwrap(), before - (64 << 10));
            let mut buf = [1; 4];
            read_padded(&storage, &mut buf, (128 << 10) - 2).unwrap();
            assert_eq!((buf, storage.len().unwrap()), ([0, 0, 7, 7], 1 << 20));
        }
    }
}
