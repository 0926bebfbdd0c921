//! The entries of an L2 table, one after the other: the one place that knows how they lie in it.

use super::header::Header;
use super::table::L2Entry;

/// An entry as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its place in the table.
    pub(crate) index: u64,
    /// What says where its cluster is.
    pub(crate) word: u64,
    /// What says of each subcluster how it reads; 0 where there are none.
    pub(crate) subclusters: u64,
}

impl Slot {
    /// What it says about its cluster.
    #[must_use]
    pub(crate) fn entry(self, header: &Header) -> L2Entry {
        decode(header, self.word)
    }
}

/// What the first word of an entry says about its cluster.
#[must_use]
pub(crate) fn decode(header: &Header, word: u64) -> L2Entry {
    L2Entry::decode(word, header.cluster_bits, !header.extended_l2())
}

/// Words of an entry.
fn width(header: &Header) -> usize {
    if header.extended_l2() { 2 } else { 1 }
}

/// The entries in `table`, or in a part of it that begins with a whole one, as they are stored.
pub(crate) fn slots<'t>(header: &Header, table: &'t [u8]) -> impl Iterator<Item = Slot> + use<'t> {
    let words = table.as_chunks::<8>().0;
    let subclusters = words.get(1..).filter(|_| header.extended_l2()).unwrap_or_default();
    let step = width(header);
    let mut subclusters = subclusters.iter().step_by(step);
    words.iter().step_by(step).zip(0u64..).map(move |(word, index)| Slot {
        index,
        word: u64::from_be_bytes(*word),
        subclusters: subclusters.next().map_or(0, |word| u64::from_be_bytes(*word)),
    })
}

/// The entries in `table` with their index.
pub(crate) fn entries<'t>(header: &Header, table: &'t [u8]) -> impl Iterator<Item = (u64, L2Entry)> + use<'t> {
    let (bits, has_flag) = (header.cluster_bits, !header.extended_l2());
    let words = table.as_chunks::<8>().0.iter().step_by(width(header));
    words.zip(0u64..).map(move |(word, index)| (index, L2Entry::decode(u64::from_be_bytes(*word), bits, has_flag)))
}

/// Gives entries of `table` the first word that `new` says, which is told the old one; says whether any changed.
pub(crate) fn rewrite(header: &Header, table: &mut [u8], mut new: impl FnMut(u64, L2Entry) -> Option<u64>) -> bool {
    let mut changed = false;
    for slot in table.as_chunks_mut::<8>().0.iter_mut().step_by(width(header)) {
        let word = u64::from_be_bytes(*slot);
        if let Some(new) = new(word, decode(header, word)) {
            *slot = new.to_be_bytes();
            changed = true;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::incompatible;
    use crate::format::header::tests::sample;
    use crate::units::HostOffset;

    #[test]
    fn an_extended_entry_has_two_words() {
        let plain = Header { incompatible: 0, ..sample() };
        let extended = Header { incompatible: incompatible::EXTENDED_L2, ..sample() };
        let entry = L2Entry::Data { host: HostOffset(0x20000), copied: true };
        let word = entry.encode(plain.cluster_bits);
        let table = [word, 0xff].map(u64::to_be_bytes).concat();
        let found: Vec<_> = slots(&extended, &table).collect();
        assert_eq!(found, [Slot { index: 0, word, subclusters: 0xff }]);
        assert_eq!(entries(&extended, &table).collect::<Vec<_>>(), [(0, entry)]);
        let found: Vec<_> = slots(&plain, &table).collect();
        assert_eq!(found, [Slot { index: 0, word, subclusters: 0 }, Slot { index: 1, word: 0xff, subclusters: 0 }]);
    }
}
