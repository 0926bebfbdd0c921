//! A file that appears under its name whole or not at all (I7).

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::attributes;
use super::fresh::{Fresh, Unnamed};
use super::lock::{LockMode, lock};
use super::lookup::Place;
use super::{FileStorage, Storage, drop_cache};
use crate::error::{Context, Doing, Error, ErrorKind, Result, io_reason};
use crate::name::shown;
use crate::notice::{Notice, Told};

/// What qemu-img gives new images, less what the umask takes away.
const NEW: Mode = Mode::RUSR.union(Mode::WUSR).union(Mode::RGRP).union(Mode::ROTH);
/// What a file that replaces another one begins with.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A new file on its way to its name, see [`Fresh`]. [`AtomicFile::commit`] gives it the name.
///
/// Both the new file and the one that it replaces are locked like an image that QEMU has open for writing.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    storage: FileStorage,
    /// As the user calls it.
    path: PathBuf,
    fresh: Fresh,
    replaced: Option<File>,
    /// The directory, where it can be read; one that cannot be read cannot be synced either.
    directory: io::Result<File>,
}

impl AtomicFile {
    /// Starts a file at `place`, where nothing is.
    ///
    /// # Errors
    /// Fails where the file could not be created.
    pub(super) fn new(path: &Path, place: Place) -> Result<Self> {
        let (file, fresh) = Fresh::new(place, NEW).creating(path)?;
        Self::locked(path, file, fresh, None)
    }

    /// Starts a file that will replace `old`, a file that is at `place`, and be like it (I12). Returns with it what there is to say,
    /// and nothing where the operating system does not let it have a file beside the old one, with why.
    ///
    /// # Errors
    /// Fails where the file could not be created for other reasons.
    pub(super) fn replacing(path: &Path, old: File, place: Place) -> Result<Replacing> {
        let (file, fresh) = match Fresh::new(place, PRIVATE) {
            Ok(made) => made,
            Err(e) if is_not_allowed(&e) => return Ok(Replacing::NotAllowed(old, e)),
            Err(e) => return Err(creating(path, e)),
        };
        let mut notices = Vec::new();
        let lost = attributes::keep(&old, &file).creating(path)?;
        if !lost.is_empty() {
            notices.push(Notice::NotKept { path: path.to_owned(), what: lost });
        }
        let links = old.metadata().creating(path)?.nlink();
        if links > 1 {
            notices.push(Notice::OtherNames { path: path.to_owned(), count: links - 1 });
        }
        Ok(Replacing::Begun(Self::locked(path, file, fresh, Some(old))?, notices))
    }

    fn locked(path: &Path, file: File, fresh: Fresh, replaced: Option<File>) -> Result<Self> {
        lock(&file, path, LockMode::Write).opening(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(&fresh.place().directory, ".", flags, Mode::empty());
        let directory = directory.map(File::from).map_err(io::Error::from);
        Ok(Self { storage: FileStorage::new(file), path: path.to_owned(), fresh, replaced, directory })
    }

    /// What to write to.
    #[must_use]
    pub(crate) fn storage(&self) -> &FileStorage {
        &self.storage
    }

    /// The directory that the file will be in.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        &self.fresh.place().path
    }

    /// Writes the content to the disk and takes it out of the host's page cache.
    ///
    /// # Errors
    /// Fails where the content could not be made durable.
    pub(crate) fn uncache(&self) -> Result<()> {
        self.storage.sync().creating(&self.path)?;
        drop_cache(self.storage.file());
        Ok(())
    }

    /// Gives the file its name and returns the bytes that it occupies. With `durable`, its content is on the disk before and its
    /// name after this returns; where the system cannot do that for a name, it is said.
    ///
    /// # Errors
    /// Fails, with the old file untouched, where the content could not be made durable or the name not be given, also because
    /// another program has created a file of that name meanwhile.
    pub(crate) fn commit(self, durable: bool, told: Told<'_>) -> Result<u64> {
        let Self { storage, path, fresh, replaced, directory } = self;
        if durable {
            storage.sync().creating(&path)?;
        }
        // The name may have been given to another file meanwhile, which is not ours to replace. (What happens within the
        // microseconds from here to the rename cannot be seen.)
        if let Some(old) = &replaced {
            let ours = old.metadata().creating(&path)?;
            let named = fresh.place().stat();
            if !named.is_ok_and(|named| (named.st_dev, named.st_ino) == (ours.dev(), ours.ino())) {
                let message = format!("'{}' was replaced or removed meanwhile by another program", shown(&path));
                return Err(Error::new(ErrorKind::Locked, message));
            }
        }
        let named = match replaced {
            Some(_) => fresh.replace(storage.file()),
            None => fresh.name(storage.file()),
        };
        named.map_err(|e| unnamed(&path, e))?;
        if durable {
            sync_directory(&path, directory, told)?;
        }
        storage.allocated().creating(&path)
    }
}

/// The start of a file that replaces another.
#[derive(Debug)]
pub(super) enum Replacing {
    /// It is begun, and this is what there is to say.
    Begun(AtomicFile, Vec<Notice>),
    /// It may not be there; the file that it would replace.
    NotAllowed(File, io::Error),
}

/// Whether a directory that answers so takes no new files, or no changes of names, from this user or at all.
fn is_not_allowed(error: &io::Error) -> bool {
    let kinds = [
        Errno::ACCESS,
        Errno::PERM,
        Errno::ROFS,
        Errno::NOSYS,
        Errno::OPNOTSUPP,
        Errno::INVAL,
        Errno::BUSY,
        Errno::XDEV,
    ];
    kinds.iter().any(|kind| error.raw_os_error() == Some(kind.raw_os_error()))
}

/// Makes the name durable, where the system can.
fn sync_directory(path: &Path, directory: io::Result<File>, told: Told<'_>) -> Result<()> {
    match directory.and_then(|directory| directory.sync_all()) {
        Ok(()) => Ok(()),
        Err(e) if is_not_allowed(&e) || e.raw_os_error() == Some(Errno::NOTTY.raw_os_error()) => {
            told(&Notice::NameNotSynced { path: path.to_owned(), reason: io_reason(&e) });
            Ok(())
        }
        Err(e) => Err(Error::io(format_args!("'{}' is complete, but could not sync its directory", shown(path)), e)),
    }
}

fn creating(path: &Path, source: io::Error) -> Error {
    Error::os(source).doing(Doing::Creating(path.to_owned()))
}

/// Why a finished file has not got its name, and where it is.
fn unnamed(path: &Path, unnamed: Unnamed) -> Error {
    match unnamed {
        Unnamed::Taken => {
            let what = "another program has created it meanwhile; that file was left as it is, and the result of this run is gone";
            Error::new(ErrorKind::Locked, what).doing(Doing::Creating(path.to_owned()))
        }
        Unnamed::Refused(e, Some(kept)) => creating(path, e)
            .followed_by(&format!("The finished file is '{}'; give it the name, or remove it", shown(kept))),
        Unnamed::Refused(e, None) => creating(path, e).ending("; the finished file is gone"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::target::Target;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn begin(path: &Path) -> Result<AtomicFile> {
        match Target::file(path, &|_| {})? {
            Target::File(file) => Ok(file),
            other => panic!("{other:?}"),
        }
    }

    fn entries(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn nothing_appears_before_the_commit_and_nothing_stays_without_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let file = begin(&path).unwrap();
        file.storage().write_at(b"abc", 0).unwrap();
        assert_eq!(entries(directory.path()), 0);
        drop(file);
        assert_eq!(entries(directory.path()), 0);
        let file = begin(&path).unwrap();
        file.storage().write_at(b"abc", 0).unwrap();
        file.commit(true, &|_| {}).unwrap();
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
        let file = begin(&name).unwrap();
        file.storage().write_at(b"new!", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        file.commit(true, &|_| {}).unwrap();
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
        let file = begin(&path).unwrap();
        fs::write(&other, b"somebody else's").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(file.commit(false, &|_| {}).unwrap_err().to_string().contains("was replaced or removed meanwhile"));
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
        assert_eq!(entries(directory.path()), 1);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let file = begin(&path).unwrap();
        fs::write(&path, b"somebody else's").unwrap();
        assert!(
            file.commit(false, &|_| {}).unwrap_err().to_string().contains("another program has created it meanwhile")
        );
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
    }
}
