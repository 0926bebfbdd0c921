//! Which clusters move where.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::check::Inspection;
use crate::check::counts::Counts;
use crate::codec::Inflater;
use crate::edit::room::{available, backed, room, unbacked, with_slack};
use crate::error::{Context, Error, ErrorKind, OrInternal, Result, Table};
use crate::format::compressed::CompressedExtent;
use crate::format::header::Header;
use crate::format::l2;
use crate::format::table::{L2Entry, with_offset};
use crate::image::refcounts::{Block, Refcounts};
use crate::sort::bits::{Bits, Ranked};
use crate::storage::sparse::write_sparse;
use crate::storage::{BLOCK, Storage, read_padded};
use crate::survey::tables::L2Tables;
use crate::survey::units::{Units, order};
use crate::units::{ClusterBits, HostOffset, SECTOR, to_usize};

/// The moves of a pass.
pub(super) struct Moves {
    bits: ClusterBits,
    /// Clusters that move, and by their rank where to and how often each is referred to.
    from: Ranked,
    to: Vec<(u64, u64)>,
    /// Compressed data that moves, in the order of the file.
    packed: Vec<Packed>,
}

/// Compressed data that moves.
struct Packed {
    old: CompressedExtent,
    new: CompressedExtent,
    /// Bytes that it needs: in the old place the rest of its last sector may be another's.
    len: u64,
    references: u64,
}

impl Moves {
    /// How many clusters move, taking each piece of compressed data for one.
    pub(super) fn len(&self) -> u64 {
        (self.to.len() + self.packed.len()) as u64
    }

    fn cluster(&self, cluster: u64) -> Option<u64> {
        self.to.get(to_usize(self.from.rank(cluster)?)).map(|(to, _)| *to)
    }

    /// Where the cluster that begins at `offset` moves to.
    pub(super) fn offset(&self, offset: u64) -> Option<u64> {
        self.cluster(offset >> self.bits.bits()).map(|cluster| cluster << self.bits.bits())
    }

    /// Counts the references to the new places.
    pub(super) fn count(&self, bits: ClusterBits, counts: &mut Counts) -> Result<()> {
        let clusters = self.to.iter().map(|(to, references)| (to << bits.bits(), bits.bytes(), *references));
        let packed = self.packed.iter().map(|packed| (packed.new.host.0, packed.new.len(), packed.references));
        for (start, len, references) in clusters.chain(packed) {
            counts.add(start, len, references, false).map_err(|_| {
                Error::new(ErrorKind::Limit, format!("the refcount of the cluster at {start:#x} has no more room"))
            })?;
        }
        Ok(())
    }

    /// The clusters that move, as runs of at most `most`: from, to, how many.
    pub(super) fn runs(&self, most: u64) -> Vec<(u64, u64, u64)> {
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for (from, (to, _)) in self.from.bits().iter().zip(&self.to) {
            match runs.last_mut() {
                Some((a, b, n)) if *a + *n == from && *b + *n == *to && *n < most => *n += 1,
                _ => runs.push((from, *to, 1)),
            }
        }
        runs
    }

    /// The room that they take: what of them is no hole, or what of their places is one; and that of their counts.
    pub(super) fn room(&self, storage: &dyn Storage) -> Result<u64> {
        let (old, new): (Vec<_>, Vec<_>) = self.needs().partition(|(_, is_old)| *is_old);
        let ranges = |parts: Vec<(Range<u64>, bool)>| parts.into_iter().map(|(range, _)| range).collect();
        Ok(with_slack(backed(storage, ranges(old))? + unbacked(storage, ranges(new))?) + BLOCK)
    }

    /// The bytes of the file in which they lie, or where those are no whole blocks of the file system, in which they will: what they need
    /// room for. Clusters first, then compressed data.
    fn needs(&self) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let is_whole = self.bits.bytes() >= BLOCK;
        let clusters = self.from.bits().iter().zip(&self.to).map(move |(from, (to, _))| {
            let start = if is_whole { from } else { *to } << self.bits.bits();
            (start..start + self.bits.bytes(), is_whole)
        });
        clusters.chain(self.packed.iter().map(|packed| (packed.new.host.0..packed.new.host.0 + packed.len, false)))
    }

    /// Takes out what there is room for, all of it if possible; a part that takes `least` bytes is taken in any case. `None` where
    /// nothing is left.
    pub(super) fn take_part(
        &mut self,
        storage: &dyn Storage,
        inspection: &Inspection,
        least: u64,
    ) -> Result<Option<Self>> {
        if self.len() == 0 {
            return Ok(None);
        }
        let all = self.to.len() + self.packed.len();
        let count = match available(room(storage)?) {
            Some(available) if self.room(storage)? > available => {
                self.fitting(storage, inspection, least.max(available / 2))?
            }
            _ => all,
        };
        let (clusters, packed) = (count.min(self.to.len()), count.saturating_sub(self.to.len()));
        let from: Vec<u64> = self.from.bits().iter().collect();
        let (first, rest) = from.split_at_checked(clusters).or_internal("fewer clusters move than have places")?;
        let part = Self {
            bits: self.bits,
            from: set(first),
            to: self.to.drain(..clusters).collect(),
            packed: self.packed.drain(..packed).collect(),
        };
        self.from = set(rest);
        Ok(Some(part))
    }

    /// How many of the first ones take up to `budget` bytes of room. What must lie in a row moves at once.
    fn fitting(&self, storage: &dyn Storage, inspection: &Inspection, budget: u64) -> Result<usize> {
        let (mut count, mut bytes) = (0usize, 0);
        for (range, is_old) in self.needs() {
            bytes += if is_old { backed(storage, vec![range])? } else { unbacked(storage, vec![range])? };
            if BLOCK + with_slack(bytes) > budget && count > 0 {
                break;
            }
            count += 1;
        }
        let mut neighbours = self.from.bits().iter().zip(self.from.bits().iter().skip(1)).skip(count.saturating_sub(1));
        let in_a_row = |a: u64, b: u64| inspection.claims.iter().any(|claim| claim.first <= a && b <= claim.last);
        while neighbours.next().is_some_and(|(a, b)| in_a_row(a, b)) {
            count += 1;
        }
        Ok(count)
    }

    /// Copies the compressed data.
    pub(super) fn copy_packed(&self, storage: &dyn Storage) -> Result<()> {
        let mut buffer = Vec::new();
        for packed in &self.packed {
            let at = packed.old.host.0;
            buffer.resize(to_usize(packed.len), 0);
            read_padded(storage, &mut buffer, at).reading(Table::Data, at)?;
            write_sparse(storage, &buffer, packed.new.host.0)?;
        }
        Ok(())
    }

    /// Points the entries of an L2 table at the new places; says whether any changed.
    pub(super) fn redirect_l2(&self, header: &Header, table: &mut [u8]) -> bool {
        l2::rewrite(header, table, |word, entry| match entry {
            L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. } => {
                self.offset(host.0).map(|new| with_offset(word, HostOffset(new)))
            }
            L2Entry::Compressed(extent) => {
                let found = self.packed.binary_search_by_key(&order(extent), |packed| order(packed.old)).ok();
                let packed = found.and_then(|index| self.packed.get(index));
                packed.map(|packed| L2Entry::Compressed(packed.new).encode(header.cluster_bits))
            }
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => None,
        })
    }
}

/// `clusters`, ascending.
fn set(clusters: &[u64]) -> Ranked {
    let mut set = Bits::new(clusters.last().map_or(0, |last| last + 1));
    clusters.iter().for_each(|&cluster| set.insert(cluster));
    set.ranked()
}

/// The moves that bring the end of the file nearer to where it could be; none where that is reached, or out of reach.
///
/// No more than `most` clusters move at once.
pub(super) fn plan(storage: &dyn Storage, inspection: &Inspection, most: usize) -> Result<Option<Moves>> {
    let header = &inspection.header;
    let counts = &inspection.counts;
    let clusters = counts.clusters();
    let end = (0..clusters).filter(|&cluster| counts.get(cluster) > 0).count() as u64;
    if end >= clusters {
        return Ok(None);
    }
    let tables = L2Tables::all(storage, header, &inspection.tables);
    let units = Units::survey(header, inspection.file_len, &tables, &[], 0)?;
    let mut room = Room::new(storage, inspection, &units, end)?;
    let mut pairs = Vec::new();

    // What needs several clusters in a row goes first. Where there are none, clusters that could go elsewhere make way for the
    // next pass.
    let mut leaving = Vec::new();
    let mut runs: Vec<(u64, u64)> = room.runs.iter().copied().filter(|(_, last)| *last >= end).collect();
    runs.sort_unstable_by_key(|(first, last)| first.abs_diff(*last));
    for (first, last) in runs.into_iter().rev() {
        let count = last - first + 1;
        match room.take_run(count) {
            Some(start) => pairs.extend((0..count).map(|n| (first + n, start + n))),
            None => leaving.extend(room.vacate(count, counts)),
        }
    }
    let tail = (end..clusters).filter(|&cluster| counts.get(cluster) > 0 && !room.stays(cluster));
    for clusters in [leaving, tail.take(most).collect()] {
        let clusters = in_guest_order(storage, inspection, clusters)?;
        pairs.extend(clusters.into_iter().map_while(|cluster| Some((cluster, room.take()?))));
    }

    let packed = pack(storage, header, &units, end, most, &mut room)?;
    if pairs.is_empty() && packed.is_empty() {
        return Ok(None);
    }
    pairs.sort_unstable();
    let mut from = Bits::new(clusters);
    pairs.iter().for_each(|(cluster, _)| from.insert(*cluster));
    let to = pairs.iter().map(|(cluster, to)| (*to, counts.get(*cluster))).collect();
    Ok(Some(Moves { bits: header.cluster_bits, from: from.ranked(), to, packed }))
}

/// The holes before the end that the file could have, and what stands between them.
struct Room {
    holes: Bits,
    /// No hole comes before this.
    next: u64,
    end: u64,
    /// First and last cluster of what needs several clusters in a row.
    runs: Vec<(u64, u64)>,
    /// Clusters that do not move by themselves: the header, those of runs, those with compressed data.
    fixed: Bits,
    /// Refcount blocks that will not be needed.
    surplus: Bits,
}

impl Room {
    fn new(storage: &dyn Storage, inspection: &Inspection, units: &Units, end: u64) -> Result<Self> {
        let counts = &inspection.counts;
        let clusters = counts.clusters();
        let refcounts = Refcounts::load(storage, &inspection.header)?;
        let per_block = refcounts.per_block();
        let mut surplus = Bits::new(clusters);
        for index in end.div_ceil(per_block)..refcounts.entries().len() as u64 {
            if let Block::At(offset) = refcounts.block(index) {
                surplus.insert(offset.0 >> inspection.header.cluster_bits.bits());
            }
        }
        let mut fixed = Bits::new(clusters);
        fixed.insert(0);
        let runs: Vec<(u64, u64)> = inspection
            .claims
            .iter()
            .map(|claim| (claim.first, claim.last))
            .filter(|(first, last)| last > first)
            .collect();
        runs.iter().flat_map(|(first, last)| *first..=*last).for_each(|cluster| fixed.insert(cluster));
        units.compressed().flat_map(|unit| units.hosts(unit)).for_each(|cluster| fixed.insert(cluster));
        // A hole that no block counts would need one first.
        let is_counted = |cluster: u64| matches!(refcounts.block(cluster / per_block), Block::At(_));
        let mut holes = Bits::new(clusters);
        (0..end)
            .filter(|&cluster| counts.get(cluster) == 0 && is_counted(cluster))
            .for_each(|cluster| holes.insert(cluster));
        Ok(Self { holes, next: 0, end, runs, fixed, surplus })
    }

    /// Whether `cluster` does not move by itself.
    fn stays(&self, cluster: u64) -> bool {
        self.fixed.contains(cluster) || self.surplus.contains(cluster)
    }

    /// The first hole.
    fn take(&mut self) -> Option<u64> {
        let hole = self.holes.iter_from(self.next).next()?;
        self.holes.remove(hole);
        self.next = hole + 1;
        Some(hole)
    }

    /// The first `count` holes in a row.
    fn take_run(&mut self, count: u64) -> Option<u64> {
        let start = self.holes.run_from(self.next, count)?;
        (start..start + count).for_each(|hole| self.holes.remove(hole));
        Some(start)
    }

    /// Keeps `count` clusters in a row free of other things; returns those of them that must go. The window that has the most
    /// holes is taken.
    fn vacate(&mut self, count: u64, counts: &Counts) -> Vec<u64> {
        let may_go = |cluster: u64| match counts.get(cluster) {
            0 => self.holes.contains(cluster),
            _ => !self.stays(cluster),
        };
        let mut best: Option<(u64, u64)> = None;
        let (mut start, mut holes) = (0, 0);
        for cluster in 0..self.end {
            if !may_go(cluster) {
                (start, holes) = (cluster + 1, 0);
                continue;
            }
            holes += u64::from(counts.get(cluster) == 0);
            if cluster + 1 - start > count {
                holes -= u64::from(counts.get(start) == 0);
                start += 1;
            }
            if cluster + 1 - start == count && best.is_none_or(|(most, _)| holes > most) {
                best = Some((holes, start));
            }
        }
        let Some((_, start)) = best else { return Vec::new() };
        let window = start..start + count;
        window.clone().for_each(|cluster| {
            self.holes.remove(cluster);
            self.fixed.insert(cluster);
        });
        window.filter(|&cluster| counts.get(cluster) > 0).collect()
    }
}

/// Metadata first, then data in the order in which the guest sees it.
fn in_guest_order(storage: &dyn Storage, inspection: &Inspection, clusters: Vec<u64>) -> Result<Vec<u64>> {
    let header = &inspection.header;
    let tables = L2Tables::new(storage, header, &inspection.tables);
    let mut set = Bits::new(inspection.counts.clusters());
    clusters.into_iter().for_each(|cluster| set.insert(cluster));
    let set = set.ranked();
    let lowest: Vec<AtomicU64> = (0..set.bits().len()).map(|_| AtomicU64::new(u64::MAX)).collect();
    tables.visit(
        |table, content| {
            for (index, entry) in l2::entries(header, content) {
                let (L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. }) = entry else { continue };
                if let Some(rank) = set.rank(host.0 >> header.cluster_bits.bits()) {
                    let lowest = lowest.get(to_usize(rank)).or_internal("a cluster that moves has no rank")?;
                    // A table that no layer uses has no guests.
                    let first = table.guests(index).map(|guest| guest.0 + 1).min().unwrap_or(u64::MAX);
                    lowest.fetch_min(first, Ordering::Relaxed);
                }
            }
            Ok(())
        },
        |()| Ok(()),
    )?;
    let is_data = |cluster: u64| inspection.counts.is_data(cluster);
    let mut order: Vec<(u64, u64)> = (set.bits().iter().zip(&lowest))
        .map(|(cluster, lowest)| (if is_data(cluster) { lowest.load(Ordering::Relaxed) } else { 0 }, cluster))
        .collect();
    order.sort_unstable();
    Ok(order.into_iter().map(|(_, cluster)| cluster).collect())
}

/// Finds places for compressed data behind `end`: one piece after the other in the holes that are left.
fn pack(
    storage: &dyn Storage,
    header: &Header,
    units: &Units,
    end: u64,
    most: usize,
    room: &mut Room,
) -> Result<Vec<Packed>> {
    let bits = header.cluster_bits;
    let width = header.refcount_bits;
    let limit = width.sharer_limit().unwrap_or(width.max());
    let mut gap = Gap { bits, limit, free: 0..0, references: 0 };
    let mut packed = Vec::new();
    let mut inflater = Inflater::default();
    for (unit, (old, references)) in units.compressed().zip(units.packed_clusters()) {
        if units.hosts(unit).end <= end || room.holes.len() == 0 && gap.free.is_empty() {
            continue;
        }
        inflater.cluster(storage, header, 0, *old)?;
        let len = inflater.compressed().len() as u64;
        let mut new = gap.place(len, *references);
        while new.is_none()
            && let Some(hole) = room.take()
        {
            gap.widen(hole);
            new = gap.place(len, *references);
        }
        let Some(new) = new.filter(|_| packed.len() < most) else { break };
        gap.fill(new, len, *references);
        packed.push(Packed { old: *old, new, len, references: *references });
    }
    Ok(packed)
}

/// Free bytes in a row, for compressed data.
struct Gap {
    bits: ClusterBits,
    /// References that a cluster should have at the most: what lies in it adds up.
    limit: u64,
    free: Range<u64>,
    /// Those that the cluster has in which the free bytes begin.
    references: u64,
}

impl Gap {
    /// Takes a free cluster behind its end, or else in its stead.
    fn widen(&mut self, hole: u64) {
        let start = hole << self.bits.bits();
        if self.free.is_empty() || self.free.end != start {
            (self.free.start, self.references) = (start, 0);
        }
        self.free.end = start + self.bits.bytes();
    }

    /// The place for `len` bytes that are referred to so often, if it has room for them.
    fn place(&self, len: u64, references: u64) -> Option<CompressedExtent> {
        let start = match self.references {
            1.. if self.references.saturating_add(references) > self.limit => {
                self.free.start.next_multiple_of(self.bits.bytes())
            }
            _ => self.free.start,
        };
        // With clusters of 512 bytes a descriptor counts to two sectors: some data must begin with one.
        let extent = [start, start.next_multiple_of(SECTOR)]
            .map(|start| CompressedExtent::new(HostOffset(start), len))
            .into_iter()
            .find(|extent| extent.has_descriptor(self.bits))?;
        (extent.host.0 + len <= self.free.end).then_some(extent)
    }

    /// Takes the first `len` bytes of `extent`, which [`Gap::place`] gave.
    fn fill(&mut self, extent: CompressedExtent, len: u64, references: u64) {
        let end = extent.host.0 + len;
        let cluster = |offset: u64| offset >> self.bits.bits();
        let before = if cluster(end) == cluster(self.free.start) { self.references } else { 0 };
        self.references = if end.is_multiple_of(self.bits.bytes()) { 0 } else { before.saturating_add(references) };
        self.free.start = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_data_gets_a_place_that_its_descriptor_names() {
        for bits in (9..=11).map(|bits| ClusterBits::new(bits).unwrap()) {
            let cluster = bits.bytes();
            for (start, len) in (0..cluster).flat_map(|start| (1..=cluster + 8).map(move |len| (start, len))) {
                let free = 4 * cluster + start..7 * cluster;
                let mut gap = Gap { bits, limit: 3, free: free.clone(), references: 2 };
                for references in [1, 2] {
                    let extent = gap.place(len, references).unwrap();
                    let word = L2Entry::Compressed(extent).encode(bits);
                    assert_eq!(L2Entry::decode(word, bits, true), L2Entry::Compressed(extent));
                    assert!(
                        extent.host.0 >= free.start && extent.host.0 + len <= free.end,
                        "{start} {len}: {extent:?}"
                    );
                    assert!(extent.len() >= len, "{start} {len}: {extent:?}");
                    assert!(references == 1 || extent.host.0.is_multiple_of(cluster), "{start} {len}: {extent:?}");
                }
                let extent = gap.place(len, 1).unwrap();
                gap.fill(extent, len, 1);
                let filled =
                    [cluster, 2 * cluster].iter().any(|end| start + len == *end) && extent.host.0 == free.start;
                let same = gap.free.start / cluster == free.start / cluster;
                assert_eq!(
                    gap.references,
                    if filled { 0 } else { 1 + 2 * u64::from(same) },
                    "{start} {len}: {extent:?}"
                );
            }
        }
    }
}
