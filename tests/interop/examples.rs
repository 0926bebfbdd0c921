//! The examples do what they say, by the word of qemu-io, qemu-img and the independent reader.

use crate::args;
use crate::support::reader::{Entry, Image};
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::Path;

const CLUSTER: usize = 4096;

/// Runs an example, which cargo builds beside the tests.
fn example<I: IntoIterator<Item = OsString>>(name: &str, args: I) -> Ran {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().unwrap().with_file_name("examples").join(name);
    assert!(path.exists(), "{} is not there: run `cargo build --examples`", path.display());
    qemu::run(path.to_str().unwrap(), args)
}

/// Fails where it was no refusal of the example `name` in these words.
#[track_caller]
fn refused(ran: &Ran, name: &str, words: &str) {
    assert!(ran.code == 1 && ran.stderr.starts_with(&format!("{name}: ")), "{}", ran.told());
    assert!(ran.stderr.trim_end().lines().count() == 1 && ran.stderr.contains(words), "{}", ran.told());
}

/// A disk of `clusters` clusters: contents that come once, twice and ten times, and zeros.
fn write_disk(path: &Path, clusters: usize) {
    let mut random = Random::new(7);
    // Every other content compresses.
    let content = |random: &mut Random, n: u64| match n % 2 {
        0 => random.bytes(CLUSTER),
        _ => [vec![b'-'; CLUSTER / 2], random.bytes(CLUSTER / 2)].concat(),
    };
    let repeated: Vec<Vec<u8>> = (0..clusters as u64 / 20).map(|n| content(&mut random, n)).collect();
    let mut disk = Vec::new();
    for _ in 0..clusters {
        let next = match random.below(4) {
            0 => vec![0; CLUSTER],
            1 => repeated[random.below(repeated.len() as u64) as usize].clone(),
            n => content(&mut random, n),
        };
        disk.extend(next);
    }
    fs::write(path, disk).unwrap();
}

/// What the example `read` prints of a range is what qemu-io reads there.
fn reads_as_qemu(image: &Path, size: u64) {
    let mut random = Random::new(size);
    let mut ranges = vec![(0, 70_000), (size - 4097, 4097), (3 << 20, 20), (size, 0)];
    ranges.extend((0..8).map(|_| (random.below(size - 9000), 1 + random.below(9000))));
    for (offset, length) in ranges {
        let ours = example("read", args![image, offset.to_string(), length.to_string()]).ok();
        let theirs = qemu::io("qcow2", image, &[format!("read -v {offset} {length}")]);
        let dump = |text: &str| -> Vec<String> {
            text.lines().filter(|line| line.get(8..11) == Some(":  ")).map(str::to_owned).collect()
        };
        assert_eq!(ours.stdout.lines().count() as u64, length.div_ceil(16), "{}", ours.told());
        assert_eq!(dump(&ours.stdout), dump(&theirs.stdout), "{offset} {length}: {}", theirs.line);
    }
}

#[test]
fn the_example_read_reads_a_chain_as_qemu_io_does() {
    let home = scratch();
    let [raw, base, overlay] = ["raw", "base.qcow2", "overlay.qcow2"].map(|name| home.path().join(name));
    write_disk(&raw, 1000);
    qemu::img(args!["convert", "-c", "-f", "raw", "-O", "qcow2", raw, base]).ok();
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay, "8M"]).ok();
    let writes = ["write -P 7 65000 200000", "write -z 1M 128k", "write -P 9 7340032 512", "write -P 65 3145728 20"];
    qemu::io("qcow2", &overlay, &writes.map(str::to_owned));
    reads_as_qemu(&overlay, 8 << 20);

    let listed = example("read", args![overlay]).ok().stdout;
    let (first, ranges) = listed.split_once('\n').unwrap();
    assert_eq!(first, "8388608 bytes, qcow2");
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x").unwrap(), 16).unwrap();
    let ranges: Vec<(u64, u64)> =
        ranges.lines().filter_map(|line| line.split_once(' ')).map(|(at, len)| (hex(at), hex(at) + hex(len))).collect();
    assert!(ranges.is_sorted() && !ranges.is_empty(), "{listed}");
    let map = qemu::img(args!["map", "-f", "qcow2", "--output=json", overlay]).ok().stdout;
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    for extent in map.iter().filter(|extent| extent["data"] == true) {
        let [start, length] = ["start", "length"].map(|key| extent[key].as_u64().unwrap());
        let covered: u64 =
            ranges.iter().map(|&(from, to)| to.min(start + length).saturating_sub(from.max(start))).sum();
        assert_eq!(covered, length, "{extent} is not listed as data: {listed}");
    }

    refused(&example("read", args![overlay, "8388600", "9"]), "read", "behind the disk");
    refused(&example("read", args![home.path().join("none")]), "read", "No such file or directory");
}

/// Where an L2 entry's cluster is: compressed or not, and its host offset.
fn place(entry: Entry) -> Option<(bool, u64)> {
    match entry {
        Entry::Data { host, .. } => Some((false, host)),
        Entry::Compressed { host, .. } => Some((true, host)),
        Entry::Unallocated | Entry::Zero(_) => None,
    }
}

/// What the example `sharing` has to print of the image at `path`, by the independent reader.
fn expected(path: &Path) -> String {
    let (image, raw) = (Image::open(path), path.with_extension("expected"));
    qemu::img(args!["convert", "-f", "qcow2", "-O", "raw", path, raw]).ok();
    let disk = fs::read(&raw).unwrap();
    let mut references: BTreeMap<(bool, u64), u64> = BTreeMap::new();
    let mut guests: BTreeMap<(bool, u64), Vec<usize>> = BTreeMap::new();
    for table in image.active() {
        for (entry, index) in table.entries.into_iter().zip(0..) {
            let guest = (table.index * image.l2_entries() + index) as usize * CLUSTER;
            if let Some(at) = place(entry).filter(|_| guest < disk.len()) {
                *references.entry(at).or_default() += 1;
                guests.entry(at).or_default().push(guest);
            }
        }
    }
    let mut pooled = BTreeSet::new();
    for snapshot in image.snapshots().0 {
        let tables = image.tables(snapshot.l1_table_offset, snapshot.l1_size);
        for at in tables.into_iter().flat_map(|table| table.entries).filter_map(place) {
            match snapshot.name.as_str() {
                "dedup-pool" => drop(pooled.insert(at)),
                _ => *references.entry(at).or_default() += 1,
            }
        }
    }
    let mut text = String::new();
    for (at, guests) in guests.into_iter().filter(|(_, guests)| guests.len() > 1) {
        let content = &disk[guests[0]..guests[0] + CLUSTER];
        let name = match pooled.contains(&at) {
            true => Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect(),
            false => "not-pooled".to_owned(),
        };
        let packed = if at.0 { " compressed" } else { "" };
        let guests: String = guests.iter().map(|guest| format!(" {guest:#x}")).collect();
        text.push_str(&format!("{:#x}{packed} references={} {name}:{guests}\n", at.1, references[&at]));
    }
    text
}

#[track_caller]
fn lists_sharers(path: &Path, some: &str) {
    let listed = example("sharing", args![path]).ok().stdout;
    assert!(listed.contains(some), "nothing is {some}: {listed}");
    assert_eq!(listed, expected(path));
}

#[test]
fn the_example_sharing_lists_what_the_reader_finds() {
    let home = scratch();
    let [raw, image, packed] = ["raw", "image.qcow2", "packed.qcow2"].map(|name| home.path().join(name));
    write_disk(&raw, 700);
    let convert = ["convert", "-q", "-f", "raw", "-o", "cluster_size=4k"];
    dedup_img(convert.map(OsString::from).into_iter().chain(args![raw, image])).ok();
    dedup_img(convert.map(OsString::from).into_iter().chain(args!["-c", raw, packed])).ok();
    lists_sharers(&image, " references=");
    lists_sharers(&packed, " compressed references=");
    // The guest goes on writing, a snapshot refers to all of it, and what the disk has alone after that is none of the list.
    qemu::img(args!["snapshot", "-c", "before", image]).ok();
    qemu::io("qcow2", &image, &["write -P 3 400k 1M".into(), "write -P 3 1900k 64k".into()]);
    lists_sharers(&image, " references=");
    dedup_img(args!["dedup", "-q", image]).ok();
    lists_sharers(&image, " references=");
    dedup_img(args!["gc", "-q", "--drop-pool", image]).ok();
    lists_sharers(&image, " not-pooled:");

    let before = sha256_of(&image);
    refused(&example("sharing", args![raw]), "sharing", "a raw image shares nothing");
    refused(&example("sharing", args![&image, &image]), "sharing", "give one image");
    assert_eq!(sha256_of(&image), before);
}

#[test]
fn the_example_dedup_progress_stops_in_time_and_goes_on() {
    let home = scratch();
    let [raw, image] = ["raw", "image.qcow2"].map(|name| home.path().join(name));
    write_disk(&raw, 900);
    qemu::img(args!["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, image]).ok();
    let stored = || {
        let entries = Image::open(&image).active().into_iter().flat_map(|table| table.entries);
        entries.filter_map(place).collect::<BTreeSet<_>>().len()
    };
    let (before, plain) = (stored(), sha256_of(&image));

    refused(&example("dedup_progress", args![&image, "0"]), "dedup_progress", "interrupted; another run goes on");
    assert_eq!(sha256_of(&image), plain, "time was up before anything was written");

    let ran = example("dedup_progress", args![&image]).ok();
    let lines: Vec<&str> = ran.stdout.lines().collect();
    for phase in ["  0 % checking", " 10 % scanning", " 65 % comparing", " 80 % writing", "100 % settling"] {
        assert_eq!(lines.iter().filter(|line| **line == phase).count(), 1, "{phase}: {}", ran.told());
    }
    let freed = before - stored();
    assert!(freed > 0 && lines.last().unwrap().starts_with(&format!("{freed} clusters freed, ")), "{}", ran.told());
    assert_eq!(qemu::compare("raw", &raw, "qcow2", &image).code, 0);
    qemu::check_clean(&image);
    assert_eq!(names_in(home.path()), ["image.qcow2", "raw"]);
}

#[test]
fn the_examples_convert_memory_and_check_json_agree_with_qemu() {
    let home = scratch();
    let [raw, image] = ["raw", "image.qcow2"].map(|name| home.path().join(name));
    let ran = example("convert_memory", args![&image]).ok();
    assert!(ran.stdout.lines().last().unwrap().starts_with("4 of "), "{}", ran.told());
    let percent: Vec<u32> = ran.stdout.lines().filter_map(|line| line.split_once('%')?.0.trim().parse().ok()).collect();
    assert!(percent.is_sorted() && percent.last() == Some(&100), "{}", ran.told());
    let mut disk = vec![0; 64 << 20];
    for (mib, content) in disk.chunks_mut(1 << 20).enumerate() {
        content[..256 << 10].fill(mib as u8 % 4 + 1);
    }
    fs::write(&raw, disk).unwrap();
    assert_eq!(qemu::compare("raw", &raw, "qcow2", &image).code, 0);
    qemu::check_clean(&image);

    let told =
        |ran: &Ran| -> Vec<Value> { ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    let clean = told(&example("check_json", args![&image]).ok());
    assert_eq!((clean.len(), &clean[0]["report"]["corruptions"]), (1, &Value::from(0)));
    // Without its first L1 entry the disk leaves leaks: a table, and what it led to.
    let mut bytes = fs::read(&image).unwrap();
    let offset = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes[offset..offset + 8].fill(0);
    fs::write(&image, bytes).unwrap();
    let ran = example("check_json", args![&image]);
    let found = told(&ran);
    assert_eq!(ran.code, 1, "{}", ran.told());
    let qemu = qemu::img(args!["check", "-f", "qcow2", "--output=json", image]);
    let qemu: Value = serde_json::from_str(&qemu.stdout).unwrap();
    assert!(qemu["leaks"].as_u64().unwrap() > 0);
    assert_eq!(found.last().unwrap()["report"]["leaks"], qemu["leaks"], "{}", ran.told());
    assert_eq!(found[0]["finding"]["severity"], "leak", "{}", ran.told());
}
