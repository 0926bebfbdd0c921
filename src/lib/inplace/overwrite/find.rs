//! Which new content is there already.

use std::iter::Peekable;
use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::group::{ByDuplicate, ByKeeper, Link};
use crate::dedup::verify::Clusters;
use crate::dedup::{Run, peek};
use crate::digest::{Fingerprint, Sha, sha256};
use crate::error::{Context, OrInternal, Result, Table};
use crate::format::table::{L2Entry, l1_target};
use crate::inplace::overwrite::class::{Classed, NEW};
use crate::inplace::overwrite::source::{Source, TASK};
use crate::sort::content::ContentAt;
use crate::sort::record::record;
use crate::sort::runs::tasks;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use crate::storage::buffer::BufferPool;
use crate::storage::{Storage, read_padded};
use crate::survey::Ground;
use crate::units::to_usize;
use crate::work::Work;

/// Links changed clusters to an unchanged one with the same fingerprint, or to the first changed one with it. Both are sorted by
/// fingerprint.
pub(super) fn links(
    changed: &Sorted<ContentAt>,
    unchanged: &Sorted<ContentAt>,
    spill: &Spill,
) -> Result<Sorted<ByDuplicate>> {
    let mut links = Sorter::new(spill);
    let mut others = unchanged.iter().peekable();
    let mut keeper: Option<ContentAt> = None;
    for record in changed.iter() {
        let record = record?;
        if keeper.is_none_or(|keeper| keeper.name() != record.name()) {
            while peek(&mut others)?.is_some_and(|other| other.name() < record.name()) {
                others.next();
            }
            let same = peek(&mut others)?.filter(|other| other.name() == record.name());
            keeper = same.or(Some(record));
        }
        if let Some(keeper) = keeper.filter(|&keeper| keeper != record) {
            links.push(ByDuplicate(Link { duplicate: record.cluster(), keeper: keeper.cluster() }))?;
        }
    }
    links.finish()
}

/// The changed clusters that are no duplicates, in guest order.
pub(super) struct Heads<'a> {
    runs: Words<'a, Run>,
    run: Run,
    links: Peekable<Words<'a, ByDuplicate>>,
}

impl<'a> Heads<'a> {
    /// `runs` are the changed clusters.
    pub(super) fn new(runs: &'a Sequence<Run>, links: &'a Sorted<ByDuplicate>) -> Self {
        Self { runs: runs.iter(), run: Run::default(), links: links.iter().peekable() }
    }

    fn try_next(&mut self) -> Result<Option<u64>> {
        loop {
            if self.run.len == 0 {
                let Some(run) = self.runs.next() else { return Ok(None) };
                self.run = run?;
                continue;
            }
            let guest = self.run.start;
            self.run = self.run.skip(1);
            if peek(&mut self.links)?.is_some_and(|ByDuplicate(link)| link.duplicate == guest) {
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
struct Names(Vec<(Fingerprint, u64)>);

impl Names {
    fn of(ground: &Ground) -> Self {
        let named =
            |unit: u64| ground.record(unit).filter(|r| !r.retired).map(|r| (Fingerprint::of_sha(&r.sha256), unit));
        let mut names: Vec<(Fingerprint, u64)> = ground.members.bits().iter().filter_map(named).collect();
        names.sort_unstable();
        Self(names)
    }

    fn find(&self, name: &Sha) -> impl Iterator<Item = u64> + '_ {
        let name = Fingerprint::of_sha(name);
        let first = self.0.partition_point(|(other, _)| *other < name);
        self.0.iter().skip(first).take_while(move |(other, _)| *other == name).map(|(_, unit)| *unit)
    }
}

/// A changed cluster and the unit that has its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InPool {
    guest: u64,
    unit: u64,
}

record!(in_pool_words: InPool { guest: 64, unit: 64 });

/// Looks `heads` up in the pool by their SHA-256 and compares the bytes.
pub(super) fn in_pool(
    ground: &Ground,
    storage: &dyn Storage,
    source: &Source<'_>,
    mut heads: Heads<'_>,
    spill: &Spill,
    work: &Work,
) -> Result<Sequence<InPool>> {
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
        let searched: Vec<Result<Vec<InPool>>> =
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
) -> Result<Vec<InPool>> {
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
                    found.push(InPool { guest, unit });
                    break;
                }
            }
        }
    }
    Ok(found)
}

/// Gives every changed cluster its class: what it will share, or the content that is stored for it.
pub(super) fn classes(
    ground: &Ground,
    storage: &dyn Storage,
    heads: Heads<'_>,
    links: &Sorted<ByDuplicate>,
    in_pool: &Sequence<InPool>,
    spill: &Spill,
) -> Result<Sorted<Classed>> {
    let mut by_keeper = Sorter::new(spill);
    for link in links.iter() {
        by_keeper.push(ByKeeper(link?.0))?;
    }
    let by_keeper = by_keeper.finish()?;
    let mut classes = Sorter::new(spill);
    let mut add = |class: u64, guest: u64| classes.push(Classed { class, guest });
    let mut heads = heads.peekable();
    let mut found = in_pool.iter().peekable();
    let mut class_of_head =
        |head: u64| match found.next_if(|found| found.as_ref().map_or(true, |found| found.guest == head)) {
            Some(found) => found.map(|found| found.unit),
            None => Ok(NEW | head),
        };
    let mut mapping = Mapping::new(ground, storage);
    // The keeper of the links at hand, and its class.
    let mut keeper: Option<(u64, u64)> = None;
    for link in by_keeper.iter() {
        let ByKeeper(link) = link?;
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
