//! Images to try, all made by stock qemu-img and qemu-io: one family for each thing that a QCOW2 image can hold. A family is
//! built once and kept; tests copy what they want to change.

use super::qemu;
use super::{Random, cached};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// One KiB and one MiB in bytes.
pub(crate) const K: u64 = 1 << 10;
/// See [`K`].
pub(crate) const M: u64 = 1 << 20;

/// A source to convert, and what it holds.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// For messages.
    pub(crate) name: String,
    /// The image.
    pub(crate) path: PathBuf,
    /// Its format.
    pub(crate) format: &'static str,
    /// The snapshot meant, where it is not the active layer.
    pub(crate) snapshot: Option<&'static str>,
    /// The same content as a raw file, made by qemu-img.
    pub(crate) truth: PathBuf,
}

/// Collects the samples of one family while their directory is being built, and finds them again when it is there already.
pub(super) struct Family<'a> {
    home: &'a Path,
    fresh: bool,
    samples: Vec<Sample>,
}

impl Family<'_> {
    /// Adds the image `name`, which `build` makes, and the raw file that tells its content.
    pub(super) fn add(&mut self, name: &str, format: &'static str, build: impl FnOnce(&Path)) -> PathBuf {
        let path = self.home.join(name);
        if self.fresh {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            build(&path);
        }
        self.also(name, format, None);
        path
    }

    /// Adds a sample of an image that is there already: its active layer, or the snapshot that `-l` names, here with its id. What a
    /// snapshot holds is what reverting to it gives, its own size included; `qemu-img convert -l` keeps the active layer's size.
    pub(super) fn also(&mut self, name: &str, format: &'static str, snapshot: Option<(&'static str, &str)>) {
        let path = self.home.join(name);
        let label = [Some(name), snapshot.map(|s| s.0)].into_iter().flatten().collect::<Vec<_>>().join("@");
        let truth = self.home.join(format!("{}.truth", label.replace('/', "_")));
        match snapshot {
            _ if !self.fresh => {}
            None => drop(qemu::convert(format, &path, "raw", &truth, &[])),
            Some((_, id)) => {
                let reverted = self.home.join("reverted");
                std::fs::copy(&path, &reverted).unwrap();
                qemu::snapshot("-a", id, &reverted).ok();
                qemu::convert(format, &reverted, "raw", &truth, &[]);
                std::fs::remove_file(&reverted).unwrap();
            }
        }
        let snapshot = snapshot.map(|s| s.0);
        self.samples.push(Sample { name: label, path, format, snapshot, truth });
    }
}

/// Builds a family's directory if no test has yet, and lists its samples. The directory's name carries a sum over the recipe,
/// so that a change there builds anew.
pub(super) fn family(name: &str, fill: impl Fn(&mut Family<'_>)) -> Vec<Sample> {
    let recipe = [&include_bytes!("corpus.rs")[..], include_bytes!("families.rs")].concat();
    let sum = recipe.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    let home = cached(&format!("{name}-{sum:016x}"), |home| {
        std::fs::create_dir(home).unwrap();
        fill(&mut Family { home, fresh: true, samples: Vec::new() });
    });
    let mut found = Family { home: &home, fresh: false, samples: Vec::new() };
    fill(&mut found);
    found.samples
}

/// Some MiB with natural and planted duplicates: equal neighbours up to 2 MiB, equal blocks at aligned and at odd offsets, 0xff
/// fill, holes, islands in zeros, and an end that is no multiple of any cluster but repeats the beginning.
pub(crate) fn content() -> Vec<u8> {
    let mut random = Random::new(1);
    let mut bytes = random.bytes(2 * M as usize);
    bytes.extend_from_within(..);
    let mut put = |at: u64, piece: &[u8]| {
        let at = at as usize;
        bytes.resize(bytes.len().max(at + piece.len()), 0);
        bytes[at..at + piece.len()].copy_from_slice(piece);
    };
    let block = random.bytes(64 * K as usize);
    for (at, length) in [(0, 4), (4, 4), (8, 8), (20, 8), (32, 16), (48, 16), (64, 64), (132, 64), (256, 32), (288, 32)]
    {
        put(4 * M + at * K, &block[..(length * K) as usize]);
    }
    for (n, odd) in [1, 511, 512, 513, 2048, 4095, 4097].into_iter().enumerate() {
        put(4 * M + 384 * K + n as u64 * 48 * K + odd, &block[..32 * K as usize]);
    }
    for n in 0..16 {
        put(5 * M + n * 64 * K + 512 * n, &[1 + (n % 3) as u8; 512]);
    }
    put(5 * M + 777 * K, b"x");
    put(6 * M, &[0xff; 512 * K as usize]);
    let prose: Vec<u8> = (0..30).flat_map(|_| include_bytes!("corpus.rs").iter().copied()).take(M as usize).collect();
    put(6 * M + 512 * K, &prose);
    bytes.resize(8 * M as usize, 0);
    let end = bytes[..0x11e00].to_vec();
    // The last, partial cluster at 64 KiB, filled up with zeros, equals a whole cluster in the middle.
    bytes[(7 * M + 512 * K) as usize..][..0x1e00].copy_from_slice(&end[0x1_0000..]);
    bytes.extend(end);
    bytes
}

/// Writes a raw file with holes where there are zeros.
pub(crate) fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    let zeros = [0; 4096];
    for (n, piece) in bytes.chunks(4096).enumerate() {
        if *piece != zeros[..piece.len()] {
            file.write_all_at(piece, n as u64 * 4096).unwrap();
        }
    }
}

/// A raw file with [`content`], kept.
pub(crate) fn plain() -> PathBuf {
    family("plain", |f| {
        f.add("plain.raw", "raw", |path| write_sparse(path, &content()));
    })[0]
        .path
        .clone()
}

/// Makes a QCOW2 image of [`content`] by `qemu-img convert`.
pub(super) fn from_content(path: &Path, options: &str, more: &[&str]) {
    let mut words = more.to_vec();
    if !options.is_empty() {
        words.extend(["-o", options]);
    }
    qemu::convert("raw", &plain(), "qcow2", path, &words);
}

/// Runs qemu-io commands on a QCOW2 image; `@` stands for the file with [`content`].
pub(crate) fn edit(path: &Path, commands: &[&str]) {
    let plain = plain();
    let commands: Vec<String> = commands.iter().map(|c| c.replace('@', plain.to_str().unwrap())).collect();
    qemu::io("qcow2", path, &commands);
}

/// Overwrites bytes of a file.
pub(crate) fn patch(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}
