//! What is worth knowing of an image although nothing in it is wrong.

use crate::check::Checker;
use crate::check::finding::{Kind, Remark, Severity};
use crate::format::header::{autoclear, extension, incompatible};
use crate::format::snapshot::Snapshot;

impl Checker<'_> {
    /// Says what other tools would do to this image.
    pub(super) fn remarks(&mut self, snapshots: &[Snapshot]) {
        if self.header.incompatible & incompatible::CORRUPT != 0 {
            self.say(Severity::Benign, Kind::MarkedCorrupt);
        }
        let unknown = self.header.autoclear & !autoclear::KNOWN;
        if unknown != 0 && !snapshots.is_empty() {
            self.remark(Remark::UnknownAutoclear(unknown));
        }
        let bitmaps = self.header.autoclear & autoclear::BITMAPS != 0;
        let extension = self.header.extension(extension::BITMAPS).is_some();
        if bitmaps && !extension {
            self.remark(Remark::NoBitmaps);
        }
        if bitmaps && extension && !snapshots.is_empty() {
            self.remark(Remark::SnapshotsAndBitmaps);
        }
        if self.raw_size & 511 != 0 {
            self.remark(Remark::OddSize(self.raw_size));
        }
    }

    /// A finding that is no error.
    pub(super) fn remark(&mut self, remark: Remark) {
        self.say(Severity::Benign, Kind::Remark(remark));
    }
}
