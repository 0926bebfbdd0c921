//! Structured mutations of real images through `check` and `convert`: whatever a field says, the program ends soon, in little
//! memory, with one of its exit codes and one line. A handful here; tests/mutate-long makes as many as it is told.

use crate::args;
use crate::support::corpus::Sample;
use crate::support::cost::{Cost, Counter};
use crate::support::mutator::{Damaged, Mutator};
use crate::support::subjects::{deduplicated, subjects};
use crate::support::{Random, dedup_img, families, qemu, scratch};
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Mutations where nobody says how many.
const FEW: u64 = 80;
/// No run may take as much time of the processor, or in this test of the clock.
const TIME: Duration = Duration::from_secs(2);
/// No run may have more memory than this resident, in bytes.
const MEMORY: u64 = 256 << 20;
/// No run may say as many bytes on standard error.
const WORDS: u64 = 64 << 20;
/// What stops a run that would not end or would take all memory: seconds of the clock, which other work may take; of the processor; bytes.
const STOP: [&str; 3] = ["600", "--cpu=20", "--as=8589934592"];
/// What `convert` is told beside the names; the first is likelier than any other.
const WAYS: [&[&str]; 9] = [
    &[],
    &["-o", "cluster_size=4k"],
    &["-o", "cluster_size=64k", "--pin", "all"],
    &["-c", "-o", "cluster_size=64k"],
    &["--plain"],
    &["-O", "raw"],
    &["-l", "1"],
    &["--all-snapshots"],
    &["--salvage"],
];

/// An image to mutate, in a directory with all the files that it needs.
struct Base {
    name: String,
    path: PathBuf,
    is_small: bool,
}

/// What a run of the program took.
#[derive(Clone, Copy, Debug, Default)]
struct Took {
    wall: Duration,
    cost: Cost,
    /// Bytes on standard error.
    words: u64,
}

/// The dearest runs so far, by what they are dear in.
#[derive(Default)]
struct Worst(BTreeMap<&'static str, Vec<(u64, String)>>);

impl Worst {
    fn note(&mut self, took: Took, told: &str) {
        let cost = took.cost;
        let micros = |time: Duration| time.as_micros() as u64;
        for (what, figure) in [
            ("us of the clock", micros(took.wall)),
            ("us of user time", micros(cost.user)),
            ("us of system time", micros(cost.system)),
            ("bytes resident", cost.memory),
            ("bytes said", took.words),
        ] {
            let runs = self.0.entry(what).or_default();
            let at = runs.partition_point(|(other, _)| *other >= figure);
            if at < 5 {
                runs.insert(at, (figure, told.to_owned()));
                runs.truncate(5);
            }
        }
    }
}

/// Copies a family with all that its images refer to, and lists its images.
fn gather(home: &Path, name: &str, samples: &[Sample], bases: &mut Vec<Base>) {
    let origin = samples[0].truth.parent().unwrap();
    let paths: BTreeSet<&Path> = samples.iter().map(|sample| sample.path.as_path()).collect();
    for path in paths {
        let within = path.strip_prefix(origin).unwrap();
        let copy = home.join(name).join(within);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(path, &copy).unwrap();
        if copy.extension().is_some_and(|extension| extension == "qcow2") {
            bases.push(Base { name: format!("{name}/{}", within.display()), path: copy, is_small: false });
        }
    }
}

/// All images, in a fixed order: those of stock QEMU, and those that the program under test deduplicated.
fn bases(home: &Path, with_families: bool) -> Vec<Base> {
    let mut bases = Vec::new();
    let small = |name: String, path: PathBuf| Base { name, path, is_small: true };
    let alone = home.join("subjects");
    fs::create_dir(&alone).unwrap();
    for (name, path) in subjects() {
        fs::copy(path, alone.join(name)).unwrap();
        bases.push(small(name.into(), alone.join(name)));
    }
    for (name, more) in [
        ("deduplicated", &[][..]),
        ("deduplicated-packed", &["-c"]),
        ("deduplicated-pinned", &["--pin", "all"]),
        ("deduplicated-narrow", &["-o", "refcount_bits=4"]),
    ] {
        let path = deduplicated(&alone, name, more);
        bases.push(small(name.into(), path));
    }
    let again = alone.join("deduplicated-again");
    fs::copy(alone.join("deduplicated"), &again).unwrap();
    for name in ["one", "two"] {
        qemu::snapshot("-c", name, &again).ok();
        qemu::io("qcow2", &again, &["write -P 7 0 300k".into(), "write -P 8 600k 100k".into()]);
    }
    dedup_img(args!["dedup", "-q", again]).ok();
    bases.push(small("deduplicated-again".into(), again));
    if with_families {
        gather(home, "versions", &families::versions(), &mut bases);
        gather(home, "widths", &families::widths(), &mut bases);
        gather(home, "zeros", &families::zeros(), &mut bases);
        gather(home, "compressed", &families::compressed(), &mut bases);
        gather(home, "subclusters", &families::subclusters(), &mut bases);
        gather(home, "snapshots", &families::snapshots(), &mut bases);
        gather(home, "odd-states", &families::odd_states(), &mut bases);
        gather(home, "chains", &families::chains(), &mut bases);
    }
    bases
}

/// A mutation of the image: of fields, or of bits anywhere in the header's cluster or in the file.
fn mutate(mutator: &Mutator, random: &mut Random) -> Damaged {
    let mut damaged = match random.below(8) {
        0 => Damaged { bytes: mutator.undamaged().to_vec(), story: String::new() },
        _ => mutator.damage(random),
    };
    if damaged.story.is_empty() || random.below(16) == 0 {
        let within = [112, 512, damaged.bytes.len() as u64][random.below(3) as usize].min(damaged.bytes.len() as u64);
        for _ in 0..=random.below(4) {
            let (at, bit) = (random.below(within), random.below(8));
            damaged.bytes[at as usize] ^= 1 << bit;
            write!(damaged.story, "; bit {bit} at {at:#x} is another").unwrap();
        }
    }
    damaged
}

/// Runs the program, and returns its exit code, the beginning of what it said on standard error, and what it took.
fn run(args: &[OsString]) -> (i32, String, Took) {
    let stop = args![STOP[1], STOP[2], "timeout", "-s", "KILL", STOP[0], env!("CARGO_BIN_EXE_dedup-img")];
    let counter = Counter::new();
    let mut command = counter.command("prlimit", stop.into_iter().chain(args.iter().cloned()));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let begun = Instant::now();
    let mut child = command.spawn().expect("time, prlimit and timeout are there");
    let (mut said, mut errors) = (Vec::new(), child.stderr.take().unwrap());
    Read::by_ref(&mut errors).take(1 << 16).read_to_end(&mut said).unwrap();
    let words = said.len() as u64 + io::copy(&mut errors, &mut io::sink()).unwrap();
    let code = child.wait().unwrap().code().unwrap_or(-1);
    let took = Took { wall: begun.elapsed(), cost: counter.read(), words };
    (code, String::from_utf8_lossy(&said).into_owned(), took)
}

/// One mutation's way through the program.
struct Trial<'a> {
    home: &'a TempDir,
    /// The number of the mutation, the image and the mutation, for messages.
    story: String,
    offences: Vec<String>,
    worst: &'a mut Worst,
    codes: &'a mut BTreeMap<String, u64>,
    /// Whether the time of the clock counts, which only a machine without other work can be asked for.
    by_clock: bool,
}

impl Trial<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Runs a command, whose exit code must be one of `codes`; `one_line` where it must say one line if that is 1.
    fn run(&mut self, args: &[OsString], codes: &[i32], one_line: bool) -> i32 {
        let (code, said, took) = run(args);
        let cost = took.cost;
        let words: Vec<_> = args.iter().map(|word| word.to_string_lossy()).collect();
        let told = format!("{}: `{}` ended with {code}", self.story, words.join(" "));
        self.worst.note(took, &told);
        *self.codes.entry(format!("{} {code}", words[0])).or_default() += 1;
        let lines: Vec<String> = said.lines().take(8).map(|line| line.chars().take(300).collect()).collect();
        let mut offend = |what: String| self.offences.push(format!("{what}: {told}\n    {}", lines.join("\n    ")));
        if !codes.contains(&code) || said.contains("panicked") {
            offend("CRASH".into());
        }
        if cost.user + cost.system > TIME || self.by_clock && took.wall > TIME {
            offend(format!("SLOW, {:?} user, {:?} system, {:?} in all", cost.user, cost.system, took.wall));
        }
        if cost.memory > MEMORY {
            offend(format!("LARGE, {} MiB resident", cost.memory >> 20));
        }
        if took.words > WORDS {
            offend(format!("WORDY, {} bytes said", took.words));
        }
        if code == 1 && one_line && (said.lines().count() != 1 || !said.starts_with("dedup-img: ")) {
            offend("NOT ONE LINE".into());
        }
        code
    }

    /// Checks the image and converts it in some way, and checks what came of that now and then.
    fn check_and_convert(&mut self, image: &Path, random: &mut Random) {
        let target = self.path("target");
        let mut check = args!["check", "-f", "qcow2", "--data"].to_vec();
        check.truncate(if random.below(2) == 0 { 3 } else { 4 });
        check.push(image.into());
        self.run(&check, &[0, 1, 2, 3], false);

        let way = if random.below(3) == 0 { WAYS[random.below(WAYS.len() as u64) as usize] } else { WAYS[0] };
        let mut words = args!["convert", "-q", "-f", "qcow2", "-t", "unsafe"].to_vec();
        words.extend(way.iter().map(OsString::from));
        words.extend([image.into(), target.clone().into()]);
        let code = self.run(&words, &[0, 1], way != ["--salvage"]);
        if code == 0 {
            if !way.contains(&"raw") && random.below(8) == 0 {
                self.run(&args!["check", "-q", "-f", "qcow2", "--data", target], &[0], true);
            }
            fs::remove_file(&target).unwrap();
        } else if target.exists() {
            self.offences.push(format!("LEFT BEHIND: {}", self.story));
            fs::remove_file(&target).unwrap();
        }
    }
}

#[test]
fn no_mutation_makes_check_or_convert_crash_hang_or_grow() {
    let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let long = number("DEDUP_IMG_MUTATIONS");
    let (count, seed) = (long.unwrap_or(FEW), number("DEDUP_IMG_MUTATION_SEED").unwrap_or(1));
    let only = number("DEDUP_IMG_MUTATION");
    let kept = env::var_os("DEDUP_IMG_MUTATIONS_KEPT").map(PathBuf::from);
    let home = if long.is_some() { tempfile::tempdir_in("/dev/shm").unwrap() } else { scratch() };
    let bases = bases(home.path(), long.is_some());
    let mut mutators: BTreeMap<usize, Mutator> = BTreeMap::new();
    let (mut worst, mut codes, mut offences) = (Worst::default(), BTreeMap::new(), Vec::new());
    let begun = Instant::now();
    for n in only.map_or(0..count, |n| n..n + 1) {
        let mut random = Random::new(seed << 32 | n);
        // Nine of ten are small: they differ in the same fields, and more of them can be tried.
        let wants_small = random.below(10) > 0;
        let fitting: Vec<usize> =
            (0..bases.len()).filter(|at| long.is_none() || bases[*at].is_small == wants_small).collect();
        let at = fitting[random.below(fitting.len() as u64) as usize];
        let base = &bases[at];
        let damaged = match base.is_small {
            true => mutate(mutators.entry(at).or_insert_with(|| Mutator::new(&base.path)), &mut random),
            false => mutate(&Mutator::new(&base.path), &mut random),
        };
        let image = base.path.with_file_name("mutated");
        fs::write(&image, &damaged.bytes).unwrap();
        let story = format!("mutation {n} of {}: {}", base.name, damaged.story);
        drop(damaged);
        let mut trial = Trial {
            home: &home,
            story,
            offences: Vec::new(),
            worst: &mut worst,
            codes: &mut codes,
            by_clock: long.is_none(),
        };
        trial.check_and_convert(&image, &mut random);
        if let (Some(kept), false) = (&kept, trial.offences.is_empty()) {
            fs::create_dir_all(kept).unwrap();
            fs::copy(&image, kept.join(format!("{seed}-{n}.qcow2"))).unwrap();
        }
        for offence in &trial.offences {
            println!("{offence}");
        }
        offences.append(&mut trial.offences);
        if n % 5000 == 4999 {
            println!("{} mutations in {:?}, {} offences", n + 1, begun.elapsed(), offences.len());
        }
    }
    println!("{count} mutations of {} images, seed {seed}, in {:?}", bases.len(), begun.elapsed());
    codes.iter().for_each(|(code, times)| println!("{times:8} {code}"));
    for (what, runs) in &worst.0 {
        println!("the most {what}:");
        runs.iter().for_each(|(figure, told)| println!("{figure:12} {told}"));
    }
    assert!(offences.is_empty(), "{} offences, the first: {}", offences.len(), offences[0]);
    assert!(only.is_some() || codes.contains_key("convert 0") && codes.contains_key("convert 1"), "{codes:?}");
}
