//! Records of several words.

use std::marker::PhantomData;

use crate::error::{OrInternal, Result};
use crate::sort::record::Record;
use crate::sort::sequence::{Sequence, Spill, Words};

/// What takes several words. They are kept one behind the other and never sorted.
pub(crate) trait Wide: Copy {
    /// The records that it is made of.
    type Parts: Parts;
    /// What it is made of.
    fn parts(self) -> Self::Parts;
    /// The inverse of [`Wide::parts`].
    fn of(parts: Self::Parts) -> Self;
}

/// Several records.
pub(crate) trait Parts: Copy {
    /// Appends their words.
    fn push(self, words: &mut Sequence<Packed>) -> Result<()>;
    /// The next ones of `words`, of which `first` was taken already.
    fn next(first: Packed, words: &mut Words<'_, Packed>) -> Result<Self>;
}

/// A word that is a part of something.
#[derive(Clone, Copy)]
pub(crate) struct Packed(u128);

impl Record for Packed {
    fn pack(self) -> u128 {
        self.0
    }

    fn unpack(word: u128) -> Self {
        Self(word)
    }
}

fn next<T: Record>(words: &mut Words<'_, Packed>) -> Result<T> {
    let word = words.next().transpose()?.or_internal("a record of several words has too few")?;
    Ok(T::unpack(word.0))
}

impl<A: Record, B: Record, C: Record> Parts for (A, B, C) {
    fn push(self, words: &mut Sequence<Packed>) -> Result<()> {
        words.extend(&[self.0.pack(), self.1.pack(), self.2.pack()].map(Packed))
    }

    fn next(first: Packed, words: &mut Words<'_, Packed>) -> Result<Self> {
        Ok((A::unpack(first.0), next(words)?, next(words)?))
    }
}

/// Records of several words in the order in which they came.
pub(crate) struct WideSequence<T> {
    words: Sequence<Packed>,
    of: PhantomData<T>,
}

impl<T: Wide> WideSequence<T> {
    /// An empty sequence.
    pub(crate) fn new(spill: &Spill) -> Self {
        Self { words: Sequence::new(spill), of: PhantomData }
    }

    /// Appends a record.
    pub(crate) fn push(&mut self, record: T) -> Result<()> {
        record.parts().push(&mut self.words)
    }

    /// The records in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Result<T>> + '_ {
        let mut words = self.words.iter();
        std::iter::from_fn(move || {
            let first = words.next()?;
            Some(first.and_then(|first| T::Parts::next(first, &mut words)).map(T::of))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Three([u8; 16], [u8; 16], [u8; 16]);

    impl Wide for Three {
        type Parts = ([u8; 16], [u8; 16], [u8; 16]);

        fn parts(self) -> Self::Parts {
            (self.0, self.1, self.2)
        }

        fn of((a, b, c): Self::Parts) -> Self {
            Self(a, b, c)
        }
    }

    #[test]
    fn words_of_a_record_stay_together_where_they_are_spilled() {
        let directory = tempfile::tempdir().unwrap();
        let mut sequence = WideSequence::new(&Spill::new(0, directory.path()));
        let records: Vec<Three> = (0..5000u128).map(|n| Three(n.to_be_bytes(), (!n).to_be_bytes(), [7; 16])).collect();
        records.iter().for_each(|record| sequence.push(*record).unwrap());
        assert_eq!(sequence.iter().collect::<Result<Vec<_>>>().unwrap(), records);
    }
}
