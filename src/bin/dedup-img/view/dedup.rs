//! The summary of a deduplication in place.

use std::path::Path;

use dedup_img::name::shown;
use dedup_img::{DedupPlan, DedupReport, Result};
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
    report: &'a DedupReport,
    peak_memory_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<Shown>,
}

/// A plan as it is shown.
#[derive(Serialize)]
struct Shown {
    share: Vec<Share>,
    zero: Vec<u64>,
}

#[derive(Serialize)]
struct Share {
    duplicate: u64,
    keeper: u64,
    references: u64,
}

/// What would be done.
pub(crate) fn planned(file: &Path, plan: &DedupPlan<'_>, report: &DedupReport, output: OutputArg) -> Result<String> {
    if output == OutputArg::Human {
        return Ok(human(file, report, true));
    }
    let share = |share: dedup_img::Share| Share {
        duplicate: share.duplicate.0,
        keeper: share.keeper.0,
        references: share.references,
    };
    let shown = Shown {
        share: plan.shares().map(|one| one.map(share)).collect::<Result<_>>()?,
        zero: plan.zeros().map(|host| host.0).collect(),
    };
    Ok(json(file, report, Some(shown)))
}

/// What was done.
pub(crate) fn done(file: &Path, report: &DedupReport, output: OutputArg) -> String {
    match output {
        OutputArg::Human => human(file, report, false),
        OutputArg::Json => json(file, report, None),
    }
}

fn json(file: &Path, report: &DedupReport, plan: Option<Shown>) -> String {
    pretty(&Summary {
        schema_version: SCHEMA_VERSION,
        filename: file.display().to_string(),
        dry_run: plan.is_some(),
        report,
        peak_memory_bytes: peak_memory(),
        plan,
    })
}

fn human(file: &Path, report: &DedupReport, dry_run: bool) -> String {
    let size = |n: u64| bytes(n * report.cluster_size_bytes);
    let clusters = |n| count(n, "cluster");
    let mut rows = Rows::new();
    let mut add = |label: &str, n: u64, remark: &str| {
        rows.add(label, size(n), &format!("{}{remark}", clusters(n)));
    };
    add("data", report.scanned_clusters, " that the disk or a snapshot uses");
    add("read", report.read_clusters, "");
    add("zeros", report.zero_clusters, ", not to be stored");
    add("duplicates", report.duplicate_clusters, " with the content of another");
    add("newly shared", report.newly_shared_clusters, " taking the place of duplicates");
    add("in the pool", report.pool_members, &format!(", {} in use before", grouped(report.already_shared_clusters)));
    if report.leaked_clusters > 0 {
        add("leaked", report.leaked_clusters, ", refcount too high");
    }
    add("freed", report.freed_clusters, if dry_run { ", would be given back" } else { ", given back" });
    if dry_run {
        rows.add("on disk", bytes(report.allocated_before_bytes), &format!("{}; nothing was written", shown(file)));
        room::add(&mut rows, report.room_needed_bytes, report.room_needed_bytes, report.room_available_bytes);
    } else if report.allocated_before_bytes > 0 {
        let before = format!("{} before; {}", bytes(report.allocated_before_bytes), shown(file));
        rows.add("on disk", bytes(report.allocated_after_bytes), &before);
    }
    if !dry_run {
        let before = format!("{} before", bytes(report.file_length_before_bytes));
        rows.add("file length", bytes(report.file_length_after_bytes), &before);
    }
    let mut text = rows.finish(report.seconds);
    if report.upgraded {
        let verb = if dry_run { "would become" } else { "became" };
        text +=
            &format!("\nThe version 2 image {verb} version 3: a version 2 image with a snapshot cannot be resized.\n");
    }
    if !report.changed {
        text += "\nThere was nothing to do.\n";
    }
    text
}
