//! An n-dimensional slice of a tensor as runs of bytes. The runs are computed when needed, not stored.

use crate::error::{Error, Result};
use smallvec::SmallVec;
use std::ops::Range;

/// Which bytes of a row-major tensor a slice selects, in the order of the result.
///
/// Offsets in the tensor rise strictly with offsets in the result. All reading code depends on this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// The offset of the first byte in the tensor.
    base: u64,
    /// Extent and stride in bytes of the dimensions that split it into runs, innermost first. Dimensions that
    /// one stride walks through are merged.
    outer: SmallVec<[(u64, u64); 4]>,
    /// The length of a run, in bytes.
    run: u64,
    /// The length of the result, in bytes.
    len: u64,
}

impl Region {
    /// Selects all `len` bytes.
    pub fn whole(len: u64) -> Self {
        Self { base: 0, outer: SmallVec::new(), run: len, len }
    }

    /// Selects the slice `ranges`, one range per dimension of `shape`, of elements of `bits` bits.
    pub fn slice(bits: usize, shape: &[usize], ranges: &[Range<usize>]) -> Result<Self> {
        let refuse = |what: &str| Err(Error::invalid(format!("{what} shape={shape:?} slice={ranges:?}")));
        if shape.len() != ranges.len() {
            return refuse("a slice needs one range for each dimension");
        }
        if shape.iter().zip(ranges).any(|(&dim, range)| range.start > range.end || range.end > dim) {
            return refuse("a slice reaches beyond the tensor");
        }
        if ranges.iter().any(Range::is_empty) {
            return Ok(Self::whole(0));
        }
        let (mut base, mut run, mut stride) = (0_u64, bits as u64, bits as u64);
        let mut outer = SmallVec::<[(u64, u64); 4]>::new();
        let mut contiguous = true;
        for (&dim, range) in shape.iter().zip(ranges).rev() {
            // None of these overflows: the tensor is at least as large, and its size in bits was checked at
            // open.
            base += range.start as u64 * stride;
            if contiguous {
                run = range.len() as u64 * stride;
                contiguous = range.len() == dim;
            } else if range.len() > 1 {
                match outer.last_mut() {
                    // The runs follow each other without a gap through both dimensions, so the two count as
                    // one.
                    Some((extent, step)) if *extent * *step == stride => *extent *= range.len() as u64,
                    _ => outer.push((range.len() as u64, stride)),
                }
            }
            stride *= dim as u64;
        }
        if [base, run].into_iter().chain(outer.iter().map(|&(_, stride)| stride)).any(|bits| bits % 8 != 0) {
            return refuse("a slice cuts a byte in two");
        }
        for (_, stride) in &mut outer {
            *stride /= 8;
        }
        let run = run / 8;
        let len = outer.iter().fold(run, |len, (extent, _)| len * extent);
        Ok(Self { base: base / 8, outer, run, len })
    }

    /// The length of the result in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when the bytes lie side by side in the tensor.
    pub fn is_contiguous(&self) -> bool {
        self.run == self.len
    }

    /// Returns the offset in the tensor of byte `place < len` of the result, and how many bytes from there
    /// are contiguous.
    pub fn at(&self, place: u64) -> (u64, u64) {
        let (mut index, within) = (place / self.run, place % self.run);
        let mut source = self.base + within;
        for (extent, stride) in &self.outer {
            source += index % extent * stride;
            index /= extent;
        }
        (source, self.run - within)
    }

    /// Returns how many bytes of the result come from before offset `source` in the tensor.
    pub fn before(&self, source: u64) -> u64 {
        if self.len == 0 {
            return 0;
        }
        let (mut low, mut high) = (0, self.len / self.run);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.at(middle * self.run).0 < source { low = middle + 1 } else { high = middle }
        }
        match low.checked_sub(1) {
            None => 0,
            Some(last) => last * self.run + (source - self.at(last * self.run).0).min(self.run),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lists the tensor offsets of a slice's bytes, one by one.
    fn naive(size: usize, shape: &[usize], ranges: &[Range<usize>]) -> Vec<u64> {
        let mut places = vec![0];
        for (&dim, range) in shape.iter().zip(ranges) {
            places =
                places.iter().flat_map(|place| range.clone().map(move |i| place * dim as u64 + i as u64)).collect();
        }
        places.iter().flat_map(|place| (0..size as u64).map(move |byte| place * size as u64 + byte)).collect()
    }

    fn shapes() -> impl Strategy<Value = (Vec<usize>, Vec<Range<usize>>)> {
        let dim = (0_usize..5).prop_flat_map(|dim| (Just(dim), 0..=dim, 0..=dim));
        prop::collection::vec(dim, 0..5)
            .prop_map(|dims| dims.into_iter().map(|(dim, a, b)| (dim, a.min(b)..a.max(b))).unzip())
    }

    proptest! {
        #[test]
        fn every_byte_of_a_slice_is_where_a_naive_walk_finds_it((shape, ranges) in shapes(), size in 1_usize..5) {
            let region = Region::slice(8 * size, &shape, &ranges).unwrap();
            let naive = naive(size, &shape, &ranges);
            prop_assert_eq!(region.len(), naive.len() as u64);
            for (place, &source) in naive.iter().enumerate() {
                let (at, left) = region.at(place as u64);
                prop_assert_eq!(at, source);
                let together = naive.get(place..place + left as usize).unwrap();
                prop_assert!(together.iter().zip(source..).all(|(&have, want)| have == want));
            }
            let end = naive.last().map_or(1, |last| last + 2);
            for source in 0..=end {
                prop_assert_eq!(region.before(source), naive.iter().filter(|&&at| at < source).count() as u64);
            }
        }
    }

    #[test]
    fn elements_smaller_than_a_byte_are_sliced_only_where_no_byte_is_cut() {
        let slice = |ranges: &[Range<usize>]| Region::slice(4, &[3, 4], ranges);
        assert_eq!(slice(&[1..3, 0..2]).unwrap().len(), 2);
        assert_eq!(slice(&[1..2, 2..4]).unwrap().at(0), (3, 1));
        for cut in [[0..1, 0..1], [0..1, 1..3], [0..3, 1..2]] {
            assert!(slice(&cut).unwrap_err().message().contains("cuts a byte"), "{cut:?}");
        }
        assert_eq!(Region::slice(4, &[2, 3], &[0..2, 0..3]).unwrap(), Region::whole(3));
        assert!(Region::slice(4, &[2, 3], &[1..2, 0..3]).is_err(), "the second row begins inside a byte");
        assert!(Region::slice(4, &[2, 2, 3], &[0..2, 0..1, 0..2]).is_ok());
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "slices of one dimension")]
    fn a_scalar_is_sliced_by_no_ranges_and_wrong_ranges_are_refused() {
        assert_eq!(Region::slice(32, &[], &[]).unwrap(), Region::whole(4));
        assert!(Region::slice(32, &[], &[0..1]).is_err());
        assert!(Region::slice(32, &[4], &[]).is_err());
        assert!(Region::slice(32, &[4], &[2..5]).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "a caller may pass one")]
        let reversed = 3..2;
        assert!(Region::slice(32, &[4], &[reversed]).is_err());
        assert_eq!(Region::slice(32, &[0, 4], &[0..0, 0..4]).unwrap().len(), 0);
    }
}
