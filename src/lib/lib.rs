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
//! # From a disk to a deduplicated image
//!
//! ```text
//!  Disk::open -> scan -> level -> group -> verify -> Plan -> Layout -> NewImage -> AtomicFile::commit
//!  (disk)        (------------- dedup -------------------)   (----- image -----)   (storage)
//! ```
//!
//! [`convert::convert`] runs all of it. A [`dedup::plan::Plan`] is a value: nothing has been written when it is complete, and
//! writing decides nothing any more. The output has no name until it is whole.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::{cancel::Cancel, convert, disk, progress::Silent, work};
//!
//! let disk = disk::Disk::open(Path::new("disk.raw"), &disk::DiskOptions::default())?;
//! let cancel = Cancel::default();
//! let work = work::Work::new(None, work::DEFAULT_MEMORY, &Silent, &cancel)?;
//! let report = convert::convert(&disk, Path::new("disk.qcow2"), &convert::ConvertOptions::default(), &work)?;
//! println!("{} bytes saved", report.saved_bytes);
//! # Ok::<(), dedup_img::Error>(())
//! ```
//!
//! [`inplace::dedup`] does the same to an image where it lies, with all its snapshots, in an order of writes that loses nothing if
//! it breaks off. [`inplace::gc`] gives back what nothing uses any more, and compacts the file.
//!
//! # Map of the modules
//!
//! | module | holds |
//! |---|---|
//! | [`units`] | guest and host positions, cluster sizes |
//! | [`mod@format`] | the bytes of QCOW2 as values; no I/O |
//! | [`pool`] | the pool's snapshot and its directory |
//! | [`storage`] | positioned I/O, QEMU's locks, files that appear whole, devices written in place |
//! | [`image`] | an open QCOW2, the layout and the metadata of a new one |
//! | [`disk`] | what the guest sees: a raw file or an image with its chain |
//! | [`dedup`] | finding equal clusters, and the plan |
//! | [`compress`] | compressed clusters as QEMU writes them |
//! | [`mod@convert`], [`mod@create`], [`mod@check`] | the operations; `check` also repairs |
//! | [`inplace`] | deduplication, gc and compaction of an image where it lies: the plan, the order of writes |
//! | [`mod@stats`] | what is duplicated, what is saved, what could be |
//! | [`work`], [`progress`], [`cancel`] | what an operation is given |
//!
//! # Words
//!
//! *Cluster*, *L1*, *L2*, *refcount block*, *COPIED*: as in the QCOW2 specification. *Stored*: a data cluster in the file.
//! *Duplicate*: a guest cluster whose content another one, its *keeper*, has stored. *Sharer*: a guest cluster that uses a
//! stored cluster, the keeper included. *Member*: a cluster that the pool references. *Retired*: a member that takes no more
//! sharers.
//!
//! The library never prints, never exits and never reads the environment. No input makes it panic.

pub mod cancel;
pub mod check;
pub mod compress;
pub mod convert;
pub mod create;
pub mod dedup;
pub mod digest;
pub mod disk;
pub mod error;
pub mod format;
pub mod image;
pub mod inplace;
pub mod pool;
pub mod progress;
pub mod stats;
pub mod storage;
mod survey;
pub mod units;
pub mod work;

pub use error::{Error, ErrorKind, Result};
