//! Which backing files are opened: their names come out of an image, and an image may come from a stranger.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::Format;
use crate::error::{Error, Result};
use crate::format::header::{Header, extension};

/// Which backing files are opened. Whatever the rule, only a plain path is followed, and only in a format that is declared,
/// because content must not decide as what it is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum BackingRule {
    /// Those whose name has no `..` and leads through no symbolic link.
    #[default]
    Plain,
    /// Those that lie in this directory when all links and `..` are resolved.
    Inside(PathBuf),
    /// None: an image that needs one is refused.
    Refused,
}

/// The backing file that `header` names and its format, if it may be followed from the image at `overlay`.
pub(super) fn backing_file(header: &Header, overlay: &Path, rule: &BackingRule) -> Result<(PathBuf, Format)> {
    let bytes = header.backing_name.as_deref().unwrap_or_default();
    let shown = String::from_utf8_lossy(bytes).escape_default().to_string();
    if *rule == BackingRule::Refused {
        return Err(Error::unsupported(format!("it needs the backing file '{shown}', and --no-backing was given")));
    }
    refuse_protocol(bytes)?;
    let format = match header.extension(extension::BACKING_FORMAT) {
        None => {
            return Err(Error::unsupported(format!(
                "it does not say the format of its backing file '{shown}'; \
                 set it with: qemu-img rebase -u -b '{shown}' -F FORMAT '{}'",
                overlay.display()
            )));
        }
        Some(b"raw") => Format::Raw,
        Some(b"qcow2") => Format::Qcow2,
        Some(other) => {
            let other = String::from_utf8_lossy(other).escape_default().to_string();
            return Err(Error::unsupported(format!(
                "its backing file '{shown}' is in {other} format (known: raw, qcow2)"
            )));
        }
    };
    let name = Path::new(OsStr::from_bytes(bytes));
    let directory = overlay.parent().unwrap_or(Path::new(""));
    match rule {
        BackingRule::Inside(allowed) => refuse_outside(allowed, &directory.join(name), &shown)?,
        _ => refuse_detours(directory, name, &shown)?,
    }
    Ok((directory.join(name), format))
}

/// Fails where `name` leads up or through a symbolic link. Who may change the directories may do more than the image's author.
fn refuse_detours(directory: &Path, name: &Path, shown: &str) -> Result<()> {
    let advice = "give the directory that it must lie in with --backing-dir";
    let mut path = directory.to_owned();
    for component in name.components() {
        if component == Component::ParentDir {
            let what = format!("the name of its backing file, '{shown}', has a '..'; {advice}");
            return Err(Error::unsupported(what));
        }
        path.push(component);
        // What is not there is found missing where it is opened.
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
            let what =
                format!("its backing file '{shown}' lies behind the symbolic link '{}'; {advice}", path.display());
            return Err(Error::unsupported(what));
        }
    }
    Ok(())
}

/// Fails where `path` does not lie in `allowed`.
fn refuse_outside(allowed: &Path, path: &Path, shown: &str) -> Result<()> {
    let resolved = |path: &Path, what: &str| {
        path.canonicalize().map_err(|e| Error::io(format_args!("Could not find {what} '{}'", path.display()), e))
    };
    let allowed = resolved(allowed, "the directory")?;
    let path = resolved(path, "its backing file")?;
    if !path.starts_with(&allowed) {
        return Err(Error::unsupported(format!(
            "its backing file '{shown}' is '{}', which does not lie in '{}' (--backing-dir)",
            path.display(),
            allowed.display()
        )));
    }
    Ok(())
}

/// Fails where the name of a backing file is not a plain path: QEMU takes `name:rest` for a protocol and `json:` for a description.
pub(crate) fn refuse_protocol(name: &[u8]) -> Result<()> {
    let first_component = name.split(|&c| c == b'/').next().unwrap_or_default();
    if first_component.contains(&b':') || name.contains(&0) {
        let shown = String::from_utf8_lossy(name).escape_default().to_string();
        return Err(Error::unsupported(format!(
            "the backing file name '{shown}' is not a plain path; only plain paths are followed"
        )));
    }
    Ok(())
}
