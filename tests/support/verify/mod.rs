//! Is this file what the design promises? Structure, every refcount, every COPIED flag, the pool and its directory, all judged
//! with the independent reader.

mod bitmaps;
mod crashed;
mod deduped;
mod pool;
mod references;
mod survey;

use super::reader::{Entry, Image};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub(crate) use crashed::{Left, verify_crashed, verify_repaired};
pub(crate) use deduped::verify_deduped;
pub(crate) use survey::{Survey, content};

/// Which clusters the pool is expected to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pin {
    /// Those with two or more sharers.
    Shared,
    /// Every data cluster.
    All,
}

/// What was found in an image that passed.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Virtual size in bytes.
    pub(crate) virtual_size: u64,
    /// Bytes of a cluster.
    pub(crate) cluster_size: u64,
    /// Width of a refcount.
    pub(crate) refcount_bits: u32,
    /// Guest clusters of the active layer that point at data.
    pub(crate) mapped: u64,
    /// Guest clusters of the active layer that carry the zero flag.
    pub(crate) zero_flagged: u64,
    /// Host clusters of the active layer: offset and number of sharers.
    pub(crate) sharers: BTreeMap<u64, u64>,
    /// Members of the pool, ascending.
    pub(crate) members: Vec<u64>,
    /// Members that take no more sharers.
    pub(crate) retired: u64,
    /// Length of the file in bytes.
    pub(crate) file_length: u64,
}

impl Facts {
    /// Distinct host clusters that hold data of the active layer.
    pub(crate) fn data_clusters(&self) -> u64 {
        self.sharers.len() as u64
    }

    /// Data clusters with two or more sharers.
    pub(crate) fn shared(&self) -> u64 {
        self.sharers.values().filter(|count| **count >= 2).count() as u64
    }
}

/// Verifies a fresh deduplicated image: everything that the format and the design demand of the file that `create` and
/// `convert` have just written. Panics with a sentence that names what is wrong.
#[track_caller]
pub(crate) fn verify_dedup(path: &Path, pin: Pin) -> Facts {
    let image = Image::open_still(path);
    let header = &image.header;
    image.must(header.version == 3, || format!("version {} where 3 is due", header.version));
    image.must(header.crypt_method == 0 && header.autoclear == 0 && header.compatible & !1 == 0, || {
        format!("unexpected features: {header:?}")
    });
    image.must(header.incompatible & !8 == 0, || format!("incompatible features {:#x}", header.incompatible));
    image.must(header.header_length.is_multiple_of(8) && header.header_length >= 104, || format!("{header:?}"));
    let known = [0xe279_2aca, 0x6803_f857];
    let unknown = image.extensions().into_iter().find(|(kind, _)| !known.contains(kind));
    image.must(unknown.is_none(), || format!("a header extension that the design has no need for: {unknown:x?}"));
    for (what, at) in [("L1 table", header.l1_table_offset), ("snapshot table", header.snapshots_offset)] {
        image.aligned(what, at);
    }
    let (snapshots, _) = image.snapshots();
    image.must(snapshots.len() == 1, || format!("{} snapshots where only the pool is due", snapshots.len()));
    let pool = &snapshots[0];
    pool::verify_snapshot(&image, pool, "1");
    let mut facts = active_facts(&image);
    let directory = pool::read_directory(&image, pool);
    facts.members.clone_from(&directory.members);
    let refcounts = references::verify_refcounts(&image, Some(directory.member_tables));
    references::verify_copied(&image, &refcounts);
    pool::verify_members(&image, &facts, &refcounts, pin);
    pool::verify_records(&image, &directory, &mut facts);
    facts
}

/// Verifies an image that nothing is shared in: every refcount and COPIED flag, no snapshot, and each data cluster with a single
/// user. Uncompressed ones have a host cluster of their own.
#[track_caller]
pub(crate) fn verify_plain(path: &Path) -> Survey {
    let (image, survey) = (Image::open_still(path), Survey::of(path));
    let header = &image.header;
    image.must(header.version == 3 && header.incompatible & !8 == 0, || format!("unexpected features: {header:?}"));
    image.must((header.nb_snapshots, header.snapshots_offset) == (0, 0), || format!("a snapshot table: {header:?}"));
    let refcounts = references::verify_refcounts(&image, None);
    references::verify_copied(&image, &refcounts);
    for (word, stored) in &survey.stored {
        image.must(stored.references == 1, || format!("{word:#x} has more than one user: {stored:?}"));
        let count = refcounts[(survey.host(*word) / survey.cluster_size) as usize];
        image.must(count == 1 || word >> 62 == 1, || format!("{word:#x} has refcount {count}"));
    }
    survey
}

/// Verifies a fresh deduplicated image that may have compressed clusters: every refcount and COPIED flag, each content stored once,
/// those with two or more users in the pool and no others, each as its SHA-256 says.
#[track_caller]
pub(crate) fn verify_packed(path: &Path) -> Survey {
    let (image, survey) = (Image::open_still(path), Survey::of(path));
    let pool = survey.pool.as_ref().expect("a pool");
    let refcounts = references::verify_refcounts(&image, Some(pool.member_tables));
    references::verify_copied(&image, &refcounts);
    let contents = survey.contents(survey.stored.keys().copied());
    let distinct: BTreeSet<_> = contents.values().collect();
    image.must(distinct.len() == contents.len(), || "a content is stored twice".into());
    let shared = survey.stored.iter().filter(|(_, stored)| stored.references > 1).map(|(word, _)| *word);
    image.must(shared.eq(survey.members().iter().copied().collect::<BTreeSet<_>>()), || {
        "the pool does not hold just what is shared".into()
    });
    for word in survey.members() {
        let (sha, _, _) = survey.record(*word).unwrap();
        image.must(contents[word] == Some(sha), || format!("member {word:#x} does not match its SHA-256"));
    }
    survey
}

/// Counts what the active layer maps, and how often.
fn active_facts(image: &Image) -> Facts {
    let size = image.cluster_size();
    let guest_clusters = image.header.size.div_ceil(size);
    let (mut sharers, mut mapped, mut zero_flagged) = (BTreeMap::new(), 0, 0);
    for table in image.active() {
        for (slot, entry) in table.entries.iter().enumerate() {
            let guest = table.index * image.l2_entries() + slot as u64;
            image.must(guest < guest_clusters || *entry == Entry::Unallocated, || {
                format!("guest cluster {guest} is mapped behind the end of the disk")
            });
            match entry {
                Entry::Data { host, .. } => {
                    *sharers.entry(*host).or_insert(0) += 1;
                    mapped += 1;
                }
                Entry::Zero(kept) => {
                    image.must(kept.is_none(), || format!("guest cluster {guest} is zero and yet keeps {kept:x?}"));
                    zero_flagged += 1;
                }
                Entry::Compressed { .. } => image.must(false, || format!("guest cluster {guest} is compressed")),
                Entry::Unallocated => {}
            }
        }
    }
    Facts {
        virtual_size: image.header.size,
        cluster_size: size,
        refcount_bits: 1 << image.header.refcount_order,
        mapped,
        zero_flagged,
        sharers,
        members: Vec::new(),
        retired: 0,
        file_length: image.length,
    }
}
