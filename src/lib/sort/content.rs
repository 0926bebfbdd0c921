//! What a cluster is thought to hold, and which cluster that is, in one word.

use zerocopy::{Immutable, IntoBytes};

use crate::digest::Fingerprint;
use crate::sort::record::{Record, to_number};

/// Bits of a word that hold a cluster's index: enough for the largest disk that QEMU can map at any cluster size.
pub(crate) const INDEX_BITS: u32 = 40;
/// Masks a cluster index.
const INDEX: u128 = (1 << INDEX_BITS) - 1;

/// The name of a content and a cluster that has it; the name is what is sorted by first. It is kept as the word that it is sorted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(transparent)]
pub struct ContentAt(u128);

/// 88 bits of a fingerprint. They decide nothing (I4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(u128);

impl ContentAt {
    /// A record of `cluster`, which has less than 40 bits.
    #[must_use]
    pub fn new(fingerprint: Fingerprint, cluster: u64) -> Self {
        Self(fingerprint.bits() & !INDEX | u128::from(cluster))
    }

    /// The name.
    pub(crate) fn name(self) -> Name {
        Name(self.0 & !INDEX)
    }

    /// The cluster.
    pub(crate) fn cluster(self) -> u64 {
        to_number(self.0 & INDEX)
    }

    /// The same content at another place.
    pub(crate) fn at(self, cluster: u64) -> Self {
        Self(self.name().0 | u128::from(cluster))
    }
}

impl Record for ContentAt {
    fn pack(self) -> u128 {
        self.0
    }

    fn unpack(word: u128) -> Self {
        Self(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn named_words_have_the_order_of_name_and_cluster(
            contents in proptest::array::uniform2(0u8..3),
            clusters in proptest::array::uniform2(0u64..1 << INDEX_BITS),
        ) {
            let [a, b] = [0, 1].map(|n| ContentAt::new(crate::digest::fingerprint(&[contents[n]]), clusters[n]));
            prop_assert_eq!([a.cluster(), b.cluster()], clusters);
            prop_assert_eq!(ContentAt::unpack(a.pack()), a);
            prop_assert_eq!(a.pack().cmp(&b.pack()), (a.name(), clusters[0]).cmp(&(b.name(), clusters[1])));
            prop_assert_eq!(a.at(clusters[1]).name(), a.name());
            prop_assert_eq!(a.at(clusters[1]).cluster(), clusters[1]);
        }
    }
}
