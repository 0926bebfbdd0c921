//! A storage that remembers everything done to it, so that the file can be made as a power failure at any point would leave it.

use super::Random;
use dedup_img::storage::{Room, Storage};
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::iter::successors;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::{fs, io};

/// What a disk writes whole or not at all.
const SECTOR: u64 = 512;
/// What a file system gives back whole or not at all.
const BLOCK: u64 = 4096;

/// What the storage was told to do.
enum Op {
    Write(u64, Vec<u8>),
    Punch(Range<u64>),
    SetLen(u64),
    Flush,
    FailedFlush,
}

impl Op {
    /// Does all of it.
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::SetLen(len) => image.resize(*len as usize, 0),
            Self::Flush | Self::FailedFlush => {}
            Self::Write(..) | Self::Punch(_) => self.apply_part(image, self.range()),
        }
    }

    /// Does what lies in `part` of a write or a punched hole.
    fn apply_part(&self, image: &mut Vec<u8>, part: Range<u64>) {
        let (start, end) = (part.start as usize, part.end as usize);
        match self {
            Self::Write(offset, bytes) => {
                if image.len() < end {
                    image.resize(end, 0);
                }
                let from = start - *offset as usize;
                image[start..end].copy_from_slice(&bytes[from..from + end - start]);
            }
            // The file keeps its length.
            Self::Punch(_) if start < image.len() => {
                let end = end.min(image.len());
                image[start..end].fill(0);
            }
            _ => {}
        }
    }

    /// Does what a power failure may let through, and says what that was: nothing, all, or some of the sectors.
    fn apply_some(&self, image: &mut Vec<u8>, random: &mut Random) -> char {
        match (random.below(4), self) {
            (0, _) => return '-',
            (1, _) | (_, Self::SetLen(_) | Self::Flush | Self::FailedFlush) => {
                self.apply(image);
                return 'A';
            }
            (way, _) => {
                let Range { mut start, end } = self.range();
                let sectors = (end.next_multiple_of(SECTOR) - start / SECTOR * SECTOR) / SECTOR;
                let prefix = random.below(sectors + 1);
                for sector in 0..sectors {
                    let next = (start / SECTOR + 1) * SECTOR;
                    if if way == 2 { sector < prefix } else { random.below(2) == 0 } {
                        self.apply_part(image, start..next.min(end));
                    }
                    start = next;
                }
            }
        }
        't'
    }

    /// The bytes that it concerns.
    fn range(&self) -> Range<u64> {
        match self {
            Self::Write(offset, bytes) => *offset..*offset + bytes.len() as u64,
            Self::Punch(range) => range.clone(),
            Self::SetLen(len) => *len..*len,
            Self::Flush | Self::FailedFlush => 0..0,
        }
    }

    /// Keeps account of the blocks that are holes.
    fn dig(&self, holes: &mut BTreeSet<u64>) {
        let Range { start, end } = self.range();
        match self {
            Self::Punch(_) => holes.extend(start.div_ceil(BLOCK)..end / BLOCK),
            Self::Write(..) => holes.retain(|block| !(start / BLOCK..end.div_ceil(BLOCK)).contains(block)),
            Self::SetLen(_) => holes.retain(|block| *block < start / BLOCK),
            Self::Flush | Self::FailedFlush => {}
        }
    }

    /// For messages.
    fn told(&self) -> String {
        let Range { start, end } = self.range();
        match self {
            Self::Write(..) => format!("write of {:#x} at {start:#x}", end - start),
            Self::Punch(_) => format!("hole of {:#x} at {start:#x}", end - start),
            Self::SetLen(_) => format!("length of {start:#x}"),
            Self::Flush => "flush".into(),
            Self::FailedFlush => "flush that fails".into(),
        }
    }
}

/// An image in memory.
pub(crate) struct CrashStorage {
    before: Vec<u8>,
    now: Mutex<(Vec<u8>, Vec<Op>)>,
    /// Blocks that were punched and not written since; at first the file has none.
    holes: Mutex<BTreeSet<u64>>,
    /// Bytes that the file may occupy, where there is a limit.
    limit: Option<u64>,
    /// Whether holes can be punched.
    punches: bool,
    /// Whether it is said that there is room without end.
    secret: bool,
}

impl CrashStorage {
    /// The image at `path`.
    pub(crate) fn open(path: &Path) -> Self {
        Self::of(fs::read(path).unwrap())
    }

    /// The image with these bytes.
    pub(crate) fn of(before: Vec<u8>) -> Self {
        let now = Mutex::new((before.clone(), Vec::new()));
        Self { now, before, holes: Mutex::default(), limit: None, punches: true, secret: false }
    }

    /// The same without the blocks of zeros, on a file system that has `more` bytes of room.
    pub(crate) fn sparse_with_room(self, more: u64) -> Self {
        let zeros =
            self.before.chunks(BLOCK as usize).zip(0..).filter(|(block, _)| block.iter().all(|byte| *byte == 0));
        *self.holes.lock().unwrap() = zeros.map(|(_, block)| block).collect();
        let limit = Some(self.used() + more);
        Self { limit, ..self }
    }

    /// The same on a file system that has `more` bytes of room; it punches no holes if told so.
    pub(crate) fn with_room(self, more: u64, punches: bool) -> Self {
        let limit = Some(self.used() + more);
        Self { limit, punches, ..self }
    }

    /// The same, saying that there is more room than there is.
    pub(crate) fn lying(self) -> Self {
        Self { secret: true, ..self }
    }

    /// Bytes that the file occupies.
    pub(crate) fn used(&self) -> u64 {
        let holes = self.holes.lock().unwrap().len() as u64;
        (self.now().len() as u64).next_multiple_of(BLOCK) - holes * BLOCK
    }

    /// The image as it is now.
    pub(crate) fn now(&self) -> Vec<u8> {
        self.now.lock().unwrap().0.clone()
    }

    /// The image as a power failure now may leave it: all that was flushed, of the rest a random choice. What a flush could not
    /// write the next one does not try again, for the system takes it as written.
    pub(crate) fn cut_now(&self, seed: u64) -> Vec<u8> {
        let (mut random, mut image) = (Random::new(seed), self.before.clone());
        let log = &self.now.lock().unwrap().1;
        for epoch in log.split_inclusive(|op| matches!(op, Op::Flush | Op::FailedFlush)) {
            for op in epoch {
                if let Some(Op::Flush) = epoch.last() {
                    op.apply(&mut image);
                } else {
                    op.apply_some(&mut image, &mut random);
                }
            }
        }
        image
    }

    /// The bytes that were written, in order.
    pub(crate) fn writes(&self) -> Vec<Range<u64>> {
        let log = &self.now.lock().unwrap().1;
        log.iter().filter(|op| matches!(op, Op::Write(..))).map(Op::range).collect()
    }

    /// How often it was told to do something.
    pub(crate) fn operations(&self) -> usize {
        self.now.lock().unwrap().1.len()
    }

    /// Notes a flush that failed.
    pub(crate) fn flush_failed(&self) {
        self.done(Op::FailedFlush);
    }

    /// Hands `judge` the image as the disk may hold it after a power failure: after every operation, once with all that was not
    /// flushed, and otherwise with a random choice of it, writes and holes torn at sectors. Returns how many states there were.
    pub(crate) fn every_crash(&self, seed: u64, judge: impl FnMut(&[u8], &str)) -> usize {
        self.crashes(seed, 1, 1, judge)
    }

    /// The same with so many random choices after each `step`th operation, and before each flush.
    pub(crate) fn crashes(&self, seed: u64, choices: u64, step: usize, mut judge: impl FnMut(&[u8], &str)) -> usize {
        let mut random = Random::new(seed);
        let (mut durable, mut cached, mut flushed, mut states) = (self.before.clone(), self.before.clone(), 0, 0);
        let log = &self.now.lock().unwrap().1;
        for (at, op) in log.iter().enumerate() {
            let when = format!("after operation {at} of {} ({})", log.len(), op.told());
            op.apply(&mut cached);
            let met = at % step == 0 || matches!(log.get(at + 1), Some(Op::Flush));
            if met {
                judge(&cached, &when);
                states += 1;
            }
            if let Op::Flush = op {
                durable.clone_from(&cached);
                flushed = at + 1;
                continue;
            }
            for _ in 0..if met { choices } else { 0 } {
                let mut some = durable.clone();
                let fates: String = log[flushed..=at].iter().map(|op| op.apply_some(&mut some, &mut random)).collect();
                judge(&some, &format!("{when}, of what was not flushed {fates}"));
                states += 1;
            }
        }
        states
    }

    fn done(&self, op: Op) {
        let mut now = self.now.lock().unwrap();
        let mut holes = self.holes.lock().unwrap();
        let end = now.0.len() as u64;
        // What a file grows by is a hole.
        let grown = match op {
            Op::SetLen(len) => len,
            Op::Write(offset, _) => offset,
            Op::Punch(_) | Op::Flush | Op::FailedFlush => 0,
        };
        if self.limit.is_some() {
            holes.extend(end.div_ceil(BLOCK)..grown.div_ceil(BLOCK));
        }
        op.dig(&mut holes);
        drop(holes);
        op.apply(&mut now.0);
        now.1.push(op);
    }
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
        let end = offset + buf.len() as u64;
        if let Some(limit) = self.limit {
            let length = (self.len()?).next_multiple_of(BLOCK);
            let new = {
                let holes = self.holes.lock().unwrap();
                let blocks = offset / BLOCK..end.div_ceil(BLOCK);
                blocks.filter(|block| holes.contains(block) || block * BLOCK >= length).count() as u64 * BLOCK
            };
            if self.used() + new > limit {
                return Err(Errno::ENOSPC.into());
            }
        }
        self.done(Op::Write(offset, buf.to_vec()));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.now.lock().unwrap().0.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.done(Op::SetLen(len));
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        if !self.punches {
            return Ok(false);
        }
        self.done(Op::Punch(range));
        Ok(true)
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.limit.is_some() { Ok(self.used()) } else { self.len() }
    }

    fn room(&self) -> io::Result<Room> {
        let more = if self.secret { 1 << 40 } else { 0 };
        let available = |limit: u64| more + limit.saturating_sub(self.used());
        Ok(self.limit.map_or(Room::Unknown, |limit| Room::FileSystem { available: available(limit), copies: false }))
    }

    fn sync(&self) -> io::Result<()> {
        self.done(Op::Flush);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let (len, holes) = (self.len()?, self.holes.lock().unwrap());
        let mut blocks = successors(Some(offset), |at| Some((at / BLOCK + 1) * BLOCK)).take_while(|at| *at < len);
        let is_hole = |at: &u64| holes.contains(&(at / BLOCK));
        let Some(start) = blocks.find(|at| !is_hole(at)) else { return Ok(None) };
        Ok(Some(start..blocks.find(is_hole).unwrap_or(len)))
    }
}
