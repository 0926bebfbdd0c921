//! What is worth knowing of an image although nothing in it is wrong.

use crate::check::Checker;
use crate::check::finding::{Kind, Severity};
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
            self.remark(format!(
                "unknown autoclear bits {unknown:#x} are set: qemu-img check -r (4.2 to 10.2) deletes all internal \
                 snapshots of such an image"
            ));
        }
        let bitmaps = self.header.autoclear & autoclear::BITMAPS != 0;
        let extension = self.header.extension(extension::BITMAPS).is_some();
        if bitmaps && !extension {
            self.remark("the header says that bitmaps are valid, but there are none".to_owned());
        }
        if bitmaps && extension && !snapshots.is_empty() {
            self.remark(
                "it has both snapshots and persistent bitmaps: qemu-img check -r may damage such an image; work on a copy"
                    .to_owned(),
            );
        }
        if self.raw_size & 511 != 0 {
            let message = format!("the virtual size {} is no multiple of 512; QEMU cuts it down", self.raw_size);
            self.remark(message);
        }
    }

    /// A finding that is no error.
    pub(super) fn remark(&mut self, text: String) {
        self.say(Severity::Benign, Kind::Remark(text));
    }
}
