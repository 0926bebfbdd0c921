//! Is this image, whatever it held before, what `dedup` promises?

use super::survey::Survey;
use super::{Pin, references};
use crate::support::reader::Image;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Verifies an image that `dedup` has just worked on, knowing what it was `before`: structure, every refcount, every COPIED flag,
/// the pool and its directory, nothing stored twice, and all that is the user's as it was but for where it is stored.
#[track_caller]
pub(crate) fn verify_deduped(path: &Path, pin: Pin, before: &Survey) -> Survey {
    let (image, after) = (Image::open_still(path), Survey::of(path));
    image.must(image.header.incompatible & 3 == 0, || "dirty, or corrupt".into());
    image.must(after.pool.is_none() || after.version == 3, || "a pool in an image of version 2".into());
    image.must(after.snapshots == before.snapshots, || {
        format!("the user's snapshots were\n{}\nand are\n{}", before.snapshots.join("\n"), after.snapshots.join("\n"))
    });
    image.must(after.bitmaps == before.bitmaps, || "the bitmaps have changed".into());
    image.must(after.kept_zeros == 0, || format!("{} zero clusters keep a place in the file", after.kept_zeros));
    let refcounts = references::verify_refcounts(&image, after.pool.as_ref().map(|pool| pool.member_tables));
    references::verify_copied(&image, &refcounts);
    let contents = after.contents(after.stored.keys().copied());
    let zero = contents.iter().find(|(_, name)| name.is_none());
    image.must(zero.is_none(), || format!("a data cluster holds zeros: {zero:x?}"));
    verify_sharing(&image, &contents, before, &after);
    verify_place(&image, before, &after);
    verify_members(&image, pin, before, &after);
    verify_records(&image, before, &after);
    after
}

/// No two clusters hold the same, unless the sharer limit keeps them apart; and nothing was shared beyond the limit.
fn verify_sharing(image: &Image, contents: &BTreeMap<u64, Option<[u8; 32]>>, before: &Survey, after: &Survey) {
    let limit = limit(after);
    let mut equal: BTreeMap<_, Vec<(u64, u64)>> = BTreeMap::new();
    for (word, stored) in &after.stored {
        let most = before.stored.get(word).map_or(0, |stored| stored.references).max(limit);
        image.must(stored.references <= most, || format!("{word:#x} is shared more than {limit} ways: {stored:?}"));
        equal.entry(contents[word]).or_default().push((stored.references, *word));
    }
    for mut copies in equal.into_values() {
        copies.sort_unstable();
        if let [first, second, ..] = copies[..] {
            let told =
                || format!("the same is stored at {:#x} and {:#x} for {} and {}", first.1, second.1, first.0, second.0);
            image.must(first.0 + second.0 > limit, told);
        }
    }
}

/// The sharers that leave room for the pool, two snapshots, and going back to one of them.
fn limit(survey: &Survey) -> u64 {
    (1 << (survey.refcount_bits - 2)) - 1
}

/// A new pool comes last in the snapshot table, with an id above all others; a renewed one is where it was.
fn verify_place(image: &Image, before: &Survey, after: &Survey) {
    let Some(pool) = &after.pool else {
        return image.must(before.pool.is_none(), || "the pool is gone".into());
    };
    if let Some(old) = &before.pool {
        return image.must(pool.place == old.place, || format!("the pool was {:?} and is {:?}", old.place, pool.place));
    }
    let (snapshots, _) = image.snapshots();
    let ids = snapshots.iter().filter(|snapshot| snapshot.name != "dedup-pool").map(|snapshot| &snapshot.id);
    let highest = ids.map(|id| id.parse::<u64>().unwrap()).max().unwrap_or(0);
    let due = (snapshots.len() - 1, (highest + 1).to_string());
    image.must(pool.place == due, || format!("the pool is {:?}, {due:?} is due", pool.place));
}

/// Every cluster that several guest clusters of one layer use is a member, and those that were members, unless another member has
/// the same content. None has become one that is neither used at two places nor took the place of another, unless all are to be.
fn verify_members(image: &Image, pin: Pin, before: &Survey, after: &Survey) {
    let old: BTreeSet<u64> = before.members().iter().copied().collect();
    let members: BTreeSet<u64> = after.members().iter().copied().collect();
    let names = |survey: &Survey, words: &mut dyn Iterator<Item = &u64>| -> BTreeSet<[u8; 32]> {
        words.map(|word| survey.record(*word).unwrap().0).collect()
    };
    let lost = names(before, &mut old.difference(&members));
    image.must(lost.is_subset(&names(after, &mut members.iter())), || {
        "the content of a member has left the pool".into()
    });
    let highest = u64::MAX >> (64 - after.refcount_bits);
    for (word, stored) in &after.stored {
        let due = (stored.most > 1 || pin == Pin::All) && stored.references < highest;
        image.must(!due || members.contains(word), || format!("{word:#x} is not pooled: {stored:?}"));
    }
    for member in members.difference(&old) {
        let (then, now) = (before.stored.get(member), after.stored.get(member));
        let gained = then.zip(now).is_some_and(|(then, now)| now.references > then.references);
        let due = now.is_some_and(|stored| stored.guests.len() > 1 || gained || pin == Pin::All);
        image.must(due, || format!("{member:#x} has become a member: {then:?}, {now:?}"));
    }
}

/// Each record holds the SHA-256 of its member's content and the lowest guest offset that mapped to it before it was shared, or the
/// one that an old member had.
fn verify_records(image: &Image, before: &Survey, after: &Survey) {
    let contents = after.contents(after.members().iter().copied());
    for word in after.members() {
        let (sha, offset, flags) = after.record(*word).unwrap();
        image.must(contents[word] == Some(sha), || format!("member {word:#x} does not match its SHA-256"));
        image.must(flags <= 1, || format!("member {word:#x} has flags {flags:#x}"));
        if let Some((_, old, _)) = before.record(*word) {
            image.must(offset == old, || format!("member {word:#x}: guest offset {offset:#x}, and it was {old:#x}"));
            continue;
        }
        let stored = &after.stored[word];
        let lowest = before.stored[word].guests.first().unwrap() * after.cluster_size;
        image.must(offset == lowest, || format!("member {word:#x}: guest offset {offset:#x}, not {lowest:#x}"));
        image.must(flags == 0 || stored.references >= limit(after), || {
            format!("member {word:#x} is retired: {stored:?}")
        });
    }
}
