//! The distinct data clusters of an image, numbered.

use std::ops::Range;

use crate::check::counts::Counts;
use crate::codec::Inflater;
use crate::dedup::INDEX_BITS;
use crate::dedup::verify::{Clusters, ReadClusters};
use crate::error::{Context, Error, ErrorKind, OrInternal, Result, Table};
use crate::format::compressed::CompressedExtent;
use crate::format::header::Header;
use crate::format::l2;
use crate::format::table::L2Entry;
use crate::sort::bits::Bits;
use crate::storage::buffer::reserve;
use crate::storage::{Storage, read_padded};
use crate::survey::tables::L2Tables;
use crate::units::{ClusterBits, HostOffset, to_usize};

/// The distinct data clusters that L2 entries lead to, the pool's included.
///
/// A *unit* is the number of one: of a plain cluster its place in the file, of a compressed one a number behind all of those.
/// Plain units ascend with their host offset, and so do compressed ones.
pub(crate) struct Units {
    bits: ClusterBits,
    /// Plain units are below this.
    plain: u64,
    /// L2 entries that lead to each plain cluster, as QEMU counts them, the pool's left out.
    users: Counts,
    /// The compressed clusters and the same of them.
    compressed: Vec<(CompressedExtent, u64)>,
    /// Places that entries with the zero flag keep.
    pub(crate) kept_by_zeros: Bits,
}

impl Units {
    /// Looks at all L2 tables; `members` are the entries of the pool. The file may grow by `room` clusters.
    pub(crate) fn survey(
        header: &Header,
        file_len: u64,
        tables: &L2Tables<'_>,
        members: &[u64],
        room: u64,
    ) -> Result<Self> {
        let bits = header.cluster_bits;
        let plain = bits.clusters(file_len) + 1 + room;
        let users = Counts::new(bits, file_len, u64::MAX)?;
        let mut compressed: Vec<(CompressedExtent, u64)> = Vec::new();
        let mut kept_by_zeros = Bits::new(plain);
        let mut most = 1 << 20;
        tables.visit(
            |table, content| {
                let mut found = (Vec::new(), Vec::new());
                for (_, entry) in l2::entries(header, content) {
                    match entry {
                        L2Entry::Data { host, .. } => {
                            let added = users.add(host.0, bits.bytes(), table.times(), true);
                            // The check has found it to lie in the file.
                            added
                                .map_err(|_| Error::new(ErrorKind::Changed, "its tables changed while it was read"))?;
                        }
                        L2Entry::Compressed(extent) => found.0.push((extent, table.times())),
                        L2Entry::Zero { host: Some(host), .. } => found.1.push(host.0 >> bits.bits()),
                        L2Entry::Zero { host: None, .. } | L2Entry::Unallocated => {}
                    }
                }
                Ok(found)
            },
            |(mut extents, places)| {
                reserve(&mut compressed, extents.len())?;
                compressed.append(&mut extents);
                // Snapshots with tables of their own name the same clusters again and again.
                if compressed.len() > most {
                    merge(&mut compressed);
                    most = most.max(2 * compressed.len());
                }
                places.into_iter().for_each(|place| kept_by_zeros.insert(place));
                Ok(())
            },
        )?;
        compressed.extend(members.iter().filter_map(|&word| match L2Entry::decode(word, bits, true) {
            L2Entry::Compressed(extent) => Some((extent, 0)),
            _ => None,
        }));
        merge(&mut compressed);
        let units = Self { bits, plain, users, compressed, kept_by_zeros };
        if units.limit() > 1 << INDEX_BITS {
            let message = format!("the image has more than 2^{INDEX_BITS} clusters");
            return Err(Error::new(ErrorKind::Limit, message));
        }
        Ok(units)
    }

    /// All units are below this.
    pub(crate) fn limit(&self) -> u64 {
        self.plain + self.compressed.len() as u64
    }

    /// The plain units' numbers.
    pub(crate) fn plain(&self) -> Range<u64> {
        0..self.plain
    }

    /// The compressed units' numbers.
    pub(crate) fn compressed(&self) -> Range<u64> {
        self.plain..self.limit()
    }

    /// The unit that an entry leads to.
    pub(crate) fn of(&self, entry: L2Entry) -> Option<u64> {
        match entry {
            L2Entry::Data { host, .. } => Some(host.0 >> self.bits.bits()),
            L2Entry::Compressed(extent) => {
                let found = self.compressed.binary_search_by_key(&order(extent), |(extent, _)| order(*extent));
                found.ok().map(|index| self.plain + index as u64)
            }
            L2Entry::Unallocated | L2Entry::Zero { .. } => None,
        }
    }

    /// The compressed clusters in the order of the file, and how many L2 entries lead to each.
    pub(crate) fn packed_clusters(&self) -> &[(CompressedExtent, u64)] {
        &self.compressed
    }

    fn packed(&self, unit: u64) -> Option<(CompressedExtent, u64)> {
        let index = usize::try_from(unit.checked_sub(self.plain)?).ok()?;
        self.compressed.get(index).copied()
    }

    /// The L2 entries that lead to `unit`, those of the pool left out.
    pub(crate) fn users(&self, unit: u64) -> u64 {
        self.packed(unit).map_or_else(|| self.users.get(unit), |(_, users)| users)
    }

    /// The entry of a sharer of `unit`: without COPIED.
    pub(crate) fn entry(&self, unit: u64) -> L2Entry {
        match self.packed(unit) {
            Some((extent, _)) => L2Entry::Compressed(extent),
            None => L2Entry::Data { host: HostOffset(unit << self.bits.bits()), copied: false },
        }
    }

    /// The bytes of the file that `unit` takes.
    pub(crate) fn bytes(&self, unit: u64) -> Range<u64> {
        let (start, len) = match self.packed(unit) {
            Some((extent, _)) => (extent.host.0, extent.len()),
            None => (unit << self.bits.bits(), self.bits.bytes()),
        };
        start..start + len
    }

    /// The host clusters that `unit` touches: its references count on each.
    pub(crate) fn hosts(&self, unit: u64) -> Range<u64> {
        let bytes = self.bytes(unit);
        bytes.start >> self.bits.bits()..self.bits.clusters(bytes.end)
    }

    /// The units of `set` in the order of the file.
    pub(crate) fn in_file_order<'a>(&'a self, set: &'a Bits) -> impl Iterator<Item = u64> + 'a {
        let mut plain = set.iter().take_while(|&unit| unit < self.plain).peekable();
        let mut compressed = set.iter_from(self.plain).peekable();
        std::iter::from_fn(move || match (plain.peek(), compressed.peek()) {
            (Some(&a), Some(&b)) if self.bytes(a).start > self.bytes(b).start => compressed.next(),
            (None, _) => compressed.next(),
            _ => plain.next(),
        })
    }
}

/// Puts compressed clusters in order, and adds up what is said of the same one.
fn merge(compressed: &mut Vec<(CompressedExtent, u64)>) {
    compressed.sort_unstable_by_key(|(extent, _)| order(*extent));
    compressed.dedup_by(|(later, users), (first, sum)| {
        let same = later == first;
        *sum += if same { *users } else { 0 };
        same
    });
}

/// Compressed units are in this order.
pub(crate) fn order(extent: CompressedExtent) -> (u64, u64) {
    (extent.host.0, extent.more_sectors)
}

/// The content of units, read from the file.
pub(crate) struct Content<'a> {
    pub(crate) storage: &'a dyn Storage,
    pub(crate) header: &'a Header,
    pub(crate) units: &'a Units,
}

impl Clusters for Content<'_> {
    fn cluster_bits(&self) -> ClusterBits {
        self.units.bits
    }

    fn in_order(&self) -> Box<dyn ReadClusters + '_> {
        Box::new(UnitReader { content: self, inflater: Inflater::default() })
    }

    fn at_random(&self) -> Box<dyn ReadClusters + '_> {
        self.in_order()
    }
}

struct UnitReader<'a> {
    content: &'a Content<'a>,
    inflater: Inflater,
}

impl ReadClusters for UnitReader<'_> {
    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<()> {
        let Content { storage, header, units } = *self.content;
        let bits = units.bits;
        let plain = units.plain.saturating_sub(first).min((buffer.len() >> bits.bits()) as u64);
        let (run, packed) = buffer.split_at_mut(to_usize(plain << bits.bits()));
        if !run.is_empty() {
            let at = first << bits.bits();
            read_padded(storage, run, at).reading(Table::Data, at)?;
        }
        for (unit, cluster) in (first + plain..).zip(packed.chunks_exact_mut(bits.len())) {
            let (extent, _) = units.packed(unit).or_internal("a unit has no place in the file")?;
            cluster.copy_from_slice(self.inflater.cluster(storage, header, 0, extent)?);
        }
        Ok(())
    }
}
