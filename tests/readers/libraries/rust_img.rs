//! rust-img-qcow2, a reader and writer for file system tools.

use super::said;
use crate::request::Request;
use img_qcow2::Qcow2Reader;
use std::path::Path;

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let image = Qcow2Reader::open(path).map_err(said)?;
    let mut bytes = vec![0xa5; usize::try_from(image.virtual_size()).map_err(said)?];
    for (n, piece) in bytes.chunks_mut(1_000_000).enumerate() {
        image.read_at(n as u64 * 1_000_000, piece).map_err(said)?;
    }
    Ok(bytes)
}

pub(crate) fn write(path: &Path, requests: &[Request]) -> Result<(), String> {
    let image = Qcow2Reader::open_rw(path).map_err(said)?;
    for request in requests {
        match request {
            Request::Write(at, bytes) => image.write_at(*at, bytes).map_err(said)?,
            Request::Zeros(..) => unreachable!("it has no request for zeros"),
        }
    }
    image.flush().map_err(said)
}
