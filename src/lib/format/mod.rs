//! The bytes of QCOW2, as values. Nothing here reads or writes a file.
//!
//! Everything is big endian. "Spec" in the comments is `docs/interop/qcow2.rst` of QEMU 10.0; limits marked "QEMU" are those of
//! its block driver, not of the format.

pub(crate) mod coding;
pub(crate) mod compressed;
pub(crate) mod extension;
pub(crate) mod feature;
pub(crate) mod header;
pub(crate) mod l2;
pub(crate) mod refcount;
pub(crate) mod snapshot;
pub(crate) mod table;

/// The bytes `at..at + N` of `bytes` as an array, or `None` where they end earlier.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The big-endian 16-bit word at `at`.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_be_bytes)
}

/// The big-endian 32-bit word at `at`.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_be_bytes)
}

/// The big-endian 64-bit word at `at`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_be_bytes)
}
