//! Room on the file system of an image.

use dedup_img::{Error, ErrorKind};

use super::summary::Rows;
use super::units::bytes;

/// The same error; where there is no room, with how much there is and how much is needed, and what to do.
pub(crate) fn no_room(error: Error, advice: &str) -> Error {
    let kind = error.kind();
    match kind {
        ErrorKind::NoRoom { needed, available } => {
            let (needed, available) = (bytes(needed), bytes(available));
            let sentence = format!(
                "{needed} of room are needed on its file system, which has {available}; nothing was written; {advice}"
            );
            Error::new(kind, sentence)
        }
        _ => error,
    }
}

/// Adds what a dry run found out about it.
pub(super) fn add(rows: &mut Rows, needed: u64, least: u64, available: Option<u64>) {
    let there = available.map_or_else(|| "unknown what is there".to_owned(), |there| format!("{} there", bytes(there)));
    let least = if least < needed { format!(", {} at the least", bytes(least)) } else { String::new() };
    rows.add("room", bytes(needed), &format!("needed{least}; {there}"));
}
