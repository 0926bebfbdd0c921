//! Images to work on in place, small enough to be judged thousands of times, and what a guest reads from them.

mod collect;

use super::crash::CrashStorage;
use super::reader::{Entry, Image};
use super::verify::{Survey, content};
use super::{Random, dedup_img, qemu, scratch};
use crate::args;
use dedup_img::storage::Storage;
use dedup_img::{
    Cancel, CheckOptions, DEFAULT_MEMORY, DedupOptions, DedupReport, GcOptions, MIN_MEMORY, Pin, Repair, Scratch, Work,
    WorkOptions, dedup, repair,
};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::panicking;
use tempfile::TempDir;

pub(crate) use super::verify::{Left, verify_crashed, verify_repaired};

/// Guest clusters that are not all zeros.
type Clusters = BTreeMap<u64, Vec<u8>>;

/// Disks of 4 KiB clusters have data at each of these, so that each has an L2 table.
const REGIONS: [u64; 6] = [0, 2 << 20, 4 << 20, 6 << 20, 8 << 20, 10 << 20];
/// Bytes of data in a region but the last, which has a bit more and ends within a cluster.
const REGION: usize = 96 << 10;
/// The length of such a disk.
const DISK: u64 = REGIONS[5] + REGION as u64 + 1536;

/// An image of a kind.
pub(crate) struct Subject {
    pub(crate) kind: &'static str,
    pub(crate) home: TempDir,
    pub(crate) path: PathBuf,
    options: DedupOptions,
    /// Where the image is not to be deduplicated: what `gc` is to do.
    pub(crate) collects: Option<GcOptions>,
    /// What a run may use.
    memory: u64,
    /// What the backing file holds.
    backing: Clusters,
}

/// What must stay as it is (I1): all that a guest reads, and what else is the user's.
#[derive(PartialEq, Eq)]
pub(crate) struct Contents {
    /// The disk, then each snapshot of the user's.
    pub(crate) layers: Vec<Clusters>,
    pub(crate) disk_size: u64,
    pub(crate) cluster_size: u64,
    /// Names, dates, sizes of the snapshots; name of the backing file; the bitmaps with their bits.
    others: Vec<String>,
}

/// Blocks that a disk is made of, with as many different values for a byte as `mask` lets through.
struct Blocks {
    random: Random,
    mask: u8,
    large: Vec<u8>,
    small: Vec<Vec<u8>>,
}

impl Blocks {
    fn new(seed: u64, mask: u8) -> Self {
        let mut blocks = Self { random: Random::new(seed), mask, large: Vec::new(), small: Vec::new() };
        blocks.large = blocks.fresh(32 << 10);
        blocks.small = (0..3).map(|_| blocks.fresh(4 << 10)).collect();
        blocks
    }

    fn fresh(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = self.random.bytes(length);
        bytes.iter_mut().for_each(|byte| *byte &= self.mask);
        bytes
    }

    /// Something that each region has, smaller blocks that come again and again, zeros, what this region has twice, and what comes
    /// once.
    fn region(&mut self) -> Vec<u8> {
        let mut bytes = self.large.clone();
        bytes.extend(self.small.concat());
        bytes.extend(&self.small[0]);
        bytes.resize(bytes.len() + (8 << 10), 0);
        let twice = self.fresh(8 << 10);
        bytes.extend([&twice[..], &twice].concat());
        bytes.extend(self.fresh(REGION - bytes.len()));
        bytes
    }

    /// A piece for each region.
    fn disk(&mut self) -> Vec<(u64, Vec<u8>)> {
        let mut pieces: Vec<(u64, Vec<u8>)> = REGIONS.iter().map(|at| (*at, self.region())).collect();
        let last = &mut pieces[REGIONS.len() - 1].1;
        last.extend_from_within(..1536);
        pieces
    }
}

impl Subject {
    /// An image of the kind named.
    pub(crate) fn new(kind: &'static str) -> Self {
        let home = scratch();
        let path = home.path().join("image.qcow2");
        let pin = if kind == "pinned" { Pin::All } else { Pin::Shared };
        let options = DedupOptions { pin };
        let (collects, memory, backing) = (None, DEFAULT_MEMORY, Clusters::new());
        let mut subject = Self { kind, home, path, options, collects, memory, backing };
        let mut blocks = Blocks::new(7, if kind.starts_with('z') { 0x0f } else { 0xff });
        let disk = blocks.disk();
        match kind {
            "plain" | "pinned" => {
                subject.create("cluster_size=4k", &disk);
                // Zeros that keep their clusters, and clusters that are free again.
                subject.edit(&["write -z 84k 8k", "discard 2128k 16k"]);
            }
            "leaks" => {
                subject.create("cluster_size=4k", &disk);
                subject.leak();
            }
            "snapshots" => {
                subject.create("cluster_size=4k", &disk);
                subject.snapshots();
            }
            "frozen" => {
                // No entry of the disk is COPIED.
                subject.create("cluster_size=4k", &disk);
                qemu::snapshot("-c", "one", &subject.path).ok();
            }
            "zlib" => subject.packed("cluster_size=4k", &disk),
            "zstd" => subject.packed("cluster_size=4k,compression_type=zstd", &disk),
            "4 bits" => subject.create("cluster_size=4k,refcount_bits=4", &disk),
            "64 bits" => subject.create("cluster_size=4k,refcount_bits=64", &disk),
            "pool" => subject.pooled(&disk, &mut blocks),
            "bitmaps" => {
                subject.create("cluster_size=4k", &disk);
                subject.bitmaps();
            }
            "bitmaps and snapshots" => {
                subject.create("cluster_size=4k", &disk);
                subject.bitmaps();
                subject.snapshots();
            }
            "version 2" => subject.create("compat=0.10,cluster_size=4k", &disk),
            "version 2, snapshots" => {
                subject.create("compat=0.10,cluster_size=4k", &disk);
                subject.snapshots();
            }
            "version 2, backing" => subject.overlay("compat=0.10,cluster_size=4k,", &disk, &mut blocks),
            "backing" => {
                subject.overlay("cluster_size=4k,", &disk, &mut blocks);
                subject.edit(&["discard 2052k 8k"]);
            }
            "growing" => subject.nearly_full(&mut blocks),
            "batches" => subject.large(&blocks),
            _ => panic!("no kind {kind}"),
        }
        let code = qemu::check(&subject.path).code;
        assert_eq!(code, if kind == "leaks" { 3 } else { 0 }, "{kind}");
        subject
    }

    /// Deduplicates what is in `storage`, which was this image.
    pub(crate) fn deduplicate(&self, storage: &dyn Storage) -> dedup_img::Result<DedupReport> {
        self.deduplicate_until(storage, &Cancel::default())
    }

    /// The same, which may be stopped.
    pub(crate) fn deduplicate_until(&self, storage: &dyn Storage, cancel: &Cancel) -> dedup_img::Result<DedupReport> {
        let work = Work::new(self.means(cancel))?;
        dedup(storage, self.options, &work)
    }

    /// One thread, so that all runs are the same.
    pub(crate) fn means(&self, cancel: &Cancel) -> WorkOptions {
        let scratch = Scratch::In(self.home.path().to_owned());
        WorkOptions { threads: Some(1), memory: self.memory, scratch, cancel: cancel.clone(), ..WorkOptions::default() }
    }

    /// An image of the size of [`DISK`] with these pieces, written one by one.
    fn create(&self, options: &str, pieces: &[(u64, Vec<u8>)]) {
        qemu::create("qcow2", &self.path, DISK, options);
        self.write("", pieces);
    }

    /// Writes pieces through QEMU, zeros too, with a flag of its command.
    fn write(&self, flag: &str, pieces: &[(u64, Vec<u8>)]) {
        let mut commands = Vec::new();
        for (n, (at, bytes)) in pieces.iter().enumerate() {
            let piece = self.home.path().join(format!("piece-{n}"));
            fs::write(&piece, bytes).unwrap();
            commands.push(format!("write {flag} -s {} {at} {}", piece.display(), bytes.len()));
        }
        qemu::io("qcow2", &self.path, &commands);
    }

    /// Runs qemu-io commands, discards included.
    fn edit(&self, commands: &[&str]) {
        let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
        let ran = io_unmap(&self.path, &commands).ok();
        assert!(!ran.text().contains("rror"), "{}", ran.told());
    }

    /// Two snapshots that share all L2 tables, then writes that unshare some, one of what is there already.
    fn snapshots(&self) {
        for name in ["one", "two"] {
            qemu::snapshot("-c", name, &self.path).ok();
        }
        let again = Blocks::new(7, 0xff).large;
        self.write("", &[(70 << 10, again[..24 << 10].to_vec()), (REGIONS[1], vec![9; 8 << 10])]);
    }

    /// All compressed at first; a part of it is then written anew, as a guest does, in clusters of its own.
    fn packed(&self, options: &str, disk: &[(u64, Vec<u8>)]) {
        // A compressed write may not end within a cluster.
        let whole: Vec<_> = disk.iter().map(|(at, bytes)| (*at, bytes[..REGION].to_vec())).collect();
        qemu::create("qcow2", &self.path, DISK, options);
        self.write("-c", &whole);
        self.write("", &[(REGIONS[2] + (32 << 10), disk[0].1[..40 << 10].to_vec())]);
    }

    /// A pool that `convert` made; then a guest writes what the pool has, and other things twice.
    fn pooled(&self, disk: &[(u64, Vec<u8>)], blocks: &mut Blocks) {
        let raw = self.home.path().join("source.raw");
        let file = File::create(&raw).unwrap();
        file.set_len(DISK).unwrap();
        disk.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "-t", "unsafe", raw, &self.path]).ok();
        let fresh = blocks.fresh(16 << 10);
        let mut pieces =
            vec![(REGIONS[0] + (256 << 10), disk[0].1.clone()), (REGIONS[3] + (60 << 10), vec![0; 12 << 10])];
        pieces.extend(REGIONS[1..].iter().map(|at| (at + (16 << 10), [&fresh[..], &disk[1].1[..8 << 10]].concat())));
        self.write("", &pieces);
    }

    /// Two bitmaps, one of which records.
    fn bitmaps(&self) {
        for name in ["one", "two"] {
            qemu::img(args!["bitmap", "--add", "-g", "4096", &self.path, name]).ok();
        }
        qemu::img(args!["bitmap", "--disable", &self.path, "two"]).ok();
        self.edit(&["write -P 3 8k 20k", "write -P 3 2048k 20k"]);
    }

    /// An image over a raw file that has data wherever the image has any, and elsewhere.
    fn overlay(&mut self, options: &str, disk: &[(u64, Vec<u8>)], blocks: &mut Blocks) {
        let base = File::create(self.home.path().join("base.raw")).unwrap();
        base.set_len(DISK).unwrap();
        for at in REGIONS.iter().flat_map(|at| (0..64).map(move |n| at + n * 4096)).filter(|at| *at < DISK) {
            let mut cluster = blocks.fresh(4096);
            cluster[(DISK - at).min(4096) as usize..].fill(0);
            base.write_all_at(&cluster[..(DISK - at).min(4096) as usize], at).unwrap();
            self.backing.insert(at / 4096, cluster);
        }
        // A name with many words for the same: the header of a version 2 image has to move it.
        let name = format!("{}base.raw", "./".repeat(80));
        let backing = format!("{options}backing_fmt=raw,backing_file={name}");
        self.create(&backing, disk);
    }

    /// Small clusters that the refcount table has just room for: one of 512 bytes counts 4096 clusters with 64 bits each.
    fn nearly_full(&self, blocks: &mut Blocks) {
        qemu::create("qcow2", &self.path, 2 << 20, "cluster_size=512,refcount_bits=64");
        let mut bytes = blocks.fresh(1 << 20);
        for n in 0..40 {
            let small = &blocks.small[n % 3];
            bytes.extend(if n % 8 == 7 { &[0; 4 << 10][..] } else { small });
        }
        let room = 4095 * 512;
        loop {
            self.write("", &[(0, bytes.clone())]);
            let left = room - self.path.metadata().unwrap().len() as usize;
            if left < 3 * 512 {
                return;
            }
            bytes.extend(blocks.fresh((left * 7 / 8).next_multiple_of(512)));
        }
    }

    /// So many small clusters that the memory given takes them in batches.
    fn large(&mut self, blocks: &Blocks) {
        qemu::create("qcow2", &self.path, 20 << 20, "cluster_size=512");
        self.write("", &[(0, blocks.large.repeat(640))]);
        self.memory = MIN_MEMORY;
    }

    /// Clusters at the end that are counted and not used.
    fn leak(&self) {
        let image = Image::open(&self.path);
        let block = image.refcount_blocks()[0];
        let clusters = image.length / image.cluster_size();
        let mut counts = image.read(block, image.cluster_size());
        for cluster in (clusters..clusters + 6).map(|cluster| cluster as usize) {
            counts[2 * cluster + 1] += 1;
        }
        let file = File::options().write(true).open(&self.path).unwrap();
        file.write_all_at(&counts, block).unwrap();
        file.set_len(image.length + 6 * image.cluster_size()).unwrap();
    }

    /// What a guest reads from the image at `path`, which may have been written, crashed or repaired.
    #[track_caller]
    pub(crate) fn contents(&self, path: &Path) -> Contents {
        let (image, survey) = (Image::open_still(path), Survey::without_pool(path));
        let size = image.header.size;
        let mut layers = vec![self.layer(&image, image.header.l1_table_offset, image.header.l1_size, size)];
        for snapshot in image.snapshots().0.iter().filter(|snapshot| snapshot.name != "dedup-pool") {
            layers.push(self.layer(&image, snapshot.l1_table_offset, snapshot.l1_size, snapshot.disk_size));
        }
        let mut others = survey.snapshots;
        others.extend(image.backing_file());
        others.extend(survey.bitmaps.iter().map(|bitmap| format!("{bitmap:?}")));
        Contents { layers, disk_size: size, cluster_size: image.cluster_size(), others }
    }

    fn layer(&self, image: &Image, l1_offset: u64, l1_size: u32, disk_size: u64) -> Clusters {
        let size = image.cluster_size();
        let mut clusters = self.backing.clone();
        for table in image.tables(l1_offset, l1_size) {
            for (slot, (word, entry)) in table.words.iter().zip(&table.entries).enumerate() {
                let guest = table.index * image.l2_entries() + slot as u64;
                match entry {
                    Entry::Unallocated => continue,
                    Entry::Zero(_) => clusters.remove(&guest),
                    Entry::Compressed { .. } => clusters.insert(guest, content(image, *word)),
                    Entry::Data { bitmap, .. } => {
                        clusters.insert(guest, allocated(content(image, word & !(1 << 63)), *bitmap))
                    }
                };
            }
        }
        // The disk may end within its last cluster.
        if let Some(last) = clusters.get_mut(&(disk_size / size)).filter(|_| !disk_size.is_multiple_of(size)) {
            last[(disk_size % size) as usize..].fill(0);
        }
        clusters.retain(|_, bytes| bytes.iter().any(|byte| *byte != 0));
        clusters
    }

    /// Asserts I1 by qemu-img: it reads `expected` from the disk and from each snapshot.
    #[track_caller]
    pub(crate) fn qemu_reads(&self, path: &Path, expected: &Contents) {
        let raw = self.home.path().join("read.raw");
        let ids = qemu::snapshots(path).into_iter().filter(|(_, name)| name != "dedup-pool").map(|(id, _)| Some(id));
        let layers: Vec<Option<String>> = std::iter::once(None).chain(ids).collect();
        assert_eq!(layers.len(), expected.layers.len(), "snapshots");
        for (id, layer) in layers.iter().zip(&expected.layers) {
            let which = id.as_ref().map(|id| format!("snapshot.id={id}"));
            let more: Vec<&str> = which.iter().flat_map(|which| ["-l", which.as_str()]).collect();
            qemu::convert("qcow2", path, "raw", &raw, &more);
            let mut bytes = fs::read(&raw).unwrap();
            bytes.resize(bytes.len().next_multiple_of(expected.cluster_size as usize), 0);
            for (guest, found) in bytes.chunks(expected.cluster_size as usize).enumerate() {
                let due = layer.get(&(guest as u64));
                let same = due.map_or_else(|| found.iter().all(|byte| *byte == 0), |due| found == due);
                assert!(same, "qemu-img reads guest cluster {guest} otherwise, snapshot {id:?}");
            }
        }
    }
}

impl Contents {
    /// Asserts I1: everything is as it was.
    #[track_caller]
    pub(crate) fn unchanged(&self, found: &Self, when: &str) {
        assert_eq!(self.others, found.others, "{when}");
        self.same_layers(found, when);
    }

    /// Asserts that the disk and each snapshot hold the same.
    #[track_caller]
    pub(crate) fn same_layers(&self, found: &Self, when: &str) {
        assert_eq!((self.disk_size, self.layers.len()), (found.disk_size, found.layers.len()), "{when}");
        for (n, (due, is)) in self.layers.iter().zip(&found.layers).enumerate() {
            let all = due.keys().chain(is.keys());
            let changed: Vec<&u64> = all.filter(|guest| due.get(guest) != is.get(guest)).collect();
            assert!(changed.is_empty(), "{when}: guest clusters of layer {n} read otherwise: {changed:?}");
        }
    }

    /// Lets a guest work on the image at `path` for a while, most of all where the disk holds the same several times, and follows
    /// what it does. Returns the commands.
    pub(crate) fn guest(&mut self, path: &Path, random: &mut Random) -> Vec<String> {
        let size = self.cluster_size;
        let discards = Image::open(path).header.version == 3;
        let mut equal: BTreeMap<&[u8], Vec<u64>> = BTreeMap::new();
        for (guest, bytes) in &self.layers[0] {
            equal.entry(bytes).or_default().push(*guest);
        }
        let mut shared: Vec<u64> = equal.into_values().filter(|guests| guests.len() > 1).flatten().collect();
        if shared.is_empty() {
            shared.extend(self.layers[0].keys());
        }
        let mut commands = Vec::new();
        for _ in 0..15 {
            let cluster = match random.below(4) {
                0 => random.below(self.disk_size / size),
                _ => shared[random.below(shared.len() as u64) as usize],
            };
            let length = ((1 + random.below(6)) * size).min(self.disk_size / size * size - cluster * size);
            let (command, at, length, byte) = match random.below(5) {
                0 if discards => ("discard".to_owned(), cluster * size, length, 0),
                1 => ("write -z".to_owned(), cluster * size, length, 0),
                n => {
                    let byte = 1 + random.below(200) as u8;
                    // A whole cluster, some, or a sector of one.
                    let length = [size, length, 512][n as usize % 3].min(self.disk_size - cluster * size);
                    let at = if length == 512 { random.below(size / 512) * 512 } else { 0 };
                    let at = (cluster * size + at).min(self.disk_size - length);
                    (format!("write -P {byte}"), at, length, byte)
                }
            };
            if length > 0 {
                commands.push(format!("{command} {at} {length}"));
                self.fill(at..at + length, byte);
            }
        }
        let ran = io_unmap(path, &commands).ok();
        assert!(!ran.text().contains("rror"), "{}", ran.told());
        commands
    }

    /// Fills a range of the disk with a byte.
    fn fill(&mut self, range: std::ops::Range<u64>, byte: u8) {
        for at in range.step_by(512) {
            let bytes =
                self.layers[0].entry(at / self.cluster_size).or_insert_with(|| vec![0; self.cluster_size as usize]);
            bytes[(at % self.cluster_size) as usize..][..512].fill(byte);
        }
        self.layers[0].retain(|_, bytes| bytes.iter().any(|byte| *byte != 0));
    }
}

/// The bytes of a cluster of which some subclusters may have no place; no backing file shows through.
fn allocated(mut bytes: Vec<u8>, bitmap: u64) -> Vec<u8> {
    let size = bytes.len() / 32;
    let absent = bytes.chunks_mut(size).enumerate().filter(|(n, _)| bitmap >> n & 1 == 0);
    absent.for_each(|(_, part)| part.fill(0));
    bytes
}

/// Runs qemu-io commands on an image whose discards are to be done.
fn io_unmap(path: &Path, commands: &[String]) -> super::Ran {
    let mut words = args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap"].to_vec();
    commands.iter().for_each(|command| words.extend(args!["-c", command]));
    words.push(path.into());
    qemu::run("qemu-io", words)
}

/// Mends an image as `check -r all --data` does; panics where the end is not clean.
#[track_caller]
pub(crate) fn mended(image: Vec<u8>, when: &str) -> Vec<u8> {
    let storage = CrashStorage::of(image);
    let mut found = Vec::new();
    let mut sink = |finding: &dedup_img::finding::Finding| found.push(format!("{finding:?}"));
    let work = Work::new(WorkOptions { threads: Some(1), ..WorkOptions::default() }).unwrap();
    let repaired =
        repair(&storage, Repair::All, CheckOptions { data: true }, &work, &mut sink).map(|repaired| repaired.report);
    let clean = repaired
        .as_ref()
        .is_ok_and(|after| after.corruptions + after.leaks + after.check_errors + after.findings_beyond == 0);
    assert!(clean, "{when}: not mended: {repaired:?}\n{}", found.join("\n"));
    storage.now()
}

/// Makes `path` a file with these bytes. Overwriting is faster than writing anew: nothing is flushed.
pub(crate) fn put(path: &Path, bytes: &[u8]) {
    let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

/// Says which state it was that a test failed at, and keeps it.
pub(crate) struct Told<'a>(pub(crate) &'a str, pub(crate) &'a [u8]);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if panicking() {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("crashed.qcow2");
            let _ = fs::write(&kept, self.1);
            eprintln!("{}; kept as {}", self.0, kept.display());
        }
    }
}
