//! What `convert -n` must do, worked out slowly from bytes: which content the target has in the end, and what has to be written.

use super::inplace::{Left, verify_repaired};
use super::reader::{Image, Pin, Survey};
use super::verify::content;
use super::{Random, dedup_img, qemu, sha256_of};
use crate::args;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// The arguments of `convert -n` with further options.
pub(crate) fn words(options: &[&str], format: &str, source: &Path, target: &Path) -> Vec<OsString> {
    let words = args!["convert", "-n", "-f", format].into_iter().chain(options.iter().map(OsString::from));
    words.chain(args![source, target]).collect()
}

/// Writes a source into a target and returns the summary.
#[track_caller]
pub(crate) fn into(options: &[&str], format: &str, source: &Path, target: &Path) -> Value {
    let ran = dedup_img(words(&[options, &["--output", "json"]].concat(), format, source, target)).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

/// What must not change where nothing is to be done.
pub(crate) fn state(path: &Path) -> (String, SystemTime) {
    (sha256_of(path), path.metadata().unwrap().modified().unwrap())
}

/// What qemu-img reads from the disk, and then from each snapshot of the user's with its id and name.
pub(crate) fn layers(path: &Path) -> Vec<(String, Vec<u8>)> {
    let raw = path.with_extension("layer");
    let ids = qemu::snapshots(path).into_iter().filter(|(_, name)| name != "dedup-pool");
    let named = ids.map(|(id, name)| (format!("{id} {name}"), Some(format!("snapshot.id={id}"))));
    let all: Vec<(String, Option<String>)> = std::iter::once((String::new(), None)).chain(named).collect();
    let read = |(name, which): (String, Option<String>)| {
        let more: Vec<&str> = which.iter().flat_map(|which| ["-l", which.as_str()]).collect();
        qemu::convert("qcow2", path, "raw", &raw, &more);
        (name, fs::read(&raw).unwrap())
    };
    let layers = all.into_iter().map(read).collect();
    fs::remove_file(raw).unwrap();
    layers
}

/// What the independent reader reads from a disk without a backing file: faster than qemu-img where clusters are small.
pub(crate) fn read(path: &Path) -> Vec<u8> {
    let image = Image::open(path);
    let size = image.cluster_size() as usize;
    let mut disk = vec![0; (image.header.size as usize).next_multiple_of(size)];
    for (guest, word) in &Survey::without_pool(path).layers[0].map {
        disk[*guest as usize * size..][..size].copy_from_slice(&content(&image, *word));
    }
    disk.truncate(image.header.size as usize);
    disk
}

/// What the members of the pool hold.
pub(crate) fn pooled(path: &Path) -> Vec<Vec<u8>> {
    let (image, survey) = (Image::open(path), Survey::of(path));
    survey.members().iter().map(|word| content(&image, *word)).collect()
}

/// Makes disks of other ones, of what else is there, and of what is new.
pub(crate) struct Mixer<'a> {
    pub(crate) random: Random,
    /// Bytes of a cluster.
    grain: usize,
    /// Contents of clusters to take.
    contents: Vec<&'a [u8]>,
}

impl<'a> Mixer<'a> {
    /// Takes clusters of `grain` bytes from `disks`, and `contents`.
    pub(crate) fn new(seed: u64, grain: u64, disks: &[&'a [u8]], contents: &'a [Vec<u8>]) -> Self {
        let clusters = disks.iter().flat_map(|disk| disk.chunks(grain as usize));
        let clusters = clusters.filter(|bytes| bytes.len() as u64 == grain && bytes.iter().any(|byte| *byte != 0));
        // What is rare comes often enough.
        let rare = contents.iter().cycle().take(contents.len().max(60)).map(Vec::as_slice);
        Self { random: Random::new(seed), grain: grain as usize, contents: clusters.chain(rare).collect() }
    }

    /// A changed copy: of the clusters with data one in `data` is another one, of those with zeros one in `zeros`; and some bytes
    /// change that are no clusters.
    pub(crate) fn changed(&mut self, disk: &[u8], data: u64, zeros: u64) -> Vec<u8> {
        let again: Vec<Vec<u8>> = (0..3).map(|_| self.random.bytes(self.grain)).collect();
        let mut mixed = disk.to_vec();
        for cluster in mixed.chunks_mut(self.grain) {
            let one_in = if cluster.iter().all(|byte| *byte == 0) { zeros } else { data };
            if self.random.below(one_in) == 0 {
                self.change(cluster, &again);
            }
        }
        for _ in 0..4 {
            let length = (1 + self.random.below(700)).min(mixed.len() as u64);
            let at = self.random.below(mixed.len() as u64 + 1 - length) as usize;
            self.random.fill(&mut mixed[at..at + length as usize]);
        }
        mixed
    }

    fn change(&mut self, cluster: &mut [u8], again: &[Vec<u8>]) {
        let length = cluster.len();
        let put = |cluster: &mut [u8], bytes: &[u8]| {
            let length = length.min(bytes.len());
            cluster.fill(0);
            cluster[..length].copy_from_slice(&bytes[..length]);
        };
        match self.random.below(10) {
            0 => cluster.fill(0),
            1 => self.random.fill(cluster),
            2 | 3 => put(cluster, &again[self.random.below(3) as usize]),
            4..8 if !self.contents.is_empty() => {
                put(cluster, self.contents[self.random.below(self.contents.len() as u64) as usize]);
            }
            8 => {
                let sector = self.random.below((length as u64).div_ceil(512)) as usize * 512;
                self.random.fill(&mut cluster[sector..length.min(sector + 512)]);
            }
            _ => put(cluster, &[1 + self.random.below(2) as u8; 512]),
        }
    }
}

/// The disk in the end: the source, of which a raw one is filled up to a sector, and what the target has behind it.
pub(crate) fn expected(source: &[u8], old: &[u8]) -> Vec<u8> {
    let mut bytes = source.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    assert!(bytes.len() <= old.len());
    bytes.extend(&old[bytes.len()..]);
    bytes
}

/// What is known of the target's pool and its limits before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// There is none, or it is sound.
    Sound,
    /// There is one whose directory is lost.
    Stale,
    /// Clusters are shared that no pool holds.
    Unpooled,
}

/// What was done, counted from bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) unchanged: u64,
    pub(crate) zeroed: u64,
    pub(crate) changed: u64,
    /// Changed clusters whose content the image has.
    pub(crate) reused: u64,
    /// Contents that it does not have.
    pub(crate) written: u64,
}

impl Count {
    /// Counts what must happen to a disk that reads `old` and is to read `new` in the first `length` bytes. The clusters in `mapped`
    /// lie in the image, which also has the contents `pool`.
    pub(crate) fn of(
        (old, new, length): (&[u8], &[u8], usize),
        size: usize,
        mapped: &BTreeMap<u64, u64>,
        pool: &[Vec<u8>],
    ) -> Self {
        let cluster = |disk: &[u8], n: usize| {
            let mut bytes = disk[n * size..disk.len().min((n + 1) * size)].to_vec();
            bytes.resize(size, 0);
            bytes
        };
        let zero = vec![0; size];
        let (mut count, mut changed) = (Self::default(), Vec::new());
        let mut has: BTreeSet<Vec<u8>> = pool.iter().cloned().collect();
        for n in 0..length.div_ceil(size) {
            let (was, is) = (cluster(old, n), cluster(new, n));
            match (was == is, is == zero) {
                (true, true) => {}
                (true, false) => {
                    count.unchanged += 1;
                    // The cluster in which the disk ends may hold more than what is read.
                    if mapped.contains_key(&(n as u64)) && (n + 1) * size <= old.len() {
                        has.insert(is);
                    }
                }
                (false, true) => count.zeroed += 1,
                (false, false) => changed.push(is),
            }
        }
        count.changed = changed.len() as u64;
        count.reused = changed.iter().filter(|content| has.contains(*content)).count() as u64;
        count.written = changed.iter().filter(|content| !has.contains(*content)).collect::<BTreeSet<_>>().len() as u64;
        count
    }

    /// What the summary says.
    #[track_caller]
    pub(crate) fn told(summary: &Value) -> Self {
        let number = |key: &str| summary[key].as_u64().unwrap_or_else(|| panic!("no {key} in {summary:#}"));
        Self {
            unchanged: number("unchanged_clusters"),
            zeroed: number("zeroed_clusters"),
            changed: number("changed_clusters"),
            reused: number("reused_clusters"),
            written: number("written_clusters"),
        }
    }
}

/// Writes a source into a target, and demands all that holds of that whatever they are: the disk reads the source and snapshots what
/// they did, what is stored is what has to be, nothing was written where it lay, stock QEMU, `check --data` and the independent reader
/// find nothing, and doing it again touches nothing. Returns the summary.
#[track_caller]
pub(crate) fn judged(target: &Path, format: &str, source: &Path, raw: &[u8], before: Before, pin: Pin) -> Value {
    let old = layers(target);
    let survey = |path: &Path| if before == Before::Sound { Survey::of(path) } else { Survey::without_pool(path) };
    let was = survey(target);
    let contents = was.contents(was.stored.keys().copied());
    let pool = if before == Before::Stale { Vec::new() } else { pooled(target) };
    let due = expected(raw, &old[0].1);
    let size = was.cluster_size as usize;
    let counted = Count::of((&old[0].1, &due, raw.len()), size, &was.layers[0].map, &pool);

    let options: &[&str] = if pin == Pin::All { &["--pin", "all"] } else { &[] };
    let unwritten = state(target);
    let summary = into(options, format, source, target);
    let new = layers(target);
    assert_eq!(old.len(), new.len(), "snapshots");
    assert!(new[0].1.len() == due.len(), "the disk has {} bytes, {} are due", new[0].1.len(), due.len());
    let wrong = (0..due.len().div_ceil(512)).find(|n| new[0].1.chunks(512).nth(*n) != due.chunks(512).nth(*n));
    assert!(new[0].1 == due, "the disk reads otherwise at sector {wrong:?}: {summary:#}");
    for ((name, was), (also, is)) in old.iter().zip(&new).skip(1) {
        assert!(name == also && was == is, "snapshot {name} has changed: {summary:#}");
    }

    let told = Count::told(&summary);
    let limited = was.refcount_bits < 16 || before == Before::Stale;
    if limited {
        let of = |count: &Count| (count.unchanged, count.zeroed, count.changed);
        assert_eq!(of(&told), of(&counted), "{summary:#}");
        assert!(told.written >= counted.written || before == Before::Stale, "{counted:?}: {summary:#}");
    } else {
        assert_eq!(told, counted, "told and counted: {summary:#}");
    }
    let changes = counted.zeroed + counted.changed > 0;
    assert_eq!(summary["changed"], changes, "{summary:#}");
    assert_eq!(state(target) == unwritten, !changes, "{summary:#}");

    qemu::check_clean(target);
    dedup_img(args!["check", "--data", target]).ok();
    let after = match before {
        Before::Sound => Survey::of(target),
        Before::Stale if changes => Survey::of(target),
        _ => Survey::without_pool(target),
    };
    if changes {
        verify_repaired(target, if before == Before::Unpooled { Left::Nothing } else { Left::Whole });
    }
    assert_eq!(after.snapshots, was.snapshots);
    assert!(after.bitmaps == was.bitmaps, "the bitmaps have changed");
    never_in_place(&was, &contents, &after);
    let length = u64::try_from(raw.len().div_ceil(size)).unwrap();
    for guest in 0..length {
        let at = guest as usize * size..((guest as usize + 1) * size).min(due.len());
        if old[0].1[at.clone()] == due[at] {
            let place = |survey: &Survey| survey.layers[0].map.get(&guest).copied();
            assert_eq!(place(&was), place(&after), "guest cluster {guest} did not change, and has moved");
        }
    }
    if before == Before::Sound {
        members(&was, &after, pin);
    }

    let done = state(target);
    for options in [&[][..], &["--threads", "1", "--pin", "all"]] {
        let again = into(options, format, source, target);
        let due = Count { unchanged: told.unchanged + told.changed, ..Count::default() };
        assert_eq!(Count::told(&again), due, "the second time: {again:#}");
        assert_eq!((&again["changed"], state(target)), (&false.into(), done.clone()), "{again:#}");
    }
    summary
}

/// Whatever was used and still is holds what it did.
fn never_in_place(was: &Survey, contents: &BTreeMap<u64, Option<[u8; 32]>>, after: &Survey) {
    let kept: Vec<u64> = was.stored.keys().copied().filter(|word| after.stored.contains_key(word)).collect();
    for (word, name) in after.contents(kept) {
        assert_eq!(contents[&word], name, "{word:#x} was used and was written");
    }
}

/// The members are those that were, and what has two users from now on, or with [`Pin::All`] what is new; and each record is true.
fn members(was: &Survey, after: &Survey, pin: Pin) {
    let [old, new] = [was, after].map(|survey| survey.members().iter().copied().collect::<BTreeSet<u64>>());
    assert!(old.is_subset(&new), "members have gone: {:x?}", old.difference(&new));
    for (word, stored) in &after.stored {
        let fresh = !was.stored.contains_key(word) && !old.contains(word);
        let due = old.contains(word) || stored.most > 1 || pin == Pin::All && fresh;
        assert_eq!(new.contains(word), due, "{word:#x}: member or not? {stored:?}");
        let limit = (1 << (after.refcount_bits - 2)) - 1;
        let most = was.stored.get(word).map_or(0, |stored| stored.references).max(limit);
        assert!(stored.references <= most, "{word:#x} has {stored:?}, {limit} are allowed");
    }
    for (word, name) in after.contents(new.iter().copied()) {
        let (sha, offset, flags) = after.record(word).unwrap();
        assert_eq!(Some(sha), name, "member {word:#x} has another content than its record says");
        let lowest = was.stored.get(&word).or(after.stored.get(&word)).and_then(|stored| stored.guests.first());
        let due = match was.record(word) {
            Some((_, offset, _)) => offset,
            None => lowest.unwrap() * after.cluster_size,
        };
        assert!(offset == due && flags <= 1, "member {word:#x}: guest offset {offset:#x}, {due:#x} is due; {flags:#x}");
    }
}
