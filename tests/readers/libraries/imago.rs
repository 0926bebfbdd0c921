//! imago, by the author of QEMU's QCOW2 code: what libkrun opens disks with.

use super::said;
use crate::request::Request;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use std::path::Path;

fn open(path: &Path, write: bool) -> Result<FormatAccess<File>, String> {
    let builder = Qcow2::<File>::builder_path(path).write(write);
    Ok(FormatAccess::new(builder.open(PermissiveImplicitOpenGate::default()).map_err(said)?))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let image = open(path, false)?;
    let mut bytes = vec![0xa5; usize::try_from(image.size()).map_err(said)?];
    for (n, piece) in bytes.chunks_mut(1_000_000).enumerate() {
        image.read(piece, n as u64 * 1_000_000).map_err(said)?;
    }
    Ok(bytes)
}

pub(crate) fn write(path: &Path, requests: &[Request]) -> Result<(), String> {
    let mut image = open(path, true)?;
    for request in requests {
        match request {
            Request::Write(at, bytes) => image.write(&bytes[..], *at),
            Request::Zeros(at, length) => image.discard_to_zero(*at, *length),
        }
        .map_err(said)?;
    }
    image.flush().map_err(said)
}
