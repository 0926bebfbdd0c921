//! What in an image refers to clusters, beside L2 tables: L1 tables, the refcount table, the snapshot table, bitmaps, the header.

use crate::check::Inspection;
use crate::check::finding::Use;
use crate::error::{Context, IoContext, OrInternal, Result, Table};
use crate::format::header::{Header, L1_OFFSET_AT, REFCOUNT_TABLE_AT, SNAPSHOTS_AT, V2_LENGTH, autoclear, extension};
use crate::format::snapshot::Snapshot;
use crate::format::table::{l1_target, with_offset};
use crate::format::{array_at, u16_at, u32_at, u64_at};
use crate::storage::{Storage, read_padded};
use crate::units::{HostCluster, HostOffset, to_usize};

/// A table that holds offsets of clusters.
pub(crate) struct Container {
    /// Where it is.
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
    /// Where in it the offsets are.
    pointers: Vec<usize>,
}

impl Container {
    fn read(storage: &dyn Storage, at: u64, len: u64, pointers: impl Fn(&[u8]) -> Result<Vec<usize>>) -> Result<Self> {
        let mut bytes = vec![0; to_usize(len)];
        read_padded(storage, &mut bytes, at).reading(Table::Data, at)?;
        let pointers = pointers(&bytes)?;
        Ok(Self { at, bytes, pointers })
    }

    /// Its bytes when things have moved where `moved` says, if they change.
    pub(crate) fn redirected(&self, moved: impl Fn(u64) -> Option<u64>) -> Result<Option<Vec<u8>>> {
        let mut bytes = self.bytes.clone();
        let mut changed = false;
        for &at in &self.pointers {
            let word = u64_at(&bytes, at).or_internal("an entry of a table lies behind its end")?;
            let Some(new) = l1_target(word).and_then(|target| moved(target.0)) else { continue };
            let slot = bytes.get_mut(at..at + 8).or_internal("an entry of a table lies behind its end")?;
            slot.copy_from_slice(&with_offset(word, HostOffset(new)).to_be_bytes());
            changed = true;
        }
        Ok(changed.then_some(bytes))
    }
}

/// Every eighth byte.
fn all(bytes: &[u8]) -> Result<Vec<usize>> {
    Ok((0..bytes.len()).step_by(8).collect())
}

/// The tables of a sound image.
pub(crate) fn containers(storage: &dyn Storage, inspection: &Inspection) -> Result<Vec<Container>> {
    let header = &inspection.header;
    let bits = header.cluster_bits;
    let mut found = Vec::new();
    let mut table = |at: HostOffset, len: u64| -> Result<()> {
        found.push(Container::read(storage, at.0, len, all)?);
        Ok(())
    };
    table(header.l1_offset, u64::from(header.l1_entries) * 8)?;
    for snapshot in &inspection.snapshots {
        table(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8)?;
    }
    table(header.refcount_table_offset, u64::from(header.refcount_table_clusters) * bits.bytes())?;
    for claim in inspection.claims.iter().filter(|claim| matches!(claim.to, Use::BitmapTable(_))) {
        table(HostCluster(claim.first).offset(bits), (claim.last + 1 - claim.first) * bits.bytes())?;
    }
    let size = |to: &Use| {
        let claim = inspection.claims.iter().find(|claim| claim.to == *to);
        claim.map_or(0, |claim| (claim.last + 1 - claim.first) * bits.bytes())
    };
    let count = inspection.snapshots.len();
    let snapshots = |bytes: &[u8]| entries(bytes, count, |rest| Some(Snapshot::decode(rest).ok()?.1));
    found.push(Container::read(storage, header.snapshots_offset.0, size(&Use::SnapshotTable), snapshots)?);
    if let Some((offset, count)) = bitmap_directory(header) {
        let length = |rest: &[u8]| Some((24 + usize::from(u16_at(rest, 18)?)).next_multiple_of(8));
        let bitmaps = |bytes: &[u8]| entries(bytes, count as usize, length);
        found.push(Container::read(storage, offset, size(&Use::BitmapDirectory), bitmaps)?);
    }
    Ok(found)
}

/// Where `count` entries begin, each as long as `length` says.
fn entries(bytes: &[u8], count: usize, length: impl Fn(&[u8]) -> Option<usize>) -> Result<Vec<usize>> {
    let mut starts = Vec::new();
    let mut at = 0;
    while starts.len() < count {
        // The table is one that was checked: an entry that is left out would go on pointing to where something has been.
        let length = bytes.get(at..).and_then(&length).or_internal("a table has fewer entries than were checked")?;
        starts.push(at);
        at += length;
    }
    Ok(starts)
}

/// Where the bitmap directory is, and how many bitmaps there are, if the header says that they are valid.
fn bitmap_directory(header: &Header) -> Option<(u64, u32)> {
    let data = header.extension(extension::BITMAPS).filter(|_| header.autoclear & autoclear::BITMAPS != 0)?;
    Some((u64_at(data, 16)?, u32_at(data, 0)?))
}

/// The fields of the header that change when things move where `moved` says, and where they are. Each lies within a sector.
pub(crate) fn header_fields(
    storage: &dyn Storage,
    header: &Header,
    moved: impl Fn(u64) -> Option<u64>,
) -> Result<Vec<([u8; 8], u64)>> {
    let mut fields = Vec::new();
    let mut field = |offset: u64, at: u64| {
        if let Some(new) = moved(offset) {
            fields.push((new.to_be_bytes(), at));
        }
    };
    field(header.l1_offset.0, L1_OFFSET_AT);
    field(header.refcount_table_offset.0, REFCOUNT_TABLE_AT);
    field(header.snapshots_offset.0, SNAPSHOTS_AT + 4);
    if let Some((offset, _)) = bitmap_directory(header) {
        let mut cluster = vec![0; header.cluster_bits.len()];
        read_padded(storage, &mut cluster, 0).at("Could not read the header")?;
        let length = if header.version < 3 { None } else { array_at(&cluster, 100).map(u32::from_be_bytes) };
        let start = length.map_or(V2_LENGTH, |length| length as usize);
        if let Some(at) = extension::position(&cluster, start, extension::BITMAPS) {
            field(offset, at as u64 + 16);
        }
    }
    Ok(fields)
}
