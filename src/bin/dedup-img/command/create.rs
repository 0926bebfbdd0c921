//! `dedup-img create`.

use std::path::Path;
use std::sync::Arc;

use dedup_img::name::shown;
use dedup_img::units::ClusterBits;
use dedup_img::{BackingRule, ClusterSize, CompressionType, CreateOptions, RefcountBits, create};

use crate::cli::CreateArgs;
use crate::failure::Failure;
use crate::image_options::{For, ImageOptions, help, wants_help};
use crate::size::{SizeError, parse_size};
use crate::view;
use crate::view::notice::Told;
use crate::view::progress::Shown;

/// Runs the command.
pub(crate) fn run(args: CreateArgs) -> Result<(), Failure> {
    if wants_help(&args.options) {
        return view::print(&help(For::Create));
    }
    let file = args.file.ok_or_else(|| usage("Expecting image file name"))?;
    args.qemu.refuse()?;
    view::refuse_own_output(&file, args.quiet)?;
    if let Some(format) = args.format.filter(|format| format != "qcow2") {
        let what = "only qcow2 images are created";
        return Err(Failure::new(format_args!("{}: -f {}: {what}", shown(&file), shown(&format))));
    }
    let mut options = ImageOptions::parse(&args.options, For::Create, &file)?;
    options.backing_file = args.backing_file.or(options.backing_file);
    options.backing_format = args.backing_format.or(options.backing_format);
    options.behind = args.backing_dir.map_or(BackingRule::Plain, BackingRule::Inside);
    let traits = options.traits(&file)?;
    if traits.backing.is_some() && options.preallocate_metadata {
        let message = "Backing file and preallocation can only be used at the same time if extended_l2 is on";
        return Err(Failure::new(format_args!("{}: {message}", shown(file))));
    }
    if args.size.is_some() && options.size.is_some() {
        return Err(Failure::new(format_args!("{}: The image size must be specified only once", shown(&file))));
    }
    let size = args.size.as_deref().map(parse_image_size).transpose()?.or(options.size);
    let cluster_bits = match options.cluster_size {
        Some(ClusterSize::Fixed(bits)) => bits,
        _ => ClusterBits::DEFAULT,
    };
    let options = CreateOptions {
        size,
        cluster_bits,
        refcount_bits: options.refcount_bits.unwrap_or(RefcountBits::DEFAULT),
        traits,
        preallocate_metadata: options.preallocate_metadata,
    };
    let size = create(&file, &options, &Told { progress: Arc::new(Shown::when_asked()), quiet: args.quiet })?;
    if args.quiet { Ok(()) } else { view::print(&formatted(&file, &options, size)) }
}

fn parse_image_size(text: &str) -> Result<u64, Failure> {
    parse_size(text).map_err(|error| match error {
        SizeError::TooLarge => Failure::new("Invalid image size specified. Must be between 0 and 9223372036854775807."),
        SizeError::Invalid => Failure::new(format_args!(
            "Invalid image size specified: '{}'. Give bytes, or a suffix k, M, G, T, P or E.",
            shown(text)
        )),
    })
}

fn usage(message: &str) -> Failure {
    Failure::Usage { command: "create", message: message.to_owned() }
}

/// The line that qemu-img prints.
fn formatted(file: &Path, options: &CreateOptions, size: u64) -> String {
    let on_off = |on| if on { "on" } else { "off" };
    let compression = match options.traits.compression {
        CompressionType::Zlib => "zlib",
        CompressionType::Zstd => "zstd",
    };
    let preallocation = if options.preallocate_metadata { " preallocation=metadata" } else { "" };
    let backing = options
        .traits
        .backing
        .as_ref()
        .map_or(String::new(), |b| format!(" backing_file={} backing_fmt={}", shown(&b.name), b.format));
    format!(
        "Formatting '{}', fmt=qcow2 cluster_size={} extended_l2=off{preallocation} compression_type={compression} \
         size={size}{backing} lazy_refcounts={} refcount_bits={}\n",
        shown(file),
        options.cluster_bits.bytes(),
        on_off(options.traits.lazy_refcounts),
        options.refcount_bits.bits(),
    )
}
