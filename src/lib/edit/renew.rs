//! Writing a pool anew where there is no room for it beside the old one.
//!
//! ```text
//!    step                                            after a crash here
//!  1 the pool goes, as with GcOptions::drop_pool;     the image is clean and has no pool: what was shared
//!    what only it held is free and punched            stays shared, no new sharing of it begins
//!  2 its members that are in use enter a new one      as for any change
//! ```
//!
//! A member is never shared further between the two steps, and nobody else can write to the image. The new pool lies where there is
//! room in the file then, so that only here the layout depends on the file system (I5).

use crate::check::ALONE;
use crate::edit::apply;
use crate::edit::change::{Change, NewPool};
use crate::edit::members::NewMember;
use crate::edit::room::{room, with_slack};
use crate::edit::settle::Punch;
use crate::error::{Advice, ErrorKind, OrInternal, Result};
use crate::format::snapshot::Snapshot;
use crate::format::table::L2Entry;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::{BLOCK, Room, Storage};
use crate::survey::{Ground, guests, sound};
use crate::work::Work;

/// Said where the first step fails.
const GOING: &str = "; its pool may have been given up to make room";
/// Said where the second step fails.
const GIVEN_UP: &str = "; its pool was given up to make room";

/// Does what `change` says, which is no more than a new pool, in two steps where there is no room to do it in one.
pub(crate) fn apply(
    change: &mut Change,
    storage: &dyn Storage,
    punch: Punch,
    spill: &Spill,
    work: &Work,
) -> Result<()> {
    match apply::apply(change, storage, punch, work) {
        Err(e) if matches!(e.kind(), ErrorKind::NoRoom { .. }) && least(change, storage)?.is_some() => {}
        done => return done.map(|_| ()),
    }
    let bits = change.ground.inspection.header.cluster_bits;
    let after = &change.members().or_internal("a pool that goes has members")?.after;
    let members: Vec<u64> = after.iter().map(|unit| change.ground.units.entry(unit).encode(bits)).collect();
    change.pool = NewPool::Dropped;
    apply::apply(change, storage, Punch::All, work).map_err(|e| match e.kind() {
        // Nothing was written.
        ErrorKind::NoRoom { .. } | ErrorKind::Cancelled => e,
        _ => e.ending(GOING).advise(Advice::MakePool),
    })?;
    // A request to stop does not reach this far: nobody asked for an image without a pool.
    pool(&members, storage, spill, &work.unstoppable()).map_err(|e| e.ending(GIVEN_UP).advise(Advice::MakePool))
}

/// The least room that a new pool needs, where it may take two steps; `None` where it may not.
pub(crate) fn least(change: &Change, storage: &dyn Storage) -> Result<Option<u64>> {
    let ground = &change.ground;
    let copies = matches!(room(storage)?, Room::FileSystem { copies: true, .. });
    let Some(index) = ground.pool_index.filter(|_| change.members().is_some() && !change.changes_entries() && !copies)
    else {
        return Ok(None);
    };
    let snapshots = &ground.inspection.snapshots;
    // The last entry of the snapshot table goes by being counted no more.
    let table: usize = match index + 1 == snapshots.len() {
        true => 0,
        false => snapshots.iter().map(|snapshot| Snapshot::encode(snapshot).len()).sum(),
    };
    Ok(Some(with_slack((table as u64).next_multiple_of(BLOCK))))
}

/// Pools what the L2 entries `members` lead to, in an image that has no pool.
fn pool(members: &[u64], storage: &dyn Storage, spill: &Spill, work: &Work) -> Result<()> {
    let inspection = sound(storage, ALONE, &work.silent(), |_| {})?;
    let ground = Ground::new(storage, inspection)?;
    let units = &ground.units;
    let bits = ground.inspection.header.cluster_bits;
    let mut wanted = Bits::new(units.limit());
    for word in members {
        let unit = units.of(L2Entry::decode(*word, bits, true));
        wanted.insert(unit.or_internal("a member of the pool that is in use is gone")?);
    }
    let mut joining = Sequence::new(spill);
    let mut after = Bits::new(units.limit());
    guests(&ground, storage, wanted, spill, work, |unit, guests| {
        after.insert(unit);
        joining.push(NewMember { unit, guest: *guests.start() })
    })?;
    let mut change = Change::of_pool(ground, NewPool::of(after, joining));
    apply::apply(&mut change, storage, Punch::All, work).map(|_| ())
}
