//! Large I/O buffers, made once and used again.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use memmap2::{Advice, MmapMut};

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
    pub(crate) fn take(&self) -> io::Result<Buffer<'_>> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let map = match free {
            Some(map) => map,
            None => {
                let map = MmapMut::map_anon(self.len)?;
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
