//! Images out of a fuzzer's input: one of the stored ones, and a list of what is wrong with it.
//!
//! ```text
//!  base, { what, ... }...        what: 0-3 a field of the mutator's, 4 bytes anywhere, 5 bytes of the header, 6 bytes of the
//!                                pool's directory with its checksums made right, 7 the length of the file
//! ```
//!
//! Every number takes one to eight bytes of the input; where that has ended it is 0. So a few bytes describe an image.

use crate::support::Choices;
use crate::support::mutator::Mutator;
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// The most that is wrong with one image.
const MOST: usize = 12;
/// What the directory of a pool begins with.
const MAGIC: &[u8] = b"DDUPPOOL";

/// Names and bytes of the stored images; `make-bases` makes them.
macro_rules! bases {
    ($($name:literal),* $(,)?) => { [$(($name, include_bytes!(concat!("../bases/", $name, ".gz")).as_slice())),*] };
}

const BASES: [(&str, &[u8]); 18] = bases![
    "plain-512",
    "plain-4k",
    "plain-64k",
    "version-2",
    "bits-1",
    "bits-64",
    "snapshots-512",
    "zlib",
    "zstd",
    "subclusters",
    "bitmaps",
    "preallocated",
    "lazy",
    "overlay",
    "deduplicated",
    "deduplicated-again",
    "deduplicated-packed",
    "deduplicated-narrow",
];

/// What is left of an input.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    /// The next `length` bytes, as far as there are any.
    pub(crate) fn take(&mut self, length: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self, length: usize) -> u64 {
        self.take(length).iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }
}

impl Choices for Input<'_> {
    fn next(&mut self) -> u64 {
        self.number(8)
    }

    fn below(&mut self, limit: u64) -> u64 {
        let length = match limit {
            0..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            _ => 4,
        };
        self.number(length) % limit
    }
}

/// A stored image as it is before something is wrong with it.
struct Base {
    name: &'static str,
    mutator: Mutator,
    /// Where the directory of the pool is, where it lies in one piece.
    directory: Option<usize>,
}

fn bases() -> &'static [Base] {
    static FOUND: OnceLock<Vec<Base>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let home = scratch();
        let load = |(name, packed): &(&'static str, &[u8])| {
            let path = home.path().join(name);
            let mut bytes = Vec::new();
            GzDecoder::new(*packed).read_to_end(&mut bytes).unwrap();
            fs::write(&path, &bytes).unwrap();
            let directory = bytes.windows(MAGIC.len()).position(|window| window == MAGIC);
            Base { name, mutator: Mutator::new(&path), directory }
        };
        BASES.iter().map(load).collect()
    })
}

/// A directory in memory that vanishes.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("dedup-img-fuzz-").tempdir_in(place).unwrap()
}

/// An image in a directory of its own.
pub(crate) struct Subject {
    home: TempDir,
    /// The image.
    pub(crate) path: PathBuf,
    /// What it was made of, for messages.
    pub(crate) story: String,
}

impl Subject {
    /// The image that the input describes.
    pub(crate) fn new(input: &mut Input<'_>) -> Self {
        let base = &bases()[usize::try_from(input.below(BASES.len() as u64)).unwrap()];
        let (mut bytes, mut story) = (base.mutator.undamaged().to_vec(), vec![base.name.to_owned()]);
        let most = input.below(MOST as u64 + 1);
        for _ in 0..most {
            if input.0.is_empty() {
                break;
            }
            story.push(base.damage(&mut bytes, input));
        }
        Self::of(&bytes, story.join("; "))
    }

    /// The pooled image with this directory in the place of its own, its checksums made right where `mended`; the image as it was
    /// where it has to notice, for it is another directory with wrong checksums.
    pub(crate) fn with_directory(directory: &[u8], mended: bool) -> (Self, Option<&'static [u8]>) {
        let base = bases().iter().find(|base| base.name == "deduplicated").unwrap();
        let mut bytes = base.mutator.undamaged().to_vec();
        let at = base.directory.unwrap();
        let length = directory.len().min(4096);
        bytes[at..at + length].copy_from_slice(&directory[..length]);
        if mended {
            mend_directory(&mut bytes[at..]);
        }
        let sound = base.mutator.undamaged();
        let members = u64::from_be_bytes(sound[at + 24..at + 32].try_into().unwrap());
        let own = at..at + 128 + 40 * usize::try_from(members).unwrap();
        let must_notice = !mended && bytes[own.clone()] != sound[own];
        (Self::of(&bytes, format!("{} with another directory", base.name)), must_notice.then_some(sound))
    }

    fn of(bytes: &[u8], story: String) -> Self {
        let home = scratch();
        let path = home.path().join("image");
        fs::write(&path, bytes).unwrap();
        // The overlay's backing file, with a size that is no multiple of its clusters.
        fs::write(home.path().join("base.raw"), [[0xa5; 70_000], [0x5a; 70_000]].concat()).unwrap();
        Self { home, path, story }
    }

    /// A path beside the image.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

impl Base {
    /// Makes something wrong, and says what.
    fn damage(&self, bytes: &mut Vec<u8>, input: &mut Input<'_>) -> String {
        let what = input.below(8);
        match (what, self.directory) {
            (0..=3, _) => self.mutator.wrong_field(bytes, input),
            (6, Some(at)) => {
                let told = overwrite(bytes, at..at + 1024, input);
                mend_directory(bytes.get_mut(at..).unwrap_or_default());
                format!("{told} of the directory, with its checksums made right")
            }
            (7, _) => self.mutator.wrong_length(bytes, input),
            (4 | 6, _) => {
                let end = bytes.len();
                overwrite(bytes, 0..end, input)
            }
            _ => overwrite(bytes, 0..512, input),
        }
    }
}

/// Overwrites one to eight bytes in `range`.
fn overwrite(bytes: &mut [u8], range: std::ops::Range<usize>, input: &mut Input<'_>) -> String {
    let at = range.start + usize::try_from(input.below(range.len().max(1) as u64)).unwrap();
    let length = usize::try_from(input.below(8)).unwrap() + 1;
    let new = input.take(length).to_vec();
    for (place, byte) in bytes.iter_mut().skip(at).zip(&new) {
        *place = *byte;
    }
    format!("{new:x?} at {at:#x}")
}

/// Makes the checksums of a directory right: first that of the records, then that of the header.
pub(crate) fn mend_directory(bytes: &mut [u8]) {
    if bytes.len() < 128 {
        return;
    }
    let members = u64::from_be_bytes(bytes[24..32].try_into().unwrap());
    let end = usize::try_from(members).ok().and_then(|members| members.checked_mul(40)?.checked_add(128));
    if let Some(records) = end.and_then(|end| bytes.get(128..end)) {
        let sum = Sha256::digest(records);
        bytes[64..96].copy_from_slice(&sum);
    }
    let sum = Sha256::digest(&bytes[..96]);
    bytes[96..128].copy_from_slice(&sum);
}
