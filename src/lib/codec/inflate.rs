//! Decompressing the clusters of a file.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Advice, Context, Error, Result, Table};
use crate::format::coding::CompressionType;
use crate::format::compressed::CompressedExtent;
use crate::format::header::Header;
use crate::storage::Storage;
use crate::units::to_usize;

/// Decompresses clusters and remembers the last one, because neighbouring reads often want the same.
#[derive(Default)]
pub(crate) struct Inflater {
    key: Option<(usize, CompressedExtent)>,
    cluster: Vec<u8>,
    compressed: Vec<u8>,
    /// How many of the compressed bytes the cluster needs.
    consumed: usize,
    zlib: Option<Decompress>,
    zstd: Option<Decoder<'static>>,
}

impl Inflater {
    /// Forgets the last cluster: what follows is about another image.
    pub(crate) fn forget(&mut self) {
        self.key = None;
    }

    /// The cluster whose compressed form lies at `extent` of `storage`; `layer` says which file of a chain that is.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Corrupt`] where it does not decompress into a cluster.
    pub(crate) fn cluster(
        &mut self,
        storage: &dyn Storage,
        header: &Header,
        layer: usize,
        extent: CompressedExtent,
    ) -> Result<&[u8]> {
        if self.key != Some((layer, extent)) {
            self.key = None;
            self.cluster.resize(header.cluster_bits.len(), 0);
            // The last sector may lie past the end of the file: a writer need not pad it.
            self.compressed.resize(to_usize(extent.len()), 0);
            let read = storage.read_at(&mut self.compressed, extent.host.0);
            let read = read.reading(Table::Data, extent.host)?;
            self.compressed.truncate(read);
            match header.compression {
                CompressionType::Zlib => self.inflate(),
                CompressionType::Zstd => self.decode_zstd(),
            }
            .ok_or_else(|| {
                Error::corrupt(format!("the compressed data at {:#x} is damaged", extent.host))
                    .at(extent.host.0)
                    .advise(Advice::RestoreOrSalvage)
            })?;
            self.key = Some((layer, extent));
        }
        Ok(&self.cluster)
    }

    /// The compressed bytes of the cluster last asked for, perhaps with a few that follow them.
    pub(crate) fn compressed(&self) -> &[u8] {
        // A decoder may have stopped before it saw the end mark.
        const MARK: usize = 8;
        self.compressed.get(..self.consumed.saturating_add(MARK)).unwrap_or(&self.compressed)
    }

    /// Raw deflate that must fill the cluster; what follows in the last sector is of no interest.
    fn inflate(&mut self) -> Option<()> {
        let zlib = self.zlib.get_or_insert_with(|| Decompress::new(false));
        zlib.reset(false);
        let status = zlib.decompress(&self.compressed, &mut self.cluster, FlushDecompress::Finish).ok()?;
        self.consumed = to_usize(zlib.total_in());
        let full = zlib.total_out() == self.cluster.len() as u64;
        (full && matches!(status, Status::StreamEnd | Status::BufError | Status::Ok)).then_some(())
    }

    /// One or more zstd frames, the last of which ends where the cluster is full (QEMU, qcow2_zstd_decompress).
    fn decode_zstd(&mut self) -> Option<()> {
        if self.zstd.is_none() {
            self.zstd = Some(Decoder::new().ok()?);
        }
        let zstd = self.zstd.as_mut()?;
        zstd.reinit().ok()?;
        let mut input = InBuffer::around(&self.compressed);
        let mut output = OutBuffer::around(self.cluster.as_mut_slice());
        loop {
            let before = (input.pos(), output.pos());
            let hint = zstd.run(&mut input, &mut output).ok()?;
            let full = output.pos() == output.capacity();
            if full && hint == 0 {
                self.consumed = input.pos();
                return Some(());
            }
            if (input.pos(), output.pos()) == before {
                return None;
            }
            if hint == 0 {
                zstd.reinit().ok()?;
            }
        }
    }
}
