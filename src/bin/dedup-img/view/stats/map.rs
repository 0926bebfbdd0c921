//! The disk as a line of letters.

use std::env;
use std::io::{self, IsTerminal};

use anstyle::{AnsiColor, Style};
use dedup_img::stats::{Cell, Map};

/// What a letter stands for.
#[derive(Clone, Copy)]
enum Kind {
    Zero,
    Unique,
    Duplicate,
    Shared,
}

impl Kind {
    /// What most of a piece is; data before zeros, where both are equal.
    fn of(cell: &Cell) -> Self {
        let kinds = [
            (cell.zero_clusters, Self::Zero),
            (cell.unique_clusters, Self::Unique),
            (cell.shared_clusters, Self::Shared),
            (cell.duplicate_clusters, Self::Duplicate),
        ];
        kinds.into_iter().max_by_key(|(clusters, _)| *clusters).map_or(Self::Zero, |(_, kind)| kind)
    }

    fn letter(self) -> char {
        match self {
            Self::Zero => '.',
            Self::Unique => 'u',
            Self::Duplicate => 'd',
            Self::Shared => 's',
        }
    }

    fn style(self) -> Style {
        let color = match self {
            Self::Zero => return Style::new().dimmed(),
            Self::Unique => AnsiColor::Blue,
            Self::Duplicate => AnsiColor::Red,
            Self::Shared => AnsiColor::Green,
        };
        color.on_default().bold()
    }
}

/// The line, coloured on a terminal.
pub(super) fn line(map: &Map) -> String {
    let letters = map.cells.iter().map(Kind::of);
    if !wants_color() {
        return letters.map(Kind::letter).collect();
    }
    letters.map(|kind| format!("{0}{1}{0:#}", kind.style(), kind.letter())).collect()
}

/// Whether standard output is a terminal that shows colours, and nobody objects (no-color.org).
fn wants_color() -> bool {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    io::stdout().is_terminal() && set("NO_COLOR").is_none() && set("TERM").is_some_and(|term| term != "dumb")
}
