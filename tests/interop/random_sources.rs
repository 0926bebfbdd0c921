//! Sources that nobody thought of: random chains of up to three layers, each with random options and random accesses.

use crate::args;
use crate::support::corpus::{K, M, plain};
use crate::support::{Random, dedup_img, qemu, scratch};
use std::fs;
use std::path::{Path, PathBuf};

/// One of the choices.
fn pick<T: Copy>(random: &mut Random, choices: &[T]) -> T {
    choices[random.below(choices.len() as u64) as usize]
}

/// Makes one layer in `home` over the base, if there is one, and returns its name and what was done, for messages.
fn layer(random: &mut Random, home: &Path, depth: u64, base: Option<&str>) -> (String, String) {
    let name = format!("layer-{depth}.qcow2");
    // Bases tend to be shorter than what lies over them, and small clusters leave most L2 tables out.
    let size = pick(random, &[64 * K, 512 * K, M << depth, M << (2 * depth)]) + 512 * random.below(300);
    let extended = random.below(5) < 2;
    let cluster = if extended {
        pick(random, &[16 * K, 64 * K, 2 * M])
    } else {
        pick(random, &[512, K, 4 * K, 8 * K, 64 * K, 256 * K])
    };
    let mut options = format!("cluster_size={cluster}");
    match random.below(4) {
        _ if extended => options += ",extended_l2=on,compression_type=zstd",
        0 => options += ",compat=0.10",
        1 => options += ",lazy_refcounts=on,refcount_bits=1",
        2 => options += ",compression_type=zstd,refcount_bits=64",
        _ => {}
    }
    if let Some(base) = base {
        options += &format!(",backing_file={base},backing_fmt=qcow2");
    }
    qemu::create("qcow2", &home.join(&name), size, &options);
    let mut commands = Vec::new();
    for _ in 0..random.below(12) {
        let grain = pick(random, &[512, 2 * K, 4 * K, cluster]);
        let at = random.below(size) / grain * grain;
        let length = (512 * (1 + random.below(200))).min(pick(random, &[grain, 100 * K])).min(size - at) / 512 * 512;
        let whole = at.next_multiple_of(cluster);
        match random.below(7) {
            _ if length == 0 => {}
            0 | 1 => commands.push(format!("write -P {} {at} {length}", random.below(4))),
            2 => commands.push(format!("write -s {} {at} {length}", plain().display())),
            3 => commands.push(format!("write -z {at} {length}")),
            4 => commands.push(format!("write -z -u {at} {length}")),
            5 => commands.push(format!("discard {at} {length}")),
            _ if whole + cluster <= size => commands.push(format!("write -c -P 7 {whole} {cluster}")),
            _ => {}
        }
    }
    // QEMU refuses some of them, as a compressed write over other data; the source is what came of the rest.
    qemu::io_try("qcow2", &home.join(&name), &commands);
    (name, format!("{options} {size}: {commands:?}\n"))
}

/// Converts random sources to raw and to a deduplicated image.
fn random_sources_convert(seed: u64, cases: u64) {
    let mut random = Random::new(seed);
    for case in 0..cases {
        let home = scratch();
        let (mut name, mut log): (Option<String>, String) = (None, String::new());
        for depth in 0..1 + random.below(3) {
            let (made, told) = layer(&mut random, home.path(), depth, name.as_deref());
            (name, log) = (Some(made), log + &told);
        }
        let source = home.path().join(name.unwrap());
        let [truth, raw, image]: [PathBuf; 3] = ["truth", "raw", "image"].map(|name| home.path().join(name));
        qemu::convert("qcow2", &source, "raw", &truth, &[]);
        dedup_img(args!["convert", "-q", "-t", "unsafe", "-f", "qcow2", "-O", "raw", source, raw]).ok();
        assert!(fs::read(&raw).unwrap() == fs::read(&truth).unwrap(), "case {case} of seed {seed}: content\n{log}");
        let options = format!("cluster_size={}", pick(&mut random, &["512", "4k", "64k", "auto"]));
        dedup_img(args!["convert", "-q", "-t", "unsafe", "-o", options, source, image]).ok();
        qemu::check_clean(&image);
        qemu::compare_same("raw", &truth, "qcow2", &image);
    }
}

#[test]
fn random_sources_keep_their_content() {
    random_sources_convert(1, 35);
}

#[test]
fn other_random_sources_keep_their_content() {
    random_sources_convert(2, 35);
}
