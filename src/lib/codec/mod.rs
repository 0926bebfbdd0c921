//! Compressed clusters, as QEMU writes and reads them.

mod compress;
mod inflate;

pub use compress::CompressionLevel;
pub(crate) use compress::Compressor;
pub(crate) use inflate::Inflater;
