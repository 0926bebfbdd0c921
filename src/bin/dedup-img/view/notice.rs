//! What there is to know about a target, said when it is known.

use std::sync::Arc;

use dedup_img::name::shown;
use dedup_img::notice::{InPlace, Lost, Notice};
use dedup_img::{Phase, Progress};

use super::progress::Shown;
use super::warning;

/// Shows notices, and progress where that is asked for.
pub(crate) struct Told {
    /// Shows the progress.
    pub(crate) progress: Arc<Shown>,
    /// Whether only failures are to be said.
    pub(crate) quiet: bool,
}

impl Progress for Told {
    fn phase(&self, phase: &Phase) {
        self.progress.phase(phase);
    }

    fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }

    fn notice(&self, notice: &Notice) {
        if !self.quiet {
            self.progress.aside(|| warning(&sentence(notice)));
        }
    }
}

fn sentence(notice: &Notice) -> String {
    match notice {
        Notice::InPlace { path, reason } => {
            let path = shown(path);
            format!(
                "'{path}' is written where it lies, {}: from the first write on its old content is lost",
                why(reason)
            )
        }
        Notice::OtherNames { path, count: 1 } => {
            format!("'{}' has 1 other name (hard link), which keeps the old content", shown(path))
        }
        Notice::OtherNames { path, count } => {
            format!("'{}' has {count} other names (hard links), which keep the old content", shown(path))
        }
        Notice::NotKept { path, what } => {
            let what: Vec<String> = what.iter().map(lost).collect();
            format!("'{}' does not keep {}", shown(path), what.join(", "))
        }
        Notice::NameNotSynced { path, reason } => {
            let path = shown(path);
            format!(
                "'{path}' is complete, but a power failure may take its name: could not sync its directory: {reason}"
            )
        }
        other => format!("{other:?}"),
    }
}

fn why(reason: &InPlace) -> String {
    match reason {
        InPlace::Descriptor => "because it is a descriptor and not a name".to_owned(),
        InPlace::MountPoint => "because it is mounted there".to_owned(),
        InPlace::Directory(reason) => format!("because its name cannot be given to another file ({reason})"),
        other => format!("{other:?}"),
    }
}

fn lost(lost: &Lost) -> String {
    match lost {
        Lost::Owner { was, is } => format!("its owner {was} (now {is})"),
        Lost::Group { was, is } => format!("its group {was} (now {is})"),
        Lost::Mode { was, is } => format!("its permissions {was:04o} (now {is:04o})"),
        Lost::Acl => "all of its access control list".to_owned(),
        Lost::Attribute(name) => format!("its attribute {}", shown(name)),
        Lost::Flags(letters) => format!("its flags {letters}"),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_is_a_line() {
        let path = "a\nb".into();
        let what =
            vec![Lost::Mode { was: 0o660, is: 0o600 }, Lost::Attribute("user.x".into()), Lost::Flags("C".into())];
        let line = sentence(&Notice::NotKept { path, what });
        assert_eq!(line, "'a\\nb' does not keep its permissions 0660 (now 0600), its attribute user.x, its flags C");
    }
}
