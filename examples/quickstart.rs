//! A sample disk from real files of this machine becomes a deduplicated image, which is checked.
//!
//! ```sh
//! cargo run --release --example quickstart            # in a new directory under the system's temporary one
//! cargo run --release --example quickstart -- DIR
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use dedup_img::finding::Finding;
use dedup_img::storage::LockMode;
use dedup_img::{
    CheckOptions, ConvertOptions, Disk, DiskOptions, RawOptions, Work, WorkOptions, check, convert, open_image, to_raw,
};

/// How much of the machine's files the disk takes.
const DATA: u64 = 192 << 20;
/// File systems place files at multiples of this.
const BLOCK: u64 = 4096;
/// The size of the disk.
const DISK: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = match std::env::args_os().nth(1) {
        Some(directory) => PathBuf::from(directory),
        None => std::env::temp_dir().join("dedup-img-quickstart"),
    };
    fs::create_dir_all(&directory)?;
    let (disk, image, back) = (directory.join("disk.raw"), directory.join("disk.qcow2"), directory.join("back.raw"));

    println!("1. A sample disk: files of this machine, and the same files again as an upgrade would leave them");
    let files = make_disk(&disk)?;
    println!("   {} ({files} files)\n", disk.display());

    println!("2. dedup-img convert disk.raw disk.qcow2");
    let work = Work::new(WorkOptions::default())?;
    let source = Disk::open(&disk, &DiskOptions::default())?;
    let report = convert(&source, &image, &ConvertOptions::default(), &work)?;
    println!("   {}", image.display());
    println!("   data on the disk   {:>6} MiB", mib(report.data_clusters * report.cluster_size_bytes));
    println!("   stored in the file {:>6} MiB", mib(report.file_length_bytes));
    println!("   saved by sharing   {:>6} MiB ({:.0} %)", mib(report.saved_bytes), report.saved_percent);
    println!("   cluster size       {:>6} KiB\n", report.cluster_size_bytes >> 10);

    println!("3. Is it the same disk? Back to raw, byte by byte:");
    to_raw(
        &Disk::open(&image, &DiskOptions::default())?,
        &back,
        RawOptions { durable: false, ..RawOptions::default() },
        &work,
    )?;
    if !same(&disk, &back)? {
        return Err("the content differs".into());
    }
    fs::remove_file(&back)?;
    println!("   identical\n");

    println!("4. dedup-img check --data disk.qcow2");
    let (storage, _) = open_image(&image, None, LockMode::Read)?;
    let mut print = |finding: &Finding| println!("   {}", finding.kind);
    let checked = check(&storage, CheckOptions { data: true }, &work, &mut print)?;
    if checked.corruptions + checked.leaks + checked.check_errors + checked.findings_beyond > 0 {
        return Err("the check found errors".into());
    }
    println!("   clean, and every shared cluster has the content that its SHA-256 names\n");

    println!("5. What does stock QEMU say?");
    match Command::new("qemu-img").arg("check").arg(&image).output() {
        Ok(output) => {
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                println!("   {line}");
            }
            if !output.status.success() {
                return Err("qemu-img check found errors".into());
            }
        }
        Err(_) => println!("   qemu-img is not installed; get it with: apt-get install qemu-utils"),
    }
    println!("\nThe files are in {}", directory.display());
    Ok(())
}

/// Writes a sparse disk: a run of files, a gap, and the run again with every tenth file changed.
fn make_disk(path: &Path) -> io::Result<u64> {
    let mut disk = File::create(path)?;
    disk.set_len(DISK)?;
    let mut files = 0;
    let mut total = 0;
    for top in ["/usr/bin", "/usr/lib", "/usr/share", "/etc"] {
        let mut pending = vec![PathBuf::from(top)];
        while let Some(path) = pending.pop() {
            // What cannot be read is left out.
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if metadata.is_dir() {
                let mut entries: Vec<_> =
                    fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()).collect();
                entries.sort();
                pending.extend(entries.into_iter().rev());
            } else if metadata.is_file() && total + metadata.len() <= DATA {
                let mut content = Vec::new();
                if File::open(&path).and_then(|mut file| file.read_to_end(&mut content)).is_err() {
                    continue;
                }
                write_at(&mut disk, &content, total)?;
                if files % 10 == 0 {
                    content.extend_from_slice(b"upgraded");
                    content.rotate_right(8);
                }
                write_at(&mut disk, &content, DISK / 2 + total)?;
                total += (content.len() as u64).next_multiple_of(BLOCK);
                files += 1;
            }
        }
    }
    Ok(files)
}

fn write_at(disk: &mut File, content: &[u8], offset: u64) -> io::Result<()> {
    disk.seek(SeekFrom::Start(offset))?;
    disk.write_all(content)
}

fn same(a: &Path, b: &Path) -> io::Result<bool> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let read = a.read(&mut ours)?;
        if read == 0 {
            return Ok(b.read(&mut theirs)? == 0);
        }
        b.read_exact(&mut theirs[..read])?;
        if ours[..read] != theirs[..read] {
            return Ok(false);
        }
    }
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}
