//! The families of images: one for each thing that a QCOW2 image can hold.

use super::corpus::{K, M, Sample, content, edit, family, from_content, patch, write_sparse};
use super::{Random, qemu};
use crate::args;
use std::path::Path;

/// Raw files: sparse, of odd sizes, empty, of size 0, and with equal clusters at both ends.
pub(crate) fn raw() -> Vec<Sample> {
    family("raw", |f| {
        f.add("sparse.raw", "raw", |path| write_sparse(path, &content()));
        f.add("odd.raw", "raw", |path| write_sparse(path, &content()[..2 * M as usize + 4097]));
        f.add("one-byte.raw", "raw", |path| write_sparse(path, b"x"));
        f.add("holes.raw", "raw", |path| write_sparse(path, &vec![0; 5 * M as usize + 512]));
        f.add("nothing.raw", "raw", |path| write_sparse(path, b""));
        f.add("ends.raw", "raw", |path| {
            let ends = Random::new(2).bytes(2 * M as usize);
            write_sparse(path, &[&ends[..], &[0; 2 << 20], &[0xff; 2 << 20], &ends[..]].concat());
        });
        f.add("zeros-written.raw", "raw", |path| {
            std::fs::write(path, [vec![0; M as usize], vec![7; 65537], vec![0; M as usize]].concat()).unwrap();
        });
    })
}

/// Versions 2 and 3 at cluster sizes from 512 bytes to 2 MiB, and sizes that no cluster divides.
pub(crate) fn versions() -> Vec<Sample> {
    family("versions", |f| {
        for size in ["512", "2k", "4k", "32k", "64k", "256k", "2M"] {
            f.add(&format!("v3-{size}.qcow2"), "qcow2", |path| {
                from_content(path, &format!("compat=1.1,cluster_size={size}"), &[]);
            });
        }
        for size in ["512", "64k", "2M"] {
            f.add(&format!("v2-{size}.qcow2"), "qcow2", |path| {
                from_content(path, &format!("compat=0.10,cluster_size={size}"), &[]);
            });
        }
        f.add("empty.qcow2", "qcow2", |path| drop(qemu::create("qcow2", path, 3 * M + 512, "")));
        f.add("nothing.qcow2", "qcow2", |path| drop(qemu::create("qcow2", path, 0, "")));
    })
}

/// Refcounts of every width.
pub(crate) fn widths() -> Vec<Sample> {
    family("widths", |f| {
        for bits in [1, 2, 4, 8, 32, 64] {
            f.add(&format!("bits-{bits}.qcow2"), "qcow2", |path| {
                from_content(path, &format!("cluster_size=4k,refcount_bits={bits}"), &[]);
            });
        }
    })
}

/// Zero clusters with and without a host cluster, discarded ones, and preallocation.
pub(crate) fn zeros() -> Vec<Sample> {
    const COMMANDS: [&str; 7] = [
        "write -s @ 0 2M",
        "write -P 9 2M 1M",
        "write -z 64k 256k",
        "write -z -u 512k 256k",
        "discard 1M 128k",
        "write -z 3M 64k",
        "write -z 2100k 12k",
    ];
    family("zeros", |f| {
        for (name, size, options) in [
            ("zeros.qcow2", 4 * M, ""),
            ("zeros-4k.qcow2", 4 * M + 512, "cluster_size=4k"),
            ("zeros-v2.qcow2", 4 * M, "compat=0.10"),
            ("metadata.qcow2", 4 * M, "preallocation=metadata"),
            ("falloc.qcow2", 4 * M + 1536, "preallocation=falloc,cluster_size=8k"),
        ] {
            f.add(name, "qcow2", |path| {
                qemu::create("qcow2", path, size, options);
                edit(path, &COMMANDS);
            });
        }
    })
}

/// Compressed by zlib and zstd, at sizes where the compressed bytes cross host clusters, and partly overwritten.
pub(crate) fn compressed() -> Vec<Sample> {
    family("compressed", |f| {
        for (name, options) in [
            ("zlib-512.qcow2", "cluster_size=512"),
            ("zlib-4k.qcow2", "cluster_size=4k"),
            ("zlib-64k.qcow2", ""),
            ("zlib-2M.qcow2", "cluster_size=2M"),
            ("zlib-v2.qcow2", "compat=0.10"),
            ("zstd-4k.qcow2", "cluster_size=4k,compression_type=zstd"),
            ("zstd-64k.qcow2", "compression_type=zstd"),
            ("zstd-2M.qcow2", "cluster_size=2M,compression_type=zstd"),
        ] {
            f.add(name, "qcow2", |path| {
                from_content(path, options, &["-c"]);
                edit(path, &["write -s @ 6700k 3k", "write -z 6800k 130k", "write -P 5 7M 70k"]);
            });
        }
    })
}

/// Subclusters: written in part, zeroed in part, over nothing and over backing files.
pub(crate) fn subclusters() -> Vec<Sample> {
    const COMMANDS: [&str; 9] = [
        "write -s @ 0 1M",
        "write -P 3 1026k 2k",
        "write -P 3 1090k 6k",
        "write -z 128k 2k",
        "write -z 258k 4k",
        "write -z -u 320k 64k",
        "write -P 4 2M 1k",
        "discard 640k 64k",
        "write -z 2200k 512",
    ];
    family("subclusters", |f| {
        let base = f.add("base.qcow2", "qcow2", |path| from_content(path, "cluster_size=4k", &[]));
        let raw = f.add("base.raw", "raw", |path| write_sparse(path, &content()[..3 * M as usize]));
        for (name, options, over) in [
            ("alone-16k.qcow2", "cluster_size=16k", None),
            ("alone-64k.qcow2", "cluster_size=64k", None),
            ("alone-2M.qcow2", "cluster_size=2M,refcount_bits=64", None),
            ("over-qcow2.qcow2", "cluster_size=64k", Some((&base, "qcow2"))),
            ("over-raw.qcow2", "cluster_size=128k", Some((&raw, "raw"))),
        ] {
            f.add(name, "qcow2", |path| {
                let backing = over.map(|(base, format)| {
                    format!(",backing_file={},backing_fmt={format}", base.file_name().unwrap().to_str().unwrap())
                });
                let options = format!("extended_l2=on,{options}{}", backing.unwrap_or_default());
                qemu::create("qcow2", path, 4 * M + 512, &options);
                edit(path, &COMMANDS);
            });
        }
        f.add("compressed.qcow2", "qcow2", |path| {
            from_content(path, "extended_l2=on,compression_type=zstd", &["-c"]);
            edit(path, &["write -P 3 1026k 2k", "write -z 258k 4k"]);
        });
    })
}

/// Internal snapshots, found by id and by name; the id wins where one snapshot's name is another's id.
pub(crate) fn snapshots() -> Vec<Sample> {
    family("snapshots", |f| {
        for (name, options) in [("snapshots.qcow2", ""), ("snapshots-4k.qcow2", "cluster_size=4k,refcount_bits=64")] {
            f.add(name, "qcow2", |path| {
                qemu::create("qcow2", path, 4 * M + 512, options);
                let snapshot = |name| drop(qemu::snapshot("-c", name, path).ok());
                edit(path, &["write -s @ 0 3M"]);
                snapshot("2");
                edit(path, &["write -P 8 1M 512k", "write -z 64k 128k"]);
                snapshot("before the change");
                qemu::img(args!["resize", "-q", "-f", "qcow2", path, "+1M"]).ok();
                edit(path, &["write -s @ 4M 1M", "discard 256k 128k", "write -P 8 0 4k"]);
                snapshot("last");
                edit(path, &["write -P 7 0 5M"]);
            });
            for (snapshot, id) in [
                ("1", "1"),
                ("2", "2"),
                ("before the change", "2"),
                ("last", "3"),
                ("snapshot.name=2", "1"),
                ("snapshot.id=3", "3"),
            ] {
                f.also(name, "qcow2", Some((snapshot, id)));
            }
        }
        f.add("shrunk.qcow2", "qcow2", |path| {
            qemu::create("qcow2", path, 3 * M, "");
            edit(path, &["write -s @ 0 3M"]);
            qemu::snapshot("-c", "large", path).ok();
            qemu::img(args!["resize", "-q", "-f", "qcow2", "--shrink", path, "1M"]).ok();
        });
        f.also("shrunk.qcow2", "qcow2", Some(("large", "1")));
    })
}

/// Persistent bitmaps, unknown compatible and autoclear bits with an unknown header extension, and images whose writer was killed in mid-session.
pub(crate) fn odd_states() -> Vec<Sample> {
    family("odd-states", |f| {
        f.add("bitmaps.qcow2", "qcow2", |path| {
            from_content(path, "", &[]);
            for bitmap in ["one", "two"] {
                qemu::img(args!["bitmap", "-f", "qcow2", "--add", "--enable", path, bitmap]).ok();
            }
            qemu::img(args!["bitmap", "-f", "qcow2", "--disable", path, "two"]).ok();
            edit(path, &["write -P 1 1M 256k"]);
        });
        f.add("unknown-bits.qcow2", "qcow2", |path| {
            from_content(path, "", &[]);
            patch(path, 82, &[0x40]);
            patch(path, 90, &[0x40]);
            let table =
                std::fs::read(path).unwrap().windows(4).position(|word| word == [0x68, 0x03, 0xf8, 0x57]).unwrap();
            patch(path, table as u64, b"MINE");
        });
        for (name, options, flush) in [
            ("dirty-flushed.qcow2", "lazy_refcounts=on", true),
            ("dirty-torn.qcow2", "lazy_refcounts=on,cluster_size=4k", false),
            ("killed.qcow2", "cluster_size=8k", true),
        ] {
            f.add(name, "qcow2", |path| {
                from_content(path, options, &[]);
                qemu::img(args!["resize", "-q", "-f", "qcow2", path, "10M"]).ok();
                let flush = if flush { "flush" } else { "length" };
                let commands = ["write -P 6 9M 700k", "write -P 7 0 64k", flush, "write -P 8 1M 64k", "sigraise 9"];
                let ran = qemu::io_try("qcow2", path, &commands.map(String::from));
                assert_eq!(ran.code, -1, "qemu-io was to be killed: {}", ran.told());
            });
        }
    })
}

/// Backing chains: raw and QCOW2 bases, names relative to the overlay, bases shorter and longer than it, three deep.
pub(crate) fn chains() -> Vec<Sample> {
    const COMMANDS: [&str; 5] = [
        "write -s @ 1536k 512k",
        "write -P 2 1M 100k",
        "write -z 64k 192k",
        "write -z -u 512k 64k",
        "discard 700k 128k",
    ];
    family("chains", |f| {
        let overlay = |path: &Path, size: u64, options: &str, base: &str, format: &str| {
            let mut words = args!["create", "-q", "-f", "qcow2", "-b", base, "-F", format].to_vec();
            if !options.is_empty() {
                words.extend(args!["-o", options]);
            }
            words.extend(args![path, size.to_string()]);
            qemu::img(words).ok();
            edit(path, &COMMANDS);
        };
        f.add("base.raw", "raw", |path| write_sparse(path, &content()[..3 * M as usize + 513]));
        f.add("deeper/base.qcow2", "qcow2", |path| from_content(path, "compat=0.10", &["-c"]));
        f.add("longer-raw.qcow2", "qcow2", |path| overlay(path, 6 * M + 1536, "", "base.raw", "raw"));
        f.add("shorter-raw.qcow2", "qcow2", |path| overlay(path, 2 * M + 512, "cluster_size=4k", "base.raw", "raw"));
        f.add("longer.qcow2", "qcow2", |path| overlay(path, 12 * M, "compat=0.10", "deeper/base.qcow2", "qcow2"));
        f.add("shorter.qcow2", "qcow2", |path| overlay(path, 5 * M, "cluster_size=512", "deeper/base.qcow2", "qcow2"));
        f.add("deeper/middle.qcow2", "qcow2", |path| overlay(path, 2 * M + 1024, "", "base.qcow2", "qcow2"));
        // What the short image in the middle does not reach reads as zeros, whatever the base below it holds there.
        f.add("deeper/top.qcow2", "qcow2", |path| overlay(path, 9 * M, "cluster_size=8k", "middle.qcow2", "qcow2"));
        // The overlay's first L2 tables are absent and the base, which has one, ends before the overlay's own data begins.
        f.add("small.qcow2", "qcow2", |path| {
            qemu::create("qcow2", path, 512 * K, "");
            edit(path, &["write -s @ 0 64k"]);
        });
        f.add("far.qcow2", "qcow2", |path| {
            qemu::create("qcow2", path, 8 * M, "cluster_size=4k,backing_file=small.qcow2,backing_fmt=qcow2");
            edit(path, &["write -P 3 3M 64k", "write -s @ 5M 128k"]);
        });
        f.add("top.qcow2", "qcow2", |path| {
            qemu::create("qcow2", path, 7 * M, "backing_file=deeper/top.qcow2,backing_fmt=qcow2,extended_l2=on");
            edit(path, &["write -P 3 1026k 2k", "write -z 5M 3k"]);
        });
    })
}
