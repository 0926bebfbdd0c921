//! The snapshot table.

use super::{Image, number};

/// An entry of the snapshot table.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) l1_table_offset: u64,
    pub(crate) l1_size: u32,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) date: (u32, u32),
    pub(crate) vm_clock: u64,
    pub(crate) extra_length: u32,
    pub(crate) vm_state_size: u64,
    pub(crate) disk_size: u64,
    pub(crate) icount: u64,
}

impl Image {
    /// The snapshot table and the bytes that it takes.
    pub(crate) fn snapshots(&self) -> (Vec<Snapshot>, u64) {
        let (mut at, mut list) = (self.header.snapshots_offset, Vec::new());
        for _ in 0..self.header.nb_snapshots {
            let b = self.read(at, 40);
            let extra_length = number(&b, 36, 4) as u32;
            let extra = self.read(at + 40, extra_length.into());
            let long = |from: usize| (extra.len() >= from + 8).then(|| number(&extra, from, 8));
            let (id_length, name_length) = (number(&b, 12, 2), number(&b, 14, 2));
            let names = at + 40 + u64::from(extra_length);
            let text = |from, length| String::from_utf8(self.read(from, length)).unwrap();
            list.push(Snapshot {
                l1_table_offset: number(&b, 0, 8),
                l1_size: number(&b, 8, 4) as u32,
                id: text(names, id_length),
                name: text(names + id_length, name_length),
                date: (number(&b, 16, 4) as u32, number(&b, 20, 4) as u32),
                vm_clock: number(&b, 24, 8),
                extra_length,
                vm_state_size: long(0).unwrap_or(number(&b, 32, 4)),
                disk_size: long(8).unwrap_or(self.header.size),
                icount: long(16).unwrap_or(u64::MAX),
            });
            at = (names + id_length + name_length).next_multiple_of(8);
        }
        (list, at - self.header.snapshots_offset)
    }
}
