//! The deduplication pool: its members, its directory, and with `--data` the content of each member.

use std::collections::BTreeMap;

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;
use sha2::{Digest, Sha256};

use crate::check::Checker;
use crate::check::counts::SIDE_BY_SIDE;
use crate::check::finding::{At, Kind, Layer, Remark, Severity};
use crate::check::tables::Tables;
use crate::codec::Inflater;
use crate::digest::{Sha, sha256};
use crate::error::{Context, Doing, IoContext, OrInternal, Result, Table};
use crate::format::l2;
use crate::format::snapshot::Snapshot;
use crate::format::table::{L2Entry, l1_target};
use crate::pool::NAME;
use crate::pool::directory::{DirectoryHeader, HEADER_LENGTH, RECORD_LENGTH, Record};
use crate::storage::buffer::{collected, reserve, zeroed};
use crate::storage::read_padded;
use crate::units::{GuestOffset, HostOffset, to_usize};

/// Members that are read and compared at once.
const BATCH: usize = 4096;

/// Why a directory is not used.
type Stale = &'static str;

/// A pool as it was found.
pub(crate) struct KnownPool {
    /// Its place in the snapshot table.
    pub index: usize,
    /// The entries of its members, in order.
    pub members: Vec<u64>,
    /// Their records, if the directory can be used.
    pub records: Option<Vec<Record>>,
    /// Whether the members ascend, as they should.
    pub ascending: bool,
}

/// How the entries of members lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As they should.
    Ascending,
    /// Each is right, but they are mixed up.
    Mixed,
    /// Some have flags, or there are gaps.
    Broken,
}

/// What a new directory is made of, in the place of the old one.
pub(crate) struct NewDirectory {
    pub(crate) members: Vec<HostOffset>,
    /// The directory's own clusters, in order.
    pub(crate) hosts: Vec<HostOffset>,
    pub(crate) member_l1_entries: u32,
}

impl Checker<'_> {
    /// Looks at the pool, if there is one.
    pub(crate) fn pool(&mut self, snapshots: &[Snapshot], tables: &Tables) -> Result<()> {
        let user_snapshots = snapshots.iter().any(|snapshot| !snapshot.is_pool());
        let Some((index, pool)) = snapshots.iter().enumerate().find(|(_, snapshot)| snapshot.is_pool()) else {
            if !user_snapshots {
                self.unpooled(&[]);
            }
            if snapshots.iter().any(|snapshot| snapshot.name == NAME.as_bytes()) {
                self.remark(Remark::NotAPool);
            }
            return Ok(());
        };
        let Some(entries) = self.pool_entries(pool)? else {
            self.say(
                Severity::Benign,
                Kind::StaleDirectory("the pool has more entries than it can have members", false),
            );
            self.known = Some(KnownPool { index, members: Vec::new(), records: None, ascending: false });
            return Ok(());
        };
        let directory_tables = self.directory_clusters(pool).div_ceil(self.header.cluster_bits.entries());
        let tables_entries = self.header.cluster_bits.entries();
        let member_slots = u64::from(pool.l1_entries).saturating_sub(directory_tables).saturating_mul(tables_entries);
        let split = entries.partition_point(|(slot, _)| *slot < member_slots);
        let (members, directory) = entries.split_at(split);
        let order = self.members(members);
        let words = collected(members.iter().map(|(_, word)| *word))?;
        let mut known = KnownPool { index, members: words, records: None, ascending: order == Order::Ascending };
        match self.directory_records(pool, members, directory, member_slots)? {
            Err(why) => {
                self.stale = self.new_directory(pool, members, directory, member_slots);
                self.say(Severity::Benign, Kind::StaleDirectory(why, self.stale.is_some()));
            }
            Ok((header, records)) => {
                self.sharers(&header, members, &records);
                if self.options.data {
                    self.data(members, &records, tables)?;
                }
                known.records = Some(records).filter(|_| order != Order::Broken);
            }
        }
        self.known = Some(known);
        if !user_snapshots {
            self.unpooled(members);
        }
        Ok(())
    }

    fn directory_clusters(&self, pool: &Snapshot) -> u64 {
        self.header.cluster_bits.clusters(pool.vm_state_size.min(self.file_len))
    }

    /// All entries of the pool's L2 tables that are not empty, by slot; `None` where there are more than a pool can have: its
    /// members are distinct, and so are the clusters of its directory.
    fn pool_entries(&self, pool: &Snapshot) -> Result<Option<Vec<(u64, u64)>>> {
        let bits = self.header.cluster_bits;
        let mut l1 = zeroed(to_usize((u64::from(pool.l1_entries) * 8).min(self.file_len)))?;
        let read = |buffer: &mut Vec<u8>, offset: u64| {
            read_padded(self.storage, buffer, offset).doing(|| Doing::Reading(Table::Pool, None))
        };
        read(&mut l1, pool.l1_offset.0)?;
        // Even a compressed member takes some bytes of the file for itself.
        let most = self.file_len >> 4;
        let mut entries = Vec::new();
        let mut table = vec![0; bits.len()];
        for (word, index) in l1.as_chunks().0.iter().zip(0u64..) {
            let Some(target) = l1_target(u64::from_be_bytes(*word)) else { continue };
            read(&mut table, target.0)?;
            let words = table.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word));
            let slots = (index * bits.entries()..).zip(words);
            reserve(&mut entries, bits.len() / 8)?;
            entries.extend(slots.filter(|(_, word)| *word != 0));
            if entries.len() as u64 > most {
                return Ok(None);
            }
        }
        Ok(Some(entries))
    }

    /// Members are ascending, without flags and without gaps.
    fn members(&mut self, members: &[(u64, u64)]) -> Order {
        let bits = self.header.cluster_bits;
        let mut before = None;
        let mut mixed = None;
        for ((slot, word), expected) in members.iter().zip(0u64..) {
            let entry = L2Entry::decode(*word, bits, true);
            let plain = match entry {
                L2Entry::Data { host, copied: false } => Some(host),
                L2Entry::Compressed(extent) => Some(extent.host),
                _ => None,
            };
            if plain.is_none() || *slot != expected {
                self.remark(Remark::MemberOutOfPlace(*slot));
                return Order::Broken;
            }
            if plain <= before {
                mixed.get_or_insert(*slot);
            }
            before = plain;
        }
        let Some(slot) = mixed else { return Order::Ascending };
        self.remark(Remark::MemberOutOfOrder(slot));
        Order::Mixed
    }

    /// The directory's header and records, or why they are not to be used.
    fn directory_records(
        &self,
        pool: &Snapshot,
        members: &[(u64, u64)],
        directory: &[(u64, u64)],
        member_slots: u64,
    ) -> Result<std::result::Result<(DirectoryHeader, Vec<Record>), Stale>> {
        let bits = self.header.cluster_bits;
        let length = DirectoryHeader::directory_bytes(members.len() as u64);
        if pool.vm_state_size != length || directory.len() as u64 != bits.clusters(length) {
            return Ok(Err("it does not fit the members"));
        }
        let mut bytes = Vec::new();
        reserve(&mut bytes, directory.len() * bits.len())?;
        for ((slot, word), expected) in directory.iter().zip(0u64..) {
            let L2Entry::Data { host, .. } = L2Entry::decode(*word, bits, true) else {
                return Ok(Err("an entry leads to no cluster"));
            };
            if *slot != member_slots + expected {
                return Ok(Err("a cluster is missing"));
            }
            let start = bytes.len();
            bytes.resize(start + bits.len(), 0);
            let cluster = bytes.get_mut(start..).or_internal("the pool's directory has lost its end")?;
            read_padded(self.storage, cluster, host.0).doing(|| Doing::Reading(Table::PoolDirectory, None))?;
        }
        let Some(header) = DirectoryHeader::decode(&bytes) else { return Ok(Err("its header is damaged")) };
        let fits = header.cluster_bits == bits
            && header.members == members.len() as u64
            && u64::from(header.member_l1_entries) * bits.entries() == member_slots;
        let records = usize::try_from(length).ok().and_then(|end| bytes.get(HEADER_LENGTH..end));
        let Some(records) = records.filter(|_| fits) else { return Ok(Err("it does not fit the members")) };
        if header.records_sha256 != Sha::from(Sha256::digest(records)) {
            return Ok(Err("its records are damaged"));
        }
        Ok(Ok((header, collected(records.as_chunks::<RECORD_LENGTH>().0.iter().map(Record::decode))?)))
    }

    /// What a new directory is made of, if the members are in order and it fits into the clusters of the old one.
    fn new_directory(
        &self,
        pool: &Snapshot,
        members: &[(u64, u64)],
        directory: &[(u64, u64)],
        member_slots: u64,
    ) -> Option<NewDirectory> {
        let bits = self.header.cluster_bits;
        let hosts: Vec<HostOffset> = directory.iter().filter_map(|(_, word)| l1_target(*word)).collect();
        let length = DirectoryHeader::directory_bytes(members.len() as u64);
        let in_order = members.iter().zip(0u64..).all(|((slot, _), expected)| *slot == expected)
            && directory.iter().zip(member_slots..).all(|((slot, _), expected)| *slot == expected);
        // The users of compressed members are found by descriptor, which dedup and gc do.
        let plain = members.iter().all(|(_, word)| matches!(L2Entry::decode(*word, bits, true), L2Entry::Data { .. }));
        // Nothing else may refer to what is written over.
        let own = hosts.iter().all(|host| self.counts.get(host.0 >> bits.bits()) == 1);
        let ascending = members.is_sorted_by_key(|(_, word)| *word);
        let fits = pool.vm_state_size == length && hosts.len() as u64 == bits.clusters(length);
        let member_l1_entries = u32::try_from(member_slots / bits.entries()).ok()?;
        (in_order && ascending && plain && own && fits).then(|| NewDirectory {
            members: members.iter().filter_map(|(_, word)| l1_target(*word)).collect(),
            hosts,
            member_l1_entries,
        })
    }

    /// No member has more sharers than the limit, unless a user's snapshots hold the rest.
    fn sharers(&mut self, header: &DirectoryHeader, members: &[(u64, u64)], records: &[Record]) {
        let bits = self.header.cluster_bits;
        let mut exceeded = 0u64;
        for ((_, word), record) in members.iter().zip(records) {
            if let L2Entry::Data { host, .. } = L2Entry::decode(*word, bits, true) {
                let sharers = self.counts.get(host.0 >> bits.bits()).saturating_sub(1);
                exceeded += u64::from(sharers > header.sharer_limit && !record.retired);
            }
        }
        if exceeded > 0 {
            self.remark(Remark::TooManySharers { members: exceeded, limit: header.sharer_limit });
        }
    }

    /// Clusters that several guest clusters share without the pool's reference.
    fn unpooled(&mut self, members: &[(u64, u64)]) {
        let bits = self.header.cluster_bits;
        let mut plain: Vec<u64> = (members.iter())
            .filter_map(|(_, word)| match L2Entry::decode(*word, bits, true) {
                L2Entry::Data { host, .. } => Some(host.0 >> bits.bits()),
                _ => None,
            })
            .collect();
        plain.sort_unstable();
        let pooled = |cluster: u64| plain.binary_search(&cluster).is_ok();
        // Compressed clusters never have the flag.
        let shared = |&cluster: &u64| {
            self.counts.is_data(cluster) && !self.counts.is_packed(cluster) && self.counts.get(cluster) > 1
        };
        let clusters = self.counts.clusters();
        let groups = (0..clusters).step_by(to_usize(SIDE_BY_SIDE));
        let groups = groups.filter(|&first| self.counts.common(first).is_none());
        let unpooled = groups
            .flat_map(|first| first..clusters.min(first + SIDE_BY_SIDE))
            .filter(|cluster| shared(cluster) && !pooled(*cluster))
            .count();
        if unpooled > 0 {
            self.remark(Remark::Unpooled(unpooled));
        }
    }

    /// Compares the content of every member with its SHA-256.
    fn data(&mut self, members: &[(u64, u64)], records: &[Record], tables: &Tables) -> Result<()> {
        let mut damaged = BTreeMap::new();
        let all: Vec<(u64, Record)> = members.iter().map(|(_, word)| *word).zip(records.iter().copied()).collect();
        for batch in all.chunks(BATCH) {
            self.work.cancel.check()?;
            let (storage, header) = (self.storage, &self.header);
            let wrong: Vec<Result<Vec<u64>>> = batch
                .par_chunks(64)
                .map(|share| {
                    let mut wrong = Vec::new();
                    let mut cluster = vec![0; header.cluster_bits.len()];
                    let mut inflater = Inflater::default();
                    for (word, record) in share {
                        let sha = match L2Entry::decode(*word, header.cluster_bits, true) {
                            L2Entry::Data { host, .. } => {
                                read_padded(storage, &mut cluster, host.0).reading(Table::Data, host)?;
                                Some(sha256(&cluster))
                            }
                            // What does not decompress any more is as damaged as what changed.
                            L2Entry::Compressed(extent) => {
                                inflater.cluster(storage, header, 0, extent).ok().map(sha256)
                            }
                            _ => None,
                        };
                        if sha != Some(record.sha256) {
                            wrong.push(*word);
                        }
                    }
                    Ok(wrong)
                })
                .collect();
            for share in wrong {
                damaged.extend(share?.into_iter().map(|word| (word, Vec::new())));
            }
        }
        if damaged.is_empty() {
            return Ok(());
        }
        self.find_users(&mut damaged, tables)?;
        for (word, users) in damaged {
            let host = match L2Entry::decode(word, self.header.cluster_bits, true) {
                L2Entry::Compressed(extent) => extent.host,
                _ => l1_target(word).unwrap_or(HostOffset(0)),
            };
            self.say(Severity::Corruption, Kind::DataDamaged(host, users));
        }
        Ok(())
    }

    /// Finds every place that maps to a damaged member. Flags do not matter.
    fn find_users(&self, damaged: &mut BTreeMap<u64, Vec<At>>, tables: &Tables) -> Result<()> {
        // COPIED, and the zero flag where the entry is not compressed.
        let plain = |word: u64| word & !(1 << 63 | u64::from(word >> 62 & 1 == 0));
        let mut table = vec![0; self.header.cluster_bits.len()];
        let mut read = None;
        for reference in &tables.references {
            let layer = tables.layers.get(reference.layer as usize).cloned();
            let Some(layer) = layer.filter(|layer| *layer != Layer::Pool) else { continue };
            if read != Some(reference.table) {
                read_padded(self.storage, &mut table, reference.table.0).at("Could not read an L2 table")?;
                read = Some(reference.table);
            }
            for slot in l2::slots(&self.header, &table) {
                let Some(users) = damaged.get_mut(&plain(slot.word)) else { continue };
                let cluster = u64::from(reference.index) * self.header.l2_entries() + slot.index;
                let guest = GuestOffset(cluster.saturating_mul(self.header.cluster_bits.bytes()));
                users.push(At { layer: layer.clone(), guest });
            }
        }
        Ok(())
    }
}
