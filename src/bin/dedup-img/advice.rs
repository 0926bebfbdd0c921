//! What can be done about an error or a finding, in the words of this program: the one place that knows which option or command of
//! it, or of qemu-img, does what the library advises.

use std::fmt;

use dedup_img::finding::Kind;
use dedup_img::name::quoted;
use dedup_img::stats::{self, Action, Forecast, StatsReport, Why};
use dedup_img::{Advice, Error, Format, Less, Words};

use crate::failure::Failure;
use crate::view::units::bytes;

/// The sentence of `error`.
pub(crate) fn sentence(error: &Error) -> String {
    error.worded(words)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(sentence(&error))
    }
}

/// The sentence of something that has perhaps an advice.
pub(crate) fn advised(what: &dyn fmt::Display, advice: Option<Advice>) -> String {
    match advice.as_ref().map(words) {
        None => what.to_string(),
        Some(Words::Added(words)) => format!("{what}{words}"),
        Some(Words::Instead(words)) => words,
        Some(_) => format!("{what}{}", advice.map(|advice| advice.to_string()).unwrap_or_default()),
    }
}

/// The line of a finding.
pub(crate) fn finding(kind: &Kind) -> String {
    advised(kind, kind.advice())
}

fn words(advice: &Advice) -> Words {
    Words::Added(match advice {
        Advice::SetBackingFormat { name, overlay } => {
            // Only what a shell reads as these two names is offered for pasting.
            let names = quoted(name).zip(quoted(overlay));
            let names = names.map(|(name, overlay)| format!(" -b {name} -F FORMAT {overlay}"));
            format!("; set it with: qemu-img rebase -u{}", names.unwrap_or_default()).into()
        }
        Advice::WidenRefcounts { bits } => {
            format!("; widen it first: qemu-img amend -o refcount_bits={bits} FILE").into()
        }
        Advice::AskRefcounts { bits, or_more } => {
            format!("; use refcount_bits={bits}{}", if *or_more { " or more" } else { "" }).into()
        }
        Advice::SayClusterSize { bytes } => format!("; with snapshots say so: -o cluster_size={bytes}").into(),
        Advice::GiveMemory { least } => {
            return Words::Instead(format!("--memory must be at least {} MiB", least >> 20));
        }
        Advice::MakeRoom { needed, available, less } => {
            return Words::Instead(format!(
                "{} of room are needed on its file system, which has {}; nothing was written; {}",
                bytes(*needed),
                bytes(*available),
                needs_less(*less)
            ));
        }
        other => match fixed(other) {
            Some(words) => words.into(),
            None => return Words::Plain,
        },
    })
}

/// The words of what needs no numbers and no names.
fn fixed(advice: &Advice) -> Option<&'static str> {
    Some(match advice {
        Advice::ReportBug => {
            "\nThis is a bug in dedup-img; nothing was written after it. Please report it with this line."
        }
        Advice::Check => "; see dedup-img check",
        Advice::CheckAndRepair => "; see dedup-img check, and check -r all",
        Advice::Repair => "; see dedup-img check -r all",
        Advice::RepairFirst => "; run dedup-img check -r all on it first",
        Advice::RepairOrSalvage => {
            "; run dedup-img check -r all on it first, or read it with dedup-img convert --salvage"
        }
        Advice::RepairAfter => "; no data is lost, but the image needs 'dedup-img check -r all'",
        Advice::RepairAll => "; use -r all",
        Advice::RestoreOrSalvage => "; restore it from a copy, or convert with --salvage",
        Advice::ReadOnce => ": --salvage with -O raw reads only once",
        Advice::Decrypt => "; decrypt with qemu-img convert first",
        Advice::MergeDataFile => "; merge with qemu-img convert first",
        Advice::ConvertFormat => "; convert it with qemu-img first",
        Advice::SayRaw => ", or say -f raw if its bytes are meant",
        Advice::Identify => "; 'qemu-img info' says what it is",
        Advice::ListSnapshots => "; see qemu-img snapshot -l",
        Advice::RenameSnapshot => "; give it another name, or convert without --all-snapshots",
        Advice::AllowBacking => ", and --no-backing was given",
        Advice::AllowDirectory => "; give the directory that it must lie in with --backing-dir",
        Advice::OtherDirectory => " (--backing-dir)",
        Advice::ChangeBacking => "; see qemu-img rebase -u",
        Advice::JoinBacking => "; join some with qemu-img convert",
        Advice::Resize => "; see qemu-img resize",
        Advice::DisableBitmap => "; disable it with qemu-img bitmap --disable, or remove it",
        Advice::WithoutBitmaps => "; dedup-img convert reads the disk without its bitmaps",
        Advice::WithoutSnapshots => "; dedup-img convert reads the disk without them",
        Advice::Convert => "; use dedup-img convert",
        Advice::ConvertPlain => "; use qemu-img convert",
        Advice::WidenOverflowing => "; use qemu-img amend to increase the refcount entry width",
        Advice::Upgrade => "; upgrade it first: qemu-img amend -o compat=1.1 FILE",
        Advice::Unmark => "; check -r all takes the mark away where nothing wrong is left",
        Advice::RepairDirectory => ", check -r all makes a new one",
        Advice::RemakeDirectory => ", dedup and gc make a new one",
        Advice::RemakePool => "; dedup and gc make a new pool",
        Advice::MakePool => "; dedup-img dedup makes one",
        Advice::PoolShared => {
            ", but after a write qemu-img check may report OFLAG_COPIED errors; dedup pools what is shared"
        }
        Advice::KeepSnapshots => ": qemu-img check -r (4.2 to 10.2) deletes all internal snapshots of such an image",
        Advice::WorkOnCopy => ": qemu-img check -r may damage such an image; work on a copy",
        Advice::LeftAlone => "; dedup-img leaves it alone",
        Advice::CountLess => "; count with a larger --cluster-size and --no-curve",
        Advice::AskLargestClusters => "; give cluster_size=2M",
        Advice::GiveFewerThreads => "; give fewer with --threads",
        Advice::LockNothing => {
            "\nThe file system does not lock files. Where no other program and no guest uses the image, --locking=off \
             goes on without."
        }
        _ => return None,
    })
}

fn needs_less(less: Less) -> &'static str {
    match less {
        Less::CollectFirst => "free some; dedup-img gc gives back what the image does not use and needs less",
        Less::NotCompact => "free some; without --compact less is needed",
        Less::DropPool => "free some; with --drop-pool less is needed",
        _ => "free some",
    }
}

/// Puts this program's words into a report: why dedup would refuse an image, and what to do with it.
pub(crate) fn word(report: &mut StatsReport) {
    for image in &mut report.images {
        if let Some(Forecast::Refused { refused, why }) = image.qcow2.as_mut().and_then(|image| image.dedup.as_mut()) {
            *refused = sentence(why);
        }
    }
    if let Some(advice) = &mut report.recommendation {
        advice.command = command(advice);
        match advice.why {
            Why::NotWorth => advice.reason = "neither dedup nor convert would save 5 % of the space".into(),
            Why::NotWorthInPlace => {
                advice.reason = "dedup would not save 5 % of the space, and convert would lose its snapshots, bitmaps \
                                 or backing file"
                    .into();
            }
            _ => {}
        }
    }
}

/// A shell command for what is recommended, which overwrites no file that exists; `None` where that is nothing, or where a name has no
/// form that all shells read.
fn command(advice: &stats::Advice) -> Option<String> {
    let image = quoted(&advice.image)?;
    match advice.action {
        Action::Dedup => Some(format!("dedup-img dedup {image}")),
        Action::Convert => {
            // Nobody must take what a guest wrote into a raw disk for a format.
            let format = if advice.format == Format::Raw { " -f raw" } else { "" };
            let size = advice.cluster_size_bytes? >> 10;
            let target = quoted(advice.target.as_ref()?)?;
            Some(format!("dedup-img convert{format} -o cluster_size={size}k {image} {target}"))
        }
        _ => None,
    }
}
