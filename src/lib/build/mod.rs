//! Building a new image: its layout, its layers and its metadata.

pub(crate) mod layers;
pub(crate) mod layout;
pub(crate) mod size;
pub(crate) mod writer;
