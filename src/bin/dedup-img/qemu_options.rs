//! The options of `qemu-img convert`, `create` and `check` that are neither about the formats nor about which images: taken where
//! they mean something here, refused by name where they do not, so that none of a script's options does nothing without a word.

use std::num::NonZeroU64;

use clap::Args;
use dedup_img::name::shown;
use dedup_img::units::ClusterBits;
use dedup_img::{ClusterSize, Format, RawOptions};

use crate::failure::Failure;
use crate::size::{SizeError, parse_integer, parse_size};

/// The longest run of zeros that `-S` may ask for.
const MAX_SPARSE: u64 = 16 << 20;

/// Those of `convert`, as typed.
#[derive(Debug, Args)]
pub(crate) struct QemuArgs {
    /// Cache mode; none: not in the page cache
    #[arg(short = 'T', long, value_name = "CACHE", help_heading = "Source", hide_short_help = true)]
    pub(crate) source_cache: Option<String>,
    /// Take zeros for what cannot be read
    #[arg(long, help_heading = "Source", hide_short_help = true)]
    pub(crate) salvage: bool,
    /// Cache mode; unsafe: it is not flushed
    #[arg(short = 't', long, value_name = "CACHE", help_heading = "Target", hide_short_help = true)]
    pub(crate) target_cache: Option<String>,
    /// Zeros that are a hole in raw [default: 4k]
    #[arg(
        short = 'S',
        long,
        value_name = "SIZE",
        allow_negative_numbers = true,
        help_heading = "Target",
        hide_short_help = true
    )]
    pub(crate) sparse_size: Option<String>,
    /// Bytes to write in a second, at most
    #[arg(
        short = 'r',
        long,
        value_name = "RATE",
        allow_negative_numbers = true,
        help_heading = "Work",
        hide_short_help = true
    )]
    pub(crate) rate: Option<String>,
    /// The same as --threads, from 1 to 16
    #[arg(
        short = 'm',
        long,
        value_name = "N",
        allow_negative_numbers = true,
        help_heading = "Work",
        hide_short_help = true
    )]
    pub(crate) parallel: Option<String>,
    /// Write out of order, which is always done
    #[arg(short = 'W', long, help_heading = "Work", hide_short_help = true)]
    pub(crate) oob_writes: bool,

    /// With -n: it is all zeros; not relied on
    #[arg(long, help_heading = "Target", hide_short_help = true)]
    target_is_zero: bool,

    #[arg(short = 'C', long, hide = true)]
    copy_range_offloading: bool,
    #[arg(long, hide = true)]
    bitmaps: bool,
    #[arg(long, hide = true)]
    skip_broken_bitmaps: bool,
    #[arg(long, visible_alias = "source-image-opts", hide = true)]
    image_opts: bool,
    #[arg(long, hide = true)]
    target_image_opts: bool,
    #[arg(long, value_name = "OBJDEF", hide = true)]
    object: Vec<String>,
}

/// Those of `create`.
#[derive(Debug, Args)]
pub(crate) struct QemuCreateArgs {
    #[arg(short = 'u', long, hide = true)]
    backing_unsafe: bool,
    #[arg(long, value_name = "OBJDEF", hide = true)]
    object: Vec<String>,
}

impl QemuCreateArgs {
    /// Refuses what cannot mean anything here.
    pub(crate) fn refuse(&self) -> Result<(), Failure> {
        refuse_first(&[
            (
                self.backing_unsafe,
                "-u: the backing file is opened in any case, so that the image can be read; leave it out",
            ),
            (!self.object.is_empty(), NO_OBJECTS),
        ])
    }
}

/// Those of `check`.
#[derive(Debug, Args)]
pub(crate) struct QemuCheckArgs {
    /// Cache mode; none: not in the page cache
    #[arg(short = 'T', long, value_name = "CACHE", help_heading = "Image", hide_short_help = true)]
    cache: Option<String>,
    #[arg(long, hide = true)]
    image_opts: bool,
    #[arg(long, value_name = "OBJDEF", hide = true)]
    object: Vec<String>,
}

impl QemuCheckArgs {
    /// Whether the image stays out of the page cache.
    pub(crate) fn uncached(&self) -> Result<bool, Failure> {
        refuse_first(&[
            (self.image_opts, "--image-opts: only files and block devices are checked; give the name"),
            (!self.object.is_empty(), NO_OBJECTS),
        ])?;
        let (_, uncached) = cache_mode(self.cache.as_deref())
            .map_err(|mode| Failure::new(format_args!("Invalid source cache option: {}", shown(mode))))?;
        Ok(uncached)
    }
}

const NO_OBJECTS: &str = "--object: nothing here uses QEMU objects; encrypted images are not supported";

/// Fails with the first message whose option was given.
fn refuse_first(refusals: &[(bool, &str)]) -> Result<(), Failure> {
    match refusals.iter().find(|(refused, _)| *refused) {
        Some((_, message)) => Err(Failure::new(message)),
        None => Ok(()),
    }
}

/// What they mean.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QemuOptions {
    pub(crate) sparse: u64,
    pub(crate) threads: Option<u16>,
    pub(crate) rate: Option<NonZeroU64>,
    pub(crate) durable: bool,
    /// Whether the target stays out of the page cache.
    pub(crate) uncached: bool,
    /// Whether the sources are read past the page cache.
    pub(crate) source_uncached: bool,
}

impl QemuArgs {
    /// What was asked for, of a target of `format` with clusters of `cluster_size`, which is there already with `no_create`.
    pub(crate) fn options(
        &self,
        format: Format,
        cluster_size: ClusterSize,
        no_create: bool,
    ) -> Result<QemuOptions, Failure> {
        self.refuse(no_create)?;
        let sparse = self.sparse_size.as_deref().map(sparse_size).transpose()?;
        if let (Some(sparse), Format::Qcow2) = (sparse, format) {
            refuse_sparse(sparse, cluster_size)?;
        }
        let (durable, uncached) = cache_mode(self.target_cache.as_deref())
            .map_err(|mode| Failure::new(format_args!("Invalid cache option: {}", shown(mode))))?;
        let (_, source_uncached) = cache_mode(self.source_cache.as_deref())
            .map_err(|mode| Failure::new(format_args!("Invalid source cache option: {}", shown(mode))))?;
        let rate = self.rate.as_deref().map(|text| number("rate limit", text, i64::MAX.cast_unsigned(), parse_size));
        let threads = self.parallel.as_deref().map(threads).transpose()?;
        let sparse = sparse.unwrap_or(RawOptions::DEFAULT_SPARSE);
        let rate = rate.transpose()?.and_then(NonZeroU64::new);
        Ok(QemuOptions { sparse, threads, rate, durable, uncached, source_uncached })
    }

    /// Refuses what cannot mean anything here, after what qemu-img refuses too.
    fn refuse(&self, no_create: bool) -> Result<(), Failure> {
        refuse_first(&[
            (self.copy_range_offloading && self.sparse_size.is_some(), "Cannot enable copy offloading when -S is used"),
            (self.copy_range_offloading && self.salvage, "Cannot use copy offloading in salvaging mode"),
            (
                self.copy_range_offloading,
                "-C: copy offloading moves bytes unseen, and here they are all compared; leave it out",
            ),
            (self.target_is_zero && !no_create, "--target-is-zero requires use of -n flag"),
            (self.skip_broken_bitmaps && !self.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (self.bitmaps, "--bitmaps: convert carries no bitmaps over; 'dedup-img dedup' keeps them, in place"),
            (
                self.image_opts,
                "--image-opts: only files and block devices are read; give the name, and the format with -f",
            ),
            (
                self.target_image_opts,
                "--target-image-opts: only files and block devices are written; give the name, and the format with -O",
            ),
            (!self.object.is_empty(), NO_OBJECTS),
        ])
    }
}

/// Of QEMU's cache mode whether the target is flushed, and whether the page cache is passed by; or the mode, if it is none.
fn cache_mode(mode: Option<&str>) -> Result<(bool, bool), &str> {
    match mode {
        None | Some("writeback" | "writethrough") => Ok((true, false)),
        Some("none" | "off" | "directsync") => Ok((true, true)),
        Some("unsafe") => Ok((false, false)),
        Some(other) => Err(other),
    }
}

fn sparse_size(text: &str) -> Result<u64, Failure> {
    let what = "buffer size for sparse output";
    let size = number(what, text, i64::MAX.cast_unsigned(), parse_size)?;
    if size.is_multiple_of(512) && size <= MAX_SPARSE {
        return Ok(size);
    }
    Err(Failure::new(format_args!(
        "Invalid {what} specified. Valid sizes are multiples of 512 up to {MAX_SPARSE}. \
         Select 0 to disable sparse detection (fully allocates output)."
    )))
}

/// Whole clusters of zeros are never stored in a QCOW2 target. Where that is what `-S` asks for it is taken.
fn refuse_sparse(sparse: u64, cluster_size: ClusterSize) -> Result<(), Failure> {
    let cluster = match cluster_size {
        ClusterSize::Auto => 4096,
        ClusterSize::Usual => ClusterBits::DEFAULT.bytes(),
        ClusterSize::Fixed(bits) => bits.bytes(),
    };
    match sparse {
        0 => Err(Failure::new("-S 0: a QCOW2 target stores no zeros, so that it cannot be fully allocated")),
        _ if sparse > cluster => Err(Failure::new(format_args!(
            "-S {sparse}: a QCOW2 target stores no cluster of zeros, here of {cluster} bytes; leave it out"
        ))),
        _ => Ok(()),
    }
}

fn threads(text: &str) -> Result<u16, Failure> {
    let what = "number of coroutines";
    let threads = number(what, text, 16, parse_integer)?;
    let threads = u16::try_from(threads).ok().filter(|&threads| threads > 0);
    threads.ok_or_else(|| Failure::new(format_args!("Invalid {what} specified. Must be between 1 and 16.")))
}

/// A number of at most `limit`, or qemu-img's words for what is wrong with it.
fn number(what: &str, text: &str, limit: u64, parse: impl Fn(&str) -> Result<u64, SizeError>) -> Result<u64, Failure> {
    let least = u64::from(limit == 16);
    match parse(text) {
        Ok(number) if number <= limit => Ok(number),
        Err(SizeError::Invalid) => Err(Failure::new(format_args!("Invalid {what} specified: '{}'.", shown(text)))),
        _ => Err(Failure::new(format_args!("Invalid {what} specified. Must be between {least} and {limit}."))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_mode_says_whether_to_flush_and_whether_to_cache() {
        assert_eq!(cache_mode(Some("unsafe")), Ok((false, false)));
        assert_eq!(cache_mode(Some("none")), Ok((true, true)));
        assert_eq!(cache_mode(Some("writeback")), cache_mode(None));
        assert_eq!(cache_mode(Some("")), Err(""));
    }
}
