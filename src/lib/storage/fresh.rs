//! A file that is written before it has its name.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RenameFlags, fstat, linkat, openat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use super::lookup::Place;

/// What all temporary names begin with.
const PREFIX: &str = ".dedup-img-";
/// So many temporary names are tried before something else must be wrong.
const ATTEMPTS: u32 = 10_000;

/// A new file in the directory of a name: without a name of its own where the file system can do that (`O_TMPFILE`), so that whatever ends
/// the process nothing is left behind.
#[derive(Debug)]
pub(super) struct Fresh {
    place: Place,
    /// Elsewhere: its temporary name.
    named: Option<OsString>,
}

/// How a finished file did not get its name.
#[derive(Debug)]
pub(super) enum Unnamed {
    /// Another file has it meanwhile.
    Taken,
    /// The operating system refused; where the finished file is, unless it is gone.
    Refused(io::Error, Option<PathBuf>),
}

impl Fresh {
    /// Makes an empty file for `place` with permissions of `mode`, as far as the process gives them to new files. That it can be given the
    /// name when it is finished is tried out now.
    pub(super) fn new(place: Place, mode: Mode) -> io::Result<(File, Self)> {
        let unnamed = || {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let make = || openat(&place.directory, ".", flags, mode).map(File::from);
            let probe = make().ok()?;
            let name = link_aside(&probe, &place).ok()?;
            unlinkat(&place.directory, &name, AtFlags::empty()).ok()?;
            make().ok()
        };
        if let Some(file) = unnamed() {
            return Ok((file, Self { place, named: None }));
        }
        let (file, name) = new_named(&place, mode)?;
        Ok((file, Self { place, named: Some(name) }))
    }

    /// Where the file will be.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Gives `file`, which [`Fresh::new`] made, its name, which nothing has yet.
    pub(super) fn name(mut self, file: &File) -> Result<(), Unnamed> {
        let named = match &self.named {
            None => link(file, &self.place, &self.place.name),
            Some(name) => name_exclusively(&self.place, name),
        };
        match named {
            Ok(()) => {
                self.named = None;
                Ok(())
            }
            Err(Errno::EXIST) => Err(Unnamed::Taken),
            Err(e) => Err(self.refused(file, e)),
        }
    }

    /// Gives `file` its name in place of the file that has it. The second name of a file that had none exists for an instant.
    pub(super) fn replace(mut self, file: &File) -> Result<(), Unnamed> {
        let name = match self.named.take() {
            Some(name) => name,
            None => link_aside(file, &self.place).map_err(|e| Unnamed::Refused(e.into(), None))?,
        };
        renameat(&self.place.directory, &name, &self.place.directory, &self.place.name)
            .map_err(|e| Unnamed::Refused(e.into(), Some(self.place.beside(&name))))
    }

    /// Keeps the finished file, if it can be kept, under its temporary name.
    fn refused(mut self, file: &File, error: Errno) -> Unnamed {
        let kept = self.named.take().or_else(|| link_aside(file, &self.place).ok());
        Unnamed::Refused(error.into(), kept.map(|name| self.place.beside(&name)))
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if let Some(name) = &self.named {
            let _ = unlinkat(&self.place.directory, name, AtFlags::empty());
        }
    }
}

/// Makes something under a temporary name that nothing has.
fn aside<T>(mut make: impl FnMut(&OsString) -> rustix::io::Result<T>) -> rustix::io::Result<(T, OsString)> {
    for attempt in 0..ATTEMPTS {
        let name = OsString::from(format!("{PREFIX}{}-{attempt}", std::process::id()));
        match make(&name) {
            Err(Errno::EXIST) => {}
            made => return made.map(|made| (made, name)),
        }
    }
    Err(Errno::EXIST)
}

fn link(file: &File, place: &Place, name: &OsString) -> rustix::io::Result<()> {
    // Through /proc, which a bare container may lack.
    let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, descriptor, &place.directory, name, AtFlags::SYMLINK_FOLLOW)
}

fn link_aside(file: &File, place: &Place) -> rustix::io::Result<OsString> {
    aside(|name| link(file, place, name)).map(|((), name)| name)
}

fn create(place: &Place, name: &OsString, mode: Mode) -> rustix::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    openat(&place.directory, name, flags, mode).map(File::from)
}

/// Makes a file under a temporary name, which has replaced another one: that is what it will have to do.
fn new_named(place: &Place, mode: Mode) -> io::Result<(File, OsString)> {
    let directory = &place.directory;
    let (file, first) = aside(|name| create(place, name, mode))?;
    let remove = |name: &OsString| unlinkat(directory, name, AtFlags::empty());
    let renamed = aside(|name| create(place, name, mode)).and_then(|(_, second)| {
        renameat(directory, &first, directory, &second).map(|()| second.clone()).inspect_err(|_| {
            let _ = remove(&second);
        })
    });
    match renamed {
        Ok(second) => Ok((file, second)),
        Err(e) => {
            let _ = remove(&first);
            Err(e.into())
        }
    }
}

/// Gives the file with the name `from` the name of `place`, which nothing has yet, by what the file system has for it.
fn name_exclusively(place: &Place, from: &OsString) -> rustix::io::Result<()> {
    let (directory, to) = (&place.directory, &place.name);
    match renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => return Err(Errno::EXIST),
        Err(_) => {}
    }
    match linkat(directory, from, directory, to, AtFlags::empty()) {
        Ok(()) => {
            // A second name that cannot be removed is one too many, but the file is there.
            let _ = unlinkat(directory, from, AtFlags::empty());
            return Ok(());
        }
        Err(Errno::EXIST) => return Err(Errno::EXIST),
        Err(_) => {}
    }
    // Neither: the name is taken by an empty file first, which is then replaced. If that fails it is removed again.
    let reserved = create(place, to, Mode::RUSR | Mode::WUSR)?;
    let ours = fstat(&reserved)?;
    let named = statat(directory, to, AtFlags::SYMLINK_NOFOLLOW)?;
    if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino) {
        return Err(Errno::EXIST);
    }
    renameat(directory, from, directory, to).inspect_err(|_| {
        let _ = unlinkat(directory, to, AtFlags::empty());
    })
}
