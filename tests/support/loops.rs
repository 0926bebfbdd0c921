//! Loop devices, which need root.

use super::{Ran, qemu};
use crate::args;
use std::ffi::OsString;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

/// Adds (1) or removes (2) a partition: the ioctl BLKPG, for whose programs no package of every release is known. Bytes of the device
/// stay as they are. Perl is part of every Debian.
const BLKPG: &str = r#"
my ($device, $what, $start, $length, $number) = @ARGV;
open(my $disk, "<", $device) or die "$device: $!";
my $partition = pack("q q i a64 a64 x4", $start, $length, $number, "", "");
my $request = pack("i i i x4 P", $what, 0, length $partition, $partition);
defined ioctl($disk, 0x1269, $request) or die "BLKPG: $!";
"#;

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
        // Where another test had the free device open while it was made (as losetup has, to look), Linux goes on to write it in the
        // blocks of before, and each of those writes fails.
        for _ in 0..100 {
            let made = qemu::run("losetup", args!["-b", block.to_string(), "-f", "--show", file]);
            if made.code != 0 {
                return Err(made.stderr);
            }
            let device = Self::begun(&made);
            let written_in = qemu::run("blockdev", args!["--getbsz", &*device]).ok().stdout;
            if written_in.trim().parse::<u32>().unwrap() >= block {
                return Ok(device);
            }
            drop(device);
            sleep(Duration::from_millis(20));
        }
        panic!("somebody has the free loop device open all the time");
    }

    /// The same, and nobody can write it. (`blockdev --setro` would outlive the device.)
    #[track_caller]
    pub(crate) fn read_only(file: &Path) -> Self {
        Self::made(args!["-r", "-f", "--show", file])
    }

    /// A device over the bytes of `file` from `offset` on, `length` of them or all that follow.
    #[track_caller]
    pub(crate) fn of_range(file: &Path, offset: u64, length: Option<u64>) -> Self {
        let length = length.map_or("0".to_owned(), |length| length.to_string());
        Self::made(args!["-o", offset.to_string(), "--sizelimit", length, "-f", "--show", file])
    }

    fn change_partition(&self, what: &str, start: u64, length: u64, number: u32) -> Ran {
        let [start, length, number] = [start, length, number.into()].map(|number: u64| number.to_string());
        qemu::run("perl", args!["-e", BLKPG, &self.0, what, start, length, number])
    }

    /// Partition `number` from `start` on, both in bytes.
    #[track_caller]
    pub(crate) fn partition(&self, number: u32, start: u64, length: u64) -> Partition<'_> {
        self.change_partition("1", start, length, number).ok();
        let node = PathBuf::from(format!("{}p{number}", self.0.display()));
        let made = Partition { disk: self, number, node };
        // Who makes the nodes may take a moment; in a container nobody does.
        for _ in 0..100 {
            if made.exists() {
                return made;
            }
            sleep(Duration::from_millis(10));
        }
        let told = format!("/sys/class/block/{}/dev", made.node.file_name().unwrap().display());
        let told = fs::read_to_string(told).unwrap();
        let (major, minor) = told.trim().split_once(':').unwrap();
        qemu::run("mknod", args![&made.node, "b", major, minor]).ok();
        made
    }

    #[track_caller]
    fn made<const N: usize>(words: [OsString; N]) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test makes a loop device and needs root, as tests/run has");
        let made = qemu::run("losetup", words).ok();
        Self::begun(&made)
    }

    /// The device of which losetup has told.
    fn begun(made: &Ran) -> Self {
        let device = PathBuf::from(made.stdout.trim());
        // A write that failed when the device was another test's is told to whoever flushes it next.
        let _ = fs::File::open(&device).and_then(|device| device.sync_all());
        Self(device)
    }

    /// A device of `length` bytes that somebody has filled with 0xff before, stored in `file`.
    #[track_caller]
    pub(crate) fn used(file: &Path, length: u64) -> Self {
        fs::write(file, vec![0xff; usize::try_from(length).unwrap()]).unwrap();
        Self::over(file)
    }
}

/// A partition of a loop device.
pub(crate) struct Partition<'a> {
    disk: &'a Loop,
    number: u32,
    node: PathBuf,
}

impl Deref for Partition<'_> {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.node
    }
}

impl Drop for Partition<'_> {
    fn drop(&mut self) {
        self.disk.change_partition("2", 0, 0, self.number);
        let _ = fs::remove_file(&self.node);
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
