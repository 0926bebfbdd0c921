//! The summary of a collection.

use std::path::Path;

use dedup_img::name::shown;
use dedup_img::{GcOptions, GcReport};
use serde::Serialize;

use super::room;
use super::summary::{Rows, SCHEMA_VERSION, peak_memory, pretty};
use super::units::{bytes, count, grouped};
use crate::cli::OutputArg;

#[derive(Serialize)]
struct Summary<'a> {
    schema_version: u32,
    filename: String,
    dry_run: bool,
    #[serde(flatten)]
    report: &'a GcReport,
    peak_memory_bytes: u64,
}

/// What was done, or would be.
pub(crate) fn summary(file: &Path, report: &GcReport, options: GcOptions, dry_run: bool, output: OutputArg) -> String {
    if output == OutputArg::Json {
        return pretty(&Summary {
            schema_version: SCHEMA_VERSION,
            filename: file.display().to_string(),
            dry_run,
            report,
            peak_memory_bytes: peak_memory(),
        });
    }
    let mut rows = Rows::new();
    let mut add = |label: &str, n: u64, noun: &str, remark: &str| {
        let size = bytes(n * report.cluster_size_bytes);
        rows.add(label, size, &format!("{}{remark}", count(n, noun)));
    };
    add("leaked", report.leaked_clusters, "cluster", ", refcount too high");
    add("garbage", report.garbage_members, "pool member", " that nothing else used");
    add("un-pooled", report.unpooled_members, "pool member", " with one user left");
    add("freed", report.freed_clusters, "cluster", ", the pool's own not counted");
    if options.compact {
        let copied = format!(", into holes; {} to copy", bytes(report.copied_bytes));
        add("moved", report.moved_clusters, "cluster", if dry_run { &copied } else { ", into holes" });
    }
    let members = match (report.pool_dropped, report.directory_rebuilt) {
        (true, _) => "the pool is removed",
        (_, true) => "its directory was lost and is made anew",
        _ => "kept in the pool",
    };
    rows.add("members", grouped(report.pool_members), members);
    let before = format!("{} before; {}", bytes(report.file_length_before_bytes), shown(file));
    rows.add("file length", bytes(report.file_length_after_bytes), &before);
    // A block device does not say what it occupies.
    let is_device = report.allocated_before_bytes == 0;
    if dry_run && !is_device {
        rows.add("on disk", bytes(report.allocated_before_bytes), "nothing was written");
    } else if !is_device {
        let before = format!("{} before", bytes(report.allocated_before_bytes));
        rows.add("on disk", bytes(report.allocated_after_bytes), &before);
    }
    if dry_run {
        room::add(&mut rows, report.room_needed_bytes, report.room_least_bytes, report.room_available_bytes);
    }
    let mut text = rows.finish(report.seconds);
    if dry_run && is_device {
        text += "\nNothing was written.\n";
    }
    if !report.changed {
        text += "\nThere was nothing to do.\n";
    }
    text
}
