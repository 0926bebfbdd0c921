//! A storage in memory.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use super::Storage;
use crate::units::to_usize;

/// What is stored or a hole as a whole, in bytes.
const PAGE: u64 = 64 << 10;

/// A file in memory, which grows as it is written and has holes where nothing was.
///
/// ```
/// use dedup_img::storage::{Memory, Storage};
///
/// let memory = Memory::new();
/// memory.write_at(b"hello", 1 << 20)?;
/// assert_eq!(memory.len()?, (1 << 20) + 5);
/// assert!(memory.allocated()? < 1 << 20);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Memory(RwLock<Content>);

#[derive(Debug, Default)]
struct Content {
    len: u64,
    /// What is no hole, by its number. Behind `len` there are zeros.
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Memory {
    /// An empty file.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// The pieces of the `len` bytes from `offset` that lie in one page each: page, place in it, place in what is asked for.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let end = offset.saturating_add(len as u64);
    (offset / PAGE..end.div_ceil(PAGE)).map(move |page| {
        let (from, to) = (offset.max(page * PAGE), end.min((page + 1).saturating_mul(PAGE)));
        (page, to_usize(from - page * PAGE)..to_usize(to - page * PAGE), to_usize(from - offset)..to_usize(to - offset))
    })
}

impl Content {
    fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let len = to_usize(self.len.saturating_sub(offset)).min(buf.len());
        for (page, from, to) in pieces(offset, len) {
            let Some(to) = buf.get_mut(to) else { continue };
            match self.pages.get(&page).and_then(|page| page.get(from)) {
                Some(bytes) => to.copy_from_slice(bytes),
                None => to.fill(0),
            }
        }
        len
    }

    fn write(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or(io::ErrorKind::FileTooLarge)?;
        for (page, to, from) in pieces(offset, buf.len()) {
            let page = self.pages.entry(page).or_insert_with(|| vec![0; to_usize(PAGE)].into());
            if let (Some(to), Some(from)) = (page.get_mut(to), buf.get(from)) {
                to.copy_from_slice(from);
            }
        }
        self.len = self.len.max(end);
        Ok(())
    }

    /// Makes zeros of `range`, and holes of the pages that lie in it.
    fn clear(&mut self, range: Range<u64>) {
        let (first, last) = (range.start / PAGE, range.end.div_ceil(PAGE));
        let touched: Vec<u64> = self.pages.range(first..last.max(first)).map(|(&page, _)| page).collect();
        for page in touched {
            let (start, end) = (page * PAGE, (page + 1) * PAGE);
            if range.start <= start && end <= range.end {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page)
                && let Some(part) =
                    bytes.get_mut(to_usize(range.start.max(start) - start)..to_usize(range.end.min(end) - start))
            {
                part.fill(0);
            }
        }
    }

    fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let mut pages = self.pages.range(offset / PAGE..).map(|(&page, _)| page);
        let first = pages.next()?;
        let run = pages.zip(first + 1..).take_while(|(page, next)| page == next).count() as u64;
        let data = offset.max(first * PAGE)..((first + 1 + run) * PAGE).min(self.len);
        (!data.is_empty()).then_some(data)
    }
}

impl Memory {
    fn content(&self) -> impl std::ops::Deref<Target = Content> + '_ {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn content_mut(&self) -> impl std::ops::DerefMut<Target = Content> + '_ {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.content().read(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.content_mut().write(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if i64::try_from(len).is_err() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut content = self.content_mut();
        let end = content.len.next_multiple_of(PAGE);
        content.clear(len..end);
        content.len = len;
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        self.content_mut().clear(range);
        Ok(true)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.content().pages.len() as u64 * PAGE)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.content().next_data(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_has_holes_and_is_cut() {
        let memory = Memory::new();
        memory.write_at(&[7; 100], PAGE - 50).unwrap();
        memory.write_at(&[8; 10], 5 * PAGE).unwrap();
        assert_eq!(memory.len().unwrap(), 5 * PAGE + 10);
        assert_eq!(memory.allocated().unwrap(), 3 * PAGE);
        assert_eq!(memory.next_data(10).unwrap(), Some(10..2 * PAGE));
        assert_eq!(memory.next_data(2 * PAGE).unwrap(), Some(5 * PAGE..5 * PAGE + 10));
        assert_eq!(memory.next_data(5 * PAGE + 10).unwrap(), None);
        let mut buf = [1; 200];
        assert_eq!(memory.read_at(&mut buf, PAGE - 100).unwrap(), 200);
        assert!(buf[..50] == [0; 50] && buf[50..150] == [7; 100] && buf[150..] == [0; 50]);
        assert_eq!(memory.read_at(&mut buf, 5 * PAGE + 4).unwrap(), 6);
        assert!(memory.punch(PAGE..2 * PAGE).unwrap());
        assert_eq!(memory.next_data(PAGE - 1).unwrap(), Some(PAGE - 1..PAGE));
        memory.set_len(PAGE - 20).unwrap();
        memory.set_len(2 * PAGE).unwrap();
        assert_eq!(memory.read_at(&mut buf, PAGE - 100).unwrap(), 200);
        assert!(buf[50..80] == [7; 30] && buf[80..] == [0; 120]);
        assert!(memory.write_at(&[1], u64::MAX).is_err() && memory.set_len(1 << 63).is_err());
    }
}
