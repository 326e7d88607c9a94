//! `manifest.json`: every file, tensor, value and digest of a step.

use crate::digest::Digest;
use crate::id::Attempt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name of the manifest in a step directory.
pub const MANIFEST: &str = "manifest.json";

/// Tensors longer than this have a digest for each piece of this many bytes, so that a slice can be checked without the rest.
pub const BLOCK: u64 = 8 << 20;

/// A checkpoint as the manifest describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always "ashore".
    pub format: String,
    /// The version of the format: 1.
    pub version: u32,
    /// The step.
    pub step: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// How many ranks wrote it.
    pub world: u32,
    /// User metadata, encoded by [`crate::state::encode_value`].
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Values, encoded by [`crate::state::encode_value`].
    pub values: BTreeMap<String, serde_json::Value>,
    /// Every file of the step but the manifest.
    pub files: Vec<FileEntry>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorEntry>,
}

/// A file of the step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name: one path component.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// Where tensor data begins: the length of the safetensors header with its prefix. 0: not a shard.
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
    /// Its name: data, never a path.
    pub name: String,
    /// Its dtype, as safetensors spells it.
    pub dtype: safetensors::Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes are. Today one slice that covers the tensor.
    pub slices: Vec<SliceEntry>,
}

/// A contiguous run of a tensor's bytes in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceEntry {
    /// Index into `files`.
    pub file: usize,
    /// Where the bytes begin in the file.
    pub offset: u64,
    /// How many there are.
    pub length: u64,
    /// Where the slice begins in the tensor, per dimension.
    pub at: Vec<usize>,
    /// The shape of the slice.
    pub shape: Vec<usize>,
    /// The digest of the bytes.
    pub digest: Digest,
    /// The digest of each [`BLOCK`] of them; empty when there is only one.
    pub blocks: Vec<Digest>,
}
