//! Counting contents, the obvious way.

use super::disk::{Clusters, Name};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A part of a whole in percent; 0 of nothing.
pub(super) fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// How often each content occurs.
pub(super) fn times(disks: &[&Clusters]) -> BTreeMap<Name, u64> {
    let mut times = BTreeMap::new();
    for name in disks.iter().flat_map(|disk| disk.values()) {
        *times.entry(*name).or_insert(0) += 1;
    }
    times
}

/// Data, distinct and duplicate clusters.
pub(super) fn content(disks: &[&Clusters], size: u64) -> Value {
    let data: u64 = disks.iter().map(|disk| disk.len() as u64).sum();
    let distinct = times(disks).len() as u64;
    json!({
        "data_clusters": data,
        "data_bytes": data * size,
        "distinct_clusters": distinct,
        "distinct_bytes": distinct * size,
        "duplicate_clusters": data - distinct,
        "duplicate_bytes": (data - distinct) * size,
        "duplicate_percent": percent(data - distinct, data),
    })
}

/// A row of a histogram: numbers from here to there, how many they are, and their sum.
pub(super) struct Row {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) numbers: u64,
    pub(super) sum: u64,
}

/// 1, 2 to 3, 4 to 7, and so on to the last row that is not empty.
pub(super) fn rows(numbers: impl IntoIterator<Item = u64>) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for number in numbers {
        while rows.last().is_none_or(|row| row.to < number) {
            let from = rows.last().map_or(1, |row| row.to + 1);
            rows.push(Row { from, to: 2 * from - 1, numbers: 0, sum: 0 });
        }
        let row = rows.iter_mut().find(|row| row.from <= number && number <= row.to).unwrap();
        row.numbers += 1;
        row.sum += number;
    }
    rows
}

/// How many contents occur how often.
pub(super) fn histogram(disks: &[&Clusters], size: u64) -> Value {
    let row = |row: Row| {
        json!({
            "times_from": row.from,
            "times_to": row.to,
            "contents": row.numbers,
            "contents_bytes": row.numbers * size,
            "references_clusters": row.sum,
            "references_bytes": row.sum * size,
        })
    };
    rows(times(disks).into_values()).into_iter().map(row).collect()
}

/// The contents that occur most often, the first of them first.
pub(super) fn top(disks: &[&Clusters], size: u64, most: usize) -> Value {
    let mut first = BTreeMap::new();
    for (image, disk) in disks.iter().enumerate() {
        for (cluster, name) in *disk {
            first.entry(*name).or_insert((image, *cluster));
        }
    }
    let again = times(disks).into_iter().filter(|(_, times)| *times > 1);
    let mut list: Vec<_> = again.map(|(name, times)| (times, first[&name], name)).collect();
    list.sort_by(|one, other| other.0.cmp(&one.0).then(one.1.cmp(&other.1)));
    let entry = |(times, (image, cluster), name): (u64, (usize, u64), Name)| {
        let hexadecimal: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({
            "times": times,
            "bytes": times * size,
            "sha256": hexadecimal,
            "guess": "*",
            "first_image": image,
            "first_offset_bytes": cluster * size,
        })
    };
    list.into_iter().take(most).map(entry).collect()
}

/// The disk in 64 cells; `sharers` are the guest clusters that have a host cluster in common with another one.
pub(super) fn map(disk: &Clusters, total: u64, sharers: &BTreeSet<u64>) -> Value {
    let times = times(&[disk]);
    let cells = total.min(64);
    let cell = |k: u64| {
        let (mut zero, mut unique, mut duplicate, mut shared) = (0, 0, 0, 0);
        for cluster in k * total / cells..(k + 1) * total / cells {
            match disk.get(&cluster) {
                None => zero += 1,
                Some(_) if sharers.contains(&cluster) => shared += 1,
                Some(name) if times[name] > 1 => duplicate += 1,
                Some(_) => unique += 1,
            }
        }
        json!({"zero_clusters": zero, "unique_clusters": unique, "duplicate_clusters": duplicate, "shared_clusters": shared})
    };
    json!({"cells": (0..cells).map(cell).collect::<Value>()})
}

/// For each two disks: the data clusters of the first whose content the second has too.
pub(super) fn overlap(disks: &[&Clusters]) -> Value {
    let contents: Vec<BTreeSet<Name>> = disks.iter().map(|disk| disk.values().copied().collect()).collect();
    let common = |a: &Clusters, b: &BTreeSet<Name>| a.values().filter(|name| b.contains(*name)).count();
    disks.iter().map(|a| contents.iter().map(|b| common(a, b)).collect::<Value>()).collect()
}

/// Disk by disk: the contents that none before it has, and all so far.
pub(super) fn growth(disks: &[&Clusters], size: u64) -> Value {
    let mut before = BTreeSet::new();
    let step = |disk: &&Clusters| {
        let old = before.len();
        before.extend(disk.values().copied());
        let (new, all) = (before.len() - old, before.len());
        json!({
            "new_clusters": new,
            "new_bytes": new as u64 * size,
            "total_clusters": all,
            "total_bytes": all as u64 * size,
        })
    };
    disks.iter().map(step).collect()
}

/// For each disk: the contents that no other one has.
pub(super) fn exclusive(disks: &[&Clusters], size: u64) -> Value {
    let own = |k: usize| {
        let others: BTreeSet<Name> =
            disks.iter().enumerate().filter(|(n, _)| *n != k).flat_map(|(_, disk)| disk.values().copied()).collect();
        let own: BTreeSet<Name> = disks[k].values().copied().collect();
        own.difference(&others).count() as u64
    };
    (0..disks.len()).map(|k| json!({"clusters": own(k), "bytes": own(k) * size})).collect()
}
