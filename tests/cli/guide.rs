//! The guide for scripts, `guide/scripts.md`: its two scripts on small images, with every outcome that it tells of, every shell line
//! in it, and what it promises about exit codes and about images in use. Where a test here fails, scripts of users fail.

use super::running::Running;
use crate::args;
use crate::support::{Ran, Random, dedup_command, dedup_img, names_in, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use tempfile::TempDir;

/// Bytes of each half of the disks here; both halves are equal.
const HALF: usize = 1536 << 10;

fn guide() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guide")
}

/// A command that runs in `home`, with the program under test in its `PATH`, and before it what `home/bin` has.
fn in_path(program: &str, home: &Path) -> Command {
    let tested = Path::new(env!("CARGO_BIN_EXE_dedup-img")).parent().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let path = [home.join("bin"), tested.to_path_buf()].into_iter().chain(std::env::split_paths(&path));
    let mut command = qemu::tool(program, args![]);
    command.current_dir(home).env("PATH", std::env::join_paths(path).unwrap());
    command
}

/// One of the two scripts, to be run in `home`.
fn script_command(name: &str, home: &Path) -> Command {
    in_path(guide().join(name).to_str().unwrap(), home)
}

/// Runs one of the two scripts in `home`.
fn script<I: IntoIterator<Item = OsString>>(name: &str, home: &Path, args: I) -> Ran {
    let mut command = script_command(name, home);
    command.args(args);
    qemu::finish(name, command)
}

/// Puts a program of a few lines of shell into `home/bin`; `$REAL` is the program under test.
fn stub(home: &Path, name: &str, lines: &str) {
    let path = home.join("bin").join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let program = format!("#!/bin/sh\nREAL='{}'\n{lines}\n", env!("CARGO_BIN_EXE_dedup-img"));
    // Written by another process: what a test beside this one starts would hold the file open here, and it could not be run.
    qemu::run("sh", args!["-c", "printf %s \"$1\" >\"$0\" && chmod 755 \"$0\"", path, program]).ok();
}

/// Writes a raw disk with two equal halves.
fn raw(path: &Path) {
    let half = Random::new(10).bytes(HALF);
    fs::write(path, [&half[..], &half[..]].concat()).unwrap();
}

/// A directory with `disk.raw`, and in `images` what is named; each is that disk as QEMU stores it.
fn home(images: &[&str]) -> TempDir {
    let home = scratch();
    raw(&home.path().join("disk.raw"));
    fs::create_dir(home.path().join("images")).unwrap();
    let plain = home.path().join("plain.qcow2");
    qemu::convert("raw", &home.path().join("disk.raw"), "qcow2", &plain, &["-o", "cluster_size=4k"]);
    for name in images {
        fs::copy(&plain, home.path().join("images").join(name)).unwrap();
    }
    fs::remove_file(plain).unwrap();
    home
}

/// The place in the file of a deduplicated image of [`raw`] where its only copy of the half begins: a pooled cluster.
fn pooled(image: &Path) -> usize {
    let bytes = fs::read(image).unwrap();
    let begin = &Random::new(10).bytes(4096)[..];
    bytes.chunks_exact(4096).position(|cluster| cluster == begin).unwrap() * 4096
}

/// Flips a bit of a file.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// Lets an image of 4 KiB clusters leak one behind its end.
fn leak(image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    let word = |at: usize| usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap();
    // The first refcount block, of 16-bit counts, and in it the cluster that is about to be.
    let count = word(word(48)) + bytes.len().div_ceil(4096) * 2;
    bytes[count + 1] = 1;
    bytes.resize(bytes.len().next_multiple_of(4096) + 4096, 7);
    fs::write(image, bytes).unwrap();
}

/// The state of a file: what it holds, and when it was written last.
fn state(path: &Path) -> (String, SystemTime) {
    (sha256_of(path), path.metadata().unwrap().modified().unwrap())
}

/// Asserts how a script ended and what its lines are on both streams; `...` in an expected line stands for anything.
#[track_caller]
fn says(ran: &Ran, code: i32, stdout: &[&str], stderr: &[&str]) {
    let fits = |line: &str, wanted: &str| match wanted.split_once("...") {
        Some((begin, end)) => line.starts_with(begin) && line.ends_with(end),
        None => line == wanted,
    };
    for (text, wanted) in [(&ran.stdout, stdout), (&ran.stderr, stderr)] {
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == wanted.len(), "{wanted:#?}: {}", ran.told());
        for (line, wanted) in lines.iter().zip(wanted) {
            assert!(fits(line, wanted), "wanted {wanted:?}, got {line:?}: {}", ran.told());
        }
    }
    assert_eq!(ran.code, code, "{}", ran.told());
}

#[test]
fn the_ci_job_publishes_an_image_that_passes_every_gate() {
    let home = home(&["-a\nb.qcow2"]);
    let (raw, target) = (home.path().join("disk.raw"), home.path().join("new.qcow2"));
    let ran = script("ci-image", home.path(), args!["--min-saved", "40", "raw", "disk.raw", "new.qcow2"]);
    let steps = ["ci-image: convert: ok", "ci-image: gates: ok", "ci-image: check --data: ok"];
    let end =
        ["ci-image: compare with ./disk.raw: ok", "ci-image: publish: ok", "ci-image: done: ./new.qcow2, ... bytes"];
    says(&ran, 0, &[steps, end].concat(), &[]);
    qemu::compare_same("raw", &raw, "qcow2", &target);
    qemu::check_clean(&target);
    assert!(target.metadata().unwrap().len() < raw.metadata().unwrap().len() * 6 / 10, "nothing is shared");
    // What is there stays.
    let before = state(&target);
    let line = "ci-image: ./new.qcow2 is there already; remove it, or choose another name";
    says(&script("ci-image", home.path(), args!["raw", "disk.raw", "new.qcow2"]), 1, &[], &[line]);
    assert_eq!(state(&target), before);
    // Names that tools could take for options, and for URLs.
    let images = home.path().join("images");
    script("ci-image", &images, args!["qcow2", "-a\nb.qcow2", "-nbd:x.qcow2"]).ok();
    qemu::compare_same("raw", &raw, "qcow2", &images.join("-nbd:x.qcow2"));
    assert_eq!(names_in(&images), ["-a\nb.qcow2", "-nbd:x.qcow2"]);
    assert_eq!(names_in(home.path()), ["disk.raw", "images", "new.qcow2"]);
}

#[test]
fn the_ci_job_leaves_nothing_behind_where_a_step_fails() {
    let home = home(&[]);
    let failed = |step: &str, code| format!("ci-image: {step}: FAILED (exit code {code}); nothing was made");
    let usage = "usage: ci-image [--min-saved PERCENT] raw|qcow2 SOURCE TARGET";
    let run = |args: &[&str]| script("ci-image", home.path(), args.iter().map(OsString::from));
    says(&run(&["disk.raw", "new.qcow2"]), 1, &[], &[usage]);
    says(&run(&["vmdk", "disk.raw", "new.qcow2"]), 1, &[], &[usage]);
    let missing = "dedup-img: Could not open './no.raw': No such file or directory";
    says(&run(&["raw", "no.raw", "new.qcow2"]), 1, &[], &[missing, &failed("convert", 1)]);

    let convert = ["ci-image: convert: ok"];
    let gate = "dedup-img: './.ci-image-...': sharing saves 50.0 % of the data; --min-saved asks for 60 %";
    let args = ["--min-saved", "60", "raw", "disk.raw", "new.qcow2"];
    says(&run(&args), 4, &convert, &[gate, &failed("gates", 4)]);
    let args = &args[2..];
    // A job that somebody has changed: no sharing any more.
    stub(
        home.path(),
        "dedup-img",
        "test $1 = convert && shift && set -- convert --plain \"$@\"\nexec \"$REAL\" \"$@\"",
    );
    let gate = "dedup-img: './.ci-image-...is still stored more than once; --max-duplicate allows 0 %";
    says(&run(args), 4, &convert, &[gate, &failed("gates", 4)]);
    // A disk that does not give back what was written. The same input gives the same file, so that the place is known.
    let sample = home.path().join("sample.qcow2");
    dedup_img(args!["convert", "-q", "-f", "raw", home.path().join("disk.raw"), sample]).ok();
    let damage = format!("printf X | dd of=\"$image\" bs=1 seek={} conv=notrunc status=none", pooled(&sample) + 9);
    fs::remove_file(&sample).unwrap();
    let after = "\"$REAL\" \"$@\" || exit\nfor image; do :; done\n";
    stub(home.path(), "dedup-img", &format!("{after}if test $1 = convert; then {damage}; fi"));
    let ran = run(args);
    let finding = ran.stderr.lines().next().unwrap_or_default().to_owned();
    assert!(finding.starts_with("ERROR ") && finding.contains("SHA-256"), "{}", ran.told());
    let gates = [convert[0], "ci-image: gates: ok"];
    says(&ran, 2, &gates, &[&finding, &failed("check --data", 2)]);
    // Another content than that of the source.
    let change = "printf XY | dd of=disk.raw bs=1 conv=notrunc status=none";
    stub(home.path(), "dedup-img", &format!("{after}if test $1 = check; then {change}; fi"));
    let checked = [&gates[..], &["ci-image: check --data: ok"]].concat();
    says(&run(args), 1, &checked, &[&failed("compare with ./disk.raw", 1)]);
    // Somebody else takes the name meanwhile.
    stub(home.path(), "dedup-img", "test $1 != check || echo theirs >new.qcow2\nexec \"$REAL\" \"$@\"");
    let ran = run(args);
    assert!(ran.code == 1 && ran.stderr.ends_with(&format!("{}\n", failed("publish", 1))), "{}", ran.told());
    assert_eq!(fs::read_to_string(home.path().join("new.qcow2")).unwrap(), "theirs\n");
    fs::remove_file(home.path().join("new.qcow2")).unwrap();
    // A signal.
    stub(home.path(), "dedup-img", "\"$REAL\" \"$@\"; kill -TERM $PPID");
    assert_eq!(run(args).code, -1);
    assert_eq!(names_in(home.path()), ["bin", "disk.raw", "images"]);
}

#[test]
fn the_ci_job_says_what_it_left_out_without_qemu_img() {
    let home = home(&[]);
    let bin = home.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let path = std::env::var_os("PATH").unwrap();
    for tool in ["bash", "mktemp", "rm", "ln", "stat"] {
        let found = std::env::split_paths(&path).map(|directory| directory.join(tool)).find(|found| found.exists());
        std::os::unix::fs::symlink(found.unwrap(), bin.join(tool)).unwrap();
    }
    let run = || {
        let mut command = script_command("ci-image", home.path());
        command.env("PATH", &bin).args(["raw", "disk.raw", "new.qcow2"]);
        qemu::finish("ci-image", command)
    };
    says(&run(), 1, &[], &["ci-image: dedup-img is not in PATH, which is ..."]);
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_dedup-img"), bin.join("dedup-img")).unwrap();
    let ran = run().ok();
    assert!(ran.stdout.contains("compare with ./disk.raw: LEFT OUT, there is no qemu-img here\n"), "{}", ran.told());
    qemu::compare_same("raw", &home.path().join("disk.raw"), "qcow2", &home.path().join("new.qcow2"));
}

/// Makes of `image` one that `check` calls corrupt and `check -r all` mends, without damage to its data: sharing without a pool,
/// of which a guest has undone a part.
fn leave_flags_behind(image: &Path) {
    dedup_img(args!["dedup", "-q", image]).ok();
    dedup_img(args!["gc", "-q", "--drop-pool", image]).ok();
    qemu::io("qcow2", image, &["write -P 7 0 64k".into()]);
    assert_eq!(dedup_img(args!["check", "-q", image]).code, 2);
}

#[test]
fn the_nightly_job_does_what_it_can_and_names_the_rest() {
    let home = home(&["-dash.qcow2", "bad.qcow2", "busy.qcow2", "new\nline it's.qcow2", "read.qcow2"]);
    let images = home.path().join("images");
    let at = |name: &str| images.join(name);
    leave_flags_behind(&at("bad.qcow2"));
    fs::write(at("text.qcow2"), "no image\n").unwrap();
    fs::create_dir(at("directory.qcow2")).unwrap();
    // Left out: links, hidden files, other names.
    fs::rename(at("read.qcow2"), home.path().join("other.qcow2")).unwrap();
    fs::copy(home.path().join("other.qcow2"), at("read.qcow2")).unwrap();
    fs::copy(home.path().join("other.qcow2"), at(".hidden.qcow2")).unwrap();
    fs::copy(home.path().join("other.qcow2"), at("disk.img")).unwrap();
    std::os::unix::fs::symlink("../other.qcow2", at("link.qcow2")).unwrap();
    let others: Vec<PathBuf> =
        ["bad.qcow2", "busy.qcow2", "read.qcow2", "text.qcow2", "link.qcow2", ".hidden.qcow2", "disk.img"]
            .iter()
            .map(|name| at(name))
            .collect();
    let (done, odd) = (at("-dash.qcow2"), at("new\nline it's.qcow2"));
    let writer = Running::qemu_io(args!["-f", "qcow2", at("busy.qcow2")]);
    let reader = Running::qemu_io(args!["-r", "-f", "qcow2", at("read.qcow2")]);
    let before: Vec<_> = others.iter().map(|path| state(path)).collect();
    let bad = "bad.qcow2: DAMAGED, not touched: ERROR OFLAG_COPIED... \
               (see: dedup-img check ./images/bad.qcow2; mend: dedup-img check -r all ./images/bad.qcow2)";
    let text = "text.qcow2: FAILED: Could not open 'text.qcow2': Image is not in qcow2 format...";
    let first = [
        "-dash.qcow2: gave back ...MiB",
        "busy.qcow2: in use, skipped",
        "$'new\\nline it\\'s.qcow2': gave back ...MiB",
        "read.qcow2: in use, skipped",
    ];
    let total = "nightly-dedup: ./images: 2 done, 2 in use, 2 failed, ...MiB given back";
    says(&script("nightly-dedup", home.path(), args!["images"]), 1, &first, &[bad, text, total]);
    for image in [&done, &odd] {
        assert!(image.metadata().unwrap().len() < HALF as u64 * 11 / 10, "{} was not compacted", image.display());
        qemu::compare_same("raw", &home.path().join("disk.raw"), "qcow2", image);
        qemu::check_clean(image);
    }
    // A second run changes nothing, not even a time.
    let after = [state(&done), state(&odd)];
    let total = "nightly-dedup: ./images: 2 done, 2 in use, 2 failed, 0B given back";
    says(&script("nightly-dedup", home.path(), args!["-q", "images"]), 1, &[], &[bad, text, total]);
    assert_eq!([state(&done), state(&odd)], after);
    assert_eq!(others.iter().map(|path| state(path)).collect::<Vec<_>>(), before);
    // All is well when the guests are off and somebody has mended what the job has named.
    drop((writer, reader));
    dedup_img(args!["check", "-q", "-r", "all", at("bad.qcow2")]);
    fs::remove_file(at("text.qcow2")).unwrap();
    says(&script("nightly-dedup", home.path(), args!["-q", "images"]), 0, &[], &[]);
    says(&script("nightly-dedup", &images, args!["-q", "--data", "--", "."]), 0, &[], &[]);
    for name in ["bad.qcow2", "busy.qcow2", "read.qcow2"] {
        assert!(at(name).metadata().unwrap().len() < HALF as u64 * 11 / 10, "{name} was not compacted");
    }
    assert_eq!(state(&others[4]), before[4], "a link was followed");
}

#[test]
fn the_nightly_job_takes_leaks_for_no_damage_and_finds_damaged_content_with_data() {
    let home = home(&["a.qcow2"]);
    let image = home.path().join("images/a.qcow2");
    leak(&image);
    assert_eq!((dedup_img(args!["check", "-q", image]).code, qemu::check(&image).code), (3, 3));
    script("nightly-dedup", home.path(), args!["-q", "images"]).ok();
    qemu::check_clean(&image);
    flip(&image, pooled(&image) + 9);
    let before = state(&image);
    script("nightly-dedup", home.path(), args!["-q", "images"]).ok();
    let ran = script("nightly-dedup", home.path(), args!["-q", "--data", "images"]);
    assert!(
        ran.stderr.starts_with("a.qcow2: DAMAGED, not touched: ERROR") && ran.stderr.contains("SHA-256"),
        "{}",
        ran.told()
    );
    assert_eq!((ran.code, state(&image)), (1, before));
}

/// A file system may need more for what was written anew than was given back: by one image, and by all together.
#[test]
fn the_nightly_job_tells_images_that_grew_from_those_with_nothing_to_give() {
    let home = home(&["a.qcow2", "b.qcow2"]);
    // What `stat` says of an image: before, and after.
    let sizes = |a: [u64; 2], b: [u64; 2]| {
        let say = |name: &str, [before, after]: [u64; 2]| {
            let [once, again] = [before, after].map(|bytes| format!("echo '{} * 512'", bytes / 512));
            format!("*{name}.qcow2) if test -e seen-{name}; then {again}; else : >seen-{name}; {once}; fi ;;")
        };
        for seen in ["seen-a", "seen-b"] {
            let _ = fs::remove_file(home.path().join(seen));
        }
        stub(home.path(), "stat", &format!("case \"$*\" in {} {} esac", say("a", a), say("b", b)));
        script("nightly-dedup", home.path(), args!["images"])
    };
    let (one, many) = (1 << 20, 40 << 20);
    let lines = ["a.qcow2: grew by 39MiB", "b.qcow2: nothing to give back"];
    let total = "nightly-dedup: ./images: 2 done, 0 in use, 0 failed, 39MiB more than before";
    says(&sizes([one, many], [one, one]), 0, &[lines[0], lines[1], total], &[]);
    let lines = ["a.qcow2: grew by 39MiB", "b.qcow2: gave back 39MiB"];
    let total = "nightly-dedup: ./images: 2 done, 0 in use, 0 failed, 0B given back";
    says(&sizes([one, many], [many, one]), 0, &[lines[0], lines[1], total], &[]);
    let lines = ["a.qcow2: grew by 512B", "b.qcow2: gave back 39MiB"];
    let total = "nightly-dedup: ./images: 2 done, 0 in use, 0 failed, 39MiB given back";
    says(&sizes([one, one + 512], [many, one]), 0, &[lines[0], lines[1], total], &[]);
}

#[test]
fn the_nightly_job_has_something_to_say_of_what_is_not_there() {
    let home = home(&[]);
    let none = "nightly-dedup: ./images: 0 done, 0 in use, 0 failed, 0B given back";
    says(&script("nightly-dedup", home.path(), args!["images"]), 0, &[none], &[]);
    says(&script("nightly-dedup", home.path(), args!["-q", "images"]), 0, &[], &[]);
    let usage = "usage: nightly-dedup [-q] [--data] DIRECTORY";
    for args in [&["absent"][..], &[], &["disk.raw"], &["-x", "images"], &["images", "images"]] {
        says(&script("nightly-dedup", home.path(), args.iter().map(OsString::from)), 1, &[], &[usage]);
    }
    let mut command = script_command("nightly-dedup", home.path());
    command.arg("images").env("PATH", "/usr/bin:/bin");
    let line = "nightly-dedup: dedup-img is not in PATH, which is /usr/bin:/bin";
    says(&qemu::finish("nightly-dedup", command), 1, &[], &[line]);
}

#[test]
fn the_nightly_job_runs_once_at_a_time() {
    let home = home(&["a.qcow2"]);
    let before = state(&home.path().join("images/a.qcow2"));
    // The first call waits, but not for ever if this test has failed; those of another run would not.
    let wait = "test -e started || { echo >started; timeout 30 sh -c 'while ! test -e go; do sleep 0.02; done'; }";
    stub(home.path(), "dedup-img", &format!("{wait}\nexec \"$REAL\" \"$@\""));
    let mut command = script_command("nightly-dedup", home.path());
    command.args(["-q", "images"]);
    let mut first = Running::start(command);
    assert!(first.until(|_| home.path().join("started").exists()));
    let line = "nightly-dedup: ./images: another run is at work here; nothing done";
    says(&script("nightly-dedup", home.path(), args!["images"]), 1, &[], &[line]);
    assert_eq!(state(&home.path().join("images/a.qcow2")), before);
    fs::write(home.path().join("go"), "").unwrap();
    first.finish().ok();
    says(&script("nightly-dedup", home.path(), args!["-q", "images"]), 0, &[], &[]);
}

#[test]
fn the_nightly_job_goes_on_after_a_kill_and_does_not_compact_without_room() {
    let home = home(&["a.qcow2", "b.qcow2", "c.qcow2"]);
    stub(home.path(), "df", "echo Avail; echo 4096");
    let kill = "case \"$*\" in dedup*a.qcow2) kill -KILL $$ ;; dedup*c.qcow2) rm images/c.qcow2 ;; esac";
    stub(home.path(), "dedup-img", &format!("{kill}; exec \"$REAL\" \"$@\""));
    let killed = "a.qcow2: FAILED: ended by signal 9; if that was a crash: dedup-img check -r all ./images/a.qcow2";
    let freed = ["b.qcow2: gave back ...MiB, not compacted: too little free space", "c.qcow2: gone"];
    let total = "nightly-dedup: ./images: 1 done, 0 in use, 1 failed, ...MiB given back";
    says(&script("nightly-dedup", home.path(), args!["images"]), 1, &freed, &[killed, total]);
    assert!(home.path().join("images/b.qcow2").metadata().unwrap().len() > HALF as u64 * 2, "it was compacted");
    qemu::check_clean(&home.path().join("images/b.qcow2"));
}

/// I6. `guide/scripts.md` promises the exit code and the last line to every script that tells "in use" from other failures:
/// change them, and those scripts take a guest that runs for a broken image.
#[test]
fn the_words_for_an_image_in_use_are_those_that_the_guide_promises() {
    let home = home(&["vm.qcow2"]);
    let image = home.path().join("images/vm.qcow2");
    let [source, other] = ["disk.raw", "other.qcow2"].map(|name| home.path().join(name));
    let socket = home.path().join("socket");
    let file = format!("driver=file,node-name=file,filename={}", image.display());
    let holders = [
        qemu::tool("qemu-io", args!["-f", "qcow2", "-c", "sleep 60000", image]),
        qemu::tool("qemu-nbd", args!["-f", "qcow2", "-k", socket, image]),
        qemu::tool(
            "qemu-storage-daemon",
            args!["--blockdev", file, "--blockdev", "driver=qcow2,file=file,node-name=disk"],
        ),
        dedup_command(args!["convert", "-q", "-f", "raw", "-r", "64k", "-t", "unsafe", source, image]),
    ];
    let before = state(&image);
    let last = format!("Is another process using the image [{}]?", image.display());
    for holder in holders {
        let mut holder = Running::start(holder);
        // Stopped, so that it holds the image for as long as it takes.
        holder.stop_when(|it| it.has_locked(&image));
        for words in [
            &args!["dedup", image][..],
            &args!["dedup", "--dry-run", image],
            &args!["gc", image],
            &args!["gc", "--compact", image],
            &args!["check", image],
            &args!["check", "-r", "leaks", image],
            &args!["check", "-r", "all", image],
            &args!["stats", image],
            &args!["convert", image, other],
            &args!["convert", "-f", "raw", source, image],
            &args!["convert", "-n", "-f", "raw", source, image],
            &args!["create", image, "1M"],
        ] {
            let ran = dedup_img(words.iter().cloned());
            let lines: Vec<&str> = ran.stderr.lines().collect();
            assert_eq!((ran.code, ran.stdout.as_str(), lines.len()), (1, "", 2), "{}", ran.told());
            assert!(lines[0].starts_with("dedup-img: ") && lines[0].ends_with(" lock"), "{}", ran.told());
            assert_eq!(lines[1], last, "{}", ran.told());
        }
        assert_eq!(state(&image), before);
    }
    assert!(!other.exists());
}

/// The blocks of the guide: what follows the three quotes, and the text.
fn blocks(text: &str) -> Vec<(&str, &str)> {
    text.split("\n```").skip(1).step_by(2).map(|block| block.split_once('\n').unwrap()).collect()
}

/// What a script printed, with `#` for every number.
fn without_numbers(text: &str) -> String {
    let mut out = String::new();
    for c in text.trim().chars() {
        match c {
            '0'..='9' | '.' if out.ends_with('#') => {}
            '0'..='9' | '.' => out.push('#'),
            c => out.push(c),
        }
    }
    out
}

#[test]
fn every_shell_line_of_the_guide_runs_and_prints_what_it_should() {
    let home = home(&["a.qcow2", "b.qcow2", "fresh.qcow2", "vm.qcow2"]);
    let at = |name: &str| home.path().join(name);
    dedup_img(args!["dedup", "-q", at("images/b.qcow2")]).ok();
    dedup_img(args!["gc", "-q", "--compact", at("images/b.qcow2")]).ok();
    fs::rename(at("images/fresh.qcow2"), at("fresh.qcow2")).unwrap();
    fs::hard_link(at("images/vm.qcow2"), at("vm.qcow2")).unwrap();
    std::os::unix::fs::symlink(guide(), at("guide")).unwrap();
    let mut guest = Some(Running::qemu_io(args!["-f", "qcow2", at("vm.qcow2")]));

    let text = fs::read_to_string(guide().join("scripts.md")).unwrap();
    let blocks = blocks(&text);
    let mut outputs = Vec::new();
    for (n, (language, lines)) in blocks.iter().enumerate().filter(|(_, block)| block.0 == "sh") {
        let mut command = in_path("bash", home.path());
        command.args(["-c", &format!("set -euo pipefail\n{lines}")]);
        let ran = qemu::finish("bash", command).ok();
        assert_eq!((ran.stderr.as_str(), *language), ("", "sh"), "{}", ran.told());
        match blocks.get(n + 1) {
            Some(("text", shown)) => assert_eq!(without_numbers(&ran.stdout), without_numbers(shown), "{}", ran.told()),
            _ => outputs.push(ran.stdout),
        }
        if lines.contains("nightly-dedup") {
            // The recipes want an image that is not deduplicated, and none that is in use.
            drop(guest.take());
            fs::rename(at("fresh.qcow2"), at("images/a.qcow2")).unwrap();
            fs::remove_file(at("images/vm.qcow2")).unwrap();
        }
    }
    let half = HALF as u64;
    let wanted = [
        "vm.qcow2 is in use, another time\n".to_owned(),
        format!("{half}\n"),
        "50 % saved, cluster size #\n".to_owned(),
        "images/a.qcow2: 50 %\n".to_owned(),
        format!("images/a.qcow2 {half}\n"),
        format!("{half} images/a.qcow2\n0 images/b.qcow2\n"),
        String::new(),
        "0\n".to_owned(),
        String::new(),
    ];
    assert_eq!(outputs.len(), wanted.len(), "{outputs:#?}");
    for (output, wanted) in outputs.iter().zip(&wanted) {
        match wanted.split_once('#') {
            Some((begin, _)) => assert!(output.starts_with(begin), "{output}"),
            None => assert_eq!(output, wanted),
        }
    }
}

/// The first two columns of the table below the heading.
fn table(text: &str, heading: &str) -> Vec<[String; 2]> {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).unwrap();
    let rows = rest.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    rows.map(cells).map(|cells| [cells[1].clone(), cells[2].clone()]).collect()
}

#[test]
fn the_exit_codes_are_those_of_the_readme() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let guide = fs::read_to_string(guide().join("scripts.md")).unwrap();
    let codes = table(&guide, "## Exit codes");
    assert_eq!(codes, table(&readme, "## Exit codes"));
    assert!(codes.len() > 6, "{codes:?}");
}
