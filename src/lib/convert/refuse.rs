//! What a conversion refuses before anything is written.

use std::path::Path;

use crate::disk::Disk;
use crate::error::{Advice, Error, Result};
use crate::format::refcount::RefcountBits;
use crate::name::shown;
use crate::storage::open::FileId;
use crate::storage::stack::Bytes;
use crate::units::ClusterBits;

/// How many scanned clusters may share one that takes `limit` sharers: all layers of a disk may use each of them.
pub(super) fn sharer_records(limit: u64, disk: &Disk, bits: RefcountBits) -> Result<u64> {
    let Some(history) = disk.history() else { return Ok(limit) };
    let layers = history.snapshots().len() as u64 + 1;
    if limit / layers < 2 {
        let what = format!("refcount_bits={} cannot hold the references of {} snapshots", bits.bits(), layers - 1);
        return Err(Error::unsupported(what).advise(Advice::AskRefcounts { bits: 32, or_more: false }));
    }
    Ok(limit / layers)
}

/// Fails where the clusters are larger than those for which a disk with snapshots was opened.
pub(super) fn refuse_grain(disk: &Disk, bits: ClusterBits) -> Result<()> {
    match disk.history() {
        Some(history) if history.grain() < bits => {
            let bytes = bits.bytes();
            let what = format!("the clusters of the backing file have {bytes} bytes");
            Err(Error::unsupported(what).advise(Advice::SayClusterSize { bytes }))
        }
        _ => Ok(()),
    }
}

/// Fails where `target` is one of the files that `disk` is read from, or has their bytes under another name.
pub(super) fn refuse_own_source(disk: &Disk, target: &Path) -> Result<()> {
    let Ok(metadata) = std::fs::metadata(target) else { return Ok(()) };
    match disk.find(&Bytes::of(FileId::of(&metadata))) {
        None => Ok(()),
        Some(source) => Err(Error::invalid(format!(
            "'{}' is a source of this conversion ('{}'); name another target",
            shown(target),
            shown(source)
        ))),
    }
}
