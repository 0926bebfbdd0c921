//! Writing a stale directory of the pool anew.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::check::Inspection;
use crate::check::finding::Layer;
use crate::check::pool::NewDirectory;
use crate::digest::sha256;
use crate::error::{Error, Result};
use crate::format::l2;
use crate::format::table::L2Entry;
use crate::pool::directory::{DirectoryHeader, RECORD_LENGTH, Record};
use crate::storage::buffer::reserve;
use crate::storage::{Storage, flush, read_padded, write};
use crate::units::{GuestOffset, HostOffset};

/// Writes a new directory over a stale one. It was not used before and is not used until it is whole: a crash costs nothing.
pub(crate) fn write_directory(new: &NewDirectory, inspection: &Inspection, storage: &dyn Storage) -> Result<()> {
    let bits = inspection.header.cluster_bits;
    let limit = inspection.header.refcount_bits.sharer_limit().unwrap_or(0);
    let lowest = lowest_guests(new, inspection, storage)?;
    let mut records = Vec::new();
    reserve(&mut records, new.members.len() * RECORD_LENGTH)?;
    let mut cluster = vec![0; bits.len()];
    for host in &new.members {
        read_padded(storage, &mut cluster, host.0)
            .map_err(|e| Error::io(format_args!("Could not read at {host:#x}"), e))?;
        let record = Record {
            sha256: sha256(&cluster),
            guest: lowest.get(host).copied().unwrap_or_default(),
            retired: inspection.counts.get(host.0 >> bits.bits()).saturating_sub(1) >= limit,
        };
        records.extend_from_slice(&record.encode());
    }
    let header = DirectoryHeader {
        cluster_bits: bits,
        members: new.members.len() as u64,
        member_l1_entries: new.member_l1_entries,
        sharer_limit: limit,
        records_sha256: Sha256::digest(&records).into(),
    };
    let mut bytes = header.encode().to_vec();
    bytes.append(&mut records);
    bytes.resize(new.hosts.len() * bits.len(), 0);
    for (host, cluster) in new.hosts.iter().zip(bytes.chunks_exact(bits.len())) {
        write(storage, cluster, host.0)?;
    }
    flush(storage)
}

/// The lowest guest offset, in any layer, that maps to each member.
fn lowest_guests(
    new: &NewDirectory,
    inspection: &Inspection,
    storage: &dyn Storage,
) -> Result<BTreeMap<HostOffset, GuestOffset>> {
    let (bits, tables) = (inspection.header.cluster_bits, &inspection.tables);
    let mut lowest: BTreeMap<HostOffset, GuestOffset> = BTreeMap::new();
    let mut table = vec![0; bits.len()];
    for reference in &tables.references {
        if tables.layers.get(reference.layer as usize).is_none_or(|layer| *layer == Layer::Pool) {
            continue;
        }
        read_padded(storage, &mut table, reference.table.0).map_err(|e| Error::io("Could not read an L2 table", e))?;
        for (index, entry) in l2::entries(&inspection.header, &table) {
            let L2Entry::Data { host, .. } = entry else { continue };
            if new.members.binary_search(&host).is_ok() {
                let cluster = u64::from(reference.index) * inspection.header.l2_entries() + index;
                let guest = GuestOffset(cluster.saturating_mul(bits.bytes()));
                lowest.entry(host).and_modify(|lowest| *lowest = guest.min(*lowest)).or_insert(guest);
            }
        }
    }
    Ok(lowest)
}
