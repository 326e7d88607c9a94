//! The positions of changed elements: gaps, a bitmap or indices. Each is an iterator that finds every
//! contradiction.

use crate::error::{Error, Result};

/// A gap of this byte continues in the next byte.
pub(super) const GO_ON: u8 = 255;

/// Appends the gap before a changed element: the number of unchanged elements before it.
#[inline(always)]
pub(super) fn push_gap(gaps: &mut Vec<u8>, mut gap: usize) {
    while gap >= GO_ON as usize {
        gaps.push(GO_ON);
        gap -= GO_ON as usize;
    }
    gaps.push(gap as u8);
}

/// The indices of changed elements, in ascending order.
#[derive(Clone, Debug)]
pub(super) enum Positions<'a> {
    Gaps { gaps: &'a [u8], next: usize, elements: usize },
    Bitmap { bitmap: &'a [u8], word: u64, at: usize, elements: usize },
    Narrow { indices: &'a [u8], next: usize, elements: usize },
    Wide { indices: &'a [u8], next: usize, elements: usize },
}

impl<'a> Positions<'a> {
    pub fn gaps(gaps: &'a [u8], elements: usize) -> Self {
        Self::Gaps { gaps, next: 0, elements }
    }

    /// # Errors
    /// `Corrupt` when the bitmap has another length, or marks elements that do not exist.
    pub fn bitmap(bitmap: &'a [u8], elements: usize) -> Result<Self> {
        let beyond = bitmap.last().is_some_and(|last| !elements.is_multiple_of(8) && last >> (elements % 8) != 0);
        if bitmap.len() != elements.div_ceil(8) || beyond {
            let what = "a bitmap does not fit its tensor";
            return Err(Error::corrupt(format!("{what} elements={elements} bytes={}", bitmap.len())));
        }
        Ok(Self::Bitmap { bitmap, word: 0, at: 0, elements })
    }

    /// # Errors
    /// `Corrupt` when the column ends within an index.
    pub fn indices(indices: &'a [u8], elements: usize) -> Result<Self> {
        let wide = is_wide(elements);
        if !indices.len().is_multiple_of(if wide { 8 } else { 4 }) {
            return Err(Error::corrupt(format!("a column ends within an index bytes={}", indices.len())));
        }
        let next = 0;
        Ok(if wide { Self::Wide { indices, next, elements } } else { Self::Narrow { indices, next, elements } })
    }

    /// Returns the next index. None at the end of the column.
    ///
    /// # Errors
    /// `Corrupt` when the index is beyond the tensor, not above the previous index, or incomplete.
    #[inline(always)]
    pub fn next(&mut self) -> Result<Option<usize>> {
        match self {
            Self::Gaps { gaps, next, elements } => {
                let Some((&byte, rest)) = gaps.split_first() else { return Ok(None) };
                *gaps = rest;
                let mut index = *next + byte as usize;
                let mut last = byte;
                while last == GO_ON {
                    let Some((&byte, rest)) = gaps.split_first() else {
                        return Err(Error::corrupt("a column ends within a gap"));
                    };
                    *gaps = rest;
                    index += byte as usize;
                    last = byte;
                }
                if index >= *elements {
                    return Err(beyond(index as u64, *elements));
                }
                *next = index + 1;
                Ok(Some(index))
            }
            Self::Bitmap { bitmap, word, at, elements } => {
                while *word == 0 {
                    if bitmap.is_empty() {
                        return Ok(None);
                    }
                    let mut bytes = [0; 8];
                    let n = bitmap.len().min(8);
                    let (now, rest) = bitmap.split_at(n);
                    bytes[..n].copy_from_slice(now);
                    (*bitmap, *word, *at) = (rest, u64::from_le_bytes(bytes), *at + 64);
                }
                let index = *at - 64 + word.trailing_zeros() as usize;
                *word &= *word - 1;
                if index < *elements { Ok(Some(index)) } else { Err(beyond(index as u64, *elements)) }
            }
            Self::Narrow { indices, next, elements } => {
                let Some((bytes, rest)) = indices.split_first_chunk::<4>() else { return Ok(None) };
                *indices = rest;
                ascending(i64::from(i32::from_le_bytes(*bytes)), next, *elements)
            }
            Self::Wide { indices, next, elements } => {
                let Some((bytes, rest)) = indices.split_first_chunk::<8>() else { return Ok(None) };
                *indices = rest;
                ascending(i64::from_le_bytes(*bytes), next, *elements)
            }
        }
    }
}

/// Whether indices of a tensor of `elements` need 64 bits.
pub(super) fn is_wide(elements: usize) -> bool {
    elements > i32::MAX as usize
}

#[inline(always)]
fn ascending(index: i64, next: &mut usize, elements: usize) -> Result<Option<usize>> {
    match usize::try_from(index) {
        Ok(at) if at >= *next && at < elements => {
            *next = at + 1;
            Ok(Some(at))
        }
        Ok(at) if at < *next => Err(Error::corrupt(format!("the indices of a delta do not ascend index={index}"))),
        _ => Err(Error::corrupt(format!("a delta changes an element that does not exist index={index}"))),
    }
}

#[cold]
fn beyond(index: u64, elements: usize) -> Error {
    Error::corrupt(format!("a delta changes an element that does not exist index={index} elements={elements}"))
}
