//! What an image stores for all its layers, whatever it holds and whoever wrote it.

use super::bitmaps::{Bitmap, bitmaps};
use super::pool;
use crate::support::reader::{Entry, Image, Table, number};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

/// COPIED, which says nothing about content.
const COPIED: u64 = 1 << 63;

/// How a data cluster is used.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stored {
    /// L2 entries that point at it, counted as QEMU counts them: once for each L1 entry that leads to their table, the pool's left out.
    pub(crate) references: u64,
    /// The guest clusters that use it, in whatever layer.
    pub(crate) guests: BTreeSet<u64>,
    /// The most guest clusters that use it in one layer.
    pub(crate) most: u64,
}

/// The active layer, or a snapshot of the user's.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Name of the snapshot; nothing for the active layer.
    pub(crate) name: String,
    /// Guest clusters with data, and their L2 entries without COPIED.
    pub(crate) map: BTreeMap<u64, u64>,
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Place in the snapshot table, and id.
    pub(crate) place: (usize, String),
    /// L2 entries of the members.
    pub(crate) members: Vec<u64>,
    /// Their records.
    pub(crate) records: Vec<u8>,
    pub(super) member_tables: u64,
}

/// All that an image stores.
pub(crate) struct Survey {
    path: PathBuf,
    pub(crate) version: u32,
    pub(crate) cluster_size: u64,
    pub(crate) refcount_bits: u32,
    /// The active layer, then the user's snapshots in table order.
    pub(crate) layers: Vec<Layer>,
    /// Every data cluster that a layer uses, by its L2 entry without COPIED.
    pub(crate) stored: BTreeMap<u64, Stored>,
    /// Entries that read as zeros and yet keep a host cluster.
    pub(crate) kept_zeros: u64,
    /// Entries with the zero flag and nothing else.
    pub(crate) zero_flagged: u64,
    /// What the snapshot table says of the user's snapshots, but for the place of their L1 tables.
    pub(crate) snapshots: Vec<String>,
    pub(crate) bitmaps: Vec<Bitmap>,
    pub(crate) pool: Option<Pool>,
    pub(crate) file_length: u64,
}

impl Survey {
    /// Looks at an image. The pool, where there is one, must be sound; a snapshot of the user's must not have its name.
    #[track_caller]
    pub(crate) fn of(path: &Path) -> Self {
        Self::looked_at(path, true)
    }

    /// The same without a look at the pool.
    #[track_caller]
    pub(crate) fn without_pool(path: &Path) -> Self {
        Self::looked_at(path, false)
    }

    #[track_caller]
    fn looked_at(path: &Path, with_pool: bool) -> Self {
        let image = Image::open_still(path);
        let mut survey = Self {
            path: path.to_owned(),
            version: image.header.version,
            cluster_size: image.cluster_size(),
            refcount_bits: 1 << image.header.refcount_order,
            layers: Vec::new(),
            stored: BTreeMap::new(),
            kept_zeros: 0,
            zero_flagged: 0,
            snapshots: Vec::new(),
            bitmaps: bitmaps(&image).0,
            pool: None,
            file_length: image.length,
        };
        survey.layer("", &image.active(), image.l2_entries());
        for (at, mut snapshot) in image.snapshots().0.into_iter().enumerate() {
            if snapshot.name == "dedup-pool" {
                if !with_pool {
                    continue;
                }
                image.must(survey.pool.is_none(), || "there are two pools".into());
                pool::verify_snapshot(&image, &snapshot, &snapshot.id);
                let directory = pool::read_directory(&image, &snapshot);
                survey.pool = Some(Pool {
                    place: (at, snapshot.id),
                    members: directory.members,
                    records: directory.records,
                    member_tables: directory.member_tables,
                });
                continue;
            }
            let tables = image.tables(snapshot.l1_table_offset, snapshot.l1_size);
            survey.layer(&snapshot.name, &tables, image.l2_entries());
            snapshot.l1_table_offset = 0;
            survey.snapshots.push(format!("{snapshot:?}"));
        }
        survey
    }

    /// Counts what one layer uses.
    fn layer(&mut self, name: &str, tables: &[Table], l2_entries: u64) {
        let (mut map, mut times) = (BTreeMap::new(), BTreeMap::new());
        for table in tables {
            for (slot, (entry, word)) in table.entries.iter().zip(&table.words).enumerate() {
                let (guest, word) = (table.index * l2_entries + slot as u64, word & !COPIED);
                match entry {
                    Entry::Data { .. } | Entry::Compressed { .. } => {}
                    Entry::Zero(kept) => {
                        self.kept_zeros += u64::from(kept.is_some());
                        self.zero_flagged += u64::from(kept.is_none());
                        continue;
                    }
                    Entry::Unallocated => continue,
                }
                map.insert(guest, word);
                *times.entry(word).or_insert(0) += 1;
                let stored = self.stored.entry(word).or_default();
                stored.references += 1;
                stored.guests.insert(guest);
            }
        }
        for (word, times) in times {
            let stored = self.stored.get_mut(&word).unwrap();
            stored.most = stored.most.max(times);
        }
        self.layers.push(Layer { name: name.to_owned(), map });
    }

    /// The members of the pool.
    pub(crate) fn members(&self) -> &[u64] {
        self.pool.as_ref().map_or(&[], |pool| &pool.members)
    }

    /// The record of a member: the SHA-256, the lowest guest offset, the flags.
    pub(crate) fn record(&self, word: u64) -> Option<([u8; 32], u64, u64)> {
        let pool = self.pool.as_ref()?;
        let at = 40 * pool.members.binary_search_by_key(&self.host(word), |member| self.host(*member)).ok()?;
        let last = (pool.members[at / 40] == word).then(|| number(&pool.records, at + 32, 8))?;
        Some((pool.records[at..at + 32].try_into().unwrap(), last & !0x1ff, last & 0x1ff))
    }

    /// Where the bytes of a data cluster begin.
    pub(crate) fn host(&self, word: u64) -> u64 {
        pool::host_of(self.cluster_size.ilog2(), word)
    }

    /// SHA-256 of what each cluster given holds, decompressed; nothing for zeros.
    pub(crate) fn contents(&self, words: impl IntoIterator<Item = u64>) -> BTreeMap<u64, Option<[u8; 32]>> {
        let image = Image::open_still(&self.path);
        let name = |word| {
            let bytes = content(&image, word);
            bytes.iter().any(|byte| *byte != 0).then(|| Sha256::digest(&bytes).into())
        };
        words.into_iter().map(|word| (word, name(word))).collect()
    }
}

/// The bytes of the cluster that an L2 entry without flags names.
pub(crate) fn content(image: &Image, word: u64) -> Vec<u8> {
    let (size, host) = (image.cluster_size(), pool::host_of(image.header.cluster_bits, word));
    // The file may end within its last cluster, and reads as zeros from there on.
    let held = |length: u64| image.read(host, length.min(image.length.saturating_sub(host)));
    if word >> 62 & 1 == 0 {
        let mut bytes = held(size);
        bytes.resize(size as usize, 0);
        return bytes;
    }
    let sectors = (word & !(1 << 62)) >> (70 - image.header.cluster_bits);
    let packed = held((sectors + 1) * 512 - host % 512);
    let mut bytes = vec![0; size as usize];
    let read = if image.header.incompatible & 8 != 0 && image.read(104, 1) == [1] {
        zstd::stream::read::Decoder::new(&packed[..]).unwrap().read_exact(&mut bytes)
    } else {
        flate2::read::DeflateDecoder::new(&packed[..]).read_exact(&mut bytes)
    };
    image.must(read.is_ok(), || format!("the compressed cluster at {host:#x} does not unpack: {read:?}"));
    bytes
}
