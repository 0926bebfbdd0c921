//! Which new content is there already.

use std::iter::Peekable;
use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::group::Link;
use crate::dedup::plan::{peek, split_run};
use crate::dedup::verify::Clusters;
use crate::dedup::{INDEX, INDEX_BITS, index};
use crate::digest::{Sha, sha256};
use crate::error::{Context, OrInternal, Result, Table};
use crate::format::table::{L2Entry, l1_target};
use crate::inplace::overwrite::class::NEW;
use crate::inplace::overwrite::source::{Source, TASK};
use crate::sort::runs::tasks;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use crate::storage::buffer::BufferPool;
use crate::storage::{Storage, read_padded};
use crate::survey::Ground;
use crate::units::to_usize;
use crate::work::Work;

/// Links changed clusters to an unchanged one with the same fingerprint, or to the first changed one with it. Both are sorted by
/// fingerprint.
pub(super) fn links(changed: &Sorted, unchanged: &Sorted, spill: &Spill) -> Result<Sorted> {
    let mut links = Sorter::new(spill);
    let mut others = unchanged.iter().peekable();
    let mut keeper: Option<u128> = None;
    for word in changed.iter() {
        let word = word?;
        if keeper.is_none_or(|keeper| keeper & !INDEX != word & !INDEX) {
            while peek(&mut others)?.is_some_and(|other| other & !INDEX < word & !INDEX) {
                others.next();
            }
            let same = peek(&mut others)?.filter(|other| other & !INDEX == word & !INDEX);
            keeper = same.or(Some(word));
        }
        if let Some(keeper) = keeper.filter(|&keeper| keeper != word) {
            links.push(Link { duplicate: index(word), keeper: index(keeper) }.by_duplicate())?;
        }
    }
    links.finish()
}

/// The changed clusters that are no duplicates, in guest order.
pub(super) struct Heads<'a> {
    runs: Words<'a>,
    run: (u64, u64),
    /// Sorted by duplicate.
    links: Peekable<Words<'a>>,
}

impl<'a> Heads<'a> {
    /// `runs` are the changed clusters, `links` are sorted by duplicate.
    pub(super) fn new(runs: &'a Sequence, links: &'a Sorted) -> Self {
        Self { runs: runs.iter(), run: (0, 0), links: links.iter().peekable() }
    }

    fn try_next(&mut self) -> Result<Option<u64>> {
        loop {
            if self.run.1 == 0 {
                let Some(word) = self.runs.next() else { return Ok(None) };
                self.run = split_run(word?);
                continue;
            }
            let guest = self.run.0;
            self.run = (guest + 1, self.run.1 - 1);
            if peek(&mut self.links)?.is_some_and(|word| index(word >> INDEX_BITS) == guest) {
                self.links.next();
            } else {
                return Ok(Some(guest));
            }
        }
    }
}

impl Iterator for Heads<'_> {
    type Item = Result<u64>;

    fn next(&mut self) -> Option<Result<u64>> {
        self.try_next().transpose()
    }
}

/// The members of the pool by their name; those that take no more sharers are left out.
struct Names(Vec<(u128, u64)>);

impl Names {
    fn of(ground: &Ground) -> Self {
        let named = |unit: u64| ground.record(unit).filter(|r| !r.retired).map(|r| (prefix(&r.sha256), unit));
        let mut names: Vec<(u128, u64)> = ground.members.bits().iter().filter_map(named).collect();
        names.sort_unstable();
        Self(names)
    }

    fn find(&self, name: &Sha) -> impl Iterator<Item = u64> + '_ {
        let name = prefix(name);
        let first = self.0.partition_point(|(other, _)| *other < name);
        self.0.iter().skip(first).take_while(move |(other, _)| *other == name).map(|(_, unit)| *unit)
    }
}

fn prefix(name: &Sha) -> u128 {
    u128::from_be_bytes(*name.first_chunk().unwrap_or(&[0; 16]))
}

/// Looks `heads` up in the pool by their SHA-256 and compares the bytes: guest cluster (high 64 bits) and unit.
pub(super) fn in_pool(
    ground: &Ground,
    storage: &dyn Storage,
    source: &Source<'_>,
    mut heads: Heads<'_>,
    spill: &Spill,
    work: &Work,
) -> Result<Sequence> {
    let mut found = Sequence::new(spill);
    let names = Names::of(ground);
    if names.0.is_empty() {
        return Ok(found);
    }
    let bits = source.cluster_bits();
    let per_task = (TASK >> bits.bits()).max(1);
    let buffers = BufferPool::new(to_usize(per_task << bits.bits()));
    loop {
        work.cancel.check()?;
        let batch = tasks(|| heads.next().transpose(), per_task, work.batch())?;
        if batch.is_empty() {
            return Ok(found);
        }
        let searched: Vec<Result<Vec<u128>>> =
            batch.par_iter().map(|task| search(ground, storage, source, &names, task, &buffers)).collect();
        for words in searched {
            found.extend(&words?)?;
        }
        let clusters: u64 = batch.iter().flatten().map(|run| run.end - run.start).sum();
        work.progress.advance(clusters << bits.bits());
    }
}

fn search(
    ground: &Ground,
    storage: &dyn Storage,
    source: &Source<'_>,
    names: &Names,
    task: &[Range<u64>],
    buffers: &BufferPool,
) -> Result<Vec<u128>> {
    let bits = source.cluster_bits();
    let content = ground.content(storage);
    let (mut reader, mut members) = (source.in_order(), content.at_random());
    let mut buffer = buffers.take()?;
    let mut other = vec![0; bits.len()];
    let mut found = Vec::new();
    for run in task {
        let len = to_usize((run.end - run.start) << bits.bits());
        let piece = buffer.get_mut(..len).or_internal("a run is longer than its buffer")?;
        reader.read(run.start, piece)?;
        for (guest, cluster) in run.clone().zip(piece.chunks_exact(bits.len())) {
            for unit in names.find(&sha256(cluster)) {
                members.read(unit, &mut other)?;
                if other == cluster {
                    found.push(u128::from(guest) << 64 | u128::from(unit));
                    break;
                }
            }
        }
    }
    Ok(found)
}

/// Gives every changed cluster its class: what it will share, or the content that is stored for it. Words of class (high 64 bits) and
/// guest cluster, sorted.
pub(super) fn classes(
    ground: &Ground,
    storage: &dyn Storage,
    heads: Heads<'_>,
    links: &Sorted,
    in_pool: &Sequence,
    spill: &Spill,
) -> Result<Sorted> {
    let mut by_keeper = Sorter::new(spill);
    for word in links.iter() {
        by_keeper.push(Link::from_duplicate(word?).by_keeper())?;
    }
    let by_keeper = by_keeper.finish()?;
    let mut classes = Sorter::new(spill);
    let mut add = |class: u64, guest: u64| classes.push(u128::from(class) << 64 | u128::from(guest));
    let mut heads = heads.peekable();
    let mut found = in_pool.iter().map(|word| word.map(split_run)).peekable();
    let mut class_of_head =
        |head: u64| match found.next_if(|word| word.as_ref().map_or(true, |(guest, _)| *guest == head)) {
            Some(word) => word.map(|(_, unit)| unit),
            None => Ok(NEW | head),
        };
    let mut mapping = Mapping::new(ground, storage);
    // The keeper of the links at hand, and its class.
    let mut keeper: Option<(u64, u64)> = None;
    for word in by_keeper.iter() {
        let link = Link::from_keeper(word?);
        if keeper.is_none_or(|(keeper, _)| keeper != link.keeper) {
            let mut class = None;
            while let Some(head) = heads.next_if(|head| head.as_ref().map_or(true, |&head| head <= link.keeper)) {
                let head = head?;
                let of_head = class_of_head(head)?;
                add(of_head, head)?;
                class = (head == link.keeper).then_some(of_head);
            }
            // What has not changed is in the target, or in its backing file, which cannot be shared.
            let class = match class {
                Some(class) => class,
                None => mapping.unit(link.keeper)?.unwrap_or(NEW | link.keeper),
            };
            keeper = Some((link.keeper, class));
        }
        if let Some((_, class)) = keeper {
            add(class, link.duplicate)?;
        }
    }
    for head in heads {
        let head = head?;
        add(class_of_head(head)?, head)?;
    }
    classes.finish()
}

/// Where the active disk has ascending guest clusters.
struct Mapping<'a> {
    ground: &'a Ground,
    storage: &'a dyn Storage,
    /// The table that was read last, by its L1 index.
    table: Option<(u64, Vec<u8>)>,
}

impl<'a> Mapping<'a> {
    fn new(ground: &'a Ground, storage: &'a dyn Storage) -> Self {
        Self { ground, storage, table: None }
    }

    fn unit(&mut self, guest: u64) -> Result<Option<u64>> {
        let inspection = &self.ground.inspection;
        let bits = inspection.header.cluster_bits;
        let (l1_index, at) = (guest / bits.entries(), guest % bits.entries());
        if self.table.as_ref().is_none_or(|(index, _)| *index != l1_index) {
            let entry = inspection.tables.active.get(to_usize(l1_index));
            let mut content = vec![0; bits.len()];
            if let Some(host) = entry.and_then(|&entry| l1_target(entry)) {
                read_padded(self.storage, &mut content, host.0).reading(Table::L2, host)?;
            }
            self.table = Some((l1_index, content));
        }
        let (_, content) = self.table.as_ref().or_internal("the table that was read is gone")?;
        let word = content.as_chunks().0.get(to_usize(at)).or_internal("an L2 entry lies behind its table")?;
        Ok(self.ground.units.of(L2Entry::decode(u64::from_be_bytes(*word), bits, true)))
    }
}
