//! I12 and I13: what a replaced target keeps, and what the kernel would not follow.

use super::failure::images;
use super::running::{Running, is_root};
use crate::args;
use crate::support::{Ran, dedup_command, dedup_img, left_out, names_in, no_links, qemu, scratch};
use rustix::fs::{IFlags, XattrFlags, getxattr, ioctl_getflags, ioctl_setflags, setxattr};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const NOBODY: u32 = u32::MAX;

/// An access control list as the kernel takes it: version 2, then tag, permissions and user or group.
fn acl(entries: &[(u8, u8, u32)]) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0];
    for &(tag, permissions, id) in entries {
        bytes.extend([tag, 0, permissions, 0]);
        bytes.extend((0..4).map(|byte| (id >> (8 * byte)) as u8));
    }
    bytes
}

/// The mask gives named user 77 what the group is denied.
fn denying() -> Vec<u8> {
    acl(&[(1, 6, NOBODY), (2, 6, 77), (4, 0, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY)])
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    match getxattr(path, name, buffer.as_mut_slice()) {
        Ok(length) => Some(buffer[..length].to_vec()),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
        Err(e) => panic!("{name} of {}: {e}", path.display()),
    }
}

/// Sets an attribute; `false`, and said, where this file system has none.
fn set(path: &Path, name: &str, value: &[u8]) -> bool {
    match setxattr(path, name, value, XattrFlags::empty()) {
        Ok(()) => true,
        Err(e) => {
            left_out(&format!("keeping {name}"), &e.to_string());
            false
        }
    }
}

/// A line is said about each of `words`, and where there are none nothing.
#[track_caller]
fn says(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.stderr.is_empty(), words.is_empty(), "{}", ran.told());
    assert!(words.iter().all(|word| ran.stderr.contains(word)), "{}", ran.told());
}

#[test]
fn list_attributes_and_flags_of_the_old_target_are_kept() {
    let (_home, source, target) = images(1 << 20);
    fs::set_permissions(&target, Permissions::from_mode(0o600)).unwrap();
    let mut kept = vec![("user.note", b"kept".to_vec()), (ACCESS, denying())];
    if is_root() {
        kept.push(("security.dedup-img", b"label".to_vec()));
        set(&target, "trusted.dedup-img", b"the system's own");
    }
    kept.retain(|(name, value)| set(&target, name, value));
    let flags = |path| ioctl_getflags(File::open(path).unwrap());
    let nodump = flags(&target).and_then(|flags| ioctl_setflags(File::open(&target).unwrap(), flags | IFlags::NODUMP));
    let flagged = flags(&target);
    let mode = target.metadata().unwrap().mode();
    for words in [args!["convert", "-f", "raw", source, target].to_vec(), args!["create", target, "1M"].to_vec()] {
        let before = target.metadata().unwrap().ino();
        says(&dedup_img(words).ok(), &[]);
        assert_ne!(target.metadata().unwrap().ino(), before);
        for (name, value) in &kept {
            assert_eq!(attribute(&target, name).as_ref(), Some(value), "{name}");
        }
        assert_eq!(attribute(&target, "trusted.dedup-img"), None);
        assert_eq!(target.metadata().unwrap().mode(), mode);
        match nodump {
            // With those that the file system sets itself.
            Ok(()) => assert_eq!(flags(&target), flagged),
            Err(e) => left_out("keeping flags", &e.to_string()),
        }
    }
}

/// What the directory gives to new files is for new files: as qemu-img makes them, whatever the umask.
#[test]
fn a_new_target_gets_what_qemu_img_gives_and_an_old_one_keeps_what_it_has() {
    let (home, source, target) = images(1 << 20);
    fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
    let lists = [
        acl(&[(1, 7, NOBODY), (2, 6, 77), (4, 7, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)]),
        acl(&[(1, 6, NOBODY), (4, 6, NOBODY), (32, 6, NOBODY)]),
    ];
    for (at, list) in [None, Some(&lists[0]), Some(&lists[1])].into_iter().enumerate() {
        if list.is_some_and(|list| !set(home.path(), DEFAULT, list)) {
            return;
        }
        for mask in ["022", "077", "002", "000"] {
            let [ours, theirs] = ["ours", "theirs"].map(|name| home.path().join(format!("{name}-{mask}-{at}")));
            let mut command = Command::new("sh");
            let script = "umask $3; \"$0\" convert -q -f raw \"$1\" \"$2\"; qemu-img create -q -f qcow2 \"$4\" 1M";
            command.args(["-c", script, env!("CARGO_BIN_EXE_dedup-img")]);
            command.args([&source, &ours]).arg(mask).arg(&theirs).stdin(Stdio::null());
            qemu::finish("sh", command).ok();
            let access = |path: &Path| (path.metadata().unwrap().mode(), attribute(path, ACCESS));
            assert_eq!(access(&ours), access(&theirs), "umask {mask}, list {at}");
        }
        dedup_img(args!["convert", "-q", "-f", "raw", source, target]).ok();
        assert_eq!((target.metadata().unwrap().mode() & 0o7777, attribute(&target, ACCESS)), (0o640, None));
    }
}

/// The program without the right to give files away, in `groups` beside its own.
fn without_chown(groups: &str, words: impl IntoIterator<Item = OsString>) -> Ran {
    let rights = "-chown,-fsetid";
    let program = dedup_command(words);
    let mut command = Command::new("setpriv");
    command.arg(format!("--groups={groups}")).arg(format!("--bounding-set={rights}"));
    command.arg(format!("--inh-caps={rights}")).arg(program.get_program()).args(program.get_args());
    command.stdin(Stdio::null()).env("LC_ALL", "C");
    qemu::finish("setpriv", command)
}

/// Who cannot give a file away gives nobody more than he had: by the owner, a group, the permissions of both, or a list.
#[test]
fn what_cannot_be_kept_is_said_and_nobody_gets_more() {
    if !is_root() {
        return left_out("files of others", "needs root");
    }
    let (_home, source, target) = images(1 << 20);
    let own = nix::unistd::getegid().as_raw();
    // Owner and group before; permissions before; whether in the group; what is said, with the permissions after.
    for (owner, group, mode, inside, after, words) in [
        (0, 2345, 0o660, true, 0o660, &[][..]),
        (1234, 2345, 0o660, true, 0o660, &["its owner 1234 (now 0)"]),
        (1234, 2345, 0o4775, true, 0o775, &["its owner 1234", "its permissions 4775 (now 0775)"]),
        (0, 2345, 0o660, false, 0o600, &["its group 2345", "its permissions 0660 (now 0600)"]),
        (0, 2345, 0o604, false, 0o600, &["its group 2345", "its permissions 0604 (now 0600)"]),
        (0, 2345, 0o664, false, 0o644, &["its group 2345", "its permissions 0664 (now 0644)"]),
        (1234, 2345, 0o2640, false, 0o600, &["its owner 1234", "its group 2345", "(now 0600)"]),
    ] {
        fs::write(&target, b"precious").unwrap();
        chown(&target, Some(owner), Some(group)).unwrap();
        fs::set_permissions(&target, Permissions::from_mode(mode)).unwrap();
        let groups = if inside { "2345" } else { "77" };
        let ran = without_chown(groups, args!["convert", "-f", "raw", source, target]).ok();
        says(&ran, words);
        let is = target.metadata().unwrap();
        let due = (after, 0, if inside { group } else { own });
        assert_eq!((is.mode() & 0o7777, is.uid(), is.gid()), due, "{mode:o}: {}", ran.told());
    }
    // A list: the new group gets nothing of what the old one had, and its members no more than all others had.
    fs::write(&target, b"precious").unwrap();
    chown(&target, Some(0), Some(2345)).unwrap();
    let list = acl(&[(1, 6, NOBODY), (2, 6, 77), (4, 4, NOBODY), (16, 6, NOBODY), (32, 6, NOBODY)]);
    if set(&target, ACCESS, &list) {
        let ran = without_chown("77", args!["convert", "-f", "raw", source, target]).ok();
        says(&ran, &["its group 2345", "access control list"]);
        let narrowed = acl(&[(1, 6, NOBODY), (2, 6, 77), (4, 0, NOBODY), (16, 6, NOBODY), (32, 4, NOBODY)]);
        assert_eq!(attribute(&target, ACCESS), Some(narrowed));
    }
}

#[test]
fn other_names_of_the_target_are_counted() {
    let (home, source, target) = images(1 << 20);
    for name in ["second", "third"] {
        fs::hard_link(&target, home.path().join(name)).unwrap();
    }
    let ran = dedup_img(args!["convert", "-f", "raw", source, target]).ok();
    says(&ran, &["target.qcow2' has 2 other names (hard links), which keep the old content"]);
    assert_eq!(fs::read(home.path().join("third")).unwrap(), b"precious");
    // There is nothing to say of what is written where it lies, and nothing is said where that is not wanted.
    says(&dedup_img(args!["dedup", target]).ok(), &[]);
    fs::hard_link(&target, home.path().join("fourth")).unwrap();
    says(&dedup_img(args!["convert", "-q", "-f", "raw", source, target]).ok(), &[]);
}

/// The one that is late says who was there before, and leaves it.
#[test]
fn two_runs_that_make_the_same_target() {
    let (home, source, _) = images(4 << 20);
    let target = home.path().join("new.qcow2");
    let words = || args!["convert", "-f", "raw", "-r", "8M", source, target];
    let mut late = Running::dedup_img(words());
    late.stop_when(|it| it.written() > 1 << 20);
    dedup_img(args!["create", "-q", target, "1M"]).ok();
    late.signal("CONT");
    late.finish().refused(&["new.qcow2': another program has created it meanwhile; that file was left as it is"]);
    assert_eq!(qemu::virtual_size("qcow2", &target), 1 << 20);
    assert_eq!(names_in(home.path()), ["new.qcow2", "source.raw", "target.qcow2"]);
}

/// On a file system without files that have no name: the temporary one gives nobody anything, a killed run leaves it, and where it does
/// not get its name it is not lost.
#[test]
fn a_temporary_name() {
    let (_home, source, _) = images(4 << 20);
    let place = scratch();
    let Ok(_session) = no_links::mount(place.path(), no_links::Renames::Temporary) else {
        return left_out("temporary names", "needs root and /dev/fuse");
    };
    let target = place.path().join("target");
    fs::write(&target, b"precious").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
    let mut killed = Running::dedup_img(args!["convert", "-q", "-f", "raw", "-r", "8M", source, target]);
    killed.stop_when(|it| it.written() > 1 << 20);
    let [temporary, _] = &names_in(place.path())[..] else { panic!("{:?}", names_in(place.path())) };
    assert!(temporary.starts_with(".dedup-img-"), "{temporary}");
    assert_eq!(place.path().join(temporary).metadata().unwrap().mode() & 0o7777, 0o640);
    killed.signal("KILL");
    killed.finish();
    assert_eq!(names_in(place.path()), [temporary, "target"]);
    fs::remove_file(place.path().join(temporary)).unwrap();
    // Here the last rename fails.
    let ran = dedup_img(args!["convert", "-q", "-f", "raw", source, target]);
    let [kept, _] = &names_in(place.path())[..] else { panic!("{}", ran.told()) };
    let kept = place.path().join(kept);
    let due = format!("The finished file is '{}'; give it the name, or remove it\n", kept.display());
    assert!(ran.code == 1 && ran.stderr.ends_with(&due), "{}", ran.told());
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    qemu::compare_same("raw", &source, "qcow2", &kept);
}

/// A descriptor to which the program itself writes is no target.
#[test]
fn the_programs_own_output_is_no_target() {
    let (home, source, _) = images(1 << 20);
    let file = home.path().join("output");
    for (words, name) in [
        (args!["convert", "-f", "raw", source, "/dev/stdout"].to_vec(), "/dev/stdout"),
        (args!["create", "/dev/fd/1", "1M"].to_vec(), "/dev/fd/1"),
    ] {
        let mut command = dedup_command(words);
        command.stdout(File::create(&file).unwrap());
        let ran = qemu::finish("dedup-img", command);
        ran.refused(&[name, "the program's own output"]);
        assert_eq!(fs::read(&file).unwrap(), b"");
    }
    // Nor is it an image to change where it lies: the summary would overwrite its header.
    let image = home.path().join("image.qcow2");
    qemu::create("qcow2", &image, 1 << 20, "");
    let before = fs::read(&image).unwrap();
    for words in [args!["dedup", image].to_vec(), args!["gc", image].to_vec()] {
        let mut command = dedup_command(words);
        command.stdout(File::options().write(true).open(&image).unwrap());
        qemu::finish("dedup-img", command).refused(&["image.qcow2", "the program's own output"]);
        assert_eq!(fs::read(&image).unwrap(), before);
    }
    let mut command = dedup_command(args!["convert", "-q", "-f", "raw", source, "/dev/stdout"]);
    command.stdout(File::create(&file).unwrap());
    qemu::finish("dedup-img", command).ok();
    qemu::compare_same("raw", &source, "qcow2", &file);
}

/// In a directory like /tmp the kernel follows no link of another user (fs.protected_symlinks), to a file or to nothing.
#[test]
fn a_link_that_the_kernel_does_not_follow_is_not_followed() {
    let on = fs::read_to_string("/proc/sys/fs/protected_symlinks").is_ok_and(|text| text.trim_end() == "1");
    if !on || !is_root() {
        return left_out("links that the kernel does not follow", "needs root and fs.protected_symlinks=1");
    }
    let (home, source, target) = images(1 << 20);
    let place = scratch();
    fs::set_permissions(place.path(), Permissions::from_mode(0o1777)).unwrap();
    let [link, dangling, second] = ["link", "dangling", "second"].map(|name| place.path().join(name));
    symlink(&target, &link).unwrap();
    symlink(home.path().join("fresh"), &dangling).unwrap();
    for name in [&link, &dangling] {
        std::os::unix::fs::lchown(name, Some(1234), None).unwrap();
    }
    symlink(&link, &second).unwrap();
    for name in [&link, &dangling, &second] {
        for words in [args!["convert", "-f", "raw", source, name].to_vec(), args!["create", name, "1M"].to_vec()] {
            dedup_img(words).refused(&[name.to_str().unwrap(), "Permission denied"]);
        }
    }
    super::failure::untouched(&home);
}
