//! The first bytes of something that is written where it lies: held back until all else is there.
//!
//! Nothing can make a new content appear whole that is written over an old one. What can be done is that nobody takes half of it for all
//! of it: the first sector, which holds the header of an image or the partition table of a disk, is cleared first and gets its content
//! last.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{FileStorage, Storage};
use crate::units::{SECTOR, to_usize};

/// What the first bytes will be.
#[derive(Debug)]
pub(super) struct Head(Mutex<Vec<u8>>);

impl Head {
    /// How many they are.
    pub(super) const LENGTH: u64 = SECTOR;

    /// Zeros, until they are written.
    pub(super) fn new() -> Self {
        Self::of_length(Self::LENGTH)
    }

    fn of_length(length: u64) -> Self {
        Self(Mutex::new(vec![0; to_usize(length)]))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a content of which `file` has all but what is held here.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn read_at(&self, file: &FileStorage, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = file.read_at(buf, offset)?;
        self.read(buf.get_mut(..read).unwrap_or_default(), offset);
        Ok(read)
    }

    /// Writes to `file` what is not to be held here.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn write_at(&self, file: &FileStorage, buf: &[u8], offset: u64) -> io::Result<()> {
        let held = self.write(buf, offset);
        match buf.get(held..) {
            None | Some([]) => Ok(()),
            Some(rest) => file.write_at(rest, offset + held as u64),
        }
    }

    /// Writes what is held here of a content of `length` bytes, after all else. With `durable` that is on the disk before, and this
    /// after.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn put(&self, file: &FileStorage, length: u64, durable: bool) -> io::Result<()> {
        let sync = || if durable { file.sync() } else { Ok(()) };
        sync()?;
        file.write_at(&self.of(length), 0)?;
        sync()
    }

    /// The part of a content of `length` bytes that is held here.
    fn of(&self, length: u64) -> Vec<u8> {
        let mut bytes = self.bytes().clone();
        bytes.truncate(to_usize(length));
        bytes
    }

    /// Puts what is held here into `buf`, which was read at `offset`.
    fn read(&self, buf: &mut [u8], offset: u64) {
        let bytes = self.bytes();
        let held = bytes.get(to_usize(offset)..).unwrap_or_default();
        for (byte, is) in buf.iter_mut().zip(held) {
            *byte = *is;
        }
    }

    /// Takes the part of `buf` that is held here and returns how long it is; the rest is to be written.
    fn write(&self, buf: &[u8], offset: u64) -> usize {
        let mut bytes = self.bytes();
        let held = bytes.get_mut(to_usize(offset)..).unwrap_or_default();
        let length = held.len().min(buf.len());
        for (byte, is) in held.iter_mut().zip(buf) {
            *byte = *is;
        }
        length
    }

    /// Makes what is held here of `start..end` zeros.
    pub(super) fn clear(&self, start: u64, end: u64) {
        for (at, byte) in (0..).zip(self.bytes().iter_mut()) {
            if (start..end).contains(&at) {
                *byte = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_across_the_end_is_held_in_part() {
        let head = Head::of_length(8);
        assert_eq!(head.write(b"abcd", 6), 2);
        assert_eq!(head.write(b"xyz", 8), 0);
        assert_eq!(head.write(b"xyz", 1 << 40), 0);
        assert_eq!(head.write(b"12", 0), 2);
        let mut buf = *b"......";
        head.read(&mut buf, 5);
        assert_eq!(&buf, b"\0ab...");
        head.clear(1, 7);
        assert_eq!(head.of(100), b"1\0\0\0\0\0\0b");
        assert_eq!(head.of(1), b"1");
    }
}
