//! Which cluster size is the best for a new image.

/// The cluster sizes that `auto` considers, as exponents, from the largest.
pub(crate) const CANDIDATES: [u32; 5] = [16, 15, 14, 13, 12];

/// Two file lengths are a near tie where they differ by less than one part in this many. The larger cluster then wins: it needs
/// less metadata in memory and fewer, longer I/O requests.
const NEAR_TIE: u64 = 50;

/// Whether a file of `length` bytes is better than the shortest of those with larger clusters.
pub(crate) fn is_better(length: u64, shortest: Option<u64>) -> bool {
    shortest.is_none_or(|shortest| length < shortest - shortest / NEAR_TIE)
}
