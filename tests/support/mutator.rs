//! A structured mutator: it knows where the fields of an image are, gives them wrong values, and says in words what it did.
//! Random bytes would nearly always hit data, which no check looks at.

use super::reader::{Image, Table, number};
use super::{Choices, Random};
use std::fs;
use std::path::Path;

/// Bits 9 to 55 of a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a field holds, and so which wrong values are worth trying.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// A table entry: an offset with flags above and below it.
    Entry,
    /// The descriptor of a compressed cluster.
    Compressed,
    /// An offset and nothing else.
    Offset,
    /// A refcount, another number, or a set of flags.
    Number,
}

/// A field of the image.
struct Field {
    name: String,
    kind: Kind,
    at: usize,
    /// Bytes that hold the field, and where in them it is; only narrow refcounts share a byte.
    length: usize,
    shift: u32,
    bits: u32,
}

/// An image made by others, and where its fields are.
pub(crate) struct Mutator {
    bytes: Vec<u8>,
    cluster_size: u64,
    /// Fields by group; each group is as likely to be hit as any other, however many fields it has.
    groups: Vec<(&'static str, Vec<Field>)>,
    /// Clusters that a wrong offset may point to.
    places: Vec<(String, u64)>,
}

/// A damaged image.
pub(crate) struct Damaged {
    /// The whole file.
    pub(crate) bytes: Vec<u8>,
    /// What was done to it.
    pub(crate) story: String,
}

impl Mutator {
    /// Finds the fields of an undamaged image.
    pub(crate) fn new(path: &Path) -> Self {
        let image = Image::open(path);
        let mut mutator = Self {
            bytes: fs::read(path).unwrap(),
            cluster_size: image.cluster_size(),
            groups: Vec::new(),
            places: vec![("the header".into(), 0), ("the refcount table".into(), image.header.refcount_table_offset)],
        };
        mutator.find_header(&image);
        mutator.find_refcounts(&image);
        let (at, size) = (image.header.l1_table_offset, image.header.l1_size);
        mutator.find_layer(["active L1", "active L2", "subclusters"], "active", &image, at, size);
        mutator.find_snapshots(&image);
        mutator.find_bitmaps(&image);
        mutator
    }

    fn word(&self, at: u64) -> u64 {
        number(&self.bytes, at as usize, 8)
    }

    fn add(&mut self, group: &'static str, name: String, kind: Kind, at: u64, length: usize) {
        let bits = 8 * length as u32;
        self.add_bits(group, Field { name, kind, at: at as usize, length, shift: 0, bits });
    }

    fn add_bits(&mut self, group: &'static str, field: Field) {
        if field.at + field.length > self.bytes.len() {
            return;
        }
        match self.groups.iter_mut().find(|(name, _)| *name == group) {
            Some((_, fields)) => fields.push(field),
            None => self.groups.push((group, vec![field])),
        }
    }

    fn find_header(&mut self, image: &Image) {
        let common = [
            ("size", Kind::Number, 24, 8),
            ("l1_size", Kind::Number, 36, 4),
            ("l1_table_offset", Kind::Offset, 40, 8),
            ("refcount_table_offset", Kind::Offset, 48, 8),
            ("refcount_table_clusters", Kind::Number, 56, 4),
            ("nb_snapshots", Kind::Number, 60, 4),
            ("snapshots_offset", Kind::Offset, 64, 8),
        ];
        let of_version_3 = [
            ("incompatible_features", Kind::Number, 79, 1),
            ("compatible_features", Kind::Number, 80, 8),
            ("autoclear_features", Kind::Number, 95, 1),
            ("refcount_order", Kind::Number, 99, 1),
        ];
        let more = if image.header.version == 3 { &of_version_3[..] } else { &[] };
        for (name, kind, at, length) in common.iter().chain(more) {
            self.add("header", format!("header field {name}"), *kind, *at, *length);
        }
    }

    fn find_refcounts(&mut self, image: &Image) {
        let bits = 1_u64 << image.header.refcount_order;
        let (table, per_block) = (image.header.refcount_table_offset, self.cluster_size * 8 / bits);
        let blocks = image.refcount_blocks();
        for (index, block) in (0..).zip(blocks.iter().chain([&0])) {
            self.add("refcount table", format!("refcount table entry {index}"), Kind::Entry, table + index * 8, 8);
            if *block == 0 {
                continue;
            }
            self.places.push((format!("refcount block {index}"), *block));
            let clusters = image.length.div_ceil(self.cluster_size) + 2;
            for cluster in (index * per_block..(index + 1) * per_block).take_while(|cluster| *cluster < clusters) {
                let bit = cluster % per_block * bits;
                let (at, shift) = ((block + bit / 8) as usize, (bit % 8) as u32);
                let (length, bits) = (bits.div_ceil(8) as usize, bits as u32);
                let name = format!("refcount of cluster {cluster}");
                self.add_bits("refcount", Field { name, kind: Kind::Number, at, length, shift, bits });
            }
        }
    }

    /// Finds the entries of an L1 table and of all L2 tables below it: each that is used, and a few that are not.
    fn find_layer(&mut self, groups: [&'static str; 3], layer: &str, image: &Image, l1: u64, l1_size: u32) {
        self.places.push((format!("the {layer} L1 table"), l1));
        for index in 0..u64::from(l1_size).min(200) {
            self.add(groups[0], format!("{layer} L1 entry {index}"), Kind::Entry, l1 + index * 8, 8);
        }
        for Table { index, host, words, .. } in image.tables(l1, l1_size) {
            self.places.push((format!("{layer} L2 table {index}"), host));
            let (mut empty, step) = (3, if image.extended() { 16 } else { 8 });
            for (slot, word) in (0..).zip(words) {
                empty -= i32::from(word == 0);
                if word == 0 && empty < 0 {
                    continue;
                }
                let (name, at) = (format!("{layer} L2 entry {index}/{slot}"), host + slot * step);
                let compressed = word >> 62 & 1 == 1;
                if slot % 7 == 0 && word != 0 && !compressed {
                    self.places.push((format!("the cluster of {name}"), word & OFFSET));
                }
                if step == 16 {
                    self.add(groups[2], format!("subclusters of {name}"), Kind::Number, at + 8, 8);
                }
                self.add(groups[1], name, if compressed { Kind::Compressed } else { Kind::Entry }, at, 8);
            }
        }
    }

    fn find_snapshots(&mut self, image: &Image) {
        let mut at = image.header.snapshots_offset;
        for snapshot in image.snapshots().0 {
            let name = format!("snapshot {}", snapshot.id);
            for (field, kind, from, length) in [
                ("L1 offset", Kind::Offset, 0, 8),
                ("L1 size", Kind::Number, 8, 4),
                ("id length", Kind::Number, 12, 2),
                ("name length", Kind::Number, 14, 2),
                ("extra length", Kind::Number, 36, 4),
                ("VM state size", Kind::Number, 40, 8),
                ("disk size", Kind::Number, 48, 8),
            ] {
                self.add("snapshot table", format!("{field} of {name}"), kind, at + from, length);
            }
            let groups = ["snapshot L1", "snapshot L2", "subclusters"];
            self.find_layer(groups, &name, image, snapshot.l1_table_offset, snapshot.l1_size);
            let names = snapshot.id.len() + snapshot.name.len();
            at += (40 + u64::from(snapshot.extra_length) + names as u64).next_multiple_of(8);
        }
        if image.header.nb_snapshots > 0 {
            self.places.push(("the snapshot table".into(), image.header.snapshots_offset));
        }
    }

    fn find_bitmaps(&mut self, image: &Image) {
        let mut at = u64::from(image.header.header_length);
        let extension = image.extensions().into_iter().find(|(kind, data)| {
            let found = *kind == 0x2385_2875;
            at += if found { 0 } else { 8 + (data.len() as u64).next_multiple_of(8) };
            found
        });
        let Some((_, data)) = extension else { return };
        for (field, kind, from, length) in [
            ("type", Kind::Number, 0, 4),
            ("length", Kind::Number, 4, 4),
            ("nb_bitmaps", Kind::Number, 8, 4),
            ("reserved", Kind::Number, 12, 4),
            ("directory size", Kind::Number, 16, 8),
            ("directory offset", Kind::Offset, 24, 8),
        ] {
            self.add("bitmap extension", format!("bitmap extension, {field}"), kind, at + from, length);
        }
        let mut at = number(&data, 16, 8);
        self.places.push(("the bitmap directory".into(), at));
        for bitmap in 0..number(&data, 0, 4) {
            for (field, kind, from, length) in [
                ("table offset", Kind::Offset, 0, 8),
                ("table size", Kind::Number, 8, 4),
                ("flags", Kind::Number, 12, 4),
                ("type", Kind::Number, 16, 1),
                ("granularity", Kind::Number, 17, 1),
                ("name length", Kind::Number, 18, 2),
                ("extra length", Kind::Number, 20, 4),
            ] {
                self.add("bitmap directory", format!("{field} of bitmap {bitmap}"), kind, at + from, length);
            }
            let table = self.word(at);
            self.places.push((format!("the table of bitmap {bitmap}"), table));
            for entry in 0..number(&self.bytes, at as usize + 8, 4) {
                let name = format!("entry {entry} of bitmap {bitmap}");
                self.add("bitmap table", name, Kind::Entry, table + entry * 8, 8);
            }
            at += (24 + number(&self.bytes, at as usize + 18, 2)).next_multiple_of(8);
        }
    }

    /// The image as it is.
    pub(crate) fn undamaged(&self) -> &[u8] {
        &self.bytes
    }

    /// A copy of the image with one to three wrong fields, or with a wrong length.
    pub(crate) fn damage(&self, random: &mut Random) -> Damaged {
        let (mut bytes, mut story) = (self.bytes.clone(), Vec::new());
        for _ in 0..[1, 1, 1, 1, 1, 2, 3][random.below(7) as usize] {
            story.push(self.wrong_field(&mut bytes, random));
        }
        if random.below(25) == 0 {
            story.push(self.wrong_length(&mut bytes, random));
        }
        Damaged { bytes, story: story.join("; ") }
    }

    /// Gives some field a wrong value, and says which.
    pub(crate) fn wrong_field(&self, bytes: &mut [u8], choices: &mut impl Choices) -> String {
        let (_, fields) = &self.groups[choices.below(self.groups.len() as u64) as usize];
        let field = &fields[choices.below(fields.len() as u64) as usize];
        self.set(field, bytes, choices)
    }

    /// Gives the file a wrong length, and says which.
    pub(crate) fn wrong_length(&self, bytes: &mut Vec<u8>, choices: &mut impl Choices) -> String {
        let unit = [1, 512, self.cluster_size, 3 * self.cluster_size][choices.below(4) as usize];
        let length = [bytes.len() as u64 + unit, (bytes.len() as u64).saturating_sub(unit)][choices.below(2) as usize];
        let story = format!("the file is {length} bytes long, not {}", bytes.len());
        bytes.resize(length as usize, 0);
        story
    }

    /// Gives one field a wrong value.
    fn set(&self, field: &Field, bytes: &mut [u8], random: &mut impl Choices) -> String {
        if field.at + field.length > bytes.len() {
            return format!("{} is cut off", field.name);
        }
        let whole = number(bytes, field.at, field.length);
        let mask = u64::MAX >> (64 - field.bits);
        let old = whole >> field.shift & mask;
        let any = random.next();
        let (how, new) = match field.kind {
            Kind::Entry | Kind::Offset => self.wrong_offset(old, field.kind == Kind::Entry, random),
            Kind::Compressed if any.is_multiple_of(3) => self.wrong_offset(old, true, random),
            Kind::Compressed => ("other bits", old ^ 1 << random.below(64) ^ 1 << random.below(40)),
            Kind::Number => [
                ("none", 0),
                ("one", 1),
                ("one less", old.wrapping_sub(1)),
                ("one more", old.wrapping_add(1)),
                ("another bit", old ^ 1 << random.below(field.bits.into())),
                ("the most", u64::MAX),
                ("any", any),
            ][random.below(7) as usize],
        };
        let new = new & mask;
        let stored = (whole & !(mask << field.shift) | new << field.shift).to_be_bytes();
        bytes[field.at..field.at + field.length].copy_from_slice(&stored[8 - field.length..]);
        format!("{} at {:#x}: {old:#x} is now {new:#x} ({how})", field.name, field.at)
    }

    /// A wrong offset, with flags around it if it is a table entry.
    fn wrong_offset(&self, old: u64, flags: bool, random: &mut impl Choices) -> (&str, u64) {
        let (end, copied) = (self.bytes.len() as u64, old & 1 << 63);
        let (there, elsewhere) = &self.places[random.below(self.places.len() as u64) as usize];
        let any = random.below(end.div_ceil(self.cluster_size)) * self.cluster_size;
        match random.below(if flags { 14 } else { 8 }) {
            0 => ("nothing", 0),
            1 => ("just past the end", end.next_multiple_of(self.cluster_size) | copied),
            2 => ("far past the end", 0x00ff_ffff_ffff_ffff & !(self.cluster_size - 1) | copied),
            3 => ("no cluster's start", old ^ (self.cluster_size / 2).max(512)),
            4 | 5 => (there, elsewhere | copied),
            6 => ("on any cluster", any | copied),
            7 => ("next to it", old.wrapping_add(self.cluster_size)),
            8 | 9 => ("COPIED", old ^ 1 << 63),
            10 => ("compressed", old ^ 1 << 62),
            11 => ("the zero flag", old ^ 1),
            12 => ("a reserved bit", old ^ [1 << 1, 1 << 8, 1 << 56, 1 << 61][random.below(4) as usize]),
            _ => (there, elsewhere | 1 << 63),
        }
    }
}
