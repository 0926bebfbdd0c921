//! Room on the file system of an image.

use dedup_img::{Advice, Error, ErrorKind, Less};

use super::summary::Rows;
use super::units::bytes;

/// The same error; where there is no room, with what would need less.
pub(crate) fn no_room(error: Error, less: Less) -> Error {
    match error.kind() {
        ErrorKind::NoRoom { needed, available } => error.advise(Advice::MakeRoom { needed, available, less }),
        _ => error,
    }
}

/// Adds what a dry run found out about it.
pub(super) fn add(rows: &mut Rows, needed: u64, least: u64, available: Option<u64>) {
    let there = available.map_or_else(|| "unknown what is there".to_owned(), |there| format!("{} there", bytes(there)));
    let least = if least < needed { format!(", {} at the least", bytes(least)) } else { String::new() };
    rows.add("room", bytes(needed), &format!("needed{least}; {there}"));
}
