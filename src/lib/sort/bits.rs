//! A set of numbers that also tells which one in the set each is.

use crate::units::to_usize;

/// Words between two stored ranks.
const STEP: usize = 8;

/// Numbers below a limit that is mostly known before, one bit each.
pub(crate) struct Bits {
    words: Vec<u64>,
    len: u64,
}

impl Bits {
    /// The empty set of numbers below `limit`.
    pub(crate) fn new(limit: u64) -> Self {
        Self { words: vec![0; to_usize(limit.div_ceil(64))], len: 0 }
    }

    fn place(number: u64) -> (usize, u64) {
        (to_usize(number / 64), 1 << (number % 64))
    }

    /// Adds `number`. Above the limit it makes the set larger: a number is never lost.
    pub(crate) fn insert(&mut self, number: u64) {
        let (at, bit) = Self::place(number);
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        if let Some(word) = self.words.get_mut(at).filter(|word| **word & bit == 0) {
            *word |= bit;
            self.len += 1;
        }
    }

    /// Takes `number` out.
    pub(crate) fn remove(&mut self, number: u64) {
        let (at, bit) = Self::place(number);
        if let Some(word) = self.words.get_mut(at).filter(|word| **word & bit != 0) {
            *word &= !bit;
            self.len -= 1;
        }
    }

    /// Whether `number` is in the set.
    pub(crate) fn contains(&self, number: u64) -> bool {
        let (at, bit) = Self::place(number);
        self.words.get(at).is_some_and(|word| word & bit != 0)
    }

    /// How many numbers there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The numbers in ascending order, from `start` on.
    pub(crate) fn iter_from(&self, start: u64) -> impl Iterator<Item = u64> + '_ {
        let (first, bit) = Self::place(start);
        self.words.get(first..).unwrap_or_default().iter().zip(start / 64..).flat_map(move |(&word, at)| {
            let mut rest = if at * 64 < start { word & !(bit - 1) } else { word };
            std::iter::from_fn(move || {
                let lowest = rest.trailing_zeros();
                (rest != 0).then(|| {
                    rest &= rest - 1;
                    at * 64 + u64::from(lowest)
                })
            })
        })
    }

    /// The numbers in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter_from(0)
    }

    /// The first of `count` numbers in a row, from `start` on.
    pub(crate) fn run_from(&self, start: u64, count: u64) -> Option<u64> {
        let mut run = 0..0;
        for number in self.iter_from(start) {
            run = if run.end == number { run.start..number + 1 } else { number..number + 1 };
            if run.end - run.start == count {
                return Some(run.start);
            }
        }
        None
    }

    /// The numbers that `keep` accepts, with the same limit.
    pub(crate) fn filtered(&self, keep: impl Fn(&u64) -> bool) -> Self {
        let mut kept = Self { words: vec![0; self.words.len()], len: 0 };
        self.iter().filter(keep).for_each(|number| kept.insert(number));
        kept
    }

    /// The set, ready to be asked for ranks.
    pub(crate) fn ranked(self) -> Ranked {
        let mut ranks = Vec::with_capacity(self.words.len() / STEP + 1);
        let mut before = 0;
        for step in self.words.chunks(STEP) {
            ranks.push(before);
            before += step.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ranked { bits: self, ranks }
    }
}

/// A set that no longer changes.
pub(crate) struct Ranked {
    bits: Bits,
    /// How many numbers come before every `STEP` words.
    ranks: Vec<u64>,
}

impl Ranked {
    /// The numbers.
    pub(crate) fn bits(&self) -> &Bits {
        &self.bits
    }

    /// How many numbers of the set come before `number`, if that is in the set.
    pub(crate) fn rank(&self, number: u64) -> Option<u64> {
        let (at, bit) = Bits::place(number);
        let words = &self.bits.words;
        let word = words.get(at).filter(|word| **word & bit != 0)?;
        let step = at / STEP;
        let between = words.get(step * STEP..at)?.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        Some(self.ranks.get(step)? + between + u64::from((word & (bit - 1)).count_ones()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn ranks_and_order_are_those_of_a_sorted_set(
            numbers in proptest::collection::btree_set(0u64..5000, 0..300), start in 0u64..5000,
        ) {
            let mut bits = Bits::new(5000);
            numbers.iter().chain(&numbers).for_each(|&number| bits.insert(number));
            prop_assert_eq!(bits.len(), numbers.len() as u64);
            prop_assert_eq!(bits.iter().collect::<BTreeSet<_>>(), numbers.clone());
            prop_assert!(bits.iter_from(start).eq(numbers.range(start..).copied()));
            let ranked = bits.ranked();
            for (number, rank) in numbers.iter().zip(0..) {
                prop_assert_eq!(ranked.rank(*number), Some(rank));
                prop_assert_eq!(ranked.rank(number + 1).is_some(), numbers.contains(&(number + 1)));
            }
        }
    }
}
