//! Persistent bitmaps: directory, tables, data.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::check::Checker;
use crate::check::finding::{Kind, Severity, Use};
use crate::error::{Advice, Context, Doing, Error, Result, Table};
use crate::format::header::{autoclear, extension};
use crate::format::{u16_at, u32_at, u64_at};
use crate::name::shown;
use crate::storage::buffer::zeroed;
use crate::storage::read_padded;
use crate::units::to_usize;

/// QEMU's limit.
const MAX_BITMAPS: u32 = 65535;
/// Length of a directory entry before its extra data and name, in bytes.
const FIXED: usize = 24;
/// QEMU: the largest bitmap directory.
const MAX_DIRECTORY: u64 = 65535 * 1024;
/// QEMU: the largest table of one bitmap, in entries (512 MiB of bits in clusters of 512 bytes).
const MAX_TABLE: u64 = 1 << 20;
/// Bits of a bitmap table entry that mean nothing.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A directory entry, as far as checking needs it.
struct Bitmap {
    name: String,
    table: u64,
    entries: u64,
    /// Whether it records writes.
    records: bool,
}

impl Checker<'_> {
    /// Counts all bitmaps, if the image says that they are valid.
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let Some(data) = self.header.extension(extension::BITMAPS) else { return Ok(()) };
        if self.header.autoclear & autoclear::BITMAPS == 0 {
            return Ok(());
        }
        let (count, reserved) = (u32_at(data, 0).unwrap_or(0), u32_at(data, 4).unwrap_or(0));
        let (size, offset) = (u64_at(data, 8).unwrap_or(0), u64_at(data, 16).unwrap_or(0));
        let refuse =
            |message: &str| Err(Error::corrupt(format!("bitmaps_ext: {message}")).advise(Advice::WithoutBitmaps));
        if data.len() != 24 {
            return refuse("Invalid extension length");
        }
        if reserved != 0 {
            return refuse("Reserved field is not zero");
        }
        if count == 0 {
            return refuse("found bitmaps extension with zero bitmaps");
        }
        if count > MAX_BITMAPS {
            return refuse(&format!(
                "Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
            ));
        }
        if offset & (self.header.cluster_bits.bytes() - 1) != 0 {
            return refuse("invalid bitmap directory offset");
        }
        if size > MAX_DIRECTORY {
            return refuse(&format!(
                "bitmap directory size ({size}) exceeds the maximum supported size ({MAX_DIRECTORY})"
            ));
        }
        if size == 0 {
            return refuse("Requested bitmap directory size is zero");
        }
        self.claim(offset, size, Use::BitmapDirectory, None);
        let mut directory = zeroed(to_usize(size.min(self.file_len)))?;
        read_padded(self.storage, &mut directory, offset).doing(|| Doing::Reading(Table::Bitmaps, None))?;
        let bitmaps = match self.directory(&directory, count) {
            Ok(bitmaps) => bitmaps,
            Err(what) => {
                self.say(Severity::Corruption, Kind::BitmapDirectory);
                return Err(Error::corrupt(format!("Check failed: {what}")).advise(Advice::WithoutBitmaps));
            }
        };
        for bitmap in bitmaps {
            if bitmap.records {
                self.recording.get_or_insert_with(|| bitmap.name.clone());
            }
            self.claim(bitmap.table, bitmap.entries * 8, Use::BitmapTable(bitmap.name.clone()), None);
            self.bitmap_data(&bitmap)?;
        }
        Ok(())
    }

    /// The bitmaps of a directory, or what is wrong with it, in QEMU's words.
    fn directory(&self, mut bytes: &[u8], count: u32) -> std::result::Result<Vec<Bitmap>, String> {
        let mut bitmaps = Vec::new();
        while !bytes.is_empty() {
            if bitmaps.len() == count as usize && bytes.len() >= FIXED {
                return Err("More bitmaps found than specified in header extension".to_owned());
            }
            let (bitmap, length) = self.directory_entry(bytes).unwrap_or(Err("Broken bitmap directory".to_owned()))?;
            bitmaps.push(bitmap);
            bytes = bytes.get(length..).unwrap_or_default();
        }
        if bitmaps.len() < count as usize {
            return Err("Less bitmaps found than specified in header extension".to_owned());
        }
        Ok(bitmaps)
    }

    /// The first entry of a directory and its length, or what is wrong with it; `None` where it does not fit.
    fn directory_entry(&self, bytes: &[u8]) -> Option<std::result::Result<(Bitmap, usize), String>> {
        let (name_len, extra) = (usize::from(u16_at(bytes, 18)?), u32_at(bytes, 20)? as usize);
        let (table, entries, flags) = (u64_at(bytes, 0)?, u64::from(u32_at(bytes, 8)?), u32_at(bytes, 12)?);
        let (kind, granularity) = (*bytes.get(16)?, u32::from(*bytes.get(17)?));
        let length = FIXED.checked_add(extra)?.checked_add(name_len)?.next_multiple_of(8);
        let name = bytes.get(FIXED..length)?.get(extra..)?.get(..name_len)?;
        let name = shown(OsStr::from_bytes(name));
        if extra != 0 {
            return Some(Err("Bitmap extra data is not supported".to_owned()));
        }
        let aligned = table & (self.header.cluster_bits.bytes() - 1) == 0 && table != 0;
        let valid = aligned
            && entries != 0
            && entries <= MAX_TABLE
            && flags & !3 == 0
            && kind == 1
            && (9..=31).contains(&granularity)
            && (1..=1023).contains(&name_len);
        if !valid {
            return Some(Err(format!("Bitmap '{name}' doesn't satisfy the constraints")));
        }
        let bits = self.header.size.div_ceil(1 << granularity);
        let needed = self.header.cluster_bits.clusters(bits.div_ceil(8));
        if entries != needed && flags & 1 == 0 {
            let what =
                format!("Could not read bitmap '{name}' from image: its table has {entries} entries, not {needed}");
            return Some(Err(what));
        }
        Some(Ok((Bitmap { name, table, entries, records: flags & 2 != 0 }, length)))
    }

    fn bitmap_data(&mut self, bitmap: &Bitmap) -> Result<()> {
        let bytes = (bitmap.entries * 8).min(self.file_len);
        let mut table = zeroed(to_usize(bytes))?;
        read_padded(self.storage, &mut table, bitmap.table)
            .doing(|| Doing::Reading(Table::Bitmap(bitmap.name.clone()), None))?;
        for word in table.as_chunks().0 {
            let entry = u64::from_be_bytes(*word);
            let offset = entry & OFFSET;
            let bad = entry & RESERVED != 0
                || (offset != 0 && (entry & 1 != 0 || offset & (self.header.cluster_bits.bytes() - 1) != 0));
            if bad {
                self.say(Severity::Corruption, Kind::BitmapEntry(bitmap.name.clone(), entry));
            } else if offset != 0 {
                let to = Use::BitmapData(bitmap.name.clone());
                self.claim(offset, self.header.cluster_bits.bytes(), to, None);
            }
        }
        Ok(())
    }
}
