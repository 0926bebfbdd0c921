//! Feature bits of the header (spec, "Header").

/// Feature bits that change how the image must be read or written (spec, "incompatible_features").
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// The image is damaged; it may only be written to repair it.
    pub const CORRUPT: u64 = 1 << 1;
    /// The data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type field is not zero.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes long and have subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Every bit that has a meaning.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Feature bits that a reader may ignore (spec, "compatible_features").
pub mod compatible {
    /// Refcount updates may be postponed.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Feature bits that a writer that does not know them must clear (spec, "autoclear_features").
pub mod autoclear {
    /// The bitmaps extension is valid.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
    /// Every bit that has a meaning.
    pub const KNOWN: u64 = BITMAPS | RAW_DATA_FILE;
}
