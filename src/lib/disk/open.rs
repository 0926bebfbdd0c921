//! Opening a disk and the chain of files behind it.

use std::ffi::OsStr;
use std::fs::File;
use std::iter;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::backing::{BackingRule, backing_file};
use super::chain::{Chain, Content, Layer, OpenFile};
use super::format::Format;
use super::history::History;
use super::probe::{PROBE_LENGTH, probe};
use super::salvage::Damage;
use super::stamp::Stamp;
use super::{Disk, Part};
use crate::error::{Advice, Context, Doing, Error, ErrorKind, IoContext, Result};
use crate::format::snapshot::Snapshot;
use crate::image::Qcow2;
use crate::image::SnapshotName;
use crate::name::shown;
use crate::storage::lock::LockMode;
use crate::storage::open::{FileId, open_locked};
use crate::storage::{FileStorage, Storage};
use crate::units::{ClusterBits, SECTOR};

/// The longest chain of backing files that is followed.
const MAX_CHAIN: usize = 256;

/// How to open a disk.
#[derive(Debug, Clone, Default)]
pub struct DiskOptions {
    /// The format; probed where not given.
    pub format: Option<Format>,
    /// An internal snapshot instead of the active disk.
    pub snapshot: Option<SnapshotName>,
    /// Read although another program may be writing.
    pub force_share: bool,
    /// Which backing files are opened.
    pub backing: BackingRule,
    /// Read what can be read of damaged images, also of those that are marked corrupt, and take zeros for what cannot be, see
    /// [`Disk::unreadable`].
    pub salvage: bool,
    /// Read what the file system says is a hole: some have said so of data.
    pub ignore_holes: bool,
}

impl Disk {
    /// Opens the image at `path` with its backing files, all locked against writers.
    ///
    /// # Errors
    /// Fails, saying which file it could not open and why.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Self> {
        Self::with_backing(open_layer(path, options.format, options)?, options)
    }

    /// The disk in `storage`, which nobody writes meanwhile. A storage has no place that the name of a backing file could be relative
    /// to: an image that names one is refused.
    ///
    /// # Errors
    /// As [`Disk::open`]; [`ErrorKind::Unsupported`] for an image with a backing file.
    pub fn from_storage(storage: impl Storage + 'static, options: &DiskOptions) -> Result<Self> {
        let content = open_content(Box::new(storage), options.format, options)?;
        if let Content::Qcow2(image) = &content
            && let Some(name) = &image.header().backing_name
        {
            let name = shown(OsStr::from_bytes(name));
            return Err(Error::unsupported(format!(
                "it needs the backing file '{name}', which a storage cannot lead to"
            )));
        }
        Self::with_backing(Layer { path: "(storage)".into(), file: None, content }, options)
    }

    /// The disk of the QCOW2 at `path` that is open as `storage`, with its backing files, which are opened and locked.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub(crate) fn of_storage(path: &Path, storage: &FileStorage, options: &DiskOptions) -> Result<Self> {
        let layer =
            storage.file().try_clone().at("dup").and_then(|file| layer_of(path, file, Some(Format::Qcow2), options));
        Self::with_backing(layer.opening(path)?, options)
    }

    /// The disk of `first` and the files behind it.
    fn with_backing(first: Layer, options: &DiskOptions) -> Result<Self> {
        let path = first.path.clone();
        let mut layers = vec![Arc::new(first)];
        while let Some(Content::Qcow2(image)) = layers.last().map(|l| &l.content)
            && image.header().backing_name.is_some()
        {
            let overlay = layers.last().map_or(path.as_path(), |l| l.path.as_path());
            let (name, format) = backing_file(image.header(), overlay, &options.backing).opening(overlay)?;
            let behind = DiskOptions { snapshot: None, ..options.clone() };
            let layer = open_layer(&name, Some(format), &behind).doing(|| Doing::Behind(overlay.to_owned()))?;
            if layers.iter().any(|l| is_same(l, &layer)) {
                let what = format!("Backing file '{}' is part of its own chain", shown(name));
                return Err(Error::corrupt(what).advise(Advice::ChangeBacking).opening(&path));
            }
            layers.push(Arc::new(layer));
            if layers.len() > MAX_CHAIN {
                let what = format!("more than {MAX_CHAIN} backing files in a chain");
                return Err(Error::new(ErrorKind::Limit, what).advise(Advice::JoinBacking).opening(&path));
            }
        }
        let salvage = options.salvage.then(|| Damage::of(layers.iter().flat_map(|layer| layer.lost())));
        Ok(Self::of(Chain { layers, salvage }))
    }

    /// Opens the image at `path` as [`Disk::open`] does, with all its internal snapshots but the pool: they lie in a row as one long
    /// disk. A snapshot's VM state is a part of it. No cluster of the output may be larger than `grain`.
    ///
    /// # Errors
    /// As [`Disk::open`]; fails too where a snapshot that is no pool has its name.
    pub fn open_with_snapshots(path: &Path, options: &DiskOptions, grain: ClusterBits) -> Result<Self> {
        let disk = Self::open(path, options)?;
        disk.with_snapshots(grain).opening(path)
    }

    fn with_snapshots(mut self, grain: ClusterBits) -> Result<Self> {
        let chain = &self.first.chain;
        let mut snapshots = Vec::new();
        let (mut chains, mut vm_chains) = (Vec::new(), Vec::new());
        if let ([layer, behind @ ..], Some(image)) = (chain.layers.as_slice(), chain.qcow2()) {
            snapshots = History::users(image.snapshots()?, image.header().size)?;
            refuse_long_tables(&snapshots, image.storage().len().at("Could not get its length")?)?;
            for snapshot in &snapshots {
                let of = |image: Qcow2, behind: &[Arc<Layer>]| {
                    let layers = iter::once(Arc::new(layer.with(image))).chain(behind.iter().cloned()).collect();
                    Chain { layers, salvage: None }
                };
                let named = || Doing::Snapshot(String::from_utf8_lossy(&snapshot.name).into_owned());
                chains.push(of(image.at_snapshot(snapshot).doing(named)?, behind));
                vm_chains.push(of(image.vm_state(snapshot).doing(named)?, &[]));
            }
        }
        let sizes = iter::once(chain.size()).chain(chains.iter().rev().map(Chain::size)).collect();
        let vm_sizes: Vec<u64> = vm_chains.iter().map(Chain::size).collect();
        let history = History::new(snapshots, sizes, &vm_sizes, grain)?;
        let layers = chains.into_iter().rev().map(|chain| Part { start: 0, chain });
        let vm = vm_chains.into_iter().rev().filter(|chain| chain.size() > 0).zip(history.vm());
        self.others = layers.chain(vm.map(|(chain, vm)| Part { start: vm.start, chain })).collect();
        self.history = Some(history);
        Ok(self)
    }
}

/// Fails where the L1 tables of `snapshots` together are longer than the file: a sound image has each of them once.
fn refuse_long_tables(snapshots: &[Snapshot], file_len: u64) -> Result<()> {
    let entries: u64 = snapshots.iter().map(|snapshot| u64::from(snapshot.l1_entries)).sum();
    if entries * 8 > file_len {
        return Err(Error::corrupt("the L1 tables of the snapshots are longer than the file"));
    }
    Ok(())
}

fn open_layer(path: &Path, format: Option<Format>, options: &DiskOptions) -> Result<Layer> {
    let mode = if options.force_share { LockMode::ReadShared } else { LockMode::Read };
    let open = || layer_of(path, open_locked(path, mode)?, format, options);
    open().opening(path)
}

fn layer_of(path: &Path, file: File, format: Option<Format>, options: &DiskOptions) -> Result<Layer> {
    let (id, stamp) = (FileId::of(&file.metadata().at("fstat")?), Stamp::before(&file).at("fstat")?);
    let storage = FileStorage::new(file.try_clone().at("dup")?).ignoring_holes(options.ignore_holes);
    let content = open_content(Box::new(storage), format, options)?;
    Ok(Layer { path: path.to_owned(), file: Some(OpenFile { id, stamp, file: Arc::new(file) }), content })
}

/// Whether two layers are the same file.
fn is_same(one: &Layer, other: &Layer) -> bool {
    one.file.as_ref().zip(other.file.as_ref()).is_some_and(|(one, other)| one.id == other.id)
}

/// Opens one file for looking at its structure or mending it, locked as `mode` says; its format is probed where not given.
///
/// # Errors
/// Fails, saying why the file could not be opened; [`ErrorKind::Format`] where it is in a format that is not read.
pub fn open_image(path: &Path, format: Option<Format>, mode: LockMode) -> Result<(FileStorage, Format)> {
    let open = || -> Result<_> {
        let storage = FileStorage::new(open_locked(path, mode)?);
        if mode == LockMode::Write {
            storage.ensure_flushes()?;
        }
        let format = format.map_or_else(|| probe_storage(&storage), Ok)?;
        Ok((storage, format))
    };
    open().opening(path)
}

fn probe_storage(storage: &dyn Storage) -> Result<Format> {
    let mut start = [0; PROBE_LENGTH];
    let read = storage.read_at(&mut start, 0).at("Could not read its header")?;
    probe(start.get(..read).unwrap_or_default())
}

fn open_content(storage: Box<dyn Storage>, format: Option<Format>, options: &DiskOptions) -> Result<Content> {
    let snapshot = options.snapshot.as_ref();
    let probed = || {
        probe_storage(&*storage).map_err(|e| match e.kind() {
            ErrorKind::Format => e.advise(Advice::SayRaw),
            _ => e,
        })
    };
    let format = format.map_or_else(probed, Ok)?;
    match (format, snapshot) {
        (Format::Qcow2, _) if options.salvage => Ok(Content::Qcow2(Qcow2::open_damaged(storage, snapshot)?)),
        (Format::Qcow2, _) => Ok(Content::Qcow2(Qcow2::open(storage, snapshot)?)),
        (Format::Raw, Some(_)) => Err(Error::invalid("Failed to load snapshot: a raw image has none")),
        (Format::Raw, None) => {
            let size = storage.len().at("Could not get its length")?;
            let size = size
                .checked_next_multiple_of(SECTOR)
                .filter(|&size| i64::try_from(size).is_ok())
                .ok_or_else(|| Error::corrupt("Image is too big"))?;
            Ok(Content::Raw { storage, size })
        }
    }
}
