//! Writing the metadata of an image from nothing, in one pass from the front of each region to its end.
//!
//! The file has no name yet (see [`crate::storage::atomic_file`]), so the order of these writes is free: whatever happens, there
//! is no image until all of it is there. The header is written last all the same.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::dedup::plan::Step;
use crate::dedup::weave::TableUsers;
use crate::digest::Sha;
use crate::disk::{BackingRule, Disk, DiskOptions, Format, refuse_protocol};
use crate::error::{Error, OrInternal, Result};
use crate::format::coding::CompressionType;
use crate::format::header::{Extension, Header, compatible, extension, incompatible};
use crate::format::snapshot::Snapshot;
use crate::format::table::{L2Entry, is_copied, l1_entry, with_copied};
use crate::pool;
use crate::pool::directory::{DirectoryHeader, Record};
use crate::storage::Storage;
use crate::storage::buffer::zeroed;
use crate::storage::open::FileId;
use crate::storage::region::RegionWriter;
use crate::storage::stack::Bytes;
use crate::units::{GuestCluster, HostCluster, HostOffset, RowCluster, RowPlace, StoredCluster, to_usize};

use crate::build::layers::Layers;
use crate::build::layout::{Layout, Region};

/// What the header of a new image says beside the layout.
#[derive(Debug, Clone, Default)]
pub struct Traits {
    /// Compression of clusters that QEMU may write compressed.
    pub compression: CompressionType,
    /// Whether QEMU may postpone refcount updates.
    pub lazy_refcounts: bool,
    /// The backing file.
    pub backing: Option<Backing>,
}

/// A backing file as the header names it.
#[derive(Debug, Clone)]
pub struct Backing {
    /// Its name, relative to the image's directory.
    pub name: PathBuf,
    /// Its format.
    pub format: Format,
    /// Which files behind it are opened.
    pub behind: BackingRule,
    /// See [`DiskOptions::ignore_holes`].
    pub ignore_holes: bool,
}

/// Writes the metadata of a new image. Call [`NewImage::step`] or [`NewImage::map_private`] for all clusters in guest order, then
/// [`NewImage::member`] for all members, then [`NewImage::finish`].
pub(crate) struct NewImage<'a> {
    layout: Layout,
    storage: &'a dyn Storage,
    l1: Vec<u64>,
    l2: RegionWriter<'a>,
    pool_l2: RegionWriter<'a>,
    refcounts: RegionWriter<'a>,
    /// Counts that do not fill a byte yet.
    counts: Vec<u64>,
    directory: RegionWriter<'a>,
    records: Sha256,
    /// The cluster of the next L2 entry.
    next: RowCluster,
    /// The next stored cluster.
    stored: StoredCluster,
    /// The snapshots, where there are any.
    layers: Option<Layers<'a>>,
}

impl Traits {
    /// Opens the backing file that `target` will have, if any. It stays locked as long as the disk is open.
    ///
    /// # Errors
    /// Fails where it cannot be opened, and where `target` would be behind itself.
    pub(crate) fn open_backing(&self, target: &Path) -> Result<Option<Disk>> {
        let Some(backing) = &self.backing else { return Ok(None) };
        // What could not be opened again later is not written.
        refuse_protocol(backing.name.as_os_str().as_bytes())?;
        let path = target.parent().unwrap_or(Path::new("")).join(&backing.name);
        let options = DiskOptions {
            format: Some(backing.format),
            backing: backing.behind.clone(),
            ignore_holes: backing.ignore_holes,
            ..DiskOptions::default()
        };
        let disk = Disk::open(&path, &options).map_err(|e| e.followed_by("Could not open backing image."))?;
        let own = std::fs::metadata(target).ok().and_then(|metadata| disk.find(&Bytes::of(FileId::of(&metadata))));
        match own {
            None => Ok(Some(disk)),
            Some(_) => {
                Err(Error::invalid("Error: Trying to create an image with the same filename as the backing file"))
            }
        }
    }
}

impl<'a> NewImage<'a> {
    /// Starts an image of `layout` in `storage`; what was there before does not show through. Without `layers` the row is
    /// the disk.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn new(storage: &'a dyn Storage, layout: Layout, layers: Option<Layers<'a>>) -> Result<Self> {
        let region = |region| RegionWriter::new(storage, layout.bytes(region));
        let records = layout.bytes(layout.directory);
        let records_start = records.start + pool::directory::HEADER_LENGTH as u64;
        let mut image = Self {
            layout,
            storage,
            l1: zeroed(layers.as_ref().map_or(layout.l1_entries as usize, Layers::l1_entries))?,
            l2: region(layout.l2),
            pool_l2: region(layout.pool_l2),
            refcounts: region(layout.refcount_blocks),
            counts: Vec::new(),
            directory: RegionWriter::new(storage, records_start.min(records.end)..records.end),
            records: Sha256::new(),
            next: RowCluster(0),
            stored: StoredCluster(0),
            layers,
        };
        image.count_metadata(HostCluster(0), layout.data.start)?;
        // All else is written to its last byte.
        let header = Region { start: HostCluster(0), clusters: 1 };
        for region in [header, layout.snapshot_table, layout.directory] {
            if region.clusters > 0 {
                storage.punch(layout.bytes(region)).map_err(writing)?;
            }
        }
        Ok(image)
    }

    /// Records one step of a plan; steps come in guest order.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn step(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Private { row, count, users } => self.map_stored(row, count, users),
            Step::Member { row, sharers, .. } => {
                let host = self.layout.stored(self.stored);
                self.map(row, host, false)?;
                self.pool_as(L2Entry::Data { host: host.offset(self.layout.parts.cluster_bits), copied: false })?;
                self.stored = self.stored.after(1);
                self.count(sharers + 1, 1)
            }
            Step::Shared { row, stored } => self.map(row, self.layout.stored(stored), false),
            Step::Zero { row, count } => self.map_zeros(row, count),
            Step::Inherited { row, count } => self.inherit(row, count),
            Step::InheritedTable { row } => self.inherit_table(row),
        }
    }

    /// Maps `count` clusters from `row` to the next stored clusters.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn map_private(&mut self, row: RowCluster, count: u64) -> Result<()> {
        self.map_stored(row, count, 1)
    }

    /// As [`NewImage::map_private`] where `users` layers use each of the clusters.
    fn map_stored(&mut self, row: RowCluster, count: u64, users: u64) -> Result<()> {
        for n in 0..count {
            self.map(RowCluster(row.0 + n), self.layout.stored(self.stored.after(n)), users == 1)?;
        }
        self.stored = self.stored.after(count);
        self.count(users, count)
    }

    /// Maps `count` clusters from `row` as the layer above has them.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn inherit(&mut self, row: RowCluster, count: u64) -> Result<()> {
        for row in (row.0..row.0 + count).map(RowCluster) {
            self.skip_to(row)?;
            let word = self.layers.as_mut().or_internal(NO_LAYERS)?.above(row)?;
            self.entry(word)?;
        }
        Ok(())
    }

    /// Uses the L2 table of the layer above for `row` and what follows.
    ///
    /// # Errors
    /// Internal ones.
    pub(crate) fn inherit_table(&mut self, row: RowCluster) -> Result<()> {
        let layers = self.layers.as_mut().or_internal(NO_LAYERS)?;
        layers.enter(row);
        let table = layers.inherit_table(row)?;
        let index = layers.l1_index(row)?;
        *self.l1.get_mut(index).or_internal(BEHIND_L1)? = l1_entry(table, false);
        Ok(())
    }

    /// Maps `count` clusters from `row` to zeros.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn map_zeros(&mut self, row: RowCluster, count: u64) -> Result<()> {
        let zero = L2Entry::Zero { host: None, copied: false };
        (row.0..row.0 + count).try_for_each(|row| self.map_as(RowCluster(row), zero))
    }

    /// Appends the directory's record of the next member; `place` is the lowest place of a disk that uses it.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn member(&mut self, sha256: Sha, place: RowPlace, retired: bool) -> Result<()> {
        let guest = self.layers.as_ref().map_or(Ok(GuestCluster(place.0)), |layers| layers.guest(place))?;
        let record = Record { sha256, guest: guest.offset(self.layout.parts.cluster_bits), retired }.encode();
        self.records.update(record);
        self.directory.write(&record).map_err(writing)
    }

    /// Writes what is left, the header last.
    ///
    /// # Errors
    /// Those of writing; [`crate::ErrorKind::Limit`] where the backing file's name does not fit into the header.
    pub(crate) fn finish(mut self, traits: &Traits) -> Result<()> {
        let layout = self.layout;
        let bits = layout.parts.cluster_bits;
        self.l2.finish().map_err(writing)?;
        let snapshots = self.finish_snapshots()?;
        if let Some(members) = layout.parts.members {
            self.finish_pool(members, snapshots)?;
        }
        self.count_metadata(layout.data.end(), layout.end)?;
        self.counts.resize(self.counts.len().next_multiple_of(8), 0);
        self.flush_counts()?;
        self.refcounts.finish().map_err(writing)?;
        let blocks = (layout.refcount_blocks.start.0..layout.refcount_blocks.end().0)
            .map(|block| HostCluster(block).offset(bits).0);
        write_table(self.storage, layout.refcount_table, &layout, blocks)?;
        let active = match &self.layers {
            None => self.l1.as_slice(),
            Some(layers) => layers.split(&self.l1)?.0,
        };
        write_table(self.storage, layout.l1, &layout, active.iter().copied())?;
        // Data may be sparse at its end; the file is as long as the layout says all the same.
        self.storage.set_len(layout.file_len()).map_err(writing)?;
        let header = header(&layout, traits)?.encode()?;
        self.storage.write_at(&header, 0).map_err(writing)
    }

    /// Writes the L1 tables of the snapshots; returns their entries of the snapshot table.
    fn finish_snapshots(&mut self) -> Result<Vec<Snapshot>> {
        let Some(layers) = &self.layers else { return Ok(Vec::new()) };
        let bits = self.layout.parts.cluster_bits;
        let (_, tables) = layers.split(&self.l1)?;
        let mut start = self.layout.snapshot_l1.start;
        let mut places = Vec::with_capacity(tables.len());
        for table in tables {
            let region = Region { start, clusters: bits.clusters(table.len() as u64 * 8) };
            write_table(self.storage, region, &self.layout, table.iter().copied())?;
            places.push((start.offset(bits), table.len()));
            start = region.end();
        }
        layers.snapshots(places.into_iter())
    }

    fn finish_pool(&mut self, members: u64, mut snapshots: Vec<Snapshot>) -> Result<()> {
        let layout = self.layout;
        let bits = layout.parts.cluster_bits;
        let header = DirectoryHeader {
            cluster_bits: bits,
            members,
            member_l1_entries: layout.member_l1_entries,
            sharer_limit: layout.parts.refcount_bits.sharer_limit().unwrap_or(0),
            records_sha256: self.records.clone().finalize().into(),
        };
        let directory = layout.offset(layout.directory).0;
        self.directory.flush().map_err(writing)?;
        self.storage.write_at(&header.encode(), directory).map_err(writing)?;
        // The directory's own clusters follow in L2 tables of their own.
        let member_tables = u64::from(layout.member_l1_entries) * bits.bytes();
        self.pool_l2.zeros_until(layout.offset(layout.pool_l2).0 + member_tables).map_err(writing)?;
        for cluster in layout.directory.start.0..layout.directory.end().0 {
            self.pool_as(L2Entry::Data { host: HostCluster(cluster).offset(bits), copied: false })?;
        }
        self.pool_l2.finish().map_err(writing)?;
        let tables = (layout.pool_l2.start.0..layout.pool_l2.end().0)
            .map(|table| l1_entry(HostCluster(table).offset(bits), false));
        write_table(self.storage, layout.pool_l1, &layout, tables)?;
        let id = self.layers.as_ref().map_or(1, Layers::pool_id);
        snapshots.push(pool::snapshot(
            id,
            layout.offset(layout.pool_l1),
            layout.pool_l1_entries,
            DirectoryHeader::directory_bytes(members),
        ));
        let table: Vec<u8> = snapshots.iter().flat_map(Snapshot::encode).collect();
        self.storage.write_at(&table, layout.offset(layout.snapshot_table).0).map_err(writing)
    }

    fn map(&mut self, row: RowCluster, host: HostCluster, copied: bool) -> Result<()> {
        let host = host.offset(self.layout.parts.cluster_bits);
        self.map_as(row, L2Entry::Data { host, copied })
    }

    /// Gives `row` an L2 entry; guest clusters come in order.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn map_as(&mut self, row: RowCluster, entry: L2Entry) -> Result<()> {
        self.skip_to(row)?;
        self.entry(entry.encode(self.layout.parts.cluster_bits))
    }

    /// Fills the gap before `row`.
    fn skip_to(&mut self, row: RowCluster) -> Result<()> {
        let entries = self.layout.parts.cluster_bits.entries();
        let table_start = RowCluster(row.0 - row.0 % entries);
        if self.next < table_start {
            // The rest of the table before stays unallocated, and tables with nothing in them do not exist.
            let end = self.l2.position().next_multiple_of(self.layout.parts.cluster_bits.bytes());
            self.l2.zeros_until(end).map_err(writing)?;
            self.next = table_start;
        }
        while self.next < row {
            self.entry(0)?;
        }
        Ok(())
    }

    /// Appends the L2 entry of the next guest cluster, which may begin a table.
    fn entry(&mut self, word: u64) -> Result<()> {
        let entries = self.layout.parts.cluster_bits.entries();
        let at = self.l2.position();
        let begins_table = at & (self.layout.parts.cluster_bits.bytes() - 1) == 0;
        let mut word = word;
        let (mut index, mut copied) = (to_usize(self.next.0 / entries), true);
        if let Some(layers) = &mut self.layers {
            layers.enter(self.next);
            // The flag means nothing in a snapshot's tables; QEMU leaves it cleared there, and sets it when it reverts to one.
            let is_active = layers.is_active(self.next);
            word = with_copied(word, is_active && is_copied(word));
            layers.set(self.next, word)?;
            if begins_table {
                layers.set_table(self.next, HostOffset(at))?;
                index = layers.l1_index(self.next)?;
                copied = layers.table_layers()? == 1 && is_active;
            }
        }
        if begins_table {
            *self.l1.get_mut(index).or_internal(BEHIND_L1)? = l1_entry(HostOffset(at), copied);
        }
        self.next = RowCluster(self.next.0 + 1);
        self.l2.write(&word.to_be_bytes()).map_err(writing)
    }

    /// Gives the next member of the pool its L2 entry; members come in the order of the file.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn pool_as(&mut self, entry: L2Entry) -> Result<()> {
        self.pool_l2.write(&entry.encode(self.layout.parts.cluster_bits).to_be_bytes()).map_err(writing)
    }

    /// Counts clusters of metadata: each has one reference but L2 tables that layers have in common.
    fn count_metadata(&mut self, start: HostCluster, end: HostCluster) -> Result<()> {
        let l2 = self.layout.l2;
        let tables = self.layers.as_ref().filter(|_| start <= l2.start && l2.end() <= end).map(Layers::all_tables);
        let Some(tables) = tables else { return self.count(1, end.0 - start.0) };
        self.count(1, l2.start.0 - start.0)?;
        for run in tables {
            let TableUsers { layers, tables: count } = run?;
            self.count(layers, count)?;
        }
        self.count(1, end.0 - l2.end().0)
    }

    /// Gives the next `clusters` host clusters the count `refcount`.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn count(&mut self, refcount: u64, clusters: u64) -> Result<()> {
        let mut left = clusters;
        while left > 0 {
            let some = left.min(4096);
            self.counts.resize(self.counts.len() + to_usize(some), refcount);
            left -= some;
            if self.counts.len() >= 4096 {
                self.flush_counts()?;
            }
        }
        Ok(())
    }

    /// Encodes the counts that fill whole bytes at any width.
    fn flush_counts(&mut self) -> Result<()> {
        let whole = self.counts.len() & !7;
        let mut bytes = Vec::with_capacity(whole * 8);
        self.layout.parts.refcount_bits.encode(self.counts.split_at(whole).0, &mut bytes);
        self.counts.drain(..whole);
        self.refcounts.write(&bytes).map_err(writing)
    }
}

const NO_LAYERS: &str = "a cluster of a layer above, in an image without snapshots";
const BEHIND_L1: &str = "a cluster lies behind the end of the L1 table";

/// Writes a table of 64-bit words and zeros to its region's end.
fn write_table(storage: &dyn Storage, region: Region, layout: &Layout, words: impl Iterator<Item = u64>) -> Result<()> {
    let mut writer = RegionWriter::new(storage, layout.bytes(region));
    for word in words {
        writer.write(&word.to_be_bytes()).map_err(writing)?;
    }
    writer.finish().map_err(writing)
}

fn header(layout: &Layout, traits: &Traits) -> Result<Header> {
    let (backing_name, extensions) = match &traits.backing {
        None => (None, Vec::new()),
        Some(backing) => {
            let data = backing.format.to_string().into_bytes();
            let format = Extension { magic: extension::BACKING_FORMAT, data };
            (Some(backing.name.as_os_str().as_bytes().to_vec()), vec![format])
        }
    };
    let clusters = layout.refcount_table.clusters;
    Ok(Header {
        version: 3,
        cluster_bits: layout.parts.cluster_bits,
        size: layout.parts.size,
        encryption: None,
        l1_entries: layout.l1_entries,
        l1_offset: layout.offset(layout.l1),
        refcount_table_offset: layout.offset(layout.refcount_table),
        refcount_table_clusters: u32::try_from(clusters)
            .ok()
            .or_internal("the refcount table is too long for its header")?,
        snapshots: layout.parts.snapshots + u32::from(layout.parts.members.is_some()),
        snapshots_offset: match layout.parts.members {
            Some(_) => layout.offset(layout.snapshot_table),
            None => HostOffset(0),
        },
        incompatible: match traits.compression {
            CompressionType::Zlib => 0,
            CompressionType::Zstd => incompatible::COMPRESSION,
        },
        compatible: if traits.lazy_refcounts { compatible::LAZY_REFCOUNTS } else { 0 },
        autoclear: 0,
        refcount_bits: layout.parts.refcount_bits,
        compression: traits.compression,
        backing_name,
        extensions,
    })
}

fn writing(source: std::io::Error) -> Error {
    Error::io("Could not write", source)
}
