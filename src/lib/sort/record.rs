//! Records that are stored and sorted as one word of 128 bits each.

use crate::units::{GuestCluster, HostCluster, RowPlace, StoredCluster};

/// What is packed into one word. The order of the packed words is the order of the fields, the first one before the others: sorting
/// needs to look at no more than the word.
pub trait Record: Copy + Send + Sync {
    /// The word.
    fn pack(self) -> u128;
    /// The inverse of [`Record::pack`].
    fn unpack(word: u128) -> Self;
}

/// A number, or what stands for one, as a part of a word.
pub(crate) trait Field: Copy {
    /// The number.
    fn number(self) -> u64;
    /// The inverse of [`Field::number`].
    fn of(number: u64) -> Self;
}

impl Field for u64 {
    fn number(self) -> u64 {
        self
    }

    fn of(number: u64) -> Self {
        number
    }
}

impl Field for bool {
    fn number(self) -> u64 {
        u64::from(self)
    }

    fn of(number: u64) -> Self {
        number != 0
    }
}

macro_rules! index {
    ($($name:ty),+) => {
        $(impl Field for $name {
            fn number(self) -> u64 {
                self.0
            }

            fn of(number: u64) -> Self {
                Self(number)
            }
        })+
    };
}

index!(GuestCluster, HostCluster, RowPlace, StoredCluster);

/// Half a SHA-256, which is never sorted.
impl Record for [u8; 16] {
    fn pack(self) -> u128 {
        u128::from_be_bytes(self)
    }

    fn unpack(word: u128) -> Self {
        word.to_be_bytes()
    }
}

/// A part of a word that was cut to no more than a number.
#[expect(clippy::cast_possible_truncation, reason = "what is cut off is zero")]
pub(super) fn to_number(part: u128) -> u64 {
    part as u64
}

/// The word with a field of `bits` bits behind what it has.
pub(crate) fn with(word: u128, field: impl Field, bits: u32) -> u128 {
    debug_assert!(field.number() <= u64::MAX >> (u64::BITS - bits), "{} has more than {bits} bits", field.number());
    word << bits | u128::from(field.number())
}

/// The field of `bits` bits that has `behind` bits behind it.
pub(crate) fn field<F: Field>(word: u128, behind: u32, bits: u32) -> F {
    F::of(to_number(word >> behind & (u128::MAX >> (u128::BITS - bits))))
}

/// Says in which order, and with how many bits each, the fields of a type make up its word. A type around another one gives that one an
/// order: what is sorted in it cannot be taken for what is sorted in another order. The name in front is that of its test.
macro_rules! record {
    ($test:ident: $name:ident { $($field:ident: $bits:expr),+ $(,)? }) => {
        $crate::sort::record::record!(@ $test, $name, $name, |record| record, |record| record, { $($field: $bits),+ });
    };
    ($test:ident: $name:ident($inner:ident) { $($field:ident: $bits:expr),+ $(,)? }) => {
        $crate::sort::record::record!(@ $test, $name, $inner, $name, |record| record.0, { $($field: $bits),+ });
    };
    (@ $test:ident, $name:ident, $inner:ident, $close:expr, $open:expr, { $($field:ident: $bits:expr),+ }) => {
        impl $crate::sort::record::Record for $name {
            fn pack(self) -> u128 {
                let open: fn(Self) -> $inner = $open;
                let $inner { $($field),+ } = open(self);
                let word = 0;
                $(let word = $crate::sort::record::with(word, $field, $bits);)+
                word
            }

            fn unpack(word: u128) -> Self {
                const ALL: u32 = 0 $(+ $bits)+;
                const { assert!(ALL <= u128::BITS, "more than a word") };
                let behind = ALL;
                $(
                    let behind = behind - $bits;
                    let $field = $crate::sort::record::field(word, behind, $bits);
                )+
                let _ = behind;
                let close: fn($inner) -> Self = $close;
                close($inner { $($field),+ })
            }
        }

        #[cfg(test)]
        impl $crate::sort::record::tests::Layout for $name {
            const BITS: &'static [u32] = &[$($bits),+];

            fn of(numbers: &[u64]) -> Self {
                let mut numbers = numbers.iter().copied();
                $(let $field = $crate::sort::record::Field::of(numbers.next().unwrap());)+
                let close: fn($inner) -> Self = $close;
                close($inner { $($field),+ })
            }

            fn numbers(self) -> Vec<u64> {
                let open: fn(Self) -> $inner = $open;
                let $inner { $($field),+ } = open(self);
                vec![$($crate::sort::record::Field::number($field)),+]
            }
        }

        #[cfg(test)]
        #[test]
        fn $test() {
            $crate::sort::record::tests::check::<$name>();
        }
    };
}
pub(crate) use record;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The fields of a record as numbers.
    pub(crate) trait Layout: Record {
        const BITS: &'static [u32];
        fn of(numbers: &[u64]) -> Self;
        fn numbers(self) -> Vec<u64>;
    }

    proptest! {
        #[test]
        fn half_a_name_is_its_bytes(first: [u8; 16], second: [u8; 16]) {
            prop_assert_eq!(<[u8; 16]>::unpack(first.pack()), first);
            prop_assert_eq!(first.pack().cmp(&second.pack()), first.cmp(&second));
        }
    }

    /// Checks that packing has an inverse and keeps the order, for pairs of records of which the first fields may be the same.
    pub(crate) fn check<T: Layout>() {
        let fitting = |numbers: [u64; 6]| -> Vec<u64> {
            numbers.iter().zip(T::BITS).map(|(number, bits)| number >> (u64::BITS - bits)).collect()
        };
        proptest!(|(first: [u64; 6], second: [u64; 6], same in 0usize..6)| {
            let (first, mut second) = (fitting(first), fitting(second));
            let same = same.min(second.len());
            second[..same].copy_from_slice(&first[..same]);
            let [a, b] = [&first, &second].map(|numbers| T::of(numbers).pack());
            prop_assert_eq!(&T::unpack(a).numbers(), &first);
            prop_assert_eq!(&T::unpack(b).numbers(), &second);
            prop_assert_eq!(a.cmp(&b), first.cmp(&second));
        });
    }
}
