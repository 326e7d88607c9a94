//! Finds the changes in a tensor, and chooses how to encode them.

use super::number::{Number, Numbers, by_width};
use super::positions::{is_wide, push_gap};
use super::values::push_distance;
use super::{Form, How, Patch};
use crate::error::{Error, Result};

/// The number of bytes that are compared at once, before single elements. Equal blocks cost a few
/// instructions.
const BLOCK: usize = 64;

/// A bitmap replaces compressed gaps above this share of changed elements: 1 in 5.
const DENSE: usize = 5;

/// Returns the patch from `old` to `new`. None when they are equal.
///
/// # Errors
/// `Invalid` when they differ in length, or when the length is not a multiple of the element width.
pub fn encode(old: &[u8], new: &[u8], numbers: Numbers, form: Form) -> Result<Option<Patch>> {
    if old.len() != new.len() || !old.len().is_multiple_of(numbers.width) {
        let what = "two states of a tensor differ in length";
        return Err(Error::invalid(format!("{what} old_bytes={} new_bytes={}", old.len(), new.len())));
    }
    let patch = match form {
        Form::Packed | Form::Zstd => by_width!(numbers.width, packed(old, new, numbers.float, form == Form::Zstd)),
        Form::Indices if numbers.whole => by_width!(numbers.width, indexed(old, new)),
        Form::Indices => (old != new).then_some(Tried::TooLong),
    };
    Ok(patch.map(|tried| match tried {
        Tried::Patch(patch) if patch.bytes() <= new.len() / 2 => patch,
        _ => Patch { how: How::Whole, changed: (new.len() / numbers.width) as u64, columns: vec![new.to_vec()] },
    }))
}

enum Tried {
    Patch(Patch),
    /// The patch is longer than half of the tensor.
    TooLong,
}

/// Calls `change` for every element that differs, in ascending order, until it returns false.
#[inline(always)]
fn differences<N: Number>(old: &[u8], new: &[u8], mut change: impl FnMut(usize, N, N) -> bool) -> bool {
    let per_word = 8 / N::WIDTH;
    let (old_blocks, old_rest) = old.as_chunks::<BLOCK>();
    let (new_blocks, new_rest) = new.as_chunks::<BLOCK>();
    for (at, (a, b)) in old_blocks.iter().zip(new_blocks).enumerate() {
        if a == b {
            continue;
        }
        let first = at * (BLOCK / N::WIDTH);
        for (word, (x, y)) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0).enumerate() {
            let mut differ = u64::from_le_bytes(*x) ^ u64::from_le_bytes(*y);
            while differ != 0 {
                let lane = differ.trailing_zeros() as usize / (8 * N::WIDTH);
                differ &= !lane_mask::<N>(lane);
                if !change(first + word * per_word + lane, N::get(x, lane), N::get(y, lane)) {
                    return false;
                }
            }
        }
    }
    let first = old_blocks.len() * (BLOCK / N::WIDTH);
    for lane in 0..old_rest.len() / N::WIDTH {
        let (x, y) = (N::get(old_rest, lane), N::get(new_rest, lane));
        if x != y && !change(first + lane, x, y) {
            return false;
        }
    }
    true
}

/// The bits of a word that belong to one element.
#[inline(always)]
fn lane_mask<N: Number>(lane: usize) -> u64 {
    if N::WIDTH == 8 { u64::MAX } else { ((1 << (8 * N::WIDTH)) - 1) << (8 * N::WIDTH * lane) }
}

/// Encodes gaps or a bitmap, and distances.
fn packed<N: Number>(old: &[u8], new: &[u8], float: bool, compressed: bool) -> Option<Tried> {
    let (elements, longest) = (old.len() / N::WIDTH, new.len() / 2);
    let (mut gaps, mut ulps) = (Vec::new(), Vec::new());
    let (mut next, mut changed) = (0, 0_usize);
    // A bitmap needs an eighth of a byte for each element. Distances are needed in both cases.
    let bitmap_len = elements.div_ceil(8);
    let short = differences::<N>(old, new, |index, old, new| {
        push_gap(&mut gaps, index - next);
        push_distance(&mut ulps, old.distance(new, float));
        next = index + 1;
        changed += 1;
        ulps.len() + gaps.len().min(bitmap_len) <= longest
    });
    if !short {
        return Some(Tried::TooLong);
    }
    if changed == 0 {
        return None;
    }
    let dense = if compressed { changed > elements / DENSE } else { gaps.len() > bitmap_len };
    let (how, places) = if dense { (How::Bitmap, bitmap(&gaps, elements)) } else { (How::Sparse, gaps) };
    Some(Tried::Patch(Patch { how, changed: changed as u64, columns: vec![places, ulps] }))
}

/// Returns the bitmap of the elements that these gaps describe.
fn bitmap(gaps: &[u8], elements: usize) -> Vec<u8> {
    let mut bitmap = vec![0; elements.div_ceil(8)];
    let mut index = 0;
    for &gap in gaps {
        index += gap as usize;
        if gap != super::positions::GO_ON {
            if let Some(byte) = bitmap.get_mut(index / 8) {
                *byte |= 1 << (index % 8);
            }
            index += 1;
        }
    }
    bitmap
}

/// Encodes indices and values.
fn indexed<N: Number>(old: &[u8], new: &[u8]) -> Option<Tried> {
    let (wide, longest) = (is_wide(old.len() / N::WIDTH), new.len() / 2);
    let (mut indices, mut values, mut changed) = (Vec::new(), Vec::new(), 0);
    let short = differences::<N>(old, new, |index, _, new| {
        if wide {
            indices.extend_from_slice(&(index as u64).to_le_bytes());
        } else {
            indices.extend_from_slice(&(index as u32).to_le_bytes());
        }
        new.push(&mut values);
        changed += 1;
        indices.len() + values.len() <= longest
    });
    match (short, changed) {
        (false, _) => Some(Tried::TooLong),
        (true, 0) => None,
        (true, changed) => Some(Tried::Patch(Patch { how: How::Indices, changed, columns: vec![indices, values] })),
    }
}
