//! Writing a new pool beside the old one.

use std::ops::Range;

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;
use sha2::{Digest, Sha256};

use crate::check::counts::Counts;
use crate::dedup::reading::Expected;
use crate::dedup::verify::Clusters;
use crate::digest::{Sha, sha256};
use crate::edit::allocate::Allocator;
use crate::edit::change::{Change, Members as After};
use crate::edit::key::{Key, named};
use crate::edit::members::NewMember;
use crate::error::{Error, ErrorKind, OrInternal, Result};
use crate::format::header::MAX_L1_BYTES;
use crate::format::snapshot::Snapshot;
use crate::format::table::{L2Entry, l1_entry};
use crate::pool;
use crate::pool::directory::{DirectoryHeader, HEADER_LENGTH, Record};
use crate::sort::content::ContentAt;
use crate::storage::sparse::write_sparse;
use crate::storage::{Storage, write};
use crate::survey::Ground;
use crate::survey::units::Content;
use crate::units::{ClusterBits, GuestOffset, HostCluster, to_usize};

/// Members that are named and written at once.
const BATCH: usize = 16384;
/// Members that one worker names.
const SHARE: usize = 256;
/// Bytes that one worker reads at once.
const READ: usize = 256 << 10;
/// Bytes that are collected before they are written.
const RUN: usize = 4 << 20;

/// The places of a new pool and of the snapshot table that names it.
pub(crate) struct Places {
    /// The L2 tables of the members, then those of the directory.
    tables: Vec<HostCluster>,
    /// How many of them are the members'.
    member_tables: u64,
    /// The directory's clusters.
    directory: Vec<HostCluster>,
    l1: HostCluster,
    members: u64,
}

impl Places {
    /// Places for a pool of `members` members.
    pub(crate) fn new(members: u64, bits: ClusterBits, free: &mut Allocator) -> Result<Self> {
        let member_tables = members.div_ceil(bits.entries());
        let directory = bits.clusters(DirectoryHeader::directory_bytes(members));
        let tables = member_tables + directory.div_ceil(bits.entries());
        if tables * 8 > MAX_L1_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the pool needs a larger L1 table than QEMU accepts"));
        }
        Ok(Self {
            l1: free.run(bits.clusters(tables * 8)),
            tables: (0..tables).map(|_| free.one()).collect(),
            member_tables,
            directory: (0..directory).map(|_| free.one()).collect(),
            members,
        })
    }

    /// What is written of its clusters, in bytes of the file.
    pub(crate) fn writes(&self, bits: ClusterBits) -> Vec<Range<u64>> {
        let (members, directory) = self.tables.split_at(to_usize(self.member_tables));
        let l1: Vec<HostCluster> = (self.l1.0..self.l1.0 + bits.clusters(self.l1_bytes())).map(HostCluster).collect();
        let parts = [
            (l1.as_slice(), self.l1_bytes()),
            (members, self.members * 8),
            (directory, self.directory.len() as u64 * 8),
            (self.directory.as_slice(), DirectoryHeader::directory_bytes(self.members)),
        ];
        let mut writes = Vec::new();
        for (clusters, mut left) in parts {
            for cluster in clusters {
                let start = cluster.offset(bits).0;
                let used = left.min(bits.bytes());
                writes.push(start..start + used);
                left -= used;
            }
        }
        writes
    }

    fn l1_bytes(&self) -> u64 {
        self.tables.len() as u64 * 8
    }

    /// The pool's entry in the snapshot table.
    pub(crate) fn snapshot(&self, id: u64, bits: ClusterBits) -> Result<Snapshot> {
        let entries = u32::try_from(self.tables.len()).ok().or_internal("an L1 table that is too long")?;
        Ok(pool::snapshot(id, self.l1.offset(bits), entries, DirectoryHeader::directory_bytes(self.members)))
    }

    /// Writes the pool that `change` leads to, whose clusters will have the references `counts`. Nothing refers to it yet.
    pub(crate) fn write(&self, change: &Change, counts: &Counts, storage: &dyn Storage) -> Result<()> {
        let limit = change.ground.inspection.header.refcount_bits.sharer_limit().unwrap_or(0);
        let bits = change.ground.inspection.header.cluster_bits;
        let words: Vec<u8> =
            self.tables.iter().flat_map(|table| l1_entry(table.offset(bits), false).to_be_bytes()).collect();
        write(storage, &words, self.l1.offset(bits).0)?;

        let (member_tables, directory_tables) = self.tables.split_at(to_usize(self.member_tables));
        let mut entries = Scattered::new(storage, bits, member_tables);
        let mut directory = Scattered::new(storage, bits, &self.directory);
        directory.append(&[0; HEADER_LENGTH])?;
        let mut digest = Sha256::new();
        let content = change.ground.content(storage);
        let after = change.members().or_internal("a pool that goes is written anew")?;
        let mut members = Members::new(change, after);
        let key = after.first.as_ref().map(|(_, key)| *key);
        loop {
            let batch = members.by_ref().take(BATCH).collect::<Result<Vec<Member>>>()?;
            if batch.is_empty() {
                break;
            }
            for (member, name) in batch.iter().zip(names(&content, &batch, key)?) {
                let sharers = change.ground.units.hosts(member.unit).map(|host| counts.get(host)).max().unwrap_or(0);
                let record = Record { sha256: name, guest: member.guest, retired: sharers > limit }.encode();
                entries.append(&change.ground.units.entry(member.unit).encode(bits).to_be_bytes())?;
                digest.update(record);
                directory.append(&record)?;
            }
        }
        entries.finish()?;
        let mut entries = Scattered::new(storage, bits, directory_tables);
        for cluster in &self.directory {
            let entry = L2Entry::Data { host: cluster.offset(bits), copied: false };
            entries.append(&entry.encode(bits).to_be_bytes())?;
        }
        entries.finish()?;
        let header = DirectoryHeader {
            cluster_bits: bits,
            members: self.members,
            member_l1_entries: u32::try_from(self.member_tables).ok().or_internal("an L1 table that is too long")?,
            sharer_limit: limit,
            records_sha256: digest.finalize().into(),
        };
        directory.finish()?;
        // The header names the records, so it comes last.
        let first = self.directory.first().or_internal("a directory without clusters")?;
        write(storage, &header.encode(), first.offset(bits).0)
    }
}

/// A member of the pool that is written.
struct Member {
    unit: u64,
    guest: GuestOffset,
    /// Its name, where that is known already.
    name: Option<Sha>,
    /// What it was when it was read first, if it was.
    expected: Option<ContentAt>,
}

/// The members that the pool will have, in the order of the file.
struct Members<'a> {
    change: &'a Change,
    units: Box<dyn Iterator<Item = u64> + 'a>,
    /// What joins, from the front and from the first compressed one: in the order of the file they are mixed.
    joining: [Box<dyn Iterator<Item = Result<NewMember>> + 'a>; 2],
    /// What was read of them before.
    expected: [Option<Expected<'a>>; 2],
}

impl<'a> Members<'a> {
    fn new(change: &'a Change, after: &'a After) -> Self {
        let compressed = change.ground.units.compressed().start;
        let bits = change.ground.inspection.header.cluster_bits;
        let packed = change.joining().filter(move |new| new.as_ref().map_or(true, |new| new.unit >= compressed));
        Self {
            change,
            units: Box::new(change.ground.units.in_file_order(&after.after)),
            joining: [Box::new(change.joining()), Box::new(packed)],
            expected: [(); 2].map(|()| after.first.as_ref().map(|(first, _)| first.expected(bits))),
        }
    }

    fn try_next(&mut self) -> Result<Option<Member>> {
        let Some(unit) = self.units.next() else { return Ok(None) };
        let Ground { units, inspection, .. } = &self.change.ground;
        if let Some(record) = self.change.ground.record(unit) {
            return Ok(Some(Member { unit, guest: record.guest, name: Some(record.sha256), expected: None }));
        }
        let ([plain, packed], [expected_plain, expected_packed]) = (&mut self.joining, &mut self.expected);
        let (joining, expected) = match units.plain().contains(&unit) {
            true => (plain, expected_plain),
            false => (packed, expected_packed),
        };
        let new = joining.next().or_internal("a member of the pool has no name and does not join it")??;
        if new.unit != unit {
            return Err(Error::internal("the members of the pool and those that join it are not in one order"));
        }
        let expected = expected.as_mut().map(|expected| expected.of(unit)).transpose()?;
        let guest = new.guest.offset(inspection.header.cluster_bits);
        Ok(Some(Member { unit, guest, name: None, expected }))
    }
}

impl Iterator for Members<'_> {
    type Item = Result<Member>;

    fn next(&mut self) -> Option<Self::Item> {
        self.try_next().transpose()
    }
}

/// The names of `members`; those that are not known yet are read, neighbours together. What was compared before is held against
/// what it was then, by `key`.
fn names(content: &Content<'_>, members: &[Member], key: Option<Key>) -> Result<Vec<Sha>> {
    let bits = content.cluster_bits();
    let most = (READ >> bits.bits()).max(1);
    let read = |share: &[Member]| {
        let mut reader = content.in_order();
        let mut buffer = vec![0; bits.len() * most.min(share.len())];
        let mut names = Vec::with_capacity(share.len());
        let mut parts = Vec::new();
        let runs = share.chunk_by(|a, b| a.name.is_none() && b.name.is_none() && a.unit + 1 == b.unit);
        for run in runs.flat_map(|run| run.chunks(most)) {
            match run {
                [Member { name: Some(name), .. }] => names.push(*name),
                [first, ..] => {
                    let clusters =
                        buffer.get_mut(..run.len() << bits.bits()).or_internal("a run of members is too long")?;
                    reader.read(first.unit, clusters)?;
                    for (member, cluster) in run.iter().zip(clusters.chunks_exact(bits.len())) {
                        let name = sha256(cluster);
                        let now = match key {
                            None => None,
                            Some(Key::Sha256) => Some(named(&name, member.unit)),
                            Some(key) => Some(key.record(cluster, member.unit, &mut parts)),
                        };
                        if now != member.expected {
                            return Err(changed(content, member.unit));
                        }
                        names.push(name);
                    }
                }
                [] => {}
            }
        }
        Ok(names)
    };
    let shares: Vec<Result<Vec<Sha>>> = members.par_chunks(SHARE).map(read).collect();
    let mut names = Vec::with_capacity(members.len());
    for share in shares {
        names.append(&mut share?);
    }
    Ok(names)
}

fn changed(content: &Content<'_>, unit: u64) -> Error {
    let place = content.units.bytes(unit).start;
    Error::new(
        ErrorKind::Changed,
        format!(
            "the cluster at {place:#x} changed while the image was worked on; another program writes to it and ignores its locks"
        ),
    )
}

/// Writes bytes to clusters that need not lie together, from the first to the last.
struct Scattered<'a> {
    storage: &'a dyn Storage,
    bits: ClusterBits,
    places: &'a [HostCluster],
    buffer: Vec<u8>,
}

impl<'a> Scattered<'a> {
    fn new(storage: &'a dyn Storage, bits: ClusterBits, places: &'a [HostCluster]) -> Self {
        Self { storage, bits, places, buffer: Vec::new() }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= RUN { self.write() } else { Ok(()) }
    }

    /// Fills the last cluster with zeros and writes everything.
    fn finish(&mut self) -> Result<()> {
        self.buffer.resize(self.buffer.len().next_multiple_of(self.bits.len()), 0);
        self.write()
    }

    /// Writes the whole clusters that were collected; those that lie together go in one piece.
    fn write(&mut self) -> Result<()> {
        let mut whole = self.buffer.len() >> self.bits.bits();
        let mut from = 0;
        while let Some(first) = self.places.first().filter(|_| whole > 0) {
            let run =
                self.places.iter().zip(first.0..).take(whole).take_while(|(place, next)| place.0 == *next).count();
            let len = run << self.bits.bits();
            let piece =
                self.buffer.get(from..from + len).or_internal("clusters of the pool that were not collected")?;
            write_sparse(self.storage, piece, first.offset(self.bits).0)?;
            from += len;
            whole -= run;
            self.places = self.places.split_at(run).1;
        }
        if whole > 0 {
            return Err(Error::internal("the pool has more content than places"));
        }
        self.buffer.drain(..from);
        Ok(())
    }
}
