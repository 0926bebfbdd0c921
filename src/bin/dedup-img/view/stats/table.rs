//! Tables of figures, without lines, right-aligned.

use comfy_table::{CellAlignment, Table, presets};

/// A table with a heading for each column; `left` columns are aligned to the left.
pub(super) struct Figures {
    table: Table,
    left: Vec<usize>,
}

impl Figures {
    pub(super) fn new<const N: usize>(headings: [&str; N], left: &[usize]) -> Self {
        Self::with_headings(headings.iter().map(|heading| (*heading).to_owned()), left)
    }

    pub(super) fn with_headings(headings: impl Iterator<Item = String>, left: &[usize]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.add_row(headings);
        Self { table, left: left.to_owned() }
    }

    pub(super) fn add(&mut self, cells: impl IntoIterator<Item = String>) {
        self.table.add_row(cells);
    }

    pub(super) fn text(mut self) -> String {
        for (at, column) in self.table.column_iter_mut().enumerate() {
            let side = if self.left.contains(&at) { CellAlignment::Left } else { CellAlignment::Right };
            column.set_cell_alignment(side);
        }
        self.table.trim_fmt() + "\n"
    }
}
