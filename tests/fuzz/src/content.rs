//! A model of an image: what the disk and every snapshot read as, piece by piece, as far as they can be read.

use dedup_img::{Disk, DiskOptions, Format, Reader, Result, SnapshotName};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// Bytes of a piece: the smallest cluster, so that damage of one hides no other.
const PIECE: usize = 512;
/// Bytes that are read at once where they can be.
const BLOCK: usize = 64 << 10;
/// The most bytes that are looked at.
const MOST: u64 = 16 << 20;

/// What a disk reads as.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Content {
    size: u64,
    /// What is not zeros: its SHA-256, or nothing where it cannot be read.
    pieces: BTreeMap<u64, Option<[u8; 32]>>,
}

impl Content {
    /// What `disk` reads as, or nothing if it is too large to look at or its tables cannot be read.
    pub(crate) fn of(disk: &Disk) -> Option<Self> {
        let (mut pieces, mut reader, mut at, mut seen) = (BTreeMap::new(), Reader::random(disk), 0, 0);
        let mut block = vec![0; BLOCK];
        while let Some(data) = disk.next_data(at).ok()? {
            assert!(data.start >= at && data.end > data.start, "{data:?} from {at:#x}");
            seen += data.end - data.start;
            if seen > MOST {
                return None;
            }
            let (mut start, end) = (data.start & !(PIECE as u64 - 1), data.end.min(disk.size()));
            while start < end {
                let length = usize::try_from(end - start).unwrap().next_multiple_of(PIECE).min(BLOCK);
                let block = &mut block[..length];
                // What can be read at once need not be read piece by piece.
                let at_once = reader.read(start, block).is_ok();
                for (piece, at) in block.chunks_mut(PIECE).zip((start..).step_by(PIECE)) {
                    if !at_once && reader.read(at, piece).is_err() {
                        pieces.insert(at, None);
                    } else if piece.iter().any(|byte| *byte != 0) {
                        pieces.insert(at, Some(Sha256::digest(piece).into()));
                    }
                }
                start += length as u64;
            }
            at = data.end;
        }
        Some(Self { size: disk.size(), pieces })
    }

    /// Whether all of it can be read.
    pub(crate) fn is_whole(&self) -> bool {
        self.pieces.values().all(Option::is_some)
    }

    /// This with what `other`, which is shorter, reads as instead of its beginning.
    pub(crate) fn overwritten(mut self, other: &Self) -> Self {
        self.pieces = self.pieces.split_off(&other.size);
        self.pieces.extend(&other.pieces);
        self
    }

    /// Where `after` reads as something else than this does. What cannot be read may read as anything.
    pub(crate) fn changed(&self, after: &Self) -> Option<String> {
        if self.size != after.size {
            return Some(format!("a size of {} became {}", self.size, after.size));
        }
        let places = self.pieces.keys().chain(after.pieces.keys());
        let differs = |at: &&u64| match (self.pieces.get(at), after.pieces.get(at)) {
            (Some(None), _) => false,
            (before, after) => before != after,
        };
        places.filter(|at| differs(at)).min().map(|at| format!("{at:#x} reads as something else"))
    }
}

/// The disk in the file at `path`.
pub(crate) fn disk(path: &Path, format: Format, snapshot: Option<SnapshotName>) -> Result<Disk> {
    Disk::open(path, &DiskOptions { format: Some(format), snapshot, ..DiskOptions::default() })
}

/// What an image holds: the disk, and the user's snapshots by id.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Model(pub(crate) BTreeMap<String, Option<Content>>);

impl Model {
    /// The model of the image at `path`; empty where it cannot be opened.
    pub(crate) fn of(path: &Path) -> Self {
        let mut all = BTreeMap::new();
        if let Ok(active) = disk(path, Format::Qcow2, None) {
            all.insert(String::new(), Content::of(&active));
            let snapshots = active.qcow2().map(|image| image.snapshots()).and_then(Result::ok).unwrap_or_default();
            // A handful: damage can make it thousands.
            for snapshot in snapshots.iter().filter(|snapshot| !snapshot.is_pool()).take(4) {
                let Ok(id) = String::from_utf8(snapshot.id.clone()) else { continue };
                if let Ok(disk) = disk(path, Format::Qcow2, Some(SnapshotName::Id(id.clone()))) {
                    all.entry(format!("snapshot {id}")).or_insert_with(|| Content::of(&disk));
                }
            }
        }
        Self(all)
    }

    /// What the disk reads as.
    pub(crate) fn active(&self) -> Option<&Content> {
        self.0.get("")?.as_ref()
    }

    /// Fails where something that could be read reads as something else now, or not at all.
    #[track_caller]
    pub(crate) fn assert_kept(&self, path: &Path, told: &str) {
        let after = Self::of(path);
        for (layer, content) in &self.0 {
            let Some(content) = content else { continue };
            match after.0.get(layer) {
                Some(Some(now)) => {
                    let changed = content.changed(now);
                    assert!(changed.is_none(), "'{layer}': {}: {told}", changed.unwrap_or_default());
                }
                _ => panic!("'{layer}' cannot be read any more: {told}"),
            }
        }
    }
}
