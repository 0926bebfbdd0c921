//! The image header and its extensions (spec, "Header" and "Header extensions").

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::coding::{CompressionType, Encryption};
pub(crate) use super::extension::{self, Extension};
pub(crate) use super::feature::{autoclear, compatible, incompatible};
use super::refcount::RefcountBits;
use super::{array_at, snapshot, u32_at};
use crate::error::{Advice, Error, ErrorKind, OrInternal, Result};
use crate::units::{self, ClusterBits, HostOffset, to_usize};

/// `QFI\xfb`.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header.
pub(crate) const V2_LENGTH: usize = 72;
/// The shortest version 3 header: up to `header_length`.
pub(crate) const V3_MIN_LENGTH: usize = 104;
/// The header that QEMU 10 writes: with the compression type, padded to 8.
pub(crate) const V3_LENGTH: usize = 112;
/// QEMU: no table of offsets (L1, refcount table) is larger than this many bytes.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU: the refcount table's largest size in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// QEMU: the largest number of snapshots.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// QEMU: the longest name of a backing file.
pub(crate) const MAX_BACKING_NAME: u32 = 1023;

/// Where the header says where the active L1 table is.
pub(crate) const L1_OFFSET_AT: u64 = 40;
/// Where the header says where the refcount table is.
pub(crate) const REFCOUNT_TABLE_AT: u64 = 48;
/// Where the header says how many snapshots there are, and where.
pub(crate) const SNAPSHOTS_AT: u64 = 60;
/// Where the incompatible feature bits are.
pub(crate) const INCOMPATIBLE_AT: u64 = 72;
/// Where the autoclear feature bits are.
pub(crate) const AUTOCLEAR_AT: u64 = 88;
/// What a disk writes whole or not at all, in bytes.
pub(crate) const SECTOR: usize = to_usize(units::SECTOR);

/// The header as it lies in the file, versions 2 and 3. A version 2 file ends after `snapshots_offset`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// [`MAGIC`].
    magic: [u8; 4],
    /// 2 or 3.
    version: U32,
    /// 0, or where the name of the backing file begins; within the first cluster.
    backing_file_offset: U64,
    /// Length of that name in bytes; it is not NUL-terminated.
    backing_file_size: U32,
    /// The cluster size is `1 << cluster_bits`.
    cluster_bits: U32,
    /// Virtual disk size in bytes.
    size: U64,
    /// 0 none, 1 AES, 2 LUKS.
    crypt_method: U32,
    /// Entries of the active L1 table.
    l1_size: U32,
    /// Where the active L1 table begins; cluster aligned.
    l1_table_offset: U64,
    /// Where the refcount table begins; cluster aligned.
    refcount_table_offset: U64,
    /// Clusters of the refcount table.
    refcount_table_clusters: U32,
    /// Number of internal snapshots.
    nb_snapshots: U32,
    /// Where the snapshot table begins; cluster aligned.
    snapshots_offset: U64,
    /// See [`incompatible`].
    incompatible_features: U64,
    /// See [`compatible`].
    compatible_features: U64,
    /// Bits that a writer that does not know them must clear.
    autoclear_features: U64,
    /// A refcount is `1 << refcount_order` bits wide.
    refcount_order: U32,
    /// Bytes of this header; the extensions follow.
    header_length: U32,
    /// See [`CompressionType`].
    compression_type: u8,
    /// Zero.
    padding: [u8; 7],
}

/// [`V3_LENGTH`] as it stands in the file.
const V3_LENGTH_WORD: U32 = U32::new(112);

const _: () = assert!(size_of::<RawHeader>() == V3_LENGTH);
const _: () = assert!(std::mem::offset_of!(RawHeader, incompatible_features) == V2_LENGTH);
const _: () = assert!(std::mem::offset_of!(RawHeader, compression_type) == V3_MIN_LENGTH);
const _: () = assert!(std::mem::offset_of!(RawHeader, l1_table_offset) as u64 == L1_OFFSET_AT);
const _: () = assert!(std::mem::offset_of!(RawHeader, refcount_table_offset) as u64 == REFCOUNT_TABLE_AT);
const _: () = assert!(std::mem::offset_of!(RawHeader, nb_snapshots) as u64 == SNAPSHOTS_AT);
const _: () = assert!(REFCOUNT_TABLE_AT + 12 == SNAPSHOTS_AT && SNAPSHOTS_AT + 12 <= SECTOR as u64);
const _: () = assert!(std::mem::offset_of!(RawHeader, incompatible_features) as u64 == INCOMPATIBLE_AT);
const _: () = assert!(std::mem::offset_of!(RawHeader, autoclear_features) as u64 == AUTOCLEAR_AT);

/// A header whose every field was checked against the specification and QEMU's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Virtual disk size in bytes, a multiple of 512 (QEMU 10.0.2 rounds other sizes down).
    pub size: u64,
    /// Encryption of the content.
    pub encryption: Option<Encryption>,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table begins.
    pub l1_offset: HostOffset,
    /// Where the refcount table begins.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table begins.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits, all of them known.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Width of a refcount.
    pub refcount_bits: RefcountBits,
    /// Compression of compressed clusters.
    pub compression: CompressionType,
    /// Name of the backing file.
    pub backing_name: Option<Vec<u8>>,
    /// Header extensions in file order, without the end marker.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// The bytes of the first cluster that [`Header::decode`] needs, from the first [`V3_LENGTH`] bytes of the file.
    ///
    /// # Errors
    /// Fails where the magic, the version or the cluster size is none that QEMU supports.
    pub(crate) fn needed_length(start: &[u8]) -> Result<usize> {
        Ok(cluster_bits(&raw_header(start)?)?.len())
    }

    /// Checks and decodes a header. `cluster` is the first cluster, or what the file has of it.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] for another format, [`ErrorKind::Unsupported`] for unknown incompatible features,
    /// [`ErrorKind::Corrupt`] for a field that breaks a rule. The messages are QEMU's where it has one.
    pub(crate) fn decode(cluster: &[u8]) -> Result<Self> {
        let raw = raw_header(cluster)?;
        let cluster_bits = cluster_bits(&raw)?;
        let version = raw.version.get();
        let header_length = if version == 2 { V2_LENGTH } else { header_length(&raw, cluster_bits)? };

        let backing_offset = raw.backing_file_offset.get();
        if backing_offset > cluster_bits.bytes() {
            return Err(Error::corrupt("Invalid backing file offset"));
        }
        let extensions_end = if backing_offset == 0 { cluster_bits.bytes() } else { backing_offset };
        let window = to_usize(extensions_end).min(cluster.len());
        let extensions = extension::decode(cluster.get(header_length..window).unwrap_or_default())?;

        let incompatible = raw.incompatible_features.get();
        let unknown = incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let names = extension::feature_names(unknown, &extensions);
            return Err(Error::unsupported(format!("Unsupported qcow2 feature(s): {names}")));
        }

        let refcount_bits = RefcountBits::from_order(raw.refcount_order.get())
            .ok_or_else(|| Error::corrupt("Reference count entry width too large; may not exceed 64 bits"))?;
        let encryption = match raw.crypt_method.get() {
            0 => None,
            1 => Some(Encryption::Aes),
            2 => Some(Encryption::Luks),
            other => return Err(Error::unsupported(format!("Unsupported encryption method {other}"))),
        };
        extension::refuse_invalid(&extensions, encryption, cluster_bits)?;
        let compression = compression(&raw)?;

        let raw_data_file = raw.autoclear_features.get() & autoclear::RAW_DATA_FILE != 0;
        if raw_data_file && incompatible & incompatible::DATA_FILE == 0 {
            return Err(Error::corrupt("data-file-raw requires a data file"));
        }
        let extended_l2 = incompatible & incompatible::EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits.bits() < 14 {
            return Err(Error::corrupt(format!(
                "Unsupported subcluster size: {}; extended L2 entries need clusters of at least 16 KiB",
                cluster_bits.bytes() / 32
            )));
        }

        let fits = |offset: u64, bytes: u64| {
            offset & (cluster_bits.bytes() - 1) == 0 && offset <= MAX_HOST_OFFSET.saturating_sub(bytes)
        };
        let table_bytes = u64::from(raw.refcount_table_clusters.get()) * cluster_bits.bytes();
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::corrupt("Reference count table too large"));
        }
        if !fits(raw.refcount_table_offset.get(), table_bytes) {
            return Err(Error::corrupt("Reference count table offset invalid"));
        }
        if raw.nb_snapshots.get() > MAX_SNAPSHOTS {
            return Err(Error::corrupt("Snapshot table too large"));
        }
        if !fits(raw.snapshots_offset.get(), u64::from(raw.nb_snapshots.get()) * snapshot::FIXED as u64) {
            return Err(Error::corrupt("Snapshot table offset invalid"));
        }
        let l1_bytes = u64::from(raw.l1_size.get()) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(Error::corrupt("Active L1 table too large"));
        }
        if !fits(raw.l1_table_offset.get(), l1_bytes) {
            return Err(Error::corrupt("Active L1 table offset invalid"));
        }
        let size = raw.size.get() & !511;
        let l2_entries = if extended_l2 { cluster_bits.entries() / 2 } else { cluster_bits.entries() };
        // QEMU asks for room for the size as it stands, although it rounds it down afterwards.
        let needed = raw.size.get().div_ceil(cluster_bits.bytes() * l2_entries);
        if i64::try_from(size).is_err() || i32::try_from(needed).is_err() {
            return Err(Error::corrupt("Image is too big"));
        }
        if needed > u64::from(raw.l1_size.get()) {
            return Err(Error::corrupt("L1 table is too small"));
        }

        Ok(Self {
            version,
            cluster_bits,
            size,
            encryption,
            l1_entries: raw.l1_size.get(),
            l1_offset: HostOffset(raw.l1_table_offset.get()),
            refcount_table_offset: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshots: raw.nb_snapshots.get(),
            snapshots_offset: HostOffset(raw.snapshots_offset.get()),
            incompatible,
            compatible: raw.compatible_features.get(),
            autoclear: raw.autoclear_features.get(),
            refcount_bits,
            compression,
            backing_name: backing_name(&raw, cluster, cluster_bits)?,
            extensions,
        })
    }

    /// The bytes of the header, its extensions and the backing file's name: the start of the first cluster. Version 3 only.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] where they do not fit in one cluster.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let mut extensions = Vec::new();
        for extension in &self.extensions {
            let length = u32::try_from(extension.data.len()).ok().or_internal("a header extension of 4 GiB")?;
            extensions.extend_from_slice(&extension.magic.to_be_bytes());
            extensions.extend_from_slice(&length.to_be_bytes());
            extensions.extend_from_slice(&extension.data);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        extensions.extend_from_slice(&[0; 8]);
        let name = self.backing_name.as_deref().unwrap_or_default();
        if name.len() > MAX_BACKING_NAME as usize {
            return Err(Error::new(ErrorKind::Limit, "Backing file name too long"));
        }
        let name_offset = V3_LENGTH + extensions.len();
        if name_offset + name.len() > self.cluster_bits.len() {
            return Err(Error::new(ErrorKind::Limit, "No space left in the file header"));
        }
        let raw = RawHeader {
            magic: MAGIC,
            version: self.version.into(),
            backing_file_offset: if name.is_empty() { 0 } else { name_offset as u64 }.into(),
            backing_file_size: u32::try_from(name.len()).ok().or_internal("a name of 4 GiB")?.into(),
            cluster_bits: self.cluster_bits.bits().into(),
            size: self.size.into(),
            crypt_method: 0.into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_offset.0.into(),
            refcount_table_offset: self.refcount_table_offset.0.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshots.into(),
            snapshots_offset: self.snapshots_offset.0.into(),
            incompatible_features: self.incompatible.into(),
            compatible_features: self.compatible.into(),
            autoclear_features: self.autoclear.into(),
            refcount_order: self.refcount_bits.order().into(),
            header_length: V3_LENGTH_WORD,
            compression_type: match self.compression {
                CompressionType::Zlib => 0,
                CompressionType::Zstd => 1,
            },
            padding: [0; 7],
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(&extensions);
        bytes.extend_from_slice(name);
        Ok(bytes)
    }

    /// The fields at [`REFCOUNT_TABLE_AT`], which lie in one sector.
    #[must_use]
    pub(crate) fn refcount_table_field(&self) -> [u8; 12] {
        offset_and_count(self.refcount_table_offset, self.refcount_table_clusters, false)
    }

    /// The fields at [`SNAPSHOTS_AT`], which lie in one sector.
    #[must_use]
    pub(crate) fn snapshots_field(&self) -> [u8; 12] {
        offset_and_count(self.snapshots_offset, self.snapshots, true)
    }

    /// Whether L2 entries have subclusters.
    #[must_use]
    pub(crate) fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Entries of an L2 table.
    #[must_use]
    pub(crate) fn l2_entries(&self) -> u64 {
        if self.extended_l2() { self.cluster_bits.entries() / 2 } else { self.cluster_bits.entries() }
    }

    /// Bytes of an L2 entry.
    #[must_use]
    pub(crate) fn l2_entry_len(&self) -> usize {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// The data of the first extension of type `magic`.
    #[must_use]
    pub(crate) fn extension(&self, magic: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|e| e.magic == magic).map(|e| e.data.as_slice())
    }

    /// Refuses by name what cannot be read as plain content: encryption, an external data file, damage.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] or [`ErrorKind::Corrupt`].
    pub(crate) fn refuse_unreadable(&self) -> Result<()> {
        self.refuse_encrypted()?;
        self.refuse_damaged()
    }

    /// Refuses by name what cannot be read as plain content, however damaged it may be: encryption, an external data file.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub(crate) fn refuse_unsalvageable(&self) -> Result<()> {
        self.refuse_encrypted()?;
        self.refuse_data_file()
    }

    fn refuse_encrypted(&self) -> Result<()> {
        match self.encryption {
            Some(Encryption::Aes) => {
                Err(Error::unsupported("AES encrypted images are not read here").advise(Advice::Decrypt))
            }
            Some(Encryption::Luks) => {
                Err(Error::unsupported("LUKS encrypted images are not read here").advise(Advice::Decrypt))
            }
            None => Ok(()),
        }
    }

    fn refuse_data_file(&self) -> Result<()> {
        if self.incompatible & incompatible::DATA_FILE != 0 {
            return Err(
                Error::unsupported("images with an external data file are not read here").advise(Advice::MergeDataFile)
            );
        }
        Ok(())
    }

    /// Refuses by name what is not all in one sound file: an external data file, damage.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] or [`ErrorKind::Corrupt`].
    pub(crate) fn refuse_damaged(&self) -> Result<()> {
        if self.refcount_table_clusters == 0 {
            return Err(Error::corrupt("Image does not contain a reference count table").advise(Advice::RepairFirst));
        }
        self.refuse_data_file()?;
        if self.incompatible & incompatible::CORRUPT != 0 {
            return Err(Error::corrupt("Image is marked corrupt").advise(Advice::RepairOrSalvage));
        }
        Ok(())
    }
}

fn offset_and_count(offset: HostOffset, count: u32, count_first: bool) -> [u8; 12] {
    let (offset, count) = (offset.0.to_be_bytes(), count.to_be_bytes());
    let mut field = [0; 12];
    let (a, b) = field.split_at_mut(if count_first { 4 } else { 8 });
    if count_first {
        a.copy_from_slice(&count);
        b.copy_from_slice(&offset);
    } else {
        a.copy_from_slice(&offset);
        b.copy_from_slice(&count);
    }
    field
}

/// QEMU: no table ends behind what a file offset can say.
const MAX_HOST_OFFSET: u64 = i64::MAX.cast_unsigned();

fn raw_header(start: &[u8]) -> Result<RawHeader> {
    let not_qcow2 = || Error::new(ErrorKind::Format, "Image is not in qcow2 format");
    if start.len() < V2_LENGTH || array_at::<4>(start, 0) != Some(MAGIC) {
        return Err(not_qcow2());
    }
    let mut bytes = [0; V3_LENGTH];
    let version = u32_at(start, 4).ok_or_else(not_qcow2)?;
    // A version 2 header ends here: what follows are extensions. Of a short version 3 header only what is there is read.
    let length = match version {
        2 => V2_LENGTH,
        3 => match u32_at(start, 100) {
            Some(length) => to_usize(length.into()).clamp(V3_MIN_LENGTH, V3_LENGTH),
            None => return Err(Error::corrupt("qcow2 header too short")),
        },
        other => return Err(Error::unsupported(format!("Unsupported qcow2 version {other}"))),
    };
    let source = start.get(..length).ok_or_else(|| Error::corrupt("qcow2 header too short"))?;
    bytes[..length].copy_from_slice(source);
    let mut raw: RawHeader = zerocopy::transmute!(bytes);
    if version == 2 {
        raw.refcount_order = 4.into();
    }
    Ok(raw)
}

fn cluster_bits(raw: &RawHeader) -> Result<ClusterBits> {
    let bits = raw.cluster_bits.get();
    ClusterBits::new(bits).ok_or_else(|| Error::unsupported(format!("Unsupported cluster size: 2^{bits}")))
}

fn header_length(raw: &RawHeader, cluster_bits: ClusterBits) -> Result<usize> {
    let length = raw.header_length.get() as usize;
    if length < V3_MIN_LENGTH {
        return Err(Error::corrupt("qcow2 header too short"));
    }
    if length > cluster_bits.len() {
        return Err(Error::corrupt("qcow2 header exceeds cluster size"));
    }
    // Spec: "must be a multiple of 8". QEMU does not test it and would misparse the extensions.
    if !length.is_multiple_of(8) {
        return Err(Error::corrupt(format!("qcow2 header length {length} is not a multiple of 8")));
    }
    Ok(length)
}

fn compression(raw: &RawHeader) -> Result<CompressionType> {
    let compression = match raw.compression_type {
        0 => CompressionType::Zlib,
        1 => CompressionType::Zstd,
        other => return Err(Error::unsupported(format!("qcow2: unknown compression type: {other}"))),
    };
    let flagged = raw.incompatible_features.get() & incompatible::COMPRESSION != 0;
    match (compression, flagged) {
        (CompressionType::Zlib, true) => {
            Err(Error::corrupt("qcow2: Compression type incompatible feature bit must not be set"))
        }
        (CompressionType::Zstd, false) => {
            Err(Error::corrupt("qcow2: Compression type incompatible feature bit must be set"))
        }
        _ => Ok(compression),
    }
}

fn backing_name(raw: &RawHeader, cluster: &[u8], cluster_bits: ClusterBits) -> Result<Option<Vec<u8>>> {
    let offset = raw.backing_file_offset.get();
    if offset == 0 {
        return Ok(None);
    }
    let length = raw.backing_file_size.get();
    let too_long = || Error::corrupt("Backing file name too long");
    if length > MAX_BACKING_NAME || u64::from(length) > cluster_bits.bytes() - offset {
        return Err(too_long());
    }
    let start = usize::try_from(offset).map_err(|_| too_long())?;
    let name = cluster.get(start..start + length as usize).ok_or_else(too_long)?;
    Ok((!name.is_empty()).then(|| name.to_vec()))
}

#[cfg(test)]
pub(crate) mod tests;
