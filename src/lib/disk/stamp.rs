//! Whether a file was written while it was read, as far as its times and its length tell.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};

/// For how long the kernel believes what a FUSE server has said of a file, mostly, and a little more.
const CACHED: Duration = Duration::from_millis(1100);
/// Times that are older than this many seconds do not follow the clock.
const RECENT: i64 = 3;

/// What changes when a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    len: u64,
    times: Times,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Times {
    /// When the content was last written, and when anything about the file was last changed: a writer may set the first back.
    /// Seconds and nanoseconds of both.
    At([i64; 4]),
    /// Those of a block device do not tell whether it was written.
    Untold,
    /// They move although nobody writes: QEMU's FUSE export says that it is always now.
    Restless,
}

impl Stamp {
    /// Looks at a file before it is read; twice where its times may be the clock's.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn before(file: &File) -> io::Result<Self> {
        let first = Self::of(file)?;
        if !first.may_follow_the_clock()
            || !fstatfs(file).is_ok_and(|system| system.filesystem_type() == FUSE_SUPER_MAGIC)
        {
            return Ok(first);
        }
        sleep(CACHED);
        let second = Self::of(file)?;
        Ok(if second.times == first.times { second } else { Self { times: Times::Restless, ..second } })
    }

    /// Whether the file was written since; of one that is restless only its length tells.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn has_changed(&self, file: &File) -> io::Result<bool> {
        let now = Self::of(file)?;
        Ok(now.len != self.len || !self.is_restless() && now.times != self.times)
    }

    /// Whether its times tell nothing.
    pub(super) fn is_restless(&self) -> bool {
        self.times == Times::Restless
    }

    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let times = match metadata.is_file() {
            true => Times::At([metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()]),
            false => Times::Untold,
        };
        Ok(Self { len: metadata.len(), times })
    }

    fn may_follow_the_clock(&self) -> bool {
        let Times::At([written, _, changed, _]) = self.times else { return false };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs().cast_signed());
        written.max(changed) >= now.saturating_sub(RECENT)
    }
}
