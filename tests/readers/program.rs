//! Another project's reader or writer of QCOW2 as a program of its own: it may panic, abort or hang without ending the test.
//!
//! `other read LIBRARY IMAGE OUT` reads the whole disk; `other write LIBRARY IMAGE REQUESTS` writes.

mod libraries;
mod request;

use libraries::{imago, qcow2_rs, rust_img};
use std::path::Path;
use std::{env, fs, process};

fn main() {
    let words: Vec<String> = env::args().skip(1).collect();
    let [action, library, image, file] = &words[..] else { panic!("usage: other read|write LIBRARY IMAGE FILE") };
    let image = Path::new(image);
    let requests = || request::decode(&fs::read(file).expect("the requests"));
    let done = match (&action[..], &library[..]) {
        ("read", "imago") => imago::read(image).map(Some),
        ("read", "rust-img") => rust_img::read(image).map(Some),
        ("read", "qcow2-rs") => qcow2_rs::read(image).map(Some),
        ("write", "imago") => imago::write(image, &requests()).map(|()| None),
        ("write", "rust-img") => rust_img::write(image, &requests()).map(|()| None),
        ("write", "qcow2-rs") => qcow2_rs::write(image, &requests()).map(|()| None),
        _ => panic!("neither {action} nor {library} is known"),
    };
    match done {
        Ok(Some(disk)) => fs::write(file, disk).expect("the disk's copy"),
        Ok(None) => {}
        Err(error) => {
            eprintln!("{error}");
            process::exit(1);
        }
    }
}
