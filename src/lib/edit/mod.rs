//! Changing an image: what gains and loses references, places for what is new, and the one order of the writes. Below it are those that
//! look ([`mod@crate::check`], [`crate::survey`]), above it those that know why an image changes ([`crate::inplace`]).
//!
//! ```text
//!  Change --> prepare --> room --> apply --> settle        Change: which L2 entries, which pool
//!             (places)   (fits?)  (writes)  (recount)
//! ```
//!
#![doc = include_str!("order.md")]

pub(crate) mod allocate;
pub(crate) mod apply;
pub(crate) mod change;
pub(crate) mod directory;
pub(crate) mod entries;
pub(crate) mod idle;
pub(crate) mod key;
pub(crate) mod marks;
pub(crate) mod members;
pub(crate) mod mend;
pub(crate) mod phases;
pub(crate) mod pointers;
pub(crate) mod pool_writer;
pub(crate) mod prepare;
pub(crate) mod refuse;
pub(crate) mod renew;
pub(crate) mod repair;
pub(crate) mod room;
pub(crate) mod settle;
