//! What statistics say. Every figure's definition stands with it; keys never change their meaning.

use serde::Serialize;

use super::advice::Advice;
use crate::digest::Sha;
use crate::disk::Format;
use crate::error::Error;
use crate::units::{ClusterBits, percent};

/// Statistics of one image or of many.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct StatsReport {
    /// Whether only metadata was read.
    pub quick: bool,
    /// The cluster size in which content is counted.
    pub cluster_size_bytes: u64,
    /// Each image by itself.
    pub images: Vec<ImageStats>,
    /// All images together, as everything that follows; `None` where the data was not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// How many contents occur how often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub histogram: Option<Vec<Occurrences>>,
    /// The contents that occur most often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top: Option<Vec<Repeated>>,
    /// What each cluster size leads to, in ascending order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curve: Option<Vec<CurvePoint>>,
    /// What to do with a single image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recommendation: Option<Advice>,
    /// Two or more images: `[a][b]` are the data clusters of image a whose content image b has too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<Vec<Vec<u64>>>,
    /// Two or more images: what each adds to those before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<Vec<Growth>>,
    /// Two or more images: the contents that only this image has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclusive: Option<Vec<Amount>>,
    /// Time taken.
    pub seconds: f64,
}

/// One image.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ImageStats {
    /// Its name, as given.
    pub filename: String,
    /// Its format.
    #[serde(serialize_with = "as_text")]
    pub format: Format,
    /// Size of the disk that the guest sees.
    pub virtual_size_bytes: u64,
    /// Length of the file.
    pub file_length_bytes: u64,
    /// What the file occupies; 0 for a block device.
    pub file_allocated_bytes: u64,
    /// How the file has the clusters of the disk.
    pub disk: DiskClusters,
    /// What the guest reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// Data that is still stored more than once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub still_duplicate: Option<StillDuplicate>,
    /// What only a QCOW2 image has.
    #[serde(flatten)]
    pub qcow2: Option<Qcow2Stats>,
    /// Where on the disk what is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Map>,
}

/// The clusters of a disk by how the image itself has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DiskClusters {
    /// The image's cluster size; of a raw image the one in which content is counted.
    pub cluster_size_bytes: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those with an entry that leads to a cluster and has no zero flag; of a raw image those that are no hole.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those with the zero flag.
    pub zero_flagged_clusters: u64,
    /// The others.
    pub unallocated_clusters: u64,
    /// Allocated, and yet nothing but zeros.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_zero_clusters: Option<u64>,
}

/// What is read, backing files included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Content {
    /// Clusters that are not all zeros.
    pub data_clusters: u64,
    /// The same in bytes.
    pub data_bytes: u64,
    /// One for each different content of them.
    pub distinct_clusters: u64,
    /// The same in bytes.
    pub distinct_bytes: u64,
    /// `data - distinct`.
    pub duplicate_clusters: u64,
    /// The same in bytes.
    pub duplicate_bytes: u64,
    /// The same as a share of the data.
    pub duplicate_percent: f64,
}

impl Content {
    pub(super) fn new(data: u64, distinct: u64, bits: ClusterBits) -> Self {
        let duplicates = data - distinct;
        Self {
            data_clusters: data,
            data_bytes: data << bits.bits(),
            distinct_clusters: distinct,
            distinct_bytes: distinct << bits.bits(),
            duplicate_clusters: duplicates,
            duplicate_bytes: duplicates << bits.bits(),
            duplicate_percent: percent(duplicates, data),
        }
    }
}

/// Data that is still stored more than once.
///
/// Of a raw image: its duplicates, as a share of its data. Of a QCOW2 image: of the distinct clusters that the disk or a snapshot
/// uses and that are not all zeros, those that repeat another one. Copies that the sharer limit asks for are not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct StillDuplicate {
    /// Clusters.
    pub clusters: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// The same as a share of what is stored.
    pub percent: f64,
}

impl StillDuplicate {
    pub(super) fn new(clusters: u64, of: u64, size: u64) -> Self {
        Self { clusters, bytes: clusters * size, percent: percent(clusters, of) }
    }
}

/// What only a QCOW2 image has.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Qcow2Stats {
    /// The clusters of the file.
    pub file: FileClusters,
    /// What sharing saves now.
    pub sharing: Sharing,
    /// What `dedup` would do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dedup: Option<Forecast>,
    /// The deduplication pool.
    pub pool: Option<PoolStats>,
    /// How high the refcounts are.
    pub refcounts: RefcountStats,
    /// The snapshots, in the order of their table.
    pub snapshots: Vec<SnapshotStats>,
}

/// The clusters of a QCOW2 file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FileClusters {
    /// Cluster size.
    pub cluster_size_bytes: u64,
    /// Clusters that something refers to.
    pub used_clusters: u64,
    /// Those with what a guest wrote: the disk's, the snapshots', and members of the pool; also those that a cluster with the zero
    /// flag keeps.
    pub data_clusters: u64,
    /// The others.
    pub metadata_clusters: u64,
    /// The same in bytes.
    pub metadata_bytes: u64,
    /// Of that, the pool's own tables and directory.
    pub pool_metadata_bytes: u64,
    /// Clusters whose refcount is too high.
    pub leaked_clusters: u64,
}

/// What sharing saves now, on the disk as it is; snapshots are left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Sharing {
    /// Distinct clusters that the disk's allocated clusters are stored in.
    pub stored_clusters: u64,
    /// Those of them with two or more users on the disk.
    pub shared_clusters: u64,
    /// `allocated - stored`.
    pub saved_clusters: u64,
    /// The same in bytes.
    pub saved_bytes: u64,
    /// The same as a share of the allocated clusters.
    pub saved_percent: f64,
    /// `saved_bytes` less the pool's own metadata.
    pub net_saved_bytes: i64,
    /// How many stored clusters have how many users.
    pub histogram: Vec<Users>,
}

/// Stored clusters with a number of users in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Users {
    /// The least number of users.
    pub users_from: u64,
    /// The largest.
    pub users_to: u64,
    /// Stored clusters.
    pub stored_clusters: u64,
    /// Clusters of the disk that use them.
    pub references_clusters: u64,
}

/// What `dedup` would do.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Forecast {
    /// It would refuse.
    Refused {
        /// Why.
        refused: String,
        /// The same, as data.
        #[serde(skip)]
        why: Error,
    },
    /// This.
    Done(DedupForecast),
}

/// What `dedup` would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DedupForecast {
    /// Distinct data clusters that the disk or a snapshot uses.
    pub stored_clusters: u64,
    /// Those of nothing but zeros.
    pub zero_clusters: u64,
    /// Those that repeat another one.
    pub duplicate_clusters: u64,
    /// Clusters of the file that nothing would use any more.
    pub freed_clusters: u64,
    /// The same in bytes.
    pub freed_bytes: u64,
    /// Members that the pool would have.
    pub pool_members: u64,
    /// What the file would occupy.
    pub file_allocated_after_bytes: u64,
}

/// The deduplication pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PoolStats {
    /// Its members.
    pub members: u64,
    /// Those that nothing else uses.
    pub garbage_members: u64,
    /// Those that one guest cluster, of the disk and its snapshots, is left to use.
    pub single_user_members: u64,
    /// Whether its directory can be used.
    pub directory_valid: bool,
}

/// How high refcounts are, and how high they can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RefcountStats {
    /// Width in bits.
    pub refcount_bits: u32,
    /// The largest refcount.
    pub max_references: u64,
    /// The highest one of a data cluster.
    pub highest_references: u64,
    /// `max - highest`.
    pub head_room_references: u64,
    /// How many sharers a member of the pool takes; `None` where the width is too small to share.
    pub sharer_limit: Option<u64>,
    /// Members that take no more.
    pub full_members: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SnapshotStats {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Clusters of the file that only this snapshot refers to, its tables included; the pool's references are not counted.
    pub exclusive_clusters: u64,
    /// The same in bytes.
    pub exclusive_bytes: u64,
}

/// Contents that occur a number of times in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Occurrences {
    /// The least number of times.
    pub times_from: u64,
    /// The largest.
    pub times_to: u64,
    /// Contents.
    pub contents: u64,
    /// One cluster of each, in bytes.
    pub contents_bytes: u64,
    /// Clusters with one of these contents.
    pub references_clusters: u64,
    /// The same in bytes.
    pub references_bytes: u64,
}

/// A content that occurs more than once.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Repeated {
    /// How often.
    pub times: u64,
    /// All of it in bytes.
    pub bytes: u64,
    /// The SHA-256 of one cluster.
    #[serde(serialize_with = "as_hex")]
    pub sha256: Sha,
    /// What it looks like.
    pub guess: String,
    /// The first image that has it.
    pub first_image: usize,
    /// Where that has it first.
    pub first_offset_bytes: u64,
}

/// What a cluster size leads to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CurvePoint {
    /// The cluster size.
    pub cluster_size_bytes: u64,
    /// Clusters that are not all zeros.
    pub data_clusters: u64,
    /// The same in bytes.
    pub data_bytes: u64,
    /// One for each different content.
    pub distinct_clusters: u64,
    /// The same in bytes.
    pub distinct_bytes: u64,
    /// `data - distinct` as a share of the data.
    pub duplicate_percent: f64,
    /// What the file would have beside data.
    pub metadata_bytes: u64,
    /// The length of the file that `convert` would write.
    pub file_length_bytes: u64,
    /// The same without sharing, and without a pool.
    pub plain_length_bytes: u64,
    /// `plain - file`.
    pub saved_bytes: i64,
}

/// What an image adds to those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Growth {
    /// Contents that none of those has.
    pub new_clusters: u64,
    /// The same in bytes.
    pub new_bytes: u64,
    /// Contents so far.
    pub total_clusters: u64,
    /// The same in bytes.
    pub total_bytes: u64,
}

/// An amount of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Amount {
    /// Clusters.
    pub clusters: u64,
    /// The same in bytes.
    pub bytes: u64,
}

/// A disk cut into pieces of equal size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Map {
    /// The pieces in order.
    pub cells: Vec<Cell>,
}

/// What the clusters of a piece are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Cell {
    /// All zeros.
    pub zero_clusters: u64,
    /// Data that occurs once.
    pub unique_clusters: u64,
    /// Data that occurs more than once, each stored for itself.
    pub duplicate_clusters: u64,
    /// Data in a cluster of the file that another one of the disk uses too.
    pub shared_clusters: u64,
}

fn as_text<S: serde::Serializer>(format: &Format, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(format)
}

fn as_hex<S: serde::Serializer>(sha: &Sha, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex(sha))
}

/// A digest as text.
#[must_use]
pub fn hex(sha: &Sha) -> String {
    use std::fmt::Write;
    sha.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
