//! A file that is written where it lies, because its name cannot be given to another one.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::head::Head;
use super::{FileStorage, Storage, drop_cache};
use crate::error::{Doing, Error, Result};

/// A regular file with an old content that is lost at [`InPlaceFile::begin`]. From there until [`InPlaceFile::commit`] it holds nothing
/// that anybody takes for a disk.
#[derive(Debug)]
pub(crate) struct InPlaceFile {
    file: FileStorage,
    path: PathBuf,
    begun: AtomicBool,
    /// Bytes of the new content.
    length: AtomicU64,
    head: Head,
}

impl InPlaceFile {
    /// Takes `file`, which is open for reading and writing and locked. Nothing changes yet.
    pub(super) fn new(file: File, path: &Path) -> Self {
        Self {
            file: FileStorage::new(file),
            path: path.to_owned(),
            begun: AtomicBool::new(false),
            length: AtomicU64::new(0),
            head: Head::new(),
        }
    }

    /// Empties the file.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn begin(&self) -> Result<()> {
        let length = self.length.load(Ordering::Relaxed);
        let emptied = self.file.set_len(0).and_then(|()| self.file.sync()).and_then(|()| self.file.set_len(length));
        emptied.map_err(|e| self.writing(e))?;
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes the first bytes, and returns how many the file occupies. With `durable` all else is on the disk before.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn commit(self, durable: bool) -> Result<u64> {
        if !self.begun.load(Ordering::Acquire) {
            // A disk of no length.
            self.begin()?;
        }
        let length = self.length.load(Ordering::Relaxed);
        let write = || {
            self.file.set_len(length)?;
            self.head.put(&self.file, length, durable)?;
            self.file.allocated()
        };
        write().map_err(|e| self.writing(e))
    }

    /// Writes the content to the disk and takes it out of the host's page cache.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn uncache(&self) -> Result<()> {
        self.file.sync().map_err(|e| self.writing(e))?;
        drop_cache(self.file.file());
        Ok(())
    }

    fn writing(&self, source: io::Error) -> Error {
        Error::os(source).doing(Doing::WritingFile(self.path.clone()))
    }

    fn ensure_begun(&self) -> io::Result<()> {
        match self.begun.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(io::Error::other(Error::internal("a file is used that still has its old content"))),
        }
    }
}

impl Storage for InPlaceFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.ensure_begun()?;
        self.head.read_at(&self.file, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.ensure_begun()?;
        self.length.fetch_max(offset + buf.len() as u64, Ordering::Relaxed);
        self.head.write_at(&self.file, buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.length.load(Ordering::Relaxed))
    }

    /// Before the beginning the length is only noted.
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.length.store(len, Ordering::Relaxed);
        if self.begun.load(Ordering::Acquire) { self.file.set_len(len) } else { Ok(()) }
    }

    fn punch(&self, range: Range<u64>) -> io::Result<bool> {
        self.ensure_begun()?;
        self.head.clear(range.start, range.end);
        self.file.punch(range)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// The first bytes are not in the file yet.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let head = Head::LENGTH.min(self.length.load(Ordering::Relaxed));
        match offset < head {
            true => Ok(Some(offset..head)),
            false => self.file.next_data(offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const HEAD: usize = 512;

    fn opened(old: &[u8]) -> (tempfile::TempPath, InPlaceFile) {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        fs::write(&path, old).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let file = InPlaceFile::new(file, &path);
        (path, file)
    }

    #[test]
    fn the_old_content_stays_until_the_beginning_and_the_head_comes_last() {
        let (path, file) = opened(&[7; 3000]);
        file.set_len(2000).unwrap();
        assert!(file.write_at(b"early", 0).is_err());
        assert_eq!(fs::read(&path).unwrap(), [7; 3000]);
        file.begin().unwrap();
        file.write_at(&[1; 2000], 0).unwrap();
        let found = fs::read(&path).unwrap();
        assert!(found.len() == 2000 && found[..HEAD] == [0; HEAD] && found[HEAD..] == [1; 2000 - HEAD]);
        let mut buf = [0; 1000];
        assert_eq!(file.read_at(&mut buf, 10).unwrap(), 1000);
        assert_eq!((buf, file.next_data(3).unwrap()), ([1; 1000], Some(3..512)));
        file.commit(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [1; 2000]);
    }

    #[test]
    fn a_content_of_less_than_the_head_has_its_length() {
        for content in [&b""[..], b"short"] {
            let (path, file) = opened(b"something longer");
            if !content.is_empty() {
                file.begin().unwrap();
                file.write_at(content, 0).unwrap();
            }
            file.commit(false).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }
}
