//! Parts of the image that claim the same cluster although only one can have it. QEMU's check does not look: where the refcount
//! happens to match, it finds nothing.

use std::ops::Range;

use crate::check::finding::{Kind, Layer, Severity, Use};
use crate::check::tables::Tables;
use crate::check::{Checker, Inspection};
use crate::units::{ClusterBits, HostOffset, append};

/// Clusters that a part of the metadata takes.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    /// The first cluster.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// What for.
    pub to: Use,
}

/// The clusters that metadata takes, and what of the file there is.
pub(crate) struct Metadata {
    /// In order, without overlaps.
    taken: Vec<Range<u64>>,
    bits: ClusterBits,
    file_len: u64,
}

impl Metadata {
    /// What an inspection found.
    pub(crate) fn of(inspection: &Inspection) -> Self {
        let bits = inspection.header.cluster_bits;
        let claims = inspection.claims.iter().map(|claim| claim.first..claim.last + 1);
        let tables = inspection.tables.references.iter().map(|reference| {
            let first = reference.table.0 >> bits.bits();
            first..first + 1
        });
        let mut all: Vec<Range<u64>> = claims.chain(tables).collect();
        all.sort_unstable_by_key(|range| (range.start, range.end));
        let mut taken: Vec<Range<u64>> = Vec::new();
        all.into_iter().for_each(|range| append(&mut taken, range));
        Self { taken, bits, file_len: inspection.file_len }
    }

    /// Whether the cluster at `host` cannot be one: it begins between two, lies behind the end of the file or on metadata.
    pub(crate) fn excludes(&self, host: HostOffset) -> bool {
        let end = host.0.saturating_add(self.bits.bytes());
        let clusters = host.0 >> self.bits.bits()..end.div_ceil(self.bits.bytes());
        let at = self.taken.partition_point(|taken| taken.end <= clusters.start);
        host.0 & (self.bits.bytes() - 1) != 0
            || end >= self.file_len.saturating_add(self.bits.bytes())
            || self.taken.get(at).is_some_and(|taken| taken.start < clusters.end)
    }
}

impl Checker<'_> {
    /// Says where metadata lies on metadata, or data on metadata.
    pub(crate) fn overlaps(&mut self, tables: &Tables) {
        let bits = self.header.cluster_bits.bits();
        let mut claims = self.claims.clone();
        let clusters = self.counts.clusters();
        // An L2 table may have several users, but it is one table.
        for same in tables.references.chunk_by(|a, b| a.table == b.table) {
            let Some(one) = same.first().filter(|one| one.table.0 >> bits < clusters) else { continue };
            let layer = tables.layers.get(one.layer as usize).cloned().unwrap_or(Layer::Active);
            let last = (one.table.0 + self.header.cluster_bits.bytes() - 1) >> bits;
            claims.push(Claim { first: one.table.0 >> bits, last, to: Use::L2(layer) });
        }
        claims.sort_by_key(|claim| (claim.first, claim.last));
        let mut widest: Option<&Claim> = None;
        for claim in &claims {
            if let Some(before) = widest
                && before.last >= claim.first
            {
                let (one, other) = (before.to.clone(), claim.to.clone());
                self.say(Severity::Corruption, Kind::Overlap(claim.first, one, other));
            }
            if let Some(cluster) = (claim.first..=claim.last).find(|&cluster| self.counts.is_data(cluster)) {
                let (one, other) = (claim.to.clone(), Use::SomeData);
                self.say(Severity::Corruption, Kind::Overlap(cluster, one, other));
            }
            if widest.is_none_or(|before| before.last < claim.last) {
                widest = Some(claim);
            }
        }
    }
}
