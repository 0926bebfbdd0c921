//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use dedup_img::disk::BackingRule;
use dedup_img::pool::Pin;

use crate::qemu_options::QemuArgs;
use crate::size::{parse_percent, parse_size};

/// Deduplicated QCOW2 images that stock QEMU reads and writes.
#[derive(Debug, Parser)]
#[command(name = "dedup-img", version, about, max_term_width = 100, args_override_self = true)]
#[command(after_help = "Exit status: 0 done, 1 failed or wrong usage.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(CreateArgs),
    Convert(Box<ConvertArgs>),
    Dedup(DedupArgs),
    Gc(GcArgs),
    Check(CheckArgs),
    Stats(StatsArgs),
}

/// Create a new, empty image that is ready for deduplication.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  dedup-img create disk.qcow2 20G
  dedup-img create -o cluster_size=4k disk.qcow2 20G
  dedup-img create -b base.qcow2 -F qcow2 overlay.qcow2"
)]
pub(crate) struct CreateArgs {
    /// Image options; '-o help' lists them
    #[arg(short = 'o', value_name = "KEY=VALUE,...")]
    pub(crate) options: Vec<String>,
    /// Backing file; its name is stored as given, relative to the image
    #[arg(short = 'b', long = "backing", value_name = "FILE")]
    pub(crate) backing_file: Option<String>,
    /// Format of the backing file: raw or qcow2
    #[arg(short = 'F', long = "backing-format", value_name = "FMT")]
    pub(crate) backing_format: Option<String>,
    /// Follow links and '..' in names of files behind it if the files lie in this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) backing_dir: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image to create
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Virtual size: bytes, or with a suffix b, k, M, G, T, P, E (1024-based); the backing file's where not given
    #[arg(value_name = "SIZE", allow_negative_numbers = true)]
    pub(crate) size: Option<String>,
}

/// Convert an image into a deduplicated QCOW2, or back into a plain one or into raw.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img convert [OPTIONS] SOURCE... TARGET",
    after_help = "\
Examples:
  dedup-img convert disk.raw disk.qcow2
  dedup-img convert -p -o cluster_size=4k vm.qcow2 small.qcow2
  dedup-img convert -l before-upgrade vm.qcow2 then.qcow2
  dedup-img convert -n /dev/vg/disk history.qcow2
  dedup-img convert --plain small.qcow2 plain.qcow2
  dedup-img convert --all-snapshots vm.qcow2 small.qcow2
  dedup-img convert -O raw small.qcow2 disk.raw"
)]
pub(crate) struct ConvertArgs {
    /// Format of the source: raw or qcow2; found by its content where not given
    #[arg(short = 'f', long = "source-format", value_name = "FMT", help_heading = "Source")]
    pub(crate) source_format: Option<String>,
    /// Convert an internal snapshot: snapshot.id=ID, snapshot.name=NAME, or either of the two
    #[arg(short = 'l', long = "source-snapshot", value_name = "SNAPSHOT", help_heading = "Source")]
    pub(crate) snapshot: Option<String>,
    /// Convert the disk and all its internal snapshots with it
    #[arg(long, help_heading = "Source")]
    pub(crate) all_snapshots: bool,
    /// Read although another program may have the source open for writing
    #[arg(short = 'U', long, help_heading = "Source")]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) backing: BackingArgs,

    /// Format of the target: qcow2 or raw
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "qcow2", help_heading = "Target")]
    pub(crate) target_format: String,
    /// Image options; '-o help' lists them
    #[arg(short = 'o', long = "target-options", value_name = "KEY=VALUE,...", help_heading = "Target")]
    pub(crate) options: Vec<String>,
    /// Backing file of the target: what it reads in the same way is left to it
    #[arg(short = 'B', long = "backing", value_name = "FILE", help_heading = "Target")]
    pub(crate) backing_file: Option<String>,
    /// Format of the backing file: raw or qcow2
    #[arg(short = 'F', long = "backing-format", value_name = "FMT", help_heading = "Target")]
    pub(crate) backing_format: Option<String>,
    /// Compress what becomes smaller by it; -o compression_type=zlib or zstd
    #[arg(short = 'c', long = "compress", help_heading = "Target")]
    pub(crate) compress: bool,
    /// How hard to compress: 1 to 9 for zlib, 1 to 19 for zstd [default: QEMU's, 6 and 3]
    #[arg(long, value_name = "N", help_heading = "Target", requires = "compress")]
    pub(crate) compression_level: Option<u32>,
    /// What to pool: shared clusters, or all data clusters (golden images and archives) [default: shared]
    #[arg(long, value_name = "WHAT", help_heading = "Target")]
    pub(crate) pin: Option<PinArg>,
    /// Write into an image that exists: only clusters that differ; its snapshots stay as they are
    #[arg(short = 'n', long = "no-create", help_heading = "Target")]
    pub(crate) no_create: bool,

    /// Neither sharing nor a pool: a QCOW2 image as qemu-img makes it
    #[arg(long, help_heading = "Target")]
    pub(crate) plain: bool,

    /// Memory for tables; beyond that, temporary files beside the target
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size, help_heading = "Work")]
    pub(crate) memory: u64,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) qemu: QemuArgs,

    /// The image to read, or several that make one disk, and the image to write
    #[arg(value_name = "SOURCE... TARGET")]
    pub(crate) files: Vec<PathBuf>,
}

/// Which backing files are opened.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Backing files")]
pub(crate) struct BackingArgs {
    /// Refuse an image that needs a backing file
    #[arg(long)]
    pub(crate) no_backing: bool,
    /// Follow links and '..' in their names if the files lie in this directory
    #[arg(long, value_name = "DIR", conflicts_with = "no_backing")]
    pub(crate) backing_dir: Option<PathBuf>,
}

impl BackingArgs {
    pub(crate) fn rule(&self) -> BackingRule {
        match &self.backing_dir {
            _ if self.no_backing => BackingRule::Refused,
            Some(directory) => BackingRule::Inside(directory.clone()),
            None => BackingRule::Plain,
        }
    }
}

/// What the commands have in common that take a while.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    /// Worker threads [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Work")]
    pub(crate) threads: Option<u16>,

    /// Show progress
    #[arg(short, long, help_heading = "Output")]
    pub(crate) progress: bool,
    /// Print nothing but errors
    #[arg(short, long, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// How to print the result
    #[arg(long, value_name = "FORMAT", default_value = "human", help_heading = "Output")]
    pub(crate) output: OutputArg,
}

/// Deduplicate a QCOW2 image in place, with all its snapshots, and give the freed space back.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  dedup-img dedup --dry-run disk.qcow2
  dedup-img dedup -p disk.qcow2
  dedup-img dedup --pin all --output json golden.qcow2"
)]
pub(crate) struct DedupArgs {
    /// Format of the image: qcow2; found by its content where not given
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Say what would be done, and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// What to pool: shared clusters, or all data clusters (golden images and archives) [default: shared]
    #[arg(long, value_name = "WHAT")]
    pub(crate) pin: Option<PinArg>,
    /// Memory for tables; beyond that, temporary files beside the image
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size, help_heading = "Work")]
    pub(crate) memory: u64,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The image
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

/// Give space back: what only the pool holds, leaks, free clusters; and with --compact every hole in the file.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  dedup-img gc disk.qcow2
  dedup-img gc --dry-run --compact disk.qcow2
  dedup-img gc -p --compact disk.qcow2"
)]
pub(crate) struct GcArgs {
    /// Format of the image: qcow2; found by its content where not given
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Move clusters from the end of the file into holes, and cut the file
    #[arg(long)]
    pub(crate) compact: bool,
    /// Remove the deduplication pool; what is shared stays shared
    #[arg(long)]
    pub(crate) drop_pool: bool,
    /// Say what would be done, and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Memory for tables; beyond that, temporary files beside the image
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size, help_heading = "Work")]
    pub(crate) memory: u64,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The image
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

/// Check an image: all that 'qemu-img check' finds, and what it does not look for.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Exit status:
  0   clean
  1   the check could not be done
  2   corruption
  3   leaked clusters, no other harm
  63  the image's format cannot be checked

Examples:
  dedup-img check disk.qcow2
  dedup-img check --data --output json disk.qcow2
  dedup-img check -r all disk.qcow2"
)]
pub(crate) struct CheckArgs {
    /// Format of the image: qcow2; found by its content where not given
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Repair leaked clusters, or everything that can be repaired
    #[arg(short = 'r', long = "repair", value_name = "WHAT")]
    pub(crate) repair: Option<RepairArg>,
    /// Also read every pooled cluster and compare it with its SHA-256
    #[arg(long)]
    pub(crate) data: bool,
    /// Check although another program may have the image open for writing
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The image
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

/// Say what is duplicated in images, what sharing saves, and what it could save at each cluster size.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Exit status:
  0  done, and every gate is met
  1  failed or wrong usage
  4  a gate is not met

Examples:
  dedup-img stats disk.raw
  dedup-img stats --quick disk.qcow2
  dedup-img stats web1.qcow2 web2.qcow2 db.raw
  dedup-img stats -q --max-duplicate 5 golden.qcow2 || echo 'deduplicate it first'"
)]
pub(crate) struct StatsArgs {
    /// Format of the images: raw or qcow2; found by their content where not given
    #[arg(short = 'f', long = "format", value_name = "FMT", help_heading = "Images")]
    pub(crate) format: Option<String>,
    /// Read although another program may have an image open for writing
    #[arg(short = 'U', long, help_heading = "Images")]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) backing: BackingArgs,

    /// Answer from the metadata of QCOW2 images, without reading their data
    #[arg(long, help_heading = "What to count")]
    pub(crate) quick: bool,
    /// Cluster size in which content is counted, 512 to 2M [default: the image's; 4k for raw]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "What to count")]
    pub(crate) cluster_size: Option<u64>,
    /// How many of the most frequent contents to list [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100_000), help_heading = "What to count")]
    pub(crate) top: Option<u32>,
    /// Leave out what other cluster sizes would lead to
    #[arg(long, help_heading = "What to count")]
    pub(crate) no_curve: bool,

    /// Fail where more than this share of the data is still stored more than once
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, help_heading = "Gates")]
    pub(crate) max_duplicate: Option<f64>,
    /// Fail where sharing saves less than this share of the data
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, help_heading = "Gates")]
    pub(crate) min_saved: Option<f64>,

    /// Memory for tables; beyond that, temporary files in $TMPDIR or /var/tmp
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size, help_heading = "Work")]
    pub(crate) memory: u64,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The images
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RepairArg {
    Leaks,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PinArg {
    Shared,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputArg {
    Human,
    Json,
}

impl From<PinArg> for Pin {
    fn from(arg: PinArg) -> Self {
        match arg {
            PinArg::Shared => Self::Shared,
            PinArg::All => Self::All,
        }
    }
}
