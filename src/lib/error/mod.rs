//! The one error type of the library. An error is data: what was being done, to which file, where in it, why it failed, and what can
//! be done about it. [`fmt::Display`] makes a sentence of it; who has names for what can be done, as a program has for its options,
//! makes a better one with [`Error::worded`].

mod advice;
mod context;
mod doing;

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::panic::Location;
use std::path::Path;
use std::sync::Arc;

pub use advice::{Advice, Less};
pub(crate) use context::{Advised, Context, IoContext, OrInternal};
pub use doing::{Doing, Table};

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

/// A failure. [`fmt::Display`] gives one sentence, without a full stop, and at times a second line with what to do.
#[derive(Debug, Clone)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    /// From the innermost to the outermost.
    doing: Vec<Doing>,
    reason: Cow<'static, str>,
    /// What follows the reason.
    rest: Vec<Rest>,
    offset: Option<u64>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
    left: Left,
}

/// A piece of what follows the reason.
#[derive(Debug, Clone)]
enum Rest {
    Words(Cow<'static, str>),
    Advice(Advice),
}

/// How an advice is said, for [`Error::worded`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Words {
    /// As the library says it.
    Plain,
    /// With these words, which begin with what separates them from the sentence before.
    Added(Cow<'static, str>),
    /// With these words in place of the reason and what follows it.
    Instead(String),
}

/// The result of every fallible library function.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` with `reason`.
    pub fn new(kind: ErrorKind, reason: impl Into<Cow<'static, str>>) -> Self {
        let (doing, rest) = (Vec::new(), Vec::new());
        let left = Left::Untouched;
        Self(Box::new(Inner { kind, doing, reason: reason.into(), rest, offset: None, source: None, left }))
    }

    pub(crate) fn corrupt(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Corrupt, reason)
    }

    pub(crate) fn unsupported(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Unsupported, reason)
    }

    pub(crate) fn invalid(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Invalid, reason)
    }

    /// What cannot happen has happened: `what` is wrong, at the place in the source that calls this. It is never turned into a default
    /// value, an empty result or an entry left out (I11).
    #[track_caller]
    #[must_use]
    pub(crate) fn internal(what: impl fmt::Display) -> Self {
        let place = Location::caller();
        Self::new(ErrorKind::Internal, format!("internal error at {place}: {what}")).advise(Advice::ReportBug)
    }

    /// An operating system error, worded as QEMU words it (`what: No such file or directory`).
    pub fn io(what: impl fmt::Display, source: io::Error) -> Self {
        Self::os(source).doing(Doing::Other(what.to_string().into()))
    }

    /// An operating system error where the context says already what was done.
    pub(crate) fn os(source: io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, io_reason(&source));
        error.0.source = Some(Arc::new(source));
        error
    }

    /// The same error; this is what was being done, before what it says so far.
    #[must_use]
    pub fn doing(mut self, doing: Doing) -> Self {
        self.0.doing.push(doing);
        self
    }

    /// The same error, said of the image at `path`: `Could not open 'path': ...`.
    #[must_use]
    pub fn opening(self, path: &Path) -> Self {
        self.doing(Doing::Opening(path.to_owned()))
    }

    /// The same error, said of the file at `path`: `'path': ...`.
    #[must_use]
    pub fn on(self, path: &Path) -> Self {
        self.doing(Doing::On(path.to_owned()))
    }

    /// The same error, which is about what lies at `offset` in the file. Its sentence says so already.
    pub(crate) fn at(mut self, offset: u64) -> Self {
        self.0.offset = Some(offset);
        self
    }

    /// The same error with what can be done about it.
    #[must_use]
    pub fn advise(mut self, advice: Advice) -> Self {
        self.0.rest.push(Rest::Advice(advice));
        self
    }

    /// The same error with what can be done about it, if that is anything.
    pub(crate) fn advise_all(self, advice: impl IntoIterator<Item = Advice>) -> Self {
        advice.into_iter().fold(self, Self::advise)
    }

    /// The same error, said of the image at `path`, which is as good as not opened where it is in another format.
    #[must_use]
    pub fn of_image(self, path: &Path) -> Self {
        match self.kind() {
            ErrorKind::Format => self.opening(path),
            _ => self.on(path),
        }
    }

    /// The same error with more to its sentence.
    pub(crate) fn ending(mut self, words: impl Into<Cow<'static, str>>) -> Self {
        self.0.rest.push(Rest::Words(words.into()));
        self
    }

    /// The same error with a second line.
    pub(crate) fn followed_by(self, line: &str) -> Self {
        self.ending(format!("\n{line}"))
    }

    /// The same error; an operation that was asked to stop has left this, unless something is known that weighs more.
    #[must_use]
    pub(crate) fn leaving(mut self, left: Left) -> Self {
        if self.0.left == Left::Untouched {
            self.0.left = left;
        }
        self
    }

    /// The kind of failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done, from the outermost to the innermost; each was said of the next.
    pub fn layers(&self) -> impl Iterator<Item = &Doing> {
        self.0.doing.iter().rev()
    }

    /// The file that it is about: the innermost that is known.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.doing.iter().find_map(Doing::path)
    }

    /// Where in that file it is, in bytes.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.0.offset.or_else(|| self.0.doing.iter().find_map(Doing::offset))
    }

    /// Why it failed, without what was being done, and what can be done about it: the operating system's words where it refused.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// What can be done about it.
    pub fn advice(&self) -> impl Iterator<Item = &Advice> {
        self.0.rest.iter().filter_map(|rest| match rest {
            Rest::Advice(advice) => Some(advice),
            Rest::Words(_) => None,
        })
    }

    /// What an operation has left that was asked to stop; `None` for errors of other kinds.
    #[must_use]
    pub fn left(&self) -> Option<Left> {
        (self.0.kind == ErrorKind::Cancelled).then_some(self.0.left)
    }

    /// The sentence, with each advice in the words that `words` has for it.
    pub fn worded(&self, words: impl Fn(&Advice) -> Words) -> String {
        let mut text = String::new();
        self.layers().for_each(|doing| text += &format!("{doing}: "));
        let instead = self.advice().find_map(|advice| match words(advice) {
            Words::Instead(instead) => Some(instead),
            _ => None,
        });
        if let Some(instead) = instead {
            return text + &instead;
        }
        text += &self.0.reason;
        for rest in &self.0.rest {
            match rest {
                Rest::Words(words) => text += words,
                Rest::Advice(advice) => match words(advice) {
                    Words::Added(words) => text += &words,
                    _ => text += &advice.to_string(),
                },
            }
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.worded(|_| Words::Plain))
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|s| &**s as _)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_reads_as_qemu_words_it() {
        let error = Error::io("x", io::Error::from_raw_os_error(2)).opening(Path::new("a"));
        assert_eq!(error.to_string(), "Could not open 'a': x: No such file or directory");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!((error.path(), error.reason()), (Some(Path::new("a")), "No such file or directory"));
        assert!(error.source().is_some_and(|source| source.is::<io::Error>()));
    }

    #[test]
    fn an_internal_error_says_where_and_that_it_is_a_bug() {
        let (error, line) = (None::<u8>.or_internal("no table").unwrap_err(), line!());
        let text = error.to_string();
        assert!(text.starts_with(&format!("internal error at {}:{line}:", file!())), "{text}");
        assert!(text.contains(": no table\nThis is a bug; nothing was written after it."), "{text}");
        assert_eq!(error.kind(), ErrorKind::Internal);
    }

    #[test]
    fn the_innermost_layer_says_which_file_and_where() {
        let failed: io::Result<()> = Err(io::Error::from_raw_os_error(5));
        let error = failed.reading(Table::L2, 0x30000_u64).on(Path::new("base")).opening(Path::new("a")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Could not open 'a': 'base': Could not read the L2 table at 0x30000: Input/output error"
        );
        assert_eq!((error.path(), error.offset()), (Some(Path::new("base")), Some(0x30000)));
    }

    #[test]
    fn an_advice_stands_where_it_was_given() {
        let error = Error::corrupt("bad").advise(Advice::Check).followed_by("More.");
        assert_eq!(error.to_string(), "bad; a check says more\nMore.");
        assert_eq!(error.worded(|_| Words::Added("; look".into())), "bad; look\nMore.");
        assert_eq!(error.on(Path::new("a")).worded(|_| Words::Instead("good".into())), "'a': good");
    }

    #[test]
    fn an_error_goes_wherever_errors_go() {
        fn goes<T: StdError + Clone + Send + Sync + 'static>() {}
        goes::<Error>();
    }
}
