//! The L2 tables: each one is read once, however many L1 entries lead to it.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator};

use crate::check::Checker;
use crate::check::counts::{Counts, Refused};
use crate::check::finding::{At, Finding, Flag, Kind, Layer, More, Severity, Use};
use crate::check::overlap::Metadata;
use crate::check::states::{State, States};
use crate::check::tables::{L2Reference, Tables};
use crate::error::{Context, OrInternal, Result, Table};
use crate::format::header::{Header, incompatible};
use crate::format::l2;
use crate::format::table::{L2Entry, Subclusters, is_copied, l2_reserved};
use crate::format::u64_at;
use crate::storage::Storage;
use crate::units::{GuestOffset, HostOffset, to_usize};

/// L2 tables that are read at once, as bytes: bounds the memory of a batch.
const BATCH: u64 = 4 << 20;
/// Parts of a batch at the most, each of which holds as many findings as are described: bounds their memory for any number of threads.
const PARTS: usize = 32;
/// Findings that are described: the first in the order of the file. The others are counted: a few wrong bytes in an L1 table
/// can make hundreds of thousands of them, which nobody reads.
const DESCRIBED: usize = 16384;

/// Entries that are looked at together at the most: bounds what is looked at twice where one of them is not right.
const RUN: usize = 64;

/// Said of an L2 entry that was cut out too short.
const SHORT: &str = "an L2 entry has not all of its bytes";

/// Totals of the active disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Allocation {
    pub allocated: u64,
    pub fragmented: u64,
    pub compressed: u64,
}

/// What a worker needs to know.
struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    counts: &'a Counts,
    states: &'a States,
    tables: &'a Tables,
    data_file: bool,
    /// Zero clusters are seen without their places where it excludes them.
    without: Option<&'a Metadata>,
}

/// What L2 tables gave that follow each other.
#[derive(Default)]
struct Walked {
    findings: Findings,
    allocation: Allocation,
    /// Where the entries of misplaced preallocated clusters are in the file.
    misplaced: Vec<u64>,
}

impl Walked {
    /// Appends what the tables behind these gave. [`DESCRIBED`] findings remain at the most, and which ones does not depend on who
    /// walked what.
    fn and(mut self, mut other: Self) -> Self {
        self.findings.append(other.findings);
        self.allocation.allocated += other.allocation.allocated;
        self.allocation.fragmented += other.allocation.fragmented;
        self.allocation.compressed += other.allocation.compressed;
        self.misplaced.append(&mut other.misplaced);
        self
    }
}

/// Findings, most of them counted where there are many.
#[derive(Default)]
struct Findings {
    described: Vec<(L2Reference, Finding)>,
    more: BTreeMap<More, u64>,
}

impl Findings {
    fn push(&mut self, at: L2Reference, finding: Finding) {
        if self.described.len() < DESCRIBED {
            self.described.push((at, finding));
        } else {
            let more = More { beyond_qemu: finding.kind.is_beyond_qemu(), repair: finding.kind.repair() };
            self.add(more, finding.times);
        }
    }

    fn add(&mut self, more: More, times: u64) {
        let count = self.more.entry(more).or_default();
        *count = count.saturating_add(times);
    }

    fn append(&mut self, other: Self) {
        for (at, finding) in other.described {
            self.push(at, finding);
        }
        for (more, times) in other.more {
            self.add(more, times);
        }
    }
}

impl Checker<'_> {
    /// Counts what all L2 tables refer to.
    pub(super) fn walk(&mut self, tables: &Tables, states: &States) -> Result<Allocation> {
        let mut groups = tables.references.chunk_by(|a, b| a.table == b.table);
        let per_batch = to_usize(BATCH / self.header.cluster_bits.bytes()).max(8);
        let mut all = Walked::default();
        loop {
            let batch: Vec<&[L2Reference]> = groups.by_ref().take(per_batch).collect();
            if batch.is_empty() {
                break;
            }
            self.work.cancel.check()?;
            let walk = Walk {
                storage: self.storage,
                header: &self.header,
                counts: &self.counts,
                states,
                tables,
                data_file: self.header.incompatible & incompatible::DATA_FILE != 0,
                without: self.how.without.as_ref(),
            };
            let nothing = || Ok(Walked::default());
            // The first error counts, whoever is the first to find one.
            let join = |before: Result<Walked>, behind: Result<Walked>| Ok(before?.and(behind?));
            let tables = (batch.par_iter().with_min_len(per_batch.div_ceil(PARTS)))
                .map_init(Vec::new, |buffer, references| walk.table(references, buffer));
            all = all.and(tables.fold(nothing, join).reduce(nothing, join)?);
            self.work.progress.advance(batch.len() as u64 * self.header.cluster_bits.bytes());
        }
        // In the order of the layers and of the disk, not of the file.
        all.findings.described.sort_by_key(|(reference, _)| (reference.layer, reference.index));
        for (_, finding) in all.findings.described {
            self.emit(&finding);
        }
        for (more, times) in all.findings.more {
            self.emit(&Finding { severity: Severity::Corruption, kind: Kind::More(more), times });
        }
        self.misplaced = all.misplaced;
        Ok(all.allocation)
    }
}

impl Walk<'_> {
    /// Walks the table that all of `references` lead to.
    fn table(&self, references: &[L2Reference], buffer: &mut Vec<u8>) -> Result<Walked> {
        let mut walked = Walked::default();
        let &first = references.first().or_internal("an L2 table that nothing leads to is walked")?;
        let bits = self.header.cluster_bits;
        let entry_size = if self.header.extended_l2() { 16 } else { 8 };
        buffer.resize(bits.len(), 0);
        let read = (self.storage.read_at(buffer, first.table.0)).reading(Table::L2, first.table)?;
        // What the file does not have reads as zeros, and zeros lead nowhere.
        let end = read.next_multiple_of(entry_size);
        if let Some(behind) = buffer.get_mut(read..end) {
            behind.fill(0);
        }
        let buffer = buffer.get(..end).or_internal("more of an L2 table was read than it has")?;
        let active: Vec<L2Reference> = references.iter().copied().filter(|r| r.layer == 0).collect();
        let shown = active.len() as u64;
        let times = references.len() as u64;
        let mut allocation = Allocation::default();
        // QEMU compares no flags in a table at offset 0, nor in one whose own refcount cannot be read.
        let table_state = self.states.get(first.table.0 >> bits.bits());
        let compares = first.table.0 != 0 && table_state != State::Unknown;
        let mut next = 0;
        let mut overflows = Vec::new();
        // Without subclusters, and data in this file.
        let simple = entry_size == 8 && !self.data_file;
        let words = if simple { buffer.as_chunks().0 } else { &[] };
        let mut entries = buffer.chunks_exact(entry_size).enumerate();
        while let Some((index, entry)) = entries.next() {
            let word = u64_at(entry, 0).or_internal(SHORT)?;
            let subclusters = if self.header.extended_l2() { u64_at(entry, 8).or_internal(SHORT)? } else { 0 };
            if word == 0 && subclusters == 0 {
                continue;
            }
            let rest = words.get(index..).unwrap_or_default();
            if let Some(run) = self.plain_run(rest, times, compares && !active.is_empty(), &mut overflows) {
                let clusters = run.end - run.start;
                allocation.allocated += clusters;
                allocation.fragmented += u64::from(next != 0 && run.start << bits.bits() != next);
                next = run.end << bits.bits();
                if let Some(others) = usize::try_from(clusters).ok().and_then(|clusters| clusters.checked_sub(2)) {
                    entries.nth(others);
                }
                continue;
            }
            let index = index as u64;
            if self.is_misplaced(word, subclusters) {
                walked.misplaced.push(first.table.0 + index * entry_size as u64);
                continue;
            }
            let at = first.table.0 + index * entry_size as u64;
            let mut say = |kind: Kind| {
                if matches!(kind, Kind::PreallocationUnaligned(..)) {
                    walked.misplaced.push(at);
                }
                let finding = Finding { severity: Severity::Corruption, kind, times };
                walked.findings.push(first, finding);
            };
            let state = (&mut allocation, &mut next, &mut overflows);
            self.entry((word, subclusters), self.at(first, index), times, state, &mut say);
            if let Some(reference) = active.first().filter(|_| compares)
                && let Some(kind) = self.copied(word, self.at(*reference, index))
            {
                let finding = Finding { severity: Severity::Corruption, kind, times: shown };
                walked.findings.push(*reference, finding);
            }
        }
        for (cluster, lost) in overflows {
            let kind = Kind::Overflow(HostOffset(cluster << bits.bits()));
            let finding = Finding { severity: Severity::Corruption, kind, times: lost };
            walked.findings.push(first, finding);
        }
        walked.allocation = Allocation {
            allocated: allocation.allocated * shown,
            fragmented: allocation.fragmented * shown,
            compressed: allocation.compressed * shown,
        };
        Ok(walked)
    }

    /// Counts the clusters of the run of entries at the start of `words`, and returns them, if nothing is to be said about any:
    /// plain clusters inside the file that follow each other and whose flags, where they are `compared`, are right.
    fn plain_run(
        &self,
        words: &[[u8; 8]],
        times: u64,
        compared: bool,
        overflows: &mut Vec<(u64, u64)>,
    ) -> Option<Range<u64>> {
        let bits = self.header.cluster_bits;
        let first = u64::from_be_bytes(*words.first()?);
        let L2Entry::Data { host, copied } = L2Entry::decode(first, bits, true) else { return None };
        if l2_reserved(first) != 0 || host.0 & (bits.bytes() - 1) != 0 {
            return None;
        }
        let follows = |(word, n): &(&[u8; 8], u64)| u64::from_be_bytes(**word) == first.wrapping_add(n * bits.bytes());
        let length = words.iter().take(RUN).zip(0..).take_while(follows).count() as u64;
        let clusters = host.0 >> bits.bits()..(host.0 >> bits.bits()) + length;
        let right = match (compared, copied) {
            (false, _) => true,
            (true, true) => self.states.all_one(clusters.clone()),
            (true, false) => self.states.none_one(clusters.clone()),
        };
        let lost = |cluster, lost| overflows.push((cluster, lost));
        (right && self.counts.add_data(clusters.clone(), times, lost)).then_some(clusters)
    }

    /// Whether this is a zero cluster with a place to be seen without it. One whose entry is damaged otherwise is none.
    fn is_misplaced(&self, word: u64, subclusters: u64) -> bool {
        let Some(metadata) = self.without.filter(|_| !self.data_file && self.header.version >= 3) else { return false };
        let extended = self.header.extended_l2();
        let host = match l2::decode(self.header, word) {
            L2Entry::Zero { host: Some(host), .. } => host,
            L2Entry::Data { host, .. } if extended && subclusters & Subclusters::ALLOCATED == 0 => host,
            _ => return false,
        };
        l2_reserved(word) == 0 && metadata.excludes(host)
    }

    fn at(&self, reference: L2Reference, entry: u64) -> At {
        let cluster = u64::from(reference.index) * self.header.l2_entries() + entry;
        let layer = self.tables.layers.get(reference.layer as usize).cloned();
        At {
            layer: layer.unwrap_or(Layer::Active),
            guest: GuestOffset(cluster.saturating_mul(self.header.cluster_bits.bytes())),
        }
    }

    /// Counts what one entry refers to, as QEMU counts it.
    fn entry(
        &self,
        (word, subclusters): (u64, u64),
        at: At,
        times: u64,
        (allocation, next, overflows): (&mut Allocation, &mut u64, &mut Vec<(u64, u64)>),
        say: &mut dyn FnMut(Kind),
    ) {
        let bits = self.header.cluster_bits;
        let extended = self.header.extended_l2();
        let decoded = match l2::decode(self.header, word) {
            // With an external data file an entry with COPIED is a cluster at offset 0.
            L2Entry::Unallocated if self.data_file && is_copied(word) => {
                L2Entry::Data { host: HostOffset(0), copied: true }
            }
            decoded => decoded,
        };
        if !matches!(decoded, L2Entry::Compressed(_)) && l2_reserved(word) != 0 {
            say(Kind::L2Reserved(at.clone(), word));
        }
        let (host, is_data) = match decoded {
            L2Entry::Compressed(extent) => {
                if is_copied(word) {
                    say(Kind::CompressedCopied(at.clone(), extent.host));
                }
                if self.data_file {
                    say(Kind::CompressedDataFile(at, word));
                    return;
                }
                if subclusters != 0 {
                    say(Kind::CompressedSubclusters(at, word));
                    return;
                }
                allocation.allocated += 1;
                allocation.compressed += 1;
                allocation.fragmented += 1;
                self.count((extent.host, extent.len()), times, at, overflows, say);
                self.counts.set_packed(extent.host.0, extent.len());
                return;
            }
            L2Entry::Unallocated => {
                let allocated = subclusters & Subclusters::ALLOCATED != 0;
                if allocated {
                    say(Kind::SubclusterWithoutCluster(at));
                } else if is_copied(word) && at.layer == Layer::Active {
                    say(Kind::CopiedNothing(at, word));
                }
                return;
            }
            L2Entry::Zero { host, .. } => {
                if self.header.version < 3 {
                    say(Kind::ZeroInVersion2(at.clone()));
                }
                match host {
                    None => return,
                    Some(host) => (host, false),
                }
            }
            L2Entry::Data { host, .. } if extended => (host, subclusters & Subclusters::ALLOCATED != 0),
            L2Entry::Data { host, .. } => (host, true),
        };
        if subclusters >> Subclusters::COUNT & subclusters != 0 {
            say(Kind::SubclusterConflict(at.clone(), host));
        }
        if host.0 & (bits.bytes() - 1) != 0 {
            say(if is_data {
                Kind::DataUnaligned(at.clone(), host)
            } else {
                Kind::PreallocationUnaligned(at.clone(), host)
            });
        }
        allocation.allocated += 1;
        if *next != 0 && host.0 != *next {
            allocation.fragmented += 1;
        }
        *next = host.0 + bits.bytes();
        if !self.data_file {
            self.count((host, bits.bytes()), times, at, overflows, say);
        }
    }

    fn count(
        &self,
        (offset, size): (HostOffset, u64),
        times: u64,
        at: At,
        overflows: &mut Vec<(u64, u64)>,
        say: &mut dyn FnMut(Kind),
    ) {
        match self.counts.add(offset.0, size, times, true) {
            Ok(()) => {}
            Err(Refused::PastEnd) => {
                let (to, at) = (Use::Data(at.layer), Some(at.guest));
                say(Kind::PastEnd { to, offset: offset.0, size, at });
            }
            Err(Refused::Overflow { cluster, lost }) => overflows.push((cluster, lost)),
        }
    }

    /// Compares the COPIED flag of an entry of the active disk with the stored refcount.
    fn copied(&self, word: u64, at: At) -> Option<Kind> {
        let decoded = l2::decode(self.header, word);
        let host = match decoded {
            L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. } => host,
            _ => return None,
        };
        let state = match self.data_file {
            true => State::One,
            false => self.states.get(host.0 >> self.header.cluster_bits.bits()),
        };
        let one = match state {
            State::One => true,
            State::Free | State::Many => false,
            State::Unknown => return None,
        };
        (one != is_copied(word)).then_some(Kind::CopiedData(at, Flag { entry: word, one }))
    }
}
