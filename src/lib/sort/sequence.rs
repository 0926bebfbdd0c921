//! Sequences of records that are longer than memory may be: words of 128 bits, in memory and in temporary files.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::slice::ParallelSliceMut;
use zerocopy::IntoBytes;

use crate::error::{Error, OrInternal, Result};
use crate::name::shown;
use crate::sort::record::Record;
use crate::storage::buffer::{push, reserve};
use crate::storage::target::TEMPORARY;
use crate::units::to_usize;

const WORD: u64 = size_of::<u128>() as u64;

/// How much memory one sequence may take, and where it goes beyond that.
#[derive(Debug, Clone)]
pub struct Spill {
    words: usize,
    directory: PathBuf,
    /// Whether files go elsewhere where the directory takes none.
    elsewhere: bool,
}

impl Spill {
    /// Sequences of up to `bytes` bytes stay in memory; longer ones go to unnamed files in `directory`.
    #[must_use]
    pub fn new(bytes: u64, directory: &Path) -> Self {
        let words = to_usize(bytes / WORD).max(1024);
        Self { words, directory: directory.to_owned(), elsewhere: true }
    }

    /// How many words stay in memory.
    #[must_use]
    pub fn words(&self) -> usize {
        self.words
    }

    /// The same with a fraction of the memory.
    #[must_use]
    pub fn share(&self, of: usize) -> Self {
        Self { words: (self.words / of).max(1024), ..self.clone() }
    }

    /// The same, and files go to that directory or nowhere: somebody has named it for them.
    #[must_use]
    pub fn only_there(self) -> Self {
        Self { elsewhere: false, ..self }
    }

    /// An unnamed temporary file; elsewhere where the directory takes none, unless it was named for them: an image may lie where
    /// nothing else may.
    pub(crate) fn file(&self) -> Result<File> {
        use io::ErrorKind::{
            NotADirectory, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
        };
        tempfile::tempfile_in(&self.directory).or_else(|e| match e.kind() {
            NotADirectory | NotFound | PermissionDenied | ReadOnlyFilesystem | StorageFull | QuotaExceeded => {
                self.elsewhere().ok_or_else(|| self.error(e))
            }
            _ => Err(self.error(e)),
        })
    }

    /// A temporary file where the system has its own. A directory that is full holds an image that is to become smaller.
    fn elsewhere(&self) -> Option<File> {
        self.elsewhere.then(|| tempfile::tempfile_in(TEMPORARY).ok()).flatten()
    }

    pub(crate) fn error(&self, source: io::Error) -> Error {
        Error::io(format_args!("Could not use a temporary file in '{}'", shown(&self.directory)), source)
    }
}

/// A file of words without a name.
struct SpillFile {
    file: File,
    words: u64,
}

impl SpillFile {
    fn append(&mut self, words: &[u128]) -> io::Result<Range<u64>> {
        self.file.write_all_at(words.as_bytes(), self.words * WORD)?;
        let start = self.words;
        self.words += words.len() as u64;
        Ok(start..self.words)
    }

    /// Puts the words into another file.
    fn move_to(&mut self, to: File) -> io::Result<()> {
        let mut piece = vec![0; 1 << 20];
        let (mut at, end) = (0, self.words * WORD);
        while at < end {
            let len = to_usize(end - at).min(piece.len());
            let (piece, _) = piece.split_at_mut(len);
            self.file.read_exact_at(piece, at)?;
            to.write_all_at(piece, at)?;
            at += len as u64;
        }
        self.file = to;
        Ok(())
    }
}

/// The memory of a sequence and the file behind it.
struct Store {
    memory: Vec<u128>,
    file: Option<SpillFile>,
    spill: Spill,
}

impl Store {
    fn new(spill: &Spill) -> Self {
        Self { memory: Vec::new(), file: None, spill: spill.clone() }
    }

    fn len(&self) -> u64 {
        self.file.as_ref().map_or(0, |file| file.words) + self.memory.len() as u64
    }

    fn is_full(&self) -> bool {
        self.memory.len() >= self.spill.words
    }

    /// Moves the words in memory to the file; returns where they are in it.
    fn flush(&mut self) -> Result<Range<u64>> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(SpillFile { file: self.spill.file()?, words: 0 }),
        };
        let range = match file.append(&self.memory) {
            Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                match self.spill.elsewhere() {
                    Some(to) => file.move_to(to).and_then(|()| file.append(&self.memory)).map_err(|_| e),
                    None => Err(e),
                }
            }
            appended => appended,
        };
        let range = range.map_err(|e| self.spill.error(e))?;
        self.memory.clear();
        Ok(range)
    }
}

/// Records in the order in which they came.
pub struct Sequence<T> {
    store: Store,
    of: PhantomData<T>,
}

impl<T: Record> Sequence<T> {
    /// An empty sequence.
    #[must_use]
    pub fn new(spill: &Spill) -> Self {
        Self { store: Store::new(spill), of: PhantomData }
    }

    /// Appends a record.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub fn push(&mut self, record: T) -> Result<()> {
        if self.store.is_full() {
            self.store.flush()?;
        }
        push(&mut self.store.memory, record.pack())
    }

    /// Appends many records.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub fn extend(&mut self, records: &[T]) -> Result<()> {
        if self.store.memory.len() + records.len() > self.store.spill.words {
            self.store.flush()?;
        }
        reserve(&mut self.store.memory, records.len())?;
        self.store.memory.extend(records.iter().map(|record| record.pack()));
        Ok(())
    }

    /// Moves what is in memory to the file, unless it is little: for records that are not asked for soon.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub fn shelve(&mut self) -> Result<()> {
        if self.store.memory.len() > self.store.spill.words / 4 {
            self.store.flush()?;
            self.store.memory = Vec::new();
        }
        Ok(())
    }

    /// The number of records.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.store.len()
    }

    /// Whether there is no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The records in order, any number of times.
    #[must_use]
    pub fn iter(&self) -> Words<'_, T> {
        let file = self.store.file.as_ref().map(|f| Run::new(f, 0..f.words, 1 << 12, &self.store.spill));
        Words { inner: Inner::Sequence(file, self.store.memory.iter()), of: PhantomData }
    }

    /// The records sorted; what is in memory is sorted where it is.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub fn into_sorted(self) -> Result<Sorted<T>> {
        if self.store.file.is_none() {
            return Sorter { store: self.store, runs: Vec::new(), of: PhantomData }.finish();
        }
        let mut sorter = Sorter::new(&self.store.spill);
        for record in self.iter() {
            sorter.push(record?)?;
        }
        sorter.finish()
    }
}

/// Takes records in any order.
pub(crate) struct Sorter<T> {
    store: Store,
    /// Sorted runs in the file.
    runs: Vec<Range<u64>>,
    of: PhantomData<T>,
}

impl<T: Record> Sorter<T> {
    /// An empty sorter.
    #[must_use]
    pub(crate) fn new(spill: &Spill) -> Self {
        Self { store: Store::new(spill), runs: Vec::new(), of: PhantomData }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub(crate) fn push(&mut self, record: T) -> Result<()> {
        if self.store.is_full() {
            self.flush()?;
        }
        push(&mut self.store.memory, record.pack())
    }

    fn flush(&mut self) -> Result<()> {
        self.store.memory.par_sort_unstable();
        self.runs.push(self.store.flush()?);
        Ok(())
    }

    /// The records in ascending order.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub(crate) fn finish(mut self) -> Result<Sorted<T>> {
        self.store.memory.par_sort_unstable();
        // More runs than have room for a buffer are merged to fewer first.
        while self.runs.len() > self.fan() {
            self.merge_runs()?;
        }
        Ok(Sorted(self))
    }

    /// How many runs may be read at the same time: their buffers share an eighth of the memory of one sequence.
    fn fan(&self) -> usize {
        (self.store.spill.words / 8 / MIN_BUFFER).max(16)
    }

    /// Merges groups of runs into a new file.
    fn merge_runs(&mut self) -> Result<()> {
        let old = self.store.file.take().or_internal("runs of a file that is not there")?;
        let mut merged = Store::new(&self.store.spill.share(4));
        let mut runs = Vec::new();
        for group in self.runs.chunks(self.fan()) {
            let sources = group.iter().map(|range| Run::new(&old, range.clone(), MIN_BUFFER, &self.store.spill));
            let mut merge = Merge::new(sources.collect(), &[]);
            let mut run: Option<Range<u64>> = None;
            while let Some(word) = merge.next() {
                push(&mut merged.memory, word?)?;
                if merged.is_full() {
                    run = Some(joined(run, merged.flush()?));
                }
            }
            runs.push(joined(run, merged.flush()?));
        }
        self.store.file = merged.file;
        self.runs = runs;
        Ok(())
    }
}

/// The least number of words that a run is read by.
const MIN_BUFFER: usize = 256;

/// Two neighbouring pieces of a file as one.
fn joined(first: Option<Range<u64>>, second: Range<u64>) -> Range<u64> {
    first.map_or(second.start, |first| first.start)..second.end
}

/// Records in ascending order.
pub struct Sorted<T>(Sorter<T>);

impl<T: Record> Sorted<T> {
    /// The number of records.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.store.len()
    }

    /// Whether there is no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The records in ascending order, any number of times.
    #[must_use]
    pub fn iter(&self) -> Words<'_, T> {
        Words { inner: self.words(), of: PhantomData }
    }

    fn words(&self) -> Inner<'_> {
        let Sorter { store, runs, .. } = &self.0;
        let Some(file) = &store.file else {
            return Inner::Sequence(None, store.memory.iter());
        };
        // The runs share an eighth of the memory that one sequence may take, within reason.
        let buffer = (store.spill.words / 8 / runs.len().max(1)).clamp(MIN_BUFFER, 1 << 16);
        let runs = runs.iter().map(|range| Run::new(file, range.clone(), buffer, &store.spill)).collect();
        Inner::Merge(Box::new(Merge::new(runs, &store.memory)))
    }
}

/// Reads a range of words of a file through a buffer.
struct Run<'a> {
    file: &'a SpillFile,
    rest: Range<u64>,
    buffer: Vec<u128>,
    at: usize,
    capacity: usize,
    spill: &'a Spill,
}

impl<'a> Run<'a> {
    fn new(file: &'a SpillFile, range: Range<u64>, capacity: usize, spill: &'a Spill) -> Self {
        Self { file, rest: range, buffer: Vec::new(), at: 0, capacity, spill }
    }

    fn next(&mut self) -> Option<Result<u128>> {
        if self.at == self.buffer.len() {
            let words = to_usize(self.rest.end - self.rest.start).min(self.capacity);
            if words == 0 {
                return None;
            }
            let missing = words.saturating_sub(self.buffer.len());
            if let Err(e) = reserve(&mut self.buffer, missing) {
                return Some(Err(e));
            }
            self.buffer.resize(words, 0);
            if let Err(e) = self.file.file.read_exact_at(self.buffer.as_mut_bytes(), self.rest.start * WORD) {
                self.rest.start = self.rest.end;
                return Some(Err(self.spill.error(e)));
            }
            self.rest.start += words as u64;
            self.at = 0;
        }
        let word = self.buffer.get(self.at).copied();
        self.at += 1;
        word.map(Ok)
    }
}

/// Merges sorted runs and a sorted slice.
struct Merge<'a> {
    runs: Vec<Run<'a>>,
    memory: std::slice::Iter<'a, u128>,
    /// The next word of each source; the slice is source `runs.len()`.
    heads: BinaryHeap<Reverse<(u128, usize)>>,
    failed: Option<Error>,
}

impl<'a> Merge<'a> {
    fn new(runs: Vec<Run<'a>>, memory: &'a [u128]) -> Self {
        let sources = runs.len() + 1;
        let mut merge = Self { runs, memory: memory.iter(), heads: BinaryHeap::new(), failed: None };
        for source in 0..sources {
            merge.refill(source);
        }
        merge
    }

    fn refill(&mut self, source: usize) {
        let word = match self.runs.get_mut(source) {
            Some(run) => run.next(),
            None => self.memory.next().copied().map(Ok),
        };
        match word {
            Some(Ok(word)) => self.heads.push(Reverse((word, source))),
            Some(Err(error)) => self.failed = Some(error),
            None => {}
        }
    }

    fn next(&mut self) -> Option<Result<u128>> {
        if let Some(error) = self.failed.take() {
            self.heads.clear();
            return Some(Err(error));
        }
        let Reverse((word, source)) = self.heads.pop()?;
        self.refill(source);
        Some(Ok(word))
    }
}

/// Iterates over the records of a [`Sequence`] or [`Sorted`].
pub struct Words<'a, T> {
    inner: Inner<'a>,
    of: PhantomData<T>,
}

enum Inner<'a> {
    Sequence(Option<Run<'a>>, std::slice::Iter<'a, u128>),
    Merge(Box<Merge<'a>>),
}

impl Inner<'_> {
    fn next(&mut self) -> Option<Result<u128>> {
        match self {
            Self::Sequence(file, memory) => {
                if let Some(run) = file {
                    if let Some(word) = run.next() {
                        return Some(word);
                    }
                    *file = None;
                }
                memory.next().copied().map(Ok)
            }
            Self::Merge(merge) => merge.next(),
        }
    }
}

impl<T: Record> Iterator for Words<'_, T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        self.inner.next().map(|word| word.map(T::unpack))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: u64) -> impl Iterator<Item = [u8; 16]> {
        (0..count).map(|n| u128::from(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_be_bytes())
    }

    #[test]
    fn spilled_words_come_back_as_if_they_had_stayed() {
        let directory = tempfile::tempdir().unwrap();
        let small = Spill::new(0, directory.path());
        for count in [0, 1, 1023, 1024, 1025, 10_000, 100_000] {
            let mut sequence = Sequence::new(&small);
            let mut sorter = Sorter::new(&small);
            for word in numbers(count) {
                sequence.push(word).unwrap();
                sorter.push(word).unwrap();
            }
            assert_eq!(sequence.len(), count);
            let mut expected: Vec<[u8; 16]> = numbers(count).collect();
            assert_eq!(sequence.iter().collect::<Result<Vec<_>>>().unwrap(), expected);
            expected.sort_unstable();
            let sorted = sorter.finish().unwrap();
            for _ in 0..2 {
                assert_eq!(sorted.iter().collect::<Result<Vec<_>>>().unwrap(), expected);
            }
            assert_eq!(sequence.into_sorted().unwrap().iter().collect::<Result<Vec<_>>>().unwrap(), expected);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        // An image may lie where nothing else can: behind a descriptor, or in a directory that takes no files.
        for directory in ["/proc/self/fd", "/none"] {
            Spill::new(0, Path::new(directory)).file().unwrap();
        }
    }
}
