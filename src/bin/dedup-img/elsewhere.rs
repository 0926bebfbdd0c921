//! The commands that qemu-img has and this program does not: what to use, and what is to be known of it.

/// What to use for the command of qemu-img called `name`; `None` where it has none either.
pub(crate) fn instead_of(name: &str) -> Option<String> {
    let works = format!("use qemu-img {name}; it works on these images");
    Some(match name {
        "amend" | "bench" | "commit" | "compare" | "info" | "map" | "rebase" | "resize" | "snapshot" => works,
        "bitmap" => works + ", but repair one with bitmaps with dedup-img: qemu-img check -r removes all its snapshots",
        "dd" => works + ", but writes out every cluster that they share; dedup-img convert keeps the sharing",
        "measure" => works + ", but counts every cluster that they share; dedup-img stats tells sizes with sharing",
        _ => return None,
    })
}
