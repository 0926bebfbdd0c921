//! What can be typed.
//!
//! The line of an option here is its line in '--help', in the completions, and the first sentence about it in the manual.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use dedup_img::storage::Locking;
use dedup_img::{BackingRule, Pin};

use crate::qemu_options::{QemuArgs, QemuCheckArgs, QemuCreateArgs};
use crate::size::{number, parse_percent, parse_size};

/// Deduplicated QCOW2 images that stock QEMU reads and writes.
#[derive(Debug, Parser)]
#[command(
    name = "dedup-img",
    version,
    max_term_width = 100,
    args_override_self = true,
    override_usage = "dedup-img COMMAND [OPTIONS] FILE...",
    after_help = "\
'dedup-img COMMAND -h' lists the usual options of a command, '--help' all of
them with examples; 'man dedup-img' tells the rest."
)]
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
    Completions(CompletionsArgs),
}

/// What all commands have in common that open images.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LockingArgs {
    /// Lock images; off: at your risk
    #[arg(
        long,
        value_name = "auto|on|off",
        default_value = "auto",
        help_heading = "Work",
        hide_possible_values = true,
        hide_short_help = true
    )]
    pub(crate) locking: LockingArg,
}

/// Create a new, empty image that is ready for deduplication.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img create [OPTIONS] FILE [SIZE]",
    after_help = "\
SIZE is in bytes, or with a suffix k, M, G, T (powers of 1024). With -b it may
be left out: the image is as large as its backing file then.",
    after_long_help = "\
Examples:
  dedup-img create disk.qcow2 20G
  dedup-img create -o cluster_size=4k disk.qcow2 20G
  dedup-img create -b base.qcow2 -F qcow2 overlay.qcow2"
)]
pub(crate) struct CreateArgs {
    /// Format of the image, which is always qcow2
    #[arg(short = 'f', long = "format", value_name = "qcow2", help_heading = "Image", hide_short_help = true)]
    pub(crate) format: Option<String>,
    /// Image options; '-o help' lists them
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", help_heading = "Image")]
    pub(crate) options: Vec<String>,
    /// Backing file; its name is stored as given
    #[arg(short = 'b', long = "backing", value_name = "FILE", help_heading = "Image")]
    pub(crate) backing_file: Option<PathBuf>,
    /// Format of the backing file
    #[arg(short = 'F', long = "backing-format", value_name = "raw|qcow2", help_heading = "Image")]
    pub(crate) backing_format: Option<String>,
    /// Follow '..' and links in names, inside DIR
    #[arg(long, value_name = "DIR", help_heading = "Image", hide_short_help = true)]
    pub(crate) backing_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) locking: LockingArgs,
    /// Print nothing but errors
    #[arg(short, long, help_heading = "Output")]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) qemu: QemuCreateArgs,
    /// The image to create
    #[arg(value_name = "FILE", hide = true)]
    pub(crate) file: Option<PathBuf>,
    /// Virtual size
    #[arg(value_name = "SIZE", allow_negative_numbers = true, hide = true)]
    pub(crate) size: Option<String>,
}

/// Convert an image into a deduplicated QCOW2, a plain one, or raw.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img convert [OPTIONS] SOURCE... TARGET",
    after_long_help = "\
Examples:
  dedup-img convert -f raw disk.raw disk.qcow2
  dedup-img convert -p -o cluster_size=4k vm.qcow2 small.qcow2
  dedup-img convert -O raw small.qcow2 disk.raw
  dedup-img convert -n -f raw /dev/vg/disk history.qcow2"
)]
pub(crate) struct ConvertArgs {
    /// Format [default: found by the content]
    #[arg(short = 'f', long = "source-format", value_name = "raw|qcow2", help_heading = "Source")]
    pub(crate) source_format: Option<String>,
    /// An internal snapshot, by id or name
    #[arg(short = 'l', long = "source-snapshot", value_name = "SNAPSHOT", help_heading = "Source")]
    pub(crate) snapshot: Option<String>,
    /// The disk with all its internal snapshots
    #[arg(long, help_heading = "Source", hide_short_help = true)]
    pub(crate) all_snapshots: bool,
    /// Read though another program may write
    #[arg(short = 'U', long, help_heading = "Source", hide_short_help = true)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) backing: BackingArgs,
    /// Read what is said to be a hole, too
    #[arg(long, help_heading = "Source", hide_short_help = true)]
    pub(crate) ignore_holes: bool,

    /// Format
    #[arg(
        short = 'O',
        long = "target-format",
        value_name = "qcow2|raw",
        default_value = "qcow2",
        help_heading = "Target"
    )]
    pub(crate) target_format: String,
    /// Image options; '-o help' lists them
    #[arg(short = 'o', long = "target-options", value_name = "OPTIONS", help_heading = "Target")]
    pub(crate) options: Vec<String>,
    /// Make an overlay of this backing file
    #[arg(short = 'B', long = "backing", value_name = "FILE", help_heading = "Target")]
    pub(crate) backing_file: Option<PathBuf>,
    /// Its format
    #[arg(short = 'F', long = "backing-format", value_name = "raw|qcow2", help_heading = "Target")]
    pub(crate) backing_format: Option<String>,
    /// Compress what becomes smaller by it
    #[arg(short = 'c', long = "compress", help_heading = "Target")]
    pub(crate) compress: bool,
    /// 1 to 9 (zlib) or 19 (zstd) [default: 6, 3]
    #[arg(
        long,
        value_name = "N",
        value_parser = number::<u32>(1, 19),
        allow_negative_numbers = true,
        help_heading = "Target",
        hide_short_help = true
    )]
    pub(crate) compression_level: Option<u32>,
    /// Which clusters to pool [default: shared]
    #[arg(
        long,
        value_name = "shared|all",
        help_heading = "Target",
        hide_possible_values = true,
        hide_short_help = true
    )]
    pub(crate) pin: Option<PinArg>,
    /// Write what differs into an existing image
    #[arg(short = 'n', long = "no-create", help_heading = "Target")]
    pub(crate) no_create: bool,
    /// Share nothing: an image as of qemu-img
    #[arg(long, help_heading = "Target")]
    pub(crate) plain: bool,

    #[command(flatten)]
    pub(crate) tables: MemoryArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) qemu: QemuArgs,

    /// The image to read, or several that make one disk, and the image to write
    #[arg(value_name = "SOURCE... TARGET", hide = true)]
    pub(crate) files: Vec<PathBuf>,
}

/// Which backing files are opened.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Source")]
pub(crate) struct BackingArgs {
    /// Refuse what needs a backing file
    #[arg(long, hide_short_help = true)]
    pub(crate) no_backing: bool,
    /// Follow '..' and links in names, inside DIR
    #[arg(long, value_name = "DIR", conflicts_with = "no_backing", hide_short_help = true)]
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

/// What the commands have in common that keep tables.
#[derive(Debug, Clone, Args)]
pub(crate) struct MemoryArgs {
    /// Memory for tables
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "1G",
        value_parser = parse_size,
        allow_negative_numbers = true,
        help_heading = "Work",
        hide_short_help = true
    )]
    pub(crate) memory: u64,
}

/// What the commands have in common that take a while.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    /// Worker threads [default: one for each processor]
    #[arg(
        long,
        value_name = "N",
        value_parser = number::<u16>(1, 1024),
        allow_negative_numbers = true,
        help_heading = "Work",
        hide_short_help = true
    )]
    pub(crate) threads: Option<u16>,
    #[command(flatten)]
    pub(crate) locking: LockingArgs,

    /// Show progress
    #[arg(short, long, help_heading = "Output")]
    pub(crate) progress: bool,
    /// Print nothing but errors
    #[arg(short, long, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// How to print the result
    #[arg(
        long,
        value_name = "human|json",
        default_value = "human",
        help_heading = "Output",
        hide_possible_values = true
    )]
    pub(crate) output: OutputArg,
}

/// Deduplicate a QCOW2 image in place, and give the space back.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img dedup [OPTIONS] FILE",
    after_long_help = "\
Examples:
  dedup-img dedup --dry-run disk.qcow2
  dedup-img dedup -p disk.qcow2
  dedup-img dedup --pin all --output json golden.qcow2"
)]
pub(crate) struct DedupArgs {
    /// Format [default: found by the content]
    #[arg(short = 'f', long = "format", value_name = "qcow2", help_heading = "Image", hide_short_help = true)]
    pub(crate) format: Option<String>,
    /// Read what is said to be a hole, too
    #[arg(long, help_heading = "Image", hide_short_help = true)]
    pub(crate) ignore_holes: bool,
    /// Say what would be done, and write nothing
    #[arg(long, help_heading = "What to do")]
    pub(crate) dry_run: bool,
    /// Which clusters to pool [default: shared]
    #[arg(long, value_name = "shared|all", help_heading = "What to do", hide_possible_values = true)]
    pub(crate) pin: Option<PinArg>,
    #[command(flatten)]
    pub(crate) tables: MemoryArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The image
    #[arg(value_name = "FILE", hide = true)]
    pub(crate) file: Option<PathBuf>,
}

/// Give back what a QCOW2 image does not use; compact its file.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img gc [OPTIONS] FILE",
    after_long_help = "\
Examples:
  dedup-img gc disk.qcow2
  dedup-img gc --dry-run --compact disk.qcow2
  dedup-img gc -p --compact disk.qcow2"
)]
pub(crate) struct GcArgs {
    /// Format [default: found by the content]
    #[arg(short = 'f', long = "format", value_name = "qcow2", help_heading = "Image", hide_short_help = true)]
    pub(crate) format: Option<String>,
    /// Say what would be done, and write nothing
    #[arg(long, help_heading = "What to do")]
    pub(crate) dry_run: bool,
    /// Move clusters from the end of the file into holes, and cut it
    #[arg(long, help_heading = "What to do")]
    pub(crate) compact: bool,
    /// Remove the deduplication pool; what is shared stays shared
    #[arg(long, help_heading = "What to do")]
    pub(crate) drop_pool: bool,
    #[command(flatten)]
    pub(crate) tables: MemoryArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The image
    #[arg(value_name = "FILE", hide = true)]
    pub(crate) file: Option<PathBuf>,
}

/// Check a QCOW2 image, more closely than qemu-img; repair it.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img check [OPTIONS] FILE",
    after_long_help = "\
Examples:
  dedup-img check disk.qcow2
  dedup-img check --data --output json disk.qcow2
  dedup-img check -r all disk.qcow2"
)]
pub(crate) struct CheckArgs {
    /// Format [default: found by the content]
    #[arg(short = 'f', long = "format", value_name = "qcow2", help_heading = "Image", hide_short_help = true)]
    pub(crate) format: Option<String>,
    /// Check though another program may write
    #[arg(short = 'U', long, help_heading = "Image", hide_short_help = true)]
    pub(crate) force_share: bool,
    /// Compare every pooled cluster with its SHA-256
    #[arg(long, help_heading = "What to do")]
    pub(crate) data: bool,
    /// Repair leaks, or all that can be repaired
    #[arg(
        short = 'r',
        long = "repair",
        value_name = "leaks|all",
        help_heading = "What to do",
        hide_possible_values = true
    )]
    pub(crate) repair: Option<RepairArg>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) qemu: QemuCheckArgs,

    /// The image
    #[arg(value_name = "FILE", hide = true)]
    pub(crate) file: Option<PathBuf>,
}

/// Say what is duplicated in images, and what sharing saves.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "dedup-img stats [OPTIONS] FILE...",
    after_long_help = "\
Examples:
  dedup-img stats -f raw disk.raw
  dedup-img stats --quick disk.qcow2
  dedup-img stats web1.qcow2 web2.qcow2 db.qcow2
  dedup-img stats -q --max-duplicate 5 golden.qcow2"
)]
pub(crate) struct StatsArgs {
    /// Format [default: found by the content of each]
    #[arg(short = 'f', long = "format", value_name = "raw|qcow2", help_heading = "Source")]
    pub(crate) format: Option<String>,
    /// Read though another program may write
    #[arg(short = 'U', long, help_heading = "Source", hide_short_help = true)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) backing: BackingArgs,

    /// Answer from metadata, without reading data
    #[arg(long, help_heading = "What to count")]
    pub(crate) quick: bool,
    /// Size of a content [default: the image's, or 4k]
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = parse_size,
        allow_negative_numbers = true,
        help_heading = "What to count",
        hide_short_help = true
    )]
    pub(crate) cluster_size: Option<u64>,
    /// Frequent contents to list [default: 10]
    #[arg(
        long,
        value_name = "N",
        value_parser = number::<u32>(0, 100_000),
        allow_negative_numbers = true,
        help_heading = "What to count",
        hide_short_help = true
    )]
    pub(crate) top: Option<u32>,
    /// Leave out the other cluster sizes
    #[arg(long, help_heading = "What to count", hide_short_help = true)]
    pub(crate) no_curve: bool,

    /// Fail if more than this is stored again
    #[arg(
        long,
        value_name = "PERCENT",
        value_parser = parse_percent,
        allow_negative_numbers = true,
        help_heading = "Gates"
    )]
    pub(crate) max_duplicate: Option<f64>,
    /// Fail if sharing saves less than this
    #[arg(
        long,
        value_name = "PERCENT",
        value_parser = parse_percent,
        allow_negative_numbers = true,
        help_heading = "Gates"
    )]
    pub(crate) min_saved: Option<f64>,

    #[command(flatten)]
    pub(crate) tables: MemoryArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The images
    #[arg(value_name = "FILE", hide = true)]
    pub(crate) files: Vec<PathBuf>,
}

/// Print a completion script for a shell.
#[derive(Debug, Args)]
#[command(
    override_usage = "dedup-img completions SHELL",
    after_help = "\
SHELL is bash, zsh or fish. A package installs the scripts; else, for a user:
  bash  ~/.local/share/bash-completion/completions/dedup-img
  zsh   _dedup-img in a directory of $fpath
  fish  ~/.config/fish/completions/dedup-img.fish"
)]
pub(crate) struct CompletionsArgs {
    /// bash, zsh or fish
    #[arg(value_name = "SHELL", hide = true, hide_possible_values = true)]
    pub(crate) shell: ShellArg,
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

/// The values of `locking` of a file in QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LockingArg {
    Auto,
    On,
    Off,
}

impl From<LockingArg> for Locking {
    fn from(arg: LockingArg) -> Self {
        match arg {
            LockingArg::Auto => Self::Auto,
            LockingArg::On => Self::On,
            LockingArg::Off => Self::Off,
        }
    }
}

/// The shells that there are completions for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShellArg {
    Bash,
    Zsh,
    Fish,
}

impl From<PinArg> for Pin {
    fn from(arg: PinArg) -> Self {
        match arg {
            PinArg::Shared => Self::Shared,
            PinArg::All => Self::All,
        }
    }
}
