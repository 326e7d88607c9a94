//! A part of the structure of a step, read from tables: some neighbouring tensors, with their boxes and rows.

use super::columns::{BOXES, WHOLE, dtype};
use super::entries::{FileEntry, SliceEntry, TensorEntry, block_count};
use super::invariants;
use super::table::Numbers;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::state::Layout;
use smallvec::SmallVec;
use std::ops::Range;

/// The count of numbers of a tensor in the column `tensors`.
pub(super) const RECORD: usize = 7;

/// Neighbouring tensors. Each vector begins with the numbers of the first of them.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// The number of the first tensor.
    pub first: u64,
    /// The column `tensors`, with one more row than there are tensors.
    pub tensors: Numbers,
    pub names: Vec<u8>,
    pub dims: Numbers,
    pub spans: Numbers,
    /// The file of each box.
    pub files: Numbers,
    /// Offset, length, digest and first block of each box, and one more row.
    pub rows: Numbers,
    pub blocks: Numbers,
}

/// What the first numbers of a record count.
#[derive(Clone, Copy)]
pub(super) enum Count {
    Names,
    Dims,
    Spans,
    Boxes,
}

/// A tensor of a part.
pub(super) struct View<'p> {
    pub number: u64,
    pub name: &'p str,
    pub layout: Layout,
    /// The number of the tensor that holds the bytes.
    pub holder: u64,
    placement: u64,
    spans: &'p [u64],
    files: &'p [u64],
    rows: &'p [u64],
    blocks: &'p [u64],
    /// The number of the first of `blocks`.
    block: u64,
}

fn slice<T>(items: &[T], range: Option<Range<u64>>) -> Option<&[T]> {
    let range = range?;
    items.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

impl Part {
    /// The number of tensors.
    pub fn len(&self) -> usize {
        (self.tensors.len() / RECORD).saturating_sub(1)
    }

    fn record(&self, index: usize) -> Option<&[u64; RECORD]> {
        self.tensors.get(index * RECORD..)?.first_chunk()
    }

    /// The range of a column that belongs to all tensors of this part.
    pub fn all(&self, count: Count) -> Result<Range<u64>> {
        let range = self.record(0).zip(self.record(self.len())).map(|(a, b)| a[count as usize]..b[count as usize]);
        range.filter(|range| range.start <= range.end).ok_or_else(disordered)
    }

    /// The range of a column that belongs to a tensor, counted from the first tensor's range.
    fn range(&self, index: usize, count: Count) -> Option<Range<u64>> {
        let at = |index| self.record(index).map(|record| record[count as usize]);
        let (base, begin, end) = (at(0)?, at(index)?, at(index + 1)?);
        Some(begin.checked_sub(base)?..end.checked_sub(base)?)
    }

    /// The range of the boxes of a tensor.
    pub fn boxes(&self, index: usize) -> Option<Range<u64>> {
        self.range(index, Count::Boxes)
    }

    /// A tensor, by its index in this part.
    pub fn view(&self, index: usize) -> Result<View<'_>> {
        let found = self.found(index);
        found.ok_or_else(|| Error::corrupt(format!("a table contradicts itself tensor={}", self.first + index as u64)))
    }

    fn found(&self, index: usize) -> Option<View<'_>> {
        let &[.., code, placement, holder] = self.record(index)?;
        let name = std::str::from_utf8(slice(&self.names, self.range(index, Count::Names))?).ok()?;
        let dims = slice(&self.dims, self.range(index, Count::Dims))?;
        let shape: SmallVec<[usize; 4]> =
            dims.iter().map(|dim| usize::try_from(*dim)).collect::<Result<_, _>>().ok()?;
        let boxes = self.boxes(index)?;
        let rows = slice(&self.rows, Some(boxes.start * 4..(boxes.end + 1).checked_mul(4)?))?;
        let number = self.first + index as u64;
        let spans = slice(&self.spans, self.range(index, Count::Spans))?;
        let count = boxes.end.checked_sub(boxes.start)?;
        let sound = match placement {
            WHOLE => spans.is_empty() && count == u64::from(holder == number),
            BOXES => spans.len() as u64 == count.checked_mul(2 * dims.len() as u64)? && holder == number,
            _ => false,
        };
        let files = slice(&self.files, Some(boxes))?;
        let base = self.rows.get(3).copied().unwrap_or(0);
        let blocks = slice(&self.blocks, Some(rows.get(3)?.checked_sub(base)?..rows.last()?.checked_sub(base)?))?;
        let block = *rows.get(3)?;
        let layout = Layout::new(dtype(code)?, &shape);
        sound.then_some(View { number, name, layout, holder, placement, spans, files, rows, blocks, block })
    }
}

pub(super) fn disordered() -> Error {
    Error::corrupt("the counts of a table do not rise")
}

impl View<'_> {
    /// The tensor as an entry of its own, unchecked.
    pub fn entry(&self) -> Result<TensorEntry> {
        let (dims, numbers) =
            (self.layout.shape.len(), |of: &[u64]| of.iter().map(|n| *n as usize).collect::<Vec<_>>());
        let mut slices = Vec::with_capacity(self.files.len());
        for (index, (file, row)) in self.files.iter().zip(self.rows.chunks_exact(4)).enumerate() {
            let &[offset, length, digest, first] = row else { return Err(disordered()) };
            let next = self.rows.get(index * 4 + 7).copied();
            let range = first.checked_sub(self.block).zip(next.and_then(|next| next.checked_sub(self.block)));
            let blocks = slice(self.blocks, range.map(|(begin, end)| begin..end)).ok_or_else(disordered)?;
            let span = self.spans.get(index * 2 * dims..(index + 1) * 2 * dims).unwrap_or_default();
            let (at, extent) = span.split_at(span.len() / 2);
            let whole = self.placement == WHOLE;
            slices.push(SliceEntry {
                file: *file as usize,
                offset,
                length,
                at: if whole { vec![0; dims] } else { numbers(at) },
                shape: if whole { self.layout.shape.to_vec() } else { numbers(extent) },
                digest: Digest::from_bits(digest),
                blocks: blocks.iter().map(|bits| Digest::from_bits(*bits)).collect(),
            });
        }
        Ok(TensorEntry { name: self.name.into(), dtype: self.layout.dtype, shape: self.layout.shape.to_vec(), slices })
    }

    /// The numbers of the files of its boxes.
    pub fn files(&self) -> &[u64] {
        self.files
    }

    /// Checks the tensor against the files of its boxes, which `file` returns.
    pub fn check<'f>(&self, file: impl Fn(usize) -> Option<&'f FileEntry>) -> Result<()> {
        // The usual tensor, which needs no memory of its own.
        if let (WHOLE, &[number], &[offset, length, _, first, .., next]) = (self.placement, self.files, self.rows)
            && let Some(file) = file(number as usize)
            && (file.data > 0
                && offset >= file.data
                && offset.checked_add(length).is_some_and(|end| end <= file.length))
            && self.layout.bytes().ok() == Some(length)
            && next.checked_sub(first) == Some(block_count(length) as u64)
            && !matches!(self.name, "" | "__metadata__")
        {
            return Ok(());
        }
        invariants::check_tensor(&self.entry()?, file)
    }
}
