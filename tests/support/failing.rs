//! A storage on which one operation fails, or everything from then on, or at which the user asks to stop.

use super::crash::CrashStorage;
use dedup_img::Cancel;
use dedup_img::storage::{Room, Storage};
use nix::errno::Errno;
use std::io;
use std::ops::Range;
use std::sync::Mutex;

/// What was to be done when it failed for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    Write(u64),
    Flush,
    Punch,
    SetLen,
}

/// What happens at some operation.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// It fails with the system's error.
    Error(Errno),
    /// So does it, and all later ones.
    Broken(Errno),
    /// Nothing fails: meanwhile the user has asked to stop.
    Stop(Cancel),
}

/// An image in memory, and what is to happen at one of the operations that change something.
pub(crate) struct FailingStorage {
    disk: CrashStorage,
    at: u64,
    event: Event,
    now: Mutex<(u64, Option<Failed>)>,
}

impl FailingStorage {
    /// The image with these bytes; operations are counted from 0.
    pub(crate) fn of(image: Vec<u8>, at: u64, event: Event) -> Self {
        Self { disk: CrashStorage::of(image), at, event, now: Mutex::new((0, None)) }
    }

    /// The same for an image in memory that may have other limits.
    pub(crate) fn over(disk: CrashStorage, at: u64, event: Event) -> Self {
        Self { disk, at, event, now: Mutex::new((0, None)) }
    }

    /// At what it happened first.
    pub(crate) fn failed(&self) -> Option<Failed> {
        self.now.lock().unwrap().1
    }

    /// The disk below, with all that did not fail.
    pub(crate) fn disk(&self) -> &CrashStorage {
        &self.disk
    }

    /// Counts an operation, and lets happen what is due.
    fn turn(&self, what: Failed) -> io::Result<()> {
        let mut now = self.now.lock().unwrap();
        let count = now.0;
        now.0 += 1;
        if count == self.at {
            now.1 = Some(what);
        }
        match &self.event {
            Event::Error(cause) if count == self.at => Err((*cause).into()),
            Event::Broken(cause) if count >= self.at => Err((*cause).into()),
            Event::Stop(cancel) if count == self.at => {
                cancel.cancel();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Storage for FailingStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.read_at(buf, offset)
    }

    /// A write that fails may have done its first half.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let turn = self.turn(Failed::Write(offset));
        let done = match turn {
            Ok(()) => buf.len(),
            Err(_) => buf.len() / 2 / 512 * 512,
        };
        if done > 0 {
            self.disk.write_at(&buf[..done], offset)?;
        }
        turn
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.turn(Failed::SetLen)?;
        self.disk.set_len(len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        self.turn(Failed::Punch)?;
        self.disk.punch(range)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.disk.allocated()
    }

    fn room(&self) -> io::Result<Room> {
        self.disk.room()
    }

    fn sync(&self) -> io::Result<()> {
        let turn = self.turn(Failed::Flush);
        if turn.is_err() {
            self.disk.flush_failed();
            return turn;
        }
        self.disk.sync()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.disk.next_data(offset)
    }
}
