//! The tables in README.md: a row for each image, a column for each program.

use std::collections::BTreeMap;

const README: &str = include_str!("README.md");

/// Whether the refusals listed have these words of that program.
pub(crate) fn has_refusal(program: &str, words: &str) -> bool {
    README.contains(&format!("{program}: `{words}`"))
}

/// The cells of one column of the table below the heading `heading`, by row.
pub(crate) fn column(heading: &str, column: &str) -> BTreeMap<String, String> {
    let table = README.split("\n## ").find(|part| part.starts_with(heading)).unwrap_or_else(|| panic!("no {heading}"));
    let cells =
        |line: &str| -> Vec<String> { line.trim_matches('|').split(" | ").map(|c| c.trim().to_owned()).collect() };
    let mut lines = table.lines().filter(|line| line.starts_with('|')).map(cells);
    let columns = lines.next().expect("a table");
    let at = columns.iter().position(|name| name == column).unwrap_or_else(|| panic!("no column {column}"));
    // Below the names there is a line of dashes.
    lines.skip(1).map(|mut row| (row[0].clone(), row.swap_remove(at))).collect()
}
