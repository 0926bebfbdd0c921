//! A file that appears under its name whole or not at all (I7).

use std::fs::{File, OpenOptions, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};

use super::lock::{LockMode, lock};
use super::open::{FileId, open_locked};
use super::{FileStorage, Storage, drop_cache};
use crate::error::{Error, ErrorKind, Result};
use crate::name::shown;

/// A new file beside its final name, without a name of its own where the file system can (`O_TMPFILE`): whatever ends the
/// process, nothing is left behind. [`AtomicFile::commit`] gives it the name.
///
/// Both the new file and the one that it replaces are locked like an image that QEMU has open for writing.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    storage: FileStorage,
    target: PathBuf,
    directory: PathBuf,
    /// The directory, where it can be read; one that cannot be read cannot be synced either.
    opened_directory: Option<File>,
    replaced: Option<File>,
    /// On file systems without `O_TMPFILE`: the named file, removed on drop.
    named: Option<tempfile::TempPath>,
}

impl AtomicFile {
    /// Starts a file that will be called `path`. Where `path` is a symbolic link, the file that it names is meant.
    ///
    /// # Errors
    /// Fails where the file could not be created, is in use, or is not a regular file.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let target = follow_links(path).map_err(|e| creating(path, e))?;
        let directory = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let replaced = match fs::metadata(&target) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(creating(path, e)),
            Ok(metadata) if metadata.is_dir() => return Err(creating(path, Errno::EISDIR.into())),
            Ok(metadata) if metadata.is_file() => {
                Some(open_locked(&target, LockMode::Write).map_err(|e| e.opening(path))?)
            }
            Ok(metadata) => {
                // A device is written in place, where the command can.
                let kind = if metadata.file_type().is_block_device() { "a block device" } else { "not a regular file" };
                return Err(Error::unsupported(format!(
                    "Could not create '{}': it is {kind}; write to a regular file and copy it there",
                    shown(path)
                )));
            }
        };
        let opened_directory = File::open(&directory).ok();
        let (file, named) = new_file(&directory).map_err(|e| creating(path, e))?;
        if let Some(old) = &replaced {
            keep_attributes(old, &file).map_err(|e| creating(path, e))?;
        }
        lock(&file, path, LockMode::Write).map_err(|e| e.opening(path))?;
        Ok(Self { storage: FileStorage::new(file), target, directory, opened_directory, replaced, named })
    }

    /// What to write to.
    #[must_use]
    pub(crate) fn storage(&self) -> &FileStorage {
        &self.storage
    }

    /// The directory that the file will be in.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes the content to the disk and takes it out of the host's page cache.
    ///
    /// # Errors
    /// Fails where the content could not be made durable.
    pub(crate) fn uncache(&self) -> Result<()> {
        self.storage.sync().map_err(|e| creating(&self.target, e))?;
        drop_cache(self.storage.file());
        Ok(())
    }

    /// Gives the file its name and returns the bytes that it occupies. With `durable`, its content is on the disk before and its
    /// name after this returns.
    ///
    /// # Errors
    /// Fails, with the old file untouched, where the content could not be made durable or the name not be given, also because
    /// another program has created a file of that name meanwhile.
    pub(crate) fn commit(self, durable: bool) -> Result<u64> {
        let said = |e: io::Error| creating(&self.target, e);
        if durable {
            self.storage.sync().map_err(said)?;
        }
        // The name may have been given to another file meanwhile, which is not ours to replace. (What happens within the
        // microseconds from here to the rename cannot be seen.)
        if let Some(old) = &self.replaced {
            let ours = FileId::of(&old.metadata().map_err(said)?);
            let named = fs::metadata(&self.target).map(|metadata| FileId::of(&metadata));
            if !named.is_ok_and(|named| named == ours) {
                let message = format!("'{}' was replaced or removed meanwhile by another program", shown(&self.target));
                return Err(Error::new(ErrorKind::Locked, message));
            }
        }
        match (self.named, &self.replaced) {
            (Some(named), Some(_)) => named.persist(&self.target).map_err(|e| said(e.error))?,
            (Some(named), None) => named.persist_noclobber(&self.target).map_err(|e| said(e.error))?,
            (None, None) => link(self.storage.file(), &self.target).map_err(said)?,
            // A name can be given to an unnamed file only where there is none yet. The second name exists for an instant.
            (None, Some(_)) => {
                let temporary = link_beside(self.storage.file(), &self.target).map_err(said)?;
                fs::rename(&temporary, &self.target).map_err(|e| {
                    let _ = fs::remove_file(&temporary);
                    said(e)
                })?;
            }
        }
        if durable && let Some(directory) = self.opened_directory {
            directory.sync_all().map_err(|e| {
                Error::io(format_args!("'{}' is complete, but could not sync its directory", shown(&self.target)), e)
            })?;
        }
        self.storage.allocated().map_err(said)
    }
}

fn creating(path: &Path, source: io::Error) -> Error {
    Error::io(format_args!("Could not create '{}'", shown(path)), source)
}

/// The path behind symbolic links, also where the last one points to nothing yet.
fn follow_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..40 {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().map_or(target.clone(), |parent| parent.join(&target)),
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::ELOOP.into())
}

fn new_file(directory: &Path) -> io::Result<(File, Option<tempfile::TempPath>)> {
    let unnamed =
        OpenOptions::new().read(true).write(true).mode(0o666).custom_flags(OFlag::O_TMPFILE.bits()).open(directory);
    match unnamed {
        // An unnamed file gets its name through /proc, which a bare container may lack.
        Ok(file) if descriptor_path(&file).exists() => return Ok((file, None)),
        Ok(_) => {}
        // What kernels and file systems without O_TMPFILE answer.
        Err(e) if matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EOPNOTSUPP | Errno::EISDIR)) => {}
        Err(e) => return Err(e),
    }
    let named = tempfile::Builder::new()
        .prefix(".dedup-img-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)?;
    let (file, path) = named.into_parts();
    Ok((file, Some(path)))
}

fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives `new` the permissions of `old`, and its owner as far as the user may.
fn keep_attributes(old: &File, new: &File) -> io::Result<()> {
    let metadata = old.metadata()?;
    if FileId::of(&metadata) == FileId::of(&new.metadata()?) {
        return Ok(());
    }
    let _ = std::os::unix::fs::fchown(new, Some(metadata.uid()), Some(metadata.gid()));
    new.set_permissions(metadata.permissions())
}

fn link(file: &File, path: &Path) -> io::Result<()> {
    Ok(nix::unistd::linkat(AT_FDCWD, &descriptor_path(file), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?)
}

fn link_beside(file: &File, target: &Path) -> io::Result<PathBuf> {
    for attempt in 0..100 {
        let path = target.with_file_name(format!(".dedup-img-{}-{attempt}", std::process::id()));
        match link(file, &path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result.map(|()| path),
        }
    }
    Err(Errno::EEXIST.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn nothing_appears_before_the_commit_and_nothing_stays_without_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let file = AtomicFile::create(&path).unwrap();
        file.storage().write_at(b"abc", 0).unwrap();
        assert_eq!(entries(directory.path()), 0);
        drop(file);
        assert_eq!(entries(directory.path()), 0);
        let file = AtomicFile::create(&path).unwrap();
        file.storage().write_at(b"abc", 0).unwrap();
        file.commit(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        assert_eq!(entries(directory.path()), 1);
    }

    #[test]
    fn a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let (path, name) = (directory.path().join("old"), directory.path().join("link"));
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("old", &name).unwrap();
        let file = AtomicFile::create(&name).unwrap();
        file.storage().write_at(b"new!", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        file.commit(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new!");
        assert!(fs::symlink_metadata(&name).unwrap().is_symlink());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(entries(directory.path()), 2);
    }

    #[test]
    fn a_file_that_takes_the_name_meanwhile_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("name"), directory.path().join("other"));
        fs::write(&path, b"old").unwrap();
        let file = AtomicFile::create(&path).unwrap();
        fs::write(&other, b"somebody else's").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(file.commit(false).unwrap_err().to_string().contains("was replaced or removed meanwhile"));
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
        assert_eq!(entries(directory.path()), 1);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let file = AtomicFile::create(&path).unwrap();
        fs::write(&path, b"somebody else's").unwrap();
        assert!(file.commit(false).unwrap_err().to_string().contains("File exists"));
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
    }
}
