//! Moving clusters from the end of the file into holes, and cutting the file.
//!
//! Its steps are those marked `c` in [`crate::edit`].
//!
//! Nothing is written over anything that is in use, so no second copy of the file is needed: a pass fills the holes that there
//! are, and what it frees is the end of the file. Where the file system has no room for all that a pass moves, the moves of that pass
//! are done in parts, one after the other: where things end up is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::check::{ALONE, Inspection};
use crate::edit::change::{Change, NewPool};
use crate::edit::marks::set_dirty;
use crate::edit::mend::{Mender, Pass};
use crate::edit::pointers::{Container, containers, header_fields};
use crate::edit::renew;
use crate::edit::settle::{Punch, UNSETTLED, settle};
use crate::error::{Context, Error, ErrorKind, IoContext, Result, Table};
use crate::format::header::Header;
use crate::image::refcounts::{Block, Refcounts};
use crate::inplace::gc::moves::{Moves, plan};
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::latch::Latch;
use crate::storage::sparse::{rewrite, write_sparse};
use crate::storage::{BLOCK, Storage, flush, read_padded, write};
use crate::survey::tables::L2Tables;
use crate::survey::{Ground, sound};
use crate::units::{ClusterBits, to_usize};
use crate::work::Work;

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;
/// More passes than any image has needed beside those that only move the rest of many clusters.
const MOST_PASSES: u64 = 64;
/// Parts of a pass, where there is no room for all of it at once.
const MOST_PARTS: u64 = 64;
/// Said where the file is compact and the pool is not in order.
const UNORDERED: &str =
    "the file is compact, but there is no room to put its pool in order; give it some and run gc again";

/// Moves what lies behind the end that the file could have, and cuts the file; returns how many clusters moved.
pub(super) fn compact(storage: &dyn Storage, spill: &Spill, work: &Work) -> Result<u64> {
    let storage = &Latch::new(storage);
    let mut moved = fill_holes(storage, work)?;
    // What comes again with every pass is within the one phase that is shown.
    let quiet = &work.silent();
    let inspection = sound(storage, ALONE, quiet, |_| {})?;
    if inspection.pool.as_ref().is_some_and(|pool| !pool.ascending && pool.records.is_some()) {
        // Members that moved are out of order. A new pool takes new places, which may be at the end again.
        let ground = Ground::new(storage, inspection)?;
        let after = ground.members.bits().filtered(|_| true);
        let mut change = Change::of_pool(ground, NewPool::of(after, Sequence::new(spill)));
        renew::apply(&mut change, storage, Punch::Freed, spill, quiet).map_err(|e| match e.kind() {
            ErrorKind::NoRoom { .. } => Error::new(ErrorKind::Limit, UNORDERED),
            _ => e,
        })?;
        moved += fill_holes(storage, work)?;
    }
    Ok(moved)
}

/// Moves and cuts until there is nothing to move.
fn fill_holes(storage: &dyn Storage, work: &Work) -> Result<u64> {
    let quiet = &work.silent();
    let mut inspection = sound(storage, ALONE, quiet, |_| {})?;
    let mut moved = 0;
    let most = most_at_once(&inspection);
    for _ in 0..MOST_PASSES + inspection.counts.clusters() / most as u64 {
        work.cancel.check()?;
        let file_len = inspection.file_len;
        let rounds = rounds(storage, &Refcounts::load(storage, &inspection.header)?, &inspection)?;
        if !rounds.is_empty() {
            let done = drop_blocks(storage, &inspection.header, rounds);
            inspection = settled(done, storage, file_len, quiet)?;
        }
        let Some(mut moves) = plan(storage, &inspection, most)? else { break };
        moved += moves.len();
        let least = least(moves.room(storage)?, inspection.header.cluster_bits);
        while let Some(part) = moves.take_part(storage, &inspection, least)? {
            let done = apply(storage, &mut inspection, &part, work);
            inspection = settled(done, storage, file_len, quiet)?;
        }
    }
    cut(storage, &inspection)?;
    Ok(moved)
}

/// Settles, whatever came of what was done; says so where the image is not clean then.
fn settled(done: Result<()>, storage: &dyn Storage, file_len: u64, work: &Work) -> Result<Inspection> {
    match (done, settle(storage, file_len, Punch::Freed, work)) {
        (Ok(()), settled) => settled.map_err(|e| e.advise(UNSETTLED)),
        (Err(error), Ok(_)) => Err(error),
        (Err(error), Err(_)) => Err(error.advise(UNSETTLED)),
    }
}

/// The number of clusters of a file in which `used` clusters are in use, once it is compact: refcount blocks that count nothing
/// then are not needed.
pub(super) fn target(storage: &dyn Storage, header: &Header, used: u64) -> Result<u64> {
    let refcounts = Refcounts::load(storage, header)?;
    let indices = 0..refcounts.entries().len() as u64;
    let blocks = indices.filter(|&index| matches!(refcounts.block(index), Block::At(_))).count() as u64;
    Ok(header.refcount_bits.with_blocks(header.cluster_bits, used.saturating_sub(blocks)))
}

/// Steps 1 to 9.
fn apply(storage: &dyn Storage, inspection: &mut Inspection, moves: &Moves, work: &Work) -> Result<()> {
    let header = set_dirty(storage, &inspection.header)?;
    let bits = header.cluster_bits;
    moves.count(bits, &mut inspection.counts)?;
    let mender = Mender::new(storage, &header, &inspection.counts);
    mender.refcounts(&Refcounts::load(storage, &header)?, Pass::Raise)?;

    copy(storage, &header, moves, work)?;
    let tables = L2Tables::all(storage, &header, &inspection.tables);
    let others = containers(storage, inspection)?;
    point(storage, &header, &tables, &others, moves, true)?;
    flush(storage)?;
    point(storage, &header, &tables, &others, moves, false)?;
    flush(storage)?;
    let fields = header_fields(storage, &header, |at| moves.offset(at))?;
    for (bytes, at) in &fields {
        write(storage, bytes, *at)?;
    }
    if fields.is_empty() { Ok(()) } else { flush(storage) }
}

/// Copies the clusters that move, and the compressed data. What of them is a hole stays one.
fn copy(storage: &dyn Storage, header: &Header, moves: &Moves, work: &Work) -> Result<()> {
    let bits = header.cluster_bits;
    let runs = moves.runs((PIECE >> bits.bits()).max(1));
    for batch in runs.chunks(work.batch()) {
        let copied: Vec<Result<()>> = batch
            .par_iter()
            .map(|(from, to, count)| {
                let mut buffer = vec![0; to_usize(count << bits.bits())];
                let at = from << bits.bits();
                read_padded(storage, &mut buffer, at).reading(Table::Data, at)?;
                write_sparse(storage, &buffer, to << bits.bits())
            })
            .collect();
        copied.into_iter().collect::<Result<()>>()?;
        work.progress.advance(batch.iter().map(|(_, _, count)| count << bits.bits()).sum());
    }
    moves.copy_packed(storage)
}

/// Points what refers to things that move at their new places: in the copies of what moves itself, or in what stays.
fn point(
    storage: &dyn Storage,
    header: &Header,
    tables: &L2Tables<'_>,
    others: &[Container],
    moves: &Moves,
    moving: bool,
) -> Result<()> {
    let place = |at: u64| {
        let new = moves.offset(at);
        (new.is_some() == moving).then(|| new.unwrap_or(at))
    };
    tables.visit(
        |table, content| {
            let Some(at) = place(table.host().0) else { return Ok(()) };
            let old = content.to_vec();
            if moves.redirect_l2(header, content) { rewrite(storage, &old, content, at) } else { Ok(()) }
        },
        |()| Ok(()),
    )?;
    for container in others {
        if let Some(at) = place(container.at)
            && let Some(bytes) = container.redirected(|at| moves.offset(at))?
        {
            rewrite(storage, &container.bytes, &bytes, at)?;
        }
    }
    Ok(())
}

/// Refcount blocks that a compact file does not need and that count nothing but each other: which and where.
fn surplus_blocks(
    storage: &dyn Storage,
    refcounts: &Refcounts<'_>,
    inspection: &Inspection,
) -> Result<Vec<(u64, u64)>> {
    let header = &inspection.header;
    let counts = &inspection.counts;
    let per_block = refcounts.per_block();
    let used = (0..counts.clusters()).filter(|&cluster| counts.get(cluster) > 0).count() as u64;
    let first = target(storage, header, used)?.div_ceil(per_block);
    let mut surplus = BTreeMap::new();
    for index in first..refcounts.entries().len() as u64 {
        if let Block::At(offset) = refcounts.block(index) {
            surplus.insert(index, offset.0 >> header.cluster_bits.bits());
        }
    }
    loop {
        let places: BTreeSet<u64> = surplus.values().copied().collect();
        let counts_others = |index: u64| {
            let counted = index * per_block..counts.clusters().min((index + 1) * per_block);
            counted.into_iter().any(|cluster| counts.get(cluster) > 0 && !places.contains(&cluster))
        };
        let before = surplus.len();
        surplus.retain(|&index, _| !counts_others(index));
        if surplus.len() == before {
            return Ok(surplus.into_iter().collect());
        }
    }
}

/// How many clusters move in a pass: a part of the file, for until the pass is settled the file system holds them twice; and no
/// more than some 50 MB of memory can plan. What is given for memory has no say: the file must not depend on it (I5).
fn most_at_once(inspection: &Inspection) -> usize {
    to_usize(inspection.counts.clusters() / 16).clamp(1 << 14, 1 << 20)
}

/// The bytes of a pass, in whole blocks of the file system.
pub(super) fn most_bytes(inspection: &Inspection) -> u64 {
    most_at_once(inspection) as u64 * inspection.header.cluster_bits.bytes().max(BLOCK)
}

/// The room of the smallest part in which a pass that takes `pass` bytes of room is done: every part counts the references of the whole
/// image once more.
pub(super) fn least(pass: u64, bits: ClusterBits) -> u64 {
    pass.min((pass / MOST_PARTS).max(2 * bits.bytes()).next_multiple_of(BLOCK))
}

/// Whether there is anything to move, to drop or to cut.
pub(super) fn has_work(storage: &dyn Storage, inspection: &Inspection) -> Result<bool> {
    let refcounts = Refcounts::load(storage, &inspection.header)?;
    Ok(inspection.file_len > used_bytes(inspection)
        || !rounds(storage, &refcounts, inspection)?.is_empty()
        || plan(storage, inspection, most_at_once(inspection))?.is_some())
}

/// Takes surplus refcount blocks out of the refcount table. Their clusters are leaks then.
fn drop_blocks(storage: &dyn Storage, header: &Header, rounds: Vec<Vec<(u64, u64)>>) -> Result<()> {
    set_dirty(storage, header)?;
    for round in rounds {
        for (index, _) in round {
            write(storage, &[0; 8], header.refcount_table_offset.0 + index * 8)?;
        }
        flush(storage)?;
    }
    Ok(())
}

/// Surplus refcount blocks in rounds: one that counts another stays until that one is out of the table, so that what is in use is
/// never counted as free. Those that count each other stay.
fn rounds(storage: &dyn Storage, refcounts: &Refcounts<'_>, inspection: &Inspection) -> Result<Vec<Vec<(u64, u64)>>> {
    let per_block = refcounts.per_block();
    let mut left = surplus_blocks(storage, refcounts, inspection)?;
    let mut rounds = Vec::new();
    loop {
        let others = left.iter().filter(|(index, cluster)| *index != cluster / per_block);
        let counting: BTreeSet<u64> = others.map(|(_, cluster)| cluster / per_block).collect();
        let (stay, go): (Vec<_>, Vec<_>) = left.into_iter().partition(|(index, _)| counting.contains(index));
        if go.is_empty() {
            return Ok(rounds);
        }
        rounds.push(go);
        left = stay;
    }
}

/// The end of the last cluster in use, in bytes.
fn used_bytes(inspection: &Inspection) -> u64 {
    let counts = &inspection.counts;
    let end = (0..counts.clusters()).rev().find(|&cluster| counts.get(cluster) > 0).map_or(0, |cluster| cluster + 1);
    end << inspection.header.cluster_bits.bits()
}

/// Cuts the file behind its last cluster in use.
fn cut(storage: &dyn Storage, inspection: &Inspection) -> Result<()> {
    let len = used_bytes(inspection);
    if storage.len().at("Could not get its length")? > len {
        match storage.set_len(len) {
            // A block device has the length that it has.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
            cut => cut.at("Could not make the file shorter")?,
        }
        flush(storage)?;
    }
    Ok(())
}
