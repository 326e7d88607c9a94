//! The entries of a step: files, tensors, slices, and the digests of each. Version 1 stores them in its
//! manifest. Version 2 stores them in tables, and calls a slice a box.

use crate::digest::Digest;
use serde::{Deserialize, Serialize};

/// The name of the manifest in a step directory.
pub const MANIFEST: &str = "manifest.json";

/// A tensor longer than this has one digest for each block of this many bytes. A reader can then check a part
/// without reading the rest.
pub const BLOCK: u64 = 8 << 20;

/// The number of block digests of a slice of `length` bytes.
pub fn block_count(length: u64) -> usize {
    // No file has more than 2^63 bytes, so the count fits.
    if length > BLOCK { length.div_ceil(BLOCK) as usize } else { 0 }
}

/// A file of the step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// The file's name: one path component.
    pub name: String,
    /// The file's length in bytes.
    pub length: u64,
    /// The offset of tensor data, which is the length of the safetensors header with its prefix; 0 if the
    /// file is not a shard.
    pub data: u64,
    /// The digest of the bytes before `data`.
    pub header: Digest,
    /// The digest of the whole file.
    pub digest: Digest,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// The tensor's name: data, never a path.
    pub name: String,
    /// The tensor's dtype, as safetensors spells it.
    pub dtype: crate::state::Dtype,
    /// The tensor's shape.
    pub shape: Vec<usize>,
    /// The slices that hold the tensor's bytes. Today this is one slice that covers the tensor.
    pub slices: Vec<SliceEntry>,
}

/// A contiguous run of a tensor's bytes in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceEntry {
    /// Index into `files`.
    pub file: usize,
    /// The offset of the bytes in the file.
    pub offset: u64,
    /// The number of bytes.
    pub length: u64,
    /// The slice's first index in the tensor, per dimension.
    pub at: Vec<usize>,
    /// The shape of the slice.
    pub shape: Vec<usize>,
    /// The digest of the bytes.
    pub digest: Digest,
    /// The digest of each [`BLOCK`] of the bytes. Empty when there is only one block.
    pub blocks: Vec<Digest>,
}
