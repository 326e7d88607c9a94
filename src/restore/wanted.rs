//! Finds what to read for a target: the blocks of each box of its tensor that overlap the requested region.
//!
//! A manifest describes a tensor as one or several *boxes* (its slices), each contiguous in a file. Two
//! regions describe what one box contributes: which of its bytes are wanted, and where in the target these
//! bytes go. Both regions list the same bytes in the same order.

use super::Target;
use super::piece::Part;
use super::region::Region;
use super::share::{BoxPlace, Memory, Share};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::entries::{BLOCK, SliceEntry, TensorEntry};
use std::ops::Range;

impl Checkpoint {
    /// Returns the parts that fill `targets`, each with its part of a target's memory.
    pub(super) fn plan<'t>(&self, targets: Vec<Target<'t>>) -> Result<Vec<Wanted<'_, 't>>> {
        let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
        let tensors = self.entries(&names)?;
        let mut parts = Vec::with_capacity(targets.len());
        for (target, tensor) in targets.into_iter().zip(tensors) {
            self.plan_one(target, tensor, &mut parts)?;
        }
        Ok(parts)
    }

    fn plan_one<'c, 't>(
        &'c self,
        target: Target<'t>,
        tensor: &'c TensorEntry,
        parts: &mut Vec<Wanted<'c, 't>>,
    ) -> Result<()> {
        if let Some(dtype) = target.dtype {
            self.expect_dtype(tensor, dtype)?;
        }
        let region = self.region(tensor, target.slice.as_deref())?;
        self.fits(tensor, &target, region.len())?;
        if let [slice] = &tensor.slices[..] {
            cut(tensor, slice, region, target.to.whole(), parts);
            return Ok(());
        }
        let mut overlaps = self.overlaps(tensor, target.slice.as_deref())?;
        if overlaps.iter().map(|overlap| overlap.from.len()).sum::<u64>() != region.len() {
            return Err(self.located(Error::internal(format!("boxes do not fill a target tensor={:?}", tensor.name))));
        }
        overlaps.sort_by_key(|overlap| overlap.into.bytes.at(0).0);
        let (from, into): (Vec<_>, Vec<_>) = overlaps.into_iter().map(|o| ((o.slice, o.from), o.into)).unzip();
        for ((slice, from), to) in from.into_iter().zip(target.to.divide(into)) {
            cut(tensor, slice, from, to, parts);
        }
        Ok(())
    }

    /// Checks that the request for `tensor` fits its target; `bytes` is the length of the requested bytes.
    fn fits(&self, tensor: &TensorEntry, target: &Target<'_>, bytes: u64) -> Result<()> {
        let found = match &target.to {
            Memory::Host(to) => to.len() as u64,
            Memory::Device { bytes, .. } => *bytes,
            Memory::Strided { strides, .. } => {
                self.expect_dtype(tensor, strides.dtype)?;
                let slice = target.slice.as_ref().map(|slice| slice.iter().map(Range::len).collect::<Vec<_>>());
                return strides
                    .check(slice.as_deref().unwrap_or(&tensor.shape))
                    .map_err(|e| self.located(Error::invalid(format!("{} tensor={:?}", e.message(), tensor.name))));
            }
        };
        if found == bytes {
            return Ok(());
        }
        let wrong = format!("a target has the wrong length tensor={:?} expected_bytes={bytes}", tensor.name);
        Err(self.located(Error::invalid(format!("{wrong} found_bytes={found}"))))
    }

    /// Returns which bytes of `tensor` a slice selects.
    pub(super) fn region(&self, tensor: &TensorEntry, slice: Option<&[Range<usize>]>) -> Result<Region> {
        let region = match slice {
            None => return Ok(Region::whole(tensor.slices.iter().map(|slice| slice.length).sum())),
            Some(ranges) => Region::slice(tensor.dtype.bitsize(), &tensor.shape, ranges),
        };
        region.map_err(|e| self.located(Error::invalid(format!("{} tensor={:?}", e.message(), tensor.name))))
    }

    /// Returns what each box of `tensor` contributes to a slice. Boxes that contribute nothing are left out.
    fn overlaps<'c>(&self, tensor: &'c TensorEntry, asked: Option<&[Range<usize>]>) -> Result<Vec<Overlap<'c>>> {
        let whole: Vec<_>;
        let asked = match asked {
            Some(asked) => asked,
            None => {
                whole = tensor.shape.iter().map(|&dim| 0..dim).collect();
                &whole
            }
        };
        let extents: Vec<_> = asked.iter().map(Range::len).collect();
        let bits = tensor.dtype.bitsize();
        let mut overlaps = Vec::new();
        for slice in &tensor.slices {
            let shared = || {
                let stored = slice.at.iter().zip(&slice.shape);
                stored.zip(asked).map(|((&at, &extent), asked)| asked.start.max(at)..asked.end.min(at + extent))
            };
            if shared().any(|range| range.is_empty()) {
                continue;
            }
            let less = |range: Range<usize>, origin: usize| range.start - origin..range.end - origin;
            let in_box: Vec<_> = shared().zip(&slice.at).map(|(range, &at)| less(range, at)).collect();
            let in_target: Vec<_> = shared().zip(asked).map(|(range, asked)| less(range, asked.start)).collect();
            let from = Region::slice(bits, &slice.shape, &in_box);
            let both = from.and_then(|from| Ok((from, Region::slice(bits, &extents, &in_target)?)));
            let (from, into) = both.map_err(|e| {
                let (name, SliceEntry { at, shape, .. }) = (&tensor.name, slice);
                let wrong =
                    format!("a box of a tensor does not fit whole bytes tensor={name:?} at={at:?} extent={shape:?}");
                self.in_file(Error::invalid(wrong).with_source(e), slice.file)
            })?;
            overlaps.push(Overlap { slice, from, into: BoxPlace { bytes: into, indices: in_target } });
        }
        Ok(overlaps)
    }
}

/// What one box contributes to a target.
struct Overlap<'c> {
    slice: &'c SliceEntry,
    /// Its wanted bytes in the box.
    from: Region,
    /// Where they go in the target.
    into: BoxPlace,
}

/// Adds the blocks of `slice` that `region` touches, each with its share of `to`.
fn cut<'c, 't>(
    tensor: &'c TensorEntry,
    slice: &SliceEntry,
    region: Region,
    mut to: Share<'t>,
    parts: &mut Vec<Wanted<'c, 't>>,
) {
    let mut done = 0;
    for (index, (range, digest)) in blocks(slice).enumerate() {
        let origin = index as u64 * BLOCK;
        let end = region.before(origin + (range.end - range.start));
        if end > done {
            let (share, region) = (to.take(end - done), region.clone());
            let (file, found) = (slice.file, Digest::EMPTY);
            let (tensor, begin, to) = (tensor, done, share);
            parts.push(Wanted { file, range, digest, found, tensor, region, origin, begin, place: done, to });
            done = end;
        }
    }
}

/// Returns the byte ranges of the file, each with its digest, that make up a slice.
pub(super) fn blocks(slice: &SliceEntry) -> impl Iterator<Item = (Range<u64>, Digest)> {
    let whole = slice.blocks.is_empty().then_some(slice.digest);
    let end = slice.offset + slice.length;
    slice.blocks.iter().copied().chain(whole).enumerate().map(move |(index, digest)| {
        let start = slice.offset + index as u64 * BLOCK;
        (start..end.min(start + BLOCK), digest)
    })
}

/// A part, with the target memory that it fills.
pub(super) struct Wanted<'c, 't> {
    pub file: usize,
    pub range: Range<u64>,
    pub digest: Digest,
    /// The digest of the bytes read so far.
    pub found: Digest,
    pub tensor: &'c TensorEntry,
    /// The wanted bytes of the box.
    pub region: Region,
    /// The offset in the box where `range` begins.
    pub origin: u64,
    /// The offset in the region where `to` begins.
    pub begin: u64,
    /// The offset in the region up to which `to` is filled.
    pub place: u64,
    /// The memory to fill. Device memory is filled after the digest is checked.
    pub to: Share<'t>,
}

impl Part for Wanted<'_, '_> {
    fn file(&self) -> usize {
        self.file
    }

    fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn take(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let start = self.origin + (at - self.range.start);
        let end = self.begin + self.to.len();
        let (region, begin, place) = (&self.region, self.begin, &mut self.place);
        match &mut self.to {
            Share::Host(to) => {
                while let Some(from) = run(region, *place, end - *place, start, bytes)? {
                    let room = to.get_mut((*place - begin) as usize..).and_then(|room| room.get_mut(..from.len()));
                    room.ok_or_else(|| Error::internal("a box is outside its target"))?.copy_from_slice(from);
                    *place += from.len() as u64;
                }
            }
            Share::Bands { target, into, .. } => {
                let mut held = None;
                while let Some(from) = run(region, *place, end - *place, start, bytes)? {
                    let (to, together) = into.at(*place);
                    let from = from.get(..usize::try_from(together).unwrap_or(usize::MAX)).unwrap_or(from);
                    let copied = target.copy(&mut held, to, from) as u64;
                    if copied == 0 {
                        return Err(Error::internal("a box is outside its target"));
                    }
                    *place += copied;
                }
            }
            Share::Strided { to, .. } => {
                while let Some(from) = run(region, *place, end - *place, start, bytes)? {
                    to.fill(*place, from)?;
                    *place += from.len() as u64;
                }
            }
            Share::Device { .. } | Share::DeviceStrided { .. } => {}
        }
        self.found = self.found.then(Digest::of(bytes), bytes.len() as u64);
        Ok(())
    }

    fn again(&mut self) {
        (self.place, self.found) = (self.begin, Digest::EMPTY);
    }
}

/// Returns the run at byte `place` of the region, within `bytes`, which begin at offset `start` of the box.
/// The run has at most `left` bytes. None when no bytes are left, or `bytes` end before the run.
fn run<'b>(region: &Region, place: u64, left: u64, start: u64, bytes: &'b [u8]) -> Result<Option<&'b [u8]>> {
    if left == 0 {
        return Ok(None);
    }
    let (source, together) = region.at(place);
    if source >= start + bytes.len() as u64 {
        return Ok(None);
    }
    let from = source.checked_sub(start).and_then(|skip| bytes.get(skip as usize..)).unwrap_or_default();
    let len = from.len().min(usize::try_from(together.min(left)).unwrap_or(usize::MAX));
    if len == 0 { Err(Error::internal("a slice is outside its block")) } else { Ok(from.get(..len)) }
}
