//! The programs, each made to read a whole disk and to write pieces of it.

use crate::args;
use crate::nbd;
use crate::request::{Request, encode};
use crate::support::{Ran, qemu};
use std::fs;
use std::path::Path;

/// A reader and writer of QCOW2.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    /// The column of the tables.
    pub(crate) column: &'static str,
    /// Whether it takes [`Request::Zeros`].
    pub(crate) zeros: bool,
    /// The word for the library in our program `other`; absent for qemu-nbd.
    library: Option<&'static str>,
}

/// All of them.
pub(crate) const PROGRAMS: [Program; 4] = [
    Program { column: "imago 0.2.6", zeros: true, library: Some("imago") },
    Program { column: "rust-img-qcow2 0.6.1", zeros: false, library: Some("rust-img") },
    Program { column: "qcow2-rs 0.1.6", zeros: false, library: Some("qcow2-rs") },
    Program { column: "qemu-nbd 10", zeros: true, library: None },
];

impl Program {
    /// All of the disk, or the words of the refusal.
    pub(crate) fn read(self, image: &Path) -> Result<Vec<u8>, String> {
        let Some(library) = self.library else { return nbd::read(image) };
        let copy = image.with_extension("copy");
        let ran = other("read", library, image, &copy)?;
        let disk = fs::read(&copy).unwrap_or_else(|error| panic!("{error}: {}", ran.told()));
        fs::remove_file(copy).unwrap();
        Ok(disk)
    }

    /// Opens the image, writes, flushes and closes it.
    pub(crate) fn write(self, image: &Path, requests: &[Request]) -> Result<(), String> {
        let Some(library) = self.library else { return nbd::write(image, requests) };
        let file = image.with_extension("requests");
        fs::write(&file, encode(requests)).unwrap();
        other("write", library, image, &file).map(drop)
    }
}

/// Runs a library on an image, for two minutes at most: a machine may be busy.
fn other(action: &str, library: &str, image: &Path, file: &Path) -> Result<Ran, String> {
    let program = env!("CARGO_BIN_EXE_other");
    let ran = qemu::run("timeout", args!["120", program, action, library, image, file]);
    match ran.code {
        0 => Ok(ran),
        1 => Err(ran.stderr.trim().to_owned()),
        124 => Err("does not end".into()),
        _ => {
            let mut lines = ran.stderr.lines().skip_while(|line| !line.contains("panicked at"));
            Err(format!("panic: {}", lines.nth(1).unwrap_or_default()))
        }
    }
}
