//! What `dedup` would do to an image, from what a scan of its disk has found.

use super::join::Joined;
use super::metadata::Metadata;
use super::report::{DedupForecast, Forecast, StillDuplicate};
use crate::edit::key::Key;
use crate::edit::refuse::{refuse, refuse_snapshots};
use crate::error::Result;
use crate::inplace::DedupOptions;
use crate::inplace::deduplicate::choose::Choice;
use crate::inplace::deduplicate::plan::{DedupPlan, Found};
use crate::inplace::deduplicate::scan::scan;
use crate::sort::bits::Bits;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sorter, Spill};
use crate::storage::Storage;
use crate::survey::Ground;
use crate::units::ClusterBits;
use crate::work::Work;

/// Reads what only snapshots use, and plans the deduplication; `grain` is the cluster size of the scan. Bytes are not compared.
pub(super) fn forecast(
    metadata: Metadata,
    joined: Joined,
    storage: &dyn Storage,
    grain: ClusterBits,
    spill: &Spill,
    work: &Work,
) -> Result<(StillDuplicate, Forecast)> {
    let Metadata { ground, lost, .. } = metadata;
    let header = &ground.inspection.header;
    let size = header.cluster_bits.bytes();
    let refused = refuse(header).and_then(|_| refuse_snapshots(&ground.inspection)).err();
    let limit = header.refcount_bits.sharer_limit().unwrap_or(u64::MAX);
    let units = &ground.units;
    let mut used = Bits::new(units.limit());
    (0..units.limit()).filter(|&unit| units.users(unit) > 0).for_each(|unit| used.insert(unit));

    let Joined { mut records, known, mut zeros, .. } = joined;
    // What a cluster with subclusters holds depends on who reads it: snapshots of such images are left out.
    if header.extended_l2() {
        used = used.filtered(|&unit| known.contains(unit));
    }
    let wanted = used.filtered(|&unit| !known.contains(unit));
    add(&ground, storage, &wanted, grain, (&mut records, &mut zeros), spill, work)?;
    let records = records.finish()?;
    let stored = used.len();
    let links = Choice::new(&ground, limit).links(&records, spill)?;
    let still = StillDuplicate::new(links.len(), stored - zeros.len(), size);
    if let Some(why) = refused {
        return Ok((still, Forecast::Refused { refused: why.to_string(), why }));
    }

    // A member that nothing uses takes sharers again, if the directory says what it holds.
    let garbage = ground.members.bits().filtered(|&unit| ground.has_records() && units.users(unit) == 0);
    let links = match garbage.len() {
        0 => links,
        _ => {
            let mut all = Sorter::new(spill);
            for record in records.iter() {
                all.push(record?)?;
            }
            drop((links, records));
            add(&ground, storage, &garbage, grain, (&mut all, &mut Bits::new(0)), spill, work)?;
            Choice::new(&ground, limit).links(&all.finish()?, spill)?
        }
    };
    let plan = DedupPlan::of(storage, DedupOptions::default(), ground, Found { links, zeros, read: 0 }, spill, work)?;
    let figures = plan.figures();
    let done = DedupForecast {
        stored_clusters: figures.scanned,
        zero_clusters: figures.zero,
        duplicate_clusters: figures.duplicate,
        freed_clusters: figures.freed,
        freed_bytes: figures.freed * size,
        pool_members: figures.pool_members,
        file_allocated_after_bytes: plan.allocated_after(&lost)?,
    };
    Ok((still, Forecast::Done(done)))
}

/// Reads the units in `wanted` and adds what they hold to `records` and `zeros`.
fn add(
    ground: &Ground,
    storage: &dyn Storage,
    wanted: &Bits,
    grain: ClusterBits,
    (records, zeros): (&mut Sorter<ContentAt>, &mut Bits),
    spill: &Spill,
    work: &Work,
) -> Result<()> {
    let found = scan(&ground.content(storage), wanted, Key::Parts(grain), &spill.share(4), work)?;
    for record in found.records.iter() {
        records.push(record?)?;
    }
    found.zeros.iter().for_each(|unit| zeros.insert(unit));
    Ok(())
}
