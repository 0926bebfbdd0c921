//! One file for each command: what was typed becomes options, the library works, the view shows.

pub(crate) mod check;
pub(crate) mod convert;
pub(crate) mod create;
pub(crate) mod dedup;
pub(crate) mod gc;
mod in_place;
mod run;
pub(crate) mod stats;
