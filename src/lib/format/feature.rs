//! Feature bits of the header (spec, "Header").

/// Feature bits that change how the image must be read or written (spec, "incompatible_features").
pub(crate) mod incompatible {
    /// Refcounts may be wrong.
    pub(crate) const DIRTY: u64 = 1 << 0;
    /// The image is damaged; it may only be written to repair it.
    pub(crate) const CORRUPT: u64 = 1 << 1;
    /// The data lies in another file.
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    /// The compression type field is not zero.
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes long and have subclusters.
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    /// Every bit that has a meaning.
    pub(crate) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Feature bits that a reader may ignore (spec, "compatible_features").
pub(crate) mod compatible {
    /// Refcount updates may be postponed.
    pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Feature bits that a writer that does not know them must clear (spec, "autoclear_features").
pub(crate) mod autoclear {
    /// The bitmaps extension is valid.
    pub(crate) const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image.
    pub(crate) const RAW_DATA_FILE: u64 = 1 << 1;
    /// Every bit that has a meaning.
    pub(crate) const KNOWN: u64 = BITMAPS | RAW_DATA_FILE;
}
