//! What a file takes over from the one that it replaces (I12): owner, group, permissions, access control list, extended attributes with
//! the security label, and flags.
//!
//! Nobody may do more with the new file than with the old one, at no moment. So it is begun with nothing but its owner's permissions, and
//! what would give somebody more where owner or group cannot be kept is left out.

use std::ffi::CString;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use rustix::fs::{IFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use rustix::path::Arg;

use crate::notice::Lost;

const ACL: &str = "system.posix_acl_access";
/// Bound to the old content, or the system's own. (The list has its own way.)
const NOT_CARRIED: [&str; 5] = ["security.ima", "security.evm", "security.capability", ACL, "system.posix_acl_default"];
const NOT_CARRIED_PREFIX: &str = "trusted.";
/// More than any file system takes for an attribute or a list of their names.
const MOST: usize = 64 << 10;

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;

/// Flags that people set, with the letters of `lsattr`.
const FLAGS: [(IFlags, char); 11] = [
    // Not compressed, direct access: rustix has no names for them.
    (IFlags::from_bits_retain(0x400), 'm'),
    (IFlags::from_bits_retain(0x200_0000), 'x'),
    (IFlags::NOCOW, 'C'),
    (IFlags::COMPRESSED, 'c'),
    (IFlags::NODUMP, 'd'),
    (IFlags::NOATIME, 'A'),
    (IFlags::SYNC, 'S'),
    (IFlags::JOURNALING, 'j'),
    (IFlags::NOTAIL, 't'),
    (IFlags::SECURE_REMOVAL, 's'),
    (IFlags::UNRM, 'u'),
];

/// Gives `new`, which is empty and which nobody but its owner may open yet, what `old` has. Returns what could not be kept.
///
/// # Errors
/// Fails where `new` would let somebody do more than `old`.
pub(super) fn keep(old: &File, new: &File) -> io::Result<Vec<Lost>> {
    let was = old.metadata()?;
    let mut lost = Vec::new();
    // Some flags can be set only while the file is empty.
    keep_flags(old, new, &mut lost);
    if (was.uid(), was.gid()) != (new.metadata()?.uid(), new.metadata()?.gid()) {
        // Who may not give a file away may still give it to a group that he is in. Whether it worked is seen below.
        let _ = fchown(new, Some(was.uid()), Some(was.gid())).or_else(|_| fchown(new, None, Some(was.gid())));
    }
    let is = new.metadata()?;
    if was.uid() != is.uid() {
        lost.push(Lost::Owner { was: was.uid(), is: is.uid() });
    }
    if was.gid() != is.gid() {
        lost.push(Lost::Group { was: was.gid(), is: is.gid() });
    }
    keep_xattrs(old, new, &mut lost)?;
    let mut mode = was.mode() & 0o7777;
    if was.uid() != is.uid() {
        mode &= !SET_UID;
    }
    let same_group = was.gid() == is.gid();
    if !same_group {
        mode &= !SET_GID;
    }
    let mode = keep_acl(old, new, mode, same_group, &mut lost)?;
    // Where it fails all depends on what the permissions are then.
    let refused = new.set_permissions(Permissions::from_mode(mode)).err();
    let is = new.metadata()?.mode() & 0o7777;
    if is & !mode != 0 {
        return Err(refused.unwrap_or_else(|| io::Error::other("the permissions of the old file could not be kept")));
    }
    if is != was.mode() & 0o7777 {
        lost.push(Lost::Mode { was: was.mode() & 0o7777, is });
    }
    Ok(lost)
}

/// Gives `new` the access control list of `old`, or takes away one that it got from its directory. Returns the permissions that it
/// may have, of those in `mode`.
fn keep_acl(old: &File, new: &File, mode: u32, same_group: bool, lost: &mut Vec<Lost>) -> io::Result<u32> {
    let acl = match xattr(old, ACL) {
        Ok(None) => {
            remove_acl(new)?;
            if same_group {
                return Ok(mode);
            }
            // Who was in the group is one of the others now, and the other way round.
            let both = mode >> 3 & mode & 7;
            return Ok(mode & !0o77 | both << 3 | both);
        }
        Ok(Some(acl)) => Some(acl),
        // One that cannot be read cannot be kept.
        Err(_) => None,
    };
    let wanted = match same_group {
        true => acl.map(|acl| (acl, mode & 7)),
        false => acl.and_then(|acl| without_group(&acl)),
    };
    match wanted {
        Some((acl, others)) if fsetxattr(new, ACL, &acl, XattrFlags::empty()).is_ok() => {
            if !same_group {
                lost.push(Lost::Acl);
            }
            Ok(mode & !7 | others)
        }
        _ => {
            // Without the list its mask would be the group's permission, and nobody would be denied any more.
            remove_acl(new)?;
            lost.push(Lost::Acl);
            Ok(mode & !0o77)
        }
    }
}

fn remove_acl(file: &File) -> io::Result<()> {
    match xattr(file, ACL)? {
        Some(_) => Ok(fremovexattr(file, ACL)?),
        None => Ok(()),
    }
}

/// `acl` for a file that belongs to another group, and the permissions that all others have in it: the group itself gets none, and who
/// was in the old one is one of the others now.
///
/// A list is a version of four bytes and entries of eight: tag (16 bits), permissions (16), user or group (32), all little-endian.
fn without_group(acl: &[u8]) -> Option<(Vec<u8>, u32)> {
    const GROUP: u8 = 0x04;
    const MASK: u8 = 0x10;
    const OTHER: u8 = 0x20;
    let mut acl = acl.to_vec();
    let (_, entries) = acl.split_at_mut_checked(4)?;
    let of = |tag: u8, entries: &[u8]| {
        let entry = entries.chunks_exact(8).find(|entry| entry.first() == Some(&tag));
        entry.and_then(|entry| entry.get(2)).copied()
    };
    let group = of(GROUP, entries)? & of(MASK, entries).unwrap_or(7);
    let others = of(OTHER, entries)? & group & 7;
    for entry in entries.chunks_exact_mut(8) {
        let new = match entry.first() {
            Some(&GROUP) => 0,
            Some(&OTHER) => others,
            _ => continue,
        };
        *entry.get_mut(2)? = new;
    }
    Some((acl, u32::from(others)))
}

fn keep_xattrs(old: &File, new: &File, lost: &mut Vec<Lost>) -> io::Result<()> {
    for name in names(old)? {
        let text = name.to_string_lossy();
        if NOT_CARRIED.contains(&text.as_ref()) || text.starts_with(NOT_CARRIED_PREFIX) {
            continue;
        }
        let kept = match xattr(old, name.as_c_str()) {
            // A label may be the right one already and still not be ours to set.
            Ok(Some(value)) => {
                xattr(new, name.as_c_str()).is_ok_and(|is| is.as_ref() == Some(&value))
                    || fsetxattr(new, name.as_c_str(), &value, XattrFlags::empty()).is_ok()
            }
            // It is gone meanwhile.
            Ok(None) => true,
            Err(_) => false,
        };
        if !kept {
            lost.push(Lost::Attribute(text.into_owned()));
        }
    }
    Ok(())
}

/// The names of all attributes that can be seen, sorted.
fn names(file: &File) -> io::Result<Vec<CString>> {
    let mut buffer = vec![0; MOST];
    let length = match flistxattr(file, buffer.as_mut_slice()) {
        Ok(length) => length,
        Err(e) if has_none(e) => 0,
        Err(e) => return Err(e.into()),
    };
    buffer.truncate(length);
    let names = buffer.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut names = names.map(CString::new).collect::<Result<Vec<_>, _>>()?;
    names.sort();
    Ok(names)
}

/// An attribute of a file, where it has it.
fn xattr(file: &File, name: impl Arg) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; MOST];
    match fgetxattr(file, name, buffer.as_mut_slice()) {
        Ok(length) => {
            buffer.truncate(length);
            Ok(Some(buffer))
        }
        Err(e) if has_none(e) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// What file systems without attributes say, and files without one.
fn has_none(error: Errno) -> bool {
    matches!(error, Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NOTTY)
}

fn keep_flags(old: &File, new: &File, lost: &mut Vec<Lost>) {
    // Numbers: what file systems set themselves has no name here, and stays.
    let flags = |file| ioctl_getflags(file).map(|flags| flags.bits());
    let set = |bits| ioctl_setflags(new, IFlags::from_bits_retain(bits)).is_ok();
    let (Ok(was), Ok(mut is)) = (flags(old), flags(new)) else { return };
    let all = FLAGS.iter().fold(0, |all, (flag, _)| all | flag.bits());
    let wanted = is & !all | was & all;
    if wanted == is || set(wanted) {
        return;
    }
    let mut missing = String::new();
    for (flag, letter) in FLAGS {
        let wanted = is & !flag.bits() | was & flag.bits();
        if wanted == is || set(wanted) {
            is = wanted;
        } else if was & flag.bits() != 0 {
            missing.push(letter);
        }
    }
    if !missing.is_empty() {
        lost.push(Lost::Flags(missing));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u8, u8, u8)]) -> Vec<u8> {
        let entries = entries.iter().flat_map(|&(tag, perm, id)| [tag, 0, perm, 0, id, 0, 0, 0]);
        [2, 0, 0, 0].into_iter().chain(entries).collect()
    }

    #[test]
    fn a_list_without_its_group_gives_nobody_more() {
        let (user, named, group, mask, other) = ((1, 6, 0), (2, 6, 77), (4, 5, 0), (16, 6, 0), (32, 6, 0));
        let (narrowed, others) = without_group(&acl(&[user, named, group, mask, other])).unwrap();
        assert_eq!(narrowed, acl(&[user, named, (4, 0, 0), mask, (32, 4, 0)]));
        assert_eq!(others, 4);
        assert_eq!(without_group(&acl(&[user, named])), None);
        assert_eq!(without_group(b"ab"), None);
    }
}
