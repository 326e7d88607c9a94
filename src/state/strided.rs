//! Copies between packed bytes and elements that lie at strides.
//!
//! The dimensions of a tensor are merged into as few as possible around *runs*: bytes that are side by side
//! in memory. Any range of the packed tensor consists of a few *blocks* that are whole in their inner
//! dimensions. Loops copy a block, and begin with the dimension that is nearest in each memory.
//!
//! # Safety argument
//! Addresses are computed from sizes and strides. The callers of [`Strided::gather`] and [`Strided::scatter`]
//! promise memory at every element, and [`rearrange`] checks its slices. A block has no index outside its
//! tensor.
#![expect(unsafe_code, reason = "copies between raw memory and packed bytes; argument above")]

use smallvec::{SmallVec, smallvec};
use std::ops::Range;

/// Sizes of dimensions and their strides in bytes, outermost first.
pub(crate) type Dims = SmallVec<[(u64, i64); 4]>;

/// Merges dimensions that one stride walks through. Dimensions of size 1 are dropped.
pub(crate) fn merged(shape: &[usize], strides: &[i64]) -> Dims {
    let mut dims = Dims::new();
    for (&size, &stride) in shape.iter().zip(strides).filter(|(size, _)| **size != 1) {
        let size = size as u64;
        match dims.last_mut() {
            Some((outer, step)) if i64::try_from(size).is_ok_and(|n| stride.checked_mul(n) == Some(*step)) => {
                (*outer, *step) = (outer.saturating_mul(size), stride);
            }
            _ => dims.push((size, stride)),
        }
    }
    dims
}

/// Returns true if no two elements of `item` bytes overlap. Dimensions that interleave count as overlapping:
/// a stride must step over all elements of the dimensions with shorter strides.
pub(crate) fn lie_apart(item: usize, shape: &[usize], strides: &[i64]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut dims = merged(shape, strides);
    dims.sort_unstable_by_key(|(_, stride)| stride.unsigned_abs());
    let mut reach = Some(item as u64);
    dims.iter().all(|&(size, stride)| {
        let stride = stride.unsigned_abs();
        let beyond = reach.is_some_and(|reach| stride >= reach);
        reach = (size - 1).checked_mul(stride).and_then(|last| last.checked_add(reach?));
        beyond && reach.is_some_and(|reach| i64::try_from(reach).is_ok())
    })
}

/// The elements of a tensor in memory, as runs of bytes at strides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Strided {
    /// The length of a run.
    run: usize,
    /// Sizes and strides of the dimensions around the runs, outermost first.
    dims: SmallVec<[(usize, isize); 4]>,
    /// The length of the packed tensor.
    len: usize,
}

impl Strided {
    /// Elements of `item` bytes at `strides`, in bytes. The size of the packed tensor must not overflow.
    pub fn new(item: usize, shape: &[usize], strides: &[i64]) -> Self {
        if shape.contains(&0) {
            return Self { run: 0, dims: SmallVec::new(), len: 0 };
        }
        let (mut run, mut dims) = (item, merged(shape, strides));
        if let Some(&(size, stride)) = dims.last()
            && stride == item as i64
        {
            dims.pop();
            run = item * size as usize;
        }
        let dims: SmallVec<_> = dims.iter().map(|&(size, stride)| (size as usize, stride as isize)).collect();
        let len = dims.iter().fold(run, |len, (size, _)| len * size);
        Self { run, dims, len }
    }

    /// The length of the packed tensor in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies the bytes `range` of the packed tensor from memory to `to`. `from` is the address of the
    /// element with all indices 0.
    ///
    /// # Safety
    /// Every element is readable, and as many bytes as `range` has are writable at `to`, which is apart from
    /// the elements.
    pub unsafe fn gather(&self, from: *const u8, range: Range<usize>, to: *mut u8) {
        let start = range.start;
        self.blocks(range, |block| {
            let steps = block.axes.iter().map(|axis| Step { size: axis.size, from: axis.strided, to: axis.packed });
            let (from, to) = (from.wrapping_offset(block.place), to.wrapping_add(block.at - start));
            // SAFETY: a block is within the range and the tensor; the caller promises both.
            unsafe { copy(from, to, block.run, steps.collect()) };
        });
    }

    /// Copies bytes from `from` to the places of the bytes `range` of the packed tensor. `to` is the address
    /// of the element with all indices 0.
    ///
    /// # Safety
    /// Every element is writable, and as many bytes as `range` has are readable at `from`, which is apart
    /// from the elements.
    pub unsafe fn scatter(&self, from: *const u8, range: Range<usize>, to: *mut u8) {
        let start = range.start;
        self.blocks(range, |block| {
            let steps = block.axes.iter().map(|axis| Step { size: axis.size, from: axis.packed, to: axis.strided });
            let (from, to) = (from.wrapping_add(block.at - start), to.wrapping_offset(block.place));
            // SAFETY: as in `gather`.
            unsafe { copy(from, to, block.run, steps.collect()) };
        });
    }

    /// Passes the blocks of `range` to `each`, in order. There are at most two blocks for each dimension, and
    /// two parts of runs.
    pub fn blocks(&self, range: Range<usize>, mut each: impl FnMut(Block)) {
        let (mut at, end) = (range.start, range.end.min(self.len));
        while at < end {
            let block = self.block(at, end - at);
            at += block.axes.iter().fold(block.run, |len, axis| len * axis.size);
            each(block);
        }
    }

    /// Returns the longest block of at most `left` bytes that begins at byte `at` of the packed tensor.
    fn block(&self, at: usize, left: usize) -> Block {
        let Self { run, dims, .. } = self;
        let (index, within) = (at / run, at % run);
        let (mut place, mut rest) = (within as isize, index);
        for (size, stride) in dims.iter().rev() {
            place = place.wrapping_add(stride.wrapping_mul((rest % size) as isize));
            rest /= size;
        }
        let (runs, mut axes) = (left / run, SmallVec::new());
        if within > 0 || runs == 0 {
            return Block { at, place, run: left.min(run - within), axes };
        }
        // The outermost dimension of which the block has whole indices, and the runs in one index of it.
        let (mut level, mut inner) = (dims.len(), 1);
        while let Some(next) = level.checked_sub(1) {
            let (size, stride) = dims[next];
            let whole = inner * size;
            if next > 0 && index.is_multiple_of(whole) && runs >= whole {
                axes.push(Axis { size, packed: (inner * run) as isize, strided: stride });
                (level, inner) = (next, whole);
                continue;
            }
            let size = (size - index / inner % size).min(runs / inner);
            axes.push(Axis { size, packed: (inner * run) as isize, strided: stride });
            break;
        }
        axes.retain(|axis| axis.size > 1);
        Block { at, place, run: *run, axes }
    }
}

/// A part of a tensor: runs, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// The offset of its first byte in the packed tensor.
    pub at: usize,
    /// The offset of its first byte in memory, from the element with all indices 0.
    pub place: isize,
    /// The length of a run.
    pub run: usize,
    /// Its dimensions around the runs, innermost first.
    pub axes: SmallVec<[Axis; 4]>,
}

/// A dimension of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    pub size: usize,
    /// The stride in the packed tensor.
    pub packed: isize,
    /// The stride in memory.
    pub strided: isize,
}

/// A dimension of a copy, and its strides on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub size: usize,
    pub from: isize,
    pub to: isize,
}

/// Copies runs of `run` bytes from `from` to `to`. The first run is at `first` in `from`, and at the
/// beginning of `to`. Returns false, and copies nothing, if a run is outside either slice.
pub(crate) fn rearrange(from: &[u8], first: usize, to: &mut [u8], run: usize, steps: SmallVec<[Step; 4]>) -> bool {
    let inside = |first: usize, len: usize, stride: &dyn Fn(&Step) -> isize| {
        let (mut low, mut high) = (first as i128, first as i128 + run as i128);
        for step in &steps {
            let last = stride(step) as i128 * (step.size as i128 - 1);
            (low, high) = (low + last.min(0), high + last.max(0));
        }
        low >= 0 && high <= len as i128
    };
    let inside = inside(first, from.len(), &|step| step.from) && inside(0, to.len(), &|step| step.to);
    if inside && steps.iter().all(|step| step.size > 0) {
        // SAFETY: every run is inside its slice, and the slices are apart.
        unsafe { copy(from.as_ptr().wrapping_add(first), to.as_mut_ptr(), run, steps) };
    }
    inside
}

/// Extent of a tile in the dimension that is nearest where bytes are read, and where they are written.
const TILE: (usize, usize) = (64, 16);

/// Copies runs of `run` bytes, in whatever order is fastest.
///
/// # Safety
/// The runs at `from` and all its steps are readable, those at `to` writable, and the two are apart.
unsafe fn copy(from: *const u8, to: *mut u8, run: usize, mut steps: SmallVec<[Step; 4]>) {
    let mut nearest = |distance: fn(&Step) -> isize| {
        let nearest = (0..steps.len()).min_by_key(|&i| distance(&steps[i]).unsigned_abs());
        nearest.map_or(Step { size: 1, from: 0, to: 0 }, |i| steps.swap_remove(i))
    };
    let inner = nearest(|step| step.to);
    let outer = nearest(|step| step.from);
    let plane = match run {
        1 => plane::<1>,
        2 => plane::<2>,
        4 => plane::<4>,
        8 => plane::<8>,
        16 => plane::<16>,
        _ => plane::<0>,
    };
    let (mut from, mut to) = (from, to);
    let mut index: SmallVec<[usize; 4]> = smallvec![0; steps.len()];
    'next: loop {
        // SAFETY: as the caller promises.
        unsafe { plane(from, to, run, outer, inner) };
        for (index, step) in index.iter_mut().zip(&steps) {
            *index += 1;
            (from, to) = (from.wrapping_offset(step.from), to.wrapping_offset(step.to));
            if *index < step.size {
                continue 'next;
            }
            *index = 0;
            let all = step.size as isize;
            from = from.wrapping_offset(step.from.wrapping_mul(all).wrapping_neg());
            to = to.wrapping_offset(step.to.wrapping_mul(all).wrapping_neg());
        }
        return;
    }
}

/// Copies runs in two dimensions, tile by tile, so that lines of the cache are used whole on both sides.
/// `RUN` is the length of a run, or 0: it is then `run`.
///
/// # Safety
/// As `copy`.
unsafe fn plane<const RUN: usize>(from: *const u8, to: *mut u8, run: usize, outer: Step, inner: Step) {
    let run = if RUN == 0 { run } else { RUN };
    let at = |step: Step, i: usize| (step.from.wrapping_mul(i as isize), step.to.wrapping_mul(i as isize));
    for row in (0..outer.size).step_by(TILE.0) {
        for column in (0..inner.size).step_by(TILE.1) {
            let columns = TILE.1.min(inner.size - column);
            let first = at(inner, column);
            for row in row..outer.size.min(row + TILE.0) {
                let begin = at(outer, row);
                let mut from = from.wrapping_offset(begin.0).wrapping_offset(first.0);
                let mut to = to.wrapping_offset(begin.1).wrapping_offset(first.1);
                for _ in 0..columns {
                    // SAFETY: as the caller promises.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, run) };
                    (from, to) = (from.wrapping_offset(inner.from), to.wrapping_offset(inner.to));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The offset in memory of each byte of the packed tensor, one by one.
    fn naive(item: usize, shape: &[usize], strides: &[i64]) -> Vec<i64> {
        let mut places = vec![0];
        for (&size, &stride) in shape.iter().zip(strides) {
            places = places.iter().flat_map(|at| (0..size as i64).map(move |i| at + i * stride)).collect();
        }
        places.iter().flat_map(|at| (0..item as i64).map(move |byte| at + byte)).collect()
    }

    /// Shapes with the strides of a permuted, stepped and partly reversed view of packed memory.
    fn views() -> impl Strategy<Value = (usize, Vec<usize>, Vec<i64>)> {
        let item = prop::sample::select(vec![1_usize, 2, 4, 8, 3]);
        let dim = (0_usize..6, 1_i64..4, any::<bool>(), any::<u8>());
        (item, prop::collection::vec(dim, 0..5)).prop_map(|(item, dims)| {
            let mut order: Vec<usize> = (0..dims.len()).collect();
            order.sort_by_key(|&i| dims[i].3);
            let (mut strides, mut reach) = (vec![0; dims.len()], item as i64);
            for i in order {
                let (size, step, reversed, _) = dims[i];
                strides[i] = if reversed { -reach * step } else { reach * step };
                reach *= step * size.max(1) as i64;
            }
            (item, dims.iter().map(|dim| dim.0).collect(), strides)
        })
    }

    /// Memory that has every place, and the offset of the element with all indices 0.
    fn memory(places: &[i64]) -> (Vec<u8>, usize) {
        let (low, high) = (places.iter().min().copied().unwrap_or(0), places.iter().max().copied().unwrap_or(0));
        ((0..=high - low).map(|i| (i * 7 + (i >> 8)) as u8).collect(), -low as usize)
    }

    proptest! {
        #[test]
        fn any_range_is_gathered_and_scattered_as_a_naive_walk_does(
            (item, shape, mut strides) in views(),
            range in any::<(prop::sample::Index, prop::sample::Index)>(),
            expanded in prop::option::of(0_usize..5),
        ) {
            prop_assert!(lie_apart(item, &shape, &strides));
            let disjoint = expanded.is_none_or(|i| i >= shape.len());
            if !disjoint {
                strides[expanded.unwrap()] = 0;
            }
            let (view, places) = (Strided::new(item, &shape, &strides), naive(item, &shape, &strides));
            prop_assert_eq!(view.len(), places.len());
            let (a, b) = (range.0.index(places.len() + 1), range.1.index(places.len() + 1));
            let range = a.min(b)..a.max(b);
            let (mut memory, zero) = memory(&places);
            let place = |i: usize| (places[i] + zero as i64) as usize;
            let mut packed = vec![0xEE; range.len() + 2];
            // SAFETY: the memory has every place, and `packed` has room for the range.
            unsafe { view.gather(memory.as_ptr().wrapping_add(zero), range.clone(), packed.as_mut_ptr().add(1)) };
            let expected: Vec<_> = range.clone().map(|i| memory[place(i)]).collect();
            prop_assert_eq!(&packed[1..=range.len()], &expected[..]);
            prop_assert_eq!((packed[0], packed[range.len() + 1]), (0xEE, 0xEE));
            if disjoint {
                let mut expected = memory.clone();
                let bytes: Vec<u8> = range.clone().map(|i| !(i as u8)).collect();
                range.clone().zip(&bytes).for_each(|(i, byte)| expected[place(i)] = *byte);
                // SAFETY: as above.
                unsafe { view.scatter(bytes.as_ptr(), range, memory.as_mut_ptr().wrapping_add(zero)) };
                prop_assert_eq!(memory, expected);
            }
        }

        #[test]
        fn elements_that_share_a_byte_are_found(
            shape in prop::collection::vec(0_usize..4, 0..4), strides in prop::collection::vec(-40_i64..40, 4),
            item in 1_usize..9,
        ) {
            let mut places = naive(item, &shape, &strides);
            let all = places.len();
            places.sort_unstable();
            places.dedup();
            prop_assert!(places.len() == all || !lie_apart(item, &shape, &strides[..shape.len()]));
        }
    }

    #[test]
    fn dimensions_merge_into_runs_and_few_blocks() {
        let dims = |shape: &[usize], strides: &[i64]| {
            let view = Strided::new(4, shape, strides);
            (view.run, view.dims.to_vec())
        };
        assert_eq!(dims(&[2, 3, 5], &[60, 20, 4]), (120, vec![]));
        assert_eq!(dims(&[7, 1, 3, 5], &[120, 9, 20, 4]), (60, vec![(7, 120)]));
        assert_eq!(dims(&[6, 5], &[-20, 4]), (20, vec![(6, -20)]));
        assert_eq!(dims(&[5, 6], &[-24, -4]), (4, vec![(30, -4)]));
        assert_eq!(dims(&[], &[]), (4, vec![]));
        let mut blocks = Vec::new();
        Strided::new(4, &[10, 10, 10], &[4, 40, 400]).blocks(2..3999, |block| blocks.push(block.axes.len()));
        assert_eq!(blocks, [0, 1, 2, 3, 2, 1, 0]);
    }

    #[test]
    fn strides_by_which_elements_overlap_or_interleave_do_not_lie_apart() {
        for (shape, strides, apart) in [
            (&[3_usize, 4][..], &[4_i64, 12][..], true),
            (&[3, 4], &[0, 4], false),
            (&[1, 4], &[0, -4], true),
            (&[3], &[2], false),
            (&[0, 3], &[0, 0], true),
            (&[2, 3], &[12, 8], false),
            (&[3, 3], &[i64::MAX, 4], false),
            (&[3], &[i64::MIN], false),
        ] {
            assert_eq!(lie_apart(4, shape, strides), apart, "{shape:?} {strides:?}");
        }
    }

    #[test]
    fn slices_that_do_not_hold_every_run_are_left_as_they_are() {
        let steps = |from: isize, to: isize| smallvec![Step { size: 3, from, to }];
        let (from, mut to) = ([1, 2, 3, 4, 5, 6], [0; 6]);
        assert!(!rearrange(&from, 2, &mut to, 2, steps(2, 2)));
        assert!(!rearrange(&from, 3, &mut to, 2, steps(-2, 2)));
        assert!(!rearrange(&from, 0, &mut to[..5], 2, steps(2, 2)));
        assert_eq!(to, [0; 6]);
        assert!(rearrange(&from, 4, &mut to, 2, steps(-2, 2)));
        assert_eq!(to, [5, 6, 3, 4, 1, 2]);
    }
}
