//! The images of the limits: sound ones by stock QEMU, each with one thing changed.

use crate::args;
use crate::support::corpus::{K, M};
use crate::support::reader::number;
use crate::support::{Random, qemu, scratch};
use std::fs::{self, File};
use std::path::Path;

/// Where the fields of the header are.
const BACKING: usize = 8;
const L1_SIZE: usize = 36;
const L1: usize = 40;
const REFCOUNTS: usize = 48;
const SNAPSHOTS: usize = 60;
const FEATURES: usize = 72;
const EXTENSIONS: usize = 112;
/// A place far behind the end of each image.
const FAR: u64 = 1 << 40;

/// Sound images by stock QEMU, as bytes.
pub(super) struct Bases {
    /// 1 MiB of nothing, in clusters of 64 KiB.
    empty: Vec<u8>,
    /// The same in clusters of 512 bytes.
    fine: Vec<u8>,
    /// 128 KiB of data.
    data: Vec<u8>,
    /// The same with a snapshot `s`.
    snapshot: Vec<u8>,
    /// A disk of 64 MiB with a bitmap `b`.
    bitmap: Vec<u8>,
    /// One compressed cluster.
    packed: Vec<u8>,
    /// 5 MiB of noise in clusters of 64 KiB, with a snapshot `s`.
    noise: Vec<u8>,
}

impl Bases {
    pub(super) fn new() -> Self {
        let home = scratch();
        let (path, raw) = (home.path().join("base.qcow2"), home.path().join("base.raw"));
        fs::write(&raw, [b"abc".repeat(20000), vec![0; 5536]].concat()).unwrap();
        let write = ["write -P 7 0 128k".to_owned()];
        let created = |size: u64, options: &str| {
            qemu::create("qcow2", &path, size, options);
            fs::read(&path).unwrap()
        };
        let (empty, fine) = (created(M, ""), created(M, "cluster_size=512"));
        created(64 * M, "");
        qemu::img(args!["bitmap", "--add", path, "b"]).ok();
        qemu::io("qcow2", &path, &write);
        let bitmap = fs::read(&path).unwrap();
        created(M, "");
        qemu::io("qcow2", &path, &write);
        let data = fs::read(&path).unwrap();
        qemu::snapshot("-c", "s", &path).ok();
        let snapshot = fs::read(&path).unwrap();
        qemu::convert("raw", &raw, "qcow2", &path, &["-c"]);
        let packed = fs::read(&path).unwrap();
        fs::write(&raw, Random::new(7).bytes(5 << 20)).unwrap();
        qemu::convert("raw", &raw, "qcow2", &path, &[]);
        qemu::snapshot("-c", "s", &path).ok();
        Self { empty, fine, data, snapshot, bitmap, packed, noise: fs::read(&path).unwrap() }
    }
}

/// An image being changed.
#[derive(Clone)]
pub(super) struct Patched(pub(super) Vec<u8>);

impl Patched {
    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn put32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    fn put64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    fn word(&self, at: usize) -> u64 {
        number(&self.0, at, 8)
    }

    /// Follows the table entry or the offset at `at`.
    fn to(&self, at: usize) -> usize {
        (self.word(at) & 0x00ff_ffff_ffff_fe00) as usize
    }

    /// Changes the first L1 entry.
    fn l1(self, change: fn(u64) -> u64) -> Self {
        let at = self.to(L1);
        let entry = self.word(at);
        self.put64(at, change(entry))
    }

    /// Changes the first L2 entry.
    fn l2(self, change: fn(u64) -> u64) -> Self {
        let at = self.to(self.to(L1));
        let entry = self.word(at);
        self.put64(at, change(entry))
    }

    /// Changes the first entry of the refcount table.
    fn block(self, change: fn(u64) -> u64) -> Self {
        let at = self.to(REFCOUNTS);
        let entry = self.word(at);
        self.put64(at, change(entry))
    }

    /// Sets header extensions; the length counts, not how much of it there is.
    fn extension(self, magic: u32, length: u32, data: &[u8]) -> Self {
        let bytes = [&magic.to_be_bytes()[..], &length.to_be_bytes(), data, &[0; 16]].concat();
        self.put(EXTENSIONS, &bytes)
    }

    /// Sets a bitmap extension, with its bit.
    fn bitmaps(self, length: u32, count: u32, reserved: u32, size: u64, offset: u64) -> Self {
        let fields =
            [&count.to_be_bytes()[..], &reserved.to_be_bytes(), &size.to_be_bytes(), &offset.to_be_bytes()].concat();
        self.put(FEATURES + 23, &[1]).extension(0x2385_2875, length, &fields[..length as usize])
    }

    /// Where the bitmap directory is.
    fn directory(&self) -> usize {
        let magic = self.0.windows(4).position(|word| word == [0x23, 0x85, 0x28, 0x75]).unwrap();
        self.to(magic + 24)
    }

    /// Where the snapshot table is.
    fn snapshots(&self) -> usize {
        self.to(SNAPSHOTS + 4)
    }
}

fn empty(bases: &Bases) -> Patched {
    Patched(bases.empty.clone())
}

fn fine(bases: &Bases) -> Patched {
    Patched(bases.fine.clone())
}

fn data(bases: &Bases) -> Patched {
    Patched(bases.data.clone())
}

/// The image with a snapshot, with other bytes in its table entry.
fn snapshot(bases: &Bases, at: usize, bytes: &[u8]) -> Patched {
    let image = Patched(bases.snapshot.clone());
    let table = image.snapshots();
    image.put(table + at, bytes)
}

/// The image with a bitmap, with other bytes in its directory entry.
fn bitmap(bases: &Bases, at: usize, bytes: &[u8]) -> Patched {
    let image = Patched(bases.bitmap.clone());
    let directory = image.directory();
    image.put(directory + at, bytes)
}

/// The image with a bitmap, with another first entry in the bitmap's table.
fn bits(bases: &Bases, entry: u64) -> Patched {
    let image = Patched(bases.bitmap.clone());
    let table = image.to(image.directory());
    image.put64(table, entry)
}

fn packed(bases: &Bases) -> Patched {
    Patched(bases.packed.clone())
}

/// Many L1 entries that all lead to one L2 table, behind an image with clusters of 512 bytes.
fn one_table_again_and_again(bases: &Bases) -> Patched {
    const ENTRIES: usize = 1 << 16;
    let mut image = fine(bases);
    let at = image.0.len().next_multiple_of(512);
    image.0.resize(at + 512, 0);
    image.0.extend(((1u64 << 63) | at as u64).to_be_bytes().repeat(ENTRIES));
    image.put64(24, ENTRIES as u64 * 64 * 512).put32(L1_SIZE, ENTRIES as u32).put64(L1, at as u64 + 512)
}

/// The noise, with a snapshot whose name and L1 table are as long as they can be: the latter is the former and what comes behind.
fn long_name(bases: &Bases) -> Patched {
    let image = Patched(bases.noise.clone());
    let (entry, l1) = (image.snapshots(), image.to(L1));
    let mut image = image.put64(entry, l1 as u64).put32(entry + 8, 65537).put(entry + 14, &[255, 255]);
    image.0.resize(entry + 57, 0);
    image.0.resize(entry + (128 << 10), 1);
    image
}

/// Eight L2 tables of 2 MiB whose every entry is wrong in three ways.
fn large_tables(bases: &Bases) -> Patched {
    let cluster = 2 << 20;
    // Clusters of 64 KiB become such of 2 MiB.
    let mut bytes = vec![0; 4 * cluster];
    for (from, to) in bases.empty.chunks(64 << 10).zip(bytes.chunks_mut(cluster)) {
        to[..from.len()].copy_from_slice(from);
    }
    bytes.resize(12 * cluster, 0x32);
    let (table, block, l1) = (cluster as u64, 2 * cluster as u64, 3 * cluster as u64);
    let image = Patched(bytes).put32(20, 21).put64(24, 8 << 39).put32(L1_SIZE, 8).put64(L1, l1);
    let image = image.put64(REFCOUNTS, table).put64(cluster, block);
    (0..8).fold(image, |image, n| image.put64(3 * cluster + 8 * n, (1 << 63) | ((4 + n) * cluster) as u64))
}

pub(super) type Make = fn(&Bases) -> Patched;
/// The name of each row, which is its first cell, and its image.
pub(super) const ROWS: &[(&str, Make)] = &[
    ("magic QFI\\xfa", |b| empty(b).put(3, b"\xfa")),
    ("version 1", |b| empty(b).put32(4, 1)),
    ("version 4", |b| empty(b).put32(4, 4)),
    ("cluster_bits 8", |b| empty(b).put32(20, 8)),
    ("cluster_bits 9", fine),
    ("cluster_bits 22", |b| empty(b).put32(20, 22)),
    ("cluster_bits 2^32 - 1", |b| empty(b).put32(20, u32::MAX)),
    ("header_length 96", |b| empty(b).put32(100, 96)),
    ("header_length 108", |b| empty(b).put32(100, 108)),
    ("header_length 65544", |b| empty(b).put32(100, 65544)),
    ("backing_file_offset 65536, length 0", |b| empty(b).put64(BACKING, 65536)),
    ("backing_file_offset 65536, length 1", |b| empty(b).put64(BACKING, 65536).put32(16, 1)),
    ("backing_file_offset 65537", |b| empty(b).put64(BACKING, 65537)),
    ("backing_file_size 1024", |b| empty(b).put64(BACKING, 512).put32(16, 1024)),
    ("backing_file_size 9 of 8 left", |b| fine(b).put64(BACKING, 504).put32(16, 9)),
    ("crypt_method 3", |b| empty(b).put32(32, 3)),
    ("crypt_method 2 without its extension", |b| empty(b).put32(32, 2)),
    ("size 512 MiB, 1 L1 entry", |b| empty(b).put64(24, 512 * M)),
    ("size 512 MiB + 1, 1 L1 entry", |b| empty(b).put64(24, 512 * M + 1)),
    ("size 2^60", |b| empty(b).put64(24, 1 << 60)),
    ("size 2^60 + 2^29", |b| empty(b).put64(24, (1 << 60) + (1 << 29))),
    ("size 2^63", |b| empty(b).put64(24, 1 << 63)),
    ("size 1000001", |b| empty(b).put64(24, 1_000_001)),
    ("l1_size 2^22", |b| empty(b).put32(L1_SIZE, 1 << 22)),
    ("l1_size 2^22 + 1", |b| empty(b).put32(L1_SIZE, (1 << 22) + 1)),
    ("l1_table_offset 0x30200", |b| empty(b).put64(L1, 0x30200)),
    ("l1_table_offset 2^63", |b| empty(b).put64(L1, 1 << 63)),
    ("l1_table_offset 2^63 - 65536, 8193 entries", |b| empty(b).put64(L1, (1 << 63) - 65536).put32(L1_SIZE, 8193)),
    ("l1_table_offset 2^40", |b| empty(b).put64(L1, FAR)),
    ("refcount_table_offset 0x10001", |b| empty(b).put64(REFCOUNTS, 0x10001)),
    ("refcount_table_offset 2^63 - 65536", |b| empty(b).put64(REFCOUNTS, (1 << 63) - 65536)),
    ("refcount_table_offset 2^40", |b| empty(b).put64(REFCOUNTS, FAR)),
    ("refcount_table_clusters 0", |b| empty(b).put32(56, 0)),
    ("refcount_table_clusters 128", |b| empty(b).put32(56, 128)),
    ("refcount_table_clusters 129", |b| empty(b).put32(56, 129)),
    ("nb_snapshots 65537", |b| empty(b).put32(SNAPSHOTS, 65537)),
    ("snapshots_offset 0x30200", |b| empty(b).put32(SNAPSHOTS, 1).put64(SNAPSHOTS + 4, 0x30200)),
    ("snapshots_offset 2^63 - 65536, 1639 snapshots", |b| {
        empty(b).put32(SNAPSHOTS, 1639).put64(SNAPSHOTS + 4, (1 << 63) - 65536)
    }),
    ("snapshots_offset 2^40", |b| empty(b).put32(SNAPSHOTS, 1).put64(SNAPSHOTS + 4, FAR)),
    ("incompatible_features bit 5", |b| empty(b).put64(FEATURES, 1 << 5)),
    ("incompatible_features bit 63", |b| empty(b).put64(FEATURES, 1 << 63)),
    ("incompatible_features corrupt", |b| empty(b).put64(FEATURES, 2)),
    ("incompatible_features data file", |b| empty(b).put64(FEATURES, 4)),
    ("incompatible_features subclusters of 16 bytes", |b| fine(b).put64(FEATURES, 16)),
    ("autoclear_features raw data file", |b| empty(b).put64(FEATURES + 16, 2)),
    ("refcount_order 7", |b| empty(b).put32(96, 7)),
    ("compression_type 1 without its bit", |b| empty(b).put(104, &[1])),
    ("compression_type 0 with its bit", |b| empty(b).put64(FEATURES, 8)),
    ("compression_type 2", |b| empty(b).put64(FEATURES, 8).put(104, &[2])),
    ("extension length 65416", |b| empty(b).extension(0x1234_5678, 65416, &[])),
    ("extension length 65417", |b| empty(b).extension(0x1234_5678, 65417, &[])),
    ("extension length 2^32 - 1", |b| empty(b).extension(0x1234_5678, u32::MAX, &[])),
    ("backing format length 15", |b| empty(b).extension(0xe279_2aca, 15, &[b'x'; 16])),
    ("backing format length 16", |b| empty(b).extension(0xe279_2aca, 16, &[b'x'; 16])),
    ("LUKS extension length 8", |b| empty(b).put32(32, 2).extension(0x0537_be77, 8, &[0; 8])),
    ("LUKS extension offset 1", |b| {
        empty(b).put32(32, 2).extension(0x0537_be77, 16, &[1u64.to_be_bytes(), 16u64.to_be_bytes()].concat())
    }),
    ("LUKS extension without crypt_method 2", |b| empty(b).extension(0x0537_be77, 16, &[0; 16])),
    ("bitmap extension length 16", |b| empty(b).bitmaps(16, 1, 0, 64, 0x10000)),
    ("bitmap extension reserved 1", |b| empty(b).bitmaps(24, 1, 1, 64, 0x10000)),
    ("bitmaps 0", |b| empty(b).bitmaps(24, 0, 0, 64, 0x10000)),
    ("bitmaps 65536", |b| empty(b).bitmaps(24, 65536, 0, 64, 0x10000)),
    ("bitmap directory at 0x10001", |b| empty(b).bitmaps(24, 1, 0, 64, 0x10001)),
    ("bitmap directory of 0 bytes", |b| empty(b).bitmaps(24, 1, 0, 0, 0x10000)),
    ("bitmap directory of 64 MiB - 1023", |b| empty(b).bitmaps(24, 1, 0, 65535 * K + 1, 0x10000)),
    ("bitmap directory at 2^30", |b| empty(b).bitmaps(24, 1, 0, 64, 1 << 30)),
    ("bitmaps 2, 1 in the directory", |b| {
        let image = Patched(b.bitmap.clone());
        let magic = image.0.windows(4).position(|word| word == [0x23, 0x85, 0x28, 0x75]).unwrap();
        image.put32(magic + 8, 2)
    }),
    ("bitmap table at 0x10200", |b| bitmap(b, 0, &0x10200u64.to_be_bytes())),
    ("bitmap table at 0", |b| bitmap(b, 0, &[0; 8])),
    ("bitmap table at 2^40", |b| bitmap(b, 0, &FAR.to_be_bytes())),
    ("bitmap table of 0 entries", |b| bitmap(b, 8, &[0; 4])),
    ("bitmap table of 2 entries", |b| bitmap(b, 8, &2u32.to_be_bytes())),
    ("bitmap table of 2^27 + 1 entries", |b| bitmap(b, 8, &((1u32 << 27) + 1).to_be_bytes())),
    ("bitmap flags 8", |b| bitmap(b, 12, &8u32.to_be_bytes())),
    ("bitmap type 2", |b| bitmap(b, 16, &[2])),
    ("bitmap granularity_bits 8", |b| bitmap(b, 17, &[8])),
    ("bitmap granularity_bits 32", |b| bitmap(b, 17, &[32])),
    ("bitmap name_size 0", |b| bitmap(b, 18, &[0, 0])),
    ("bitmap name_size 1024", |b| bitmap(b, 18, &[4, 0])),
    ("bitmap extra_data_size 7", |b| bitmap(b, 20, &[0, 0, 0, 7])),
    ("bitmap extra_data_size 8", |b| bitmap(b, 20, &[0, 0, 0, 8])),
    ("bitmap table entry, bit 56", |b| bits(b, 1 << 56)),
    ("bitmap table entry 0x10200", |b| bits(b, 0x10200)),
    ("bitmap table entry 2^40", |b| bits(b, FAR)),
    ("snapshot l1_table_offset 0x30200", |b| snapshot(b, 0, &0x30200u64.to_be_bytes())),
    ("snapshot l1_table_offset 2^40", |b| snapshot(b, 0, &FAR.to_be_bytes())),
    ("snapshot l1_size 0", |b| snapshot(b, 8, &[0; 4])),
    ("snapshot l1_size 2^22", |b| snapshot(b, 8, &(1u32 << 22).to_be_bytes())),
    ("snapshot l1_size 2^22 + 1", |b| snapshot(b, 8, &((1u32 << 22) + 1).to_be_bytes())),
    ("snapshot id_size 65535", |b| snapshot(b, 12, &[255, 255])),
    ("snapshot name_size 65535", |b| snapshot(b, 14, &[255, 255])),
    ("snapshot extra_data_size 8", |b| snapshot(b, 36, &8u32.to_be_bytes())),
    ("snapshot extra_data_size 1032", |b| snapshot(b, 36, &1032u32.to_be_bytes())),
    ("snapshot extra_data_size 2^32 - 1", |b| snapshot(b, 36, &u32::MAX.to_be_bytes())),
    ("snapshot disk_size 2^50, 1 L1 entry", |b| snapshot(b, 48, &(1u64 << 50).to_be_bytes())),
    ("snapshot disk_size 2^63", |b| snapshot(b, 48, &(1u64 << 63).to_be_bytes())),
    ("snapshot vm_state_size 2^62", |b| snapshot(b, 40, &(1u64 << 62).to_be_bytes())),
    ("L1 entry 0x40200", |b| data(b).l1(|_| 1 << 63 | 0x40200)),
    ("L1 entry 2^40", |b| data(b).l1(|_| 1 << 63 | FAR)),
    ("L1 entry, bit 56", |b| data(b).l1(|entry| entry | 1 << 56)),
    ("L2 entry 0x50200", |b| data(b).l2(|_| 1 << 63 | 0x50200)),
    ("L2 entry 2^40", |b| data(b).l2(|_| 1 << 63 | FAR)),
    ("L2 entry 2^56 - 65536", |b| data(b).l2(|_| 1 << 63 | ((1 << 56) - 65536))),
    ("L2 entry, bit 1", |b| data(b).l2(|entry| entry | 2)),
    ("L2 entry zero in version 2", |b| data(b).put32(4, 2).l2(|entry| entry | 1)),
    ("compressed cluster at 2^40", |b| packed(b).l2(|_| 1 << 62 | FAR)),
    ("compressed cluster of 256 sectors at the end", |b| packed(b).l2(|entry| entry | 0xff << 54)),
    ("compressed cluster, COPIED", |b| packed(b).l2(|entry| entry | 1 << 63)),
    ("compressed cluster, 1 byte off", |b| packed(b).l2(|entry| entry + 1)),
    ("refcount table entry 0x20200", |b| data(b).block(|_| 0x20200)),
    ("refcount table entry 2^40", |b| data(b).block(|_| FAR)),
    ("refcount table entry, bit 0", |b| data(b).block(|entry| entry | 1)),
    // One table a million times in a small file would have kept a reader busy for years.
    ("L1 table of 65536 entries for one L2 table", one_table_again_and_again),
    // One bit of l1_size: the data are L2 tables then. Check took 296 to 408 MiB, and said 270 MB.
    ("l1_size 65537 over 5 MiB of noise", |b| Patched(b.noise.clone()).put32(L1_SIZE, 65537)),
    // The tables are mostly not there, and their zeros were looked at one by one: 4.9 s.
    ("l1_size 2^20 over 5 MiB of noise", |b| Patched(b.noise.clone()).put32(L1_SIZE, 1 << 20)),
    // Each finding said the name: 30 GB in all.
    ("snapshot name of 65535 bytes, L1 table over noise", long_name),
    ("8 L2 tables of 262144 wrong entries", large_tables),
];

/// Rows whose image is more than one small file.
pub(super) const OTHERS: [&str; 4] =
    ["chain of 256 files", "chain of 257 files", "file of 2^31 clusters", "two files that back each other"];

/// Makes such an image, and leaves its first file as `path`.
pub(super) fn make_other(name: &str, bases: &Bases, path: &Path) {
    if name == OTHERS[2] {
        fs::write(path, &bases.fine).unwrap();
        File::options().write(true).open(path).unwrap().set_len(512 << 31).unwrap();
        return;
    }
    let home = path.parent().unwrap();
    if name == OTHERS[3] {
        for (file, backing) in [(path, "other.qcow2"), (&home.join("other.qcow2"), "image.qcow2")] {
            qemu::img(args!["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", file, "1M"]).ok();
        }
        return;
    }
    let files = if name == OTHERS[0] { 256 } else { 257 };
    let backing = |index: u32| format!("{index:03}.qcow2");
    qemu::img(args!["create", "-q", "-f", "qcow2", "-u", "-b", backing(0), "-F", "qcow2", path, "1M"]).ok();
    let link = fs::read(path).unwrap();
    let at = link.windows(9).position(|name| name == b"000.qcow2").unwrap();
    for index in 1..files - 1 {
        let link = Patched(link.clone()).put(at, backing(index).as_bytes());
        fs::write(home.join(backing(index - 1)), &link.0).unwrap();
    }
    fs::write(home.join(backing(files - 2)), &bases.empty).unwrap();
}
