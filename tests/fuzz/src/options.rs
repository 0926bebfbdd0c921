//! Command lines: whatever is typed, an answer or a refusal in words.

use crate::cli::{Cli, Command};
use crate::image_options::{For, ImageOptions};
use crate::size::{parse_percent, parse_size};
use clap::Parser;
use dedup_img::{BackingRule, ClusterSize, Format};
use std::path::Path;

/// Reads the input as words, one a line: as a command line, and each as every kind of value there is.
pub fn options(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let words: Vec<&str> = text.lines().filter(|word| !word.contains('\0')).collect();
    let target = Path::new("x");
    for word in &words {
        if let Ok(size) = parse_size(word) {
            assert!(i64::try_from(size).is_ok(), "{word}: {size}");
            assert_eq!(parse_size(&size.to_string()), Ok(size), "{word}");
            assert_eq!(parse_size(&format!("{size:#x}")), Ok(size), "{word}");
        }
        if let Ok(percent) = parse_percent(word) {
            assert!((0.0..=100.0).contains(&percent), "{word}: {percent}");
        }
        for of in [For::Create, For::Convert] {
            let parsed = ImageOptions::parse(&[(*word).to_owned()], of, target).and_then(|found| found.traits(target));
            if let Err(refusal) = parsed {
                assert!(!refusal.to_string().is_empty(), "{word}");
            }
        }
    }
    match Cli::try_parse_from([&["dedup-img"], &words[..]].concat()) {
        Err(error) => assert!(!error.to_string().is_empty() || error.exit_code() == 0, "{words:?}"),
        Ok(Cli { command: Command::Create(args) }) => {
            drop(ImageOptions::parse(&args.options, For::Create, target));
        }
        Ok(Cli { command: Command::Convert(args) }) => {
            let found = ImageOptions::parse(&args.options, For::Convert, target);
            let size = found.ok().and_then(|found| found.cluster_size).unwrap_or(ClusterSize::Auto);
            assert!(args.backing.backing_dir.is_none() || args.backing.rule() != BackingRule::Plain);
            for format in [Format::Raw, Format::Qcow2] {
                drop(args.qemu.options(format, size, args.no_create));
            }
        }
        Ok(_) => {}
    }
}
