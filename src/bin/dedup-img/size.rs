//! Sizes as qemu-img reads them.

use std::fmt::{self, Display};

/// Why a text is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// It does not read as one.
    Invalid,
    /// It is 8 EiB or more, or negative.
    TooLarge,
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expects a size below 8E, such as 64k or 1G")
    }
}

impl std::error::Error for SizeError {}

/// A parser of numbers from `least` to `most`.
pub(crate) fn number<N: TryFrom<u64> + PartialOrd + Display + Copy>(
    least: N,
    most: N,
) -> impl Fn(&str) -> Result<N, String> + Clone {
    move |text| {
        let number = parse_integer(text).ok().and_then(|number| N::try_from(number).ok());
        let number = number.filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("expects a number from {least} to {most}"))
    }
}

/// Parses a percentage from 0 to 100, perhaps with a percent sign.
pub(crate) fn parse_percent(text: &str) -> Result<f64, &'static str> {
    let number = text.strip_suffix('%').unwrap_or(text).trim_end().parse();
    number.ok().filter(|percent| (0.0..=100.0).contains(percent)).ok_or("expects a percentage from 0 to 100")
}

/// The text without the white space that the C library skips before a number.
fn without_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r'])
}

/// Parses an integer as `strtol` reads it with any base: decimal, `0x` hexadecimal, `0` octal.
pub(crate) fn parse_integer(text: &str) -> Result<u64, SizeError> {
    let text = without_space(text);
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(SizeError::Invalid);
    }
    if text.starts_with('-') {
        return Err(SizeError::TooLarge);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::TooLarge)
}

/// Parses a size: decimal or `0x` hexadecimal bytes, or a decimal number, perhaps with a fraction, and one suffix of `bkMGTPE` in
/// either case, in powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, SizeError> {
    let invalid = || SizeError::Invalid;
    let too_large = || SizeError::TooLarge;
    let text = without_space(text);
    if text.strip_prefix('-').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|c| c.is_ascii_digit())) {
        return Err(too_large());
    }
    let digits = text.strip_prefix('+').unwrap_or(text);
    if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        let bytes = u64::from_str_radix(hex, 16).map_err(|_| too_large())?;
        return in_range(bytes.into()).ok_or_else(too_large);
    }
    let (number, scale) = match digits.char_indices().next_back() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let power = "bkmgtpe".find(suffix.to_ascii_lowercase()).ok_or_else(invalid)?;
            (&digits[..at], 1u64 << (10 * power))
        }
        _ => (digits, 1),
    };
    let (whole, fraction) = match number.split_once('.') {
        None => (number, ""),
        Some((whole, fraction)) => (whole, fraction),
    };
    let all_digits = |text: &str| text.bytes().all(|c| c.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || whole.is_empty() && fraction.is_empty() {
        return Err(invalid());
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
    let bytes = whole.checked_mul(scale.into()).ok_or_else(too_large)?;
    let part = fraction_of(fraction, scale).ok_or_else(invalid)?;
    in_range(bytes.saturating_add(part.into())).ok_or_else(too_large)
}

/// `0.digits` of `scale`, with the arithmetic and the rounding of QEMU; `None` for a fraction of a byte, which makes no sense.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "QEMU reckons in floating point; the scale is a power of two, and the result is between 0 and that"
)]
fn fraction_of(digits: &str, scale: u64) -> Option<u64> {
    let fraction: f64 = format!("0.{digits}0").parse().ok()?;
    if scale == 1 {
        return [0.0, 1.0].contains(&fraction).then_some(fraction as u64);
    }
    Some((fraction * scale as f64 + 0.5) as u64)
}

fn in_range(bytes: u128) -> Option<u64> {
    u64::try_from(bytes).ok().filter(|&bytes| i64::try_from(bytes).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_qemu_img_reads_them() {
        let cases = [
            ("0", 0),
            ("513", 513),
            ("0x1F", 31),
            ("1k", 1024),
            ("1.5M", 3 << 19),
            (".5M", 1 << 19),
            ("2.G", 2 << 30),
            ("7E", 7 << 60),
            ("+1b", 1),
            ("1024.0", 1024),
            (" 1024.b", 1024),
            (".0", 0),
            ("0.99999999999999999999", 1),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            " ",
            "k",
            ".",
            ".k",
            "1X",
            "1.5",
            "1.5b",
            "1 k",
            "1k ",
            "1e3",
            "1.+5k",
            "-1",
            "1KB",
            "0x",
            "0x1k",
            "8E",
            "99999999999999999999",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers_read_as_strtol_reads_them() {
        for (text, due) in [("1", 1), ("16", 16), ("0x10", 16), ("010", 8), ("+7", 7), ("0", 0), (" 4", 4)] {
            assert_eq!(parse_integer(text), Ok(due), "{text}");
        }
        for text in ["", "x", "1k", "0x", "08", "--1", "0x1g", "4 "] {
            assert_eq!(parse_integer(text), Err(SizeError::Invalid), "{text}");
        }
        for text in ["-1", "99999999999999999999"] {
            assert_eq!(parse_integer(text), Err(SizeError::TooLarge), "{text}");
        }
    }
}
