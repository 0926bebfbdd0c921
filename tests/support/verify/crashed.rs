//! Is this image, in whatever state a command was cut off, harmless, and is it sound after a repair?

use super::references;
use super::survey::{Stored, Survey};
use crate::support::reader::Image;
use std::collections::BTreeSet;
use std::path::Path;

/// What there must be of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// All of it, in order.
    Whole,
    /// Its references. The order of its members, and its directory, are the next command's business.
    References,
    /// Nothing.
    Nothing,
}

/// I3: the order of writes alone decides what is safe. Verifies an image as a power failure left it: no writer that takes it as it
/// is can do harm, and every cluster that several guest clusters of a layer use is pooled, so that it stays clean once repaired.
#[track_caller]
pub(crate) fn verify_crashed(path: &Path, left: Left) {
    harmless(&Image::open_still(path), path, left);
}

/// The same; returns how many L2 tables of the pool have members, where the pool is to be whole.
#[track_caller]
fn harmless(image: &Image, path: &Path, left: Left) -> Option<u64> {
    let survey = if left == Left::Whole { Survey::of(path) } else { Survey::without_pool(path) };
    let member_tables = survey.pool.as_ref().map(|pool| pool.member_tables);
    references::verify_harmless(image, member_tables);
    let members: BTreeSet<u64> = match left {
        Left::Whole => survey.members().iter().copied().collect(),
        Left::References => {
            let pool = image.snapshots().0.into_iter().find(|snapshot| snapshot.name == "dedup-pool");
            let tables = pool.map(|pool| image.tables(pool.l1_table_offset, pool.l1_size));
            tables.into_iter().flatten().flat_map(|table| table.words).collect()
        }
        Left::Nothing => return member_tables,
    };
    let shared = |stored: &Stored| stored.most > 1;
    for (word, stored) in survey.stored.iter().filter(|(_, stored)| shared(stored)) {
        image.must(members.contains(word), || format!("{word:#x} is shared and not pooled: {stored:?}"));
    }
    member_tables
}

/// Verifies what a repair, or a finished command, leaves: every refcount and every COPIED flag exactly right, and not dirty.
#[track_caller]
pub(crate) fn verify_repaired(path: &Path, left: Left) {
    let image = Image::open_still(path);
    let member_tables = harmless(&image, path, left);
    image.must(image.header.incompatible & 3 == 0, || "dirty, or corrupt".into());
    let refcounts = references::verify_refcounts(&image, member_tables);
    references::verify_copied(&image, &refcounts);
}
