//! Assigns boxes to the ranks that write them: checks the descriptions of all ranks against each other and
//! merges them.
//!
//! The result depends only on the descriptions, so every rank that computes it gets the same result.

use super::boxes::{BoxOf, Described, Description, ranges};
use super::cut::{Weight, cut};
use super::whole::{NAMED, Part, Replica, Share, Whole, WholeTensor, Written};
use crate::error::{Error, Result};
use crate::format::shard::{entry_len, shard_names};
use crate::format::tiling::{self, Fault, MAX_SPLIT};
use crate::state::{Dtype, Layout};
use foldhash::fast::FixedState;
use std::cmp::Reverse;
use std::collections::HashMap;

/// Merges descriptions rank by rank, so that only one of them is in memory at a time.
#[derive(Debug)]
pub struct Merge {
    tensors: Vec<Held>,
    by_name: HashMap<String, usize, FixedState>,
    /// For each rank, the number of files that it wants and the number of its boxes.
    ranks: Vec<Option<(u32, u32)>>,
}

/// A tensor and all of its boxes.
#[derive(Debug)]
struct Held {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    alias_of: Option<String>,
    /// The rank that described it first.
    first: u32,
    /// For each box, a rank and the number of the box in that rank's description.
    holders: Vec<(u32, u32)>,
    /// The begin and extent of each box.
    coordinates: Vec<usize>,
}

impl Merge {
    /// Makes a merge of the descriptions of `world` ranks.
    pub fn new(world: u32) -> Self {
        Self { tensors: Vec::new(), by_name: HashMap::default(), ranks: vec![None; world as usize] }
    }

    /// Adds the description of `rank`.
    ///
    /// # Errors
    /// `Invalid`, with the tensor, both ranks and both statements, if the description disagrees with an
    /// earlier one; `Internal` for a number that is no rank, or that was added before.
    pub fn add(&mut self, rank: u32, description: &Description) -> Result<()> {
        match self.ranks.get_mut(rank as usize) {
            Some(free @ None) => {
                let boxes: usize = description.tensors.iter().map(|t| t.boxes.len()).sum();
                *free = Some((description.files, u32::try_from(boxes).unwrap_or(u32::MAX)));
            }
            _ => return Err(Error::internal("a rank described its tensors twice, or does not exist").with_rank(rank)),
        }
        let mut number = 0;
        for tensor in &description.tensors {
            let held = self.held(rank, tensor)?;
            for BoxOf { at, extent } in &tensor.boxes {
                held.holders.push((rank, number));
                held.coordinates.extend_from_slice(at);
                held.coordinates.extend_from_slice(extent);
                number += 1;
            }
        }
        Ok(())
    }

    fn held(&mut self, rank: u32, tensor: &Described) -> Result<&mut Held> {
        let Described { name, dtype, shape, alias_of, .. } = tensor;
        let index = match self.by_name.get(name) {
            Some(&index) => index,
            None => {
                let (name, shape, alias_of) = (name.clone(), shape.clone(), alias_of.clone());
                self.by_name.insert(name.clone(), self.tensors.len());
                let (holders, coordinates) = (Vec::new(), Vec::new());
                let held = Held { name, dtype: *dtype, shape, alias_of, first: rank, holders, coordinates };
                self.tensors.push(held);
                self.tensors.len() - 1
            }
        };
        let held = &mut self.tensors[index];
        if (held.dtype, &held.shape, &held.alias_of) != (*dtype, shape, alias_of) {
            let says = |dtype: Dtype, shape: &[usize], alias: &Option<String>| match alias {
                None => format!("{dtype}{shape:?}"),
                Some(of) => format!("{dtype}{shape:?} alias_of={of:?}"),
            };
            let (there, here) = (says(held.dtype, &held.shape, &held.alias_of), says(*dtype, shape, alias_of));
            let what = "ranks disagree about a tensor";
            let first = held.first;
            return Err(Error::invalid(format!("{what} tensor={name:?} rank_{first}={there} rank_{rank}={here}"))
                .with_ranks([first, rank]));
        }
        Ok(held)
    }

    /// Checks that the boxes of each tensor cover the tensor, each element once. Assigns every box to one of
    /// the ranks that hold it.
    ///
    /// # Errors
    /// `Invalid`, with the tensor, the ranks and the box, where boxes overlap without being equal, or leave a
    /// hole. `Invalid` also for an alias whose tensor is missing or has another dtype or shape. `Internal`,
    /// with the ranks that were not added.
    pub fn finish(mut self) -> Result<Whole> {
        let missing = |(rank, of): (usize, &Option<_>)| if of.is_none() { Some(rank as u32) } else { None };
        let absent: Vec<u32> = self.ranks.iter().enumerate().filter_map(missing).collect();
        if !absent.is_empty() {
            return Err(Error::internal("ranks did not describe their tensors").with_ranks(absent));
        }
        self.tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        self.by_name = self.tensors.iter().enumerate().map(|(i, held)| (held.name.clone(), i)).collect();
        let world = self.ranks.len() as u32;
        let mut groups = Vec::new();
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for (number, held) in self.tensors.iter().enumerate() {
            let alias_of = self.holder(held)?;
            if alias_of.is_none() {
                groups.extend(held.groups(number, world)?);
            }
            let (name, dtype, shape) = (held.name.clone(), held.dtype, held.shape.clone());
            tensors.push(WholeTensor { name, dtype, shape, alias_of, boxes: Vec::new() });
        }
        let several = |t: &[Group]| t.len() > 1;
        let sharded = world > 1 || groups.chunk_by(|a, b| a.tensor == b.tensor).any(several);
        let writers = assign(&groups, world);
        Ok(self.shares(tensors, groups, &writers, sharded))
    }

    /// Returns the number of the tensor that an alias stands for.
    fn holder(&self, held: &Held) -> Result<Option<u32>> {
        let Some(of) = &held.alias_of else { return Ok(None) };
        let target = self.by_name.get(of).map(|&i| (i, &self.tensors[i]));
        match target {
            Some((i, t)) if t.alias_of.is_none() && (t.dtype, &t.shape) == (held.dtype, &held.shape) => {
                Ok(Some(i as u32))
            }
            _ => {
                let what = "an alias does not stand for a tensor of its dtype and shape";
                let (name, dtype, shape) = (&held.name, held.dtype, &held.shape);
                let text = format!("{what} tensor={name:?} alias_of={of:?} dtype={dtype} shape={shape:?}");
                Err(Error::invalid(text).with_rank(held.first))
            }
        }
    }

    /// Numbers the files of all ranks, and assigns files to ranks and boxes.
    fn shares(self, mut tensors: Vec<WholeTensor>, groups: Vec<Group>, writers: &[usize], sharded: bool) -> Whole {
        let world = self.ranks.len() as u32;
        let share = |(rank, files): (usize, &Option<(u32, u32)>)| {
            let boxes = files.map_or(0, |(_, boxes)| boxes);
            Share { rank: rank as u32, world, sharded, first_file: 0, boxes: vec![Part::default(); boxes as usize] }
        };
        let mut shares: Vec<Share> = self.ranks.iter().enumerate().map(share).collect();
        for (held, tensor) in self.tensors.iter().zip(0..) {
            for &(rank, number) in &held.holders {
                shares[rank as usize].boxes[number as usize].tensor = tensor;
            }
        }
        let mut replicas: Vec<Replica> = Vec::new();
        let mut index = 0;
        for (i, group) in groups.iter().enumerate() {
            index = if i > 0 && groups[i - 1].tensor == group.tensor { index + 1 } else { 0 };
            if group.holders.len() > 1 {
                for &(rank, number) in &group.holders {
                    shares[rank as usize].boxes[number as usize].replica = Some(replicas.len() as u32);
                }
                let ranks = group.holders.iter().map(|&(rank, _)| rank).collect();
                replicas.push(Replica { tensor: group.tensor as u32, index, ranks });
            }
        }
        let mut of_rank: Vec<Vec<(u32, usize)>> = vec![Vec::new(); world as usize];
        for (i, (group, &writer)) in groups.iter().zip(writers).enumerate() {
            let (rank, number) = group.holders[writer];
            shares[rank as usize].boxes[number as usize].writes = true;
            let mine = &mut of_rank[rank as usize];
            let layer = match mine.last() {
                Some(&(layer, before)) if groups[before].tensor == group.tensor => layer + 1,
                _ => 0,
            };
            mine.push((layer, i));
        }
        let mut files = Vec::new();
        let mut file_of = vec![0; groups.len()];
        for ((share, mut mine), wanted) in shares.iter_mut().zip(of_rank).zip(&self.ranks) {
            mine.sort_by_key(|&(layer, i)| (layer, Reverse(tensors[groups[i].tensor].dtype.bitsize()), i));
            let total = mine.iter().map(|&(_, i)| groups[i].bytes).sum();
            let weigh = |&(layer, i): &(u32, usize)| {
                let (group, tensor) = (&groups[i], &tensors[groups[i].tensor]);
                let at = sharded.then_some(&group.place.at[..]);
                let header = entry_len(&tensor.name, tensor.dtype, &group.place.extent, at, total);
                Weight { layer, class: 0, bytes: group.bytes, header }
            };
            let weights: Vec<Weight> = mine.iter().map(weigh).collect();
            let runs = cut(&weights, wanted.map_or(1, |(files, _)| files as usize));
            share.first_file = files.len() as u32;
            let named =
                if sharded { shard_names(runs.len(), Some(share.rank)) } else { shard_names(runs.len().max(1), None) };
            files.extend(named);
            for (run, file) in runs.into_iter().zip(share.first_file..) {
                mine[run].iter().for_each(|&(_, i)| file_of[i] = file);
            }
        }
        for ((group, &writer), file) in groups.into_iter().zip(writers).zip(file_of) {
            let rank = group.holders[writer].0;
            tensors[group.tensor].boxes.push(Written { place: group.place, rank, file });
        }
        Whole { files, tensors, shares, replicas }
    }
}

/// A box, and the ranks that hold it.
struct Group {
    tensor: usize,
    place: BoxOf,
    bytes: u64,
    /// For each rank that holds the box, in ascending order: the rank, and the number of the box in its
    /// description.
    holders: Vec<(u32, u32)>,
}

impl Held {
    fn place(&self, index: usize) -> (&[usize], &[usize]) {
        let dims = self.shape.len();
        self.coordinates[2 * dims * index..2 * dims * (index + 1)].split_at(dims)
    }

    /// Returns the boxes to write, each with its holders.
    fn groups(&self, tensor: usize, world: u32) -> Result<Vec<Group>> {
        let bytes = |extent: &[usize]| Layout::new(self.dtype, extent).bytes();
        let group = |at: &[usize], extent: &[usize], holders: Vec<(u32, u32)>| {
            let place = BoxOf { at: at.into(), extent: extent.into() };
            Ok(Group { tensor, place, bytes: bytes(extent)?, holders })
        };
        let empty = |extent: &[usize]| extent.contains(&0);
        if empty(&self.shape) {
            // The tensor is written once, as a whole: torch's reader takes the tensor's shape from there.
            let Some(lowest) = self.holders.iter().min() else { return Ok(Vec::new()) };
            return Ok(vec![group(&vec![0; self.shape.len()], &self.shape, vec![*lowest])?]);
        }
        // torch's reader keeps one box for each begin. So an empty box could hide a full one with the same
        // begin.
        let mut order: Vec<usize> = (0..self.holders.len()).filter(|&i| !empty(self.place(i).1)).collect();
        order.sort_unstable_by_key(|&i| (self.place(i), self.holders[i]));
        let same: Vec<&[usize]> = order.chunk_by(|&a, &b| self.place(a) == self.place(b)).collect();
        let boxes = same.iter().map(|same| self.place(same[0]));
        if let Err(fault) = tiling::check(&self.shape, boxes) {
            return Err(self.refuse(&fault, &order, world));
        }
        let holders = |same: &[usize]| {
            let mut holders: Vec<(u32, u32)> = same.iter().map(|&i| self.holders[i]).collect();
            holders.dedup_by_key(|(rank, _)| *rank);
            holders
        };
        same.into_iter()
            .map(|same| {
                let (at, extent) = self.place(same[0]);
                group(at, extent, holders(same))
            })
            .collect()
    }

    /// Returns the error that names the overlapping boxes and their holders, or the missing box.
    fn refuse(&self, fault: &Fault, order: &[usize], world: u32) -> Error {
        let about = format!("tensor={:?} dtype={} shape={:?}", self.name, self.dtype, self.shape);
        let (text, indices) = match fault {
            Fault::Split(dims) => {
                let what = "boxes split more dimensions of a tensor than readers take";
                (format!("{what} {about} split={dims} limit={MAX_SPLIT}"), order.to_vec())
            }
            Fault::Overlap(point) => {
                let holds = |i: &&usize| contains(self.place(**i), point);
                let there: Vec<usize> = order.iter().filter(holds).copied().collect();
                let first = there.first().map(|&i| self.place(i));
                let other = there.iter().map(|&i| self.place(i)).find(|place| Some(*place) != first);
                let show = |place: Option<(&[usize], &[usize])>| place.map_or_else(String::new, |p| ranges(p.0, p.1));
                let what = "boxes of a tensor overlap and are not the same";
                (format!("{what} {about} box={} other_box={}", show(first), show(other)), there)
            }
            Fault::Hole(point) => {
                let extent = self.hole(point, order);
                let what = if world == 1 {
                    "this executor saves for one rank, and its boxes do not cover a tensor"
                } else {
                    "no rank holds a part of a tensor"
                };
                (format!("{what} {about} missing_box={}", ranges(point, &extent)), order.to_vec())
            }
        };
        let error = Error::invalid(text);
        if world == 1 {
            return error;
        }
        let mut ranks: Vec<u32> = indices.iter().map(|&i| self.holders[i].0).collect();
        ranks.dedup();
        ranks.truncate(NAMED);
        error.with_ranks(ranks)
    }

    /// Returns the extent of a hole that begins at `point`, as far as the hole is a box.
    fn hole(&self, point: &[usize], order: &[usize]) -> Vec<usize> {
        let mut extent = vec![1; point.len()];
        for d in (0..point.len()).rev() {
            let meets = |(at, size): &(&[usize], &[usize])| {
                at[d] > point[d]
                    && (0..point.len()).all(|e| e == d || at[e] < point[e] + extent[e] && point[e] < at[e] + size[e])
            };
            let next = order.iter().map(|&i| self.place(i)).filter(meets).map(|(at, _)| at[d]).min();
            extent[d] = next.unwrap_or(self.shape[d]) - point[d];
        }
        extent
    }
}

fn contains((at, extent): (&[usize], &[usize]), point: &[usize]) -> bool {
    point.iter().zip(at.iter().zip(extent)).all(|(p, (at, extent))| (*at..at + extent).contains(p))
}

/// Merges the encoded descriptions of all ranks, in the order of ranks. Returns the step, and the encoded
/// share of each rank. Only one description is decoded at a time.
///
/// # Errors
/// Errors of [`Description::decode`], with the rank, of [`Merge::add`] and of [`Merge::finish`].
pub fn share_out(descriptions: impl ExactSizeIterator<Item = Vec<u8>>) -> Result<(Whole, Vec<Vec<u8>>)> {
    let mut merge = Merge::new(descriptions.len() as u32);
    for (bytes, rank) in descriptions.zip(0..) {
        let description = Description::decode(&bytes).map_err(|error| error.with_rank(rank))?;
        merge.add(rank, &description)?;
    }
    let whole = merge.finish()?;
    let shares = whole.shares.iter().map(Share::encode).collect::<Result<_>>()?;
    Ok((whole, shares))
}

/// Chooses the writer of each box, as an index into its holders. Boxes that several ranks hold are assigned
/// in order of size, the largest first, to the holder with the fewest bytes so far.
fn assign(groups: &[Group], world: u32) -> Vec<usize> {
    let mut load = vec![0_u64; world as usize];
    let mut writers = vec![0; groups.len()];
    let (single, mut several): (Vec<usize>, Vec<usize>) =
        (0..groups.len()).partition(|&i| groups[i].holders.len() == 1);
    for i in single {
        load[groups[i].holders[0].0 as usize] += groups[i].bytes;
    }
    several.sort_by_key(|&i| (Reverse(groups[i].bytes), i));
    for i in several {
        let least = groups[i].holders.iter().enumerate().min_by_key(|(_, (rank, _))| (load[*rank as usize], *rank));
        if let Some((writer, (rank, _))) = least {
            writers[i] = writer;
            load[*rank as usize] += groups[i].bytes;
        }
    }
    writers
}
