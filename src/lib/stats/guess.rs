//! What a content looks like.

/// Magic bytes of file systems and the like: where, what, and whose.
const KNOWN: [(usize, &[u8], &str); 31] = [
    (0x438, b"\x53\xef", "ext superblock"),
    (0, b"\xc0\x3b\x39\x98", "ext journal"),
    (0, b"\x0a\xf3", "ext extent tree"),
    (4, b"\x0c\0\x01\x02.\0\0\0", "ext directory"),
    (0, b"XFSB", "XFS superblock"),
    (0, b"XAGF", "XFS free space"),
    (0, b"XAGI", "XFS inode map"),
    (0, b"XAFL", "XFS free list"),
    (0, b"AB3B", "XFS free space"),
    (0, b"AB3C", "XFS free space"),
    (0, b"IAB3", "XFS inode map"),
    (0, b"FIB3", "XFS inode map"),
    (0, b"BMA3", "XFS extents"),
    (0, b"XDB3", "XFS directory"),
    (0, b"XDD3", "XFS directory"),
    (0, b"XD2B", "XFS directory"),
    (0, b"XD2D", "XFS directory"),
    (0, b"INA\xed", "XFS inodes"),
    (0, b"INA\xff", "XFS inodes"),
    (0, b"IN\x81\xa4", "XFS inodes"),
    (0, b"\xfe\xed\xba\xbe", "XFS log"),
    (3, b"NTFS    ", "NTFS boot sector"),
    (0, b"FILE0\0", "NTFS file records"),
    (0, b"INDX(\0", "NTFS directory"),
    (0, b"RCRD", "NTFS log"),
    (0x40, b"_BHRfS_M", "btrfs superblock"),
    (512, b"LABELONE", "LVM label"),
    (512, b"EFI PART", "partition table"),
    (0, b"LUKS\xba\xbe", "LUKS header"),
    (4086, b"SWAPSPACE2", "swap header"),
    (510, b"\x55\xaa", "boot sector"),
];

/// The longest pattern that is recognised.
const PATTERN: usize = 64;

/// What `content`, which is not all zeros, looks like: a guess for people.
pub(super) fn guess(content: &[u8]) -> String {
    let [first, ..] = content else { return "nothing".to_owned() };
    if content.iter().all(|byte| byte == first) {
        return format!("filled with {first:#04x}");
    }
    let repeats = |length: &usize| content.iter().skip(*length).eq(content.iter().take(content.len() - length));
    if let Some(length) = (2..=PATTERN.min(content.len() / 2)).find(repeats) {
        return format!("pattern of {length} bytes");
    }
    let known = KNOWN.iter().find(|(at, magic, _)| content.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    if let Some((_, _, name)) = known {
        return (*name).to_owned();
    }
    let used = content.len() - content.iter().rev().take_while(|&&byte| byte == 0).count();
    let (head, _) = content.split_at(used);
    if is_text(head) {
        return "text".to_owned();
    }
    if let Some(file) = infer::get(content) {
        return format!("{} file", file.extension().to_ascii_uppercase());
    }
    let counts = content.iter().fold([0_u32; 256], |mut counts, &byte| {
        if let Some(count) = counts.get_mut(usize::from(byte)) {
            *count += 1;
        }
        counts
    });
    let rest = content.len() as u64;
    match u64::from(counts.first().copied().unwrap_or(0)) {
        zeros if zeros * 16 >= rest * 15 => "mostly zeros".to_owned(),
        // Of random bytes no value has much more than its share.
        _ if counts.iter().all(|&count| u64::from(count) <= rest / 64) => "compressed or encrypted".to_owned(),
        _ => "binary data".to_owned(),
    }
}

/// Printable, with line ends and tabs. A character may be cut in two where a cluster begins or ends.
fn is_text(bytes: &[u8]) -> bool {
    let start = bytes.iter().take(3).take_while(|&&byte| byte >> 6 == 0b10).count();
    let (_, bytes) = bytes.split_at(start);
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() => {
            let (whole, _) = bytes.split_at(e.valid_up_to());
            std::str::from_utf8(whole).unwrap_or_default()
        }
        Err(_) => return false,
    };
    !text.is_empty() && !text.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\x0c'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_look_like_what_they_are() {
        let text = "Not much of a text.\n".repeat(3) + "And its end.\n";
        let random: Vec<u8> = (0..4096_u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]).collect();
        let mut superblock = vec![0; 4096];
        superblock[0x438..0x43a].copy_from_slice(b"\x53\xef");
        let mut elf = random.clone();
        elf[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        let mut padded = text.clone().into_bytes();
        padded.resize(4096, 0);
        let mut sparse = vec![0; 4096];
        sparse[5] = 1;
        let cases: [(&[u8], &str); 9] = [
            (&[0xff; 4096], "filled with 0xff"),
            (&[1, 2, 3, 4].repeat(1024), "pattern of 4 bytes"),
            (text.as_bytes(), "text"),
            (&padded, "text"),
            (&superblock, "ext superblock"),
            (&elf, "ELF file"),
            (&random, "compressed or encrypted"),
            (&sparse, "mostly zeros"),
            (&[&sparse[..2000], &random[..2096]].concat(), "binary data"),
        ];
        for (content, expected) in cases {
            assert_eq!(guess(content), expected);
        }
    }
}
