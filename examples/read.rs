//! Reads a range of the disk that a guest sees, backing files included, and prints it as `qemu-io -c 'read -v'` does.
//!
//! ```sh
//! cargo run --release --example read -- IMAGE                   # size, and where there may be data
//! cargo run --release --example read -- IMAGE OFFSET LENGTH     # in bytes
//! ```

use std::error::Error;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use dedup_img::{Disk, DiskOptions, Reader};

/// What is read at once.
const PIECE: u64 = 1 << 20;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("read: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<(), Box<dyn Error>> {
    match *words {
        [image] => show_data(&open(image)?),
        [image, offset, length] => show_bytes(&open(image)?, offset.parse()?, length.parse()?),
        _ => Err("give an image, or an image, an offset and a length".into()),
    }
}

/// Opens the disk and all files behind it. Names in the image lead nowhere but beside it: see `BackingRule`.
fn open(image: &str) -> dedup_img::Result<Disk> {
    Disk::open(Path::new(image), &DiskOptions::default())
}

/// Prints the ranges that are not known to be zeros.
fn show_data(disk: &Disk) -> Result<(), Box<dyn Error>> {
    println!("{} bytes, {}", disk.size(), disk.format());
    let mut at = 0;
    while let Some(data) = disk.next_data(at)? {
        println!("{:#x} {:#x}", data.start, data.end - data.start);
        at = data.end;
    }
    Ok(())
}

/// Prints `length` bytes from `offset`, sixteen to a line.
fn show_bytes(disk: &Disk, offset: u64, length: u64) -> Result<(), Box<dyn Error>> {
    let end = offset.checked_add(length).filter(|&end| end <= disk.size()).ok_or("the range ends behind the disk")?;
    let mut reader = Reader::sequential(disk);
    let mut out = BufWriter::new(io::stdout().lock());
    let mut piece = Vec::new();
    for start in (offset..end).step_by(usize::try_from(PIECE)?) {
        piece.resize(usize::try_from(PIECE.min(end - start))?, 0);
        reader.read(start, &mut piece)?;
        for (at, row) in (start..).step_by(16).zip(piece.chunks(16)) {
            write!(out, "{at:08x}:  ")?;
            for byte in row {
                write!(out, "{byte:02x} ")?;
            }
            let shown = |byte: &u8| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' };
            writeln!(out, " {}", row.iter().map(shown).collect::<String>())?;
        }
    }
    out.flush()?;
    Ok(())
}
