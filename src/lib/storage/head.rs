//! The first bytes of something that is written where it lies: held back until all else is there.
//!
//! Nothing can make a new content appear whole that is written over an old one. What can be done is that nobody takes half of it for all
//! of it: the header of an image or the partition table of a disk is cleared first and gets its content last.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::units::to_usize;

/// What the first bytes will be.
#[derive(Debug)]
pub(super) struct Head(Mutex<Vec<u8>>);

impl Head {
    /// Of `length` bytes, which are zeros until they are written.
    pub(super) fn new(length: usize) -> Self {
        Self(Mutex::new(vec![0; length]))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of a content of `length` bytes that is held here.
    pub(super) fn of(&self, length: u64) -> Vec<u8> {
        let mut bytes = self.bytes().clone();
        bytes.truncate(to_usize(length));
        bytes
    }

    /// Puts what is held here into `buf`, which was read at `offset`.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) {
        let bytes = self.bytes();
        let held = bytes.get(to_usize(offset)..).unwrap_or_default();
        for (byte, is) in buf.iter_mut().zip(held) {
            *byte = *is;
        }
    }

    /// Takes the part of `buf` that is held here and returns how long it is; the rest is to be written.
    pub(super) fn write(&self, buf: &[u8], offset: u64) -> usize {
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
        let head = Head::new(8);
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
