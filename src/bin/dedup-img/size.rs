//! Sizes as qemu-img reads them.

use std::fmt::{self, Display};
use std::str::FromStr;

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
pub(crate) fn number<N: FromStr + PartialOrd + Display + Copy>(
    least: N,
    most: N,
) -> impl Fn(&str) -> Result<N, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("expects a number from {least} to {most}"))
    }
}

/// Parses a percentage from 0 to 100, perhaps with a percent sign.
pub(crate) fn parse_percent(text: &str) -> Result<f64, &'static str> {
    let number = text.strip_suffix('%').unwrap_or(text).trim_end().parse();
    number.ok().filter(|percent| (0.0..=100.0).contains(percent)).ok_or("expects a percentage from 0 to 100")
}

/// Parses a size: decimal or `0x` hexadecimal bytes, or a decimal number, perhaps with a fraction, and one suffix of `bkMGTPE` in
/// either case, in powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, SizeError> {
    let invalid = || SizeError::Invalid;
    let too_large = || SizeError::TooLarge;
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
            (&digits[..at], Some(1u128 << (10 * power)))
        }
        _ => (digits, None),
    };
    let (whole, fraction) = match number.split_once('.') {
        None => (number, None),
        Some((whole, fraction)) => (whole, Some(fraction)),
    };
    let all_digits = |text: &str| text.bytes().all(|c| c.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction.unwrap_or_default()) {
        return Err(invalid());
    }
    if whole.is_empty() && fraction.is_none_or(str::is_empty) {
        return Err(invalid());
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
    let bytes = whole.checked_mul(scale.unwrap_or(1)).ok_or_else(too_large)?;
    let part = match (fraction, scale) {
        (None, _) => 0,
        // A fraction of a byte makes no sense.
        (Some(_), None | Some(1)) => return Err(invalid()),
        (Some(fraction), Some(scale)) => fraction_of(fraction, scale),
    };
    in_range(bytes.saturating_add(part)).ok_or_else(too_large)
}

/// `0.fraction` of `scale`, rounded to the nearest as the C library rounds.
fn fraction_of(fraction: &str, scale: u128) -> u128 {
    // 18 digits tell apart more than any scale can.
    let digits = &fraction[..fraction.len().min(18)];
    let value: u128 = digits.parse().unwrap_or(0);
    let unit = 10u128.pow(u32::try_from(digits.len()).unwrap_or(18));
    (value * scale * 2 + unit) / (unit * 2)
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
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "k", ".", ".k", "1X", "1.5", "1.5b", "1 k", "-1", "1KB", "0x", "0x1k", "8E", "99999999999999999999"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
