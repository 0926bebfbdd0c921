//! What is told of the progress of every operation never runs backwards, and is at its end only when the operation is.

use super::collisions::colliding;
use crate::support::corpus::Sample;
use crate::support::{Random, families, qemu, scratch};
use dedup_img::stats::{Named, StatsOptions, stats};
use dedup_img::storage::LockMode;
use dedup_img::units::ClusterBits;
use dedup_img::{
    CheckOptions, ClusterSize, CompressionLevel, CompressionType, ConvertOptions, DedupOptions, Disk, DiskOptions,
    Format, GcOptions, IntoOptions, Phase, Progress, RawOptions, Repair, Sharers, Work, WorkOptions, check, convert,
    convert_into, dedup, gc, open_image, repair, to_raw,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;

/// Everything that was told.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Phase, Vec<u64>)>>);

impl Progress for Recorder {
    fn phase(&self, phase: &Phase) {
        self.0.lock().unwrap().push((*phase, Vec::new()));
    }

    fn advance(&self, bytes: u64) {
        self.0.lock().unwrap().last_mut().expect("bytes of no phase").1.push(bytes);
    }
}

impl Recorder {
    /// The titles of the phases, in order, when nothing that was told contradicts itself.
    #[track_caller]
    fn titles(&self, what: &str) -> Vec<&'static str> {
        let mut position = 0.0;
        let told = self.0.lock().unwrap();
        for (phase, advances) in told.iter() {
            assert!(
                phase.begin >= position && phase.end >= phase.begin && phase.end <= 1.0,
                "{what}: {position} {told:?}"
            );
            position = phase.begin;
            let mut done = 0;
            for bytes in advances {
                done += bytes;
                assert!(*bytes > 0 && (phase.total == 0 || done <= phase.total), "{what}: {told:?}");
                assert!(phase.at(done) >= position, "{what}: {told:?}");
                position = phase.at(done);
            }
        }
        told.iter().map(|(phase, _)| phase.title).collect()
    }

    /// How much of a phase was done when it ended, and how much there was to do.
    fn done(&self, title: &str) -> (u64, u64) {
        let told = self.0.lock().unwrap();
        let phase = told.iter().find(|(phase, _)| phase.title == title).expect("no such phase");
        (phase.1.iter().sum(), phase.0.total)
    }
}

/// Runs an operation, which may be refused, and returns the phases that it had. `None` where it was refused.
#[track_caller]
fn told(what: &str, run: impl FnOnce(&Work) -> dedup_img::Result<()>) -> (Option<Vec<&'static str>>, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let progress = Arc::<Recorder>::clone(&recorder);
    let options = WorkOptions { threads: Some(3), memory: 64 << 20, progress, ..WorkOptions::default() };
    let result = run(&Work::new(options).unwrap());
    let titles = recorder.titles(what);
    (result.is_ok().then_some(titles), recorder)
}

/// Asserts that the phases are some of `due`, in that order and none twice, the first among them.
#[track_caller]
fn in_order(what: &str, phases: Option<Vec<&'static str>>, due: &[&str]) {
    let Some(phases) = phases else { return };
    let mut left = due.iter();
    assert!(phases.iter().all(|phase| left.any(|due| due == phase)), "{what}: {phases:?}, due are {due:?}");
    assert_eq!(phases.first(), due.first(), "{what}: {phases:?}");
}

fn samples() -> Vec<Sample> {
    let families = [families::versions(), families::zeros(), families::compressed(), families::snapshots()];
    families.into_iter().flatten().chain(families::chains()).chain(families::raw()).collect()
}

fn open(sample: &Sample) -> dedup_img::Result<Disk> {
    let format = sample.format.parse()?;
    Disk::open(&sample.path, &DiskOptions { format: Some(format), ..DiskOptions::default() })
}

const PASSES: [&str; 3] = ["scanning", "comparing", "writing"];

#[test]
fn conversions_go_forward() {
    let home = scratch();
    let target = home.path().join("target");
    for sample in samples() {
        let name = &sample.name;
        let to = |options: &ConvertOptions| {
            let (options, target) = (options.clone(), target.clone());
            told(name, |work| convert(&open(&sample)?, &target, &options, work).map(drop)).0
        };
        let fixed =
            ConvertOptions { cluster_size: ClusterSize::Fixed(ClusterBits::GRAIN), ..ConvertOptions::default() };
        in_order(name, to(&fixed), &["converting"]);
        in_order(name, to(&ConvertOptions::default()), &PASSES);
        let level = CompressionLevel::new(CompressionType::Zstd, None).unwrap();
        in_order(name, to(&ConvertOptions { compress: Some(level), ..fixed.clone() }), &PASSES);
        let raw = home.path().join("raw");
        in_order(
            name,
            told(name, |work| to_raw(&open(&sample)?, &raw, RawOptions::default(), work).map(drop)).0,
            &["writing"],
        );
        // Into an image of another content.
        let size = qemu::virtual_size("raw", &sample.truth);
        qemu::create("qcow2", &target, size, "cluster_size=4k");
        let due = ["checking", "comparing", "looking up", "writing", "settling"];
        let into = |work: &Work| convert_into(&open(&sample)?, &target, IntoOptions::default(), work).map(drop);
        in_order(name, told(name, into).0, &due);
    }
}

/// A conversion in one pass that has to begin anew, in several passes, goes on where it was.
#[test]
fn a_conversion_that_begins_anew_goes_forward() {
    let home = scratch();
    let [source, target] = ["source", "target"].map(|name| home.path().join(name));
    let mut random = Random::new(5);
    let common = random.bytes(4096);
    let bytes = [random.bytes(40 << 20), colliding(&common, 1), colliding(&common, 2), random.bytes(4096)].concat();
    fs::write(&source, bytes).unwrap();
    let options = ConvertOptions { cluster_size: ClusterSize::Fixed(ClusterBits::GRAIN), ..ConvertOptions::default() };
    let (phases, recorder) = told("anew", |work| {
        let raw = DiskOptions { format: Some(Format::Raw), ..DiskOptions::default() };
        convert(&Disk::open(&source, &raw)?, &target, &options, work).map(drop)
    });
    assert_eq!(phases.unwrap(), ["converting", "scanning", "comparing", "writing"]);
    let (done, total) = recorder.done("converting");
    assert!(done > 0 && done < total, "{done} of {total}: it did not fail half way");
}

/// A copy of a sample to work on, if it is an image without others below it.
fn copy(sample: &Sample, to: &Path) -> bool {
    fs::copy(&sample.path, to).unwrap();
    sample.format == "qcow2" && sample.snapshot.is_none()
}

fn image(path: &Path) -> dedup_img::Result<impl dedup_img::storage::Storage> {
    Ok(open_image(path, Some(Format::Qcow2), LockMode::Write)?.0)
}

#[test]
fn work_in_place_goes_forward() {
    let home = scratch();
    let file = home.path().join("file");
    for sample in samples() {
        if !copy(&sample, &file) {
            continue;
        }
        let name = &sample.name;
        let checks = |work: &Work| check(&image(&file)?, CheckOptions { data: true }, work, &mut |_| {}).map(drop);
        in_order(name, told(name, checks).0, &["checking"]);
        let mends =
            |work: &Work| repair(&image(&file)?, Repair::All, CheckOptions::default(), work, &mut |_| {}).map(drop);
        in_order(name, told(name, mends).0, &["checking", "checking"]);
        let due = ["checking", "scanning", "comparing", "writing", "settling"];
        let dedups = |work: &Work| dedup(&image(&file)?, DedupOptions::default(), work).map(drop);
        in_order(name, told(name, dedups).0, &due);
        in_order(name, told(name, |work| Sharers::new(&image(&file)?, work).map(drop)).0, &["checking"]);
        for compact in [false, true] {
            let options = GcOptions { compact, drop_pool: compact };
            let collects = |work: &Work| gc(&image(&file)?, options, work).map(drop);
            in_order(name, told(name, collects).0, &["checking", "writing", "settling", "moving"]);
        }
    }
}

/// A compaction inspects the image before, between and after its passes: nobody is shown that, and what moves is what was forecast.
#[test]
fn a_compaction_moves_what_was_forecast_in_one_phase() {
    let home = scratch();
    let [source, file] = ["source", "file"].map(|name| home.path().join(name));
    fs::write(&source, Random::new(6).bytes(8 << 20)).unwrap();
    qemu::convert("raw", &source, "qcow2", &file, &["-o", "cluster_size=4k"]);
    qemu::run("qemu-io", crate::args!["-d", "unmap", "-c", "discard 0 2M", file]).ok();
    let options = GcOptions { compact: true, drop_pool: false };
    let (phases, recorder) = told("compaction", |work| gc(&image(&file)?, options, work).map(drop));
    let phases = phases.unwrap();
    assert_eq!((phases.first(), phases.last()), (Some(&"checking"), Some(&"moving")), "{phases:?}");
    assert_eq!(phases.iter().filter(|&&phase| phase == "checking").count(), 1, "{phases:?}");
    let (done, total) = recorder.done("moving");
    assert!(done == total && done >= 1 << 20, "{done} of {total}");
}

#[test]
fn statistics_of_many_images_go_forward() {
    let samples: Vec<Sample> = families::compressed().into_iter().chain(families::raw()).collect();
    let named = |sample: &Sample| Ok(Named { path: PathBuf::from(&sample.name), item: open(sample)? });
    let disks: Vec<Named<Disk>> = samples.iter().map(named).collect::<dedup_img::Result<_>>().unwrap();
    let (phases, _) = told("stats", |work| stats(&disks, StatsOptions::default(), work).map(drop));
    let phases = phases.unwrap();
    assert_eq!(phases.iter().filter(|&&phase| phase == "scanning").count(), disks.len(), "{phases:?}");
    assert_eq!(phases.last(), Some(&"counting"));
}
