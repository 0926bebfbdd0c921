//! Memory whose size an image, a disk or an option decides: where there is none that is an error, not the end of the process. And
//! large I/O buffers, made once and used again.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use memmap2::{Advice, MmapMut};
use zerocopy::FromZeros;

use crate::error::{Error, ErrorKind, IoContext, Result};

/// `len` zeros. Of large ones only what is written to takes memory.
///
/// # Errors
/// Fails where the system has no memory left.
pub(crate) fn zeroed<T: FromZeros>(len: usize) -> Result<Vec<T>> {
    T::new_vec_zeroed(len).map_err(|_| no_memory::<T>(len))
}

/// Makes room for `more` entries, and for some that may follow.
///
/// # Errors
/// Fails where the system has no memory left.
pub(crate) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    list.try_reserve(more).map_err(|_| no_memory::<T>(list.len().saturating_add(more)))
}

/// Appends `entry`.
///
/// # Errors
/// Fails where the system has no memory left.
pub(crate) fn push<T>(list: &mut Vec<T>, entry: T) -> Result<()> {
    if list.len() == list.capacity() {
        reserve(list, 1)?;
    }
    list.push(entry);
    Ok(())
}

/// All that `entries` gives, whose number it knows.
///
/// # Errors
/// Fails where the system has no memory left.
pub(crate) fn collected<T>(entries: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, entries.len())?;
    list.extend(entries);
    Ok(list)
}

/// There is no memory for `len` entries.
pub(crate) fn no_memory<T>(len: usize) -> Error {
    let bytes = len.saturating_mul(size_of::<T>());
    Error::new(ErrorKind::Io, format!("Could not get {bytes} bytes of memory"))
}

/// A set of equal buffers. A worker takes one for a chunk of work and gives it back by dropping it.
///
/// The buffers are anonymous maps: page aligned, zeroed, faulted in once instead of at every chunk, and on huge pages where the
/// kernel has them.
#[derive(Debug)]
pub(crate) struct BufferPool {
    len: usize,
    free: Mutex<Vec<MmapMut>>,
}

impl BufferPool {
    /// A pool of buffers of `len` bytes.
    #[must_use]
    pub(crate) fn new(len: usize) -> Self {
        Self { len, free: Mutex::new(Vec::new()) }
    }

    /// A buffer with arbitrary content.
    ///
    /// # Errors
    /// Fails where the system has no memory left.
    pub(crate) fn take(&self) -> Result<Buffer<'_>> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let map = match free {
            Some(map) => map,
            None => {
                let map = MmapMut::map_anon(self.len).at("Could not get memory")?;
                // Advice only: kernels without transparent huge pages refuse it and nothing is lost.
                let _ = map.advise(Advice::HugePage);
                map
            }
        };
        Ok(Buffer { map: Some(map), pool: self })
    }
}

/// A buffer on loan from a [`BufferPool`].
#[derive(Debug)]
pub(crate) struct Buffer<'a> {
    map: Option<MmapMut>,
    pool: &'a BufferPool,
}

impl Deref for Buffer<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if let Some(map) = self.map.take() {
            self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(map);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        // More than an address space has.
        let huge = 1 << 58;
        let due = format!("Could not get {} bytes of memory", 1u64 << 61);
        assert_eq!(zeroed::<u64>(huge).unwrap_err().to_string(), due);
        assert_eq!(reserve(&mut Vec::<u64>::new(), huge).unwrap_err().to_string(), due);
        assert_eq!(collected((0..usize::MAX).map(|_| 0u64)).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(zeroed::<u64>(3).unwrap(), [0; 3]);
        assert_eq!(collected([1, 2].into_iter()).unwrap(), [1, 2]);
    }
}
