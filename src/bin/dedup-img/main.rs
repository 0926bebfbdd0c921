//! `dedup-img`.
fn main() {}
