//! The split tables of a step that several ranks write. Ranks that leave their rows to rank 0 do not need
//! them: a [`TableTemplate`](super::template::TableTemplate) of all ranks makes one table.
//!
//! 1. Each rank writes its shards, and beside each shard the bytes of [`rows_table`], under the name
//!    [`FileRow::rows_name`]. It sends a [`FileRow`] of every file to rank 0 with its receipt.
//! 2. Rank 0 writes [`tensors_table`] of the whole structure, and [`files_table`] of the receipts, in the
//!    order of the file numbers that the structure's slices name.
//! 3. Rank 0 writes [`manifest`] last.
//!
//! The first three functions return the bytes of a file, and the description of the file for the next one:
//! name, length and digest.

use super::columns::{self, BESIDE, FILES_TABLE, FileRow, STEP_FILES, STRUCTURE, TENSORS_TABLE};
use super::entries::{SliceEntry, TensorEntry};
use super::manifest::{Manifest, TableEntry};
use super::table::Blank;
use super::{invariants, seal};
use crate::error::{Error, Result};
use crate::id::Attempt;
use serde_json::Value;
use std::collections::BTreeMap;
use uuid::Uuid;

/// The identity of the save for which several ranks write a manifest.
#[derive(Clone, Debug)]
pub struct Head {
    /// The step.
    pub step: u64,
    /// The attempt.
    pub attempt: Attempt,
    /// The session of the ranks.
    pub session: Uuid,
    /// The number of the session in the root.
    pub generation: u64,
    /// How many ranks write the step.
    pub world: u32,
}

/// Makes the table of the rows of one shard, `file`. Each row has the number of the tensor, the box and its
/// digests; rows are sorted by tensor number. `values` are those of the rank, encoded by
/// [`crate::state::encode_value`]. A rank with several shards gives its values to the first shard and none to
/// the others.
///
/// # Errors
/// `Internal` when rows are not in order; `Invalid` when there are more rows than a table can hold.
pub fn rows_table<'s>(
    file: &str,
    rows: impl IntoIterator<Item = (u32, &'s SliceEntry)>,
    values: &BTreeMap<String, Value>,
) -> Result<(Vec<u8>, TableEntry)> {
    let (tensors, slices): (Vec<u32>, Vec<&SliceEntry>) = rows.into_iter().unzip();
    if !tensors.is_sorted() {
        return Err(Error::internal(format!("rows are not in the order of their tensors file={file:?}")));
    }
    let tensors = tensors.into_iter().flat_map(u32::to_le_bytes).collect();
    let [rows, blocks] = columns::rows(slices);
    let values = serde_json::to_vec(values).map_err(|e| Error::internal("cannot write json").with_source(e))?;
    made(FileRow::rows_name(file), &BESIDE, [rows, blocks, tensors, values])
}

/// Makes `tensors.table`: tensors sorted by name, with the file and box of each of their slices. The slices'
/// digests, offsets and lengths are not used. `aliases` maps the number of each tensor without slices to the
/// number of the tensor that holds its bytes.
///
/// # Errors
/// `Internal` when tensors are not in order or their slices do not cover their shape; `Invalid` when there
/// are more tensors than a table can hold.
pub fn tensors_table(tensors: &[TensorEntry], aliases: &BTreeMap<usize, usize>) -> Result<(Vec<u8>, TableEntry)> {
    columns::check_aliases(tensors, aliases)?;
    let hole = tensors.iter().enumerate().find(|(i, tensor)| !aliases.contains_key(i) && !invariants::covers(tensor));
    if let Some((_, TensorEntry { name, shape, .. })) = hole {
        return Err(Error::internal(format!("boxes do not cover a tensor tensor={name:?} shape={shape:?}")));
    }
    made(TENSORS_TABLE.into(), &STRUCTURE, columns::structure(tensors, aliases)?)
}

/// Makes `files.table` of all files of the step.
///
/// # Errors
/// `Internal` when two files have the same name, or a shard has no table of rows.
pub fn files_table(files: &[FileRow]) -> Result<(Vec<u8>, TableEntry)> {
    invariants::check_files(files.iter().map(|file| &file.entry))
        .map_err(|error| error.with_kind(crate::error::ErrorKind::Internal))?;
    if let Some(file) = files.iter().find(|file| (file.entry.data > 0) != file.rows.is_some()) {
        return Err(Error::internal(format!("a shard has no table of rows file={:?}", file.entry.name)));
    }
    made(FILES_TABLE.into(), &STEP_FILES, columns::files(files))
}

/// Makes `manifest.json`. `values` are those that all ranks share; `tables` are the results of
/// [`tensors_table`] and [`files_table`].
///
/// # Errors
/// `Internal` when a value is not JSON.
pub fn manifest(
    head: &Head,
    files: &[FileRow],
    tables: [TableEntry; 2],
    metadata: &BTreeMap<String, Value>,
    values: &BTreeMap<String, Value>,
) -> Result<Vec<u8>> {
    let of_files = files.iter().map(|file| file.entry.length + file.rows.map_or(0, |(length, _)| length));
    let bytes = of_files.chain(tables.iter().map(|table| table.length)).sum();
    let manifest = Manifest {
        version: seal::VERSION,
        session: Some(head.session),
        generation: Some(head.generation),
        world: head.world,
        metadata: metadata.clone(),
        values: values.clone(),
        bytes,
        tables: tables.into(),
        ..Manifest::new(head.step, head.attempt)
    };
    manifest.to_bytes()
}

fn made<const N: usize>(
    name: String,
    specs: &[super::table::Spec; N],
    columns: [Vec<u8>; N],
) -> Result<(Vec<u8>, TableEntry)> {
    let columns: Vec<_> = specs.iter().copied().zip(columns).collect();
    let (bytes, digest) = Blank::new(&columns)?.sealed();
    let length = bytes.len() as u64;
    Ok((bytes, TableEntry { name, length, digest }))
}
