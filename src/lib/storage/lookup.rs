//! Where a path leads, as the kernel decides it.
//!
//! A target that will be replaced is needed as a directory and a name in it, which the kernel does not tell. So the kernel looks the
//! path up first, with all its rules (`fs.protected_symlinks` among them: in a directory like /tmp nobody follows another user's
//! link), and then the links at the end of the path are followed one by one, each held open, to the file that the kernel has found.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, Stat, fstat, fstatfs, openat, statat};
use rustix::io::Errno;

/// As many links in a row as the kernel follows.
const MOST_LINKS: usize = 40;
/// A directory in which everybody may make names, and nobody may change another's.
const STICKY: Mode = Mode::SVTX.union(Mode::WOTH);

/// A name in a directory.
#[derive(Debug)]
pub(crate) struct Place {
    /// The directory, open for looking names up only.
    pub(crate) directory: OwnedFd,
    /// How the directory was reached, for messages and for temporary files.
    pub(crate) path: PathBuf,
    /// The name.
    pub(crate) name: OsString,
}

impl Place {
    /// What has the name now; links are not followed.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        Ok(statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// The path of another name beside it.
    pub(crate) fn beside(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// Opens the file of this name for reading and writing.
    fn open(&self) -> io::Result<File> {
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(fstat(&self.directory)?.st_mode);
        if mode.contains(Mode::SVTX) && mode.intersects(Mode::WOTH | Mode::WGRP) {
            // There the kernel keeps programs from taking another user's file for the one that they meant to make
            // (fs.protected_regular), where they say that they would make it.
            flags |= OFlags::CREATE;
        }
        Ok(openat(&self.directory, &self.name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }
}

/// What is at a path.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nothing, and this is where it would be.
    Nothing(Place),
    /// A regular file.
    File(Existing),
    /// Something else, which is not a directory.
    Other(Metadata),
}

/// A regular file that was found.
#[derive(Debug)]
pub(crate) struct Existing {
    /// Where it is; `None` for a descriptor of a process, behind which there may be a file without a name.
    pub(crate) place: Option<Place>,
    pinned: File,
}

impl Existing {
    /// Opens it for reading and writing. `path` is where it was found.
    pub(crate) fn open(&self, path: &Path) -> io::Result<File> {
        let file = match &self.place {
            Some(place) => place.open()?,
            None => File::options().read(true).write(true).open(path)?,
        };
        let (pinned, opened) = (self.pinned.metadata()?, file.metadata()?);
        if (pinned.dev(), pinned.ino()) != (opened.dev(), opened.ino()) {
            return Err(changed());
        }
        Ok(file)
    }
}

fn changed() -> io::Error {
    io::Error::other("the file was replaced while it was opened; try again")
}

/// Looks up where `path` leads.
///
/// # Errors
/// The kernel's, also for links that it does not follow; `EISDIR` for a directory.
pub(crate) fn look_up(path: &Path) -> io::Result<Found> {
    let pinned = match openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(found) => File::from(found),
        Err(Errno::NOENT) => return nothing(path),
        Err(e) => return Err(e.into()),
    };
    let metadata = pinned.metadata()?;
    if metadata.is_dir() {
        return Err(Errno::ISDIR.into());
    }
    if !metadata.is_file() {
        return Ok(Found::Other(metadata));
    }
    let place = follow(path)?;
    if let Some(place) = &place {
        let named = place.stat()?;
        if (named.st_dev, named.st_ino) != (metadata.dev(), metadata.ino()) {
            return Err(changed());
        }
    }
    Ok(Found::File(Existing { place, pinned }))
}

/// Where a file would be that is not there.
fn nothing(path: &Path) -> io::Result<Found> {
    let place = follow(path)?.ok_or(Errno::NOENT)?;
    match place.stat() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing(place)),
        Err(e) => Err(e),
        Ok(_) => Err(changed()),
    }
}

/// Follows the links at the end of `path` to a name that is none; `None` where one of them is a descriptor of a process.
fn follow(path: &Path) -> io::Result<Option<Place>> {
    let (mut parent, mut name) = split(path.as_os_str())?;
    let mut directory = open_directory(CWD, &parent)?;
    for _ in 0..MOST_LINKS {
        let link = match openat(&directory, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(link) => link,
            Err(Errno::NOENT) => return Ok(Some(Place { directory, path: parent, name })),
            Err(e) => return Err(e.into()),
        };
        let status = fstat(&link)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::Symlink {
            return Ok(Some(Place { directory, path: parent, name }));
        }
        // Links in /proc lead to open files, whatever they read as.
        if fstatfs(&directory)?.f_type == PROC_SUPER_MAGIC {
            return Ok(None);
        }
        ensure_followed(&status, &fstat(&directory)?)?;
        let target = OsString::from_vec(rustix::fs::readlinkat(&link, "", Vec::new())?.into_bytes());
        let (onward, last) = split(&target)?;
        directory = open_directory(&directory, &onward)?;
        parent = parent.join(onward);
        name = last;
    }
    Err(Errno::LOOP.into())
}

/// The kernel's rule once more, for the very link that is followed here: between the kernel's look and this one it may have been
/// exchanged.
fn ensure_followed(link: &Stat, directory: &Stat) -> io::Result<()> {
    let own = link.st_uid == nix::unistd::geteuid().as_raw();
    let common = Mode::from_raw_mode(directory.st_mode).contains(STICKY) && link.st_uid != directory.st_uid;
    if own || !common {
        return Ok(());
    }
    let off = std::fs::read_to_string("/proc/sys/fs/protected_symlinks").is_ok_and(|text| text.trim_end() == "0");
    if off { Ok(()) } else { Err(Errno::ACCESS.into()) }
}

/// Directory and name of a path. A path that can only be a directory has no name.
fn split(path: &OsStr) -> io::Result<(PathBuf, OsString)> {
    let bytes = path.as_bytes();
    let (parent, name) = match bytes.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => bytes.split_at(slash + 1),
        None => (&b"."[..], bytes),
    };
    match name {
        _ if bytes.is_empty() => Err(Errno::NOENT.into()),
        b"" | b"." | b".." => Err(Errno::ISDIR.into()),
        _ => Ok((PathBuf::from(OsStr::from_bytes(parent)), OsStr::from_bytes(name).to_owned())),
    }
}

fn open_directory(base: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(base, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_to_a_name() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("inner")).unwrap();
        fs::write(home.path().join("inner/file"), b"x").unwrap();
        symlink("second", home.path().join("first")).unwrap();
        symlink("inner/file", home.path().join("second")).unwrap();
        symlink("inner/none", home.path().join("dangling")).unwrap();
        let name = |path: &str| match look_up(&home.path().join(path)).unwrap() {
            Found::Nothing(place) => (place.beside(&place.name), false),
            Found::File(Existing { place: Some(place), .. }) => (place.beside(&place.name), true),
            other => panic!("{other:?}"),
        };
        assert_eq!(name("inner/file"), (home.path().join("inner/file"), true));
        assert_eq!(name("first"), (home.path().join("inner/file"), true));
        assert_eq!(name("dangling"), (home.path().join("inner/none"), false));
        assert_eq!(name("none"), (home.path().join("none"), false));
    }

    #[test]
    fn what_can_only_be_a_directory_is_none_of_ours() {
        let home = tempfile::tempdir().unwrap();
        symlink("none/", home.path().join("link")).unwrap();
        for name in ["", "inner/", "inner/.", "none/..", "link"] {
            assert!(look_up(&home.path().join(name)).is_err(), "{name}");
        }
        assert!(look_up(Path::new("")).is_err());
    }

    #[test]
    fn a_descriptor_has_no_name() {
        use std::os::fd::AsRawFd;
        let file = tempfile::tempfile().unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let found = look_up(&path).unwrap();
        let Found::File(existing @ Existing { place: None, .. }) = found else { panic!("{found:?}") };
        assert_eq!(existing.open(&path).unwrap().metadata().unwrap().ino(), file.metadata().unwrap().ino());
    }
}
