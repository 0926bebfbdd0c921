//! The header and its extensions.

use super::{Image, number};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The header's fields, with the values that version 2 implies where it has none.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) backing_file_offset: u64,
    pub(crate) backing_file_size: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size: u64,
    pub(crate) crypt_method: u32,
    pub(crate) l1_size: u32,
    pub(crate) l1_table_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) nb_snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) header_length: u32,
}

/// Bytes of the longest file that [`Image::open_still`] holds in memory.
const SMALL: u64 = 32 << 20;

impl Image {
    /// Opens an image and reads its header.
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let length = file.metadata().unwrap().len();
        let mut b = [0; 112];
        file.read_exact_at(&mut b[..72], 0).unwrap_or_else(|error| panic!("{}: no header: {error}", path.display()));
        assert_eq!(&b[..4], b"QFI\xfb", "{}: no QCOW2 magic", path.display());
        let word = |at| number(&b, at, 4) as u32;
        let (version, cluster_bits) = (word(4), word(20));
        assert!(version == 2 || version == 3, "{}: version {version}", path.display());
        assert!((9..=21).contains(&cluster_bits), "{}: cluster_bits {cluster_bits}", path.display());
        if version == 3 {
            file.read_exact_at(&mut b[72..], 72).unwrap();
        }
        let word = |at| number(&b, at, 4) as u32;
        let header = Header {
            version,
            backing_file_offset: number(&b, 8, 8),
            backing_file_size: word(16),
            cluster_bits,
            size: number(&b, 24, 8),
            crypt_method: word(32),
            l1_size: word(36),
            l1_table_offset: number(&b, 40, 8),
            refcount_table_offset: number(&b, 48, 8),
            refcount_table_clusters: word(56),
            nb_snapshots: word(60),
            snapshots_offset: number(&b, 64, 8),
            incompatible: number(&b, 72, 8),
            compatible: number(&b, 80, 8),
            autoclear: number(&b, 88, 8),
            refcount_order: if version == 3 { word(96) } else { 4 },
            header_length: if version == 3 { word(100) } else { 72 },
        };
        Self { path: path.to_owned(), file, length, header, whole: None }
    }

    /// Opens an image that nobody changes until it is dropped: a small one is read at once, with one system call for all clusters.
    pub(crate) fn open_still(path: &Path) -> Self {
        let mut image = Self::open(path);
        if image.length <= SMALL {
            image.whole = Some(image.read(0, image.length));
        }
        image
    }

    /// Header extensions in the order of the file: type and data.
    pub(crate) fn extensions(&self) -> Vec<(u32, Vec<u8>)> {
        let header = &self.header;
        let end = if header.backing_file_offset == 0 { self.cluster_size() } else { header.backing_file_offset };
        let (mut at, mut found) = (u64::from(header.header_length), Vec::new());
        while at + 8 <= end {
            let start = self.read(at, 8);
            let (kind, length) = (number(&start, 0, 4) as u32, number(&start, 4, 4));
            if kind == 0 {
                break;
            }
            self.must(at + 8 + length <= end, || format!("header extension {kind:#x} is too long: {length}"));
            self.must(found.iter().all(|(other, _)| *other != kind), || {
                format!("header extension {kind:#x} comes twice")
            });
            found.push((kind, self.read(at + 8, length)));
            at += 8 + length.next_multiple_of(8);
        }
        found
    }

    /// The backing file's name as the header spells it.
    pub(crate) fn backing_file(&self) -> Option<String> {
        let (at, length) = (self.header.backing_file_offset, self.header.backing_file_size);
        (at != 0).then(|| String::from_utf8(self.read(at, length.into())).unwrap())
    }
}
