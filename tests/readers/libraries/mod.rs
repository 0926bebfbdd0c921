//! The libraries, each made to read a whole disk and to write pieces of it.

pub(crate) mod imago;
pub(crate) mod qcow2_rs;
pub(crate) mod rust_img;

use std::fmt::Display;

/// What an error says.
fn said(error: impl Display) -> String {
    error.to_string()
}
