//! Changing an image: what gains and loses references, the new pool, places for both, and the order of the writes.

pub(crate) mod allocate;
pub(crate) mod apply;
pub(crate) mod change;
pub(crate) mod members;
pub(crate) mod mend;
pub(crate) mod pool_writer;
pub(crate) mod renew;
pub(crate) mod room;
