//! What the tests, the fuzzer and the benchmarks of this package reach into. It is no part of the API: it changes without notice,
//! with any version.

pub use crate::dedup::group::group;
pub use crate::digest::{Fingerprint, fingerprint, is_zero, sha256};
pub use crate::image::{Extent, Place};
pub use crate::inplace::overwrite::overwrite;
pub use crate::pool::directory::{DirectoryHeader, HEADER_LENGTH};
pub use crate::sort::content::ContentAt;
pub use crate::sort::sequence::{Sequence, Sorted, Spill};
