//! The figures of one image.

use super::contents::{map, percent, rows};
use super::disk::{Clusters, Disk, allocated};
use super::layers::{By, Layers, Leads, Pool};
use super::measured;
use crate::support::reader::{Image, Snapshot};
use crate::support::verify::content;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// An image whose figures are asked for.
pub(crate) struct Source {
    /// The name as typed.
    pub(crate) name: String,
    /// `raw` or `qcow2`.
    pub(crate) format: &'static str,
    /// What a guest reads.
    pub(crate) disk: Disk,
}

impl Source {
    /// The image at `path`, whose content is in the raw file `truth`.
    pub(crate) fn new(path: &Path, format: &'static str, truth: &Path) -> Self {
        Self { name: path.to_str().unwrap().to_owned(), format, disk: Disk::of(truth) }
    }

    /// The cluster size of a QCOW2 image.
    pub(super) fn own_size(&self) -> Option<u64> {
        (self.format == "qcow2").then(|| Image::open(self.name.as_ref()).cluster_size())
    }

    /// All figures of the image, where contents are counted in clusters of `size`.
    #[track_caller]
    pub(super) fn figures(&self, size: u64) -> Value {
        let path: &Path = self.name.as_ref();
        let clusters = self.disk.clusters(size);
        let found = path.metadata().unwrap();
        let mut all = json!({
            "filename": self.name,
            "format": self.format,
            "virtual_size_bytes": self.disk.size,
            "file_length_bytes": found.len(),
            "file_allocated_bytes": found.blocks() * 512,
            "content": super::contents::content(&[&clusters], size),
        });
        if self.format == "raw" {
            let duplicates = &all["content"];
            all["still_duplicate"] = json!({
                "clusters": duplicates["duplicate_clusters"],
                "bytes": duplicates["duplicate_bytes"],
                "percent": duplicates["duplicate_percent"],
            });
            all["disk"] = self.raw_clusters(size, &clusters);
            all["map"] = map(&clusters, self.disk.total(size), &BTreeSet::new());
            return all;
        }
        let layers = Layers::of(Image::open(path));
        let own = layers.image.cluster_size();
        let after = measured::deduplicated(path);
        all["disk"] = qcow2_clusters(&layers, &self.disk.clusters(own));
        all["still_duplicate"] = match layers.image.extended() {
            true => self.still_duplicate_with_subclusters(&layers),
            false => still_duplicate(&layers, after.as_ref()),
        };
        all["file"] = file(&layers, path);
        all["sharing"] = sharing(&layers);
        all["dedup"] = dedup(&layers, after.as_ref());
        all["pool"] = pool(&layers);
        all["refcounts"] = refcounts(&layers);
        all["snapshots"] = snapshots(&layers, path);
        if own == size {
            all["map"] = map(&clusters, self.disk.total(size), &sharers(&layers));
        }
        all
    }

    /// What a cluster with subclusters holds depends on who reads it: only the disk is asked.
    fn still_duplicate_with_subclusters(&self, layers: &Layers) -> Value {
        let size = layers.image.cluster_size();
        let clusters = self.disk.clusters(size);
        let held: Vec<_> = stored(layers).into_iter().filter_map(|lead| clusters.get(&lead.guest)).collect();
        let distinct = held.iter().collect::<BTreeSet<_>>().len();
        repeats((held.len() - distinct) as u64, held.len() as u64, size)
    }

    fn raw_clusters(&self, size: u64, clusters: &Clusters) -> Value {
        let (total, held) = (self.disk.total(size), allocated(self.name.as_ref(), size));
        json!({
            "cluster_size_bytes": size,
            "total_clusters": total,
            "allocated_clusters": held.len(),
            "compressed_clusters": 0,
            "zero_flagged_clusters": 0,
            "unallocated_clusters": total - held.len() as u64,
            "stored_zero_clusters": held.iter().filter(|cluster| !clusters.contains_key(cluster)).count(),
        })
    }
}

/// What repeats another one's content among `stored` clusters.
fn repeats(clusters: u64, stored: u64, size: u64) -> Value {
    json!({"clusters": clusters, "bytes": clusters * size, "percent": percent(clusters, stored)})
}

/// The entries of the disk that lead to a cluster and have no zero flag.
fn stored(layers: &Layers) -> Vec<&Leads> {
    layers.disk().filter(|lead| !lead.is_flagged_zero()).collect()
}

/// The guest clusters of the disk by how the file has them.
pub(super) fn qcow2_clusters(layers: &Layers, clusters: &Clusters) -> Value {
    let size = layers.image.cluster_size();
    let total = layers.image.header.size.div_ceil(size);
    let stored = stored(layers);
    let flagged = layers.zero_flagged + layers.disk().filter(|lead| lead.is_flagged_zero()).count() as u64;
    json!({
        "cluster_size_bytes": size,
        "total_clusters": total,
        "allocated_clusters": stored.len(),
        "compressed_clusters": stored.iter().filter(|lead| lead.is_compressed()).count(),
        "zero_flagged_clusters": flagged,
        "unallocated_clusters": total - stored.len() as u64 - flagged,
        "stored_zero_clusters": stored.iter().filter(|lead| !clusters.contains_key(&lead.guest)).count(),
    })
}

/// How many guest clusters of the disk use each stored cluster.
fn users(layers: &Layers) -> BTreeMap<u64, u64> {
    let mut users = BTreeMap::new();
    for lead in stored(layers) {
        *users.entry(lead.word).or_insert(0) += 1;
    }
    users
}

/// Guest clusters that have their host cluster in common with others.
fn sharers(layers: &Layers) -> BTreeSet<u64> {
    let users = users(layers);
    stored(layers).into_iter().filter(|lead| users[&lead.word] > 1).map(|lead| lead.guest).collect()
}

fn sharing(layers: &Layers) -> Value {
    let (users, size) = (users(layers), layers.image.cluster_size());
    let references: u64 = users.values().sum();
    let saved = references - users.len() as u64;
    let histogram: Value = rows(users.values().copied())
        .into_iter()
        .map(|row| {
            json!({
                "users_from": row.from,
                "users_to": row.to,
                "stored_clusters": row.numbers,
                "references_clusters": row.sum,
            })
        })
        .collect();
    json!({
        "stored_clusters": users.len(),
        "shared_clusters": users.values().filter(|users| **users > 1).count(),
        "saved_clusters": saved,
        "saved_bytes": saved * size,
        "saved_percent": percent(saved, references),
        "net_saved_bytes": (saved * size).cast_signed() - (pool_metadata(layers) * size).cast_signed(),
        "histogram": histogram,
    })
}

/// Clusters of the pool's own tables and its directory.
fn pool_metadata(layers: &Layers) -> u64 {
    let tables = layers.tables.values().filter(|by| by.contains(&By::Pool)).count();
    (tables + layers.directory.len()) as u64
}

fn file(layers: &Layers, path: &Path) -> Value {
    let (size, (used, leaked)) = (layers.image.cluster_size(), measured::used(path));
    let data = layers.data().len() as u64;
    json!({
        "cluster_size_bytes": size,
        "used_clusters": used,
        "data_clusters": data,
        "metadata_clusters": used - data,
        "metadata_bytes": (used - data) * size,
        "pool_metadata_bytes": pool_metadata(layers) * size,
        "leaked_clusters": leaked,
    })
}

/// SHA-256 of each different cluster that the disk or a snapshot uses; nothing for zeros.
fn used_contents(layers: &Layers) -> BTreeMap<u64, Option<[u8; 32]>> {
    let used = layers.leads.iter().filter(|lead| lead.by != By::Pool && !lead.is_flagged_zero());
    let name = |word| {
        let bytes = content(&layers.image, word);
        bytes.iter().any(|byte| *byte != 0).then(|| Sha256::digest(&bytes).into())
    };
    used.map(|lead| lead.word).collect::<BTreeSet<u64>>().into_iter().map(|word| (word, name(word))).collect()
}

/// What repeats another one's content: by counting, and where the sharer limit keeps copies apart, by what `dedup` leaves.
fn still_duplicate(layers: &Layers, after: Option<&Layers>) -> Value {
    let contents = used_contents(layers);
    let stored = contents.values().flatten().count() as u64;
    let distinct = contents.values().flatten().collect::<BTreeSet<_>>().len() as u64;
    let needed = match after {
        Some(after) if layers.image.header.refcount_order < 4 => used_contents(after).len() as u64,
        _ => distinct,
    };
    repeats(stored - needed, stored, layers.image.cluster_size())
}

/// What `dedup` finds, and what it made of a copy.
fn dedup(layers: &Layers, after: Option<&Layers>) -> Value {
    let Some(after) = after else { return json!({"refused": "*"}) };
    let contents = used_contents(layers);
    let zero = contents.values().filter(|name| name.is_none()).count();
    let kept: BTreeSet<u64> = used_contents(after).into_keys().collect();
    let freed = layers.data().len() - after.data().len();
    json!({
        "stored_clusters": contents.len(),
        "zero_clusters": zero,
        "duplicate_clusters": contents.iter().filter(|(word, name)| name.is_some() && !kept.contains(word)).count(),
        "freed_clusters": freed,
        "freed_bytes": freed as u64 * layers.image.cluster_size(),
        "pool_members": after.pool.as_ref().map_or(0, |pool| pool.members.len()),
        "file_allocated_after_bytes": "*",
    })
}

fn pool(layers: &Layers) -> Value {
    let Some(pool) = &layers.pool else { return Value::Null };
    let mut users: BTreeMap<u64, BTreeSet<u64>> = pool.members.iter().map(|word| (*word, BTreeSet::new())).collect();
    // A zero that keeps its place is no user, for `gc` neither.
    for lead in layers.leads.iter().filter(|lead| lead.by != By::Pool && !lead.is_flagged_zero()) {
        if let Some(users) = users.get_mut(&lead.word) {
            users.insert(lead.guest);
        }
    }
    json!({
        "members": pool.members.len(),
        "garbage_members": users.values().filter(|users| users.is_empty()).count(),
        "single_user_members": users.values().filter(|users| users.len() == 1).count(),
        "directory_valid": pool.valid,
    })
}

fn refcounts(layers: &Layers) -> Value {
    let bits = 1 << layers.image.header.refcount_order;
    let most = u64::MAX >> (64 - bits);
    let references: BTreeMap<u64, u64> =
        layers.data().into_iter().map(|(cluster, by)| (cluster, by.values().sum())).collect();
    let highest = references.values().copied().max().unwrap_or(0);
    let limit = (bits >= 4).then(|| (1_u64 << (bits - 2)) - 1);
    // Compressed members have their references on whatever clusters they touch.
    let taken: BTreeMap<u64, u64> = layers
        .leads
        .iter()
        .filter(|lead| lead.by == By::Pool)
        .map(|lead| (lead.word, layers.host_clusters(lead).map(|cluster| references[&cluster]).max().unwrap()))
        .collect();
    let full = |pool: &Pool| {
        let takes_none = |(word, retired): &(&u64, &bool)| **retired || Some(taken[*word] - 1) >= limit;
        pool.members.iter().zip(&pool.retired).filter(takes_none).count()
    };
    json!({
        "refcount_bits": bits,
        "max_references": most,
        "highest_references": highest,
        "head_room_references": most - highest,
        "sharer_limit": limit,
        "full_members": layers.pool.as_ref().map_or(0, full),
    })
}

/// What only one snapshot needs: by counting, and by deleting it.
#[track_caller]
fn snapshots(layers: &Layers, path: &Path) -> Value {
    let size = layers.image.cluster_size();
    let figures = |(place, snapshot): &(usize, Snapshot)| {
        let clusters = layers.clusters_of(By::Snapshot(*place));
        let freed = measured::freed_by_deleting(path, &snapshot.name);
        assert_eq!(clusters, freed, "{}: snapshot {}, counted and measured", path.display(), snapshot.id);
        json!({
            "id": snapshot.id,
            "name": snapshot.name,
            "exclusive_clusters": clusters,
            "exclusive_bytes": clusters * size,
        })
    };
    layers.snapshots.iter().map(figures).collect()
}
