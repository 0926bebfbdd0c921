//! What of an image cannot be read, where that is no reason to fail.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::units::to_usize;

/// What is tried on its own where a larger read fails, in bytes.
pub(super) const SECTOR: u64 = 512;

/// A part of a source that could not be read, and for which zeros were taken.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unreadable {
    /// The source.
    pub path: PathBuf,
    /// Bytes of the disk that it holds.
    pub range: Range<u64>,
    /// Why its first sector could not be read.
    pub reason: String,
}

/// The unreadable parts of one image.
///
/// A disk is read in more than one pass, and a failing one may answer once and not again. All passes must see the same bytes: after
/// the first one the parts are settled, and what they hold stays zeros.
#[derive(Debug, Default)]
pub(super) struct Damage {
    /// Start, and end with reason; neighbours are one.
    parts: Mutex<BTreeMap<u64, (u64, String)>>,
    any: AtomicBool,
    settled: AtomicBool,
}

impl Damage {
    fn parts(&self) -> MutexGuard<'_, BTreeMap<u64, (u64, String)>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on no part is added.
    pub(super) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    /// Takes zeros for `range`, which could not be read because of `error`.
    ///
    /// # Errors
    /// `error`, where the parts are settled and this is none of them.
    pub(super) fn forgive(&self, range: Range<u64>, error: Error) -> Result<()> {
        let mut parts = self.parts();
        if self.settled.load(Ordering::Relaxed) {
            let known = parts.range(..=range.start).next_back().is_some_and(|(_, (end, _))| *end >= range.end);
            let words = "; it could be read before: --salvage with -O raw reads only once";
            return if known { Ok(()) } else { Err(error.ending(words)) };
        }
        let (mut start, mut end, mut reason) = (range.start, range.end, error.reason());
        if let Some((&before, (until, why))) = parts.range(..=start).next_back()
            && *until >= start
        {
            (start, end, reason) = (before, end.max(*until), why.clone());
        }
        while let Some((&next, (until, _))) = parts.range(start + 1..=end).next() {
            end = end.max(*until);
            parts.remove(&next);
        }
        parts.insert(start, (end, reason));
        self.any.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Zeros what of `buf`, read from `start`, is in one of the parts.
    pub(super) fn blank(&self, start: u64, buf: &mut [u8]) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let end = start + buf.len() as u64;
        let index = |at: u64| to_usize(at.clamp(start, end) - start);
        for (&from, (to, _)) in self.parts().range(..end).rev().take_while(|(_, (to, _))| *to > start) {
            if let Some(part) = buf.get_mut(index(from)..index(*to)) {
                part.fill(0);
            }
        }
    }

    /// The parts: range and reason, in order.
    pub(super) fn list(&self) -> Vec<(Range<u64>, String)> {
        self.parts().iter().map(|(&start, (end, reason))| (start..*end, reason.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_part_and_settled_parts_stay() {
        let damage = Damage::default();
        let forgive = |range| damage.forgive(range, Error::corrupt("gone"));
        for range in [1024..1536, 4096..4608, 512..1024, 1536..2048, 8192..8704] {
            forgive(range).unwrap();
        }
        let ranges = || damage.list().into_iter().map(|(range, _)| range).collect::<Vec<_>>();
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
}
