//! Writing in place so that holes of the file stay holes.

use std::ops::Range;

use super::{BLOCK, Storage, read_padded, write};
use crate::digest::is_zero;
use crate::error::{Context, IoContext, OrInternal, Result, Table};
use crate::units::{SECTOR, to_usize};

/// Writes `bytes` at `offset`, a place that nothing uses. Whole blocks of zeros are not stored: where the place has something else, it
/// is made a hole, and zeros are written where that cannot be.
///
/// The bytes decide, here and in the file, not what the file system says of its holes: it may be wrong, and may know less.
pub(crate) fn write_sparse(storage: &dyn Storage, bytes: &[u8], offset: u64) -> Result<()> {
    let is_gap = |block: &Range<usize>| block.len() as u64 == BLOCK && bytes.get(block.clone()).is_some_and(is_zero);
    for (run, gap) in runs(0..bytes.len(), offset, BLOCK, is_gap) {
        let at = offset + run.start as u64;
        let piece = bytes.get(run).or_internal("a part of a buffer that it does not have")?;
        if gap { clear(storage, at..at + piece.len() as u64)? } else { write(storage, piece, at)? }
    }
    Ok(())
}

/// Writes the blocks in which `new` differs from `old`, which is what the file has at `offset`, without sectors of zeros that stay so:
/// what is a hole stays one, however small the blocks of the file system are, and what is none needs no room.
pub(crate) fn rewrite(storage: &dyn Storage, old: &[u8], new: &[u8], offset: u64) -> Result<()> {
    let is_same = |part: &Range<usize>| old.get(part.clone()) == new.get(part.clone());
    for (blocks, _) in runs(0..new.len(), offset, BLOCK, is_same).into_iter().filter(|(_, same)| !same) {
        let stays_zero = |part: &Range<usize>| is_same(part) && new.get(part.clone()).is_some_and(is_zero);
        for (run, _) in runs(blocks, offset, SECTOR, stays_zero).into_iter().filter(|(_, zero)| !zero) {
            let piece = new.get(run.clone()).or_internal("a part of a table that it does not have")?;
            write(storage, piece, offset + run.start as u64)?;
        }
    }
    Ok(())
}

/// Makes `range` read as zeros, with a hole if need be and possible.
fn clear(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    let mut buffer = vec![0; to_usize(range.end - range.start)];
    let mut is_clear = || -> Result<bool> {
        read_padded(storage, &mut buffer, range.start).reading(Table::Data, range.start)?;
        Ok(is_zero(&buffer))
    };
    if is_clear()? {
        return Ok(());
    }
    // A device gives back whole blocks of its own only, and keeps the rest.
    let punched = storage.punch(range.clone());
    if punched.at(format_args!("Could not make a hole at {:#x}", range.start))? && is_clear()? {
        return Ok(());
    }
    buffer.fill(0);
    write(storage, &buffer, range.start)
}

/// `part` of the bytes that lie at `offset`, as runs of pieces of the file of which `left_out` says the same, with what it says.
fn runs(
    part: Range<usize>,
    offset: u64,
    piece: u64,
    left_out: impl Fn(&Range<usize>) -> bool,
) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut start = part.start;
    while start < part.end {
        let to_next = to_usize(piece - (offset + start as u64) % piece);
        let block = start..part.end.min(start + to_next);
        start = block.end;
        let out = left_out(&block);
        match runs.last_mut() {
            Some((run, same)) if *same == out => run.end = block.end,
            _ => runs.push((block, out)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::FileStorage;

    const LEN: usize = 4096;

    /// A file with sevens from block 2 to block 6, and a hole behind.
    fn file() -> FileStorage {
        let storage = FileStorage::new(tempfile::tempfile().unwrap());
        storage.set_len(16 * BLOCK).unwrap();
        storage.write_at(&[7; 4 * LEN], 2 * BLOCK).unwrap();
        storage
    }

    fn content(storage: &FileStorage) -> Vec<u8> {
        let mut all = vec![1; 16 * LEN];
        read_padded(storage, &mut all, 0).unwrap();
        all
    }

    #[test]
    fn zeros_become_holes_whatever_was_there_and_every_byte_is_right() {
        for at in [0, 512, 4096, 5000, 4 * LEN] {
            let storage = file();
            let mut bytes = vec![0; 6 * LEN + 300];
            bytes[9000] = 9;
            *bytes.last_mut().unwrap() = 8;
            let mut expected = content(&storage);
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
            write_sparse(&storage, &bytes, at as u64).unwrap();
            assert!(content(&storage) == expected, "{at}");
            let zeros = expected.chunks(LEN).filter(|block| is_zero(block)).count() as u64;
            // What lies in a block that was not written as a whole is data.
            assert!(storage.allocated().unwrap() <= (16 - zeros + 2) * BLOCK, "{at}: {zeros}");
        }
    }

    #[test]
    fn only_blocks_that_change_are_written() {
        let storage = file();
        let old = content(&storage);
        let mut new = old.clone();
        new[9 * LEN + 5] = 1;
        rewrite(&storage, &old, &new, 0).unwrap();
        assert!(content(&storage) == new);
        assert_eq!(storage.allocated().unwrap(), 5 * BLOCK);
        let part = &new[100..12_000];
        let mut changed = part.to_vec();
        changed[11_000] = 3;
        rewrite(&storage, part, &changed, 100).unwrap();
        new[11_100] = 3;
        assert!(content(&storage) == new);
    }
}
