//! The table of a step of one rank. It is created once per structure and filled per save, because making
//! 100,000 rows anew takes tens of milliseconds each time.

use super::columns::{self, BOX_FILES, DIMS, FILE_NAMES, FILES, FileRow, NAMES, ROWS, SPANS, TENSORS};
use super::columns::{BLOCKS, TENSORS_TABLE};
use super::entries::{FileEntry, TensorEntry};
use super::invariants;
use super::manifest::TableEntry;
use super::table::Blank;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::AlignedBuffer;
use std::collections::BTreeMap;

/// The facts about a file that [`TableTemplate::fill`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilledFile {
    /// The digest of the file's header.
    pub header: Digest,
    /// The digest of the whole file.
    pub whole: Digest,
    /// The step and attempt that wrote the file. None means those of the table.
    pub origin: Option<(u64, Attempt)>,
}

impl From<(Digest, Digest)> for FilledFile {
    fn from((header, whole): (Digest, Digest)) -> Self {
        Self { header, whole, origin: None }
    }
}

/// The part of a table that is the same for all saves of one structure, with room for the digests.
#[derive(Clone, Debug)]
pub struct TableTemplate {
    blank: Blank,
    files: usize,
    /// The number of block digests of each slice, over all tensors.
    blocks: Vec<usize>,
}

impl TableTemplate {
    /// Creates a template for these files and tensors, checked against [`invariants`]. Their digests are
    /// placeholders for the digests that [`TableTemplate::fill`] inserts. `aliases` maps the number of each
    /// tensor without slices to the number of the tensor that holds its bytes.
    ///
    /// # Errors
    /// `Internal` when an invariant does not hold; `Invalid` when there are more tensors than a table can
    /// hold.
    pub fn new(files: &[FileEntry], tensors: &[TensorEntry], aliases: &BTreeMap<usize, usize>) -> Result<Self> {
        let held: Vec<_> = (0..).zip(tensors).filter(|(i, _)| !aliases.contains_key(i)).map(|(_, t)| t).collect();
        invariants::check_layout(files, &held).map_err(|e| e.with_kind(ErrorKind::Internal))?;
        columns::check_aliases(tensors, aliases)?;
        Self::unchecked(files, tensors, aliases)
    }

    /// Creates a template for the files of one of several ranks, whose slices need not cover a tensor.
    ///
    /// # Errors
    /// As [`TableTemplate::new`].
    pub fn of_part(files: &[FileEntry], tensors: &[TensorEntry]) -> Result<Self> {
        invariants::check_part(files, tensors).map_err(|e| e.with_kind(ErrorKind::Internal))?;
        Self::unchecked(files, tensors, &BTreeMap::new())
    }

    fn unchecked(files: &[FileEntry], tensors: &[TensorEntry], aliases: &BTreeMap<usize, usize>) -> Result<Self> {
        let unwritten =
            |entry: &FileEntry| FileRow { entry: entry.clone(), origin: (0, Attempt::from_u128(0)), rows: None };
        let owned: Vec<_> = files.iter().map(unwritten).collect();
        let [rows, digests] = columns::rows(tensors.iter().flat_map(|t| &t.slices));
        let [dims, spans, table, box_files, names] = columns::structure(tensors, aliases)?;
        let [file_rows, file_names] = columns::files(&owned);
        let columns = [
            (ROWS, rows),
            (BLOCKS, digests),
            (FILES, file_rows),
            (DIMS, dims),
            (SPANS, spans),
            (TENSORS, table),
            (BOX_FILES, box_files),
            (NAMES, names),
            (FILE_NAMES, file_names),
        ];
        let blocks = tensors.iter().flat_map(|t| &t.slices).map(|s| s.blocks.len()).collect();
        Ok(Self { blank: Blank::new(&columns)?, files: files.len(), blocks })
    }

    /// Writes the bytes of `tensors.table` to `out`, and reuses its memory if it is large enough. Returns the
    /// manifest's entry for the table. `files` has the facts of each written file. `slices` has the digests
    /// of each slice and of its blocks, tensor by tensor. Both are in the order given to
    /// [`TableTemplate::new`].
    ///
    /// # Errors
    /// `Internal` when there are more or fewer digests than the structure has room for.
    pub fn fill<'d>(
        &self,
        (step, attempt): (u64, Attempt),
        files: impl IntoIterator<Item = impl Into<FilledFile>>,
        slices: impl IntoIterator<Item = (Digest, &'d [Digest])>,
        out: &mut AlignedBuffer,
    ) -> Result<TableEntry> {
        let from = self.blank.bytes();
        out.reset(from.len());
        out.copy_from_slice(from);
        let (rows, end) = (self.blank.column(0), self.blank.column(3));
        let room = out.get_mut(rows..end).unwrap_or_default();
        let (rows, room) = room.split_at_mut(self.blank.column(1) - rows);
        let (digests, room) = room.split_at_mut(self.blank.column(2) - self.blank.column(1));
        let put = |to: &mut [u8], number: u64| to.copy_from_slice(&number.to_le_bytes());

        let (mut rows, mut digests) = (rows.chunks_exact_mut(32), digests.chunks_exact_mut(8));
        let mut expected = self.blocks.iter();
        for (digest, blocks) in slices {
            let (true, Some(row)) = (expected.next() == Some(&blocks.len()), rows.next()) else {
                return Err(wrong("others"));
            };
            put(&mut row[16..24], digest.to_bits());
            blocks.iter().zip(&mut digests).for_each(|(block, to)| put(to, block.to_bits()));
        }
        let mut room = room.chunks_exact_mut(80).take(self.files);
        for file in files {
            let FilledFile { header, whole, origin } = file.into();
            let (step, attempt) = origin.unwrap_or((step, attempt));
            let (row, id) = (room.next().ok_or_else(|| wrong("more"))?, attempt.to_u128());
            put(&mut row[24..32], header.to_bits());
            put(&mut row[32..40], whole.to_bits());
            put(&mut row[56..64], step);
            put(&mut row[64..72], (id >> 64) as u64);
            put(&mut row[72..80], id as u64);
        }
        if room.next().is_some() || expected.next().is_some() {
            return Err(wrong("fewer"));
        }
        let digest = self.blank.seal(out, end);
        Ok(TableEntry { name: TENSORS_TABLE.into(), length: out.len() as u64, digest })
    }
}

fn wrong(what: &str) -> Error {
    Error::internal(format!("there are {what} digests than the table has room for"))
}
