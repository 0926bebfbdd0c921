//! What of an image cannot be read, where that is no reason to fail.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::image::Lost;
use crate::units::{SECTOR, to_usize};

/// A part of a source that could not be read, and for which zeros were taken.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Unreadable {
    /// The source.
    pub path: PathBuf,
    /// Bytes of the disk that it holds.
    pub range: Range<u64>,
    /// Why its first sector could not be read.
    pub error: Error,
}

/// Parts that an image has no sense for and that are named one by one: damage of a table can make one of every cluster, which nobody
/// reads. Beyond that, those that lie near each other are one.
const MAX_SENSELESS: usize = 4096;

/// Parts of a disk, each with the reason why its first sector could not be read; neighbours are one.
#[derive(Debug, Default)]
struct Parts(BTreeMap<u64, (u64, Error)>);

impl Parts {
    fn insert(&mut self, Range { mut start, mut end }: Range<u64>, mut reason: Error) {
        if let Some((&before, (until, why))) = self.0.range(..=start).next_back()
            && *until >= start
        {
            (start, end, reason) = (before, end.max(*until), why.clone());
        }
        while let Some((&next, (until, _))) = self.0.range(start + 1..=end).next() {
            end = end.max(*until);
            self.0.remove(&next);
        }
        self.0.insert(start, (end, reason));
    }

    fn contains(&self, range: &Range<u64>) -> bool {
        self.0.range(..=range.start).next_back().is_some_and(|(_, (end, _))| *end >= range.end)
    }

    /// Makes one of those that lie in the same piece of `grain` bytes, a power of two.
    fn coarsen(&mut self, grain: u64) {
        for (start, (end, reason)) in std::mem::take(&mut self.0) {
            let end = end.checked_next_multiple_of(grain).unwrap_or(u64::MAX);
            self.insert(start & !(grain - 1)..end, reason);
        }
    }
}

/// The unreadable parts of one image.
///
/// A disk is read in more than one pass, and a failing one may answer once and not again. All passes must see the same bytes: after
/// the first one the parts are settled, and what they hold stays zeros. What an image has no sense for it has no sense for each time.
#[derive(Debug, Default)]
pub(super) struct Damage {
    /// What could not be read.
    failed: Mutex<Parts>,
    any_failed: AtomicBool,
    /// What leads to no data, and how coarse it is kept.
    senseless: Mutex<(Parts, u64)>,
    settled: AtomicBool,
}

impl Damage {
    /// What was `lost` already when the files were opened.
    pub(super) fn of<'a>(lost: impl Iterator<Item = &'a Lost>) -> Self {
        let damage = Self::default();
        lost.for_each(|lost| damage.name(lost.range.clone(), Error::corrupt(lost.reason.clone())));
        damage
    }

    /// From now on no part is added.
    pub(super) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Takes zeros for `range`, which could not be read because of `error`.
    ///
    /// # Errors
    /// `error`, where the parts are settled and this is none of them.
    pub(super) fn forgive(&self, range: Range<u64>, error: Error) -> Result<()> {
        match error.kind() {
            ErrorKind::Io => {
                let mut failed = lock(&self.failed);
                if !self.is_settled() {
                    failed.insert(range, error);
                    self.any_failed.store(true, Ordering::Relaxed);
                } else if !failed.contains(&range) {
                    return Err(error.ending("; it could be read before").advise(Advice::ReadOnce));
                }
                Ok(())
            }
            // A bug is none of the image's, and to be stopped is no damage.
            ErrorKind::Internal | ErrorKind::Cancelled => Err(error),
            _ if !self.is_settled() => {
                self.name(range, error);
                Ok(())
            }
            _ if lock(&self.senseless).0.contains(&range) => Ok(()),
            _ => Err(error.ending("; it could be read before: the image changed while it was read")),
        }
    }

    fn name(&self, range: Range<u64>, reason: Error) {
        let mut senseless = lock(&self.senseless);
        let (parts, grain) = &mut *senseless;
        let piece = (*grain).max(1);
        let end = range.end.checked_next_multiple_of(piece).unwrap_or(u64::MAX);
        parts.insert(range.start & !(piece - 1)..end, reason);
        while parts.0.len() > MAX_SENSELESS {
            *grain = (*grain).max(SECTOR) << 1;
            parts.coarsen(*grain);
        }
    }

    /// Zeros what of `buf`, read from `start`, is in a part that could not be read.
    pub(super) fn blank(&self, start: u64, buf: &mut [u8]) {
        if !self.any_failed.load(Ordering::Relaxed) {
            return;
        }
        let end = start + buf.len() as u64;
        let index = |at: u64| to_usize(at.clamp(start, end) - start);
        for (&from, (to, _)) in lock(&self.failed).0.range(..end).rev().take_while(|(_, (to, _))| *to > start) {
            if let Some(part) = buf.get_mut(index(from)..index(*to)) {
                part.fill(0);
            }
        }
    }

    /// The parts of a disk of `size` bytes: range and reason, in order.
    pub(super) fn list(&self, size: u64) -> Vec<(Range<u64>, Error)> {
        let (failed, senseless) = (lock(&self.failed), lock(&self.senseless));
        let parts = failed.0.iter().chain(&senseless.0.0);
        let range = |start: u64, end: u64| start..end.min(size);
        let mut list: Vec<_> = parts
            .map(|(&start, (end, reason))| (range(start, *end), reason.clone()))
            .filter(|part| !part.0.is_empty())
            .collect();
        list.sort_by_key(|(range, _)| (range.start, range.end));
        list
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_part_and_settled_parts_stay() {
        let damage = Damage::default();
        let forgive = |range| damage.forgive(range, Error::os(std::io::Error::from_raw_os_error(5)));
        for range in [1024..1536, 4096..4608, 512..1024, 1536..2048, 8192..8704] {
            forgive(range).unwrap();
        }
        let ranges = || damage.list(u64::MAX).into_iter().map(|(range, _)| range).collect::<Vec<_>>();
        assert_eq!(ranges(), [512..2048, 4096..4608, 8192..8704]);
        forgive(1024..5000).unwrap();
        assert_eq!(ranges(), [512..5000, 8192..8704]);
        damage.settle();
        forgive(600..700).unwrap();
        assert!(forgive(5000..5001).unwrap_err().to_string().contains("could be read before"));
        let mut buf = [1; 1024];
        damage.blank(4500, &mut buf);
        assert_eq!((buf[499], buf[500], buf[1023]), (0, 1, 1));
        let mut buf = [1; 1024];
        damage.blank(7680, &mut buf);
        assert_eq!((buf[511], buf[512], buf[1023]), (1, 0, 0));
    }

    #[test]
    fn what_has_no_sense_is_named_within_bounds_and_blanks_nothing() {
        let damage = Damage::default();
        for n in 0..100_000u64 {
            damage.forgive(n * 8192..n * 8192 + 4096, Error::corrupt("gone")).unwrap();
        }
        let list = damage.list(100_000 * 8192);
        assert!(list.len() <= MAX_SENSELESS, "{} parts", list.len());
        for n in 0..100_000u64 {
            let at = list.partition_point(|(range, _)| range.end <= n * 8192);
            assert!(list[at].0.start <= n * 8192 && list[at].0.end >= n * 8192 + 4096, "{n}");
        }
        let mut buf = [1; 512];
        damage.blank(0, &mut buf);
        assert_eq!(buf, [1; 512]);
        damage.settle();
        damage.forgive(8192..8192 + 4096, Error::corrupt("gone")).unwrap();
        assert!(damage.forgive(1 << 40..1 << 41, Error::corrupt("gone")).is_err());
        assert!(damage.forgive(0..4096, Error::internal("a bug")).is_err());
    }
}
