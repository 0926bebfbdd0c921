//! A disk with its internal snapshots, laid out in a row as one long disk.
//!
//! The disk is layer 0, the snapshots follow from the newest to the oldest. They are woven: the first unit of every layer, then the
//! second of every layer, and so on. What the layers have at the same place of the disk is close together, and what two neighbours
//! share needs to be known for the length of a unit only. The VM states follow, each from the start of a unit.
//!
//! ```text
//!  disk 0 | newest 0 | ... | oldest 0 | disk 1 | newest 1 | ... | oldest 1 | ... | VM state | VM state
//! ```

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::format::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::format::snapshot::Snapshot;
use crate::pool;
use crate::units::ClusterBits;

/// The least length of a unit: long enough that it is not the units that take the time of a scan.
const MIN_UNIT: u64 = 64 << 20;

/// How layers are woven into a row. All in bytes, or all in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weave {
    /// The length of a unit: a multiple of what an L2 table maps.
    pub unit: u64,
    /// How many layers there are.
    pub layers: u64,
    /// Where the layers end and VM states begin.
    pub end: u64,
}

impl Weave {
    /// The layer and the place on its disk of what lies at `at` of the row; `None` in a VM state.
    #[must_use]
    pub(crate) fn locate(&self, at: u64) -> Option<(u64, u64)> {
        let unit = at / self.unit;
        (at < self.end).then(|| (unit % self.layers, unit / self.layers * self.unit + at % self.unit))
    }

    /// A number that is the same for the same place of all layers, and for nothing else.
    #[must_use]
    pub(crate) fn place(&self, at: u64) -> u64 {
        self.locate(at).map_or(at, |(_, place)| place)
    }

    /// The units that `unit` is compared with and compared to: those of all layers at one place.
    #[must_use]
    pub(crate) fn group(&self, unit: u64) -> u64 {
        if unit < self.end / self.unit { unit / self.layers } else { unit }
    }
}

/// A VM state in the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmState {
    /// Whose it is.
    pub(crate) layer: u64,
    /// Where it begins, in bytes of the row.
    pub(crate) start: u64,
    /// Its length in bytes, as far as something is stored for it.
    pub(crate) len: u64,
}

/// The snapshots of a disk that is read with all of them.
#[derive(Debug, Clone)]
pub(crate) struct History {
    snapshots: Vec<Snapshot>,
    /// Virtual sizes, by layer.
    sizes: Vec<u64>,
    grain: ClusterBits,
    weave: Weave,
    vm: Vec<VmState>,
}

/// The L1 tables of an image with snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct L1Size {
    /// Entries that map the disk.
    pub(crate) disk: u32,
    /// All, those of the VM state included.
    pub(crate) all: u32,
}

impl History {
    /// The row of a disk of `size` bytes and its `snapshots`, in the order of their table, with the stored lengths of their VM
    /// states. No cluster of the output is larger than `grain`.
    pub(super) fn new(snapshots: Vec<Snapshot>, sizes: Vec<u64>, vm: &[u64], grain: ClusterBits) -> Result<Self> {
        let unit = MIN_UNIT.max(grain.entries() * grain.bytes());
        let too_long = || Error::new(ErrorKind::Limit, "the disk and its snapshots together are 8 EiB or more");
        let layers = sizes.len() as u64;
        let units = sizes.iter().map(|size| size.div_ceil(unit)).max().unwrap_or(0);
        let fits = |end: &u64| i64::try_from(*end).is_ok();
        let end = units.checked_mul(layers).and_then(|units| units.checked_mul(unit)).filter(fits);
        let weave = Weave { unit, layers, end: end.ok_or_else(too_long)? };
        let mut history = Self { snapshots, sizes, grain, weave, vm: Vec::new() };
        let mut start = weave.end;
        for (layer, &len) in (1..layers).zip(vm.iter().rev()).filter(|(_, len)| **len > 0) {
            history.vm.push(VmState { layer, start, len });
            let next = start.checked_add(len).and_then(|end| end.checked_next_multiple_of(unit)).filter(fits);
            start = next.ok_or_else(too_long)?;
        }
        Ok(history)
    }

    /// The user's snapshots of an image whose active disk has `size` bytes: all but the pool.
    pub(super) fn users(snapshots: Vec<Snapshot>, size: u64) -> Result<Vec<Snapshot>> {
        let mut users: Vec<Snapshot> = snapshots.into_iter().filter(|snapshot| !snapshot.is_pool()).collect();
        if users.iter().any(|snapshot| snapshot.name == pool::NAME.as_bytes()) {
            return Err(Error::unsupported(format!(
                "the image has a snapshot called '{}' that is not a deduplication pool",
                pool::NAME
            ))
            .advise(Advice::RenameSnapshot));
        }
        if users.len() >= MAX_SNAPSHOTS as usize {
            let what = "the image has no room for one more snapshot, which the pool would be";
            return Err(Error::new(ErrorKind::Limit, what));
        }
        for snapshot in &mut users {
            // Version 2 may leave it out, version 3 may not: QEMU takes the disk's.
            snapshot.disk_size.get_or_insert(size);
        }
        Ok(users)
    }

    /// The user's snapshots, in the order of their table.
    #[must_use]
    pub(crate) fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// Virtual size of the disk in bytes.
    #[must_use]
    pub(crate) fn disk_size(&self) -> u64 {
        self.sizes.first().copied().unwrap_or(0)
    }

    /// Bytes of the disk, of all snapshots and of what is stored of their VM states.
    #[must_use]
    pub(crate) fn content_size(&self) -> u64 {
        self.sizes.iter().chain(self.vm.iter().map(|vm| &vm.len)).fold(0, |sum, &size| sum.saturating_add(size))
    }

    /// The largest cluster that the output may have.
    #[must_use]
    pub(crate) fn grain(&self) -> ClusterBits {
        self.grain
    }

    /// The row in bytes.
    pub(super) fn row(&self) -> Weave {
        self.weave
    }

    /// The end of the row in bytes.
    pub(super) fn end(&self) -> u64 {
        self.vm.last().map_or(self.weave.end, |vm| vm.start + vm.len)
    }

    /// The row in clusters.
    #[must_use]
    pub(crate) fn weave(&self, bits: ClusterBits) -> Weave {
        let Weave { unit, layers, end } = self.weave;
        Weave { unit: unit >> bits.bits(), layers, end: end >> bits.bits() }
    }

    /// VM states in the order of the row.
    pub(crate) fn vm(&self) -> &[VmState] {
        &self.vm
    }

    /// The layer of snapshot `index` of the table.
    pub(crate) fn layer(&self, index: usize) -> usize {
        self.snapshots.len() - index
    }

    /// The sizes of the layers' L1 tables.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] where one would be larger than QEMU accepts.
    pub(crate) fn l1_sizes(&self, bits: ClusterBits) -> Result<Vec<L1Size>> {
        let entries = |bytes: u64| bits.clusters(bytes).div_ceil(bits.entries());
        let size = |(layer, &size): (u64, &u64)| {
            let vm = self.vm.iter().find(|vm| vm.layer == layer).map_or(0, |vm| vm.len);
            let (disk, all) = (entries(size), entries(size) + entries(vm));
            match (u32::try_from(disk), u32::try_from(all)) {
                (Ok(disk), Ok(all)) if u64::from(all) * 8 <= MAX_L1_BYTES => Ok(L1Size { disk, all }),
                _ => Err(Error::new(
                    ErrorKind::Limit,
                    "a snapshot is too large for file format 'qcow2' (try using a larger cluster size)",
                )),
            }
        };
        (0..).zip(&self.sizes).map(size).collect()
    }
}
