//! Where the bytes of a file or block device lie: under a partition is its disk, under a loop device a file, under a mapped device or
//! an array are others, and one may stand on another.
//!
//! Two names for the same bytes are found by this, however many devices are between. The kernel tells it in /sys; where that is not
//! mounted a device is known by its number alone.

use std::collections::VecDeque;
use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, makedev, minor};

use super::open::FileId;
use crate::units::SECTOR;

/// More levels than anybody stacks; a kernel that tells of a circle does not hold us.
const LEVELS: usize = 64;

/// The places that the bytes of one file or device may be found at.
#[derive(Debug)]
pub(crate) struct Bytes(Vec<Place>);

/// All bytes of `range` of a file or device, or some of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    id: FileId,
    range: Range<u64>,
    /// Whether it is all of them: a mapped device has its bytes somewhere on another, who knows where.
    all: bool,
}

impl Bytes {
    /// The bytes of `id`.
    #[must_use]
    pub(crate) fn of(id: FileId) -> Self {
        Self::told_by(Path::new("/sys/dev/block"), id)
    }

    /// The same, as the directory `devices` tells it.
    fn told_by(devices: &Path, id: FileId) -> Self {
        let mut places = vec![];
        let mut next = VecDeque::from([Place { id, range: 0..u64::MAX, all: true }]);
        while let Some(place) = next.pop_front().filter(|_| places.len() < LEVELS) {
            next.extend(place.below(devices));
            places.push(place);
        }
        Self(places)
    }

    /// Whether a byte that is written to one is read from the other, as far as can be known. Two mapped devices on the same third one
    /// are taken for different bytes: that is what they are for.
    #[must_use]
    pub(crate) fn meet(&self, other: &Self) -> bool {
        self.0.iter().any(|ours| other.0.iter().any(|theirs| ours.meets(theirs)))
    }
}

impl Place {
    fn meets(&self, other: &Self) -> bool {
        let overlap = self.range.start.max(other.range.start) < self.range.end.min(other.range.end);
        self.id == other.id && overlap && (self.all || other.all)
    }

    /// The place or places on the level below.
    fn below(&self, devices: &Path) -> Vec<Self> {
        let FileId::Device(number) = self.id else { return Vec::new() };
        let Ok(device) = fs::canonicalize(devices.join(format!("{}:{}", major(number), minor(number)))) else {
            return Vec::new();
        };
        if device.join("partition").exists() {
            return self.of_partition(&device).into_iter().collect();
        }
        if device.join("loop").exists() {
            return self.of_loop(&device.join("loop")).into_iter().collect();
        }
        let slaves = fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
        let under = slaves.filter_map(|slave| number_in(&slave.path().join("dev")));
        under.map(|number| Self { id: FileId::Device(number), range: 0..u64::MAX, all: false }).collect()
    }

    /// This part of a partition on its disk.
    fn of_partition(&self, device: &Path) -> Option<Self> {
        let sectors = |name: &str| number(&device.join(name))?.checked_mul(SECTOR);
        let disk = number_in(&device.parent()?.join("dev"))?;
        Some(self.within(FileId::Device(disk), sectors("start")?, sectors("size")?))
    }

    /// This part of a loop device in its file.
    fn of_loop(&self, told: &Path) -> Option<Self> {
        let mut name = fs::read(told.join("backing_file")).ok()?;
        name.pop_if(|last| *last == b'\n');
        let file = fs::metadata(PathBuf::from(std::ffi::OsString::from_vec(name))).ok()?;
        let size = number(&told.join("sizelimit")).filter(|&size| size > 0).unwrap_or(u64::MAX);
        Some(self.within(FileId::of(&file), number(&told.join("offset")).unwrap_or(0), size))
    }

    /// The same bytes on what has this device as its bytes from `start` on, `size` of them.
    fn within(&self, id: FileId, start: u64, size: u64) -> Self {
        let end = start.saturating_add(size);
        let at = |offset: u64| start.saturating_add(offset).min(end);
        Self { id, range: at(self.range.start)..at(self.range.end), all: self.all }
    }
}

/// The number in a file of /sys.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim_end().parse().ok()
}

/// The device number, `major:minor`, in a file of /sys.
fn number_in(path: &Path) -> Option<u64> {
    device_number(fs::read_to_string(path).ok()?.trim_end())
}

/// The device number that is written as `major:minor`.
pub(super) fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// What /sys tells of a machine.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let home = tempfile::tempdir().unwrap();
            fs::create_dir_all(home.path().join("dev/block")).unwrap();
            Self(home)
        }

        /// A device at `path` with its number and further files.
        fn device(&self, path: &str, number: &str, files: &[(&str, &str)]) -> &Self {
            let device = self.0.path().join(path);
            for (name, text) in files.iter().chain([&("dev", number)]) {
                let file = device.join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, format!("{text}\n")).unwrap();
            }
            symlink(&device, self.0.path().join("dev/block").join(number)).unwrap();
            self
        }

        /// A device that stands on others.
        fn mapped(&self, path: &str, number: &str, slaves: &[&str]) -> &Self {
            self.device(path, number, &[]);
            let under = self.0.path().join(path).join("slaves");
            fs::create_dir(&under).unwrap();
            for slave in slaves {
                symlink(self.0.path().join(slave), under.join(slave.replace('/', "-"))).unwrap();
            }
            self
        }

        fn meet(&self, one: &str, other: &str) -> bool {
            let bytes = |number| {
                let id = FileId::Device(device_number(number).unwrap());
                Bytes::told_by(&self.0.path().join("dev/block"), id)
            };
            let met = bytes(one).meet(&bytes(other));
            assert_eq!(met, bytes(other).meet(&bytes(one)));
            met
        }
    }

    #[test]
    fn the_same_bytes_are_found_through_partitions_mapped_devices_and_arrays() {
        let machine = Machine::new();
        machine
            .device("sda", "8:0", &[])
            .device("sda/sda1", "8:1", &[("partition", "1"), ("start", "2048"), ("size", "4096")])
            .device("sda/sda2", "8:2", &[("partition", "2"), ("start", "6144"), ("size", "4096")])
            .device("sdb", "8:16", &[])
            .mapped("md0", "9:0", &["sda/sda2", "sdb"])
            .device("md0/md0p1", "259:0", &[("partition", "1"), ("start", "8"), ("size", "8")])
            .mapped("dm-0", "253:0", &["md0"])
            .mapped("dm-1", "253:1", &["md0"])
            .mapped("dm-2", "253:2", &["dm-0"]);
        for same in [
            ["8:0", "8:0"],
            ["8:0", "8:1"],
            ["9:0", "8:2"],
            ["9:0", "8:0"],
            ["9:0", "8:16"],
            ["259:0", "9:0"],
            ["259:0", "8:0"],
            ["253:0", "9:0"],
            ["253:0", "8:2"],
            ["253:2", "253:0"],
            ["253:2", "8:16"],
            ["253:0", "259:0"],
        ] {
            assert!(machine.meet(same[0], same[1]), "{same:?}");
        }
        // The neighbour partition; what only shares a disk; volumes of one group.
        for different in
            [["8:1", "8:2"], ["8:0", "8:16"], ["9:0", "8:1"], ["253:0", "8:1"], ["253:0", "253:1"], ["253:1", "253:2"]]
        {
            assert!(!machine.meet(different[0], different[1]), "{different:?}");
        }
    }

    #[test]
    fn loop_devices_over_one_file_meet_where_their_ranges_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().to_str().unwrap();
        let over = |offset, size| [("loop/backing_file", name), ("loop/offset", offset), ("loop/sizelimit", size)];
        let machine = Machine::new();
        machine
            .device("loop0", "7:0", &over("0", "0"))
            .device("loop1", "7:1", &over("0", "1048576"))
            .device("loop2", "7:2", &over("1048576", "0"))
            .device("loop2/loop2p1", "259:1", &[("partition", "1"), ("start", "8"), ("size", "8")])
            .device("loop3", "7:3", &over("1052672", "4096"))
            .device("loop4", "7:4", &[("loop/backing_file", "/nowhere (deleted)")]);
        for (one, other, same) in [
            ("7:0", "7:1", true),
            ("7:0", "7:2", true),
            ("7:1", "7:2", false),
            ("259:1", "7:0", true),
            ("259:1", "7:3", true),
            ("259:1", "7:1", false),
            ("7:4", "7:0", false),
        ] {
            assert_eq!(machine.meet(one, other), same, "{one} {other}");
        }
        let devices = machine.0.path().join("dev/block");
        let [whole, part] =
            ["7:0", "7:3"].map(|number| Bytes::told_by(&devices, FileId::Device(device_number(number).unwrap())));
        let itself = Bytes::told_by(&devices, FileId::of(&file.as_file().metadata().unwrap()));
        assert!(whole.meet(&itself) && itself.meet(&part));
    }

    #[test]
    fn devices_in_a_circle_end() {
        let machine = Machine::new();
        machine.mapped("dm-0", "253:0", &[]).mapped("dm-1", "253:1", &["dm-0"]);
        symlink(machine.0.path().join("dm-1"), machine.0.path().join("dm-0/slaves/dm-1")).unwrap();
        assert!(machine.meet("253:0", "253:1"));
    }
}
