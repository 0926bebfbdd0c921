//! Looking at content: is it zero, what is its fingerprint, what is its name.

use sha2::{Digest, Sha256};

/// A SHA-256 digest: the name of a content, comparable across images, hosts and years.
pub(crate) type Sha = [u8; 32];

/// The SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> Sha {
    Sha256::digest(bytes).into()
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most clusters that are not zero show it at once.
    let (head, rest) = bytes.split_at(bytes.len().min(16));
    head.iter().all(|&b| b == 0) && {
        let (words, tail) = rest.as_chunks::<64>();
        // Words are joined without a branch in between, which the compiler turns into vector code.
        words.iter().all(|word| word.iter().fold(0, |any, &b| any | b) == 0) && tail.iter().all(|&b| b == 0)
    }
}

/// What is the same for equal contents, and hardly ever for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(u128);

impl Fingerprint {
    /// The first half of a SHA-256, where that is known or wanted instead.
    pub(crate) fn of_sha(sha: &Sha) -> Self {
        let [half, _]: [[u8; 16]; 2] = zerocopy::transmute!(*sha);
        Self(u128::from_be_bytes(half))
    }

    /// The first 64 bits.
    pub(crate) fn high(self) -> u64 {
        (self.0 >> 64) as u64
    }

    /// All of it.
    pub(crate) fn bits(self) -> u128 {
        self.0
    }
}

/// A fast 128-bit hash that finds candidates for sharing. It decides nothing (I4): equal fingerprints are compared byte by byte.
#[must_use]
pub fn fingerprint(bytes: &[u8]) -> Fingerprint {
    Fingerprint(twox_hash::XxHash3_128::oneshot(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for len in [1, 15, 16, 17, 63, 64, 80, 81, 512, 4096] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x10;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn sha256_is_the_standard_one() {
        assert_eq!(sha256(b"abc")[..4], [0xba, 0x78, 0x16, 0xbf]);
    }
}
