//! A storage that remembers every write and flush, so that the file can be made as a power failure at any point would leave it.

use super::Random;
use dedup_img::storage::Storage;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::{fs, mem};

/// What the storage was told to do.
#[derive(Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Flush,
}

/// An image in memory.
pub(crate) struct CrashStorage {
    before: Vec<u8>,
    now: Mutex<(Vec<u8>, Vec<Op>)>,
}

impl CrashStorage {
    /// The image at `path`.
    pub(crate) fn open(path: &Path) -> Self {
        let before = fs::read(path).unwrap();
        Self { now: Mutex::new((before.clone(), Vec::new())), before }
    }

    /// The image as it is now.
    pub(crate) fn now(&self) -> Vec<u8> {
        self.now.lock().unwrap().0.clone()
    }

    /// Hands `judge` the image as the disk may hold it after a power failure: after every write and every flush, once with all
    /// writes that were not flushed, and otherwise with a random choice of them, the last one perhaps torn at a sector.
    /// Returns how many states there were.
    pub(crate) fn every_crash(&self, seed: u64, mut judge: impl FnMut(&[u8], &str)) -> usize {
        let mut random = Random::new(seed);
        let (mut durable, mut pending) = (self.before.clone(), Vec::new());
        let mut states = 0;
        for (at, op) in self.now.lock().unwrap().1.iter().enumerate() {
            match op {
                Op::Write(offset, bytes) => pending.push((*offset, bytes.clone())),
                Op::Flush => mem::take(&mut pending).iter().for_each(|write| apply(&mut durable, write)),
            }
            let mut all = durable.clone();
            pending.iter().for_each(|write| apply(&mut all, write));
            judge(&all, &format!("after operation {at}"));
            states += 1;
            if pending.is_empty() {
                continue;
            }
            let mut some = durable.clone();
            for (offset, bytes) in &pending {
                match random.below(3) {
                    0 => {}
                    1 => apply(&mut some, &(*offset, bytes.clone())),
                    _ => {
                        // Sectors are atomic, writes are not.
                        let first = 512 - *offset as usize % 512;
                        let sectors = bytes.len().saturating_sub(first) / 512;
                        let kept = first + 512 * random.below(sectors as u64 + 1) as usize;
                        let kept = if first > bytes.len() { bytes.len() } else { kept.min(bytes.len()) };
                        apply(&mut some, &(*offset, bytes[..kept].to_vec()));
                    }
                }
            }
            judge(&some, &format!("after operation {at}, of what was not flushed some"));
            states += 1;
        }
        states
    }
}

fn apply(image: &mut Vec<u8>, (offset, bytes): &(u64, Vec<u8>)) {
    let start = *offset as usize;
    if image.len() < start + bytes.len() {
        image.resize(start + bytes.len(), 0);
    }
    image[start..start + bytes.len()].copy_from_slice(bytes);
}

impl Storage for CrashStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let now = self.now.lock().unwrap();
        let source = usize::try_from(offset).ok().and_then(|start| now.0.get(start..)).unwrap_or_default();
        let len = source.len().min(buf.len());
        buf[..len].copy_from_slice(&source[..len]);
        Ok(len)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut now = self.now.lock().unwrap();
        let write = (offset, buf.to_vec());
        apply(&mut now.0, &write);
        now.1.push(Op::Write(write.0, write.1));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.now.lock().unwrap().0.len() as u64)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        unimplemented_here("set_len")
    }

    fn punch(&self, _: Range<u64>) -> io::Result<bool> {
        unimplemented_here("punch")
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.now.lock().unwrap().1.push(Op::Flush);
        Ok(())
    }

    fn next_data(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        unimplemented_here("next_data")
    }
}

/// A repair has no use for these.
fn unimplemented_here<T>(what: &str) -> io::Result<T> {
    Err(io::Error::other(format!("{what}: not needed by what is tested")))
}
