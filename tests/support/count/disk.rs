//! A disk as a guest reads it, and what a raw file has of it.

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// SHA-256 of what a cluster holds.
pub(crate) type Name = [u8; 32];

/// The clusters of a disk that are not all zeros: number and content.
pub(crate) type Clusters = BTreeMap<u64, Name>;

/// A disk, in the raw file that qemu-img has made of it.
pub(crate) struct Disk {
    raw: PathBuf,
    /// Bytes that the guest sees.
    pub(crate) size: u64,
}

impl Disk {
    /// The disk in a raw file. QEMU counts in sectors, so its size is a multiple of 512.
    pub(crate) fn of(raw: &Path) -> Self {
        Self { raw: raw.to_owned(), size: raw.metadata().unwrap().len().next_multiple_of(512) }
    }

    /// How many clusters of this size it has, a last one in part included.
    pub(crate) fn total(&self, cluster_size: u64) -> u64 {
        self.size.div_ceil(cluster_size)
    }

    /// What it holds. A last cluster in part is filled up with zeros.
    pub(crate) fn clusters(&self, cluster_size: u64) -> Clusters {
        let file = File::open(&self.raw).unwrap();
        let (mut found, mut at) = (Clusters::new(), 0);
        while let Some(data) = seek(&file, at, Whence::SeekData) {
            let cluster = data / cluster_size;
            let mut bytes = vec![0; cluster_size as usize];
            let length = (self.raw.metadata().unwrap().len() - cluster * cluster_size).min(cluster_size);
            file.read_exact_at(&mut bytes[..length as usize], cluster * cluster_size).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                found.insert(cluster, Sha256::digest(&bytes).into());
            }
            at = (cluster + 1) * cluster_size;
        }
        found
    }
}

/// How many clusters of a raw file are no holes, whole or in part.
pub(super) fn allocated(raw: &Path, cluster_size: u64) -> Vec<u64> {
    let file = File::open(raw).unwrap();
    let (mut clusters, mut at) = (Vec::new(), 0);
    while let Some(data) = seek(&file, at, Whence::SeekData) {
        clusters.push(data / cluster_size);
        at = (data / cluster_size + 1) * cluster_size;
    }
    clusters
}

/// Where the file goes on with data, or a hole.
fn seek(file: &File, at: u64, what: Whence) -> Option<u64> {
    match lseek64(file, at.cast_signed(), what) {
        Ok(found) => Some(found.cast_unsigned()),
        Err(Errno::ENXIO) => None,
        Err(error) => panic!("lseek: {error}"),
    }
}

/// The disks one after the other, each beginning at a multiple of 2 MiB: all their clusters, and the size of the whole.
pub(super) fn in_a_row(disks: &[&Disk], cluster_size: u64) -> (Clusters, u64) {
    let (mut row, mut end) = (Clusters::new(), 0_u64);
    for disk in disks {
        let start = end.next_multiple_of(2 << 20);
        row.extend(disk.clusters(cluster_size).into_iter().map(|(at, name)| (start / cluster_size + at, name)));
        end = start + disk.size;
    }
    (row, end)
}
