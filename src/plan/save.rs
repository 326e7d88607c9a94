//! Planning of a save: shards, chunks and segments, from the structure of a state dict.

use super::boxes::Description;
use super::cut::{Weight, check_name, cut};
use super::dedup::Merge;
use super::whole::Share;
use crate::ALIGNMENT;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::entries::{BLOCK, FileEntry, SliceEntry, TensorEntry, block_count};
use crate::format::shard::{HeaderTemplate, INDEX, entry_len, index_json, shard_names};
use crate::format::template::TableTemplate;
use crate::state::{self, Aliases, Key, Layout, OPEN, Place, STILL, StateDict, Tensor};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

/// Parameters of a plan besides the structure of the state dict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Bytes per chunk, a multiple of [`ALIGNMENT`].
    pub chunk: u64,
    /// The number of shard files. The plan has more files where headers would be too long.
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
    /// The tensors and boxes to write, in the order of the table: sorted by name and by their begin.
    pub tensors: Vec<Planned>,
    /// The index in `tensors` of each tensor of the state dict. None if another rank writes the tensor.
    pub places: Vec<Option<usize>>,
    /// Boxes that other ranks hold, too: the index in the state dict, and the number of the replica.
    pub replicas: Vec<(usize, u32)>,
    pub table: TableTemplate,
    /// `model.safetensors.index.json`, when there are several shards.
    pub index: Option<Vec<u8>>,
    /// Bytes in all shards, headers included.
    pub length: u64,
    /// The class of each tensor of the state dict.
    pub classes: Vec<u32>,
    /// Name, layout, place and group of each tensor of the state dict.
    names: Vec<(String, Layout, Option<Place>, u32)>,
    aliases: Aliases,
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

/// A tensor or box in the order of the table.
pub(crate) struct Planned {
    /// The number of its tensor among those of all ranks, sorted by name.
    pub number: u32,
    /// Its shard, and its offset in that shard.
    pub shard: usize,
    pub offset: u64,
    pub bytes: u64,
    pub segments: Range<usize>,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Plan({} tensors, {} shards, {} chunks)", self.tensors.len(), self.shards.len(), self.chunks.len())
    }
}

impl Plan {
    /// Plans a save of `state` by one rank. `still` marks the tensors that are taken for frozen, by their
    /// index in the state dict, besides those that the program declared frozen.
    ///
    /// # Errors
    /// `Invalid` when the sizes overflow, boxes do not cover their tensor, or the header of a file would be
    /// longer than readers accept.
    pub fn new(state: &StateDict<'_>, shape: Shape, still: &[bool]) -> Result<Self> {
        if state.tensors.values().any(|tensor| tensor.place.is_some()) {
            if shape.rank.is_some() {
                return Err(Error::invalid("boxes of several ranks are planned from what all of them describe"));
            }
            let (description, order) = Description::of(state, shape.files)?;
            let mut merge = Merge::new(1);
            merge.add(0, &description)?;
            let whole = merge.finish()?;
            return Self::of_share(state, shape, &order, &whole.shares[0]);
        }
        let is_still = |tensor: usize| still.get(tensor).copied().unwrap_or(false);
        let class = |(tensor, t): (usize, &Tensor<'_>)| match t.group {
            OPEN if is_still(tensor) => STILL,
            group => group,
        };
        let item = |tensor| Item { tensor, number: 0, layer: 0, class: class((tensor, &state.tensors[tensor])) };
        Self::build(state, shape, (0..state.len()).map(item).collect(), None)
    }

    /// Plans the part of `state` that one of several ranks writes: its `share`, as computed by [`Merge`].
    /// `order` is the order from [`Description::of`]. The manifest of such a plan lists the boxes of this
    /// rank.
    ///
    /// # Errors
    /// Errors of [`Plan::new`]; `Internal` for the share of another state.
    pub fn of_share(state: &StateDict<'_>, shape: Shape, order: &[usize], share: &Share) -> Result<Self> {
        if order.len() != share.boxes.len() {
            return Err(Error::internal("the share of a rank is that of another state"));
        }
        let mut items: Vec<Item> = Vec::new();
        for (&tensor, part) in order.iter().zip(&share.boxes).filter(|(_, part)| part.writes) {
            let number = part.tensor;
            let layer = items.last().filter(|last| last.number == number).map_or(0, |last| last.layer + 1);
            items.push(Item { tensor, number, layer, class: OPEN });
        }
        let mut plan = Self::build(state, shape, items, Some(share))?;
        let replicas = order.iter().zip(&share.boxes).filter_map(|(&tensor, part)| Some((tensor, part.replica?)));
        plan.replicas = replicas.collect();
        Ok(plan)
    }

    fn build(state: &StateDict<'_>, shape: Shape, mut items: Vec<Item>, share: Option<&Share>) -> Result<Self> {
        let source = State { state, sharded: shape.rank.is_some() || share.is_some_and(|share| share.sharded) };
        let sum = |sum: u64, item: &Item| sum.checked_add(source.bytes(item));
        let total = items.iter().try_fold(0, sum).filter(|&sum| sum <= i64::MAX as u64 / 2);
        let total = total.ok_or_else(|| Error::invalid("the state is too large"))?;

        // Each class has files of its own. Within a class, tensors are sorted by descending element size, so
        // that every tensor is aligned to its elements, and then by name, for a stable order.
        let key = |item: &Item| (item.layer, item.class, Reverse(source.tensor(item).layout.dtype.bitsize()));
        items.sort_by(|a, b| key(a).cmp(&key(b)).then_with(|| source.name_and_at(a).cmp(&source.name_and_at(b))));
        let weights = items.iter().map(|item| source.weight(item, total)).collect::<Result<Vec<_>>>()?;
        let mut parts = cut(&weights, shape.files);
        if parts.len() > shape.files {
            tracing::info!(files = parts.len(), wanted = shape.files, "more files are written than asked for");
        }
        // A step without tensors has one file. An empty share of a sharded step has none: torch's own tools
        // refuse a sharded step with a file without tensors.
        if parts.is_empty() && share.is_none_or(|share| !share.sharded) {
            parts.push(0..0);
        }
        let rank = if source.sharded { share.map(|share| share.rank).or(shape.rank) } else { None };
        let names = shard_names(parts.len(), rank);
        let mut draft = Draft { shape, chunks: Vec::new(), segments: Vec::new(), ranges: Vec::new() };
        let mut shards = Vec::with_capacity(parts.len());
        for (part, name) in parts.into_iter().zip(names) {
            shards.push(draft.shard(&source, &items[part], name, shards.len())?);
        }
        let Draft { chunks, segments, ranges, .. } = draft;

        let mut by_name: Vec<usize> = (0..items.len()).collect();
        by_name.sort_by_key(|&i| source.name_and_at(&items[i]));
        let mut places = vec![None; state.len()];
        by_name.iter().enumerate().for_each(|(place, &i)| places[items[i].tensor] = Some(place));
        let planned = |(place, &i): (usize, &usize)| {
            let Ranges { shard, offset, ref segments } = ranges[i];
            let number = if share.is_some() { items[i].number } else { place as u32 };
            Planned { number, shard, offset, bytes: source.bytes(&items[i]), segments: segments.clone() }
        };
        let tensors: Vec<Planned> = by_name.iter().enumerate().map(planned).collect();
        let mut files: Vec<FileEntry> = shards.iter().map(|s| file(&s.name, s.length, s.header.len())).collect();
        let mut entries: Vec<TensorEntry> = Vec::new();
        for (&i, planned) in by_name.iter().zip(&tensors) {
            source.enter(&items[i], planned, &mut entries);
        }
        let mut index = None;
        if shards.len() > 1 && !source.sharded {
            let location = |t: &TensorEntry| shards[t.slices[0].file].name.as_str();
            let bytes = index_json(total, entries.iter().map(|t| (t.name.as_str(), location(t))))?;
            files.push(file(INDEX, bytes.len() as u64, 0));
            index = Some(bytes);
        }
        let table = match share {
            Some(share) if share.world > 1 => TableTemplate::of_part(&files, &entries)?,
            _ => {
                let aliases = add_aliases(&mut entries, &state.aliases)?;
                TableTemplate::new(&files, &entries, &aliases)?
            }
        };
        let length = shards.iter().map(|s| s.length).sum();
        let mut classes = vec![OPEN; state.len()];
        items.iter().for_each(|item| classes[item.tensor] = item.class);
        let named = |(key, t): (&Key, &Tensor<'_>)| (key.name.clone(), t.layout.clone(), t.place.clone(), t.group);
        let names = state.tensors.iter().map(named).collect();
        let fingerprint = state.fingerprint();
        let replicas = Vec::new();
        let plan = Self {
            shards,
            chunks,
            segments,
            tensors,
            places,
            replicas,
            table,
            index,
            length,
            classes,
            names,
            aliases: state.aliases.clone(),
            fingerprint,
            shape,
        };
        Ok(plan)
    }

    /// Returns the name of a tensor by its index in the state dict.
    pub fn name(&self, tensor: usize) -> &str {
        self.names.get(tensor).map_or("", |(name, ..)| name)
    }

    /// Returns the fingerprint of the states that this plan fits.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Returns the shard of a tensor, by its index in the state dict. None if another rank writes the tensor.
    pub fn shard_of(&self, tensor: usize) -> Option<usize> {
        self.places.get(tensor).copied().flatten().map(|place| self.tensors[place].shard)
    }

    /// Returns the number of bytes of a tensor that this process writes.
    pub fn bytes_of(&self, tensor: usize) -> u64 {
        self.places.get(tensor).copied().flatten().map_or(0, |place| self.tensors[place].bytes)
    }

    /// Whether the tensor shares files only with frozen tensors.
    pub fn is_apart(&self, tensor: usize) -> bool {
        self.classes.get(tensor) == Some(&STILL)
    }

    /// Whether the program declared the tensor frozen, or put it into a group.
    pub fn is_declared(&self, tensor: usize) -> bool {
        self.names.get(tensor).is_some_and(|(.., group)| *group != OPEN)
    }

    /// Returns true if this is a plan of `state`. Host tensors are compared only by fingerprint, which is
    /// fast; [`Plan::check`] compares the rest before anything is read. Device tensors are compared in full,
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
        let same = |((name, layout, place, group), (key, t)): (&(String, _, _, u32), (&Key, &Tensor<'_>))| {
            *name == key.name && *layout == t.layout && *place == t.place && *group == t.group
        };
        let same = self.names.iter().zip(&state.tensors).all(same) && self.aliases == state.aliases;
        if same { Ok(()) } else { Err(Error::internal("two structures of state dicts have the same fingerprint")) }
    }
}

/// Returns a file entry with digests still empty.
fn file(name: &str, length: u64, data: u64) -> FileEntry {
    FileEntry { name: name.into(), length, data, header: Digest::EMPTY, digest: Digest::EMPTY }
}

/// Adds aliases to the tensors of a table, which are sorted by name. Returns the number of each alias and of
/// its holder.
fn add_aliases(tensors: &mut Vec<TensorEntry>, aliases: &Aliases) -> Result<BTreeMap<usize, usize>> {
    let find = |tensors: &[TensorEntry], name: &str| {
        let found = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name));
        found.map_err(|_| Error::internal(format!("an alias has lost its holder tensor={name:?}")))
    };
    let mut added = Vec::with_capacity(aliases.len());
    for (alias, holder) in aliases {
        let TensorEntry { dtype, shape, .. } = tensors[find(tensors, holder)?].clone();
        added.push(TensorEntry { name: alias.clone(), dtype, shape, slices: Vec::new() });
    }
    if added.is_empty() {
        return Ok(BTreeMap::new());
    }
    tensors.append(&mut added);
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    aliases.iter().map(|(alias, holder)| Ok((find(tensors, alias)?, find(tensors, holder)?))).collect()
}

/// A tensor or box that this rank writes.
struct Item {
    /// Its index in the state dict.
    tensor: usize,
    /// The number of its tensor among those of all ranks.
    number: u32,
    /// The number of boxes of the same tensor before this one.
    layer: u32,
    /// Items of different classes go to different files.
    class: u32,
}

/// The state, and whether it is written in the format of a sharded step.
struct State<'s, 'a> {
    state: &'s StateDict<'a>,
    sharded: bool,
}

impl<'s, 'a> State<'s, 'a> {
    fn entry(&self, item: &Item) -> (&'s Key, &'s Tensor<'a>) {
        self.state.tensors.get_index(item.tensor).expect("an index of this dict")
    }

    fn tensor(&self, item: &Item) -> &'s Tensor<'a> {
        self.entry(item).1
    }

    fn bytes(&self, item: &Item) -> u64 {
        self.tensor(item).location.bytes()
    }

    /// Returns the shape of the whole tensor.
    fn global(&self, item: &Item) -> &'s [usize] {
        let tensor = self.tensor(item);
        tensor.place.as_ref().map_or(&tensor.layout.shape[..], |place| &place.global[..])
    }

    /// Returns the shape that is written. A tensor without elements is written once, as a whole.
    fn extent(&self, item: &Item) -> &'s [usize] {
        let (tensor, global) = (self.tensor(item), self.global(item));
        if global.contains(&0) { global } else { &tensor.layout.shape[..] }
    }

    /// Returns the begin of that shape in the tensor.
    fn at(&self, item: &Item) -> state::Shape {
        let global = self.global(item);
        match &self.tensor(item).place {
            Some(place) if !global.contains(&0) => place.at.clone(),
            _ => state::Shape::from(&vec![0; global.len()][..]),
        }
    }

    fn name_and_at(&self, item: &Item) -> (&'s str, &'s [usize]) {
        let (key, tensor) = self.entry(item);
        (key, tensor.place.as_ref().map_or(&[], |place| &place.at[..]))
    }

    fn weight(&self, item: &Item, total: u64) -> Result<Weight> {
        let ((key, tensor), extent) = (self.entry(item), self.extent(item));
        let at = self.sharded.then(|| self.at(item));
        let header = entry_len(key, tensor.layout.dtype, extent, at.as_deref(), total);
        check_name(key, header)?;
        Ok(Weight { layer: item.layer, class: item.class, bytes: self.bytes(item), header })
    }

    /// Adds a slice to the entries of the manifest.
    fn enter(&self, item: &Item, planned: &Planned, entries: &mut Vec<TensorEntry>) {
        let (key, tensor) = self.entry(item);
        let length = planned.bytes;
        let slice = SliceEntry {
            file: planned.shard,
            offset: planned.offset,
            length,
            at: self.at(item).to_vec(),
            shape: self.extent(item).to_vec(),
            digest: Digest::EMPTY,
            blocks: vec![Digest::EMPTY; block_count(length)],
        };
        match entries.last_mut() {
            Some(last) if last.name == key.name => last.slices.push(slice),
            _ => {
                let shape = self.global(item).to_vec();
                let (name, dtype) = (key.name.clone(), tensor.layout.dtype);
                entries.push(TensorEntry { name, dtype, shape, slices: vec![slice] });
            }
        }
    }
}

/// The ranges of the bytes of an item.
struct Ranges {
    shard: usize,
    offset: u64,
    segments: Range<usize>,
}

struct Draft {
    shape: Shape,
    chunks: Vec<ChunkPlan>,
    segments: Vec<Segment>,
    /// The ranges of the items so far.
    ranges: Vec<Ranges>,
}

impl Draft {
    fn shard(&mut self, source: &State<'_, '_>, items: &[Item], name: String, number: usize) -> Result<Shard> {
        let mut end = 0;
        let described = items.iter().map(|item| {
            let (key, tensor) = source.entry(item);
            let begin = end;
            end += source.bytes(item);
            (&**key, tensor.layout.dtype, source.extent(item), begin..end)
        });
        let header = if source.sharded {
            let at: Vec<state::Shape> = items.iter().map(|item| source.at(item)).collect();
            let boxes: Vec<_> = described.zip(&at).map(|((n, d, s, r), at)| (n, d, s, r, &at[..])).collect();
            HeaderTemplate::sharded(boxes)?
        } else {
            HeaderTemplate::new(described)?
        };
        let (first_chunk, first_segment) = (self.chunks.len(), self.segments.len());
        let mut at = 0;
        self.run(number, &mut at, SegmentSource::Header, header.len());
        for item in items {
            let (offset, begin) = (at, self.segments.len());
            self.run(number, &mut at, SegmentSource::Tensor(item.tensor), source.bytes(item));
            self.ranges.push(Ranges { shard: number, offset, segments: begin..self.segments.len() });
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

    /// Regression: kernels read device tensors at offsets of the plan after only its 64-bit fingerprint had
    /// been compared. So a structure with the same fingerprint as the last one was read beyond its end.
    #[test]
    fn a_plan_is_taken_for_tensors_of_a_device_only_if_it_is_theirs() {
        let shape = Shape { chunk: 4096, files: 1, rank: None };
        let (long, mut short) = (state_of(9000), state_of(10));
        let mut plan = Plan::new(&long, shape, &[]).unwrap();
        plan.fingerprint = short.fingerprint();
        assert!(plan.fits(&short, shape), "of the host: compared before it is read");
        assert_eq!(plan.check(&short).unwrap_err().kind(), crate::ErrorKind::Internal);
        short.streams.push(DeviceStream::legacy(0));
        assert!(!plan.fits(&short, shape));
        assert!(Plan::new(&short, shape, &[]).unwrap().fits(&short, shape));
    }

    #[test]
    fn long_names_get_more_files_than_asked_for() {
        let mut state = StateDict::new();
        for i in 0..100 {
            state.tensor(format!("{i}{}", "n".repeat(1 << 20)), vec![0_u8; 4]).unwrap();
        }
        let plan = Plan::new(&state, Shape { chunk: 1 << 20, files: 1, rank: None }, &[]).unwrap();
        assert_eq!(plan.shards.len(), 3);
        assert!(plan.shards.iter().all(|shard| shard.header.len() <= (48 << 20) + 4096));
    }
}
