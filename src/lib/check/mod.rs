//! Checking an image: everything that refers to a cluster is counted and compared with what the image says.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::storage::LockMode;
//! use dedup_img::{CheckOptions, Work, WorkOptions, check, finding::Finding, open_image};
//!
//! let work = Work::new(WorkOptions::default())?;
//! let (storage, _) = open_image(Path::new("disk.qcow2"), None, LockMode::Read)?;
//! let mut tell = |finding: &Finding| println!("{}", finding.kind);
//! let report = check(&storage, CheckOptions { data: true }, &work, &mut tell)?;
//! println!("{} corruptions, {} leaks", report.corruptions, report.leaks);
//! # Ok::<(), dedup_img::Error>(())
//! ```
//!
//! # How it goes
//!
//! ```text
//!  snapshots -> tables -> states -> walk -> bitmaps, refcount blocks -> compare -> COPIED of L2 tables -> overlaps, pool
//! ```
//!
//! The rules and their order are those of QEMU 10.0 (`qcow2_check_refcounts`), so that both find the same numbers; what QEMU
//! does not look at comes after. Findings are data: they go to the caller one by one, and their sums are in the [`Report`].

mod bitmaps;
mod compare;
pub(crate) mod counts;
pub mod finding;
pub(crate) mod overlap;
pub(crate) mod pool;
mod remarks;
pub(crate) mod snapshots;
pub(crate) mod states;
pub(crate) mod tables;
mod walk;

use serde::Serialize;

use crate::error::{Error, ErrorKind, IoContext, OrInternal, Result};
use crate::format::header::{Header, extension};
use crate::format::snapshot::Snapshot;
use crate::format::u64_at;
use crate::image::read_header;
use crate::image::refcounts::Refcounts;
use crate::progress::Stage;
use crate::storage::{Storage, read_exact};
use crate::units::{GuestOffset, HostOffset};
use crate::work::Work;

use counts::{Counts, Refused};
use finding::{Finding, Kind, Repairable, Severity, Use};
use overlap::{Claim, Metadata};
use states::States;
use tables::Tables;

/// The sums of a check, with qemu-img's names and meanings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What could not be checked.
    pub check_errors: u64,
    /// Findings that endanger data.
    pub corruptions: u64,
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Damage that `qemu-img check` does not look for.
    pub findings_beyond: u64,
    /// Findings that endanger nothing.
    pub benign: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those that have a place in the file.
    pub allocated_clusters: u64,
    /// Those that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// The end of the last cluster in use, in bytes.
    pub image_end_offset: u64,
}

/// What to check beside the structure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Read every pooled cluster and compare it with its SHA-256.
    pub data: bool,
}

/// A check in progress.
struct Checker<'a> {
    options: CheckOptions,
    storage: &'a dyn Storage,
    work: &'a Work,
    sink: &'a mut (dyn FnMut(&Finding) + Send),
    header: Header,
    file_len: u64,
    counts: Counts,
    /// Metadata other than L2 tables, for finding overlaps.
    claims: Vec<Claim>,
    report: Report,
    /// Bytes of L1 tables so far.
    l1_bytes: u64,
    /// Bytes of the snapshot table.
    table_bytes: u64,
    /// The virtual size as stored.
    raw_size: u64,
    repair: Repairable,
    hopeless: Option<Kind>,
    stale: Option<pool::NewDirectory>,
    known: Option<pool::KnownPool>,
    misplaced: Vec<u64>,
    recording: Option<String>,
    phase: Stage,
    how: How,
    doubt: Option<Kind>,
    long_entries: bool,
}

/// How a repair looks at an image that it has not mended yet.
#[derive(Default)]
pub(crate) struct How {
    /// Read a snapshot table in which too much extra data is wrong, and say so.
    pub(crate) any_extra: bool,
    /// See the zero clusters whose places are no clusters of theirs, as this says, without them.
    pub(crate) without: Option<Metadata>,
    /// See the snapshot table in this place, as an image that has it there.
    pub(crate) snapshots_at: Option<HostOffset>,
}

/// Checks the image in `storage`; every finding goes to `sink`, in an order that does not depend on the number of threads.
///
/// # Errors
/// Fails where the image cannot be opened or read at all. A damaged image that could be read is no error.
pub fn check(
    storage: &dyn Storage,
    options: CheckOptions,
    work: &Work,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Report> {
    work.progress.start();
    Ok(inspect(storage, options, work, ALONE, sink)?.report)
}

/// QEMU: a file of more clusters is not checked ("File too large").
const MAX_CLUSTERS: u64 = (1 << 31) - 1;

/// The phase of an inspection that is all there is of an operation, or of a section of it.
pub(crate) const ALONE: Stage = Stage("checking", 0, 100);

/// What a check knows at its end.
pub(crate) struct Inspection {
    pub(crate) report: Report,
    pub(crate) header: Header,
    pub(crate) file_len: u64,
    pub(crate) counts: Counts,
    pub(crate) snapshots: Vec<Snapshot>,
    /// Metadata other than L2 tables.
    pub(crate) claims: Vec<Claim>,
    pub(crate) tables: Tables,
    /// The pool, if there is one.
    pub(crate) pool: Option<pool::KnownPool>,
    /// What a repair would have to do.
    pub(crate) repair: Repairable,
    /// The first finding that cannot be mended.
    pub(crate) hopeless: Option<Kind>,
    /// A new directory of the pool, where the old one is stale.
    pub(crate) stale: Option<pool::NewDirectory>,
    /// Where the entries of misplaced preallocated clusters are in the file.
    pub(crate) misplaced: Vec<u64>,
    /// The first finding that says that a table may lead to the wrong place.
    pub(crate) doubt: Option<Kind>,
    /// Whether an entry of the snapshot table is longer than QEMU accepts.
    pub(crate) long_entries: bool,
    /// Whether the image has its snapshot table elsewhere.
    pub(crate) moved_snapshots: bool,
    /// A persistent bitmap that records writes to the disk.
    pub(crate) recording: Option<String>,
}

/// Checks the image in `storage` and returns all that came to be known.
pub(crate) fn inspect(
    storage: &dyn Storage,
    options: CheckOptions,
    work: &Work,
    phase: Stage,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Inspection> {
    inspect_as(storage, options, work, phase, How::default(), sink)
}

pub(crate) fn inspect_as(
    storage: &dyn Storage,
    options: CheckOptions,
    work: &Work,
    phase: Stage,
    how: How,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Inspection> {
    let mut header = read_header(storage)?;
    header.snapshots_offset = how.snapshots_at.unwrap_or(header.snapshots_offset);
    let mut raw_size = [0; 8];
    read_exact(storage, &mut raw_size, 24, "header")?;
    let file_len = storage.len().at("Could not get its length")?;
    if header.cluster_bits.clusters(file_len) > MAX_CLUSTERS {
        let message = "the file is too large to be checked (more than 2^31 - 1 clusters); convert it with larger ones";
        return Err(Error::new(ErrorKind::Limit, message));
    }
    let counts = Counts::new(header.cluster_bits, file_len, header.refcount_bits.max())?;
    let checker = Checker {
        storage,
        work,
        sink,
        file_len,
        counts,
        claims: Vec::new(),
        report: Report::default(),
        l1_bytes: 0,
        table_bytes: 0,
        raw_size: u64::from_be_bytes(raw_size),
        repair: Repairable::Nothing,
        hopeless: None,
        stale: None,
        known: None,
        misplaced: Vec::new(),
        recording: None,
        phase,
        how,
        doubt: None,
        long_entries: false,
        options,
        header,
    };
    work.run(|| checker.run())
}

impl Checker<'_> {
    fn run(mut self) -> Result<Inspection> {
        let bits = self.header.cluster_bits;
        self.report.total_clusters = bits.clusters(self.header.size);
        let snapshots = self.snapshot_table()?;
        self.claim(0, bits.bytes(), Use::Header, None);
        let tables = self.tables(&snapshots)?;
        let refcounts = Refcounts::load(self.storage, &self.header)?;
        let states = States::load(&refcounts, bits.clusters(self.file_len) + 1)?;
        self.work.progress.begin(self.phase, tables.references.len() as u64 * bits.bytes());
        let allocation = self.walk(&tables, &states)?;
        self.report.allocated_clusters = allocation.allocated;
        self.report.fragmented_clusters = allocation.fragmented;
        self.report.compressed_clusters = allocation.compressed;
        self.claim_snapshot_table();
        let table_bytes = u64::from(self.header.refcount_table_clusters) * bits.bytes();
        self.claim(self.header.refcount_table_offset.0, table_bytes, Use::RefcountTable, None);
        if let Some(luks) = self.header.extension(extension::LUKS) {
            let what = "the LUKS extension was not held against its length";
            let (offset, length) = (u64_at(luks, 0).or_internal(what)?, u64_at(luks, 8).or_internal(what)?);
            self.claim(offset, length, Use::LuksHeader, None);
        }
        self.bitmaps()?;
        self.refcount_blocks(&refcounts);
        self.compare(&refcounts, &states)?;
        self.copied_l2(&tables, &states);
        self.overlaps(&tables);
        self.pool(&snapshots, &tables)?;
        self.remarks(&snapshots);
        Ok(Inspection {
            report: self.report,
            header: self.header,
            file_len: self.file_len,
            counts: self.counts,
            snapshots,
            claims: self.claims,
            tables,
            pool: self.known,
            repair: self.repair,
            hopeless: self.hopeless,
            stale: self.stale,
            misplaced: self.misplaced,
            doubt: self.doubt,
            long_entries: self.long_entries,
            moved_snapshots: self.how.snapshots_at.is_some(),
            recording: self.recording,
        })
    }

    /// Counts a reference to metadata.
    fn claim(&mut self, offset: u64, size: u64, to: Use, at: Option<GuestOffset>) {
        match self.counts.add(offset, size, 1, false) {
            Ok(()) => {}
            Err(Refused::PastEnd) => {
                self.say(Severity::Corruption, Kind::PastEnd { to, offset, size, at });
                return;
            }
            Err(Refused::Overflow { cluster, lost }) => {
                let kind = Kind::Overflow(HostOffset(cluster << self.header.cluster_bits.bits()));
                self.emit(&Finding { severity: Severity::Corruption, kind, times: lost });
            }
        }
        if size > 0 && !matches!(to, Use::L2(_)) {
            let bits = self.header.cluster_bits.bits();
            self.claims.push(Claim { first: offset >> bits, last: (offset + size - 1) >> bits, to });
        }
    }

    fn say(&mut self, severity: Severity, kind: Kind) {
        self.emit(&Finding { severity, kind, times: 1 });
    }

    fn emit(&mut self, finding: &Finding) {
        let sum = match finding.severity {
            Severity::Benign => &mut self.report.benign,
            _ if finding.kind.is_beyond_qemu() => &mut self.report.findings_beyond,
            Severity::Leak => &mut self.report.leaks,
            Severity::Corruption => &mut self.report.corruptions,
            Severity::CheckError => &mut self.report.check_errors,
        };
        *sum = sum.saturating_add(finding.times);
        let repair = finding.kind.repair();
        if repair == Repairable::No && self.hopeless.is_none() {
            self.hopeless = Some(finding.kind.clone());
        }
        if self.doubt.is_none() && finding.kind.is_doubt() {
            self.doubt = Some(finding.kind.clone());
        }
        self.repair = self.repair.max(repair);
        (self.sink)(finding);
    }
}
