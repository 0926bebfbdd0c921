//! Who refers to what in a QCOW2 file: every reference of every layer, one by one.

use crate::support::reader::{Entry, Image, Snapshot, number};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// COPIED, which says nothing about content.
const COPIED: u64 = 1 << 63;

/// Whose reference it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum By {
    /// The disk.
    Disk,
    /// The user's snapshot with this place in the snapshot table.
    Snapshot(usize),
    /// The pool.
    Pool,
}

/// An entry of an L2 table that leads somewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leads {
    pub(super) by: By,
    pub(super) guest: u64,
    /// The entry without COPIED and the zero flag.
    pub(super) word: u64,
    pub(super) entry: Entry,
}

/// The pool's own words.
#[derive(Debug)]
pub(super) struct Pool {
    /// L2 entries of the members.
    pub(super) members: Vec<u64>,
    /// Whether they take no more sharers, by the directory.
    pub(super) retired: Vec<bool>,
    /// Whether the directory fits and has the right checksums.
    pub(super) valid: bool,
}

/// All references of the layers.
pub(super) struct Layers {
    pub(super) image: Image,
    /// The user's snapshots with their places in the snapshot table.
    pub(super) snapshots: Vec<(usize, Snapshot)>,
    /// Everything that leads to data, in all layers; the pool's members too.
    pub(super) leads: Vec<Leads>,
    /// Entries of the disk that lead nowhere, but have the zero flag.
    pub(super) zero_flagged: u64,
    /// Host clusters of L1 and L2 tables, and who needs them.
    pub(super) tables: BTreeMap<u64, BTreeSet<By>>,
    /// Host clusters of the pool's directory.
    pub(super) directory: BTreeSet<u64>,
    pub(super) pool: Option<Pool>,
}

impl Layers {
    /// Reads all layers.
    #[track_caller]
    pub(super) fn of(image: Image) -> Self {
        let (all, _) = image.snapshots();
        let guarded = |snapshot: &Snapshot| snapshot.name == "dedup-pool" && snapshot.disk_size == (1 << 63) - 512;
        let (pools, snapshots): (Vec<_>, Vec<_>) =
            all.into_iter().enumerate().partition(|(_, snapshot)| guarded(snapshot));
        let mut layers = Self {
            image,
            snapshots,
            leads: Vec::new(),
            zero_flagged: 0,
            tables: BTreeMap::new(),
            directory: BTreeSet::new(),
            pool: None,
        };
        let (l1, entries) = (layers.image.header.l1_table_offset, layers.image.header.l1_size);
        layers.layer(By::Disk, l1, entries, u64::from(entries));
        for n in 0..layers.snapshots.len() {
            let (place, snapshot) = &layers.snapshots[n];
            let (place, l1, entries) = (*place, snapshot.l1_table_offset, snapshot.l1_size);
            layers.layer(By::Snapshot(place), l1, entries, u64::from(entries));
        }
        assert!(pools.len() < 2, "{} pools", pools.len());
        if let Some((_, pool)) = pools.into_iter().next() {
            layers.read_pool(&pool);
        }
        layers
    }

    /// Counts the L1 table, the L2 tables below it, and what the first `counted` of these lead to.
    fn layer(&mut self, by: By, l1: u64, l1_entries: u32, counted: u64) {
        let size = self.image.cluster_size();
        for cluster in l1 / size..(l1 + u64::from(l1_entries) * 8).div_ceil(size) {
            self.tables.entry(cluster).or_default().insert(by);
        }
        for table in self.image.tables(l1, l1_entries) {
            self.tables.entry(table.host / size).or_default().insert(by);
            for (slot, (entry, word)) in table.entries.into_iter().zip(table.words).enumerate() {
                let guest = table.index * self.image.l2_entries() + slot as u64;
                match entry {
                    _ if table.index >= counted => continue,
                    Entry::Unallocated => continue,
                    Entry::Zero(None) => {
                        self.zero_flagged += u64::from(by == By::Disk);
                        continue;
                    }
                    Entry::Zero(_) | Entry::Data { .. } | Entry::Compressed { .. } => {}
                }
                // A zero that keeps its place leads to the same cluster as one without the flag.
                let word = if let Entry::Zero(Some(host)) = entry { host } else { word & !COPIED };
                self.leads.push(Leads { by, guest, word, entry });
            }
        }
    }

    /// Counts what the pool refers to, and reads its directory.
    fn read_pool(&mut self, pool: &Snapshot) {
        let size = self.image.cluster_size();
        let clusters = pool.vm_state_size.div_ceil(size);
        let directory_tables = clusters.div_ceil(size / 8);
        let member_tables = u64::from(pool.l1_size) - directory_tables;
        self.layer(By::Pool, pool.l1_table_offset, pool.l1_size, member_tables);
        let mut bytes = Vec::new();
        for table in self.image.tables(pool.l1_table_offset, pool.l1_size) {
            for word in table.words.iter().filter(|word| table.index >= member_tables && **word != 0) {
                bytes.extend(self.image.read(*word, size.min(self.image.length - word)));
                self.directory.insert(word / size);
            }
        }
        bytes.truncate(pool.vm_state_size as usize);
        let members: Vec<u64> = self.leads.iter().filter(|lead| lead.by == By::Pool).map(|lead| lead.word).collect();
        let records: Vec<&[u8]> = bytes[128..].chunks(40).collect();
        let valid = records.len() == members.len()
            && number(&bytes, 24, 8) == members.len() as u64
            && Sha256::digest(&bytes[128..])[..] == bytes[64..96]
            && Sha256::digest(&bytes[..96])[..] == bytes[96..128];
        let retired = records.iter().map(|record| valid && record[39] & 1 == 1).collect();
        self.pool = Some(Pool { members, retired, valid });
    }

    /// The clusters of the file that an entry leads to.
    pub(super) fn host_clusters(&self, lead: &Leads) -> std::ops::Range<u64> {
        let size = self.image.cluster_size();
        match lead.entry {
            Entry::Compressed { host, length } => host / size..(host + length).div_ceil(size),
            Entry::Data { host, .. } | Entry::Zero(Some(host)) => host / size..host / size + 1,
            Entry::Zero(None) | Entry::Unallocated => 0..0,
        }
    }

    /// For each cluster of the file that holds data: who refers to it, and how often.
    pub(super) fn data(&self) -> BTreeMap<u64, BTreeMap<By, u64>> {
        let mut data: BTreeMap<u64, BTreeMap<By, u64>> = BTreeMap::new();
        for lead in &self.leads {
            for cluster in self.host_clusters(lead) {
                *data.entry(cluster).or_default().entry(lead.by).or_insert(0) += 1;
            }
        }
        data
    }

    /// Clusters with data or with tables other than the pool's.
    pub(super) fn clusters_of_layers(&self) -> u64 {
        let tables = self.tables.values().filter(|by| !by.contains(&By::Pool)).count();
        (tables + self.data().len()) as u64
    }

    /// Clusters that nothing but this snapshot, and perhaps the pool, refers to.
    pub(super) fn clusters_of(&self, snapshot: By) -> u64 {
        let only = |by: BTreeSet<By>| by.contains(&snapshot) && by.iter().all(|by| *by == snapshot || *by == By::Pool);
        let tables = self.tables.values().filter(|by| only((*by).clone())).count();
        let data = self.data().into_values().filter(|by| only(by.keys().copied().collect())).count();
        (tables + data) as u64
    }

    /// What the disk has at each guest cluster that is no hole: the entries that lead somewhere, up to its end.
    pub(super) fn disk(&self) -> impl Iterator<Item = &Leads> {
        let total = self.image.header.size.div_ceil(self.image.cluster_size());
        self.leads.iter().filter(move |lead| lead.by == By::Disk && lead.guest < total)
    }
}

impl Leads {
    /// Whether it reads as zeros whatever lies where it leads.
    pub(super) fn is_flagged_zero(&self) -> bool {
        match self.entry {
            Entry::Zero(_) => true,
            Entry::Data { bitmap, .. } => bitmap >> 32 == 0xffff_ffff,
            Entry::Compressed { .. } | Entry::Unallocated => false,
        }
    }

    /// Whether the bytes are compressed.
    pub(super) fn is_compressed(&self) -> bool {
        matches!(self.entry, Entry::Compressed { .. })
    }
}
