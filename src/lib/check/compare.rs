//! Stored refcounts against counted references.

use std::ops::Range;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::check::Checker;
use crate::check::counts::{Counts, SIDE_BY_SIDE};
use crate::check::finding::{At, Count, Flag, Kind, Layer, Severity, Use};
use crate::check::states::{State, States};
use crate::check::tables::Tables;
use crate::error::Result;
use crate::format::table::{is_copied, l1_target};
use crate::image::refcounts::{Block, Refcounts};
use crate::units::{GuestOffset, HostOffset, to_usize};

/// Clusters whose refcounts one thread compares at once, and all of them: bounds what is found at once.
const SHARE: u64 = 1 << 15;
const BATCH: u64 = 1 << 18;

impl Checker<'_> {
    /// Counts the refcount blocks, the last references of all.
    pub(super) fn refcount_blocks(&mut self, refcounts: &Refcounts<'_>) {
        let bits = self.header.cluster_bits;
        for (&entry, index) in refcounts.entries().iter().zip(0u64..) {
            if Refcounts::reserved(entry) != 0 {
                self.say(Severity::Corruption, Kind::RefcountTableReserved(index));
                continue;
            }
            match refcounts.block(index) {
                Block::Missing => {}
                Block::Unaligned(_) => self.say(Severity::Corruption, Kind::RefcountBlockUnaligned(index)),
                Block::At(offset) | Block::Unreachable(offset) if offset.0 >> bits.bits() >= self.counts.clusters() => {
                    self.say(Severity::Corruption, Kind::RefcountBlockOutside(index));
                }
                Block::At(offset) | Block::Unreachable(offset) => {
                    self.claim(offset.0, bits.bytes(), Use::RefcountBlock(index), None);
                    let references = self.counts.get(offset.0 >> bits.bits());
                    if references != 1 {
                        self.say(Severity::Corruption, Kind::RefcountBlockShared(index, references));
                    }
                }
            }
        }
    }

    /// Compares every refcount with the references counted.
    pub(super) fn compare(&mut self, refcounts: &Refcounts<'_>, states: &States) -> Result<()> {
        let clusters = self.counts.clusters();
        // Both are powers of two: a share lies in one refcount block.
        let share = SHARE.min(refcounts.per_block());
        let mut highest = 0;
        for first in (0..clusters).step_by(to_usize(BATCH)) {
            self.work.cancel.check()?;
            let counts = &self.counts;
            let shares = first.div_ceil(share)..clusters.min(first + BATCH).div_ceil(share);
            let compared: Vec<Result<Compared>> = shares
                .into_par_iter()
                .map_init(Vec::new, |buffer, index| {
                    let range = index * share..clusters.min((index + 1) * share);
                    compare_share(range, refcounts, (counts, states), buffer)
                })
                .collect();
            for block in compared {
                let block = block?;
                highest = block.highest.unwrap_or(highest);
                for (severity, kind) in block.findings {
                    self.say(severity, kind);
                }
            }
        }
        self.report.image_end_offset = (highest + 1) << self.header.cluster_bits.bits();
        Ok(())
    }

    /// Compares the COPIED flags of the active L1 table with the stored refcounts of its L2 tables.
    pub(super) fn copied_l2(&mut self, tables: &Tables, states: &States) {
        let bits = self.header.cluster_bits;
        let span = bits.bytes() * self.header.l2_entries();
        for (&entry, index) in tables.active.iter().zip(0u64..) {
            let Some(HostOffset(target)) = l1_target(entry) else { continue };
            let one = match states.get(target >> bits.bits()) {
                State::One => true,
                State::Free | State::Many => false,
                State::Unknown => continue,
            };
            if one != is_copied(entry) {
                let at = At { layer: Layer::Active, guest: GuestOffset(span.saturating_mul(index)) };
                self.say(Severity::Corruption, Kind::CopiedL2(at, Flag { entry, one }));
            }
        }
    }
}

/// What a share of the clusters gave.
#[derive(Default)]
struct Compared {
    highest: Option<u64>,
    findings: Vec<(Severity, Kind)>,
}

/// Compares the counts of `clusters`, whose refcount block is read once more only where not all of them are known to be right.
fn compare_share(
    clusters: Range<u64>,
    refcounts: &Refcounts<'_>,
    (counts, states): (&Counts, &States),
    buffer: &mut Vec<u8>,
) -> Result<Compared> {
    let block = refcounts.block(clusters.start / refcounts.per_block());
    let mut compared = Compared::default();
    let mut is_read = false;
    for first in clusters.clone().step_by(to_usize(SIDE_BY_SIDE)) {
        let share = first..clusters.end.min(first + SIDE_BY_SIDE);
        if let Some(common) = states.common(first)
            && counts.common(first) == Some(common)
        {
            compared.highest = if common == 0 { compared.highest } else { Some(share.end - 1) };
            continue;
        }
        if let Block::At(offset) = block
            && !is_read
        {
            refcounts.read(offset, buffer)?;
            is_read = true;
        }
        for cluster in share {
            let references = counts.get(cluster);
            let refcount = match block {
                Block::Missing => 0,
                Block::At(_) => refcounts.count(buffer, cluster % refcounts.per_block()),
                Block::Unaligned(_) | Block::Unreachable(_) => {
                    compared.findings.push((Severity::CheckError, Kind::RefcountUnreadable(cluster)));
                    continue;
                }
            };
            if references > 0 || refcount > 0 {
                compared.highest = Some(cluster);
            }
            if refcount < references {
                let kind = Kind::RefcountTooLow(Count { cluster, refcount, references });
                compared.findings.push((Severity::Corruption, kind));
            } else if refcount > references {
                let kind = Kind::Leaked(Count { cluster, refcount, references });
                compared.findings.push((Severity::Leak, kind));
            }
        }
    }
    Ok(compared)
}
