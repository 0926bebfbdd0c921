//! Parts of the image that claim the same cluster although only one can have it. QEMU's check does not look: where the refcount
//! happens to match, it finds nothing.

use super::Checker;
use super::finding::{Kind, Layer, Severity, Use};
use super::tables::Tables;

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

impl Checker<'_> {
    /// Says where metadata lies on metadata, or data on metadata.
    pub(super) fn overlaps(&mut self, tables: &Tables) {
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
