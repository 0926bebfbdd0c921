//! A failed flush ends all writing.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Room, Storage};

/// A storage that takes no more changes once a flush has failed.
///
/// After a failed fsync Linux takes the pages that it could not write for clean: they still read as written, and the next fsync
/// succeeds although they never reached the disk. What is read then is no ground for lowering a refcount.
pub(crate) struct Latch<'a> {
    storage: &'a dyn Storage,
    failed: AtomicBool,
}

impl<'a> Latch<'a> {
    /// Nothing has failed yet.
    pub(crate) fn new(storage: &'a dyn Storage) -> Self {
        Self { storage, failed: AtomicBool::new(false) }
    }

    fn is_whole(&self) -> io::Result<()> {
        match self.failed.load(Ordering::SeqCst) {
            true => Err(io::Error::other("nothing more is written, because a flush has failed")),
            false => Ok(()),
        }
    }
}

impl Storage for Latch<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.storage.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.is_whole()?;
        self.storage.write_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.storage.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.is_whole()?;
        self.storage.set_len(len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        self.is_whole()?;
        self.storage.punch(range)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.storage.allocated()
    }

    fn sync(&self) -> io::Result<()> {
        self.is_whole()?;
        self.storage.sync().inspect_err(|_| self.failed.store(true, Ordering::SeqCst))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.storage.next_data(offset)
    }

    fn room(&self) -> io::Result<Room> {
        self.storage.room()
    }
}
