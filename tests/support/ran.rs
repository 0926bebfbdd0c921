//! What a program that ran has said.

use std::path::Path;
use std::process::Output;

/// What a program that ended has said and returned.
#[derive(Debug)]
pub(crate) struct Ran {
    /// The command as typed, for messages.
    pub(crate) line: String,
    /// The exit code; -1 when a signal ended the program.
    pub(crate) code: i32,
    /// Standard output as text.
    pub(crate) stdout: String,
    /// Standard error as text.
    pub(crate) stderr: String,
}

impl Ran {
    /// Packs the output of a finished child.
    pub(crate) fn new(line: String, output: &Output) -> Self {
        Self {
            line,
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Passes the result on if the program succeeded, and fails the test with all it said if not.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.told());
        self
    }

    /// Both streams, for searching.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// The whole story for a failure message.
    pub(crate) fn told(&self) -> String {
        format!("`{}` ended with {}\nstdout: {}\nstderr: {}", self.line, self.code, self.stdout, self.stderr)
    }

    /// Whether it says nothing, or in one line that a signal has stopped it and that `file` is clean, or as it was: then it must hold
    /// what it held `before`.
    pub(crate) fn tells_how_it_stopped(&self, file: &Path, before: &[u8]) -> bool {
        let Some(end) = self.stderr.split("; ").nth(1) else { return self.text().is_empty() };
        let untouched = format!("'{}' is as it was\n", file.display());
        let clean = format!("'{}' is clean, and each of its clusters as it was or as it should be\n", file.display());
        let holds = || std::fs::read(file).is_ok_and(|now| now == before);
        let begins = self.stderr.starts_with("dedup-img: ") && self.stderr.contains(" was stopped by SIG");
        self.stdout.is_empty() && begins && (end == clean || end == untouched && holds())
    }

    /// Asserts a refusal: exit code 1, nothing on stdout, one line on stderr that starts as ours do and holds every word given.
    #[track_caller]
    pub(crate) fn refused(self, words: &[&str]) -> Self {
        assert_eq!(self.code, 1, "{}", self.told());
        assert_eq!(self.stdout, "", "a refusal prints nothing on stdout: {}", self.told());
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "one line on stderr: {}", self.told());
        assert!(self.stderr.starts_with("dedup-img: "), "{}", self.told());
        for word in words {
            assert!(self.stderr.contains(word), "stderr lacks {word:?}: {}", self.told());
        }
        self
    }
}
