//! Loop devices, which need root.

use super::qemu;
use crate::args;
use std::ffi::OsString;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device, gone with the test.
pub(crate) struct Loop(PathBuf);

impl Loop {
    /// A device that stores its content in `file`.
    #[track_caller]
    pub(crate) fn over(file: &Path) -> Self {
        Self::made(args!["-f", "--show", file])
    }

    /// The same with logical blocks of `block` bytes, where the kernel has such.
    pub(crate) fn with_blocks(file: &Path, block: u32) -> Result<Self, String> {
        let made = qemu::run("losetup", args!["-b", block.to_string(), "-f", "--show", file]);
        if made.code == 0 { Ok(Self(PathBuf::from(made.stdout.trim()))) } else { Err(made.stderr) }
    }

    /// The same, and nobody can write it. (`blockdev --setro` would outlive the device.)
    #[track_caller]
    pub(crate) fn read_only(file: &Path) -> Self {
        Self::made(args!["-r", "-f", "--show", file])
    }

    #[track_caller]
    fn made<const N: usize>(words: [OsString; N]) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test makes a loop device and needs root, as tests/run has");
        let made = qemu::run("losetup", words).ok();
        Self(PathBuf::from(made.stdout.trim()))
    }

    /// A device of `length` bytes that somebody has filled with 0xff before, stored in `file`.
    #[track_caller]
    pub(crate) fn used(file: &Path, length: u64) -> Self {
        fs::write(file, vec![0xff; usize::try_from(length).unwrap()]).unwrap();
        Self::over(file)
    }
}

impl Deref for Loop {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}
