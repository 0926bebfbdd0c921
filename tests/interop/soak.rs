//! I2 by soak: stock QEMU works on a deduplicated image and on a plain copy of it, and after every single operation the
//! deduplicated one checks clean and both hold the same. Then what the guest has made of it is deduplicated in place, and used on.

use crate::args;
use crate::support::corpus::{K, M, write_sparse};
use crate::support::into::{Mixer, into};
use crate::support::reader::Image;
use crate::support::{Random, dedup_img, qemu, scratch};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Random operations in each run.
const OPERATIONS: usize = 70;
/// Random operations after it was deduplicated once more.
const AFTERWARDS: usize = 15;
/// Names that the user's snapshots may have.
const SNAPSHOTS: u64 = 4;

/// A deduplicated image and a plain one with the same content, and what was done to both so far.
pub(super) struct Soak {
    home: TempDir,
    shared: PathBuf,
    plain: PathBuf,
    random: Random,
    live: Vec<String>,
    log: Vec<String>,
}

/// One MiB of every kind of block that matters: fresh, repeated at 64 KiB and at 4 KiB, zeros, and filled with one byte.
fn content(random: &mut Random) -> Vec<u8> {
    let large: Vec<Vec<u8>> = (0..30).map(|_| random.bytes(64 << 10)).collect();
    let small: Vec<Vec<u8>> = (0..60).map(|_| random.bytes(4 << 10)).collect();
    let mut bytes = Vec::new();
    while bytes.len() < 12 << 20 {
        match random.below(10) {
            0 => bytes.resize(bytes.len() + (64 << 10), 0),
            1 => bytes.extend([random.below(3) as u8; 64 << 10]),
            2 => bytes.extend(random.bytes(64 << 10)),
            3 => (0..16).for_each(|_| bytes.extend(&small[random.below(60) as usize])),
            _ => bytes.extend(&large[random.below(30) as usize]),
        }
    }
    bytes
}

impl Soak {
    /// Converts the same content with the program under test and with qemu-img.
    pub(super) fn new(seed: u64, options: &str, pin: &str) -> Self {
        let (soak, source) = Self::plain(seed, options);
        let fixed = args!["convert", "-q", "-f", "raw", "-o", options, "--pin", pin, "-t", "unsafe"];
        dedup_img(fixed.into_iter().chain(args![source, soak.shared])).ok();
        soak
    }

    /// Converts the same content into compressed clusters, and with qemu-img.
    pub(super) fn compressed(seed: u64, options: &str) -> Self {
        let (soak, source) = Self::plain(seed, options);
        let fixed = args!["convert", "-q", "-c", "-f", "raw", "-o", options, "-t", "unsafe"];
        dedup_img(fixed.into_iter().chain(args![source, soak.shared])).ok();
        soak
    }

    /// Converts the content twice with qemu-img, has both images used a while, and deduplicates one of them in place.
    pub(super) fn in_place(seed: u64, options: &str, used: usize) -> Self {
        // QEMU resizes no version 2 image with snapshots, and the pool makes it version 3.
        let (mut soak, source) = Self::plain(seed, &options.replace("compat=0.10,", ""));
        qemu::convert("raw", &source, "qcow2", &soak.shared, &["-o", options]);
        for _ in 0..used {
            soak.step();
        }
        assert!(used == 0 || !soak.live.is_empty(), "no snapshot was taken before");
        soak.dedup();
        soak
    }

    /// Has an image used until it has snapshots, and converts it with them.
    pub(super) fn with_history(seed: u64, options: &str, more: &[&str]) -> Self {
        let (mut soak, _) = Self::plain(seed, options);
        std::fs::copy(&soak.plain, &soak.shared).unwrap();
        while soak.live.len() < 3 {
            soak.step();
        }
        let mut words = args!["convert", "-q", "--all-snapshots", "-o", options, "-t", "unsafe"].to_vec();
        words.extend(more.iter().map(Into::into));
        dedup_img(words.into_iter().chain(args![soak.plain, soak.shared])).ok();
        soak.log.push("dedup-img convert --all-snapshots".into());
        soak.judge_snapshots();
        soak
    }

    /// The plain image, and the content as a raw file.
    fn plain(seed: u64, options: &str) -> (Self, PathBuf) {
        let (home, mut random) = (scratch(), Random::new(seed));
        let [source, shared, plain] = ["source.raw", "shared.qcow2", "plain.qcow2"].map(|name| home.path().join(name));
        write_sparse(&source, &content(&mut random));
        qemu::convert("raw", &source, "qcow2", &plain, &["-o", options]);
        (Self { home, shared, plain, random, live: Vec::new(), log: Vec::new() }, source)
    }

    /// Deduplicates in place: all holds what it held, and a second time there is nothing to do.
    fn dedup(&mut self) {
        self.log.push("dedup-img dedup".into());
        let [first, second] = [(); 2].map(|()| {
            let ran = dedup_img(args!["dedup", "--output", "json", self.shared]);
            assert_eq!(ran.code, 0, "{}\n{}", ran.told(), self.story());
            self.judge();
            self.judge_snapshots();
            ran.stdout
        });
        assert!(first.contains("\"changed\": true"), "{first}\n{}", self.story());
        assert!(second.contains("\"changed\": false"), "{second}\n{}", self.story());
        let ran = dedup_img(args!["check", "--data", self.shared]);
        assert_eq!(ran.code, 0, "{}\n{}", ran.told(), self.story());
    }

    /// Collects, and uses the image on: after each of so many random operations it is clean and holds the same.
    pub(super) fn collect(&mut self, options: &[&str], operations: usize) {
        self.log.push(format!("dedup-img gc {}", options.join(" ")));
        let words = args!["gc", "-q"].into_iter().chain(options.iter().map(Into::into));
        let ran = dedup_img(words.chain(args![self.shared]));
        assert_eq!(ran.code, 0, "{}\n{}", ran.told(), self.story());
        let ran = dedup_img(args!["check", "--data", self.shared]);
        assert_eq!(ran.code, 0, "{}\n{}", ran.told(), self.story());
        self.judge();
        for _ in 0..operations {
            self.step();
            self.judge();
        }
        self.judge_snapshots();
    }

    /// Writes a changed disk into both images, ours by `convert -n` and the other by qemu-img's, and uses them on: after each of so
    /// many random operations ours is clean and both hold the same.
    pub(super) fn convert_into(&mut self, operations: usize) {
        let raw = self.home.path().join("changed.raw");
        qemu::convert("qcow2", &self.plain, "raw", &raw, &[]);
        let disk = std::fs::read(&raw).unwrap();
        let mut changed = Mixer::new(self.random.next(), 4096, &[&disk], &[]).changed(&disk, 9, 40);
        changed.truncate(disk.len() - self.random.below(disk.len() as u64 / 1024) as usize * 512);
        write_sparse(&raw, &changed);
        self.log.push(format!("dedup-img convert -n {} bytes", changed.len()));
        qemu::convert("raw", &raw, "qcow2", &self.plain, &["-n"]);
        let told = into(&[], "raw", &raw, &self.shared);
        assert_eq!(told["changed"], true, "{told:#}\n{}", self.story());
        self.judge();
        self.judge_snapshots();
        for _ in 0..operations {
            self.step();
            self.judge();
        }
        self.judge_snapshots();
    }

    /// Does one random operation to both images.
    fn step(&mut self) {
        let words = match self.random.below(20) {
            0..6 => self.access(&["write -P PATTERN"]),
            6..8 => self.access(&["write -z"]),
            8..10 => self.access(&["write -z -u"]),
            10..13 => self.access(&["discard"]),
            13..15 => self.access(&["write -P PATTERN", "discard", "write -z -u", "write -P PATTERN"]),
            15 | 16 => self.take_snapshot(),
            17 => self.use_snapshot("-a"),
            18 => self.use_snapshot("-d"),
            _ => self.resize(),
        };
        self.log.push(words.join(" "));
        for path in [&self.shared, &self.plain] {
            let (tool, rest) = words.split_first().unwrap();
            if let [what, action, name] = rest
                && what == "snapshot"
            {
                let ran = qemu::snapshot(action, name, path);
                assert_eq!(ran.code, 0, "{}\n{}", ran.told(), self.story());
                continue;
            }
            let mut arguments: Vec<_> = rest.iter().map(Into::into).collect();
            arguments.push(path.into());
            if words.contains(&"resize".to_owned()) {
                // qemu-img wants the file before the new size.
                let last = arguments.len() - 1;
                arguments.swap(last, last - 1);
            }
            let ran = qemu::run(tool, arguments);
            assert!(ran.code == 0 && !ran.text().contains("rror"), "{}\n{}", ran.told(), self.story());
        }
    }

    /// qemu-io commands at random places, some aligned to clusters and some not.
    fn access(&mut self, kinds: &[&str]) -> Vec<String> {
        let size = Image::open(&self.plain).header.size;
        let mut words: Vec<String> = ["qemu-io", "-t", "unsafe", "-f", "qcow2", "-d", "unmap"].map(Into::into).into();
        for kind in kinds {
            let grain = [512, 4 * K, 64 * K][self.random.below(3) as usize];
            let at = self.random.below(size / grain) * grain;
            let length = ((1 + self.random.below(9)) * grain).min(size - at);
            let pattern = format!("{}", 1 + self.random.below(200));
            words.extend(["-c".into(), format!("{} {at} {length}", kind.replace("PATTERN", &pattern))]);
        }
        words
    }

    fn take_snapshot(&mut self) -> Vec<String> {
        let name = format!("mine-{}", self.random.below(SNAPSHOTS));
        if self.live.contains(&name) {
            return self.snapshot("-a", name);
        }
        self.live.push(name.clone());
        self.snapshot("-c", name)
    }

    fn use_snapshot(&mut self, action: &str) -> Vec<String> {
        if self.live.is_empty() {
            return self.take_snapshot();
        }
        let at = self.random.below(self.live.len() as u64) as usize;
        let name = if action == "-d" { self.live.swap_remove(at) } else { self.live[at].clone() };
        self.snapshot(action, name)
    }

    fn snapshot(&self, action: &str, name: String) -> Vec<String> {
        vec!["qemu-img".into(), "snapshot".into(), action.into(), name]
    }

    fn resize(&mut self) -> Vec<String> {
        let size = (6 * M + self.random.below(12 * M)).next_multiple_of(512).to_string();
        ["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", &size].map(Into::into).into()
    }

    /// All operations so far, to repeat a failure by hand.
    fn story(&self) -> String {
        format!("after these operations on {}:\n{}", self.shared.display(), self.log.join("\n"))
    }

    /// I2: the deduplicated image is clean, and both read the same.
    fn judge(&self) {
        let ran = qemu::check(&self.shared);
        assert_eq!(ran.code, 0, "{}\n{}", ran.told(), self.story());
        let ran = qemu::compare("qcow2", &self.shared, "qcow2", &self.plain);
        assert!(ran.code == 0 && !ran.text().contains("size mismatch"), "{}\n{}", ran.told(), self.story());
    }

    /// What a snapshot holds, written out by qemu-img.
    fn snapshot_content(&self, path: &Path, name: &str) -> Vec<u8> {
        let raw = self.home.path().join("snapshot.raw");
        qemu::convert("qcow2", path, "raw", &raw, &["-l", &format!("snapshot.name={name}")]);
        std::fs::read(raw).unwrap()
    }

    /// The user's snapshots hold the same in both images.
    fn judge_snapshots(&self) {
        for name in &self.live {
            let same = self.snapshot_content(&self.shared, name) == self.snapshot_content(&self.plain, name);
            assert!(same, "snapshot {name} differs {}", self.story());
        }
    }

    /// The whole run.
    pub(super) fn run(mut self) {
        self.judge();
        for _ in 0..OPERATIONS {
            self.step();
            self.judge();
        }
        self.judge_snapshots();
        self.dedup();
        for _ in 0..AFTERWARDS {
            self.step();
            self.judge();
        }
        self.judge_snapshots();
        qemu::snapshot("-d", "dedup-pool", &self.shared).ok();
        self.judge();
    }
}

/// I2 where clusters are small and refcounts as wide as `convert` makes them.
#[test]
fn an_image_of_4k_clusters_stays_clean_whatever_qemu_does() {
    Soak::new(11, "cluster_size=4k", "shared").run();
}

/// I2 with every data cluster pooled: nothing that `convert` wrote is ever written in place.
#[test]
fn an_image_of_4k_clusters_with_all_pinned_stays_clean() {
    Soak::new(12, "cluster_size=4k,refcount_bits=32", "all").run();
}

/// I2 at QEMU's own default of 16 bits.
#[test]
fn an_image_of_4k_clusters_with_16_bit_refcounts_stays_clean() {
    Soak::new(13, "cluster_size=4k,refcount_bits=16", "shared").run();
}

/// I2 at QEMU's default cluster size.
#[test]
fn an_image_of_64k_clusters_stays_clean_whatever_qemu_does() {
    Soak::new(14, "cluster_size=64k", "shared").run();
}

/// I2 at QEMU's default cluster size and refcount width, with every data cluster pooled.
#[test]
fn an_image_of_64k_clusters_with_16_bit_refcounts_and_all_pinned_stays_clean() {
    Soak::new(15, "cluster_size=64k,refcount_bits=16", "all").run();
}

/// I2 where the writer postpones its refcount updates.
#[test]
fn an_image_with_lazy_refcounts_stays_clean() {
    Soak::new(16, "cluster_size=16k,lazy_refcounts=on", "shared").run();
}

/// I2 of what was deduplicated in place, at QEMU's own default of 16 bits.
#[test]
fn an_image_of_4k_clusters_deduplicated_in_place_stays_clean() {
    Soak::in_place(17, "cluster_size=4k", 0).run();
}

/// I2 of QEMU's defaults, deduplicated in place.
#[test]
fn an_image_of_64k_clusters_deduplicated_in_place_stays_clean() {
    Soak::in_place(18, "cluster_size=64k", 0).run();
}

/// I2 where deduplication makes version 3 of version 2.
#[test]
fn an_image_of_version_2_deduplicated_in_place_stays_clean() {
    Soak::in_place(19, "compat=0.10,cluster_size=4k", 0).run();
}

/// I2 where the user's snapshots are older than the pool.
#[test]
fn a_used_image_with_snapshots_deduplicated_in_place_stays_clean() {
    Soak::in_place(20, "cluster_size=4k", 40).run();
}

/// The soak can fail: with its pool deleted, the same image and the same operations end in what qemu-img calls corruption.
#[test]
fn without_its_pool_the_same_soak_ends_in_corruption() {
    let mut soak = Soak::new(11, "cluster_size=4k", "shared");
    qemu::snapshot("-d", "dedup-pool", &soak.shared).ok();
    soak.judge();
    let codes: Vec<i32> = (0..OPERATIONS)
        .map(|_| {
            soak.step();
            qemu::check(&soak.shared).code
        })
        .collect();
    assert!(codes.contains(&2), "qemu-img check found no corruption, so the soak proves nothing: {codes:?}");
}
