//! A real ext4 root file system, made without root: files from a seed, and a second, diverged copy of a part of them.

use super::files::Files;
use super::{Ran, cached, qemu};
use crate::args;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of files that the root file system holds.
const DATA: u64 = 200 << 20;
/// Bytes of files of the second copy.
const COPY: u64 = 60 << 20;
/// The seed of its files.
pub(crate) const SEED: u64 = 1;

/// A sparse raw disk of 1 GiB with an ext4 file system of 4 KiB blocks, kept.
pub(crate) fn root_disk() -> PathBuf {
    cached("root-2.raw", |disk| build(disk, DATA, COPY, "1G"))
}

/// The same with the first sixth of the files, on 128 MiB.
pub(crate) fn small_root_disk() -> PathBuf {
    cached("root-small-2.raw", |disk| build(disk, DATA / 6, COPY / 6, "128M"))
}

/// Makes a file system of `size` at `disk` with files of `data` bytes, of which `copy` bytes are there twice.
fn build(disk: &Path, data: u64, copy: u64, size: &str) {
    let tree = disk.with_extension("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).unwrap();
    }
    let kept = Files::new(SEED).tree(&tree, data);
    diverged_copy(&tree, &kept, copy);
    let words = args!["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-d", &tree, disk, size];
    system("mke2fs", words).ok();
    fs::remove_dir_all(&tree).unwrap();
}

/// Runs a program of the system's; a user's search path often leaves out the directory that it lives in.
pub(crate) fn system<I: IntoIterator<Item = OsString>>(name: &str, words: I) -> Ran {
    let mut command = qemu::tool(name, words);
    let mut search = std::env::var_os("PATH").unwrap_or_default();
    search.push(":/usr/sbin:/sbin");
    command.env("PATH", search);
    qemu::finish(name, command)
}

/// Copies every other file a second time, and lets every eighth of the copies drift.
fn diverged_copy(tree: &Path, files: &[PathBuf], mut left: u64) {
    for (n, file) in files.iter().enumerate().filter(|(n, _)| n % 2 == 0) {
        let length = fs::metadata(file).unwrap().len();
        if length > left {
            break;
        }
        left -= length;
        let target = tree.join("srv/copy").join(file.strip_prefix(tree).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(file, &target).unwrap();
        if n % 16 == 0
            && let Ok(mut drifting) = OpenOptions::new().append(true).open(&target)
        {
            drifting.write_all(b"# changed\n").unwrap();
        }
    }
}
