//! The feature bits in the header that say how an image was left.

use crate::error::{Advice, Error, Result};
use crate::format::header::{AUTOCLEAR_AT, Header, INCOMPATIBLE_AT, SECTOR, autoclear, incompatible};
use crate::storage::{Storage, flush, write};

/// Sets the dirty bit, which version 2 does not have, and clears autoclear bits that are not known; returns the header.
pub(crate) fn set_dirty(storage: &dyn Storage, header: &Header) -> Result<Header> {
    let mut header = header.clone();
    if header.version >= 3 {
        clear_unknown_autoclear(storage, &header)?;
        header.incompatible |= incompatible::DIRTY;
        write(storage, &header.incompatible.to_be_bytes(), INCOMPATIBLE_AT)?;
        flush(storage)?;
    }
    Ok(header)
}

/// Spec: a writer first clears the autoclear bits that it does not know. Bitmaps stay valid, as no guest data changes.
pub(crate) fn clear_unknown_autoclear(storage: &dyn Storage, header: &Header) -> Result<()> {
    if header.version < 3 || header.autoclear & !autoclear::KNOWN == 0 {
        return Ok(());
    }
    let known = (header.autoclear & autoclear::KNOWN).to_be_bytes();
    write(storage, &known, AUTOCLEAR_AT)?;
    flush(storage)
}

/// Clears the incompatible feature bits `flags` of the image with this header.
pub(crate) fn clear_marks(storage: &dyn Storage, header: &Header, flags: u64) -> Result<()> {
    if header.version < 3 || header.incompatible & flags == 0 {
        return Ok(());
    }
    write(storage, &(header.incompatible & !flags).to_be_bytes(), INCOMPATIBLE_AT)?;
    flush(storage)
}

/// The first sector of a version 2 image that becomes version 3: it is written at once, so it holds the whole header.
pub(crate) fn upgraded(header: &Header) -> Result<Vec<u8>> {
    let new = Header { version: 3, incompatible: incompatible::DIRTY, ..header.clone() };
    let mut bytes = new.encode()?;
    if bytes.len() > SECTOR {
        let what = "the header of this version 2 image is too long to be upgraded safely";
        return Err(Error::unsupported(what).advise(Advice::Upgrade));
    }
    bytes.resize(SECTOR, 0);
    Ok(bytes)
}
