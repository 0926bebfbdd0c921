//! Persistent bitmaps: where they lie, and the bits that they hold.

use crate::support::reader::{Image, number};
use std::ops::Range;

/// Type of the header extension that leads to the bitmaps.
const EXTENSION: u32 = 0x2385_2875;

/// A bitmap with all its bits.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    name: String,
    flags: u64,
    granularity: u64,
    /// Table entries as far as they are no offsets, and the clusters that the others lead to.
    bits: Vec<(u64, Vec<u8>)>,
}

/// All bitmaps, and the places in the file that directory, tables and data take.
pub(super) fn bitmaps(image: &Image) -> (Vec<Bitmap>, Vec<Range<u64>>) {
    let (mut list, mut places) = (Vec::new(), Vec::new());
    let Some((_, data)) = image.extensions().into_iter().find(|(kind, _)| *kind == EXTENSION) else {
        return (list, places);
    };
    let (count, length, directory) = (number(&data, 0, 4), number(&data, 8, 8), number(&data, 16, 8));
    image.aligned("bitmap directory", directory);
    places.push(directory..directory + length);
    let mut at = directory;
    for _ in 0..count {
        let entry = image.read(at, 24);
        let (table, entries) = (number(&entry, 0, 8), number(&entry, 8, 4));
        let (name_length, extra_length) = (number(&entry, 18, 2), number(&entry, 20, 4));
        let name = at + 24 + extra_length;
        image.aligned("bitmap table", table);
        places.push(table..table + entries * 8);
        let mut bits = Vec::new();
        for word in image.words(table, entries) {
            let host = word & 0x00ff_ffff_ffff_fe00;
            if host == 0 {
                bits.push((word, Vec::new()));
                continue;
            }
            places.push(host..host + image.cluster_size());
            bits.push((0, image.read(host, image.cluster_size())));
        }
        list.push(Bitmap {
            name: String::from_utf8(image.read(name, name_length)).unwrap(),
            flags: number(&entry, 12, 4),
            granularity: number(&entry, 17, 1),
            bits,
        });
        at = (name + name_length).next_multiple_of(8);
    }
    (list, places)
}
