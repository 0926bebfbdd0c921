//! Making the image: in one pass over the disk where that can be done, in several where not.

use std::path::Path;

use super::options::{ConvertOptions, Resolved, Sharing};
use super::packed::Packed;
use super::refuse::refuse_grain;
use super::size::Seen;
use super::stages::{Begun, COMPARING, CONVERTING, MEASURING, WRITING};
use super::stream::Streamed;
use super::{copy, packed, size, stream};
use crate::build::layers::with_snapshots;
use crate::build::layout::{Layout, Parts};
use crate::codec::CompressionLevel;
use crate::dedup::group::group;
use crate::dedup::plan::Plan;
use crate::dedup::reading::{Again, FirstReading};
use crate::dedup::scan::Other;
use crate::dedup::verify::{GuestClusters, verify};
use crate::disk::Disk;
use crate::error::{Context, IoContext, Result};
use crate::pool::Pin;
use crate::sort::sequence::{Sorter, Spill};
use crate::storage::Storage;
use crate::storage::rate::Paced;
use crate::storage::target::{Nowhere, Target};
use crate::units::ClusterBits;
use crate::work::Work;

/// A conversion that is about to write.
pub(super) struct Job<'a> {
    pub(super) begun: &'a Begun,
    pub(super) disk: &'a Disk,
    pub(super) target: &'a Path,
    pub(super) file: &'a Target,
    pub(super) backing: Option<&'a Disk>,
    pub(super) options: &'a ConvertOptions,
    pub(super) size: Resolved,
    /// How often a stored cluster may be referenced by guest clusters.
    pub(super) limit: u64,
    /// How many scanned clusters that is.
    pub(super) records: u64,
    pub(super) storage: &'a Paced<'a>,
    pub(super) spill: Spill,
    pub(super) work: &'a Work,
}

/// What is to be written.
struct Found {
    plan: Plan,
    bits: ClusterBits,
    first: FirstReading,
    seen: Seen,
}

/// What was written.
pub(super) struct Written {
    pub(super) plan: Plan,
    pub(super) bits: ClusterBits,
    /// What later readings are held against, where there may be any.
    pub(super) first: Option<FirstReading>,
    pub(super) seen: Seen,
    pub(super) layout: Layout,
    pub(super) compressed_clusters: u64,
    pub(super) compressed_bytes: u64,
}

impl Job<'_> {
    /// Fails where the cluster size that is given does not fit the disk.
    pub(super) fn refuse_size(&self) -> Result<()> {
        let Some(bits) = self.size.fixed else { return Ok(()) };
        let fits = || {
            Layout::new(self.parts(bits)?)?;
            refuse_grain(self.disk, bits)
        };
        fits().target(self.target)
    }

    /// Writes the image.
    pub(super) fn run(&self) -> Result<Written> {
        match self.stream().target(self.target)? {
            Some(written) => Ok(written),
            None => self.in_passes(),
        }
    }

    /// Fails where what was read is not what is there now.
    pub(super) fn ensure_unchanged(&self, first: Option<&FirstReading>) -> Result<()> {
        if let Some(first) = first.filter(|_| self.disk.restless().next().is_some()) {
            let other = self.backing.map(Other::Backing);
            Again { disk: self.disk, other, spill: &self.spill, work: self.work }.ensure_same(first)?;
        }
        self.disk.ensure_unchanged()?;
        self.backing.map_or(Ok(()), Disk::ensure_unchanged)
    }

    /// What the image is made of as far as it is known before the disk was read.
    fn parts(&self, bits: ClusterBits) -> Result<Parts> {
        let parts = Parts::empty(bits, self.options.refcount_bits, self.disk.size());
        with_snapshots(Parts { members: self.options.sharing.members(0), ..parts }, self.disk.history())
    }

    /// Writes the image in one pass over the disk, where that can be done.
    fn stream(&self) -> Result<Option<Written>> {
        let Self { disk, options, work, .. } = *self;
        let (Some(bits), None) = (self.size.fixed, options.compress) else { return Ok(None) };
        // A device keeps what it holds until it is sure to have room, with --salvage all passes must read the same, and what is read
        // once is held against nothing.
        let read_twice = disk.salvages() || disk.restless().next().is_some();
        if self.backing.is_some() || disk.history().is_some() || read_twice || !self.file.is_empty() {
            return Ok(None);
        }
        let parts = self.parts(bits)?;
        let streamed = work.run(|| {
            if options.sharing != Sharing::Plain && !stream::fits(disk, bits, work)? {
                return Ok(None);
            }
            work.progress.begin(CONVERTING, disk.size());
            stream::stream(disk, parts, options.sharing, (&options.traits, self.limit), self.storage, &self.spill, work)
        })?;
        match streamed {
            Some(Streamed { plan, layout, bytes_read }) => {
                let seen = Seen { bytes_read, same: 0, choices: Vec::new() };
                let (compressed_clusters, compressed_bytes) = (0, 0);
                Ok(Some(Written { plan, bits, first: None, seen, layout, compressed_clusters, compressed_bytes }))
            }
            None => {
                work.progress.anew();
                self.storage.set_len(0).at("Could not begin anew")?;
                Ok(None)
            }
        }
    }

    /// Writes the image in several passes: scan, comparison, copy.
    fn in_passes(&self) -> Result<Written> {
        let Found { plan, bits, first, seen } = self.work.run(|| self.find())?;
        let members = self.options.sharing.members(plan.members());
        let parts = self.parts(bits).target(self.target)?;
        let parts = Parts { l2_tables: plan.l2_tables, members, data: plan.stored, ..parts };
        self.work.progress.begin(WRITING, plan.stored * bits.bytes());
        let (layout, compressed_clusters, compressed_bytes) = match self.options.compress {
            None => (self.copy(&plan, &first, parts)?, 0, 0),
            Some(level) => {
                let packed = self.pack(&plan, &first, parts, level)?;
                (packed.layout, packed.clusters, packed.bytes)
            }
        };
        Ok(Written { plan, bits, first: Some(first), seen, layout, compressed_clusters, compressed_bytes })
    }

    /// Scans and compares.
    fn find(&self) -> Result<Found> {
        let Self { disk, backing, options, records, work, .. } = *self;
        let spill = &self.spill;
        let found = size::scan_and_choose(disk, backing, self.size.fixed, options, records, spill, work)?;
        let bits = found.level.cluster_bits;
        let (links, pin) = match options.sharing {
            Sharing::Plain => (Sorter::new(spill).finish()?, Pin::Shared),
            Sharing::Pooled(pin) => {
                let links = group(&found.level.records, records, spill)?;
                work.progress.begin(COMPARING, links.len() * bits.bytes());
                let clusters = GuestClusters { disk, cluster_bits: bits };
                (verify(&clusters, links, |again| group(again, records, spill), spill, work)?, pin)
            }
        };
        Ok(Found { plan: Plan::new(found.level, &links, pin, spill)?, bits, first: found.first, seen: found.seen })
    }

    /// To be called before the first write.
    fn begin(&self) -> Result<()> {
        if !self.file.is_empty() {
            self.begun.set();
        }
        self.file.begin()
    }

    /// Writes clusters as they are.
    fn copy(&self, plan: &Plan, first: &FirstReading, parts: Parts) -> Result<Layout> {
        let Self { disk, file, options, limit, storage, work, .. } = *self;
        let layout = Layout::new(parts).target(self.target)?;
        file.ensure_room(layout.file_len())?;
        self.begin()?;
        work.run(|| copy::write(disk, (plan, first), layout, &options.traits, limit, storage, work))
            .target(self.target)?;
        Ok(layout)
    }

    /// Writes clusters compressed, where they become smaller by that.
    fn pack(&self, plan: &Plan, first: &FirstReading, parts: Parts, level: CompressionLevel) -> Result<Packed> {
        let Self { disk, file, options, work, .. } = *self;
        let write = |storage: &dyn Storage| {
            let packed = work.run(|| {
                packed::write(disk, (plan, first), parts, (&options.traits, level), storage, &self.spill, work)
            });
            packed.target(self.target)
        };
        // Compressed it is shorter, but how much is known when it is done. Where not even that is sure to have room it is done
        // twice, so that a device that is too small keeps what it holds.
        if file.ensure_room(Layout::new(parts).target(self.target)?.file_len()).is_err() {
            work.progress.begin(MEASURING, plan.stored * parts.cluster_bits.bytes());
            file.ensure_room(write(&Nowhere)?.layout.file_len())?;
            work.progress.begin(WRITING, plan.stored * parts.cluster_bits.bytes());
        }
        self.begin()?;
        write(self.storage)
    }
}
