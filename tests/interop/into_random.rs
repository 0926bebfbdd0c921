//! `convert -n` among all else that may happen to an image: stock QEMU writes, discards and takes, applies and deletes snapshots, and
//! `dedup` and `gc` work on it in between. After every step the disk and each snapshot read as a model says, and all is clean.

use super::soak::Soak;
use crate::args;
use crate::support::corpus::write_sparse;
use crate::support::into::{Mixer, into, words};
use crate::support::{Random, dedup_img, qemu, scratch};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// An image, and what it must read.
struct Model {
    home: TempDir,
    path: PathBuf,
    grain: u64,
    random: Random,
    disk: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
    taken: u64,
    log: Vec<String>,
    written: u64,
}

impl Model {
    fn new(seed: u64, size: usize, options: &str) -> Self {
        let home = scratch();
        let path = home.path().join("image.qcow2");
        qemu::create("qcow2", &path, size as u64, options);
        let grain = if options.contains("cluster_size=512") { 512 } else { 4096 };
        let (disk, snapshots) = (vec![0; size], BTreeMap::new());
        Self { home, path, grain, random: Random::new(seed), disk, snapshots, taken: 0, log: Vec::new(), written: 0 }
    }

    /// A changed disk, often with what snapshots have; it may end before the image does.
    fn convert(&mut self) {
        let source = self.home.path().join("source.raw");
        let disks: Vec<&[u8]> = self.snapshots.values().chain([&self.disk]).map(|disk| &disk[..]).collect();
        let mut raw = Mixer::new(self.random.next(), self.grain, &disks, &[]).changed(&self.disk, 8, 40);
        if self.random.below(4) == 0 {
            raw.truncate((1 + self.random.below(raw.len() as u64 / 512)) as usize * 512);
        }
        write_sparse(&source, &raw);
        let options: &[&str] =
            [&[][..], &["--threads", "1"], &["--pin", "all"], &["--memory", "1M"]][self.random.below(4) as usize];
        self.log.push(format!("convert -n {} {} bytes", options.join(" "), raw.len()));
        let summary = into(options, "raw", &source, &self.path);
        self.written += summary["written_clusters"].as_u64().unwrap();
        self.disk[..raw.len()].copy_from_slice(&raw);
        let again = into(&[], "raw", &source, &self.path);
        assert_eq!(again["changed"], false, "{again:#} {}", self.story());
    }

    fn step(&mut self) {
        let live: Vec<String> = self.snapshots.keys().cloned().collect();
        let any = live.get(self.random.below(live.len().max(1) as u64) as usize).cloned();
        let ours = |model: &mut Self, words: &[&str]| {
            model.log.push(words.join(" "));
            let words = words.iter().map(Into::into).chain(args!["-q", model.path]);
            let ran = dedup_img(words);
            assert_eq!(ran.code, 0, "{} {}", ran.told(), model.story());
        };
        match (self.random.below(14), any) {
            (0..6, _) => self.convert(),
            (6 | 7, _) if live.len() < 4 => {
                self.taken += 1;
                let name = format!("night-{}", self.taken);
                self.snapshot("-c", &name);
                self.snapshots.insert(name, self.disk.clone());
            }
            (8, Some(name)) => {
                self.snapshot("-d", &name);
                self.snapshots.remove(&name);
            }
            (9, Some(name)) => {
                self.snapshot("-a", &name);
                self.disk.clone_from(&self.snapshots[&name]);
            }
            (10, _) => ours(self, &["dedup"]),
            (11, _) => ours(self, &["gc"]),
            (12, _) => ours(self, &["gc", "--compact"]),
            _ => self.write(),
        }
        self.judge();
    }

    fn snapshot(&mut self, action: &str, name: &str) {
        self.log.push(format!("snapshot {action} {name}"));
        let ran = qemu::snapshot(action, name, &self.path);
        assert_eq!(ran.code, 0, "{} {}", ran.told(), self.story());
    }

    /// A guest writes, zeroes and discards.
    fn write(&mut self) {
        let mut commands = args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap"].to_vec();
        for _ in 0..4 {
            let at = self.random.below(self.disk.len() as u64 / 512) * 512;
            let length = ((1 + self.random.below(60)) * 512).min(self.disk.len() as u64 - at);
            let byte = (1 + self.random.below(200)) as u8;
            let range = at as usize..(at + length) as usize;
            let command = match self.random.below(4) {
                0 => "write -z".to_owned(),
                // A discard of whole clusters reads as zeros: there is no backing file.
                1 if at.is_multiple_of(4096) && length.is_multiple_of(4096) => "discard".to_owned(),
                _ => format!("write -P {byte}"),
            };
            self.disk[range].fill(if command.contains("-P") { byte } else { 0 });
            self.log.push(format!("{command} {at} {length}"));
            commands.extend(args!["-c", format!("{command} {at} {length}")]);
        }
        commands.push(self.path.clone().into());
        let ran = qemu::run("qemu-io", commands).ok();
        assert!(!ran.text().contains("rror"), "{} {}", ran.told(), self.story());
    }

    fn story(&self) -> String {
        format!("after these operations on {}:\n{}", self.path.display(), self.log.join("\n"))
    }

    fn judge(&self) {
        let ran = qemu::check(&self.path);
        assert_eq!(ran.code, 0, "{} {}", ran.told(), self.story());
        let raw = self.home.path().join("read.raw");
        let mut layers = vec![(None, &self.disk)];
        layers.extend(self.snapshots.iter().map(|(name, disk)| (Some(format!("snapshot.name={name}")), disk)));
        for (name, disk) in layers {
            let more: Vec<&str> = name.iter().flat_map(|name| ["-l", name.as_str()]).collect();
            qemu::convert("qcow2", &self.path, "raw", &raw, &more);
            assert!(fs::read(&raw).unwrap() == *disk, "{name:?} reads otherwise {}", self.story());
        }
    }

    fn run(mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
        }
        let ran = dedup_img(args!["check", "--data", &self.path]);
        assert_eq!(ran.code, 0, "{} {}", ran.told(), self.story());
        assert!(self.written > 50, "only {} clusters were written {}", self.written, self.story());
    }
}

#[test]
fn histories_of_small_clusters_read_as_the_model_says() {
    Model::new(31, 320 << 10, "cluster_size=512").run(30);
}

#[test]
fn histories_read_as_the_model_says() {
    Model::new(32, (2 << 20) + 1536, "cluster_size=4k").run(45);
    Model::new(33, 3 << 20, "cluster_size=4k,refcount_bits=64,lazy_refcounts=on").run(25);
}

#[test]
fn histories_of_narrow_refcounts_read_as_the_model_says() {
    Model::new(34, 1 << 20, "cluster_size=4k,refcount_bits=8").run(30);
}

/// I2 by soak, `qemu-img convert -n` being the other side: what both write into their images reads the same, and whatever stock QEMU
/// does to ours afterwards leaves it clean.
#[test]
fn what_was_written_into_an_image_stays_clean_whatever_qemu_does() {
    for (seed, options) in [(41, "cluster_size=4k"), (42, "cluster_size=64k,refcount_bits=32")] {
        let mut soak = Soak::new(seed, options, "shared");
        soak.convert_into(8);
        soak.convert_into(8);
        soak.collect(&["--compact"], 3);
        soak.convert_into(8);
    }
    let mut soak = Soak::in_place(43, "compat=0.10,cluster_size=4k", 0);
    soak.convert_into(8);
}

/// The size rule is that of qemu-img: a source that ends where its last data does is no smaller for that.
#[test]
fn a_larger_source_is_refused_as_qemu_img_does() {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    qemu::create("qcow2", &target, 1 << 20, "");
    for length in [(1 << 20) + 1, (1 << 20) + 512, 8 << 20] {
        fs::File::create(&source).unwrap().set_len(length).unwrap();
        let theirs = qemu::img(args!["convert", "-n", "-f", "raw", "-O", "qcow2", &source, &target]);
        assert_eq!(theirs.code, 1, "{}", theirs.told());
        let same = theirs.stderr.contains("output file is smaller than input file");
        qemu::words(&qemu::SEEN, same, || theirs.told());
        let before = fs::read(&target).unwrap();
        dedup_img(words(&[], "raw", &source, &target)).refused(&["output file is smaller than input file"]);
        assert!(fs::read(&target).unwrap() == before);
    }
}
