//! A disk that is written into one image every night, with a snapshot each time: after a month every night reads as it was, and the
//! file is as large as the different contents of all nights and the tables that lead to them.

use crate::args;
use crate::support::files::Files;
use crate::support::into::into;
use crate::support::root_disk::{SEED, root_disk, small_root_disk, system};
use crate::support::{Random, dedup_img, qemu, scratch, sha256_of};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Nights of a month.
const NIGHTS: u64 = 30;
/// Bytes of a cluster, as of a block of the file system.
const CLUSTER: usize = 4096;
/// Clusters that an L2 table leads to.
const PER_TABLE: usize = CLUSTER / 8;

/// A name for what a cluster holds; none for zeros.
type Name = Option<[u8; 32]>;

/// What happens to a file system in a day, done by debugfs, which needs no root.
struct Days {
    disk: PathBuf,
    home: PathBuf,
    random: Random,
    /// Files that the disk has already, and others.
    known: Vec<PathBuf>,
    other: Vec<PathBuf>,
    log: Vec<u8>,
    /// Files that were written, for later days to work on.
    written: Vec<String>,
    script: String,
    count: u64,
}

impl Days {
    fn say(&mut self, line: &str) {
        writeln!(self.script, "{line}").unwrap();
    }

    /// Writes a file under a new name in `directory`, or bytes made of it.
    fn add(&mut self, directory: &str, source: &Path, bytes: Option<Vec<u8>>) {
        self.count += 1;
        let name = format!("{directory}/{}-{}", self.count, source.file_name().unwrap().display());
        let source = match bytes {
            None => source.to_owned(),
            Some(bytes) => {
                let made = self.home.join(format!("made-{}", self.count));
                fs::write(&made, bytes).unwrap();
                made
            }
        };
        self.say(&format!("write {} {name}", source.display()));
        self.written.push(name);
    }

    fn any<'a>(&mut self, of: &'a [PathBuf]) -> &'a Path {
        &of[self.random.below(of.len() as u64) as usize]
    }

    /// The log grows; some files go, one is renamed; and by turns a directory is copied, a package replaced, new files come.
    fn pass(&mut self, day: u64) {
        self.script.clear();
        let lines =
            (0..200 + self.random.below(300)).map(|n| format!("day {day}, line {n}: {:x}\n", self.random.next()));
        self.log.extend(lines.collect::<String>().into_bytes());
        let log = self.home.join("log");
        fs::write(&log, &self.log).unwrap();
        if day > 1 {
            self.say("rm /grown.log");
        }
        self.say(&format!("write {} /grown.log", log.display()));
        for _ in 0..if self.written.len() > 30 { 4 } else { 0 } {
            let at = self.random.below(self.written.len() as u64) as usize;
            let gone = self.written.swap_remove(at);
            self.say(&format!("rm {gone}"));
        }
        if let Some(old) = self.written.first().cloned() {
            self.count += 1;
            let new = format!("/renamed-{}", self.count);
            self.say(&format!("ln {old} {new}"));
            self.say(&format!("unlink {old}"));
            self.written[0] = new;
        }
        let directory = format!("/day-{day}");
        self.say(&format!("mkdir {directory}"));
        let (known, other) = (self.known.clone(), self.other.clone());
        match day % 3 {
            0 => (0..20).for_each(|n| self.add(&directory, &known[(day as usize * 7 + n) % known.len()], None)),
            1 => {
                // A new version: the same files with some bytes changed, and one byte longer now and then.
                for _ in 0..12 {
                    let file = self.any(&known);
                    let mut bytes = fs::read(file).unwrap();
                    let at = self.random.below(bytes.len() as u64) as usize;
                    let end = bytes.len().min(at + 3000);
                    self.random.fill(&mut bytes[at..end]);
                    self.add(&directory, file, Some(bytes));
                }
            }
            _ => {
                for _ in 0..10 {
                    let file = self.any(&other);
                    self.add(&directory, file, None);
                }
            }
        }
        let script = self.home.join("script");
        fs::write(&script, &self.script).unwrap();
        let ran = system("debugfs", args!["-w", "-f", script, &self.disk]).ok();
        // It echoes commands, and goes on after an error.
        let errors = ran.text().lines().filter(|line| line.contains("rror") || line.contains("not found")).count();
        assert_eq!(errors, 0, "{}", ran.told());
    }
}

/// The names of all clusters of a raw disk.
fn names(disk: &Path) -> Vec<Name> {
    let (mut file, mut names, mut bytes) = (File::open(disk).unwrap(), Vec::new(), vec![0; CLUSTER]);
    while file.read_exact(&mut bytes).is_ok() {
        names.push(bytes.iter().any(|byte| *byte != 0).then(|| Sha256::digest(&bytes).into()));
    }
    names
}

/// What any image with 32-bit refcounts needs for all these disks, in clusters: each content once; a table for every part of a disk that
/// is not what it was the night before; the pool with what a disk has twice; a copy of the L1 table for each night.
struct Needed {
    contents: u64,
    tables: u64,
    pool: u64,
    others: u64,
}

impl Needed {
    fn of(nights: &[Vec<Name>]) -> Self {
        let (mut contents, mut twice, mut tables) = (BTreeSet::new(), BTreeSet::new(), 0);
        for (n, night) in nights.iter().enumerate() {
            let mut times: BTreeMap<[u8; 32], u64> = BTreeMap::new();
            night.iter().flatten().for_each(|name| *times.entry(*name).or_insert(0) += 1);
            twice.extend(times.iter().filter(|(_, times)| **times > 1).map(|(name, _)| *name));
            contents.extend(times.into_keys());
            for (at, part) in night.chunks(PER_TABLE).enumerate() {
                let before = n.checked_sub(1).and_then(|n| nights[n].chunks(PER_TABLE).nth(at));
                let is_new = before.map_or(part.iter().any(Option::is_some), |before| before != part);
                tables += u64::from(is_new);
            }
        }
        let clusters = |bytes: u64| bytes.div_ceil(CLUSTER as u64);
        let (contents, members) = (contents.len() as u64, twice.len() as u64);
        let pool = clusters(members * 8) + clusters(128 + members * 40) + 2;
        let l1 = clusters(nights[0].len().div_ceil(PER_TABLE) as u64 * 8);
        let mut others = l1 * (nights.len() as u64 + 1) + clusters(nights.len() as u64 * 80) + 2;
        others += clusters((contents + tables + pool + others) * 4);
        Self { contents, tables, pool, others }
    }

    fn bytes(&self) -> u64 {
        (self.contents + self.tables + self.pool + self.others) * CLUSTER as u64
    }
}

/// Thirty nights. With `DEDUP_IMG_LONG_HISTORY` in the environment the disk is the large one.
#[test]
fn a_month_of_nights_reads_as_it_was_and_stores_each_content_once() {
    let home = scratch();
    let [disk, image, read] = ["disk.raw", "history.qcow2", "read.raw"].map(|name| home.path().join(name));
    let long = std::env::var_os("DEDUP_IMG_LONG_HISTORY").is_some();
    fs::copy(if long { root_disk() } else { small_root_disk() }, &disk).unwrap();
    let size = disk.metadata().unwrap().len();
    dedup_img(args!["create", "-q", "-o", "cluster_size=4k", &image, size.to_string()]).ok();
    let mut days = Days {
        disk: disk.clone(),
        home: home.path().to_owned(),
        random: Random::new(30),
        known: Files::new(SEED).write(&home.path().join("known"), 150),
        other: Files::new(SEED + 1).write(&home.path().join("other"), 300),
        log: Vec::new(),
        written: Vec::new(),
        script: String::new(),
        count: 0,
    };
    let (mut nights, mut sums, mut written) = (Vec::new(), Vec::new(), 0);
    for night in 1..=NIGHTS {
        days.pass(night);
        let told = into(&[], "raw", &disk, &image);
        assert_eq!(told["changed"], true, "{told:#}");
        written += told["written_clusters"].as_u64().unwrap();
        qemu::snapshot("-c", &format!("night-{night}"), &image).ok();
        nights.push(names(&disk));
        sums.push(sha256_of(&disk));
    }
    assert_eq!(sums.iter().collect::<BTreeSet<_>>().len() as u64, NIGHTS, "nothing happened in a night");
    qemu::check_clean(&image);
    dedup_img(args!["check", "--data", &image]).ok();
    for (night, sum) in (1..).zip(&sums) {
        qemu::convert("qcow2", &image, "raw", &read, &["-l", &format!("snapshot.name=night-{night}")]);
        assert_eq!(sha256_of(&read), *sum, "night {night} reads otherwise");
    }

    let needed = Needed::of(&nights);
    let (length, allocated) =
        (image.metadata().unwrap().len(), 512 * std::os::unix::fs::MetadataExt::blocks(&image.metadata().unwrap()));
    let last = nights.iter().map(|night| night.iter().flatten().count()).max().unwrap();
    println!(
        "{} clusters are different in {NIGHTS} nights of at most {last}, {written} were written; {} tables, {} clusters of the pool, {} others: {} \
         bytes needed; the file has {length}, {:+.2} %, and occupies {allocated}",
        needed.contents,
        needed.tables,
        needed.pool,
        needed.others,
        needed.bytes(),
        (length as f64 / needed.bytes() as f64 - 1.0) * 100.0,
    );
    assert!(length <= needed.bytes() / 100 * 102, "{length} bytes, {} are needed", needed.bytes());
    assert!(length >= needed.contents * CLUSTER as u64, "{length} bytes are too few");
}
