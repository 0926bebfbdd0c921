//! A file system in memory that can less than others: no hard links, no files without a name, no exchange or reservation of names, no syncing of directories, as many
//! network file systems and those in user space. It needs /dev/fuse and root.

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nothing is remembered by the kernel.
const TTL: Duration = Duration::ZERO;

/// What can be renamed.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Renames {
    All,
    /// To names that begin with a dot.
    Temporary,
    None,
}

/// Mounts one at `directory` until what is returned is dropped.
pub(crate) fn mount(directory: &Path, renames: Renames) -> io::Result<BackgroundSession> {
    let files = Files { names: BTreeMap::new(), content: BTreeMap::new(), last: 1 };
    fuser::spawn_mount(NoLinks { files: Mutex::new(files), renames }, directory, &Config::default())
}

struct NoLinks {
    files: Mutex<Files>,
    renames: Renames,
}

struct Files {
    names: BTreeMap<OsString, u64>,
    /// Permissions, owner, group and bytes.
    content: BTreeMap<u64, (u32, u32, u32, Vec<u8>)>,
    last: u64,
}

impl Files {
    fn attributes(&self, ino: u64) -> Result<FileAttr, Errno> {
        let (kind, perm, (uid, gid), size) = match self.content.get(&ino) {
            Some((mode, uid, gid, bytes)) => (FileType::RegularFile, *mode, (*uid, *gid), bytes.len() as u64),
            None if ino == 1 => (FileType::Directory, 0o755, (0, 0), 0),
            None => return Err(Errno::ENOENT),
        };
        let [atime, mtime, ctime, crtime] = [UNIX_EPOCH; 4];
        let (perm, blocks, ino) = (perm as u16, size.div_ceil(512), INodeNo(ino));
        Ok(FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }

    fn bytes(&mut self, ino: INodeNo) -> Result<&mut Vec<u8>, Errno> {
        self.content.get_mut(&ino.0).map(|(_, _, _, bytes)| bytes).ok_or(Errno::ENOENT)
    }
}

impl NoLinks {
    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap()
    }
}

impl Filesystem for NoLinks {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let files = self.files();
        match files.names.get(name).ok_or(Errno::ENOENT).and_then(|ino| files.attributes(*ino)) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.files().attributes(ino.0) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut files = self.files();
        if let Some(file) = files.content.get_mut(&ino.0) {
            file.0 = mode.map_or(file.0, |mode| mode & 0o7777);
            (file.1, file.2) = (uid.unwrap_or(file.1), gid.unwrap_or(file.2));
            if let Some(size) = size {
                file.3.resize(size as usize, 0);
            }
        }
        match files.attributes(ino.0) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(e) => reply.error(e),
        }
    }

    fn create(&self, request: &Request, _: INodeNo, name: &OsStr, mode: u32, umask: u32, _: i32, reply: ReplyCreate) {
        let mut files = self.files();
        files.last += 1;
        let ino = files.last;
        files.names.insert(name.to_owned(), ino);
        files.content.insert(ino, (mode & 0o7777 & !umask, request.uid(), request.gid(), Vec::new()));
        match files.attributes(ino) {
            Ok(made) => reply.created(&TTL, &made, Generation(0), FileHandle(0), FopenFlags::empty()),
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.files().bytes(ino) {
            Ok(bytes) => {
                let start = bytes.len().min(offset as usize);
                reply.data(&bytes[start..bytes.len().min(start + size as usize)]);
            }
            Err(e) => reply.error(e),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.files().bytes(ino) {
            Ok(bytes) => {
                let (start, end) = (offset as usize, offset as usize + data.len());
                bytes.resize(bytes.len().max(end), 0);
                bytes[start..end].copy_from_slice(data);
                reply.written(data.len() as u32);
            }
            Err(e) => reply.error(e),
        }
    }

    /// Zeros, for a hole.
    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const HOLE: i32 = nix::libc::FALLOC_FL_PUNCH_HOLE | nix::libc::FALLOC_FL_KEEP_SIZE;
        match self.files().bytes(ino) {
            Ok(bytes) if mode == HOLE => {
                let end = bytes.len().min((offset + length) as usize);
                bytes[(offset as usize).min(end)..end].fill(0);
                reply.ok();
            }
            Ok(_) => reply.error(Errno::EOPNOTSUPP),
            Err(e) => reply.error(e),
        }
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.files().names.remove(name) {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        to: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut files = self.files();
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        match self.renames {
            Renames::None => return reply.error(Errno::ENOSYS),
            Renames::Temporary if !to.as_encoded_bytes().starts_with(b".") => return reply.error(Errno::EIO),
            _ => {}
        }
        match files.names.remove(name) {
            Some(ino) => {
                files.names.insert(to.to_owned(), ino);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::EINVAL);
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let files = self.files();
        for (at, (name, ino)) in (1..).zip(&files.names).skip(offset as usize) {
            if reply.add(INodeNo(*ino), at, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }
}
