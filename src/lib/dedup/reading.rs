//! One source, one moment (I10): what is read again is held against what was read first.
//!
//! Equality is decided in one pass over a disk, and a cluster that others share is copied in a later one. Where it changes between
//! the two its sharers, which nobody wrote to, would get its new content. Times tell of a file that it was written, of a block
//! device nothing does: so the bytes have to.

use std::iter::Peekable;

use crate::dedup::larger::{Larger, of_parts};
use crate::dedup::peek;
use crate::dedup::scan::{Other, scan};
use crate::disk::Disk;
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, OrInternal, Result};
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sequence, Spill, Words};
use crate::units::ClusterBits;
use crate::work::Work;

/// The records of all clusters that were not zero when they were read first, in their order.
pub(crate) struct FirstReading {
    records: Sequence<ContentAt>,
    grain: ClusterBits,
}

/// Reads a disk once more where its files' times do not tell whether they were written, and holds all of it against the first reading.
pub(crate) struct Again<'a> {
    pub(crate) disk: &'a Disk,
    pub(crate) other: Option<Other<'a>>,
    pub(crate) spill: &'a Spill,
    pub(crate) work: &'a Work,
}

impl Again<'_> {
    /// The first reading of a disk that will be read once only.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn first(&self) -> Result<FirstReading> {
        let Self { disk, other, spill, work } = *self;
        let scan = work.run(|| scan(disk, other, ClusterBits::GRAIN, spill, &work.silent()))?;
        FirstReading::new(scan.records, scan.grain)
    }

    /// Fails where the disk does not read as it did in the `first` reading.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`]; those of reading.
    pub(crate) fn ensure_same(&self, first: &FirstReading) -> Result<()> {
        let Self { disk, other, spill, work } = *self;
        let now = work.run(|| scan(disk, other, first.grain, spill, &work.silent()))?;
        let (mut before, mut now) = (first.records.iter(), now.records.iter());
        loop {
            match (before.next().transpose()?, now.next().transpose()?) {
                (None, None) => return Ok(()),
                (before, now) if before == now => {}
                (before, now) => {
                    let cluster = before
                        .into_iter()
                        .chain(now)
                        .map(ContentAt::cluster)
                        .min()
                        .or_internal("nothing differs from nothing")?;
                    return Err(disk.changed_at(cluster << first.grain.bits()));
                }
            }
        }
    }
}

impl FirstReading {
    /// `records` are those of a scan with clusters of `grain`, ascending.
    ///
    /// # Errors
    /// Those of the temporary file: what would take much memory goes there until it is asked for.
    pub(crate) fn new(mut records: Sequence<ContentAt>, grain: ClusterBits) -> Result<Self> {
        records.shelve()?;
        Ok(Self { records, grain })
    }

    /// What clusters of `bits` must be when they are read again.
    #[must_use]
    pub(crate) fn expected(&self, bits: ClusterBits) -> Expected<'_> {
        Expected { records: Larger::new(self.records.iter(), self.grain, bits).peekable() }
    }

    /// What compares clusters with their records.
    #[must_use]
    pub(crate) fn hold(&self) -> Hold {
        Hold { grain: self.grain, parts: Vec::new() }
    }
}

/// The records of clusters, asked for in their order.
pub(crate) struct Expected<'a> {
    records: Peekable<Larger<Words<'a, ContentAt>>>,
}

impl Expected<'_> {
    /// The record of `cluster`, which was not zero and does not come before the one asked for last.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub(crate) fn of(&mut self, cluster: u64) -> Result<ContentAt> {
        while let Some(record) = peek(&mut self.records)? {
            if record.cluster() == cluster {
                return Ok(record);
            }
            if record.cluster() > cluster {
                break;
            }
            self.records.next();
        }
        Err(Error::internal(format_args!("cluster {cluster} is read again and was not read before")))
    }
}

/// Compares clusters that are read again with the records of the first reading. Each thread has its own.
pub(crate) struct Hold {
    grain: ClusterBits,
    parts: Vec<ContentAt>,
}

impl Hold {
    /// Whether `content` is what `record` was made of.
    pub(crate) fn is_same(&mut self, content: &[u8], record: ContentAt) -> bool {
        of_parts(content, self.grain, record.cluster(), &mut self.parts) == record
    }
}
