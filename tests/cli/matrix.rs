//! I7, I12: every kind of target against every command that writes one. The manual has the same table (dedup-img(1), TARGETS).

use super::running::{is_root, unprivileged};
use crate::support::loops::Loop;
use crate::support::no_links::Renames;
use crate::support::{Ran, dedup_command, left_out, names_in, no_links, qemu, scratch};
use Outcome::{Fails, Makes, Replaces, Writes};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::any::Any;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What becomes of a target, with words that the command says of it; without any, it says nothing.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// A new file appears.
    Makes(&'static str),
    /// A new file takes the name, whole or not at all.
    Replaces(&'static str),
    /// The file or device is written where it lies.
    Writes(&'static str),
    /// It stays as it was.
    Fails(&'static str),
}

const ABSENT: Outcome = Fails("No such file or directory");
const LIES: Outcome = Writes("");
const MOUNTED: Outcome = Writes("is written where it lies, because it is mounted there");
const DESCRIPTOR: Outcome = Writes("is written where it lies, because it is a descriptor");
const DENIED: Outcome = Writes("its name cannot be given to another file (Permission denied)");
const OTHER_NAME: Outcome = Replaces("has 1 other name (hard link), which keeps the old content");
const NOT_SYNCED: &str =
    "is complete, but a power failure may take its name: could not sync its directory: Invalid argument";
const DEVICE: Outcome = Fails("it is a block device; write to a regular file");

macro_rules! rows {
    ($($row:ident: $make:expr, [$($outcome:expr),*];)*) => { $(
        #[test]
        fn $row() {
            in_own_namespace(stringify!($row), || row(stringify!($row), $make, [$($outcome),*]));
        }
    )* };
}

// target:                                         create          convert     -n      dedup   gc
rows! {
    regular_file:              file,               [Replaces(""), Replaces(""), LIES,   LIES,   LIES];
    new_name:                  new,                [Makes(""),        Makes(""),        ABSENT, ABSENT, ABSENT];
    link:                      a_link,             [Replaces(""), Replaces(""), LIES,   LIES,   LIES];
    dangling_link:             dangling,           [Makes(""),        Makes(""),        ABSENT, ABSENT, ABSENT];
    hard_link:                 two_names,          [OTHER_NAME,   OTHER_NAME,   LIES,   LIES,   LIES];
    bind_mount:                mounted_over,       [MOUNTED,      MOUNTED,      LIES,   LIES,   LIES];
    fuse_without_links:        |old| fuse(old, Renames::All),
        [Replaces(NOT_SYNCED), Replaces(NOT_SYNCED), LIES, LIES, LIES];
    fuse_without_links_new:    |_| fuse(None, Renames::All), [Makes(NOT_SYNCED), Makes(NOT_SYNCED), ABSENT, ABSENT, ABSENT];
    fuse_without_rename:       |old| fuse(old, Renames::None),
        [Writes("(Function not implemented)"), Writes("(Function not implemented)"), LIES, LIES, LIES];
    fuse_without_rename_new:   |_| fuse(None, Renames::None),
        [Fails("Function not implemented"), Fails("Function not implemented"), ABSENT, ABSENT, ABSENT];
    tmpfs:                     |old| mounted("tmpfs", old),  [Replaces(""), Replaces(""), LIES, LIES, LIES];
    tmpfs_new:                 |_| mounted("tmpfs", None),   [Makes(""), Makes(""), ABSENT, ABSENT, ABSENT];
    ext4:                      |old| mounted("ext4", old),   [Replaces(""), Replaces(""), LIES, LIES, LIES];
    ext4_new:                  |_| mounted("ext4", None),    [Makes(""), Makes(""), ABSENT, ABSENT, ABSENT];
    btrfs:                     |old| mounted("btrfs", old),  [Replaces(""), Replaces(""), LIES, LIES, LIES];
    btrfs_new:                 |_| mounted("btrfs", None),   [Makes(""), Makes(""), ABSENT, ABSENT, ABSENT];
    xfs:                       |old| mounted("xfs", old),    [Replaces(""), Replaces(""), LIES, LIES, LIES];
    xfs_new:                   |_| mounted("xfs", None),     [Makes(""), Makes(""), ABSENT, ABSENT, ABSENT];
    vfat:                      |old| mounted("vfat", old),   [Replaces(""), Replaces(""), LIES, LIES, LIES];
    vfat_new:                  |_| mounted("vfat", None),    [Makes(""), Makes(""), ABSENT, ABSENT, ABSENT];
    closed_directory:          closed,             [DENIED,       DENIED,       LIES,   LIES,   LIES];
    closed_directory_new:      closed_new,
        [Fails("Permission denied"), Fails("Permission denied"), ABSENT, ABSENT, ABSENT];
    descriptor_of_a_memfd:     memfd,              [DESCRIPTOR,   DESCRIPTOR,   LIES,   LIES,   LIES];
    descriptor_of_a_file:      |old| descriptor(old, false), [DESCRIPTOR, DESCRIPTOR, LIES, LIES, LIES];
    descriptor_without_a_name: |old| descriptor(old, true),  [DESCRIPTOR, DESCRIPTOR, LIES, LIES, LIES];
    device_of_512_byte_blocks: |old| device(old, 512),       [DEVICE, LIES, LIES, LIES, LIES];
    device_of_4k_blocks:       |old| device(old, 4 << 10),   [DEVICE, LIES, LIES, LIES, LIES];
    device_of_16k_blocks:      |old| device(old, 16 << 10),  [DEVICE, LIES, LIES, LIES, LIES];
    device_of_64k_blocks:      |old| device(old, 64 << 10),  [DEVICE, LIES, LIES, LIES, LIES];
}

/// A target, and what keeps it there.
struct Ground {
    /// As the command is told.
    path: PathBuf,
    /// Where its name is in the end.
    name: PathBuf,
    privileged: bool,
    _held: Vec<Box<dyn Any>>,
}

impl Ground {
    fn plain(path: PathBuf, held: Vec<Box<dyn Any>>) -> Self {
        Self { name: path.clone(), path, privileged: true, _held: held }
    }

    fn run(&self, words: Vec<OsString>) -> Ran {
        let command = if self.privileged { dedup_command(words) } else { unprivileged(words) };
        qemu::finish("dedup-img", command)
    }

    fn inode(&self) -> Option<(u64, u64)> {
        fs::metadata(&self.name).ok().map(|found| (found.dev(), found.ino()))
    }
}

/// Makes a target with a content, or says why that cannot be done here.
type Made = Result<Ground, String>;

/// Runs `job` where it may mount what it likes, and nothing stays mounted.
fn in_own_namespace(row: &str, job: impl FnOnce() + Send) {
    let ran = std::thread::scope(|scope| {
        let job = || {
            // Of this thread alone, and of what it starts.
            let own = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
                mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            });
            match own {
                Ok(()) => job(),
                Err(e) => left_out(&format!("the target {row}"), &format!("a mount namespace: {e}")),
            }
        };
        scope.spawn(job).join()
    });
    if let Err(panic) = ran {
        std::panic::resume_unwind(panic);
    }
}

fn row(name: &str, make: impl Fn(Option<&Path>) -> Made, outcomes: [Outcome; 5]) {
    let home = scratch();
    let [source, base, image, precious] =
        ["source.raw", "base.raw", "image.qcow2", "precious"].map(|name| home.path().join(name));
    let clusters =
        |count: u32, from: u32| (0..64).flat_map(|i| vec![(i % count + from) as u8; 64 << 10]).collect::<Vec<u8>>();
    fs::write(&source, clusters(5, 100)).unwrap();
    fs::write(&base, clusters(8, 1)).unwrap();
    qemu::convert("raw", &base, "qcow2", &image, &[]);
    fs::write(&precious, b"precious").unwrap();
    let commands: [(&[&str], &Path, &Path); 5] = [
        (&["create", "TARGET", "4M"], &precious, &base),
        (&["convert", "-f", "raw", "SOURCE", "TARGET"], &precious, &source),
        (&["convert", "-n", "-f", "raw", "SOURCE", "TARGET"], &image, &source),
        (&["dedup", "TARGET"], &image, &base),
        (&["gc", "TARGET"], &image, &base),
    ];
    for ((words, old, due), outcome) in commands.into_iter().zip(outcomes) {
        let ground = match make(Some(old)) {
            Ok(ground) => ground,
            Err(why) => return left_out(&format!("the target {name}"), &why),
        };
        let words = words.iter().map(|&word| match word {
            "SOURCE" => source.clone().into(),
            "TARGET" => ground.path.clone().into(),
            word => OsString::from(word),
        });
        let told = format!("{name}, {outcome:?}");
        let before = (ground.inode(), content(&ground), beside(&ground));
        let ran = ground.run(words.collect());
        let after = (ground.inode(), content(&ground), beside(&ground));
        let (said, same_file) = match outcome {
            Makes(said) | Replaces(said) => (said, false),
            Writes(said) | Fails(said) => (said, true),
        };
        let silent = said.is_empty() && ran.stderr.is_empty();
        assert!(silent || !said.is_empty() && ran.stderr.contains(said), "{told}: {}", ran.told());
        assert_eq!(before.0 == after.0, same_file, "{told}: {}", ran.told());
        if let Fails(_) = outcome {
            assert!(ran.code == 1 && before == after, "{told}: {}", ran.told());
            continue;
        }
        ran.ok();
        let mut names = before.2;
        if let Makes(_) = outcome {
            names.push(ground.name.file_name().unwrap().to_string_lossy().into_owned());
            names.sort();
        }
        assert_eq!(after.2, names, "{told}");
        qemu::check_clean(&ground.name);
        match due == base && old == precious {
            true => assert_eq!(qemu::virtual_size("qcow2", &ground.name), 4 << 20, "{told}"),
            false => qemu::compare_same("raw", due, "qcow2", &ground.name),
        }
    }
}

fn content(ground: &Ground) -> Option<Vec<u8>> {
    fs::read(&ground.name).ok()
}

/// The names in the directory of the target, where nothing is to be left.
fn beside(ground: &Ground) -> Vec<String> {
    match ground.name.parent() {
        Some(parent) if !parent.starts_with("/dev") && !parent.starts_with("/proc") => names_in(parent),
        _ => Vec::new(),
    }
}

/// A directory and the path of a target in it, with the old content where there is one.
fn begin(old: Option<&Path>) -> (tempfile::TempDir, PathBuf) {
    let home = scratch();
    let path = home.path().join("target");
    if let Some(old) = old {
        fs::copy(old, &path).unwrap();
    }
    (home, path)
}

fn file(old: Option<&Path>) -> Made {
    let (home, path) = begin(old);
    Ok(Ground::plain(path, vec![Box::new(home)]))
}

fn new(_: Option<&Path>) -> Made {
    file(None)
}

fn a_link(old: Option<&Path>) -> Made {
    let (home, name) = begin(old);
    let path = home.path().join("link");
    symlink("target", &path).unwrap();
    Ok(Ground { path, name, privileged: true, _held: vec![Box::new(home)] })
}

fn dangling(_: Option<&Path>) -> Made {
    a_link(None)
}

fn two_names(old: Option<&Path>) -> Made {
    let (home, path) = begin(old);
    fs::hard_link(&path, home.path().join("other")).unwrap();
    Ok(Ground::plain(path, vec![Box::new(home)]))
}

fn mounted_over(old: Option<&Path>) -> Made {
    let (home, path) = begin(old);
    let (outside, below) = begin(old);
    let flags = MsFlags::MS_BIND;
    mount(Some(&below), &path, None::<&str>, flags, None::<&str>).map_err(|e| format!("a bind mount: {e}"))?;
    Ok(Ground::plain(path.clone(), vec![Box::new(Unmount(path)), Box::new(home), Box::new(outside)]))
}

/// Unmounts when the row is done with it.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn fuse(old: Option<&Path>, renames: Renames) -> Made {
    let home = scratch();
    let session = no_links::mount(home.path(), renames).map_err(|e| format!("a FUSE file system: {e}"))?;
    let path = home.path().join("target");
    if let Some(old) = old {
        fs::write(&path, fs::read(old).unwrap()).unwrap();
    }
    Ok(Ground::plain(path, vec![Box::new(session), Box::new(home)]))
}

/// A target on a file system of a kind.
fn mounted(kind: &str, old: Option<&Path>) -> Made {
    if !is_root() {
        return Err("needs root".into());
    }
    let home = scratch();
    let (disk, top) = (home.path().join("disk"), home.path().join("top"));
    fs::create_dir(&top).unwrap();
    let run = |mut command: Command| match command.env("LC_ALL", "C").output() {
        Ok(ran) if ran.status.success() => Ok(()),
        Ok(ran) => Err(format!("{command:?}: {}", String::from_utf8_lossy(&ran.stderr))),
        Err(e) => Err(format!("{command:?}: {e}")),
    };
    let mut command = Command::new("mount");
    if kind == "tmpfs" {
        command.args(["-t", kind, "none"]).arg(&top);
    } else {
        File::create(&disk).unwrap().set_len(320 << 20).unwrap();
        let mut make = Command::new(format!("mkfs.{kind}"));
        make.arg(if kind == "vfat" { "-v" } else { "-q" }).arg(&disk);
        run(make)?;
        command.args(["-o", "loop", "-t", kind]).args([&disk, &top]);
    }
    run(command)?;
    let path = top.join("target");
    if let Some(old) = old {
        fs::copy(old, &path).unwrap();
    }
    Ok(Ground::plain(path, vec![Box::new(Unmount(top)), Box::new(home)]))
}

/// A directory that the user may not write, with a file that he may write.
fn closed(old: Option<&Path>) -> Made {
    let (home, path) = begin(old);
    fs::set_permissions(home.path(), Permissions::from_mode(0o555)).unwrap();
    Ok(Ground { privileged: false, ..Ground::plain(path, vec![Box::new(home)]) })
}

fn closed_new(_: Option<&Path>) -> Made {
    closed(None)
}

fn memfd(old: Option<&Path>) -> Made {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = memfd_create("target", MFdFlags::empty()).map_err(|e| format!("a memfd: {e}"))?;
    inherited(File::from(file), old, Vec::new())
}

fn descriptor(old: Option<&Path>, unlinked: bool) -> Made {
    let (home, path) = begin(old);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    if unlinked {
        fs::remove_file(&path).unwrap();
    }
    inherited(file, old, vec![Box::new(home)])
}

/// A descriptor that the programs which this test starts get from it.
fn inherited(mut file: File, old: Option<&Path>, mut held: Vec<Box<dyn Any>>) -> Made {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    if let Some(old) = old {
        file.set_len(0).unwrap();
        std::io::copy(&mut File::open(old).unwrap(), &mut file).unwrap();
    }
    let path = PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd()));
    held.push(Box::new(file));
    Ok(Ground::plain(path, held))
}

/// A loop device with blocks of `block` bytes.
fn device(old: Option<&Path>, block: u32) -> Made {
    if !is_root() {
        return Err("needs root".into());
    }
    let (home, file) = begin(old);
    File::options().write(true).open(&file).unwrap().set_len(8 << 20).unwrap();
    let device = Loop::with_blocks(&file, block)?;
    Ok(Ground::plain(device.to_path_buf(), vec![Box::new(device), Box::new(home)]))
}
