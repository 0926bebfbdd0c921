//! Stock QEMU and an independent reader judge what `convert` and `create` have written.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::little_endian_bytes,
    reason = "a test that meets the unexpected has failed"
)]

mod all_snapshots;
mod check_agreement;
mod check_blind_spots;
mod check_repair;
mod check_repair_all;
mod check_rescue;
mod check_salvage;
mod check_sound;
mod collisions;
mod concatenated;
mod content;
mod dedup_content;
mod dedup_crash;
mod dedup_errors;
mod dedup_judge;
mod dedup_pool;
mod examples;
mod fixtures;
mod gc_content;
mod gc_crash;
mod gc_holes;
mod gc_room;
mod gc_space;
mod history;
mod into_content;
mod into_crash;
mod into_random;
mod into_writes;
mod judge;
mod limits;
mod live_source;
mod mutations;
mod packed;
mod plain;
mod pool;
mod progress;
mod random_sources;
mod refusals;
mod round_trips;
mod soak;
mod stats_figures;
mod stats_many;
mod stats_predict;
