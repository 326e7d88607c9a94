//! The columns of tables: what each column holds, and how columns are made from entries.
//!
//! There are three groups: the structure (tensors and the boxes that hold their bytes), the files, and the
//! rows (the place of each box in its file, and its digests). In a step of one rank, one table has all
//! groups. In a step of several ranks each group may have its own table: `tensors.table`, `files.table`, and
//! the rows beside each shard.

use super::entries::{FileEntry, SliceEntry, TensorEntry};
use super::table::Spec;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::state::Dtype;
use std::collections::BTreeMap;

/// The table of a step of one rank, or of the structure.
pub const TENSORS_TABLE: &str = "tensors.table";

/// The table of the files of a step that several ranks wrote.
pub const FILES_TABLE: &str = "files.table";

/// Offset in the file, length, digest, and the index in `blocks` of the first block digest. One more row ends
/// the last.
pub(super) const ROWS: Spec = Spec::new("rows", Dtype::U64, 4);
/// The digests of blocks, row after row.
pub(super) const BLOCKS: Spec = Spec::new("blocks", Dtype::U64, 1);
/// First byte in `file_names`, length, data, digest of the header, digest of the file, length and digest of
/// the table of its rows, and the step and the two halves of the attempt that wrote it. One more row ends the
/// last.
pub(super) const FILES: Spec = Spec::new("files", Dtype::U64, 10);
/// Dimensions, tensor after tensor.
pub(super) const DIMS: Spec = Spec::new("dims", Dtype::U64, 1);
/// Where boxes begin and their extents: per box all `at`, then all extents.
pub(super) const SPANS: Spec = Spec::new("spans", Dtype::U64, 1);
/// First of its bytes in `names`, first of its numbers in `dims` and `spans`, first of its boxes, dtype,
/// placement, holder. One more row ends the last.
pub(super) const TENSORS: Spec = Spec::new("tensors", Dtype::U32, 7);
/// The number of the file that holds a box.
pub(super) const BOX_FILES: Spec = Spec::new("box_files", Dtype::U32, 1);
/// The number of the tensor of a row, in a table of rows beside a shard.
pub(super) const ROW_TENSORS: Spec = Spec::new("row_tensors", Dtype::U32, 1);
/// Names of tensors, side by side.
pub(super) const NAMES: Spec = Spec::new("names", Dtype::U8, 1);
/// Names of files, side by side.
pub(super) const FILE_NAMES: Spec = Spec::new("file_names", Dtype::U8, 1);
/// Values of one rank, as a JSON object.
pub(super) const VALUES: Spec = Spec::new("values", Dtype::U8, 1);

/// All columns of a step of one rank. The columns with digests come first.
pub(super) const SINGLE: [Spec; 9] = [ROWS, BLOCKS, FILES, DIMS, SPANS, TENSORS, BOX_FILES, NAMES, FILE_NAMES];
/// The columns of the `tensors.table` of several ranks.
pub(super) const STRUCTURE: [Spec; 5] = [DIMS, SPANS, TENSORS, BOX_FILES, NAMES];
/// The columns of `files.table`.
pub(super) const STEP_FILES: [Spec; 2] = [FILES, FILE_NAMES];
/// The columns of the table beside a shard.
pub(super) const BESIDE: [Spec; 4] = [ROWS, BLOCKS, ROW_TENSORS, VALUES];

/// The placement of a tensor that is stored as one box, which covers the whole tensor.
pub(super) const WHOLE: u64 = 0;
/// The placement of a tensor that is stored as the boxes in `spans`. Placement 2 is reserved for meshes.
pub(super) const BOXES: u64 = 1;

/// The dtypes by their number in a table. The meaning of a number never changes.
const DTYPES: [Dtype; 22] = [
    Dtype::BOOL,
    Dtype::F4,
    Dtype::F6_E2M3,
    Dtype::F6_E3M2,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8_E5M2,
    Dtype::F8_E4M3,
    Dtype::F8_E8M0,
    Dtype::F8_E4M3FNUZ,
    Dtype::F8_E5M2FNUZ,
    Dtype::I16,
    Dtype::U16,
    Dtype::F16,
    Dtype::BF16,
    Dtype::I32,
    Dtype::U32,
    Dtype::F32,
    Dtype::C64,
    Dtype::F64,
    Dtype::I64,
    Dtype::U64,
];

/// The dtype of this number.
pub(super) fn dtype(number: u64) -> Option<Dtype> {
    DTYPES.get(usize::try_from(number).ok()?).copied()
}

/// A file of a step, with the facts that only tables have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRow {
    /// Name, length and digests.
    pub entry: FileEntry,
    /// The step and attempt that wrote the file. Its stamp must name them.
    pub origin: (u64, Attempt),
    /// Length and digest of the table of its rows, which has the file's name with another extension. None if
    /// the rows are in `tensors.table`, or if the file is no shard.
    pub rows: Option<(u64, Digest)>,
}

impl FileRow {
    /// The name of the table of the rows of `file`.
    pub fn rows_name(file: &str) -> String {
        format!("{}.table", file.strip_suffix(".safetensors").unwrap_or(file))
    }
}

/// The bytes of a number in a column of 32 bits.
fn narrow(number: usize) -> Result<[u8; 4]> {
    let wide = |_| Error::invalid(format!("a step has more tensors, names or boxes than a table can number: {number}"));
    u32::try_from(number).map(u32::to_le_bytes).map_err(wide)
}

fn wide(number: usize) -> [u8; 8] {
    (number as u64).to_le_bytes()
}

/// Checks the order of tensors. Also checks that each alias has no slices, and has the dtype and shape of its
/// holder.
///
/// # Errors
/// `Internal`, naming the tensor.
pub(super) fn check_aliases(tensors: &[TensorEntry], aliases: &BTreeMap<usize, usize>) -> Result<()> {
    if let Some([a, b]) = tensors.windows(2).find(|pair| matches!(pair, [a, b] if a.name >= b.name)) {
        return Err(Error::internal(format!("tensors are not in order tensor={:?} after={:?}", b.name, a.name)));
    }
    for (number, holder) in aliases {
        let alias = tensors.get(*number);
        let holder = tensors.get(*holder).filter(|_| !aliases.contains_key(holder));
        let alike =
            |a: &TensorEntry, b: &TensorEntry| a.slices.is_empty() && (a.dtype, &a.shape) == (b.dtype, &b.shape);
        if !alias.zip(holder).is_some_and(|(a, b)| alike(a, b)) {
            let name = alias.map(|alias| &alias.name);
            return Err(Error::internal(format!("an alias differs from its holder tensor={name:?}")));
        }
    }
    Ok(())
}

/// Makes the columns [`STRUCTURE`]. Tensors are sorted by name. `aliases` maps the number of each tensor
/// without slices to the number of the tensor that holds its bytes.
pub(super) fn structure(tensors: &[TensorEntry], aliases: &BTreeMap<usize, usize>) -> Result<[Vec<u8>; 5]> {
    let [mut dims, mut spans, mut rows, mut files, mut names] = <[Vec<u8>; 5]>::default();
    let row = |counts: [usize; 4], kind: [usize; 3], rows: &mut Vec<u8>| {
        counts.into_iter().chain(kind).try_for_each(|number| narrow(number).map(|bytes| rows.extend_from_slice(&bytes)))
    };
    for (number, tensor) in tensors.iter().enumerate() {
        let code = DTYPES.iter().position(|dtype| *dtype == tensor.dtype);
        let Some(code) = code else {
            return Err(Error::internal(format!("a dtype has no number in tables dtype={}", tensor.dtype)));
        };
        let whole = |s: &SliceEntry| s.shape == tensor.shape && s.at.iter().all(|at| *at == 0);
        let placement = match &tensor.slices[..] {
            [] => WHOLE,
            [slice] if whole(slice) => WHOLE,
            _ => BOXES,
        };
        let holder = aliases.get(&number).copied().unwrap_or(number);
        let counts = [names.len(), dims.len() / 8, spans.len() / 8, files.len() / 4];
        row(counts, [code, placement as usize, holder], &mut rows)?;
        names.extend_from_slice(tensor.name.as_bytes());
        dims.extend(tensor.shape.iter().flat_map(|dim| wide(*dim)));
        for slice in &tensor.slices {
            files.extend_from_slice(&narrow(slice.file)?);
            if placement == BOXES {
                spans.extend(slice.at.iter().chain(&slice.shape).flat_map(|number| wide(*number)));
            }
        }
    }
    row([names.len(), dims.len() / 8, spans.len() / 8, files.len() / 4], [0; 3], &mut rows)?;
    Ok([dims, spans, rows, files, names])
}

/// Makes the columns [`STEP_FILES`].
pub(super) fn files<'f>(files: impl IntoIterator<Item = &'f FileRow>) -> [Vec<u8>; 2] {
    let [mut rows, mut names] = <[Vec<u8>; 2]>::default();
    for FileRow { entry, origin: (step, attempt), rows: table } in files {
        let (length, digest) = table.map_or((0, 0), |(length, digest)| (length, digest.to_bits()));
        let attempt = attempt.to_u128();
        let numbers = [
            names.len() as u64,
            entry.length,
            entry.data,
            entry.header.to_bits(),
            entry.digest.to_bits(),
            length,
            digest,
            *step,
            (attempt >> 64) as u64,
            attempt as u64,
        ];
        rows.extend(numbers.into_iter().flat_map(u64::to_le_bytes));
        names.extend_from_slice(entry.name.as_bytes());
    }
    rows.extend(wide(names.len()));
    rows.resize(rows.len() + 72, 0);
    [rows, names]
}

/// Makes the columns [`ROWS`] and [`BLOCKS`].
pub(super) fn rows<'s>(slices: impl IntoIterator<Item = &'s SliceEntry>) -> [Vec<u8>; 2] {
    let [mut rows, mut blocks] = <[Vec<u8>; 2]>::default();
    for slice in slices {
        let numbers = [slice.offset, slice.length, slice.digest.to_bits(), blocks.len() as u64 / 8];
        rows.extend(numbers.into_iter().flat_map(u64::to_le_bytes));
        blocks.extend(slice.blocks.iter().flat_map(|block| block.to_bits().to_le_bytes()));
    }
    rows.resize(rows.len() + 24, 0);
    rows.extend(wide(blocks.len() / 8));
    [rows, blocks]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_has_a_number_of_its_own() {
        for dtype in crate::state::DTYPES {
            assert_eq!(DTYPES.iter().filter(|other| *other == dtype).count(), 1, "{dtype}");
        }
        assert_eq!(DTYPES.len(), crate::state::DTYPES.len());
    }
}
