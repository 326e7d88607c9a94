//! Planning a save: shards, chunks and segments, from the structure of a state dict.

use crate::ALIGNMENT;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::{BLOCK, FileEntry, SliceEntry, TensorEntry};
use crate::format::shard::{HeaderTemplate, INDEX, MAX_HEADER, index_json, shard_names};
use crate::format::template::TableTemplate;
use crate::state::{Layout, StateDict};
use std::ops::Range;

/// Parameters of a plan besides the structure of the state dict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Bytes per chunk, a multiple of [`ALIGNMENT`].
    pub chunk: u64,
    /// Maximum number of shard files.
    pub files: usize,
    /// The rank of this process, if several ranks write the step.
    pub rank: Option<u32>,
}

/// The plan of a save.
pub(crate) struct Plan {
    pub shards: Vec<Shard>,
    pub chunks: Vec<ChunkPlan>,
    /// The segments in file order, shard after shard.
    pub segments: Vec<Segment>,
    /// The tensors in the order of the table, sorted by name, with the segments of each.
    pub tensors: Vec<Planned>,
    /// The index in `tensors` of each tensor of the state dict.
    pub places: Vec<usize>,
    pub table: TableTemplate,
    /// `model.safetensors.index.json`, when there are several shards.
    pub index: Option<Vec<u8>>,
    /// Bytes in all shards, headers included.
    pub length: u64,
    names: Vec<(String, Layout)>,
    fingerprint: u64,
    shape: Shape,
}

/// A shard file.
pub(crate) struct Shard {
    pub name: String,
    pub header: HeaderTemplate,
    pub length: u64,
    pub chunks: Range<usize>,
    pub segments: Range<usize>,
}

/// A range of a file, staged and written as a unit.
pub(crate) struct ChunkPlan {
    pub shard: usize,
    pub offset: u64,
    pub length: usize,
    pub segments: Range<usize>,
}

/// Part of a header or of a tensor within a chunk. Segments follow each other without gaps.
pub(crate) struct Segment {
    pub source: SegmentSource,
    /// The segment's offset in the header or tensor.
    pub at: u64,
    pub length: usize,
}

/// The header or tensor that a segment is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentSource {
    /// The header of the chunk's shard.
    Header,
    /// The tensor with this index in the state dict.
    Tensor(usize),
}

/// A tensor in the order of the table.
pub(crate) struct Planned {
    pub bytes: u64,
    pub segments: Range<usize>,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Plan({} tensors, {} shards, {} chunks)", self.tensors.len(), self.shards.len(), self.chunks.len())
    }
}

impl Plan {
    /// Plans a save of `state`.
    ///
    /// # Errors
    /// `Invalid` when the sizes overflow, or a header would be longer than readers accept.
    pub fn new(state: &StateDict<'_>, shape: Shape) -> Result<Self> {
        let sizes: Vec<u64> = state.tensors.values().map(|t| t.location.bytes()).collect();
        let total = sizes.iter().try_fold(0_u64, |sum, n| sum.checked_add(*n));
        let total =
            total.filter(|&sum| sum <= i64::MAX as u64 / 2).ok_or_else(|| Error::invalid("the state is too large"))?;

        // By descending element size, so that every tensor is aligned to its elements; then by name, for a
        // stable order.
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        let key = |i: usize| {
            let (name, tensor) = state.tensors.get_index(i).expect("an index of this dict");
            (std::cmp::Reverse(tensor.layout.dtype.bitsize()), name)
        };
        order.sort_by(|&a, &b| key(a).cmp(&key(b)));

        let parts = split(&order, &sizes, total, shape.files);
        let names = shard_names(parts.len(), shape.rank);
        let mut draft = Draft { shape, chunks: Vec::new(), segments: Vec::new(), ranges: vec![0..0; sizes.len()] };
        let mut shards = Vec::with_capacity(parts.len());
        let mut slices = vec![(0, 0); sizes.len()];
        for (part, name) in parts.into_iter().zip(names) {
            let shard = draft.shard(state, &order[part], &sizes, name, shards.len(), &mut slices);
            shards.push(shard.map_err(|error| {
                if error.kind() != ErrorKind::Invalid {
                    return error;
                }
                // About the bytes of an entry without its name.
                let entry = |i: usize| 96 + state.tensors.get_index(i).map_or(0, |(name, _)| name.len());
                let advice = advice(&order, &sizes, total, shape.files, MAX_HEADER, entry);
                let tensors = order.len();
                Error::invalid(format!("{advice} files={} tensors={tensors}", shape.files)).with_source(error)
            })?);
        }
        let Draft { chunks, segments, ranges, .. } = draft;

        let mut by_name: Vec<usize> = (0..sizes.len()).collect();
        by_name.sort_by_key(|&i| state.tensors.get_index(i).expect("an index of this dict").0);
        let entries: Vec<TensorEntry> = by_name.iter().map(|&i| entry(state, i, slices[i], sizes[i])).collect();
        let mut files: Vec<FileEntry> = shards.iter().map(|s| file(&s.name, s.length, s.header.len())).collect();
        let location = |t: &TensorEntry| shards[t.slices[0].file].name.as_str();
        let map = || entries.iter().map(|t| (t.name.as_str(), location(t)));
        let index = (shards.len() > 1 && shape.rank.is_none()).then(|| index_json(total, map())).transpose()?;
        if let Some(index) = &index {
            files.push(file(INDEX, index.len() as u64, 0));
        }
        let table = TableTemplate::new(&files, &entries)?;
        let mut places = vec![0; sizes.len()];
        by_name.iter().enumerate().for_each(|(location, &tensor)| places[tensor] = location);
        let tensors = by_name.into_iter().map(|i| Planned { bytes: sizes[i], segments: ranges[i].clone() }).collect();
        let length = shards.iter().map(|s| s.length).sum();
        let names = state.tensors.iter().map(|(name, t)| (name.clone(), t.layout.clone())).collect();
        let fingerprint = state.fingerprint();
        Ok(Self { shards, chunks, segments, tensors, places, table, index, length, names, fingerprint, shape })
    }

    /// Describes the structure to the other ranks.
    pub fn description(&self) -> Vec<u8> {
        self.fingerprint.to_le_bytes().to_vec()
    }

    /// The name of a tensor by its index in the state dict.
    pub fn name(&self, tensor: usize) -> &str {
        self.names.get(tensor).map_or("", |(name, _)| name)
    }

    /// Returns true if this is a plan of `state`. For host tensors it compares only the fingerprint, which is
    /// fast, and [`Plan::check`] compares the rest before anything is read. It checks device tensors in full,
    /// because devices read them by this plan as soon as it is chosen.
    pub fn fits(&self, state: &StateDict<'_>, shape: Shape) -> bool {
        let alike = self.fingerprint == state.fingerprint() && self.names.len() == state.len() && self.shape == shape;
        alike && (state.streams.is_empty() || self.check(state).is_ok())
    }

    /// Compares every name and layout with `state`.
    ///
    /// # Errors
    /// `Internal` when two structures share a fingerprint.
    pub fn check(&self, state: &StateDict<'_>) -> Result<()> {
        let same = self.names.iter().zip(&state.tensors).all(|((a, layout), (b, t))| a == b && *layout == t.layout);
        if same { Ok(()) } else { Err(Error::internal("two structures of state dicts have the same fingerprint")) }
    }
}

/// Splits `order` into at most `files` runs of about equal bytes, each with at least one tensor; one run if
/// there are no tensors.
fn split(order: &[usize], sizes: &[u64], total: u64, files: usize) -> Vec<Range<usize>> {
    let files = files.clamp(1, order.len().max(1));
    let mut runs = Vec::with_capacity(files);
    let (mut begin, mut sum) = (0, 0_u64);
    for (i, &tensor) in order.iter().enumerate() {
        sum += sizes[tensor];
        let (left, full) =
            (files - runs.len() - 1, u128::from(sum) * files as u128 >= u128::from(total) * (runs.len() as u128 + 1));
        if left > 0 && (full || order.len() - i - 1 == left) {
            runs.push(begin..i + 1);
            begin = i + 1;
        }
    }
    if begin < order.len() || runs.is_empty() {
        runs.push(begin..order.len());
    }
    runs
}

/// Advises what to do about a header longer than `limit`; `entry` returns the header bytes of a tensor. Files
/// are split by bytes, so more files do not always mean fewer tensors in each.
fn advice(
    order: &[usize],
    sizes: &[u64],
    total: u64,
    files: usize,
    limit: usize,
    entry: impl Fn(usize) -> usize,
) -> String {
    let fits = |run: Range<usize>| order[run].iter().map(|&i| entry(i)).sum::<usize>() <= limit;
    let more = std::iter::successors(Some(files * 2), |files| Some(files * 2)).take_while(|files| *files <= 1024);
    match more.into_iter().find(|&files| split(order, sizes, total, files).into_iter().all(fits)) {
        Some(enough) => format!("there are too many tensors for so few files: {enough} are enough"),
        None => "there are too many small tensors, and more files do not help: join them".into(),
    }
}

/// A file entry with digests still empty.
fn file(name: &str, length: u64, data: u64) -> FileEntry {
    FileEntry { name: name.into(), length, data, header: Digest::EMPTY, digest: Digest::EMPTY }
}

fn entry(state: &StateDict<'_>, index: usize, (file, offset): (usize, u64), length: u64) -> TensorEntry {
    let (name, tensor) = state.tensors.get_index(index).expect("an index of this dict");
    let shape = tensor.layout.shape.to_vec();
    let blocks = if length > BLOCK { length.div_ceil(BLOCK) as usize } else { 0 };
    let slice = SliceEntry {
        file,
        offset,
        length,
        at: vec![0; shape.len()],
        shape: shape.clone(),
        digest: Digest::EMPTY,
        blocks: vec![Digest::EMPTY; blocks],
    };
    TensorEntry { name: name.clone(), dtype: tensor.layout.dtype, shape, slices: vec![slice] }
}

struct Draft {
    shape: Shape,
    chunks: Vec<ChunkPlan>,
    segments: Vec<Segment>,
    ranges: Vec<Range<usize>>,
}

impl Draft {
    fn shard(
        &mut self,
        state: &StateDict<'_>,
        order: &[usize],
        sizes: &[u64],
        name: String,
        number: usize,
        slices: &mut [(usize, u64)],
    ) -> Result<Shard> {
        let mut end = 0;
        let header = HeaderTemplate::new(order.iter().map(|&i| {
            let (name, tensor) = state.tensors.get_index(i).expect("an index of this dict");
            let begin = end;
            end += sizes[i];
            (name.as_str(), tensor.layout.dtype, &tensor.layout.shape[..], begin..end)
        }))?;
        let (first_chunk, first_segment) = (self.chunks.len(), self.segments.len());
        let mut at = 0;
        self.run(number, &mut at, SegmentSource::Header, header.len());
        for &i in order {
            slices[i] = (number, at);
            let begin = self.segments.len();
            self.run(number, &mut at, SegmentSource::Tensor(i), sizes[i]);
            self.ranges[i] = begin..self.segments.len();
        }
        let (chunks, segments) = (first_chunk..self.chunks.len(), first_segment..self.segments.len());
        Ok(Shard { name, header, length: at, chunks, segments })
    }

    /// Appends `length` bytes of `from` at offset `at` of the shard, split at the ends of chunks and of
    /// tensor blocks.
    fn run(&mut self, shard: usize, at: &mut u64, source: SegmentSource, length: u64) {
        let mut done = 0;
        while done < length {
            if at.is_multiple_of(self.shape.chunk) {
                let begin = self.segments.len();
                self.chunks.push(ChunkPlan { shard, offset: *at, length: 0, segments: begin..begin });
            }
            let room = self.shape.chunk - *at % self.shape.chunk;
            let piece = room.min(length - done).min(BLOCK - done % BLOCK);
            self.segments.push(Segment { source, at: done, length: piece as usize });
            let chunk = self.chunks.last_mut().expect("pushed at the file's begin");
            chunk.length += piece as usize;
            chunk.segments.end += 1;
            *at += piece;
            done += piece;
        }
    }
}

const _: () = assert!(BLOCK.is_multiple_of(ALIGNMENT as u64));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::DeviceStream;
    use std::sync::Arc;

    fn state_of(bytes: usize) -> StateDict<'static> {
        let mut state = StateDict::new();
        state.tensor("t", Arc::new(vec![0_u8; bytes])).unwrap();
        state
    }

    /// Regression: kernels read device tensors by offsets of the plan when only its 64-bit fingerprint was
    /// compared, so a structure with the same fingerprint as the last was read beyond its end.
    #[test]
    fn a_plan_is_taken_for_tensors_of_a_device_only_if_it_is_theirs() {
        let shape = Shape { chunk: 4096, files: 1, rank: None };
        let (long, mut short) = (state_of(9000), state_of(10));
        let mut plan = Plan::new(&long, shape).unwrap();
        plan.fingerprint = short.fingerprint();
        assert!(plan.fits(&short, shape), "of the host: compared before it is read");
        assert_eq!(plan.check(&short).unwrap_err().kind(), crate::ErrorKind::Internal);
        short.streams.push(DeviceStream::legacy(0));
        assert!(!plan.fits(&short, shape));
        assert!(Plan::new(&short, shape).unwrap().fits(&short, shape));
    }

    /// Regression: the advice for 1.3 million small tensors beside a large one was more files, but files are
    /// split by bytes, so all small tensors stayed in one file.
    #[test]
    fn more_files_are_advised_only_where_they_help() {
        let order: Vec<usize> = (0..10_000).collect();
        let advice = |sizes: &[u64], files| {
            let total = sizes.iter().sum();
            advice(&order, sizes, total, files, 100 * 3000, |_| 100)
        };
        let alike = vec![4; 10_000];
        assert_eq!(advice(&alike, 1), "there are too many tensors for so few files: 4 are enough");
        assert_eq!(advice(&alike, 3), "there are too many tensors for so few files: 6 are enough");
        let mut beside_a_large_one = vec![4; 10_000];
        beside_a_large_one[9_999] = 1 << 40;
        assert!(advice(&beside_a_large_one, 1).contains("more files do not help"));
    }

    #[test]
    fn a_header_that_is_too_long_comes_with_the_advice() {
        let mut state = StateDict::new();
        for i in 0..100 {
            state.tensor(format!("{i}{}", "n".repeat(1 << 20)), vec![0_u8; 4]).unwrap();
        }
        let error = Plan::new(&state, Shape { chunk: 1 << 20, files: 1, rank: None }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().ends_with("2 are enough files=1 tensors=100"), "{error}");
        Plan::new(&state, Shape { chunk: 1 << 20, files: 2, rank: None }).unwrap();
    }
}
