//! Names out of images and from command lines, as they are shown to people and put into commands that are offered for pasting.
//! Whoever made an image chose the names in it.

use std::ffi::OsStr;
use std::path::Path;

/// `name` on one line and without what a terminal obeys: control characters are escaped as Rust escapes them (`\n`, `\u{1b}`),
/// everything else is as it is. What is no UTF-8 becomes U+FFFD.
#[must_use]
pub fn shown(name: impl AsRef<OsStr>) -> String {
    let name = name.as_ref().to_string_lossy();
    let mut text = String::with_capacity(name.len());
    for character in name.chars() {
        if character.is_control() {
            text.extend(character.escape_default());
        } else {
            text.push(character);
        }
    }
    text
}

/// `path` as a shell reads it back. What is no text, or would need more than quotes, has no such form.
#[must_use]
pub fn quoted(path: impl AsRef<Path>) -> Option<String> {
    let text = path.as_ref().to_str().filter(|text| !text.is_empty() && !text.contains(char::is_control))?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    // What begins with a dash is no option.
    let text = if text.starts_with('-') { format!("./{text}") } else { text.to_owned() };
    Some(match text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn control_characters_are_escaped_and_nothing_else() {
        let cases: [(&[u8], &str); 5] = [
            (b"a\nb\x1b[31m\x7f", r"a\nb\u{1b}[31m\u{7f}"),
            ("b\u{e4}cker \u{9b}m".as_bytes(), "b\u{e4}cker \\u{9b}m"),
            (br"a\b 'c'", r"a\b 'c'"),
            (b"\xff.raw", "\u{fffd}.raw"),
            (b"", ""),
        ];
        for (name, expected) in cases {
            assert_eq!(shown(OsStr::from_bytes(name)), expected);
        }
    }

    #[test]
    fn names_are_quoted_for_a_shell() {
        let cases = [
            ("/a/b-1.raw", "/a/b-1.raw"),
            ("my disk", "'my disk'"),
            ("it's", r"'it'\''s'"),
            ("-o", "./-o"),
            ("b\u{e4}cker", "'b\u{e4}cker'"),
        ];
        for (name, expected) in cases {
            assert_eq!(quoted(name).as_deref(), Some(expected));
        }
        for name in [OsStr::new("a\x1b[31m"), OsStr::from_bytes(b"\xff"), OsStr::new("")] {
            assert_eq!(quoted(name), None);
        }
    }
}
