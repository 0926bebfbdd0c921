//! What format a file is in, by its first bytes.

use super::format::Format;
use crate::error::{Advice, Error, ErrorKind, Result};

/// The formats that `qemu-img` 10 recognises by content and that are refused here rather than taken for raw disks.
const OTHERS: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
];

/// Bytes that [`probe`] wants to see.
pub(super) const PROBE_LENGTH: usize = 512;

/// The format of a file that begins with `start`. What nothing recognises is raw, as in QEMU.
pub(super) fn probe(start: &[u8]) -> Result<Format> {
    if let [b'Q', b'F', b'I', 0xfb, version @ ..] = start
        && version.first_chunk().is_some_and(|v| u32::from_be_bytes(*v) >= 2)
    {
        return Ok(Format::Qcow2);
    }
    let found = OTHERS.iter().find(|(at, magic, _)| start.get(*at..).is_some_and(|s| s.starts_with(magic)));
    match found {
        None => Ok(Format::Raw),
        Some((_, _, name)) => {
            let what = format!("Image is in {name} format");
            Err(Error::new(ErrorKind::Format, what).advise(Advice::ConvertFormat))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_qcow2_and_raw_are_accepted() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x02").unwrap(), Format::Qcow2);
        assert_eq!(probe(b"").unwrap(), Format::Raw);
        assert_eq!(probe(&[0; 512]).unwrap(), Format::Raw);
        assert!(probe(b"QFI\xfb\0\0\0\x01").unwrap_err().to_string().contains("qcow format"));
        assert!(probe(b"KDMV....").is_err());
    }
}
