//! Which backing files are opened: their names come out of an image, and an image may come from a stranger.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::format::Format;
use crate::error::{Advice, Error, IoContext, Result};
use crate::format::header::{Header, extension};
use crate::name::shown;

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
    let name = Path::new(OsStr::from_bytes(bytes));
    if *rule == BackingRule::Refused {
        let what = format!("it needs the backing file '{}'", shown(name));
        return Err(Error::unsupported(what).advise(Advice::AllowBacking));
    }
    refuse_protocol(bytes)?;
    let format = match header.extension(extension::BACKING_FORMAT) {
        None => {
            let what = format!("it does not say the format of its backing file '{}'", shown(name));
            let (name, overlay) = (name.to_owned(), overlay.to_owned());
            return Err(Error::unsupported(what).advise(Advice::SetBackingFormat { name, overlay }));
        }
        Some(b"raw") => Format::Raw,
        Some(b"qcow2") => Format::Qcow2,
        Some(other) => {
            return Err(Error::unsupported(format!(
                "its backing file '{}' is in {} format (known: raw, qcow2)",
                shown(name),
                shown(OsStr::from_bytes(other))
            )));
        }
    };
    let directory = overlay.parent().unwrap_or(Path::new(""));
    match rule {
        BackingRule::Inside(allowed) => refuse_outside(allowed, name, &directory.join(name))?,
        _ => refuse_detours(directory, name)?,
    }
    Ok((directory.join(name), format))
}

/// Fails where `name` leads up or through a symbolic link. Who may change the directories may do more than the image's author.
fn refuse_detours(directory: &Path, name: &Path) -> Result<()> {
    let mut path = directory.to_owned();
    for component in name.components() {
        if component == Component::ParentDir {
            let what = format!("the name of its backing file, '{}', has a '..'", shown(name));
            return Err(Error::unsupported(what).advise(Advice::AllowDirectory));
        }
        path.push(component);
        // What is not there is found missing where it is opened.
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
            let what = format!("its backing file '{}' lies behind the symbolic link '{}'", shown(name), shown(path));
            return Err(Error::unsupported(what).advise(Advice::AllowDirectory));
        }
    }
    Ok(())
}

/// Fails where `path` does not lie in `allowed`.
fn refuse_outside(allowed: &Path, name: &Path, path: &Path) -> Result<()> {
    let resolved =
        |path: &Path, what: &str| path.canonicalize().at(format_args!("Could not find {what} '{}'", shown(path)));
    let allowed = resolved(allowed, "the directory")?;
    let path = resolved(path, "its backing file")?;
    if !path.starts_with(&allowed) {
        return Err(Error::unsupported(format!(
            "its backing file '{}' is '{}', which does not lie in '{}'",
            shown(name),
            shown(path),
            shown(allowed)
        ))
        .advise(Advice::OtherDirectory));
    }
    Ok(())
}

/// Fails where the name of a backing file is not a plain path: QEMU takes `name:rest` for a protocol and `json:` for a description.
pub(crate) fn refuse_protocol(name: &[u8]) -> Result<()> {
    let first_component = name.split(|&c| c == b'/').next().unwrap_or_default();
    if first_component.contains(&b':') || name.contains(&0) {
        return Err(Error::unsupported(format!(
            "the backing file name '{}' is not a plain path; only plain paths are followed",
            shown(OsStr::from_bytes(name))
        )));
    }
    Ok(())
}
