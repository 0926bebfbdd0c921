//! Statistics for people: tables of at most 80 columns.

use dedup_img::name::shown;
use dedup_img::stats::{
    Action, Advice, Content, CurvePoint, Forecast, ImageStats, Occurrences, Qcow2Stats, Repeated, StatsReport, hex,
};

use super::map;
use super::table::Figures;
use crate::view::summary::{Rows, peak_memory};
use crate::view::units::{bytes, count, grouped};

/// Columns of the overlap matrix that fit beside each other.
const ACROSS: usize = 8;
/// The width of a terminal.
const COLUMNS: usize = 80;
/// Digits of a SHA-256 that are shown.
const DIGITS: usize = 16;

/// All figures.
pub(super) fn summary(report: &StatsReport) -> String {
    let mut text = String::new();
    match report.images.as_slice() {
        [image] => single(&mut text, image, report),
        images => many(&mut text, images, report),
    }
    if let Some(histogram) = &report.histogram {
        text += &occurrences(histogram);
    }
    if let Some(top) = report.top.as_ref().filter(|top| !top.is_empty()) {
        text += &frequent(top, report.images.len() > 1);
    }
    if let Some(points) = &report.curve {
        text += &curve(points, report);
    }
    if let Some(advice) = &report.recommendation {
        text += &recommended(advice);
    }
    text += &format!("\ntime {:.2} s, {} of memory at most\n", report.seconds, bytes(peak_memory()));
    text
}

/// A percentage.
fn share(percent: f64) -> String {
    format!("{percent:.1} %")
}

/// `12,345 clusters` and a remark.
fn clusters(number: u64, remark: &str) -> String {
    format!("{} {remark}", count(number, "cluster")).trim_end().to_owned()
}

fn single(text: &mut String, image: &ImageStats, report: &StatsReport) {
    *text += &format!("{}: {}\n\n", shown(&image.filename), image.format);
    let mut rows = Rows::new();
    disk_rows(&mut rows, image);
    if let Some(content) = &image.content {
        if image.disk.cluster_size_bytes != report.cluster_size_bytes {
            let remark = "in which the next three are counted";
            rows.add("clusters of", bytes(report.cluster_size_bytes), remark);
        }
        content_rows(&mut rows, content);
    }
    *text += &rows.text();
    if let Some(qcow2) = &image.qcow2 {
        *text += &file(qcow2);
        if !qcow2.snapshots.is_empty() {
            *text += &snapshots(qcow2);
        }
        if report.quick {
            *text += &users(qcow2);
        }
    }
    if let Some(map) = image.map.as_ref().filter(|map| !map.cells.is_empty()) {
        let piece = bytes(image.virtual_size_bytes / map.cells.len() as u64);
        *text += &format!("\nWhere (a letter is {piece}): . zeros, u unique, d duplicate, s shared\n\n");
        *text += &format!(" {}\n", map::line(map));
    }
}

fn disk_rows(rows: &mut Rows, image: &ImageStats) {
    let disk = &image.disk;
    let size = |n: u64| bytes(n * disk.cluster_size_bytes);
    rows.add(
        "virtual size",
        bytes(image.virtual_size_bytes),
        &clusters(disk.total_clusters, &of(disk.cluster_size_bytes)),
    );
    let length = bytes(image.file_length_bytes);
    if image.file_allocated_bytes == 0 && disk.allocated_clusters > 0 {
        rows.add("file", length, "long; a device does not say what it occupies");
    } else {
        rows.add("file", bytes(image.file_allocated_bytes), &format!("on the disk, of a length of {length}"));
    }
    let how = if image.qcow2.is_some() { "with a place in the file" } else { "outside of holes" };
    rows.add("allocated", size(disk.allocated_clusters), &clusters(disk.allocated_clusters, how));
    if disk.compressed_clusters > 0 {
        rows.add(
            "compressed",
            size(disk.compressed_clusters),
            &clusters(disk.compressed_clusters, "of these, before compression"),
        );
    }
    if let Some(zeros) = disk.stored_zero_clusters {
        rows.add("zeros stored", size(zeros), &clusters(zeros, "of these, all zeros"));
    }
    if image.qcow2.is_some() {
        let zeros = disk.zero_flagged_clusters;
        rows.add("zero flag", size(zeros), &clusters(zeros, "with the zero flag"));
    }
}

fn of(size: u64) -> String {
    format!("of {}", bytes(size))
}

fn content_rows(rows: &mut Rows, content: &Content) {
    rows.add("data", bytes(content.data_bytes), &format!("{}, not zeros", count(content.data_clusters, "cluster")));
    rows.add(
        "contents",
        bytes(content.distinct_bytes),
        &format!("{} in the data", count(content.distinct_clusters, "different content")),
    );
    let remark = format!("data less contents, {} of the data", share(content.duplicate_percent));
    rows.add("duplicates", bytes(content.duplicate_bytes), &remark);
}

/// What only a QCOW2 file has.
fn file(qcow2: &Qcow2Stats) -> String {
    let (file, sharing) = (&qcow2.file, &qcow2.sharing);
    let size = |n: u64| bytes(n * file.cluster_size_bytes);
    let mut rows = Rows::new();
    rows.add(
        "metadata",
        bytes(file.metadata_bytes),
        &format!("of {} in use; the pool's own {}", size(file.used_clusters), bytes(file.pool_metadata_bytes)),
    );
    if file.leaked_clusters > 0 {
        rows.add(
            "leaked",
            size(file.leaked_clusters),
            &clusters(file.leaked_clusters, "with a refcount that is too high"),
        );
    }
    rows.add(
        "stored",
        size(sharing.stored_clusters),
        &clusters(sharing.stored_clusters, &format!("for the allocated, {} shared", grouped(sharing.shared_clusters))),
    );
    rows.add(
        "saved now",
        bytes(sharing.saved_bytes),
        &format!("allocated less stored, {} of the allocated", share(sharing.saved_percent)),
    );
    let (sign, net) = (if sharing.net_saved_bytes < 0 { "-" } else { "" }, sharing.net_saved_bytes.unsigned_abs());
    rows.add("net", format!("{sign}{}", bytes(net)), "saved now less the pool's own metadata");
    match &qcow2.dedup {
        None => {}
        Some(Forecast::Refused { .. }) => rows.add("dedup frees", "-".to_owned(), "refused, see below"),
        Some(Forecast::Done(done)) => {
            let remark =
                format!("{}, {} of zeros", count(done.duplicate_clusters, "duplicate"), grouped(done.zero_clusters));
            rows.add("dedup frees", bytes(done.freed_bytes), &remark);
            rows.add(
                "dedup leaves",
                bytes(done.file_allocated_after_bytes),
                &format!("on the disk, with {}", count(done.pool_members, "pool member")),
            );
        }
    }
    match &qcow2.pool {
        None => rows.add("pool", "none".to_owned(), ""),
        Some(pool) => {
            let (garbage, single) = (grouped(pool.garbage_members), grouped(pool.single_user_members));
            let noun = if pool.members == 1 { "member" } else { "members" };
            let remark = format!("{noun}; {garbage} garbage, {single} with one user");
            rows.add("pool", grouped(pool.members), &remark);
            if !pool.directory_valid {
                rows.add("directory", "lost".to_owned(), "dedup and gc make a new one");
            }
        }
    }
    let refcounts = &qcow2.refcounts;
    let most = match refcounts.refcount_bits {
        ..=16 => grouped(refcounts.max_references),
        bits => format!("2^{bits} - 1"),
    };
    let room = format!("the highest of a data cluster; {most} would fit");
    rows.add("refcount", grouped(refcounts.highest_references), &room);
    let mut text = format!("\n{}", rows.text());
    if let Some(Forecast::Refused { refused, .. }) = &qcow2.dedup {
        text += &format!("\n{}", wrapped(&format!("dedup refuses: {refused}")));
    }
    text
}

/// `text` in lines of at most 80 columns, broken between words.
fn wrapped(text: &str) -> String {
    let mut lines = String::new();
    let mut width = 0;
    for word in text.split(' ') {
        if width > 0 && width + 1 + word.len() > COLUMNS {
            lines.push('\n');
            width = 0;
        } else if width > 0 {
            lines.push(' ');
            width += 1;
        }
        lines += word;
        width += word.len();
    }
    lines + "\n"
}

fn snapshots(qcow2: &Qcow2Stats) -> String {
    let mut table = Figures::new(["id", "exclusive", "name"], &[0, 2]);
    for snapshot in &qcow2.snapshots {
        table.add([shown(&snapshot.id), bytes(snapshot.exclusive_bytes), shown(&snapshot.name)]);
    }
    let note = if qcow2.pool.is_some() { ", and gc after it," } else { "" };
    format!("\nSnapshots: what deleting one{note} gives back\n\n{}", table.text())
}

fn users(qcow2: &Qcow2Stats) -> String {
    if qcow2.sharing.histogram.is_empty() {
        return String::new();
    }
    let mut table = Figures::new(["users", "stored", "size", "used by", "size"], &[]);
    let size = |n: u64| bytes(n * qcow2.file.cluster_size_bytes);
    for row in &qcow2.sharing.histogram {
        let (stored, references) = (row.stored_clusters, row.references_clusters);
        table.add([
            range(row.users_from, row.users_to),
            grouped(stored),
            size(stored),
            grouped(references),
            size(references),
        ]);
    }
    format!("\nStored clusters by the number of the disk's clusters that use them\n\n{}", table.text())
}

fn range(from: u64, to: u64) -> String {
    if from == to { grouped(from) } else { format!("{}-{}", grouped(from), grouped(to)) }
}

fn many(text: &mut String, images: &[ImageStats], report: &StatsReport) {
    *text += &format!(
        "{}, content counted in clusters of {}\n\n",
        count(images.len() as u64, "image"),
        bytes(report.cluster_size_bytes)
    );
    for (image, number) in images.iter().zip(1..) {
        *text += &format!(
            " {number:>3}  {} ({}, {})\n",
            shown(&image.filename),
            image.format,
            bytes(image.virtual_size_bytes)
        );
    }
    let mut table = Figures::new(["", "file", "data", "contents", "duplicates", "only here", "new", "so far"], &[]);
    let (growth, exclusive) = (report.growth.iter().flatten(), report.exclusive.iter().flatten());
    let contents = images.iter().map(|image| image.content.as_ref());
    for ((((image, number), content), growth), only) in images.iter().zip(1..).zip(contents).zip(growth).zip(exclusive)
    {
        let Some(content) = content else { continue };
        table.add([
            number.to_string(),
            bytes(image.file_allocated_bytes),
            bytes(content.data_bytes),
            bytes(content.distinct_bytes),
            share(content.duplicate_percent),
            bytes(only.bytes),
            bytes(growth.new_bytes),
            bytes(growth.total_bytes),
        ]);
    }
    if let Some(all) = &report.content {
        table.add([
            "all".to_owned(),
            bytes(images.iter().map(|image| image.file_allocated_bytes).sum()),
            bytes(all.data_bytes),
            bytes(all.distinct_bytes),
            share(all.duplicate_percent),
        ]);
        *text += &format!("\n{}", table.text());
        *text += "\ndata: not zeros; duplicates: data less contents, of the data; only here: what no\n\
                  other image has; new: what none before it has; so far: the sum of what is new\n";
    }
    if images.iter().any(|image| image.qcow2.is_some()) {
        *text += &stored(images, report.quick);
    }
    if let Some(overlap) = &report.overlap {
        *text += &matrix(overlap);
    }
    let maps = images.iter().zip(1..).filter_map(|(image, number)| Some((image.map.as_ref()?, number)));
    let lines: String = maps
        .filter(|(map, _)| !map.cells.is_empty())
        .map(|(map, number)| format!(" {number:>3}  {}\n", map::line(map)))
        .collect();
    if !lines.is_empty() {
        *text += &format!("\nWhere: . zeros, u unique, d duplicate, s shared\n\n{lines}");
    }
}

/// How the QCOW2 images among many share.
fn stored(images: &[ImageStats], quick: bool) -> String {
    let headings = ["", "allocated", "stored", "saved now", "of it", "metadata", "members", "dedup frees"];
    let columns = if quick { headings.len() - 1 } else { headings.len() };
    let mut table = Figures::with_headings(headings.into_iter().take(columns).map(str::to_owned), &[]);
    for (image, number) in images.iter().zip(1..) {
        let Some(qcow2) = &image.qcow2 else { continue };
        let size = |n: u64| bytes(n * image.disk.cluster_size_bytes);
        let cells = [
            number.to_string(),
            size(image.disk.allocated_clusters),
            size(qcow2.sharing.stored_clusters),
            bytes(qcow2.sharing.saved_bytes),
            share(qcow2.sharing.saved_percent),
            bytes(qcow2.file.metadata_bytes),
            qcow2.pool.map_or("no pool".to_owned(), |pool| grouped(pool.members)),
            match &qcow2.dedup {
                Some(Forecast::Done(done)) => bytes(done.freed_bytes),
                _ => "-".to_owned(),
            },
        ];
        table.add(cells.into_iter().take(columns));
    }
    format!("\nSharing now: allocated less stored is saved\n\n{}", table.text())
}

fn matrix(overlap: &[Vec<u64>]) -> String {
    let mut text = "\nOverlap: how much of the data of the image in the row that in the column has too\n".to_owned();
    let columns: Vec<usize> = (0..overlap.len()).collect();
    for columns in columns.chunks(ACROSS) {
        let headings = columns.iter().map(|column| (column + 1).to_string());
        let mut table = Figures::with_headings(std::iter::once(String::new()).chain(headings), &[]);
        for (row, at) in overlap.iter().zip(0..) {
            let data = row.get(at).copied().unwrap_or(0);
            let cell = |&column: &usize| match row.get(column) {
                _ if column == at => "=".to_owned(),
                Some(&clusters) if data > 0 => share(percent(clusters, data)),
                _ => "-".to_owned(),
            };
            table.add(std::iter::once((at + 1).to_string()).chain(columns.iter().map(cell)));
        }
        text += &format!("\n{}", table.text());
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

fn occurrences(histogram: &[Occurrences]) -> String {
    if histogram.is_empty() {
        return String::new();
    }
    let mut table = Figures::new(["times", "contents", "one of each", "clusters", "all of them"], &[]);
    for row in histogram {
        table.add([
            range(row.times_from, row.times_to),
            grouped(row.contents),
            bytes(row.contents_bytes),
            grouped(row.references_clusters),
            bytes(row.references_bytes),
        ]);
    }
    format!("\nContents by the number of times that they occur\n\n{}", table.text())
}

fn frequent(top: &[Repeated], many: bool) -> String {
    let mut table = Figures::new(["times", "bytes", "first at", "sha256", "looks like"], &[2, 3, 4]);
    for repeated in top {
        let image = if many { format!("{}:", repeated.first_image + 1) } else { String::new() };
        let mut sha = hex(&repeated.sha256);
        sha.truncate(DIGITS);
        table.add([
            grouped(repeated.times),
            bytes(repeated.bytes),
            format!("{image}{:#x}", repeated.first_offset_bytes),
            sha,
            repeated.guess.clone(),
        ]);
    }
    let place = if many { " (image:guest offset)" } else { "" };
    format!("\nThe most frequent contents{place}\n\n{}", table.text())
}

fn curve(points: &[CurvePoint], report: &StatsReport) -> String {
    let mut table = Figures::new(["clusters", "data", "contents", "duplicates", "metadata", "file", "saved", ""], &[7]);
    let best = report.recommendation.as_ref().and_then(|advice| advice.cluster_size_bytes);
    for point in points {
        let sign = if point.saved_bytes < 0 { "-" } else { "" };
        table.add([
            bytes(point.cluster_size_bytes),
            bytes(point.data_bytes),
            bytes(point.distinct_bytes),
            share(point.duplicate_percent),
            bytes(point.metadata_bytes),
            bytes(point.file_length_bytes),
            format!("{sign}{}", bytes(point.saved_bytes.unsigned_abs())),
            if best == Some(point.cluster_size_bytes) { "<" } else { "" }.to_owned(),
        ]);
    }
    let what = if report.images.len() > 1 { "one image of all these" } else { "convert" };
    format!("\nWhat {what} takes at each cluster size; saved: by sharing\n\n{}", table.text())
}

fn recommended(advice: &Advice) -> String {
    let (now, then) = (advice.now_bytes, advice.predicted_bytes);
    let left = percent(then, now.max(1));
    if advice.action == Action::None {
        return format!("\n{}", wrapped(&format!("Not worth it: {}.", advice.reason)));
    }
    let what = if advice.action == Action::Dedup { "dedup" } else { "convert" };
    let command = advice.command.as_ref().map_or(String::new(), |command| format!("\n  {command}\n"));
    let (now, then) = (bytes(now), bytes(then));
    format!("\nRecommended: {what}, {then} instead of {now}, {left:.0} % of it\n({})\n{command}", advice.reason)
}
