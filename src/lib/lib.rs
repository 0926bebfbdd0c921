//! Deduplicated QCOW2 images that stock QEMU reads, writes and checks clean.
//!
//! A deduplicated image is an *ordinary* QCOW2 version 3 image in which several guest clusters with equal bytes point to one
//! host cluster; its refcount says how many. An internal snapshot, the *pool*, holds one more reference to every shared
//! cluster, so that QEMU never writes one in place, and keeps the clusters' fingerprints as its "VM state":
//!
//! ```text
//!  guest clusters   | A | A | B | . | A |        active L2 entries
//!                     |   |   |       |
//!                     +---+---|-------+---> host 5   refcount 4 (3 sharers + the pool)   COPIED=0
//!                             +-----------> host 6   refcount 1                          COPIED=1
//!                     pool[0] ------------> host 5
//! ```
//!
//! # Lifecycle
//!
//! ```text
//!  Disk::open ---+--> Reader                      the content, in ranges
//!                +--> convert, to_raw             a new file: temporary, then whole under its name
//!                +--> convert_into ---+           an image that exists
//!                                     v
//!  open_image ---+--> DedupPlan, GcPlan -> apply  batches of writes, each safe to break off in
//!                +--> check, repair               findings; what can be mended is
//!                +--> Sharers                     who shares what
//! ```
//!
//! Opening takes QEMU's locks, and dropping what was opened gives them back. Planning only reads; a plan is a value, to be
//! shown, applied or dropped. A new file has no name until it is whole.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::{ConvertOptions, Disk, DiskOptions, Work, WorkOptions, convert};
//!
//! let disk = Disk::open(Path::new("disk.raw"), &DiskOptions::default())?;
//! let work = Work::new(WorkOptions::default())?;
//! let report = convert(&disk, Path::new("disk.qcow2"), &ConvertOptions::default(), &work)?;
//! println!("{} bytes saved", report.saved_bytes);
//! # Ok::<(), dedup_img::Error>(())
//! ```
//!
//! The package's `examples` directory has whole programs: `quickstart`, `read`, `sharing` (what is shared in an image),
//! `convert_memory`, `check_json` and `dedup_progress`.
//!
//! # Map
//!
//! What does something, and what it is given and gives, has its name here, at the root; modules hold families of types.
//!
//! | name | for |
//! |---|---|
//! | [`Disk`], [`Reader`], [`DiskOptions`] | opening and reading what a guest sees: a raw file, or an image with its chain of backing files |
//! | [`convert()`], [`create()`], [`to_raw`], [`convert_into`] | new images, raw files, and a disk written into an image that exists |
//! | [`dedup()`], [`gc`], [`DedupPlan`], [`GcPlan`] | deduplication, gc and compaction of an image where it lies |
//! | [`check()`], [`repair`], [`finding`] | checking and repairing |
//! | [`stats()`](stats::stats), [`mod@stats`], [`Sharers`] | what is duplicated, what is saved, what could be; which clusters share one |
//! | [`Work`], [`Progress`], [`Cancel`] | what an operation is given: threads and memory, whom to tell, a way to stop |
//! | [`Qcow2`], [`Snapshot`], [`Traits`], [`Pin`], [`units`] | the words of the format: header fields, snapshots, records, sizes, positions |
//! | [`storage`] | the file below an image, or memory, and QEMU's locks |
//! | [`name`] | names out of images, for people and for shells |
//! | [`notice`] | what there is to know about a target beside the result |
//!
//! # What always holds
//!
//! Documentation and tests name these promises by their numbers.
//!
//! | | promise |
//! |---|---|
//! | I1 | *Content.* Nothing that works in place changes one byte that a guest or a snapshot can read. |
//! | I2 | *Clean.* After every operation, and after whatever stock QEMU then writes, discards, snapshots and resizes, `qemu-img check` ends with 0. |
//! | I3 | *Crash.* The power may fail at any write or flush: every guest byte still reads right, and a repair (ours or QEMU's) ends clean. |
//! | I4 | *Bytes decide.* Two clusters are shared only after their bytes were compared. A fingerprint finds candidates. |
//! | I5 | *Same bytes.* The same input and options give the same file, with any number of threads. |
//! | I6 | *Never in use.* What QEMU has open is not written, and QEMU does not open what is worked on. |
//! | I7 | *No surprise.* What fails or is stopped leaves an existing target as it was; where its name cannot be replaced this is decided, and told as a [`notice`], before the work. What is not supported is refused by name before anything is written. |
//! | I8 | *Hostile input.* No file makes the library panic, hang, read outside of the image, open what the caller did not allow, or take memory out of proportion. |
//! | I9 | *Bounded.* Tables take no more than the memory that is given for them. |
//! | I10 | *One source, one moment.* What is written is what was compared: what is read again is held against the first reading, and a difference is an error. |
//! | I11 | *Nothing silent.* What cannot happen is an [`ErrorKind::Internal`] that says where, never a default value or an entry left out. |
//! | I12 | *No wider.* A target that is replaced keeps owner, group, permissions, access control list, extended attributes and flags. What cannot be kept is told, and nobody gets more access. |
//!
//! # Words
//!
//! *Cluster*, *L1*, *L2*, *refcount block*, *COPIED*: as in the QCOW2 specification. *Stored*: a data cluster in the file.
//! *Duplicate*: a guest cluster whose content another one, its *keeper*, has stored. *Sharer*: a guest cluster that uses a
//! stored cluster, the keeper included. *Member*: a cluster that the pool references. *Retired*: a member that takes no more
//! sharers.
//!
//! # Errors
//!
//! There is one type, [`Error`], which is data: an [`ErrorKind`], what was being done to which file and where in it ([`Doing`]), a
//! reason, the operating system's error, and what can be done about it ([`Advice`]). It prints as a sentence, without the name of
//! any option or command; [`Error::worded`] makes the same sentence with a program's own words for each advice. An image that is
//! damaged but can be read is no error of [`check()`], whose findings are data. The library never prints or logs, never exits
//! and never reads the environment. No input makes it panic.
//!
//! # Threads, memory, cancellation
//!
//! A [`Work`] has its own worker threads; operations wait for them. The same input gives the same bytes for any number of
//! threads. Tables that outgrow the memory which it allows go to unnamed temporary files. [`Cancel`] is polled once per
//! batch: an operation that was asked to stop fails with [`ErrorKind::Cancelled`] and leaves no new file, and of an image that
//! it works on in place every cluster as it was or as it should be (see "Order of writes");
//! [`Error::left`] says which.
//!
//! # What may be open in QEMU
//!
//! Nothing that is written: [`storage::LockMode`] and [`Disk::open`] take the byte locks that QEMU takes, so that each
//! side refuses what the other has open. An image that a guest is using can be looked at with `ReadShared` or
//! [`DiskOptions::force_share`]; what is read is then true of no one moment. Whoever ignores the locks (`cp`, `dd`) is not
//! kept away. A [`storage::Storage`] of your own is yours alone: the library takes no locks for it.
//!
//! # Stability
//!
//! Versions are semantic ones. Before 1.0 a minor version may break what compiles, and the changelog says so; a patch does not.
//!
//! * Promised: what this documentation shows, what each [`ErrorKind`] means, what each figure of a report means. The words of
//!   messages are not.
//! * On disk: the images of earlier versions stay readable, whatever the version; they are QCOW2, for any program. Keys in JSON
//!   are the program's contract, and what `serde` makes of a report is part of it.
//! * Reports, findings and error kinds are `#[non_exhaustive]` and grow with patches. Options are not, for then they could not be
//!   written as literals: give the fields that you mean and `..Default::default()`. They grow with minor versions, and what is
//!   written so goes on to compile.
//! * Tests and benchmarks of this package reach further, into a hidden module: that is no part of the API.
//!
//! Rust 1.88; a newer one comes with a minor version. Linux. The default feature `cli` is the program: leave it out
//! (`default-features = false`) where only the library is wanted, and its dependencies are left out too.
//!
#![doc = include_str!("edit/order.md")]

mod build;
mod cancel;
mod check;
mod codec;
mod convert;
mod create;
mod dedup;
mod digest;
mod disk;
mod edit;
mod error;
mod format;
mod image;
mod inplace;
pub mod name;
pub mod notice;
mod pool;
mod progress;
mod sharing;
#[expect(missing_debug_implementations, reason = "its types are public for the tests of this package")]
mod sort;
pub mod stats;
pub mod storage;
mod survey;
pub mod units;
#[doc(hidden)]
pub mod unstable;
mod work;

pub use cancel::Cancel;
pub use check::{CheckOptions, Report as CheckReport, check, finding};
pub use convert::{
    ClusterSize, ConvertOptions, ConvertReport, IntoOptions, RawOptions, RawReport, Sharing, SizeChoice, convert,
    convert_into, to_raw,
};
pub use create::{Backing, CreateOptions, Traits, create};
pub use disk::{BackingRule, Disk, DiskOptions, Format, Reader, Unreadable, open_image};
pub use error::{Advice, Doing, Error, ErrorKind, Left, Less, Result, Table, Words};
pub use image::{CompressionLevel, CompressionType, Qcow2, RefcountBits, Snapshot, SnapshotName};
pub use inplace::{
    DedupOptions, DedupPlan, DedupReport, GcOptions, GcPlan, GcReport, OverwriteReport, Refusal, Repair, Repaired,
    Share, dedup, gc, repair,
};
pub use pool::{NAME as POOL_NAME, Pin, Record};
pub use progress::{Phase, Progress, Silent};
pub use sharing::{Sharer, Sharers};
pub use stats::stats;
pub use work::{DEFAULT_MEMORY, MIN_MEMORY, Scratch, Work, WorkOptions};
