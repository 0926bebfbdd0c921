//! The summary of a conversion, for people or for programs.

use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table, presets};
use dedup_img::name::shown;
use dedup_img::{ConvertReport, ErrorKind, Format, OverwriteReport, RawReport, Unreadable, Words};
use serde::Serialize;

use super::units::{bytes, count};
use crate::cli::OutputArg;

/// The version of the JSON objects; it changes when a key changes its meaning or goes away.
pub(super) const SCHEMA_VERSION: u32 = 1;

/// What was converted into what.
pub(crate) struct Context<'a> {
    pub(crate) sources: &'a [PathBuf],
    pub(crate) source_format: Format,
    pub(crate) target: &'a Path,
    pub(crate) target_format: Format,
    pub(crate) unreadable: &'a [Unreadable],
}

impl Context<'_> {
    fn unreadable_bytes(&self) -> u64 {
        self.unreadable.iter().map(|part| part.range.end - part.range.start).sum()
    }

    /// Tells what could not be read, where that is anything.
    fn add_unreadable(&self, rows: &mut Rows) {
        match self.unreadable_bytes() {
            0 => {}
            lost => rows.add("unreadable", bytes(lost), "zeros in the target"),
        }
    }
}

/// A part of a source that could not be read, in the words of qemu-img and with how much it is.
pub(crate) fn unreadable(part: &Unreadable) -> String {
    // What the operating system says needs no more than the offset; where a table or a compressed cluster is damaged, the sentence
    // names the file. To salvage is what is being done.
    let reason = match part.error.kind() {
        ErrorKind::Io => part.error.reason().to_owned(),
        _ => part.error.worded(|_| Words::Added("".into())),
    };
    let is_named = part.error.kind() != ErrorKind::Io && part.error.path().is_some();
    let file = if is_named { String::new() } else { format!("'{}': ", shown(&part.path)) };
    let (start, length) = (part.range.start, part.range.end - part.range.start);
    format!("error while reading offset {start}: {reason} ({file}{length} bytes, zeros in the target)")
}

/// A source that somebody may write while it is read.
pub(crate) fn mounted(source: &Path, point: &Path) -> String {
    let (source, point) = (shown(source), shown(point));
    format!(
        "'{source}' is mounted writable at '{point}': what is written there meanwhile may be converted by halves; \
         unmount it, mount it read-only, or convert a snapshot of it"
    )
}

/// A source of which only its bytes tell whether it was written.
pub(crate) fn restless(path: &Path) -> String {
    format!(
        "the times of '{}' change by themselves and do not tell whether it is written: it is read twice, and compared",
        shown(path)
    )
}

#[derive(Serialize)]
struct Summary<'a, R: Serialize> {
    schema_version: u32,
    source: String,
    sources: Vec<String>,
    source_format: String,
    target: String,
    target_format: String,
    #[serde(flatten)]
    report: &'a R,
    unreadable_bytes: u64,
    peak_memory_bytes: u64,
}

/// The summary of a conversion into QCOW2.
pub(crate) fn convert(context: &Context<'_>, report: &ConvertReport, output: OutputArg) -> String {
    if output == OutputArg::Json {
        return json(context, report);
    }
    let clusters = |n| count(n, "cluster");
    let size = |n: u64| bytes(n * report.cluster_size_bytes);
    let mut rows = Rows::new();
    rows.add("virtual size", bytes(report.virtual_size_bytes), "");
    let known = match report.snapshots {
        None => "the rest is known to be zeros",
        Some(snapshots) => {
            rows.add("snapshots", snapshots.to_string(), "");
            "the rest is zeros, or as in a newer snapshot"
        }
    };
    rows.add("read", bytes(report.read_bytes), known);
    context.add_unreadable(&mut rows);
    rows.add("zeros", bytes(report.zero_bytes), "not stored");
    if report.backing_clusters > 0 {
        let remark = format!("{} that the backing file has", clusters(report.backing_clusters));
        rows.add("unchanged", size(report.backing_clusters), &remark);
    }
    rows.add("data", size(report.data_clusters), &clusters(report.data_clusters));
    if !report.plain {
        rows.add(
            "stored",
            size(report.stored_clusters),
            &format!("{} of different content", clusters(report.stored_clusters)),
        );
        rows.add(
            "shared",
            size(report.shared_clusters),
            &format!("{} with two or more users", clusters(report.shared_clusters)),
        );
    }
    if report.compressed_clusters > 0 {
        let remark = format!("for {} of the stored", clusters(report.compressed_clusters));
        rows.add("compressed", bytes(report.compressed_bytes), &remark);
    }
    if !report.plain {
        rows.add("saved", bytes(report.saved_bytes), &format!("{:.1} % of the data", report.saved_percent));
    }
    rows.add("file", bytes(report.file_length_bytes), &shown(context.target));
    rows.add("cluster size", bytes(report.cluster_size_bytes), reason(report));
    let hint = report.l2_cache_size_bytes.map_or(String::new(), |size| {
        let size = size.div_ceil(1 << 20);
        format!(
            "\nQEMU caches the L2 tables of this disk only with l2-cache-size={size}M.\nWithout, random I/O is slower.\n"
        )
    });
    rows.finish(report.seconds) + &lengths(report) + &hint
}

/// The summary of a conversion into an image that was there.
pub(crate) fn into(context: &Context<'_>, report: &OverwriteReport, output: OutputArg) -> String {
    if output == OutputArg::Json {
        return json(context, report);
    }
    let clusters = |n| count(n, "cluster");
    let size = |n: u64| bytes(n * report.cluster_size_bytes);
    let mut rows = Rows::new();
    rows.add("virtual size", bytes(report.virtual_size_bytes), "");
    rows.add("compared", bytes(report.read_bytes), "the rest is known to be zeros on both sides");
    context.add_unreadable(&mut rows);
    rows.add("unchanged", size(report.unchanged_clusters), &clusters(report.unchanged_clusters));
    rows.add("zeroed", size(report.zeroed_clusters), &clusters(report.zeroed_clusters));
    rows.add("changed", size(report.changed_clusters), &clusters(report.changed_clusters));
    rows.add(
        "reused",
        size(report.reused_clusters),
        &format!("{} that the image had", clusters(report.reused_clusters)),
    );
    rows.add("written", bytes(report.written_bytes), &format!("{} of new content", clusters(report.written_clusters)));
    let before = match report.file_length_before_bytes == report.file_length_after_bytes {
        true => String::new(),
        false => format!(", {} before", bytes(report.file_length_before_bytes)),
    };
    rows.add("file", bytes(report.file_length_after_bytes), &format!("{}{before}", shown(context.target)));
    if report.upgraded {
        rows.add("version", "3".to_owned(), "2 before");
    }
    rows.finish(report.seconds)
}

/// The summary of a conversion into raw.
pub(crate) fn raw(context: &Context<'_>, report: &RawReport, output: OutputArg) -> String {
    if output == OutputArg::Json {
        return json(context, report);
    }
    let mut rows = Rows::new();
    rows.add("virtual size", bytes(report.virtual_size_bytes), "");
    rows.add("read", bytes(report.read_bytes), "the rest is known to be zeros");
    context.add_unreadable(&mut rows);
    rows.add("written", bytes(report.written_bytes), "the rest is zeros");
    rows.add("file", bytes(report.allocated_bytes), &shown(context.target));
    rows.finish(report.seconds)
}

fn reason(report: &ConvertReport) -> &'static str {
    let shortest = report.cluster_sizes.iter().map(|choice| choice.file_length_bytes).min();
    let chosen = report.cluster_sizes.iter().find(|choice| choice.cluster_size_bytes == report.cluster_size_bytes);
    match (chosen.map(|choice| choice.file_length_bytes), report.cluster_size_reason) {
        (None, "backing") => "that of the backing file",
        (None, "default") => "as qemu-img takes it",
        (None, _) => "as asked for",
        (length, _) if length == shortest => "smallest file",
        _ => "nearly the smallest file",
    }
}

/// What the file would be at each cluster size that there was to choose from.
fn lengths(report: &ConvertReport) -> String {
    if report.cluster_sizes.is_empty() {
        return String::new();
    }
    let sizes = report.cluster_sizes.iter().rev();
    let sizes = sizes.map(|c| format!("{}k {}", c.cluster_size_bytes >> 10, bytes(c.file_length_bytes)));
    // How far all of it can be compressed is known of a part of it only.
    let what = if report.compressed { "Estimated" } else { "Lengths" };
    format!("\n{what}: {}\n", sizes.collect::<Vec<_>>().join(", "))
}

/// Rows of label, figure and remark.
pub(super) struct Rows(Table);

impl Rows {
    pub(super) fn new() -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        Self(table)
    }

    pub(super) fn add(&mut self, label: &str, figure: String, remark: &str) {
        self.0.add_row([label.to_owned(), figure, remark.to_owned()]);
    }

    pub(super) fn finish(mut self, seconds: f64) -> String {
        let memory = format!("{} of memory at most", bytes(peak_memory()));
        self.add("time", format!("{seconds:.2} s"), &memory);
        self.text()
    }

    /// The rows so far, without the time.
    pub(super) fn text(mut self) -> String {
        if let Some(figures) = self.0.column_mut(1) {
            figures.set_cell_alignment(CellAlignment::Right);
        }
        self.0.trim_fmt() + "\n"
    }
}

fn json(context: &Context<'_>, report: &impl Serialize) -> String {
    let sources: Vec<String> = context.sources.iter().map(|source| source.display().to_string()).collect();
    let summary = Summary {
        schema_version: SCHEMA_VERSION,
        source: sources.first().cloned().unwrap_or_default(),
        sources,
        source_format: context.source_format.to_string(),
        target: context.target.display().to_string(),
        target_format: context.target_format.to_string(),
        report,
        unreadable_bytes: context.unreadable_bytes(),
        peak_memory_bytes: peak_memory(),
    };
    pretty(&summary)
}

/// JSON as qemu-img prints it: indented by four.
pub(super) fn pretty(value: &impl Serialize) -> String {
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    // A struct of numbers and strings always serialises.
    let _ = value.serialize(&mut serializer);
    String::from_utf8_lossy(&text).into_owned() + "\n"
}

/// The most memory that the process has had resident, in bytes; 0 where the system does not tell.
pub(super) fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
