//! A report of the program compared with the count.

use super::{Asked, Source, assert_figures, default_size, report};
use crate::args;
use crate::support::corpus::Sample;
use crate::support::{dedup_img, qemu};
use serde_json::Value;
use std::ffi::OsString;
use std::path::Path;

/// Runs `stats` on some images and returns the report.
#[track_caller]
pub(crate) fn stats(sources: &[Source], options: &[&str]) -> Value {
    let words = args!["stats", "--output", "json"].into_iter().chain(options.iter().map(OsString::from));
    let ran = dedup_img(words.chain(sources.iter().map(|source| OsString::from(&source.name)))).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

/// The report without what differs from run to run, and without the advice.
pub(crate) fn counted(mut report: Value) -> Value {
    let all = report.as_object_mut().unwrap();
    for key in ["seconds", "peak_memory_bytes"] {
        assert!(all.remove(key).is_some_and(|figure| figure.is_number()), "no {key}");
    }
    all.remove("recommendation");
    report
}

/// What of a report is there with `--quick`.
fn quick(mut report: Value) -> Value {
    report["quick"] = true.into();
    let all = report.as_object_mut().unwrap();
    for key in ["content", "histogram", "top", "curve", "overlap", "growth", "exclusive"] {
        all.remove(key);
    }
    for image in report["images"].as_array_mut().unwrap() {
        let image = image.as_object_mut().unwrap();
        for key in ["content", "still_duplicate", "dedup", "map"] {
            image.remove(key);
        }
        image["disk"].as_object_mut().unwrap().remove("stored_zero_clusters");
    }
    report
}

/// Compares all figures with the count, those of `--quick` too, and returns the report.
#[track_caller]
pub(crate) fn judged(sources: &[Source], options: &[&str], size: Option<u64>) -> Value {
    let what = sources.iter().map(|source| source.name.as_str()).collect::<Vec<_>>().join(", ");
    println!("{what} {options:?} {size:?}");
    let top = options.iter().position(|option| *option == "--top").map_or(10, |at| options[at + 1].parse().unwrap());
    let curve = !options.contains(&"--no-curve");
    let due = report(sources, Asked { size: size.unwrap_or_else(|| default_size(sources)), top, curve });
    let size_text = size.map(|size| size.to_string());
    let sized: Vec<&str> = size_text.iter().flat_map(|size| ["--cluster-size", size]).collect();
    let found = stats(sources, &[options, &sized].concat());
    assert_figures(&counted(found.clone()), &due, &what);
    if size.is_none() && sources.iter().all(|source| source.format == "qcow2") {
        let short = stats(sources, &["-f", "qcow2", "--quick"]);
        assert_figures(&counted(short), &quick(due), &format!("--quick {what}"));
    }
    found
}

/// The sample with that name.
pub(crate) fn named(samples: Vec<Sample>, name: &str) -> Source {
    let sample = samples.into_iter().find(|sample| sample.name == name).unwrap_or_else(|| panic!("no {name}"));
    Source::new(&sample.path, sample.format, &sample.truth)
}

/// A QCOW2 image and its content, which qemu-img writes into a file beside it.
#[track_caller]
pub(crate) fn source_of(path: &Path) -> Source {
    let truth = path.with_extension("truth");
    qemu::convert("qcow2", path, "raw", &truth, &[]);
    Source::new(path, "qcow2", &truth)
}
