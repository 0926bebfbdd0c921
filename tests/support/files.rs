//! Files as a small system has them, made from a seed, so that they are the same on every machine: texts of words that come often and
//! seldom, programs of machine code with tables and padding, and what is compressed already.

use super::Random;
use std::fs;
use std::path::{Path, PathBuf};

/// A file: its name below the root, and its content.
pub(crate) struct Made {
    /// A relative path; its first part says of which kind it is.
    pub(crate) name: PathBuf,
    /// The content, never empty.
    pub(crate) bytes: Vec<u8>,
}

/// An endless row of files, the same one for the same seed.
pub(crate) struct Files {
    random: Random,
    words: Vec<Vec<u8>>,
    codes: Vec<Vec<u8>>,
    pages: Vec<Vec<u8>>,
    count: u64,
}

/// A block of a file system, and where a program's pages begin.
const PAGE: usize = 4096;

impl Files {
    /// The files that belong to a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let word = |random: &mut Random| {
            let letters = (0..2 + random.below(9)).map(|_| b"etaoinshrdlucmfywgpbvkxqjz"[skewed(random, 26)]);
            letters.chain(*b" ").collect()
        };
        let words = (0..6000).map(|_| word(&mut random)).collect();
        let code = |random: &mut Random| {
            let length = 1 + skewed(random, 7);
            random.bytes(length)
        };
        let codes = (0..3000).map(|_| code(&mut random)).collect();
        // What a linker puts into many programs.
        let pages = (0..24).map(|_| random.bytes(PAGE)).collect();
        Self { random, words, codes, pages, count: 0 }
    }

    /// Writes files of at most `bytes` in all below a directory, and returns their paths.
    pub(crate) fn tree(self, root: &Path, bytes: u64) -> Vec<PathBuf> {
        let mut left = bytes;
        let fits = |made: &Made| {
            let rest = left.checked_sub(made.bytes.len() as u64);
            left = rest.unwrap_or(0);
            rest.is_some()
        };
        let put = |made: Made| {
            let path = root.join(made.name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, made.bytes).unwrap();
            path
        };
        self.take_while(fits).map(put).collect()
    }

    /// Writes the next `count` files into a directory, all beside each other, and returns their paths.
    pub(crate) fn write(&mut self, directory: &Path, count: usize) -> Vec<PathBuf> {
        fs::create_dir_all(directory).unwrap();
        let put = |made: Made| {
            let path = directory.join(made.name.file_name().unwrap());
            fs::write(&path, made.bytes).unwrap();
            path
        };
        self.take(count).map(put).collect()
    }

    /// Lines of words.
    fn text(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 80);
        while bytes.len() < length {
            for _ in 0..1 + self.random.below(14) {
                bytes.extend(&self.words[skewed(&mut self.random, 6000)]);
            }
            bytes.push(b'\n');
        }
        bytes.truncate(length);
        bytes
    }

    /// Pages of code, some that others have too, tables of addresses, and padding.
    fn program(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + PAGE);
        while bytes.len() < length {
            let end = bytes.len() + PAGE * (1 + self.random.below(8) as usize);
            match self.random.below(40) {
                0 => bytes.extend(&self.pages[self.random.below(24) as usize]),
                1 => bytes.resize(end, 0),
                2 => bytes.resize(end, 0xcc),
                3..9 => {
                    let mut address = self.random.below(1 << 22);
                    while bytes.len() < end {
                        bytes.extend(address.to_be_bytes());
                        address += 8 * self.random.below(40);
                    }
                }
                _ => {
                    while bytes.len() < end {
                        bytes.extend(&self.codes[skewed(&mut self.random, 3000)]);
                        if self.random.below(12) == 0 {
                            let address = self.random.below(1 << 22).to_be_bytes();
                            bytes.extend(&address[4..]);
                        }
                    }
                    bytes.truncate(end);
                }
            }
        }
        bytes.truncate(length);
        bytes
    }
}

impl Iterator for Files {
    type Item = Made;

    fn next(&mut self) -> Option<Made> {
        self.count += 1;
        let kind = self.random.below(10);
        let (shortest, doublings) = [(150, 10), (8 << 10, 8), (900, 8)][(kind / 4) as usize];
        // Every size between one doubling and the next, and of each doubling as many.
        let low = shortest << self.random.below(doublings);
        let length = (low + self.random.below(low)) as usize;
        let (top, bytes) = match kind {
            0..4 => ("etc", self.text(length)),
            4..8 => ("usr/bin", self.program(length)),
            _ => ("usr/share", self.random.bytes(length)),
        };
        let name = format!("{top}/{}/file-{}", self.count / 50, self.count);
        Some(Made { name: name.into(), bytes })
    }
}

/// A number below `limit`, low ones far more often.
fn skewed(random: &mut Random, limit: u64) -> usize {
    let below = random.below(limit);
    (below * random.below(limit) / limit * (1 + random.below(limit)) / limit) as usize
}
