//! Writing no faster than a given rate.

use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Room, Storage};
use crate::cancel::Cancel;

/// How long to sleep before looking whether the operation was stopped.
const NAP: Duration = Duration::from_millis(50);

/// A storage to which at most a number of bytes in a second is written, by all threads together.
pub(crate) struct Paced<'a> {
    storage: &'a dyn Storage,
    /// Bytes in a second.
    rate: Option<NonZeroU64>,
    cancel: &'a Cancel,
    /// When what was written so far has had its time.
    due: Mutex<Instant>,
}

impl<'a> Paced<'a> {
    /// `storage`, written at `rate` bytes in a second, or as fast as it can be. Once `cancel` is set nothing is waited for.
    #[must_use]
    pub(crate) fn new(storage: &'a dyn Storage, rate: Option<NonZeroU64>, cancel: &'a Cancel) -> Self {
        Self { storage, rate, cancel, due: Mutex::new(Instant::now()) }
    }

    /// Waits until `len` more bytes may be written.
    fn wait(&self, rate: NonZeroU64, len: usize) {
        // A write is far shorter than the 18 GB at which this would begin to take too little time for it.
        let takes = Duration::from_nanos((len as u64).saturating_mul(1_000_000_000) / rate);
        let start = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*due).max(Instant::now());
            *due = start.checked_add(takes).unwrap_or(start);
            start
        };
        loop {
            let left = start.saturating_duration_since(Instant::now());
            if left.is_zero() || self.cancel.check().is_err() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

impl Storage for Paced<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.storage.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if let Some(rate) = self.rate {
            self.wait(rate, buf.len());
        }
        self.storage.write_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.storage.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.storage.set_len(len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        self.storage.punch(range)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.storage.allocated()
    }

    fn sync(&self) -> io::Result<()> {
        self.storage.sync()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.storage.next_data(offset)
    }

    fn room(&self) -> io::Result<Room> {
        self.storage.room()
    }
}
