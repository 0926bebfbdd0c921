//! Which clusters of a disk share one in the file, read from metadata alone: no data is touched, and nothing is written.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::storage::LockMode;
//! use dedup_img::{Sharers, Work, WorkOptions, open_image};
//!
//! let (storage, _) = open_image(Path::new("disk.qcow2"), None, LockMode::Read)?;
//! let work = Work::new(WorkOptions::default())?;
//! for sharer in Sharers::new(&storage, &work)?.iter() {
//!     let sharer = sharer?;
//!     println!("guest {:#x} is stored at {:#x}", sharer.guest, sharer.host);
//! }
//! # Ok::<(), dedup_img::Error>(())
//! ```

use std::fmt;
use std::iter;

use crate::check::ALONE;
use crate::error::Result;
use crate::format::l2;
use crate::format::table::L2Entry;
use crate::pool::Record;
use crate::sort::record::record;
use crate::sort::sequence::{Sorted, Sorter};
use crate::storage::Storage;
use crate::survey::tables::L2Tables;
use crate::survey::{Ground, sound};
use crate::units::{GuestCluster, GuestOffset, HostOffset};
use crate::work::Work;

/// The clusters of the active disk that share what is stored for them.
pub struct Sharers {
    ground: Ground,
    /// The entries of the disk that lead to a unit with two users or more.
    entries: Sorted<Entry>,
}

impl fmt::Debug for Sharers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharers").field("cluster_size", &self.cluster_size()).finish_non_exhaustive()
    }
}

/// An entry of the disk, by the unit that it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    unit: u64,
    guest: GuestCluster,
}

record!(entry_words: Entry { unit: 64, guest: 64 });

/// A guest cluster that uses the same cluster of the file as another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sharer {
    /// Where it begins on the disk.
    pub guest: GuestOffset,
    /// Where the file has it; of a compressed cluster, where its compressed bytes begin.
    pub host: HostOffset,
    /// Whether it is compressed.
    pub compressed: bool,
    /// How many L2 entries lead there, as QEMU counts them: those of the disk and of the snapshots, without the pool's.
    pub references: u64,
    /// Whether the pool holds it: then QEMU never writes it in place.
    pub pooled: bool,
    /// What the pool's directory says of it; `None` too where the directory is damaged.
    pub record: Option<Record>,
}

impl Sharers {
    /// Checks the image in `storage` and lists its sharers.
    ///
    /// # Errors
    /// Those of reading; [`Corrupt`](crate::ErrorKind::Corrupt) for a damaged image, leaks excepted.
    pub fn new(storage: &dyn Storage, work: &Work) -> Result<Self> {
        work.progress.start();
        let inspection = sound(storage, ALONE, work, |_| {})?;
        work.run(|| {
            let ground = Ground::new(storage, inspection)?;
            let entries = entries(&ground, storage, Sorter::new(&work.spill()), work)?;
            Ok(Self { ground, entries })
        })
    }

    /// The cluster size in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.ground.inspection.header.cluster_bits.bytes()
    }

    /// The sharers: those of one cluster of the file together, in the order of the disk; compressed clusters come last.
    ///
    /// Each item can be an error of reading a temporary file.
    pub fn iter(&self) -> impl Iterator<Item = Result<Sharer>> + '_ {
        let mut entries = self.entries.iter().peekable();
        let mut before = None;
        iter::from_fn(move || {
            loop {
                let Entry { unit, guest } = match entries.next()? {
                    Ok(entry) => entry,
                    Err(error) => return Some(Err(error)),
                };
                // Where the others are in snapshots, the disk has it alone.
                let next = entries.peek().and_then(|next| next.as_ref().ok()).map(|next| next.unit);
                let shares = before == Some(unit) || next == Some(unit);
                before = Some(unit);
                if shares {
                    return Some(Ok(self.sharer(unit, guest)));
                }
            }
        })
    }

    fn sharer(&self, unit: u64, guest: GuestCluster) -> Sharer {
        let Ground { units, inspection, members, .. } = &self.ground;
        let (host, compressed) = match units.entry(unit) {
            L2Entry::Compressed(extent) => (extent.host, true),
            L2Entry::Data { host, .. } => (host, false),
            L2Entry::Zero { .. } | L2Entry::Unallocated => (HostOffset(0), false),
        };
        Sharer {
            guest: guest.offset(inspection.header.cluster_bits),
            host,
            compressed,
            references: units.users(unit),
            pooled: members.rank(unit).is_some(),
            record: self.ground.record(unit).copied(),
        }
    }
}

/// The entries of the disk.
fn entries(ground: &Ground, storage: &dyn Storage, mut sorter: Sorter<Entry>, work: &Work) -> Result<Sorted<Entry>> {
    let header = &ground.inspection.header;
    // What lies behind the disk is VM state.
    let end = GuestCluster(header.cluster_bits.clusters(header.size));
    L2Tables::active(storage, header, &ground.inspection.tables).visit(
        |table, content| {
            work.cancel.check()?;
            let mut found = Vec::new();
            for (index, entry) in l2::entries(header, content) {
                if let Some(unit) = ground.units.of(entry).filter(|&unit| ground.units.users(unit) > 1) {
                    let guests = table.guests(index).filter(|&guest| guest < end);
                    found.extend(guests.map(|guest| Entry { unit, guest }));
                }
            }
            Ok(found)
        },
        |found| found.into_iter().try_for_each(|entry| sorter.push(entry)),
    )?;
    sorter.finish()
}
