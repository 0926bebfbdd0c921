//! Images with something to collect, and with holes to move into.

use super::{Blocks, Left, REGIONS, Subject};
use crate::args;
use crate::support::reader::{Entry, Image};
use crate::support::{dedup_img, qemu};
use dedup_img::storage::Storage;
use dedup_img::{Cancel, GcOptions, GcReport, Work, gc};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Guest clusters of 4 KiB, the first and how many.
type Forgotten = (u64, u64);

/// What the first and the third region hold behind their first clusters, and all of the second.
const MIDDLE: [Forgotten; 3] = [(8, 16), (REGIONS[1] / 4096, 24), (REGIONS[2] / 4096 + 8, 16)];

impl Subject {
    /// An image of the kind named, for `gc`; compacted but for some kinds.
    pub(crate) fn to_collect(kind: &'static str) -> Self {
        let (compact, drop_pool) = match kind {
            "leaks" | "garbage" | "garbage, snapshots" | "stale directory" => (false, false),
            "dropped pool" => (false, true),
            "dropped pool, holes" => (true, true),
            _ => (true, false),
        };
        let mut subject = Self::new(match kind {
            "compressed pool" => "zlib",
            "leaks" | "bitmaps" | "zlib" | "zstd" | "version 2" | "backing" => kind,
            "garbage" | "garbage, snapshots" | "stale directory" | "dropped pool" => "pool",
            "pool" | "dropped pool, holes" => "pool",
            _ => "plain",
        });
        subject.kind = kind;
        subject.collects = Some(GcOptions { compact, drop_pool });
        match kind {
            "leaks" => forget(&subject.path, &MIDDLE, false),
            "holes" => {
                subject.edit(&["discard 32k 64k", "discard 2048k 96k", "discard 4128k 64k"]);
                forget(&subject.path, &[(REGIONS[3] / 4096, 4)], false);
            }
            "snapshots" => {
                subject.edit(&["discard 2064k 80k", "discard 4M 96k", "discard 6M 64k"]);
                subject.snapshots();
                qemu::snapshot("-c", "three", &subject.path).ok();
                subject.edit(&["write -P 5 10M 64k"]);
                qemu::snapshot("-d", "three", &subject.path).ok();
            }
            // What they are made of lies at the end of the file, and QEMU would move it.
            "bitmaps" => forget(&subject.path, &MIDDLE, true),
            "zlib" | "zstd" => subject.edit(&["discard 0 64k", "discard 2064k 64k", "discard 6M 96k"]),
            "compressed pool" => {
                dedup_img(args!["dedup", "-q", &subject.path]).ok();
                subject.edit(&["discard 32k 64k", "discard 2M 40k", "discard 6M 96k", "write -P 3 56k 8k"]);
            }
            "version 2" | "backing" => forget(&subject.path, &MIDDLE, true),
            "subclusters" => subject.subclusters(),
            "VM state" => subject.vm_state(),
            "amended" => subject.amended(),
            "in the way" => subject.in_the_way(),
            "garbage" | "dropped pool" => subject.drift(),
            "garbage, snapshots" => {
                qemu::snapshot("-c", "one", &subject.path).ok();
                subject.drift();
                qemu::snapshot("-c", "two", &subject.path).ok();
                subject.edit(&["write -P 9 6M 40k"]);
            }
            "stale directory" => {
                subject.drift();
                spoil_directory(&subject.path);
            }
            "pool" | "dropped pool, holes" => {
                subject.late_members();
                subject.drift();
                subject.edit(&["discard 0 56k", "discard 4M 28k", "discard 6200k 12k"]);
            }
            _ => panic!("no kind {kind}"),
        }
        qemu::img(args!["check", "-q", &subject.path]);
        subject
    }

    /// Lets a guest overwrite some members of the pool wherever they are used, and others but for one place.
    fn drift(&self) {
        self.edit(&["write -P 7 64k 8k", "discard 2104k 16k", "write -P 8 4160k 8k", "write -z -u 6200k 16k"]);
    }

    /// Puts members of the pool at the end of the file, in an order that is not the guest's.
    fn late_members(&self) {
        let mut blocks = Blocks::new(11, 0xff);
        for at in [8 << 20, 6 << 20, 2 << 20] {
            let twice = blocks.fresh(12 << 10);
            self.write("", &[(at + (128 << 10), twice.clone()), (at + (192 << 10), twice)]);
        }
        dedup_img(args!["dedup", "-q", &self.path]).ok();
    }

    /// Subclusters that were written, zeroed, discarded and left out, in three L2 tables, with holes between.
    fn subclusters(&self) {
        qemu::create("qcow2", &self.path, 40 << 20, "extended_l2=on,cluster_size=16k");
        let mut blocks = Blocks::new(9, 0xff);
        self.write("", &[(0, blocks.fresh(320 << 10)), (17 << 20, blocks.fresh(64 << 10))]);
        self.write("", &[(18 << 20, blocks.fresh(2560)), ((34 << 20) + 1024, blocks.fresh(40 << 10))]);
        self.edit(&["write -z 17M 1k", "write -z 17428k 3k", "discard 32k 256k", "write -P 3 35000k 512"]);
    }

    /// A snapshot with a VM state, which QEMU keeps behind the end of the disk.
    fn vm_state(&self) {
        self.edit(&["discard 2M 96k", "discard 4M 96k"]);
        qemu::snapshot("-c", "running", &self.path).ok();
        self.edit(&["write -P 5 0 16k"]);
        let image = Image::open(&self.path);
        let file = File::options().write(true).open(&self.path).unwrap();
        // The snapshot's disk becomes shorter by its last region, which is the state from now on.
        let entry = image.header.snapshots_offset;
        file.write_all_at(&(REGIONS[5] - REGIONS[4]).to_be_bytes()[4..], entry + 32).unwrap();
        file.write_all_at(&(REGIONS[5] - REGIONS[4]).to_be_bytes(), entry + 40).unwrap();
        file.write_all_at(&REGIONS[5].to_be_bytes(), entry + 48).unwrap();
    }

    /// Clusters of 512 bytes whose refcounts were widened to 64 bits: L1 and refcount table take several clusters and lie, as all
    /// refcount blocks do, at the end of the file, which holds little else.
    fn amended(&self) {
        qemu::create("qcow2", &self.path, 5 << 20, "cluster_size=512");
        let mut blocks = Blocks::new(9, 0xff);
        self.write("", &[(0, blocks.fresh(2200 << 10))]);
        self.write("", &[(3 << 20, blocks.large.clone()), (4 << 20, [&blocks.large[..], &blocks.small[0]].concat())]);
        qemu::img(args!["resize", "-q", "-f", "qcow2", &self.path, "9M"]).ok();
        self.write("", &[(8 << 20, blocks.small.concat())]);
        qemu::img(args!["amend", "-q", "-f", "qcow2", "-o", "refcount_bits=64", &self.path]).ok();
        self.edit(&["discard 16k 2160k"]);
        let image = Image::open(&self.path);
        assert!(image.header.refcount_table_clusters > 1, "{:?}", image.header);
        assert!(image.header.l1_table_offset > 2 << 20 && image.header.refcount_table_offset > 2 << 20);
    }

    /// An L1 table of several clusters behind holes of one cluster each: something has to make way for it.
    fn in_the_way(&self) {
        qemu::create("qcow2", &self.path, 1 << 20, "cluster_size=512,refcount_bits=64");
        let mut blocks = Blocks::new(9, 0xff);
        self.write("", &[(0, blocks.fresh(30 << 10)), (512 << 10, blocks.small.concat())]);
        qemu::img(args!["resize", "-q", "-f", "qcow2", &self.path, "7M"]).ok();
        self.write("", &[(5 << 20, blocks.fresh(2 << 10))]);
        let even: Vec<Forgotten> = (0..30).map(|n| (2 * n, 1)).collect();
        forget(&self.path, &even, true);
    }

    /// Collects what is in `storage`, which was this image.
    pub(crate) fn collect_until(&self, storage: &dyn Storage, cancel: &Cancel) -> dedup_img::Result<GcReport> {
        let work = Work::new(self.means(cancel))?;
        gc(storage, self.collects.unwrap(), &work)
    }

    /// Does to what is in `storage` what this image is there for; says whether anything was to be done.
    pub(crate) fn run(&self, storage: &dyn Storage) -> dedup_img::Result<bool> {
        self.run_until(storage, &Cancel::default())
    }

    /// The same, which may be stopped.
    pub(crate) fn run_until(&self, storage: &dyn Storage, cancel: &Cancel) -> dedup_img::Result<bool> {
        match self.collects {
            None => Ok(self.deduplicate_until(storage, cancel)?.changed),
            Some(_) => Ok(self.collect_until(storage, cancel)?.changed),
        }
    }

    /// What there must be of the pool when the command was cut off.
    pub(crate) fn left(&self) -> Left {
        match self.collects {
            None => Left::Whole,
            // What is shared moves beside what the pool holds.
            Some(options) if options.drop_pool || options.compact && self.kind.contains("pool") => Left::Nothing,
            Some(_) if self.kind.contains("given up") => Left::Nothing,
            Some(_) => Left::References,
        }
    }

    /// What there must be of it at the end.
    pub(crate) fn finished(&self) -> Left {
        if self.collects.is_some_and(|options| options.drop_pool) { Left::Nothing } else { Left::Whole }
    }
}

/// Takes guest clusters from the disk as a discard does, but by hand: QEMU would store bitmaps anew, and use the room at once. The
/// clusters are free then, or leaks.
pub(crate) fn forget(path: &Path, guests: &[Forgotten], frees: bool) {
    let image = Image::open(path);
    let file = File::options().write(true).open(path).unwrap();
    let tables: BTreeMap<u64, _> = image.active().into_iter().map(|table| (table.index, table)).collect();
    let mut hosts = Vec::new();
    for guest in guests.iter().flat_map(|(first, count)| *first..first + count) {
        let Some(table) = tables.get(&(guest / image.l2_entries())) else { continue };
        let slot = guest % image.l2_entries();
        if let Entry::Data { host, copied: true, .. } = table.entries[slot as usize] {
            assert!(table.copied, "the L2 table of guest cluster {guest} is shared");
            file.write_all_at(&[0; 8], table.host + slot * 8).unwrap();
            hosts.push(host / image.cluster_size());
        }
    }
    assert!(hosts.len() as u64 > guests.iter().map(|(_, count)| count).sum::<u64>() / 2, "{} forgotten", hosts.len());
    let bytes = (1 << image.header.refcount_order) / 8;
    let (blocks, per_block) = (image.refcount_blocks(), image.cluster_size() / bytes);
    for host in hosts.into_iter().filter(|_| frees) {
        let at = blocks[(host / per_block) as usize] + host % per_block * bytes;
        file.write_all_at(&[0; 8][..bytes as usize], at).unwrap();
    }
}

/// Damages a record in the directory of the pool.
pub(crate) fn spoil_directory(path: &Path) {
    let image = Image::open(path);
    let pool = image.snapshots().0.into_iter().find(|snapshot| snapshot.name == "dedup-pool").unwrap();
    let tables = image.tables(pool.l1_table_offset, pool.l1_size);
    let at = tables.last().unwrap().words[0] + 130;
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[!image.read(at, 1)[0]], at).unwrap();
}
