//! Images that come of random commands, so that nobody has to think of what they hold.

use crate::args;
use crate::support::{Random, dedup_img, qemu};
use std::fs;
use std::path::{Path, PathBuf};

/// Blocks that all pieces are made of, so that much comes again.
const BLOCK: u64 = 4096;

/// Makes an image in `home`, which is named after the seed: writes at any place, compressed ones, zeros, discards, snapshots that
/// come and go, a backing file or none, subclusters or none, any width of counts, and sometimes `dedup` and `gc` in between.
#[track_caller]
pub(crate) fn made_at_random(home: &Path, seed: u64) -> PathBuf {
    let (mut random, piece) = (Random::new(seed), home.join("piece"));
    let (path, base) = (home.join(format!("random-{seed}.qcow2")), format!("base-{seed}.raw"));
    let size = (1 + random.below(6000)) * 512;
    let bits = [9, 10, 12, 12, 12, 13, 14, 16][random.below(8) as usize];
    let mut options = format!("cluster_size={}", 1 << bits);
    let extended = bits >= 14 && random.below(2) == 0;
    match random.below(6) {
        _ if extended => options += ",extended_l2=on",
        0 => options += ",compat=0.10",
        1 => options += ",compression_type=zstd",
        n => options += &format!(",refcount_bits={}", [4, 8, 32, 64][n as usize - 2]),
    }
    // The same for every seed, so that images have much in common.
    let mut blocks: Vec<Vec<u8>> = (0..12).map(|n| Random::new(n).bytes(BLOCK as usize)).collect();
    blocks.push(vec![0; BLOCK as usize]);
    let fill = |random: &mut Random, length: u64| {
        let pieces = (0..=length / BLOCK).flat_map(|_| blocks[random.below(blocks.len() as u64) as usize].clone());
        fs::write(&piece, pieces.take(length as usize).collect::<Vec<u8>>()).unwrap();
        format!("-s {}", piece.display())
    };
    if random.below(4) == 0 {
        let length = 512 * (1 + random.below(4000));
        fill(&mut random, length);
        fs::rename(&piece, home.join(&base)).unwrap();
        options += &format!(",backing_fmt=raw,backing_file={base}");
    }
    qemu::create("qcow2", &path, size, &options);
    let (mut snapshots, count) = (Vec::new(), 6 + random.below(30));
    for n in 0..count {
        let cluster = 1 << bits;
        // At whole clusters mostly, else at any sector.
        let grain = if random.below(3) > 0 { cluster } else { 512 };
        let at = random.below(size.div_ceil(grain)) * grain;
        let length = (1 + random.below(24)) * grain;
        let length = length.min(size - at);
        let whole = at.is_multiple_of(cluster) && length.is_multiple_of(cluster);
        let command = match random.below(16) {
            0..=5 => format!("write {} {at} {length}", fill(&mut random, length)),
            6 if whole => format!("write -c {} {at} {length}", fill(&mut random, length)),
            7 => format!("write -z {at} {length}"),
            8 => format!("write -z -u {at} {length}"),
            9 => format!("discard {at} {length}"),
            10 => format!("write -P {} {at} {length}", random.below(3)),
            11 if snapshots.len() < 3 => {
                let name = format!("snapshot {n}");
                fs::copy(&path, &piece).unwrap();
                match qemu::snapshot("-c", &name, &path).code {
                    0 => snapshots.push(name),
                    // Where counts are too narrow for one more, QEMU gives up halfway and leaves a damaged image.
                    _ => fs::rename(&piece, &path).unwrap(),
                }
                continue;
            }
            12 if !snapshots.is_empty() => {
                let name = snapshots.swap_remove(random.below(snapshots.len() as u64) as usize);
                qemu::snapshot("-d", &name, &path).ok();
                continue;
            }
            13 if !extended => {
                let pin = ["shared", "shared", "all"][random.below(3) as usize];
                dedup_img(args!["dedup", "-q", "--pin", pin, path]).ok();
                continue;
            }
            14 if !extended => {
                let how = ["--compact", "-q", "-q"][random.below(3) as usize];
                dedup_img(args!["gc", "-q", how, path]).ok();
                continue;
            }
            _ => continue,
        };
        let ran = qemu::run("qemu-io", args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap", "-c", command, path]);
        // QEMU compresses nothing into a place that is taken.
        assert!(ran.code == 0 || command.starts_with("write -c"), "{}", ran.told());
    }
    path
}
