//! QEMU's image locks, so that neither side opens what the other is using (I6).
//!
//! QEMU (block/file-posix.c, 10.0) says what it does and what it tolerates by shared OFD locks on single bytes of the image:
//! byte 100 + b for "I use permission b", byte 200 + b for "I do not share permission b". After placing its own it asks
//! whether anyone holds a byte that contradicts them. Two who open at the same time may both fail, but never both succeed.

use std::fs::File;
use std::path::Path;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, flock};

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::name::shown;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
const USE: i64 = 100;
const NOT_SHARED: i64 = 200;

/// Whether images are locked, as QEMU's `locking` of a file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// They are, where the kernel has such locks; a file system that refuses them is an error.
    #[default]
    Auto,
    /// They are, and a kernel without such locks is an error too.
    On,
    /// They are not: nothing keeps two programs from writing the same image, which destroys it.
    Off,
}

static LOCKING: OnceLock<Locking> = OnceLock::new();

impl Locking {
    /// Decides for this process, before it opens its first image; the first decision stands. Whether files can be locked depends on
    /// the machine and its file systems, and half of what an operation opens being locked would help nobody.
    pub fn decide(self) {
        let _ = LOCKING.set(self);
    }

    fn decided() -> Self {
        LOCKING.get().copied().unwrap_or_default()
    }
}

/// How an image is used, and what is tolerated beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Reads; others may read (QEMU: a read-only open).
    Read,
    /// Reads; others may do what they like (QEMU: `-U`).
    ReadShared,
    /// Reads and writes; others may only look (QEMU: a read-write open).
    Write,
}

impl LockMode {
    /// The bytes to hold.
    fn held(self) -> &'static [i64] {
        const READ: &[i64] = &[USE + CONSISTENT_READ, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
        const ALL: &[i64] =
            &[USE + CONSISTENT_READ, USE + WRITE, USE + RESIZE, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
        match self {
            Self::Read => READ,
            Self::ReadShared => &[USE + CONSISTENT_READ],
            Self::Write => ALL,
        }
    }

    /// The bytes that nobody else may hold, in QEMU's order, and what their holder keeps us from.
    fn refused(self) -> &'static [(i64, &'static str)] {
        const READ: &[(i64, &str)] = &[
            (NOT_SHARED + CONSISTENT_READ, "\"consistent read\""),
            (USE + WRITE, "shared \"write\""),
            (USE + RESIZE, "shared \"resize\""),
        ];
        const ALL: &[(i64, &str)] = &[
            (NOT_SHARED + CONSISTENT_READ, "\"consistent read\""),
            (NOT_SHARED + WRITE, "\"write\""),
            (NOT_SHARED + RESIZE, "\"resize\""),
            (USE + WRITE, "shared \"write\""),
            (USE + RESIZE, "shared \"resize\""),
        ];
        match self {
            Self::Read => READ,
            Self::ReadShared => &[(NOT_SHARED + CONSISTENT_READ, "\"consistent read\"")],
            Self::Write => ALL,
        }
    }
}

/// Takes QEMU's locks on `file`, which stay until it is closed.
///
/// # Errors
/// [`ErrorKind::Locked`] in QEMU's words where another program's use contradicts `mode`. On a kernel without
/// OFD locks QEMU does not lock (`locking=auto`), and neither does this; where the file system refuses them, both fail.
pub(crate) fn lock(file: &File, path: &Path, mode: LockMode) -> Result<()> {
    let locking = Locking::decided();
    if locking == Locking::Off {
        return Ok(());
    }
    for &byte in mode.held() {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(byte, F_RDLCK))) {
            Ok(_) => {}
            Err(Errno::EACCES | Errno::EAGAIN) => return Err(locked(path, &format!("Failed to lock byte {byte}"))),
            Err(Errno::EINVAL | Errno::ENOSYS) if locking == Locking::Auto => return Ok(()),
            Err(e) => return Err(no_locks(&format!("Failed to lock byte {byte}"), e)),
        }
    }
    for &(byte, what) in mode.refused() {
        let mut probe = range(byte, F_WRLCK);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe))
            .map_err(|e| no_locks(&format!("Failed to check lock byte {byte}"), e))?;
        if i32::from(probe.l_type) != F_UNLCK {
            return Err(locked(path, &format!("Failed to get {what} lock")));
        }
    }
    Ok(())
}

/// The system cannot tell who else uses the file.
fn no_locks(what: &str, reason: Errno) -> Error {
    Error::io(what, reason.into()).advise(Advice::LockNothing)
}

fn locked(path: &Path, message: &str) -> Error {
    let hint = format!("Is another process using the image [{}]?", shown(path));
    Error::new(ErrorKind::Locked, format!("{message}\n{hint}"))
}

fn range(byte: i64, kind: i32) -> flock {
    flock {
        // Constants of the kernel, which fit; it refuses what is none of them.
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: i16::try_from(SEEK_SET).unwrap_or(i16::MAX),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_writers_do_not() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let open = |mode| {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            lock(&file, &path, mode).map(|()| file)
        };
        {
            let _one = open(LockMode::Read).unwrap();
            let _two = open(LockMode::Read).unwrap();
            let error = open(LockMode::Write).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked);
            assert!(
                error.to_string().starts_with("Failed to get \"write\" lock\nIs another process using the image [")
            );
        }
        let _writer = open(LockMode::Write).unwrap();
        let error = open(LockMode::Read).unwrap_err();
        assert!(error.to_string().starts_with("Failed to get shared \"write\" lock"));
        let file = File::open(&path).unwrap();
        let error = lock(&file, Path::new("a\nb\x1b"), LockMode::Read).unwrap_err();
        assert!(error.to_string().ends_with("\nIs another process using the image [a\\nb\\u{1b}]?"));
        assert!(open(LockMode::ReadShared).is_ok());
    }
}
