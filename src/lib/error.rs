//! The one error type of the library.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::panic::Location;
use std::path::Path;

use crate::name::shown;

/// What kind of failure an [`Error`] is, for callers that react to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused a read, a write or another call.
    Io,
    /// The file is not in the format it was said or expected to have.
    Format,
    /// The image is well formed but uses something that is refused by name.
    Unsupported,
    /// The image contradicts the format.
    Corrupt,
    /// Another program uses the image.
    Locked,
    /// An option or argument makes no sense.
    Invalid,
    /// A documented limit was exceeded.
    Limit,
    /// The source changed while it was read.
    Changed,
    /// The file system has less room than an operation needs beside what the image occupies, in bytes. Nothing was written.
    NoRoom {
        /// What is needed.
        needed: u64,
        /// What is there.
        available: u64,
    },
    /// The caller asked to stop.
    Cancelled,
    /// The library contradicts itself: what cannot happen has happened. Nothing was written after it.
    Internal,
}

/// What an operation that was asked to stop has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Left {
    /// What it works on is as it was, and no new file has appeared.
    Untouched,
    /// The image is clean, and each of its clusters is as it was or as it should be.
    Clean,
    /// Some of a repair is written; `check -r all` goes on.
    HalfMended,
    /// The repair is written, but not checked.
    Unchecked,
    /// The target, which cannot be replaced as a whole, has lost what it held and holds no image.
    Incomplete,
}

/// A failure: what happened, and to what. [`fmt::Display`] gives one sentence in lower case, without a full stop.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    left: Left,
}

/// The result of every fallible library function.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that reads as `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None, left: Left::Untouched }
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// What cannot happen has happened: `what` is wrong, at the place in the source that calls this. It is never turned into a default
    /// value, an empty result or an entry left out (I11).
    #[track_caller]
    #[must_use]
    pub(crate) fn internal(what: impl fmt::Display) -> Self {
        let place = Location::caller();
        Self::new(
            ErrorKind::Internal,
            format!(
                "internal error at {place}: {what}\nThis is a bug in dedup-img; nothing was written after it. Please report it with this line."
            ),
        )
    }

    /// An operating system error, worded as QEMU words it (`what: No such file or directory`).
    pub(crate) fn io(what: impl fmt::Display, source: io::Error) -> Self {
        let message = format!("{what}: {}", io_reason(&source));
        Self { source: Some(Box::new(source)), ..Self::new(ErrorKind::Io, message) }
    }

    /// An operating system error where the context says already what was done.
    pub(crate) fn os(source: io::Error) -> Self {
        let message = io_reason(&source);
        Self { source: Some(Box::new(source)), ..Self::new(ErrorKind::Io, message) }
    }

    /// The same error, said of the image at `path`: `Could not open 'path': ...`.
    pub(crate) fn opening(self, path: &Path) -> Self {
        self.prefixed(&format!("Could not open '{}'", shown(path)))
    }

    /// The same error with `context: ` before its message.
    #[must_use]
    pub fn prefixed(mut self, context: &str) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The same error with more to its sentence.
    pub(crate) fn ending(mut self, words: &str) -> Self {
        self.message.push_str(words);
        self
    }

    /// The same error with a second line.
    pub(crate) fn followed_by(mut self, line: &str) -> Self {
        self.message = format!("{}\n{line}", self.message);
        self
    }

    /// Why, without what was done: the operating system's words where it refused, else the whole sentence.
    pub(crate) fn reason(&self) -> String {
        match self.source.as_ref().and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(source) => io_reason(source),
            None => self.message.clone(),
        }
    }

    /// The same error; an operation that was asked to stop has left this, unless something is known that weighs more.
    #[must_use]
    pub(crate) fn leaving(mut self, left: Left) -> Self {
        if self.left == Left::Untouched {
            self.left = left;
        }
        self
    }

    /// What an operation has left that was asked to stop; `None` for errors of other kinds.
    #[must_use]
    pub fn left(&self) -> Option<Left> {
        (self.kind == ErrorKind::Cancelled).then_some(self.left)
    }

    /// The kind of failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

/// The reason of an I/O error in the words of `strerror`, without Rust's ` (os error N)` and what tempfile puts behind it.
pub(crate) fn io_reason(error: &dyn fmt::Display) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        _ => text,
    }
}

/// Says that something which must be there is not: a bug of the library, see [`Error::internal`].
pub(crate) trait OrInternal<T> {
    /// The value, or an internal error that names the caller's place and `what` is wrong.
    fn or_internal(self, what: &str) -> Result<T>;
}

impl<T> OrInternal<T> for Option<T> {
    #[track_caller]
    fn or_internal(self, what: &str) -> Result<T> {
        match self {
            Some(value) => Ok(value),
            None => Err(Error::internal(what)),
        }
    }
}

/// Adds "what was being done" to an [`io::Result`].
pub(crate) trait IoContext<T> {
    fn at(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::io(what, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_reads_as_qemu_words_it() {
        let error = Error::io("x", io::Error::from_raw_os_error(2)).opening(Path::new("a"));
        assert_eq!(error.to_string(), "Could not open 'a': x: No such file or directory");
        assert_eq!(error.kind(), ErrorKind::Io);
    }

    #[test]
    fn an_internal_error_says_where_and_that_it_is_a_bug() {
        let (error, line) = (None::<u8>.or_internal("no table").unwrap_err(), line!());
        let text = error.to_string();
        assert!(text.starts_with(&format!("internal error at {}:{line}:", file!())), "{text}");
        assert!(text.contains(": no table\nThis is a bug in dedup-img;"), "{text}");
        assert_eq!(error.kind(), ErrorKind::Internal);
    }
}
