//! What goes wrong, as the user is told.

use std::fmt;

/// A reason to end with exit code 1.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line of a command makes no sense.
    Usage { command: &'static str, message: String },
    /// The operation failed.
    Operation(String),
}

impl Failure {
    /// An operation that failed with `message`.
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        Self::Operation(message.to_string())
    }
}

/// Where the help of a command is, or of the program.
pub(crate) fn hint(command: Option<&str>) -> String {
    match command {
        Some(command) => format!("Try 'dedup-img {command} --help' for more info"),
        None => "Try 'dedup-img --help' for more info".to_owned(),
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage { command, message } => write!(f, "{message}\n{}", hint(Some(command))),
            Self::Operation(message) => f.write_str(message),
        }
    }
}
