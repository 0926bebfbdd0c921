//! What a terminal of 80 columns shows: the manual, the help, the summaries (of 'stats' in a file of their own).

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Ran, args, dedup_command, dedup_img_in};
use crate::support::{corpus, qemu, scratch};

fn pages() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("man")).unwrap();
    let mut pages: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
    pages.sort();
    assert!(pages.len() >= 8, "{pages:?}");
    pages
}

#[test]
fn groff_renders_every_page_without_a_warning() {
    // As a terminal shows it, without the ends of sheets, which a table may not fit on.
    let home = scratch();
    let endless = home.path().join("endless");
    std::fs::write(&endless, ".pl 100000\n").unwrap();
    for page in pages() {
        let mut groff = Command::new("groff");
        groff.args(["-t", "-man", "-Tascii", "-ww", "-rLL=80n", "-P-cbou"]).args([&endless, &page]);
        let ran = Ran::new(format!("{groff:?}"), &groff.output().unwrap()).ok();
        assert_eq!(ran.stderr, "", "{}", ran.told());
        let wide: Vec<&str> = ran.stdout.lines().filter(|line| line.len() > 80).collect();
        assert!(wide.is_empty(), "{page:?} in a terminal of 80 columns: {wide:#?}");
        assert!(ran.stdout.contains("\nNAME\n") && ran.stdout.contains("SEE ALSO"), "{page:?}");
    }
}

#[test]
fn every_page_is_referred_to_by_the_first_one() {
    let first = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("man/dedup-img.1")).unwrap();
    let first = first.replace('\\', "");
    for page in pages() {
        let name = page.file_stem().unwrap().to_str().unwrap();
        assert!(first.contains(&format!("{name} (")) || name == "dedup-img", "{name}");
    }
}

/// A screen: what an 80 columns wide terminal shows of the usual options without scrolling, and of all of them when it is high.
#[test]
fn help_fits_a_screen() {
    for command in ["", "create", "convert", "dedup", "gc", "check", "stats", "completions"] {
        for (flag, most) in [("-h", 24), ("--help", 52)] {
            let mut help = dedup_command(args![flag]);
            help = match command {
                "" => help,
                _ => dedup_command(args![command, flag]),
            };
            help.env("COLUMNS", "80");
            let ran = Ran::new(format!("{help:?}"), &help.output().unwrap()).ok();
            let lines: Vec<&str> = ran.stdout.lines().collect();
            assert!(lines.len() <= most, "{command} {flag} has {} lines", lines.len());
            assert!(lines.iter().all(|line| line.len() <= 80), "{}", ran.told());
            let wrapped = lines.iter().filter(|line| line.starts_with("            ")).count();
            assert_eq!(wrapped, 0, "a line for an option: {}", ran.told());
            let examples = lines.contains(&"Examples:");
            assert_eq!(examples, flag == "--help" && !["", "completions"].contains(&command), "{}", ran.told());
        }
    }
}

#[test]
fn every_summary_fits_into_80_columns() {
    let home = scratch();
    std::fs::write(home.path().join("disk.raw"), [corpus::content(), corpus::content()].concat()).unwrap();
    qemu::create("qcow2", &home.path().join("history.qcow2"), 64 << 20, "cluster_size=4k");
    for line in [
        "convert disk.raw auto.qcow2",
        "convert -c disk.raw packed.qcow2",
        "convert --plain disk.raw plain.qcow2",
        "convert -O raw auto.qcow2 back.raw",
        "convert -n disk.raw history.qcow2",
        "convert --all-snapshots history.qcow2 snapshots.qcow2",
        "convert -B auto.qcow2 -F qcow2 disk.raw overlay.qcow2",
        "create -o cluster_size=4k large.qcow2 2T",
        "convert -o cluster_size=4k large.qcow2 larger.qcow2",
        "dedup --dry-run plain.qcow2",
        "dedup plain.qcow2",
        "dedup plain.qcow2",
        "gc --dry-run --compact plain.qcow2",
        "gc --compact plain.qcow2",
        "gc --drop-pool plain.qcow2",
        "check --data auto.qcow2",
    ] {
        let ran = dedup_img_in(home.path(), line.split(' ').map(Into::into)).ok();
        let wide: Vec<&str> = ran.stdout.lines().filter(|line| line.len() > 80 || !line.is_ascii()).collect();
        // That line is qemu-img's.
        assert!(wide.is_empty() || line.starts_with("create"), "{line}: {wide:#?}");
    }
}
