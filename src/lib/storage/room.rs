//! How much a file can still grow.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::geteuid;

/// The bit of a process that may use what ext4 keeps for root (`CAP_SYS_RESOURCE`).
const RESERVED: u64 = 1 << 24;
/// Blocks that ext4 keeps for its own use, unless somebody has changed that: 2 %, and no more than this.
const RESERVE: u64 = 4096;
/// File systems that never write where something is: what is changed needs room as well (btrfs, ZFS, bcachefs).
const COPYING: [u32; 3] = [0x9123_683e, 0x2fc1_2fc1, 0xca45_1a4e];

/// What there is for a file to grow into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Room {
    /// Nobody knows.
    Unknown,
    /// Nothing: it is a device, which has the length that it has, and all of it.
    Fixed,
    /// A file system.
    FileSystem {
        /// Bytes that this process may still take. A quota may allow less.
        available: u64,
        /// Whether it takes room as well to change what is there.
        copies: bool,
    },
}

impl Room {
    /// That of `file`.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        if file.metadata()?.file_type().is_block_device() {
            return Ok(Self::Fixed);
        }
        let (Ok(space), Ok(system)) = (fstatvfs(file), fstatfs(file)) else { return Ok(Self::Unknown) };
        let kind = system.filesystem_type();
        let available = match kind == EXT4_SUPER_MAGIC && uses_reserve() {
            // What ext4 keeps for root is for root; what it keeps for itself is not.
            true => space.blocks_free().saturating_sub(kept(file)?),
            false => space.blocks_available(),
        };
        // A file system that does not count says that it has no blocks at all.
        if space.blocks() == 0 {
            return Ok(Self::Unknown);
        }
        let copies = u32::try_from(kind.0).is_ok_and(|kind| COPYING.contains(&kind));
        Ok(Self::FileSystem { available: available.saturating_mul(space.fragment_size()), copies })
    }
}

/// Blocks that the ext4 of `file` keeps for its own use.
fn kept(file: &File) -> io::Result<u64> {
    let device = file.metadata()?.dev();
    let link = std::fs::read_link(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    let name = link.ok().and_then(|link| link.file_name().map(PathBuf::from));
    let path = name.map(|name| Path::new("/sys/fs/ext4").join(name).join("reserved_clusters"));
    let text = path.and_then(|path| std::fs::read_to_string(path).ok());
    Ok(text.and_then(|text| text.trim().parse().ok()).unwrap_or(RESERVE))
}

/// Whether this process may use what is kept for root.
fn uses_reserve() -> bool {
    if geteuid().is_root() {
        return true;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & RESERVED != 0)
}
