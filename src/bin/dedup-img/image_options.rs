//! `-o key=value,...`, with qemu-img's names, rules and messages.

use std::path::{Path, PathBuf};

use dedup_img::name::shown;
use dedup_img::units::ClusterBits;
use dedup_img::{Backing, BackingRule, ClusterSize, CompressionType, RefcountBits, Traits};

use crate::failure::Failure;
use crate::size::{SizeError, parse_integer, parse_size};

/// What `-o` said; `None` where it said nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct ImageOptions {
    pub(crate) backing_file: Option<PathBuf>,
    pub(crate) backing_format: Option<String>,
    pub(crate) behind: BackingRule,
    /// Whether what is said to be a hole of that file is read.
    pub(crate) ignore_holes: bool,
    pub(crate) cluster_size: Option<ClusterSize>,
    pub(crate) compression: CompressionType,
    pub(crate) lazy_refcounts: bool,
    pub(crate) preallocate_metadata: bool,
    pub(crate) refcount_bits: Option<RefcountBits>,
    pub(crate) size: Option<u64>,
}

/// Which command the options are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    Create,
    Convert,
}

/// Whether `-o help` was given.
pub(crate) fn wants_help(options: &[String]) -> bool {
    let asks = |list: &String| split(list).is_some_and(|list| list.iter().any(is_help));
    options.iter().any(asks)
}

/// Whether that is one of the words that ask for help; with a value it is a key that does not exist.
fn is_help((key, value): &(String, Option<String>)) -> bool {
    value.is_none() && (key == "help" || key == "?")
}

/// The text of `-o help`.
pub(crate) fn help(of: For) -> String {
    let mut text = String::from("Supported qcow2 options:\n");
    let mut row = |key: &str, value: &str, about: &str| {
        text.push_str(&format!("  {:<24}- {about}\n", format!("{key}=<{value}>")));
    };
    row("backing_file", "str", "File name of a base image");
    row("backing_fmt", "str", "Image format of the base image: raw or qcow2");
    match of {
        For::Create => row("cluster_size", "size", "Cluster size: a power of two from 512 to 2M [64k]"),
        For::Convert => row("cluster_size", "size", "Cluster size: a power of two from 512 to 2M, or auto [auto]"),
    }
    row("compat", "str", "Compatibility level: v3 or 1.1, which the pool needs");
    row("compression_type", "str", "Compression of clusters that QEMU compresses: zlib or zstd [zlib]");
    row("extended_l2", "on/off", "Extended L2 tables: off");
    row("lazy_refcounts", "on/off", "Let QEMU postpone refcount updates [off]");
    match of {
        For::Create => row("preallocation", "str", "Preallocation: off or metadata [off]"),
        For::Convert => row("preallocation", "str", "Preallocation: off"),
    }
    row("refcount_bits", "num", "Width of a reference count in bits: 4 to 64 [32]");
    if of == For::Create {
        row("size", "size", "Virtual disk size");
    }
    text
}

impl ImageOptions {
    /// Parses the lists of all `-o` for the image `target`.
    pub(crate) fn parse(lists: &[String], of: For, target: &Path) -> Result<Self, Failure> {
        let mut options = Self::default();
        for list in lists {
            let split = split(list);
            let split = split.ok_or_else(|| Failure::new(format_args!("Invalid option list: {}", shown(list))))?;
            for (key, value) in split {
                options
                    .set(&key, value.as_deref(), of)
                    .map_err(|message| Failure::new(format_args!("{}: {}", shown(target), shown(message))))?;
            }
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: Option<&str>, of: For) -> Result<(), String> {
        // Without a value it is on, and with 'no' before its name off.
        let (key, value) = match (key.strip_prefix("no"), value) {
            (Some(key @ ("lazy_refcounts" | "extended_l2")), None) => (key, Some("off")),
            _ => (key, value),
        };
        let text = || value.ok_or_else(|| format!("Expected '=' after parameter '{key}'"));
        let switch = || match value {
            None | Some("on" | "yes" | "true" | "y") => Ok(true),
            Some("off" | "no" | "false" | "n") => Ok(false),
            Some(_) => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        };
        let refused = |what: &str| Err(format!("Parameter '{key}': {what}"));
        match key {
            "cluster_size" if of == For::Convert && value == Some("auto") => {
                self.cluster_size = Some(ClusterSize::Auto);
            }
            "cluster_size" => {
                let bytes = size(key, text()?)?;
                let bits = ClusterBits::from_bytes(bytes)
                    .ok_or("Cluster size must be a power of two between 512 and 2048k")?;
                self.cluster_size = Some(ClusterSize::Fixed(bits));
            }
            "refcount_bits" => {
                let bits = match parse_integer(text()?) {
                    Ok(bits) => u32::try_from(bits).ok().and_then(RefcountBits::new),
                    Err(SizeError::TooLarge) => None,
                    Err(SizeError::Invalid) => return Err(format!("Parameter '{key}' expects a number")),
                };
                let bits = bits.ok_or("Refcount width must be a power of two and may not exceed 64 bits")?;
                self.refcount_bits = Some(bits);
            }
            "compat" => match text()? {
                "1.1" | "v3" => {}
                "0.10" | "v2" => return refused("only version 3 (compat=1.1) is written"),
                other => return Err(format!("Parameter 'version' does not accept value '{other}' (known: 1.1, v3)")),
            },
            "compression_type" => {
                self.compression = match text()? {
                    "zlib" => CompressionType::Zlib,
                    "zstd" => CompressionType::Zstd,
                    other => {
                        return Err(format!(
                            "Parameter 'compression-type' does not accept value '{other}' (known: zlib, zstd)"
                        ));
                    }
                };
            }
            "lazy_refcounts" => self.lazy_refcounts = switch()?,
            "extended_l2" => {
                if switch()? {
                    return refused("extended L2 entries cannot be written yet; leave it off");
                }
            }
            "preallocation" => match (text()?, of) {
                ("off", _) => self.preallocate_metadata = false,
                ("metadata", For::Create) => self.preallocate_metadata = true,
                ("metadata" | "falloc" | "full", For::Convert) => {
                    return refused("preallocation would store what deduplication leaves out; leave it off");
                }
                ("falloc" | "full", For::Create) => return refused("only off and metadata are supported"),
                (other, _) => {
                    let known = if of == For::Create { "off, metadata" } else { "off" };
                    return Err(format!("Parameter 'preallocation' does not accept value '{other}' (known: {known})"));
                }
            },
            "size" if of == For::Create => {
                self.size = Some(size(key, text()?)?);
            }
            "backing_file" => self.backing_file = Some(text()?.into()),
            "backing_fmt" => self.backing_format = Some(text()?.to_owned()),
            "size" => return refused("convert takes the source's size"),
            "data_file" | "data_file_raw" => return refused("deduplication needs the data in the image itself"),
            "encryption" => return refused("encrypted images are not written"),
            key if key.starts_with("encrypt.") => return refused("encrypted images are not written"),
            _ => return Err(format!("Invalid parameter '{key}' ({})", nearest(key))),
        }
        Ok(())
    }

    /// The header fields of the image `target`.
    pub(crate) fn traits(&self, target: &Path) -> Result<Traits, Failure> {
        let said = |message: &str| Failure::new(format_args!("{}: {}", shown(target), message));
        let backing = match (&self.backing_file, &self.backing_format) {
            (None, None) => None,
            (None, Some(_)) => return Err(said("Backing format cannot be used without backing file")),
            (Some(_), None) => return Err(said("Backing file specified without backing format")),
            (Some(name), Some(format)) => {
                let format = format.parse().map_err(|e| said(&format!("{e}\nCould not open backing image.")))?;
                Some(Backing {
                    name: name.clone(),
                    format,
                    behind: self.behind.clone(),
                    ignore_holes: self.ignore_holes,
                })
            }
        };
        Ok(Traits { compression: self.compression, lazy_refcounts: self.lazy_refcounts, backing })
    }
}

/// What is meant by a key that is none of ours: the nearest one, if it is as near as clap wants it to be for an option.
fn nearest(key: &str) -> String {
    const KEYS: [&str; 9] = [
        "backing_file",
        "backing_fmt",
        "cluster_size",
        "compat",
        "compression_type",
        "extended_l2",
        "lazy_refcounts",
        "preallocation",
        "refcount_bits",
    ];
    let likeness = |known: &str| strsim::jaro(key, known);
    let best = KEYS.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).filter(|best| likeness(best) > 0.7);
    best.map_or_else(|| "'-o help' lists them".to_owned(), |best| format!("a similar parameter exists: '{best}'"))
}

/// A size, or qemu-img's words for what is wrong with it.
fn size(key: &str, value: &str) -> Result<u64, String> {
    parse_size(value).map_err(|error| match error {
        SizeError::Invalid => format!(
            "Parameter '{key}' expects a non-negative number below 2^64, perhaps with a suffix k, M, G, T, P or E"
        ),
        SizeError::TooLarge => format!("Value '{value}' is out of range for parameter '{key}'"),
    })
}

/// Splits `key=value,key=value`; a doubled comma stands for one in a value, as in QEMU. `None` where nothing is before, between or
/// behind commas.
fn split(list: &str) -> Option<Vec<(String, Option<String>)>> {
    let mut options = vec![String::new()];
    let mut characters = list.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, options.last_mut()) {
            (',', Some(last)) if characters.peek() == Some(&',') => {
                characters.next();
                last.push(',');
            }
            (',', _) => options.push(String::new()),
            (other, Some(last)) => last.push(other),
            (_, None) => {}
        }
    }
    let options = options.into_iter().map(|option| match option.split_once('=') {
        _ if option.is_empty() => None,
        Some((key, value)) => Some((key.to_owned(), Some(value.to_owned()))),
        None => Some((option, None)),
    });
    options.collect::<Option<_>>().filter(|_| !list.starts_with(','))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubled_comma_is_part_of_a_value() {
        let expected = [("backing_file".to_owned(), Some("a,b".to_owned())), ("lazy_refcounts".to_owned(), None)];
        assert_eq!(split("backing_file=a,,b,lazy_refcounts").unwrap(), expected);
        for list in ["", ",", ",,", ",a=1", "a=1,", ",,a=1"] {
            assert_eq!(split(list), None, "{list}");
        }
        assert_eq!(split("a=1,,").unwrap(), [("a".to_owned(), Some("1,".to_owned()))]);
    }

    #[test]
    fn what_one_command_cannot_do_is_said_by_name() {
        let parse = |list: &str, of| ImageOptions::parse(&[list.to_owned()], of, Path::new("x"));
        assert!(parse("cluster_size=auto", For::Convert).is_ok());
        for (list, of, message) in [
            (
                "cluster_size=auto",
                For::Create,
                "x: Parameter 'cluster_size' expects a non-negative number below 2^64, ",
            ),
            ("cluster_size=3000", For::Create, "x: Cluster size must be a power of two between 512 and 2048k"),
            ("refcount_bits=3", For::Create, "x: Refcount width must be a power of two and may not exceed 64 bits"),
            ("foo=1", For::Create, "x: Invalid parameter 'foo' ('-o help' lists them)"),
            (
                "clustersize=4k",
                For::Create,
                "x: Invalid parameter 'clustersize' (a similar parameter exists: 'cluster_size')",
            ),
            ("lazy_refcounts=maybe", For::Create, "x: Parameter 'lazy_refcounts' expects 'on' or 'off'"),
            ("preallocation=metadata", For::Convert, "x: Parameter 'preallocation': preallocation would store"),
        ] {
            let error = parse(list, of).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
