//! A source that somebody writes while it is converted, with no regard for locks: the conversion says that it changed, or every
//! byte is right where nobody wrote. Never does a write at one place show at another one, which shared its content.

use crate::args;
use crate::support::corpus::M;
use crate::support::loops::Loop;
use crate::support::{Random, dedup_img, qemu, scratch};
use dedup_img::storage::LockMode;
use dedup_img::units::ClusterBits;
use dedup_img::{
    Backing, BackingRule, ClusterSize, CompressionLevel, CompressionType, ConvertOptions, DedupOptions, DedupPlan,
    Disk, DiskOptions, Error, ErrorKind, Format, IntoOptions, Phase, Pin, Progress, RawOptions, Scratch, Sharing,
    Silent, Traits, Work, WorkOptions, convert, convert_into, open_image, to_raw,
};
use serde_json::Value;
use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SIZE: u64 = 6 * M;
/// What the writer writes in one go, at a multiple of it.
const PATCH: u64 = 64 << 10;

/// The ways of a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// One pass.
    Fixed,
    Auto,
    PinAll,
    Compressed,
    Backing,
    Plain,
    PlainCompressed,
    Salvage,
    AllSnapshots,
    Into,
    Raw,
}

const WAYS: [Way; 11] = [
    Way::Fixed,
    Way::Auto,
    Way::PinAll,
    Way::Compressed,
    Way::Backing,
    Way::Plain,
    Way::PlainCompressed,
    Way::Salvage,
    Way::AllSnapshots,
    Way::Into,
    Way::Raw,
];

/// A third of the disk twice, in pieces of which some are the other way round, and zeros.
fn content() -> Vec<u8> {
    let third = Random::new(7).bytes((SIZE / 3) as usize);
    let mut bytes = third.clone();
    third.rchunks(1 << 19).for_each(|piece| bytes.extend_from_slice(piece));
    bytes.resize(SIZE as usize, 0);
    bytes
}

/// A source and what was written to it.
struct Source {
    path: PathBuf,
    format: Format,
    file: fs::File,
    /// Where the source has what, in runs: guest offset, length, offset in the source. What it has not is never written.
    places: Vec<(u64, u64, u64)>,
    written: Mutex<Vec<Range<u64>>>,
}

impl Source {
    fn open(path: &Path, format: Format) -> Self {
        let places = match format {
            Format::Raw => vec![(0, SIZE, 0)],
            Format::Qcow2 => {
                let map = qemu::img(args!["map", "--output=json", "-f", "qcow2", path]).ok().stdout;
                let runs: Vec<Value> = serde_json::from_str(&map).unwrap();
                let number = |run: &Value, key: &str| run[key].as_u64();
                let place = |run: &Value| Some((number(run, "start")?, number(run, "length")?, number(run, "offset")?));
                runs.iter().filter_map(place).collect()
            }
        };
        let file = OpenOptions::new().write(true).open(path).unwrap();
        Self { path: path.to_owned(), format, file, places, written: Mutex::default() }
    }

    /// Writes a patch somewhere on the disk.
    fn write(&self, random: &mut Random) {
        let at = random.below(SIZE / PATCH) * PATCH;
        let Some((start, _, offset)) =
            self.places.iter().find(|(start, len, _)| *start <= at && at + PATCH <= start + len)
        else {
            return;
        };
        self.written.lock().unwrap().push(at..at + PATCH);
        self.file.write_all_at(&random.bytes(PATCH as usize), offset + (at - start)).unwrap();
    }

    /// Whether `found` is `content` wherever nobody wrote.
    fn is_right(&self, content: &[u8], found: &[u8]) -> bool {
        let written = self.written.lock().unwrap();
        let patches =
            (0..).step_by(PATCH as usize).zip(content.chunks(PATCH as usize).zip(found.chunks(PATCH as usize)));
        patches.into_iter().all(|(at, (due, found))| due == found || written.iter().any(|range| range.contains(&at)))
    }
}

/// Converts the source in a way, and returns what the target reads as.
fn converted(way: Way, source: &Source, home: &Path, progress: Arc<dyn Progress>) -> Result<Vec<u8>, Error> {
    let options = WorkOptions { threads: Some(2), memory: 1 << 26, progress, ..WorkOptions::default() };
    let work = Work::new(options).unwrap();
    let [target, base, raw] = ["target", "base.raw", "read.raw"].map(|name| home.join(name));
    let options = DiskOptions { format: Some(source.format), salvage: way == Way::Salvage, ..DiskOptions::default() };
    let disk = match way {
        Way::AllSnapshots => Disk::open_with_snapshots(&source.path, &options, ClusterBits::GRAIN),
        _ => Disk::open(&source.path, &options),
    }
    .unwrap();
    let fixed = ConvertOptions {
        cluster_size: ClusterSize::Fixed(ClusterBits::GRAIN),
        durable: false,
        ..ConvertOptions::default()
    };
    let level = || Some(CompressionLevel::new(CompressionType::Zlib, None).unwrap());
    let options = match way {
        Way::Fixed | Way::Salvage | Way::AllSnapshots => fixed,
        Way::Auto => ConvertOptions { cluster_size: ClusterSize::Auto, ..fixed },
        Way::PinAll => ConvertOptions { sharing: Sharing::Pooled(Pin::All), ..fixed },
        Way::Compressed => ConvertOptions { compress: level(), ..fixed },
        Way::Backing => {
            let mut bytes = content();
            Random::new(3).fill(&mut bytes[..1 << 20]);
            fs::write(&base, bytes).unwrap();
            let behind = BackingRule::default();
            let backing = Some(Backing { name: "base.raw".into(), format: Format::Raw, behind, ignore_holes: false });
            let traits = Traits { backing, ..Traits::default() };
            ConvertOptions { traits, ..fixed }
        }
        Way::Plain => ConvertOptions { sharing: Sharing::Plain, ..fixed },
        Way::PlainCompressed => ConvertOptions { sharing: Sharing::Plain, compress: level(), ..fixed },
        Way::Into => {
            qemu::create("qcow2", &target, SIZE + 2 * M, "cluster_size=4k");
            convert_into(&disk, &target, IntoOptions::default(), &work).map(drop)?;
            return Ok(read(&target, "qcow2", &raw));
        }
        Way::Raw => {
            to_raw(&disk, &target, RawOptions { durable: false, ..RawOptions::default() }, &work).map(drop)?;
            return Ok(fs::read(&target).unwrap());
        }
    };
    convert(&disk, &target, &options, &work).map(drop)?;
    Ok(read(&target, "qcow2", &raw))
}

/// The target is clean; what it reads as.
fn read(image: &Path, format: &str, raw: &Path) -> Vec<u8> {
    qemu::check_clean(image);
    qemu::convert(format, image, "raw", raw, &[]);
    fs::read(raw).unwrap()
}

/// Whether the conversion said that the source changed; else all is right where nobody wrote.
#[track_caller]
fn said_so(way: Way, source: &Source, result: Result<Vec<u8>, Error>, told: &str) -> bool {
    match result {
        Ok(found) => {
            assert!(
                source.is_right(&content(), &found),
                "{way:?} {told}: wrong bytes where nobody wrote, and no error"
            );
            false
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Changed, "{way:?} {told}: {error}");
            true
        }
    }
}

/// A writer that comes at one moment of the operation: with its `due`th word on how far it is.
struct Once {
    source: Arc<Source>,
    due: u64,
    seen: AtomicU64,
    came: AtomicBool,
}

impl Once {
    fn count(&self) {
        if self.seen.fetch_add(1, Ordering::SeqCst) + 1 == self.due {
            // Enough that it hits what others share.
            let mut random = Random::new(self.due);
            (0..24).for_each(|_| self.source.write(&mut random));
            self.came.store(true, Ordering::SeqCst);
        }
    }
}

impl Progress for Once {
    fn phase(&self, _: &Phase) {
        self.count();
    }

    fn advance(&self, _: u64) {
        self.count();
    }
}

/// The image that a way reads, or the raw disk, filled anew.
fn fill(way: Way, file: &Path, home: &Path) -> Format {
    let raw = home.join("content.raw");
    fs::write(&raw, content()).unwrap();
    let target = OpenOptions::new().write(true).open(file).unwrap();
    target.write_all_at(&[content(), vec![0; 2 << 20]].concat(), 0).unwrap();
    if way != Way::AllSnapshots {
        return Format::Raw;
    }
    let image = home.join("source.qcow2");
    qemu::img(args!["convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, image]).ok();
    qemu::snapshot("-c", "before", &image).ok();
    target.write_all_at(&fs::read(&image).unwrap(), 0).unwrap();
    Format::Qcow2
}

/// Every way, on a block device, with a writer at every moment.
#[test]
fn a_write_at_any_moment_is_noticed_or_stays_where_it_was_made() {
    let home = scratch();
    let file = home.path().join("device");
    fs::File::create(&file).unwrap().set_len(SIZE + 2 * M).unwrap();
    let device = Loop::over(&file);
    // The device is longer than the disk, and what lies behind is zeros.
    let mut noticed = 0;
    for way in WAYS {
        // Moments that lie closest at the beginning: some ways tell of every cluster.
        for due in std::iter::successors(Some(1), |due| Some(due + due / 3 + 1)) {
            let source = Arc::new(Source::open(&device, fill(way, &device, home.path())));
            let read = Arc::clone(&source);
            let writer = Arc::new(Once { source: read, due, seen: AtomicU64::new(0), came: AtomicBool::new(false) });
            let result = converted(way, &source, home.path(), Arc::<Once>::clone(&writer));
            let came = writer.came.load(Ordering::SeqCst);
            noticed += u32::from(said_so(way, &source, result, &format!("at moment {due}")));
            if !came {
                assert!(due > 2, "{way:?}: {due}");
                break;
            }
        }
    }
    assert!(noticed > 10, "only {noticed} writes came when they mattered");
}

/// Every way, on a device and on a file, with somebody who writes all the time. `DEDUP_IMG_LIVE_RUNS` says how often.
#[test]
fn somebody_who_writes_all_the_time_is_noticed_or_harms_nobody_else() {
    let runs: u64 = std::env::var("DEDUP_IMG_LIVE_RUNS").map_or(1, |runs| runs.parse().unwrap());
    let home = scratch();
    let [file, regular] = ["device", "regular"].map(|name| home.path().join(name));
    fs::File::create(&file).unwrap().set_len(SIZE + 2 * M).unwrap();
    fs::File::create(&regular).unwrap().set_len(SIZE + 2 * M).unwrap();
    let device = Loop::over(&file);
    let (mut noticed, mut passed) = (0u32, 0u32);
    for run in 0..runs {
        for way in WAYS {
            for path in [&*device, regular.as_path()] {
                let source = Source::open(path, fill(way, path, home.path()));
                let done = AtomicBool::new(false);
                let seed = run << 8 | way as u64;
                let result = std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut random = Random::new(seed);
                        // A few writes, so that some conversions are through before one.
                        for _ in 0..1 + random.below(4) {
                            std::thread::sleep(std::time::Duration::from_micros(random.below(60_000)));
                            if done.load(Ordering::SeqCst) {
                                break;
                            }
                            (0..8).for_each(|_| source.write(&mut random));
                        }
                    });
                    let result = converted(way, &source, home.path(), Arc::new(Silent));
                    done.store(true, Ordering::SeqCst);
                    result
                });
                match said_so(way, &source, result, &format!("seed {seed}")) {
                    true => noticed += 1,
                    false => passed += 1,
                }
            }
        }
    }
    println!("{noticed} conversions said that the source changed, {passed} are right where nobody wrote");
}

/// Between the comparison and the sharing of two clusters of an image somebody who ignores its locks writes one of them.
#[test]
fn a_cluster_that_changes_before_it_is_shared_is_not_shared() {
    let home = scratch();
    let [raw, image] = ["content.raw", "image.qcow2"].map(|name| home.path().join(name));
    let mut bytes = content();
    fs::write(&raw, &bytes).unwrap();
    qemu::img(args!["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, image]).ok();
    for pooled in [false, true] {
        // With a pool, clusters are named by SHA-256 and not by the fast fingerprint.
        if pooled {
            dedup_img(args!["dedup", "-q", &image]).ok();
            let fresh = Random::new(9).bytes(1 << 20);
            bytes.splice(bytes.len() - (2 << 20).., [&fresh[..], &fresh].concat());
            fs::write(&raw, &bytes).unwrap();
            qemu::io("qcow2", &image, &[format!("write -s {} 0 {}", raw.display(), bytes.len())]);
        }
        let scratch = Scratch::In(home.path().to_owned());
        let options = WorkOptions { threads: Some(2), memory: 1 << 26, scratch, ..WorkOptions::default() };
        let work = Work::new(options).unwrap();
        let (mut storage, _) = open_image(&image, None, LockMode::Write).unwrap();
        let plan = DedupPlan::new(&mut storage, DedupOptions::default(), &work).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
        let mut kept = vec![0; 4096];
        // The last one: what is in the pool already is not read again.
        let keeper = plan.shares().map(|share| share.unwrap().keeper.0).max().unwrap();
        file.read_exact_at(&mut kept, keeper).unwrap();
        file.write_all_at(&[0x5a; 4096], keeper).unwrap();
        let error = plan.apply(&work).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
        assert!(error.to_string().contains("ignores its locks"), "{error}");
        drop(storage);
        file.write_all_at(&kept, keeper).unwrap();
        qemu::check_clean(&image);
        qemu::compare_same("raw", &raw, "qcow2", &image);
    }
}
