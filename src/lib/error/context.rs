//! Adding layers to the error of a result.

use std::fmt;
use std::io;
use std::path::Path;

use super::{Advice, Doing, Error, Result, Table};

/// Adds what was being done to a result.
pub(crate) trait Context<T>: Sized {
    /// With `doing` before what the error says so far.
    fn doing(self, doing: impl FnOnce() -> Doing) -> Result<T>;

    /// Said of the image at `path`, which was being opened.
    fn opening(self, path: &Path) -> Result<T> {
        self.doing(|| Doing::Opening(path.to_owned()))
    }

    /// Said of the file at `path`.
    fn on(self, path: &Path) -> Result<T> {
        self.doing(|| Doing::On(path.to_owned()))
    }

    /// Said of the target at `path`.
    fn target(self, path: &Path) -> Result<T> {
        self.doing(|| Doing::Target(path.to_owned()))
    }

    /// Said of what was being made at `path`.
    fn creating(self, path: &Path) -> Result<T> {
        self.doing(|| Doing::Creating(path.to_owned()))
    }

    /// Said of a `table` that lies at `offset`.
    fn reading(self, table: Table, offset: impl Into<u64>) -> Result<T> {
        self.doing(|| Doing::Reading(table, Some(offset.into())))
    }

    /// Said of what was being written at `offset`.
    fn writing(self, offset: impl Into<u64>) -> Result<T> {
        self.doing(|| Doing::Writing(offset.into()))
    }
}

impl<T> Context<T> for Result<T> {
    fn doing(self, doing: impl FnOnce() -> Doing) -> Result<T> {
        self.map_err(|error| error.doing(doing()))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn doing(self, doing: impl FnOnce() -> Doing) -> Result<T> {
        self.map_err(|error| Error::os(error).doing(doing()))
    }
}

/// Adds what to do about it to a result.
pub(crate) trait Advised<T> {
    /// With `advice`.
    fn advise(self, advice: Advice) -> Result<T>;
}

impl<T> Advised<T> for Result<T> {
    fn advise(self, advice: Advice) -> Result<T> {
        self.map_err(|error| error.advise(advice))
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

/// Adds "what was being done", in words, to an [`io::Result`].
pub(crate) trait IoContext<T> {
    fn at(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::io(what, e))
    }
}
