//! Reading the content of an image with its chain.

use std::ops::Range;

use super::chain::{Chain, Content, Layer};
use super::chunks::CHUNK;
use super::salvage::Damage;
use crate::codec::Inflater;
use crate::error::{Context, Doing, OrInternal, Result, Table};
use crate::format::coding::CompressionType;
use crate::format::compressed::CompressedExtent;
use crate::image::{Extent, Place};
use crate::storage::{read_padded, will_read};
use crate::units::{ClusterBits, GuestOffset, SECTOR, append, to_usize};

/// Bytes for which the system is told that they are going to be read.
const WORTH_A_CALL: u64 = 256 << 10;

/// A run of guest bytes and where its content is, after the whole chain was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    start: u64,
    len: u64,
    source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Zero,
    /// At `offset` of the file of layer `layer`.
    File {
        layer: usize,
        offset: u64,
    },
    /// In a compressed cluster of layer `layer`, `skip` bytes after its start.
    Compressed {
        layer: usize,
        extent: CompressedExtent,
        skip: u64,
    },
}

impl Segment {
    fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Reads a [`Chain`], and can turn to another one.
pub(super) struct ChainReader<'a> {
    chain: &'a Chain,
    window: u64,
    /// The segments of `mapped`, in order.
    segments: Vec<Segment>,
    mapped: Range<u64>,
    slice: Vec<u8>,
    inflater: Inflater,
}

impl<'a> ChainReader<'a> {
    /// A reader for ascending offsets: it looks up the tables of a whole window at once.
    pub(super) fn sequential(chain: &'a Chain) -> Self {
        Self::new(chain, Self::WINDOW)
    }

    /// A reader for offsets in any order: it looks up what it reads, no more.
    pub(super) fn random(chain: &'a Chain) -> Self {
        Self::new(chain, 1)
    }

    /// The most that is mapped at once, which bounds the memory for segments.
    const WINDOW: u64 = CHUNK;

    fn new(chain: &'a Chain, window: u64) -> Self {
        Self { chain, window, segments: Vec::new(), mapped: 0..0, slice: Vec::new(), inflater: Inflater::default() }
    }

    /// Reads `chain` from now on.
    pub(super) fn turn_to(&mut self, chain: &'a Chain) {
        self.chain = chain;
        self.mapped = 0..0;
        self.inflater.forget();
    }

    /// The parts of `range` (of at most 2 MiB) that are not known to be zeros, in order. All of them are going to be read.
    pub(super) fn data(&mut self, range: Range<u64>) -> Result<impl Iterator<Item = Range<u64>>> {
        self.map(range)?;
        for segment in self.segments.iter().filter(|segment| segment.len >= WORTH_A_CALL) {
            if let Source::File { layer, offset } = segment.source
                && let Some(file) = self.chain.layers.get(layer).and_then(|layer| layer.file.as_ref())
            {
                will_read(&file.file, offset..offset + segment.len);
            }
        }
        Ok(self.segments.iter().filter(|s| s.source != Source::Zero).map(|s| s.start..s.end()))
    }

    /// Fills `buf` with the content from `start`. What lies past the end reads as zeros.
    pub(super) fn read(&mut self, start: u64, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (start, buf);
        // What a raw disk has at an offset lies at that offset; its holes are read as what they are.
        if let [layer] = self.chain.layers.as_slice()
            && let Layer { content: Content::Raw { storage, .. }, path, .. } = layer.as_ref()
            && self.chain.salvage.is_none()
        {
            let read = read_padded(&**storage, rest, at);
            return read.doing(|| Doing::ReadingFile(path.to_owned(), at));
        }
        while !rest.is_empty() {
            if !self.mapped.contains(&at) {
                if at >= self.chain.size() {
                    rest.fill(0);
                    return Ok(());
                }
                let window = at & !(self.window - 1);
                let end = (window + self.window).max((at + rest.len() as u64).min(window + Self::WINDOW));
                self.map(window..end.min(self.chain.size()))?;
            }
            let index = self.segments.partition_point(|s| s.end() <= at);
            let &segment = self.segments.get(index).or_internal("a mapped offset has no segment")?;
            let len = to_usize(segment.end() - at).min(rest.len());
            let (piece, remaining) = rest.split_at_mut(len);
            let chain = self.chain;
            match &chain.salvage {
                None => self.fill(&segment, at - segment.start, piece)?,
                Some(damage) => self.fill_what_can_be(damage, &segment, at - segment.start, piece)?,
            }
            at += len as u64;
            rest = remaining;
        }
        Ok(())
    }

    /// The compressed bytes of the cluster of `bits` that begins at `start`, where that is what an image of the chain has there, of
    /// this kind and of the same size.
    pub(super) fn packed(&mut self, start: u64, bits: ClusterBits, kind: CompressionType) -> Result<Option<&[u8]>> {
        let range = start..start + bits.bytes();
        if range.end > self.chain.size() || self.chain.salvage.is_some() {
            return Ok(None);
        }
        if !self.mapped.contains(&start) || !self.mapped.contains(&(range.end - 1)) {
            self.map(range.clone())?;
        }
        let index = self.segments.partition_point(|s| s.end() <= start);
        let &Segment { start: first, len, source } =
            self.segments.get(index).or_internal("a mapped offset has no segment")?;
        let Source::Compressed { layer, extent, skip: 0 } = source else { return Ok(None) };
        let image = self.chain.image(layer)?;
        let header = image.header();
        if (first, len, header.cluster_bits, header.compression) != (start, bits.bytes(), bits, kind) {
            return Ok(None);
        }
        self.inflater.cluster(image.storage(), header, layer, extent)?;
        Ok(Some(self.inflater.compressed()))
    }

    /// The parts of `range` (of at most 2 MiB) that lie at the same place of the same files in `other`, in order and whole clusters
    /// of `grain`. `other` is a snapshot of the same image with the same files behind it.
    pub(super) fn in_common(
        &mut self,
        other: &'a Chain,
        range: Range<u64>,
        grain: u64,
        common: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        common.clear();
        let (ours, theirs) = (self.chain.size(), other.size());
        // Behind the end of the shorter one they differ; the cluster in which it ends may be another one, too.
        let end = if ours == theirs { range.end } else { range.end.min(ours.min(theirs) & !(grain - 1)) };
        if range.start >= end {
            return Ok(());
        }
        if self.chain.has_tables_of(other, &(range.start..end.min(ours))) {
            common.push(range.start..end);
            return Ok(());
        }
        self.map(range.start..end)?;
        let mut reader = Self::sequential(other);
        reader.map(range.start..end)?;
        let mut others = reader.segments.iter().peekable();
        for ours in &self.segments {
            while let Some(theirs) = others.peek() {
                let (start, stop) = (ours.start.max(theirs.start), ours.end().min(theirs.end()));
                let at = |segment: &Segment| shifted(segment.source, start - segment.start);
                if start < stop && at(ours) == at(theirs) {
                    append(common, start..stop);
                }
                if theirs.end() > ours.end() {
                    break;
                }
                others.next();
            }
        }
        for part in common.iter_mut() {
            *part = part.start.next_multiple_of(grain)..part.end & !(grain - 1);
        }
        common.retain(|part| !part.is_empty());
        Ok(())
    }

    fn map(&mut self, range: Range<u64>) -> Result<()> {
        if self.mapped == range {
            return Ok(());
        }
        self.mapped = 0..0;
        self.segments.clear();
        let chain = self.chain;
        match (map_layer(chain, 0, range.clone(), &mut self.slice, &mut self.segments), &chain.salvage) {
            (Err(_), Some(damage)) => self.map_what_can_be(damage, range.clone())?,
            (result, _) => result?,
        }
        self.mapped = range;
        Ok(())
    }

    /// Maps `range` cluster by cluster, and takes zeros for those whose tables cannot be read or are impossible.
    fn map_what_can_be(&mut self, damage: &Damage, range: Range<u64>) -> Result<()> {
        self.segments.clear();
        let finest = self.chain.finest();
        let mut piece = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = ((at + finest) & !(finest - 1)).min(range.end);
            piece.clear();
            if let Err(error) = map_layer(self.chain, 0, at..end, &mut self.slice, &mut piece) {
                damage.forgive(at..end, error)?;
                piece.clear();
                piece.push(Segment { start: at, len: end - at, source: Source::Zero });
            }
            for segment in &piece {
                push(&mut self.segments, segment.start, segment.len, segment.source);
            }
            at = end;
        }
        Ok(())
    }

    /// As `fill`, with zeros for what cannot be read: sectors, and compressed clusters.
    fn fill_what_can_be(&mut self, damage: &Damage, segment: &Segment, skip: u64, buf: &mut [u8]) -> Result<()> {
        let Err(error) = self.fill(segment, skip, buf) else {
            damage.blank(segment.start + skip, buf);
            return Ok(());
        };
        if matches!(segment.source, Source::Compressed { .. }) {
            buf.fill(0);
            let start = segment.start + skip;
            return damage.forgive(start..start + buf.len() as u64, error);
        }
        let (mut at, mut rest) = (segment.start + skip, buf);
        while !rest.is_empty() {
            let len = to_usize(SECTOR - at % SECTOR).min(rest.len());
            let (sector, remaining) = rest.split_at_mut(len);
            if let Err(error) = self.fill(segment, at - segment.start, sector) {
                sector.fill(0);
                // Whole sectors, so that the passes agree whichever bytes they ask for.
                let start = at - at % SECTOR;
                damage.forgive(start..start + SECTOR, error)?;
            }
            damage.blank(at, sector);
            at += len as u64;
            rest = remaining;
        }
        Ok(())
    }

    fn fill(&mut self, segment: &Segment, skip: u64, buf: &mut [u8]) -> Result<()> {
        let (layer, result) = match segment.source {
            Source::Zero => {
                buf.fill(0);
                return Ok(());
            }
            Source::File { layer, offset } => {
                let storage = self.chain.layer(layer)?.storage();
                let read = read_padded(storage, buf, offset + skip);
                (layer, read.reading(Table::Data, offset + skip))
            }
            Source::Compressed { layer, extent, skip: before } => {
                let image = self.chain.image(layer)?;
                let guest = segment.start + skip;
                let result =
                    self.inflater.cluster(image.storage(), image.header(), layer, extent).and_then(|cluster| {
                        let from = to_usize(before + skip);
                        let source = cluster.get(from..).and_then(|c| c.get(..buf.len()));
                        buf.copy_from_slice(source.or_internal("a segment is longer than its compressed cluster")?);
                        Ok(())
                    });
                (layer, result.doing(|| Doing::Unpacking(GuestOffset(guest))))
            }
        };
        let layer = self.chain.layer(layer)?;
        result.on(&layer.path)
    }
}

/// Appends the segments of `range` as layer `index` and those behind it have them.
fn map_layer(
    chain: &Chain,
    index: usize,
    range: Range<u64>,
    slice: &mut Vec<u8>,
    segments: &mut Vec<Segment>,
) -> Result<()> {
    let Some(layer) = chain.layers.get(index) else {
        push(segments, range.start, range.end - range.start, Source::Zero);
        return Ok(());
    };
    // A backing file shorter than its overlay reads as zeros past its end, whatever lies behind it.
    let inside = range.end.min(layer.size()).max(range.start);
    match &layer.content {
        Content::Raw { storage, .. } => {
            let mut at = range.start;
            while at < inside {
                let data = match storage.next_data(at) {
                    // Reading will tell.
                    Err(_) if chain.salvage.is_some() => Some(at..inside),
                    data => data.map_err(|e| Chain::reading(layer, at, e))?,
                };
                let data = data.map_or(inside..inside, |d| d.start.min(inside)..d.end.min(inside));
                push(segments, at, data.start - at, Source::Zero);
                push(segments, data.start, data.end - data.start, Source::File { layer: index, offset: data.start });
                at = data.end;
            }
        }
        Content::Qcow2(image) => {
            let has_backing = index + 1 < chain.layers.len();
            let mut at = range.start;
            let mut pieces: Vec<(Range<u64>, Option<Source>)> = Vec::new();
            let emit = |extent: Extent| {
                let source = match extent.place {
                    Place::Zero => Some(Source::Zero),
                    Place::Data(host) => Some(Source::File { layer: index, offset: host.0 }),
                    Place::Compressed { extent, skip } => Some(Source::Compressed { layer: index, extent, skip }),
                    Place::Unallocated => (!has_backing).then_some(Source::Zero),
                };
                match pieces.last_mut() {
                    Some((last, None)) if source.is_none() => last.end += extent.len,
                    _ => pieces.push((at..at + extent.len, source)),
                }
                at += extent.len;
            };
            if range.start < inside {
                image.extents(range.start, inside - range.start, slice, emit).on(&layer.path)?;
            }
            for (piece, source) in pieces {
                match source {
                    Some(source) => push(segments, piece.start, piece.end - piece.start, source),
                    None => map_layer(chain, index + 1, piece, slice, segments)?,
                }
            }
        }
    }
    push(segments, inside, range.end - inside, Source::Zero);
    Ok(())
}

fn shifted(source: Source, by: u64) -> Source {
    match source {
        Source::Zero => Source::Zero,
        Source::File { layer, offset } => Source::File { layer, offset: offset + by },
        Source::Compressed { layer, extent, skip } => Source::Compressed { layer, extent, skip: skip + by },
    }
}

/// Appends a segment, merged with the one before it where the two are one piece.
fn push(segments: &mut Vec<Segment>, start: u64, len: u64, source: Source) {
    if len == 0 {
        return;
    }
    if let Some(last) = segments.last_mut()
        && last.end() == start
        && shifted(last.source, last.len) == source
    {
        last.len += len;
        return;
    }
    segments.push(Segment { start, len, source });
}
