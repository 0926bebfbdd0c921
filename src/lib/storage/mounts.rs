//! Whether somebody else writes a block device: a file system on it that is mounted.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use nix::sys::stat::major;

use super::open::FileId;
use super::stack::{Bytes, device_number};

/// Where a file system that lies on some of `bytes` is mounted, so that it can be written; `None` too where the system does not tell.
#[must_use]
pub(crate) fn writable_mount(bytes: &Bytes) -> Option<PathBuf> {
    let told = fs::read("/proc/self/mountinfo").ok()?;
    told.split(|byte| *byte == b'\n').filter_map(Mount::parse).find(|mount| mount.is_on(bytes)).map(|mount| mount.point)
}

/// A file system that may be written.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// The number of its device, or one that stands for several.
    number: u64,
    source: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// What a line of mountinfo says, if the file system is writable: a mount that is read-only may be one of several.
    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let text = |at: usize| fields.get(at).copied();
        let number = device_number(std::str::from_utf8(text(2)?).ok()?)?;
        let end = fields.iter().position(|field| *field == b"-")?;
        text(end + 3)?.split(|byte| *byte == b',').find(|option| *option == b"rw")?;
        Some(Self { number, source: path(text(end + 2)?), point: path(text(4)?) })
    }

    fn is_on(&self, bytes: &Bytes) -> bool {
        // File systems with several devices, btrfs at all times, have a number that is no device's.
        let number = match major(self.number) {
            0 => fs::metadata(&self.source).ok().filter(|found| found.file_type().is_block_device()).map(|f| f.rdev()),
            _ => Some(self.number),
        };
        number.is_some_and(|number| Bytes::of(FileId::Device(number)).meet(bytes))
    }
}

/// A name in mountinfo: blanks and backslashes are three octal digits behind a backslash.
fn path(name: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = name;
    while let Some((&first, behind)) = rest.split_first() {
        let digits = behind.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let writable =
            b"36 35 98:1 / /mnt/a\\040b\\134c rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        let mount = Mount::parse(writable).unwrap();
        assert_eq!(mount, Mount { number: makedev(98, 1), source: "/dev/root".into(), point: "/mnt/a b\\c".into() });
        // The mount is read-only, the file system is not.
        assert!(Mount::parse(b"36 35 98:1 / /mnt ro - ext3 /dev/root rw").is_some());
        for other in
            [&b"36 35 98:1 / /mnt ro - ext3 /dev/root ro,rwx"[..], b"", b"36 35 98 / /mnt rw - ext3 /dev/root rw"]
        {
            assert_eq!(Mount::parse(other), None);
        }
    }
}
