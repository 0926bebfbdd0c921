//! Every program reads every image and writes to a copy of each; what comes of it is what README.md says.

use crate::images::{self, rows};
use crate::nbd;
use crate::programs::{PROGRAMS, Program};
use crate::request::Request;
use crate::support::{Random, dedup_img, qemu, scratch};
use crate::{args, tables};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

/// Requests to each image.
const REQUESTS: usize = 60;

/// The ids of the snapshots without the pool.
fn snapshots(path: &Path) -> Vec<String> {
    let snapshots = qemu::snapshots(path).into_iter().filter(|(_, name)| name != "dedup-pool");
    snapshots.map(|(id, _)| id).collect()
}

/// The active disk and every snapshot but the pool, as QEMU reads them.
fn layers(path: &Path) -> Vec<Vec<u8>> {
    try_layers(path).unwrap_or_else(|told| panic!("{told}"))
}

/// [`layers`] of an image that may be past reading; then what qemu-img said.
fn try_layers(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    let raw = path.with_extension("raw");
    let mut chosen = vec![Vec::new()];
    chosen.extend(snapshots(path).iter().map(|id| args!["-l", format!("snapshot.id={id}")].to_vec()));
    let layers = chosen.into_iter().map(|chosen| {
        let ran = qemu::img([&args!["convert", "-f", "qcow2", "-O", "raw"][..], &chosen, &args![path, raw]].concat());
        let layer = if ran.code == 0 { Ok(fs::read(&raw).unwrap()) } else { Err(ran.told()) };
        fs::remove_file(&raw).unwrap();
        layer
    });
    layers.collect()
}

/// Where two byte strings differ, if they do.
fn difference(expected: &[u8], seen: &[u8]) -> Option<String> {
    if expected.len() != seen.len() {
        return Some(format!("{} bytes instead of {}", seen.len(), expected.len()));
    }
    let first = expected.iter().zip(seen).position(|(a, b)| a != b)?;
    let count = expected.iter().zip(seen).filter(|(a, b)| a != b).count();
    Some(format!("{count} bytes differ, the first at {first:#x}"))
}

/// Writes of all lengths to shared, unshared, compressed and absent clusters, some with bytes that are there already, and the
/// disk as it must be after them.
fn requests(seed: u64, disk: &mut [u8], zeros: bool) -> Vec<Request> {
    let mut random = Random::new(seed);
    let sectors = disk.len() as u64 / 512;
    let mut one = |n| {
        let length = [1, 2, 8, 8, 16, 31, 128, 200][random.below(8) as usize].min(sectors);
        let mut first = random.below(sectors - length + 1);
        if n % 2 == 0 {
            // Begins with a cluster of 4 KiB.
            first -= first % 8;
        }
        let (at, length) = (first as usize * 512, length as usize * 512);
        if zeros && n % 5 == 4 {
            disk[at..at + length].fill(0);
            return Request::Zeros(at as u64, length as u64);
        }
        let bytes = if n % 3 == 0 { disk[..length].to_vec() } else { random.bytes(length) };
        disk[at..at + length].copy_from_slice(&bytes);
        Request::Write(at as u64, bytes)
    };
    (0..REQUESTS).map(&mut one).collect()
}

/// Whether every sector of the disk is as before the requests or after one of them.
fn is_between(before: &[u8], requests: &[Request], seen: &[u8]) -> bool {
    let mut known: Vec<bool> = before.chunks(512).zip(seen.chunks(512)).map(|(old, now)| old == now).collect();
    for request in requests {
        let (at, bytes) = match request {
            Request::Write(at, bytes) => (*at, bytes.clone()),
            Request::Zeros(at, length) => (*at, vec![0; *length as usize]),
        };
        let first = at as usize / 512;
        for (n, sector) in bytes.chunks(512).enumerate() {
            known[first + n] |= seen[(first + n) * 512..][..512] == *sector;
        }
    }
    before.len() == seen.len() && known.iter().all(|&known| known)
}

/// One program at work: what it says on the way is told where the tables do not have it.
struct Trial<'a> {
    program: Program,
    row: &'static str,
    /// A copy of the image.
    path: PathBuf,
    /// What it holds.
    layers: &'a [Vec<u8>],
    told: Vec<String>,
}

impl Trial<'_> {
    fn tell(&mut self, what: impl std::fmt::Display) {
        self.told.push(format!("{}, {}: {what}", self.program.column, self.row));
    }

    /// The cell for a refusal, whose words the README has.
    fn refusal(&mut self, words: &str) -> String {
        let words = words.lines().next().unwrap_or_default().replace('`', "'");
        self.tell(&words);
        if tables::has_refusal(self.program.column, &words) { "refuses".into() } else { format!("refuses: {words}") }
    }

    /// The cell for reading.
    fn read(&mut self) -> String {
        match self.program.read(&self.path) {
            Ok(bytes) => match difference(&self.layers[0], &bytes) {
                None => "same".into(),
                Some(what) => {
                    self.tell(what);
                    "**other bytes**".into()
                }
            },
            Err(words) => self.refusal(&words),
        }
    }

    /// The cell for writing, after which the image is used up.
    fn write(&mut self) -> String {
        let base = self.path.with_file_name("base");
        let below = fs::read(&base).ok();
        let before = fs::read(&self.path).unwrap();
        let table = qemu::snapshots(&self.path);
        let mut expected = self.layers.to_vec();
        let seed = rows().position(|row| row == self.row).unwrap() as u64;
        let requests = requests(seed, &mut expected[0], self.program.zeros);
        let refusal = self.program.write(&self.path, &requests).map_err(|words| self.refusal(&words)).err();
        if let Some(refusal) = &refusal
            && fs::read(&self.path).unwrap() == before
        {
            return refusal.clone();
        }
        let mut wrong = Vec::new();
        let seen = try_layers(&self.path).unwrap_or_else(|told| {
            self.tell(told);
            wrong.push("unreadable");
            Vec::new()
        });
        if let Some(disk) =
            seen.first().filter(|disk| refusal.is_some() && is_between(&self.layers[0], &requests, disk))
        {
            expected[0].clone_from(disk);
        }
        for (n, (expected, seen)) in expected.iter().zip(&seen).enumerate() {
            if let Some(what) = difference(expected, seen) {
                self.tell(format!("layer {n}: {what}"));
                wrong.push(if n == 0 { "disk" } else { "snapshot" });
            }
        }
        if qemu::snapshots(&self.path) != table {
            wrong.push("snapshot table");
        }
        if fs::read(&base).ok() != below {
            wrong.push("backing file");
        }
        wrong.extend(self.checks());
        wrong.dedup();
        if wrong.is_empty() {
            // What it left is sound ground for the next one.
            dedup_img(args!["dedup", "-q", "-f", "qcow2", self.path]).ok();
            qemu::check_clean(&self.path);
            assert!(layers(&self.path) == expected, "{}, {}: dedup after it", self.program.column, self.row);
        }
        let wrong = (!wrong.is_empty()).then(|| format!("**wrong: {}**", wrong.join(", ")));
        match (refusal, wrong) {
            (None, None) => "right".into(),
            (None, Some(wrong)) => wrong,
            (Some(refusal), None) => format!("{refusal} midway"),
            (Some(refusal), Some(wrong)) => format!("{refusal} midway, {wrong}"),
        }
    }

    /// What both checks say, as words for the table; nothing where both are clean.
    fn checks(&mut self) -> Option<&'static str> {
        let check = qemu::check(&self.path);
        let ours = dedup_img(args!["check", "--data", "-f", "qcow2", self.path]);
        for ran in [&check, &ours] {
            if ran.code != 0 {
                self.tell(ran.told().chars().take(600).collect::<String>());
            }
        }
        match (check.code, ours.code) {
            (0, 0) => None,
            (3, 3) => Some("leaks"),
            (2, 2) => Some("check"),
            _ => Some("the checks disagree"),
        }
    }
}

/// A copy of every file of a directory.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Lets a program read every image and write to a copy of each; says where its columns are not true.
fn judge(program: Program, home: &Path, contents: &[Vec<Vec<u8>>]) -> Vec<String> {
    let (mut reads, mut writes, mut told) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for ((n, row), layers) in rows().enumerate().zip(contents) {
        let own = home.join(program.column).join(n.to_string());
        copy(&home.join(n.to_string()), &own);
        let mut trial = Trial { program, row, path: own.join("image"), layers, told: Vec::new() };
        reads.insert(row.to_owned(), trial.read());
        writes.insert(row.to_owned(), trial.write());
        fs::remove_dir_all(own).unwrap();
        told.append(&mut trial.told);
    }
    let mut untrue = Vec::new();
    for (heading, cells) in [("Reading", reads), ("Writing", writes)] {
        let written = tables::column(heading, program.column);
        for row in written.keys().filter(|row| !cells.contains_key(*row)) {
            untrue.push(format!("{heading}: README.md has the row {row:?}, and there is no such image"));
        }
        for row in rows().filter(|&row| written.get(row) != cells.get(row)) {
            let says = written.get(row).map_or("nothing", String::as_str);
            untrue
                .push(format!("{heading}, {}, {row}: README.md says {says:?}, seen {:?}", program.column, cells[row]));
        }
    }
    if !untrue.is_empty() {
        untrue.append(&mut told);
    }
    untrue
}

/// The layers of every image; qemu-nbd exports the snapshots among them as qemu-img reads them.
fn contents(home: &Path) -> Vec<Vec<Vec<u8>>> {
    let contents = rows().enumerate().map(|(n, row)| {
        let path = home.join(n.to_string()).join("image");
        let layers = layers(&path);
        for (id, expected) in snapshots(&path).iter().zip(&layers[1..]) {
            let seen = nbd::read_snapshot(&path, id).unwrap();
            assert_eq!(difference(expected, &seen), None, "{row}, snapshot {id}");
        }
        layers
    });
    contents.collect()
}

#[test]
fn every_reader_and_writer_does_what_the_tables_say() {
    let home = scratch();
    images::make(home.path());
    let contents = contents(home.path());
    let (place, contents) = (home.path(), &contents[..]);
    let untrue: Vec<String> = thread::scope(|scope| {
        let running = PROGRAMS.map(|program| scope.spawn(move || judge(program, place, contents)));
        running.into_iter().flat_map(|judge| judge.join().unwrap()).collect()
    });
    assert!(untrue.is_empty(), "tests/readers/README.md is not true:\n{}", untrue.join("\n"));
}
