//! qcow2-rs, which ublk's userspace servers open disks with.

use super::said;
use crate::request::Request;
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use std::path::Path;
use tokio::runtime::Builder;

/// Opens the image; a backing file's name is looked up from the working directory.
async fn open(path: &Path, read_only: bool) -> Result<Qcow2Dev<Qcow2IoSync>, String> {
    let params = Qcow2DevParams::new(9, None, None, read_only, false);
    let image = qcow2_setup_dev_sync(path, &params).map_err(said)?;
    image.qcow2_prep_io().await.map_err(said)?;
    Ok(image)
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    Builder::new_current_thread().build().map_err(said)?.block_on(async {
        let image = open(path, true).await?;
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < image.info.virtual_size() {
            let at = bytes.len() as u64;
            let mut piece = Qcow2IoBuf::<u8>::new((image.info.virtual_size() - at).min(1 << 20) as usize);
            let done = image.read_at(&mut piece, at).await.map_err(said)?;
            if done == 0 {
                return Err(format!("nothing is read at {at}"));
            }
            bytes.extend_from_slice(&piece[..done]);
        }
        Ok(bytes)
    })
}

pub(crate) fn write(path: &Path, requests: &[Request]) -> Result<(), String> {
    Builder::new_current_thread().build().map_err(said)?.block_on(async {
        let image = open(path, false).await?;
        let written = async {
            for request in requests {
                match request {
                    Request::Write(at, bytes) => {
                        let mut aligned = Qcow2IoBuf::<u8>::new(bytes.len());
                        aligned.copy_from_slice(bytes);
                        image.write_at(&aligned, *at).await.map_err(said)?;
                    }
                    Request::Zeros(..) => unreachable!("it has no request for zeros"),
                }
            }
            image.flush_meta().await.map_err(said)
        };
        let written = written.await;
        if written.is_err() {
            // It panics when it is dropped with something unwritten, which would hide the error.
            std::mem::forget(image);
        }
        written
    })
}
