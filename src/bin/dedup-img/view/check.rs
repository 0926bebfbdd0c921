//! The result of a check, in qemu-img's words and keys.

use std::fmt::Write;
use std::path::Path;

use dedup_img::Repaired;
use serde::Serialize;

use super::summary::{SCHEMA_VERSION, pretty};
use crate::advice;

/// The summary for people.
pub(crate) fn human(repaired: &Repaired) -> String {
    let mut text = String::new();
    if repaired.leaks_fixed + repaired.corruptions_fixed > 0 {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            repaired.leaks_fixed, repaired.corruptions_fixed
        );
    }
    if repaired.unmarked {
        text.push_str("The image was marked corrupt; the mark was taken away.\n");
    }
    let report = &repaired.report;
    let errors = [report.corruptions, report.findings_beyond, report.leaks, report.check_errors];
    if errors == [0; 4] {
        text.push_str("No errors were found on the image.\n");
    }
    // Writing to a string cannot fail.
    let mut say = |count: u64, message: &str| {
        if count > 0 {
            let _ = write!(text, "\n{count} {message}\n");
        }
    };
    say(
        report.corruptions,
        "errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
    );
    say(
        report.findings_beyond,
        "errors were found that qemu-img check does not look for.\n\
         Data may be corrupted, or further writes to the image may corrupt it.",
    );
    say(report.leaks, "leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.");
    say(report.check_errors, "internal errors have occurred during the check.");
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        let _ = writeln!(
            text,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", report.image_end_offset);
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

/// `ImageCheck` of QEMU, with five keys of our own.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageCheck {
    /// As all summaries have it.
    #[serde(rename = "schema_version")]
    schema_version: u32,
    filename: String,
    format: &'static str,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    findings_beyond: u64,
    #[serde(skip_serializing_if = "is_zero")]
    benign: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    unmarked: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls it with")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The result for programs.
pub(crate) fn json(file: &Path, repaired: &Repaired) -> String {
    let report = &repaired.report;
    pretty(&ImageCheck {
        schema_version: SCHEMA_VERSION,
        filename: file.display().to_string(),
        format: "qcow2",
        check_errors: report.check_errors,
        image_end_offset: report.image_end_offset,
        corruptions: report.corruptions,
        leaks: report.leaks,
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
        corruptions_fixed: repaired.corruptions_fixed,
        leaks_fixed: repaired.leaks_fixed,
        findings_beyond: report.findings_beyond,
        benign: report.benign,
        unmarked: repaired.unmarked.then_some(true),
        refused: repaired.refused.as_ref().map(|why| advice::advised(why, why.advice())),
    })
}
